"""Attention maps of several models side by side (ORL supplement, Figure 2, of which no code was released).

Two maps of the last stage of a backbone: the energy of each cell, and its similarity to a box of the photo.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.decode import Photo, resize_crop
from orl.data.manifest import load
from orl.data.views import rng
from orl.networks import backbones
from orl.progress import track

STRIDE = 32  # of the last stage: its cell i sees around pixel 32 i, all kernels and paddings being symmetric
LONG = 4  # times the short side, at most, that the long side of a network's input is
KINDS = ("energy", "similarity to the box")
COLORS = matplotlib.colormaps["cividis"].resampled(48)  # read alike with any colour vision; few, for small files
DPI, WIDTH = 100, 1100  # of the figures, pixels
PANEL = 340  # pixels at most that a side of a map takes in a photo's figure
# Of the contact sheet: side of a photo, pixels of all photos (which make most of the file), sides (Agg's: 65,535).
THUMBNAIL, PIXELS, SHEET_WIDTH, SHEET_HEIGHT = (60, 150), 90_000, 1120, 30_000
MADE = re.compile(r"attention\.json|contact_sheet\.png|\d\d+-.*\.png|\.snakemake_.*")  # what a former run left

Roi = tuple[float, float, float, float]


@dataclass(frozen=True)
class Shown:
    """A photo to draw: its row and its box (x y w h in pixels), how that was chosen, and the network's input."""

    row: int
    roi: Roi
    chosen: str
    size: tuple[int, int]  # of the input: width, height
    box: Roi  # the same, in shares of the photo's sides


def energy(features: Tensor) -> np.ndarray:
    """Sum over the channels of the squared activations [C, h, w]: float32 [h, w]."""
    return features.square().sum(0).cpu().numpy()


def similarity(features: Tensor, inside: np.ndarray) -> np.ndarray:
    """Cosine of each cell of [C, h, w] with the mean of the cells `inside` (bool [h, w]): float32 [h, w].

    0 where a cell, or the mean, is zero.
    """
    mean = features[:, torch.from_numpy(inside).to(features.device)].mean(1)
    return torch.cosine_similarity(features, mean[:, None, None], dim=0).cpu().numpy()


def centres(count: int) -> np.ndarray:
    """Where the cells of a map's row or column are centred, in pixels of the network's input: float64 [count]."""
    return STRIDE * np.arange(count) + 0.5


def cells(roi: Roi, scale: tuple[float, float], shape: tuple[int, int]) -> np.ndarray:
    """The cells of a map [h, w] whose centres lie in the box: bool [h, w], at least one of them true.

    `roi`: x y w h in pixels of the photo, of which the input has `scale` (across, down) times as many. Left and upper
    border belong to the box. Of a box too narrow, or too low, for any centre: the column, or row, nearest its middle.
    """
    chosen = []
    for start, length, factor, count in zip(roi[:2], roi[2:], scale, shape[::-1], strict=True):
        at = centres(count) / factor
        inside = (start <= at) & (at < start + length)
        chosen.append(inside if inside.any() else np.arange(count) == np.abs(at - start - length / 2).argmin())
    return chosen[1][:, None] & chosen[0]


def enlarge(values: np.ndarray, size: tuple[int, int], panel: tuple[int, int]) -> np.ndarray:
    """A map [h, w] of an input of `size` (w, h) pixels, bilinear at the pixels of a `panel` (w, h) that shows it all.

    Float64 [panel h, panel w]; beyond the outermost centres, their values.
    """
    across, down = (
        np.stack([np.interp((np.arange(shown) + 0.5) * side / shown, centres(count), one) for one in np.eye(count)])
        for shown, side, count in zip(panel, size, values.shape[::-1], strict=True)
    )
    return down.T @ values @ across


def input_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The (width, height) at which the network sees a photo: short side `side`, long one at most LONG times that.

    Both to the nearest number by which the first and the last cell of a map are centred on the photo's borders.
    """
    factor = side / max(min(size), max(size) / LONG)
    width, height = (STRIDE * max(1, round((one * factor - 1) / STRIDE)) + 1 for one in size)
    return width, height


def choose_roi(
    row: int, size: tuple[int, int], proposals: artifacts.Proposals | None, pairs: artifacts.Correspondences | None
) -> tuple[Roi, str]:
    """The box of a photo of `size` (w, h), and how it was chosen.

    The one with the highest summed similarity over its pairs with the photo's neighbours; without pairs the largest;
    without boxes the photo's central half. Of equals the first.
    """
    width, height = size
    if proposals is None:
        return (width / 4, height / 4, width / 2, height / 2), "centre"
    start, stop = proposals.box_offsets[row : row + 2].tolist()
    boxes = np.asarray(proposals.box[start:stop], np.float64)
    if pairs is None:
        best, chosen = boxes[:, 2:].prod(1).argmax(), "largest proposal"
    else:
        k = pairs.neighbor.shape[1]
        own = slice(pairs.pair_offsets[row * k], pairs.pair_offsets[(row + 1) * k])
        total = np.bincount(pairs.pair[own, 0], np.asarray(pairs.similarity[own], np.float64), len(boxes))
        best, chosen = total.argmax(), "most paired by stage 2"
    x, y, w, h = boxes[best].tolist()
    return (x, y, w, h), chosen


def draw(
    config: Config,
    root: str | os.PathLike,
    manifest_path: str | os.PathLike,
    models: Mapping[str, str | os.PathLike],
    output: str | os.PathLike,
    proposals_path: str | os.PathLike | None = None,
    correspondences_path: str | os.PathLike | None = None,
    roi: Roi | None = None,
) -> None:
    """Draw maps of photos of a manifest by each of `models` (name -> backbone.safetensors) into the folder `output`.

    The photos are `downstream.attention.ids`, or drawn by `seed`. A box is `roi` (x y w h in pixels, for one photo),
    else that of `choose_roi`. The folder holds a figure of each photo, `NN-ID.png` (characters of the id other than
    letters, digits, point, dash and underscore become underscores), `contact_sheet.png` with all of them, and
    `attention.json`: `photos` (image_id, path, roi, chosen, file), `models`, `settings`, `data`. It replaces that of a
    former run when all is done. Raises InputError, having written nothing.
    """
    if not models:
        raise InputError(f"{output}: no model to draw maps of; name a backbone.safetensors at least.")
    proposals = pairs = None
    if correspondences_path is not None:
        if proposals_path is None:
            raise InputError(f"{correspondences_path}: numbers boxes of a proposals.h5; name that, too.")
        manifest, proposals, pairs = artifacts.read_stage2(manifest_path, proposals_path, correspondences_path)
    elif proposals_path is not None:
        manifest, proposals = artifacts.read_boxes(manifest_path, proposals_path)
    else:
        manifest = artifacts.read_manifest(manifest_path)
    shown = []
    for row in _rows(config, manifest, manifest_path, roi):
        whole = int(manifest.width[row]), int(manifest.height[row])
        box, chosen = choose_roi(row, whole, proposals, pairs) if roi is None else (_checked(roi, whole), "given")
        shares = box[0] / whole[0], box[1] / whole[1], box[2] / whole[0], box[3] / whole[1]
        shown.append(Shown(row, box, chosen, input_size(whole, config.downstream.attention.side), shares))
    for path in models.values():  # before the long work
        backbones.load(path)
    _check_former(Path(output))
    with artifacts.atomic_folder(Path(output).resolve()) as folder, matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc
        maps = [_maps(config, root, manifest, shown, path, name) for name, path in models.items()]
        files = [f"{number:02d}-{_safe(str(manifest.image_id[one.row]))}.png" for number, one in enumerate(shown, 1)]
        thumbnails = []
        for number, (one, file) in enumerate(zip(shown, files, strict=True)):
            photo = load(root, manifest, one.row, config.data.exif)
            by_model = [own[number] for own in maps]
            _save(_figure(photo, one, by_model, list(models), Path(file).stem), folder / file)
            thumbnails.append(_fit(photo, (THUMBNAIL[1], THUMBNAIL[1])))
        _save(_sheet(thumbnails, shown, maps, list(models)), folder / "contact_sheet.png")
        listed = [
            {
                "image_id": str(manifest.image_id[one.row]),
                "path": str(manifest.path[one.row]),
                "roi": list(one.roi),
                "chosen": one.chosen,
                "file": file,
            }
            for one, file in zip(shown, files, strict=True)
        ]
        given = {"manifest": manifest_path, "proposals": proposals_path, "correspondences": correspondences_path}
        result = {
            "photos": listed,
            "models": list(models),
            "settings": used(config, "attention"),
            "data": {
                **{name: artifacts.fingerprint(path) for name, path in given.items() if path is not None},
                "weights": {name: artifacts.fingerprint(path) for name, path in models.items()},
            },
        }
        artifacts.write_json(folder / "attention.json", result)


def _rows(
    config: Config, manifest: artifacts.Manifest, manifest_path: str | os.PathLike, roi: Roi | None
) -> Sequence[int]:
    """The manifest's rows of the photos to draw."""
    section = config.downstream.attention
    if roi is not None and len(section.ids) != 1:
        raise InputError(f"--roi: belongs to one photo, but ids names {len(section.ids)}; name that one.")
    if not section.ids:
        # More photos: these and others.
        return rng(config.seed, 5).permutation(len(manifest))[: section.photos].tolist()
    row_of = {image_id: row for row, image_id in reversed(list(enumerate(manifest.image_id.tolist())))}
    for image_id in section.ids:
        if image_id not in row_of:
            near = difflib.get_close_matches(image_id, list(row_of), 1, 0.0)[0]
            raise InputError(f"{manifest_path}: has no photo {image_id!r}; did you mean {near!r}?")
    return [row_of[image_id] for image_id in section.ids]


def _checked(roi: Roi, size: tuple[int, int]) -> Roi:
    x, y, w, h = roi
    if not (x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= size[0] and y + h <= size[1]):
        raise InputError(
            f"--roi: box {x:g} {y:g} {w:g} {h:g} (x y w h) is not inside the photo, which is {size[0]} x {size[1]} "
            f"pixels; correct it."
        )
    return roi


def _check_former(output: Path) -> None:
    """Raise InputError unless the folder is new or of a former run."""
    if output.exists():
        foreign = [path.name for path in output.iterdir() if not MADE.fullmatch(path.name)] if output.is_dir() else [""]
        if foreign:
            raise InputError(f"{output / foreign[0]}: is in the way; name a folder that is new or of a former run.")


def _maps(
    config: Config,
    root: str | os.PathLike,
    manifest: artifacts.Manifest,
    photos: Sequence[Shown],
    weights: str | os.PathLike,
    name: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Energy and similarity of each photo, by one model; float32 without TF32."""
    device = backbones.device()
    model = backbones.load(weights).to(device)
    found = []
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        for one in track(photos, len(photos), f"maps of {name}"):
            photo = load(root, manifest, one.row, config.data.exif)
            height, width = photo.shape[:2]
            image = torch.from_numpy(resize_crop(photo, (0, 0, width, height), one.size)).permute(2, 0, 1)[None]
            (features,) = model.stages(backbones.normalize(image.to(device)))[-1]
            if not features.isfinite().all():
                path = os.path.join(root, str(manifest.path[one.row]))
                raise InputError(f"{weights}: its features of {path} are not finite; train or export the model again.")
            scale = one.size[0] / width, one.size[1] / height
            inside = cells(one.roi, scale, (features.shape[1], features.shape[2]))
            found.append((energy(features), similarity(features, inside)))
    return found


# Figures: panels are placed by pixels from the upper left corner, so that they show photo and maps pixel by pixel.


class _Canvas:
    """A white figure of so many pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def image(self, pixels: np.ndarray, x: int, y: int, box: Roi | None = None) -> None:
        """Pixels [h, w, 3], or a map [h, w] from its least to its largest value, and a box in shares of both sides."""
        height, width = pixels.shape[:2]
        place = x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height
        axes = self.figure.add_axes(place)
        axes.imshow(pixels, COLORS, extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")
        if box:
            for color, thickness in (("black", 2.5), ("white", 1.2)):  # shows on any colour
                axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, edgecolor=color, linewidth=thickness))
        axes.set_axis_off()

    def text(self, words: str, x: float, y: float, size: float = 8, room: float = 9999, **style: object) -> None:
        """One line with its upper left corner at x, y, cut to about `room` pixels."""
        most = int(room / (0.62 * size * DPI / 72))  # DejaVu Sans: about 0.62 of its size a letter
        words = words if len(words) <= most else words[: max(most - 1, 1)] + "…"
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, words, **{"fontsize": size, "va": "top", "parse_math": False, **style})  # type: ignore[arg-type]


def _figure(
    photo: Photo, one: Shown, maps: Sequence[tuple[np.ndarray, np.ndarray]], models: Sequence[str], title: str
) -> Figure:
    """A photo with its box, and right of it a column with the two maps of each model."""
    margin, gap, head, foot = 12, 10, 22, 22
    turned = 18  # what the kinds' names take left of the maps
    room = (WIDTH - 2 * margin - turned) // (len(models) + 1) - gap
    picture = _fit(photo, (min(room, PANEL), PANEL))
    height, width = picture.shape[:2]
    column = max(width, min(room, 150))  # beside narrow photos there is room for the words
    rise = max(height, 100) + foot
    canvas = _Canvas(2 * margin + turned + (column + gap) * (len(models) + 1) - gap, 2 * margin + head + 2 * rise)
    canvas.text(title, margin, margin, 9, column)
    canvas.image(picture, margin, margin + head, one.box)
    for number, (name, both) in enumerate(zip(models, maps, strict=True), 1):
        x = margin + turned + number * (column + gap)
        canvas.text(name, x, margin, 9, column, weight="bold")
        for kind, values, y in zip(KINDS, both, (margin + head, margin + head + rise), strict=True):
            canvas.image(enlarge(values, one.size, (width, height)), x, y, one.box)
            canvas.text(f"{values.min():.3g} to {values.max():.3g}", x, y + height + 4, 7.5, column)
            if number == 1:
                canvas.text(kind, x - 4, y + height / 2, 8, rotation=90, va="center", ha="right")
    y = margin + head + rise
    canvas.image(np.tile(np.linspace(0, 1, min(column, 150)), (10, 1)), margin, y)
    words = ("each map: least to largest", f"box: {one.chosen}", f"input: {one.size[0]} x {one.size[1]} px")
    for line, text in enumerate(words):
        canvas.text(text, margin, y + 14 + 16 * line, 7.5)
    return canvas.figure


def _sheet(
    pictures: Sequence[Photo],
    shown: Sequence[Shown],
    maps: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    models: Sequence[str],
) -> Figure:
    """A row for each photo: the photo with its box, the energy by each model, the similarity by each."""
    margin, left, gap, head = 8, 28, 4, 32
    room = (SHEET_WIDTH - left - margin) // (2 * len(models) + 1) - gap
    side = int(np.clip((PIXELS / len(shown)) ** 0.5, *THUMBNAIL))
    side = max(1, min(side, room, SHEET_HEIGHT // len(shown) - gap))
    pictures = [_fit(picture, (side, side)) for picture in pictures]
    column = max(side, min(room, 60)) + gap
    heights = [picture.shape[0] + gap for picture in pictures]
    canvas = _Canvas(left + column * (2 * len(models) + 1) - gap + margin, 2 * margin + head + sum(heights) - gap)
    for kind, first in zip(KINDS, (1, 1 + len(models)), strict=True):
        canvas.text(kind, left + column * first, margin, 8, column * len(models), weight="bold")
        for place, name in enumerate(models, first):
            canvas.text(name, left + column * place, margin + 15, 7.5, column - gap)
    y = margin + head
    for row, (picture, one, height) in enumerate(zip(pictures, shown, heights, strict=True)):
        canvas.text(f"{row + 1:02d}", margin, y, 7.5)
        canvas.image(picture, left, y, one.box)
        for place, values in enumerate((own[row][kind] for kind in range(2) for own in maps), 1):
            shape = picture.shape[1], picture.shape[0]
            canvas.image(enlarge(values, one.size, shape), left + column * place, y, one.box)
        y += height
    return canvas.figure


def _fit(image: Photo, room: tuple[int, int]) -> Photo:
    """An image reduced, or enlarged, to fit into `room` (w, h)."""
    height, width = image.shape[:2]
    factor = min(room[0] / width, room[1] / height)
    return resize_crop(image, (0, 0, width, height), (max(1, round(width * factor)), max(1, round(height * factor))))


def _safe(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[:80]


def _save(figure: Figure, path: Path) -> None:
    with artifacts.atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
