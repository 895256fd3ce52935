"""A cluster for each process of the tests, and folders in which a training is about to begin."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orl.config import merge

sys.path.insert(0, str(Path(__file__).parent))  # for cluster.py: the tests are imported without their folders
from cluster import Cluster, missing
from test_workflow import PROJECT, TINY

STAGE1 = "results/tiny/models/stage1/backbone.safetensors"
SHARDS = {"proposals": 3, "rois": 2, "correspondences": 2}
SETTINGS = merge(TINY, {"compute": {"threads": 1, "gpus": 2, "shards": SHARDS}})


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    lacking = missing()
    if lacking:
        pytest.skip(f"no SLURM here: {', '.join(lacking)} not found (Debian: apt install slurm-wlm munge)")
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


def local(folder, config, *arguments):
    """Snakemake without a cluster, in a folder; where nothing is disturbed."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--configfile", "config.yaml", "--resources", "gpu=0",
               "--snakefile", str(PROJECT / "Snakefile"), "--cores", "1", *arguments]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with scenes and their manifest."""
    folder = tmp_path_factory.mktemp("photos")
    local(folder, SETTINGS, "results/tiny/manifest.csv")
    return folder


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    """Function: where an undisturbed training of so many epochs, as `about_to_train` begins, has ended."""
    folders = {}

    def folder_of(epochs):
        if epochs not in folders:
            folders[epochs] = tmp_path_factory.mktemp("trained") / "run"
            shutil.copytree(photos, folders[epochs])
            local(folders[epochs], longer(epochs), STAGE1)
        return folders[epochs]

    return folder_of


def longer(epochs):
    return merge(SETTINGS, {"stage1": {"optimizer": {"epochs": epochs}}, "compute": {"gpus": 1}})


@pytest.fixture
def about_to_train(photos, tmp_path):
    """Function: a folder whose config has so many epochs of stage 1, with all that these need."""

    def folder_of(epochs, name="run"):
        folder = tmp_path / name
        shutil.copytree(photos, folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(longer(epochs)))
        return folder

    return folder_of


def same_model(folder, other):
    """Whether two runs ended with the same bytes: weights and what was measured."""
    names = ("backbone.safetensors", "model.safetensors", "metrics.csv")
    place = Path(STAGE1).parent
    return all((folder / place / name).read_bytes() == (other / place / name).read_bytes() for name in names)
