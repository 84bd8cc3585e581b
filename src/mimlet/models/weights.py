"""Reading and writing weights: official names <-> ours, head counts, and an exact report of what was loaded.

A head count cannot be seen in the weights of a ViT: the same tensors split into 3 or 12 heads without complaint and
compute something else. Our files carry it. For foreign files it follows from width and origin where custom knows one
number, else the caller must say. Nothing is loaded in part without a word: what the encoder needs and the file lacks,
or what the file computes and the encoder cannot, is an error.

Only safetensors files and `torch.load(weights_only=True)` are read.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mimlet.atomic import write_atomic
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, nearest
from mimlet.errors import WeightsError
from mimlet.models.classifier import Classifier, ClassifierHead
from mimlet.models.decoders import Decoder
from mimlet.models.features import Taps
from mimlet.models.parts import Block, resize_positions
from mimlet.models.vit import ViT, ViTShape

Channels = tuple[float, float, float]
Normalisation = tuple[Channels, Channels]

ENCODER_FILE = "encoder.safetensors"
DECODER_FILE = "decoder.safetensors"
CONTAINERS = ("model", "model_state", "state_dict", "model_ema")
WRAPPERS = ("model.", "base_encoder.", "encoder.")
HEADS_BY_WIDTH = {192: (3, 12), 384: (6, 12), 768: (12,), 1024: (16,), 1280: (16,)}
DECODER_HEADS_BY_WIDTH = {96: (3,), 192: (6,), 512: (16,)}
HEAD_PARTS = ("fc_norm.", "head.", "head_dist.", "dist_norm.", "fc.", "pre_logits.", "attn_pool.")
OF_DECODER, OF_HEAD = "of the decoder", "of the head"
OTHER_NAMES = {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2", "pred_head.transforms.0.0.": "norm."}
"""timm's layer scale; the head's norm in MaskFeat's files, where no other follows the last block."""
FOREIGN_PARTS = ("reg_token", "register_tokens", "norm_pre.")
TABLE = "relative_position_bias_table"
FINE_TUNED_PARTS = (TABLE, "gamma_1", "gamma_2", "q_bias", "v_bias", "dist_token")
SHARED_TABLE = f"rel_pos_bias.{TABLE}"
PLAIN_NAME = re.compile(
    r"(cls|dist)_token|pos_embed|(patch_embed\.proj|norm)\.(weight|bias)|rel_pos_bias\.relative_position_bias_table|"
    r"blocks\.\d+\.("
    r"(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)|gamma_[12]|attn\.([qv]_bias|relative_position_bias_table))"
)


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors by part, under bare official names.

    `encoder`: cls_token, blocks.0...; `decoder`: decoder_embed..., mask_token; `head`: fc_norm, head... `ignored` maps
    what was left aside to the reason. `heads`, `decoder_heads`, `decoder_depth` and `decoder_pixels` are stated by the
    file, else 0 or none; `customs` are the head counts that encoders of this width and origin have. `shape` and `info`
    are what our files store.
    """

    source: str
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    head: dict[str, Tensor]
    ignored: dict[str, str]
    heads: int = 0
    customs: tuple[int, ...] = ()
    decoder_heads: int = 0
    decoder_depth: int = 0
    decoder_pixels: Literal["normalised", "raw"] | None = None
    shape: ViTShape | None = None
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
        """What the decoder was trained to predict: as our files say, or as the official files' names do."""
        if self.decoder_pixels:
            return self.decoder_pixels
        name = Path(self.source).name
        return "raw" if name.startswith("mae_visualize_") else "normalised" if name.endswith("_full.pth") else None

    @property
    def depth(self) -> int:
        """Number of whole blocks."""
        return 1 + max(int(name.split(".")[1]) for name in self.encoder if name.startswith("blocks."))


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
                if reason in (OF_DECODER, OF_HEAD):
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
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with torch.serialization.safe_globals(_harmless_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and culprit:
            raise WeightsError(
                f"{path} holds more than tensors ({culprit[1]}), and reading it could run code: refused. If you trust "
                "its origin, open it yourself with torch.load, save its weights with safetensors.torch.save_file, and "
                "give that file"
            ) from None
        reason = "" if isinstance(error, pickle.UnpicklingError | KeyError) else f" ({first_line(error)})"
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
    return tensors, metadata


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
    )


def shape_of_checkpoint(checkpoint: Checkpoint, heads: int = 0, image_size: int = 0) -> ViTShape:
    """The architecture of a checkpoint: as stored, or read from the shapes of its tensors.

    `heads` is needed only where neither the file nor its width tells. `image_size` replaces the size the positions were
    made for.
    """
    heads = _decide_heads(checkpoint, heads)
    shape = checkpoint.shape
    if shape is None:
        state = checkpoint.encoder
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        own = f"blocks.0.attn.{TABLE}" in state
        qv = "blocks.0.attn.q_bias" in state
        scale = state.get("blocks.0.gamma_1")
        shape = ViTShape(
            image_size=_image_side(checkpoint) * patch,
            patch=patch,
            dim=dim,
            depth=checkpoint.depth,
            heads=heads,
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
            class_token="cls_token" in state,
            position="learned" if "pos_embed" in state else "none",
            relative=("qv" if qv else "full") if own else "shared" if SHARED_TABLE in state else "none",
            qv_bias=qv and not own,
            layer_scale=None if scale is None else float(scale.float().mean()),
            distillation_token="dist_token" in state,
        )
    return replace(shape, image_size=image_size or shape.image_size)


def load_encoder(source: str | Path, heads: int = 0, image_size: int = 0) -> tuple[ViT, LoadReport]:
    """An encoder built for and filled from a run folder, file or `timm:NAME`."""
    checkpoint = open_checkpoint(source)
    encoder = ViT(shape_of_checkpoint(checkpoint, heads, image_size))
    return encoder, fill_encoder(encoder, checkpoint)


def load_encoder_weights(encoder: ViT, source: str | Path, keep_blocks: int | None = None) -> LoadReport:
    """Fills a given encoder.

    With `keep_blocks` k only the embeddings and the first k blocks are used, and the others stay as they are; 0 loads
    nothing. `WeightsError` where head count, width, patch or depth differ, where anything expected is missing, or where
    the file has parts that the encoder would leave out.
    """
    return fill_encoder(encoder, open_checkpoint(source), keep_blocks)


@torch.no_grad()
def fill_encoder(encoder: ViT, checkpoint: Checkpoint, keep_blocks: int | None = None) -> LoadReport:
    """See `load_encoder_weights`."""
    report = LoadReport(checkpoint.source, skipped=dict(checkpoint.ignored))
    report.skipped.update(dict.fromkeys(checkpoint.decoder, OF_DECODER) | dict.fromkeys(checkpoint.head, OF_HEAD))
    if keep_blocks == 0:
        report.notes.append("keep_blocks 0: nothing loaded")
        return report
    if "mean" in checkpoint.info and "std" in checkpoint.info:
        report.normalised = (checkpoint.mean, checkpoint.std)
    kept = encoder.depth if keep_blocks is None else keep_blocks
    _check_fit(encoder, checkpoint, keep_blocks, report)
    _check_form(encoder, checkpoint)
    only = f"only the first {kept} blocks are used"
    state = dict(checkpoint.encoder)
    if SHARED_TABLE in state and encoder.shape.relative in ("full", "qv"):
        shared = state.pop(SHARED_TABLE)
        state |= {f"blocks.{i}.attn.{TABLE}": shared for i in range(encoder.depth)}
        report.notes.append("the table of relative positions that all blocks shared starts the table of each block")
    for name in list(state):
        if _block(name) >= kept or (name.startswith("norm.") and kept < encoder.depth):
            report.skipped[name] = only
            del state[name]
    for name, parameter in encoder.state_dict().items():
        if name in state:
            value = _fitted(checkpoint, name, state.pop(name), parameter, encoder, report)
            parameter.copy_(value)
            report.loaded.append(name)
        elif name in report.skipped or _block(name) >= kept:
            report.fresh[name] = only
        else:
            report.fresh[name] = _why_fresh(name, checkpoint)
    for name in state:
        if not name.endswith("attn.qkv.bias"):
            hint = (
                "Only the method classify with method.distill.token=distillation can go on with such an encoder"
                if name == "dist_token"
                else "Expected a whole encoder of one form"
            )
            raise WeightsError(
                f"{checkpoint.source} has {name}, which the encoder lacks: it would compute something else. {hint}"
            )
        report.skipped[name] = "the encoder has separate biases of queries and values"
    return report


@torch.no_grad()
def load_decoder(checkpoint: Checkpoint, encoder: ViT, heads: int = 0, report: LoadReport | None = None) -> Decoder:
    """The decoder stored with an encoder, for the grid of `encoder`. `report`: that of the encoder's loading, where the
    decoder's tensors then count as loaded.

    An error if any of its tensors is missing: a half random decoder trains on without a word.
    """
    source = checkpoint.source
    state = {name.removeprefix("decoder_"): value for name, value in checkpoint.decoder.items()}
    if "embed.weight" not in state or "pred.weight" not in state:
        raise WeightsError(
            f"{source} holds no decoder, and one is needed here. Of the official MAE files only *_full.pth and "
            "mae_visualize_*.pth hold one"
        )
    dim, out = state["embed.weight"].shape[0], state["pred.weight"].shape[0]
    depth = 1 + max(map(_block, state))
    customs = DECODER_HEADS_BY_WIDTH.get(dim, ())
    heads = _agreed(source, "decoder heads", checkpoint.decoder_heads, heads) or (customs[0] if customs else 0)
    if not heads:
        raise WeightsError(f"{source}: a decoder of width {dim} does not tell its head count; say decoder heads")
    if checkpoint.decoder_depth not in (0, depth):
        raise WeightsError(
            f"{source}: its decoder has {checkpoint.decoder_depth} blocks, and {depth} of them are there; "
            "a decoder without its last blocks is never used"
        )
    decoder = Decoder(encoder.dim, encoder.grid, encoder.prefix, out, dim, depth, heads)
    report = report or LoadReport(source)
    for name, parameter in decoder.state_dict().items():
        official = name if name == "mask_token" else f"decoder_{name}"
        if name not in state:
            raise WeightsError(f"{source} lacks {official}; a partly random decoder is never used")
        parameter.copy_(_fitted(checkpoint, official, state[name], parameter, encoder, report))
        report.loaded.append(official)
        report.skipped.pop(official, None)
    return decoder


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


def load(source: str | Path, heads: int = 0) -> ViT | Classifier:
    """The model of a run folder, a weights file or `timm:NAME`, in eval mode.

    What mimlet fine-tuned is a `Classifier`; everything else is the encoder. `heads`: see `load_encoder`.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.info.get("kind") == "classifier":
        return _classifier(checkpoint, heads)
    encoder = ViT(shape_of_checkpoint(checkpoint, heads))
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


def of_beit_family(shape: ViTShape) -> bool:
    """Whether an encoder has a part that timm has in `Beit` and not in its plain ViT: relative positions, or biases of
    queries and values alone.
    """
    return shape.relative != "none" or shape.qv_bias


def encoder_state(encoder: ViT) -> dict[str, Tensor]:
    """An encoder's tensors under timm's names; a distillation token has a row of zeros in timm's table of positions."""
    state = encoder.state_dict()
    if not of_beit_family(encoder.shape):
        state = {
            name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): value
            for name, value in state.items()
        }
    if encoder.dist_token is not None and encoder.pos_embed is not None:
        table = state["pos_embed"]
        state["pos_embed"] = torch.cat([table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]], dim=1)
    return state


def save_decoder(path: Path, decoder: Decoder, normalised: bool) -> None:
    """Writes a decoder under its official names, with its head count and whether it predicts normalised pixels."""
    state = decoder.state_dict()
    heads = next((block.attn.heads for block in decoder.blocks if isinstance(block, Block)), 0)
    official = {name if name == "mask_token" else f"decoder_{name}": value for name, value in state.items()}
    depth = len(decoder.blocks)
    save_weights(
        path,
        official,
        {"kind": "decoder", "heads": heads, "depth": depth, "pixels": "normalised" if normalised else "raw"},
    )


def checkpoint_of_timm(model: nn.Module, source: str) -> Checkpoint:
    """The weights of a timm model if our encoder computes the same from them, else a `WeightsError` with the reason."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise WeightsError(
            f"{source} is a {type(model).__name__}, not a plain ViT; only timm's VisionTransformer models can be read"
        )
    config: Any = model.pretrained_cfg
    attention: Any = model.get_submodule("blocks.0.attn")
    info = {"mean": config["mean"], "std": config["std"]}
    checkpoint = replace(_sorted(source, model.state_dict(), info), heads=attention.num_heads)
    encoder = ViT(shape_of_checkpoint(checkpoint))
    fill_encoder(encoder, checkpoint)
    size = encoder.shape.image_size
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval().forward_features(images)
        features = encoder.eval()(images, taps=Taps(hidden=(encoder.depth,)))
    ours = features.latent if "norm.weight" in checkpoint.encoder else features.hidden[encoder.depth]
    if ours.shape != expected.shape or not torch.allclose(ours, expected, rtol=1e-3, atol=1e-3):
        raise WeightsError(
            f"{source} is not a plain ViT: same weights, other results (another activation, norm or token order)"
        )
    return checkpoint


_DAMAGE = (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, OSError)


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
    state = checkpoint.head
    if "head.weight" not in state:
        raise WeightsError(f"{checkpoint.source} has no classification head; give a fine-tuned model")
    encoder = ViT(shape_of_checkpoint(checkpoint, heads))
    fill_encoder(encoder, checkpoint)
    pool: Literal["mean", "class"] = "mean" if "fc_norm.weight" in state else "class"
    token: Literal["class", "distillation"] = "class" if encoder.dist_token is None else "distillation"
    head = ClassifierHead(encoder.dim, len(state["head.weight"]), pool, "head_dist.weight" in state, token=token)
    strange = head.state_dict().keys() ^ state.keys()
    if strange:
        raise WeightsError(f"{checkpoint.source} has another head than a linear classifier's ({min(strange)})")
    head.load_state_dict(state)
    return Classifier(encoder, head, tuple(checkpoint.info.get("classes", ()))).eval()


def _from_file(path: Path) -> Checkpoint:
    tensors, metadata = read_tensors(path)
    info = stored_info(path, metadata)
    if info.get("kind") == "tokenizer":
        raise WeightsError(
            f"{path} is a visual tokenizer (method {info.get('method')}), not an encoder; it serves the method beit as "
            "method.tokenizer"
        )
    checkpoint = _sorted(str(path), tensors, info, metadata.get("container", ""))
    if "shape" not in info:
        return checkpoint
    try:
        shape = ViTShape(**info["shape"])
    except TypeError as error:
        raise WeightsError(f"{path} was written by another version of mimlet: {first_line(error)}") from None
    return replace(checkpoint, heads=shape.heads, shape=shape)


def stored_info(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our files store beside their tensors."""
    try:
        info: dict[str, Any] = json.loads(metadata.get("mimlet", "{}"))
    except ValueError as error:
        raise WeightsError(f"{path} carries a damaged description: {first_line(error)}") from None
    return info


def _sorted(source: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any], container: str = "") -> Checkpoint:
    """Strips wrappers, brings names to ours, sorts tensors by part."""
    state = {name.removeprefix("module."): value for name, value in tensors.items()}
    wrapper = next((w for w in WRAPPERS if f"{w}patch_embed.proj.weight" in state), "")
    ignored = {name: f"not part of '{wrapper[:-1]}'" for name in state if not name.startswith(wrapper)}
    state = {name.removeprefix(wrapper): value for name, value in state.items() if name.startswith(wrapper)}
    for theirs, ours in OTHER_NAMES.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    whole = {_block(name) for name in state if name.endswith(".attn.proj.weight")}
    encoder, decoder, head = {}, {}, {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            ignored[name] = "computed, not learned"
        elif _block(name) >= 0 and _block(name) not in whole:
            ignored[name] = "the attention-only block of D²-MAE"
        elif PLAIN_NAME.fullmatch(name):
            encoder[name] = value
        elif name.startswith("decoder_") or name == "mask_token":
            decoder[name] = value
        elif name.startswith(HEAD_PARTS):
            head[name] = value
        elif name.startswith(("blocks.", "patch_embed.", *FOREIGN_PARTS)):
            raise WeightsError(f"{source} is not a plain ViT: its {wrapper}{name} has no place in one")
        else:
            ignored[name] = "not known"
    needed = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"]
    if "shape" not in info:
        needed.append(_relative_table(encoder) or "pos_embed")
    for name in needed:
        if name not in encoder:
            first = next(iter(tensors))
            raise WeightsError(
                f"{source} is not a plain ViT: no {name} among its {len(tensors)} tensors ({first}, ...)"
            )
    if "dist_token" in encoder:
        _move_position(encoder)
    customs = HEADS_BY_WIDTH.get(len(encoder["patch_embed.proj.weight"]), ())
    # MAE-lite (saved under "model", wrapped in "model.") and MoCo v3 have 12 heads in ViT-Tiny and ViT-Small too.
    if 12 in customs and ((container, wrapper) == ("model", "model.") or wrapper == "base_encoder."):
        customs = (12,)
    return Checkpoint(source, encoder, decoder, head, ignored, customs=customs, info=info)


def _move_position(encoder: dict[str, Tensor]) -> None:
    """Adds the distillation token's row of the table to the token itself, as our encoder has none for it. DeiT's and
    timm's tables have that row (2 + N), G2SD's have not (1 + N).
    """
    table = encoder["pos_embed"]
    patches = table.shape[1] - 2
    if math.isqrt(patches) ** 2 == patches:
        encoder["dist_token"] = encoder["dist_token"] + table[:, 1:2]
        encoder["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)


def _check_fit(encoder: ViT, checkpoint: Checkpoint, keep_blocks: int | None, report: LoadReport) -> None:
    state, source = checkpoint.encoder, checkpoint.source
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    known = checkpoint.heads or (checkpoint.customs[0] if len(checkpoint.customs) == 1 else 0)
    numbers = {
        "width": (dim, encoder.dim),
        "patch": (patch, encoder.patch),
        "head count": (known or encoder.heads, encoder.heads),
    }
    for what, (theirs, ours) in numbers.items():
        if theirs != ours:
            raise WeightsError(
                f"{source} has {what} {theirs}, the encoder {ours}; they must agree "
                "(see encoder.name, encoder.dim, encoder.patch, encoder.heads)"
            )
    if ("cls_token" in state) != bool(encoder.prefix):
        raise WeightsError(
            f"{source} has {'a' if 'cls_token' in state else 'no'} class token, "
            f"the encoder {'one' if encoder.prefix else 'none'}: set encoder.class_token"
        )
    if keep_blocks is None and checkpoint.depth != encoder.depth:
        raise WeightsError(
            f"{source} has {checkpoint.depth} blocks, the encoder {encoder.depth}. "
            "Set encoder.depth, or encoder.keep_blocks to use the first ones"
        )
    if keep_blocks is not None and keep_blocks > min(checkpoint.depth, encoder.depth):
        raise WeightsError(
            f"encoder.keep_blocks {keep_blocks} is too many: {source} has {checkpoint.depth} blocks, "
            f"the encoder {encoder.depth}"
        )
    if not known:
        report.notes.append(f"the file does not tell its head count: taken as the encoder's {encoder.heads}")


def _check_form(encoder: ViT, checkpoint: Checkpoint) -> None:
    """Refuses a file with positions, biases or a layer scale that the encoder has no place for; says what to set."""
    state, shape, form = checkpoint.encoder, encoder.shape, dict[str, str]()
    separate, table = "blocks.0.attn.q_bias" in state, _relative_table(state)
    if ("pos_embed" in state) != (shape.position != "none"):
        learned = checkpoint.shape.position if checkpoint.shape else "learned"
        form["position"] = learned if "pos_embed" in state else "none"
    if table and shape.relative in (("none",) if table == SHARED_TABLE else ("none", "shared")):
        form["relative"] = "qv" if separate else "full"
    if separate and not (shape.qv_bias or "qv" in (shape.relative, form.get("relative"))):
        form["qv_bias"] = "true"
    if "blocks.0.gamma_1" in state and shape.layer_scale is None:
        form["layer_scale"] = "0.1"
    if form:
        wanted = " ".join(f"encoder.{name}={value}" for name, value in form.items())
        keep = "; or relative=shared, to keep one table for all blocks" if table == SHARED_TABLE else ""
        raise WeightsError(
            f"{checkpoint.source} is a ViT with parts that the encoder lacks, or without some of its parts: it would "
            f"compute something else. Set {wanted}{keep if 'relative' in form else ''}"
        )


def _fitted(
    checkpoint: Checkpoint, name: str, value: Tensor, parameter: Tensor, encoder: ViT, report: LoadReport
) -> Tensor:
    """The value in the shape of the parameter: a table of positions is resized, anything else must fit."""
    if name.endswith("pos_embed") and value.shape[1] != parameter.shape[1]:
        side = _side(checkpoint, name, value, encoder.placed)
        report.resized[name] = f"{side} x {side} to {encoder.grid[0]} x {encoder.grid[1]} patches, bicubic"
        value = resize_positions(value, (side, side), encoder.grid, encoder.placed)
    if value.shape != parameter.shape:
        raise WeightsError(
            f"{checkpoint.source}: {name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
        )
    return value


def _why_fresh(name: str, checkpoint: Checkpoint) -> str:
    """Why the file may lack a tensor of the encoder; a `WeightsError` if it may not."""
    kind = next((part for part in FINE_TUNED_PARTS if name.endswith(part)), None)
    if kind and not any(other.endswith(kind) for other in checkpoint.encoder):
        return "only the fine-tuned form has it"
    if name.startswith("norm.") and "fc_norm.weight" in checkpoint.head:
        return "a classifier with mean pooling has none"
    raise WeightsError(f"{checkpoint.source} lacks the encoder's {name}; expected a whole encoder")


def _decide_heads(checkpoint: Checkpoint, heads: int) -> int:
    heads = _agreed(checkpoint.source, "heads", checkpoint.heads, heads)
    if heads or len(checkpoint.customs) == 1:
        return heads or checkpoint.customs[0]
    width = len(checkpoint.encoder["patch_embed.proj.weight"])
    customs = " or ".join(map(str, checkpoint.customs)) or "an unknown number of"
    raise WeightsError(
        f"{checkpoint.source} does not tell its head count, and encoders of width {width} have {customs} heads "
        "(timm and DeiT: width / 64; MAE-lite: 12). Say which: heads=12, or teacher.heads=12 for a teacher"
    )


def _agreed(source: str, what: str, stored: int, given: int) -> int:
    if stored and given and stored != given:
        raise WeightsError(
            f"{source} has {stored} {what}, {given} were asked for; the weights would compute something else"
        )
    return stored or given


def _side(checkpoint: Checkpoint, name: str, table: Tensor, prefix: int) -> int:
    """Side of the square grid that a table of positions [1, P + N, D] is for."""
    side = math.isqrt(table.shape[1] - prefix)
    if side * side + prefix != table.shape[1]:
        raise WeightsError(
            f"{checkpoint.source} is not a plain ViT: {name} has {table.shape[1]} rows, "
            f"expected {f'{prefix} + ' if prefix else ''}a square number"
        )
    return side


def _image_side(checkpoint: Checkpoint) -> int:
    """Patches along a side of the images that an encoder was made for, from its table of positions."""
    state = checkpoint.encoder
    if "pos_embed" in state:
        return _side(checkpoint, "pos_embed", state["pos_embed"], int("cls_token" in state))
    return (math.isqrt(len(state[_relative_table(state)]) - 3) + 1) // 2


def _relative_table(state: Mapping[str, Tensor]) -> str:
    """Name of the table of relative positions that all blocks share, or of the first block's own; empty without."""
    return next((name for name in (SHARED_TABLE, f"blocks.0.attn.{TABLE}") if name in state), "")


def _block(name: str) -> int:
    """Number of the block, from 0, that a tensor belongs to; -1 outside blocks."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" and parts[1].isdigit() else -1


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
