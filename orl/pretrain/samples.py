"""Samples of stage 1 and stage 3: uint8 views cut on the CPU, with the parameters of their augmentation.

Every random number derives from (seed, epoch, photo, view), so that neither the number of workers nor an
interruption changes a sample. A sample's key is (epoch, row of the manifest).
"""

import os
import signal
from collections.abc import Iterator
from ctypes import Array
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from orl import InputError
from orl.artifacts import Correspondences, Manifest, Proposals
from orl.config import Stage1, Stage3
from orl.data.decode import Exif, resize_crop
from orl.data.manifest import load
from orl.data.views import Box, jitter_box, random_resized_crop, rng
from orl.pretrain.augment import draw
from orl.workers import check_shared_memory

Sample = tuple[tuple[np.ndarray, ...], np.ndarray]
ORDER, CHOICE, SHUFFLE = 100, 101, 102  # numbers that no view has: of an epoch's order, a sample's choices, MoCo
PREFETCH = 2  # batches that each worker prepares ahead


class Cut(NamedTuple):
    """A view to be cut from the photo of a row: its box there, side in pixels, and augmentation parameters."""

    row: int
    box: Box
    side: int
    parameters: np.ndarray


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


class ImageViews(Dataset):
    """Stage 1: two crops of a photo, uint8 [S, S, 3] each, and augmentation parameters float32 [2, columns]."""

    def __init__(self, root: str, manifest: Manifest, exif: Exif, settings: Stage1 | Stage3, seed: int) -> None:
        self.root, self.manifest, self.exif = root, manifest, exif
        self.settings, self.seed = settings, seed
        self.at: Array | None = None  # where each worker notes the row that it is at

    def bytes_per_photo(self) -> int:
        """Size of a sample's views."""
        return 2 * 3 * self.settings.views.size**2

    def photo(self, row: int, reduce: int = 1) -> np.ndarray:
        if self.at and (worker := get_worker_info()):
            self.at[worker.id] = row
        return load(self.root, self.manifest, row, self.exif, reduce)

    def size(self, row: int) -> tuple[int, int]:
        return int(self.manifest.width[row]), int(self.manifest.height[row])

    def global_views(self, epoch: int, row: int) -> list[Cut]:
        """Views 0 and 1: random resized crops, each with the augmentation of its recipe."""
        views, cuts = self.settings.views, []
        for view in (0, 1):
            random = rng(self.seed, epoch, row, view)
            box = random_resized_crop(self.size(row), random, views.scale, views.ratio)
            cuts.append(Cut(row, box, views.size, draw(views, view, random)))
        return cuts

    def sample(self, cuts: list[Cut]) -> Sample:
        """The pixels of the cuts, each photo decoded once."""
        photos = {}
        for row in dict.fromkeys(cut.row for cut in cuts):
            spare = min(min(cut.box[2:]) / cut.side for cut in cuts if cut.row == row)
            reduce = max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))
            photos[row] = self.photo(row, reduce if self.settings.views.reduced_decode else 1)
        images = tuple(
            resize_crop(photos[cut.row], _scaled(cut.box, self.size(cut.row), photos[cut.row]), (cut.side, cut.side))
            for cut in cuts
        )
        return images, np.stack([cut.parameters for cut in cuts])

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.sample(self.global_views(*key))


def _scaled(box: Box, size: tuple[int, int], photo: np.ndarray) -> Box:
    """A box of a photo of `size` (width, height) in the photo as it was decoded, perhaps smaller."""
    height, width = photo.shape[:2]
    if size == (width, height):
        return box
    left, right = (round(x * width / size[0]) for x in (box[0], box[0] + box[2]))
    top, bottom = (round(y * height / size[1]) for y in (box[1], box[1] + box[3]))
    return left, top, right - left, bottom - top


class ObjectViews(ImageViews):
    """Stage 3: the two global views, a RoI and its jittered copy, and a RoI pair with a neighbour.

    Six uint8 views, the last four [P, P, 3], and augmentation parameters float32 [6, columns].
    """

    settings: Stage3

    def __init__(
        self,
        root: str,
        manifest: Manifest,
        exif: Exif,
        settings: Stage3,
        seed: int,
        proposals: Proposals,
        correspondences: Correspondences,
    ) -> None:
        super().__init__(root, manifest, exif, settings, seed)
        self.proposals, self.correspondences = proposals, correspondences

    def bytes_per_photo(self) -> int:
        return super().bytes_per_photo() + 4 * 3 * self.settings.patch**2

    def box(self, row: int, number: int) -> Box:
        x, y, w, h = self.proposals.box[self.proposals.box_offsets[row] + number].tolist()
        return x, y, w, h

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        (epoch, row), found, jitter = key, self.correspondences, self.settings.jitter
        choice = rng(self.seed, epoch, row, CHOICE)
        slot = int(choice.integers(found.neighbor.shape[1]))
        neighbor = int(found.neighbor[row, slot])
        first, last = self.proposals.box_offsets[row : row + 2]
        roi = self.box(row, int(choice.integers(last - first)))
        list_of_pairs = row * found.neighbor.shape[1] + slot
        here, there = found.pair[choice.integers(*found.pair_offsets[list_of_pairs : list_of_pairs + 2])].tolist()

        copy = jitter_box(roi, self.size(row), choice, **jitter.model_dump())
        cuts = self.global_views(epoch, row)
        patches = [(row, roi), (row, copy), (row, self.box(row, here)), (neighbor, self.box(neighbor, there))]
        for view, (of, box) in enumerate(patches, 2):
            parameters = draw(self.settings.views, view % 2, rng(self.seed, epoch, row, view))
            cuts.append(Cut(of, box, self.settings.patch, parameters))
        return self.sample(cuts)


class Loader:
    """Batches in order: views uint8 [B, S, S, 3] each, and parameters float32 [B, views, columns].

    Inside a `with`, whose end also ends the worker processes. Raises InputError: too little shared memory, or a
    worker that dies (out of memory, a fault in a library), with the photo that it was at.
    """

    def __init__(self, dataset: ImageViews, batches: Batches, workers: int, pin: bool) -> None:
        self.dataset = dataset
        self.at = get_context("fork").RawArray("q", max(1, workers))  # the row that each worker is at
        dataset.at = self.at
        if workers:
            photos = batches.batch // batches.parts // batches.size
            beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each of the machine's processes has as many
            needed = dataset.bytes_per_photo() * photos * (PREFETCH * workers + 1) * beside
            check_shared_memory(needed, workers * beside)
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
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
            path = os.path.join(self.dataset.root, str(self.dataset.manifest.path[self.at[dead[0]]]))
            raise InputError(
                f"{path}: a worker process died at this photo (or its neighbour), for want of memory or by a fault in "
                f"decoding; use fewer --threads or remove the photo."
            ) from None


def _start_worker(_: int) -> None:
    # A cluster signals every process of a job: the workers must serve until the main one has saved (20 s at most).
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
