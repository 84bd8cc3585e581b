"""Sections of a page about what was looked into: analyses of models, robustness of classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mimlet.analyse.results import Analysis, ModelFindings, Similarity
from mimlet.errors import RunError
from mimlet.report.axes import number
from mimlet.report.diagrams import Bars, Boxes, bars_svg, boxes_svg, heatmap_svg
from mimlet.report.figures import Curve, Picture, curves_svg
from mimlet.report.page import Chart, Label, Section, Sheet
from mimlet.run import read_picture
from mimlet.tasks.shifts import ROBUSTNESS_FILE
from mimlet.untrusted import parse_json

BOXES = (
    "Boxes span the quartiles over heads, bars are medians; whiskers reach to the last head within 1.5 times the box, "
    "dots are heads beyond. Models stand in the order of the legend."
)
CKA = (
    "1: the same up to rotation and scale. Layer 0 is the embedding, layer i what block i hands on. "
    "Unbiased, over minibatches of {} images."
)
HEALTH = (
    "Effective rank: how many directions the images' mean features fill. Spread: near 1 they point everywhere, at 0 "
    "all images look alike. Token similarity: mean cosine between patches of an image; near 1 they have become one."
)


@dataclass(frozen=True)
class Looked:
    """An analysis, the folder of its pictures, and what to call it on a page with several."""

    label: str
    folder: Path
    analysis: Analysis

    def pictures(self) -> Iterator[Picture]:
        """Its pictures that are there."""
        prefix = f"{self.label}: " if self.label else ""
        for shot in self.analysis.pictures:
            if (self.folder / shot.file).is_file():
                yield Picture(prefix + shot.title, read_picture(self.folder / shot.file), shot.alt, shot.caption)

    def notes(self) -> Iterator[str]:
        """What a reader has to know about its models and pictures."""
        for model in self.analysis.models:
            yield from (f"{model.label}: {note}" for note in model.notes)
        for shot in self.analysis.pictures:
            if not (self.folder / shot.file).is_file():
                yield f"The picture {self.folder / shot.file} is missing."


def joined(analyses: Sequence[Looked]) -> list[Looked]:
    """Analyses on the same images, made in the same way, as one; each model and pair once. Without their pictures."""
    groups: dict[str, list[Looked]] = {}
    for looked in analyses:
        way = repr(replace(looked.analysis, models=[], similarities=[], pictures=[]))
        groups.setdefault(way, []).append(looked)
    return [_join(group) for group in groups.values()]


def _join(group: Sequence[Looked]) -> Looked:
    """Models that come first in their analysis come first, so that what all are held against is last."""
    ranked = [(rank, model) for looked in group for rank, model in enumerate(looked.analysis.models)]
    models = {_name(model): model for _, model in sorted(ranked, key=lambda entry: entry[0])}
    place = list(models).index
    similarities: dict[tuple[int, int], Similarity] = {}
    for looked in group:
        own = [place(_name(model)) for model in looked.analysis.models]
        for found in looked.analysis.similarities:
            a, b, cka = own[found.a], own[found.b], found.cka
            if a > b:
                a, b, cka = b, a, [list(column) for column in zip(*cka, strict=True)]
            similarities[a, b] = Similarity(a, b, cka)
    analysis = replace(
        group[0].analysis, models=list(models.values()), similarities=list(similarities.values()), pictures=[]
    )
    return Looked(", ".join(looked.label for looked in group), group[0].folder, analysis)


def _name(model: ModelFindings) -> tuple[str, str]:
    return model.label, model.source


def styles_of(models: Sequence[ModelFindings], runs: Mapping[Path, int]) -> list[Label]:
    """(style, label) of each model: that of the run it is, else one that no run has."""
    free = iter(range(len(runs), len(runs) + len(models)))
    known = [runs.get(Path(model.source).resolve()) for model in models]
    return [(next(free) if style is None else style, model.label) for style, model in zip(known, models, strict=True)]


def analysis_sections(analysis: Analysis, labels: Sequence[Label], suffix: str = "") -> list[Section]:
    """What an analysis found, as figures. `labels`: (style, name) of its models; `suffix`: ends titles of sections."""
    legend = labels if len(labels) > 1 else ()
    similar = Section(
        f"Similarity of layers (CKA){suffix}",
        [_similarity(found, labels) for found in analysis.similarities],
        note=CKA.format(analysis.batch),
        narrow=True,
    )
    attention = [*_distances(analysis.models, labels), *_entropies(analysis.models, labels)]
    health = [
        chart
        for title, read in _HEALTH.items()
        for chart in _layers(title, [read(model) for model in analysis.models], labels)
    ]
    learnt = f"Learnt from {analysis.labels}." if analysis.labels else ""
    return [
        similar,
        Section(f"Attention{suffix}", attention, legend, BOXES),
        Section(f"Features by layer{suffix}", health, legend, HEALTH),
        Section(f"Accuracy by layer{suffix}", _accuracies(analysis, labels), legend, learnt),
    ]


_HEALTH: dict[str, Callable[[ModelFindings], Sequence[float]]] = {
    "effective rank": lambda model: model.effective_rank,
    "spread of features over images": lambda model: model.spread,
    "token similarity": lambda model: model.similarity,
}


def _similarity(found: Similarity, labels: Sequence[Label]) -> Chart:
    a, b = labels[found.a][1], labels[found.b][1]
    title = f"within {a}" if found.a == found.b else f"{a} and {b}"
    rows, columns = ([str(layer) for layer in range(len(values))] for values in (found.cka, found.cka[0]))
    svg = heatmap_svg(
        found.cka, rows=rows, columns=columns, title=f"CKA {title}", x_label=f"{b}, layer", y_label=f"{a}, layer"
    )
    return Chart(title, svg)


def _distances(models: Sequence[ModelFindings], labels: Sequence[Label]) -> Iterator[Chart]:
    """In patches where all blocks of all models have one grid, else in pixels."""
    seen = [(model, label) for model, label in zip(models, labels, strict=True) if model.distance]
    same = len(_grids(model for model, _ in seen)) == 1
    title = f"attention distance, in {'patches' if same else 'pixels (grids differ)'}"
    groups: list[Boxes] = []
    uniform: dict[str, float] = {}
    for model, (style, name) in seen:
        scale = 1 if same else model.patch
        groups.append(Boxes(name, [[scale * value for value in heads] for heads in model.distance or ()], style))
        uniform |= {_uniform(model, block, same): scale * model.uniform_distance(block) for block in model.attending}
    if groups:
        yield Chart(title, boxes_svg(groups, title=title, references=uniform))


def _entropies(models: Sequence[ModelFindings], labels: Sequence[Label]) -> Iterator[Chart]:
    seen = [(model, label) for model, label in zip(models, labels, strict=True) if model.entropy]
    same = len(_grids(model for model, _ in seen)) == 1
    title = "attention entropy, in nats"
    groups = [Boxes(name, model.entropy or [], style) for model, (style, name) in seen]
    uniform = {
        _uniform(model, block, same): model.uniform_entropy(block) for model, _ in seen for block in model.attending
    }
    if groups:
        yield Chart(title, boxes_svg(groups, title=title, references=uniform))


def _grids(models: Iterable[ModelFindings]) -> set[tuple[int, int]]:
    """Of all blocks that attend, and of their patches, which distances are counted in."""
    return {grid for model in models for grid in (model.grid, *map(model.grid_of, model.attending))}


def _uniform(model: ModelFindings, block: int, same: bool) -> str:
    rows, columns = model.grid_of(block)
    return "uniform attention" if same else f"uniform, {rows} x {columns} tokens"


def _layers(title: str, values: Sequence[Sequence[float]], labels: Sequence[Label], unit: str = "") -> Iterator[Chart]:
    """One quantity by layer, of the models that have it."""
    curves = [
        Curve(name, range(len(found)), found, style)
        for found, (style, name) in zip(values, labels, strict=True)
        if any(map(math.isfinite, found))
    ]
    if curves:
        yield Chart(title, curves_svg(curves, title=title, x_label="layer", unit=unit, every=True))


def _accuracies(analysis: Analysis, labels: Sequence[Label]) -> list[Chart]:
    charts = list(_layers("top-1 of a probe", [model.probe for model in analysis.models], labels, "%"))
    curves = [
        Curve(name, sorted(model.leading), [model.leading[kept] for kept in sorted(model.leading)], style)
        for model, (style, name) in zip(analysis.models, labels, strict=True)
        if model.leading
    ]
    gains = [replace(curve, y=[y - curve.y[0] for y in curve.y]) for curve in curves if curve.x[0] == 0]
    for title, unit, found in (
        ("top-1 fine-tuned with leading blocks kept", "%", curves),
        ("gain over no block kept, in points", "", gains),
    ):
        if found:
            charts.append(Chart(title, curves_svg(found, title=title, x_label="blocks", unit=unit, every=True)))
    return charts


def described(analysis: Analysis) -> str:
    """What an analysis looked at, in words."""
    chosen = f"chosen with seed {analysis.seed}" if analysis.order == "random" else "the first in the order of files"
    upstream = ", as MAE-lite's code does it" if analysis.upstream else ""
    return f"{analysis.images:,} images, {chosen}{upstream}, of {', '.join(analysis.data)}"


def model_sheet(analysis: Analysis, labels: Sequence[Label], suffix: str = "") -> Sheet:
    """The models of an analysis."""
    rows: dict[str, Callable[[ModelFindings], str]] = {
        "source": lambda model: model.source,
        "input": lambda model: f"{model.size} px in patches of {model.patch} ({model.grid[0]} x {model.grid[1]})",
        "blocks": lambda model: str(model.depth),
        "heads": lambda model: model.head_counts,
        "width": lambda model: str(model.dim),
        "parameters": lambda model: f"{model.parameters:,}",
    }
    table = [(name, [cell(model) for model in analysis.models]) for name, cell in rows.items()]
    return Sheet(f"Models looked into{suffix}", table, labels)


@dataclass(frozen=True)
class Held:
    """What `robustness.json` of a run says, top-1 in percent. `sets`: accuracy by set; `clean`: that of the same
    classes, where it is known. `corruptions`: by name, at severity 1 and on.
    """

    sets: Mapping[str, float]
    clean: Mapping[str, float]
    corruptions: Mapping[str, Sequence[float]]
    mean: float | None
    mce: float | None

    @classmethod
    def read(cls, folder: Path) -> Held | None:
        """What a run's folder holds, if it was judged. `RunError` where the file is damaged."""
        path = folder / ROBUSTNESS_FILE
        if not path.is_file():
            return None
        try:
            found = parse_json(path.read_bytes())
            own = {"clean": float(found["clean"]["top1"])} if found["clean"] else {}
            top1 = {str(entry["name"]): float(entry["top1"]) for entry in found["sets"]}
            clean = {str(e["name"]): float(e["clean_top1"]) for e in found["sets"] if e["clean_top1"] is not None}
            corrupted = {}
            if found["mean_top1"] is not None:
                corrupted = {"common corruptions": float(found["mean_top1"])}
                clean |= {name: own["clean"] for name in corrupted if own}
            mean, mce = (None if found[name] is None else float(found[name]) for name in ("mean_top1", "mce"))
            severities = {str(name): [float(top1) for top1 in each] for name, each in found["corruptions"].items()}
            judged = [(own | top1 | corrupted).values(), clean.values(), *severities.values()]
            if not all(abs(value) <= 100 for values in judged for value in values) or not abs(mce or 0) < 1e6:
                raise ValueError("accuracies beyond 100 percent")
            lengths = {len(each) for each in severities.values()}
            if len(lengths) > 1 or 0 in lengths:
                raise ValueError("corruptions of unequally many severities")
            return cls(own | top1 | corrupted, clean, severities, mean, mce)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise RunError(f"{path} is damaged or of another version: {error}; repeat the evaluation") from None


def robustness_section(found: Sequence[tuple[Label, Held]], legend: Sequence[Label]) -> Section:
    """How runs hold up on other images: bars by set, a heat map of corruptions per run."""
    charts = []
    bars = [Bars(label, robust.sets, robust.clean, style) for (style, label), robust in found if robust.sets]
    if bars:
        title = "top-1 by set of images"
        charts.append(Chart(title, bars_svg(bars, title=title, marker="clean", unit="%")))
    for (_, label), robust in found:
        if robust.corruptions:
            title = f"top-1 by corruption and severity{f', {label}' if len(found) > 1 else ''}"
            names = list(robust.corruptions)[::-1]
            values = [robust.corruptions[name] for name in names]
            svg = heatmap_svg(
                values,
                rows=[name.replace("_", " ") for name in names],
                columns=[str(severity) for severity in range(1, 1 + len(values[0]))],
                title=title,
                x_label="severity",
                y_label="",
                high=100,
                unit="%",
            )
            charts.append(Chart(title, svg))
    note = "Strokes across bars: accuracy on clean images of the same classes." if any(b.markers for b in bars) else ""
    return Section("Robustness", charts, legend, note)


def robustness_facts(robust: Held | None) -> dict[str, str]:
    """Cells of the table of runs."""
    mean, mce = (robust.mean, robust.mce) if robust else (None, None)
    return {
        "top-1 under corruptions, mean": "" if mean is None else f"{number(mean)}%",
        "mean corruption error (mCE)": "" if mce is None else f"{number(mce)}%",
    }
