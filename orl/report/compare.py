"""`orl compare RUN RUN`: the scores of several runs side by side, and the settings in which the runs differ."""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orl import InputError, artifacts, config
from orl.doctor.chain import open_run
from orl.places import unique
from orl.report.page import render
from orl.report.scores import Task, tasks

COLUMNS = ("task", "set", "table", "score", "run", "model", "seeds", "value", "error", "difference_to_stage1")


@dataclass(frozen=True)
class Run:
    """A run to compare: what it is called, its results that are there, the number of others, and all its settings."""

    name: str
    folder: str
    results: list[str]
    missing: int
    settings: dict[str, Any]  # by their keys, joined by dots


def compare(given: Sequence[str], output: str) -> None:
    """Write index.html and scores.csv into the folder `output`; columns are in the order of `given`.

    Each of them is the folder of a run's results, or its name below results/. What counts is what its report has among
    the scores: results that the config of its last start names (of object discovery, only while the boxes of the
    photos' objects are there). Those that are not made yet are counted on the page.
    Same inputs, same bytes. Raises InputError, having written nothing.
    """
    folders = [_folder(one) for one in given]
    places = [os.path.realpath(folder) for folder in folders]
    for number, folder in enumerate(folders):
        if places[number] in places[:number]:
            raise InputError(f"{folder}: is given twice; name each run once.")
    if len(folders) < 2:
        raise InputError(f"{folders[0]}: is one run; name another to compare it with.")
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    runs = [
        _read(folder, name if names.count(name) == 1 else folder) for folder, name in zip(folders, names, strict=True)
    ]
    found = tasks({run.name: run.results for run in runs})
    page, table = (os.path.join(output, name) for name in ("index.html", "scores.csv"))
    html = render("compare.html", {"runs": runs, "tasks": found, "differences": _differences(runs)})
    artifacts.write_csv(table, COLUMNS, _rows(found))
    artifacts.write_text(page, html)
    for task in found:
        print("\n".join(task.lines))
    print(f"scores: {table}\npage: {page}")


def _folder(given: str) -> str:
    """The folder of a run; a mere name is looked for below results/ first."""
    below = os.path.join("results", given)
    return below if os.path.basename(given) == given and os.path.isdir(below) else given


def _read(folder: str, name: str) -> Run:
    """A run with at least one result. Raises InputError."""
    if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "config.json")):
        raise InputError(f"{folder}: has no config.json, so is no run, or an old one; name one such as results/scenes.")
    try:
        home, chain = open_run(folder, ())
        with contextlib.chdir(home):
            made = [*chain.places.scores(), *chain.places.measured("pair_boxes", "localization")]
            files = unique(chain.short(chain.places.found(stage, v)) for stage, v in made)
        settings = config.flat(config.parse(chain.raw, "config").model_dump(mode="json"))
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(f"{folder}:") else f"{folder}: {error}") from None
    paths = [os.path.join(folder, file) for file in files]
    results = [path for path in paths if os.path.exists(path)]
    if not results:
        raise InputError(f"{folder}: has no result of a downstream task; let the run evaluate its models first.")
    return Run(name, folder, results, len(paths) - len(results), settings)


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, but for the name: each run's as text, a dash where it has none."""
    found = []
    for key in sorted({key for run in runs for key in run.settings} - {"name"}):
        values = [run.settings.get(key, ...) for run in runs]
        if any(value != values[0] for value in values):
            found.append((key, [_text(value) for value in values]))
    return found


def _text(value: Any) -> str:
    if value is ...:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _rows(found: Sequence[Task]) -> list[tuple]:
    """The rows of scores.csv: one for each number of a table, unrounded."""
    return [
        (
            task.name,
            task.data,
            table.title,
            score,
            model.run,
            model.name,
            seeds,
            cell.mean.value,
            error,
            cell.difference,
        )
        for task in found
        for table in [*task.tables, *task.folded]
        for score, cells in table.scores.items()
        for (model, seeds), cell in zip(table.models.items(), cells, strict=True)
        if cell.mean
        for error in [None if math.isnan(cell.mean.error) else cell.mean.error]
    ]
