"""Run `orl` commands in processes that are killed, or whose disk fills, while they work.

Each is forked from a server that has imported everything and computed nothing: none spends its life importing.
"""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [f"orl.{name}" for name in (
        "cli", "data.fetch", "data.scenes", "pretrain.given", "pretrain.loop", "discovery.embed", "discovery.proposals",
        "discovery.neighbors", "discovery.rois", "discovery.correspondences", "downstream.svm", "downstream.lowshot",
        "downstream.knn", "downstream.features", "downstream.supervised", "downstream.semi", "downstream.detection",
        "downstream.segmentation", "downstream.localization", "downstream.attention", "downstream.pairs",
        "networks.export", "report.page", "report.card", "report.compare",
    )] + ["pytest"]  # which is what multiprocessing takes for the main module
)  # fmt: skip
# What changes a folder, as Python's audit hooks tell it; beside them, what is written to an HDF5 file counts.
STEPS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")


@dataclass(frozen=True)
class Fault:
    """What happens to a command at its `step`-th step (from 1) that writes below `folder`; 0: nothing.

    `room`: bytes to which files can grow from then on; None: it is killed.
    """

    folder: Path
    step: int = 0
    room: int | None = None


@dataclass(frozen=True)
class Done:
    """How a command ended: exit status, negative if by a signal; lines of its output; steps and seconds it took."""

    status: int
    lines: list[str]
    steps: int
    seconds: float


def run(argv: Sequence[Any], fault: Fault | None = None, kill_after: float | None = None) -> Done:
    """Run a command to its end, or for so many seconds; then its process group is killed."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    steps = CONTEXT.Value("q", 0, lock=False)
    process = CONTEXT.Process(target=_command, args=([str(part) for part in argv], fault, writer, steps))
    process.start()
    writer.close()
    text: list[bytes] = []
    listener = threading.Thread(target=_listen, args=(reader, text))
    listener.start()
    began = time.monotonic()
    process.join(kill_after)
    if process.is_alive():
        if kill_after is not None:
            with contextlib.suppress(ProcessLookupError):  # it has not begun, or has just ended
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
    seconds = time.monotonic() - began
    listener.join()  # the pipe is open until the last process of the group is gone
    reader.close()
    return Done(process.exitcode, b"".join(text).decode(errors="replace").splitlines(), steps.value, seconds)


def _listen(reader: Connection, text: list[bytes]) -> None:
    while piece := os.read(reader.fileno(), 65536):
        text.append(piece)


def _command(argv: list[str], fault: Fault | None, writer: Connection, steps: Any) -> None:
    """In the process of the command."""
    os.setsid()
    set_start_method("fork", force=True)  # as in a process of its own; it has taken over that of the server
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    writer.close()
    if fault:
        _watch(fault, steps)
    from orl import cli

    cli.main(argv)


def _watch(fault: Fault, steps: Any) -> None:
    import h5py

    folder, process = f"{fault.folder}/", os.getpid()

    def step() -> None:
        steps.value += 1
        if steps.value == fault.step:
            if fault.room is None:
                os.killpg(0, signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.room, fault.room))

    def told(event: str, values: tuple) -> None:
        writes = event in STEPS or (event == "open" and isinstance(values[2], int) and values[2] & os.O_ACCMODE)
        if writes and os.getpid() == process and str(values[0]).startswith(folder):
            step()

    def counted(write: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            step()
            return write(*args)

        return wrapped

    sys.addaudithook(told)
    for kind in (h5py.Dataset, h5py.Group):
        kind.__setitem__ = counted(kind.__setitem__)
