"""Training of stage 1 and stage 3: one process per GPU, or one on the CPU."""

import itertools
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from orl import InputError, artifacts
from orl.config import Config, Stage1, Stage3, used
from orl.data.views import rng
from orl.networks import backbones, ema
from orl.networks.ema import Pair
from orl.pretrain import ranks
from orl.pretrain.augment import augment, send
from orl.pretrain.byol import BYOL
from orl.pretrain.checkpoint import State
from orl.pretrain.lars import LARS
from orl.pretrain.moco import MoCo
from orl.pretrain.orl import ORL
from orl.pretrain.samples import SHUFFLE, Batches, ImageViews, Loader, ObjectViews
from orl.pretrain.schedule import learning_rate, momentum
from orl.pretrain.simclr import SimCLR

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


@contextmanager
def processes() -> Iterator[None]:
    """Those that torchrun started train together inside this (see `ranks`); any other process by itself."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, but {torch.cuda.device_count()} "
                f"GPUs are visible; start one for each."
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: the others may be waiting for this process; torchrun ends them


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
        raise InputError(
            f"{stage}.optimizer.batch is {optimizer_settings.batch}, but {manifest_path} lists only {len(manifest)} "
            f"photos; make the batch smaller."
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
    with processes():
        run = _Run(
            config,
            stage,
            settings,
            dataset,
            max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
            compile,
            deterministic,
        )
        state = State(output / "state", stamp["fingerprint"], lock=run.rank == 0)
        run.loop(state, checkpoint_minutes * 60, log_every)
        if run.rank == 0:
            write_model(output, run.model, stamp)
            columns = tuple(run.rows[0])
            artifacts.write_csv(output / "metrics.csv", columns, [[row[name] for name in columns] for row in run.rows])


class _Run:
    """A training in progress; everything that a checkpoint holds is in `saved` and `restore`."""

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
        self.stage, self.dataset, self.threads, self.seed = stage, dataset, threads, config.seed
        self.schedule, self.rank, self.size = settings.optimizer, ranks.rank(), ranks.count()
        self.device = backbones.device()
        on_gpu = self.device.type == "cuda"
        precision = {"auto": "bfloat16" if on_gpu else "float32"}.get(config.precision, config.precision)
        self.autocast = torch.autocast(self.device.type, getattr(torch, precision), enabled=precision != "float32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        if not on_gpu:
            torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = precision != "float32"
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

        self.model: Any = initial(settings, config.seed).to(self.device).train()
        self.model.to(memory_format=torch.channels_last)  # faster on the CPU as well
        if self.size > 1 and on_gpu and not isinstance(self.model, MoCo):  # whose statistics are of small groups
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.forward: Any = self.model
        if self.size > 1:
            self.forward = DistributedDataParallel(
                self.model,
                [self.device.index] if on_gpu else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        if compile:
            if not shutil.which(os.environ.get("CXX", "g++")):
                raise InputError(
                    "compute.compile needs a C++ compiler, and g++ is not there; install it or set it to false."
                )
            self.forward = torch.compile(self.forward)
        self.no_sync = self.forward.no_sync if self.size > 1 else nullcontext
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {"momentum": self.schedule.momentum, "weight_decay": self.schedule.weight_decay}
        self.optimizer: torch.optim.Optimizer
        if isinstance(self.model, SimCLR):
            self.optimizer = LARS(trained, 0.0, **options, trust=self.schedule.lars_trust)
        else:
            self.optimizer = torch.optim.SGD(trained, 0.0, **options, fused=on_gpu or None)
            for parameter in trained:  # else a first step that float16 skips would leave what the memory held
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
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
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "sums": self.sums,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        own = [group.get("fused") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, fused in zip(self.optimizer.param_groups, own, strict=True):
            group["fused"] = fused  # not that of the device on which it was saved
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.rows = saved["step"], saved["rows"]
        self.sums = {name: value.to(self.device) for name, value in saved["sums"].items()}

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
        rate = self.schedule.lr * self.schedule.batch / 512
        schedule = (self.schedule.epochs, rate, self.schedule.warmup_epochs)
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
            measured = {name: value.detach() for name, value in losses.items()} | spread(projections)
            for name, value in measured.items():
                self.sums[name] = self.sums.get(name, 0) + value / len(parts)
            is_first_bad = ~loss.detach().isfinite() & (self.bad_step < 0)
            self.bad_step = torch.where(is_first_bad, self.step, self.bad_step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if isinstance(self.model, Pair):
            self.model.update_target(self.momentum(self.step))
        self.step += 1

    def momentum(self, step: int) -> float:
        """Of the target network, after optimizer step `step`."""
        return (
            self.schedule.ema if self.model.constant_momentum else momentum(step, self.total_steps, self.schedule.ema)
        )

    def check_finite(self, state: State) -> None:
        """Raise InputError, in every process, if a loss was not finite or the last step spoilt the weights."""
        bad = self.bad_step.clone()
        if self.size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad < 0 and not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            bad = torch.tensor(self.step)
        if bad >= 0:
            kept = (
                f"the last good checkpoint is kept as {state.path}" if state.path.exists() else "nothing is saved yet"
            )
            raise InputError(
                f"{self.stage}: the loss of step {int(bad)} is not finite; lower {self.stage}.optimizer.lr ({kept})."
            )

    def means(self) -> dict[str, float]:
        """What was measured in the epoch so far, mean over its steps and the processes."""
        steps = (self.step - 1) % self.steps_per_epoch + 1
        values = torch.stack(list(self.sums.values())) / steps / self.size
        if self.size > 1:
            dist.all_reduce(values)
        found = dict(zip(self.sums, values.tolist(), strict=True))
        losses = {f"loss_{name}": value for name, value in found.items() if name not in SPREAD}
        return {"loss": sum(losses.values()), **losses, **{name: found[name] for name in SPREAD}}

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

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(f"{self.stage}: {text}", file=sys.stderr)
            sys.stderr.flush()

    def start(self, state: State) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.size > 1:
            dist.barrier()  # until the first process has the lock
        saved = state.load()
        if saved:
            try:
                self.restore(saved)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                detail = " ".join(str(error).split())[:120]
                raise InputError(f"{state.path}: is of another model ({detail}); delete it to train anew.") from None
            self.say(f"going on from step {self.step} of {self.total_steps} ({state.path})")
        elif state.others:
            self.say(
                f"a new run: the checkpoints in {state.path.parent.parent} are of other settings (more epochs are "
                f"others, too), inputs or versions, and are left alone"
            )

    def loop(self, state: State, checkpoint_seconds: float, log_every: int) -> None:
        """Train to the end; saves on a clock, at epoch ends and on SIGTERM."""
        stop: list[bool] = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
        self.start(state)
        first, parts = self.step, self.schedule.accumulation
        if parts > 1:
            self.say(f"gradient accumulation: batch statistics are of {self.schedule.batch // parts} photos each")
        photos = len(self.dataset.manifest), self.schedule.batch, self.schedule.epochs
        batches = Batches(*photos, self.seed, first, parts, self.rank, self.size)
        # On the CPU the network needs the cores; one worker fetches ahead.
        on_gpu = self.device.type == "cuda"
        workers = max(1, self.threads - 1) if on_gpu else min(1, self.threads - 1)
        clock, last_save = _Clock(), time.monotonic()
        with (
            Loader(self.dataset, batches, workers, on_gpu) as found,
            tqdm(total=self.total_steps, initial=first, unit="step", disable=True if self.rank else None) as bar,
            SummaryWriter(state.path.parent / "tensorboard", purge_step=first + 1)
            if self.rank == 0
            else nullcontext() as board,
        ):
            while self.step < self.total_steps:
                with clock.waiting():
                    batch = [next(found) for _ in range(parts)]
                self.train_step(batch)
                bar.update()
                asked = torch.tensor([bool(stop), time.monotonic() - last_save > checkpoint_seconds], dtype=torch.int32)
                if self.size > 1:
                    dist.all_reduce(asked, dist.ReduceOp.MAX)  # all processes save and stop at the same step
                save = self.step % self.steps_per_epoch == 0 or bool(asked.any())
                log = self.step % log_every == 0 or self.step == self.total_steps
                if save or log:
                    self.check_finite(state)
                if log:
                    self.log(self.means(), clock.lap(self.step - first), bar, board)
                if self.step % self.steps_per_epoch == 0:
                    self.end_epoch()
                if save:
                    if self.rank == 0:
                        state.save(self.saved())
                    last_save = time.monotonic()
                if asked[0]:
                    break
        if self.step < self.total_steps:
            self.say(f"stopped at step {self.step}; run again to go on")
            sys.exit(128 + signal.SIGTERM)
        if self.step > first:
            seconds, wait = clock.total()
            trained = (self.step - first) * self.schedule.batch
            self.say(
                f"done: {trained} photos in {seconds:.0f} s ({trained / seconds:.0f} photos/s, data wait {wait:.0%}), "
                f"{_peak_memory(self.device)}"
            )

    def log(self, means: dict[str, float], lap: tuple[int, float, float], bar: tqdm, board: Any) -> None:
        steps, seconds, wait = lap
        rate, left = steps * self.schedule.batch / seconds, (self.total_steps - self.step) / steps * seconds
        text = f"loss {means['loss']:.3f}, feature std {means['feature_std']:.2f}, "
        text += f"{rate:.0f} photos/s, data wait {wait:.0%}"
        bar.set_postfix_str(text)
        if bar.disable:
            epoch = self.step / self.steps_per_epoch
            self.say(f"step {self.step}/{self.total_steps}, epoch {epoch:.1f}, {text}, {left / 60:.1f} min left")
        if board:
            for name, value in {**means, "photos_per_second": rate, "data_wait": wait}.items():
                board.add_scalar(f"{self.stage}/{name}", value, self.step)


def mark() -> Any:
    """A moment; of a GPU by its own clock: while it still works, the program may wait for data at no cost."""
    if not torch.cuda.is_available():
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one `mark` to another; on a GPU, once it has come to both."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


class _Clock:
    """How long a training takes, and which share of it the device waits for data; in all and since the last lap."""

    def __init__(self) -> None:
        self.began, self.waited = time.monotonic(), 0.0
        self.last = (0, self.began)  # steps and time at the last lap
        self.marks: list[tuple[Any, Any]] = []  # of each wait since then

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = mark()
        yield
        self.marks.append((start, mark()))

    def lap(self, steps: int) -> tuple[int, float, float]:
        """Steps, seconds and share of waiting since the last lap, of which `steps` is the number since the start."""
        waited = sum(between(start, end) for start, end in self.marks)
        now, (before, start) = time.monotonic(), self.last
        self.last, self.marks = (steps, now), []
        self.waited += waited
        return steps - before, now - start, waited / (now - start)

    def total(self) -> tuple[float, float]:
        """Seconds, and share of waiting up to the last lap."""
        seconds = time.monotonic() - self.began
        return seconds, self.waited / seconds


def _peak_memory(device: torch.device) -> str:
    """On Linux."""
    if device.type == "cuda":
        return f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
