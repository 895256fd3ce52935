"""ResNets with torchvision's structure and keys, without the classifier (He et al., 2016).

Our own short module, so that only detection needs torchvision (9 s to import); a test compares each with it.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from orl import InputError, artifacts
from orl.networks import MEAN, STD


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class _Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3 (which holds the stride), 1x1."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * 4 if bottleneck else width
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        for number, shape in enumerate(shapes, 1):
            self.add_module(f"conv{number}", _convolution(*shape))
            self.add_module(f"bn{number}", nn.BatchNorm2d(shape[1]))
        self.depth = len(shapes)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for number in range(1, self.depth + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            if number < self.depth:
                out = out.relu()
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """Float [B, 3, H, W] -> pooled features [B, `features`]."""

    def __init__(self, blocks: tuple[int, int, int, int], bottleneck: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for number, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
            layer = []
            for index in range(count):
                layer.append(_Block(inputs, width, 2 if number > 1 and index == 0 else 1, bottleneck))
                inputs = width * 4 if bottleneck else width
            self.add_module(f"layer{number}", nn.Sequential(*layer))
        self.features = inputs

    def stages(self, x: Tensor) -> list[Tensor]:
        """The five maps [B, C, H/s, W/s], s = 2, 4, 8, 16, 32: stem before its max pooling, then each layer."""
        maps = [self.bn1(self.conv1(x)).relu()]
        x = nn.functional.max_pool2d(maps[0], 3, 2, 1)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1].mean((2, 3))


BLOCKS: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "resnet10": ((1, 1, 1, 1), False),
    "resnet18": ((2, 2, 2, 2), False),
    "resnet50": ((3, 4, 6, 3), True),
}


def backbone(name: str) -> ResNet:
    """A ResNet by name, freshly made by torch's default initialisation."""
    return ResNet(*BLOCKS[name])


def initialize(module: nn.Module, generator: torch.Generator) -> None:
    """Kaiming normal (fan in, ReLU) weights, zero biases, BatchNorm 1 and 0 (ORL release)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 or 0-255 float [B, 3, H, W] -> float32 with mean and standard deviation, of 0 to 1, taken out."""
    means, stds = _statistics(images.device, tuple(mean), tuple(std))
    return (images.float() - means) / stds


@cache  # copying numbers to a GPU waits for all that it has to do
def _statistics(device: torch.device, *statistics: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    mean, std = (255 * torch.tensor(values).view(3, 1, 1).to(device) for values in statistics)
    return mean, std


def save(path: str | os.PathLike, name: str, model: ResNet, attrs: Mapping[str, str]) -> None:
    """Write backbone.safetensors: torchvision's keys, `attrs` (see artifacts.stamp) and the backbone's name."""
    artifacts.write_weights(path, model.state_dict(), {**attrs, "backbone": name})


def described(path: str | os.PathLike, key: str) -> str:
    """What a model file's attribute says of its network. Raises InputError."""
    found = artifacts.attributes(path).get(key)
    if found is None:
        raise InputError(f"{path}: does not say its {key}; name a backbone.safetensors, as `orl pretrain` makes it.")
    return found


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Load the tensors of `path` into a model. Raises InputError if they do not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: its weights do not fit ({detail}); make it with `orl pretrain`.") from None


def load(path: str | os.PathLike) -> ResNet:
    """The backbone of a backbone.safetensors, in eval mode on the CPU. Raises InputError."""
    tensors, name = artifacts.read_weights(path), described(path, "backbone")
    if name not in BLOCKS:
        raise InputError(f"{path}: its backbone {name!r} is not one of {', '.join(BLOCKS)}.")
    model = backbone(name)
    fill(model, tensors, path)
    return model.eval()


def device() -> torch.device:
    """The first visible GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
