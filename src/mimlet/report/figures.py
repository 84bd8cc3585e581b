"""Figures of a report: grids of images as PNG, curves as SVG that is drawn without a library and can be read aloud."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from mimlet.report.axes import (
    Array,
    Frame,
    begin,
    beside,
    held_against,
    log_ticks,
    number,
    read,
    style_of,
    tag,
    ticks,
)

MAX_POINTS = 500
DOTS = 12
"""Lines of so few points show each of them."""
LABELS = 6
COLOURED = 5
"""So many shares have a colour of their own."""

CELL = (112, 128)
"""An image is shown between so many pixels: small ones are enlarged by a whole factor, large ones reduced."""
COLUMNS = 64
"""So many images of a row are shown at most."""
GAP = 4
LABEL = 24
INK = (118, 118, 118, 255)
"""Grey that is legible on white and on the dark page: grids have a transparent ground."""
COLOURS = "inferno"
OPAQUE = 0.85
"""How much of the image the largest value of a map covers."""
GREY = (30, 0.5)
"""Brightness of the image below a map: this plus a share of its own."""


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


def image_grid(
    rows: Mapping[str, ArrayLike | torch.Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int = 8,
) -> bytes:
    """PNG of labelled rows of equally many normalised images [B,3,H,W], `columns` images at a time.

    An image times `std` plus `mean` is in [0, 1]; what lies outside is clipped. Images smaller than 112 px are enlarged
    by a whole factor without smoothing, so that pixels stay pixels.
    """
    pixels = {label: _to_pixels(images, mean, std) for label, images in rows.items()}
    count, height, width = next(iter(pixels.values())).shape[:3]
    enlarge = max(1, round(CELL[0] / max(height, width)))
    reduce = min(1.0, CELL[1] / max(height, width))
    cell = (round(width * enlarge * reduce), round(height * enlarge * reduce))
    font = ImageFont.load_default(16)
    columns = min(columns, count)
    bands = math.ceil(count / columns)
    line = LABEL + cell[1] + 2 * GAP
    canvas = Image.new("RGBA", (columns * (cell[0] + GAP) - GAP, bands * len(pixels) * line), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for index in range(count):
        band, column = divmod(index, columns)
        for row, (label, images) in enumerate(pixels.items()):
            top = (len(pixels) * band + row) * line
            if column == 0:
                draw.text((0, top + 2), label, fill=INK, font=font)
            filter_ = Image.Resampling.NEAREST if reduce == 1 else Image.Resampling.LANCZOS
            picture = Image.fromarray(images[index]).resize(cell, filter_)
            canvas.paste(picture, (column * (cell[0] + GAP), top + LABEL))
    return _png(canvas)


def overlay(plain: NDArray[np.uint8], shares: torch.Tensor) -> NDArray[np.uint8]:
    """A map [rows,columns], not negative, as heat over an image [S,S,3]: grey none, yellow the map's largest value."""
    from matplotlib import colormaps  # takes half a second, which only a picture is worth

    side = plain.shape[0]
    scaled = shares / shares.max().clamp_min(torch.finfo(shares.dtype).tiny)  # all may be 0: the class token has it all
    heat = F.interpolate(scaled[None, None], (side, side), mode="nearest-exact")[0, 0].numpy()
    grey = GREY[0] + GREY[1] * plain.mean(axis=2, keepdims=True)
    cover = OPAQUE * heat[..., None]
    mixed = (1 - cover) * grey + cover * 255 * colormaps[COLOURS](heat)[..., :3]
    return np.asarray(mixed.round(), dtype=np.uint8)


def overlays(images: torch.Tensor, maps: torch.Tensor, *, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """`overlay` of maps [B,rows,columns] over normalised images [B,3,S,S], normalised again."""
    pixels = [overlay(*pair) for pair in zip(_to_pixels(images, mean, std), maps.float().cpu(), strict=True)]
    shown = (np.stack(pixels) / 255 - np.asarray(mean)) / np.asarray(std)
    return torch.from_numpy(shown).permute(0, 3, 1, 2).float()


def image_strip(images: ArrayLike | torch.Tensor, *, mean: Sequence[float], std: Sequence[float]) -> bytes:
    """PNG of normalised square images [B,3,S,S] in one row, S at most 112: larger ones are reduced. Never more than
    38 kB per image.
    """
    pixels = _to_pixels(images, mean, std)
    side = min(pixels.shape[1], CELL[0])
    strip = Image.new("RGB", (len(pixels) * side, side))
    for column, image in enumerate(pixels):
        strip.paste(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS), (column * side, 0))
    return _png(strip)


def film(rows: Mapping[str, bytes]) -> bytes:
    """PNG of labelled `image_strip`s of equally many images below each other. Small images are enlarged by a whole
    factor.
    """
    strips = [Image.open(io.BytesIO(png)) for png in rows.values()]
    side, font = strips[0].height, ImageFont.load_default(16)
    cell, count = side * max(1, round(CELL[0] / side)), min(strips[0].width // side, COLUMNS)
    margin = math.ceil(max(font.getlength(label) for label in rows)) + 2 * GAP
    canvas = Image.new("RGBA", (margin + count * (cell + GAP) - GAP, len(strips) * (cell + GAP) - GAP), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (label, strip) in enumerate(zip(rows, strips, strict=True)):
        top = row * (cell + GAP)
        draw.text((0, top + cell // 2), label, fill=INK, font=font, anchor="lm")
        for column in range(count):
            image = strip.crop((column * side, 0, (column + 1) * side, side))
            canvas.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (margin + column * (cell + GAP), top))
    return _png(canvas)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
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


def curves_svg(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str = "step",
    unit: str = "",
    from_zero: bool = False,
    log: bool = False,
    last: bool = True,
    every: bool = False,
    references: Mapping[str, float] | None = None,
) -> Markup:
    """An SVG line chart over whole numbers: grid, ticks, last values, and what the page's script shows on hovering.

    `title` and the last values are its text alternative. Colours come from the page's classes `s0` to `s5`, so that
    it follows the theme. `log` allows a logarithmic axis where values are positive and span more than a factor
    of 30. `last`: whether up to 6 lines have their last value written beside them. `every`: mark every point, however
    many there are. `references`: values by name that lines are to be held against, drawn across a linear axis. Points
    that are not finite are left out.
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
        y_ticks = log_ticks(y_low, y_high)
    else:
        y_ticks = ticks(min(0.0, y_low) if from_zero else y_low, y_high)
        y_low, y_high = y_ticks[0], y_ticks[-1]
    frame = Frame(x_low, x_high, y_low, y_high, logarithmic)

    ends = "; ".join(
        [f"{curve.label} ends at {number(y[-1])}{unit}" for curve, _, y in lines]
        + [f"{name} is {number(value)}{unit}" for name, value in references.items()]
    )
    parts = [*begin(frame, f"{title} by {x_label}: {ends}.", y_ticks, x_label, unit)]
    parts += held_against(frame, references, unit)
    for curve, x, y in lines:
        points = frame.points(x, y)
        colour, dash = style_of(curve.style)
        parts.append(
            tag(
                "polyline",
                f"line {colour}",
                stroke_dasharray=dash,
                points=" ".join(",".join(point) for point in points),
                **read(curve.label, x, map(number, y)),
            )
        )
        if every or len(points) <= DOTS:
            parts += [tag("circle", f"dot {colour}", cx=px, cy=py, r=3) for px, py in points]
    if last and len(lines) <= LABELS:
        written = [
            (style_of(curve.style)[0], float(frame.across(x[-1])), float(frame.down(y[-1])), number(y[-1]) + unit)
            for curve, x, y in lines
        ]
        parts += beside(frame, written)
    return Markup("").join([*parts, Markup("</svg>")])


def shares_svg(shares: Sequence[Curve], *, title: str, part: str, x_label: str = "step") -> Markup:
    """An SVG of what shares of 1 do: bands on top of each other, the first at the top, all over the same points x.

    The 5 that are largest at the end have colours and their number and share written beside them, the others are grey;
    the page's script shows all on hovering. `part`: what a share belongs to; curves are labelled by its number.
    """
    x = np.asarray(shares[0].x, dtype=np.float64)
    percent = 100 * np.asarray([curve.y for curve in shares], dtype=np.float64)
    frame = Frame(float(x[0]), float(x[-1]), 0.0, 100.0)
    edges = 100 - np.asarray([np.zeros_like(x), *accumulate(percent)])
    largest = sorted(range(len(shares)), key=lambda index: -percent[index, -1])[:COLOURED]
    colours = {index: f"s{rank}" for rank, index in enumerate(largest)}

    last = [f"{curve.label}: {_percent(share)}" for curve, share in zip(shares, percent[:, -1], strict=True)]
    ends = ", ".join(f"{part} {last[index]}" for index in largest)
    others = [index for index in range(len(shares)) if index not in largest]
    rest = f", {len(others)} others {_percent(percent[others, -1].sum())}" if others else ""
    parts = [*begin(frame, f"{title} by {x_label}: at the end {ends}{rest}.", ticks(0.0, 100.0), x_label, "%")]
    for index, curve in enumerate(shares):
        colour = colours.get(index, "rest")
        above, below = (" L".join(" ".join(point) for point in frame.points(x, edges[index + i])) for i in (0, 1))
        outline = f"M{above} L{' L'.join(reversed(below.split(' L')))}Z"
        middle = " ".join(",".join(point) for point in frame.points(x, (edges[index] + edges[index + 1]) / 2))
        values = read(f"{part} {curve.label}", x, map(number, percent[index]))
        parts.append(tag("path", f"band {colour}", d=outline))
        parts.append(tag("polyline", f"middle {colour}", points=middle, **values))
    written = [
        (colours[index], float(frame.right), float(frame.down(edges[index : index + 2, -1].mean())), last[index])
        for index in sorted(largest)
    ]
    return Markup("").join([*parts, *beside(frame, written), Markup("</svg>")])


def _percent(share: float) -> str:
    """0.4%, 4.5%, 45%."""
    return f"{share:.{int(share < 9.95)}f}%"
