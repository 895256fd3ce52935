"""Are the embedded scenes fit for their purpose? Measures on fresh scenes what a good generator must show.

1. Selective search finds the objects: recall at IoU 0.5 of those above the size limit, by all raw boxes and by the
   boxes that the method keeps. Target: at least 0.8.
2. A supervised ResNet-10 learns the classes from whole scenes (one yes or no per class, from random weights): mAP on
   the val scenes. Target: at least 85.
3. Random features and a colour histogram do not tell them: mAP of a linear SVM on each, beside chance.

    python benchmarks/scenes.py                     # everything, about ten minutes on one core
    python benchmarks/scenes.py --epochs 0          # without 2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from orl.config import Scenes
from orl.data.scenes import CLASSES, generate
from orl.data.views import iou
from orl.discovery.proposals import filter_boxes, selective_search
from orl.downstream.svm import average_precision, fit_class, normalize

SHORT_SIDE, LONG_SIDE = 128, 160
MIN_SIZE = round(SHORT_SIDE * 96 / 480)  # the paper's 96 px are a fifth of a COCO photo's short side


def recall(root: Path, scenes: int) -> str:
    """How many of the val objects at least MIN_SIZE wide and high have a box of IoU 0.5 or more."""
    coco = json.loads((root / "annotations/instances_val2017.json").read_text())
    found: list[tuple[bool, bool]] = []
    counts, seconds = [], 0.0
    for image in coco["images"][:scenes]:
        truth = [np.array(a["bbox"]) for a in coco["annotations"] if a["image_id"] == image["id"]]
        picture = cv2.imread(str(root / "val2017" / image["file_name"]))
        assert picture is not None
        started = time.perf_counter()
        raw = selective_search(picture[..., ::-1], image["id"])
        seconds += time.perf_counter() - started
        kept = filter_boxes(raw, min_size=MIN_SIZE)
        counts.append((len(raw), len(kept)))
        large = [box for box in truth if min(box[2:]) >= MIN_SIZE]
        found += [(iou(box, raw).max() >= 0.5, iou(box, kept).max() >= 0.5) for box in large]
    of_raw, of_kept = np.mean(found, axis=0)
    raws, keeps = np.mean(counts, axis=0)
    return (
        f"selective search: recall {of_raw:.3f} by all {raws:.0f} boxes of a scene, {of_kept:.3f} by the "
        f"{keeps:.1f} kept ones (target 0.8); {len(found)} objects of {MIN_SIZE} px or more, "
        f"{seconds / len(counts):.2f} s per scene"
    )


def load(root: Path, part: str, side: int) -> tuple[torch.Tensor, np.ndarray]:
    """Scenes squashed to uint8 [N, 3, side, side], and VOC's labels (1, 0 difficult, -1), [N, classes]."""
    voc = root / "VOCdevkit/VOC2007"
    lists = [(voc / f"ImageSets/Main/{c.name}_{part}.txt").read_text().split() for c in CLASSES]
    pictures = []
    for name in lists[0][::2]:
        picture = cv2.imread(str(voc / f"JPEGImages/{name}.jpg"), cv2.IMREAD_COLOR_RGB)
        assert picture is not None
        pictures.append(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA))
    labels = np.array([words[1::2] for words in lists], np.int8).T
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), labels


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    return ((pictures.float() / 255 - 0.45) / 0.25).contiguous(memory_format=torch.channels_last)


class Supervised(nn.Module):
    """A ResNet-10 whose score of a class is the log-mean-exp over the picture: one object somewhere is enough."""

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        self.trunk = nn.Sequential(*list(resnet.children())[:-2])
        self.head = nn.Conv2d(512, len(CLASSES), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.trunk(x)).float().flatten(2)
        return scores.logsumexp(2) - np.log(scores.shape[2])


def train(pictures: torch.Tensor, labels: np.ndarray, side: int, epochs: int, bf16: bool) -> nn.Module:
    """Binary cross-entropy on crops of side px, flipped and turned; loss and time are printed on the way."""
    torch.manual_seed(0)
    rng, batch, started = np.random.default_rng(0), 32, time.perf_counter()
    model = Supervised().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = len(pictures) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, epochs * steps, pct_start=0.2)
    target = torch.from_numpy((labels > 0).astype(np.float32))
    for epoch in range(epochs):
        losses = []
        for rows in np.array_split(rng.permutation(len(pictures)), steps):
            top, left = rng.integers(0, pictures.shape[-1] - side + 1, 2)
            x = pictures[rows][..., top : top + side, left : left + side]
            for axis in (2, 3):
                chosen = torch.from_numpy(rng.random(len(x)) < 0.5)
                x[chosen] = x[chosen].flip(axis)
            if rng.random() < 0.5:
                x = x.transpose(2, 3)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                scores = model(scaled(x))
            loss = F.binary_cross_entropy_with_logits(scores, target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if (epoch + 1) % 5 == 0:
            spent = time.perf_counter() - started
            print(f"  epoch {epoch + 1}: loss {np.mean(losses):.3f}, {spent:.0f} s", flush=True)
    return model.eval()


def outputs(model: nn.Module, pictures: torch.Tensor, side: int) -> np.ndarray:
    cut = (pictures.shape[-1] - side) // 2
    with torch.inference_mode():
        parts = [model(scaled(x[..., cut : cut + side, cut : cut + side])) for x in pictures.split(100)]
    return torch.cat(parts).double().numpy()


def colours(pictures: torch.Tensor) -> np.ndarray:
    """Square roots of the histogram over 8 x 8 x 8 colours, [N, 512]."""
    r, g, b = (pictures.numpy() >> 5).astype(int).transpose(1, 0, 2, 3)
    cells = (64 * r + 8 * g + b).reshape(len(r), -1)
    return np.sqrt([np.bincount(row, minlength=512) for row in cells])


def svm(train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray) -> float:
    a, b = normalize(train_x), normalize(val_x)
    columns = range(train_y.shape[1])
    fitted = [fit_class(a, train_y[:, c], b, val_y[:, c], (0.1, 1.0, 10.0), 3) for c in columns]
    return 100 * float(np.mean([one.ap for one in fitted]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2200, help="train scenes (default %(default)s)")
    parser.add_argument("--val", type=int, default=400, help="val scenes (default %(default)s)")
    parser.add_argument("--searched", type=int, default=150, help="of them searched (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="of supervised training (default %(default)s)")
    parser.add_argument("--side", type=int, default=96, help="of what networks see, pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="also processes (default %(default)s)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    print(
        f"machine: {platform.machine()}, {args.threads} of {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, OpenCV {cv2.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        root, started = Path(folder) / "scenes", time.perf_counter()
        settings = Scenes(train=args.scenes, val=args.val, size=(SHORT_SIDE, LONG_SIDE), seed=args.seed)
        made = generate(root, settings, args.threads)
        seconds = time.perf_counter() - started
        pictures = args.scenes + args.val + made["objects_train"] + made["objects_val"]
        print(f"drawing: {pictures} pictures in {seconds:.1f} s, {pictures / seconds:.0f} per second; {made}")
        print(recall(root, args.searched), flush=True)
        larger = args.side + args.side // 8
        train_x, train_y = load(root, "trainval", larger)
        val_x, val_y = load(root, "test", larger)

    chance = 100 * float(np.mean((val_y > 0).sum(0) / (val_y != 0).sum(0)))
    torch.manual_seed(0)
    untrained = torchvision.models.resnet18()
    untrained.fc = nn.Identity()
    random = [outputs(untrained.eval(), x, args.side) for x in (train_x, val_x)]
    print(f"SVM on random ResNet-18 features: mAP {svm(random[0], train_y, random[1], val_y):.1f}, chance {chance:.1f}")
    result = svm(colours(train_x), train_y, colours(val_x), val_y)
    print(f"SVM on a colour histogram: mAP {result:.1f}, chance {chance:.1f}", flush=True)
    if args.epochs:
        started = time.perf_counter()
        scores = outputs(train(train_x, train_y, args.side, args.epochs, args.bf16), val_x, args.side)
        ap = [100 * average_precision(scores[:, c], val_y[:, c]) for c in range(len(CLASSES))]
        print("  " + ", ".join(f"{c.name} {one:.0f}" for c, one in zip(CLASSES, ap, strict=True)))
        print(
            f"supervised ResNet-10, {args.scenes} scenes at {args.side} px, {args.epochs} epochs: "
            f"mAP {np.mean(ap):.1f} (target 85), {time.perf_counter() - started:.0f} s"
        )


if __name__ == "__main__":
    main()
