"""The generated scenes: same bytes always, files as COCO and VOC have them, and the structure that ORL needs."""

import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from orl import InputError
from orl.config import Scenes
from orl.data import scenes
from orl.data.scenes import BACKGROUNDS, CLASSES, SHAPES, TEXTURES, draw_scene, generate

FEW = {"train": 24, "val": 12, "objects_train": 2, "objects_val": 1, "size": (64, 80), "seed": 3}
TINY = FEW | {"train": 1, "val": 1, "objects_train": 1}


def draw(folder, settings, workers=1):
    return generate(folder, Scenes(**settings), workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "made"
    counts = draw(folder, FEW)
    return folder, counts


@pytest.fixture(params=["train", "val"])
def coco(made, request):
    return request.param, COCO(str(made[0] / f"annotations/instances_{request.param}2017.json"))


@pytest.mark.parametrize("workers", [1, 2])
def test_same_settings_same_bytes(made, tmp_path, workers):
    assert draw(tmp_path / "again", FEW, workers) == made[1]
    assert contents(tmp_path / "again") == contents(made[0])


def test_pictures_depend_on_seed_but_not_on_counts(made, tmp_path):
    draw(tmp_path / "fewer", TINY)
    draw(tmp_path / "other", TINY | {"seed": 4})
    fewer, other, full = (contents(f) for f in (tmp_path / "fewer", tmp_path / "other", made[0]))
    pictures = [name for name in fewer if name.endswith((".jpg", ".xml"))]
    assert len(pictures) == 2 * 3 + 2 * len(CLASSES)
    assert all(fewer[name] == full[name] for name in pictures)
    assert all(fewer[name] != other[name] for name in pictures if name.endswith(".jpg"))


def test_layout_and_counts(made):
    folder, counts = made
    assert sorted(p.name for p in folder.iterdir()) == [
        "VOCdevkit", "annotations", "objects", "scenes.json", "train2017", "val2017",
    ]  # fmt: skip
    summary = json.loads((folder / "scenes.json").read_text())
    assert summary["counts"] == counts
    assert summary["settings"] == {**FEW, "size": [64, 80], "background_correlation": 0.5, "theme_share": 0.7}
    for split in ("train", "val"):
        names = [p.name for p in (folder / f"{split}2017").iterdir()]
        assert len(names) == counts[split] == FEW[split]
        assert all(len(name) == len("000000000000.jpg") for name in names)
        for c in CLASSES:
            single = sorted((folder / f"objects/{split}/{c.name}").iterdir())
            assert len(single) == FEW[f"objects_{split}"]
            height, width, _ = cv2.imread(str(single[0])).shape
            assert height == width
            assert 64 <= height <= 96
    assert counts["objects_train"] == 2 * len(CLASSES)


def test_coco_boxes_are_the_bounds_of_the_visible_masks(made, coco):
    split, data = coco
    assert {c["name"] for c in data.dataset["categories"]} == {c.name for c in CLASSES}
    assert len(data.imgs) == FEW[split]
    assert len(data.anns) == made[1][f"{split}_annotations"] >= FEW[split]
    for image in data.imgs.values():
        picture = cv2.imread(str(made[0] / f"{split}2017" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
        assert all(64 <= n <= 80 for n in picture.shape[:2])
        covered = np.zeros(picture.shape[:2], int)
        for annotation in data.imgToAnns[image["id"]]:
            mask = data.annToMask(annotation)
            assert mask.shape == picture.shape[:2]
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w - 1, y + h - 1) == (columns[0], rows[0], columns[-1], rows[-1])
            assert annotation["area"] == mask.sum() > 0
            assert annotation["iscrowd"] == 0
            covered += mask
        assert covered.max(initial=0) <= 1  # what hides an object is not part of it


def test_image_ids_are_unique_over_both_splits(made):
    parts = [json.loads((made[0] / f"annotations/instances_{s}2017.json").read_text()) for s in ("train", "val")]
    ids = [image["id"] for part in parts for image in part["images"]]
    assert len(set(ids)) == len(ids) == FEW["train"] + FEW["val"]
    assert all(image["file_name"] == f"{image['id']:012d}.jpg" for part in parts for image in part["images"])


def test_voc_agrees_with_coco(made, coco):
    split, data = coco
    voc = made[0] / "VOCdevkit/VOC2007"
    part = {"train": "trainval", "val": "test"}[split]
    names = (voc / f"ImageSets/Main/{part}.txt").read_text().split()
    assert [int(name) for name in names] == [image["id"] for image in data.dataset["images"]]
    flags: dict[str, dict[str, int]] = {}
    for c in CLASSES:
        lines = (voc / f"ImageSets/Main/{c.name}_{part}.txt").read_text().splitlines()
        flags[c.name] = {name: int(flag) for name, flag in (line.split() for line in lines)}
        assert list(flags[c.name]) == names
    for name in names:
        seen = []
        best = dict.fromkeys(flags, -1)
        for entry in ET.parse(voc / f"Annotations/{name}.xml").getroot().iter("object"):
            label, difficult = entry.findtext("name"), entry.findtext("difficult") == "1"
            best[label] = max(best[label], 0 if difficult else 1)
            x0, y0, x1, y1 = (int(entry.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            seen.append((label, [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]))
        assert best == {c: flags[c][name] for c in flags}
        assert seen == [(data.cats[a["category_id"]]["name"], a["bbox"]) for a in data.imgToAnns[int(name)]]
        picture = (voc / f"JPEGImages/{name}.jpg").read_bytes()
        assert picture == (made[0] / f"{split}2017/{int(name):012d}.jpg").read_bytes()


def test_shapes_and_textures_are_shared_but_differ_within_a_theme():
    assert len({(c.shape, c.texture) for c in CLASSES}) == len({c.category_id for c in CLASSES}) == len(CLASSES)
    for values, column in ((SHAPES, "shape"), (TEXTURES, "texture")):
        shared = Counter(getattr(c, column) for c in CLASSES)
        assert set(shared) == set(values)
        assert min(shared.values()) >= 2
        for theme in range(len(BACKGROUNDS)):
            assert len({getattr(c, column) for c in CLASSES if c.theme == theme}) == 3


def drawn(share=0.7, correlation=0.5, count=400):
    """Theme, background and the objects of many scenes; 64 px are enough to count them."""
    rngs = (np.random.default_rng([7, i]) for i in range(count))
    return [draw_scene(rng, (64, 64), correlation, share)[1:] for rng in rngs]


def test_themes_and_backgrounds():
    many = drawn()
    in_theme = [CLASSES[s.label].theme == theme for shown, theme, _ in many for s in shown]
    assert np.mean(in_theme) == pytest.approx(0.7, abs=0.06)
    own = [BACKGROUNDS[theme] == family for _, theme, family in many]
    assert np.mean(own) == pytest.approx(0.5 + 0.5 / 4, abs=0.08)  # half tied, half any of the four
    assert Counter(theme for _, theme, _ in many).keys() == set(range(4))
    assert np.mean([len(shown) for shown, _, _ in many]) == pytest.approx(3, abs=0.2)
    difficult = np.mean([s.difficult for shown, _, _ in many for s in shown])
    assert 0 < difficult < 0.15
    assert min(s.visible for shown, _, _ in many for s in shown) >= scenes.MIN_VISIBLE


def test_the_extremes_of_theme_and_background():
    for shown, theme, family in drawn(share=1.0, correlation=1.0, count=30):
        assert family == BACKGROUNDS[theme]
        assert all(CLASSES[s.label].theme == theme for s in shown)
    assert all(CLASSES[s.label].theme != theme for shown, theme, _ in drawn(share=0.0, count=30) for s in shown)


def test_refuses_a_folder_of_other_things(tmp_path):
    (tmp_path / "photos/2020").mkdir(parents=True)
    (tmp_path / "photos/2020/mine.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"photos holds files but no scenes\.json"):
        draw(tmp_path / "photos", TINY)
    with pytest.raises(InputError, match="is a file"):
        draw(tmp_path / "photos/2020/mine.jpg", TINY)
    assert contents(tmp_path) == {"photos/2020/mine.jpg": b"precious"}


def test_fills_an_empty_folder_and_replaces_older_scenes(tmp_path):
    folder = tmp_path / "scenes"
    (folder / "annotations").mkdir(parents=True)  # a workflow makes the folders of its outputs beforehand
    draw(folder, TINY)
    first = contents(folder)
    (folder / "train2017/leftover.jpg").write_bytes(b"of the older scenes")
    draw(folder, TINY | {"seed": 9})
    assert contents(folder).keys() == first.keys()
    assert contents(folder)["scenes.json"] != first["scenes.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]


@pytest.mark.parametrize("older", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, older):
    folder = tmp_path / "scenes"
    if older:
        draw(folder, TINY)
    before = contents(tmp_path)

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(scenes, "_write_lists", full_disk)
    with pytest.raises(OSError, match="No space left"):
        draw(folder, TINY | {"seed": 9})
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["scenes"] if older else [])


def test_a_failing_rename_puts_the_older_scenes_back(tmp_path, monkeypatch):
    folder = tmp_path / "scenes"
    draw(folder, TINY)
    before = contents(tmp_path)
    rename = Path.rename

    def refuse_the_new(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OSError, match="no"):
        draw(folder, TINY | {"seed": 9})
    assert contents(tmp_path) == before
