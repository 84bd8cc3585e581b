"""What a caller may ask of an encoder (`Taps`) and what it gets (`Features`).

Blocks are numbered from 1; 0 is the embedding. Letters: B images, N patches, V visible patches, P prefix tokens
(the class token, if any), T = P + V tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """The intermediate results a caller wants. What nobody asks for is not computed.

    `hidden`: outputs of these blocks (0 = embedding). `normed`: the input of attention in the NEXT block, that is
    norm1 of block i + 1 applied to the output of block i; for the last block the final norm (MAE-lite's eq. 6 and CKA
    use these). `attention`: pre-softmax scaled logits of these blocks. `qkv`: queries, keys and values of these
    blocks. `levels`: pyramid levels by stride (hierarchical encoders only). `tokens`: whether the final, normed
    tokens are wanted; without them the encoder stops at the last block it needs.
    """

    hidden: tuple[int, ...] = ()
    normed: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    tokens: bool = True


@dataclass
class Features:
    """The answer to `Taps`: every dictionary is keyed by the numbers that were asked for.

    `tokens` [B,T,D] after the final norm; `hidden`, `normed` [B,T,D]; `attention` [B,H,T,T]; `qkv` three of [B,H,T,d];
    `levels` [B,C,h,w] by stride. `prefix` = P; `grid` = (rows, columns) of patches in the whole image.
    """

    prefix: int
    grid: tuple[int, int]
    tokens: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    normed: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    levels: dict[int, Tensor] = field(default_factory=dict)

    @property
    def latent(self) -> Tensor:
        """The final tokens [B,T,D]; an error of ours if they were not asked for."""
        assert self.tokens is not None, "tokens were not asked for: Taps(tokens=True)"
        return self.tokens

    @property
    def patches(self) -> Tensor:
        """The final patch tokens without the prefix, [B,V,D]."""
        return self.latent[:, self.prefix :]
