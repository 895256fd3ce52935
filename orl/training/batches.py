"""Batches of samples, cut on the CPU by worker processes.

A sample's key is (epoch, row), and its random numbers derive from (seed, epoch, row, view), so that neither the number
of workers nor an interruption changes a sample.
"""

import os
import signal
from collections.abc import Iterator
from ctypes import Array
from multiprocessing import get_context
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from orl import InputError
from orl.data.views import rng
from orl.workers import check_shared_memory

ORDER = 100  # a number that no view has: of an epoch's order
PREFETCH = 2  # batches that each worker prepares ahead


class Batches(Sampler[list[tuple[int, int]]]):
    """This process's batches of keys from optimizer step `start` on; an epoch's last, smaller batch is dropped.

    A step's `batch` photos are cut into `parts` (gradient accumulation), and each part among the `size` processes.
    """

    def __init__(
        self,
        photos: int,
        batch: int,
        epochs: int,
        seed: int,
        start: int = 0,
        parts: int = 1,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.photos, self.batch, self.epochs, self.seed, self.start = photos, batch, epochs, seed, start
        self.parts, self.rank, self.size = parts, rank, size
        self.steps_per_epoch = photos // batch

    def __len__(self) -> int:
        return (self.steps_per_epoch * self.epochs - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.start // self.steps_per_epoch, self.epochs):
            order = rng(self.seed, epoch, 0, ORDER).permutation(self.photos)
            first = max(0, self.start - epoch * self.steps_per_epoch)
            for step in range(first, self.steps_per_epoch):
                rows = order[step * self.batch : (step + 1) * self.batch].reshape(self.parts, self.size, -1)
                for part in rows[:, self.rank]:
                    yield [(epoch, int(row)) for row in part]


class Samples(Dataset):
    """Samples by key, cut from photos; a subclass has __len__ (photos), __getitem__, and these two."""

    at: Array | None = None  # where each worker notes the row that it is at
    collate: Any = None  # makes a batch of samples; None: each of their parts stacked

    def file(self, row: int) -> str:
        """Path of a row's photo."""
        raise NotImplementedError

    def bytes_per_photo(self) -> int:
        """Size of a sample's views."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def note(self, row: int) -> None:
        """Note the row that this worker is at, to be named should it die."""
        if self.at and (worker := get_worker_info()):
            self.at[worker.id] = row


class Loader:
    """Batches in order, as `samples` gives them: views uint8 [B, S, S, 3] each, float32 parameters, and so on.

    Inside a `with`, whose end also ends the worker processes. Raises InputError: too little shared memory, or a
    worker that dies (out of memory, a fault in a library), with the photo that it was at.
    """

    def __init__(self, samples: Samples, batches: Batches, workers: int, pin: bool) -> None:
        self.samples = samples
        self.at = get_context("fork").RawArray("q", max(1, workers))  # the row that each worker is at
        samples.at = self.at
        if workers:
            photos = batches.batch // batches.parts // batches.size
            beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each of the machine's processes has as many
            needed = samples.bytes_per_photo() * photos * (PREFETCH * workers + 1) * beside
            check_shared_memory(needed, workers * beside)
        self.loader = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=samples.collate,
            pin_memory=pin,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_start_worker,
        )

    def __enter__(self) -> Iterator[list]:
        self.found: Any = iter(self.loader)
        return self.found

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not self.loader.num_workers:
            return
        dead = [number for number, worker in enumerate(self.found._workers) if not worker.is_alive()]
        self.found._shutdown_workers()  # else Python waits for workers as long as they heed no SIGTERM
        if isinstance(error, RuntimeError) and dead:
            raise InputError(
                f"{self.samples.file(self.at[dead[0]])}: a worker process died at this photo (or its neighbour), for "
                f"want of memory or by a fault in decoding; use fewer --threads or remove the photo."
            ) from None


def _start_worker(_: int) -> None:
    # A cluster signals every process of a job: the workers must serve until the main one has saved (20 s at most).
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
