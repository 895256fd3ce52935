"""Training of stage 1 and stage 3: one process, on the GPU where there is one."""

import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from orl import InputError, artifacts
from orl.config import Config, Stage1, Stage3, used
from orl.networks import backbones, ema
from orl.networks.ema import Pair
from orl.pretrain.augment import augment
from orl.pretrain.byol import BYOL
from orl.pretrain.checkpoint import State
from orl.pretrain.orl import ORL
from orl.pretrain.samples import Batches, ImageViews, ObjectViews, loader
from orl.pretrain.schedule import learning_rate, momentum

COLLAPSED = 0.05  # of the feature standard deviation, which is 1 for directions spread evenly and 0 for a single one


def feature_std(projections: Tensor) -> Tensor:
    """Spread of projections [2, B, P]: standard deviation of unit vectors over the batch times sqrt(P)."""
    unit = normalize(projections.float(), dim=-1)
    return unit.std(1, correction=0).mean() * math.sqrt(unit.shape[-1])


def initial(settings: Stage1 | Stage3, seed: int) -> Pair:
    """The objective's networks before the first step."""
    generator = torch.Generator().manual_seed(seed)
    return ORL(settings, generator) if isinstance(settings, Stage3) else BYOL(settings, generator)


def write_model(output: Path, settings: Stage1 | Stage3, model: Pair, stamp: dict[str, str]) -> None:
    """Write backbone.safetensors (the online backbone) and model.safetensors (everything)."""
    backbones.save(output / "backbone.safetensors", settings.network.backbone, model.online.backbone, stamp)
    ema.save(output / "model.safetensors", model, stamp)


def random(config: Config, output: Path) -> None:
    """Write the networks of stage 1 as they are before training."""
    stamp = artifacts.stamp(artifacts.MODEL, used(config, "random"), {})
    write_model(output, config.stage1, initial(config.stage1, config.seed), stamp)


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
    machine, with the same number of threads, the result is bit-equal to that of an undisturbed run.
    SIGTERM saves a checkpoint and exits 143. Raises InputError.
    """
    settings = config.stage3 if stage == "stage3" else config.stage1
    optimizer_settings = settings.optimizer
    manifest = artifacts.read_manifest(manifest_path)
    if len(manifest) < optimizer_settings.batch:
        raise InputError(
            f"{stage}.optimizer.batch is {optimizer_settings.batch}, but {manifest_path} lists only {len(manifest)} "
            f"photos; make the batch smaller."
        )
    inputs = {"manifest": artifacts.fingerprint(manifest_path)}
    dataset: ImageViews
    if isinstance(settings, Stage3):
        if not proposals_path or not correspondences_path:
            raise InputError("stage3 needs --proposals and --correspondences; name the files.")
        inputs["proposals"] = artifacts.fingerprint(proposals_path)
        inputs["correspondences"] = artifacts.fingerprint(correspondences_path)
        proposals = artifacts.read_proposals(proposals_path)
        correspondences = artifacts.read_correspondences(correspondences_path)
        artifacts.check_rows(proposals_path, len(proposals.box_offsets) - 1, len(manifest), manifest_path)
        artifacts.check_rows(correspondences_path, len(correspondences.neighbor), len(manifest), manifest_path)
        artifacts.check_input(proposals_path, "manifest", inputs["manifest"])
        artifacts.check_input(correspondences_path, "proposals", inputs["proposals"])
        dataset = ObjectViews(root, manifest, config.data.exif, settings, config.seed, proposals, correspondences)
    else:
        dataset = ImageViews(root, manifest, config.data.exif, settings, config.seed)
    dataset.photo(0)  # a wrong root shows before the long work

    stamp = artifacts.stamp(artifacts.MODEL, used(config, stage), inputs)
    state = State(output / "state", stamp["fingerprint"])
    run = _Run(config, stage, settings, dataset, threads)
    saved = state.load()
    if saved:
        run.restore(saved)
        print(f"{stage}: going on from step {run.step} of {run.total_steps} ({state.path})", file=sys.stderr)
    elif state.others:
        print(
            f"{stage}: a new run: the checkpoints in {output / 'state'} are of other settings (more epochs are others, "
            f"too), inputs or versions, and are left alone",
            file=sys.stderr,
        )
    run.loop(state, checkpoint_minutes * 60, log_every)

    write_model(output, settings, run.model, stamp)
    columns = tuple(run.rows[0])
    artifacts.write_csv(output / "metrics.csv", columns, [[row[name] for name in columns] for row in run.rows])


class _Run:
    """A training in progress; everything that a checkpoint holds is in `saved` and `restore`."""

    def __init__(
        self, config: Config, stage: str, settings: Stage1 | Stage3, dataset: ImageViews, threads: int
    ) -> None:
        self.stage, self.dataset, self.threads, self.seed = stage, dataset, threads, config.seed
        self.schedule = settings.optimizer
        self.device = backbones.device()
        self.autocast = config.precision == "bfloat16" or (config.precision == "auto" and self.device.type == "cuda")
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        self.model = initial(settings, config.seed).to(self.device).train()
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=0.0,
            momentum=self.schedule.momentum,
            weight_decay=self.schedule.weight_decay,
        )
        self.steps_per_epoch = len(dataset.manifest) // self.schedule.batch
        self.total_steps = self.steps_per_epoch * self.schedule.epochs
        self.step = 0
        self.rows: list[dict[str, float]] = []  # of metrics.csv, one per finished epoch
        self.sums: dict[str, Tensor] = {}  # of the epoch so far, on the device: reading them would stall it
        self.bad_step = torch.tensor(-1, device=self.device)  # the first step whose loss was not finite

    def saved(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "sums": self.sums,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.rows = saved["step"], saved["rows"]
        self.sums = {name: value.to(self.device) for name, value in saved["sums"].items()}

    def train_step(self, views: list[Tensor], parameters: Tensor) -> None:
        """One optimizer step on views uint8 [B, S, S, 3] with augmentation parameters [B, views, columns]."""
        on_device = [
            augment(view.to(self.device, non_blocking=True).permute(0, 3, 1, 2), parameters[:, number])
            for number, view in enumerate(views)
        ]
        rate = self.schedule.lr * self.schedule.batch / 512
        schedule = (self.schedule.epochs, rate, self.schedule.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps_per_epoch, *schedule)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            losses, projections = self.model(*on_device)
            loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.update_target(momentum(self.step, self.total_steps, self.schedule.ema))

        losses = {name: value.detach() for name, value in losses.items()}
        for name, value in {**losses, "feature_std": feature_std(projections)}.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + value
        is_first_bad = ~loss.detach().isfinite() & (self.bad_step < 0)
        self.bad_step = torch.where(is_first_bad, self.step, self.bad_step)
        self.step += 1

    def check_finite(self, state: State) -> None:
        """Raise InputError if a loss was not finite, or if the last step spoilt the weights."""
        bad = int(self.bad_step)
        if bad < 0 and not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            bad = self.step
        if bad >= 0:
            kept = (
                f"the last good checkpoint is kept as {state.path}" if state.path.exists() else "nothing is saved yet"
            )
            raise InputError(
                f"{self.stage}: the loss of step {bad} is not finite; lower {self.stage}.optimizer.lr ({kept})."
            )

    def end_epoch(self) -> None:
        means = {name: float(value) / self.steps_per_epoch for name, value in self.sums.items()}
        losses = {f"loss_{name}": value for name, value in means.items() if name != "feature_std"}
        row = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "loss": sum(losses.values()),
            **losses,
            "feature_std": means["feature_std"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "ema": momentum(self.step - 1, self.total_steps, self.schedule.ema),
        }
        self.rows.append(row)
        self.sums = {}
        if row["feature_std"] < COLLAPSED:
            print(f"{self.stage}: warning: the representation has collapsed (epoch {row['epoch']}, feature standard "
                  f"deviation {row['feature_std']:.3f}); lower the learning rate", file=sys.stderr)  # fmt: skip

    def loop(self, state: State, checkpoint_seconds: float, log_every: int) -> None:
        """Train to the end; saves on a clock, at epoch ends and on SIGTERM."""
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
        # On the CPU the network needs the cores; one worker fetches ahead.
        workers = max(1, self.threads - 1) if self.device.type == "cuda" else min(1, self.threads - 1)
        batches = Batches(len(self.dataset.manifest), self.schedule.batch, self.schedule.epochs, self.seed, self.step)
        last_save = began = time.monotonic()
        first_step = self.step
        for views, parameters in loader(self.dataset, batches, workers, self.device.type == "cuda"):
            self.train_step(views, parameters)
            end_of_epoch = self.step % self.steps_per_epoch == 0
            if end_of_epoch or self.step % log_every == 0:
                self.check_finite(state)
            if end_of_epoch:
                self.end_epoch()
            if end_of_epoch or stop or time.monotonic() - last_save > checkpoint_seconds:
                self.check_finite(state)
                state.save(self.saved())
                last_save = time.monotonic()
            if self.step % log_every == 0 or self.step == self.total_steps:
                self.log(time.monotonic() - began, self.step - first_step)
            if stop:
                break
        if stop and self.step < self.total_steps:
            print(f"{self.stage}: stopped at step {self.step}; run again to go on", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)

    def log(self, seconds: float, steps: int) -> None:
        done = self.step % self.steps_per_epoch
        if done:
            loss = sum(float(value) for name, value in self.sums.items() if name != "feature_std") / done
            spread = float(self.sums["feature_std"]) / done
        else:
            loss, spread = self.rows[-1]["loss"], self.rows[-1]["feature_std"]
        rate = steps * self.schedule.batch / seconds
        left = (self.total_steps - self.step) / steps * seconds
        print(
            f"{self.stage}: step {self.step}/{self.total_steps}, epoch {self.step / self.steps_per_epoch:.1f}, "
            f"loss {loss:.3f}, feature std {spread:.2f}, {rate:.0f} photos/s, {left / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )
