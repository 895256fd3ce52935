"""Outputs that cannot be written are one sentence, before any work."""

import os
import shutil

import pytest
from child import run
from commands import COMMANDS, line

FOLDERS = ("scenes", "pretrain", "attention", "compare")  # what these make


def refused(command, arguments):
    done = run(arguments)
    assert (done.status, len(done.lines)) == (2, 1), done.lines
    assert done.lines[0].startswith(f"orl {command.split()[0]}: ")
    return done.lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_in_the_way(command, settings, inputs, tmp_path, record_property):
    """A folder in the place of a file, a file in the place of a folder, and one in that of the folder above."""
    output = line(command, settings, inputs, tmp_path / "there")
    output = output[output.index("--output") + 1]
    if command.startswith(FOLDERS):
        output.parent.mkdir()
        output.write_text("")
    else:
        output.mkdir(parents=True)
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert f"{output}: is " in refused(command, line(command, settings, inputs, tmp_path / "there"))
    assert f"{tmp_path / 'file'}: is no folder" in refused(command, line(command, settings, inputs, tmp_path / "file"))
    assert sorted(tmp_path.rglob("*")) == before
    record_property("unwritable outputs", 2)


@pytest.mark.parametrize("command", COMMANDS)
def test_not_allowed(command, settings, inputs, closed, record_property):
    for folder in (closed, closed / "new"):
        assert f"{closed}: cannot be written to" in refused(command, line(command, settings, inputs, folder))
        record_property("unwritable outputs", 1)
    assert list(closed.iterdir()) == []


@pytest.fixture
def closed(tmp_path, small_disk):
    """A folder that nobody may write to; root may ignore permissions, but not that of the file system."""
    if os.getuid() == 0:
        return small_disk("ro,size=1m")
    folder = tmp_path / "closed"
    folder.mkdir(0o500)
    return folder


def test_every_output_is_looked_at(settings, inputs, tmp_path):
    """Those that have options of their own, too."""
    for command, flag in (
        ("manifest", "--rejected"),
        ("evaluate detection --name stage1", "--predictions"),
        ("evaluate proposals", "--plot"),
    ):
        arguments = line(command, settings, inputs, tmp_path / "new")
        arguments[arguments.index(flag) + 1] = tmp_path
        assert f"{tmp_path}: is a folder, but a file is to be made there" in refused(command, arguments)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_gone_are_made_again(settings, inputs, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.rmtree(tmp_path / "new")
    assert run(line("merge", settings, inputs, tmp_path / "new" / "and" / "below")).status == 0
