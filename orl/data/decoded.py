"""What was decoded for a manifest so far, kept beside it in MANIFEST.state, so that the next run goes on from there.

Each photo adds a line: the CRC-32 of what follows as 8 hexadecimal digits, a space, and a JSON array of result version,
EXIF setting, path, width, height, bytes and time of modification in ns. A line that is torn, spoilt or of other
settings says nothing: whatever a killed process, a full disk or a second run leaves does no harm.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from orl import artifacts
from orl.config import RESULT_VERSION

Seen = tuple[int, int, int, int]  # width, height, bytes, time of modification in ns: the last two tell if it changed
TOGETHER = 1000  # photos that a thread asks about at a time


def beside(output: str | os.PathLike) -> Path:
    """The file that goes with a manifest."""
    return Path(f"{os.fspath(output)}.state")


def unchanged(state: Path, exif: str, root: str | os.PathLike, paths: Iterable[str], threads: int) -> dict[str, Seen]:
    """What is kept of those of `paths` (relative to `root`) that have the size and time with which they were decoded.

    A photo that was replaced by another of equal size and time is not noticed. Raises OSError.
    """
    kept = _read(state, exif) if state.exists() else {}
    names = [path for path in paths if path in kept]
    marks = identities(root, names, threads)
    return {path: kept[path] for path, mark in zip(names, marks, strict=True) if kept[path][2:] == mark}


def _read(state: Path, exif: str) -> dict[str, Seen]:
    """By path, what the lines of these settings say."""
    kept = {}
    with open(state, "rb") as file:
        for line in file:
            check, _, text = line.rstrip(b"\n").partition(b" ")
            if check == b"%08x" % zlib.crc32(text):
                version, of_exif, path, *seen = json.loads(text)
                if (version, of_exif) == (RESULT_VERSION["manifest"], exif):
                    kept[path] = tuple(seen)
    return kept


def keep(state: Path, exif: str, found: Iterable[tuple[str, Seen | str]]) -> Iterator[tuple[str, Seen | str]]:
    """Yield the paths with what was found, having appended those that were decoded. Raises NoRoomError.

    Rejected files are not kept: what was in the way may be mended without a trace in size or time.
    """
    file = None
    with artifacts.room(state):
        try:
            for path, seen in found:
                if not isinstance(seen, str):
                    if file is None:
                        state.parent.mkdir(parents=True, exist_ok=True)
                        file = open(state, "ab")  # noqa: SIM115 - not before there is something to write
                        file.write(b"\n" if file.tell() else b"")  # ends a torn line
                    text = json.dumps([RESULT_VERSION["manifest"], exif, path, *seen]).encode()
                    file.write(b"%08x %b\n" % (zlib.crc32(text), text))
                    file.flush()
                yield path, seen
        finally:
            if file:
                file.close()


def identity(path: str | os.PathLike) -> tuple[int, int]:
    """Size in bytes and time of the last modification in ns; (-1, 0) of what is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return -1, 0
    return status.st_size, status.st_mtime_ns


def identities(root: str | os.PathLike, paths: list[str], threads: int) -> list[tuple[int, int]]:
    """`identity` of each of some paths relative to `root`."""
    parts = [paths[start : start + TOGETHER] for start in range(0, len(paths), TOGETHER)]
    with ThreadPoolExecutor(max(8, threads)) as pool:  # they wait for the disk, maybe a distant one
        return [one for part in pool.map(partial(_identities, root), parts) for one in part]


def _identities(root: str | os.PathLike, paths: list[str]) -> list[tuple[int, int]]:
    return [identity(os.path.join(root, path)) for path in paths]
