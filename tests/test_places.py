"""Where the stages of a run and its variants lie, which of them share a folder, and what a run needs."""

from pathlib import Path

import pytest

from orl import config
from orl.places import Places, holds_boxes

PROJECT = Path(__file__).parents[1]


def places(held=None, **raw):
    return Places(config.runs(raw), "results/scenes", {} if held is None else held)


def test_a_variant_shares_the_stages_whose_settings_and_upstream_agree():
    run = places(variants={"k5": {"neighbors": {"k": 5}}})
    assert run.found("stage1", "-k5") == "results/scenes/models/stage1"
    assert run.found("proposals", "-k5") == "results/scenes/discovery/proposals.h5"
    for stage, place in {
        "neighbors": "discovery-k5/neighbors.h5",
        "correspondences": "discovery-k5/correspondences.h5",
        "stage3": "models/orl-k5",
        "voc07_svm stage3": "downstream/orl-k5/voc07_svm.json",
        "pair_precision": "downstream/pairs-k5.json",
    }.items():
        assert run.found(stage, "-k5") == f"results/scenes/{place}"
        assert run.made(stage, "-k5")[1] == "-k5"


def test_repeats_lie_in_folders_that_end_in_their_seed():
    run = places(repeats=2, variants={"b": {"stage1": {"method": "simclr"}}})
    assert run.place("stage3", "-b.seed1") == "models/orl-b.seed1"
    assert run.made("proposals", "-b.seed1")[1] == ".seed1"
    assert run.made("manifest", "-b.seed1")[1] == ""


def test_stage_1_of_a_later_round_is_the_orl_model_of_the_one_before():
    run = places(rounds=3, repeats=2, variants={"k5": {"neighbors": {"k": 5}}, "same": {}})
    assert run.found("stage1", "-round2") == "results/scenes/models/orl"
    assert run.found("stage1", "-round3.seed1") == "results/scenes/models/orl-round2.seed1"
    assert run.found("stage1", "-k5_round2") == "results/scenes/models/orl-k5"
    assert run.found("embeddings", "-k5_round3") == "results/scenes/discovery-k5_round3/embeddings.h5"
    assert run.found("proposals", "-k5_round3") == "results/scenes/discovery/proposals.h5"
    assert run.found("stage3", "-same_round3") == "results/scenes/models/orl-round3"
    assert [v for stage, v in run.trained() if stage == "stage1" and "round" in v] == []
    own = run.stages()
    assert ("stage1", "-round2") not in own
    assert own.index(("stage3", "-round2")) < own.index(("embeddings", "-round3"))
    assert ("embeddings", "-round3") in run.made_of("stage3", "-round2")
    # What decides a round is what decides those before it.
    other = places(rounds=2, stage1={"method": "simclr"})
    assert other.digest("stage3", "-round2") != run.digest("stage3", "-round2")
    assert not {place for place in run.ledger() if place.startswith("models/stage1-round")}


def test_given_weights_are_stage_1_of_the_first_round_alone():
    run = places(rounds=2, stage1={"weights": "weights.pth"})
    assert (run.given(""), run.given("-round2")) == ("weights.pth", None)
    assert "manifest" in {stage for stage, _ in run.needed}


@pytest.mark.parametrize("files", [["config"], ["scenes-evidence"], ["coco-small", "coco-small-cpu"], ["coco"]])
def test_the_ablations_can_be_laid_over_other_configs(files):
    raw = {}
    for name in (*files, "ablations"):
        raw = config.merge(raw, config.read(str(PROJECT / "config" / f"{name}.yaml")))
    run = places(**{**raw, "repeats": 1})
    asked = config.read(str(PROJECT / "config" / "ablations.yaml"))["variants"]
    # None is the run's own.
    assert {run.made("stage3", f"-{name}")[1] for name in asked} == {f"-{name}" for name in asked}
    assert {run.made("stage1", f"-{name}")[1] for name in asked} == {"", "-simclr", "-moco"}
    assert {run.made("rois", f"-{name}")[1] for name in ("k1", "ratio50", "no_global", "random_neighbors")} == {""}


def test_settings_that_another_folder_holds_are_found_there():
    held = places(variants={"k5": {"neighbors": {"k": 5}}}).ledger()
    same = {"neighbors": {"k": 5}, "variants": {"k5": {}}}
    assert places(held, **same).found("neighbors") == "results/scenes/discovery-k5/neighbors.h5"
    assert places(**same).found("neighbors") == "results/scenes/discovery/neighbors.h5"


def test_the_ledger_keeps_what_other_configs_began():
    run = places({"discovery-gone/neighbors.h5": "1"})
    ledger = run.ledger()
    assert ledger["discovery-gone/neighbors.h5"] == "1"
    assert ledger["models/orl"] == run.digest("stage3", "")
    assert run.held == {"discovery-gone/neighbors.h5": "1"}


@pytest.mark.parametrize(
    ("measure", "there", "absent"),
    [
        (["stage1"], {"manifest", "stage1", "features stage1"}, {"proposals", "stage3", "random"}),
        (["pairs"], {"correspondences", "rois", "embeddings", "stage1"}, {"stage3", "features stage1"}),
        (["orl"], {"stage3", "correspondences", "voc07_svm stage3", "knn.objects stage3"}, {"voc07_svm stage1"}),
        ([], {"manifest"}, {"stage1", "proposals", "attention"}),
    ],
)
def test_a_run_needs_what_it_measures_and_what_that_is_made_from(measure, there, absent):
    needed = {stage for stage, _ in places(measure=measure).needed}
    assert there <= needed
    assert not absent & needed


def test_given_weights_are_made_from_no_photos_and_are_no_stage_of_their_own_where_none_are_given():
    run = places(stage1={"weights": "a.pth"}, measure=["stage1"])
    assert run.made_from("stage1", "") == []
    assert not run.has("supervised", "")
    assert places(supervised="b.pth").has("supervised", "")


def test_a_labelled_set_of_one_variant_is_no_stage_of_the_others():
    run = places(variants={"b": {"downstream": {"sets": {"mine": {"root": "photos"}}}}})
    assert run.has("knn.mine stage1", "-b")
    assert not run.has("knn.mine stage1", "")
    assert run.set_root("mine", "") is None


def test_shards_that_are_complete_are_found_whatever_their_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards = {"compute": {"shards": {"rois": 2}}}
    held = places(**shards).ledger()
    folder = tmp_path / "results/scenes/discovery/rois"
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        (folder / f"{number:04}-of-0003.h5").touch()
    names = [path.rpartition("/")[2] for path in places(held, **shards).shards("rois")]
    assert names == ["0001-of-0003.h5", "0002-of-0003.h5", "0003-of-0003.h5"]
    assert len(places(**shards).shards("rois")) == 2  # nothing says that these have the settings
    assert len(places(held, **shards, rois={"size": 40}).shards("rois")) == 2


def test_boxes_are_seen_in_an_annotation_file(tmp_path):
    (tmp_path / "lists.json").write_text('{"images": []}')
    (tmp_path / "boxes.json").write_text('{"annotations": [{"bbox": [1, 2, 3, 4]}]}')
    (tmp_path / "empty.json").touch()
    assert holds_boxes(tmp_path / "boxes.json")
    assert not any(holds_boxes(tmp_path / name) for name in ("lists.json", "empty.json", "missing.json"))
