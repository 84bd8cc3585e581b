"""The main job in three minutes: a teacher, two students made from the same unlabelled images, and what a few labels
make of each.

Nothing here is special: the demo writes small images into a folder and calls what `mimlet pretrain` and `mimlet
finetune` call.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mimlet.config import load_config, merge
from mimlet.data.decode import UnreadableImage, decode
from mimlet.data.pixels import as_pillow
from mimlet.data.seeding import key
from mimlet.data.source import open_source
from mimlet.errors import DataError, RunError

SIZE = 32
MOST_IMAGES = 3000
LABELS = 5
"""Labelled images per class."""
TEST_SHARE = 0.3
STEPS = {"teacher": 300, "student": 450, "finetune": 200}
PATCH = 4


def demo(*, data: str | Path | None = None, out: str | Path | None = None, seed: int = 0, quick: bool = False) -> Path:
    """Trains a small teacher by MAE, a smaller student by MAE and by D²-MAE from that teacher, fine-tunes each and a
    twin from scratch on few labels, and writes a page with the results, reconstructions and the exported encoder.
    Returns the page.

    `data`: a folder of images (or anything `open_source` reads); without it, the scanned digits that come with
    scikit-learn, enlarged to 32 px. At most `MOST_IMAGES` are used, reduced to 32 px. Images without class folders
    are pre-trained on but not classified. `quick`: a few steps of everything, to see that it runs.
    """
    from mimlet.api import run_pictures, train
    from mimlet.export.timm import snippet
    from mimlet.report import Picture, write_report

    began = perf_counter()
    out = Path(out) if out else next_free(Path("runs/demo"))
    images = out / "images"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is there already and not an empty folder; give another --out")
    classes, count = prepare_images(data, images, seed)
    say(f"{count:,} images of {SIZE} px in {images}" + (f", {classes} classes" if classes else ", no classes"))

    folders = [path for path in (images / "train").iterdir() if path.is_dir()]
    labels = sum(min(LABELS, len(list(path.iterdir()))) for path in folders)

    def run(name: str, title: str, kind: str, settings: Mapping[str, Any]) -> dict[str, float]:
        say(f"\n{name}: {title}")
        values = base_settings(images, seed, flip=data is not None)
        steps = 4 if quick else STEPS[kind]
        batch = labels if kind == "finetune" else min(128, count)
        merge(values, {"title": title, "schedule": {"steps": steps, "warmup": 0.1, "batch": batch, "eval_epochs": 0}})
        merge(values, {"run": {"out": str(out / name), "log_steps": max(1, steps // 10)}})
        merge(values, settings)
        result = train(load_config(values)).fit
        if name == "teacher":
            say(f"first encoder exported after {perf_counter() - began:.0f} s: {out / name / 'encoder.safetensors'}")
        return result.evaluation

    pixels = {"decoder": {"depth": 1, "dim": 48, "heads": 3}}
    student: dict[str, Any] = {"name": "vit_nano"}
    run(
        "teacher",
        "MAE, teacher: 96 wide, 6 blocks",
        "teacher",
        {"encoder": {"name": "vit_micro"}, "method": {"name": "mae", **pixels}},
    )
    run("mae", "MAE, student: 64 wide, 4 blocks", "student", {"encoder": student, "method": {"name": "mae", **pixels}})
    d2mae = {"name": "dmae", "decode_layer": 3, "extra_block": True, **pixels}
    run(
        "d2mae",
        "D²-MAE, student taught by the teacher",
        "student",
        {"encoder": student, "method": d2mae, "teacher": {"path": str(out / "teacher")}},
    )

    table: list[dict[str, str | float]] = []
    names = ["teacher", "mae", "d2mae"]
    if classes:
        for name, how, encoder in (
            ("scratch", "student, no pre-training", None),
            ("mae", "student, MAE", "mae"),
            ("d2mae", "student, D²-MAE", "d2mae"),
            ("teacher", "teacher, MAE", "teacher"),
        ):
            shape = {
                "name": "vit_micro" if name == "teacher" else "vit_nano",
                **({"weights": str(out / encoder)} if encoder else {}),
            }
            folder = f"{name}_{labels}_labels"
            method = {"name": "classify"}
            optim = {"lr": 3e-3, "betas": [0.9, 0.999], "decay_tokens": False, "layer_decay": 0.75 if encoder else 1.0}
            few = {"subset": str(LABELS), "eval": [str(images / "test")]}
            settings = {"encoder": shape, "method": method, "optim": optim, "data": few}
            judged = run(folder, f"{how}, {labels} labels", "finetune", settings)
            table.append({"model": how, "labels": labels, "top-1 (%)": judged["top1"]})
            names.append(folder)
        for row in table:
            say(f"{row['model']:28} {row['top-1 (%)']:5.1f} % of {images / 'test'}")
    pictures: Sequence[Picture] = [
        p for name in ("teacher", "mae", "d2mae") for p in run_pictures(out / name, f"{name}: ")
    ]
    margin = "" if data else "On these digits, pre-training added 14, 22 and 28 points with seeds 1, 2 and 0 (MAE)."
    page = write_report(
        [out / name for name in names],
        out / "report.html",
        title="mimlet demo: what pre-training on unlabelled images is worth",
        table=table or None,
        pictures=pictures,
        notes=[f"One seed ({seed}); another draw of labels moves each number by several points. {margin}".strip()],
        snippet=snippet(out / "d2mae"),
    )
    say(f"\n{perf_counter() - began:.0f} s in all. The page: {page}")
    return page


def next_free(folder: Path) -> Path:
    """The folder itself, or with -2, -3, ... appended, whichever is not there yet."""
    names = (folder.with_name(f"{folder.name}-{i}") if i > 1 else folder for i in itertools.count(1))
    return next(path for path in names if not path.exists())


def base_settings(images: Path, seed: int, flip: bool) -> dict[str, Any]:
    """What all runs of the demo share."""
    return {
        "seed": seed,
        "encoder": {"image_size": SIZE, "patch": PATCH},
        "data": {
            "path": [str(images / "train")],
            "augment": {"crop_scale": [0.5, 1.0], "flip": 0.5 if flip else 0.0, "eval_crop": 1.0},
        },
        "optim": {"lr": 2e-3, "lr_batch": 0},
        "run": {"tensorboard": False},
    }


def prepare_images(data: str | Path | None, folder: Path, seed: int) -> tuple[int, int]:
    """Writes small images into `folder`/train and, where there are classes, `folder`/test; returns (classes, training
    images).
    """
    if data is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        scans = [Image.fromarray((scan * (255 / 16)).astype(np.uint8)) for scan in digits.images]
        labelled = [
            (scan.resize((SIZE, SIZE), Image.Resampling.BICUBIC), str(target))
            for scan, target in zip(scans, digits.target, strict=True)
        ]
    else:
        labelled = list(_reduced(data, seed))
    order = np.random.default_rng(key("demo", seed)).permutation(len(labelled))
    held = {i for i in order[: round(TEST_SHARE * len(order))] if labelled[i][1]}
    for i, (image, name) in enumerate(labelled):
        place = folder / ("test" if i in held else "train") / name
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i:05d}.png")
    return len({name for _, name in labelled if name}), len(labelled) - len(held)


def _reduced(data: str | Path, seed: int) -> list[tuple[Image.Image, str]]:
    source = open_source([str(data)])
    chosen = np.random.default_rng(key("demo", seed)).permutation(len(source))[:MOST_IMAGES]
    found = []
    for i in sorted(chosen.tolist()):
        try:
            image = as_pillow(decode(source.read(i)))
        except (UnreadableImage, OSError):
            continue
        label = source.label(i)
        found.append(
            (ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC), source.classes[label] if label >= 0 else "")
        )
    names = {name for _, name in found}
    if len(found) < 16:
        raise DataError(f"{data} holds {len(found)} readable images; the demo needs at least 16")
    return found if len(names - {""}) > 1 else [(image, "") for image, _ in found]


def say(text: str) -> None:
    """To the terminal, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
