"""Encoders to be looked at: opened from wherever they are, asked through one interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD
from mimlet.data.batch import prepare_view
from mimlet.errors import ConfigError
from mimlet.models.classifier import Classifier
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.foreign import Foreign, ForeignEncoder, open_teacher
from mimlet.models.parts import NORM_EPS
from mimlet.models.weights import Channels, Checkpoint, encoder_for, fill_encoder

MAPS = 2**26
"""Numbers of attention maps that are held at a time (256 MiB in float32)."""


class Subject:
    """An encoder in eval mode that takes uint8 images of `size` px and normalises them by its own `mean` and `std`.

    `prefix`: 1 if its features begin with a class token, else 0; other prefix tokens are left out. Features are those
    of whole images; `normed` of the last layer passes the norm its tokens pass before they are used: a classifier's
    `fc_norm`, else the final norm. `attending`: the blocks that attend to the whole image.
    """

    def __init__(
        self,
        encoder: nn.Module,
        label: str,
        source: str,
        mean: Channels = IMAGENET_MEAN,
        std: Channels = IMAGENET_STD,
        device: torch.device | str = "cpu",
    ) -> None:
        lacking = [name for name in ("patch", "dim", "depth", "heads", "grid", "prefix") if not hasattr(encoder, name)]
        if lacking:
            raise ConfigError(
                f"{source} is a {type(encoder).__name__} without {', '.join(lacking)}; expected an encoder of mimlet, "
                "or mimlet.ForeignEncoder(model, size) around a vision transformer of timm or transformers"
            )
        self.encoder = encoder.to(device).eval()
        self.label, self.source, self.mean, self.std, self.device = label, source, mean, std, device
        self.patch, self.dim, self.depth, self.heads = (
            int(getattr(encoder, name)) for name in ("patch", "dim", "depth", "heads")
        )
        self.grid = cast(tuple[int, int], encoder.grid)
        self.size = self.grid[0] * self.patch
        self.prefix = min(1, int(cast(int, encoder.prefix)))
        self.attending = encoder.attending if isinstance(encoder, Encoder) else tuple(range(1, self.depth + 1))
        self.sees_attention = bool(getattr(encoder, "readable", True)) and bool(self.attending)
        self.parameters = sum(parameter.numel() for parameter in encoder.parameters())

    @property
    def view(self) -> str:
        """The name of the view of an image at this size."""
        return f"{self.size} px"

    @property
    def chunk(self) -> int:
        """Images to take at a time when the attention of all blocks is asked for."""
        tokens = {block: self.prefix + math.prod(self.layout(block)[0]) for block in self.attending}
        return max(1, MAPS // sum(self.heads_of(block) * tokens[block] ** 2 for block in self.attending))

    def heads_of(self, block: int) -> int:
        """Heads of a block that attends."""
        return self.encoder.heads_of(block) if isinstance(self.encoder, Encoder) else self.heads

    def layout(self, layer: int) -> tuple[tuple[int, int], Tensor]:
        """The tokens of a layer, see `Encoder.layout`."""
        if isinstance(self.encoder, Encoder):
            return self.encoder.layout(layer)
        return self.grid, torch.arange(math.prod(self.grid))

    @property
    def has_norms(self) -> bool:
        """Whether `normed` can be asked for."""
        return not isinstance(self.encoder, ForeignEncoder) or bool(self.encoder.first_norm and self.encoder.norm)

    def fresh_norm(self) -> None:
        """Replaces the final norm by one as initialised: MAE-lite's analyses see pre-trained encoders so."""
        if isinstance(self.encoder, Encoder):
            self.encoder.norm = nn.LayerNorm(self.dim, eps=NORM_EPS).to(self.device)

    @torch.no_grad()
    def features(self, images: Tensor, taps: Taps) -> Features:
        """What `taps` asks for about images [B,3,S,S] uint8, in float32."""
        features: Features = self.encoder(prepare_view(images, self.device, self.mean, self.std), taps=taps)
        return features.trimmed(self.prefix)


def open_subject(
    source: str | Path | nn.Module, label: str = "", heads: int = 0, device: torch.device | str = "cpu"
) -> Subject:
    """Opens a run folder, a checkpoint file, a model's folder, `timm:NAME`, `transformers:NAME`, or takes a module.

    A module is put into eval mode; its own `mean` and `std`, else ImageNet's, normalise its input.

    `heads`: of a file that does not tell. Raises `WeightsError` for what is no vision transformer, such as a
    convolutional network.
    """
    if isinstance(source, nn.Module):
        name = label or type(source).__name__
        if isinstance(source, Classifier):
            return Subject(_with_its_norm(source), name, name, device=device)
        mean, std = getattr(source, "mean", IMAGENET_MEAN), getattr(source, "std", IMAGENET_STD)
        return Subject(source, name, name, mean, std, device)
    text = str(source)
    opened = open_teacher(text)
    if isinstance(opened, Foreign):
        encoder = opened.encoder
        return Subject(encoder, label or text, text, encoder.mean, encoder.std, device)
    return Subject(_encoder(opened, heads), label or text, text, opened.mean, opened.std, device)


def open_subjects(
    sources: Sequence[str | Path | nn.Module], heads: int = 0, device: torch.device | str = "cpu"
) -> list[Subject]:
    """Several, labelled by as much of the end of their paths as tells them apart."""
    if not sources:
        raise ConfigError("no model to look at: give a run folder, a weights file, timm:NAME or transformers:NAME")
    texts = [type(source).__name__ if isinstance(source, nn.Module) else str(source) for source in sources]
    named = [str(source).rstrip("/") for source in sources if not isinstance(source, nn.Module)]
    if len(set(named)) < len(named):
        raise ConfigError(f"{max(named, key=named.count)} is given twice; give each model once")
    labels = short_labels(texts)
    return [open_subject(source, label, heads, device) for source, label in zip(sources, labels, strict=True)]


def short_labels(texts: Sequence[str]) -> list[str]:
    """Each path's last part, or as many of its last parts as tell it from the others; equal ones are numbered."""
    parts = [text.rstrip("/").split("/") for text in texts]
    for count in range(1, 1 + max(map(len, parts))):
        labels = ["/".join(each[-count:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} {number}" for number, label in enumerate(labels, 1)]


def _encoder(checkpoint: Checkpoint, heads: int) -> Encoder:
    encoder = encoder_for(checkpoint, heads)
    fill_encoder(encoder, checkpoint)
    if "fc_norm.weight" in checkpoint.head:
        norm = nn.LayerNorm(encoder.dim, eps=NORM_EPS)
        norm.load_state_dict({name: checkpoint.head[f"fc_norm.{name}"] for name in ("weight", "bias")})
        encoder.norm = norm
    return encoder


def _with_its_norm(model: Classifier) -> Encoder:
    """A classifier's encoder, ending in the norm that its classifier reads."""
    encoder = deepcopy(model.encoder)
    if model.head.fc_norm is not None:
        encoder.norm = deepcopy(model.head.fc_norm)
    return encoder
