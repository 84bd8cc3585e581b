"""Reading and writing weights: official names <-> ours, head counts, and an exact report of what was loaded.

A head count cannot be seen in the weights: the same tensors split into 3 or 12 heads without complaint and compute
something else. Our files carry it. For foreign files it follows from width and origin where custom knows one number,
else the caller must say. Nothing is loaded in part without a word: what the encoder needs and the file lacks, or what
the file computes and the encoder cannot, is an error.

What is special to a family of encoders is in `weights_vit`, `weights_hiera` and `weights_hivit`.

Only safetensors files and `torch.load(weights_only=True)` are read. A file may come from anywhere: what it says about
itself is checked before anything is made from it, and what is made is not much larger than the file.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mimlet.atomic import write_atomic
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, nearest
from mimlet.errors import WeightsError
from mimlet.models.build import encoder_of
from mimlet.models.classifier import Classifier, ClassifierHead
from mimlet.models.decoders import Decoder, make_decoder
from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps
from mimlet.models.parts import Block, resize_positions
from mimlet.models.shapes import HieraShape, HiViTShape, Shape, ViTShape
from mimlet.models.weights_family import (
    OF_DECODER,
    OF_HEAD,
    OF_PRETRAINING,
    ONLY_FINE_TUNED,
    TABLE,
    Family,
    block_number,
    settings_for,
)
from mimlet.models.weights_hiera import HieraFamily
from mimlet.models.weights_hivit import HiViTFamily
from mimlet.models.weights_vit import ViTFamily
from mimlet.untrusted import check_inflation, parse_json, torchs_reason, what_is_wrong

Channels = tuple[float, float, float]
Normalisation = tuple[Channels, Channels]

ENCODER_FILE = "encoder.safetensors"
DECODER_FILE = "decoder.safetensors"
CONTAINERS = ("model", "model_state", "state_dict", "model_ema", "module")
WRAPPERS = ("model.", "base_encoder.", "encoder.")
DECODER_HEADS_BY_WIDTH = {96: (3,), 192: (6,), 512: (16,)}
ROOM = 2**30
"""So many numbers a model may have in any case (4 GiB in float32); beyond, 16 times as many as its file."""
FAMILIES: tuple[Family, ...] = (HieraFamily(), HiViTFamily(), ViTFamily())
"""In the order in which they are asked whether a file is theirs."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors by part, under bare official names.

    `encoder`: cls_token, blocks.0...; `decoder`: decoder_embed..., mask_token; `head`: fc_norm, head... `ignored` maps
    what was left aside to the reason. `heads`, `decoder_heads`, `decoder_depth`, `decoder_pixels` and
    `decoder_position` are stated by the file, else 0 or none; `customs` are the head counts that encoders of this width
    and origin have. `shape` and `info` are what our files store.
    """

    source: str
    family: Family
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    head: dict[str, Tensor]
    ignored: dict[str, str]
    heads: int = 0
    customs: tuple[int, ...] = ()
    decoder_heads: int = 0
    decoder_depth: int = 0
    decoder_pixels: Literal["normalised", "raw"] | None = None
    decoder_position: Literal["sincos", "learned"] | None = None
    shape: Shape | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Channels:
        """Channel means that the encoder's input is normalised with."""
        return triple(self.info.get("mean", IMAGENET_MEAN))

    @property
    def std(self) -> Channels:
        """Channel deviations that the encoder's input is normalised with."""
        return triple(self.info.get("std", IMAGENET_STD))

    @property
    def pixels(self) -> Literal["normalised", "raw"] | None:
        """What the decoder was trained to predict: as our files say, as all of the family do, or as the official files'
        names say.
        """
        if self.decoder_pixels:
            return self.decoder_pixels
        if self.family.pixels:
            return self.family.pixels
        name = Path(self.source).name
        return "raw" if name.startswith("mae_visualize_") else "normalised" if name.endswith("_full.pth") else None


@dataclass
class LoadReport:
    """What a loading did, tensor by tensor: names, and reasons or sizes. `normalised`: mean and deviation that the
    encoder's images had, where its file tells.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    normalised: Normalisation | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        titles = {
            "resized": self.resized,
            "in the file but not used": self.skipped,
            "not in the file, left as initialised": self.fresh,
        }
        for title, items in titles.items():
            by_reason: dict[str, list[str]] = {}
            for name, reason in items.items():
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                if reason in (OF_DECODER, OF_HEAD, OF_PRETRAINING):
                    lines.append(f"  {len(names)} tensors {reason} not used")
                    continue
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                lines.append(f"  {title}: {shown} ({reason})")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a .safetensors file or a PyTorch checkpoint, without ever running code from it.

    In a PyTorch checkpoint the dictionary of weights is found under the usual keys; the metadata then names the key as
    `container`. `WeightsError` says why a file cannot be read.
    """
    if not path.is_file():
        raise WeightsError(f"no file {path}; expected a run folder, a .safetensors file or a PyTorch checkpoint")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return _plain(path, tensors), file.metadata() or {}
        check_inflation(path, path.stat().st_size)
        with torch.serialization.safe_globals(_harmless_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # the readers raise nearly every type on damaged files
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and culprit:
            raise WeightsError(
                f"{path} holds more than tensors ({culprit[1]}), and reading it could run code: refused. If you trust "
                "its origin, open it yourself with torch.load, save its weights with safetensors.torch.save_file, and "
                "give that file"
            ) from None
        known = isinstance(error, SafetensorError | RuntimeError | EOFError | ValueError | OSError)
        reason = f" ({torchs_reason(error)})" if known and torchs_reason(error) else ""
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged or not a weights file{reason}; "
            "copy or download it again"
        ) from None
    metadata: dict[str, str] = {}
    for key in CONTAINERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded, metadata = loaded[key], {"container": key}
            break
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise WeightsError(
            f"{path} holds no named tensors; expected a dictionary of weights, "
            f"possibly under one of the keys {', '.join(CONTAINERS)}"
        )
    return _plain(path, tensors), metadata


def _plain(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, if they are no more than numbers in memory, of which many tensors can share few."""
    for name, value in tensors.items():
        dense = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not dense or value.is_complex():
            raise WeightsError(f"{path}: {name} is not a plain tensor ({value.dtype}, {value.layout}, {value.device})")
        if not value.numel():
            raise WeightsError(f"{path}: {name} is empty, {list(value.shape)}")
    check_size(path, sum(value.numel() for value in tensors.values()), tensors)
    return tensors


@contextmanager
def unfit(source: str | Path) -> Iterator[None]:
    """What names and shapes that fit no model lead to, as a `WeightsError`."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{source} does not hold what its names promise ({type(error).__name__}: {first_line(error)}); "
            "expected the weights of one whole model"
        ) from error


def check_size(source: str | Path, numbers: float, state: Mapping[str, Tensor]) -> None:
    """Refuses to make a model of about so many numbers from a file that holds far fewer."""
    stored = {value.untyped_storage().data_ptr(): value for value in state.values()}.values()
    held = sum(value.untyped_storage().nbytes() // value.element_size() for value in stored)
    if numbers > 16 * held + ROOM:
        raise WeightsError(
            f"{source} describes a model of up to {numbers:,.0f} numbers, and holds only {held:,}; it is damaged"
        )


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Opens a run folder, a weights file or `timm:NAME` and sorts its tensors into encoder, decoder and head."""
    if str(source).startswith("timm:"):
        return _from_timm(str(source).removeprefix("timm:"))
    path = Path(source)
    if not path.is_dir():
        return _from_file(path)
    if not (path / ENCODER_FILE).is_file():
        raise WeightsError(f"{path} holds no {ENCODER_FILE}; expected the folder of a finished run, or a weights file")
    checkpoint = _from_file(path / ENCODER_FILE)
    if not (path / DECODER_FILE).is_file():
        return checkpoint
    decoder, metadata = read_tensors(path / DECODER_FILE)
    info = stored_info(path / DECODER_FILE, metadata)
    return replace(
        checkpoint,
        decoder=decoder,
        decoder_heads=info.get("heads", 0),
        decoder_depth=info.get("depth", 0),
        decoder_pixels=info.get("pixels"),
        decoder_position=info.get("position"),
    )


def shape_of_checkpoint(checkpoint: Checkpoint, heads: int = 0, image_size: int = 0) -> Shape:
    """The architecture of a checkpoint: as stored, or read from the shapes of its tensors.

    `heads` (of the first stage of a Hiera) is needed only where neither the file nor its width tells. `image_size`
    replaces the size the positions were made for.
    """
    with unfit(checkpoint.source):
        heads = _decide_heads(checkpoint, heads)
        shape = checkpoint.shape or checkpoint.family.shape(checkpoint, heads)
        _check_shape(checkpoint, shape)
    return replace(shape, image_size=image_size or shape.image_size)


def _check_shape(checkpoint: Checkpoint, shape: Shape) -> None:
    """Refuses an architecture that no encoder has, or that is far larger than the file."""
    blocks = [shape.depth] if isinstance(shape, ViTShape) else [*shape.stages, getattr(shape, "pyramid_depth", 0)]
    numbers = [shape.image_size, shape.patch, shape.dim, shape.heads, shape.mlp_ratio, sum(blocks)]
    impossible = min(numbers) <= 0 or min(blocks) < 0 or shape.dim % shape.heads or shape.image_size % shape.patch
    if isinstance(shape, HiViTShape):
        pyramid = shape.pyramid_dim and min(shape.pyramid_dim, shape.pyramid_hidden) <= 0
        impossible = impossible or shape.dim % 4 or pyramid
    if impossible:
        raise WeightsError(f"{checkpoint.source} describes an encoder that cannot be: {shape}")
    if sum(blocks) > len(checkpoint.encoder):
        raise WeightsError(
            f"{checkpoint.source} describes {sum(blocks)} blocks, and holds {len(checkpoint.encoder)} tensors"
        )
    width = max(shape.dim * (8 if isinstance(shape, HieraShape) else 1), getattr(shape, "pyramid_hidden", 0))
    tokens = (shape.image_size / shape.patch * (4 if isinstance(shape, HieraShape) else 1)) ** 2
    relative = getattr(shape, "relative", "none") != "none"
    weights = sum(blocks) * width**2 * (8 + 4 * shape.mlp_ratio) + 3 * shape.dim * shape.patch**2
    windows = getattr(shape, "window", 0) ** 4
    check_size(checkpoint.source, weights + tokens * shape.dim + relative * tokens**2 + windows, checkpoint.encoder)


def load_encoder(source: str | Path, heads: int = 0, image_size: int = 0) -> tuple[Encoder, LoadReport]:
    """An encoder built for and filled from a run folder, file or `timm:NAME`."""
    checkpoint = open_checkpoint(source)
    encoder = encoder_for(checkpoint, heads, image_size)
    return encoder, fill_encoder(encoder, checkpoint)


def encoder_for(checkpoint: Checkpoint, heads: int = 0, image_size: int = 0) -> Encoder:
    """An encoder of a checkpoint's architecture, see `shape_of_checkpoint`, that is yet to be filled."""
    shape = shape_of_checkpoint(checkpoint, heads, image_size)
    with unfit(checkpoint.source):
        return encoder_of(shape)


def load_encoder_weights(encoder: Encoder, source: str | Path, keep_blocks: int | None = None) -> LoadReport:
    """Fills a given encoder.

    With `keep_blocks` k only the embeddings and the first k blocks (with the merges before them) are used, and the
    others stay as they are; 0 loads nothing. `WeightsError` where family, head count, width, patch or blocks differ,
    where anything expected is missing, or where the file has parts that the encoder would leave out.
    """
    return fill_encoder(encoder, open_checkpoint(source), keep_blocks)


@torch.no_grad()
def fill_encoder(encoder: Encoder, checkpoint: Checkpoint, keep_blocks: int | None = None) -> LoadReport:
    """See `load_encoder_weights`."""
    with unfit(checkpoint.source):
        return _fill(encoder, checkpoint, keep_blocks)


def _fill(encoder: Encoder, checkpoint: Checkpoint, keep_blocks: int | None) -> LoadReport:
    family = family_of(encoder)
    report = LoadReport(checkpoint.source, skipped=dict(checkpoint.ignored))
    report.skipped.update(dict.fromkeys(checkpoint.decoder, OF_DECODER) | dict.fromkeys(checkpoint.head, OF_HEAD))
    if keep_blocks == 0:
        report.notes.append("keep_blocks 0: nothing loaded")
        return report
    if "mean" in checkpoint.info and "std" in checkpoint.info:
        report.normalised = (checkpoint.mean, checkpoint.std)
    if family is not checkpoint.family:
        shape = checkpoint.shape or checkpoint.family.shape(checkpoint, 1)
        raise WeightsError(
            f"{checkpoint.source} is {checkpoint.family.title}, the encoder {family.title}; set {settings_for(shape)}"
        )
    family.check(encoder, checkpoint, keep_blocks, report)
    suited = family.adapted(encoder, checkpoint, report)

    def is_kept(name: str) -> bool:
        return keep_blocks is None or family.block_of(name, encoder) < keep_blocks

    only = f"only the first {keep_blocks} blocks are used"
    report.skipped.update((name, only) for name in suited if not is_kept(name))
    state = {name: value for name, value in suited.items() if is_kept(name)}
    for name, parameter in encoder.state_dict().items():
        if name in state:
            value = state.pop(name)
            if value.shape != parameter.shape and (resized := family.resized(name, value, encoder, report.source)):
                value, report.resized[name] = resized
            _copy(report, name, value, parameter)
        elif reason := family.why_fresh(name, suited, checkpoint) if is_kept(name) else only:
            report.fresh[name] = reason
            if reason == ONLY_FINE_TUNED and name.endswith(TABLE):
                parameter.zero_()  # a bias that starts without changing what was learned without it
        else:
            raise WeightsError(f"{checkpoint.source} lacks the encoder's {name}; expected a whole encoder")
    for name in state:
        raise WeightsError(
            f"{checkpoint.source} has {name}, which the encoder lacks: it would compute something else. "
            f"{family.hint(name)}"
        )
    return report


def family_of(encoder: Encoder) -> Family:
    """What knows the weights of an encoder."""
    return next(family for family in FAMILIES if isinstance(encoder.shape, family.shape_type))


@torch.no_grad()
def load_decoder(checkpoint: Checkpoint, encoder: Encoder, heads: int = 0, report: LoadReport | None = None) -> Decoder:
    """The decoder stored with an encoder, for the grid of `encoder`. `report`: that of the encoder's loading, where the
    decoder's tensors then count as loaded.

    An error if any of its tensors is missing: a half random decoder trains on without a word.
    """
    with unfit(checkpoint.source):
        return _load_decoder(checkpoint, encoder, heads, report)


def _load_decoder(checkpoint: Checkpoint, encoder: Encoder, heads: int, report: LoadReport | None) -> Decoder:
    source, state = checkpoint.source, checkpoint.decoder
    if "decoder_pred.weight" not in state:
        raise WeightsError(
            f"{source} holds no decoder, and one is needed here. Of the official MAE files only *_full.pth and "
            "mae_visualize_*.pth hold one; those of Hiera, HiViT and iTPN's pixel pre-training do"
        )
    out, dim = state["decoder_pred.weight"].shape
    depth = 1 + max(block_number(name.removeprefix("decoder_")) for name in state)
    customs = DECODER_HEADS_BY_WIDTH.get(dim, ())
    heads = _agreed(source, "decoder heads", checkpoint.decoder_heads, heads) or (customs[0] if customs else 0)
    if not heads:
        raise WeightsError(f"{source}: a decoder of width {dim} does not tell its head count; say decoder heads")
    if checkpoint.decoder_depth not in (0, depth):
        raise WeightsError(
            f"{source}: its decoder has {checkpoint.decoder_depth} blocks, and {depth} of them are there; "
            "a decoder without its last blocks is never used"
        )
    position = checkpoint.decoder_position or checkpoint.family.decoder_position
    _check_blocks(source, [name.removeprefix("decoder_") for name in state])
    check_size(source, 24 * depth * dim**2 + (out + encoder.dim + math.prod(encoder.grid)) * dim, state)
    decoder = make_decoder(encoder, out, dim, depth, heads, position)
    report = report or LoadReport(source)
    for name, parameter in decoder.state_dict().items():
        official = official_name(name)
        if official not in state:
            raise WeightsError(f"{source} lacks {official}; a partly random decoder is never used")
        value = state[official]
        if name == "pos_embed" and value.shape[1] != parameter.shape[1]:
            side = checkpoint.family.side(source, official, value, decoder.prefix)
            report.resized[official] = f"{side} x {side} to {decoder.grid[0]} x {decoder.grid[1]} patches, bicubic"
            value = resize_positions(value, (side, side), decoder.grid, decoder.prefix)
        _copy(report, official, value, parameter)
        report.skipped.pop(official, None)
    return decoder


def official_name(name: str) -> str:
    """What a decoder's tensor is called in official files: HiViT-MAE's norm of the stages it embeds is `norm`."""
    if name == "mask_token" or name.startswith("embed.norm."):
        return name.removeprefix("embed.")
    return f"decoder_{name}".replace("decoder_embed.embed.", "decoder_embed.")


class Renormalised(nn.Module):
    """A model whose input arrives with another mean and deviation per channel than its own."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, given: Normalisation, own: Normalisation) -> None:
        super().__init__()
        self.model = model
        scale, shift = renormalisation(given, own)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B,3,h,w], normalised as given -> the model's output."""
        output: Tensor = self.model(images * self.scale + self.shift)
        return output


def renormalisation(given: Normalisation, own: Normalisation) -> tuple[Tensor, Tensor]:
    """Scale and shift [1,3,1,1] that turn images normalised with `given` (mean, std) into ones with `own`."""
    (mean, std), (own_mean, own_std) = (torch.tensor(pair).view(2, 1, 3, 1, 1) for pair in (given, own))
    return std / own_std, (mean - own_mean) / own_std


def load(source: str | Path, heads: int = 0) -> Encoder | Classifier:
    """The model of a run folder, a weights file or `timm:NAME`, in eval mode.

    What mimlet fine-tuned is a `Classifier`; everything else is the encoder. `heads`: see `load_encoder`.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.info.get("kind") == "classifier":
        return _classifier(checkpoint, heads)
    encoder = encoder_for(checkpoint, heads)
    fill_encoder(encoder, checkpoint)
    return encoder.eval()


def load_classifier(
    source: str | Path, heads: int = 0, *, mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD
) -> nn.Module:
    """A classifier [B,3,h,w] -> [B,K] in eval mode: a run folder, a ViT's weights file, or any classifier of timm.

    `mean`, `std`: how its images will arrive normalised. `WeightsError` if there is no classification head.
    """
    if str(source).startswith("timm:"):
        timms = create_timm(str(source).removeprefix("timm:"))
        config: Any = timms.pretrained_cfg
        if not timms.num_classes:
            raise WeightsError(f"{source} has no classification head; choose a model that was trained on labels")
        own = (triple(config["mean"]), triple(config["std"]))
        return timms.eval() if own == (mean, std) else Renormalised(timms, (mean, std), own).eval()
    checkpoint = open_checkpoint(source)
    classifier = _classifier(checkpoint, heads)
    own = (checkpoint.mean, checkpoint.std)
    return classifier if own == (mean, std) else Renormalised(classifier, (mean, std), own).eval()


def save_weights(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, object]) -> None:
    """Writes a safetensors file atomically, with `info` (architecture, head count, normalisation) inside.

    Equal weights and info give equal bytes. safetensors shuffles its metadata, so there is one entry only.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomic(path, save(plain, metadata={"mimlet": json.dumps(info)}))


def encoder_state(encoder: Encoder) -> dict[str, Tensor]:
    """An encoder's tensors under the names that travel: timm's where timm has the family, else the official ones. A
    ViT's distillation token has a row of zeros in timm's table of positions.
    """
    return family_of(encoder).state(encoder)


def classifier_state(encoder: Encoder, head: ClassifierHead) -> dict[str, Tensor]:
    """A classifier's tensors as one flat model under such names; with mean pooling without the encoder's final norm."""
    family = family_of(encoder)
    return {**family.state(encoder, classifier=head.fc_norm is not None), **family.head_state(head.state_dict())}


def save_decoder(path: Path, decoder: Decoder, normalised: bool) -> None:
    """Writes a decoder under its official names, with its head count and whether it predicts normalised pixels. A patch
    is in the order (row, column, channel), also Hiera's, whose official order is (channel, row, column).
    """
    info = {
        "kind": "decoder",
        "heads": next((block.attn.heads for block in decoder.blocks if isinstance(block, Block)), 0),
        "depth": len(decoder.blocks),
        "pixels": "normalised" if normalised else "raw",
        "position": decoder.position,
    }
    save_weights(path, {official_name(name): value for name, value in decoder.state_dict().items()}, info)


def checkpoint_of_timm(model: nn.Module, source: str) -> Checkpoint:
    """The weights of a timm model if our encoder computes the same from them, else a `WeightsError` with the reason."""
    from timm.models.hiera import Hiera
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer | Hiera):
        raise WeightsError(
            f"{source} is a {type(model).__name__}, not a plain ViT; only timm's VisionTransformer models and Hiera "
            "can be read"
        )
    config: Any = model.pretrained_cfg
    attention: Any = model.get_submodule("blocks.0.attn")
    info = {"mean": config["mean"], "std": config["std"]}
    heads = attention.heads if isinstance(model, Hiera) else attention.num_heads
    checkpoint = replace(_sorted(source, model.state_dict(), info), heads=heads)
    encoder = encoder_for(checkpoint)
    fill_encoder(encoder, checkpoint)
    size = encoder.shape.image_size
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval().forward_features(images)
        features = encoder.eval()(images, taps=Taps(hidden=(encoder.depth,)))
    normed = not isinstance(model, Hiera) and "norm.weight" in checkpoint.encoder
    ours = features.latent if normed else features.hidden[encoder.depth]
    if ours.shape != expected.shape or not torch.allclose(ours, expected, rtol=1e-3, atol=1e-3):
        raise WeightsError(
            f"{source} is not {checkpoint.family.title}: same weights, other results (another activation, norm or "
            "token order)"
        )
    return checkpoint


def _from_timm(name: str) -> Checkpoint:
    return checkpoint_of_timm(create_timm(name), f"timm:{name}")


def create_timm(name: str) -> nn.Module:
    """A model of timm with its published weights; `WeightsError` where there is none or no way to it."""
    import timm

    if not timm.is_model(name):
        raise WeightsError(f"timm has no model '{name}'{nearest(name, timm.list_models())}; see timm.list_models()")
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except OSError as error:
        raise WeightsError(
            f"the weights of timm:{name} could not be fetched: {first_line(error)}. Without a network, "
            "download the model's file elsewhere and give its path instead"
        ) from None
    except RuntimeError as error:
        raise WeightsError(
            f"timm has no weights for '{name}': {first_line(error)}; see timm.list_pretrained()"
        ) from None
    return model


def _classifier(checkpoint: Checkpoint, heads: int) -> Classifier:
    with unfit(checkpoint.source):
        return _with_head(checkpoint, heads)


def _with_head(checkpoint: Checkpoint, heads: int) -> Classifier:
    state = checkpoint.head
    if "head.weight" not in state:
        raise WeightsError(f"{checkpoint.source} has no classification head; give a fine-tuned model")
    encoder = encoder_for(checkpoint, heads)
    fill_encoder(encoder, checkpoint)
    pool: Literal["mean", "class"] = "mean" if "fc_norm.weight" in state else "class"
    token: Literal["class", "distillation"] = "distillation" if encoder.prefix == 2 else "class"
    outputs, names = len(state["head.weight"]), tuple(checkpoint.info.get("classes", ()))
    if names and len(names) != outputs:
        raise WeightsError(f"{checkpoint.source} has {len(names)} names for {outputs} classes; they must agree")
    check_size(checkpoint.source, 3 * outputs * encoder.dim, state)
    head = ClassifierHead(encoder.dim, outputs, pool, "head_dist.weight" in state, token=token)
    strange = head.state_dict().keys() ^ state.keys()
    if strange:
        raise WeightsError(f"{checkpoint.source} has another head than a linear classifier's ({min(strange)})")
    head.load_state_dict(state)
    return Classifier(encoder, head, names).eval()


def _from_file(path: Path) -> Checkpoint:
    tensors, metadata = read_tensors(path)
    info = stored_info(path, metadata)
    if info.get("kind") == "tokenizer":
        raise WeightsError(
            f"{path} is a visual tokenizer (method {info.get('method')}), not an encoder; it serves the method beit as "
            "method.tokenizer"
        )
    with unfit(path):
        checkpoint = _sorted(str(path), tensors, info, metadata.get("container", ""))
    if "shape" not in info:
        return checkpoint
    shape = stored_shape(path, info["shape"])
    return replace(checkpoint, heads=shape.heads, shape=shape)


def stored_shape(path: Path, values: Mapping[str, Any]) -> Shape:
    """The architecture from its description, which does not say which family."""
    kind: type[Shape] = HieraShape if "q_pool" in values else HiViTShape if "form" in values else ViTShape
    try:
        for name in values.keys() - kind.__annotations__.keys():
            raise ValueError(f"an encoder has no '{name}'")
        return TypeAdapter[Shape](kind).validate_python(values)
    except ValueError as error:
        raise WeightsError(
            f"{path} is damaged, or was written by another version of mimlet: shape: {what_is_wrong(error)}"
        ) from None


class Info(BaseModel):
    """What our files store beside their tensors, as far as it is read again."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    kind: str = "encoder"
    method: str = ""
    mean: Channels = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    shape: dict[str, Any] = {}
    classes: list[str] = []
    heads: NonNegativeInt = 0
    depth: NonNegativeInt = 0
    pixels: Literal["normalised", "raw"] | None = None
    position: Literal["sincos", "learned"] | None = None


def stored_info(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our files store beside their tensors (see `Info`), as far as it is there."""
    try:
        return Info.model_validate(parse_json(metadata.get("mimlet", "{}"))).model_dump(exclude_unset=True)
    except ValueError as error:
        raise WeightsError(f"{path} carries a damaged description: {what_is_wrong(error)}") from None


def _sorted(source: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any], container: str = "") -> Checkpoint:
    """Strips wrappers, finds the family, brings names to ours, sorts tensors by part."""
    state = {name.removeprefix("module."): value for name, value in tensors.items()}
    wrapper = next((w for w in WRAPPERS if f"{w}patch_embed.proj.weight" in state), "")
    ignored = {name: f"not part of '{wrapper[:-1]}'" for name in state if not name.startswith(wrapper)}
    state = {name.removeprefix(wrapper): value for name, value in state.items() if name.startswith(wrapper)}
    family = next(family for family in FAMILIES if family.recognises(state))
    _check_blocks(source, state)
    state, stored = family.renamed(state), "shape" in info
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}, "head": {}}
    for name, value in state.items():
        part = "computed, not learned" if name.endswith("relative_position_index") else family.part(name, state)
        if part in parts:
            parts[part][name] = value
        elif part:
            ignored[name] = part
        elif name.startswith(family.foreign) or (name.startswith(("blocks.", "patch_embed.")) and not stored):
            raise WeightsError(f"{source} is not {family.title}: its {wrapper}{name} has no place in one")
        elif stored:
            parts["encoder"][name] = value
        else:
            ignored[name] = "not known"
    encoder, decoder, head = parts.values()
    for name in family.needed(encoder, stored):
        if name not in encoder:
            first = next(iter(tensors))
            raise WeightsError(
                f"{source} is not {family.title}: no {name} among its {len(tensors)} tensors ({first}, ...)"
            )
    customs = family.customs(encoder, container, wrapper)
    return Checkpoint(source, family, encoder, decoder, head, ignored, customs=customs, info=info)


def _check_blocks(source: str, names: Iterable[str]) -> None:
    """Refuses blocks with gaps between them: a number alone would make as many."""
    there = {block_number(name) for name in names} - {-1}
    if gaps := set(range(len(there))) - there:
        raise WeightsError(f"{source} lacks block {min(gaps)} of its blocks up to {max(there)}; expected a whole model")


def _copy(report: LoadReport, name: str, value: Tensor, parameter: Tensor) -> None:
    """Fills a parameter, which a tensor has to fit."""
    if value.shape != parameter.shape:
        raise WeightsError(f"{report.source}: {name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
    parameter.copy_(value)
    report.loaded.append(name)


def _decide_heads(checkpoint: Checkpoint, heads: int) -> int:
    heads = _agreed(checkpoint.source, "heads", checkpoint.heads, heads)
    if heads or len(checkpoint.customs) == 1:
        return heads or checkpoint.customs[0]
    family = checkpoint.family
    customs = " or ".join(map(str, checkpoint.customs)) or "an unknown number of"
    example = f"heads={family.heads_example}"
    raise WeightsError(
        f"{checkpoint.source} does not tell its head count, and encoders of width {family.width(checkpoint.encoder)} "
        f"have {customs} heads ({family.heads_hint}). Say which: {example}, or teacher.{example} for a teacher"
    )


def _agreed(source: str, what: str, stored: int, given: int) -> int:
    if stored and given and stored != given:
        raise WeightsError(
            f"{source} has {stored} {what}, {given} were asked for; the weights would compute something else"
        )
    return stored or given


def _harmless_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Types that official checkpoints hold beside tensors; none of them runs code."""
    scalar = np.float64(0).__reduce__()[0]
    assert callable(scalar)
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")]
    return [argparse.Namespace, np.dtype, *kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]


def triple(values: Any) -> Channels:
    """Three numbers, one per channel."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def first_line(error: BaseException) -> str:
    """What an error says, shortly."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
