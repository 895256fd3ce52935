"""What lies beside a run's files: locks, checkpoints, temporary files, and what belongs to earlier settings."""

import base64
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from orl import artifacts
from orl.places import Places

DAY = 24 * 3600
UNNAMED = re.compile(r"\.(scenes|attention.*)\.[a-z0-9_]{8}")  # folders that become those when they are complete
SKIPPED = ("scenes", "logs", "benchmarks", "report")


def size_of(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder; links count for themselves."""
    if os.path.islink(path) or not os.path.isdir(path):
        return os.lstat(path).st_size
    with os.scandir(path) as scan:
        return sum(size_of(entry.path) for entry in scan)


def human(size: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


# Trainings


def states(results: str) -> Iterator[Path]:
    """The folders of checkpoints: models/MODEL/state, and those beside a result that is trained for."""
    yield from sorted(Path(results).glob("models/*/state"))
    yield from sorted(Path(results).glob("downstream/**/*.state"))


def checkpoints(state: Path) -> list[Path]:
    """The folders in a state folder, one for each stamp (see `checkpoint.State`)."""
    return sorted(path for path in state.glob("*") if re.fullmatch(r"[0-9a-f]{16}", path.name) and path.is_dir())


def is_locked(state: Path) -> bool:
    """Whether a training holds the lock of its state folder."""
    try:
        with open(state / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of when the file is closed
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has done. Raises InputError."""
    import torch

    from orl import InputError

    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception as error:  # torch raises many kinds
        raise InputError(f"{checkpoint}: damaged checkpoint ({' '.join(str(error).split())[:80]}).") from None


# Temporary files


def temporaries(results: str) -> Iterator[tuple[Path, bool]]:
    """What was to become files of the run, and whether what wrote it has ended.

    Where a process of another machine wrote, or its number is not told: whether nothing was written for a day.
    """
    for folder, names, files in os.walk(results):
        if folder == results:
            names[:] = [name for name in names if name not in SKIPPED[:1]]
        for name in sorted(names):
            if UNNAMED.fullmatch(name):
                yield Path(folder, name), _is_old(Path(folder, name))
        names[:] = [name for name in names if not UNNAMED.fullmatch(name)]
        for name in sorted(files):
            if name.startswith(".") and name.endswith(".tmp"):
                path = Path(folder, name)
                ended = artifacts.abandoned(path)
                yield path, _is_old(path) if ended is None else ended


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > DAY


# Earlier settings


def leftovers(places: Places) -> list[Path]:
    """Files and folders that no run of the config reads or writes, though an earlier config's did.

    A folder is named as a whole where nothing in it is of this config.
    """
    owned = [(stage, v) for stage in places.upstream for v in places.runs if places.has(stage, v)]
    known = {Path(places.found(*one)) for one in owned}
    known |= {path.with_suffix("") for path in known if path.parent.name.startswith("discovery")}  # their shards
    known |= {path.with_suffix("") for path in known if path.name.startswith("semi.")}  # its runs
    above = {parent for path in known for parent in path.parents}
    found: list[Path] = []
    results = Path(places.results)
    starts = [*results.glob("models/*"), *results.glob("discovery*"), *results.glob("downstream/*"),
              *results.glob("attention*")]  # fmt: skip
    for path in sorted(starts):
        if path in known:
            continue
        if path not in above:
            found.append(path)
        elif path.is_dir():
            inside = (one for one in path.iterdir() if not one.name.startswith(".") and one.suffix != ".state")
            found += sorted(one for one in inside if one not in known | above and not _is_beside(one, known))
    return found


def _is_beside(path: Path, known: set[Path]) -> bool:
    """Whether a file comes with another: detection.predictions.json with detection.json."""
    return path.name.endswith(".predictions.json") and path.with_name("detection.json") in known


# Snakemake


def locked_by_snakemake(results: str) -> bool:
    """Whether Snakemake's lock in this folder is of the run: it works there, or was killed."""
    for path in Path(".snakemake/locks").glob("*"):
        if any(line.startswith(f"{results}/") for line in path.read_text(errors="replace").splitlines()):
            return True
    return False


def snakemake_runs() -> bool:
    """Whether a Snakemake of this machine works in this folder (Linux)."""
    here = os.getcwd()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            if os.readlink(process / "cwd") == here and any(b"snakemake" in os.path.basename(one) for one in command):
                return True
        except OSError:  # ended, or another user's
            continue
    return False


def incomplete(results: str) -> list[str]:
    """The run's files that Snakemake has begun and not ended to make: it makes them now, or was killed."""
    marks = Path(".snakemake/incomplete")
    found = []
    for path in marks.rglob("*"):
        name = "".join(part.removeprefix("@") for part in path.relative_to(marks).parts)  # long names in several parts
        try:
            made = base64.urlsafe_b64decode(name).decode()
        except ValueError:
            continue
        if path.is_file() and made.startswith(f"{results}/") and os.path.exists(made):
            found.append(made)
    return sorted(found)
