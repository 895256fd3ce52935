"""A SLURM cluster of two nodes with two GPUs each on this machine: real daemons, devices that are no GPUs.

All of it lies in one folder: it touches nothing of /etc, and needs neither root nor another SLURM to be off.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun", "scontrol", "squeue", "scancel")
# SLURM asks for character devices, and for a different one for each GPU of a node.
GPUS = ("/dev/zero", "/dev/full")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=1
MinJobAge=7200
KillWait=60
SlurmdTimeout=600
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=2
JobRequeue=1
GresTypes=gpu
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=64000 Gres=gpu:fake:2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=64000 Gres=gpu:fake:2 State=UNKNOWN
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=1-00:00 State=UP
PartitionName=gpu Nodes=n1,n2 MaxTime=1-00:00 State=UP
"""


def missing() -> list[str]:
    """What the cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if not _program(name)]


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ["PATH"] + os.pathsep + "/usr/sbin")  # where daemons lie


def wait_for(condition, what, seconds=600):
    """Poll until the condition is true, and return what it returned."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.5)
    return found


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _read(pid: int, name: str) -> bytes:
    """A file of a process; empty where it has ended, or is another user's."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def _below(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    children = [one for one in _processes() if f"PPid:\t{pid}\n".encode() in _read(one, "status")]
    return [one for child in children for one in (child, *_below(child))]


class Cluster:
    """A cluster that runs from `start` to `stop`; `env` is the environment of a user of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir(parents=True)
        # Inside a job, the plugin takes all variables SLURM_* from srun, this one included.
        srun = programs / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {_program("srun")} "$@"\n')
        srun.chmod(0o755)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
        self.env |= {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            ports = [one.getsockname()[1] for one in sockets]
        names = {"folder": self.folder, "host": socket.gethostname().partition(".")[0], "ports": ports}
        user = self.run("id", "-un").strip()
        (self.folder / "slurm.conf").write_text(CONFIG.format(**names, user=user))
        gres = "".join(f"NodeName=n[1-2] Name=gpu Type=fake File={file}\n" for file in GPUS)
        (self.folder / "gres.conf").write_text(gres)
        for name in ("state", "n1", "n2"):
            (self.folder / name).mkdir()
        self.run("mungekey", "--create", f"--keyfile={self.folder}/munge.key")
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in places.items()]
        self.daemon("munged", "--foreground", "--force", *options)
        wait_for((self.folder / "munge.socket").exists, "munged")
        self.daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.daemon("slurmd", "-D", "-N", node, key=node)
        wait_for(lambda: self.run("sinfo", "-h", "-N", "-p", "cpu", "-o", "%t").split() == ["idle"] * 2, "idle nodes")

    def daemon(self, name: str, *options: str, key: str = "") -> None:
        with open(self.folder / f"{name}.out", "a") as out:
            command = [_program(name) or name, *options]
            process = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, cwd=self.folder)
        self.daemons[key or name] = process

    def stop(self) -> None:
        if len(self.daemons) > 1:
            self.run("scancel", "--full", "--user", self.run("id", "-un").strip())
            wait_for(lambda: not self.run("squeue", "-h", "--states=RUNNING,COMPLETING"), "the end of all jobs", 120)
        for process in reversed(self.daemons.values()):
            process.terminate()
            process.wait(60)

    def crash(self, node: str) -> None:
        """End all processes of a node and its jobs at once, as a power cut does; SLURM learns of it."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        steps = tuple(f"slurmstepd: [{job['JobId']}.".encode() for job in self.jobs() if job["NodeList"] == node)
        for pid in _processes():
            if _read(pid, "cmdline").startswith(steps):
                below = _below(pid)
                # Another cluster may have a job of this number; its own title hides a step's environment.
                if any(f"{self.folder}/bin:".encode() in _read(one, "environ") for one in below):
                    for one in (pid, *below):
                        with suppress(ProcessLookupError):
                            os.kill(one, signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crashed")

    def repair(self, node: str) -> None:
        self.daemon("slurmd", "-D", "-N", node, key=node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def run(self, *command: str) -> str:
        """What a command prints; those of SLURM fail at times, while the controller is busy."""
        command = (_program(command[0]) or command[0], *command[1:])
        for _ in range(5):
            done = subprocess.run(command, env=self.env, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout
            time.sleep(1)
        raise AssertionError(f"{command}: {done.stderr}{done.stdout}")

    def jobs(self, rule: str = "") -> list[dict[str, str]]:
        """SLURM's own records of all jobs, ended ones too, oldest first; or of those of a rule."""
        found = []
        for line in self.run("scontrol", "show", "job", "--details", "--oneliner").splitlines():
            record = {name: value.strip() for name, value in re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", line)}
            # The plugin's comment: rule_NAME or rule_NAME_wildcards_VALUES.
            if re.fullmatch(rf"rule_{rule}(_wildcards_.*)?" if rule else ".*", record.get("Comment", "")):
                found.append(record)
        return sorted(found, key=lambda record: int(record["JobId"]))


def snakemake(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.Popen:
    """Snakemake with the project's profile for SLURM, started in a folder that has a config.yaml."""
    project = Path(__file__).parents[2]
    command = [sys.executable, "-m", "snakemake", "--configfile", "config.yaml",
               "--workflow-profile", str(project / "workflow" / "profiles" / "slurm"),
               "--snakefile", str(project / "Snakefile"),
               "--slurm-init-seconds-before-status-checks", "3", *arguments]  # fmt: skip
    with open(folder / "snakemake.log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=cluster.env, stdout=log, stderr=log, start_new_session=True)
