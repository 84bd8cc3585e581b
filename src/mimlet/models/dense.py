"""What detectors and segmenters read of an encoder: maps of several strides."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.errors import ConfigError
from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps


class DenseMaps(nn.Module):
    """`images [B,3,h,w] -> maps [B,C,h/s,w/s]`, finest first: the levels of an encoder's pyramid, or without one the
    ends of its stages; then pooled copies of the coarsest.

    `extra`: "average" adds two maps, each the 2 x 2 average of the one before (iTPN's detectors: strides 4 to 64 px);
    "max" adds one of 2 x 2 maxima (its segmenter). `join`: levels and stages of a stride stand together as channels, in
    this order (iTPN's segmenter). `strides` and `channels` describe the maps.
    """

    def __init__(self, encoder: Encoder, extra: Literal["average", "max"] = "average", join: bool = False) -> None:
        super().__init__()
        if not encoder.stages:
            raise ConfigError(
                f"{encoder.family} has maps of one stride only; dense maps need a hierarchical encoder (hiera_tiny, "
                "hivit_tiny, itpn_tiny, fast_itpn_tiny, ...)"
            )
        if join and not encoder.levels:
            raise ConfigError(
                f"{encoder.family} without a pyramid has nothing to join its stages to; set join to false, or choose "
                "an encoder with one (itpn_tiny, fast_itpn_tiny, ...)"
            )
        self.encoder, self.extra = encoder, extra
        maps = encoder.levels or encoder.stages
        read = tuple(sorted(maps))
        self.taps = Taps(
            levels=read if encoder.levels else (), stages=read if join or not encoder.levels else (), tokens=False
        )
        self.channels = [maps[stride] + (encoder.stages[stride] if join else 0) for stride in read]
        pooled = 2 if extra == "average" else 1
        self.strides = [*read, *(read[-1] * 2**i for i in range(1, pooled + 1))]
        self.channels += [self.channels[-1]] * pooled

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images of any size that the encoder takes."""
        features = self.encoder(images, taps=self.taps)
        kinds = (kind for kind in (features.levels, features.stages) if kind)
        maps = [
            torch.cat(parts, dim=1) for parts in zip(*([kind[s] for s in sorted(kind)] for kind in kinds), strict=True)
        ]
        pool = F.avg_pool2d if self.extra == "average" else F.max_pool2d
        while len(maps) < len(self.strides):
            maps.append(pool(maps[-1], 2))
        return maps
