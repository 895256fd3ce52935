import fcntl
import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from orl import InputError, NoRoomError
from orl.data import fetch

PHOTOS = {f"train2017/{number}.jpg": hashlib.shake_256(b"%d" % number).digest(2000) for number in range(3)}
CLASSES = [f"class{number}" for number in range(20)]


def zipped(files: dict[str, bytes], *odd: zipfile.ZipInfo) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in [*files.items(), *((info, b"/etc/passwd") for info in odd)]:
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], *odd: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in odd:
            archive.addfile(info)
    return buffer.getvalue()


def voc(split: str, photos: range) -> dict[str, bytes]:
    lists = {f"{name}_{split}": "".join(f"{photo:06d} -1\n" for photo in photos) for name in CLASSES}
    lists[split] = "".join(f"{photo:06d}\n" for photo in photos)
    files = {f"{fetch.SETS}/{name}.txt": text.encode() for name, text in lists.items()}
    return files | {f"{fetch.VOC}/JPEGImages/{photo:06d}.jpg": b"photo %d" % photo for photo in photos}


def tree(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server.told
        wanted, condition = self.headers["Range"], self.headers["If-Range"]
        content = server.files.get(self.path)
        server.log.append(SimpleNamespace(path=self.path, range=wanted, condition=condition, sent=0))
        errors = server.errors.pop(0) if server.errors else None
        if errors or content is None:
            self.send_error(errors or 404)
            return
        start = 0
        if wanted and server.ranges and condition in (None, server.tag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start : start + server.cut.pop(0)] if server.cut else content[start:]
        self.wfile.write(body)
        server.log[-1].sent = len(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """What a server on this machine has (`files`), how it behaves, and what it was asked for (`log`)."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(fetch, "PAUSES", (0.0, 0.0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        told = SimpleNamespace(files={}, log=[], ranges=True, tag='"1"', length=True, cut=[], errors=[])
        http.told, told.base = told, f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=partial(http.serve_forever, 0.01))
        thread.start()
        yield told
        http.shutdown()
        thread.join()


@pytest.fixture
def coco(server, monkeypatch):
    """Offer an archive as train2017, by default a good one; returns how to fetch it below a root."""

    def offer(content: bytes = zipped(PHOTOS), name: str = "train2017.zip"):
        server.files[f"/zips/{name}"] = content
        checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
        archive = fetch.Archive(f"zips/{name}", checksum, "train2017", {"train2017/*.jpg": len(PHOTOS)})
        monkeypatch.setitem(fetch.ARCHIVES, "coco", {"train2017": archive})
        return partial(fetch.fetch, "coco", parts=["train2017"], base=server.base + "/")

    return offer


@pytest.fixture
def devkit(server, monkeypatch):
    """Offer VOC's two archives, of 6 and 4 photos; returns how to fetch them below a root."""
    made = {}
    for name, split, photos in (("trainval", "trainval", range(6)), ("test", "test", range(6, 10))):
        content = tarred(voc(split, photos))
        server.files[f"/{name}.tar"] = content
        made[name] = fetch._voc(f"{name}.tar", hashlib.md5(content).hexdigest(), split, len(photos))
    monkeypatch.setitem(fetch.ARCHIVES, "voc2007", made)
    return partial(fetch.fetch, "voc2007", base=server.base)


def test_tables():
    """Counts and names as published; every part can be named, and a checksum has the length of its kind."""
    coco, voc2007 = fetch.ARCHIVES["coco"], fetch.ARCHIVES["voc2007"]
    assert coco["train2017"].holds == {"train2017/*.jpg": 118287}
    assert "annotations/instances_val2017.json" in coco["annotations"].holds
    assert list(coco["image_info_unlabeled"].holds) == ["annotations/image_info_unlabeled2017.json"]
    assert voc2007["trainval"].lists == {"VOCdevkit/VOC2007/ImageSets/Main/trainval.txt": 5011}
    for what, archives in fetch.ARCHIVES.items():
        assert set(fetch.DEFAULT[what]) <= set(archives)
        for archive in archives.values():
            algorithm, digest = archive.checksum.split(":")
            assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size


def test_zip(server, coco, tmp_path):
    get = coco()
    get(tmp_path / "new" / "root")
    assert tree(tmp_path / "new" / "root") == PHOTOS  # and no hidden file is left
    get(tmp_path / "new" / "root")
    assert len(server.log) == 1


def test_voc_archives_share_a_folder(server, devkit, tmp_path):
    devkit(tmp_path)
    assert tree(tmp_path) == voc("trainval", range(6)) | voc("test", range(6, 10))
    lists = (tmp_path / fetch.SETS).glob("*_test.txt")
    assert len(list(lists)) == 20
    devkit(tmp_path)
    assert [request.path for request in server.log] == ["/trainval.tar", "/test.tar"]


def test_own_copy_is_not_fetched(server, devkit, tmp_path):
    for name, content in voc("trainval", range(6)).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    tmp_path.chmod(0o555)  # not even to be written
    devkit(tmp_path, ["trainval"])
    tmp_path.chmod(0o755)
    assert server.log == []
    photos = tmp_path / fetch.VOC / "JPEGImages"
    (photos / "000003.jpg").unlink()  # what is missing is put there
    (photos / "extra.jpg").touch()
    own = (photos / "000004.jpg").stat().st_ino
    devkit(tmp_path, ["trainval"])
    assert tree(tmp_path) == voc("trainval", range(6)) | {f"{fetch.VOC}/JPEGImages/extra.jpg": b""}
    assert (photos / "000004.jpg").stat().st_ino == own


def test_listed_photo_that_is_missing_counts_for_more_than_another(server, devkit, tmp_path):
    devkit(tmp_path, ["trainval"])
    photos = tmp_path / fetch.VOC / "JPEGImages"
    (photos / "000003.jpg").rename(photos / "000099.jpg")
    devkit(tmp_path, ["trainval"])
    assert len(server.log) == 2
    assert (photos / "000003.jpg").read_bytes() == b"photo 3"


def test_other_content_in_the_way_is_kept(server, coco, tmp_path):
    get = coco()
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "1.jpg").write_bytes(b"my own")
    with pytest.raises(InputError, match=r"train2017/1\.jpg: is there"):
        get(tmp_path)
    assert [path.name for path in (tmp_path / "train2017").iterdir()] == ["1.jpg"]
    (tmp_path / "train2017" / "1.jpg").unlink()
    empty = (tmp_path / "train2017").stat().st_ino
    get(tmp_path)
    assert tree(tmp_path) == PHOTOS
    assert (tmp_path / "train2017").stat().st_ino != empty  # even this one was replaced as a whole
    assert len(server.log) == 1  # the archive was kept


def test_link_in_the_way_is_kept(coco, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train2017").symlink_to("elsewhere")
    with pytest.raises(InputError, match="train2017: is there"):
        coco()(tmp_path)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("tag", ['"1"', None])
def test_resumes(server, coco, tmp_path, monkeypatch, tag):
    server.tag, server.cut = tag, [1000, 700]
    monkeypatch.setattr(fetch, "PAUSES", ())
    get = coco()
    for start in (1000, 1700):  # two runs that broke off
        with pytest.raises(InputError, match=r"train2017\.zip: cannot be downloaded .* run again"):
            get(tmp_path)
        assert (tmp_path / ".train2017.zip.part").stat().st_size == start
    get(tmp_path)
    assert tree(tmp_path) == PHOTOS
    assert [request.range for request in server.log] == [None, "bytes=1000-", "bytes=1700-"]
    assert [request.condition for request in server.log] == [None, tag, tag]
    assert sum(request.sent for request in server.log) == len(server.files["/zips/train2017.zip"])


def test_retries_as_long_as_it_gets_on(server, coco, tmp_path):
    server.cut, server.errors = [500] * 8, [503, None, None, 429]
    coco()(tmp_path)
    assert tree(tmp_path) == PHOTOS
    assert sum(request.sent for request in server.log) == len(server.files["/zips/train2017.zip"])
    server.errors = [503] * 9
    shutil.rmtree(tmp_path / "train2017")
    del server.log[:]
    with pytest.raises(InputError, match="503"):
        coco()(tmp_path)
    assert len(server.log) == 1 + len(fetch.PAUSES)
    assert list(tmp_path.iterdir()) == []


def test_server_that_cannot_resume(server, coco, tmp_path):
    server.ranges, server.cut = False, [1500]
    coco()(tmp_path)
    assert tree(tmp_path) == PHOTOS
    assert [request.range for request in server.log] == [None, "bytes=1500-"]
    assert server.log[1].sent == len(server.files["/zips/train2017.zip"])


@pytest.mark.parametrize("tag", ['"2"', None])
@pytest.mark.parametrize("size", [10, 50_000])
def test_file_that_changed_meanwhile_starts_again(server, coco, tmp_path, monkeypatch, tag, size):
    """With a validator the server says so; without one, the size does (416 or Content-Range)."""
    server.cut, server.tag = [1500], tag and '"1"'
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "PAUSES", ())
        with pytest.raises(InputError, match="run again"):
            coco()(tmp_path)
    server.tag = tag
    new = {name: bytes(size) for name in PHOTOS}
    coco(zipped(new))(tmp_path)
    assert tree(tmp_path) == new
    assert len(server.log) <= 3


def test_wrong_checksum(server, coco, tmp_path):
    get = coco()
    good = server.files["/zips/train2017.zip"]
    server.files["/zips/train2017.zip"] = bytes(len(good))
    with pytest.raises(InputError, match=r"/zips/train2017\.zip: what arrived was deleted, for its checksum"):
        get(tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.files["/zips/train2017.zip"] = good
    get(tmp_path)
    assert tree(tmp_path) == PHOTOS


def test_what_the_server_does_not_have(server, coco, tmp_path):
    get = coco()
    server.files.clear()
    with pytest.raises(InputError, match=r"train2017\.zip: cannot be downloaded .*404"):
        get(tmp_path)
    server.files["/zips/train2017.zip"], server.length = b"stream", False
    with pytest.raises(InputError, match="does not tell the size"):
        get(tmp_path)
    assert len(server.log) == 2  # no second attempts
    assert list(tmp_path.iterdir()) == []


def test_nobody_answers(coco, tmp_path):
    get = coco()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    with pytest.raises(InputError, match="refused"):
        get(tmp_path, base=f"http://127.0.0.1:{port}")


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


@pytest.mark.parametrize(
    ("end", "content"),
    [
        ("tar", tarred(PHOTOS | {"../out.jpg": b""})),
        ("tar", tarred(PHOTOS | {"train2017/../../out.jpg": b""})),
        ("tar", tarred(PHOTOS | {"/out.jpg": b""})),
        ("tar", tarred(PHOTOS, member("train2017/link", tarfile.SYMTYPE, "../../out.jpg"))),
        ("tar", tarred(PHOTOS, member("train2017/link", tarfile.LNKTYPE, "../out.jpg"))),
        ("tar", tarred(PHOTOS, member("train2017/pipe", tarfile.FIFOTYPE))),
        ("tar", tarred(PHOTOS, member("train2017/disk", tarfile.BLKTYPE))),
        ("zip", zipped(PHOTOS | {"../out.jpg": b""})),
        ("zip", zipped(PHOTOS | {"/out.jpg": b""})),
        ("zip", zipped(PHOTOS, special("train2017/link", stat.S_IFLNK | 0o777))),
        ("zip", zipped(PHOTOS, special("train2017/pipe", stat.S_IFIFO | 0o666))),
        ("tar", b"no archive"),
        ("zip", b"no archive"),
    ],
)
def test_refuses_archives_that_climb_out(coco, tmp_path, end, content):
    root = tmp_path / "root"
    with pytest.raises(InputError, match=rf"^train2017\.{end}: .* do not use (it|this archive)\.$"):
        coco(content, f"train2017.{end}")(root)
    assert {path.suffix for path in root.iterdir()} == {".part", ".json"}  # nothing unpacked
    assert list(tmp_path.iterdir()) == [root]


def test_hard_links_become_copies(coco, tmp_path):
    files = {name: PHOTOS[name] for name in list(PHOTOS)[:2]}
    first = next(iter(files))
    coco(tarred(files, member("train2017/2.jpg", tarfile.LNKTYPE, first)), "train2017.tar")(tmp_path)
    assert tree(tmp_path) == files | {"train2017/2.jpg": files[first]}
    assert (tmp_path / "train2017/2.jpg").stat().st_nlink == 1


KILLED = """
import os, sys
from orl.data import fetch
what, root, base, path, checksum, fatal = sys.argv[1:]
setattr(fetch, fatal, lambda *_: os._exit(9))
fetch.ARCHIVES["coco"] = {"train2017": fetch.Archive(path, checksum, "train2017", {"train2017/*.jpg": 3})}
fetch.fetch(what, root, ["train2017"], base)
"""


@pytest.mark.parametrize("fatal", ["_unpack", "_move"])
def test_goes_on_after_a_kill(server, coco, tmp_path, fatal):
    get = coco()
    archive = fetch.ARCHIVES["coco"]["train2017"]
    command = [sys.executable, "-c", KILLED, "coco", tmp_path, server.base, archive.path, archive.checksum, fatal]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 9
    left = {path.suffix for path in tmp_path.iterdir()}
    assert left == {".part", ".json"} | ({".unpacked"} if fatal == "_move" else set())
    assert not (tmp_path / "train2017").exists()
    stale = tmp_path / ".train2017.zip.unpacked" / "train2017" / "half.jpg"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    get(tmp_path)
    assert tree(tmp_path) == PHOTOS
    assert len(server.log) == 1


def test_kill_after_the_last_rename_leaves_nothing(server, coco, tmp_path):
    get = coco()
    get(tmp_path)
    (tmp_path / ".train2017.zip.part").write_bytes(b"all of it")
    (tmp_path / ".train2017.zip.unpacked").mkdir()
    get(tmp_path)
    assert tree(tmp_path) == PHOTOS
    assert len(list(tmp_path.iterdir())) == len(server.log) == 1


def test_lists_come_last(devkit, tmp_path, monkeypatch):
    """Where moving breaks off, no list of the split is there: its photos come first."""
    devkit(tmp_path, ["trainval"])
    moved = []

    def rename(source, target):
        if source.suffix == ".txt":
            raise KeyboardInterrupt
        moved.append(target.name)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", rename)
        with pytest.raises(KeyboardInterrupt):
            devkit(tmp_path, ["test"])
    assert moved == [f"{photo:06d}.jpg" for photo in range(6, 10)]
    devkit(tmp_path)
    assert tree(tmp_path) == voc("trainval", range(6)) | voc("test", range(6, 10))


def test_second_process_stops(server, coco, tmp_path):
    get = coco()
    part = tmp_path / ".train2017.zip.part"
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"\.part: another process"):
            get(tmp_path)
    assert part.exists()
    assert server.log == []
    get(tmp_path)
    assert tree(tmp_path) == PHOTOS


def full(*_: object) -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def test_full_disk(server, coco, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    size = len(coco() and server.files["/zips/train2017.zip"])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(2 * size))  # packed and unpacked need 2.1
        with pytest.raises(NoRoomError, match="MB are free"):
            coco()(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(NoRoomError, match="disk is full"):
            coco()(tmp_path)
    coco()(tmp_path)
    assert tree(tmp_path) == PHOTOS
    assert len(server.log) == 2


def test_folder_that_cannot_be_written(coco, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/.*: cannot be written"):
        coco()(tmp_path / "file" / "root")


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="'voc' is not known; name one of voc2007, coco"):
        fetch.fetch("voc", tmp_path)
    with pytest.raises(InputError, match="no part 'train'; name some of train2017, val2017"):
        fetch.fetch("coco", tmp_path, ["val2017", "train"])
    assert list(tmp_path.iterdir()) == []
