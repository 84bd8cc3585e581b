import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageSequence

from mimlet.data import decode as module
from mimlet.data.decode import UnreadableImage, decode
from tests.data.images import encoded, picture, png


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_jpeg_equals_pillow() -> None:
    data = encoded(picture(0), quality=95)
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(pixels(decode(data)), np.asarray(opened))
    assert np.array_equal(pixels(decode(data)), pixels(decode(opened)))


def test_cmyk_jpeg() -> None:
    data = encoded(picture(1).convert("CMYK"), quality=95)
    assert abs(pixels(decode(data)) - pixels(picture(1))).mean() < 6


def test_16_bit_grey_is_scaled() -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFF00, 0xFFFF]], np.uint16)
    assert pixels(decode(encoded(Image.fromarray(values), "PNG")))[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]
    assert pixels(decode(encoded(Image.fromarray(values.astype(np.int32)), "TIFF")))[0, :, 2].tolist() == [
        0,
        0,
        1,
        128,
        255,
        255,
    ]


def test_16_bit_rgb_is_scaled() -> None:
    row = b"\0" + np.array([0, 0x8000, 0xFFFF, 0x1234, 0x00FF, 0xFF00], ">u2").tobytes()
    assert pixels(decode(png(2, 1, 16, 2, row))).tolist() == [[[0, 128, 255], [0x12, 0, 255]]]


def test_pixels_of_unknown_range_are_unreadable() -> None:
    with pytest.raises(UnreadableImage, match=r"mode F from 0.0 to 1.0, not 8 or 16 bits"):
        decode(encoded(Image.fromarray(np.array([[0, 1]], np.float32)), "TIFF"))
    with pytest.raises(UnreadableImage, match="mode I from 0 to 70000"):
        decode(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))


def test_transparency_is_composited_on_white() -> None:
    rgba = Image.fromarray(np.array([[[0, 0, 0, 128], [10, 20, 30, 255], [9, 9, 9, 0]]], np.uint8))
    assert pixels(decode(encoded(rgba, "PNG"))).tolist() == [[[127] * 3, [10, 20, 30], [255] * 3]]
    grey = Image.fromarray(np.array([[[0, 128], [77, 255]]], np.uint8), "LA")
    assert pixels(decode(encoded(grey, "PNG"))).tolist() == [[[127] * 3, [77] * 3]]


def test_palette_with_transparency() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([1, 2, 3, 40, 50, 60, 70, 80, 90])
    assert pixels(decode(encoded(image, "PNG"))).tolist() == [[[1, 2, 3], [40, 50, 60], [70, 80, 90]]]
    with_index = encoded(image, "PNG", transparency=1)
    assert pixels(decode(with_index)).tolist() == [[[1, 2, 3], [255] * 3, [70, 80, 90]]]
    with_bytes = encoded(image, "PNG", transparency=bytes([0, 255, 255]))
    assert pixels(decode(with_bytes)).tolist() == [[[255] * 3, [40, 50, 60], [70, 80, 90]]]


def test_colour_key_of_an_rgb_png() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(decode(encoded(image, "PNG", transparency=(1, 2, 3)))).tolist() == [[[255] * 3, [4, 5, 6]]]


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    assert image.mode == "1"
    assert pixels(decode(encoded(image, "PNG"))).tolist() == [[[255] * 3, [0] * 3]]


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 2
    assert (pixels(decode(data)) == [255, 0, 0]).all()


def test_exif_orientation() -> None:
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    turned = decode(encoded(image, "PNG", exif=exif))
    assert np.array_equal(pixels(turned), np.rot90(pixels(image), -1))


def test_damaged_exif_is_ignored() -> None:
    data = encoded(picture(2))
    segment = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xee" * 20
    damaged = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    assert np.array_equal(pixels(decode(damaged)), pixels(decode(data)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image at all", "not an image, or of an unknown format"),
        (encoded(picture(3, (200, 200)))[:900], "truncated"),
        (encoded(picture(3), "PNG")[:-30], r"truncated|broken"),
        (encoded(picture(3))[:20], r".+"),
    ],
)
def test_unreadable(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)


def test_huge_image_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(20_000, 20_000, 1, 0, bytes(2501))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        UnreadableImage, match="20,000 x 20,000 = 400,000,000 pixels, more than the limit of 200,000,000"
    ):
        decode(data)
    with pytest.raises(UnreadableImage, match="900000000 pixels"):
        decode(png(30_000, 30_000, 1, 0, bytes(3751)))


def test_the_limit_is_ours_and_pillows_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    assert decode(encoded(picture(0, (10, 10)))).size == (10, 10)
    with pytest.raises(UnreadableImage, match="11 x 10 = 110"):
        decode(encoded(picture(0, (11, 10))))
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow itself would refuse more than 20
    assert decode(encoded(picture(0, (30, 30)))).size == (30, 30)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.undo()
    assert before == Image.MAX_IMAGE_PIXELS
    assert warnings.filters[0][0] == "error", "the warning filters of the caller are as they were"


def test_one_pixel_high() -> None:
    assert decode(encoded(picture(0, (50, 1)))).size == (50, 1)


def test_reduced_decoding_keeps_twice_the_wanted_size() -> None:
    data = encoded(picture(0, (400, 300)))
    assert decode(data).size == (400, 300)
    assert decode(data, shortest=75).size == (200, 150)
    assert decode(data, shortest=76).size == (400, 300)
    assert decode(encoded(picture(0, (400, 300)), "PNG"), shortest=10).size == (400, 300)
