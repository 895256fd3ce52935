import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orl.pretrain.lars import LARS

SHAPES = [(4, 3), (4,), (2, 3, 3, 3), (2,), ()]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def gradients(step):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def by_hand(weights, steps, lr, momentum, weight_decay, trust):
    """The update of each weight, one after the other, in Python's numbers where it can."""
    velocity = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    weights = [w.detach().double() for w in weights]
    for step in steps:
        for number, g in enumerate(step):
            w, g = weights[number], g.double()
            if w.ndim > 1:
                w_norm, g_norm = w.square().sum().sqrt().item(), g.square().sum().sqrt().item()
                local = trust * w_norm / (g_norm + weight_decay * w_norm) if w_norm > 0 and g_norm > 0 else 1.0
                velocity[number] = momentum * velocity[number] + local * lr * (g + weight_decay * w)
            else:
                velocity[number] = momentum * velocity[number] + lr * g
            weights[number] = w - velocity[number]
    return weights


def run(optimizer, weights, steps):
    for step in steps:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()


@given(lr=st.floats(1e-3, 2), momentum=st.floats(0, 0.99), weight_decay=st.floats(0, 0.1), trust=st.floats(1e-3, 0.1))
def test_several_steps_are_those_by_hand(lr, momentum, weight_decay, trust):
    weights, steps = parameters(), [gradients(step) for step in range(4)]
    expected = by_hand(weights, steps, lr, momentum, weight_decay, trust)
    run(LARS(weights, lr, momentum, weight_decay, trust), weights, steps)
    for got, want in zip(weights, expected, strict=True):
        assert torch.allclose(got.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("zero", ["weight", "gradient", "both"])
def test_zero_weights_or_gradients_are_moved_as_by_sgd(zero):
    weights, steps = parameters(), [gradients(0), gradients(1)]
    if zero != "gradient":
        weights[0].data.zero_()
    if zero != "weight":
        steps[0] = [torch.zeros_like(g) for g in steps[0]]
    first = weights[0].detach() - 0.6 * (steps[0][0] + 0.1 * weights[0].detach())
    expected = by_hand(weights, steps, 0.6, 0.9, 0.1, 0.01)
    optimizer = LARS(weights, 0.6, 0.9, 0.1, 0.01)
    run(optimizer, weights, steps[:1])
    assert torch.allclose(weights[0], first, atol=1e-6)
    run(optimizer, weights, steps[1:])
    for got, want in zip(weights, expected, strict=True):
        assert torch.allclose(got.double(), want, atol=1e-5)


def test_the_step_of_a_weight_does_not_depend_on_the_size_of_its_gradient():
    moved = []
    for scale in (1e-3, 1.0, 1e3):
        weights = parameters()
        run(LARS(weights, 0.6), weights, [[scale * g for g in gradients(0)]])
        moved.append(weights[0].detach())
    assert torch.allclose(moved[0], moved[1], atol=1e-6)
    assert torch.allclose(moved[1], moved[2], atol=1e-6)


def test_a_parameter_without_gradient_stays():
    weights = parameters()
    before = [w.detach().clone() for w in weights]
    optimizer = LARS(weights, 0.6)
    optimizer.step()
    weights[0].grad = gradients(0)[0]
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, weights, strict=True)] == [False, True, True, True, True]


def test_resumed_from_its_state_it_goes_on_bit_equal(tmp_path):
    steps = [gradients(step) for step in range(5)]
    undisturbed, stopped, resumed = parameters(), parameters(), parameters(1)
    run(LARS(undisturbed, 0.6, 0.9, 1e-3), undisturbed, steps)
    optimizer = LARS(stopped, 0.6, 0.9, 1e-3)
    run(optimizer, stopped, steps[:3])
    torch.save({"optimizer": optimizer.state_dict(), "weights": [w.detach() for w in stopped]}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for weight, value in zip(resumed, saved["weights"], strict=True):
        weight.data.copy_(value)
    optimizer = LARS(resumed, 0.1)
    optimizer.load_state_dict(saved["optimizer"])
    run(optimizer, resumed, steps[3:])
    for a, b in zip(undisturbed, resumed, strict=True):
        assert torch.equal(a, b)


def test_a_step_does_not_wait_for_the_device(no_reading):
    weights = parameters()
    optimizer = LARS(weights, 0.6, 0.9, 1e-3)
    with no_reading():
        run(optimizer, weights, [gradients(0), gradients(1)])
        with pytest.raises(AssertionError):
            weights[0].sum().item()
