"""The report: one self-contained HTML page that shows what a run did and how good its models are.

Photos are shown reduced and in bounded numbers, so that the page of any run stays below 5 MB.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from orl import InputError, __version__, artifacts
from orl.data import decode
from orl.data.manifest import load
from orl.report import figures
from orl.report.figures import Drawing, Line, Picture, Style

SEED = 0  # of what is sampled to be shown
QUERIES, NEIGHBORS = 8, 5  # of the gallery
RANDOM_PAIRS, EXTREME_PAIRS = 6, 3  # photo pairs that are drawn: of random queries; most and least similar
MATCHES = 3  # RoI pairs drawn on a photo pair
SIDE, SMALL_SIDE = 240, 160  # long side of a photo, pixels: drawn pairs, gallery
REJECTED = 20  # rejected files named
SAMPLE = 5_000  # photos whose pair similarities are looked at
CHARTS = 12  # loss charts, one per model
ORDER = ("random", "stage1", "orl")  # models that come first
TITLES = {"voc07_svm": "VOC07 linear SVM"}
METRICS_COLUMNS = ("epoch", "loss", "feature_std", "lr")


@dataclass(frozen=True)
class Cell:
    """A number of a table as text, and whether it is the best of its kind."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Task:
    """The scores of all models in one downstream task."""

    title: str
    base: str  # the stage-1 model that others are compared with; empty: there is none
    rows: list[tuple[str, Cell, str, str]]  # model, mAP, change against base, chance
    models: list[str]
    classes: list[tuple[str, list[Cell]]]  # AP of every class, by model
    left_out: list[tuple[str, str]]  # class, reason
    notes: list[str]


@dataclass(frozen=True)
class Recall:
    """How many annotated objects the proposals of a variant find."""

    name: str
    method: str
    long_side: str
    boxes: str  # per photo
    objects: str  # their number
    large_objects: str
    cells: list[str]  # recall of all and of large objects, each at IoU 0.5 and 0.7, by all boxes kept
    kept: np.ndarray
    large: tuple[np.ndarray, np.ndarray]  # recall of large objects by number kept, at IoU 0.5 and 0.7


@dataclass(frozen=True)
class Chart:
    """A figure with its heading and legend."""

    title: str
    picture: Picture
    legend: list[Style]
    note: str = ""


@dataclass(frozen=True)
class Query:
    """A photo and its first neighbours, each with its similarity."""

    path: str
    picture: Picture
    neighbors: list[tuple[Picture, str]]


@dataclass(frozen=True)
class Pair:
    """A photo and a neighbour of it, with the RoI pairs drawn on them."""

    caption: str
    drawing: Drawing


def report(
    run_name: str,
    root: str,
    manifest_path: str,
    rejected_path: str,
    metrics_paths: Sequence[str],
    scores_paths: Sequence[str],
    recalls_paths: Sequence[str],
    neighbors_path: str,
    proposals_path: str,
    correspondences_path: str,
    exif: decode.Exif,
    output: str,
) -> None:
    """Write the page of a run.

    A model's curves go by the name of the folder that holds its metrics.csv. Same inputs, same bytes.
    Raises InputError, having written nothing, where a file is missing or does not belong to the others.
    """
    manifest = artifacts.read_manifest(manifest_path)
    rejected = _read_csv(rejected_path, artifacts.REJECTED_COLUMNS, "run `orl manifest` again")
    neighbors = artifacts.read_neighbors(neighbors_path)
    proposals = artifacts.read_proposals(proposals_path)
    pairs = artifacts.read_correspondences(correspondences_path)
    for path, found in (
        (neighbors_path, len(neighbors.index)),
        (proposals_path, len(proposals.box_offsets) - 1),
        (correspondences_path, len(pairs.neighbor)),
    ):
        artifacts.check_rows(path, found, len(manifest), manifest_path)
    artifacts.check_input(correspondences_path, "neighbors", artifacts.fingerprint(neighbors_path))
    artifacts.check_input(correspondences_path, "proposals", artifacts.fingerprint(proposals_path))

    def photo(row: int) -> decode.Photo:
        return load(root, manifest, row, exif)

    rng = np.random.default_rng(SEED)
    queries = rng.choice(len(manifest), min(QUERIES, len(manifest)), replace=False)
    sampled = np.sort(rng.choice(len(manifest), min(SAMPLE, len(manifest)), replace=False))
    entries, similarity = _pair_similarities(pairs, sampled)
    index_recall = artifacts.attributes(neighbors_path).get("recall")
    tasks = _tasks(scores_paths)
    recalls = _recalls(recalls_paths)
    context = {
        "run_name": run_name,
        "version": __version__,
        "tag": figures.TAG,
        "photos": len(manifest),
        "rejected": [(row["path"], row["reason"]) for row in rejected[:REJECTED]],
        "rejected_count": len(rejected),
        "tasks": tasks,
        "curves": _curves(metrics_paths),
        "index_recall": index_recall and f"{100 * float(index_recall):.2f} %",
        "queries": _gallery(queries, neighbors, manifest, photo),
        "pair_groups": _pair_groups(queries, entries, similarity, pairs, proposals, manifest, photo),
        "recalls": recalls,
        "recall_chart": _recall_chart(recalls),
        "histograms": _histograms(proposals, similarity, len(sampled), len(manifest)),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    artifacts.write_text(output, environment.from_string(template).render(context) + "\n")
    for task in tasks:
        for model, score, change, chance in task.rows:
            compared = f"{change} against {task.base}, " if change else ""
            print(f"{task.title}: {model}: mAP {score.text} ({compared}chance {chance})")
    print(f"page: {output}")


def _read_csv(path: str, needed: Sequence[str], remedy: str) -> list[dict[str, str]]:
    """The rows of a CSV that has the columns `needed`. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows, columns = list(reader), reader.fieldnames or ()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: damaged or not such a file ({error}); {remedy}.") from None
    missing = [column for column in needed if column not in columns]
    if missing:
        raise InputError(f"{path}: has no column {missing[0]!r}; {remedy}.")
    return rows


def _rank(model: str) -> tuple[int, str]:
    return (ORDER.index(model) if model in ORDER else len(ORDER), model)


# Scores


def _tasks(paths: Sequence[str]) -> list[Task]:
    found: dict[str, dict[str, dict]] = {}  # task -> model -> result
    for path in paths:
        result = artifacts.read_results(path)
        model, models = str(result["model"]), found.setdefault(str(result["task"]), {})
        if not isinstance(result["metrics"], dict) or not isinstance(result["metrics"].get("mAP"), (int, float)):
            raise InputError(f"{path}: holds no mAP; evaluate again.")
        if model in models:
            raise InputError(f"{path}: model {model!r} of {result['task']} is given twice; name one file of each.")
        models[model] = result
    return [_task(name, models) for name, models in sorted(found.items())]


def _task(name: str, results: dict[str, dict]) -> Task:
    models = sorted(results, key=_rank)
    metrics = [results[model]["metrics"] for model in models]
    base = next((model for model in models if model.split("-")[0] == "stage1"), "")
    rows = []
    for model, one, cell in zip(models, metrics, _cells([one["mAP"] for one in metrics]), strict=True):
        # \N{MINUS SIGN} is as wide as the plus sign
        change = ""
        if base and model != base:
            change = f"{one['mAP'] - results[base]['metrics']['mAP']:+.2f}".replace("-", "\N{MINUS SIGN}")
        chance = one.get("chance_mAP")
        rows.append((model, cell, change, "" if chance is None else f"{chance:.2f}"))
    classes = list(dict.fromkeys(label for one in metrics for label in one.get("AP", {})))
    left_out: dict[str, str] = {}
    for one in metrics:
        left_out.update(one.get("classes_left_out", {}))
    return Task(
        TITLES.get(name, name),
        base,
        rows,
        models,
        [(label, _cells([one.get("AP", {}).get(label) for one in metrics])) for label in classes],
        sorted(left_out.items()),
        _notes(models, results),
    )


def _cells(values: Sequence[float | None]) -> list[Cell]:
    """Scores as text; the best, as far as the text tells, are marked where there is something to compare."""
    given = [round(value, 2) for value in values if value is not None]
    best = max(given) if len(given) > 1 else None
    return [Cell("–") if v is None else Cell(f"{v:.2f}", round(v, 2) == best) for v in values]


def _notes(models: list[str], results: dict[str, dict]) -> list[str]:
    """What the scores were measured on, and which fits did not converge."""
    on: dict[str, list[str]] = {}
    for model in models:
        data = results[model]["data"]
        if isinstance(data, dict) and {"root", "train", "test", "train_split", "test_split"} <= set(data):
            text = "{train} photos of {train_split} to train, {test} of {test_split} to test, in {root}".format(**data)
            on.setdefault(text, []).append(model)
    notes = [f"{text}." for text in on] if len(on) == 1 else [f"{', '.join(who)}: {text}." for text, who in on.items()]
    if len(on) > 1:
        notes.append("The models were measured on different data: their scores cannot be compared.")
    for model in models:
        fits, failed = (results[model]["metrics"].get(key, 0) for key in ("fits", "not_converged"))
        if failed:
            notes.append(f"{model}: {failed:,} of {fits:,} SVM fits stopped before they converged.")
    return notes


# Training


def _curves(paths: Sequence[str]) -> list[Chart]:
    """A loss chart per model, then feature spread and learning rate of all."""
    models = sorted(((Path(path).resolve().parent.name, _metrics(path)) for path in paths), key=lambda m: _rank(m[0]))
    models = [(name, columns) for name, columns in models if len(columns["epoch"])]
    if not models:
        return []
    charts = []
    for name, columns in models[:CHARTS]:
        parts = [column for column in columns if column.startswith("loss_")]
        lines = [Line(part.removeprefix("loss_"), columns["epoch"], columns[part]) for part in parts]
        if len(parts) != 1:  # a single part is the whole loss
            lines.append(Line("total", columns["epoch"], columns["loss"]))
        epoch, loss = columns["epoch"], columns["loss"]
        alt = f"Loss of {name} by epoch: {loss[0]:.2f} in epoch {epoch[0]:.0f}, {loss[-1]:.2f} in epoch {epoch[-1]:.0f}"
        charts.append(_line_chart(f"Loss of {name}", lines, "loss", alt))
    more = len(models) - CHARTS
    rest = f"{more} more models are not drawn." if more > 0 else ""
    for column, title, label, note in (
        ("feature_std", "Spread of the features", "standard deviation", "1: evenly spread; 0: collapsed. "),
        ("lr", "Learning rate", "learning rate", ""),
    ):
        lines = [Line(name, columns["epoch"], columns[column]) for name, columns in models[:CHARTS]]
        last = "; ".join(f"{line.name} {line.y[-1]:.2g}" for line in lines)
        charts.append(_line_chart(title, lines, label, f"{title} by epoch; in the last epoch: {last}", note + rest))
    return charts


def _line_chart(title: str, lines: list[Line], ylabel: str, alt: str, note: str = "") -> Chart:
    return Chart(title, figures.lines(lines, ylabel, alt), figures.styles([line.name for line in lines]), note)


def _metrics(path: str) -> dict[str, np.ndarray]:
    """The columns of a metrics.csv. Raises InputError."""
    rows = _read_csv(path, METRICS_COLUMNS, "train again")
    try:
        names = rows[0] if rows else METRICS_COLUMNS
        return {name: np.array([float(row[name]) for row in rows]) for name in names}
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged or not such a file ({error}); train again.") from None


# Discovery


def _gallery(
    queries: Iterable[int],
    neighbors: artifacts.Neighbors,
    manifest: artifacts.Manifest,
    photo: Callable[[int], decode.Photo],
) -> list[Query]:
    gallery = []
    for row in map(int, queries):
        near = []
        for rank, other in enumerate(neighbors.index[row, :NEIGHBORS]):
            text = f"{neighbors.similarity[row, rank]:.3f}"
            alt = f"Neighbour {rank + 1}, similarity {text}: {manifest.path[other]}"
            near.append((figures.photo(photo(int(other)), SMALL_SIDE, alt), text))
        path = str(manifest.path[row])
        gallery.append(Query(path, figures.photo(photo(row), SMALL_SIDE, f"Query: {path}"), near))
    return gallery


def _pair_similarities(pairs: artifacts.Correspondences, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the RoI pairs of some photos, and their similarities; nothing else is read from the file."""
    k = pairs.neighbor.shape[1]
    starts, ends = pairs.pair_offsets[rows * k], pairs.pair_offsets[(rows + 1) * k]
    entries = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    return entries, np.asarray(pairs.similarity[entries], np.float32)


def _pair_groups(
    queries: np.ndarray,
    entries: np.ndarray,
    similarity: np.ndarray,
    pairs: artifacts.Correspondences,
    proposals: artifacts.Proposals,
    manifest: artifacts.Manifest,
    photo: Callable[[int], decode.Photo],
) -> list[tuple[str, list[Pair]]]:
    """The photo pairs to draw, under their headings."""
    k = pairs.neighbor.shape[1]
    offsets = pairs.pair_offsets

    def draw(slot: int, shown: range) -> Pair:
        """Photo slot // k and its neighbour slot % k, with the RoI pairs `shown`."""
        row, other = slot // k, int(pairs.neighbor[slot // k, slot % k])
        boxes = [
            (
                np.array(proposals.box[proposals.box_offsets[row] + a]),
                np.array(proposals.box[proposals.box_offsets[other] + b]),
            )
            for a, b in pairs.pair[shown.start : shown.stop].astype(np.int64)
        ]
        names = [f"{value:.3f}" for value in pairs.similarity[shown.start : shown.stop]]
        paths = str(manifest.path[row]), str(manifest.path[other])
        total = offsets[slot + 1] - offsets[slot]
        caption = f"{len(boxes)} of {total} RoI pairs of {paths[0]} and {paths[1]}"
        return Pair(caption, figures.pair((photo(row), photo(other)), paths, SIDE, boxes, names))

    def extremes(order: np.ndarray) -> list[Pair]:
        """The first RoI pairs in an order of `entries`, each of other photos than those before."""
        found: list[Pair] = []
        seen = set()
        for entry in map(int, entries[order]):
            slot = int(np.searchsorted(offsets, entry, "right")) - 1
            photos = frozenset((slot // k, int(pairs.neighbor[slot // k, slot % k])))
            if photos in seen:
                continue
            seen.add(photos)
            found.append(draw(slot, range(entry, entry + 1)))
            if len(found) == EXTREME_PAIRS:
                break
        return found

    firsts = [int(row) * k for row in queries[:RANDOM_PAIRS]]
    best = [range(int(offsets[slot]), min(int(offsets[slot + 1]), int(offsets[slot]) + MATCHES)) for slot in firsts]
    return [
        ("Random photos and their nearest neighbour", [draw(*one) for one in zip(firsts, best, strict=True)]),
        ("Most similar RoI pairs", extremes(np.argsort(-similarity, kind="stable"))),
        ("Least similar RoI pairs that were kept", extremes(np.argsort(similarity, kind="stable"))),
    ]


def _recalls(paths: Sequence[str]) -> list[Recall]:
    """The results of `orl evaluate proposals`. Raises InputError."""
    found = []
    for path in paths:
        result = artifacts.read_results(path)
        try:
            metrics, settings, data = result["metrics"], result["settings"], result["data"]
            curves = {
                name: [np.array(metrics["recall"][name][iou], float) for iou in ("0.5", "0.7")]
                for name in ("all", "large")
            }
            made_with = settings["made_with"].get("proposals", {})
            method = made_with.get("method", "fast")
            searched = method in ("fast", "quality")
            long_side = made_with.get("long_side") or "full size"
            ends = [line[-1] for lines in curves.values() for line in lines]
            found.append(
                Recall(
                    str(result["model"]),
                    method,
                    str(long_side) if searched else "–",
                    f"{metrics['boxes_per_photo']:.1f}",
                    f"{data['objects']:,}",
                    f"{data['large_objects']:,} (≥ {settings['proposals']['min_size']} px)",
                    ["–" if np.isnan(end) else f"{100 * end:.1f}" for end in ends],
                    np.array(metrics["kept"]),
                    (curves["large"][0], curves["large"][1]),
                )
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: is no result of `orl evaluate proposals` ({error}); evaluate again.") from None
    return found


def _recall_chart(found: list[Recall]) -> list[Chart]:
    """Recall of large objects by number of boxes kept, of as many variants as there are colours."""
    drawn = found[: len(figures.COLORS)]
    if not drawn:
        return []
    legend = [Style(one.name, color) for one, color in zip(drawn, figures.COLORS, strict=False)]
    ends = "; ".join(f"{one.name} {one.cells[2]} and {one.cells[3]} %" for one in drawn)
    alt = f"Recall of large objects by number of boxes kept; of all boxes, at IoU 0.5 and 0.7: {ends}"
    more = len(found) - len(drawn)
    note = "Solid: IoU 0.5, dashed: IoU 0.7." + (f" {more} more variants are not drawn." if more > 0 else "")
    picture = figures.recalls([(one.kept, *one.large) for one in drawn], alt)
    return [Chart("Recall of large objects", picture, legend, note)]


def _histograms(proposals: artifacts.Proposals, similarity: np.ndarray, sampled: int, photos: int) -> list[Chart]:
    boxes = np.diff(np.asarray(proposals.box_offsets))
    note = f"{len(boxes):,} photos: {boxes.mean():.1f} boxes on average, {boxes.min()} to {boxes.max()}."
    picture = figures.histogram(boxes, "boxes per photo", "photos", f"Histogram of boxes per photo. {note}")
    charts = [Chart("Boxes per photo", picture, [], note)]
    if len(similarity):
        part = f" (sample of {sampled:,} photos)" if sampled < photos else ""
        low, middle, high = np.percentile(similarity, [0, 50, 100])
        note = f"{len(similarity):,} RoI pairs{part}: median {middle:.3f}, {low:.3f} to {high:.3f}."
        picture = figures.histogram(similarity, "cosine similarity", "RoI pairs", f"Histogram of similarities. {note}")
        charts.append(Chart("Similarity of RoI pairs", picture, [], note))
    return charts
