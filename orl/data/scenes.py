"""The embedded scenes: photo-like pictures whose structure is what ORL lives on, drawn with numpy and OpenCV.

A scene draws a latent theme that makes three of twelve classes likely; the background family goes with the theme,
never with the class inside it. A class is a shape with a texture: each shape and each texture is shared by several
classes, and inside a theme all three shapes and all three textures differ. Colours mean nothing.
Every random choice derives from (seed, split, index), so a picture depends neither on the number of workers nor on
how many other pictures are drawn.
"""

from __future__ import annotations

import cmath
import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from orl import InputError, artifacts
from orl.config import Scenes
from orl.progress import track
from orl.workers import ordered

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Picture = NDArray[np.uint8]

SHAPES = ("disc", "triangle", "cross", "bar")
TEXTURES = ("striped", "spotted", "chequered")
BACKGROUNDS = ("cloud", "grain", "streak", "blotch")  # family t goes with theme t
SPLITS = ("train", "val", "objects_train", "objects_val")  # the position is part of every random seed

SIZE = (0.15, 0.70)  # long side of an object over the short side of its scene
MIN_VISIBLE = 0.25  # objects that show less of themselves get no annotation
DIFFICULT_VISIBLE, DIFFICULT_SIDE = 0.5, 0.16  # VOC's `difficult`: shows less, or a box narrower (of the short side)


@dataclass(frozen=True)
class SceneClass:
    """One class: its name, COCO category id (with gaps, as COCO's), theme, shape and texture."""

    name: str
    category_id: int
    theme: int
    shape: str
    texture: str


def _scene_class(i: int) -> SceneClass:
    theme, k = divmod(i, len(TEXTURES))
    shape, texture = SHAPES[(theme + k) % len(SHAPES)], TEXTURES[k]
    return SceneClass(f"{texture}_{shape}", i + 1 + i // 5, theme, shape, texture)


CLASSES = tuple(_scene_class(i) for i in range(len(SHAPES) * len(TEXTURES)))


@dataclass
class Item:
    """Something to paint: an object has a class; a distractor has none, and lacks its shape or its texture."""

    label: int | None  # index into CLASSES
    shape: str  # of SHAPES, or "smear": no shape
    texture: str  # of TEXTURES, or "plain": no texture
    size: float  # long side of the whole outline, pixels
    centre: tuple[float, float]  # x, y


@dataclass
class Shown:
    """An object as it can be seen: visible mask, bool [H, W], and the visible share of its whole outline."""

    label: int
    mask: Mask
    visible: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        x, y, w, h = cv2.boundingRect(self.mask.astype(np.uint8))
        return x, y, w, h

    @property
    def difficult(self) -> bool:
        return self.visible < DIFFICULT_VISIBLE or min(self.box[2:]) < DIFFICULT_SIDE * min(self.mask.shape)


# --- drawing ----------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, height: int, width: int, rows: float, columns: float) -> Floats:
    """Smooth noise float32 [height, width], mean about 0 and spread about 1, in cells of rows x columns pixels."""
    grid = max(2, round(height / rows)), max(2, round(width / columns))
    coarse = rng.standard_normal(grid, dtype=np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Floats:
    """A random colour, RGB float32 [3] in 0..1.

    All colours here are muted: where they are vivid, two crops of a scene are told to belong together by colour
    alone, and pre-training on so few scenes learns little else.
    """
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0], np.float32)


def _background(rng: np.random.Generator, family: str, height: int, width: int) -> Floats:
    """Multi-scale noise between random colours, float32 [H, W, 3]; the family is the kind of noise."""
    side = min(height, width)
    flat, long = (0.25, 4.0) if family == "streak" else (1.0, 1.0)
    weights = {"cloud": (1.0, 0.5, 0.15, 0.05), "grain": (0.35, 0.2, 0.35, 0.8)}.get(family, (0.7, 0.7, 0.4, 0.2))
    field = np.zeros((height, width), np.float32)
    for weight, cell in zip(weights, (0.5 * side, 0.2 * side, 0.07 * side, 0.02 * side), strict=True):
        field += weight * _noise(rng, height, width, cell * flat, cell * long)
    if family == "blotch":
        field = np.tanh(4 * field) * 0.8 + 0.1 * field
    wall, floor = (_colour(rng, (0.01, 0.14), (0.35, 0.75)) for _ in range(2))
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    horizon = height * rng.uniform(0.25, 0.75) + rng.normal(0, 0.1) * (xs - width / 2)
    below = np.clip((ys - horizon) / rng.uniform(1, 6) + 0.5, 0, 1)[..., None] * (rng.random() < 0.6)
    tone = np.clip(0.5 + 0.3 * field, 0, 1)[..., None]
    return ((wall + below * (floor - wall)) * (0.72 + 0.5 * tone)).astype(np.float32)


def _outline(rng: np.random.Generator, shape: str) -> Floats:
    """A closed outline float32 [n, 2] around the origin, long side of its bounding box 1; pose and contour vary."""
    corners = {
        "triangle": [cmath.rect(1, k * math.tau / 3) for k in range(3)],
        "cross": [p * 1j**k for k in range(4) for p in (-0.33 - 1j, 0.33 - 1j, 0.33 - 0.33j)],
        "bar": [-1 - 0.36j, 1 - 0.36j, 1 + 0.36j, -1 + 0.36j],
    }.get(shape, [cmath.rect(1, k * math.tau / 24) for k in range(24)])  # a disc; bent, a smear
    start = np.array(corners)[:, None]
    points = (start + np.linspace(0, 1, 96 // len(start), endpoint=False) * (np.roll(start, -1) - start)).ravel()
    reach = int(rng.integers(1, 4))
    points = np.mean([np.roll(points, k) for k in range(-reach, reach + 1)], axis=0)  # rounds the corners
    points = points.real * rng.uniform(0.85, 1.18) + 1j * points.imag
    turn = np.arange(len(points)) * (math.tau / len(points))
    for harmonic in range(2, 6):
        bend = rng.normal() * (0.22 if shape == "smear" else 0.025)
        points = points * (1 + bend * np.cos(harmonic * turn + rng.uniform(0, math.tau)))
    points = points * cmath.rect(1, rng.uniform(0, math.tau))
    outline = np.stack([points.real, points.imag], axis=1)
    low, high = outline.min(0), outline.max(0)
    return ((outline - (low + high) / 2) / (high - low).max()).astype(np.float32)


def _texture(rng: np.random.Generator, texture: str, ys: Floats, xs: Floats, side: float) -> Floats:
    """The second tone's share in 0..1 at each pixel, float32 [h, w]; about three periods cross `side` pixels."""
    period = side * rng.uniform(0.85, 1.2) * {"striped": 0.36, "spotted": 0.42}.get(texture, 0.3)
    direction = cmath.rect(1 / period, rng.uniform(0, math.tau))
    bends = [0.07 * _noise(rng, xs.shape[0], xs.shape[1], side / 2, side / 2) for _ in range(2)]
    u = xs * direction.real + ys * direction.imag + rng.uniform(0, 1) + bends[0]
    v = ys * direction.real - xs * direction.imag + rng.uniform(0, 1) + bends[1]
    if texture == "striped":
        share = np.clip(0.5 + 2.5 * np.sin(math.tau * u), 0, 1)
    elif texture == "spotted":
        u = u + 0.5 * (np.floor(v) % 2)  # every other row is shifted
        share = np.clip((0.33 - np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)) * 10 + 0.5, 0, 1)
    elif texture == "chequered":
        share = (np.floor(u) + np.floor(v)) % 2
    else:
        share = np.zeros_like(xs)
    return share.astype(np.float32)


def _tones(rng: np.random.Generator, behind: Floats) -> tuple[Floats, Floats]:
    """A light and a dark tone of one random hue, in random order, not camouflaged before the colour `behind`."""
    for _ in range(6):
        first = _colour(rng, (0.04, 0.3), (0.4, 0.95))
        gain = rng.uniform(0.25, 0.45) if first.mean() > 0.45 else rng.uniform(2.0, 2.8)
        second = np.clip(first * np.float32(gain) + np.float32(0.05), 0, 1)
        if np.abs((first + second) / 2 - behind).max() > 0.18:
            break
    return (first, second) if rng.random() < 0.5 else (second, first)


def _paint(rng: np.random.Generator, canvas: Floats, item: Item, light: float) -> tuple[Mask, float]:
    """Paint an item on `canvas` (float32 [H, W, 3], in place), lit from the angle `light`.

    Returns its mask within the picture, bool [H, W], and the area of its whole outline, pixels.
    """
    height, width = canvas.shape[:2]
    outline = _outline(rng, item.shape) * item.size
    area = float(cv2.contourArea(outline))
    # The window holds the outline and its shadow; inside it everything is drawn at twice the size, then averaged.
    reach = math.ceil(item.size * 0.75) + 2
    left, top = (math.floor(c) - reach for c in item.centre)
    side, middle = 2 * reach, np.array(item.centre) - (left, top)
    fine = np.zeros((2 * side, 2 * side), np.uint8)
    cv2.fillPoly(fine, [np.round((outline + middle) * 2 * 16).astype(np.int32)], (255,), cv2.LINE_AA, 4)
    alpha: NDArray[Any] = cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    if item.shape == "smear":
        alpha = 0.85 * cv2.GaussianBlur(alpha, (0, 0), item.size * 0.06)
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, height), min(left + side, width)
    inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    under = canvas[y0:y1, x0:x1]

    first, second = _tones(rng, under.mean((0, 1)))
    ys, xs = np.mgrid[0 : 2 * side, 0 : 2 * side].astype(np.float32) / 2
    share = _texture(rng, item.texture, ys, xs, math.sqrt(area))
    share = np.asarray(cv2.resize(share, (side, side), interpolation=cv2.INTER_AREA), np.float32)
    colour = first + share[..., None] * (second - first)
    # Roundness: brighter towards the light, darker at the rim, a little uneven.
    dx, dy = math.cos(light), math.sin(light)
    lit = ((xs[::2, ::2] - middle[0]) * dx + (ys[::2, ::2] - middle[1]) * dy) / item.size
    rim = cv2.GaussianBlur(alpha, (0, 0), item.size * 0.08)
    uneven = 1 + 0.04 * _noise(rng, side, side, item.size / 6, item.size / 6)
    colour = colour * ((0.68 + 0.35 * rim + 0.3 * lit) * uneven)[..., None]

    if item.shape != "smear":
        away = item.size * rng.uniform(0.04, 0.12)
        moved = cv2.warpAffine(alpha, np.array([[1, 0, -dx * away], [0, 1, -dy * away]]), (side, side))
        shadow = cv2.GaussianBlur(moved, (0, 0), item.size * 0.05)
        under *= 1 - rng.uniform(0.3, 0.55) * shadow[inside][..., None]
    under += alpha[inside][..., None] * (colour[inside] - under)
    mask = np.zeros((height, width), np.bool_)
    mask[y0:y1, x0:x1] = alpha[inside] >= 0.5
    return mask, area


def _picture(
    rng: np.random.Generator, family: str, items: list[Item], height: int, width: int
) -> tuple[Picture, list[Shown]]:
    """Paint the items back to front; return the RGB picture uint8 [H, W, 3] and the objects that show."""
    canvas = _background(rng, family, height, width)
    light = rng.uniform(0, math.tau)
    owner = np.full((height, width), -1, np.int16)
    areas = []
    for number, item in enumerate(items):
        mask, area = _paint(rng, canvas, item, light)
        owner[mask] = number
        areas.append(area)
    # The camera: falling light, exposure and white balance, a soft lens, sensor noise.
    ys, xs = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j].astype(np.float32)
    fall = 1 + rng.uniform(0.1, 0.45) * (xs * math.cos(light) + ys * math.sin(light))
    canvas = canvas * fall[..., None] * (rng.uniform(0.75, 1.15) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
    canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.7)), np.float32)
    canvas += rng.uniform(0.008, 0.025) * rng.standard_normal(canvas.shape, dtype=np.float32)
    shown = []
    for number, (item, area) in enumerate(zip(items, areas, strict=True)):
        visible = float((owner == number).sum() / area)
        if item.label is not None and visible >= MIN_VISIBLE:
            shown.append(Shown(item.label, owner == number, visible))
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8), shown


# --- composition ------------------------------------------------------------------------------------------------


def _place(rng: np.random.Generator, size: float, placed: list[Item], height: int, width: int) -> tuple[float, float]:
    """A centre that lets an item leave the frame a little and overlap the placed ones, but rarely bury them."""
    best, best_gap = (0.0, 0.0), -1.0
    for _ in range(16):
        centre = rng.uniform(0.35 * size, width - 0.35 * size), rng.uniform(0.35 * size, height - 0.35 * size)
        gap = min((math.dist(centre, p.centre) / (size + p.size) for p in placed), default=1.0)
        if gap > best_gap:
            best, best_gap = centre, gap
        if gap > 0.42:  # at 0.5 the circles around both just touch
            break
    return best


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int], background_correlation: float, theme_share: float
) -> tuple[Picture, list[Shown], int, str]:
    """Draw one scene: RGB uint8 [H, W, 3], the objects that show, the theme's number, the background family."""
    height, width = (int(n) for n in rng.integers(size[0], size[1] + 1, 2))
    theme, any_family = (int(n) for n in rng.integers(len(BACKGROUNDS), size=2))
    family = BACKGROUNDS[theme if rng.random() < background_correlation else any_family]
    likely = [i for i, c in enumerate(CLASSES) if c.theme == theme]
    other = [i for i, c in enumerate(CLASSES) if c.theme != theme]
    items: list[Item] = []

    def add(label: int | None, shape: str, texture: str, share: float) -> None:
        length = share * min(height, width)
        items.append(Item(label, shape, texture, length, _place(rng, length, items, height, width)))

    for _ in range(rng.integers(2, 5)):
        label = int(rng.choice(likely if rng.random() < theme_share else other))
        share = SIZE[0] + (SIZE[1] - SIZE[0]) * rng.beta(2.0, 1.9)
        add(label, CLASSES[label].shape, CLASSES[label].texture, share)
    if rng.random() < 0.5:
        add(None, "smear", str(rng.choice(TEXTURES)), rng.uniform(0.2, 0.45))
    if rng.random() < 0.5:
        add(None, str(rng.choice(SHAPES)), "plain", rng.uniform(0.2, 0.45))
    back_to_front = [items[i] for i in rng.permutation(len(items))]
    return *_picture(rng, family, back_to_front, height, width), theme, family


def draw_object(rng: np.random.Generator, label: int) -> Picture:
    """Draw one object of class `label` before any background: RGB uint8 [S, S, 3], S between 64 and 96."""
    side = int(rng.integers(64, 97))
    x, y = side * rng.normal(0.5, 0.04, 2)
    item = Item(label, CLASSES[label].shape, CLASSES[label].texture, side * rng.uniform(0.55, 0.9), (x, y))
    return _picture(rng, str(rng.choice(BACKGROUNDS)), [item], side, side)[0]


# --- files ------------------------------------------------------------------------------------------------------


def _jpeg(picture: Picture) -> bytes:
    ok, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    if not ok:
        raise RuntimeError("OpenCV could not encode a JPEG.")
    return data.tobytes()


def _runs(mask: Mask) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths: down the columns, background first."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def _voc_xml(name: str, width: int, height: int, shown: list[Shown]) -> str:
    text = f"<annotation>\n<folder>VOC2007</folder>\n<filename>{name}.jpg</filename>\n"
    text += f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n<segmented>0</segmented>\n"
    for s in shown:
        x, y, w, h = s.box  # VOC counts pixels from 1 and includes the last one
        text += f"<object><name>{CLASSES[s.label].name}</name><pose>Unspecified</pose>"
        text += f"<truncated>{int(s.visible < 0.95)}</truncated><difficult>{int(s.difficult)}</difficult>"
        text += f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>"
        text += "</object>\n"
    return text + "</annotation>\n"


def _write_picture(root: Path, settings: dict[str, Any], task: tuple[str, int]) -> dict[str, Any]:
    """Draw and write picture (split, index); of a scene, return its COCO image, annotations and VOC flags."""
    cv2.setNumThreads(1)  # one process per core already
    split, index = task
    rng = np.random.default_rng([settings["seed"], SPLITS.index(split), index])
    if split not in ("train", "val"):
        number, label = divmod(index, len(CLASSES))
        folder = root / "objects" / split.removeprefix("objects_") / CLASSES[label].name
        (folder / f"{number:06d}.jpg").write_bytes(_jpeg(draw_object(rng, label)))
        return {}
    size, correlation, share = (settings[key] for key in ("size", "background_correlation", "theme_share"))
    picture, shown, theme, family = draw_scene(rng, size, correlation, share)
    data, (height, width) = _jpeg(picture), picture.shape[:2]
    number = 2 * index + 1 + SPLITS.index(split)  # train odd, val even: unique over both, whatever the counts
    name, voc_name, voc = f"{number:012d}.jpg", f"{number:06d}", root / "VOCdevkit/VOC2007"
    (root / f"{split}2017" / name).write_bytes(data)
    (voc / "JPEGImages" / f"{voc_name}.jpg").write_bytes(data)
    (voc / "Annotations" / f"{voc_name}.xml").write_text(_voc_xml(voc_name, width, height, shown))
    image = {"id": number, "file_name": name, "width": width, "height": height, "license": 1}
    annotations = [
        {"id": 10 * number + k, "image_id": number, "category_id": CLASSES[s.label].category_id, "iscrowd": 0}
        | {"bbox": list(s.box), "area": int(s.mask.sum()), "segmentation": _runs(s.mask)}
        for k, s in enumerate(shown)
    ]
    flags = [-1] * len(CLASSES)  # as in VOC: 1 present, 0 only difficult ones, -1 absent
    for s in shown:
        flags[s.label] = max(flags[s.label], 0 if s.difficult else 1)
    image |= {"theme": theme, "background": family}
    return {"image": image, "annotations": annotations, "flags": flags, "difficult": sum(s.difficult for s in shown)}


def _write_lists(root: Path, split: str, rows: list[dict[str, Any]]) -> None:
    """COCO's annotation file and VOC's image sets of one split."""
    coco = {
        "info": {"description": "The embedded scenes of ORL, generated", "version": "1"},
        "licenses": [{"id": 1, "name": "generated, no rights reserved", "url": ""}],
        "images": [row["image"] for row in rows],
        "annotations": [annotation for row in rows for annotation in row["annotations"]],
        "categories": [{"id": c.category_id, "name": c.name, "supercategory": c.shape} for c in CLASSES],
    }
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(coco) + "\n")
    sets, part = root / "VOCdevkit/VOC2007/ImageSets/Main", "trainval" if split == "train" else "test"
    (sets / f"{part}.txt").write_text("".join(f"{row['image']['id']:06d}\n" for row in rows))
    for i, c in enumerate(CLASSES):
        lines = [f"{row['image']['id']:06d} {row['flags'][i]:2d}\n" for row in rows]
        (sets / f"{c.name}_{part}.txt").write_text("".join(lines))


def _write_all(root: Path, settings: dict[str, Any], workers: int) -> dict[str, int]:
    """Write everything but scenes.json into the new folder `root`; return the counts."""
    voc = [f"VOCdevkit/VOC2007/{name}" for name in ("JPEGImages", "Annotations", "ImageSets/Main")]
    objects = [f"objects/{part}/{c.name}" for part in ("train", "val") for c in CLASSES]
    for name in ["train2017", "val2017", "annotations", *voc, *objects]:
        (root / name).mkdir(parents=True)
    counts = {split: settings[split] * (len(CLASSES) if "objects" in split else 1) for split in SPLITS}
    tasks = [(split, index) for split in SPLITS for index in range(counts[split])]
    write = partial(_write_picture, root, settings)
    written = list(track(ordered(write, tasks, workers, chunk=8), len(tasks), "drawing"))
    for split in ("train", "val"):
        rows = [row for (of, _), row in zip(tasks, written, strict=True) if of == split]
        _write_lists(root, split, rows)
        counts[f"{split}_annotations"] = sum(len(row["annotations"]) for row in rows)
        counts[f"{split}_difficult"] = sum(row["difficult"] for row in rows)
    return counts


def generate(folder: str | Path, scenes: Scenes, workers: int = 1) -> dict[str, int]:
    """Draw all scenes and single objects into `folder`; return how many of what were written.

    `workers` processes draw, which changes no file: same settings, same bytes.

    Written: `train2017/`, `val2017/`, `annotations/instances_{train,val}2017.json` (COCO), `VOCdevkit/VOC2007/`
    (trainval = train, test = val), `objects/{train,val}/{class}/` (ImageFolder), `scenes.json` (settings, counts).
    `folder` appears complete or not at all: new, empty so far, or in place of older generated scenes.

    Raises InputError for a `folder` that holds anything but generated scenes.
    """
    target, settings = Path(folder).resolve(), scenes.model_dump(mode="json")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, but the scenes need a folder of their own; name another.")
    if not (target / "scenes.json").is_file() and any(p.is_symlink() or not p.is_dir() for p in target.rglob("*")):
        raise InputError(
            f"{target} holds files but no scenes.json, and the scenes need a folder of their own; name another."
        )
    with artifacts.atomic_folder(target) as new:
        counts = _write_all(new, settings, workers)
        classes = [asdict(c) for c in CLASSES]
        summary = {"schema": "scenes/1", "settings": settings, "counts": counts, "classes": classes}
        (new / "scenes.json").write_text(json.dumps(summary, indent=1) + "\n")
    return counts
