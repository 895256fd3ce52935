"""`orl doctor RUN`: each kind of damage and staleness is named, with the command that mends it."""

import base64
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
from PIL import Image

from orl import InputError, artifacts, config
from orl.cli import main
from orl.doctor.chain import open_run
from orl.doctor.run import doctor

RUN = Path("results/tiny")
AGAIN = "snakemake --cores all --configfile results/tiny/config.json"


class Line(NamedTuple):
    mark: str
    text: str
    command: str


class Told(NamedTuple):
    sound: bool
    lines: dict[str, Line]
    last: str
    out: str

    def bad(self):
        return {what: line for what, line in self.lines.items() if line.mark in ("stale", "damaged", "missing")}


@pytest.fixture
def examine(home, capsys):
    def run(*configs):
        sound = doctor("results/tiny", configs, 1)
        out = capsys.readouterr().out
        found = re.findall(r"^(ok|stale|damaged|missing|note) +(.+?): (.*)\n(?: {11}(.+)\n)?", out, re.MULTILINE)
        return Told(sound, {what: Line(mark, *rest) for mark, what, *rest in found}, out.splitlines()[-1], out)

    return run


def change(path, sealed=False, **datasets):
    """Write into datasets of an HDF5 file: name -> (place, value); as if they had been made so, unless `sealed`."""
    with h5py.File(RUN / path, "r+") as file:
        for name, (place, value) in datasets.items():
            file[name][place] = value
            if not sealed:
                file[name].attrs.pop("sha256", None)


def cut(path, left=-100):
    content = (RUN / path).read_bytes()
    (RUN / path).write_bytes(content[:left])


def set_config(**sections):
    raw = config.merge(json.loads((RUN / "config.json").read_text()), sections)
    artifacts.write_json(RUN / "config.json", raw)


def test_a_sound_run_that_is_not_finished(examine):
    told = examine()
    assert told.sound
    assert not told.bad()
    assert told.lines["manifest.csv"] == Line("ok", "10 photos, 0 rejected", "")
    assert told.lines["discovery/rois/"].text == "2 shards"
    assert told.lines["report/index.html"] == Line("note", "not made yet", "")
    assert told.out.splitlines()[-2].strip() == AGAIN
    assert told.last == "results/tiny: 20 ok, 4 notes"
    states = [line.text for what, line in told.lines.items() if "/state/" in what]
    assert all(re.fullmatch(r"of the model that is there, step 2, \d+ MB", text) for text in states)
    assert len(states) == 2


def attribute(path, **attributes):
    with h5py.File(RUN / path, "r+") as file:
        artifacts.note(file, attributes)


def not_finite(path):
    """Weights of which one number is not finite."""
    from safetensors.numpy import load_file, save_file

    tensors, metadata = load_file(RUN / path), {"orl": json.dumps(artifacts.attributes(RUN / path))}
    tensors["bn1.weight"][3] = np.nan
    save_file(tensors, RUN / path, metadata)


def drop(path, name):
    with h5py.File(RUN / path, "r+") as file:
        del file[name]


FORCE = f"{AGAIN} --forcerun "
ROI = "discovery/rois/0002-of-0002.h5"
DAMAGE = {
    "a cut file": ("discovery/neighbors.h5", lambda path: cut(path), "damaged or not such", FORCE + "neighbors"),
    "an empty file": ("discovery/neighbors.h5", lambda path: cut(path, 0), "damaged or not such", FORCE + "neighbors"),
    "numbers that changed on the disk": (
        "discovery/neighbors.h5", lambda path: change(path, sealed=True, similarity=((4, 1), 0.5)),
        "the bytes of similarity are not those that were written", FORCE + "neighbors"),
    "a photo that is its own neighbour": (
        "discovery/neighbors.h5", lambda path: change(path, index=((4, 1), 4)), "photo 4 is its own neighbour",
        FORCE + "neighbors"),
    "a neighbour that is none": (
        "discovery/neighbors.h5", lambda path: change(path, index=((4, 1), 10)), "holds 10, but there are 10 photos",
        FORCE + "neighbors"),
    "similarities in another order": (
        "discovery/neighbors.h5", lambda path: change(path, similarity=((0, 0), -1)), "not the best first",
        FORCE + "neighbors"),
    "a box outside its photo": (
        "discovery/proposals.h5", lambda path: change(path, box=((7, 0), 500)), "is not inside its photo",
        FORCE + "propose"),
    "offsets that fall": (
        "discovery/proposals.h5", lambda path: change(path, box_offsets=(3, 99)), "box_offsets does not rise from 0",
        FORCE + "propose"),
    "a pair of a box that is not there": (
        "discovery/correspondences.h5", lambda path: change(path, pair=((5, 1), 77)), "has no such box",
        FORCE + "correspond"),
    "embeddings that are not of unit length": (
        "discovery/embeddings.h5", lambda path: change(path, embedding=(2, 0.5)), "row 2 has length 1.41, not 1",
        FORCE + "embed"),
    "a missing dataset": (
        "discovery/correspondences.h5", lambda path: drop(path, "pair"), "damaged or not such", FORCE + "correspond"),
    "settings that are not those of the fingerprint": (
        "discovery/neighbors.h5", lambda path: attribute(path, settings="{}"), "its attributes do not belong together",
        FORCE + "neighbors"),
    "a schema of another version": (
        "discovery/neighbors.h5", lambda path: attribute(path, **artifacts.stamp("orl.neighbors/0", {}, {})),
        "holds 'orl.neighbors/0', but 'orl.neighbors/1' is needed", FORCE + "neighbors"),
    "RoI features that are not of unit length": (
        ROI, lambda path: change(path, feature=(0, 0)), "feature: row 0 has length 0, not 1", f"rm {RUN / ROI}"),
    "a shard under the name of another": (
        ROI, lambda path: shutil.copy(RUN / path.replace("2-of", "1-of"), RUN / path), "not those of its name",
        f"rm {RUN / ROI}"),
    "features of labelled photos": (
        "downstream/orl/mine.features.h5", lambda path: cut(path), "damaged or not such",
        f"rm {RUN / 'downstream/orl/mine.features.h5'}"),
    "cut weights": ("models/orl/model.safetensors", lambda path: cut(path), "damaged or not such", FORCE + "stage3"),
    "weights that are not finite": (
        "models/orl/backbone.safetensors", not_finite, "bn1.weight holds numbers that are not", FORCE + "stage3"),
    "metrics without an epoch": (
        "models/orl/metrics.csv", lambda path: cut(path, (RUN / path).read_text().index("\n") + 1),
        "does not have a row of numbers for each of 1 epochs", FORCE + "stage3"),
    "a cut result": (
        "downstream/orl/knn.mine.json", lambda path: cut(path), "damaged or not such",
        FORCE + "results/tiny/downstream/orl/knn.mine.json"),
    "a manifest without its header": (
        "manifest.csv", lambda path: (RUN / path).write_text("a\n"), "its columns are ['a']", FORCE + "manifest"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_what_mends_it(examine, kind):
    what, damage, text, command = DAMAGE[kind]
    damage(what)
    told = examine()
    assert not told.sound
    assert told.lines[what].mark == "damaged"
    assert text in told.lines[what].text
    assert told.lines[what].command == command
    assert "damaged" not in {line.mark for other, line in told.lines.items() if other != what}


def test_a_damaged_checkpoint_is_to_be_deleted(examine):
    (path,) = RUN.glob("models/orl/state/*/checkpoint.pt")
    content = path.read_bytes()
    path.unlink()  # it is a link
    path.write_bytes(content[:5000])
    line = examine().bad()[str(path.parent.relative_to(RUN))]
    assert (line.mark, line.command) == ("damaged", f"rm -r {path.parent} && {AGAIN}")


def test_what_can_only_be_trained_from_the_start_is_said(examine):
    shutil.rmtree(RUN / "models/orl/state")
    cut("models/orl/model.safetensors")
    told = examine()
    assert told.lines["models/orl/model.safetensors"].text.endswith(
        "(trained again from the start: its checkpoint is gone)"
    )
    assert told.lines["models/orl/metrics.csv"].mark == "ok"


def test_what_a_command_deletes_is_then_no_more_named(examine):
    cut(ROI)
    command = examine().lines[ROI].command
    subprocess.run(command, shell=True, check=True)
    told = examine()
    assert told.sound
    assert told.lines["discovery/rois/"].text == "1 shard"


@pytest.mark.parametrize(
    ("path", "mark", "command"),
    [
        ("discovery/correspondences.h5", "missing", AGAIN),
        ("discovery/proposals.h5", "missing", AGAIN),
        ("models/orl/model.safetensors", "missing", FORCE + "stage3"),
        ("models/stage1/metrics.csv", "missing", FORCE + "stage1"),
        ("rejected.csv", "missing", FORCE + "manifest"),
        ("discovery/embeddings.h5", "note", ""),
        ("downstream/orl/mine.features.h5", "note", ""),
        ("downstream/orl/knn.mine.json", "note", ""),
    ],
)
def test_what_is_removed_is_missing_where_snakemake_misses_it(examine, path, mark, command):
    (RUN / path).unlink()
    told = examine()
    assert (told.lines[path].mark, told.lines[path].command) == (mark, command)
    assert told.sound == (mark == "note")
    assert len(told.bad()) == (mark == "missing")  # what was made from it is as good as before


def test_a_result_of_a_finished_run_is_missing(examine):
    (RUN / "report").mkdir()
    (RUN / "report" / "index.html").write_text("<html></html>\n")
    assert examine().sound
    (RUN / "downstream/orl/knn.mine.json").unlink()
    assert examine().lines["downstream/orl/knn.mine.json"] == Line("missing", "it was removed", AGAIN)
    (RUN / "report" / "index.html").write_text("<html>")
    assert examine().lines["report/index.html"].command == FORCE + "report"


def test_a_page_that_is_older_than_what_it_shows_is_stale(examine):
    (RUN / "report").mkdir()
    page, score = RUN / "report" / "index.html", RUN / "downstream/orl/knn.mine.json"
    page.write_text("<html></html>\n")
    os.utime(page, (score.stat().st_mtime - 10,) * 2)
    line = examine().lines["report/index.html"]
    assert (line.mark, line.command) == ("stale", FORCE + "report")
    assert "which it shows" in line.text


def test_a_card_of_other_weights_or_older_than_the_scores_is_stale(examine):
    path, score = RUN / "models/orl/README.md", RUN / "downstream/stage1/knn.mine.json"
    text = path.read_text()
    assert examine().lines["models/orl/README.md"].mark == "ok"
    path.write_text(text.replace(artifacts.fingerprint(RUN / "models/orl/backbone.safetensors"), "0"))
    command = f"{FORCE}results/tiny/models/orl/README.md"
    expected = Line("stale", "cut off, or of other weights than those there", command)
    assert examine().bad() == {"models/orl/README.md": expected}
    path.write_text(text)
    os.utime(path, (score.stat().st_mtime - 10,) * 2)
    line = examine().lines["models/orl/README.md"]
    assert (line.mark, line.command) == ("stale", command)
    assert "of which it tells" in line.text
    path.unlink()
    assert examine().lines["models/orl/README.md"] == Line("note", "not there", "")


# Settings and inputs


def test_settings_that_differ_are_named_with_both_values_and_all_that_follows_is_stale(examine):
    set_config(neighbors={"k": 2})
    told = examine()
    assert told.lines["discovery/neighbors.h5"] == Line("stale", "neighbors.k: 3, config 2", FORCE + "neighbors")
    follows = Line("stale", "made from discovery/neighbors.h5, which is stale", "")
    assert told.lines["discovery/correspondences.h5"] == follows
    assert (
        told.lines["models/orl/backbone.safetensors"].text == "made from discovery/correspondences.h5, which is stale"
    )
    assert set(told.bad()) == {
        "discovery/neighbors.h5",
        "discovery/correspondences.h5",
        "models/orl/backbone.safetensors",
        "models/orl/README.md",
        "downstream/orl/mine.features.h5",
        "downstream/orl/knn.mine.json",
    }


def test_another_list_of_photos_makes_all_that_follows_stale_and_nothing_damaged(examine):
    (Path("photos") / "000000000000.jpg").unlink()
    main(["manifest", "--settings", str(RUN / "config.json"), "--root", "photos", "--output", str(RUN / "manifest.csv"),
          "--rejected", str(RUN / "rejected.csv")])  # fmt: skip
    told = examine()
    assert {line.mark for line in told.bad().values()} == {"stale"}
    assert told.lines["discovery/proposals/"].text == "2 shards: made from another manifest.csv than the one there"
    assert told.lines["discovery/correspondences.h5"].text == "made from discovery/neighbors.h5, which is stale"


def test_another_config_tells_what_it_would_make_again(examine):
    other = config.merge(json.loads((RUN / "config.json").read_text()), {"stage1": {"optimizer": {"epochs": 2}}})
    artifacts.write_json("other.yaml", other)
    artifacts.write_json("over it.yaml", {"proposals": {"top_n": 5}, "stage3": {"patch": 16}})
    told = examine("other.yaml", "over it.yaml")
    command = "snakemake --cores all --configfile other.yaml 'over it.yaml' --forcerun "
    model = told.lines["models/stage1/backbone.safetensors"]
    assert model == Line("stale", "stage1.optimizer.epochs: 1, config 2", command + "stage1")
    assert told.lines["discovery/proposals.h5"] == Line("stale", "proposals.top_n: 6, config 5", command + "propose")
    assert "stage3.optimizer.epochs: 1, config 2; stage3.patch: 24, config 16" in told.out
    assert f"{command}stage1 propose stage3" in told.out
    assert examine().sound


def test_a_stage_whose_code_gives_other_results_is_stale(examine, monkeypatch):
    monkeypatch.setitem(config.RESULT_VERSION, "knn", 7)
    line = examine().bad()["downstream/orl/knn.mine.json"]
    assert line.text == "result version 1, this orl makes 7"
    assert line.command.endswith(" --forcerun results/tiny/downstream/orl/knn.mine.json")


def test_a_file_that_was_made_again_makes_stale_what_was_made_from_the_one_before(examine):
    set_config(neighbors={"k": 2})
    main(["neighbors", "--settings", str(RUN / "config.json"), "--manifest", str(RUN / "manifest.csv"), "--embeddings",
          str(RUN / "discovery/embeddings.h5"), "--output", str(RUN / "discovery/neighbors.h5")])  # fmt: skip
    told = examine()
    assert told.lines["discovery/neighbors.h5"].mark == "ok"
    line = told.lines["discovery/correspondences.h5"]
    assert line.text == "made from another discovery/neighbors.h5 than the one there"
    assert line.command == FORCE + "correspond"


def test_another_manifest_makes_all_stale_that_was_made_from_it(examine):
    lines = (RUN / "manifest.csv").read_text().splitlines(keepends=True)
    (RUN / "manifest.csv").write_text("".join(lines[:-1]))
    told = examine()
    assert told.lines["manifest.csv"].mark == "ok"
    assert "made from another manifest.csv" in told.lines["models/stage1/backbone.safetensors"].text
    assert "made from another manifest.csv" in told.lines["discovery/proposals.h5"].text
    assert told.lines["photos in photos"].text.startswith("1 neither in the manifest nor in rejected.csv")


def test_labels_that_changed_make_what_was_measured_on_them_stale(examine):
    shutil.copy("labelled/train/a/000000000000.jpg", "labelled/train/b/other.jpg")
    told = examine()
    assert told.lines["downstream/orl/mine.features.h5"].text == "made of other labelled photos than those there"
    assert "measured on other labels than those there" in told.lines["downstream/orl/knn.mine.json"].text
    shutil.rmtree("labelled")
    told = examine()
    assert told.lines["labelled photos of mine"].mark == "missing"
    assert "no such folder" in told.lines["labelled photos of mine"].text
    assert told.lines["downstream/orl/knn.mine.json"].mark == "ok"


def test_what_a_config_does_not_ask_for_is_a_note(examine):
    set_config(measure=["stage1"], neighbors={"k": 2})
    told = examine()
    assert told.sound
    line = told.lines["discovery/neighbors.h5"]
    assert line.mark == "note"
    assert line.text.startswith("stale, but this config does not ask for it (neighbors.k: 3")


def test_variants_and_repeats_are_mended_by_their_files(examine):
    """Not by the name of a rule, which would make all of them again."""
    set_config(repeats=2, variants={"k2": {"neighbors": {"k": 2}}})
    told = examine()
    assert told.sound
    assert {"discovery-k2/neighbors.h5", "models/orl.seed4", "models/orl-k2.seed4"} <= set(told.lines)
    cut("discovery/proposals.h5")
    cut("models/stage1/backbone.safetensors")
    told = examine()
    files = "results/tiny/discovery/proposals/{0001..0002}-of-0002.h5"
    assert told.lines["discovery/proposals.h5"].command == FORCE + files
    assert told.lines["models/stage1/backbone.safetensors"].command == (
        FORCE + "results/tiny/models/stage1/backbone.safetensors"
    )


# Photos


def test_photos_are_compared_with_the_manifest(examine, capsys):
    missing, changed, other, touched = sorted(map(str, Path("photos").rglob("*.jpg")))[:4]
    later = (RUN / "manifest.csv").stat().st_mtime + 10
    Path(missing).unlink()
    with open(changed, "ab") as file:
        file.write(b"more")
    size = os.path.getsize(other)
    Image.new("RGB", (70, 70)).save(other)
    with open(other, "ab") as file:
        file.write(bytes(size - os.path.getsize(other)))
    for path in (other, touched):
        os.utime(path, (later, later))
    shutil.copy(touched, "photos/new one.jpg")
    told = doctor("results/tiny", [], 1), capsys.readouterr().out
    assert not told[0]
    names = f"{changed[7:]}, {other[7:]}"
    for text in (
        f"missing  photos in photos: 1 of the manifest are not there ({missing[7:]}); bring back",
        f"stale    photos in photos: 2 changed since the manifest was made ({names})\n           {FORCE}manifest",
        f"stale    photos in photos: 1 neither in the manifest nor in rejected.csv (new one.jpg)\n           {FORCE}",
        f"note     photos in photos: 1 written since the manifest was made, of the same size ({touched[7:]})\n",
    ):  # fmt: skip
        assert text in told[1]


def test_photos_that_were_rejected_are_not_new(examine):
    Path("photos/broken.jpg").write_bytes(b"no photo")
    assert examine().lines["photos in photos"].mark == "stale"
    artifacts.write_csv(RUN / "rejected.csv", artifacts.REJECTED_COLUMNS, [("broken.jpg", "damaged")])
    assert examine().sound


def test_photos_whose_folder_is_gone(examine):
    shutil.rmtree("photos")
    told = examine()
    assert told.lines["photos in photos"].mark == "missing"
    assert not told.sound


# What else lies there


def test_a_training_that_runs_is_not_damaged(examine):
    for name in ("backbone.safetensors", "model.safetensors", "metrics.csv"):
        (RUN / "models/orl" / name).unlink()
    with open(RUN / "models/orl/state/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = examine()
    assert told.sound
    assert told.lines["models/orl"] == Line("note", "a training runs there", "")
    assert told.lines["models/orl/state"].text == "a training holds its lock"
    assert "an unfinished training, which goes on from it, step 2" in examine().out


def test_a_checkpoint_of_other_settings_is_a_left_over(examine):
    (path,) = RUN.glob("models/orl/state/*/checkpoint.pt")
    path.parent.rename(path.parent.with_name("0123456789abcdef"))
    line = examine().lines["models/orl/state/0123456789abcdef"]
    assert line.mark == "note"
    assert line.text.startswith("a left-over of other settings, inputs or versions, step 2, ")


def test_temporary_files_of_dead_processes_are_to_be_deleted(examine):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive, far = (
        RUN / "discovery" / f".neighbors.h5.{host}-{pid}-ab_c1.tmp"
        for host, pid in ((platform.node(), ended.pid), (platform.node(), os.getpid()), ("elsewhere", 1))
    )
    for path in (dead, alive, far):
        path.write_bytes(b"12")
    told = examine()
    assert told.sound
    text = "temporary, 2 B, left by a process that has ended"
    assert told.lines[str(dead.relative_to(RUN))] == Line("note", text, f"rm {dead}")
    assert told.lines[str(alive.relative_to(RUN))].text == "temporary, 2 B, being written"
    assert told.lines[str(far.relative_to(RUN))].text == "temporary, 2 B, being written"
    os.utime(far, (1, 1))
    assert examine().lines[str(far.relative_to(RUN))].command == f"rm {far}"


def test_results_of_earlier_configs_are_noted_with_their_size(examine):
    shutil.copytree(RUN / "models/orl", RUN / "models/orl-gone")
    shutil.copytree(RUN / "discovery", RUN / "discovery-gone")
    shutil.copytree(RUN / "downstream/orl", RUN / "downstream/orl.seed9")
    (RUN / "downstream/pairs-gone.json").write_text("{}")
    shutil.copy(RUN / "downstream/orl/knn.mine.json", RUN / "downstream/orl/knn.theirs.json")
    told = examine()
    assert told.sound
    found = {what for what, line in told.lines.items() if "of an earlier config" in line.text}
    assert found == {"models/orl-gone", "discovery-gone", "downstream/orl.seed9", "downstream/pairs-gone.json",
                     "downstream/orl/knn.theirs.json"}  # fmt: skip
    assert re.match(r"of an earlier config, \d+ MB; ", told.lines["models/orl-gone"].text)


def test_snakemake_that_was_killed(examine):
    """Its lock, and the files that it was making."""
    made = "results/tiny/discovery/neighbors.h5"
    for name in ("locks", "incomplete"):
        (Path(".snakemake") / name).mkdir(parents=True)
    Path(".snakemake/locks/0.output.lock").write_text(f"{made}\n")
    mark = Path(".snakemake/incomplete") / base64.urlsafe_b64encode(made.encode()).decode()
    mark.write_text("{}")
    out = examine().out
    assert "stale    Snakemake: was killed, or works on another machine" in out
    assert "           snakemake --unlock\n" in out
    assert (
        f"damaged  discovery/neighbors.h5: Snakemake began to make it and was stopped\n           {AGAIN} --rerun-inc"
        in out
    )
    Path(".snakemake/locks/0.output.lock").write_text("results/other/manifest.csv\n")
    mark.rename(mark.with_name(base64.urlsafe_b64encode(b"results/other/manifest.csv").decode()))
    assert examine().sound  # another run's


def test_snakemake_that_works(examine):
    Path(".snakemake/locks").mkdir(parents=True)
    Path(".snakemake/locks/0.output.lock").write_text("results/tiny/manifest.csv\n")
    command = [sys.executable, "-c", "input(1)", "snakemake"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)  # it runs, and has its name
        told = examine()
        process.communicate(b"\n")
    assert told.sound
    assert told.lines["Snakemake"].text.startswith("is at work")


# The command


def test_exit_status_and_a_run_that_lies_elsewhere(home, capsys, monkeypatch, tmp_path):
    main(["doctor", "results/tiny"])
    assert "Commands are to be typed in" not in capsys.readouterr().out
    cut("downstream/orl/knn.mine.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "home/results/tiny"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert f"Commands are to be typed in {home}." in out
    assert FORCE + "results/tiny/downstream/orl/knn.mine.json" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["results/none"], "results/none: no such folder; name the results of a run"),
        (["photos"], "photos: is no run; name a folder such as results/scenes"),
        (["results/old"], "results/old: has no config.json, which a run writes when it starts; give its --configfile."),
        (["results/tiny", "--configfile", "other.yaml"], "other.yaml: is the config of results/other, not of"),
        (["results/tiny", "--configfile", "none.yaml"], "none.yaml: cannot read the settings"),
        (["results/tiny", "--configfile", "bad.yaml"], "config: unknown key 'neighbour'; did you mean 'neighbors'?"),
        (["results/tiny", "--configfile", "list.yaml"], "list.yaml: must be a mapping of settings, not list"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(home, capsys, arguments, sentence):
    Path("results/old/models").mkdir(parents=True)
    for name, text in {"other": "{name: other}", "bad": "{name: tiny, neighbour: {}}", "list": "[1]"}.items():
        Path(f"{name}.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"orl doctor: {sentence}")
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_a_run_is_found_by_any_path(home, monkeypatch):
    monkeypatch.chdir(RUN)
    folder, chain = open_run(".", [])
    assert (folder, chain.results) == (str(home), "results/tiny")
    with pytest.raises(InputError, match="is no run"):
        open_run("..", [])
