"""The jobs that the workflow would run, as Snakemake plans them, and how long they take one after another."""

import heapq
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from orl import InputError
from orl.config import Config, load
from orl.doctor.machine import PROJECT

JOB = re.compile(r"^(?:local)?rule (\w+):\n((?:    .*\n)+)Shell command: (orl .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """A job: its rule, its `orl` command as the command line's grammar reads it, the settings there, and its files."""

    rule: str
    args: Namespace
    config: Config
    threads: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the stage that the job does: a shard's."""
        shard = getattr(self.args, "shard", None)
        return 1 / shard[1] if shard else 1.0


def planned(configfiles: Sequence[str], settings: Sequence[str], cores: int) -> list[Job]:
    """What is left to do of a run, by `snakemake --dry-run`; `settings` are those of --config. Raises InputError."""
    from orl.cli import parser

    snakefile = "Snakefile" if Path("Snakefile").is_file() else str(PROJECT / "Snakefile")
    command = [sys.executable, "-m", "snakemake", "--snakefile", snakefile, "--dry-run", "--printshellcmds", "--nolock"]
    command += ["--cores", str(cores), "--configfile", *configfiles, *(["--config", *settings] if settings else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        ours = [line.removeprefix("orl: ") for line in lines if line.startswith("orl: ")]
        others = [line for line in lines if not line.startswith("orl: ")]
        stopped = done.returncode == 2 and ours  # else ours only tell what the run is made of
        raise InputError((ours if stopped else others or ["snakemake --dry-run fails"])[-1])
    jobs, grammar = [], parser()
    for rule, lines, shell in JOB.findall(done.stdout + done.stderr):
        told = dict(re.findall(r"^    (input|output|threads): (.*)$", lines, re.MULTILINE))
        words = shlex.split(_without_dirname(shell.partition(" 2>&1 | tee ")[0]))
        args = grammar.parse_args(words[1:])
        files = (tuple(told.get(kind, "").split(", ")) for kind in ("input", "output"))
        jobs.append(Job(rule, args, load(args.settings), int(told.get("threads", 1)), *files))
    return jobs


def _without_dirname(shell: str) -> str:
    """A command line with its `$(dirname FILE)` as the shell would put them in."""
    return re.sub(
        r"\"\$\(dirname ('[^']*'|[^\s)]+)\)\"",
        lambda found: shlex.quote(os.path.dirname(shlex.split(found[1])[0])),
        shell,
    )


class Plan:
    """How jobs hang together by their files."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.maker = {file: job for job in jobs for file in job.outputs}

    def upstream(self, job: Job, *rules: str) -> Job | None:
        """The nearest job of these rules among those whose files a job needs, itself first; None: they are made."""
        found = [job]
        for one in found:
            if one.rule in rules:
                return one
            found += [maker for file in one.inputs if (maker := self.maker.get(file)) and maker not in found]
        return None

    def key(self, job: Job) -> str:
        """Equal for jobs that a single measurement serves: seeds, epochs and shards aside."""
        settings = json.loads(job.args.settings)
        settings.pop("seed", None)
        for stage in ("stage1", "stage3"):
            settings.get(stage, {}).get("optimizer", {}).pop("epochs", None)
        asked = vars(job.args)
        named = [asked.get(name) for name in ("root", "set", "share")]
        if job.rule in ("rois", "correspond", "stage3"):
            proposals = self.upstream(job, "propose")
            named.append(self.key(proposals) if proposals else job.args.proposals)
        network = self.network(job) if job.rule not in ("stage1", "stage3", "propose", "manifest", "scenes") else None
        return json.dumps([job.rule.replace("_run", "_grid"), settings, named, network, job.threads])

    def network(self, job: Job) -> list | None:
        """What model a job uses: the stage that trains it, its network, and the file of weights, if any is given."""
        model = self.upstream(job, "stage1", "stage3", "random", "supervised")
        if model is None:
            return None
        stage = "stage3" if model.rule == "stage3" else "stage1"
        weights = model.config.supervised if model.rule == "supervised" else model.config.stage1.weights
        return [getattr(model.config, stage).network.model_dump(), weights if model.rule != "random" else None]


class Span(NamedTuple):
    """How long jobs take, and the most memory that those of them have that run side by side."""

    seconds: float
    memory: float


def span(jobs: Sequence[Job], seconds: Sequence[float], memory: Sequence[float], cores: int, gpus: int) -> Span:
    """What jobs take when each begins as soon as what it needs is made, and cores and GPUs are free."""
    maker = {file: number for number, job in enumerate(jobs) for file in job.outputs}
    needs = [{maker[file] for file in job.inputs if file in maker} for job in jobs]
    wants = [(min(cores, job.threads), min(gpus, getattr(job.args, "gpus", None) or 0)) for job in jobs]
    waiting, running, done = list(range(len(jobs))), list[tuple[float, int]](), set[int]()
    now = peak = 0.0
    while waiting or running:
        for number in list(waiting):
            threads, devices = wants[number]
            if needs[number] <= done and threads <= cores and devices <= gpus:
                cores, gpus = cores - threads, gpus - devices
                waiting.remove(number)
                heapq.heappush(running, (now + seconds[number], number))
        peak = max(peak, sum(memory[number] for _, number in running))
        now, ended = heapq.heappop(running)
        done.add(ended)
        cores, gpus = cores + wants[ended][0], gpus + wants[ended][1]
    return Span(now, peak)
