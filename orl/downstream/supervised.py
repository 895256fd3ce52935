"""Training with labels: linear heads on a frozen backbone, or all layers on few labels (ORL release, benchmarks)."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset

from orl import InputError, artifacts
from orl.config import Config, Views
from orl.data.ahead import read_ahead
from orl.data.classes import ClassSet
from orl.data.decode import Exif, decode, resize_crop
from orl.data.views import random_resized_crop, rng
from orl.downstream.features import BATCH, TestPhotos, crop, extract, pool, pooled
from orl.downstream.sets import chance, describe, preset_of
from orl.networks import STD, backbones
from orl.training import checkpoint, ranks
from orl.training.augment import augment, draw
from orl.training.batches import Samples
from orl.training.checkpoint import State
from orl.training.loop import DivergedError, Run, processes

# Principal axes of ImageNet's colours, in columns, and their standard deviations, of photos from 0 to 1.
AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
DEVIATIONS = (0.2175, 0.0188, 0.0045)
LINEAR_FALL, SEMI_FALL = 0.1, 0.2  # what the learning rate is multiplied by at each milestone


class LinearHeads(nn.Module):
    """A linear classifier on each of some stages of a frozen backbone: float [B, 3, H, W] -> logits [B, C] of each.

    The stage's map goes through `features.pool`, then through a BatchNorm without parameters of its own.
    """

    def __init__(self, backbone: backbones.ResNet, stages: Sequence[int], classes: int, size: int) -> None:
        super().__init__()
        self.backbone, self.stages = backbone.requires_grad_(False), list(stages)
        with torch.inference_mode():
            maps = backbone.eval().stages(torch.zeros(1, 3, size, size))
        chosen = [maps[stage - 1] for stage in stages]
        widths = [pool(one, stage)[0].numel() for one, stage in zip(chosen, stages, strict=True)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(one.shape[1], affine=False) for one in chosen)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for width in widths)

    def train(self, mode: bool = True) -> "LinearHeads":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            maps = self.backbone.stages(images)
        return [
            head(norm(pool(maps[stage - 1], stage)).flatten(1))
            for stage, norm, head in zip(self.stages, self.norms, self.heads, strict=True)
        ]


class FineTuned(nn.Module):
    """A backbone with a linear classifier on its pooled features: float [B, 3, H, W] -> [logits [B, C]]."""

    def __init__(self, backbone: backbones.ResNet, classes: int) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleList([nn.Linear(backbone.features, classes)])

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.heads[0](self.backbone(images))]


class ClassViews(Samples):
    """A random resized crop uint8 [S, S, 3], its augmentation float32 [columns], its lighting [3] and its class."""

    def __init__(
        self, photos: ClassSet, rows: np.ndarray, views: Views, lighting: float, exif: Exif, seed: int
    ) -> None:
        self.photos, self.rows, self.views = photos, rows, views
        self.lighting, self.exif, self.seed = lighting, exif, seed

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, row: int) -> str:
        return os.path.join(self.photos.root, self.photos.path[self.rows[row]])

    def bytes_per_photo(self) -> int:
        return 3 * self.views.size**2

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        epoch, row = key
        self.note(row)
        random, photo = rng(self.seed, epoch, row, 0), decode(self.file(row), self.exif)
        box = random_resized_crop((photo.shape[1], photo.shape[0]), random, self.views.scale, self.views.ratio)
        image = resize_crop(photo, box, (self.views.size, self.views.size))
        parameters = draw(self.views, 0, random)
        light = random.normal(0, self.lighting, 3).astype(np.float32)
        return image, parameters, light, int(self.photos.label[self.rows[row]])


@dataclass(frozen=True)
class Job:
    """A training with labels: what is trained on which photos, and how."""

    name: str  # for the log
    key: str  # of its settings
    weights: str | os.PathLike
    train: ClassSet
    rows: np.ndarray  # of `train`
    val: ClassSet
    batch: int
    epochs: int
    milestones: Sequence[int]
    fall: float
    lr: float
    head_rate: float  # times lr
    momentum: float
    nesterov: bool
    weight_decay: float
    views: Views
    lighting: float
    resize: int
    seed: int
    stages: Sequence[int] | None  # None: all layers are trained
    every_epoch: bool  # whether each is tested, or the last only


class _Run(Run):
    def __init__(self, config: Config, job: Job, threads: int) -> None:
        self.job, self.rate_key = job, f"{job.key}.lr"
        samples = ClassViews(job.train, job.rows, job.views, job.lighting, config.data.exif, job.seed)
        super().__init__(job.name, samples, job.batch, job.epochs, job.seed, config.precision, threads, False)
        backbone = backbones.load(job.weights)
        classes, size = len(job.train.classes), job.views.size
        model: LinearHeads | FineTuned = (
            FineTuned(backbone, classes) if job.stages is None else LinearHeads(backbone, job.stages, classes, size)
        )
        generator = torch.Generator().manual_seed(job.seed)
        for head in model.heads:
            nn.init.normal_(head.weight, 0, 0.01, generator=generator)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        heads = set(model.heads.parameters())

        def optimizer(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
            groups = [
                {"params": [one for one in trained if one not in heads], "rate": job.lr},
                {"params": [one for one in trained if one in heads], "rate": job.lr * job.head_rate},
            ]
            options: dict[str, Any] = {"momentum": job.momentum, "nesterov": job.nesterov}
            return torch.optim.SGD(
                [group for group in groups if group["params"]], 0.0, **options, weight_decay=job.weight_decay
            )

        self.prepare(model, optimizer)
        if job.batch == len(job.rows):
            self.say(f"each step takes all {job.batch} photos")
        self.labels = [str(stage) for stage in job.stages or [5]]
        photos = TestPhotos(job.val.root, job.val.path, crop, job.resize, size, config.data.exif)
        self.tested = Subset(photos, range(self.rank, len(photos), self.size))
        axes = torch.tensor(AXES) * torch.tensor(DEVIATIONS) / torch.tensor(STD)[:, None]
        self.axes = axes.to(self.device)

    def train_step(self, parts: list[list]) -> None:
        ((images, parameters, light, label),) = parts
        passed = sum(milestone <= self.step // self.steps_per_epoch for milestone in self.job.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.job.fall**passed
        views = augment(images.to(self.device, non_blocking=True).permute(0, 3, 1, 2), parameters)
        views += (light.to(self.device) @ self.axes.T)[:, :, None, None]
        label = label.to(self.device, non_blocking=True)
        with self.autocast:
            logits = self.forward(views)
        losses = torch.stack([cross_entropy(one.float(), label) for one in logits])
        self.optimizer.zero_grad()
        self.scaler.scale(losses.sum()).backward()
        self.measure(losses.sum(), dict(zip(self.labels, losses, strict=True)))
        self.update()
        self.step += 1

    def means(self) -> dict[str, float]:
        found = self.averages()
        return {"loss": found[self.labels[-1]], **{f"loss_{stage}": value for stage, value in found.items()}}

    def end_epoch(self) -> None:
        epoch = self.step // self.steps_per_epoch
        row: dict[str, Any] = {"epoch": epoch, "loss": self.averages()}
        self.sums = {}
        if self.job.every_epoch or epoch == self.epochs:
            row |= self.test()
            told = ", ".join(f"{value:.2f} (stage {stage})" for stage, value in row["top1"].items())
            self.say(f"epoch {epoch}: top-1 {told}")
        self.rows.append(row)

    @torch.inference_mode()
    def test(self) -> dict[str, dict[str, float]]:
        """`top1` and `top5` of each stage, percent of all test photos."""
        right = torch.zeros(2, len(self.labels), dtype=torch.int64, device=self.device)
        label = torch.from_numpy(self.job.val.label)[self.rank :: self.size].to(self.device)
        self.model.eval()
        start = 0
        size = BATCH * 3 * self.job.views.size**2
        workers = max(0, self.threads - 1)
        for images in read_ahead(self.tested, range(len(self.tested)), BATCH, workers, size, self.device):
            if self.asked_to_stop:
                self.stop()  # the training is saved; this is done again
            with self.autocast:
                logits = self.model(backbones.normalize(images.to(self.device, non_blocking=True)))
            here = label[start : start + len(images), None]
            for number, one in enumerate(logits):
                hits = one.float().topk(min(5, one.shape[1])).indices == here
                right[0, number] += hits[:, 0].sum()
                right[1, number] += hits.sum()
            start += len(images)
        self.model.train()
        if self.size > 1:
            dist.all_reduce(right)
        top1, top5 = (100 * right.double() / len(self.job.val)).tolist()
        return {"top1": dict(zip(self.labels, top1, strict=True)), "top5": dict(zip(self.labels, top5, strict=True))}


def linear_job(config: Config, name: str, weights: str | os.PathLike, train: ClassSet, val: ClassSet) -> Job:
    """The training of linear heads on the labelled set `name`."""
    section, preset = config.downstream.linear, preset_of(config, name)
    views = _views(section.size, preset.jitter)
    return Job(
        f"linear.{name}", "downstream.linear", weights, train, np.arange(len(train)), val,
        batch=min(section.batch, len(train)), epochs=section.epochs or preset.epochs,
        milestones=preset.milestones if section.milestones is None else section.milestones, fall=LINEAR_FALL,
        lr=section.lr, head_rate=1.0, momentum=section.momentum, nesterov=True, weight_decay=section.weight_decay,
        views=views, lighting=preset.lighting, resize=section.resize, seed=config.seed, stages=section.stages,
        every_epoch=True,
    )  # fmt: skip


def semi_job(
    config: Config,
    name: str,
    weights: str | os.PathLike,
    train: ClassSet,
    rows: np.ndarray,
    val: ClassSet,
    share: float,
    lr: float,
    head: float,
    run: int,
) -> Job:
    """The fine-tuning of all layers on the photos `rows`, which are `share` of the set's; `run` adds to the seed."""
    section = config.downstream.semi
    if share not in section.shares:
        raise InputError(f"downstream.semi.shares: has no {share:g}; add it there, or name another.")
    return Job(
        f"semi.{name}", "downstream.semi", weights, train, rows, val,
        batch=min(section.batch, len(rows)), epochs=section.epochs, milestones=section.milestones, fall=SEMI_FALL,
        lr=lr, head_rate=head, momentum=section.momentum, nesterov=False,
        weight_decay=section.weight_decay[section.shares.index(share)], views=_views(section.size, None), lighting=0.0,
        resize=section.resize, seed=config.seed + run, stages=None, every_epoch=False,
    )  # fmt: skip


def _views(size: int, jitter: tuple[float, float, float, float] | None) -> Views:
    """Random resized crop and flip, and jitter of every photo where it is given."""
    off = {"grayscale_p": 0.0, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
    return Views(size=size, jitter=jitter or (0.0, 0.0, 0.0, 0.0), jitter_p=float(jitter is not None), **off)  # type: ignore[arg-type]


def train(
    config: Config, job: Job, state: Path, stamp: dict[str, str], threads: int, minutes: float, log_every: int
) -> list[dict[str, Any]]:
    """Train, or go on with it where a checkpoint of the same `stamp` lies in the folder `state`; a row per epoch.

    A row has `epoch`, `loss` by stage and, where it was tested, `top1` and `top5` by stage (percent). Under torchrun
    its processes share each batch, and the `threads`. SIGTERM saves a checkpoint and exits 143. Raises InputError.
    """
    first = TestPhotos(job.val.root, job.val.path[:BATCH], crop, job.resize, job.views.size, config.data.exif)
    with processes():
        next(extract(job.weights, first, pooled, 0))  # bad weights or photos show before the long work
        run = _Run(config, job, threads)
        kept = State(state, stamp["fingerprint"], lock=run.rank == 0)
        run.loop(kept, minutes * 60, log_every)
        return run.rows if run.rank == 0 else []


def evaluate(
    config: Config,
    job: Job,
    name: str,
    task: str,
    model: str,
    output: str | os.PathLike,
    settings: dict[str, Any],
    threads: int,
    minutes: float = 15,
    log_every: int = 50,
) -> None:
    """Train `job` on the labelled set `name` and write the result of `task`, whose `settings` these are.

    Metrics in percent: `top1` and `top5` by stage after the last epoch, `epochs` with those of each that was tested,
    `chance_top1`. The checkpoints lie beside `output` until it is written.
    """
    weights = artifacts.fingerprint(job.weights)
    data = {**describe(config, name, job.train, job.val, weights), "labels": len(job.rows)}
    chosen = hashlib.sha256(job.rows.tobytes()).hexdigest()
    inputs = {"weights": weights, "data": data["fingerprint"], "rows": chosen}
    state, stamp = Path(f"{output}.state"), artifacts.stamp("orl.supervised/1", settings, inputs)
    try:
        rows = train(config, job, state, stamp, threads, minutes, log_every)
    except DivergedError as error:
        if job.stages is not None:
            raise
        # A setting of a grid: it is none to choose, but the others count.
        print(f"{job.name}: {error} Its accuracy counts as 0.", file=sys.stderr)
        rows = [{"epoch": 0, "top1": {"5": 0.0}, "top5": {"5": 0.0}}] if ranks.rank() == 0 else []
    if not rows:  # not the first process
        return
    metrics = {"top1": rows[-1]["top1"], "top5": rows[-1]["top5"], "chance_top1": chance(job.val), "epochs": rows}
    result = {"task": task, "model": model, "metrics": metrics, "settings": settings, "data": data}
    artifacts.write_json(output, result)
    checkpoint.remove(state, stamp["fingerprint"])  # the result is all that is wanted of it
