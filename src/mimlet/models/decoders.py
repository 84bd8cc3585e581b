"""Decoders that predict every patch from the visible tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.masks import Mask
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.linear import Linear
from mimlet.models.parts import NORM_EPS, Block, init_mae, sincos_positions
from mimlet.models.pyramid import LevelsEmbed, StagesEmbed

Latent = Tensor | Mapping[int, Tensor]
"""What a decoder reads of visible patches: tokens [B,P+V,D], or stages or levels by stride [B,V,t,C]."""


def decoder_taps(encoder: Encoder) -> Taps:
    """What to ask of an encoder for its decoder."""
    if encoder.decodes == "tokens":
        return Taps()
    return Taps(**{encoder.decodes: tuple(sorted(getattr(encoder, encoder.decodes)))}, tokens=False)


def decoder_input(encoder: Encoder, features: Features) -> Latent:
    """What an encoder's decoder reads, from the answer to `decoder_taps`."""
    latent: Latent = features.latent if encoder.decodes == "tokens" else getattr(features, encoder.decodes)
    return latent


class Decoder(nn.Module):
    """MAE's decoder: `(latent of visible tokens, mask) -> prediction per patch`.

    `encoder_dim`: width of the tokens it reads; an `embed` of another kind turns a `Latent` into [B,P+V,dim]. A hidden
    patch enters as `blanks` times the mask token (iTPN's decoder sums one per level). `position`: a fixed sin-cos table
    or a learned one (Hiera).

    Tokens are kept in the order (class token, visible, hidden) and get their own position there: attention does not
    care about order, and so nothing has to be un-shuffled. Names: `embed`, `mask_token`, `pos_embed`, `blocks`,
    `norm`, `pred` (officially with the prefix `decoder_`).
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        prefix: int,
        out: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        embed: nn.Module | None = None,
        blanks: int = 1,
        position: Literal["sincos", "learned"] = "sincos",
    ) -> None:
        super().__init__()
        self.prefix, self.dim, self.grid, self.blanks, self.position = prefix, dim, grid, blanks, position
        self.embed = embed or Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = F.pad(sincos_positions(dim, *grid), (0, 0, prefix, 0))[None]
        self.pos_embed = nn.Parameter(table, requires_grad=position == "learned")
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pred = Linear(dim, out)
        self.apply(init_mae)
        nn.init.normal_(self.mask_token, std=0.02)
        if position == "learned":
            nn.init.trunc_normal_(self.mask_token, std=0.02)
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(
        self, latent: Latent, mask: Mask, hidden_only: bool = False, mask_token: Tensor | None = None
    ) -> Tensor:
        """Latent (tokens: [B,P+V,D]) of the visible patches in the order of `mask.ids_keep` -> predictions [B,N,out] in
        raster order.

        With `hidden_only`, predictions [B,N-V,out] of the hidden patches in the order of `mask.ids_hidden`; the
        visible ones are not computed. `mask_token` [1,1,dim] takes the place of the decoder's own.
        """
        x = self._tokens(latent, mask, mask_token)
        assert mask.ids_keep is not None
        last, shown = len(self.blocks) - 1, self.prefix + mask.ids_keep.shape[1]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = block.tail(x, shown) if hidden_only and i == last else block(x)
        if hidden_only:
            hidden = mask.hidden.shape[1] - (shown - self.prefix)
            predicted: Tensor = self.pred(self.norm(x[:, -hidden:]))
            return predicted
        prediction: Tensor = self.pred(self.norm(x[:, self.prefix :]))
        return raster_order(prediction, mask)

    def features(self, latent: Latent, mask: Mask, block: int) -> Tensor:
        """The output of a block, numbered from 1, before any norm: [B,P+N,dim], patches in raster order. Later blocks
        are not run.
        """
        x = self._tokens(latent, mask)
        for each in self.blocks[:block]:
            x = each(x)
        return torch.cat([x[:, : self.prefix], raster_order(x[:, self.prefix :], mask)], dim=1)

    def _tokens(self, latent: Latent, mask: Mask, mask_token: Tensor | None = None) -> Tensor:
        """What enters block 1: [B,P+N,dim] in the order class token, visible, hidden."""
        visible = self.embed(latent)
        order = mask.order
        blank = self.mask_token if mask_token is None else mask_token
        blank = (
            (self.blanks * blank)
            .to(visible.dtype)
            .expand(len(visible), order.shape[1] + self.prefix - visible.shape[1], -1)
        )
        positions = self.pos_embed[0, self.prefix :][order]
        if self.prefix:
            positions = torch.cat([self.pos_embed[:, : self.prefix].expand(len(visible), -1, -1), positions], dim=1)
        return torch.cat([visible, blank], dim=1) + positions


def make_decoder(
    encoder: Encoder, out: int, dim: int, depth: int, heads: int, position: Literal["sincos", "learned"] = "sincos"
) -> Decoder:
    """A decoder that reads what the encoder's family lets it read (`Encoder.decodes`) and predicts `out` numbers per
    patch.
    """
    embed: nn.Module | None = None
    if encoder.decodes == "levels":
        embed = LevelsEmbed(encoder.levels, dim)
    elif encoder.decodes == "stages":
        embed = StagesEmbed(encoder.stages, dim)
    return Decoder(
        encoder.dim,
        encoder.grid,
        encoder.prefix,
        out,
        dim,
        depth,
        heads,
        embed=embed,
        blanks=len(encoder.levels) if encoder.decodes == "levels" else 1,
        position=position,
    )


def raster_order(tokens: Tensor, mask: Mask) -> Tensor:
    """Patches [B,N,D] in the order visible, hidden -> raster order."""
    assert mask.ids_restore is not None
    return tokens.gather(1, mask.ids_restore[..., None].expand(-1, -1, tokens.shape[-1]))
