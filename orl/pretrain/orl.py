"""ORL's stage 3: three BYOL losses on one pair of encoders (Xie et al., 2021)."""

import torch
from torch import Tensor, nn

from orl.config import Stage3
from orl.networks.backbones import initialize
from orl.networks.ema import Pair
from orl.networks.heads import mlp
from orl.pretrain.byol import symmetric


class ORL(Pair):
    """Object-level pre-training from two views of a photo, a RoI and its jittered copy, and a RoI pair."""

    def __init__(self, settings: Stage3, generator: torch.Generator) -> None:
        super().__init__(settings.network, generator)
        weights = (settings.global_weight, settings.intra_weight, settings.inter_weight)
        # Pair of views -> name and weight of its loss; one of weight 0 has no predictor, for nothing would train it.
        self.losses = {
            number: (name, weight)
            for number, (name, weight) in enumerate(zip(("global", "intra", "inter"), weights, strict=True))
            if weight > 0
        }
        width = settings.network.projection
        self.predictors = nn.ModuleDict(
            {name: mlp(width, settings.network.hidden, width) for name, _ in self.losses.values()}
        )
        initialize(self.predictors, generator)

    def forward(self, *views: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Views in the order global 1, 2, intra 1, 2, inter 1, 2 -> weighted losses by name, and projections.

        Six forwards per network: batch statistics never mix sizes. The projections [2, B, P] are of the first pair.
        """
        losses, projections = {}, []
        for number, (name, weight) in self.losses.items():
            loss, projected = symmetric(self, self.predictors[name], *views[2 * number : 2 * number + 2])
            losses[name] = weight * loss
            projections.append(projected)
        return losses, projections[0]
