"""BootMAE's decoders, which look the context of hidden patches up in the encoder instead of carrying it (Dong et al.,
Bootstrapped Masked Autoencoders for Vision BERT Pretraining, ECCV 2022, section 3.2, and its released code).

Letters: B images, N patches, V visible patches, P prefix tokens, S = P + V context tokens, D width, p patch side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimlet.data.masks import Mask
from mimlet.models.decoders import raster_order
from mimlet.models.linear import Linear, linear
from mimlet.models.parts import NORM_EPS, Attention, Mlp, attend, init_mae, init_qkv_apart_, sincos_positions


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context of another width; biases of queries and values only."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim, bias=False)
        self.kv = Linear(context, 2 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Normed tokens [B,T,D] and context [B,S,C] -> [B,T,D]."""
        q = linear(x, self.q.weight, self.q_bias).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        kv = linear(context, self.kv.weight, torch.cat([torch.zeros_like(self.v_bias), self.v_bias]))
        k, v = kv.view(*context.shape[:2], 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class CrossBlock(nn.Module):
    """Pre-norm block: self-attention, attention to the context, MLP. Names as in the released code, where `norm3` is of
    the tokens that look at the context and `norm4` of the context.
    """

    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads, "qv")
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm4 = nn.LayerNorm(context, eps=NORM_EPS)
        self.c_attn = CrossAttention(dim, context, heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor, start: int = 0) -> Tensor:
        """Tokens [B,T,D] and context [B,S,C] -> the outputs of tokens `start`, `start` + 1, ... [B,T-start,D]."""
        x = x[:, start:] + self.attn.tail(self.norm1(x), start)
        x = x + self.c_attn(self.norm3(x), self.norm4(context))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchPixels(nn.Module):
    """Tokens to the pixels of their patches, held as a transposed convolution: one bias per colour channel."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.ConvTranspose2d(dim, 3, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B,M,D] -> [B,M,p*p*3], inside a patch (row, column, channel)."""
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        return linear(x, weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(weight[0, 0].numel()))


class CrossDecoder(nn.Module):
    """`(latent of visible tokens, context, mask) -> prediction per patch`; `pred` turns normed tokens into predictions.

    Unlike MAE's decoder, only mask tokens get a position here: visible tokens bring theirs from the encoder. Tokens are
    kept in the order (prefix, visible, hidden), as there.
    """

    def __init__(
        self, encoder_dim: int, grid: tuple[int, int], prefix: int, pred: nn.Module, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.embed = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(dim, *grid), persistent=False)
        self.blocks = nn.ModuleList(CrossBlock(dim, encoder_dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pred = pred
        self.apply(init_mae)
        init_qkv_apart_(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, latent: Tensor, context: Tensor, mask: Mask, hidden_only: bool = False) -> Tensor:
        """Latent [B,S,D of the encoder] of the visible tokens in the order of `mask.ids_keep`, and the output [B,S,D of
        the encoder] of one of its blocks -> predictions [B,N,...] in raster order.

        With `hidden_only`, predictions [B,N-V,...] of the hidden patches in the order of `mask.ids_hidden`; the last
        block does not compute the visible ones.
        """
        x = self.embed(latent)
        blank = self.mask_token + self.positions[mask.ids_hidden]
        shown, last = x.shape[1], len(self.blocks) - 1
        x = torch.cat([x, blank.to(x.dtype)], dim=1)
        for i, block in enumerate(self.blocks):
            x = block(x, context, shown if hidden_only and i == last else 0)
        if hidden_only:
            predicted: Tensor = self.pred(self.norm(x[:, -blank.shape[1] :]))
            return predicted
        prediction: Tensor = self.pred(self.norm(x[:, self.prefix :]))
        return raster_order(prediction, mask)
