"""Weights of plain ViTs: names of timm, of the official MAE files, of the BEiT family."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mimlet.errors import WeightsError
from mimlet.models.encoder import Encoder
from mimlet.models.parts import resize_positions
from mimlet.models.shapes import Shape, ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights_family import (
    ONLY_FINE_TUNED,
    POOLED,
    TABLE,
    Family,
    State,
    block_count,
    block_number,
    lacks,
)

if TYPE_CHECKING:
    from mimlet.models.weights import Checkpoint, LoadReport

OTHER_NAMES = {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2", "pred_head.transforms.0.0.": "norm."}
"""timm's layer scale; the head's norm in MaskFeat's files, where no other follows the last block."""
FINE_TUNED_PARTS = (TABLE, "gamma_1", "gamma_2", "q_bias", "v_bias", "dist_token")
SHARED_TABLE = f"rel_pos_bias.{TABLE}"


class ViTFamily(Family):
    """Plain ViTs."""

    title = "a plain ViT"
    shape_type = ViTShape
    names = re.compile(
        r"(cls|dist)_token|pos_embed|(patch_embed\.proj|norm)\.(weight|bias)|"
        r"rel_pos_bias\.relative_position_bias_table|blocks\.\d+\.("
        r"(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)|gamma_[12]|"
        r"attn\.([qv]_bias|relative_position_bias_table))"
    )
    foreign = ("reg_token", "register_tokens", "norm_pre.")
    heads_by_width: ClassVar[dict[int, tuple[int, ...]]] = {
        192: (3, 12),
        384: (6, 12),
        768: (12,),
        1024: (16,),
        1280: (16,),
    }
    heads_hint = "timm and DeiT: width / 64; MAE-lite: 12"
    heads_example = 12

    def recognises(self, state: State) -> bool:
        """Whatever no other family claims."""
        return True

    def renamed(self, state: State) -> dict[str, Tensor]:
        """See `OTHER_NAMES`. Adds the distillation token's row of the table of positions to the token itself, as our
        encoder has none for it: DeiT's and timm's tables have that row (2 + N), G2SD's have not (1 + N).
        """
        ours = dict(state)
        for theirs, our in OTHER_NAMES.items():
            ours = {name.replace(theirs, our): value for name, value in ours.items()}
        if "dist_token" in ours and "pos_embed" in ours:
            table = ours["pos_embed"]
            patches = table.shape[1] - 2
            if math.isqrt(patches) ** 2 == patches:
                ours["dist_token"] = ours["dist_token"] + table[:, 1:2]
                ours["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)
        return ours

    def part(self, name: str, state: State) -> str:
        """See `Family.part`."""
        number = block_number(name)
        if number >= 0 and f"blocks.{number}.attn.proj.weight" not in state:
            return "the attention-only block of D²-MAE"
        return super().part(name, state)

    def needed(self, state: State, stored: bool) -> list[str]:
        """See `Family.needed`."""
        names = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"]
        return names if stored else [*names, _relative_table(state) or "pos_embed"]

    def customs(self, state: State, container: str, wrapper: str) -> tuple[int, ...]:
        """In MAE-lite (saved under "model", wrapped in "model.") and MoCo v3, ViT-Tiny and ViT-Small have 12, too."""
        customs = super().customs(state, container, wrapper)
        if 12 in customs and ((container, wrapper) == ("model", "model.") or wrapper == "base_encoder."):
            return (12,)
        return customs

    def width(self, state: State) -> int:
        """See `Family.width`."""
        return len(state["patch_embed.proj.weight"])

    def patch(self, state: State) -> int:
        """See `Family.patch`."""
        return state["patch_embed.proj.weight"].shape[2]

    def stages(self, state: State) -> tuple[int, ...]:
        """The number of blocks."""
        return (block_count(state),)

    def shape(self, checkpoint: Checkpoint, heads: int) -> ViTShape:
        """See `Family.shape`."""
        state = checkpoint.encoder
        dim, patch = self.width(state), self.patch(state)
        own = f"blocks.0.attn.{TABLE}" in state
        qv = "blocks.0.attn.q_bias" in state
        scale = state.get("blocks.0.gamma_1")
        if "pos_embed" in state:
            side = self.side(checkpoint.source, "pos_embed", state["pos_embed"], int("cls_token" in state))
        else:
            side = (math.isqrt(len(state[_relative_table(state)]) - 3) + 1) // 2
        return ViTShape(
            image_size=side * patch,
            patch=patch,
            dim=dim,
            depth=block_count(state),
            heads=heads,
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
            class_token="cls_token" in state,
            position="learned" if "pos_embed" in state else "none",
            relative=("qv" if qv else "full") if own else "shared" if SHARED_TABLE in state else "none",
            qv_bias=qv and not own,
            layer_scale=None if scale is None else float(scale.float().mean()),
            distillation_token="dist_token" in state,
        )

    def check(self, encoder: Encoder, checkpoint: Checkpoint, keep_blocks: int | None, report: LoadReport) -> None:
        """See `Family.check`."""
        if ("cls_token" in checkpoint.encoder) != bool(encoder.prefix):
            raise WeightsError(
                f"{checkpoint.source} has {'a' if 'cls_token' in checkpoint.encoder else 'no'} class token, "
                f"the encoder {'one' if encoder.prefix else 'none'}: set encoder.class_token"
            )
        super().check(encoder, checkpoint, keep_blocks, report)
        _check_form(encoder.shape, checkpoint)

    def adapted(self, encoder: Encoder, checkpoint: Checkpoint, report: LoadReport) -> dict[str, Tensor]:
        """Spreads a shared table over the blocks of an encoder with a table each; leaves out a joint bias of queries,
        keys and values where those have separate ones.
        """
        state, shape = dict(checkpoint.encoder), encoder.shape
        assert isinstance(shape, ViTShape)
        if SHARED_TABLE in state and shape.relative in ("full", "qv"):
            shared = state.pop(SHARED_TABLE)
            state |= {f"blocks.{i}.attn.{TABLE}": shared for i in range(encoder.depth)}
            report.notes.append("the table of relative positions that all blocks shared starts the table of each block")
        if shape.qv_bias or shape.relative == "qv":
            for name in [name for name in state if name.endswith("attn.qkv.bias")]:
                report.skipped[name] = "the encoder has separate biases of queries and values"
                del state[name]
        return state

    def block_of(self, name: str, encoder: Encoder) -> int:
        """See `Family.block_of`."""
        return -1 if name in ("cls_token", "dist_token", SHARED_TABLE) else super().block_of(name, encoder)

    def resized(self, name: str, value: Tensor, encoder: Encoder, source: str) -> tuple[Tensor, str] | None:
        """Bicubic; tables of relative positions stay."""
        if name != "pos_embed":
            return None
        assert isinstance(encoder, ViT)
        side = self.side(source, name, value, encoder.placed)
        rows, columns = encoder.grid
        table = resize_positions(value, (side, side), encoder.grid, encoder.placed)
        return table, f"{side} x {side} to {rows} x {columns} patches, bicubic"

    def why_fresh(self, name: str, state: State, checkpoint: Checkpoint) -> str:
        """See `Family.why_fresh`."""
        kind = next((part for part in FINE_TUNED_PARTS if name.endswith(part)), None)
        if kind and lacks(kind, state):
            return ONLY_FINE_TUNED
        return POOLED if name.startswith("norm.") and "fc_norm.weight" in checkpoint.head else ""

    def hint(self, name: str) -> str:
        """See `Family.hint`."""
        if name == "dist_token":
            return "Only the method classify with method.distill.token=distillation can go on with such an encoder"
        return super().hint(name)

    def state(self, encoder: ViT, classifier: bool = False) -> dict[str, Tensor]:
        """Under timm's names; a distillation token has a row of zeros in timm's table of positions."""
        state = encoder.state_dict()
        if not of_beit_family(encoder.shape):
            state = {
                name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): value
                for name, value in state.items()
            }
        if encoder.dist_token is not None and encoder.pos_embed is not None:
            table = state["pos_embed"]
            state["pos_embed"] = torch.cat([table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]], dim=1)
        return {name: value for name, value in state.items() if not (classifier and name.startswith("norm."))}


def of_beit_family(shape: ViTShape) -> bool:
    """Whether an encoder has a part that timm has in `Beit` and not in its plain ViT: relative positions, or biases of
    queries and values alone.
    """
    return shape.relative != "none" or shape.qv_bias


def _check_form(shape: Shape, checkpoint: Checkpoint) -> None:
    """Refuses a file with positions, biases or a layer scale that the encoder has no place for; says what to set."""
    assert isinstance(shape, ViTShape)
    state, form = checkpoint.encoder, dict[str, str]()
    separate, table = "blocks.0.attn.q_bias" in state, _relative_table(state)
    if ("pos_embed" in state) != (shape.position != "none"):
        learned = checkpoint.shape.position if isinstance(checkpoint.shape, ViTShape) else "learned"
        form["position"] = learned if "pos_embed" in state else "none"
    if table and shape.relative in (("none",) if table == SHARED_TABLE else ("none", "shared")):
        form["relative"] = "qv" if separate else "full"
    if separate and not (shape.qv_bias or "qv" in (shape.relative, form.get("relative"))):
        form["qv_bias"] = "true"
    if "blocks.0.gamma_1" in state and shape.layer_scale is None:
        form["layer_scale"] = "0.1"
    if form:
        wanted = " ".join(f"encoder.{name}={value}" for name, value in form.items())
        keep = "; or relative=shared, to keep one table for all blocks" if table == SHARED_TABLE else ""
        raise WeightsError(
            f"{checkpoint.source} is a ViT with parts that the encoder lacks, or without some of its parts: it would "
            f"compute something else. Set {wanted}{keep if 'relative' in form else ''}"
        )


def _relative_table(state: State) -> str:
    """Name of the table of relative positions that all blocks share, or of the first block's own; empty without."""
    return next((name for name in (SHARED_TABLE, f"blocks.0.attn.{TABLE}") if name in state), "")
