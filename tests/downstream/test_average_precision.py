"""Average precision beside pycocotools run by hand on the same files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from orl import InputError
from orl.downstream.average_precision import STATS, evaluate

COCO_MINI = Path(__file__).parents[2].parent / "shared" / "data" / "coco-mini"


def ellipse(width: int, height: int, x: float, y: float, a: float, b: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.asfortranarray((((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 < 1).astype(np.uint8))


def encode(mask: np.ndarray) -> dict:
    code = rle.encode(mask)
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def detections(content: dict, random: np.random.Generator) -> list[dict]:
    """Most objects, shifted and some under another name, and many that are none."""
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    found = []
    names = [one["id"] for one in content["categories"]]
    for one in content["annotations"]:
        if random.random() < 0.8:
            mask = np.roll(coco.annToMask(one), random.integers(-4, 5, 2), (0, 1))
            category = one["category_id"] if random.random() < 0.9 else int(random.choice(names))
            found.append((one["image_id"], category, mask))
    for image in content["images"]:
        for _ in range(3):
            x, y = random.random(2) * (image["width"], image["height"])
            mask = ellipse(image["width"], image["height"], x, y, *random.uniform(4, 40, 2))
            found.append((image["id"], int(random.choice(names)), mask))
    scores = random.integers(1, 40, len(found)) / 40  # some are equal
    return [
        {"image_id": image, "category_id": category, "segmentation": (code := encode(np.asfortranarray(mask))),
         "bbox": rle.toBbox(code).tolist(), "score": float(score)}
        for (image, category, mask), score in zip(found, scores, strict=True)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """truth.json: 12 photos with small to large objects, polygons, both codes, crowds; found.json: detections."""
    folder, random = tmp_path_factory.mktemp("ap"), np.random.default_rng(0)
    sizes = [(240 + 10 * number, 200) for number in range(12)]
    annotations: list[dict] = []
    for image, (width, height) in enumerate(sizes[:-1], 100):  # the last one has no object
        for _ in range(6):
            a, b = np.exp(random.uniform(np.log(5), np.log(80), 2))
            mask = ellipse(width, height, random.uniform(10, width - 10), random.uniform(10, height - 10), a, b)
            box, crowd = rle.toBbox(rle.encode(mask)).tolist(), int(random.random() < 0.1)
            x, y, w, h = box
            outline: Any = encode(mask)
            if random.random() < 0.4:
                outline = [[x, y, x + w, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h]]
            elif random.random() < 0.5:
                flat = mask.ravel(order="F")
                edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
                outline = {"size": [height, width], "counts": np.diff([0, *edges, len(flat)]).tolist()}
            category = int(random.choice([3, 90, 7]))
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box,
                                "area": float(mask.sum()), "iscrowd": crowd, "segmentation": outline})  # fmt: skip
    content = {
        "images": [
            {"id": image, "file_name": f"{image}.jpg", "width": width, "height": height}
            for image, (width, height) in enumerate(sizes, 100)
        ],
        "categories": [{"id": 90, "name": "c"}, {"id": 3, "name": "a"}, {"id": 50, "name": "none"},
                       {"id": 7, "name": "b"}],
        "annotations": annotations,
    }  # fmt: skip
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "found.json").write_text(json.dumps(detections(content, random)))
    return folder


def by_hand(truth: Path, found: Path) -> tuple[list, list]:
    """The first six numbers and AP by category of boxes and of masks."""
    stats, categories = [], []
    for kind in ("bbox", "segm"):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(found)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats += [100 * value if value >= 0 else None for value in evaluation.stats[:6]]
        own = []
        for category in sorted(coco.cats):
            evaluation = COCOeval(coco, coco.loadRes(str(found)), kind)
            evaluation.params.catIds = [category]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            own.append(100 * evaluation.stats[0] if evaluation.stats[0] >= 0 else None)
        categories += own
    return stats, categories


def numbers(result: dict) -> tuple[list, list]:
    both = (result["box"], result["mask"])
    assert [list(one) for one in both] == [list(STATS)] * 2
    return (
        [value for one in both for value in one.values()],
        [one[key] for key in ("box_AP", "mask_AP") for one in result["categories"]],
    )


def assert_close(one: tuple[list, list], other: tuple[list, list]) -> None:
    for a, b in zip(one, other, strict=True):
        assert [value is None for value in a] == [value is None for value in b]
        assert [value or 0 for value in a] == pytest.approx([value or 0 for value in b], abs=1e-9)


@pytest.mark.parametrize("faster", [False, True])
def test_it_is_pycocotools(folder: Path, faster: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if faster:
        pytest.importorskip("faster_coco_eval")
    reference = by_hand(folder / "truth.json", folder / "found.json")
    capsys.readouterr()
    result = evaluate(folder / "truth.json", folder / "found.json", faster)
    assert capsys.readouterr().out == ""
    assert_close(numbers(result), reference)
    assert all(5 < value < 95 for value in numbers(result)[0])
    assert [(one["id"], one["name"]) for one in result["categories"]] == [(3, "a"), (7, "b"), (50, "none"), (90, "c")]
    assert result["categories"][2] == {"name": "none", "id": 50, "objects": 0, "box_AP": None, "mask_AP": None}
    truth = json.loads((folder / "truth.json").read_text())["annotations"]
    assert sum(one["iscrowd"] for one in truth) > 0
    assert sum(one["objects"] for one in result["categories"]) == sum(1 - one["iscrowd"] for one in truth)
    found = json.loads((folder / "found.json").read_text())
    assert result["detections"] == len(found)
    before = json.dumps(found)
    assert evaluate(folder / "truth.json", found, faster) == result
    assert json.dumps(found) == before


def test_real_objects(tmp_path: Path) -> None:
    if not COCO_MINI.is_dir():
        pytest.skip("the coco-mini annotations are not there")
    truth, found = COCO_MINI / "annotations" / "instances_val2017.json", tmp_path / "found.json"
    found.write_text(json.dumps(detections(json.loads(truth.read_text()), np.random.default_rng(1))))
    result = evaluate(truth, found)
    coco = COCO(str(truth))
    for kind, own in zip(("bbox", "segm"), ("box", "mask"), strict=True):
        evaluation = COCOeval(coco, coco.loadRes(str(found)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert list(result[own].values()) == pytest.approx(100 * evaluation.stats[:6], abs=1e-9)
    pytest.importorskip("faster_coco_eval")
    assert_close(numbers(evaluate(truth, found, True)), numbers(result))


@pytest.mark.parametrize("faster", [False, True])
def test_no_detections_and_perfect_ones(folder: Path, tmp_path: Path, faster: bool) -> None:
    if faster:
        pytest.importorskip("faster_coco_eval")
    (tmp_path / "none.json").write_text("[]")
    result = evaluate(folder / "truth.json", tmp_path / "none.json", faster)
    assert result["box"] == result["mask"] == dict.fromkeys(STATS, 0.0)
    assert [one["mask_AP"] for one in result["categories"]] == [0, 0, None, 0]
    assert result["detections"] == 0
    truth = json.loads((folder / "truth.json").read_text())
    coco = COCO(str(folder / "truth.json"))
    perfect = [
        {key: one[key] for key in ("image_id", "category_id", "bbox")}
        | {"score": 0.9, "segmentation": encode(np.asfortranarray(coco.annToMask(one)))}
        for one in truth["annotations"]
    ]
    result = evaluate(folder / "truth.json", perfect, faster)
    assert result["box"] == result["mask"] == pytest.approx(dict.fromkeys(STATS, 100.0))
    small = {**truth, "annotations": [one for one in truth["annotations"] if one["area"] < 32**2]}
    (tmp_path / "small.json").write_text(json.dumps(small))
    assert evaluate(tmp_path / "small.json", perfect, faster)["box"]["APl"] is None


@pytest.mark.parametrize("faster", [False, True])
def test_annotations_that_pycocotools_gets_wrong(folder: Path, tmp_path: Path, faster: bool) -> None:
    """Ids of 0 and ids that occur twice; no crowd flag, no area; objects without a mask."""
    if faster:
        pytest.importorskip("faster_coco_eval")
    reference = numbers(evaluate(folder / "truth.json", folder / "found.json"))
    truth = json.loads((folder / "truth.json").read_text())
    for number, one in enumerate(truth["annotations"]):
        one["id"] = number // 2
        if not one["iscrowd"]:
            del one["iscrowd"]
    truth["annotations"].append({**truth["annotations"][0], "segmentation": [[1, 2, 3, 4]]})
    del truth["annotations"][-1]["area"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert_close(numbers(evaluate(tmp_path / "truth.json", folder / "found.json", faster)), reference)
    wrong = by_hand_if_it_runs(tmp_path / "truth.json", folder / "found.json")
    assert wrong != pytest.approx(reference[0][:6])

    for number, one in enumerate(truth["annotations"]):  # sizes of masks, where no area is given
        one.pop("area", None)
        one.update({"area": (None, "9")[number % 2]} if number % 3 else {})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    coco = COCO(str(folder / "truth.json"))
    exact = json.loads((folder / "truth.json").read_text())
    for one in exact["annotations"]:
        one["area"] = float(coco.annToMask(one).sum())
    (tmp_path / "exact.json").write_text(json.dumps(exact))
    assert_close(
        numbers(evaluate(tmp_path / "truth.json", folder / "found.json", faster)),
        numbers(evaluate(tmp_path / "exact.json", folder / "found.json")),
    )


def by_hand_if_it_runs(truth: Path, found: Path) -> list[float]:
    coco = COCO(str(truth))
    for one in coco.dataset["annotations"]:
        one.setdefault("iscrowd", 0)
        one.setdefault("area", 1.0)
    evaluation = COCOeval(coco, coco.loadRes(str(found)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [100 * value for value in evaluation.stats[:6]]


def put(key: str, value: object) -> Callable[[list], object]:
    return lambda found: found[2].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("image_id", 1), r"detections\[2\] has image_id 1, which the annotations do not list"),
        (put("category_id", [4]), r"detections\[2\] has category_id \[4\], which the annotations do not list"),
        (put("category_id", 4), r"detections\[2\] has category_id 4, which the annotations do not list"),
        (put("bbox", [1, 2]), r"detections\[2\] needs image_id, category_id and bbox"),
        (put("bbox", [1, 2, 3, float("inf")]), r"detections\[2\] needs score, bbox and a run-length code"),
        (put("score", None), r"detections\[2\] needs score, bbox and a run-length code"),
        (put("segmentation", None), r"detections\[2\] needs score, bbox and a run-length code"),
        (put("segmentation", {"size": [5, 5], "counts": "9"}), r"detections\[2\] has a mask of another size"),
        (lambda found: found.insert(0, 3), r"detections\[0\] needs image_id"),
    ],
)
def test_detections_that_do_not_fit(folder: Path, tmp_path: Path, change: Callable, message: str) -> None:
    found = json.loads((folder / "found.json").read_text())
    change(found)
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match=message) as error:
        evaluate(folder / "truth.json", path)
    assert str(error.value).startswith(str(path))


def test_files_that_are_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no\.json: cannot be read"):
        evaluate(tmp_path / "no.json", [])
    with pytest.raises(InputError, match=r"no\.json: cannot be read"):
        evaluate(folder / "truth.json", tmp_path / "no.json")
    for text, message in (("{", "is no JSON"), ("{}", "must be a list of detections")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=message):
            evaluate(folder / "truth.json", tmp_path / "bad.json")
    truth = json.loads((folder / "truth.json").read_text())
    truth["annotations"][1]["category_id"] = 4
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(InputError, match=r"truth\.json: annotations\[1\] has category_id 4"):
        evaluate(tmp_path / "truth.json", folder / "found.json")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"compute\.faster_coco_eval is true, but .* or set it to false"):
        evaluate(folder / "truth.json", folder / "found.json", True)
