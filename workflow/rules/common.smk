# The checked config, where each stage's files lie, and the final outputs.
import hashlib
import json
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path

from orl import InputError
from orl import config as settings
from orl.places import MODELS, Places, as_argument, unique

# As `orl` does: nothing that all users could write to.
os.umask(os.umask(0o002) | 0o002)


def stop(sentence):
    """End before any work: one sentence, exit 2."""
    print(f"orl: {sentence}", file=sys.stderr)
    sys.exit(2)


config = settings.merge(config, settings.typed(workflow.config_settings.config))
try:
    RUN = settings.parse(config, "config")
    RUNS = settings.runs(config)
except InputError as error:
    stop(error)


def plain(path, key):
    """A path that `key` of the config leads to, as text; ends where Snakemake would take it for another."""
    path = str(path)
    if set("{}\n") & set(path):
        stop(
            f"config: {key}: {path!r} has a brace or a line break in it, which Snakemake does not take in the name of "
            f"a file; rename it or name a link to it."
        )
    return path


RESULTS = f"results/{RUN.name}"
for folder in map(Path, ("results", RESULTS)):
    if os.path.lexists(folder) and not folder.is_dir():
        stop(f"{folder}: is no folder, so nothing can be written there; move it away.")
COMPUTE = RUN.compute
# Missing or damaged, it is made anew: all it does is to save work.
LEDGER = Path(RESULTS, "variants.json")
try:
    HELD = json.loads(LEDGER.read_text())
    if {type(value) for value in HELD.values()} - {str}:
        raise ValueError
except (OSError, ValueError, AttributeError, RecursionError):
    HELD = {}

# What is made from what, and where it lies
PLACES = Places(RUNS, RESULTS, HELD)
SETS = PLACES.sets
given, found = PLACES.given, PLACES.found
objects, labels, mask_root, set_root = (
    PLACES.objects,
    PLACES.labels,
    PLACES.mask_root,
    PLACES.set_root,
)
annotations, models_of, wants = PLACES.annotations, PLACES.models_of, PLACES.wants
ROOT, SCENES = PLACES.root, PLACES.scenes
if not ROOT:
    stop("config: data.root is not given; set it to the folder of your photos.")
# Data that are about to be fetched need not be there.
FETCHES = {"fetch_coco", "fetch_voc2007"} & set(sys.argv)
if not SCENES and not FETCHES and not Path(ROOT).is_dir():
    stop(
        f"config: data.root: {ROOT!r} is no folder; set it to the folder of your photos."
    )

SHARED = ("embeddings", "proposals", "rois")  # with stage 1, where runs share results

# Rules run `orl`: the one installed beside this Python, activated or not. A prefix replaces Snakemake's own, `set`.
# A signal to all processes of a job, as a cluster sends it, must leave shell and log standing until `orl` has saved.
BIN = shlex.quote(str(Path(sys.executable).parent))
BIN = BIN.replace("{", "{{").replace("}", "}}")  # what is meant as it stands
shell.prefix(
    f'set -euo pipefail; export PATH={BIN}:"$PATH"; trap : TERM; '
    'tee() {{ trap "" INT TERM; exec tee "$@"; }}; '
)

# What several runs share: a folder where Snakemake keeps results by a hash of the shell lines and `params` of a rule and
# of those before it. So paths that have the run's name stay out of the `params` of rules with `cache`, and before them.
CACHE = None
if workflow.workflow_settings.cache is not None:
    CACHE = os.environ.get("SNAKEMAKE_OUTPUT_CACHE")
if CACHE:
    if not os.path.isabs(CACHE) or not os.access(CACHE, os.W_OK | os.X_OK):
        stop(
            f"SNAKEMAKE_OUTPUT_CACHE: {CACHE!r} is no folder that you can write to, by its whole path; make it first."
        )
    if os.stat(CACHE).st_mode & 0o007:
        stop(
            f"SNAKEMAKE_OUTPUT_CACHE: {CACHE!r} is open to all users, and Snakemake lets those who reach a file in it "
            f"change it; `chmod o= {shlex.quote(CACHE)}` closes it."
        )


def count_file(stage, v):
    """The file beside shared results that says into how many shards a stage with these settings is cut."""
    key = json.dumps([PLACES.digest(stage, v), RUN.data.root]).encode()
    return Path(CACHE, f"{hashlib.sha256(key).hexdigest()}.shards")


def shared_count(stage, v):
    """The number of shards that another run made, if they are shared: only equal shards are found again."""
    try:
        count = count_file(stage, v).read_text() if CACHE and stage in SHARED else ""
    except OSError:
        return None
    return int(count) if re.fullmatch(r"[1-9]\d{0,2}|1000", count) else None


def shards(stage, v=""):
    """The files of the shards of a stage, as many as shared ones are."""
    return PLACES.shards(stage, v, shared_count(stage, v))


def where(stages, *file):
    """The places of stages of runs, or of a file in the folder of each."""
    return unique(str(Path(found(stage, v), *file)) for stage, v in stages)


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
        of_set = f"{stage}.{wildcards.set}"
        return as_settings(
            settings.used_by_share(RUNS[wildcards.v], of_set, wildcards.share)
        )

    return as_json


@cache
def content(file, changed):
    """Hash of a file as it was when last changed."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def photos(wildcards, input):
    """Params function: hash of the manifest, which shared results must go by.

    To Snakemake, they go by what makes the manifest, which is the same when photos were added or replaced. (Params that
    come from inputs do not make a stage rerun.)
    """
    file = input.manifest
    return content(file, os.stat(file).st_mtime_ns) if file else ""


def shown(file, caption, category, patterns=(), **labels):
    """An output that `snakemake --report` shows; the caption is a file of workflow/report."""
    return report(
        file,
        caption=f"../report/{caption}.rst",
        category=category,
        labels=labels,
        patterns=list(patterns),
    )


def trained(file):
    """A file of every model that is trained to be evaluated."""
    return where(PLACES.trained(), file)


def label_files(v):
    """The lists of labels of voc07_svm, in either layout: corrected labels are evaluated again."""
    root = RUNS[v].downstream.voc07_svm.root
    if root is None:  # the generated scenes: their folder is the input
        return []
    lists = [
        *Path(root).glob("annotations/instances_*.json"),
        *Path(root).glob("ImageSets/Main/*.txt"),
    ]
    return sorted(plain(file, "downstream.voc07_svm.root") for file in lists)


def mask_files(wildcards):
    """The annotations of detection and segmentation."""
    section = RUNS[wildcards.v].downstream.detection
    if section.root is None:  # the generated scenes: their folder is the input
        return []
    return [
        f"{section.root}/annotations/instances_{split}.json"
        for split in (section.train, section.test)
    ]


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
    files = Path(folder).glob("*_sample*_k*.npy") if folder else ()
    return sorted(plain(file, "downstream.voc07_lowshot.lists") for file in files)


def scores():
    """Every downstream result of every model."""
    return where(PLACES.scores())


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


@cache
def object_files():
    """The inputs of what reads the objects; of a folder its newest file, too: correcting one leaves its time alone."""
    folders = [Path(path) for path in objects() if Path(path).is_dir()]
    inside = (list(folder.glob("*.xml")) for folder in folders)
    newest = [max(files, key=os.path.getmtime) for files in inside if files]
    newest = [plain(path, "data.objects") for path in newest]
    return ROOT if SCENES else objects() + newest


def holders(_):
    """Params function: what `objects` names, as arguments."""
    return list(map(as_argument, objects()))


def measured(stage, task=None):
    """Results about stage 2's boxes or pairs, of every run that wants them, where there are objects to compare with."""
    return where(PLACES.measured(stage, task))


def seen():
    """The attention maps of the run itself, where they are wanted."""
    return where(PLACES.seen())


def stage2(v, *stages):
    """The files of stage 2 by name, where run `v` makes them."""
    return {stage: found(stage, v) for stage, v in PLACES.stage2(v, *stages)}


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


for file in (*RUN.data.annotations.values(), *RUN.data.objects):
    plain(file, "data.annotations and data.objects")
plain(RUN.data.root, "data.root")
for name in RUNS:
    plain(given(name), "stage1.weights")
    plain(RUNS[name].supervised, "supervised")
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
            plain(file, f"downstream.sets.{one}")
            if Path(labelled.root or ".").is_dir() and not Path(file).exists():
                stop(
                    f"config: downstream.sets.{one}: {str(file)!r} is not there; correct train, val or lists."
                )
    for key, root in roots.items():
        plain(root, f"downstream.{key}")
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

    HELD.update(PLACES.ledger())
    try:
        artifacts.write_json(LEDGER, HELD)
        artifacts.write_json(Path(RESULTS, "config.json"), config)
    except OSError as error:
        stop(error)
    for stage in SHARED if CACHE else ():
        for v in RUNS:
            if not count_file(stage, v).exists():
                artifacts.write_text(
                    count_file(stage, v), str(len(shards(stage, v)))
                )
