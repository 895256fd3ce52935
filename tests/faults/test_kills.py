"""`kill -9` at seeded random moments of every command: a rerun makes the files of an undisturbed run, byte by byte."""

import json
import os
import platform
import zlib

import numpy as np
import pytest
from child import Fault, run
from commands import COMMANDS, finals, leftovers, line
from PIL import Image

from orl import artifacts
from orl.config import merge


@pytest.mark.parametrize("command", COMMANDS)
def test_killed(command, settings, inputs, undisturbed, tmp_path, record_property):
    """Before a step that writes, drawn by a seed; before the last one, as a rule the rename; and at any time."""
    moments, kills = np.random.default_rng(zlib.crc32(command.encode())), 0
    whole, expected = undisturbed(command)
    arguments = line(command, settings, inputs, tmp_path)
    for step in (int(moments.integers(1, whole.steps + 1)), whole.steps, None):
        kill_after = moments.uniform(0, whole.seconds)
        dead = run(arguments, Fault(tmp_path, step)) if step else run(arguments, kill_after=kill_after)
        assert dead.status in (0, -9), dead.lines
        kills += dead.status == -9
        found = finals(tmp_path)
        assert found == {name: expected[name] for name in found}  # whole or not there
    assert kills
    again = run(arguments)
    assert again.status == 0, again.lines
    assert finals(tmp_path) == expected
    assert leftovers(tmp_path) == []
    record_property("kills", kills)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_killed_again_and_again(seed, settings, inputs, tmp_path, record_property):
    """It goes on from its last checkpoint each time."""

    def train(name, kill_after=None):
        arguments = line("pretrain --stage stage1", settings, inputs, tmp_path / name)
        at = arguments.index("--settings") + 1
        arguments[at] = json.dumps(merge(json.loads(arguments[at]), {"stage1": {"optimizer": {"epochs": 20}}}))
        return run(arguments, kill_after=kill_after)

    moments, whole = np.random.default_rng(seed), train("whole")
    assert whole.status == 0, whole.lines
    dead = [train("broken", kill_after=moments.uniform(0.4, 0.6) * whole.seconds) for _ in range(3)]
    kills = sum(done.status == -9 for done in dead)
    assert kills
    again = train("broken")
    assert any("going on from step" in told for told in again.lines)
    assert finals(tmp_path / "broken") == finals(tmp_path / "whole")
    record_property("kills", kills)


def test_a_manifest_killed_again_and_again(settings, tmp_path, record_property):
    """It decodes only what it had not come to."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (60, 80, 3)), np.ones((25, 25, 1))).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    for number in range(40):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.jpg")

    def listed(name, kill_after=None):
        inputs = {"--root": tmp_path / "photos"}
        arguments = line("manifest", settings, inputs, tmp_path / name)
        at = arguments.index("--settings") + 1
        arguments[at] = json.dumps({"data": {"layout": "folder"}})
        return run(arguments, kill_after=kill_after)

    whole = listed("whole")
    assert whole.status == 0, whole.lines
    dead = [listed("broken", rng.uniform(0.3, 0.6) * whole.seconds) for _ in range(3)]
    kills = sum(done.status == -9 for done in dead)
    assert kills
    assert list(tmp_path.glob("broken/*.state"))
    again = listed("broken")
    assert again.status == 0, again.lines
    assert any("photos taken over" in told for told in again.lines)
    assert finals(tmp_path / "broken") == finals(tmp_path / "whole")
    record_property("kills", kills)


def test_files_of_processes_that_run_are_left_alone(tmp_path):
    """Only what dead processes of this machine left is removed."""
    alive = tmp_path / f".new.h5.{platform.node()}-{os.getppid()}-abc.tmp"
    elsewhere = tmp_path / ".new.h5.other-machine-1-abc.tmp"
    dead = tmp_path / f".new.h5.{platform.node()}-{2**22 + 1}-abc.tmp"  # beyond the highest number of a process
    folder = tmp_path / f".new.h5.{platform.node()}-{2**22 + 1}-def.tmp"
    other = tmp_path / f".old.h5.{platform.node()}-{2**22 + 1}-abc.tmp"
    for path in (alive, elsewhere, dead, other):
        path.touch()
    (folder / "new").mkdir(parents=True)
    artifacts.write_text(tmp_path / "new.h5", "")
    assert set(tmp_path.iterdir()) == {alive, elsewhere, other, tmp_path / "new.h5"}


def test_there_are_thirty_commands():
    """Each is killed at least once."""
    assert len(COMMANDS) >= 30
