"""Objects with masks, beside pycocotools."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from orl import InputError
from orl.data import instances

COCO_MINI = Path(__file__).parents[2].parent / "shared" / "data" / "coco-mini"
STAR = [5.0, 2.5, 20.25, 8.0, 33.0, 3.0, 26.0, 16.0, 30.0, 27.5, 16.0, 20.0, 4.0, 26.0, 10.0, 14.0]


def disc(width: int, height: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.asfortranarray(((columns - x) ** 2 + (rows - y) ** 2 < radius**2).astype(np.uint8))


def compressed(mask: np.ndarray) -> dict:
    code = rle.encode(np.asfortranarray(mask))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def plain(mask: np.ndarray) -> dict:
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": counts}


def content() -> dict[str, Any]:
    """Photos 7 (40 x 30, four objects), 3 (20 x 24, none), 5 (64 x 48, a crowd); categories 2 and 90."""

    def one(number: int, image: int, category: int, box: list, segmentation: Any, crowd: int = 0) -> dict:
        return {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd,
                "segmentation": segmentation, "area": 1.0}  # fmt: skip

    return {
        "images": [
            {"id": 7, "file_name": "g.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "c.png", "width": 20, "height": 24},
            {"id": 5, "file_name": "e.png", "width": 64, "height": 48},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 2, "name": "cat"}],
        "annotations": [
            one(0, 5, 2, [4, 4, 40, 40], compressed(disc(64, 48, 24, 24, 19)), 1),
            one(1, 7, 90, [4, 2.5, 29, 25], [STAR]),
            one(1, 7, 2, [1, 1, 12, 12], [[1, 1, 13, 1, 13, 13, 1, 13], [30, 20, 38, 20, 34, 28]]),
            one(3, 7, 2, [10, 5, 20, 20], plain(disc(40, 30, 20, 15, 9.3))),
            one(4, 7, 2, [5, 5, 0, 7], [STAR]),
            one(5, 7, 2, [5, 5, 7, float("nan")], [STAR]),
            one(6, 3, 2, [5, 5, 7, 7], [[1, 2, 3, 4]]),
            one(7, 3, 2, [5, 5, 7, 7], []),
            one(8, 7, 90, [25, 10, 8, 8], compressed(disc(40, 30, 29, 14, 4))),
        ],
    }


def write(root: Path, split: str, found: Any) -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    for image in found["images"] if isinstance(found, dict) and "images" in found else []:
        if isinstance(image, dict) and isinstance(image.get("file_name"), str) and image.get("width", 0) > 0:
            (root / split / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (image["width"], image.get("height", 1))).save(root / split / image["file_name"])
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return path


def test_photos_and_objects(tmp_path: Path) -> None:
    write(tmp_path, "train2017", content())
    found = instances.read(tmp_path, "train2017")
    assert found.path == tuple(tmp_path / "train2017" / name for name in ("g.png", "c.png", "e.png"))
    assert found.image_id.tolist() == [7, 3, 5]
    assert found.size.tolist() == [[40, 30], [20, 24], [64, 48]]
    assert (found.category_id.tolist(), found.classes) == ([2, 90], ("cat", "brush"))
    assert found.first.tolist() == [0, 4, 4, 5]
    assert found.label.tolist() == [1, 0, 0, 1, 0]
    assert found.crowd.tolist() == [False] * 4 + [True]
    assert found.box.tolist() == [[4, 2.5, 29, 25], [1, 1, 12, 12], [10, 5, 20, 20], [25, 10, 8, 8], [4, 4, 40, 40]]
    assert found.left_out == {"without_area": 2, "without_mask": 2}
    assert found.objects(0).tolist() == [0, 1, 2, 3]
    assert found.objects(1).tolist() == found.objects(2).tolist() == []
    assert found.with_objects().tolist() == [0]


def by_pycocotools(path: Path, kept: Callable[[dict], bool]) -> dict[int, list[np.ndarray]]:
    coco = COCO()
    coco.dataset = json.loads(path.read_text())
    coco.createIndex()
    masks: dict[int, list[np.ndarray]] = {image: [] for image in coco.imgs}
    for one in coco.dataset["annotations"]:
        if kept(one):
            masks[one["image_id"]].append(coco.annToMask(one))
    return masks


def assert_masks_equal(found: instances.Instances, masks: dict[int, list[np.ndarray]]) -> None:
    for row, image in enumerate(found.image_id):
        numbers = range(found.first[row], found.first[row + 1])
        for number, mask in zip(numbers, masks[image], strict=True):
            own = found.mask(number, row, tuple(found.size[row].tolist()))
            assert own.dtype == np.uint8
            assert own.any()
            assert np.array_equal(own, mask)


def test_masks_are_those_of_pycocotools(tmp_path: Path) -> None:
    path = write(tmp_path, "train2017", content())
    masks = by_pycocotools(path, lambda one: one["id"] in (0, 1, 3, 8))
    assert_masks_equal(instances.read(tmp_path, "train2017"), masks)


def test_masks_of_real_photos() -> None:
    if not COCO_MINI.is_dir():
        pytest.skip("the coco-mini photos are not there")
    path = COCO_MINI / "annotations" / "instances_val2017.json"
    assert_masks_equal(instances.read(COCO_MINI, "val2017"), by_pycocotools(path, lambda one: True))


@given(
    st.sampled_from(["polygon", "compressed", "plain"]),
    st.floats(10, 30),
    st.floats(40, 60),
    st.floats(40, 50),
    st.floats(0.3, 3),
    st.floats(0.3, 3),
)
def test_scaled_masks_keep_area_and_place(
    kind: str, radius: float, x: float, y: float, across: float, down: float
) -> None:
    mask = disc(100, 90, x, y, radius)
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    polygon = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1).ravel().tolist()
    value = {"polygon": [polygon], "compressed": compressed(mask), "plain": plain(mask)}[kind]
    code = np.frombuffer(instances.outline(value), np.uint8)
    whole = np.zeros((1, 4))
    found = instances.Instances(
        Path(), (Path(),), np.zeros(1, int), np.array([[100, 90]]), np.zeros(1, int), ("a",), np.array([0, 1]),
        whole, np.zeros(1, int), np.zeros(1, bool), code, np.array([0, len(code)]), {},
    )  # fmt: skip
    size = round(100 * across), round(90 * down)
    across, down = size[0] / 100, size[1] / 90
    scaled = found.mask(0, 0, size)
    assert scaled.shape == size[::-1]
    border = np.pi * radius * (across + down) + 4  # about its length in pixels: half of them may be in or out
    assert abs(scaled.sum() - np.pi * radius**2 * across * down) < 0.35 * border
    rows, columns = np.nonzero(scaled)
    assert (columns.mean() + 0.5) / across == pytest.approx(x, abs=0.3 / min(1, across))
    assert (rows.mean() + 0.5) / down == pytest.approx(y, abs=0.3 / min(1, down))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([0.02, 0.5, 0.98]), st.booleans())
def test_run_length_codes_that_do_not_fill_the_mask_are_none(
    width: int, height: int, seed: int, share: float, text: bool
) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    code = compressed(mask) if text else plain(mask)
    assert bool(instances.outline(code)) == bool(mask.any())
    for wrong in ([height, width + 1], [height, 0], [height], "ab", None):
        assert instances.outline({**code, "size": wrong}) == b""
    assert instances.outline({**code, "counts": code["counts"][:-1]}) == b""


def test_large_runs() -> None:
    mask = np.zeros((1500, 2000), np.uint8)
    mask[3, 4] = mask[700:1200, 900:1901] = 1
    assert json.loads(instances.outline(compressed(mask))) == compressed(mask)
    code = plain(mask)
    assert rle.decode(rle.frPyObjects(code, 1500, 2000)).sum() == mask.sum()
    assert instances.outline(code)


@pytest.mark.parametrize(
    "value",
    [None, 3, "abc", {}, [3], [["1"] * 6], [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, float("inf")]],
     [[1, 2, 3, 4, 5, -1e9]], [[[1, 2]] * 6], [[[1], 2, 3, 4, 5, 6]],
     *({"size": [2, 2], "counts": one} for one in ([1, -1, 4], [1.0, 3.0], [2**63, 4], [-(2**64)], "\xff", "P", []))],
)  # fmt: skip
def test_what_is_no_outline(value: Any) -> None:
    assert instances.outline(value) == b""


def test_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "a", "train2017", content())
    first = instances.read(tmp_path / "a", "train2017").fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert instances.read(tmp_path / "b", "train2017").fingerprint() == first
    seen = {first}
    for key, value in (("image_id", 3), ("category_id", 2), ("bbox", [4, 2.5, 29, 24]), ("iscrowd", 1),
                       ("segmentation", [STAR[:-2]])):  # fmt: skip
        changed = content()
        changed["annotations"][1][key] = value
        write(tmp_path / "b", "train2017", changed)
        seen.add(instances.read(tmp_path / "b", "train2017").fingerprint())
    for what, key, value in (("images", "file_name", "z.png"), ("images", "id", 8), ("categories", "name", "dog")):
        changed = content()
        changed[what][1][key] = value
        changed["annotations"] = [one for one in changed["annotations"] if one["image_id"] != 3]  # none of use
        write(tmp_path / "b", "train2017", changed)
        seen.add(instances.read(tmp_path / "b", "train2017").fingerprint())
    assert len(seen) == 9


def put(*keys: Any) -> Callable[[dict], None]:
    """What sets content[keys[0]][keys[1]]... to the last of them."""

    def change(found: Any) -> None:
        *path, last, value = keys
        for key in path:
            found = found[key]
        found[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("annotations", None), "has no list 'annotations'; it must be a COCO instances file"),
        (put("images", []), "lists no images"),
        (put("categories", []), "lists no categories"),
        (put("images", 1, "width", 0), r"images\[1\] needs width and height"),
        (put("images", 1, 3), r"images\[1\] needs width and height"),
        (put("images", 1, "id", 7), "images has id 7 twice"),
        (put("images", 1, "id", 2**63), r"images\[1\] needs 'id', a number"),
        (put("images", 1, "file_name", "g.png"), r"images has file_name 'g\.png' twice"),
        (put("categories", 1, "id", "2"), r"categories\[1\] needs 'id', a number"),
        (put("categories", 1, "name", "brush"), "categories has name 'brush' twice"),
        (put("annotations", 1, "image_id", 8), r"annotations\[1\] has image_id 8, which the file does not list"),
        (put("annotations", 1, "category_id", 3), r"annotations\[1\] has category_id 3, which the file does not list"),
        (put("annotations", 1, "bbox", [1, 2, 3]), r"annotations\[1\] needs image_id, category_id and bbox"),
        (put("annotations", 1, {}), r"annotations\[1\] needs image_id, category_id and bbox"),
        (put("annotations", 3, "image_id", 5), r"annotations\[3\] has a mask of another size than its photo"),
        (lambda found: [one.pop("segmentation") for one in found["annotations"]], "has no object with a mask"),
    ],
)
def test_wrong_files(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    found = content()
    change(found)
    path = write(tmp_path, "train2017", found)
    with pytest.raises(InputError, match=message) as error:
        instances.read(tmp_path, "train2017")
    assert str(error.value).startswith(f"{path}: ")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"_train2017\.json: cannot be read .*; correct downstream\.detection"):
        instances.read(tmp_path, "train2017")
    write(tmp_path, "train2017", "{")
    with pytest.raises(InputError, match="is no JSON"):
        instances.read(tmp_path, "train2017")
    write(tmp_path, "train2017", content())
    (tmp_path / "train2017" / "c.png").unlink()
    with pytest.raises(InputError, match=r"c\.png: no such photo; 1 of the 3 that .* lists are missing"):
        instances.read(tmp_path, "train2017")


def test_splits_that_do_not_go_together(tmp_path: Path) -> None:
    write(tmp_path, "train2017", content())
    train, other = instances.read(tmp_path, "train2017"), copy.deepcopy(content())
    write(tmp_path, "val2017", other)
    instances.check_splits(train, instances.read(tmp_path, "val2017"))
    for key, value in (("name", "dog"), ("id", 3)):
        other = content()
        other["categories"][1][key] = value
        other["annotations"] = []
        write(tmp_path, "val2017", other)
        with pytest.raises(InputError, match=r"instances_val2017\.json: its categories must be those of .*, but one"):
            instances.check_splits(train, instances.read(tmp_path, "val2017"))
    with pytest.raises(InputError, match=r"shares 3 photos with .*, the first .*c\.png"):
        instances.check_splits(train, train)
