"""Transforms from a decoded image to uint8 pixels.

Resizing is done by torch on uint8 tensors, antialiased. It is as exact as Pillow's (the two differ by 0.02 grey levels
on average). Of a decoded image of short side 256, a crop to 224 px takes about 150 us on one core: 17 for what is
drawn, 4 to cut it out, 75 to 95 to resize, 39 to mirror it and separate its channels (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import auto_augment
from torch import Generator, Tensor
from torchvision.transforms import RandomCrop
from torchvision.transforms.v2 import functional as F

from mimlet.config import AugmentSettings
from mimlet.data.pixels import Box, Pixels, as_pillow, cut, extent, planes, resize, whole
from mimlet.errors import ConfigError

Transform = Callable[[Pixels], dict[str, Tensor]]
"""One decoded RGB image -> its named uint8 views. It may use the global random generators: the data set seeds them."""

Jitter = tuple[tuple[int, float], ...]
"""Changes of colour in their order: which one of `CHANGES`, and its factor."""

CHANGES = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)

_LONGEST = 4
_TRIES = 10


def training_transform(augment: AugmentSettings, image_size: int, changed: str = "image") -> Transform:
    """Random crop, flip, then RandAugment or colour jitter: one view `image`, uint8 [3,S,S].

    With another name in `changed`, the result of the last step is the view of that name, and `image` the same crop
    without it; there is only `image` where the settings have no such step.

    The crop is torchvision's RandomResizedCrop (`Crops`), or, with `pad_crop`, a crop of the zero-padded image (resized
    first only if its short side is not S). Colour jitter changes brightness, contrast and saturation by the same
    strength; as in timm, RandAugment switches it off. Raises `ConfigError`.
    """
    check_crop(augment.crop_scale, augment.crop_ratio)
    kind = _PaddedCrops if augment.pad_crop else Crops
    return kind(augment, image_size, changed, _randaugment(augment, image_size))


def evaluation_transform(augment: AugmentSettings, image_size: int) -> Transform:
    """Short side to round(S / eval_crop), centre crop: one view `image`, uint8 [3,S,S]. Deterministic."""
    return _Evaluation(image_size, round(image_size / augment.eval_crop), augment.eval_interpolation)


def check_crop(
    scale: tuple[float, float], ratio: tuple[float, float], scale_setting: str = "data.augment.crop_scale"
) -> None:
    """Raises `ConfigError` where `draw_box` could not draw; `scale_setting` is where the scale comes from."""
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ConfigError(f"{scale_setting} is {low}, {high}; expected smallest and largest share of the area, up to 1")
    low, high = ratio
    if not 0 < low <= high:
        raise ConfigError(
            f"data.augment.crop_ratio is {low}, {high}; expected smallest and largest width / height, above 0"
        )


def draw_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: Generator | None = None,
) -> Box:
    """What torchvision's RandomResizedCrop draws in an image of `size` (width, height), with the same numbers."""
    width, height = size
    for _ in range(_TRIES):
        area = width * height * _uniform(*scale, generator)
        aspect = torch.empty(1).uniform_(*_logarithms(ratio), generator=generator).exp_().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(torch.randint(0, n, (1,), generator=generator)) for n in (height - h + 1, width - w + 1))
            return Box(top, left, h, w)
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def draw_mode(interpolation: str, generator: Generator | None = None) -> str:
    """`data.augment.interpolation`, of which "random" is bilinear or bicubic."""
    if interpolation == "random":
        return "bicubic" if torch.rand((), generator=generator).item() < 0.5 else "bilinear"
    return interpolation


def _uniform(low: float, high: float, generator: Generator | None) -> float:
    return torch.empty(1).uniform_(low, high, generator=generator).item()


@lru_cache
def _logarithms(ratio: tuple[float, float]) -> list[float]:
    """In single precision, as torchvision has them."""
    logarithms: list[float] = torch.log(torch.tensor(ratio)).tolist()
    return logarithms


class Draw(NamedTuple):
    """What is random in one sample of `Crops`: the part of the image, how it is resized, whether it is mirrored, and
    what happens to its colours.
    """

    box: Box
    mode: str
    flip: bool
    jitter: Jitter


@dataclass(frozen=True)
class _Training:
    """What transforms for training have in common."""

    augment: AugmentSettings
    size: int
    changed: str
    randaugment: Callable[[Tensor], Tensor] | None

    def _draw_jitter(self, generator: Generator | None) -> Jitter:
        """torchvision's ColorJitter without hue, with the same numbers; nothing where RandAugment is in its place."""
        strength = self.augment.color_jitter
        if not strength or self.randaugment:
            return ()
        order = torch.randperm(4, generator=generator).tolist()
        factors = [_uniform(max(1 - strength, 0.0), 1 + strength, generator) for _ in CHANGES]
        return tuple((which, factors[which]) for which in order if which < len(CHANGES))

    def _views(self, pixels: Tensor, flip: bool, jitter: Jitter) -> dict[str, Tensor]:
        """The crop [3,S,S] mirrored, and with other colours."""
        views = {"image": planes(pixels, flip)}
        if self.randaugment:
            views[self.changed] = self.randaugment(views["image"])
        elif jitter:
            changed = views["image"]
            for which, factor in jitter:
                changed = CHANGES[which](changed, factor)
            views[self.changed] = changed
        return views


@dataclass(frozen=True)
class Crops(_Training):
    """Random resized crops. All that is random about them, RandAugment apart, can be drawn before there are pixels, so
    that no more than the crop has to be decoded, and it can be resized elsewhere (`mimlet.data.cuts`).
    """

    def draw(self, size: tuple[int, int], generator: Generator | None = None) -> Draw:
        """For an image of `size` (width, height)."""
        augment = self.augment
        return Draw(
            draw_box(size, augment.crop_scale, augment.crop_ratio, generator),
            draw_mode(augment.interpolation, generator),
            torch.rand((), generator=generator).item() < augment.flip,
            self._draw_jitter(generator),
        )

    def render(self, part: Tensor, draw: Draw) -> dict[str, Tensor]:
        """The views from the pixels in `draw.box`, uint8 [3,h,w]."""
        return self._views(resize(part, self.size, self.size, draw.mode), draw.flip, draw.jitter)

    def __call__(self, image: Pixels) -> dict[str, Tensor]:
        """See `Transform`."""
        draw = self.draw(extent(image))
        return self.render(cut(image, draw.box), draw)


def left_to_device(setting: str, transform: Transform, device: str) -> bool:
    """Whether a device of this type makes the views of `transform` (`speed.augment`); auto: on CUDA, where it can.
    Raises `ConfigError`.
    """
    problem = ""
    if not isinstance(transform, Crops):
        problem = "resizes one random crop per image, and this method or data.augment.pad_crop makes other views"
    elif transform.randaugment:
        problem = "changes colours by data.augment.color_jitter alone, and data.augment.randaugment needs Pillow"
    elif device not in ("cuda", "cpu"):
        problem = f"needs double precision, which {device} has not"
    if setting == "device" and problem:
        raise ConfigError(f"speed.augment=device {problem}; use speed.augment=auto or loader")
    return setting == "device" or (setting == "auto" and device == "cuda" and not problem)


@dataclass(frozen=True)
class _PaddedCrops(_Training):
    def __call__(self, image: Pixels) -> dict[str, Tensor]:
        padded = F.pad(short_side(image, self.size, draw_mode(self.augment.interpolation)), [self.augment.pad_crop])
        pixels = F.crop(padded, *RandomCrop.get_params(padded, (self.size, self.size)))
        return self._views(pixels, torch.rand(()).item() < self.augment.flip, self._draw_jitter(None))


@dataclass(frozen=True)
class _Evaluation:
    size: int
    resized: int
    mode: str

    def __call__(self, image: Pixels) -> dict[str, Tensor]:
        return {"image": planes(F.center_crop(short_side(image, self.resized, self.mode), [self.size, self.size]))}


def short_side(image: Pixels, size: int, mode: str) -> Tensor:
    """Resizes the short side. Of an image longer than 4 : 1 only the middle 4 : 1 is kept.

    A line of 1 x 5000 px would take a gigabyte otherwise.
    """
    width, height = extent(image)
    short = min(width, height)
    w, h = min(width, _LONGEST * short), min(height, _LONGEST * short)
    pixels = cut(image, Box((height - h) // 2, (width - w) // 2, h, w))
    return pixels if short == size else resize(pixels, size * h // short, size * w // short, mode)


@dataclass(frozen=True)
class _RandAugment:
    """timm's RandAugment, which works on Pillow images."""

    apply: Callable[[Image.Image], Image.Image]

    def __call__(self, pixels: Tensor) -> Tensor:
        return planes(whole(self.apply(as_pillow(pixels))))


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's, with 0 bits black as ever.

    The increasing variant asks for 0 bits at magnitude 10, which Pillow 13 refuses.
    """
    if bits == 0:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = auto_augment.posterize(image, bits)  # type: ignore[no-untyped-call]
    return posterized


def _randaugment(augment: AugmentSettings, image_size: int) -> Callable[[Tensor], Tensor] | None:
    if not augment.randaugment:
        return None
    hparams: dict[str, object] = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in augment.mean),
    }
    if augment.interpolation != "random":
        hparams["interpolation"] = Image.Resampling[augment.interpolation.upper()]
    try:
        randaugment = auto_augment.rand_augment_transform(augment.randaugment, hparams)
    except (AssertionError, ValueError, KeyError):
        raise ConfigError(
            f"data.augment.randaugment is '{augment.randaugment}'; "
            "expected timm's notation, for example rand-m10-mstd0.5-inc1"
        ) from None
    for op in randaugment.ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize
    return _RandAugment(randaugment)
