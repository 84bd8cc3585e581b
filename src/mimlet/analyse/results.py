"""What an analysis found, as it is stored in `analysis.json`. Reading it needs no torch."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from mimlet.atomic import write_atomic
from mimlet.errors import RunError
from mimlet.untrusted import parse_json, what_is_wrong

ANALYSIS_FILE = "analysis.json"
ANALYSIS_FOLDER = "analysis"
"""Where a run keeps the analysis of its encoder."""

LARGEST = 1e9
LARGEST_GRID = 512
"""Tokens along a side; what is computed from a grid takes time with its square."""

Order = Literal["random", "folder"]
"""Which images are looked at: a seeded sample, or the first ones in the order of files (as MAE-lite's code does)."""


@dataclass(frozen=True)
class ModelFindings:
    """One encoder: what it is, and what was measured in it.

    Layers are numbered as taps: 0 the embedding, i after block i. `distance`, `entropy` [L][H]: of each block's heads,
    over its tokens, in patches (of `patch` px, in all blocks) and in nats; no numbers of a block that does not attend
    to the whole image, None where attention cannot be seen. `token_grids` [L]: (rows, columns) of each block's tokens,
    where not all have `grid`. `effective_rank`, `spread`, `similarity`
    [L+1]: see `mimlet.analyse.health`. `probe` [L+1]: top-1 in percent of a classifier on each layer. `leading`: kept
    leading blocks -> top-1 in percent after fine-tuning. Empty where it was not asked for. `notes`: what could not be
    measured and why.
    """

    label: str
    source: str
    size: int
    patch: int
    grid: tuple[int, int]
    depth: int
    heads: int
    dim: int
    parameters: int
    distance: list[list[float]] | None = None
    entropy: list[list[float]] | None = None
    effective_rank: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    probe: list[float] = field(default_factory=list)
    leading: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    token_grids: list[tuple[int, int]] = field(default_factory=list)

    @property
    def attending(self) -> list[int]:
        """The blocks whose attention was measured."""
        return [block for block, heads in enumerate(self.entropy or (), 1) if heads]

    @property
    def upper(self) -> list[int]:
        """Those of them in the upper third of blocks."""
        return [block for block in self.attending if block > self.depth - math.ceil(self.depth / 3)]

    @property
    def head_counts(self) -> str:
        """The number of heads; of the stages, where they differ."""
        counts = sorted({len(self.entropy[block - 1]) for block in self.attending}) if self.entropy else []
        return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(self.heads)

    def grid_of(self, block: int) -> tuple[int, int]:
        """(rows, columns) of a block's tokens."""
        return self.token_grids[block - 1] if self.token_grids else self.grid

    def uniform_entropy(self, block: int) -> float:
        """The entropy of uniform attention in a block, in nats."""
        return math.log(math.prod(self.grid_of(block)))

    def uniform_distance(self, block: int) -> float:
        """The distance of uniform attention in a block, in patches: of two of its tokens, drawn independently."""
        rows, columns = self.grid_of(block)
        offsets = product(range(1 - rows, rows), range(1 - columns, columns))
        total = sum((rows - abs(y)) * (columns - abs(x)) * math.hypot(y, x) for y, x in offsets)
        return total / (rows * columns) ** 2 * self.grid[0] / rows


@dataclass(frozen=True)
class Similarity:
    """CKA [L_a + 1][L_b + 1] between the layers of two models (`a <= b`, places in `Analysis.models`; equal: within
    one).
    """

    a: int
    b: int
    cka: list[list[float]]


@dataclass(frozen=True)
class Shot:
    """A picture beside `analysis.json`: file name, title, text alternative, caption."""

    file: str
    title: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Analysis:
    """An analysis of one or several models on the same images.

    `batch`: images per minibatch of CKA. `upstream`: as MAE-lite's code does it (see `mimlet.analyse`). `labels`: what
    `probe` and `leading` were judged on, in words.
    """

    data: list[str]
    images: int
    batch: int
    order: Order
    seed: int
    upstream: bool
    models: list[ModelFindings]
    similarities: list[Similarity] = field(default_factory=list)
    pictures: list[Shot] = field(default_factory=list)
    labels: str = ""

    def write(self, folder: Path) -> Path:
        """Writes `analysis.json` into a folder and returns its path."""
        path = folder / ANALYSIS_FILE
        write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def read_analysis(folder: Path) -> Analysis:
    """The analysis in a folder. `RunError` where there is none, or where its file is damaged."""
    path = folder / ANALYSIS_FILE
    if not path.is_file():
        raise RunError(f"{folder} holds no {ANALYSIS_FILE}; make one with: mimlet analyse MODEL --data IMAGES")
    try:
        analysis = TypeAdapter(Analysis).validate_python(parse_json(path.read_bytes()))
        problem = _problem(analysis)
    except ValueError as error:
        problem = what_is_wrong(error)
    if problem:
        raise RunError(f"{path} is damaged or of another version: {problem}; repeat the analysis")
    return analysis


def _problem(analysis: Analysis) -> str:
    """Which parts of an analysis do not fit each other, if any."""
    for model in analysis.models:
        sizes = (model.size, model.patch, *model.grid, model.depth, model.heads, model.dim)
        sides = [side for grid in (model.grid, *model.token_grids) for side in grid]
        if not all(0 < size < 2**31 for size in sizes) or not all(0 < side <= LARGEST_GRID for side in sides):
            return f"{model.label} has sizes that no encoder has"
        measured = [*(model.distance or ()), *(model.entropy or ()), model.effective_rank, model.spread]
        measured += [model.similarity, model.probe, [*model.leading.values()]]
        if any(abs(value) > LARGEST for values in measured for value in values):
            return f"{model.label} has numbers that nobody has measured"
        if "\0" in model.source:
            return f"{model.label} has a null byte in its source"
        by_layer = (model.effective_rank, model.spread, model.similarity, model.probe)
        by_block = (model.distance or (), model.entropy or (), model.token_grids)
        if any(len(found) not in (0, model.depth + 1) for found in by_layer) or any(
            len(found) not in (0, model.depth) for found in by_block
        ):
            return f"{model.label} has other layers than its {model.depth} blocks"
        if [len(heads) for heads in model.distance or ()] != [len(heads) for heads in model.entropy or ()]:
            return f"{model.label} has distances and entropies of other heads"
    for pair in analysis.similarities:
        if not 0 <= pair.a <= pair.b < len(analysis.models):
            return f"similarities are of models {pair.a} and {pair.b}, and there are {len(analysis.models)}"
        rows, columns = (analysis.models[place].depth + 1 for place in (pair.a, pair.b))
        if [len(row) for row in pair.cka] != [columns] * rows:
            return f"the similarity of models {pair.a} and {pair.b} is not {rows} x {columns}"
    names = [shot.file for shot in analysis.pictures]
    odd = [name for name in names if not re.fullmatch(r"[^/\\.][^/\\]*\.png", name) or not name.isprintable()]
    return f"a picture is called {odd[0]!r}" if odd else "" if analysis.models else "it has no models"
