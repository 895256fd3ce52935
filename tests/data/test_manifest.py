import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from orl import InputError, artifacts, progress
from orl.config import parse
from orl.data import coco, decode, decoded, folder, manifest

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "coco-mini"


def save(path, size=(20, 14), **options):
    """A photo of its own colours, so that no two files are equal; JPEG unless the name says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(os.fsencode(path.name))
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")
    Image.fromarray(pixels).save(path, kind, **options)
    return path


def list_coco(root, folder, names, **extra):
    path = root / "annotations" / f"instances_{folder}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": 7 * i, "file_name": name, "width": 1, "height": 1} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}], **extra}))
    return path


def build(root, workers=1, **data):
    """Build the manifest beside `root`; the manifest and the rows of the rejected files."""
    out = Path(root).parent / "out"
    config = parse({"data": {"layout": "folder", **data}})
    manifest.build(config, root, out / "manifest.csv", out / "rejected.csv", workers)
    with open(out / "rejected.csv", newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    assert tuple(columns) == artifacts.REJECTED_COLUMNS
    return artifacts.read_manifest(out / "manifest.csv"), [tuple(row) for row in rows]


def refused(root, match, **data):
    with pytest.raises(InputError, match=match) as caught:
        build(root, **data)
    assert not list(Path(root).parent.glob("out/*.csv"))  # nothing is written on errors
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def root(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


# Manifest


def test_rows_columns_and_rejected_files(root, capfd):
    save(root / "b.jpg", (31, 17))
    save(root / "a" / "x" / "2.png", (9, 12))
    save(root / "a" / "1.webp", (16, 5))
    (root / "notes.txt").write_text("no photo")
    (root / "a" / "empty.jpg").touch()
    (root / "cut.jpg").write_bytes((root / "b.jpg").read_bytes()[:-30])
    (root / "dead.jpg").symlink_to("nowhere.jpg")
    save(root / ".hidden.jpg")
    save(root / ".cache" / "thumb.jpg")
    found, rejected = build(root)
    assert found.path.tolist() == found.image_id.tolist() == ["a/1.webp", "a/x/2.png", "b.jpg"]
    assert found.part.tolist() == ["a", "a", ""]
    assert found.width.tolist() == [16, 9, 31]
    assert found.height.tolist() == [5, 12, 17]
    assert found.bytes.tolist() == [(root / path).stat().st_size for path in found.path]
    assert rejected == [
        ("a/empty.jpg", "empty file"),
        ("cut.jpg", "truncated"),
        ("dead.jpg", "no such file"),
        ("notes.txt", "not a JPEG, PNG or WebP image"),
    ]
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == f"3 photos, 4 rejected (see {root.parent / 'out' / 'rejected.csv'})"
    assert lines[0].startswith("decoding: 7/7")
    assert len(lines) == 2


def test_none_rejected(root, capfd):
    for name in "ab":
        save(root / f"{name}.jpg")
    _, rejected = build(root)
    assert rejected == []
    assert "2 photos, none rejected" in capfd.readouterr().err


def test_sizes_are_those_after_exif(root):
    exif = Image.Exif()
    exif[0x0112] = 8
    for name in "ab":
        save(root / f"{name}.jpg", (30, 20), exif=exif)
    plain, _ = build(root)
    turned, _ = build(root, exif="apply")
    assert (plain.width[0], plain.height[0]) == (30, 20)
    assert (turned.width[0], turned.height[0]) == (20, 30)
    for exif_setting, found in (("ignore", plain), ("apply", turned)):
        assert manifest.load(root, found, 1, exif_setting).shape == (found.height[1], found.width[1], 3)


def test_workers_change_nothing(root):
    for i in range(20):
        save(root / f"{'xyz'[i % 3]}" / f"{i}.jpg", (10 + i, 9))
        (root / f"bad{i}.txt").write_text("no photo")
    written = []
    for workers in (1, 2):
        build(root, workers)
        written.append([(root.parent / "out" / name).read_bytes() for name in ("manifest.csv", "rejected.csv")])
    assert written[0] == written[1]
    assert len(written[0][0].splitlines()) == 21


# What was decoded before


def made(root):
    return [(root.parent / "out" / name).read_bytes() for name in ("manifest.csv", "rejected.csv")]


def state_of(root):
    return root.parent / "out" / "manifest.csv.state"


def test_only_what_is_new_or_changed_is_decoded_again(root, capfd):
    for name in [*(f"{i}.jpg" for i in range(6)), *NAMES]:
        save(root / name)
    (root / "notes.txt").write_text("no photo")
    build(root)
    before = made(root)
    assert "taken over" not in capfd.readouterr().err
    build(root)
    assert made(root) == before
    told = capfd.readouterr().err.splitlines()
    assert told[0].startswith("13 photos taken over, unchanged since they were decoded")
    assert told[1].startswith("decoding: 1/1")  # what was rejected may be mended
    (root / "1.jpg").unlink()
    save(root / "2.jpg", (50, 40))
    os.utime(root / "3.jpg", ns=(1, 1))
    save(root / "new" / "6.jpg")
    (root / "notes.txt").unlink()
    build(root)
    changed = made(root)
    told = capfd.readouterr().err.splitlines()
    assert told[0].startswith("10 photos taken over")
    assert told[1].startswith("decoding: 3/3")
    build(root, exif="apply")
    assert "taken over" not in capfd.readouterr().err
    state_of(root).unlink()
    build(root)
    assert made(root) == changed


def test_lines_that_are_torn_or_spoilt_say_nothing(root, capfd):
    for i in range(8):
        save(root / f"{i}.jpg")
    build(root)
    whole, state = made(root), state_of(root)
    lines = state.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    lines[1] = lines[1].replace(b"20, 14", b"21, 14")
    lines[2] = bytes(len(lines[2]))  # without its end, so the next one is lost, too
    lines[4] = b""
    state.write_bytes(b"".join(lines)[:-5])
    capfd.readouterr()
    for taken in (3, 8):  # then all are there again, whole
        build(root)
        assert f"{taken} photos taken over" in capfd.readouterr().err
        assert made(root) == whole


def test_two_runs_at_once_spoil_nothing(root, tmp_path):
    names = [save(root / f"{i}.jpg").name for i in range(6)]
    seen = [(name, manifest.inspect(root, "ignore", name)) for name in names]
    state = tmp_path / "state"
    first, second = decoded.keep(state, "ignore", seen[:4]), decoded.keep(state, "ignore", seen[2:])
    for _ in zip(first, second, strict=True):
        pass
    assert decoded.unchanged(state, "ignore", root, names, 1) == dict(seen)


NAMES = ["a,b.jpg", 'q"uote.jpg', "new\nline.jpg", " sp ace .jpg", "-rf.jpg", "=1+1.jpg", "ünï\u2028.jpg"]


def test_odd_names_survive(root):
    for name in NAMES:
        save(root / name)
        save(root / "sub,\n" / name)
    found, rejected = build(root)
    expected = sorted([*NAMES, *(f"sub,\n/{name}" for name in NAMES)])
    assert found.path.tolist() == found.image_id.tolist() == expected
    assert set(found.part.tolist()) == {"", "sub,\n"}
    assert rejected == []
    assert all(manifest.load(root, found, row, "ignore").shape == (14, 20, 3) for row in range(len(found)))


name = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(name.map(lambda text: f"x{text}.png"), min_size=2, max_size=4))
def test_any_name_is_kept_or_rejected_with_the_reason(names, tmp_path_factory):
    root = tmp_path_factory.mktemp("names") / "photos"
    for text in {"good1.png", "good2.png", *names}:
        save(root / text, (3, 2))
    found, rejected = build(root)
    assert found.path.tolist() == sorted(text for text in {"good1.png", "good2.png", *names} if "\r" not in text)
    assert len(rejected) == sum("\r" in text for text in names)
    assert all(reason == "carriage return in the name; rename it" for _, reason in rejected)


def test_names_that_no_csv_takes_are_rejected(root):
    save(root / "a.jpg")
    save(root / "b.jpg")
    os.rename(root / "a.jpg", os.fsencode(root) + b"/caf\xe9.jpg")
    (root / "Icon\r").touch()  # macOS puts it into folders with an icon
    save(root / "c.jpg")
    found, rejected = build(root)
    assert found.path.tolist() == ["b.jpg", "c.jpg"]
    assert rejected == [
        ("Icon\\r", "carriage return in the name; rename it"),
        ("caf\\udce9.jpg", "name is not valid UTF-8; rename it"),
    ]


def test_refusals(root, tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder; set data.root")
    refused(root, "photos: no files in this folder")
    (root / "b.txt").write_text("no photo")
    (root / "a.jpg").touch()
    message = refused(root, r"no photo can be decoded \(a.jpg: empty file\); name a folder of")
    assert str(root) in message
    save(root / "one.jpg")
    refused(root, r"only one photo can be decoded \(one.jpg\), but neighbours need two")


# Loading


def test_load_gives_what_was_listed(root):
    for text in ("a.jpg", "b.png"):
        save(root / text)
    found, _ = build(root)
    for row, path in enumerate(found.path):
        np.testing.assert_array_equal(manifest.load(root, found, row, "ignore"), decode.decode(root / path))


def test_load_notices_changes(root):
    for text in ("a.jpg", "b.png", "c.png", "d.jpg"):
        save(root / text)
    found, _ = build(root)
    (root / "a.jpg").unlink()
    (root / "b.png").write_bytes((root / "b.png").read_bytes() + b"\0")
    # Same number of bytes, other pixels: width and height change places, padding evens out the rest.
    size, buffer = (root / "c.png").stat().st_size, io.BytesIO()
    Image.new("RGB", (14, 20)).save(buffer, "PNG")
    (root / "c.png").write_bytes(buffer.getvalue().ljust(size, b"\0"))
    (root / "d.jpg").write_bytes(bytes((root / "d.jpg").stat().st_size))
    for row, reason in enumerate(
        ["a.jpg: photo is gone", "b.png: photo changed", "c.png: photo changed", "d.jpg: not a"]
    ):
        with pytest.raises(InputError, match=reason) as caught:
            manifest.load(root, found, row, "ignore")
        assert str(root / found.path[row]) in str(caught.value)
    with pytest.raises(InputError, match="run manifest again"):
        manifest.load(root, found, 0, "ignore")


# Folders


def test_links_are_followed_once(root, tmp_path):
    save(root / "real" / "deep" / "1.jpg")
    save(tmp_path / "elsewhere" / "2.jpg")
    (root / "a_link").symlink_to("real", target_is_directory=True)  # another name of a folder that is listed anyway
    (root / "real" / "loop").symlink_to("..", target_is_directory=True)
    (root / "outside").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "outside_again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(root, target_is_directory=True)
    (root / "file.jpg").symlink_to("real/deep/1.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "pipe_link.jpg").symlink_to("pipe.jpg")
    assert folder.list_files(root) == ["file.jpg", "outside/2.jpg", "real/deep/1.jpg", "self.jpg"]


def test_order_is_that_of_the_paths(root):
    for path in ("b/1.jpg", "a.jpg", "a/2.jpg", "a/10.jpg", "a-b/1.jpg", "B.jpg"):
        save(root / path)
    assert [photo.path for photo in folder.list_photos(root)] == sorted(folder.list_files(root))
    assert folder.list_files(root) == ["B.jpg", "a-b/1.jpg", "a.jpg", "a/10.jpg", "a/2.jpg", "b/1.jpg"]


def test_unreadable_folder(root, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)  # root reads everything
    with pytest.raises(InputError, match=r"cannot list this folder \(Permission denied\)"):
        folder.list_files(root)


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        folder.list_photos(tmp_path / "nowhere")


# COCO


def test_coco_with_and_without_json(root):
    for text in ("000000000139.jpg", "000000000042.jpg", "000000000285.jpg"):
        save(root / "train2017" / text)
    for text in ("000000000001.jpg", "sub/000000000002.jpg"):
        save(root / "unlabeled2017" / text)
    listed = ["000000000285.jpg", "000000000042.jpg", "./000000000009.jpg"]
    list_coco(root, "train2017", listed)
    annotations = {"train2017": "annotations/instances_train2017.json"}
    found, rejected = build(root, layout="coco", folders=["unlabeled2017", "train2017"], annotations=annotations)
    assert found.image_id.tolist() == ["000000000001", "000000000002", "000000000042", "000000000285"]
    assert found.path.tolist()[1:3] == ["unlabeled2017/sub/000000000002.jpg", "train2017/000000000042.jpg"]
    assert found.part.tolist() == ["unlabeled2017", "unlabeled2017", "train2017", "train2017"]
    assert rejected == [("train2017/000000000009.jpg", "no such file")]
    everything, _ = build(root, layout="coco", folders=["train2017"])
    assert everything.image_id.tolist() == ["000000000042", "000000000139", "000000000285"]
    assert everything.width.tolist() == [20, 20, 20]  # the file's, not the JSON's


def test_scenes_are_coco(root):
    for text in ("000000000000.jpg", "000000000001.jpg", "000000000002.jpg"):
        save(root / "train2017" / text)
    list_coco(root, "train2017", ["000000000002.jpg", "000000000001.jpg"])
    found, _ = build(root, layout="scenes", folders=["not", "used"])
    assert found.path.tolist() == ["train2017/000000000001.jpg", "train2017/000000000002.jpg"]
    assert found.part.tolist() == ["train2017"] * 2


def test_coco_ids_must_differ(root):
    for text in ("train2017/1.jpg", "val2017/1.png", "val2017/2.png"):
        save(root / text)
    match = "train2017/1.jpg and val2017/1.png have the same id '1'"
    refused(root, match, layout="coco", folders=["train2017", "val2017"])
    save(root / "val2017" / "more" / "2.jpg")
    match = "val2017/2.png and val2017/more/2.jpg have the same id"
    refused(root, match, layout="coco", folders=["val2017"])
    refused(root, "train2017/1.jpg: is listed twice", layout="coco", folders=["train2017", "train2017"])
    list_coco(root, "train2017", ["1.jpg", "./1.jpg"])
    annotations = {"train2017": "annotations/instances_train2017.json"}
    refused(root, "1.jpg: is listed twice", layout="coco", folders=["train2017"], annotations=annotations)


def test_coco_refusals(root, tmp_path):
    save(root / "train2017" / "1.jpg")
    (root / "empty").mkdir()
    refused(root, "nowhere: no such folder", layout="coco", folders=["train2017", "nowhere"])
    refused(root, "empty: no files in this folder", layout="coco", folders=["train2017", "empty"])
    refused(root, "data.folders is empty", layout="coco", folders=[])
    for leaving in ("../photos", "/tmp", "train2017/../.."):
        refused(root, "leaves data.root", layout="coco", folders=[leaving])
    refused(root, "names 'tran2017', which is not in data.folders", layout="coco", annotations={"tran2017": "a.json"})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"a.json: cannot be read \(No such file"),
        ("", "a.json: is no JSON"),
        ('{"images": [', "a.json: is no JSON"),
        (b"\xff\xfe\x00\xd8", "a.json: is no JSON"),
        ("[" * 100_000, "a.json: is no JSON"),
        ("[1, 2]", "a.json: is no COCO file"),
        ('{"photos": []}', "a.json: is no COCO file"),
        ('{"images": {"file_name": "x"}}', "a.json: is no COCO file"),
        ('{"images": []}', "no files"),
        ('{"images": [{"file_name": "1.jpg"}, {"id": 3}]}', r"images\[1\] has no `file_name`"),
        ('{"images": [{"file_name": 1}]}', r"images\[0\] has no `file_name`"),
        ('{"images": ["1.jpg"]}', r"images\[0\] has no `file_name`"),
        ('{"images": [{"file_name": ""}]}', r"images\[0\] has no `file_name`"),
        ('{"images": [{"file_name": "../1.jpg"}]}', "'../1.jpg' leaves the image folder"),
        ('{"images": [{"file_name": "a/../../1.jpg"}]}', "leaves the image folder"),
        ('{"images": [{"file_name": "/etc/passwd"}]}', "'/etc/passwd' leaves the image folder"),
    ],
)
def test_broken_coco_json(root, content, match):
    save(root / "train2017" / "1.jpg")
    if content is not None:
        (root / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(root, match, layout="coco", annotations={"train2017": "a.json"})


def test_names_in_a_json_that_no_file_can_have(root):
    for text in ("1.jpg", "2.jpg"):
        save(root / "train2017" / text)
    list_coco(root, "train2017", ["1.jpg", "2.jpg", "nul\0.jpg", "lone\ud800.jpg", "..jpg", "...hidden.jpg"])
    annotations = {"train2017": "annotations/instances_train2017.json"}
    found, rejected = build(root, layout="coco", annotations=annotations)
    assert found.image_id.tolist() == ["1", "2"]
    assert [reason for _, reason in rejected] == [
        "no such file",
        "no such file",
        "name is not valid UTF-8; rename it",
        "cannot be read (embedded null byte)",
    ]


def test_other_parts_of_the_json_and_where_it_lies_do_not_matter(root):
    save(root / "train2017" / "1.jpg")
    path = list_coco(root, "train2017", ["1.jpg"], info={"url": "x"}, categories=[{"id": 1, "name": "cat"}])
    assert coco.list_photos(root, ["train2017"], {"train2017": str(path)}) == [
        folder.Photo("1", "train2017/1.jpg", "train2017")
    ]


# Progress


class Terminal(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal(True))
    assert list(progress.track(iter("abc"), 3, "spelling")) == ["a", "b", "c"]
    assert "spelling: 100%" in sys.stderr.getvalue()


def test_progress_is_lines_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    clock = iter(range(0, 1000, 4))  # four seconds pass per item
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track(range(7), 7, "counting")) == list(range(7))
    assert sys.stderr.getvalue().splitlines() == ["counting: 3/7", "counting: 6/7", "counting: 7/7 in 32 s"]


# Real photos


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real photos are not at {REAL}")
def test_real_photos(tmp_path):
    config = parse(
        {"data": {"layout": "coco", "annotations": {"train2017": "annotations/instances_train2017.json"}}},
    )
    manifest.build(config, REAL, tmp_path / "manifest.csv", tmp_path / "rejected.csv", 2)
    found = artifacts.read_manifest(tmp_path / "manifest.csv")
    images = json.loads((REAL / "annotations" / "instances_train2017.json").read_text())["images"]
    images.sort(key=lambda image: image["file_name"])
    assert found.image_id.tolist() == [f"{image['id']:012d}" for image in images]
    assert found.width.tolist() == [image["width"] for image in images]
    assert found.height.tolist() == [image["height"] for image in images]
    assert (tmp_path / "rejected.csv").read_text() == "path,reason\n"
    assert manifest.load(REAL, found, 5, "ignore").shape == (found.height[5], found.width[5], 3)
