"""GPUs of this machine, lent to one job at a time, and the processes of a training: one on each GPU.

Snakemake counts GPUs but hands out none, so each job takes its own: a lease is a lock on a file per GPU, which the
kernel lifts when the job ends, however it ends. Jobs of other users and other programs are not seen.
"""

import contextlib
import ctypes
import fcntl
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from orl import InputError

FOLDER = Path(tempfile.gettempdir(), f"orl-gpus-{os.getuid()}")  # TMPDIR moves it

_held: list[int] = []  # descriptors of the locked files, open as long as the process lives


def count() -> int:
    """How many GPUs this process could use."""
    import torch

    # In a child: without NVML, counting starts CUDA, which then takes no notice of a new CUDA_VISIBLE_DEVICES.
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(torch.cuda.device_count).result()


def visible() -> list[str]:
    """The GPUs this process could use, as CUDA_VISIBLE_DEVICES names them: numbers or UUIDs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named == "":
        return []
    number = count()
    names = map(str, range(number)) if named is None else map(str.strip, named.split(","))
    return list(names)[:number]  # CUDA stops at the first name that is no GPU


def lease(wanted: int) -> list[str]:
    """Take `wanted` of the visible GPUs, or all if they are fewer, for as long as this process lives.

    Waits until so many are free at once, holding none meanwhile. Sets CUDA_VISIBLE_DEVICES to those taken, and returns
    them; 0 hides all. A SLURM job, or a process of torchrun, has its GPUs already: nothing is changed there.
    """
    if wanted == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return []
    names = visible()
    if not names:
        print("no GPU is visible: running on the CPU", file=sys.stderr)
        return []
    wanted = min(wanted, len(names))
    if "SLURM_JOB_ID" in os.environ or "WORLD_SIZE" in os.environ:
        return names[:wanted]
    while _held:  # a second lease replaces the first
        os.close(_held.pop())
    waits = False
    while not (taken := _take(names, wanted)):
        if not waits:
            print(f"waiting until {wanted} of {len(names)} GPUs are free", file=sys.stderr, flush=True)
        waits = True
        time.sleep(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    return taken


def _take(names: Sequence[str], wanted: int) -> list[str]:
    """Lock `wanted` of the GPUs, and return them; or none, if fewer are free."""
    taken: dict[str, int] = {}
    with _folder() as folder, open("gate", "w", opener=partial(_open_in, folder)) as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # one job looks at a time, else two could get in each other's way for ever
        for name in names:
            file = _open_in(folder, re.sub(r"\W", "-", name), os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            taken[name] = file
            if len(taken) == wanted:
                for file in taken.values():
                    os.set_inheritable(file, True)  # the lease passes to what this process becomes by exec
                    _held.append(file)
                return list(taken)
        for file in taken.values():
            os.close(file)
    return []


@contextlib.contextmanager
def _folder() -> Iterator[int]:
    """A descriptor of FOLDER, made if need be. Raises InputError unless it is this user's and closed to all others."""
    with contextlib.suppress(FileExistsError):
        FOLDER.mkdir(mode=0o700)
    try:
        folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        raise InputError(f"{FOLDER}: is not a folder of yours; set TMPDIR to another folder.") from None
    try:
        found = os.fstat(folder)
        if found.st_uid != os.getuid():
            raise InputError(f"{FOLDER}: is not a folder of yours; set TMPDIR to another folder.")
        if found.st_mode & 0o077:
            raise InputError(f"{FOLDER}: is open to other users; delete it, or set TMPDIR to another folder.")
        yield folder
    finally:
        os.close(folder)


def _open_in(folder: int, name: str, flags: int) -> int:
    """Open a file of the folder, or make it, for this user alone."""
    # The sticky bit keeps systemd's daily cleaning of /tmp away from a file that is in use.
    return os.open(name, flags | os.O_NOFOLLOW, 0o1600, dir_fd=folder)


def ranks(granted: int, batch: int, accumulation: int = 1, group: int = 2, nodes: int = 1) -> int:
    """How many processes train on `granted` GPUs of each node: the most among which a step's photos can be divided.

    Each gets `group` photos at least: batch statistics of a single one are none. Of MoCo's groups, which are larger,
    each gets whole ones. Raises InputError if the step cannot be cut for accumulation.
    """
    photos = batch // accumulation
    if batch % accumulation or photos < min(2, group):
        raise InputError(
            f"optimizer.accumulation is {accumulation}, which does not divide optimizer.batch, {batch}, into parts of "
            f"at least 2 photos; change one."
        )

    def fits(number: int) -> bool:
        share, rest = divmod(photos, number * nodes)
        return rest == 0 and share >= group and (group == 2 or share % group == 0)

    return max([1, *filter(fits, range(2, granted + 1))])


def take_one(asked: int | None) -> None:
    """Lease a GPU for a command that uses one; `asked` is its --gpus, None if not given."""
    lease(min(1, _wanted(asked)))


def start(
    asked: int | None, batch: int, accumulation: int, threads: int, argv: Sequence[str], group: int = 2, nodes: int = 1
) -> None:
    """Lease the GPUs of a training. With several, torchrun takes this process's place and runs `orl ARGV` on each.

    On several nodes, those of the SLURM job that this process is in, srun starts torchrun on each; `asked` counts the
    GPUs of all. A process of torchrun goes on, if the photos of a step can be divided among all. Raises InputError.
    """
    photos = batch // accumulation
    if "WORLD_SIZE" in os.environ:
        number = int(os.environ["WORLD_SIZE"])
        if ranks(number, batch, accumulation, group) != number:
            raise InputError(
                f"{photos} photos at a time cannot be divided among {number} processes, at least {group} for each; "
                f"start {ranks(number, batch, accumulation, group)} or change the batch."
            )
        _end_with_torchrun()
        if asked == 0:
            lease(0)
        return
    if nodes > 1 and not ("SLURM_JOB_ID" in os.environ and shutil.which("srun")):
        raise InputError(
            f"compute.nodes is {nodes}, but this is no SLURM job; run the workflow with workflow/profiles/slurm, "
            f"set it to 1, or start torchrun on each node."
        )
    wanted = _wanted(asked) // nodes
    granted = min(wanted, len(visible()))
    number = ranks(granted, batch, accumulation, group, nodes)
    if number < granted:
        skipped = [str(more * nodes) for more in range(granted, number, -1)]
        unfit = " or ".join(filter(None, (", ".join(skipped[:-1]), skipped[-1])))
        print(
            f"training on {number * nodes} of {granted * nodes} GPUs: {photos} photos at a time cannot be divided by "
            f"{unfit}, at least {group} for each",
            file=sys.stderr,
        )
    lease(min(number, wanted))
    if number * nodes > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // number))
        sys.stdout.flush()
        sys.stderr.flush()
        run = [sys.executable, "-m", "orl.torchrun", "--nproc-per-node", str(number)]
        run = [*_on_nodes(nodes, threads), *run, *_meet(nodes)] if nodes > 1 else [*run, "--standalone"]
        command = [*run, "-m", "orl", *argv]
        os.execvp(command[0], command)


def _on_nodes(nodes: int, threads: int) -> list[str]:
    """The srun that runs a command once on each node of this SLURM job."""
    count = str(nodes)
    return ["srun", "--nodes", count, "--ntasks", count, "--ntasks-per-node", "1", "--cpus-per-task", str(threads),
            "--kill-on-bad-exit=1"]  # fmt: skip


def _meet(nodes: int) -> list[str]:
    """How the torchruns of a SLURM job find each other: on its first node, where this runs, at a port of the job's."""
    job = os.environ["SLURM_JOB_ID"]
    endpoint = f"{platform.node()}:{20000 + int(job) % 10000}"
    return ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-id", job, "--rdzv-endpoint", endpoint]


def _wanted(asked: int | None) -> int:
    """GPUs to take at most. Not asked for: what there is, so that a machine without any is not told so."""
    if asked == 0:
        print("no GPU was granted: running on the CPU", file=sys.stderr)
    return len(visible()) if asked is None else asked


def _end_with_torchrun() -> None:
    """Get SIGTERM when torchrun dies: its processes, in sessions of their own, would train on without its lease.

    They then save and end: for as long as that takes, another job may already hold their GPUs.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
