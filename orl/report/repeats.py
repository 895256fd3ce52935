"""Repeats: models whose names differ only in a trailing .seedN are one arm, with a mean and its standard error."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

REPEAT = re.compile(r"(.+)\.seed(\d+)")


def arm_of(model: str) -> tuple[str, int]:
    """The arm of a model, and its seed; -1 where the name has none, which is the run's own: the first."""
    found = REPEAT.fullmatch(model)
    return (found[1], int(found[2])) if found else (model, -1)


def by_arm(models: Iterable[str]) -> dict[str, list[str]]:
    """Arm -> its models, by seed; the arms in the order of their first models."""
    arms: dict[str, list[str]] = {}
    for model in models:
        arms.setdefault(arm_of(model)[0], []).append(model)
    return {arm: sorted(repeats, key=arm_of) for arm, repeats in arms.items()}


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error, which is nan where a single value was given."""

    value: float
    error: float = math.nan

    def minus(self, other: "Mean") -> "Mean":
        """The difference of two independent means."""
        return Mean(self.value - other.value, math.hypot(self.error, other.error))

    def text(self, digits: int, sign: bool = False) -> str:
        """With ± the standard error, where there is one; `sign`: with a plus, too. A dash for nan."""
        if math.isnan(self.value):
            return "–"
        # \N{MINUS SIGN} is as wide as the plus sign
        value = f"{self.value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")
        return value if math.isnan(self.error) else f"{value} ± {self.error:.{digits}f}"


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least one value, and its standard error: the standard deviation (ddof 1) by the root of n."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(float(np.mean(values)), float(error))
