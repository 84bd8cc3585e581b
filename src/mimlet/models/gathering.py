"""Attention inside windows, and token gathering: a gathering token per window takes part in the window's attention, and
cross-attention between gathering tokens and all tokens carries what they learned across windows (Fast-iTPN, section on
token gathering). For dense inputs, where attention among all tokens costs most.

Names of the parts (no public code has them): `gathering_token`, `cross.i`, `window_rpe.i`, i the block of stage 3, from
0.

Letters: B images, N patches, n tokens on their way, W windows, P = W gathering tokens, or none, before the tokens,
D width, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.models.linear import Linear, linear
from mimlet.models.migration import Groups, Migration, take
from mimlet.models.parts import NORM_EPS, Block, attend, relative_bias, relative_index
from mimlet.models.shapes import HiViTShape


def cut(grid: tuple[int, int], side: int, device: torch.device) -> tuple[Tensor, Groups]:
    """The patches [N] of a grid (their numbers in raster order) window by window, in raster order inside each, and how
    many windows of which size follow each other.

    Windows begin at the top left. Those at the right and bottom edges are as small as the grid leaves them: the same
    attention as with whole windows, zero padding and masked keys (ViTDet's, but exact), without computing padding.
    """
    order, groups = [], []
    numbers = torch.arange(grid[0] * grid[1], device=device).view(grid)
    for band in torch.split(numbers, [grid[0] // side * side, grid[0] % side]):
        for area in torch.split(band, [grid[1] // side * side, grid[1] % side], dim=1):
            if not area.numel():
                continue
            height, width = min(side, area.shape[0]), min(side, area.shape[1])
            windows = area.view(area.shape[0] // height, height, -1, width).transpose(1, 2)
            order.append(windows.flatten())
            groups.append((windows.shape[0] * windows.shape[1], height * width))
    return torch.cat(order), tuple(groups)


def joined(groups: Groups, device: torch.device) -> Tensor:
    """Which rows of P gathering tokens and the tokens after them make up windows that begin with their gathering token:
    [P+n].
    """
    order, lead, start = [], 0, sum(count for count, _ in groups)
    for count, size in groups:
        before = torch.arange(lead, lead + count, device=device)[:, None]
        tokens = torch.arange(start, start + count * size, device=device).view(count, size)
        order.append(torch.cat([before, tokens], dim=1).flatten())
        lead, start = lead + count, start + count * size
    return torch.cat(order)


def apart(x: Tensor, groups: Groups, lead: int) -> list[Tensor]:
    """Windows in a row [B,H,T,d], each with `lead` gathering tokens, 0 or 1, before its tokens -> for each group
    [B*windows,H,lead+tokens,d].
    """
    B, H, _, d = x.shape
    parts = torch.split(x, [count * (lead + size) for count, size in groups], dim=2)
    return [
        part.view(B, H, count, lead + size, d).transpose(1, 2).flatten(0, 1)
        for part, (count, size) in zip(parts, groups, strict=True)
    ]


def together(windows: list[Tensor], groups: Groups, lead: int) -> Tensor:
    """Windows as of `apart` -> [B,H,P+n,d], all gathering tokens first."""
    rows = [x.transpose(1, 2) for x in windows]
    rows = [x.view(-1, count, *x.shape[1:]) for x, (count, _) in zip(rows, groups, strict=True)]
    before = [x[:, :, 0] for x in rows] if lead else []
    return torch.cat([*before, *(x[:, :, lead:].flatten(1, 2) for x in rows)], dim=1).transpose(1, 2)


def product(x: Tensor, rows: Tensor) -> Tensor:
    """x [B,T,D] times rows [B,K,D] of the same image: [B,T,K], of one image by the faster kernel."""
    return linear(x, rows[0]) if x.shape[0] == 1 else x @ rows.transpose(1, 2)


class CrossAttention(nn.Module):
    """Multi-head attention between the tokens of an image and its W gathering tokens, each normed: a residual branch,
    scaled by `gamma`.

    Tokens are many and gathering tokens few, so the matrices that would map every token (to queries and outputs, or to
    keys and values) are applied to the gathering tokens instead: (x Wq) k^T = x (Wq k^T). A token then costs 2 W H D
    products instead of 2 D D.

    The output layer starts at zero, so that a pre-trained network begins as it was; `gamma` starts at one.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_kv = nn.LayerNorm(dim, eps=NORM_EPS)
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim, bias=False)
        self.v_proj = Linear(dim, dim)
        self.proj = Linear(dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    @torch.no_grad()
    def init_(self) -> None:
        """See the class; the rest as any linear layer."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        nn.init.ones_(self.gamma)

    def to_tokens(self, tokens: Tensor, gathering: Tensor) -> Tensor:
        """Tokens [B,n,D] look at gathering tokens [B,W,D]: [B,n,D]."""
        x, others = self.norm_q(tokens), self.norm_kv(gathering)
        k, v = self._split(self.k_proj(others)) * self._scale, self._split(self.v_proj(others))
        keys = (k @ self._rows(self.q_proj.weight)).flatten(1, 2)
        shift = (k @ self.q_proj.bias.view(self.heads, -1, 1)).flatten(1)
        values = (v @ self._rows(self.proj.weight.t())).flatten(1, 2)
        values = self.gamma * (values + self.proj.bias / self.heads)  # the shares of all heads sum to H
        logits = product(x, keys) + shift[:, None]
        shares = logits.view(*x.shape[:2], self.heads, -1).softmax(dim=-1).flatten(2)
        return product(shares, values.transpose(1, 2))

    def from_tokens(self, gathering: Tensor, tokens: Tensor) -> Tensor:
        """Gathering tokens [B,W,D] look at tokens [B,n,D]: [B,W,D]."""
        x, others = self.norm_q(gathering), self.norm_kv(tokens)
        q = self._split(self.q_proj(x)) * self._scale
        queries = (q @ self._rows(self.k_proj.weight)).flatten(1, 2)
        read = product(queries, others).softmax(dim=-1) @ others
        heads = read.view(x.shape[0], self.heads, -1, x.shape[2]) @ self._rows(self.v_proj.weight).transpose(1, 2)
        branch: Tensor = self.gamma * self.proj(heads.transpose(1, 2).flatten(2) + self.v_proj.bias)
        return branch

    @property
    def _scale(self) -> float:
        """Of the logits."""
        return float((len(self.gamma) / self.heads) ** -0.5)

    def _split(self, x: Tensor) -> Tensor:
        """[B,W,D] -> [B,H,W,d]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _rows(self, weight: Tensor) -> Tensor:
        """A matrix [D,D] by its rows of each head, [H,d,D]."""
        return weight.view(self.heads, -1, weight.shape[1])


class Windows(nn.Module):
    """What stage 3 of a HiViT has for attention inside windows, for the encoder to inherit, since it stands beside the
    encoder's own parts. Empty without windows.
    """

    shape: HiViTShape
    windowed: tuple[int, ...]
    gathering_token: nn.Parameter | None
    cross: nn.ModuleDict
    window_rpe: nn.ParameterDict
    window_index: Tensor

    def add_windows(self) -> None:
        """Parts for the encoder's shape. `windowed`: the blocks of stage 3, from 0, that attend inside windows."""
        shape = self.shape
        self.windowed = tuple(i for i in range(shape.stages[2]) if shape.window and i + 1 not in shape.global_blocks)
        names, gathers = [str(i) for i in self.windowed], shape.gathering != "none"
        self.gathering_token = nn.Parameter(torch.zeros(1, 1, shape.dim)) if gathers else None
        if gathers:
            self.cross = nn.ModuleDict({i: CrossAttention(shape.dim, shape.heads) for i in names})
        if shape.window_relative:
            entries = (2 * shape.window - 1) ** 2 + 3
            self.window_rpe = nn.ParameterDict({i: nn.Parameter(torch.zeros(entries, shape.heads)) for i in names})
            index = relative_index(shape.window, shape.window, int(gathers))
            self.register_buffer("window_index", index, persistent=False)

    @torch.no_grad()
    def init_windows_(self) -> None:
        """Cross-attention starts as nothing, relative positions at zero, the gathering token truncated normal 0.02."""
        if self.gathering_token is not None:
            nn.init.trunc_normal_(self.gathering_token, std=0.02)
            for cross in self.cross.values():
                assert isinstance(cross, CrossAttention)
                cross.init_()
        if self.shape.window_relative:
            for table in self.window_rpe.values():
                nn.init.zeros_(table)

    def windows_for(self, grid: tuple[int, int]) -> bool:
        """Whether windows change anything on a grid: one window over all of it is the plain encoder."""
        parts = self.gathering_token is not None or self.shape.window_relative
        return parts or 0 < self.shape.window < max(grid)

    def enter(self, x: Tensor, way: Migration) -> Tensor:
        """Tokens [B,N,D] of all patches in raster order -> gathering tokens and tokens [B,P+N,D], window by window."""
        x = take(x, way.places)
        if self.gathering_token is None:
            return x
        windows = sum(count for count, _ in way.groups)
        return torch.cat([self.gathering_token.to(x.dtype).expand(x.shape[0], windows, -1), x], dim=1)

    def windowed_block(self, layer: int, block: Block, x: Tensor, way: Migration, columns: int) -> Tensor:
        """Block `layer` (of stage 3, from 0) of gathering tokens and tokens [B,P+n,D]: attention of each window with
        its gathering token, cross-attention, migration, MLP. `columns` of the grid.
        """
        prefix = x.shape[1] - way.places.shape[1]
        lead, groups = int(prefix > 0), way.groups
        y = block.norm1(x)
        if lead:
            y = take(y, joined(groups, x.device)[None])
        q, k, v = (apart(part, groups, lead) for part in block.attn.project(y))
        heads = list(map(attend, q, k, v, self._window_biases(layer, way, columns)))
        x = block.add_attention(x, block.attn.output(together(heads, groups, lead)))
        if lead:
            gathering, tokens = x[:, :prefix], x[:, prefix:]
            cross = self.cross[str(layer)]
            assert isinstance(cross, CrossAttention)
            if self.shape.gathering == "to_tokens":
                tokens = tokens + block.drop_path(cross.to_tokens(tokens, gathering))
            else:
                gathering = gathering + block.drop_path(cross.from_tokens(gathering, tokens))
            x = torch.cat([gathering, tokens], dim=1)
        if self.shape.migration:
            x = way.step(layer, x, together(k, groups, lead))
        return block.add_mlp(x)

    def _window_biases(self, layer: int, way: Migration, columns: int) -> list[Tensor | None]:
        """For each group the bias of relative positions inside its windows [windows,H,tokens,tokens]: the same for all
        windows as long as no token has left, then per image and window.
        """
        if not self.shape.window_relative:
            return [None] * len(way.groups)
        side, lead, biases = self.shape.window, int(self.gathering_token is not None), list[Tensor | None]()
        parts = torch.split(way.places, [count * size for count, size in way.groups], dim=1)
        for places, (_, size) in zip(parts, way.groups, strict=True):
            windows = places.reshape(-1, size) if way.left else places[:1, :size]
            inside = windows // columns % side * side + windows % columns % side
            inside = F.pad(inside + lead, (lead, 0))
            index = self.window_index[inside[:, :, None], inside[:, None, :]]
            biases.append(relative_bias(self.window_rpe[str(layer)], index))
        return biases
