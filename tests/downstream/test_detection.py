"""Detection through its public functions: samples, schedule, training, test and result."""

import copy
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch.nn.functional import grid_sample

from orl import InputError, artifacts, config
from orl.data import instances
from orl.data.decode import decode, resize_crop
from orl.downstream import detection
from orl.networks import backbones
from orl.training import ranks
from orl.training.batches import Batches, Loader
from orl.training.checkpoint import State
from orl.training.loop import DivergedError

CATEGORIES = {3: ("red", (220, 30, 30)), 7: ("green", (30, 220, 30)), 50: ("blue", (30, 30, 220))}  # ids with gaps


def outline(kind: int, box: tuple[int, int, int, int], size: tuple[int, int]) -> list | dict:
    """The rectangle as polygon, or as compressed or uncompressed run-length code."""
    x, y, w, h = box
    if kind == 0:
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    mask = np.zeros(size[::-1], np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    if kind == 1:
        code = rle.encode(mask)
        return {**code, "counts": code["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]
    counts = np.diff(edges).tolist()
    return {"size": list(size[::-1]), "counts": [0, *counts] if flat[0] else counts}


def write(root: Path, split: str, photos: int, seed: int) -> None:
    """Grey photos with coloured rectangles; the last has a crowd only, the one before nothing."""
    random, images, annotations = np.random.default_rng(seed), [], []
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number in range(photos):
        size = (72, 56) if number % 2 else (50, 64)
        pixels = random.integers(90, 130, (size[1], size[0], 3))
        images.append({"id": 100 - number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
        for kind in range(3 * (number < photos - 2)):
            category = [3, 7, 50][int(random.integers(3))]
            w, h = (int(random.integers(14, 24)) for _ in range(2))
            x, y = kind * (size[0] - 26) // 2, int(random.integers(size[1] - h))
            pixels[y : y + h, x : x + w] = CATEGORIES[category][1]
            annotations.append({"image_id": 100 - number, "category_id": category, "bbox": [x, y, w, h], "area": w * h,
                                "iscrowd": 0, "segmentation": outline(kind, (x, y, w, h), size)})  # fmt: skip
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / f"{number}.png")
    crowd = {"size": [56, 72] if photos % 2 == 0 else [64, 50], "counts": [100, 60, 56 * 72 - 160]}
    annotations.append({"image_id": 101 - photos, "category_id": 3, "bbox": [1, 1, 9, 9], "area": 60, "iscrowd": 1,
                        "segmentation": crowd})  # fmt: skip
    for box in ([5, 5, 0, 9], [-50, 5, 20, 9]):  # without area, and outside of the photo
        polygon = [[5, 5, 9, 5, 9, 9]]
        annotations.append({"image_id": 100, "category_id": 3, "bbox": box, "area": 1, "iscrowd": 0,
                            "segmentation": polygon})  # fmt: skip
    content = {
        "images": images,
        "annotations": [{**one, "id": number} for number, one in enumerate(annotations, 1)],
        "categories": [{"id": key, "name": name} for key, (name, _) in reversed(CATEGORIES.items())],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write(folder, "train2017", 10, 0)
    write(folder, "val2017", 6, 1)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = backbones.backbone("resnet10")
    backbones.initialize(model, torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("model") / "backbone.safetensors"
    backbones.save(path, "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    return path


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def settings(**detection: object) -> config.Config:
    section = {"batch": 4, "iterations": 2, "milestones": [1], "warmup": 1, "lr": 0.01, "short_sides": [40, 48],
               "test_side": 48, "long_side": 60, "channels": 8, "rois": 16, "precise_bn": 1, **detection}  # fmt: skip
    return config.parse({"seed": 2, "downstream": {"detection": section}})


def read(root: Path) -> tuple[instances.Instances, instances.Instances]:
    return instances.read(root, "train2017"), instances.read(root, "val2017")


def run(options: config.Config, root: Path, weights: Path) -> detection._Run:
    return detection._Run(options, weights, *read(root), 1)


def evaluate(options: config.Config, root: Path, weights: Path, output: Path, **limits: object) -> dict:
    predictions = output.with_suffix(".predictions.json")
    detection.evaluate(options, weights, *read(root), "m", output, predictions, 1, **limits)
    return {**artifacts.read_results(output), "predictions": json.loads(predictions.read_text())}


def boxes(root: Path, short_sides: tuple[int, ...] = (40, 48), seed: int = 0) -> detection.Boxes:
    photos = instances.read(root, "train2017")
    return detection.Boxes(photos, photos.with_objects(), list(short_sides), 60, "ignore", seed)


# Samples


@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)), short=st.integers(32, 900), long=st.integers(32, 1400)
)
def test_sizes_are_detectron2s(size: tuple[int, int], short: int, long: int) -> None:
    width, height = size
    scale = short / min(height, width)
    new = (scale * width, float(short)) if height < width else (float(short), scale * height)
    if max(new) > long:
        new = tuple(side * long / max(new) for side in new)
    found = detection.fit(size, short, long)
    assert max(abs(side - max(1, int(exact + 0.5))) for side, exact in zip(found, new, strict=True)) <= 1
    assert max(abs(side - max(1.0, exact)) for side, exact in zip(found, new, strict=True)) < 0.51
    assert min(found) >= 1
    assert min(found) <= short
    assert max(found) <= long


def test_samples(root: Path) -> None:
    """Photo, boxes and masks go together, flipped or not, whatever the masks were written as."""
    samples, seen = boxes(root), set()
    assert len(samples) == 8
    for key in [(epoch, number) for epoch in range(3) for number in range(8)]:
        image, found, labels, packed = samples[key]
        assert (image.dtype, packed.dtype) == (torch.uint8, torch.uint8)
        assert (found.dtype, labels.dtype) == (torch.float32, torch.int64)
        height, width = image.shape[1:]
        assert packed.shape == (3, height, -(-width // 8))
        assert sum(one.nbytes for one in (image, packed)) <= samples.bytes_per_photo()
        photo = decode(samples.file(key[1]))
        plain = torch.from_numpy(resize_crop(photo, (0, 0, *photo.shape[1::-1]), (width, height))).permute(2, 0, 1)
        flipped = not torch.equal(image, plain)
        assert torch.equal(image, plain.flip(2) if flipped else plain)
        seen.add((min(width, height), flipped))
        masks = detection.unpack(packed, width)
        colours = torch.tensor([colour for _, colour in CATEGORIES.values()])
        for box, label, mask in zip(found, labels, masks, strict=True):
            y, x = mask.nonzero().unbind(1)
            tight = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            torch.testing.assert_close(tight.float(), box, rtol=0, atol=1.6)
            inside = image[:, mask.bool()].float().median(1).values
            assert (inside - colours).abs().sum(1).argmin() == label - 1
    assert len(seen) == 4  # of both sides, flipped and not
    assert all(torch.equal(a, b) for a, b in zip(samples[1, 3], boxes(root)[1, 3], strict=True))


@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 40), st.integers(0, 100))
def test_masks_are_packed_and_unpacked(n: int, height: int, width: int, seed: int) -> None:
    masks = np.random.default_rng(seed).integers(0, 2, (n, height, width), dtype=np.uint8)
    packed = torch.from_numpy(np.packbits(masks, axis=2))
    assert np.array_equal(detection.unpack(packed, width).numpy(), masks)


def test_samples_come_in_lists(root: Path) -> None:
    batches = Batches(8, 4, 1, 0)
    with Loader(boxes(root), batches, 1, False) as found:
        for batch, keys in zip(found, batches, strict=True):
            assert len(batch) == 4
            for sample, key in zip(batch, keys, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(sample, boxes(root)[key], strict=True))


def test_photos_whose_objects_lie_outside_train(root: Path, weights: Path) -> None:
    one = run(settings(), root, weights)
    samples = [one.samples[0, number] for number in range(4)]
    empty = [(image, *(part[:0] for part in parts)) for image, *parts in samples]
    one.train_step([empty])
    assert one.sums["loss"].isfinite()
    photos = one.samples.photos
    photos.box[photos.objects(int(one.samples.rows[1]))] = (500, 500, 9, 9)
    assert [len(part) for part in one.samples[0, 1][1:]] == [0, 0, 0]


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_photos_of_other_sizes_are_refused(root: Path, weights: Path, tmp_path: Path, split: str) -> None:
    """Those of the test before any training."""
    tree = tmp_path / "tree"
    shutil.copytree(root, tree)
    Image.new("RGB", (71, 56)).save(tree / split / "1.png")
    with pytest.raises(InputError, match=rf"1\.png: has 71 x 56 pixels, but .*instances_{split}\.json says 72 x 56"):
        evaluate(settings(), tree, weights, tmp_path / "out.json", minutes=0)
    kept = list(tmp_path.glob("out.json.state/*/checkpoint.pt"))
    assert not (tmp_path / "out.json").exists()
    assert not kept or split == "train2017"


def test_what_the_test_needs_is_missed_before_the_training(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(tree: Path, **limits: bool) -> None:
        evaluate(settings(), tree, weights, tmp_path / "out.json", **limits)

    tree = tmp_path / "tree"
    shutil.copytree(root, tree)
    file = tree / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0].update(bbox=[1, 1, 0, 0], segmentation={"size": [3, 3], "counts": [1, 8]})
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"annotations\[0\] has a mask of another size than its photo"):
        evaluated(tree)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"compute\.faster_coco_eval is true, but"):
        evaluated(root, faster=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


# Schedule


@pytest.mark.parametrize("name", ["1x", "2x"])
def test_the_papers_schedule(name: str) -> None:
    section = config.parse({"downstream": {"detection": {"schedule": name}}}).downstream.detection
    found, times = detection.schedule(section, 117_266), {"1x": 1, "2x": 2}[name]
    assert found == detection.Schedule(16, 0.02, 90_000 * times, [60_000 * times, 80_000 * times], 1000)


def test_other_batches_are_scaled(root: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = config.parse({"downstream": {"detection": {"batch": 8}}}).downstream.detection
    assert detection.schedule(section, 1000) == detection.Schedule(8, 0.01, 180_000, [120_000, 160_000], 2000)
    assert detection.schedule(section, 4).batch == 4  # of all photos
    run(settings(batch=8), root, weights)
    said = "batch 8 instead of 16: learning rate 0.005, 4 iterations, falls after 2, warm-up 2"
    assert said in capsys.readouterr().err


def test_rates_are_torchs() -> None:
    found = detection.Schedule(16, 0.02, 60, [30, 50], 20)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.02)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=20),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 50]),
    ]
    for step in range(60):
        assert found.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        for one in schedulers:
            one.step()
    assert detection.Schedule(16, 0.02, 60, [], 0).rate(0) == 0.02


# Training


def test_steps_are_sgds(root: Path, weights: Path) -> None:
    """Two steps beside the equations: all five losses, momentum, and decay of all but the norms' parameters."""
    one = run(settings(weight_decay=0.1), root, weights)
    parts = [[[one.samples[0, number] for number in range(4 * step, 4 * step + 4)]] for step in range(2)]
    other = copy.deepcopy(one)
    norms = {
        f"{name}.{part}"
        for name, module in other.model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    parameters = dict(other.model.named_parameters())
    momentum = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for step, part in enumerate(parts):
        losses = other.losses(part, step)
        assert set(losses) == {"classifier", "box_reg", "mask", "objectness", "rpn_box_reg"}
        slopes = torch.autograd.grad(sum(losses.values()), list(parameters.values()))
        with torch.no_grad():
            for (name, value), slope in zip(parameters.items(), slopes, strict=True):
                momentum[name] = 0.9 * momentum[name] + slope + (0 if name in norms else 0.1) * value
                value -= one.schedule.rate(step) * momentum[name]
        one.train_step(part)
        assert one.sums["loss"].item() == pytest.approx(sum(one.sums[key].item() for key in losses), rel=1e-5)
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(value, parameters[name], rtol=1e-4, atol=1e-6)


def test_precise_statistics_are_torchs(root: Path, weights: Path) -> None:
    one = run(settings(precise_bn=3), root, weights)
    one.train_step([[one.samples[0, number] for number in range(4)]])
    other = copy.deepcopy(one)
    first = one.total_steps
    batches = list(Batches(8, 4, -(-(first + 3) // 2), 2, first))[:3]
    losses = other.losses

    class Batch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.step = other.model, first

        def forward(self, keys: list) -> None:
            losses([[other.samples[key] for key in keys]], self.step)
            self.step += 1

    torch.optim.swa_utils.update_bn(iter([(keys,) for keys in batches]), Batch())
    one.estimate_statistics()
    for (name, found), expected in zip(one.model.named_buffers(), other.model.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert one.model.roi_heads.mask_head[0][1].running_mean.abs().sum() > 0
    kept = run(settings(precise_bn=0), root, weights)
    before = copy.deepcopy(dict(kept.model.named_buffers()))
    kept.estimate_statistics()
    assert all(torch.equal(value, before[name]) for name, value in kept.model.named_buffers())


def interrupt(patch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """SIGTERM when the method is called for the at-th time."""
    original, calls = getattr(detection._Run, name), []

    def interrupted(self: detection._Run, *args: object) -> object:
        calls.append(0)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    patch.setattr(detection._Run, name, interrupted)


def test_a_job_told_to_end_goes_on_bit_equal(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training, while statistics are estimated, and in the test."""
    whole = evaluate(settings(), root, weights, tmp_path / "whole.json")
    assert len(whole["predictions"]) > 0
    output = tmp_path / "broken.json"
    for name, at in (("train_step", 3), ("losses", 6), ("test", 1)):  # of 8 steps; 5 of them, and one for statistics
        with monkeypatch.context() as patch:
            interrupt(patch, name, at)
            with pytest.raises(SystemExit, match="143"):
                evaluate(settings(), root, weights, output)
        assert not output.exists()
    assert capsys.readouterr().err.count("stopped at step 8") == 2
    assert evaluate(settings(), root, weights, output) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken.json",
        "broken.predictions.json",
        "whole.json",
        "whole.predictions.json",
    ]


def test_it_is_saved_at_each_point_of_the_curve(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after each epoch, which may be few steps; one that ends in the middle of a point goes on bit-equal."""
    monkeypatch.setattr(detection, "ROWS", 2)  # of 4 steps each
    saved, save = [], State.save
    monkeypatch.setattr(State, "save", lambda self, state: (saved.append(state["step"]), save(self, state)))
    whole = evaluate(settings(), root, weights, tmp_path / "whole.json")
    assert saved == [4, 8]
    assert [row["iteration"] for row in whole["metrics"]["rows"]] == saved
    for at in (3, 4):
        with monkeypatch.context() as patch:
            interrupt(patch, "train_step", at)
            with pytest.raises(SystemExit, match="143"):
                evaluate(settings(), root, weights, tmp_path / "broken.json")
    assert saved == [4, 8, 3, 4, 7]
    assert evaluate(settings(), root, weights, tmp_path / "broken.json") == whole


def test_a_loss_that_is_not_finite_ends_it(root: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"lower downstream\.detection\.lr"):
        evaluate(settings(lr=1e20), root, weights, tmp_path / "out.json", log_every=1)
    assert not (tmp_path / "out.json").exists()


def test_processes_must_divide_the_batch(root: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 3)
    with pytest.raises(InputError, match=r"downstream\.detection\.batch: 4 photos .* 3 processes"):
        run(settings(), root, weights)


def test_sets_that_cannot_be_used_are_refused(root: Path, weights: Path, tmp_path: Path) -> None:
    train, test = read(root)
    train.crowd[:] = True
    with pytest.raises(InputError, match=r"instances_train2017\.json: has no object but crowds"):
        detection.evaluate(settings(), weights, train, test, "m", tmp_path / "a.json", tmp_path / "b.json", 1)
    with pytest.raises(InputError, match="shares 6 photos"):
        detection.evaluate(settings(), weights, test, test, "m", tmp_path / "a.json", tmp_path / "b.json", 1)
    assert not list(tmp_path.iterdir())


# Test


@given(
    st.integers(0, 1000),
    st.floats(-5, 40),
    st.floats(-5, 30),
    st.floats(0.05, 40),
    st.floats(0.05, 40),
)
def test_masks_are_pasted_as_by_detectron2(seed: int, x: float, y: float, w: float, h: float) -> None:
    mask = np.random.default_rng(seed).random((28, 28)).astype(np.float32)
    box = np.array([x, y, x + w, y + h])
    found = detection.paste(mask, box, (36, 25))
    columns = (torch.arange(36) + 0.5 - x) / w * 2 - 1
    rows = (torch.arange(25) + 0.5 - y) / h * 2 - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None].double()
    expected = grid_sample(torch.from_numpy(mask)[None, None].double(), grid, align_corners=False)[0, 0].numpy()
    assert (found.shape, found.dtype) == ((25, 36), np.uint8)
    sure = abs(expected - 0.5) > 1e-4
    assert np.array_equal(found[sure], (expected >= 0.5)[sure])


def test_results_are_at_the_photos_size(root: Path) -> None:
    photos = instances.read(root, "val2017")
    detected = {
        "boxes": torch.tensor([[5.0, 10, 20, 30], [0, 0, 50, 64]]),
        "labels": torch.tensor([3, 1]),
        "scores": torch.tensor([0.9, 0.25]),
        "masks": torch.ones(2, 1, 28, 28),
    }
    first, second = detection.results(detected, photos, 0, (25, 32))  # of 50 x 64
    assert (first["image_id"], first["category_id"], first["bbox"]) == (100, 50, [10, 20, 30, 40])
    assert (second["category_id"], second["score"]) == (3, 0.25)
    mask = rle.decode(first["segmentation"])
    assert mask.shape == (64, 50)
    assert np.array_equal(np.argwhere(mask)[[0, -1]], [[20, 10], [59, 39]])
    json.dumps(first)


def test_every_photo_is_tested(root: Path, weights: Path, tmp_path: Path) -> None:
    """With objects or without; what is written is what the detector says of each photo alone."""
    one = run(settings(), root, weights)
    one.estimate_statistics()
    one.test(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "detections.0").read_text().splitlines()]
    photos = instances.read(root, "val2017")
    assert len(lines) == len(photos) == 6
    for row, line in enumerate(lines):
        photo = decode(photos.path[row])
        size = detection.fit(photo.shape[1::-1], 48, 60)
        small = torch.from_numpy(resize_crop(photo, (0, 0, *photo.shape[1::-1]), size)).permute(2, 0, 1)
        with torch.inference_mode():
            (found,) = one.model([small])
        assert [one["score"] for one in line] == pytest.approx(found["scores"].tolist(), abs=1e-6)
        assert {one["image_id"] for one in line} == {100 - row}
        boxes = found["boxes"].numpy() * np.tile(photos.size[row] / size, 2)
        expected = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        np.testing.assert_allclose([one["bbox"] for one in line], expected, atol=0.01)
    one.rank, one.size = 1, 2  # the second of two processes
    one.test(tmp_path)
    assert [json.loads(line) for line in (tmp_path / "detections.1").read_text().splitlines()] == lines[1::2]


def test_result(root: Path, weights: Path, tmp_path: Path) -> None:
    options = settings(iterations=9, milestones=[8], batch=8, lr=0.05, warmup=1, short_sides=[48])
    found = evaluate(options, root, weights, tmp_path / "found.json")
    metrics, data = found["metrics"], found["data"]
    for kind in ("box", "mask"):
        assert set(metrics[kind]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
        assert metrics[kind]["APl"] is None  # there is none
    assert (metrics["iterations"], metrics["batch"]) == (18, 8)
    assert metrics["detections"] == len(found["predictions"])
    rows = metrics["rows"]
    assert [row["iteration"] for row in rows] == list(range(1, 19))
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert rows[-1]["loss"] == pytest.approx(sum(rows[-1]["losses"].values()), rel=1e-5)
    assert [rows[row]["lr"] for row in (0, 2, 15, 16)] == pytest.approx([2.5e-5, 0.025, 0.025, 0.0025])
    assert (found["task"], found["model"], found["settings"]) == ("detection", "m", config.used(options, "detection"))
    assert {key: data[key] for key in data if "fingerprint" not in key} == {
        "root": str(root),
        "train": "train2017",
        "test": "val2017",
        "train_photos": 10,
        "photos_without_objects": 2,
        "test_photos": 6,
        "objects": 25,
        "categories": 3,
        "left_out": {"without_area": 1, "without_mask": 0},
    }
    COCO(root / "annotations" / "instances_val2017.json").loadRes(str(tmp_path / "found.predictions.json"))


def test_nothing_detected(root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*args: object) -> torch.nn.Module:
        model = detector(*args)
        model.roi_heads.score_thresh = 2.0
        return model

    detector = detection.detector
    monkeypatch.setattr(detection, "detector", silent)
    found = evaluate(settings(iterations=1, milestones=[]), root, weights, tmp_path / "found.json")
    assert (found["predictions"], found["metrics"]["detections"], found["metrics"]["box"]["AP"]) == ([], 0, 0)


TWO = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_detection as own
output = Path({output!r})
places = output, output.with_suffix(".predictions.json")
own.detection.evaluate(own.settings(), Path({weights!r}), *own.read(Path({root!r})), "m", *places, 1)
"""


def test_two_processes(root: Path, weights: Path, tmp_path: Path) -> None:
    script, output = tmp_path / "two.py", tmp_path / "two.json"
    names = {"tests": str(Path(__file__).parent), "root": str(root), "weights": str(weights), "output": str(output)}
    script.write_text(TWO.format(**names))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("detection: done: ") == 1  # the first process speaks for both
    found = artifacts.read_results(output)["metrics"]
    assert (found["iterations"], found["batch"], len(found["rows"])) == (8, 4, 8)
    order = [one["image_id"] for one in json.loads(output.with_suffix(".predictions.json").read_text())]
    assert list(dict.fromkeys(order)) == [100, 99, 98, 97, 96, 95]  # as the photos stand in the file
    assert order == sorted(order, reverse=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.json", "two.predictions.json", "two.py"]
