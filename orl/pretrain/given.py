"""Models from given weights: the files that training would have written, of a network trained elsewhere."""

import sys
from pathlib import Path

from torch import nn

from orl import InputError, artifacts
from orl.config import Config, used
from orl.networks import weights
from orl.pretrain.loop import write_model

COLUMNS = ("epoch", "step", "loss", "feature_std", "lr")  # that every metrics.csv has


def write(config: Config, stage: str, output: Path) -> None:
    """Write backbone.safetensors, model.safetensors (the online encoder only) and a metrics.csv without rows.

    The weights are `stage1.weights` or, for the stage "supervised", `supervised`; says on stderr what they were
    recognised as. Raises InputError, having written nothing.
    """
    supervised = stage == "supervised"
    key, path = ("supervised", config.supervised) if supervised else ("stage1.weights", config.stage1.weights)
    if not path:
        raise InputError(f"{key} is not given; name a file of weights.")
    found = weights.read(path)
    embeds = "" if found.encoder.head or supervised else "; embeddings will be its pooled features"
    print(f"{stage}: no training; {path}: {found.recognised}{embeds}", file=sys.stderr)
    stamp = artifacts.stamp(artifacts.MODEL, used(config, stage), {"weights": found.sha256})
    model = nn.Module()
    model.online = found.encoder
    write_model(output, model, stamp)
    artifacts.write_csv(output / "metrics.csv", COLUMNS, [])
