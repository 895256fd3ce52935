"""Snakemake for real on a handful of scenes: what a run makes, and what reruns after which change."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from orl import artifacts

PROJECT = Path(__file__).parents[2]
REAL = PROJECT.parent / "shared" / "data" / "coco-mini"
TINY = {
    "name": "tiny",
    "data": {"scenes": {"train": 24, "val": 12, "objects_train": 1, "objects_val": 1}},
    "stage1": {
        "network": {"backbone": "resnet10", "hidden": 16, "projection": 8},
        "views": {"size": 32, "blur_radius": [0.1, 0.5]},
        "optimizer": {"batch": 8, "epochs": 2, "lr": 1.0, "warmup_epochs": 1},
    },
    "embeddings": {"resize": 40, "crop": 32},
    "proposals": {"min_size": 32, "top_n": 5},
    "neighbors": {"k": 3},
    "rois": {"size": 32},
    "stage3": {"patch": 24},
    "downstream": {
        "tasks": ["voc07_svm"],
        "voc07_svm": {"resize": 72, "size": 64, "stages": [5], "costs": [0.01]},
    },
    "compute": {"shards": {"proposals": 2, "rois": 3, "correspondences": 2}},
}


ONE_SHARD = {"shards": {"proposals": 1, "rois": 1, "correspondences": 1}}  # where shards are not the question


def changed(**sections):
    """TINY with keys of some sections changed."""
    from orl.config import merge

    return merge(TINY, sections)


def snakemake(folder, config, *arguments):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", "2",
               "--directory", str(folder), "--configfile", str(path), *arguments]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


def plan(folder, config, *arguments):
    """The jobs that would run: rule -> number; without `all`, `graph` and `card`, which come with other jobs."""
    done = snakemake(folder, config, "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    table = text.partition("Job stats:")[2].partition("total")[0]
    jobs = {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)\s*$", table, re.MULTILINE)}
    for rule in ("all", "graph", "card"):
        jobs.pop(rule, None)
    assert jobs or "Nothing to be done" in text
    return jobs


def orl(folder, *arguments):
    command = [sys.executable, "-m", "orl", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def is_sound(folder, name="tiny"):
    """Whether `orl doctor` finds nothing to mend, and nothing of an earlier config."""
    done = orl(folder, "doctor", f"results/{name}")
    assert done.returncode in (0, 1), done.stderr
    print(done.stdout)
    return done.returncode == 0 and "earlier config" not in done.stdout and "not made yet" not in done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; tests that change it copy it. Each process of the tests has a copy of what one of them makes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = tmp_path_factory.mktemp("run") / "finished"
    with open(base / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "finished").exists():
            (base / "making").mkdir(exist_ok=True)
            done = snakemake(base / "making", TINY)
            assert done.returncode == 0, done.stdout + done.stderr
            (base / "making").rename(base / "finished")
        shutil.copytree(base / "finished", folder, symlinks=True)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_the_run_makes_every_file(finished):
    results = finished / "results" / "tiny"
    manifest = artifacts.read_manifest(results / "manifest.csv")
    assert len(manifest) == 24
    assert (results / "rejected.csv").read_text() == "path,reason\n"
    discovery = results / "discovery"
    assert artifacts.read_embeddings(discovery / "embeddings.h5").embedding.shape == (24, 8)
    neighbors = artifacts.read_neighbors(discovery / "neighbors.h5")
    assert neighbors.index.shape == (24, 3)
    proposals = artifacts.read_proposals(discovery / "proposals.h5")
    assert len(proposals.box_offsets) == 25
    shards = artifacts.tile(sorted((discovery / "rois").iterdir()))
    assert [rows for _, rows in shards] == [range(8), range(8, 16), range(16, 24)]
    features = [artifacts.read_rois(path).feature for path, _ in shards]
    assert np.concatenate(features).shape == (len(proposals.box), 512)
    found = artifacts.read_correspondences(discovery / "correspondences.h5")
    assert (found.neighbor == neighbors.index).all()
    assert found.pair_offsets[-1] == len(found.pair) >= 24 * 3
    for model in ("random", "stage1", "orl"):
        assert artifacts.read_weights(results / "models" / model / "backbone.safetensors")
        score = artifacts.read_results(results / "downstream" / model / "voc07_svm.json")
        assert score["model"] == model
        assert 0 <= score["metrics"]["mAP"] <= 100
    recall = artifacts.read_results(results / "downstream" / "proposals.json")
    assert (recall["model"], recall["settings"]["proposals"]) == ("proposals", {"min_size": 32})
    assert 0 < recall["metrics"]["recall"]["large"]["0.5"][-1] <= 1
    pairs = artifacts.read_results(results / "downstream" / "pairs.json")
    assert (pairs["model"], pairs["metrics"]["pairs"]) == ("pairs", len(found.pair))
    assert 0 <= pairs["metrics"]["precision"] <= 1
    page = (results / "report" / "index.html").read_text()
    for text in ("Recall of large objects", "What was run", ">stage3<", "Time and memory of each rule", "Throughput"):
        assert text in page
    for model in ("stage1", "orl"):
        assert len((results / "models" / model / "metrics.csv").read_text().splitlines()) == 3


def test_a_card_lies_beside_each_trained_model_and_is_made_again_with_its_scores(finished, copy):
    for model in ("stage1", "orl"):
        text = (finished / "results/tiny/models" / model / "README.md").read_text()
        assert text.startswith("---\nlibrary_name: torchvision\n")
        assert f"`{artifacts.fingerprint(finished / f'results/tiny/models/{model}/backbone.safetensors')}`" in text
        assert re.search(
            r"^\| VOC07 linear SVM \| mAP \|" + r" \**\d+\.\d\d\** \|" * (2 + (model == "orl")), text, re.MULTILINE
        )
        assert "24, drawn by a program" in text
        assert str(finished) not in text
    assert not (finished / "results/tiny/models/random/README.md").exists()

    def cards(**change):
        done = snakemake(copy, changed(**change), "--dry-run")
        outputs = re.findall(r"^    output: (.+)$", done.stdout + done.stderr, re.MULTILINE)
        return {path.split("/")[3] for path in outputs if path.endswith("README.md")}

    assert cards() == set()
    assert cards(stage3={"patch": 16}) == {"orl"}
    assert cards(downstream={"voc07_svm": {"costs": [0.1]}}) == {"stage1", "orl"}
    assert cards(variants={"b": {"measure": ["stage1"], "stage1": {"method": "moco"}}}) == {"stage1-b"}


def test_the_fingerprints_form_a_chain(finished):
    results = finished / "results" / "tiny"

    def inputs(path):
        return json.loads(artifacts.attributes(results / path)["inputs"])

    def fingerprint(path):
        return artifacts.fingerprint(results / path)

    assert inputs("models/stage1/model.safetensors") == {"manifest": fingerprint("manifest.csv")}
    assert inputs("discovery/embeddings.h5")["model"] == fingerprint("models/stage1/model.safetensors")
    assert inputs("discovery/neighbors.h5") == {
        "manifest": fingerprint("manifest.csv"),
        "embeddings": fingerprint("discovery/embeddings.h5"),
    }
    assert inputs("models/orl/backbone.safetensors")["correspondences"] == fingerprint("discovery/correspondences.h5")


def test_the_page_stands_alone(finished):
    class Page(HTMLParser):
        loaded: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.loaded += [value for name, value in attrs if name in ("src", "href") and tag != "a"]

    page = Page()
    page.feed((finished / "results" / "tiny" / "report" / "index.html").read_text())
    assert page.loaded
    assert all(value.startswith(("data:", "#")) for value in page.loaded)


def reported(folder, config):
    """What `snakemake --report` shows: file -> caption, the categories, and the files of the archive by name."""
    done = snakemake(folder, config, "--report", "report.zip")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(folder / "report.zip") as archive:
        files = {Path(name).name: archive.read(name) for name in archive.namelist()}
    found = {}
    for name in ("results", "categories"):
        (line,) = re.findall(rf"^ *var {name} = (\{{.+\}})", files["report.html"].decode(), re.MULTILINE)
        found[name] = json.loads(line)
    captions = {path.removeprefix("results/tiny/"): one["caption"] for path, one in found["results"].items()}
    return captions, set(found["categories"]), files


def test_snakemakes_report_explains_every_kind_of_result(copy):
    """Of a finished run; then of all tasks, whose files need not be real."""
    captions, categories, files = reported(copy, TINY)
    assert categories == {"Page of the run", "Trainings", "Scores of the models", "Regions and pairs (stage 2)"}
    assert files["index.html"] == (copy / "results/tiny/report/index.html").read_bytes()
    assert "Stage 3" in files["report.html"].decode()

    every = changed(downstream={"tasks": ["all"]})
    done = snakemake(copy, every, "--dry-run")
    for names in re.findall(r"^    output: (.+)$", done.stdout + done.stderr, re.MULTILINE):
        for path in (copy / name for name in names.split(", ")):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name == "attention":
                path.mkdir()
                path /= "contact_sheet.png"
            if not path.exists():
                path.write_text("{}")
    captions, categories, _ = reported(copy, every)
    assert set(captions) == {
        "report/index.html",
        "attention/contact_sheet.png",
        *(f"models/{model}/metrics.csv" for model in ("stage1", "orl")),
        *(f"downstream/{name}.json" for name in ("proposals", "pairs", "localization")),
        *(f"downstream/{model}/{task}.json" for model in ("random", "stage1", "orl") for task in (
            "voc07_svm", "voc07_lowshot", "knn.objects", "linear.objects", "semi.objects", "detection", "segmentation",
            "localization")),
    }  # fmt: skip
    assert "Other" not in categories
    assert all("system-message" not in caption and len(caption) > 100 for caption in captions.values())
    told = PROJECT / "workflow" / "report"
    assert len(set(captions.values())) >= len([one for one in told.glob("*.rst") if one.stem != "workflow"])
    assert "of <tt" in captions["downstream/orl/knn.objects.json"]


def test_people_are_told_what_a_run_is_made_of_and_last_of_all_what_came_out(copy):
    done = snakemake(copy, changed(repeats=2, variants={"b": {"stage1": {"method": "moco"}}}), "--dry-run")
    assert done.stderr.splitlines() == [
        "orl: run tiny: 24 generated scenes",
        "orl: trained (8): stage1 (byol, 2 epochs), stage1-b (moco, 2 epochs), orl (2 epochs), orl-b (2 epochs)",
        "orl: measured (10): random, stage1, orl, stage1-b, orl-b",
        "orl: by the tasks: voc07_svm",
        "orl: left out by downstream.tasks: voc07_lowshot, linear, semi, knn, detection, segmentation, localization, "
        "attention",
        "orl: results in results/tiny, the page in results/tiny/report/index.html",
    ]
    done = snakemake(copy, TINY, "--forcerun", "report")
    assert done.returncode == 0, done.stderr
    *scores, weights, page = (copy / "results/tiny/logs/report.log").read_text().splitlines()
    assert weights == "weights: results/tiny/models/orl/backbone.safetensors"
    assert page == "page: results/tiny/report/index.html"
    assert [line.split()[3] for line in scores] == ["random:", "stage1:", "orl:"]
    assert done.stdout.splitlines() == 2 * [*scores, weights, page]  # by the command, and below Snakemake's last words
    assert "page:" not in snakemake(copy, TINY, "--forcerun", "manifest", "--until", "manifest").stdout


# Jobs after other pairs, and of another seed
SVM, TWO = {"features": 1, "voc07_svm": 1}, {"features": 2, "voc07_svm": 2}
DISCOVERY = {"correspond": 2, "merge": 1, "pair_precision": 1, "stage3": 1, **SVM, "report": 1}
SEED = {"random": 1, "stage1": 1, "embed": 1, "propose": 2, "neighbors": 1, "rois": 3, "correspond": 2, "merge": 3,
        "stage3": 1, "features": 3, "voc07_svm": 3, "proposals_recall": 1, "pair_precision": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "jobs"),
    [
        ({}, {}),
        ({"compute": {"threads": 1, "gpus": 0, "checkpoint_minutes": 1, "log_every": 7, "compile": True,
                      "deterministic": True}}, {}),
        ({"compute": {"shards": {"embeddings": 5, "proposals": 1, "rois": 4, "correspondences": 9}}}, {}),
        ({"compute": {"shards": {"rois": 5, "correspondences": 4}}, "rois": {"size": 40}},
         {"rois": 5, **DISCOVERY, "correspond": 4}),
        ({"stage3": {"patch": 16}}, {"stage3": 1, **SVM, "report": 1}),
        ({"stage3": {"optimizer": {"lr": 0.5}}}, {"stage3": 1, **SVM, "report": 1}),
        ({"correspondences": {"ratio": 0.5}}, DISCOVERY),
        ({"correspondences": {"method": "random"}}, DISCOVERY),
        ({"neighbors": {"k": 2}}, {"neighbors": 1, **DISCOVERY}),
        ({"neighbors": {"method": "random"}}, {"neighbors": 1, **DISCOVERY}),
        ({"rois": {"size": 40}}, {"rois": 3, **DISCOVERY}),
        ({"proposals": {"top_n": 4}}, {"propose": 2, "rois": 3, "proposals_recall": 1, **DISCOVERY, "merge": 2}),
        ({"variants": {"grid": {"proposals": {"method": "grid"}}}},
         {"propose": 2, "rois": 3, "proposals_recall": 1, **DISCOVERY, "merge": 2}),
        ({"embeddings": {"resize": 48}}, {"embed": 1, "neighbors": 1, **DISCOVERY, "merge": 2}),
        ({"downstream": {"voc07_svm": {"costs": [0.1]}}}, {"voc07_svm": 3, "report": 1}),
        ({"downstream": {"voc07_svm": {"size": 32}}}, {"features": 3, "voc07_svm": 3, "report": 1}),
        ({"downstream": {"tasks": ["knn"]}}, {"set_features": 3, "knn": 3, "report": 1}),
        (
            {"stage1": {"optimizer": {"epochs": 3}}},
            {"stage1": 1, "embed": 1, "neighbors": 1, "rois": 3, **DISCOVERY, "merge": 2, **TWO},
        ),
        ({"variants": {"same": {"neighbors": {"k": 3}}}}, {}),
        ({"variants": {"k2": {"neighbors": {"k": 2}}}}, {"neighbors": 1, **DISCOVERY}),
        ({"variants": {"p": {"stage3": {"patch": 16}}, "q": {"stage3": {"patch": 16}}}},
         {"stage3": 1, **SVM, "report": 1}),
        ({"repeats": 3}, {**{rule: 2 * number for rule, number in SEED.items()}, "report": 1}),
        ({"repeats": 2, "variants": {"seed1": {"seed": 1, "repeats": 1}}}, {**SEED, "report": 1}),
        ({"variants": {"more": {"repeats": 2}}}, {**SEED, "report": 1}),
        ({"variants": {"b": {"measure": ["stage1"], "stage1": {"optimizer": {"epochs": 3}}}}},
         {"stage1": 1, **SVM, "report": 1}),
        ({"variants": {"b": {"measure": [], "stage1": {"optimizer": {"epochs": 3}}}}}, {}),
    ],
)  # fmt: skip
def test_a_change_reruns_what_depends_on_it(finished, change, jobs):
    assert plan(finished, changed(**change)) == jobs


def test_a_variant_of_which_only_the_pairs_are_measured_trains_nothing(finished):
    jobs = plan(finished, changed(variants={"b": {"measure": ["pairs"], "neighbors": {"k": 2}}}))
    jobs.pop("report", None)
    assert jobs == {"neighbors": 1, "correspond": 2, "merge": 1, "pair_precision": 1}


# From nothing: what a seed makes, and what all seeds share
WHOLE = {**SEED, "scenes": 1, "manifest": 1, "report": 1}


@pytest.mark.parametrize(
    ("settings", "jobs"),
    [
        ({}, WHOLE),
        # The variant's own stage 1 for each seed, and its score; nothing of its stage 2 and 3.
        ({"repeats": 2, "variants": {"b": {"measure": ["stage1"], "stage1": {"method": "simclr"}}}},
         {**WHOLE, **{rule: 2 * number for rule, number in SEED.items()}, "stage1": 4, "features": 8, "voc07_svm": 8}),
        ({"repeats": 2, "variants": {"b": {"repeats": 1, "measure": ["stage1"], "stage1": {"method": "simclr"}}}},
         {**WHOLE, **{rule: 2 * number for rule, number in SEED.items()}, "stage1": 3, "features": 7, "voc07_svm": 7}),
        # Equal settings share: the variant is one of the repeats.
        ({"repeats": 2, "variants": {"b": {"seed": 1, "repeats": 1}}},
         {**WHOLE, **{rule: 2 * number for rule, number in SEED.items()}}),
        # Other stage 3: everything before it is that of the same seed.
        ({"repeats": 2, "variants": {"b": {"stage3": {"patch": 16}}}},
         {**WHOLE, **{rule: 2 * number for rule, number in SEED.items()}, "stage3": 4, "features": 8, "voc07_svm": 8}),
    ],
)  # fmt: skip
def test_a_run_with_repeats_makes_each_thing_once(tmp_path, settings, jobs):
    assert plan(tmp_path, changed(**settings)) == jobs


def test_the_ablations_share_all_that_their_settings_leave_alone(tmp_path):
    """config/ablations.yaml over the shipped scenes: K, ratio and the losses need nothing before what they change."""
    files = [str(PROJECT / "config" / f"{name}.yaml") for name in ("config", "ablations")]
    jobs = plan(tmp_path, {}, "--configfile", *files)
    models = 1 + 2, 1 + 15  # of stage 1 and of stage 3: the run's own and the variants'
    boxes = 1 + 4  # three numbers of them, and random ones
    rois = boxes + 2  # features of two more models of stage 1
    pairs = models[1] - 3  # the losses have the run's own
    assert jobs == {
        "scenes": 1, "manifest": 1, "random": 1, "stage1": models[0], "embed": models[0], "propose": 2 * boxes,
        "rois": 2 * rois, "neighbors": 1 + 4 + 2, "correspond": 2 * pairs, "merge": models[0] + boxes + pairs,
        "stage3": models[1], "features": 1 + sum(models), "voc07_svm": 1 + sum(models), "proposals_recall": boxes,
        "pair_precision": pairs, "attention": 1, "report": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("measure", "without", "scores"),
    [
        (["stage1"], {"random", "stage3", "proposals_recall", "pair_precision"}, 1),
        (["stage1", "random"], {"stage3", "proposals_recall", "pair_precision"}, 2),
        (["pairs"], {"random", "stage3", "voc07_svm"}, 0),
        (["orl"], {"random", "proposals_recall", "pair_precision"}, 1),
        (["orl", "pairs", "stage1", "random"], set(), 3),
    ],
)
def test_what_is_not_measured_is_not_made(tmp_path, measure, without, scores):
    jobs = plan(tmp_path, changed(measure=measure))
    assert not without & set(jobs)
    assert {"proposals_recall", "pair_precision", "stage3"} - without <= set(jobs)
    assert (jobs["stage1"], jobs.get("voc07_svm", 0)) == (1, scores)


def test_each_repeat_has_files_of_its_own(tmp_path):
    config = changed(repeats=2, variants={"b": {"measure": ["stage1", "pairs"], "stage1": {"method": "moco"}}})
    done = snakemake(tmp_path, config, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    made = {name for names in re.findall(r"^    output: (.+)$", done.stdout + done.stderr, re.MULTILINE)
            for name in names.replace("results/tiny/", "").split(", ")}  # fmt: skip
    models = "random", "stage1", "orl", "stage1-b"
    for seed in ("", ".seed1"):
        assert {f"models/{model}{seed}/backbone.safetensors" for model in models} <= made
        assert {f"downstream/{name}{seed}.json" for name in ("proposals", "pairs", "pairs-b")} <= made
        assert {f"downstream/{model}{seed}/voc07_svm.json" for model in models} <= made
        assert f"discovery-b{seed}/correspondences.h5" in made
        assert not {f"downstream/proposals-b{seed}.json", f"discovery-b{seed}/proposals.h5"} & made  # seeds share them
        assert not [name for name in made if name.startswith(("models/orl-b", "models/random-b"))]


def test_repeats_are_given_their_seeds(tmp_path):
    config = changed(seed=5, repeats=2, measure=["stage1"])
    done = snakemake(tmp_path, config, "--dry-run", "--printshellcmds")
    assert done.returncode == 0, done.stdout + done.stderr
    trained = re.findall(r"^Shell command: (orl pretrain --stage stage1 .+)$", done.stdout + done.stderr, re.MULTILINE)
    seeds = {re.search(r"models/([^/]+)", line)[1]: re.search(r'"seed": (\d+)', line)[1] for line in trained}
    assert seeds == {"stage1": "5", "stage1.seed6": "6"}


@pytest.mark.parametrize(
    ("wanted", "given", "training", "others"),
    [(8, None, 8, 1), (8, 2, 2, 1), (8, 0, 0, 0), (0, None, 0, 0)],
)
def test_jobs_are_given_the_gpus_they_want_as_far_as_there_are(tmp_path, wanted, given, training, others):
    limit = [] if given is None else ["--resources", f"gpu={given}"]
    config = changed(compute={"gpus": wanted, "compile": True})
    done = snakemake(tmp_path, config, "--dry-run", "--printshellcmds", *limit)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^Shell command: (orl .+)$", done.stdout + done.stderr, re.MULTILINE)
    found = {line: int(number) for line in lines for number in re.findall(r" --gpus (\d+)", line)}
    assert len(found) == 10  # stages 1 and 3, embed, neighbors, rois' three shards, three models' features
    for line, number in found.items():
        assert number == (training if "orl pretrain" in line else others)
        assert "orl pretrain" not in line or " --compile 1 --deterministic 0 " in line


def test_fewer_gpus_rerun_nothing(finished):
    assert plan(finished, TINY, "--resources", "gpu=0") == {}
    assert plan(finished, TINY, "--resources", "gpu=2") == {}


def test_settings_on_the_command_line(finished):
    """Snakemake hands on as text what is inside of braces."""
    downstream = "downstream={voc07_svm: {costs: [1e-2]}, attention: {ids: [000017]}}"
    jobs = plan(finished, TINY, "--config", "stage3={patch: 16, optimizer: {lr: 0.5}}", downstream)
    assert jobs == {"stage3": 1, **SVM, "report": 1}
    done = snakemake(finished, TINY, "--dry-run", "--config", "stage3={patch: small}")
    assert "stage3.patch: input should be a valid integer (found 'small')" in done.stderr


def test_one_stage_again(finished):
    assert plan(finished, TINY, "--forcerun", "neighbors") == {"neighbors": 1, **DISCOVERY}
    assert plan(finished, TINY, "--forcerun", "neighbors", "--until", "neighbors") == {"neighbors": 1}


def test_another_result_version_reruns_its_stage(finished, monkeypatch):
    """Code that gives other results raises RESULT_VERSION; Snakemake sees it in the params."""
    site = finished / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text("import orl.config; orl.config.RESULT_VERSION['neighbors'] = 99\n")
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    assert plan(finished, TINY) == {"neighbors": 1, **DISCOVERY}


def test_a_change_is_made_and_going_back_finds_what_a_variant_holds(copy):
    """Stage 3 with other settings trains alone; the earlier ones are found again, wherever they lie."""
    other = {"stage3": {"patch": 16}}
    before = (copy / "results/tiny/models/orl/backbone.safetensors").read_bytes()
    done = snakemake(copy, changed(variants={"small": other}))
    assert done.returncode == 0, done.stdout + done.stderr
    ran = set(re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE))
    assert ran == {"stage3", "features", "voc07_svm", "report", "graph", "card", "all"}
    assert (copy / "results/tiny/models/orl/backbone.safetensors").read_bytes() == before
    assert (copy / "results/tiny/models/orl-small/backbone.safetensors").read_bytes() != before
    both = changed(variants={"small": other})
    assert plan(copy, both) == {}
    assert is_sound(copy)
    switched = changed(variants={"small": other}, **other)  # the run itself now has the variant's settings
    assert "stage3" not in plan(copy, switched)
    assert "stage3" not in plan(copy, TINY)  # and back


def test_an_interrupted_stage_reruns_alone(copy):
    (copy / "results/tiny/discovery/correspondences.h5").unlink()
    before = (copy / "results/tiny/models/orl/backbone.safetensors").read_bytes()
    done = snakemake(copy, TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (copy / "results/tiny/models/orl/backbone.safetensors").read_bytes() == before
    assert plan(copy, TINY) == {}


def test_a_shard_that_is_lost_is_the_only_one_that_reruns_and_only_when_it_is_needed(copy):
    """RoI features, the largest files, can be deleted as soon as the pairs are found."""
    (copy / "results/tiny/discovery/rois/0002-of-0003.h5").unlink()
    assert plan(copy, TINY) == {}
    assert plan(copy, changed(correspondences={"ratio": 0.5})) == {"rois": 1, **DISCOVERY}


def test_a_photo_that_is_damaged_between_stages_stops_its_shard_alone(finished, tmp_path):
    """Mended, the run goes on with that shard, and makes what an undisturbed one does."""
    results = tmp_path / "results" / "tiny"
    assert snakemake(tmp_path, TINY, "--until", "manifest").returncode == 0
    name = str(artifacts.read_manifest(results / "manifest.csv").path[20])
    photo = results / "scenes" / name
    content = photo.read_bytes()
    photo.write_bytes(content[:-100])
    assert snakemake(tmp_path, TINY, "--until", "propose", "--keep-going").returncode == 1
    log = (results / "logs/propose/0002-of-0002.log").read_text().splitlines()[-1]
    assert f"{name}: photo changed since the manifest was made" in log
    shards = results / "discovery" / "proposals"
    assert {path.name for path in shards.iterdir()} == {"0001-of-0002.h5"}
    photo.write_bytes(content)
    assert plan(tmp_path, TINY, "--until", "propose") == {"propose": 1}
    assert snakemake(tmp_path, TINY, "--until", "propose").returncode == 0
    for path in shards.iterdir():
        assert path.read_bytes() == (finished / path.relative_to(tmp_path)).read_bytes()


def weights(path, seed=0):
    """A resnet10 and its projector, saved as the authors' release does."""
    import torch

    from orl.networks import backbones
    from orl.networks.heads import mlp

    torch.manual_seed(seed)
    nets = {"online_net.0.": backbones.backbone("resnet10"), "online_net.1.mlp.": mlp(512, 16, 8)}
    state = {f"{prefix}{key}": value for prefix, net in nets.items() for key, value in net.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    torch.save({"meta": {}, "state_dict": {**state, "head.weight": torch.ones(1)}}, path)
    return str(path)


def test_every_method_of_stage_1_reaches_the_report(copy):
    methods = {"simclr": ["stage1"], "moco": ["stage1", "pairs"]}
    variants = {name: {"stage1": {"method": name}, "measure": measure} for name, measure in methods.items()}
    config = changed(variants=variants, compute=ONE_SHARD)
    done = snakemake(copy, config)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = set(re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE))
    assert not ran & {"scenes", "manifest", "propose", "random"}  # these are the same for all
    page = (copy / "results" / "tiny" / "report" / "index.html").read_text()
    for name in methods:
        result = artifacts.read_results(copy / "results" / "tiny" / "downstream" / f"stage1-{name}" / "voc07_svm.json")
        assert f"{result['metrics']['mAP']:.2f}" in page
    assert "Precision of pairs-moco" in page
    assert is_sound(copy)
    assert plan(copy, config) == {}


def test_a_second_round_pairs_by_the_orl_weights_and_trains_again(copy):
    config = changed(rounds=2)
    jobs = plan(copy, config)
    assert jobs == {"embed": 1, "merge": 2, "neighbors": 1, "rois": 3, "correspond": 2, "stage3": 1, "features": 1,
                    "voc07_svm": 1, "pair_precision": 1, "report": 1}  # fmt: skip
    done = snakemake(copy, config)
    assert done.returncode == 0, done.stdout + done.stderr
    results = copy / "results" / "tiny"
    orl_model, second = (results / "models" / name / "backbone.safetensors" for name in ("orl", "orl-round2"))
    rois = results / "discovery-round2" / "rois" / "0001-of-0003.h5"
    assert json.loads(artifacts.attributes(rois)["inputs"])["backbone"] == artifacts.fingerprint(orl_model)
    assert artifacts.fingerprint(second) != artifacts.fingerprint(orl_model)
    page = (results / "report" / "index.html").read_text()
    assert "orl-round2" in page
    assert 'aria-label="The rules of the run: ' in page
    assert is_sound(copy)


def test_every_task_on_every_model(copy):
    """With labels of photos, of random weights and of given ones; each result again only after what it depends on."""
    small = {"resize": 36, "size": 32}
    trained = {**small, "epochs": 1, "milestones": [], "batch": 4}
    downstream = {
        "tasks": ["voc07_svm", "voc07_lowshot", "linear", "semi", "knn"],
        "voc07_lowshot": {"shots": [1, 2], "samples": 2, "costs": [0.01, 1]},
        "linear": {**trained, "stages": [4, 5]},
        "semi": {**trained, "shares": [0.5], "weight_decay": [0.0], "lr": [0.01], "head": [1, 10], "runs": 2},
        "knn": {**small, "k": [1, 3]},
    }
    file = str(copy / "results" / "tiny" / "models" / "orl" / "backbone.safetensors")
    settings = changed(
        measure=["random"],
        supervised=file,
        data={"scenes": {"objects_train": 2}},
        downstream=downstream,
        compute={"threads": 1},
    )
    done = snakemake(copy, settings)
    assert done.returncode == 0, done.stdout + done.stderr
    results = copy / "results" / "tiny" / "downstream"
    page = (copy / "results" / "tiny" / "report" / "index.html").read_text()
    tasks = ("voc07_svm", "voc07_lowshot", "knn.objects", "linear.objects", "semi.objects")
    for model in ("random", "supervised"):
        for task in tasks:
            result = artifacts.read_results(results / model / f"{task}.json")
            assert (result["task"], result["model"]) == (task.partition(".")[0], model)
            assert result["data"]["fingerprint"]
            assert result["settings"]["version"]
            assert result["data"]["weights_fingerprint"] == artifacts.fingerprint(
                copy / "results" / "tiny" / "models" / model / "backbone.safetensors"
            )
        found = result["metrics"]["shares"]["0.5"]
        assert (found["labels"], len(found["grid"]), len(found["runs"])) == (12, 2, 2)
    assert len((results / "subset" / "objects" / "0.5.txt").read_text().splitlines()) == 12
    for title in ("VOC07 linear SVM", "Low-shot SVM", "Linear classification: objects", "k-NN classification: objects"):
        assert title in page
    assert not list(results.glob("downstream/**/*.state"))
    assert is_sound(copy)

    def after(**change):
        return plan(copy, changed(**{**settings, "downstream": {**downstream, **change}}))

    assert after() == {}
    assert after(knn={**small, "k": [1]}) == {"knn": 2, "report": 1}
    assert after(knn={"resize": 40, "size": 32, "k": [1, 3]}) == {"set_features": 2, "knn": 2, "report": 1}
    assert after(linear={**trained, "stages": [5]}) == {"linear": 2, "report": 1}
    assert after(voc07_lowshot={"shots": [1], "samples": 2, "costs": [1]}) == {"voc07_lowshot": 2, "report": 1}
    # Two more runs, or a larger grid: what is there already stays, but the runs of the best wait for the whole grid.
    assert after(semi={**downstream["semi"], "runs": 4}) == {"semi_run": 4, "semi": 2, "report": 1}
    more = {**downstream["semi"], "shares": [0.5, 1.0], "weight_decay": [0.0, 0.1]}
    assert after(semi=more) == {"subset": 1, "semi_grid": 4, "semi_run": 2, "semi": 2, "report": 1}
    larger = {**downstream["semi"], "head": [1, 10, 100]}
    assert after(semi=larger) == {"semi_grid": 2, "semi_run": 2, "semi": 2, "report": 1}
    assert after(voc07_svm={**TINY["downstream"]["voc07_svm"], "costs": [1]}) == {"voc07_svm": 2, "report": 1}
    assert plan(copy, changed(**{**settings, "supervised": None})) == {"report": 1}


def test_every_task_about_objects(copy):
    """With masks or boxes; attention maps, and weights for other frameworks."""
    downstream = {
        "tasks": ["detection", "segmentation", "localization", "attention"],
        "detection": {"iterations": 1, "milestones": [], "warmup": 0, "batch": 4, "short_sides": [64], "test_side": 64,
                      "channels": 16, "rois": 16, "precise_bn": 1},
        "segmentation": {"resize": 72, "size": 64, "epochs": 1, "milestones": [], "batch": 8},
        "localization": {"side": 64, "boxes": 2},
        "attention": {"side": 96, "photos": 2},
    }  # fmt: skip
    measure = ["pairs", "orl"]  # several models are no different, but take longer
    settings = changed(measure=measure, downstream=downstream, export=["timm", "detectron2"], compute={"threads": 1})
    done = snakemake(copy, settings)
    assert done.returncode == 0, done.stdout + done.stderr
    results = copy / "results" / "tiny"
    page = (results / "report" / "index.html").read_text()
    for task in ("detection", "segmentation", "localization"):
        result = artifacts.read_results(results / "downstream" / "orl" / f"{task}.json")
        assert (result["task"], result["model"]) == (task, "orl")
        assert result["settings"]["version"]
    found = json.loads((results / "downstream" / "orl" / "detection.predictions.json").read_text())
    assert all({"image_id", "category_id", "bbox", "score", "segmentation"} <= set(one) for one in found)
    assert artifacts.read_results(results / "downstream" / "localization.json")["model"] == "pairs"
    seen = json.loads((results / "attention" / "attention.json").read_text())
    assert (seen["models"], len(seen["photos"])) == (["orl"], 2)
    assert all((results / "attention" / photo["file"]).exists() for photo in seen["photos"])
    assert {path.name for path in (results / "models" / "orl").iterdir()} >= {"timm.safetensors", "detectron2.pth"}
    for title in ("Box AP", "Mask AP", "Segmentation", "Object discovery", "Attention maps"):
        assert title in page
    assert not list(results.glob("downstream/**/*.state"))
    assert is_sound(copy)

    def after(**change):
        return plan(copy, changed(**{**settings, "downstream": {**downstream, **change}}))

    assert after() == {}
    other = {**downstream["detection"], "test": "train2017"}
    assert after(detection=other, attention={"side": 96, "photos": 3}) == {
        "detection": 1, "segmentation": 1, "attention": 1, "report": 1}  # fmt: skip
    assert after(localization={"side": 64, "boxes": 3}) == {"localization": 1, "pair_boxes": 1, "report": 1}
    assert after(localization={"side": 96, "boxes": 2}) == {"localization": 1, "report": 1}
    faster = changed(**{**settings, "compute": {"threads": 1, "faster_coco_eval": True}})
    assert plan(copy, faster) == {}


def test_objects_of_photos_in_a_folder(tmp_path):
    """data.objects names what holds them: a folder of VOC XML files, or a COCO JSON."""
    photos = tmp_path / "JPEGImages"
    photos.mkdir()
    (tmp_path / "Annotations").mkdir()
    data = {"layout": "folder", "root": str(photos)}
    tasks = {"tasks": ["localization"]}
    assert "localization" not in plan(tmp_path, changed(data=data, downstream=tasks))
    data |= {"objects": ["../Annotations"], "annotations": {"train2017": "of/another/layout.json"}}
    found = plan(tmp_path, changed(data=data, downstream=tasks))
    assert {"localization": 3, "pair_boxes": 1, "pair_precision": 1, "proposals_recall": 1}.items() <= found.items()


def test_objects_are_read_again_after_a_correction(tmp_path):
    """data.objects stands instead of data.annotations; a folder's files count, whose change leaves its time alone."""
    folder, xml = tmp_path / "xml", tmp_path / "xml" / "a.xml"
    for path in ("train2017", "xml"):
        (tmp_path / path).mkdir()
    xml.write_text("<annotation/>")
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [{"bbox": []}]}')
    data = {"layout": "coco", "root": ".", "annotations": {"train2017": "a.json"}, "objects": ["xml"]}
    config = changed(data=data, downstream={"tasks": ["localization"]})
    output = "results/tiny/downstream/proposals.json"
    done = snakemake(tmp_path, config, "--dry-run", "--printshellcmds", output)
    assert "--annotations xml --name" in done.stdout + done.stderr
    for path in ("manifest.csv", "rejected.csv", "discovery/proposals.h5", "downstream/proposals.json"):
        (tmp_path / "results" / "tiny" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / "tiny" / path).write_text("made")
    before = folder.stat().st_mtime
    assert plan(tmp_path, config, output, "--rerun-triggers", "mtime") == {}
    os.utime(xml, (before + 1e6, before + 1e6))
    assert folder.stat().st_mtime == before
    assert plan(tmp_path, config, output, "--rerun-triggers", "mtime") == {"proposals_recall": 1}


def test_data_are_fetched_on_request(tmp_path):
    """Into the folders of the config, which need not be there; nothing else comes with it."""
    data = {"layout": "coco", "root": str(tmp_path / "coco"), "annotations": {"train2017": "annotations/a.json"}}
    voc = {"voc07_svm": {"root": str(tmp_path / "data" / "VOCdevkit" / "VOC2007")}}
    config = changed(data=data, downstream=voc)
    done = snakemake(tmp_path, config, "--dry-run", "--printshellcmds", "fetch_coco", "fetch_voc2007")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^Shell command: (orl .+?) 2>&1", done.stdout + done.stderr, re.MULTILINE)
    assert set(lines) == {
        f"orl fetch coco --output {tmp_path}/coco --parts train2017 annotations",
        f"orl fetch voc2007 --output {tmp_path}/data",
    }
    done = snakemake(tmp_path, changed(data=data), "--dry-run", "fetch_voc2007")
    assert done.returncode == 2
    assert "orl: config: downstream.voc07_svm.root: 'None' must end in VOCdevkit/VOC2007" in done.stderr
    assert snakemake(tmp_path, config, "--dry-run").returncode == 2  # without them


def test_given_weights_stand_in_for_stage_1(copy, tmp_path):
    """Stage 1 is made from the file, and everything after it again; the photos and their boxes stay."""
    after = {"embed": 1, "neighbors": 1, "rois": 3, **DISCOVERY, "merge": 2, **TWO}
    file, other = weights(tmp_path / "it's given" / "orl.pth"), weights(tmp_path / "other.pth", 1)

    def alone(stage1, **sections):
        """Settings by which nothing after stage 1 is made: it takes long, and is no different."""
        return changed(measure=["stage1"], stage1=stage1, **sections)

    assert plan(copy, changed(stage1={"weights": file})) == {"stage1": 1, **after}
    config, scored = alone({"weights": file}), {"stage1": 1, **SVM, "report": 1}
    done = snakemake(copy, config)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE)
    assert {rule: ran.count(rule) for rule in ran if rule not in ("all", "graph", "card")} == scored
    results = copy / "results" / "tiny"
    stage1 = results / "models" / "stage1"
    assert "layout ORL" in (results / "logs" / "stage1.log").read_text()
    assert len((stage1 / "metrics.csv").read_text().splitlines()) == 1
    inputs = json.loads(artifacts.attributes(stage1 / "model.safetensors")["inputs"])
    assert inputs == {"weights": artifacts.fingerprint(file)}
    assert "Loss of stage1" not in (results / "report" / "index.html").read_text()

    assert plan(copy, config) == {}
    assert is_sound(copy)
    assert plan(copy, changed(stage1={"weights": file})) == {**after, **SVM}
    assert plan(copy, alone({"weights": file, "optimizer": {"epochs": 3}}, stage3=TINY["stage1"])) == {}
    assert plan(copy, changed(stage1={"weights": other})) == {"stage1": 1, **after}
    assert plan(copy, changed(stage1={"weights": other}), "--until", "stage1") == {"stage1": 1}
    assert plan(copy, alone({"weights": file}, variants={"o": {"stage1": {"weights": other}}})) == scored
    assert plan(copy, alone({"weights": file}, variants={"trained": {"stage1": {"weights": None}}})) == scored
    weights(tmp_path / "it's given" / "orl.pth", 1)  # another content under the same name
    assert plan(copy, config) == scored


def test_given_weights_need_no_photos(tmp_path):
    config = changed(stage1={"weights": weights(tmp_path / "orl.pth")})
    assert plan(tmp_path, config, "--until", "stage1") == {"stage1": 1}
    assert plan(tmp_path, TINY, "--until", "stage1") == {"scenes": 1, "manifest": 1, "stage1": 1}


def test_given_weights_are_the_same_for_every_seed(tmp_path):
    jobs = plan(tmp_path, changed(stage1={"weights": weights(tmp_path / "orl.pth")}, repeats=3))
    own = {rule: 3 * number for rule, number in SEED.items()}
    shared = {"scenes": 1, "manifest": 1, "stage1": 1, "embed": 1, "report": 1}
    assert jobs == {**own, **shared, "merge": 1 + 2 * 3, "features": 1 + 2 * 3, "voc07_svm": 1 + 2 * 3}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"stage1": {"optimizer": {"batc": 3}}}, "unknown key 'stage1.optimizer.batc'; did you mean"),
        ({"seed": "one"}, "config: seed: input should be a valid integer (found 'one')"),
        ({"data": {"layout": "folder"}}, "data.root is not given"),
        ({"data": {"layout": "folder", "root": "nowhere"}}, "'nowhere' is no folder"),
        ({"variants": {"a": {"neighbors": {"kay": 3}}}}, "config, variant a: unknown key 'neighbors.kay'"),
        ({"variants": {"a": {"data": {"layout": "coco"}}}}, "variants.a: 'data' is the same for all variants"),
        ({"downstream": {"voc07_svm": {"root": "nowhere"}}}, "'nowhere' is no folder"),
        ({"downstream": {"voc07_lowshot": {"lists": "nowhere"}}}, "voc07_lowshot.lists: 'nowhere' is no folder"),
        ({"downstream": {"sets": {"a": {"root": "nowhere"}}}}, "downstream.sets.a.root: 'nowhere' is no folder"),
        ({"downstream": {"sets": {"a": {"root": ".", "val": "test"}}}}, "downstream.sets.a: 'train' is not there"),
        ({"downstream": {"detection": {"root": "nowhere"}}}, "downstream.detection.root: 'nowhere' is no folder"),
        ({"data": {"layout": "folder", "root": ".", "objects": ["a.json"]}}, "data.objects: 'a.json' is not there"),
        ({"supervised": "nowhere.pth"}, "supervised: 'nowhere.pth' is no file"),
        ({"stage1": {"weights": "nowhere.pth"}}, "stage1.weights: 'nowhere.pth' is no file"),
        ({"variants": {"a": {"stage1": {"weights": "nowhere.pth"}}}}, "stage1.weights: 'nowhere.pth' is no file"),
    ],
)
def test_bad_settings_end_before_any_work(tmp_path, config, sentence):
    done = snakemake(tmp_path, config)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("orl: ")]
    assert sentence in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("files", "sentence"),
    [({}, "photo"), ({"a.jpg": b"no photo"}, "a.jpg"), ({"one.png": None}, "only one photo")],
)
def test_folders_without_enough_photos(tmp_path, files, sentence):
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for name, content in files.items():
        if content is None:
            Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photos / name)
        else:
            (photos / name).write_bytes(content)
    done = snakemake(tmp_path, changed(data={"layout": "folder", "root": str(photos)}))
    assert done.returncode == 1  # Snakemake's own, for a failed job
    assert "non-zero exit code" in done.stdout + done.stderr  # the command's own failure, not its missing output
    log = (tmp_path / "results/tiny/logs/manifest.log").read_text().splitlines()[-1]
    assert log.startswith("orl manifest: ")
    assert sentence in log
    assert not (tmp_path / "results/tiny/manifest.csv").exists()


def test_recall_and_precision_are_measured_where_there_are_boxes(tmp_path):
    """Of photos in COCO layout whose file holds boxes; not where it only lists them, or where there is none."""
    root = tmp_path / "coco"
    (root / "train2017").mkdir(parents=True)
    (root / "lists.json").write_text('{"images": [{"id": 1, "file_name": "1.jpg"}]}')
    (root / "boxes.json").write_text('{"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}')
    for annotations, jobs in (({}, 0), ({"train2017": "lists.json"}, 0), ({"train2017": "boxes.json"}, 1)):
        data = {"layout": "coco", "root": str(root), "annotations": annotations}
        found = plan(tmp_path, changed(data=data))
        assert (found.get("proposals_recall", 0), found.get("pair_precision", 0)) == (jobs, jobs)


def test_real_photos_with_odd_names_and_few_neighbours(tmp_path):
    """The chain on a folder of real photos, names that a shell would trip over, K clipped, one photo rejected."""
    if not REAL.is_dir():
        pytest.skip("the coco-mini photos are not there")
    photos = tmp_path / "my photos'; $(x)"
    (photos / "-nested é").mkdir(parents=True)
    for number, path in enumerate(sorted((REAL / "train2017").iterdir())[:8]):
        shutil.copy(path, photos / ("-nested é" if number % 2 else ".") / f"-{number} \"'&.jpg")
    broken = photos / "broken.jpg"
    broken.write_bytes(path.read_bytes()[:5000])
    config = changed(
        name="odd",
        data={"layout": "folder", "root": str(photos)},
        neighbors={"k": 50},
        stage1={"optimizer": {"batch": 4}},
        proposals={"long_side": 300},
        compute=ONE_SHARD,
    )
    done = snakemake(tmp_path, config)
    results = tmp_path / "results" / "odd"
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stderr.count("orl: voc07_svm and voc07_lowshot are left out: downstream.voc07_svm.root is not given") == 1
    )
    assert "using 7 neighbours each" in (results / "logs" / "neighbors.log").read_text()
    assert "broken.jpg" in (results / "rejected.csv").read_text()
    assert artifacts.read_neighbors(results / "discovery" / "neighbors.h5").index.shape == (8, 7)
    assert plan(tmp_path, config) == {}
    assert is_sound(tmp_path, "odd")


# What doctor and clean say must be so


def test_a_finished_run_is_sound_and_keeps_its_config(finished):
    assert is_sound(finished)
    assert json.loads((finished / "results/tiny/config.json").read_text()) == TINY
    done = orl(finished, "doctor", "results/tiny", "--configfile", "config.yaml")
    assert done.returncode == 0, done.stdout


def mended(folder, *arguments):
    """Run the commands that doctor names, all at once where it names several, and look again."""
    out = orl(folder, "doctor", "results/tiny", *arguments).stdout
    commands = re.findall(r"^ {11}(.+)$", out, re.MULTILINE)
    command = commands[-1] if "All at once" in out else next(line for line in commands if line)
    home = f"{shlex.quote(sys.executable)} -m snakemake --snakefile {shlex.quote(str(PROJECT / 'Snakefile'))} "
    done = subprocess.run(["bash", "-c", command.replace("snakemake ", home, 1)], cwd=folder, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, command + done.stdout + done.stderr
    ran = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE)
    assert orl(folder, "doctor", "results/tiny", *arguments).returncode == 0
    return {rule: ran.count(rule) for rule in ran if rule not in ("all", "card")}


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[:-100])


def test_damage_is_mended_by_the_commands_that_doctor_names(copy):
    """A model from its checkpoint, what follows, and a shard that nothing needs any more by deleting it."""
    results = copy / "results/tiny"
    before = (results / "models/orl/backbone.safetensors").read_bytes()
    cut(results / "models/orl/backbone.safetensors")
    cut(results / "discovery/rois/0002-of-0003.h5")
    cut(results / "downstream/random/voc07_svm.json")
    assert orl(copy, "doctor", "results/tiny").returncode == 1
    assert mended(copy) == {"stage3": 1, "features": 1, "voc07_svm": 2, "report": 1}
    assert (results / "models/orl/backbone.safetensors").read_bytes() == before
    assert not (results / "discovery/rois/0002-of-0003.h5").exists()
    assert plan(copy, TINY) == {}


def test_what_another_config_would_make_again_is_what_snakemake_then_makes(copy):
    other = changed(downstream={"voc07_svm": {"costs": [0.1]}})
    (copy / "other.yaml").write_text(yaml.safe_dump(other))
    out = orl(copy, "doctor", "results/tiny", "--configfile", "other.yaml").stdout
    assert out.count("downstream.voc07_svm.costs: [0.01], config [0.1]") == 3
    assert mended(copy, "--configfile", "other.yaml") == {"voc07_svm": 3, "report": 1}


def test_a_run_from_which_snakemake_was_killed_goes_on_by_the_commands_that_doctor_names(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", "2",
               "--configfile", "config.yaml", "--until", "manifest"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    config = tmp_path / "results/tiny/config.json"
    deadline = time.monotonic() + 300
    while not config.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = orl(tmp_path, "doctor", "results/tiny")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Snakemake: was killed, or works on another machine" in done.stdout
    assert "           snakemake --unlock\n" in done.stdout
    assert snakemake(tmp_path, TINY, "--unlock").returncode == 0
    done = snakemake(tmp_path, TINY, "--rerun-incomplete", "--until", "manifest")
    assert done.returncode == 0, done.stdout + done.stderr
    done = orl(tmp_path, "doctor", "results/tiny")
    assert done.returncode == 0, done.stdout
    assert "ok       manifest.csv: 24 photos, 0 rejected" in done.stdout
    assert "note     models/stage1: not made yet" in done.stdout


def test_after_cleaning_nothing_is_to_be_done_and_all_can_still_be_made(copy):
    results = copy / "results/tiny"
    kept = {path: path.read_bytes() for path in results.rglob("*") if path.suffix in (".safetensors", ".json", ".csv")}
    done = orl(copy, "clean", "results/tiny", "--yes")
    assert done.returncode == 0, done.stderr
    assert not list(results.rglob("*.pt")) + list(results.rglob("features.h5")) + list(results.rglob("*-of-*.h5"))
    assert {path: path.read_bytes() for path in kept} == kept
    assert plan(copy, TINY) == {}
    assert is_sound(copy)
    again = {"rois": 3, **DISCOVERY}  # its features, without which there is no SVM, are made in any case
    assert plan(copy, changed(correspondences={"ratio": 0.5})) == again
    assert plan(copy, changed(downstream={"voc07_svm": {"costs": [0.1]}})) == {
        "features": 3,
        "voc07_svm": 3,
        "report": 1,
    }
