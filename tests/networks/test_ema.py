import copy

import pytest
import torch

from orl import InputError, artifacts
from orl.config import Network
from orl.networks import ema
from orl.networks.ema import Pair

NETWORK = Network(backbone="resnet10", hidden=16, projection=8)
STAMP = artifacts.stamp(artifacts.MODEL, {}, {})


@pytest.fixture
def pair():
    """A pair whose online side was trained a little."""
    torch.manual_seed(0)
    pair = Pair(NETWORK, torch.Generator().manual_seed(0))
    with torch.no_grad():
        pair.online(torch.randn(4, 3, 32, 32))  # moves its running statistics
        for parameter in pair.online.parameters():
            parameter.add_(torch.randn_like(parameter))
    return pair


def test_the_target_begins_as_the_online_network_and_gets_no_gradient():
    pair = Pair(NETWORK, torch.Generator().manual_seed(0))
    online, target = pair.online.state_dict(), pair.target.state_dict()
    assert online.keys() == target.keys()
    assert all(torch.equal(value, target[key]) for key, value in online.items())
    assert all(parameter.requires_grad for parameter in pair.online.parameters())
    assert not any(parameter.requires_grad for parameter in pair.target.parameters())
    own = {parameter.data_ptr() for parameter in pair.online.parameters()}
    assert not own & {parameter.data_ptr() for parameter in pair.target.parameters()}


@pytest.mark.parametrize("momentum", [0, 0.3, 0.99, 0.999999, 1])
def test_parameters_follow_and_buffers_stay(pair, momentum):
    online, before = copy.deepcopy(pair.online), copy.deepcopy(pair.target)
    pair.update_target(momentum)
    expected = dict(before.named_parameters())
    names = set()
    for name, parameter in pair.target.named_parameters():
        value = momentum * expected[name].double() + (1 - momentum) * online.get_parameter(name).double()
        torch.testing.assert_close(parameter.double(), value, rtol=1e-6, atol=1e-6)
        names.add(name)
    assert {"backbone.bn1.weight", "backbone.layer4.0.bn2.bias", "projector.1.weight", "projector.3.weight"} <= names
    for name, buffer in pair.target.named_buffers():
        assert torch.equal(buffer, before.get_buffer(name))
    for name, value in online.state_dict().items():
        assert torch.equal(pair.online.state_dict()[name], value)


def test_momentum_1_moves_nothing_and_0_copies(pair):
    before = copy.deepcopy(pair.target)
    pair.update_target(1)
    assert all(map(torch.equal, pair.target.parameters(), before.parameters()))
    pair.update_target(0)
    assert all(map(torch.equal, pair.target.parameters(), pair.online.parameters()))


# Files


def test_save_and_load_the_online_encoder(pair, tmp_path):
    path = tmp_path / "model.safetensors"
    ema.save(path, pair, STAMP)
    found = ema.load_encoder(path)
    assert not found.training
    for key, value in pair.online.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found(images), pair.eval().online(images))
    assert artifacts.read_weights(path).keys() == pair.state_dict().keys()


@pytest.mark.parametrize(
    "network", [None, "{}", "not JSON", '{"backbone": "vit"}', '{"backbone": "resnet10", "odd": 1}']
)
def test_bad_models_are_named(pair, network, tmp_path):
    """An empty network means the defaults, which these weights do not fit."""
    path = tmp_path / "model.safetensors"
    artifacts.write_weights(
        path, pair.state_dict(), {**STAMP, "head": "byol", **({"network": network} if network else {})}
    )
    with pytest.raises(InputError, match=f"^{path}: .*\\.$"):
        ema.load_encoder(path)


def test_a_model_that_lacks_weights_is_named(pair, tmp_path):
    path = tmp_path / "model.safetensors"
    state = {key: value for key, value in pair.state_dict().items() if not key.startswith("online.projector")}
    artifacts.write_weights(path, state, {**STAMP, "head": "byol", "network": NETWORK.model_dump_json()})
    with pytest.raises(InputError, match=f"^{path}: .*\\.$"):
        ema.load_encoder(path)
