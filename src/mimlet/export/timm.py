"""Exports that timm reads without mimlet: `encoder.safetensors` with timm's names, and a description for people. What
timm has not (HiViT, iTPN) has its official names.

A folder holds one model: the encoder of a pre-training run (maybe with its decoder, for others that decode), or the
classifier of a fine-tuning run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mimlet.atomic import write_atomic
from mimlet.errors import RunError, WeightsError
from mimlet.models.decoders import Decoder
from mimlet.models.encoder import Encoder
from mimlet.models.shapes import HieraShape, Shape, ViTShape
from mimlet.models.weights import (
    DECODER_FILE,
    ENCODER_FILE,
    Channels,
    Info,
    encoder_state,
    save_decoder,
    save_weights,
    stored_shape,
    unfit,
)
from mimlet.models.weights_family import ratio_of
from mimlet.models.weights_vit import of_beit_family
from mimlet.models.zoo import HIERARCHICAL, SIZES
from mimlet.untrusted import parse_json, what_is_wrong

if TYPE_CHECKING:
    from mimlet.tasks.classify import Classify

DESCRIPTION_FILE = "encoder.json"
BEIT = "beit_base_patch16_224"
TIMM_SIZES = {SIZES[name].timm: SIZES[name] for name in ("deit_tiny", "deit_small", "vit_base", "vit_large")}
DISTILLED_SIZES = {
    f"deit_{size}_distilled_patch16_224": SIZES[name]
    for size, name in (("tiny", "deit_tiny"), ("small", "deit_small"), ("base", "vit_base"))
}

HIERA_SIZES = {
    f"{name}_224": HIERARCHICAL[name]
    for name in ("hiera_tiny", "hiera_small", "hiera_base", "hiera_base_plus", "hiera_large", "hiera_huge")
}


def export_encoder(
    folder: Path,
    encoder: Encoder,
    *,
    mean: Channels,
    std: Channels,
    decoder: Decoder | None = None,
    normalised: bool = True,
    info: Mapping[str, object] | None = None,
) -> Path:
    """Writes an encoder, and its decoder if there is one, into a folder; returns the encoder's file.

    `mean`, `std`: how its input is normalised. `normalised`: whether the decoder predicts normalised pixels. `info` is
    stored with the encoder. An older export in the folder is replaced.
    """
    description = {
        **_description("encoder", encoder.shape, mean, std, timm_arguments(encoder.shape)),
        **(info or {}),
    }
    file = _write(folder, encoder_state(encoder), description)
    if decoder is not None:
        save_decoder(folder / DECODER_FILE, decoder, normalised)
    return file


def export_classifier(
    folder: Path,
    task: Classify,
    *,
    classes: Sequence[str],
    mean: Channels,
    std: Channels,
    info: Mapping[str, object] | None = None,
) -> Path:
    """Writes a trained classifier (its averaged weights, if it keeps averages) into a folder; returns its file.

    `classes`: the names of the K classes in the order of the scores. For the rest see `export_encoder`.
    """
    if len(classes) != task.classes:
        raise RunError(f"{len(classes)} class names for a classifier of {task.classes} classes; they must agree")
    encoder, head = task.judged
    shape, pool = encoder.shape, task.settings.pool
    arguments = None if head.dist_norm else timm_arguments(shape, task.classes, pool)
    description = {
        **_description("classifier", shape, mean, std, arguments),
        "pool": pool,
        "classes": list(classes),
        **(info or {}),
    }
    return _write(folder, task.classifier_state(), description)


def timm_arguments(shape: Shape, classes: int = 0, pool: str = "") -> tuple[str, dict[str, object]] | None:
    """Name and arguments for `timm.create_model` of the same architecture; None if timm has no such model.

    `pool`: 'mean' or 'class' for classifiers, '' for an encoder that returns all tokens. The BEiT family's encoders are
    timm's `Beit`, which always has a class token. timm's models with a distillation token are plain classifiers of both
    tokens, with positions. timm's Hiera has no sum of stages (`HieraShape.fuse`). No model of timm migrates tokens.
    """
    if isinstance(shape, HieraShape):
        name, numbers = _hiera_numbers(shape)
    elif isinstance(shape, ViTShape) and (found := _vit_numbers(shape, pool)):
        name, numbers = found
    else:
        return None
    arguments: dict[str, object] = {key: ours for key, (ours, timms) in numbers.items() if ours != timms}
    return name, {**arguments, "num_classes": classes, "global_pool": {"mean": "avg", "class": "token", "": ""}[pool]}


def _hiera_numbers(shape: HieraShape) -> tuple[str, dict[str, tuple[object, object]]]:
    """Name of timm's Hiera, and its arguments: (ours, its default)."""
    ours = (shape.dim, shape.stages)
    name = next((name for name, size in HIERA_SIZES.items() if (size.dim, size.stages) == ours), "hiera_tiny_224")
    size, stride = HIERA_SIZES[name], shape.patch // 4
    return name, {
        "img_size": (shape.image_size, 224),
        "embed_dim": (shape.dim, size.dim),
        "num_heads": (shape.heads, size.heads),
        "stages": (shape.stages, size.stages),
        "q_pool": (shape.q_pool, 3),
        "mlp_ratio": (shape.mlp_ratio, 4.0),
        "patch_kernel": ((2 * stride - 1,) * 2, (7, 7)),
        "patch_stride": ((stride,) * 2, (4, 4)),
        "patch_padding": ((stride - 1,) * 2, (3, 3)),
    }


def _vit_numbers(shape: ViTShape, pool: str) -> tuple[str, dict[str, tuple[object, object]]] | None:
    """The same of timm's ViT that a plain ViT is, None without one."""
    beit = of_beit_family(shape)
    if shape.migration:
        return None
    if shape.distillation_token and (pool != "class" or beit or shape.position == "none"):
        return None
    if beit and not shape.class_token:
        return None
    known = {BEIT: SIZES["vit_base"]} if beit else DISTILLED_SIZES if shape.distillation_token else TIMM_SIZES
    name = next((name for name, size in known.items() if size.dim == shape.dim), next(iter(known)))
    size = known[name]
    numbers: dict[str, tuple[object, object]] = {
        "img_size": (shape.image_size, 224),
        "patch_size": (shape.patch, size.patch),
        "embed_dim": (shape.dim, size.dim),
        "depth": (shape.depth, size.depth),
        "num_heads": (shape.heads, size.heads),
        "mlp_ratio": (ratio_of(round(shape.dim * shape.mlp_ratio), shape.dim), 4.0),
        **(_beit_parts(shape) if beit else _plain_parts(shape)),
    }
    return name, numbers


def _plain_parts(shape: ViTShape) -> dict[str, tuple[object, object]]:
    """Arguments of timm's plain ViT: (ours, its default)."""
    return {
        "class_token": (shape.class_token, True),
        "pos_embed": ("none" if shape.position == "none" else "learn", "learn"),
        "init_values": (shape.layer_scale, None),
    }


def _beit_parts(shape: ViTShape) -> dict[str, tuple[object, object]]:
    """Arguments of timm's BEiT-B: (ours, its own). timm ignores an argument of None; 0 is no LayerScale, too."""
    return {
        "use_abs_pos_emb": (shape.position != "none", False),
        "use_rel_pos_bias": (shape.relative in ("full", "qv"), True),
        "use_shared_rel_pos_bias": (shape.relative == "shared", False),
        "init_values": (shape.layer_scale or 0, 0.1),
    }


def snippet(folder: Path) -> str:
    """Python that loads the export in a folder and runs it once, to be copied as it is."""
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise WeightsError(f"{folder} holds no {DESCRIPTION_FILE}; expected the folder of a finished run or an export")
    try:
        info = Info.model_validate(parse_json(path.read_bytes()))
        timms = info.model_extra and info.model_extra.get("timm")
        pool = str(info.model_extra.get("pool", "")) if info.model_extra else ""
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: {what_is_wrong(error)}") from None
    with unfit(path):
        shape, classes = stored_shape(path, info.shape), info.classes if info.kind == "classifier" else []
        # Only what is checked comes into the code, for somebody is going to run it.
        arguments = timm_arguments(shape, len(classes), pool) if timms else None
        kind = "classifier" if info.kind == "classifier" else "encoder"
        description = _description(kind, shape, info.mean, info.std, arguments)
        return _snippet({**description, "classes": classes}, str(folder / ENCODER_FILE))


def _description(
    kind: str, shape: Shape, mean: Channels, std: Channels, arguments: tuple[str, dict[str, object]] | None
) -> dict[str, object]:
    return {
        "kind": kind,
        "shape": asdict(shape),
        "mean": list(mean),
        "std": list(std),
        "timm": {"name": arguments[0], "kwargs": arguments[1]} if arguments else None,
    }


def _write(folder: Path, state: Mapping[str, Tensor], description: Mapping[str, object]) -> Path:
    """Writes tensors under timm's names and their description, for programs and for people."""
    (folder / DECODER_FILE).unlink(missing_ok=True)
    file = folder / ENCODER_FILE
    save_weights(file, state, description)
    text = {**description, "snippet": _snippet(description, ENCODER_FILE).splitlines()}
    write_atomic(folder / DESCRIPTION_FILE, json.dumps(text, indent=2, ensure_ascii=False) + "\n")
    return file


def _snippet(info: Mapping[str, Any], file: str) -> str:
    shape, size, use = info["shape"], info["shape"]["image_size"], "model(images)"
    images = f"""
# RGB images [B, 3, {size}, {size}] with values in [0, 1], normalised per channel
mean = torch.tensor({info["mean"]}).view(3, 1, 1)
std = torch.tensor({info["std"]}).view(3, 1, 1)
images = (torch.rand(1, 3, {size}, {size}) - mean) / std
"""
    if info["kind"] == "classifier":
        result, meaning = "scores", f"[B, {len(info['classes'])}], one score per class"
    else:
        result, meaning = "tokens", _tokens(shape)
    if info["timm"] is None:
        suffix = "" if info["kind"] == "classifier" else ".tokens"
        pyramid = ""
        if shape.get("pyramid_dim"):
            strides = tuple(shape["patch"] // each for each in (4, 2, 1))
            encoder = "model.encoder" if info["kind"] == "classifier" else "model"
            pyramid = (
                f"    levels = {encoder}(images, taps=mimlet.Taps(levels={strides})).levels"
                f"  # the pyramid, maps [B, {shape['pyramid_dim']}, h, w] by stride in px\n"
            )
        return f"""import mimlet
import torch

# timm lacks a part of this model, so mimlet loads it
model = mimlet.load({file!r})
{images}
with torch.no_grad():
    {result} = {use}{suffix}  # {meaning}
{pyramid}"""
    arguments = ", ".join(f"{key}={value!r}" for key, value in info["timm"]["kwargs"].items())
    load = f"model.load_state_dict(load_file({file!r}))"
    if info["timm"]["name"] == BEIT and not (shape["qv_bias"] or shape["relative"] == "qv"):
        load = f"""weights = load_file({file!r})
for name in [name for name in weights if name.endswith("qkv.bias")]:
    # timm's model has no bias of keys, which the softmax of attention does not see
    q, _, v = weights.pop(name).chunk(3)
    weights |= {{name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}}
model.load_state_dict(weights)"""
    fused = shape.get("fuse", "none") != "none"
    if fused:
        load = f"""weights = load_file({file!r})
# timm's model does not sum stages for a decoder, as mimlet's encoder does for its tokens
model.load_state_dict({{name: weights[name] for name in model.state_dict()}})"""
    if "fuse" in shape and info["kind"] == "encoder":
        last = "model.forward_features(images)" if fused else "model(images)"
        use = f"model.reroll({last}, {sum(shape['stages']) - 1}).flatten(1, 2)"
        meaning += ", the last block's output" if fused else ""
    return f"""import timm
import torch
from safetensors.torch import load_file

model = timm.create_model({info["timm"]["name"]!r}, {arguments})
{load}
model.eval()
{images}
with torch.no_grad():
    {result} = {use}  # {meaning}
"""


def _tokens(shape: Mapping[str, Any]) -> str:
    """What an encoder of this description returns."""
    names = [name for name in ("class", "distillation") if shape.get(f"{name}_token")]
    first = "".join(f"{name} token, " for name in names) + ("then " if names else "")
    side, dim = shape["image_size"] // shape["patch"], shape["dim"]
    if "q_pool" in shape:
        side, dim = side // (shape["q_pool"] - 1), 8 * dim
    return f"[B, {side**2 + len(names)}, {dim}]: {first}patches in raster order"
