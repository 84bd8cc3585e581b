"""What is to be planned: recipe and options -> configuration, data set, and what stands in for files that are not
there. Free of torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimlet.config import (
    OPTIONS,
    Config,
    load_config,
    merge,
    missing_path,
    nearest,
    nest,
    parse_override,
    read_recipe,
    recipe_header,
    recipe_paths,
    set_length,
)
from mimlet.errors import ConfigError, DataError
from mimlet.methods.settings import METHODS
from mimlet.models.zoo import ENCODERS

MAE_DECODER = {"depth": 8, "dim": 512, "heads": 16}
"""The decoder of MAE's released teachers."""


@dataclass(frozen=True)
class DataSet:
    """Sizes of a published data set: images to train on and to judge on, classes."""

    title: str
    images: int
    judged: int
    classes: int


DATA_SETS = {
    "imagenet": DataSet("ImageNet-1K", 1_281_167, 50_000, 1000),
    "imagenet21k": DataSet("ImageNet-21K", 14_197_122, 0, 21_841),
    "tiny-imagenet-200": DataSet("TinyImageNet", 100_000, 10_000, 200),
    "cifar10": DataSet("CIFAR-10", 50_000, 10_000, 10),
    "cifar100": DataSet("CIFAR-100", 50_000, 10_000, 100),
    "pets": DataSet("Oxford-IIIT Pets", 3_680, 3_669, 37),
    "flowers": DataSet("Flowers-102", 2_040, 6_149, 102),
    "aircraft": DataSet("FGVC Aircraft", 6_667, 3_333, 100),
    "cars": DataSet("Stanford Cars", 8_144, 8_041, 196),
    "photos": DataSet("a folder of 50,000 photos", 50_000, 0, 0),
    "labelled": DataSet("a folder of 50,000 photos", 50_000, 5_000, 100),
}
"""By the first part of the `--data` in a recipe's header."""


@dataclass(frozen=True)
class StandIn:
    """What a file that is not there holds, as far as its cost goes: an architecture with random weights.

    `setting`: the dotted setting that names the file. `recipe`: raw settings whose model is taken.
    """

    setting: str
    title: str
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What is to be planned. `assumed`: the data set that the recipe is for, whose sizes count where none is given."""

    name: str
    config: Config
    assumed: DataSet
    stand_ins: tuple[StandIn, ...]


def read_request(recipe: str, overrides: Sequence[str] = (), **options: object) -> Request:
    """The request that the command line's words mean: `options` are those of pretrain and finetune, with `epochs` and
    `steps`. Files that do not exist may be named by the size that they have (`teacher="vit_base"`); unnamed ones are
    looked up in the recipe's header. Raises `ConfigError` or `DataError`.
    """
    values = read_recipe(recipe)
    path = recipe_paths().get(recipe, Path(recipe))
    header = recipe_header(path) if path.suffix == ".toml" else {}
    epochs, steps = options.pop("epochs", None), options.pop("steps", None)
    assert epochs is None or isinstance(epochs, int | float)
    assert steps is None or isinstance(steps, int)
    set_length(values, epochs, steps)
    for option, value in options.items():
        if option not in OPTIONS:
            raise ConfigError(f"plan has no option '{option}'{nearest(option, OPTIONS)}; known: {', '.join(OPTIONS)}")
        paths = option in ("data", "eval", "labelled") and isinstance(value, str | Path)
        if value not in (None, [], ()):
            merge(values, nest(OPTIONS[option], [str(value)] if paths else value))
    for text in overrides:
        merge(values, parse_override(text))
    if values.get("method", {}).get("name") != "linear_probe":
        merge(
            values, nest("encoder", {"weights": None, "keep_blocks": None})
        )  # what training starts from costs nothing
    header.setdefault("title", str(values.get("title", "")))
    stand_ins = tuple(_stand_ins(values, header))
    for each in stand_ins:
        merge(values, nest(each.setting, each.title))
    config = load_config(values)
    missing = [
        f"data.{name}: {missing_path(each)}"
        for name in ("path", "eval", "labelled")
        for each in getattr(config.data, name)
        if not each.startswith("torchvision:") and not Path(each).exists()
    ]
    if missing:
        raise DataError("\n".join(missing))
    first = _option(header.get("command", ""), "--data").partition("/")[0]
    return Request(Path(recipe).stem, config, DATA_SETS.get(first, DATA_SETS["imagenet"]), stand_ins)


def _stand_ins(values: Mapping[str, Any], header: Mapping[str, str]) -> list[StandIn]:
    """What stands in for files that the method needs and that are not there."""
    method, found = values.get("method", {}), list[StandIn]()
    if method.get("name") not in METHODS:
        return found  # `load_config` says what is wrong
    entry, teacher = METHODS[method["name"]], values.get("teacher", {})
    distils = method.get("distill", {}).get("kind", "none") != "none" or method.get("target") == "teacher"
    if (entry.teacher or distils) and not Path(teacher.get("path") or "no file").exists():
        named = _teacher(str(teacher.get("path") or teacher.get("name") or ""), header)
        if named is not None:
            title, encoder, decoder = named
            found.append(
                StandIn("teacher.path", title, _model(encoder, "classify" if entry.labels else "mae", decoder))
            )
    if method["name"] == "beit" and not Path(method.get("tokenizer") or "no file").exists():
        asked = str(method.get("tokenizer") or _option(header.get("command", ""), "method.tokenizer"))
        recipe = _recipe_in(asked)
        found.append(StandIn("method.tokenizer", recipe or "DALL-E", read_recipe(recipe) if recipe else {}))
    encoder = values.get("encoder", {})
    if method["name"] == "linear_probe" and not Path(encoder.get("weights") or "no file").exists():
        found.append(StandIn("encoder.weights", "the encoder", _model({**encoder, "weights": None}, "mae")))
    return found


def _teacher(asked: str, header: Mapping[str, str]) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """What a teacher that is not there is like: (what it is called, its settings, its decoder's); None for a model of
    timm or transformers whose size is not in the name, which has to be opened.
    """
    command = shlex.split(header.get("teacher", ""))
    if asked or not command:
        named = asked or _option(header.get("command", ""), "--teacher")
        recipe = _recipe_in(asked or f"{header.get('title', '')} {named}")
        size = _size_in(named)
        if size and not recipe:
            return size[0], size[1], MAE_DECODER
        if not recipe and asked.startswith(("timm:", "transformers:")):
            return None
        if not recipe:
            hint = f"{missing_path(asked)}, and no size" if asked else "the recipe does not say how big its teacher is"
            raise ConfigError(
                f"{hint}; give --teacher PATH, or the size to plan with: a recipe, or an encoder such as vit_base "
                "or hiera_base"
            )
        command = ["--recipe", recipe]
    recipe = command[command.index("--recipe") + 1]
    settings = read_recipe(recipe)
    for text in command:
        if "=" in text:
            merge(settings, parse_override(text))
    decoder = settings["method"].get("decoder") or {}
    return recipe, settings["encoder"], decoder if settings["method"]["name"] == "mae" else MAE_DECODER


def _model(encoder: Mapping[str, Any], method: str, decoder: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Raw settings of a training that leaves such a model."""
    settings: dict[str, Any] = {"name": method} if method == "classify" else {"name": method, "decoder": decoder or {}}
    return {"encoder": dict(encoder), "method": settings, "schedule": {"steps": 1}}


def _size_in(text: str) -> tuple[str, dict[str, Any]] | None:
    """The size that a file's or model's name names, and its settings."""
    plain = text.lower().replace("-", "_")
    names = sorted((name for name in ENCODERS if name in plain), key=len)
    if not names:
        return None
    patch = re.search(r"patch(\d+)", plain)
    settings: dict[str, Any] = {"name": names[-1]}
    if patch:
        settings |= {"patch": int(patch[1]), "image_size": 14 * int(patch[1])}
    return names[-1], settings


def _recipe_in(text: str) -> str:
    """The recipe that a word, or the end of a path, names."""
    words = re.findall(r"\w+", text)
    return next((word for word in words if word in recipe_paths()), "")


def _option(command: str, name: str) -> str:
    """What follows an option, or an equals sign, in a command."""
    found = re.search(rf"{re.escape(name)}[ =](\S+)", command)
    return found[1] if found else ""
