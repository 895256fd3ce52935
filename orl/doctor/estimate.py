"""What a run will need on this machine: jobs, time, disk and memory, from a short measurement."""

import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from orl import InputError, artifacts
from orl.doctor import machine
from orl.doctor.jobs import Job, Plan, planned, span
from orl.doctor.machine import apart, counted, size
from orl.progress import track

# Seconds that each measurement gets of every 60; a rule that is not here takes as long as it takes to start.
WEIGHTS = {
    "scenes": 2, "manifest": 2, "propose": 10, "embed": 3, "neighbors": 1, "rois": 5, "correspond": 1, "stage1": 10,
    "stage3": 10, "features": 4, "voc07_svm": 3, "set_features": 3, "linear": 5, "semi_grid": 5, "semi_run": 5,
    "detection": 8, "segmentation": 5, "localization": 3,
}  # fmt: skip
LIGHT = ("scenes", "manifest", "propose", "correspond", "merge", "proposals_recall", "pair_precision", "subset", "semi")
BASE = 1e9  # bytes of memory of a process that has loaded PyTorch, as those of all other rules do


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, one in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 if unit == "days" else 1) * one:
            return f"{seconds / one:.1f} {unit}" if seconds < 100 * one else f"{seconds / one:.0f} {unit}"
    return f"{seconds:.0f} s"


class Estimate:
    """The costs of the jobs of a plan. Raises InputError where the photos cannot be read."""

    def __init__(self, jobs: Sequence[Job], folder: Path, seconds: float) -> None:
        from orl.doctor.measure import Setup

        self.jobs, self.setup = jobs, Setup(folder)
        self.plan = Plan(jobs)
        self.costs: dict[str, Any] = {}  # by Plan.key: a Cost, or why there is none
        self.boxes: dict[str, artifacts.Proposals] = {}  # by key of `propose`, or path
        self.models: dict[str, str] = {}  # stand-ins of models: what they are -> their folder
        first = {self.plan.key(job): job for job in reversed(jobs)}
        whole = sum(WEIGHTS.get(job.rule, 0) for job in first.values())
        self.seconds = {key: seconds * WEIGHTS.get(job.rule, 0) / max(whole, 1) for key, job in first.items()}
        self.starts = apart(_starts)
        self._photos()
        left = {key: job for key, job in first.items() if job.rule in WEIGHTS and key not in self.costs}
        first_boxes = sorted(left, key=lambda key: left[key].rule != "propose")  # which others need
        for key in track(first_boxes, len(left), f"measuring for about {seconds:.0f} s, stages"):
            self.costs[key] = self.measure(key, left[key])

    def model(self, job: Job) -> str:
        """Folder of the model that a job uses, if it is made, or of one with its network."""
        from orl.doctor.measure import stand_in

        named = next((path for name in ("model", "backbone") if (path := vars(job.args).get(name))), None)
        if named and os.path.exists(named):
            return str(Path(named).parent)
        found = self.plan.upstream(job, "stage1", "stage3", "random", "supervised")
        if found is None:
            made = sorted(Path(self.results(), "models").glob("*/backbone.safetensors"))
            if not made:
                raise InputError("there is no model to measure with")
            return str(made[0].parent)
        what = json.dumps(self.plan.network(job))
        if what not in self.models:
            network = (found.config.stage3 if found.rule == "stage3" else found.config.stage1).network
            folder = self.setup.folder / f"stand-in-{len(self.models)}"
            apart(stand_in, found.rule, network, found.config, folder)
            self.models[what] = str(folder)
        return self.models[what]

    def results(self) -> str:
        """Folder of the run's results."""
        return os.path.join(*Path(self.jobs[0].outputs[0]).parts[:2])

    # Measuring

    def _photos(self) -> None:
        """Find the photos, and draw some."""
        from orl.doctor import measure

        setup, drawn = self.setup, next((job for job in self.jobs if job.rule == "scenes"), None)
        roots = (vars(job.args).get("root") for job in self.jobs if "manifest" in job.args or job.rule == "manifest")
        setup.root = next(filter(None, roots), "")  # else nothing is left that reads photos
        if drawn:
            cost, few = apart(measure.scenes, setup, drawn)
            self.costs[self.plan.key(drawn)] = cost
            setup.scenes = (drawn.args.output, drawn.config.data.scenes, few)
            setup.root = setup.find(setup.root)
        listing = next((job for job in self.jobs if job.rule == "manifest"), None)
        if listing:
            key = self.plan.key(listing)
            self.costs[key], setup.photos, setup.manifest = apart(measure.manifest, setup, listing, self.seconds[key])
        else:
            whole = artifacts.read_manifest(f"{self.results()}/manifest.csv")
            rows = np.random.default_rng(0).permutation(len(whole))[: measure.PHOTOS]
            setup.photos, setup.manifest, self.rows = len(whole), measure.some(whole, rows), rows

    def measure(self, key: str, job: Job) -> Any:
        """The Cost of a job's stage, or why it could not be measured."""
        from orl.doctor import measure

        try:
            setup = replace(self.setup)
            if job.rule == "propose":
                cost, self.boxes[key] = apart(measure.propose, setup, job, self.seconds[key])
                return cost
            if job.rule in ("rois", "correspond", "stage3"):
                setup.boxes = self.boxes_of(job)
            if job.rule == "correspond":
                near = self.plan.upstream(job, "neighbors")
                known = near.config.neighbors.k if near else artifacts.read_neighbors(job.args.neighbors).index.shape[1]
                setup.k = min(known, setup.photos - 1)
            if job.rule == "stage1" and job.config.stage1.weights:
                return measure.Cost(0, "given weights", measure.folder_size(self.model(job)))
            if job.rule not in ("stage1", "stage3"):
                setup.model = self.model(job)
            module = measure if hasattr(measure, job.rule) else importlib.import_module("orl.doctor.tasks")
            return apart(getattr(module, job.rule), setup, job, self.seconds[key])
        except (InputError, RuntimeError, OSError, ValueError, LookupError) as error:
            return error

    def boxes_of(self, job: Job) -> artifacts.Proposals:
        """The boxes of the first photos of the sample, that the job uses."""
        proposals = self.plan.upstream(job, "propose")
        if proposals:
            if (key := self.plan.key(proposals)) not in self.boxes:
                raise InputError("there are no proposals to measure with")
            return self.boxes[key]
        found = artifacts.read_proposals(job.args.proposals)
        counts = np.diff(found.box_offsets)[self.rows]
        box = np.concatenate([found.box[slice(*found.box_offsets[row : row + 2])] for row in self.rows])
        return artifacts.Proposals(box, np.cumsum([0, *counts]))

    # What comes of it

    def cost(self, job: Job) -> Any:
        """What a job needs, a Cost: its share of its stage, and its start."""
        from orl.doctor.measure import Cost, folder_size

        found, start = self.costs.get(self.plan.key(job)), self.starts[job.rule not in LIGHT]
        if isinstance(found, Cost):
            epochs = 1
            if job.rule in ("stage1", "stage3"):
                epochs = getattr(job.config, job.rule).optimizer.epochs
            seconds = start + found.seconds * epochs * job.share
            return found._replace(seconds=seconds, disk=found.disk * job.share)
        disk = 1e5
        if job.rule == "merge":
            disk = sum(self.cost(self.plan.maker[file]).disk if file in self.plan.maker else os.path.getsize(file)
                       for file in job.inputs)  # fmt: skip
        elif job.rule in ("random", "supervised"):
            disk = folder_size(self.model(job))
        elif job.rule == "export":
            disk = os.path.getsize(f"{self.model(job)}/backbone.safetensors")
        return Cost(start, "", disk, memory=BASE)


def _starts() -> tuple[float, float]:
    from orl.doctor.measure import start

    return start("import orl.artifacts"), start("import orl.pretrain.loop")


def report(configfiles: Sequence[str], settings: Sequence[str], seconds: float) -> bool:
    """Print what the run of these configs, laid over each other, will need; whether it can be done here.

    Measures for about `seconds`. Raises InputError: a bad config, photos that cannot be read.
    """
    cores, devices = max(1, int(machine.cores())), apart(machine.gpus)
    jobs = planned(configfiles, settings, cores)
    if not jobs:
        print("nothing is left to do")
        return True
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        estimate = Estimate(jobs, Path(folder), seconds)
        costs = [estimate.cost(job) for job in jobs]
    failed = {
        job.rule: error for job in jobs if isinstance(error := estimate.costs.get(estimate.plan.key(job)), Exception)
    }

    here = counted(cores, "CPU core") + ", " + (counted(len(devices), devices[0].name) if devices else "no GPU")
    photos, sample = estimate.setup.photos, estimate.setup.manifest
    of_files = size(photos * float(sample.bytes.mean())) if sample else "?"
    print(f"{Path(estimate.results()).name}: {counted(len(jobs), 'job')} to do, {photos:,} photos of about {of_files}")
    print(f"measured for {time.monotonic() - began:.0f} s on this machine ({here}):\n")
    _table(jobs, costs, failed, bool(devices))
    took, held = span(jobs, [cost.seconds for cost in costs], [cost.memory for cost in costs], cores, len(devices))
    disk = sum(cost.disk for cost in costs) + max(cost.beside for cost in costs)
    free, (memory, _) = shutil.disk_usage(machine.existing(Path("results"))).free, machine.memory()
    without = f", and what {', '.join(failed)} will take" if failed else ""
    print(f"\nabout {duration(took)} on this machine ({here}){without}; {size(disk)} of disk ({size(free)} free), "
          f"{size(held)} of memory ({size(memory)} there)")  # fmt: skip

    wanted = max(getattr(job.args, "gpus", None) or 0 for job in jobs)
    if wanted > len(devices):
        print(f"Trainings ask for {wanted} GPU{'s' if wanted > 1 else ''}: the more there are, the less time it takes.")
    if load > 0.5 * cores:
        print(f"Other programs are at work here (load {load:.1f} on {cores} cores): beside them it takes longer.")
    warnings = [f"{rule}: {_first(error)}" for rule, error in failed.items() if not isinstance(error, InputError)]
    if held > memory:
        advice = "raise optimizer.accumulation, or run fewer jobs side by side (--cores)"
        warnings.append(f"memory: {size(held)} are wanted, and {size(memory)} there: {advice}")
    problems = [f"{rule}: {_first(error)}" for rule, error in failed.items() if isinstance(error, InputError)]
    problems += dict.fromkeys(f"{job.rule}: {cost.fault}" for job, cost in zip(jobs, costs, strict=True) if cost.fault)
    if disk > free:
        problems.append(f"disk: {size(disk - free)} are missing where results lie: free some, or work on another disk")
    for mark, texts in ((machine.WARNING, warnings), (machine.PROBLEM, problems)):
        for text in texts:
            print(f"{mark:8} {text}")
    return not problems


def _first(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _table(jobs: Sequence[Job], costs: Sequence[Any], failed: dict[str, Exception], on_gpu: bool) -> None:
    """Print a line for each rule."""
    lines = [["job", "number", "time", "disk", "memory", *(["GPU"] if on_gpu else []), "estimated from"]]
    for rule in dict.fromkeys(job.rule for job in jobs):
        own = [cost for job, cost in zip(jobs, costs, strict=True) if job.rule == rule]
        hows = list(dict.fromkeys(cost.how for cost in own))
        how = (hows[0] or "not measured: its start alone") + (", and others" if len(hows) > 1 else "")
        times = "?" if rule in failed else duration(sum(cost.seconds for cost in own))
        row = [rule, str(len(own)), times, size(sum(cost.disk for cost in own)), size(max(cost.memory for cost in own))]
        lines.append([*row, *([size(max(cost.gpu for cost in own))] if on_gpu else []), how])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][1:-1]
    for name, *cells, how in lines:
        print("  ".join([f"{name:16}", *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), how]))
