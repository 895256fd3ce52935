"""A disk that is full, or fills while a command writes: one sentence, nothing half-written, and a rerun that succeeds.

A limit on the size of files stands for the disk, which needs no rights: the system refuses the same writes.
"""

import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from child import Fault, run
from commands import COMMANDS, finals, leftovers, line


@pytest.mark.parametrize("command", COMMANDS)
def test_full(command, settings, inputs, undisturbed, tmp_path, record_property):
    """From the first step that writes, and from one on that is drawn by a seed; the results of an earlier run stay."""
    whole, expected = undisturbed(command)
    arguments = line(command, settings, inputs, tmp_path)
    for step in (1, int(np.random.default_rng(zlib.crc32(command.encode())).integers(1, whole.steps + 1))):
        full = run(arguments, Fault(tmp_path, step, room=10))
        if full.status == 0:  # nothing was left to be written
            assert finals(tmp_path) == expected
            continue
        assert full.status == 1, full.lines
        assert "no room" in full.lines[-1], full.lines
        assert full.lines[-1].startswith(f"orl {command.split()[0]}: {tmp_path}")
        assert not any("Traceback" in text for text in full.lines), full.lines
        found = finals(tmp_path)
        assert found == {name: expected[name] for name in found}
        assert leftovers(tmp_path) == []
        record_property("full disks", 1)
    for fault in (None, Fault(tmp_path, 1, room=10)):  # once more: what is there stays
        again = run(arguments, fault)
        assert fault or again.status == 0, again.lines
        assert finals(tmp_path) == expected
        assert leftovers(tmp_path) == []


def resize(disk, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize("command", ["scenes", "rois", "features", "pretrain --stage random", "attention"])
def test_small_file_system(command, settings, inputs, undisturbed, small_disk, record_property):
    """A real one, which is then enlarged."""
    disk = small_disk("size=16k")
    arguments = line(command, settings, inputs, disk / "new")
    full = run(arguments)
    assert full.status == 1, full.lines
    assert full.lines[-1] == f"orl {command.split()[0]}: {disk / 'new' / 'out'}: no room for it on the disk; " \
        "free some and run again." or command.startswith("pretrain")  # fmt: skip
    assert "no room" in full.lines[-1]
    assert not finals(disk)
    assert leftovers(disk) == []
    resize(disk, "1g")
    assert run(arguments).status == 0
    assert finals(disk / "new") == undisturbed(command)[1]
    record_property("full disks", 1)


def test_training_on_a_small_file_system(settings, inputs, undisturbed, tmp_path, small_disk, record_property):
    """There is room for a checkpoint, but not for the next beside it: the first one is kept, and gone on from."""
    command = "pretrain --stage stage1"
    assert run(line(command, settings, inputs, tmp_path / "whole")).status == 0
    (whole,) = (tmp_path / "whole").rglob("checkpoint.pt")
    disk = small_disk(f"size={whole.stat().st_size * 3 // 2}")
    shutil.rmtree(tmp_path / "whole")
    arguments = line(command, settings, inputs, disk / "new")
    full = run(arguments)
    (saved,) = disk.rglob("checkpoint.pt")
    assert (full.status, full.lines[-1]) == (
        1, f"orl pretrain: {saved}: no room for it on the disk; free some and run again.")  # fmt: skip
    assert not finals(disk)
    resize(disk, "1g")
    again = run(arguments)
    assert again.status == 0
    assert f"stage1: going on from step 1 of 6 ({saved})" in again.lines
    assert finals(disk / "new") == undisturbed(command)[1]
    assert leftovers(disk) == []
    record_property("full disks", 1)


def test_disk_that_fills_while_a_dataset_is_written(tmp_path):
    """HDF5 notices when it closes a dataset, where no exception can be raised, and again when it closes the file."""
    script = f"""
import resource, numpy as np
from orl import artifacts, cli
def fill(args, config):
    with artifacts.create({str(tmp_path / "new.h5")!r}, artifacts.NEIGHBORS, {{}}, {{}}) as file:
        for number in range(2):
            dataset = file.create_dataset(f"index{{number}}", (60, 4), np.int16)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5))
            dataset[:] = 1
cli._neighbors = fill
cli.main("neighbors --manifest m --embeddings e --output {tmp_path}/o".split())
"""
    full = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert full.returncode == 1
    assert full.stderr == f"orl neighbors: {tmp_path}/new.h5: no room for it on the disk; free some and run again.\n"
    assert list(tmp_path.iterdir()) == []
