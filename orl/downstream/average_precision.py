"""Average precision of detected boxes and masks, by COCO's own evaluation."""

import contextlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from orl import InputError
from orl.data import instances

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first of COCOeval's twelve


def evaluate(annotations: str | os.PathLike, predictions: str | os.PathLike | list, faster: bool = False) -> dict:
    """Box and mask AP of detections, percent; None where there is no object of that size or category.

    `predictions`: COCO's results format, as a file or its content: image_id, category_id, bbox, score, segmentation.
    As `loadRes` has it where boxes are given, a detection's size is that of its box, for APs to APl of masks, too.
    `faster`: by faster-coco-eval. Annotations are numbered anew: pycocotools takes an id of 0 for no match, and of
    equal ids only the last; those without a mask are left out.

    Returns `box` and `mask`, each with STATS; `categories`, by id, each with `name`, `id`, `objects` (crowds are none),
    `box_AP`, `mask_AP`; `detections`, how many. Raises InputError.
    """
    coco, evaluation = _tools(faster)
    content = instances.read_json(annotations)
    truth = content["annotations"]
    _check(str(annotations), "annotations", truth, content, False)
    named = "predictions" if isinstance(predictions, list) else str(predictions)
    found = [dict(one) for one in predictions] if isinstance(predictions, list) else _read(predictions)
    _check(named, "detections", found, content, True)

    for one in truth:
        one["segmentation"] = json.loads(instances.outline(one.get("segmentation")) or b"null")
        one["iscrowd"] = int(bool(one.get("iscrowd")))
    for one in found:
        one.update(area=one["bbox"][2] * one["bbox"][3], iscrowd=0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools is talkative
        sides = [
            _indexed(coco, content, [one for one in truth if one["segmentation"] and np.isfinite(one["bbox"]).all()]),
            _indexed(coco, content, found),
        ]
        for one in sides[0].anns.values():
            if not isinstance(one.get("area"), int | float):
                one["area"] = float(sides[0].annToMask(one).sum())
        box, mask = (_average(evaluation(*sides, kind)) for kind in ("bbox", "segm"))
    categories = sorted(content["categories"], key=lambda one: one["id"])
    objects = Counter(one["category_id"] for one in sides[0].anns.values() if not one["iscrowd"])
    return {
        "box": box[0],
        "mask": mask[0],
        "categories": [
            {"name": one["name"], "id": one["id"], "objects": objects[one["id"]], "box_AP": a, "mask_AP": b}
            for one, a, b in zip(categories, box[1], mask[1], strict=True)
        ],
        "detections": len(found),
    }


def _tools(faster: bool) -> tuple[Any, Any]:
    """The classes COCO and COCOeval."""
    if not faster:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise InputError(
            "compute.faster_coco_eval is true, but faster-coco-eval is not installed; pip install faster-coco-eval or "
            "set it to false."
        ) from None
    return COCO, COCOeval_faster


def _read(path: str | os.PathLike) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it with `orl evaluate detection`.") from None
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}); make it again.") from None


def _check(path: str, what: str, found: Any, content: dict[str, Any], detected: bool) -> None:
    """Raise InputError unless all annotations or detections are whole, and of photos and categories of `content`."""
    if not isinstance(found, list):
        raise InputError(f"{path}: must be a list of {what}; make it again.")
    size = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for number, one in enumerate(found):
        this = f"{path}: {what}[{number}]"
        box = one.get("bbox") if isinstance(one, dict) else None
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            raise InputError(f"{this} needs image_id, category_id and bbox; correct the file.")
        for key, listed in (("image_id", size), ("category_id", categories)):
            if not isinstance(one.get(key), int) or one[key] not in listed:
                raise InputError(f"{this} has {key} {one.get(key)}, which the annotations do not list; correct it.")
        outline = one.get("segmentation")
        if isinstance(outline, dict) and outline.get("size") != size[one["image_id"]]:
            raise InputError(f"{this} has a mask of another size than its photo; correct it.")
        if detected and not (
            isinstance(outline, dict)
            and isinstance(one.get("score"), int | float)
            and np.isfinite([one["score"], *box]).all()
        ):
            raise InputError(f"{this} needs score, bbox and a run-length code as segmentation; make the file again.")


def _indexed(coco: Any, content: dict[str, Any], annotations: list[dict[str, Any]]) -> Any:
    """A COCO of these annotations, numbered from 1."""
    made = coco()
    for number, one in enumerate(annotations, 1):
        one["id"] = number
    made.dataset = {"images": content["images"], "categories": content["categories"], "annotations": annotations}
    made.createIndex()
    return made


def _average(evaluation: Any) -> tuple[dict[str, float | None], list[float | None]]:
    """STATS, and AP of each category, ordered by id."""
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, categories; all sizes, 100 boxes
    by_category = [one[one > -1] for one in np.moveaxis(precision, 2, 0)]
    stats = {name: _percent(value) for name, value in zip(STATS, evaluation.stats, strict=False)}
    return stats, [_percent(one.mean() if one.size else -1) for one in by_category]


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)
