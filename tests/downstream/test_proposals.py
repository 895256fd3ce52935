import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from orl import InputError, artifacts, config
from orl.downstream.proposals import NEVER, evaluate, ranks, steps

# One object and the boxes of one photo


def overlap(a, b):
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(across, 0) * max(down, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


BOXES = st.lists(st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 6)] * 2), max_size=8)


@given(BOXES, BOXES)
@example([(0, 0, 2, 2)], [(0, 0, 2, 1), (0, 0, 2, 2)])  # IoU 0.5 exactly, then 1
def test_ranks_are_those_of_a_double_loop(objects, kept):
    found = ranks(np.array(objects, float).reshape(-1, 4), np.array(kept, np.int16).reshape(-1, 4), (0.5, 0.7))
    for row, box in enumerate(objects):
        for column, threshold in enumerate((0.5, 0.7)):
            hits = [number for number, other in enumerate(kept, 1) if overlap(box, other) >= threshold]
            assert found[row, column] == min(hits, default=NEVER)
    assert found.shape == (len(objects), 2)


def test_steps_end_at_the_most():
    assert steps(1) == [1]
    assert steps(5) == [1, 2, 5]
    assert steps(95) == [1, 2, 5, 10, 20, 50, 95]
    assert steps(100) == [1, 2, 5, 10, 20, 50, 100]
    assert steps(700)[-3:] == [200, 500, 700]


# Files


class Case:
    """A manifest, proposals and annotations of random boxes; some lists may be changed before `write`."""

    def __init__(self, folder, photos=40, seed=0):
        rng = np.random.default_rng(seed)

        def boxes(count, side):
            corner = rng.integers(0, 300, (count, 2))
            return np.concatenate([corner, rng.integers(side, 300, (count, 2))], 1)

        self.folder = folder
        self.rows = [(f"{row:04d}", f"train2017/{row:04d}.jpg", 640, 640, 9, "train2017") for row in range(photos)]
        self.kept = [boxes(rng.integers(1, 30), 96) for _ in range(photos)]
        self.images = [{"id": 100 + row, "file_name": f"{row:04d}.jpg", "width": 640, "height": 640}
                       for row in range(photos - 1)]  # fmt: skip
        self.annotations = []
        for row in range(photos - 2):
            found = boxes(rng.integers(1, 9), 20) + rng.random(4).round(2)
            near = self.kept[row][:: rng.integers(1, 9)] + rng.integers(-9, 9)  # else few would be found
            self.annotations += [
                {"id": 0, "image_id": 100 + row, "category_id": 1, "bbox": box, "iscrowd": int(rng.random() < 0.1),
                 "segmentation": {"size": [1, 1], "counts": [1]}, "area": 7.0}
                for box in [*found.tolist(), *near.tolist()]
            ]  # fmt: skip
        for number, one in enumerate(self.annotations, 1):
            one["id"] = number

    def write(self, annotations=None, plot=None, **settings):
        folder = self.folder
        artifacts.write_csv(folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, self.rows)
        inputs = {"manifest": artifacts.fingerprint(folder / "manifest.csv")}
        made_with = {"proposals": {"method": "grid"}}
        with artifacts.create(folder / "proposals.h5", artifacts.PROPOSALS, made_with, inputs) as file:
            file["box"] = np.concatenate(self.kept).astype(np.int16)
            file["box_offsets"] = np.cumsum([0, *map(len, self.kept)], dtype=np.int64)
        if annotations is None:
            annotations = [{"images": self.images, "annotations": self.annotations}]
        files = [folder / f"instances{number}.json" for number in range(len(annotations))]
        for path, value in zip(files, annotations, strict=True):
            path.write_text(value if isinstance(value, str) else json.dumps(value))
        return self.evaluate(files, plot, **settings)

    def evaluate(self, files, plot=None, **settings):
        whole = config.parse({"proposals": settings})
        folder = self.folder
        output = folder / "out" / "recall.json"
        return evaluate(whole, "mine", folder / "manifest.csv", folder / "proposals.h5", files, output, plot)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def test_the_result_is_that_of_a_double_loop(case):
    case.annotations[3]["bbox"][2] = 0.0
    case.annotations[4]["bbox"][3] = -3.0
    case.annotations[3]["iscrowd"] = case.annotations[4]["iscrowd"] = 0
    result = case.write(min_size=50)
    assert result == artifacts.read_results(case.folder / "out" / "recall.json")
    counted = [one for one in case.annotations if not one["iscrowd"] and min(one["bbox"][2:]) > 0]
    data, metrics = result["data"], result["metrics"]
    assert (data["photos"], data["photos_left_out"]) == (38, 2)  # one not listed, one listed without an object
    assert (data["crowds"], data["without_area"]) == (sum(one["iscrowd"] for one in case.annotations), 2)
    assert data["objects"] == len(counted)
    assert metrics["boxes_per_photo"] == pytest.approx(np.mean([len(kept) for kept in case.kept[:38]]))
    assert metrics["kept"] == steps(max(len(kept) for kept in case.kept[:38]))
    for name, side in (("all", 0), ("large", 50)):
        chosen = [one for one in counted if min(one["bbox"][2:]) >= side]
        for threshold in (0.5, 0.7):
            for number, value in zip(metrics["kept"], metrics["recall"][name][str(threshold)], strict=True):
                hits = [
                    any(overlap(one["bbox"], box) >= threshold for box in case.kept[one["image_id"] - 100][:number])
                    for one in chosen
                ]
                assert value == pytest.approx(np.mean(hits))
        assert name == "all" or data["large_objects"] == len(chosen) < len(counted)
    assert (result["task"], result["model"]) == ("proposals", "mine")
    assert result["settings"]["proposals"] == {"min_size": 50}
    assert result["settings"]["made_with"] == {"proposals": {"method": "grid"}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("seed", range(3))
def test_recall_is_that_of_pycocotools(tmp_path, seed):
    """COCO lets a box find one object only. Objects that share a box with another are therefore taken out first; with
    them, COCO finds no more than we do."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    case = Case(tmp_path, seed=seed)

    def compare():
        ours = case.write()
        for one in case.annotations:
            one["area"] = min(one["bbox"][2:]) ** 2  # so that its area range is our limit of the sides
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco.COCO()
            truth.dataset = {"images": case.images, "annotations": case.annotations, "categories": [{"id": 1}]}
            truth.createIndex()
            rows = [
                [100 + row, *box, -rank, 1] for row, kept in enumerate(case.kept[:-1]) for rank, box in enumerate(kept)
            ]
            theirs = cocoeval.COCOeval(truth, truth.loadRes(np.array(rows, float)), "bbox")
            theirs.params.useCats = 0
            theirs.params.iouThrs = np.array([0.5, 0.7])
            theirs.params.maxDets = ours["metrics"]["kept"]
            theirs.params.areaRng = [[0, 1e10], [96**2, 1e10]]
            theirs.params.areaRngLbl = ["all", "large"]
            theirs.evaluate()
            theirs.accumulate()
        recall = theirs.eval["recall"][:, 0]  # [threshold, area, number]
        expected = [[ours["metrics"]["recall"][name][iou] for name in ("all", "large")] for iou in ("0.5", "0.7")]
        return np.array(expected), recall

    ours, theirs = compare()
    assert (theirs <= ours + 1e-12).all()
    assert (theirs < ours - 1e-3).any()

    alone, taken = [], set()
    for one in case.annotations:
        photo = one["image_id"] - 100
        near = {(photo, i) for i, box in enumerate(case.kept[photo]) if overlap(one["bbox"], box) >= 0.5}
        if not near & taken:
            alone.append(one)
            taken |= near
    case.annotations = alone
    ours, theirs = compare()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert 0.1 < ours.mean() < 0.9


def test_several_files_and_one_that_only_lists_photos(case):
    whole = case.write()
    first = {"images": case.images[:9], "annotations": [one for one in case.annotations if one["image_id"] < 109]}
    rest = [{**one, "image_id": one["image_id"] - 109} for one in case.annotations if one["image_id"] >= 109]
    other = {"images": [{**one, "id": one["id"] - 109} for one in case.images[9:-1]], "annotations": rest}
    split = case.write([first, other, {"images": case.images[-1:]}])
    assert split["metrics"] == whole["metrics"]
    assert split["data"]["photos"] == whole["data"]["photos"]


def test_photos_of_another_size_and_of_no_manifest_are_left_out(case):
    case.images[0]["width"] = 320
    case.images[1]["file_name"] = "elsewhere.jpg"
    data = case.write()["data"]
    assert (data["photos"], data["photos_of_other_size"], data["photos_left_out"]) == (36, 1, 4)


def test_where_no_object_is_large_recall_is_null(case):
    metrics = case.write(min_size=5000)["metrics"]
    assert metrics["recall"]["large"] == {iou: [None] * len(metrics["kept"]) for iou in ("0.5", "0.7")}


def test_the_chart_is_a_png_and_always_the_same(case):
    paths = [case.folder / name for name in ("a.png", "b.png")]
    for path in paths:
        case.write(plot=path)
    with Image.open(paths[0]) as image:
        assert image.format == "PNG"
    assert paths[0].read_bytes() == paths[1].read_bytes()


def image(number, name):
    return {"id": number, "file_name": name}


ONE = {"image_id": 1, "bbox": [0, 0, 9, 9]}


@pytest.mark.parametrize(
    ("annotations", "sentence"),
    [
        (["{"], "instances0.json: is no JSON"),
        (["[]"], "instances0.json: is no COCO file"),
        ([{"images": [image(1, "0001.jpg")]}], "instances0.json: has no box on a photo of the manifest"),
        ([{"images": [image(1, "x.jpg")], "annotations": [ONE]}], "has no box on a photo of the manifest"),
        ([{"images": [{**image(1, "0001.jpg"), "width": 5, "height": 5}], "annotations": [ONE]}],
         "1 photos have another size there"),
        ([{"images": [image(1, "0001.jpg")], "annotations": [{**ONE, "bbox": [1, 2, 3]}]}], "that is not x, y, w, h"),
        ([{"images": [image(1, "0001.jpg")], "annotations": [{**ONE, "image_id": 2}]}], "of image_id 2, which"),
        ([{"images": [image(1, "0001.jpg"), image(1, "2.jpg")], "annotations": [ONE]}], "an `id` of their own"),
        ([{"images": [image(1, "0001.jpg"), image(2, "a/0001.jpg")], "annotations": [ONE]}], "lists photo '0001', as"),
        ([{"images": [image(1, "0001.jpg")], "annotations": [ONE]}] * 2,
         "instances1.json: lists photo '0001', as does .*instances0.json"),
    ],
)  # fmt: skip
def test_bad_annotations_are_one_sentence(case, annotations, sentence):
    with pytest.raises(InputError, match=sentence):
        case.write(annotations)
    assert not (case.folder / "out").exists()


def test_proposals_of_another_manifest_are_refused(case):
    case.write()
    output = case.folder / "out" / "recall.json"
    output.unlink()
    files = [case.folder / "instances0.json"]
    artifacts.write_csv(case.folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, case.rows[::-1])
    with pytest.raises(InputError, match=r"proposals.h5: was made from another manifest"):
        case.evaluate(files)
    artifacts.write_csv(case.folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, case.rows[1:])
    with pytest.raises(InputError, match=r"proposals.h5: has 40 rows, but .*manifest.csv has 39"):
        case.evaluate(files)
    assert not output.exists()


def test_photos_of_one_name_cannot_be_told_apart(case):
    case.rows[1] = ("more", "val2017/0000.jpg", *case.rows[1][2:])
    case.images, case.annotations = case.images[1:], [one for one in case.annotations if one["image_id"] > 101]
    case.rows[5] = ("other", "val2017/0004.jpg", *case.rows[5][2:])
    with pytest.raises(InputError, match="several photos of the manifest are named '0004'"):
        case.write()
