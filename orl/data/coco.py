"""Photos of a COCO tree: image folders under a root, with or without a JSON that lists the photos."""

import json
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from orl import InputError
from orl.data.folder import Photo, list_files


def list_photos(root: str | os.PathLike, folders: Sequence[str], annotations: Mapping[str, str]) -> list[Photo]:
    """The photos of the image `folders` under `root`, folder by folder, sorted by path inside each.

    Where `annotations` (folder -> COCO JSON under `root`) has the folder, they are the JSON's `images`, whether the
    files exist or not; else all its files. The id is the file's name without folders and extension, as text; the
    part is the folder. Raises InputError: a folder or a JSON is missing, empty or wrong, a path leaves its folder,
    or two files have the same id.
    """
    unused = sorted(set(annotations) - set(folders))
    if unused:
        raise InputError(f"config: data.annotations names {unused[0]!r}, which is not in data.folders; add it there.")
    if not folders:
        raise InputError("config: data.folders is empty; name at least one image folder under data.root.")
    photos: list[Photo] = []
    for folder in folders:
        if _climbs(folder):
            raise InputError(f"config: data.folders: {folder!r} leaves data.root; name a folder under it.")
        path = Path(root) / folder
        if not os.path.isdir(path):
            raise InputError(f"{path}: no such folder; correct data.root or data.folders.")
        names = _listed(Path(root) / annotations[folder]) if folder in annotations else list_files(path)
        if not names:
            raise InputError(f"{path}: no files in this folder; put the photos there or correct data.folders.")
        photos += [Photo(PurePosixPath(n).stem, str(PurePosixPath(folder, n)), folder) for n in sorted(names)]
    _check_ids(photos)
    return photos


def _climbs(relative: str) -> bool:
    """Whether a relative path leads out of the folder it is relative to."""
    return relative.startswith("/") or posixpath.normpath(relative).split("/")[0] == ".."


def _keep(value: dict[str, Any]) -> dict[str, Any] | None:
    return value if "file_name" in value or "images" in value else None


def _load(path: str | os.PathLike, keep: Callable[[dict[str, Any]], Any], remedy: str) -> tuple[dict[str, Any], list]:
    """A COCO JSON and its list of images; objects in it become what `keep` returns as they are read."""
    try:
        with open(path, "rb") as file:
            # What is not needed is dropped as it is read: COCO's annotations would take gigabytes.
            found = json.load(file, object_hook=keep)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON ({error}); {remedy}.") from None
    images = found.get("images") if isinstance(found, dict) else None
    if not isinstance(images, list):
        raise InputError(f"{path}: is no COCO file (it has no list `images`); {remedy}.")
    for number, image in enumerate(images):
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str) or posixpath.normpath(name) == ".":
            raise InputError(f"{path}: is no COCO file (images[{number}] has no `file_name`); correct the file.")
    return found, images


def _listed(path: Path) -> list[str]:
    """The file names that a COCO JSON lists. Raises InputError."""
    _, images = _load(path, _keep, "correct data.annotations")
    for image in images:
        if _climbs(image["file_name"]):
            raise InputError(f"{path}: file_name {image['file_name']!r} leaves the image folder; correct the file.")
    return [posixpath.normpath(image["file_name"]) for image in images]


@dataclass(frozen=True)
class Objects:
    """Annotated objects: `box` float64 [m, 4], x y w h in pixels, as they stand in the file; `crowd` bool [m];
    `category` int64 [m]: category_id, or -1 where it is no whole number from 0.

    Object i is in the photo that `photo` int64 [m] names: a row of `name` (file names, n) and of `size` int64 [n, 2]
    (width, height; 0 where the file does not say). `classes`: names of the categories from 0 on, where they are
    numbered by name.
    """

    name: list[str]
    size: np.ndarray
    photo: np.ndarray
    box: np.ndarray
    crowd: np.ndarray
    category: np.ndarray
    classes: tuple[str, ...] = ()


def read_objects(path: str | os.PathLike) -> Objects:
    """The boxes of a COCO JSON; none where it only lists photos. Masks and areas are not kept.

    Raises InputError.
    """

    def keep(value: dict[str, Any]) -> Any:
        if "bbox" in value:  # a tuple takes less memory
            box = value["bbox"]
            whole = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
            category = value.get("category_id")
            kind = category if type(category) is int and 0 <= category < 2**63 else -1
            return (str(value.get("image_id")), bool(value.get("iscrowd")), kind, *box) if whole else ()
        return _keep(value)

    found, images = _load(path, keep, "name a COCO JSON with boxes")
    row = {str(image.get("id")): number for number, image in enumerate(images)}
    annotations = found.get("annotations")
    objects = [one for one in annotations if one is not None] if isinstance(annotations, list) else []
    if objects and len(row) < len(images):
        raise InputError(f"{path}: its images must each have an `id` of their own; correct the file.")
    for one in objects:
        if not one:
            raise InputError(f"{path}: has a bbox that is not x, y, w, h; correct the file.")
        if one[0] not in row:
            raise InputError(f"{path}: has a box of image_id {one[0]}, which it does not list; correct the file.")
    sizes = [(image.get("width"), image.get("height")) for image in images]
    known = [size if all(type(side) is int and 0 <= side < 2**31 for side in size) else (0, 0) for size in sizes]
    return Objects(
        [image["file_name"] for image in images],
        np.array(known, np.int64).reshape(-1, 2),
        np.array([row[one[0]] for one in objects], np.int64),
        np.array([one[3:] for one in objects], np.float64).reshape(-1, 4),
        np.array([one[1] for one in objects], bool),
        np.array([one[2] for one in objects], np.int64),
    )


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def _check_ids(photos: list[Photo]) -> None:
    seen: dict[str, str] = {}
    for photo in photos:
        other = seen.get(photo.image_id)
        if other is None:
            seen[photo.image_id] = photo.path
        elif other == photo.path:
            raise InputError(f"{other}: is listed twice; list every photo once.")
        else:
            raise InputError(f"{other} and {photo.path} have the same id {photo.image_id!r}; rename or remove one.")
