"""Hiera (Ryali et al. 2023), with taps.

Parameter names are the official ones, so that weights travel: `pos_embed`, `patch_embed.proj`, `blocks.i.{norm1,
attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}` with `blocks.i.proj` where the width doubles,
`multi_scale_fusion_heads.i`, `norm` (`encoder_norm` in official files of pre-training).

A mask unit is 8 x 8 tokens of stage 1. Its tokens are unrolled once (appendix A of the paper): with the place inside
the unit written as three pairs of bits (y, x), finest first, a pooling of 2 x 2 is a maximum over four contiguous
quarters, and stays one after every pooling. In here units stand together, [B,V,t,C], the t tokens of each in that
order, so that attention inside units needs no copy: units are its batch. The official order of a block's tokens, which
taps give, has the units innermost: [B,t,V,C].
"""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models.encoder import Encoder, as_map, last_block
from mimlet.models.features import Features, Taps
from mimlet.models.linear import Linear, linear
from mimlet.models.parts import (
    NORM_EPS,
    DropPath,
    Mlp,
    attend,
    attention_logits,
    init_mae,
    resize_positions,
)
from mimlet.models.shapes import HieraShape

UNIT = 8
"""Tokens of stage 1 along the side of a mask unit."""

ATTENTION_BATCH = 65535
"""Most sequences of one fused attention: CUDA's kernels fail beyond (pytorch issues 142228 and 146704)."""


class PatchEmbed(nn.Module):
    """Overlapping convolution: kernel 2 s - 1 at stride s (7 at 4); tokens see into the units left and above."""

    def __init__(self, stride: int, dim: int) -> None:
        super().__init__()
        self.overlap = stride - 1
        self.side = UNIT * stride
        self.proj = nn.Conv2d(3, dim, 2 * stride - 1, stride, stride - 1)

    def forward(self, images: Tensor, mask: Mask | None = None) -> Tensor:
        """[B,3,h,w] -> all mask units [B,U,64,C], or with a mask the visible ones in its order, [B,V,64,C].

        Pixels of hidden units count as 0, and only the visible units are convolved, each with the border of s - 1
        px that it sees of its neighbours.
        """
        if mask is None:
            x: Tensor = self.proj(images)
            return unrolled(x.permute(0, 2, 3, 1))
        assert mask.ids_keep is not None
        (B, _, height, width), side = images.shape, self.side
        rows, columns = height // side, width // side
        hidden = mask.hidden.view(B, 1, rows, 1, columns, 1)
        seen = images.view(B, 3, rows, side, columns, side).masked_fill(hidden, 0).reshape(images.shape)
        padded = F.pad(seen, (self.overlap, 0, self.overlap, 0))
        crops = padded.unfold(2, side + self.overlap, side).unfold(3, side + self.overlap, side)
        batch = torch.arange(B, device=images.device)[:, None]
        visible = crops.permute(0, 2, 3, 1, 4, 5)[batch, mask.ids_keep // columns, mask.ids_keep % columns]
        x = F.conv2d(visible.flatten(0, 1), self.proj.weight, self.proj.bias, self.proj.stride)
        return unrolled(x.permute(0, 2, 3, 1)).view(B, -1, UNIT * UNIT, x.shape[1])


class UnitAttention(nn.Module):
    """Attention inside mask units, or among all tokens; `pool` makes one query of four tokens."""

    def __init__(self, dim: int, out: int, heads: int, pool: bool, inside: bool) -> None:
        super().__init__()
        self.width, self.heads, self.pool, self.inside = out, heads, pool, inside
        self.qkv = Linear(dim, 3 * out)
        self.proj = Linear(out, out)

    def project(self, x: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
        """Queries, keys and values (the first `parts` of them) of normed tokens [B,V,t,C], each [B,H,V*t,d], or
        [B*V,H,t,d] for attention inside units.
        """
        width = self.width
        joint = linear(x, self.qkv.weight[: parts * width], self.qkv.bias[: parts * width])
        q, *others = joint.view(*x.shape[:3], parts, width).unbind(3)
        return tuple(self._split(part) for part in (pooled(q) if self.pool else q, *others))

    def _split(self, x: Tensor) -> Tensor:
        B, V, t, D = x.shape
        batch, tokens = (B * V, t) if self.inside else (B, V * t)
        return x.reshape(batch, tokens, self.heads, D // self.heads).transpose(1, 2)

    def output(self, heads: Tensor, units: int) -> Tensor:
        """Joins heads as `project` splits them and projects: [B,V,t,D]."""
        joined = heads.transpose(1, 2).flatten(2)
        shape = (-1, units, joined.shape[1] if self.inside else joined.shape[1] // units, joined.shape[2])
        out: Tensor = self.proj(joined.view(shape))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Normed tokens [B,V,t,C] -> [B,V,t,D], or [B,V,t/4,D] where queries are pooled."""
        q, k, v = self.project(x)
        if len(q) <= ATTENTION_BATCH:
            heads = attend(q, k, v)
        else:
            pieces = zip(*(torch.split(part, ATTENTION_BATCH) for part in (q, k, v)), strict=True)
            heads = torch.cat([attend(*piece) for piece in pieces])
        return self.output(heads, x.shape[1])


class HieraBlock(nn.Module):
    """Pre-norm block. Where the width changes, the shortcut projects the normed input, and is pooled as queries are."""

    def __init__(
        self, dim: int, out: int, heads: int, mlp_ratio: float, pool: bool, inside: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = UnitAttention(dim, out, heads, pool, inside)
        self.norm2 = nn.LayerNorm(out, eps=NORM_EPS)
        self.mlp = Mlp(out, int(out * mlp_ratio))
        self.proj = Linear(dim, out) if out != dim else None
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def finish(self, x: Tensor, y: Tensor, attended: Tensor) -> Tensor:
        """The block's output from its input x, the normed input y and the attention's output."""
        if self.proj is not None:
            x = self.proj(y)
            x = pooled(x) if self.attn.pool else x
        x = x + self.drop_path(attended)
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[B,V,t,C] -> [B,V,t,D], or [B,V,t/4,D] where tokens are pooled; nothing tapped."""
        y = self.norm1(x)
        return self.finish(x, y, self.attn(y))


class Hiera(Encoder):
    """Hiera: `(images, mask, fill, taps) -> Features`.

    Each stage doubles width and heads. Stages 1 and 2, and the first block of stage 3, attend inside mask units, the
    others globally. With a mask, hidden units are dropped, and their pixels are zeroed before the overlapping
    convolution. It has nothing to fill them with.

    - `tokens`: the sum over the stages of `shape.fuse` (each but the last through a convolution that brings it to the
      final grid: Hiera's decoder of pre-training reads it), then `norm`; with fuse="none" the last block's output, then
      `norm`. Raster order; with a mask unit by unit, in raster order inside each.
    - `hidden`, `normed`, `attention`, `qkv`: in the official, unrolled order of the block's tokens. Attention can be
      tapped in global blocks; not where queries are pooled (first block of stage 4 with q_pool 3), since that is no
      matrix of tokens by tokens.
    - `stages`: where two stages have one stride (q_pool 2), the later one.

    Inputs of any size divisible by the mask unit work; see `resize_table` for positions.
    """

    family: ClassVar[str] = "Hiera"
    shape: HieraShape

    def __init__(self, shape: HieraShape, drop_path: float = 0.0, constant_drop_path: bool = False) -> None:
        super().__init__()
        if shape.patch % 4 or shape.image_size % (2 * shape.patch):
            raise ConfigError(
                f"Hiera has tokens of a quarter of the patch and mask units of two patches: patch {shape.patch} must "
                f"be a multiple of 4 px, and image_size {shape.image_size} of {2 * shape.patch} px"
            )
        if len(shape.stages) != 4 or min(shape.stages) < 1 or shape.dim % shape.heads:
            raise ConfigError(
                f"Hiera has 4 stages of at least one block, and a width that its heads divide; got stages "
                f"{shape.stages}, width {shape.dim}, {shape.heads} heads"
            )
        self.shape = shape
        self.patch, self.unit = (shape.patch, 2) if shape.q_pool == 2 else (2 * shape.patch, 1)
        self.grid = (shape.image_size // self.patch,) * 2
        self.depth, self.dim, self.heads = sum(shape.stages), 8 * shape.dim, 8 * shape.heads
        ends = tuple(accumulate(shape.stages))
        stage_of = [stage for stage, blocks in enumerate(shape.stages) for _ in range(blocks)]
        stride = shape.patch // 4
        self.patch_embed = PatchEmbed(stride, shape.dim)
        self.table_grid = (shape.image_size // stride,) * 2
        self.pos_embed = nn.Parameter(torch.zeros(1, self.table_grid[0] * self.table_grid[1], shape.dim))
        rates = torch.linspace(drop_path if constant_drop_path else 0, drop_path, self.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList()
        before = [0, *stage_of]
        for stage, last, rate in zip(stage_of, before, rates, strict=False):
            self.blocks.append(
                HieraBlock(
                    shape.dim << last,
                    shape.dim << stage,
                    shape.heads << stage,
                    shape.mlp_ratio,
                    pool=last < stage <= shape.q_pool,
                    inside=last < 2,  # lags: the first block of stage 3 still attends inside units
                    drop_path=rate,
                )
            )
        self.dims = tuple(shape.dim << stage for stage in before)
        self.attending = tuple(
            i for i, block in enumerate(self._blocks(), 1) if not (block.attn.inside or block.attn.pool)
        )
        strides = [stride << min(stage, shape.q_pool) for stage in range(4)]
        self.stages = {px: shape.dim << stage for stage, px in enumerate(strides)}
        self.levels = {}
        self.stage_ends = dict(zip(strides, ends, strict=True))
        self.multi_scale_fusion_heads = nn.ModuleList()
        self.fused: tuple[int, ...] = (self.depth,)
        if shape.fuse != "none":
            for stage in range(shape.q_pool):
                kernel = 2 ** (shape.q_pool - stage)
                self.multi_scale_fusion_heads.append(nn.Conv2d(shape.dim << stage, self.dim, kernel, kernel))
            self.fused = ends[: shape.q_pool] + ((self.depth,) if shape.fuse == "all" else ())
        self.norm = nn.LayerNorm(self.dim, eps=NORM_EPS)
        self.init_mae_()

    @torch.no_grad()
    def init_mae_(self) -> None:
        """Official initialisation of pre-training: MAE's, positions truncated normal 0.02, convolutions that fuse
        stages as PyTorch makes them.
        """
        self.apply(init_mae)
        self._reset_convolutions()
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @torch.no_grad()
    def init_classifier_(self) -> None:
        """Official initialisation of training with labels: weights and positions truncated normal 0.02, biases of
        linear layers and of norms 0.02.
        """
        self._reset_convolutions()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.constant_(module.bias, 0.02)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.constant_(module.bias, 0.02)
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _reset_convolutions(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()

    def _blocks(self) -> list[HieraBlock]:
        return [block for block in self.blocks if isinstance(block, HieraBlock)]

    def heads_of(self, block: int) -> int:
        """Heads double from stage to stage."""
        return self._blocks()[block - 1].attn.heads

    def layout(self, layer: int) -> tuple[tuple[int, int], Tensor]:
        """Tokens are unrolled, and four times fewer after every pooling."""
        pools = sum(block.attn.pool for block in self._blocks()[:layer])
        inside = UNIT * UNIT // 4**pools
        order = self._stage(torch.arange(inside * self.units).view(inside, -1).t()[None, ..., None], self.grid)[0, 0]
        return (order.shape[0], order.shape[1]), order.flatten()

    def layer_of(self, name: str) -> int:
        """As for a ViT; the norm and the convolutions that fuse stages come after the blocks."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("pos_embed", "patch_embed.")) else self.depth + 1

    def positions(self, units: tuple[int, int]) -> Tensor:
        """The table for a grid of mask units, [U,64,C]."""
        grid = (units[0] * UNIT, units[1] * UNIT)
        table = resize_table(self.pos_embed, self.table_grid, grid, UNIT)
        return unrolled(table.view(1, *grid, -1))[0]

    def embed(self, images: Tensor, mask: Mask | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B,V,64,C] that enter block 1, and the grid of final patches of the whole image."""
        grid = self.check_images(images)
        table = self.positions((grid[0] // self.unit, grid[1] // self.unit))
        if mask is not None:
            assert mask.ids_keep is not None
            table = table[mask.ids_keep]
        x: Tensor = self.patch_embed(images, mask) + table
        return x, grid

    def fuse_term(self, index: int, x: Tensor) -> Tensor:
        """What the end of a stage, [B,V,t,C], adds to the fused tokens [B,V,unit * unit,D]; the last stage is added as
        it is. The convolution is computed as a product of matrices.
        """
        if index == len(self.multi_scale_fusion_heads):
            return x
        conv = self.multi_scale_fusion_heads[index]
        assert isinstance(conv, nn.Conv2d)
        B, V, t, C = x.shape
        bits = conv.kernel_size[0].bit_length() - 1
        pairs = [(2 + bit, 2 + bits + bit) for bit in reversed(range(bits))]
        weight = conv.weight.view(-1, C, *[2] * (2 * bits)).permute(0, *sum(pairs, ()), 1).flatten(1)
        final = self.unit * self.unit
        return linear(x.view(B, V, t // final, final, C).transpose(2, 3).flatten(3), weight, conv.bias)

    def forward(
        self, images: Tensor, mask: Mask | None = None, fill: Tensor | None = None, taps: Taps | None = None
    ) -> Features:
        """Encodes normalised images [B,3,h,w] and returns what `taps` asks for; runs no block and no part of a block
        beyond that.
        """
        taps = taps or Taps()
        self.check_taps(taps)
        if mask is not None:
            self.check_mask(mask, fill, self.check_images(images))
        x, grid = self.embed(images, mask)
        V = x.shape[1]
        out = Features(self.prefix, grid)
        wanted = {self.stage_ends[stride] for stride in taps.stages} | set(self.fused if taps.tokens else ())
        whole = max(last_block(taps, self.depth, False), *wanted, 0)
        ends: dict[int, Tensor] = {}
        if 0 in taps.hidden:
            out.hidden[0] = official(x)
        for number, block in enumerate(self._blocks(), 1):
            attention, qkv, normed = number in taps.attention, number in taps.qkv, number - 1 in taps.normed
            if number > whole and not (attention or qkv or normed):
                break
            if not (attention or qkv or normed):
                x = self.run(block, x)
            else:
                y = block.norm1(x)
                if normed:
                    out.normed[number - 1] = official(y)
                if number > whole and not (attention or qkv):
                    break
                if attention or qkv:
                    q, k, *v = block.attn.project(official(y)[:, None], 3 if number <= whole or qkv else 2)
                    if qkv:
                        out.qkv[number] = (q, k, v[0])
                    if attention:
                        out.attention[number] = attention_logits(q, k)
                    if number > whole:
                        break
                    heads = out.attention[number].softmax(dim=-1) @ v[0] if attention else attend(q, k, v[0])
                    attended = block.attn.output(heads, 1).view(len(x), -1, V, block.attn.width).transpose(1, 2)
                else:
                    attended = block.attn(y)
                x = block.finish(x, y, attended)
            if number in taps.hidden:
                out.hidden[number] = official(x)
            if number in wanted:
                ends[number] = x
        if self.depth in taps.normed:
            out.normed[self.depth] = self.norm(official(x))
        for stride in taps.stages:
            out.stages[stride] = self._stage(ends[self.stage_ends[stride]], grid if mask is None else None)
        if taps.tokens:
            first, *others = (self.fuse_term(index, ends[end]) for index, end in enumerate(self.fused))
            tokens = self.norm(sum(others, first))
            if mask is None and self.unit == 2:
                tokens = tokens.view(len(x), grid[0] // 2, grid[1] // 2, 2, 2, self.dim).transpose(2, 3)
            out.tokens = tokens.reshape(len(x), -1, self.dim)
        return out

    def _stage(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """The end of a stage [B,V,t,C] as a map of a whole image's grid of patches, or without a grid as the tokens
        inside each visible patch.
        """
        B, V, t, C = x.shape
        side = int(t**0.5)
        bits = side.bit_length() - 1
        pairs = x.view(B, V, *[2] * (2 * bits), C)
        order = [2 * bit + 2 for bit in reversed(range(bits))] + [2 * bit + 3 for bit in reversed(range(bits))]
        inside = pairs.permute(0, 1, *order, 2 * bits + 2).reshape(B, V, t, C)
        if grid is not None:
            return as_map(inside, (grid[0] // self.unit, grid[1] // self.unit), side)
        fine = side // self.unit
        patches = inside.view(B, V, self.unit, fine, self.unit, fine, C).transpose(3, 4)
        return patches.reshape(B, V * self.unit**2, fine * fine, C)


def unrolled(x: Tensor) -> Tensor:
    """A grid of tokens of stage 1 [n,rows*8,columns*8,C] -> mask units in raster order, [n,U,64,C], their tokens
    unrolled: bits of the place (y, x) inside the unit, the finest pair first.
    """
    n, height, width, C = x.shape
    rows, columns = height // UNIT, width // UNIT
    bits = x.view(n, rows, 2, 2, 2, columns, 2, 2, 2, C).permute(0, 1, 5, 4, 8, 3, 7, 2, 6, 9)
    return bits.reshape(n, rows * columns, UNIT * UNIT, C)


def official(x: Tensor) -> Tensor:
    """Units together [B,V,t,C] -> the official order [B,t*V,C], units innermost."""
    return x.transpose(1, 2).flatten(1, 2)


def pooled(x: Tensor) -> Tensor:
    """Maximum over 2 x 2 tokens: [B,V,t,C] -> [B,V,t/4,C]."""
    B, V, t, C = x.shape
    return x.reshape(B, V, 4, t // 4, C).amax(2)


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], unit: int) -> Tensor:
    """Resizes a learned table [1,N,C] of positions to another grid of tokens, of which `unit` x `unit` are one window.

    What the table repeats in every window (its mean over windows) is tiled, as windows do not grow with the image; the
    rest is interpolated (bicubic). Interpolating all of it stretches that pattern over windows and breaks what their
    attention learned (Bolya et al. 2023, "Window attention is bugged", absolute win; facebookresearch/hiera, issues 36,
    37 and 45). Its own grid changes nothing.
    """
    if old == new:
        return table
    grid = table.float().view(*old, -1)
    window = grid.view(old[0] // unit, unit, old[1] // unit, unit, -1).mean((0, 2))
    rest = grid - window.repeat(old[0] // unit, old[1] // unit, 1)
    resized = resize_positions(rest.flatten(0, 1)[None], old, new, 0).view(*new, -1)
    whole = resized + window.repeat(new[0] // unit, new[1] // unit, 1)
    return whole.flatten(0, 1)[None].to(table.dtype)
