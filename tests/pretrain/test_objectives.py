import math

import pytest
import torch

from orl.config import Network, Stage1, Stage3
from orl.pretrain.byol import BYOL, regression
from orl.pretrain.loop import spread
from orl.pretrain.orl import ORL

NETWORK = Network(backbone="resnet10", hidden=16, projection=8)


def generator():
    return torch.Generator().manual_seed(0)


def byol_by_hand(model, predictor, first, second):
    """BYOL's loss as its equation reads, with explicit norms."""

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    total = 0.0
    for a, b in ((first, second), (second, first)):
        prediction = unit(predictor(model.online.projector(model.online.backbone(a))))
        target = unit(model.target.projector(model.target.backbone(b))).detach()
        total = total + (prediction - target).square().sum(1).mean()
    return total


def test_regression_is_two_minus_two_cosines():
    a, b = torch.randn(5, 8, generator=generator()), torch.randn(5, 8, generator=generator()) + 1
    by_hand = torch.stack([2 - 2 * (x @ y) / (x.norm() * y.norm()) for x, y in zip(a, b, strict=True)]).mean()
    assert regression(a, b) == pytest.approx(float(by_hand), abs=1e-6)
    assert regression(a, 3 * a) == pytest.approx(0, abs=1e-6)
    assert regression(a, -a) == pytest.approx(4, abs=1e-6)


def test_byol_loss_and_gradient_against_the_equation():
    model = BYOL(Stage1(network=NETWORK), generator()).train()
    views = torch.randn(2, 6, 3, 32, 32, generator=generator())
    losses, projections = model(*views)
    losses["global"].backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert projections.shape == (2, 6, 8)
    assert not any(name.startswith("target") for name in got)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(got)
    model.zero_grad()
    expected = byol_by_hand(model, model.predictor, *views)
    expected.backward()
    assert losses["global"].item() == pytest.approx(expected.item(), abs=1e-5)
    for name, grad in got.items():
        assert torch.allclose(grad, model.get_parameter(name).grad, atol=1e-5), name


def test_orl_is_three_byol_losses_with_three_predictors():
    model = ORL(Stage3(network=NETWORK, inter_weight=0.5), generator()).train()
    large = torch.randn(2, 4, 3, 48, 48, generator=generator())
    small = torch.randn(4, 4, 3, 32, 32, generator=generator())
    losses, projections = model(*large, *small)
    assert list(losses) == ["global", "intra", "inter"]
    assert torch.allclose(projections[0], model.online(large[0]), atol=1e-5)
    pairs = {"global": large, "intra": small[:2], "inter": small[2:]}
    for name, (first, second) in pairs.items():
        expected = byol_by_hand(model, model.predictors[name], first, second)
        weight = 0.5 if name == "inter" else 1.0
        assert losses[name].item() == pytest.approx(weight * expected.item(), abs=1e-5)
    widths = {tuple(p.shape) for n, p in model.predictors.named_parameters() if n.endswith("0.weight")}
    assert widths == {(16, 8)}
    firsts = [model.predictors[name][0].weight for name in model.predictors]
    assert not torch.equal(firsts[0], firsts[1])


def test_orl_makes_six_forwards_per_network_in_order():
    model = ORL(Stage3(network=NETWORK), generator()).train()
    seen = {"online": [], "target": []}
    for side, shapes in seen.items():
        getattr(model, side).register_forward_hook(
            lambda _, x, __, shapes=shapes: shapes.append(x[0][0, 0, 0, 0].item())
        )
    views = [torch.full((4, 3, size, size), float(i)) + torch.randn(4, 3, size, size) * 1e-3
             for i, size in enumerate((48, 48, 32, 32, 32, 32))]  # fmt: skip
    model(*views)
    for order in seen.values():
        assert [round(value) for value in order] == [0, 1, 2, 3, 4, 5]
    # Running statistics see both sizes: six updates.
    assert model.online.backbone.bn1.num_batches_tracked == model.target.backbone.bn1.num_batches_tracked == 6


def test_a_loss_of_weight_zero_is_left_out():
    model = ORL(Stage3(network=NETWORK, inter_weight=0), generator()).train()
    views = [torch.randn(4, 3, 32, 32, generator=generator()) for _ in range(6)]
    assert list(model(*views)[0]) == ["global", "intra"]
    assert model.online.backbone.bn1.num_batches_tracked == 4


def test_target_starts_as_a_copy_and_trains_its_own_statistics():
    model = BYOL(Stage1(network=NETWORK), generator()).train()
    for (name, a), (_, b) in zip(model.online.named_parameters(), model.target.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    model(*torch.randn(2, 6, 3, 32, 32, generator=generator()))
    assert model.target.backbone.bn1.running_mean.abs().sum() > 0


def test_spread_tells_collapse_from_evenly_spread_directions():
    even = spread(torch.randn(2, 4096, 64, generator=generator()))
    assert even["feature_std"] == pytest.approx(1, abs=0.02)
    assert even["alignment"] == pytest.approx(2, abs=0.02)  # the two views have nothing in common
    collapsed = spread(torch.ones(2, 32, 64))
    assert {name: float(value) for name, value in collapsed.items()} == pytest.approx(
        {"feature_std": 0, "alignment": 0, "uniformity": 0}, abs=1e-5
    )
    one_axis = torch.ones(2, 32, 64) * torch.tensor([1.0, -1.0]).repeat(16).view(1, 32, 1)
    assert spread(one_axis)["feature_std"] == pytest.approx(1, abs=0.02)  # ± one direction is spread, by this figure
    assert all(math.isfinite(value) for value in spread(torch.zeros(2, 8, 4)).values())


def test_alignment_and_uniformity_against_their_equations():
    x = torch.randn(2, 6, 5, generator=generator())
    unit = x / x.norm(dim=2, keepdim=True)
    alignment = sum(float((a - b) @ (a - b)) for a, b in zip(*unit, strict=True)) / 6
    pairs = [
        math.exp(-2 * float((a - b) @ (a - b))) for i, a in enumerate(unit[0]) for j, b in enumerate(unit[0]) if i != j
    ]
    found = spread(x)
    assert found["alignment"] == pytest.approx(alignment, rel=1e-5)
    assert found["uniformity"] == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


def test_a_loss_of_weight_0_costs_and_trains_nothing():
    model = ORL(Stage3(network=NETWORK, intra_weight=0), generator()).train()
    views = [torch.randn(4, 3, side, side, generator=generator()) for side in (48, 48, 32, 32, 32, 32)]
    losses, _ = model(*views)
    assert list(losses) == ["global", "inter"]
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # as DDP demands
