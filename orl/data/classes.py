"""Photos of one class each (ImageNet, Places205, iNaturalist18, any ImageFolder or list), and balanced subsets."""

import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orl import InputError
from orl.artifacts import write_text
from orl.data.folder import list_files
from orl.data.views import rng

PHOTOS = (".jpg", ".jpeg", ".png", ".webp")
SUBSET = 4  # as 1 in neighbours, 2 in correspondences and 3 in pairs: streams of their own


@dataclass(frozen=True)
class ClassSet:
    """The photos of a split and the class of each.

    `path`: text [n], relative to `root`, with slashes; `label` int64 [n]: rows of `classes`, the C names.
    """

    root: Path
    path: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.path)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of paths, labels and classes; the same wherever the root lies."""
        text = json.dumps([self.classes, self.path.tolist(), self.label.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()


def read_sets(root: str | os.PathLike, train: str, val: str, classes: int | None = None) -> tuple[ClassSet, ClassSet]:
    """The training and the validation photos below `root`: the same classes, no photo in both.

    `train` and `val` each name a folder below `root` or a list file (absolute, or relative to `root`).
    Folder (ImageFolder): each folder in it is a class, sorted by name; the class's photos lie in it at any depth, are
    known by their suffix (PHOTOS, any case) and sorted by path.
    List (as OpenSelfSup's): a line is a photo's path, a blank and its label, a whole number from 0; the order is kept.
    Paths are relative to `root`; where none of a list is there, to root/train for the training list, root/val for the
    other. Two lists have 1 + their largest label classes, named by the numbers; beside a folder, a list must have as
    many as the folder has, and its labels mean the folder's classes in their order.
    `classes` is the number expected. Raises InputError.
    """
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; name the root of the photos.")
    found = [_read(Path(root), name, split) for name, split in ((train, "train"), (val, "val"))]
    folders = [names for _, names in found if names]
    if len(folders) == 2 and folders[0] != folders[1]:
        odd = min(set(folders[0]) ^ set(folders[1]))
        raise InputError(
            f"{root}: {train!r} and {val!r} must have the same classes, but only "
            f"{train if odd in folders[0] else val!r} has a folder {odd!r}."
        )
    listed = 1 + max((max(label.values()) for label, names in found if not names), default=-1)  # 0: no list
    count = len(folders[0]) if folders else listed
    if listed not in (0, count):
        folder, file = (train, val) if found[0][1] else (val, train)
        raise InputError(
            f"{root}: {folder!r} has {count} class folders, but {file!r} has labels up to {listed - 1}, so {listed} "
            "classes; name a folder and a list of the same classes."
        )
    if classes is not None and count != classes:
        raise InputError(f"{root}: has {count} classes, but {classes} are expected; correct the one or the other.")
    if count < 2:
        raise InputError(f"{root}: {train!r} has {count} class; at least two are needed.")
    present = set(found[0][0].values())
    # A list may have any label: its classes get names only once each of them is known to have a photo.
    absent = next((label for label in range(count) if label not in present), None)
    if absent is not None:
        name = folders[0][absent] if folders else str(absent)
        raise InputError(f"{root}: {train!r} has no photo of class {name!r}, label {absent} of 0 to {count - 1}.")
    shared = found[0][0].keys() & found[1][0].keys()
    if shared:
        raise InputError(
            f"{root}: {train!r} and {val!r} share {len(shared)} photos, the first {min(shared)}; "
            "validating on training photos says nothing."
        )
    names = folders[0] if folders else tuple(map(str, range(count)))
    first, second = (
        ClassSet(Path(root), np.array(list(label)), np.fromiter(label.values(), np.int64, len(label)), names)
        for label, _ in found
    )
    return first, second


def subset(of: ClassSet, share: float, seed: int) -> np.ndarray:
    """Rows (int64, ascending) of a random `share` (0 to 1) of the photos, the same number of each class.

    That number is the share of n / C, rounded, at least 1; a class that has fewer gives all of its photos. A class's
    photos depend on the seed and its own photos alone, and a larger share of the same seed contains a smaller one.
    Raises InputError.
    """
    if not 0 < share <= 1:
        raise InputError(f"a subset needs a share above 0 and at most 1, but {share} is given.")
    count = len(of.classes)
    each = max(1, round(share * len(of) / count))
    ends = np.cumsum(np.bincount(of.label, minlength=count))[:-1]
    rows = np.split(np.argsort(of.label, kind="stable"), ends)
    drawn = [rng(seed, SUBSET, label).permutation(own)[:each] for label, own in enumerate(rows)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def read_subset(path: str | os.PathLike, of: ClassSet) -> np.ndarray:
    """Rows (int64, ascending) of the photos of `of` that a list names, for instance one of the official 1 % or 10 %.

    A line is a photo, or a photo, a blank and its label. The photo is its path in the set, or enough of the path's
    end to be unique: n02077923/n02077923_14822.JPEG (OpenSelfSup) or n02077923_14822.JPEG (SimCLR). Each class needs
    a photo. Raises InputError.
    """
    lines = [(number, line, *_split(line)) for number, line in _lines(path)]
    if not lines:
        raise InputError(f"{path}: lists no photos.")
    found: dict[str, list[int]] = {name: [] for _, line, photo, _ in lines for name in (line, photo)}
    for row, name in enumerate(of.path.tolist()):
        while name:  # a/b/c.jpg, b/c.jpg, c.jpg
            if name in found:
                found[name].append(row)
            name = name.partition("/")[2]
    rows: set[int] = set()
    for number, line, photo, label in lines:
        if found[line] and not found[photo]:  # a path that ends in a blank and a number
            photo, label = line, None
        fitting = [row for row in found[photo] if of.path[row] == photo] or found[photo]
        if len(fitting) != 1:
            which = f"may be any of {len(fitting)} photos; list more of its path" if fitting else "is not in the set"
            raise InputError(f"{path}: line {number} lists {photo!r}, which below {of.root} {which}.")
        row = fitting[0]
        if label not in (None, of.label[row]):
            raise InputError(
                f"{path}: line {number} gives {photo!r} the label {label}, but in the set it is {of.label[row]}."
            )
        if row in rows:
            raise InputError(f"{path}: line {number} lists photo {photo!r} a second time.")
        rows.add(row)
    chosen = np.array(sorted(rows), dtype=np.int64)
    absent = sorted(set(range(len(of.classes))) - set(of.label[chosen].tolist()))
    if absent:
        raise InputError(
            f"{path}: lists no photo of class {of.classes[absent[0]]!r}; "
            f"{len(absent)} of the {len(of.classes)} classes have none."
        )
    return chosen


def write_subset(path: str | os.PathLike, of: ClassSet, rows: np.ndarray) -> None:
    """Write the photos of some rows as a list that `read_subset` reads."""
    photos = zip(of.path[rows].tolist(), of.label[rows].tolist(), strict=True)
    write_text(path, "".join(f"{photo} {label}\n" for photo, label in photos))


def _read(root: Path, name: str, split: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Path -> label of a folder's or a list's photos, and the folder's classes (none of a list)."""
    path = root / name
    if os.path.isdir(path):
        return _folder(root, name)
    if os.path.isfile(path):
        return _list(root, path, split), ()
    with os.scandir(root) as scan:
        entries = [(entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith(".")]
    folders = _few(entry for entry, is_dir in entries if is_dir)
    files = _few(entry for entry, is_dir in entries if not is_dir and not entry.lower().endswith(PHOTOS))
    raise InputError(f"{root}: has no folder or list file {name!r}; its folders are {folders}, its files {files}.")


def _few(names: Iterable[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:10]) + (", …" if len(some) > 10 else "") or "none"


def _folder(root: Path, name: str) -> tuple[dict[str, int], tuple[str, ...]]:
    path, relative = root / name, posixpath.normpath(name)
    if relative == "." or _leaves(relative):
        raise InputError(f"{path}: is not below {root}; name a folder in it that holds the class folders.")
    photos = [file for file in list_files(path) if file.lower().endswith(PHOTOS)]
    loose = [file for file in photos if "/" not in file]
    if loose:
        raise InputError(
            f"{path}: holds {len(loose)} photos outside of class folders, the first {loose[0]!r}; move each into the "
            "folder of its class, or name a list file with the labels."
        )
    with os.scandir(path) as scan:
        classes = sorted(entry.name for entry in scan if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{path}: holds no class folder; name a folder with one folder of photos per class.")
    number = {own: row for row, own in enumerate(classes)}
    label = {f"{relative}/{file}": number[file.partition("/")[0]] for file in photos}
    empty = sorted(set(range(len(classes))) - set(label.values()))
    if empty:
        raise InputError(
            f"{path / classes[empty[0]]}: holds no photo ({', '.join(PHOTOS)}); {len(empty)} of the {len(classes)} "
            "class folders have none."
        )
    return label, tuple(classes)


def _list(root: Path, path: Path, split: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, line in _lines(path):
        photo, label = _split(line)
        if label is None:
            raise InputError(
                f"{path}: line {number} is {line!r}, but a photo's path and its label, a whole number, are needed."
            )
        photo = posixpath.normpath(photo)
        if _leaves(photo):
            raise InputError(f"{path}: line {number} lists {photo!r}, which leaves {root}; list paths relative to it.")
        if photo in found:
            raise InputError(f"{path}: line {number} lists photo {photo!r} a second time.")
        found[photo] = label
    if not found:
        raise InputError(f"{path}: lists no photos.")
    for prefix in ("", f"{split}/"):
        missing = _missing(root / prefix, found)
        if len(missing) < len(found):
            break
    if missing:
        where = root / prefix if len(missing) < len(found) else f"{root} nor in its folder {split!r}"
        raise InputError(
            f"{path}: lists photo {missing[0]!r}, which is not in {where}; "
            f"{len(missing)} of the {len(found)} listed are missing."
        )
    return {prefix + photo: label for photo, label in found.items()}


def _missing(root: Path, photos: Iterable[str]) -> list[str]:
    present: dict[str, set[str]] = {}  # one listing per folder: quicker than asking for each file on a network disk
    missing = []
    for photo in photos:
        folder, _, name = photo.rpartition("/")
        if folder not in present:
            try:
                present[folder] = set(os.listdir(root / folder))
            except (OSError, ValueError):  # ValueError: a zero byte
                present[folder] = set()
        if name not in present[folder]:
            missing.append(photo)
    return missing


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _split(line: str) -> tuple[str, int | None]:
    """The photo and the label of a line; the whole line where it ends in none."""
    photo, *label = line.rsplit(maxsplit=1)
    if label and label[0].isdecimal() and len(label[0]) < 10:  # more digits than any number of classes has
        return photo, int(label[0])
    return line, None


def _leaves(path: str) -> bool:
    """Whether a normalised path leads out of the folder it is relative to."""
    return path.startswith("/") or path.split("/")[0] == ".."
