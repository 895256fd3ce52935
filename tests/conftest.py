"""Photos, their manifest, settings and a model small enough for tests; never changed by a test, only copied."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as orl's commands do, before torch is loaded

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image, ImageDraw

from orl import artifacts, config, gpus

# Always the same examples, and no clock: the machine may be busy.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

SIZES = [(96, 72), (72, 97), (120, 80), (81, 81), (100, 64), (64, 100), (110, 90), (77, 65), (90, 120), (128, 70)]


@pytest.fixture(scope="session", autouse=True)
def _one_gpu(tmp_path_factory):
    """Commands that tests call in this process use one GPU at most, and wait for no other process of tests."""
    count = gpus.count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "FOLDER", tmp_path_factory.mktemp("gpus"))
        patch.setattr(gpus, "count", lambda: min(1, count()))
        yield


def _photo(number: int, width: int, height: int) -> Image.Image:
    """A gradient with noise and a few rectangles and ellipses, so that selective search finds something."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    base = np.stack([40 + x * 120 // width, 60 + y * 90 // height, 150 - (x + y) * 80 // (width + height)], -1)
    image = Image.fromarray((base + rng.integers(0, 12, base.shape)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse, draw.rectangle, draw.ellipse):
        w, h = rng.integers(20, 45, 2).tolist()
        x0, y0 = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        shape((x0, y0, x0 + w, y0 + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of ten JPEGs, half of them in a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for number, (width, height) in enumerate(SIZES):
        path = folder / ("more" if number % 2 else ".") / f"{number:012d}.jpg"
        _photo(number, width, height).save(path, quality=90)
    return folder


@pytest.fixture(scope="session")
def tiny():
    """Settings for `photos`."""
    return config.parse(
        {
            "seed": 3,
            "data": {"layout": "folder"},
            "stage1": {
                "network": {"backbone": "resnet10", "hidden": 16, "projection": 8},
                "views": {"size": 32, "blur_radius": [0.1, 0.5]},
                "optimizer": {"batch": 4, "epochs": 1, "lr": 1.0, "warmup_epochs": 0},
            },
            "embeddings": {"resize": 40, "crop": 32},
            "proposals": {"min_size": 16, "top_n": 6},
            "neighbors": {"k": 3},
            "rois": {"size": 32},
            "stage3": {"patch": 24},
        }
    )


@pytest.fixture(scope="session")
def manifest_path(photos, tiny, tmp_path_factory):
    from orl.data.manifest import build

    folder = tmp_path_factory.mktemp("manifest")
    build(tiny, photos, folder / "manifest.csv", folder / "rejected.csv", 1)
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def manifest(manifest_path):
    return artifacts.read_manifest(manifest_path)


@pytest.fixture(scope="session")
def model_folder(tiny, tmp_path_factory):
    """backbone.safetensors and model.safetensors of an untrained stage 1."""
    from orl.pretrain import loop

    folder = tmp_path_factory.mktemp("model")
    loop.random(tiny, folder)
    return folder


@pytest.fixture(scope="session")
def proposals_path(photos, manifest_path, tiny, tmp_path_factory):
    from orl.discovery.proposals import propose

    path = tmp_path_factory.mktemp("proposals") / "proposals.h5"
    propose(tiny, str(photos), str(manifest_path), str(path))
    return path
