"""Encoded bytes -> RGB pixels, whatever the file holds."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 200_000_000


class UnreadableImage(Exception):
    """This image cannot be used; the text is the reason. Training goes on with another one."""


def decode(data: bytes | Image.Image, shortest: int = 0) -> Image.Image:
    """Decodes to 8-bit RGB.

    The first frame of an animation; EXIF orientation applied; transparency composited on white; 16-bit channels
    scaled by taking their high byte. Images of more than `MAX_PIXELS` pixels are refused from their header, before
    any memory is taken.
    `shortest`: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides stay at least
    twice so many pixels; faster, but not pixel-identical to a full decode. Raises `UnreadableImage`.
    """
    if isinstance(data, bytes) and not data:
        raise UnreadableImage("the file is empty")
    with _our_limit():
        try:
            image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(
                    f"{width:,} x {height:,} = {width * height:,} pixels, more than the limit of {MAX_PIXELS:,}"
                )
            if shortest:
                side = min(width, height)
                image.draft(None, (width * 2 * shortest // side, height * 2 * shortest // side))
            image.load()
            return _rgb(_upright(image))
        except UnreadableImage:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage("not an image, or of an unknown format") from None
        except Exception as error:  # Pillow's readers raise nearly every type on damaged files
            raise UnreadableImage(str(error) or type(error).__name__) from None


@contextmanager
def _our_limit() -> Iterator[None]:
    """Pillow with our limit of pixels instead of its own, and without its warnings."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; damaged EXIF data counts as none."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # see decode; the pixels are good
        return image
    return image


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
