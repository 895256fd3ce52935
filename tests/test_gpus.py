"""Leases between real processes, on GPUs that are only names: `gpus.count` is what the tests replace."""

import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orl import InputError, cli, gpus

NAMES = "GPU-aa,GPU-bb,GPU-cc,GPU-dd"
LEASE = """
import json, os, sys
from orl import gpus
gpus.count = lambda: {count}
print(json.dumps(gpus.lease({wanted})), flush=True)
print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
{then}
"""
HOLD = "sys.stdin.read()"


@pytest.fixture
def job(tmp_path):
    """Starts a process that leases GPUs, and holds them until its stdin is closed; all end with the test."""
    started = []

    def start(wanted, then=HOLD, count=4, **environment):
        known = {name: value for name, value in os.environ.items() if name not in ("SLURM_JOB_ID", "WORLD_SIZE")}
        process = subprocess.Popen(
            [sys.executable, "-c", LEASE.format(wanted=wanted, then=then, count=count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**known, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": NAMES, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        with process:
            pass


def taken(process):
    """The GPUs that a job has taken, once it has."""
    names = json.loads(process.stdout.readline())
    assert process.stdout.readline().strip() == ",".join(names)
    return names


def free(tmp_path):
    """How many of the four GPUs no job has taken."""
    code = "import fcntl, sys\nfor name in sys.argv[1:]:\n  fcntl.flock(open(name), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    files = [tmp_path / f"orl-gpus-{os.getuid()}" / name for name in NAMES.split(",")]
    return sum(
        not path.exists() or subprocess.run([sys.executable, "-c", code, path], capture_output=True).returncode == 0
        for path in files
    )


# Leases


def test_jobs_that_start_together_get_different_gpus(job):
    jobs = [job(1) for _ in range(4)]
    assert sorted(name for process in jobs for name in taken(process)) == NAMES.split(",")


def test_a_job_takes_all_or_waits_holding_none(job, tmp_path):
    first, second = job(2), job(1)
    held = [*taken(first), *taken(second)]
    assert len(set(held)) == 3
    waiting = job(2)
    assert waiting.stderr.readline() == "waiting until 2 of 4 GPUs are free\n"
    assert free(tmp_path) == 1
    small = job(1)  # the one that is left goes to a job that needs no more
    assert {*held, *taken(small)} == set(NAMES.split(","))
    first.kill()
    assert taken(waiting) == held[:2]
    assert waiting.communicate("")[1] == ""  # said once


def test_two_jobs_that_want_most_take_turns(job):
    jobs = [job(3) for _ in range(2)]
    ready, _, _ = select.select([process.stdout for process in jobs], [], [], 30)
    first, second = sorted(jobs, key=lambda process: process.stdout not in ready)
    assert len(taken(first)) == 3
    assert "waiting until 3 of 4" in second.stderr.readline()
    first.kill()
    assert len(taken(second)) == 3


def test_more_than_there_are_is_all(job):
    assert taken(job(8)) == NAMES.split(",")


def test_kill_9_frees(job):
    first = job(4)
    taken(first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(taken(job(4))) == 4


def test_a_lease_outlives_exec_and_ends_with_what_it_became(job, tmp_path):
    first = job(3, then="os.execvp('sleep', ['sleep', '60'])")
    taken(first)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{first.pid}/comm").read_text().strip() != "sleep":
        assert time.monotonic() < deadline
    assert free(tmp_path) == 1
    second = job(2)
    assert "waiting until 2" in second.stderr.readline()
    first.kill()
    assert len(taken(second)) == 2


def test_a_child_that_runs_on_keeps_the_lease(job, tmp_path):
    """A forked worker, say, that still holds memory of the GPU."""
    then = "pid = os.fork() or os.execvp('sleep', ['sleep', '60'])\nprint(pid, flush=True)\nos._exit(0)"
    first = job(1, then=then)
    taken(first)
    pid = int(first.stdout.readline())
    first.wait()
    try:
        assert free(tmp_path) == 3
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_second_lease_replaces_the_first(job):
    process = job(3, then="print(json.dumps(gpus.lease(2)), flush=True)\nsys.stdin.read()")
    first = taken(process)
    assert json.loads(process.stdout.readline()) == first[:2]
    assert len(taken(job(2))) == 2


def test_none_wanted_hides_all(job, tmp_path):
    assert taken(job(0)) == []
    assert not (tmp_path / f"orl-gpus-{os.getuid()}").exists()


def test_none_visible_is_said_once(job):
    process = job(2, count=0)
    assert json.loads(process.stdout.readline()) == []
    _, errors = process.communicate("")
    assert errors == "no GPU is visible: running on the CPU\n"


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "WORLD_SIZE"])
def test_who_has_gpus_already_is_left_alone(job, tmp_path, name):
    process = job(2, **{name: "4"})
    assert json.loads(process.stdout.readline()) == ["GPU-aa", "GPU-bb"]
    assert process.stdout.readline().strip() == NAMES
    assert not (tmp_path / f"orl-gpus-{os.getuid()}").exists()


def test_the_folder_is_private_and_the_files_stay(job, tmp_path):
    taken(job(1))
    folder = tmp_path / f"orl-gpus-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("GPU-aa", "gate"):
        assert (folder / name).stat().st_mode & 0o7777 == 0o1600


@pytest.mark.parametrize(
    ("named", "count", "names"),
    [
        (None, 3, ["0", "1", "2"]),
        ("", 3, []),
        ("0,1", 0, []),  # named, but no GPU is there
        ("2, 0", 2, ["2", "0"]),
        ("1,-1,0", 1, ["1"]),  # CUDA sees what stands before the first bad name
        ("MIG-GPU-1/2/3", 1, ["MIG-GPU-1/2/3"]),
    ],
)
def test_what_is_visible(named, count, names, monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: count)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus.visible() == names


def test_a_name_with_slashes_is_leased(job):
    process = job(1, count=1, CUDA_VISIBLE_DEVICES="MIG-GPU-1/2/3")
    assert taken(process) == ["MIG-GPU-1/2/3"]


def test_a_folder_of_another_kind_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(gpus, "FOLDER", tmp_path / "link")
    with pytest.raises(InputError, match="not a folder of yours"):
        gpus.lease(1)


def refuses(folder, sentence, monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpus, "FOLDER", folder)
    with pytest.raises(InputError, match=f"^{folder}: {sentence}; .*\\.$"):
        gpus.lease(1)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o750, 0o701])
def test_a_folder_that_others_reach_is_refused(mode, tmp_path, monkeypatch):
    folder = tmp_path / "leases"
    folder.mkdir()
    folder.chmod(mode)
    refuses(folder, "is open to other users", monkeypatch)
    assert list(folder.iterdir()) == []


def test_a_link_or_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("nowhere")
    refuses(tmp_path / "link", "is not a folder of yours", monkeypatch)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "foreign").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    refuses(tmp_path / "foreign", "is not a folder of yours", monkeypatch)


@pytest.mark.parametrize("name", ["gate", "0"])
def test_no_link_in_the_folder_is_followed(name, tmp_path, monkeypatch):
    folder, precious = tmp_path / "leases", tmp_path / "precious"
    folder.mkdir(mode=0o700)
    precious.write_text("content")
    (folder / name).symlink_to(precious)
    monkeypatch.setattr(gpus, "count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpus, "FOLDER", folder)
    with pytest.raises(OSError, match="symbolic"):
        gpus.lease(1)
    assert precious.read_text() == "content"


def test_counting_leaves_cuda_unstarted():
    code = "import torch; from orl import gpus; print(gpus.count()); print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\nFalse\n", done.stdout)
    assert done.stderr == ""


# Processes of a training


@given(st.integers(0, 20), st.integers(2, 300), st.integers(1, 4))
def test_ranks_is_the_largest_number_that_fits(granted, part, accumulation):
    found = gpus.ranks(granted, part * accumulation, accumulation)
    fits = {n: part % n == 0 and part / n >= 2 for n in range(1, 21)}
    assert fits[found]
    assert found <= max(granted, 1)
    assert not any(fits[n] for n in range(found + 1, granted + 1))


@given(st.integers(0, 20), st.integers(1, 300), st.integers(3, 40))
def test_each_process_gets_whole_groups(granted, photos, group):
    found = gpus.ranks(granted, 2 * photos, group=group)
    fits = {n: 2 * photos % n == 0 and (2 * photos // n) % group == 0 for n in range(1, 21)}
    assert found == 1 or fits[found]
    assert found <= max(granted, 1)
    assert not any(fits[n] for n in range(found + 1, granted + 1))


def test_one_photo_trains_where_one_is_enough():
    assert gpus.ranks(4, 1, 1, 1) == 1


@pytest.mark.parametrize(("batch", "accumulation"), [(512, 3), (4, 4), (4, 8)])
def test_parts_of_a_step_are_equal_and_hold_two_photos(batch, accumulation):
    text = rf"optimizer\.accumulation is {accumulation}, which does not divide optimizer\.batch, {batch}, into parts of"
    with pytest.raises(InputError, match=text):
        gpus.ranks(8, batch, accumulation)


@pytest.fixture
def pretrain(monkeypatch, tmp_path, capsys):
    """Runs `orl pretrain` as if there were GPUs: exit status, what took the process's place, and stderr."""

    def run(*options, visible=4, batch=8, accumulation=1):
        monkeypatch.setattr(gpus, "FOLDER", tmp_path / "gpus")
        monkeypatch.setattr(gpus, "count", lambda: min(visible, len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(visible))))
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        monkeypatch.setattr(os, "execvp", lambda *command: replaced.append(command) or sys.exit(0))
        monkeypatch.setattr("orl.pretrain.loop.train", lambda *_, **options: trained.append(options))
        settings = {"stage1": {"optimizer": {"batch": batch, "accumulation": accumulation}}}
        argv = ["pretrain", "--stage", "stage1", "--settings", json.dumps(settings), "--root", "r", "--manifest", "m"]
        argv += ["--output", str(tmp_path / "out"), "--threads", "6", *options]
        replaced, trained, status = [], [], 0
        try:
            cli.main(argv)
        except SystemExit as end:
            status = end.code
        assert len(replaced) + len(trained) == (status == 0)
        return status, argv, replaced, trained, capsys.readouterr().err.splitlines()

    for name in ("SLURM_JOB_ID", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return run


@pytest.mark.parametrize(
    ("options", "visible", "batch", "number", "said"),
    [
        (["--gpus", "2"], 4, 8, 2, None),
        ([], 4, 8, 4, None),
        (["--gpus", "8"], 2, 8, 2, None),
        (["--gpus", "4"], 4, 510, 3, "training on 3 of 4 GPUs: 510 photos at a time cannot be divided by 4, at least"),
        (["--gpus", "8"], 8, 6, 3, "training on 3 of 8 GPUs: 6 photos at a time cannot be divided by 8, 7, 6, 5 or 4"),
    ],
)
def test_torchrun_takes_the_place(options, visible, batch, number, said, pretrain):
    _, argv, [(program, command)], _, lines = pretrain(*options, visible=visible, batch=batch)
    assert program == command[0] == sys.executable
    options = ["--nproc-per-node", str(number), "--standalone"]
    assert command[1:] == ["-m", "orl.torchrun", *options, "-m", "orl", *argv]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, range(number)))  # no more than are used
    assert os.environ["OMP_NUM_THREADS"] == str(6 // number)
    assert len(lines) == (said is not None)
    assert said is None or lines[0].startswith(said)


@pytest.mark.parametrize(
    ("options", "visible", "batch", "number", "said"),
    [
        (["--gpus", "8"], 4, 8, 2, "training on 4 of 8 GPUs: 8 photos at a time cannot be divided by 8 or 6, at least"),
        (["--gpus", "4"], 4, 8, 2, None),
        (["--gpus", "8"], 0, 8, 1, "no GPU is visible: running on the CPU"),
    ],
)
def test_srun_starts_torchrun_on_each_node(options, visible, batch, number, said, pretrain, monkeypatch, tmp_path):
    (tmp_path / "srun").touch(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "20017")
    _, argv, [(program, command)], _, lines = pretrain(*options, "--nodes", "2", visible=visible, batch=batch)
    start = command.index(sys.executable)
    assert program == command[0] == "srun"
    assert (
        " ".join(command[1:start]) == "--nodes 2 --ntasks 2 --ntasks-per-node 1 --cpus-per-task 6 --kill-on-bad-exit=1"
    )
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "20017", "--rdzv-endpoint"]
    meet.append(f"{platform.node()}:20017")
    expected = ["-m", "orl.torchrun", "--nproc-per-node", str(number), *meet, "-m", "orl", *argv]
    assert command[start + 1 :] == expected
    assert len(lines) == (said is not None)
    assert said is None or lines[0].startswith(said)


def test_several_nodes_need_slurm(pretrain):
    status, *_, lines = pretrain("--nodes", "2")
    assert status == 2
    assert lines == [
        "orl pretrain: compute.nodes is 2, but this is no SLURM job; run the workflow with workflow/profiles/slurm, "
        "set it to 1, or start torchrun on each node."
    ]


@pytest.mark.parametrize(
    ("options", "visible", "batch", "left", "said"),
    [
        (["--gpus", "1"], 4, 8, "0", []),
        (["--gpus", "0"], 4, 8, "", ["no GPU was granted: running on the CPU"]),
        (["--gpus", "2"], 0, 8, "", ["no GPU is visible: running on the CPU"]),
        ([], 0, 8, "", []),
        ([], 2, 3, "0", ["training on 1 of 2 GPUs: 3 photos at a time cannot be divided by 2, at least 2 for each"]),
    ],
)
def test_one_process_trains_itself(options, visible, batch, left, said, pretrain):
    _, _, replaced, trained, lines = pretrain(*options, visible=visible, batch=batch)
    assert not replaced
    assert len(trained) == 1
    assert lines == said
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_accumulation_cuts_the_step_first(pretrain):
    *_, lines = pretrain(batch=24, accumulation=2)
    assert lines == []
    status, *_, lines = pretrain(batch=24, accumulation=5)
    assert status == 2
    assert lines == [
        "orl pretrain: optimizer.accumulation is 5, which does not divide optimizer.batch, 24, into parts of at least "
        "2 photos; change one."
    ]


def test_settings_of_speed_reach_the_training(pretrain):
    _, _, _, [options], _ = pretrain("--gpus", "0", "--compile", "1", "--deterministic", "1")
    assert (options["compile"], options["deterministic"]) == (True, True)
    _, _, _, [options], _ = pretrain("--gpus", "0")
    assert (options["compile"], options["deterministic"]) == (False, False)


def test_a_process_of_torchrun_takes_nothing(pretrain, monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "_end_with_torchrun", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, _, replaced, trained, lines = pretrain("--gpus", "2")
    assert (len(replaced), len(trained), lines) == (0, 1, [])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert not (tmp_path / "gpus").exists()


@pytest.mark.parametrize(
    ("world", "batch", "accumulation", "fit"), [(3, 8, 1, 2), (16, 8, 1, 4), (8, 16, 2, 4), (2, 3, 1, 1)]
)
def test_more_processes_than_a_batch_has_room_for(world, batch, accumulation, fit, pretrain, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    status, *_, lines = pretrain(batch=batch, accumulation=accumulation)
    assert status == 2
    assert lines == [
        f"orl pretrain: {batch // accumulation} photos at a time cannot be divided among {world} processes, at least 2 "
        f"for each; start {fit} or change the batch."
    ]


def torchrun(*script, **options):
    """Two processes by orl.torchrun."""
    line = [sys.executable, "-m", "orl.torchrun", "--standalone", "--nproc-per-node", "2", *map(str, script)]
    known = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    env = {**known, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (512, "nowhere.csv: no such file; make it with `orl manifest`."),
        (3, "3 photos at a time cannot be divided among 2 processes, at least 2 for each; start 1 or change "
            "the batch."),
    ],
)  # fmt: skip
def test_what_is_wrong_for_all_processes_is_one_sentence(batch, sentence, tmp_path):
    settings = json.dumps({"stage1": {"optimizer": {"batch": batch}}})
    line = ["-m", "orl", "pretrain", "--stage", "stage1", "--settings", settings]
    process = torchrun(*line, "--root", "r", "--manifest", "nowhere.csv", "--output", "out", cwd=tmp_path)
    assert process.communicate(timeout=120)[1] == f"orl pretrain: {sentence}\n"
    assert process.returncode == 2
    assert list(tmp_path.iterdir()) == []


RANK = """
import os, signal, sys, time
from orl import gpus
gpus._end_with_torchrun()
def end(*_):
    os.write(1, f"ended {os.environ['RANK']}\\n".encode())
    os._exit(143)
signal.signal(signal.SIGTERM, end)
os.write(1, b"ready\\n")
if (sys.argv[1], os.environ["RANK"]) == ("killed", "1"):
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["SIGTERM", "SIGKILL"])
def test_the_processes_end_with_torchrun(sent, status, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    process = torchrun(tmp_path / "rank.py", "-")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(sent)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["ended 0\n", "ended 1\n"]
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == status


def test_a_killed_process_is_named(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    process = torchrun(tmp_path / "rank.py", "killed")
    errors = process.communicate(timeout=120)[1]
    assert errors == "orl: process 1 of the training was killed (SIGKILL); memory may be short\n"
    assert process.returncode == 137
