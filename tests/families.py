"""Small encoders of every family, for images of 32 px."""

from typing import Any

from mimlet.config import EncoderSettings
from mimlet.models.build import encoder_of
from mimlet.models.encoder import Encoder

HIERARCHICAL = ("hiera_micro", "hivit_micro", "itpn_micro", "fast_itpn_micro")


def micro(name: str, **settings: Any) -> Encoder:
    """An encoder of the zoo for 32 px."""
    return encoder_of(EncoderSettings(**{"name": name, "image_size": 32, **settings}).shape())
