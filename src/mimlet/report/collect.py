"""From run folders and analyses to one page: what they say, arranged for `mimlet.report.page`."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from os.path import commonpath
from pathlib import Path
from statistics import mean, median
from typing import TypeGuard

from safetensors import SafetensorError, safe_open

from mimlet.analyse.results import ANALYSIS_FILE, ANALYSIS_FOLDER, Analysis, read_analysis
from mimlet.config import flatten
from mimlet.errors import RunError
from mimlet.methods.settings import METHODS
from mimlet.models.weights import ENCODER_FILE
from mimlet.report.axes import number
from mimlet.report.figures import Curve, Picture, averaged, curves_svg, shares_svg
from mimlet.report.insight import (
    Held,
    Looked,
    analysis_sections,
    described,
    joined,
    model_sheet,
    robustness_facts,
    robustness_section,
    styles_of,
)
from mimlet.report.page import Advice, Cell, Chart, Headline, Label, Page, Row, Section, Sheet, write_page
from mimlet.run import Line, Run, read_run

CIRCUMSTANCES = frozenset(
    {"step", "epoch", "kind", "time", "lr", "grad_norm", "images_per_second", "data_wait", "memory_mb"}
)
"""What is in records beside losses, other values that a method logs, and results of evaluations."""
HEADS = re.compile(r"(?P<label>.*?)head_(?P<what>entropy|share)_(?P<pair>[qkv]{2})(_(?P<head>\d+))?")
"""What adaptive head matching is watched by (`mimlet.methods.relations`)."""
BETTER_HIGH = re.compile(r"top|acc|%", re.IGNORECASE)
BETTER_LOW = re.compile(r"loss|error", re.IGNORECASE)
MISSING = "–"
LARGEST = 1e100
"""Larger numbers are not drawn: differences of them would be infinite."""
NOTES = 20
"""Notes of a run that are shown: the last so many."""

Table = Sequence[Mapping[str, str | float]]


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str,
    table: Table | None = None,
    pictures: Sequence[Picture] = (),
    notes: Sequence[str] = (),
    snippet: str = "",
    findings: Sequence[Advice] = (),
) -> Path:
    """Writes one HTML file that needs nothing but itself, and returns its path.

    `table`: the result in a few rows, columns in the order of the first row. The best value stands out in columns of
    numbers whose name says which way is better: 'top', 'acc' or '%' (high), 'loss' or 'error' (low). `snippet`: code
    that uses what was trained. `findings`: a diagnosis. What a run's folder holds of an analysis (`analysis/`) and of
    its robustness is shown too.
    Raises `RunError` for a folder that is not a run, or holds damaged files.
    """
    shown = _load(runs)
    analyses = [run.looked for run in shown if run.looked]
    if len(shown) == 1:
        analyses = [replace(looked, label="") for looked in analyses]
    groups = joined(analyses)
    styles = {run.run.path.resolve(): run.style for run in shown}
    sections, sheets = [*_sections(shown)], [*_sheets(shown)]
    for group in groups:
        labels = styles_of(group.analysis.models, styles)
        suffix = f", {group.label}" if len(groups) > 1 else ""
        sections += analysis_sections(group.analysis, labels, suffix)
        sheets.append(model_sheet(group.analysis, labels, suffix))
    page = Page(
        title=title,
        lead=_lead(shown),
        headline=_headline(table) if table else None,
        tiles=_tiles(shown[0]) if len(shown) == 1 and not table else (),
        findings=findings,
        pictures=[*pictures, *(picture for looked in analyses for picture in looked.pictures())],
        sections=[*sections, _speed(shown)],
        snippet=snippet,
        sheets=sheets,
        notes=[
            *notes,
            *(note for run in shown for note in run.notes),
            *(f"Looked into: {described(group.analysis)}." for group in groups),
            *(note for looked in analyses for note in looked.notes()),
        ],
        commands=[(run.label if len(shown) > 1 else "", run.command) for run in shown],
        environments=_environments(shown),
    )
    return write_page(page, out)


def write_analysis(
    analysis: Analysis,
    folder: Path,
    out: Path,
    *,
    title: str,
    command: str = "",
    notes: Sequence[str] = (),
    findings: Sequence[Advice] = (),
) -> Path:
    """Writes the page about an analysis, whose pictures are in `folder`, and returns its path.

    `command`: what repeats it. `findings`: a diagnosis.
    """
    labels = styles_of(analysis.models, {})
    looked = Looked("", folder, analysis)
    page = Page(
        title=title,
        lead=described(analysis),
        findings=findings,
        pictures=list(looked.pictures()),
        sections=analysis_sections(analysis, labels),
        sheets=[model_sheet(analysis, labels)],
        notes=[*notes, *looked.notes()],
        commands=[("", command)] if command else (),
    )
    return write_page(page, out)


@dataclass(frozen=True)
class Shown:
    """One run as the page shows it. `style` is the style of its lines in all figures."""

    label: str
    style: int
    run: Run

    @cached_property
    def train(self) -> list[Line]:
        """Training records in the order of steps."""
        return self.run.lines("train")

    @cached_property
    def eval(self) -> list[Line]:
        """Evaluation records in the order of steps."""
        return self.run.lines("eval")

    @cached_property
    def losses(self) -> list[str]:
        """What training logged beside rate, speed and head matching; without the total where it only repeats a single
        loss.
        """
        names = [name for name in _names(self.train) if name not in CIRCUMSTANCES and not HEADS.fullmatch(name)]
        parts = [name for name in names if name != "total"]
        repeated = len(parts) == 1 and _values(self.train, "total") == _values(self.train, parts[0])
        return parts if repeated else names

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return max((float(line["time"]) for line in self.run.metrics), default=0.0)

    @property
    def steps(self) -> int:
        """Optimiser steps so far."""
        return max((int(line["step"]) for line in self.run.metrics), default=0)

    @property
    def command(self) -> str:
        """What repeats this run: the command that was given, else its resolved settings as a recipe."""
        given = self.run.environment.get("command")
        if isinstance(given, list) and given:
            return shlex.join(str(part) for part in given)
        verb = "finetune" if METHODS[self.run.config.method.name].labels else "pretrain"
        return shlex.join(["mimlet", verb, "--recipe", str(self.run.path / "config.json"), "--out", "NEW_FOLDER"])

    @property
    def unreadable(self) -> int:
        """How many files could not be read."""
        path = self.run.path / "unreadable.txt"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    @cached_property
    def looked(self) -> Looked | None:
        """What an analysis found in this run, if it was looked into."""
        folder = self.run.path / ANALYSIS_FOLDER
        return Looked(self.label, folder, read_analysis(folder)) if (folder / ANALYSIS_FILE).is_file() else None

    @cached_property
    def held(self) -> Held | None:
        """How it holds up on other images, if that was judged."""
        return Held.read(self.run.path)

    @property
    def parameters(self) -> int | None:
        """Numbers in the exported weights, once they are written."""
        path = self.run.path / ENCODER_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "numpy") as file:
                shapes: list[list[int]] = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise RunError(f"{path} is damaged: {error}") from None
        return sum(math.prod(shape) for shape in shapes)

    @property
    def notes(self) -> list[str]:
        """What a reader has to know about this run."""
        found = [] if self.train or self.eval else [f"{self.label}: no metrics yet."]
        broken = sum(any(name in line and not _is_finite(line[name]) for name in self.losses) for line in self.train)
        if broken:
            found.append(
                f"{self.label}: {broken:,} of {len(self.train):,} records have a loss that is not finite (not drawn)."
            )
        return found + [
            f"{self.label}, step {line['step']}: {line['text']}" for line in self.run.lines("note")[-NOTES:]
        ]


def _load(paths: Sequence[Path]) -> list[Shown]:
    """Reads runs and names each by its folder, with as much of the path as tells them apart."""
    parents = commonpath([path.resolve().parent for path in paths])
    return [
        Shown(path.resolve().relative_to(parents).as_posix(), index, read_run(path)) for index, path in enumerate(paths)
    ]


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < LARGEST


def _names(lines: Iterable[Line]) -> list[str]:
    """Names of the numbers in records, in the order of their first appearance."""
    return list(dict.fromkeys(name for line in lines for name, value in line.items() if not isinstance(value, str)))


def _points(lines: Iterable[Line], name: str) -> list[tuple[int, float]]:
    """(step, value) wherever the value is there and finite."""
    return [(int(line["step"]), value) for line in lines if _is_finite(value := line.get(name))]


def _values(lines: Iterable[Line], name: str) -> list[float]:
    return [value for _, value in _points(lines, name)]


def _chart(
    runs: Sequence[Shown],
    kind: str,
    name: str,
    title: str = "",
    unit: str = "",
    *,
    average: bool = False,
    from_zero: bool = False,
    log: bool = False,
    last: bool = True,
    every: bool = False,
    references: Mapping[str, float] | None = None,
) -> Iterator[Chart]:
    """One quantity of all runs that have it, if any has it twice. A share given in '%' is multiplied by 100."""
    title = title or _words(name)
    curves = []
    for shown in runs:
        if points := _points(shown.run.lines(kind), name):
            x, y = [step for step, _ in points], [value * (100 if unit == "%" else 1) for _, value in points]
            curve = Curve(shown.label, x, y, shown.style)
            curves.append(averaged(curve) if average else curve)
    if any(len(curve.x) > 1 for curve in curves):
        svg = curves_svg(
            curves,
            title=title,
            unit=unit,
            from_zero=from_zero,
            log=log,
            last=last,
            every=every,
            references=references,
        )
        yield Chart(title, svg)


def _sections(runs: Sequence[Shown]) -> Iterator[Section]:
    training: list[Chart] = []
    for name in _losses(runs):
        training += _chart([shown for shown in runs if name in shown.losses], "train", name, log=True)
    training += _chart(runs, "train", "lr", "learning rate", from_zero=True, last=False)
    evaluation = [chart for name in _judged(runs) for chart in _chart(runs, "eval", name, every=True)]
    robust = [((shown.style, shown.label), shown.held) for shown in runs if shown.held]
    yield Section("Losses and learning rate", training, _legend(runs))
    yield Section("Head matching", list(_matching(runs)), _legend(runs))
    yield Section("Evaluation", evaluation, _legend(runs))
    yield robustness_section(robust, [label for label, _ in robust] if len(runs) > 1 else ())


def _speed(runs: Sequence[Shown]) -> Section:
    charts = [
        *_chart(runs, "train", "images_per_second", average=True, from_zero=True),
        *_chart(runs, "train", "data_wait", "time spent waiting for data", "%", average=True, from_zero=True),
    ]
    return Section("Speed", charts, _legend(runs))


def _legend(runs: Sequence[Shown]) -> Sequence[Label]:
    """What lines stand for, where there are several runs."""
    return [(shown.style, shown.label) for shown in runs if shown.train or shown.eval] if len(runs) > 1 else ()


def _sheets(runs: Sequence[Shown]) -> Iterator[Sheet]:
    heads = [(shown.style, shown.label) for shown in runs] if len(runs) > 1 else ()
    yield Sheet("Runs" if len(runs) > 1 else "Run", _facts(runs), heads)
    yield Sheet("Settings that differ", _differences(runs), heads, swatches=False)


def _matching(runs: Sequence[Shown]) -> Iterator[Chart]:
    """For each relation that is matched head by head: which teacher heads the students of each run imitate, and how
    spread their weights are.
    """
    watched = [match for shown in runs for name in _names(shown.train) if (match := HEADS.fullmatch(name))]
    for label, pair in dict.fromkeys((match["label"], match["pair"]) for match in watched):
        title = f"{_words(label)}{'-'.join(pair.upper())}"
        counts = set()
        for shown in runs:
            shares = _shares(shown, f"{label}head_share_{pair}_")
            counts.add(len(shares))
            if shares and len(shares[0].x) > 1:
                whose = f", {shown.label}" if len(runs) > 1 else ""
                named = f"{title}: share of each teacher head{whose}"
                yield Chart(named, shares_svg(shares, title=named, part="head"))
        uniform = {f"all {heads} heads alike": math.log(heads) for heads in sorted(counts) if heads}
        name, named = f"{label}head_entropy_{pair}", f"{title}: entropy of the weights, in nats"
        yield from _chart(runs, "train", name, named, average=True, from_zero=True, references=uniform)


def _shares(shown: Shown, prefix: str) -> list[Curve]:
    """The share of each head over training, labelled by its number, from the records that have all of them."""
    heads = re.compile(re.escape(prefix) + "[0-9]{1,6}")
    names = [name for name in _names(shown.train) if heads.fullmatch(name)]
    lines = [line for line in shown.train if all(_is_finite(line.get(name)) for name in names)]
    steps = [int(line["step"]) for line in lines]
    numbers = [str(int(name.removeprefix(prefix))) for name in names]
    return [
        averaged(Curve(number, steps, _values(lines, name)))
        for number, name in zip(numbers, names, strict=True)
        if lines
    ]


def _losses(runs: Sequence[Shown]) -> list[str]:
    """What training of any run logged, the total last."""
    names = dict.fromkeys(name for shown in runs for name in shown.losses)
    return sorted(names, key=lambda name: name == "total")


def _judged(runs: Sequence[Shown]) -> list[str]:
    """What evaluations of any run found."""
    return [name for name in _names(line for shown in runs for line in shown.eval) if name not in CIRCUMSTANCES]


def _facts(runs: Sequence[Shown]) -> list[Row]:
    """Rows of the table of runs; rows that no run fills are left out."""
    rows: dict[str, Callable[[Shown], str]] = {
        "recipe": lambda shown: shown.run.config.title,
        "method": lambda shown: shown.run.config.method.name,
        "encoder": _encoder,
        "parameters": lambda shown: f"{shown.parameters:,}" if shown.parameters else "",
        "images seen": lambda shown: f"{shown.steps * shown.run.config.schedule.batch:,}" if shown.train else "",
        "steps": lambda shown: f"{shown.steps:,}" if shown.steps else "",
        "time": lambda shown: duration(shown.seconds) if shown.seconds else "",
    }
    rows |= {f"{_words(name)}, last": partial(_last, kind="train", name=name) for name in _losses(runs)}
    rows |= {f"{_words(name)}, last evaluation": partial(_last, kind="eval", name=name) for name in _judged(runs)}
    for name in robustness_facts(None):
        rows[name] = partial(lambda shown, name: robustness_facts(shown.held)[name], name=name)
    rows |= {
        "images per second": lambda shown: _summary(median, shown, "images_per_second"),
        "waiting for data": lambda shown: _summary(lambda values: 100 * mean(values), shown, "data_wait", "%"),
        "peak memory": lambda shown: _summary(max, shown, "memory_mb", " MB"),
        "unreadable files": lambda shown: f"{shown.unreadable:,}",
    }
    table = [(name, [cell(shown) or MISSING for shown in runs]) for name, cell in rows.items()]
    return [(name, cells) for name, cells in table if set(cells) != {MISSING}]


def _encoder(shown: Shown) -> str:
    if not METHODS[shown.run.config.method.name].encoder:
        return ""
    settings = shown.run.config.encoder
    shape = settings.shape()
    return (
        f"{settings.name}: {settings.blocks} blocks, width {shape.dim}, {shape.heads} heads, "
        f"{settings.image_size} px in patches of {shape.patch}"
    )


def _last(shown: Shown, kind: str, name: str) -> str:
    values = _values(shown.run.lines(kind), name) if kind == "eval" or name in shown.losses else []
    return number(values[-1]) if values else ""


def _summary(summarise: Callable[[Sequence[float]], float], shown: Shown, name: str, unit: str = "") -> str:
    values = _values(shown.train, name)
    return f"{number(float(f'{summarise(values):.3g}'))}{unit}" if values else ""


def _differences(runs: Sequence[Shown]) -> list[Row]:
    """Settings in which runs differ, other than where and how they were run."""
    settings = [
        dict(flatten(shown.run.config.model_dump(mode="json", exclude={"run", "sweep", "title"}))) for shown in runs
    ]
    names = sorted({name for values in settings for name in values})
    table = [(name, [_plain(values.get(name)) for values in settings]) for name in names]
    return [(name, cells) for name, cells in table if len(set(cells)) > 1]


def _environments(runs: Sequence[Shown]) -> list[Sheet]:
    """Environments with the labels of the runs that had them; equal ones once."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for shown in runs:
        described = {key: value for key, value in shown.run.environment.items() if key not in ("command", "previous")}
        groups.setdefault(tuple((key, _plain(value)) for key, value in flatten(described)), []).append(shown.label)
    return [
        Sheet(
            f"Environment of {', '.join(labels)}" if len(groups) > 1 else "Environment",
            [(key, [value]) for key, value in environment],
        )
        for environment, labels in groups.items()
    ]


def _tiles(shown: Shown) -> list[tuple[str, str]]:
    """The few numbers that stand large above the page of a single run."""
    names = [("eval", name) for name in _judged([shown])[:2]] + [("train", name) for name in _losses([shown])[-1:]]
    tiles = [(_words(name), _last(shown, kind, name)) for kind, name in names]
    tiles.append(("images per second", _summary(median, shown, "images_per_second")))
    tiles.append(("time", duration(shown.seconds) if shown.seconds else ""))
    return [(name, value) for name, value in tiles if value]


def _headline(table: Table) -> Headline:
    """The table, with the best of each column marked."""
    columns = list(table[0])
    cells = [[Cell(MISSING) for _ in columns] for _ in table]
    numeric = []
    for place, name in enumerate(columns):
        values = {index: float(row[name]) for index, row in enumerate(table) if _is_finite(row.get(name))}
        numeric.append(bool(values))
        largest = max(values.values(), default=0.0)
        best = None
        if len(values) > 1 and (BETTER_HIGH.search(name) or BETTER_LOW.search(name)):
            best = min(values.values()) if BETTER_LOW.search(name) else largest
        for index, row in enumerate(table):
            if index in values:
                value = values[index]
                bar = None if best is None or largest <= 0 else round(100 * max(0.0, value) / largest, 1)
                cells[index][place] = Cell(number(value), True, value == best, bar)
            elif name in row:
                cells[index][place] = Cell(str(row[name]))
    return Headline(list(zip(columns, numeric, strict=True)), cells)


def _lead(runs: Sequence[Shown]) -> str:
    seconds = sum(shown.seconds for shown in runs)
    count = "" if len(runs) == 1 else f"{len(runs)} runs, "
    steps = sum(shown.steps for shown in runs)
    return f"{count}{steps:,} steps in {duration(seconds)}" if steps else f"{count}no steps yet"


def duration(seconds: float) -> str:
    """Seconds in words: 8.4 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: object) -> str:
    """A setting as text: lists without brackets, nothing as a dash."""
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or MISSING
    return MISSING if value in (None, "") else str(value)
