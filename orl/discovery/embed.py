"""Image embeddings by the online network of stage 1."""

import numpy as np
from torch.utils.data import Dataset

from orl import artifacts
from orl.config import Config, Embeddings, used
from orl.data.ahead import read_ahead
from orl.data.decode import Photo, center_crop, short_side
from orl.data.manifest import load
from orl.discovery import encode
from orl.networks.ema import load_encoder
from orl.progress import track


class _Photos(Dataset):
    """Photos for embedding, uint8 [crop, crop, 3]."""

    def __init__(self, config: Config, root: str, manifest: artifacts.Manifest) -> None:
        self.config, self.root, self.manifest = config, root, manifest

    def __getitem__(self, row: int) -> np.ndarray:
        return picture(load(self.root, self.manifest, row, self.config.data.exif), self.config.embeddings)


def picture(photo: Photo, section: Embeddings) -> Photo:
    """What of a photo [H, W, 3] is embedded: uint8 [crop, crop, 3]."""
    return center_crop(short_side(photo, section.resize), section.crop)


def embed(
    config: Config,
    root: str,
    manifest_path: str,
    model_path: str,
    output: str,
    workers: int = 0,
    shard: artifacts.Shard = None,
) -> None:
    """Write embeddings.h5, or a shard of it: the projector's output for each photo's centre crop, unit rows, float32.

    Of weights without a projector, the pooled features. `model_path` is a model.safetensors; `workers` processes read
    the photos (0: this one). Shards and workers do not change the rows. Raises InputError.
    """
    manifest = artifacts.read_manifest(manifest_path)
    model = load_encoder(model_path)
    width = model.network.projection if model.head else model.backbone.features
    inputs = {name: artifacts.fingerprint(path) for name, path in (("manifest", manifest_path), ("model", model_path))}
    part = artifacts.part(len(manifest), shard)
    asked, encoder = config.embeddings, encode.Encoder(model, model_path, config.embeddings.precision)
    numbers = encode.whole_batches(part.rows, len(manifest))
    size = encode.BATCH * asked.crop**2 * 3
    photos = read_ahead(_Photos(config, root, manifest), numbers, encode.BATCH, workers, size, encoder.device)
    settings, held = used(config, "embeddings"), shard and part
    with artifacts.create(output, artifacts.EMBEDDINGS, settings, inputs, held, len(part.rows) * width * 4) as file:
        rows = file.create_dataset("embedding", (len(part.rows), width), np.float32)
        starts = numbers[:: encode.BATCH]
        for start, batch in zip(starts, track(photos, len(starts), "embeddings, batches"), strict=True):
            encode.put(rows, part.rows, start, encoder(batch, manifest.path[start : start + len(batch)]))
