"""Image files that are damaged, or lie about themselves."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mimlet.data.decode import UnreadableImage, decode
from tests.data.images import encoded, picture, png
from tests.fuzz.fuzz import EDITS, Edit, Refused, attempt, fuzzed, mutated


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = 6, "described"
    return tags


def _valid() -> dict[str, bytes]:
    """A small file of every kind that is read, with what such files carry."""
    image, frames = picture(0), [picture(1), picture(2)]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    deep = Image.fromarray(np.arange(24 * 18, dtype=np.uint16).reshape(18, 24))
    return {
        "jpeg": encoded(image, exif=exif(), icc_profile=profile),
        "progressive": encoded(image, progressive=True, comment=b"c"),
        "cmyk": encoded(image.convert("CMYK")),
        "mpo": encoded(image, "MPO", save_all=True, append_images=frames),
        "png": encoded(image, "PNG", icc_profile=profile, exif=exif()),
        "palette": encoded(image.quantize(8), "PNG", transparency=3),
        "deep": encoded(deep, "PNG"),
        "apng": encoded(image, "PNG", save_all=True, append_images=frames),
        "gif": encoded(image, "GIF", save_all=True, append_images=frames),
        "webp": encoded(image, "WEBP", exif=exif()),
        "animated webp": encoded(image, "WEBP", save_all=True, append_images=frames, lossless=True),
        "avif": encoded(image, "AVIF"),
        "jpeg 2000": encoded(image, "JPEG2000"),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF", exif=exif()),
        "lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "jpeg in tiff": encoded(image, "TIFF", compression="jpeg"),
        "float": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        "ppm": encoded(image, "PPM"),
    }


VALID = _valid()


def check(data: bytes) -> None:
    found = attempt(lambda: decode(data), (UnreadableImage,))
    if not isinstance(found, Refused):
        pixels = np.asarray(found)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert 3 in (pixels.shape[0], pixels.shape[2])


@pytest.mark.parametrize("kind", VALID)
def test_valid_files_are_read(kind: str) -> None:
    found = attempt(lambda: decode(VALID[kind]), (UnreadableImage,))
    assert isinstance(found, Refused) == (kind == "float")


@fuzzed(250)
@given(st.sampled_from([*VALID]), st.sampled_from([*VALID]), EDITS)
def test_mutated_files(kind: str, other: str, edits: list[Edit]) -> None:
    check(mutated(VALID[kind], edits, VALID[other]))


@fuzzed(100)
@given(st.sampled_from([*VALID]), st.floats(0, 0.3), EDITS)
def test_mutated_heads(kind: str, share: float, edits: list[Edit]) -> None:
    """Where formats keep their sizes, offsets and tables."""
    size = max(64, int(share * len(VALID[kind])))
    check(mutated(VALID[kind][:size], edits) + VALID[kind][size:])


@fuzzed(100)
@given(st.sampled_from(("jpeg", "progressive", "cmyk", "mpo")), EDITS)
def test_mutated_files_with_another_decoder(kind: str, edits: list[Edit]) -> None:
    decode(VALID["progressive"], "torchvision")  # makes folders of its own the first time
    attempt(lambda: decode(mutated(VALID[kind], edits), "torchvision"), (UnreadableImage,))


@fuzzed(50)
@given(st.sampled_from((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"BM", b"P6 ")), st.binary())
def test_noise_behind_a_signature(signature: bytes, noise: bytes) -> None:
    check(signature + noise)


def tiff(**tags: int) -> bytes:
    """One grey pixel's worth of TIFF, with some of its numbers replaced."""
    numbers = {"width": 256, "height": 257, "bits": 258, "packing": 259, "kind": 262, "strips": 273, "samples": 277}
    numbers |= {"rows": 278, "bytes": 279, "tile_width": 322, "tile_height": 323, "tiles": 324, "tile_bytes": 325}
    values = {"width": 10, "height": 10, "bits": 8, "packing": 1, "kind": 1, "samples": 1, **tags}
    entries = sorted((numbers[name], value) for name, value in values.items())
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return (
        head + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4) + b"\x80\x0b" * 99
    )


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIIIII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def gif(canvas: int, frame: int) -> bytes:
    screen = struct.pack("<HHBBB", canvas, canvas, 0, 0, 0)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x08\0;"


def webp(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def resized(kind: str, of: Callable[[int], bytes], side: int = 100_000) -> bytes:
    """A valid file in which the bytes of width and height say something else."""
    return VALID[kind].replace(of(24) + of(18), of(side) + of(side), 1)


BOMBS = {
    "png": png(100_000, 100_000, 8, 2, b""),
    "png, a million wide": png(2**31 - 1, 2**31 - 1, 8, 2, b""),
    "tiff": tiff(width=100_000, height=100_000, strips=200, bytes=100),
    "tiff, tiles": tiff(packing=5, tile_width=32_000, tile_height=32_000, tiles=200, tile_bytes=100),
    "bmp": bmp(100_000, 100_000),
    "bmp, upside down": bmp(100_000, -100_000),
    "gif": gif(65_535, 65_535),
    "gif, a frame": gif(1, 65_535),
    "ppm": b"P6 100000 100000 255\n",
    "ppm, text": b"P3 100000 100000 255\n1 2 3",
    "avif": resized("avif", lambda side: struct.pack(">I", side)),
    "jpeg 2000": resized("jpeg 2000", lambda side: struct.pack(">I", side)),
    "webp": webp(2**24, 2**24),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_from_their_header(kind: str) -> None:
    assert BOMBS[kind] not in VALID.values(), "the size was not found"
    found = attempt(lambda: decode(BOMBS[kind]), (UnreadableImage,))
    assert isinstance(found, Refused)


SCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file closefile showpage\n%%EOF\n"
)


def test_only_the_formats_of_photographs_are_opened() -> None:
    """PostScript is a program, which Pillow would have run; the others are read by code that hardly anyone uses."""
    assert attempt(lambda: decode(SCRIPT), (UnreadableImage,)) == "not an image, or of an unknown format"
    for kind in ("ICO", "PCX", "TGA", "SGI", "DDS", "EPS"):
        data = encoded(picture(0).resize((32, 32)), kind)
        assert isinstance(attempt(lambda data=data: decode(data), (UnreadableImage,)), Refused), kind
