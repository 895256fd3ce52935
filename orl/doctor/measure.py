"""Short measurements of what the stages do: their own code, on a few photos of the run.

A function for each rule that is measured, by the rule's name. Each gets a Setup, a job, and the seconds that it may
take, runs in a process of its own, and returns the Cost of the whole stage, whatever the job's share of it.
"""

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orl import InputError, artifacts, gpus
from orl.config import Config, Network, Scenes
from orl.doctor.jobs import Job
from orl.doctor.machine import counted

PHOTOS = 64  # of the run that are looked at, at most
WORKER = 200e6  # bytes of memory that a process takes which reads photos for another


class Cost(NamedTuple):
    """What a stage needs; of a training, for each epoch the seconds."""

    seconds: float
    how: str
    disk: float = 0
    """Bytes of what it leaves."""
    beside: float = 0
    """And bytes of disk while it runs."""
    memory: float = 0
    gpu: float = 0
    """The most bytes of memory, and of a GPU's."""
    fault: str = ""
    """Why it will fail, and what to change."""


@dataclass
class Setup:
    """What there is to measure with."""

    folder: Path
    """Temporary."""
    root: str = ""
    """Of the photos."""
    photos: int = 0
    """How many the run has."""
    manifest: artifacts.Manifest | None = None
    """Of some of them."""
    scenes: tuple[str, Scenes, Scenes] | None = None
    """Where scenes are not drawn yet: their folder, what they will be, and the few that are drawn under `folder`."""
    # For one job:
    model: str = ""
    """Folder of the model that it uses, or of one with the same network."""
    boxes: artifacts.Proposals | None = None
    """Those of the first photos of `manifest`."""
    k: int = 0
    """Neighbours of a photo."""

    def find(self, path: str) -> str:
        """A folder of labelled photos, or what stands in for it among the few scenes."""
        made = self.scenes[0] if self.scenes else ""
        return f"{self.folder}/scenes{path[len(made) :]}" if made and path.startswith(made) else path

    def grow(self, count: int, split: str) -> float:
        """How many labelled photos the run will have, of which there are `count` now: more, where few are drawn."""
        return count * getattr(self.scenes[1], split) / getattr(self.scenes[2], split) if self.scenes else count

    @property
    def backbone(self) -> str:
        return f"{self.model}/backbone.safetensors"

    @property
    def searched(self) -> tuple[artifacts.Manifest, artifacts.Proposals, float]:
        """The photos with boxes, these, and how many a photo has."""
        assert self.manifest is not None
        assert self.boxes is not None
        count = len(self.boxes.box_offsets) - 1
        return some(self.manifest, np.arange(count)), self.boxes, len(self.boxes.box) / count


def now() -> float:
    """Seconds on a clock that stands still while this thread waits for a core that other programs have (on Linux)."""
    waited = 0.0
    with contextlib.suppress(OSError):
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter() - waited


def device_now() -> float:
    """Seconds on the clock of what computes: on the CPU, this thread's own time there, whatever else runs."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def clock(work: Callable[[Any], Any], items: Iterable, seconds: float) -> tuple[list, float]:
    """What `work` makes of the items, of one at least and as many as it begins in time; and the mean seconds of one."""
    found, began, last = [], now(), time.perf_counter() + seconds
    for item in items:
        found.append(work(item))
        if time.perf_counter() > last:
            break
    return found, (now() - began) / len(found)


def short(seconds: float) -> str:
    """Seconds of something quick, for people."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def memory() -> float:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gpu_memory() -> float:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0.0


def together(compute: float, read: float, threads: int) -> float:
    """Seconds of a photo that `threads` processes read for a network: on the CPU they take its cores from it."""
    return max(compute, read / threads) if on_gpu() else compute + read / threads


def some(manifest: artifacts.Manifest, rows: np.ndarray) -> artifacts.Manifest:
    """The rows of a manifest, some perhaps more than once."""
    return replace(manifest, **{name: values[rows] for name, values in vars(manifest).items()})


# Data


def scenes(setup: Setup, job: Job) -> tuple[Cost, Scenes]:
    """Also the few that are drawn."""
    from orl.data.scenes import generate

    whole = job.config.data.scenes
    few = whole.model_copy(update={"train": min(24, whole.train), "val": min(12, whole.val),
                                   "objects_train": min(3, whole.objects_train), "objects_val": 1})  # fmt: skip
    began = now()
    generate(setup.folder / "scenes", few, 1)
    each = (now() - began) / pictures(few)
    of_objects = folder_size(setup.folder / "scenes" / "objects")  # small ones
    of_scenes = folder_size(setup.folder / "scenes") - of_objects
    size = of_scenes * (whole.train + whole.val) / (few.train + few.val)
    size += of_objects * (whole.objects_train + whole.objects_val) / (few.objects_train + few.objects_val)
    how = f"{pictures(few)} pictures drawn at {short(each)}"
    return Cost(pictures(whole) * each / job.threads, how, size, memory=memory() + WORKER * (job.threads - 1)), few


def pictures(scenes: Scenes) -> int:
    """Files that are drawn for the settings."""
    from orl.data.scenes import CLASSES

    return scenes.train + scenes.val + len(CLASSES) * (scenes.objects_train + scenes.objects_val)


def manifest(setup: Setup, job: Job, seconds: float) -> tuple[Cost, int, artifacts.Manifest]:
    """Also how many photos there are, and a manifest of some of them. Raises InputError, where none is readable."""
    from orl.data import decoded
    from orl.data.manifest import _list, inspect

    photos, exif = _list(job.config.data, setup.root), job.config.data.exif
    count = len(photos)
    if setup.scenes:
        count = setup.scenes[1].train
    drawn = np.random.default_rng(0).permutation(len(photos))[:PHOTOS]
    found, each = clock(lambda number: (photos[number], inspect(setup.root, exif, photos[number].path)), drawn, seconds)
    good = [(photo, seen) for photo, seen in found if not isinstance(seen, str)]
    if not good:
        raise InputError(f"{setup.root}: none of {len(found)} photos can be decoded, {found[0][0].path} for one.")
    columns = list(zip(*((photo.image_id, photo.path, *seen[:3], photo.part) for photo, seen in good), strict=True))
    kinds = (str, str, np.int64, np.int64, np.int64, str)
    sample = artifacts.Manifest(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))
    state, paths = decoded.beside(job.args.output), [photo.path for photo in photos]
    kept = len(decoded.unchanged(state, exif, setup.root, paths, job.threads))
    how = f"{len(found)} photos decoded at {short(each)}" + (f", {kept} decoded already" if kept else "")
    line = np.mean([len(photo.path) + len(photo.image_id) + len(photo.part) + 20 for photo, _ in good])
    cost = Cost(
        (count - kept) * each / job.threads, how, 2 * count * float(line), memory=memory() + WORKER * (job.threads - 1)
    )
    return cost, count, sample


# Stage 2


def propose(setup: Setup, job: Job, seconds: float) -> tuple[Cost, artifacts.Proposals]:
    """Also the boxes of the first photos."""
    from orl.discovery.proposals import _kept

    sample = setup.manifest
    assert sample is not None
    rows = range(len(sample))
    found, each = clock(lambda row: _kept(job.config, setup.root, sample, row), rows, seconds)
    boxes = artifacts.Proposals(np.concatenate(found), np.cumsum([0, *map(len, found)]))
    pixels = np.mean(sample.width * sample.height) / 1e6
    mean = len(boxes.box) / len(found)
    how = f"{counted(len(found), 'photo')} of {pixels:.2f} megapixels at {short(each)}, {mean:.0f} boxes each"
    size = setup.photos * (mean * 8 + 8)
    cost = Cost(setup.photos * each / job.threads, how, size, memory=memory() + WORKER * (job.threads - 1))
    return cost, boxes


def _encoder(model: Any, precision: str, threads: int) -> Any:
    import torch

    from orl.discovery.encode import Encoder

    torch.set_num_threads(threads)
    return Encoder(model, "stage 1", precision)


def _encode(encoder: Any, pictures: np.ndarray, seconds: float, most: int) -> tuple[float, int]:
    """Seconds of a picture, and how many at a time."""
    import torch

    def run(count: int) -> float:
        chosen = torch.from_numpy(np.resize(pictures, (count, *pictures.shape[1:])))
        began = device_now()
        encoder(chosen, np.full(count, "a photo"))
        return device_now() - began

    run(2)
    each = run(2) / 2
    count = max(2, min(most, int(seconds / 4 / each)))
    took, _ = clock(lambda _: run(count), range(100), seconds)
    return min(took) / count, count


def embed(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.discovery.embed import _Photos
    from orl.discovery.encode import BATCH
    from orl.networks.ema import load_encoder

    assert setup.manifest is not None
    model = load_encoder(f"{setup.model}/model.safetensors")
    width = model.network.projection if model.head else model.backbone.features
    photos = _Photos(job.config, setup.root, setup.manifest)
    found, read = clock(photos.__getitem__, range(len(setup.manifest)), seconds / 3)
    compute, batch = _encode(
        _encoder(model, job.config.embeddings.precision, job.threads), np.stack(found), seconds / 2, BATCH
    )
    how = f"{short(compute)} a photo, {batch} at a time; {short(read)} to read one"
    return Cost(setup.photos * together(compute, read, job.threads), how, setup.photos * width * 4,
                memory=memory() + WORKER * job.threads, gpu=gpu_memory())  # fmt: skip


def neighbors(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.discovery.search import BATCH, search
    from orl.networks.ema import load_encoder

    section, model = job.config.neighbors, load_encoder(f"{setup.model}/model.safetensors")
    width, k = model.network.projection if model.head else model.backbone.features, min(section.k, setup.photos - 1)
    pool, queries = min(setup.photos, 20_000), min(setup.photos, BATCH)
    rows = np.random.default_rng(0).standard_normal((pool, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    _, each = clock(lambda _: search(rows, k, rows=np.arange(queries)), range(3), seconds)
    total = each / queries / pool * setup.photos**2 / (1 if on_gpu() else job.threads)
    how = f"{queries} among {pool} in {each:.1f} s"
    if section.method == "random":
        how, total = "random ones, no search", 0.0
    elif section.index != "Flat":
        how += f"; {section.index} takes less than this exact search"
    size = setup.photos * k * 8
    return Cost(total, how, size, memory=memory() + setup.photos * width * 4 + size, gpu=gpu_memory())


def rois(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.discovery.encode import BATCH
    from orl.discovery.rois import _Crops
    from orl.networks import backbones

    model = backbones.load(setup.backbone)
    sample, boxes, per_photo = setup.searched
    crops = _Crops(job.config, setup.root, sample, boxes, range(len(boxes.box)))
    found, read = clock(crops.__getitem__, range(len(sample)), seconds / 4)
    pictures = np.concatenate(found)[: 4 * BATCH]
    compute, batch = _encode(_encoder(model, job.config.rois.precision, job.threads), pictures, seconds * 0.6, BATCH)
    read *= len(found) / max(1, sum(map(len, found)))  # of a crop
    count = setup.photos * per_photo
    how = f"{per_photo:.0f} RoIs a photo at {short(compute)}, {batch} at a time; {short(read)} to read one"
    return Cost(count * together(compute, read, job.threads), how, count * model.features * 2,
                memory=memory() + WORKER * job.threads, gpu=gpu_memory())  # fmt: skip


def correspond(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.discovery.correspondences import MEMORY, _pairs
    from orl.networks import backbones

    width, k, (_, _, per_photo) = backbones.load(setup.backbone).features, setup.k, setup.searched
    boxes, photos = max(1, round(per_photo)), max(16, k + 1)
    random = np.random.default_rng(0)
    path = setup.folder / f"rois-{os.getpid()}.h5"
    with artifacts.create(path, artifacts.ROIS, {}, {}) as file:
        features = random.standard_normal((photos * boxes, width))
        file["feature"] = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    neighbor = np.stack([random.choice(photos, k, replace=False) for _ in range(photos)])
    offsets = np.arange(photos + 1) * boxes
    _, each = clock(
        lambda row: _pairs(job.config, neighbor, offsets, [str(path)], range(row, row + 1)), range(photos), seconds
    )
    pairs = setup.photos * k * max(1.0, job.config.correspondences.ratio * per_photo - 0.5)  # cut to whole ones
    how = f"{boxes} RoIs of a photo with those of {k} neighbours in {short(each)}"
    size = pairs * 6 + setup.photos * k * 12
    return Cost(setup.photos * each / job.threads, how, size, memory=(memory() + MEMORY) * job.threads)


# Trainings


class Steps(NamedTuple):
    """Steps of a training."""

    compute: float
    """Seconds of a photo."""
    read: float
    """Seconds to read it, on one core."""
    photos: int
    """Of a step: fewer than wanted, where the CPU would need too long or a GPU's memory is too small."""
    memory: float
    """Bytes of the process, for as many as wanted, and those of the processes that read for it."""
    how: str

    def each(self, run: Any) -> float:
        """Seconds of a photo, read and computed, in a training with the run's threads."""
        return together(self.compute, self.read, max(1, run.workers) if run.on_gpu else run.threads)


def steps_of(run: Any, part: int, seconds: float, least: int = 2) -> Steps:
    """Steps of a training of `part` photos at a time, or as many as can be; at least, and a multiple of, `least`."""
    from torch.utils.data import default_collate

    samples = run.samples
    keys = [(0, row % len(samples)) for row in range(max(least, min(part, PHOTOS)))]
    found, read = clock(samples.__getitem__, keys, seconds / 5)

    def step(count: int) -> float:
        batch = (samples.collate or default_collate)([found[number % len(found)] for number in range(count)])
        began = device_now()
        run.train_step([batch])
        return device_now() - began

    before, first, count, patience = memory(), step(least), least, seconds / 6
    few = first if first > patience else min(step(least), step(least))
    if run.on_gpu:
        count = _fitting(step, part, least)
    else:
        took = few
        while count < part and took < patience:  # as many as there is time for
            count = min(2 * count, part // least * least)
            took = step(count)
    times = [few] if count == least else clock(lambda _: step(count), range(50), seconds / 3)[0]
    took = min(times)
    if count > least:  # a step costs something whatever its photos
        took += max((took - few) / (count - least), took / count / 4) * (part - count)
    compute = took / (part if count > least else count)
    gradients = sum(one.nbytes for one in run.model.parameters() if one.requires_grad)
    high = memory()
    high += max(0.0, high - before - gradients) / count * (part - count)
    of = f"{counted(len(times), 'step')} of {counted(count, 'photo')}"
    how = f"{of}: {short(compute)} for one of {part}, {short(read)} to read it"
    return Steps(compute, read, count, high + WORKER * run.workers, how)


def _fitting(step: Callable[[int], Any], part: int, least: int) -> int:
    """How many photos of `part` a step can take by the GPU's memory: a half, a quarter, ..."""
    import torch

    while True:
        try:
            step(part)
            return part
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if part // 2 < least:
                raise
            part //= 2


def _training(setup: Setup, job: Job, stage: str, seconds: float) -> Cost:
    import torch

    from orl.config import Stage1
    from orl.pretrain import loop
    from orl.pretrain.samples import ImageViews, ObjectViews
    from orl.training.batches import PREFETCH
    from orl.training.checkpoint import State
    from orl.workers import check_shared_memory

    assert setup.manifest is not None
    config, settings = job.config, getattr(job.config, stage)
    batch, parts = settings.optimizer.batch, settings.optimizer.accumulation
    if setup.photos < batch:
        raise InputError(f"{stage}.optimizer.batch is {batch}, but there are {setup.photos} photos: make it smaller")
    group = settings.shuffled_batch if isinstance(settings, Stage1) and settings.method == "moco" else 2
    devices = gpus.ranks(min(job.args.gpus, torch.cuda.device_count()), batch, parts, group)
    sample = setup.searched[0] if stage == "stage3" else setup.manifest
    listed = some(sample, np.resize(np.arange(len(sample)), batch))
    options = (setup.root, listed, config.data.exif, settings, config.seed)
    dataset: ImageViews = ImageViews(*options)
    if stage == "stage3":
        dataset = ObjectViews(*options, *_tiled(setup, batch))
    run = loop._Run(config, stage, settings, dataset, max(1, job.threads // devices), False, False)
    part = batch // parts // devices
    if run.workers:
        check_shared_memory(dataset.bytes_per_photo() * part * (PREFETCH * run.workers + 1) * devices, run.workers)
    steps = steps_of(run, part, seconds, group)
    fault = ""
    if run.on_gpu and steps.photos < part:
        advice = f"set {stage}.optimizer.accumulation to {parts * part // steps.photos}"
        fault = f"{part} photos do not fit into the GPU's memory: {advice}"
    state, output = State(setup.folder / f"{stage}-{os.getpid()}", "0"), setup.folder / f"model-{os.getpid()}"
    _, save = clock(lambda _: state.save(run.saved()), range(3), 1)
    loop.write_model(output, run.model, artifacts.stamp(artifacts.MODEL, {}, {}))
    checkpoint = state.path.stat().st_size
    made = folder_size(output)
    seconds = setup.photos // batch * batch * steps.each(run) / devices + save
    return Cost(seconds, steps.how, made + checkpoint, checkpoint, steps.memory * devices, gpu_memory(), fault)


def _tiled(setup: Setup, count: int) -> tuple[artifacts.Proposals, artifacts.Correspondences]:
    """The photos' boxes over and over, for `count` rows, and a pair of each photo with one neighbour."""
    sample, boxes, _ = setup.searched
    rows = np.resize(np.arange(len(sample)), count)
    counts = np.diff(boxes.box_offsets)[rows]
    box = np.concatenate([boxes.box[slice(*boxes.box_offsets[row : row + 2])] for row in rows])
    neighbor = ((np.arange(count) + 1) % count).astype(np.int32)[:, None]
    pair = np.zeros((count, 2), np.uint16)
    pairs = artifacts.Correspondences(neighbor, pair, np.ones(count, np.float16), np.arange(count + 1))
    return artifacts.Proposals(box, np.cumsum([0, *counts])), pairs


def stage1(setup: Setup, job: Job, seconds: float) -> Cost:
    return _training(setup, job, "stage1", seconds)


def stage3(setup: Setup, job: Job, seconds: float) -> Cost:
    return _training(setup, job, "stage3", seconds)


# Weights to measure with


def stand_in(rule: str, network: Network, config: Config, folder: Path) -> None:
    """The files of a model that is not made yet: its network before training, or the weights that are given."""
    from orl.pretrain import given, loop

    if rule == "supervised" or (rule == "stage1" and config.stage1.weights):
        given.write(config, rule, folder)
    else:
        whole = config.model_copy(update={"stage1": config.stage1.model_copy(update={"network": network})})
        loop.random(whole, folder)


def folder_size(folder: str | Path) -> float:
    """Bytes of the files in a folder."""
    return float(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()))


def start(command: str) -> float:
    """Seconds of a core that a process of its own needs for this."""
    before = os.times()
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
