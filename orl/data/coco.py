"""Photos of a COCO tree: image folders under a root, with or without a JSON that lists the photos."""

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

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


def _listed(path: Path) -> list[str]:
    """The file names that a COCO JSON lists. Raises InputError."""
    try:
        with open(path, "rb") as file:
            # Annotations are dropped as they are read: COCO's would take gigabytes.
            found = json.load(file, object_hook=_keep)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct data.annotations.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON ({error}); correct data.annotations.") from None
    images = found.get("images") if isinstance(found, dict) else None
    if not isinstance(images, list):
        raise InputError(f"{path}: is no COCO file (it has no list `images`); correct data.annotations.")
    names: list[str] = []
    for number, image in enumerate(images):
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str) or posixpath.normpath(name) == ".":
            raise InputError(f"{path}: is no COCO file (images[{number}] has no `file_name`); correct the file.")
        if _climbs(name):
            raise InputError(f"{path}: file_name {name!r} leaves the image folder; correct the file.")
        names.append(posixpath.normpath(name))
    return names


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
