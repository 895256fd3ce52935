"""Stage 2 on photos: each RoI encoded once against the neighbours encoded anew for every query; reduced photos; cores.

RoI pairs, of 40 photos: `orl.discovery`'s functions `rois` and `correspond`, and as reference what the release does,
on the same boxes, neighbours, weights and decoded photos, in float32: for every query photo, one image at a time, its
RoIs are encoded, then those of each of its K neighbours. Both run in this process, which starts before the clock; ours
starts its worker processes within its time. The reference is timed on --queries of the photos and extrapolated.
Targets: >= 10 x fewer crops encoded, >= 8 x less time, the same pairs but for those within 1e-3 of the last one taken.
The network is an untrained ResNet-18 whose batch statistics are those of the crops and whose features are sparse: as
initialised, it finds all crops alike, and any pair would be as good as another.

Proposals, of all photos: full size against photos reduced to 300 px, in time and recall. Targets: >= 6 x faster, recall
of objects of 96 px and more not lower. And one process against one for each core, on some photos; target: >= 90 % of
the ideal.

    python benchmarks/stage2.py        # eight minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Cost, command, machine, photos, write_manifest
from torch import Tensor, nn
from torch.nn.functional import normalize

from orl import artifacts
from orl.config import Config, parse
from orl.data.decode import resize_crop
from orl.data.manifest import load
from orl.discovery.correspondences import correspond
from orl.discovery.embed import embed
from orl.discovery.neighbors import neighbors
from orl.discovery.rois import rois
from orl.downstream.proposals import evaluate
from orl.networks import backbones
from orl.pretrain import loop

CLOSE = 1e-3  # similarities nearer to the cut may fall on either side of it


@dataclass
class Files:
    """Where a run's files lie."""

    root: str
    folder: str

    def __getattr__(self, name: str) -> str:
        return os.path.join(self.folder, name + (".csv" if name == "manifest" else ".h5"))


def timed(job: Callable[[], object]) -> Cost:
    """What a function costs; CPU is this process's and that of those which it started and has seen end."""

    def cpu() -> float:
        return sum(os.times()[:4])

    started, before = time.perf_counter(), cpu()
    job()
    return Cost(time.perf_counter() - started, cpu() - before)


def propose(files: Files, settings: dict, threads: int) -> Cost:
    """`orl propose`."""
    text = json.dumps({"data": {"layout": "folder"}, "proposals": settings})
    given = ("--settings", text, "--root", files.root, "--manifest", files.manifest)
    return command("propose", *given, "--output", files.proposals, "--threads", threads)


# RoI pairs


class Encoder:
    """The RoIs of a photo, encoded in one forward; counts them."""

    def __init__(self, config: Config, root: str, manifest: artifacts.Manifest, found: artifacts.Proposals) -> None:
        self.config, self.root, self.manifest, self.found = config, root, manifest, found
        self.crops = 0

    def pictures(self, row: int) -> Tensor:
        """uint8 [n, 3, S, S]: the RoIs of the photo in a row, which is decoded for it."""
        photo, size = load(self.root, self.manifest, row, self.config.data.exif), self.config.rois.size
        boxes = self.found.box[slice(*self.found.box_offsets[row : row + 2])].tolist()
        crops = [resize_crop(photo, (x, y, w, h), (size, size)) for x, y, w, h in boxes]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def __call__(self, model: nn.Module, row: int) -> Tensor:
        pictures = self.pictures(row)
        self.crops += len(pictures)
        return normalize(model(backbones.normalize(pictures)))


def write_backbone(path: str, random: str, encoder: Encoder, name: str) -> None:
    """A backbone whose features tell crops apart (see the module's docstring)."""
    model = backbones.load(random)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # of this batch alone
    crops = torch.cat([encoder.pictures(row) for row in range(min(4, len(encoder.manifest)))])
    model.train()
    with torch.no_grad():
        model(backbones.normalize(crops[:128]))
        last: Any = model.get_submodule("layer4.1" if name != "resnet10" else "layer4.0")
        last.bn2.bias.fill_(-2)
    backbones.save(path, name, model, artifacts.stamp(artifacts.MODEL, {}, {}))


def reference(
    encoder: Encoder, model: nn.Module, neighbor: np.ndarray, ratio: float, queries: range
) -> list[tuple[Tensor, Tensor]]:
    """As the release does it: similarities [n, m] and flat indices of the pairs, for each query and neighbour."""
    found = []
    for row in queries:
        query = encoder(model, row)
        for other in neighbor[row].tolist():
            similarity = query @ encoder(model, other).T
            found.append((similarity, similarity.flatten().topk(max(1, int(ratio * len(query)))).indices))
    return found


def compare(found: list[tuple[Tensor, Tensor]], ours: artifacts.Correspondences) -> str:
    """How many pairs of the first queries both have, and how many differ, near the cut and elsewhere."""
    both = near = wrong = alike = total = 0
    for slot, (similarity, flat) in enumerate(found):
        own = ours.pair[slice(*ours.pair_offsets[slot : slot + 2])].astype(np.int64)
        mine, theirs = set((own[:, 0] * similarity.shape[1] + own[:, 1]).tolist()), set(flat.tolist())
        values = similarity.flatten()
        cut = values[flat[-1]].item()
        differ = (mine ^ theirs) if len(mine) == len(theirs) else mine | theirs
        total += len(theirs)
        both += len(mine & theirs)
        close = sum(abs(values[pair].item() - cut) <= CLOSE for pair in differ)
        near, wrong = near + close, wrong + len(differ) - close
        alike += int(((values - cut).abs() <= CLOSE).sum()) - 1
    verdict = "as wanted" if wrong == 0 else "NOT the same"
    return (
        f"pairs compared: {total}, of which both have {both} ({100 * both / total:.2f}%); {near} that one of them has "
        f"are within {CLOSE:g} of the cut, {wrong} are not: {verdict} (so near to a cut lie {alike / len(found):.2f} "
        f"other pairs on average)"
    )


def roi_pairs(args: argparse.Namespace, folder: str) -> None:
    """Time, crops and pairs of both ways."""
    root, names = photos(args.photos, args.count, folder)
    files = Files(root, folder)
    manifest = write_manifest(files.manifest, root, names, len(names))
    config = parse(
        {
            "data": {"layout": "folder"},
            "stage1": {"network": {"backbone": args.backbone}},
            "embeddings": {"precision": "float32"},
            "neighbors": {"k": args.neighbors},
            "rois": {"size": args.size, "precision": "float32"},
        }
    )
    loop.random(config, Path(folder))
    model_path, backbone_path = (os.path.join(folder, f"{name}.safetensors") for name in ("model", "backbone"))
    embed(config, root, files.manifest, model_path, files.embeddings)
    neighbors(config, files.manifest, files.embeddings, files.neighbors, args.threads)
    propose(files, {}, args.threads)
    proposals = artifacts.read_proposals(files.proposals)
    encoder = Encoder(config, root, manifest, proposals)
    write_backbone(backbone_path, backbone_path, encoder, args.backbone)

    def ours() -> None:
        rois(config, root, files.manifest, files.proposals, backbone_path, files.rois, args.threads)
        # So few photos are one block of `correspond`, which one process takes care of.
        correspond(config, files.manifest, files.neighbors, files.proposals, [files.rois], files.correspondences)

    neighbor = np.array(artifacts.read_neighbors(files.neighbors).index)
    model, found, queries = backbones.load(backbone_path), [], range(min(args.queries, len(names)))
    own = timed(ours)
    theirs = timed(lambda: found.extend(reference(encoder, model, neighbor, config.correspondences.ratio, queries)))

    counts = np.diff(proposals.box_offsets)
    crops = int(counts.sum() + counts[neighbor].sum())
    assert encoder.crops == counts[queries].sum() + counts[neighbor[queries]].sum()
    # By crops rather than by queries: photos have more RoIs or fewer.
    share = crops / encoder.crops
    said = f", by the {encoder.crops} of {len(queries)} queries" if share > 1 else ""
    print(
        f"crops of {args.size} px encoded for {len(names)} photos and {neighbor.shape[1]} neighbours: "
        f"ours {counts.sum()}, reference {crops}, {crops / counts.sum():.2f} x (target 10)"
    )
    print(f"ours: {own.seconds:.1f} s, {own.cpu:.1f} s of CPU, {1000 * own.cpu / counts.sum():.1f} ms of CPU per crop")
    print(
        f"reference: {theirs.seconds * share:.1f} s, {theirs.cpu * share:.1f} s of CPU{said}, "
        f"{1000 * theirs.cpu / encoder.crops:.1f} ms of CPU per crop"
    )
    faster, cpu = theirs.seconds * share / own.seconds, theirs.cpu * share / own.cpu
    print(f"ours is {faster:.2f} x faster (target 8); by CPU time {cpu:.2f} x")
    print(compare(found, artifacts.read_correspondences(files.correspondences)), flush=True)


# Proposals


def labels(root: str) -> Path | None:
    """COCO's boxes of the photos in a folder, where they lie in COCO's layout."""
    path = Path(root).parent / "annotations" / f"instances_{Path(root).name}.json"
    return path if path.is_file() else None


def reduced_proposals(args: argparse.Namespace, folder: str) -> None:
    """Time and recall, full size against reduced."""
    root, names = photos(args.photos, args.searched, folder)
    files, truth = Files(root, folder), labels(root)
    manifest = write_manifest(files.manifest, root, names, len(names))
    if truth is None:
        print(f"recall: no annotations/instances_{Path(root).name}.json beside the photos, so not measured")
    costs = []
    for name, side in (("full size", None), (f"{args.long_side} px", args.long_side)):
        settings = {"long_side": side}
        cost = propose(files, settings, args.threads)
        costs.append(cost)
        kept = len(artifacts.read_proposals(files.proposals).box) / len(manifest)
        line = f"proposals of {len(manifest)} photos, {name}: {cost.seconds:.1f} s, {cost.cpu:.1f} s of CPU"
        line += f", {kept:.1f} kept per photo"
        if truth:
            paths = (files.manifest, files.proposals, [truth], os.path.join(folder, "recall.json"))
            result = evaluate(parse({"proposals": settings}), name, *paths)
            for objects, count in (("large", "large_objects"), ("all", "objects")):
                by_all = {iou: recall[-1] for iou, recall in result["metrics"]["recall"][objects].items()}
                told = ", ".join(f"{recall:.4f} at IoU {iou}" for iou, recall in by_all.items() if recall is not None)
                line += f"; recall of {result['data'][count]} {objects} objects: {told or 'none there'}"
        print(line, flush=True)
    full, less = costs
    faster, cpu = full.seconds / less.seconds, full.cpu / less.cpu
    print(f"reduced: {faster:.2f} x faster (target 6); by CPU time {cpu:.2f} x", flush=True)


def efficiency(args: argparse.Namespace, folder: str) -> None:
    """One process against several."""
    root, names = photos(args.photos, args.shared, folder)
    files = Files(root, folder)
    write_manifest(files.manifest, root, names, len(names))
    one, many = (propose(files, {}, threads) for threads in (1, args.threads))
    print(
        f"proposals of {len(names)} photos, full size: {one.seconds:.1f} s in one process ({one.cpu:.1f} s of CPU), "
        f"{many.seconds:.1f} s in {args.threads} ({many.cpu:.1f}): "
        f"{100 * one.seconds / (args.threads * many.seconds):.1f}% of {args.threads} x (target 90)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"pairs": roi_pairs, "proposals": reduced_proposals, "cores": efficiency}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to measure (default: all)")
    parser.add_argument("--photos", metavar="FOLDER", help="JPEGs (default: real ones beside the project, else drawn)")
    parser.add_argument("--count", type=int, default=40, help="photos of `pairs` (default %(default)s)")
    parser.add_argument("--queries", type=int, default=10, help="of them that the reference does (default %(default)s)")
    parser.add_argument("--neighbors", type=int, default=10, help="K (default %(default)s)")
    parser.add_argument("--backbone", default="resnet18", choices=["resnet10", "resnet18"], help="default %(default)s")
    parser.add_argument("--size", type=int, default=224, help="of a RoI, pixels (default %(default)s)")
    parser.add_argument("--searched", type=int, default=321, help="photos of `proposals` (default %(default)s)")
    parser.add_argument("--long-side", type=int, default=300, help="of reduced photos, pixels (default %(default)s)")
    parser.add_argument("--shared", type=int, default=40, help="photos of `cores` (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(), flush=True)
    for name in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](args, folder)


if __name__ == "__main__":
    main()
