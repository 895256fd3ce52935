"""The ablations of a page: which variants ask the same question, and what they answer."""

import json
from pathlib import Path

import pytest
from test_page import Page, Run, chart_words, knn, result

from orl import config
from orl.report.ablations import ablations

VARIANTS = {
    "k20": {"measure": ["pairs", "orl"], "neighbors": {"k": 20}},
    "no_inter": {"measure": ["orl"], "stage3": {"inter_weight": 0}},
    "two": {"measure": ["orl"], "neighbors": {"k": 5}, "correspondences": {"ratio": 0.5}},
    "k5": {"measure": ["pairs", "orl"], "neighbors": {"k": 5}},
    "simclr": {"stage1": {"method": "simclr"}},
    "regions": {"measure": ["orl"], "stage3": {"global_weight": 0, "inter_weight": 0}},
    "half": {"stage1": {"optimizer": {"epochs": 9}}},  # of stage 3, too
    "same": {"neighbors": {"k": 10}},
    "seeds": {"seed": 5},
    "other": {"measure": ["stage1"], "stage1": {"method": "moco"}},
    "tasks": {"downstream": {"knn": {"k": [3]}}},  # which decides no SVM
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with two seeds of some models."""
    found = Run(tmp_path)
    for model, score in {
        "random": 20.0,
        "stage1": 60.0,
        "orl": 62.0,
        "orl.seed1": 64.0,
        "orl-k5": 61.0,
        "orl-k5.seed1": 61.5,
        "orl-k20": 64.5,
        "orl-no_inter": 58.0,
        "orl-two": 65.0,
        "orl-simclr": 59.0,
        "orl-regions": 57.0,
        "orl-half": 55.0,
        "orl-seeds": 66.0,
        "stage1-other": 50.0,
    }.items():
        found.add_score(result(model, score))
    for name, share in {"": 0.03, ".seed1": 0.05, "-k5": 0.02, "-simclr": 0.01}.items():
        found.add_pairs(f"pairs{name}", precision=share)
    return found


def page_of(run: Run, **raw: object) -> Page:
    (run.folder / "config.json").write_text(json.dumps(raw))
    return Page(run.write(stage2=False, results=str(run.folder)))


def test_variants_stand_by_what_they_change_and_its_value(run: Run) -> None:
    page = page_of(run, repeats=2, variants=VARIANTS)
    assert page.tables["Ablations"] == [
        ["Setting", "score", "against orl", "precision of the pairs", "seeds", "model"],
        ["neighbors.k: 5", "61.25 ± 0.25", "−1.75 ± 1.03", "2.00", "2", "orl-k5"],
        ["neighbors.k: 10 (the run's own)", "63.00 ± 1.00", "", "4.00 ± 1.00", "2", "orl"],
        ["neighbors.k: 20", "64.50", "+1.50", "–", "1", "orl-k20"],
        ["the run's own", "63.00 ± 1.00", "", "4.00 ± 1.00", "2", "orl"],
        ["stage3.inter_weight: 0", "58.00", "−5.00", "4.00 ± 1.00", "1", "orl-no_inter"],
        ["stage3.global_weight: 0, stage3.inter_weight: 0", "57.00", "−6.00", "4.00 ± 1.00", "1", "orl-regions"],
        ["stage1.method: byol (the run's own)", "63.00 ± 1.00", "", "4.00 ± 1.00", "2", "orl"],
        ["stage1.method: simclr", "59.00", "−4.00", "1.00", "1", "orl-simclr"],
        ["the run's own", "63.00 ± 1.00", "", "4.00 ± 1.00", "2", "orl"],
        ["neighbors.k: 5, correspondences.ratio: 0.5", "65.00", "+2.00", "–", "1", "orl-two"],
        ["stage1.optimizer.epochs: 9, stage3.optimizer.epochs: 9", "55.00", "−8.00", "–", "1", "orl-half"],
    ]
    assert "VOC07 linear SVM, mAP, in percent." in page.text
    assert "Neighbours per photo; clipped to the number of other photos." in page.text
    assert "Dashed: stage 1, 60.00. Bars: ± 2 standard errors" in page.text
    label = (
        "neighbors.k, VOC07 linear SVM, mAP, in percent: neighbors.k: 5 61.25 ± 0.25; neighbors.k: 10 (the run's own) "
        "63.00 ± 1.00; neighbors.k: 20 64.50"
    )
    assert label in page.labels
    drawn = [words for words in chart_words(page) if "value" in words or "setting" in words]
    assert len(drawn) == 4
    assert {"5", "10", "20"} <= drawn[0]
    assert {"1", "2", "3"} <= drawn[1]
    for legend in ("1: the run's own", "2: stage3.inter_weight: 0", "2: stage1.method: simclr"):
        assert legend in page.text


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"variants": {"long": {"measure": ["stage1"], "stage1": {"optimizer": {"epochs": 9}}}}},
        {"variants": {"same": {"neighbors": {"k": 10}}}},
        {"variants": {"k7": {"neighbors": {"k": 7}}}},  # not made yet
    ],
)
def test_without_variants_of_stage_3_nothing_is_asked(run: Run, raw: dict) -> None:
    assert ablations(raw, run.scores, run.pairs) is None


def test_without_the_runs_own_there_is_nothing_to_compare_with(run: Run) -> None:
    run.scores = [path for path in run.scores if '"orl"' not in Path(path).read_text()]
    assert ablations({"variants": VARIANTS}, run.scores, run.pairs) is None


def test_one_seed_without_pairs_by_the_first_task_there_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for model, score in (("orl", 40.0), ("orl-few", 38.0), ("orl-random", 39.0)):
        run.add_score(knn(model, {"5": 10.0, "20": score}))
    variants = {
        "random": {"measure": ["orl"], "proposals": {"method": "random"}},
        "few": {"measure": ["orl"], "proposals": {"long_side": 64}},
    }
    page = page_of(run, variants=variants)
    assert page.tables["Ablations"] == [
        ["Setting", "score", "against orl", "model"],
        ["proposals.method: fast (the run's own)", "40.00", "", "orl"],
        ["proposals.method: random", "39.00", "−1.00", "orl-random"],
        ["proposals.long_side: not given (the run's own)", "40.00", "", "orl"],
        ["proposals.long_side: 64", "38.00", "−2.00", "orl-few"],
    ]
    assert "k-NN classification: objects, top-1 (k = 20), in percent." in page.text
    assert "One seed" in page.text


def test_a_variant_is_found_by_the_name_of_another_with_equal_settings(run: Run) -> None:
    raw = {"variants": {"five": {"neighbors": {"k": 5}}, "k5": {"neighbors": {"k": 5}}}}
    found = ablations(raw, run.scores, run.pairs)
    assert found
    assert [(row.model, row.score, row.precision) for row in found.questions[0].rows][:2] == [
        ("orl-five", "61.00", "2.00"),
        ("orl-k5", "61.00", "2.00"),
    ]


def test_given_weights_are_one_setting(run: Run) -> None:
    found = ablations({"variants": {"k5": {"stage1": {"weights": "a.pth"}}}}, run.scores, run.pairs)
    assert found
    assert [row.setting for row in found.questions[0].rows] == [
        "stage1.weights: not given (the run's own)",
        "stage1.weights: a.pth",
    ]


def test_settings_are_described_as_in_the_table_of_keys() -> None:
    assert config.description("neighbors.k").startswith("Neighbours per photo")
    assert config.description("losses of stage 3") == ""
    assert config.description("downstream.sets.mine.root").startswith("Folder of the set")
