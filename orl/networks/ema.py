"""The online/target pair."""

import copy
import os
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from orl import InputError, artifacts
from orl.config import Network
from orl.networks.backbones import backbone, described, fill, initialize
from orl.networks.heads import mlp


class Encoder(nn.Module):
    """Backbone and projector: float [B, 3, H, W] -> projection [B, P]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.backbone = backbone(network.backbone)
        self.projector = mlp(self.backbone.features, network.hidden, network.projection)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


class Pair(nn.Module):
    """An online encoder, and a target that follows its parameters and gets no gradient (BYOL)."""

    def __init__(self, network: Network, generator: torch.Generator) -> None:
        super().__init__()
        self.online = Encoder(network)
        initialize(self.online, generator)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * online, parameters only.

        The target's running statistics come from its own train-mode forwards (ORL release).
        """
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, 1 - momentum)


def save(path: str | os.PathLike, network: Network, model: Pair, attrs: Mapping[str, str]) -> None:
    """Write model.safetensors: online, target and predictors, `attrs` (see artifacts.stamp) and the network."""
    artifacts.write_weights(path, model.state_dict(), {**attrs, "network": network.model_dump_json()})


def load_encoder(path: str | os.PathLike) -> Encoder:
    """The online encoder of a model.safetensors, in eval mode on the CPU. Raises InputError."""
    tensors = artifacts.read_weights(path)
    try:
        network = Network.model_validate_json(described(path, "network"))
    except ValidationError:
        raise InputError(f"{path}: its network is none that this version knows; make it with `orl pretrain`.") from None
    model = Encoder(network)
    online = {key.removeprefix("online."): value for key, value in tensors.items() if key.startswith("online.")}
    fill(model, online, path)
    return model.eval()
