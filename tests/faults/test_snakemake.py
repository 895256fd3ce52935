"""Faults of a whole workflow: its jobs or itself killed, and its own notes damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from child import run
from commands import finals
from test_workflow import PROJECT, TINY, plan, snakemake

from orl.config import merge

RANDOM = "results/tiny/models/random/backbone.safetensors"
STAGE1 = ("results/tiny/models/stage1/backbone.safetensors", "results/tiny/models/stage1/metrics.csv")


def config_of(photos, **change):
    data = {"layout": "folder", "root": str(photos)}
    longer = {"optimizer": {"batch": 4, "epochs": 30}}
    settings = {"data": data, "stage1": longer, "compute": {"threads": 1, "gpus": 0}}
    return merge(merge(TINY, settings), change)


def wait_for(found, process):
    """Until `found` gives something, while the process runs."""
    deadline = time.monotonic() + 300
    while not (what := found()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return what


def pids_of(folder, word):
    """Processes of `orl` that work in a folder and have a word on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.path.samefile(entry / "cwd", folder):
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                found += [int(entry.name)] if word in words and Path(words[1]).name == "orl" else []
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="finds the job's process in /proc")
def test_jobs_and_snakemake_killed(photos, tmp_path, record_property):
    """A job dies, then Snakemake with all its jobs: the training goes on, and ends in an undisturbed one's weights."""
    config = config_of(photos)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", "1",
               "--directory", str(tmp_path), "--configfile", "config.yaml", "--", STAGE1[0]]  # fmt: skip
    state, log = tmp_path / "results/tiny/models/stage1/state", tmp_path / "results/tiny/logs/stage1.log"

    def start():
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(command, cwd=tmp_path, **options)

    def saved():
        return {path: path.stat().st_mtime_ns for path in state.glob("*/checkpoint.pt")}

    def job():
        return pids_of(tmp_path, "pretrain")

    process = start()
    wait_for(lambda: saved() and job(), process)
    os.kill(job()[0], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == 1
    assert not any((tmp_path / file).exists() for file in STAGE1)
    before = saved()
    assert before  # Snakemake deletes what a failed job declares; the checkpoints are not declared

    process = start()
    wait_for(lambda: job() and saved() != before, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    while job():  # the kernel takes a moment
        time.sleep(0.02)
    record_property("kills", 2)

    done = snakemake(tmp_path, config, "--unlock")
    assert done.returncode == 0, done.stderr
    done = snakemake(tmp_path, config, "--rerun-incomplete", "--", STAGE1[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from step" in log.read_text()
    manifest = tmp_path / "results/tiny/manifest.csv"
    whole = run(["pretrain", "--stage", "stage1", "--settings", json.dumps(config), "--root", photos, "--threads", "1",
                 "--manifest", manifest, "--output", tmp_path / "whole" / "stage1"])  # fmt: skip
    assert whole.status == 0, whole.lines
    assert finals(tmp_path / "results/tiny/models") == finals(tmp_path / "whole")


@pytest.mark.parametrize("content", [b"", b'{"models/stage1": ', b"[1]", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_notes_on_variants(content, photos, tmp_path, record_property):
    config, file = config_of(photos), tmp_path / "results/tiny/variants.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    if content.startswith(b'{"a"'):
        done = snakemake(tmp_path, config, "--", RANDOM)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "models/random" in json.loads(file.read_text())
    else:
        assert plan(tmp_path, config, "--until", "manifest") == {"manifest": 1}
    record_property("damaged files", 1)


def test_results_that_cannot_be_written(photos, tmp_path):
    (tmp_path / "results").write_text("")
    done = snakemake(tmp_path, config_of(photos))
    assert done.returncode == 2
    assert "orl: results: is no folder, so nothing can be written there; move it away." in done.stderr
    (tmp_path / "results").unlink()
    (tmp_path / "results/tiny/variants.json").mkdir(parents=True)
    done = snakemake(tmp_path, config_of(photos), "--", RANDOM)
    assert done.returncode == 2
    assert "variants.json" in [line for line in done.stderr.splitlines() if line.startswith("orl: ")][-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["stage1: [", "\x00", "- a\n- b\n"])
def test_damaged_config(content, tmp_path, record_property):
    (tmp_path / "config.yaml").write_text(content)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--dry-run",
               "--directory", str(tmp_path), "--configfile", str(tmp_path / "config.yaml")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert not (tmp_path / "results").exists()
    record_property("damaged files", 1)
