"""Precision of RoI pairs: how many of them show objects of the same class, beside random pairs."""

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.views import iou, rng
from orl.downstream.proposals import objects_of, steps
from orl.progress import track

TASK = "pairs"
IOU = 0.5
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
RANDOM = 1_000_000  # random pairs at least, of either kind


def shown(boxes: np.ndarray, objects: np.ndarray, kind: np.ndarray, kinds: int) -> np.ndarray:
    """Which classes each box shows: bool [n, kinds], those of the objects with which its IoU is at least 0.5.

    `boxes` [n, 4] and `objects` [m, 4] are x y w h, `kind` int [m] is the objects' class.
    """
    found = np.zeros((len(boxes), kinds), bool)
    for box, of in zip(objects, kind.tolist(), strict=True):
        found[:, of] |= iou(box, boxes) >= IOU
    return found


def evaluate(
    config: Config,
    model: str,
    manifest_path: str | os.PathLike,
    proposals_path: str | os.PathLike,
    correspondences_path: str | os.PathLike,
    annotations: Sequence[str | os.PathLike],
    output: str | os.PathLike,
) -> dict[str, Any]:
    """Measure how many RoI pairs show the same class; write and return the result.

    A pair is right if its two boxes overlap, by an IoU of at least 0.5, annotated objects of the same class. Pairs
    of which a photo has no annotated object, or is not in the annotations, count as wrong.
    `model` is the name the result goes by; for `annotations`, see `proposals.evaluate`.
    Metrics, as shares from 0 to 1: `precision` of all `pairs`; `random_rois`, that of random boxes of the same pairs
    of photos; `random_photos`, that of random boxes of random photos; `on_object`, the share of kept boxes that
    overlap any object; `pairs_on_objects`, that of pairs of which both boxes do. `by_neighbors`: precision [share][k]
    by the first `neighbors[k]` neighbours of each photo and the most similar pairs of each two photos, as many as
    `shares[share]` times the photo's boxes (at least one); `random_rois_by_neighbors`: likewise for random boxes, by
    neighbours alone.
    Raises InputError, having written nothing, where files do not belong together or no object is left.
    """
    manifest, proposals, found = artifacts.read_stage2(manifest_path, proposals_path, correspondences_path)
    offsets, k = np.array(proposals.box_offsets), found.neighbor.shape[1]
    row, box, category, left_out = objects_of(manifest, annotations)
    if (category < 0).any():
        named = ", ".join(map(str, annotations))
        raise InputError(f"{named}: has a box without category_id, which tells its class; correct the file.")

    kind = np.unique(category, return_inverse=True)[1]
    spans = zip(pairwise(offsets), pairwise(np.searchsorted(row, np.arange(len(manifest) + 1))), strict=True)
    bits = np.concatenate(  # one a class: of COCO's 5 million boxes and 80 classes, 50 MB
        [
            np.packbits(shown(proposals.box[c:d], box[a:b], kind[a:b], int(kind.max()) + 1), axis=1)
            for (c, d), (a, b) in track(spans, len(manifest), "photos")
        ]
    )

    def right(here: np.ndarray, there: np.ndarray) -> np.ndarray:
        """Whether two boxes, numbered from the first of the first photo on, show the same class."""
        return (bits[here] & bits[there]).any(-1)

    counts = np.diff(offsets)
    slot = np.repeat(np.arange(len(manifest) * k), np.diff(found.pair_offsets))
    query, rank = slot // k, slot % k
    other = np.asarray(found.neighbor).ravel()[slot]
    pair = np.asarray(found.pair, np.int64)
    ends = offsets[query] + pair[:, 0], offsets[other] + pair[:, 1]
    good, on_object = right(*ends), np.count_nonzero(bits, axis=1) > 0

    random = rng(config.seed, 3)  # as 1 in neighbours and 2 in pairs: streams of their own

    def drawn(of: np.ndarray) -> np.ndarray:
        """A random box of each photo."""
        return offsets[of] + random.integers(counts[of])

    here, there = drawn(np.tile([query, other], (-(-RANDOM // len(pair)), 1, 1))).swapaxes(0, 1)
    same_photos = right(here, there).mean(0)
    one = random.integers(len(manifest), size=max(RANDOM, len(pair)))
    two = (one + random.integers(1, len(manifest), size=len(one))) % len(manifest)  # another one
    neighbors = steps(k)
    place = np.arange(len(pair)) - np.asarray(found.pair_offsets)[slot]  # among the pairs of two photos
    made_with = json.loads(artifacts.attributes(correspondences_path).get("settings", "{}"))
    ratio = made_with.get("correspondences", {}).get("ratio", 1.0)
    shares = [share for share in SHARES if share < ratio] + [ratio]
    kept = [place < np.maximum(1, (share * counts[query]).astype(np.int64)) for share in shares]
    result = {
        "task": TASK,
        "model": model,
        "metrics": {
            "pairs": len(pair),
            "precision": float(good.mean()),
            "random_rois": float(same_photos.mean()),
            "random_photos": float(right(drawn(one), drawn(two)).mean()),
            "on_object": float(on_object.mean()),
            "pairs_on_objects": float((on_object[ends[0]] & on_object[ends[1]]).mean()),
            "neighbors": neighbors,
            "shares": shares,
            "by_neighbors": [[float(good[(rank < most) & some].mean()) for most in neighbors] for some in kept],
            "random_rois_by_neighbors": [float(same_photos[rank < most].mean()) for most in neighbors],
        },
        "settings": {**used(config, "pair_precision"), "made_with": made_with},
        "data": {
            "annotations": [os.fspath(path) for path in annotations],
            "annotations_fingerprints": [artifacts.fingerprint(path) for path in annotations],
            "correspondences_fingerprint": artifacts.fingerprint(correspondences_path),
            "photos": len(manifest),
            "photos_with_objects": len(np.unique(row)),
            "objects": len(box),
            "classes": int(kind.max()) + 1,
            **left_out,
        },
    }
    artifacts.write_json(output, result)
    return result
