import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from orl import InputError, artifacts
from orl.config import parse
from orl.data.classes import ClassSet
from orl.downstream import knn

T = 0.07


def clusters(seed: int, n: int, width: int = 16, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Noisy unit rows around a direction per class, and their classes."""
    random, centres = np.random.default_rng(seed), np.random.default_rng(0).standard_normal((classes, width))
    label = random.integers(classes, size=n)
    rows = centres[label] + 1.5 * random.standard_normal((n, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), label


def brute_force(x: np.ndarray, y: np.ndarray, tx: np.ndarray, k: int) -> list[int]:
    """The equations, one test photo after the other."""
    said = []
    for row in tx:
        similarity = x.astype(np.float64) @ row
        near = np.argsort(-similarity, kind="stable")[:k]
        total = [sum(np.exp(similarity[n] / T) for n in near if y[n] == c) for c in range(y.max() + 1)]
        said.append(int(np.argmax(total)))
    return said


@pytest.mark.parametrize("rows", [7, 100_000])
def test_accuracy_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(knn, "ROWS", rows)  # searched in parts
    monkeypatch.setattr(knn, "QUERIES", 11)
    (x, y), (tx, ty) = clusters(1, 120), clusters(2, 60)
    found = knn.accuracy(x, y, tx, ty, [1, 20, 500], T)
    assert found == {k: np.mean(brute_force(x, y, tx, k) == ty) for k in (1, 20, 500)}
    assert 0.4 < found[20] < 1


def test_accuracy_is_that_of_scikit_learn() -> None:
    (x, y), (tx, ty) = clusters(3, 150), clusters(4, 80)
    # Of unit rows, cosine similarity = 1 - cosine distance.
    model = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / T))
    assert knn.accuracy(x, y, tx, ty, [20], T)[20] == pytest.approx(model.fit(x, y).score(tx, ty), abs=1e-9)


def test_the_nearest_of_equal_votes_is_the_lowest_class() -> None:
    similarity = np.array([[0.5, 0.5, 0.1], [0.9, 0.2, 0.2]], np.float32)
    assert knn.votes(similarity, np.array([[2, 1, 0], [2, 1, 1]]), 3, T).tolist() == [1, 2]
    # Similarities so small a temperature would overflow exp() of.
    assert knn.votes(np.array([[1.0, 0.9]]), np.array([[1, 0]]), 2, 1e-4).tolist() == [1]


def write(path: Path, train: ClassSet, val: ClassSet, x: np.ndarray, tx: np.ndarray) -> Path:
    inputs = {"weights": "w", "train": train.fingerprint(), "val": val.fingerprint()}
    with artifacts.create(path, artifacts.CLASS_FEATURES, {"knn": 1}, inputs) as file:
        file.create_dataset("train", data=x.astype(np.float16))
        file.create_dataset("val", data=tx.astype(np.float16))
    return path


def class_set(root: Path, label: np.ndarray, name: str) -> ClassSet:
    path = np.array([f"{name}{number}.jpg" for number in range(len(label))])
    return ClassSet(root, path, label, tuple("abcde"))


def test_evaluate(tmp_path: Path) -> None:
    (x, y), (tx, ty) = clusters(1, 120), clusters(2, 60)
    train, val = class_set(tmp_path, y, "t"), class_set(tmp_path, ty, "v")
    features = write(tmp_path / "f.h5", train, val, x, tx)
    config = parse({"downstream": {"sets": {"toy": {"root": str(tmp_path)}}, "knn": {"k": [5, 20]}}})
    result = knn.evaluate(config, "toy", features, "stage1", train, val, tmp_path / "knn.json", 1)
    assert json.loads((tmp_path / "knn.json").read_text()) == result == artifacts.read_results(tmp_path / "knn.json")
    halves = [features.astype(np.float16).astype(np.float32) for features in (x, tx)]
    expected = knn.accuracy(halves[0], y, halves[1], ty, [5, 20], T)
    assert result["metrics"] == {
        "top1": {str(k): pytest.approx(100 * share) for k, share in expected.items()},
        "chance_top1": pytest.approx(100 * np.bincount(ty).max() / 60),
    }
    assert (result["task"], result["model"], result["data"]["set"]) == ("knn", "stage1", "toy")
    assert (result["data"]["train_photos"], result["data"]["classes"]) == (120, 5)
    assert result["data"]["weights_fingerprint"] == "w"
    assert result["settings"]["downstream"]["knn"]["k"] == [5, 20]


def test_bad_features(tmp_path: Path) -> None:
    (x, y), (tx, ty) = clusters(1, 30), clusters(2, 20)
    train, val = class_set(tmp_path, y, "t"), class_set(tmp_path, ty, "v")
    config = parse({"downstream": {"sets": {"toy": {"root": str(tmp_path)}}}})
    tx[3, 2] = np.nan
    features = write(tmp_path / "f.h5", train, val, x, tx)
    with pytest.raises(InputError, match=r"f\.h5: holds features that are not finite"):
        knn.evaluate(config, "toy", features, "m", train, val, tmp_path / "knn.json", 1)
    other = class_set(tmp_path, ty, "other")
    with pytest.raises(InputError, match=r"f\.h5: was made from another val"):
        knn.evaluate(config, "toy", features, "m", train, other, tmp_path / "knn.json", 1)
    assert not (tmp_path / "knn.json").exists()
