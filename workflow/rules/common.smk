# The checked config, where each stage's files lie, and the final outputs.
import hashlib
import json
import os
import shlex
import sys
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path

from orl import InputError
from orl import config as settings


def stop(sentence):
    """End before any work: one sentence, exit 2."""
    print(f"orl: {sentence}", file=sys.stderr)
    sys.exit(2)


try:
    RUN = settings.parse(config, "config")
    RUNS = settings.runs(config)
except InputError as error:
    stop(error)

RESULTS = f"results/{RUN.name}"
COMPUTE = RUN.compute
SCENES = RUN.data.layout == "scenes"
ROOT = f"{RESULTS}/scenes" if SCENES else RUN.data.root
if not ROOT:
    stop("config: data.root is not given; set it to the folder of your photos.")
if not SCENES and not Path(ROOT).is_dir():
    stop(
        f"config: data.root: {ROOT!r} is no folder; set it to the folder of your photos."
    )

# What each stage is made from, and its file or folder; {v} is a key of RUNS.
UPSTREAM = {
    "manifest": (),
    "random": (),
    "stage1": ("manifest",),
    "embeddings": ("manifest", "stage1"),
    "proposals": ("manifest",),
    "neighbors": ("manifest", "embeddings"),
    "rois": ("stage1", "proposals"),
    "correspondences": ("neighbors", "rois"),
    "stage3": ("correspondences",),
    "proposals_recall": ("proposals",),
    "pair_precision": ("correspondences",),
}
PATHS = {
    "manifest": "manifest.csv",
    "random": "models/random{v}",
    "stage1": "models/stage1{v}",
    "embeddings": "discovery{v}/embeddings.h5",
    "proposals": "discovery{v}/proposals.h5",
    "neighbors": "discovery{v}/neighbors.h5",
    "rois": "discovery{v}/rois",
    "correspondences": "discovery{v}/correspondences.h5",
    "stage3": "models/orl{v}",
    "proposals_recall": "downstream/proposals{v}.json",
    "pair_precision": "downstream/pairs{v}.json",
}
MODELS = {"random": "random", "stage1": "stage1", "orl": "stage3"}  # name -> stage
for task in ("voc07_svm",):
    for model in MODELS.values():
        UPSTREAM[f"{task} {model}"] = (model,)
        PATHS[f"{task} {model}"] = f"{PATHS[model]}/{task}.json".replace(
            "models", "downstream"
        )

# Rules run `orl`: the one installed beside this Python, activated or not. A prefix replaces Snakemake's own, `set`.
BIN = shlex.quote(str(Path(sys.executable).parent))
shell.prefix(f'set -euo pipefail; export PATH={BIN}:"$PATH"; ')

LEDGER = Path(RESULTS, "variants.json")
try:
    HELD = json.loads(LEDGER.read_text())
except (OSError, ValueError):
    HELD = {}


def given(v):
    """The file of weights that a run uses instead of training stage 1, or None."""
    return RUNS[v].stage1.weights


@cache
def digest(stage, v):
    """Hash of the settings that decide a stage's result, its own and those of everything upstream."""
    whole = [settings.used(RUNS[v], stage.split()[0])]
    if not (stage == "stage1" and given(v)):  # given weights need no photos
        whole += [digest(upstream, v) for upstream in UPSTREAM[stage]]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def owner(stage, v):
    """The run whose folder holds a stage of run `v`.

    The first with equal settings for the stage and everything upstream of it; among several, one whose folder was
    last made with these settings, so that going back to settings which another variant holds finds its results.
    """
    wanted = digest(stage, v)
    equal = [other for other in RUNS if digest(stage, other) == wanted]
    return next(
        (other for other in equal if HELD.get(place(stage, other)) == wanted), equal[0]
    )


def place(stage, v):
    """File or folder of a stage in a run's own folder, relative to the results."""
    return PATHS[stage].format(v=v)


def found(stage, v=""):
    """File or folder where a stage of a run lies."""
    return f"{RESULTS}/{place(stage, owner(stage, v))}"


def shards(stage, v=""):
    """The files of the shards of a stage.

    As many as compute.shards says, unless a complete set with these settings is there: another count reruns nothing.
    """
    folder = Path(found(stage, v).removesuffix(".h5"))

    def files(count):
        return [
            f"{folder}/{number:04}-of-{count:04}.h5" for number in range(1, count + 1)
        ]

    counts = [getattr(COMPUTE.shards, stage)]
    made = place(stage, owner(stage, v))
    if HELD.get(made) == digest(stage, v):
        counts += sorted(int(file.stem[-4:]) for file in folder.glob("0001-of-????.h5"))
    complete = (count for count in counts if all(map(os.path.exists, files(count))))
    return files(next(complete, counts[0]))


def number_of(wildcards):
    """The shard that wildcard shard stands for, as --shard takes it."""
    number, count = map(int, wildcards.shard.split("-of-"))
    return f"{number}/{count}"


def of(stage, *file):
    """Input function: where the stage lies for the run of wildcard v, or a file in its folder."""
    return lambda wildcards: str(Path(found(stage, wildcards.get("v", "")), *file))


def evaluated(wildcards):
    """The backbone that a result is of, wherever its run's model lies."""
    return of(MODELS[wildcards.model], "backbone.safetensors")(wildcards)


def decides(stage):
    """Params function: the settings that decide a stage's result, as JSON for --settings."""

    def as_json(wildcards):
        used = settings.used(RUNS[wildcards.get("v", "")], stage)
        return json.dumps(
            {key: value for key, value in used.items() if key != "version"}
        )

    return as_json


def unique(items):
    return list(dict.fromkeys(items))


def trained(file):
    """A file of every model that is trained to be evaluated."""
    return unique(
        f"{found(MODELS[model], v)}/{file}"
        for model in ("stage1", "orl")
        for v in RUNS
        if model in RUNS[v].measure
    )


def annotations():
    """The COCO files of data.annotations."""
    return [str(Path(ROOT, file)) for file in RUN.data.annotations.values()]


def labels(v=""):
    """Folder of the labelled photos of voc07_svm, or None where it is not configured."""
    section = RUNS[v].downstream.voc07_svm
    if section.root is None and SCENES:
        return f"{ROOT}/VOCdevkit/VOC2007" if section.layout == "voc" else ROOT
    return section.root


def label_files(v):
    """The lists of labels of voc07_svm, in either layout: corrected labels are evaluated again."""
    root = RUNS[v].downstream.voc07_svm.root
    if root is None:  # the generated scenes: their folder is the input
        return []
    lists = [
        *Path(root).glob("annotations/instances_*.json"),
        *Path(root).glob("ImageSets/Main/*.txt"),
    ]
    return sorted(map(str, lists))


def scores():
    """Every downstream result of every model."""
    return unique(
        found(f"voc07_svm {MODELS[model]}", v)
        for v in RUNS
        if labels(v)
        for model in RUNS[v].measure
        if model in MODELS
    )


def objects():
    """The COCO files with boxes of the photos' objects: the scenes' own, or those of data.annotations that hold any."""
    if SCENES:
        return [f"{ROOT}/annotations/instances_train2017.json"]
    return [file for file in annotations() if holds_boxes(file)]


@cache
def holds_boxes(file):
    """Whether a COCO file does more than list photos; found without reading all of it."""
    try:
        with open(file) as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as data:
            return data.find(b'"bbox"') >= 0
    except (OSError, ValueError):  # missing or empty: the manifest's rule says so
        return False


def measured(stage):
    """Results about stage 2's boxes or pairs, of every run that wants them, where there are objects to compare with."""
    return unique(
        found(stage, v) for v in RUNS if "pairs" in RUNS[v].measure and objects()
    )


for name in RUNS:
    if given(name) and not Path(given(name)).is_file():
        stop(
            f"config: stage1.weights: {given(name)!r} is no file; name a file of weights."
        )
    root = RUNS[name].downstream.voc07_svm.root
    if root and not Path(root).is_dir():
        stop(
            f"config: downstream.voc07_svm.root: {root!r} is no folder; set it to the labelled photos."
        )
if not any(map(labels, RUNS)):
    print(
        "orl: voc07_svm is left out: downstream.voc07_svm.root is not given",
        file=sys.stderr,
    )


wildcard_constraints:
    v=r"(-[A-Za-z0-9_]+)?(\.seed\d+)?",
    model="random|stage1|orl",
    shard=r"\d{4}-of-\d{4}",
    merged="embeddings|proposals|correspondences",


onstart:
    from orl import artifacts

    HELD.update(
        {
            place(stage, owner(stage, v)): digest(stage, v)
            for stage in UPSTREAM
            for v in RUNS
        }
    )
    artifacts.write_json(LEDGER, HELD)
