"""Masks over units of an image, and the samplers that draw them per sample.

Polarity, everywhere in mimlet: **True = hidden**, the student may not see it. A unit is what a mask decides on:
one patch for a plain ViT, 8x8 tokens for Hiera, one 16 px area for HiViT/iTPN.

Letters: B images, U mask units, V visible units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mimlet.errors import ConfigError


@dataclass(frozen=True)
class Mask:
    """Which units of each image are hidden.

    `hidden` is [B,U] bool. `ids_keep` is [B,V] int64: the visible units in the order in which the encoder
    processes them, or None where images keep different numbers (then the mask can fill, not drop).
    `ids_restore` [B,U] gives, for each unit in raster order, its place in the sequence (visible units, then hidden).
    """

    hidden: Tensor
    ids_keep: Tensor | None = None
    ids_restore: Tensor | None = None

    @staticmethod
    def from_noise(noise: Tensor, ratio: float) -> Mask:
        """MAE's rule: keep the int(U * (1 - ratio)) units with the smallest noise [B,U], in the order of that noise."""
        units = noise.shape[1]
        keep = visible_units(units, ratio)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        return Mask(ids_restore >= keep, ids_shuffle[:, :keep], ids_restore)

    @staticmethod
    def from_hidden(hidden: Tensor) -> Mask:
        """From [B,U] bool. Visible units keep raster order; `ids_keep` is None where images differ in their number."""
        counts = hidden.sum(dim=1)
        if hidden.shape[0] and not bool((counts == counts[0]).all()):
            return Mask(hidden)
        ids_shuffle = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        keep = hidden.shape[1] - int(counts[0]) if hidden.shape[0] else 0
        return Mask(hidden, ids_shuffle[:, :keep], ids_shuffle.argsort(dim=1))

    @property
    def order(self) -> Tensor:
        """All units [B,U]: the visible ones as in `ids_keep`, then the hidden ones."""
        assert self.ids_restore is not None, "this mask keeps different numbers of units per image"
        return self.ids_restore.argsort(dim=1)

    @property
    def ids_hidden(self) -> Tensor:
        """The hidden units [B,U-V], in the order in which they follow the visible ones."""
        assert self.ids_keep is not None, "this mask keeps different numbers of units per image"
        return self.order[:, self.ids_keep.shape[1] :]

    def complement(self) -> Mask:
        """The mask that hides exactly what this one shows (MIM-HD's second view); units keep their order."""
        if self.ids_keep is None or self.ids_restore is None:
            return Mask.from_hidden(~self.hidden)
        units, visible = self.hidden.shape[1], self.ids_keep.shape[1]
        return Mask(~self.hidden, self.ids_hidden, (self.ids_restore - visible) % units)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Mask:
        """The same mask on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Mask:
        """The same mask in page-locked memory (called by the data loader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Mask:
        keep, restore = (None if t is None else f(t) for t in (self.ids_keep, self.ids_restore))
        return Mask(f(self.hidden), keep, restore)


def visible_units(units: int, ratio: float) -> int:
    """How many units stay visible at a mask ratio: int(U * (1 - ratio)), as in MAE."""
    keep = int(units * (1 - ratio))
    if not 0 < ratio < 1 or keep < 1 or keep >= units:
        raise ConfigError(
            f"mask ratio {ratio} leaves {keep} of {units} units visible; expected a ratio between 0 and 1 (exclusive) "
            f"that shows and hides at least one unit: between {1 / units:.3f} and {1 - 1 / units:.3f} here"
        )
    return keep


class MaskSampler(Protocol):
    """Draws one sample's mask from a generator, and joins samples into a batch. Must be picklable (it runs in loader
    workers).
    """

    def draw(self, generator: torch.Generator) -> Tensor:
        """One sample's draw, [U]: noise or a bool map, whatever `collate` understands."""
        ...

    def collate(self, draws: Tensor) -> Mask:
        """Draws [B,U] of a batch -> its mask."""
        ...


@dataclass(frozen=True)
class RandomMasking:
    """MAE's uniform masking: `units` per image, `ratio` of them hidden."""

    units: int
    ratio: float

    def __post_init__(self) -> None:
        visible_units(self.units, self.ratio)

    def draw(self, generator: torch.Generator) -> Tensor:
        """[U] uniform noise."""
        return torch.rand(self.units, generator=generator)

    def collate(self, draws: Tensor) -> Mask:
        """Noise [B,U] -> mask."""
        return Mask.from_noise(draws, self.ratio)
