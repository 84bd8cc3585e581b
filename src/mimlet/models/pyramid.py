"""iTPN's feature pyramid, and how what it gives is embedded for a decoder or a head.

Everything acts inside a unit (what one token of the last stage stands for), so that it costs what visible units cost.
Maps of a unit have the channels last: [B,n,s,s,C], s tokens along the unit. Names are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mimlet.errors import ConfigError
from mimlet.models.linear import Linear, linear
from mimlet.models.parts import NORM_EPS, ConvMlp, Mlp, MlpBlock, TileConv, in_parts


class SpreadConv(nn.ConvTranspose2d):
    """A transposed convolution of kernel and stride 2, as a product: what each token becomes on the finer grid."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, 2, 2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[...,C] -> [...,4 out], in the order row, column, channel."""
        assert self.bias is not None
        return linear(x, self.weight.permute(2, 3, 1, 0).flatten(0, 2), self.bias.repeat(4))


class PatchSplit(nn.Module):
    """Every token becomes 2 x 2 tokens: norm, then a linear map to four times the width."""

    def __init__(self, dim: int, out: int, fast: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.reduction: nn.Module = SpreadConv(dim, out) if fast else Linear(dim, 4 * out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,n,s,s,C] -> [B,n,2s,2s,out]."""
        four: Tensor = self.reduction(self.norm(x))
        return four.reshape(*four.shape[:4], 2, 2, -1).transpose(3, 4).flatten(4, 5).flatten(2, 3)


class Pyramid(nn.Module):
    """The pyramid of iTPN and Fast-iTPN (Tian et al., "Fast-iTPN", section 3.2), for an encoder to inherit, since the
    official files have its parts beside the encoder's.

    From the maps U1, U2 that enter the merges and the last stage's tokens U3: T3 = align(U3), T2 = block(split(U3) +
    align(U2)), T1 = block(split(T2) + align(U1)); the level V of each is one more block.
    """

    align_dim_16tofpn: nn.Module
    align_dim_16to8: nn.Module
    align_dim_8to4: nn.Module
    split_16to8: nn.Module
    split_8to4: nn.Module
    block_16to8: nn.Module
    block_8to4: nn.Module
    fpn_modules: nn.ModuleList

    def add_pyramid(self, dim: int, width: int, depth: int, hidden: int, fast: bool) -> None:
        """Parts for an encoder of width `dim` at the last stage: levels of `width`, `depth` blocks before each of the
        finer two; `hidden` is the blocks' inner width; `fast`: of convolutions, with biases everywhere.
        """

        def align(incoming: int, bias: bool) -> nn.Module:
            return TileConv(incoming, width, 1) if fast else Linear(incoming, width, bias=bias)

        def block() -> MlpBlock:
            return MlpBlock(width, ConvMlp(width, hidden, inner_norm=False) if fast else Mlp(width, hidden))

        self.align_dim_16tofpn = nn.Identity() if dim == width else align(dim, bias=True)
        self.fpn_modules = nn.ModuleList(block() for _ in range(3))
        self.align_dim_16to8 = align(dim // 2, bias=False)
        self.split_16to8 = PatchSplit(dim, width, fast)
        self.block_16to8 = nn.Sequential(*(block() for _ in range(depth)))
        self.align_dim_8to4 = align(dim // 4, bias=False)
        self.split_8to4 = PatchSplit(width, width, fast)
        self.block_8to4 = nn.Sequential(*(block() for _ in range(depth)))

    def pyramid(self, u1: Tensor, u2: Tensor, u3: Tensor, finest: int) -> list[Tensor]:
        """Levels, coarsest first, the first `finest` of three: [B,n,1,1,D], [B,n,2,2,D], [B,n,4,4,D] from
        [B,n,4,4,C/4], [B,n,2,2,C/2] and [B,n,1,1,C].
        """

        def levels(u1: Tensor, u2: Tensor, u3: Tensor) -> list[Tensor]:
            made = [self.align_dim_16tofpn(u3)]
            if finest > 1:
                made.append(self.block_16to8(self.split_16to8(u3) + self.align_dim_16to8(u2)))
            if finest > 2:
                made.append(self.block_8to4(self.split_8to4(made[1]) + self.align_dim_8to4(u1)))
            return [last(level) for last, level in zip(self.fpn_modules, made, strict=False)]

        return in_parts(levels, u1, u2, u3)


class LevelsEmbed(nn.ModuleList):
    """The levels of each patch as one vector [B,V,out]: per level norm and linear map of its tokens, all of one level
    together `out` numbers long; the sum of the levels. Number 0 is the coarsest.

    iTPN maps each of a level's t tokens to out / t numbers, which stand together; Fast-iTPN (`fast`) maps all t tokens
    to `out` numbers.
    """

    def __init__(self, levels: Mapping[int, int], out: int, fast: bool = False) -> None:
        strides = sorted(levels, reverse=True)
        sides = [strides[0] // stride for stride in strides]
        if not fast and out % sides[-1] ** 2:
            raise ConfigError(
                f"a width of {out} cannot be shared by the {sides[-1] ** 2} tokens that the finest level of the "
                f"pyramid has in each patch; choose a multiple of {sides[-1] ** 2}"
            )
        super().__init__(
            nn.ModuleList(
                [
                    nn.LayerNorm(levels[stride], eps=NORM_EPS),
                    TileConv(levels[stride], out, side) if fast else Linear(levels[stride], out // side**2),
                ]
            )
            for stride, side in zip(strides, sides, strict=True)
        )
        self.strides = strides

    def forward(self, levels: Mapping[int, Tensor]) -> Tensor:
        """Levels by stride, each [B,V,t,C] (`Features.levels`) -> [B,V,out]."""
        vectors = []
        for stride, parts in zip(self.strides, self, strict=True):
            norm, embed = cast(nn.ModuleList, parts)
            x = norm(levels[stride])
            side = self.strides[0] // stride
            vectors.append(embed(x.unflatten(2, (side, side)) if isinstance(embed, TileConv) else x).flatten(2))
        return torch.stack(vectors).sum(0)


class StagesEmbed(nn.Module):
    """The stages of each patch as one vector [B,V,out]: all of its tokens joined, finest first, normed and mapped
    (HiViT's MAE; officially `norm` and `decoder_embed`).
    """

    def __init__(self, stages: Mapping[int, int], out: int) -> None:
        super().__init__()
        self.strides = sorted(stages)
        width = sum(stages[stride] * (self.strides[-1] // stride) ** 2 for stride in self.strides)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.embed = Linear(width, out)

    def forward(self, stages: Mapping[int, Tensor]) -> Tensor:
        """Stages by stride, each [B,V,t,C] (`Features.stages`) -> [B,V,out]."""
        joined = torch.cat([stages[stride].flatten(2) for stride in self.strides], dim=2)
        out: Tensor = self.embed(self.norm(joined))
        return out
