"""Common corruptions of images in five severities, by the published formulas.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
2019, and the numbers in the scripts that made ImageNet-C, Tiny-ImageNet-C and CIFAR-10-C (hendrycks/robustness,
ImageNet-C/create_c). Three sets of numbers are published, for sides of 224, 64 and 32 px; an image takes the set whose
side is nearest in ratio (up to 45 px that of 32, up to 119 px that of 64). What differs from the published images:
frost is missing (it needs photographs of frost), values are rounded, not cut off, and the result is not stored as JPEG.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from mimlet.data.augment import Transform
from mimlet.data.pixels import Pixels
from mimlet.data.seeding import key

Array = NDArray[np.float32]
"""An image [3,S,S] or a map [S,S]; 0 is black, 1 is white."""

Formula = Callable[..., Array]
"""(image, generator, numbers of a severity) -> corrupted image, which may leave [0, 1]."""

SEVERITIES = 5
SIDES = (32, 64, 224)
"""Sides in pixels that numbers are published for."""


def published_side(side: int) -> int:
    """Whose numbers an image of this side takes."""
    return min(SIDES, key=lambda published: abs(math.log(side / published)))


def corrupt(image: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """A square image, uint8 [3,S,S], with the corruption `name` of `CORRUPTIONS` in a severity from 1 to 5."""
    formula, numbers = CORRUPTIONS[name]
    values = numbers[published_side(image.shape[-1])][severity - 1]
    changed = formula(image.numpy().astype(np.float32) / 255, generator, *values)
    return torch.from_numpy(_bytes(changed))


@dataclass(frozen=True)
class Corrupted:
    """A transform with more views: what `transform` gives as `image`, and each of `names` in each severity.

    The views are called `view_name(name, severity)`. What is random in one depends on its name and the global generator
    (the data set's seed and the image's position), not on what else is asked for.
    """

    transform: Transform
    names: tuple[str, ...]

    def __call__(self, image: Pixels) -> dict[str, Tensor]:
        """See `Transform`."""
        clean = self.transform(image)["image"]
        seed = int(torch.randint(2**62, ()))
        views = {"image": clean}
        for name in self.names:
            for severity in range(1, SEVERITIES + 1):
                generator = np.random.default_rng(key("corruption", seed, name, severity))
                views[view_name(name, severity)] = corrupt(clean, name, severity, generator)
        return views


def view_name(name: str, severity: int) -> str:
    """Of a view of `Corrupted`."""
    return f"{name}-{severity}"


def gaussian_noise(x: Array, generator: Generator, deviation: float) -> Array:
    """Normal noise on every value."""
    return x + deviation * generator.standard_normal(x.shape, np.float32)


def shot_noise(x: Array, generator: Generator, photons: float) -> Array:
    """Counts of photons, white being so many on average."""
    return (generator.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(x: Array, generator: Generator, share: float) -> Array:
    """This share of all values becomes 0 or 1, evenly."""
    draw = generator.random(x.shape, np.float32)
    return np.where(draw < share, (draw < share / 2).astype(np.float32), x)


def defocus_blur(x: Array, generator: Generator, radius: float, smoothing: float) -> Array:
    """Every point becomes a disk, whose edge is smoothed; the image is mirrored at its borders."""
    kernel = _disk(radius, smoothing)
    half = len(kernel) // 2
    padded = torch.from_numpy(np.pad(x, ((0, 0), (half, half), (half, half)), mode="reflect"))
    blurred: Array = F.conv2d(padded[:, None], torch.from_numpy(kernel)[None, None])[:, 0].numpy()
    return blurred


@lru_cache
def _disk(radius: float, smoothing: float) -> Array:
    """Smoothed within the square around it, mirrored there as published: from radius 8 on its sum is 1.3 % above 1."""
    half = max(8, math.ceil(radius))
    across = np.arange(-half, half + 1)
    disk = (across**2 + across[:, None] ** 2 <= radius**2).astype(np.float32)
    smooth: Array = ndimage.gaussian_filter(disk / disk.sum(), smoothing, mode="mirror", radius=1 if half == 8 else 2)
    filled = int(np.flatnonzero(smooth.any(axis=0))[0])
    return smooth[filled : len(smooth) - filled, filled : len(smooth) - filled].copy()


def glass_blur(x: Array, generator: Generator, deviation: float, reach: int, rounds: int) -> Array:
    """Blurred, then pixel by pixel overwritten by a neighbour, then blurred again.

    The paper swaps neighbours. Its script overwrites the first with the second (what it swaps are views of one array),
    and that made the published images. It goes from the lower right to the upper left; a margin stays as it is.
    """
    side = x.shape[-1]
    inner = np.arange(side - reach, reach, -1)
    rows, columns = np.meshgrid(inner, inner, indexing="ij")
    pixels = list(range(side * side))
    for _ in range(rounds):
        right, down = generator.integers(-reach, reach, (2, *rows.shape))
        targets, sources = rows * side + columns, (rows + down) * side + columns + right
        for target, source in zip(targets.ravel().tolist(), sources.ravel().tolist(), strict=True):
            pixels[target] = pixels[source]
    shuffled = _blurred(x, deviation).reshape(3, -1)[:, pixels].reshape(x.shape)
    return _blurred(shuffled, deviation)


def _blurred(x: Array, deviation: float) -> Array:
    blurred: Array = ndimage.gaussian_filter(x, (0, deviation, deviation), mode="nearest")
    return blurred


def motion_blur(x: Array, generator: Generator, radius: int, deviation: float) -> Array:
    """Smeared within 45 degrees of the horizontal."""
    return _smeared(x, radius, deviation, generator.uniform(-45, 45))


def _smeared(x: Array, radius: int, deviation: float, angle: float) -> Array:
    """The mean of 2 * radius + 1 images, each shifted by another pixel at an angle in degrees, whose weights fall like
    one side of a normal distribution (ImageMagick's motion blur); borders are repeated.
    """
    along = np.arange(2 * radius + 1)
    weights = np.exp(-(along**2) / (2 * deviation**2))
    weights /= weights.sum()
    right = np.ceil(along * math.cos(math.radians(angle)) - 0.5).astype(int)
    down = np.ceil(along * math.sin(math.radians(angle)) - 0.5).astype(int)
    pad, (height, width) = 2 * radius, x.shape[-2:]
    padded = np.pad(x, (*[(0, 0)] * (x.ndim - 2), (pad, pad), (pad, pad)), mode="edge")
    smeared = np.zeros_like(x)
    for weight, dx, dy in zip(weights.astype(np.float32), right + pad, down + pad, strict=True):
        smeared += weight * padded[..., dy : dy + height, dx : dx + width]
    return smeared


def zoom_blur(x: Array, generator: Generator, stop: float, step: float) -> Array:
    """The mean of the image and of zooms into its middle, from 1 up to below `stop`."""
    factors = np.arange(1, stop, step).tolist()
    return (x + sum(_zoomed(x, factor) for factor in factors)) / np.float32(len(factors) + 1)


def _zoomed(x: Array, factor: float) -> Array:
    """The middle [C,S / factor,S / factor] of an image [C,S,S], bilinearly enlarged to [C,S,S]."""
    side = x.shape[-1]
    crop = math.ceil(side / factor)
    start, size = (side - crop) // 2, round(crop * factor)
    middle = torch.from_numpy(x[None, :, start : start + crop, start : start + crop])
    large = F.interpolate(middle, size=(size, size), mode="bilinear", align_corners=True)[0].numpy()
    trim = (size - side) // 2
    zoomed: Array = large[:, trim : trim + side, trim : trim + side]
    return zoomed


def snow(
    x: Array,
    generator: Generator,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: int,
    smear: float,
    kept: float,
) -> Array:
    """Flakes (noise, enlarged, above a threshold, smeared downwards), also upside down, on a whitened image."""
    flakes = mean + deviation * generator.standard_normal(x.shape[1:], np.float32)
    flakes = _zoomed(flakes[None], zoom)[0]
    flakes = np.where(flakes < threshold, np.float32(0), flakes.clip(0, 1))
    flakes = _smeared(flakes, radius, smear, generator.uniform(-135, -45))
    grey = np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), x, 1)
    whitened = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5)
    fallen: Array = (whitened + flakes + flakes[::-1, ::-1]).astype(np.float32)
    return fallen


def fog(x: Array, generator: Generator, strength: float, decay: float) -> Array:
    """A cloud added, then everything darkened to the brightness that was there before."""
    side = x.shape[-1]
    cloud = _cloud(generator, 1 << (side - 1).bit_length(), decay)[:side, :side]
    brightest = float(x.max())
    return (x + strength * cloud) * np.float32(brightest / (brightest + strength))


def _cloud(generator: Generator, side: int, decay: float) -> Array:
    """A random map [S,S] from 0 to 1, S a power of two, that repeats itself at its borders: the diamond-square
    algorithm. From one scale to the next, half as large, deviations shrink by decay^2.
    """
    heights = np.zeros((side, side), np.float32)
    step, deviation = side, 1.0

    def mean(corners: Array, opposite: Array) -> Array:
        noise = generator.uniform(-deviation, deviation, corners.shape)
        return ((corners + opposite) / 4 + noise).astype(np.float32)

    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = centres = mean(pairs, np.roll(pairs, -1, 1))
        heights[::step, half::step] = mean(centres + np.roll(centres, 1, 0), corners + np.roll(corners, -1, 1))
        heights[half::step, ::step] = mean(centres + np.roll(centres, 1, 1), corners + np.roll(corners, -1, 0))
        step, deviation = half, deviation / decay**2
    heights -= heights.min()
    cloud: Array = heights / (heights.max() or 1)
    return cloud


def brightness(x: Array, generator: Generator, more: float) -> Array:
    """HSV's value raised, hue and saturation kept."""
    value = x.max(axis=0)
    raised = np.minimum(value + np.float32(more), 1)
    black = value == 0
    bright: Array = np.where(black, raised, x * (raised / np.where(black, 1, value)))
    return bright


def contrast(x: Array, generator: Generator, share: float) -> Array:
    """This share of each value's distance to its channel's mean is kept."""
    means = x.mean(axis=(1, 2), keepdims=True)
    nearer: Array = means + np.float32(share) * (x - means)
    return nearer


def elastic_transform(x: Array, generator: Generator, strength: float, deviation: float, reach: float) -> Array:
    """A random affine map of three corners of the middle, each by up to `reach`, then random shifts, smoothed by
    `deviation` and multiplied by `strength`. All in shares of the side.
    """
    side = x.shape[-1]
    middle, third = side // 2, side // 3
    corners = np.array([[third, third], [third, -third], [-third, -third]]) + middle
    moved = corners + generator.uniform(-reach * side, reach * side, (3, 2))
    affine = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # [3,2]: (x, y, 1) -> where it was
    grid = np.indices((side, side))[::-1].astype(np.float32)  # x, y
    x = _sampled(x, np.tensordot(affine[:2].T, grid, 1) + affine[2][:, None, None], "mirror")
    smooth = _smoothing(side, deviation * side)
    noise = torch.from_numpy(generator.uniform(-1, 1, (2, side, side)).astype(np.float32))
    shifts = (smooth @ noise @ smooth.T).numpy()
    return _sampled(x, grid + strength * side * shifts, "reflect")


def _sampled(x: Array, places: NDArray[np.floating], mode: str) -> Array:
    """Bilinear values of an image [3,S,S] at (x, y) [2,S,S]."""
    return np.stack([ndimage.map_coordinates(channel, places[::-1], order=1, mode=mode) for channel in x])


@lru_cache
def _smoothing(side: int, deviation: float) -> Tensor:
    """[S,S]: multiplied from the left it smooths columns, at a cost that does not grow with the deviation."""
    smoothing = ndimage.gaussian_filter(np.eye(side), (deviation, 0), mode="reflect", truncate=3)
    return torch.from_numpy(smoothing.astype(np.float32))


def pixelate(x: Array, generator: Generator, share: float) -> Array:
    """Reduced to this share of the side and enlarged again, both by Pillow's box filter."""
    side = x.shape[-1]
    small = _picture(x).resize((int(side * share),) * 2, Image.Resampling.BOX)
    return _values(small.resize((side, side), Image.Resampling.BOX))


def jpeg_compression(x: Array, generator: Generator, quality: int) -> Array:
    """Stored by Pillow as JPEG of this quality."""
    stored = io.BytesIO()
    _picture(x).save(stored, "JPEG", quality=quality)
    return _values(Image.open(stored))


def _bytes(x: Array) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.rint(x.clip(0, 1) * 255).astype(np.uint8)
    return rounded


def _picture(x: Array) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(_bytes(x).transpose(1, 2, 0)))


def _values(picture: Image.Image) -> Array:
    return np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(255)


Numbers = tuple[tuple[float, ...], ...]


def _single(*values: float) -> Numbers:
    return tuple((value,) for value in values)


_ZOOMS: Numbers = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))
_LARGE = 244 / 224  # the script for 224 px multiplies shares of the side by 244

CORRUPTIONS: Mapping[str, tuple[Formula, Mapping[int, Numbers]]] = {
    "gaussian_noise": (
        gaussian_noise,
        {
            32: _single(0.04, 0.06, 0.08, 0.09, 0.10),
            64: _single(0.04, 0.08, 0.12, 0.15, 0.18),
            224: _single(0.08, 0.12, 0.18, 0.26, 0.38),
        },
    ),
    "shot_noise": (
        shot_noise,
        {32: _single(500, 250, 100, 75, 50), 64: _single(250, 100, 50, 30, 15), 224: _single(60, 25, 12, 5, 3)},
    ),
    "impulse_noise": (
        impulse_noise,
        {
            32: _single(0.01, 0.02, 0.03, 0.05, 0.07),
            64: _single(0.01, 0.02, 0.05, 0.08, 0.14),
            224: _single(0.03, 0.06, 0.09, 0.17, 0.27),
        },
    ),
    "defocus_blur": (
        defocus_blur,
        {
            32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
            64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
            224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        },
    ),
    "glass_blur": (
        glass_blur,
        {
            32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
            64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
            224: ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        },
    ),
    "motion_blur": (
        motion_blur,
        {
            32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
            64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
            224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        },
    ),
    "zoom_blur": (
        zoom_blur,
        {
            32: _ZOOMS,
            64: _ZOOMS,
            224: ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        },
    ),
    "snow": (
        snow,
        {
            32: (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
            64: (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
            ),
            224: (
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
        },
    ),
    "fog": (
        fog,
        {
            32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
            64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
            224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        },
    ),
    "brightness": (
        brightness,
        {
            32: _single(0.05, 0.1, 0.15, 0.2, 0.3),
            64: _single(0.1, 0.2, 0.3, 0.4, 0.5),
            224: _single(0.1, 0.2, 0.3, 0.4, 0.5),
        },
    ),
    "contrast": (
        contrast,
        {
            32: _single(0.75, 0.5, 0.4, 0.3, 0.15),
            64: _single(0.4, 0.3, 0.2, 0.1, 0.05),
            224: _single(0.4, 0.3, 0.2, 0.1, 0.05),
        },
    ),
    "elastic_transform": (
        elastic_transform,
        {
            32: ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
            64: ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
            224: (
                (2 * _LARGE, 0.7 * _LARGE, 0.1 * _LARGE),
                (2 * _LARGE, 0.08 * _LARGE, 0.2 * _LARGE),
                (0.05 * _LARGE, 0.01 * _LARGE, 0.02 * _LARGE),
                (0.07 * _LARGE, 0.01 * _LARGE, 0.02 * _LARGE),
                (0.12 * _LARGE, 0.01 * _LARGE, 0.02 * _LARGE),
            ),
        },
    ),
    "pixelate": (
        pixelate,
        {
            32: _single(0.95, 0.9, 0.85, 0.75, 0.65),
            64: _single(0.9, 0.8, 0.7, 0.6, 0.5),
            224: _single(0.6, 0.5, 0.4, 0.3, 0.25),
        },
    ),
    "jpeg_compression": (
        jpeg_compression,
        {32: _single(80, 65, 58, 50, 40), 64: _single(65, 58, 50, 40, 25), 224: _single(25, 18, 15, 10, 7)},
    ),
}
"""Formula by name, with its numbers of the five severities by published side."""
