"""RoI features: each kept RoI is embedded once, whoever's neighbour its photo is."""

import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from orl import artifacts
from orl.config import Config, used
from orl.data.ahead import read_ahead
from orl.data.decode import Photo, resize_crop
from orl.data.manifest import load
from orl.discovery import encode
from orl.networks import backbones
from orl.progress import track


class _Crops(Dataset):
    """Crops of a photo, which is decoded once: those of its RoIs whose number is in `numbers`, uint8 [n, S, S, 3]."""

    def __init__(
        self, config: Config, root: str, manifest: artifacts.Manifest, found: artifacts.Proposals, numbers: range
    ) -> None:
        self.config, self.root, self.manifest, self.found, self.numbers = config, root, manifest, found, numbers

    def __getitem__(self, row: int) -> np.ndarray:
        photo = load(self.root, self.manifest, row, self.config.data.exif)
        first, last = self.found.box_offsets[row : row + 2]
        boxes = self.found.box[max(first, self.numbers.start) : min(last, self.numbers.stop)].tolist()
        return cut(photo, boxes, self.config.rois.size)


def cut(photo: Photo, boxes: list, size: int) -> np.ndarray:
    """The crops of boxes (x, y, w, h) of a photo [H, W, 3], resized: uint8 [n, size, size, 3]."""
    crops = np.empty((len(boxes), size, size, 3), np.uint8)
    for crop, (x, y, w, h) in zip(crops, boxes, strict=True):
        crop[:] = resize_crop(photo, (x, y, w, h), (size, size))
    return crops


def _batches(crops: Iterable[Tensor], size: int, pin: bool) -> Iterator[Tensor]:
    """The crops of many photos in batches that are full, the last one apart; each is overwritten by the next."""
    batch, filled = torch.empty((encode.BATCH, size, size, 3), dtype=torch.uint8, pin_memory=pin), 0
    for found in crops:
        for piece in found.tensor_split(tuple(range(encode.BATCH - filled, len(found), encode.BATCH))):
            batch[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == encode.BATCH:
                yield batch
                filled = 0
    if filled:
        yield batch[:filled]


def rois(
    config: Config,
    root: str,
    manifest_path: str,
    proposals_path: str,
    backbone_path: str,
    output: str,
    workers: int = 0,
    shard: artifacts.Shard = None,
) -> None:
    """Write rois.h5, or a shard of it: pooled backbone features of every proposal, unit rows, float16.

    `workers` processes cut the crops (0: this one). Shards and workers do not change the rows. Raises InputError and,
    before it begins, NoRoomError.
    """
    manifest, found = artifacts.read_boxes(manifest_path, proposals_path)
    offsets = found.box_offsets
    model = backbones.load(backbone_path)
    named = (("manifest", manifest_path), ("proposals", proposals_path), ("backbone", backbone_path))
    inputs = {name: artifacts.fingerprint(path) for name, path in named}
    part = artifacts.part(len(manifest), shard)
    own = range(int(offsets[part.start]), int(offsets[part.stop]))
    size, row_bytes = config.rois.size, model.features * 2
    whole = f", of {len(found.box) * row_bytes / 1e9:.2f} GB in all" if shard else ""
    print(f"rois: {len(own)} RoIs, {len(own) * row_bytes / 1e9:.2f} GB on disk{whole}", file=sys.stderr)

    numbers = encode.whole_batches(own, len(found.box))
    first, last = np.searchsorted(offsets, (numbers.start, numbers.stop - 1), "right") - 1 if own else (0, -1)
    photos = range(int(first), int(last) + 1)
    encoder = encode.Encoder(model, backbone_path, config.rois.precision)
    most = int(np.diff(offsets).max()) * size**2 * 3
    crops = _Crops(config, root, manifest, found, numbers)
    read = read_ahead(crops, photos, None, workers, most, encoder.device)
    settings, held = used(config, "rois"), shard and part
    with artifacts.create(output, artifacts.ROIS, settings, inputs, held, len(own) * row_bytes) as file:
        rows = file.create_dataset("feature", (len(own), model.features), np.float16)
        batches = _batches(track(read, len(photos), "rois, photos"), size, encoder.device.type == "cuda")
        for start, batch in zip(numbers[:: encode.BATCH], batches, strict=True):
            of = np.searchsorted(offsets, np.arange(start, start + len(batch)), "right") - 1
            encode.put(rows, own, start, encoder(batch, manifest.path[of]))
