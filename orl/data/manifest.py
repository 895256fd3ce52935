"""The manifest: every photo decoded once, listed with its size, or rejected with the reason."""

import os
import sys
from functools import partial

from orl import InputError, artifacts, progress
from orl.config import Config, Data
from orl.data import coco, decode, decoded, folder
from orl.workers import ordered

CHUNK = 32  # photos that a worker takes at a time, at most


def build(
    config: Config,
    root: str | os.PathLike,
    output: str | os.PathLike,
    rejected: str | os.PathLike,
    workers: int,
) -> None:
    """Decode every photo under `root` in `workers` processes and write the manifest and the list of rejected files.

    Rows are in the order of the listing (`coco.list_photos`, `folder.list_photos`), whatever the workers; `width`
    and `height` are those of the decoded photo, EXIF applied where `config.data.exif` says so. What is decoded is kept
    beside `output` at once (see `decoded`), and taken over by later runs. Raises InputError, having written nothing
    else, unless at least two photos can be decoded.
    """
    photos, exif, state = _list(config.data, root), config.data.exif, decoded.beside(output)
    seen: dict[str, decoded.Seen | str] = {}
    seen.update(decoded.unchanged(state, exif, root, (photo.path for photo in photos), workers))
    if seen:
        print(f"{len(seen)} photos taken over, unchanged since they were decoded ({state})", file=sys.stderr)
    left = [photo.path for photo in photos if photo.path not in seen]
    chunk = max(1, min(CHUNK, len(left) // (4 * workers)))
    found = ordered(partial(inspect, root, exif), left, min(workers, len(left)), chunk)
    results = progress.track(found, len(left), "decoding")
    seen.update(decoded.keep(state, exif, zip(left, results, strict=True)))
    rows: list[tuple] = []
    refused: list[tuple[str, str]] = []
    for photo in photos:
        result = seen[photo.path]
        if isinstance(result, str):
            refused.append((shown(photo.path), result))
        else:
            rows.append((photo.image_id, photo.path, *result[:3], photo.part))
    if not rows:
        path, reason = refused[0]
        raise InputError(f"{root}: no photo can be decoded ({path}: {reason}); name a folder of JPEG, PNG or WebP.")
    if len(rows) == 1:
        only = rows[0][1]
        raise InputError(f"{root}: only one photo can be decoded ({only}), but neighbours need two; add photos.")
    artifacts.write_csv(rejected, artifacts.REJECTED_COLUMNS, refused)
    artifacts.write_csv(output, artifacts.MANIFEST_COLUMNS, rows)
    note = f"{len(refused)} rejected (see {os.fspath(rejected)})" if refused else "none rejected"
    print(f"{len(rows)} photos, {note}", file=sys.stderr)


def load(
    root: str | os.PathLike, manifest: artifacts.Manifest, row: int, exif: decode.Exif, reduce: int = 1
) -> decode.Photo:
    """Decode the photo of one row: uint8 [height, width, 3], RGB; with `reduce`, smaller where `decode` can.

    Raises InputError naming the file: it is missing or damaged, or its size in bytes or pixels is not the manifest's.
    """
    path = os.path.join(root, str(manifest.path[row]))
    changed = f"{path}: photo changed since the manifest was made; run manifest again."
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise InputError(f"{path}: photo is gone ({error.strerror}); bring it back or run manifest again.") from None
    if size != manifest.bytes[row]:
        raise InputError(changed)
    image = decode.decode(path, exif, reduce)
    whole = int(manifest.height[row]), int(manifest.width[row])
    if image.shape[:2] not in (whole, (-(-whole[0] // reduce), -(-whole[1] // reduce))):
        raise InputError(changed)
    return image


def _list(data: Data, root: str | os.PathLike) -> list[folder.Photo]:
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; set data.root to the folder of the photos.")
    if data.layout == "folder":
        photos = folder.list_photos(root)
    elif data.layout == "scenes":
        photos = coco.list_photos(root, ["train2017"], {"train2017": "annotations/instances_train2017.json"})
    else:
        photos = coco.list_photos(root, data.folders, data.annotations)
    if not photos:
        raise InputError(f"{root}: no files in this folder; set data.root to the folder of the photos.")
    return photos


def inspect(root: str | os.PathLike, exif: decode.Exif, path: str) -> decoded.Seen | str:
    """Width, height, size in bytes and time of modification in ns of a photo, or why it is rejected."""
    fault = _name_fault(path)
    if fault:
        return fault
    whole = os.path.join(root, path)
    before = decoded.identity(whole)  # so that what is written meanwhile counts as changed
    try:
        height, width, _ = decode.decode(whole, exif).shape
        return width, height, *before
    except decode.UndecodableError as error:
        return error.reason


def _name_fault(path: str) -> str | None:
    """Why a path cannot stand in the manifest, if so."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "name is not valid UTF-8; rename it"
    # csv writes a lone carriage return unquoted (Python < 3.13) and then reads it as the end of the line.
    return "carriage return in the name; rename it" if "\r" in path else None


def shown(path: str) -> str:
    """A path as it can stand in a CSV."""
    return path.encode(errors="backslashreplace").decode().replace("\r", "\\r")
