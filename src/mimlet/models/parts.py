"""Building blocks of the vision transformers, with parameter names as in timm and the official MAE code.

Letters: B images, T tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.models.linear import Linear, linear

NORM_EPS = 1e-6


def sincos_positions(dim: int, rows: int, columns: int) -> Tensor:
    """MAE's fixed 2-D table [rows * columns, D], raster order: first half of the channels the column index, second
    half the row index.

    Each half is concat(sin(pos * w), cos(pos * w)), w_k = 10000^(-k / (D/4)). Computed in float64, as upstream.
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """Resizes a table [1, P + N, D] to another grid: bicubic, align_corners false; the prefix rows stay."""
    if old == new:
        return table
    head, grid = table[:, :prefix], table[:, prefix:]
    image = grid.reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=new, mode="bicubic", align_corners=False)
    return torch.cat([head, image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def attention_kernel(device: torch.device, dtype: torch.dtype, tokens: int) -> Literal["fused", "explicit"]:
    """Which attention is faster here: fused, but for bf16 on a CPU up to 577 tokens, where the fused kernel is up to 7
    times slower and never faster (benchmarks/attention.py; longer sequences were not measured).
    """
    return "explicit" if device.type == "cpu" and dtype == torch.bfloat16 and tokens <= 577 else "fused"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v without keeping the logits. q, k, v [B,H,T,d], bias broadcastable to
    [B,H,T,T] -> [B,H,T,d].
    """
    if attention_kernel(q.device, q.dtype, k.shape[-2]) == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    return attention_logits(q, k, bias).softmax(dim=-1) @ v


def attention_logits(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled logits q k^T / sqrt(d) (+ bias), [B,H,T,T]: what the softmax sees."""
    logits: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return logits if bias is None else logits + bias


def relative_index(rows: int, columns: int, prefix: int) -> Tensor:
    """Index [T,T] into a table of (2 rows - 1)(2 columns - 1) + 3 offsets: (dy + rows - 1)(2 columns - 1) + dx +
    columns - 1, query minus key.

    The last three entries are class -> patch, patch -> class, class -> class (BEiT's convention); they stay unused
    without a class token. A distillation token is treated as the class token.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    patches = (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1
    if not prefix:
        return patches
    entries, tokens = (2 * rows - 1) * (2 * columns - 1), prefix + rows * columns
    index = torch.empty(tokens, tokens, dtype=torch.long)
    index[prefix:, prefix:] = patches
    index[:prefix], index[:, :prefix], index[:prefix, :prefix] = entries, entries + 1, entries + 2
    return index


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias [1,H,T,T] of a table [entries,H] at an index [T,T]; [B,H,T,T] for an index per image [B,T,T]."""
    bias = table[index].movedim(-1, -3)
    return bias if bias.dim() == 4 else bias.unsqueeze(0)


class RelativeBias(nn.Module):
    """One table of relative positions for all blocks, zero at start (the BEiT family in pre-training)."""

    def __init__(self, rows: int, columns: int, heads: int) -> None:
        super().__init__()
        entries = (2 * rows - 1) * (2 * columns - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads))

    def forward(self, index: Tensor) -> Tensor:
        """See `relative_bias`."""
        return relative_bias(self.relative_position_bias_table, index)


class Attention(nn.Module):
    """Multi-head self-attention.

    `relative` adds a learned bias per head and offset (one table per block, zero at start). Bias of the projection:
    "qkv" for queries, keys and values; "qv" for queries and values only, as separate parameters (the BEiT family and
    MAE-lite's 2023 code).
    """

    def __init__(
        self, dim: int, heads: int, bias: Literal["qkv", "qv"] = "qkv", relative: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        self.relative_position_bias_table: nn.Parameter | None = None
        if relative:
            entries = (2 * relative[0] - 1) * (2 * relative[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads))
        self.proj = Linear(dim, dim)

    def project(self, x: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
        """Queries, keys and values (the first `parts` of them) of normed tokens [B,T,D], each [B,H,T,d]."""
        dim = x.shape[-1]
        weight, bias = self._projection()
        if parts < 3:
            weight, bias = weight[: parts * dim], bias[: parts * dim]
        out = linear(x, weight, bias).view(*x.shape[:2], parts, self.heads, dim // self.heads)
        return out.permute(2, 0, 3, 1, 4).unbind(0)

    def bias(self, index: Tensor | None) -> Tensor | None:
        """The block's own relative bias, see `relative_bias`; None without a table."""
        table = self.relative_position_bias_table
        return None if table is None or index is None else relative_bias(table, index)

    def output(self, heads: Tensor) -> Tensor:
        """Joins heads [B,H,T,d] and projects: [B,T,D]."""
        joined: Tensor = self.proj(heads.transpose(1, 2).flatten(2))
        return joined

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Normed tokens [B,T,D] -> [B,T,D], nothing tapped. `bias` [1 or B,H,T,T] is added to the logits."""
        q, k, v = self.project(x)
        return self.output(attend(q, k, v, bias))

    def tail(self, x: Tensor, start: int) -> Tensor:
        """Normed tokens [B,T,D] -> the outputs of tokens `start`, `start` + 1, ... only, [B,T-start,D]: all tokens are
        keys and values, the others ask nothing.
        """
        width = x.shape[-1]
        weight, bias = self._projection()
        q = linear(x[:, start:], weight[:width], bias[:width])
        q = q.view(*q.shape[:2], self.heads, -1).transpose(1, 2)
        kv = linear(x, weight[width:], bias[width:]).view(*x.shape[:2], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.output(attend(q, *kv.unbind(0)))

    def _projection(self) -> tuple[Tensor, Tensor]:
        """Weight [3D,D] and bias [3D] of queries, keys and values."""
        bias: Tensor = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv.weight, bias


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drops a residual branch per image and scales the kept ones
    by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B,...] -> [B,...]."""
        if not self.training:
            return x
        kept = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class Block(nn.Module):
    """Pre-norm transformer block, with optional LayerScale and drop path."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        bias: Literal["qkv", "qv"] = "qkv",
        relative: tuple[int, int] | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads, bias, relative)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual of the attention branch, [B,T,D]."""
        branch: Tensor = self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        return x + branch

    def add_mlp(self, x: Tensor) -> Tensor:
        """Residual of the MLP branch, [B,T,D]."""
        y = self.mlp(self.norm2(x))
        branch: Tensor = self.drop_path(y if self.gamma_2 is None else self.gamma_2 * y)
        return x + branch

    def tail(self, x: Tensor, start: int) -> Tensor:
        """The outputs of tokens `start`, `start` + 1, ... only, [B,T-start,D], see `Attention.tail`."""
        return self.add_mlp(self.add_attention(x[:, start:], self.attn.tail(self.norm1(x), start)))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B,T,D] -> [B,T,D], nothing tapped. `bias`: see `Attention.forward`."""
        return self.add_mlp(self.add_attention(x, self.attn(self.norm1(x), bias)))


def init_mae(module: nn.Module) -> None:
    """MAE's initialisation of one module: Linear xavier-uniform (qkv as one matrix) with zero bias, LayerNorm 1 and
    0. For `Module.apply`.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def init_qkv_apart_(module: nn.Module) -> None:
    """Draws queries, keys and values of every self-attention inside as matrices of their own, xavier-uniform (MoCo
    v3's initialisation, where it differs from MAE's).
    """
    for part in module.modules():
        if isinstance(part, Attention):
            for matrix in part.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(matrix)
