"""iTPN: Tian et al., Integrally Pre-Trained Transformer Pyramid Networks, CVPR 2023, and Fast-iTPN (TPAMI 2024):
pixels, and masked feature modelling with a moving average.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask, MaskSampler, RandomMasking
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import RECONSTRUCTION, build_decoder, reconstruction_pictures, start_encoder
from mimlet.methods.settings import ITPNSettings, MaskedFeatureSettings
from mimlet.models.decoders import Decoder
from mimlet.models.features import Features, Taps
from mimlet.models.hivit import HiViT
from mimlet.models.linear import Linear
from mimlet.models.weights import LoadReport
from mimlet.objectives.reconstruct import masked_pixel_loss

if TYPE_CHECKING:
    from mimlet.config import Config
    from mimlet.models.teacher import Teachers


class ITPN(Method):
    """Encode the visible patches up to the pyramid, decode pixels of the hidden ones from all its levels; and let every
    level predict, token by token, the stage of a moving average of the encoder that has its grid.

    `target`, the average, has no pyramid and no drop path, and no gradient; it is None where features weigh nothing.
    """

    encoder: HiViT
    ema: ClassVar[dict[str, str]] = {"target": "encoder"}
    picture_caption = RECONSTRUCTION

    def __init__(
        self,
        encoder: HiViT,
        decoder: Decoder,
        mask_ratio: float = 0.75,
        normalise: bool = True,
        features: MaskedFeatureSettings | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.normalise = normalise
        self.features = features or MaskedFeatureSettings()
        self.taps = Taps(levels=tuple(encoder.levels), tokens=False)
        self.target_taps = Taps(stages=tuple(encoder.stages), tokens=False)
        self.weights = {"reconstruction": 1.0}
        self.target: HiViT | None = None
        self.heads = nn.ModuleDict()
        self.load_report: LoadReport | None = None
        if self.features.weight:
            self.weights["feature"] = self.features.weight
            self.target = HiViT(replace(encoder.shape, pyramid_dim=0, pyramid_depth=0, pyramid_hidden=0))
            known = encoder.state_dict()
            self.target.load_state_dict({name: known[name] for name in self.target.state_dict()})
            self.heads.update(
                {str(stride): Linear(encoder.levels[stride], width) for stride, width in encoder.stages.items()}
            )
            self.heads.apply(init_truncated)

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> ITPN:
        """From a configuration."""
        settings = config.method
        assert isinstance(settings, ITPNSettings)
        encoder, report = start_pyramid(config)
        decoder = build_decoder(encoder, settings.decoder).apply(init_truncated)
        method = cls(encoder, decoder, settings.mask_ratio, settings.target == "normalised", settings.features)
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One random mask over patches, for the encoder and its average."""
        return {"mask": RandomMasking(self.encoder.units, self.mask_ratio)}

    def ema_momentum(self, clock: Clock) -> float:
        """The same at every step."""
        return self.features.momentum

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{reconstruction}: mean squared error over hidden patches. With masked feature modelling also `feature`, the
        sum of the stages' mean squared errors over visible patches, and, only watched, each of them by its stride.
        """
        mask = batch.mask
        levels = self._encode(batch).levels
        prediction = self.decoder(levels, mask, hidden_only=True)
        loss = masked_pixel_loss(prediction, batch.images, self.encoder.patch, mask.ids_hidden, self.normalise)
        if self.target is None:
            return {"reconstruction": loss}
        targets = self.targets(batch.images, mask)
        errors = {stride: F.mse_loss(self.predict(levels, stride).float(), targets[stride]) for stride in targets}
        watched = {f"feature_{stride}px": error.detach() for stride, error in errors.items()}
        return {"reconstruction": loss, "feature": torch.stack([*errors.values()]).sum(), **watched}

    def predict(self, levels: dict[int, Tensor], stride: int) -> Tensor:
        """What a level [B,V,t,D] says of the stage of its stride, [B,V,t,C]."""
        predicted: Tensor = self.heads[str(stride)](levels[stride])
        return predicted

    @torch.no_grad()
    def targets(self, images: Tensor, mask: Mask) -> dict[int, Tensor]:
        """The average's stages at the visible patches, by stride, each [B,V,t,C] in float32: of the visible patches
        alone, or of whole images.
        """
        assert self.target is not None
        assert mask.ids_keep is not None
        visible = mask.ids_keep.shape[1]
        # Nothing hidden, the same order: attention does not care about order, and so the visible patches come first.
        shown = mask if self.features.input == "visible" else Mask.from_order(mask.order, mask.hidden.shape[1])
        stages: dict[int, Tensor] = self.target(images, shown, taps=self.target_taps).stages
        wanted = {stride: stage[:, :visible].float() for stride, stage in stages.items()}
        if self.features.target_norm:
            wanted = {stride: F.layer_norm(stage, stage.shape[-1:]) for stride, stage in wanted.items()}
        return wanted

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible and reconstruction, each [B,3,H,W]."""
        prediction = self.decoder(self._encode(batch).levels, batch.mask)
        return reconstruction_pictures(prediction, batch.images, batch.mask, self.encoder.patch, self.normalise)

    def _encode(self, batch: Batch) -> Features:
        """The levels of the visible patches."""
        seen: Features = self.encoder(batch.images, batch.mask, taps=self.taps)
        return seen


def init_truncated(module: nn.Module) -> None:
    """iTPN's initialisation of one module: Linear truncated normal 0.02 with zero bias. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def start_pyramid(config: Config) -> tuple[HiViT, LoadReport | None]:
    """A fresh encoder with a pyramid, maybe filled from `encoder.weights`, and what was loaded; raises for others."""
    encoder, report = start_encoder(config)
    if not isinstance(encoder, HiViT) or not encoder.levels:
        without = " without a pyramid" if isinstance(encoder, HiViT) else ""
        raise ConfigError(
            f"method '{config.method.name}' trains a feature pyramid, and encoder.name={config.encoder.name} is "
            f"{encoder.family}{without}; choose itpn_base, fast_itpn_base or another iTPN, with "
            "encoder.pyramid_depth of 1 or more, or the method mae, which needs none"
        )
    return encoder, report
