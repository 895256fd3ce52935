import copy
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from orl import InputError, artifacts
from orl.config import Network, Optimizer, Stage1
from orl.networks import ema
from orl.networks.ema import Encoder, Pair
from orl.pretrain.moco import GroupedBatchNorm2d, MoCo

NETWORK = Network(backbone="resnet10", hidden=16, projection=8)
SETTINGS = Stage1(
    method="moco", network=NETWORK, optimizer=Optimizer(batch=8), temperature=0.3, queue=20, shuffled_batch=4
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def apart(model):
    """The model with a target that is not the online encoder any more."""
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator(7)))
    return model


def photos(step=0, batch=8):
    """Two views [batch, 3, 32, 32] and an order."""
    drawn = generator(50 + step)
    views = torch.randn(2, batch, 3, 32, 32, generator=drawn) + torch.randn(batch, 3, 1, 1, generator=drawn)
    return *views, torch.randperm(batch, generator=drawn)


def encode_in_groups(encoder, view, group):
    """Each group alone through the same encoder with ordinary BatchNorm."""
    plain = Encoder(NETWORK, "moco").train()
    plain.load_state_dict(encoder.state_dict())
    return torch.cat([plain(part) for part in view.split(group)]), plain


def by_hand(queries, keys, queue, temperature):
    """He et al., equation 1, one query after the other."""
    total = 0.0
    for q, k in zip(queries, keys, strict=True):
        q, k = q / q.norm(), (k / k.norm()).detach()
        positive = torch.exp(q @ k / temperature)
        total = total - torch.log(positive / (positive + sum(torch.exp(q @ n / temperature) for n in queue)))
    return total / len(queries)


def test_a_step_is_that_of_the_equation_with_keys_grouped_in_shuffled_order():
    model = apart(MoCo(SETTINGS, generator())).train()
    query_view, key_view, order = photos()
    before = {side: copy.deepcopy(getattr(model, side)) for side in ("online", "target")}
    queue = model.queue.clone()
    losses, projections = model(query_view, key_view, order)
    losses["contrast"].backward()
    queries, online = encode_in_groups(before["online"], query_view, 4)
    shuffled, _ = encode_in_groups(before["target"], key_view[order], 4)
    keys = torch.empty_like(shuffled)
    for place, photo in enumerate(order):
        keys[photo] = shuffled[place]
    expected = by_hand(queries, keys, queue, 0.3)
    expected.backward()
    assert list(losses) == ["contrast"]
    assert losses["contrast"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(projections, normalize(torch.stack([queries, keys]), dim=2), atol=1e-5)
    assert not projections.requires_grad
    for name, parameter in online.named_parameters():
        assert torch.allclose(model.online.get_parameter(name).grad, parameter.grad, atol=1e-4), name
    assert all(parameter.grad is None for parameter in model.target.parameters())
    assert not model.queue.requires_grad


def test_the_queue_holds_the_newest_keys_and_drops_the_oldest_first():
    model = apart(MoCo(SETTINGS, generator())).train()
    expected = list(model.queue.clone())  # the oldest first
    for step in range(6):
        query_view, key_view, order = photos(step)
        keys = model(query_view, key_view, order)[1][1]
        expected = [*expected[8:], *keys]
        pointer = int(model.pointer)
        assert pointer == 8 * (step + 1) % 20
        assert torch.equal(model.queue.roll(-pointer, 0), torch.stack(expected))
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(20))


def test_the_queue_starts_with_unit_rows_drawn_from_the_generator():
    first, second = (MoCo(SETTINGS, generator()).queue for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, MoCo(SETTINGS, generator(1)).queue)
    assert first.dtype == torch.float32
    assert torch.allclose(first.norm(dim=1), torch.ones(20))


def test_a_queue_shorter_than_a_batch_is_refused_and_one_as_long_is_not():
    with pytest.raises(InputError, match=r"stage1\.queue is 7"):
        MoCo(SETTINGS.model_copy(update={"queue": 7}), generator())
    model = MoCo(SETTINGS.model_copy(update={"queue": 8}), generator()).train()
    keys = model(*photos())[1][1]
    assert torch.equal(model.queue, keys)


def test_in_eval_mode_shuffling_changes_nothing():
    model = apart(MoCo(SETTINGS, generator())).eval()
    query_view, key_view, _ = photos()
    queue, keys = model.queue.clone(), normalize(model.target(key_view), dim=1)

    def run(order):
        model.queue.copy_(queue)
        model.pointer.zero_()
        losses, projections = model(query_view, key_view, torch.tensor(order))
        assert torch.allclose(projections[1], keys, atol=1e-6)
        assert torch.allclose(model.queue, torch.cat([keys, queue[8:]]), atol=1e-6)
        return losses["contrast"].item()

    unshuffled = run(range(8))

    @settings(max_examples=20)
    @given(order=st.permutations(range(8)))
    def check(order):
        assert run(order) == pytest.approx(unshuffled, abs=1e-6)

    check()


def test_the_target_sees_the_keys_in_the_given_order():
    model, seen = MoCo(SETTINGS, generator()).train(), []
    model.target.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    query_view, key_view, order = photos()
    model(query_view, key_view, order)
    assert torch.equal(seen[0], key_view[order])


def test_the_loss_is_computed_in_float32_under_autocast():
    model = MoCo(SETTINGS, generator())
    queries, keys = normalize(torch.randn(2, 8, 8, generator=generator()), dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.contrast(queries, keys), plain := model.contrast(queries, keys).float())
        losses, projections = model.train()(*photos())
    assert torch.equal(plain, MoCo(SETTINGS, generator()).contrast(queries, keys))
    assert losses["contrast"].dtype == projections.dtype == model.queue.dtype == torch.float32


def test_a_step_does_not_wait_for_the_device(no_reading):
    model, views = MoCo(SETTINGS, generator()).train(), photos()
    with no_reading():
        model(*views)[0]["contrast"].backward()


def test_moving_the_target_after_the_step_is_mocos_order():
    ours = MoCo(SETTINGS, generator()).train()
    theirs = MoCo(SETTINGS, generator()).train()
    assert ours.constant_momentum
    assert not Pair.constant_momentum
    for step in range(3):
        theirs.update_target(0.9)
        found = []
        for model in (ours, theirs):
            model.zero_grad()
            loss = model(*photos(step))[0]["contrast"]
            loss.backward()
            with torch.no_grad():
                for parameter in model.online.parameters():
                    parameter -= 0.05 * parameter.grad
            found.append(loss.item())
        ours.update_target(0.9)
        assert found[0] == found[1]


def test_the_encoder_is_read_back_with_ordinary_batch_norm(tmp_path):
    model = MoCo(SETTINGS, generator()).train()
    model(*photos())
    ema.save(tmp_path / "model.safetensors", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    encoder = ema.load_encoder(tmp_path / "model.safetensors")
    assert type(encoder.backbone.bn1) is nn.BatchNorm2d
    assert torch.equal(encoder(photos()[0]), model.eval().online(photos()[0]))


@given(groups=st.integers(1, 4), size=st.integers(2, 3), side=st.integers(1, 3), seed=st.integers(0, 99),
       layout=st.sampled_from([torch.contiguous_format, torch.channels_last]))  # fmt: skip
def test_grouped_batch_norm_is_batch_norm_of_each_group(groups, size, side, seed, layout):
    grouped, plain = GroupedBatchNorm2d(5, size).train(), nn.BatchNorm2d(5).train()
    for name, value in plain.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(5, generator=generator(seed)) + len(name))
    grouped.load_state_dict(plain.state_dict())
    drawn = 3 * torch.randn(2, groups * size, 5, side, side + 1, generator=generator(seed)) + 2
    x = drawn[0].to(memory_format=layout).requires_grad_()
    out = grouped(x)
    out.backward(drawn[1])
    assert out.is_contiguous(memory_format=layout)

    again = drawn[0].clone().requires_grad_()
    parts, means, variances = [], [], []
    for part in again.split(size):
        alone = copy.deepcopy(plain)
        out_alone = nn.functional.batch_norm(
            part, alone.running_mean, alone.running_var, plain.weight, plain.bias, True, 0.1, plain.eps
        )
        parts.append(out_alone)
        means.append(alone.running_mean)
        variances.append(alone.running_var)
    torch.cat(parts).backward(drawn[1])
    assert torch.allclose(out, torch.cat(parts), atol=1e-4)
    assert torch.allclose(x.grad, again.grad, atol=1e-3)
    assert torch.allclose(grouped.weight.grad, plain.weight.grad, atol=1e-3)
    assert torch.allclose(grouped.bias.grad, plain.bias.grad, atol=1e-4)
    # From the same start, the mean over groups of what each would leave behind.
    assert torch.allclose(grouped.running_mean, torch.stack(means).mean(0), atol=1e-5)
    assert torch.allclose(grouped.running_var, torch.stack(variances).mean(0), atol=1e-4)
    assert grouped.num_batches_tracked == 1
    assert torch.equal(grouped.eval()(x), nn.BatchNorm2d.forward(grouped, x))


def test_grouped_batch_norm_has_the_state_of_batch_norm():
    assert list(GroupedBatchNorm2d(3, 2).state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    model = MoCo(SETTINGS, generator())
    plain = Pair(NETWORK, generator(), "moco").state_dict()
    assert set(model.state_dict()) == {*plain, "queue", "pointer"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.items())
    assert not any(parameter.requires_grad for parameter in model.target.parameters())
    kinds = {type(part) for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {GroupedBatchNorm2d}


def test_a_batch_smaller_than_a_group_is_one_group_and_a_ragged_one_is_refused():
    grouped, plain = GroupedBatchNorm2d(3, 4).train(), nn.BatchNorm2d(3).train()
    x = torch.randn(3, 3, 2, 2, generator=generator())
    assert torch.allclose(grouped(x), plain(x), atol=1e-6)
    for batch in (6, 10):
        with pytest.raises(InputError, match=r"change that or stage1\.optimizer\.batch"):
            grouped(torch.randn(batch, 3, 2, 2))


def trained(rank, count, mode):
    """Losses, gradients averaged over the ranks, and buffers, of rank `rank` of `count` over three steps."""
    model = apart(MoCo(SETTINGS, generator())).train(mode)
    found = {}
    for step in range(3):
        query_view, key_view, order = photos(step)
        model.zero_grad()
        losses, projections = model(query_view.chunk(count)[rank], key_view.chunk(count)[rank], order)
        losses["contrast"].backward()
        for parameter in model.online.parameters():
            if count > 1:
                dist.all_reduce(parameter.grad)
            parameter.grad /= count
        found[f"loss {step}"], found[f"projections {step}"] = losses["contrast"].detach(), projections
        found.update({f"{name} {step}": p.grad.clone() for name, p in model.online.named_parameters()})
    return {**found, **{f"buffer {name}": value for name, value in model.named_buffers()}}


@pytest.fixture(scope="module")
def both(in_two_processes):
    return in_two_processes(__file__)


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_two_processes_do_what_one_does(both, mode):
    alone = trained(0, 1, mode)
    first, second = (ranks[str(mode)] for ranks in both)
    assert first.keys() == alone.keys()
    for name, expected in alone.items():
        if name.startswith("loss"):
            assert float(first[name] + second[name]) / 2 == pytest.approx(float(expected), rel=1e-5)
        elif name.startswith("projections"):
            assert torch.allclose(torch.cat([first[name], second[name]], 1), expected, atol=1e-5)
        else:
            assert torch.equal(first[name], second[name]), name
            assert torch.allclose(first[name], expected, atol=1e-4, rtol=1e-4), name


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({str(mode): trained(rank, 2, mode) for mode in (False, True)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
