import shutil
import traceback

import numpy as np
import pytest
import torch
from PIL import Image

from orl import InputError, artifacts
from orl.discovery import encode
from orl.discovery.rois import rois
from orl.networks import backbones
from orl.networks.backbones import ResNet


@pytest.fixture(scope="module")
def inputs(photos, manifest_path, proposals_path, model_folder):
    return [str(photos), str(manifest_path), str(proposals_path), str(model_folder / "backbone.safetensors")]


@pytest.fixture(scope="module")
def rois_path(inputs, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("rois") / "rois.h5"
    rois(tiny, *inputs, str(path))
    return path


def fabricate(path, box, offsets, manifest_path):
    """Proposals of `manifest_path` that are made up."""
    with artifacts.create(path, artifacts.PROPOSALS, {}, {"manifest": artifacts.fingerprint(manifest_path)}) as file:
        file["box"], file["box_offsets"] = np.array(box, np.int16), np.array(offsets)
    return str(path)


def test_each_feature_is_that_of_its_crop(rois_path, inputs, photos, manifest, proposals_path):
    model, found = backbones.load(inputs[-1]), artifacts.read_proposals(proposals_path)
    feature = artifacts.read_rois(rois_path).feature
    assert (feature.shape, feature.dtype) == ((len(found.box), 512), np.float16)
    assert len(found.box) > len(manifest)  # several per photo
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for row, path in enumerate(manifest.path):
        photo = Image.open(photos / path).convert("RGB")
        for number in range(found.box_offsets[row], found.box_offsets[row + 1]):
            x, y, w, h = found.box[number].tolist()
            patch = photo.crop((x, y, x + w, y + h)).resize((32, 32), Image.Resampling.BILINEAR)
            pixels = (np.asarray(patch) / 255 - mean) / std
            with torch.inference_mode():
                pooled = model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])[0].double().numpy()
            np.testing.assert_allclose(feature[number], pooled / np.linalg.norm(pooled), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_make_equal_files(rois_path, inputs, tiny, tmp_path, workers):
    rois(tiny, *inputs, str(tmp_path / "again.h5"), workers)
    assert (tmp_path / "again.h5").read_bytes() == rois_path.read_bytes()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_may_end_within_a_photo(rois_path, inputs, tiny, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 3)
    rois(tiny, *inputs, str(tmp_path / "again.h5"), workers)
    found, expected = artifacts.read_rois(tmp_path / "again.h5").feature, artifacts.read_rois(rois_path).feature
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=1e-3)


def test_convolutions_are_float32_on_every_device(inputs, tiny, tmp_path, monkeypatch):
    """On a GPU cuDNN rounds to TF32, 10 bits, unless told not to."""
    allowed = []
    forward = ResNet.forward
    monkeypatch.setattr(
        ResNet, "forward", lambda self, x: allowed.append(torch.backends.cudnn.allow_tf32) or forward(self, x)
    )
    rois(tiny, *inputs, str(tmp_path / "again.h5"))
    assert set(allowed) == {False}


def test_the_file_says_what_it_was_made_from(rois_path, inputs):
    for name, path in zip(("manifest", "proposals", "backbone"), inputs[1:], strict=True):
        artifacts.check_input(rois_path, name, artifacts.fingerprint(path))


def refused(tiny, inputs, tmp_path, match, workers=0):
    with pytest.raises(InputError, match=match) as caught:
        rois(tiny, *inputs, str(tmp_path / "rois.h5"), workers)
    traceback.clear_frames(caught.tb)  # ends the loader's processes now, not in a later test
    assert not (tmp_path / "rois.h5").exists()


def test_proposals_of_fewer_photos_are_refused(inputs, tiny, manifest_path, tmp_path):
    path = fabricate(tmp_path / "p.h5", [[0, 0, 9, 9]] * 3, [0, 1, 2, 3], manifest_path)
    refused(tiny, [*inputs[:2], path, inputs[3]], tmp_path, "p.h5: has 3 rows, but .*manifest.csv has 10")


def test_proposals_of_another_manifest_are_refused(inputs, tiny, manifest_path, tmp_path):
    """As many photos, but in another order: each box would be cut out of the wrong photo."""
    header, *lines = manifest_path.read_text().splitlines(keepends=True)
    (tmp_path / "other.csv").write_text(header + "".join(reversed(lines)))
    refused(tiny, [inputs[0], str(tmp_path / "other.csv"), *inputs[2:]], tmp_path, "another manifest")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_box_outside_its_photo_is_refused(inputs, tiny, manifest_path, tmp_path, workers):
    boxes = [[0, 0, 20, 20]] * 9 + [[0, 0, 500, 20]]
    path = fabricate(tmp_path / "p.h5", boxes, range(11), manifest_path)
    refused(tiny, [*inputs[:2], path, inputs[3]], tmp_path, "p.h5", workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photo_that_changed_is_named(inputs, photos, manifest, tiny, tmp_path, workers):
    shutil.copytree(photos, tmp_path / "photos")
    path = tmp_path / "photos" / str(manifest.path[9])
    path.write_bytes(path.read_bytes() + b"x")
    refused(tiny, [str(tmp_path / "photos"), *inputs[1:]], tmp_path, f"{path}: photo changed", workers)


def test_weights_that_give_no_finite_numbers_are_named(inputs, tiny, tmp_path):
    tensors = artifacts.read_weights(inputs[3])
    tensors["conv1.weight"][0, 0] = float("inf")
    path = tmp_path / "backbone.safetensors"
    artifacts.write_weights(path, tensors, artifacts.attributes(inputs[3]))
    refused(
        tiny, [*inputs[:3], str(path)], tmp_path, f"{path}: gives features that are not finite for .*; train it again"
    )
