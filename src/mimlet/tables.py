"""Small tables: on the terminal, and as .csv files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimlet.atomic import write_atomic
from mimlet.untrusted import printable

Rows = Sequence[Mapping[str, object]]
"""Rows by column; a row may lack columns."""


def print_table(title: str, rows: Rows) -> None:
    """Prints rows under a title, floats with two digits."""
    console, table = Console(highlight=False), Table()
    for name in _columns(rows):
        table.add_column(Text(printable(name)), overflow="fold")
    for row in rows:
        values = (row.get(name, "") for name in _columns(rows))
        texts = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in values)
        table.add_row(*(Text(printable(text)) for text in texts))
    console.print(printable(title), markup=False, soft_wrap=True)
    console.print(table)


def write_csv(path: Path, rows: Rows) -> None:
    """Writes rows under a header of all their columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
