"""What every encoder is to methods, tasks and analyses, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models.features import Features, Taps
from mimlet.models.shapes import Shape

NOWHERE = (
    "with windows or migration no block of this encoder attends to the whole image; set encoder.window=0 and "
    "encoder.migration=0"
)


class Encoder(nn.Module, ABC):
    """`(images, mask, fill, taps) -> Features`.

    Without a mask the whole image is encoded. With a mask and no `fill`, hidden units are dropped: nothing of what
    comes back depends on a pixel of theirs. With `fill`, what hidden units embed to is replaced by it; `fills` names
    the widths that `fill` [1,1,width] may have here, none for an encoder that only drops.

    - `patch`: side in px of what one final token stands for, and a decoder predicts. `grid`: (rows, columns) of them at
      `shape.image_size`. `unit`: patches along the side of what a mask decides on; `units`: how many those are.
    - `depth`: number of blocks, numbered from 1. `dims`: widths of the embedding and of every block's output. `dim`,
      `heads`: of the last block. `prefix`: tokens before the patches.
    - `attending`: the blocks whose attention spans the image, so that `attention` and `qkv` can be tapped.
    - `stages`: width by stride in px of the maps that `Taps.stages` gives; `levels`: the same of the pyramid. Empty
      where there are none.
    - `decodes`: what a decoder of pixels reads: the final tokens, or the stages or levels of each patch.
    - `checkpointing`: whether `run` forgets what blocks compute inside.
    - `norm`: what the last block's output passes to become `Features.tokens`; classifiers with mean pooling skip it.
    """

    shape: Shape
    patch: int
    dim: int
    depth: int
    heads: int
    grid: tuple[int, int]
    norm: nn.Module
    dims: tuple[int, ...]
    attending: tuple[int, ...]
    prefix: int = 0
    unit: int = 1
    stages: dict[int, int]
    levels: dict[int, int]
    fills: tuple[int, ...] = ()
    decodes: Literal["tokens", "stages", "levels"] = "tokens"
    checkpointing: bool = False
    family: ClassVar[str]

    @abstractmethod
    def forward(
        self, images: Tensor, mask: Mask | None = None, fill: Tensor | None = None, taps: Taps | None = None
    ) -> Features:
        """Encodes normalised images [B,3,h,w] and returns what `taps` asks for; computes nothing beyond that."""

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """The layer of a parameter of this encoder for layer-wise decay of the learning rate: 0 for embeddings and
        positions, k for block k, depth + 1 for what comes after.
        """

    def run(self, part: Callable[..., Tensor], *x: Any) -> Tensor:
        """What a block, or another part of the encoder, makes of `x`. With `checkpointing`, what it computes inside is
        computed again in the backward pass instead of being kept (Chen et al. 2016), with the same random numbers.
        """
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(part, *x, use_reentrant=False)
            return out
        return part(*x)

    @property
    def normed_dims(self) -> tuple[int, ...]:
        """Widths of what `Taps.normed` gives, by block."""
        return self.dims

    def heads_of(self, block: int) -> int:
        """Heads of a block that attends."""
        return self.heads

    def layout(self, layer: int) -> tuple[tuple[int, int], Tensor]:
        """(rows, columns) of the tokens of whole images at `shape.image_size` that `hidden`, `attention` and `qkv` of a
        layer have (0: the embedding), and which of them, prefix not counted, is at each place in raster order, [N].
        """
        return self.grid, torch.arange(self.grid[0] * self.grid[1])

    @abstractmethod
    def init_mae_(self) -> None:
        """Initialises as the family's masked pre-training does."""

    @abstractmethod
    def init_classifier_(self) -> None:
        """Initialises as the family's training with labels does."""

    @property
    def unit_grid(self) -> tuple[int, int]:
        """(rows, columns) of mask units at `shape.image_size`."""
        return self.grid[0] // self.unit, self.grid[1] // self.unit

    @property
    def units(self) -> int:
        """Mask units of an image."""
        return self.unit_grid[0] * self.unit_grid[1]

    def patch_mask(self, mask: Mask) -> Mask:
        """The mask over patches that a mask over units stands for, in the order of `Features.tokens`: unit by unit, in
        raster order inside each.
        """
        return mask if self.unit == 1 else mask.divided(self.unit_grid, self.unit)

    def attending_block(self, block: int = 0) -> int:
        """Block `block`, or for 0 the last one that attends; raises where it is not there or does not attend."""
        if not 0 <= block <= self.depth:
            raise ConfigError(f"no block {block}: this encoder has blocks 1 to {self.depth}")
        if not self.attending:
            raise ConfigError(NOWHERE)
        if block and block not in self.attending:
            raise ConfigError(
                f"block {block} does not attend to the whole image; in {self.family} the blocks "
                f"{', '.join(map(str, self.attending))} do"
            )
        return block or self.attending[-1]

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of patches in images [B,3,h,w]; raises where they do not divide into mask units."""
        height, width = images.shape[-2:]
        side = self.patch * self.unit
        if height % side or width % side:
            what = "patch" if self.unit == 1 else "mask unit"
            raise ConfigError(
                f"image of {height} x {width} px is not divisible by the {what} of {side} px; resize or pad it"
            )
        return height // self.patch, width // self.patch

    def check_mask(self, mask: Mask, fill: Tensor | None, grid: tuple[int, int]) -> None:
        """Raises where a mask is for another number of units, or `fill` for another encoder."""
        rows, columns = grid[0] // self.unit, grid[1] // self.unit
        if mask.hidden.shape[1] != rows * columns:
            what = "patches" if self.unit == 1 else "mask units"
            raise ConfigError(
                f"the mask has {mask.hidden.shape[1]} units, the image {rows} x {columns} {what}; they must agree"
            )
        if fill is not None and fill.shape[-1] not in self.fills:
            raise ConfigError(
                f"{self.family} cannot fill hidden units with {fill.shape[-1]} numbers; expected "
                f"{' or '.join(map(str, self.fills)) or 'a method that drops hidden units (mae, dmae, itpn)'}"
            )
        if fill is None and any(getattr(self.shape, name, None) for name in ("window", "migration")):
            raise ConfigError(
                "hidden patches cannot be dropped where attention stays inside windows or tokens migrate, which is for "
                "dense inputs; set encoder.window=0 and encoder.migration=0 for pre-training"
            )
        assert fill is not None or mask.ids_keep is not None, "dropping needs equally many visible units per image"

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises where tables of relative positions are for another grid of patches."""
        if grid != self.grid:
            size = self.grid[0] * self.patch
            raise ConfigError(
                f"an encoder with relative positions is fixed to its grid of {self.grid[0]} x {self.grid[1]} patches "
                f"({size} px); got {grid[0]} x {grid[1]}. Load it at that image_size instead"
            )

    def check_taps(self, taps: Taps) -> None:
        """Raises where taps ask for blocks or maps that are not there."""
        for kind, first in (("hidden", 0), ("normed", 0), ("attention", 1), ("qkv", 1)):
            wrong = [i for i in getattr(taps, kind) if not first <= i <= self.depth]
            if wrong:
                raise ConfigError(f"no {kind} of block {wrong[0]}: this encoder has blocks {first} to {self.depth}")
        for kind in ("attention", "qkv"):
            wrong = [i for i in getattr(taps, kind) if i not in self.attending]
            if wrong:
                raise ConfigError(
                    f"no {kind} of block {wrong[0]}: {self.family} attends to the whole image in the blocks "
                    f"{', '.join(map(str, self.attending))} only"
                    if self.attending
                    else f"no {kind} of block {wrong[0]}: {NOWHERE}"
                )
        for kind, known in (("levels", self.levels), ("stages", self.stages)):
            wrong = [stride for stride in getattr(taps, kind) if stride not in known]
            if wrong:
                have = f"it has those of stride {', '.join(map(str, sorted(known)))} px" if known else "it has none"
                raise ConfigError(
                    f"no {kind} of stride {wrong[0]} px in {self.family}: {have}. "
                    + (
                        "A pyramid is part of iTPN encoders (itpn_tiny, fast_itpn_tiny, ...)"
                        if kind == "levels"
                        else ""
                    )
                )
        assert not taps.decoded, "an encoder has no decoder; ask a teacher that carries one"


def last_block(taps: Taps, depth: int, whole: bool) -> int:
    """The last block whose output is needed: all of them where `whole`, or what taps name of blocks."""
    if whole:
        return depth
    return max([*taps.hidden, *taps.normed, *(i - 1 for i in (*taps.attention, *taps.qkv)), 0])


def as_map(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Tokens of all patches [B,N,side*side,C], `side` along a patch in raster order -> a map [B,C,h,w], in memory with
    the channels last: whole tokens are copied faster than single numbers.
    """
    B, _, _, C = tokens.shape
    rows, columns = grid
    x = tokens.view(B, rows, columns, side, side, C).transpose(2, 3)
    return x.reshape(B, rows * side, columns * side, C).permute(0, 3, 1, 2)


def as_units(image: Tensor, side: int) -> Tensor:
    """A map [B,C,h,w] -> tokens of all patches [B,N,side*side,C]: `as_map` backwards."""
    B, C, height, width = image.shape
    x = image.reshape(B, C, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, -1, side * side, C)
