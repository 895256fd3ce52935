"""Exported backbones, loaded by the frameworks that are installed and compared by name and shape for the others."""

import re

import pytest
import torch
from safetensors.torch import load_file

from orl import InputError, artifacts
from orl.config import EXPORTS
from orl.networks import backbones, weights
from orl.networks.export import export

NAMES = ["resnet10", "resnet18", "resnet50"]
BLOCKS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    """A backbone with statistics of its own, and its file."""
    name = request.param
    torch.manual_seed(0)
    model = backbones.backbone(name)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.copy_(torch.rand_like(value) + 0.5)
            elif not value.is_floating_point():
                value.fill_(7)
    path = tmp_path_factory.mktemp(name) / "backbone.safetensors"
    backbones.save(path, name, model, artifacts.stamp(artifacts.MODEL, {}, {}))
    return name, model.eval(), path


def exported(saved, kind, tmp_path):
    output = tmp_path / f"out{EXPORTS[kind]}"
    export(saved[2], kind, output)
    return output


def assert_same_features(ours, theirs):
    images = torch.randn(2, 3, 70, 64)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(images), ours(images))


def test_timm_loads_it_strictly(saved, tmp_path):
    timm = pytest.importorskip("timm")
    name, model, _ = saved
    path = exported(saved, "timm", tmp_path)
    if name == "resnet10":
        theirs = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=0)
        theirs.load_state_dict(load_file(path))
    else:
        theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(path))
        overlay = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0)
        assert all(torch.equal(value, overlay.state_dict()[key]) for key, value in theirs.state_dict().items())
    assert_same_features(model, theirs)


def test_torchvision_misses_only_the_classifier(saved, tmp_path):
    models = pytest.importorskip("torchvision.models")
    name, model, _ = saved
    made = getattr(models, name, lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1]))
    theirs = made()
    state = torch.load(exported(saved, "torchvision", tmp_path), weights_only=True)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    theirs.fc = torch.nn.Identity()
    assert_same_features(model, theirs)


def convolutions(name, names):
    """Name and shape of each convolution's weight, and the name of its norm, as a framework calls them.

    `names(stage, block, layer)`: those of a layer (1 to 3; 0: the shortcut) of a block, stages from 1; of the stem, by
    stage 0. In the order of the network: stem, then of each block the layers and the shortcut.
    """
    bottleneck = name == "resnet50"
    yield *names(0, 0, 1), (64, 3, 7, 7)
    inputs = 64
    for stage, count in enumerate(BLOCKS[name], 1):
        width = 32 * 2**stage
        outputs = 4 * width if bottleneck else width
        for block in range(count):
            if bottleneck:
                shapes = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            else:
                shapes = [(width, inputs, 3, 3), (width, width, 3, 3)]
            for layer, shape in enumerate(shapes, 1):
                yield *names(stage, block, layer), shape
            if block == 0 and inputs != outputs:
                yield *names(stage, block, 0), (outputs, inputs, 1, 1)
            inputs = outputs


def detectron2_names(stage, block, layer):
    """BasicStem's conv1, then res2 to res5, whose Conv2d each hold their norm (modeling/backbone/resnet.py)."""
    module = f"res{stage + 1}.{block}" if stage else "stem"
    convolution = f"{module}.conv{layer}" if layer else f"{module}.shortcut"
    return convolution, f"{convolution}.norm"


def mmdet_names(stage, block, layer):
    """ResNet's conv1 and bn1, then layer1 to layer4; downsample is a Sequential (models/backbones/resnet.py)."""
    module = f"layer{stage}.{block}." if stage else ""
    if layer:
        return f"{module}conv{layer}", f"{module}bn{layer}"
    return f"{module}downsample.0", f"{module}downsample.1"


@pytest.mark.parametrize(
    ("kind", "inside", "names"), [("detectron2", "model", detectron2_names), ("mmdet", "state_dict", mmdet_names)]
)
def test_names_and_shapes_are_the_frameworks(saved, kind, inside, names, tmp_path):
    name, model, _ = saved
    content = torch.load(exported(saved, kind, tmp_path), weights_only=True)
    found, ours = content[inside], model.state_dict()
    if kind == "detectron2":
        assert content["matching_heuristics"] is True
        assert "__author__" not in content  # Caffe2's names would be looked for
    else:
        assert set(content) == {"meta", "state_dict"}
    expected = {}
    for (convolution, norm, shape), (same, same_norm, _) in zip(
        convolutions(name, names), convolutions(name, mmdet_names), strict=True
    ):
        expected[f"{convolution}.weight"] = f"{same}.weight", shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{norm}.{part}"] = f"{same_norm}.{part}", shape[:1]
        expected[f"{norm}.num_batches_tracked"] = f"{same_norm}.num_batches_tracked", ()
    assert {key: tuple(value.shape) for key, value in found.items()} == {key: one for key, (_, one) in expected.items()}
    assert len({own for own, _ in expected.values()}) == len(ours)
    for key, (own, _) in expected.items():
        assert torch.equal(found[key], ours[own])


@pytest.mark.parametrize("kind", ["torchvision", "timm", "mmdet"])
def test_our_own_reader_takes_it(saved, kind, tmp_path):
    name, model, _ = saved
    found = weights.read(exported(saved, kind, tmp_path))
    assert found.recognised == f"layout torchvision, {name}, no projector"
    for key, value in model.state_dict().items():
        assert torch.equal(found.encoder.backbone.state_dict()[key], value)


@pytest.mark.parametrize("kind", list(EXPORTS))
def test_same_weights_same_bytes_and_a_line_that_says_how(saved, kind, tmp_path, capsys):
    path = exported(saved, kind, tmp_path)
    first = path.read_bytes()
    capsys.readouterr()
    exported(saved, kind, tmp_path)
    assert path.read_bytes() == first
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{path}: {saved[0]} for {kind}; ")
    needed = {
        "torchvision": ["strict=False"],
        "timm": ["num_classes=0"],
        "detectron2": ["INPUT.FORMAT RGB", "PIXEL_MEAN [123.675, 116.28, 103.53]", "PIXEL_STD [58.395, 57.12, 57.375]",
                       "STRIDE_IN_1X1 False", "NORM SyncBN", "FREEZE_AT 0", f"DEPTH {saved[0][6:]}"],
        "mmdet": ['style="pytorch"', 'type="SyncBN", requires_grad=True', "frozen_stages=-1", f"depth={saved[0][6:]}"],
    }  # fmt: skip
    assert all(part in said for part in needed[kind])
    assert ("ResNet-10" in said) == (saved[0] == "resnet10" and kind in ("detectron2", "mmdet"))
    assert ("RES2_OUT_CHANNELS 64" in said) == (saved[0] != "resnet50" and kind == "detectron2")


@pytest.mark.parametrize("kind", list(EXPORTS))
def test_bad_input_is_one_sentence_and_writes_nothing(model_folder, kind, tmp_path):
    wrong = tmp_path / ("a.pth" if kind == "timm" else "a.pkl")
    with pytest.raises(InputError, match=rf"^{re.escape(str(wrong))}: {kind} reads weights from {EXPORTS[kind]} files"):
        export(model_folder / "backbone.safetensors", kind, wrong)
    for bad in (model_folder / "model.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(InputError, match=rf"^{re.escape(str(bad))}: [^\n]*\.$"):
            export(bad, kind, tmp_path / f"out{EXPORTS[kind]}")
    assert list(tmp_path.iterdir()) == []
