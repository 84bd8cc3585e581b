"""What figures of a page share: where values lie, axes, ticks, numbers as people write them, styles of lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

Array = NDArray[np.float64]

DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2")
"""With the 6 colours of page.html, styles repeat after 30 lines."""
LETTER = 7.0
"""About the width of a letter in a figure's units."""
TINY = 1e-200
"""Values that are no further apart are equal, to a figure."""
LINE = 13
"""The distance of two lines of text, in a figure's units."""


@dataclass(frozen=True)
class Frame:
    """Where values lie in a figure of 460 by 240 units, with room for ticks and, at the right, for last values."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    logarithmic: bool = False

    width, height, left, right, top, bottom = 460, 240, 50, 404, 10, 210

    def across(self, x: Array | float) -> Array:
        """The horizontal place of a value."""
        share = (np.asarray(x, dtype=np.float64) - self.x_low) / ((self.x_high - self.x_low) or 1)
        return np.asarray(self.left + (self.right - self.left) * share)

    def down(self, y: Array | float) -> Array:
        """The vertical place of a value."""
        values = [np.asarray(value, dtype=np.float64) for value in (self.y_low, self.y_high, y)]
        low, high, at = (np.log10(value) for value in values) if self.logarithmic else values
        with np.errstate(over="ignore"):  # a value may lie as far out as it likes
            return np.asarray(self.bottom - (self.bottom - self.top) * (at - low) / ((high - low) or 1))

    def points(self, x: Array, y: Array) -> list[tuple[str, str]]:
        """Where values lie, as written in a figure."""
        return [(f"{px:.1f}", f"{py:.1f}") for px, py in zip(self.across(x), self.down(y), strict=True)]


def tag(name: str, kind: str, words: str = "", **attributes: str | float) -> Markup:
    """An element of classes `kind`. Numbers are written to a tenth; `_` in names of attributes is `-`."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value)
        for key, value in attributes.items()
    )
    end = Markup(">{}</{}>").format(words, name) if words else Markup("/>")
    return Markup('<{} class="{}"{}{}').format(name, kind, written, end)


def opening(width: float, height: float, words: str, x_label: str = "", unit: str = "") -> Markup:
    """The opening tag of a figure, with words for those who do not see it, and what the page's script calls its values.

    A figure is closed with `</svg>`.
    """
    return Markup(
        '<svg class="chart" viewBox="0 0 {:g} {:.5g}" role="img" tabindex="0" aria-label="{}" '
        'data-x="{}" data-unit="{}">'
    ).format(width, height, words, x_label, unit)


def begin(frame: Frame, words: str, y_ticks: Sequence[float], x_label: str, unit: str) -> Iterator[Markup]:
    """The opening tag and the axes of a figure over whole numbers."""
    yield opening(frame.width, frame.height, words, x_label, unit)
    for tick in y_ticks:
        y = float(frame.down(tick))
        yield tag("path", "grid", d=f"M{frame.left} {y:.1f}H{frame.right}")
        yield tag("text", "tick end", short(tick) + unit, x=frame.left - 6, y=y, dy=".35em")
    below = frame.bottom + 17
    for tick in _whole(frame.x_low, frame.x_high):
        yield tag("text", "tick mid", short(tick), x=float(frame.across(tick)), y=below)
    yield tag("text", "tick", x_label, x=frame.right + 20, y=below)
    if frame.logarithmic:
        yield tag("text", "tick end", "log scale", x=frame.right, y=frame.top + 4)
    yield tag("path", "axis", d=f"M{frame.left} {frame.bottom}H{frame.right}")


def held_against(frame: Frame, references: Mapping[str, float], unit: str) -> Iterator[Markup]:
    """Values by name, drawn across the figure."""
    downs = [float(frame.down(value)) for value in references.values()]
    places = apart(downs, distance=LINE, lowest=frame.bottom - 2)
    for (name, value), down, place in zip(references.items(), downs, places, strict=True):
        yield tag("path", "reference", d=f"M{frame.left} {down:.1f}H{frame.right}")
        yield tag("text", "end", f"{name}: {number(value)}{unit}", x=frame.right, y=place, dy="-.35em")


def read(label: str, x: Iterable[float], y: Iterable[str]) -> dict[str, str]:
    """Attributes of a line that the page's script reads: values as written, without plain spaces."""
    return {"data_label": label, "data_xs": " ".join(f"{value:.10g}" for value in x), "data_ys": " ".join(y)}


def beside(frame: Frame, values: Sequence[tuple[str, float, float, str]]) -> Iterator[Markup]:
    """Texts right of where lines end: (colour, x, y, text)."""
    places = apart([y for _, _, y, _ in values], distance=LINE, lowest=frame.bottom - 2)
    for (colour, x, _, text), place in zip(values, places, strict=True):
        yield tag("text", f"value {colour}", text, x=x + 7, y=place, dy=".35em")


def style_of(style: int) -> tuple[str, str]:
    """(class of the colour, dashes) of a style."""
    return f"s{style % 6}", DASHES[style % len(DASHES)]


def swatch(style: int) -> Markup:
    """The sample of a line's style that legends show."""
    colour, dash = style_of(style)
    line = tag("path", f"line {colour}", d="M1 5H29", stroke_dasharray=dash)
    return Markup('<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true">{}</svg>').format(line)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    if not high - low > TINY:
        margin = abs(low) / 2 if abs(low) > TINY else 1.0
        low, high = (low - margin, high + margin) if low else (0.0, high + margin)
    rough = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; with their multiples by 2 and 5 where they would be few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 300 * low else (1,)
    found = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return [tick for tick in found if low <= tick <= high]


def _whole(low: float, high: float) -> list[float]:
    """Whole numbers within [low, high]: all, or round ones where there are many."""
    if high - low < 14:
        return [float(tick) for tick in range(math.ceil(low), math.floor(high) + 1)]
    return [tick for tick in ticks(low, high) if low <= tick <= high and tick.is_integer()]


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, without exponent where people do without: 0.6123, 71.25, 12,346, 1.5e-5."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def short(tick: float) -> str:
    """A tick, which is round, with all its digits: 500, 12.5k, 1.5M, 1.1085."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(tick) >= size:
            return f"{tick / size:.10g}{letter}"
    return number(tick, 10)


def apart(places: Sequence[float], distance: float, lowest: float) -> list[float]:
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
