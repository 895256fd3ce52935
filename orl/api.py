"""What `import orl` offers: backbones from files, and stage 2's steps on any photos, with any backbone.

A *photo* is a path (of what `orl.data.decode` reads), a PIL image, or a uint8 array [H, W, 3], RGB. A *backbone* is any
torch module that makes a map [N, C, h, w], which is averaged over its cells, or a vector [N, C] of pictures
[N, 3, H, W]. It runs where its weights are, in eval mode, and is left in the mode that it was in.

Pixels, of 0 to 1, get `mean` and `std` taken out: by default ImageNet's, which this project's, torchvision's and timm's
ResNets want. Others may want their own, as timm says in `model.pretrained_cfg`.

`settings` are of a config's form (config/README.md), or such a file; what is not given has the paper's value.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from orl import InputError, config
from orl.data.decode import Exif, Photo, as_rgb, decode, resize_crop
from orl.discovery import encode
from orl.discovery.embed import picture
from orl.networks import MEAN, STD, weights

AnyPhoto = str | os.PathLike | Image.Image | np.ndarray
Settings = Mapping[str, Any] | str | os.PathLike


class Pairs(NamedTuple):
    """Regions of two photos that show the same kind of thing, best first.

    Row i of `a` and of `b`, int32 [P, 4], x y w h in pixels of the first and of the second photo, belong together;
    `similarity` float32 [P]: their cosines. A region may occur in several pairs.
    """

    a: np.ndarray
    b: np.ndarray
    similarity: np.ndarray


def load_backbone(path: str | os.PathLike) -> nn.Module:
    """The backbone of a file of weights, in eval mode on the CPU: float [N, 3, H, W] -> pooled features [N, C].

    Takes what `stage1.weights` takes (docs/guides/weights.md); no code of the file is run. Raises
    InputError.
    """
    return weights.read(path).encoder.backbone


def embed(
    backbone: nn.Module,
    images: Iterable[AnyPhoto],
    settings: Settings | None = None,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> np.ndarray:
    """The features of photos by their centre crops: float32 [N, C], unit rows.

    Resize, crop and precision are `embeddings` of the settings, as in stage 2, whose own embeddings are the output of
    stage 1's projector (`orl.networks.ema.load_encoder`) instead. Raises InputError.
    """
    chosen = _config(settings)
    if isinstance(images, AnyPhoto) and not isinstance(images, np.ndarray):
        raise InputError("images: is a single photo; put it into a list.")
    photos = list(images)
    if not photos:
        raise InputError("images: is empty; give at least one photo.")
    names = [_checked(photo, f"photo {number}") for number, photo in enumerate(photos)]
    found = []
    with _encoding(backbone, chosen.embeddings.precision, mean, std) as encoder:
        for start in range(0, len(photos), encode.BATCH):
            part = slice(start, start + encode.BATCH)
            pictures = [picture(_decoded(photo, chosen.data.exif), chosen.embeddings) for photo in photos[part]]
            found.append(encoder(torch.from_numpy(np.stack(pictures)), names[part]))
    return np.concatenate(found)


def correspond(
    backbone: nn.Module,
    a: AnyPhoto,
    b: AnyPhoto,
    settings: Settings | None = None,
    *,
    ids: tuple[str, str] | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Pairs:
    """The RoI pairs of two photos, as stage 2 finds them between a photo and a neighbour (ORL release).

    `proposals`, `rois` and `correspondences` of the settings say how; `seed` and a photo's id seed selective search.
    `ids` are those of manifest.csv; by default a file's name without its ending, which is what they are unless
    `data.layout` is folder. Raises InputError.
    """
    from orl.discovery.correspondences import top_pairs
    from orl.discovery.proposals import kept_boxes
    from orl.discovery.rois import cut

    chosen = _config(settings)
    if chosen.correspondences.method != "similar":
        raise InputError("settings: correspondences.method: random pairs are for whole runs; leave it out.")
    names = [_checked(photo, name) for photo, name in ((a, "the first photo"), (b, "the second photo"))]
    boxes, features = [], []
    with _encoding(backbone, chosen.rois.precision, mean, std) as encoder:
        for number, photo in enumerate((a, b)):
            image = _decoded(photo, chosen.data.exif)
            own = kept_boxes(image, chosen, ids[number] if ids else _id(photo))
            crops = torch.from_numpy(cut(image, own.tolist(), chosen.rois.size))
            features.append(encoder(crops, [names[number]] * len(own)).astype(np.float16))  # as stage 2 keeps them
            boxes.append(own)
    here, there, similarity = top_pairs(features[0], features[1], chosen.correspondences.ratio)
    return Pairs(boxes[0][here], boxes[1][there], similarity)


def draw(a: AnyPhoto, b: AnyPhoto, pairs: Pairs, settings: Settings | None = None, *, side: int = 480) -> Image.Image:
    """Two photos side by side, each with a long side of `side` pixels, and `pairs` numbered and joined by lines.

    The colours can be told apart with any colour vision; of more than 7 pairs they repeat. Raises InputError.
    """
    from orl.report import figures

    exif = _config(settings).data.exif
    for photo, name in ((a, "the first photo"), (b, "the second photo")):
        _checked(photo, name)
    photos = _decoded(a, exif), _decoded(b, exif)
    for photo, boxes, name in zip(photos, pairs, ("first", "second"), strict=False):
        low, high = np.asarray(boxes)[:, :2], np.asarray(boxes)[:, :2] + np.asarray(boxes)[:, 2:]
        if (low < 0).any() or (high > photo.shape[1::-1]).any():
            raise InputError(f"pairs: has boxes outside of the {name} photo; give the photos that they are of.")
    two = list(zip(pairs.a, pairs.b, strict=True))
    drawing = figures.pair(photos, ("", ""), side, two, [str(number) for number in range(1, len(two) + 1)])
    drawn = Image.new("RGB", (ceil(drawing.width), ceil(drawing.height)), "white")
    for photo, (x, y, w, h) in zip(photos, drawing.places, strict=True):
        size = max(1, round(w)), max(1, round(h))
        drawn.paste(Image.fromarray(resize_crop(photo, (0, 0, *photo.shape[1::-1]), size)), (round(x), round(y)))
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(12)
    for match in reversed(drawing.matches):  # the best on top
        for color, edge in (("white", 1), (match.style.color, 0)):  # seen on any photo
            for x, y, w, h in match.boxes:
                pen.rectangle((x - edge, y - edge, x + w + edge, y + h + edge), outline=color, width=3 + 2 * edge)
            pen.line(match.line, color, 3 + 2 * edge)
    for match in drawing.matches:
        for x, y in match.tags:
            pen.rectangle((x, y, x + figures.TAG, y + figures.TAG), "white", match.style.color, 2)
            pen.text((x + figures.TAG / 2, y + figures.TAG / 2), match.style.name, "black", font, "mm")
    return drawn


def _config(settings: Settings | None) -> config.Config:
    if isinstance(settings, str | os.PathLike):
        return config.load(os.fspath(settings))
    return config.parse(dict(settings or {}))


def _checked(photo: Any, name: str) -> str:
    """What to call a photo: its path, or `name`. Raises InputError where it is none, before anything is decoded."""
    if isinstance(photo, str | os.PathLike):
        if not os.path.isfile(photo):
            raise InputError(f"{os.fspath(photo)}: no such file; name a photo.")
        return os.fspath(photo)
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise InputError(f"{name}: is an array of {photo.dtype} {list(photo.shape)}; give uint8 [H, W, 3], RGB.")
    elif not isinstance(photo, Image.Image):
        raise InputError(f"{name}: is {type(photo).__name__}; give a path, a PIL image or a uint8 array [H, W, 3].")
    return name


def _decoded(photo: AnyPhoto, exif: Exif) -> Photo:
    if isinstance(photo, np.ndarray):
        return photo
    return np.array(as_rgb(photo)) if isinstance(photo, Image.Image) else decode(photo, exif)


def _id(photo: AnyPhoto) -> str:
    return Path(photo).stem if isinstance(photo, str | os.PathLike) else ""


class _Pooled(nn.Module):
    """A backbone whose maps are averaged: float [N, 3, H, W] -> [N, C]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pictures: Tensor) -> Tensor:
        found = self.backbone(pictures)
        if not isinstance(found, Tensor) or found.ndim not in (2, 4):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the backbone: makes {shape} of {list(pictures.shape)}; give one that makes a map "
                             f"[N, C, h, w] or a vector [N, C].")  # fmt: skip
        return found.mean((2, 3)) if found.ndim == 4 else found


@contextmanager
def _encoding(
    backbone: nn.Module, precision: str, mean: Sequence[float], std: Sequence[float]
) -> Iterator[encode.Encoder]:
    """Stage 2's encoder with a backbone where it is; in eval mode for as long as the block lasts. Raises InputError."""
    if not isinstance(backbone, nn.Module):
        raise InputError(f"the backbone: is {type(backbone).__name__}; give a torch module, as load_backbone does.")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"mean and std: are {list(mean)} and {list(std)}; give three numbers each, std above 0.")
    device = next((one.device for one in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield encode.Encoder(_Pooled(backbone).eval(), "the backbone", precision, device, mean, std)
    finally:
        for module, training in modes:
            module.training = training
