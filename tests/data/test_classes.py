import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orl import InputError
from orl.data.classes import ClassSet, read_sets, read_subset, subset, write_subset

TINY = Path(__file__).parents[2].parent / "shared" / "data" / "tiny-imagenet-mini"


def touch(root: Path, *photos: str) -> None:
    for photo in photos:
        (root / photo).parent.mkdir(parents=True, exist_ok=True)
        (root / photo).touch()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes as an ImageFolder; `ant` comes before `ant-b` as a name, but its photos after as paths."""
    touch(tmp_path, "train/ant/2.JPEG", "train/ant/deep/er/1.webp", "train/ant-b/my photo 3.jpg", "train/ant-b/1.PNG")
    touch(tmp_path, "train/ant/.hidden.jpg", "train/ant/md5.txt", "train/list.txt", "train/.cache/1.jpg")
    touch(tmp_path, "val/ant/9.jpeg", "val/ant-b/8.jpg")
    return tmp_path


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    touch(tmp_path, "all/a.jpg", "all/b b.jpg", "all/sub/c.JPEG", "all/d", "all/e.jpg")
    (tmp_path / "train.txt").write_text("all/d 2\nall/b b.jpg 0\n\n./all/a.jpg\t1\n")
    (tmp_path / "val.txt").write_text("all/sub/c.JPEG 0\r\nall/e.jpg 1")
    return tmp_path


def refused(*parts: str, root: Path, train: str = "train", val: str = "val", classes: int | None = None) -> None:
    with pytest.raises(InputError) as error:
        read_sets(root, train, val, classes)
    sentence(error, *parts)


def sentence(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for part in parts:
        assert part in text


def some(counts: list[int], root: Path = Path("nowhere")) -> ClassSet:
    """A set of counts[c] photos of class c, classes in turn, so that rows are not sorted by class."""
    pairs = sorted((number, label) for label, count in enumerate(counts) for number in range(count))
    path = np.array([f"train/c{label}/{label}_{number}.jpg" for number, label in pairs])
    return ClassSet(root, path, np.array([label for _, label in pairs]), tuple(f"c{c}" for c in range(len(counts))))


def test_folders(folders: Path) -> None:
    train, val = read_sets(folders, "train", "val/", classes=2)
    assert train.classes == val.classes == ("ant", "ant-b")
    assert train.path.tolist() == [
        "train/ant-b/1.PNG",
        "train/ant-b/my photo 3.jpg",
        "train/ant/2.JPEG",
        "train/ant/deep/er/1.webp",
    ]
    assert train.label.dtype == np.int64
    assert train.label.tolist() == [1, 1, 0, 0]
    assert (val.path.tolist(), val.label.tolist()) == (["val/ant-b/8.jpg", "val/ant/9.jpeg"], [1, 0])
    assert (len(train), len(val), train.root) == (4, 2, folders)
    assert all((train.root / path).is_file() for path in train.path)


def test_classes_are_sorted_by_name(tmp_path: Path) -> None:
    names = [f"{letter}{number}" for letter in "xBa" for number in (10, 9, 2)]
    touch(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in names))
    train, _ = read_sets(tmp_path, "train", "val")
    assert train.classes == ("B10", "B2", "B9", "a10", "a2", "a9", "x10", "x2", "x9")
    assert train.label.tolist() == list(range(9))


def test_class_folders_may_be_links(folders: Path) -> None:
    (folders / "train" / "ant").rename(folders / "elsewhere")
    (folders / "train" / "ant").symlink_to(folders / "elsewhere")
    train, _ = read_sets(folders, "train", "val")
    assert train.path.tolist()[2:] == ["train/ant/2.JPEG", "train/ant/deep/er/1.webp"]
    assert train.label.tolist() == [1, 1, 0, 0]


def test_lists(lists: Path) -> None:
    train, val = read_sets(lists, "train.txt", str(lists / "val.txt"), classes=3)
    assert train.classes == val.classes == ("0", "1", "2")
    assert (train.path.tolist(), train.label.tolist()) == (["all/d", "all/b b.jpg", "all/a.jpg"], [2, 0, 1])
    assert (val.path.tolist(), val.label.tolist()) == (["all/sub/c.JPEG", "all/e.jpg"], [0, 1])
    assert val.label.dtype == np.int64


def test_paths_of_a_list_start_at_the_root_or_at_the_folder_of_the_split(folders: Path) -> None:
    """ImageNet as OpenSelfSup has it: photos in train/ and val/, lists in meta/ that do not name these folders."""
    (folders / "meta").mkdir()
    (folders / "meta" / "a.txt").write_text("ant/2.JPEG 0\nant-b/1.PNG 1\n")
    (folders / "meta" / "b.txt").write_text("val/ant-b/8.jpg 1\n")
    train, val = read_sets(folders, "meta/a.txt", "meta/b.txt")
    assert train.path.tolist() == ["train/ant/2.JPEG", "train/ant-b/1.PNG"]
    assert val.path.tolist() == ["val/ant-b/8.jpg"]
    (folders / "meta" / "b.txt").write_text("ant-b/8.jpg 1\n")
    assert read_sets(folders, "meta/a.txt", "meta/b.txt")[1].path.tolist() == ["val/ant-b/8.jpg"]


def test_a_folder_beside_a_list(folders: Path) -> None:
    (folders / "val.txt").write_text("ant/9.jpeg 0\nant-b/8.jpg 1\n")
    train, val = read_sets(folders, "train", "val.txt", classes=2)
    assert train.classes == val.classes == ("ant", "ant-b")
    assert val.path.tolist() == ["val/ant/9.jpeg", "val/ant-b/8.jpg"]
    (folders / "val.txt").write_text("ant/9.jpeg 0\nant-b/8.jpg 4\n")
    refused("'train' has 2 class folders", "'val.txt' has labels up to 4", root=folders, val="val.txt")
    (folders / "some.txt").write_text("ant-b/1.PNG 1\n")
    refused("'some.txt' has no photo of class 'ant'", root=folders, train="some.txt")


def test_fingerprint_tells_paths_labels_and_classes_but_not_the_root(lists: Path, tmp_path: Path) -> None:
    first, _ = read_sets(lists, "train.txt", "val.txt")
    assert len(bytes.fromhex(first.fingerprint())) == hashlib.sha256().digest_size
    other = ClassSet(tmp_path / "moved", first.path.astype("<U99"), first.label.copy(), first.classes)
    assert other.fingerprint() == first.fingerprint()
    changed = [
        ClassSet(first.root, first.path[::-1], first.label, first.classes),
        ClassSet(first.root, first.path, first.label[::-1], first.classes),
        ClassSet(first.root, first.path, first.label, ("0", "1", "two")),
        ClassSet(first.root, first.path[:2], first.label[:2], first.classes),
    ]
    assert len({first.fingerprint(), *(each.fingerprint() for each in changed)}) == 5


def test_tiny_imagenet() -> None:
    if not TINY.is_dir():
        pytest.skip(f"{TINY} is not there")
    train, val = read_sets(TINY, "train", "val", classes=50)
    assert set(Counter(train.label.tolist()).values()) == {100}
    assert set(Counter(val.label.tolist()).values()) == {20}
    assert len(train.classes) == 50
    for photos in (train, val):
        assert all(photos.classes[y] == path.split("/")[1] for path, y in zip(photos.path, photos.label, strict=True))
    assert (TINY / train.path[0]).read_bytes()[:2] == b"\xff\xd8"
    assert np.bincount(train.label[subset(train, 0.1, 0)]).tolist() == [10] * 50


# Bad input


def test_missing_root_folders_and_lists(folders: Path) -> None:
    refused("absent", "no such folder", root=folders / "absent")
    touch(folders, "meta.txt", "cover.jpg", ".git/x")
    refused("'trian'", "folders are train, val", "files meta.txt.", root=folders, train="trian")
    for number in range(20):
        touch(folders, f"{number:02d}.txt")
    refused("files 00.txt, ", "09.txt, ….", root=folders, val="val.txt")
    refused("'none.txt'", "folders are none, its files none", root=folders / "val" / "ant", train="none.txt")
    refused("is not below", root=folders, train=".")
    refused("is not below", root=folders / "train", train="../train")
    refused("is not below", root=folders, val=str(folders / "val"))


def test_bad_folders(folders: Path) -> None:
    (folders / "val" / "cat").mkdir()
    touch(folders, "val/cat/notes.txt")
    refused("val/cat: holds no photo", "1 of the 3", root=folders)
    touch(folders, "val/cat/1.jpg")
    refused("only 'val' has a folder 'cat'", root=folders)
    touch(folders, "train/cat/1.jpg", "train/stray.JPG", "train/stray2.png")
    refused("train: holds 2 photos outside", "'stray.JPG'", root=folders)
    touch(folders, "flat/1.jpg", "empty/readme.txt")
    refused("flat: holds 1 photos outside", root=folders, train="flat")
    refused("empty: holds no class folder", root=folders, train="empty")
    touch(folders, "one/x/1.jpg", "other/x/1.jpg")
    refused("1 class;", "at least two", root=folders, train="one", val="other")
    refused("share 3 photos", "val/ant-b/8.jpg", root=folders, train="val")


def test_the_number_of_classes_is_checked(folders: Path, tmp_path: Path) -> None:
    refused(str(tmp_path), "has 2 classes", "1000 are expected", root=folders, classes=1000)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("all/d 1\nall/a.jpg\n", ["line 2", "'all/a.jpg'", "a whole number"]),
        ("all/d 1\n\nall/a.jpg 1.0\n", ["line 3"]),
        ("all/a.jpg -1\n", ["line 1"]),
        ("all/a.jpg cat\n", ["line 1", "cat"]),
        ("3\n", ["line 1"]),
        (f"all/a.jpg {10**30}\n", ["line 1"]),
        ("\n \n", ["lists no photos"]),
        ("", ["lists no photos"]),
        ("all/a.jpg 0\nall/x.jpg 1\nno/y.jpg 0\n", ["'all/x.jpg'", "2 of the 3"]),
        ("x/b.jpg 0\ny.jpg 0\n", ["'x/b.jpg'", "nor in its folder 'train'", "2 of the 2"]),
        ("all/\0.jpg 0\nall\0/.jpg 0\n", ["2 of the 2"]),
        ("all/a.jpg 0\nall/d 1\nall//a.jpg 0\n", ["line 3", "'all/a.jpg'", "second time"]),
        ("all/a.jpg 0\nall/../../b.jpg 0\n", ["line 2", "'../b.jpg'", "leaves"]),
        ("/all/a.jpg 0\n", ["line 1", "leaves"]),
        ("all/a.jpg 0\nall/d 2\n", ["no photo of class '1'"]),
        ("all/a.jpg 1\nall/d 2\n", ["no photo of class '0'"]),
        ("all/a.jpg 0\nall/d 999999999\n", ["no photo of class '1'", "999999999"]),
        ("all/a.jpg 0\nall/e.jpg 1\n", ["share 1 photos", "all/e.jpg"]),
    ],
)
def test_bad_lists(lists: Path, text: str, parts: list[str]) -> None:
    (lists / "train.txt").write_text(text)
    refused("train.txt", *parts, root=lists, train="train.txt", val="val.txt")


def test_a_list_that_is_no_text_and_lists_of_one_class(lists: Path) -> None:
    (lists / "train.txt").write_bytes(b"\xff\xd8\xff")
    refused("train.txt", "cannot be read", root=lists, train="train.txt", val="val.txt")
    (lists / "train.txt").write_text("all/a.jpg 0")
    (lists / "val.txt").write_text("all/d 0")
    refused("has 1 class", root=lists, train="train.txt", val="val.txt")
    (lists / "val.txt").write_text("all/d 1")
    refused("'train.txt' has no photo of class '1'", root=lists, train="train.txt", val="val.txt")


# Subsets


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    share=st.floats(1e-6, 1),
    seed=st.integers(0, 2**32),
)
def test_a_subset_takes_as_many_of_each_class(counts: list[int], share: float, seed: int) -> None:
    photos = some(counts)
    rows = subset(photos, share, seed)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    each = max(1, round(share * sum(counts) / len(counts)))
    assert np.bincount(photos.label[rows]).tolist() == [min(each, count) for count in counts]
    assert set(subset(photos, share / 2, seed)) <= set(rows)


def test_subsets_follow_the_seed_and_classes_are_independent() -> None:
    photos = some([40, 40, 40])
    rows = subset(photos, 0.5, 7)
    assert rows.tolist() == subset(photos, 0.5, 7).tolist()
    assert rows.tolist() != subset(photos, 0.5, 8).tolist()
    chosen = [photos.path[rows[photos.label[rows] == label]].tolist() for label in range(3)]
    numbers = [{path.rpartition("_")[2] for path in paths} for paths in chosen]
    assert numbers[0] != numbers[1]
    assert numbers[1] != numbers[2]
    # A photo more in another class moves all rows, but changes no choice.
    other = some([40, 41, 40])
    rows = subset(other, 0.5, 7)
    assert other.path[rows[other.label[rows] == 2]].tolist() == chosen[2]


def test_every_photo_is_as_likely() -> None:
    photos = some([5, 20])
    drawn = Counter(row for seed in range(400) for row in subset(photos, 0.16, seed).tolist())
    expected = np.where(photos.label == 0, 400 * 2 / 5, 400 * 2 / 20)
    assert np.abs(np.array([drawn[row] for row in range(25)]) - expected).max() < 5 * np.sqrt(160 * 0.6)
    assert np.abs([drawn[row] - 40 for row in range(25) if photos.label[row]]).max() < 5 * np.sqrt(40 * 0.9)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(InputError) as error:
        subset(some([2, 2]), share, 0)
    sentence(error, str(share))


def test_a_written_subset_is_read_back(folders: Path) -> None:
    train, _ = read_sets(folders, "train", "val")
    rows = np.array([1, 3])
    write_subset(folders / "new" / "part.txt", train, rows)
    text = "train/ant-b/my photo 3.jpg 1\ntrain/ant/deep/er/1.webp 0\n"
    assert (folders / "new" / "part.txt").read_text() == text
    again = read_subset(folders / "new" / "part.txt", train)
    assert again.dtype == np.int64
    assert again.tolist() == rows.tolist()
    write_subset(folders / "other.txt", some([9, 9]), np.array([8, 1]))
    assert read_subset(folders / "other.txt", some([9, 9])).tolist() == [1, 8]  # whatever the order of the list
    # It is a list that a set can be read from, too.
    shutil.copy(folders / "new" / "part.txt", folders)
    assert read_sets(folders, "part.txt", "val")[0].path.tolist() == train.path[rows].tolist()


@pytest.mark.parametrize(
    "text",
    [
        "train/c1/1_0.jpg\ntrain/c0/0_1.jpg\n",
        "c1/1_0.jpg 1\n\nc0/0_1.jpg 0",
        "1_0.jpg\r\n0_1.jpg\r\n",
        "train/c1/1_0.jpg 1\n0_1.jpg\n",
    ],
)
def test_lists_of_photos_with_and_without_labels_and_folders(tmp_path: Path, text: str) -> None:
    (tmp_path / "part.txt").write_text(text)
    photos = some([2, 2])
    assert set(photos.path[read_subset(tmp_path / "part.txt", photos)]) == {"train/c1/1_0.jpg", "train/c0/0_1.jpg"}


def test_photos_whose_names_end_in_a_number_and_in_each_other(tmp_path: Path) -> None:
    path = np.array(["a/x", "a/x 1", "a/b/x 2", "b/x 2"])
    photos = ClassSet(tmp_path, path, np.array([1, 0, 1, 0]), ("0", "1"))
    for rows in ([0, 3], [1, 2], [0, 1, 2, 3]):
        write_subset(tmp_path / "part.txt", photos, np.array(rows))
        assert read_subset(tmp_path / "part.txt", photos).tolist() == rows
    (tmp_path / "part.txt").write_text("a/b/x 2\nb/x 2\n")  # the second is a path in the set, and the first one's end
    assert read_subset(tmp_path / "part.txt", photos).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["lists no photos"]),
        ("train/c0/0_0.jpg 0\ntrain/c0/7.jpg 0\n", ["line 2", "'train/c0/7.jpg'", "not in the set"]),
        ("other/c0/0_0.jpg\n", ["line 1", "not in the set"]),
        ("_0.jpg\n", ["line 1", "not in the set"]),
        ("0_0.jpg 0\ntwo.jpg\n", ["line 2", "'two.jpg'", "any of 2 photos", "more of its path"]),
        ("0_0.jpg 0\n1_0.jpg 0\n", ["line 2", "'1_0.jpg' the label 0", "it is 1"]),
        ("0_0.jpg 0\n1_0.jpg\nc0/0_0.jpg\n", ["line 3", "second time"]),
        ("0_0.jpg\n", ["class 'c1'", "2 of the 3 classes"]),
        (None, ["cannot be read"]),
    ],
)
def test_bad_subsets(tmp_path: Path, text: str | None, parts: list[str]) -> None:
    photos = some([2, 2, 2])
    photos.path[-2:] = ["train/c1/two.jpg", "train/c2/two.jpg"]
    if text is not None:
        (tmp_path / "part.txt").write_text(text)
    with pytest.raises(InputError) as error:
        read_subset(tmp_path / "part.txt", photos)
    sentence(error, "part.txt", *parts)
