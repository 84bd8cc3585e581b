"""What a caller may ask of an encoder (`Taps`) and what it gets (`Features`).

Blocks are numbered from 1; 0 is the embedding. Letters: B images, N patches, V visible patches, P prefix tokens
(the class token, if any), T = P + V tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mimlet.errors import ConfigError


@dataclass(frozen=True)
class Taps:
    """The intermediate results a caller wants. What nobody asks for is not computed.

    `hidden`: outputs of these blocks (0 = embedding). `normed`: the input of attention in the NEXT block, that is
    norm1 of block i + 1 applied to the output of block i; for the last block the final norm (MAE-lite's eq. 6 and CKA
    use these). `attention`: pre-softmax scaled logits of these blocks. `qkv`: queries, keys and values of these
    blocks. `stages`: ends of the stages of a hierarchical encoder, by stride in px; `levels`: levels of its pyramid.
    `decoded`: outputs of these blocks of the decoder (teachers that carry one). `tokens`: whether the final, normed
    tokens are wanted; without them the encoder stops at the last block it needs.
    """

    hidden: tuple[int, ...] = ()
    normed: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    decoded: tuple[int, ...] = ()
    tokens: bool = True

    def __or__(self, other: Taps) -> Taps:
        """What either asks for."""
        numbers = {
            kind: tuple(sorted({*getattr(self, kind), *getattr(other, kind)}))
            for kind in ("hidden", "normed", "attention", "qkv", "stages", "levels", "decoded")
        }
        return Taps(**numbers, tokens=self.tokens or other.tokens)


@dataclass
class Features:
    """The answer to `Taps`: every dictionary is keyed by the numbers that were asked for.

    `tokens` [B,T,D] after the final norm; `hidden`, `normed` [B,T,D]; `attention` [B,H,T,T]; `qkv` three of [B,H,T,d];
    `stages` and `levels` by stride, maps [B,C,h,w] of whole images, or [B,V,t,C], the t tokens inside each visible
    patch in raster order, where patches were dropped; `decoded` [B,P+N,D of the decoder], patches in raster order.
    `prefix` = P; `grid` = (rows, columns) of patches in the whole image. A hierarchical encoder's blocks have their own
    widths, numbers and order of tokens (`models/hiera.py`, `models/hivit.py`); its final tokens are patches as here.
    """

    prefix: int
    grid: tuple[int, int]
    tokens: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    normed: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    stages: dict[int, Tensor] = field(default_factory=dict)
    levels: dict[int, Tensor] = field(default_factory=dict)
    decoded: dict[int, Tensor] = field(default_factory=dict)

    @property
    def latent(self) -> Tensor:
        """The final tokens [B,T,D]; an error of ours if they were not asked for."""
        assert self.tokens is not None, "tokens were not asked for: Taps(tokens=True)"
        return self.tokens

    @property
    def patches(self) -> Tensor:
        """The final patch tokens without the prefix, [B,V,D]."""
        return self.latent[:, self.prefix :]

    def attended(
        self, block: int, token: int | None = None, layout: tuple[tuple[int, int], Tensor] | None = None
    ) -> Tensor:
        """Share of a token's attention in `block` that each patch receives, per head: [B,H,rows,columns], of whole
        images; asked for by `Taps.attention`. `layout`: of the block's tokens (`Encoder.layout`), where it is not that
        of the patches.

        The token is the class token, or number `token` (prefix tokens count); without either, the mean over all
        patches. As in DINO's pictures (Caron et al. 2021) the softmax is over all keys, and the prefix's share is left
        out afterwards: a map sums to what the patches receive, at most 1.
        """
        logits = self.attention[block].float()
        if token is not None or self.prefix:
            logits = logits[:, :, token or 0, None]
        shares = logits.softmax(dim=-1).mean(dim=2)[..., self.prefix :]
        grid, order = layout or (self.grid, slice(None))
        return shares[..., order].reshape(*shares.shape[:2], *grid)

    def trimmed(self, prefix: int) -> Features:
        """The same with the first `prefix` of the prefix tokens only: without distillation and register tokens."""
        if prefix == self.prefix:
            return self

        def trim(x: Tensor, dim: int = -2) -> Tensor:
            patches = x.narrow(dim, self.prefix, x.shape[dim] - self.prefix)
            return torch.cat([x.narrow(dim, 0, prefix), patches], dim)

        hidden, normed, decoded = (
            {i: trim(x) for i, x in maps.items()} for maps in (self.hidden, self.normed, self.decoded)
        )
        tokens = None if self.tokens is None else trim(self.tokens)
        attention = {i: trim(trim(x), -1) for i, x in self.attention.items()}
        qkv = {i: (trim(q), trim(k), trim(v)) for i, (q, k, v) in self.qkv.items()}
        return Features(
            prefix,
            self.grid,
            tokens=tokens,
            hidden=hidden,
            normed=normed,
            attention=attention,
            qkv=qkv,
            stages=self.stages,
            levels=self.levels,
            decoded=decoded,
        )

    def resized(self, grid: tuple[int, int]) -> Features:
        """The same for another grid of patches: tokens, queries, keys and values are interpolated (bilinear), prefix
        tokens stay. Of whole images only; raises `ConfigError` for attention logits, which have no such map.
        """
        if self.attention:
            raise ConfigError(
                f"attention logits of {self.grid[0]} x {self.grid[1]} patches cannot be resized to "
                f"{grid[0]} x {grid[1]}; set teacher.grid=input"
            )
        maps = {
            kind: {i: self._resized(x, grid) for i, x in getattr(self, kind).items()}
            for kind in ("hidden", "normed", "decoded")
        }
        qkv = {
            i: (self._resized(q, grid), self._resized(k, grid), self._resized(v, grid))
            for i, (q, k, v) in self.qkv.items()
        }
        tokens = None if self.tokens is None else self._resized(self.tokens, grid)
        return Features(self.prefix, grid, tokens=tokens, qkv=qkv, **maps)

    def _resized(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[..., P+N, D] -> [..., P+N', D]."""
        shape = tokens.shape
        flat = tokens.reshape(-1, *shape[-2:])
        image = flat[:, self.prefix :].transpose(1, 2).reshape(len(flat), shape[-1], *self.grid)
        image = F.interpolate(image.float(), grid, mode="bilinear", antialias=True).to(tokens.dtype)
        joined = torch.cat([flat[:, : self.prefix], image.flatten(2).transpose(1, 2)], dim=1)
        return joined.view(*shape[:-2], *joined.shape[1:])
