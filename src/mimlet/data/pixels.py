"""Decoded images, and the few things that are done with them before they are a batch.

A part is cut out first, rows and columns alone, and copied once with the channels last: torch resizes uint8 pixels in
this layout twice as fast as in the other (bicubic to 224 px 75 us against 165 on one core).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Pixels = Image.Image | Tensor
"""A decoded RGB image: Pillow's, or uint8 [3,H,W] as a view of memory [H,W,3]."""


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def extent(image: Pixels) -> tuple[int, int]:
    """(width, height) in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


def cut(image: Pixels | NDArray[np.uint8], box: Box) -> Tensor:
    """The part of an image, also of one as an array [H,W,3]: uint8 [3,h,w], a view of own memory [h,w,3]."""
    bottom, right = box.top + box.height, box.left + box.width
    if isinstance(image, Image.Image):
        part = np.array(image.crop((box.left, box.top, right, bottom)))
    else:
        array = image if isinstance(image, np.ndarray) else image.permute(1, 2, 0).numpy()
        part = array[box.top : bottom, box.left : right].copy()
    return torch.from_numpy(part).permute(2, 0, 1)


def whole(image: Pixels) -> Tensor:
    """All of an image, as `cut` gives a part."""
    width, height = extent(image)
    return cut(image, Box(0, 0, height, width))


def as_pillow(image: Pixels) -> Image.Image:
    """The same for what only Pillow does."""
    return image if isinstance(image, Image.Image) else Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_array(array: NDArray[np.uint8]) -> Tensor:
    """uint8 [H,W,3] -> [3,H,W] without a copy, also of memory that cannot be written: nothing here writes to pixels."""
    return from_dlpack(np.ascontiguousarray(array)).permute(2, 0, 1)


def planes(pixels: Tensor, mirrored: bool = False) -> Tensor:
    """uint8 [3,h,w] in any layout -> contiguous. Mirrored at no extra cost: numpy can copy from the end."""
    array = pixels.numpy()
    return torch.from_numpy(np.ascontiguousarray(array[:, :, ::-1] if mirrored else array))


def resize(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    """uint8 [3,h,w] -> [3,height,width], antialiased, `mode` bicubic or bilinear, in the same layout."""
    batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # strides by which torch knows the layout
    return F.interpolate(batch, (height, width), mode=mode, antialias=True)[0]
