"""Masks over units of an image, and the samplers that draw them per sample.

Polarity, everywhere in mimlet: **True = hidden**, the student may not see it. A unit is what a mask decides on:
one patch for a plain ViT, 8x8 tokens for Hiera, one 16 px area for HiViT/iTPN.

Letters: B images, U mask units, V visible units.
"""

from __future__ import annotations

import itertools
import math
import random
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
    `ragged`: what `places` is, kept where images keep different numbers.
    """

    hidden: Tensor
    ids_keep: Tensor | None = None
    ids_restore: Tensor | None = None
    ragged: Tensor | None = None

    @staticmethod
    def from_noise(noise: Tensor, ratio: float) -> Mask:
        """MAE's rule: keep the int(U * (1 - ratio)) units with the smallest noise [B,U], in the order of that noise."""
        return Mask.from_order(noise.argsort(dim=1), visible_units(noise.shape[1], ratio))

    @staticmethod
    def from_order(ids_shuffle: Tensor, keep: int) -> Mask:
        """From permutations [B,U]: the first `keep` units stay visible, in that order."""
        ids_restore = _inverse(ids_shuffle)
        return Mask(ids_restore >= keep, ids_shuffle[:, :keep], ids_restore)

    @staticmethod
    def from_hidden(hidden: Tensor) -> Mask:
        """From [B,U] bool. Visible units keep raster order; `ids_keep` is None where images differ in their number."""
        counts = hidden.sum(dim=1)
        if hidden.shape[0] and not bool((counts == counts[0]).all()):
            return Mask(hidden, ragged=hidden.flatten().nonzero()[:, 0])
        ids_shuffle = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        keep = hidden.shape[1] - int(counts[0]) if hidden.shape[0] else 0
        return Mask(hidden, ids_shuffle[:, :keep], _inverse(ids_shuffle))

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

    @property
    def places(self) -> Tensor:
        """All hidden units of the batch [M], numbered through it: those of image b from b U on. Their number is known
        before a device has worked it out, for which `x[hidden]` would wait.
        """
        if self.ids_keep is None:
            return self.hidden.flatten().nonzero()[:, 0] if self.ragged is None else self.ragged
        B, U = self.hidden.shape
        return (self.ids_hidden + U * torch.arange(B, device=self.hidden.device)[:, None]).flatten()

    def complement(self) -> Mask:
        """The mask that hides exactly what this one shows (MIM-HD's second view); units keep their order."""
        if self.ids_keep is None or self.ids_restore is None:
            return Mask.from_hidden(~self.hidden)
        units, visible = self.hidden.shape[1], self.ids_keep.shape[1]
        return Mask(~self.hidden, self.ids_hidden, (self.ids_restore - visible) % units)

    def divided(self, grid: tuple[int, int], side: int) -> Mask:
        """The same mask over smaller units: each of a `grid` of units is divided into `side` x `side`, which stand
        together, in raster order, where it stood.
        """
        (rows, columns), inside = grid, torch.arange(side, device=self.hidden.device)
        whole = self.hidden.view(-1, rows, columns)
        hidden = whole.repeat_interleave(side, 1).repeat_interleave(side, 2).flatten(1)
        if self.ids_keep is None:
            return Mask(hidden)
        order = self.order
        top, left = order // columns * side, order % columns * side
        ids = (top[..., None, None] + inside[:, None]) * (columns * side) + left[..., None, None] + inside
        return Mask.from_order(ids.flatten(1), self.ids_keep.shape[1] * side * side)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Mask:
        """The same mask on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Mask:
        """The same mask in page-locked memory (called by the data loader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Mask:
        others = (self.ids_keep, self.ids_restore, self.ragged)
        return Mask(f(self.hidden), *(None if t is None else f(t) for t in others))


def _inverse(order: Tensor) -> Tensor:
    """Of permutations [B,U]."""
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


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


@dataclass(frozen=True)
class UnitMasking:
    """SimMIM's masking (Xie et al. 2022, section 3.2): squares of `unit` x `unit` patches of a grid are hidden whole,
    ceil(`ratio` of them) per image, drawn uniformly.
    """

    grid: tuple[int, int]
    unit: int
    ratio: float

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows % self.unit or columns % self.unit:
            raise ConfigError(
                f"{rows} x {columns} patches cannot be masked in squares of {self.unit} x {self.unit} patches; "
                "choose a unit that divides the grid"
            )
        squares = self._squares()
        if not 0 < self._hidden() < squares:
            raise ConfigError(
                f"mask ratio {self.ratio} hides {self._hidden()} of {squares} squares of {self.unit} x {self.unit} "
                "patches; expected at least one hidden and one visible square"
            )

    def draw(self, generator: torch.Generator) -> Tensor:
        """[U] bool, True = hidden."""
        rows, columns = (side // self.unit for side in self.grid)
        hidden = torch.zeros(rows * columns, dtype=torch.bool)
        hidden[torch.randperm(len(hidden), generator=generator)[: self._hidden()]] = True
        squares = hidden.view(rows, columns)
        return squares.repeat_interleave(self.unit, 0).repeat_interleave(self.unit, 1).flatten()

    def collate(self, draws: Tensor) -> Mask:
        """Maps [B,U] -> mask."""
        return Mask.from_hidden(draws)

    def _squares(self) -> int:
        return self.grid[0] * self.grid[1] // self.unit**2

    def _hidden(self) -> int:
        return math.ceil(self._squares() * self.ratio)


@dataclass(frozen=True)
class BlockMasking:
    """BEiT's block-wise masking (Bao et al. 2022, algorithm 1): rectangles of random size and shape hide up to `total`
    patches of a grid.

    A rectangle covers between `smallest` and `largest` patches (0: all that are still wanted), its aspect ratio is
    between 0.3 and 1 / 0.3. One that does not fit is drawn again, up to `tries` times; then the mask is finished, with
    fewer patches than wanted (0 tries: never, so that it always hides `total`). So images hide different numbers.

    `exact` above 0 hides exactly so many patches (BootMAE): the blocks first, then others at random.
    """

    grid: tuple[int, int]
    total: int
    smallest: int = 16
    largest: int = 0
    tries: int = 10
    exact: int = 0

    def __post_init__(self) -> None:
        patches = self.grid[0] * self.grid[1]
        for name, value in (("total", self.total), ("exact", self.exact or self.total)):
            if not 0 < value < patches:
                raise ConfigError(
                    f"block-wise masking is to hide {value} ({name}) of {patches} patches; expected 1 to {patches - 1}"
                )
        if not 0 < self.smallest <= self.total:
            raise ConfigError(
                f"the smallest block has {self.smallest} patches and {self.total} are hidden in all; "
                f"expected 1 to {self.total}"
            )

    def draw(self, generator: torch.Generator) -> Tensor:
        """[U] bool, True = hidden; with `exact`, [U] keys by which visible patches come first."""
        hidden = self.blocks(random.Random(int(torch.randint(2**62, (), generator=generator))))
        if not self.exact:
            return hidden
        return hidden + torch.rand(len(hidden), generator=generator)

    def collate(self, draws: Tensor) -> Mask:
        """Maps or keys [B,U] -> mask."""
        if not self.exact:
            return Mask.from_hidden(draws)
        return Mask.from_order(draws.argsort(dim=1), draws.shape[1] - self.exact)

    def blocks(self, rng: random.Random) -> Tensor:
        """The blocks of one mask, [U] bool. Draws in the order of BEiT's code, so that its seeds give its masks."""
        rows, columns = self.grid
        hidden = torch.zeros(rows, columns, dtype=torch.bool)
        count = 0
        while count < self.total:
            cap = min(self.total - count, self.largest or self.total)
            added = self._add(hidden, cap, rng)
            if not added:
                break
            count += added
        return hidden.flatten()

    def _add(self, hidden: Tensor, cap: int, rng: random.Random) -> int:
        """Hides one more block of at most `cap` new patches and returns how many; 0 if none was found."""
        rows, columns = self.grid
        for _ in range(self.tries) if self.tries else itertools.count():
            area = rng.uniform(self.smallest, cap)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width >= columns or height >= rows:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            block = hidden[top : top + height, left : left + width]
            new = height * width - int(block.sum())
            if 0 < new <= cap:
                block[:] = True
                return new
        return 0
