"""A network in eval mode, applied to pictures in batches: unit rows."""

import os
import sys
from collections.abc import Sequence

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from orl import InputError
from orl.networks import MEAN, STD, backbones

BATCH = 64


def whole_batches(numbers: range, total: int) -> range:
    """The least range of whole batches of `total` pictures that holds `numbers`.

    How a batch is rounded depends on what is in it: shards whose batches are those of a single run equal it bit by bit.
    """
    if not numbers:
        return numbers
    return range(numbers.start // BATCH * BATCH, min(-(-numbers.stop // BATCH) * BATCH, total))


class Encoder:
    """A network on `device`, by default the first GPU, else the CPU, whose output it makes unit rows.

    `precision`: auto (float16 on a GPU, else float32), float32, bfloat16 or float16. Where a GPU's memory is too small
    for a batch, that one and all that follow are cut into halves. `path` is the file of the weights, for messages;
    `mean` and `std` are those of the pixels, of 0 to 1.
    """

    def __init__(
        self,
        network: nn.Module,
        path: str | os.PathLike,
        precision: str,
        device: torch.device | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.device = device or backbones.device()
        self.mean, self.std = mean, std
        on_gpu = self.device.type == "cuda"
        self.network, self.path = network.to(self.device), path
        if on_gpu:
            self.network.to(memory_format=torch.channels_last)
        name = {"auto": "float16" if on_gpu else "float32"}.get(precision, precision)
        self.autocast = torch.autocast(self.device.type, getattr(torch, name), enabled=name != "float32")
        self.most = BATCH  # pictures at a time

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, names: Sequence[str] | np.ndarray) -> np.ndarray:
        """Float32 [n, D] of uint8 [n, H, W, 3]; `names` are for messages. Raises InputError: not finite, or all 0."""
        while True:
            try:
                with self.autocast, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    parts = pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2).split(self.most)
                    inputs = (backbones.normalize(part, self.mean, self.std) for part in parts)
                    found = torch.cat([self.network(part).float() for part in inputs])
                break
            except torch.OutOfMemoryError:
                if self.most == 1:
                    raise InputError("the GPU has too little memory for a single picture; use another one.") from None
            self.most = min(self.most, len(pictures)) // 2
            torch.cuda.empty_cache()
            print(f"the GPU's memory is too small: going on with {self.most} pictures at a time", file=sys.stderr)
        rows = normalize(found).cpu().numpy()
        bad = np.flatnonzero(~(np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-3))
        if len(bad):
            what = "nothing but zeros" if (rows[bad[0]] == 0).all() else "features that are not finite"
            raise InputError(f"{self.path}: gives {what} for {names[bad[0]]}; train it again, or set precision to "
                             f"float32.")  # fmt: skip
        return rows


def put(dataset: h5py.Dataset, held: range, start: int, rows: np.ndarray) -> None:
    """Write rows `start`, … of the whole into the dataset of a shard that holds those of `held`."""
    first, last = max(start, held.start), min(start + len(rows), held.stop)
    dataset[first - held.start : last - held.start] = rows[first - start : last - start]
