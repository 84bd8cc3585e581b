"""Encoders by name. Free of torch: settings are checked against this table before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Shape of a plain ViT. `timm` is the name of the timm model it corresponds to, given the other numbers as
    arguments.
    """

    dim: int
    depth: int
    heads: int
    patch: int = 16
    timm: str = "vit_tiny_patch16_224"


SIZES: dict[str, Size] = {
    "vit_nano": Size(64, 4, 4, 4),
    "vit_micro": Size(96, 6, 6, 4),
    "vit_mini": Size(128, 8, 8, 4),
    "vit_tiny": Size(192, 12, 12),
    "deit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 12, timm="vit_small_patch16_224"),
    "deit_small": Size(384, 12, 6, timm="vit_small_patch16_224"),
    "vit_base": Size(768, 12, 12, timm="vit_base_patch16_224"),
    "vit_large": Size(1024, 24, 16, timm="vit_large_patch16_224"),
}
"""`vit_tiny` has the 12 heads of MAE-lite, `deit_tiny` the 3 of DeiT and timm; nano, micro and mini are for images of
32 to 64 px.
"""
