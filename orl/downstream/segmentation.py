"""A linear layer on the frozen last stage names the class of each pixel."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import Dataset, Subset

from orl import artifacts
from orl.config import Config, used
from orl.data.ahead import read_ahead
from orl.data.decode import Exif, Photo, center_crop, short_side
from orl.data.instances import Instances, check_splits
from orl.data.views import rng
from orl.downstream.features import BATCH, TestPhotos, crop, extract, pooled
from orl.networks import backbones
from orl.training import checkpoint
from orl.training.batches import Samples
from orl.training.checkpoint import State
from orl.training.loop import Run, processes

TASK = "segmentation"
FALL = 0.1  # what the learning rate is multiplied by at each milestone
LOGITS = 2**25  # that are upsampled at a time: of 80 classes at 448 px a photo has half as many


class Segmenter(nn.Module):
    """A linear classifier of each pixel of a frozen backbone's last map: float [B, 3, H, W] -> logits [B, C, h, w].

    The map goes through a BatchNorm without parameters of its own, whose statistics are means over all steps: the
    backbone does not change, and after few steps moving ones would still hold their first values, 0 and 1.
    """

    def __init__(self, backbone: backbones.ResNet, classes: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.norm = nn.BatchNorm2d(backbone.features, affine=False, momentum=None)
        self.head = nn.Conv2d(backbone.features, classes, 1)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            last = self.backbone.stages(images)[-1]
        return self.head(self.norm(last))


def kind(classes: int) -> type[np.integer]:
    """Type of a label map: 0 is the background, its largest number is ignored."""
    return np.uint8 if classes < 255 else np.int32


def label_map(photos: Instances, row: int, size: tuple[int, int]) -> np.ndarray:
    """What each pixel of photo `row`, resized to `size` (width, height), shows: [height, width], of `kind`.

    0: background; 1 + the class of the object there, small ones on large ones; crowds, where no object is, are ignored.
    """
    labels = np.zeros(size[::-1], kind(len(photos.classes)))
    numbers = range(photos.first[row], photos.first[row + 1])
    masks = {number: photos.mask(number, row, size).astype(bool) for number in numbers}
    for number in sorted(numbers, key=lambda one: (not photos.crowd[one], -masks[one].sum())):
        labels[masks[number]] = np.iinfo(labels.dtype).max if photos.crowd[number] else 1 + photos.label[number]
    return labels


def view(
    photos: Instances, row: int, resize: int, size: int, exif: Exif, random: np.random.Generator | None
) -> tuple[Photo, np.ndarray]:
    """A crop uint8 [size, size, 3] of photo `row`, its short side `resize`, and its label map [size, size].

    In the middle, or at random and, half of the time, flipped. Raises InputError: a photo of another size than listed.
    """
    photo = short_side(photos.photo(row, exif), resize)
    height, width = photo.shape[:2]
    both = [photo, label_map(photos, row, (width, height))]
    if random is None:
        return center_crop(both[0], size), center_crop(both[1], size)
    x, y = int(random.integers(width - size + 1)), int(random.integers(height - size + 1))
    step = -1 if random.random() < 0.5 else 1
    photo, labels = (np.ascontiguousarray(one[y : y + size, x : x + size][:, ::step]) for one in both)
    return photo, labels


class TrainingViews(Samples):
    """Random crops (see `view`)."""

    def __init__(self, photos: Instances, resize: int, size: int, exif: Exif, seed: int) -> None:
        self.photos, self.resize, self.size, self.exif, self.seed = photos, resize, size, exif, seed

    def __len__(self) -> int:
        return len(self.photos)

    def file(self, row: int) -> str:
        return str(self.photos.path[row])

    def bytes_per_photo(self) -> int:
        return self.size**2 * (3 + np.dtype(kind(len(self.photos.classes))).itemsize)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Photo, np.ndarray]:
        epoch, row = key
        self.note(row)
        return view(self.photos, row, self.resize, self.size, self.exif, rng(self.seed, epoch, row, 0))


class TestViews(Dataset):
    """Centre crops (see `view`)."""

    __test__ = False  # no test, whatever pytest thinks of the name

    def __init__(self, photos: Instances, resize: int, size: int, exif: Exif) -> None:
        self.photos, self.resize, self.size, self.exif = photos, resize, size, exif

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, row: int) -> tuple[Photo, np.ndarray]:
        return view(self.photos, row, self.resize, self.size, self.exif, None)


class _Run(Run):
    rate_key = "downstream.segmentation.lr"

    def __init__(
        self, config: Config, weights: str | os.PathLike, train: Instances, test: Instances, threads: int
    ) -> None:
        self.section = section = config.downstream.segmentation
        batch, options = min(section.batch, len(train)), (section.resize, section.size, config.data.exif)
        samples = TrainingViews(train, *options, config.seed)
        super().__init__(TASK, samples, batch, section.epochs, config.seed, config.precision, threads, False)
        self.classes = 1 + len(train.classes)
        self.ignored = int(np.iinfo(kind(len(train.classes))).max)
        model = Segmenter(backbones.load(weights), self.classes)
        nn.init.normal_(model.head.weight, 0, 0.01, generator=torch.Generator().manual_seed(config.seed))
        nn.init.zeros_(model.head.bias)  # type: ignore[arg-type]
        self.prepare(
            model,
            lambda trained: torch.optim.SGD(
                trained, section.lr, momentum=section.momentum, weight_decay=section.weight_decay
            ),
        )
        self.test_bytes = BATCH * samples.bytes_per_photo()
        self.tested = Subset(TestViews(test, *options), range(self.rank, len(test), self.size))

    def train_step(self, parts: list[list]) -> None:
        ((images, labels),) = parts
        passed = sum(milestone <= self.step // self.steps_per_epoch for milestone in self.section.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = self.section.lr * FALL**passed
        images, labels = (one.to(self.device, non_blocking=True) for one in (images, labels))
        count = (labels != self.ignored).sum()
        if self.size > 1:
            dist.all_reduce(count)
        with self.autocast:
            logits = self.forward(backbones.normalize(images.permute(0, 3, 1, 2))).float()
        loss, slope = self.loss(logits.detach(), labels, self.size / count.clamp(min=1))
        self.optimizer.zero_grad()
        self.scaler.scale(logits).backward(slope)
        self.measure(loss, {"loss": loss})
        self.update()
        self.step += 1

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of all pixels' cross entropies, times `weight`, and its gradient by the logits, still small."""
        total = torch.zeros((), device=self.device)
        slopes: list[Tensor] = []
        for few, here in zip(*self.few(logits, labels), strict=True):
            few.requires_grad_()
            large = interpolate(few, here.shape[1:], mode="bilinear")
            loss = weight * cross_entropy(large, here.long(), ignore_index=self.ignored, reduction="sum")
            slopes += torch.autograd.grad(loss, few)
            total += loss.detach()
        return total, torch.cat(slopes)

    def few(self, logits: Tensor, labels: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Both in parts of so few photos that their logits may be upsampled to the labels' size."""
        photos = max(1, LOGITS // (self.classes * labels[0].numel()))
        return logits.split(photos), labels.split(photos)

    def end_epoch(self) -> None:
        self.rows.append({"epoch": self.step // self.steps_per_epoch, **self.averages()})
        self.sums = {}

    @torch.inference_mode()
    def test(self) -> np.ndarray:
        """Pixels of all test photos that are not ignored: int64 [C, C], by what they are and what they are named."""
        counts = torch.zeros(self.classes**2, dtype=torch.int64, device=self.device)
        self.model.eval()
        workers = max(0, self.threads - 1)
        for both in read_ahead(self.tested, range(len(self.tested)), BATCH, workers, self.test_bytes, self.device):
            if self.asked_to_stop:
                self.stop()  # the training is saved; this is done again
            images, labels = (one.to(self.device, non_blocking=True) for one in both)
            with self.autocast:
                logits = self.model(backbones.normalize(images.permute(0, 3, 1, 2))).float()
            for few, here in zip(*self.few(logits, labels), strict=True):
                named = interpolate(few, here.shape[1:], mode="bilinear").argmax(1)
                seen = here != self.ignored
                pairs = here[seen].long() * self.classes + named[seen]
                counts += torch.bincount(pairs, minlength=self.classes**2)
        if self.size > 1:
            dist.all_reduce(counts)
        return counts.view(self.classes, self.classes).cpu().numpy()


def scores(counts: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Metrics of a confusion matrix int64 [C + 1, C + 1], rows: what pixels are, the background first; percent.

    `mIoU`: mean `IoU` of the classes, the background among them, of which there is a pixel (the others' is None);
    `mIoU_objects`: without the background; `pixel_accuracy`; `background_only_mIoU`: that of naming nothing else.
    """
    right, truth = counts.diagonal(), counts.sum(1)
    present = truth > 0
    iou = 100 * right / np.maximum(truth + counts.sum(0) - right, 1)
    share = 100 / max(1, truth.sum())
    return {
        "mIoU": _mean(iou[present]),
        "mIoU_objects": _mean(iou[1:][present[1:]]),
        "pixel_accuracy": float(right.sum() * share),
        "background_only_mIoU": float(truth[0] * share / max(1, present.sum())),
        "IoU": {
            name: float(value) if is_there else None
            for name, value, is_there in zip(("background", *classes), iou, present, strict=True)
        },
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def evaluate(
    config: Config,
    weights: str | os.PathLike,
    train: Instances,
    test: Instances,
    name: str,
    output: str | os.PathLike,
    threads: int,
    minutes: float = 15,
    log_every: int = 50,
) -> None:
    """Train the linear layer on `train`, test it on `test`, and write the result of the model `name`.

    Metrics: those of `scores`, and `epochs`, each with its `loss`. Under torchrun its processes share each batch, and
    the `threads`. SIGTERM saves a checkpoint beside `output` and exits 143. Raises InputError.
    """
    section = config.downstream.segmentation
    check_splits(train, test)
    fingerprints = {
        "weights": artifacts.fingerprint(weights),
        "data": f"{train.fingerprint()[:32]}{test.fingerprint()[:32]}",
    }
    settings = used(config, TASK)
    state, stamp = Path(f"{output}.state"), artifacts.stamp("orl.segmentation/1", settings, fingerprints)
    first = TestPhotos("", test.path[:BATCH], crop, section.resize, section.size, config.data.exif)
    with processes():
        next(extract(weights, first, pooled, 0))  # bad weights or photos show before the long work
        run = _Run(config, weights, train, test, threads)
        run.loop(State(state, stamp["fingerprint"], lock=run.rank == 0), minutes * 60, log_every)
        metrics = {**scores(run.test(), train.classes), "epochs": run.rows}
        if run.rank:
            return
    run.say(f"mIoU {metrics['mIoU']:.2f} (naming only background: {metrics['background_only_mIoU']:.2f})")
    root = train.file.parents[1]
    data = {
        "root": os.fspath(root),
        "train": train.file.stem.removeprefix("instances_"),
        "test": test.file.stem.removeprefix("instances_"),
        "train_photos": len(train),
        "test_photos": len(test),
        "categories": len(train.classes),
        "fingerprint": fingerprints["data"],
        "weights_fingerprint": fingerprints["weights"],
        "left_out": {"train": train.left_out, "test": test.left_out},
    }
    artifacts.write_json(output, {"task": TASK, "model": name, "metrics": metrics, "settings": settings, "data": data})
    checkpoint.remove(state, stamp["fingerprint"])  # the result is all that is wanted of it
