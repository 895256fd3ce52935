import numpy as np
import pytest
import torch
from PIL import Image

from orl import artifacts
from orl.config import Config, Stage1, Stage3
from orl.data.decode import decode, resize_crop
from orl.data.manifest import build
from orl.data.views import iou
from orl.pretrain.samples import ImageViews, ObjectViews
from orl.training.batches import Batches, Loader

SETTINGS = Stage3.model_validate({"views": {"size": 32}, "patch": 24})


@pytest.fixture
def run(photos, manifest):
    """Proposals and correspondences whose every box and pair is known."""
    count = len(manifest)
    boxes, offsets = [], [0]
    for row in range(count):
        w, h = int(manifest.width[row]), int(manifest.height[row])
        own = [(0, 0, w, h), (1, 2, w // 2, h // 2), (w // 4, h // 4, w // 2, h // 2)][: 1 + row % 3]
        boxes += own
        offsets.append(offsets[-1] + len(own))
    neighbor = np.array([[(row + 1) % count, (row + 2) % count] for row in range(count)], np.int32)
    rois = np.diff(offsets)
    pairs, pair_offsets = [], [0]
    for row in range(count):
        for other in neighbor[row]:
            own = [(rois[row] - 1, rois[other] - 1), (0, rois[other] - 1)]
            pairs += own
            pair_offsets.append(pair_offsets[-1] + len(own))
    proposals = artifacts.Proposals(np.array(boxes, np.int16), np.array(offsets))
    found = artifacts.Correspondences(neighbor, np.array(pairs, np.uint16), np.ones(len(pairs)), np.array(pair_offsets))
    return ObjectViews(str(photos), manifest, "ignore", SETTINGS, 3, proposals, found), proposals, found


def crop(photos, manifest, row, box, side):
    return resize_crop(decode(photos / manifest.path[row]), box, (side, side))


def test_object_views_come_from_the_boxes_and_pairs(run, photos, manifest):
    dataset, proposals, found = run
    slots = set()
    for epoch in range(12):
        for row in range(len(manifest)):
            images, parameters = dataset[epoch, row]
            assert [image.shape for image in images] == [(32, 32, 3)] * 2 + [(24, 24, 3)] * 4
            assert parameters.shape == (6, 10)
            assert parameters.dtype == np.float32

            def boxes(photo):
                return [tuple(b) for b in proposals.box[slice(*proposals.box_offsets[photo : photo + 2])].tolist()]

            own = [crop(photos, manifest, row, box, 24) for box in boxes(row)]
            assert any(np.array_equal(images[2], patch) for patch in own)  # a RoI of the photo
            matches = [
                (slot, pair)
                for slot in range(found.neighbor.shape[1])
                for pair in found.pair[slice(*found.pair_offsets[row * 2 + slot : row * 2 + slot + 2])].tolist()
                if np.array_equal(images[4], own[pair[0]])
                and np.array_equal(
                    images[5],
                    crop(photos, manifest, n := found.neighbor[row, slot], boxes(n)[pair[1]], 24),
                )
            ]
            assert matches  # a pair of one of its neighbours, the photo's side first
            slots.update(slot for slot, _ in matches)
    assert slots == {0, 1}


def test_the_jittered_copy_overlaps_its_roi(run, monkeypatch):
    dataset, *_ = run
    seen = []
    monkeypatch.setattr(
        "orl.pretrain.samples.resize_crop", lambda image, box, size: seen.append(box) or np.zeros((*size, 3), np.uint8)
    )
    for epoch in range(20):
        dataset[epoch, 1]
    copies = [(seen[i + 2], seen[i + 3]) for i in range(0, len(seen), 6)]
    assert all(iou(roi, np.array([copy]))[0] > 0.5 for roi, copy in copies)
    assert any(roi != copy for roi, copy in copies)


def test_every_sample_is_its_key_alone(run, photos, manifest):
    """Equal for any number of workers and any starting step; different by epoch, photo, view and seed."""
    dataset, *_ = run
    count = len(manifest)

    def all_batches(workers, start):
        batches = Batches(count, 2, 2, seed=3, start=start)
        with Loader(dataset, batches, workers, False) as found:
            return [([v.clone() for v in views], p.clone()) for views, p in found]

    whole = all_batches(0, 0)
    assert len(whole) == 2 * (count // 2)
    for other in (all_batches(2, 0), None):
        other = other or whole[:1] + all_batches(1, 1)
        for (a, p), (b, q) in zip(whole, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            assert torch.equal(p, q)
    assert not np.array_equal(dataset[0, 0][1], dataset[1, 0][1])
    assert not np.array_equal(dataset[0, 0][1], dataset[0, 1][1])
    assert not np.array_equal(dataset[0, 0][1][2], dataset[0, 0][1][3])
    reseeded = ImageViews(str(photos), manifest, "ignore", Stage1(), 4)
    first = ImageViews(str(photos), manifest, "ignore", Stage1(), 3)
    assert not np.array_equal(first[0, 0][1], reseeded[0, 0][1])


def test_stage_1_and_stage_3_see_the_same_global_views(run, photos, manifest):
    dataset, *_ = run
    images = ImageViews(str(photos), manifest, "ignore", Stage1.model_validate({"views": {"size": 32}}), 3)
    for a, b in zip(images[5, 1][0], dataset[5, 1][0][:2], strict=True):
        assert np.array_equal(a, b)


def test_batches_cover_each_epoch_once_and_drop_the_rest():
    batches = list(Batches(11, 3, 4, seed=0))
    assert len(batches) == 4 * 3
    orders = []
    for epoch in range(4):
        keys = [key for batch in batches[epoch * 3 : epoch * 3 + 3] for key in batch]
        assert {key[0] for key in keys} == {epoch}
        rows = [key[1] for key in keys]
        assert len(set(rows)) == 9
        orders.append(rows)
    assert orders[0] != orders[1]
    assert list(Batches(11, 3, 4, seed=0, start=7)) == batches[7:]
    assert len(Batches(11, 3, 4, seed=0, start=7)) == 5


@pytest.mark.parametrize(("parts", "size"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_parts_and_processes_share_each_batch(parts, size):
    whole = list(Batches(25, 12, 2, seed=0))
    each = [list(Batches(25, 12, 2, 0, 0, parts, rank, size)) for rank in range(size)]
    for step, batch in enumerate(whole):
        cut = [keys for part in range(parts) for own in each for keys in own[step * parts + part]]
        assert cut == batch
    assert list(Batches(25, 12, 2, 0, 3, parts, 0, size)) == each[0][3 * parts :]
    assert len(Batches(25, 12, 2, 0, 3, parts, 0, size)) == parts


def test_reduced_decoding_cuts_nearly_the_same_views(tmp_path):
    """Of a large smooth photo; a crop that needs all pixels gets them."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "ab":
        noise = np.random.default_rng(ord(name)).integers(0, 256, (8, 11, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((1203, 801), Image.Resampling.BICUBIC).save(photos / f"{name}.jpg", quality=95)
    options = Config.model_validate({"data": {"layout": "folder"}})
    build(options, photos, tmp_path / "manifest.csv", tmp_path / "rejected.csv", 1)
    manifest = artifacts.read_manifest(tmp_path / "manifest.csv")
    views = {"size": 32, "scale": [0.3, 1.0]}
    made, sizes = [], []
    for reduced in (False, True):
        settings = Stage1.model_validate({"views": {**views, "reduced_decode": reduced}})
        dataset = ImageViews(str(photos), manifest, "ignore", settings, 3)
        decode_photo = dataset.photo
        dataset.photo = lambda *args, of=decode_photo: sizes.append(found := of(*args)) or found
        made.append([dataset[epoch, row] for epoch in range(4) for row in (0, 1)])
    assert {photo.shape[:2] for photo in sizes[:8]} == {(801, 1203)}
    assert {photo.shape[0] for photo in sizes[8:]} <= {401, 201, 101}
    for (whole, p), (small, q) in zip(*made, strict=True):
        assert np.array_equal(p, q)
        for a, b in zip(whole, small, strict=True):
            assert np.abs(a.astype(int) - b).mean() < 8
    large = Stage1.model_validate({"views": {"size": 900, "reduced_decode": True}})
    assert ImageViews(str(photos), manifest, "ignore", large, 3)[0, 0][0][0].shape == (900, 900, 3)
