"""The picture of all masks says what it shows."""

import numpy as np
import pytest

from benchmarks.masks import HIDDEN, digit, picture, rows, scene


def test_labels_count_what_is_hidden() -> None:
    lines = rows(scene(), 0)
    assert list(lines)[1:6] == [
        "MAE\nrandom, 147",
        "SimMIM\nsquares, 120",
        "BEiT\nblocks, 75",
        "MaskFeat\nblocks, 78",
        "BootMAE\nblocks, exact, 147",
    ]
    gone = {name: (np.asarray(image) == HIDDEN).all(-1).mean() for name, image in lines.items()}
    assert gone.pop("image") == 0
    for name, share in gone.items():
        count = int(name.rpartition(" ")[2]) if name[-1].isdigit() else 98
        assert share == pytest.approx(count / 196)


def test_two_views_show_each_patch_once() -> None:
    lines = rows(digit(), 1)
    first, second = (
        (np.asarray(lines[f"MIM-HD\n{half}"]) == HIDDEN).all(-1) for half in ("first half", "the other half")
    )
    assert np.array_equal(first, ~second)


def test_all_rows_stand_below_each_other() -> None:
    assert picture().size == (8 * 120 + 8, 40 + 2 * 120)
