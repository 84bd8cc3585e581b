"""Everything that fixes an encoder's architecture: one frozen record per family, stored with exported weights.

Free of torch. Fields are named as the settings in `[encoder]` that set them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ViTShape:
    """A plain ViT.

    `relative`: a bias of relative positions: "full" per block, "shared" by all blocks, "qv" per block together with
    `qv_bias`. `qv_bias`: biases of queries and values only (the BEiT family). `distillation_token`: one more token
    after the class token, which answers to a teacher (DeiT, G2SD). `migration`: share of the patches that is set aside
    on the way through the blocks and put back at the end (Fast-iTPN).
    """

    image_size: int = 224
    patch: int = 16
    dim: int = 192
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    class_token: bool = True
    position: Literal["sincos", "learned", "none"] = "sincos"
    relative: Literal["none", "full", "qv", "shared"] = "none"
    layer_scale: float | None = None
    distillation_token: bool = False
    qv_bias: bool = False
    migration: float = 0.0


@dataclass(frozen=True)
class HieraShape:
    """Hiera (Ryali et al. 2023): four stages of attention, pooled between them; no class token.

    `patch` is the side in px of a token of stage 3: tokens of stage 1 are a quarter of it, and a mask unit is twice as
    large. `dim` and `heads` are those of the first stage and double from stage to stage. `stages`: blocks of each.
    `q_pool`: how often tokens are pooled: 2 in pre-training, where the last stage keeps the grid of stage 3, 3 in
    classification. `fuse`: which ends of stages are summed into the tokens that a decoder reads: those before a pooling
    and the last stage; "without_last" leaves the last stage out; "none": an encoder without that part.
    """

    image_size: int = 224
    patch: int = 16
    dim: int = 46
    stages: tuple[int, ...] = (1, 2, 7, 2)
    heads: int = 1
    mlp_ratio: float = 4.0
    q_pool: Literal[2, 3] = 2
    fuse: Literal["none", "all", "without_last"] = "all"


@dataclass(frozen=True)
class HiViTShape:
    """HiViT, iTPN and Fast-iTPN: two stages of MLPs inside each patch of 16 px, then attention among patches; with a
    pyramid (`pyramid_dim` > 0) an iTPN; no class token.

    `form`: "hivit" (merging by concatenation, joint queries, keys and values, GELU) or "fast" (convolutions, inner
    norms, SwiGLU in stage 3, biases of queries and values only). `patch` is the side in px of a token of stage 3, four
    times that of stage 1. `dim` is the width of stage 3, four times that of stage 1. `stages`: MLP blocks of stages 1
    and 2, attention blocks of stage 3; merges are not counted. `relative`: "full", a table of biases per block;
    "decomposed", ViTDet's tables per axis. `position_offset`: positions are interpolated by (side + offset) / old side
    even at their own grid; 0.1 in the released pixel pre-training, detectors and segmenters of iTPN. `pyramid_hidden`:
    hidden width of the pyramid's MLPs.

    For dense inputs: `window` > 0 computes attention of stage 3 inside windows of so many tokens along a side, but for
    `global_blocks` (numbers within stage 3, from 1); `gathering` adds a gathering token per window and cross-attention,
    by which tokens read all of them ("to_tokens") or they read all tokens ("from_tokens"); `window_relative` adds a
    bias of relative positions inside windows; `migration` is the share of tokens that is set aside on the way through
    stage 3 and put back before the pyramid.
    """

    image_size: int = 224
    patch: int = 16
    dim: int = 512
    stages: tuple[int, ...] = (4, 4, 20)
    heads: int = 8
    mlp_ratio: float = 4.0
    form: Literal["hivit", "fast"] = "hivit"
    position: Literal["sincos", "learned"] = "sincos"
    relative: Literal["none", "full", "decomposed"] = "none"
    position_offset: float = 0.0
    layer_scale: float | None = None
    pyramid_dim: int = 0
    pyramid_depth: int = 0
    pyramid_hidden: int = 0
    window: int = 0
    global_blocks: tuple[int, ...] = ()
    gathering: Literal["none", "to_tokens", "from_tokens"] = "none"
    window_relative: bool = False
    migration: float = 0.0


Shape = ViTShape | HieraShape | HiViTShape
