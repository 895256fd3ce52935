"""A trained backbone in the files from which other frameworks start."""

import os
import sys
from typing import Any

import torch
from torch import Tensor

from orl import InputError, artifacts
from orl.config import EXPORTS, Format
from orl.networks import backbones, loading

DETECTRON2 = {  # part of our name -> of theirs
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
    **{f"bn{number}.": f"conv{number}.norm." for number in (1, 2, 3)},
    **{f"layer{number}.": f"res{number + 1}." for number in (1, 2, 3, 4)},
}


def detectron2_name(key: str) -> str:
    """Detectron2's name of a tensor of the backbone (its build_resnet_backbone; tools/convert-torchvision-to-d2.py)."""
    name = key if key.startswith("layer") else f"stem.{key}"
    for ours, theirs in DETECTRON2.items():
        name = name.replace(ours, theirs)
    return name


def export(path: str | os.PathLike, format: Format, output: str | os.PathLike) -> None:
    """Write the weights of a backbone.safetensors for another framework, and say on stderr how to load them there.

    `torchvision`: state_dict (torch.save); `timm`: safetensors with the same names; `detectron2`: its own names, under
    "model"; `mmdet`: torchvision's names, under "state_dict". Plain tensors and text: no code is run to read them.
    Raises InputError: no backbone, or an `output` that the framework would not read.
    """
    if not os.fspath(output).endswith(EXPORTS[format]):
        raise InputError(f"{output}: {format} reads weights from {EXPORTS[format]} files; end the name in that.")
    tensors, made = backbones.load(path).state_dict(), artifacts.attributes(path)
    name = made["backbone"]
    if format == "timm":
        artifacts.write_weights(output, tensors, made)
    else:
        # To an open file: by name, torch would write the temporary one's into the archive.
        with artifacts.atomic(output) as temporary, open(temporary, "wb") as file:
            torch.save(_content(tensors, format, name, made["fingerprint"]), file)
    print(f"{output}: {name} for {format}; {loading.how(format, name, os.fspath(output))}", file=sys.stderr)


def _content(tensors: dict[str, Tensor], format: Format, name: str, fingerprint: str) -> dict[str, Any]:
    if format == "detectron2":  # the heuristics find `stem.…` in any model that has it as backbone.bottom_up.stem.…
        return {"model": {detectron2_name(key): value for key, value in tensors.items()}, "matching_heuristics": True}
    if format == "mmdet":
        return {"meta": {"backbone": name, "fingerprint": fingerprint}, "state_dict": dict(tensors)}
    return dict(tensors)
