"""BYOL (Grill et al., 2020), as in the ORL release."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from orl.config import Stage1
from orl.networks.backbones import initialize
from orl.networks.ema import Pair
from orl.networks.heads import mlp


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos(prediction, target), mean over the batch: [B, P], [B, P] -> scalar."""
    return (2 - 2 * cosine_similarity(prediction.float(), target.float(), dim=1)).mean()


def symmetric(pair: Pair, predictor: nn.Module, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
    """BYOL's loss of two views [B, 3, S, S], both directions added, and the online projections [2, B, P].

    Each view goes through each network on its own: batch statistics are per view.
    """
    online1, online2 = pair.online(view1), pair.online(view2)
    with torch.no_grad():
        target1, target2 = pair.target(view1), pair.target(view2)
    loss = regression(predictor(online1), target2) + regression(predictor(online2), target1)
    return loss, torch.stack([online1, online2]).detach()


class BYOL(Pair):
    """Stage 1: image-level pre-training from two views of a photo."""

    def __init__(self, settings: Stage1, generator: torch.Generator) -> None:
        super().__init__(settings.network, generator)
        self.predictor = mlp(settings.network.projection, settings.network.hidden, settings.network.projection)
        initialize(self.predictor, generator)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Losses by name (their sum is minimised), and projections [2, B, P]."""
        loss, projections = symmetric(self, self.predictor, view1, view2)
        return {"global": loss}, projections
