"""Encoders from their shapes, and from settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mimlet.models.encoder import Encoder
from mimlet.models.hiera import Hiera
from mimlet.models.hivit import HiViT
from mimlet.models.shapes import HieraShape, HiViTShape, Shape
from mimlet.models.vit import ViT

if TYPE_CHECKING:
    from mimlet.config import EncoderSettings


def encoder_of(shape: Shape, drop_path: float = 0.0, constant_drop_path: bool = False) -> Encoder:
    """A freshly initialised encoder (for masked pre-training). Weights are loaded by `mimlet.models.weights`."""
    if isinstance(shape, HieraShape):
        return Hiera(shape, drop_path, constant_drop_path)
    if isinstance(shape, HiViTShape):
        return HiViT(shape, drop_path, constant_drop_path)
    return ViT(shape, drop_path, constant_drop_path)


def build_encoder(settings: EncoderSettings, distillation_token: bool = False) -> Encoder:
    """The encoder that settings describe, see `encoder_of`."""
    shape = settings.shape(distillation_token)
    return encoder_of(shape, settings.drop_path, settings.drop_path_rule == "constant")


def settings_of(shape: Shape) -> dict[str, Any]:
    """Settings of `[encoder]` that describe a shape, under a name of its family."""
    fields = asdict(shape)
    if isinstance(shape, HieraShape):
        return {"name": "hiera_tiny", **fields}
    if isinstance(shape, HiViTShape):
        del fields["form"]
        return {"name": "fast_itpn_tiny" if shape.form == "fast" else "itpn_tiny", **fields}
    del fields["distillation_token"]
    return {"name": "vit_tiny", **fields}
