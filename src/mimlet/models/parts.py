"""Building blocks of the vision transformers, with parameter names as in timm and the official MAE code.

Letters: B images, T tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mimlet.models.linear import Linear, LinearGelu, linear, linear_gelu

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


def resize_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, offset: float = 0.0
) -> Tensor:
    """Resizes a table [1, P + N, D] to another grid: bicubic, align_corners false; the prefix rows stay.

    With an `offset`, places are read (old side) / (new side + offset) apart, also where the grids are the same: DINO's
    code adds 0.1 against rounding, and iTPN's, which follows it, resamples at its own grid too.
    """
    if old == new and not offset:
        return table
    head, grid = table[:, :prefix], table[:, prefix:]
    image = grid.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    if offset:
        scale = [(after + offset) / before for before, after in zip(old, new, strict=True)]
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return torch.cat([head, image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def take_patches(lines: Tensor, patch: int, ids: Tensor) -> Tensor:
    """Patches `ids` [B,M] (raster order) of planes [B,n,h,w/p,l], in which l numbers lie together in a line of a patch:
    [B,M,n*p*l], plane by plane, line by line. Lines move as they are, on a CPU in a quarter of the time that indexing
    of whole tiles takes.
    """
    B, planes, height, columns, length = lines.shape
    of_plane = torch.arange(B * planes, device=ids.device).view(B, 1, planes, 1) * height
    of_patch = (ids // columns)[:, :, None, None] * patch + torch.arange(patch, device=ids.device)
    rows = (of_plane + of_patch) * columns + (ids % columns)[:, :, None, None]
    return lines.reshape(-1, length).index_select(0, rows.flatten()).view(*ids.shape, -1)


def attention_kernel(device: torch.device, dtype: torch.dtype, tokens: int) -> Literal["fused", "explicit"]:
    """Which attention is faster here: fused, but on a CPU for bf16 up to 577 tokens, where the fused kernel is up to 8
    times slower, and for float32 up to 64 (benchmarks/attention.py; longer sequences in bf16 were not measured). Fused
    also takes float32 under autocast, which casts it.
    """
    longest = 577 if dtype == torch.bfloat16 else 64 if dtype == torch.float32 else 0
    cast = dtype == torch.float32 and torch.is_autocast_enabled(device.type)
    return "explicit" if device.type == "cpu" and tokens <= longest and not cast else "fused"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v without keeping the logits. q, k, v [B,H,T,d], bias broadcastable to
    [B,H,T,T] -> [B,H,T,d].
    """
    if attention_kernel(q.device, q.dtype, k.shape[-2]) == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    if bias is None and not torch.compiler.is_compiling():
        out: Tensor = _Attend.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out
    return attention_logits(q, k, bias).softmax(dim=-1) @ v


class _Attend(torch.autograd.Function):
    """Explicit attention that makes nothing twice: the logits are not kept, nothing is copied for a product, and the
    softmax is float32 in bf16 too, which PyTorch does twice as fast.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, *qkv: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in qkv)
        q = q * q.shape[-1] ** -0.5
        weights = torch.bmm(q, k.mT).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).view_as(qkv[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights = ctx.saved_tensors
        lead, gradient = gradient.shape[:2], gradient.flatten(0, 1)
        for_logits = torch.ops.aten._softmax_backward_data(torch.bmm(gradient, v.mT), weights, -1, weights.dtype)
        for_q = torch.bmm(for_logits, k).mul_(q.shape[-1] ** -0.5)
        gradients = for_q, torch.bmm(for_logits.mT, q), torch.bmm(weights.mT, gradient)
        return tuple(x.view(*lead, *x.shape[1:]) for x in gradients)


def split_heads(x: Tensor) -> tuple[Tensor, ...]:
    """[B,T,n,H,d] -> n tensors [B,H,T,d]; on a CPU each in one piece, so that no product has to copy it."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        parts: tuple[Tensor, ...] = _SplitHeads.apply(x)  # type: ignore[no-untyped-call]
        return parts
    return x.permute(2, 0, 3, 1, 4).unbind(0)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        return tuple(part.transpose(1, 2).contiguous() for part in x.unbind(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        joined = gradients[0].new_empty(ctx.shape)
        for i, part in enumerate(gradients):
            joined[:, :, i] = part.transpose(1, 2)
        return joined


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


def decomposed_bias(
    q: Tensor, rel_h: Tensor, rel_w: Tensor, grid: tuple[int, int], ids: Tensor | None = None
) -> Tensor:
    """ViTDet's bias [B,H,T,T] of relative positions, one table per axis (Li et al. 2022, "Exploring plain vision
    transformer backbones for object detection", appendix): q_i . rel_h[row_i - row_j] + q_i . rel_w[column_i -
    column_j] with unscaled queries [B,H,T,d].

    Tables [2 side - 1, d], resized linearly to the `grid`; the tokens are all of it, or those at `ids` [B,T].
    """
    rows, columns = grid
    places = torch.arange(rows * columns, device=q.device)[None] if ids is None else ids
    axes = []
    for table, side, at in ((rel_h, rows, places // columns), (rel_w, columns, places % columns)):
        if len(table) != 2 * side - 1:
            resized = F.interpolate(table.float().t()[None], 2 * side - 1, mode="linear")
            table = resized[0].t().to(table.dtype)
        index = at[:, None, :, None] - torch.arange(side, device=q.device) + side - 1
        axes.append((q @ table.t()).gather(-1, index.expand(*q.shape[:3], side)))
    bias = (axes[0][..., :, None] + axes[1][..., None, :]).flatten(-2)
    return bias if ids is None else bias.gather(-1, ids[:, None, None].expand(*q.shape[:3], -1))


class RelativeBias(nn.Module):
    """One table of relative positions for all blocks, zero at start (the BEiT family in pre-training)."""

    def __init__(self, rows: int, columns: int, heads: int) -> None:
        super().__init__()
        entries = (2 * rows - 1) * (2 * columns - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads))

    def forward(self, index: Tensor) -> Tensor:
        """See `relative_bias`."""
        return relative_bias(self.relative_position_bias_table, index)


class SelfAttention(nn.Module):
    """Multi-head self-attention whose queries, keys and values one product gives; how its weights are held is the
    business of a subclass, and so are the tables of relative positions (all None here).
    """

    proj: Linear

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table: nn.Parameter | None = None
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None

    def project(self, x: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
        """Queries, keys and values (the first `parts` of them) of normed tokens [B,T,D], each [B,H,T,d]: views."""
        return self._joined(x, parts).permute(2, 0, 3, 1, 4).unbind(0)

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
        q, k, v = split_heads(self._joined(x))
        return self.output(attend(q, k, v, bias))

    def tail(self, x: Tensor, start: int) -> Tensor:
        """Normed tokens [B,T,D] -> the outputs of tokens `start`, `start` + 1, ... only, [B,T-start,D]: all tokens are
        keys and values, the others ask nothing.
        """
        width = x.shape[-1]
        weight, bias = self._projection()
        q = linear(x[:, start:], weight[:width], bias[:width])
        q = q.view(*q.shape[:2], self.heads, -1).transpose(1, 2)
        kv = linear(x, weight[width:], bias[width:]).view(*x.shape[:2], 2, self.heads, -1)
        return self.output(attend(q, *split_heads(kv)))

    def _joined(self, x: Tensor, parts: int = 3) -> Tensor:
        """Queries, keys and values (the first `parts` of them), [B,T,parts,H,d]."""
        dim = x.shape[-1]
        weight, bias = self._projection()
        if parts < 3:
            weight, bias = weight[: parts * dim], bias[: parts * dim]
        return linear(x, weight, bias).view(*x.shape[:2], parts, self.heads, dim // self.heads)

    def _projection(self) -> tuple[Tensor, Tensor]:
        """Weight [3D,D] and bias [3D] of queries, keys and values."""
        raise NotImplementedError


class Attention(SelfAttention):
    """Multi-head self-attention with one matrix for queries, keys and values.

    `relative` adds a learned bias per head and offset (one table per block, zero at start). Bias of the projection:
    "qkv" for queries, keys and values; "qv" for queries and values only, as separate parameters (the BEiT family and
    MAE-lite's 2023 code).
    """

    def __init__(
        self, dim: int, heads: int, bias: Literal["qkv", "qv"] = "qkv", relative: tuple[int, int] | None = None
    ) -> None:
        super().__init__(heads)
        self.qkv = Linear(dim, 3 * dim, bias=bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        if relative:
            entries = (2 * relative[0] - 1) * (2 * relative[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads))
        self.proj = Linear(dim, dim)

    def _projection(self) -> tuple[Tensor, Tensor]:
        bias: Tensor = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv.weight, bias


class SplitAttention(SelfAttention):
    """Multi-head self-attention with a matrix each for queries, keys and values; keys have no bias (Fast-iTPN)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(heads)
        self.q_proj = Linear(dim, dim, bias=False)
        self.k_proj = Linear(dim, dim, bias=False)
        self.v_proj = Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def _projection(self) -> tuple[Tensor, Tensor]:
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        return weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class TileConv(nn.Conv2d):
    """A convolution whose stride is its kernel, of maps with the channels last: a product of each tile; with `gelu`,
    then exact GELU.
    """

    def __init__(self, dim: int, out: int, side: int, gelu: bool = False) -> None:
        super().__init__(dim, out, side, side)
        self.product = linear_gelu if gelu else linear

    def forward(self, x: Tensor) -> Tensor:
        """[...,h,w,C] -> [...,h/side,w/side,out]; with a side of 1 also [...,C] -> [...,out]."""
        side = self.kernel_size[0]
        if side > 1:
            *lead, height, width, dim = x.shape
            x = x.reshape(*lead, height // side, side, width // side, side, dim).transpose(-4, -3).flatten(-3)
        assert self.bias is not None
        return self.product(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


PART = 256
"""Rows that a CPU computes at once where it can: so few that what comes in between stays in its caches."""


def in_parts(run: Callable[..., list[Tensor]], *x: Tensor) -> list[Tensor]:
    """What `run` makes of tensors [B,n,...], in which it takes each of the B n rows by itself; on a CPU and without
    gradient at most `PART` rows at a time.
    """
    lead = x[0].shape[:2]
    whole = torch.compiler.is_compiling() or torch.is_grad_enabled() or x[0].device.type != "cpu"
    if whole or lead.numel() <= PART:
        return run(*x)
    count = -(-lead.numel() // PART)
    made = [run(*part) for part in zip(*(y.flatten(0, 1)[None].chunk(count, 1) for y in x), strict=True)]
    return [torch.cat(y, dim=1).view(*lead, *y[0].shape[2:]) for y in zip(*made, strict=True)]


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = LinearGelu(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,D]."""
        out: Tensor = self.fc2(self.fc1(x))
        return out


class ConvMlp(nn.Module):
    """The same, held as 1x1 convolutions; `inner_norm` norms the hidden features (Fast-iTPN)."""

    def __init__(self, dim: int, hidden: int, inner_norm: bool) -> None:
        super().__init__()
        self.fc1 = TileConv(dim, hidden, 1, gelu=True)
        self.ffn_ln: nn.Module = nn.LayerNorm(hidden, eps=NORM_EPS) if inner_norm else nn.Identity()
        self.fc2 = TileConv(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]."""
        out: Tensor = self.fc2(self.ffn_ln(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """w3(norm(silu(w1 x) * w2 x)): a gated MLP with a norm of the hidden features (Fast-iTPN)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden)
        self.w2 = Linear(dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]."""
        out: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))
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


class MlpBlock(nn.Module):
    """The half of a pre-norm transformer block that has no attention: x + mlp(norm2(x)), with optional LayerScale and
    drop path.
    """

    def __init__(self, dim: int, mlp: nn.Module, layer_scale: float | None = None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = mlp
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B,...,D] -> [B,...,D]."""
        y = in_parts(lambda x: [self.mlp(self.norm2(x))], x)[0]
        branch: Tensor = self.drop_path(y if self.gamma_2 is None else self.gamma_2 * y)
        return x + branch


class Block(nn.Module):
    """Pre-norm transformer block, with optional LayerScale and drop path. `attn` and `mlp` take the place of its own
    attention and MLP.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        bias: Literal["qkv", "qv"] = "qkv",
        relative: tuple[int, int] | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        attn: SelfAttention | None = None,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads, bias, relative) if attn is None else attn
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, round(dim * mlp_ratio)) if mlp is None else mlp
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
