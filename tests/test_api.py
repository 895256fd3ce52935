"""`import orl`: equal to what the commands write for the same photos and weights, with any backbone, and light."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import orl
from orl import InputError, artifacts, cli, config
from orl.networks import backbones
from orl.networks.ema import load_encoder
from orl.report.figures import COLORS

PROJECT = Path(__file__).parents[1]
RUN = Path("results/scenes")
SETTINGS = {
    "name": "scenes",
    "data": {"scenes": {"train": 9, "val": 1, "objects_train": 1, "objects_val": 1, "size": [80, 96]}},
    "stage1": {"network": {"backbone": "resnet10", "hidden": 16, "projection": 8}},
    "proposals": {"min_size": 24, "top_n": 20},
    "neighbors": {"k": 2},
    "rois": {"size": 64},
    "embeddings": {"resize": 72, "crop": 64},
    "correspondences": {"ratio": 0.2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run on a few scenes with random weights, up to its pairs."""
    home = tmp_path_factory.mktemp("home")
    results = home / RUN
    artifacts.write_json(results / "config.json", SETTINGS)
    photos = ["--root", results / "scenes", "--manifest", results / "manifest.csv"]
    model = {name: results / "models" / "orl" / f"{name}.safetensors" for name in ("model", "backbone")}
    stage2 = {
        name: results / f"{name}.h5" for name in ("embeddings", "proposals", "neighbors", "rois", "correspondences")
    }

    def command(line, output, *arguments):
        named = ["--settings", results / "config.json", "--output", output, "--threads", 1]
        cli.main([*line.split(), *map(str, [*named, *arguments])])

    command("scenes", results / "scenes")
    command("manifest", results / "manifest.csv", *photos[:2], "--rejected", results / "rejected.csv")
    command("pretrain --stage random", results / "models" / "orl")
    command("embed", stage2["embeddings"], *photos, "--model", model["model"])
    command("propose", stage2["proposals"], *photos)
    command("neighbors", stage2["neighbors"], *photos[2:], "--embeddings", stage2["embeddings"])
    command("rois", stage2["rois"], *photos, "--proposals", stage2["proposals"], "--backbone", model["backbone"])
    made_from = [part for name in ("neighbors", "proposals", "rois") for part in (f"--{name}", stage2[name])]
    command("correspond", stage2["correspondences"], *photos[2:], *made_from)
    return home


@pytest.fixture
def home(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def photos(home):
    return sorted((RUN / "scenes" / "train2017").glob("*.jpg"))


@pytest.fixture(scope="module")
def loaded(made):
    return orl.load_backbone(made / RUN / "models" / "orl" / "backbone.safetensors")


@pytest.fixture
def backbone(loaded):
    return copy.deepcopy(loaded)


def test_import_orl_loads_nothing_heavy():
    heavy = ["torch", "numpy", "PIL", "cv2", "matplotlib", "h5py", "pydantic"]
    code = f"import orl, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = orl.nothing


def test_embed_makes_the_rows_of_embeddings_h5(photos):
    encoder = load_encoder(RUN / "models" / "orl" / "model.safetensors")
    found = orl.embed(encoder, photos, RUN / "config.json")
    expected = artifacts.read_embeddings(RUN / "embeddings.h5").embedding
    assert (found.dtype, found.shape) == (np.float32, (9, 8))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_correspond_makes_the_pairs_of_correspondences_h5(photos, backbone):
    proposals = artifacts.read_proposals(RUN / "proposals.h5")
    found = artifacts.read_correspondences(RUN / "correspondences.h5")
    for row in range(2):
        for slot, other in enumerate(found.neighbor[row].tolist()):
            first, last = found.pair_offsets[2 * row + slot : 2 * row + slot + 2]
            pairs = orl.correspond(backbone, photos[row], photos[other], RUN / "config.json")
            for number, (one, boxes) in enumerate(((row, pairs.a), (other, pairs.b))):
                own = proposals.box[proposals.box_offsets[one] :][found.pair[first:last, number]]
                np.testing.assert_array_equal(boxes, own)
            np.testing.assert_allclose(pairs.similarity, found.similarity[first:last], atol=1e-3)  # float16 there
            assert last - first == max(1, int(0.2 * np.diff(proposals.box_offsets)[row]))


def test_paths_pil_images_and_arrays_are_the_same(photos, backbone):
    images = [Image.open(path) for path in photos]
    arrays = [np.array(image) for image in images]
    settings = {"embeddings": {"resize": 40, "crop": 32}, "rois": {"size": 32}, "proposals": {"min_size": 24}}
    expected = orl.embed(backbone, photos, settings)
    for same in (images, arrays, iter(map(str, photos))):
        np.testing.assert_array_equal(orl.embed(backbone, same, settings), expected)
    ids = photos[0].stem, photos[1].stem
    pairs = orl.correspond(backbone, photos[0], photos[1], settings)
    for a, b in (images[:2], arrays[:2]):
        for part, other in zip(pairs, orl.correspond(backbone, a, b, settings, ids=ids), strict=True):
            np.testing.assert_array_equal(part, other)


class Map(nn.Module):
    """A map [N, C, h, w] of a torchvision ResNet, whose vector is the mean of it."""

    def __init__(self, resnet):
        super().__init__()
        self.layers = nn.Sequential(*list(resnet.children())[:-2])

    def forward(self, x):
        return self.layers(x)


def test_any_backbone_that_makes_maps_or_vectors(photos, backbone):
    """Those of torchvision and timm with the same weights, and a timm ViT with its own mean and std."""
    models, timm = pytest.importorskip("torchvision.models"), pytest.importorskip("timm")
    state = backbone.state_dict()
    resnet = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    resnet.load_state_dict(state, strict=False)
    same = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=0)
    same.load_state_dict(state)
    settings = {"embeddings": {"resize": 72, "crop": 64}}
    expected = orl.embed(backbone, photos, settings)
    for other in (Map(resnet), same):
        np.testing.assert_allclose(orl.embed(other, photos, settings), expected, atol=1e-5)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    of_vit = {"mean": vit.pretrained_cfg["mean"], "std": vit.pretrained_cfg["std"]}
    assert of_vit["mean"] == (0.5, 0.5, 0.5)
    found = orl.embed(vit, photos[:2], **of_vit)
    pixels = np.stack([np.array(Image.open(path).resize((224, 224))) for path in photos[:2]])
    assert found.shape == (2, 192)
    assert abs(found - orl.embed(vit, photos[:2])).max() > 1e-3  # ImageNet's
    square = orl.embed(vit, list(pixels), {"embeddings": {"resize": 224}}, **of_vit)
    with torch.inference_mode():
        ours = vit.eval()(torch.tensor(pixels / 127.5 - 1).permute(0, 3, 1, 2).float()).numpy()
    np.testing.assert_allclose(square, ours / np.linalg.norm(ours, axis=1, keepdims=True), atol=1e-5)
    pairs = orl.correspond(vit, *photos[:2], {"proposals": {"method": "grid", "min_size": 64, "top_n": 4}}, **of_vit)
    assert len(pairs.similarity) == 1


def test_a_backbone_is_left_as_it_was(photos, backbone):
    """A model in training has statistics that pictures would change, and modes that differ from part to part."""
    backbone.train()
    backbone.bn1.eval()
    modes, before = [part.training for part in backbone.modules()], backbone.bn1.running_mean.clone()
    found = orl.embed(backbone, photos[:2])
    assert [part.training for part in backbone.modules()] == modes
    assert torch.equal(backbone.bn1.running_mean, before)
    np.testing.assert_array_equal(found, orl.embed(backbone.eval(), photos[:2]))


def test_many_photos_go_in_batches(photos, backbone):
    settings = {"embeddings": {"resize": 32, "crop": 32}}
    found = orl.embed(backbone, photos * 15, settings)
    np.testing.assert_allclose(found, np.tile(orl.embed(backbone, photos, settings), (15, 1)), atol=1e-5)


def test_any_file_of_weights_is_a_backbone(home, backbone, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {f"module.encoder_q.{key}": value for key, value in backbone.state_dict().items()}}, file)
    for path in (file, str(RUN / "models" / "orl" / "model.safetensors")):
        found = orl.load_backbone(path)
        assert isinstance(found, backbones.ResNet)
        assert not found.training
        assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in found.state_dict().items())


def test_what_is_drawn(photos, backbone):
    settings = {"proposals": {"min_size": 24}, "rois": {"size": 32}, "correspondences": {"ratio": 0.3}}
    pairs = orl.correspond(backbone, photos[0], photos[1], settings)
    assert len(pairs.similarity) >= 2
    drawn = orl.draw(photos[0], photos[1], pairs, side=300)
    (width, height), (w, h) = drawn.size, Image.open(photos[0]).size
    assert width >= 600 * min(w, h) / max(w, h)
    assert height <= 301
    present = {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in drawn.getcolors(width * height)}
    assert set(COLORS[: len(pairs.similarity)]) <= present
    # The left edge of the best box, in its colour
    x, y, _, tall = (value * 300 / max(w, h) for value in pairs.a[0].tolist())
    top = (height - h * 300 / max(w, h)) / 2
    column = np.array(drawn)[round(top + y + 25) : round(top + y + tall - 3), round(x) : round(x) + 3]
    color = np.array([int(COLORS[0][at : at + 2], 16) for at in (1, 3, 5)])
    assert (column == color).all(2).mean() > 0.5
    none = orl.draw(photos[0], photos[1], orl.api.Pairs(*(part[:0] for part in pairs)), side=300)
    assert none.size == drawn.size


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda net, a: orl.load_backbone("missing.pth"), "missing.pth: cannot be read"),
        (lambda net, a: orl.embed(net, a), "images: is a single photo; put it into a list"),
        (lambda net, a: orl.embed(net, []), "images: is empty"),
        (lambda net, a: orl.embed(net, [a, "missing.jpg"]), "missing.jpg: no such file; name a photo"),
        (lambda net, a: orl.embed(net, [RUN / "config.json"]), "config.json: not a JPEG, PNG or WebP image"),
        (lambda net, a: orl.embed(net, [a, 3]), "photo 1: is int; give a path, a PIL image or a uint8 array"),
        (lambda net, a: orl.embed(net, np.zeros((5, 6, 3), np.uint8)), "photo 0: is an array of uint8 [6, 3]"),
        (lambda net, a: orl.embed(net, np.zeros((1, 5, 6, 3))), "photo 0: is an array of float64 [5, 6, 3]"),
        (lambda net, a: orl.embed("resnet50", [a]), "the backbone: is str; give a torch module"),
        (lambda net, a: orl.embed(net, [a], mean=(0.5,)), "mean and std: are [0.5] and [0.229"),
        (lambda net, a: orl.embed(net, [a], {"embeddings": {"sise": 1}}), "settings: unknown key 'embeddings.sise'"),
        (lambda net, a: orl.embed(net, [a], "missing.yaml"), "missing.yaml: cannot read the settings"),
        (lambda net, a: orl.embed(nn.Flatten(2), [a]), "the backbone: makes [1, 3, 50176] of [1, 3, 224, 224]; give"),
        (lambda net, a: orl.correspond(net, a, None), "the second photo: is NoneType; give a path"),
        (lambda net, a: orl.correspond(net, a, a, {"correspondences": {"method": "random"}}), "settings: correspond"),
        (lambda net, a: orl.draw(a, a, orl.api.Pairs(np.array([[0, 0, 9, 9]]), np.array([[0, 0, 999, 9]]), [1])),
         "pairs: has boxes outside of the second photo"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, sentence, photos, backbone):
    with pytest.raises(InputError) as caught:
        call(backbone, photos[0])
    assert sentence in str(caught.value)
    assert re.fullmatch(r"[^\n]+[.?]", str(caught.value))


def test_weights_that_are_not_finite_are_named(photos, backbone):
    with torch.no_grad():
        backbone.conv1.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=f"the backbone: gives features that are not finite for {photos[0]}"):
        orl.embed(backbone, photos[:1])


@pytest.mark.parametrize("page", ["README.md", "docs/guides/python.md"])
def test_the_example_of_a_page_runs(home, page):
    """As it stands there, in the folder of a run."""
    code = re.search(r"```python\n(import orl\n.*?|from pathlib .*?)```", (PROJECT / page).read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names["features"].shape[1] == 512
    assert Image.open("pairs.png").size[0] > 500
    assert json.loads((RUN / "config.json").read_text()) == SETTINGS
    assert config.load(str(RUN / "config.json")).rois.size == 64
    os.unlink("pairs.png")
