"""The embedded scenes: photo-like pictures whose structure is what ORL lives on, drawn with numpy and OpenCV.

A scene draws a latent theme that makes three of twelve classes likely; the background family goes with the theme,
never with the class inside it. A class is a shape with a texture: each shape and each texture is shared by several
classes, and inside a theme all three shapes and all three textures differ. Colours mean nothing.
Every random choice derives from (seed, split, index), so a picture depends neither on the number of workers nor on
how many other pictures are drawn.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SHAPES = ("disc", "triangle", "cross", "bar")
TEXTURES = ("striped", "spotted", "patched")
BACKGROUNDS = ("cloud", "grain", "streak", "blotch")  # family t goes with theme t
SPLITS = ("train", "val", "objects_train", "objects_val")  # the position is part of every random seed

SIZE = (0.15, 0.70)  # long side of an object over the short side of its scene
MIN_VISIBLE = 0.25  # objects that show less get no annotation
DIFFICULT_VISIBLE = 0.45  # VOC's `difficult`: objects that show less than this ...
DIFFICULT_SIDE = 0.11  # ... or whose visible box is narrower than this share of the short side
JPEG_QUALITY = 90


@dataclass(frozen=True)
class SceneClass:
    """One class: its name, COCO category id (with gaps, as in COCO), theme, shape and texture."""

    name: str
    category_id: int
    theme: int
    shape: str
    texture: str


def _classes() -> Iterator[SceneClass]:
    for theme, k in itertools.product(range(len(BACKGROUNDS)), range(len(TEXTURES))):
        i, shape, texture = 3 * theme + k, SHAPES[(theme + k) % len(SHAPES)], TEXTURES[k]
        yield SceneClass(f"{texture}_{shape}", i + 1 + i // 5, theme, shape, texture)


CLASSES = tuple(_classes())


@dataclass
class Item:
    """Something to paint. An object has a class; a distractor has none, and lacks its shape or its texture."""

    label: int | None  # index into CLASSES
    shape: str  # of SHAPES, or "smear": no shape
    texture: str  # of TEXTURES, or "plain": no texture
    size: float  # long side of the whole outline, pixels
    centre: tuple[float, float]


@dataclass
class Shown:
    """An object as it can be seen: its visible mask (bool [H, W]) and the visible share of its whole outline."""

    label: int
    mask: NDArray[np.bool_]
    visible: float
    box: tuple[int, int, int, int] = field(init=False)  # x y w h

    def __post_init__(self) -> None:
        self.box = tuple(cv2.boundingRect(self.mask.astype(np.uint8)))  # type: ignore[assignment]

    @property
    def difficult(self) -> bool:
        small = min(self.box[2:]) < DIFFICULT_SIDE * min(self.mask.shape)
        return self.visible < DIFFICULT_VISIBLE or small


# --- drawing ---------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, height: int, width: int, cell: tuple[float, float]) -> Array:
    """Smooth noise float32 [height, width], mean 0 and spread about 1, with cells of (rows, columns) pixels."""
    grid = (max(2, round(height / cell[0])), max(2, round(width / cell[1])))
    coarse = rng.standard_normal(grid, dtype=np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)  # type: ignore[return-value]


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Array:
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]  # type: ignore[no-any-return]


def _background(rng: np.random.Generator, family: str, height: int, width: int) -> Array:
    """Multi-scale noise between random colours, float32 [H, W, 3] in 0..1; the family is the kind of noise."""
    side = min(height, width)
    stretch = {"streak": (0.25, 4.0)}.get(family, (1.0, 1.0))
    weights = {"cloud": (1.0, 0.5, 0.15, 0.05), "grain": (0.35, 0.2, 0.35, 0.8)}.get(family, (0.7, 0.7, 0.4, 0.2))
    total = np.zeros((height, width), np.float32)
    for weight, share in zip(weights, (0.5, 0.2, 0.07, 0.02), strict=True):
        total += weight * _noise(rng, height, width, (side * share * stretch[0], side * share * stretch[1]))
    if family == "blotch":
        total = np.tanh(4 * total) * 0.8 + 0.1 * total
    tone = np.clip(0.5 + 0.3 * total, 0, 1)[..., None]
    ground = _colour(rng, (0.05, 0.55), (0.3, 0.85))
    floor = _colour(rng, (0.05, 0.55), (0.3, 0.85))
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    horizon = height * rng.uniform(0.25, 0.75) + rng.normal(0, 0.1) * (xs - width / 2)
    below = np.clip((ys - horizon) / rng.uniform(1, 6) + 0.5, 0, 1)[..., None] * (rng.random() < 0.6)
    base = ground + below * (floor - ground)
    return (base * (0.72 + 0.5 * tone)).astype(np.float32)


def _outline(rng: np.random.Generator, shape: str) -> Array:
    """A closed outline float32 [n, 2] around the origin, long side of its bounding box 1; pose and contour vary."""
    corners = {
        "triangle": [(0, -1), (0.92, 0.7), (-0.92, 0.7)],
        "cross": [(-a, -b) for a, b in ((0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
                                        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33))],
        "bar": [(-1, -0.36), (1, -0.36), (1, 0.36), (-1, 0.36)],
    }.get(shape) or [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 24, endpoint=False)]
    ends = np.array(corners)
    per_edge = math.ceil(96 / len(ends))
    steps = np.linspace(0, 1, per_edge, endpoint=False)[None, :, None]
    points = (ends[:, None] * (1 - steps) + np.roll(ends, -1, 0)[:, None] * steps).reshape(-1, 2)
    n, radius = len(points), rng.integers(1, 4)
    points = np.mean([np.roll(points, k, 0) for k in range(-radius, radius + 1)], axis=0)  # rounded corners
    points[:, 0] *= rng.uniform(0.85, 1.18)
    turn = np.arange(n) * (2 * math.pi / n)
    wobble = 0.22 if shape == "smear" else 0.025
    for harmonic in range(2, 6):
        points *= 1 + wobble * rng.normal() * np.cos(harmonic * turn + rng.uniform(0, 2 * math.pi))[:, None]
    c, s = math.cos(angle := rng.uniform(0, 2 * math.pi)), math.sin(angle)
    points = points @ np.array([[c, s], [-s, c]])
    low, high = points.min(0), points.max(0)
    return ((points - (low + high) / 2) / (high - low).max()).astype(np.float32)


def _texture(rng: np.random.Generator, texture: str, ys: Array, xs: Array, side: float) -> Array:
    """The second tone's share in 0..1 at each pixel, float32 [h, w]; `side` (pixels) sets how coarse it is."""
    period = side * rng.uniform(0.85, 1.2) * {"striped": 0.36, "spotted": 0.42, "patched": 0.34}.get(texture, 1.0)
    c, s = math.cos(angle := rng.uniform(0, 2 * math.pi)), math.sin(angle)
    bend = [0.12 * _noise(rng, *xs.shape, (side / 2, side / 2)) for _ in range(2)]
    u = (xs * c + ys * s) / period + rng.uniform(0, 1) + bend[0]
    v = (ys * c - xs * s) / period + rng.uniform(0, 1) + bend[1]
    if texture == "striped":
        return np.clip(0.5 + 2.5 * np.sin(2 * math.pi * u), 0, 1)
    if texture == "spotted":
        u = u + 0.5 * (np.floor(v) % 2)
        away = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)
        return np.clip((0.33 - away) * 10 + 0.5, 0, 1)
    if texture == "patched":
        tones = rng.permuted(np.tile(np.array([0, 0.5, 1], np.float32), 86)[:256]).reshape(16, 16)
        return tones[np.floor(v).astype(int) % 16, np.floor(u).astype(int) % 16]
    return np.zeros_like(xs)


def _paint(rng: np.random.Generator, canvas: Array, item: Item, light: float) -> tuple[NDArray[np.bool_], float]:
    """Paint one item on `canvas` (float32 [H, W, 3], in place); return its mask inside the picture, bool [H, W],
    and the area of its whole outline, pixels."""
    height, width = canvas.shape[:2]
    outline = _outline(rng, item.shape) * item.size
    area = float(cv2.contourArea(outline))
    # The window holds the outline and its shadow; everything inside is drawn at twice the size, then averaged.
    reach = math.ceil(item.size * 0.75) + 2
    left, top = (math.floor(c) - reach for c in item.centre)
    side = 2 * reach
    offset = np.array(item.centre) - (left, top)
    alpha2 = np.zeros((2 * side, 2 * side), np.uint8)
    cv2.fillPoly(alpha2, [np.round((outline + offset) * 2 * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    alpha = cv2.resize(alpha2, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    if item.shape == "smear":
        alpha = cv2.GaussianBlur(alpha, (0, 0), item.size * 0.06) * 0.85

    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, height), min(left + side, width)
    inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    under = canvas[y0:y1, x0:x1]
    for _ in range(6):  # not camouflaged: another colour if the first is close to what lies behind
        first = _colour(rng, (0.15, 0.9), (0.35, 0.95))
        grey = float(first.mean())
        second = np.clip(first * (rng.uniform(0.3, 0.5) if grey > 0.45 else rng.uniform(1.9, 2.6)) + 0.05, 0, 1)
        if np.abs((first + second) / 2 - under.mean((0, 1))).max() > 0.18:
            break
    if rng.random() < 0.5:
        first, second = second, first
    ys, xs = np.mgrid[0 : 2 * side, 0 : 2 * side].astype(np.float32) / 2
    share = cv2.resize(_texture(rng, item.texture, ys, xs, math.sqrt(area)), (side, side), interpolation=cv2.INTER_AREA)
    colour = first + share[..., None] * (second - first)
    # Shape from shading: brighter towards the light, darker at the rim.
    ys, xs = ys[::2, ::2], xs[::2, ::2]
    dx, dy = math.cos(light), math.sin(light)
    lit = ((xs - offset[0]) * dx + (ys - offset[1]) * dy) / item.size
    rim = cv2.GaussianBlur(alpha, (0, 0), max(item.size * 0.08, 0.5))
    shade = (0.62 + 0.4 * rim + 0.35 * lit) * (1 + 0.04 * _noise(rng, side, side, (item.size / 6, item.size / 6)))
    colour *= shade[..., None]

    if item.shape != "smear":
        move = item.size * rng.uniform(0.04, 0.12)
        shadow = cv2.warpAffine(alpha, np.array([[1, 0, -dx * move], [0, 1, -dy * move]]), (side, side))
        shadow = cv2.GaussianBlur(shadow, (0, 0), max(item.size * 0.05, 0.5))
        under *= 1 - rng.uniform(0.3, 0.55) * shadow[inside][..., None]
    cover = alpha[inside][..., None]
    under += cover * (colour[inside] - under)
    mask = np.zeros((height, width), np.bool_)
    mask[y0:y1, x0:x1] = alpha[inside] >= 0.5
    return mask, area


def _picture(rng: np.random.Generator, family: str, items: list[Item], height: int, width: int
             ) -> tuple[NDArray[np.uint8], list[Shown]]:
    """Paint the items back to front; return the RGB picture uint8 [H, W, 3] and the objects that show."""
    canvas = _background(rng, family, height, width)
    light = rng.uniform(0, 2 * math.pi)
    owner = np.full((height, width), -1, np.int16)
    areas = []
    for number, item in enumerate(items):
        mask, area = _paint(rng, canvas, item, light)
        owner[mask] = number
        areas.append(area)
    ys, xs = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j].astype(np.float32)
    canvas *= (1 + rng.uniform(0.1, 0.45) * (xs * math.cos(light) + ys * math.sin(light)))[..., None]
    canvas *= (rng.uniform(0.75, 1.15) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.7))
    canvas += rng.uniform(0.008, 0.025) * rng.standard_normal(canvas.shape, dtype=np.float32)
    picture = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    shown = []
    for number, (item, area) in enumerate(zip(items, areas, strict=True)):
        mask = owner == number
        if item.label is not None and (visible := mask.sum() / max(area, 1.0)) >= MIN_VISIBLE:
            shown.append(Shown(item.label, mask, float(visible)))
    return picture, shown


# --- composition -----------------------------------------------------------------------------------------------


def _place(rng: np.random.Generator, size: float, placed: list[Item], height: int, width: int) -> tuple[float, float]:
    """A centre that lets the object leave the frame a little and overlap the placed ones, but rarely bury them."""
    best, best_gap = (0.0, 0.0), -1.0
    for _ in range(10):
        centre = (rng.uniform(0.35 * size, width - 0.35 * size), rng.uniform(0.35 * size, height - 0.35 * size))
        gap = min((math.dist(centre, p.centre) / (size + p.size) for p in placed), default=1.0)
        if gap > best_gap:
            best, best_gap = centre, gap
        if gap > 0.36:  # 0.5: the circles around both just touch
            break
    return best


def draw_scene(seed: int, split: str, index: int, size: tuple[int, int], background_correlation: float,
               theme_share: float) -> tuple[NDArray[np.uint8], list[Shown], int, str]:
    """Draw one scene: (RGB uint8 [H, W, 3], the objects that show, theme number, background family)."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    height, width = (int(n) for n in rng.integers(size[0], size[1] + 1, 2))
    theme = int(rng.integers(len(BACKGROUNDS)))
    related = rng.random() < background_correlation
    family = BACKGROUNDS[theme if related else rng.integers(len(BACKGROUNDS))]
    likely = [i for i, c in enumerate(CLASSES) if c.theme == theme]
    other = [i for i, c in enumerate(CLASSES) if c.theme != theme]
    side = min(height, width)
    items: list[Item] = []
    for _ in range(rng.integers(2, 5)):
        label = int(rng.choice(likely if rng.random() < theme_share else other))
        length = side * (SIZE[0] + (SIZE[1] - SIZE[0]) * rng.beta(1.8, 2.4))
        centre = _place(rng, length, items, height, width)
        items.append(Item(label, CLASSES[label].shape, CLASSES[label].texture, length, centre))
    for lacks in ("shape", "texture"):
        if rng.random() < 0.7:
            length = side * rng.uniform(0.2, 0.45)
            shape = "smear" if lacks == "shape" else str(rng.choice(SHAPES))
            texture = "plain" if lacks == "texture" else str(rng.choice(TEXTURES))
            items.append(Item(None, shape, texture, length, _place(rng, length, items, height, width)))
    order = rng.permutation(len(items))
    picture, shown = _picture(rng, family, [items[i] for i in order], height, width)
    return picture, shown, theme, family


def draw_object(seed: int, split: str, index: int) -> tuple[NDArray[np.uint8], int]:
    """Draw one object of class `index % 12` alone, any background: (RGB uint8 [S, S, 3] with S 64..96, label)."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    side, label = int(rng.integers(64, 97)), index % len(CLASSES)
    size = side * rng.uniform(0.55, 0.9)
    centre = (side / 2 + rng.normal(0, 0.04) * side, side / 2 + rng.normal(0, 0.04) * side)
    item = Item(label, CLASSES[label].shape, CLASSES[label].texture, size, centre)
    picture, _ = _picture(rng, str(rng.choice(BACKGROUNDS)), [item], side, side)
    return picture, label


# --- files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What a worker process needs to draw and write picture `index` of any split."""

    root: Path
    seed: int
    size: tuple[int, int]
    background_correlation: float
    theme_share: float

    def write(self, task: tuple[str, int]) -> dict[str, Any] | None:
        """Write picture (split, index); of a scene, return what the lists need."""
        split, index = task
        return self.write_scene(split, index) if split in ("train", "val") else self.write_object(split, index)

    def write_scene(self, split: str, index: int) -> dict[str, Any]:
        picture, shown, theme, family = draw_scene(
            self.seed, split, index, self.size, self.background_correlation, self.theme_share
        )
        number = 2 * index + 1 + SPLITS.index(split)  # train odd, val even: unique over both, whatever the counts
        data = _jpeg(picture)
        (self.root / f"{split}2017" / f"{number:012d}.jpg").write_bytes(data)
        voc = self.root / "VOCdevkit/VOC2007"
        (voc / "JPEGImages" / f"{number:06d}.jpg").write_bytes(data)
        (voc / "Annotations" / f"{number:06d}.xml").write_text(_voc_xml(f"{number:06d}", picture, shown))
        height, width = picture.shape[:2]
        image = {"id": number, "file_name": f"{number:012d}.jpg", "width": width, "height": height, "license": 1,
                 "theme": theme, "background": family}
        annotations = [
            {"id": 10 * number + k, "image_id": number, "category_id": CLASSES[s.label].category_id, "iscrowd": 0,
             "bbox": list(s.box), "area": int(s.mask.sum()), "segmentation": _rle(s.mask)}
            for k, s in enumerate(shown)
        ]
        presence = [-1] * len(CLASSES)  # as in VOC: 1 present, 0 only difficult ones, -1 absent
        for s in shown:
            presence[s.label] = max(presence[s.label], 0 if s.difficult else 1)
        difficult = sum(s.difficult for s in shown)
        return {"image": image, "annotations": annotations, "presence": presence, "difficult": difficult}

    def write_object(self, split: str, index: int) -> None:
        picture, label = draw_object(self.seed, split, index)
        folder = self.root / "objects" / split.removeprefix("objects_") / CLASSES[label].name
        (folder / f"{index // len(CLASSES):06d}.jpg").write_bytes(_jpeg(picture))


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    ok, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise RuntimeError("OpenCV could not encode a JPEG.")
    return data.tobytes()


def _rle(mask: NDArray[np.bool_]) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths: column by column, alternating from background."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def _voc_xml(name: str, picture: NDArray[np.uint8], shown: list[Shown]) -> str:
    height, width = picture.shape[:2]
    lines = ["<annotation>", "<folder>VOC2007</folder>", f"<filename>{name}.jpg</filename>",
             f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
             "<segmented>0</segmented>"]
    for s in shown:
        x, y, w, h = s.box  # VOC counts pixels from 1 and includes the last one
        lines.append(
            f"<object><name>{CLASSES[s.label].name}</name><pose>Unspecified</pose>"
            f"<truncated>{int(s.visible < 0.95)}</truncated><difficult>{int(s.difficult)}</difficult>"
            f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        )
    return "\n".join([*lines, "</annotation>", ""])


def _write_lists(root: Path, split: str, rows: list[dict[str, Any]]) -> None:
    """COCO's annotation file and VOC's image sets of one split."""
    coco = {
        "info": {"description": "ORL's embedded scenes, generated", "version": "1.0"},
        "licenses": [{"id": 1, "name": "generated, no rights reserved", "url": ""}],
        "images": [row["image"] for row in rows],
        "annotations": [a for row in rows for a in row["annotations"]],
        "categories": [
            {"id": c.category_id, "name": c.name, "supercategory": c.shape, "texture": c.texture} for c in CLASSES
        ],
    }
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(coco) + "\n")
    names = [f"{row['image']['id']:06d}" for row in rows]
    sets, part = root / "VOCdevkit/VOC2007/ImageSets/Main", {"train": "trainval", "val": "test"}[split]
    (sets / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    for label, c in enumerate(CLASSES):
        flags = [f"{name} {row['presence'][label]:2d}\n" for name, row in zip(names, rows, strict=True)]
        (sets / f"{c.name}_{part}.txt").write_text("".join(flags))


def _check(folder: Path, settings: dict[str, Any], workers: int) -> None:
    whole = {"train": 1, "val": 1, "objects_train": 1, "objects_val": 1, "seed": 0}
    for key, value in [*((k, settings[k]) for k in whole), ("workers", workers)]:
        if not isinstance(value, int) or isinstance(value, bool) or value < whole.get(key, 1):
            raise ValueError(f"{key} must be a whole number of at least {whole.get(key, 1)}, got {value!r}.")
    for key in ("background_correlation", "theme_share"):
        if not 0 <= settings[key] <= 1:
            raise ValueError(f"{key} must lie between 0 and 1, got {settings[key]!r}.")
    size = settings["size"]
    if len(size) != 2 or not all(isinstance(n, int) for n in size) or not 64 <= size[0] <= size[1]:
        raise ValueError(f"size must be two whole numbers of pixels, 64 or more, in ascending order, got {size!r}.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the scenes need a folder of their own.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "scenes.json").is_file():
        raise ValueError(f"{folder} is not empty and holds no scenes.json; the scenes need a folder of their own.")


def generate(
    folder: str | Path,
    *,
    train: int = 600,
    val: int = 200,
    objects_train: int = 20,
    objects_val: int = 10,
    size: tuple[int, int] = (128, 160),
    background_correlation: float = 0.5,
    theme_share: float = 0.7,
    seed: int = 0,
    workers: int = 1,
) -> dict[str, int]:
    """Draw all scenes and single objects into `folder`; return how many of what were written.

    `train` and `val` count scenes, `objects_*` single objects per class; each side of a scene lies within `size`,
    pixels; `background_correlation` is how often the background family is bound to the theme (else it is any of the
    four), `theme_share` the chance that an object is of one of the theme's classes. `workers` are processes and
    change nothing in the files: same settings, same bytes.

    Written: `train2017/`, `val2017/`, `annotations/instances_{train,val}2017.json` (COCO), `VOCdevkit/VOC2007`
    (trainval = train, test = val), `objects/{train,val}/{class}/` (ImageFolder), `scenes.json` (settings, counts).
    `folder` appears complete or not at all: new, empty, or in place of an older one that these settings replace.

    Raises ValueError for a bad value, or a `folder` that holds other things than generated scenes.
    """
    target = Path(folder).resolve()
    settings = {"train": train, "val": val, "objects_train": objects_train, "objects_val": objects_val,
                "size": list(size), "background_correlation": background_correlation, "theme_share": theme_share,
                "seed": seed}
    _check(target, settings, workers)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        root = beside / "new"  # mkdtemp's own folder is private; this one has the usual permissions
        for name in ("train2017", "val2017", "annotations", "VOCdevkit/VOC2007/JPEGImages",
                     "VOCdevkit/VOC2007/Annotations", "VOCdevkit/VOC2007/ImageSets/Main",
                     *(f"objects/{part}/{c.name}" for part in ("train", "val") for c in CLASSES)):
            (root / name).mkdir(parents=True)
        job = _Job(root, seed, (size[0], size[1]), background_correlation, theme_share)
        counts = _write_all(job, {"train": train, "val": val, "objects_train": objects_train * len(CLASSES),
                                  "objects_val": objects_val * len(CLASSES)}, workers)
        summary = {"schema": "scenes/1", "settings": settings, "counts": counts, "classes": [asdict(c) for c in CLASSES]}
        (root / "scenes.json").write_text(json.dumps(summary, indent=1) + "\n")
        if target.exists():
            target.rename(beside / "old")
        try:
            root.rename(target)
        except OSError:
            if (beside / "old").exists():
                (beside / "old").rename(target)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return counts


def _write_all(job: _Job, pictures: dict[str, int], workers: int) -> dict[str, int]:
    tasks = [(split, index) for split in SPLITS for index in range(pictures[split])]
    if workers == 1:
        results = [job.write(task) for task in tasks]
    else:  # fresh processes: forking one in which OpenCV or PyTorch already run threads can hang
        with ProcessPoolExecutor(workers, get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
            results = list(pool.map(job.write, tasks, chunksize=8))
    counts = dict(pictures)
    for split in ("train", "val"):
        rows = [row for (name, _), row in zip(tasks, results, strict=True) if name == split and row]
        _write_lists(job.root, split, rows)
        counts[f"{split}_annotations"] = sum(len(row["annotations"]) for row in rows)
        counts[f"{split}_difficult"] = sum(row["difficult"] for row in rows)
    return counts
