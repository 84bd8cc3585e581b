"""Exact small pictures and curves."""

import io
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from mimlet.report.axes import number, short, ticks
from mimlet.report.figures import (
    Curve,
    Picture,
    averaged,
    curves_svg,
    film,
    image_grid,
    image_strip,
    overlay,
    overlays,
    shares_svg,
    thin,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.2, 0.1)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """[B,H,W,3] uint8 -> normalised [B,3,H,W]."""
    return torch.tensor((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def test_a_grid_shows_every_pixel_of_small_images_unsmoothed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 28, 28, 3), dtype=np.uint8)
    original, visible, prediction = (normalised(part) for part in pixels)
    rows = {"original": original, "visible": visible.numpy(), "reconstruction": prediction}
    grid = opened(image_grid(rows, mean=MEAN, std=STD, columns=2))
    cell, line = 112, 24 + 112 + 8
    assert grid.shape == (2 * 3 * line, 2 * cell + 4, 4)
    for image in range(3):
        for row in range(3):
            top, left = (3 * (image // 2) + row) * line + 24, image % 2 * (cell + 4)
            shown = grid[top : top + cell, left : left + cell]
            np.testing.assert_array_equal(shown[..., :3], pixels[row, image].repeat(4, 0).repeat(4, 1))
            assert (shown[..., 3] == 255).all()


def test_a_grid_labels_its_rows_on_transparent_ground() -> None:
    images = torch.zeros(1, 3, 8, 8)
    grid = opened(image_grid(dict.fromkeys("abc", images), mean=MEAN, std=STD))
    for top in (0, 144, 288):
        label = grid[top : top + 24]
        assert 0 < (label[..., 3] > 0).sum() < label[..., 3].size / 2


def test_a_grid_reduces_large_images_and_clips_what_is_no_colour() -> None:
    images = torch.full((1, 3, 256, 128), 100.0)
    images[:, 2] = float("nan")
    picture = Picture("", image_grid({"a": images, "b": -images, "c": images}, mean=MEAN, std=STD), "")
    assert picture.size == (64, 3 * (24 + 128 + 8))
    grid = opened(picture.png_bytes)
    assert grid[100, 30].tolist() == [255, 255, 0, 255]
    assert grid[260, 30].tolist() == [0, 0, 0, 255]


def test_a_strip_keeps_small_images_and_reduces_large_ones() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    strip = opened(image_strip(normalised(pixels), mean=MEAN, std=STD))
    np.testing.assert_array_equal(strip[..., :3], np.concatenate(list(pixels), axis=1))
    noise = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    png = image_strip(noise, mean=MEAN, std=STD)
    assert Picture("", png, "").size == (8 * 112, 112)
    assert len(png) < 8 * 38_000, "noise is the worst that can come"


def test_an_overlay_is_grey_where_nothing_is_and_yellow_at_the_most() -> None:
    plain = np.full((4, 4, 3), 100, dtype=np.uint8)
    shown = overlay(plain, torch.tensor([[0.0, 0.1], [0.05, 0.2]]))
    assert (shown[:2, :2] == 80).all()
    brightest = shown[2:, 2:].reshape(-1, 3)
    assert (brightest == brightest[0]).all()
    assert brightest[0, 0] > brightest[0, 2]
    assert (overlay(plain, torch.zeros(2, 2)) == 80).all(), "the class token may keep all for itself"


def test_overlays_are_images_again() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    maps = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0))
    strip = opened(image_strip(overlays(normalised(pixels), maps, mean=MEAN, std=STD), mean=MEAN, std=STD))
    expected = [overlay(image, each) for image, each in zip(pixels, maps, strict=True)]
    np.testing.assert_array_equal(strip[..., :3], np.concatenate(expected, axis=1))


def test_a_film_shows_labelled_strips_below_each_other() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 28, 28, 3), dtype=np.uint8)
    strips = [image_strip(normalised(images), mean=MEAN, std=STD) for images in pixels]
    shown = opened(film({"original": strips[0], "step 1,234": strips[1]}))
    cell = 112
    assert shown.shape[0] == 2 * cell + 4
    margin = shown.shape[1] - (3 * cell + 2 * 4)
    for row in range(2):
        for column in range(3):
            left = margin + column * (cell + 4)
            found = shown[row * (cell + 4) :, left:][:cell, :cell]
            np.testing.assert_array_equal(found[..., :3], pixels[row, column].repeat(4, 0).repeat(4, 1))
            assert (found[..., 3] == 255).all()
        label = shown[row * (cell + 4) :, : margin - 4][:cell]
        assert 0 < (label[..., 3] > 0).sum() < label[..., 3].size / 4
        assert not label[:, -1, 3].any(), "the widest label is whole"


def test_thinning_keeps_ends_and_spikes() -> None:
    x = np.arange(20_000.0)
    y = np.sin(x / 1000)
    y[7_777], y[12_345], y[5] = 40.0, -40.0, np.nan
    kept_x, kept_y = thin(x, y, 500)
    assert 400 < len(kept_x) <= 500
    assert kept_x[0] == 0
    assert kept_x[-1] == 19_999
    assert (np.diff(kept_x) > 0).all()
    assert kept_y[kept_x == 7_777] == 40
    assert kept_y[kept_x == 12_345] == -40
    assert np.isfinite(kept_y).all()
    np.testing.assert_array_equal(y[kept_x.astype(int)], kept_y)


def test_thinning_leaves_short_curves_alone() -> None:
    x, y = thin([1, 2, 3], [4.0, float("inf"), 6.0])
    assert x.tolist() == [1, 3]
    assert y.tolist() == [4, 6]


def test_averages_of_stretches() -> None:
    curve = averaged(Curve("a", range(10, 15), [1.0, 3.0, 5.0, 7.0, 9.0]), limit=2)
    assert curve.x == [11, 14]
    assert curve.y == [2.0, 7.0]
    assert averaged(Curve("a", [3], [0.5])).y == [0.5]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.43, 1.02, [0.4, 0.6, 0.8, 1.0, 1.2]),
        (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
        (7.0, 7.0, [2, 4, 6, 8, 10, 12]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, -3, [-5, -4, -3, -2, -1]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(expected, abs=1e-12)


def test_numbers_as_people_write_them() -> None:
    written = [number(value) for value in (0, 0.61234, 71.25, 12345.6, 1.5e-4, -0.00012344, 2.5e9)]
    assert written == ["0", "0.6123", "71.25", "12,346", "1.5e-4", "-1.234e-4", "2.5e9"]
    assert [short(value) for value in (0, 500, 12_500, 1.5e6, 5e-5, 1.1085)] == [
        "0",
        "500",
        "12.5k",
        "1.5M",
        "5e-5",
        "1.1085",
    ]


def test_ticks_of_short_and_flat_curves() -> None:
    svg = ElementTree.fromstring(curves_svg([Curve("a", [1, 2, 3], [1.1086, 1.1096, 1.1104])], title="loss"))
    texts = [text.text for text in svg.iter("text")]
    assert texts == ["1.1085", "1.109", "1.1095", "1.11", "1.1105", "1", "2", "3", "step", "1.11"]


def test_a_curve_is_drawn_where_its_values_are() -> None:
    curve = Curve("run & <b>", [0, 50, 100, 200], [0.0, 1.0, float("nan"), 0.5], style=1)
    svg = ElementTree.fromstring(curves_svg([curve], title="loss"))
    (line,) = svg.iter("polyline")
    assert line.attrib["points"] == "50.0,210.0 138.5,10.0 404.0,110.0"
    assert line.attrib["data-xs"] == "0 50 200"
    assert line.attrib["data-ys"] == "0 1 0.5"
    assert line.attrib["data-label"] == "run & <b>"
    assert line.attrib["class"] == "line s1"
    assert svg.attrib["aria-label"] == "loss by step: run & <b> ends at 0.5."
    assert [(dot.attrib["cx"], dot.attrib["cy"]) for dot in svg.iter("circle")] == [
        ("50.0", "210.0"),
        ("138.5", "10.0"),
        ("404.0", "110.0"),
    ]
    texts = [text.text for text in svg.iter("text")]
    assert texts == ["0", "0.2", "0.4", "0.6", "0.8", "1", "0", "50", "100", "150", "200", "step", "0.5"]


def test_a_wide_span_gets_a_logarithmic_axis_where_allowed() -> None:
    curve = Curve("a", [0, 1, 2], [100.0, 1.0, 0.01])
    svg = ElementTree.fromstring(curves_svg([curve], title="loss", log=True))
    assert next(svg.iter("polyline")).attrib["points"] == "50.0,10.0 227.0,110.0 404.0,210.0"
    assert "log scale" in [text.text for text in svg.iter("text")]
    flat = ElementTree.fromstring(curves_svg([curve], title="loss"))
    assert next(flat.iter("polyline")).attrib["points"].startswith("50.0,10.0 227.0,208.0")
    with_zero = Curve("a", [0, 1], [100.0, 0.0])
    assert "log scale" not in curves_svg([with_zero], title="loss", log=True)


def test_last_values_do_not_overlap_and_styles_stay_apart() -> None:
    curves = [Curve(str(index), [0, 1], [1.0, 0.5 + index / 1000], style=index) for index in range(6)]
    svg = ElementTree.fromstring(curves_svg(curves, title="loss"))
    places = sorted(float(text.attrib["y"]) for text in svg.iter("text") if "value" in text.attrib["class"])
    assert len(places) == 6
    assert all(after - before >= 12.9 for before, after in pairwise(places))
    assert places[-1] <= 210
    thirty = ElementTree.fromstring(curves_svg([Curve("a", [0], [1.0], style) for style in range(30)], title="loss"))
    styles = {(line.attrib["class"], line.attrib["stroke-dasharray"]) for line in thirty.iter("polyline")}
    assert len(styles) == 30


def test_a_reference_is_drawn_across_and_within_the_axis() -> None:
    curve = Curve("a", [0, 100], [1.0, 0.5])
    svg = ElementTree.fromstring(curves_svg([curve], title="entropy", from_zero=True, references={"all alike": 2.0}))
    (line,) = (path for path in svg.iter("path") if path.attrib["class"] == "reference")
    assert line.attrib["d"] == "M50 10.0H404"
    assert next(svg.iter("polyline")).attrib["points"] == "50.0,110.0 404.0,160.0"
    assert "all alike: 2" in [text.text for text in svg.iter("text")]
    assert svg.attrib["aria-label"] == "entropy by step: a ends at 0.5; all alike is 2."


def test_shares_fill_the_whole_from_the_top() -> None:
    shares = [Curve("1", [0, 100], [0.25, 0.5]), Curve("2", [0, 100], [0.75, 0.5])]
    svg = ElementTree.fromstring(shares_svg(shares, title="share of heads", part="head"))
    first, second = (path.attrib["d"] for path in svg.iter("path") if path.attrib["class"].startswith("band"))
    assert first == "M50.0 10.0 L404.0 10.0 L404.0 110.0 L50.0 60.0Z"
    assert second == "M50.0 60.0 L404.0 110.0 L404.0 210.0 L50.0 210.0Z"
    upper, lower = svg.iter("polyline")
    assert (upper.attrib["points"], lower.attrib["points"]) == ("50.0,35.0 404.0,60.0", "50.0,135.0 404.0,160.0")
    assert (upper.attrib["data-label"], upper.attrib["data-ys"], lower.attrib["data-ys"]) == (
        "head 1",
        "25 50",
        "75 50",
    )
    assert svg.attrib["aria-label"] == "share of heads by step: at the end head 1: 50%, head 2: 50%."


def test_the_largest_shares_have_colours_and_words() -> None:
    last = [0.05, 0.3, 0.02, 0.2, 0.15, 0.03, 0.1, 0.15]
    shares = [Curve(str(number), [0, 1], [1 / 8, share]) for number, share in enumerate(last, 1)]
    svg = ElementTree.fromstring(shares_svg(shares, title="share of heads", part="head"))
    bands = [path.attrib["class"] for path in svg.iter("path") if path.attrib["class"].startswith("band")]
    assert [band.removeprefix("band ") for band in bands] == ["rest", "s0", "rest", "s1", "s2", "rest", "s4", "s3"]
    written = [(text.attrib["class"], text.text) for text in svg.iter("text") if "value" in text.attrib["class"]]
    assert written == [
        ("value s0", "2: 30%"),
        ("value s1", "4: 20%"),
        ("value s2", "5: 15%"),
        ("value s4", "7: 10%"),
        ("value s3", "8: 15%"),
    ]
    assert svg.attrib["aria-label"].endswith("head 8: 15%, head 7: 10%, 3 others 10%.")
