"""Exact small heat maps, boxes and bars."""

import json
import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from mimlet.report.diagrams import Bars, Boxes, bars_svg, boxes_svg, heatmap_svg


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def of_class(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in svg.iter() if name in element.attrib.get("class", "").split()]


def heat(values: list[list[float]], **more: object) -> ElementTree.Element:
    options: dict[str, object] = {"title": "CKA", "x_label": "b, layer", "y_label": "a, layer", **more}
    rows, columns = ([str(index) for index in range(len(part))] for part in (values, values[0]))
    return drawn(heatmap_svg(values, rows=rows, columns=columns, **options))  # type: ignore[arg-type]


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_first_layers_are_at_the_bottom_left() -> None:
    svg = heat([[0.0, 0.25, 0.5], [0.6, 0.75, 1.0]])
    cells = {cell.attrib["data-tip"]: cell.attrib for cell in of_class(svg, "cell")}
    assert len(cells) == 6
    first, last = cells["a, layer 0 · b, layer 0: 0"], cells["a, layer 1 · b, layer 2: 1"]
    assert float(first["x"]) < float(last["x"])
    assert float(first["y"]) > float(last["y"])
    assert float(last["x"]) + float(last["width"]) == pytest.approx(302, abs=0.1)
    assert [text.text for text in of_class(svg, "inside")] == ["0.00", "0.25", "0.50", "0.60", "0.75", "1.00"]
    assert svg.attrib["aria-label"] == (
        "CKA: 2 by 3 values; lowest 0 at a, layer 0 · b, layer 0; highest 1 at a, layer 1 · b, layer 2."
    )


def test_lightness_grows_with_the_value_and_text_on_it_is_legible() -> None:
    """WCAG's contrast of text: 4.5."""
    svg = heat([[step / 9 for step in range(10)]] * 2, y_label="")
    for cell, text in zip(of_class(svg, "cell"), of_class(svg, "inside"), strict=True):
        light = luminance(cell.attrib["fill"])
        contrast = (light + 0.05) / 0.05 if "black" in text.attrib["class"] else 1.05 / (light + 0.05)
        assert contrast > 4.5
    shades = [luminance(cell.attrib["fill"]) for cell in of_class(svg, "cell")[:10]]
    assert all(before < after for before, after in pairwise(shades))
    bar = [luminance(shade.attrib["fill"]) for shade in of_class(svg, "shade")]
    assert all(before < after for before, after in pairwise(bar))


def test_what_lies_outside_is_told_as_it_is_and_has_the_colour_of_the_limit() -> None:
    svg = heat([[-0.5, 0.0, 1.0, 1.25, math.nan]])
    cells = of_class(svg, "cell")
    fills = [cell.attrib["fill"] for cell in cells]
    assert fills[0] == fills[1] != fills[2] == fills[3]
    assert fills[4] == "none"
    told = [cell.attrib["data-tip"].rpartition(": ")[2] for cell in cells]
    assert told == ["-0.5", "0", "1", "1.25", "not finite"]
    assert svg.attrib["aria-label"].startswith("CKA: 1 by 5 values; lowest -0.5 at")


def test_many_layers_have_no_numbers_and_few_ticks() -> None:
    svg = heat(np.eye(25).tolist())
    assert not of_class(svg, "inside")
    ticks = [element.text for element in of_class(svg, "mid") if element.text and element.text.isdigit()]
    assert ticks == [str(layer) for layer in range(0, 25, 2)]
    assert len(of_class(svg, "cell")) == 625
    assert len(ElementTree.tostring(svg)) < 100_000


def test_a_colour_bar_shows_the_limits() -> None:
    svg = heat([[10.0, 20.0]], low=0, high=100, unit="%")
    texts = [element.text for element in of_class(svg, "tick")]
    assert texts[-6:] == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_a_box_is_tukey_s() -> None:
    """1 to 9 and 30: quartiles 3.25 and 7.75, so whiskers end at 1 and 9."""
    svg = drawn(boxes_svg([Boxes("a", [[*range(1, 10), 30]])], title="distance"))
    lowest, highest = 210 - 200 * 0 / 30, 210 - 200 * 30 / 30  # the axis goes from 0 to 30

    def down(value: float) -> float:
        return lowest + (highest - lowest) * value / 30

    (box,) = of_class(svg, "box")
    assert float(box.attrib["y"]) == pytest.approx(down(7.75), abs=0.05)
    assert float(box.attrib["height"]) == pytest.approx(down(3.25) - down(7.75), abs=0.05)
    (whisker,) = of_class(svg, "whisker")
    assert [float(end) for end in re.findall(r"[ V]([\d.]+)", whisker.attrib["d"])] == pytest.approx(
        [down(1), down(3.25), down(7.75), down(9)], abs=0.051
    )
    (beyond,) = of_class(svg, "beyond")
    assert float(beyond.attrib["cy"]) == down(30)
    (line,) = svg.iter("polyline")
    assert line.attrib["data-xs"] == "1"
    assert line.attrib["data-ys"].split(" ") == ["5.5\u00a0(1\u00a0to\u00a09,\u00a01\u00a0beyond)"]


def test_models_stand_side_by_side_whatever_their_depth() -> None:
    groups = [Boxes("deep", [[1.0, 2.0, 3.0]] * 4, 0), Boxes("flat", [[2.0, math.nan, 4.0], [math.nan] * 3], 1)]
    svg = drawn(boxes_svg(groups, title="entropy", unit=" nats", references={"uniform attention": 5.0}))
    places = [(box.attrib["class"], float(box.attrib["x"])) for box in of_class(svg, "box")]
    assert [kind for kind, _ in places] == ["box s0"] * 4 + ["box s1"]
    width = float(of_class(svg, "box")[0].attrib["width"])
    assert places[0][1] + width < places[4][1] < places[4][1] + width < places[1][1]
    deep, flat = svg.iter("polyline")
    assert deep.attrib["data-xs"] == "1 2 3 4"
    assert flat.attrib["data-xs"] == "1"
    assert flat.attrib["stroke-dasharray"] == "7 3"
    assert svg.attrib["aria-label"] == (
        "entropy, over heads by block: deep has the median 2 nats in block 1, 2 nats in block 4; "
        "flat has the median 3 nats in block 1, 3 nats in block 1; uniform attention is 5 nats."
    )
    assert "uniform attention: 5 nats" in [text.text for text in svg.iter("text")]


def test_bars_are_as_long_as_their_values() -> None:
    runs = [
        Bars("mae", {"clean": 50.0, "a": 10.0}, {"a": 40.0}),
        Bars("d2mae", {"clean": 100.0, "a": 20.0, "own & <b>": 5.0}, style=1),
    ]
    svg = drawn(bars_svg(runs, title="top-1", marker="clean", unit="%"))
    bars = of_class(svg, "bar")
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == pytest.approx([share * widths[1] for share in (0.5, 1, 0.1, 0.2, 0.05)], abs=0.1)
    assert [bar.attrib["class"] for bar in bars] == ["bar s0", "bar s1", "bar s0", "bar s1", "bar s1"]
    (marker,) = of_class(svg, "marker")
    left = float(bars[0].attrib["x"])
    (at,) = re.findall(r"M([\d.]+) ", marker.attrib["d"])
    assert float(at) == pytest.approx(left + 0.4 * widths[1], abs=0.1)
    spots = of_class(svg, "spot")
    assert [spot.attrib["data-tip"] for spot in spots] == ["clean", "a", "own & <b>"]
    assert json.loads(spots[1].attrib["data-rows"]) == [["s0", "mae", "10% (clean 40%)"], ["s1", "d2mae", "20%"]]
    assert json.loads(spots[2].attrib["data-rows"]) == [["s1", "d2mae", "5%"]]
    assert svg.attrib["aria-label"] == (
        "top-1. clean: mae 50%, d2mae 100%; a: mae 10% (clean 40%), d2mae 20%; own & <b>: d2mae 5%."
    )


@pytest.mark.parametrize(("value", "marker", "after"), [(10, 90, False), (60, 62, True), (62, 60, False)])
def test_a_value_stands_where_no_marker_is(value: float, marker: float, after: bool) -> None:
    svg = drawn(bars_svg([Bars("a", {"x": value}, {"x": marker})], title="t", marker="clean", high=100))
    (text,) = of_class(svg, "value")
    (at,) = re.findall(r"M([\d.]+) ", of_class(svg, "marker")[0].attrib["d"])
    start, end = float(text.attrib["x"]), float(text.attrib["x"]) + 13
    assert start > float(at) + 2 or end < float(at) - 2
    assert (start > float(at)) == (after or value > marker)
