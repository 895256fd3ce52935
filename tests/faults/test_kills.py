"""`kill -9` at seeded random moments of every command: a rerun makes the files of an undisturbed run, byte by byte."""

import zlib

import numpy as np
import pytest
from child import Fault, run
from commands import COMMANDS, finals, leftovers, line


@pytest.mark.parametrize("command", COMMANDS)
def test_killed(command, settings, inputs, undisturbed, tmp_path, record_property):
    """Twice at a step that writes, before it is done, and once at any time; all of them drawn by a seed."""
    moments, kills = np.random.default_rng(zlib.crc32(command.encode())), 0
    whole, expected = undisturbed(command)
    arguments = line(command, settings, inputs, tmp_path)
    for step in (*moments.integers(1, whole.steps + 1, 2).tolist(), None):
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


def test_there_are_thirty_commands():
    """Each is killed at least once."""
    assert len(COMMANDS) >= 30
