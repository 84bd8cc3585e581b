"""The command line: verbs -> functions of `mimlet.api`, nothing else.

Nothing here imports torch before every cheap check has passed, so that help, a misspelt name or a missing folder is
answered at once. What a user can cause is answered in at most five lines with exit code 2.
"""

from __future__ import annotations

import shlex
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mimlet.config import (
    OPTIONS,
    Config,
    check_inputs,
    load_config,
    missing_path,
    nest,
    read_recipe,
    recipe_header,
    recipe_paths,
    set_length,
    smoke,
    sweep_points,
)
from mimlet.config import merge as merge_settings
from mimlet.errors import ConfigError, DataError, RunError, TrainingStopped, TryAgain, UserError
from mimlet.methods.settings import METHODS
from mimlet.run import LOCK
from mimlet.tasks.shifts import parse_shifts
from mimlet.untrusted import printable

ERROR_LINES, ERROR_WIDTH = 5, 1000
DEFAULT_RECIPES = {"pretrain": "mae_tiny", "finetune": "classify_tiny"}

app = typer.Typer(
    help="Turn a folder of images, and maybe a big teacher, into a small strong vision transformer.",
    epilog="Start with: mimlet demo. Every recipe: mimlet recipes.",
    add_completion=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Any setting, e.g. optim.clip=1.0")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="Images: a folder, a pack, .tar, .zip, .parquet, list file or torchvision:NAME:ROOT. Can be repeated.",
    ),
]
Eval = Annotated[list[str] | None, typer.Option(metavar="PATH", help="Labelled images to judge on. Can be repeated.")]
Labelled = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="Labelled images by which the encoder is judged in training: on --eval, or on a fifth of them. "
        "Can be repeated.",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="One of `mimlet recipes`, or a file. "
        f"Default: {DEFAULT_RECIPES['pretrain']} for pretrain, {DEFAULT_RECIPES['finetune']} for finetune.",
    ),
]
TeacherPath = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="PATH",
        help="Frozen teacher: run folder, checkpoint file, a model's folder as timm or transformers save it, timm:NAME "
        "or transformers:NAME.",
    ),
]
TeacherHeads = Annotated[
    int | None, typer.Option(metavar="N", help="The teacher's head count, where its file does not tell.")
]
EncoderPath = Annotated[
    str | None,
    typer.Option("--encoder", metavar="PATH", help="Weights to start from: run folder, file or timm:NAME."),
]
KeepBlocks = Annotated[int | None, typer.Option(metavar="K", help="Use only the first K blocks of --encoder.")]
Out = Annotated[str | None, typer.Option(metavar="RUN", help="Run folder. Default: runs/ and the recipe's name.")]
Epochs = Annotated[float | None, typer.Option(metavar="N", help="Length; a shorter training gets a shorter warm-up.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Length in optimiser steps, instead of epochs.")]
Batch = Annotated[int | None, typer.Option(metavar="N", help="Images per optimiser step, over all devices.")]
LR = Annotated[
    float | None,
    typer.Option("--lr", metavar="X", help="Peak rate: X * batch / optim.lr_batch, or X if lr_batch is 0."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Another seed is another run.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Loader processes per device.")]
Devices = Annotated[int | None, typer.Option(metavar="N", help="Devices on this machine.")]
Precision = Annotated[
    Literal["auto", "32", "bf16", "16"] | None, typer.Option(help="auto: bf16 where the hardware computes in it.")
]
Subset = Annotated[str | None, typer.Option(metavar="WHAT", help="1%, 10%, 25 (images per class), lt, or a list file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")]
AllowChanges = Annotated[bool, typer.Option("--allow-changes", help="Resume although settings have changed.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="The recipe's smallest form: seconds on a CPU.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings as JSON and stop.")]
Sweep = Annotated[bool, typer.Option("--sweep", help="Train every combination of the recipe's sweep.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mimlet {version('mimlet')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Turn a folder of images, and maybe a big teacher, into a small strong vision transformer."""


@app.command()
def pretrain(
    context: typer.Context,
    overrides: Overrides = None,
    recipe: Recipe = None,
    data: Data = None,
    labelled: Labelled = None,
    eval: Eval = None,
    teacher: TeacherPath = None,
    teacher_heads: TeacherHeads = None,
    encoder: EncoderPath = None,
    keep_blocks: KeepBlocks = None,
    out: Out = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch: Batch = None,
    lr: LR = None,
    seed: Seed = None,
    workers: Workers = None,
    devices: Devices = None,
    precision: Precision = None,
    subset: Subset = None,
    resume: Resume = False,
    allow_changes: AllowChanges = False,
    smoke: Smoke = False,
    dry_run: DryRun = False,
) -> None:
    """Train an encoder on unlabelled images."""
    _train("pretrain", context.params, context.obj)


@app.command()
def finetune(
    context: typer.Context,
    overrides: Overrides = None,
    recipe: Recipe = None,
    data: Data = None,
    eval: Eval = None,
    teacher: TeacherPath = None,
    teacher_heads: TeacherHeads = None,
    encoder: EncoderPath = None,
    keep_blocks: KeepBlocks = None,
    out: Out = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch: Batch = None,
    lr: LR = None,
    seed: Seed = None,
    workers: Workers = None,
    devices: Devices = None,
    precision: Precision = None,
    subset: Subset = None,
    resume: Resume = False,
    allow_changes: AllowChanges = False,
    smoke: Smoke = False,
    dry_run: DryRun = False,
    sweep: Sweep = False,
) -> None:
    """Train a classifier, from an encoder or from scratch."""
    _train("finetune", context.params, context.obj)


@app.command()
def compare(
    context: typer.Context,
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE",
            help="Two or more recipes; and any SECTION.KEY=VALUE for all of them, or for one: "
            "mimhd_tiny:method.relations.weight=2",
        ),
    ],
    data: Data = None,
    labelled: Labelled = None,
    eval: Eval = None,
    teacher: TeacherPath = None,
    teacher_heads: TeacherHeads = None,
    encoder: EncoderPath = None,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Holds one run folder per recipe.")] = "runs/compare",
    epochs: Epochs = None,
    steps: Steps = None,
    batch: Batch = None,
    lr: LR = None,
    seed: Seed = None,
    workers: Workers = None,
    devices: Devices = None,
    precision: Precision = None,
    subset: Subset = None,
    resume: Resume = False,
    allow_changes: AllowChanges = False,
    smoke: Smoke = False,
    dry_run: DryRun = False,
) -> None:
    """Train several methods or students side by side: one pass over the images, one pass of a shared teacher."""
    _compare(context.params, context.obj)


@app.command()
def pack(
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="Images, as for --data; with --verify packs.")],
    to: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where to write. What was begun there is gone on with.")
    ] = None,
    form: Annotated[
        Literal["raw", "jpeg"], typer.Option(help="raw: pixels, fastest; jpeg: a tenth of the size.")
    ] = "jpeg",
    side: Annotated[
        int, typer.Option(metavar="N", min=1, max=4096, help="Short side in pixels. Smaller images stay as they are.")
    ] = 256,
    quality: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="Of JPEG.")] = 90,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="Refuse images without labels; else labels are kept where there are any.")
    ] = False,
    workers: Annotated[int, typer.Option(metavar="N", min=-1, help="Processes. Default: one per processor.")] = -1,
    max_unreadable: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Share of unreadable images above which it stops.")
    ] = 0.1,
    verify: Annotated[bool, typer.Option("--verify", help="Check packs whole, and say what is damaged.")] = False,
) -> None:
    """Pack images for fast reading: resized once, in a few large files with checksums."""
    _check_paths("DATA", data, needed=True)
    if verify == bool(to):
        raise ConfigError("--verify writes nothing: leave out --to" if to else "give --to, the folder to pack into")
    from mimlet.data import packing

    if verify:
        for folder in data:
            packing.verify_pack(folder)
        return
    assert to is not None
    packing.pack(
        data,
        to,
        form=form,
        side=side,
        quality=quality,
        labelled=labelled,
        workers=workers,
        max_unreadable=max_unreadable,
    )


@app.command()
def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="One of `mimlet recipes`, or a file.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(metavar="N", min=0, help="So many GPUs. Default: one, or this machine.")] = 0,
    gpu: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of this kind: h200, a100-80, rtx4090, ... Can be repeated. Default: all."),
    ] = None,
    data: Data = None,
    images: Annotated[
        int, typer.Option(metavar="N", min=0, help="How many images there are, if --data is a sample or not given.")
    ] = 0,
    labelled: Labelled = None,
    eval: Eval = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="PATH", help="A file, or how big it is: vit_base, hiera_base, a recipe.")
    ] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch: Batch = None,
    precision: Precision = None,
    subset: Subset = None,
    cores: Annotated[
        int, typer.Option(metavar="N", min=0, help="Cores that load images. Default: those here; on other GPUs enough.")
    ] = 0,
    measure: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0, help="Of real steps on this machine. Default: 60 if it is meant; 0: arithmetic."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: bytes, seconds, hours.")] = False,
) -> None:
    """Say what a run will take: memory, hours, disk. Nothing is trained or written."""
    from mimlet.plan import plan

    options = {name: value for name, value in context.params.items() if name != "as_json"}
    planned = plan(**options)
    if as_json:
        typer.echo(planned.json())
    else:
        planned.show()


@app.command()
def probe(
    run: Run,
    data: Data = None,
    eval: Eval = None,
    kind: Annotated[
        Literal["quick", "linear", "knn", "heads"],
        typer.Option(
            help="quick: logistic regression on frozen features; linear: MAE's protocol; knn: neighbours; "
            "heads: what each head of a block is worth to quick."
        ),
    ] = "quick",
    layer: Annotated[int, typer.Option(metavar="N", min=0, help="For heads: which block. Default: the last.")] = 0,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where results go. Default: into the run.")] = None,
    overrides: Overrides = None,
) -> None:
    """Judge a frozen encoder on labelled images."""
    _check_run(run)
    _check_paths("--data", data, needed=True)
    _check_paths("--eval", eval, needed=True)
    from mimlet import api

    api.probe(run, data=data or [], eval=eval or [], kind=kind, layer=layer, out=out, overrides=overrides or [])


@app.command()
def evaluate(
    run: Run,
    data: Data = None,
    robustness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A shifted set: imagenet-a, -r, -sketch or -v2, or any name for one of yours with the same class "
            "names; or corruptions (of --data), or some of them: corruptions=fog,contrast. Can be repeated.",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where results go. Default: into the run.")] = None,
) -> None:
    """Judge a classifier: top-1, top-5, confusion picture; its robustness."""
    _check_run(run)
    _check_paths("--data", data, needed=False)
    _check_paths("--robustness", list(parse_shifts(robustness or []).sets.values()), needed=False)
    from mimlet import api

    api.evaluate(run, data=data or [], robustness=robustness or [], out=out)


@app.command()
def analyse(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, checkpoint files, timm:NAME or transformers:NAME; and any SECTION.KEY=VALUE for the "
            "fine-tuning of --leading.",
        ),
    ],
    data: Data = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Default: `analysis` in the run, if there is one; else ./analysis."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PART,...",
            help="Of cka (similarity of layers), attention (distance and entropy), health (of features), maps (of "
            "attention, and reconstructions), probe (of every layer, with --labelled and --eval).",
        ),
    ] = None,
    images: Annotated[int, typer.Option(metavar="N", help="Images to look at, at most.")] = 1152,
    batch: Annotated[int, typer.Option(metavar="N", help="Images per minibatch of CKA.")] = 128,
    order: Annotated[Literal["random", "folder"], typer.Option(help="A seeded sample, or the first files.")] = "random",
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed is another sample.")] = 0,
    upstream: Annotated[
        bool, typer.Option("--upstream", help="As MAE-lite's released code: first files, fresh last norm, its unit.")
    ] = False,
    shown: Annotated[
        int, typer.Option(metavar="N", min=0, help="Images in pictures. Default: 6, or 3 of several models.")
    ] = 0,
    block: Annotated[int, typer.Option(metavar="N", min=0, help="Block of attention maps. Default: the last.")] = 0,
    query: Annotated[
        str | None,
        typer.Option(metavar="ROW,COLUMN", help="Maps of this patch (from 0,0) in place of the class token."),
    ] = None,
    mask_ratio: Annotated[float, typer.Option(metavar="X", help="Share of patches to reconstruct.")] = 0.75,
    labelled: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Labelled images: a classifier on every layer learns them.")
    ] = None,
    eval: Eval = None,
    leading: Annotated[
        str | None,
        typer.Option(metavar="K,K,...", help="Fine-tune with so many leading blocks kept, on --labelled and --eval."),
    ] = None,
    recipe: Annotated[str, typer.Option(metavar="NAME", help="How --leading fine-tunes.")] = "classify_tiny",
    heads: Annotated[int, typer.Option(metavar="N", help="Head count, where a file does not tell.")] = 0,
    workers: Annotated[int, typer.Option(metavar="N", help="Loader processes. Default: as for training.")] = -1,
) -> None:
    """Look inside encoders: CKA, attention, health of features, maps; one page."""
    _analyse(context.params, context.obj)


@app.command()
def diagnose(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint file, timm:NAME, ...")],
    data: Data = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="An encoder that it is to be like, such as a supervised one.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Labelled images that it is to be fine-tuned on.")
    ] = None,
    labelled: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Labelled images for a probe of every layer, with --eval.")
    ] = None,
    eval: Eval = None,
    images: Annotated[int, typer.Option(metavar="N", help="Images to look at, at most.")] = 1152,
    heads: Annotated[int, typer.Option(metavar="N", help="Head count, where a file does not tell.")] = 0,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Default: `analysis` in the run.")] = None,
) -> None:
    """Say in plain words what an encoder lacks and which recipe to try, with the numbers behind it."""
    options = dict(context.params)
    _check_models([model, *([reference] if reference else [])])
    for name in ("data", "target", "labelled", "eval"):
        _check_paths(f"--{name}", options[name], needed=False)
        options[name] = options[name] or []
    from mimlet.analyse import verbs

    verbs.diagnose(options.pop("model"), **options, command=context.obj)


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Where to write.")] = "exported",
    form: Annotated[Literal["timm"], typer.Option(help="timm: weights that timm.create_model loads.")] = "timm",
) -> None:
    """Write a run's encoder in another library's form."""
    _check_run(run)
    from mimlet import api

    api.export(run, to=to, form=form)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Default: report.html in the first run.")] = None,
) -> None:
    """Write a self-contained page about one or more runs."""
    for run in runs:
        _check_run(run)
    from mimlet import api

    api.report(runs, out=out)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this recipe.")] = None,
) -> None:
    """List the recipes that are shipped, or print one."""
    if name is not None:
        read_recipe(name)
        typer.echo(recipe_paths().get(name, Path(name)).read_text(encoding="utf-8"), nl=False)
        return
    group = ""
    for known, path in recipe_paths().items():
        if path.parent.name != group:
            group = path.parent.name
            typer.echo(f"{group}/")
        header = recipe_header(path)
        typer.echo(f"  {known:<22} {read_recipe(known)['title']}")
        for key in ("expected", "cost"):
            typer.echo(f"  {'':<22}   {key}: {header[key]}")


@app.command()
def demo(
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Your images. Default: scanned digits that come with it.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where runs and report go. Default: runs/demo, or the next free."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed is another demo.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Only check that everything runs.")] = False,
) -> None:
    """The whole job in three minutes, with a report."""
    _check_paths("--data", [data] if data else [], needed=False)
    from mimlet import api

    api.demo(data=data, out=out, seed=seed, quick=quick)


def _train(verb: str, options: Mapping[str, Any], command: str) -> None:
    """pretrain and finetune: options -> configuration -> cheap checks -> training."""
    if options.get("sweep") and options["resume"]:
        raise ConfigError("the same command continues a sweep, finished runs are not repeated: leave out --resume")
    config = _configure(verb, options)
    if options["dry_run"]:
        typer.echo(config.model_dump_json(indent=2))
        return
    if options["allow_changes"] and not options["resume"]:
        raise ConfigError("--allow-changes is about continuing a run: give --resume as well")
    if options.get("sweep"):
        if not config.sweep:
            raise ConfigError("--sweep: this recipe has no [sweep] table; `mimlet recipes transfer_pets` shows one")
        sweep_points(config)
    check_inputs(config)
    if config.method.name == "classify" and not config.encoder.weights:
        typer.echo("note: no --encoder is given: training starts from random weights", err=True)
    from mimlet import api

    if options.get("sweep"):
        api.sweep(config, command=command)
    else:
        api.train(config, resume=options["resume"], allow_changes=options["allow_changes"], command=command)


def _compare(options: Mapping[str, Any], command: str) -> None:
    """Recipes and settings -> configurations -> cheap checks -> training side by side."""
    chosen = [text for text in options["recipes"] if "=" not in text]
    names = [Path(recipe).stem for recipe in chosen]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"'{twice[0]}' is given twice; save a changed copy under another name: mimlet recipes NAME")
    overrides: dict[str, list[str]] = {name: [] for name in names}
    for text in (text for text in options["recipes"] if "=" in text):
        name, colon, _ = text.partition("=")[0].partition(":")
        if colon and name not in overrides:
            raise ConfigError(f"'{text}' is a setting of '{name}', which is not compared; recipes: {', '.join(names)}")
        for each in [name] if colon else names:
            overrides[each].append(text.removeprefix(f"{name}:") if colon else text)
    configs = []
    for recipe, name in zip(chosen, names, strict=True):
        labels = METHODS.get(read_recipe(recipe).get("method", {}).get("name", ""), METHODS["mae"]).labels
        verb = "finetune" if labels else "pretrain"
        own = {**options, "recipe": recipe, "overrides": overrides[name], "out": f"{options['out']}/{name}"}
        configs.append(_configure(verb, {**own, "resume": False}))
    if options["dry_run"]:
        typer.echo(f"[{', '.join(config.model_dump_json(indent=2) for config in configs)}]")
        return
    for config in configs:
        check_inputs(config)
    from mimlet import api

    resume, allow_changes = options["resume"], options["allow_changes"]
    results = api.compare(configs, resume=resume, allow_changes=allow_changes, command=command)
    if len(results) == len(configs):
        for leftover in Path(options["out"]).glob(".report.html.*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        api.report([result.folder for result in results], out=f"{options['out']}/report.html")


def _analyse(options: Mapping[str, Any], command: str) -> None:
    """Words -> models and settings, pairs and lists of numbers -> checks -> analysis."""
    options = dict(options)
    given = options.pop("models")
    models = [text for text in given if not _is_setting(text)]
    _check_models(models)
    _check_paths("--data", options["data"], needed=True)
    for name in ("labelled", "eval"):
        _check_paths(f"--{name}", options[name], needed=False)
        options[name] = options[name] or []
    query, leading = (_numbers(f"--{name}", options[name]) for name in ("query", "leading"))
    if query and len(query) != 2:
        raise ConfigError(f"--query is {options['query']}; expected ROW,COLUMN of a patch, such as 7,3")
    options.update(query=tuple(query) or None, leading=leading, overrides=[text for text in given if _is_setting(text)])
    if only := options.pop("only"):
        options["only"] = only.split(",")
    from mimlet.analyse import verbs

    verbs.analyse(models, **options, command=command)


def _is_setting(text: str) -> bool:
    """SECTION.KEY=VALUE, and no path that happens to have an equals sign."""
    return "=" in text and not Path(text).exists()


def _check_models(models: Sequence[str]) -> None:
    """Named, and there where they are paths."""
    if not models:
        raise ConfigError("no model to look at: give a run folder, a weights file, timm:NAME or transformers:NAME")
    for model in models:
        if not model.startswith(("timm:", "transformers:")) and not Path(model).exists():
            raise RunError(missing_path(model))


def _numbers(option: str, text: str | None) -> list[int]:
    """0,2,4 -> [0, 2, 4]."""
    try:
        return [int(part) for part in (text or "").split(",") if part]
    except ValueError:
        raise ConfigError(f"{option} is {text}; expected whole numbers with commas, such as 0,2,4") from None


def _configure(verb: str, options: Mapping[str, Any]) -> Config:
    """The recipe (or, with --resume alone, the run's own settings), then named options, then overrides."""
    out = options["out"]
    recipe = options["recipe"] or DEFAULT_RECIPES[verb]
    if options["resume"]:
        run = Path(out or f"runs/{Path(recipe).stem}")
        begun = (run / "config.json").is_file()
        if not begun and not (run / LOCK).is_file():  # with a lock it was killed before it could write its settings
            hint = "has no config.json" if run.is_dir() else missing_path(run)
            raise RunError(f"nothing to resume in '{run}': {hint}; leave out --resume to start")
        out = str(run)
        recipe = options["recipe"] or (str(run / "config.json") if begun else recipe)
    values = read_recipe(recipe)
    method = values.get("method", {}).get("name")
    if method in METHODS and METHODS[method].labels != (verb == "finetune"):
        other, need = ("pretrain", "no labels") if verb == "finetune" else ("finetune", "labels")
        raise ConfigError(f"recipe '{recipe}' trains with {need} (method {method}): use `mimlet {other}`")
    if options["smoke"]:
        values = smoke(values)
    set_length(values, options["epochs"], options["steps"])
    for option, key in OPTIONS.items():
        if options.get(option) not in (None, [], ()):
            merge_settings(values, nest(key, options[option]))
    run_settings = values.setdefault("run", {})
    run_settings["out"] = out or run_settings.get("out") or f"runs/{Path(recipe).stem}"
    return load_config(values, options["overrides"] or [])


def _check_run(run: str) -> None:
    """A run folder is there and is one."""
    if not Path(run).is_dir():
        raise RunError(missing_path(run))
    if not (Path(run) / "config.json").is_file():
        raise RunError(f"'{run}' is not a run folder: it has no config.json")


def _check_paths(option: str, paths: Sequence[str] | None, *, needed: bool) -> None:
    """Images are named where they are needed, and are there."""
    if needed and not paths:
        raise DataError(f"no images: give {option} (a folder, an archive, a .parquet or list file)")
    missing = [path for path in paths or [] if not path.startswith("torchvision:") and not Path(path).exists()]
    if missing:
        raise DataError(f"{option}: {missing_path(missing[0])}")


def run() -> int:
    """The whole life of a process: `main`, and then an end that Ctrl-C cuts short without a trace."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0; 2 what the user can repair; 75 to try again; 130, 143 stopped
    by a signal.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    verbs = [entry.callback.__name__ for entry in app.registered_commands if entry.callback]
    name = f"mimlet {given[0]}" if given[0] in verbs else "mimlet"
    group = typer.main.get_command(app)
    warnings.formatwarning = lambda message, *where, **line: (
        f"note: {printable(str(message), lines=True)}\n"
    )  # not the code that gave it
    warnings.filterwarnings("once", message="This DataLoader will create")  # more processes than processors
    try:
        code = group.main(given, prog_name="mimlet", standalone_mode=False, obj=shlex.join(["mimlet", *given]))
    except typer.TyperException as error:
        close = getattr(error, "possibilities", None)
        message = f"{error.message} (did you mean {close[0]}?)" if close else error.format_message()
        message = _shortened(f"{name}: {message.replace('Value error, ', '')}\nTry: {name} --help")
        typer.echo(message, err=True)
        return 2
    except UserError as error:
        typer.echo(_shortened(f"{name}: {error}"), err=True)
        return 75 if isinstance(error, TryAgain) else 2
    except TrainingStopped as stopped:
        typer.echo(f"{name}: {stopped}", err=True)
        return stopped.code
    return code if isinstance(code, int) else 0


def _shortened(message: str) -> str:
    """At most five lines, without the terminal's control characters, which names from files may hold."""
    lines = [
        line if len(line) <= ERROR_WIDTH else f"{line[:ERROR_WIDTH]}..."
        for line in printable(message.strip(), lines=True).split("\n")
    ]
    if len(lines) > ERROR_LINES:
        lines = [*lines[: ERROR_LINES - 1], f"  and {len(lines) - ERROR_LINES + 1} more"]
    return "\n".join(lines)
