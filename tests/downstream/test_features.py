from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from orl import InputError, artifacts
from orl.data.labels import Labels
from orl.downstream.features import BATCH, extract, pool
from orl.networks import backbones


def save_random(path: Path, name: str) -> backbones.ResNet:
    """A random backbone with running statistics that are not the default ones."""
    torch.manual_seed(0)
    model = backbones.backbone(name)
    model.train()(torch.randn(4, 3, 64, 64))
    backbones.save(path, name, model, artifacts.stamp(artifacts.MODEL, {}, {}))
    return model.eval()


def photos(folder: Path, sizes: Sequence[tuple[int, int]]) -> Labels:
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(sizes):
        coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
        paths.append(folder / f"{number:03d}.png")
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    ids = tuple(path.stem for path in paths)
    return Labels(tuple(paths), ids, ("thing",), np.ones((len(ids), 1), np.int8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "backbone.safetensors"
    save_random(path, "resnet10")
    return path


def test_as_torchvision(tmp_path: Path) -> None:
    """Resize, squash, backbone and 6 x 6 pooling against torchvision at 224 px."""
    path = tmp_path / "backbone.safetensors"
    save_random(path, "resnet18")
    labels = photos(tmp_path, [(300, 400), (500, 333), (224, 224), (640, 256), (101, 90)])
    found = extract(path, labels, 224, 256, "ignore", 0)

    reference = torchvision.models.resnet18(weights=None)
    assert reference.load_state_dict(artifacts.read_weights(path), strict=False).missing_keys == [
        "fc.weight",
        "fc.bias",
    ]
    maps: list[torch.Tensor] = []
    reference.eval().layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))
    short = torchvision.transforms.Resize(256)
    tensor = torchvision.transforms.ToTensor()
    mean_std = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        for image_path in labels.image_path:
            squashed = short(Image.open(image_path)).resize((224, 224), Image.Resampling.BILINEAR)
            reference(mean_std(tensor(squashed))[None])
        pooled = torch.nn.functional.avg_pool2d(torch.cat(maps), 6, 1)
    assert found.shape == (5, 512 * 2 * 2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, pooled.flatten(1).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "width"), [(32, 512), (48, 2048), (96, 2048)])
def test_small_sizes(tmp_path: Path, weights: Path, size: int, width: int) -> None:
    assert extract(weights, photos(tmp_path, [(60, 50)]), size, size, "ignore", 0).shape == (1, width)


def test_pool_is_the_mean_of_each_corner() -> None:
    maps = torch.arange(18.0).view(1, 2, 3, 3)
    expected = [maps[0, c, y : y + 2, x : x + 2].mean() for c in (0, 1) for y in (0, 1) for x in (0, 1)]
    assert pool(maps).tolist() == [expected]


def test_order_and_workers(tmp_path: Path, weights: Path) -> None:
    labels = photos(tmp_path, [(40 + n, 70 - n) for n in range(BATCH + 3)])
    alone = extract(weights, labels, 32, 36, "ignore", 0)
    assert len(alone) == BATCH + 3
    np.testing.assert_array_equal(alone, extract(weights, labels, 32, 36, "ignore", 2))
    last = Labels(labels.image_path[-1:], labels.image_id[-1:], labels.classes, labels.label[-1:])
    np.testing.assert_allclose(extract(weights, last, 32, 36, "ignore", 0)[0], alone[-1], rtol=1e-4, atol=1e-5)


def test_exif_is_passed_on(tmp_path: Path, weights: Path) -> None:
    labels = photos(tmp_path, [(60, 40)])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    Image.open(labels.image_path[0]).save(turned, exif=exif, quality=95)
    labels = Labels((turned,), ("turned",), labels.classes, labels.label)
    ignored, applied = (extract(weights, labels, 64, 64, exif, 0) for exif in ("ignore", "apply"))
    assert np.abs(ignored - applied).max() > 1e-2


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_photo(tmp_path: Path, weights: Path, workers: int) -> None:
    labels = photos(tmp_path, [(40, 40)] * 3)
    labels.image_path[1].write_bytes(labels.image_path[1].read_bytes()[:60])
    with pytest.raises(InputError, match=r"001\.png") as error:
        extract(weights, labels, 32, 32, "ignore", workers)
    assert "Error" not in str(error.value).splitlines()[-1].removeprefix("orl.data.decode.UndecodableError")


def test_features_not_finite(tmp_path: Path) -> None:
    model = save_random(tmp_path / "backbone.safetensors", "resnet10")
    with torch.no_grad():
        model.layer4[0].bn2.bias[3] = float("inf")
    backbones.save(tmp_path / "bad.safetensors", "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    with pytest.raises(InputError, match=r"bad\.safetensors: its features of .*000\.png are not finite"):
        extract(tmp_path / "bad.safetensors", photos(tmp_path, [(40, 40)]), 32, 32, "ignore", 0)


def test_weights_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors"):
        extract(tmp_path / "none.safetensors", photos(tmp_path, [(40, 40)]), 32, 32, "ignore", 0)
