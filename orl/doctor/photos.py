"""The photos of a run against its manifest."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from orl import InputError
from orl.artifacts import Manifest
from orl.config import Config, Data
from orl.data import coco, folder
from orl.data.decoded import identities
from orl.progress import track

CHUNK = 32  # photos that a process decodes at a time


def compare(
    config: Config, root: str, manifest: Manifest, made: int, rejected: Sequence[str], threads: int
) -> dict[str, list[str]]:
    """The photos by what is to be said of them: `missing`, `changed`, `touched` and `new`; paths as in the manifest.

    `made`: when the manifest was written, in ns. `changed` are those of another size in bytes, or, if they were written
    after it, in pixels; `touched` the others of these. `new` photos are neither in the manifest nor among `rejected`; a
    COCO file that lists them is read only if it was written after the manifest. Raises InputError.
    """
    paths = manifest.path.tolist()
    size, written = (np.array(column) for column in zip(*identities(root, paths, threads), strict=True))
    gone, other = size < 0, (size >= 0) & (size != manifest.bytes)
    changed = np.flatnonzero(other).tolist()
    later = np.flatnonzero(~gone & ~other & (written > made)).tolist()
    touched: list[int] = []
    for row, same in zip(later, _same_pixels(config, root, manifest, later, threads), strict=True):
        (touched if same else changed).append(row)
    known = {*paths, *rejected}
    return {
        "missing": [paths[row] for row in np.flatnonzero(gone).tolist()],
        "changed": [paths[row] for row in sorted(changed)],
        "touched": [paths[row] for row in touched],
        "new": [path for path in _listed(config.data, root, made) if path not in known],
    }


def _same_pixels(config: Config, root: str, manifest: Manifest, rows: list[int], threads: int) -> list[bool]:
    """Whether photos decode to the sizes that the manifest says."""
    if not rows:
        return []
    from orl.data.manifest import inspect
    from orl.workers import ordered

    paths = [str(manifest.path[row]) for row in rows]
    chunk = max(1, min(CHUNK, len(rows) // (4 * threads)))
    read = ordered(partial(inspect, root, config.data.exif), paths, min(threads, len(rows)), chunk)
    done = track(read, len(rows), "photos written after the manifest, read again")
    expected = [(int(manifest.width[row]), int(manifest.height[row]), int(manifest.bytes[row])) for row in rows]
    return [one[:3] == size for one, size in zip(done, expected, strict=True)]


def _listed(data: Data, root: str, made: int) -> list[str]:
    from orl.data.manifest import shown

    if data.layout == "folder":
        return [shown(photo.path) for photo in folder.list_photos(root)]
    given = {"train2017": "annotations/instances_train2017.json"} if data.layout == "scenes" else data.annotations
    folders = ["train2017"] if data.layout == "scenes" else data.folders
    for file in given.values():
        if not Path(root, file).exists():
            raise InputError(f"{Path(root, file)}: is not there; correct data.annotations.")
    left = [name for name in folders if name not in given or Path(root, given[name]).stat().st_mtime_ns > made]
    listed = coco.list_photos(root, left, {name: given[name] for name in left if name in given}) if left else []
    return [shown(photo.path) for photo in listed]
