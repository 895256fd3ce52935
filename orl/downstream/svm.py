"""Multi-label linear SVMs on frozen features by VOC07's protocol (ORL release, benchmarks/svm_tools)."""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
from scipy.linalg import cho_factor, cho_solve
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.labels import Labels, listed, read_splits
from orl.progress import track

TASK = "voc07_svm"
FEW = 1000  # training photos below which one process is enough
EXACT_COST = 1.0  # from here on LIBLINEAR takes hundreds of rounds or does not converge, and `solve` is faster
EXACT_PHOTOS = 12_000  # at most: `solve` needs the square of it, 8 bytes each (1.2 GB)
SPLITS = {"voc": ("trainval", "test"), "coco": ("train2017", "val2017")}
# LIBLINEAR as the release calls it; random_state because it visits the photos in random order.
SVM: dict[str, Any] = {
    "penalty": "l2",
    "loss": "squared_hinge",
    "dual": True,
    "class_weight": {1: 2, -1: 1},
    "intercept_scaling": 1.0,
    "tol": 1e-4,
    "max_iter": 2000,
    "random_state": 0,
}


def average_precision(score: Sequence[float] | np.ndarray, label: Sequence[int] | np.ndarray) -> float:
    """Area under the monotone envelope of the precision-recall curve, 0 to 1 (VOC devkit, since 2010).

    `score` [n], finite; `label` [n]: 1 positive, -1 negative, 0 ignored (or bool). Items of equal score enter the
    ranking together, so that the value depends neither on their order nor on luck: where all scores are equal, it
    is the share of positives. Raises ValueError for scores that are not finite, or without a positive or a negative.
    """
    scores, labels = np.asarray(score, np.float64), np.asarray(label)
    kept = np.ones(labels.shape, bool) if labels.dtype == bool else labels != 0
    ranked, hit = scores[kept], labels[kept] > 0
    if hit.all() or not hit.any() or not np.isfinite(ranked).all():
        raise ValueError("average precision needs finite scores, a positive and a negative")
    order = np.argsort(-ranked, kind="stable")
    ranked, hit = ranked[order], hit[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(hit) - 1)  # last rank of each run of equal scores
    found = np.cumsum(hit)[ends]
    envelope = np.maximum.accumulate((found / (ends + 1))[::-1])[::-1]
    return float((np.diff(found, prepend=0) * envelope).sum() / found[-1])


def normalize(features: np.ndarray) -> np.ndarray:
    """x / (|x| + 1e-5) of each row, float64 [n, D] (ORL release)."""
    features = features.astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-5
    return features


def shorten(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same features with no more columns than `train` [n, D] has rows, where D is larger (float64).

    A rotation into the space of the training rows: it keeps every dot product with them, which is all that a linear
    SVM sees, so the machines are the same up to rounding, and a fit takes n / D of the time and memory.
    """
    if train.shape[1] <= len(train):
        return train, test
    axes, lower = np.linalg.qr(train.T)
    return np.ascontiguousarray(lower.T), test @ axes


def solve(gram: np.ndarray, target: np.ndarray, cost: float, margin: np.ndarray | None = None) -> np.ndarray | None:
    """The optimum of an SVM of `SVM`'s kind: `a` float64 [n], such that a photo x scores the sum of a · (x_n · x + 1).

    `gram` [n, n]: x · y + 1 of the training photos (the 1 is the intercept, which LIBLINEAR penalises, too); `target`
    [n]: 1 or -1; `margin` [n]: target · score by an SVM of similar cost, from which fewer rounds are needed.
    Newton's method (Chapelle, 2007): only photos of margin below 1 have a loss; were they known, the optimum would
    solve a linear system. Starting from a guess, both are found in turn until the photos stay the same, which makes
    it exact. None where they do not within 50 rounds.
    """
    loss = 2 * cost * np.where(target > 0, SVM["class_weight"][1], SVM["class_weight"][-1])
    active = np.ones(len(target), bool) if margin is None else margin < 1
    for _ in range(50):
        rows = np.flatnonzero(active)
        system = gram[np.ix_(rows, rows)]
        system[np.diag_indices(len(rows))] += 1 / loss[rows]
        dual = cho_solve(cho_factor(system, lower=True, overwrite_a=True), target[rows].astype(np.float64))
        now = target * (gram[:, rows] @ dual) < 1
        if (now == active).all():
            whole = np.zeros(len(target))
            whole[rows] = dual
            return whole
        active = now
    return None


def machines(
    train: np.ndarray, target: np.ndarray, costs: Sequence[float], gram: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, float, bool]]:
    """The SVM of each cost, ascending: weights [D], intercept, and whether it converged.

    `train` float64 [n, D], from `normalize`; `target` [n]: 1 or -1. With `gram` (see `solve`), costs from EXACT_COST
    on are solved exactly; the others, which LIBLINEAR solves in a few rounds, and all without it, by LIBLINEAR.
    """
    machine = None
    for cost in costs:
        dual = None
        if gram is not None and cost >= EXACT_COST:
            margin = None if machine is None else target * (train @ machine[0] + machine[1])
            dual = solve(gram, target, cost, margin)
        if dual is not None:
            machine = dual @ train, float(dual.sum()), True
        else:
            model = LinearSVC(C=cost, **SVM)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # told instead
                model.fit(train, target)
            machine = model.coef_[0], float(model.intercept_[0]), bool(model.n_iter_ < model.max_iter)
        yield machine


@dataclass(frozen=True)
class Fitted:
    """One class: test AP (0 to 1), its cost, whether cross-validation chose it, and how many fits did not converge."""

    ap: float
    cost: float
    cross_validated: bool
    fits: int
    not_converged: int


def unusable(train: np.ndarray, test: np.ndarray) -> str | None:
    """Why a class cannot be evaluated, given its labels (int8 [n]: 1, 0, -1) in both splits; None: it can."""
    if not (train > 0).any():
        return "no positive training photo"
    if (train > 0).all():
        return "no negative training photo"
    if not (test > 0).any():
        return "no positive test photo"
    if not (test < 0).any():
        return "no negative test photo"
    return None


def fit_class(
    train: np.ndarray,
    train_label: np.ndarray,
    test: np.ndarray,
    test_label: np.ndarray,
    costs: Sequence[float],
    folds: int,
    gram: np.ndarray | None = None,
) -> Fitted:
    """Choose the cost of one class by cross-validation, fit on all training photos and score the test photos.

    `train`, `test` float64 [n, D], from `normalize`; labels int8 [n] as in Labels, usable (see `unusable`); for `gram`
    see `machines`. Each cost is judged by the mean over stratified, unshuffled folds of scikit-learn's average
    precision (no envelope: what the release's `cross_val_score(scoring="average_precision")` computes); among equals
    the lowest cost wins. A fold counts where both of its parts show both kinds of photos; where none does, the cost
    nearest to 1 is taken.
    """
    target = np.where(train_label > 0, 1, -1)
    costs = sorted(costs)
    converged = []

    def scores(found: Iterable[tuple[np.ndarray, float, bool]], photos: np.ndarray) -> Iterator[np.ndarray]:
        """Of `photos` [m, D] by each machine."""
        for weights, intercept, done in found:
            converged.append(done)
            yield photos @ weights + intercept

    # One BLAS thread: the classes share the cores, and sums do not depend on the number of workers.
    with threadpool_limits(1):
        found = []  # [fold][cost]
        for kept, held in folds_of(target, folds):
            part = None if gram is None else gram[np.ix_(kept, kept)]
            fitted = machines(train[kept], target[kept], costs, part)
            found.append([average_precision_score(target[held], score) for score in scores(fitted, train[held])])
        # argmax takes the first of equals, the lowest
        cost = costs[np.argmax(np.mean(found, 0))] if found else min(costs, key=lambda cost: abs(np.log(cost)))
        (score,) = scores(machines(train, target, [cost], gram), test)
    return Fitted(average_precision(score, test_label), cost, bool(found), len(converged), converged.count(False))


def folds_of(target: np.ndarray, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The usable folds of a target [n] of 1 and -1: rows to train on, rows held out."""
    counts = ((target > 0).sum(), (target < 0).sum())
    if max(counts) < folds:  # scikit-learn refuses these; with a small set there is nothing to choose by
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer positives than folds: handled here
        parts = list(StratifiedKFold(folds, shuffle=False).split(target, target))
    return [part for part in parts if all(len(np.unique(target[rows])) == 2 for rows in part)]


def fit_classes(
    train: np.ndarray,
    train_labels: Labels,
    test: np.ndarray,
    test_labels: Labels,
    costs: Sequence[float],
    folds: int,
    workers: int,
) -> dict[str, Any]:
    """The metrics of `evaluate` from features float [n, D] of the two splits, not yet normalised.

    One process per worker; the result does not depend on their number. Each takes about three times the memory of
    the training features (float64, min(n, D) columns), for a fold and LIBLINEAR's copy of it, and of `gram`.
    Raises InputError where no class can be evaluated.
    """
    left_out = left_out_classes(train_labels, test_labels)
    columns = [column for column, name in enumerate(train_labels.classes) if name not in left_out]
    with threadpool_limits(1):  # as in fit_class
        train, test = shorten(normalize(train), normalize(test))
        gram = train @ train.T + 1 if len(train) <= EXACT_PHOTOS else None
    # Processes, not threads: LIBLINEAR has one random generator per process. joblib maps the features into each.
    # A process takes seconds to start, so that small sets are done sooner in one.
    processes = max(1, min(workers, len(columns))) if len(train) >= FEW else 1
    parallel = joblib.Parallel(n_jobs=processes, return_as="generator")
    jobs = (
        joblib.delayed(fit_class)(
            train, train_labels.label[:, column], test, test_labels.label[:, column], costs, folds, gram
        )
        for column in columns
    )
    names = [train_labels.classes[column] for column in columns]
    fitted = dict(zip(names, track(parallel(jobs), len(names), "SVM classes"), strict=True))
    seen = test_labels.label[:, columns]
    return {
        "mAP": 100 * float(np.mean([one.ap for one in fitted.values()])),
        "chance_mAP": 100 * float(np.mean((seen > 0).sum(0) / (seen != 0).sum(0))),
        "AP": {name: 100 * one.ap for name, one in fitted.items()},
        "cost": {name: one.cost for name, one in fitted.items()},
        "classes_left_out": left_out,
        "not_cross_validated": [name for name, one in fitted.items() if not one.cross_validated],
        "fits": sum(one.fits for one in fitted.values()),
        "not_converged": sum(one.not_converged for one in fitted.values()),
    }


def left_out_classes(train: Labels, test: Labels) -> dict[str, str]:
    """Class -> why it cannot be evaluated. Raises InputError where that is so for all."""
    reasons = {name: unusable(train.label[:, i], test.label[:, i]) for i, name in enumerate(train.classes)}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if len(left_out) == len(reasons):
        name, reason = next(iter(left_out.items()))
        raise InputError(f"{train.image_path[0].parent}: no class can be evaluated ({name}: {reason}, and so on).")
    return left_out


def read(config: Config, root: str | os.PathLike | None) -> tuple[Labels, Labels, dict[str, Any]]:
    """The labels of both splits of downstream.voc07_svm, and what a result says of them. Raises InputError.

    `root`, where given, takes the place of the setting.
    """
    section = config.downstream.voc07_svm
    root = section.root if root is None else root
    if root is None:
        raise InputError("downstream.voc07_svm.root: is not set; name the folder of the labelled photos.")
    train_split, test_split = section.train or SPLITS[section.layout][0], section.test or SPLITS[section.layout][1]
    train, test = read_splits(root, section.layout, train_split, test_split)
    data = {
        "root": os.fspath(root),
        "layout": section.layout,
        "train_split": train_split,
        "test_split": test_split,
        "train": len(train),
        "test": len(test),
        "fingerprint": f"{train.fingerprint()[:32]}{test.fingerprint()[:32]}",
    }
    return train, test, data


def read_features(
    path: str | os.PathLike, stages: Sequence[int], train: Labels, test: Labels
) -> tuple[artifacts.Features, dict[str, Any]]:
    """Features of the photos of both splits, and what a result says of them. Raises InputError."""
    artifacts.check_input(path, "photo list", listed(train, test))
    found = artifacts.read_features(path, stages)
    for split, arrays in (("train", found.train), ("test", found.test)):
        for stage, features in arrays.items():
            if not np.isfinite(features).all():
                raise InputError(f"{path}: {split}_{stage} holds features that are not finite; make the file again.")
    attributes = artifacts.attributes(path)
    inputs, settings = json.loads(attributes["inputs"]), json.loads(attributes["settings"])
    return found, {"weights_fingerprint": inputs["weights"], "features": settings}


def evaluate(
    config: Config,
    features_path: str | os.PathLike,
    model: str,
    root: str | os.PathLike | None,
    output: str | os.PathLike,
    workers: int,
) -> dict[str, Any]:
    """Evaluate a backbone's features (artifacts.Features) by VOC07's linear SVM; write and return the result.

    `model` is the name the result goes by; for `root` see `read`.
    Metrics, of the last of downstream.voc07_svm.stages, and in `stages` of each of them: `mAP` and, per class, `AP`
    (percent) and `cost`; `chance_mAP`: the mean share of positive test photos, what constant scores give;
    `classes_left_out`: class -> why (also one line on stderr); `not_cross_validated`: classes with too few positives
    to choose a cost; `fits` and, among them, those `not_converged` in 2000 rounds.
    Raises InputError before any work where settings, labels or features are bad; nothing is written then.
    """
    section = config.downstream.voc07_svm
    train, test, data = read(config, root)
    left_out = left_out_classes(train, test)
    found, of_features = read_features(features_path, section.stages, train, test)
    if left_out:
        listing = ", ".join(f"{name} ({reason})" for name, reason in left_out.items())
        print(f"{TASK}: {len(left_out)} of {len(train.classes)} classes left out: {listing}", file=sys.stderr)
    stages = {}
    for stage in section.stages:
        print(f"{TASK}: stage {stage}: {len(train)} training photos", file=sys.stderr, flush=True)
        stages[str(stage)] = metrics = fit_classes(
            found.train[stage], train, found.test[stage], test, section.costs, section.folds, workers
        )
        print(f"{TASK}: stage {stage}: mAP {metrics['mAP']:.2f}", file=sys.stderr, flush=True)
    result = {
        "task": TASK,
        "model": model,
        "metrics": {**metrics, "stages": stages},
        "settings": used(config, TASK),
        "data": {**data, **of_features},
    }
    artifacts.write_json(output, result)
    return result
