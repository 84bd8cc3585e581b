"""Visual tokenizers: what names every square of an image by a number, the targets of BEiT.

Three can be read: our own discrete VAE (the run folder of the method `dvae`), DALL-E's encoder (Ramesh et al.,
Zero-Shot Text-to-Image Generation, ICML 2021) and the VQGAN of taming-transformers (Esser et al., Taming Transformers
for High-Resolution Image Synthesis, CVPR 2021).

Letters: B images, K codes, D width of a code, h x w tokens.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from mimlet.errors import ConfigError, RunError, WeightsError
from mimlet.models.weights import (
    ENCODER_FILE,
    Channels,
    check_size,
    read_tensors,
    save_weights,
    stored_info,
    unfit,
)
from mimlet.untrusted import what_is_wrong

KIND = "tokenizer"
"""How the file of our own tokenizer says what it is."""


class Tokenizer(nn.Module, ABC):
    """Names each square of `stride` px of an image by a number below `vocab_size`.

    `input_size`: the only side of images that it is meant for, in px; 0: any that `stride` divides. `decodes`: whether
    `decode` can be asked.
    """

    vocab_size: int
    stride: int
    input_size: int = 0
    decodes: bool = False

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in [0, 1] -> int64 [B,H/stride,W/stride]. In float32 whatever the precision around it: an
        argmax among thousands turns on small differences.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._encode(images.float())

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Tokens [B,h,w] -> images [B,3,h*stride,w*stride] in [0, 1]."""
        assert self.decodes, "this tokenizer has no decoder; ask `decodes` first"
        with torch.autocast(ids.device.type, enabled=False):
            return self._decode(ids).clamp(0, 1)

    def freeze(self) -> Self:
        """In eval mode and without gradients, as BEiT uses it."""
        return self.requires_grad_(False).eval()

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """See `encode`."""

    def _decode(self, ids: Tensor) -> Tensor:
        """See `decode`; not yet cut to [0, 1]."""
        raise NotImplementedError


def count_codes(ids: Tensor, codes: int) -> Tensor:
    """How often each of K codes occurs in `ids`, float32 [K]."""
    flat = ids.flatten()
    return torch.zeros(codes, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))


def codebook_figures(counts: Tensor) -> dict[str, Tensor]:
    """What the counts [K] of codes say. `codebook_use`: share of the codes that occur. `codebook_perplexity`:
    exp(entropy), the number of codes that would be as uncertain if used alike; 1 where one code names everything.
    """
    share = counts / counts.sum().clamp(min=1)
    return {
        "codebook_use": (counts > 0).float().mean(),
        "codebook_perplexity": torch.special.entr(share).sum().exp(),
    }


@dataclass(frozen=True)
class VAEShape:
    """Everything that fixes a `DiscreteVAE`, as its file stores it. `mean`, `std`: how its input is normalised."""

    image_size: int
    codes: int = 8192
    dim: int = 256
    hidden: int = 64
    layers: int = 3
    residual_blocks: int = 1
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)


class DiscreteVAE(Tokenizer):
    """A small discrete VAE (the sizes of BEiT's own class).

    Encoder: `layers` times [4x4 convolution of stride 2, ReLU, residual blocks], then a 1x1 convolution to K logits.
    Decoder: the mirror image from the chosen codes, with transposed convolutions. A residual block adds 3x3, ReLU,
    3x3, ReLU, 1x1.
    """

    decodes = True
    mean: Tensor
    std: Tensor

    def __init__(self, shape: VAEShape) -> None:
        super().__init__()
        self.shape = shape
        self.vocab_size, self.stride, self.input_size = shape.codes, 2**shape.layers, shape.image_size
        if shape.image_size % self.stride:
            raise ConfigError(
                f"a discrete VAE of {shape.layers} layers names squares of {self.stride} px, which do not divide "
                f"images of {shape.image_size} px; change method.layers or encoder.image_size"
            )
        widths = [shape.hidden] * shape.layers
        down = zip([3, *widths], widths, strict=False)
        up = zip([shape.dim, *widths], widths, strict=False)
        self.encoder = nn.Sequential(
            *self._levels(nn.Conv2d(i, o, 4, 2, 1) for i, o in down), nn.Conv2d(shape.hidden, shape.codes, 1)
        )
        self.codebook = nn.Embedding(shape.codes, shape.dim)
        self.decoder = nn.Sequential(
            *self._levels(nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in up), nn.Conv2d(shape.hidden, 3, 1)
        )
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(shape, name)).view(1, 3, 1, 1), persistent=False)

    def _levels(self, convolutions: Iterable[nn.Module]) -> Iterator[nn.Module]:
        hidden, blocks = self.shape.hidden, self.shape.residual_blocks
        for convolution in convolutions:
            yield nn.Sequential(convolution, nn.ReLU())
            yield from (_Residual(hidden) for _ in range(blocks))

    def forward(self, images: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Normalised images [B,3,H,W] -> what is decoded from a mixture of codes, [B,3,H,W], and the logits
        [B,K,h,w]. The mixture is drawn by Gumbel softmax, sharper at a lower temperature.
        """
        logits = self.encoder(images).float()
        mixture = F.gumbel_softmax(logits, tau=temperature, dim=1)
        return self.decoder(torch.einsum("bkhw,kd->bdhw", mixture, self.codebook.weight)), logits

    def _encode(self, images: Tensor) -> Tensor:
        ids: Tensor = self.encoder((images - self.mean) / self.std).argmax(dim=1)
        return ids

    def _decode(self, ids: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.codebook(ids).permute(0, 3, 1, 2))
        return pixels * self.std + self.mean

    def save(self, folder: Path, info: Mapping[str, object]) -> None:
        """Writes it as what a run exports; `info` is stored with it. `open_tokenizer` reads it."""
        save_weights(folder / ENCODER_FILE, self.state_dict(), {**info, "kind": KIND, "shape": asdict(self.shape)})


class _Residual(nn.Module):
    """x + 1x1(ReLU(3x3(ReLU(3x3(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.path = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.path(x)
        return out


class DallE(Tokenizer):
    """DALL-E's encoder: names as in the `dall_e` package's state dict, but for weight and bias (there `w` and `b`).

    A 7x7 convolution, four groups of `blocks` residual blocks of width 1, 2, 4 and 8 times `width`, halved after each
    of the first three by max pooling, ReLU, a 1x1 convolution to the logits. Its decoder is not read.
    """

    stride = 8

    def __init__(self, width: int = 256, codes: int = 8192, blocks: int = 2) -> None:
        super().__init__()
        self.vocab_size = codes
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        parts = OrderedDict[str, nn.Module](input=nn.Conv2d(3, width, 7, padding=3))
        for i in range(1, 5):
            group = OrderedDict[str, nn.Module]()
            for j in range(1, blocks + 1):
                group[f"block_{j}"] = _DallEBlock(widths[i - (j == 1)], widths[i], 4 * blocks)
            if i < 4:
                group["pool"] = nn.MaxPool2d(2)
            parts[f"group_{i}"] = nn.Sequential(group)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(widths[-1], codes, 1)))
        self.blocks = nn.Sequential(parts)

    def _encode(self, images: Tensor) -> Tensor:
        # Its decoder's pixels are logistic: the ends of [0, 1] were pulled in (the paper's appendix A.3).
        ids: Tensor = self.blocks(0.8 * images + 0.1).argmax(dim=1)
        return ids


class _DallEBlock(nn.Module):
    """A residual block; what it adds is divided by the square of the number of `layers` in the encoder."""

    def __init__(self, inner: int, outer: int, layers: int) -> None:
        super().__init__()
        self.gain = 1 / layers**2
        self.id_path = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        hidden = outer // 4
        path = OrderedDict[str, nn.Module]()
        for i, (before, after, side) in enumerate(
            [(inner, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, outer, 1)], 1
        ):
            path[f"relu_{i}"] = nn.ReLU()
            path[f"conv_{i}"] = nn.Conv2d(before, after, side, padding=side // 2)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return out


@dataclass(frozen=True)
class VQShape:
    """Sizes of a `VQGAN`, all of which its tensors tell. `widths`: of each level, at half the resolution of the one
    before. `attention`: levels, from 0, whose blocks are followed by attention.
    """

    first: int
    widths: tuple[int, ...]
    blocks: int
    attention: frozenset[int]
    latent: int
    codes: int
    dim: int


class VQGAN(Tokenizer):
    """The VQGAN of taming-transformers, with its names: `encoder`, `quant_conv`, `quantize.embedding`,
    `post_quant_conv`, `decoder` (may be left out). A token is the nearest code.
    """

    def __init__(self, shape: VQShape, decodes: bool = True) -> None:
        super().__init__()
        self.vocab_size, self.stride, self.decodes = shape.codes, 2 ** (len(shape.widths) - 1), decodes
        self.encoder = _VQEncoder(shape)
        self.quant_conv = nn.Conv2d(shape.latent, shape.dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(shape.codes, shape.dim)})
        if decodes:
            self.post_quant_conv = nn.Conv2d(shape.dim, shape.latent, 1)
            self.decoder = _VQDecoder(shape)

    def _encode(self, images: Tensor) -> Tensor:
        z = self.quant_conv(self.encoder(2 * images - 1)).permute(0, 2, 3, 1)
        codes = self._codes()
        # |z - e|^2 without |z|^2, which all codes share
        ids: Tensor = (codes.square().sum(1) - 2 * z @ codes.T).argmin(dim=-1)
        return ids

    def _decode(self, ids: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(self._codes()[ids].permute(0, 3, 1, 2)))
        return (pixels + 1) / 2

    def _codes(self) -> Tensor:
        embedding = self.quantize["embedding"]
        assert isinstance(embedding, nn.Embedding)
        return embedding.weight


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class _VQBlock(nn.Module):
    """x + 3x3(swish(norm(3x3(swish(norm(x)))))), the shortcut being 1x1 where the width changes."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = _norm(outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        out: Tensor = self.nin_shortcut(x) + y
        return out


class _VQAttention(nn.Module):
    """Self-attention of one head between all places of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(attended)
        return out


class _Halve(nn.Module):
    """3x3 of stride 2; one row and column of zeros at the lower right only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Double(nn.Module):
    """Every place four times, then 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _level(inner: int, outer: int, blocks: int, attention: bool) -> nn.ModuleDict:
    """`blocks` residual blocks, each followed by attention or not."""
    return nn.ModuleDict(
        {
            "block": nn.ModuleList(_VQBlock(inner if i == 0 else outer, outer) for i in range(blocks)),
            "attn": nn.ModuleList(_VQAttention(outer) for _ in range(blocks if attention else 0)),
        }
    )


def _through(level: nn.ModuleDict, x: Tensor) -> Tensor:
    """A level, and its change of resolution where it has one."""
    block, attention = level["block"], level["attn"]
    assert isinstance(block, nn.ModuleList)
    assert isinstance(attention, nn.ModuleList)
    for i, layer in enumerate(block):
        x = layer(x)
        if len(attention):
            x = attention[i](x)
    for name in ("downsample", "upsample"):
        if name in level:
            x = level[name](x)
    return x


def _middle(width: int) -> nn.Sequential:
    parts = {"block_1": _VQBlock(width, width), "attn_1": _VQAttention(width), "block_2": _VQBlock(width, width)}
    return nn.Sequential(OrderedDict(parts))


class _VQEncoder(nn.Module):
    """Images -> latents."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, shape.first, 3, padding=1)
        self.down = nn.ModuleList()
        inner = shape.first
        for i, width in enumerate(shape.widths):
            level = _level(inner, width, shape.blocks, i in shape.attention)
            if i < len(shape.widths) - 1:
                level["downsample"] = _Halve(width)
            self.down.append(level)
            inner = width
        self.mid = _middle(inner)
        self.norm_out, self.conv_out = _norm(inner), nn.Conv2d(inner, shape.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            assert isinstance(level, nn.ModuleDict)
            x = _through(level, x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class _VQDecoder(nn.Module):
    """Latents -> images; `up` is numbered as the encoder's levels and walked from the last to the first."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        inner = shape.widths[-1]
        self.conv_in, self.mid = nn.Conv2d(shape.latent, inner, 3, padding=1), _middle(inner)
        levels: list[nn.Module] = []
        for i, width in reversed(list(enumerate(shape.widths))):
            level = _level(inner, width, shape.blocks + 1, i in shape.attention)
            if i > 0:
                level["upsample"] = _Double(width)
            levels.insert(0, level)
            inner = width
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = _norm(inner), nn.Conv2d(inner, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            assert isinstance(level, nn.ModuleDict)
            x = _through(level, x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


def open_tokenizer(source: str | Path) -> Tokenizer:
    """The frozen tokenizer of a run folder or weights file.

    A run folder of the method `dvae`; DALL-E's encoder as a state dict, of the `dall_e` package or of transformers'
    `FlavaImageCodebook`; a VQGAN of taming-transformers with plain vector quantisation. Files are read as weights only:
    DALL-E's released files are whole Python objects and are refused. `WeightsError` says why something cannot be used.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / ENCODER_FILE).is_file():
            raise RunError(f"{path} holds no {ENCODER_FILE}; expected the folder of a finished run of the method dvae")
        path = path / ENCODER_FILE
    tensors, metadata = read_tensors(path)
    with unfit(path):
        return _tokenizer(path, tensors, stored_info(path, metadata))


def _tokenizer(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Tokenizer:
    if info:
        if info.get("kind") != KIND:
            raise WeightsError(
                f"{path} is the {info.get('kind', 'encoder')} of a run of the method {info.get('method', 'unknown')}, "
                "not a tokenizer; train one with the method dvae (mimlet pretrain --recipe dvae)"
            )
        shape = _vae_shape(path, info.get("shape", {}))
        wide = max(shape.hidden, shape.dim)
        layers = shape.layers * (1 + shape.residual_blocks) * 2
        check_size(path, layers * 20 * wide**2 + 4 * shape.codes * wide, tensors)
        return _filled(path, DiscreteVAE(shape), tensors)
    if dall_e := _dall_e_names(tensors):
        first, last = (dall_e.get(f"blocks.{name}.weight") for name in ("input", "output.conv"))
        if first is not None and last is not None:
            blocks = max(_numbers(r"blocks\.group_1\.block_(\d+)\.", dall_e), default=1)
            check_size(path, 1000 * blocks * len(first) ** 2 + 8 * len(last) * len(first), tensors)
            return _filled(path, DallE(len(first), len(last), blocks), dall_e)
    if {"encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight"} <= tensors.keys():
        decodes = "decoder.conv_in.weight" in tensors
        state = {
            name: value
            for name, value in tensors.items()
            if name.startswith(("encoder.", "quant_conv.", "quantize.embedding."))
            or (decodes and name.startswith(("decoder.", "post_quant_conv.")))
        }
        try:
            found = _vq_shape(state)
        except KeyError as error:
            raise WeightsError(f"{path} is not a whole VQGAN: it lacks {error.args[0]}") from None
        wide = max(found.first, found.latent, found.dim, *found.widths)
        layers = len(found.widths) * (found.blocks + 3) * 2
        check_size(path, layers * 25 * wide**2 + found.codes * found.dim, tensors)
        return _filled(path, VQGAN(found, decodes), state)
    raise WeightsError(
        f"{path} is no tokenizer that can be read (its tensors begin with {next(iter(tensors))}); expected the run "
        "folder of the method dvae, DALL-E's encoder (blocks.input.w, ...) or a VQGAN of taming-transformers "
        "(encoder.conv_in.weight, ..., quantize.embedding.weight). Others, such as BEiT v2's VQ-KD, are not supported"
    )


def _filled(path: Path, tokenizer: Tokenizer, state: Mapping[str, Tensor]) -> Tokenizer:
    """The tokenizer with exactly these weights, frozen."""
    try:
        tokenizer.load_state_dict({name: value.float() for name, value in state.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise WeightsError(f"{path} is not a whole {type(tokenizer).__name__}: {reason}") from None
    return tokenizer.freeze()


def _dall_e_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DALL-E's tensors under our names, from either package's; empty where there is none."""
    state = {}
    for name, value in tensors.items():
        name = name.removeprefix("image_codebook.").replace(".group.", ".").replace(".res_path.path.", ".res_path.")
        name = re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))
        if re.match(r"blocks\.(input|group_\d|output)\.", name):
            state[name] = value
    return state


def _vq_shape(state: Mapping[str, Tensor]) -> VQShape:
    """The sizes of a VQGAN's tensors."""
    levels = range(1 + max(_numbers(r"encoder\.down\.(\d+)\.", state), default=0))
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in levels]
    blocks = 1 + max(_numbers(r"encoder\.down\.0\.block\.(\d+)\.", state), default=0)
    attention = frozenset(_numbers(r"encoder\.down\.(\d+)\.attn\.0\.", state))
    codes, dim = state["quantize.embedding.weight"].shape
    first, latent = len(state["encoder.conv_in.weight"]), len(state["encoder.conv_out.weight"])
    return VQShape(first, tuple(widths), blocks, attention, latent, codes, dim)


def _vae_shape(path: Path, stored: Mapping[str, Any]) -> VAEShape:
    try:
        for name in VAEShape.__annotations__.keys() ^ stored.keys():
            raise ValueError(f"'{name}' is missing or unknown")
        shape = TypeAdapter(VAEShape).validate_python(stored)
    except ValueError as error:
        raise WeightsError(f"{path} was written by another version of mimlet: {what_is_wrong(error)}") from None
    if min(shape.image_size, shape.codes, shape.dim, shape.hidden) <= 0 or not 0 < shape.layers <= 16:
        raise WeightsError(f"{path} describes a tokenizer that cannot be: {shape}")
    return shape


def _numbers(pattern: str, names: Iterable[str]) -> list[int]:
    """The numbers that a pattern finds at the beginning of names."""
    return [int(match[1]) for name in names if (match := re.match(pattern, name)) and len(match[1]) < 7]
