"""`orl doctor` on this machine, and in surroundings that lack something."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orl.doctor import machine

PROJECT = Path(__file__).parents[2]
NAMES = ("Python", "CPU cores", "memory", "PyTorch", "GPU", "FAISS", "OpenCV", "torchvision", "files", "photos",
         "compiler", "disk", "file system", "shared memory", "limits", "Snakemake", "SLURM")  # fmt: skip
LINE = re.compile(rf"(ok|warning|problem) +({'|'.join(NAMES)}) +(\S.*)")


def doctor(folder, first=(), stubs=None, **options):
    """The findings of `orl doctor`, name -> (mark, text) of each; and its exit status."""
    path = os.pathsep.join(map(str, filter(None, (stubs, PROJECT, os.environ.get("PYTHONPATH")))))
    environment = {**os.environ, "PYTHONPATH": path, **options.pop("env", {})}
    command = [*first, sys.executable, "-m", "orl", "doctor"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600, **options
    )
    *lines, last = done.stdout.splitlines()
    found = {}
    for line in lines:
        mark, name, text = LINE.fullmatch(line).groups()
        found.setdefault(name, []).append((mark, text))
    marks = [mark for findings in found.values() for mark, _ in findings]
    assert tuple(found) == NAMES, done.stderr
    assert last.startswith(f"{machine.counted(marks.count('problem'), 'problem')}, ")
    assert done.returncode == ("problem" in marks)
    return found


def test_what_the_tests_use_works_on_this_machine(tmp_path):
    found = doctor(tmp_path)
    for name in ("Python", "PyTorch", "FAISS", "OpenCV", "torchvision", "files", "photos", "file system", "Snakemake"):
        assert [mark for mark, _ in found[name]] == ["ok"], found[name]
    assert list(tmp_path.iterdir()) == []  # none of the files that were tried is left


def test_a_cv2_without_ximgproc_names_the_package_to_remove(tmp_path):
    stubs = tmp_path / "stubs"
    info = stubs / "opencv_python-4.10.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: opencv-python\nVersion: 4.10.0\n")
    (stubs / "cv2.py").write_text("__version__ = '4.10.0'\n")
    ((mark, text),) = doctor(tmp_path, stubs=stubs)["OpenCV"]
    assert mark == "problem"
    assert "no ximgproc" in text
    assert "remove opencv-python (pip uninstall)" in text
    assert text.endswith("pip install --force-reinstall opencv-contrib-python-headless")


def test_libraries_that_die_or_are_missing_leave_the_other_checks_standing(tmp_path):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "cv2.py").write_text("import os\nos.abort()\n")
    (stubs / "faiss.py").write_text("raise ImportError('libcudart.so is missing')\n")
    found = doctor(tmp_path, stubs=stubs)
    ((mark, text),) = found["OpenCV"]
    assert (mark, text) == ("problem", "cannot be checked (the process died, by a fault in a library or for want of "
                            "memory)")  # fmt: skip
    ((mark, text),) = found["FAISS"]
    assert mark == "problem"
    assert text == "cannot be loaded (libcudart.so is missing): install orl again (pip install -e .)"
    assert found["torchvision"][0][0] == "ok"


def test_few_open_files_and_few_cores(tmp_path):
    def limit():
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    found = doctor(tmp_path, preexec_fn=limit)
    mark, text = found["limits"][0]
    assert mark == "problem"
    assert re.fullmatch(r"200 open files \(at most \S+\): too few; type ulimit -n \d+ first", text)
    ((mark, text),) = found["CPU cores"]
    assert mark == "ok"
    assert text == ("1" if os.cpu_count() == 1 else f"1 of {os.cpu_count()} may be used")


def in_a_small_disk(folder, size):
    """What to put before a command so that `folder` is a disk of this size to it; skips where this is denied."""
    prefix = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} none {folder} && cd {folder} && exec "$@"',
              "sh"]  # fmt: skip
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    return prefix


def test_a_full_disk(tmp_path):
    marks = doctor(tmp_path, in_a_small_disk(tmp_path, "64k"))
    text = f"{tmp_path} (results) takes no file (No space left on device): free space, or name another"
    assert ("problem", text) in marks["disk"]


@pytest.mark.parametrize(("age", "mark"), [(300, "ok"), (119, "problem"), (None, "warning")])
def test_slurm_must_remember_jobs_for_long_enough(tmp_path, age, mark):
    commands = tmp_path / "bin"
    commands.mkdir()
    told = "exit 1" if age is None else f"echo 'MaxJobId = 67043328'\necho 'MinJobAge               = {age} sec'"
    for name in ("sbatch", "squeue", "scontrol"):
        (commands / name).write_text(f"#!/bin/sh\n{told}\n")
        (commands / name).chmod(0o755)
    found = doctor(tmp_path, env={"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"})
    last, text = found["SLURM"][-1]
    assert last == mark
    if age == 119:
        assert "MinJobAge is 119 s, less than three times slurm-init-seconds-before-status-checks (40 s)" in text
        assert text.endswith("set the latter to 39")


def test_a_process_apart_hands_on_what_it_returns_and_raises():
    assert machine.apart(sorted, [2, 1]) == [1, 2]
    with pytest.raises(ValueError, match="invalid literal"):
        machine.apart(int, "one")
    with pytest.raises(RuntimeError, match="died"):
        machine.apart(os._exit, 3)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 kB"), (4.2e6, "4.2 MB"), (31.4e9, "31 GB"), (999.9e6, "1.0 GB"), (2e12, "2.0 TB")]
)
def test_sizes_for_people(count, text):
    assert machine.size(count) == text
