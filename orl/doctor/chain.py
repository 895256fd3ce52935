"""What each file of a run should be: made with which settings, from which files, and so with which fingerprint."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orl import InputError, artifacts, config
from orl.config import Config, flat, used
from orl.places import MODELS, Places

# What a file calls its inputs, and the stages that make them
INPUTS: dict[str, dict[str, str]] = {
    "random": {},
    "stage1": {"manifest": "manifest"},
    "embeddings": {"manifest": "manifest", "model": "stage1"},
    "proposals": {"manifest": "manifest"},
    "neighbors": {"manifest": "manifest", "embeddings": "embeddings"},
    "rois": {"manifest": "manifest", "proposals": "proposals", "backbone": "stage1"},
    "correspondences": {"neighbors": "neighbors", "proposals": "proposals", "rois": "rois"},
    "stage3": {"manifest": "manifest", "proposals": "proposals", "correspondences": "correspondences"},
}
SCHEMAS = {
    **dict.fromkeys(MODELS.values(), artifacts.MODEL),
    "embeddings": artifacts.EMBEDDINGS,
    "proposals": artifacts.PROPOSALS,
    "neighbors": artifacts.NEIGHBORS,
    "rois": artifacts.ROIS,
    "correspondences": artifacts.CORRESPONDENCES,
    "features": artifacts.FEATURES,
    "set_features": artifacts.CLASS_FEATURES,
}
MERGED = ("embeddings", "proposals", "correspondences")  # stages whose shards are merged
SHOWN = 3  # settings that differ, of which more are only counted


class Chain:
    """The run in the folder `results`, seen from the folder in which it was started, which is the current one.

    `files`: the config files that a person names to go on with it.
    """

    def __init__(self, results: str, raw: dict[str, Any], files: Sequence[str]) -> None:
        try:
            held = json.loads(Path(results, "variants.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = {}
        self.results, self.raw, self.config_files = results, raw, files
        self.places = Places(config.runs(raw), results, held)
        self._fingerprints: dict[str, str | None] = {}

    def config(self, v: str) -> Config:
        """The settings of a run."""
        return self.places.runs[v]

    def files(self, stage: str, v: str) -> list[str]:
        """The files of a stage that later stages read; the first has its fingerprint."""
        place = self.places.found(stage, v)
        if stage in MODELS.values():
            return [f"{place}/backbone.safetensors", f"{place}/model.safetensors"]
        return self.places.shards(stage, v) if stage == "rois" else [place]

    def exists(self, stage: str, v: str) -> bool:
        """Whether anything of a stage is there."""
        return any(map(os.path.exists, self.files(stage, v)))

    def weights(self, stage: str, v: str) -> str | None:
        """The file of weights that a model is taken from instead of trained."""
        return {"stage1": self.places.given(v), "supervised": self.config(v).supervised}.get(stage)

    def inputs(self, stage: str, v: str) -> dict[str, str | None]:
        """Fingerprints of what a stage is to be made from now, by the names that a file calls them; None: unknown."""
        weights = self.weights(stage, v)
        if weights:  # of their bytes, even where they are an artifact of another run
            return {"weights": self.of_file(weights, as_bytes=True)}
        if stage.startswith(("features ", "set_features.")):
            return {"weights": self.fingerprint(stage.split()[1], v)}
        return {name: self.fingerprint(made, v) for name, made in INPUTS.get(stage, {}).items()}

    def fingerprint(self, stage: str, v: str) -> str | None:
        """That of a stage's file; of one that was removed, what these settings give. None where it is damaged."""
        file = self.files(stage, v)[0]
        return self.of_file(file) if os.path.exists(file) else self.stamp(stage, v)

    def stamp(self, stage: str, v: str) -> str | None:
        """The fingerprint that a stage gets when it is made with these settings from what is there now, if known."""
        schema = SCHEMAS.get(stage)
        inputs = self.inputs(stage, v) if schema else {}
        if schema is None or None in inputs.values():
            return None
        known = {name: value for name, value in inputs.items() if value is not None}
        return artifacts.stamp(schema, used(self.config(v), stage), known)["fingerprint"]

    def of_file(self, path: str, as_bytes: bool = False) -> str | None:
        """Fingerprint of a file, or None where it cannot be read."""
        if path not in self._fingerprints:
            try:
                if as_bytes:
                    with open(path, "rb") as file:
                        self._fingerprints[path] = hashlib.file_digest(file, "sha256").hexdigest()
                else:
                    self._fingerprints[path] = artifacts.fingerprint(path)
            except (InputError, OSError):
                self._fingerprints[path] = None
        return self._fingerprints[path]

    def reasons(self, stage: str, v: str, found: dict[str, str]) -> list[str]:
        """Why a file with these attributes is not the one that would be made now."""
        reasons = differences(json.loads(found["settings"]), used(self.config(v), stage.split()[0]))
        inputs = json.loads(found["inputs"])
        for name, expected in self.inputs(stage, v).items():
            if expected is not None and inputs.get(name) != expected:
                reasons.append(self.other(self.source(stage, v, name)))
        return reasons

    def source(self, stage: str, v: str, name: str) -> str:
        """The file that a stage calls its input `name`."""
        made = stage.split()[1] if " " in stage else INPUTS.get(stage, {}).get(name)
        weights = self.weights(stage, v)
        if weights or made is None:
            return weights or name
        return self.files(made, v)[0] if made != "rois" else self.places.found(made, v)

    def other(self, file: str) -> str:
        """That a file was made from another `file` than the one there."""
        there = "than the one there" if os.path.exists(file) else "than these settings give"
        return f"made from another {self.short(file)} {there}"

    def short(self, path: str | os.PathLike) -> str:
        """A path relative to the results, where it is in them."""
        return os.fspath(path).removeprefix(f"{self.results}/")


def differences(found: dict, wanted: dict) -> list[str]:
    """The settings with which a file was made that are not those of the config, with both values."""
    have, want = flat(found), flat(wanted)
    keys = [key for key in sorted({*have, *want}) if have.get(key, ...) != want.get(key, ...)]

    def value(values: dict[str, Any], key: str) -> str:
        return json.dumps(values[key]) if key in values else "not given"

    told = [
        f"result version {value(have, key)}, this orl makes {value(want, key)}"
        if key == "version"
        else f"{key}: {value(have, key)}, config {value(want, key)}"
        for key in keys
    ]
    return told[:SHOWN] + ([f"and {len(told) - SHOWN} settings more"] if len(told) > SHOWN else [])


def open_run(folder: str, configs: Sequence[str]) -> tuple[str, Chain]:
    """The folder in which a run was started, and the run, read with the config of its last start, or of these files.

    The current folder must be the former when the latter is used. Raises InputError: not a run, no config.
    """
    results = Path(os.path.abspath(folder))
    if not results.is_dir():
        raise InputError(f"{folder}: no such folder; name the results of a run, such as results/scenes.")
    marks = ("variants.json", "config.json", "manifest.csv", "models")
    if len(results.parents) < 2 or not any((results / name).exists() for name in marks):
        raise InputError(f"{folder}: is no run; name a folder such as results/scenes.")
    home, name = results.parents[1], str(results.relative_to(results.parents[1]))
    kept = results / "config.json"
    if not configs and not kept.exists():
        raise InputError(f"{folder}: has no config.json, which a run writes when it starts; give its --configfile.")
    raw: dict[str, Any] = {}
    for file in configs or [str(kept)]:
        found = config.read(file)
        if not isinstance(found, dict):
            raise InputError(f"{file}: must be a mapping of settings, not {type(found).__name__}.")
        raw = config.merge(raw, found)
    given = config.parse(raw, "config")
    if configs and given.name != results.name:
        raise InputError(f"{configs[-1]}: is the config of results/{given.name}, not of {folder}; name one of them.")
    if given.data.layout != "scenes" and not given.data.root:
        raise InputError("config: data.root is not given; set it to the folder of your photos.")
    return str(home), Chain(name, raw, [os.path.relpath(file, home) for file in configs or [str(kept)]])


def rule_of(stage: str) -> str:
    """The workflow's rule that makes a stage; of one whose shards are merged, the shards'."""
    task = re.split(r"[. ]", stage)[0]
    return {"embeddings": "embed", "proposals": "propose", "correspondences": "correspond"}.get(task, task)
