"""The online/target pair."""

import copy
import os
from collections.abc import Mapping
from typing import get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from orl import InputError, artifacts
from orl.config import Network
from orl.networks.backbones import backbone, described, fill, initialize
from orl.networks.heads import Head, mlp


class Encoder(nn.Module):
    """Backbone and projector: float [B, 3, H, W] -> projection [B, P].

    Without a `head` (weights made elsewhere may have none that is known) the projection is the pooled features.
    """

    def __init__(self, network: Network, head: Head | None = "byol") -> None:
        super().__init__()
        self.network, self.head = network, head
        self.backbone = backbone(network.backbone)
        self.projector: nn.Module = nn.Identity()
        if head:
            self.projector = mlp(self.backbone.features, network.hidden, network.projection, head)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


class Pair(nn.Module):
    """An online encoder, and a target that follows its parameters and gets no gradient (BYOL)."""

    constant_momentum = False
    """Whether the EMA's momentum stays as it is, rather than rise to 1 on a cosine."""

    def __init__(self, network: Network, generator: torch.Generator, head: Head = "byol") -> None:
        super().__init__()
        self.online = Encoder(network, head)
        initialize(self.online, generator)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * online, parameters only.

        The target's running statistics come from its own train-mode forwards (ORL release).
        """
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - momentum)


def save(path: str | os.PathLike, model: nn.Module, attrs: Mapping[str, str]) -> None:
    """Write model.safetensors: all networks of `model`, `attrs` (see artifacts.stamp) and what `model.online` is."""
    online: Encoder = model.online  # type: ignore[assignment]
    kind = {"network": online.network.model_dump_json(), "head": online.head or ""}
    artifacts.write_weights(path, model.state_dict(), {**attrs, **kind})


def load_encoder(path: str | os.PathLike) -> Encoder:
    """The online encoder of a model.safetensors, in eval mode on the CPU. Raises InputError."""
    tensors, head = artifacts.read_weights(path), described(path, "head")
    try:
        network = Network.model_validate_json(described(path, "network"))
    except ValidationError:
        raise InputError(f"{path}: its network is none that this version knows; make it with `orl pretrain`.") from None
    if head not in ("", *get_args(Head)):
        raise InputError(f"{path}: its head {head!r} is none that this version knows; make it with `orl pretrain`.")
    model = Encoder(network, head or None)  # type: ignore[arg-type]
    online = {key.removeprefix("online."): value for key, value in tensors.items() if key.startswith("online.")}
    fill(model, online, path)
    return model.eval()
