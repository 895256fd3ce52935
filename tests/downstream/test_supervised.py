"""Linear heads and fine-tuning through their public functions and commands."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.linear_model import LogisticRegression

from orl import InputError, artifacts, config
from orl.data.classes import read_sets, subset
from orl.data.decode import decode
from orl.downstream import supervised
from orl.downstream.features import TestPhotos, by_stage, crop, extract
from orl.downstream.sets import PRESETS, read
from orl.networks import MEAN, STD, backbones
from orl.training.augment import COLUMNS
from orl.training.batches import Batches, Loader

TINY_IMAGENET = Path(__file__).parents[2].parent / "shared" / "data" / "tiny-imagenet-mini"
CLASSES = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of noisy colours: 3 classes of 8 photos to train and 4 to test."""
    folder, random = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 4)):
        for name, colour in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(n):
                pixels = np.array(colour) + random.integers(-40, 40, (48, 40, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = backbones.backbone("resnet10")
    model.train()(torch.randn(8, 3, 32, 32))  # statistics that are not the default ones
    path = tmp_path_factory.mktemp("model") / "backbone.safetensors"
    backbones.save(path, "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    return path


def settings(root: Path, **linear: object) -> config.Config:
    section = {"epochs": 3, "milestones": [2], "batch": 8, "lr": 0.05, "resize": 36, "size": 32, **linear}
    semi = {
        "shares": [0.5],
        "weight_decay": [1e-4],
        "epochs": 3,
        "milestones": [2],
        "batch": 8,
        "resize": 36,
        "size": 32,
    }
    return config.parse(
        {"seed": 2, "downstream": {"sets": {"toy": {"root": str(root)}}, "linear": section, "semi": semi}}
    )


def train(settings: config.Config, weights: Path, output: Path, **options: object) -> None:
    job = supervised.linear_job(settings, "toy", weights, *read(settings, "toy", None))
    used = config.used(settings, "linear.toy")
    supervised.evaluate(settings, job, "toy", "linear", "m", output, used, threads=1, **options)


def linear(settings: config.Config, weights: Path, output: Path, **options: object) -> dict:
    train(settings, weights, output, **options)
    return artifacts.read_results(output)


# Heads


def test_heads_are_trained_as_by_the_equations(root: Path, weights: Path) -> None:
    """Loss, Nesterov momentum, weight decay and the steps of the rate, beside torch's pieces put together by hand."""
    options = settings(root, stages=[3, 5])
    job = supervised.linear_job(options, "toy", weights, *read(options, "toy", None))
    torch.set_num_threads(1)
    run = supervised._Run(options, job, 1)
    backbone = backbones.load(weights)
    generator = torch.Generator().manual_seed(2)
    heads, norms, buffers = [], [], []
    for stage, width, channels in ((3, 256 // 2 * 16, 128), (5, 512, 512)):
        del stage
        weight = torch.empty(3, width).normal_(0, 0.01, generator=generator)
        heads.append([weight.requires_grad_(), torch.zeros(3).requires_grad_()])
        norms.append(torch.nn.BatchNorm2d(channels, affine=False))
        buffers.append([torch.zeros(3, width), torch.zeros(3)])
    batches = Batches(24, 8, 3, 2)
    with Loader(run.samples, batches, 0, False) as found:
        parts = list(found)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for step, (images, parameters, light, label) in enumerate(parts):
        run.train_step([[images, parameters, light, label]])
        views = supervised.augment(images.permute(0, 3, 1, 2), parameters)
        axes, deviations = torch.tensor(supervised.AXES), torch.tensor(supervised.DEVIATIONS)
        shift = torch.stack([axes @ (deviations * one) for one in light])[:, :, None, None]
        views = ((views * std + mean) + shift - mean) / std
        with torch.no_grad():
            maps = backbone.stages(views)
        rate = 0.05 * (0.1 if step // 3 >= 2 else 1)
        for (weight, bias), norm, buffer, stage in zip(heads, norms, buffers, (3, 5), strict=True):
            pooled = norm(supervised.pool(maps[stage - 1], stage)).flatten(1)
            loss = torch.nn.functional.cross_entropy(pooled @ weight.T + bias, label)
            for parameter, momentum, gradient in zip(
                (weight, bias), buffer, torch.autograd.grad(loss, (weight, bias)), strict=True
            ):
                slope = gradient + 1e-4 * parameter.detach()
                momentum.mul_(0.9).add_(slope)
                parameter.data -= rate * (slope + 0.9 * momentum)
    for (weight, bias), head in zip(heads, run.model.heads, strict=True):
        assert weight.norm() > 2 * 0.01 * weight.numel() ** 0.5 * 0.5
        torch.testing.assert_close(head.weight.detach(), weight.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(head.bias.detach(), bias.detach(), rtol=1e-3, atol=1e-5)
    for key, value in run.model.backbone.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[key]), key  # frozen, statistics too


def test_linear_learns_colours_and_says_what_it_did(root: Path, weights: Path, tmp_path: Path) -> None:
    options = settings(root, lr=0.001)
    result = linear(options, weights, tmp_path / "linear.json")
    metrics = result["metrics"]
    assert set(metrics["top1"]) == set("12345")
    assert metrics["top1"]["1"] > metrics["chance_top1"] + 30
    assert metrics["top5"] == dict.fromkeys("12345", 100.0)  # of three classes
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2, 3]
    assert metrics["epochs"][-1]["top1"] == metrics["top1"]
    losses = [row["loss"]["3"] for row in metrics["epochs"]]
    assert losses[0] > losses[-1] > 0
    assert metrics["chance_top1"] == pytest.approx(100 / 3)
    assert result["settings"] == config.used(options, "linear.toy")
    assert (result["task"], result["data"]["set"], result["data"]["labels"]) == ("linear", "toy", 24)
    assert [path.name for path in tmp_path.iterdir()] == ["linear.json"]  # no checkpoints left


def test_top_1_and_top_5_by_hand(root: Path, weights: Path) -> None:
    """Of the heads as they begin, on test photos cut by torchvision."""
    options = settings(root, stages=[5])
    train, val = read(options, "toy", None)
    run = supervised._Run(options, supervised.linear_job(options, "toy", weights, train, val), 1)
    with torch.no_grad():
        run.model.heads[0].weight.mul_(100)
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(36), torchvision.transforms.CenterCrop(32), torchvision.transforms.PILToTensor()]
    )
    photos = torch.stack([transform(Image.open(root / path)) for path in val.path])
    run.model.eval()
    with torch.no_grad():
        (logits,) = run.model(backbones.normalize(photos))
    right = (logits.argmax(1).numpy() == val.label).mean()
    assert run.test()["top1"]["5"] == pytest.approx(100 * right, abs=100 / 12 + 1e-6)


def stop_at_step_5(patch: pytest.MonkeyPatch) -> None:
    original = supervised._Run.train_step

    def train_step(self: supervised._Run, parts: list) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        original(self, parts)

    patch.setattr(supervised._Run, "train_step", train_step)


def test_an_interrupted_training_ends_bit_equal(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = linear(settings(root), weights, tmp_path / "whole.json")
    with monkeypatch.context() as patch:
        stop_at_step_5(patch)
        with pytest.raises(KeyboardInterrupt):
            linear(settings(root), weights, tmp_path / "broken.json", minutes=0)
    assert not (tmp_path / "broken.json").exists()
    assert linear(settings(root), weights, tmp_path / "broken.json")["metrics"] == whole["metrics"]
    # Interrupted between an epoch's checkpoint and its test: the test is done again.
    with monkeypatch.context() as patch:
        patch.setattr(supervised._Run, "test", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            linear(settings(root), weights, tmp_path / "untested.json")
    assert linear(settings(root), weights, tmp_path / "untested.json")["metrics"] == whole["metrics"]


def test_a_job_told_to_end_saves_and_goes_on(root: Path, weights: Path, tmp_path: Path) -> None:
    options = settings(root, epochs=12, milestones=[10], stages=[5])
    text = json.dumps({"seed": 2, "downstream": options.model_dump(mode="json")["downstream"]})
    command = [sys.executable, "-m", "orl", "evaluate", "linear", "--settings", text, "--set", "toy", "--name", "m",
               "--backbone", str(weights), "--output", str(tmp_path / "linear.json"), "--threads", "2",
               "--checkpoint-minutes", "0"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("linear.json.state/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    if process.returncode:  # else the training has won the race
        assert process.returncode == 143, err
        assert "stopped at step" in err
        assert not (tmp_path / "linear.json").exists()
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert "going on from step" in again.stderr
    found = artifacts.read_results(tmp_path / "linear.json")["metrics"]
    assert [row["epoch"] for row in found["epochs"]] == list(range(1, 13))
    assert os.listdir(tmp_path) == ["linear.json"]


def fixed_statistics(patch: pytest.MonkeyPatch) -> None:
    """BatchNorm by its running statistics: else, on the CPU, they are of each process's photos."""
    patch.setattr(supervised.LinearHeads, "train", lambda self, mode=True: torch.nn.Module.train(self, False))


TWO = """
import sys
from pathlib import Path
import pytest
sys.path.insert(0, {tests!r})
import test_supervised as own
with pytest.MonkeyPatch.context() as patch:
    own.fixed_statistics(patch)
    own.train(own.settings(Path({root!r}), stages=[4, 5], lr=0.01), Path({weights!r}), Path({output!r}))
"""


def test_two_processes_train_and_test_as_one(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, output = tmp_path / "two.py", tmp_path / "two.json"
    names = {"tests": str(Path(__file__).parent), "root": str(root), "weights": str(weights), "output": str(output)}
    script.write_text(TWO.format(**names))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("linear.toy: done: ") == 1  # the first process speaks for both
    fixed_statistics(monkeypatch)
    two = artifacts.read_results(output)["metrics"]
    one = linear(settings(root, stages=[4, 5], lr=0.01), weights, tmp_path / "one.json")["metrics"]
    for a, b in zip(one["epochs"], two["epochs"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert (b["top1"], b["top5"]) == (a["top1"], a["top5"])


def test_linear_is_logistic_regression(tmp_path: Path, weights: Path) -> None:
    """On real photos: within 2 points of scikit-learn's on the same frozen features."""
    if not TINY_IMAGENET.is_dir():
        pytest.skip("the tiny-imagenet-mini photos are not there")
    root = tmp_path / "set"
    for split in ("train", "val"):  # ten of the classes
        for folder in sorted((TINY_IMAGENET / split).iterdir())[:10]:
            (root / split).mkdir(parents=True, exist_ok=True)
            (root / split / folder.name).symlink_to(folder)
    train, val = read_sets(root, "train", "val")
    found = []
    for photos in (train, val):
        views = TestPhotos(photos.root, photos.path, crop, 32, 32, "ignore")
        parts = [part for (part,) in extract(weights, views, by_stage([4]), 0)]
        found.append(np.concatenate(parts).reshape(len(photos), 256, -1))  # as the norm takes statistics: by channel
    mean, std = found[0].mean((0, 2), keepdims=True), found[0].std((0, 2), keepdims=True) + 1e-5
    x, tx = (((part - mean) / std).reshape(len(part), -1) for part in found)
    # One objective: mean cross-entropy + 0.05 |w|^2, whose optimum both find; the trained one without crops and flips.
    model = LogisticRegression(C=1 / (0.1 * len(x)), max_iter=2000).fit(x, train.label)
    reference = 100 * model.score(tx, val.label)
    options = settings(
        root, stages=[4], epochs=14, milestones=[9, 12], batch=50, lr=0.01, weight_decay=0.1, resize=32, size=32
    )
    job = supervised.linear_job(options, "toy", weights, train, val)
    plain = job.views.model_copy(update={"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip_p": 0.0, "jitter_p": 0.0})
    job = dataclasses.replace(job, views=plain, lighting=0.0)
    supervised.evaluate(options, job, "toy", "linear", "m", tmp_path / "linear.json", {}, 1)
    top1 = artifacts.read_results(tmp_path / "linear.json")["metrics"]["top1"]["4"]
    assert reference > 20  # chance is 10
    assert top1 == pytest.approx(reference, abs=2)


def test_presets_are_the_papers(root: Path, weights: Path) -> None:
    for preset, classes, epochs, milestones in (
        ("imagenet", 1000, 28, (8, 16, 24)),
        ("places205", 205, 14, (4, 8, 12)),
        ("inaturalist18", 8142, 84, (24, 48, 72)),
    ):
        given = config.parse({"downstream": {"sets": {"toy": {"root": str(root), "preset": preset}}}})
        with pytest.raises(InputError, match=f"has 3 classes, but {classes} are expected"):
            read(given, "toy", None)
        job = supervised.linear_job(given, "toy", weights, *read_sets(root, "train", "val"))
        assert (job.epochs, tuple(job.milestones), job.lr, job.batch) == (epochs, milestones, 0.01, 24)
        assert (job.views.jitter_p > 0) == (job.lighting > 0) == (preset == "imagenet")
        assert PRESETS[preset].classes == classes


def test_training_crops_are_jittered_and_lit(root: Path, weights: Path) -> None:
    options = settings(root)
    job = supervised.linear_job(options, "toy", weights, *read(options, "toy", None))
    samples = supervised.ClassViews(job.train, job.rows, job.views, job.lighting, "ignore", 0)
    image, parameters, light, label = samples[0, 3]
    assert (image.shape, image.dtype, parameters.shape, light.shape) == ((32, 32, 3), np.uint8, (10,), (3,))
    assert label == job.train.label[3]
    assert np.array_equal(image, samples[0, 3][0])
    assert not np.array_equal(image, samples[1, 3][0])
    values = dict(zip(COLUMNS, parameters, strict=True))
    assert values["jitter"] == 1
    assert values["hue"] == values["grayscale"] == values["blur"] == values["solarize"] == 0
    lights = np.array([samples[epoch, 0][2] for epoch in range(300)])
    assert lights.std(0) == pytest.approx([0.1] * 3, rel=0.15)
    assert samples.file(3).endswith(str(job.train.path[3]))
    assert decode(samples.file(3)).shape == (48, 40, 3)


# Fine-tuning


def semi(options: config.Config, weights: Path, output: Path, lr: float = 0.02, run: int = 0) -> dict:
    train, val = read(options, "toy", None)
    job = supervised.semi_job(options, "toy", weights, train, subset(train, 0.5, 2), val, 0.5, lr, 10.0, run)
    supervised.evaluate(options, job, "toy", "semi_run", "m", output, {"run": run}, 1)
    return artifacts.read_results(output)


def test_fine_tuning_trains_every_layer_at_its_rate(root: Path, weights: Path, tmp_path: Path) -> None:
    options = settings(root)
    train, val = read(options, "toy", None)
    job = supervised.semi_job(options, "toy", weights, train, subset(train, 0.5, 2), val, 0.5, 0.02, 10.0, 0)
    run = supervised._Run(options, job, 1)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    with Loader(run.samples, Batches(12, 8, 3, 2), 0, False) as found:
        for batch in found:
            run.train_step([batch])
            rates = [group["lr"] for group in run.optimizer.param_groups]
            fall = 0.2 if run.step - 1 >= 2 else 1.0
            assert rates == pytest.approx([0.02 * fall, 0.2 * fall])
    for name, value in run.model.named_parameters():
        assert not torch.equal(value, before[name]), name
    result = semi(options, weights, tmp_path / "a.json")
    assert [set(row) for row in result["metrics"]["epochs"]] == [{"epoch", "loss"}] * 2 + [
        {"epoch", "loss", "top1", "top5"}
    ]
    assert result["data"]["labels"] == 12
    again = semi(options, weights, tmp_path / "b.json")
    other = semi(options, weights, tmp_path / "c.json", run=1)
    assert result["metrics"] == again["metrics"] != other["metrics"]


# Bad input


def test_bad_input(root: Path, weights: Path, tmp_path: Path) -> None:
    model = backbones.load(weights)
    with torch.no_grad():
        model.layer4[0].bn2.bias[3] = float("inf")
    bad = tmp_path / "bad.safetensors"
    backbones.save(bad, "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    with pytest.raises(InputError, match=r"bad\.safetensors: its features of .* are not finite"):
        linear(settings(root), bad, tmp_path / "out" / "linear.json")
    with pytest.raises(InputError, match=r"downstream\.sets: has no set 'other' \(found: toy\)"):
        read(settings(root), "other", None)
    with pytest.raises(InputError, match=r"downstream\.sets\.toy\.root: is not set"):
        read(config.parse({"downstream": {"sets": {"toy": {}}}}), "toy", None)
    options = settings(root)
    photos = read(options, "toy", None)
    with pytest.raises(InputError, match=r"downstream\.semi\.shares: has no 0\.3"):
        supervised.semi_job(options, "toy", weights, photos[0], np.arange(3), photos[1], 0.3, 0.1, 1.0, 0)
    with pytest.raises(InputError, match=r"the loss of step \d is not finite; lower downstream\.linear\.lr"):
        linear(settings(root, lr=1e30, stages=[5]), weights, tmp_path / "out" / "linear.json", log_every=1)
    assert not (tmp_path / "out" / "linear.json").exists()


def test_a_setting_of_the_grid_that_diverges_counts_as_0(
    root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = semi(settings(root), weights, tmp_path / "diverged.json", lr=1e30)
    assert (result["metrics"]["top1"], result["metrics"]["top5"]) == ({"5": 0.0}, {"5": 0.0})
    assert re.search(r"the loss of step \d is not finite; .* Its accuracy counts as 0", capsys.readouterr().err)
    assert semi(settings(root), weights, tmp_path / "fine.json")["metrics"]["top1"]["5"] > 0


def test_a_finished_training_leaves_those_of_other_settings(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "linear.json"
    with monkeypatch.context() as patch:
        stop_at_step_5(patch)
        with pytest.raises(KeyboardInterrupt):
            linear(settings(root), weights, output, minutes=0)
    (kept,) = tmp_path.glob("linear.json.state/*/checkpoint.pt")
    linear(settings(root, epochs=1, milestones=[]), weights, output)
    assert list(tmp_path.glob("linear.json.state/*/checkpoint.pt")) == [kept]
    linear(settings(root), weights, output)
    assert list(tmp_path.iterdir()) == [output]
