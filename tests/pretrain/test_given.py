import json

import pytest
import torch
from torch import nn

from orl import artifacts, cli
from orl.discovery.embed import embed
from orl.networks import backbones, ema
from orl.networks.heads import mlp


def encoder(head=None):
    """A resnet10, and a projector where a head is named, with running statistics of their own."""
    torch.manual_seed(0)
    body = backbones.backbone("resnet10")
    neck = mlp(body.features, 16, 8, head) if head else nn.Identity()
    model = nn.Sequential(body, neck)
    model.train()(torch.randn(4, 3, 40, 40))
    return model.eval()


def save(path, model):
    """As the authors' release does."""
    names = {"0.": "online_net.0.", "1.": "online_net.1.mlp."}
    state = {names[key[:2]] + key[2:]: value for key, value in model.state_dict().items()}
    torch.save({"meta": {"epoch": 800}, "state_dict": state}, path)
    return path


def pretrain(path, output, capsys, **more):
    """Exit status and the lines on stderr of the command; neither photos nor a manifest are named."""
    settings = {"stage1": {"weights": str(path)}, **more}
    status = 0
    try:
        cli.main(["pretrain", "--stage", "stage1", "--settings", json.dumps(settings), "--output", str(output)])
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err.splitlines()


def test_the_command_writes_what_training_would(tmp_path, capsys):
    model = encoder("byol")
    path, output = save(tmp_path / "orl.pth", model), tmp_path / "stage1"
    status, lines = pretrain(path, output, capsys)
    assert (status, lines) == (
        0,
        [f"stage1: no training; {path}: layout ORL, or OpenSelfSup's BYOL, resnet10, projector byol, 512-16-8"],
    )
    assert sorted(file.name for file in output.iterdir()) == [
        "backbone.safetensors",
        "metrics.csv",
        "model.safetensors",
    ]
    assert (output / "metrics.csv").read_text() == "epoch,step,loss,feature_std,lr\n"
    images = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        torch.testing.assert_close(backbones.load(output / "backbone.safetensors")(images), model[0](images))
        torch.testing.assert_close(ema.load_encoder(output / "model.safetensors")(images), model(images))
    for name in ("backbone", "model"):
        found = artifacts.attributes(output / f"{name}.safetensors")
        assert json.loads(found["inputs"]) == {"weights": artifacts.fingerprint(path)}  # the SHA-256 of its bytes
        assert json.loads(found["settings"])["stage1"]["weights"] == str(path)


def test_without_a_projector_embeddings_are_pooled_features(tmp_path, capsys, photos, manifest_path, tiny):
    model = encoder()
    path, output = tmp_path / "plain.pth", tmp_path / "stage1"
    torch.save(model[0].state_dict(), path)
    status, (line,) = pretrain(path, output, capsys)
    assert status == 0
    assert line.endswith(f"{path}: layout torchvision, resnet10, no projector; embeddings will be its pooled features")
    assert artifacts.attributes(output / "model.safetensors")["head"] == ""
    embed(tiny, str(photos), str(manifest_path), str(output / "model.safetensors"), str(tmp_path / "e.h5"))
    assert artifacts.read_embeddings(tmp_path / "e.h5").embedding.shape == (10, 512)


def test_equal_weights_make_equal_files_and_others_another_fingerprint(tmp_path, capsys):
    path = save(tmp_path / "orl.pth", encoder("byol"))
    for name in ("first", "again"):
        assert pretrain(path, tmp_path / name, capsys)[0] == 0
    save(path, encoder("moco"))
    assert pretrain(path, tmp_path / "other", capsys)[0] == 0
    for file in ("backbone.safetensors", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        prints = {artifacts.fingerprint(tmp_path / name / file) for name in ("first", "other")}
        assert len(prints) == 2


@pytest.mark.parametrize("spoil", ["missing", "truncated", "misfit"])
def test_bad_weights_are_one_sentence_and_nothing_is_written(spoil, tmp_path, capsys):
    path = save(tmp_path / "orl.pth", encoder("byol"))
    if spoil == "missing":
        path.unlink()
    elif spoil == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, path)
    status, (line,) = pretrain(path, tmp_path / "stage1", capsys)
    assert status == 2
    assert line.startswith(f"orl pretrain: {path}: ")
    assert not (tmp_path / "stage1").exists()
