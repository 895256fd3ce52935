"""The commands and their inputs, those of tests/test_cli.py; and what the faults came to, told at the end."""

import os
import shutil
import subprocess
from collections import Counter
from functools import cache

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server of the commands' processes starts

import pytest
import test_cli
from child import Fault, run
from commands import finals, leftovers, line
from test_cli import labels, masks, settings, toy  # noqa: F401 - fixtures

from orl import artifacts


def _main(argv):
    done = run(argv)
    assert done.status == 0, done.lines


@pytest.fixture(scope="session")
def model_folder(settings, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("model")
    _main(["pretrain", "--stage", "random", "--settings", settings, "--output", folder])
    return folder


@pytest.fixture(scope="session")
def inputs(photos, labels, toy, masks, settings, model_folder, tmp_path_factory):  # noqa: F811
    """Those of tests/test_cli.py, and shards and runs."""
    given = photos, labels, toy, masks, settings, model_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_cli.cli, "main", _main)  # nothing is imported twice
        made = test_cli.inputs.__wrapped__(*given, tmp_path_factory)
    shards = [tmp_path_factory.mktemp("shards") / f"{number}.h5" for number in (1, 2)]
    for number, path in enumerate(shards, 1):
        _main([*test_cli.argv("propose", settings, made, path), "--shard", f"{number}/2"])
    return {**made, "--shards": shards, "RUN": _runs(made["--scores"], tmp_path_factory.mktemp("home"))}


def _runs(scores, home):
    """Folders of two runs, which hold a config and a result each."""
    folders = [home / "results" / name for name in ("a", "b")]
    for number, folder in enumerate(folders):
        downstream = {"tasks": ["voc07_svm"], "voc07_svm": {"root": "voc"}}
        raw = {"name": folder.name, "seed": number, "data": {"layout": "folder", "root": "photos"}}
        artifacts.write_json(folder / "config.json", {**raw, "downstream": downstream})
        (folder / "downstream" / "stage1").mkdir(parents=True)
        shutil.copy(scores, folder / "downstream" / "stage1")
    return folders


@pytest.fixture(scope="session")
def undisturbed(settings, inputs, tmp_path_factory):  # noqa: F811
    """Command -> how it ends where nothing disturbs it, and the files that it makes."""

    @cache
    def made(command):
        folder = tmp_path_factory.mktemp("undisturbed")
        done = run(line(command, settings, inputs, folder), Fault(folder))
        assert done.status == 0, done.lines
        assert not leftovers(folder)
        return done, finals(folder)

    return made


@pytest.fixture
def small_disk(tmp_path):
    """Mounts an empty file system by mount's options and returns its folder; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def pytest_terminal_summary(terminalreporter):
    found = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, count in report.user_properties:
            found[name] += count
    if found:
        terminalreporter.write_line("faults survived: " + ", ".join(f"{count} {name}" for name, count in found.items()))
