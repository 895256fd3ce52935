"""The same work on many items, in many processes, results in order."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from orl import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any]


def ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int = 1
) -> Iterator[Result]:
    """`function(item)` of every item, in order, in `workers` processes that take `chunk` items at a time.

    The function (which must be picklable) reaches each process once. With one worker, in this process.
    Raises InputError when a process dies.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # Spawned, not forked: a fork copies locks that other threads of the caller may hold.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (function,))
    try:
        yield from pool.map(_call, items, chunksize=chunk)
    except (BrokenProcessPool, MemoryError):
        raise InputError("a worker process died, likely out of memory; use fewer of them (--threads).") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable) -> None:
    global _work
    _work = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the pool

    def leave_with_parent() -> None:
        parent = parent_process()
        if parent:
            parent.join()
            os._exit(1)

    # Else workers would wait for ever after a parent that was killed.
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    return _work(item)


def check_shared_memory(needed: int, workers: int, folder: str = "/dev/shm") -> None:
    """Raise InputError where the batches of torch's workers would not fit: they would die without a word."""
    free = shutil.disk_usage(folder).free if os.path.isdir(folder) else needed
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e6:.0f} MB are free, but the batches of {workers} workers take {needed / 1e6:.0f}; "
            f"enlarge it (Docker: --shm-size), or use fewer --threads or a smaller batch."
        )
