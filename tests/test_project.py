"""Files that must agree with each other, and words that must not be in the project."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def test_environment_yml_installs_what_pyproject_says():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert python == f"python{METADATA['requires-python']}"
    assert pip == "pip"
    constraints, project = packages["pip"]
    assert constraints == "-c constraints.txt"
    assert project == f"-e .[{','.join(METADATA['optional-dependencies'])}]"


def test_the_container_gets_what_it_is_built_from():
    """Without an engine: what it copies is there and not ignored, and it is built as `make install` does."""
    lines = (PROJECT / "Containerfile").read_text().splitlines()
    steps = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    done = [(instruction, rest) for instruction, _, rest in steps]
    assert done[0] == ("FROM", f"python:{METADATA['requires-python'].removeprefix('>=')}-slim")  # no registry's name
    assert ("COPY", ". .") in done
    assert ("RUN", "pip install --constraint constraints.txt .") in done
    users = [rest for instruction, rest in done if instruction == "USER"]
    assert users == ["orl"]
    first, *kept = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    assert first == "*"
    kept = {line.removeprefix("!") for line in kept if line.startswith("!")}
    assert all((PROJECT / name).exists() for name in kept)
    needed = {"pyproject.toml", "orl", METADATA["readme"], *METADATA["license-files"], "constraints.txt"}
    assert kept == needed | {"Snakefile", "workflow", "config"}
    guide = (PROJECT / "docs" / "guides" / "gpus.md").read_text()
    assert "docker build --file Containerfile --tag orl ." in guide


def test_every_dependency_is_pinned_in_the_constraints():
    pinned = {}
    for line in (PROJECT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([\w.+!]+)", line).groups()
            pinned[name.lower().replace("_", "-")] = version
    asked = [one for extra in METADATA["optional-dependencies"].values() for one in extra] + METADATA["dependencies"]
    names = {re.match(r"[A-Za-z0-9._-]+", one)[0].lower() for one in asked} - {"faiss-cpu"}  # of other platforms
    assert names - set(pinned) == set()


def test_the_rules_named_in_the_readme_exist():
    readme = (PROJECT / "README.md").read_text()
    named = set(re.search(r"Rule names: `([\w\s]+)`", readme)[1].split())
    rules = set()
    for path in (PROJECT / "workflow" / "rules").glob("*.smk"):
        rules |= set(re.findall(r"^\s*rule (\w+):", path.read_text(), re.MULTILINE))
    assert named == rules


def test_no_machine_path_and_no_registry_host_in_the_project():
    if not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"/(home|root|work)/\w|pyth[o]nhosted|pyp[i]\.org|/tmp/[a-z]")
    found = [f"{name}: {line}" for name in files for line in (PROJECT / name).read_text().splitlines()
             if pattern.search(line)]  # fmt: skip
    assert not found
