"""Objects with masks: a split of a tree in COCO layout."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from orl import InputError
from orl.data.decode import Exif, Photo, decode
from orl.data.folder import missing

FURTHEST = 1e5  # pixels; filling a polygon takes memory for each that its sides cross, outside of the photo, too


@dataclass(frozen=True)
class Instances:
    """The photos of a split and the objects on them.

    `file`: the annotations; `path`: n photos; `image_id` int64 [n]; `size` int64 [n, 2]: width and height;
    `category_id` int64 [C], ascending, and `classes`, their names. The objects of photo i are first[i] to first[i + 1]:
    `box` float64 [m, 4], x y w h as they stand in the file; `label` int64 [m], an index of `classes`; `crowd` bool [m].
    Their outlines stand as JSON in `outline` uint8, from outline_offsets[j] to outline_offsets[j + 1] for object j: so
    many Python lists would take gigabytes for COCO. `left_out`: objects of no use, counted by reason.
    """

    file: Path
    path: tuple[Path, ...]
    image_id: np.ndarray
    size: np.ndarray
    category_id: np.ndarray
    classes: tuple[str, ...]
    first: np.ndarray
    box: np.ndarray
    label: np.ndarray
    crowd: np.ndarray
    outline: np.ndarray
    outline_offsets: np.ndarray
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.path)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of photos' names, classes and objects; the same wherever the root lies."""
        names = [os.path.relpath(path, self.file.parents[1]) for path in self.path]
        digest = hashlib.sha256(json.dumps([names, self.classes]).encode())
        for array in (self.image_id, self.size, self.category_id, self.first, self.box, self.label, self.crowd,
                      self.outline_offsets, self.outline):  # fmt: skip
            digest.update(array.tobytes())
        return digest.hexdigest()

    def photo(self, row: int, exif: Exif) -> Photo:
        """The pixels of photo `row`. Raises InputError if it is no photo, or of another size than listed."""
        photo = decode(self.path[row], exif)
        width, height = self.size[row].tolist()
        if photo.shape[:2] != (height, width):
            raise InputError(
                f"{self.path[row]}: has {photo.shape[1]} x {photo.shape[0]} pixels, but {self.file} says {width} x "
                f"{height}; correct it, or data.exif."
            )
        return photo

    def objects(self, row: int) -> np.ndarray:
        """Numbers of the objects of photo `row` that are no crowds: int64."""
        numbers = np.arange(self.first[row], self.first[row + 1])
        return numbers[~self.crowd[numbers]]

    def with_objects(self) -> np.ndarray:
        """Rows of the photos with an object that is no crowd: int64, ascending."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.first))
        return np.unique(owner[~self.crowd])

    def mask(self, number: int, row: int, size: tuple[int, int]) -> np.ndarray:
        """Mask of object `number`, which is on photo `row`, with the photo resized to `size` (width, height).

        Returns uint8 [height, width], 1 on the object. Polygons are scaled before they are filled.
        """
        outline = json.loads(bytes(self.outline[self.outline_offsets[number] : self.outline_offsets[number + 1]]))
        if isinstance(outline, dict):
            if isinstance(outline["counts"], list):
                outline = rle.frPyObjects(outline, *outline["size"])
            return cv2.resize(rle.decode(outline), size, interpolation=cv2.INTER_NEAREST_EXACT)
        scale = np.divide(size, self.size[row])
        polygons = [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in outline]
        return rle.decode(rle.merge(rle.frPyObjects(polygons, size[1], size[0])))


def read(root: str | os.PathLike, split: str) -> Instances:
    """The photos of the folder `split` that annotations/instances_{split}.json lists, and their objects.

    Categories may have any ids. Objects whose box has no area (`without_area`) or whose outline encloses nothing
    (`without_mask`) are left out; photos without any object stay. Raises InputError: a missing or wrong file, ids that
    occur twice or are not listed, no masks at all, or photos that are not there.
    """
    path = Path(root) / "annotations" / f"instances_{split}.json"
    content = read_json(path, _kept)
    images, categories = content["images"], sorted(content["categories"], key=lambda one: one["id"])
    row_of = {image["id"]: row for row, image in enumerate(images)}
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    paths = tuple(Path(root) / split / image["file_name"] for image in images)
    gone = missing(paths)
    if gone:
        raise InputError(
            f"{gone[0]}: no such photo; {len(gone)} of the {len(paths)} that {path} lists are missing: name the "
            f"annotations of these photos."
        )

    rows, labels, crowds, boxes, outlines = [], [], [], [], []
    left_out = {"without_area": 0, "without_mask": 0}
    for number, one in enumerate(content["annotations"]):
        if not isinstance(one, tuple):
            raise InputError(f"{path}: annotations[{number}] needs image_id, category_id and bbox; correct the file.")
        image, category, crowd, box, outline = one
        if image not in row_of or category not in label_of:
            key = f"image_id {image}" if image not in row_of else f"category_id {category}"
            raise InputError(f"{path}: annotations[{number}] has {key}, which the file does not list; correct it.")
        size = images[row_of[image]]
        if not (np.isfinite(box).all() and box[2] > 0 and box[3] > 0):
            left_out["without_area"] += 1
        elif not outline:
            left_out["without_mask"] += 1
        elif outline[:1] == b"{" and not _fits(outline, size):
            raise InputError(f"{path}: annotations[{number}] has a mask of another size than its photo; correct it.")
        else:
            rows.append(row_of[image])
            labels.append(label_of[category])
            crowds.append(crowd)
            boxes.append(box)
            outlines.append(outline)
    if content["annotations"] and not outlines:
        raise InputError(f"{path}: has no object with a mask (segmentation); name annotations that have masks.")
    order = np.argsort(rows, kind="stable")
    return Instances(
        path,
        paths,
        np.array([image["id"] for image in images], np.int64),
        np.array([(image["width"], image["height"]) for image in images], np.int64),
        np.array([category["id"] for category in categories], np.int64),
        tuple(category["name"] for category in categories),
        np.searchsorted(np.array(rows, np.int64)[order], np.arange(len(images) + 1)),
        np.array(boxes, np.float64).reshape(-1, 4)[order],
        np.array(labels, np.int64)[order],
        np.array(crowds, bool)[order],
        np.frombuffer(b"".join(outlines[one] for one in order), np.uint8),
        np.cumsum([0, *(len(outlines[one]) for one in order)]),
        left_out,
    )


def check_splits(train: Instances, test: Instances) -> None:
    """Raises InputError unless two splits have the same categories, no photo in common, and each an object."""
    if train.classes != test.classes or (train.category_id != test.category_id).any():
        odd = sorted(set(zip(train.category_id.tolist(), train.classes, strict=True))
                     ^ set(zip(test.category_id.tolist(), test.classes, strict=True)))  # fmt: skip
        raise InputError(f"{test.file}: its categories must be those of {train.file}, but one alone has {odd[0]}.")
    shared = sorted(set(train.path) & set(test.path))
    if shared:
        raise InputError(f"{test.file}: shares {len(shared)} photos with {train.file}, the first {shared[0]}.")
    for split in (train, test):
        if split.crowd.all():
            raise InputError(f"{split.file}: has no object but crowds; name annotations that have objects.")


def read_json(path: str | os.PathLike, hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """A COCO instances file, each of its objects put through `hook`; annotations are not checked. Raises InputError.

    Images have `id`, `file_name`, `width` and `height`, categories `id` and `name`; no id or name occurs twice.
    """
    try:
        with open(path, "rb") as file:
            found = json.load(file, object_hook=hook)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct downstream.detection.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON ({error}); fetch it again.") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(found, dict) or not isinstance(found.get(key), list):
            raise InputError(f"{path}: has no list {key!r}; it must be a COCO instances file.")
    if not found["images"] or not found["categories"]:
        raise InputError(f"{path}: lists no {'categories' if found['images'] else 'images'}.")
    for number, image in enumerate(found["images"]):
        sides = (image.get("width"), image.get("height")) if isinstance(image, dict) else ()
        if not all(type(side) is int and side > 0 for side in sides) or not sides:
            raise InputError(f"{path}: images[{number}] needs width and height; correct the file.")
    for what, key in (("images", "id"), ("images", "file_name"), ("categories", "id"), ("categories", "name")):
        _check_ids(path, found, what, key)
    return found


def _kept(value: dict[str, Any]) -> Any:
    """What `read` keeps of an annotation: image, category, crowd, box, outline as JSON; anything else as it is."""
    if "bbox" not in value:
        return value
    box, image, category = value["bbox"], value.get("image_id"), value.get("category_id")
    whole = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
    if not whole or type(image) is not int or type(category) is not int:
        return {}
    return image, category, bool(value.get("iscrowd")), box, outline(value.get("segmentation"))


def outline(value: Any) -> bytes:
    """An outline as compact JSON: polygons of three points and more, or a run-length code of any pixels; else empty.

    A polygon with a point that lies FURTHEST away, or further, is none.
    """
    if isinstance(value, list):
        value = [one for one in value if _numbers(one) and len(one) >= 6 and len(one) % 2 == 0]
        value = [one for one in value if max(map(abs, one)) < FURTHEST]
    elif isinstance(value, dict):
        size, runs = value.get("size", []), _runs(value.get("counts"))
        # pycocotools does not check that the runs fill the mask, and leaves the rest as the memory is.
        if not _numbers(size) or len(size) != 2 or runs.sum() != np.prod(size) or not runs[1::2].any():
            value = None
    else:
        value = None
    return json.dumps(value, separators=(",", ":")).encode() if value else b""


def _numbers(value: Any) -> bool:
    """Whether it is a list of finite numbers."""
    try:
        array = np.array(value)
    except ValueError:  # lists of different lengths
        return False
    return isinstance(value, list) and array.ndim == 1 and array.dtype.kind in "if" and bool(np.isfinite(array).all())


def _runs(counts: Any) -> np.ndarray:
    """Lengths of the runs of COCO's code, int64, background first; empty if it is no such code.

    As text, a number is characters of five bits, the lowest first, each but the last marked by a sixth; from the fourth
    number on it is the difference to the last but one.
    """
    none = np.zeros(0, np.int64)
    if isinstance(counts, list):
        runs = np.array(counts, np.int64) if all(type(one) is int and abs(one) < 2**32 for one in counts) else none
    elif isinstance(counts, str) and counts.isascii():
        code = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
        last = np.flatnonzero(code & 32 == 0)
        if not len(last) or last[-1] != len(code) - 1:
            return none
        first = np.concatenate([[0], last[:-1] + 1])
        shift = 5 * (np.arange(len(code)) - np.repeat(first, last - first + 1))
        runs = np.add.reduceat((code & 31) << shift, first)
        runs -= (code[last] >> 4 & 1) << shift[last] + 5
        for start in (1, 2):
            runs[start::2] = runs[start::2].cumsum()
    else:
        return none
    return none if (runs < 0).any() else runs


def _fits(outline: bytes, image: dict[str, Any]) -> bool:
    return json.loads(outline)["size"] == [image["height"], image["width"]]


def _check_ids(path: str | os.PathLike, content: dict[str, Any], what: str, key: str) -> None:
    kind = int if key == "id" else str
    seen = set()
    for number, one in enumerate(content[what]):
        value = one.get(key) if isinstance(one, dict) else None
        if type(value) is not kind or (isinstance(value, int) and abs(value) >= 2**63):
            wanted = "a number of 64 bits" if kind is int else "a text"
            raise InputError(f"{path}: {what}[{number}] needs {key!r}, {wanted}.")
        if value in seen:
            raise InputError(f"{path}: {what} has {key} {value!r} twice; correct the file.")
        seen.add(value)
