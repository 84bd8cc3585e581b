"""Decoders that predict every patch from the visible tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.masks import Mask
from mimlet.models.linear import Linear
from mimlet.models.parts import NORM_EPS, Block, init_mae, sincos_positions


class Decoder(nn.Module):
    """MAE's decoder: `(latent of visible tokens, mask) -> prediction per patch`.

    Tokens are kept in the order (class token, visible, hidden) and get their own position there: attention does not
    care about order, and so nothing has to be un-shuffled. Names: `embed`, `mask_token`, `pos_embed`, `blocks`,
    `norm`, `pred` (officially with the prefix `decoder_`).
    """

    def __init__(
        self, encoder_dim: int, grid: tuple[int, int], prefix: int, out: int, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.prefix, self.dim, self.grid = prefix, dim, grid
        self.embed = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = F.pad(sincos_positions(dim, *grid), (0, 0, prefix, 0))[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pred = Linear(dim, out)
        self.apply(init_mae)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, latent: Tensor, mask: Mask, hidden_only: bool = False, mask_token: Tensor | None = None
    ) -> Tensor:
        """Latent [B,P+V,D] of the visible tokens in the order of `mask.ids_keep` -> predictions [B,N,out] in raster
        order.

        With `hidden_only`, predictions [B,N-V,out] of the hidden patches in the order of `mask.ids_hidden`; the
        visible ones are not computed. `mask_token` [1,1,dim] takes the place of the decoder's own.
        """
        x = self._tokens(latent, mask, mask_token)
        last, shown = len(self.blocks) - 1, latent.shape[1]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = block.tail(x, shown) if hidden_only and i == last else block(x)
        if hidden_only:
            hidden = mask.hidden.shape[1] - (shown - self.prefix)
            predicted: Tensor = self.pred(self.norm(x[:, -hidden:]))
            return predicted
        prediction: Tensor = self.pred(self.norm(x[:, self.prefix :]))
        return raster_order(prediction, mask)

    def features(self, latent: Tensor, mask: Mask, block: int) -> Tensor:
        """The output of a block, numbered from 1, before any norm: [B,P+N,dim], patches in raster order. Later blocks
        are not run.
        """
        x = self._tokens(latent, mask)
        for each in self.blocks[:block]:
            x = each(x)
        return torch.cat([x[:, : self.prefix], raster_order(x[:, self.prefix :], mask)], dim=1)

    def _tokens(self, latent: Tensor, mask: Mask, mask_token: Tensor | None = None) -> Tensor:
        """What enters block 1: [B,P+N,dim] in the order class token, visible, hidden."""
        visible = self.embed(latent)
        order = mask.order
        blank = self.mask_token if mask_token is None else mask_token
        blank = blank.to(visible.dtype).expand(len(latent), order.shape[1] + self.prefix - visible.shape[1], -1)
        positions = self.pos_embed[0, self.prefix :][order]
        if self.prefix:
            positions = torch.cat([self.pos_embed[:, : self.prefix].expand(len(latent), -1, -1), positions], dim=1)
        return torch.cat([visible, blank], dim=1) + positions


def raster_order(tokens: Tensor, mask: Mask) -> Tensor:
    """Patches [B,N,D] in the order visible, hidden -> raster order."""
    assert mask.ids_restore is not None
    return tokens.gather(1, mask.ids_restore[..., None].expand(-1, -1, tokens.shape[-1]))
