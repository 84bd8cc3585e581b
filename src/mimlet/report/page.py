"""The page itself: what stands on it, in the order of the page, and how it becomes one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mimlet.atomic import write_atomic
from mimlet.report.axes import swatch
from mimlet.report.figures import Picture

Row = tuple[str, Sequence[str]]
"""A row of a table: its name, then its cells."""
Label = tuple[int, str]
"""(style, name) of a run or a model."""


class Advice(Protocol):
    """A finding of a diagnosis: what was asked, the answer in words, what it rests on, and what to do.

    `decided`: whether the evidence suffices for the verdict.
    """

    @property
    def question(self) -> str:
        """What was asked."""

    @property
    def verdict(self) -> str:
        """The answer."""

    @property
    def evidence(self) -> str:
        """The numbers behind it."""

    @property
    def threshold(self) -> str:
        """What they were held against."""

    @property
    def advice(self) -> str:
        """What to do."""

    @property
    def decided(self) -> bool:
        """Whether the evidence suffices."""


@dataclass(frozen=True)
class Chart:
    """A figure under its title."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    """Figures that belong together. `legend`: what their styles stand for; `note`: how to read them.

    `narrow` figures stand three in a row where there is room.
    """

    title: str
    charts: Sequence[Chart]
    legend: Sequence[Label] = ()
    note: str = ""
    narrow: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table of facts, a column per run or model, headed by `heads` where there are any; `swatches` show styles."""

    title: str
    rows: Sequence[Row]
    heads: Sequence[Label] = ()
    swatches: bool = True


@dataclass(frozen=True)
class Cell:
    """A value of the headline table. `bar`: percent of the column's largest, in columns that have a best value."""

    text: str
    numeric: bool = False
    best: bool = False
    bar: float | None = None


@dataclass(frozen=True)
class Headline:
    """The result in a few rows. `columns`: (name, whether it holds numbers)."""

    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Page:
    """What stands on a page, in its order; what is empty is left out.

    `tiles`: (name, value) that stand large. `snippet`: code that uses what was trained. `commands`: (name, what repeats
    it). `environments`: tables that may be folded away.
    """

    title: str
    lead: str
    headline: Headline | None = None
    tiles: Sequence[tuple[str, str]] = ()
    findings: Sequence[Advice] = ()
    pictures: Sequence[Picture] = ()
    sections: Sequence[Section] = ()
    snippet: str = ""
    sheets: Sequence[Sheet] = ()
    notes: Sequence[str] = ()
    commands: Sequence[tuple[str, str]] = ()
    environments: Sequence[Sheet] = ()


def write_page(page: Page, out: Path) -> Path:
    """Writes one HTML file that needs nothing but itself, and returns its path."""
    templates = Environment(
        loader=PackageLoader("mimlet", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["sha256"] = lambda text: (
        "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
    )
    templates.filters["base64"] = lambda data: base64.b64encode(data).decode()
    write_atomic(out, templates.get_template("page.html").render(page=page, swatch=swatch, version=version("mimlet")))
    return out
