"""Throughput of training on one device: the real loop of orl.pretrain.loop beside an eager step, in one run.

- reference: an eager step as it is often written: autocast in the same precision, NCHW, torch's default SGD (not
  fused), the EMA one parameter at a time; the same networks and loss, on views that lie ready on the device
- our step, ready views: the same views; what the loop's step gains by itself
- our step: on uint8 views that lie on the device, augmentation included (target on an H100 at batch 512: 1.5 times the
  reference)
- our loop: the whole of it, photos decoded by worker processes (target with an H100 and 16 cores: 95 % of our step)

The steps take turns and the median of each counts; warm-up steps do not. The loop counts after its workers' first
batches; its photos are few and come again and again, so they are read from memory rather than from a disk.
Achieved TFLOP/s: 65.6 GFLOP for an image of stage 1 (ResNet-50, 224 px: two views, forward through both networks,
backward through one), 1.37 times that in stage 3, and in proportion to the area for other sizes.

    python benchmarks/train.py                                          # with a GPU: ResNet-50, 224 px, batch 512
    python benchmarks/train.py --stage stage3 --compile --photos FOLDER

Without a GPU a small configuration runs: ResNet-18, 64 px, batch 32, float32.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as orl's commands do, before torch is loaded

import numpy as np
import torch
from common import machine, make_up_stage2, photos, synchronize, write_manifest
from torch import Tensor
from torch.utils.data import default_collate

from orl import artifacts, config
from orl.config import Config, Network
from orl.pretrain.loop import _Run, initial
from orl.pretrain.samples import ImageViews, ObjectViews
from orl.training.checkpoint import State
from orl.training.loop import between, mark

GFLOP = 65.6  # of an image, stage 1, ResNet-50 at 224 px
STAGE3 = 1.37  # times that
PEAK = {"H100": 989.0}  # TFLOP/s of dense bf16, by what the device's name contains
ROUNDS = 3
WARM_UP = 3


class Run(_Run):
    """The real training; notes when each step begins and ends."""

    ready: list[Tensor] | None = None  # inputs of the network to take instead of augmenting

    def augmented(self, views: list[Tensor], parameters: Tensor) -> list[Tensor]:
        return self.ready or super().augmented(views, parameters)

    def train_step(self, parts: list[list]) -> None:
        began = mark()
        super().train_step(parts)
        self.marks.append((began, mark()))

    def again(self) -> None:
        """Forget the steps taken, so that the schedules never end."""
        self.step, self.sums = 0, {}
        self.marks: list[tuple[Any, Any]] = []


class Reference:
    """An eager training step without anything that makes it fast but autocast."""

    def __init__(self, run: Run, settings: Any, views: list[Tensor]) -> None:
        self.model: Any = initial(settings, 0).to(run.device).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9, weight_decay=1e-4, fused=False)
        self.autocast = run.autocast
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.scaler.is_enabled())
        self.views = [view.contiguous() for view in views]

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast:
            losses, _ = self.model(*self.views)
            loss = torch.stack(list(losses.values())).sum()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for target, online in zip(self.model.target.parameters(), self.model.online.parameters(), strict=True):
            target.data = 0.99 * target.data + 0.01 * online.data


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and momentum."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def in_turn(jobs: dict[str, Callable[[], None]], steps: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of each job, and the most bytes allocated on the GPU while it ran (0 without one)."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    peak = dict.fromkeys(jobs, 0)
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            for _ in range(WARM_UP):
                job()
            synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            marks = [mark()]
            for _ in range(steps):
                job()
                marks.append(mark())
            synchronize()
            seconds[name] += [between(a, b) for a, b in itertools.pairwise(marks)]
            if torch.cuda.is_available():
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated())
    return {name: statistics.median(values) for name, values in seconds.items()}, peak


def prepare(args: argparse.Namespace, folder: str, rows: int) -> tuple[Config, Any, ImageViews]:
    """Settings of the run, those of its stage, and its samples."""
    stage1 = {
        "network": {"backbone": args.backbone},
        "views": {"size": args.size},
        "optimizer": {"batch": args.batch, "epochs": 1},
    }
    patch = max(16, round(96 * args.size / 224))
    settings = config.parse({"precision": args.precision, "stage1": stage1, "stage3": {"patch": patch}})
    root, names = photos(args.photos, args.count, folder)
    path = os.path.join(folder, "manifest.csv")
    manifest = write_manifest(path, root, names, rows)
    if args.stage == "stage1":
        return settings, settings.stage1, ImageViews(root, manifest, "ignore", settings.stage1, 0)
    proposals, correspondences = make_up_stage2(folder, np.stack([manifest.width, manifest.height], 1), path)
    found = artifacts.read_proposals(proposals), artifacts.read_correspondences(correspondences)
    return settings, settings.stage3, ObjectViews(root, manifest, "ignore", settings.stage3, 0, *found)


def flops(args: argparse.Namespace, rate: float) -> str:
    """Achieved TFLOP/s at `rate` images per second, where the cost of an image is known."""
    if args.backbone != "resnet50":
        return ""
    achieved = rate * GFLOP / 1000 * (STAGE3 if args.stage == "stage3" else 1) * (args.size / 224) ** 2
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    shares = [f", {achieved / peak:.1%} of the card's {peak:.0f}" for card, peak in PEAK.items() if card in name]
    return f", {achieved:.2f} TFLOP/s{''.join(shares)}"


def steps(args: argparse.Namespace, run: Run, settings: Any, dataset: ImageViews) -> float:
    """Print what the reference and our step do on resident tensors; images per second of our step."""
    views, parameters = default_collate([dataset[0, row] for row in range(args.batch)])
    views = [view.to(run.device) for view in views]
    ready = run.augmented(views, parameters)
    reference = Reference(run, settings, ready)

    def ours(ready: list[Tensor] | None) -> None:
        run.again()
        run.ready = ready
        run.train_step([[views, parameters]])

    jobs: dict[str, Callable[[], None]] = {
        "reference": reference.step,
        "our step, ready views": lambda: ours(ready),
        "our step": lambda: ours(None),
    }
    seconds, peak = in_turn(jobs, args.steps)
    of_run, of_reference = held(run.model, run.optimizer), held(reference.model, reference.optimizer)
    for name, took in seconds.items():
        rate, times = args.batch / took, seconds["reference"] / took
        used = peak[name] - (of_run if name == "reference" else of_reference)  # the other's weights lie there, too
        memory = f", peak memory {used / 1e9:.2f} GB" if peak[name] else ""
        target = " (target on an H100 at batch 512: 1.5)" if name == "our step" else ""
        print(
            f"{name}: {rate:.1f} images/s, {1000 * took:.1f} ms per step, {times:.2f} x reference{target}"
            f"{memory}{flops(args, rate)}",
            flush=True,
        )
    return args.batch / seconds["our step"]


def whole_loop(args: argparse.Namespace, run: Run, first: int, folder: str, resident: float) -> None:
    """Print what the loop does with its workers, beside `resident`: the images per second of its step alone."""
    run.again()
    run.ready = None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run.loop(State(Path(folder) / "state", "benchmark"), 1e9, log_every=50)
    synchronize()
    whole = time.perf_counter() - began
    timed = run.marks[first - 1 :]
    span = between(timed[0][1], timed[-1][1])
    waited = sum(between(one[1], other[0]) for one, other in itertools.pairwise(timed))
    rate = args.batch * (len(timed) - 1) / span
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if torch.cuda.is_available() else ""
    print(
        f"our loop: {rate:.1f} images/s, {rate / resident:.1%} of our step (target with an H100 and 16 cores: 95 %), "
        f"the device waits {waited / span:.1%} of the time{memory}{flops(args, rate)}"
    )
    print(
        f"whole epoch of {run.step} steps, start of the workers and checkpoint included: "
        f"{run.step * args.batch / whole:.1f} images/s"
    )


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=("stage1", "stage3"), default="stage1", help="(default %(default)s)")
    backbones = get_args(Network.model_fields["backbone"].annotation)
    add("--backbone", choices=backbones, default="resnet50" if on_gpu else "resnet18", help="(default %(default)s)")
    add("--batch", type=int, default=512 if on_gpu else 32, help="photos (default %(default)s)")
    add("--size", type=int, default=224 if on_gpu else 64, help="of a view, pixels (default %(default)s)")
    add("--steps", type=int, default=60 if on_gpu else 5, help="timed, of each kind (default %(default)s)")
    precisions = get_args(Config.model_fields["precision"].annotation)
    add("--precision", choices=precisions, default="auto", help="auto: bfloat16 on a GPU, else float32")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile our step")
    add("--threads", type=int, default=os.cpu_count(), help="of the loop, workers included (default %(default)s)")
    add("--photos", help="folder of JPEGs (default: coco-mini beside the project, else generated ones)")
    add("--count", type=int, default=320, help="different photos at most (default %(default)s)")
    args = parser.parse_args()

    print(machine())
    kind = "compiled" if args.compile else "not compiled"
    print(
        f"{args.stage}, {args.backbone}, {args.size} px, batch {args.batch}, precision {args.precision}, {kind}, "
        f"{args.threads} threads",
        flush=True,
    )
    first = max(WARM_UP, args.threads)  # steps of the loop before it counts: the workers' first batches come at once
    with tempfile.TemporaryDirectory() as folder:
        settings, of_stage, dataset = prepare(args, folder, args.batch * (first + args.steps))
        run = Run(
            config=settings,
            stage=args.stage,
            settings=of_stage,
            dataset=dataset,
            threads=args.threads,
            compile=args.compile,
            deterministic=False,
        )
        whole_loop(args, run, first, folder, steps(args, run, of_stage, dataset))
    if not on_gpu:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"no GPU: peak memory of the process {most:.2f} GB; nothing here can be held against the targets")


if __name__ == "__main__":
    main()
