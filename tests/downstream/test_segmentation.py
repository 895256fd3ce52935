"""The segmentation probe through its public functions, on a tree that the tests write."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from sklearn.metrics import accuracy_score, jaccard_score

from orl import InputError, artifacts, config
from orl.data import instances
from orl.data.decode import center_crop, short_side
from orl.downstream import segmentation
from orl.networks import backbones

COLOURS = {2: (210, 40, 40), 90: (40, 60, 210)}  # category -> colour
CROWD = (40, 200, 60)


def draw(folder: Path, number: int, random: np.random.Generator) -> tuple[dict, list[dict]]:
    """A gray photo of coloured squares, later ones on earlier, smaller ones on larger; the last of five has none."""
    width, height = int(random.integers(70, 100)), int(random.integers(70, 100))
    image = Image.fromarray(random.integers(90, 110, (height, width, 3), dtype=np.uint8))
    pen, found = ImageDraw.Draw(image), []
    sides = [] if number % 5 == 4 else [44, 24]
    if number % 5 == 3:
        sides.append(20)  # a crowd
    for place, side in enumerate(sides):
        x, y = int(random.integers(0, width - side + 1)), int(random.integers(0, height - side + 1))
        crowd = place == 2
        category = int(random.choice(list(COLOURS)))
        pen.rectangle((x, y, x + side - 1, y + side - 1), CROWD if crowd else COLOURS[category])
        mask = np.zeros((height, width), np.uint8, "F")
        mask[y : y + side, x : x + side] = 1
        code = rle.encode(mask)
        outline: object = {"size": [height, width], "counts": code["counts"].decode()}
        if place == 0:
            outline = [[x, y, x + side, y, x + side, y + side, x, y + side]]
        found.append({"id": 1, "image_id": number, "category_id": category, "bbox": [x, y, side, side],
                      "iscrowd": int(crowd), "segmentation": outline})  # fmt: skip
    found.append({"id": 1, "image_id": number, "category_id": 2, "bbox": [3, 3, 0, 9], "segmentation": [[1] * 6]})
    image.save(folder / f"{number}.png")
    return {"id": number, "file_name": f"{number}.png", "width": width, "height": height}, found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split, numbers in (("train2017", range(40)), ("val2017", range(100, 115))):
        (root / split).mkdir()
        drawn = [draw(root / split, number, random) for number in numbers]
        content = {
            "images": [image for image, _ in drawn],
            "annotations": [one for _, own in drawn for one in own],
            "categories": [{"id": 90, "name": "blue"}, {"id": 2, "name": "red"}, {"id": 5, "name": "none"}],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def splits(root: Path) -> tuple[instances.Instances, instances.Instances]:
    return instances.read(root, "train2017"), instances.read(root, "val2017")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-10 whose last map tells colours apart: every random one does."""
    torch.manual_seed(0)
    model = backbones.backbone("resnet10")
    model.train()(torch.randn(8, 3, 64, 64))  # statistics that are not the default ones
    path = tmp_path_factory.mktemp("model") / "backbone.safetensors"
    backbones.save(path, "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    return path


def settings(root: Path, **section: object) -> config.Config:
    own = {"resize": 66, "size": 64, "epochs": 3, "milestones": [2], "batch": 8, "lr": 0.02, **section}
    return config.parse({"seed": 2, "downstream": {"detection": {"root": str(root)}, "segmentation": own}})


def run(options: config.Config, weights: Path, splits: tuple, output: Path, **more: object) -> dict:
    segmentation.evaluate(options, weights, *splits, "m", output, 1, **more)
    return artifacts.read_results(output)


# Label maps


def test_a_label_map_shows_what_is_painted(splits: tuple) -> None:
    """Small objects on large ones, crowds below them, at the photos' own size: from the masks alone and the colours."""
    train, _ = splits
    assert train.classes == ("red", "none", "blue")
    seen = set()
    for row in range(20):
        photo = np.asarray(Image.open(train.path[row]).convert("RGB")).astype(int)
        labels = segmentation.label_map(train, row, (photo.shape[1], photo.shape[0]))
        assert labels.dtype == np.uint8
        painted = np.zeros(labels.shape, int)
        for value, colour in ((1, COLOURS[2]), (3, COLOURS[90]), (255, CROWD)):
            painted[(photo == colour).all(2)] = value
        objects = train.objects(row)
        if len(objects) == train.first[row + 1] - train.first[row]:
            assert np.array_equal(labels, painted)
        else:  # the photo shows the crowd on top, its labels the objects
            assert ((labels == painted) | (painted == 255)).all()
            hidden = painted == 255
            for number in objects:
                hidden &= train.mask(number, row, labels.shape[::-1]) == 0
            assert np.array_equal(hidden, labels == 255)
        seen.add(tuple(np.unique(labels)))
    assert (0,) in seen
    assert any(255 in values for values in seen)


def test_nested_objects_of_any_order_stay_visible(splits: tuple) -> None:
    train, _ = splits
    outlines = [[[0, 0, side, 0, side, side, 0, side]] for side in (10, 40, 20, 30)]
    codes = [instances.outline(one) for one in outlines]
    nested = dataclasses.replace(
        train, size=np.array([[50, 60]]), first=np.array([0, 4]), label=np.array([0, 1, 2, 0]),
        crowd=np.array([False, False, True, False]), outline=np.frombuffer(b"".join(codes), np.uint8),
        outline_offsets=np.cumsum([0, *map(len, codes)]),
    )  # fmt: skip
    labels = segmentation.label_map(nested, 0, (50, 60))
    assert [labels[at, at] for at in (5, 15, 25, 35, 45)] == [1, 1, 1, 2, 0]
    many = dataclasses.replace(nested, classes=tuple(map(str, range(255))))
    assert segmentation.label_map(many, 0, (50, 60)).dtype == np.int32


def test_photo_and_labels_are_cut_alike(splits: tuple) -> None:
    """Each crop's colours are those of its labels, but at borders, where resizing blends them."""
    train, _ = splits
    flipped = set()
    for row in (0, 1, 2):
        for random in (None, *(np.random.default_rng(seed) for seed in range(8))):
            photo, labels = segmentation.view(train, row, 66, 48, "ignore", random)
            assert (photo.shape, labels.shape) == ((48, 48, 3), (48, 48))
            for value, colour in ((1, COLOURS[2]), (3, COLOURS[90])):
                near = (np.abs(photo.astype(int) - colour) < 60).all(2)
                assert ((labels == value) != near).mean() < 0.05
        whole = short_side(np.array(Image.open(train.path[row])), 66)
        assert np.array_equal(segmentation.view(train, row, 66, 48, "ignore", None)[0], center_crop(whole, 48))
        for seed in range(8):
            photo, _ = segmentation.view(train, row, 66, 48, "ignore", np.random.default_rng(seed))
            windows = np.lib.stride_tricks.sliding_window_view(whole, (48, 48, 3))[:, :, 0]
            cut = [(windows == one).all((2, 3, 4)).any() for one in (photo, photo[:, ::-1])]
            assert sum(cut) == 1
            flipped.add(cut[1])
    assert flipped == {False, True}


def test_training_crops_follow_from_seed_epoch_and_photo(splits: tuple) -> None:
    train, _ = splits
    samples = segmentation.TrainingViews(train, 66, 48, "ignore", 2)
    first = samples[0, 3]
    assert all(np.array_equal(a, b) for a, b in zip(first, samples[0, 3], strict=True))
    others = [samples[1, 3], segmentation.TrainingViews(train, 66, 48, "ignore", 3)[0, 3]]
    assert not any(np.array_equal(first[0], other[0]) for other in others)
    assert samples.bytes_per_photo() == first[0].nbytes + first[1].nbytes
    assert samples.file(3) == str(train.path[3])


# Scores


def test_scores_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    truth = random.choice([0, 1, 3, 4], 5000, p=[0.6, 0.2, 0.15, 0.05])  # 2 is not there
    named = np.where(random.random(5000) < 0.6, truth, random.integers(0, 5, 5000))
    counts = np.bincount(truth * 5 + named, minlength=25).reshape(5, 5)
    found = segmentation.scores(counts, ("a", "b", "c", "d"))
    iou = 100 * jaccard_score(truth, named, labels=range(5), average=None)
    assert [found["IoU"][name] for name in ("background", "a", "c", "d")] == pytest.approx(iou[[0, 1, 3, 4]])
    assert found["IoU"]["b"] is None
    assert found["mIoU"] == pytest.approx(iou[[0, 1, 3, 4]].mean())
    assert found["mIoU_objects"] == pytest.approx(iou[[1, 3, 4]].mean())
    assert found["pixel_accuracy"] == pytest.approx(100 * accuracy_score(truth, named))
    only = 100 * jaccard_score(truth, np.zeros_like(truth), labels=[0, 1, 3, 4], average="macro", zero_division=0)
    assert found["background_only_mIoU"] == pytest.approx(only)
    empty = segmentation.scores(np.diag([7, 0, 0]), ("a", "b"))
    assert (empty["mIoU"], empty["mIoU_objects"]) == (100, None)


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "LOGITS", 3 * 4 * 64**2)  # three photos: parts of a batch differ in length


def test_the_test_by_hand(root: Path, weights: Path, splits: tuple, few_at_a_time: None) -> None:
    """Of a head that is drawn at random: named by torch's pieces, scored by scikit-learn."""
    train, test = splits
    probe = segmentation._Run(settings(root), weights, train, test, 1)
    with torch.no_grad():
        probe.model.head.weight.normal_(0, 1)
    found = segmentation.scores(probe.test(), train.classes)
    probe.model.eval()
    truth, named = [], []
    for row in range(len(test)):
        photo, labels = segmentation.view(test, row, 66, 64, "ignore", None)
        with torch.no_grad():
            last = probe.model.backbone.stages(backbones.normalize(torch.from_numpy(photo).permute(2, 0, 1)[None]))[-1]
            logits = torch.einsum("bchw,kc->bkhw", last / (1 + 1e-5) ** 0.5, probe.model.head.weight[:, :, 0, 0])
        large = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
        truth.append(labels[labels != 255])
        named.append(large.argmax(1)[0].numpy()[labels != 255])
    truth, named = np.concatenate(truth), np.concatenate(named)
    iou = 100 * jaccard_score(truth, named, labels=[0, 1, 3], average=None)
    assert [found["IoU"][name] for name in ("background", "red", "blue")] == pytest.approx(iou, abs=0.1)
    assert found["IoU"]["none"] is None
    assert len(set(named)) > 2


# Training


def test_a_step_is_that_of_the_equations(root: Path, weights: Path, splits: tuple, few_at_a_time: None) -> None:
    """Loss, ignored pixels, momentum, decay and the rate's falls, beside torch's pieces put together by hand."""
    train, test = splits
    probe = segmentation._Run(settings(root, epochs=2, milestones=[1]), weights, train, test, 1)
    backbone, norm = backbones.load(weights), torch.nn.BatchNorm2d(512, affine=False, momentum=None)
    head = torch.nn.Conv2d(512, 4, 1)
    torch.nn.init.normal_(head.weight, 0, 0.01, generator=torch.Generator().manual_seed(2))
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    for step in range(10):  # two epochs
        rows = [(step // 5, 8 * (step % 5) + number) for number in range(8)]
        views = [probe.samples[key] for key in rows]
        images, labels = (torch.stack([torch.from_numpy(view[part]) for view in views]) for part in (0, 1))
        probe.train_step([[images, labels]])
        with torch.no_grad():
            last = backbone.stages(backbones.normalize(images.permute(0, 3, 1, 2)))[-1]
        large = torch.nn.functional.interpolate(head(norm(last)), (64, 64), mode="bilinear", align_corners=False)
        loss = torch.nn.functional.cross_entropy(large, labels.long(), ignore_index=255)
        optimizer.param_groups[0]["lr"] = 0.02 if step < 5 else 0.002
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(probe.model.head.weight, head.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(probe.model.head.bias, head.bias, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(probe.model.norm.running_var, norm.running_var, rtol=1e-3, atol=1e-5)
    for key, value in probe.model.backbone.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[key]), key  # frozen, statistics too


def test_it_learns_colours_and_says_what_it_did(root: Path, weights: Path, splits: tuple, tmp_path: Path) -> None:
    train, test = splits
    options = settings(root, resize=100, size=96, epochs=6, milestones=[5], lr=0.1)
    result = run(options, weights, splits, tmp_path / "segmentation.json")
    metrics = result["metrics"]
    assert metrics["mIoU"] > metrics["background_only_mIoU"] + 25
    assert min(metrics["IoU"][name] for name in ("red", "blue")) > 40
    assert [row["epoch"] for row in metrics["epochs"]] == list(range(1, 7))
    assert metrics["epochs"][0]["loss"] > 1.3 * metrics["epochs"][-1]["loss"] > 0
    assert (result["task"], result["model"]) == ("segmentation", "m")
    assert result["settings"] == config.used(options, "segmentation")
    assert result["data"] == {
        "root": str(root), "train": "train2017", "test": "val2017", "train_photos": 40, "test_photos": 15,
        "categories": 3, "fingerprint": f"{train.fingerprint()[:32]}{test.fingerprint()[:32]}",
        "weights_fingerprint": artifacts.fingerprint(weights),
        "left_out": {"train": {"without_area": 40, "without_mask": 0}, "test": {"without_area": 15, "without_mask": 0}},
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["segmentation.json"]  # no checkpoints left


def test_an_interrupted_training_ends_bit_equal(
    root: Path, weights: Path, splits: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGTERM, by an error, and between the last checkpoint and the end of the test."""
    whole = run(settings(root), weights, splits, tmp_path / "whole.json")
    step = segmentation._Run.train_step

    def terminated(self: segmentation._Run, parts: list) -> None:
        step(self, parts)
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    def broken(self: segmentation._Run, parts: list) -> None:
        if self.step == 7:
            raise KeyboardInterrupt
        step(self, parts)

    def untested(self: segmentation._Run) -> None:
        raise KeyboardInterrupt

    for name, stop, error in (("train_step", terminated, SystemExit), ("train_step", broken, KeyboardInterrupt),
                              ("test", untested, KeyboardInterrupt)):  # fmt: skip
        output = tmp_path / f"{stop.__name__}.json"
        with monkeypatch.context() as patch:
            patch.setattr(segmentation._Run, name, stop)
            with pytest.raises(error) as raised:
                run(settings(root), weights, splits, output, minutes=15 if stop is terminated else 0)
        assert getattr(raised.value, "code", 143) == 143
        del raised  # its frames hold the lock
        assert not output.exists()
        assert run(settings(root), weights, splits, output)["metrics"] == whole["metrics"]
    assert not list(tmp_path.glob("*.state"))


TWO = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_segmentation as own
root = Path({root!r})
splits = [own.instances.read(root, split) for split in ("train2017", "val2017")]
own.segmentation.Segmenter.train = own.fixed_statistics
own.segmentation.evaluate(own.settings(root, epochs=1), Path({weights!r}), *splits, "m", {output!r}, 2)
"""


def fixed_statistics(self: segmentation.Segmenter, mode: bool = True) -> torch.nn.Module:
    """BatchNorm by its running statistics: else, on the CPU, they are of each process's photos."""
    return torch.nn.Module.train(self, False)


def test_two_processes_train_and_test_as_one(
    root: Path, weights: Path, splits: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, output = tmp_path / "two.py", tmp_path / "two.json"
    names = {"tests": str(Path(__file__).parent), "root": str(root), "weights": str(weights), "output": str(output)}
    script.write_text(TWO.format(**names))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("segmentation: done: ") == 1  # the first process speaks for both
    monkeypatch.setattr(segmentation.Segmenter, "train", fixed_statistics)
    one = run(settings(root, epochs=1), weights, splits, tmp_path / "one.json")["metrics"]
    two = artifacts.read_results(output)["metrics"]
    assert two["epochs"][0]["loss"] == pytest.approx(one["epochs"][0]["loss"], rel=1e-5)
    assert two["pixel_accuracy"] == pytest.approx(one["pixel_accuracy"], abs=0.05)
    assert two["mIoU"] == pytest.approx(one["mIoU"], abs=0.05)


# Bad input


def test_bad_input(root: Path, weights: Path, splits: tuple, tmp_path: Path) -> None:
    train, test = splits
    output = tmp_path / "out" / "segmentation.json"
    with pytest.raises(InputError, match=r"shares 40 photos with"):
        run(settings(root), weights, (train, train), output)
    with pytest.raises(InputError, match=r"downstream\.segmentation: size 80 does not fit into resize 66"):
        settings(root, size=80)
    crowds = dataclasses.replace(test, crowd=np.ones_like(test.crowd))
    with pytest.raises(InputError, match=r"instances_val2017\.json: has no object but crowds"):
        run(settings(root), weights, (train, crowds), output)
    other = dataclasses.replace(train, size=train.size + 1)
    with pytest.raises(InputError, match=r"\d\.png: has \d+ x \d+ pixels, but .*instances_train2017\.json says"):
        run(settings(root), weights, (other, test), output)
    with pytest.raises(InputError, match=r"the loss of step \d is not finite; lower downstream\.segmentation\.lr"):
        run(settings(root, lr=1e38), weights, splits, output, log_every=1)
    assert not output.exists()
