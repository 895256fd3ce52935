import math

import numpy as np
import pytest

from orl.report.repeats import Mean, by_arm, mean


def test_models_that_differ_in_their_seed_are_one_arm() -> None:
    models = ["orl-b.seed10", "orl", "orl-b.seed2", "orl.seed1", "orl-b", "orl.seed1x", "orl.seeds", ".seed3"]
    assert by_arm(models) == {
        "orl-b": ["orl-b", "orl-b.seed2", "orl-b.seed10"],
        "orl": ["orl", "orl.seed1"],
        "orl.seed1x": ["orl.seed1x"],
        "orl.seeds": ["orl.seeds"],
        ".seed3": [".seed3"],
    }


def test_mean_and_standard_error() -> None:
    few, many = [60.0, 61.0, 63.5], np.random.default_rng(0).normal(40, 2, 10).tolist()
    first, second = mean(few), mean(many)
    assert first.value == pytest.approx(61.5)
    assert first.error == pytest.approx(math.sqrt(((1.5**2 + 0.5**2 + 2**2) / 2) / 3))
    assert second.error == pytest.approx(np.std(many, ddof=1) / np.sqrt(10))
    change = first.minus(second)
    assert change.value == pytest.approx(61.5 - np.mean(many))
    assert change.error == pytest.approx(np.sqrt(first.error**2 + second.error**2))


def test_a_single_value_has_no_error() -> None:
    one = mean([61.126])
    assert one.value == 61.126
    assert one.text(2) == "61.13"
    assert math.isnan(one.minus(mean([1.0, 2.0])).error)
    assert mean([1.0, 2.0]).minus(one).text(1, sign=True) == "−59.6"


def test_text() -> None:
    assert Mean(2.0, 0.25).text(2) == "2.00 ± 0.25"
    assert Mean(2.0, 0.25).text(1, sign=True) == "+2.0 ± 0.2"
    assert Mean(math.nan).text(2) == "–"
