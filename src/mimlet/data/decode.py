"""Encoded bytes -> RGB pixels, whatever the file holds."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from mimlet.data.pixels import Box, Pixels, cut, extent, from_array
from mimlet.errors import ConfigError

MAX_PIXELS = 200_000_000
FORMATS = ("JPEG", "JPEG2000", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM")
"""What a file may hold, whatever its name says. Pillow knows more formats, of which one runs a program (PostScript)."""

_TILE = (322, 323)
"""TIFF's tags of the width and length of a tile."""

Decoder = Literal["pillow", "torchvision", "torchcodec"]
"""What reads JPEG files (`data.decoder`)."""

Encoded = bytes | Image.Image | NDArray[np.uint8]
"""What a source hands out: a file's bytes, an image of Pillow, or decoded pixels [H,W,3]."""


class UnreadableImage(Exception):
    """This image cannot be used; the text is the reason. Training goes on with another one."""


def decode(data: Encoded, decoder: Decoder = "pillow") -> Pixels:
    """Decodes to 8-bit RGB. What is decoded already comes back without a copy.

    The first frame of an animation; EXIF orientation applied; transparency composited on white; 16-bit channels
    scaled by taking their high byte. Images of more than `MAX_PIXELS` pixels are refused from their header, before
    any memory is taken. Raises `UnreadableImage`.

    Another `decoder` than Pillow gets upright RGB and grey JPEG files, and gives the same pixels. Pillow takes
    everything else, and what the other one refuses.
    """
    return Photo(data, decoder).pixels()


def check_decoder(decoder: Decoder) -> None:
    """`ConfigError` where `data.decoder` cannot be loaded."""
    try:
        _jpeg_reader(decoder)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.decoder={decoder} cannot be loaded ({str(error).splitlines()[0]}); pip install {decoder}, or use "
            "data.decoder=pillow"
        ) from None


class Photo:
    """An image whose size is known, and whose pixels are read when it is known how many of them are needed.

    `size`: (width, height) as it is to be looked at, read from the header of a JPEG. Raises `UnreadableImage`, as
    `decode` does, here or when pixels are asked for.
    """

    def __init__(self, data: Encoded, decoder: Decoder = "pillow") -> None:
        self._data, self._decoder = data, decoder
        self._opened: Image.Image | None = None
        self._known: dict[int, Pixels] = {}
        self._orientation = 1
        self._jpeg = False
        if isinstance(data, bytes):
            with _one_error():
                self._opened = image = _open(data)
                self._jpeg = image.format == "JPEG"
            if self._jpeg:
                self._orientation = _orientation(image)
                self.size = image.size if self._orientation < 5 else (image.height, image.width)
                return
        if isinstance(data, np.ndarray):
            self.size = _size_of(data)
        else:
            self.size = extent(self.pixels())

    def pixels(self, reduction: int = 1) -> Pixels:
        """All pixels; of a JPEG those of 1/2, 1/4 or 1/8 of its size with a `reduction` of 2, 4 or 8."""
        if reduction not in self._known:
            with _one_error():
                self._known[reduction] = self._read(reduction)
        return self._known[reduction]

    def reduction(self, box: Box, wanted: int) -> int:
        """At which share of its size a JPEG can be read so that both sides of the box keep at least twice so many
        pixels as `wanted`: 8, 4, 2 for 1/8, 1/4, 1/2; else 1.
        """
        most = min(box.height, box.width) // (2 * wanted) if self._jpeg else 1
        return next((each for each in (8, 4, 2) if each <= most), 1)

    def cut(self, box: Box, reduction: int = 1) -> Tensor:
        """The pixels in `box`, uint8 [3,h,w] in memory [h,w,3].

        With a `reduction` of `reduction()`, from a JPEG read at so much less of its size; the edges of the box are then
        rounded to pixels of that size. That is faster, and not identical to cutting from all pixels.
        """
        if isinstance(self._data, np.ndarray):
            return cut(self._data, box)
        image = self.pixels(reduction)
        return cut(image, box if reduction == 1 else _rescaled(box, self.size, extent(image)))

    def _read(self, reduction: int) -> Pixels:
        if isinstance(self._data, np.ndarray):
            return from_array(self._data)
        image, self._opened = self._opened or _open(self._data), None
        if self._jpeg:
            assert isinstance(self._data, bytes)
            plain = reduction == self._orientation == 1 and image.mode in ("RGB", "L")
            if plain and (read := _jpeg_reader(self._decoder)):
                try:
                    return read(torch.frombuffer(bytearray(self._data), dtype=torch.uint8))
                except RuntimeError:  # Pillow may read it, or says what is wrong
                    pass
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
        image.load()
        turn = _TURNS.get(self._orientation if self._jpeg else _orientation(image))
        return _rgb(image if turn is None else image.transpose(turn))


def _jpeg_reader(decoder: Decoder) -> Callable[[Tensor], Tensor] | None:
    """JPEG bytes [n] -> uint8 [3,H,W], a view of memory [H,W,3]; `RuntimeError` where it cannot read them, and nothing
    is turned upright. None for Pillow.
    """
    if decoder == "pillow":
        return None
    package = import_module("torchvision.io" if decoder == "torchvision" else "torchcodec.decoders")
    return partial(package.decode_jpeg, mode=package.ImageReadMode.RGB)


def _open(data: bytes | Image.Image) -> Image.Image:
    """An image of which only the header is read."""
    if isinstance(data, bytes) and not data:
        raise UnreadableImage("the file is empty")
    image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(*image.size)
    if isinstance(image, TiffImageFile):  # whose tiles may be larger than it
        _check_size(*(int(image.tag_v2.get(tag, 0)) for tag in _TILE))
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{width:,} x {height:,} = {width * height:,} pixels, more than the limit of {MAX_PIXELS:,}"
        )


def _size_of(array: NDArray[np.uint8]) -> tuple[int, int]:
    """Of pixels that came decoded."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UnreadableImage(f"an array {list(array.shape)} of {array.dtype}, not [height,width,3] of uint8")
    height, width, _ = array.shape
    _check_size(width, height)
    return width, height


@contextmanager
def _one_error() -> Iterator[None]:
    """Whatever goes wrong is `UnreadableImage`. Pillow with our limit of pixels instead of its own, and without its
    warnings.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image, or of an unknown format") from None
    except Exception as error:  # Pillow's readers raise nearly every type on damaged files
        raise UnreadableImage(str(error) or type(error).__name__) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; damaged EXIF data counts as none."""
    if image.format in ("JPEG", "PNG", "WEBP") and _TOLD.isdisjoint(image.info):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if value in _TURNS else 1
    except Exception:  # see _one_error; the pixels are good
        return 1


_TOLD = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""Where Pillow keeps what these formats say about it, which takes 15 us to look for."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of this EXIF orientation upright; from 5 on its sides are swapped."""


def _rescaled(box: Box, size: tuple[int, int], reduced: tuple[int, int]) -> Box:
    """The same part of the image in another size."""
    across, down = (after / before for after, before in zip(reduced, size, strict=True))
    top, bottom = (math.floor(edge * down + 0.5) for edge in (box.top, box.top + box.height))
    left, right = (math.floor(edge * across + 0.5) for edge in (box.left, box.left + box.width))
    return Box(top, left, bottom - top, right - left)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow -> RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise UnreadableImage(
                f"pixels of mode {image.mode} from {pixels.min()} to {pixels.max()}, not 8 or 16 bits"
            )
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")
