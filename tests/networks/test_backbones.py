import math
import re

import pytest
import torch
from torch import nn

from orl import InputError, artifacts
from orl.networks import backbones, ema
from orl.networks.heads import mlp

STAMP = artifacts.stamp(artifacts.MODEL, {}, {})
NAMES = ["resnet10", "resnet18", "resnet50"]


@pytest.fixture(scope="module")
def reference():
    """torchvision's network of the same name."""
    models = pytest.importorskip("torchvision.models")

    def make(name):
        if name == "resnet10":
            return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        return getattr(models, name)(weights=None)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_as_torchvision(name, reference):
    torch.manual_seed(0)
    ours, theirs = backbones.backbone(name), reference(name)
    ours.train()(torch.randn(8, 3, 64, 64))  # running statistics other than 0 and 1
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    theirs.fc = nn.Identity()
    expected_maps = []
    stages = [theirs.relu, theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4]
    for stage in stages:
        stage.register_forward_hook(lambda module, inputs, output: expected_maps.append(output.clone()))
    images = torch.randn(3, 3, 70, 64)
    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        expected_maps.clear()
        with torch.inference_mode():
            expected, maps = theirs(images), ours.stages(images)
        assert [tuple(one.shape) for one in maps] == [tuple(one.shape) for one in expected_maps]
        for one, other in zip(maps, expected_maps, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(maps[-1].mean((2, 3)), expected)
    for key, value in theirs.state_dict().items():  # train mode moved both running statistics alike
        torch.testing.assert_close(ours.state_dict()[key], value)
    with torch.inference_mode():
        pooled = ours.eval()(images)
        torch.testing.assert_close(pooled, theirs.eval()(images))
    assert pooled.shape == (3, ours.features)


def test_batch_norms_are_the_methods():
    norms = [part for part in backbones.backbone("resnet50").modules() if isinstance(part, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps, norm.affine) for norm in norms} == {(0.1, 1e-5, True)}


# Initialisation


def fan_in(weight):
    return weight[0].numel()


@pytest.mark.parametrize("name", NAMES[:2])
def test_weights_are_kaiming_normal_by_fan_in(name):
    model = nn.ModuleList([backbones.backbone(name), mlp(512, 256, 64)])
    backbones.initialize(model, torch.Generator().manual_seed(0))
    looked_at = 0
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            weight = part.weight.detach().flatten()
            normal = weight * math.sqrt(fan_in(part.weight) / 2)
            error = 5 / math.sqrt(len(weight))  # five standard errors, at least
            assert abs(normal.mean()) < error
            assert abs(normal.std() - 1) < error
            within = (normal.abs() < 1).double().mean()
            assert abs(within - 0.6827) < error
            assert part.bias is None or (part.bias == 0).all()
            looked_at += 1
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (part.weight == 1).all()  # residual branches too
            assert (part.bias == 0).all()
    assert looked_at == {"resnet10": 12, "resnet18": 20}[name] + 2


def test_initialisation_depends_on_the_generator_alone():
    def weights(seed, global_seed):
        torch.manual_seed(global_seed)
        model = backbones.backbone("resnet10")
        state = torch.get_rng_state()
        backbones.initialize(model, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), state)
        return model.state_dict()

    first, again, other = weights(1, 0), weights(1, 5), weights(2, 0)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


# Input


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalisation_is_imagenets(dtype):
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected = (torch.arange(256).double() / 255 - mean) / std
        found = backbones.normalize(images.to(dtype))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[0, channel].flatten().double(), expected, rtol=0, atol=1e-5)


# Files


@pytest.fixture(scope="module")
def model():
    model = backbones.backbone("resnet10")
    torch.manual_seed(0)
    model.train()(torch.randn(4, 3, 32, 32))
    return model


def test_save_and_load(model, tmp_path):
    path = tmp_path / "backbone.safetensors"
    backbones.save(path, "resnet10", model, STAMP)
    found = backbones.load(path)
    assert not found.training
    assert found.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)
        assert found.state_dict()[key].dtype == value.dtype
    kept = artifacts.attributes(path)
    assert re.fullmatch("[0-9a-f]{64}", kept.pop("sha256"))
    assert kept == {**STAMP, "backbone": "resnet10"}


def spoiled(model, kind):
    """State and metadata of a file that is no backbone of ours."""
    state, metadata = dict(model.state_dict()), {**STAMP, "backbone": "resnet10"}
    if kind == "missing":
        del state["layer1.0.bn1.running_mean"]
    elif kind == "additional":
        state["fc.weight"] = torch.ones(2, 2)
    elif kind == "shape":
        state["conv1.weight"] = state["conv1.weight"][:, :1]
    elif kind == "network":
        metadata["backbone"] = "resnet18"
    elif kind == "unknown":
        metadata["backbone"] = "vit"
    elif kind == "schema":
        metadata["schema"] = "orl.model/0"
    elif kind == "unstamped":
        metadata = {}
    return state, metadata


@pytest.mark.parametrize("kind", ["missing", "additional", "shape", "network", "unknown", "schema", "unstamped"])
def test_bad_backbones_are_named(model, kind, tmp_path):
    path = tmp_path / "backbone.safetensors"
    artifacts.write_weights(path, *spoiled(model, kind))
    with pytest.raises(InputError, match=f"^{path}: .*\\.$"):
        backbones.load(path)


def test_a_model_is_no_backbone_and_a_backbone_no_model(model_folder):
    """Both lie in the same folder, so taking one for the other is easy."""
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        backbones.load(model_folder / "model.safetensors")
    with pytest.raises(InputError, match=r"backbone\.safetensors: "):
        ema.load_encoder(model_folder / "backbone.safetensors")
