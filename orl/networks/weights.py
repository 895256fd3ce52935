"""Weights made elsewhere: the backbone, and the projector where its form is known, from the files of other projects."""

import argparse
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from orl import InputError
from orl.config import Network
from orl.networks.backbones import BLOCKS, backbone
from orl.networks.ema import Encoder
from orl.networks.heads import Head, mlp


class Layout(NamedTuple):
    """What the names of a file's tensors begin with."""

    name: str
    backbone: str
    projector: str = ""  # empty: it has none


# The first that is found counts: ORL's files, for one, hold the backbone a second time, by OpenSelfSup's name.
LAYOUTS = (
    Layout("model.safetensors", "online.backbone.", "online.projector."),
    Layout("ORL, or OpenSelfSup's BYOL", "online_net.0.", "online_net.1."),
    Layout("OpenSelfSup's MoCo", "encoder_q.0.", "encoder_q.1."),
    Layout("MoCo", "encoder_q.", "encoder_q.fc."),
    Layout("DINO", "teacher/backbone.", "teacher/head."),
    Layout("OpenSelfSup", "backbone.", "neck."),
    Layout("torchvision", ""),
)
WRAPPERS = re.compile(r"^(state_dict/|model/)?(teacher/)?(module\.)?")  # what may lie around each of them
LAYERS = {"fc0": "0", "bn0": "1", "fc1": "3", "bn1": "4"}  # OpenSelfSup's name -> place in `mlp`
NAMED = 3  # keys that an error names


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds: the encoder in eval mode on the CPU, and in words what was recognised."""

    encoder: Encoder
    recognised: str
    sha256: str


def read(path: str | os.PathLike) -> Weights:
    """The encoder of a file of weights in any of LAYOUTS; no code of the file is run.

    Without a projector of known form the encoder has no head. Raises InputError.
    """
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a file of weights.") from None
    tensors = dict(_tensors(_content(path)))
    starts = {layout: tuple(layout.backbone + part for part in ("conv1.", "bn1.", "layer1.")) for layout in LAYOUTS}
    found = [layout for layout in LAYOUTS if any(key.startswith(starts[layout]) for key in tensors)]
    if not found:
        raise InputError(
            f"{path}: holds no ResNet in a known layout ({'; '.join(layout.name for layout in LAYOUTS)}); tensors "
            f"found: {_some(tensors)}; name another file."
        )
    layout = found[0]
    body = {key: value for key, value in _below(layout.backbone, tensors).items() if not key.startswith("fc.")}
    kind = _kind(body, path)
    head = _below(layout.projector, tensors) if layout.projector else {}
    form = _form(_as_mlp(head), backbone(kind).features)
    if form:
        encoder = Encoder(Network(backbone=kind, hidden=form.hidden, projection=form.outputs), form.head)  # type: ignore[arg-type]
        encoder.projector.load_state_dict(_as_mlp(head), strict=False)
        words = f"projector {form.head}, {encoder.backbone.features}-{form.hidden}-{form.outputs}"
    else:
        encoder = Encoder(Network(backbone=kind), None)  # type: ignore[arg-type]
        names = [layout.projector + key for key in head]
        words = f"a projector of unknown form, left out: {_some(names)}" if head else "no projector"
    # Not strict: checked above but for the counters `num_batches_tracked`, which old files lack and which begin at 0.
    encoder.backbone.load_state_dict(body, strict=False)
    for key, value in encoder.state_dict().items():
        if not value.isfinite().all():
            raise InputError(f"{path}: holds numbers that are not finite (in {key}); name another file.")
    return Weights(encoder.eval(), f"layout {layout.name}, {kind}, {words}", sha256)


def _content(path: str | os.PathLike) -> Any:
    """What is stored in a file, none of it code. Raises InputError."""
    if str(path).endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, ValueError) as error:
            detail = " ".join(str(error).split())
            raise InputError(f"{path}: damaged or no safetensors file ({detail}); fetch it again.") from None
    try:
        # argparse.Namespace: DINO stores its arguments in one; it only holds values.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        code = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if code:
            raise InputError(
                f"{path}: would run code to be read ({code[1] or code[2]}), which is refused; export its state_dict "
                f"where you trust it, as .pth or .safetensors, and name that file."
            ) from None
        raise InputError(f"{path}: damaged or no file of tensors by torch.save; fetch it again.") from None


def _tensors(content: Any, inside: str = "") -> Iterator[tuple[str, Tensor]]:
    """The dense tensors of nested mappings by name: state_dict/module.x -> x, optimizer/y -> optimizer/y."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        name = f"{inside}{key}"
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{name}/")
        elif isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            yield WRAPPERS.sub(r"\2", name), value


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it, as float32; those of mappings inside are left out."""
    inner = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {
        key: value.float() if value.is_floating_point() else value for key, value in inner.items() if "/" not in key
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items() if not key.endswith("num_batches_tracked")}


def _kind(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> str:
    """The name of the backbone whose keys and shapes these are. Raises InputError."""
    shapes = _shapes(tensors)
    with torch.device("meta"):
        known = {name: _shapes(backbone(name).state_dict()) for name in BLOCKS}
    for name, expected in known.items():
        if shapes == expected:
            return name
    name = min(known, key=lambda one: len(known[one].keys() ^ shapes.keys()))
    missing = [key for key in known[name] if key not in shapes]
    extra = [key for key in shapes if key not in known[name]]
    kinds = ", ".join(BLOCKS)
    if missing or extra:
        raise InputError(
            f"{path}: its backbone is none of {kinds}; against {name}, the nearest, keys missing: {_some(missing)}; "
            f"extra: {_some(extra)}; name another file."
        )
    key = next(key for key in shapes if shapes[key] != known[name][key])
    raise InputError(
        f"{path}: has the keys of {name}, but its shapes are of no known backbone ({kinds}): {key} is "
        f"{list(shapes[key])}, not {list(known[name][key])}; name another file."
    )


def _some(keys: Iterable[str]) -> str:
    """How many keys, and the first few of them in brackets."""
    names = list(keys)
    shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} ({shown})" if names else "none"


class _Form(NamedTuple):
    head: Head
    hidden: int
    outputs: int


def _as_mlp(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projector's tensors by their keys in `mlp`."""
    split = {key: key.removeprefix("mlp.").partition(".") for key in tensors}
    named = {f"{LAYERS.get(layer, layer)}.{rest}": tensors[key] for key, (layer, _, rest) in split.items()}
    for linear, norm in (("0", "1"), ("3", "4")):
        if "4.running_mean" in named and f"{linear}.bias" in named:
            # `mlp` has no bias before simclr's BatchNorms; they subtract the mean, so it can go in there.
            named[f"{norm}.running_mean"] = named[f"{norm}.running_mean"] - named.pop(f"{linear}.bias")
    return named


def _form(tensors: Mapping[str, Tensor], features: int) -> _Form | None:
    """Head and widths of an `mlp` whose tensors these are, for a backbone of so many features; None: no such."""
    widths = [len(tensors[key]) for key in sorted(tensors) if key.endswith(".weight") and tensors[key].ndim == 2]
    if len(widths) != 2 or not all(widths):
        return None
    hidden, outputs = widths
    for head in get_args(Head):
        with torch.device("meta"):
            expected: nn.Module = mlp(features, hidden, outputs, head)
        if _shapes(tensors) == _shapes(expected.state_dict()):
            return _Form(head, hidden, outputs)
    return None
