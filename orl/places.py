"""What a run makes, from what, and where it lies: for the workflow and for `orl doctor`.

A stage is named as in PATHS; a task of a model is TASK STAGE, as `features stage3`, on a labelled set TASK.SET STAGE. A
run `v` is a key of `config.runs`: what the names of its files and folders end in. Stage 1 of a later round is stage 3
of the round before.
"""

import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Mapping
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TypeVar

from orl.config import Config, round_before, round_of, used

Item = TypeVar("Item", bound=Hashable)
Made = tuple[str, str]  # a stage and the run that it is of

MODELS = {"random": "random", "stage1": "stage1", "orl": "stage3", "supervised": "supervised"}  # name -> stage
# What each stage is made from, and its file or folder
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


def unique(items: Iterable[Item]) -> list[Item]:
    """Each once, in the order of their first."""
    return list(dict.fromkeys(items))


def as_argument(path: str) -> str:
    """A path as a command takes it: one that begins with a dash would be an option."""
    return f"./{path}" if path.startswith("-") else path


class Places:
    """The stages of `runs` (see `config.runs`) under the folder `results`, relative to where the run is started.

    `held`: the digests with which folders were last begun (variants.json); the workflow adds to it.
    """

    def __init__(self, runs: Mapping[str, Config], results: str, held: dict[str, str]) -> None:
        self.runs, self.results, self.held = runs, results, held
        self.run = runs[""]
        self.scenes = self.run.data.layout == "scenes"
        self.root = f"{results}/scenes" if self.scenes else as_argument(self.run.data.root or "")
        self.sets = unique(name for run in runs.values() for name in run.downstream.sets)
        self.upstream: dict[str, tuple[str, ...]] = dict(UPSTREAM)
        self.paths = dict(PATHS)
        self._digests: dict[Made, str] = {}
        self._owners: dict[Made, str] = {}
        for name in self.sets:
            self.upstream[f"subset.{name}"] = ()
            self.paths[f"subset.{name}"] = f"downstream/subset{{v}}/{name}"
        for model in MODELS.values():
            # TASK MODEL or TASK.SET MODEL: upstream, and its file among the model's results
            results_of = {
                "features": (model, "features.h5"),
                "voc07_svm": (f"features {model}", "voc07_svm.json"),
                "voc07_lowshot": (f"features {model}", "voc07_lowshot.json"),
                "detection": (model, "detection.json"),
                "segmentation": (model, "segmentation.json"),
                "localization": (model, "localization.json"),
            }
            for name in self.sets:
                results_of |= {
                    f"set_features.{name}": (model, f"{name}.features.h5"),
                    f"knn.{name}": (f"set_features.{name} {model}", f"knn.{name}.json"),
                    f"linear.{name}": (model, f"linear.{name}.json"),
                    f"semi.{name}": (model, f"semi.{name}.json"),
                }
            for task, (upstream, file) in results_of.items():
                self.upstream[f"{task} {model}"] = (upstream,)
                self.paths[f"{task} {model}"] = f"{PATHS[model]}/{file}".replace("models", "downstream")
            for name in self.sets:
                self.upstream[f"semi.{name} {model}"] += (f"subset.{name}",)
            self.upstream[f"localization {model}"] += ("manifest",)

    # Where a stage lies

    def given(self, v: str) -> str | None:
        """The file of weights that a run uses instead of training stage 1, or None."""
        return None if round_before(v) is not None else self.runs[v].stage1.weights

    def digest(self, stage: str, v: str) -> str:
        """Hash of the settings that decide a stage's result, its own and those of everything upstream."""
        before = round_before(v) if stage == "stage1" else None
        if before is not None:
            return self.digest("stage3", before)
        if (stage, v) not in self._digests:
            self._digests[stage, v] = self._digest(stage, v)
        return self._digests[stage, v]

    def _digest(self, stage: str, v: str) -> str:
        task = stage.split()[0]
        if task.partition(".")[2] and task.partition(".")[2] not in self.runs[v].downstream.sets:
            return ""  # another variant's
        whole: list = [used(self.runs[v], task)]
        if not (stage == "stage1" and self.given(v)):  # given weights need no photos
            whole += [self.digest(upstream, v) for upstream in self.upstream[stage]]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def has(self, stage: str, v: str) -> bool:
        """Whether a run has such a stage: its labelled set, or its weights, are configured."""
        needs_weights = stage.split()[-1] == "supervised" and not self.runs[v].supervised
        return bool(self.digest(stage, v)) and not needs_weights

    def made(self, stage: str, v: str) -> Made:
        """The stage that run `v` takes for a stage, and the run whose folder holds it.

        The first with equal settings for the stage and everything upstream of it; among several, one whose folder was
        last made with these settings, so that going back to settings which another variant holds finds its results.
        """
        before = round_before(v) if stage == "stage1" else None
        if before is not None:
            return self.made("stage3", before)
        if (stage, v) not in self._owners:
            self._owners[stage, v] = self._owner(stage, v)
        return stage, self._owners[stage, v]

    def _owner(self, stage: str, v: str) -> str:
        wanted = self.digest(stage, v)
        equal = [other for other in self.runs if self.digest(stage, other) == wanted]
        return next((other for other in equal if self.held.get(self.place(stage, other)) == wanted), equal[0])

    def place(self, stage: str, v: str) -> str:
        """File or folder of a stage in a run's own folder, relative to the results."""
        return self.paths[stage].format(v=v)

    def found(self, stage: str, v: str = "") -> str:
        """File or folder where a stage of a run lies."""
        return f"{self.results}/{self.place(*self.made(stage, v))}"

    def ledger(self) -> dict[str, str]:
        """What `held` is once this run is begun."""
        every = ((stage, v) for stage in self.upstream for v in self.runs)
        return {**self.held, **{self.place(*self.made(*one)): self.digest(*one) for one in every}}

    def shards(self, stage: str, v: str = "", count: int | None = None) -> list[str]:
        """The files of the shards of a stage.

        `count` of them, or as many as compute.shards says, unless a complete set with these settings is there: another
        count reruns nothing.
        """
        folder = Path(self.found(stage, v).removesuffix(".h5"))

        def files(count: int) -> list[str]:
            return [f"{folder}/{number:04}-of-{count:04}.h5" for number in range(1, count + 1)]

        counts = [count or getattr(self.run.compute.shards, stage)]
        made = self.place(*self.made(stage, v))
        if self.held.get(made) == self.digest(stage, v):
            counts += sorted(int(file.stem[-4:]) for file in folder.glob("0001-of-????.h5"))
        complete = (count for count in counts if all(map(os.path.exists, files(count))))
        return files(next(complete, counts[0]))

    def stages(self) -> list[Made]:
        """Every stage of every run, by the run whose folder holds it, in the order in which they are made."""
        every = [(stage, v) for stage in self.upstream for v in self.runs]
        own = [(stage, v) for stage, v in every if self.has(stage, v) and self.made(stage, v) == (stage, v)]
        return sorted(own, key=lambda made: round_of(made[1]))

    # Which data a run has

    def annotations(self) -> list[str]:
        """The COCO files of data.annotations, which are for that layout alone."""
        files = self.run.data.annotations.values() if self.run.data.layout == "coco" else ()
        return [str(Path(self.root, file)) for file in files]

    def objects(self) -> list[str]:
        """What holds the boxes of the photos' objects: the scenes' own file, data.objects, or else data.annotations."""
        return self._objects

    @cached_property
    def _objects(self) -> list[str]:
        if self.scenes:
            return [f"{self.root}/annotations/instances_train2017.json"]
        given = [str(Path(self.root, part)) for part in self.run.data.objects]
        return given or [file for file in self.annotations() if holds_boxes(file)]

    def labels(self, v: str = "") -> str | None:
        """Folder of the labelled photos of voc07_svm, or None where it is not configured."""
        section = self.runs[v].downstream.voc07_svm
        if section.root is None and self.scenes:
            return f"{self.root}/VOCdevkit/VOC2007" if section.layout == "voc" else self.root
        return section.root and as_argument(section.root)

    def mask_root(self, v: str = "") -> str | None:
        """Folder of the photos with masks of detection and segmentation, or None where it is not configured."""
        root = self.runs[v].downstream.detection.root
        return self.root if root is None and self.scenes else root and as_argument(root)

    def set_root(self, name: str, v: str = "") -> str | None:
        """Folder of a labelled set, or None where it is not configured."""
        if name not in self.runs[v].downstream.sets:  # another variant's
            return None
        root = self.runs[v].downstream.sets[name].root
        return f"{self.root}/objects" if root is None and self.scenes else root and as_argument(root)

    # What a run is to make

    def models_of(self, v: str) -> list[str]:
        """The models of a run to evaluate, by name."""
        run = self.runs[v]
        return [*(model for model in run.measure if model in MODELS), *(["supervised"] if run.supervised else [])]

    def tasks_of(self, v: str) -> list[str]:
        """The tasks of a run whose data are configured; those on labelled sets as TASK.SET."""
        tasks = ["voc07_svm", "voc07_lowshot"] if self.labels(v) else []
        tasks += [
            f"{task}.{name}"
            for name, one in self.runs[v].downstream.sets.items()
            if self.set_root(name, v)
            for task in one.tasks
        ]
        tasks += ["detection", "segmentation"] if self.mask_root(v) else []
        tasks += ["localization"] if self.objects() else []
        return [task for task in tasks if self.wants(task.partition(".")[0], v)]

    def wants(self, task: str, v: str = "") -> bool:
        """Whether a task is to be done where its data are given."""
        return bool({"all", task} & set(self.runs[v].downstream.tasks))

    def trained(self) -> list[Made]:
        """Every model that is trained to be evaluated."""
        return [
            (MODELS[model], v) for model in ("stage1", "orl") for v, run in self.runs.items() if model in run.measure
        ]

    def scores(self) -> list[Made]:
        """Every downstream result of every model."""
        return [
            (f"{task} {MODELS[model]}", v)
            for v in self.runs
            for task in self.tasks_of(v)
            for model in self.models_of(v)
        ]

    def told(self, stage: str, v: str) -> list[Made]:
        """The results that the card of a model in the folder of run `v` tells: its own, stage 1's, random weights'."""
        users = [u for one, u in self.trained() if self.made(one, u) == (stage, v)]
        return [
            (f"{task} {MODELS[model]}", u)
            for u in users[:1]  # others may evaluate it otherwise
            for task in self.tasks_of(u)
            for model in self.models_of(u)
            if MODELS[model] in ("random", "stage1", stage)
        ]

    def measured(self, stage: str, task: str | None = None) -> list[Made]:
        """Results about stage 2's boxes or pairs, where there are objects to compare with."""
        there = self.objects()
        return [
            (stage, v)
            for v, run in self.runs.items()
            if "pairs" in run.measure and there and (task is None or self.wants(task, v))
        ]

    def seen(self) -> list[Made]:
        """The attention maps of the run itself, where they are wanted."""
        return [("attention", "")] if self.wants("attention") and self.models_of("") else []

    def asked(self) -> list[Made]:
        """What Snakemake makes where it is not there; anything else only where this needs it."""
        page = self.stage2("", "proposals", "neighbors", "correspondences")
        results = [
            *self.measured("proposals_recall"),
            *self.measured("pair_precision"),
            *self.measured("pair_boxes", "localization"),
            *self.seen(),
        ]
        return [("manifest", ""), *self.trained(), *page, *self.scores(), *results]

    @cached_property
    def needed(self) -> set[Made]:
        """`asked` and all that this is made from, by the run whose folder holds it."""
        found: set[Made] = set()
        left = self.asked()
        while left:
            stage, v = left.pop()
            made = self.made(stage, v)
            if made in found:
                continue
            found.add(made)
            left += [(upstream, made[1]) for upstream in self.made_from(*made)]
        return found

    def made_of(self, stage: str, v: str) -> list[Made]:
        """What of `needed` is made from a stage in the folder of run `v`."""
        return self._made_of.get((stage, v), [])

    @cached_property
    def _made_of(self) -> dict[Made, list[Made]]:
        found: dict[Made, list[Made]] = {}
        for stage, v in sorted(self.needed):
            for upstream in self.made_from(stage, v):
                found.setdefault(self.made(upstream, v), []).append((stage, v))
        return found

    def made_from(self, stage: str, v: str) -> list[str]:
        """The stages of a run that a stage of it is made from: of what is measured, and with given weights, fewer."""
        if stage == "stage1" and self.given(v):
            return []
        if stage == "attention":
            pairs = [made for made, _ in self.stage2(v, "proposals", "correspondences")]
            return ["manifest", *(MODELS[model] for model in self.models_of(v)), *pairs]
        return list(self.upstream[stage])

    def stage2(self, v: str, *stages: str) -> list[Made]:
        """Those of stage 2, where run `v` makes it."""
        return [(stage, v) for stage in stages] if {"pairs", "orl"} & set(self.runs[v].measure) else []


def holds_boxes(file: str | os.PathLike) -> bool:
    """Whether a COCO file does more than list photos; found without reading all of it."""
    try:
        with open(file) as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as data:
            return data.find(b'"bbox"') >= 0
    except (OSError, ValueError):  # missing or empty: the manifest's rule says so
        return False
