"""Projector and predictor."""

from torch import nn


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """[B, inputs] -> [B, outputs]: linear with bias, BatchNorm, ReLU, linear without bias (BYOL, ORL release)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs, bias=False)
    )
