import math

import pytest
import torch

from orl.config import Network, Stage1, Stage3
from orl.pretrain.byol import BYOL, regression
from orl.pretrain.loop import feature_std
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


def test_feature_std_tells_collapse_from_spread():
    spread = torch.randn(2, 4096, 64, generator=generator())
    assert feature_std(spread) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(2, 32, 64)) == pytest.approx(0, abs=1e-5)
    one_axis = torch.sign(torch.randn(2, 4096, 1, generator=generator())) * torch.ones(64)
    assert feature_std(one_axis) == pytest.approx(1, abs=0.02)  # ± one direction is spread, by this figure
    assert math.isfinite(feature_std(torch.zeros(2, 8, 4)))
