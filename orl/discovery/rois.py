"""RoI features: each kept RoI is embedded once, whoever's neighbour its photo is."""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.decode import resize_crop
from orl.data.manifest import load
from orl.networks import backbones
from orl.progress import track

BATCH = 64


class _Crops(IterableDataset):
    """Crops of RoIs uint8 [size, size, 3] in the order of the boxes, in full batches across photos.

    Worker w of W makes batches w, w + W, …, which the loader takes in turn; a photo is decoded once per batch
    that its RoIs reach into.
    """

    def __init__(self, config: Config, root: str, manifest: artifacts.Manifest, found: artifacts.Proposals) -> None:
        self.config, self.root, self.manifest, self.found = config, root, manifest, found

    def __iter__(self) -> Iterator[np.ndarray]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for first in range(offset * BATCH, len(self.found.box), stride * BATCH):
            numbers = np.arange(first, min(first + BATCH, len(self.found.box)))
            rows = np.searchsorted(self.found.box_offsets, numbers, side="right") - 1
            crops = []
            for row in np.unique(rows):
                photo = load(self.root, self.manifest, int(row), self.config.data.exif)
                for number in numbers[rows == row]:
                    x, y, w, h = self.found.box[number].tolist()
                    crops.append(resize_crop(photo, (x, y, w, h), (self.config.rois.size, self.config.rois.size)))
            yield np.stack(crops)


@torch.inference_mode()
def rois(
    config: Config,
    root: str,
    manifest_path: str,
    proposals_path: str,
    backbone_path: str,
    output: str,
    workers: int = 0,
) -> None:
    """Write rois.h5: pooled backbone features of every proposal, unit rows, float16. Raises InputError."""
    manifest, found = artifacts.read_manifest(manifest_path), artifacts.read_proposals(proposals_path)
    artifacts.check_rows(proposals_path, len(found.box_offsets) - 1, len(manifest), manifest_path)
    artifacts.check_input(proposals_path, "manifest", artifacts.fingerprint(manifest_path))
    sizes = np.repeat(np.stack([manifest.width, manifest.height], 1), np.diff(found.box_offsets), axis=0)
    if not (found.box[:, :2] + found.box[:, 2:].astype(np.int64) <= sizes).all():
        raise InputError(f"{proposals_path}: holds boxes outside their photos; make it again.")
    device = backbones.device()
    model = backbones.load(backbone_path).to(device)
    named = (("manifest", manifest_path), ("proposals", proposals_path), ("backbone", backbone_path))
    inputs = {name: artifacts.fingerprint(path) for name, path in named}
    count = len(found.box)
    print(f"rois: {count} RoIs, {count * model.features * 2 / 1e9:.2f} GB on disk", file=sys.stderr)
    crops = DataLoader(_Crops(config, root, manifest, found), batch_size=None, num_workers=workers)
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, artifacts.create(output, artifacts.ROIS, used(config, "rois"), inputs) as file:
        rows = file.create_dataset("feature", (count, model.features), np.float16)
        start = 0
        for batch in track(crops, -(-count // BATCH), "rois, batches"):
            feature = model(backbones.normalize(batch.to(device).permute(0, 3, 1, 2)))
            if not feature.isfinite().all():
                raise InputError(f"{backbone_path}: gives features that are not finite; train it again.")
            rows[start : start + len(batch)] = normalize(feature).half().cpu().numpy()
            start += len(batch)
