import json
import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from orl import InputError
from orl.data.labels import read_labels, read_splits

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def write_voc(root: Path, splits: dict[str, dict[str, dict[str, int]]]) -> Path:
    """A VOCdevkit under `root`: split -> class -> photo -> label; the photos are empty files."""
    folder = root / "VOCdevkit" / "VOC2007"
    lists = folder / "ImageSets" / "Main"
    for path in (lists, folder / "JPEGImages"):
        path.mkdir(parents=True)
    for split, classes in splits.items():
        photos = dict.fromkeys(photo for labels in classes.values() for photo in labels)
        (lists / f"{split}.txt").write_text("".join(f"{photo}\n" for photo in photos))
        for name, labels in classes.items():
            (lists / f"{name}_{split}.txt").write_text("".join(f"{photo} {y:2d}\n" for photo, y in labels.items()))
        for photo in photos:
            (folder / "JPEGImages" / f"{photo}.jpg").touch()
    return folder


def write_coco(root: Path, split: str, content: object) -> Path:
    """A COCO tree under `root` with empty photos 1.jpg to 3.jpg."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    for number in (1, 2, 3):
        (root / split / f"{number}.jpg").touch()
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def coco(**changes: object) -> dict:
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (3, 1, 2)],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 4, "name": "motorcycle"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"image_id": 1, "category_id": 17, "iscrowd": 0},
            {"image_id": 1, "category_id": 17, "iscrowd": 0},
            {"image_id": 1, "category_id": 90, "iscrowd": 0},
            {"image_id": 2, "category_id": 4, "iscrowd": 1},
        ],
        **changes,
    }


VOC = {
    "trainval": {"train": {"b": 1, "a": -1, "c": 0}, "dog": {"a": 1, "b": 0, "c": -1}},
    "test": {"train": {"e": 1, "d": -1}, "dog": {"e": -1, "d": 1}},
}


@pytest.mark.parametrize("below", [".", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc(tmp_path: Path, below: str) -> None:
    folder = write_voc(tmp_path, VOC)
    labels = read_labels(tmp_path / below, "voc", "trainval")
    assert labels.classes == ("dog", "train")
    assert labels.image_id == ("a", "b", "c")  # the order of the first class's list
    assert [path.resolve() for path in labels.image_path] == [folder / "JPEGImages" / f"{x}.jpg" for x in "abc"]
    assert labels.label.dtype == np.int8
    assert labels.label.tolist() == [[1, -1], [0, 1], [-1, 0]]
    assert len(labels) == 3
    test = read_splits(tmp_path / below, "voc", "trainval", "test")[1]
    assert test.label.tolist() == [[-1, 1], [1, -1]]


def test_coco(tmp_path: Path) -> None:
    write_coco(tmp_path, "train2017", coco())
    labels = read_labels(tmp_path, "coco", "train2017")
    assert labels.classes == ("motorcycle", "cat", "toothbrush")  # by category id, gaps and all
    assert labels.image_id == ("3", "1", "2")
    assert labels.image_path == tuple(tmp_path / "train2017" / f"{number}.jpg" for number in (3, 1, 2))
    assert labels.label.dtype == np.int8
    assert labels.label.tolist() == [[-1, -1, -1], [-1, 1, 1], [1, -1, -1]]  # the crowd counts


def sentence(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for part in parts:
        assert part in text


def test_missing_root_and_split(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_labels(tmp_path / "nowhere", "voc", "test")
    sentence(error, "nowhere", "no such folder")
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, "voc", "test")
    sentence(error, str(tmp_path), "ImageSets/Main")
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, "coco", "val2017")
    sentence(error, "annotations", "'val2017'", "none")
    write_voc(tmp_path, VOC)
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, "voc", "minival")
    sentence(error, "'minival'", "test, trainval")
    write_coco(tmp_path, "train2017", coco())
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, "coco", "val2017")
    sentence(error, "'val2017'", "train2017")


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_missing_photos(tmp_path: Path, layout: str) -> None:
    folder = write_voc(tmp_path, VOC) / "JPEGImages"
    write_coco(tmp_path, "trainval", coco())
    names = ("b", "c") if layout == "voc" else ("1", "2")
    for name in names:
        ((folder if layout == "voc" else tmp_path / "trainval") / f"{name}.jpg").unlink()
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, layout, "trainval")  # type: ignore[arg-type]
    sentence(error, f"{names[0]}.jpg", "2 of the 3")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a 1\nb 1\n", ["dog_trainval.txt", "'c'", "train_trainval.txt does not"]),
        ("a 1\nb 1\nc 1\nd 1\n", ["train_trainval.txt", "'d'", "dog_trainval.txt does not"]),
        ("a 1\nb 2\nc 1\n", ["train_trainval.txt", "line 2", "'b 2'"]),
        ("a 1\nb\nc 1\n", ["train_trainval.txt", "line 2"]),
        ("a 1\nb 1\nc 1\na 1\n", ["train_trainval.txt", "line 4", "'a'"]),
    ],
)
def test_bad_voc_lists(tmp_path: Path, text: str, parts: list[str]) -> None:
    folder = write_voc(tmp_path, VOC)
    (folder / "ImageSets" / "Main" / "train_trainval.txt").write_text(text)
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, "voc", "trainval")
    sentence(error, *parts)


def test_empty_and_binary_voc_lists(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"test": {"dog": {}}})
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, "voc", "test")
    sentence(error, "dog_test.txt", "no photos")
    (folder / "ImageSets" / "Main" / "dog_test.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, "voc", "test")
    sentence(error, "dog_test.txt", "cannot be read")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"images": [', ["is no JSON"]),
        ([], ["no list 'categories'"]),
        ({"categories": [], "images": []}, ["no list 'annotations'"]),
        (coco(images=[]), ["no images"]),
        (coco(categories=[], annotations=[]), ["no categories"]),
        (coco(images=[{"id": 1}]), ["images[0]", "'file_name'"]),
        (coco(images=["1.jpg"]), ["images[0]", "'id'"]),
        (coco(images=[{"id": "1", "file_name": "1.jpg"}]), ["images[0]", "'id'", "a number"]),
        (coco(images=[{"id": 1, "file_name": "1.jpg"}] * 2), ["image id 1 occurs 2 times"]),
        (coco(categories=[{"id": 4, "name": "a"}, {"id": 4, "name": "b"}]), ["category id 4"]),
        (coco(categories=[{"id": 4, "name": "a"}, {"id": 5, "name": "a"}]), ["category name 'a'"]),
        (coco(annotations=[{"image_id": 7, "category_id": 4}]), ["annotations[0]", "image_id 7"]),
        (coco(annotations=[{"image_id": 1, "category_id": 5}]), ["annotations[0]", "category_id 5"]),
        (coco(annotations=[{"image_id": 1}]), ["annotations[0]", "'category_id'"]),
    ],
)
def test_bad_coco(tmp_path: Path, content: object, parts: list[str]) -> None:
    path = write_coco(tmp_path, "val2017", content)
    with pytest.raises(InputError) as error:
        read_labels(tmp_path, "coco", "val2017")
    sentence(error, str(path), *parts)


def test_splits_must_match(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {**VOC, "other": {"dog": {"x": 1}, "zebra": {"x": -1}}})
    with pytest.raises(InputError) as error:
        read_splits(tmp_path / "voc", "voc", "trainval", "other")
    sentence(error, "'trainval'", "'other'", "only one has 'train'")
    with pytest.raises(InputError) as error:
        read_splits(tmp_path / "voc", "voc", "test", "test")
    sentence(error, "share 2 photos", "d.jpg")
    write_coco(tmp_path / "coco", "train", coco())
    order = ("motorcycle", "toothbrush", "cat")
    kinds = [{"id": number, "name": name} for number, name in zip((90, 4, 17), order, strict=True)]
    renumbered = coco(categories=kinds)
    write_coco(tmp_path / "coco", "val", renumbered)
    with pytest.raises(InputError) as error:
        read_splits(tmp_path / "coco", "coco", "train", "val")
    sentence(error, "their order differs")


def test_imports_nothing_heavy() -> None:
    code = "import sys, orl.data.labels; print(*{'torch', 'sklearn', 'joblib', 'cv2', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_real_voc(split: str) -> None:
    root = SHARED / "voc-mini"
    if not root.is_dir():
        pytest.skip(f"{root} is missing")
    labels = read_labels(root, "voc", split)
    assert len(labels.classes) == 20
    assert labels.label.shape == (250, 20)
    for photo, row in zip(labels.image_id, labels.label, strict=True):
        tree = xml.etree.ElementTree.parse(root / "VOCdevkit" / "VOC2007" / "Annotations" / f"{photo}.xml")
        objects = [(item.findtext("name"), item.findtext("difficult") == "1") for item in tree.iter("object")]
        clear = {name for name, difficult in objects if not difficult}
        shown = {name for name, _ in objects}
        for name, y in zip(labels.classes, row, strict=True):
            assert y == (1 if name in clear else 0 if name in shown else -1)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco(split: str) -> None:
    root = SHARED / "coco-mini"
    if not root.is_dir():
        pytest.skip(f"{root} is missing")
    labels = read_labels(root, "coco", split)
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    pairs = {(item["image_id"], item["category_id"]) for item in content["annotations"]}
    positives = Counter(category for _, category in pairs)
    kinds = sorted(content["categories"], key=lambda item: item["id"])
    assert labels.classes == tuple(item["name"] for item in kinds)
    assert (labels.label > 0).sum(0).tolist() == [positives[item["id"]] for item in kinds]
    assert (labels.label < 0).sum(0).tolist() == [len(content["images"]) - positives[item["id"]] for item in kinds]
    assert len(labels) == {"train2017": 321, "val2017": 100}[split]
