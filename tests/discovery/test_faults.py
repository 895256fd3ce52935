"""The commands of stage 2, killed or out of room while they write: a rerun makes the file of an undisturbed run."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from orl import artifacts

# Runs a command in which the write number KILL_AT to any HDF5 dataset (0: the rename of the finished file) kills it.
KILLED = """
import os, signal, sys
import h5py
from orl import cli

left = int(os.environ["KILL_AT"])

def killing(write):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **kwargs)
    return wrapped

if left:
    h5py.Dataset.__setitem__ = killing(h5py.Dataset.__setitem__)
    h5py.Group.__setitem__ = killing(h5py.Group.__setitem__)
else:
    left = 1
    os.replace = killing(os.replace)
cli.main(sys.argv[1:])
"""
COMMANDS = ["embed", "propose", "neighbors", "rois", "correspond"]


@pytest.fixture(scope="module")
def commands(photos, tiny, manifest_path, model_folder, proposals_path, tmp_path_factory):
    """Command -> its arguments but for --output; and the folder of what undisturbed runs make."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = ["--settings", json.dumps(tiny.model_dump(mode="json"))]
    photo = ["--root", str(photos), "--manifest", str(manifest_path)]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((10, 8))
    origin = {"manifest": artifacts.fingerprint(manifest_path)}
    with artifacts.create(folder / "e.h5", artifacts.EMBEDDINGS, {}, origin) as file:
        file["embedding"] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    found = {
        "embed": [*photo, "--model", str(model_folder / "model.safetensors")],
        "propose": photo,
        "neighbors": ["--manifest", str(manifest_path), "--embeddings", str(folder / "e.h5")],
        "rois": [*photo, "--proposals", str(proposals_path), "--backbone", str(model_folder / "backbone.safetensors")],
        "correspond": ["--manifest", str(manifest_path), "--neighbors", str(folder / "neighbors"),
                       "--proposals", str(proposals_path), "--rois", str(folder / "rois.h5")],
    }  # fmt: skip
    found["correspond"][3] += ".h5"
    found = {name: [name, *settings, *options, "--threads", "2"] for name, options in found.items()}
    for name, command in found.items():
        assert run([*command, "--output", str(folder / f"{name}.h5")]).returncode == 0
    return found, folder


def run(command, **options):
    return subprocess.run([sys.executable, "-m", "orl", *command], capture_output=True, text=True, **options)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_while_it_writes(commands, name, tmp_path):
    """At its first write, and again when the file is complete but has not got its name."""
    command, output = [*commands[0][name], "--output", str(tmp_path / "new.h5")], tmp_path / "new.h5"
    for at in ("1", "0"):
        environment = {**os.environ, "KILL_AT": at}
        dead = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment, capture_output=True, text=True)
        assert dead.returncode == -9
        assert not output.exists()
        assert len(list(tmp_path.iterdir())) == 1  # what it had written so far; what the run before left is gone
    again = run(command)
    assert again.returncode == 0, again.stderr
    assert output.read_bytes() == (commands[1] / f"{name}.h5").read_bytes()
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_without_room(commands, name, tmp_path):
    """A limit on the size of files stands for the disk: the system refuses the same writes."""
    command, output = [*commands[0][name], "--output", str(tmp_path / "new.h5")], tmp_path / "new.h5"
    output.write_bytes(b"what was there")
    limit = 100

    def few_bytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = run(command, preexec_fn=few_bytes)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1] == f"orl {name}: {output}: no room for it on the disk; free some and run again."
    assert "Traceback" not in full.stderr
    assert output.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [output]


def test_a_disk_that_fills_while_it_is_written_to(tmp_path):
    """HDF5 notices when it closes a dataset, where no exception can be raised, and again when it closes the file."""
    script = f"""
import resource, numpy as np
from orl import artifacts, cli
def fill(args, config):
    with artifacts.create({str(tmp_path / "new.h5")!r}, artifacts.NEIGHBORS, {{}}, {{}}) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        file["index"] = np.zeros(10_000)
cli._neighbors = fill
cli.main("neighbors --manifest m --embeddings e --output o".split())
"""
    full = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].endswith("new.h5: no room for it on the disk; free some and run again.")
    assert list(tmp_path.iterdir()) == []


def test_files_of_processes_that_run_are_left_alone(tmp_path):
    """Only what dead processes of this machine left is removed."""
    import platform

    alive = tmp_path / f".new.h5.{platform.node()}-{os.getppid()}-abc.tmp"
    elsewhere = tmp_path / ".new.h5.other-machine-1-abc.tmp"
    dead = tmp_path / f".new.h5.{platform.node()}-{2**22 + 1}-abc.tmp"  # beyond the highest number of a process
    other = tmp_path / f".old.h5.{platform.node()}-{2**22 + 1}-abc.tmp"
    for path in (alive, elsewhere, dead, other):
        path.touch()
    artifacts.write_text(tmp_path / "new.h5", "")
    assert set(tmp_path.iterdir()) == {alive, elsewhere, other, tmp_path / "new.h5"}
