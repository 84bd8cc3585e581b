"""Transforms from a decoded image to uint8 pixels.

Resizing is done by torchvision on uint8 tensors, antialiased. It is as exact as Pillow's (the two differ by 0.02 grey
levels on average) and takes a third of the time: a crop of a 500 x 375 JPEG to 224 px bicubic 215 us against 720 us on
one core, beside 570 us for decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomCrop, RandomResizedCrop
from torchvision.transforms.v2 import ColorJitter
from torchvision.transforms.v2 import functional as F

from mimlet.config import AugmentSettings
from mimlet.errors import ConfigError

Transform = Callable[[Image.Image], dict[str, Tensor]]
"""One decoded RGB image -> its named uint8 views. It may use the global random generators: the data set seeds them."""

_MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
_LONGEST = 4


def training_transform(augment: AugmentSettings, image_size: int, changed: str = "image") -> Transform:
    """Random crop, flip, then RandAugment or colour jitter: one view `image`, uint8 [3,S,S].

    With another name in `changed`, the result of the last step is the view of that name, and `image` the same crop
    without it; there is only `image` where the settings have no such step.

    The crop is torchvision's RandomResizedCrop, or, with `pad_crop`, a crop of the zero-padded image (resized first
    only if its short side is not S). Colour jitter changes brightness, contrast and saturation by the same strength;
    as in timm, RandAugment switches it off. Raises `ConfigError`.
    """
    check_crop(augment.crop_scale, augment.crop_ratio)
    return _Training(augment, image_size, _color(augment, image_size), changed)


def evaluation_transform(augment: AugmentSettings, image_size: int) -> Transform:
    """Short side to round(S / eval_crop), centre crop: one view `image`, uint8 [3,S,S]. Deterministic."""
    return _Evaluation(image_size, round(image_size / augment.eval_crop), _MODES[augment.eval_interpolation])


def check_crop(
    scale: tuple[float, float], ratio: tuple[float, float], scale_setting: str = "data.augment.crop_scale"
) -> None:
    """Raises `ConfigError` where `resized_crop` could not draw; `scale_setting` is where the scale comes from."""
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ConfigError(f"{scale_setting} is {low}, {high}; expected smallest and largest share of the area, up to 1")
    low, high = ratio
    if not 0 < low <= high:
        raise ConfigError(
            f"data.augment.crop_ratio is {low}, {high}; expected smallest and largest width / height, above 0"
        )


def resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], ratio: tuple[float, float], interpolation: str
) -> Tensor:
    """torchvision's RandomResizedCrop: uint8 [3,S,S]. `interpolation` "random" draws bilinear or bicubic."""
    top, left, height, width = RandomResizedCrop.get_params(image, scale, ratio)
    part = F.pil_to_tensor(image.crop((left, top, left + width, top + height)))
    resized: Tensor = F.resize(part, [size, size], interpolation_mode(interpolation), antialias=True)
    return resized


@dataclass(frozen=True)
class _Training:
    augment: AugmentSettings
    size: int
    color: Callable[[Tensor], Tensor] | None
    changed: str

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        augment = self.augment
        if augment.pad_crop:
            pixels = self._padded_crop(image)
        else:
            pixels = resized_crop(image, self.size, augment.crop_scale, augment.crop_ratio, augment.interpolation)
        if torch.rand(()) < self.augment.flip:
            pixels = pixels.flip(-1)
        views = {"image": pixels.contiguous()}
        if self.color is not None:
            views[self.changed] = self.color(views["image"]).contiguous()
        return views

    def _padded_crop(self, image: Image.Image) -> Tensor:
        mode = interpolation_mode(self.augment.interpolation)
        pixels = F.pad(_short_side(image, self.size, mode), [self.augment.pad_crop])
        cropped: Tensor = F.crop(pixels, *RandomCrop.get_params(pixels, (self.size, self.size)))
        return cropped


@dataclass(frozen=True)
class _Evaluation:
    size: int
    resized: int
    mode: InterpolationMode

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        return {
            "image": F.center_crop(_short_side(image, self.resized, self.mode), [self.size, self.size]).contiguous()
        }


def interpolation_mode(name: str) -> InterpolationMode:
    """torchvision's name of `data.augment.interpolation`; "random" draws bilinear or bicubic."""
    if name == "random":
        name = "bicubic" if torch.rand(()) < 0.5 else "bilinear"
    return _MODES[name]


def _short_side(image: Image.Image, size: int, mode: InterpolationMode) -> Tensor:
    """Resizes the short side. Of an image longer than 4 : 1 only the middle 4 : 1 is kept.

    A line of 1 x 5000 px would take a gigabyte otherwise.
    """
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        image = image.crop((left, top, min(width, left + longest), min(height, top + longest)))
    pixels: Tensor = F.pil_to_tensor(image)
    return pixels if min(width, height) == size else F.resize(pixels, [size], mode, antialias=True)


@dataclass(frozen=True)
class _RandAugment:
    """timm's RandAugment, which works on Pillow images."""

    apply: Callable[[Image.Image], Image.Image]

    def __call__(self, pixels: Tensor) -> Tensor:
        changed: Tensor = F.pil_to_tensor(self.apply(F.to_pil_image(pixels)))
        return changed


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's, with 0 bits black as ever.

    The increasing variant asks for 0 bits at magnitude 10, which Pillow 13 refuses.
    """
    if bits == 0:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = auto_augment.posterize(image, bits)  # type: ignore[no-untyped-call]
    return posterized


def _color(augment: AugmentSettings, image_size: int) -> Callable[[Tensor], Tensor] | None:
    if augment.randaugment:
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
    return ColorJitter(*[augment.color_jitter] * 3) if augment.color_jitter else None
