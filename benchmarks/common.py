"""What the benchmarks share: photos to read, files made up for stage 3, turns, and a line about the machine."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw

from orl import artifacts
from orl.data.folder import list_photos

PROJECT = Path(__file__).resolve().parents[1]
PHOTOS = PROJECT.parent / "shared/data/coco-mini/train2017"  # real photos beside the project, if any
COCO = 118_287  # photos of train2017
ROIS = 43  # of a photo of COCO, on average


def machine() -> str:
    """Where and when the figures were taken."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{time.strftime('%Y-%m-%d')}: {platform.machine()}, {os.cpu_count()} CPU cores, {gpu}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}"
    )


def optional(name: str) -> Any:
    """A module that is only compared with; None if it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # the latter two: a shared library that it wants is missing
        return None


def best(jobs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least seconds of each job. The jobs take turns, so that whatever else the machine does meets all of them."""
    seconds = dict.fromkeys(jobs, float("inf"))
    for _ in range(repeats):
        for name, job in jobs.items():
            synchronize()
            started = time.perf_counter()
            job()
            synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Cost:
    """Of one command or several: seconds, seconds of CPU, and the most memory, MB."""

    seconds: float = 0
    cpu: float = 0
    resident: float = 0
    """Of the largest process, with pages of the files that it maps."""
    anonymous: float = 0
    """Of all processes together, without those."""

    def add(self, other: Cost) -> None:
        """Take in a command that ran after the others."""
        self.seconds, self.cpu = self.seconds + other.seconds, self.cpu + other.cpu
        self.resident, self.anonymous = max(self.resident, other.resident), max(self.anonymous, other.anonymous)

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s, {self.cpu:.1f} s of CPU, at most {self.resident:.0f} MB resident in a process and "
            f"{self.anonymous:.0f} MB anonymous in all of them"
        )


def tree(pid: int) -> Iterator[int]:
    """A process and those that it started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from tree(int(child))


def memory(pid: int) -> tuple[float, float]:
    """MB: what the largest process of a tree had resident at most, and what all have now that no file backs."""
    peak = anonymous = 0.0
    try:  # where there is no /proc, nothing is known
        for one in tree(pid):
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
            peak = max(peak, kilobytes.get("VmHWM", 0) * 1024 / 1e6)
            anonymous += kilobytes.get("RssAnon", 0) * 1024 / 1e6
    except (FileNotFoundError, ProcessLookupError):  # one that has just ended
        pass
    return peak, anonymous


def command(*arguments: object) -> Cost:
    """An `orl` command of its own process, whose memory is looked at 20 times a second.

    The peak that wait4 tells would hold that of this process, as large as it was when it started the command.
    """
    called = [sys.executable, "-m", "orl", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as errors:
        cost, started = Cost(), time.perf_counter()
        process = subprocess.Popen(called, env=environment, stdout=errors, stderr=errors)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            cost.add(Cost(0, 0, *memory(process.pid)))
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"orl {arguments[0]} failed:\n{errors.read()}")
    cost.seconds, cost.cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    return cost


def photos(folder: str | None, count: int, drawn_in: str) -> tuple[str, list[str]]:
    """A folder and the names of at most `count` JPEGs in it: `folder`'s, else real ones, else drawn ones."""
    root = folder or (str(PHOTOS) if PHOTOS.is_dir() else None)
    if root is None:
        print(f"photos: {count} generated JPEGs of 640 x 480 (give real ones with --photos)")
        return drawn_in, [_drawn(number, drawn_in) for number in range(count)]
    if not os.path.isdir(root):
        raise SystemExit(f"{root}: no such folder; give --photos a folder of JPEGs.")
    names = [photo.path for photo in list_photos(root) if photo.path.lower().endswith((".jpg", ".jpeg"))][:count]
    if not names:
        raise SystemExit(f"{root}: no JPEGs in it; give --photos a folder of JPEGs.")
    print(f"photos: {len(names)} of {root if folder else 'coco-mini/train2017'}")
    return root, names


def _drawn(number: int, folder: str, size: tuple[int, int] = (640, 480)) -> str:
    """A JPEG with a photo's spectrum (noise whose strength falls with its frequency) and some sharp edges."""
    rng = np.random.default_rng(number)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for cells, strength in ((3, 60), (6, 40), (12, 25), (25, 16), (50, 11), (100, 9), (200, 7), (400, 7)):
        noise = rng.normal(0, 1, (cells, cells, 1)) + rng.normal(0, 0.4, (cells, cells, 3))
        for band in range(3):
            plane = Image.fromarray(noise[..., band].astype(np.float32))
            pixels[..., band] += strength * np.asarray(plane.resize(size, Image.Resampling.BICUBIC))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse, draw.ellipse):
        x, y, w, h = (int(value) for value in rng.integers((0, 0, 40, 40), (size[0], size[1], 200, 200)))
        shape((x, y, x + w, y + h), outline=tuple(rng.integers(0, 256, 3).tolist()), width=5)
    name = f"{number:012d}.jpg"
    image.save(os.path.join(folder, name), quality=92)
    return name


def write_manifest(path: str, root: str, names: list[str], rows: int) -> artifacts.Manifest:
    """A manifest of `rows` rows, the photos over and over: a long epoch needs no more files."""
    found = []
    for name in names:
        whole = os.path.join(root, name)
        with Image.open(whole) as image:
            found.append((name, *image.size, os.stat(whole).st_size))
    listed = [(str(row), *found[row % len(found)], "photos") for row in range(rows)]
    artifacts.write_csv(path, artifacts.MANIFEST_COLUMNS, listed)
    return artifacts.read_manifest(path)


def make_up_manifest(path: str, count: int) -> np.ndarray:
    """A manifest of `count` photos of COCO's form that do not exist; returns their width, height [count, 2]."""
    sizes = np.where(np.random.default_rng(0).random((count, 1)) < 0.7, (640, 480), (480, 640))
    rows = [
        (f"{row:012d}", f"train2017/{row:012d}.jpg", width, height, 160_000, "train2017")
        for row, (width, height) in enumerate(sizes.tolist())
    ]
    artifacts.write_csv(path, artifacts.MANIFEST_COLUMNS, rows)
    return sizes


def make_up_proposals(path: str, sizes: np.ndarray, counts: np.ndarray, manifest: str) -> None:
    """proposals.h5 with `counts` [N] random boxes in the photos of `sizes`, width, height [N, 2]."""
    rng, whole = np.random.default_rng(0), np.repeat(sizes, counts, axis=0)
    side = (whole / 4 + rng.random(whole.shape) * (whole * 3 / 4)).astype(np.int16)
    corner = (rng.random(whole.shape) * (whole - side)).astype(np.int16)
    with artifacts.create(path, artifacts.PROPOSALS, {}, {"manifest": artifacts.fingerprint(manifest)}) as file:
        file["box"] = np.concatenate([corner, side], 1)
        file["box_offsets"] = np.cumsum([0, *counts], dtype=np.int64)


def make_up_stage2(
    folder: str, sizes: np.ndarray, manifest: str, rois: int = ROIS, k: int = 10, pairs: int = 4
) -> tuple[str, str]:
    """proposals.h5 and correspondences.h5 of stage 2's shape and random content; `sizes`: width, height [N, 2].

    By default the mean number of RoIs of COCO's photos, the paper's K and its tenth of the RoIs as pairs.
    """
    rng, count = np.random.default_rng(0), len(sizes)
    proposals, correspondences = (os.path.join(folder, f"{name}.h5") for name in ("proposals", "correspondences"))
    make_up_proposals(proposals, sizes, np.full(count, rois), manifest)
    inputs = {"manifest": artifacts.fingerprint(manifest)}
    with artifacts.create(correspondences, artifacts.CORRESPONDENCES, {}, inputs) as file:
        others = rng.integers(1, count, (count, k))
        file["neighbor"] = ((np.arange(count)[:, None] + others) % count).astype(np.int32)
        file["pair"] = rng.integers(0, rois, (count * k * pairs, 2)).astype(np.uint16)
        file["similarity"] = rng.random(count * k * pairs).astype(np.float16)
        file["pair_offsets"] = np.arange(count * k + 1, dtype=np.int64) * pairs
    return proposals, correspondences
