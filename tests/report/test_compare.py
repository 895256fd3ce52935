"""`orl compare`, by runs that hold configs and results alone."""

import csv
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_objects import detection, localization
from test_page import Page, knn, linear, lowshot, result, semi

from orl import artifacts, cli, config
from orl.report.compare import COLUMNS, compare

# The data need not be there.
RAW: dict[str, Any] = {
    "data": {"layout": "folder", "root": "photos"},
    "downstream": {"voc07_svm": {"root": "voc"}, "sets": {"objects": {"root": "sets"}}, "tasks": ["all"]},
}


class Runs:
    """Runs below results/ in a folder, which is the current one."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def add(self, name: str, *results: dict, **settings: Any) -> Path:
        """A run with the results of its models, whose names may tell a variant or seed; returns its folder."""
        folder = self.home / "results" / name
        artifacts.write_json(folder / "config.json", config.merge({"name": name, **RAW}, settings))
        for one in results:
            of_set = f".{one['data']['set']}" if "set" in one["data"] else ""
            of_model = f"{one['model']}/" if not one["model"].startswith("pairs") else ""
            file = f"{of_model}{one['task']}{of_set}" if of_model else one["model"].replace("pairs", "localization")
            artifacts.write_json(folder / "downstream" / f"{file}.json", one)
        return folder

    def page(self) -> Page:
        return Page((self.home / "compare" / "index.html").read_text())

    def rows(self) -> list[dict[str, str]]:
        with open(self.home / "compare" / "scores.csv", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.chdir(tmp_path)
    return Runs(tmp_path)


def scored(**scores: float) -> list[dict]:
    """Results of voc07_svm by model."""
    return [result(model, score) for model, score in scores.items()]


def fails(*argv: Any, capsys: pytest.CaptureFixture) -> str:
    """The one sentence with which the command ends."""
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", *map(str, argv)])
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line.removeprefix("orl compare: ")


def test_models_of_runs_side_by_side(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    """By model, then by run as they are named; the best of all; differences within a run."""
    runs.add(
        "a", result("orl", 64.0), result("stage1", 62.0), result("random", 20.0), measure=["random", "stage1", "orl"]
    )
    runs.add("b", result("orl", 63.0), result("stage1", 59.5), stage1={"method": "simclr"})
    cli.main(["compare", "b", "results/a/"])
    page = runs.page()
    assert page.table("Model") == [
        ["Model", "mAP", "against stage1", "against orl", "chance"],
        ["random (a)", "20.00", "−42.00", "−44.00", "7.50"],
        ["stage1 (b)", "59.50", "", "−3.50", "7.50"],
        ["stage1 (a)", "62.00", "", "−2.00", "7.50"],
        ["orl (b)", "63.00", "+3.50", "", "7.50"],
        ["orl (a)", "64.00", "+2.00", "", "7.50"],
    ]
    assert page.bold[0] == "64.00"
    assert "cannot be compared" not in page.text
    assert page.text.count("5 photos of a to train, 4 of b to test, in voc.") == 1
    assert capsys.readouterr().out.splitlines() == [
        "VOC07 linear SVM: random (a): mAP 20.00 (−42.00 against stage1, −44.00 against orl, chance 7.50)",
        "VOC07 linear SVM: stage1 (b): mAP 59.50 (−3.50 against orl, chance 7.50)",
        "VOC07 linear SVM: stage1 (a): mAP 62.00 (−2.00 against orl, chance 7.50)",
        "VOC07 linear SVM: orl (b): mAP 63.00 (+3.50 against stage1, chance 7.50)",
        "VOC07 linear SVM: orl (a): mAP 64.00 (+2.00 against stage1, chance 7.50)",
        "scores: compare/scores.csv",
        "page: compare/index.html",
    ]


def test_the_page_works_offline_and_the_same_inputs_give_the_same_bytes(runs: Runs) -> None:
    for name, score in (("a", 60.0), ("b", 61.0)):
        runs.add(name, *(lowshot(model, [score, score + 2], [1, 4]) for model in ("stage1", "orl")),
                 *scored(stage1=score, orl=score + 1))  # fmt: skip
    for output in ("compare", "again"):
        compare(["a", "b"], output)
    html = (runs.home / "compare" / "index.html").read_text()
    assert "://" not in html
    page = Page(html)  # whose tags match
    assert page.loads
    assert all(uri.startswith("data:image/svg") for uri in page.loads)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "mAP by k, in percent: stage1 (a) 60.0 to 62.0; stage1 (b) 61.0 to 63.0; orl (a)" in " ".join(page.labels)
    for name in ("index.html", "scores.csv"):
        assert (runs.home / "compare" / name).read_bytes() == (runs.home / "again" / name).read_bytes()
    assert sorted(path.name for path in (runs.home / "compare").iterdir()) == ["index.html", "scores.csv"]


def test_seeds_are_averaged_within_a_run(runs: Runs) -> None:
    values = {"a": [64.0, 65.5, 63.1], "b": [61.0, 62.0]}
    for name, scores in values.items():
        repeats = [result(f"orl.seed{seed}" if seed else "orl", score) for seed, score in enumerate(scores)]
        base = [result(f"stage1.seed{seed}" if seed else "stage1", 60.0) for seed in range(len(scores))]
        runs.add(name, *repeats, *base, repeats=len(scores))
    compare(["a", "b"], "compare")
    means = {name: np.mean(scores) for name, scores in values.items()}
    errors = {name: np.std(scores, ddof=1) / math.sqrt(len(scores)) for name, scores in values.items()}
    page = runs.page()
    assert [row[:3] for row in page.table("Model")[3:]] == [
        ["orl (a)", "3", f"{means['a']:.2f} ± {errors['a']:.2f}"],
        ["orl (b)", "2", f"{means['b']:.2f} ± {errors['b']:.2f}"],
    ]
    assert "small dots: seeds" in page.text
    assert "seed1" not in page.text.replace("stage1", "")
    found = {row["run"]: row for row in runs.rows() if (row["score"], row["model"]) == ("mAP", "orl")}
    for name, scores in values.items():
        assert found[name]["seeds"] == str(len(scores))
        assert float(found[name]["value"]) == means[name]
        assert float(found[name]["error"]) == errors[name]
        assert float(found[name]["difference_to_stage1"]) == means[name] - 60


def test_scores_csv_holds_each_number_unrounded(runs: Runs) -> None:
    """In long form; what is no number is left out."""
    runs.add("a", knn("orl", {"20": 30.123456, "200": 31.0}), knn("stage1", {"20": 30.0}), semi("orl", {"0.01": 23.4}),
             linear("orl", "objects", [5.0]))  # fmt: skip
    runs.add("b", knn("orl", {"20": 28.0}), *scored(orl=64.987654))
    compare(["a", "b"], "compare")
    text = (runs.home / "compare" / "scores.csv").read_text()
    head, *lines = text.splitlines()
    assert head.split(",") == list(COLUMNS)
    assert [line for line in lines if line.startswith("knn")] == [
        "knn,objects,Top-1 by k,k = 20,a,stage1,1,30.0,,",
        f"knn,objects,Top-1 by k,k = 20,a,orl,1,30.123456,,{30.123456 - 30}",
        "knn,objects,Top-1 by k,k = 20,b,orl,1,28.0,,",
        "knn,objects,Top-1 by k,k = 200,a,orl,1,31.0,,",
    ]
    assert "voc07_svm,,Scores,mAP,b,orl,1,64.987654,," in lines
    assert "voc07_svm,,AP of each class,cat,b,orl,1,64.987654,," in lines
    assert 'semi,objects,By share of labels,"top-1, 1 %",a,orl,1,23.4,0.5,' in lines
    assert not [line for line in lines if "Best setting" in line or ",seeds," in line or "against" in line]


def test_objects_are_found_by_run(runs: Runs) -> None:
    """Rows of object discovery go by run, also where the boxes are equal; Mask R-CNN's AP beside them."""
    (runs.home / "objects").mkdir()
    mine = {"data": {"objects": [str(runs.home / "objects")]}, "measure": ["stage1", "orl", "pairs"],
            "downstream": {"detection": {"root": "coco"}}}  # fmt: skip
    for name, score in (("a", 30.0), ("b", 40.0)):
        runs.add(name, detection("orl", score), localization("orl", lost=score),
                 localization("pairs", pairing=score, largest=7.0), **mine)  # fmt: skip
    compare(["a", "b"], "compare")
    page = runs.page()
    assert [row[:2] for row in page.tables["Object discovery: Boxes"]] == [
        ["Boxes", "CorLoc"],
        ["stage 2's pairing (a)", "30.0"],
        ["stage 2's pairing (b)", "40.0"],
        ["LOST: orl (a)", "30.0"],
        ["LOST: orl (b)", "40.0"],
        ["largest proposal (a)", "7.0"],
        ["largest proposal (b)", "7.0"],
    ]
    assert page.tables["Object detection: Box AP"][2][:3] == ["orl (b)", "40.00", "50.00"]
    found = [(row["run"], row["model"], row["value"]) for row in runs.rows() if row["score"] == "CorLoc"]
    assert found[2:4] == [("a", "LOST: orl", "30.0"), ("b", "LOST: orl", "40.0")]


@pytest.mark.parametrize("change", [{"train": 6}, {"fingerprint": "g"}])
def test_runs_on_different_data_are_named(runs: Runs, change: dict) -> None:
    for name, data in (("a", {}), ("b", {}), ("c", change)):
        found = scored(stage1=60.0, orl=61.0)
        for one in found:
            one["data"] |= {"fingerprint": "f", **data}
        runs.add(name, *found)
    compare(["a", "b", "c"], "compare")
    text = runs.page().text
    assert "run a, run b: 5 photos of a to train, 4 of b to test, in voc." in text
    assert f"run c: {change.get('train', 5)} photos of a to train, 4 of b to test, in voc." in text
    assert text.count("The models were measured on different data: their scores cannot be compared.") == 1


def test_a_model_of_a_run_on_other_data_is_named(runs: Runs) -> None:
    runs.add("a", *scored(stage1=60.0, orl=61.0))
    odd = result("orl", 62.0)
    odd["data"]["train"] = 6
    runs.add("b", odd, *scored(stage1=60.0))
    compare(["a", "b"], "compare")
    text = runs.page().text
    assert "run a, stage1 (b): 5 photos of a to train" in text
    assert "orl (b): 6 photos of a to train" in text
    assert "their scores cannot be compared" in text


def test_equal_data_in_the_folders_of_the_runs_can_be_compared(runs: Runs) -> None:
    """As the generated scenes are."""
    for name in ("a", "b"):
        found = result("orl", 60.0)
        found["data"] |= {"fingerprint": "f", "root": f"results/{name}/scenes"}
        runs.add(name, found)
    compare(["a", "b"], "compare")
    text = runs.page().text
    assert "run b: 5 photos of a to train, 4 of b to test, in results/b/scenes." in text
    assert "cannot be compared" not in text


def test_settings_in_which_runs_differ(runs: Runs) -> None:
    """After their defaults; a setting that only one has; not the name."""
    runs.add("a", *scored(orl=60.0), seed=0, stage3={"optimizer": {"epochs": 20}})
    runs.add("b", *scored(orl=60.0), variants={"r300": {"proposals": {"long_side": 300}}})
    compare(["a", "b"], "compare")
    default = config.parse(RAW).stage3.optimizer.epochs
    assert runs.page().table("Setting") == [
        ["Setting", "a", "b"],
        ["stage3.optimizer.epochs", "20", str(default)],
        ["variants.r300.proposals.long_side", "–", "300"],
    ]
    runs.add("c", *scored(orl=50.0), stage3={"optimizer": {"epochs": 20}})
    compare(["a", "c"], "compare")
    page = runs.page()
    assert "Setting" not in [rows[0][0] for rows in page.tables.values()]
    assert "The runs have the same settings but for their names." in page.text


def test_results_that_the_config_does_not_name_are_left_out(runs: Runs) -> None:
    """Those of an earlier config; what it names and is not there is counted."""
    runs.add("a", *scored(orl=60.0, stage1=50.0), result("orl-old", 70.0), measure=["orl", "random"])
    runs.add("b", *scored(orl=61.0), measure=["orl"], downstream={"tasks": ["voc07_svm"]})
    compare(["a", "b"], "compare")
    page = runs.page()
    assert [row[0] for row in page.table("Model")[1:]] == ["orl (a)", "orl (b)"]
    assert "a: 1 result in results/a, 9 not made yet" in page.text
    assert "b: 1 result in results/b\n" in page.text


def test_runs_of_one_name_go_by_their_folders(runs: Runs, tmp_path: Path) -> None:
    runs.add("a", *scored(orl=60.0))
    shutil.copytree("results", "other/results")
    compare(["a", "other/results/a"], "compare")
    assert [row[0] for row in runs.page().table("Model")[1:]] == ["orl (results/a)", "orl (other/results/a)"]
    assert {row["run"] for row in runs.rows()} == {"results/a", "other/results/a"}


def test_what_runs_are_called_is_escaped(runs: Runs) -> None:
    runs.add("a", *scored(orl=60.0))
    os.rename(runs.add("b", *scored(orl=60.0)), "results/<b>&\"x'.seed1")
    compare(["a", "<b>&\"x'.seed1"], "compare")
    page = runs.page()
    assert [row[0] for row in page.table("Model")[1:]] == ["orl (a)", "orl (<b>&\"x'.seed1)"]
    assert page.tags.count("b") == len(page.bold)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["a"], "results/a: is one run; name another to compare it with."),
        (["a", "results/a"], "results/a: is given twice; name each run once."),
        (["a", "b", "link"], "results/link: is given twice; name each run once."),
        (["a", "nowhere"], "nowhere: no such folder; name the results of a run, such as results/scenes."),
        (["a", "voc"], "voc: has no config.json, so is no run, or an old one; name one such as results/scenes."),
        (
            ["a", "old"],
            "results/old: has no config.json, so is no run, or an old one; name one such as results/scenes.",
        ),
        (
            ["a", "empty"],
            "results/empty: has no result of a downstream task; let the run evaluate its models first.",
        ),
        (["a", "wrong"], "results/wrong: config: unknown key 'sede'; did you mean 'seed'?"),
        (["a", "damaged"], "results/damaged/downstream/orl/voc07_svm.json: damaged"),
        (["a", "b", "--output", "file"], "file: is no folder, which is what is to be made there; name another."),
        (["a", "b", "--output", "file/x"], "file: is no folder, so file/x cannot be made"),
    ],
)
def test_bad_input_is_one_sentence(argv: list[str], sentence: str, runs: Runs, capsys: pytest.CaptureFixture) -> None:
    for name in ("a", "b", "old", "damaged", "wrong"):
        runs.add(name, *scored(orl=60.0))
    runs.add("empty")
    runs.add("wrong", sede=3)
    Path("results/old/config.json").unlink()
    Path("results/old/models").mkdir()
    Path("results/damaged/downstream/orl/voc07_svm.json").write_text("{")
    Path("results/link").symlink_to("a")
    Path("voc").mkdir()
    Path("file").touch()
    told = fails(*argv, capsys=capsys).replace(f"{runs.home}/", "")
    assert told.startswith(sentence)
    assert not Path("compare").exists()


def test_help_tells_of_runs_and_outputs(capsys: pytest.CaptureFixture) -> None:
    for argv in (["compare", "--help"], ["--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "orl compare [-h] [--output FOLDER] RUN [RUN ...]" in found
    assert "names below results" in found
    assert "index.html, the page, and scores.csv (default: compare, in the current folder)" in found
    assert "compare RUN RUN show the scores of several runs side by side" in found


def test_nothing_is_written_into_the_runs(runs: Runs) -> None:
    folders = [runs.add(name, *scored(orl=60.0)) for name in ("a", "b")]
    before = {path: path.read_bytes() for folder in folders for path in folder.rglob("*.json")}
    compare([str(folder) for folder in folders], "compare")
    assert {path: path.read_bytes() for path in (runs.home / "results").rglob("*") if path.is_file()} == before
