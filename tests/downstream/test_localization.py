"""Object discovery: the measures, the order of proposals and LOST's boxes, through their functions."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from orl import InputError, artifacts
from orl.config import parse
from orl.data.manifest import build
from orl.downstream.localization import (
    dilate,
    edges,
    evaluate_model,
    evaluate_pairs,
    expected,
    lost,
    measures,
    pair_scores,
)
from orl.networks import backbones

# Measures


def overlap(a, b):
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(across, 0) * max(down, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def by_loop(boxes, objects, numbers):
    found = [photo[0] for photo in boxes]
    corloc = [any(overlap(box, one) >= 0.5 for one in here) for box, here in zip(found, objects, strict=True)]
    rate = [
        [any(overlap(box, one) >= 0.5 for box in photo[:number])
         for photo, here in zip(boxes, objects, strict=True) for one in here]
        for number in numbers
    ]  # fmt: skip
    return {"corloc": 100 * np.mean(corloc), "detection_rate": [100 * np.mean(row) for row in rate]}


def arrays(photos):
    return [np.array(photo, float) for photo in photos]


BOX = st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 3)] * 2)
PHOTO = st.tuples(st.lists(BOX, min_size=1, max_size=4), st.lists(BOX, min_size=1, max_size=3))


@given(st.lists(PHOTO, min_size=1, max_size=4))
@example([([(0, 0, 2, 1)], [(0, 0, 2, 2)])])  # IoU 0.5 exactly
@example([([(0, 0, 1, 1), (2, 2, 2, 2)], [(2, 2, 2, 2), (0, 0, 3, 3)])])  # found by the second only
def test_measures_are_those_of_a_loop(photos):
    boxes, objects = zip(*photos, strict=True)
    found, whole = measures(arrays(boxes), arrays(objects), [1, 2, 5]), by_loop(boxes, objects, [1, 2, 5])
    assert found["corloc"] == pytest.approx(whole["corloc"])
    assert found["detection_rate"] == pytest.approx(whole["detection_rate"])


@given(PHOTO, PHOTO)
@example(([(0, 0, 1, 1), (2, 2, 2, 2), (0, 0, 3, 3)], [(2, 2, 2, 2), (0, 0, 3, 3)]), ([(0, 0, 1, 1)], [(0, 0, 1, 1)]))
def test_random_order_is_the_mean_of_all_orders(one, other):
    boxes, objects = zip(one, other, strict=True)
    every = [
        by_loop(orders, objects, [1, 2, 5])
        for orders in itertools.product(*(itertools.permutations(photo) for photo in boxes))
    ]
    found = expected(arrays(boxes), arrays(objects), [1, 2, 5])
    assert found["corloc"] == pytest.approx(np.mean([order["corloc"] for order in every]))
    assert found["detection_rate"] == pytest.approx(np.mean([order["detection_rate"] for order in every], axis=0))


def test_the_score_of_a_box_is_the_sum_over_its_pairs():
    """Photos of 2, 1 and 3 boxes, each with one neighbour; box 1 of the last is in no pair."""
    found = artifacts.Correspondences(
        np.array([[2], [0], [1]], np.int32),
        np.array([[0, 2], [1, 2], [0, 1], [0, 0], [2, 0]], np.uint16),
        np.array([0.5, 0.25, 0.125, 1, 2], np.float16),
        np.array([0, 2, 3, 5]),
    )
    scores = pair_scores(found, np.array([0, 2, 3, 6]))
    assert scores.tolist() == [0.5, 0.25 + 0.125, 0.125 + 1 + 2, 1, 0, 0.5 + 0.25 + 2]


# LOST


def lost_by_loop(features, expand, count):
    """The equations, patch by patch, in whole numbers times the number of patches, so that nothing is rounded."""
    c, h, w = features.shape
    rows = features.reshape(c, -1).T
    rows = len(rows) * rows - rows.sum(0)
    total, similar = len(rows), rows @ rows.T > 0
    order = sorted(range(total), key=lambda patch: (similar[patch].sum(), patch))
    boxes = []
    while len(boxes) < count:
        outside = [p for p in order if not any(x <= p % w < x + dx and y <= p // w < y + dy for x, y, dx, dy in boxes)]
        if not outside:
            break
        seed = outside[0]
        group = [patch for patch in outside[:expand] if similar[seed, patch]]
        mask = {patch for patch in range(total) if sum(rows[patch] @ rows[one] for one in group) > 0} | {seed}
        reached, border = {seed}, [seed]
        while border:
            y, x = divmod(border.pop(), w)
            for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                near = ny * w + nx
                if 0 <= ny < h and 0 <= nx < w and near in mask and near not in reached:
                    reached.add(near)
                    border.append(near)
        xs, ys = [patch % w for patch in reached], [patch // w for patch in reached]
        boxes.append((min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1))
    return boxes


MAPS = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2, 4, 8])), elements=st.integers(0, 4)
)


@given(MAPS, st.integers(1, 30), st.integers(1, 4))
def test_boxes_are_those_of_the_equations(features, expand, count):
    """Where the mean is exact: of 2^n patches; of others, what is 0 could round to either sign."""
    if features[0].size & (features[0].size - 1):
        features = features[:, : 1 << (features.shape[1].bit_length() - 1)]
    found = lost(torch.from_numpy(features).float(), expand, count)
    assert found.tolist() == [list(box) for box in lost_by_loop(features, expand, count)]


def scene(*objects):
    """A map 12 x 16 of a noisy background and objects (x, y, w, h), each with a feature of its own."""
    random = np.random.default_rng(0)
    features = random.normal(0, 0.02, (8, 12, 16))
    features[0] += 1
    for number, (x, y, w, h) in enumerate(objects, 1):
        features[:, y : y + h, x : x + w] = random.normal(0, 0.02, (8, h, w))
        features[number, y : y + h, x : x + w] += 3
    return torch.from_numpy(features)


def test_the_object_is_found_whatever_the_scale_and_a_shift():
    """A shift of all features is taken out; with LOST's one mean of all channels it would not be."""
    box = [5, 3, 4, 6]
    for features in (scene(box), 50 * scene(box), scene(box) + torch.arange(8.0).reshape(8, 1, 1)):
        assert lost(features, 10, 1).tolist() == [box]


def test_the_next_box_is_another_object():
    small, large = [1, 1, 3, 3], [9, 4, 5, 4]
    found = lost(scene(small, large), 5, 2).tolist()
    assert sorted(found) == [small, large]


def test_parts_that_touch_at_a_corner_are_two():
    features = torch.zeros(2, 8, 8)
    features[0] = 1
    for y, x in ((1, 1), (3, 3)):
        features[:, y : y + 2, x : x + 2] = torch.tensor([0.0, 3]).reshape(2, 1, 1)
    assert lost(features, 4, 1).tolist() == [[1, 1, 2, 2]]


def test_a_map_without_any_difference_has_boxes_of_a_patch():
    assert lost(torch.ones(3, 2, 2), 4, 9).tolist() == [[0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_every_other_pixel_of_a_dilated_map_is_that_of_the_stride(name):
    torch.manual_seed(0)
    model, images = backbones.backbone(name).eval(), torch.randn(1, 3, 70, 100)
    with torch.inference_mode():
        plain = model.stages(images)[-1]
        dilate(model)
        fine = model.stages(images)[-1]
    assert fine.shape[2:] == (5, 7)  # 16 px each, the last beyond the photo
    torch.testing.assert_close(fine[..., ::2, ::2], plain)
    assert not torch.equal(fine[..., 1::2, ::2], plain[..., :2, :])


@pytest.mark.parametrize("side", [193, 200, 208])
def test_patches_lie_where_they_see(side):
    """Around the middle of what a patch of a dilated map depends on, of a network whose weights are all equal."""
    model = backbones.backbone("resnet10").eval()
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.constant_(part.weight, 1 / part.weight[0].numel())
    dilate(model)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    row = model.stages(image)[-1][0, :, 6].sum(0)
    row[6].backward()
    weight = image.grad.sum((0, 1, 2)).double()
    middle = (weight * (torch.arange(side) + 0.5)).sum() / weight.sum()
    found = edges(len(row), side)
    assert (found[0], found[-1]) == (0, side)
    assert abs(middle - found[6:8].mean()) < 2  # a patch is 16 wide


# Proposals ranked by pairs, in files


class Case:
    """A manifest, proposals, pairs and annotations; what it holds may be changed before `write`."""

    def __init__(self, folder, photos=12):
        random = np.random.default_rng(0)
        self.folder = folder
        self.rows = [(f"{row:04d}", f"a/{row:04d}.jpg", 300, 200, 9, "a") for row in range(photos)]
        self.kept = [
            np.concatenate([random.integers(0, 90, (count, 2)), random.integers(60, 110, (count, 2))], 1).tolist()
            for count in random.integers(1, 9, photos)
        ]
        self.neighbor = (np.arange(photos)[:, None] + [1, 2]) % photos
        self.pairs = [
            (int(random.integers(len(self.kept[row]))), int(random.integers(len(self.kept[other]))))
            for row, others in enumerate(self.neighbor) for other in others for _ in range(3)
        ]  # fmt: skip
        self.similarity = random.random(len(self.pairs)).astype(np.float16)
        self.images = [{"id": row, "file_name": f"{row:04d}.jpg"} for row in range(photos)]
        self.annotations = [
            {"image_id": row, "category_id": 1, "bbox": (np.array(box) + random.integers(-9, 9, 4)).tolist()}
            for row, boxes in enumerate(self.kept[:-1]) for box in [*boxes[::3], boxes[-1]]
        ] + [{"image_id": 2, "category_id": 1, "bbox": [0, 0, 290, 190]}]  # fmt: skip
        self.annotations.append({"image_id": 0, "category_id": 1, "bbox": self.kept[0][0], "iscrowd": 1})

    def write(self):
        folder = self.folder
        artifacts.write_csv(folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, self.rows)
        inputs = {"manifest": artifacts.fingerprint(folder / "manifest.csv")}
        with artifacts.create(folder / "proposals.h5", artifacts.PROPOSALS, {}, inputs) as file:
            file["box"] = np.concatenate(self.kept).astype(np.int16)
            file["box_offsets"] = np.cumsum([0, *map(len, self.kept)], dtype=np.int64)
        inputs = {"proposals": artifacts.fingerprint(folder / "proposals.h5")}
        with artifacts.create(folder / "pairs.h5", artifacts.CORRESPONDENCES, {"of": "pairs"}, inputs) as file:
            file["neighbor"], file["pair"] = self.neighbor.astype(np.int32), np.array(self.pairs, np.uint16)
            file["similarity"] = self.similarity
            file["pair_offsets"] = np.arange(0, len(self.pairs) + 1, 3)
        (folder / "objects.json").write_text(json.dumps({"images": self.images, "annotations": self.annotations}))
        return self.evaluate()

    def evaluate(self, **settings):
        paths = [self.folder / name for name in ("manifest.csv", "proposals.h5", "pairs.h5")]
        whole = parse({"downstream": {"localization": settings}})
        files = [self.folder / "objects.json"], self.folder / "out" / "pairs.json"
        return evaluate_pairs(whole, "pairs", *paths, *files)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def test_the_result_is_that_of_a_loop_over_photos_and_pairs(case):
    result = case.write()
    assert result == artifacts.read_results(case.folder / "out" / "pairs.json")
    score = [[0.0] * len(kept) for kept in case.kept]
    for number, (here, there) in enumerate(case.pairs):
        query, rank = divmod(number // 3, 2)
        score[query][here] += float(case.similarity[number])
        score[case.neighbor[query, rank]][there] += float(case.similarity[number])
    objects = [[one["bbox"] for one in case.annotations if one["image_id"] == row and "iscrowd" not in one]
               for row in range(11)]  # fmt: skip
    kept = case.kept[:11]

    def ordered(key):
        return [[kept[row][n] for n in sorted(range(len(kept[row])), key=lambda n: -key(row, n))] for row in range(11)]

    methods = {
        "pairing": ordered(lambda row, n: score[row][n]),
        "largest": ordered(lambda row, n: kept[row][n][2] * kept[row][n][3]),
        "first": kept,
        "whole": [[(0, 0, 300, 200)]] * 11,
    }
    found = result["metrics"]["methods"]
    assert result["metrics"]["boxes"] == [1, 2, 5]
    assert set(found) == {*methods, "random"}
    for name, boxes in methods.items():
        whole = by_loop(boxes, objects, [1, 2, 5])
        assert found[name]["corloc"] == pytest.approx(whole["corloc"])
        assert found[name]["detection_rate"] == pytest.approx(whole["detection_rate"])
    assert len({found[name]["corloc"] for name in found}) == 5  # they cannot be mixed up
    assert found["random"] == expected(arrays(kept), arrays(objects), [1, 2, 5])
    data = result["data"]
    assert (data["photos"], data["photos_left_out"], data["crowds"]) == (11, 1, 1)
    assert data["objects"] == sum(map(len, objects))
    assert (result["task"], result["model"]) == ("localization", "pairs")
    assert result["settings"]["made_with"] == {"of": "pairs"}


def test_files_of_others_are_refused(case):
    case.write()
    (case.folder / "out" / "pairs.json").unlink()
    with artifacts.create(case.folder / "proposals.h5", artifacts.PROPOSALS, {"other": 1}, {
        "manifest": artifacts.fingerprint(case.folder / "manifest.csv")}) as file:  # fmt: skip
        file["box"] = np.concatenate(case.kept).astype(np.int16)
        file["box_offsets"] = np.cumsum([0, *map(len, case.kept)], dtype=np.int64)
    with pytest.raises(InputError, match=r"pairs.h5: was made from another proposals"):
        case.evaluate()
    case.rows.pop()
    artifacts.write_csv(case.folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, case.rows)
    with pytest.raises(InputError, match=r"proposals.h5: has 12 rows, but .*manifest.csv has 11"):
        case.evaluate()
    assert not (case.folder / "out" / "pairs.json").exists()


# Boxes of a model


SQUARES = [(150, 40, 70, 80), (30, 30, 90, 60), (64, 100, 100, 90)]  # objects on photos of 300 x 200


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of one bright object each, their VOC files, and a manifest."""
    folder, random = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for name in ("photos", "xml"):
        (folder / name).mkdir()
    for number, (x, y, w, h) in enumerate(SQUARES):
        pixels = random.integers(0, 30, (200, 300, 3))
        pixels[y : y + h, x : x + w] += 200
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / f"{number}.png")
        sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
        one = f"<object><name>square</name><bndbox>{box}</bndbox></object>"
        (folder / "xml" / f"{number}.xml").write_text(f"<annotation>{one}</annotation>")
    build(parse({"data": {"layout": "folder"}}), folder / "photos", folder / "manifest.csv", folder / "no.csv", 1)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "backbone.safetensors"
    model = backbones.backbone("resnet10")
    backbones.save(path, "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    return path


def search(photos, weights, output, threads=0, side=320, **settings):
    whole = parse({"downstream": {"localization": {"side": side, **settings}}})
    files = (photos / "photos", photos / "manifest.csv", weights, [photos / "xml"], "m", output, threads)
    return evaluate_model(whole, *files)


def test_bright_squares_are_found(photos, weights, tmp_path):
    """Random features see the light, so that the boxes' place and scale can be told."""
    result = search(photos, weights, tmp_path / "m.json")
    assert result == artifacts.read_results(tmp_path / "m.json")
    assert result["metrics"]["boxes"] == [1, 2, 5]
    assert result["metrics"]["methods"]["lost"]["corloc"] == 100
    assert result["data"]["photos"] == result["data"]["objects"] == 3
    assert result["data"]["weights_fingerprint"] == artifacts.fingerprint(weights)
    assert result["settings"]["downstream"]["localization"]["side"] == 320


def test_workers_do_not_change_the_result(photos, weights, tmp_path):
    for threads in (0, 2):
        search(photos, weights, tmp_path / f"{threads}.json", threads, side=96, boxes=3)
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_a_very_long_photo_is_made_smaller_than_asked(photos, weights, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.fromarray(np.full((2, 2000, 3), 90 * number, np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    build(parse({"data": {"layout": "folder"}}), tmp_path / "photos", tmp_path / "manifest.csv", tmp_path / "no.csv", 1)
    (tmp_path / "xml").symlink_to(photos / "xml")
    assert search(tmp_path, weights, tmp_path / "m.json", side=64)["data"]["photos"] == 2


def test_bad_weights_and_photos_are_one_sentence(photos, weights, tmp_path):
    model = backbones.load(weights)
    model.conv1.weight.data[0, 0, 0, 0] = torch.nan
    backbones.save(tmp_path / "nan.safetensors", "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    with pytest.raises(InputError, match=r"nan.safetensors: its features of 0.png are not finite"):
        search(photos, tmp_path / "nan.safetensors", tmp_path / "m.json", side=64)
    (tmp_path / "manifest.csv").write_text((photos / "manifest.csv").read_text())
    (tmp_path / "xml").symlink_to(photos / "xml")
    with pytest.raises(InputError, match=r"0.png: photo is gone"):
        search(tmp_path, weights, tmp_path / "m.json", side=64)
    assert not (tmp_path / "m.json").exists()
