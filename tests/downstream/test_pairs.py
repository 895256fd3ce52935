import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orl import InputError, artifacts, cli, config
from orl.downstream.pairs import SHARES, evaluate, shown


def overlap(a, b):
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(across, 0) * max(down, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


BOX = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 6)] * 2)


@given(st.lists(BOX, max_size=6), st.lists(st.tuples(BOX, st.integers(0, 3)), max_size=6))
@example([(0, 0, 2, 1)], [((0, 0, 2, 2), 3), ((0, 0, 2, 1), 0)])  # IoU 0.5 exactly, and two classes
def test_the_classes_that_boxes_show_are_those_of_a_double_loop(boxes, objects):
    of = np.array([box for box, _ in objects], float).reshape(-1, 4)
    found = shown(np.array(boxes, np.int16).reshape(-1, 4), of, np.array([kind for _, kind in objects], int), 4)
    expected = [{kind for other, kind in objects if overlap(box, other) >= 0.5} for box in boxes]
    assert [set(np.flatnonzero(row).tolist()) for row in found] == expected


# Files


class Case:
    """A manifest, proposals, RoI pairs and annotations; what it holds may be changed before `write`.

    Every other object lies near a box, some have the box of one before and another class, and some photos have none.
    """

    def __init__(self, folder, photos=14, k=4, ratio=0.3, seed=0):
        rng = np.random.default_rng(seed)

        def boxes(count):
            return np.concatenate([rng.integers(0, 200, (count, 2)), rng.integers(80, 200, (count, 2))], 1).tolist()

        self.folder, self.photos, self.k, self.ratio = folder, photos, k, ratio
        self.rows = [(f"{row:04d}", f"a/{row:04d}.jpg", 640, 480, 9, "a") for row in range(photos)]
        self.kept = [boxes(rng.integers(1, 30)) for _ in range(photos)]
        self.images = [{"id": 100 + row, "file_name": f"{row:04d}.jpg"} for row in range(photos - 1)]
        self.annotations = []
        for row in range(photos - 3):
            near = (np.array(self.kept[row][::2]) + rng.integers(-15, 15, 4)).tolist()
            found = [*near, *boxes(2)]
            found += found[: rng.integers(0, 3)]
            self.annotations += [
                {"image_id": 100 + row, "category_id": int(rng.choice([3, 90, 5, 7])), "bbox": box,
                 "iscrowd": int(rng.random() < 0.1)}
                for box in found
            ]  # fmt: skip
        self.neighbor = np.array(
            [rng.choice(np.delete(np.arange(photos), row), k, replace=False) for row in range(photos)], np.int32
        )
        self.pairs = [
            [
                list(divmod(int(flat), len(self.kept[other])))
                for flat in rng.choice(len(own) * len(self.kept[other]), max(1, int(ratio * len(own))), replace=False)
            ]
            for own, others in zip(self.kept, self.neighbor.tolist(), strict=True)
            for other in others
        ]

    def write(self, annotations=None, **settings):
        folder = self.folder
        artifacts.write_csv(folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, self.rows)
        inputs = {"manifest": artifacts.fingerprint(folder / "manifest.csv")}
        with artifacts.create(folder / "proposals.h5", artifacts.PROPOSALS, {}, inputs) as file:
            file["box"] = np.concatenate(self.kept).astype(np.int16)
            file["box_offsets"] = np.cumsum([0, *map(len, self.kept)], dtype=np.int64)
        inputs = {"proposals": artifacts.fingerprint(folder / "proposals.h5")}
        made_with = {"correspondences": {"ratio": self.ratio}}
        with artifacts.create(folder / "pairs.h5", artifacts.CORRESPONDENCES, made_with, inputs) as file:
            file["neighbor"] = self.neighbor
            file["pair"] = np.concatenate(self.pairs).astype(np.uint16)
            file["similarity"] = np.ones(sum(map(len, self.pairs)), np.float16)
            file["pair_offsets"] = np.cumsum([0, *map(len, self.pairs)], dtype=np.int64)
        if annotations is None:
            annotations = [{"images": self.images, "annotations": self.annotations}]
        files = [folder / f"instances{number}.json" for number in range(len(annotations))]
        for path, value in zip(files, annotations, strict=True):
            path.write_text(value if isinstance(value, str) else json.dumps(value))
        return self.evaluate(files, **settings)

    def evaluate(self, files, **settings):
        paths = [self.folder / name for name in ("manifest.csv", "proposals.h5", "pairs.h5")]
        return evaluate(config.parse(settings), "mine", *paths, files, self.folder / "out" / "pairs.json")

    def classes(self):
        """Which classes each box of each photo shows."""
        return [
            [
                {
                    one["category_id"]
                    for one in self.annotations
                    if one["image_id"] == 100 + row and not one["iscrowd"] and overlap(one["bbox"], box) >= 0.5
                }
                for box in boxes
            ]
            for row, boxes in enumerate(self.kept)
        ]

    def each(self):
        """Of each pair: photo, rank of the neighbour, neighbour, number among the pairs of the two photos, boxes."""
        slots = ((row, rank) for row in range(self.photos) for rank in range(self.k))
        for (row, rank), pairs in zip(slots, self.pairs, strict=True):
            for place, (here, there) in enumerate(pairs):
                yield row, rank, int(self.neighbor[row, rank]), place, here, there


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def test_the_result_is_that_of_a_loop_over_all_pairs(case):
    result = case.write()
    assert result == artifacts.read_results(case.folder / "out" / "pairs.json")
    metrics, data, classes = result["metrics"], result["data"], case.classes()
    pairs = [(*pair, bool(classes[pair[0]][pair[4]] & classes[pair[2]][pair[5]])) for pair in case.each()]
    assert metrics["pairs"] == len(pairs)
    assert metrics["precision"] == pytest.approx(np.mean([right for *_, right in pairs]))
    assert 0.05 < metrics["precision"] < 0.95
    assert metrics["on_object"] == pytest.approx(np.mean([bool(kinds) for photo in classes for kinds in photo]))
    both = [bool(classes[row][here]) and bool(classes[other][there]) for row, _, other, _, here, there in case.each()]
    assert metrics["pairs_on_objects"] == pytest.approx(np.mean(both))
    assert any(len(kinds) > 1 for photo in classes for kinds in photo)
    assert metrics["neighbors"] == [1, 2, 4]
    assert metrics["shares"] == [*(share for share in SHARES if share < 0.3), 0.3]
    for share, values in zip(metrics["shares"], metrics["by_neighbors"], strict=True):
        for most, value in zip(metrics["neighbors"], values, strict=True):
            chosen = [
                right
                for row, rank, _, place, _, _, right in pairs
                if rank < most and place < max(1, int(share * len(case.kept[row])))
            ]
            assert value == pytest.approx(np.mean(chosen))
    assert metrics["by_neighbors"][-1][-1] == metrics["precision"]
    counted = [one for one in case.annotations if not one["iscrowd"]]
    assert (data["photos"], data["objects"], data["classes"]) == (14, len(counted), 4)
    assert data["photos_with_objects"] == len({one["image_id"] for one in counted}) == 11
    assert data["crowds"] == len(case.annotations) - len(counted) > 0
    assert (result["task"], result["model"]) == ("pairs", "mine")
    assert result["settings"]["made_with"] == {"correspondences": {"ratio": 0.3}}


def test_random_pairs_are_right_as_often_as_all_possible_ones(case):
    """A million draws: the standard error is 0.0005 at most."""
    metrics, classes = case.write()["metrics"], case.classes()

    def chance(one, other):
        return np.mean([bool(here & there) for here in classes[one] for there in classes[other]])

    chances = {(one, other): chance(one, other) for one in range(14) for other in range(14) if one != other}
    assert metrics["random_photos"] == pytest.approx(np.mean(list(chances.values())), abs=0.002)
    own = [(rank, chances[row, other]) for row, rank, other, *_ in case.each()]
    assert metrics["random_rois"] == pytest.approx(np.mean([value for _, value in own]), abs=0.002)
    for most, found in zip(metrics["neighbors"], metrics["random_rois_by_neighbors"], strict=True):
        assert found == pytest.approx(np.mean([value for rank, value in own if rank < most]), abs=0.004)
    assert metrics["random_rois_by_neighbors"][-1] == metrics["random_rois"]
    assert abs(metrics["random_rois"] - metrics["random_photos"]) > 0.004  # they cannot be mixed up


def test_only_the_random_pairs_depend_on_the_seed(case):
    first, again, other = (case.write(seed=seed) for seed in (0, 0, 1))
    assert first == again
    random = {"random_rois", "random_photos", "random_rois_by_neighbors"}
    assert {key for key, value in first["metrics"].items() if other["metrics"][key] != value} == random
    assert other["settings"]["seed"] == 1


def test_where_every_box_is_an_object_of_one_class_all_pairs_are_right(case):
    case.annotations = [
        {"image_id": 100 + row, "category_id": 0, "bbox": box} for row, boxes in enumerate(case.kept) for box in boxes
    ]
    case.images.append({"id": 113, "file_name": "0013.jpg"})
    metrics = case.write()["metrics"]
    for key in ("precision", "random_rois", "random_photos", "on_object", "pairs_on_objects"):
        assert metrics[key] == 1
    assert np.all(np.concatenate([*metrics["by_neighbors"], metrics["random_rois_by_neighbors"]]) == 1)


def test_photos_of_different_classes_make_no_right_pair(case):
    for one in case.annotations:
        one["category_id"] = one["image_id"]
    metrics = case.write()["metrics"]
    assert (metrics["precision"], metrics["random_rois"], metrics["random_photos"]) == (0, 0, 0)
    assert metrics["on_object"] > 0.3


@pytest.mark.parametrize("ratio", [0.02, 0.01, 0.1, 1.0])
def test_shares_end_at_the_ratio_of_the_pairs(tmp_path, ratio):
    metrics = Case(tmp_path, photos=5, k=2, ratio=ratio).write()["metrics"]
    assert metrics["shares"] == sorted({*(share for share in SHARES if share <= ratio), ratio})
    assert metrics["by_neighbors"][-1][-1] == metrics["precision"]


def test_two_photos_with_one_box_each(tmp_path):
    case = Case(tmp_path, photos=2, k=1)
    case.kept, case.pairs = [[[0, 0, 9, 9]], [[5, 5, 90, 90]]], [[[0, 0]]] * 2
    case.images = [{"id": number, "file_name": f"000{number}.jpg"} for number in range(2)]
    case.annotations = [{"image_id": row, "category_id": 1, "bbox": case.kept[row][0]} for row in range(2)]
    metrics = case.write()["metrics"]
    assert (metrics["pairs"], metrics["precision"], metrics["random_rois"], metrics["random_photos"]) == (2, 1, 1, 1)
    case.annotations.pop()  # a photo without any object
    metrics = case.write()["metrics"]
    assert (metrics["pairs"], metrics["precision"], metrics["random_rois"], metrics["random_photos"]) == (2, 0, 0, 0)
    assert metrics["on_object"] == 0.5


def test_several_files_with_the_same_classes(case):
    whole = case.write()
    first = {"images": case.images[:6], "annotations": [one for one in case.annotations if one["image_id"] < 106]}
    other = {"images": case.images[6:], "annotations": [one for one in case.annotations if one["image_id"] >= 106]}
    assert case.write([other, first])["metrics"] == whole["metrics"]


# Bad input

ONE = {"image_id": 1, "bbox": [0, 0, 9, 9]}
PHOTO = {"id": 1, "file_name": "0001.jpg"}


@pytest.mark.parametrize(
    ("annotations", "sentence"),
    [
        (["{"], "instances0.json: is no JSON"),
        ([{"images": [PHOTO], "annotations": [ONE]}], "instances0.json: has a box without category_id"),
        ([{"images": [PHOTO], "annotations": [{**ONE, "category_id": "cat"}]}], "has a box without category_id"),
        ([{"images": [PHOTO], "annotations": [{**ONE, "category_id": 1}]},
          {"images": [{**PHOTO, "file_name": "0002.jpg"}], "annotations": [ONE]}],
         "instances0.json, .*instances1.json: has a box without category_id"),
        ([{"images": [PHOTO], "annotations": []}], "instances0.json: has no box on a photo of the manifest"),
        ([{"images": [{**PHOTO, "file_name": "x"}], "annotations": [ONE]}], "has no box on a photo of the manifest"),
    ],
)  # fmt: skip
def test_bad_annotations_are_one_sentence(case, annotations, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        case.write(annotations)
    assert "\n" not in str(caught.value)
    assert not (case.folder / "out").exists()


def test_a_crowd_needs_no_class(case):
    crowd = {"image_id": 100, "bbox": [0, 0, 90, 90], "iscrowd": 1}
    before = case.write()["metrics"]
    case.annotations.append(crowd)
    assert case.write()["metrics"] == before


def test_files_that_do_not_belong_together_are_refused(case):
    case.write()
    (case.folder / "out" / "pairs.json").unlink()
    files, inputs = [case.folder / "instances0.json"], {"proposals": "others"}
    found = artifacts.read_correspondences(case.folder / "pairs.h5")
    whole = {name: np.array(getattr(found, name)) for name in artifacts.LAYOUT[artifacts.CORRESPONDENCES]}
    with artifacts.create(case.folder / "pairs.h5", artifacts.CORRESPONDENCES, {}, inputs) as file:
        file.update(whole)
    with pytest.raises(InputError, match=r"pairs.h5: was made from another proposals"):
        case.evaluate(files)
    offsets = whole["pair_offsets"][: -case.k]
    fewer = {name: whole[name][: offsets[-1]] for name in ("pair", "similarity")}
    fewer |= {"neighbor": whole["neighbor"][:-1] % 13, "pair_offsets": offsets}
    with artifacts.create(case.folder / "pairs.h5", artifacts.CORRESPONDENCES, {}, inputs) as file:
        file.update(fewer)
    with pytest.raises(InputError, match=r"pairs.h5: has 13 rows, but .*manifest.csv has 14"):
        case.evaluate(files)
    artifacts.write_csv(case.folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, case.rows[1:])
    with pytest.raises(InputError, match=r"proposals.h5: has 14 rows, but .*manifest.csv has 13"):
        case.evaluate(files)
    artifacts.write_csv(case.folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, case.rows[::-1])
    with artifacts.create(case.folder / "pairs.h5", artifacts.CORRESPONDENCES, {}, inputs) as file:
        file.update(whole)
    with pytest.raises(InputError, match=r"proposals.h5: was made from another manifest"):
        case.evaluate(files)
    assert not (case.folder / "out" / "pairs.json").exists()


# The command


def test_the_command_writes_what_the_function_does(case, capsys):
    expected = case.write(seed=4)
    (case.folder / "out" / "pairs.json").unlink()
    files = [case.folder / name for name in ("manifest.csv", "proposals.h5", "pairs.h5", "instances0.json")]
    flags = ("--manifest", "--proposals", "--correspondences", "--annotations")
    options = [str(part) for flag, path in zip(flags, files, strict=True) for part in (flag, path)]
    line = ["evaluate", "pairs", "--settings", '{"seed": 4}', *options, "--output"]
    cli.main([*line, str(case.folder / "named.json"), "--name", "mine"])
    assert artifacts.read_results(case.folder / "named.json") == expected
    cli.main([*line, str(case.folder / "unnamed.json")])
    assert artifacts.read_results(case.folder / "unnamed.json") == {**expected, "model": "pairs"}
    capsys.readouterr()
    del case.annotations[5]["category_id"]
    files[-1].write_text(json.dumps({"images": case.images, "annotations": case.annotations}))
    with pytest.raises(SystemExit) as end:
        cli.main([*line, str(case.folder / "new" / "pairs.json")])
    assert end.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert said.startswith(f"orl evaluate: {files[-1]}: has a box without category_id")
    assert not (case.folder / "new").exists()
