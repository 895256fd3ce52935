"""A disk that is full, or fills while a command writes: one sentence, nothing half-written, and a rerun that succeeds.

A limit on the size of files stands for the disk, which needs no rights: the system refuses the same writes.
"""

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
    again = run(arguments)
    assert again.status == 0, again.lines
    assert finals(tmp_path) == expected
    full = run(arguments, Fault(tmp_path, 1, room=10))
    assert finals(tmp_path) == expected
