"""Work in many processes: order, errors, and processes that die."""

import subprocess
import sys
import time
from functools import partial

import pytest

from orl import InputError
from orl.workers import ordered


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module that new processes can import."""
    (tmp_path / "work_to_share.py").write_text(
        "import os, time\n"
        "from orl import InputError\n"
        "def halve(item):\n"
        "    time.sleep(0.02 * (item % 3))  # later ones are done first\n"
        "    if item == 13:\n"
        "        raise InputError('13 cannot be halved; take another.')\n"
        "    return item / 2\n"
        "def die_at(number, item):\n"
        "    if item == number:\n"
        "        os._exit(9)  # as when the system kills it for memory\n"
        "    return item\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import work_to_share

    return work_to_share


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order(work, workers):
    assert list(ordered(work.halve, range(12), workers)) == [item / 2 for item in range(12)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_keeps_its_sentence(work, workers):
    with pytest.raises(InputError, match="13 cannot be halved"):
        list(ordered(work.halve, [1, 13, 2], workers))


def test_a_worker_that_dies_is_one_sentence(work):
    with pytest.raises(InputError, match="a worker process died"):
        list(ordered(partial(work.die_at, 3), range(8), 2))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "def slow(item):\n"
        "    import time\n"
        "    time.sleep(60 if item else 0)\n"
        "    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    from orl.workers import ordered\n"
        "    for pid in ordered(slow, range(9), 2):\n"
        "        print(pid, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except FileNotFoundError:
        return False
