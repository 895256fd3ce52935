"""Pictures read ahead by worker processes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from orl import InputError
from orl.workers import check_shared_memory

PREFETCH = 2  # items that each worker process holds ready


def read_ahead(
    pictures: Dataset, rows: range, batch: int | None, workers: int, size: int, device: torch.device
) -> Iterator[Any]:
    """What `pictures` has for `rows`, in order, read by worker processes (0: this one), in batches if not None.

    `size`: bytes that an item or a batch may take. Raises InputError when a worker dies or shared memory is too small.
    """
    if workers:
        check_shared_memory(size * (PREFETCH * workers + 1), workers)
    found = DataLoader(
        pictures,
        batch,
        sampler=rows,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=device.type == "cuda",
    )
    try:
        yield from found
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError("a worker process died, likely out of memory; use fewer of them (--threads).") from None
