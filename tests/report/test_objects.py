"""Detection, segmentation and object discovery among the scores of the report."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_page import by_model

from orl import InputError, artifacts
from orl.report.scores import Task, tasks

APS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COCO = {
    "root": "data/coco",
    "train": "train2017",
    "test": "val2017",
    "train_photos": 1600,
    "test_photos": 400,
    "objects": 11_893,
    "categories": 3,
    "left_out": {"without_area": 0, "without_mask": 3},
    "fingerprint": "f",
    "weights_fingerprint": "w",
}


def result(task: str, model: str, metrics: dict, data: dict) -> dict:
    return {"task": task, "model": model, "metrics": metrics, "settings": {}, "data": data}


def detection(model: str, ap: float, iterations: int = 900, **data: Any) -> dict:
    """Box AP, AP50 and so on: `ap` and 10 more each; masks one less; no small object, and none of the class zebra."""
    box = {name: None if name == "APs" else ap + 10 * place for place, name in enumerate(APS)}
    mask = {name: value and value - 1 for name, value in box.items()}
    categories = [
        {"name": name, "id": 7 * number, "objects": 4, "box_AP": value, "mask_AP": value and value - 1}
        for number, (name, value) in enumerate((("cat", ap), ("dog <x>", 50.0), ("zebra", None)), 1)
    ]
    rows = [{"iteration": i, "loss": 900 / i, "losses": {"loss_mask": 1.0}, "lr": 0.02} for i in (300, 600, 900)]
    metrics = {"box": box, "mask": mask, "categories": categories, "rows": rows, "detections": 99}
    return result("detection", model, {**metrics, "iterations": iterations, "batch": 8}, {**COCO, **data})


def segmentation(model: str, miou: float, **data: Any) -> dict:
    metrics = {
        "mIoU": miou,
        "mIoU_objects": miou - 5,
        "pixel_accuracy": miou + 50,
        "background_only_mIoU": 21.5,
        "IoU": {"background": 80.0, "cat": miou, "zebra": None},
        "epochs": [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}],
    }
    return result("segmentation", model, metrics, {**COCO, **data})


def localization(model: str, **corlocs: float) -> dict:
    """CorLoc by method; detection rates are a tenth, a fifth and a half of it."""
    methods = {
        method: {"corloc": value, "detection_rate": [value / 10, value / 5, value / 2]}
        for method, value in corlocs.items()
    }
    data = {"annotations": ["a.json"], "annotations_fingerprints": ["a"], "photos": 1983, "objects": 14_321}
    data |= {"crowds": 210, "without_area": 0, "photos_left_out": 17}
    return result("localization", model, {"boxes": [1, 2, 5], "methods": methods}, data)


def read(folder: Path, *results: dict) -> list[Task]:
    paths = [str(folder / f"{number}.json") for number in range(len(results))]
    for path, one in zip(paths, results, strict=True):
        artifacts.write_json(path, one)
    return tasks({"": paths})


def rows(task: Task, title: str) -> list[list[str]]:
    table = next(table for table in [*task.tables, *task.folded] if table.title == title)
    heads = list(map(str, table.heads))
    return by_model([heads, *([str(name), *(cell.text for cell in cells)] for name, cells in table.rows)])


def best(task: Task, title: str) -> set[tuple[str, str]]:
    """Row and column of what is in bold, in the table that `rows` returns."""
    table = next(table for table in [*task.tables, *task.folded] if table.title == title)
    found = {
        (str(name), str(head))
        for name, cells in table.rows
        for head, cell in zip(table.heads[1:], cells, strict=True)
        if cell.best
    }
    return {(head, name) for name, head in found} if table.heads[0] == "Score" else found


def test_detection(tmp_path: Path) -> None:
    """Tables of box and mask AP, also by category, with dashes where COCO tells none; losses; what is printed."""
    (task,) = read(tmp_path, detection("orl", 12.3), detection("random", 4.0))
    assert task.title == "Object detection"
    assert [table.title for table in task.tables] == ["Box AP", "Mask AP"]
    assert rows(task, "Box AP") == [
        ["Model", *APS],
        ["random", "4.00", "14.00", "24.00", "–", "44.00", "54.00"],
        ["orl", "12.30", "22.30", "32.30", "–", "52.30", "62.30"],
    ]
    assert rows(task, "Mask AP")[2] == ["orl", "11.30", "21.30", "31.30", "–", "51.30", "61.30"]
    assert best(task, "Box AP") == {("orl", name) for name in APS if name != "APs"}
    assert rows(task, "Box AP of each category") == [
        ["Category", "random", "orl"],
        ["cat", "4.00", "12.30"],
        ["dog <x>", "50.00", "50.00"],
        ["zebra", "–", "–"],
    ]
    assert rows(task, "Mask AP of each category")[1] == ["cat", "3.00", "11.30"]
    (chart,) = task.charts
    assert [style.name for style in chart.legend] == ["random", "orl"]
    assert chart.picture.alt == "Training loss by iteration: random 3.0 to 1.0; orl 3.0 to 1.0"
    assert task.notes == [
        "1,600 photos of train2017 to train, 400 of val2017 to test, 3 categories, in data/coco. "
        "Objects left out: 3 without mask.",
        "Trained for 900 iterations of 8 photos.",
    ]
    assert task.lines == [
        "Detection: random: box AP 4.00, AP50 14.00; mask AP 3.00, AP50 13.00",
        "Detection: orl: box AP 12.30, AP50 22.30; mask AP 11.30, AP50 21.30",
    ]


def test_the_best_of_a_category_that_a_model_lacks(tmp_path: Path) -> None:
    found = [detection(model, ap) for model, ap in (("random", 4.0), ("stage1", 9.0), ("orl", 12.0))]
    found[0]["metrics"]["categories"][0]["box_AP"] = None
    (task,) = read(tmp_path, *found)
    assert rows(task, "Box AP of each category")[1] == ["cat", "–", "9.00", "12.00"]
    assert ("cat", "orl") in best(task, "Box AP of each category")


def test_detection_over_seeds(tmp_path: Path) -> None:
    values = [12.0, 13.5, 12.9]
    found = [detection(f"orl.seed{seed}" if seed else "orl", value) for seed, value in enumerate(values)]
    (task,) = read(tmp_path, *found, detection("stage1", 9.0, iterations=450, fingerprint="g"))
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(3)
    assert rows(task, "Box AP")[0][:3] == ["Model", "seeds", "AP"]
    assert rows(task, "Box AP")[1][:3] == ["stage1", "1", "9.00"]
    assert rows(task, "Box AP")[2][:3] == ["orl", "3", f"{mean:.2f} ± {error:.2f}"]
    assert rows(task, "Box AP")[2][5] == "–"
    assert rows(task, "Box AP of each category")[1] == ["cat", "9.00", f"{mean:.2f}"]
    assert "Means over seeds ± their standard errors." in task.notes
    assert "stage1: Trained for 450 iterations of 8 photos." in task.notes
    assert "orl: Trained for 900 iterations of 8 photos." in task.notes
    assert any("their scores cannot be compared" in note for note in task.notes)
    assert task.charts[0].note == ""
    assert task.lines[1].startswith(f"Detection: orl: box AP {mean:.2f} ± {error:.2f}, AP50 ")
    assert task.lines[1].endswith(", 3 seeds")


def test_segmentation(tmp_path: Path) -> None:
    counts = {"train": {"without_area": 2}, "test": {"without_area": 0}}
    (task,) = read(tmp_path, segmentation("orl", 31.25, left_out=counts), segmentation("random", 25.0, left_out=counts))
    assert rows(task, "Scores") == [
        ["Model", "mIoU", "mIoU without background", "pixel accuracy"],
        ["random", "25.00", "20.00", "75.00"],
        ["orl", "31.25", "26.25", "81.25"],
    ]
    assert rows(task, "IoU of each class")[1:] == [
        ["background", "80.00", "80.00"],
        ["cat", "25.00", "31.25"],
        ["zebra", "–", "–"],
    ]
    assert task.charts[0].picture.alt == "Training loss by epoch: random 2.0 to 1.0; orl 2.0 to 1.0"
    assert task.notes[0].endswith("Objects left out: 2 without area (train).")
    assert "Naming all pixels background: mIoU 21.50." in task.notes
    assert task.lines[1] == "Segmentation: orl: mIoU 31.25, mIoU without background 26.25, pixel accuracy 81.25"


BASELINES = {"random": 21.0, "largest": 27.0, "first": 19.5, "whole": 24.0}


def test_object_discovery_is_one_table(tmp_path: Path) -> None:
    """The pairing, then LOST of each model, then the baselines."""
    found = [localization(model, lost=value) for model, value in (("orl", 20.0), ("random", 17.0), ("stage1", 18.0))]
    (task,) = read(tmp_path, *found, localization("pairs", pairing=28.0, **BASELINES))
    assert task.title == "Object discovery"
    assert len(task.tables) == 1
    assert rows(task, "Boxes") == [
        ["Boxes", "CorLoc", "detection rate, n = 1", "detection rate, n = 2", "detection rate, n = 5"],
        ["stage 2's pairing", "28.0", "2.8", "5.6", "14.0"],
        ["LOST: random", "17.0", "1.7", "3.4", "8.5"],
        ["LOST: stage1", "18.0", "1.8", "3.6", "9.0"],
        ["LOST: orl", "20.0", "2.0", "4.0", "10.0"],
        ["random proposal", "21.0", "2.1", "4.2", "10.5"],
        ["largest proposal", "27.0", "2.7", "5.4", "13.5"],
        ["first proposal", "19.5", "1.9", "3.9", "9.8"],
        ["whole photo", "24.0", "2.4", "4.8", "12.0"],
    ]
    assert {row for row, _ in best(task, "Boxes")} == {"stage 2's pairing"}
    assert task.notes[0] == "14,321 objects on 1,983 photos. Objects left out: 210 crowds."
    assert len([note for note in task.notes if "CorLoc: the share of photos" in note]) == 1
    assert len(task.notes) == 2
    assert task.lines[:2] == [
        "Object discovery: stage 2's pairing: CorLoc 28.0, detection rate 2.8 (n = 1), 5.6 (n = 2), 14.0 (n = 5)",
        "Object discovery: LOST: random: CorLoc 17.0, detection rate 1.7 (n = 1), 3.4 (n = 2), 8.5 (n = 5)",
    ]


def test_baselines_of_variants_stand_once_where_they_agree(tmp_path: Path) -> None:
    """Equal pairings, however, are told of each variant, and equal LOST of each model; seeds are one row."""
    (task,) = read(
        tmp_path,
        localization("pairs", pairing=28.0, **BASELINES),
        localization("pairs.seed1", pairing=29.0, **BASELINES),
        localization("pairs-b", pairing=28.5, **BASELINES),
        localization("pairs-grid", pairing=28.5, **{**BASELINES, "first": 12.0}),
        localization("random", lost=17.0),
        localization("orl", lost=17.0),
    )
    assert [row[:3] for row in rows(task, "Boxes")] == [
        ["Boxes", "seeds", "CorLoc"],
        ["stage 2's pairing: pairs", "2", "28.5 ± 0.5"],
        ["stage 2's pairing: pairs-b", "1", "28.5"],
        ["stage 2's pairing: pairs-grid", "1", "28.5"],
        ["LOST: random", "1", "17.0"],
        ["LOST: orl", "1", "17.0"],
        ["random proposal", "2", "21.0 ± 0.0"],
        ["largest proposal", "2", "27.0 ± 0.0"],
        ["first proposal: pairs, pairs-b", "2", "19.5 ± 0.0"],
        ["first proposal: pairs-grid", "1", "12.0"],
        ["whole photo", "2", "24.0 ± 0.0"],
    ]
    assert task.lines[0].endswith("(n = 5), 2 seeds")


def test_order_of_the_tasks(tmp_path: Path) -> None:
    found = read(tmp_path, localization("orl", lost=20.0), segmentation("orl", 30.0), detection("orl", 12.0))
    assert [task.title for task in found] == [
        "Object detection",
        "Segmentation by a linear layer",
        "Object discovery",
    ]


def changed(value: dict, *keys: Any, to: Any = None) -> dict:
    """A result with another value where the keys lead to; without `to`, with nothing there."""
    value = copy.deepcopy(value)
    inner: Any = value
    for key in keys[:-1]:
        inner = inner[key]
    if to is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    return value


DETECTION, SEGMENTATION, LOCALIZATION = detection("m", 1.0), segmentation("m", 1.0), localization("m", lost=1.0)


@pytest.mark.parametrize(
    "value",
    [
        *(changed(DETECTION, "metrics", key) for key in ("box", "mask", "categories", "rows", "iterations", "batch")),
        changed(DETECTION, "metrics", "mask", "APl"),
        changed(DETECTION, "metrics", "box", "AP", to="high"),
        changed(DETECTION, "metrics", "categories", 0, "mask_AP"),
        changed(DETECTION, "metrics", "rows", 0, "loss", to="low"),
        changed(DETECTION, "metrics", to=[]),
        changed(DETECTION, "data", "train_photos"),
        changed(DETECTION, "data", "left_out", to=[3]),
        *(changed(SEGMENTATION, "metrics", key) for key in ("mIoU", "pixel_accuracy", "IoU", "epochs")),
        changed(SEGMENTATION, "metrics", "IoU", to=[1.0]),
        changed(SEGMENTATION, "metrics", "background_only_mIoU", to="none"),
        *(changed(LOCALIZATION, "metrics", key) for key in ("boxes", "methods")),
        changed(LOCALIZATION, "metrics", "boxes", to=[1, 2]),
        changed(LOCALIZATION, "metrics", "methods", to={}),
        changed(LOCALIZATION, "metrics", "methods", to={"other": {"corloc": 1.0, "detection_rate": [1.0, 2.0, 3.0]}}),
        changed(LOCALIZATION, "metrics", "methods", "lost", "corloc"),
        changed(LOCALIZATION, "data", "objects"),
    ],
)
def test_a_damaged_result_is_one_sentence(tmp_path: Path, value: dict) -> None:
    with pytest.raises(InputError, match=rf"0.json: is no result of `orl evaluate {value['task']}` \(.*\); evaluate"):
        read(tmp_path, value)
