"""What a file of a run holds: whether it can be read, is whole and makes sense. By blocks, in bounded memory."""

import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orl import InputError, artifacts
from orl.artifacts import Manifest, Part, read_past

BLOCK = 2**22  # numbers read at a time
SAMPLE = 1000  # rows that are looked at where looking at all would take long
UNIT = 0.01  # what the length of a unit row may be off, in float16


def check_stamp(path: str | os.PathLike, found: dict[str, str], schema: str) -> None:
    """Raise InputError unless attributes are whole and of this version; that they belong together is known already."""
    if found.get("schema") != schema:
        raise InputError(f"{path}: holds {found.get('schema') or 'no schema'!r}, but {schema!r} is needed.")
    if not {"settings", "inputs", "fingerprint"} <= set(found):
        raise InputError(f"{path}: does not say how it was made.")


# HDF5


def check_arrays(
    path: str | os.PathLike,
    schema: str,
    part: Part | None = None,
    manifest: Manifest | None = None,
    offsets: np.ndarray | None = None,
    stages: tuple[int, ...] = (),
) -> str:
    """What an HDF5 file holds, in words. Raises InputError where that is damaged or makes no sense.

    `part`: the rows of the manifest that it is about; `manifest`, and `offsets` of all the boxes of proposals.h5: only
    where the file was made from these; `stages` are those of artifacts.FEATURES.
    """
    try:
        return _check_arrays(path, schema, part, manifest, offsets, stages)
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {' '.join(str(error).split())}.") from None


def _check_arrays(
    path: str | os.PathLike,
    schema: str,
    part: Part | None,
    manifest: Manifest | None,
    offsets: np.ndarray | None,
    stages: tuple[int, ...],
) -> str:
    names = [f"{split}_{stage}" for split in ("train", "test") for stage in stages]
    arrays = artifacts.read_arrays(path, schema, shards=part is not None, names=names)
    if schema == artifacts.FEATURES:
        for name, array in zip(names, arrays, strict=True):
            _shape(array, name, np.float32, 2)
            _finite(array, name)
        return f"stages {', '.join(map(str, stages))} of {len(arrays[0])} and {len(arrays[-1])} photos"
    if schema == artifacts.CLASS_FEATURES:
        for name, array in zip(("train", "val"), arrays, strict=True):
            _shape(array, name, np.float16, 2)
            _unit(array, name)
        return f"{len(arrays[0])} and {len(arrays[1])} photos"
    if schema == artifacts.EMBEDDINGS:
        return _embeddings(arrays[0], part)
    if schema == artifacts.NEIGHBORS:
        return _neighbors(part, *arrays)
    if schema == artifacts.PROPOSALS:
        return _proposals(part, manifest, *arrays)
    if schema == artifacts.ROIS:
        return _rois(arrays[0], part, offsets)
    return _correspondences(part, offsets, *arrays)


def _shape(array: np.ndarray, name: str, kind: Any, axes: int, rows: int | None = None) -> None:
    if array.ndim != axes or not np.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} is {array.dtype} with {array.ndim} axes, not {np.dtype(kind)} with {axes}")
    if rows is not None and len(array) != rows:
        raise ValueError(f"{name} has {len(array)} rows, not {rows}")


def _count(part: Part | None) -> int | None:
    return None if part is None else len(part.rows)


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The first row of each block, and its rows."""
    step = max(1, BLOCK // max(1, array[:1].size))
    for start in range(0, len(array), step):
        yield start, read_past(array, start, min(start + step, len(array)))


def _some(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows from all over an array, as [1, D]."""
    for row in np.unique(np.linspace(0, len(array) - 1, min(len(array), SAMPLE), dtype=np.int64)).tolist():
        yield row, read_past(array, row, row + 1)


def _unit(array: np.ndarray, name: str) -> None:
    for row, found in _some(array):
        length = float(np.linalg.norm(found.astype(np.float32)))
        if not abs(length - 1) < UNIT:
            raise ValueError(f"{name}: row {row} has length {length:.3g}, not 1")


def _finite(array: np.ndarray, name: str) -> None:
    for row, found in _some(array):
        if not np.isfinite(found).all():
            raise ValueError(f"{name}: row {row} is not finite")


def check_offsets(offsets: np.ndarray, name: str, rows: int | None, last: int) -> None:
    """Raise ValueError unless `offsets` rise from 0 to `last`, for so many rows."""
    _shape(offsets, name, np.integer, 1, None if rows is None else rows + 1)
    if len(offsets) == 0 or offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != last:
        raise ValueError(f"{name} does not rise from 0 to {last}")


def _embeddings(embedding: np.ndarray, part: Part | None) -> str:
    _shape(embedding, "embedding", np.float32, 2, _count(part))
    _unit(embedding, "embedding")
    return f"{len(embedding)} photos, {embedding.shape[1]} numbers each"


def _neighbors(part: Part | None, index: np.ndarray, similarity: np.ndarray) -> str:
    _shape(index, "index", np.integer, 2, _count(part))
    _shape(similarity, "similarity", np.floating, 2, len(index))
    for start, rows in _blocks(index):
        _check_neighbors(rows, "index", start, len(index))
        cosine = read_past(similarity, start, start + len(rows))
        if not (np.abs(cosine) <= 1 + UNIT).all() or (np.diff(cosine, axis=1) > 0).any():
            raise ValueError("similarity holds what is no cosine, or not the best first")
    return f"{index.shape[1]} of each of {len(index)} photos"


def _check_neighbors(rows: np.ndarray, name: str, first: int, total: int) -> None:
    if ((rows < 0) | (rows >= total)).any():
        raise ValueError(f"{name} holds {rows[(rows < 0) | (rows >= total)][0]}, but there are {total} photos")
    itself = (rows == first + np.arange(len(rows))[:, None]).any(1)
    if itself.any():
        raise ValueError(f"{name}: photo {first + int(itself.argmax())} is its own neighbour")


def _proposals(part: Part | None, manifest: Manifest | None, box: np.ndarray, offsets: np.ndarray) -> str:
    _shape(box, "box", np.integer, 2)
    check_offsets(offsets, "box_offsets", _count(part), len(box))
    offsets = np.asarray(offsets)
    for start, rows in _blocks(box):
        rows = rows.astype(np.int64)
        photo = np.searchsorted(offsets, np.arange(start, start + len(rows)), "right") - 1
        bad = (rows[:, :2] < 0).any(1) | (rows[:, 2:] <= 0).any(1)
        if manifest and part:
            sizes = np.stack([manifest.width, manifest.height], 1)[part.start + photo]
            bad |= (rows[:, :2] + rows[:, 2:] > sizes).any(1)
        if bad.any():
            first = int(bad.argmax())
            name = manifest.path[part.start + photo[first]] if manifest and part else f"photo {photo[first]}"
            raise ValueError(f"box {rows[first].tolist()} (x y w h) is not inside its photo {name}")
    return f"{len(box)} boxes of {len(offsets) - 1} photos"


def _rois(feature: np.ndarray, part: Part | None, offsets: np.ndarray | None) -> str:
    rows = int(offsets[part.stop] - offsets[part.start]) if part and offsets is not None else None
    _shape(feature, "feature", np.float16, 2, rows)
    _unit(feature, "feature")
    return f"{len(feature)} RoIs"


def _correspondences(
    part: Part | None,
    offsets: np.ndarray | None,
    neighbor: np.ndarray,
    pair: np.ndarray,
    similarity: np.ndarray,
    pair_offsets: np.ndarray,
) -> str:
    _shape(neighbor, "neighbor", np.integer, 2, _count(part))
    _shape(pair, "pair", np.integer, 2)
    _shape(similarity, "similarity", np.floating, 1, len(pair))
    check_offsets(pair_offsets, "pair_offsets", neighbor.size, len(pair))
    start = part.start if part else 0
    _check_neighbors(np.asarray(neighbor), "neighbor", start, part.total if part else len(neighbor))
    if offsets is not None:
        boxes, slots, k = np.diff(offsets), np.asarray(pair_offsets), neighbor.shape[1]
        for first, rows in _blocks(pair):
            slot = np.searchsorted(slots, np.arange(first, first + len(rows)), "right") - 1
            most = np.stack([boxes[start + slot // k], boxes[np.asarray(neighbor).ravel()[slot]]], 1)
            if (rows >= most).any():
                place = int((rows >= most).any(1).argmax())
                photo = start + slot[place] // k
                raise ValueError(f"pair {rows[place].tolist()}: photo {photo} or its neighbour has no such box")
    return f"{len(pair)} pairs of {len(neighbor)} photos"


# Others


def check_weights(path: str | os.PathLike) -> str:
    """What a safetensors file holds, in words. Raises InputError where numbers are not finite, or it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            for name in names:
                array = file.get_tensor(name)
                if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                    raise InputError(f"{path}: {name} holds numbers that are not finite.")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from None
    return f"{len(names)} tensors"


def check_metrics(path: str | os.PathLike, epochs: int) -> str:
    """What a metrics.csv holds, in words. Raises InputError unless it has a row of numbers for each epoch."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        numbers = [[float(value) for value in row.values()] for row in rows]
        whole = [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from None
    if not whole or not all(math.isfinite(value) for row in numbers for value in row):
        raise InputError(f"{path}: does not have a row of numbers for each of {epochs} epochs.")
    return f"{epochs} epoch{'' if epochs == 1 else 's'}"


def check_rejected(path: str | os.PathLike) -> list[str]:
    """The paths that rejected.csv lists. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != artifacts.REJECTED_COLUMNS:
                raise InputError(f"{path}: its columns are not {', '.join(artifacts.REJECTED_COLUMNS)}.")
            return [name for name, _ in reader]
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({error}).") from None


def check_pictures(folder: Path) -> dict[str, Any]:
    """attention.json of a folder of attention maps. Raises InputError where that or a picture is damaged."""
    listing = folder / "attention.json"
    try:
        found = json.loads(listing.read_text(encoding="utf-8"))
        names = [*(photo["file"] for photo in found["photos"]), "contact_sheet.png"]
        found["settings"], found["data"]["weights"]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{listing}: cannot be read ({error}).") from None
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                file.seek(-8, os.SEEK_END)
                whole = file.read(8) == b"IEND\xaeB`\x82"
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be read ({error.strerror}).") from None
        if not whole:
            raise InputError(f"{folder / name}: is no whole PNG.")
    return found


def check_end(path: str | os.PathLike, end: str) -> None:
    """Raise InputError unless a text file can be read and ends so."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 100))
            whole = file.read().rstrip().endswith(end.encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    if not whole:
        raise InputError(f"{path}: is cut off: it does not end in {end}.")
