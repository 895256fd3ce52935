"""Mask R-CNN: as METHOD describes it, of any precision, and on photos of any size and with no objects."""

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from orl.networks import backbones
from orl.networks.detector import detector


@pytest.fixture(scope="module")
def full() -> nn.Module:
    """The paper's, for COCO."""
    torch.manual_seed(0)
    return detector(backbones.backbone("resnet50"), 80)


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return detector(backbones.backbone("resnet10"), 3, channels=16, rois=16)


def parts(model: nn.Module) -> dict[str, nn.Module]:
    heads = model.roi_heads
    return {
        "body": model.backbone.body,
        "fpn": model.backbone.fpn,
        "rpn": model.rpn,
        "box_head": heads.box_head,
        "box_predictor": heads.box_predictor,
        "mask_head": heads.mask_head,
        "mask_predictor": heads.mask_predictor,
    }


def target(boxes: list, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    box = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": box, "labels": torch.arange(len(boxes)) % 3 + 1, "masks": masks}


def test_parameters_and_norms_are_the_methods(full: nn.Module) -> None:
    norm, three = 2 * 256, 256 * 256 * 9  # of 256 channels: a norm, and a 3 x 3 convolution before one
    expected = {  # parameters, norms
        "body": (25_557_032 - 2048 * 1000 - 1000, 53),  # torchvision's ResNet-50 less its classifier
        "fpn": ((256 + 512 + 1024 + 2048) * 256 + 4 * three + 8 * norm, 8),
        "rpn": (three + 256 + 256 * 3 + 3 + 256 * 12 + 12, 0),  # three anchors at each place
        "box_head": (4 * (three + norm) + 256 * 7 * 7 * 1024 + 1024, 4),
        "box_predictor": (1024 * 81 + 81 + 1024 * 81 * 4 + 81 * 4, 0),
        "mask_head": (4 * (three + norm), 4),
        "mask_predictor": (256 * 256 * 2 * 2 + 256 + 256 * 81 + 81, 0),
    }
    found = {}
    for name, part in parts(full).items():
        norms = [one for one in part.modules() if "Norm" in type(one).__name__ and not list(one.children())]
        assert {type(one) for one in norms} <= {nn.BatchNorm2d}
        found[name] = sum(one.numel() for one in part.parameters()), len(norms)
    assert found == expected
    assert sum(one.numel() for one in full.parameters()) == sum(count for count, _ in expected.values())
    assert all(one.requires_grad for one in full.parameters())


def test_numbers_are_detectron2s(full: nn.Module) -> None:
    rpn, heads = full.rpn, full.roi_heads
    assert rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert set(rpn.anchor_generator.aspect_ratios) == {(0.5, 1.0, 2.0)}
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert rpn.nms_thresh == 0.7
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (heads.proposal_matcher.high_threshold, heads.proposal_matcher.low_threshold) == (0.5, 0.5)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)
    assert (heads.box_roi_pool.output_size, heads.mask_roi_pool.output_size) == ((7, 7), (14, 14))
    predictor, mask = heads.box_predictor, heads.mask_predictor.mask_fcn_logits
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001), (mask, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    # Xavier's, as Caffe2 has it: uniform up to sqrt(3 / inputs).
    assert heads.box_head[-2].weight.abs().max().item() == pytest.approx((3 / (256 * 49)) ** 0.5, rel=1e-3)
    for layer in (*predictor.children(), mask, heads.mask_predictor.conv5_mask, heads.box_head[-2]):
        assert not layer.bias.any()


def test_pyramid_by_hand(small: nn.Module) -> None:
    resnet, fpn = small.backbone.body, small.backbone.fpn
    photos = [torch.randint(256, (3, 64, 96), dtype=torch.uint8) for _ in range(2)]
    small.train()(photos, [target([[0, 0, 9, 9]], (64, 96))] * 2)
    small.eval()  # with other statistics than the default
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected = []
        above = None
        for level, one in reversed(list(enumerate(resnet.stages(images)[1:]))):
            side = fpn.inner_blocks[level](one)
            above = side if above is None else side + interpolate(above, side.shape[2:], mode="nearest")
            expected.insert(0, fpn.layer_blocks[level](above))
        expected.append(expected[-1][:, :, ::2, ::2])
        found = list(small.backbone(images).values())
    assert [tuple(one.shape[2:]) for one in found] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_boxes_are_float32_under_autocast(small: nn.Module) -> None:
    """In bfloat16 a place of 1333 pixels is known to eight."""
    images = [torch.randint(256, (3, 64, 1333), dtype=torch.uint8)]
    seen: dict[str, list] = {"anchors": [], "proposals": []}
    small.rpn.anchor_generator.register_forward_hook(lambda *args: seen["anchors"].append(args[2][0]))
    small.roi_heads.register_forward_pre_hook(lambda _, args: seen["proposals"].append(args[1][0]))
    small.eval()
    with torch.inference_mode():
        small(images)
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = small(images)
            assert small.backbone(torch.zeros(1, 3, 64, 64))["0"].dtype == torch.bfloat16  # it is on
    assert torch.equal(*seen["anchors"])
    assert [one.dtype for one in seen["proposals"]] == [torch.float32] * 2
    assert (found["boxes"].dtype, found["scores"].dtype) == (torch.float32, torch.float32)
    assert len(found["boxes"]) > 0
    small.train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = small(images, [target([[1200, 10, 1300, 50]], (64, 1333))])
    assert {one.dtype for one in losses.values()} == {torch.float32}
    sum(losses.values()).backward()


def test_anchors_lie_on_the_maps_pixels(small: nn.Module) -> None:
    seen = []
    small.rpn.anchor_generator.register_forward_hook(lambda *args: seen.append(args[2][0]))
    with torch.inference_mode():
        small.eval()([torch.zeros(3, 32, 800, dtype=torch.uint8)])
    centres = (seen[0][:, :2] + seen[0][:, 2:]) / 2
    x = [range(0, 800, stride) for stride in (4, 8, 16, 32)] + [range(0, 13 * 64, 64)]
    heights = [8, 4, 2, 1, 1]
    expected = [column for columns, height in zip(x, heights, strict=True) for _ in range(height) for column in columns]
    assert centres[::3, 0].tolist() == expected


@pytest.mark.parametrize("side", [32, 33, 65])
def test_regions_are_pooled_where_they_are(small: nn.Module, side: int) -> None:
    """Also of narrow photos, from whose padded maps torchvision guesses the scale wrongly."""
    padded, width = -(-side // 32) * 32, 128
    features = {}
    for number, stride in enumerate((4, 8, 16, 32)):
        columns = (torch.arange(width // stride) + 0.5) * stride
        features[str(number)] = columns.expand(1, 16, padded // stride, -1).contiguous()
    box = torch.tensor([[40.0, 4.0, 88.0, 28.0]])
    pooled = small.roi_heads.box_roi_pool(features, [box], [(side, width)])
    assert pooled.mean().item() == pytest.approx(64 + 2, abs=0.5)  # unaligned: half a pixel of P2 to the right


def test_photos_are_normalised_and_padded_once(small: nn.Module) -> None:
    photos = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((40, 64), (33, 70))]
    batch, _ = small.transform(photos)
    assert tuple(batch.tensors.shape) == (2, 3, 64, 96)
    for photo, (height, width), one in zip(photos, batch.image_sizes, batch.tensors, strict=True):
        torch.testing.assert_close(one[:, :height, :width], backbones.normalize(photo[None])[0])
        assert (one.numel() - photo.numel()) == (one == 0).sum()


def test_a_batch_without_objects_trains_all_layers(small: nn.Module) -> None:
    photos = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    small.train()
    losses = small(photos, [target([], (64, 64))] * 2)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert losses["loss_objectness"] > 0
    sum(losses.values()).backward()
    for name, parameter in small.named_parameters():  # else processes would wait for each other's gradients
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(one.isfinite().all() for one in small.buffers())


def test_detections(small: nn.Module) -> None:
    photos = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((64, 80), (50, 64))]
    with torch.inference_mode():
        found, again = small.eval()(photos), small(photos)
    for photo, one, other in zip(photos, found, again, strict=True):
        n = len(one["boxes"])
        assert 0 < n <= 100
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert one["masks"].shape == (n, 1, 28, 28)  # not pasted
        assert one["labels"].min() >= 1
        assert one["labels"].max() <= 3
        assert (one["scores"].diff() <= 0).all()
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"][:, 2:] <= torch.tensor(photo.shape[:0:-1])).all()
