"""`orl clean RUN`: what goes, what stays, and when nothing does. That Snakemake misses nothing: tests/workflow."""

import fcntl
import json
import os
import platform
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from orl import artifacts, config
from orl.cli import main
from orl.doctor.chain import open_run
from orl.doctor.clean import plan
from orl.doctor.run import doctor

RUN = Path("results/tiny")


def names(leftovers=False):
    """What can go, relative to the run, and what stays."""
    items, kept = plan(open_run("results/tiny", [])[1], leftovers)
    return {str(path.relative_to(RUN)) for item in items for path in item.paths}, kept


def files():
    return {str(path.relative_to(RUN)) for path in RUN.rglob("*") if path.is_file()}


def set_config(**sections):
    raw = config.merge(json.loads((RUN / "config.json").read_text()), sections)
    artifacts.write_json(RUN / "config.json", raw)


STAYS = {"manifest.csv", "rejected.csv", "config.json", "variants.json",
         *(f"models/{model}/{name}" for model in ("stage1", "orl")
           for name in ("backbone.safetensors", "model.safetensors", "metrics.csv", "README.md", "state/lock")),
         *(f"discovery/{name}.h5" for name in ("embeddings", "proposals", "neighbors", "correspondences")),
         *(f"downstream/{model}/knn.mine.json" for model in ("stage1", "orl"))}  # fmt: skip


def test_nothing_is_removed_without_a_terminal_or_yes(home, capsys, monkeypatch):
    before = files()
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        main(["clean", "results/tiny"])
    out = capsys.readouterr().out
    assert "nothing is removed: there is no terminal to ask on; add --yes" in out
    assert "discovery/rois/ (2 shards): RoI features" in out
    assert files() == before


def test_what_can_be_made_again_goes_and_results_stay(home, capsys):
    main(["clean", "results/tiny", "--yes"])
    assert files() == STAYS
    assert not (RUN / "discovery/rois").exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith("results/tiny: ")
    assert doctor("results/tiny", [], 1)
    capsys.readouterr()
    main(["clean", "results/tiny", "--yes"])
    assert capsys.readouterr().out == "results/tiny: nothing to remove\n"


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("n", False), ("", False)])
def test_on_a_terminal_it_asks(home, answer, goes):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "orl", "clean", "results/tiny"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, text=True) as process:
        os.write(ours, f"{answer}\n".encode())
        out, _ = process.communicate(timeout=600)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    assert "Remove? [y/N]" in out
    assert (files() == STAYS) == goes


def test_what_is_still_needed_stays(home):
    (RUN / "discovery/correspondences.h5").unlink()
    (RUN / "discovery/proposals.h5").unlink()
    (RUN / "downstream/orl/knn.mine.json").unlink()
    found, kept = names()
    assert not [name for name in found if name.startswith(("discovery/rois", "discovery/proposals", "downstream/orl"))]
    assert "discovery/rois/ (2 shards): the pairs are not found from them yet" in kept
    assert "discovery/proposals/ (2 shards): proposals.h5 is not made from them yet" in kept


def test_what_other_settings_are_about_to_need_stays(home):
    set_config(correspondences={"ratio": 0.5})
    assert "discovery/rois/ (2 shards): the pairs are not found from them yet" in names()[1]


def test_shards_of_a_damaged_file_stay(home):
    path = RUN / "discovery/proposals.h5"
    path.write_bytes(path.read_bytes()[:-50])
    assert not [name for name in names()[0] if name.startswith("discovery/proposals")]


def test_shards_of_another_number_than_the_config_says_stay(home):
    """Without them Snakemake would find other inputs, and make again what follows."""
    set_config(compute={"shards": {"rois": 5}})
    found, kept = names()
    assert not [name for name in found if name.startswith("discovery/rois")]
    assert any("compute.shards.rois is 5 now" in line for line in kept)


def test_an_unfinished_training_keeps_its_checkpoint_and_one_of_other_settings_goes(home):
    (own,) = (path.name for path in (RUN / "models/orl/state").iterdir() if path.is_dir())
    shutil.copytree(RUN / "models/orl/state" / own, RUN / "models/orl/state/0123456789abcdef")
    (RUN / "models/orl/model.safetensors").unlink()
    found, _ = names()
    assert "models/orl/state/0123456789abcdef" in found
    assert f"models/orl/state/{own}" not in found


def test_checkpoints_beside_a_result_go_when_that_is_there(home):
    for task in ("linear.mine", "detection"):
        (RUN / f"downstream/orl/{task}.json.state/0123456789abcdef").mkdir(parents=True)
    (RUN / "downstream/orl/detection.json").write_text("{}")
    assert {name for name in names()[0] if ".state/" in name} == {
        "downstream/orl/detection.json.state/0123456789abcdef"
    }


def test_a_damaged_model_keeps_its_checkpoint(home):
    path = RUN / "models/stage1/backbone.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert not [name for name in names()[0] if name.startswith("models/stage1/state")]


def test_temporary_files_of_dead_processes_go_and_those_of_living_ones_stay(home):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):
        (RUN / f".manifest.csv.{platform.node()}-{pid}-abc.tmp").touch()
    assert {name for name in names()[0] if name.endswith(".tmp")} == {
        f".manifest.csv.{platform.node()}-{ended.pid}-abc.tmp"
    }


def test_results_of_earlier_configs_go_only_when_asked_for(home):
    shutil.copytree(RUN / "downstream/orl", RUN / "downstream/orl-gone")
    assert "downstream/orl-gone" not in names()[0]
    main(["clean", "results/tiny", "--yes", "--leftovers"])
    assert files() == STAYS


def test_nothing_behind_a_link_is_removed(home, tmp_path):
    elsewhere = tmp_path / "disk" / "rois"
    shutil.move(RUN / "discovery/rois", elsewhere)
    (RUN / "discovery/rois").symlink_to(elsewhere)
    single = tmp_path / "features.h5"
    shutil.move(RUN / "downstream/orl/mine.features.h5", single)
    (RUN / "downstream/orl/mine.features.h5").symlink_to(single)
    found, kept = names()
    assert "downstream/orl/mine.features.h5" not in found
    assert "discovery/rois/ (2 shards): lies behind a link, outside of the run" in kept
    main(["clean", "results/tiny", "--yes"])
    assert len(list(elsewhere.iterdir())) == 2
    with h5py.File(single) as file:
        assert "train" in file


@pytest.mark.parametrize("working", ["training", "snakemake"])
def test_it_refuses_while_something_works_there(home, capsys, working):
    before = files()
    with open(RUN / "models/orl/state/lock", "w") as lock:
        if working == "training":
            fcntl.flock(lock, fcntl.LOCK_EX)
        else:
            Path(".snakemake/locks").mkdir(parents=True)
            Path(".snakemake/locks/0.input.lock").write_text("results/tiny/manifest.csv\n")
        with pytest.raises(SystemExit) as ended:
            main(["clean", "results/tiny", "--yes"])
    assert ended.value.code == 2
    sentence = {
        "training": "results/tiny/models/orl/state: a training runs there; wait for it or stop it.",
        "snakemake": "results/tiny: Snakemake works there, or was killed; wait for it, or type `snakemake --unlock`.",
    }[working]
    assert capsys.readouterr().err == f"orl clean: {sentence}\n"
    assert files() == before
