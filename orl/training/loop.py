"""The loop of a training: one process per GPU, or one on the CPU; it resumes, logs, and stops on SIGTERM."""

import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from orl import InputError
from orl.networks import backbones
from orl.training import ranks
from orl.training.batches import Batches, Loader, Samples
from orl.training.checkpoint import State

LOG_SECONDS = 60.0  # between two lines of the log at most, but for a step that takes longer


class DivergedError(InputError):
    """A loss that is not finite."""


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


class Run:
    """A training in progress; everything that a checkpoint holds is in `saved` and `restore`.

    A subclass says what a step does, what is measured, and what happens at an epoch's end. `model` and `optimizer`
    come by `prepare`, before `loop`.
    """

    rate_key = "lr"  # of the settings that an error advises to lower

    def __init__(
        self,
        name: str,
        samples: Samples,
        batch: int,
        epochs: int,
        seed: int,
        precision: str,
        threads: int,
        deterministic: bool,
        accumulation: int = 1,
    ) -> None:
        self.name, self.samples, self.batch, self.epochs, self.seed = name, samples, batch, epochs, seed
        self.accumulation, self.rank, self.size = accumulation, ranks.rank(), ranks.count()
        self.threads = max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.device = backbones.device()
        self.on_gpu = self.device.type == "cuda"
        precision = {"auto": "bfloat16" if self.on_gpu else "float32"}.get(precision, precision)
        self.autocast = torch.autocast(self.device.type, getattr(torch, precision), enabled=precision != "float32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        # On the CPU the network needs the cores; one worker fetches ahead.
        self.workers = max(1, self.threads - 1) if self.on_gpu else min(1, self.threads - 1)
        if not self.on_gpu:
            torch.set_num_threads(self.threads)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = precision != "float32"
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.steps_per_epoch = len(samples) // batch
        self.total_steps = self.steps_per_epoch * epochs
        self.period = self.steps_per_epoch  # steps that a row of `rows` is about
        self.step = 0
        self.rows: list[dict[str, Any]] = []  # what was measured, one per finished period
        self.sums: dict[str, Tensor] = {}  # of the period so far, on the device: reading them would stall it
        self.bad_step = torch.tensor(-1, device=self.device)  # the first step whose loss was not finite
        self.asked_to_stop = False

    def prepare(
        self,
        model: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        shared_statistics: bool = True,
        compile: bool = False,
    ) -> None:
        """Put the model on the device, for all processes, and make the optimizer of its trained parameters.

        `shared_statistics`: BatchNorm's are those of the whole batch, not of each GPU's part of it.
        """
        self.model: Any = model.to(self.device).train()
        self.model.to(memory_format=torch.channels_last)  # faster on the CPU as well
        if self.size > 1 and self.on_gpu and shared_statistics:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.forward: Any = self.model
        if self.size > 1:
            self.forward = DistributedDataParallel(
                self.model,
                [self.device.index] if self.on_gpu else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        if compile:
            if not shutil.which(os.environ.get("CXX", "g++")):
                raise InputError(
                    "compute.compile needs a C++ compiler, and g++ is not there; install it or set it to false."
                )
            self.forward = torch.compile(self.forward)
            self.say("compiling the step: the first one may take minutes")
        self.no_sync = self.forward.no_sync if self.size > 1 else nullcontext
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer(trained)
        if isinstance(self.optimizer, torch.optim.SGD):
            for parameter in trained:  # else a first step that float16 skips would leave what the memory held
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    # What a training is

    def train_step(self, parts: list[list]) -> None:
        """One optimizer step on the parts of a batch; adds what it measures to `sums`, and 1 to `step`."""
        raise NotImplementedError

    def means(self) -> dict[str, float]:
        """What was measured in the period so far; `loss` among it."""
        return self.averages()

    def told(self, means: dict[str, float]) -> str:
        """The measurements that a line of the log tells."""
        return f"loss {means['loss']:.3f}"

    def end_epoch(self) -> None:
        """Add a row to `rows`, and empty `sums`: at the end of each period, by default an epoch."""
        raise NotImplementedError

    # What all have in common

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

    def measure(self, loss: Tensor, values: dict[str, Tensor], share: float = 1.0) -> None:
        """Add to `sums` what a part of a batch measured, by its share of the step, and watch the loss."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach() * share
        is_first_bad = ~loss.detach().isfinite() & (self.bad_step < 0)
        self.bad_step = torch.where(is_first_bad, self.step, self.bad_step)

    def update(self) -> None:
        """The optimizer's step, once the gradients are there."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def averages(self) -> dict[str, float]:
        """`sums` of the period so far, mean over its steps and the processes."""
        steps = (self.step - 1) % self.period + 1
        values = torch.stack(list(self.sums.values())) / steps / self.size
        if self.size > 1:
            dist.all_reduce(values)
        return dict(zip(self.sums, values.tolist(), strict=True))

    def share_sums(self) -> None:
        """Give each process the mean of all: they average to the same, and the first one's are those that are saved."""
        if self.size > 1:
            values = torch.stack(list(self.sums.values())) / self.size
            dist.all_reduce(values)
            self.sums = dict(zip(self.sums, values, strict=True))

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
            raise DivergedError(
                f"{self.name}: the loss of step {int(bad)} is not finite; lower {self.rate_key} ({kept})."
            )

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(f"{self.name}: {text}", file=sys.stderr)
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

    def any_process(self, *flags: bool) -> list[bool]:
        """Which of the flags are true in any of the processes."""
        found = torch.tensor(flags, dtype=torch.int32)
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found]

    def stop(self) -> NoReturn:
        """End, as told by SIGTERM, once all is saved."""
        self.say(f"stopped at step {self.step}; run again to go on")
        sys.exit(128 + signal.SIGTERM)

    def loop(self, state: State, checkpoint_seconds: float, log_every: int) -> None:
        """Train to the end; saves on a clock, at the end of each period and on SIGTERM."""

        def ask(*_: object) -> None:
            self.asked_to_stop = True

        signal.signal(signal.SIGTERM, ask)
        self.start(state)
        if self.step and len(self.rows) < self.step // self.period:
            self.end_epoch()  # saved before it
        first, parts = self.step, self.accumulation
        if parts > 1:
            self.say(f"gradient accumulation: batch statistics are of {self.batch // parts} photos each")
        batches = Batches(len(self.samples), self.batch, self.epochs, self.seed, first, parts, self.rank, self.size)
        clock, last_save = _Clock(), time.monotonic()
        with (
            Loader(self.samples, batches, self.workers, self.on_gpu) as found,
            tqdm(total=self.total_steps, initial=first, unit="step", disable=True if self.rank else None) as bar,
            _curves(state.path.parent / "tensorboard", first + 1) if self.rank == 0 else nullcontext() as board,
        ):
            while self.step < self.total_steps:
                with clock.waiting():
                    batch = [next(found) for _ in range(parts)]
                self.train_step(batch)
                bar.update()
                wants_save = time.monotonic() - last_save > checkpoint_seconds
                silent = time.monotonic() - clock.last[1] > LOG_SECONDS
                *asked, silent = self.any_process(self.asked_to_stop, wants_save, silent)  # all at the same step
                period_ends, ends = self.step % self.period == 0, self.step == self.total_steps
                save = period_ends or ends or any(asked)
                log = self.step % log_every == 0 or ends or silent
                if save or log:
                    self.check_finite(state)
                if log:
                    self.log(self.means(), clock.lap(self.step - first), bar, board)
                if save:
                    self.share_sums()
                    if self.rank == 0:
                        state.save(self.saved())
                    last_save = time.monotonic()
                if asked[0] and self.step < self.total_steps:
                    self.stop()
                if period_ends:
                    self.end_epoch()  # after saving: it may take long
        if self.step > first:
            seconds, wait = clock.total()
            trained = (self.step - first) * self.batch
            self.say(
                f"done: {trained} photos in {seconds:.0f} s ({trained / seconds:.0f} photos/s, data wait {wait:.0%}), "
                f"{_peak_memory(self.device)}"
            )

    def log(self, means: dict[str, float], lap: tuple[int, float, float], bar: tqdm, board: Any) -> None:
        steps, seconds, wait = lap
        rate, left = steps * self.batch / seconds, (self.total_steps - self.step) / steps * seconds
        text = f"{self.told(means)}, {rate:.0f} photos/s, data wait {wait:.0%}"
        bar.set_postfix_str(text)
        if bar.disable:
            epoch = self.step / self.steps_per_epoch
            self.say(f"step {self.step}/{self.total_steps}, epoch {epoch:.1f}, {text}, {left / 60:.1f} min left")
        if board:
            for name, value in {**means, "photos_per_second": rate, "data_wait": wait}.items():
                board.add_scalar(f"{self.name}/{name}", value, self.step)


@contextmanager
def _curves(folder: Path, step: int) -> Iterator[SummaryWriter]:
    """TensorBoard's writer; its thread prints no stack trace where the disk is full: this one gets the error, too."""
    tell = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else tell(args)
    try:
        with SummaryWriter(folder, purge_step=step) as board:
            yield board
    finally:
        threading.excepthook = tell


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
