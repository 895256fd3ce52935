"""Photometric augmentation of a batch on the device, with parameters per sample drawn on the CPU.

Every operation computes what Pillow computes on uint8 (torchvision's transforms of PIL images use it), rounding
included; images are float tensors [B, 3, H, W] that hold whole numbers from 0 to 255.
"""

from collections.abc import Callable
from functools import cache
from math import floor, sqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from orl.config import Views
from orl.networks.backbones import normalize

# One row of parameters per view; 0 in a switch or in `blur` means: leave the image alone.
COLUMNS = ("flip", "jitter", "order", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")
ORDERS = [[int(i) for i in order] for order in np.ndindex(4, 4, 4, 4) if sorted(order) == [0, 1, 2, 3]]
SOLARIZE_THRESHOLD = 128


def draw(views: Views, recipe: int, rng: np.random.Generator) -> np.ndarray:
    """Parameters of one view, float32 [len(COLUMNS)]; recipe 0 or 1 (view 1 or 2)."""
    brightness, contrast, saturation, hue = views.jitter
    u = rng.random(5)
    row = (
        u[0] < views.flip_p,
        u[1] < views.jitter_p,
        rng.integers(len(ORDERS)),
        rng.uniform(max(0, 1 - brightness), 1 + brightness),
        rng.uniform(max(0, 1 - contrast), 1 + contrast),
        rng.uniform(max(0, 1 - saturation), 1 + saturation),
        rng.uniform(-hue, hue),
        u[2] < views.grayscale_p,
        rng.uniform(*views.blur_radius) * (u[3] < views.blur_p[recipe]),
        u[4] < views.solarize_p[recipe],
    )
    return np.array(row, np.float32)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(base: Tensor | float, images: Tensor, factor: Tensor) -> Tensor:
    return (base + _column(factor) * (images - base)).clamp(0, 255).floor()


def luma(images: Tensor) -> Tensor:
    """ITU-R 601 luma [B, 1, H, W] in Pillow's fixed-point arithmetic."""
    red, green, blue = images.split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor()


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black; factor float32 [B]."""
    return _blend(0.0, images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma; factor float32 [B]."""
    return _blend((luma(images).mean((1, 2, 3), keepdim=True) + 0.5).floor(), images, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma; factor float32 [B]."""
    return _blend(luma(images), images, factor)


def hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by factor float32 [B] of the circle, through Pillow's 8-bit HSV."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    safe = chroma.clamp(min=1)
    # Pillow divides in float and goes on in double; so do we, for rounding down is not forgiving.
    r, g, b = (((value - band) / safe).double() for band in (red, green, blue))
    angle = torch.where(red == value, b - g, torch.where(green == value, 2 + r - b, 4 + g - r)).float()
    h = (((angle.double() / 6 + 1) % 1).float().double() * 255).floor()
    s = (chroma / value.clamp(min=1) * 255).floor().double() / 255
    h = (torch.where(chroma == 0, 0.0, h) + _column((factor * 255).trunc())) % 256 * 6 / 255
    sector = h.floor()
    f = (h - sector).float().double()
    p = (value * (1 - s) + 0.5).floor()
    q = (value * (1 - s * f) + 0.5).floor()
    t = (value * (1 - s * (1 - f)) + 0.5).floor()
    sector = sector % 6
    choice = _sectors(images.device)[:, sector.long().squeeze(1)].transpose(0, 1)
    return torch.cat([value, t, p, q], 1).gather(1, choice).float()


@cache  # copying numbers to a GPU waits for all that it has to do
def _sectors(device: torch.device) -> Tensor:
    """Which of v, t, p, q is red, green and blue in each sixth of the circle of hues."""
    return torch.tensor([[0, 3, 2, 2, 1, 0], [1, 0, 0, 3, 2, 2], [2, 2, 1, 0, 0, 3]]).to(device)


def grayscale(images: Tensor) -> Tensor:
    """The luma in all three channels."""
    return luma(images).expand_as(images)


def solarize(images: Tensor) -> Tensor:
    """Invert what is at or above the threshold."""
    return torch.where(images < SOLARIZE_THRESHOLD, images, 255 - images)


def box_radius(sigma: float, passes: int = 3) -> float:
    """Radius of the extended box blur that, repeated, has this standard deviation (Gwosdek et al., 2011)."""
    variance = sigma * sigma / passes
    whole = floor((sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + rest


def blur_taps(sigma: np.ndarray) -> np.ndarray:
    """Weights [B, reach + 1] of the extended box by distance from its middle, for standard deviations [B] (pixels)."""
    radii = np.array([box_radius(float(value)) for value in sigma])
    whole = radii.astype(int)
    weights = np.zeros((len(radii), int(whole.max()) + 2), np.float32)
    for row, (radius, inner) in enumerate(zip(radii, whole, strict=True)):
        weights[row, : inner + 1] = 1 / (2 * radius + 1)
        weights[row, inner + 1] = (1 - (2 * inner + 1) / (2 * radius + 1)) / 2
    return weights


def blur(images: Tensor, taps: Tensor) -> Tensor:
    """Pillow's Gaussian blur: three passes of an extended box blur along each axis; `taps` float32 [B, reach + 1]."""
    columns, reach = [_column(tap) for tap in taps.unbind(1)], taps.shape[1] - 1
    for axis, sides in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        length = images.shape[axis]
        for _ in range(3):
            padded = pad(images, sides, mode="replicate")
            total = columns[0] * images
            for distance in range(1, reach + 1):
                left = padded.narrow(axis, reach - distance, length)
                total = total + columns[distance] * (left + padded.narrow(axis, reach + distance, length))
            images = (total + 0.5).floor()
    return images


def send(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one type on the device, in one transfer that nothing waits for."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Augmented and normalised views, float32 [B, 3, H, W].

    `images`: uint8 [B, 3, H, W] on the device; `parameters`: float32 [B, len(COLUMNS)] on the CPU (see `draw`).
    """
    value = dict(zip(COLUMNS, parameters.numpy().T, strict=True))
    order = np.array(ORDERS)[value["order"].astype(int)]
    jitters = ((brightness, "brightness"), (contrast, "contrast"), (saturation, "saturation"), (hue, "hue"))
    plan: list[tuple[Callable[..., Tensor], np.ndarray, np.ndarray]] = []  # operation, its rows, their parameters
    none = np.empty(0, np.float32)

    def add(operation: Callable[..., Tensor], chosen: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> None:
        rows = np.flatnonzero(chosen)
        if len(rows):
            plan.append((operation, rows, of(rows)))

    add(lambda part: part.flip(-1), value["flip"] > 0, lambda _: none)
    for place in range(4):
        for number, (operation, name) in enumerate(jitters):
            chosen = (value["jitter"] > 0) & (order[:, place] == number)
            # By 0 the hue is not turned at all: the way through 8-bit HSV would change colours.
            add(operation, chosen & (value[name] != 0 if name == "hue" else True), value[name].__getitem__)
    add(grayscale, value["grayscale"] > 0, lambda _: none)
    add(blur, value["blur"] > 0, lambda rows: blur_taps(value["blur"][rows]))
    add(solarize, value["solarize"] > 0, lambda _: none)

    x = images.float()
    if plan:
        operations, rows, factors = zip(*plan, strict=True)
        on_device = zip(operations, send(list(rows), x.device), send(list(factors), x.device), strict=True)
        for operation, index, factor in on_device:
            x[index] = operation(x[index], factor) if factor.numel() else operation(x[index])
    return normalize(x)
