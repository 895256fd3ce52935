"""Object discovery without labels: boxes on each photo, measured by its annotated objects.

(a) Proposals, those first that stage 2 pairs often and well. (b) Boxes from a backbone's last feature map, by LOST's
seed expansion (Siméoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels", BMVC 2021; their
code: valeoai/LOST). As there for ResNets, the last stage is dilated in place of its stride (16 px a patch), and
similarities are inner products. Other than there:
- Photos are resized, so that memory has a bound; there they are taken as they are.
- A photo's features are centred channel by channel: after a ReLU none is negative, and the sign of a similarity would
  say nothing. There, one mean of all channels is taken out of all of them, and what all patches share stays.
- A patch reaches half-way to the centres of those beside it; there, half a patch further right and down.
- Of patches with the same degree, the first comes first.
- More boxes than one: LOST again, with seed and expansion among the patches that lie in no box yet.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor, nn
from torch.utils.data import Dataset

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.ahead import read_ahead
from orl.data.decode import resize_crop
from orl.data.manifest import load
from orl.data.views import iou
from orl.downstream.proposals import objects_of, ranks, steps
from orl.networks import backbones
from orl.progress import track

TASK = "localization"
IOU = 0.5
PATCH = 16  # px: what a dilated ResNet's stages step over; patch i sees around pixel 16 i
LONG = 4  # times the setting `side`: the longest side of a resized photo
ROWS = 4096  # patches whose similarities with all others are held at a time


def measures(boxes: Sequence[np.ndarray], objects: Sequence[np.ndarray], numbers: Sequence[int]) -> dict[str, Any]:
    """How well ranked boxes find objects, photo by photo: lists of [k, 4], best first, and of [m, 4], m at least 1.

    Boxes are x y w h; one finds all objects with which its IoU is at least 0.5. In percent: `corloc`, the photos whose
    first box finds an object (Deselaers et al., 2010); `detection_rate`, the objects that one of the first n boxes
    finds, for each n of `numbers`.
    """
    photos = track(zip(boxes, objects, strict=True), len(boxes), "measuring boxes, photos")
    found = [ranks(here, kept, (IOU,))[:, 0] for kept, here in photos]
    every = np.concatenate(found)
    return {
        "corloc": 100 * float(np.mean([one.min() == 1 for one in found])),
        "detection_rate": [100 * float((every <= number).mean()) for number in numbers],
    }


def expected(boxes: Sequence[np.ndarray], objects: Sequence[np.ndarray], numbers: Sequence[int]) -> dict[str, Any]:
    """`measures` of boxes in random order: the exact mean over all orders, instead of draws."""
    corloc, missed = [], []
    for kept, here in zip(boxes, objects, strict=True):
        hits = np.stack([iou(box, kept) >= IOU for box in here])
        corloc.append(hits.any(0).mean())
        # The chance that the next box misses, too: of those that are left, the share that miss.
        taken = np.arange(len(kept))
        chance = (len(kept) - hits.sum(1)[:, None] - taken).clip(0) / (len(kept) - taken)
        missed.append(chance.cumprod(1)[:, np.minimum(numbers, len(kept)) - 1])
    rate = 1 - np.concatenate(missed).mean(0)
    return {"corloc": 100 * float(np.mean(corloc)), "detection_rate": (100 * rate).tolist()}


def pair_scores(found: artifacts.Correspondences, offsets: np.ndarray) -> np.ndarray:
    """How often and how well each proposal is paired: float64 [M], `offsets` [N + 1] being those of the proposals.

    The sum of the similarities of all pairs in which it occurs, as query or as the neighbour's box.
    """
    k, pair = found.neighbor.shape[1], np.asarray(found.pair, np.int64)
    slot = np.repeat(np.arange(len(found.neighbor) * k), np.diff(found.pair_offsets))
    here, there = offsets[slot // k] + pair[:, 0], offsets[np.asarray(found.neighbor).ravel()[slot]] + pair[:, 1]
    weight = np.tile(np.asarray(found.similarity, np.float64), 2)
    return np.bincount(np.concatenate([here, there]), weight, offsets[-1])


def lost(features: Tensor, expand: int, boxes: int) -> np.ndarray:
    """Boxes from a map of features [C, h, w], at most `boxes`, best first: int64 [n, 4], x y w h in patches; n >= 1.

    The seed is the patch of lowest degree, the number of patches to which its similarity is positive; of the `expand`
    patches of lowest degree, those similar to the seed are added up; the box holds the patches similar to the sum
    that hang together with the seed by their sides.
    """
    height, width = features.shape[1:]
    rows = features.flatten(1).T.float()
    rows = rows - rows.mean(0)
    degree = torch.cat([(part @ rows.T > 0).sum(1) for part in rows.split(ROWS)])
    order = degree.cpu().numpy().argsort(kind="stable")
    free = np.full((height, width), True)
    found: list[tuple] = []
    while len(found) < boxes and free.any():
        outside = order[free.ravel()[order]]
        seed, lowest = outside[0], rows[outside[:expand]]
        mask = (rows @ lowest[lowest @ rows[seed] > 0].sum(0) > 0).cpu().numpy()
        mask[seed] = True  # it is, unless nothing is similar to anything, as on a photo of one colour
        parts = label(mask.reshape(height, width))[0]
        y, x = np.nonzero(parts == parts.flat[seed])
        found.append((x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1))
        free[y.min() : y.max() + 1, x.min() : x.max() + 1] = False
    return np.array(found, np.int64)


def dilate(model: backbones.ResNet) -> None:
    """Take the stride out of the last stage and dilate what follows: of its map, every other pixel stays as it was."""
    for part in model.get_submodule("layer4").modules():
        if isinstance(part, nn.Conv2d):
            if part.stride == (2, 2):
                part.stride = (1, 1)
            elif part.kernel_size == (3, 3):
                part.dilation = part.padding = (2, 2)


def edges(count: int, side: int) -> np.ndarray:
    """Where the `count` patches of a row or column meet, in an input of `side` pixels, and its ends: [count + 1]."""
    found = PATCH * (np.arange(count + 1) - 0.5) + 0.5
    found[[0, -1]] = 0, side
    return found


class _Photos(Dataset):
    """The photos of some rows, uint8 [h, w, 3]: the short side `side`, or less where the long one would be too long."""

    def __init__(self, config: Config, root: str | os.PathLike, manifest: artifacts.Manifest, rows: np.ndarray) -> None:
        self.root, self.manifest, self.rows = root, manifest, rows
        self.exif, self.side = config.data.exif, config.downstream.localization.side

    def __getitem__(self, index: int) -> np.ndarray:
        photo = load(self.root, self.manifest, self.rows[index], self.exif)
        height, width = photo.shape[:2]
        scale = self.side * min(1 / min(height, width), LONG / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return resize_crop(photo, (0, 0, width, height), size)


def _boxes(
    config: Config,
    root: str | os.PathLike,
    manifest: artifacts.Manifest,
    rows: np.ndarray,
    backbone: str | os.PathLike,
    workers: int,
) -> Iterator[np.ndarray]:
    """The boxes of `lost` on the photos of some rows, float64 [n, 4], x y w h in pixels. Raises InputError."""
    section, device = config.downstream.localization, backbones.device()
    model = backbones.load(backbone)
    dilate(model)
    model.to(device)
    photos = _Photos(config, root, manifest, rows)
    ahead = read_ahead(photos, range(len(rows)), None, workers, 3 * LONG * section.side**2, device)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        for row, photo in zip(rows, track(ahead, len(rows), "localization"), strict=True):
            pixels = photo.to(device).permute(2, 0, 1)[None]
            features = model.stages(backbones.normalize(pixels))[-1][0]
            if not features.isfinite().all():
                raise InputError(f"{backbone}: its features of {manifest.path[row]} are not finite; make it again.")
            sides = (photo.shape[1], manifest.width[row]), (photo.shape[0], manifest.height[row])
            across, down = (
                edges(count, side) * (whole / side)
                for count, (side, whole) in zip(features.shape[:0:-1], sides, strict=True)
            )
            x, y, w, h = lost(features, section.expand, section.boxes).T
            yield np.stack([across[x], down[y], across[x + w] - across[x], down[y + h] - down[y]], 1)


def _write(
    output: str | os.PathLike,
    name: str,
    methods: dict[str, Any],
    numbers: list[int],
    settings: dict[str, Any],
    annotations: Sequence[str | os.PathLike],
    data: dict[str, Any],
) -> dict[str, Any]:
    """Write and return the result."""
    result = {
        "task": TASK,
        "model": name,
        "metrics": {"boxes": numbers, "methods": methods},
        "settings": settings,
        "data": {
            "annotations": [os.fspath(path) for path in annotations],
            "annotations_fingerprints": [artifacts.fingerprint(path) for path in annotations],
            **data,
        },
    }
    artifacts.write_json(output, result)
    return result


def evaluate_pairs(
    config: Config,
    name: str,
    manifest_path: str | os.PathLike,
    proposals_path: str | os.PathLike,
    correspondences_path: str | os.PathLike,
    annotations: Sequence[str | os.PathLike],
    output: str | os.PathLike,
) -> dict[str, Any]:
    """Measure proposals as boxes around objects, ranked by `pair_scores`; write and return the result.

    `name` is that of the result; for `annotations`, and what of them is left out, see `proposals.evaluate`.
    Metrics: those of `measures` for `boxes`, by method: `pairing`; `random` order; `largest` first; `first`: in the
    order in which they were kept; `whole`: the photo as its only box.
    Raises InputError, having written nothing, where files do not belong together or no object is left.
    """
    manifest, proposals, found = artifacts.read_stage2(manifest_path, proposals_path, correspondences_path)
    offsets = np.array(proposals.box_offsets)
    photos, objects, data = _objects(manifest, annotations)
    boxes = [np.asarray(proposals.box[offsets[row] : offsets[row + 1]]) for row in photos]
    score = pair_scores(found, offsets)
    paired = [kept[np.argsort(-score[offsets[row] : offsets[row + 1]], kind="stable")]
              for row, kept in zip(photos, boxes, strict=True)]  # fmt: skip
    largest = [kept[np.argsort(-kept[:, 2:].astype(np.int64).prod(1), kind="stable")] for kept in boxes]
    whole = [np.array([[0, 0, manifest.width[row], manifest.height[row]]]) for row in photos]
    numbers = steps(config.downstream.localization.boxes)
    methods = {
        "pairing": measures(paired, objects, numbers),
        "random": expected(boxes, objects, numbers),
        "largest": measures(largest, objects, numbers),
        "first": measures(boxes, objects, numbers),
        "whole": measures(whole, objects, numbers),
    }
    made_with = json.loads(artifacts.attributes(correspondences_path).get("settings", "{}"))
    settings = {**used(config, "pair_boxes"), "made_with": made_with}
    data = {"correspondences_fingerprint": artifacts.fingerprint(correspondences_path), **data}
    return _write(output, name, methods, numbers, settings, annotations, data)


def evaluate_model(
    config: Config,
    root: str | os.PathLike,
    manifest_path: str | os.PathLike,
    backbone: str | os.PathLike,
    annotations: Sequence[str | os.PathLike],
    name: str,
    output: str | os.PathLike,
    threads: int,
) -> dict[str, Any]:
    """Measure the boxes that `lost` finds in the last map of a backbone; write and return the result.

    `threads` processes read the photos, which are under `root` (0: this one); they do not change the result.
    Metrics as in `evaluate_pairs`, of the method `lost`. Raises InputError, having written nothing.
    """
    manifest = artifacts.read_manifest(manifest_path)
    photos, objects, data = _objects(manifest, annotations)
    numbers = steps(config.downstream.localization.boxes)
    boxes = list(_boxes(config, root, manifest, photos, backbone, threads))
    methods = {"lost": measures(boxes, objects, numbers)}
    data = {"weights_fingerprint": artifacts.fingerprint(backbone), **data}
    return _write(output, name, methods, numbers, used(config, TASK), annotations, data)


def _objects(
    manifest: artifacts.Manifest, annotations: Sequence[str | os.PathLike]
) -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
    """The rows of the photos with objects, int64 [n]; the boxes on each, float64 [m, 4]; and counts."""
    row, box, _, left_out = objects_of(manifest, annotations)
    photos, starts = np.unique(row, return_index=True)
    counts = {"photos": len(photos), "photos_left_out": len(manifest) - len(photos), "objects": len(box), **left_out}
    return photos, np.split(box, starts[1:]), counts
