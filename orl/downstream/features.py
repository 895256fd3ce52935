"""Backbone features of labelled photos, as the linear SVM uses them."""

import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from orl import InputError
from orl.data.decode import Exif, decode, resize_crop, short_side
from orl.data.labels import Labels
from orl.networks import backbones
from orl.progress import track

BATCH = 32  # bounds memory: stage maps of ResNet-50 at 224 px take about 20 MB per photo


class _Photos(Dataset):
    """Photos squashed to a square, uint8 [3, size, size]."""

    def __init__(self, paths: tuple[Path, ...], size: int, resize: int, exif: Exif) -> None:
        self.paths, self.size, self.resize, self.exif = paths, size, resize, exif

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = short_side(decode(self.paths[index], self.exif), self.resize)
        height, width = image.shape[:2]
        squashed = resize_crop(image, (0, 0, width, height), (self.size, self.size))
        return torch.from_numpy(squashed).permute(2, 0, 1)


def pool(maps: torch.Tensor) -> torch.Tensor:
    """Average-pool maps [B, C, H, W] to [B, C * 4], channels outermost (ORL release, stage 5).

    The kernel is one smaller than the map and moves by 1: at 224 px 6x6 on 7x7. A map of one pixel gives [B, C].
    """
    kernel = (max(maps.shape[2] - 1, 1), max(maps.shape[3] - 1, 1))
    return torch.nn.functional.avg_pool2d(maps, kernel, 1).flatten(1)


def extract(
    weights: str | os.PathLike,
    labels: Labels,
    size: int,
    resize: int,
    exif: Exif,
    workers: int,
) -> np.ndarray:
    """Features of the photos of `labels`, float32 [n, 4 * D], in their order.

    Each photo is resized to short side `resize` (pixels), then squashed to `size` x `size`; the last map of the
    backbone in eval mode, float32 without TF32, is pooled by `pool` (D = 2048 for ResNet-50).
    `workers` processes decode (0: this one); they do not change the result.
    Raises InputError: unreadable weights or photo, features that are not finite.
    """
    device = backbones.device()
    model = backbones.load(weights).to(device)
    photos = _Photos(labels.image_path, size, resize, exif)
    loader = DataLoader(photos, BATCH, num_workers=workers, pin_memory=device.type == "cuda")
    features = np.empty((0, 0), np.float32)
    start = 0
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        for images in track(loader, len(loader), "features"):
            batch = pool(model.stages(backbones.normalize(images.to(device)))[-1]).cpu().numpy()
            bad = np.flatnonzero(~np.isfinite(batch).all(1))
            if len(bad):
                path = labels.image_path[start + bad[0]]
                raise InputError(f"{weights}: its features of {path} are not finite; train or export the model again.")
            if start == 0:  # the whole array at once, now that its width is known
                features = np.empty((len(labels), batch.shape[1]), np.float32)
            features[start : start + len(batch)] = batch
            start += len(batch)
    return features
