"""The labelled sets of downstream.sets: what every task on them needs."""

import os
from typing import Any, NamedTuple

import numpy as np

from orl import InputError
from orl.config import Config, LabelledSet
from orl.data.classes import ClassSet, read_sets


class Preset(NamedTuple):
    """What is peculiar to a set: its number of classes, and how linear heads are trained on it (ORL release)."""

    classes: int
    epochs: int
    milestones: tuple[int, ...]
    jitter: tuple[float, float, float, float] | None = None  # of each training photo
    lighting: float = 0.0  # standard deviation of the noise along the colours' principal axes


PRESETS = {
    "imagenet": Preset(1000, 28, (8, 16, 24), (0.4, 0.4, 0.4, 0.0), 0.1),
    "places205": Preset(205, 14, (4, 8, 12)),
    "inaturalist18": Preset(8142, 84, (24, 48, 72)),
}


def settings_of(config: Config, name: str) -> LabelledSet:
    """The settings of the set `name`. Raises InputError."""
    if name not in config.downstream.sets:
        known = ", ".join(config.downstream.sets) or "none"
        raise InputError(f"downstream.sets: has no set {name!r} (found: {known}); add it there.")
    return config.downstream.sets[name]


def preset_of(config: Config, name: str) -> Preset:
    """The preset of the set `name`; imagenet's where it has none."""
    return PRESETS[settings_of(config, name).preset or "imagenet"]


def read(config: Config, name: str, root: str | os.PathLike | None) -> tuple[ClassSet, ClassSet]:
    """Training and test photos of the set `name`; `root`, if given, takes the place of its own. Raises InputError."""
    one = settings_of(config, name)
    root = one.root if root is None else root
    if root is None:
        raise InputError(f"downstream.sets.{name}.root: is not set; name the folder of the labelled photos.")
    return read_sets(root, one.train, one.val, PRESETS[one.preset].classes if one.preset else None)


def chance(val: ClassSet) -> float:
    """Top-1 accuracy in percent of naming the most frequent class of the test photos."""
    return 100 * float(np.bincount(val.label).max()) / len(val)


def describe(config: Config, name: str, train: ClassSet, val: ClassSet, weights: str) -> dict[str, Any]:
    """What a result says of its data; `weights` is their fingerprint."""
    one = settings_of(config, name)
    return {
        "set": name,
        "root": os.fspath(train.root),
        "train": one.train,
        "val": one.val,
        "train_photos": len(train),
        "val_photos": len(val),
        "classes": len(train.classes),
        "fingerprint": f"{train.fingerprint()[:32]}{val.fingerprint()[:32]}",
        "weights_fingerprint": weights,
    }
