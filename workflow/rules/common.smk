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


def unique(items):
    return list(dict.fromkeys(items))


config = settings.merge(config, settings.typed(workflow.config_settings.config))
try:
    RUN = settings.parse(config, "config")
    RUNS = settings.runs(config)
except InputError as error:
    stop(error)

RESULTS = f"results/{RUN.name}"
for folder in map(Path, ("results", RESULTS)):
    if os.path.lexists(folder) and not folder.is_dir():
        stop(f"{folder}: is no folder, so nothing can be written there; move it away.")
COMPUTE = RUN.compute
SCENES = RUN.data.layout == "scenes"
ROOT = f"{RESULTS}/scenes" if SCENES else RUN.data.root
if not ROOT:
    stop("config: data.root is not given; set it to the folder of your photos.")
# Data that are about to be fetched need not be there.
FETCHES = {"fetch_coco", "fetch_voc2007"} & set(sys.argv)
if not SCENES and not FETCHES and not Path(ROOT).is_dir():
    stop(
        f"config: data.root: {ROOT!r} is no folder; set it to the folder of your photos."
    )

# What each stage is made from, and its file or folder; {v} is a key of RUNS.
UPSTREAM = {
    "manifest": (),
    "random": (),
    "supervised": (),
    "stage1": ("manifest",),
    "embeddings": ("manifest", "stage1"),
    "proposals": ("manifest",),
    "neighbors": ("manifest", "embeddings"),
    "rois": ("stage1", "proposals"),
    "correspondences": ("neighbors", "rois"),
    "stage3": ("correspondences",),
    "proposals_recall": ("proposals",),
    "pair_precision": ("correspondences",),
    "pair_boxes": ("correspondences",),
    "attention": ("random", "supervised", "stage3"),
}
PATHS = {
    "manifest": "manifest.csv",
    "random": "models/random{v}",
    "supervised": "models/supervised{v}",
    "stage1": "models/stage1{v}",
    "embeddings": "discovery{v}/embeddings.h5",
    "proposals": "discovery{v}/proposals.h5",
    "neighbors": "discovery{v}/neighbors.h5",
    "rois": "discovery{v}/rois",
    "correspondences": "discovery{v}/correspondences.h5",
    "stage3": "models/orl{v}",
    "proposals_recall": "downstream/proposals{v}.json",
    "pair_precision": "downstream/pairs{v}.json",
    "pair_boxes": "downstream/localization{v}.json",
    "attention": "attention{v}",
}
# name -> stage
MODELS = {
    "random": "random",
    "stage1": "stage1",
    "orl": "stage3",
    "supervised": "supervised",
}
SETS = unique(name for run in RUNS.values() for name in run.downstream.sets)
for name in SETS:
    UPSTREAM[f"subset.{name}"] = ()
    PATHS[f"subset.{name}"] = f"downstream/subset{{v}}/{name}"
for model in MODELS.values():
    # TASK MODEL or TASK.SET MODEL: upstream, and its file among the model's results
    results = {
        "features": (model, "features.h5"),
        "voc07_svm": (f"features {model}", "voc07_svm.json"),
        "voc07_lowshot": (f"features {model}", "voc07_lowshot.json"),
        "detection": (model, "detection.json"),
        "segmentation": (model, "segmentation.json"),
        "localization": (model, "localization.json"),
    }
    for name in SETS:
        results |= {
            f"set_features.{name}": (model, f"{name}.features.h5"),
            f"knn.{name}": (f"set_features.{name} {model}", f"knn.{name}.json"),
            f"linear.{name}": (model, f"linear.{name}.json"),
            f"semi.{name}": (model, f"semi.{name}.json"),
        }
    for task, (upstream, file) in results.items():
        UPSTREAM[f"{task} {model}"] = (upstream,)
        PATHS[f"{task} {model}"] = f"{PATHS[model]}/{file}".replace(
            "models", "downstream"
        )
    for name in SETS:
        UPSTREAM[f"semi.{name} {model}"] += (f"subset.{name}",)
    UPSTREAM[f"localization {model}"] += ("manifest",)

# Rules run `orl`: the one installed beside this Python, activated or not. A prefix replaces Snakemake's own, `set`.
# A signal to all processes of a job, as a cluster sends it, must leave shell and log standing until `orl` has saved.
BIN = shlex.quote(str(Path(sys.executable).parent))
shell.prefix(
    f'set -euo pipefail; export PATH={BIN}:"$PATH"; trap : TERM; '
    'tee() {{ trap "" INT TERM; exec tee "$@"; }}; '
)

# Missing or damaged, it is made anew: all it does is to save work.
LEDGER = Path(RESULTS, "variants.json")
try:
    HELD = json.loads(LEDGER.read_text())
    if {type(value) for value in HELD.values()} - {str}:
        raise ValueError
except (OSError, ValueError, AttributeError, RecursionError):
    HELD = {}


def given(v):
    """The file of weights that a run uses instead of training stage 1, or None."""
    return RUNS[v].stage1.weights


@cache
def digest(stage, v):
    """Hash of the settings that decide a stage's result, its own and those of everything upstream."""
    task = stage.split()[0]
    if task.partition(".")[2] and task.partition(".")[2] not in RUNS[v].downstream.sets:
        return ""  # another variant's
    whole = [settings.used(RUNS[v], task)]
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


def downstream_of(task):
    """Input function: the file of a task, of the model (and the labelled set) that the wildcards name."""

    def file(wildcards):
        of_set = f".{wildcards.set}" if "set" in wildcards.keys() else ""
        return found(f"{task}{of_set} {MODELS[wildcards.model]}", wildcards.v)

    return file


def asks(memory, minutes, per_thread=0, disk=1000):
    """What a job asks a cluster for; enough for COCO and a ResNet-50. A profile's set-resources replaces it.

    Memory (MB, and for each thread) and time grow with each attempt, but the day of a training: it goes on where it
    was. Disk in MB.
    """
    return {
        "mem_mb": lambda wildcards, threads, attempt: attempt
        * (memory + per_thread * threads),
        "runtime": lambda wildcards, attempt: min(attempt * minutes, 24 * 60),
        "disk_mb": disk,
    }


def as_settings(used):
    """What settings.used gives, as JSON for --settings."""
    return json.dumps({key: value for key, value in used.items() if key != "version"})


def decides(stage):
    """Params function: the settings that decide a stage's result, as JSON for --settings."""

    def as_json(wildcards):
        of_set = f".{wildcards.set}" if "set" in wildcards.keys() else ""
        used = settings.used(RUNS[wildcards.get("v", "")], stage + of_set)
        return as_settings(used)

    return as_json


def decides_share(stage):
    """Params function: the settings that decide a stage of semi for one share of the labels; nothing of other shares."""

    def as_json(wildcards):
        used = settings.used(RUNS[wildcards.v], f"{stage}.{wildcards.set}")
        semi, one = (
            used["downstream"]["semi"],
            used["downstream"]["sets"][wildcards.set],
        )
        number = list(map(str, semi["shares"])).index(wildcards.share)
        for key in ("shares", "weight_decay"):
            semi[key] = [semi[key][number]]
        if "lists" in one:
            one["lists"] = {
                share: file
                for share, file in one["lists"].items()
                if share == wildcards.share
            }
        return as_settings(used)

    return as_json


def trained(file):
    """A file of every model that is trained to be evaluated."""
    return unique(
        f"{found(MODELS[model], v)}/{file}"
        for model in ("stage1", "orl")
        for v in RUNS
        if model in RUNS[v].measure
    )


def annotations():
    """The COCO files of data.annotations, which are for that layout alone."""
    files = RUN.data.annotations.values() if RUN.data.layout == "coco" else ()
    return [str(Path(ROOT, file)) for file in files]


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


def mask_root(v=""):
    """Folder of the photos with masks of detection and segmentation, or None where it is not configured."""
    root = RUNS[v].downstream.detection.root
    return ROOT if root is None and SCENES else root


def mask_files(wildcards):
    """The annotations of detection and segmentation."""
    section = RUNS[wildcards.v].downstream.detection
    if section.root is None:  # the generated scenes: their folder is the input
        return []
    return [
        f"{section.root}/annotations/instances_{split}.json"
        for split in (section.train, section.test)
    ]


def set_root(name, v=""):
    """Folder of a labelled set, or None where it is not configured."""
    if name not in RUNS[v].downstream.sets:  # another variant's
        return None
    root = RUNS[v].downstream.sets[name].root
    return f"{ROOT}/objects" if root is None and SCENES else root


def set_files(wildcards):
    """The list files of a labelled set, where it has any."""
    one = RUNS[wildcards.v].downstream.sets[wildcards.set]
    root = set_root(wildcards.set, wildcards.v)
    files = [Path(root, part) for part in (one.train, one.val)]
    return [str(file) for file in files if file.is_file()]


def subset_list(wildcards):
    """The list that says which labels of a set are used, where one is given."""
    return (
        RUNS[wildcards.v].downstream.sets[wildcards.set].lists.get(wildcards.share, [])
    )


def lowshot_lists(wildcards):
    """The official samples of voc07_lowshot, where they are given."""
    folder = RUNS[wildcards.v].downstream.voc07_lowshot.lists
    return sorted(map(str, Path(folder).glob("*_sample*_k*.npy"))) if folder else []


def models_of(v):
    """The models of a run to evaluate."""
    return [
        *(model for model in RUNS[v].measure if model in MODELS),
        *(["supervised"] if RUNS[v].supervised else []),
    ]


def tasks_of(v):
    """The tasks of a run whose data are configured; those on labelled sets as TASK.SET."""
    downstream = RUNS[v].downstream
    tasks = ["voc07_svm", "voc07_lowshot"] if labels(v) else []
    tasks += [
        f"{task}.{name}"
        for name, one in downstream.sets.items()
        if set_root(name, v)
        for task in one.tasks
    ]
    tasks += ["detection", "segmentation"] if mask_root(v) else []
    tasks += ["localization"] if objects() else []
    return [task for task in tasks if wants(task.partition(".")[0], v)]


def wants(task, v=""):
    """Whether a task is to be done where its data are given."""
    return bool({"all", task} & set(RUNS[v].downstream.tasks))


def scores():
    """Every downstream result of every model."""
    return unique(
        found(f"{task} {MODELS[model]}", v)
        for v in RUNS
        for task in tasks_of(v)
        for model in models_of(v)
    )


def semi_grid(name, model, v):
    """The results of the grid of semi, by share of the labels as text."""
    semi = RUNS[v].downstream.semi
    folder = found(f"semi.{name} {MODELS[model]}", v).removesuffix(".json")
    return {
        str(share): [
            f"{folder}/{share}-lr{lr}-x{head}.json"
            for lr in semi.lr
            for head in semi.head
        ]
        for share in semi.shares
    }


def semi_runs(wildcards):
    """All results of semi for a model: the grid, and the further runs of its best."""
    grid = semi_grid(wildcards.set, wildcards.model, wildcards.v)
    runs = range(1, RUNS[wildcards.v].downstream.semi.runs)
    return [
        file
        for share, files in grid.items()
        for file in (
            *files,
            *(f"{Path(files[0]).parent}/{share}-run{run}.json" for run in runs),
        )
    ]


def objects():
    """What holds the boxes of the photos' objects: the scenes' own file, data.objects, or else data.annotations."""
    if SCENES:
        return [f"{ROOT}/annotations/instances_train2017.json"]
    given = [str(Path(ROOT, part)) for part in RUN.data.objects]
    return given or [file for file in annotations() if holds_boxes(file)]


@cache
def object_files():
    """The inputs of what reads the objects; of a folder its newest file, too: correcting one leaves its time alone."""
    folders = [Path(path) for path in objects() if Path(path).is_dir()]
    inside = (list(folder.glob("*.xml")) for folder in folders)
    newest = [max(files, key=os.path.getmtime) for files in inside if files]
    return ROOT if SCENES else objects() + list(map(str, newest))


@cache
def holds_boxes(file):
    """Whether a COCO file does more than list photos; found without reading all of it."""
    try:
        with open(file) as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as data:
            return data.find(b'"bbox"') >= 0
    except (OSError, ValueError):  # missing or empty: the manifest's rule says so
        return False


def measured(stage, task=None):
    """Results about stage 2's boxes or pairs, of every run that wants them, where there are objects to compare with."""
    return unique(
        found(stage, v)
        for v in RUNS
        if "pairs" in RUNS[v].measure and objects() and (task is None or wants(task, v))
    )


def seen():
    """The attention maps of the run itself, where they are wanted."""
    return [found("attention")] if wants("attention") and models_of("") else []


def stage2(v, *stages):
    """The files of stage 2 by name, where run `v` makes them."""
    made = {"pairs", "orl"} & set(RUNS[v].measure)
    return {stage: found(stage, v) for stage in stages} if made else {}


def looked_at(wildcards):
    """The inputs of the attention maps of a run, by name."""
    v = wildcards.v
    return {
        "manifest": found("manifest", v),
        "backbones": [
            f"{found(MODELS[model], v)}/backbone.safetensors" for model in models_of(v)
        ],
        **stage2(v, "proposals", "correspondences"),
    }


def exports():
    """The trained backbones in the formats of other frameworks."""
    return unique(
        f"{found(MODELS[model], v)}/{form}{settings.EXPORTS[form]}"
        for v in RUNS
        for form in RUNS[v].export
        for model in ("stage1", "orl")
        if model in RUNS[v].measure
    )


for name in RUNS:
    if given(name) and not Path(given(name)).is_file():
        stop(
            f"config: stage1.weights: {given(name)!r} is no file; name a file of weights."
        )
    supervised = RUNS[name].supervised
    if supervised and not Path(supervised).is_file():
        stop(f"config: supervised: {supervised!r} is no file; name a file of weights.")
    roots = {
        "voc07_svm.root": RUNS[name].downstream.voc07_svm.root,
        "detection.root": RUNS[name].downstream.detection.root,
        "voc07_lowshot.lists": RUNS[name].downstream.voc07_lowshot.lists,
    }
    for one, labelled in RUNS[name].downstream.sets.items():
        roots[f"sets.{one}.root"] = labelled.root
        files = [*labelled.lists.values()]
        if labelled.root:
            files += [
                Path(labelled.root, part) for part in (labelled.train, labelled.val)
            ]
        for file in files:
            if Path(labelled.root or ".").is_dir() and not Path(file).exists():
                stop(
                    f"config: downstream.sets.{one}: {str(file)!r} is not there; correct train, val or lists."
                )
    for key, root in roots.items():
        if root and not FETCHES and not Path(root).is_dir():
            stop(
                f"config: downstream.{key}: {root!r} is no folder; correct it or fetch what belongs there."
            )
for part in RUN.data.objects:
    if not SCENES and not FETCHES and not Path(ROOT, part).exists():
        stop(
            f"config: data.objects: {str(Path(ROOT, part))!r} is not there; correct it."
        )
if "fetch_coco" in FETCHES and RUN.data.layout != "coco":
    stop(
        "config: data.layout must be coco, and data.root a folder, to fetch COCO into."
    )
root = str(RUN.downstream.voc07_svm.root)
if "fetch_voc2007" in FETCHES and not root.endswith("VOCdevkit/VOC2007"):
    stop(
        f"config: downstream.voc07_svm.root: {root!r} must end in VOCdevkit/VOC2007 to be fetched."
    )

# What is left out for want of data is said once.
WANTED = set(RUN.downstream.tasks)
if not any(map(labels, RUNS)) and WANTED & {"all", "voc07_svm", "voc07_lowshot"}:
    print(
        "orl: voc07_svm and voc07_lowshot are left out: downstream.voc07_svm.root is not given",
        file=sys.stderr,
    )
if not SETS and WANTED & {"all", "linear", "semi", "knn"}:
    print(
        "orl: linear, semi and knn are left out: downstream.sets is not given",
        file=sys.stderr,
    )
if not any(map(mask_root, RUNS)) and WANTED & {"all", "detection", "segmentation"}:
    print(
        "orl: detection and segmentation are left out: downstream.detection.root is not given",
        file=sys.stderr,
    )
if not objects() and WANTED & {"all", "localization"}:
    print(
        "orl: localization is left out: neither data.objects nor data.annotations has the boxes of the photos' objects",
        file=sys.stderr,
    )
for name in SETS:
    if not any(set_root(name, v) for v in RUNS):
        print(
            f"orl: the labelled set {name} is left out: downstream.sets.{name}.root is not given",
            file=sys.stderr,
        )


wildcard_constraints:
    v=r"(-[A-Za-z0-9_]+)?(\.seed\d+)?",
    model="random|stage1|orl|supervised",
    set="[A-Za-z0-9][A-Za-z0-9_-]*",
    share=r"[0-9.e-]+",
    lr=r"[0-9.e+-]+",
    head=r"[0-9.e+-]+",
    number=r"\d+",
    shard=r"\d{4}-of-\d{4}",
    merged="embeddings|proposals|correspondences",
    trained="stage1|orl",
    format="|".join(settings.EXPORTS),


onstart:
    from orl import artifacts

    HELD.update(
        {
            place(stage, owner(stage, v)): digest(stage, v)
            for stage in UPSTREAM
            for v in RUNS
        }
    )
    try:
        artifacts.write_json(LEDGER, HELD)
    except OSError as error:
        stop(error)
