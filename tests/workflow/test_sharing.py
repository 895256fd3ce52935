"""Runs that share what they agree on, by Snakemake's cache between workflows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orl.config import merge

PROJECT = Path(__file__).parents[2]
SETTINGS = {
    "data": {"layout": "folder", "root": "photos"},
    "measure": ["orl"],
    "stage1": {
        "network": {"backbone": "resnet10", "hidden": 16, "projection": 8},
        "views": {"size": 32, "blur_radius": [0.1, 0.5]},
        "optimizer": {"batch": 4, "epochs": 1, "lr": 1.0, "warmup_epochs": 0},
    },
    "embeddings": {"resize": 40, "crop": 32},
    "proposals": {"min_size": 16, "top_n": 6},
    "neighbors": {"k": 3},
    "rois": {"size": 32},
    "stage3": {"patch": 24},
    "compute": {"threads": 1},
}
SHARED = {"stage1", "embed", "propose", "rois"}
SHARDS = {"shards": {"embeddings": 2, "proposals": 1, "rois": 2}}


class Runs:
    """Runs in one folder, over one folder of photos and with one cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"

    def snakemake(self, name, settings, *options, shares=True):
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge({**SETTINGS, "name": name}, settings)))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", "2",
                   "--directory", str(self.folder), "--configfile", str(path), *options]  # fmt: skip
        env = {**os.environ, "SNAKEMAKE_OUTPUT_CACHE": str(self.cache)}
        command += ["--cache"] * shares
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env, umask=0o077)

    def commands(self, name, settings, *options, until="stage3", shares=True):
        """Run `name` to stage 3; the shared rules whose commands ran, for they said something."""
        logs = self.folder / "results" / name / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        done = self.snakemake(name, settings, "--until", until, *options, shares=shares)
        assert done.returncode == 0, done.stdout + done.stderr
        said = [path.relative_to(logs) for path in logs.rglob("*.log") if path.stat().st_size]
        return {rule for rule in SHARED if any(re.match(rf"{rule}\b", str(path)) for path in said)}


def shared_files(results):
    return sorted(
        path.relative_to(results)
        for pattern in ("models/stage1/*.*", "discovery/embeddings/*", "discovery/proposals/*", "discovery/rois/*")
        for path in results.glob(pattern)
    )


def test_runs_share_what_they_agree_on(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    runs = Runs(tmp_path)
    first, second, third = (tmp_path / "results" / name for name in ("first", "second", "third"))

    refused = runs.snakemake("first", {}, "-n")
    assert refused.returncode == 2
    assert f"orl: SNAKEMAKE_OUTPUT_CACHE: '{runs.cache}' is no folder" in refused.stderr
    runs.cache.mkdir()
    runs.cache.chmod(0o755)
    assert "is open to all users" in runs.snakemake("first", {}, "-n").stderr
    runs.cache.chmod(0o750)

    assert runs.commands("first", {"compute": SHARDS}) == SHARED
    entries = {path.name: path.read_bytes() for path in runs.cache.iterdir()}

    # Another name, stage 3 and number of shards: only stage 3 is trained.
    other = {"stage3": {"patch": 16}, "compute": {"shards": {"rois": 3}}}
    assert runs.commands("second", other) == set()
    files = shared_files(first)
    assert shared_files(second) == files
    assert len(files) == 3 + 2 + 1 + 2
    for file in files:
        assert (second / file).is_symlink()
        assert (second / file).samefile(first / file)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "results").rglob("*") if not path.is_symlink()}
    assert modes == {0o600, 0o700}  # by the user's umask
    weights = [(results / "models" / "orl" / "backbone.safetensors").read_bytes() for results in (first, second)]
    assert weights[0] != weights[1]
    assert {path.name: path.read_bytes() for path in runs.cache.iterdir()} == entries
    for shares in (True, False):
        done = runs.snakemake("second", other, "-n", "--until", "stage3", shares=shares)
        assert done.returncode == 0
        assert not re.search(r"^(local)?rule \w+:", done.stdout + done.stderr, re.MULTILINE)

    assert runs.commands("third", {"seed": 1}, until="stage1") == {"stage1"}
    # Made again without the cache: the link is replaced, not what others share.
    assert runs.commands("second", other, "--forcerun", "stage1", until="stage1", shares=False) == {"stage1"}
    assert not (second / "models/stage1/model.safetensors").is_symlink()
    assert (first / "models/stage1/model.safetensors").read_bytes() == (
        second / "models/stage1/model.safetensors"
    ).read_bytes()
    assert all((runs.cache / name).read_bytes() == content for name, content in entries.items())

    # What is damaged is noticed by who reads it.
    damaged = (first / "discovery/embeddings/0001-of-0002.h5").resolve()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-100])
    done = runs.snakemake("third", {}, "--until", "neighbors")
    assert done.returncode == 1
    log = (third / "logs/merge/embeddings.log").read_text().splitlines()
    assert re.fullmatch(r"orl merge: results/third/discovery/embeddings/0001-of-0002\.h5: damaged .* again\.", log[-1])
    damaged.unlink()  # as README says
    assert runs.commands("third", {}, until="neighbors") == {"embed"}
    assert damaged.read_bytes() == content

    # A photo more, under the same settings.
    shutil.copy(tmp_path / "photos" / "more" / "000000000001.jpg", tmp_path / "photos" / "new.jpg")
    assert runs.commands("fourth", {}, until="rois") == SHARED - {"embed"}
    assert len(list((tmp_path / "results/fourth/discovery/rois").iterdir())) == 2


def test_generated_scenes_are_shared_by_their_settings(tmp_path):
    scenes = {"data": {"layout": "scenes", "scenes": {"train": 8, "val": 4, "objects_train": 1, "objects_val": 1}}}
    runs = Runs(tmp_path)
    runs.cache.mkdir(mode=0o700)
    assert runs.commands("first", scenes, until="propose") == {"propose"}
    assert runs.commands("second", scenes, until="propose") == set()
    scenes["data"]["scenes"]["seed"] = 1
    assert runs.commands("third", scenes, until="propose") == {"propose"}


@pytest.mark.parametrize("where", ["cache", "~/cache"])
def test_a_cache_is_named_by_its_whole_path(where, tmp_path):
    runs = Runs(tmp_path)
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "photos").mkdir()
    runs.cache = where
    refused = runs.snakemake("first", {}, "-n")
    assert refused.returncode == 2
    assert f"orl: SNAKEMAKE_OUTPUT_CACHE: {where!r} is no folder that you can write to, by its whole path" in (
        refused.stderr
    )
