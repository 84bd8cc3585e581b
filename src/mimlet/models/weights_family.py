"""What is special to the weights of one family of encoders: the interface, and what families share."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from mimlet.errors import WeightsError
from mimlet.models.build import settings_of
from mimlet.models.encoder import Encoder
from mimlet.models.shapes import HieraShape, HiViTShape, Shape, ViTShape
from mimlet.models.zoo import ENCODERS, HieraSize, HiViTSize, Size

if TYPE_CHECKING:
    from mimlet.models.weights import Checkpoint, LoadReport

State = Mapping[str, Tensor]
Part = Literal["encoder", "decoder", "head"]
PARTS: tuple[Part, ...] = ("encoder", "decoder", "head")
OF_DECODER, OF_HEAD, OF_PRETRAINING = "of the decoder", "of the head", "of the pre-training head"
ONLY_FINE_TUNED = "only the fine-tuned form has it"
POOLED = "a classifier with mean pooling has none"
HEAD_PARTS = ("fc_norm.", "head.", "head_dist.", "dist_norm.", "fc.", "pre_logits.", "attn_pool.")
TABLE = "relative_position_bias_table"


class Family(ABC):
    """How the files of one family are recognised, read, checked against an encoder and fitted to it.

    `title`: in messages. `shape_type`: of its encoders. `names`: the tensors of an encoder under our names. `foreign`:
    beginnings of names that a file of this family may not have: it would compute something else.
    `heads_by_width`: head counts that encoders of a width have; `heads_hint` and `heads_example` tell a user more.
    `decoder_position`, `pixels`: of the decoders in official files.
    """

    title: ClassVar[str]
    shape_type: ClassVar[type[Shape]]
    names: ClassVar[re.Pattern[str]]
    foreign: ClassVar[tuple[str, ...]] = ()
    heads_by_width: ClassVar[Mapping[int, tuple[int, ...]]]
    heads_hint: ClassVar[str]
    heads_example: ClassVar[int]
    decoder_position: ClassVar[Literal["sincos", "learned"]] = "sincos"
    pixels: ClassVar[Literal["normalised", "raw"] | None] = None

    @abstractmethod
    def recognises(self, state: State) -> bool:
        """Whether bare names and shapes are of this family."""

    def renamed(self, state: State) -> dict[str, Tensor]:
        """The same tensors under our names, and in our order of pixels."""
        return dict(state)

    def part(self, name: str, state: State) -> str:
        """The part that a tensor (of our name, in `state`) belongs to, one of `PARTS`; else why it is left aside, or
        nothing for an unknown one.
        """
        if self.names.fullmatch(name):
            return "encoder"
        if name.startswith("decoder_") or name == "mask_token":
            return "decoder"
        return "head" if name.startswith(HEAD_PARTS) else ""

    @abstractmethod
    def needed(self, state: State, stored: bool) -> list[str]:
        """Names without which it is no file of this family; `stored`: the file tells its shape."""

    def customs(self, state: State, container: str, wrapper: str) -> tuple[int, ...]:
        """Head counts that encoders of this width and origin have; one alone is taken."""
        return self.heads_by_width.get(self.width(state), ())

    @abstractmethod
    def width(self, state: State) -> int:
        """`dim` of the shape."""

    @abstractmethod
    def patch(self, state: State) -> int:
        """`patch` of the shape."""

    @abstractmethod
    def stages(self, state: State) -> tuple[int, ...]:
        """Blocks of each stage; of an encoder without stages, of the whole."""

    @abstractmethod
    def shape(self, checkpoint: Checkpoint, heads: int) -> Shape:
        """The architecture, from the tensors."""

    def check(self, encoder: Encoder, checkpoint: Checkpoint, keep_blocks: int | None, report: LoadReport) -> None:
        """Raises where an encoder of the family does not fit the file's numbers."""
        state, source, shape = checkpoint.encoder, checkpoint.source, encoder.shape
        known = checkpoint.heads or (checkpoint.customs[0] if len(checkpoint.customs) == 1 else 0)
        numbers = {
            "width": (self.width(state), shape.dim),
            "patch": (self.patch(state), shape.patch),
            "head count": (known or shape.heads, shape.heads),
        }
        for what, (theirs, ours) in numbers.items():
            if theirs != ours:
                raise WeightsError(
                    f"{source} has {what} {theirs}, the encoder {ours}; they must agree "
                    "(see encoder.name, encoder.dim, encoder.patch, encoder.heads)"
                )
        self.check_blocks(encoder, checkpoint, keep_blocks)
        if not known:
            report.notes.append(f"the file does not tell its head count: taken as the encoder's {shape.heads}")

    def check_blocks(self, encoder: Encoder, checkpoint: Checkpoint, keep_blocks: int | None) -> None:
        """Raises where the blocks that are to be loaded are not there, or stand in other stages."""
        theirs, source = self.stages(checkpoint.encoder), checkpoint.source
        ours = encoder.shape.stages if not isinstance(encoder.shape, ViTShape) else (encoder.depth,)
        if keep_blocks is None and theirs != ours:
            alone = len(ours) == 1
            raise WeightsError(
                f"{source} has {theirs[0] if alone else list(theirs)} blocks, the encoder "
                f"{ours[0] if alone else list(ours)}. Set encoder.{'depth' if alone else 'stages'}, or "
                "encoder.keep_blocks to use the first ones"
            )
        if keep_blocks is None:
            return
        if keep_blocks > min(sum(theirs), sum(ours)):
            raise WeightsError(
                f"encoder.keep_blocks {keep_blocks} is too many: {source} has {sum(theirs)} blocks, "
                f"the encoder {sum(ours)}"
            )
        leading = [[i for i, n in enumerate(each) for _ in range(n)][:keep_blocks] for each in (theirs, ours)]
        if leading[0] != leading[1]:
            raise WeightsError(
                f"encoder.keep_blocks {keep_blocks}: the first blocks of {source} stand in stages of {list(theirs)} "
                f"blocks, those of the encoder in stages of {list(ours)}; set encoder.stages"
            )

    @abstractmethod
    def adapted(self, encoder: Encoder, checkpoint: Checkpoint, report: LoadReport) -> dict[str, Tensor]:
        """The file's tensors for this encoder: spread or left out where the forms differ; the report says which."""

    def block_of(self, name: str, encoder: Encoder) -> int:
        """Number of the block, from 0, that a tensor is loaded with: -1 for embeddings; what comes after the blocks
        goes with the last.
        """
        number = block_number(name)
        after = number < 0 and not name.startswith(("patch_embed.", "pos_embed", "absolute_pos_embed"))
        return encoder.depth - 1 if after else number

    @abstractmethod
    def resized(self, name: str, value: Tensor, encoder: Encoder, source: str) -> tuple[Tensor, str] | None:
        """A table of positions for the grid of an encoder, and from what to what; None for other tensors."""

    @abstractmethod
    def why_fresh(self, name: str, state: State, checkpoint: Checkpoint) -> str:
        """Why a file, of which `state` is what suits the encoder, may lack a tensor of it; nothing if it may not."""

    def hint(self, name: str) -> str:
        """What helps where a file has a tensor for which the encoder has no place."""
        return "Expected a whole encoder of one form"

    @abstractmethod
    def state(self, encoder: Any, classifier: bool = False) -> dict[str, Tensor]:
        """An encoder's tensors under the names that travel; with `classifier` without what mean pooling leaves out."""

    def head_state(self, state: State) -> dict[str, Tensor]:
        """A classifier's head under the names that travel."""
        return dict(state)

    def side(self, source: str, name: str, table: Tensor, prefix: int = 0) -> int:
        """Side of the square grid that a table of positions [1, P + N, D] is for."""
        side = math.isqrt(max(0, table.shape[1] - prefix))
        if side * side + prefix != table.shape[1]:
            raise WeightsError(
                f"{source} is not {self.title}: {name} has {table.shape[1]} rows, "
                f"expected {f'{prefix} + ' if prefix else ''}a square number"
            )
        return side


def block_number(name: str) -> int:
    """The i of `blocks.i.`, else -1."""
    match = re.match(r"blocks\.([0-9]{1,6})(\.|$)", name)
    return int(match[1]) if match else -1


def block_count(state: State) -> int:
    """How many members the list of blocks has."""
    return 1 + max(map(block_number, state))


def ratio_of(hidden: int, dim: int) -> float:
    """The ratio from which an encoder that rounds down gets a hidden width."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def lacks(kind: str, state: State) -> bool:
    """Whether no tensor is of this kind, so that a form without it was saved."""
    return not any(name.endswith(kind) for name in state)


def settings_for(shape: Shape) -> str:
    """Settings of `[encoder]` that lead to an architecture: its name in the zoo, else its numbers too."""

    def fits(size: Size | HieraSize | HiViTSize) -> bool:
        if isinstance(shape, ViTShape):
            return isinstance(size, Size) and (size.dim, size.depth) == (shape.dim, shape.depth)
        form = shape.form if isinstance(shape, HiViTShape) else "hivit"
        kind = HieraSize if isinstance(shape, HieraShape) else HiViTSize
        same = isinstance(size, kind) and (size.dim, size.stages) == (shape.dim, shape.stages)
        return same and getattr(size, "form", "hivit") == form

    names = [name for name, size in ENCODERS.items() if fits(size)]
    if isinstance(shape, HiViTShape):
        names.sort(key=lambda name: bool(getattr(ENCODERS[name], "pyramid_dim", 0)) != bool(shape.pyramid_dim))
    if names:
        return f"encoder.name={names[0]}"
    blocks = f"depth={shape.depth}" if isinstance(shape, ViTShape) else f"stages={list(shape.stages)}".replace(" ", "")
    return f"encoder.name={settings_of(shape)['name']} encoder.dim={shape.dim} encoder.{blocks}"
