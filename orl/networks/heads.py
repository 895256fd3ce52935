"""Projectors and predictors: two linear layers [B, inputs] -> [B, outputs], as each method has them."""

from typing import Literal

from torch import nn

Head = Literal["byol", "byol+bias", "simclr", "moco"]


def mlp(inputs: int, hidden: int, outputs: int, head: Head = "byol") -> nn.Sequential:
    """`byol`: linear with bias, BatchNorm, ReLU, linear without bias (also its predictor; ORL release).

    `byol+bias`: the last one with bias, too (OpenSelfSup, MMSelfSup; only of given weights).
    `simclr`: linear without bias, BatchNorm, ReLU, linear without bias, BatchNorm; `moco`: linear, ReLU, linear.
    """
    if head == "moco":
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    layers = [
        nn.Linear(inputs, hidden, bias=head != "simclr"),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs, bias=head == "byol+bias"),
    ]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(outputs)] if head == "simclr" else []))
