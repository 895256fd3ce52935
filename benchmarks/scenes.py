"""Are the embedded scenes fit for their purpose? Measures what DESIGN accepts the generator by, on fresh scenes.

1. Selective search finds the objects: recall at IoU 0.5 of those above the size limit, of all raw boxes and of the
   boxes that the method keeps; target at least 0.8.
2. A supervised ResNet can tell the classes: mAP on the val scenes; target at least 85.
3. Random features and a colour histogram cannot: mAP of a linear SVM on them, beside chance.

    python benchmarks/scenes.py --scenes 2000 --epochs 30
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from sklearn.model_selection import cross_val_predict
from sklearn.svm import LinearSVC
from torch import nn
from torch.nn import functional as F

from orl.data.scenes import CLASSES, generate

try:
    from orl.discovery.proposals import filter_boxes
except ImportError:  # the proposals module is written at the same time

    def filter_boxes(
        boxes: NDArray[Any], min_size: int = 96, max_aspect: float = 3.0, max_iou: float = 0.5, top_n: int = 100
    ) -> NDArray[Any]:
        kept: list[NDArray[Any]] = []
        for box in boxes:
            w, h = box[2:]
            if min(w, h) < min_size or max(w / h, h / w) > max_aspect:
                continue
            if not kept or overlaps(box[None], np.array(kept)).max() <= max_iou:
                kept.append(box)
            if len(kept) == top_n:
                break
        return np.array(kept if kept else boxes[:1])


def overlaps(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """IoU [len(a), len(b)] of boxes x y w h."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum((a[:, :2] + a[:, 2:])[:, None], (b[:, :2] + b[:, 2:])[None])
    both = np.clip(high - low, 0, None).prod(-1)
    return both / (a[:, 2:].prod(1)[:, None] + b[:, 2:].prod(1)[None] - both)


def recall(root: Path, scenes: int, min_size: int) -> dict[str, float]:
    """Share of val objects at least `min_size` pixels wide and high that a box covers with IoU 0.5 or more."""
    coco = json.loads((root / "annotations/instances_val2017.json").read_text())
    libc, found_raw, found_kept, raw_count, kept_count, seconds = ctypes.CDLL(None), [], [], 0, 0, 0.0
    for image in coco["images"][:scenes]:
        truth = np.array([a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"]]).reshape(-1, 4)
        truth = truth[(truth[:, 2:] >= min_size).all(1)]
        picture = cv2.imread(str(root / "val2017" / image["file_name"]))
        started = time.perf_counter()
        libc.srand(image["id"])
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(picture)
        search.switchToSelectiveSearchFast()
        raw = search.process()
        seconds += time.perf_counter() - started
        kept = np.asarray(filter_boxes(raw, min_size=min_size))
        raw_count, kept_count = raw_count + len(raw), kept_count + len(kept)
        if len(truth):
            found_raw.extend(overlaps(truth, raw).max(1) >= 0.5)
            found_kept.extend(overlaps(truth, kept).max(1) >= 0.5)
    n = min(scenes, len(coco["images"]))
    return {"raw": float(np.mean(found_raw)), "kept": float(np.mean(found_kept)), "objects": len(found_raw),
            "boxes_raw": raw_count / n, "boxes_kept": kept_count / n, "seconds": seconds / n}


def load(root: Path, part: str, side: int) -> tuple[torch.Tensor, NDArray[Any]]:
    """Scenes squashed to uint8 [N, 3, side, side] RGB, and VOC's 1/0/-1 labels [N, classes]."""
    voc = root / "VOCdevkit/VOC2007"
    lists = [(voc / f"ImageSets/Main/{c.name}_{part}.txt").read_text().split() for c in CLASSES]
    labels = np.array([[int(flag) for flag in words[1::2]] for words in lists]).T
    pictures = [cv2.imread(str(voc / f"JPEGImages/{name}.jpg"))[..., ::-1] for name in lists[0][::2]]
    small = [cv2.resize(p, (side, side), interpolation=cv2.INTER_AREA) for p in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous(), labels


def average_precision(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """Area under the monotone precision envelope; difficult ones (label 0) are ignored."""
    order = np.argsort(-scores[labels != 0], kind="stable")
    hits = (labels[labels != 0] == 1)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(np.maximum.accumulate(precision[::-1])[::-1][hits].mean())


def mean_ap(scores: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    return 100 * np.array([average_precision(scores[:, c], labels[:, c]) for c in range(labels.shape[1])])


def normalise(x: torch.Tensor) -> torch.Tensor:
    return (x.float() / 255 - 0.45) / 0.25


def supervised(
    train: tuple[torch.Tensor, NDArray[Any]], val: tuple[torch.Tensor, NDArray[Any]], side: int, epochs: int
) -> NDArray[np.float64]:
    """AP per class of a ResNet-10 trained with binary cross-entropy, the classes' mean being the mAP."""
    torch.manual_seed(0)
    net = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=len(CLASSES)
    ).to(memory_format=torch.channels_last)
    pictures, batch = train[0], 64
    targets = torch.from_numpy((train[1] > 0).astype(np.float32))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(pictures) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2)
    rng = np.random.default_rng(0)
    for epoch in range(epochs):
        total = 0.0
        for rows in np.array_split(rng.permutation(len(pictures)), len(pictures) // batch):
            top, left = rng.integers(0, pictures.shape[-1] - side + 1, 2)
            x = normalise(pictures[torch.from_numpy(rows)][..., top : top + side, left : left + side])
            for axis in (2, 3):
                flips = torch.from_numpy(rng.random(len(rows)) < 0.5)
                x[flips] = x[flips].flip(axis)
            if rng.random() < 0.5:
                x = x.transpose(2, 3)
            loss = F.binary_cross_entropy_with_logits(
                net(x.contiguous(memory_format=torch.channels_last)), targets[torch.from_numpy(rows)]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if (epoch + 1) % 5 == 0:
            print(f"  epoch {epoch + 1}: loss {total * batch / len(pictures):.3f}", flush=True)
    net.eval()
    cut = (pictures.shape[-1] - side) // 2
    with torch.no_grad():
        middle = normalise(val[0][..., cut : cut + side, cut : cut + side])
        scores = torch.cat([net(x) + net(x.flip(3)) + net(x.flip(2)) for x in middle.split(100)])
    return mean_ap(scores.numpy(), val[1])


def svm(train_x: NDArray[Any], train_y: NDArray[Any], val_x: NDArray[Any], val_y: NDArray[Any]) -> float:
    """mAP of linear SVMs on unit features, the cost chosen per class by 3-fold cross-validation."""
    scale = [x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5) for x in (train_x, val_x)]
    results = []
    for c in range(train_y.shape[1]):
        y = (train_y[:, c] == 1).astype(int)
        machines = [LinearSVC(C=cost, class_weight={1: 2, 0: 1}, max_iter=2000) for cost in (0.1, 1.0, 10.0)]
        held_out = [cross_val_predict(m, scale[0], y, cv=3, method="decision_function") for m in machines]
        quality = [average_precision(scores, 2 * y - 1) for scores in held_out]
        best = machines[int(np.argmax(quality))].fit(scale[0], y)
        results.append(100 * average_precision(best.decision_function(scale[1]), val_y[:, c]))
    return float(np.mean(results))


def random_features(pictures: torch.Tensor) -> NDArray[np.float64]:
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()
    with torch.no_grad():
        return torch.cat([net.eval()(normalise(x)) for x in pictures.split(100)]).double().numpy()


def colour_histogram(pictures: torch.Tensor) -> NDArray[np.float64]:
    bins = (pictures.numpy() >> 5).astype(int)
    cells = (bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]).reshape(len(bins), -1)
    return np.sqrt(np.stack([np.bincount(row, minlength=512) for row in cells]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000, help="train scenes (default %(default)s)")
    parser.add_argument("--val", type=int, default=400, help="val scenes (default %(default)s)")
    parser.add_argument("--searched", type=int, default=150, help="val scenes searched (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="of the supervised network (default %(default)s)")
    parser.add_argument("--side", type=int, default=96, help="its input, pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, OpenCV {cv2.__version__}")

    with tempfile.TemporaryDirectory() as folder:
        root, started = Path(folder) / "scenes", time.perf_counter()
        counts = generate(root, train=args.scenes, val=args.val, seed=args.seed, workers=args.workers)
        seconds = time.perf_counter() - started
        pictures = counts["train"] + counts["val"] + counts["objects_train"] + counts["objects_val"]
        print(f"drawn: {pictures} pictures in {seconds:.1f} s with {args.workers} processes: "
              f"{pictures / seconds:.0f} pictures/s; {counts}")

        min_size = round(128 * 96 / 480)
        r = recall(root, args.searched, min_size)
        print(f"selective search: recall {r['raw']:.3f} of all {r['boxes_raw']:.0f} boxes, {r['kept']:.3f} of the "
              f"{r['boxes_kept']:.1f} kept ones, {r['objects']} objects of at least {min_size} px "
              f"(target 0.8); {r['seconds']:.2f} s per scene", flush=True)

        side = args.side + math.ceil(args.side / 8)
        train, val = load(root, "trainval", side), load(root, "test", side)

    chance = 100 * float((val[1] == 1).sum() / (val[1] != 0).sum())
    for name, feature in (("random ResNet-18", random_features), ("colour histogram", colour_histogram)):
        result = svm(feature(train[0]), train[1], feature(val[0]), val[1])
        print(f"linear SVM on {name}: mAP {result:.1f} (chance {chance:.1f})", flush=True)
    started = time.perf_counter()
    ap = supervised(train, val, args.side, args.epochs)
    print("  " + ", ".join(f"{c.name} {a:.0f}" for c, a in zip(CLASSES, ap, strict=True)))
    print(f"supervised ResNet-10 at {args.side} px, {args.epochs} epochs: mAP {ap.mean():.1f} (target 85); "
          f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
