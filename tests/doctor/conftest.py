"""A run on ten photos, made by the package's functions as the workflow would, without results and report."""

import os
import shutil

import pytest

from orl import artifacts, config
from orl.places import Places

RAW = {
    "name": "tiny",
    "seed": 3,
    "measure": ["stage1", "orl"],
    "data": {"layout": "folder", "root": "photos"},
    "stage1": {
        "network": {"backbone": "resnet10", "hidden": 16, "projection": 8},
        "views": {"size": 32, "blur_radius": [0.1, 0.5]},
        "optimizer": {"batch": 4, "epochs": 1, "lr": 0.5, "warmup_epochs": 0},
    },
    "embeddings": {"resize": 40, "crop": 32},
    "proposals": {"min_size": 16, "top_n": 6},
    "neighbors": {"k": 3},
    "rois": {"size": 32},
    "stage3": {"patch": 24},
    "downstream": {
        "tasks": ["knn"],
        "sets": {"mine": {"root": "labelled"}},
        "knn": {"k": [1], "resize": 36, "size": 32},
    },
    "compute": {"shards": {"proposals": 2, "rois": 2}},
}


@pytest.fixture(scope="session")
def made(photos, tmp_path_factory):
    """The folder in which the run was started; never changed."""
    from orl.cli import main

    home = tmp_path_factory.mktemp("home")
    shutil.copytree(photos, home / "photos")
    for split in ("train", "val"):
        for label in ("a", "b"):
            (home / "labelled" / split / label).mkdir(parents=True)
            for number in (0, 2) if split == "train" else (4,):
                name = f"{number + 2 * (label == 'b'):012d}.jpg"
                shutil.copy(photos / name, home / "labelled" / split / label / name)
    results, discovery, models = (home / "results" / "tiny" / name for name in ("", "discovery", "models"))
    settings = home / "config.yaml"
    artifacts.write_json(settings, RAW)
    photos_of = ["--root", str(home / "photos"), "--manifest", str(results / "manifest.csv")]

    def orl(command, output, *arguments):
        named = ["--settings", str(settings), "--output", str(output), "--threads", "1"]
        main([*command.split(), *named, *map(str, arguments)])

    def shards(command, name, *arguments):
        for number in (1, 2):
            output = discovery / name / f"{number:04}-of-0002.h5"
            orl(command, output, *photos_of, *arguments, "--shard", f"{number}/2")
        return sorted((discovery / name).iterdir())

    orl("manifest", results / "manifest.csv", *photos_of[:2], "--rejected", results / "rejected.csv")
    orl("pretrain --stage stage1", models / "stage1", *photos_of)
    proposals = discovery / "proposals.h5"
    orl("merge", proposals, *shards("propose", "proposals"))
    orl("embed", discovery / "embeddings.h5", *photos_of, "--model", models / "stage1" / "model.safetensors")
    orl("neighbors", discovery / "neighbors.h5", *photos_of[2:], "--embeddings", discovery / "embeddings.h5")
    backbone = models / "stage1" / "backbone.safetensors"
    rois = shards("rois", "rois", "--proposals", proposals, "--backbone", backbone)
    found = ["--neighbors", discovery / "neighbors.h5", "--proposals", proposals, "--rois", *rois]
    orl("correspond", discovery / "correspondences.h5", *photos_of[2:], *found)
    pairs = ["--proposals", proposals, "--correspondences", discovery / "correspondences.h5"]
    orl("pretrain --stage stage3", models / "orl", *photos_of, *pairs)
    for model in ("stage1", "orl"):
        features = results / "downstream" / model / "mine.features.h5"
        of = ["--set", "mine", "--root", home / "labelled"]
        orl("features", features, *of, "--backbone", models / model / "backbone.safetensors")
        of += ["--features", features, "--name", model]
        orl("evaluate knn", results / "downstream" / model / "knn.mine.json", *of)
    for model in ("stage1", "orl"):
        of = ["--run-name", "tiny", "--name", model, "--manifest", results / "manifest.csv", "--scores"]
        of += [results / "downstream" / one / "knn.mine.json" for one in ("stage1", "orl")[: 1 + (model == "orl")]]
        of += ["--metrics", models / model / "metrics.csv", "--backbone", models / model / "backbone.safetensors"]
        orl("card", models / model / "README.md", *of)
    artifacts.write_json(results / "config.json", RAW)
    artifacts.write_json(results / "variants.json", Places(config.runs(RAW), "results/tiny", {}).ledger())
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A copy of it, which is the current folder; checkpoints, which are large, are links: replace them, don't write."""
    shutil.copytree(
        made, tmp_path / "home", copy_function=lambda a, b: (os.link if "state/" in a else shutil.copy2)(a, b)
    )
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"
