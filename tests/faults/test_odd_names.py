"""Every rule, with names that a shell, an option parser or Snakemake could trip over."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import yaml
from test_workflow import PROJECT, TINY

RULES = "\n\n\n".join(path.read_text() for path in sorted((PROJECT / "workflow" / "rules").glob("*.smk")))
ODD = "-it's `touch pwned` $(touch pwned); \"é & *?#~\\ |<!%"
SMALL = {"resize": 36, "size": 32, "epochs": 1, "milestones": [], "batch": 4}


def test_every_path_in_a_shell_line_is_quoted():
    """What is not has a form that `wildcard_constraints` fixes, or is a number."""
    lines = "".join(re.findall(r"shell:\n(.+?)\n\n", RULES + "\n\n", re.DOTALL))
    lines += re.search(r"^OPTIONS = \((.+?)^\)", RULES, re.MULTILINE | re.DOTALL)[1]
    constraints = RULES.partition("wildcard_constraints:\n")[2].partition("\n\n")[0]
    fixed = {f"wildcards.{name}" for name in re.findall(r"^    (\w+)=", constraints, re.MULTILINE)}
    assert set(re.findall(r"\{([\w.]+)\}", lines)) - fixed == {
        "threads", "params.shard", "resources.gpu", "resources.nodes", "resources.checkpoint_minutes",
        "resources.log_every", "resources.compile_step", "resources.deterministic", "resources.faster_coco_eval",
    }  # fmt: skip
    assert lines.count("$(") == lines.count('"$(dirname {output.backbone:q})"') == 3
    assert "`" not in lines


def scenes(root):
    """Generated scenes whose photos, annotations and lists have odd names."""
    from orl.config import Scenes
    from orl.data.labels import read_labels
    from orl.data.scenes import generate

    generate(root, Scenes(train=24, val=12, objects_train=2, objects_val=1))
    (root / "scenes.json").unlink()
    coco = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    for number, image in enumerate(coco["images"][:3]):
        name = f"-{number}{ODD}{{x}}\n.jpg"
        (root / "train2017" / image["file_name"]).rename(root / "train2017" / name)
        image["file_name"] = name
    for path in ("annotations/instances_train2017.json", f"{ODD}.json"):
        (root / path).write_text(json.dumps(coco))
    for split in ("train", "val"):
        folder = root / "objects" / split
        classes = sorted(path.name for path in folder.iterdir())
        photos = [f"{path.relative_to(root / 'objects')} {classes.index(path.parent.name)}"
                  for path in sorted(folder.rglob("*.jpg"))]  # fmt: skip
        (root / "objects" / f"{ODD} {split}.txt").write_text("\n".join(photos))
    half = [photo for number, photo in enumerate((root / "objects" / f"{ODD} train.txt").read_text().splitlines())
            if number % 2]  # fmt: skip
    (root / "objects" / f"{ODD} half.txt").write_text("\n".join(half))
    labels = read_labels(root / "VOCdevkit" / "VOC2007", "voc", "trainval").label
    targets = np.where(labels > 0, -1, 0)
    for column, label in enumerate(labels.T):
        targets[np.flatnonzero(label > 0)[:1], column] = 1
    (root / ODD).mkdir()
    np.save(root / ODD / f"{ODD}_sample1_k1.npy", targets)


def snakemake(folder, config, *arguments, **options):
    """In `folder`, from a project and an environment whose folders have odd names, too."""
    path = folder / f"{ODD}.yaml"
    path.write_text(yaml.safe_dump(config))
    python = folder.parent / f"{ODD}{{x}} environment"
    if not python.is_symlink():
        python.symlink_to(sys.prefix)
        (folder.parent / f"{ODD} project").symlink_to(PROJECT)
    command = [python / "bin" / "python", "-m", "snakemake", "--snakefile", folder.parent / f"{ODD} project/Snakefile",
               *arguments, "--cores", "2", "--directory", folder, "--configfile", path]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, **options)


def test_every_rule_takes_odd_names_and_lets_nobody_write(tmp_path):
    """Also by an umask of 0; beside the rules of the test of real photos, and those below."""
    import torch

    from orl.networks.backbones import backbone

    folder, root, weights = tmp_path / ODD, f"-root {ODD}", f"{ODD}.pth"
    folder.mkdir()
    scenes(folder / root)
    torch.save(backbone("resnet10").state_dict(), folder / weights)
    config = {
        "name": "odd",
        "measure": ["pairs"],
        "supervised": weights,
        "data": {"layout": "coco", "root": root, "annotations": {"train2017": f"{ODD}.json"},
                 "objects": [f"{ODD}.json"]},
        "stage1": {"weights": weights, "network": {"backbone": "resnet10", "hidden": 16, "projection": 8},
                   "views": {"size": 32, "blur_radius": [0.1, 0.5]},
                   "optimizer": {"batch": 8, "epochs": 1, "lr": 1.0, "warmup_epochs": 0}},
        **{stage: TINY[stage] for stage in ("embeddings", "proposals", "neighbors", "rois", "stage3")},
        "downstream": {
            "voc07_svm": {"root": f"{root}/VOCdevkit/VOC2007", "resize": 36, "size": 32, "stages": [5], "costs": [1]},
            "voc07_lowshot": {"shots": [1], "samples": 1, "costs": [1], "lists": f"{root}/{ODD}"},
            "sets": {"objects": {"root": f"{root}/objects", "train": f"{ODD} train.txt", "val": f"{ODD} val.txt",
                                 "lists": {"0.5": f"{root}/objects/{ODD} half.txt"}}},
            "linear": {**SMALL, "stages": [5]},
            "semi": {**SMALL, "shares": [0.5], "weight_decay": [0], "lr": [0.01], "head": [1], "runs": 2},
            "knn": {"resize": 36, "size": 32, "k": [1]},
            "detection": {"root": root, "iterations": 1, "milestones": [], "warmup": 0, "batch": 4,
                          "short_sides": [64], "test_side": 64, "channels": 16, "rois": 16, "precise_bn": 1},
            "segmentation": {**SMALL, "resize": 72, "size": 64},
            "localization": {"side": 64, "boxes": 2},
            "attention": {"side": 64, "photos": 2},
        },
        "compute": {"threads": 1},
    }  # fmt: skip
    models = "results/odd/models"
    targets = [f"{models}/random/backbone.safetensors", f"{models}/orl/timm.safetensors", f"{models}/orl/README.md"]
    done = snakemake(folder, config, "all", *targets, umask=0)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = set(re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE))
    assert ran == {*re.findall(r"^ *rule (\w+):", RULES, re.MULTILINE), "all"} - {
        "scenes",
        "fetch_coco",
        "fetch_voc2007",
    }
    assert len((folder / "results/odd/rejected.csv").read_text().splitlines()) == 1
    assert not [path for place in (tmp_path, PROJECT) for path in place.rglob("pwned*")]
    made = [path for path in (folder / "results").rglob("*") if not path.is_symlink()]
    assert len(made) > 100
    assert [path for path in made if path.stat().st_mode & stat.S_IWOTH] == []
    done = snakemake(folder, config, "--dry-run", *targets)
    assert "Nothing to be done" in done.stdout + done.stderr


def test_data_are_fetched_into_folders_with_odd_names(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    config = {
        "data": {"layout": "coco", "root": ODD, "folders": ["train2017", ODD[1:]]},
        "downstream": {"voc07_svm": {"root": f"{ODD}/VOCdevkit/VOC2007"}},
    }
    done = snakemake(folder, config, "--dry-run", "--printshellcmds", "fetch_coco", "fetch_voc2007")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [
        shlex.split(line.removeprefix("Shell command: "))
        for line in (done.stdout + done.stderr).splitlines()
        if line.startswith("Shell command: ")
    ]
    assert [line[: line.index("2>&1")] for line in sorted(lines)] == [
        ["orl", "fetch", "coco", "--output", f"./{ODD}", "--parts", "train2017", ODD[1:], "annotations"],
        ["orl", "fetch", "voc2007", "--output", f"./{ODD}"],
    ]


@pytest.mark.parametrize(
    ("name", "key", "config"),
    [
        ("a{b}c", "data.root", {"data": {"layout": "folder", "root": "NAME"}}),
        ("{", "data.root", {"data": {"layout": "folder", "root": "NAME"}}),
        ("two\nlines", "data.root", {"data": {"layout": "folder", "root": "NAME"}}),
        ("a{b}c", "data.annotations and data.objects",
         {"data": {"layout": "coco", "root": ".", "annotations": {"a": "NAME"}}}),
        ("a{b}c", "data.annotations and data.objects",
         {"data": {"layout": "folder", "root": ".", "objects": ["NAME"]}}),
        ("a{b}c", "stage1.weights", {"stage1": {"weights": "NAME"}}),
        ("a{b}c", "supervised", {"supervised": "NAME"}),
        ("a{b}c", "downstream.voc07_svm.root", {"downstream": {"voc07_svm": {"root": "NAME"}}}),
        ("a{b}c", "downstream.voc07_lowshot.lists", {"downstream": {"voc07_lowshot": {"lists": "NAME"}}}),
        ("a{b}c", "downstream.detection.root", {"downstream": {"detection": {"root": "NAME"}}}),
        ("a{b}c", "downstream.sets.a", {"downstream": {"sets": {"a": {"root": ".", "train": "NAME"}}}}),
    ],
)  # fmt: skip
def test_what_snakemake_would_misread_is_refused(name, key, config, tmp_path):
    (tmp_path / name).mkdir()
    done = snakemake(tmp_path, json.loads(json.dumps(config).replace("NAME", json.dumps(name)[1:-1])), "--dry-run")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("orl: ")]
    assert line.startswith(f"orl: config: {key}: {name!r} has a brace or a line break in it")


def test_a_config_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: !!python/object/apply:os.mkdir [pwned]\n")
    command = [sys.executable, "-m", "snakemake", "--snakefile", PROJECT / "Snakefile", "--cores", "1"]
    done = subprocess.run([*command, "--configfile", path, "-n"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode != 0
    done = subprocess.run([shutil.which("orl"), "scenes", "--settings", path, "--output", "scenes"], cwd=tmp_path,
                          env=os.environ, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"orl scenes: .*config\.yaml: is neither YAML nor JSON .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".snakemake"] == ["config.yaml"]
