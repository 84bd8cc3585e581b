"""BootMAE: Dong et al., Bootstrapped Masked Autoencoders for Vision BERT Pretraining, ECCV 2022, and its released code.

A masked autoencoder with a second target, the features of its own moving average; both decoders look up what the
encoder knows of the visible patches, early or late in it, instead of being told by its output alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import BlockMasking, Mask, MaskSampler
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import RECONSTRUCTION, reconstruction_pictures, start_vit
from mimlet.methods.masked import block_masking
from mimlet.methods.settings import BootMAESettings, DecoderSettings
from mimlet.models.cross import CrossDecoder, PatchPixels
from mimlet.models.features import Features, Taps
from mimlet.models.linear import Linear
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport
from mimlet.objectives.hidden import hidden_target
from mimlet.objectives.reconstruct import (
    denormalise_channels,
    inside_weights,
    normalise_channels,
    patchify,
    weighted_error,
)

if TYPE_CHECKING:
    from mimlet.config import Config
    from mimlet.models.teacher import Teachers


class BootMAE(Method):
    """Encode the visible patches; predict the pixels of the hidden ones with the output of block 1 as context, and a
    momentum encoder's features of them with the output of the last block as context.

    `target` sees the whole image; its features are the last block's output before the final norm. `momentum` and
    `knee`: see `momentum_at`. `ramp`: the fraction of training in which the weight of the features rises from 0.
    """

    encoder: ViT
    ema: ClassVar[dict[str, str]] = {"target": "encoder"}
    picture_caption = RECONSTRUCTION

    def __init__(
        self,
        encoder: ViT,
        decoder: CrossDecoder,
        feature_decoder: CrossDecoder,
        masking: BlockMasking,
        *,
        weigh_inside: bool = True,
        feature_weight: float = 1.0,
        ramp: float = 0.25,
        momentum: tuple[float, float, float] = (0.999, 0.9999, 0.99999),
        knee: float = 0.25,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.feature_decoder = feature_decoder
        self.target = ViT(encoder.shape)  # without drop path
        self.target.load_state_dict(encoder.state_dict())
        self.masking = masking
        self.weigh_inside = weigh_inside
        self.ramp, self.momentum, self.knee = ramp, momentum, knee
        self.load_report: LoadReport | None = None
        self.weights = {"reconstruction": 1.0, "feature": feature_weight}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> BootMAE:
        """From a configuration."""
        settings = config.method
        assert isinstance(settings, BootMAESettings)
        encoder, report = start_vit(config, ViT.init_moco_)
        method = cls(
            encoder,
            pixel_decoder(encoder, settings.decoder),
            feature_decoder(encoder, settings.feature_decoder),
            block_masking(settings.masking, encoder.grid),
            weigh_inside=settings.weigh_inside,
            feature_weight=settings.feature_weight,
            ramp=settings.feature_ramp,
            momentum=settings.momentum,
            knee=settings.momentum_knee,
        )
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One mask over patches: blocks, then others at random."""
        return {"mask": self.masking}

    def ema_momentum(self, clock: Clock) -> float:
        """See `momentum_at`."""
        return momentum_at(clock.progress, self.momentum, self.knee)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{reconstruction, feature, feature_error}: of hidden patches, by their weights, the squared error of pixels
        (normalised per patch and channel) and of layer-normed features; `feature` is `feature_error`, which is only
        logged, times its rising factor.
        """
        mask = batch.mask
        hidden, weights = mask.ids_hidden, self._weights(mask)
        seen = self._encode(batch)
        pixels = self.decoder(seen.latent, seen.hidden[1], mask, hidden_only=True)
        target = normalise_channels(patchify(batch.images, self.encoder.patch, hidden))
        features = self.feature_decoder(seen.latent, seen.hidden[self.encoder.depth], mask, hidden_only=True)
        error = weighted_error(hidden_target(features), hidden_target(self._features(batch.images, hidden)), weights)
        return {
            "reconstruction": weighted_error(pixels, target, weights),
            "feature": ramp_at(clock, self.ramp) * error,
            "feature_error": error.detach(),
        }

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible and reconstruction, each [B,3,H,W]; hidden patches keep their true mean and contrast."""
        seen = self._encode(batch)
        prediction = self.decoder(seen.latent, seen.hidden[1], batch.mask).float()
        pixels = denormalise_channels(prediction, patchify(batch.images, self.encoder.patch))
        return reconstruction_pictures(pixels, batch.images, batch.mask, self.encoder.patch, normalise=False)

    def _encode(self, batch: Batch) -> Features:
        """The final tokens of the visible patches, and both contexts."""
        seen: Features = self.encoder(batch.images, batch.mask, taps=Taps(hidden=(1, self.encoder.depth)))
        return seen

    @torch.no_grad()
    def _features(self, images: Tensor, ids: Tensor) -> Tensor:
        """What the momentum encoder makes of the whole image, at patches `ids` [B,M]: [B,M,D]."""
        last = self.target.depth
        tokens: Tensor = self.target(images, taps=Taps(hidden=(last,), tokens=False)).hidden[last]
        return tokens.gather(1, (ids + self.target.prefix)[..., None].expand(-1, -1, tokens.shape[-1]))

    def _weights(self, mask: Mask) -> Tensor | None:
        """Weights [B,M] of the hidden patches; None for equal ones."""
        return inside_weights(mask.hidden, self.encoder.grid).gather(1, mask.ids_hidden) if self.weigh_inside else None


def momentum_at(progress: float, momentum: tuple[float, float, float], knee: float) -> float:
    """The first value rises linearly to the second at the fraction `knee` of training, from there to the third at its
    end: the released code's schedule at 400 epochs.
    """
    start, middle, end = momentum
    if progress < knee:
        return start + (middle - start) * progress / knee
    return middle + (end - middle) * (progress - knee) / (1 - knee)


def ramp_at(clock: Clock, ramp: float) -> float:
    """Rises linearly, from the first step on, to 1 at the fraction `ramp` of training."""
    rises = ramp * clock.total_steps
    return min(1.0, (clock.step + 1) / rises) if rises else 1.0


def pixel_decoder(encoder: ViT, settings: DecoderSettings) -> CrossDecoder:
    """The pixel regressor that settings describe; width 0 means half of the encoder's."""
    dim = settings.dim or encoder.dim // 2
    return _decoder(encoder, PatchPixels(dim, encoder.patch), dim, settings)


def feature_decoder(encoder: ViT, settings: DecoderSettings) -> CrossDecoder:
    """The feature predictor that settings describe; width 0 means the encoder's."""
    dim = settings.dim or encoder.dim
    return _decoder(encoder, Linear(dim, encoder.dim), dim, settings)


def _decoder(encoder: ViT, pred: nn.Module, dim: int, settings: DecoderSettings) -> CrossDecoder:
    return CrossDecoder(encoder.dim, encoder.grid, encoder.prefix, pred, dim, settings.depth, settings.heads)
