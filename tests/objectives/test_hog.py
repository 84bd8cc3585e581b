import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mimlet.objectives.hog import gaussian_window, hog, hog_patches, strokes
from tests.shared import golden


@pytest.mark.parametrize("case", range(3))
def test_equals_official_layer(case: int) -> None:
    oracle = golden("hog")
    setting = oracle.meta["config"]["cases"][case]
    found = hog(oracle.io["images"], setting["nbins"], setting["pool"], setting["gaussian_window"])
    expected = oracle.io[f"hog_case{case}"]
    if setting["nbins"] % 2 == 0:
        # The rows at the upper and lower border have no vertical gradient. That lies on the edge of two bins if their
        # number is even; the official convolution's rounding then chooses one at random.
        found, expected = found[..., 1:-1, :], expected[..., 1:-1, :]
    assert_close(found, expected, **oracle.tolerance)


def test_patches_equal_official_order() -> None:
    oracle = golden("hog")
    assert_close(hog_patches(oracle.io["images"], 16), oracle.io["tokens_case0"], **oracle.tolerance)


def plain(images: Tensor, bins: int, cell: int) -> Tensor:
    """Pixel by pixel, in float64."""
    B, C, height, width = images.shape
    votes = torch.zeros(B, C, bins, height // cell, width // cell, dtype=torch.float64)

    def at(line: Tensor, y: int, x: int) -> float:
        return line[min(abs(y), 2 * height - 2 - y), min(abs(x), 2 * width - 2 - x)].item()

    for b in range(B):
        for c in range(C):
            for y in range(height):
                for x in range(width):
                    line, weights = images[b, c].double(), {-1: 1, 0: 2, 1: 1}
                    dx = sum(w * (at(line, y + i, x - 1) - at(line, y + i, x + 1)) for i, w in weights.items())
                    dy = sum(w * (at(line, y - 1, x + i) - at(line, y + 1, x + i)) for i, w in weights.items())
                    number = math.floor(math.atan2(dx, dy) / math.pi * bins) % bins
                    votes[b, c, number, y // cell, x // cell] += math.hypot(dx, dy)
    return votes / votes.square().sum(dim=2, keepdim=True).sqrt().clamp(min=1e-12)


@pytest.mark.parametrize(("bins", "cell"), [(9, 2), (8, 4)])
def test_equals_a_count_pixel_by_pixel(bins: int, cell: int) -> None:
    images = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert_close(hog(images, bins, cell).double(), plain(images, bins, cell), atol=1e-5, rtol=1e-5)


def test_flat_images_have_none_and_contrast_does_not_count() -> None:
    assert hog(torch.full((1, 3, 16, 16), 0.7)).abs().max() == 0
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_close(hog(images * 3 - 1), hog(images), atol=1e-4, rtol=0)
    assert_close(hog(images).square().sum(dim=2), torch.ones(2, 3, 2, 2))


def test_half_precision_is_left_outside() -> None:
    images = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hog(images), hog(images.float()))


def test_gaussian_window() -> None:
    window = gaussian_window(4)
    assert_close(window.sum(), torch.tensor(1.0))
    assert_close(window[0, 0] / window[1, 1], torch.tensor(math.exp(-0.5 * 2 * (1.5**2 - 0.5**2) / 2**2)))
    assert_close(window, window.T.flip(0))


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 4, 1.2, math.pi / 2, 2.0, 3.0])
def test_strokes_lie_along_the_edge(angle: float) -> None:
    """A soft edge through the middle of a cell, its line at `angle` to the columns: the brightest pixels are on it."""
    y, x = torch.meshgrid(*[torch.arange(32) - 15.5] * 2, indexing="ij")
    across = x * math.cos(angle) - y * math.sin(angle)
    image = torch.tanh(across / 4).expand(1, 3, 32, 32)
    patches = hog_patches(image, 32, bins=18, cell=32)
    drawn = strokes(patches, (1, 1), 18, 33)[0, 0]
    y, x = torch.meshgrid(*[torch.arange(33) - 16.0] * 2, indexing="ij")
    across, along = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    spread = (drawn * across.square()).sum() / (drawn * along.square()).sum()
    assert spread < 0.1


def test_strokes_fill_the_grid_in_raster_order() -> None:
    patches = torch.zeros(1, 6, 3 * 9 * 4)
    patches.view(1, 6, 3, 9, 2, 2)[0, 4, 1, 4, 0, 1] = 1  # patch (1, 1) of 2 x 3, green, upper right cell
    drawn = strokes(patches, (2, 3), 9, 8)
    assert drawn.shape == (1, 3, 32, 48)
    where = drawn[0, 1].nonzero()
    assert where.min(dim=0).values.tolist()[0] >= 16
    assert where.max(dim=0).values.tolist()[0] < 24
    assert where.min(dim=0).values.tolist()[1] >= 24
    assert where.max(dim=0).values.tolist()[1] < 32
    assert drawn[0, 0].max() == drawn[0, 2].max() == 0
