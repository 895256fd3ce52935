"""Proposals: OpenCV's selective search and the release's greedy filter."""

import ctypes
import hashlib
from functools import partial

import cv2
import numpy as np

from orl import artifacts
from orl.config import Config, used
from orl.data.manifest import load
from orl.data.views import iou
from orl.progress import track
from orl.workers import ordered


def filter_boxes(
    boxes: np.ndarray, min_size: int = 96, max_aspect: float = 3.0, max_iou: float = 0.5, top_n: int = 100
) -> np.ndarray:
    """Keep boxes greedily, in the order given (ORL release, stage 2).

    `boxes`: int [m, 4], x y w h. A box is dropped if its width or height is below `min_size`, its aspect (either
    way) above `max_aspect`, or its IoU with a box already kept above `max_iou`; at most `top_n` are kept.
    Returns int [n, 4]; where no box passes, the first one alone; of no boxes, none.
    """
    boxes = np.asarray(boxes).reshape(-1, 4)
    w, h = boxes[:, 2].astype(np.int64), boxes[:, 3].astype(np.int64)
    large = (w >= max(1, min_size)) & (h >= max(1, min_size))
    passed, w, h = boxes[large], w[large], h[large]
    passed = passed[(w / h <= max_aspect) & (h / w <= max_aspect)]
    kept: list[np.ndarray] = []
    while len(passed) and len(kept) < top_n:
        kept.append(passed[0])
        passed = passed[1:][iou(passed[0], passed[1:]) <= max_iou]
    return np.array(kept, boxes.dtype) if kept else boxes[:1]


def selective_search(image: np.ndarray, seed: int) -> np.ndarray:
    """Boxes of OpenCV's "fast" selective search in its order: uint8 RGB [H, W, 3] -> int32 [m, 4], x y w h.

    The order depends on C's rand(); `seed` makes it repeatable on one platform.
    """
    cv2.setNumThreads(1)
    ctypes.CDLL(None).srand(seed)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))  # OpenCV's colour order
    search.switchToSelectiveSearchFast()
    return np.asarray(search.process(), np.int32).reshape(-1, 4)


def photo_seed(seed: int, image_id: str) -> int:
    """The seed of a photo's selective search: 31 bits of a hash of the run's seed and the photo's id."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:4]) >> 1


def _kept(config: Config, root: str, manifest: artifacts.Manifest, row: int) -> np.ndarray:
    """Kept boxes of the photo in a row."""
    image = load(root, manifest, row, config.data.exif)
    raw = selective_search(image, photo_seed(config.seed, str(manifest.image_id[row])))
    if len(raw) == 0:
        return np.array([[0, 0, image.shape[1], image.shape[0]]], np.int32)
    return filter_boxes(raw, **config.proposals.model_dump())


def propose(
    config: Config, root: str, manifest_path: str, output: str, workers: int = 1, shard: artifacts.Shard = None
) -> None:
    """Write proposals.h5, or a shard of it, with `workers` processes, on which the result does not depend.

    Raises InputError.
    """
    manifest = artifacts.read_manifest(manifest_path)
    inputs = {"manifest": artifacts.fingerprint(manifest_path)}
    part = artifacts.part(len(manifest), shard)
    kept = ordered(partial(_kept, config, root, manifest), part.rows, workers, chunk=4)
    boxes = list(track(kept, len(part.rows), "proposals"))
    flat = np.concatenate([np.empty((0, 4), np.int32), *boxes])
    settings, held = used(config, "proposals"), shard and part
    with artifacts.create(output, artifacts.PROPOSALS, settings, inputs, held, flat.nbytes // 2) as file:
        file["box"] = flat.astype(np.int16 if flat.max(initial=0) <= np.iinfo(np.int16).max else np.int32)
        file["box_offsets"] = np.cumsum([0, *map(len, boxes)], dtype=np.int64)
