import math

import pytest

from orl.pretrain.schedule import learning_rate, momentum


def test_momentum_against_its_formula():
    total = 1000
    for step in (0, 1, 499, 500, 999):
        assert momentum(step, total) == pytest.approx(1 - 0.01 * (math.cos(math.pi * step / total) + 1) / 2)
    assert momentum(0, total) == pytest.approx(0.99)
    assert momentum(total, total) == pytest.approx(1.0)
    assert momentum(0, total, base=0.5) == pytest.approx(0.5)


def reference(step, steps, epochs, base, warmup):
    """The release's cosine annealing by epoch with linear warm-up by iteration, written independently."""
    epoch = step // steps
    regular = 0.5 * base * (math.cos(math.pi * epoch / epochs) + 1)
    if step >= warmup * steps:
        return regular
    k = (1 - step / (warmup * steps)) * (1 - 1e-4)
    return regular * (1 - k)


@pytest.mark.parametrize(("steps", "epochs", "base", "warmup"), [(231, 800, 0.4, 4), (9, 20, 0.05, 1), (5, 3, 1.0, 0)])
def test_learning_rate_against_the_release(steps, epochs, base, warmup):
    for step in range(0, steps * epochs, max(1, steps * epochs // 997)):
        assert learning_rate(step, steps, epochs, base, warmup) == pytest.approx(
            reference(step, steps, epochs, base, warmup)
        )


def test_learning_rate_by_hand():
    assert learning_rate(0, 10, 100, 0.4) == pytest.approx(0.4 * 1e-4)
    assert learning_rate(40, 10, 100, 0.4) == pytest.approx(0.4 * (1 + math.cos(0.04 * math.pi)) / 2)
    assert learning_rate(45, 10, 100, 0.4) == learning_rate(49, 10, 100, 0.4)  # moves once per epoch
    assert learning_rate(999, 10, 100, 0.4) > 0
