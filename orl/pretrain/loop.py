"""Training of stage 1 and stage 3: one process per GPU, or one on the CPU."""

import itertools
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from orl import InputError, artifacts
from orl.config import Config, Stage1, Stage3, used
from orl.data.views import rng
from orl.networks import backbones, ema
from orl.networks.ema import Pair
from orl.pretrain.byol import BYOL
from orl.pretrain.lars import LARS
from orl.pretrain.moco import MoCo
from orl.pretrain.orl import ORL
from orl.pretrain.samples import SHUFFLE, ImageViews, ObjectViews
from orl.pretrain.schedule import learning_rate, momentum
from orl.pretrain.simclr import SimCLR
from orl.training.augment import augment, send
from orl.training.checkpoint import State
from orl.training.loop import Run, processes

COLLAPSED = 0.05  # of the feature standard deviation, which is 1 for directions spread evenly and 0 for a single one
SPREAD = ("feature_std", "alignment", "uniformity")


def spread(projections: Tensor) -> dict[str, Tensor]:
    """How projections [2, B, P] of two views lie on the unit sphere; each shows a collapse.

    `feature_std`: standard deviation over the batch times sqrt(P). `alignment`: mean squared distance of the two
    views; `uniformity`: log of the mean of exp(-2 squared distance) between photos (Wang and Isola, 2020).
    """
    unit = normalize(projections.float(), dim=-1)
    other = unit[0] @ unit[0].T
    pairs = len(other) * (len(other) - 1)
    potential = (torch.exp(4 * other - 4).sum() - torch.exp(4 * other.diagonal() - 4).sum()) / pairs
    return {
        "feature_std": unit.std(1, correction=0).mean() * math.sqrt(unit.shape[-1]),
        "alignment": (unit[0] - unit[1]).square().sum(1).mean(),
        "uniformity": potential.log(),
    }


def initial(settings: Stage1 | Stage3, seed: int) -> nn.Module:
    """The objective's networks before the first step."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(settings, Stage3):
        return ORL(settings, generator)
    return {"byol": BYOL, "simclr": SimCLR, "moco": MoCo}[settings.method](settings, generator)


def write_model(output: Path, model: Any, stamp: dict[str, str]) -> None:
    """Write backbone.safetensors (the online backbone) and model.safetensors (everything) of an objective."""
    online = model.online
    backbones.save(output / "backbone.safetensors", online.network.backbone, online.backbone, stamp)
    ema.save(output / "model.safetensors", model, stamp)


def random(config: Config, output: Path) -> None:
    """Write the networks of stage 1 as they are before training (BYOL's; the backbone is that of every method)."""
    stamp = artifacts.stamp(artifacts.MODEL, used(config, "random"), {})
    write_model(output, BYOL(config.stage1, torch.Generator().manual_seed(config.seed)), stamp)


def train(
    config: Config,
    stage: str,
    root: str,
    manifest_path: str,
    output: Path,
    *,
    proposals_path: str | None = None,
    correspondences_path: str | None = None,
    threads: int = 1,
    checkpoint_minutes: float = 15,
    log_every: int = 50,
    compile: bool = False,
    deterministic: bool = False,
) -> None:
    """Train `stage` ("stage1" or "stage3") and write backbone.safetensors, model.safetensors and metrics.csv.

    Resumes from `output`/state if a checkpoint of the same settings, inputs and code version lies there. On the same
    machine, with the same number of threads, the result is bit-equal to that of an undisturbed run (on GPUs: with
    `deterministic`, and the same number of them). Under torchrun its processes share each batch, and the `threads`.
    SIGTERM saves a checkpoint and exits 143. Raises InputError.
    """
    settings = config.stage3 if stage == "stage3" else config.stage1
    optimizer_settings = settings.optimizer
    manifest = artifacts.read_manifest(manifest_path)
    if len(manifest) < optimizer_settings.batch:
        smaller = f"{stage}={{optimizer: {{batch: {max(2, len(manifest) // 2)}}}}}"
        raise InputError(
            f"{stage}.optimizer.batch is {optimizer_settings.batch}, but {manifest_path} lists only {len(manifest)} "
            f"photos; make the batch smaller, as by --config '{smaller}'."
        )
    if isinstance(settings, Stage1) and settings.method == "simclr" and optimizer_settings.accumulation > 1:
        raise InputError(f"{stage}.optimizer.accumulation: simclr compares all photos of a batch at once; set it to 1.")
    inputs = {"manifest": artifacts.fingerprint(manifest_path)}
    dataset: ImageViews
    if isinstance(settings, Stage3):
        if not proposals_path or not correspondences_path:
            raise InputError("stage3 needs --proposals and --correspondences; name the files.")
        inputs["proposals"] = artifacts.fingerprint(proposals_path)
        inputs["correspondences"] = artifacts.fingerprint(correspondences_path)
        _, proposals, correspondences = artifacts.read_stage2(manifest_path, proposals_path, correspondences_path)
        dataset = ObjectViews(root, manifest, config.data.exif, settings, config.seed, proposals, correspondences)
    else:
        dataset = ImageViews(root, manifest, config.data.exif, settings, config.seed)
    dataset.photo(0)  # a wrong root shows before the long work

    stamp = artifacts.stamp(artifacts.MODEL, used(config, stage), inputs)
    with processes():
        run = _Run(config, stage, settings, dataset, threads, compile, deterministic)
        state = State(output / "state", stamp["fingerprint"], lock=run.rank == 0)
        run.loop(state, checkpoint_minutes * 60, log_every)
        if run.rank == 0:
            write_model(output, run.model, stamp)
            columns = tuple(run.rows[0])
            artifacts.write_csv(output / "metrics.csv", columns, [[row[name] for name in columns] for row in run.rows])


class _Run(Run):
    """A training of stage 1 or 3 in progress."""

    def __init__(
        self,
        config: Config,
        stage: str,
        settings: Stage1 | Stage3,
        dataset: ImageViews,
        threads: int,
        compile: bool,
        deterministic: bool,
    ) -> None:
        self.schedule = schedule = settings.optimizer
        self.rate_key = f"{stage}.optimizer.lr"
        lengths = schedule.batch, schedule.epochs, config.seed
        super().__init__(stage, dataset, *lengths, config.precision, threads, deterministic, schedule.accumulation)
        model = initial(settings, config.seed)
        options: dict[str, Any] = {"momentum": schedule.momentum, "weight_decay": schedule.weight_decay}

        def optimizer(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
            if isinstance(model, SimCLR):
                return LARS(trained, 0.0, **options, trust=schedule.lars_trust)
            return torch.optim.SGD(trained, 0.0, **options, fused=self.on_gpu or None)

        # MoCo's statistics are of small groups.
        self.prepare(model, optimizer, not isinstance(model, MoCo), compile)

    def augmented(self, views: list[Tensor], parameters: Tensor) -> list[Tensor]:
        """The network's inputs from views uint8 [B, S, S, 3] with augmentation parameters [B, views, columns]."""
        found: list[Tensor] = []
        for _, group in itertools.groupby(range(len(views)), lambda number: views[number].shape):
            numbers = list(group)  # views of one size are augmented together
            images = torch.cat([views[number].to(self.device, non_blocking=True) for number in numbers])
            rows = parameters[:, numbers].transpose(0, 1).flatten(0, 1)
            found += augment(images.permute(0, 3, 1, 2), rows).chunk(len(numbers))
        return found

    def train_step(self, parts: list[list]) -> None:
        """One optimizer step on the parts of a batch: views and their augmentation parameters."""
        rate = self.schedule.lr * self.batch / 512
        schedule = (self.epochs, rate, self.schedule.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps_per_epoch, *schedule)
        self.optimizer.zero_grad()
        for number, (views, parameters) in enumerate(parts):
            images = self.augmented(views, parameters)
            if isinstance(self.model, MoCo):
                order = rng(self.seed, self.step, number, SHUFFLE).permutation(len(images[0]) * self.size)
                images += send([order], self.device)
            with nullcontext() if number == len(parts) - 1 else self.no_sync():
                with self.autocast:
                    losses, projections = self.forward(*images)
                    loss = torch.stack(list(losses.values())).sum() / len(parts)
                self.scaler.scale(loss).backward()
            self.measure(loss, losses | spread(projections.detach()), 1 / len(parts))
        self.update()
        if isinstance(self.model, Pair):
            self.model.update_target(self.momentum(self.step))
        self.step += 1

    def momentum(self, step: int) -> float:
        """Of the target network, after optimizer step `step`."""
        return (
            self.schedule.ema if self.model.constant_momentum else momentum(step, self.total_steps, self.schedule.ema)
        )

    def means(self) -> dict[str, float]:
        found = self.averages()
        losses = {f"loss_{name}": value for name, value in found.items() if name not in SPREAD}
        return {"loss": sum(losses.values()), **losses, **{name: found[name] for name in SPREAD}}

    def told(self, means: dict[str, float]) -> str:
        return f"loss {means['loss']:.3f}, feature std {means['feature_std']:.2f}"

    def end_epoch(self) -> None:
        row = {"epoch": self.step // self.steps_per_epoch, "step": self.step, **self.means()}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        if isinstance(self.model, Pair):
            row["ema"] = self.momentum(self.step - 1)
        self.rows.append(row)
        self.sums = {}
        if row["feature_std"] < COLLAPSED:
            self.say(
                f"warning: the representation has collapsed (epoch {row['epoch']}, feature standard deviation "
                f"{row['feature_std']:.3f}); lower the learning rate"
            )
