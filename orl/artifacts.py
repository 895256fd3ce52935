"""The files that stages hand to each other: the only place that knows their layout.

Every file is written under a temporary name and renamed when complete. HDF5 and model files carry `schema`,
`settings` (JSON), `inputs` (JSON: fingerprints of what they were made from) and `fingerprint`, the hash of the
three: no clock and no host, so equal runs make equal files.
"""

import contextlib
import csv
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from orl import InputError, NoRoomError

MANIFEST_COLUMNS = ("image_id", "path", "width", "height", "bytes", "part")
REJECTED_COLUMNS = ("path", "reason")
BLOCK = 4096  # photos whose boxes or pairs are checked at a time
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# Writing


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block succeeds and is removed when it fails.

    What processes of this machine that were killed left of the same file is removed, too. Raises NoRoomError.
    """
    path = Path(path)
    with room(path):
        temporary = path.parent / f"{_beside(path)}{secrets.token_hex(4)}.tmp"
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)  # by the user's umask
        os.close(handle)
        try:
            yield temporary
            temporary.chmod(mode)  # safetensors puts a private file in its place
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block succeeds and is removed when it fails.

    As `atomic`; the caller has made sure that a folder of that name may go. Raises NoRoomError.
    """
    path = Path(path)
    with (
        room(path),
        tempfile.TemporaryDirectory(".tmp", _beside(path), path.parent, ignore_cleanup_errors=True) as temporary,
    ):
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()  # within the private folder, it has the usual permissions
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise


def _beside(path: Path) -> str:
    """What temporary names of `path` begin with; removes what killed processes of this machine left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{path.name}.{platform.node()}-"
    for left in path.parent.iterdir():
        if left.name.startswith(mine) and abandoned(left):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return f"{mine}{os.getpid()}-"


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """Raises NoRoomError, which names `path`, where the block finds no room on the disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # HDF5 tells the system's error in the text only, and when it closes a file as a RuntimeError, which torch's is.
        told = re.search(r"errno = (\d+)", str(error))
        numbers = {getattr(error, "errno", None), getattr(error.__context__, "errno", None), told and int(told[1])}
        if numbers & set(NO_ROOM):
            raise NoRoomError(f"{path}: no room for it on the disk; free some and run again.") from None
        raise


def abandoned(path: Path) -> bool | None:
    """Whether the process that was writing a temporary file of `atomic` has ended; None where another machine's was."""
    pid = re.fullmatch(rf"\..+\.{re.escape(platform.node())}-(\d+)-[^-]*\.tmp", path.name)
    return not _runs(int(pid[1])) if pid else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _check_room(path: Path, size: int) -> None:
    """Raise OSError unless the system lets an empty file grow to `size` bytes: disk, quota and limits."""
    if size and hasattr(os, "posix_fallocate"):
        with open(path, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON atomically; NaN is refused, for no strict reader takes it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_csv(path: str | os.PathLike, columns: tuple[str, ...], rows: list) -> None:
    """Write a CSV with a header line atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def stamp(schema: str, settings: Mapping, inputs: Mapping[str, str]) -> dict[str, str]:
    """The four text attributes that a file carries (see the module's docstring)."""
    attributes = {
        "schema": schema,
        "settings": json.dumps(settings, sort_keys=True),
        "inputs": json.dumps(dict(inputs), sort_keys=True),
    }
    return {**attributes, "fingerprint": _digest(attributes)}


def _digest(attributes: Mapping[str, str]) -> str:
    """The fingerprint that belongs to the other attributes of a stamp."""
    stamped = {name: attributes.get(name) for name in ("schema", "settings", "inputs")}
    return hashlib.sha256(json.dumps(stamped, sort_keys=True).encode()).hexdigest()


def _new(path: Path, size: int) -> h5py.File:
    _check_room(path, size)
    made, access = (h5py.h5p.create(kind) for kind in (h5py.h5p.FILE_CREATE, h5py.h5p.FILE_ACCESS))
    made.set_obj_track_times(False)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)  # from here on structure has checksums
    access.set_sieve_buf_size(0)  # what the disk refuses shows as it is written: where HDF5 closes things, no error can
    return h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, made, access))


@contextlib.contextmanager
def create(
    path: str | os.PathLike,
    schema: str,
    settings: Mapping,
    inputs: Mapping[str, str],
    part: "Part | None" = None,
    size: int = 0,
) -> Iterator[h5py.File]:
    """A new HDF5 file with its attributes set, to be filled in the block; appears under `path` when complete.

    A shard says which `part` of the manifest it holds; else it has the attributes of the whole, fingerprint included.
    Raises NoRoomError, where `size` bytes do not fit before the block begins.
    """
    with atomic(path) as temporary, _new(temporary, size) as file:
        note(file, stamp(schema, settings, inputs))
        if part:
            note(file, {"rows": json.dumps([part.start, part.stop, part.total])})
        yield file
        _seal(file, schema)


def note(of: h5py.File | h5py.Dataset, attributes: Mapping[str, str]) -> None:
    """Set text attributes of a file or a dataset."""
    for name, text in sorted(attributes.items()):  # in the order in which `merge` finds them
        # Of a fixed length: others lie outside of what has checksums, and damage there can hang HDF5.
        of.attrs[name] = np.bytes_(text.encode())


def _noted(of: h5py.File | h5py.Dataset) -> dict[str, str]:
    return {name: value.decode() if isinstance(value, bytes) else str(value) for name, value in of.attrs.items()}


def _seal(file: h5py.File, schema: str) -> None:
    """Note the SHA-256 of each dataset, by which `read_arrays` finds damage."""
    for dataset in file.values() if schema not in UNSEALED else ():
        note(dataset, {"sha256": _sum(dataset)})


def _sum(array: h5py.Dataset | np.ndarray) -> str:
    """SHA-256 of the bytes of an array, which are read in parts."""
    digest, step = hashlib.sha256(), max(1, 2**24 // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        stop = min(start + step, len(array))
        rows = array[start:stop] if isinstance(array, h5py.Dataset) else read_past(array, start, stop)
        digest.update(rows.tobytes())
    return digest.hexdigest()


# Shards

Shard = tuple[int, int] | None  # number (from 1) and count; None: the whole, in a file of its own


@dataclass(frozen=True)
class Part:
    """The rows of a manifest of `total` rows that a shard holds."""

    start: int
    stop: int
    total: int

    @property
    def rows(self) -> range:
        """As a range."""
        return range(self.start, self.stop)


def part(total: int, shard: Shard) -> Part:
    """The rows of a shard; lengths differ by 1 at most."""
    number, count = shard or (1, 1)
    return Part(total * (number - 1) // count, total * number // count, total)


def tile(paths: Sequence[str | os.PathLike]) -> list[tuple[str, range]]:
    """The files that together hold every row of a manifest, and the rows of each, in their order.

    A whole file alone has no rows of its own: its range is empty. Raises InputError: shards of different runs, or rows
    that are missing or there twice.
    """
    first = attributes(paths[0])
    found: list[tuple[str, Part]] = []
    for path in map(str, paths):
        own = attributes(path)
        if own.get("fingerprint") != first.get("fingerprint"):
            raise InputError(f"{path}: is of another run or other settings than {paths[0]}; make it again.")
        if "rows" not in own:
            if len(paths) == 1:
                return [(path, range(0))]
            raise InputError(f"{path}: is no shard; name it alone, or only shards.")
        with _explained(path, "make it again"):
            found.append((path, Part(*json.loads(own["rows"]))))
    found.sort(key=lambda shard: (shard[1].start, shard[1].stop))
    end = 0
    for path, held in found:
        if held.start != end:
            what = "missing" if held.start > end else "there twice"
            raise InputError(f"{path}: rows {min(end, held.start)} to {max(end, held.start)} before it are {what}; "
                             f"name each shard once.")  # fmt: skip
        end = held.stop
    if end != found[-1][1].total:
        raise InputError(f"{path}: rows {end} to {found[-1][1].total} after it are missing; name every shard.")
    return [(path, held.rows) for path, held in found]


def merge(paths: Sequence[str | os.PathLike], output: str | os.PathLike) -> None:
    """Join shards into one file, equal to the one that a single run over all rows makes. Raises InputError."""
    shards = [path for path, _ in tile(paths)]
    whole = attributes(shards[0])
    schema = whole.get("schema", "")
    if schema not in LAYOUT:
        raise InputError(f"{shards[0]}: holds {schema or 'no schema'!r}, of which there are no shards to merge.")
    parts = [read_arrays(path, schema, shards=True) for path in shards]
    size = sum(array.nbytes for arrays in parts for array in arrays)
    with atomic(output) as temporary, _new(temporary, size) as file:
        note(file, {key: value for key, value in whole.items() if key != "rows"})
        for name, *arrays in zip(LAYOUT[schema], *parts, strict=True):
            offsets = name.endswith("_offsets")  # the first of a shard is the last of the one before it
            rows = sum(map(len, arrays)) - offsets * (len(arrays) - 1)
            joined = file.create_dataset(name, (rows, *arrays[0].shape[1:]), np.result_type(*arrays))
            start = end = 0
            for array in (read_past(array, 0, len(array)) for array in arrays):
                if offsets:
                    array = array[start > 0 :] + end
                    end = array[-1] if len(array) else end
                joined[start : start + len(array)] = array
                start += len(array)
        _seal(file, schema)


# Reading


@contextlib.contextmanager
def _explained(path: str | os.PathLike, remedy: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}.") from None
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        detail = " ".join(str(error).split())
        raise InputError(f"{path}: damaged or not such a file ({detail}); {remedy}.") from None


def _check_schema(path: str | os.PathLike, found: object, schema: str) -> None:
    if found != schema:
        raise InputError(f"{path}: holds {found or 'no schema'!r}, but {schema!r} is needed; make the file again.")


def attributes(path: str | os.PathLike) -> dict[str, str]:
    """The text attributes of an HDF5 or model file. Raises InputError."""
    with _explained(path, "make it again"):
        if str(path).endswith(".safetensors"):
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, "numpy") as model:
                    found = json.loads((model.metadata() or {}).get("orl", "{}"))
            except SafetensorError as error:
                raise ValueError(error) from None
        else:
            with h5py.File(path, "r") as file:
                found = _noted(file)
        if found.get("fingerprint", "") not in ("", _digest(found)):
            raise ValueError("its attributes do not belong together")
        return found


def fingerprint(path: str | os.PathLike) -> str:
    """Fingerprint of an artifact: its own attribute, or the SHA-256 of its bytes where it has none.

    Of a folder: of the names and bytes of the files in it, those of its folders left out.
    """
    if str(path).endswith((".h5", ".safetensors")):
        found = attributes(path).get("fingerprint")
        if found:
            return found
    if os.path.isdir(path):
        files = sorted(one for one in Path(path).iterdir() if one.is_file())
        named = [(one.name, fingerprint(one)) for one in files]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()
    with _explained(path, "make it first"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_arrays(
    path: str | os.PathLike, schema: str, shards: bool = False, names: Sequence[str] = ()
) -> list[np.ndarray]:
    """The datasets of a file, or those named, as read-only memory maps at their offsets in it. Raises InputError."""
    arrays: list[np.ndarray] = []
    with _explained(path, "make it again"), h5py.File(path, "r") as file:
        found = _noted(file)
        _check_schema(path, found.get("schema"), schema)
        if "rows" in found and not shards:
            raise InputError(f"{path}: is one shard; `orl merge` all of them, and name the file that this makes.")
        for name in names or LAYOUT[schema]:
            inside = isinstance(file.get(name, getlink=True), h5py.HardLink)  # and not another file's
            dataset = file[name] if inside else None
            if not isinstance(dataset, h5py.Dataset) or dataset.chunks or dataset.is_virtual or dataset.external:
                raise ValueError(f"{name} is not stored in one piece")
            if dataset.dtype.kind not in "iuf":
                raise ValueError(f"{name} is of {dataset.dtype}, not numbers")
            offset = dataset.id.get_offset()
            if dataset.size == 0:
                arrays.append(np.empty(dataset.shape, dataset.dtype))
                continue
            array = np.memmap(path, dataset.dtype, "r", offset, dataset.shape)
            sealed = _noted(dataset).get("sha256")
            if sealed and sealed != _sum(array):
                raise ValueError(f"the bytes of {name} are not those that were written")
            arrays.append(array)
    return arrays


def read_past(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows of an array that a file of this module was read as, from the file itself.

    Of a map, the system puts more than is asked for into this process's memory, and keeps it there.
    """
    if not isinstance(array, np.memmap):  # of no row
        return array[start:stop]
    width = array[:1].size
    offset = array.offset + start * width * array.itemsize
    found = np.fromfile(str(array.filename), array.dtype, (stop - start) * width, offset=offset)
    return found.reshape(stop - start, *array.shape[1:])


def check_rows(path: str | os.PathLike, found: int, expected: int, of: str) -> None:
    """Raise InputError unless a file has as many rows as `of` has."""
    if found != expected:
        raise InputError(f"{path}: has {found} rows, but {of} has {expected}; both must come from the same manifest.")


def check_input(path: str | os.PathLike, name: str, needed: str) -> None:
    """Raise InputError unless `path` was made from the `name` whose fingerprint is `needed`."""
    found = json.loads(attributes(path).get("inputs", "{}")).get(name)
    if found != needed:
        raise InputError(f"{path}: was made from another {name} than the one given; give that one or make it again.")


def check_last_line(path: str | os.PathLike) -> None:
    """Raise ValueError where the last line of a table is cut short: it may look whole."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 1))
        if file.read() not in (b"", b"\n"):
            raise ValueError("its last line is cut short")


# Manifest


@dataclass(frozen=True)
class Manifest:
    """The photos of a run, one row each; row i of every other file means row i here.

    `image_id`, `path` (relative to the root) and `part` are text arrays [N], `width`, `height` (pixels of the
    decoded photo) and `bytes` (of the file) int64 [N].
    """

    image_id: np.ndarray
    path: np.ndarray
    width: np.ndarray
    height: np.ndarray
    bytes: np.ndarray
    part: np.ndarray

    def __len__(self) -> int:
        return len(self.path)


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Read manifest.csv; ids stay text. Raises InputError."""
    with _explained(path, "make it with `orl manifest`"), open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != MANIFEST_COLUMNS:
            raise InputError(f"{path}: its columns are {header}, but {list(MANIFEST_COLUMNS)} are needed.")
        columns = list(zip(*reader, strict=True)) or [()] * len(MANIFEST_COLUMNS)
        text = {name: np.array(column, dtype=str) for name, column in zip(MANIFEST_COLUMNS, columns, strict=True)}
        check_last_line(path)
        numbers = {name: text[name].astype(np.int64) for name in ("width", "height", "bytes")}
        for name, column in numbers.items():
            if (column < 1).any():
                raise ValueError(f"a photo has {name} {column.min()}")
    if len(text["path"]) < 2:
        raise InputError(f"{path}: lists {len(text['path'])} photos; at least two are needed.")
    return Manifest(**{**text, **numbers})


# HDF5 of stage 2


@dataclass(frozen=True)
class Embeddings:
    """`embedding` float32 [N, D], unit rows."""

    embedding: np.ndarray


@dataclass(frozen=True)
class Neighbors:
    """`index` int32 [N, K] and `similarity` float32 [N, K]: best first, ties by lower index, never itself."""

    index: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True)
class Proposals:
    """`box` int16 or int32 [M, 4], x y w h in pixels; those of photo i are rows offsets[i] to offsets[i+1]."""

    box: np.ndarray
    box_offsets: np.ndarray


@dataclass(frozen=True)
class Rois:
    """`feature` float16 [M, D], unit rows, in the order of the boxes of proposals.h5."""

    feature: np.ndarray


@dataclass(frozen=True)
class Correspondences:
    """RoI pairs between each photo and each of its neighbours.

    `neighbor` int32 [N, K]; `pair` uint16 [P, 2]: number of the RoI in the photo and in the neighbour;
    `similarity` float16 [P]; the pairs of photo i and its k-th neighbour are rows offsets[i*K+k] to
    offsets[i*K+k+1], best first, ties by lower flat index.
    """

    neighbor: np.ndarray
    pair: np.ndarray
    similarity: np.ndarray
    pair_offsets: np.ndarray


@dataclass(frozen=True)
class Features:
    """Features of labelled photos by stage of the backbone (1 to 5), float32 [n, D]: training and test split."""

    train: dict[int, np.ndarray]
    test: dict[int, np.ndarray]


@dataclass(frozen=True)
class ClassFeatures:
    """Pooled features of a labelled set, float16 unit rows: `train` [n, D] and `val` [m, D]."""

    train: np.ndarray
    val: np.ndarray


EMBEDDINGS, NEIGHBORS, PROPOSALS = "orl.embeddings/1", "orl.neighbors/1", "orl.proposals/1"
ROIS, CORRESPONDENCES, MODEL = "orl.rois/1", "orl.correspondences/1", "orl.model/1"
FEATURES, CLASS_FEATURES = "orl.features/1", "orl.class_features/1"
UNSEALED = (ROIS,)  # for COCO 21 GB, of which no reader wants the whole
LAYOUT = {
    EMBEDDINGS: ("embedding",),
    NEIGHBORS: ("index", "similarity"),
    PROPOSALS: ("box", "box_offsets"),
    ROIS: ("feature",),
    CORRESPONDENCES: ("neighbor", "pair", "similarity", "pair_offsets"),
    CLASS_FEATURES: ("train", "val"),
}


def read_embeddings(path: str | os.PathLike) -> Embeddings:
    """Read embeddings.h5. Raises InputError."""
    return Embeddings(*read_arrays(path, EMBEDDINGS))


def read_neighbors(path: str | os.PathLike) -> Neighbors:
    """Read neighbors.h5. Raises InputError."""
    found = Neighbors(*read_arrays(path, NEIGHBORS))
    _check_photos(path, found.index)
    return found


def read_proposals(path: str | os.PathLike) -> Proposals:
    """Read proposals.h5. Raises InputError."""
    found = Proposals(*read_arrays(path, PROPOSALS))
    _check_offsets(path, found.box_offsets, len(found.box))
    return found


def read_rois(path: str | os.PathLike) -> Rois:
    """Read rois.h5, or a shard of it. Raises InputError."""
    return Rois(*read_arrays(path, ROIS, shards=True))


def read_correspondences(path: str | os.PathLike) -> Correspondences:
    """Read correspondences.h5. Raises InputError."""
    found = Correspondences(*read_arrays(path, CORRESPONDENCES))
    _check_photos(path, found.neighbor)
    check_rows(path, len(found.pair_offsets) - 1, found.neighbor.size, "its list of neighbours")
    _check_offsets(path, found.pair_offsets, len(found.pair))
    return found


def _check_photos(path: str | os.PathLike, index: np.ndarray) -> None:
    """Raise InputError unless an index [N, K] names photos, rows of itself."""
    if index.size and not 0 <= index.min() <= index.max() < len(index):
        raise InputError(f"{path}: damaged (it names photos that are not there); make it again.")


def _check_offsets(path: str | os.PathLike, offsets: np.ndarray, rows: int) -> None:
    """Raise InputError unless offsets [n + 1] cut so many rows into parts."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any():
        raise InputError(f"{path}: damaged (its offsets do not fit its rows); make it again.")


def read_boxes(manifest_path: str | os.PathLike, proposals_path: str | os.PathLike) -> tuple[Manifest, Proposals]:
    """Read a manifest and proposals of its photos. Raises InputError where they do not belong together."""
    manifest, proposals = read_manifest(manifest_path), read_proposals(proposals_path)
    check_rows(proposals_path, len(proposals.box_offsets) - 1, len(manifest), os.fspath(manifest_path))
    check_input(proposals_path, "manifest", fingerprint(manifest_path))
    sizes = np.stack([manifest.width, manifest.height], 1)
    for rows, start, end in _blocks(proposals.box_offsets, 1):
        of = np.diff(proposals.box_offsets[rows.start : rows.stop + 1])
        low, side = np.split(read_past(proposals.box, start, end).astype(np.int64), 2, axis=1)
        if not ((low >= 0) & (side > 0) & (low + side <= np.repeat(sizes[rows.start : rows.stop], of, axis=0))).all():
            raise InputError(f"{proposals_path}: holds boxes outside their photos; make it again.")
    return manifest, proposals


def _blocks(offsets: np.ndarray, lists: int) -> Iterator[tuple[range, int, int]]:
    """Ranges of photos, each with `lists` parts that `offsets` cut, and the first and last row of them all."""
    count = (len(offsets) - 1) // lists
    for start in range(0, count, BLOCK):
        rows = range(start, min(start + BLOCK, count))
        yield rows, int(offsets[rows.start * lists]), int(offsets[rows.stop * lists])


def read_stage2(
    manifest_path: str | os.PathLike, proposals_path: str | os.PathLike, correspondences_path: str | os.PathLike
) -> tuple[Manifest, Proposals, Correspondences]:
    """Read three files that belong together. Raises InputError where they do not."""
    manifest, proposals = read_boxes(manifest_path, proposals_path)
    found = read_correspondences(correspondences_path)
    check_rows(correspondences_path, len(found.neighbor), len(manifest), os.fspath(manifest_path))
    check_input(correspondences_path, "proposals", fingerprint(proposals_path))
    boxes, k = np.diff(proposals.box_offsets), found.neighbor.shape[1]
    for rows, start, end in _blocks(found.pair_offsets, k):
        neighbor = np.asarray(found.neighbor[rows.start : rows.stop])
        most = np.stack([np.repeat(boxes[rows.start : rows.stop], k), boxes[neighbor.ravel()]], 1)
        of = np.diff(found.pair_offsets[rows.start * k : rows.stop * k + 1])
        if (read_past(found.pair, start, end) >= np.repeat(most, of, axis=0)).any():
            raise InputError(f"{correspondences_path}: damaged (it pairs boxes that are not there); make it again.")
    return manifest, proposals, found


def read_features(path: str | os.PathLike, stages: Sequence[int]) -> Features:
    """Read features of labelled photos, of these stages. Raises InputError, where one is missing, too."""
    splits = [
        dict(zip(stages, read_arrays(path, FEATURES, names=[f"{split}_{stage}" for stage in stages]), strict=True))
        for split in ("train", "test")
    ]
    return Features(*splits)


def read_class_features(path: str | os.PathLike) -> ClassFeatures:
    """Read features of a labelled set. Raises InputError."""
    return ClassFeatures(*read_arrays(path, CLASS_FEATURES))


# Weights


def write_weights(path: str | os.PathLike, tensors: Mapping[str, Any], attrs: Mapping[str, str]) -> None:
    """Write torch tensors as safetensors atomically, with `attrs` (see `stamp`) as metadata."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry only: safetensors writes several in an order that changes from call to call.
    attrs = {**attrs, "sha256": _hash(contiguous)}
    content = save(contiguous, metadata={"orl": json.dumps(attrs, sort_keys=True)})
    with atomic(path) as temporary:
        temporary.write_bytes(content)  # not by safetensors: its error on a full disk is not the system's


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """The torch tensors (CPU) of a safetensors file. Raises InputError."""
    attrs = attributes(path)
    _check_schema(path, attrs.get("schema"), MODEL)
    from safetensors.torch import load_file

    tensors = load_file(path)
    if attrs.get("sha256", "") not in ("", _hash(tensors)):
        raise InputError(f"{path}: damaged (its weights are not those that were written); make it again.")
    return tensors


def _hash(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of torch tensors, their names and shapes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """A downstream result: keys task, model, metrics, settings, data. Raises InputError."""
    with _explained(path, "evaluate again"), open(path, encoding="utf-8") as file:
        found = json.load(file)
        if not isinstance(found, dict) or not {"task", "model", "metrics", "settings", "data"} <= set(found):
            raise InputError(f"{path}: is no result of `orl evaluate`; evaluate again.")
        return found
