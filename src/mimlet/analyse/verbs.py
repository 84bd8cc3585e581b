"""`mimlet analyse` and `mimlet diagnose`: models and images -> measurements, figures, advice."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mimlet.analyse.analysis import Measures, choose_images, measure, views_for
from mimlet.analyse.attention import UPSTREAM_PATCH
from mimlet.analyse.diagnose import DIAGNOSIS_FILE, Finding, Target, advice_text, findings_json
from mimlet.analyse.diagnose import diagnose as diagnose_measurements
from mimlet.analyse.layers import probe_by_layer
from mimlet.analyse.leading import leading_blocks
from mimlet.analyse.maps import Query, attention_picture, has_decoder, reconstruction_picture, slug
from mimlet.analyse.results import ANALYSIS_FILE, ANALYSIS_FOLDER, Analysis, Order, Shot, read_analysis
from mimlet.analyse.subject import Subject, open_subjects
from mimlet.api import loader_workers, run_page, task_config
from mimlet.atomic import write_atomic
from mimlet.config import SpeedSettings
from mimlet.data.source import Paths, Source, open_source, path_list
from mimlet.errors import ConfigError, UserError
from mimlet.report import write_analysis
from mimlet.run import read_run
from mimlet.tables import print_table, write_csv
from mimlet.train.distributed import make_fabric

Part = Literal["cka", "attention", "health", "maps", "probe"]
PARTS: tuple[Part, ...] = ("cka", "attention", "health", "maps", "probe")
Model = str | Path | nn.Module


def analyse(
    models: Model | Sequence[Model],
    *,
    data: Paths,
    out: str | Path | None = None,
    only: Sequence[Part] = PARTS,
    images: int = 1152,
    batch: int = 128,
    order: Order = "random",
    seed: int = 0,
    upstream: bool = False,
    shown: int = 0,
    block: int = 0,
    query: Query | None = None,
    mask_ratio: float = 0.75,
    labelled: Paths = (),
    eval: Paths = (),
    leading: Sequence[int] = (),
    recipe: str = "classify_tiny",
    overrides: Sequence[str] = (),
    heads: int = 0,
    workers: int = -1,
    command: str = "",
) -> Analysis:
    """Looks into one or several encoders over a folder of images, and writes numbers, figures and a page into `out`.

    `models`: run folders, checkpoint files, timm:NAME, transformers:NAME or modules (`heads`: of a file that does not
    tell). `out`: by default the folder `analysis` in the run, if one run is looked at; else `analysis`. `only`: of
    "cka", "attention" (distance and entropy), "health", "maps" (of attention, and reconstructions where there is a
    decoder), "probe" (of every layer, where `labelled` and `eval` images are given).

    At most `images` images, in minibatches of `batch` for CKA, a sample seeded by `seed` or in the `order` of files.
    `upstream` is as MAE-lite's released code: the order of files, pre-trained encoders end in a fresh norm, distances
    are also given in its unit. Maps show `shown` images (0: 6 of one model, 3 of each of several), attention of `block`
    (0: the last) and of the class token or of the patch `query` (row, column).

    `leading` numbers of blocks are kept and fine-tuned on `labelled` and `eval` with `recipe` and `overrides`
    (MAE-lite, Fig. 4).
    """
    given = [models] if isinstance(models, str | Path | nn.Module) else list(models)
    _check(only, labelled, eval, leading, overrides)
    folder = Path(out) if out else _default_folder(given)
    fabric = make_fabric(SpeedSettings(devices=1, workers=workers))
    subjects = open_subjects(given, heads, fabric.device)
    source = open_source(path_list(data), labelled=False)
    order = "folder" if upstream else order
    indices, size = choose_images(len(source), images, batch, order, seed)
    if upstream:
        for subject in subjects:
            subject.fresh_norm()
    pictures = (
        list(
            _pictures(subjects, source, indices[: shown or (6 if len(subjects) == 1 else 3)], block, query, mask_ratio)
        )
        if "maps" in only
        else []
    )
    loaders = loader_workers(workers, fabric)
    what = Measures(*(part in only for part in ("cka", "attention", "health")))
    found, similarities = measure(subjects, views_for(subjects, source, indices), size, what, workers=loaders)
    labels = ""
    if path_list(labelled):
        train = open_source(path_list(labelled), labelled=True)
        test = open_source(path_list(eval), labelled=True, classes=train.classes)
        labels = f"{train.describe()}; judged on {test.describe()}"
        if "probe" in only:
            curves = [
                probe_by_layer(subject, views_for([subject], train), views_for([subject], test), workers=loaders)
                for subject in subjects
            ]
            found = [replace(model, probe=curve) for model, curve in zip(found, curves, strict=True)]
    if leading:
        for number, subject in enumerate(subjects):
            config = task_config(recipe, subject.source, path_list(labelled), path_list(eval), overrides)
            top1 = leading_blocks(config, leading, folder / "leading" / slug(subject.label), command=command)
            found[number] = replace(found[number], leading=top1)
    analysis = Analysis(
        [source.describe()],
        len(indices),
        size,
        order,
        seed,
        upstream,
        found,
        similarities,
        [shot for shot, _ in pictures],
        labels,
    )
    for shot, png in pictures:
        write_atomic(folder / shot.file, png)
    _write_tables(analysis, folder)
    analysis.write(folder)
    print_table(
        f"{len(indices):,} of {source.describe()}. Upper third of blocks: attention distance (px) and entropy (nats); "
        "last layer: effective rank, similarity of tokens, CKA with the first model's",
        _summary(analysis),
    )
    _write_pages(analysis, folder, "Inside " + ", ".join(model.label for model in found), command)
    return analysis


def diagnose(
    model: str | Path,
    *,
    data: Paths = (),
    reference: str | Path | None = None,
    target: Paths = (),
    labelled: Paths = (),
    eval: Paths = (),
    images: int = 1152,
    heads: int = 0,
    out: str | Path | None = None,
    command: str = "",
) -> list[Finding]:
    """Says in plain words what measurements mean for an encoder, and what to try next; prints it and writes it as
    `diagnosis.json` and onto the page of the analysis.

    With `data` the encoder, and the `reference` it is to be like, are analysed first (see `analyse`; `labelled` and
    `eval` add the probe of every layer), else the analysis in its run folder (or in `out`) is read, if there is one.
    The metrics of a run are read too. `target`: labelled images that it is to be fine-tuned on.
    """
    folder = Path(out) if out else _default_folder([model])
    found: Target | None = None
    if path_list(target):
        source = open_source(path_list(target), labelled=True)
        found = Target(len(source), len(source.classes))
    analysis: Analysis | None = None
    if path_list(data):
        both = [model, *([reference] if reference else [])]
        more: dict[str, Any] = {"labelled": labelled, "eval": eval, "images": images, "heads": heads}
        analysis = analyse(both, data=data, out=folder, command=command, **more)
    elif (folder / ANALYSIS_FILE).is_file():
        analysis = read_analysis(folder)
    run = read_run(model) if (Path(model) / "config.json").is_file() else None
    judged = str(model).rstrip("/") if analysis else ""
    other = str(reference).rstrip("/") if reference else ""
    findings = diagnose_measurements(analysis, judged, other, run, found)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / DIAGNOSIS_FILE, findings_json(findings))
    sys.stdout.write(f"\n{advice_text(findings)}\n")
    if analysis:
        _write_pages(analysis, folder, f"Diagnosis of {analysis.models[0].label}", command, findings)
    return findings


def _check(
    only: Sequence[Part], labelled: Paths, eval: Paths, leading: Sequence[int], overrides: Sequence[str]
) -> None:
    unknown = [part for part in only if part not in PARTS]
    if unknown or not only:
        raise ConfigError(f"only {', '.join(unknown) or 'nothing'}: expected some of {', '.join(PARTS)}")
    if bool(path_list(labelled)) != bool(path_list(eval)):
        raise ConfigError("curves over layers need labelled images twice: labelled to learn from, eval to judge on")
    if leading and not path_list(labelled):
        raise ConfigError("leading blocks are fine-tuned and judged: give labelled and eval images")
    if overrides and not leading:
        raise ConfigError(f"{overrides[0]} would change nothing: settings are for the fine-tuning of leading blocks")


def _default_folder(models: Sequence[Model]) -> Path:
    alone = len(models) == 1 and not isinstance(models[0], nn.Module) and (Path(models[0]) / "config.json").is_file()
    return Path(str(models[0])) / ANALYSIS_FOLDER if alone else Path(ANALYSIS_FOLDER)


def _write_pages(analysis: Analysis, folder: Path, title: str, command: str, findings: Sequence[Finding] = ()) -> None:
    """The page about an analysis, and anew that of the run it lies in."""
    page = write_analysis(analysis, folder, folder / "report.html", title=title, command=command, findings=findings)
    sys.stdout.write(f"{page}\n")
    whole = folder.parent / "report.html"
    if folder.name == ANALYSIS_FOLDER and whole.is_file() and (folder.parent / "config.json").is_file():
        sys.stdout.write(f"{run_page([folder.parent], whole)}\n")


def _pictures(
    subjects: Sequence[Subject],
    source: Source,
    indices: NDArray[np.int64],
    block: int,
    query: Query | None,
    mask_ratio: float,
) -> Iterator[tuple[Shot, bytes]]:
    """Attention maps and reconstructions, where a model has them."""
    shown = views_for(subjects, source, indices)
    batch = shown.collate([shown[0, i] for i in range(len(shown))])
    if isinstance(batch, UserError):
        raise batch
    for subject in subjects:
        images = batch.views[subject.view]
        if subject.sees_attention:
            yield attention_picture(subject, images, block=block, query=query)
    for subject in subjects:
        if has_decoder(subject):
            yield reconstruction_picture(subject, batch.views[subject.view], mask_ratio=mask_ratio)


def _write_tables(analysis: Analysis, folder: Path) -> None:
    """Every number per head and per layer, for those who draw their own figures."""
    heads: list[dict[str, object]] = []
    layers: list[dict[str, object]] = []
    for model in analysis.models:
        for block, (distances, entropies) in enumerate(zip(model.distance or (), model.entropy or (), strict=True), 1):
            for head, (distance, entropy) in enumerate(zip(distances, entropies, strict=True), 1):
                row = {"model": model.label, "block": block, "head": head, "distance_patches": distance}
                row |= {"distance_px": distance * model.patch, "entropy": entropy}
                heads.append(row | ({"distance_upstream": distance * UPSTREAM_PATCH} if analysis.upstream else {}))
        curves = {"effective_rank": model.effective_rank, "spread": model.spread, "similarity": model.similarity}
        curves["probe_top1"] = model.probe
        for layer in range(model.depth + 1):
            values = {name: curve[layer] for name, curve in curves.items() if curve}
            layers += [{"model": model.label, "layer": layer, **values}] if values else []
    for name, rows in (("heads.csv", heads), ("layers.csv", layers)):
        if rows:
            write_csv(folder / name, rows)


def _summary(analysis: Analysis) -> list[dict[str, object]]:
    """A row per model: attention distance and entropy in its upper third of blocks, effective rank and similarity of
    tokens in its last layer, CKA of that with the first model's, the best layer for a classifier.
    """
    rows: list[dict[str, object]] = []
    for number, model in enumerate(analysis.models):
        upper = [block for block in model.attending if block > model.depth - max(1, model.depth // 3)]
        row: dict[str, object] = {"model": model.label, "heads": f"{model.depth} x {model.head_counts}"}
        if model.distance and model.entropy and upper:
            row["px"] = model.patch * fmean(fmean(model.distance[block - 1]) for block in upper)
            row["nats"] = fmean(fmean(model.entropy[block - 1]) for block in upper)
        if model.effective_rank:
            row["rank"] = model.effective_rank[-1]
            row["alike"] = model.similarity[-1]
        found = [item for item in analysis.similarities if (item.a, item.b) == (0, number) and number]
        if found:
            row["CKA"] = found[0].cka[-1][-1]
        if model.probe:
            row["probe"] = f"{max(model.probe):.2f} at {model.probe.index(max(model.probe))}"
        rows.append(row)
    return rows
