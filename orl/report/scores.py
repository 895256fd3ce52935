"""The scores of the report: results of the downstream tasks as tables, charts and the lines that are printed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orl import InputError, artifacts
from orl.report import figures
from orl.report.figures import Chart, Line, line_chart
from orl.report.repeats import Mean, arm_of, mean

FEW = 3  # models whose mAP needs no chart
CURVES = 12  # models at most in a chart of lines
ORDER = ("random", "stage1", "orl")  # models that come first
TITLES = {
    "voc07_svm": "VOC07 linear SVM",
    "voc07_lowshot": "Low-shot SVM",
    "linear": "Linear classification",
    "semi": "Semi-supervised classification",
    "knn": "k-NN classification",
    "detection": "Object detection",
    "segmentation": "Segmentation by a linear layer",
    "localization": "Object discovery",
}
PRINTED = {**TITLES, "semi": "Semi-supervised", "knn": "k-NN", "detection": "Detection", "segmentation": "Segmentation"}
APS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MIOUS = {"mIoU": "mIoU", "mIoU_objects": "mIoU without background", "pixel_accuracy": "pixel accuracy"}
METHODS = {  # of finding boxes, in the order of the table
    "pairing": "stage 2's pairing",
    "lost": "LOST",
    "random": "random proposal",
    "largest": "largest proposal",
    "first": "first proposal",
    "whole": "whole photo",
}
DISCOVERY = (
    "Boxes found without labels. CorLoc: the share of photos whose first box overlaps an annotated object by an IoU of "
    "at least 0.5; detection rate: the share of objects that one of their photo's first n boxes overlaps as much. "
    "LOST: seed expansion on a model's last feature map (Siméoni et al., 2021)."
)
WHERE = {"voc07_lowshot": " (k = {:g})", "linear": " (stage {:g})", "semi": " ({:g} % of labels)", "knn": " (k = {:g})"}
SPREADS = {"voc07_lowshot": "samples of the training photos", "semi": "runs"}
PROTOCOLS = {
    "release": "Protocol of the ORL release: the cost of each k is the best on the test photos.",
    "clean": "Clean protocol: costs are chosen by cross-validation within the samples, without the test photos.",
}

# By stage, k, percent of labels, epoch, place among a task's measures: a score in percent, with its spread if known.
Series = dict[float, Mean]


@dataclass(frozen=True)
class Model:
    """A model, of one of several runs where `run` is given; as text, both."""

    name: str
    run: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.run})" if self.run else self.name

    @property
    def arm(self) -> "Model":
        """What its repeats have in common."""
        return replace(self, name=arm_of(self.name)[0])


@dataclass(frozen=True)
class Cell:
    """A number of a table as text, whether it is the best of its kind, and by how much stage 1's is exceeded.

    `mean` and `difference` are the same as numbers, where they are known.
    """

    text: str
    best: bool = False
    change: str = ""
    mean: Mean | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Table:
    """Named scores, each with a cell for each of `models` (and their numbers of seeds), which are columns, or rows."""

    title: str
    corner: str  # the head of the names
    models: Mapping[Model, int]
    scores: Mapping[str, list[Cell]]
    down: bool = False  # models are rows

    @property
    def heads(self) -> list[str | Model]:
        """Those of all columns, the names' first."""
        return [self.corner, *(self.scores if self.down else self.models)]

    @property
    def rows(self) -> list[tuple[str | Model, list[Cell]]]:
        """Named rows of cells."""
        if not self.down:
            return list(self.scores.items())
        return [(model, list(cells)) for model, *cells in zip(self.models, *self.scores.values(), strict=True)]


@dataclass(frozen=True)
class Task:
    """The scores of all models in one downstream task on one data set."""

    name: str
    data: str  # the labelled set, of tasks on one
    title: str
    tables: list[Table]
    notes: list[str]
    charts: list[Chart]
    folded: list[Table]
    left_out: list[tuple[str, str]]  # class, reason
    lines: list[str]  # to print


@dataclass(frozen=True)
class Reading:
    """What a result says of its model."""

    scores: dict[str, Series]
    # Title of a folded table and what its rows are -> row -> percent, nan where there is none.
    parts: dict[tuple[str, str], dict[str, float]]
    chosen: dict[float, str]  # the best setting, by percent of labels
    notes: list[str]
    data: tuple[str, str]  # what it was measured on, and what of it must be equal to compare; empty where not told
    left_out: dict[str, str]  # class -> reason
    fits: tuple[int, int]  # and those among them that did not converge


def rank(model: str) -> tuple[int, str, int]:
    """The place of a model among others, as a sort key."""
    arm, seed = arm_of(model)
    return (ORDER.index(arm) if arm in ORDER else len(ORDER), arm, seed)


def given_once(path: str, result: dict, found: Iterable[str]) -> str:
    """The model of a result, which is not in `found`: given twice, it would count as a repeat. Raises InputError."""
    model = str(result["model"])
    if model in found:
        raise InputError(f"{path}: model {model!r} of {result['task']} is given twice; name one file of each.")
    return model


@contextmanager
def result_of(path: str, task: str) -> Iterator[None]:
    """InputError for what goes wrong in the body because `path` is no result of `orl evaluate TASK`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: is no result of `orl evaluate {task}` ({error}); evaluate again.") from None


def tasks(runs: Mapping[str, Sequence[str]]) -> list[Task]:
    """The results of each task on each data set; a task of no known name needs an mAP. Raises InputError.

    `runs`: the files of results by the name of their run, which is empty where there is only one.
    """
    return [_task(*key, models) for key, models in _readings(runs).items()]


def first_score(paths: Sequence[str]) -> tuple[str, str, dict[str, float]] | None:
    """The first task of the model `orl`: TASK or TASK.SET, what the score is called, and that of each model in percent.

    It is the first of several measures, the last of several stages, and that by the most labels or neighbours.
    Raises InputError. None: there is no such task.
    """
    for (task, name), models in _readings({"": paths}).items():
        own = models.get(Model("orl"))
        if own is None or task == "localization":  # by which boxes are compared
            continue
        score, series = next((score, series) for score, series in own.scores.items() if series)
        key = 0 if 0 in series else max(series)
        title = f"{TITLES.get(task, task)}{name and f': {name}'}, {score}{WHERE.get(task, '').format(key)}"
        given = {model.name: one.scores[score] for model, one in models.items()}
        scores = {model: values[key].value for model, values in given.items() if key in values}
        return f"{task}{name and f'.{name}'}", title, scores
    return None


def _readings(runs: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], dict[Model, Reading]]:
    """Task and set -> model -> what its result says, in the order of TITLES. Raises InputError."""
    found: dict[tuple[str, str], dict[Model, Reading]] = {}
    for run, path in [(run, path) for run, paths in runs.items() for path in paths]:
        result = artifacts.read_results(path)
        task, metrics = str(result["task"]), result["metrics"]
        if task not in SHOWN and not (isinstance(metrics, dict) and isinstance(metrics.get("mAP"), (int, float))):
            raise InputError(f"{path}: holds no mAP; evaluate again.")
        with result_of(path, task):
            name = str(result["data"].get("set") or "")
            reading = _read(task, result)
        models = found.setdefault((task, name), {})
        models[Model(given_once(path, result, [model.name for model in models if model.run == run]), run)] = reading
    known = list(TITLES)
    order = sorted(found, key=lambda key: (known.index(key[0]) if key[0] in known else len(known), key))
    return {key: found[key] for key in order}


# Reading


def _read(task: str, result: dict) -> Reading:
    """What the page needs of a result. Raises LookupError, TypeError, ValueError or AttributeError if it is damaged."""
    metrics = result["metrics"]
    scores: dict[str, Series] = {}
    parts: dict[tuple[str, str], dict[str, float]] = {}
    chosen: dict[float, str] = {}
    notes = []
    if task == "voc07_lowshot":
        shots = [int(k) for k in metrics["shots"]]
        columns = zip(shots, metrics["mAP"], metrics["std"], metrics["mAP_of_samples"], strict=True)
        scores["mAP"] = {k: _spread(value, std, samples) for k, value, std, samples in columns}
        notes.append(PROTOCOLS[result["settings"]["downstream"][task]["protocol"]])
        few = {k: sum(positives < k for positives in metrics["too_few_positives"].values()) for k in shots}
        listed = ", ".join(f"{number} at k = {k}" for k, number in few.items() if number)
        if listed:
            notes.append(f"Classes with fewer positives than k are left out at that k: {listed}.")
        if metrics["shots_left_out"]:
            listed = ", ".join(map(str, metrics["shots_left_out"]))
            notes.append(f"No class has enough positives for k = {listed}.")
    elif task == "linear":
        scores = {"top-1": _series(metrics["top1"]), "top-5": _series(metrics["top5"])}
        last = max(metrics["top1"], key=float)
        scores["epochs"] = _series({one["epoch"]: one["top1"][last] for one in metrics["epochs"]})
    elif task == "semi":
        for share, found in metrics["shares"].items():
            percent = 100 * float(share)
            for name, key in (("top-1", "top1"), ("top-5", "top5")):
                value = _spread(found[key], found[f"{key}_std"], found["runs"])
                scores.setdefault(name, {})[percent] = value
            chosen[percent] = _setting(found)
            parts[f"Top-1 of each setting, {percent:g} % of labels", "Setting"] = {
                _setting(one): _number(one["top1"]) for one in found["grid"]
            }
    elif task == "knn":
        scores["top-1"] = _series(metrics["top1"])
    elif task == "detection":
        for kind in ("box", "mask"):
            scores[kind] = _places([metrics[kind][name] for name in APS])
            parts[f"{kind.title()} AP of each category", "Category"] = {
                str(one["name"]): _or_nan(one[f"{kind}_AP"]) for one in metrics["categories"]
            }
        scores["loss"] = _series({row["iteration"]: row["loss"] for row in metrics["rows"]})
        notes.append(f"Trained for {metrics['iterations']:,} iterations of {metrics['batch']:,} photos.")
    elif task == "segmentation":
        scores["mIoU"] = _places([metrics[name] for name in MIOUS])
        scores["loss"] = _series({one["epoch"]: one["loss"] for one in metrics["epochs"]})
        parts["IoU of each class", "Class"] = {label: _or_nan(iou) for label, iou in metrics["IoU"].items()}
        notes.append(f"Trained for {len(metrics['epochs']):,} epochs on the frozen last stage.")
        notes.append(f"Naming all pixels background: mIoU {_number(metrics['background_only_mIoU']):.2f}.")
    elif task == "localization":
        for method, found in metrics["methods"].items():
            rates = zip(metrics["boxes"], found["detection_rate"], strict=True)
            scores[METHODS[method]] = _series({0: found["corloc"], **dict(rates)})  # by number of boxes; 0: CorLoc
        notes.append(DISCOVERY)
    else:
        scores["mAP"] = _series({0: metrics["mAP"]})  # a single one
        scores["stages"] = _series({stage: one["mAP"] for stage, one in metrics.get("stages", {}).items()})
        parts["AP of each class", "Class"] = {label: _number(ap) for label, ap in metrics.get("AP", {}).items()}
    if not any(scores.values()):
        raise ValueError("it has no scores")
    chance = metrics.get("chance_top1", metrics.get("chance_mAP"))
    if task == "voc07_lowshot":  # one for each k, as other classes are left out
        first, last = (f"{_number(one):.2f}" for one in (chance[0], chance[-1]))
        ks = metrics["shots"]
        notes.append(
            f"Chance: {first}." if first == last else f"Chance: {first} (k = {ks[0]}) to {last} (k = {ks[-1]})."
        )
    elif chance is not None and task in SHOWN:
        notes.append(f"Chance: {_number(chance):.2f}.")
    elif chance is not None:
        scores["chance"] = _series({0: chance})
    scores.setdefault("chance", {})
    left_out = {label: str(reason) for label, reason in metrics.get("classes_left_out", {}).items()}
    fits = int(metrics.get("fits", 0)), int(metrics.get("not_converged", 0))
    return Reading(scores, parts, chosen, notes, _data(task, result["data"]), left_out, fits)


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _series(values: Mapping[Any, Any]) -> Series:
    return {float(key): Mean(_number(value)) for key, value in values.items()}


def _or_nan(value: Any) -> float:
    return math.nan if value is None else _number(value)


def _places(values: Sequence[Any]) -> Series:
    """Measures that go by their places; None: there is none."""
    return {place: Mean(_number(value)) for place, value in enumerate(values) if value is not None}


def _spread(value: Any, std: Any, samples: Sequence) -> Mean:
    """A score with its standard deviation, where that is of several."""
    return Mean(_number(value), _number(std) if len(samples) > 1 else math.nan)


def _setting(found: Mapping) -> str:
    return f"lr {found['lr']}, head {found['head']}"


def _data(task: str, data: Mapping) -> tuple[str, str]:
    text = ""
    if {"root", "train", "test", "train_split", "test_split"} <= set(data):
        text = "{train} photos of {train_split} to train, {test} of {test_split} to test, in {root}."
    elif task in ("linear", "semi", "knn"):
        text = "{train_photos:,} photos of {train} to train, {val_photos:,} of {val} to test, "
        text += "{classes:,} classes, in {root}."
    elif task in ("detection", "segmentation"):
        text = "{train_photos:,} photos of {train} to train, {test_photos:,} of {test} to test, "
        text += "{categories:,} categories, in {root}."
    elif task == "localization":
        text = "{objects:,} objects on {photos:,} photos."
    told = text.format(**data) + _without(task, data)
    fingerprint = data.get("fingerprint", data.get("annotations_fingerprints", ""))
    # Equal data may lie in several folders, as the scenes of several runs do.
    return told, f"{text.format(**{**data, 'root': ''})} {fingerprint}" if fingerprint else told


def _without(task: str, data: Mapping) -> str:
    """The sentence on objects that count for nothing, where there are any; of a task whose objects are annotated."""
    counts = data.get("left_out", {})
    if task == "localization":
        counts = {name: data.get(name, 0) for name in ("crowds", "without_area")}
    splits = {name: some for name, some in counts.items() if isinstance(some, Mapping)} or {"": counts}
    texts = [
        f"{count:,} {name.replace('_', ' ')}" + (f" ({split})" if split else "")
        for split, some in splits.items()
        for name, count in some.items()
        if count
    ]
    return f" Objects left out: {', '.join(texts)}." if texts else ""


# Showing

Arms = dict[Model, list[Reading]]  # by model, a reading for each seed
Shown = tuple[list[Table], list[Chart], dict[Model, str]]  # and what is printed of each model


def _task(task: str, name: str, readings: dict[Model, Reading]) -> Task:
    readings = _sorted(readings)
    arms: Arms = {}
    for model, reading in readings.items():
        arms.setdefault(model.arm, []).append(reading)
    if task == "localization":
        arms = _by_method(arms)
    tables, charts, said = SHOWN.get(task, _svm)(arms)
    title, printed = (names.get(task, task) for names in (TITLES, PRINTED))
    if name:
        title, printed = f"{title}: {name}", f"{printed}, {name}"
    left_out: dict[str, str] = {}
    for one in readings.values():
        left_out.update(one.left_out)
    seeds = {arm: f", {len(repeats)} seeds" for arm, repeats in arms.items() if len(repeats) > 1 and task in SHOWN}
    lines = [f"{printed}: {arm}: {text}{seeds.get(arm, '')}" for arm, text in said.items()]
    notes, parts = _notes(task, readings, arms), _parts(arms)
    return Task(task, name, title, tables, notes, charts, parts, sorted(left_out.items()), lines)


def _sorted(readings: dict[Model, Reading]) -> dict[Model, Reading]:
    """By model, then by run as they came, then by seed."""
    runs = list(dict.fromkeys(model.run for model in readings))

    def place(model: Model) -> tuple[int, str, int, int]:
        first, arm, seed = rank(model.name)
        return first, arm, runs.index(model.run), seed

    return {model: readings[model] for model in sorted(readings, key=place)}


def _svm(arms: Arms) -> Shown:
    """The mAP of each model, against those of its run that others are compared with, and by stage."""
    scores = {arm: series[0] for arm, series in _means(arms, "mAP").items()}
    chances = {arm: f"{series[0].value:.2f}" for arm, series in _means(arms, "chance").items() if series}
    columns = {"mAP": _cells(scores, 2, told=False)}
    more = {arm: [f"{len(repeats)} seeds"] if len(repeats) > 1 else [] for arm, repeats in arms.items()}
    for kind in (is_stage1, is_orl):
        others = {arm: other for arm, other in _firsts(arms, kind).items() if arm != other}
        changes = {arm: scores[arm].minus(scores[other]).text(2, sign=True) for arm, other in others.items()}
        if changes:
            names = dict.fromkeys(other.name for other in others.values())
            columns[f"against {' or '.join(names)}"] = [Cell(changes.get(arm, "")) for arm in arms]
        for arm, change in changes.items():
            more[arm].append(f"{change} against {others[arm].name}")
    columns["chance"] = [Cell(chances.get(arm, "")) for arm in arms]
    for arm, chance in chances.items():
        more[arm].append(f"chance {chance}")
    tables = [_table("Scores", arms, columns)]
    stages = _means(arms, "stages")
    if any(len(series) > 1 for series in stages.values()):
        tables.append(_table("mAP by stage", arms, _columns(stages, "stage {:g}", 2)))
    said = {arm: f"mAP {scores[arm].text(2)}" + (f" ({', '.join(more[arm])})" if more[arm] else "") for arm in arms}
    return tables, _dots(arms, scores, sorted(set(chances.values()))), said


def _lowshot(arms: Arms) -> Shown:
    means = _means(arms, "mAP")
    charts = _curves("mAP by k", means, "mAP, percent", "k: positive photos of a class", "{:g}")
    said = {
        arm: f"mAP {' … '.join(texts[:1] + texts[1:][-1:])}" for arm, texts in _texts(means, arms, "k = {:g}").items()
    }
    return [_table("mAP by k", arms, _columns(means, "k = {:g}"))], charts, said


def _linear(arms: Arms) -> Shown:
    first, fifth = _means(arms, "top-1"), _means(arms, "top-5")
    tables = [
        _table("Top-1 by stage", arms, _columns(first, "stage {:g}")),
        _table("Top-5 by stage", arms, _columns(fifth, "stage {:g}")),
    ]
    charts = _curves("Top-1 by stage", first, "top-1, percent", "stage")
    charts += _curves("Top-1 of the last stage by epoch", _plain(_means(arms, "epochs")), "top-1, percent", "epoch")
    said = {}
    for arm, texts in _texts(first, arms, "stage {:g}").items():
        values = [first[arm][stage].value for stage in sorted(first[arm])]
        best = texts[int(np.argmax(values))]
        said[arm] = f"top-1 {texts[-1]}" + (f", best {best}" if max(values) > values[-1] else "")
    return tables, charts, said


def _semi(arms: Arms) -> Shown:
    first, fifth = _means(arms, "top-1"), _means(arms, "top-5")
    columns = {**_columns(first, "top-1, {:g} %"), **_columns(fifth, "top-5, {:g} %")}
    settings = {}
    for share in sorted({share for series in first.values() for share in series}):
        chosen = [dict.fromkeys(one.chosen.get(share, "–") for one in repeats) for repeats in arms.values()]
        settings[f"{share:g} %"] = [Cell("; ".join(some)) for some in chosen]
    tables = [_table("By share of labels", arms, columns), _table("Best setting", arms, settings)]
    charts = _curves("Top-1 by share of labels", first, "top-1, percent", "share of labels", "{:g} %")
    return tables, charts, {arm: f"top-1 {', '.join(texts)}" for arm, texts in _texts(first, arms, "{:g} %").items()}


def _knn(arms: Arms) -> Shown:
    means = _means(arms, "top-1")
    said = {arm: f"top-1 {', '.join(texts)}" for arm, texts in _texts(means, arms, "k = {:g}").items()}
    return [_table("Top-1 by k", arms, _columns(means, "k = {:g}"))], [], said


def _detection(arms: Arms) -> Shown:
    means = {kind: _means(arms, kind) for kind in ("box", "mask")}
    tables = [_table(f"{kind.title()} AP", arms, _named(series, APS)) for kind, series in means.items()]
    said = {arm: "; ".join(f"{kind} {_listed(series[arm], APS[:2])}" for kind, series in means.items()) for arm in arms}
    return tables, _losses(arms, "iteration"), said


def _segmentation(arms: Arms) -> Shown:
    means = _means(arms, "mIoU")
    names = list(MIOUS.values())
    said = {arm: _listed(series, names) for arm, series in means.items()}
    return [_table("Scores", arms, _named(means, names))], _losses(arms, "epoch"), said


def _by_method(arms: Arms) -> Arms:
    """Readings of object discovery by what finds the boxes, in the order of METHODS: the pairing of each variant, LOST
    of each model, the other proposals of each variant, but once of those of a run that agree."""
    rows: Arms = {}
    for method, name in METHODS.items():
        same: dict[tuple, list[Model]] = {}
        found = {}
        for arm, repeats in arms.items():
            found[arm] = [replace(one, scores={"found": one.scores[name]}) for one in repeats if name in one.scores]
            if found[arm]:
                means = _means({arm: found[arm]}, "found")[arm].items()
                key = (arm,) if method in ("pairing", "lost") else tuple((n, round(one.value, 6)) for n, one in means)
                same.setdefault((arm.run, *key), []).append(arm)
        runs = [run for run, *_ in same]
        for (run, *_), models in same.items():
            is_named = method == "lost" or runs.count(run) > 1
            whose = f": {', '.join(model.name for model in models)}" if is_named else ""
            rows[Model(name + whose, run)] = found[models[0]]
    return rows


def _localization(arms: Arms) -> Shown:
    means = _means(arms, "found")
    rates = {row: {n: rate for n, rate in series.items() if n} for row, series in means.items()}
    columns = {**_seeds(arms), **_named(means, ["CorLoc"], 1), **_columns(rates, "detection rate, n = {:g}")}
    said = {
        row: f"{_listed(means[row], ['CorLoc'], 1)}, detection rate {', '.join(texts)}"
        for row, texts in _texts(rates, arms, "n = {:g}").items()
    }
    return [Table("Boxes", "Boxes", _counts(arms), columns, down=True)], [], said  # many: not as columns


SHOWN: dict[str, Callable[[Arms], Shown]] = {
    "voc07_lowshot": _lowshot,
    "linear": _linear,
    "semi": _semi,
    "knn": _knn,
    "detection": _detection,
    "segmentation": _segmentation,
    "localization": _localization,
}


def _means(arms: Arms, score: str) -> dict[Model, Series]:
    """A score of each model over its seeds; of a single one, with the spread that its result tells."""
    means = {}
    for arm, repeats in arms.items():
        given = [one.scores.get(score, {}) for one in repeats]
        keys = dict.fromkeys(key for series in given for key in series)
        means[arm] = (
            {key: mean([series[key].value for series in given if key in series]) for key in keys}
            if len(given) > 1
            else given[0]
        )
    return means


def _plain(means: dict[Model, Series]) -> dict[Model, Series]:
    """Without spreads, which would hide a line of many points."""
    return {arm: {key: Mean(one.value) for key, one in series.items()} for arm, series in means.items()}


def _texts(means: dict[Model, Series], arms: Arms, column: str) -> dict[Model, list[str]]:
    """A score of each model to print, by column; with an error only if it is that of several seeds."""
    return {
        arm: [
            f"{(one if len(arms[arm]) > 1 else Mean(one.value)).text(1)} ({column.format(key)})"
            for key, one in sorted(series.items())
        ]
        for arm, series in means.items()
    }


def _columns(means: dict[Model, Series], head: str, digits: int = 1) -> dict[str, list[Cell]]:
    """The cells of all models for each key of any series, by its heading."""
    keys = sorted({key for series in means.values() for key in series})
    return {head.format(key): _cells({arm: one.get(key) for arm, one in means.items()}, digits) for key in keys}


def _named(means: dict[Model, Series], names: Sequence[str], digits: int = 2) -> dict[str, list[Cell]]:
    """The cells of all models for each of the measures that go by their places."""
    return {
        name: _cells({arm: one.get(place) for arm, one in means.items()}, digits) for place, name in enumerate(names)
    }


def _listed(series: Series, names: Sequence[str], digits: int = 2) -> str:
    """The first measures of those that go by their places, to print."""
    values = [series.get(place, Mean(math.nan)).text(digits) for place in range(len(names))]
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def is_stage1(arm: str) -> bool:
    """Whether an arm is of stage 1's weights: those of the run, or of a variant."""
    return arm.split("-")[0] == "stage1"


def is_orl(arm: str) -> bool:
    """Whether an arm is of stage 3's weights; a plain orl ranks first."""
    return arm.startswith("orl")


def _firsts(arms: Iterable[Model], kind: Callable[[str], bool]) -> dict[Model, Model]:
    """The first arm of a kind in the run of each arm that has one."""
    firsts: dict[str, Model] = {}
    for arm in arms:
        if kind(arm.name):
            firsts.setdefault(arm.run, arm)
    return {arm: firsts[arm.run] for arm in arms if arm.run in firsts}


def _cells(scores: Mapping[Model, Mean | None], digits: int, told: bool = True) -> list[Cell]:
    """Scores as text, and (`told`: as text, too) against the first of stage 1 of the run; the best, as far as the text
    tells, are marked where there is something to compare."""
    given = [round(one.value, digits) for one in scores.values() if one is not None]
    best = max(given) if len(given) > 1 else None
    firsts = _firsts(scores, is_stage1)
    cells = []
    for arm, one in scores.items():
        if one is None:
            cells.append(Cell("–"))
            continue
        base = firsts.get(arm, arm)
        first = scores[base] if base != arm else None
        difference = one.value - first.value if first else None
        change = Mean(difference).text(digits, sign=True) if told and difference is not None else ""
        cells.append(Cell(one.text(digits), round(one.value, digits) == best, change, one, difference))
    return cells


def _table(title: str, arms: Arms, rows: Mapping[str, list[Cell]]) -> Table:
    """A column for each model."""
    return Table(title, "Score", _counts(arms), {**_seeds(arms), **rows})


def _counts(arms: Arms) -> dict[Model, int]:
    """The number of seeds of each model."""
    return {arm: len(repeats) for arm, repeats in arms.items()}


def _seeds(arms: Arms) -> dict[str, list[Cell]]:
    """The numbers of seeds, where there are several."""
    numbers = _counts(arms).values()
    return {"seeds": [Cell(str(number)) for number in numbers]} if max(numbers) > 1 else {}


def _parts(arms: Arms) -> list[Table]:
    """The scores of classes and settings: a row for each, a column for each model."""
    found: dict[tuple[str, str], dict[str, None]] = {}  # title and heading -> rows, in order
    for one in [one for repeats in arms.values() for one in repeats]:
        for key, part in one.parts.items():
            found.setdefault(key, {}).update(dict.fromkeys(part))
    tables = []
    for key, names in found.items():
        rows = {}
        for name in names:
            given = [[one.parts.get(key, {}).get(name, math.nan) for one in repeats] for repeats in arms.values()]
            values = [[value for value in arm if not math.isnan(value)] for arm in given]
            means = [Mean(mean(some).value) if some else None for some in values]
            rows[name] = _cells(dict(zip(arms, means, strict=True)), 2, told=False)
        if rows:
            tables.append(Table(*key, _counts(arms), rows))
    return tables


def _curves(title: str, means: dict[Model, Series], ylabel: str, xlabel: str, tick: str = "") -> list[Chart]:
    """A line for each model where there are two points or more; with `tick`, their text, on a logarithmic axis."""
    keys = sorted({key for series in means.values() for key in series})
    if len(keys) < 2:
        return []
    lines = []
    for arm, series in means.items():
        if series:
            x = np.array(sorted(series))
            y, error = (
                np.array(values) for values in zip(*((series[k].value, series[k].error) for k in x), strict=True)
            )
            lines.append(Line(str(arm), x, y, error))
    drawn = lines[:CURVES]
    ends = "; ".join(f"{line.name} {line.y[0]:.1f} to {line.y[-1]:.1f}" for line in drawn)
    unit = ", in percent" if ylabel.endswith("percent") else ""
    known = any(not math.isnan(value.error) for series in means.values() for value in series.values())
    notes = ["Bars: ±, as in the table."] if known else []
    notes += [f"{len(lines) - CURVES} more models are not drawn."] if len(lines) > CURVES else []
    ticks = {key: tick.format(key) for key in keys} if tick else None
    return [line_chart(title, drawn, ylabel, f"{title}{unit}: {ends}", " ".join(notes), xlabel, ticks)]


def _losses(arms: Arms, by: str) -> list[Chart]:
    return _curves(f"Training loss by {by}", _plain(_means(arms, "loss")), "loss", by)


def _dots(arms: Arms, scores: dict[Model, Mean], chance: list[str]) -> list[Chart]:
    """Where there are repeats or more than a few models: the mAP of all, then closer, that of the trained ones."""
    repeated = any(len(repeats) > 1 for repeats in arms.values())
    if len(arms) <= FEW and not repeated:
        return []

    def chart(title: str, drawn: list[Model], dashed: list[str]) -> Chart:
        numbers = {number: arm for number, arm in enumerate(arms, 1) if arm in drawn}
        rows = [
            (str(number), [one.scores["mAP"][0].value for one in arms[arm]], scores[arm])
            for number, arm in numbers.items()
        ]
        alt = f"{title}, in percent: " + "; ".join(f"{arm} {scores[arm].text(2)}" for arm in drawn)
        notes = ["Bars: ± 2 standard errors; small dots: seeds."] if repeated else []
        notes += ["Dashed: chance."] if dashed else []
        picture = figures.dots(rows, [float(value) for value in dashed], "mAP, percent", alt)
        return Chart(title, picture, [], " ".join(notes), [f"{number}: {arm}" for number, arm in numbers.items()])

    trained = [arm for arm in arms if arm.name.split("-")[0] != "random"]
    charts = [chart("mAP", list(arms), chance)]
    if len(trained) > 1:
        charts.append(chart("mAP of trained models", trained, []))
    return charts


def _notes(task: str, readings: dict[Model, Reading], arms: Arms) -> list[str]:
    """What ± means, what the scores were measured on and how, and which fits did not converge."""
    single = [series for (one, *more) in arms.values() if not more for series in one.scores.values()]
    seeds = ["Means over seeds ± their standard errors"] if any(len(repeats) > 1 for repeats in arms.values()) else []
    if any(not math.isnan(value.error) for series in single for value in series.values()):
        who = "of models with a single seed, means" if seeds else "Means"
        seeds.append(f"{who} over {SPREADS[task]} ± their standard deviation")
    elif seeds and task not in SHOWN:
        seeds.append("those of differences take the models as independent")
    notes = [f"{'; '.join(seeds)}."] if seeds else []
    on = {model: [one.data] for model, one in readings.items() if one.data[0]}
    notes += _told(on)
    if len({key for ((_, key),) in on.values()}) > 1:
        notes.append("The models were measured on different data: their scores cannot be compared.")
    notes += _told({model: [(note,) for note in one.notes] for model, one in readings.items()})
    for arm, repeats in arms.items():
        fits, failed = (sum(counts) for counts in zip(*(one.fits for one in repeats), strict=True))
        if failed:
            notes.append(f"{arm}: {failed:,} of {fits:,} SVM fits stopped before they converged.")
    return notes


def _told(said: Mapping[Model, Sequence[tuple[str, ...]]]) -> list[str]:
    """What is said of models, each once; the text is the first of each tuple. Names stand before what is not of all."""
    who: dict[tuple[str, ...], list[Model]] = {}
    for model, told in said.items():
        for what in told:
            who.setdefault(what, []).append(model)
    return [
        what[0] if len(models) == len(said) else f"{_together(models, said)}: {what[0]}" for what, models in who.items()
    ]


def _together(models: Sequence[Model], among: Iterable[Model]) -> str:
    """The names of models; of an arm all of whose models are there, the arm's, and so of one of several runs."""
    others = set(among) - set(models)
    runs, arms = {other.run for other in others}, {other.arm for other in others}
    names = []
    for model in models:
        if model.run and model.run not in runs:
            names.append(f"run {model.run}")
        else:
            names.append(str(model if model.arm in arms else model.arm))
    return ", ".join(dict.fromkeys(names))
