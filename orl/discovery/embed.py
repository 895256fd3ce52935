"""Image embeddings by the online network of stage 1."""

import numpy as np
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.decode import center_crop, short_side
from orl.data.manifest import load
from orl.networks import backbones
from orl.networks.ema import load_encoder
from orl.progress import track

BATCH = 64


class _Photos(Dataset):
    """Photos for embedding, uint8 [crop, crop, 3]."""

    def __init__(self, config: Config, root: str, manifest: artifacts.Manifest) -> None:
        self.config, self.root, self.manifest = config, root, manifest

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, row: int) -> np.ndarray:
        photo = load(self.root, self.manifest, row, self.config.data.exif)
        return center_crop(short_side(photo, self.config.embeddings.resize), self.config.embeddings.crop)


@torch.inference_mode()
def embed(config: Config, root: str, manifest_path: str, model_path: str, output: str, workers: int = 0) -> None:
    """Write embeddings.h5: the projector's output for each photo's centre crop, unit rows, float32.

    Of weights without a projector, the pooled features. `model_path` is a model.safetensors. Raises InputError.
    """
    manifest = artifacts.read_manifest(manifest_path)
    device = backbones.device()
    model = load_encoder(model_path).to(device)
    inputs = {name: artifacts.fingerprint(path) for name, path in (("manifest", manifest_path), ("model", model_path))}
    photos = DataLoader(_Photos(config, root, manifest), BATCH, num_workers=workers)
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, artifacts.create(output, artifacts.EMBEDDINGS, used(config, "embeddings"), inputs) as file:
        width = model.network.projection if model.head else model.backbone.features
        rows = file.create_dataset("embedding", (len(manifest), width), np.float32)
        start = 0
        for batch in track(photos, len(photos), "embeddings, batches"):
            projection = model(backbones.normalize(batch.to(device).permute(0, 3, 1, 2)))
            if not projection.isfinite().all():
                raise InputError(f"{model_path}: gives embeddings that are not finite; train it again.")
            rows[start : start + len(batch)] = normalize(projection).cpu().numpy()
            start += len(batch)
