"""How other frameworks load a backbone, in words and lines; without PyTorch, which takes seconds to import."""

import textwrap
from typing import Literal

from orl.config import Format
from orl.networks import MEAN, STD

MEAN_255, STD_255 = ([round(255 * value, 3) for value in values] for values in (MEAN, STD))


def code(framework: Literal["torchvision", "timm", "detectron2"], name: str, file: str) -> str:
    """The lines of Python that build the network in a framework and load a file: ours, or detectron2's export.

    README.md and the model cards show them. Empty for a ResNet-10 in Detectron2, which builds none.
    """
    depth = int(name.removeprefix("resnet"))
    if framework == "detectron2":
        options = textwrap.wrap(_detectron2(depth).replace(", ", ","), 110, drop_whitespace=False)
        lines = [
            "from detectron2 import checkpoint, model_zoo, modeling\n",
            'cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")',
            "cfg.merge_from_list(\n    " + "\n    ".join(f'"{line}"' for line in options) + ".split()\n)",
            f'checkpoint.DetectionCheckpointer(model := modeling.build_model(cfg)).load("{file}")',
        ]
        return "" if depth == 10 else "\n".join(lines)
    if framework == "timm" and depth > 10:
        return f'import timm\n\nmodel = timm.create_model("{name}", num_classes=0, checkpoint_path="{file}")'
    resnet, without = f"{framework}.models.resnet", ", num_classes=0" if framework == "timm" else ""
    small = f"{resnet}.ResNet({resnet}.BasicBlock, [1, 1, 1, 1]{without})"
    lines = [
        f"import safetensors.torch, {framework}\n",
        f"model = {small if depth == 10 else f'torchvision.models.{name}()'}",
        f'model.load_state_dict(safetensors.torch.load_file("{file}"){"" if without else ", strict=False"})',
    ]
    return "\n".join(lines)


def _detectron2(depth: int) -> str:
    """The settings, as on a command line, with which Detectron2 builds the network that the weights are of."""
    narrow = "" if depth >= 50 else " MODEL.RESNETS.RES2_OUT_CHANNELS 64"
    return (
        f"MODEL.RESNETS.DEPTH {depth}{narrow} MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.RESNETS.NORM SyncBN "
        f"MODEL.BACKBONE.FREEZE_AT 0 INPUT.FORMAT RGB MODEL.PIXEL_MEAN {MEAN_255} MODEL.PIXEL_STD {STD_255}"
    )


def how(format: Format, name: str, output: str) -> str:
    """What to type, or to set, so that the framework builds the same network and starts from the file."""
    depth = int(name.removeprefix("resnet"))
    pixels = f"RGB photos, mean {list(MEAN)}, std {list(STD)} of 0 to 1"
    if format == "torchvision":
        made = f"torchvision.models.{name}()" if depth > 10 else "ResNet(BasicBlock, [1, 1, 1, 1])"
        return f"(model := {made}).load_state_dict(torch.load({output!r}), strict=False) misses only fc.*; {pixels}."
    if format == "timm":
        if depth > 10:
            return f"model = timm.create_model({name!r}, num_classes=0, checkpoint_path={output!r}); {pixels}."
        made = "timm.models.resnet.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=0)"
        return f"(model := {made}).load_state_dict(safetensors.torch.load_file({output!r})); {pixels}."
    alone = "" if depth > 10 else " It builds no ResNet-10 itself: give it one of blocks 1, 1, 1, 1."
    if format == "detectron2":
        return f"MODEL.WEIGHTS {output} {_detectron2(depth)}.{alone}"
    return (
        f'backbone=dict(type="ResNet", depth={depth}, style="pytorch", frozen_stages=-1, norm_eval=False, '
        f'norm_cfg=dict(type="SyncBN", requires_grad=True), init_cfg=dict(type="Pretrained", checkpoint={output!r})), '
        f"data_preprocessor=dict(mean={MEAN_255}, std={STD_255}, bgr_to_rgb=True).{alone}"
    )
