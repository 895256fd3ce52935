"""How long VOC07's SVMs take, on features of its size: `python benchmarks/svm.py`.

They are made up (5,011 + 4,952 photos, 8192-d, 20 classes): of each photo the sum of directions of its classes, noise
on top, negative values cut off. The full protocol (19 costs, 3 folds) for all classes on all cores, beside LIBLINEAR
alone as the release calls it, without change of basis, for the first `--plain` classes on one core; both per class and
core. Then the low-shot protocol (8 numbers of shots, 5 samples, 19 costs).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import machine
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from orl.config import Voc07Lowshot, Voc07Svm
from orl.data.labels import Labels
from orl.downstream import svm
from orl.downstream.lowshot import evaluate_shots


def made_up(photos: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, Labels]:
    """Features float32 [photos, width] and labels, of which 7 % are positive, as VOC07's, and 1 % difficult."""
    random, directions = np.random.default_rng(seed), np.random.default_rng(0).standard_normal((classes, width))
    label = np.where(random.random((photos, classes)) < 0.07, 1, -1).astype(np.int8)
    features = (label > 0) @ directions * 0.3 + random.standard_normal((photos, width))
    label[random.random(label.shape) < 0.01] = 0
    names = tuple(f"class{number}" for number in range(classes))
    ids = tuple(map(str, range(photos)))
    return np.maximum(features, 0).astype(np.float32), Labels(tuple(map(Path, ids)), ids, names, label)


def plain(
    train: np.ndarray, label: np.ndarray, test: np.ndarray, test_label: np.ndarray, costs: Sequence[float], folds: int
) -> tuple[float, float]:
    """AP and cost of one class by LIBLINEAR alone."""
    target = np.where(label > 0, 1, -1)
    judged = np.zeros(len(costs))
    for kept, held in svm.folds_of(target, folds):
        for number, (weights, intercept, _) in enumerate(svm.machines(train[kept], target[kept], costs)):
            judged[number] += average_precision_score(target[held], train[held] @ weights + intercept)
    cost = costs[int(judged.argmax())]
    ((weights, intercept, _),) = svm.machines(train, target, [cost])
    return svm.average_precision(test @ weights + intercept, test_label), cost


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=5011, help="training photos")
    parser.add_argument("--test", type=int, default=4952, help="test photos")
    parser.add_argument("--width", type=int, default=8192, help="columns of the features")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--plain", type=int, default=1, help="classes that LIBLINEAR alone is timed on")
    parser.add_argument("--shots", type=int, nargs="*", default=Voc07Lowshot().shots)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(machine())
    train, labels = made_up(args.train, args.width, args.classes, 1)
    test, test_labels = made_up(args.test, args.width, args.classes, 2)
    section, lowshot = Voc07Svm(), Voc07Lowshot()

    start = time.perf_counter()
    found = svm.fit_classes(train, labels, test, test_labels, section.costs, section.folds, args.workers)
    whole = time.perf_counter() - start
    each = whole * args.workers / args.classes
    print(f"SVM, {args.classes} classes: {whole:.0f} s in {args.workers} processes; mAP {found['mAP']:.2f}", flush=True)

    start = time.perf_counter()
    with threadpool_limits(1):
        rows, test_rows = svm.normalize(train), svm.normalize(test)
        differences, failed = [], found["not_converged"]
        for column in range(args.plain):
            ap, cost = plain(
                rows, labels.label[:, column], test_rows, test_labels.label[:, column], section.costs, section.folds
            )
            ours, our_cost = (found[key][labels.classes[column]] for key in ("AP", "cost"))
            differences.append(abs(100 * ap - ours))
            print(f"{labels.classes[column]}: AP {100 * ap:.2f} at cost {cost:g}; ours {ours:.2f} at {our_cost:g}")
    alone = (time.perf_counter() - start) / args.plain
    print(f"SVM, per class and core: {each:.1f} s; LIBLINEAR alone {alone:.1f} s, {alone / each:.1f} x; AP differs by "
          f"{max(differences):.3f} at most; {failed} of {found['fits']} fits did not converge", flush=True)  # fmt: skip

    start = time.perf_counter()
    few = evaluate_shots(
        train, labels, test, test_labels, shots=args.shots, samples=lowshot.samples, costs=lowshot.costs,
        folds=lowshot.folds, protocol="release", seed=0, workers=args.workers,
    )  # fmt: skip
    print(f"low-shot SVM: {time.perf_counter() - start:.0f} s for {few['fits']} fits")


if __name__ == "__main__":
    main()
