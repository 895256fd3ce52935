"""The report: one self-contained HTML page that shows what a run did and how good its models are.

Photos are shown reduced and in bounded numbers, so that the page of any run stays below 15 MB.
"""

import base64
import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from orl import InputError, __version__, artifacts, config
from orl.data import decode
from orl.data.manifest import load
from orl.report import figures, run
from orl.report.ablations import ablations
from orl.report.figures import Chart, Drawing, Line, Picture, Style, line_chart
from orl.report.repeats import by_arm, mean
from orl.report.scores import given_once, rank, result_of, tasks

SEED = 0  # of what is sampled to be shown
QUERIES, NEIGHBORS = 8, 5  # of the gallery
RANDOM_PAIRS, EXTREME_PAIRS = 20, 10  # photo pairs that are drawn: of random queries; most and least similar
MATCHES = 3  # RoI pairs drawn on a photo pair
SIDE, SMALL_SIDE = 240, 160  # long side of a photo, pixels: drawn pairs, gallery
REJECTED = 20  # rejected files named
SAMPLE = 5_000  # photos whose pair similarities are looked at
MAPS = 8  # photos whose attention maps are shown, of each folder
SHEET_BYTES, MAP_BYTES = 2_000_000, 400_000  # of attention maps at most, all on one sheet and those of one photo
CHARTS = 12  # at most: of losses, one per model; of pairs' precision
METRICS_COLUMNS = ("epoch", "loss", "feature_std", "lr")


@dataclass(frozen=True)
class Recall:
    """How many annotated objects the proposals of a variant find, over its seeds."""

    name: str
    seeds: int
    method: str
    long_side: str
    boxes: str  # per photo
    objects: str  # their number
    large_objects: str
    cells: list[str]  # recall of all and of large objects, each at IoU 0.5 and 0.7, by all boxes kept
    kept: np.ndarray
    large: tuple[np.ndarray, np.ndarray]  # of the first seed: recall of large objects by number kept, at either IoU


@dataclass(frozen=True)
class Precision:
    """How many RoI pairs of a variant show the same class, over its seeds."""

    name: str
    seeds: int
    cells: list[str]
    chart: Chart  # of the first seed


@dataclass(frozen=True)
class Query:
    """A photo and its first neighbours, each with its similarity."""

    path: str
    picture: Picture
    neighbors: list[tuple[Picture, str]]


@dataclass(frozen=True)
class Pair:
    """A photo and a neighbour of it, with the RoI pairs drawn on them; `similarity`: of the most similar of these."""

    kind: str
    similarity: float
    caption: str
    drawing: Drawing


@dataclass(frozen=True)
class Attention:
    """What a folder of attention maps shows: of several photos together, and of each."""

    name: str
    models: str  # left to right
    sheet: Picture
    maps: list[tuple[str, Picture]]  # path of the photo
    photos: int  # in the folder


def report(
    run_name: str,
    root: str,
    manifest_path: str,
    rejected_path: str,
    metrics_paths: Sequence[str],
    scores_paths: Sequence[str],
    recalls_paths: Sequence[str],
    pairs_paths: Sequence[str],
    attention_paths: Sequence[str],
    stage2_paths: tuple[str, str, str] | None,
    exif: decode.Exif,
    output: str,
    results: str | None = None,
    graph_path: str | None = None,
    left_out: Sequence[str] = (),
) -> None:
    """Write the page of a run.

    `results`: the run's folder, of whose config.json and benchmarks the page tells; `graph_path`: its jobs, by
    `snakemake --dag dot`; `left_out`: sentences on what was not measured.
    `attention_paths`: folders made by `orl attention`. `stage2_paths`: the run's neighbors, proposals and
    correspondences; None: the page shows none of them.
    A model's curves go by the name of the folder that holds its metrics.csv. Same inputs, same bytes.
    Raises InputError, having written nothing, where a file is missing or does not belong to the others.
    """
    manifest = artifacts.read_manifest(manifest_path)
    rejected = _read_csv(rejected_path, artifacts.REJECTED_COLUMNS, "run `orl manifest` again")

    def photo(row: int) -> decode.Photo:
        return load(root, manifest, row, exif)

    took = run.costs(Path(results, "benchmarks")) if results else []
    scores = tasks({"": scores_paths})
    recalls = _recalls(recalls_paths)
    precisions = _precisions(pairs_paths)
    context = {
        "run_name": run_name,
        "tag": figures.TAG,
        "photos": len(manifest),
        "rejected": [(row["path"], row["reason"]) for row in rejected[:REJECTED]],
        "rejected_count": len(rejected),
        "settings": run.settings(Path(results, "config.json")) if results else [],
        "costs": took,
        "machine": run.described(),
        "graph": run.graph(Path(graph_path), took) if graph_path else None,
        "rule_box": run.BOX,
        "left_out": left_out,
        "tasks": scores,
        "ablations": ablations(config.read(f"{results}/config.json"), scores_paths, pairs_paths) if results else None,
        "curves": _curves(metrics_paths),
        "attention": [_attention(path) for path in attention_paths],
        "recalls": recalls,
        "recall_chart": _recall_chart(recalls),
        "precisions": precisions,
        "precision_charts": [one.chart for one in precisions[:CHARTS]],
        "index_recall": None,
        "queries": [],
        "pairs": [],
        "histograms": [],
        **(_discovery(*stage2_paths, manifest_path, manifest, photo) if stage2_paths else {}),
    }
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    context |= {"script": script, "script_hash": f"sha256-{digest}"}  # the browser runs this script alone
    artifacts.write_text(output, render("page.html", context))
    for task in scores:
        print("\n".join(task.lines))
    trained = {Path(path).parent.name: Path(path).parent for path in metrics_paths}
    if own := trained.get("orl") or trained.get("stage1"):
        print(f"weights: {own}/backbone.safetensors")
    print(f"page: {output}")


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page, or card, of this folder's templates; all that `context` names is escaped in HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context, version=__version__) + "\n"


def _read_csv(path: str, needed: Sequence[str], remedy: str) -> list[dict[str, str]]:
    """The rows of a CSV that has the columns `needed`. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows, columns = list(reader), reader.fieldnames or ()
        artifacts.check_last_line(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: damaged or not such a file ({error}); {remedy}.") from None
    missing = [column for column in needed if column not in columns]
    if missing:
        raise InputError(f"{path}: has no column {missing[0]!r}; {remedy}.")
    return rows


# Training


def _curves(paths: Sequence[str]) -> list[Chart]:
    """A loss chart per model, then feature spread and learning rate of all; of repeats, only the first is drawn."""
    found = sorted(((Path(path).resolve().parent.name, read_metrics(path)) for path in paths), key=lambda m: rank(m[0]))
    found = [(name, columns) for name, columns in found if len(columns["epoch"])]
    firsts = {repeats[0]: len(set(repeats)) for repeats in by_arm(name for name, _ in found).values()}
    models = [(name, columns) for name, columns in found if name in firsts]
    if not models:
        return []
    others = "Other seeds are not drawn."
    charts = []
    for name, columns in models[:CHARTS]:
        parts = [column for column in columns if column.startswith("loss_")]
        lines = [Line(part.removeprefix("loss_"), columns["epoch"], columns[part]) for part in parts]
        if len(parts) != 1:  # a single part is the whole loss
            lines.append(Line("total", columns["epoch"], columns["loss"]))
        epoch, loss = columns["epoch"], columns["loss"]
        alt = f"Loss of {name} by epoch: {loss[0]:.2f} in epoch {epoch[0]:.0f}, {loss[-1]:.2f} in epoch {epoch[-1]:.0f}"
        charts.append(line_chart(f"Loss of {name}", lines, "loss", alt, others if firsts[name] > 1 else ""))
    rest = [f"{len(models) - CHARTS} more models are not drawn."] if len(models) > CHARTS else []
    rest += [others] if max(firsts.values()) > 1 else []
    for column, title, label, note in (
        ("feature_std", "Spread of the features", "standard deviation", ["1: evenly spread; 0: collapsed."]),
        ("lr", "Learning rate", "learning rate", []),
    ):
        lines = [Line(name, columns["epoch"], columns[column]) for name, columns in models[:CHARTS]]
        last = "; ".join(f"{line.name} {line.y[-1]:.2g}" for line in lines)
        alt = f"{title} by epoch; in the last epoch: {last}"
        charts.append(line_chart(title, lines, label, alt, " ".join(note + rest)))
    folders = {Path(path).resolve().parent.name: Path(path).parent for path in paths}
    speeds = [line for name, columns in models[:CHARTS] if (line := _speed(name, folders[name], columns))]
    if speeds:
        means = "; ".join(f"{line.name} {line.y.mean():.3g}" for line in speeds)
        alt = f"Throughput in photos per second by epoch; on average: {means}"
        charts.append(line_chart("Throughput", speeds, "photos per second", alt, " ".join(rest)))
    return charts


def _speed(name: str, folder: Path, columns: dict[str, np.ndarray]) -> Line | None:
    """How many photos a model was trained on in a second, as its training's TensorBoard log tells, if it is kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = sorted(folder.glob("state/*/tensorboard/*"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return None
    events = EventAccumulator(str(logs[-1].parent), {"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.endswith("/photos_per_second")]
    if not tags:
        return None
    told = events.Scalars(tags[0])
    epochs = np.array([one.step for one in told]) * columns["epoch"][-1] / told[-1].step  # it ends with the training
    return Line(name, epochs, np.array([one.value for one in told]))


def read_metrics(path: str) -> dict[str, np.ndarray]:
    """The columns of a metrics.csv. Raises InputError."""
    rows = _read_csv(path, METRICS_COLUMNS, "train again")
    try:
        names = rows[0] if rows else METRICS_COLUMNS
        return {name: np.array([float(row[name]) for row in rows]) for name in names}
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged or not such a file ({error}); train again.") from None


def _attention(folder: str) -> Attention:
    """What the page shows of a folder made by `orl attention`. Raises InputError."""

    def png(name: str, of: str, most: int) -> Picture:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not in it")
        return figures.png(Path(folder, name).read_bytes(), f"Attention maps of {of}", most)

    try:
        listed = json.loads(Path(folder, "attention.json").read_text(encoding="utf-8"))
        models, photos = ", ".join(listed["models"]), listed["photos"]
        maps = [(str(one["path"]), png(one["file"], str(one["path"]), MAP_BYTES)) for one in photos[:MAPS]]
        sheet = png("contact_sheet.png", f"{len(photos)} photos: {models}", SHEET_BYTES)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: is no folder of `orl attention` ({error}); draw the maps again.") from None
    return Attention(Path(folder).resolve().name, models, sheet, maps, len(photos))


# Discovery


def _discovery(
    neighbors_path: str,
    proposals_path: str,
    correspondences_path: str,
    manifest_path: str,
    manifest: artifacts.Manifest,
    photo: Callable[[int], decode.Photo],
) -> dict[str, Any]:
    """What the page shows of stage 2's files. Raises InputError where they do not belong together."""
    neighbors = artifacts.read_neighbors(neighbors_path)
    _, proposals, pairs = artifacts.read_stage2(manifest_path, proposals_path, correspondences_path)
    artifacts.check_rows(neighbors_path, len(neighbors.index), len(manifest), manifest_path)
    artifacts.check_input(correspondences_path, "neighbors", artifacts.fingerprint(neighbors_path))
    rng = np.random.default_rng(SEED)
    queries = rng.choice(len(manifest), min(QUERIES, len(manifest)), replace=False)
    sampled = np.sort(rng.choice(len(manifest), min(SAMPLE, len(manifest)), replace=False))
    entries, similarity = _pair_similarities(pairs, sampled)
    index_recall = artifacts.attributes(neighbors_path).get("recall")
    return {
        "index_recall": index_recall and f"{100 * float(index_recall):.2f} %",
        "queries": _gallery(queries, neighbors, manifest, photo),
        "pairs": _pairs(rng, entries, similarity, pairs, proposals, manifest, photo),
        "histograms": _histograms(proposals, similarity, len(sampled), len(manifest)),
    }


def _gallery(
    queries: Iterable[int],
    neighbors: artifacts.Neighbors,
    manifest: artifacts.Manifest,
    photo: Callable[[int], decode.Photo],
) -> list[Query]:
    gallery = []
    for row in map(int, queries):
        near = []
        for place, other in enumerate(neighbors.index[row, :NEIGHBORS]):
            text = f"{neighbors.similarity[row, place]:.3f}"
            alt = f"Neighbour {place + 1}, similarity {text}: {manifest.path[other]}"
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


def _pairs(
    rng: np.random.Generator,
    entries: np.ndarray,
    similarity: np.ndarray,
    pairs: artifacts.Correspondences,
    proposals: artifacts.Proposals,
    manifest: artifacts.Manifest,
    photo: Callable[[int], decode.Photo],
) -> list[Pair]:
    """The photo pairs to draw, by falling similarity: random photos, and those of the most and least similar RoIs."""
    k = pairs.neighbor.shape[1]
    offsets = pairs.pair_offsets

    def draw(kind: str, slot: int, shown: range) -> Pair:
        """Photo slot // k and its neighbour slot % k, with the RoI pairs `shown`."""
        row, other = slot // k, int(pairs.neighbor[slot // k, slot % k])
        boxes = [
            (
                np.array(proposals.box[proposals.box_offsets[row] + a]),
                np.array(proposals.box[proposals.box_offsets[other] + b]),
            )
            for a, b in pairs.pair[shown.start : shown.stop].astype(np.int64)
        ]
        values = pairs.similarity[shown.start : shown.stop].astype(float)
        paths = str(manifest.path[row]), str(manifest.path[other])
        total = offsets[slot + 1] - offsets[slot]
        caption = f"{len(boxes)} of {total} RoI pairs of {paths[0]} and {paths[1]}"
        names = [f"{value:.3f}" for value in values]
        drawing = figures.pair((photo(row), photo(other)), paths, SIDE, boxes, names)
        return Pair(kind, max(values, default=-1.0), caption, drawing)

    def extremes(kind: str, order: np.ndarray) -> list[Pair]:
        """The first RoI pairs in an order of `entries`, each of other photos than those before: one may lead many."""
        found: list[Pair] = []
        seen: set[int] = set()
        for entry in map(int, entries[order]):
            slot = int(np.searchsorted(offsets, entry, "right")) - 1
            photos = {slot // k, int(pairs.neighbor[slot // k, slot % k])}
            if photos & seen:
                continue
            seen |= photos
            found.append(draw(kind, slot, range(entry, entry + 1)))
            if len(found) == EXTREME_PAIRS:
                break
        return found

    photos = rng.choice(len(manifest), min(RANDOM_PAIRS, len(manifest)), replace=False)
    slots = [int(row) * k for row in photos]  # a photo's nearest neighbour
    best = [range(int(offsets[slot]), min(int(offsets[slot + 1]), int(offsets[slot]) + MATCHES)) for slot in slots]
    found = [draw("random photos", *one) for one in zip(slots, best, strict=True)]
    found += extremes("most similar RoIs", np.argsort(-similarity, kind="stable"))
    found += extremes("least similar RoIs", np.argsort(similarity, kind="stable"))
    return sorted(found, key=lambda pair: -pair.similarity)


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


# Measurements of stage 2


def _recalls(paths: Sequence[str]) -> list[Recall]:
    """The results of `orl evaluate proposals`, by arm. Raises InputError."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        result = artifacts.read_results(path)
        model = given_once(path, result, found)
        with result_of(path, "proposals"):
            metrics, settings, data = result["metrics"], result["settings"], result["data"]
            curves = [
                np.array(metrics["recall"][name][iou], float) for name in ("all", "large") for iou in ("0.5", "0.7")
            ]
            made_with = settings["made_with"].get("proposals", {})
            found[model] = {
                "method": made_with.get("method", "fast"),
                "long_side": made_with.get("long_side") or "full size",
                "boxes": float(metrics["boxes_per_photo"]),
                "objects": f"{data['objects']:,}",
                "large_objects": f"{data['large_objects']:,} (≥ {settings['proposals']['min_size']} px)",
                "ends": [100 * line[-1] for line in curves],
                "kept": np.array(metrics["kept"]),
                "large": (curves[2], curves[3]),
            }
    recalls = []
    for arm, models in by_arm(found).items():
        repeats = [found[model] for model in models]
        first = repeats[0]
        recalls.append(
            Recall(
                arm,
                len(repeats),
                first["method"],
                str(first["long_side"]) if first["method"] in ("fast", "quality") else "–",
                mean([one["boxes"] for one in repeats]).text(1),
                first["objects"],
                first["large_objects"],
                [mean(ends).text(1) for ends in zip(*(one["ends"] for one in repeats), strict=True)],
                first["kept"],
                first["large"],
            )
        )
    return recalls


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
    note += " Other seeds are not drawn." if any(one.seeds > 1 for one in found) else ""
    picture = figures.recalls([(one.kept, *one.large) for one in drawn], alt)
    return [Chart("Recall of large objects", picture, legend, note)]


def _precisions(paths: Sequence[str]) -> list[Precision]:
    """The results of `orl evaluate pairs`, by arm. Raises InputError."""
    found: dict[str, tuple[list[float], list[Line]]] = {}
    for path in paths:
        result = artifacts.read_results(path)
        model = given_once(path, result, found)
        with result_of(path, "pairs"):
            metrics = result["metrics"]
            right, same, other, *on_objects = (
                100 * float(metrics[key])
                for key in ("precision", "random_rois", "random_photos", "on_object", "pairs_on_objects")
            )
            times = right / other if other else math.nan
            neighbors = np.array(metrics["neighbors"], int)
            names = [f"{100 * share:g} %" for share in metrics["shares"]] + ["random boxes"]
            by_neighbors = [*metrics["by_neighbors"], metrics["random_rois_by_neighbors"]]
            curves = [100 * np.array(curve, float) for curve in by_neighbors]
            if not len(neighbors) or any(curve.shape != neighbors.shape for curve in curves):
                raise ValueError("neighbors and precisions differ in number")
            lines = [Line(name, neighbors, curve) for name, curve in zip(names, curves, strict=True)]
            found[model] = [float(metrics["pairs"]), right, same, other, times, *on_objects], lines
    precisions = []
    for arm, models in by_arm(found).items():
        means = [mean(values) for values in zip(*(found[model][0] for model in models), strict=True)]
        cells = [
            f"{means[0].value:,.0f}",
            *(one.text(digits) for one, digits in zip(means[1:], (2, 2, 2, 2, 1, 2), strict=True)),
        ]
        lines = found[models[0]][1]
        ends = "; ".join(f"{line.name} {line.y[-1]:.2f}" for line in lines)
        alt = f"Precision of {arm} in percent, by number of neighbours; of all neighbours: {ends}"
        note = "A line for each share: of two photos, the most similar pairs, as many as this share of the boxes."
        note += " Other seeds are not drawn." if len(models) > 1 else ""
        chart = line_chart(f"Precision of {arm}", lines, "precision, percent", alt, note, "neighbours")
        precisions.append(Precision(arm, len(models), cells, chart))
    return precisions
