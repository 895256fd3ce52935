import base64
import hashlib
import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from orl import InputError, artifacts, cli
from orl.report import figures
from orl.report.page import CHARTS, EXTREME_PAIRS, MAPS, QUERIES, report
from orl.report.scores import CURVES, tasks

ODD = "orl_<b>&\"x'"  # a model's name that is markup where it is not escaped
PHOTO = 'a&b<i><img src=x onerror=alert(1)>" onload="alert(1)'
VOID = {"meta", "img", "link", "br", "wbr", "input"}


class Page(HTMLParser):
    """The parsed page: its images' URIs, tables, and text by the tag around it; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.pairs: list[tuple[str, str, str]] = []  # kind, similarity, caption
        self.tables: dict[str, list[list[str]]] = {}  # by what is read out before them
        self.bold: list[str] = []
        self.changes: list[str] = []  # against stage 1
        self.in_change = False
        self.in_run = False  # beside a model's name
        self.text = ""
        self.labels: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open
        self.tables = {label: by_model(rows) for label, rows in self.tables.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {name: value or "" for name, value in attrs}
        assert not any(name.startswith("on") for name in given)
        self.loads += [
            given[name] for name in ("src", "href", "xlink:href", "srcset", "data", "action") if name in given
        ]
        self.in_change = given.get("class") == "change"
        if given.get("class") == "pair":
            self.pairs.append((given["data-kind"], given["data-similarity"], ""))
        if given.get("class") == "drawing":
            self.pairs[-1] = (*self.pairs[-1][:2], given["aria-label"])
        if given.get("class") == "run":
            self.in_run = True
            self.rows[-1][-1] += " ("
        self.labels += [given[name] for name in ("alt", "aria-label") if name in given]
        if tag == "img":
            assert given["alt"]
            self.images.append(given["src"])
        if tag == "image":
            self.images.append(given["href"])
        if tag == "table":
            self.tables[self.labels[-1]] = []
        if tag == "tr":
            self.rows.append([])
            list(self.tables.values())[-1].append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag == "span" and self.in_run:
            self.in_run = False
            self.rows[-1][-1] += ")"

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
            return
        if "style" in self.open:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if self.in_change and "span" in self.open:
            self.changes.append(data)
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.strip()
        if "b" in self.open:
            self.bold.append(data)

    def table(self, first: str) -> list[list[str]]:
        """The first table whose first heading is this one."""
        return next(rows for rows in self.tables.values() if rows[0][0] == first)


def by_model(rows: list[list[str]]) -> list[list[str]]:
    """A table of scores with a row for each model; on the page, it has a column."""
    if rows[0][0] != "Score":
        return rows
    found = [list(row) for row in zip(*rows, strict=True)]
    found[0][0] = "Model"
    return found


def chart_words(page: Page) -> list[set[str]]:
    """The texts of each chart, which matplotlib names beside the outlines it draws."""
    charts = [base64.b64decode(uri.partition(";base64,")[2]).decode() for uri in page.images if "svg" in uri]
    return [set(re.findall(r"<!-- (.*?) -->", chart)) for chart in charts]


def result(model: str, score: float, **metrics: Any) -> dict:
    return {
        "task": "voc07_svm",
        "model": model,
        "metrics": {"mAP": score, "chance_mAP": 7.5, "AP": {"cat": score, "dog <small>": 50.0}, **metrics},
        "settings": {},
        "data": dict(VOC),
    }


VOC = {"root": "voc", "train_split": "a", "test_split": "b", "train": 5, "test": 4}


def labelled(name: str, **changes: Any) -> dict:
    """The `data` of a result on a labelled set."""
    parts = {"train": "train", "val": "val", "train_photos": 5000, "val_photos": 1000, "classes": 50}
    return {"set": name, "root": f"data/{name}", **parts, "fingerprint": "f", "weights_fingerprint": "w", **changes}


def lowshot(model: str, scores: list[float], shots: list[int], protocol: str = "clean", **metrics: Any) -> dict:
    """Of two samples, 1 above and below each score."""
    metrics = {
        "shots": shots,
        "mAP": scores,
        "std": [1.0] * len(shots),
        "mAP_of_samples": [[score - 1, score + 1] for score in scores],
        "cost": [1.0] * len(shots),
        "classes": [4] * len(shots),
        "classes_left_out": {},
        "too_few_positives": {},
        "shots_left_out": [],
        "chance_mAP": [7.5] * len(shots),
        "fits": 90,
        "not_converged": 0,
        **metrics,
    }
    settings = {"downstream": {"voc07_lowshot": {"protocol": protocol}}}
    return {"task": "voc07_lowshot", "model": model, "metrics": metrics, "settings": settings, "data": VOC}


def linear(model: str, name: str, scores: list[float], epochs: int = 2, **data: Any) -> dict:
    """Top-1 of the stages from 1 on; top-5 is 20 more; the last stage rises to its score by 1 each epoch."""
    top1 = {str(stage): score for stage, score in enumerate(scores, 1)}
    history = [
        {
            "epoch": epoch,
            "top1": {stage: score - epochs + epoch for stage, score in top1.items()},
            "top5": {},
            "loss": {},
        }
        for epoch in range(1, epochs + 1)
    ]
    top5 = {stage: score + 20 for stage, score in top1.items()}
    metrics = {"top1": top1, "top5": top5, "epochs": history, "chance_top1": 2.0}
    return {"task": "linear", "model": model, "metrics": metrics, "settings": {}, "data": labelled(name, **data)}


def semi(model: str, scores: dict[str, float], head: int = 10, runs: int = 5) -> dict:
    """Top-1 by share of the labels, ± 0.5; top-5 is 20 more, ± 0.25; two settings were tried."""
    shares = {
        share: {
            "lr": 0.01,
            "head": head,
            "top1": score,
            "top1_std": 0.5,
            "top5": score + 20,
            "top5_std": 0.25,
            "runs": [{"seed": seed, "top1": score, "top5": score + 20} for seed in range(runs)],
            "grid": [{"lr": lr, "head": head, "top1": score - lr, "top5": score + 20} for lr in (0.01, 0.1)],
        }
        for share, score in scores.items()
    }
    metrics = {"shares": shares, "chance_top1": 2.0}
    return {"task": "semi", "model": model, "metrics": metrics, "settings": {}, "data": labelled("objects")}


def knn(model: str, scores: dict[str, float], **data: Any) -> dict:
    metrics = {"top1": scores, "chance_top1": 2.0}
    return {"task": "knn", "model": model, "metrics": metrics, "settings": {}, "data": labelled("objects", **data)}


PRECISION = {
    "pairs": 24_000,
    "precision": 0.03,
    "random_rois": 0.015,
    "random_photos": 0.01,
    "on_object": 0.25,
    "pairs_on_objects": 0.08,
    "neighbors": [1, 2, 6],
    "shares": [0.02, 0.1],
    "by_neighbors": [[0.05, 0.045, 0.04], [0.04, 0.035, 0.03]],
    "random_rois_by_neighbors": [0.02, 0.018, 0.015],
}


class Run:
    """A run of `count` photos with `k` neighbours each, in a folder; its files may be changed before `write`."""

    def __init__(self, folder: Path, count: int = 12, k: int = 6, size: int = 320, noise: bool = False) -> None:
        self.folder, self.count, self.k = folder, count, k
        rng = np.random.default_rng(0)
        rows = []
        for number in range(count):
            path = folder / "photos" / f'{PHOTO}{number}".jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            height = size - 10 * (number % 5)
            coarse = rng.integers(0, 256, (height, size, 3) if noise else (6, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size, height)).save(path, quality=95)
            rows.append((str(number), path.name, size, height, path.stat().st_size, ""))
        artifacts.write_csv(folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, rows)
        artifacts.write_csv(folder / "rejected.csv", artifacts.REJECTED_COLUMNS, [])
        self.discovery(count)
        self.metrics: list[str] = []
        self.scores: list[str] = []
        self.recalls: list[str] = []
        self.pairs: list[str] = []
        self.attention: list[str] = []

    def discovery(self, count: int) -> None:
        """Neighbours, proposals and correspondences of `count` photos: 2 boxes and then 1, 1 to 2 pairs."""
        k, rng, folder = self.k, np.random.default_rng(1), self.folder
        index = np.array([[(row + step) % self.count for step in range(1, k + 1)] for row in range(count)], np.int32)
        with artifacts.create(folder / "neighbors.h5", artifacts.NEIGHBORS, {}, {}) as file:
            file["index"] = index
            file["similarity"] = np.sort(rng.random((count, k), np.float32))[:, ::-1]
        offsets = np.concatenate([[0], np.cumsum([2 - row % 2 for row in range(count)])])
        box = np.array([[10 + i % 7, 20, 60 + i % 11, 40] for i in range(offsets[-1])], np.int16)
        listed = {"manifest": artifacts.fingerprint(folder / "manifest.csv")}
        with artifacts.create(folder / "proposals.h5", artifacts.PROPOSALS, {}, listed) as file:
            file["box"], file["box_offsets"] = box, offsets
        inputs = {name: artifacts.fingerprint(folder / f"{name}.h5") for name in ("neighbors", "proposals")}
        counts = np.repeat(np.diff(offsets), k)
        with artifacts.create(folder / "correspondences.h5", artifacts.CORRESPONDENCES, {}, inputs) as file:
            file["neighbor"] = index
            file["pair"] = np.array([[i, 0] for n in counts for i in range(n)], np.uint16)
            file["similarity"] = rng.random(counts.sum()).astype(np.float16)
            file["pair_offsets"] = np.concatenate([[0], np.cumsum(counts)])

    def add_metrics(self, model: str, parts: list[str], epochs: int) -> None:
        columns = ("epoch", "step", "loss", *(f"loss_{part}" for part in parts), "feature_std", "lr", "ema")
        rows = [[e, 9 * e, len(parts) / e, *([1 / e] * len(parts)), 0.9, 0.1 / e, 1] for e in range(1, epochs + 1)]
        path = self.folder / "models" / model / "metrics.csv"
        artifacts.write_csv(path, columns, rows)
        self.metrics.append(str(path))

    def add_score(self, value: dict) -> None:
        path = self.folder / f"score{len(self.scores)}.json"
        artifacts.write_json(path, value)
        self.scores.append(str(path))

    def add_recall(self, name: str, per_photo: float = 3.25, **made_with: Any) -> None:
        """Recall of the proposals of a variant, with four or two numbers of boxes kept."""
        kept = [1, 2, 5, 7] if made_with else [1, 3]
        lines = {iou: [rate * number / 10 for number in kept] for iou, rate in (("0.5", 1.0), ("0.7", 0.5))}
        metrics = {"kept": kept, "recall": {"all": lines, "large": {**lines, "0.7": [None] * len(kept)}}}
        value = {
            "task": "proposals",
            "model": name,
            "metrics": {**metrics, "boxes_per_photo": per_photo},
            "settings": {"proposals": {"min_size": 96}, "made_with": {"proposals": made_with} if made_with else {}},
            "data": {"objects": 1234, "large_objects": 0},
        }
        path = self.folder / f"recall{len(self.recalls)}.json"
        artifacts.write_json(path, value)
        self.recalls.append(str(path))

    def add_pairs(self, name: str, **metrics: Any) -> None:
        """Precision of the RoI pairs of a variant, by 1, 2 and 6 neighbours."""
        value = {
            "task": "pairs",
            "model": name,
            "metrics": {**PRECISION, **metrics},
            "settings": {"version": 1, "seed": 0, "made_with": {}},
            "data": {"photos": 12},
        }
        path = self.folder / f"pairs{len(self.pairs)}.json"
        artifacts.write_json(path, value)
        self.pairs.append(str(path))

    def add_attention(self, name: str, photos: int = 2) -> Path:
        """A folder of attention maps of photos, each with a figure of its own colour."""
        folder = self.folder / name
        folder.mkdir()
        listed = [
            {
                "image_id": f"<{i}>",
                "path": f"part/<{i}>.jpg",
                "roi": [1, 2, 30, 40],
                "chosen": "paired",
                "file": f"{i}.png",
            }
            for i in range(photos)
        ]
        for i, one in enumerate(listed):
            Image.new("RGB", (30, 20), (i, 0, 0)).save(folder / str(one["file"]))
        Image.new("RGB", (60, 50)).save(folder / "contact_sheet.png")
        artifacts.write_json(folder / "attention.json", {"photos": listed, "models": ["random", ODD], "settings": {}})
        self.attention.append(str(folder))
        return folder

    def write(self, name: str = "index.html", stage2: bool = True, **told: Any) -> str:
        neighbors, proposals, pairs = (
            str(self.folder / f"{file}.h5") for file in ("neighbors", "proposals", "correspondences")
        )
        tables = str(self.folder / "manifest.csv"), str(self.folder / "rejected.csv")
        output = self.folder / "out" / name
        photos = str(self.folder / "photos")
        lists = self.metrics, self.scores, self.recalls, self.pairs, self.attention
        files = (neighbors, proposals, pairs) if stage2 else None
        report("run <1> & co", photos, *tables, *lists, files, "ignore", str(output), **told)
        return output.read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("run"))
    rejected = [(f"bad<{i}>.jpg", "not a JPEG & so on") for i in range(25)]
    artifacts.write_csv(run.folder / "rejected.csv", artifacts.REJECTED_COLUMNS, rejected)
    run.add_metrics("orl", ["global", "intra", "inter"], 5)
    run.add_metrics("stage1", ["global"], 900)
    run.add_metrics(ODD, ["global", "intra", "inter"], 1)
    run.add_score(result(ODD, 61.126, classes_left_out={"sofa": "no positive test photo"}))
    run.add_score(result("orl", 64.25, fits=90, not_converged=3))
    run.add_score(result("stage1", 62.0))
    run.add_score(result("random", 20.5))
    run.write()
    return run


@pytest.fixture(scope="module")
def page(made: Run) -> Page:
    return Page((made.folder / "out" / "index.html").read_text())


def test_works_offline(made: Run, page: Page) -> None:
    assert "://" not in (made.folder / "out" / "index.html").read_text()
    assert page.loads
    assert all(uri.startswith("data:image/") for uri in page.loads)
    assert not {"link", "iframe", "object", "base"} & set(page.tags)
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = (made.folder / "out" / "index.html").read_text()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">" in text


def test_images_decode(page: Page) -> None:
    kinds = []
    for uri in page.images:
        kind, data = uri.removeprefix("data:").split(";base64,")
        kinds.append(kind)
        content = base64.b64decode(data, validate=True)
        if kind == "image/svg+xml":
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                assert image.format == "JPEG"
                assert 100 <= max(image.size) <= 240
    photos = QUERIES * 6 + 2 * len(page.pairs)  # gallery; drawn pairs
    assert kinds.count("image/jpeg") == photos
    assert kinds.count("image/svg+xml") == 2 + 3 + 2 + 2


def test_scores(page: Page) -> None:
    assert page.table("Model") == [
        ["Model", "mAP", "against stage1", "against orl", "chance"],
        ["random", "20.50", "−41.50", "−43.75", "7.50"],
        ["stage1", "62.00", "", "−2.25", "7.50"],
        ["orl", "64.25", "+2.25", "", "7.50"],
        [ODD, "61.13", "−0.87", "−3.12", "7.50"],
    ]
    assert page.table("Class") == [
        ["Class", "random", "stage1", "orl", ODD],
        ["cat", "20.50", "62.00", "64.25", "61.13"],
        ["dog <small>", "50.00", "50.00", "50.00", "50.00"],
    ]
    assert page.bold == ["64.25", "64.25", *["50.00"] * 4]  # equals are all best
    assert "sofa: no positive test photo" in page.text
    assert "orl: 3 of 90 SVM fits stopped" in page.text
    assert "not comparable with published ones" in page.text


def test_repeats_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Mean ± standard error of the seeds, and of differences where both models have several."""
    run = Run(tmp_path, 3, 1, size=100)
    scores = {"orl": [64.0, 65.5, 63.1], "stage1": [61.0, 62.0, 61.9], "orl-b": [60.0], "random": [20.0, 21.0, 20.2]}
    for model, values in scores.items():
        for seed, value in enumerate(values):
            name = f"{model}.seed{seed}" if seed else model
            run.add_score(result(name, value, fits=90, not_converged=seed if model == "orl" else 0))
    page = Page(run.write())

    def text(model: str, other: str = "") -> str:
        value = np.mean(scores[model]) - (np.mean(scores[other]) if other else 0)
        of = [scores[name] for name in (model, other) if name]
        error = np.sqrt(sum(np.var(values, ddof=1) / len(values) for values in of)) if min(map(len, of)) > 1 else 0
        shown = (f"{value:+.2f}" if other else f"{value:.2f}").replace("-", "−")
        return shown + (f" ± {error:.2f}" if error else "")

    expected = [
        ["Model", "seeds", "mAP", "against stage1", "against orl", "chance"],
        ["random", "3", text("random"), text("random", "stage1"), text("random", "orl"), "7.50"],
        ["stage1", "3", text("stage1"), "", text("stage1", "orl"), "7.50"],
        ["orl", "3", text("orl"), text("orl", "stage1"), "", "7.50"],
        ["orl-b", "1", "60.00", text("orl-b", "stage1"), text("orl-b", "orl"), "7.50"],
    ]
    assert page.table("Model") == expected
    assert expected[1][2:5] == ["20.40 ± 0.31", "−41.23 ± 0.44", "−43.80 ± 0.76"]
    assert expected[4][3:5] == ["−1.63", "−4.20"]
    assert page.table("Class")[:2] == [
        ["Class", "random", "stage1", "orl", "orl-b"],
        ["cat", "20.40", "61.63", "64.20", "60.00"],
    ]
    assert page.bold == ["64.20 ± 0.70", "64.20", *["50.00"] * 4]
    assert page.text.count("5 photos of a to train, 4 of b to test, in voc.") == 1
    assert "orl: 3 of 270 SVM fits stopped" in page.text
    assert "seed1" not in page.text
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "VOC07 linear SVM: random: mAP 20.40 ± 0.31 (3 seeds, −41.23 ± 0.44 against stage1, "
        "−43.80 ± 0.76 against orl, chance 7.50)",
        "VOC07 linear SVM: stage1: mAP 61.63 ± 0.32 (3 seeds, −2.57 ± 0.77 against orl, chance 7.50)",
        "VOC07 linear SVM: orl: mAP 64.20 ± 0.70 (3 seeds, +2.57 ± 0.77 against stage1, chance 7.50)",
        "VOC07 linear SVM: orl-b: mAP 60.00 (−1.63 against stage1, −4.20 against orl, chance 7.50)",
    ]


def test_repeats_measured_on_other_data_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    for model in ("orl", "orl.seed1", "stage1", "stage1.seed1"):
        value = result(model, 60.0)
        if model == "orl.seed1":
            value["data"]["train"] = 6
        run.add_score(value)
    text = Page(run.write()).text
    assert "stage1, orl: 5 photos of a to train, 4 of b to test, in voc." in text
    assert "orl.seed1: 6 photos of a to train, 4 of b to test, in voc." in text
    assert "their scores cannot be compared" in text


def test_scores_are_drawn_where_a_table_is_hard_to_read(tmp_path: Path) -> None:
    """Repeats, or more than three models; the names stand in numbered legends."""
    run = Run(tmp_path, 3, 1, size=100)
    for model in ("random", "stage1", ODD):
        run.add_score(result(model, 60.0))
    page = Page(run.write(stage2=False))
    assert page.images == []
    run.add_score(result("stage1.seed1", 61.0))
    page = Page(run.write(stage2=False))
    everything, trained = chart_words(page)
    assert {"mAP, percent", "model", "1", "2", "3"} <= everything
    assert {"mAP, percent", "model", "2", "3"} <= trained
    assert all(re.fullmatch(r"mAP, percent|model|[\d.]+", word) for word in everything | trained)
    assert all(f"{number}: {name}" in page.text for number, name in enumerate(("random", "stage1", ODD), 1))
    assert "Bars: ± 2 standard errors; small dots: seeds. Dashed: chance." in page.text
    assert f"mAP, in percent: random 60.00; stage1 60.50 ± 0.50; {ODD} 60.00" in page.labels
    assert f"mAP of trained models, in percent: stage1 60.50 ± 0.50; {ODD} 60.00" in page.labels


def test_tasks_by_column(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Tables by k, stage and share, in the order of the tasks; the best of each column; what is printed."""
    run = Run(tmp_path, 3, 1, size=100)
    run.add_score(knn("stage1", {"20": 30.0, "200": 31.0}))
    run.add_score(knn("orl", {"200": 31.04, "20": 33.3}))
    run.add_score(semi("orl", {"0.1": 41.0, "0.01": 23.4}, head=100))
    run.add_score(semi("stage1", {"0.01": 20.0}))
    run.add_score(linear("orl", "objects", [20.0, 25.0, 30.0, 33.0, 31.2]))
    run.add_score(linear("stage1", "objects", [21.0, 22.0, 23.0, 24.0, 25.0]))
    run.add_score(linear("orl", "birds", [5.0]))
    few = {"cat": 3, "dog": 5, "cow": 7}
    left_out = {"shots_left_out": [16, 32], "classes_left_out": {"sofa": "no positive test photo"}}
    run.add_score(lowshot("orl", [17.6, 25.0, 28.3], [1, 4, 8], too_few_positives=few, not_converged=3, **left_out))
    run.add_score(result("orl", 64.0, stages={str(stage): {"mAP": 59.0 + stage} for stage in range(1, 6)}))
    run.add_score(result("stage1", 60.0, stages={"5": {"mAP": 60.0}}))
    run.add_score(result("random", 20.0))
    page = Page(run.write(stage2=False))
    assert list(page.tables)[2:] == [
        "VOC07 linear SVM: AP of each class",
        "Low-shot SVM: mAP by k",
        "Linear classification: birds: Top-1 by stage",
        "Linear classification: birds: Top-5 by stage",
        "Linear classification: objects: Top-1 by stage",
        "Linear classification: objects: Top-5 by stage",
        "Semi-supervised classification: objects: By share of labels",
        "Semi-supervised classification: objects: Best setting",
        "Semi-supervised classification: objects: Top-1 of each setting, 1 % of labels",
        "Semi-supervised classification: objects: Top-1 of each setting, 10 % of labels",
        "k-NN classification: objects: Top-1 by k",
    ]
    assert page.tables["VOC07 linear SVM: mAP by stage"] == [
        ["Model", *(f"stage {stage}" for stage in range(1, 6))],
        ["random", *"–––––"],
        ["stage1", *"––––", "60.00"],
        ["orl", "60.00", "61.00", "62.00", "63.00", "64.00"],
    ]
    assert page.tables["Low-shot SVM: mAP by k"] == [
        ["Model", "k = 1", "k = 4", "k = 8"],
        ["orl", "17.6 ± 1.0", "25.0 ± 1.0", "28.3 ± 1.0"],
    ]
    assert page.tables["Linear classification: objects: Top-5 by stage"] == [
        ["Model", *(f"stage {stage}" for stage in range(1, 6))],
        ["stage1", "41.0", "42.0", "43.0", "44.0", "45.0"],
        ["orl", "40.0", "45.0", "50.0", "53.0", "51.2"],
    ]
    name = "Semi-supervised classification: objects"
    assert page.tables[f"{name}: By share of labels"] == [
        ["Model", "top-1, 1 %", "top-1, 10 %", "top-5, 1 %", "top-5, 10 %"],
        ["stage1", "20.0 ± 0.5", "–", "40.0 ± 0.2", "–"],
        ["orl", "23.4 ± 0.5", "41.0 ± 0.5", "43.4 ± 0.2", "61.0 ± 0.2"],
    ]
    assert page.tables[f"{name}: Best setting"][1:] == [
        ["stage1", "lr 0.01, head 10", "–"],
        ["orl", "lr 0.01, head 100", "lr 0.01, head 100"],
    ]
    assert page.tables[f"{name}: Top-1 of each setting, 1 % of labels"] == [
        ["Setting", "stage1", "orl"],
        ["lr 0.01, head 10", "19.99", "–"],
        ["lr 0.1, head 10", "19.90", "–"],
        ["lr 0.01, head 100", "–", "23.39"],
        ["lr 0.1, head 100", "–", "23.30"],
    ]
    table = [["Model", "k = 20", "k = 200"], ["stage1", "30.0", "31.0"], ["orl", "33.3", "31.0"]]
    assert page.tables["k-NN classification: objects: Top-1 by k"] == table
    assert page.bold[-5:] == ["23.4 ± 0.5", "43.4 ± 0.2", "33.3", "31.0", "31.0"]
    assert page.changes[-4:] == ["+3.4", "+3.4", "+3.3", "+0.0"]  # against stage 1, where it has a score
    for note in (
        "Means over samples of the training photos ± their standard deviation.",
        "Clean protocol: costs are chosen by cross-validation",
        "Classes with fewer positives than k are left out at that k: 1 at k = 4, 3 at k = 8.",
        "No class has enough positives for k = 16, 32.",
        "orl: 3 of 90 SVM fits stopped",
        "sofa: no positive test photo",
        "5,000 photos of train to train, 1,000 of val to test, 50 classes, in data/birds.",
    ):
        assert page.text.count(note) == 1
    assert page.text.count("50 classes, in data/objects.") == 3
    assert page.text.count("Chance: 2.00.") == 4
    assert "cannot be compared" not in page.text
    drawn = chart_words(page)
    assert [{word for word in words if not re.fullmatch(r"[\d.]+", word)} for words in drawn] == [
        {"k: positive photos of a class", "mAP, percent"},
        {"epoch", "top-1, percent"},  # of birds, where there is one stage
        {"stage", "top-1, percent"},
        {"epoch", "top-1, percent"},
        {"share of labels", "top-1, percent", "1 %", "10 %"},
    ]
    assert {"1", "4", "8"} <= drawn[0]
    assert "2" not in drawn[0]
    assert "Top-1 of the last stage by epoch, in percent: stage1 24.0 to 25.0; orl 30.2 to 31.2" in page.labels
    assert capsys.readouterr().out.splitlines()[3:-1] == [
        "Low-shot SVM: orl: mAP 17.6 (k = 1) … 28.3 (k = 8)",
        "Linear classification, birds: orl: top-1 5.0 (stage 1)",
        "Linear classification, objects: stage1: top-1 25.0 (stage 5)",
        "Linear classification, objects: orl: top-1 31.2 (stage 5), best 33.0 (stage 4)",
        "Semi-supervised, objects: stage1: top-1 20.0 (1 %)",
        "Semi-supervised, objects: orl: top-1 23.4 (1 %), 41.0 (10 %)",
        "k-NN, objects: stage1: top-1 30.0 (k = 20), 31.0 (k = 200)",
        "k-NN, objects: orl: top-1 33.3 (k = 20), 31.0 (k = 200)",
    ]


def test_tasks_by_column_of_repeats(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Seeds take the place of samples and runs; what each ± means is told."""
    run = Run(tmp_path, 3, 1, size=100)
    scores = [[20.0, 30.0], [21.5, 30.5], [20.9, 33.0]]
    for seed, (first, last) in enumerate(scores):
        model = f"orl.seed{seed}"
        run.add_score(lowshot(model, [first, last], [1, 2]))
        run.add_score(semi(model, {"0.01": first, "0.1": last}, head=10 if seed < 2 else 100, runs=1))
    run.add_score(lowshot("stage1", [10.0, 15.0], [1, 2], protocol="release"))
    run.add_score(semi("stage1", {"0.01": 10.0}, runs=1))
    page = Page(run.write(stage2=False))
    means, errors = np.mean(scores, 0), np.std(scores, 0, ddof=1) / math.sqrt(3)
    cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in zip(means, errors, strict=True)]
    assert cells == ["20.8 ± 0.4", "31.2 ± 0.9"]
    low = page.tables["Low-shot SVM: mAP by k"]
    assert low[1:] == [["stage1", "1", "10.0 ± 1.0", "15.0 ± 1.0"], ["orl", "3", *cells]]
    shares = page.tables["Semi-supervised classification: objects: By share of labels"]
    assert shares[1][:4] == ["stage1", "1", "10.0", "–"]  # of a single run
    assert shares[2][:4] == ["orl", "3", *cells]
    settings = page.tables["Semi-supervised classification: objects: Best setting"]
    assert settings[2] == ["orl", "3", *["lr 0.01, head 10; lr 0.01, head 100"] * 2]
    errors_of_both = (
        "Means over seeds ± their standard errors; of models with a single seed, means over samples of the training "
        "photos ± their standard deviation."
    )
    assert page.text.count(errors_of_both) == 1
    assert page.text.count("Means over seeds ± their standard errors.") == 1
    assert "stage1: Protocol of the ORL release: the cost of each k is the best on the test photos." in page.text
    assert "orl: Clean protocol" in page.text
    assert page.text.count("Bars: ±, as in the table.") == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "Low-shot SVM: stage1: mAP 10.0 (k = 1) … 15.0 (k = 2)",
        f"Low-shot SVM: orl: mAP {cells[0]} (k = 1) … {cells[1]} (k = 2), 3 seeds",
        "Semi-supervised, objects: stage1: top-1 10.0 (1 %)",
        f"Semi-supervised, objects: orl: top-1 {cells[0]} (1 %), {cells[1]} (10 %), 3 seeds",
    ]


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, {"val_photos": 900}])
def test_models_of_a_set_that_changed_are_named(tmp_path: Path, change: dict) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    run.add_score(knn("orl", {"20": 30.0}))
    run.add_score(knn("stage1", {"20": 30.0}, **change))
    text = Page(run.write(stage2=False)).text
    assert "orl: 5,000 photos of train to train, 1,000 of val to test, 50 classes" in text
    assert "stage1: 5,000 photos" in text
    assert "their scores cannot be compared" in text


def test_scores_on_another_voc_of_the_same_size_are_told(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    for model, fingerprint in (("orl", "f"), ("stage1", "g")):
        value = result(model, 60.0)
        run.add_score({**value, "data": {**value["data"], "fingerprint": fingerprint}})
    assert "their scores cannot be compared" in Page(run.write(stage2=False)).text


def test_curves_are_bounded_and_need_two_points(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    for number in range(CURVES + 2):
        run.add_score(lowshot(f"model{number}", [1.0, 2.0], [1, 2]))
    run.add_score(linear("orl", "objects", [30.0], epochs=1))
    page = Page(run.write(stage2=False))
    assert len(page.images) == 1
    assert len(page.tables["Low-shot SVM: mAP by k"]) == 1 + CURVES + 2
    assert "2 more models are not drawn." in page.text


def without(value: dict, *keys: str) -> dict:
    """A result without the entry that the keys lead to."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return value


LOWSHOT, LINEAR = lowshot("m", [1.0, 2.0], [1, 2]), linear("m", "objects", [1.0, 2.0])
SEMI, KNN = semi("m", {"0.01": 1.0}), knn("m", {"20": 1.0})


@pytest.mark.parametrize(
    "value",
    [
        *(without(LOWSHOT, "metrics", key) for key in ("shots", "mAP", "std", "mAP_of_samples", "too_few_positives")),
        without(LOWSHOT, "settings", "downstream"),
        lowshot("m", [1.0, 2.0], [1, 2, 4]),
        lowshot("m", [], []),
        lowshot("m", [1.0], [1], protocol="other"),
        lowshot("m", [1.0], [1], std=[None]),
        lowshot("m", [1.0], [1], too_few_positives={"cat": "3"}),
        *(without(LINEAR, "metrics", key) for key in ("top1", "top5", "epochs")),
        without(LINEAR, "metrics", "epochs", 0, "top1", "2"),
        without(LINEAR, "data", "train_photos"),
        {**LINEAR, "data": []},
        {**LINEAR, "metrics": {**LINEAR["metrics"], "top1": {"one": 1.0}}},
        {**LINEAR, "metrics": {**LINEAR["metrics"], "top1": {}}},
        *(without(SEMI, "metrics", "shares", "0.01", key) for key in ("lr", "top1", "top1_std", "runs", "grid")),
        {**SEMI, "metrics": {"shares": {}}},
        {**KNN, "metrics": []},
        {**KNN, "metrics": {"top1": {"20": "high"}}},
        {**KNN, "metrics": {"top1": {}}},
        result("m", 60.0, stages={"1": {}}),
        result("m", 60.0, AP=[60.0]),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, value: dict) -> None:
    artifacts.write_json(tmp_path / "score.json", value)
    with pytest.raises(InputError, match=r"score.json: is no result of `orl evaluate \w+` \(.+\); evaluate again.$"):
        tasks({"": [str(tmp_path / "score.json")]})


def test_models_are_compared_with_the_first_orl_where_none_is_plain(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    run.add_score(result("orl-b", 60.0))
    page = Page(run.write())
    assert page.table("Model") == [["Model", "mAP", "chance"], ["orl-b", "60.00", "7.50"]]  # nothing to compare with
    run.add_score(result("orl-c", 61.0))
    assert Page(run.write()).table("Model") == [
        ["Model", "mAP", "against orl-b", "chance"],
        ["orl-b", "60.00", "", "7.50"],
        ["orl-c", "61.00", "+1.00", "7.50"],
    ]


def test_only_the_first_seed_is_drawn(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    for name in ("orl-long.seed1", "orl-long", "orl-short.seed2", "stage1"):
        run.add_metrics(name, ["global"], 3)
    page = Page(run.write(stage2=False))
    titles = [label.partition(" by epoch")[0] for label in page.labels if "by epoch" in label]
    assert titles == [
        "Loss of stage1",
        "Loss of orl-long",
        "Loss of orl-short.seed2",
        "Spread of the features",
        "Learning rate",
    ]
    assert "orl-long.seed1" not in page.text
    assert page.text.count("Other seeds are not drawn.") == 3  # not under what has no others


def test_precision_of_the_pairs(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    assert "A pair is right" not in run.write()
    run.add_pairs("pairs", precision=0.03, random_photos=0.01)
    run.add_pairs("pairs.seed1", precision=0.05, random_photos=0.02, pairs=25_000)
    run.add_pairs(ODD, random_photos=0.0)
    page = Page(run.write())
    times = np.array([3.0, 2.5])
    assert page.table("Pairs")[1:3] == [
        ["pairs", "2", "24,500", "4.00 ± 1.00", "1.50 ± 0.00", "1.50 ± 0.50",
         f"{times.mean():.2f} ± {times.std(ddof=1) / math.sqrt(2):.2f}", "25.0 ± 0.0", "8.00 ± 0.00"],
        [ODD, "1", "24,000", "3.00", "1.50", "0.00", "–", "25.0", "8.00"],
    ]  # fmt: skip
    assert "same class by an IoU of at least 0.5" in page.text
    assert (
        "Precision of pairs in percent, by number of neighbours; of all neighbours: "
        "2 % 4.00; 10 % 3.00; random boxes 1.50"
    ) in page.labels
    drawn = [words for words in chart_words(page) if "neighbours" in words]
    assert len(drawn) == 2
    assert all("precision, percent" in words and "epoch" not in words for words in drawn)
    assert page.text.count("Other seeds are not drawn.") == 1


def test_no_more_precisions_are_drawn_than_losses(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    for number in range(CHARTS + 2):
        run.add_pairs(f"pairs-{number}")
    page = Page(run.write(stage2=False))
    assert len(page.images) == CHARTS
    assert "2 more are not drawn." in page.text


def test_recall_of_repeats(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    run.add_recall("proposals", 3.0)
    run.add_recall("proposals.seed1", 4.0, method="fast")
    page = Page(run.write())
    assert page.table("Proposals")[1] == [
        "proposals", "2", "fast", "full size", "3.5 ± 0.5", "1,234", "50.0 ± 20.0", "25.0 ± 10.0", "0 (≥ 96 px)",
        "50.0 ± 20.0", "–",
    ]  # fmt: skip
    assert "Solid: IoU 0.5, dashed: IoU 0.7. Other seeds are not drawn." in page.text


def test_page_without_stage_2(tmp_path: Path) -> None:
    """A run that measures stage 1 alone; its files of stage 2 need not be there."""
    run = Run(tmp_path, 3, 1, size=100)
    for name in ("neighbors", "proposals", "correspondences"):
        (tmp_path / f"{name}.h5").unlink()
    run.add_score(result("stage1", 61.0))
    page = Page(run.write(stage2=False))
    assert page.images == []
    assert not {"RoI pairs", "Nearest neighbours", "Proposals"} & set(re.findall(r"[\w ]+", page.text))
    run.add_pairs("pairs")
    run.add_recall("proposals")
    page = Page(run.write(stage2=False))
    assert "A pair is right" in page.text
    assert "Recall of annotated objects" in page.text
    assert "cosine similarit" not in page.text
    assert not any("jpeg" in uri for uri in page.images)


def test_command_takes_all_of_stage_2_or_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    run.add_pairs("pairs")
    argv = ["report", "--run-name", "r", "--root", str(tmp_path / "photos"), "--output", str(tmp_path / "page.html")]
    argv += ["--manifest", str(tmp_path / "manifest.csv"), "--rejected", str(tmp_path / "rejected.csv")]
    argv += ["--metrics", "--scores", "--recalls", "--pairs", *run.pairs]
    with pytest.raises(SystemExit) as end:
        cli.main([*argv, "--neighbors", str(tmp_path / "neighbors.h5")])
    assert end.value.code == 2
    sentence = "orl report: --neighbors needs --proposals; name all of stage 2's files or none.\n"
    assert capsys.readouterr().err == sentence
    cli.main(argv)
    assert "A pair is right" in (tmp_path / "page.html").read_text()


def test_names_are_escaped(page: Page) -> None:
    assert "ORL run run <1> & co" in page.text
    assert f"Loss of {ODD}" in page.text
    assert any(label.startswith("Neighbour 1") and PHOTO in label and label.endswith('".jpg') for label in page.labels)
    assert "i" not in page.tags
    assert "small" not in page.tags
    assert page.tags.count("b") == len(page.bold)


def test_rejected_are_counted(page: Page) -> None:
    assert "12 photos; 25 files rejected" in page.text
    assert "bad<19>.jpg: not a JPEG & so on" in page.text
    assert "bad<20>.jpg" not in page.text


def test_matched_boxes_lie_on_the_photos() -> None:
    """A landscape photo at the left, a portrait one, lower by half its height less, at the right."""
    images = np.zeros((100, 200, 3), np.uint8), np.zeros((400, 300, 3), np.uint8)
    first, same = np.array([20, 10, 100, 50], np.int16), np.array([30, 40, 100, 200], np.int16)
    drawing = figures.pair(images, ("a", "b"), 240, [(first, same), (first + 1, same)], ["0.9", "0.8"])
    right = 240 + figures.GAP
    assert (drawing.width, drawing.height) == (right + 180, 240)
    assert drawing.places == ((0, 60, 240, 120), (right, 0, 180, 240))
    assert [(photo.width, photo.height) for photo in drawing.photos] == [(200, 100), (180, 240)]
    best, second = drawing.matches
    assert best.boxes == ((24, 72, 120, 60), (right + 18, 24, 60, 120))
    assert best.line == (144, 102, right + 18, 84)
    assert best.tags == [(24, 72), (right + 18, 24)]
    assert second.tags[1] == (right + 18 + figures.TAG, 24)  # beside that of the box it covers
    assert best.style.color != second.style.color


def test_drawn_pairs_are_those_of_the_files(made: Run, page: Page) -> None:
    manifest = artifacts.read_manifest(made.folder / "manifest.csv")
    pairs = artifacts.read_correspondences(made.folder / "correspondences.h5")
    captions: dict[str, list[str]] = {}
    for kind, _, caption in page.pairs:
        captions.setdefault(kind, []).append(caption)
    random = captions.pop("random photos")
    assert len(random) == 12
    for found in (captions["most similar RoIs"], captions["least similar RoIs"]):
        assert 1 < len(found) <= EXTREME_PAIRS
        for path in manifest.path:  # no photo leads more than one of them
            assert sum((f"of {path} and" in one) + one.endswith(f"and {path}") for one in found) <= 1
    for caption in random:  # each with its nearest neighbour
        row = next(i for i, path in enumerate(manifest.path) if f"of {path} and" in caption)
        count = pairs.pair_offsets[row * made.k + 1] - pairs.pair_offsets[row * made.k]
        assert caption == f"{count} of {count} RoI pairs of {manifest.path[row]} and {manifest.path[(row + 1) % 12]}"
    similarities = [float(value) for _, value, _ in page.pairs]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] == pytest.approx(pairs.similarity.max(), abs=1e-4)
    assert similarities[-1] == pytest.approx(pairs.similarity.min(), abs=1e-4)


def test_a_page_stays_small(tmp_path: Path) -> None:
    """With the largest attention maps, of noise, and as many models and photos as are shown."""
    run = Run(tmp_path, 60, 5, size=600)
    rng = np.random.default_rng(0)
    folder = run.add_attention("attention", MAPS)
    for path in folder.glob("*.png"):
        Image.fromarray(rng.integers(0, 256, (1500, 3000, 3), np.uint8)).save(path, compress_level=0)
    for number in range(20):
        run.add_metrics(f"orl-{number}", ["global", "intra", "inter"], 800)
        run.add_score(result(f"orl-{number}", 60.0))
        run.add_score(lowshot(f"orl-{number}", list(range(1, 9)), list(range(1, 9))))
    assert len(run.write()) < 15e6


def test_recall_of_the_proposals(tmp_path: Path) -> None:
    """A row for each variant, and a figure of no more variants than can be told apart; without any, neither."""
    run = Run(tmp_path, 3, 1, size=100)
    assert "Recall" not in Page(run.write()).text
    run.add_recall("proposals")
    run.add_recall(ODD, method="fast", long_side=300)
    for number in range(len(figures.COLORS)):
        run.add_recall(f"proposals-{number}", method="grid", long_side=300)
    page = Page(run.write())
    assert page.table("Proposals")[1:4] == [
        ["proposals", "fast", "full size", "3.2", "1,234", "30.0", "15.0", "0 (≥ 96 px)", "30.0", "–"],
        [ODD, "fast", "300", "3.2", "1,234", "70.0", "35.0", "0 (≥ 96 px)", "70.0", "–"],
        ["proposals-0", "grid", "–", "3.2", "1,234", "70.0", "35.0", "0 (≥ 96 px)", "70.0", "–"],
    ]
    assert "2 more variants are not drawn" in page.text
    assert "Solid: IoU 0.5, dashed: IoU 0.7." in page.text
    assert any(label.startswith("Recall of large objects") and f"{ODD} 70.0 and – %" in label for label in page.labels)


def test_attention_maps(tmp_path: Path) -> None:
    """The contact sheet and the first photos' figures as they are, by folder where there are several."""
    run = Run(tmp_path, 3, 1, size=100)
    assert "Attention" not in Page(run.write(stage2=False)).text
    first = run.add_attention("attention", photos=MAPS + 1)
    page = Page(run.write(stage2=False))
    files = ["contact_sheet.png", *(f"{i}.png" for i in range(MAPS))]
    encoded = [base64.b64encode((first / name).read_bytes()).decode() for name in files]
    assert page.images == [f"data:image/png;base64,{data}" for data in encoded]
    assert f"Models, left to right: random, {ODD}." in page.text
    assert f"The first {MAPS} of {MAPS + 1} photos" in page.text
    assert "part/<0>.jpg" in page.text
    assert 'width="60" height="50"' in run.write(stage2=False)
    run.add_attention("attention-b")
    page = Page(run.write(stage2=False))
    assert len(page.images) == len(files) + 3
    assert page.text.index("attention-b") < page.text.index("Each photo")


def test_same_inputs_same_bytes(made: Run) -> None:
    assert made.write("again.html") == (made.folder / "out" / "index.html").read_text()


@pytest.mark.parametrize(("count", "k"), [(2, 1), (3, 2)])
def test_smallest_run(tmp_path: Path, count: int, k: int) -> None:
    """Nothing trained, nothing evaluated, hardly a photo, one neighbour."""
    run = Run(tmp_path, count, k, size=120)
    page = Page(run.write())
    assert "No model was evaluated." in page.text
    assert "No training was recorded." in page.text
    assert len([uri for uri in page.images if "jpeg" in uri]) >= count * (1 + k)


def test_a_model_that_was_not_trained_has_no_curves(tmp_path: Path) -> None:
    """Weights that were given have a metrics.csv without rows."""
    run = Run(tmp_path)
    run.add_metrics("stage1", ["global"], 0)
    page = Page(run.write())
    assert "No training was recorded." in page.text
    run.add_metrics("orl", ["global", "intra", "inter"], 3)
    page = Page(run.write())
    assert "Loss of orl" in page.text
    assert "stage1" not in page.text


def test_odd_results(tmp_path: Path) -> None:
    """One model only, no stage 1, no classes; a training without an epoch; a photo without boxes or pairs."""
    run = Run(tmp_path, 2, 1, size=120)
    run.add_score({**result("mine", 50.0), "metrics": {"mAP": 50.0}, "data": {}})
    run.add_metrics("mine", ["global"], 0)
    listed = {"manifest": artifacts.fingerprint(tmp_path / "manifest.csv")}
    with artifacts.create(tmp_path / "proposals.h5", artifacts.PROPOSALS, {}, listed) as file:
        file["box"], file["box_offsets"] = np.zeros((0, 4), np.int16), np.zeros(3, np.int64)
    inputs = {name: artifacts.fingerprint(tmp_path / f"{name}.h5") for name in ("neighbors", "proposals")}
    with artifacts.create(tmp_path / "correspondences.h5", artifacts.CORRESPONDENCES, {}, inputs) as file:
        file["neighbor"], file["pair_offsets"] = np.array([[1], [0]], np.int32), np.zeros(3, np.int64)
        file["pair"], file["similarity"] = np.zeros((0, 2), np.uint16), np.zeros(0, np.float16)
    page = Page(run.write())
    assert page.table("Model")[1] == ["mine", "50.00", ""]
    assert page.bold == []  # nothing to compare


def test_what_an_approximate_index_finds_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, 1, size=120)
    assert "approximate index" not in run.write()
    with h5py.File(tmp_path / "neighbors.h5", "r+") as file:
        file.attrs["recall"] = "0.9871"
    assert "found by an approximate index, which finds 98.71 % of the true neighbours." in run.write()


def test_page_is_bounded(tmp_path: Path) -> None:
    """Noise, which JPEG cannot compress, and more models than are drawn."""
    run = Run(tmp_path, 10, 9, size=300, noise=True)
    for number in range(14):
        run.add_metrics(f"model{number}", ["global", "intra", "inter"], 800)
        run.add_score(result(f"model{number}", float(number), AP={f"class {i}": 1.0 for i in range(80)}))
    html = run.write()
    assert len(html.encode()) < 5e6
    assert "2 more models are not drawn" in html


def drop(name: str) -> Callable[[Run], None]:
    return lambda run: (run.folder / name).unlink()


def shorten(name: str) -> Callable[[Run], None]:
    """Replace a file by that of a run with one photo less."""

    def change(run: Run) -> None:
        other = Run(run.folder / "other", run.count - 1, run.k, size=100)
        shutil.copy(other.folder / name, run.folder / name)

    return change


def other_proposals(run: Run) -> None:
    listed = {"manifest": artifacts.fingerprint(run.folder / "manifest.csv")}
    with artifacts.create(run.folder / "proposals.h5", artifacts.PROPOSALS, {"other": 1}, listed) as file:
        file["box"], file["box_offsets"] = np.ones((3, 4), np.int16), np.arange(4)


def overwrite(name: str, text: str) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        (run.folder / name).write_text(text)

    return change


def twice(run: Run) -> None:
    run.add_score(result("stage1", 1.0))


def attention(change: Callable[[Path], Any]) -> Callable[[Run], None]:
    """A folder of attention maps with a change."""
    return lambda run: change(run.add_attention("attention"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def elsewhere(folder: Path) -> None:
    photo = {"path": "a.jpg", "file": "../attention/0.png"}
    artifacts.write_json(folder / "attention.json", {"photos": [photo], "models": ["orl"]})


def add_pairs(**metrics: Any) -> Callable[[Run], None]:
    return lambda run: run.add_pairs("pairs-b", **metrics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("manifest.csv"), "manifest.csv: no such file"),
        (drop("rejected.csv"), "rejected.csv: no such file"),
        (drop("neighbors.h5"), "neighbors.h5: no such file"),
        (drop("proposals.h5"), "proposals.h5: no such file"),
        (drop("correspondences.h5"), "correspondences.h5: no such file"),
        (drop("models/stage1/metrics.csv"), "metrics.csv: no such file"),
        (drop("score0.json"), "score0.json: no such file"),
        (drop(f'photos/{PHOTO}1".jpg'), "photo is gone"),
        (shorten("neighbors.h5"), "neighbors.h5: has 2 rows, but .*manifest.csv has 3"),
        (shorten("proposals.h5"), "proposals.h5: has 2 rows, but .*manifest.csv has 3"),
        (shorten("correspondences.h5"), "correspondences.h5: has 2 rows, but .*manifest.csv has 3"),
        (other_proposals, "correspondences.h5: was made from another proposals"),
        (overwrite("rejected.csv", "a,b\n"), "rejected.csv: has no column 'path'"),
        (overwrite("models/stage1/metrics.csv", ""), "metrics.csv: has no column 'epoch'"),
        (overwrite("models/stage1/metrics.csv", "epoch,loss,feature_std,lr\n1,x,1,1\n"), "metrics.csv: damaged"),
        (overwrite("models/stage1/metrics.csv", "epoch,loss,feature_std,lr\n1,2\n"), "metrics.csv: damaged"),
        (overwrite("score0.json", "{"), "score0.json: damaged"),
        (overwrite("score0.json", "{}"), "score0.json: is no result"),
        (
            overwrite("score0.json", '{"task": "t", "model": "m", "metrics": {}, "settings": {}, "data": {}}'),
            "score0.json: holds no mAP",
        ),
        (overwrite("recall0.json", "{"), "recall0.json: damaged"),
        (
            overwrite("recall0.json", '{"task": "t", "model": "m", "metrics": {}, "settings": {}, "data": {}}'),
            "recall0.json: is no result of `orl evaluate proposals`",
        ),
        (overwrite("pairs0.json", "{"), "pairs0.json: damaged"),
        (
            overwrite("pairs0.json", '{"task": "t", "model": "m", "metrics": {}, "settings": {}, "data": {}}'),
            r"pairs0.json: is no result of `orl evaluate pairs` \('precision'\); evaluate again.",
        ),
        (add_pairs(precision="high"), "pairs1.json: is no result of `orl evaluate pairs`"),
        (add_pairs(by_neighbors=[[0.1, 0.1, 0.1]]), "pairs1.json: is no result of `orl evaluate pairs`"),
        (add_pairs(random_rois_by_neighbors=[0.1]), "pairs1.json: is no result of `orl evaluate pairs`"),
        (lambda run: run.add_pairs("pairs"), "pairs1.json: model 'pairs' of pairs is given twice"),
        (lambda run: run.add_recall("proposals"), "recall1.json: model 'proposals' of proposals is given twice"),
        (twice, "score1.json: model 'stage1' of voc07_svm is given twice"),
        (
            lambda run: run.attention.append(str(run.folder)),
            r"is no folder of `orl attention` \(.*\); draw the maps again",
        ),
        *(
            (attention(change), r"attention: is no folder of `orl attention` \(.*\); draw the maps again.")
            for change in (
                lambda folder: (folder / "contact_sheet.png").unlink(),
                lambda folder: (folder / "1.png").write_text("no PNG"),
                lambda folder: cut(folder / "contact_sheet.png"),
                lambda folder: (folder / "attention.json").write_text("{"),
                lambda folder: (folder / "attention.json").write_text("[]"),
                lambda folder: (folder / "attention.json").write_text('{"photos": [1], "models": []}'),
                elsewhere,
            )
        ),
        (lambda run: run.add_score({**KNN, "metrics": {}}), "score1.json: is no result of `orl evaluate knn`"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, change: Callable[[Run], None], message: str) -> None:
    run = Run(tmp_path, 3, 1, size=100)
    run.add_metrics("stage1", ["global"], 2)
    run.add_score(result("stage1", 62.0))
    run.add_recall("proposals")
    run.add_pairs("pairs")
    change(run)
    with pytest.raises(InputError, match=message):
        run.write()
    assert not (tmp_path / "out").exists()
