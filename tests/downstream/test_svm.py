import json
import warnings
from pathlib import Path

import h5py
import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from orl import InputError, artifacts, config
from orl.data.labels import Labels
from orl.downstream import features, lowshot, svm
from orl.networks import backbones


def envelope_area(score: list[float], label: list[int]) -> float:
    """As the VOC devkit's VOCevaldet draws it, thresholds at each distinct score: recall, precision, envelope, area."""
    recall, precision = [0.0], [0.0]
    positives = sum(y == 1 for y in label)
    for threshold in sorted(set(score), reverse=True):
        hits = sum(y == 1 for s, y in zip(score, label, strict=True) if s >= threshold)
        misses = sum(y == -1 for s, y in zip(score, label, strict=True) if s >= threshold)
        recall.append(hits / positives)
        precision.append(hits / (hits + misses) if hits + misses else 0.0)
    recall.append(1.0)
    precision.append(0.0)
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


rows = st.lists(
    st.tuples(st.one_of(st.integers(-3, 3).map(float), st.floats(-1, 1)), st.sampled_from([1, 0, -1])),
    min_size=2,
    max_size=40,
).filter(lambda rows: {1, -1} <= {y for _, y in rows})


@given(rows, st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_average_precision(rows: list[tuple[float, int]], random: object) -> None:
    score, label = map(list, zip(*rows, strict=True))
    found = svm.average_precision(score, label)
    assert found == pytest.approx(envelope_area(score, label), abs=1e-12)
    kept = [(s, y) for s, y in rows if y]
    below = average_precision_score([y for _, y in kept], [s for s, _ in kept])
    assert below - 1e-12 <= found <= 1
    random.shuffle(rows)  # type: ignore[attr-defined]
    shuffled, labels = zip(*rows, strict=True)
    assert svm.average_precision(shuffled, labels) == pytest.approx(found, abs=1e-12)


def test_average_precision_by_hand() -> None:
    # ranks: + - + +: precision 1, 1/2, 2/3, 3/4; the envelope lifts 2/3 to 3/4
    assert svm.average_precision([4, 3, 2, 1], [1, -1, 1, 1]) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
    assert svm.average_precision([4, 3, 2, 1], [1, 0, 1, -1]) == 1
    assert svm.average_precision([4, 3, 2, 1], np.array([1, 0, 1, 1], bool)) == pytest.approx(
        svm.average_precision([4, 3, 2, 1], [1, -1, 1, 1])
    )
    assert svm.average_precision(np.zeros(10), [1, 1, 1] + [-1] * 7) == pytest.approx(0.3)
    for score, label in [([1, 2], [1, 0]), ([1, 2], [-1, 0]), ([1, float("nan")], [1, -1])]:
        with pytest.raises(ValueError, match="finite scores"):
            svm.average_precision(score, label)


def make_labels(label: np.ndarray, split: str = "photos") -> Labels:
    ids = tuple(f"{number:04d}" for number in range(len(label)))
    classes = tuple(f"class{number}" for number in range(label.shape[1]))
    return Labels(tuple(Path(split) / f"{name}.jpg" for name in ids), ids, classes, label.astype(np.int8))


def problem(seed: int, n: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy features float32 that tell about the labels 1, 0, -1; the classes are the same for each seed."""
    rng, directions = np.random.default_rng(seed), np.random.default_rng(99).standard_normal((width, classes))
    features = rng.standard_normal((n, width)) + 0.3
    clue = features @ directions + rng.standard_normal((n, classes)) * width**0.5
    label = np.where(clue > width**0.5, 1, -1)
    label[rng.random(label.shape) < 0.1] = 0
    return features.astype(np.float32) * rng.uniform(1, 50), label


COSTS = [0.5**9, 0.5**4, 1.0, 10.0]


@pytest.mark.parametrize("width", [12, 400])  # fewer and more features than photos
def test_as_scikit_learn(width: int) -> None:
    """Against the same protocol in a few plain calls: GridSearchCV, refit, envelope by the loop above."""
    (x, y), (tx, ty) = problem(1, 150, width, 4), problem(2, 120, width, 4)
    found = svm.fit_classes(x, make_labels(y), tx, make_labels(ty), COSTS, 3, 1)
    unit, test_unit = (
        a.astype(np.float64) / (np.linalg.norm(a.astype(np.float64), axis=1)[:, None] + 1e-5) for a in (x, tx)
    )
    expected, costs = {}, {}
    for column in range(4):
        machine = LinearSVC(
            class_weight={1: 2, -1: 1}, dual=True, tol=1e-4, max_iter=2000, intercept_scaling=1.0, random_state=0
        )
        search = GridSearchCV(machine, {"C": COSTS}, scoring="average_precision", cv=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search.fit(unit, np.where(y[:, column] == 1, 1, -1))
        kept = ty[:, column] != 0
        score = search.decision_function(test_unit[kept])
        expected[f"class{column}"] = 100 * envelope_area(score.tolist(), ty[kept, column].tolist())
        costs[f"class{column}"] = search.best_params_["C"]
    assert found["AP"] == pytest.approx(expected, abs=1e-9)
    assert found["cost"] == costs
    assert found["mAP"] == pytest.approx(np.mean(list(expected.values())))
    assert found["mAP"] > found["chance_mAP"] + 5  # the features do tell
    assert found["chance_mAP"] == pytest.approx(100 * np.mean((ty == 1).sum(0) / (ty != 0).sum(0)))
    assert found["fits"] == 4 * (3 * len(COSTS) + 1)
    assert found["classes_left_out"] == {}
    assert found["not_cross_validated"] == []


def test_workers_change_nothing() -> None:
    (x, y), (tx, ty) = problem(3, 300, 500, 3), problem(4, 100, 500, 3)  # large enough for joblib to map the features
    arguments = (x, make_labels(y), tx, make_labels(ty), [0.01, 1.0], 3)
    assert svm.fit_classes(*arguments, 1) == svm.fit_classes(*arguments, 2)
    # The processes, which joblib keeps, stay small: no torch in them.
    loaded = joblib.Parallel(n_jobs=2)(joblib.delayed(eval)("'torch' in __import__('sys').modules") for _ in range(4))
    assert loaded == [False] * 4


def test_order_of_costs_changes_nothing() -> None:
    (x, y), (tx, ty) = problem(5, 60, 4, 1), problem(6, 60, 4, 1)
    rising, falling = (
        svm.fit_class(svm.normalize(x), y[:, 0], svm.normalize(tx), ty[:, 0], costs, 3)
        for costs in ([1e-6, 2e-6, 1.0], [1.0, 2e-6, 1e-6])
    )
    assert rising == falling


def test_equal_costs_take_the_lowest() -> None:
    x = np.array([[1.0, 0.0], [0.0, 1.0]] * 9)
    y = np.array([1, -1] * 9, np.int8)  # any cost ranks these perfectly
    assert svm.fit_class(x, y, x, y, [2.0, 0.25, 1.0], 3) == svm.Fitted(1.0, 0.25, True, 10, 0)


def test_constant_features_score_at_chance() -> None:
    """A collapsed model gets the share of positives, whatever the order of the photos."""
    label = np.array([[1]] * 12 + [[-1]] * 28)
    found = svm.fit_classes(np.ones((40, 8)), make_labels(label), np.ones((40, 8)), make_labels(label), [1.0], 3, 1)
    assert found["mAP"] == pytest.approx(30)
    assert found["chance_mAP"] == pytest.approx(30)


@pytest.mark.parametrize(("photos", "width"), [(40, 3), (60, 90)])
@pytest.mark.parametrize("cost", [0.01, 1.0, 10.0, 1000.0])
def test_solve(photos: int, width: int, cost: float) -> None:
    """At the optimum of ½|w|² + ½b² + cost · sum of weighted squared hinge losses its gradient is 0."""
    features, label = problem(12, photos, width, 1)
    x, y = svm.normalize(features), np.where(label[:, 0] > 0, 1, -1)
    x[1] = x[0]  # a photo twice
    gram = x @ x.T + 1
    dual = svm.solve(gram, y, cost)
    w, b = dual @ x, dual.sum()
    slope = -2 * cost * np.where(y > 0, 2, 1) * y * np.maximum(0, 1 - y * (x @ w + b))
    np.testing.assert_allclose(w + slope @ x, 0, atol=1e-8 * cost)
    assert b + slope.sum() == pytest.approx(0, abs=1e-8 * cost)
    for guess in (np.zeros(photos), np.full(photos, 2.0), y * np.linspace(-3, 3, photos)):
        np.testing.assert_allclose(svm.solve(gram, y, cost, guess), dual, atol=1e-9 * cost)


def test_machines_are_those_of_scikit_learn() -> None:
    """Where LIBLINEAR is given the rounds that it needs; with the protocol's it stops before."""
    features, label = problem(13, 120, 40, 1)
    x, y = svm.normalize(features), np.where(label[:, 0] > 0, 1, -1)
    costs = [0.001, 0.1, 1.0, 10.0, 100.0]
    exact, plain = (list(svm.machines(x, y, costs, gram)) for gram in (x @ x.T + 1, None))
    assert [converged for _, _, converged in exact] == [True] * 5
    assert [converged for _, _, converged in plain] == [True] * 4 + [False]
    for cost, (weights, intercept, _) in zip(costs, exact, strict=True):
        model = LinearSVC(C=cost, **{**svm.SVM, "tol": 1e-9, "max_iter": 10**6}).fit(x, y)
        near = 1e-6 if cost >= svm.EXACT_COST else 1e-3
        np.testing.assert_allclose(x @ weights + intercept, model.decision_function(x), atol=near * (1 + cost))


def test_shorten() -> None:
    rng = np.random.default_rng(0)
    x, tx = rng.standard_normal((6, 20)), rng.standard_normal((9, 20))
    x[3] = x[2]  # a photo twice
    short, test_short = svm.shorten(x, tx)
    assert short.shape == (6, 6)
    np.testing.assert_allclose(short @ short.T, x @ x.T, atol=1e-12)
    np.testing.assert_allclose(test_short @ short.T, tx @ x.T, atol=1e-12)
    assert svm.shorten(x[:, :6], tx[:, :6])[1].shape == (9, 6)


def test_zero_features_are_no_division_by_zero() -> None:
    assert not svm.normalize(np.zeros((2, 3), np.float32)).any()


def test_degenerate_classes(capfd: pytest.CaptureFixture[str]) -> None:
    x, y = problem(7, 60, 6, 8)
    tx, ty = problem(8, 60, 6, 8)
    y[:, 1:], ty[:, 1:] = -1, -1
    y[:20, 1:], ty[:20, 1:] = 1, 1
    y[:20, 1] = 0  # no positive in training: difficult is none
    ty[:20, 2] = 0  # no positive in the test
    y[:, 3] = 1  # no negative in training
    ty[20:, 4] = 0  # no negative in the test
    y[1:20, 5] = -1  # one positive: no fold has one on both sides
    y[2:20, 6] = -1  # two positives: two of three folds
    found = svm.fit_classes(x, make_labels(y), tx, make_labels(ty), [0.001, 0.5, 4.0], 3, 1)
    assert found["classes_left_out"] == {
        "class1": "no positive training photo",
        "class2": "no positive test photo",
        "class3": "no negative training photo",
        "class4": "no negative test photo",
    }
    assert list(found["AP"]) == list(found["cost"]) == ["class0", "class5", "class6", "class7"]
    assert found["not_cross_validated"] == ["class5"]
    assert found["cost"]["class5"] == 0.5  # nearest to 1 as a ratio
    assert found["fits"] == 10 + 1 + 7 + 10
    assert capfd.readouterr().err.count("Warning") == 0


def test_two_positives_use_two_folds() -> None:
    target = np.array([-1, 1, -1, -1, 1, -1, -1, -1, -1])
    parts = svm.folds_of(target, 3)
    assert len(parts) == 2
    assert all({1, -1} == set(target[rows]) for part in parts for rows in part)
    assert svm.folds_of(target[:2], 3) == []  # fewer photos than folds


def test_difficult_photos() -> None:
    """Negative in training, ignored in the test."""
    (x, y), (tx, ty) = problem(9, 90, 6, 1), problem(10, 90, 6, 1)
    x, tx = svm.normalize(x), svm.normalize(tx)
    base = svm.fit_class(x, y[:, 0], tx, ty[:, 0], [1.0], 3)
    assert base == svm.fit_class(x, np.where(y[:, 0] == 0, -1, y[:, 0]), tx, ty[:, 0], [1.0], 3)
    kept = ty[:, 0] != 0
    assert 0 < kept.sum() < 90
    assert base == svm.fit_class(x, y[:, 0], tx[kept], ty[kept, 0], [1.0], 3)
    assert base.ap != svm.fit_class(x, y[:, 0], tx, np.where(kept, ty[:, 0], -1), [1.0], 3).ap


def test_fits_that_do_not_converge_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    x, y = problem(11, 200, 3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = svm.fit_class(svm.normalize(x), y[:, 0], svm.normalize(x), y[:, 0], [1e-3, 1e7], 3)
    assert 3 <= found.not_converged < found.fits == 7


# evaluate


def make_tree(root: Path) -> Path:
    """24 + 16 photos; `red` photos are red, `dark` ones dark; no test photo is `odd`."""
    rng = np.random.default_rng(0)
    folder = root / "VOCdevkit" / "VOC2007"
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    for split, n in (("trainval", 24), ("test", 16)):
        lines: dict[str, list[str]] = {"red": [], "dark": [], "odd": []}
        for number in range(n):
            shows = {"red": number % 3 == 0, "dark": number % 4 == 1, "odd": split == "trainval" and number < 5}
            image = rng.integers(0, 120, (40, 50, 3))
            image[..., 0] += 120 * shows["red"]
            image = image // 4 if shows["dark"] else image
            name = f"{split}{number:02d}"
            Image.fromarray(image.astype(np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg")
            for key, value in shows.items():
                lines[key].append(f"{name} {1 if value else -1}\n")
        for key, text in lines.items():
            (folder / "ImageSets" / "Main" / f"{key}_{split}.txt").write_text("".join(text))
    return root


def make_config(**changes: object) -> config.Config:
    section = {"size": 32, "resize": 36, "stages": [4, 5], "costs": [0.01, 1.0], **changes}
    return config.parse({"downstream": {"voc07_svm": section}})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "backbone.safetensors"
    backbones.save(path, "resnet10", backbones.backbone("resnet10"), artifacts.stamp(artifacts.MODEL, {}, {}))
    return path


def evaluate(settings: config.Config, weights: Path, root: Path | None, output: Path, workers: int) -> dict:
    """Features, then the SVM, as the two commands do."""
    train, test, _ = svm.read(settings, root)
    path = output.parent.parent / "features.h5"
    features.write_labels(settings, weights, path, 0, train, test)
    return svm.evaluate(settings, path, "random", root, output, workers)


def test_evaluate(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path)
    settings = make_config(root=str(tmp_path / "elsewhere"))  # the argument goes before it
    output = tmp_path / "out" / "voc07_svm.json"
    returned = evaluate(settings, weights, tmp_path, output, 1)
    assert artifacts.read_results(output) == returned == json.loads(output.read_text())
    assert returned["task"] == "voc07_svm"
    assert returned["model"] == "random"
    assert returned["settings"] == config.used(settings, "voc07_svm")
    assert returned["data"] == {
        "root": str(tmp_path),
        "layout": "voc",
        "train_split": "trainval",
        "test_split": "test",
        "train": 24,
        "test": 16,
        "fingerprint": returned["data"]["fingerprint"],
        "weights_fingerprint": artifacts.fingerprint(weights),
        "features": config.used(settings, "features"),
    }
    assert list(returned["metrics"]["stages"]) == ["4", "5"]
    for key, value in returned["metrics"]["stages"]["5"].items():
        assert returned["metrics"][key] == value
    metrics = returned["metrics"]
    assert metrics["classes_left_out"] == {"odd": "no positive test photo"}
    assert set(metrics["AP"]) == {"red", "dark"}
    assert metrics["mAP"] > metrics["chance_mAP"] + 20  # colours show even in random features
    assert capsys.readouterr().err.count("voc07_svm: 1 of 3 classes left out: odd (no positive test photo)\n") == 1
    again = evaluate(make_config(root=str(tmp_path)), weights, None, tmp_path / "again.json", 2)
    assert again["metrics"] == metrics


def test_features_of_other_photos_or_not_finite(tmp_path: Path, weights: Path) -> None:
    tree, path, output = make_tree(tmp_path / "tree"), tmp_path / "features.h5", tmp_path / "result.json"
    settings = make_config(root=str(tree), stages=[5])
    train, test, _ = svm.read(settings, None)
    features.write_labels(settings, weights, path, 0, test, train)
    with pytest.raises(InputError, match=r"features\.h5: was made from another photo list than the one given"):
        svm.evaluate(settings, path, "random", None, output, 1)
    features.write_labels(settings, weights, path, 0, train, test)
    with h5py.File(path, "r+") as file:
        file["test_5"][3, 2] = np.nan
        del file["test_5"].attrs["sha256"]
    for evaluate_features in (svm.evaluate, lowshot.evaluate):
        with pytest.raises(InputError, match=r"features\.h5: test_5 holds features that are not finite"):
            evaluate_features(settings, path, "random", None, output, 1)
    assert not output.exists()


def test_bad_input_writes_nothing(tmp_path: Path, weights: Path) -> None:
    tree, output = make_tree(tmp_path / "tree"), tmp_path / "out" / "result.json"
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(weights.read_bytes()[:1000])
    cases = [
        ({}, weights, None, "downstream.voc07_svm.root"),
        ({"root": str(tmp_path / "none")}, weights, None, "none"),
        ({"train": "minitrain"}, weights, tree, "'minitrain'"),
        ({"test": "trainval"}, weights, tree, "share 24 photos"),
        ({"layout": "coco"}, weights, tree, "'train2017'"),
        ({}, tmp_path / "no.safetensors", tree, "no.safetensors"),
        ({}, truncated, tree, "truncated.safetensors"),
    ]
    for changes, path, root, part in cases:
        with pytest.raises(InputError) as error:
            evaluate(make_config(**changes), path, root, output, 1)
        assert part in str(error.value)
        assert "\n" not in str(error.value)
    for path in tree.rglob("*_test.txt"):
        path.write_text(path.read_text().replace(" 1\n", " 0\n"))
    with pytest.raises(InputError, match="no class can be evaluated") as error:
        evaluate(make_config(), weights, tree, output, 1)
    assert "\n" not in str(error.value)
    next(tree.rglob("test03.jpg")).write_bytes(b"no photo")
    with pytest.raises(InputError, match=r"test03\.jpg"):
        evaluate(make_config(), weights, tree, output, 1)
    assert not output.parent.exists()
