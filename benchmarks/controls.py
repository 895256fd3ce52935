"""Two controls of docs/evidence.md, for runs that have been made: `python benchmarks/controls.py CONFIG…`.

Statistics: mAP of the run's models with BatchNorm's statistics from training, and with those of the labelled training
photos as they are tested. By ridge regression on the pooled features: much quicker than the SVM.
Pairs (generated scenes): BYOL on crops of the annotated objects, paired with themselves, with another object of the
class (pairs that no stage 2 can surpass), or with a random one: how well a ridge classifier then tells the classes.
"""

import argparse
import copy
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from orl.config import Config, load
from orl.data import coco
from orl.data.decode import decode, resize_crop
from orl.data.labels import read_splits
from orl.data.views import rng
from orl.downstream.features import squash
from orl.downstream.svm import average_precision
from orl.networks import backbones
from orl.pretrain.byol import BYOL
from orl.pretrain.schedule import learning_rate, momentum
from orl.report.repeats import arm_of
from orl.training.augment import augment, draw

PENALTIES = np.logspace(0, 5, 11)
BATCH = 64


def test_view(path: Path, resize: int, size: int) -> Tensor:
    """A photo as voc07_svm sees it: uint8 [3, size, size]."""
    return torch.from_numpy(squash(decode(path, "ignore"), resize, size)).permute(2, 0, 1)


def pooled(model: backbones.ResNet, photos: Tensor) -> np.ndarray:
    """Features [n, D] of photos uint8 [n, 3, S, S]."""
    with torch.inference_mode():
        return torch.cat([model(backbones.normalize(part)) for part in photos.split(BATCH)]).numpy()


def re_estimated(model: backbones.ResNet, photos: Tensor) -> backbones.ResNet:
    """The same backbone with BatchNorm's statistics of `photos`."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
    with torch.no_grad():
        for part in photos.split(BATCH):
            model.train()(backbones.normalize(part))
    return model.eval()


def statistics(results: Path) -> None:
    """Print the mAP of each model of a run, with both kinds of statistics."""
    files = sorted(results.glob("downstream/*/voc07_svm.json"), key=lambda file: arm_of(file.parent.name))
    result = json.loads(files[0].read_text())
    data, section = result["data"], result["settings"]["downstream"]["voc07_svm"]
    sides = section["resize"], section["size"]
    splits = read_splits(data["root"], data["layout"], data["train_split"], data["test_split"])
    train, test = (torch.stack([test_view(path, *sides) for path in split.image_path]) for split in splits)
    signs, labels = np.where(splits[0].label > 0, 1.0, -1.0), splits[1].label
    known = [c for c in range(labels.shape[1]) if (signs[:, c] > 0).any() and (labels[:, c] > 0).any()]

    def score(model: backbones.ResNet) -> float:
        ridge = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
        found = ridge.fit(pooled(model, train), signs).predict(pooled(model, test))
        return 100 * float(np.mean([average_precision(found[:, c], labels[:, c]) for c in known]))

    print(f"\n| {results.name} | mAP, statistics of training | of the test's size |\n| --- | --- | --- |")
    for file in files:
        if file.parent.name.startswith("random"):
            continue
        model = backbones.load(results / "models" / file.parent.name / "backbone.safetensors").eval()
        print(f"| {file.parent.name} | {score(model):.2f} | {score(re_estimated(model, train)):.2f} |", flush=True)


def crops(scenes: Path, part: str, side: int) -> tuple[Tensor, np.ndarray]:
    """The annotated objects of at least 16 px of a part: uint8 [n, 3, side, side] and their categories."""
    objects = coco.read_objects(scenes / f"annotations/instances_{part}.json")
    found, of = [], []
    for photo, name in enumerate(objects.name):
        image = decode(scenes / part / name, "ignore")
        for row in np.flatnonzero((objects.photo == photo) & (objects.box[:, 2:].min(1) >= 16)):
            x, y, w, h = (round(value) for value in objects.box[row].tolist())
            found.append(resize_crop(image, (x, y, w, h), (side, side)))
            of.append(objects.category[row])
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2), np.array(of)


def pairs(config: Config, scenes: Path, steps: Iterable[int]) -> None:
    """Print how well objects are classified after BYOL on pairs of three kinds."""
    (photos, of), (tests, truth) = (crops(scenes, part, config.stage3.patch) for part in ("train2017", "val2017"))

    def partners(kind: str, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if kind == "itself":
            return rows
        if kind == "random":
            return random.integers(len(of), size=len(rows))
        return np.array([random.choice(np.flatnonzero(of == of[row])) for row in rows])

    def accuracy(model: backbones.ResNet) -> float:
        ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
        return 100 * ridge.fit(pooled(model, photos), of).score(pooled(model, tests), truth)

    def view(rows: np.ndarray, recipe: int, random: np.random.Generator) -> Tensor:
        parameters = np.stack([draw(config.stage1.views, recipe, random) for _ in rows])
        return augment(photos[rows], torch.from_numpy(parameters))

    schedule = config.stage1.optimizer
    chance = 100 * np.bincount(truth).max() / len(truth)
    print(f"\n{len(of)} objects to train, {len(truth)} to test; accuracy by chance {chance:.1f}")
    print("\n| paired with | steps | loss at the end | accuracy |\n| --- | --- | --- | --- |")
    for kind, total in [("itself", 0), *((kind, total) for total in steps for kind in ("itself", "class", "random"))]:
        random = rng(config.seed)
        model = BYOL(config.stage1, torch.Generator().manual_seed(config.seed)).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9, weight_decay=schedule.weight_decay)
        last: list[float] = []
        for step in range(total):
            per_epoch, rate = max(1, total // schedule.epochs), schedule.lr * BATCH / 512
            rate = learning_rate(step, per_epoch, schedule.epochs, rate, schedule.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = random.integers(len(of), size=BATCH)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                losses, _ = model(view(rows, 0, random), view(partners(kind, rows, random), 1, random))
            optimizer.zero_grad()
            losses["global"].backward()
            optimizer.step()
            model.update_target(momentum(step, total, schedule.ema))
            last = [*last[-49:], losses["global"].item()]
        name, loss = (kind, f"{np.mean(last):.2f}") if last else ("(random weights)", "")
        print(f"| {name} | {total} | {loss} | {accuracy(model.online.backbone.eval()):.1f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="+", help="of runs whose results/NAME exist")
    parser.add_argument("--steps", type=int, nargs="+", default=[620, 3000], help="of the training on pairs")
    given = parser.parse_args()
    for path in given.config:
        config = load(path)
        results = Path("results", config.name)
        statistics(results)
        if (results / "scenes").exists():
            pairs(config, results / "scenes", given.steps)
