"""Every layout is saved from modules built as its project builds them, and compared with what those compute."""

import argparse
import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from orl import InputError, artifacts
from orl.config import Network
from orl.networks import backbones, ema, weights
from orl.networks.ema import Pair

HIDDEN, OUTPUTS = 24, 12


def resnet(name="resnet10", fc=None):
    """torchvision's network with `fc` as its last layer; its running statistics are neither 0 nor 1."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    if name == "resnet10":
        model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    else:
        model = getattr(models, name)(weights=None)
    features = model.fc.in_features
    model.fc = nn.Identity()
    model.train()(torch.randn(6, 3, 40, 40))
    model.fc = fc(features) if fc else nn.Identity()
    return model


class Mlp(nn.Module):
    """OpenSelfSup's necks of BYOL and MoCo."""

    def __init__(self, *layers):
        super().__init__()
        self.mlp = nn.Sequential(*layers)

    def forward(self, x):
        return self.mlp(x)


class Numbered(nn.Module):
    """OpenSelfSup's neck of SimCLR, and of ORL: fc0, bn0, fc1 and, where asked for, bn1."""

    def __init__(self, inputs, first_bias, last_bias, last_norm):
        super().__init__()
        self.fc0, self.bn0 = nn.Linear(inputs, HIDDEN, bias=first_bias), nn.BatchNorm1d(HIDDEN)
        self.fc1 = nn.Linear(HIDDEN, OUTPUTS, bias=last_bias)
        self.bn1 = nn.BatchNorm1d(OUTPUTS) if last_norm else None

    def forward(self, x):
        x = self.fc1(self.bn0(self.fc0(x)).relu())
        return self.bn1(x) if self.bn1 else x


def byol_neck(inputs, bias=False):
    """OpenSelfSup's BYOL has a bias in its last layer."""
    last = nn.Linear(HIDDEN, OUTPUTS, bias=bias)
    return Mlp(nn.Linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), last)


def moco_neck(inputs):
    return Mlp(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))


class Holder(nn.Module):
    """A module with the given children."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def online(neck, body=None, **more):
    """BYOL or ORL as OpenSelfSup builds them: the online side is registered twice."""
    body = body or resnet()
    target = nn.Sequential(resnet("resnet10"), nn.Linear(1, 1))
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    return Holder(
        online_net=nn.Sequential(body, neck), target_net=target, backbone=body, neck=neck, head=nn.Linear(3, 3), **more
    )


def trained(neck):
    """A neck whose running statistics are neither 0 nor 1."""
    neck.train()(torch.randn(6, 512))
    return neck


def saved_by_mmcv(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return {
        "meta": {"epoch": 800, "iter": 5, "config": "model = dict()", "time": "today"},
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def moco(fc):
    encoder = resnet(fc=fc)
    model = Holder(encoder_q=encoder, encoder_k=resnet("resnet18", fc))
    model.register_buffer("queue", torch.randn(4, 4))
    saved = {**saved_by_mmcv(Holder(module=model)), "epoch": 200, "arch": "resnet50"}
    return saved, encoder


# Name -> (what the file holds, backbone, projector or None, head, layout)


def torchvision():
    model = resnet(fc=lambda inputs: nn.Linear(inputs, 1000))
    return model.state_dict(), model, None, None, "torchvision"


def torchvision_reference():
    model = resnet("resnet18", lambda inputs: nn.Linear(inputs, 1000))
    saved = {"model": model.state_dict(), "model_ema": resnet().state_dict(), "args": argparse.Namespace(lr=0.1, a=[1])}
    return saved, model, None, None, "torchvision"


def moco_v1():
    saved, encoder = moco(lambda inputs: nn.Linear(inputs, OUTPUTS))
    return saved, encoder, None, None, "MoCo"


def moco_v2():
    saved, encoder = moco(
        lambda inputs: nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))
    )
    return saved, encoder, encoder.fc, "moco", "MoCo"


def moco_classifier():
    """What MoCo's linear classification saves."""
    model = resnet(fc=lambda inputs: nn.Linear(inputs, 10))
    return {"epoch": 3, "state_dict": Holder(module=model).state_dict()}, model, None, None, "torchvision"


def dino_backbone():
    model = resnet()
    return model.state_dict(), model, None, None, "torchvision"


def dino(wrapped):
    def make():
        head = Holder(mlp=nn.Sequential(nn.Linear(512, 8), nn.GELU(), nn.Linear(8, 4)), last_layer=nn.Linear(4, 9))
        teacher, student = Holder(backbone=resnet(), head=head), Holder(backbone=resnet("resnet18"), head=head)
        saved = {
            "student": Holder(module=student).state_dict(),
            "teacher": (Holder(module=teacher) if wrapped else teacher).state_dict(),
            "epoch": 100,
            "args": argparse.Namespace(arch="resnet50", local_crops_scale=(0.05, 0.14), output_dir="."),
            "dino_loss": {"center": torch.zeros(1, 9)},
        }
        return saved, teacher.backbone, None, None, "DINO"

    return make


def openselfsup_extracted():
    model = resnet()
    return {"state_dict": model.state_dict(), "author": "OpenSelfSup"}, model, None, None, "torchvision"


def openselfsup(head, neck):
    """As SimCLR is saved, and what MMSelfSup 1 makes of the others."""

    def make():
        model = Holder(backbone=resnet(), neck=trained(neck()))
        return saved_by_mmcv(model), model.backbone, model.neck, head, "OpenSelfSup"

    return make


def openselfsup_supervised():
    model = Holder(backbone=resnet(), head=nn.Linear(512, 10))
    return saved_by_mmcv(model), model.backbone, None, None, "OpenSelfSup"


def openselfsup_moco():
    body, neck = resnet(), moco_neck(512)
    other = nn.Sequential(resnet("resnet18"), moco_neck(512))
    model = Holder(encoder_q=nn.Sequential(body, neck), encoder_k=other, backbone=body, neck=neck)
    del model.neck  # OpenSelfSup's MoCo names only the backbone twice
    return saved_by_mmcv(model), body, neck, "moco", "OpenSelfSup's MoCo"


def openselfsup_byol():
    model = online(trained(byol_neck(512, bias=True)))
    return saved_by_mmcv(model), model.backbone, model.neck, "byol+bias", "ORL, or OpenSelfSup's BYOL"


def official_orl(neck):
    """The released configs use SimCLR's neck without its last BatchNorm."""

    def make():
        heads = {f"{name}_head": Numbered(OUTPUTS, True, False, False) for name in ("global", "local_intra")}
        model = online(trained(neck()), **heads)
        return saved_by_mmcv(model), model.backbone, model.neck, "byol", "ORL, or OpenSelfSup's BYOL"

    return make


CASES = {
    "torchvision": torchvision,
    "torchvision-reference": torchvision_reference,
    "moco-v1": moco_v1,
    "moco-v2": moco_v2,
    "moco-classifier": moco_classifier,
    "dino-backbone": dino_backbone,
    "dino-wrapped": dino(True),
    "dino": dino(False),
    "openselfsup-extracted": openselfsup_extracted,
    "openselfsup-supervised": openselfsup_supervised,
    "openselfsup-simclr": openselfsup("simclr", lambda: Numbered(512, False, False, True)),
    "openselfsup-simclr-bias": openselfsup("simclr", lambda: Numbered(512, True, True, True)),
    "openselfsup-byol-neck": openselfsup("byol", lambda: byol_neck(512)),
    "openselfsup-moco-neck": openselfsup("moco", lambda: moco_neck(512)),
    "openselfsup-moco": openselfsup_moco,
    "openselfsup-byol": openselfsup_byol,
    "mmselfsup-byol": openselfsup("byol+bias", lambda: Numbered(512, True, True, False)),
    "orl": official_orl(lambda: Numbered(512, True, False, False)),
    "orl-mlp": official_orl(lambda: byol_neck(512)),
}


def check(path, body, neck, head, layout):
    """What is read computes what the source modules do."""
    found = weights.read(path)
    assert found.recognised.startswith(f"layout {layout}, resnet")
    assert not found.encoder.training
    images = torch.randn(3, 3, 48, 56)
    body.eval()
    fc, body.fc = body.fc, nn.Identity()
    with torch.inference_mode():
        features, projected = found.encoder.backbone(images), found.encoder(images)
        expected = body(images)
        torch.testing.assert_close(features, expected)
        assert found.encoder.head == head
        if neck is None:
            torch.testing.assert_close(projected, expected)
        else:
            torch.testing.assert_close(projected, neck.eval()(expected))
            assert projected.shape == (3, OUTPUTS)
    body.fc = fc
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_layout_gives_what_its_modules_compute(name, tmp_path):
    saved, *expected = CASES[name]()
    torch.save(saved, tmp_path / "a.pth.tar")
    check(tmp_path / "a.pth.tar", *expected)
    torch.save(saved, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)  # as torch did before 1.6
    check(tmp_path / "a.ckpt", *expected)
    tensors = saved if "conv1.weight" in saved else saved.get("state_dict")
    if tensors:
        unshared = {key: value.clone() for key, value in tensors.items()}
        save_file(unshared, tmp_path / "a.safetensors")
        check(tmp_path / "a.safetensors", *expected)


@pytest.mark.parametrize("name", list(backbones.BLOCKS))
def test_the_backbone_is_found_by_its_shapes(name, tmp_path):
    model = resnet(name, lambda inputs: nn.Linear(inputs, 5))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = check(tmp_path / "a.pt", model, None, None, "torchvision")
    assert found.recognised == f"layout torchvision, {name}, no projector"
    assert found.encoder.network.backbone == name


def test_what_was_recognised_is_said(tmp_path):
    torch.save(official_orl(lambda: byol_neck(512))()[0], tmp_path / "a.pth")
    found = weights.read(tmp_path / "a.pth")
    assert found.recognised == "layout ORL, or OpenSelfSup's BYOL, resnet10, projector byol, 512-24-12"
    assert found.encoder.network == Network(backbone="resnet10", hidden=HIDDEN, projection=OUTPUTS)
    assert found.sha256 == artifacts.fingerprint(tmp_path / "a.pth")
    torch.save(moco_v1()[0], tmp_path / "a.pth")
    unknown = "a projector of unknown form, left out: 2 (encoder_q.fc.weight, encoder_q.fc.bias)"
    assert weights.read(tmp_path / "a.pth").recognised == f"layout MoCo, resnet10, {unknown}"


@pytest.mark.parametrize("head", ["byol", "simclr", "moco"])
def test_own_models(head, tmp_path):
    pair = Pair(Network(backbone="resnet10", hidden=16, projection=8), torch.Generator().manual_seed(0), head)
    pair.train().online(torch.randn(4, 3, 32, 32))
    stamp = artifacts.stamp(artifacts.MODEL, {}, {})
    ema.save(tmp_path / "model.safetensors", pair, stamp)
    backbones.save(tmp_path / "backbone.safetensors", "resnet10", pair.online.backbone, stamp)
    whole, body = (weights.read(tmp_path / f"{name}.safetensors") for name in ("model", "backbone"))
    assert (whole.encoder.head, body.encoder.head) == (head, None)
    for key, value in pair.online.state_dict().items():
        assert torch.equal(whole.encoder.state_dict()[key], value)
    for key, value in pair.online.backbone.state_dict().items():
        assert torch.equal(body.encoder.backbone.state_dict()[key], value)


def test_counters_that_old_files_lack_are_0(tmp_path):
    saved, *expected = openselfsup("byol", lambda: byol_neck(512))()
    saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if not k.endswith("num_batches_tracked")}
    torch.save(saved, tmp_path / "a.pth")
    found = check(tmp_path / "a.pth", *expected)
    counters = [value for key, value in found.encoder.state_dict().items() if key.endswith("num_batches_tracked")]
    assert len(counters) == 13
    assert not any(counters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_become_float32(dtype, tmp_path):
    model = resnet().to(dtype)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    found = check(tmp_path / "a.pth", model.float(), None, None, "torchvision")
    assert {value.dtype for value in found.encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "neck",
    [
        lambda: nn.Linear(512, OUTPUTS),
        lambda: Mlp(nn.Linear(512, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)),  # no ReLU between them
        lambda: Mlp(nn.Linear(512, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9)),
        lambda: moco_neck(256),  # of other features
        lambda: Holder(fc0=nn.Linear(512, 9), bn0=nn.BatchNorm1d(9, affine=False), fc1=nn.Linear(9, 9)),
        lambda: Holder(conv=nn.Conv2d(512, 9, 1)),
    ],
)
def test_projectors_of_other_forms_are_left_out(neck, tmp_path):
    model = Holder(backbone=resnet(), neck=neck())
    torch.save(saved_by_mmcv(model), tmp_path / "a.pth")
    found = check(tmp_path / "a.pth", model.backbone, None, None, "OpenSelfSup")
    assert "a projector of unknown form, left out: " in found.recognised


# Bad files


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


BAD = {
    "missing": (
        lambda: without(resnet().state_dict(), "bn1.running_var", "layer4.0.conv1.weight"),
        r"none of resnet10, resnet18, resnet50; against resnet10, the nearest, "
        r"keys missing: 2 \(bn1\.running_var, layer4\.0\.conv1\.weight\); extra: none; name another file\.",
    ),
    "extra": (
        lambda: {**resnet().state_dict(), "layer1.0.se.weight": torch.ones(2)},
        r"keys missing: none; extra: 1 \(layer1\.0\.se\.weight\); name another file\.",
    ),
    "resnet34": (
        lambda: resnet("resnet34").state_dict(),
        r"keys missing: none; extra: 80 \(layer1\.2\.conv1\.weight, layer1\.2\.bn1\.weight, layer1\.2\.bn1\.bias, "
        r"\.\.\.\); name another file\.",
    ),
    "wide": (
        lambda: resnet("wide_resnet50_2").state_dict(),
        r"its shapes are of no known backbone \(resnet10, resnet18, resnet50\): layer1\.0\.conv1\.weight is "
        r"\[128, 64, 1, 1\], not \[64, 64, 1, 1\]; name another file\.",
    ),
    "other": (
        lambda: {"blocks.0.attn.weight": torch.ones(2, 2)},
        r"holds no ResNet in a known layout \(.*DINO.*\); tensors found: 1 \(blocks\.0\.attn\.weight\); name another",
    ),
    "list": (lambda: [torch.ones(2)], "tensors found: none;"),
    "empty": (dict, "tensors found: none;"),
    "sparse": (
        lambda: {**resnet().state_dict(), "conv1.weight": torch.zeros(64, 3, 7, 7).to_sparse()},
        r"keys missing: 1 \(conv1\.weight\)",
    ),
    "nan": (
        lambda: {**resnet().state_dict(), "bn1.bias": torch.full((64,), float("nan"))},
        r"not finite \(in backbone\.bn1\.bias\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_do_not_fit_are_named(name, tmp_path):
    content, sentence = BAD[name]
    torch.save(content(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=sentence) as error:
        weights.read(tmp_path / "a.pth")
    assert str(error.value).startswith(f"{tmp_path}/a.pth: ")
    assert "\n" not in str(error.value)


def whole_file(path):
    torch.save(resnet().state_dict(), path, _use_new_zipfile_serialization=not path.name.startswith("old"))
    if path.suffix == ".safetensors":
        save_file(resnet().state_dict(), path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.pth", "old.pth", "a.safetensors"])
@pytest.mark.parametrize("share", [0, 1e-6, 0.01, 0.5, 0.999])
def test_truncated_files_are_named(name, share, tmp_path):
    path = tmp_path / name
    content = whole_file(path)
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=f"{name}: damaged or no .*; fetch it again\\.$"):
        weights.read(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"version https://git-lfs", b"words and words\n", b"\0" * 99])
def test_files_of_something_else_are_named(content, suffix, tmp_path):
    path = (tmp_path / "a").with_suffix(suffix)
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"a{suffix}: damaged or no .*; fetch it again\\.$"):
        weights.read(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for path, reason in ((tmp_path / "missing.pth", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"^{path}: cannot be read \\({reason}\\); name a file of weights\\.$"):
            weights.read(path)


def hostile(header, data=b"\0" * 64, length=None):
    """A safetensors file that says of itself what is not so."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "header without end": hostile({}, length=2**64 - 1),
    "header longer than the file": hostile({}, length=2**20),
    "deep header": hostile(b'{"__metadata__":' + b"[" * 10**6),
    "no mapping": hostile([1, 2]),
    "outside the file": hostile({"conv1.weight": tensor(0, 2**40, [2**38])}),
    "backwards": hostile({"conv1.weight": tensor(64, 0, [16])}),
    "overlap": hostile({"conv1.weight": tensor(0, 64, [16]), "bn1.weight": tensor(32, 64, [8])}),
    "overflow": hostile({"conv1.weight": tensor(0, 64, [2**62, 2**62])}),
    "odd type": hostile({"conv1.weight": tensor(0, 64, [16], "PICKLE")}),
    "negative": hostile({"conv1.weight": tensor(0, 64, [-16])}),
    "metadata": hostile({"__metadata__": {"orl": "[" * 10**6}, "conv1.weight": tensor(0, 64, [16])}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_one_sentence(name, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[name])
    for read in (weights.read, artifacts.attributes, artifacts.read_weights, backbones.load):
        if (name, read) != ("metadata", weights.read):  # a sound file but for what it does not look at
            with pytest.raises(InputError, match=f"^{path}: ") as error:
                read(path)
            assert "\n" not in str(error.value)


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("where", ["zip", "old", "namespace", "pickle2", "pickle4"])
def test_code_in_a_file_does_not_run(where, tmp_path):
    path, trace = tmp_path / "a.pth", tmp_path / "ran"
    content = {"state_dict": resnet().state_dict(), "more": Runs(trace)}
    if where == "namespace":
        content["more"] = argparse.Namespace(more=Runs(trace))
    if where.startswith("pickle"):
        path.write_bytes(pickle.dumps(Runs(trace), protocol=int(where[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "old")
    with pytest.raises(InputError, match=r"a\.pth: (would run code|damaged)") as error:
        weights.read(path)
    assert "\n" not in str(error.value)
    assert not trace.exists()
    if where == "zip":
        assert "mkdir" in str(error.value)
        torch.load(path, weights_only=False)  # it would have
        assert trace.exists()


def test_a_whole_module_is_no_file_of_weights(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"would run code .*torch\.nn\.modules\.linear\.Linear.*export its state_dict"):
        weights.read(tmp_path / "a.pth")
