"""Weighted k-nearest-neighbour classification on pooled features (Wu et al., 2018): no training."""

import json
import os
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.classes import ClassSet
from orl.downstream.sets import chance, describe
from orl.progress import track

TASK = "knn"
ROWS = 50_000  # training features searched at a time: 400 MB of a ResNet-50's
QUERIES = 4_096  # test features at a time


def neighbors(train: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` most similar rows of `train` [n, D] for each of `queries` [q, D]: similarity float32 and row [q, k].

    Inner products, best first; exact search by FAISS, in parts, so that `train` may be a map of a file.
    """
    found = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start in range(0, len(train), ROWS):
        part = np.asarray(train[start : start + ROWS], np.float32)
        similarity, row = faiss.knn(queries, part, min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        found.add_result(similarity, row + start)
    found.finalize()
    return found.D, found.I


def votes(similarity: np.ndarray, label: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """The class with the largest sum of exp(similarity / temperature) over neighbours [q, k] of classes `label` [q, k].

    Among equals the class of the lowest number.
    """
    weight = np.exp((similarity.astype(np.float64) - similarity[:, :1]) / temperature)  # the best: 1
    total = np.zeros((len(label), classes))
    np.add.at(total, (np.arange(len(label))[:, None], label), weight)
    return total.argmax(1)


def accuracy(
    train: np.ndarray,
    train_label: np.ndarray,
    test: np.ndarray,
    test_label: np.ndarray,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, float]:
    """Share (0 to 1) of test features [m, D] that the `k` nearest of `train` [n, D] classify rightly, by k.

    Unit rows; labels int64, from 0. A `k` larger than n takes all.
    """
    classes = int(max(train_label.max(), test_label.max())) + 1
    right = dict.fromkeys(ks, 0)
    starts = range(0, len(test), QUERIES)
    for start in track(starts, len(starts), "k-NN"):
        queries = np.asarray(test[start : start + QUERIES], np.float32)
        similarity, row = neighbors(train, queries, min(max(ks), len(train)))
        for k in ks:
            said = votes(similarity[:, :k], train_label[row[:, :k]], classes, temperature)
            right[k] += int((said == test_label[start : start + QUERIES]).sum())
    return {k: count / len(test) for k, count in right.items()}


def evaluate(
    config: Config,
    name: str,
    features_path: str | os.PathLike,
    model: str,
    train: ClassSet,
    val: ClassSet,
    output: str | os.PathLike,
    threads: int,
) -> dict[str, Any]:
    """Evaluate features (artifacts.ClassFeatures) of the labelled set `name`; write and return the result.

    Metrics in percent: `top1` by k; `chance_top1`: the share of the test set's most frequent class.
    Raises InputError where the features are of other photos, or not finite.
    """
    section = config.downstream.knn
    for split, photos in (("train", train), ("val", val)):
        artifacts.check_input(features_path, split, photos.fingerprint())
    found = artifacts.read_class_features(features_path)
    for features in (found.train, found.val):
        for start in range(0, len(features), ROWS):
            if not np.isfinite(features[start : start + ROWS]).all():
                raise InputError(f"{features_path}: holds features that are not finite; make the file again.")
    faiss.omp_set_num_threads(threads)
    shares = accuracy(found.train, train.label, found.val, val.label, section.k, section.temperature)
    made = artifacts.attributes(features_path)
    result = {
        "task": TASK,
        "model": model,
        "metrics": {
            "top1": {str(k): 100 * share for k, share in shares.items()},
            "chance_top1": chance(val),
        },
        "settings": {**used(config, f"{TASK}.{name}"), "features": json.loads(made["settings"])},
        "data": describe(config, name, train, val, json.loads(made["inputs"])["weights"]),
    }
    artifacts.write_json(output, result)
    return result
