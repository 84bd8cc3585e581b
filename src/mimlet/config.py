"""The configuration of a run: typed sections, recipe files, command-line overrides. The only parser in mimlet.

Free of torch, so that a wrong setting is answered at once. Two sections never change results: `run` and, up to
rounding, `speed`. Everything else is the experiment; a resumed run must repeat it (see `changed_settings`).
"""

from __future__ import annotations

import difflib
import itertools
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from mimlet.errors import ConfigError, DataError
from mimlet.methods.settings import (
    METHODS,
    TERMS,
    BEiTSettings,
    ClassifySettings,
    DecoderSettings,
    LinearProbeSettings,
    MaskFeatSettings,
    MethodSettings,
)
from mimlet.models.shapes import HieraShape, HiViTShape, Shape, ViTShape
from mimlet.models.zoo import ENCODERS, HieraSize, HiViTSize, Size
from mimlet.section import Section
from mimlet.untrusted import parse_json, parse_toml

RECIPES = Path(__file__).parent / "recipes"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PYTHON = "python:"
"""Begins a `teacher.path` that stands for a module given from Python."""

OPTIONS = {
    "data": "data.path",
    "eval": "data.eval",
    "labelled": "data.labelled",
    "subset": "data.subset",
    "teacher": "teacher.path",
    "teacher_heads": "teacher.heads",
    "encoder": "encoder.weights",
    "keep_blocks": "encoder.keep_blocks",
    "batch": "schedule.batch",
    "lr": "optim.lr",
    "seed": "seed",
    "workers": "speed.workers",
    "devices": "speed.devices",
    "precision": "speed.precision",
}
"""Options of pretrain and finetune -> the settings they stand for."""

AsText = BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)
"""`precision=32` is a number to TOML, and no mistake."""

Switch = BeforeValidator(
    lambda value: {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
)
"""`compile=true` is `on`, here."""

OrNone = BeforeValidator(lambda value: "none" if value is None else value)
"""An override's `position=none` is the name, here, and not the lack of a value."""


class EncoderSettings(Section):
    """The encoder: a name from the zoo, with any of its numbers replaced (0 = as the name says)."""

    name: str = "vit_tiny"
    image_size: int = Field(224, ge=1)
    patch: int = Field(0, ge=0)
    dim: int = Field(0, ge=0, description="width; of the first stage for Hiera, of stage 3 for HiViT and iTPN")
    depth: int = Field(0, ge=0, description="blocks of a plain ViT")
    stages: tuple[int, ...] = Field(
        (), description="blocks of each stage of a hierarchical encoder; (): as the name says"
    )
    heads: int = Field(0, ge=0)
    mlp_ratio: float = Field(0.0, ge=0)
    class_token: bool = Field(True, description="plain ViTs only; hierarchical encoders have none")
    position: Annotated[Literal["sincos", "learned", "none"], OrNone] = "sincos"
    relative: Annotated[Literal["none", "full", "qv", "shared", "decomposed"], OrNone] = Field(
        "none",
        description="relative position bias; full: per block, qkv bias kept; qv: per block, the 2023 form; shared: one "
        "for all blocks; decomposed: per axis (HiViT and iTPN as detectors)",
    )
    position_offset: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="HiViT, iTPN: added to the side that positions are interpolated to (iTPN's code: 0.1)",
    )
    qv_bias: bool = Field(False, description="biases of queries and values only (SimMIM, BEiT, BootMAE)")
    layer_scale: float | None = None
    q_pool: Literal[2, 3] = Field(2, description="Hiera: poolings; 2 in pre-training, 3 in classification")
    fuse: Annotated[Literal["none", "all", "without_last"], OrNone] = Field(
        "all", description="Hiera: ends of stages that are summed for a decoder; none: without that part"
    )
    pyramid_dim: int = Field(0, ge=0, description="iTPN: width of the feature pyramid")
    pyramid_depth: int | None = Field(
        None, ge=0, description="iTPN: MLP blocks between levels; none: as the name says; 0: no pyramid"
    )
    pyramid_hidden: int = Field(0, ge=0, description="iTPN: hidden width of the pyramid's MLPs")
    window: int = Field(0, ge=0, description="HiViT, iTPN: attention inside windows of so many patches along a side")
    global_blocks: tuple[int, ...] = Field((), description="blocks of stage 3, from 1, that attend to the whole image")
    gathering: Annotated[Literal["none", "to_tokens", "from_tokens"], OrNone] = Field(
        "none",
        description="a gathering token per window; to_tokens: all tokens read them; from_tokens: they read all tokens",
    )
    window_relative: bool = Field(False, description="a bias of relative positions inside windows (HRPE)")
    migration: float = Field(
        0.0, ge=0, lt=1, description="share of patches set aside on the way, and put back at the end (Fast-iTPN)"
    )
    drop_path: float = Field(0.0, ge=0, lt=1)
    drop_path_rule: Literal["linear", "constant"] = Field(
        "linear", description="linear: from 0 in the first block to drop_path in the last; constant: the same in all"
    )
    weights: str | None = Field(None, description="run folder or file to start from")
    keep_blocks: int | None = Field(
        None, ge=0, description="use only the first k blocks of `weights`; the others start fresh"
    )

    @model_validator(mode="after")
    def _known_and_whole(self) -> EncoderSettings:
        if self.name not in ENCODERS:
            raise ValueError(
                f"unknown encoder '{self.name}'{nearest(self.name, ENCODERS)}; known: {', '.join(ENCODERS)}"
            )
        size = ENCODERS[self.name]
        family, fields = FAMILIES[type(size)]
        for name in sorted({*ViTShape.__annotations__, *HieraShape.__annotations__, *HiViTShape.__annotations__}):
            if name in fields or name not in EncoderSettings.model_fields:
                continue
            default = EncoderSettings.model_fields[name].default
            if getattr(self, name) != default:
                raise ValueError(f"encoder.{name} is no part of {family} ({self.name}); remove it")
        for name, choices in FORMS.get(type(size), {}).items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"encoder.{name}={value} is no form of {family}; expected {' or '.join(choices)}")
        if problem := _problem(self.shape()):
            raise ValueError(problem)
        return self

    def shape(self, distillation_token: bool = False) -> Shape:
        """The architecture, with the zoo's numbers where these are 0; a distillation token is the method's wish."""
        size = ENCODERS[self.name]
        common: dict[str, Any] = {
            "image_size": self.image_size,
            "patch": self.patch or size.patch,
            "dim": self.dim or size.dim,
            "heads": self.heads or size.heads,
            "mlp_ratio": self.mlp_ratio or size.mlp_ratio,
        }
        given: dict[str, Any] = {name: getattr(self, name) for name in FAMILIES[type(size)][1] if name not in common}
        if isinstance(size, Size):
            given["depth"] = self.depth or size.depth
            return ViTShape(**common, **given, distillation_token=distillation_token)
        given["stages"] = self.stages or size.stages
        if isinstance(size, HieraSize):
            return HieraShape(**common, **given)
        depth = size.pyramid_depth if self.pyramid_depth is None else self.pyramid_depth
        dim = (self.pyramid_dim or size.pyramid_dim or 256) if depth else 0
        given |= {
            "form": size.form,
            "pyramid_depth": depth,
            "pyramid_dim": dim,
            "pyramid_hidden": self.pyramid_hidden or int(dim * size.pyramid_ratio),
        }
        if size.form == "fast":
            given |= {"position": "learned", "layer_scale": self.layer_scale or 0.1}
        return HiViTShape(**common, **given)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        shape = self.shape()
        return shape.depth if isinstance(shape, ViTShape) else sum(shape.stages)

    @property
    def width(self) -> int:
        """Width of what a decoder reads as one token, by which its own is derived."""
        shape = self.shape()
        return shape.dim * 2 ** (len(shape.stages) - 1) if isinstance(shape, HieraShape) else shape.dim


FAMILIES: dict[type, tuple[str, tuple[str, ...]]] = {
    size: (family, tuple(name for name in shape.__annotations__ if name not in ("form", "distillation_token")))
    for size, family, shape in (
        (Size, "a plain ViT", ViTShape),
        (HieraSize, "a Hiera", HieraShape),
        (HiViTSize, "a HiViT or iTPN", HiViTShape),
    )
}
"""Sizes in the zoo -> what the family is called, and the settings that are parts of it."""

FORMS: dict[type, dict[str, tuple[str, ...]]] = {
    Size: {"relative": ("none", "full", "qv", "shared")},
    HiViTSize: {"relative": ("none", "full", "decomposed"), "position": ("sincos", "learned")},
}
"""Where a family has not all the forms that a setting can name."""


def _problem(shape: Shape) -> str:
    """What is wrong with an architecture, or nothing."""
    if shape.dim % shape.heads:
        return f"width {shape.dim} is not divisible by {shape.heads} heads"
    side, what = shape.patch, "patch"
    if isinstance(shape, HieraShape):
        side, what = 2 * shape.patch, "mask unit"
        if len(shape.stages) != 4 or min(shape.stages) < 1:
            return f"encoder.stages {list(shape.stages)}: Hiera has four stages of at least one block each"
    elif isinstance(shape, HiViTShape):
        if len(shape.stages) != 3 or min(shape.stages) < 1:
            return f"encoder.stages {list(shape.stages)}: HiViT has three stages of at least one block each"
        if shape.dim % 4:
            return f"width {shape.dim} is not divisible by 4, and stage 1 has a quarter of it"
        if problem := _dense_problem(shape):
            return problem
    if not isinstance(shape, ViTShape) and shape.patch % 4:
        return f"encoder.patch {shape.patch} is not divisible by 4, and tokens of stage 1 are a quarter of a patch"
    if not isinstance(shape, HieraShape) and shape.dim % 4 and shape.position == "sincos":
        return f"width {shape.dim} is not divisible by 4, which 2-D sin-cos positions need"
    if shape.image_size % side:
        low = shape.image_size // side * side
        return (
            f"image_size {shape.image_size} is not divisible by the {what} of {side} px; "
            f"use {low or side} or {low + side}, or another patch"
        )
    return ""


def _dense_problem(shape: HiViTShape) -> str:
    """What is wrong with the options for dense inputs."""
    if not shape.window and (shape.gathering != "none" or shape.global_blocks or shape.window_relative):
        return "encoder.gathering, global_blocks and window_relative are about windows; set encoder.window (14)"
    wrong = [i for i in shape.global_blocks if not 1 <= i <= shape.stages[2]]
    if wrong:
        return f"encoder.global_blocks: no block {wrong[0]}; stage 3 has blocks 1 to {shape.stages[2]}"
    if shape.window and len(set(shape.global_blocks)) == shape.stages[2]:
        return "encoder.global_blocks has all blocks of stage 3, which leaves none to encoder.window; remove one"
    if shape.window and shape.relative != "none":
        return f"encoder.relative={shape.relative} spans the image, and encoder.window does not; use window_relative"
    return ""


class TeacherSettings(Section):
    """A frozen teacher: a run folder, a checkpoint file, a model's folder as timm or transformers save it, `timm:NAME`
    or `transformers:NAME`; `python:NAME` stands for a module given to `mimlet.train`.
    """

    path: str | None = None
    name: str | None = Field(None, description="zoo name of the file's architecture; none: read from its shapes")
    heads: int = Field(0, ge=0, description="needed where a file does not tell and the width has several customs")
    precision: Annotated[Literal["auto", "32", "bf16", "fp8", "int8"], AsText] = Field(
        "auto",
        description="auto: bf16 where the hardware computes in it, else 32; fp8, int8: its blocks' products by torchao",
    )
    grid: Literal["input", "target"] = Field(
        "input",
        description="where its grid of patches differs from the student's: resize its input, or what it answers",
    )


class AugmentSettings(Section):
    """Random resized crop, flip, and what supervised recipes add. Defaults are MAE-lite's pre-training."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear", "random"] = Field(
        "random", description="random: bilinear or bicubic per crop"
    )
    flip: float = Field(0.5, ge=0, le=1)
    pad_crop: int = Field(
        0, ge=0, description="instead of a resized crop: pad by so many pixels and crop back (small images)"
    )
    color_jitter: float = Field(0.0, ge=0)
    randaugment: str = Field("", description="timm's notation, e.g. rand-m10-mstd0.5-inc1; empty: off")
    eval_crop: float = Field(
        0.875, gt=0, le=1, description="evaluation: resize short side to size / eval_crop, then centre crop"
    )
    eval_interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class DataSettings(Section):
    """Where images come from.

    `path` takes folders, .tar/.zip archives, .parquet files, list files (.txt), `torchvision:NAME:ROOT`.
    """

    path: list[str] = []
    eval: list[str] = Field([], description="labelled images for evaluation; empty: no evaluation")
    labelled: list[str] = Field(
        [],
        description="labelled images by which an encoder is judged while it is pre-trained: on `eval`, or without it "
        "on a fifth of them",
    )
    judge: Literal["knn", "probe"] = Field(
        "knn", description="what is read from its features: nearest neighbours, or logistic regression"
    )
    subset: str = Field(
        "", description="'1%', '10%', '25' (images per class), 'lt' (long-tailed), or a list file; empty: all"
    )
    subset_seed: int = 0
    max_unreadable: float = Field(0.1, ge=0, le=1, description="share of unreadable files above which a run stops")
    decoder: Literal["pillow", "torchvision", "torchcodec"] = Field(
        "pillow", description="what reads JPEG files; Pillow reads what the others cannot"
    )
    reduced_decode: bool = Field(
        True, description="read a JPEG at 1/2, 1/4 or 1/8 where the crop keeps twice the pixels that are needed"
    )
    index: bool = Field(True, description="cache the list of files so that the next start is fast")
    augment: AugmentSettings = AugmentSettings()


class OptimSettings(Section):
    """The optimiser. The peak learning rate is `lr * batch / lr_batch`, or `lr` itself with `lr_batch = 0`."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(1.5e-4, gt=0)
    lr_batch: int = Field(256, ge=0)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(
        None, ge=0, description="it goes there by half a cosine (DINO); none: it stays"
    )
    decay_tokens: bool = Field(
        True,
        description="whether class token, mask token and position tables decay (pre-training: yes; fine-tuning: no)",
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    layer_decay: float = Field(1.0, gt=0, le=1)
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0: off")


class ScheduleSettings(Section):
    """Length of training in epochs or in optimiser steps; per step, a linear warm-up, then half a cosine or steps."""

    batch: int = Field(4096, ge=1, description="images per optimiser step, over all devices and accumulation")
    epochs: float = Field(0, ge=0)
    steps: int = Field(0, ge=0, description="instead of epochs")
    warmup_epochs: float = Field(0, ge=0)
    warmup: float = Field(0, ge=0, lt=1, description="instead of warmup_epochs: fraction of the whole training")
    decay: Literal["cosine", "step"] = Field("cosine", description="step: a tenth of the rate at every milestone")
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field([0.875], description="fractions of the training")
    eval_epochs: float = Field(
        10, ge=0, description="evaluate every so many epochs, and at the end; 0: only at the end"
    )

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleSettings:
        if bool(self.epochs) == bool(self.steps):
            raise ValueError(
                "set exactly one of epochs and steps"
                + (f" (got epochs {self.epochs} and steps {self.steps})" if self.steps else " (got none)")
            )
        if self.warmup and self.warmup_epochs:
            raise ValueError("set at most one of warmup and warmup_epochs")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} must be shorter than the {self.epochs} epochs of training"
            )
        return self


class SpeedSettings(Section):
    """How fast, not what: results change at most by rounding."""

    precision: Annotated[Literal["auto", "32", "bf16", "16"], AsText] = Field(
        "auto", description="auto: bf16 where the hardware computes in it, else 32"
    )
    accumulate: int = Field(1, ge=1, description="split each batch into so many pieces per device")
    workers: int = Field(-1, ge=-1, description="loader processes per device; -1: the processors there are, at most 8")
    compile: Annotated[Literal["auto", "off", "on", "graphs"], Switch] = Field(
        "auto",
        description="torch.compile of encoders, decoder and teacher; graphs: with CUDA graphs; auto: on for 5,000 "
        "steps or more on a GPU, else off (docs/performance.md). What fails to compile runs as it is",
    )
    augment: Literal["auto", "loader", "device"] = Field(
        "auto", description="where crops are resized, flipped and jittered; auto: on a GPU, else by the loader"
    )
    checkpointing: bool = Field(
        False, description="compute the encoder's blocks again in the backward pass instead of keeping what they hold"
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="fsdp: gradients and the optimiser's memory are divided among processes; auto: ddp"
    )
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(0, ge=0, description="0: one per process started by torchrun or SLURM")
    nodes: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> SpeedSettings:
        if self.strategy == "fsdp" and self.compile == "graphs":
            raise ValueError("speed.compile=graphs needs weights that stay in place, which fsdp moves; use on or ddp")
        if self.strategy == "fsdp" and self.precision == "16":
            raise ValueError("speed.precision=16 scales losses, which fsdp does not know here; use bf16 or ddp")
        return self


class RunSettings(Section):
    """Where results go and how often. Never changes results."""

    out: str | None = None
    log_steps: int = Field(20, ge=1)
    checkpoint_minutes: float = Field(10, gt=0)
    checkpoint_steps: int = Field(0, ge=0, description="additionally every so many steps")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    pictures: int = Field(
        8,
        ge=0,
        description="so many times, from before the first step to the end, pictures are kept; 0: only at the end",
    )
    tensorboard: bool = True
    wandb: str = Field("", description="project of Weights & Biases that gets numbers and pictures too; empty: off")
    mlflow: str = Field("", description="experiment of MLflow that gets numbers and pictures too; empty: off")
    report: bool = True
    profile: bool = Field(
        False, description="trace a few early steps: a table of where their time goes, and a trace for a viewer"
    )


class Config(Section):
    """Everything a run needs. `title` and `sweep` come from the recipe."""

    title: str = ""
    seed: int = Field(0, ge=0)
    encoder: EncoderSettings = EncoderSettings()
    method: Annotated[MethodSettings, Field(discriminator="name")]
    teacher: TeacherSettings = TeacherSettings()
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    schedule: ScheduleSettings
    speed: SpeedSettings = SpeedSettings()
    run: RunSettings = RunSettings()
    sweep: dict[str, list[Any]] = Field(
        {}, description="dotted settings (several joined by commas move together) -> values to try"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        method, problems = self.method, []
        wish = ""
        if isinstance(method, ClassifySettings) and method.distill.kind != "none":
            wish = " for method.distill"
        if isinstance(method, MaskFeatSettings) and method.target == "teacher":
            wish = " for method.target"
        if (METHODS[method.name].teacher or wish) and not self.teacher.path:
            problems.append(
                f"teacher.path: method '{method.name}' needs a teacher{wish}; "
                "give --teacher (a run folder, a checkpoint file, a model's folder, timm:NAME or transformers:NAME)"
            )
        labels = METHODS[method.name].labels
        if self.data.labelled and labels:
            problems.append(
                f"data.labelled: method '{method.name}' learns from the labels of data.path and is judged on data.eval "
                "(--eval); data.labelled is for pre-training"
            )
        if self.data.eval and not self.data.labelled and not labels:
            problems.append(
                f"data.eval: method '{method.name}' learns without labels; to judge its encoder in training give "
                "labelled images to compare with, data.labelled (--labelled), or use `mimlet probe` afterwards"
            )
        if self.data.judge != "knn" and not self.data.labelled:
            problems.append(f"data.judge: {self.data.judge} judges an encoder by data.labelled (--labelled); give both")
        if isinstance(method, LinearProbeSettings) and not self.encoder.weights:
            problems.append(
                "encoder.weights: a linear probe needs a trained encoder; give --encoder (a run folder or a file)"
            )
        if isinstance(method, BEiTSettings) and not method.tokenizer:
            problems.append(
                "method.tokenizer: method 'beit' needs a visual tokenizer; give method.tokenizer=PATH (the run folder "
                "of the method dvae, or the weights of DALL-E's encoder or a VQGAN)"
            )
        if not METHODS[method.name].encoder:
            given = {
                "data.labelled": self.data.labelled,
                "encoder.weights": self.encoder.weights,
                "optim.layer_decay": self.optim.layer_decay < 1,
            }
            problems += [
                f"{name}: method '{method.name}' trains a tokenizer, no encoder, and this is about encoders; remove it"
                for name, value in given.items()
                if value
            ]
        dim = self.encoder.width
        for name, derived in (("decoder", dim // 2), ("feature_decoder", dim)):
            decoder = getattr(method, name, None)
            if isinstance(decoder, DecoderSettings):
                heads, width = decoder.heads, decoder.dim or derived
                if width % heads or width % 4:
                    problems.append(
                        f"method.{name}: width {width} must be divisible by its {heads} heads, "
                        "and by 4 for the 2-D sin-cos positions"
                    )
                if getattr(self.encoder.shape(), "pyramid_dim", 0) and width % 16:
                    problems.append(
                        f"method.{name}: width {width} must be divisible by 16, the finest level's tokens in a patch"
                    )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Reads a recipe and applies overrides.

    `source` is a recipe's name (see `recipe_paths`), a .toml or .json file (a run's `config.json` repeats it), or a
    mapping. `base` is merged over the recipe (the command line's named options), then `overrides` of the form
    `section.key=value`, value in TOML or a bare word.
    Raises `ConfigError` with every problem at once.
    """
    values = dict(source) if isinstance(source, Mapping) else read_recipe(source)
    merge(values, base or {})
    for text in overrides:
        merge(values, parse_override(text))
    return validate(values)


def validate(values: Mapping[str, Any]) -> Config:
    """Checks raw settings; `ConfigError` lists all problems, with the nearest known name for unknown ones."""
    try:
        return Config.model_validate(values)
    except UnicodeEncodeError as error:
        raise ConfigError(f"a setting holds what is no text: {error}") from None
    except ValidationError as error:
        method = values.get("method")
        chosen = str(method.get("name", "")) if isinstance(method, Mapping) else ""
        lines = [line for item in error.errors() for line in _explain(item, chosen).split("\n")]
        count = f"{len(lines)} wrong setting{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{count}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The raw settings of a recipe name or file."""
    known = recipe_paths()
    path = known.get(str(source), Path(source))
    if not path.is_file():
        raise ConfigError(
            f"no recipe '{source}'{nearest(str(source), known)}; "
            "`mimlet recipes` lists them, or give a .toml or config.json file"
        )
    try:
        text = path.read_text(encoding="utf-8")
        values: Any = parse_json(text) if path.suffix == ".json" else parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings: expected a JSON object, got {type(values).__name__}")
    for key, value in values.items():
        if key in Config.model_fields and key not in ("title", "seed") and not isinstance(value, Mapping):
            raise ConfigError(f"{path}: {key} is a section of settings; expected a table [{key}], got {value!r}")
    return values


def recipe_paths() -> dict[str, Path]:
    """Shipped recipes by name (the file's stem)."""
    return {path.stem: path for path in sorted(RECIPES.rglob("*.toml"))}


def recipe_header(path: Path) -> dict[str, str]:
    """What a recipe's leading comment says, by key: the `# key: text` lines, continued by deeper indented ones."""
    header: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#")
        word, colon, rest = text.strip().partition(": ")
        if colon and word.isidentifier() and not text.startswith("  "):
            key, text = word, rest
        if key:
            header[key] = f"{header.get(key, '')} {text.strip()}".strip()
    return header


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value` -> nested mapping. The value is TOML (numbers, true, [lists], "strings") or a bare word."""
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"'{text}' is not an override; expected section.key=value, for example schedule.epochs=100")
    try:
        value = tomllib.loads(f"x = {raw}")["x"]
    except tomllib.TOMLDecodeError:
        value = None if raw in ("none", "null") else raw
    return nest(key.strip(), value)


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """'a.b' and 1 -> {'a': {'b': 1}}."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    result: dict[str, Any] = value
    return result


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Merges nested mappings in place; later values win."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), Mapping):
            into[key] = dict(into[key])
            merge(into[key], value)
        else:
            into[key] = value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mapping -> (dotted key, value) pairs."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed_settings(old: Config, new: Config) -> list[str]:
    """'key: old -> new' for every setting that changes the experiment; `run` and `speed` do not count."""
    before, after = (
        dict(flatten(config.model_dump(mode="json", exclude={"run", "speed", "sweep", "title"})))
        for config in (old, new)
    )
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def sweep_points(config: Config) -> list[tuple[dict[str, Any], Config]]:
    """Every combination of the recipe's `sweep`: (the settings tried, by dotted key; the configuration of that point).

    A sweep's key is one dotted setting with a list of values, or several joined by commas with a list of lists: these
    move together. All points are checked before any of them trains; raises `ConfigError`.
    """
    base = config.model_dump(mode="json", exclude={"sweep"})
    points = []
    for values in itertools.product(*config.sweep.values()):
        tried: dict[str, Any] = {}
        for joined, value in zip(config.sweep, values, strict=True):
            keys = [key.strip() for key in joined.split(",")]
            parts = value if len(keys) > 1 else [value]
            if not isinstance(parts, list) or len(parts) != len(keys):
                raise ConfigError(
                    f"sweep.'{joined}': expected lists of {len(keys)} values, one for each setting, got {value!r}"
                )
            tried |= zip(keys, parts, strict=True)
        point = dict(base)
        for key, value in tried.items():
            merge(point, nest(key, value))
        points.append((tried, validate(point)))
    return points


def set_length(values: dict[str, Any], epochs: float | None = None, steps: int | None = None) -> None:
    """Gives raw settings another length of training, in place.

    Warm-up epochs stay as they are in a longer training and keep their share of a shorter one, or of one in steps.
    """
    if epochs is not None and steps is not None:
        raise ConfigError("give a length in epochs or in steps, not both")
    schedule = values["schedule"] = dict(values.get("schedule", {}))
    before, warmup = schedule.get("epochs", 0), schedule.get("warmup_epochs", 0)
    share = warmup / before if before else 0
    if epochs is not None:
        schedule.update(epochs=epochs, steps=0)
        if share:
            schedule["warmup_epochs"] = min(warmup, share * epochs)
    if steps is not None:
        schedule.update(epochs=0, steps=steps)
        if share:
            schedule.update(warmup_epochs=0, warmup=share)


def smoke(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's raw settings shrunk so that it runs on a CPU in seconds.

    Depth and heads stay; width becomes 4 per head, the image 16 mask units, the training 3 steps. A sweep keeps two
    values of each setting, and loses those of the length. Relations are those of the teacher's last block.
    """
    small: dict[str, Any] = json.loads(json.dumps(values))
    encoder = small.setdefault("encoder", {})
    size, method = ENCODERS.get(encoder.get("name", EncoderSettings().name)), small.get("method", {})
    if size is None or method.get("name") not in METHODS:
        return small  # `validate` says what is wrong
    plain, heads = isinstance(size, Size), encoder.get("heads") or size.heads
    merge(encoder, {"image_size": 64 if isinstance(size, HieraSize) else 32, "patch": 8, "dim": 4 * heads})
    merge(
        encoder, {"heads": heads, **({"depth": encoder.get("depth") or size.depth} if isinstance(size, Size) else {})}
    )
    if isinstance(size, HiViTSize) and size.pyramid_depth:
        encoder["pyramid_dim"] = 8
    if "decoder" in METHODS[method["name"]].settings.model_fields:
        decoder = method.setdefault("decoder", {})
        merge(decoder, {"depth": 1, "dim": (4 if plain else 16) * decoder.setdefault("heads", 3)})
    if "relations" in method:
        method["relations"]["teacher_layer"] = 0
    if "mask_px" in METHODS[method["name"]].settings.model_fields:
        method["mask_px"] = 16
    if "local_size" in METHODS[method["name"]].settings.model_fields:
        merge(method, {"local_size": 16, "outputs": 64, "hidden": 32, "bottleneck": 16})
    if method["name"] == "mocov3":
        merge(method, {"outputs": 16, "hidden": 32})
    small["schedule"] = {"batch": 8, "steps": 3, "warmup": 0.4, "eval_epochs": 0}
    small["sweep"] = {
        key: tried[:2] for key, tried in small.get("sweep", {}).items() if not key.startswith("schedule.")
    }
    merge(small.setdefault("speed", {}), {"workers": 0, "accumulate": 1, "compile": False})
    merge(small.setdefault("run", {}), {"log_steps": 1, "tensorboard": False})
    return small


def check_inputs(config: Config) -> None:
    """Is everything there that the settings name? Opens no file.

    Raises `DataError` with all files that are missing, `ConfigError` for a package.
    """
    check_packages(config)
    if not config.data.path:
        raise DataError(
            "no images: give --data (a folder, an archive, a .parquet or list file, or torchvision:NAME:ROOT)"
        )
    named = [(f"data.{key}", path) for key in ("path", "eval", "labelled") for path in getattr(config.data, key)]
    named += [("encoder.weights", config.encoder.weights or ""), ("teacher.path", config.teacher.path or "")]
    if isinstance(config.method, BEiTSettings):
        named.append(("method.tokenizer", config.method.tokenizer))
    subset = config.data.subset
    if not (subset.removesuffix("%").replace(".", "", 1).isdigit() or subset == "lt"):
        named.append(("data.subset", subset))
    missing = [
        f"{key}: {missing_path(path)}"
        for key, path in named
        if path and not path.startswith(("torchvision:", "timm:", "transformers:", PYTHON)) and not Path(path).exists()
    ]
    if missing:
        raise DataError("\n".join(missing))


def check_packages(config: Config) -> None:
    """`ConfigError` where the packages of an optional logger, or torchao, are not installed. Imports none of them."""
    if config.teacher.path and config.teacher.precision in ("fp8", "int8") and not find_spec("torchao"):
        raise ConfigError(
            f"teacher.precision={config.teacher.precision} needs the package torchao: pip install 'mimlet[lowbit]'"
        )
    for logger in ("wandb", "mlflow"):
        # a mere folder of that name, such as wandb leaves, is found without an origin
        found = {name: find_spec(name) for name in (logger, "lightning")} if getattr(config.run, logger) else {}
        missing = [name for name, spec in found.items() if spec is None or spec.origin is None]
        if missing:
            packages = f"package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}"
            raise ConfigError(f"run.{logger} needs the {packages}: pip install 'mimlet[{logger}]'")


def missing_path(path: str | Path) -> str:
    """'no such file or folder PATH', with the nearest name beside it."""
    path = Path(path)
    try:
        beside = [entry.name for entry in itertools.islice(path.parent.iterdir(), 1000)]
    except OSError:
        beside = []
    return f"no such file or folder '{path}'{nearest(path.name, beside)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _explain(item: Any, method: str) -> str:
    """One pydantic error in a user's words, on several lines where one check found several problems."""
    place = [str(part) for part in item["loc"]]
    if len(place) > 1 and place[0] == "method" and place[1] in METHODS:
        del place[1]
    if len(place) > 3 and place[1] == "terms" and place[3] in TERMS:
        del place[3]
    key = ".".join(place)
    if item["type"] == "extra_forbidden":
        owners = [name for name in METHODS if key in _known_keys(name)]
        if owners and method not in owners:
            return f"{key}: not a setting of method '{method}', but of {', '.join(owners)}"
        return f"{key}: unknown setting{nearest(key, _known_keys(method))}"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found") and place[-2:-1] == ["terms"]:
        tag = item.get("ctx", {}).get("tag", "")
        what = f"{tag!r}{nearest(tag, TERMS)}" if tag else "missing"
        return f"{key}.kind: {what}; known: {', '.join(TERMS)}"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        name = (item.get("input") or {}).get("name", "") if isinstance(item.get("input"), Mapping) else ""
        what = f"{name!r}{nearest(str(name), METHODS)}" if name else "missing"
        return f"method.name: {what}; known: {', '.join(METHODS)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error" or item["type"] == "missing":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {item.get('input')!r}"


def _known_keys(method: str) -> list[str]:
    """Every dotted setting there is with this method, sections included."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for name, info in section.model_fields.items():
            yield f"{prefix}{name}"
            kind = METHODS[method].settings if name == "method" and method in METHODS else info.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from walk(kind, f"{prefix}{name}.")

    return list(walk(Config, ""))
