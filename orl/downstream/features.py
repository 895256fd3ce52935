"""Backbone features of labelled photos: those of the linear SVMs, and those of k-NN."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize
from torch.utils.data import Dataset

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.ahead import read_ahead
from orl.data.classes import ClassSet
from orl.data.decode import Exif, Photo, center_crop, decode, resize_crop, short_side
from orl.data.labels import Labels, listed
from orl.networks import backbones
from orl.progress import track

BATCH = 32  # bounds memory: stage maps of ResNet-50 at 224 px take about 20 MB per photo
# Pooling of stage 1 to 5 at 224 px: side of the map, kernel, stride, padding (ORL release).
POOLING = {1: (112, 10, 10, 4), 2: (56, 16, 8, 0), 3: (28, 13, 5, 0), 4: (14, 8, 3, 0), 5: (7, 6, 1, 0)}
SIDES = {1: 12, 2: 6, 3: 4, 4: 3, 5: 2}  # of what it makes of them


def pool(maps: Tensor, stage: int) -> Tensor:
    """Average-pool the maps [B, C, H, W] of a stage to [B, C, S, S], S of SIDES (ORL release).

    Maps of other sizes than at 224 px: stage 5 with a kernel one smaller than the map, as there; the others into equal
    parts; no more of them than the map has pixels.
    """
    side, kernel, stride, padding = POOLING[stage]
    height, width = maps.shape[2:]
    if (height, width) == (side, side):
        return avg_pool2d(maps, kernel, stride, padding)
    if stage == 5:
        return avg_pool2d(maps, (max(height - 1, 1), max(width - 1, 1)), 1)
    return adaptive_avg_pool2d(maps, (min(height, SIDES[stage]), min(width, SIDES[stage])))


def squash(photo: Photo, resize: int, size: int) -> Photo:
    """Short side to `resize`, then squashed to `size` x `size`: uint8 [size, size, 3] (VOC07's protocol)."""
    photo = short_side(photo, resize)
    return resize_crop(photo, (0, 0, photo.shape[1], photo.shape[0]), (size, size))


def crop(photo: Photo, resize: int, size: int) -> Photo:
    """Short side to `resize`, then the centre crop: uint8 [size, size, 3]."""
    return center_crop(short_side(photo, resize), size)


class TestPhotos(Dataset):
    """Photos as they are tested, uint8 [3, size, size]: made by `squash` or `crop`."""

    __test__ = False  # no test, whatever pytest thinks of the name

    def __init__(
        self,
        root: str | os.PathLike,
        paths: Sequence[Path | str] | np.ndarray,
        view: Callable[[Photo, int, int], Photo],
        resize: int,
        size: int,
        exif: Exif,
    ) -> None:
        self.root, self.paths, self.view = root, paths, view
        self.resize, self.size, self.exif = resize, size, exif

    def file(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        photo = self.view(decode(self.file(index), self.exif), self.resize, self.size)
        return torch.from_numpy(photo).permute(2, 0, 1)


def by_stage(stages: Sequence[int]) -> Callable[[list[Tensor]], list[Tensor]]:
    """What makes the SVM's features of the five maps: of each stage [B, C * S * S], channels outermost."""
    return lambda maps: [pool(maps[stage - 1], stage).flatten(1) for stage in stages]


def pooled(maps: list[Tensor]) -> list[Tensor]:
    """The mean of the last map, as unit rows [B, C]."""
    return [normalize(maps[-1].mean((2, 3)))]


def extract(
    weights: str | os.PathLike,
    photos: TestPhotos,
    features: Callable[[list[Tensor]], list[Tensor]],
    workers: int,
) -> Iterator[list[np.ndarray]]:
    """What `features` makes of the backbone's maps, batch by batch, float32; in eval mode, float32 without TF32.

    `workers` processes decode (0: this one); they do not change the result.
    Raises InputError: unreadable weights or photo, features that are not finite.
    """
    device = backbones.device()
    model = backbones.load(weights).to(device)
    loader = read_ahead(photos, range(len(photos)), BATCH, workers, BATCH * 3 * photos.size**2, device)
    start = 0
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        for images in track(loader, -(-len(photos) // BATCH), "features"):
            batch = [part.cpu().numpy() for part in features(model.stages(backbones.normalize(images.to(device))))]
            bad = np.flatnonzero(~np.logical_and.reduce([np.isfinite(part).all(1) for part in batch]))
            if len(bad):
                path = photos.file(start + int(bad[0]))
                raise InputError(f"{weights}: its features of {path} are not finite; train or export the model again.")
            start += len(images)
            yield batch


def _write(
    output: str | os.PathLike,
    schema: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    weights: str | os.PathLike,
    splits: dict[str, TestPhotos],
    names: Sequence[str],
    features: Callable[[list[Tensor]], list[Tensor]],
    kind: str,
    workers: int,
) -> None:
    """Write datasets, named by `names` with the split's name put in, of each of the arrays that `features` makes."""
    side = next(iter(splits.values())).size
    with torch.inference_mode():
        widths = [part.shape[1] for part in features(backbones.load(weights).stages(torch.zeros(1, 3, side, side)))]
    size = sum(map(len, splits.values())) * sum(widths) * np.dtype(kind).itemsize
    with artifacts.create(output, schema, settings, inputs, size=size) as file:
        for split, photos in splits.items():
            shapes = [(len(photos), width) for width in widths]
            data = [
                file.create_dataset(name.format(split), shape, kind) for name, shape in zip(names, shapes, strict=True)
            ]
            start = 0
            for batch in extract(weights, photos, features, workers):
                for dataset, rows in zip(data, batch, strict=True):
                    dataset[start : start + len(rows)] = rows
                start += len(batch[0])


def write_labels(
    config: Config, weights: str | os.PathLike, output: str | os.PathLike, workers: int, train: Labels, test: Labels
) -> None:
    """Write the SVMs' features of both splits (artifacts.Features). Raises InputError."""
    section = config.downstream.voc07_svm
    options = (squash, section.resize, section.size, config.data.exif)
    splits = {"train": TestPhotos("", train.image_path, *options), "test": TestPhotos("", test.image_path, *options)}
    inputs = {"weights": artifacts.fingerprint(weights), "photo list": listed(train, test)}
    names = [f"{{}}_{stage}" for stage in section.stages]
    settings, features = used(config, "features"), by_stage(section.stages)
    _write(output, artifacts.FEATURES, settings, inputs, weights, splits, names, features, "f4", workers)


def write_set(
    config: Config,
    name: str,
    weights: str | os.PathLike,
    output: str | os.PathLike,
    workers: int,
    train: ClassSet,
    val: ClassSet,
) -> None:
    """Write the pooled features of the labelled set `name` (artifacts.ClassFeatures). Raises InputError.

    For ImageNet and a ResNet-50 they take 5.5 GB.
    """
    section = config.downstream.knn
    options = (crop, section.resize, section.size, config.data.exif)
    splits = {"train": TestPhotos(train.root, train.path, *options), "val": TestPhotos(val.root, val.path, *options)}
    inputs = {"weights": artifacts.fingerprint(weights), "train": train.fingerprint(), "val": val.fingerprint()}
    settings = used(config, f"set_features.{name}")
    _write(output, artifacts.CLASS_FEATURES, settings, inputs, weights, splits, ["{}"], pooled, "f2", workers)
