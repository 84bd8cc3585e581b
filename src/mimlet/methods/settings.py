"""Settings of every method, and the table that names the methods.

This module does not import torch, so that a misspelt setting is answered at once. A new method adds its settings
class here and one line to `METHODS`; the class that trains lives in its own file and is imported only when it is
built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mimlet.section import Section

if TYPE_CHECKING:
    from mimlet.methods.base import Method


class DecoderSettings(Section):
    """A decoder over patches. MAE-lite's default for ViT-Tiny: one block, half the width, three heads (0 = derive
    from the encoder).
    """

    depth: int = Field(1, ge=0)
    dim: int = Field(0, ge=0, description="0: half of the encoder's width")
    heads: int = Field(3, ge=1)


class MAESettings(Section):
    """Masked autoencoder (He et al. 2022), with MAE-lite's small decoder as default."""

    name: Literal["mae"] = "mae"
    mask_ratio: float = 0.75
    target: Literal["normalised", "raw"] = "normalised"
    decoder: DecoderSettings = DecoderSettings()


class DMAESettings(Section):
    """D-MAE and D²-MAE (Exploring Strong Lightweight ViTs via MIM Pre-Training, sections 5 and 6).

    The defaults are D-MAE. D²-MAE as released: `decode_layer = 8`, `extra_block = true`; as printed: `extra_block =
    false`. Layers are pairs [student block, teacher block], numbered from 1; 0 stands for the last block. For
    `hidden_layers`, 0 is the embedding and -1 the last.
    """

    name: Literal["dmae"] = "dmae"
    mask_ratio: float = 0.75
    target: Literal["normalised", "raw"] = "normalised"
    decoder: DecoderSettings = DecoderSettings()
    reconstruct: bool = Field(True, description="false: the paper's column without reconstruction loss")
    decode_layer: int | None = Field(None, ge=1, description="student block the decoder reads; none: the last")
    extra_block: bool = Field(
        False, description="distil through an extra attention-only block after the last (released D²-MAE)"
    )
    attention_layers: list[tuple[int, int]] = [(0, 0)]
    attention_weight: float = 1.0
    hidden_layers: list[tuple[int, int]] = []
    hidden_weight: float = 1.0


class LabelDistillation(Section):
    """DeiT-style distillation from a classifier (the section `teacher` names it)."""

    kind: Literal["none", "soft", "hard"] = "none"
    weight: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)


class ClassifySettings(Section):
    """Supervised classification: from scratch (no `encoder.weights`) or fine-tuning."""

    name: Literal["classify"] = "classify"
    classes: int = Field(0, ge=0, description="0: as many as the data has")
    pool: Literal["mean", "class"] = "mean"
    smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    erasing: float = Field(0.0, ge=0, le=1)
    ema_decay: float = Field(0.0, ge=0, lt=1, description="judge a moving average of the weights; 0: off")
    head_scale: float = Field(1.0, gt=0, description="multiplies the head's initial weights (0.001 in the RPE recipe)")
    distill: LabelDistillation = LabelDistillation()


class LinearProbeSettings(Section):
    """Linear probing by MAE's protocol: frozen encoder, batch norm without affine, linear layer."""

    name: Literal["linear_probe"] = "linear_probe"
    classes: int = Field(0, ge=0)
    pool: Literal["mean", "class"] = "class"


MethodSettings = MAESettings | DMAESettings | ClassifySettings | LinearProbeSettings


@dataclass(frozen=True)
class Entry:
    """Where a method lives and what it needs."""

    settings: type[Section]
    where: str
    labels: bool = False
    teacher: bool = False

    def load(self) -> type[Method]:
        """Imports the class (and with it torch)."""
        from importlib import import_module

        module, _, name = self.where.partition(":")
        cls: type[Method] = getattr(import_module(module), name)
        return cls


METHODS: dict[str, Entry] = {
    "mae": Entry(MAESettings, "mimlet.methods.mae:MAE"),
    "dmae": Entry(DMAESettings, "mimlet.methods.dmae:DMAE", teacher=True),
    "classify": Entry(ClassifySettings, "mimlet.tasks.classify:Classify", labels=True),
    "linear_probe": Entry(LinearProbeSettings, "mimlet.tasks.probe:LinearProbe", labels=True),
}
