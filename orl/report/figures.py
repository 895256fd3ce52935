"""Figures of the report as data URIs: charts drawn by matplotlib (SVG), photos reduced (JPEG), PNGs as they are.

Charts hold no text but numbers and fixed words: names stand in HTML legends, which wrap and escape them.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from orl.data.decode import Photo, decode, resize_crop
from orl.report.repeats import Mean

# Okabe and Ito's colours, told apart with any colour vision; without their yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", "5 2", "2 2")  # SVG dash arrays, so that a line shows through another that covers it
POINTS = 400  # of a line at most: more than pixels to show them
GAP = 28  # between the two photos of a pair, in drawing units
TAG = 18  # side of the square that holds a match's number


@dataclass(frozen=True)
class Picture:
    """An image to show: data URI, size in pixels, and the text for those who cannot see it."""

    uri: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Line:
    """A line of a chart: what the legend calls it, its points and their error bars."""

    name: str
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None = None  # half the length of a bar at each point; nan: no bar


@dataclass(frozen=True)
class Style:
    """How the legend shows a line or a match."""

    name: str
    color: str
    dash: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure with its heading and legend: what the lines are, or what the numbered rows are."""

    title: str
    picture: Picture
    legend: list[Style]
    note: str = ""
    rows: Sequence[str] = ()  # number and name


@dataclass(frozen=True)
class Match:
    """Two boxes (x, y, w, h in drawing units) that belong together, in one style.

    `line` joins them; `tags` are the upper left corners of their numbers.
    """

    style: Style
    boxes: tuple[tuple[float, ...], tuple[float, ...]]
    line: tuple[float, float, float, float]
    tags: list[tuple[float, float]]


@dataclass(frozen=True)
class Drawing:
    """Two photos side by side: `places` are x, y, w, h of each, in the units of `width` and `height`."""

    photos: tuple[Picture, Picture]
    places: tuple[tuple[float, ...], tuple[float, ...]]
    width: float
    height: float
    matches: list[Match]


def styles(names: Sequence[str]) -> list[Style]:
    """A style for each of several lines, different for the first 21."""
    return [Style(name, COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i, name in enumerate(names)]


def photo(image: Photo, side: int, alt: str) -> Picture:
    """A photo uint8 [H, W, 3] reduced to a long side of at most `side` pixels, as JPEG."""
    height, width = image.shape[:2]
    factor = min(1.0, side / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    buffer = io.BytesIO()
    Image.fromarray(resize_crop(image, (0, 0, width, height), size)).save(buffer, "JPEG", quality=75)
    return Picture(_uri("image/jpeg", buffer.getvalue()), *size, alt)


def png(data: bytes, alt: str, most: int) -> Picture:
    """A PNG as it is; one of more than `most` bytes as a JPEG of no more pixels than that, which takes fewer.

    Raises ValueError if it is no PNG, or is damaged.
    """
    if not data.startswith(b"\x89PNG"):
        raise ValueError("no PNG")
    image = decode(data)  # its InputError, of any damage, is a ValueError
    height, width, _ = image.shape
    if len(data) > most:
        return photo(image, int(max(height, width) * min(1.0, math.sqrt(most / (height * width)))), alt)
    return Picture(_uri("image/png", data), width, height, alt)


def pair(
    images: tuple[Photo, Photo],
    alts: tuple[str, str],
    side: int,
    boxes: Sequence[tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
) -> Drawing:
    """Two photos side by side, each drawn with a long side of `side` units, and `boxes` (x, y, w, h in pixels of the
    first and of the second photo) joined by lines; `names` are those of the matches."""
    factors = [side / max(image.shape[:2]) for image in images]
    sizes = [(image.shape[1] * factor, image.shape[0] * factor) for image, factor in zip(images, factors, strict=True)]
    height = max(sizes[0][1], sizes[1][1])
    lefts = (0.0, sizes[0][0] + GAP)
    tops = [(height - size[1]) / 2 for size in sizes]
    matches: list[Match] = []
    taken: list[tuple[float, float]] = []
    for style, two in zip(styles(names), boxes, strict=True):
        first, second = (
            _rounded(x * factor + left, y * factor + top, w * factor, h * factor)
            for (x, y, w, h), factor, left, top in zip(np.asarray(two, float), factors, lefts, tops, strict=True)
        )
        ends = (first[0] + first[2], first[1] + first[3] / 2, second[0], second[1] + second[3] / 2)
        tags = []
        for x, y, *_ in (first, second):
            # Boxes may coincide: their numbers then stand side by side.
            while any(abs(x - left) < TAG and abs(y - top) < TAG for left, top in taken):
                x = round(x + TAG, 1)
            tags.append((x, y))
            taken.append((x, y))
        matches.append(Match(style, (first, second), ends, tags))
    pictures = [photo(image, side, alt) for image, alt in zip(images, alts, strict=True)]
    places = [_rounded(left, top, *size) for left, top, size in zip(lefts, tops, sizes, strict=True)]
    width, height = _rounded(lefts[1] + sizes[1][0], height)
    return Drawing((pictures[0], pictures[1]), (places[0], places[1]), width, height, matches)


def lines(
    series: Sequence[Line], ylabel: str, alt: str, xlabel: str = "epoch", ticks: Mapping[float, str] | None = None
) -> Picture:
    """A chart of lines by a whole number, in the styles of `styles`; of long lines, evenly spaced points.

    With `ticks`, x -> text, the axis is logarithmic and has these ticks only.
    """

    def draw(axes: Any) -> None:
        for style, line in zip(styles([line.name for line in series]), series, strict=True):
            kept = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), POINTS)).round().astype(int))
            dash = [float(length) / 1.5 for length in style.dash.split()]  # matplotlib counts in line widths
            axes.errorbar(
                line.x[kept],
                line.y[kept],
                None if line.error is None else line.error[kept],
                elinewidth=1,
                capsize=2,
                color=style.color,
                linewidth=1.5,
                linestyle=(0, dash) if dash else "-",
                marker="o" if len(kept) <= 20 else None,  # a single point draws no line
                markersize=3,
            )
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
        if ticks:
            axes.set_xscale("log")
            axes.set_xticks(list(ticks), labels=list(ticks.values()))
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))

    return _chart(draw, alt)


def line_chart(
    title: str,
    series: Sequence[Line],
    ylabel: str,
    alt: str,
    note: str = "",
    xlabel: str = "epoch",
    ticks: Mapping[float, str] | None = None,
) -> Chart:
    """A chart of `lines` with its heading and legend."""
    return Chart(title, lines(series, ylabel, alt, xlabel, ticks), styles([line.name for line in series]), note)


def dots(
    rows: Sequence[tuple[str, Sequence[float], Mean]],
    dashed: Sequence[float],
    xlabel: str,
    alt: str,
    ylabel: str = "model",
    own: int | None = None,
    shown: Sequence[float] = (),
) -> Picture:
    """A chart of rows by number, the first on top: of each the mean and, below it, small dots for several values.

    The mean's bar is two standard errors to either side; `dashed`: where dashed lines stand; `own`: the row whose mean
    is a black diamond; `shown`: further values that the axis reaches to.
    """

    def draw(axes: Any) -> None:
        for value in dashed:
            axes.axvline(value, color=COLORS[-1], linewidth=1, linestyle="--")
        for row, (_, values, mean) in enumerate(rows):
            if len(values) > 1:
                axes.plot(values, [row + 0.25] * len(values), "o", color=COLORS[1], markersize=3, markeredgewidth=0)
            marker, color = ("D", COLORS[-1]) if row == own else ("o", COLORS[0])
            axes.errorbar(mean.value, row - 0.1, xerr=2 * mean.error, fmt=marker, color=color, markersize=5, capsize=3)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(len(rows) - 0.4, -0.6))
        axes.set_yticks(range(len(rows)), labels=[number for number, *_ in rows])
        axes.update_datalim([(value, 0) for value in shown], updatey=False)
        axes.autoscale_view(scaley=False)

    return _chart(draw, alt, height=0.8 + 0.3 * max(3, len(rows)))


def recalls(variants: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], alt: str) -> Picture:
    """A chart of recall by number of boxes kept: of each variant the numbers and the recall at IoU 0.5 and at 0.7.

    The colours are those of COLORS; the second line is dashed.
    """

    def draw(axes: Any) -> None:
        for color, (kept, *lines) in zip(COLORS, variants, strict=False):
            for line, dash in zip(lines, ("-", "--"), strict=True):
                axes.plot(kept, line, dash, color=color, linewidth=1.5, marker="o", markersize=3)
        axes.set(xlabel="boxes kept per photo, at most", ylabel="recall", xscale="log", ylim=(0, 1))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()

    return _chart(draw, alt)


def histogram(values: np.ndarray, xlabel: str, ylabel: str, alt: str) -> Picture:
    """A histogram; of whole numbers, with bins of whole width around them."""
    bins: Any = 40
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        width = (high - low) // 40 + 1
        bins = np.arange(low, high + width + 1, width) - 0.5
    heights, edges = np.histogram(values, bins)

    def draw(axes: Any) -> None:
        axes.stairs(heights, edges, fill=True, color=COLORS[0])
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if values.dtype.kind in "iu":
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))

    return _chart(draw, alt)


def _chart(draw: Any, alt: str, height: float = 2.5) -> Picture:
    """What `draw` puts on empty axes of so many inches, as SVG that is the same for the same data."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc
        matplotlib.rcParams.update({"svg.hashsalt": "orl", "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(3.8, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    size = figure.get_size_inches() * 96
    return Picture(_uri("image/svg+xml", buffer.getvalue()), round(size[0]), round(size[1]), alt)


def _rounded(*values: float) -> tuple[float, ...]:
    return tuple(round(float(value), 1) for value in values)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
