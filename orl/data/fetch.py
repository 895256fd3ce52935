"""Downloads VOC2007 and COCO 2017: resumed where they broke off, checked, and unpacked complete or not at all."""

import contextlib
import fcntl
import filecmp
import hashlib
import http.client
import json
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BufferedRandom
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from orl import InputError, NoRoomError, __version__
from orl.artifacts import NO_ROOM, write_json
from orl.progress import track

TIMEOUT = 60.0  # seconds without a byte
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt that brings nothing new
MB = 10**6
VOC = "VOCdevkit/VOC2007"
SETS = f"{VOC}/ImageSets/Main"


@dataclass(frozen=True)
class Archive:
    """A file to download and what it holds."""

    path: str  # below the base address
    checksum: str  # algorithm:hexadecimal
    folder: str  # the one at its top
    holds: Mapping[str, int]  # pattern below the root -> files that match, at least
    lists: Mapping[str, int] = field(default_factory=dict)  # list of VOC photos -> photos in it
    growth: float = 1.1  # size unpacked / size packed, at most

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def is_in(self, root: Path) -> bool:
        """Whether all it holds is below `root`, whoever put it there. Contents are not looked at."""
        if any(sum(1 for _ in root.glob(pattern)) < count for pattern, count in self.holds.items()):
            return False
        for path, count in self.lists.items():
            photos = {f"{name}.jpg" for name in (root / path).read_text().split()}
            if len(photos) != count or not photos <= set(os.listdir(root / VOC / "JPEGImages")):
                return False
        return True


def _voc(name: str, md5: str, split: str, photos: int, *parts: str) -> Archive:
    listed = f"{SETS}/{split}.txt"
    holds = {f"{SETS}/*_{part}.txt": 20 for part in (split, *parts)}  # one list per class
    holds |= {listed: 1, f"{VOC}/JPEGImages/*.jpg": photos}
    return Archive(name, f"md5:{md5}", "VOCdevkit", holds, {listed: photos})


def _photos(part: str, checksum: str, count: int) -> Archive:
    return Archive(f"zips/{part}.zip", checksum, part, {f"{part}/*.jpg": count})


def _annotations(name: str, checksum: str, *files: str) -> Archive:
    holds = {f"annotations/{file}2017.json": 1 for file in files}
    return Archive(f"annotations/{name}.zip", checksum, "annotations", holds, growth=6)


# The address of VOC that its administrator names in github.com/pytorch/vision/pull/9216; the old one leads there.
BASE = {"voc2007": "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007", "coco": "http://images.cocodataset.org"}
# Checksums: VOC as in torchvision (datasets/voc.py); COCO's SHA-256 as in TensorFlow Datasets (url_checksums/coco.txt),
# which has none for the unlabelled photos: theirs are MD5s that torchcocotools lists.
ARCHIVES = {
    "voc2007": {
        "trainval": _voc("VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64",
                         "trainval", 5011, "train", "val"),
        "test": _voc("VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f", "test", 4952),
    },
    "coco": {
        "train2017": _photos(
            "train2017", "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", 118287),
        "val2017": _photos(
            "val2017", "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", 5000),
        "annotations": _annotations(
            "annotations_trainval2017", "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
            "instances_train", "instances_val", "captions_train", "captions_val",
            "person_keypoints_train", "person_keypoints_val"),
        "unlabeled2017": _photos("unlabeled2017", "md5:7ebc562819fdb32847aab79530457326", 123403),
        "image_info_unlabeled": _annotations(
            "image_info_unlabeled2017", "md5:ede38355d5c3e5251bb7f8b68e2c068f", "image_info_unlabeled"),
    },
}  # fmt: skip
DEFAULT = {"voc2007": ("trainval", "test"), "coco": ("train2017", "val2017", "annotations")}


def fetch(
    what: Literal["voc2007", "coco"],
    root: str | os.PathLike,
    parts: Sequence[str] | None = None,
    base: str | None = None,
) -> None:
    """Put VOC2007 or COCO 2017 below `root`: VOCdevkit/VOC2007, or train2017, val2017 and annotations.

    `parts`: keys of `ARCHIVES[what]`; not given: those of `DEFAULT`. COCO's unlabelled photos (20 GB) are named or not
    fetched. `base`: another address for the official one, with the same files below it.
    A part that is there, by the number and the names of its files, is left alone. Else its archive is downloaded to
    a hidden file in `root` (a run that was stopped goes on where it was), its checksum compared, and its content
    moved into place when all of it is unpacked: a folder that is not there yet by one rename, into one that is there
    file by file, VOC's image sets last. No file that is there is replaced.
    Raises InputError (names, network, checksum, files in the way, another process at the same part), NoRoomError.
    """
    if what not in ARCHIVES:
        raise InputError(f"{what!r} is not known; name one of {', '.join(ARCHIVES)}.")
    parts = DEFAULT[what] if parts is None else parts
    for name in parts:
        if name not in ARCHIVES[what]:
            raise InputError(f"{what}: has no part {name!r}; name some of {', '.join(ARCHIVES[what])}.")
    for name in parts:
        archive = ARCHIVES[what][name]
        _fetch(archive, Path(root), f"{(base or BASE[what]).rstrip('/')}/{archive.path}")


def _fetch(archive: Archive, root: Path, url: str) -> None:
    part, note, folder = (root / f".{archive.name}.{end}" for end in ("part", "json", "unpacked"))
    if archive.is_in(root) and not part.exists():
        print(f"{archive.name}: its content is in {root} already", file=sys.stderr, flush=True)
        return
    with _room(root), _locked(part) as file:
        try:
            if not archive.is_in(root):
                _download(url, file, note, archive.growth)
                print(f"{archive.name}: comparing its checksum", file=sys.stderr, flush=True)
                if not _is(file, archive.checksum):
                    file.truncate(0)
                    raise InputError(f"{url}: what arrived was deleted, for its checksum is not {archive.checksum}; "
                                     f"run again or give another base address.")  # fmt: skip
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
                _unpack(file, archive.name, folder)
                _check_clear(folder / archive.folder, root / archive.folder)
                _move(folder / archive.folder, root / archive.folder)
            file.truncate(0)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.getsize(part):
                note.unlink(missing_ok=True)
                part.unlink()


@contextlib.contextmanager
def _room(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise NoRoomError(f"{root}: the disk is full; free some and run again to go on.") from None
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BufferedRandom]:
    """The file, made where there is none, for this process alone; the kernel lets go when it ends, however."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a folder that can.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            mine = False
        if not mine:  # or another process has just deleted it
            raise InputError(f"{path}: another process is at it; wait for it or stop it.")
        yield file


def _is(file: BufferedRandom, checksum: str) -> bool:
    algorithm, _, expected = checksum.partition(":")
    file.seek(0)
    return hashlib.file_digest(file, algorithm).hexdigest() == expected


# Downloading


def _known(note: Path) -> dict:
    """What an earlier answer said of the file: `size` (bytes) and `validator` (for If-Range, or null)."""
    return json.loads(note.read_text()) if note.exists() else {}


def _download(url: str, file: BufferedRandom, note: Path, growth: float) -> None:
    """Append to `file` what is missing of it, in as many attempts as bring something new."""
    best = failures = 0
    while file.seek(0, os.SEEK_END) != _known(note).get("size"):
        try:
            _receive(url, file, note, growth)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, NoRoomError) or getattr(error, "errno", None) in NO_ROOM:
                raise
            if isinstance(error, urllib.error.HTTPError):
                if error.code == 416:  # less than what is there: another file
                    file.truncate(0)
                elif error.code < 500 and error.code not in (408, 429):
                    raise InputError(f"{url}: cannot be downloaded ({error}); give another base address.") from None
            size = file.seek(0, os.SEEK_END)
            failures = failures + 1 if size <= best else 1
            best = max(best, size)
            reason = " ".join(str(error).split())
            if failures > len(PAUSES):
                raise InputError(f"{url}: cannot be downloaded ({reason}); run again later, it will go on.") from None
            print(f"{url}: {reason}, trying again", file=sys.stderr, flush=True)
            time.sleep(PAUSES[failures - 1])


def _receive(url: str, file: BufferedRandom, note: Path, growth: float) -> None:
    """One attempt, from the end of `file` on where the server has still the same and can, else from the start."""
    start, known = file.seek(0, os.SEEK_END), _known(note)
    headers = {"User-Agent": f"orl/{__version__}"}
    if start and known:
        headers["Range"] = f"bytes={start}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status == 206:
            size = known.get("size", 0)
            if response.headers["Content-Range"] != f"bytes {start}-{size - 1}/{size}":
                file.truncate(0)
                raise ConnectionError("the server resumed another file")
        else:
            if not response.headers["Content-Length"]:
                raise InputError(f"{url}: the server does not tell the size; give another base address.")
            start, size = 0, int(response.headers["Content-Length"])
            tag = response.headers["ETag"]
            validator = tag if tag and not tag.startswith("W/") else response.headers["Last-Modified"]
            file.truncate(0)  # before the note, which must not describe the bytes of another file
            write_json(note, {"size": size, "validator": validator})
        needed, free = size - start + growth * size, shutil.disk_usage(note.parent).free
        if free < needed:
            raise NoRoomError(f"{note.parent}: {free / MB:.0f} MB are free, but to download and unpack "
                              f"{url} takes {needed / MB:.0f}; free some, or name another folder.")  # fmt: skip
        label = f"downloading {url.rpartition('/')[2]}, MB"
        for piece in track(iter(partial(response.read, MB), b""), -(-(size - start) // MB), label):
            file.write(piece)
    if file.seek(0, os.SEEK_END) < size:
        raise ConnectionError("the connection ended early")


# Unpacking


class Entry(NamedTuple):
    """A file or folder of an archive; `plain`: neither link nor device."""

    name: str
    is_folder: bool
    plain: bool
    open: Callable[[], IO[bytes] | None]


def _entries(archive: zipfile.ZipFile | tarfile.TarFile) -> Iterator[Entry]:
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
            plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
            yield Entry(info.filename, info.is_dir(), plain, partial(archive.open, info))
    else:
        for member in archive:
            plain = member.isfile() or member.isdir() or member.islnk()  # what is linked hard is read as a file
            yield Entry(member.name, member.isdir(), plain, partial(archive.extractfile, member))


def _unpack(file: BufferedRandom, name: str, folder: Path) -> None:
    """Write an archive's files into `folder`, which is made, nothing outside of it, and no links or devices."""
    file.seek(0)
    try:
        with zipfile.ZipFile(file) if name.endswith(".zip") else tarfile.open(fileobj=file, mode="r:") as archive:
            entries = list(_entries(archive))
            for entry in entries:
                path = PurePosixPath(entry.name)
                if not entry.plain or path.is_absolute() or ".." in path.parts:
                    raise InputError(f"{name}: {entry.name!r} in it leads out of its folder, or is a link or a device; "
                                     f"do not use this archive.")  # fmt: skip
            for entry in track(entries, len(entries), f"unpacking {name}"):
                target = folder / entry.name
                (target if entry.is_folder else target.parent).mkdir(parents=True, exist_ok=True)
                if not entry.is_folder:
                    with entry.open() as source, open(target, "wb") as copy:  # type: ignore[union-attr]
                        shutil.copyfileobj(source, copy)
    except (zipfile.BadZipFile, tarfile.TarError, KeyError) as error:  # KeyError: a link to what is not in it
        raise InputError(f"{name}: cannot be unpacked ({' '.join(str(error).split())}); do not use it.") from None


def _check_clear(source: Path, target: Path) -> None:
    """Raise InputError if a file would take the place of another one."""
    if source.is_dir() and target.is_dir() and not target.is_symlink():
        for child in source.iterdir():
            _check_clear(child, target / child.name)
    elif os.path.lexists(target) and not (
        source.is_file() and target.is_file() and filecmp.cmp(source, target, shallow=False)
    ):
        raise InputError(f"{target}: is there, but is not the archive's; move it away and run again.")


def _move(source: Path, target: Path) -> None:
    """Rename a folder or file into place; what `target` has of it stays."""
    if source.is_dir() and target.is_dir() and any(target.iterdir()):
        # Image sets last: who finds a list finds its photos.
        for child in sorted(source.iterdir(), key=lambda path: (path.name in ("ImageSets", "Main"), path.name)):
            _move(child, target / child.name)
    elif not target.is_file():
        source.rename(target)
