from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from orl import InputError, artifacts
from orl.data.labels import Labels
from orl.downstream import features
from orl.downstream.features import BATCH, TestPhotos, pool, squash
from orl.networks import backbones


def save_random(path: Path, name: str) -> backbones.ResNet:
    """A random backbone with running statistics that are not the default ones."""
    torch.manual_seed(0)
    model = backbones.backbone(name)
    model.train()(torch.randn(4, 3, 64, 64))
    backbones.save(path, name, model, artifacts.stamp(artifacts.MODEL, {}, {}))
    return model.eval()


def extract(path: Path, labels: Labels, size: int, resize: int, exif: str, workers: int, *stages: int) -> np.ndarray:
    """The SVM's features of some stages (the fifth), side by side."""
    found = TestPhotos("", labels.image_path, squash, resize, size, exif)  # type: ignore[arg-type]
    batches = features.extract(path, found, features.by_stage(stages or (5,)), workers)
    return np.concatenate([np.concatenate(batch, 1) for batch in batches])


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
    found = extract(path, labels, 224, 256, "ignore", 0, 1, 2, 3, 4, 5)

    reference = torchvision.models.resnet18(weights=None)
    assert reference.load_state_dict(artifacts.read_weights(path), strict=False).missing_keys == [
        "fc.weight",
        "fc.bias",
    ]
    maps: list[list[torch.Tensor]] = [[], [], [], [], []]
    layers = (reference.relu, reference.layer1, reference.layer2, reference.layer3, reference.layer4)
    for kept, layer in zip(maps, layers, strict=True):
        layer.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
    reference.eval()
    short = torchvision.transforms.Resize(256)
    tensor = torchvision.transforms.ToTensor()
    mean_std = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        for image_path in labels.image_path:
            squashed = short(Image.open(image_path)).resize((224, 224), Image.Resampling.BILINEAR)
            reference(mean_std(tensor(squashed))[None])
    assert found.dtype == np.float32
    widths = [64 * 144, 64 * 36, 128 * 16, 256 * 9, 512 * 4]  # of a ResNet-50: 9216, 9216, 8192, 9216, 8192
    kernels = ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0))  # of the release
    columns = np.split(found, np.cumsum(widths)[:-1], axis=1)
    for kept, columns_of, kernel in zip(maps, columns, kernels, strict=True):
        pooled = torch.nn.functional.avg_pool2d(torch.cat(kept), *kernel).flatten(1).numpy()
        np.testing.assert_allclose(columns_of, pooled, rtol=1e-4, atol=2e-3)  # pixels differ by 2 at most


@pytest.mark.parametrize(("size", "width"), [(32, 512), (48, 2048), (96, 2048)])
def test_small_sizes(tmp_path: Path, weights: Path, size: int, width: int) -> None:
    assert extract(weights, photos(tmp_path, [(60, 50)]), size, size, "ignore", 0).shape == (1, width)


def test_pool_is_the_mean_of_each_corner() -> None:
    maps = torch.arange(18.0).view(1, 2, 3, 3)
    expected = [maps[0, c, y : y + 2, x : x + 2].mean() for c in (0, 1) for y in (0, 1) for x in (0, 1)]
    assert pool(maps, 5).flatten(1).tolist() == [expected]


@pytest.mark.parametrize(("size", "sides"), [(32, (12, 6, 4, 2, 1)), (64, (12, 6, 4, 3, 2)), (448, (12, 6, 4, 3, 2))])
def test_other_sizes_are_pooled_to_as_many_parts_as_there_can_be(size: int, sides: tuple[int, ...]) -> None:
    for stage, side in enumerate(sides, 1):
        maps = torch.ones(1, 2, size >> stage, size >> stage)
        found = pool(maps, stage)
        assert found.shape == (1, 2, side, side)
        torch.testing.assert_close(found, torch.ones_like(found))


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


def test_files_of_features(tmp_path: Path, weights: Path) -> None:
    """What `orl features` writes: stages of labelled photos, or unit rows of a labelled set."""
    from orl import config
    from orl.data.classes import ClassSet
    from orl.data.labels import listed

    settings = config.parse({"downstream": {"voc07_svm": {"size": 32, "resize": 36, "stages": [2, 5]}}})
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train, test = photos(tmp_path / "a", [(40, 50)] * 3), photos(tmp_path / "b", [(60, 50)] * 2)
    path = tmp_path / "features.h5"
    features.write_labels(settings, weights, path, 0, train, test)
    found = artifacts.read_features(path, [5, 2])
    for stage in (2, 5):
        np.testing.assert_array_equal(found.train[stage], extract(weights, train, 32, 36, "ignore", 0, stage))
        np.testing.assert_array_equal(found.test[stage], extract(weights, test, 32, 36, "ignore", 0, stage))
    artifacts.check_input(path, "photo list", listed(train, test))
    artifacts.check_input(path, "weights", artifacts.fingerprint(weights))
    with pytest.raises(InputError, match=r"features\.h5: damaged or not such a file"):
        artifacts.read_features(path, [3])
    before = path.read_bytes()
    features.write_labels(settings, weights, path, 1, train, test)
    assert path.read_bytes() == before

    names = [np.array([path.name for path in labels.image_path]) for labels in (train, test)]
    split = [ClassSet(tmp_path / folder, own, np.arange(len(own)) % 2, ("x", "y"))
             for folder, own in zip("ab", names, strict=True)]  # fmt: skip
    settings = config.parse({"downstream": {"sets": {"toy": {}}, "knn": {"size": 32, "resize": 36}}})
    features.write_set(settings, "toy", weights, tmp_path / "toy.h5", 0, *split)
    rows = artifacts.read_class_features(tmp_path / "toy.h5")
    assert (rows.train.shape, rows.val.shape, rows.val.dtype) == ((3, 512), (2, 512), np.float16)
    np.testing.assert_allclose(np.linalg.norm(rows.train.astype(float), axis=1), 1, atol=1e-3)
    with pytest.raises(InputError, match=r"holds 'orl\.class_features/1'"):
        artifacts.read_features(tmp_path / "toy.h5", [5])
