"""What the verbs do. Every function here is also the Python way to do it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from rich.console import Console
from torch import nn

from mimlet.analyse.diagnose import read_findings
from mimlet.analyse.results import ANALYSIS_FOLDER
from mimlet.atomic import write_atomic
from mimlet.config import OPTIONS, PYTHON, Config, load_config, merge, nest, read_recipe, set_length, sweep_points
from mimlet.data.augment import evaluation_transform, left_to_device
from mimlet.data.batch import Batch
from mimlet.data.corruptions import SEVERITIES, Corrupted, published_side
from mimlet.data.dataset import ImageDataset
from mimlet.data.joint import JointDataset
from mimlet.data.loader import evaluation_batches, prepared, steps_per_epoch, training_batches
from mimlet.data.seeding import key
from mimlet.data.source import Paths, Records, Source, are_records, open_source, path_list, record_source
from mimlet.data.subset import choose
from mimlet.demo import demo
from mimlet.errors import ConfigError, DataError, RunError, TryAgain, WeightsError
from mimlet.export.timm import DESCRIPTION_FILE, export_classifier, export_encoder, snippet
from mimlet.methods.base import Method, Task
from mimlet.methods.settings import METHODS
from mimlet.models.build import settings_of
from mimlet.models.classifier import Classifier
from mimlet.models.decoders import Decoder
from mimlet.models.encoder import Encoder
from mimlet.models.teacher import Teachers
from mimlet.models.tokenizer import DiscreteVAE
from mimlet.models.weights import (
    DECODER_FILE,
    ENCODER_FILE,
    LoadReport,
    load,
    open_checkpoint,
    shape_of_checkpoint,
)
from mimlet.report import Picture, film, image_grid, write_report
from mimlet.run import RunFolder, read_picture, read_pictures, read_run, read_shown
from mimlet.tables import print_table, write_csv
from mimlet.tasks.classify import Classify
from mimlet.tasks.heads import head_losses
from mimlet.tasks.metrics import Scores, evaluate_classifier
from mimlet.tasks.probe import Labelled, extract_features, knn_probe, logistic_probe
from mimlet.tasks.robustness import (
    VIEWS_MEMORY,
    Robustness,
    ShiftedScores,
    judge_views,
    open_shifted,
)
from mimlet.tasks.shifts import ROBUSTNESS_FILE, parse_shifts
from mimlet.train.distributed import make_fabric, on_first
from mimlet.train.loop import Evaluate, FitResult, Job, fit_together
from mimlet.train.watch import SHOWN, EncoderJudge, Pictures
from mimlet.untrusted import printable

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["compare", "demo", "evaluate", "export", "finetune", "pretrain", "probe", "report", "sweep", "train"]


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder and what the loop reports."""

    folder: Path
    fit: FitResult


def train(
    config: Config,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    command: str = "",
    teacher: nn.Module | None = None,
    data: Records[Any] | None = None,
) -> TrainResult:
    """Trains whatever `config` describes, pre-training or task, and leaves a run folder with the exported model and a
    report.

    `resume` continues the newest checkpoint in `config.run.out`. `teacher` is a module of your own in place of
    `config.teacher` (see `mimlet.Teacher`), `data` a data set of any library in place of `config.data.path`
    (`mimlet.Records`; docs/data.md). Raises `UserError` for what the user can repair, `TrainingStopped` after a signal.
    """
    if data is not None and not all(path.startswith(PYTHON) for path in config.data.path or [""]):
        named = config.data.model_copy(update={"path": [f"{PYTHON}{type(data).__name__}"]})
        config = config.model_copy(update={"data": named})
    return _train_together([config], resume, allow_changes, command, Teachers(teacher), data)[0]


def compare(
    configs: Sequence[Config],
    *,
    resume: bool = False,
    allow_changes: bool = False,
    command: str = "",
    teacher: nn.Module | None = None,
) -> list[TrainResult]:
    """Trains several methods or students side by side on the same images, each into its own `run.out`.

    Images are read once. A teacher that several of them share answers once per distinct view, mask and set of taps.
    Each result equals that of `train`, bit for bit on a CPU with as many threads. Data, seed, schedule and speed must
    agree; encoder, method, teacher, augmentation and optimiser may differ. Where one fails, the others are finished,
    then `RunError` is raised. For the rest see `train`.
    """
    if len(configs) < 2:
        raise ConfigError(f"compare trains two or more side by side, got {len(configs)}; use pretrain or finetune")
    first, outs = configs[0], [config.run.out for config in configs]
    if len(set(outs)) < len(outs):
        raise ConfigError(f"every training needs a folder of its own, got run.out {', '.join(map(str, outs))}")
    if len({METHODS[config.method.name].labels for config in configs}) > 1:
        raise ConfigError("methods with and without labels cannot be trained side by side; compare them apart")
    for config in configs[1:]:
        differ = [
            f"{section}.{name} {getattr(getattr(first, section), name)} and {getattr(getattr(config, section), name)}"
            for section in ("data", "schedule", "speed")
            for name in type(getattr(first, section)).model_fields
            if name != "augment" and getattr(getattr(first, section), name) != getattr(getattr(config, section), name)
        ]
        differ += [f"seed {first.seed} and {config.seed}"] if first.seed != config.seed else []
        if differ:
            raise ConfigError(f"trainings side by side share data and schedule, these differ: {'; '.join(differ)}")
    return _train_together(configs, resume, allow_changes, command, Teachers(teacher))


def _train_together(
    configs: Sequence[Config],
    resume: bool,
    allow_changes: bool,
    command: str,
    teachers: Teachers,
    data: Records[Any] | None = None,
) -> list[TrainResult]:
    config = configs[0]
    fabric = make_fabric(config.speed)
    say = _teller(fabric)
    idle = [each.method.name for each in configs if not METHODS[each.method.name].teacher]
    if teachers.module is not None and idle:
        raise ConfigError(f"method '{idle[0]}' does not ask a teacher given from Python; leave it out")
    labelled = METHODS[config.method.name].labels
    if data is None:
        source = open_source(config.data.path, labelled=labelled, index=config.data.index)
    else:
        source = record_source(data, " ".join(config.data.path), labelled=labelled)
    trainings = [_Training(each, source, fabric, teachers, say) for each in configs]
    joint = JointDataset([training.dataset for training in trainings])
    per_epoch = steps_per_epoch(len(joint), config.schedule.batch)
    normalisations = [(each.data.augment.mean, each.data.augment.std) for each in configs]

    def batches(start_step: int, total_steps: int) -> Generator[Sequence[Batch], None, None]:
        stream = training_batches(
            joint,
            batch=config.schedule.batch,
            accumulate=config.speed.accumulate,
            rank=fabric.global_rank,
            world=fabric.world_size,
            start_step=start_step,
            total_steps=total_steps,
            workers=loader_workers(config.speed.workers, fabric),
            pin_memory=fabric.device.type == "cuda",
        )
        with closing(stream):
            yield from prepared(
                stream, lambda batch: batch.prepare(fabric.device, normalisations).batches, fabric.device
            )

    with ExitStack() as runs:
        jobs = []

        def open_runs() -> None:
            for training in trainings:
                runs.enter_context(training.open(resume, allow_changes, shlex.split(command)))

        on_first(fabric, open_runs)
        for training in trainings:
            run, look = training.run, training.look if training.run else None
            start = training.encoder_judge is not None
            jobs.append(Job(training.method, training.config, run, training.evaluate, start, look))
        if len(configs) > 1:
            teachers.forget()
        results = fit_together(
            jobs, fabric, batches, per_epoch, after_piece=teachers.forget if len(configs) > 1 else lambda: None
        )
        failed = {}
        for training, result in zip(trainings, results, strict=True):
            if isinstance(result, RunError):
                failed[training.folder.name] = result
            elif fabric.is_global_zero:
                training.finish(result)
    if len(configs) == 1:
        for error in failed.values():
            raise error
    if failed:
        again = any(isinstance(error, TryAgain) for error in failed.values())
        raise (TryAgain if again else RunError)(
            f"{len(failed)} of {len(configs)} trainings failed, the others are finished: "
            + "; ".join(f"{name}: {error}" for name, error in failed.items())
        )
    return [
        TrainResult(training.folder, result)
        for training, result in zip(trainings, results, strict=True)
        if isinstance(result, FitResult)
    ]


class _Training:
    """What a configuration needs to be trained: method, data set, judge, run folder."""

    def __init__(
        self, config: Config, source: Source, fabric: Fabric, teachers: Teachers, say: Callable[[str], None]
    ) -> None:
        if not config.run.out:
            raise ConfigError("run.out is not set: give the folder that the run is written to")
        self.config, self.source, self.fabric, self.say = config, source, fabric, say
        self.folder = Path(config.run.out)
        entry, data = METHODS[config.method.name], config.data
        indices = choose(source.labels, data.subset, data.subset_seed, map(source.name, range(len(source))))
        say(source.describe() + (f"; {len(indices):,} of them used (subset {data.subset})" if data.subset else ""))
        self.evaluate: Evaluate | None = None
        self.encoder_judge: EncoderJudge | None = None
        self.judge_source: Source | None = None
        if data.labelled:
            workers = loader_workers(config.speed.workers, fabric)
            self.evaluate = self.encoder_judge = EncoderJudge(config, fabric, workers, say)
        elif data.eval:
            self.judge_source = open_source(data.eval, labelled=True, index=data.index, classes=source.classes)
            self.evaluate = self._judge_labels
            say(f"judged on {self.judge_source.describe()}")
        self.scores: Scores | None = None
        self.run: RunFolder | None = None

        torch.manual_seed(key("init", config.seed))
        self.method = entry.load().build(config, len(source.classes) if entry.labels else 0, teachers)
        report = getattr(self.method, "load_report", None)
        _check_normalisation(report, config)
        found = (report, getattr(getattr(self.method, "teacher", None), "load_report", None))
        self.loaded = [report for report in found if isinstance(report, LoadReport)]
        for report in self.loaded:
            say(str(report))
        transform = self.method.transform(data.augment, config.encoder.image_size)
        self.dataset = ImageDataset(
            source,
            transform,
            self.method.masks(),
            seed=config.seed,
            indices=indices,
            decoder=data.decoder,
            reduced=data.reduced_decode,
            on_device=left_to_device(config.speed.augment, transform, fabric.device.type),
        )
        self.pictures = Pictures(config, self.dataset, fabric)

    def open(self, resume: bool, allow_changes: bool, command: list[str]) -> RunFolder:
        """Makes or reopens the run folder."""
        self.run = RunFolder.create(
            self.folder, self.config, resume=resume, allow_changes=allow_changes, command=command
        )
        if self.loaded:
            text = json.dumps([asdict(report) for report in self.loaded], indent=2) + "\n"
            write_atomic(self.folder / "loaded.json", text)
        return self.run

    def look(self, method: Method, step: int) -> None:
        """Keeps what the method makes of fixed images."""
        assert self.run is not None
        self.pictures.keep(method, step, self.run)

    def _judge_labels(self, task: Method) -> dict[str, float]:
        """Judges the method on `data.eval`."""
        assert isinstance(task, Task)
        assert self.judge_source is not None
        first = self.scores is None
        workers = loader_workers(self.config.speed.workers, self.fabric)
        classes = len(self.source.classes)
        self.scores = _judge(task.predict, self.judge_source, self.config, classes, self.fabric, workers)
        if first and (left_out := _left_out(self.judge_source, self.scores)):
            self.say(f"judged on {self.judge_source.describe()}{left_out}")
        return self.scores.summary()

    def finish(self, result: FitResult) -> None:
        """Leaves what a finished run leaves: the exported model, pictures, results per class, the page."""
        assert self.run is not None
        folder, augment = self.folder, self.config.data.augment
        _export(self.method, self.config, folder, self.source.classes)
        if self.scores is not None:
            self.run.image("confusion", result.steps, _write_scores(folder, self.scores, self.source.classes))
        if rows := self.pictures.rows(self.method):
            self.run.shows(rows, self.method.picture_caption)
            picture, last = image_grid(rows, mean=augment.mean, std=augment.std, columns=SHOWN), list(rows)[-1]
            write_atomic(folder / f"{last}.png", picture)
            if not self.config.run.pictures:
                self.run.image(last, result.steps, picture)
        if self.config.run.report:
            run_page([folder], folder / "report.html")
        self.say(_closing(folder, result, METHODS[self.config.method.name].labels))


def pretrain(recipe: str = "mae_tiny", **options: object) -> TrainResult:
    """Trains an encoder without labels. See `finetune` for the options."""
    return _train_recipe(recipe, labels=False, **options)


def finetune(recipe: str = "classify_tiny", **options: object) -> TrainResult:
    """Trains a classifier.

    Options are those of the command line, such as `data` and `eval` (a path or several; for `pretrain` also `labelled`,
    by which the encoder is judged), `teacher` (for `pretrain` also
    a module of your own), `encoder` (weights to start from), `epochs`, `batch`, `out`, `resume`, `allow_changes`; and
    any setting with its dots as double underscores: `optim__clip=1.0`. `data` may also be a data set of any library
    (`mimlet.Records`).
    """
    return _train_recipe(recipe, labels=True, **options)


def sweep(config: Config, *, command: str = "") -> list[dict[str, object]]:
    """Trains every combination of `config.sweep` into a folder of its own below `run.out`; finished ones are not
    repeated.

    Prints a table, best first, and writes it to `sweep.csv`. The best is the best on `data.eval`: where that is the
    test set, as in the paper (Table S2), its number is optimistic; give a validation split to choose, then judge
    once.
    """
    assert config.run.out is not None
    rows: list[dict[str, object]] = []
    for tried, point in sweep_points(config):
        name = "-".join(f"{dotted.rpartition('.')[2]}_{value}" for dotted, value in tried.items())
        folder = Path(config.run.out) / name
        point = point.model_copy(update={"run": point.run.model_copy(update={"out": str(folder)})})
        if not (folder / ENCODER_FILE).is_file():
            train(point, resume=True, command=command)
        judged = read_run(folder).lines("eval")
        rows.append({**tried, **({k: v for k, v in judged[-1].items() if k in ("top1", "top5")} if judged else {})})
    rows.sort(key=lambda row: -cast(float, row.get("top1", 0.0)))
    print_table("sweep", rows)
    write_csv(Path(config.run.out) / "sweep.csv", rows)
    return rows


def probe(
    run: str | Path,
    *,
    data: Paths,
    eval: Paths,
    kind: Literal["quick", "linear", "knn", "heads"] = "quick",
    layer: int = 0,
    out: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, float]:
    """Judges a frozen encoder by what a simple classifier can read from it.

    quick: logistic regression on mean patch features; knn: weighted neighbours; linear: MAE's protocol, trained by
    the loop into `out` (default: `probe_linear` in the run), on the class token where there is one; heads: what quick
    loses without each head of block `layer` (from 1; 0: the last that attends), as `head_1`, ... beside `top1`.
    """
    settings = read_run(run).config
    data, eval = path_list(data), path_list(eval)
    if layer and kind != "heads":
        raise ConfigError(f"probe --kind {kind} judges the whole encoder; --layer {layer} is for --kind heads")
    if kind == "linear":
        return _linear_probe(Path(run), settings, data, eval, out, overrides)
    if overrides:
        raise ConfigError(f"probe --kind {kind} has no settings to override, got {overrides[0]}; --kind linear has")
    encoder = _encoder_of(load(run))
    fabric = make_fabric(settings.speed.model_copy(update={"devices": 1}))
    encoder.to(fabric.device)
    train_source = open_source(data, labelled=True)
    test_source = open_source(eval, labelled=True, classes=train_source.classes)
    augment = settings.data.augment

    def features(source: Source, title: str) -> Labelled:
        dataset = ImageDataset(source, evaluation_transform(augment, encoder.shape.image_size), train=False)
        batches = evaluation_batches(dataset, batch=256, workers=loader_workers(settings.speed.workers, fabric))
        total = -(-len(dataset) // 256)
        return extract_features(
            encoder, batches, fabric.device, augment.mean, augment.std, "mean", total=total, title=title
        )

    train_part = features(train_source, "training images")
    if kind == "heads":
        whole, losses = head_losses(encoder, layer, train_part, lambda title: features(test_source, title))
        layer = encoder.attending_block(layer)
        rows: list[dict[str, object]] = [
            {"block": layer, "head": head, "top1": whole - loss, "lost": loss} for head, loss in enumerate(losses, 1)
        ]
        result = {"top1": whole, **{f"head_{head}": loss for head, loss in enumerate(losses, 1)}}
        title = f"{run}: top-1 without each head of block {layer}; {whole:.2f} with all"
    else:
        test_part = features(test_source, "test images")
        result = (logistic_probe if kind == "quick" else knn_probe)(train_part, test_part)
        rows = [{"probe": kind, "train": len(train_part[0]), "test": len(test_part[0]), **result}]
        title = f"{run}"
    print_table(title, rows)
    write_csv(Path(out or run) / f"probe_{kind}.csv", rows)
    return result


def evaluate(
    run: str | Path, *, data: Paths = (), robustness: str | Sequence[str] = (), out: str | None = None
) -> dict[str, float]:
    """Judges a classifier: prints top-1 and top-5, writes results per class and a confusion picture.

    `robustness`: shifted sets as NAME=PATH, and `corruptions` of `data`, as on the command line. They leave
    robustness.json, .csv and .png and add NAME_top1, corruptions_top1 and mce to the result (see
    `mimlet.tasks.robustness`). Sets can be judged without `data`.
    """
    shifts = parse_shifts([robustness] if isinstance(robustness, str) else robustness)
    model = load(run)
    if not isinstance(model, Classifier):
        raise WeightsError(
            f"{run} holds an encoder without a classifier; fine-tune it first (mimlet finetune --encoder {run}), "
            "or use mimlet probe"
        )
    config = read_run(run).config
    paths = path_list(data) or config.data.eval
    if shifts.corruptions and not paths:
        raise DataError("no images to corrupt: give --data (one folder per class)")
    if not (paths or shifts.sets):
        raise DataError("no images to judge on: give --data (one folder per class)")
    classes, folder = list(model.names), Path(out or run)
    source = open_source(paths, labelled=True, classes=classes) if paths else None
    shifted = {name: open_shifted(name, path, classes) for name, path in shifts.sets.items()}
    fabric = make_fabric(config.speed.model_copy(update={"devices": 1}))
    model.to(fabric.device).eval()
    clean: Scores | None = None
    parts: dict[str, Scores] = {}
    corrupted: dict[str, float] = {}
    with torch.no_grad():
        if source is not None:
            subsets = {name: each.kept for name, each in shifted.items()}
            clean, parts, corrupted = _judge_views(model, source, config, classes, shifts.corruptions, subsets, fabric)
            _write_scores(folder, clean, classes)
            print_table(f"{run} on {source.describe()}{_left_out(source, clean)}", [dict(clean.summary())])
            sys.stdout.write(f"per class: {folder / 'per_class.csv'}, confusion: {folder / 'confusion.png'}\n")
        sets = []
        for name, each in shifted.items():
            workers = loader_workers(config.speed.workers, fabric)
            scores = _judge(each.among(model), each.source, config, len(each.kept), fabric, workers)
            sets.append(ShiftedScores.of(name, scores, parts.get(name)))
    summary = clean.summary() if clean else {}
    if not (sets or corrupted):
        return summary
    comparable = len(classes) == 1000 and published_side(config.encoder.image_size) == 224
    found = Robustness.of(clean, sets, corrupted, comparable)
    found.write(folder)
    if found.sets:
        rows = [{name: "" if value is None else value for name, value in asdict(each).items()} for each in found.sets]
        print_table("shifted sets, judged among their own classes", rows)
    if found.corruptions:
        print_table(found.headline, found.table)
    sys.stdout.write(f"robustness: {folder / ROBUSTNESS_FILE}, robustness.csv, robustness.png\n")
    page = folder / "report.html"
    if folder.resolve() == Path(run).resolve() and page.is_file():
        run_page([folder], page)
    return {**summary, **found.summary()}


def export(run: str | Path, *, to: str | Path = "exported", form: Literal["timm"] = "timm") -> Path:
    """Writes a run's model into another folder in timm's form, and prints the code that loads it there."""
    source, folder = Path(run), Path(to)
    if folder.resolve() == source.resolve():
        raise RunError(f"{run} itself is already in this form: {source / ENCODER_FILE}")
    if not (source / DESCRIPTION_FILE).is_file():
        if (source / ENCODER_FILE).is_file():
            open_checkpoint(source)  # says what it is, where it is no encoder
        raise RunError(f"{run} has no {DESCRIPTION_FILE}: the run is not finished; continue it with --resume")
    for name in (ENCODER_FILE, DECODER_FILE, DESCRIPTION_FILE):
        if (source / name).is_file():
            write_atomic(folder / name, (source / name).read_bytes())
        else:
            (folder / name).unlink(missing_ok=True)
    file = folder / ENCODER_FILE
    sys.stdout.write(f"{file} ({file.stat().st_size / 1e6:.1f} MB). Use it:\n\n{snippet(folder)}\n")
    return file


def report(runs: Sequence[str | Path], *, out: str | Path | None = None) -> Path:
    """Writes a self-contained page about one run, or comparing several."""
    paths = [Path(run) for run in runs]
    page = run_page(paths, Path(out) if out else paths[0] / "report.html")
    sys.stdout.write(f"{page}\n")
    return page


def run_pictures(folder: Path, prefix: str = "") -> list[Picture]:
    """The pictures that a run has left in its folder. Without a `prefix`, which tells several runs apart, a film stands
    in place of what training ended with.
    """
    shown, rows = read_shown(folder), read_pictures(folder)
    *fixed, last = shown.rows
    pictures, moments = [], [label for label in rows if label not in fixed]
    known = {
        f"{last}.png": (last.capitalize(), f"Rows of training images: {', '.join(shown.rows)}", shown.caption),
        "confusion.png": (
            "Confusion",
            "Matrix of true classes against predicted classes",
            "Rows are true classes; each sums to 100 %.",
        ),
    }
    if len(moments) > 1 and not prefix:
        del known[f"{last}.png"]
        alt = f"Rows of the same training images: {', '.join(fixed)}, {last} from {moments[0]} to {moments[-1]}"
        pictures.append(Picture(f"{last.capitalize()} as training goes", film(rows), alt, shown.caption))
    return pictures + [
        Picture(prefix + title, read_picture(folder / name), alt, caption)
        for name, (title, alt, caption) in known.items()
        if (folder / name).is_file()
    ]


def _check_normalisation(report: LoadReport | None, config: Config) -> None:
    """`ConfigError` where an encoder goes on with images normalised otherwise than those it has seen."""
    given = (config.data.augment.mean, config.data.augment.std)
    own = report.normalised if report else None
    if own is not None and own != given:
        (mean, std), (now_mean, now_std) = (
            [f"[{','.join(map(str, values))}]" for values in normalisation] for normalisation in (own, given)
        )
        raise ConfigError(
            f"{config.encoder.weights} has seen images normalised with mean {mean} and std {std}, and here they get "
            f"{now_mean} and {now_std}; set data.augment.mean={mean} data.augment.std={std}"
        )


def loader_workers(setting: int, fabric: Fabric) -> int:
    """Loader processes per device. -1: two on a CPU, which also has to compute; else the cores per device, at most
    8.
    """
    if setting >= 0:
        return setting
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, usable // fabric.world_size)
    return min(cores, 2 if fabric.device.type == "cpu" else 8)


def _train_recipe(recipe: str, labels: bool, **options: object) -> TrainResult:
    values = read_recipe(recipe)
    name = values.get("method", {}).get("name")
    if name in METHODS and METHODS[name].labels != labels:
        raise ConfigError(
            f"recipe '{recipe}' has the method {name}; use mimlet.{'pretrain' if labels else 'finetune'} for it"
        )
    resume, allow_changes = bool(options.pop("resume", False)), bool(options.pop("allow_changes", False))
    teacher = options.get("teacher")
    module = teacher if isinstance(teacher, nn.Module) else None
    if module is not None:
        if labels:
            raise ConfigError("distilling labels needs the path of a classifier, or timm:NAME, not a module")
        options["teacher"] = f"{PYTHON}{type(module).__name__}"
    data = options.get("data", ())
    records = cast(Records[Any], data) if are_records(data) else None
    if records is not None:
        options["data"] = f"{PYTHON}{type(records).__name__}"
    set_length(values, cast(float | None, options.pop("epochs", None)), cast(int | None, options.pop("steps", None)))
    merge(values, nest("run.out", str(options.pop("out", f"runs/{Path(recipe).stem}"))))
    for option, value in options.items():
        dotted = OPTIONS.get(option, option.replace("__", "."))
        if dotted in ("data.path", "data.eval", "data.labelled"):
            value = path_list(cast(Paths, value))
        merge(values, nest(dotted, str(value) if isinstance(value, Path) else value))
    return train(load_config(values), resume=resume, allow_changes=allow_changes, teacher=module, data=records)


def _judge(
    predict: Callable[[torch.Tensor], torch.Tensor],
    source: Source,
    config: Config,
    classes: int,
    fabric: Fabric,
    workers: int,
) -> Scores:
    augment = config.data.augment
    transform = evaluation_transform(augment, config.encoder.image_size)
    dataset = ImageDataset(source, transform, train=False, decoder=config.data.decoder)
    batch = max(1, min(256, config.schedule.batch))
    batches = evaluation_batches(
        dataset, batch=batch, rank=fabric.global_rank, world=fabric.world_size, workers=workers
    )
    return evaluate_classifier(predict, batches, fabric.device, augment.mean, augment.std, classes)


def _judge_views(
    model: Classifier,
    source: Source,
    config: Config,
    classes: Sequence[str],
    corruptions: Sequence[str],
    subsets: Mapping[str, torch.Tensor],
    fabric: Fabric,
) -> tuple[Scores, dict[str, Scores], dict[str, float]]:
    """See `judge_views`. Images are read once and judged as they are and with every corruption."""
    augment, size = config.data.augment, config.encoder.image_size
    transform = Corrupted(evaluation_transform(augment, size), tuple(corruptions))
    dataset = ImageDataset(source, transform, train=False, decoder=config.data.decoder)
    bytes_each = (1 + SEVERITIES * len(corruptions)) * 3 * size**2
    batch = max(1, min(256, config.schedule.batch, VIEWS_MEMORY // bytes_each))
    batches = evaluation_batches(dataset, batch=batch, workers=loader_workers(config.speed.workers, fabric))
    total = -(-len(dataset) // batch)
    return judge_views(model, batches, fabric.device, augment.mean, augment.std, len(classes), subsets, total)


def _left_out(source: Source, scores: Scores) -> str:
    """Ends a sentence about the images judged on."""
    count = len(source) - scores.images
    return f"; {count:,} of them could not be read, left out" if count else ""


def _export(method: Method, config: Config, folder: Path, classes: Sequence[str]) -> None:
    """Writes the trained model under timm's names."""
    augment = config.data.augment
    info = {"method": config.method.name, "title": config.title, **method.info}
    if isinstance(method, Classify):
        names = list(classes) or [str(i) for i in range(method.classes)]
        export_classifier(folder, method, classes=names, mean=augment.mean, std=augment.std, info=info)
    elif isinstance(method.encoder, DiscreteVAE):
        method.encoder.save(folder, info)
    else:
        assert isinstance(method.encoder, Encoder)
        decoder = getattr(method, "decoder", None)
        export_encoder(
            folder,
            method.encoder,
            mean=augment.mean,
            std=augment.std,
            decoder=decoder if isinstance(decoder, Decoder) else None,
            normalised=bool(getattr(method, "normalise", True)),
            info=info,
        )


def run_page(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page about one run, with the code that uses its model, or about several."""
    alone = len(runs) == 1
    return write_report(
        runs,
        out,
        title=runs[0].name if alone else f"{len(runs)} runs compared",
        pictures=[picture for run in runs for picture in run_pictures(run, "" if alone else f"{run.name}: ")],
        findings=read_findings(runs[0] / ANALYSIS_FOLDER) if alone else (),
        snippet=snippet(runs[0]) if alone and (runs[0] / DESCRIPTION_FILE).is_file() else "",
    )


def _linear_probe(
    run: Path, settings: Config, data: Sequence[str], eval: Sequence[str], out: str | None, overrides: Sequence[str]
) -> dict[str, float]:
    more = {"run": {"out": out or str(run / "probe_linear")}, "speed": settings.speed.model_dump()}
    if not getattr(settings.encoder.shape(), "class_token", False):
        more["method"] = {"pool": "mean"}
    return train(task_config("linear_probe", str(run), data, eval, overrides, more)).fit.evaluation


def task_config(
    recipe: str,
    weights: str,
    data: Sequence[str],
    eval: Sequence[str],
    overrides: Sequence[str] = (),
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """A recipe with labels, fitted to the encoder in `weights` and, in its batch, to few images. `more` settings are
    merged over it, then `overrides`.
    """
    values = read_recipe(recipe)
    shape = settings_of(shape_of_checkpoint(open_checkpoint(weights)))
    if (Path(weights) / "config.json").is_file():
        shape["name"] = read_run(weights).config.encoder.name
    merge(values, {"encoder": {**shape, "weights": weights}, "data": {"path": list(data), "eval": list(eval)}})
    merge(values, more)
    images = len(open_source(data, labelled=True))
    if values["schedule"]["batch"] > images:
        values["schedule"]["batch"] = 1 << (max(1, images).bit_length() - 1)
    return load_config(values, overrides)


def _encoder_of(model: nn.Module) -> Encoder:
    encoder = model.encoder if isinstance(model, Classifier) else model
    assert isinstance(encoder, Encoder)
    return encoder


def _write_scores(folder: Path, scores: Scores, classes: Sequence[str]) -> bytes:
    """Results per class and the confusion picture, which comes back."""
    picture = folder / "confusion.png"
    scores.write_per_class(folder / "per_class.csv", classes)
    scores.confusion_picture(picture, classes)
    return picture.read_bytes()


def _teller(fabric: Fabric) -> Callable[[str], None]:
    console, said = Console(stderr=True, highlight=False), set[str]()

    def say(text: str) -> None:
        """Trainings side by side have much in common: nothing is told twice."""
        if fabric.is_global_zero and text not in said:
            said.add(text)
            console.print(printable(text, lines=True), markup=False, soft_wrap=True)

    return say


def _closing(folder: Path, result: FitResult, labels: bool) -> str:
    """Of a training with labels what it is worth; of another one its losses, too."""
    losses = {f"{name} loss": value for name, value in result.losses.items() if name != "total"}
    numbers = result.evaluation if labels and result.evaluation else losses | result.evaluation
    judged = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    took = f"done after {result.steps:,} steps, {result.seconds:.0f} s"
    return f"{took}{'; ' + judged if judged else ''}. Model and report: {folder}"
