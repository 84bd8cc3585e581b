import io
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, ImageSequence

from mimlet.data import decode as module
from mimlet.data.decode import Decoder, Photo, UnreadableImage, check_decoder, decode
from mimlet.data.pixels import Box, as_pillow
from mimlet.errors import ConfigError
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


def test_arrays_are_not_copied_even_where_they_cannot_be_written() -> None:
    values = np.frombuffer(bytes(range(24)), np.uint8).reshape(2, 4, 3)
    given = decode(values)
    assert isinstance(given, torch.Tensor)
    assert (given.shape, given.stride(), given.data_ptr()) == ((3, 2, 4), (1, 12, 3), values.ctypes.data)
    photo = Photo(values)
    part = photo.cut(Box(1, 2, 1, 2))
    assert photo.size == (4, 2)
    assert part.permute(1, 2, 0).tolist() == [[[18, 19, 20], [21, 22, 23]]]
    part.zero_()  # its own memory
    assert np.array_equal(pixels(as_pillow(decode(values[:, ::-1]))), values[:, ::-1])


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 5), np.uint8), r"an array \[4, 5\] of uint8, not \[height,width,3\] of uint8"),
        (np.zeros((4, 5, 3), np.float32), "of float32"),
        (np.zeros((4, 5, 4), np.uint8), r"\[4, 5, 4\]"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\]"),
    ],
)
def test_other_arrays_are_unreadable(array: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(array)


@pytest.mark.parametrize("decoder", ["torchvision", "torchcodec"])
def test_other_decoders_give_pillows_pixels(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoder == "torchcodec":
        pytest.importorskip("torchcodec")
    plain, grey = encoded(picture(0), quality=95), encoded(picture(1).convert("L"))
    for data in (plain, grey, encoded(picture(2, (31, 7)), progressive=True, subsampling=0)):
        given = decode(data, decoder)
        assert isinstance(given, torch.Tensor)
        assert np.array_equal(pixels(as_pillow(given)), pixels(decode(data)))
        assert given.permute(1, 2, 0).is_contiguous()
    exif = Image.Exif()
    exif[0x0112] = 5
    cmyk, png_file = encoded(picture(1).convert("CMYK")), encoded(picture(0), "PNG")
    for data in (encoded(picture(0), exif=exif), cmyk, png_file):  # left to Pillow
        assert np.array_equal(pixels(decode(data, decoder)), pixels(decode(data)))
    for data, reason in ((plain[:-200], "truncated"), (b"", "the file is empty"), (plain[:20], ".+")):
        with pytest.raises(UnreadableImage, match=reason):
            decode(data, decoder)
    monkeypatch.setattr(module, "MAX_PIXELS", 300)
    monkeypatch.setattr(module, "_jpeg_reader", lambda decoder: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="24 x 18 = 432 pixels, more than the limit of 300"):
        decode(plain, decoder)


def test_a_decoder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_decoder("pillow")
    check_decoder("torchvision")
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"data.decoder=torchcodec cannot be loaded \(.*; pip install torchcodec, or"):
        check_decoder("torchcodec")
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    with pytest.raises(ConfigError, match=r"data.decoder=torchvision cannot be loaded .*decode_jpeg"):
        check_decoder("torchvision")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation: int) -> None:
    image, exif = picture(4, (16, 8)), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, quality=95, exif=exif)
    photo = Photo(data)
    given = photo.pixels()
    assert isinstance(given, Image.Image)
    assert given.size == photo.size == ((16, 8) if orientation < 5 else (8, 16))
    assert np.array_equal(pixels(given), pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_a_jpeg_is_decoded_when_its_pixels_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(0, (400, 300)))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        photo = Photo(data)
        assert photo.size == (400, 300)
    assert photo.pixels() is photo.pixels()
    broken = Photo(data[:-300])
    with pytest.raises(UnreadableImage, match="truncated"):
        broken.cut(Box(0, 0, 10, 10))


@pytest.mark.parametrize(("side", "wanted", "shape"), [(161, 20, (41, 41)), (159, 20, (80, 79)), (79, 20, (80, 79))])
def test_a_reduced_crop_keeps_twice_the_wanted_size(side: int, wanted: int, shape: tuple[int, int]) -> None:
    """A box of side + 1 x side: of 162 x 161 a quarter is left, of 160 x 159 a half, of 80 x 79 all."""
    photo = Photo(encoded(picture(0, (403, 301))))
    box = Box(50, 101, side + 1, side)
    part = photo.cut(box, photo.reduction(box, wanted))
    assert part.shape == (3, *shape)
    assert min(part.shape[1:]) >= min(2 * wanted, side)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_reduced_crop_is_the_same_part_of_the_image(orientation: int) -> None:
    """Colours tell places; edges are rounded to half a pixel of the smaller image."""
    across, down = np.meshgrid(np.linspace(0, 255, 403), np.linspace(0, 255, 301))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.stack([across, down, across], axis=2).round().astype(np.uint8))
    photo = Photo(encoded(image, quality=95, subsampling=0, exif=exif))
    for box in (Box(40, 52, 160, 168), Box(1, 3, 201, 202), Box(0, 0, photo.size[1], photo.size[0])):
        full = photo.cut(box).double()
        for wanted, reduction in ((40, 2), (20, 4), (10, 8)):
            assert photo.reduction(box, wanted) == reduction
            reduced = photo.cut(box, reduction).double()
            assert abs(reduced.shape[1] - box.height / reduction) <= 1
            assert abs(reduced.shape[2] - box.width / reduction) <= 1
            for edge in (0, -1):
                for dim in (1, 2):
                    place = reduced.select(dim, edge).mean(1) - full.select(dim, edge).mean(1)
                    assert place.abs().max() < 0.86 * reduction + 1


def test_only_jpeg_is_reduced() -> None:
    for data in (encoded(picture(0, (400, 300)), "PNG"), np.asarray(picture(0, (400, 300)))):
        assert Photo(data).reduction(Box(0, 0, 300, 400), 20) == 1
