"""Photos of any folder, searched recursively."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from orl import InputError


class Photo(NamedTuple):
    """A listed photo: its id, its path relative to the root (with slashes) and the part it belongs to."""

    image_id: str
    path: str
    part: str


def list_files(root: str | os.PathLike) -> list[str]:
    """Every file below `root` as a sorted path relative to it, with slashes.

    Hidden files and folders are skipped, as is what is neither file nor folder. Links are followed, but no folder
    is visited twice, under whatever names it appears. Dead links are listed: they fail later, where it is noted.
    Raises InputError for a folder that cannot be read.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        # Links come last, so that a folder goes by its own name where it has one below the root.
        relative = folders.pop() if folders else links.pop(0)
        path = os.path.join(root, relative)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{path}: cannot list this folder ({error.strerror}); check its permissions.") from None
        for entry in entries:
            name = relative + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                if os.path.isdir(entry.path):
                    links.append(f"{name}/")
                elif os.path.isfile(entry.path) or not os.path.exists(entry.path):
                    found.append(name)
            elif entry.is_dir():
                folders.append(f"{name}/")
            elif entry.is_file():
                found.append(name)
    return sorted(found)


def list_photos(root: str | os.PathLike) -> list[Photo]:
    """Every file below `root` (see `list_files`), decodable or not, sorted by path.

    The id is the path; the part is its first folder, or "" directly under the root. Raises InputError.
    """
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; name the folder of the photos.")
    return [Photo(path, path, path.rpartition("/")[0].partition("/")[0]) for path in list_files(root)]


def missing(paths: Sequence[Path]) -> list[Path]:
    """Those of some files that are not there."""
    present: dict[Path, set[str]] = {}  # one listing per folder: quicker than asking for each file on a network disk
    for folder in {path.parent for path in paths}:
        present[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
    return [path for path in paths if path.name not in present[path.parent]]
