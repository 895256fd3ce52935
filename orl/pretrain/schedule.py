"""Learning rate and EMA momentum by step (ORL release)."""

from math import cos, pi


def momentum(step: int, total_steps: int, base: float = 0.99) -> float:
    """EMA momentum after optimizer step `step` (from 0): 1 - (1 - base) (cos(pi t / T) + 1) / 2."""
    return 1 - (1 - base) * (cos(pi * step / total_steps) + 1) / 2


def learning_rate(step: int, steps_per_epoch: int, epochs: int, base: float, warmup_epochs: int = 4) -> float:
    """Learning rate of optimizer step `step` (from 0): a cosine that moves once per epoch, and a linear warm-up.

    During the first `warmup_epochs` the cosine's value is multiplied by 1 - (1 - t / (W S)) (1 - 1e-4).
    """
    rate = base * (1 + cos(pi * (step // steps_per_epoch) / epochs)) / 2
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        rate *= 1 - (1 - step / warmup_steps) * (1 - 1e-4)
    return rate
