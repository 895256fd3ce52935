import math
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orl.config import Network, Stage1
from orl.pretrain.simclr import SimCLR, nt_xent

NETWORK = Network(backbone="resnet10", hidden=16, projection=8)
SETTINGS = Stage1(method="simclr", network=NETWORK, temperature=0.3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(first, second, temperature):
    """Chen et al., equation 1: the mean over all positive pairs (i, j) and (j, i)."""
    z = [*first, *second]
    count = len(first)

    def similarity(a, b):
        return (a @ b) / (a.norm() * b.norm())

    total = 0.0
    for i in range(2 * count):
        j = (i + count) % (2 * count)
        below = sum(torch.exp(similarity(z[i], z[k]) / temperature) for k in range(2 * count) if k != i)
        total = total - torch.log(torch.exp(similarity(z[i], z[j]) / temperature) / below)
    return total / (2 * count)


@given(photos=st.integers(1, 6), width=st.integers(2, 5), seed=st.integers(0, 99), temperature=st.floats(0.1, 2))
def test_the_loss_and_its_gradient_are_those_of_the_equation(photos, width, seed, temperature):
    projections = torch.randn(2, photos, width, generator=generator(seed), dtype=torch.float64).requires_grad_()
    expected = by_hand(*projections, temperature)
    gradient = torch.autograd.grad(expected, projections)[0].float()
    loss = nt_xent(projections, temperature)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)
    assert torch.allclose(torch.autograd.grad(loss, projections)[0].float(), gradient, atol=1e-4)


@given(seed=st.integers(0, 99))
def test_neither_the_order_of_the_photos_nor_of_the_views_matters(seed):
    projections = torch.randn(2, 5, 4, generator=generator(seed))
    order = torch.randperm(5, generator=generator(seed))
    assert nt_xent(projections.flip(0)[:, order], 0.1) == pytest.approx(float(nt_xent(projections, 0.1)), rel=1e-5)


def test_equal_projections_cannot_be_told_apart():
    assert nt_xent(torch.ones(2, 4, 3), 0.1) == pytest.approx(math.log(7))


def test_the_loss_is_computed_in_float32_under_autocast():
    projections = torch.randn(2, 5, 8, generator=generator()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(projections, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nt_xent(projections.float(), 0.1))


def test_a_training_step_is_that_of_the_equation_with_statistics_over_both_views():
    model = SimCLR(SETTINGS, generator()).train()
    view1, view2 = torch.randn(2, 6, 3, 32, 32, generator=generator())
    losses, projections = model(view1, view2 + 1)
    sum(losses.values()).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    by_network = model.online.projector(model.online.backbone(torch.cat([view1, view2 + 1])))
    expected = by_hand(by_network[:6], by_network[6:], 0.3)
    expected.backward()
    assert list(losses) == ["contrast"]
    assert losses["contrast"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert projections.shape == (2, 6, 8)
    assert not projections.requires_grad
    assert torch.allclose(projections.flatten(0, 1), by_network, atol=1e-5)
    for name, gradient in got.items():
        assert torch.allclose(gradient, model.get_parameter(name).grad, atol=1e-5), name
    assert model.online.backbone.bn1.num_batches_tracked == 2  # once here, once in the model


def test_the_same_generator_gives_the_same_network_with_its_own_head():
    first, second = SimCLR(SETTINGS, generator()), SimCLR(SETTINGS, generator())
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert isinstance(first.online.projector[-1], nn.BatchNorm1d)


def gradients(rank, count):
    """Loss and gradients of rank `rank` of `count` in eval mode, where no statistics are shared."""
    model = SimCLR(SETTINGS, generator()).eval()
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if count > 1 else model
    views = torch.randn(2, 6, 3, 32, 32, generator=generator()).chunk(count, 1)[rank]
    loss = wrapped(*views)[0]["contrast"]
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def test_two_processes_have_the_gradient_of_one(in_two_processes):
    alone = gradients(0, 1)
    first, second = in_two_processes(__file__)
    assert float(first["loss"] + second["loss"]) / 2 == pytest.approx(float(alone["loss"]), rel=1e-5)
    assert float(first["loss"]) != float(second["loss"])
    assert max(alone[name].abs().max() for name in alone if name != "loss") > 1e-3
    for name in set(alone) - {"loss"}:
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], alone[name], atol=1e-5, rtol=1e-4), name


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(gradients(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
