"""Weights of Hiera: names of the official files (facebookresearch/hiera) and of timm."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mimlet.errors import WeightsError
from mimlet.models.encoder import Encoder
from mimlet.models.hiera import UNIT, Hiera, resize_table
from mimlet.models.shapes import HieraShape
from mimlet.models.weights_family import POOLED, Family, State, block_count, ratio_of

if TYPE_CHECKING:
    from mimlet.models.weights import Checkpoint, LoadReport

FUSION = "multi_scale_fusion_heads."


class HieraFamily(Family):
    """Hiera.

    `norm` is that of the fused tokens, officially `encoder_norm`. A classifier's norm of the pooled tokens, our head's
    `fc_norm`, is officially `norm`, in timm `head.norm`; its linear layer `head.projection`, in timm `head.fc`.
    """

    title = "a Hiera"
    shape_type = HieraShape
    names = re.compile(
        r"pos_embed|(patch_embed\.proj|norm)\.(weight|bias)|multi_scale_fusion_heads\.\d+\.(weight|bias)|"
        r"blocks\.\d+\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12]|proj)\.(weight|bias)"
    )
    foreign = ("pos_embed_", "encoder_norm.")
    heads_by_width: ClassVar[dict[int, tuple[int, ...]]] = {46: (1,), 96: (1,), 112: (2,), 144: (2,), 256: (4,)}
    heads_hint = "of the first stage, officially 1, 2 or 4"
    heads_example = 1
    decoder_position = "learned"
    pixels = "normalised"

    def recognises(self, state: State) -> bool:
        """By the projections that double the width."""
        return any(re.fullmatch(r"blocks\.\d+\.proj\.weight", name) for name in state)

    def renamed(self, state: State) -> dict[str, Tensor]:
        """Also brings the decoder's pixels from the official order (channel, row, column) to ours (row, column,
        channel).
        """
        places = {"encoder_norm.": "norm."}
        if "head.projection.weight" in state:
            places = {"head.projection.": "head.", "norm.": "fc_norm."}
        elif "head.fc.weight" in state:
            places = {"head.fc.": "head.", "head.norm.": "fc_norm."}
        elif "head.norm.weight" in state:
            places = {"head.norm.": "norm."}
        ours = {}
        for name, value in state.items():
            theirs = next((start for start in places if name.startswith(start)), "")
            ours[places.get(theirs, "") + name.removeprefix(theirs)] = value
        for name in ("decoder_pred.weight", "decoder_pred.bias"):
            side = math.isqrt(len(ours[name]) // 3) if name in ours else 0
            if name in ours and len(ours[name]) == 3 * side * side:
                pixels = ours[name].reshape(3, side, side, *ours[name].shape[1:])
                ours[name] = pixels.movedim(0, 2).flatten(0, 2)
        return ours

    def needed(self, state: State, stored: bool) -> list[str]:
        """See `Family.needed`."""
        return ["patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"]

    def width(self, state: State) -> int:
        """Of the first stage."""
        return len(state["patch_embed.proj.weight"])

    def patch(self, state: State) -> int:
        """Four strides s of the embedding, whose kernel is 2 s - 1."""
        return 2 * (state["patch_embed.proj.weight"].shape[2] + 1)

    def stages(self, state: State) -> tuple[int, ...]:
        """Stages begin where the width doubles."""
        depth = block_count(state)
        starts = [0, *(i for i in range(depth) if f"blocks.{i}.proj.weight" in state), depth]
        return tuple(end - start for start, end in pairwise(starts))

    def shape(self, checkpoint: Checkpoint, heads: int) -> HieraShape:
        """The number of poolings shows where ends of stages are fused, each but the last by a convolution; without, a
        file with a decoder has the 2 of pre-training, another the 3 of classification.
        """
        state = checkpoint.encoder
        dim, patch, stages = self.width(state), self.patch(state), self.stages(state)
        if len(stages) != 4:
            raise WeightsError(
                f"{checkpoint.source} is not a Hiera: its width doubles in {len(stages) - 1} blocks, not 3"
            )
        fusions = sum(name.startswith(FUSION) and name.endswith("weight") for name in state)
        return HieraShape(
            image_size=self.side(checkpoint.source, "pos_embed", state["pos_embed"]) * patch // 4,
            patch=patch,
            dim=dim,
            stages=stages,
            heads=heads,
            mlp_ratio=ratio_of(len(state["blocks.0.mlp.fc1.weight"]), dim),
            q_pool=2 if fusions == 2 or (not fusions and checkpoint.decoder) else 3,
            fuse="all" if fusions else "none",
        )

    def adapted(self, encoder: Encoder, checkpoint: Checkpoint, report: LoadReport) -> dict[str, Tensor]:
        """Leaves out what fuses stages where the encoder does not."""
        state, shape = dict(checkpoint.encoder), encoder.shape
        assert isinstance(shape, HieraShape)
        fusion = [name for name in state if name.startswith(FUSION)]
        if shape.fuse == "none":
            for name in fusion:
                report.skipped[name] = "sums stages for a decoder, not part of the encoder (encoder.fuse=none)"
                del state[name]
        elif not fusion:
            raise WeightsError(
                f"{checkpoint.source} has no {FUSION[:-1]}, the sum of stages that the encoder has; "
                "set encoder.fuse=none"
            )
        elif f"{FUSION}{shape.q_pool - 1}.weight" not in state or f"{FUSION}{shape.q_pool}.weight" in state:
            raise WeightsError(
                f"{checkpoint.source} sums stages for a decoder after another number of poolings than the encoder's "
                f"{shape.q_pool}; set encoder.fuse=none, or encoder.q_pool={5 - shape.q_pool}"
            )
        return state

    def resized(self, name: str, value: Tensor, encoder: Encoder, source: str) -> tuple[Tensor, str] | None:
        """See `resize_table`."""
        if name != "pos_embed":
            return None
        assert isinstance(encoder, Hiera)
        side = self.side(source, name, value)
        if side % UNIT:
            raise WeightsError(f"{source}: {name} has {side} x {side} rows, expected a multiple of {UNIT} along a side")
        rows, columns = encoder.table_grid
        table = resize_table(value, (side, side), encoder.table_grid, UNIT)
        return table, f"{side} x {side} to {rows} x {columns} tokens, bicubic, what mask units repeat kept"

    def why_fresh(self, name: str, state: State, checkpoint: Checkpoint) -> str:
        """See `Family.why_fresh`."""
        return POOLED if name.startswith("norm.") and "fc_norm.weight" in checkpoint.head else ""

    def state(self, encoder: Hiera, classifier: bool = False) -> dict[str, Tensor]:
        """Under timm's names."""
        state = encoder.state_dict()
        norm = {f"head.{name}": state.pop(name) for name in [*state] if name.startswith("norm.")}
        return state if classifier else state | norm

    def head_state(self, state: State) -> dict[str, Tensor]:
        """Under timm's names."""
        places = {"fc_norm": "head.norm", "head": "head.fc"}
        parts = {name: name.rsplit(".", 1) for name in state}
        return {f"{places.get(part, part)}.{kind}": state[name] for name, (part, kind) in parts.items()}
