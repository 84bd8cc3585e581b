"""Weights of HiViT, iTPN and Fast-iTPN under their official names."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from mimlet.errors import WeightsError
from mimlet.models.encoder import Encoder
from mimlet.models.hivit import HiViT
from mimlet.models.parts import resize_positions
from mimlet.models.shapes import HiViTShape
from mimlet.models.weights_family import (
    OF_PRETRAINING,
    ONLY_FINE_TUNED,
    TABLE,
    Family,
    State,
    block_count,
    block_number,
    lacks,
    ratio_of,
    settings_for,
)

if TYPE_CHECKING:
    from mimlet.models.weights import Checkpoint, LoadReport

PYRAMID = ("align_dim_", "split_", "block_16to8.", "block_8to4.", "fpn_modules.")
PRETRAINING = ("norm.", "norm_cls.", "mask_token", "decoder_", "lm_head.", "lm_cls_head.", "cls_pt_layers.")
DENSE = ("gathering_token", "cross.", "window_rpe.")
AXES = ("rel_pos_h", "rel_pos_w")
FINE_TUNED_PARTS = (TABLE, *AXES, "gamma_1", "gamma_2")


class HiViTFamily(Family):
    """HiViT, iTPN and Fast-iTPN. `norm` is the encoder's in Fast-iTPN, before the pyramid; elsewhere a decoder's
    (HiViT-MAE) or a head's (iTPN with a CLIP teacher).
    """

    title = "a HiViT or iTPN"
    shape_type = HiViTShape
    names = re.compile(
        r"(absolute_)?pos_embed|patch_embed\.(proj|norm)\.(weight|bias)|blocks\.\d+\.("
        r"(norm[12]?|reduction|attn\.(qkv|[qkv]_proj|proj)|mlp\.(fc[12]|w[123]|ffn_ln))\.(weight|bias)|"
        r"gamma_[12]|attn\.([qv]_bias|relative_position_bias_table|rel_pos_[hw]))"
    )
    heads_by_width: ClassVar[dict[int, tuple[int, ...]]] = {384: (6,), 512: (8,), 768: (12,)}
    heads_hint = "officially width / 64"
    heads_example = 8
    pixels = "normalised"

    def recognises(self, state: State) -> bool:
        """By the merges."""
        return any(re.fullmatch(r"blocks\.\d+\.reduction\.weight", name) for name in state)

    def part(self, name: str, state: State) -> str:
        """See `Family.part`."""
        if name.startswith((*PYRAMID, *DENSE)) or (name.startswith("norm.") and _is_fast(state) and has_pyramid(state)):
            return "encoder"
        if name.startswith(PRETRAINING):
            return "decoder" if "decoder_pred.weight" in state else OF_PRETRAINING
        return super().part(name, state)

    def needed(self, state: State, stored: bool) -> list[str]:
        """See `Family.needed`."""
        merges = [i for i in range(block_count(state)) if f"blocks.{i}.reduction.weight" in state]
        last = f"blocks.{block_count(state) - 1}."
        mlp = "mlp.w1.weight" if _is_fast(state) else "mlp.fc1.weight"
        table = "pos_embed" if _is_fast(state) else "absolute_pos_embed"
        second = [] if len(merges) == 2 else ["second merge"]
        return ["patch_embed.proj.weight", table, *second, f"{last}attn.proj.weight", last + mlp]

    def customs(self, state: State, container: str, wrapper: str) -> tuple[int, ...]:
        """A table of relative positions has a column per head, or one per number of a head."""
        last = f"blocks.{block_count(state) - 1}.attn."
        if last + TABLE in state:
            return (state[last + TABLE].shape[1],)
        if f"{last}rel_pos_h" in state:
            return (self.width(state) // state[f"{last}rel_pos_h"].shape[1],)
        return super().customs(state, container, wrapper)

    def width(self, state: State) -> int:
        """Of stage 3."""
        return 4 * len(state["patch_embed.proj.weight"])

    def patch(self, state: State) -> int:
        """Of stage 3."""
        return 4 * state["patch_embed.proj.weight"].shape[2]

    def stages(self, state: State) -> tuple[int, ...]:
        """Blocks before, between and after the merges."""
        first, second = (i for i in range(block_count(state)) if f"blocks.{i}.reduction.weight" in state)
        return first, second - first - 1, block_count(state) - second - 1

    def shape(self, checkpoint: Checkpoint, heads: int) -> HiViTShape:
        """See `Family.shape`. What a table of positions began as does not show, and it is always trained; iTPN's
        pre-training on pixels resamples it by 14.1 / 14.
        """
        state, fast = checkpoint.encoder, _is_fast(checkpoint.encoder)
        dim, patch, last = self.width(state), self.patch(state), f"blocks.{block_count(state) - 1}."
        table = "pos_embed" if fast else "absolute_pos_embed"
        scale = state.get(f"{last}gamma_1")
        pyramid = has_pyramid(state)
        return HiViTShape(
            image_size=self.side(checkpoint.source, table, state[table]) * patch,
            patch=patch,
            dim=dim,
            stages=self.stages(state),
            heads=heads,
            mlp_ratio=ratio_of(len(state[last + ("mlp.w1.weight" if fast else "mlp.fc1.weight")]), dim),
            form="fast" if fast else "hivit",
            position="learned",
            relative="full"
            if f"{last}attn.{TABLE}" in state
            else "decomposed"
            if f"{last}attn.rel_pos_h" in state
            else "none",
            position_offset=0.1 if "decoder_embed.0.0.weight" in checkpoint.decoder else 0.0,
            layer_scale=None if scale is None else float(scale.float().mean()),
            pyramid_dim=len(state["fpn_modules.0.norm2.weight"]) if pyramid else 0,
            pyramid_depth=_pyramid_depth(state) if pyramid else 0,
            pyramid_hidden=len(state["fpn_modules.0.mlp.fc1.weight"]) if pyramid else 0,
        )

    def check(self, encoder: Encoder, checkpoint: Checkpoint, keep_blocks: int | None, report: LoadReport) -> None:
        """See `Family.check`."""
        state, source, shape = checkpoint.encoder, checkpoint.source, encoder.shape
        assert isinstance(shape, HiViTShape)
        fast = _is_fast(state)
        if fast != (shape.form == "fast"):
            theirs, ours = ("Fast-iTPN", "HiViT or iTPN") if fast else ("HiViT or iTPN", "Fast-iTPN")
            raise WeightsError(
                f"{source} is of the form of {theirs}, the encoder of {ours}; "
                f"set {settings_for(self.shape(checkpoint, 1))}"
            )
        super().check(encoder, checkpoint, keep_blocks, report)
        if has_pyramid(state) and shape.pyramid_dim:
            numbers = {
                "pyramid_dim": (len(state["fpn_modules.0.norm2.weight"]), shape.pyramid_dim),
                "pyramid_depth": (_pyramid_depth(state), shape.pyramid_depth),
                "pyramid_hidden": (len(state["fpn_modules.0.mlp.fc1.weight"]), shape.pyramid_hidden),
            }
            other = {name: pair for name, pair in numbers.items() if pair[0] != pair[1]}
            if other:
                theirs, ours = (", ".join(f"{name} {pair[i]}" for name, pair in other.items()) for i in (0, 1))
                wanted = " ".join(f"encoder.{name}={pair[0]}" for name, pair in other.items())
                raise WeightsError(f"{source} has a pyramid of {theirs}, the encoder of {ours}; set {wanted}")
        form = []
        if shape.relative == "none" and not shape.window:
            form += ["relative=full"] if any(_is_whole_table(*each) for each in state.items()) else []
            form += ["relative=decomposed"] if any(name.endswith(AXES) for name in state) else []
        if shape.layer_scale is None and any("gamma_" in name for name in state):
            form.append("layer_scale=0.1")
        if form:
            raise WeightsError(
                f"{source} has parts that the encoder lacks: it would compute something else. "
                f"Set {' '.join(f'encoder.{each}' for each in form)}"
            )

    def adapted(self, encoder: Encoder, checkpoint: Checkpoint, report: LoadReport) -> dict[str, Tensor]:
        """Leaves out the pyramid of an encoder without one, and tables of relative positions that another
        kind or attention in windows replaces (as in iTPN's detectors).
        """
        state, shape = dict(checkpoint.encoder), encoder.shape
        assert isinstance(shape, HiViTShape)
        reasons = {}
        for name, value in state.items():
            if not shape.pyramid_dim and name.startswith((*PYRAMID, "norm.")):
                reasons[name] = "pyramid, not part of the encoder (encoder.pyramid_depth=0)"
            elif shape.relative == "decomposed" and _is_whole_table(name, value):
                reasons[name] = "the encoder has relative positions of another kind (encoder.relative=decomposed)"
            elif shape.window and (_is_whole_table(name, value) or name.endswith(AXES)):
                reasons[name] = "relative positions of whole images, and the encoder has windows (encoder.window)"
        report.skipped.update(reasons)
        return {name: value for name, value in state.items() if name not in reasons}

    def block_of(self, name: str, encoder: Encoder) -> int:
        """A merge is loaded with the block after it; the pyramid with none, so that the first blocks come without."""
        shape = encoder.shape
        assert isinstance(shape, HiViTShape)
        number = block_number(name)
        if number >= 0:
            first = shape.stages[0]
            return number - (number > first) - (number > first + 1 + shape.stages[1])
        return encoder.depth if name.startswith((*PYRAMID, "norm.")) else super().block_of(name, encoder)

    def resized(self, name: str, value: Tensor, encoder: Encoder, source: str) -> tuple[Tensor, str] | None:
        """Absolute positions and tables of relative ones bicubic (those of iTPN's segmenters are), ones per axis linear
        (as the encoder itself does for other inputs).
        """
        assert isinstance(encoder, HiViT)
        rows, columns = encoder.grid
        if name in ("absolute_pos_embed", "pos_embed"):
            side = self.side(source, name, value)
            table = resize_positions(value, (side, side), encoder.grid, 0)
            return table, f"{side} x {side} to {rows} x {columns} patches, bicubic"
        if _is_whole_table(name, value) and encoder.shape.relative == "full":
            offsets = math.isqrt(len(value))
            table = resize_positions(value[None], (offsets, offsets), (2 * rows - 1, 2 * columns - 1), 0)[0]
            return table, f"{(offsets + 1) // 2} x {(offsets + 1) // 2} to {rows} x {columns} patches, bicubic"
        if name.endswith(AXES):
            patches = rows if name.endswith("rel_pos_h") else columns
            table = F.interpolate(value.float().t()[None], 2 * patches - 1, mode="linear")[0].t()
            return table, f"{(len(value) + 1) // 2} to {patches} patches, linear"
        return None

    def why_fresh(self, name: str, state: State, checkpoint: Checkpoint) -> str:
        """See `Family.why_fresh`. A file without the parts for dense inputs, which no official file has, may start an
        encoder with them; one without a pyramid an iTPN.
        """
        if name.startswith((*PYRAMID, "norm.")):
            return "" if has_pyramid(state) else "the file has no pyramid"
        kind = next((part for part in FINE_TUNED_PARTS if name.endswith(part)), None)
        if kind and lacks(kind, state) and not (_is_fast(state) and "gamma_" in name):
            return ONLY_FINE_TUNED
        kind = next((part for part in DENSE if name.startswith(part)), None)
        if kind and not any(other.startswith(kind) for other in state):
            return "only the form for dense inputs has it"
        return ""

    def hint(self, name: str) -> str:
        """See `Family.hint`."""
        if name.startswith(DENSE):
            return "Set encoder.window, encoder.gathering and encoder.window_relative as its encoder had them"
        return super().hint(name)

    def state(self, encoder: HiViT, classifier: bool = False) -> dict[str, Tensor]:
        """Under the official names. Classifiers with mean pooling keep the pyramid, for dense tasks after them."""
        return encoder.state_dict()


def has_pyramid(state: State) -> bool:
    """Whether a pyramid's levels are there."""
    return "fpn_modules.0.norm2.weight" in state


def _pyramid_depth(state: State) -> int:
    """MLP blocks between two levels."""
    return len({name.split(".")[1] for name in state if name.startswith("block_16to8.")})


def _is_fast(state: State) -> bool:
    """Whether it is a Fast-iTPN, by the name of the positions."""
    return "pos_embed" in state


def _is_whole_table(name: str, value: Tensor) -> bool:
    """Whether it is a table of relative positions of whole images, (2 S - 1)^2 rows; one of windows with gathering
    tokens has three more.
    """
    return name.endswith(TABLE) and math.isqrt(len(value)) ** 2 == len(value)
