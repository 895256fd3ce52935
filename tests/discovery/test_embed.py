import shutil
import traceback

import numpy as np
import pytest
import torch
from PIL import Image

from orl import InputError, artifacts
from orl.discovery import encode
from orl.discovery.embed import embed
from orl.networks.backbones import ResNet
from orl.networks.ema import load_encoder


@pytest.fixture(scope="module")
def inputs(photos, manifest_path, model_folder):
    return [str(photos), str(manifest_path), str(model_folder / "model.safetensors")]


@pytest.fixture(scope="module")
def embeddings_path(inputs, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "embeddings.h5"
    embed(tiny, *inputs, str(path))
    return path


def test_each_row_is_the_projection_of_its_photo(embeddings_path, photos, manifest, inputs):
    transforms = pytest.importorskip("torchvision.transforms")
    prepare = transforms.Compose(
        [
            transforms.Resize(40),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    model = load_encoder(inputs[2])
    found = artifacts.read_embeddings(embeddings_path).embedding
    assert (found.shape, found.dtype) == ((10, 8), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    for row, path in enumerate(manifest.path):
        with torch.inference_mode():
            projection = model(prepare(Image.open(photos / path).convert("RGB"))[None])[0].numpy()
        np.testing.assert_allclose(found[row], projection / np.linalg.norm(projection), atol=5e-3)  # resizing rounds
    assert len(np.unique(found.round(3), axis=0)) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_equal_files(embeddings_path, inputs, tiny, tmp_path, workers):
    embed(tiny, *inputs, str(tmp_path / "again.h5"), workers)
    assert (tmp_path / "again.h5").read_bytes() == embeddings_path.read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_matter(embeddings_path, inputs, tiny, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 3)
    embed(tiny, *inputs, str(tmp_path / "again.h5"), workers)
    found = artifacts.read_embeddings(tmp_path / "again.h5").embedding
    np.testing.assert_allclose(found, artifacts.read_embeddings(embeddings_path).embedding, atol=1e-5)


def test_convolutions_are_float32_on_every_device(inputs, tiny, tmp_path, monkeypatch):
    """On a GPU cuDNN rounds to TF32, 10 bits, unless told not to."""
    allowed = []
    forward = ResNet.forward
    monkeypatch.setattr(
        ResNet, "forward", lambda self, x: allowed.append(torch.backends.cudnn.allow_tf32) or forward(self, x)
    )
    embed(tiny, *inputs, str(tmp_path / "again.h5"))
    assert set(allowed) == {False}


def test_the_file_says_what_it_was_made_from(embeddings_path, inputs):
    for name, path in zip(("manifest", "model"), inputs[1:], strict=True):
        artifacts.check_input(embeddings_path, name, artifacts.fingerprint(path))


def refused(tiny, inputs, tmp_path, match, workers=0):
    with pytest.raises(InputError, match=match) as caught:
        embed(tiny, *inputs, str(tmp_path / "embeddings.h5"), workers)
    traceback.clear_frames(caught.tb)  # ends the loader's processes now, not in a later test
    assert not (tmp_path / "embeddings.h5").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photo_that_changed_is_named(inputs, photos, manifest, tiny, tmp_path, workers):
    shutil.copytree(photos, tmp_path / "photos")
    path = tmp_path / "photos" / str(manifest.path[3])
    path.write_bytes(path.read_bytes() + b"x")
    refused(tiny, [str(tmp_path / "photos"), *inputs[1:]], tmp_path, f"{path}: photo changed", workers)


def test_weights_that_give_no_finite_numbers_are_named(inputs, tiny, tmp_path):
    tensors = artifacts.read_weights(inputs[2])
    tensors["online.projector.3.weight"][0, 0] = float("nan")
    path = tmp_path / "model.safetensors"
    artifacts.write_weights(path, tensors, artifacts.attributes(inputs[2]))
    refused(
        tiny, [*inputs[:2], str(path)], tmp_path, f"{path}: gives features that are not finite for .*; train it again"
    )
