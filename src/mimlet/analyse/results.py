"""What an analysis found, as it is stored in `analysis.json`. Reading it needs no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from mimlet.atomic import write_atomic
from mimlet.errors import RunError

ANALYSIS_FILE = "analysis.json"
ANALYSIS_FOLDER = "analysis"
"""Where a run keeps the analysis of its encoder."""

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
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        models = [
            ModelFindings(
                **{
                    **model,
                    "grid": tuple(model["grid"]),
                    "token_grids": [tuple(grid) for grid in model.get("token_grids", ())],
                    "leading": {int(kept): top1 for kept, top1 in model["leading"].items()},
                }
            )
            for model in values.pop("models")
        ]
        similarities = [Similarity(**item) for item in values.pop("similarities")]
        pictures = [Shot(**item) for item in values.pop("pictures")]
        return Analysis(models=models, similarities=similarities, pictures=pictures, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged or of another version: {error}; repeat the analysis") from None
