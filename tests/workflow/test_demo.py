"""What the demo must have found. Looks at results/scenes of `make demo`, and skips where that has not run."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from orl import artifacts
from orl.data.views import iou

RESULTS = Path(__file__).parents[2] / "results" / "scenes"
pytestmark = pytest.mark.skipif(
    not (RESULTS / "report" / "index.html").exists(), reason="make demo has not run in this checkout"
)


def test_stage_1_beats_random_weights():
    scores = {
        model: artifacts.read_results(RESULTS / "downstream" / model / "voc07_svm.json")["metrics"]
        for model in ("random", "stage1", "orl")
    }
    assert scores["stage1"]["mAP"] > scores["random"]["mAP"] > scores["random"]["chance_mAP"]
    assert scores["orl"]["mAP"] > scores["random"]["chance_mAP"]


@pytest.mark.parametrize("model", ["stage1", "orl"])
def test_training_went_down_and_did_not_collapse(model):
    rows = list(csv.DictReader((RESULTS / "models" / model / "metrics.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert min(float(row["feature_std"]) for row in rows) > 0.3


def object_classes(manifest, proposals):
    """Per box: the class of the object that it overlaps with IoU >= 0.5, or 0."""
    found = json.loads((RESULTS / "scenes" / "annotations" / "instances_train2017.json").read_text())
    objects: dict[str, list] = {image["file_name"]: [] for image in found["images"]}
    names = {image["id"]: image["file_name"] for image in found["images"]}
    for one in found["annotations"]:
        objects[names[one["image_id"]]].append((one["bbox"], one["category_id"]))
    classes = np.zeros(len(proposals.box), int)
    for row, path in enumerate(manifest.path):
        for number in range(*proposals.box_offsets[row : row + 2]):
            for box, category in objects[Path(str(path)).name]:
                if iou(np.array(box), proposals.box[number : number + 1])[0] >= 0.5:
                    classes[number] = category
    return classes


def test_pairs_show_one_class_at_least_twice_as_often_as_random_pairs():
    manifest = artifacts.read_manifest(RESULTS / "manifest.csv")
    proposals = artifacts.read_proposals(RESULTS / "discovery" / "proposals.h5")
    found = artifacts.read_correspondences(RESULTS / "discovery" / "correspondences.h5")
    classes = object_classes(manifest, proposals)
    k = found.neighbor.shape[1]
    slots = np.repeat(np.arange(len(found.neighbor) * k), np.diff(found.pair_offsets))
    query, neighbor = slots // k, found.neighbor.ravel()[slots]
    first = classes[proposals.box_offsets[query] + found.pair[:, 0]]
    second = classes[proposals.box_offsets[neighbor] + found.pair[:, 1]]
    matched = np.mean((first == second) & (first > 0))

    rng = np.random.default_rng(0)
    a, b = rng.integers(len(classes), size=(2, 200_000))
    at_random = np.mean((classes[a] == classes[b]) & (classes[a] > 0))
    print(f"pairs of one class: {matched:.3f}, of random {at_random:.3f}, boxes on objects {(classes > 0).mean():.2f}")
    assert matched >= 2 * at_random


def test_attention_maps_are_on_the_page():
    seen = json.loads((RESULTS / "attention" / "attention.json").read_text())
    assert seen["models"] == ["random", "stage1", "orl"]
    assert {photo["chosen"] for photo in seen["photos"]} == {"most paired by stage 2"}
    assert "Attention maps" in (RESULTS / "report" / "index.html").read_text()
