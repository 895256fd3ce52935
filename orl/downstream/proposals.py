"""Recall of annotated objects by the kept proposals: how many of them have a box, by the number of boxes kept."""

import json
import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data import coco, voc
from orl.data.views import iou
from orl.progress import track

TASK = "proposals"
IOUS = (0.5, 0.7)
NEVER = np.iinfo(np.int64).max


def ranks(objects: np.ndarray, kept: np.ndarray, thresholds: Sequence[float] = IOUS) -> np.ndarray:
    """How many of the `kept` boxes [k, 4], in their order, it takes to find each of `objects` [m, 4]: int64 [m, t].

    An object is found by the first box whose IoU with it is at least the threshold; one box may find several objects
    (COCO's evaluation lets it find one). NEVER where no box does. Boxes are x y w h.
    """
    found = np.full((len(objects), len(thresholds)), NEVER)
    if len(kept):
        for row, box in enumerate(objects):
            hits = iou(box, kept)[:, None] >= thresholds
            found[row] = np.where(hits.any(0), hits.argmax(0) + 1, NEVER)
    return found


def steps(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 and so on below `most`, then `most`."""
    series = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [number for number in series if number < most] + [most]


def evaluate(
    config: Config,
    model: str,
    manifest_path: str | os.PathLike,
    proposals_path: str | os.PathLike,
    annotations: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    plot: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Measure how many annotated objects the proposals find; write and return the result.

    `model` is the name the result goes by; `annotations`: COCO JSONs, or folders of VOC XML files, whose photos are
    those of the manifest with the same file name (without folders and extension). Crowds and boxes without area are
    left out, and photos on which no object then remains, or whose annotated size is another than the manifest's.
    Metrics, by the first `kept` boxes of each photo, the last number being all: `recall` (0 to 1) of `all` objects
    and of the `large` ones, both sides of which are at least proposals.min_size (null where there is none), at IoU 0.5
    and 0.7; `boxes_per_photo`: their mean. `plot`: PNG to draw as well.
    Raises InputError, having written nothing, where files do not belong together or no object is left.
    """
    manifest, proposals = artifacts.read_boxes(manifest_path, proposals_path)
    offsets = np.asarray(proposals.box_offsets)
    row, box, _, left_out = objects_of(manifest, annotations)
    photos, starts = np.unique(row, return_index=True)
    groups = zip(photos, np.split(box, starts[1:]), strict=True)
    found = np.concatenate(
        [
            ranks(objects, np.asarray(proposals.box[offsets[photo] : offsets[photo + 1]]))
            for photo, objects in track(groups, len(photos), "photos")
        ]
    )
    counts = np.diff(offsets)[photos]
    kept = steps(int(counts.max()))
    large = (box[:, 2:] >= config.proposals.min_size).all(1)
    recall = {
        name: {
            str(threshold): [float((column <= number).mean()) if len(column) else None for number in kept]
            for threshold, column in zip(IOUS, found[chosen].T, strict=True)
        }
        for name, chosen in (("all", np.full(len(box), True)), ("large", large))
    }
    made_with = json.loads(artifacts.attributes(proposals_path).get("settings", "{}"))
    result = {
        "task": TASK,
        "model": model,
        "metrics": {"kept": kept, "recall": recall, "boxes_per_photo": float(counts.mean())},
        "settings": {**used(config, "proposals_recall"), "made_with": made_with},
        "data": {
            "annotations": [os.fspath(path) for path in annotations],
            "annotations_fingerprints": [artifacts.fingerprint(path) for path in annotations],
            "proposals_fingerprint": artifacts.fingerprint(proposals_path),
            "photos": len(photos),
            "photos_left_out": len(manifest) - len(photos),
            "objects": len(box),
            "large_objects": int(large.sum()),
            **left_out,
        },
    }
    if plot is not None:
        _draw(result, plot)
    artifacts.write_json(output, result)
    return result


def objects_of(
    manifest: artifacts.Manifest, annotations: Sequence[str | os.PathLike]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """The annotated objects on the photos of a manifest, as `evaluate` says.

    Of several folders of VOC files, all must have the same classes, which are numbered by name.
    Returns manifest rows int64 [m], ascending, boxes float64 [m, 4] and categories int64 [m] (-1: none is given), and
    what was left out, counted. Raises InputError.
    """
    stems = [PurePosixPath(path).stem for path in manifest.path.tolist()]
    row_of = {stem: row for row, stem in enumerate(stems)}
    listed: dict[int, str | os.PathLike] = {}
    classes: tuple[str, ...] | None = None
    rows, boxes, crowds, categories = [], [], [], []
    other_size = 0
    for path in annotations:
        objects = voc.read_objects(path) if os.path.isdir(path) else coco.read_objects(path)
        if classes not in (None, objects.classes):
            raise InputError(f"{path}: its classes are not those of {annotations[0]}; put all files in one folder.")
        classes = objects.classes
        row = np.array([row_of.get(PurePosixPath(name).stem, -1) for name in objects.name], np.int64)
        for one in row[row >= 0].tolist():
            if one in listed:
                raise InputError(f"{path}: lists photo {stems[one]!r}, as does {listed[one]}; list every photo once.")
            listed[one] = path
        same = (objects.size == np.stack([manifest.width[row], manifest.height[row]], 1)).all(1)
        same |= (objects.size == 0).any(1)
        other_size += int((~same & (row >= 0)).sum())
        row[~same] = -1
        own = row[objects.photo]
        rows.append(own[own >= 0])
        boxes.append(objects.box[own >= 0])
        crowds.append(objects.crowd[own >= 0])
        categories.append(objects.category[own >= 0])
    row, box, crowd, category = map(np.concatenate, (rows, boxes, crowds, categories))
    flat = ~crowd & ~(np.isfinite(box).all(1) & (box[:, 2:] > 0).all(1))
    good = ~crowd & ~flat
    if not good.any():
        why = f"; {other_size} photos have another size there" if other_size else ""
        raise InputError(f"{annotations[0]}: has no box on a photo of the manifest{why}; name the photos' annotations.")
    twice = next((stem for row, stem in enumerate(stems) if row_of[stem] != row and row_of[stem] in listed), None)
    if twice is not None:
        raise InputError(f"{annotations[0]}: several photos of the manifest are named {twice!r}; rename them.")
    order = np.argsort(row[good], kind="stable")
    left_out = {
        "crowds": int(crowd.sum()),
        "without_area": int(flat.sum()),
        "photos_of_other_size": other_size,
    }
    counted = {name: int(count) for name, count in left_out.items()}
    return row[good][order], box[good][order], category[good][order], counted


def _draw(result: dict[str, Any], path: str | os.PathLike) -> None:
    """The result as a chart: recall by number of boxes kept."""
    from matplotlib.figure import Figure

    kept, recall = result["metrics"]["kept"], result["metrics"]["recall"]
    side = result["settings"]["proposals"]["min_size"]
    labels = {"all": "all objects", "large": f"objects of {side} px and more"}
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, label), color in zip(labels.items(), ("#0072B2", "#D55E00"), strict=True):  # Okabe and Ito's
        for threshold, line in zip(map(str, IOUS), ("-", "--"), strict=True):
            values = [np.nan if value is None else value for value in recall[name][threshold]]
            axes.plot(kept, values, line, color=color, marker="o", markersize=4, label=f"{label}, IoU {threshold}")
    axes.set_xscale("log")
    axes.set_xticks(kept, list(map(str, kept)))
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set(xlabel="boxes kept per photo, at most", ylabel="recall")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(loc="upper left", frameon=False)
    with artifacts.atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
