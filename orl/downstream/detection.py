"""Mask R-CNN, all layers fine-tuned, and its average precision (ORL supplement, after Detectron2's baselines)."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as rle
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, Subset

from orl import InputError, artifacts
from orl.config import Config, Detection, used
from orl.data.ahead import read_ahead
from orl.data.decode import Exif, Photo, resize_crop
from orl.data.instances import Instances, check_splits
from orl.data.views import rng
from orl.downstream import average_precision
from orl.networks import backbones
from orl.networks.detector import detector
from orl.progress import track
from orl.training import checkpoint, ranks
from orl.training.batches import Batches, Loader, Samples
from orl.training.checkpoint import State
from orl.training.loop import Run, processes

TASK = "detection"
BATCH = 16  # that the settings are given for
SCHEDULES = {"1x": (90_000, [60_000, 80_000]), "2x": (180_000, [120_000, 160_000])}
ROWS = 50  # points of the losses' curve, at most: each a mean, or it would be of noise


def fit(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Width and height of a photo with its shorter side resized to `short`, or less where the other would pass `long`.

    Rounded as Detectron2's ResizeShortestEdge does.
    """
    scale = min(short / min(size), long / max(size))
    width, height = (max(1, int(side * scale + 0.5)) for side in size)
    return width, height


def _resized(photo: Photo, size: tuple[int, int]) -> Photo:
    return resize_crop(photo, (0, 0, photo.shape[1], photo.shape[0]), size)


class Boxes(Samples):
    """A training photo uint8 [3, H, W] and the n objects on it that are no crowds.

    They have boxes float32 [n, 4] (x1 y1 x2 y2, pixels), labels int64 [n] from 1, and masks uint8
    [n, H, (W + 7) // 8]: eight pixels of a row in a byte, the first in the highest bit. Objects outside of the photo
    are left out.
    """

    collate = list

    def __init__(
        self, photos: Instances, rows: np.ndarray, short_sides: list[int], long_side: int, exif: Exif, seed: int
    ) -> None:
        self.photos, self.rows, self.exif, self.seed = photos, rows, exif, seed
        self.short_sides, self.long_side = short_sides, long_side

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, row: int) -> str:
        return os.fspath(self.photos.path[self.rows[row]])

    def bytes_per_photo(self) -> int:
        # Of the few photos with very many objects, no batch is full.
        pixels = (max(self.short_sides) + 7) * self.long_side
        return pixels * 3 + pixels // 8 * int(np.percentile(np.diff(self.photos.first), 99))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        epoch, number = key
        self.note(number)
        random, row = rng(self.seed, epoch, number, 0), int(self.rows[number])
        photo = self.photos.photo(row, self.exif)
        before = (photo.shape[1], photo.shape[0])
        size = fit(before, int(random.choice(self.short_sides)), self.long_side)
        flip = random.random() < 0.5
        image, objects = _resized(photo, size), self.photos.objects(row)

        low, sides = np.split(self.photos.box[objects], 2, axis=1)
        scale = np.divide(size, before)
        boxes = np.concatenate([low * scale, (low + sides) * scale], 1).clip(0, [*size, *size])
        if flip:
            image, boxes[:, [0, 2]] = image[:, ::-1], size[0] - boxes[:, [2, 0]]
        boxes = boxes.astype(np.float32)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, objects = boxes[inside], objects[inside]
        masks = np.zeros((len(objects), size[1], -(-size[0] // 8)), np.uint8)
        for packed, one in zip(masks, objects, strict=True):
            mask = self.photos.mask(int(one), row, size)
            packed[:] = np.packbits(mask[:, ::-1] if flip else mask, axis=1)
        return (
            torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            torch.from_numpy(boxes),
            torch.from_numpy(self.photos.label[objects] + 1),
            torch.from_numpy(masks),
        )


def unpack(masks: Tensor, width: int) -> Tensor:
    """uint8 [n, H, (W + 7) // 8], as np.packbits makes it, -> uint8 [n, H, W]."""
    bits = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return (masks[..., None] >> bits & 1).flatten(-2)[..., :width]


class TestPhotos(Dataset):
    """The photos of a split, resized for the test: uint8 [3, H, W]."""

    __test__ = False  # no test, whatever pytest thinks of the name

    def __init__(self, photos: Instances, short: int, long: int, exif: Exif) -> None:
        self.photos, self.short, self.long, self.exif = photos, short, long, exif

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, row: int) -> Tensor:
        photo = self.photos.photo(row, self.exif)
        photo = _resized(photo, fit((photo.shape[1], photo.shape[0]), self.short, self.long))
        return torch.from_numpy(photo).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Schedule:
    """A training's batch, and iterations and rates for it."""

    batch: int
    lr: float
    iterations: int
    milestones: list[int]
    warmup: int

    def rate(self, step: int) -> float:
        """Learning rate of `step` (from 0): a tenth of it after each milestone, times the warm-up's linear rise."""
        rise = 1.0 if step >= self.warmup else 0.001 + 0.999 * step / self.warmup
        return self.lr * rise * 0.1 ** sum(milestone <= step for milestone in self.milestones)


def schedule(section: Detection, photos: int) -> Schedule:
    """The schedule of the settings for their batch, or for all `photos` where they are fewer.

    Of another batch than 16 the learning rate is scaled linearly, and iterations inversely (Goyal et al., 2017).
    """
    batch, (iterations, milestones) = min(section.batch, max(1, photos)), SCHEDULES[section.schedule]
    if section.iterations is not None and section.milestones is not None:
        iterations, milestones = section.iterations, section.milestones
    whole, *steps, warmup = (round(count * BATCH / batch) for count in (iterations, *milestones, section.warmup))
    return Schedule(batch, section.lr * batch / BATCH, max(1, whole), steps, warmup)


class _Run(Run):
    rate_key = "downstream.detection.lr"

    def __init__(
        self, config: Config, weights: str | os.PathLike, train: Instances, test: Instances, threads: int
    ) -> None:
        self.section = section = config.downstream.detection
        rows, exif = train.with_objects(), config.data.exif
        self.schedule = plan = schedule(section, len(rows))
        samples = Boxes(train, rows, section.short_sides, section.long_side, exif, config.seed)
        epochs = -(-plan.iterations // (len(rows) // plan.batch))
        super().__init__(TASK, samples, plan.batch, epochs, config.seed, config.precision, threads, False)
        if plan.batch % self.size:
            raise InputError(
                f"downstream.detection.batch: {plan.batch} photos cannot be shared evenly by {self.size} processes; "
                f"start as many as divide it."
            )
        torch.backends.cudnn.benchmark = False  # it would try all ways anew for each size of photos
        self.total_steps, self.period = plan.iterations, -(-plan.iterations // ROWS)
        torch.manual_seed(self.seed)
        model = detector(backbones.load(weights), len(train.classes), section.channels, section.rois)
        norms = {one for part in model.modules() if isinstance(part, _BatchNorm) for one in part.parameters()}

        def optimizer(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
            groups = [
                {"params": [one for one in trained if one not in norms], "weight_decay": section.weight_decay},
                {"params": [one for one in trained if one in norms], "weight_decay": 0.0},
            ]
            return torch.optim.SGD(groups, 0.0, momentum=section.momentum)

        self.prepare(model, optimizer)
        if plan.batch != BATCH:
            falls = " and ".join(map(str, plan.milestones)) or "none"
            self.say(
                f"batch {plan.batch} instead of {BATCH}: learning rate {plan.lr:g}, {plan.iterations} iterations, "
                f"falls after {falls}, warm-up {plan.warmup}"
            )
        self.tested = TestPhotos(test, section.test_side, section.long_side, exif)

    def losses(self, parts: list[list], step: int) -> dict[str, Tensor]:
        """The five losses of a batch, by name; `step` decides which RoIs torchvision draws."""
        images, targets = [], []
        for sample in parts[0]:
            image, boxes, labels, masks = (one.to(self.device, non_blocking=True) for one in sample)
            images.append(image)
            targets.append({"boxes": boxes, "labels": labels, "masks": unpack(masks, image.shape[2])})
        torch.manual_seed(int(rng(self.seed, step, self.rank).integers(2**63)))
        with self.autocast:
            found = self.forward(images, targets)
        return {name.removeprefix("loss_"): value for name, value in found.items()}

    def train_step(self, parts: list[list]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        losses = self.losses(parts, self.step)
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.measure(loss, {"loss": loss, **losses})
        self.update()
        self.step += 1

    def told(self, means: dict[str, float]) -> str:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "loss")
        return f"{super().told(means)} ({parts})"

    def end_epoch(self) -> None:
        means = self.averages()
        row = {"iteration": self.step, "loss": means.pop("loss"), "losses": means}
        self.rows.append({**row, "lr": self.schedule.rate(self.step - 1)})
        self.sums = {}

    @torch.no_grad()
    def estimate_statistics(self) -> None:
        """Those of all BatchNorms anew: the mean over `precise_bn` more batches of the training (precise BN)."""
        norms = [part for part in self.model.modules() if isinstance(part, _BatchNorm)]
        first, more = self.total_steps, self.section.precise_bn
        if more:
            self.say(f"estimating batch statistics over {more} iterations")
            epochs = -(-(first + more) // self.steps_per_epoch)
            batches = Batches(len(self.samples), self.batch, epochs, self.seed, first, 1, self.rank, self.size)
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all
            with Loader(self.samples, batches, self.workers, self.on_gpu) as found:
                steps: Iterable[int] = range(first, first + more)
                steps = track(steps, more, "batch statistics") if self.rank == 0 else steps
                for step, batch in zip(steps, found, strict=False):
                    self.losses([batch], step)
                    if any(self.any_process(self.asked_to_stop)):
                        self.stop()  # the training is saved; this is done again
        if self.size > 1:  # without SyncBN they are each process's own
            for norm in norms:
                for name in ("running_mean", "running_var"):
                    dist.all_reduce(getattr(norm, name).div_(self.size))

    def test_photos(self) -> Iterator[Tensor]:
        """Those of this process's share: every size-th."""
        share = range(self.rank, len(self.tested), self.size)
        size, workers = 3 * self.section.test_side * self.section.long_side, max(0, self.threads - 1)
        return read_ahead(Subset(self.tested, share), range(len(share)), None, workers, size, self.device)

    @torch.inference_mode()
    def test(self, folder: Path) -> None:
        """Write what is detected on this process's test photos into `folder`: a line of JSON for each."""
        self.model.eval()
        photos = self.tested.photos
        rows, found = range(self.rank, len(photos), self.size), self.test_photos()
        with open(_part(folder, self.rank), "w", encoding="utf-8") as file:
            for row, image in zip(rows, track(found, len(rows), "testing") if self.rank == 0 else found, strict=True):
                if self.asked_to_stop:
                    self.stop()  # the training is saved; this is done again
                with self.autocast:
                    (detected,) = self.model([image.to(self.device, non_blocking=True)])
                file.write(json.dumps(results(detected, photos, row, (image.shape[2], image.shape[1]))) + "\n")


def _part(folder: Path, rank: int) -> Path:
    return folder / f"detections.{rank}"


def results(detected: dict[str, Tensor], photos: Instances, row: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Detections in COCO's results format, best first.

    `detected`: what the detector returns for photo `row` of `photos`, resized to `size` (width, height).
    """
    whole = tuple(photos.size[row].tolist())
    boxes = detected["boxes"].double().cpu().numpy() * np.tile(np.divide(whole, size), 2)
    masks = detected["masks"][:, 0].float().cpu().numpy()
    category = photos.category_id[detected["labels"].cpu().numpy() - 1].tolist()
    found = []
    for box, mask, number, score in zip(boxes, masks, category, detected["scores"].tolist(), strict=True):
        code = rle.encode(paste(mask, box, whole))
        found.append(
            {
                "image_id": int(photos.image_id[row]),
                "category_id": number,
                "bbox": [round(side, 2) for side in (*box[:2], *(box[2:] - box[:2]))],
                "score": score,
                "segmentation": {**code, "counts": code["counts"].decode()},
            }
        )
    return found


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where the probability float32 [S, S] inside of `box` (x1 y1 x2 y2, pixels) is 1/2 or more, bilinearly between.

    Returns uint8 [height, width] of a photo of `size` (width, height), columns outermost. As Detectron2 pastes masks.
    """
    whole = np.zeros(size[::-1], np.uint8, order="F")
    (left, top), (right, bottom) = np.floor(box[:2]).astype(int).clip(0), np.ceil(box[2:]).astype(int).clip(0, size)
    x1, y1, x2, y2 = box.tolist()
    rows, columns = _weights(top, bottom, y1, y2, len(mask)), _weights(left, right, x1, x2, len(mask))
    whole[top:bottom, left:right] = rows @ mask @ columns.T >= 0.5
    return whole


def _weights(start: int, stop: int, low: float, high: float, cells: int) -> np.ndarray:
    """Bilinear weights of the cells between `low` and `high` at each pixel's centre: float32 [stop - start, cells]."""
    place = (np.arange(start, stop) + 0.5 - low) / (high - low) * cells - 0.5
    return (1 - abs(place[:, None] - np.arange(cells))).clip(0).astype(np.float32)


def _write_predictions(folder: Path, parts: int, output: str | os.PathLike) -> None:
    """Join what `test` wrote in all processes, in the order of the photos."""
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(artifacts.atomic(output))
        files = [stack.enter_context(open(_part(folder, rank), encoding="utf-8")) for rank in range(parts)]
        whole = stack.enter_context(open(temporary, "w", encoding="utf-8"))
        lines = (line.strip()[1:-1] for together in itertools.zip_longest(*files, fillvalue="") for line in together)
        before = "["
        for line in filter(None, lines):
            whole.write(f"{before}{line}")
            before = ",\n"
        whole.write("]\n" if before != "[" else "[]\n")


def evaluate(
    config: Config,
    weights: str | os.PathLike,
    train: Instances,
    test: Instances,
    name: str,
    output: str | os.PathLike,
    predictions_output: str | os.PathLike,
    threads: int,
    minutes: float = 15,
    log_every: int = 50,
    faster: bool = False,
) -> None:
    """Train Mask R-CNN from a backbone, or go on with it, detect on every test photo, and write what it is worth.

    `predictions_output`: all detections in COCO's results format. `output`: metrics `box` and `mask`, each with AP,
    AP50, AP75, APs, APm, APl in percent (null: there is no such object), `categories`, and `rows`: the losses, mean
    over as many iterations each; data: `left_out`, `objects` and `photos_without_objects` are the training split's.
    Under torchrun its processes share each batch, and the `threads`. SIGTERM saves a checkpoint and exits 143; on the
    CPU what is resumed ends bit-equal (on GPUs RoIAlign's gradients add up in any order). The checkpoints lie beside
    `output` until it is written. `faster`: see `average_precision.evaluate`. Raises InputError.
    """
    check_splits(train, test)
    section, settings = config.downstream.detection, used(config, TASK)
    inputs = {
        "weights": artifacts.fingerprint(weights),
        "train": artifacts.fingerprint(train.file),
        "test": artifacts.fingerprint(test.file),
    }
    state, stamp = Path(f"{output}.state"), artifacts.stamp("orl.detection/1", settings, inputs)
    with processes():
        if ranks.rank() == 0:
            average_precision.evaluate(test.file, [], faster)  # what cannot be evaluated shows before the long work
        run = _Run(config, weights, train, test, threads)
        kept = State(state, stamp["fingerprint"], lock=run.rank == 0)
        if not kept.path.exists():
            for _ in run.test_photos():  # a bad one shows before the long work
                pass
        run.loop(kept, minutes * 60, log_every)
        run.estimate_statistics()
        run.test(kept.path.parent)
        if run.size > 1:
            dist.barrier()
        if run.rank == 0:
            _write_predictions(kept.path.parent, run.size, predictions_output)
    if run.rank:
        return
    print(f"{TASK}: measuring average precision", file=sys.stderr, flush=True)
    found = average_precision.evaluate(test.file, predictions_output, faster)
    metrics = {
        **{key: found[key] for key in ("box", "mask", "categories", "detections")},
        "rows": run.rows,
        "iterations": run.step,
        "batch": run.batch,
    }
    data = {
        "root": os.fspath(train.file.parents[1]),
        "train": section.train,
        "test": section.test,
        "train_photos": len(train),
        "photos_without_objects": len(train) - len(run.samples),
        "test_photos": len(test),
        "objects": int((~train.crowd).sum()),
        "categories": len(train.classes),
        "left_out": train.left_out,
        "fingerprint": f"{inputs['train'][:32]}{inputs['test'][:32]}",
        "weights_fingerprint": inputs["weights"],
    }
    result = {"task": TASK, "model": name, "metrics": metrics, "settings": settings, "data": data}
    artifacts.write_json(output, result)
    checkpoint.remove(state, stamp["fingerprint"])  # the result is all that is wanted of it
