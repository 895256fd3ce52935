"""Progress of long loops on stderr: a bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SECONDS = 10.0  # between two plain lines at least


def track(iterable: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield the `total` items of `iterable`, showing on stderr how many are done: a bar, or a line now and then."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, label, total)
        return
    done, start = 0, time.monotonic()
    last = start
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS and done < total:
            last = now
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)
    print(f"{label}: {done}/{total} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
