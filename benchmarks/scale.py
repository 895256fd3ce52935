"""Stage 2 at COCO's size without a photo: time, memory and file sizes, and how long the workflow takes to plan nothing.

- Made-up embeddings, proposals and RoI features of 10 % and 100 % of COCO's 118,287 photos: `orl neighbors`,
  `orl correspond` in shards and `orl merge` on them. Target: peak memory as good as equal for 10 % and 100 %.
- `orl neighbors` alone on 1,000,000 embeddings, by an approximate index; the exact search on some of the rows.
- `snakemake -n` where every file of COCO's run is there and up to date. Target: less than 15 s.

RoI features have as many columns as fit into a third of the free disk, 1024 at most (a ResNet-50's: --width 2048, 21 GB
of disk). All files are made in a folder of their own, which is removed.

    python benchmarks/scale.py         # on Linux; 20 minutes, 12 GB of disk
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from common import COCO, PROJECT, ROIS, Cost, command, machine, make_up_manifest, make_up_proposals

from orl import artifacts

WIDTH = 256  # of embeddings, as the paper's
PHOTOS_ALIKE = 50  # made-up embeddings lie in groups of so many
KINDS = 1000  # of made-up objects
BLOCK = 10_000  # rows made at a time


# Files


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def make_up_embeddings(path: str, count: int, manifest: str) -> None:
    """embeddings.h5: groups of photos that are alike, in no order, each group near a few others."""
    rng = np.random.default_rng(1)
    groups = max(2, count // PHOTOS_ALIKE)
    themes = rng.standard_normal((max(1, groups // 20), WIDTH), np.float32)
    centres = themes[rng.integers(len(themes), size=groups)] + rng.standard_normal((groups, WIDTH), np.float32)
    inputs = {"manifest": artifacts.fingerprint(manifest), "model": "none"}
    with artifacts.create(path, artifacts.EMBEDDINGS, {}, inputs) as file:
        rows = file.create_dataset("embedding", (count, WIDTH), np.float32)
        for block in blocks(count):
            size = block.stop - block.start
            noise = rng.standard_normal((size, WIDTH), np.float32)
            rows[block] = unit(centres[rng.integers(groups, size=size)] + noise)


def make_up_rois(folder: str, counts: np.ndarray, width: int, shards: int, inputs: dict[str, str]) -> list[str]:
    """The shards of rois.h5: features of so many kinds of objects, in no order."""
    rng, paths = np.random.default_rng(2), []
    kinds = rng.standard_normal((KINDS, width), np.float32)
    for number in range(1, shards + 1):
        part = artifacts.part(len(counts), (number, shards))
        held = int(counts[part.start : part.stop].sum())
        paths.append(os.path.join(folder, f"rois-{number:04}.h5"))
        with artifacts.create(paths[-1], artifacts.ROIS, {}, inputs, part) as file:
            rows = file.create_dataset("feature", (held, width), np.float16)
            for block in blocks(held):
                size = block.stop - block.start
                noise = rng.standard_normal((size, width), np.float32)
                rows[block] = unit(kinds[rng.integers(KINDS, size=size)] + noise)
    return paths


# What is measured


def stage2(args: argparse.Namespace, folder: str, count: int, width: int) -> dict[str, Cost]:
    """Neighbours and correspondences of `count` photos; prints and returns what each command took."""
    names = ("manifest.csv", "embeddings.h5", "proposals.h5", "neighbors.h5", "correspondences.h5")
    manifest, embeddings, proposals, neighbors, correspondences = (os.path.join(folder, name) for name in names)
    started = time.perf_counter()
    sizes = make_up_manifest(manifest, count)
    make_up_embeddings(embeddings, count, manifest)
    counts = np.random.default_rng(0).normal(ROIS, ROIS / 3, count).round().clip(1, 100).astype(int)
    make_up_proposals(proposals, sizes, counts, manifest)
    inputs = {name: artifacts.fingerprint(path) for name, path in (("manifest", manifest), ("proposals", proposals))}
    rois = make_up_rois(folder, counts, width, args.shards, {**inputs, "backbone": "none"})
    print(f"{count} photos, {counts.sum()} RoIs: made up in {time.perf_counter() - started:.1f} s", flush=True)

    costs, threads = {}, ("--threads", args.threads)
    given = ("--manifest", manifest)
    costs["neighbors"] = command("neighbors", *given, "--embeddings", embeddings, "--output", neighbors, *threads)
    print(f"{count} photos, neighbors: {costs['neighbors']}", flush=True)
    files = (*given, "--neighbors", neighbors, "--proposals", proposals, "--rois", *rois)
    costs["correspond"], shards = Cost(), []
    for number in range(1, args.shards + 1):
        shards.append(os.path.join(folder, f"correspondences-{number:04}.h5"))
        shard = ("--shard", f"{number}/{args.shards}")
        costs["correspond"].add(command("correspond", *files, "--output", shards[-1], *shard, *threads))
    print(f"{count} photos, correspond in {args.shards} shards: {costs['correspond']}", flush=True)
    costs["merge"] = command("merge", "--output", correspondences, *shards)
    print(f"{count} photos, merge: {costs['merge']}")
    size = {name: os.path.getsize(os.path.join(folder, name)) / 1e6 for name in names}
    size[f"{args.shards} shards of rois.h5"] = sum(map(os.path.getsize, rois)) / 1e6
    print(f"{count} photos, files: " + ", ".join(f"{name} {mb:.1f} MB" for name, mb in size.items()), flush=True)
    return costs


def many_neighbors(args: argparse.Namespace, folder: str) -> None:
    """Neighbours of --many embeddings: all by --index, some exactly."""
    from orl.discovery.search import BATCH, search

    manifest, embeddings, output = (os.path.join(folder, name) for name in ("manifest.csv", "embeddings.h5", "n.h5"))
    make_up_manifest(manifest, args.many)
    make_up_embeddings(embeddings, args.many, manifest)
    section = {"index": args.index, "parameters": args.parameters}
    files = ("--manifest", manifest, "--embeddings", embeddings, "--output", output)
    settings = ("--settings", yaml.safe_dump({"neighbors": section}, default_flow_style=True, width=1000).strip())
    cost = command("neighbors", *files, *settings, "--threads", args.threads)
    recall = float(artifacts.attributes(output)["recall"])
    print(f"{args.many} embeddings, {args.index} with {args.parameters}: {cost}; recall {recall:.4f}", flush=True)

    rows = np.arange(min(args.many, BATCH * args.threads))
    started = time.perf_counter()
    search(artifacts.read_embeddings(embeddings).embedding, 10, rows=rows, threads=args.threads)
    seconds = time.perf_counter() - started
    print(
        f"{args.many} embeddings, exact: {seconds:.1f} s for {len(rows)} of them, which makes "
        f"{seconds * args.many / len(rows):.0f} s for all (extrapolated)"
    )


def plan(args: argparse.Namespace, folder: str) -> None:
    """`snakemake -n` where nothing is left to do."""
    config = yaml.safe_load(Path(args.config).read_text())
    for name in ("photos", "labels"):
        os.mkdir(os.path.join(folder, name))
    config["data"]["root"] = os.path.join(folder, "photos")
    config["downstream"] = {"voc07_svm": {"root": os.path.join(folder, "labels")}}
    path = os.path.join(folder, "config.yaml")
    Path(path).write_text(yaml.safe_dump(config))
    called = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile")]
    called += ["--directory", folder, "--configfile", path]

    def snakemake(*options: str) -> str:
        done = subprocess.run([*called, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"snakemake {' '.join(options)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    # Its first column holds every file that a rule makes.
    outputs = [line.split("\t")[0] for line in snakemake("--summary").splitlines()[1:]]
    for name in outputs:
        file = Path(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.touch if file.suffix else file.mkdir)()  # the attention maps are a folder
    make_up_manifest(os.path.join(folder, "results", config["name"], "manifest.csv"), args.count)
    snakemake("--touch", "--forceall", "--cores", "1")
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        said = snakemake("-n")
        seconds.append(time.perf_counter() - started)
        if "Nothing to be done" not in said:
            raise SystemExit(f"snakemake -n has something to do:\n{said}")
    print(
        f"snakemake -n, {args.count} photos, {len(outputs)} files, all up to date: {min(seconds):.1f} s (target 15; "
        f"the least of {args.repeats}), nothing to be done"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("stage2", "neighbors", "plan")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: all)")
    parser.add_argument("--count", type=int, default=COCO, help="photos in full (default %(default)s)")
    parser.add_argument("--many", type=int, default=1_000_000, help="embeddings of `neighbors` (default %(default)s)")
    parser.add_argument("--width", type=int, help="columns of RoI features (default: by the disk, 1024 at most)")
    parser.add_argument("--shards", type=int, default=16, help="of RoIs and correspondences (default %(default)s)")
    parser.add_argument("--index", default="IVF4096,Flat", help="of `neighbors` (default %(default)s)")
    parser.add_argument("--parameters", default="nprobe=8", help="of that index (default %(default)s)")
    parser.add_argument("--config", default=PROJECT / "config/coco.yaml", help="of `plan` (default: config/coco.yaml)")
    parser.add_argument("--repeats", type=int, default=3, help="of `plan` (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default %(default)s")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where the files are made (default %(default)s)"
    )
    args = parser.parse_args()
    if not os.path.exists("/proc/self/status"):
        raise SystemExit("memory is read from /proc/PID/status, which is Linux's; run it there.")
    print(machine(), flush=True)

    row = args.count * ROIS * 2  # bytes of a column of RoI features
    width = args.width or min(1024, 2 ** int(np.log2(max(1, shutil.disk_usage(args.folder).free / 3 / row))))
    need = {
        "stage2": args.count * WIDTH * 4 + row * width + args.count * 2000,  # at most 2 kB more for a photo
        "neighbors": args.many * (WIDTH * 4 + 200),
        "plan": 100e6,
    }
    most = max(need[part] for part in args.parts)
    print(f"disk: {most / 1e9:.1f} GB needed in {args.folder}; RoI features have {width} columns", flush=True)
    if (free := shutil.disk_usage(args.folder).free) < most:
        raise SystemExit(f"{args.folder}: {free / 1e9:.1f} GB are free; name another --folder or fewer --parts.")

    if "stage2" in args.parts:
        costs = []
        for count in (args.count // 10, args.count):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                costs.append(stage2(args, folder, count, width))
        for name, less in costs[0].items():
            more = costs[1][name]
            print(
                f"ten times the photos, {name}: {more.seconds / less.seconds:.1f} x the time, "
                f"{more.resident / less.resident:.2f} x the resident memory of the largest process, "
                f"{more.anonymous / less.anonymous:.2f} x the anonymous of all"
            )
    for part, job in (("neighbors", many_neighbors), ("plan", plan)):
        if part in args.parts:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                job(args, folder)


if __name__ == "__main__":
    main()
