"""Encoders by name. Free of torch: settings are checked against this table before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    mlp_ratio: float = 4.0


@dataclass(frozen=True)
class HieraSize:
    """Shape of a Hiera: width and heads of its first stage, blocks of each stage."""

    dim: int
    stages: tuple[int, ...]
    heads: int
    patch: int = 16
    mlp_ratio: float = 4.0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.stages)


@dataclass(frozen=True)
class HiViTSize:
    """Shape of a HiViT, iTPN (a HiViT with a pyramid) or Fast-iTPN: width and heads of stage 3; MLP blocks of stages 1
    and 2, attention blocks of stage 3.
    """

    dim: int
    stages: tuple[int, ...]
    heads: int
    form: Literal["hivit", "fast"] = "hivit"
    pyramid_dim: int = 0
    pyramid_depth: int = 0
    patch: int = 16

    @property
    def depth(self) -> int:
        """Number of blocks, merges not counted."""
        return sum(self.stages)

    @property
    def mlp_ratio(self) -> float:
        """Of stage 3."""
        return 3.0 if self.form == "fast" else 4.0

    @property
    def pyramid_ratio(self) -> float:
        """Of the pyramid."""
        return 8 / 3 if self.form == "fast" else 4.0


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
"""Plain ViTs. `vit_tiny` has the 12 heads of MAE-lite, `deit_tiny` the 3 of DeiT and timm; nano, micro and mini are for
images of 32 to 64 px.
"""

HIERARCHICAL: dict[str, HieraSize | HiViTSize] = {
    "hiera_micro": HieraSize(24, (1, 1, 3, 1), 1, 4),
    "hiera_tiny46": HieraSize(46, (1, 2, 7, 2), 1),
    "hiera_tiny": HieraSize(96, (1, 2, 7, 2), 1),
    "hiera_small": HieraSize(96, (1, 2, 11, 2), 1),
    "hiera_base": HieraSize(96, (2, 3, 16, 3), 1),
    "hiera_base_plus": HieraSize(112, (2, 3, 16, 3), 2),
    "hiera_large": HieraSize(144, (2, 6, 36, 4), 2),
    "hiera_huge": HieraSize(256, (2, 6, 36, 4), 4),
    "hivit_micro": HiViTSize(128, (1, 1, 4), 4, patch=4),
    "hivit_tiny": HiViTSize(384, (2, 2, 10), 6),
    "hivit_small": HiViTSize(384, (4, 4, 20), 6),
    "hivit_base": HiViTSize(512, (4, 4, 20), 8),
    "hivit_large": HiViTSize(768, (2, 2, 40), 12),
    "itpn_micro": HiViTSize(128, (1, 1, 4), 4, pyramid_dim=64, pyramid_depth=1, patch=4),
    "itpn_tiny": HiViTSize(384, (1, 1, 12), 6, pyramid_dim=256, pyramid_depth=2),
    "itpn_small": HiViTSize(384, (2, 2, 20), 6, pyramid_dim=256, pyramid_depth=2),
    "itpn_base": HiViTSize(512, (3, 3, 24), 8, pyramid_dim=256, pyramid_depth=2),
    "itpn_large": HiViTSize(768, (2, 2, 40), 12, pyramid_dim=256, pyramid_depth=2),
    "fast_itpn_micro": HiViTSize(128, (1, 1, 4), 4, "fast", 64, 1, 4),
    "fast_itpn_tiny": HiViTSize(384, (1, 1, 12), 6, "fast", 256, 1),
    "fast_itpn_small": HiViTSize(384, (2, 2, 20), 6, "fast", 256, 1),
    "fast_itpn_base": HiViTSize(512, (3, 3, 24), 8, "fast", 256, 1),
    "fast_itpn_large": HiViTSize(768, (2, 2, 40), 12, "fast", 256, 1),
}
"""`hiera_tiny46` is the Hiera-Tiny of MAE-lite, `hiera_tiny` that of Hiera's authors; the micro sizes are for images of
32 to 64 px.
"""

ENCODERS: dict[str, Size | HieraSize | HiViTSize] = {**SIZES, **HIERARCHICAL}
"""All encoders by name."""
