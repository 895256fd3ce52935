"""What was run, for the report: settings, time and memory of its stages, the machine, and the graph of its rules."""

import csv
import importlib.metadata
import itertools
import json
import math
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import networkx as nx

from orl import InputError, __version__, config
from orl.doctor import machine
from orl.doctor.estimate import duration

NODE = re.compile(r"^\s*(\d+)\[label = \"(\w+)(?:\\nmerged: (\w+))?", re.MULTILINE)  # of `snakemake --dag dot`
EDGE = re.compile(r"^\s*(\d+) -> (\d+)$", re.MULTILINE)
LEFT_OUT = ("all", "graph", "merge")  # rules that make nothing new of the run's
NEXT_ROUND = (("stage3", "embed"), ("stage3", "rois"))  # where a further round begins, through the same rules
LONG = 60  # characters of a list of settings that is shown whole
BOX, STEP = (104, 40), (124, 50)  # of the graph, drawing units: size of a rule, distance of the next


@dataclass(frozen=True)
class Cost:
    """What the jobs of a rule took: their number, seconds together and of the longest, and bytes of memory at most."""

    rule: str
    jobs: int
    seconds: float
    longest: float
    memory: float

    def cells(self) -> list[str]:
        memory = "–" if math.isnan(self.memory) else machine.size(self.memory)
        return [f"{self.jobs:,}", duration(self.seconds), duration(self.longest), memory]


@dataclass(frozen=True)
class Graph:
    """Rules as boxes, left to right in the order of their work: x, y of each and what it took; curves between them."""

    width: int
    height: int
    boxes: list[tuple[float, float, str, str]]
    curves: list[str]  # SVG paths
    alt: str


def settings(path: Path) -> list[tuple[str, str, str]]:
    """The settings of a config.json that are not the defaults, as JSON: key, value, default. Raises InputError."""
    try:
        given = config.parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # an InputError is one
        raise InputError(f"{path}: is no config of a run ({error}); start the run again.") from None
    return differing(given)


def differing(given: config.Config) -> list[tuple[str, str, str]]:
    """The settings, but for the name, that are not the defaults, as JSON: key, value, default."""
    ours, theirs = (config.flat(one.model_dump(mode="json")) for one in (given, config.parse({})))
    return [
        (key, _text(value), _text(theirs[key]) if key in theirs else "–")
        for key, value in ours.items()
        if key != "name" and (key not in theirs or theirs[key] != value)
    ]


def _text(value: Any) -> str:
    """A setting as JSON, of a long list its ends."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and len(text) > LONG:
        return f"[{json.dumps(value[0])}, …, {json.dumps(value[-1])}], {len(value)} in all"
    return text


def costs(folder: Path) -> list[Cost]:
    """What the jobs took whose benchmarks Snakemake wrote into a folder, by rule, in the order in which they ended.

    A job that was made to go on tells of its last part alone; one that a shared cache saved has none.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(folder.rglob("*.tsv"), key=lambda path: (path.stat().st_mtime, path)):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                values = _value(row.get("s")), 2**20 * _value(row.get("max_rss"))
                if not math.isnan(values[0]):
                    found.setdefault(_rule(path.relative_to(folder)), []).append(values)
    return [
        Cost(rule, len(jobs), sum(seconds), max(seconds), max((one for one in memory if one > 0), default=math.nan))
        for rule, jobs in found.items()
        for seconds, memory in [tuple(zip(*jobs, strict=True))]
    ]


def _value(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:  # Snakemake's NA, of what it could not measure
        return math.nan


def _rule(path: PurePath) -> str:
    """The rule that writes a benchmark, by the file's name: without the names of models, variants, sets and shards."""
    parts = path.with_suffix("").parts
    if parts[0] != "downstream":
        return re.sub(r"(-\w+)?(\.seed\d+)?$", "", parts[0]).replace("orl", "stage3")
    if parts[1].startswith("subset"):
        return "subset"
    name, _, rest = parts[2].partition(".")
    if rest == "features":
        return "set_features"
    if name == "semi" and len(parts) > 3:
        return "semi_run" if "-run" in parts[3] else "semi_grid"
    return name


def described() -> list[str]:
    """The machine that this runs on, in a few lines."""
    lines = [f"{platform.system()} {platform.machine()}, {_processor()}".rstrip(", ")]
    lines.append(f"{machine.cores():g} CPU cores, {machine.size(machine.memory()[0])} of memory")
    lines += _gpus()
    versions = f"Python {platform.python_version()}, PyTorch {importlib.metadata.version('torch')}, orl {__version__}"
    return [*lines, versions]


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return platform.processor()
    return found[1] if found else platform.processor()


def _gpus() -> list[str]:
    """A line for each kind of GPU, as the driver names it: CUDA need not be started for it."""
    if not shutil.which("nvidia-smi"):
        return ["no GPU"]
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    names = done.stdout.splitlines() if done.returncode == 0 else []
    return [machine.counted(names.count(name), name) for name in dict.fromkeys(names)] or ["no GPU"]


def graph(path: Path, took: list[Cost]) -> Graph:
    """The drawing of the rules of the jobs that `snakemake --dag dot` wrote. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it again.") from None
    # A rule is one box, and the merges of embeddings, proposals and pairs are three: else all would hang on all.
    names = {number: (rule, merged) for number, rule, merged in NODE.findall(text)}
    rules = nx.DiGraph((names[a], names[b]) for a, b in EDGE.findall(text) if a in names and b in names)
    for one in [one for one in rules if one[0] in LEFT_OUT]:
        rules.add_edges_from(itertools.product(list(rules.pred[one]), list(rules.succ[one])))
        rules.remove_node(one)
    rules = nx.relabel_nodes(rules, {one: one[0] for one in rules})
    rules.remove_edges_from(NEXT_ROUND)
    if not rules or not nx.is_directed_acyclic_graph(rules):
        raise InputError(f"{path}: is no graph of rules; make it again.")
    rules = nx.transitive_reduction(rules)
    place = _places(rules)
    by_rule = {one.rule: one for one in took}
    boxes = [
        (x, y, rule, " · ".join((machine.counted(one.jobs, "job"), duration(one.seconds))) if one else "")
        for rule, (x, y) in place.items()
        for one in [by_rule.get(rule)]
    ]
    curves = []
    for a, b in rules.edges:
        (x1, y1), (x2, y2) = place[a], place[b]
        x1, y1, y2 = x1 + BOX[0], y1 + BOX[1] / 2, y2 + BOX[1] / 2
        middle = (x1 + x2) / 2
        curves.append(f"M{x1:g},{y1:g} C{middle:g},{y1:g} {middle:g},{y2:g} {x2:g},{y2:g}")
    width, height = (round(max(at[axis] for at in place.values()) + BOX[axis]) for axis in (0, 1))
    needs = {rule: ", ".join(sorted(rules.predecessors(rule))) for rule in place}
    said = "; ".join(f"{rule} needs {others}" for rule, others in needs.items() if others)
    return Graph(width, height, boxes, curves, f"The rules of the run: {said}")


def _places(rules: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Where each rule is drawn: in columns, as far left as what it needs allows, near what it is joined with."""
    columns = [sorted(column) for column in nx.topological_generations(rules)]
    row = {rule: float(number) for column in columns for number, rule in enumerate(column)}
    for sweep in range(8):  # to and fro, each column by the middle of its neighbours in the one before
        near = rules.pred if sweep % 2 == 0 else rules.succ
        for column in columns if sweep % 2 == 0 else reversed(columns):
            middle = {
                rule: sum(row[one] for one in near[rule]) / len(near[rule]) if near[rule] else row[rule]
                for rule in column
            }
            column.sort(key=lambda rule: (middle[rule], rule))
            row.update({rule: float(number) for number, rule in enumerate(column)})
    tallest = max(map(len, columns))
    return {
        rule: (number * STEP[0], (row[rule] + (tallest - len(column)) / 2) * STEP[1])
        for number, column in enumerate(columns)
        for rule in column
    }
