"""Low-shot linear SVMs on frozen features by VOC07's protocol (FAIR's self-supervision benchmark; ORL release)."""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.labels import Labels
from orl.data.views import rng
from orl.downstream import svm
from orl.progress import track

TASK = "voc07_lowshot"
NEGATIVES = 19  # per positive: VOC's classes but one
Protocol = Literal["release", "clean"]


def sample(label: np.ndarray, k: int, random: np.random.Generator) -> np.ndarray:
    """Rows int64, ascending, of `k` positives and 19 · `k` negatives (all, where there are fewer), drawn without
    replacement from a class's labels int8 [n] as in Labels.

    Difficult photos are negatives, as in the training of the full SVM; in FAIR's lists (`read_lists`) there are none.
    Raises ValueError for fewer than `k` positives.
    """
    positives, negatives = np.flatnonzero(label > 0), np.flatnonzero(label <= 0)
    drawn = random.choice(positives, k, replace=False)
    others = random.choice(negatives, min(NEGATIVES * k, len(negatives)), replace=False)
    return np.sort(np.concatenate([drawn, others]))


def read_lists(
    folder: str | os.PathLike, labels: Labels, shots: Sequence[int], samples: int
) -> dict[tuple[str, int, int], np.ndarray]:
    """(class, number of the sample from 1, k) -> rows int64, ascending, of FAIR's published samples of VOC07.

    `folder` holds one file {any}_sample{number}_k{k}.npy each (the release: low_shot/labels/train_targets_…):
    numbers [n, C], a row per photo by id, a column per class by name; 1: a positive of the sample, 0: a negative,
    -1: not in it. Classes with fewer than k positives have no entry. Raises InputError.
    """
    found = {}
    for number in range(1, samples + 1):
        for k in shots:
            targets, path = _targets(Path(folder), number, k, labels.label.shape)
            for column, name in enumerate(labels.classes):
                target, label = targets[:, column], labels.label[:, column]
                if (label > 0).sum() < k:
                    continue
                rows = np.flatnonzero(target >= 0)
                wrong = rows[(target[rows] > 0) != (label[rows] > 0)]
                if len(wrong):
                    raise InputError(
                        f"{path}: row {wrong[0]} of class {name!r} is {target[wrong[0]]:g}, but photo "
                        f"{labels.image_id[wrong[0]]!r} is labelled {label[wrong[0]]}; "
                        "the lists must be of these photos, in this order."
                    )
                positives = int((target > 0).sum())
                if positives != k or len(rows) == k:
                    raise InputError(
                        f"{path}: class {name!r} has {positives} positives and {len(rows) - positives} negatives, "
                        f"but {k} and some are needed; fetch it again."
                    )
                found[name, number, k] = rows
    return found


def _targets(folder: Path, number: int, k: int, shape: tuple[int, ...]) -> tuple[np.ndarray, Path]:
    """One file of `read_lists`, checked but for what its labels say."""
    name = f"*_sample{number}_k{k}.npy"
    paths = sorted(folder.glob(name))
    if len(paths) != 1:
        raise InputError(f"{folder}: holds {len(paths)} files {name}, but one is needed; name the folder of the lists.")
    path = paths[0]
    try:
        targets = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); fetch it again.") from None
    if not isinstance(targets, np.ndarray) or targets.shape != shape or targets.dtype.kind not in "if":
        what = f"{targets.dtype} {targets.shape}" if isinstance(targets, np.ndarray) else "an archive"
        raise InputError(f"{path}: is {what}, but numbers {shape}, photos and classes, are needed.")
    if not np.isin(targets, (1, 0, -1)).all():
        raise InputError(f"{path}: has values other than 1, 0 and -1; fetch it again.")
    return targets, path


@dataclass(frozen=True)
class Fitted:
    """One class: k -> AP float64 [samples, costs] (0 to 1; one column where the cost was chosen without the test)."""

    ap: dict[int, np.ndarray]
    fits: int
    not_converged: int


def fit_class(
    train: np.ndarray,
    train_label: np.ndarray,
    test: np.ndarray,
    test_label: np.ndarray,
    samples: Mapping[int, Sequence[np.ndarray]],
    costs: Sequence[float],
    folds: int,
    protocol: Protocol,
    gram: np.ndarray | None = None,
) -> Fitted:
    """Fit SVMs of one class on each sample and score the test photos.

    `train`, `test` float64 [n, D], from `svm.normalize`; labels int8 [n] as in Labels; `samples`: k -> rows of each
    sample; `costs` ascending; `gram` as in `svm.solve`, of all training photos, or None to make that of each sample.
    `release`: a machine for each cost; `clean`: only for the cost that cross-validation within the sample chooses
    (see `svm.fit_class`).
    """
    aps: dict[int, np.ndarray] = {}
    fits = failed = 0
    # One BLAS thread: the classes share the cores, and sums do not depend on the number of workers.
    with threadpool_limits(1):
        for k, draws in samples.items():
            scored = []  # [sample][cost]
            for rows in draws:
                x, target = train[rows], np.where(train_label[rows] > 0, 1, -1)
                part = x @ x.T + 1 if gram is None else gram[np.ix_(rows, rows)]
                tried = list(costs)
                if protocol == "clean":
                    judged = []  # [fold][cost]
                    for kept, held in svm.folds_of(target, folds):
                        found = machines(x[kept], target[kept], costs, part[np.ix_(kept, kept)])
                        judged.append([average_precision_score(target[held], s) for s in _scores(found, x[held])])
                        fits, failed = fits + len(costs), failed + found[2]
                    # argmax takes the first of equals, the lowest
                    nearest = min(costs, key=lambda cost: abs(np.log(cost)))
                    tried = [costs[int(np.argmax(np.mean(judged, 0)))] if judged else nearest]
                found = machines(x, target, tried, part)
                scored.append([svm.average_precision(s, test_label) for s in _scores(found, test)])
                fits, failed = fits + len(tried), failed + found[2]
            aps[k] = np.array(scored)
    return Fitted(aps, fits, failed)


def machines(
    train: np.ndarray, target: np.ndarray, costs: Sequence[float], gram: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Weights [len(costs), D] and intercepts [len(costs)] of the SVM of each cost, and how many did not converge.

    `train` float64 [n, D], from `svm.normalize`; `target` [n]: 1 or -1; `costs` ascending; `gram` [n, n] as in
    `svm.solve`, which finds them exactly; where it does not, LIBLINEAR comes near.
    """
    duals, unsolved, margin = np.zeros((len(costs), len(target))), [], None
    for number, cost in enumerate(costs):
        dual = svm.solve(gram, target, cost, margin)
        if dual is None:
            unsolved.append(number)
        else:
            duals[number] = dual
            margin = target * (gram @ dual)
    weights, intercepts, failed = duals @ train, duals.sum(1), 0
    for number in unsolved:
        weights[number], intercepts[number], converged = next(svm.machines(train, target, [costs[number]]))
        failed += not converged
    return weights, intercepts, failed


def _scores(found: tuple[np.ndarray, np.ndarray, int], photos: np.ndarray) -> np.ndarray:
    """Of each of `machines` for `photos` [m, D] -> [len(costs), m]."""
    weights, intercepts, _ = found
    return weights @ photos.T + intercepts[:, None]


def evaluate_shots(
    train: np.ndarray,
    train_labels: Labels,
    test: np.ndarray,
    test_labels: Labels,
    *,
    shots: Sequence[int],
    samples: int,
    costs: Sequence[float],
    folds: int,
    protocol: Protocol,
    seed: int,
    workers: int,
    lists: Mapping[tuple[str, int, int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """The metrics of low-shot SVMs from features float [n, D] of the two splits, not yet normalised.

    For each k of `shots`, `samples` samples of each class (see `sample`; `lists`, from `read_lists`, takes its place)
    train one SVM per class, scored on all test photos. `protocol` says who chooses the cost: `release` one per k for
    all classes, by the mean mAP on the *test* photos, the lowest of equals; `clean` one per class and sample, by
    cross-validation on `folds` folds of the sample's photos, where none is usable the one nearest to 1.
    Metrics, in lists with one entry per k: `shots`; `mAP` (percent), the mean over the samples of
    `mAP_of_samples`, and `std`, their standard deviation (ddof 0); `cost` (None where it is chosen per class);
    `classes`: how many show k positives, the others being left out at this k; `chance_mAP`: what constant scores
    give these classes. Also `classes_left_out`: class -> why, at each k; `too_few_positives`: class -> number of
    positives where it is below some k; `shots_left_out`: each k for which no class has enough; `fits` and, among
    them, those `not_converged`.
    One process per worker; the result does not depend on their number. Raises InputError where nothing remains.
    """
    names, costs = train_labels.classes, sorted(costs)
    left_out = svm.left_out_classes(train_labels, test_labels)
    positives = {
        name: int((train_labels.label[:, i] > 0).sum()) for i, name in enumerate(names) if name not in left_out
    }
    used = [k for k in shots if k <= max(positives.values())]
    if not used:
        raise InputError(
            f"{train_labels.image_path[0].parent}: no class has {min(shots)} positive training photos, "
            f"but {max(positives.values())} at most; lower the shots."
        )
    columns = [i for i, name in enumerate(names) if positives.get(name, 0) >= min(used)]

    def draws(column: int) -> dict[int, list[np.ndarray]]:
        name, label = names[column], train_labels.label[:, column]
        return {
            k: [
                sample(label, k, rng(seed, k, number, column)) if lists is None else lists[name, number, k]
                for number in range(1, samples + 1)
            ]
            for k in used
            if k <= positives[name]
        }

    with threadpool_limits(1):  # as in fit_class
        train, test = svm.normalize(train), svm.normalize(test)
        gram = train @ train.T + 1 if len(train) <= svm.EXACT_PHOTOS else None
    processes = max(1, min(workers, len(columns))) if len(train) >= svm.FEW else 1  # as for the full SVM
    parallel = joblib.Parallel(n_jobs=processes, return_as="generator")
    jobs = (
        joblib.delayed(fit_class)(
            train,
            train_labels.label[:, column],
            test,
            test_labels.label[:, column],
            draws(column),
            costs,
            folds,
            protocol,
            gram,
        )
        for column in columns
    )
    fitted = list(track(parallel(jobs), len(columns), "low-shot SVM classes"))
    seen = test_labels.label[:, columns]
    chance = (seen > 0).sum(0) / (seen != 0).sum(0)
    metrics: dict[str, Any] = {"shots": used}
    for key in ("mAP", "std", "mAP_of_samples", "cost", "classes", "chance_mAP"):
        metrics[key] = []
    for k in used:
        shown = [k in one.ap for one in fitted]
        table = 100 * np.mean([one.ap[k] for one in fitted if k in one.ap], 0)  # mAP [samples, costs]
        best = int(np.argmax(table.mean(0)))
        metrics["mAP"].append(float(table[:, best].mean()))
        metrics["std"].append(float(table[:, best].std()))
        metrics["mAP_of_samples"].append(table[:, best].tolist())
        metrics["cost"].append(costs[best] if protocol == "release" else None)
        metrics["classes"].append(sum(shown))
        metrics["chance_mAP"].append(100 * float(chance[shown].mean()))
    return metrics | {
        "classes_left_out": left_out,
        "too_few_positives": {name: n for name, n in positives.items() if n < max(shots)},
        "shots_left_out": [k for k in shots if k not in used],
        "fits": sum(one.fits for one in fitted),
        "not_converged": sum(one.not_converged for one in fitted),
    }


def evaluate(
    config: Config,
    features_path: str | os.PathLike,
    model: str,
    root: str | os.PathLike | None,
    output: str | os.PathLike,
    workers: int,
) -> dict[str, Any]:
    """Evaluate a backbone's features (artifacts.Features) of its last stage by low-shot SVMs; write and return it.

    `model` is the name the result goes by; for `root` see `svm.read`, for the metrics `evaluate_shots`.
    Raises InputError before any work where settings, labels, lists or features are bad; nothing is written then.
    """
    section, stage = config.downstream.voc07_lowshot, config.downstream.voc07_svm.stages[-1]
    train, test, data = svm.read(config, root)
    lists = None if section.lists is None else read_lists(section.lists, train, section.shots, section.samples)
    if lists is not None:
        rows = b"".join(rows.tobytes() for rows in lists.values())
        data |= {"lists": section.lists, "lists_fingerprint": hashlib.sha256(rows).hexdigest()}
    found, of_features = svm.read_features(features_path, [stage], train, test)
    metrics = evaluate_shots(
        found.train[stage],
        train,
        found.test[stage],
        test,
        shots=section.shots,
        samples=section.samples,
        costs=section.costs,
        folds=section.folds,
        protocol=section.protocol,
        seed=config.seed,
        workers=workers,
        lists=lists,
    )
    few = metrics["too_few_positives"]
    if few:
        listing = ", ".join(f"{name} ({number})" for name, number in few.items())
        print(f"{TASK}: classes with fewer positive photos than shots are left out there: {listing}", file=sys.stderr)
    settings = used(config, TASK)
    result = {"task": TASK, "model": model, "metrics": metrics, "settings": settings, "data": {**data, **of_features}}
    artifacts.write_json(output, result)
    return result
