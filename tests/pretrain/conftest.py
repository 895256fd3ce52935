"""Two processes on the CPU, and a watch over reads from the device."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory):
    """Run a test file as a script, `FILE RANK FOLDER`, as rank 0 and 1; each writes FOLDER/RANK.pt, which it gives.

    They meet in a file, so that no port need be free.
    """

    def run(file):
        folder = tmp_path_factory.mktemp("ranks")
        command = [sys.executable, file]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        both = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in (0, 1)]
        try:
            assert [process.wait(timeout=120) for process in both] == [0, 0]
        finally:
            for process in both:
                process.kill()
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    return run


class _NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_reading():
    """A context that fails where a value is read from the device, which would wait for it."""
    return _NoReading
