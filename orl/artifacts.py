"""The files that stages hand to each other: the only place that knows their layout.

Every file is written under a temporary name and renamed when complete. HDF5 and model files carry `schema`,
`settings` (JSON), `inputs` (JSON: fingerprints of what they were made from) and `fingerprint`, the hash of the
three: no clock and no host, so equal runs make equal files.
"""

import contextlib
import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from orl import InputError

MANIFEST_COLUMNS = ("image_id", "path", "width", "height", "bytes", "part")
REJECTED_COLUMNS = ("path", "reason")


# Writing


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block succeeds and is removed when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private; the result follows the user's umask
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    digest = hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()
    return {**attributes, "fingerprint": digest}


@contextlib.contextmanager
def create(path: str | os.PathLike, schema: str, settings: Mapping, inputs: Mapping[str, str]) -> Iterator[h5py.File]:
    """A new HDF5 file with its attributes set, to be filled in the block; appears under `path` when complete."""
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(stamp(schema, settings, inputs))
        yield file


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
                    return json.loads((model.metadata() or {}).get("orl", "{}"))
            except SafetensorError as error:
                raise ValueError(error) from None
        with h5py.File(path, "r") as file:
            return dict(file.attrs)


def fingerprint(path: str | os.PathLike) -> str:
    """Fingerprint of an artifact: its own attribute, or the SHA-256 of its bytes where it has none."""
    if str(path).endswith((".h5", ".safetensors")):
        found = attributes(path).get("fingerprint")
        if found:
            return found
    with _explained(path, "make it first"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: str | os.PathLike, schema: str, names: tuple[str, ...]) -> list[np.ndarray]:
    """The named datasets as read-only memory maps at their offsets in the file. Raises InputError."""
    arrays: list[np.ndarray] = []
    with _explained(path, "make it again"), h5py.File(path, "r") as file:
        _check_schema(path, file.attrs.get("schema"), schema)
        for name in names:
            dataset = file[name]
            if not isinstance(dataset, h5py.Dataset) or dataset.chunks or dataset.is_virtual or dataset.external:
                raise ValueError(f"{name} is not stored in one piece")
            offset = dataset.id.get_offset()
            if dataset.size == 0:
                arrays.append(np.empty(dataset.shape, dataset.dtype))
            else:
                arrays.append(np.memmap(path, dataset.dtype, "r", offset, dataset.shape))
    return arrays


def check_rows(path: str | os.PathLike, found: int, expected: int, of: str) -> None:
    """Raise InputError unless a file has as many rows as `of` has."""
    if found != expected:
        raise InputError(f"{path}: has {found} rows, but {of} has {expected}; both must come from the same manifest.")


def check_input(path: str | os.PathLike, name: str, needed: str) -> None:
    """Raise InputError unless `path` was made from the `name` whose fingerprint is `needed`."""
    found = json.loads(attributes(path).get("inputs", "{}")).get(name)
    if found != needed:
        raise InputError(f"{path}: was made from another {name} than the one given; make it again.")


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
        numbers = {name: text[name].astype(np.int64) for name in ("width", "height", "bytes")}
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


EMBEDDINGS, NEIGHBORS, PROPOSALS = "orl.embeddings/1", "orl.neighbors/1", "orl.proposals/1"
ROIS, CORRESPONDENCES, MODEL = "orl.rois/1", "orl.correspondences/1", "orl.model/1"


def read_embeddings(path: str | os.PathLike) -> Embeddings:
    """Read embeddings.h5. Raises InputError."""
    return Embeddings(*_read(path, EMBEDDINGS, ("embedding",)))


def read_neighbors(path: str | os.PathLike) -> Neighbors:
    """Read neighbors.h5. Raises InputError."""
    return Neighbors(*_read(path, NEIGHBORS, ("index", "similarity")))


def read_proposals(path: str | os.PathLike) -> Proposals:
    """Read proposals.h5. Raises InputError."""
    return Proposals(*_read(path, PROPOSALS, ("box", "box_offsets")))


def read_rois(path: str | os.PathLike) -> Rois:
    """Read rois.h5. Raises InputError."""
    return Rois(*_read(path, ROIS, ("feature",)))


def read_correspondences(path: str | os.PathLike) -> Correspondences:
    """Read correspondences.h5. Raises InputError."""
    return Correspondences(*_read(path, CORRESPONDENCES, ("neighbor", "pair", "similarity", "pair_offsets")))


# Weights


def write_weights(path: str | os.PathLike, tensors: Mapping[str, Any], attrs: Mapping[str, str]) -> None:
    """Write torch tensors as safetensors atomically, with `attrs` (see `stamp`) as metadata."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        # One entry only: safetensors writes several in an order that changes from call to call.
        save_file(contiguous, temporary, metadata={"orl": json.dumps(dict(attrs), sort_keys=True)})


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """The torch tensors (CPU) of a safetensors file. Raises InputError."""
    _check_schema(path, attributes(path).get("schema"), MODEL)
    from safetensors.torch import load_file

    return load_file(path)


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """A downstream result: keys task, model, metrics, settings, data. Raises InputError."""
    with _explained(path, "evaluate again"), open(path, encoding="utf-8") as file:
        found = json.load(file)
        if not isinstance(found, dict) or not {"task", "model", "metrics", "settings", "data"} <= set(found):
            raise InputError(f"{path}: is no result of `orl evaluate`; evaluate again.")
        return found
