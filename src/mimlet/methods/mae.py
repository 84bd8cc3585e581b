"""Masked autoencoder: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask, MaskSampler, RandomMasking
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock, Method
from mimlet.methods.settings import DecoderSettings, MAESettings
from mimlet.models.build import build_encoder
from mimlet.models.decoders import Decoder, decoder_input, decoder_taps, make_decoder
from mimlet.models.encoder import Encoder
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport, load_encoder_weights
from mimlet.models.zoo import SIZES
from mimlet.objectives.reconstruct import denormalise_patches, masked_pixel_loss, patchify, unpatchify

if TYPE_CHECKING:
    from mimlet.config import Config, EncoderSettings
    from mimlet.models.teacher import Teachers


RECONSTRUCTION = (
    "Hidden patches are predicted, visible ones are the original. With normalised-pixel targets a patch's own mean and "
    "contrast are put back."
)
"""How `reconstruction_pictures` are to be read."""


class MAE(Method):
    """Encode the visible patches, decode the hidden ones, compare pixels."""

    encoder: Encoder
    picture_caption = RECONSTRUCTION

    def __init__(self, encoder: Encoder, decoder: Decoder, mask_ratio: float = 0.75, normalise: bool = True) -> None:
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
        """One random mask over the encoder's units."""
        return {"mask": RandomMasking(self.encoder.units, self.mask_ratio)}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{reconstruction}: mean squared error over hidden patches."""
        features = self.encoder(batch.images, batch.mask, taps=decoder_taps(self.encoder))
        mask = self.encoder.patch_mask(batch.mask)
        prediction = self.decoder(decoder_input(self.encoder, features), mask, hidden_only=True)
        loss = masked_pixel_loss(prediction, batch.images, self.encoder.patch, mask.ids_hidden, self.normalise)
        return {"reconstruction": loss}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible and reconstruction, each [B,3,H,W]."""
        features = self.encoder(batch.images, batch.mask, taps=decoder_taps(self.encoder))
        mask = self.encoder.patch_mask(batch.mask)
        prediction = self.decoder(decoder_input(self.encoder, features), mask)
        return reconstruction_pictures(prediction, batch.images, mask, self.encoder.patch, self.normalise)


def start_encoder(config: Config) -> tuple[Encoder, LoadReport | None]:
    """A fresh encoder, initialised as its family's masked pre-training does, filled from `encoder.weights` where they
    are given, and what was loaded.
    """
    encoder = build_encoder(config.encoder)
    return encoder, _fill(encoder, config.encoder)


def start_vit(config: Config, init: Callable[[ViT], None] | None = None) -> tuple[ViT, LoadReport | None]:
    """The same for methods of plain ViTs, which may initialise them otherwise; raises for other encoders."""
    encoder = build_encoder(config.encoder)
    if not isinstance(encoder, ViT):
        raise ConfigError(
            f"method '{config.method.name}' is for plain ViTs, and encoder.name={config.encoder.name} is "
            f"{encoder.family}; choose a plain ViT ({', '.join(SIZES)}), or a method for any encoder (mae, dmae, "
            "tinymim, mimhd, itpn, itpn_clip)"
        )
    if init:
        init(encoder)
    return encoder, _fill(encoder, config.encoder)


def _fill(encoder: Encoder, start: EncoderSettings) -> LoadReport | None:
    return load_encoder_weights(encoder, start.weights, start.keep_blocks) if start.weights else None


def build_decoder(encoder: Encoder, settings: DecoderSettings) -> Decoder:
    """The decoder that settings describe for an encoder; width 0 means half of the encoder's."""
    dim = settings.dim or encoder.dim // 2
    return make_decoder(encoder, 3 * encoder.patch**2, dim, settings.depth, settings.heads, settings.position)


def reconstruction_pictures(
    prediction: Tensor, images: Tensor, mask: Mask, patch: int, normalise: bool
) -> dict[str, Tensor]:
    """What was shown and what was predicted, in pixels: predictions [B,N,p*p*3] only fill the patches that a mask over
    patches hides.
    """
    target = patchify(images, patch)
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    if normalise:
        prediction = denormalise_patches(prediction.float(), target)
    hidden = mask.hidden[..., None]
    return {
        "original": images,
        "visible": unpatchify(torch.where(hidden, torch.zeros_like(target), target), grid),
        "reconstruction": unpatchify(torch.where(hidden, prediction.float(), target), grid),
    }
