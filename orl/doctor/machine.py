"""Checks of the machine: everything that a run uses is used once, in small, rather than asked whether it is there."""

import contextlib
import fcntl
import importlib.metadata
import mmap
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from orl import __version__

Result = TypeVar("Result")
OK, WARNING, PROBLEM = "ok", "warning", "problem"
OPENCV = "opencv-contrib-python-headless"
PROJECT = Path(__file__).resolve().parents[2]  # the checkout, if the package lies in one


class Finding(NamedTuple):
    """A line: a mark, and a sentence, which says what to do where not all is right."""

    mark: str
    text: str


def size(count: float) -> str:
    """Bytes for people."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= 0.9995 * one:  # which rounds to it
            return f"{count / one:.1f} {unit}" if count < 10 * one else f"{count / one:.0f} {unit}"
    return f"{count / 1e3:.0f} kB"


def counted(count: int, what: str) -> str:
    """1 job, 2 jobs."""
    return f"{count} {what}{'' if count == 1 else 's'}"


# Each process starts as a copy of one that has loaded torch but run nothing: a copy of this one could hang, for the
# locks of threads that torch may have started here would be held in it for ever.
_fresh = get_context("forkserver")
_fresh.set_forkserver_preload(["orl.pretrain.loop"])


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns in a process of its own, so that a library that dies takes no more with it.

    What it prints is dropped. Raises what the function raises, and RuntimeError where the process dies.
    """
    try:
        with ProcessPoolExecutor(1, _fresh, _silence) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise RuntimeError("the process died, by a fault in a library or for want of memory") from None


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(part for part in (folder, *folder.absolute().parents) if part.is_dir())


# Cores and memory


def _control_group(*files: str) -> Iterator[str]:
    """The contents of a file (v2's name, v1's) of this process's control group and of all above it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        for kind in kinds.split(","):
            for part in (Path(path), *Path(path).parents):
                for file in files:
                    with contextlib.suppress(OSError):
                        yield (Path("/sys/fs/cgroup", kind) / str(part).lstrip("/") / file).read_text()


def cores() -> float:
    """CPU cores that this process may use: its affinity, and the quota of its control group."""
    found: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError):
        limits = [text.split() for text in _control_group("cpu.max")]  # quota and period
        quotas, periods = _control_group("cpu.cfs_quota_us"), _control_group("cpu.cfs_period_us")
        limits += [[quota.strip(), period.strip()] for quota, period in zip(quotas, periods, strict=False)]
        found = min([found, *(int(quota) / int(period) for quota, period in limits if quota not in ("max", "-1"))])
    return found


def memory() -> tuple[float, float]:
    """Bytes of memory that this process may use, and those that are free, the limit of its control group observed."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    with contextlib.suppress(OSError):
        limits = [int(one) for one in _control_group("memory.max", "memory.limit_in_bytes") if one.strip() != "max"]
        used = next(_control_group("memory.current", "memory.usage_in_bytes"), "0")
        total = min([total, *limits])
        free = min([free, *(max(0, limit - int(used)) for limit in limits if limit < kilobytes["MemTotal"] * 1024)])
    return total, free


def _python() -> Iterator[Finding]:
    yield Finding(OK, f"{platform.python_version()}, orl {__version__}, {platform.system()}, {platform.machine()}")


def _cores() -> Iterator[Finding]:
    here, may = os.cpu_count() or 1, cores()
    affinity = len(os.sched_getaffinity(0))
    if may < affinity:
        yield Finding(
            WARNING, f"{affinity} are here, but the control group grants {may:g}: type --cores {max(1, int(may))}"
        )
    else:
        yield Finding(OK, f"{may:g}" + (f" of {here} may be used" if may < here else ""))


def _memory() -> Iterator[Finding]:
    total, free = memory()
    mark, advice = (WARNING, ": stop other programs, trainings need a few GB") if free < 2e9 else (OK, "")
    yield Finding(mark, f"{size(total)}, {size(free)} free{advice}")


# GPUs and libraries


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding(OK, f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"))


class Gpu(NamedTuple):
    """A GPU that this process sees."""

    name: str
    memory: int  # bytes
    free: int
    capability: str
    bfloat16: bool
    fault: str  # why it cannot be used, or nothing


def gpus() -> list[Gpu]:
    """The GPUs that this process sees, each tried with a small product of matrices."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        fault, free = "", 0
        try:
            with torch.cuda.device(number):
                ones = torch.ones(64, 64, device="cuda")
                if (ones @ ones).sum().item() != 64**3:
                    fault = "computes wrong products"
                free = torch.cuda.mem_get_info()[0]
        except RuntimeError as error:
            fault = str(error).splitlines()[0]
        known = torch.cuda.get_device_properties(number)
        capability = f"{known.major}.{known.minor}"
        found.append(Gpu(known.name, known.total_memory, free, capability, known.major >= 8, fault))
    return found


def _gpus() -> Iterator[Finding]:
    found = apart(gpus)
    if not found:
        driver = shutil.which("nvidia-smi") and _told("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        if driver:
            yield Finding(PROBLEM, f"{driver.splitlines()[0]} is here, but PyTorch sees none: {_why_unseen()}")
        else:
            yield Finding(OK, "none: trainings run on the CPU")
    for number, gpu in enumerate(found):
        text = f"{number}: {gpu.name}, {size(gpu.memory)} ({size(gpu.free)} free), capability {gpu.capability}, "
        text += "bfloat16" if gpu.bfloat16 else "no bfloat16: set precision to float16"
        if gpu.fault:
            yield Finding(PROBLEM, f"{text}; it cannot be used ({gpu.fault}): install a PyTorch for this driver")
        else:
            yield Finding(OK if gpu.bfloat16 else WARNING, text)
    if found:
        version = _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        yield Finding(OK, f"driver {version.splitlines()[0]}" if version else "nvidia-smi does not tell the driver")
    if len(found) > 1:
        yield from apart(_nccl)


def _why_unseen() -> str:
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    if not torch.version.cuda:
        return "install a PyTorch with CUDA"
    return f"install a driver for CUDA {torch.version.cuda}, or a PyTorch for this driver"


def _nccl() -> list[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return [Finding(PROBLEM, "NCCL is missing, so several GPUs cannot train together: install a PyTorch with it")]
    return [Finding(OK, f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")]


def _faiss() -> list[Finding]:
    import faiss
    import numpy as np

    rows = np.eye(64, dtype=np.float32)
    gpu_build = hasattr(faiss, "StandardGpuResources")
    count = faiss.get_num_gpus() if gpu_build else 0
    if count:
        _, nearest = faiss.knn_gpu(faiss.StandardGpuResources(), rows, rows, 1, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        _, nearest = faiss.knn(rows, rows, 1, metric=faiss.METRIC_INNER_PRODUCT)
    if (nearest[:, 0] != np.arange(64)).any():
        return [Finding(PROBLEM, f"{faiss.__version__} finds wrong neighbours: install it again")]
    where = f"on {counted(count, 'GPU')}" if count else "on the CPU"
    return [Finding(OK, f"{faiss.__version__}, {'' if gpu_build else 'not '}built for GPUs, searches {where}")]


def _opencv() -> list[Finding]:
    names = {one.metadata["Name"].lower() for one in importlib.metadata.distributions() if one.metadata["Name"]}
    others = sorted(name for name in names if name.startswith("opencv-") and name != OPENCV)
    again = f"pip install --force-reinstall {OPENCV}"
    advice = f"remove {' and '.join(others)} (pip uninstall), then {again}" if others else again
    try:
        import cv2
        import numpy as np

        if not hasattr(getattr(cv2, "ximgproc", None), "segmentation"):
            return [Finding(PROBLEM, f"{cv2.__version__} has no ximgproc, and so no selective search: {advice}")]
        from orl.discovery.proposals import selective_search

        picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        picture[16:48, 16:48] = (200, 30, 30)
        found = selective_search(picture, 0)
    except Exception as error:
        return [Finding(PROBLEM, f"selective search does not run ({_first(error)}): {advice}")]
    if not len(found):
        return [Finding(PROBLEM, f"{cv2.__version__}'s selective search finds nothing: {advice}")]
    return [Finding(OK, f"{cv2.__version__}, selective search runs")]


def _torchvision() -> list[Finding]:
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [20.0, 20.0, 30.0, 30.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    if kept != [0, 2]:
        return [Finding(PROBLEM, f"{torchvision.__version__}: nms keeps wrong boxes: install it again")]
    return [Finding(OK, f"{torchvision.__version__}, nms runs")]


def _files() -> list[Finding]:
    import io

    import h5py
    import numpy as np
    import safetensors.numpy as weights
    from pycocotools import mask

    ones = np.ones((4, 4), np.uint8, order="F")
    with h5py.File(io.BytesIO(), "w") as file:
        file["ones"] = ones
        right = (file["ones"][:] == ones).all()
    right &= (weights.load(weights.save({"ones": ones}))["ones"] == ones).all()
    right &= mask.area(mask.encode(ones)) == 16
    names = ("h5py", "safetensors", "pycocotools")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    if not right:
        return [Finding(PROBLEM, f"{versions}: one does not give back what it was given: install them again")]
    return [Finding(OK, versions)]


def _jpeg() -> list[Finding]:
    import numpy as np
    import simplejpeg

    grey = np.full((16, 16, 3), 128, np.uint8)
    back = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(grey))
    if abs(back.astype(int) - 128).max() > 2:
        return [Finding(PROBLEM, "simplejpeg decodes wrong pixels: install it again")]
    return [Finding(OK, f"simplejpeg {importlib.metadata.version('simplejpeg')} decodes")]


def _compiler() -> Iterator[Finding]:
    name = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a.cpp")
        source.write_text("#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n")
        made = shutil.which(name) and _told(name, str(source), "-o", f"{folder}/a", fails=None) is not None
    if made:
        yield Finding(OK, f"{name} compiles: compute.compile can be used")
    else:
        yield Finding(OK, f"no C++ compiler ({name}): compute.compile cannot be used, nothing else needs one")


# Disk and limits


def _disk(folder: Path) -> Iterator[Finding]:
    for place, name, least in ((existing(folder), "results", 10e9), (Path(tempfile.gettempdir()), "TMPDIR", 1e9)):
        free = shutil.disk_usage(place).free
        try:
            with tempfile.NamedTemporaryFile(dir=place) as file:
                file.write(bytes(2**20))
                file.flush()
        except OSError as error:
            yield Finding(PROBLEM, f"{place} ({name}) takes no file ({error.strerror}): free space, or name another")
            continue
        advice = "" if free >= least else ": free some, or see what a run needs: orl doctor --configfile FILE"
        yield Finding(OK if free >= least else WARNING, f"{size(free)} free in {place} ({name}){advice}")


def _locks(folder: Path) -> Iterator[Finding]:
    """Whether locks and memory maps work where the results lie: some network disks have neither."""
    with tempfile.NamedTemporaryFile(dir=existing(folder)) as file, open(file.name) as second:
        file.write(b"orl" * 5000)
        file.flush()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = False
            except BlockingIOError:
                held = True
        except OSError:
            held = False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            same = mapped[:] == b"orl" * 5000
    if not held:
        yield Finding(PROBLEM, "files cannot be locked where results lie, as trainings do: mount that disk with locks")
    if not same:
        yield Finding(PROBLEM, "memory maps fail where results lie: keep results on another disk")
    if held and same:
        yield Finding(OK, "locks and memory maps work where results lie")


def _shared_memory() -> Iterator[Finding]:
    if not os.path.isdir("/dev/shm"):
        yield Finding(WARNING, "/dev/shm is missing: PyTorch's loaders may fail; type --threads 1")
        return
    free = shutil.disk_usage("/dev/shm").free
    advice = "" if free >= 1e9 else ": too little for large batches; enlarge it (Docker: --shm-size=8g)"
    yield Finding(WARNING if advice else OK, f"{size(free)} free in /dev/shm{advice}")


def _limits() -> Iterator[Finding]:
    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    mark = PROBLEM if soft < 256 else WARNING if soft < 1024 else OK
    advice = "" if mark == OK else f": too few; type ulimit -n {min(4096, hard):g} first"
    yield Finding(mark, f"{soft:g} open files (at most {hard:g}){advice}")
    most = _limit(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    advice = "" if most >= 1024 else ": few; type ulimit -u 4096 first, or ask who runs the machine"
    yield Finding(WARNING if advice else OK, f"{most:g} processes and threads of a user{advice}")


def _limit(value: int) -> float:
    return float("inf") if value == resource.RLIM_INFINITY else value


# Snakemake and SLURM


def _told(*command: str, fails: str | None = "") -> str | None:
    """What a command prints; `fails` where it cannot be run, fails or takes more than 20 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return fails
    return done.stdout


def _snakemake() -> Iterator[Finding]:
    version = _told(sys.executable, "-m", "snakemake", "--version")
    if version:
        yield Finding(OK, version.strip())
    else:
        yield Finding(PROBLEM, "does not run: install orl again, with pip install -e .")


def _slurm() -> Iterator[Finding]:
    try:
        plugin = importlib.metadata.version("snakemake-executor-plugin-slurm")
    except importlib.metadata.PackageNotFoundError:
        plugin = None
    missing = [name for name in ("sbatch", "squeue") if not shutil.which(name)]
    if len(missing) == 2:
        yield Finding(OK, "no SLURM here")
        return
    if missing:
        yield Finding(WARNING, f"{missing[0]} is missing, which the SLURM profile needs: install SLURM's commands")
    if not plugin:
        yield Finding(WARNING, "sbatch is here, but not Snakemake's plugin for it: pip install -e '.[slurm]'")
    else:
        yield Finding(OK, f"Snakemake's plugin {plugin}")
    told = re.search(r"^MinJobAge\s*=\s*(\d+)", _told("scontrol", "show", "config") or "", re.MULTILINE)
    if not told:
        yield Finding(WARNING, "scontrol show config gives no answer: no job can be sent from here")
        return
    age, seconds = int(told[1]), _seconds_before_checks()
    if age < 3 * seconds:
        yield Finding(
            PROBLEM,
            f"MinJobAge is {age} s, less than three times slurm-init-seconds-before-status-checks ({seconds} s) in "
            f"workflow/profiles/slurm, so jobs would be forgotten: set the latter to {age // 3}",
        )
    else:
        yield Finding(OK, f"MinJobAge is {age} s, enough for status checks from {seconds} s on")


def _seconds_before_checks() -> int:
    """Of the profile, or Snakemake's plugin's own."""
    import yaml

    profile = Path("workflow/profiles/slurm/config.yaml")
    profile = profile if profile.is_file() else PROJECT / profile
    try:
        return int(yaml.safe_load(profile.read_text())["slurm-init-seconds-before-status-checks"])
    except (OSError, KeyError):
        return 40


def check(folder: Path = Path("results")) -> Iterator[tuple[str, Finding]]:
    """What each check finds, with its name; `folder` is where results lie. A check that fails is itself a problem."""
    checks: dict[str, Callable[[], Any]] = {
        "Python": _python,
        "CPU cores": _cores,
        "memory": _memory,
        "PyTorch": _torch,
        "GPU": _gpus,
        "FAISS": lambda: apart(_faiss),
        "OpenCV": lambda: apart(_opencv),
        "torchvision": lambda: apart(_torchvision),
        "files": lambda: apart(_files),
        "photos": lambda: apart(_jpeg),
        "compiler": _compiler,
        "disk": lambda: _disk(folder),
        "file system": lambda: _locks(folder),
        "shared memory": _shared_memory,
        "limits": _limits,
        "Snakemake": _snakemake,
        "SLURM": _slurm,
    }
    for name, run in checks.items():
        try:
            for finding in run():
                yield name, finding
        except ImportError as error:
            yield name, Finding(PROBLEM, f"cannot be loaded ({_first(error)}): install orl again (pip install -e .)")
        except Exception as error:  # whatever is wrong with a machine, the other checks go on
            yield name, Finding(PROBLEM, f"cannot be checked ({_first(error)})")


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def report(folder: Path = Path("results")) -> bool:
    """Print a line for each finding; whether there is no problem."""
    marks = []
    for name, finding in check(folder):
        print(f"{finding.mark:8} {name:14} {finding.text}", flush=True)
        marks.append(finding.mark)
    print(", ".join(counted(marks.count(mark), mark) for mark in (PROBLEM, WARNING)))
    return PROBLEM not in marks
