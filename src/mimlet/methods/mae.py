"""Masked autoencoder: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler, RandomMasking
from mimlet.methods.base import Clock, Method
from mimlet.methods.settings import DecoderSettings, MAESettings
from mimlet.models.decoders import Decoder
from mimlet.models.features import Taps
from mimlet.models.vit import ViT, build_encoder
from mimlet.models.weights import LoadReport, load_encoder_weights
from mimlet.objectives.reconstruct import denormalise_patches, masked_pixel_loss, patchify, unpatchify

if TYPE_CHECKING:
    from mimlet.config import Config
    from mimlet.models.teacher import Teachers


RECONSTRUCTION = (
    "Hidden patches are predicted, visible ones are the original. With normalised-pixel targets a patch's own mean and "
    "contrast are put back."
)
"""How `reconstruction_pictures` are to be read."""


class MAE(Method):
    """Encode the visible patches, decode the hidden ones, compare pixels."""

    encoder: ViT
    picture_caption = RECONSTRUCTION

    def __init__(self, encoder: ViT, decoder: Decoder, mask_ratio: float = 0.75, normalise: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.normalise = normalise
        self.load_report: LoadReport | None = None
        self.weights = {"reconstruction": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> MAE:
        """From a configuration."""
        settings = config.method
        assert isinstance(settings, MAESettings)
        encoder, report = start_encoder(config)
        decoder = build_decoder(encoder, settings.decoder)
        method = cls(encoder, decoder, settings.mask_ratio, settings.target == "normalised")
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One random mask over patches."""
        return {"mask": RandomMasking(self.encoder.units, self.mask_ratio)}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{reconstruction}: mean squared error over hidden patches."""
        latent = self.encoder(batch.images, batch.mask).latent
        prediction = self.decoder(latent, batch.mask, hidden_only=True)
        loss = masked_pixel_loss(prediction, batch.images, self.encoder.patch, batch.mask.ids_hidden, self.normalise)
        return {"reconstruction": loss}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible and reconstruction, each [B,3,H,W]."""
        latent = self.encoder(batch.images, batch.mask, taps=Taps()).latent
        return reconstruction_pictures(self.decoder(latent, batch.mask), batch, self.encoder.patch, self.normalise)


def start_encoder(config: Config, init: Callable[[ViT], None] | None = None) -> tuple[ViT, LoadReport | None]:
    """A fresh encoder, initialised as MAE's or by `init`, filled from `encoder.weights` where they are given, and what
    was loaded.
    """
    encoder, start = build_encoder(config.encoder), config.encoder
    if init:
        init(encoder)
    return encoder, load_encoder_weights(encoder, start.weights, start.keep_blocks) if start.weights else None


def build_decoder(encoder: ViT, settings: DecoderSettings) -> Decoder:
    """The decoder that settings describe for an encoder; width 0 means half of the encoder's."""
    dim = settings.dim or encoder.dim // 2
    return Decoder(encoder.dim, encoder.grid, encoder.prefix, 3 * encoder.patch**2, dim, settings.depth, settings.heads)


def reconstruction_pictures(prediction: Tensor, batch: Batch, patch: int, normalise: bool) -> dict[str, Tensor]:
    """What was shown and what was predicted, in pixels: predictions [B,N,p*p*3] only fill the hidden patches."""
    target = patchify(batch.images, patch)
    grid = (batch.images.shape[2] // patch, batch.images.shape[3] // patch)
    if normalise:
        prediction = denormalise_patches(prediction.float(), target)
    hidden = batch.mask.hidden[..., None]
    return {
        "original": batch.images,
        "visible": unpatchify(torch.where(hidden, torch.zeros_like(target), target), grid),
        "reconstruction": unpatchify(torch.where(hidden, prediction.float(), target), grid),
    }
