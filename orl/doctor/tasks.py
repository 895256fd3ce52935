"""Short measurements of the evaluations, as orl.doctor.measure has them of the stages before."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from orl.doctor.jobs import Job
from orl.doctor.machine import counted
from orl.doctor.measure import (
    PHOTOS,
    WORKER,
    Cost,
    Setup,
    clock,
    device_now,
    gpu_memory,
    memory,
    now,
    short,
    steps_of,
    together,
)

RESULT = 1e5  # bytes of a result, at most


def _features(setup: Setup, job: Job, photos: Any, make: Any, count: float, itemsize: int, seconds: float) -> Cost:
    """The features that `make` makes of the network's maps, of `count` such photos."""
    import torch

    from orl.downstream.features import BATCH
    from orl.networks import backbones

    torch.set_num_threads(job.threads)
    device = backbones.device()
    model = backbones.load(setup.backbone).to(device)
    drawn = np.random.default_rng(0).permutation(len(photos))[:PHOTOS]
    found, read = clock(lambda row: photos[int(row)], drawn, seconds / 3)

    @torch.inference_mode()
    def run(count: int) -> tuple[float, int]:
        images = torch.stack([found[number % len(found)] for number in range(count)])
        began = device_now()
        parts = [part.cpu() for part in make(model.stages(backbones.normalize(images.to(device))))]
        return device_now() - began, sum(part.shape[1] for part in parts)

    _, width = run(2)
    batch = max(2, min(BATCH, int(seconds / 6 / (run(2)[0] / 2))))
    took, _ = clock(lambda _: run(batch)[0], range(50), seconds / 3)
    compute = min(took) / batch
    how = f"{batch} photos at a time, {short(compute)} each, {short(read)} to read one"
    return Cost(count * together(compute, read, job.threads), how, count * width * itemsize,
                memory=memory() + WORKER * job.threads, gpu=gpu_memory())  # fmt: skip


def features(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.downstream.features import TestPhotos, by_stage, squash
    from orl.downstream.svm import read

    section = job.config.downstream.voc07_svm
    train, test, _ = read(job.config, setup.find(job.args.root))
    count = setup.grow(len(train), "train") + setup.grow(len(test), "val")
    photos = TestPhotos("", train.image_path, squash, section.resize, section.size, job.config.data.exif)
    return _features(setup, job, photos, by_stage(section.stages), count, 4, seconds)


def set_features(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.downstream.features import TestPhotos, crop, pooled

    section, (train, _, counts) = job.config.downstream.knn, _set(setup, job)
    photos = TestPhotos(train.root, train.path, crop, section.resize, section.size, job.config.data.exif)
    return _features(setup, job, photos, pooled, sum(counts), 2, seconds)


def voc07_svm(setup: Setup, job: Job, seconds: float) -> Cost:
    """One class of made-up features, of as many photos as there is time for: how hard real ones are is not known."""
    import torch

    from orl.downstream import svm
    from orl.downstream.features import by_stage
    from orl.networks import backbones

    section = job.config.downstream.voc07_svm
    train, _, _ = svm.read(job.config, setup.find(job.args.root))
    count, classes = setup.grow(len(train), "train"), len(train.classes)
    with torch.inference_mode():
        maps = backbones.load(setup.backbone).stages(torch.zeros(1, 3, section.size, section.size))
    width, random = by_stage(section.stages[-1:])(maps)[0].shape[1], np.random.default_rng(0)

    def fit(photos: int) -> float:
        label = np.where(np.arange(photos) % 10, -1, 1).astype(np.int8)
        direction = 0.3 * random.standard_normal(width)
        made = svm.normalize(abs(random.standard_normal((photos, width)) + (label > 0)[:, None] * direction))
        x, _ = svm.shorten(made, made)
        began = now()
        svm.fit_class(x, label, x, label, section.costs, section.folds, x @ x.T + 1)
        return now() - began

    photos, took = 100, fit(100)
    while photos < count and took < seconds / 8:  # twice as many take four times as long
        photos = min(2 * photos, int(np.ceil(count)))
        took = fit(photos)
    whole = min(count, width)
    total = took * (count / photos) * (whole / min(photos, width)) * classes * len(section.stages)
    workers = min(job.threads, classes) if count >= svm.FEW else 1
    how = f"roughly, from one class of {photos} made-up photos in {short(took)}"
    return Cost(total / workers, how, RESULT, memory=memory() + workers * 3 * count * whole * 8)


def _trained(
    run: Any,
    batch: int,
    photos: float,
    tested: float,
    test: Callable[[int], int],
    seconds: float,
    least: int = 2,
) -> Cost:
    """A training that sees so many photos in all, and so many test photos, of which `test` takes some."""
    steps = steps_of(run, batch, seconds * 0.7, least)
    counts, of_test = clock(test, range(8), seconds * 0.2)
    of_test /= counts[0]
    total = photos * steps.each(run) + tested * of_test
    state = 2 * sum(value.nbytes for value in run.model.state_dict().values())
    how = f"{steps.how}, {short(of_test)} to test one"
    return Cost(total, how, RESULT, 2 * state, steps.memory, gpu_memory())


def _some(run: Any) -> Callable[[int], int]:
    """Test a training on a few of its test photos, in this process; how many."""
    from torch.utils.data import Subset

    count = min(16, len(run.tested))
    run.tested = Subset(run.tested, range(count))

    def test(_: int) -> int:
        run.threads = 1
        run.test()
        return count

    return test


def _set(setup: Setup, job: Job) -> tuple[Any, Any, tuple[float, float]]:
    """The splits of a labelled set, and how many photos they will have."""
    from orl.downstream.sets import read

    train, val = read(job.config, job.args.set, setup.find(job.args.root))
    return train, val, (setup.grow(len(train), "objects_train"), setup.grow(len(val), "objects_val"))


def linear(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.downstream import supervised

    train, val, (photos, tested) = _set(setup, job)
    made = supervised.linear_job(job.config, job.args.set, setup.backbone, train, val)
    run = supervised._Run(job.config, made, job.threads)
    counts = made.epochs * photos, made.epochs * tested
    return _trained(run, made.batch, *counts, _some(run), seconds)


def semi_grid(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.downstream import supervised

    train, val, (photos, tested) = _set(setup, job)
    rows, share, lr = np.arange(len(train)), job.args.share, job.config.downstream.semi.lr[0]
    made = supervised.semi_job(job.config, job.args.set, setup.backbone, train, rows, val, share, lr, 1.0, 0)
    run = supervised._Run(job.config, made, job.threads)
    return _trained(run, made.batch, made.epochs * photos * share, tested, _some(run), seconds)


semi_run = semi_grid


def _masks(setup: Setup, job: Job) -> tuple[Any, Any, tuple[float, float]]:
    """The splits of downstream.detection, and how many photos they will have."""
    from orl.data.instances import read

    section, root = job.config.downstream.detection, setup.find(job.args.root)
    train, test = read(root, section.train), read(root, section.test)
    return train, test, (setup.grow(len(train), "train"), setup.grow(len(test), "val"))


def segmentation(setup: Setup, job: Job, seconds: float) -> Cost:
    from orl.downstream.segmentation import _Run

    train, test, (photos, tested) = _masks(setup, job)
    run = _Run(job.config, setup.backbone, train, test, job.threads)
    photos *= job.config.downstream.segmentation.epochs
    return _trained(run, run.batch, photos, tested, _some(run), seconds)


def detection(setup: Setup, job: Job, seconds: float) -> Cost:
    import torch

    from orl.downstream.detection import _Run

    train, test, (_, tested) = _masks(setup, job)
    run = _Run(job.config, setup.backbone, train, test, job.threads)

    @torch.inference_mode()
    def detect(row: int) -> int:
        run.model.eval()
        with run.autocast:
            run.model([run.tested[row % len(run.tested)].to(run.device)])
        return 1

    photos = (run.schedule.iterations + run.section.precise_bn) * run.schedule.batch
    cost = _trained(run, run.schedule.batch, photos, tested, detect, seconds, 1)
    return cost._replace(disk=tested * 25e3)  # a hundred objects with masks on each


def localization(setup: Setup, job: Job, seconds: float) -> Cost:
    import torch

    from orl.downstream.localization import _boxes

    assert setup.manifest is not None
    torch.set_num_threads(job.threads)
    rows, began = np.arange(len(setup.manifest)), time.perf_counter()
    found = _boxes(job.config, setup.root, setup.manifest, rows, setup.backbone, 0)
    next(found)
    left = seconds - (time.perf_counter() - began)
    some, each = clock(lambda _: next(found), rows[1:], left)
    return Cost(
        setup.photos * each,
        f"{counted(len(some), 'photo')} at {short(each)}",
        RESULT,
        memory=memory(),
        gpu=gpu_memory(),
    )
