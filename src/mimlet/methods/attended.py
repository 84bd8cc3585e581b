"""Pictures of methods that predict no pixels: what the encoder attends to."""

from __future__ import annotations

from torch import Tensor

from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps

ATTENTION = (
    "How the class token's attention in the last block that attends to the whole image is spread over the patches, "
    "mean over heads (without a class token: the attention of all patches on average): grey none, yellow the most in "
    "its image."
)
"""How `attention_pictures` are to be read."""


def attention_pictures(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """original: images [B,3,H,W]; attention: maps [B,rows,columns], see `Features.attended`."""
    last = encoder.attending_block()
    features = encoder(images, taps=Taps(attention=(last,), tokens=False))
    return {"original": images, "attention": features.attended(last, layout=encoder.layout(last)).mean(dim=1)}
