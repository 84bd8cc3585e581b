"""Reading and writing weights: official names <-> ours, head counts, and an exact report of what was loaded.

A head count cannot be seen in the weights of a ViT: the same tensors split into 3 or 12 heads without complaint and compute something else.
Our files carry it. For foreign files it follows from the width where custom knows one number, else the caller must say.
Only safetensors files and `torch.load(weights_only=True)` are read.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mimlet.atomic import write_atomic
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD
from mimlet.errors import WeightsError
from mimlet.models.decoders import Decoder
from mimlet.models.parts import resize_positions
from mimlet.models.vit import ViT, ViTShape

ENCODER_FILE = "encoder.safetensors"
DECODER_FILE = "decoder.safetensors"
CONTAINERS = ("model", "model_state", "state_dict", "model_ema")
WRAPPERS = ("model.", "base_encoder.", "encoder.")
HEADS_BY_WIDTH = {192: (3, 12), 384: (6, 12), 768: (12,), 1024: (16,), 1280: (16,)}
DECODER_HEADS_BY_WIDTH = {96: (3,), 192: (6,), 512: (16,)}
HEAD_PARTS = ("fc_norm.", "head.", "head_dist.", "dist_norm.", "fc.")


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors sorted by part, with bare official names: `encoder` (cls_token, blocks.0...), `decoder` (decoder_embed..., mask_token), `head`.

    `shape` is the stored architecture (our files only). `heads` is known or 0. `ignored` maps what was left aside to the reason.
    """

    source: str
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    head: dict[str, Tensor]
    ignored: dict[str, str]
    heads: int = 0
    shape: ViTShape | None = None
    info: Mapping[str, object] = field(default_factory=dict)

    @property
    def mean(self) -> tuple[float, float, float]:
        """Channel means that the encoder's input is normalised with."""
        return _triple(self.info.get("mean"), IMAGENET_MEAN)

    @property
    def std(self) -> tuple[float, float, float]:
        """Channel deviations that the encoder's input is normalised with."""
        return _triple(self.info.get("std"), IMAGENET_STD)


@dataclass
class LoadReport:
    """What a loading did, tensor by tensor."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        for title, items in (("resized", self.resized), ("in the file but not used", self.skipped), ("not in the file, left as initialised", self.fresh)):
            by_reason: dict[str, list[str]] = {}
            for name, reason in items.items():
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                lines.append(f"  {title}: {shown} ({reason})")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a .safetensors file or a PyTorch checkpoint, without ever running code from it.

    For a PyTorch checkpoint the dictionary of weights is found under the usual keys. `WeightsError` says why a file cannot be read.
    """
    if not path.is_file():
        raise WeightsError(f"no file {path}; expected a run folder, a .safetensors file or a PyTorch checkpoint")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with torch.serialization.safe_globals(_harmless_globals()):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            raise WeightsError(
                f"{path} holds more than tensors, and reading it could run code: refused. If you trust its origin, open it yourself with torch.load and "
                "save the weights with safetensors.torch.save_file, then give that file"
            ) from None
        raise WeightsError(f"{path} is not a PyTorch checkpoint: {_first_line(error)}") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged or not a weights file: {_first_line(error)}. Copy or download it again"
        ) from None
    for key in CONTAINERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no named tensors; expected a dictionary of weights, possibly under one of the keys {', '.join(CONTAINERS)}")
    return tensors, {}


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Opens a run folder, a weights file or `timm:NAME` and sorts its tensors into encoder, decoder and head."""
    text = str(source)
    if text.startswith("timm:"):
        return _from_timm(text.removeprefix("timm:"))
    path = Path(source)
    if path.is_dir():
        file = path / ENCODER_FILE
        if not file.is_file():
            raise WeightsError(f"{path} holds no {ENCODER_FILE}; expected the folder of a finished run, or a weights file")
        checkpoint = open_checkpoint(file)
        if (path / DECODER_FILE).is_file():
            decoder, _ = read_tensors(path / DECODER_FILE)
            checkpoint.decoder.update(decoder)
        return checkpoint
    tensors, metadata = read_tensors(path)
    info = json.loads(metadata["mimlet"]) if "mimlet" in metadata else {}
    shape = ViTShape(**info["shape"]) if "shape" in info else None
    return _sorted(text, tensors, shape.heads if shape else 0, shape, info)


def shape_of_checkpoint(checkpoint: Checkpoint, heads: int = 0, image_size: int = 0) -> ViTShape:
    """The architecture of a checkpoint: as stored, or read from the shapes of its tensors.

    `heads` is needed only where neither the file nor its width tells. `image_size` replaces the size the positions were made for.
    """
    if checkpoint.shape:
        shape = checkpoint.shape
        if heads and heads != shape.heads:
            raise WeightsError(f"{checkpoint.source} has {shape.heads} heads, {heads} were asked for; the weights would compute something else")
    else:
        state = checkpoint.encoder
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        class_token = "cls_token" in state
        side = round((state["pos_embed"].shape[1] - class_token) ** 0.5)
        table = any("relative_position_bias_table" in name for name in state)
        qv = any(name.endswith("q_bias") for name in state)
        scale = state.get("blocks.0.gamma_1")
        shape = ViTShape(
            image_size=side * patch,
            patch=patch,
            dim=dim,
            depth=depth,
            heads=_decide_heads(checkpoint, dim, heads),
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
            class_token=class_token,
            position="learned",
            relative=("qv" if qv else "full") if table else "none",
            layer_scale=float(scale.mean()) if scale is not None else None,
        )
    if image_size and image_size != shape.image_size:
        shape = ViTShape(**{**asdict(shape), "image_size": image_size})
    return shape


def load_encoder(source: str | Path, heads: int = 0, image_size: int = 0) -> tuple[ViT, LoadReport]:
    """An encoder built for and filled from a run folder, file or `timm:NAME`."""
    checkpoint = open_checkpoint(source)
    encoder = ViT(shape_of_checkpoint(checkpoint, heads, image_size))
    return encoder, fill_encoder(encoder, checkpoint)


def load_encoder_weights(encoder: ViT, source: str | Path, keep_blocks: int | None = None) -> LoadReport:
    """Fills a given encoder. `keep_blocks` k uses only the embeddings and the first k blocks; the others stay as they are; 0 loads nothing.

    `WeightsError` where head count, width, patch or depth differ, or where anything expected is missing.
    """
    return fill_encoder(encoder, open_checkpoint(source), keep_blocks)


@torch.no_grad()
def fill_encoder(encoder: ViT, checkpoint: Checkpoint, keep_blocks: int | None = None) -> LoadReport:
    """See `load_encoder_weights`."""
    report = LoadReport(checkpoint.source, skipped=dict(checkpoint.ignored))
    if keep_blocks == 0:
        report.notes.append("keep_blocks 0: nothing loaded")
        return report
    _check_fit(encoder, checkpoint, keep_blocks, report)
    state = dict(checkpoint.encoder)
    kept = encoder.depth if keep_blocks is None else keep_blocks
    for name, parameter in encoder.state_dict().items():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        if block >= kept or (name.startswith("norm.") and kept < encoder.depth):
            report.fresh[name] = f"only the first {kept} blocks are kept"
            state.pop(name, None)
        elif name not in state:
            report.fresh[name] = _why_fresh(name, checkpoint)
        else:
            value = state.pop(name)
            if name == "pos_embed" and value.shape != parameter.shape:
                side = round((value.shape[1] - encoder.prefix) ** 0.5)
                report.resized[name] = f"{side} x {side} to {encoder.grid[0]} x {encoder.grid[1]} patches, bicubic"
                value = resize_positions(value, (side, side), encoder.grid, encoder.prefix)
            if value.shape != parameter.shape:
                raise WeightsError(f"{checkpoint.source}: {name} has shape {tuple(value.shape)}, the encoder {tuple(parameter.shape)}")
            parameter.copy_(value)
            report.loaded.append(name)
    for name in state:
        report.skipped[name] = "the encoder has no such part"
    for name in (*checkpoint.decoder, *checkpoint.head):
        report.skipped.setdefault(name, "not part of the encoder")
    lost = [name for name, reason in report.fresh.items() if reason == "missing"]
    if lost:
        raise WeightsError(f"{checkpoint.source} lacks {len(lost)} of the encoder's tensors, for example {lost[0]}; expected a whole encoder")
    return report


@torch.no_grad()
def load_decoder(checkpoint: Checkpoint, encoder: ViT, heads: int = 0) -> Decoder:
    """The decoder stored with an encoder. An error if any of its tensors is missing: a half random decoder trains on without a word."""
    state = {name.removeprefix("decoder_"): value for name, value in checkpoint.decoder.items()}
    if "embed.weight" not in state or "pred.weight" not in state:
        raise WeightsError(
            f"{checkpoint.source} holds no decoder, and one is needed here. Of the official MAE files only *_full.pth and mae_visualize_*.pth hold one"
        )
    dim, out = state["embed.weight"].shape[0], state["pred.weight"].shape[0]
    depth = 1 + max([int(name.split(".")[1]) for name in state if name.startswith("blocks.")], default=-1)
    stored = checkpoint.info.get("decoder_heads")
    customs = (int(stored),) if isinstance(stored, int) else DECODER_HEADS_BY_WIDTH.get(dim, ())
    if not heads and len(customs) != 1:
        raise WeightsError(f"{checkpoint.source}: a decoder of width {dim} does not tell its head count; give it")
    decoder = Decoder(encoder.dim, encoder.grid, encoder.prefix, out, dim, depth, heads or customs[0])
    for name, parameter in decoder.state_dict().items():
        if name not in state:
            raise WeightsError(f"{checkpoint.source}: the decoder lacks decoder_{name}; a partly random decoder is never used")
        value = state[name]
        if name == "pos_embed" and value.shape != parameter.shape:
            side = round((value.shape[1] - encoder.prefix) ** 0.5)
            value = resize_positions(value, (side, side), encoder.grid, encoder.prefix)
        if value.shape != parameter.shape:
            raise WeightsError(f"{checkpoint.source}: decoder_{name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
        parameter.copy_(value)
    return decoder


def save_weights(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, object]) -> None:
    """Writes a safetensors file atomically, with `info` (architecture, head count, normalisation) inside."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomic(path, save(plain, metadata={"mimlet": json.dumps(info), "format": "pt"}))


def decoder_state(decoder: nn.Module) -> dict[str, Tensor]:
    """A decoder's tensors under their official names."""
    return {name if name == "mask_token" else f"decoder_{name}": value for name, value in decoder.state_dict().items()}


def _from_timm(name: str) -> Checkpoint:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        raise WeightsError(f"timm knows no model '{name}'" + (f"; it has {', '.join(close)}" if close else "; see timm.list_models()"))
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"timm could not get the weights of {name}: {_first_line(error)}. Without a network, give the path of the downloaded file instead"
        ) from None
    return checkpoint_of_timm(model, f"timm:{name}")


def checkpoint_of_timm(model: nn.Module, source: str) -> Checkpoint:
    """A timm vision transformer's weights, when it is one that our encoder computes exactly; else a `WeightsError` that names the part."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise WeightsError(f"{source} is a {type(model).__name__}; expected timm's plain VisionTransformer")
    foreign = ("norm_pre.", "q_norm", "k_norm", "reg_token", "attn_pool", "fc_norm_pre", "dist_token", "mlp.norm", "mlp.fc1_g", "patch_drop")
    state = {name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for name, v in model.state_dict().items()}
    strange = [name for name in state if any(part in name for part in foreign)]
    if strange or model.num_prefix_tokens > 1 or getattr(model, "no_embed_class", False):
        raise WeightsError(f"{source} has parts that a plain ViT lacks ({strange[0] if strange else 'more than a class token'}); it cannot be read as one")
    heads = int(model.blocks[0].attn.num_heads)
    config = getattr(model, "pretrained_cfg", None) or {}
    info = {"mean": config.get("mean", IMAGENET_MEAN), "std": config.get("std", IMAGENET_STD)}
    return _sorted(source, state, heads, None, info)


def _sorted(source: str, tensors: Mapping[str, Tensor], heads: int, shape: ViTShape | None, info: Mapping[str, object]) -> Checkpoint:
    """Strips wrappers and sorts tensors by part."""
    ignored: dict[str, str] = {}
    state = {name.removeprefix("module."): value for name, value in tensors.items()}
    for wrapper in WRAPPERS:
        if any(name.startswith(f"{wrapper}patch_embed.") for name in state):
            ignored |= {name: f"not part of '{wrapper[:-1]}'" for name in state if not name.startswith(wrapper)}
            heads = heads or (12 if wrapper == "model." else 0)  # MAE-lite trains all its ViTs, students and teachers, with 12 heads
            state = {name.removeprefix(wrapper): value for name, value in state.items() if name.startswith(wrapper)}
            break
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}, "head": {}}
    whole = {name.split(".")[1] for name in state if re.fullmatch(r"blocks\.\d+\.attn\.proj\.weight", name)}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            ignored[name] = "computed, not learned"
        elif name.startswith("blocks.") and name.split(".")[1] not in whole:
            ignored[name] = "the attention-only block of D²-MAE"
        elif name.startswith("decoder_") or name == "mask_token":
            parts["decoder"][name] = value
        elif name.startswith(HEAD_PARTS):
            parts["head"][name] = value
        elif name in ("cls_token", "pos_embed") or name.startswith(("patch_embed.", "blocks.", "norm.")):
            parts["encoder"][name] = value
        else:
            ignored[name] = "not known"
    encoder = parts["encoder"]
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in encoder]
    if missing:
        example = next(iter(tensors))
        raise WeightsError(f"{source} is not a plain ViT: no {missing[0]} among its {len(tensors)} tensors (the first is {example})")
    return Checkpoint(source, encoder, parts["decoder"], parts["head"], ignored, heads, shape, info)


def _check_fit(encoder: ViT, checkpoint: Checkpoint, keep_blocks: int | None, report: LoadReport) -> None:
    state, source = checkpoint.encoder, checkpoint.source
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    customs = (checkpoint.heads,) if checkpoint.heads else HEADS_BY_WIDTH.get(dim, ())
    known = customs[0] if len(customs) == 1 else 0
    for what, theirs, ours in (("width", dim, encoder.dim), ("patch", patch, encoder.patch), ("head count", known or encoder.heads, encoder.heads)):
        if theirs != ours:
            raise WeightsError(f"{source} has {what} {theirs}, the encoder {ours}; they must agree (see encoder.name, encoder.dim, encoder.patch, encoder.heads)")
    if ("cls_token" in state) != bool(encoder.prefix):
        raise WeightsError(f"{source} has {'a' if 'cls_token' in state else 'no'} class token, the encoder {'one' if encoder.prefix else 'none'}: set encoder.class_token")
    wanted = encoder.depth if keep_blocks is None else keep_blocks
    if wanted > depth or (keep_blocks is None and depth != encoder.depth):
        raise WeightsError(
            f"{source} has {depth} blocks; {wanted} are wanted" + ("" if keep_blocks is not None else ". Set encoder.depth, or encoder.keep_blocks to use the first ones")
        )
    if not known:
        report.notes.append(f"the file does not tell its head count: taken as the encoder's {encoder.heads}")


def _why_fresh(name: str, checkpoint: Checkpoint) -> str:
    if name.endswith(("relative_position_bias_table", "gamma_1", "gamma_2", "q_bias", "v_bias")):
        return "only the fine-tuned form has it"
    if name.startswith("norm.") and any(part.startswith("fc_norm.") for part in checkpoint.head):
        return "a classifier with mean pooling has none"
    return "missing"


def _decide_heads(checkpoint: Checkpoint, dim: int, heads: int) -> int:
    if checkpoint.heads and heads and heads != checkpoint.heads:
        raise WeightsError(f"{checkpoint.source} has {checkpoint.heads} heads, {heads} were asked for; the weights would compute something else")
    if heads or checkpoint.heads:
        return heads or checkpoint.heads
    customs = HEADS_BY_WIDTH.get(dim, ())
    if len(customs) == 1:
        return customs[0]
    raise WeightsError(
        f"{checkpoint.source} does not tell its head count, and width {dim} is used with "
        f"{' and with '.join(map(str, customs)) or 'several'} heads (DeiT and timm: width / 64; MAE-lite: 12). Say which, for example --teacher-heads 12"
    )


def _harmless_globals() -> list[object]:
    """Types that official checkpoints hold beside tensors; none of them runs code."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    return [argparse.Namespace, multiarray.scalar, np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4"))]


def _triple(value: object, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if isinstance(value, list | tuple) and len(value) == 3:
        return (float(value[0]), float(value[1]), float(value[2]))
    return default


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

