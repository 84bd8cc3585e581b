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
    over patches, in patches and in nats; None where attention cannot be seen. `effective_rank`, `spread`, `similarity`
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

    @property
    def uniform_distance(self) -> float:
        """The distance of uniform attention, in patches: of two patches of the grid, drawn independently."""
        rows, columns = self.grid
        offsets = product(range(1 - rows, rows), range(1 - columns, columns))
        total = sum((rows - abs(y)) * (columns - abs(x)) * math.hypot(y, x) for y, x in offsets)
        return total / (rows * columns) ** 2


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
