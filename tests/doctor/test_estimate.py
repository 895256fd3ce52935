"""Estimates of runs beside the runs themselves: jobs, files, and what does not fit."""

import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter

import h5py
import pytest
import yaml
from test_workflow import PROJECT, TINY

from orl.config import Config, merge
from orl.doctor import estimate, jobs

SETTINGS = merge(TINY, {"compute": {"threads": 1}})
VARIANTS = {
    "repeats": 2,
    "variants": {"k2": {"neighbors": {"k": 2}}, "grid": {"measure": ["pairs"], "proposals": {"method": "grid"}}},
}
SMALL = {"resize": 40, "size": 32}
ALL_TASKS = {
    "downstream": {
        "tasks": ["all"],
        "linear": SMALL,
        "semi": {"shares": [0.5], "weight_decay": [0.0], "lr": [0.1], "head": [1, 10], **SMALL},
        "knn": SMALL,
        "detection": {"batch": 2, "channels": 16, "rois": 16, "short_sides": [64], "test_side": 64, "long_side": 96},
        "segmentation": {"resize": 64, "size": 64, "batch": 4},
        "localization": {"side": 64},
    },
    "export": ["torchvision", "timm"],
}


def written(folder, *changes):
    """Config files, each laid over those before."""
    files = []
    for number, config in enumerate([SETTINGS, *changes]):
        files.append(folder / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(config))
    return list(map(str, files))


def snakemake(folder, files, *arguments):
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", "2",
               "--directory", str(folder), "--configfile", *files, *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def doctor(folder, *arguments, first=()):
    path = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    command = [*first, sys.executable, "-m", "orl", "doctor", "--seconds", "2", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("changes", [(), (VARIANTS,), (ALL_TASKS,), (VARIANTS, ALL_TASKS)])
def test_the_jobs_are_those_that_snakemake_counts(tmp_path, monkeypatch, changes):
    files = written(tmp_path, *changes)
    text = snakemake(tmp_path, files, "--dry-run")
    table = text.partition("Job stats:")[2].partition("total")[0]
    counted = {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)\s*$", table, re.MULTILINE)}
    assert counted.pop("all") == counted.pop("graph") == 1  # no commands of ours
    monkeypatch.chdir(tmp_path)
    planned = jobs.planned(files, [], 2)
    assert Counter(job.rule for job in planned) == counted
    assert (counted["stage1"], counted["stage3"]) == ((2, 4) if VARIANTS in changes else (1, 1))


def test_a_job_has_the_settings_and_files_of_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = written(tmp_path, VARIANTS)
    planned = jobs.planned(files, ["proposals={top_n: 7}"], 2)
    by_output = {job.outputs[0]: job for job in planned}
    third = by_output["results/tiny/discovery/rois/0003-of-0003.h5"]
    assert (third.rule, third.args.shard, third.share, third.threads) == ("rois", (3, 3), 1 / 3, 1)
    assert third.inputs[:2] == ("results/tiny/manifest.csv", "results/tiny/discovery/proposals.h5")
    assert by_output["results/tiny/discovery/proposals/0001-of-0002.h5"].config.proposals.top_n == 7
    assert by_output["results/tiny/discovery-k2/neighbors.h5"].config.neighbors.k == 2
    trained = by_output["results/tiny/models/stage1.seed1/backbone.safetensors"]
    assert (trained.config.seed, trained.args.output) == (1, "results/tiny/models/stage1.seed1")


def made_up(name, threads, *needs, gpus=0):
    return jobs.Job(name, Namespace(gpus=gpus), Config(), threads, needs, (name,))


def test_the_time_of_jobs_side_by_side():
    few = [made_up("a", 1), made_up("b", 1), made_up("c", 2, "a", "b"), made_up("d", 1, "a")]
    seconds, memory = [3.0, 5.0, 4.0, 1.0], [10.0, 20.0, 5.0, 40.0]
    assert jobs.span(few, seconds, memory, 2, 0) == (9.0, 60.0)  # d beside b, then c alone
    assert jobs.span(few, seconds, memory, 1, 0) == (13.0, 40.0)
    assert jobs.span(few, seconds, memory, 8, 0).seconds == 9.0
    wanting = [made_up("a", 1, gpus=8), made_up("b", 1, gpus=1)]
    assert jobs.span(wanting, [2.0, 3.0], [0.0, 0.0], 4, 1).seconds == 5.0  # each gets what it wants or what there is
    assert jobs.span(wanting, [2.0, 3.0], [0.0, 0.0], 4, 0).seconds == 3.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What was estimated of a run, by rule: jobs and costs; and the folder in which it was then done."""
    folder = tmp_path_factory.mktemp("run")
    files = written(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        planned = jobs.planned(files, [], 2)
        found = estimate.Estimate(planned, tmp_path_factory.mktemp("measured"), 6)
        costs = [found.cost(job) for job in planned]
        failed = [cost for cost in found.costs.values() if isinstance(cost, Exception)]
    assert not failed
    snakemake(folder, files)
    return folder, planned, costs


def test_the_estimated_disk_is_that_of_the_run(run):
    folder, planned, costs = run

    def size(path):
        """Of a file's data, or of all in a folder."""
        whole = folder / path
        if whole.is_dir():
            return sum(one.stat().st_size for one in whole.rglob("*.*"))
        if whole.suffix != ".h5":
            return whole.stat().st_size
        with h5py.File(whole) as file:
            return sum(dataset.nbytes for dataset in file.values())

    said, real = Counter(), Counter()
    for job, cost in zip(planned, costs, strict=True):
        said[job.rule] += cost.disk
        kept = [*folder.glob(f"{job.args.output}/state/*/checkpoint.pt"), *folder.glob(f"{job.args.output}.state")]
        real[job.rule] += sum(map(size, (*job.outputs, *kept)))
    for rule in ("random", "stage1", "stage3", "features", "embed", "rois"):
        assert said[rule] == pytest.approx(real[rule], rel=0.02), rule
    for rule in ("manifest", "propose", "neighbors", "correspond", "merge"):
        assert said[rule] == pytest.approx(real[rule], rel=0.2), rule
    assert sum(said.values()) == pytest.approx(sum(real.values()), rel=0.05)


def test_every_stage_takes_time_and_memory(run):
    _, planned, costs = run
    for job, cost in zip(planned, costs, strict=True):
        assert 0 < cost.seconds < 3600, job.rule
        assert 10e6 < cost.memory < 10e9, job.rule
    times = {job.rule: cost.seconds for job, cost in zip(planned, costs, strict=True)}
    assert times["stage3"] > times["report"]  # more than its start


def test_every_task_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = jobs.planned(written(tmp_path, ALL_TASKS), [], 2)
    found = estimate.Estimate(planned, tmp_path / "measured", 5)
    assert not [cost for cost in found.costs.values() if isinstance(cost, Exception)]
    costs = {job.rule: found.cost(job) for job in planned}
    measured = {rule for rule, cost in costs.items() if cost.how}
    assert measured == set(estimate.WEIGHTS)
    # 90,000 iterations at batch 16 beside ten epochs of 24 photos
    assert costs["detection"].seconds > 50 * costs["segmentation"].seconds > costs["segmentation"].seconds > 0
    assert 0.3 < costs["semi_grid"].seconds / costs["semi_run"].seconds < 3  # the same training


def test_nothing_is_left_of_a_finished_run(run):
    folder, _, _ = run
    done = doctor(folder, "--configfile", *written(folder))
    assert (done.returncode, done.stdout) == (0, "nothing is left to do\n")


def test_what_exists_is_measured_with(run, tmp_path):
    """Of another patch size, stage 3 and what follows are left; boxes, pairs and models are those of the run."""
    folder, _, _ = run
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    done = doctor(tmp_path / "copy", "--configfile", *written(tmp_path), "--config", "stage3={patch: 16}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("tiny: 5 jobs to do, 24 photos of about ")
    rules = set(re.findall(r"^(\w+) +1 ", done.stdout, re.MULTILINE))
    assert rules == {"stage3", "features", "voc07_svm", "report", "card"}
    assert re.search(r"^about \d+ s on this machine \(.*\); \d+ MB of disk \(.* free\), ", done.stdout, re.MULTILINE)


def test_what_cannot_be_done_is_said_before_it_is_tried(photos, tmp_path):
    """A batch larger than the photos are many, and too little disk."""
    small = tmp_path / "disk"
    small.mkdir()
    mount = f'mount -t tmpfs -o size=20m none {small} && cd {small} && exec "$@"'
    first = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*first, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    files = written(tmp_path, {"data": {"layout": "folder", "root": str(photos)}}, {"proposals": {"min_size": 16}})
    done = doctor(tmp_path, "--configfile", *files, "--config", "stage3={optimizer: {batch: 64}}", first=first)
    assert done.returncode == 1, done.stdout + done.stderr
    problems = re.findall(r"^problem +(.*)$", done.stdout, re.MULTILINE)
    assert problems[0] == "stage3: stage3.optimizer.batch is 64, but there are 10 photos: make it smaller"
    assert re.fullmatch(r"disk: \d+ MB are missing where results lie: .*", problems[1])
    assert re.search(r"^stage3 +1 +\? ", done.stdout, re.MULTILINE)
    assert ", and what stage3 will take; " in done.stdout


def test_a_config_that_is_wrong_is_refused_in_one_sentence(tmp_path):
    files = written(tmp_path, {"data": {"layout": "folder", "root": "nowhere"}})
    done = doctor(tmp_path, "--configfile", *files)
    assert done.returncode == 2
    assert done.stderr == (
        "orl doctor: config: data.root: 'nowhere' is no folder; set it to the folder of your photos.\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2.0 h"), (8 * 86400, "8.0 days")]
)
def test_durations_for_people(seconds, text):
    assert estimate.duration(seconds) == text


def test_measurements_serve_all_seeds_and_epochs(tmp_path, monkeypatch):
    """One for each kind of job, not for each job."""
    monkeypatch.chdir(tmp_path)
    config = merge(VARIANTS, {"variants": {"long": {"measure": ["stage1"], "stage1": {"optimizer": {"epochs": 9}}}}})
    planned = jobs.planned(written(tmp_path, config), [], 2)
    plan = jobs.Plan(planned)
    kinds = Counter(rule for rule, _ in {(job.rule, plan.key(job)) for job in planned})
    assert Counter(job.rule for job in planned)["stage1"] == 4
    assert kinds["stage1"] == kinds["embed"] == kinds["features"] == 1
    assert kinds["propose"] == kinds["rois"] == 2  # selective search and the grid's
