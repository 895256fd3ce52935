"""Mask R-CNN with a feature pyramid (He et al., 2017): torchvision's parts with Detectron2's numbers (ORL supplement).

What torchvision's parts do otherwise than Detectron2: box losses are smooth L1 with beta 1/9, not L1; RoIAlign takes
2 x 2 samples of a bin, shifted by half a pixel of the map, where Detectron2 takes as many as the bin has pixels, and
shifts none; targets of the mask head are cut from bitmaps, not from polygons; sides of anchors are rounded to whole
pixels; box codes and masks are predicted for the background too, which nothing uses.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from orl.networks import backbones

STRIDES = (4, 8, 16, 32, 64)  # of P2 to P6
SIDES = (32, 64, 128, 256, 512)  # of their anchors
RATIOS = (0.5, 1.0, 2.0)
HIDDEN = 1024  # outputs of the box head


class _Pyramid(nn.Module):
    """Float [B, 3, H, W] -> P2 to P6 [B, channels, H/s, W/s], s of STRIDES."""

    def __init__(self, resnet: backbones.ResNet, channels: int) -> None:
        super().__init__()
        widths = [resnet.features // part for part in (8, 4, 2, 1)]
        self.body = resnet
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool(), nn.BatchNorm2d)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(number): one for number, one in enumerate(self.body.stages(images)[1:])})


# Boxes take the type of what they are made from: in bfloat16 they would be off by up to four pixels.


class _Anchors(AnchorGenerator):
    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)

    def grid_anchors(self, grid_sizes: list, strides: list) -> list[Tensor]:
        # Torchvision's own strides are quotients: 61 instead of 64 on P6 of 800 pixels.
        return super().grid_anchors(grid_sizes, [[stride, stride] for stride in STRIDES])


class _RPNHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, codes = super().forward(x)
        return [one.float() for one in scores], [one.float() for one in codes]


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, codes = super().forward(x)
        return scores.float(), codes.float()


class _Batch(GeneralizedRCNNTransform):
    """Photos uint8, normalised and padded with the mean colour to a common multiple of 32; nothing else."""

    def normalize(self, image: Tensor) -> Tensor:
        return backbones.normalize(image)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    def postprocess(self, result: list, *_: Any) -> list:
        return result  # it would paste all masks at the size of the photo, at once


def _pool(size: int) -> MultiScaleRoIAlign:
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio=2)
    # Else guessed from the first batch, wrongly where it is of narrow photos.
    pool.scales, pool.map_levels = [1 / stride for stride in STRIDES[:4]], initLevelMapper(2, 5)
    return pool


def detector(resnet: backbones.ResNet, classes: int, channels: int = 256, rois: int = 512) -> MaskRCNN:
    """Mask R-CNN of a backbone, all of it trained; `classes` without the background.

    Pyramid, box head (four convolutions, one linear layer) and mask head (four convolutions) are `channels` wide and,
    like the backbone, have BatchNorm; the RPN has none. Box and mask head are trained on `rois` RoIs of a photo.

    Takes a list of photos uint8 [3, H, W] and, in training, of targets: `boxes` float32 [n, 4], x1 y1 x2 y2 in pixels,
    `labels` int64 [n], from 1, `masks` uint8 [n, H, W]. Returns the five losses by name in training, else a list of
    `boxes` and `labels`, `scores` float32 [n], best first, and `masks` float [n, 1, 28, 28]: the probability inside of
    the box. Draws its fresh weights, and RoIs in training, from torch's global generator.
    """
    box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [HIDDEN], nn.BatchNorm2d)
    box_predictor = _BoxPredictor(HIDDEN, classes + 1)
    mask_predictor = MaskRCNNPredictor(channels, channels, classes + 1)
    nn.init.kaiming_uniform_(box_head[-2].weight, a=1)
    nn.init.normal_(box_predictor.cls_score.weight, std=0.01)
    nn.init.normal_(box_predictor.bbox_pred.weight, std=0.001)
    nn.init.normal_(mask_predictor.mask_fcn_logits.weight, std=0.001)
    for layer in (box_head[-2], *box_predictor.children(), mask_predictor.conv5_mask, mask_predictor.mask_fcn_logits):
        nn.init.zeros_(layer.bias)
    model = MaskRCNN(
        _Pyramid(resnet, channels),
        rpn_anchor_generator=_Anchors(tuple((side,) for side in SIDES), (RATIOS,) * len(SIDES)),
        rpn_head=_RPNHead(channels, len(RATIOS)),
        rpn_pre_nms_top_n_train=2000,
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_train=1000,
        rpn_post_nms_top_n_test=1000,
        rpn_batch_size_per_image=256,
        box_roi_pool=_pool(7),
        box_head=box_head,
        box_predictor=box_predictor,
        box_score_thresh=0.05,
        box_nms_thresh=0.5,
        box_detections_per_img=100,
        box_batch_size_per_image=rois,
        box_positive_fraction=0.25,
        mask_roi_pool=_pool(14),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, nn.BatchNorm2d),
        mask_predictor=mask_predictor,
    )
    model.transform = _Batch(0, 0, [], [])
    return model
