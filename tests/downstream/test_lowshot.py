import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from orl import InputError
from orl.data.labels import Labels
from orl.data.views import rng
from orl.downstream import lowshot, svm

COSTS = [0.01, 0.3, 2.0, 20.0]
Data = tuple[np.ndarray, Labels, np.ndarray, Labels]


def make_labels(label: np.ndarray) -> Labels:
    ids = tuple(f"{number:04d}" for number in range(len(label)))
    classes = tuple(f"class{number}" for number in range(label.shape[1]))
    return Labels(tuple(Path("photos") / f"{name}.jpg" for name in ids), ids, classes, label.astype(np.int8))


def problem(n: int = 150, test: int = 90, classes: int = 3, width: int = 20) -> Data:
    """Noisy features float32 of a training and a test split that tell about the labels 1, 0, -1."""
    random = np.random.default_rng(0)
    features = random.standard_normal((n + test, width)) + 0.3
    clue = features @ random.standard_normal((width, classes)) + random.standard_normal((n + test, classes)) * 4
    label = np.where(clue > 6, 1, -1)
    label[random.random(label.shape) < 0.1] = 0
    features = features.astype(np.float32) * random.uniform(1, 50, (n + test, 1)).astype(np.float32)
    return features[:n], make_labels(label[:n]), features[n:], make_labels(label[n:])


def evaluate(data: Data, **changes: object) -> dict:
    options = {"shots": [1, 4], "samples": 3, "costs": COSTS, "folds": 3, "protocol": "release", "seed": 5}
    return lowshot.evaluate_shots(*data, **{"workers": 1, **options, **changes})


def unit(features: np.ndarray) -> np.ndarray:
    return features / (np.linalg.norm(features.astype(np.float64), axis=1)[:, None] + 1e-5)


def plain(cost: float) -> LinearSVC:
    return LinearSVC(C=cost, **{**svm.SVM, "tol": 1e-9, "max_iter": 10**6})


def draw(data: Data, k: int, number: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised features and target of a sample of seed 5."""
    label = data[1].label[:, column]
    rows = lowshot.sample(label, k, rng(5, k, number, column))
    return unit(data[0])[rows], np.where(label[rows] == 1, 1, -1)


def ap(data: Data, model: LinearSVC, column: int) -> float:
    label = data[3].label[:, column]
    return svm.average_precision(model.decision_function(unit(data[2]))[label != 0], label[label != 0])


# sample


@pytest.mark.parametrize(("k", "negatives"), [(1, 19), (2, 38), (3, 50)])
def test_sample(k: int, negatives: int) -> None:
    label = np.array([-1] * 40 + [1] * 6 + [0] * 10, np.int8)
    rows = lowshot.sample(label, k, rng(0))
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert (label[rows] == 1).sum() == k
    assert (label[rows] < 1).sum() == negatives  # 19 for each, or all
    np.testing.assert_array_equal(rows, lowshot.sample(label, k, rng(0)))


def test_samples_are_uniform() -> None:
    label = np.array([1, -1, 0] * 20, np.int8)
    times = np.bincount(np.concatenate([lowshot.sample(label, 1, rng(1, number)) for number in range(1000)]))
    assert abs(times[label == 1] - 1000 / 20).max() < 35  # 5 standard deviations
    assert abs(times[label != 1] - 1000 * 19 / 40).max() < 80  # difficult ones as often as the other negatives


def test_too_few_to_sample() -> None:
    with pytest.raises(ValueError, match="larger sample"):
        lowshot.sample(np.array([1, 1, -1, -1], np.int8), 3, rng(0))


# machines


@pytest.mark.parametrize("width", [8, 60])  # fewer and more features than photos
def test_scores_are_those_of_scikit_learn(width: int) -> None:
    data = problem(width=width)
    x, y = draw(data, 2, 1, 0)
    weights, intercepts, failed = lowshot.machines(x, y, COSTS, x @ x.T + 1)
    assert failed == 0
    for cost, weight, intercept in zip(COSTS, weights, intercepts, strict=True):
        expected = plain(cost).fit(x, y).decision_function(unit(data[2]))
        np.testing.assert_allclose(unit(data[2]) @ weight + intercept, expected, atol=1e-6 * (1 + cost))


def test_liblinear_where_newton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(problem(), 4, 1, 0)
    exact = lowshot.machines(x, y, COSTS, x @ x.T + 1)
    solve = svm.solve
    monkeypatch.setattr(svm, "solve", lambda gram, y, cost, margin: None if cost == 0.3 else solve(gram, y, cost))
    weights, intercepts, failed = lowshot.machines(x, y, COSTS, x @ x.T + 1)
    np.testing.assert_allclose(weights, exact[0], atol=1e-2)
    np.testing.assert_allclose(intercepts, exact[1], atol=1e-2)
    assert (weights[1] != exact[0][1]).any()
    assert failed == 0
    monkeypatch.setattr(svm, "solve", lambda *_: None)
    found = evaluate(problem(width=3), costs=[0.01, 1e7], samples=1, shots=[4])
    assert 0 < found["not_converged"] <= 2 < found["fits"] == 4  # one of two costs of two classes
    clean = evaluate(problem(width=3), costs=[1e7], samples=1, shots=[4], protocol="clean")
    assert 2 < clean["not_converged"] <= clean["fits"] == 8  # folds, and the last


# evaluate_shots


def test_release() -> None:
    """One cost per k, by the mean test mAP; by loops over plain LinearSVCs."""
    data = problem()
    found = evaluate(data)
    chosen = []
    for at, k in enumerate([1, 4]):
        best = (-1.0, 0.0, [0.0])
        for cost in COSTS:
            of_samples = []
            for number in (1, 2, 3):
                aps = [ap(data, plain(cost).fit(*draw(data, k, number, column)), column) for column in range(3)]
                of_samples.append(100 * sum(aps) / 3)
            if sum(of_samples) / 3 > best[0]:
                best = (sum(of_samples) / 3, cost, of_samples)
        mean, cost, of_samples = best
        chosen.append(cost)
        assert found["mAP_of_samples"][at] == pytest.approx(of_samples, abs=1e-9)
        assert found["mAP"][at] == pytest.approx(mean, abs=1e-9)
        assert found["std"][at] == pytest.approx((sum((one - mean) ** 2 for one in of_samples) / 3) ** 0.5, abs=1e-9)
        assert found["std"][at] > 0.1
    assert found["cost"] == chosen
    assert found["shots"] == [1, 4]
    assert found["classes"] == [3, 3]
    assert found["mAP"][1] > found["chance_mAP"][1] + 5
    assert found["fits"] == 2 * 3 * 3 * len(COSTS)
    assert found["not_converged"] == 0
    assert found == evaluate(data, costs=COSTS[::-1])


@pytest.mark.parametrize("shuffled", [False, True])
def test_clean(shuffled: bool) -> None:
    """Costs by GridSearchCV, which sees no test label: those of shuffled photos are met by the same machines."""
    data = problem()
    if shuffled:
        order = np.random.default_rng(1).permutation(len(data[3]))
        data = (*data[:3], make_labels(data[3].label[order]))
    found = evaluate(data, protocol="clean")
    costs = set()
    for at, k in enumerate([1, 4]):
        of_samples = []
        for number in (1, 2, 3):
            aps = []
            for column in range(3):
                x, y = draw(data, k, number, column)
                cost = 2.0  # one positive: no fold has one on both sides; nearest to 1 as a ratio
                if k > 1:
                    search = GridSearchCV(plain(1.0), {"C": COSTS}, scoring="average_precision", cv=3, refit=False)
                    cost = search.fit(x, y).best_params_["C"]
                    costs.add(cost)
                aps.append(ap(data, plain(cost).fit(x, y), column))
            of_samples.append(100 * sum(aps) / 3)
        assert found["mAP_of_samples"][at] == pytest.approx(of_samples, abs=1e-9)
    assert len(costs) > 1
    assert found["cost"] == [None, None]
    assert found["fits"] == 9 * (3 * len(COSTS) + 1) + 9
    assert found["not_converged"] == 0


def test_test_photos_that_are_difficult_are_ignored() -> None:
    train, train_labels, test, test_labels = problem(classes=1)
    kept = test_labels.label[:, 0] != 0
    assert 0 < kept.sum() < len(kept)
    found = evaluate((train, train_labels, test, test_labels))
    assert found == evaluate((train, train_labels, test[kept], make_labels(test_labels.label[kept])))
    negative = np.where(test_labels.label == 0, -1, test_labels.label)
    assert found["mAP"] != evaluate((train, train_labels, test, make_labels(negative)))["mAP"]


@pytest.mark.parametrize("protocol", ["release", "clean"])
def test_neither_workers_nor_a_shared_gram_matrix_change_anything(
    monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    data = problem(300, 100, 4, 500)  # large enough for joblib to map the features
    found = evaluate(data, protocol=protocol)
    monkeypatch.setattr(svm, "FEW", 0)
    assert found == evaluate(data, protocol=protocol, workers=2)
    monkeypatch.setattr(svm, "EXACT_PHOTOS", 100)
    alone = evaluate(data, protocol=protocol)
    assert alone["mAP"] == pytest.approx(found["mAP"], abs=1e-9)
    assert alone["cost"] == found["cost"]


def test_seeds_draw_other_samples() -> None:
    found = evaluate(problem())
    assert found == evaluate(problem())
    assert found["mAP"] != evaluate(problem(), seed=6)["mAP"]


def test_classes_with_few_positives() -> None:
    """Each is left out from its own number of positives on, and changes nothing for the others."""
    train, train_labels, test, test_labels = problem(classes=5)
    label, test_label = train_labels.label.copy(), test_labels.label.copy()
    for column, positives in ((1, 3), (2, 4), (3, 0)):
        rows = np.flatnonzero(label[:, column] == 1)
        label[rows[positives:], column] = -1
    test_label[test_label[:, 4] == 1, 4] = 0
    most = int((label[:, 0] == 1).sum())
    data = (train, make_labels(label), test, make_labels(test_label))
    found = evaluate(data, shots=[1, 4, 999, 5])
    assert found["shots"] == [1, 4, 5]
    assert found["shots_left_out"] == [999]
    assert found["classes"] == [3, 2, 1]
    assert found["too_few_positives"] == {"class0": most, "class1": 3, "class2": 4}
    assert found["classes_left_out"] == {"class3": "no positive training photo", "class4": "no positive test photo"}
    assert [len(found[key]) for key in ("mAP", "std", "mAP_of_samples", "cost", "chance_mAP")] == [3] * 5
    alone = evaluate((train, make_labels(label[:, :1]), test, make_labels(test_label[:, :1])), shots=[5])
    assert alone["mAP_of_samples"] == found["mAP_of_samples"][2:]
    assert alone["chance_mAP"] == found["chance_mAP"][2:]
    share = (test_label[:, :3] == 1).sum(0) / (test_label[:, :3] != 0).sum(0)
    expected = [share.mean(), share[[0, 2]].mean(), share[0]]
    assert found["chance_mAP"] == pytest.approx([100 * one for one in expected])
    with pytest.raises(InputError, match=f"no class has 998 positive training photos, but {most} at most") as error:
        evaluate(data, shots=[999, 998])
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no class can be evaluated"):
        evaluate((train, make_labels(label[:, 3:]), test, make_labels(test_label[:, 3:])))


def test_constant_features_score_at_chance() -> None:
    train, train_labels, test, test_labels = problem()
    found = evaluate((np.ones_like(train), train_labels, np.ones_like(test), test_labels), costs=COSTS[::-1])
    assert found["mAP"] == pytest.approx(found["chance_mAP"])
    assert found["cost"] == [COSTS[0]] * 2  # the lowest of equals


# read_lists


def write_lists(folder: Path, data: Data, seed: int = 5) -> Path:
    """As FAIR's script: -1 everywhere, 1 and 0 at the positives and negatives that were drawn for each class."""
    label = data[1].label
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        for k in (1, 4):
            targets = np.full(label.shape, -1, np.int32)
            for column in range(label.shape[1]):
                rows = lowshot.sample(label[:, column], k, rng(seed, k, number, column))
                targets[rows, column] = label[rows, column] == 1
            np.save(folder / f"train_targets_sample{number}_k{k}.npy", targets)
    return folder


def test_lists(tmp_path: Path) -> None:
    data = problem()
    lists = lowshot.read_lists(write_lists(tmp_path / "own", data), data[1], [1, 4], 3)
    assert len(lists) == 3 * 3 * 2
    rows = lists["class2", 3, 4]
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, lowshot.sample(data[1].label[:, 2], 4, rng(5, 4, 3, 2)))
    found = evaluate(data)
    assert evaluate(data, lists=lists, seed=0) == found
    other = lowshot.read_lists(write_lists(tmp_path / "other", data, 6), data[1], [1, 4], 3)
    assert evaluate(data, lists=other)["mAP"] != found["mAP"]


def test_lists_of_a_class_with_few_positives(tmp_path: Path) -> None:
    data = problem()
    folder = write_lists(tmp_path / "lists", data)
    few = data[1].label.copy()
    few[np.flatnonzero(few[:, 1] == 1)[2:], 1] = -1
    for path in folder.iterdir():
        targets = np.load(path)
        targets[:, 1] = -1
        if path.stem.endswith("k1"):
            targets[np.flatnonzero(few[:, 1] == 1)[0], 1], targets[few[:, 1] == -1, 1] = 1, 0
        np.save(path, targets)
    data = (data[0], make_labels(few), *data[2:])
    lists = lowshot.read_lists(folder, data[1], [1, 4], 3)
    assert {key for key in lists if key[0] == "class1"} == {("class1", number, 1) for number in (1, 2, 3)}
    assert evaluate(data, lists=lists)["classes"] == [3, 2]


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_bad_lists(tmp_path: Path) -> None:
    data = problem()
    labels = data[1]
    folder = write_lists(tmp_path / "lists", data)
    path = folder / "train_targets_sample2_k4.npy"
    whole = path.read_bytes()
    targets = np.load(path)

    def changed(row: int, value: int) -> np.ndarray:
        array = targets.copy()
        array[row, 1] = value
        return array

    positive, negative = np.flatnonzero(targets[:, 1] == 1)[0], np.flatnonzero(targets[:, 1] == 0)[0]
    few = targets.copy()
    few[few[:, 1] == 0, 1] = -1
    cases: list[tuple[np.ndarray, str]] = [
        (targets[:-1], r"\(149, 3\), but numbers \(150, 3\)"),
        (targets.T, r"\(3, 150\)"),
        (targets.astype(str), "<U"),
        (targets.astype(object), "cannot be read"),
        (changed(positive, 2), "values other than 1, 0 and -1"),
        (np.where(targets == 0, np.nan, targets), "values other than 1, 0 and -1"),
        (changed(positive, 0), f"row {positive} of class 'class1' is 0, but photo '{positive:04d}' is labelled 1"),
        (changed(negative, 1), f"row {negative} of class 'class1' is 1, but photo"),
        (changed(positive, -1), "class 'class1' has 3 positives and 76 negatives, but 4 and some"),
        (few, "class 'class1' has 4 positives and 0 negatives"),
    ]

    def check(part: str) -> None:
        with pytest.raises(InputError, match=part) as error:
            lowshot.read_lists(folder, labels, [1, 4], 3)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(str(folder))

    for array, part in cases:
        np.save(path, array)
        check(part)
    np.save(path, np.array([Runs(tmp_path / "ran")]), allow_pickle=True)
    check("cannot be read")
    assert not (tmp_path / "ran").exists()
    for content in (b"", whole[:50], whole[:-50], b"no array"):
        path.write_bytes(content)
        check("sample2_k4.npy: cannot be read")
    with open(path, "wb") as file:
        np.savez(file, targets)
    check("is an archive")
    path.write_bytes(whole)
    lowshot.read_lists(folder, labels, [1, 4], 3)
    (folder / "val_targets_sample2_k4.npy").write_bytes(whole)
    check("holds 2 files")
    for file in folder.glob("*sample2_k4.npy"):
        file.unlink()
    check("holds 0 files .*_sample2_k4.npy")
