"""Ablations: the variants of a run's stage 3 beside the run's own model, by the question that each asks."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from orl import artifacts, config
from orl.places import Places
from orl.report import figures
from orl.report.figures import Chart
from orl.report.repeats import Mean, by_arm, mean
from orl.report.scores import first_score

LOSSES, SEVERAL = "losses of stage 3", "several settings"  # questions about more than one setting
WHOLE = ("stage1.weights", "stage1.method")  # what brings other settings of stage 1 along
OWN = "the run's own"


@dataclass(frozen=True)
class Row:
    """A model, the settings by which it answers a question, and what it scores."""

    setting: str
    model: str
    seeds: int
    score: str
    difference: str  # to the run's own model
    precision: str  # of its pairs


@dataclass(frozen=True)
class Question:
    """The models of a question, by its setting's value, and their chart."""

    rows: list[Row]
    chart: Chart


@dataclass(frozen=True)
class Ablations:
    """All questions of a run, the score that answers them, and that of its stage 1, if known."""

    score: str
    questions: list[Question]
    stage1: str


@dataclass(frozen=True)
class _Arm:
    """A model of stage 3: what its variant changes, and by seed its score and the precision of its pairs, if known."""

    model: str
    changed: dict[str, Any]
    scores: list[float]
    precisions: list[float]

    @property
    def mean(self) -> Mean:
        return mean(self.scores)

    def shown(self) -> list[float]:
        """What an axis must reach to."""
        bar = 0 if math.isnan(self.mean.error) else 2 * self.mean.error
        return [*self.scores, self.mean.value - bar, self.mean.value + bar]


def ablations(raw: dict, scores_paths: Sequence[str], pairs_paths: Sequence[str]) -> Ablations | None:
    """What the variants in the config `raw` tell of ORL by the first task of the results; None where there are none.

    A question is what the variants ask that change the same setting. Raises InputError.
    """
    found = first_score(scores_paths)
    if not found:
        return None
    task, score, scores = found
    stage, runs = f"{task} stage3", config.runs(raw)
    places = Places(runs, "", {})
    if stage not in places.upstream or not places.has(stage, ""):
        return None
    results = [artifacts.read_results(path) for path in pairs_paths]
    precisions = {str(one["model"]): 100 * float(one["metrics"]["precision"]) for one in results}
    settings = _decide(places, stage, "")
    asked: dict[str, list[_Arm]] = {}
    for model, repeats in by_arm(f"orl{v}" for v in runs).items():
        seeds = [repeat.removeprefix("orl") for repeat in repeats]
        arm = _Arm(
            model,
            _changed(_decide(places, stage, seeds[0]), settings),
            _values(places, stage, "orl", seeds, scores),
            _values(places, "pair_precision", "pairs", seeds, precisions),
        )
        if arm.scores and (arm.changed or model == "orl"):
            asked.setdefault(_question(arm.changed), []).append(arm)
    own, *_ = asked.pop("", [None])
    if own is None or not asked:
        return None
    stage1 = [scores[model] for model in by_arm(scores).get("stage1", [])]
    dashed = [mean(stage1).value] if stage1 else []
    shown = [value for arm in (own, *chain(*asked.values())) for value in arm.shown()]
    order = sorted(asked, key=SEVERAL.__eq__)  # which comes last
    questions = [_answer(key, own, asked[key], settings.get(key), score, dashed, shown) for key in order]
    return Ablations(score, questions, mean(stage1).text(2) if stage1 else "")


def _decide(places: Places, stage: str, v: str) -> dict[str, Any]:
    """The settings that decide a stage's result, and all upstream, but for the seed; keys are joined by dots."""
    found: dict[str, Any] = {}
    for upstream in places.upstream[stage]:
        found |= _decide(places, upstream, v)
    found |= config.flat(config.used(places.runs[v], stage.split()[0]))
    return {key: value for key, value in found.items() if key not in ("seed", "version")}


def _changed(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the run's own; without those that another of them brings along."""
    changed = {key: value for key, value in settings.items() if key not in own or own[key] != value}
    whole = next((key for key in WHOLE if key in changed), None)
    return {key: value for key, value in changed.items() if key == whole or not whole or not key.startswith("stage1.")}


def _values(places: Places, stage: str, kind: str, seeds: Sequence[str], values: Mapping[str, float]) -> list[float]:
    """A variant's values, by seed: each may go by the name of another variant whose settings are equal."""
    equal = [[v for v in places.runs if places.digest(stage, v) == places.digest(stage, seed)] for seed in seeds]
    named = [[f"{kind}{v}" for v in some if f"{kind}{v}" in values] for some in equal]
    return [values[names[0]] for names in named if names]


def _question(changed: Mapping[str, Any]) -> str:
    """What a variant with these changes asks: a setting, or one of several; empty without changes."""
    keys = {LOSSES if key.startswith("stage3.") and key.endswith("_weight") else key for key in changed}
    return SEVERAL if len(keys) > 1 else "".join(keys)


def _answer(
    key: str,
    own: _Arm,
    variants: list[_Arm],
    value: Any,
    score: str,
    dashed: list[float],
    shown: list[float],
) -> Question:
    """The rows and the chart of a question; `value`: the run's own, of one about a single setting."""
    names = {own.model: OWN}
    names |= {arm.model: ", ".join(f"{one}: {_text(new)}" for one, new in arm.changed.items()) for arm in variants}
    arms = [own, *variants]
    ticks = [str(number) for number, _ in enumerate(arms, 1)]
    is_number = False
    if key not in (LOSSES, SEVERAL):
        names[own.model] = f"{key}: {_text(value)} ({OWN})"
        values = {own.model: value, **{arm.model: arm.changed[key] for arm in variants}}
        arms.sort(key=lambda arm: _order(values[arm.model]))
        is_number = all(_order(one)[0] == 1 for one in values.values())
        ticks = [f"{values[arm.model]:g}" for arm in arms] if is_number else ticks
    rows = [
        Row(
            names[arm.model],
            arm.model,
            len(arm.scores),
            arm.mean.text(2),
            "" if arm is own else arm.mean.minus(own.mean).text(2, sign=True),
            mean(arm.precisions).text(2) if arm.precisions else "–",
        )
        for arm in arms
    ]
    alt = f"{key}, {score}, in percent: {'; '.join(f'{row.setting} {row.score}' for row in rows)}"
    drawn = [(tick, arm.scores, arm.mean) for tick, arm in zip(ticks, arms, strict=True)]
    ylabel = "value" if is_number else "setting"
    picture = figures.dots(drawn, dashed, "percent", alt, ylabel, arms.index(own), shown)
    told = [] if is_number else [f"{tick}: {row.setting}" for tick, row in zip(ticks, rows, strict=True)]
    return Question(rows, Chart(key, picture, [], config.description(key).replace("`", ""), told))


def _text(value: Any) -> str:
    if value is None or isinstance(value, float):
        return "not given" if value is None else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _order(value: Any) -> tuple[int, float, str]:
    """A sort key for values of a setting: none, numbers, others."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 1, value, ""
    return (0, 0, "") if value is None else (2, 0, _text(value))
