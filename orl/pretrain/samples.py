"""Samples of stage 1 and stage 3: uint8 views cut on the CPU, with the parameters of their augmentation."""

import os
from typing import NamedTuple

import numpy as np

from orl.artifacts import Correspondences, Manifest, Proposals
from orl.config import Stage1, Stage3
from orl.data.decode import Exif, resize_crop
from orl.data.manifest import load
from orl.data.views import Box, jitter_box, random_resized_crop, rng
from orl.training.augment import draw
from orl.training.batches import Samples

Sample = tuple[tuple[np.ndarray, ...], np.ndarray]
CHOICE, SHUFFLE = 101, 102  # numbers that no view has, as ORDER: of a sample's choices, and MoCo's


class Cut(NamedTuple):
    """A view to be cut from the photo of a row: its box there, side in pixels, and augmentation parameters."""

    row: int
    box: Box
    side: int
    parameters: np.ndarray


class ImageViews(Samples):
    """Stage 1: two crops of a photo, uint8 [S, S, 3] each, and augmentation parameters float32 [2, columns]."""

    def __init__(self, root: str, manifest: Manifest, exif: Exif, settings: Stage1 | Stage3, seed: int) -> None:
        self.root, self.manifest, self.exif = root, manifest, exif
        self.settings, self.seed = settings, seed

    def __len__(self) -> int:
        return len(self.manifest)

    def file(self, row: int) -> str:
        return os.path.join(self.root, str(self.manifest.path[row]))

    def bytes_per_photo(self) -> int:
        return 2 * 3 * self.settings.views.size**2

    def photo(self, row: int, reduce: int = 1) -> np.ndarray:
        self.note(row)
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
