"""What starting stage 3 costs at COCO's size: time, file size, and memory that does not grow with the files.

Made-up files of 10 % and 100 % of COCO's 118,287 photos, with its mean of 43 RoIs, 10 neighbours and 4 pairs with each.
A fresh process opens them as stage 3 does and draws the boxes of 1,000 random samples, with blank photos and crops.
Reference: the same boxes and pairs as JSON, each pair as two boxes and a score, from one photo in a hundred. Targets:
correspondences.h5 of at most 150 MB, opened in less than 1 s; anonymous memory (which is not backed by the files)
grows by no more than the manifest's columns.

    python benchmarks/memory.py        # on Linux, 300 MB of disk; half a minute
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
from common import COCO, machine, make_up_manifest, make_up_stage2, memory

from orl import artifacts
from orl.config import Stage3
from orl.data.decode import Photo
from orl.data.views import Box
from orl.pretrain import samples


def resident() -> dict[str, float]:
    """MB of this process in memory: what files back, and what they do not."""
    with open("/proc/self/smaps_rollup") as file:
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file if line.endswith("kB\n")}
    anonymous = kilobytes["Anonymous"] * 1024 / 1e6
    return {"anonymous": anonymous, "files": kilobytes["Rss"] * 1024 / 1e6 - anonymous}


def measure(folder: str, count: int) -> None:
    """In the fresh process: open the files, draw `count` samples, print what it took as JSON."""

    def blank(root: object, manifest: artifacts.Manifest, row: int, exif: object, reduce: int = 1) -> Photo:
        return np.broadcast_to(np.uint8(0), (manifest.height[row], manifest.width[row], 3))

    def no_crop(image: Photo, box: Box, size: tuple[int, int]) -> Photo:
        return np.broadcast_to(np.uint8(0), (size[1], size[0], 3))

    samples.load, samples.resize_crop = blank, no_crop
    before, (peak, _) = resident(), memory(os.getpid())
    started = time.perf_counter()
    manifest = artifacts.read_manifest(os.path.join(folder, "manifest.csv"))
    read = time.perf_counter()
    correspondences = artifacts.read_correspondences(os.path.join(folder, "correspondences.h5"))
    opened = time.perf_counter()
    proposals = artifacts.read_proposals(os.path.join(folder, "proposals.h5"))
    dataset = samples.ObjectViews(folder, manifest, "ignore", Stage3(), 0, proposals, correspondences)
    ready = resident()
    for row in np.random.default_rng(0).integers(0, len(manifest), count):
        dataset[0, int(row)]
    after = resident()
    found = {
        "manifest_seconds": read - started,
        "open_seconds": opened - read,
        "columns": sum(column.nbytes for column in vars(manifest).values()) / 1e6,
        "peak": memory(os.getpid())[0] - peak,
    }
    for kind in before:
        found[f"{kind}_opened"], found[f"{kind}_drawn"] = ready[kind] - before[kind], after[kind] - before[kind]
    print(json.dumps(found))


def as_json(folder: str, share: int) -> tuple[float, float]:
    """MB and seconds to read of the pairs as lists of boxes in JSON, from one photo in `share`."""
    proposals = artifacts.read_proposals(os.path.join(folder, "proposals.h5"))
    found = artifacts.read_correspondences(os.path.join(folder, "correspondences.h5"))
    photos, k = found.neighbor.shape
    rows = range(0, photos, share)
    listed = []
    for row in rows:
        slots = []
        for slot in range(k):
            here = slice(*found.pair_offsets[row * k + slot : row * k + slot + 2])
            other = int(found.neighbor[row, slot])
            mine = proposals.box[proposals.box_offsets[row] + found.pair[here, 0]].tolist()
            others = proposals.box[proposals.box_offsets[other] + found.pair[here, 1]].tolist()
            slots.append(
                {"neighbor": other, "boxes": mine, "others": others, "scores": found.similarity[here].tolist()}
            )
        boxes = proposals.box[slice(*proposals.box_offsets[row : row + 2])].tolist()
        listed.append({"image": row, "boxes": boxes, "pairs": slots})
    text = json.dumps(listed)
    started = time.perf_counter()
    json.loads(text)
    return len(text) / 1e6 * photos / len(rows), (time.perf_counter() - started) * photos / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COCO, help="photos in full (default %(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="drawn (default %(default)s)")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.samples)
        return
    if not os.path.exists("/proc/self/smaps_rollup"):
        raise SystemExit("memory is read from /proc/self/smaps_rollup, which is Linux's; run it there.")
    print(machine(), flush=True)
    grown = []
    for count in (args.count // 10, args.count):
        with tempfile.TemporaryDirectory() as folder:
            manifest = os.path.join(folder, "manifest.csv")
            make_up_stage2(folder, make_up_manifest(manifest, count), manifest)
            command = [sys.executable, __file__, "--measure", folder, "--samples", str(args.samples)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            size = {name: os.path.getsize(os.path.join(folder, name)) / 1e6 for name in sorted(os.listdir(folder))}
            plain, seconds = as_json(folder, 100) if count == args.count else (0.0, 0.0)
        grown.append(found)
        fits = "" if size["correspondences.h5"] <= 150 else ": LARGER than its target"
        print(
            f"{count} photos: correspondences.h5 {size['correspondences.h5']:.2f} MB (target 150){fits}, opened in "
            f"{1000 * found['open_seconds']:.1f} ms (target 1000); proposals.h5 {size['proposals.h5']:.2f} MB; "
            f"manifest.csv {size['manifest.csv']:.2f} MB, read in {found['manifest_seconds']:.2f} s"
        )
        print(
            f"{count} photos: anonymous memory {found['anonymous_opened']:+.1f} MB when opened, "
            f"{found['anonymous_drawn']:+.1f} MB after {args.samples} samples, of which the manifest's columns are "
            f"{found['columns']:.1f}; backed by files {found['files_opened']:+.1f} and {found['files_drawn']:+.1f} MB; "
            f"at the peak {found['peak']:+.1f} MB",
            flush=True,
        )
        if plain:
            print(f"{count} photos: as JSON about {plain:.0f} MB, read in about {seconds:.0f} s (reference)")
    more = {name: grown[1][name] - grown[0][name] for name in ("anonymous_drawn", "columns")}
    print(
        f"ten times the photos: anonymous memory {more['anonymous_drawn']:+.1f} MB, the manifest's columns "
        f"{more['columns']:+.1f} MB"
    )


if __name__ == "__main__":
    main()
