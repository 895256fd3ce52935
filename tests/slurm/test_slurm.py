"""The workflow on a SLURM cluster, by its profile: what jobs ask for, and what is left of them after each mishap."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from cluster import snakemake, wait_for
from conftest import PROJECT, SETTINGS, STAGE1, local, longer, same_model

from orl import artifacts
from orl.config import merge

GPU_RULES = {"stage1": 2, "stage3": 2, "embed": 1, "neighbors": 1, "rois": 1, "features": 1}
EPOCHS = 60  # half a minute on one core: time enough to be disturbed


def finished(process, folder):
    """Wait for Snakemake's good end."""
    assert process.wait(3000) == 0, (folder / "snakemake.log").read_text()[-5000:]


def training(cluster, folder):
    """Wait until stage 1 has saved its first checkpoint; SLURM's record of the job."""
    states = folder / Path(STAGE1).parent / "state"
    wait_for(lambda: list(states.glob("*/checkpoint.pt")), "a checkpoint")
    (job,) = running(cluster, folder)
    return job


def running(cluster, folder, rule="stage1"):
    return [job for job in cluster.jobs(rule) if job["WorkDir"] == str(folder) and job["JobState"] == "RUNNING"]


def jobs_of(cluster, folder, rule=""):
    return [job for job in cluster.jobs(rule) if job["WorkDir"] == str(folder)]


def log_of(folder, job):
    """What a job printed; the plugin keeps it where the job failed."""
    (log,) = (folder / "logs" / "slurm").rglob(f"{job['JobId']}.log")
    return log.read_text()


def test_the_whole_run(cluster, tmp_path):
    """All files are those of a run without a cluster; SLURM gave each job what its rule says."""
    folder, other = tmp_path / "run", tmp_path / "local"
    for one in (folder, other):
        one.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    process = snakemake(cluster, folder)
    local(other, SETTINGS, "--cores", "2")  # as many threads: else trainings differ in the last bits
    finished(process, folder)
    results = Path("results", "tiny")
    made = [path.relative_to(other) for path in sorted((other / results).rglob("*")) if path.is_file()]
    assert len(made) > 100
    for path in made:
        # The page tells of times and the machine; manifest.csv.state, when each photo was drawn.
        files = ("config.json", "manifest.csv.state")
        if not {"logs", "benchmarks", "report", "state"} & set(path.parts) and path.name not in files:
            assert (folder / path).read_bytes() == (other / path).read_bytes(), path

    jobs = jobs_of(cluster, folder)
    rules = {}
    for job in jobs:
        assert job["JobState"] == "COMPLETED"
        name = re.fullmatch(r"rule_(?:pairs_)?(\w+?)(?:_wildcards_.*)?", job["Comment"])[1]
        rules.setdefault(name, []).append(job)
    assert {name: len(found) for name, found in rules.items()} == {
        "scenes": 1, "manifest": 1, "random": 1, "stage1": 1, "stage3": 1, "embed": 1, "propose": 3, "rois": 2,
        "neighbors": 1, "correspond": 1, "merge": 3, "features": 3, "voc07_svm": 3, "proposals_recall": 1,
        "pair_precision": 1, "card": 2, "report": 1,
    }  # fmt: skip
    for name, found in rules.items():
        gpus = GPU_RULES.get(name)
        for job in found:
            assert job.get("TresPerJob") == (f"gres:gpu:{gpus}" if gpus else None)
            assert job["JOB_GRES"] == (f"gpu:fake:{gpus}" if gpus else "(null)")  # what it was given
            assert job["Partition"] == ("gpu" if gpus else "cpu")
            assert job["Requeue"] == "1"
    (stage1,), (manifest,), (pairs,) = rules["stage1"], rules["manifest"], rules["correspond"]
    assert (stage1["MinMemoryNode"], stage1["TimeLimit"], stage1["NumCPUs"]) == ("9200M", "1-00:00:00", "2")
    assert (manifest["MinMemoryNode"], manifest["TimeLimit"], manifest["NumCPUs"]) == ("2300M", "01:00:00", "1")
    assert pairs["MinMemoryNode"] == "6000M"  # both shards, side by side with two threads each
    assert "no GPU is visible: running on the CPU" in (folder / results / "logs" / "stage1.log").read_text()


def test_a_cancelled_training_goes_on(cluster, about_to_train, trained):
    """In a folder whose name a shell would trip over."""
    folder = about_to_train(EPOCHS, "a run; $(touch pwned) `touch pwned` é")
    process = snakemake(cluster, folder, STAGE1)
    job = training(cluster, folder)
    cluster.run("scancel", job["JobId"])
    finished(process, folder)
    first, second = jobs_of(cluster, folder, "stage1")
    assert (first["JobState"], second["JobState"]) == ("CANCELLED", "COMPLETED")
    assert re.search(r"stage1: stopped at step [1-9]\d*; run again to go on", log_of(folder, first))
    assert re.search(r"going on from step [1-9]", (folder / "results/tiny/logs/stage1.log").read_text())
    assert int(second["MinMemoryNode"][:-1]) == 2 * int(first["MinMemoryNode"][:-1])  # more with each attempt
    assert same_model(folder, trained(EPOCHS))
    assert not list(folder.parent.rglob("pwned"))


def test_a_training_longer_than_its_time_limit(cluster, about_to_train, trained):
    folder = about_to_train(4 * EPOCHS)
    limits = ["stage1:runtime=1", "stage1:slurm_partition=gpu"]  # instead of all that the profile sets so
    process = snakemake(cluster, folder, "--set-resources", *limits, "--retries", "30", STAGE1)
    reference = trained(4 * EPOCHS)  # meanwhile
    finished(process, folder)
    *others, last = jobs_of(cluster, folder, "stage1")
    assert others
    assert {job["TimeLimit"] for job in (*others, last)} == {"00:01:00"}
    assert {job["JobState"] for job in others} == {"TIMEOUT"}
    assert last["JobState"] == "COMPLETED"
    logs = [log_of(folder, job) for job in others]
    ends = [re.search(r"stage1: stopped at step (\d+); run again to go on", log) for log in logs]
    if ends[-1] is None:  # SLURM looks every half minute: this one came to the end first
        assert "stage1: done: " in logs[-1]
        ends.pop()
    steps = [int(end[1]) for end in ends]
    assert steps
    assert steps == sorted(set(steps))
    assert same_model(folder, reference)


def test_snakemake_killed(cluster, about_to_train, trained):
    """A hasty second run does not train at the same time; the guide's lines put things right."""
    folder = about_to_train(4 * EPOCHS)
    process = snakemake(cluster, folder, STAGE1)
    first = training(cluster, folder)
    process.kill()
    process.wait()
    assert "cannot be locked" in re.sub(r"\s+", " ", fails(cluster, folder, STAGE1))
    snakemake(cluster, folder, "--unlock").wait()
    assert "another training runs there; wait for it or stop it." in fails(cluster, folder, "--retries", "0", STAGE1)
    *_, second = jobs_of(cluster, folder, "stage1")
    assert (second["JobState"], second["ExitCode"]) == ("FAILED", "1:0")
    assert [job["JobId"] for job in running(cluster, folder)] == [first["JobId"]]

    guide = (PROJECT / "docs" / "guides" / "slurm.md").read_text().partition("## When Snakemake itself is killed")[2]
    lines = re.search(r"```\n(.*?)```", guide, re.DOTALL)[1].replace("config/coco.yaml", "config.yaml")
    lines = lines.replace("NAME", first["JobName"]).replace("~/orl-slurm", f"{PROJECT}/workflow/profiles/slurm")
    lines = re.sub(
        r"(snakemake .*)", rf"\1 --snakefile {PROJECT}/Snakefile --slurm-init-seconds-before-status-checks 3", lines
    )
    look, cancel, again, unlock, run = lines.splitlines()
    assert f"{first['JobName']} {first['JobId']} RUNNING rule_stage1" in shell(cluster, folder, look)
    shell(cluster, folder, cancel)
    wait_for(lambda: not shell(cluster, folder, again.replace("squeue", "squeue -h")), "the end of the jobs")
    shell(cluster, folder, unlock)
    shell(cluster, folder, f"{run} {STAGE1}")
    assert re.search(r"going on from step [1-9]", (folder / "results/tiny/logs/stage1.log").read_text())
    assert same_model(folder, trained(4 * EPOCHS))


def fails(cluster, folder, *arguments):
    """What a Snakemake that must fail adds to its log."""
    log = folder / "snakemake.log"
    start = len(log.read_text())
    assert snakemake(cluster, folder, *arguments).wait(1000) == 1
    return log.read_text()[start:]


def shell(cluster, folder, line):
    """What a line prints that a user types in the folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{cluster.env['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**cluster.env, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_drained_node(cluster, about_to_train, trained):
    """Its training ends there, what comes after runs elsewhere."""
    folder = about_to_train(EPOCHS)
    process = snakemake(cluster, folder, "results/tiny/discovery/embeddings.h5")
    node = training(cluster, folder)["NodeList"]
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    try:
        finished(process, folder)
        (stage1,), (embed,) = jobs_of(cluster, folder, "stage1"), jobs_of(cluster, folder, "embed")
        assert (stage1["JobState"], stage1["NodeList"], stage1["Restarts"]) == ("COMPLETED", node, "0")
        assert (embed["JobState"], embed["NodeList"]) == ("COMPLETED", {"n1": "n2", "n2": "n1"}[node])
        assert same_model(folder, trained(EPOCHS))
    finally:
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


def test_a_lost_node(cluster, about_to_train, trained):
    """All of its processes die at once; SLURM queues the same job again, which goes on from its checkpoint."""
    folder = about_to_train(EPOCHS)
    process = snakemake(cluster, folder, STAGE1)
    job = training(cluster, folder)
    cluster.crash(job["NodeList"])
    try:
        wait_for(lambda: jobs_of(cluster, folder, "stage1")[0]["JobState"] == "PENDING", "the job in the queue again")
        cluster.run("scontrol", "update", f"JobId={job['JobId']}", "StartTime=now")  # SLURM waits for two minutes
        finished(process, folder)
    finally:
        cluster.repair(job["NodeList"])
    (again,) = jobs_of(cluster, folder, "stage1")
    assert (again["JobState"], again["Restarts"]) == ("COMPLETED", "1")
    assert again["NodeList"] != job["NodeList"]
    assert re.search(r"going on from step [1-9]", (folder / "results/tiny/logs/stage1.log").read_text())
    assert same_model(folder, trained(EPOCHS))


def test_a_failing_shard_is_retried_alone(cluster, about_to_train):
    folder = about_to_train(1)
    photo = folder / "results/tiny/scenes" / artifacts.read_manifest(folder / "results/tiny/manifest.csv").path[8]
    photo.rename(folder / "away")  # of the second of three shards
    process = snakemake(cluster, folder, "results/tiny/discovery/proposals.h5")
    wait_for(lambda: any(job["JobState"] == "FAILED" for job in jobs_of(cluster, folder, "propose")), "a failure")
    (folder / "away").rename(photo)
    finished(process, folder)
    states = {}
    for job in jobs_of(cluster, folder, "propose"):
        states.setdefault(job["Comment"], []).append(job["JobState"])
    failed = states.pop("rule_propose_wildcards__0002-of-0003")
    assert set(failed[:-1]) == {"FAILED"}
    assert failed[-1] == "COMPLETED"
    assert states == {f"rule_propose_wildcards__000{number}-of-0003": ["COMPLETED"] for number in (1, 3)}
    boxes = artifacts.read_proposals(folder / "results/tiny/discovery/proposals.h5")
    assert len(boxes.box_offsets) == 25
    assert (np.diff(boxes.box_offsets) > 0).all()


def test_two_nodes_train_together(cluster, about_to_train, tmp_path):
    """By srun and torchrun: as two processes on one machine do."""
    folder = about_to_train(2)
    (folder / "config.yaml").write_text(yaml.safe_dump(merge(longer(2), {"compute": {"nodes": 2}})))
    finished(snakemake(cluster, folder, STAGE1), folder)
    (job,) = jobs_of(cluster, folder, "stage1")
    assert (job["JobState"], job["NumNodes"], job["NodeList"]) == ("COMPLETED", "2", "n[1-2]")
    assert job["TresPerJob"] == "gres:gpu:2"
    settings = json.dumps({"stage1": longer(2)["stage1"]})
    command = ["-m", "orl.torchrun", "--standalone", "--nproc-per-node", "2", "-m", "orl", "pretrain",
               "--stage", "stage1", "--settings", settings, "--root", "results/tiny/scenes",
               "--manifest", "results/tiny/manifest.csv", "--output", str(tmp_path / "two" / Path(STAGE1).parent),
               "--threads", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True)
    assert same_model(folder, tmp_path / "two")
