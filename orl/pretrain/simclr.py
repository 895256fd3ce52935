"""SimCLR (Chen et al., 2020), as in the ORL release."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from orl.config import Stage1
from orl.networks.backbones import initialize
from orl.networks.ema import Encoder
from orl.training import ranks


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """-log(exp(cos(i, j) / t) / sum over k != i of exp(cos(i, k) / t)), mean over i: float [2, B, P] -> scalar.

    i is each view of a photo, j the photo's other view, and k runs over both views of all photos of all processes.
    With several processes i runs over this one's: averaged over them, loss and gradient are those of a single one.
    """
    with torch.autocast(projections.device.type, enabled=False):
        views = normalize(projections.float().flatten(0, 1), dim=1)
        everyone = ranks.gather(views)
        similarity = views @ everyone.T / temperature
        itself = ranks.rank() * len(views) + torch.arange(len(views), device=views.device)
        is_itself = itself[:, None] == torch.arange(len(everyone), device=views.device)
        other_view = itself.roll(len(views) // 2)
        return cross_entropy(similarity.masked_fill(is_itself, -torch.inf), other_view)


class SimCLR(nn.Module):
    """Stage 1 by contrast within the batch: one encoder, no target."""

    def __init__(self, settings: Stage1, generator: torch.Generator) -> None:
        super().__init__()
        self.temperature = settings.temperature
        self.online = Encoder(settings.network, "simclr")
        initialize(self.online, generator)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Two views [B, 3, S, S] -> losses by name (their sum is minimised), and projections [2, B, P].

        Unlike BYOL's, both views go through the network together: batch statistics are over both (ORL release).
        """
        projections = self.online(torch.cat([view1, view2])).unflatten(0, (2, -1))
        return {"contrast": nt_xent(projections, self.temperature)}, projections.detach()
