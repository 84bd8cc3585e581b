"""Augmented views for methods that compare several of one image (DINO, MoCo v3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision.transforms import ColorJitter
from torchvision.transforms.v2 import functional as F

from mimlet.config import AugmentSettings
from mimlet.data.augment import draw_box, draw_mode
from mimlet.data.pixels import Box, Pixels, as_pillow, cut, extent, planes, resize, whole
from mimlet.errors import ConfigError

SOLARIZE_FROM = 128
"""Solarisation inverts pixels from this value on (Pillow's default)."""


@dataclass(frozen=True)
class View:
    """One random view of `size` px: crop, colour jitter, gray, blur, solarisation, flip, in MoCo v3's and BYOL's order.

    The defaults are what DINO's and MoCo v3's views have in common. `scale`, `ratio`: of the crop, share of the area
    and width / height. `flip` and everything named `_p` are probabilities. `jitter`: strength of brightness, contrast,
    saturation and hue, applied in random order, on Pillow images as in the sources (hue is 2.6 times faster there
    than on tensors). `blur_sigma`: range of the Gaussian's deviation in pixels of the view, drawn evenly.

    On one (busy) core MoCo v3's view 1 of a 500 x 375 image takes 3.3 ms of processor time at 224 px, of which jitter
    is 1.2 and blur 0.5, and its view 2 2.7 ms; views of 32 px from an image of that size take 0.8 ms.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0

    def draw(self, size: tuple[int, int]) -> tuple[Box, str]:
        """The crop of an image of `size` (width, height), and how it is resized. All randomness here is torch's."""
        return draw_box(size, self.scale, self.ratio), draw_mode(self.interpolation)

    def render(self, part: Tensor, mode: str) -> Tensor:
        """The crop, uint8 [3,h,w] -> uint8 [3,S,S]."""
        pixels = planes(resize(part, self.size, self.size, mode))
        if _chance(self.jitter_p):
            pixels = _jittered(pixels, *self.jitter)
        if _chance(self.gray_p):
            pixels = F.rgb_to_grayscale(pixels, 3)
        if _chance(self.blur_p):
            low, high = self.blur_sigma
            pixels = gaussian_blur(pixels, low + (high - low) * torch.rand(()).item())
        if _chance(self.solarize_p):
            pixels = F.solarize(pixels, SOLARIZE_FROM)
        if _chance(self.flip):
            pixels = pixels.flip(-1)
        return pixels.contiguous()


@dataclass(frozen=True)
class Views:
    """A transform (`data.augment.Transform`): independent views of one image, by name.

    All crops are drawn before the first is cut, so that no more of an image has to be decoded than they need.
    """

    views: Mapping[str, View]

    def draw(self, size: tuple[int, int]) -> dict[str, tuple[Box, str]]:
        """`View.draw` of each."""
        return {name: view.draw(size) for name, view in self.views.items()}

    def render(self, draws: Mapping[str, tuple[Box, str]], cut: Callable[[Box], Tensor]) -> dict[str, Tensor]:
        """Views uint8 [3,S,S], S of each its own; `cut` gives the pixels of a crop."""
        return {name: view.render(cut(draws[name][0]), draws[name][1]) for name, view in self.views.items()}

    def __call__(self, image: Pixels) -> dict[str, Tensor]:
        """A decoded RGB image -> its views."""
        return self.render(self.draw(extent(image)), lambda box: cut(image, box))


def blur_range(image_size: int) -> tuple[float, float]:
    """The sources' deviations, 0.1 to 2 px of an image of 224 px, and as much of an image of another size: 2 px would
    leave nothing of 32.
    """
    return 0.1 * image_size / 224, 2 * image_size / 224


def refuse_other_augmentation(augment: AugmentSettings, method: str, also: tuple[str, ...] = ()) -> None:
    """`ConfigError` where `data.augment` asks for what a method with views of its own does not do; `also`: further
    settings that it does not read.
    """
    plain = AugmentSettings()
    for name in ("pad_crop", "color_jitter", "randaugment", *also):
        if getattr(augment, name) != getattr(plain, name):
            raise ConfigError(
                f"data.augment.{name} is {getattr(augment, name)!r}, but method '{method}' makes views of its own, "
                "in which it would do nothing; remove it"
            )


def gaussian_blur(pixels: Tensor, sigma: float) -> Tensor:
    """Convolution of uint8 [3,h,w] with a Gaussian of `sigma` px, cut at 4 sigma, edges reflected.

    torchvision's result (`functional.gaussian_blur`), as a sum of shifted images, columns after rows: 0.8 ms instead of
    4.3 at 224 px and the largest sigma.
    """
    radius = min(math.ceil(4 * sigma), min(pixels.shape[-2:]) - 1)
    kernel = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(radius + 1)]
    middle, *others = (weight / (2 * sum(kernel) - kernel[0]) for weight in kernel)
    x = nnf.pad(pixels[None].float(), [radius] * 4, mode="reflect")[0]
    for dim in (1, 2):
        length = x.shape[dim] - 2 * radius
        blurred = middle * x.narrow(dim, radius, length)
        for i, weight in enumerate(others, 1):
            blurred.add_(x.narrow(dim, radius - i, length) + x.narrow(dim, radius + i, length), alpha=weight)
        x = blurred
    return x.round_().to(torch.uint8)


def _chance(p: float) -> bool:
    return bool(torch.rand(()) < p)


def _jittered(pixels: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """torchvision's ColorJitter, on a Pillow image."""
    spans = [(max(0.0, 1 - strength), 1 + strength) for strength in (brightness, contrast, saturation)]
    order, *factors = ColorJitter.get_params(*spans, (-hue, hue))
    image = as_pillow(pixels)
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for i in order:
        image = changes[i](image, factors[i])
    return planes(whole(image))
