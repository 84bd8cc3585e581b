"""The contract between a method and the one training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler

if TYPE_CHECKING:
    from mimlet.config import AugmentSettings, Config
    from mimlet.data.augment import Transform
    from mimlet.models.teacher import Teachers


@dataclass(frozen=True)
class Clock:
    """Where training stands. `step` counts optimiser steps from 0; schedules read `progress`, so that any length
    works.
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    seed: int

    @property
    def progress(self) -> float:
        """Fraction of training done before this step, in [0, 1)."""
        return self.step / max(1, self.total_steps)

    @property
    def epoch(self) -> int:
        """Epoch this step belongs to, from 0."""
        return self.step // max(1, self.steps_per_epoch)


class Method(nn.Module, ABC):
    """A training objective together with the modules it trains.

    The attributes are the parts. `encoder` is what a run exports. A method extends this class and no other method.

    - `frozen`: names of attributes that are never trained: kept in eval mode, without gradient, and left out of
      checkpoints. A part named here or in `ema` may be None where a configuration does without it.
    - `ema`: {follower: leader}, attributes that follow another by moving average; `ema_momentum(clock)` is the decay.
      A follower gets no gradient but keeps the train/eval mode of its leader (batch norm in MoCo-v3 needs it).
    - `weights`: coefficient of each loss that `forward` returns; the loop minimises the weighted sum. Values that
      `forward` returns under a name absent from `weights` are logged, not minimised.
    - `info`: what else a user of the exported encoder has to know; it is stored with the weights.
    - `picture_caption`: how `pictures` are to be read, a sentence or two for reports.
    """

    encoder: nn.Module
    frozen: ClassVar[tuple[str, ...]] = ()
    ema: ClassVar[dict[str, str]] = {}
    weights: dict[str, float]
    info: Mapping[str, object] = MappingProxyType({})
    picture_caption: str = ""

    @classmethod
    @abstractmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> Method:
        """Makes the method and its parts from a resolved configuration. `classes`: number of labels in the data, 0
        without labels. `teachers`: where a method that distils finds its teacher; none: one of its own.
        """

    @abstractmethod
    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """One step's losses by name, each a scalar, from a prepared batch."""

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but frozen parts stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            if (part := getattr(self, name)) is not None:
                part.eval()
        return self

    def transform(self, augment: AugmentSettings, image_size: int) -> Transform:
        """The views of one training sample; one augmented crop named `image` unless a method says otherwise."""
        from mimlet.data.augment import training_transform

        return training_transform(augment, image_size)

    def masks(self) -> dict[str, MaskSampler]:
        """Samplers of the masks a batch carries, by name."""
        return {}

    def ema_momentum(self, clock: Clock) -> float:
        """Decay of the followers named in `ema` at this step."""
        raise NotImplementedError(f"{type(self).__name__} names followers in `ema` but no momentum")

    def on_gradients(self, clock: Clock) -> None:
        """After backward and unscaling, before clipping and the optimiser step."""

    def after_step(self, clock: Clock) -> None:
        """After the optimiser step and the moving averages."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """What this method sees and makes of a prepared batch, for reports: labelled rows in order, none where it has
        nothing to show. The batch has the view `image` (uncropped) and the masks of `masks()`.

        A row is images [B,3,H,W] in normalised pixels, or maps [B,rows,columns], not negative, which are shown as heat
        over the first row. The last row is what changes as training goes, the others stay; labels are short nouns
        ("original", "visible", "reconstruction"; "attention") and become titles and names of files.
        """
        return {}


class Task(Method):
    """A method with labels that can be judged."""

    @torch.no_grad()
    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """Class scores [B,K] of normalised images [B,3,H,W], in eval mode."""
