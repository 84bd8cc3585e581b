"""Pictures of methods that predict no pixels: what the encoder attends to."""

from __future__ import annotations

from torch import Tensor

from mimlet.models.features import Taps
from mimlet.models.vit import ViT

ATTENTION = (
    "How the class token's attention in the last block is spread over the patches, mean over heads (without a class "
    "token: the attention of all patches on average): grey none, yellow the most in its image."
)
"""How `attention_pictures` are to be read."""


def attention_pictures(encoder: ViT, images: Tensor) -> dict[str, Tensor]:
    """original: images [B,3,H,W]; attention: maps [B,rows,columns], see `Features.attended`."""
    last = encoder.depth
    features = encoder(images, taps=Taps(attention=(last,), tokens=False))
    return {"original": images, "attention": features.attended(last).mean(dim=1)}
