"""Run folders and analyses as trainings leave them, made up in no time."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from mimlet.analyse.results import Analysis, ModelFindings, Shot, Similarity
from mimlet.config import load_config
from mimlet.report import image_grid


def make_run(
    folder: Path, method: str = "mae", lines: int = 30, evals: int = 0, spoil: int = 0, command: bool = True
) -> Path:
    """A run folder with losses that fall as e^-t."""
    folder.mkdir(parents=True)
    settings = {
        "title": f"Recipe of {folder.name}",
        "method": {"name": method},
        "encoder": {"name": "vit_micro", "image_size": 32},
        "teacher": {"path": "teacher"} if method == "dmae" else {},
        "schedule": {"batch": 64, "steps": max(1, lines * 10)},
    }
    config = load_config(settings).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config))
    environment = {
        "command": ["mimlet", "pretrain", "--data", "my photos"],
        "packages": {"torch": "2.11.0"},
        "cuda": None,
    }
    (folder / "environment.json").write_text(json.dumps(environment if command else {}))
    found = []
    for index in range(1, lines + 1):
        common = {"step": 10 * index, "epoch": index / 10, "time": index * 1.5}
        loss = math.nan if index <= spoil else 0.5 + 0.4321 * math.exp(-index / 10)
        losses = {"reconstruction": loss, "total": loss}
        if method == "dmae":
            losses |= {"attention": 9 * math.exp(-index / 5), "total": loss + 9 * math.exp(-index / 5)}
        speed = {"lr": 1e-3 / index, "images_per_second": 1234.0, "data_wait": 0.125, "memory_mb": 345.0}
        found.append({**common, "kind": "train", **losses, **speed})
        if evals and index % (lines // evals) == 0:
            found.append({**common, "kind": "eval", "top1": 60 + index / 10, "top5": 90.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder


def match_heads(run: Path, label: str = "", heads: int = 4) -> Path:
    """Adds what head matching is watched by: shares that go from equal to those of the first head alone."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        rest = (1 - index / (len(lines) - 1)) / heads
        shares = [1 - rest * (heads - 1), *[rest] * (heads - 1)]
        line |= {f"{label}head_share_vv_{number:02d}": share for number, share in enumerate(shares, 1)}
        line[f"{label}head_entropy_vv"] = -sum(share * math.log(share) for share in shares if share)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def grey_png() -> bytes:
    """A picture of two grey images."""
    images = torch.zeros(2, 3, 32, 32)
    return image_grid({"original": images, "visible": images}, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def found_in(
    label: str, depth: int = 3, grid: int = 4, patch: int = 8, source: str = "", **more: object
) -> ModelFindings:
    """A model of two heads: distance 1 and 2 patches in block 1, one more in each further block; entropy 1 and 1.5."""
    values: dict[str, object] = {
        "distance": [[block + 1.0, block + 2.0] for block in range(depth)],
        "entropy": [[1.0, 1.5]] * depth,
        "effective_rank": [4.0 + layer for layer in range(depth + 1)],
        "spread": [0.5] * (depth + 1),
        "similarity": [0.1 * layer for layer in range(depth + 1)],
        **more,
    }
    size = grid * patch
    return ModelFindings(label, source or label, size, patch, (grid, grid), depth, 2, 24, 1234, **values)  # type: ignore[arg-type]


def looked_into(*models: ModelFindings, **more: object) -> Analysis:
    """An analysis in which CKA is 1 between layers of one number, and falls by 0.1 per layer between."""
    layers = [np.arange(model.depth + 1) for model in models]
    similarities = [
        Similarity(a, b, (1 - 0.1 * np.abs(np.subtract.outer(layers[a], layers[b]))).tolist())
        for a in range(len(models))
        for b in range(a, len(models))
    ]
    values: dict[str, object] = {"images": 64, "batch": 32, "order": "random", "seed": 0, "upstream": False, **more}
    return Analysis(["64 images in photos"], models=list(models), similarities=similarities, **values)  # type: ignore[arg-type]


def look_into(run: Path, *others: ModelFindings) -> None:
    """Leaves an analysis with a picture in a run's folder."""
    shot = Shot("attention.png", "Attention", "Maps of two heads", "Brighter: more attention.")
    model = found_in(run.name, source=str(run), probe=[20.0, 40.0, 60.0, 50.0], leading={0: 40.0, 2: 55.0, 3: 57.0})
    looked_into(model, *others, pictures=[shot], labels="8 images; judged on 4 images").write(run / "analysis")
    (run / "analysis" / shot.file).write_bytes(grey_png())


def judge_robustness(run: Path) -> None:
    """Leaves what `mimlet evaluate --robustness` finds in a run's folder."""
    sets = [
        {"name": "sketches", "images": 50, "classes": 10, "top1": 30.0, "top5": 60.0, "clean_top1": 70.0},
        {"name": "elsewhere", "images": 50, "classes": 10, "top1": 50.5, "top5": 60.0, "clean_top1": None},
    ]
    corruptions = {"gaussian_noise": [60, 50, 40, 30, 20], "fog": [65.0, 60.0, 55.0, 50.0, 45.0]}
    found = {"clean": {"images": 100, "top1": 72.25}, "sets": sets, "corruptions": corruptions}
    (run / "robustness.json").write_text(json.dumps(found | {"mean_top1": 47.5, "mce": None}))


def full_run(folder: Path, method: str = "mae", *others: ModelFindings) -> Path:
    """A run with everything that a page can show."""
    run = match_heads(make_run(folder, method, evals=5))
    look_into(run, *others)
    judge_robustness(run)
    return run
