"""Figures of a report: grids of images as PNG, curves as SVG that is drawn without a library and can be read aloud."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.float64]

MAX_POINTS = 500
DOTS = 12
"""Lines of so few points show each of them."""
LABELS = 6
COLOURED = 5
"""So many shares have a colour of their own."""
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2")
"""With the 6 colours of page.html, styles repeat after 30 lines."""

CELL = (112, 128)
"""An image is shown between so many pixels: small ones are enlarged by a whole factor, large ones reduced."""
GAP = 4
LABEL = 24
INK = (118, 118, 118, 255)
"""Grey that is legible on white and on the dark page: grids have a transparent ground."""


@dataclass(frozen=True)
class Picture:
    """A PNG on the page. `alt` says what is to be seen to those who do not see it; `caption` may be empty."""

    title: str
    png_bytes: bytes
    alt: str
    caption: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, from the file's header."""
        width, height = struct.unpack(">II", self.png_bytes[16:24])
        return width, height


def reconstruction_grid(
    original: ArrayLike | torch.Tensor,
    masked: ArrayLike | torch.Tensor,
    prediction: ArrayLike | torch.Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int = 8,
    labels: tuple[str, str, str] = ("original", "visible", "reconstruction"),
) -> bytes:
    """PNG of three labelled rows per `columns` images, from normalised images [B,3,H,W].

    An image times `std` plus `mean` is in [0, 1]; what lies outside is clipped. Images smaller than 112 px are enlarged
    by a whole factor without smoothing, so that pixels stay pixels.
    """
    rows = [_to_pixels(images, mean, std) for images in (original, masked, prediction)]
    count, height, width = rows[0].shape[:3]
    enlarge = max(1, round(CELL[0] / max(height, width)))
    reduce = min(1.0, CELL[1] / max(height, width))
    cell = (round(width * enlarge * reduce), round(height * enlarge * reduce))
    font = ImageFont.load_default(16)
    columns = min(columns, count)
    bands = math.ceil(count / columns)
    line = LABEL + cell[1] + 2 * GAP
    canvas = Image.new("RGBA", (columns * (cell[0] + GAP) - GAP, bands * 3 * line), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for index in range(count):
        band, column = divmod(index, columns)
        for row, (images, label) in enumerate(zip(rows, labels, strict=True)):
            top = (3 * band + row) * line
            if column == 0:
                draw.text((0, top + 2), label, fill=INK, font=font)
            filter_ = Image.Resampling.NEAREST if reduce == 1 else Image.Resampling.LANCZOS
            picture = Image.fromarray(images[index]).resize(cell, filter_)
            canvas.paste(picture, (column * (cell[0] + GAP), top + LABEL))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _to_pixels(images: ArrayLike | torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """[B,3,H,W] normalised -> [B,H,W,3] uint8."""
    array = images.detach().float().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    pixels = array.transpose(0, 2, 3, 1) * np.asarray(std) + np.asarray(mean)
    return np.ascontiguousarray((np.nan_to_num(pixels).clip(0, 1) * 255).round().astype(np.uint8))


@dataclass(frozen=True)
class Curve:
    """One line of a figure. `style` chooses colour and dashes; a run has the same style in all figures."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0


def thin(x: ArrayLike, y: ArrayLike, limit: int = MAX_POINTS) -> tuple[Array, Array]:
    """At most `limit` of the finite points: the ends, and the lowest and highest of each stretch (no spike is lost)."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    finite = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[finite], ys[finite]
    if len(xs) <= limit:
        return xs, ys
    edges = np.linspace(1, len(xs) - 1, limit // 2).astype(int)
    keep = {0, len(xs) - 1}
    for start, stop in pairwise(edges):
        stretch = ys[start:stop]
        keep |= {int(start + stretch.argmin()), int(start + stretch.argmax())}
    index = np.array(sorted(keep))
    return xs[index], ys[index]


def averaged(curve: Curve, limit: int = 50) -> Curve:
    """The same in at most `limit` points, each the mean of a stretch and placed at its end: for noisy quantities."""
    count = len(curve.y)
    edges = [count * part // min(limit, count) for part in range(min(limit, count) + 1)]
    means = [float(np.mean(curve.y[start:stop])) for start, stop in pairwise(edges)]
    return replace(curve, x=[curve.x[stop - 1] for stop in edges[1:]], y=means)


@dataclass(frozen=True)
class _Frame:
    """Where values lie in a figure of 460 by 240 units, with room for ticks and, at the right, for last values."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    logarithmic: bool

    width, height, left, right, top, bottom = 460, 240, 50, 404, 10, 210

    def across(self, x: Array | float) -> Array:
        share = (np.asarray(x, dtype=np.float64) - self.x_low) / ((self.x_high - self.x_low) or 1)
        return np.asarray(self.left + (self.right - self.left) * share)

    def down(self, y: Array | float) -> Array:
        values = [np.asarray(value, dtype=np.float64) for value in (self.y_low, self.y_high, y)]
        low, high, at = (np.log10(value) for value in values) if self.logarithmic else values
        return np.asarray(self.bottom - (self.bottom - self.top) * (at - low) / ((high - low) or 1))


def curves_svg(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str = "step",
    unit: str = "",
    from_zero: bool = False,
    log: bool = False,
    last: bool = True,
    references: Mapping[str, float] | None = None,
) -> Markup:
    """An SVG line chart over whole numbers: grid, ticks, last values, and what the page's script shows on hovering.

    `title` and the last values are its text alternative. Colours come from the page's classes `s0` to `s5`, so that
    it follows the theme. `log` allows a logarithmic axis where values are positive and span more than a factor
    of 30. `last`: whether up to 6 lines have their last value written beside them. `references`: values by name that
    lines are to be held against, drawn across a linear axis. Points that are not finite are left out.
    """
    references = references or {}
    lines = [(curve, *thin(curve.x, curve.y)) for curve in curves]
    lines = [line for line in lines if len(line[1])]
    assert lines, "a figure needs at least one finite point"
    x_low, x_high = min(float(x[0]) for _, x, _ in lines), max(float(x[-1]) for _, x, _ in lines)
    held = list(references.values())
    y_low, y_high = min([float(y.min()) for *_, y in lines] + held), max([float(y.max()) for *_, y in lines] + held)
    logarithmic = log and y_low > 0 and y_high > 30 * y_low
    if logarithmic:
        y_ticks = _log_ticks(y_low, y_high)
    else:
        y_ticks = ticks(0.0 if from_zero else y_low, y_high)
        y_low, y_high = y_ticks[0], y_ticks[-1]
    frame = _Frame(x_low, x_high, y_low, y_high, logarithmic)

    ends = "; ".join(
        [f"{curve.label} ends at {number(y[-1])}{unit}" for curve, _, y in lines]
        + [f"{name} is {number(value)}{unit}" for name, value in references.items()]
    )
    parts = [*_start(frame, f"{title} by {x_label}: {ends}.", y_ticks, x_label, unit)]
    for name, value in references.items():
        down = f"{float(frame.down(value)):.1f}"
        parts.append(Markup('<path class="reference" d="M{} {}H{}"/>').format(frame.left, down, frame.right))
        text = f"{name}: {number(value)}{unit}"
        parts.append(Markup('<text class="end" x="{}" y="{}" dy="-.35em">{}</text>').format(frame.right, down, text))
    for curve, x, y in lines:
        points = _points(frame, x, y)
        colour, dash = _style(curve.style)
        parts.append(
            Markup('<polyline class="line {}" stroke-dasharray="{}" {} points="{}"/>').format(
                colour, dash, _read(curve.label, x, y), " ".join(",".join(point) for point in points)
            )
        )
        if len(points) <= DOTS:
            dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"/>')
            parts += [dot.format(colour, px, py) for px, py in points]
    if last and len(lines) <= LABELS:
        written = [
            (_style(curve.style)[0], float(frame.across(x[-1])), float(frame.down(y[-1])), number(y[-1]) + unit)
            for curve, x, y in lines
        ]
        parts += _beside(frame, written)
    return Markup("").join([*parts, Markup("</svg>")])


def shares_svg(shares: Sequence[Curve], *, title: str, part: str, x_label: str = "step") -> Markup:
    """An SVG of what shares of 1 do: bands on top of each other, the first at the top, all over the same points x.

    The 5 that are largest at the end have colours and their number and share written beside them, the others are grey;
    the page's script shows all on hovering. `part`: what a share belongs to; curves are labelled by its number.
    """
    x = np.asarray(shares[0].x, dtype=np.float64)
    percent = 100 * np.asarray([curve.y for curve in shares], dtype=np.float64)
    frame = _Frame(float(x[0]), float(x[-1]), 0.0, 100.0, False)
    edges = 100 - np.asarray([np.zeros_like(x), *accumulate(percent)])
    largest = sorted(range(len(shares)), key=lambda index: -percent[index, -1])[:COLOURED]
    colours = {index: f"s{rank}" for rank, index in enumerate(largest)}

    last = [f"{curve.label}: {_percent(share)}" for curve, share in zip(shares, percent[:, -1], strict=True)]
    ends = ", ".join(f"{part} {last[index]}" for index in largest)
    others = [index for index in range(len(shares)) if index not in largest]
    rest = f", {len(others)} others {_percent(percent[others, -1].sum())}" if others else ""
    parts = [*_start(frame, f"{title} by {x_label}: at the end {ends}{rest}.", ticks(0.0, 100.0), x_label, "%")]
    for index, curve in enumerate(shares):
        colour = colours.get(index, "rest")
        above, below = (" L".join(" ".join(point) for point in _points(frame, x, edges[index + i])) for i in (0, 1))
        outline = f"M{above} L{' L'.join(reversed(below.split(' L')))}Z"
        middle = " ".join(",".join(point) for point in _points(frame, x, (edges[index] + edges[index + 1]) / 2))
        read = _read(f"{part} {curve.label}", x, percent[index])
        parts.append(Markup('<path class="band {}" d="{}"/>').format(colour, outline))
        parts.append(Markup('<polyline class="middle {}" {} points="{}"/>').format(colour, read, middle))
    written = [
        (colours[index], float(frame.right), float(frame.down(edges[index : index + 2, -1].mean())), last[index])
        for index in sorted(largest)
    ]
    return Markup("").join([*parts, *_beside(frame, written), Markup("</svg>")])


def _start(frame: _Frame, words: str, y_ticks: Sequence[float], x_label: str, unit: str) -> Iterator[Markup]:
    """The opening tag, with words for those who do not see the figure, and the axes."""
    yield Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}" data-x="{}" data-unit="{}">'
    ).format(frame.width, frame.height, words, x_label, unit)
    between = [tick for tick in ticks(frame.x_low, frame.x_high) if frame.x_low <= tick <= frame.x_high]
    yield from _axes(frame, [tick for tick in between if tick.is_integer()], y_ticks, x_label, unit)


def _points(frame: _Frame, x: Array, y: Array) -> list[tuple[str, str]]:
    """Where values lie in the figure."""
    return [(f"{px:.1f}", f"{py:.1f}") for px, py in zip(frame.across(x), frame.down(y), strict=True)]


def _read(label: str, x: Array, y: Array) -> Markup:
    """What the page's script reads from a line."""
    return Markup('data-label="{}" data-xs="{}" data-ys="{}"').format(
        label, " ".join(f"{value:.10g}" for value in x), " ".join(number(value) for value in y)
    )


def _beside(frame: _Frame, values: Sequence[tuple[str, float, float, str]]) -> Iterator[Markup]:
    """Texts right of where lines end: (colour, x, y, text)."""
    places = _apart([y for _, _, y, _ in values], distance=13, lowest=frame.bottom - 2)
    for (colour, x, _, text), place in zip(values, places, strict=True):
        value = Markup('<text class="value {}" x="{:.1f}" y="{:.1f}" dy=".35em">{}</text>')
        yield value.format(colour, x + 7, place, text)


def _axes(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, unit: str
) -> Iterator[Markup]:
    for tick in y_ticks:
        y = f"{float(frame.down(tick)):.1f}"
        yield Markup('<path class="grid" d="M{} {}H{}"/>').format(frame.left, y, frame.right)
        yield Markup('<text class="tick end" x="{}" y="{}" dy=".35em">{}</text>').format(
            frame.left - 6, y, short(tick) + unit
        )
    for tick in x_ticks:
        yield Markup('<text class="tick mid" x="{:.1f}" y="{}">{}</text>').format(
            float(frame.across(tick)), frame.bottom + 17, short(tick)
        )
    yield Markup('<text class="tick" x="{}" y="{}">{}</text>').format(frame.right + 20, frame.bottom + 17, x_label)
    if frame.logarithmic:
        yield Markup('<text class="tick end" x="{}" y="{}">log scale</text>').format(frame.right, frame.top + 4)
    yield Markup('<path class="axis" d="M{} {}H{}"/>').format(frame.left, frame.bottom, frame.right)


def swatch(style: int) -> Markup:
    """The sample of a line's style that legends show."""
    colour, dash = _style(style)
    return Markup(
        '<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true">'
        '<path class="line {}" d="M1 5H29" stroke-dasharray="{}"/></svg>'
    ).format(colour, dash)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    if high <= low:
        margin = abs(low) / 2 or 1.0
        low, high = (low - margin, high + margin) if low else (0.0, high + margin)
    rough = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; with their multiples by 2 and 5 where they would be few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 300 * low else (1,)
    found = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return [tick for tick in found if low <= tick <= high]


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, without exponent where people do without: 0.6123, 71.25, 12,346, 1.5e-5."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _percent(share: float) -> str:
    """0.4%, 4.5%, 45%."""
    return f"{share:.{int(share < 9.95)}f}%"


def short(tick: float) -> str:
    """A tick, which is round, with all its digits: 500, 12.5k, 1.5M, 1.1085."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(tick) >= size:
            return f"{tick / size:.10g}{letter}"
    return number(tick, 10)


def _style(style: int) -> tuple[str, str]:
    return f"s{style % 6}", DASHES[style % len(DASHES)]


def _apart(places: Sequence[float], distance: float, lowest: float) -> list[float]:
    """Moves labels just so far that they do not overlap and end above `lowest`."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + distance)
    limit = lowest
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - distance
    return moved
