"""MaskFeat: Wei et al., Masked Feature Prediction for Self-Supervised Visual Pre-Training, CVPR 2022. Images only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import RECONSTRUCTION, reconstruction_pictures, start_vit
from mimlet.methods.masked import block_masking, draw_, init_truncated_, mask_token
from mimlet.methods.settings import HOGSettings, MaskFeatSettings
from mimlet.methods.whole_step import WholeStep
from mimlet.models.linear import Linear
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport
from mimlet.objectives.hog import hog_patches, strokes
from mimlet.objectives.reconstruct import normalise_patches, patchify

if TYPE_CHECKING:
    from mimlet.config import Config

UNCUT = 2.0
"""PyTorch's bounds of a truncated normal: at a deviation of 0.02 nothing is cut."""
STROKES = (
    "Strokes in hidden patches show which edges are predicted there: their directions, each as bright as its share of "
    "a cell, whatever the contrast."
)
CELL = 8
"""Pixels of a cell in pictures, at least."""


class MaskFeat(Method):
    """Fill hidden patches with a token, encode everything, predict what a target function says of these patches.

    The head's layer norm is the encoder's final norm: in MaskFeat no other follows the last block.
    """

    encoder: ViT
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)

    def __init__(self, encoder: ViT, settings: MaskFeatSettings, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.teacher = teacher
        self.target = settings.target
        self.masking = block_masking(settings.masking, encoder.grid)
        self.hog = fitted_hog(settings.hog, encoder) if settings.target == "hog" else settings.hog
        self.mask_token = mask_token(encoder.dim, UNCUT)
        self.head = Linear(encoder.dim, self.outputs)
        draw_(self.head.weight, UNCUT)
        nn.init.zeros_(self.head.bias)
        self.step = WholeStep(_figures, count="hidden")
        self.load_report: LoadReport | None = None
        self.picture_caption = STROKES if settings.target == "hog" else RECONSTRUCTION
        self.weights = {"prediction": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> MaskFeat:
        """From a configuration; a teacher is looked for only if it is the target."""
        settings = config.method
        assert isinstance(settings, MaskFeatSettings)
        encoder, report = start_vit(config, init_maskfeat_)
        teacher = (teachers or Teachers()).find(config, encoder) if settings.target == "teacher" else None
        method = cls(encoder, settings, teacher)
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One mask of blocks; images hide different numbers of patches."""
        return {"mask": self.masking}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{prediction}: mean squared error over all hidden patches of the step, whichever image, piece or process they
        are in.
        """
        hidden, places = batch.mask.hidden, batch.mask.places
        predicted, targets = (x.flatten(0, 1)[places] for x in (self.predict(batch), self.targets(batch.images)))
        errors = F.mse_loss(predicted.float(), targets, reduction="none")
        total = errors.mean(dim=-1).sum()
        shown = self.step({"error": total, "hidden": hidden.sum()})["prediction"]
        return {"prediction": self.step.loss(total, shown)}

    def on_gradients(self, clock: Clock) -> None:
        """Gradients of the mean over the hidden patches of all pieces."""
        self.step.on_gradients(self.parameters())

    def after_step(self, clock: Clock) -> None:
        """The next step counts anew."""
        self.step.after_step()

    def predict(self, batch: Batch) -> Tensor:
        """What the student makes of every patch, [B,N,K]."""
        predicted: Tensor = self.head(self.encoder(batch.images, batch.mask, self.mask_token).patches)
        return predicted

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """What the target function says of every patch, [B,N,K] in float32."""
        if self.target == "hog":
            return hog_patches(images, self.encoder.patch, self.hog.bins, self.hog.cell, self.hog.gaussian)
        if self.teacher is not None:
            features = self.teacher(images).patches.float()
            return F.layer_norm(features, features.shape[-1:])
        pixels = patchify(images, self.encoder.patch)
        return normalise_patches(pixels) if self.target == "normalised" else pixels

    @property
    def outputs(self) -> int:
        """Numbers per patch, K."""
        if self.target == "hog":
            return 3 * self.hog.bins * (self.encoder.patch // self.hog.cell) ** 2
        return 3 * self.encoder.patch**2 if self.teacher is None else self.teacher.dim

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible and a reconstruction, which for histograms is drawn in strokes; none of a teacher's
        features. Small images are enlarged, so that strokes can be told apart.
        """
        if self.teacher is not None:
            return {}
        prediction, patch = self.predict(batch).float(), self.encoder.patch
        if self.target != "hog":
            return reconstruction_pictures(prediction, batch.images, batch.mask, patch, self.target == "normalised")
        rows, columns = (length // patch for length in batch.images.shape[-2:])
        drawn = strokes(prediction, (rows, columns), self.hog.bins, max(CELL, self.hog.cell))
        enlarge = partial(F.interpolate, size=drawn.shape[-2:], mode="nearest")
        original = enlarge(batch.images)
        hidden = enlarge(batch.mask.hidden.view(-1, 1, rows, columns).float()) > 0
        dark, light = original.amin((2, 3), keepdim=True), original.amax((2, 3), keepdim=True)
        return {
            "original": original,
            "visible": torch.where(hidden, 0, original),
            "reconstruction": torch.where(hidden, dark + (light - dark) * drawn, original),
        }


def init_maskfeat_(encoder: ViT) -> None:
    """The initialisation of MaskFeat's code: normal of deviation 0.02, and 0.02 as bias of every linear layer and
    norm but the last, which belongs to the head.
    """
    init_truncated_(encoder, UNCUT, shift=0.02)
    nn.init.zeros_(encoder.norm.bias)


def _figures(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"prediction": sums["error"] / sums["hidden"].clamp(min=1)}


def fitted_hog(settings: HOGSettings, encoder: ViT) -> HOGSettings:
    """The settings with the cell's side filled in; raises where cells or window do not fit patch and image."""
    patch, size = encoder.patch, encoder.shape.image_size
    cell = settings.cell or max(1, patch // 2)
    if patch % cell:
        fitting = ", ".join(str(side) for side in range(1, patch + 1) if patch % side == 0)
        raise ConfigError(f"method.hog.cell {cell} does not divide the patch of {patch} px; expected one of {fitting}")
    if settings.gaussian == 1 or (settings.gaussian and size % settings.gaussian):
        raise ConfigError(
            f"method.hog.gaussian {settings.gaussian}: expected the side of a window that divides the image of {size} "
            "px, 2 px or more, or 0 for none"
        )
    return settings.model_copy(update={"cell": cell})
