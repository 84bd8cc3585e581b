"""SimMIM: Xie et al., SimMIM: A Simple Framework for Masked Image Modeling, CVPR 2022."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler, UnitMasking
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import RECONSTRUCTION, reconstruction_pictures, start_vit
from mimlet.methods.masked import init_beit_, mask_token
from mimlet.methods.settings import SimMIMSettings
from mimlet.models.linear import Linear
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport
from mimlet.objectives.reconstruct import masked_absolute_loss

if TYPE_CHECKING:
    from mimlet.config import Config
    from mimlet.models.teacher import Teachers


class SimMIM(Method):
    """Fill hidden squares with a token, encode everything, predict their pixels from each token by one linear layer."""

    encoder: ViT
    picture_caption = RECONSTRUCTION

    def __init__(self, encoder: ViT, mask_ratio: float = 0.6, mask_px: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = mask_token(encoder.dim)
        self.head = Linear(encoder.dim, 3 * encoder.patch**2)
        self.masking = UnitMasking(encoder.grid, unit_patches(mask_px, encoder), mask_ratio)
        self.load_report: LoadReport | None = None
        self.weights = {"reconstruction": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> SimMIM:
        """From a configuration."""
        settings = config.method
        assert isinstance(settings, SimMIMSettings)
        encoder, report = start_vit(config, init_beit_)
        method = cls(encoder, settings.mask_ratio, settings.mask_px)
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One mask of squares."""
        return {"mask": self.masking}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{reconstruction}: mean absolute error over the pixels of hidden patches."""
        ids = batch.mask.ids_hidden
        tokens = self.encoder(batch.images, batch.mask, self.mask_token).patches
        hidden = tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))
        loss = masked_absolute_loss(self.pixels(hidden), batch.images, self.encoder.patch, ids)
        return {"reconstruction": loss}

    def pixels(self, tokens: Tensor) -> Tensor:
        """Tokens [B,M,D] -> pixels [B,M,p*p*3] in the order of `patchify`; the head's is (channel, row, column), as a
        pixel shuffle reads it.
        """
        p = self.encoder.patch
        predicted: Tensor = self.head(tokens).unflatten(-1, (3, p, p)).movedim(2, -1).flatten(2)
        return predicted

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible and reconstruction, each [B,3,H,W]."""
        prediction = self.pixels(self.encoder(batch.images, batch.mask, self.mask_token).patches)
        return reconstruction_pictures(prediction, batch.images, batch.mask, self.encoder.patch, normalise=False)


def unit_patches(mask_px: int, encoder: ViT) -> int:
    """Patches along the side of a square of `mask_px` pixels; raises where squares do not tile the image."""
    patch, size = encoder.patch, encoder.shape.image_size
    if mask_px % patch or size % mask_px:
        fitting = [side for side in range(patch, size, patch) if size % side == 0]
        raise ConfigError(
            f"method.mask_px {mask_px}: squares of {mask_px} px are not made of whole patches of {patch} px, or do not "
            f"fill an image of {size} px; expected one of {', '.join(map(str, fitting))}"
        )
    return mask_px // patch
