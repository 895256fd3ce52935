"""Proposals: OpenCV's selective search, or boxes that do not look at the photo, and the release's greedy filter."""

import ctypes
import hashlib
from functools import partial

import cv2
import numpy as np

from orl import artifacts
from orl.config import Config, Proposals, used
from orl.data.manifest import load
from orl.data.views import iou
from orl.progress import track
from orl.workers import ordered

# Scale of selective search's first segmentation, and step to the next: OpenCV's default, and what finds as many large
# objects on a reduced photo (measured at a long side of 300 on 321 photos of COCO).
K, REDUCED_K = 150, 50


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


def selective_search(image: np.ndarray, seed: int, quality: bool = False, k: int = K) -> np.ndarray:
    """Boxes of OpenCV's selective search in its order: uint8 RGB [H, W, 3] -> int32 [m, 4], x y w h.

    The "fast" search, or the "quality" one: more colour spaces, segmentations and similarities, so more boxes and
    more time. `k`: scale of the first segmentation and step to the next; smaller ones start from smaller regions.
    The order depends on C's rand(); `seed` makes it repeatable on one platform.
    """
    cv2.setNumThreads(1)
    ctypes.CDLL(None).srand(seed)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))  # OpenCV's colour order
    if quality:
        search.switchToSelectiveSearchQuality(k, k)
    else:
        search.switchToSelectiveSearchFast(k, k)
    return np.asarray(search.process(), np.int32).reshape(-1, 4)


def reduced(image: np.ndarray, long_side: int | None) -> np.ndarray:
    """A photo [H, W, 3] made smaller, so that its longer side is at most `long_side`; each pixel is a mean of areas."""
    height, width = image.shape[:2]
    if long_side is None or max(height, width) <= long_side:
        return image
    factor = long_side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    cv2.setNumThreads(1)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def scaled(boxes: np.ndarray, size: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """Boxes int [m, 4] of a photo of `size` (width, height) on the same photo at the larger size `to`: int32 [m, 4].

    Edges go to the nearest pixel, so a box that reaches the border still does, and none vanishes.
    """
    sizes, whole = np.array(size), np.array(to)
    edges = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]).astype(np.int64)
    edges = (2 * edges * whole + sizes) // (2 * sizes)  # halves go up: rounding to even may close a gap of one pixel
    return np.concatenate([edges[0], edges[1] - edges[0]], 1).astype(np.int32)


def random_boxes(width: int, height: int, seed: int, count: int = 2000) -> np.ndarray:
    """`count` boxes int32 [count, 4] drawn so that every box of whole pixels inside the photo is equally likely.

    They are about as many as selective search finds in a photo of COCO.
    """
    rng = np.random.default_rng(seed)
    edges = []
    for length in (width, height):
        first, second = rng.integers(length + 1, size=count), rng.integers(length, size=count)
        edges.append((first, second + (second >= first)))  # two different ones of length + 1 edges
    low, high = np.min(edges, 1).T, np.max(edges, 1).T
    return np.concatenate([low, high - low], 1).astype(np.int32)


def grid_boxes(width: int, height: int) -> np.ndarray:
    """A regular grid of boxes, large ones first: int32 [m, 4].

    Areas are the photo's, halved time and again down to 1/64; aspects w / h are 1, 1/2 and 2, cut to the photo's
    sides. Boxes of one size lie evenly from border to border, at least two fifths of a side apart, so that two of
    them overlap by an IoU of 0.43 at most (before rounding); where only one fits, it lies in the middle.
    """

    def places(length: int, side: int) -> np.ndarray:
        count = 1 + int((length - side) / (0.4 * side))
        return np.linspace(0, length - side, count).round() if count > 1 else np.array([(length - side) // 2])

    boxes = []
    for halvings in range(7):
        for aspect in (1.0, 0.5, 2.0):
            area = width * height / 2**halvings
            w = max(1, min(width, round((area * aspect) ** 0.5)))
            h = max(1, min(height, round((area / aspect) ** 0.5)))
            boxes += [(x, y, w, h) for y in places(height, h) for x in places(width, w)]
    return np.array(boxes, np.int32)


def photo_seed(seed: int, image_id: str) -> int:
    """The seed of a photo's proposals: 31 bits of a hash of the run's seed and the photo's id."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:4]) >> 1


def raw_boxes(image: np.ndarray, section: Proposals, seed: int) -> np.ndarray:
    """The boxes of a photo, uint8 RGB [H, W, 3], before the filter, by the settings: int32 [m, 4], m at least 1.

    Selective search ("fast", "quality") runs on the photo reduced to `long_side`, where that is given; on a reduced
    photo it starts from smaller regions, REDUCED_K, else it finds too few. The other methods look at the photo's size
    alone. Where the search finds nothing, the whole photo.
    """
    height, width = image.shape[:2]
    whole = np.array([[0, 0, width, height]], np.int32)
    if section.method == "whole":
        return whole
    if section.method == "random":
        return random_boxes(width, height, seed)
    if section.method == "grid":
        return grid_boxes(width, height)
    small = reduced(image, section.long_side)
    quality = section.method == "quality"
    found = selective_search(small, seed, quality, K if small is image else REDUCED_K)
    return scaled(found, (small.shape[1], small.shape[0]), (width, height)) if len(found) else whole


def kept_boxes(image: np.ndarray, config: Config, image_id: str) -> np.ndarray:
    """The boxes of a photo, uint8 RGB [H, W, 3], that the filter keeps: int32 [n, 4], n at least 1."""
    limits = config.proposals
    raw = raw_boxes(image, limits, photo_seed(config.seed, image_id))
    min_size = max(limits.min_size, round(limits.min_share * min(image.shape[:2])))
    return filter_boxes(raw, min_size, limits.max_aspect, limits.max_iou, limits.top_n)


def _kept(config: Config, root: str, manifest: artifacts.Manifest, row: int) -> np.ndarray:
    """Kept boxes of the photo in a row."""
    return kept_boxes(load(root, manifest, row, config.data.exif), config, str(manifest.image_id[row]))


def propose(
    config: Config, root: str, manifest_path: str, output: str, workers: int = 1, shard: artifacts.Shard = None
) -> None:
    """Write proposals.h5, or a shard of it, with `workers` processes, on which the result does not depend.

    Raises InputError.
    """
    manifest = artifacts.read_manifest(manifest_path)
    inputs = {"manifest": artifacts.fingerprint(manifest_path)}
    part = artifacts.part(len(manifest), shard)
    kept = ordered(partial(_kept, config, root, manifest), part.rows, workers)
    boxes = list(track(kept, len(part.rows), "proposals"))
    flat = np.concatenate([np.empty((0, 4), np.int32), *boxes])
    settings, held = used(config, "proposals"), shard and part
    with artifacts.create(output, artifacts.PROPOSALS, settings, inputs, held, flat.nbytes // 2) as file:
        file["box"] = flat.astype(np.int16 if flat.max(initial=0) <= np.iinfo(np.int16).max else np.int32)
        file["box_offsets"] = np.cumsum([0, *map(len, boxes)], dtype=np.int64)
