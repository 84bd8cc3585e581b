"""Figures of what was looked into: heat maps, boxes, bars. SVG like the curves', drawn without a library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from mimlet.report.axes import (
    LETTER,
    LINE,
    Array,
    Frame,
    begin,
    held_against,
    number,
    opening,
    read,
    short,
    style_of,
    tag,
    ticks,
)

SHADES = 25
"""Steps of a colour bar."""
ROOM = (28, 15)
"""A cell of so many units has its value written into it."""
JOINED = "\u00a0"
"""A space that does not part values for the page's script."""


def heatmap_svg(
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
    low: float = 0.0,
    high: float = 1.0,
    unit: str = "",
) -> Markup:
    """An SVG of values [R][C] as colours, the first row at the bottom, the first column at the left.

    Colours are those of cividis, whose lightness grows evenly with the value, for colour-blind eyes too, and which is
    the same in light and dark. Values outside [low, high] have the colour of the limit and are told as they are; a
    value that is not finite has no colour. Where there is room, values are written into their cells; the page's script
    shows each on hovering.
    """
    grid = np.asarray(values, dtype=np.float64)
    assert grid.shape == (len(rows), len(columns)), "a label for every row and every column"
    left = LETTER * max(map(len, rows)) + (14 + LINE if y_label else 14)
    top, right = 8.0, 302.0
    wide = (right - left) / len(columns)
    tall = min(wide, max(18, 300 / len(rows)))
    bottom = top + tall * len(rows)

    def named(row: int, column: int) -> str:
        return f"{y_label} {rows[row]} · {x_label} {columns[column]}".strip()

    words = f"{title}: {len(rows)} by {len(columns)} values"
    places = [(int(row), int(column)) for row, column in np.argwhere(np.isfinite(grid))]
    if places:
        lowest, highest = min(places, key=lambda place: grid[place]), max(places, key=lambda place: grid[place])
        words += f"; lowest {number(grid[lowest])}{unit} at {named(*lowest)}"
        words += f"; highest {number(grid[highest])}{unit} at {named(*highest)}"

    parts = [opening(360, bottom + 38, f"{words}.")]
    for (row, column), value in np.ndenumerate(grid):
        x, y, known = left + column * wide, bottom - (row + 1) * tall, math.isfinite(value)
        fill, ink = _shade((value - low) / (high - low)) if known else ("none", "unknown")
        tip = f"{named(row, column)}: {number(value) + unit if known else 'not finite'}"
        parts.append(tag("rect", "cell", x=x, y=y, width=wide, height=tall, fill=fill, data_tip=tip))
        if wide >= ROOM[0] and tall >= ROOM[1]:
            told = f"{value:.{2 if high - low <= 2 else 1}f}" if known else "–"
            parts.append(tag("text", f"inside {ink}", told, x=x + wide / 2, y=y + tall / 2, dy=".35em"))
    for row in range(0, len(rows), math.ceil(LINE / tall)):
        parts.append(tag("text", "tick end", rows[row], x=left - 6, y=bottom - (row + 0.5) * tall, dy=".35em"))
    for column in range(0, len(columns), math.ceil(LETTER * (max(map(len, columns)) + 0.5) / wide)):
        parts.append(tag("text", "tick mid", columns[column], x=left + (column + 0.5) * wide, y=bottom + 15))
    parts.append(tag("text", "mid", x_label, x=(left + right) / 2, y=bottom + 32))
    upright = f"translate(12 {(top + bottom) / 2:.1f}) rotate(-90)"
    parts += [tag("text", "mid", y_label, transform=upright)] if y_label else []
    return Markup("").join([*parts, *_colour_bar(right + 14, top, bottom, low, high, unit), Markup("</svg>")])


def _colour_bar(x: float, top: float, bottom: float, low: float, high: float, unit: str) -> Iterator[Markup]:
    step = (bottom - top) / SHADES
    for index in range(SHADES):
        fill, _ = _shade((index + 0.5) / SHADES)
        yield tag("rect", "shade", x=x, y=bottom - (index + 1) * step, width=10, height=step + 0.3, fill=fill)
    for tick in (tick for tick in ticks(low, high) if low <= tick <= high):
        y = bottom - (tick - low) / (high - low) * (bottom - top)
        yield tag("text", "tick", short(tick) + unit, x=x + 14, y=y, dy=".35em")


def _shade(share: float) -> tuple[str, str]:
    """The colour of a share of the scale, and the class of text on it: black or white, whichever has more contrast."""
    from matplotlib import colormaps  # takes half a second, which only a heat map is worth

    colour = colormaps["cividis"](min(1.0, max(0.0, share)))[:3]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # WCAG's contrast with black, (l + 0.05) / 0.05, and with white, 1.05 / (l + 0.05), are equal at this luminance.
    ink = "black" if luminance > math.sqrt(0.05 * 1.05) - 0.05 else "white"
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour), ink


@dataclass(frozen=True)
class Boxes:
    """Values [layer][head] of one model: a box per layer."""

    label: str
    values: Sequence[Sequence[float]]
    style: int = 0


@dataclass(frozen=True)
class _Box:
    """A sample in five numbers, and what lies beyond the whiskers, which reach to the last values within 1.5 times the
    distance of the quartiles (Tukey).
    """

    low: float
    lower: float
    median: float
    upper: float
    high: float
    beyond: Array

    @classmethod
    def of(cls, sample: Sequence[float]) -> _Box | None:
        """The box of what is finite in a sample, if anything is."""
        values = np.asarray(sample, dtype=np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        lower, median, upper = (float(value) for value in np.percentile(values, (25, 50, 75)))
        reach = 1.5 * (upper - lower)
        within = (values >= lower - reach) & (values <= upper + reach)
        return cls(float(values[within].min()), lower, median, upper, float(values[within].max()), values[~within])

    def told(self, unit: str) -> str:
        """The box in a few words, joined to one."""
        beyond = f", {len(self.beyond)} beyond" if len(self.beyond) else ""
        words = f"{number(self.median)}{unit} ({number(self.low, 3)} to {number(self.high, 3)}{beyond})"
        return words.replace(" ", JOINED)


def boxes_svg(
    groups: Sequence[Boxes],
    *,
    title: str,
    unit: str = "",
    references: Mapping[str, float] | None = None,
    x_label: str = "block",
) -> Markup:
    """An SVG of box plots by layer, numbered from 1, models side by side in the order given; they may differ in depth.

    A box spans the quartiles over heads with a bar at the median; whiskers reach to the last head within 1.5 times its
    height, dots are heads beyond. A line in the model's style joins the medians. `references`: values by name, drawn
    across. Values that are not finite are left out.
    """
    references = references or {}
    boxes = [
        (group, {block: box for block, sample in enumerate(group.values, 1) if (box := _Box.of(sample))})
        for group in groups
    ]
    boxes = [(group, found) for group, found in boxes if found]
    assert boxes, "a figure needs at least one finite value"
    ends = [end for _, found in boxes for box in found.values() for end in (box.low, box.high, *box.beyond)]
    y_ticks = ticks(min([*ends, *references.values()]), max([*ends, *references.values()]))
    depth = max(block for _, found in boxes for block in found)
    frame = Frame(0.5, depth + 0.5, y_ticks[0], y_ticks[-1])
    slot = 0.84 * (frame.right - frame.left) / depth / len(boxes)
    half = min(8.0, 0.42 * slot)

    def median(group: Boxes, found: Mapping[int, _Box], block: int) -> str:
        return f"{number(found[block].median)}{unit} in {x_label} {block}"

    words = [
        f"{group.label} has the median {median(group, found, min(found))}, {median(group, found, max(found))}"
        for group, found in boxes
    ]
    words += [f"{name} is {number(value)}{unit}" for name, value in references.items()]
    parts = [*begin(frame, f"{title}, over heads by {x_label}: {'; '.join(words)}.", y_ticks, x_label, unit)]
    parts += held_against(frame, references, unit)
    for place, (group, found) in enumerate(boxes):
        colour, dash = style_of(group.style)
        shift = (place - (len(boxes) - 1) / 2) * slot
        middles = []
        for block, box in found.items():
            x = float(frame.across(block)) + shift
            five = (box.low, box.lower, box.median, box.upper, box.high)
            low, lower, middle, upper, high = (float(frame.down(value)) for value in five)
            middles.append(f"{x:.1f},{middle:.1f}")
            whiskers = f"M{x:.1f} {low:.1f}V{lower:.1f}M{x:.1f} {upper:.1f}V{high:.1f}"
            parts.append(tag("path", f"whisker {colour}", d=whiskers))
            parts.append(
                tag("rect", f"box {colour}", x=x - half, y=upper, width=2 * half, height=max(0.5, lower - upper))
            )
            parts.append(tag("path", f"median {colour}", d=f"M{x - half:.1f} {middle:.1f}h{2 * half:.1f}"))
            for value in box.beyond:
                parts.append(tag("circle", f"beyond {colour}", cx=x, cy=float(frame.down(value)), r=2))
        told = read(group.label, found, (box.told(unit) for box in found.values()))
        line = f"through {colour}"
        parts.append(tag("polyline", line, stroke_dasharray=dash, points=" ".join(middles), **told))
    return Markup("").join([*parts, Markup("</svg>")])


@dataclass(frozen=True)
class Bars:
    """Values of one run by name, and what some of them are to be held against."""

    label: str
    values: Mapping[str, float]
    markers: Mapping[str, float] = field(default_factory=dict)
    style: int = 0


def bars_svg(runs: Sequence[Bars], *, title: str, marker: str, unit: str = "", high: float | None = None) -> Markup:
    """An SVG of horizontal bars from zero: a group per name, in it a bar per run in the order given.

    `marker`: what the stroke across a bar is, in words. `high`: the end of the axis, else that of the values. Values
    are positive; a run that has none for a name has no bar there.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    assert names, "a figure needs at least one value"
    values = [value for run in runs for value in (*run.values.values(), *run.markers.values())]
    scale = ticks(0.0, max(values) if high is None else high)
    thick = 14 if len(runs) < 3 else 10
    tall, width, top = thick * len(runs) + 12, 460, 6
    left, right = min(200.0, LETTER * max(map(len, names)) + 12), width - 50.0
    bottom = top + tall * len(names)

    def across(value: float) -> float:
        return left + (right - left) * value / scale[-1]

    def told(run: Bars, name: str) -> str:
        beside = f" ({marker} {number(run.markers[name])}{unit})" if name in run.markers else ""
        return f"{number(run.values[name])}{unit}{beside}"

    words = [
        f"{name}: {', '.join(f'{run.label} {told(run, name)}' for run in runs if name in run.values)}" for name in names
    ]
    parts = [opening(width, bottom + 24, f"{title}. {'; '.join(words)}.")]
    for tick in scale:
        parts.append(tag("path", "grid", d=f"M{across(tick):.1f} {top}V{bottom}"))
        parts.append(tag("text", "tick mid", short(tick) + unit, x=across(tick), y=bottom + 16))
    for place, name in enumerate(names):
        down = top + place * tall
        parts.append(tag("text", "end", name, x=left - 8, y=down + tall / 2, dy=".35em"))
        rows = []
        for index, run in enumerate(runs):
            if name not in run.values:
                continue
            colour, y, value = style_of(run.style)[0], down + 6 + index * thick, run.values[name]
            rows.append([colour, run.label, told(run, name)])
            parts.append(tag("rect", f"bar {colour}", x=left, y=y + 1, width=across(value) - left, height=thick - 2))
            if name in run.markers:
                parts.append(tag("path", "marker", d=f"M{across(run.markers[name]):.1f} {y}v{thick}"))
            text, end = number(value, 3) + unit, across(value)
            beyond = across(run.markers.get(name, 0.0))
            if end < beyond + 6 and beyond < end + 12 + LETTER * len(text):
                end = beyond
            parts.append(tag("text", f"value {colour}", text, x=end + 6, y=y + thick / 2, dy=".35em"))
        spot = {"data_tip": name, "data_rows": json.dumps(rows, ensure_ascii=False)}
        parts.append(tag("rect", "spot", x=0, y=down, width=width, height=tall, **spot))
    parts.append(tag("path", "axis", d=f"M{left:.1f} {top}V{bottom}"))
    return Markup("").join([*parts, Markup("</svg>")])
