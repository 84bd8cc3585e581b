"""What robustness is judged on, as people name it. Reading it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mimlet.config import nearest
from mimlet.errors import ConfigError

ROBUSTNESS_FILE = "robustness.json"
"""What a run's robustness is written to."""
IMAGENET: Mapping[str, int] = {"imagenet-a": 200, "imagenet-r": 200, "imagenet-sketch": 1000, "imagenet-v2": 1000}
"""Known sets with classes of ImageNet-1k, and how many of them."""

CORRUPTIONS = "corruptions"

ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""Every corruption, and AlexNet's top-1 error on it in ImageNet-C in percent, the mean of five severities: what mean
corruption error is relative to (Hendrycks & Dietterich, ICLR 2019, section 4.1; the decimals as in AugMix's evaluation,
google-research/augmix, which has them from hendrycks/robustness).
"""


@dataclass(frozen=True)
class Shifts:
    """Paths of shifted sets by name, and names of corruptions."""

    sets: Mapping[str, str]
    corruptions: tuple[str, ...]


def parse_shifts(given: Sequence[str]) -> Shifts:
    """NAME=PATH, `corruptions` (all of them) or `corruptions=fog,contrast` -> what is meant. Raises `ConfigError`."""
    sets: dict[str, str] = {}
    corruptions: dict[str, None] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if name == CORRUPTIONS:
            corruptions |= dict.fromkeys(value.split(",") if equals else ALEXNET_ERRORS)
        elif not (name and value):
            raise ConfigError(
                f"--robustness '{text}'{nearest(text, [CORRUPTIONS])}: expected NAME=PATH, NAME being "
                f"{', '.join(IMAGENET)} or any other for a set of yours, or {CORRUPTIONS}"
            )
        elif name in sets:
            raise ConfigError(f"--robustness: two sets are called '{name}'; give each a name of its own")
        else:
            sets[name] = value
    unknown = [name for name in corruptions if name not in ALEXNET_ERRORS]
    if unknown:
        raise ConfigError(
            f"--robustness: no corruption is called '{unknown[0]}'{nearest(unknown[0], ALEXNET_ERRORS)}; "
            f"there are {', '.join(ALEXNET_ERRORS)}"
        )
    return Shifts(sets, tuple(corruptions))
