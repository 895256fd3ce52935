"""Which classes each photo shows: multi-label targets from a VOC or a COCO tree."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orl import InputError
from orl.data.folder import missing


@dataclass(frozen=True)
class Labels:
    """The photos of a split and what they show.

    `image_path` and `image_id`: n paths and ids (text); `classes`: C names; `label` int8 [n, C]: 1 the photo shows
    the class, -1 it does not, 0 difficult objects only (ignored in testing, negative in training).
    """

    image_path: tuple[Path, ...]
    image_id: tuple[str, ...]
    classes: tuple[str, ...]
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.image_path)

    def fingerprint(self) -> str:
        """Hash of ids, classes and labels; the photos' content is not looked at."""
        digest = hashlib.sha256("\n".join([*self.image_id, "", *self.classes]).encode())
        digest.update(self.label.tobytes())
        return digest.hexdigest()


def read_labels(root: str | os.PathLike, layout: Literal["voc", "coco"], split: str) -> Labels:
    """The photos and labels of one split.

    `voc`: `root` is VOC2007, VOCdevkit or the folder above; ImageSets/Main/{class}_{split}.txt hold the labels, the
    classes are those with such a file, sorted by name.
    `coco`: annotations/instances_{split}.json lists photos of the folder {split}; a photo with any annotation of a
    category is positive, crowds and small objects included, so there are no zeros; classes are ordered by category
    id. Photos keep the order of the files.
    Raises InputError.
    """
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder; name the root of the labelled photos.")
    labels = (_voc if layout == "voc" else _coco)(Path(root), split)
    gone = missing(labels.image_path)
    if gone:
        raise InputError(f"{gone[0]}: no such photo; {len(gone)} of the {len(labels)} listed are missing.")
    return labels


def read_splits(
    root: str | os.PathLike, layout: Literal["voc", "coco"], train: str, test: str
) -> tuple[Labels, Labels]:
    """A training and a test split: the same classes, no photo in both. Raises InputError."""
    first, second = read_labels(root, layout, train), read_labels(root, layout, test)
    if first.classes != second.classes:
        odd = sorted(set(first.classes) ^ set(second.classes))
        difference = f"only one has {odd[0]!r}" if odd else "their order differs"
        raise InputError(f"{root}: splits {train!r} and {test!r} must have the same classes, but {difference}.")
    shared = sorted(set(first.image_path) & set(second.image_path))
    if shared:
        raise InputError(
            f"{root}: splits {train!r} and {test!r} share {len(shared)} photos, the first {shared[0]}; "
            "testing on training photos says nothing."
        )
    return first, second


def listed(train: Labels, test: Labels) -> str:
    """Hash of which photos two splits list, in which order, whatever they show."""
    return hashlib.sha256("\n".join([*train.image_id, "", *test.image_id]).encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from None


def _missing_split(path: Path, split: str, found: Iterable[str]) -> InputError:
    names = ", ".join(sorted(found)) or "none"
    return InputError(f"{path}: has no labels of split {split!r}; splits found: {names}.")


# VOC


def _voc(root: Path, split: str) -> Labels:
    tried = (root, root / "VOC2007", root / "VOCdevkit" / "VOC2007")
    folder = next((path for path in tried if (path / "ImageSets" / "Main").is_dir()), None)
    if folder is None:
        raise InputError(f"{root}: holds no ImageSets/Main, neither itself nor in VOC2007 or VOCdevkit/VOC2007.")
    lists = folder / "ImageSets" / "Main"
    # {class}_{split}.txt; {split}.txt beside them lists the photos without labels
    end, found = f"_{split}.txt", sorted(lists.glob("?*_*.txt"))
    files = {path.name.removesuffix(end): path for path in found if path.name.endswith(end)}
    if not files:
        raise _missing_split(lists, split, {path.stem.rpartition("_")[2] for path in found})
    classes = sorted(files)
    columns = {name: _class_list(files[name]) for name in classes}
    ids = list(columns[classes[0]])
    if not ids:
        raise InputError(f"{files[classes[0]]}: lists no photos.")
    for name in classes:
        odd = sorted(columns[name].keys() ^ columns[classes[0]].keys())
        if odd:
            here, other = (name, classes[0]) if odd[0] in columns[name] else (classes[0], name)
            raise InputError(f"{files[here]}: lists photo {odd[0]!r}, but {files[other].name} does not.")
    label = np.array([[columns[name][photo] for name in classes] for photo in ids], dtype=np.int8)
    paths = tuple(folder / "JPEGImages" / f"{photo}.jpg" for photo in ids)
    return Labels(paths, tuple(ids), tuple(classes), label)


def _class_list(path: Path) -> dict[str, int]:
    """Photo id -> 1, 0 or -1, in the order of the file."""
    found: dict[str, int] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("1", "0", "-1"):
            raise InputError(f"{path}: line {number} is {line!r}, but a photo id and 1, 0 or -1 are needed.")
        if words[0] in found:
            raise InputError(f"{path}: line {number} lists photo {words[0]!r} a second time.")
        found[words[0]] = int(words[1])
    return found


# COCO


def _coco(root: Path, split: str) -> Labels:
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        found = (other.stem.removeprefix("instances_") for other in path.parent.glob("instances_*.json"))
        raise _missing_split(path.parent, split, found)
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is no JSON ({error}); fetch it again.") from None
    category_ids, names = _columns(path, content, "categories", ("id", "name"), (int, str))
    ids, files = _columns(path, content, "images", ("id", "file_name"), (int, str))
    owners, kinds = _columns(path, content, "annotations", ("image_id", "category_id"), (int, int))
    if not ids or not names:
        raise InputError(f"{path}: lists no {'categories' if ids else 'images'}.")
    for what, values in (("image id", ids), ("category id", category_ids), ("category name", names)):
        most, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise InputError(f"{path}: {what} {most!r} occurs {times} times.")
    order = np.argsort(np.array(category_ids))
    row = {image: number for number, image in enumerate(ids)}
    column = {category_ids[old]: new for new, old in enumerate(order)}
    label = np.full((len(ids), len(names)), -1, dtype=np.int8)
    for number, (image, category) in enumerate(zip(owners, kinds, strict=True)):
        if image not in row or category not in column:
            key = f"image_id {image}" if image not in row else f"category_id {category}"
            raise InputError(f"{path}: annotations[{number}] has {key}, which the file does not list.")
        label[row[image], column[category]] = 1
    paths = tuple(root / split / file for file in files)
    return Labels(paths, tuple(map(str, ids)), tuple(names[old] for old in order), label)


def _columns(path: Path, content: Any, key: str, names: tuple[str, ...], types: tuple[type, ...]) -> list[list]:
    """The named values of each entry of the list `content[key]`, checked."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{path}: has no list {key!r}; it must be a COCO instances file.")
    columns: list[list] = []
    for name, kind in zip(names, types, strict=True):
        column = [entry.get(name) if isinstance(entry, dict) else None for entry in entries]
        wrong = next((number for number, value in enumerate(column) if type(value) is not kind), None)
        if wrong is not None:
            raise InputError(f"{path}: {key}[{wrong}] needs {name!r}, {'a number' if kind is int else 'a text'}.")
        columns.append(column)
    return columns
