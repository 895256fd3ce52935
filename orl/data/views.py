"""Geometry of views: crops, jittered boxes, overlap. Boxes are x y w h in pixels."""

from math import exp, log, sqrt

import numpy as np

Box = tuple[int, int, int, int]


def rng(*key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone, for instance (seed, epoch, image, view)."""
    return np.random.default_rng(key)


def iou(box: np.ndarray | Box, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box [4] with each of boxes [n, 4] -> float64 [n]."""
    x, y, w, h = (float(side) for side in box)
    boxes = np.asarray(boxes, np.float64)
    width = np.minimum(x + w, boxes[:, 0] + boxes[:, 2]) - np.maximum(x, boxes[:, 0])
    height = np.minimum(y + h, boxes[:, 1] + boxes[:, 3]) - np.maximum(y, boxes[:, 1])
    intersection = width.clip(0) * height.clip(0)
    return intersection / (w * h + boxes[:, 2] * boxes[:, 3] - intersection)


def random_resized_crop(
    image_size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random crop of an image of size (width, height), as torchvision's RandomResizedCrop draws it.

    Ten tries of area and log-uniform aspect; then the largest central crop within the aspect's bounds.
    """
    width, height = image_size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = exp(rng.uniform(log(ratio[0]), log(ratio[1])))
        w, h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def jitter_box(
    box: Box,
    image_size: tuple[int, int],
    rng: np.random.Generator,
    shift: float = 0.5,
    scale: tuple[float, float] = (0.5, 2.0),
    ratio: tuple[float, float] = (0.5, 2.0),
    min_iou: float = 0.5,
    attempts: int = 200,
) -> Box:
    """A jittered copy of a RoI in an image of size (width, height) (ORL release, stage 3).

    Each try draws the area relative to the RoI's, an absolute log-uniform aspect w / h, and a shift of the centre
    in RoI sides; it counts when inside the image, borders included, and its IoU with the RoI is above `min_iou`.
    After `attempts` tries the RoI itself.
    """
    x, y, w, h = box
    width, height = image_size
    for _ in range(attempts):
        area = w * h * rng.uniform(*scale)
        aspect = exp(rng.uniform(log(ratio[0]), log(ratio[1])))
        new_w, new_h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        new_x = round(x + w / 2 + rng.uniform(-shift, shift) * w - new_w / 2)
        new_y = round(y + h / 2 + rng.uniform(-shift, shift) * h - new_h / 2)
        new = (new_x, new_y, new_w, new_h)
        inside = new_x >= 0 and new_y >= 0 and new_x + new_w <= width and new_y + new_h <= height
        if inside and iou(box, np.array([new]))[0] > min_iou:
            return new
    return box
