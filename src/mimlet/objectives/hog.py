"""Histograms of oriented gradients as targets: Wei et al., Masked Feature Prediction, CVPR 2022, section 3 and code.

Letters: B images, N patches, p patch side, c cell side in pixels, k = p / c cells along a patch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 2.0**36
"""A vote of 1 as a whole number: precise to 1e-11, and 10^8 of them still fit."""


def hog(images: Tensor, bins: int = 9, cell: int = 8, gaussian: int = 0) -> Tensor:
    """Histograms of every colour channel and cell, [B,3,h,w] -> float32 [B,3,bins,h/c,w/c], of length 1 over the bins
    (or 0 where nothing changes).

    Gradients are Sobel's, reflected at the border; a pixel votes with its magnitude for one of `bins` orientations of
    [0, pi), without interpolation; no gradient flows. `gaussian`: side of a window that is repeated over the image and
    weighs the votes; it divides the image.
    """
    x = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    dx, dy = rows[..., :-2] - rows[..., 2:], columns[..., :-2, :] - columns[..., 2:, :]
    B, C, height, width = dx.shape
    magnitude = torch.hypot(dx, dy)
    if gaussian:
        window = gaussian_window(gaussian).to(x.device)
        magnitude = magnitude * window.repeat(height // gaussian, width // gaussian)
    number = (torch.atan2(dx, dy) / math.pi * bins).floor().remainder(bins).long()
    down, along = height // cell, width // cell
    row, column = (torch.arange(n * cell, device=x.device) // cell for n in (down, along))
    place = (number * down + row[:, None]) * along + column
    # Votes are added as whole numbers: on a GPU their order changes from run to run, and so would rounding.
    counts = place.new_zeros(B, C, bins * down * along)
    counts.scatter_add_(2, place.flatten(2), (magnitude * WHOLE).long().flatten(2))
    votes = (counts.float() / WHOLE).view(B, C, bins, down, along)
    return votes / votes.square().sum(dim=2, keepdim=True).sqrt().clamp(min=1e-12)


def hog_patches(images: Tensor, patch: int, bins: int = 9, cell: int = 8, gaussian: int = 0) -> Tensor:
    """The histograms of each patch, [B,N,3*bins*k*k], in the order (channel, bin, cell row, cell column)."""
    return _by_patch(hog(images, bins, cell, gaussian).flatten(1, 2), patch // cell)


def gaussian_window(side: int) -> Tensor:
    """A Gaussian [side,side] of deviation side // 2 pixels around the middle, of sum 1."""
    x = torch.arange(side) - (side - 1) / 2
    line = torch.exp(-0.5 * (x / (side // 2)) ** 2)
    window = line[:, None] * line
    return window / window.sum()


def strokes(patches: Tensor, grid: tuple[int, int], bins: int, side: int) -> Tensor:
    """A drawing of histograms [B,N,3*bins*k*k], for the eye: in each cell of `side` pixels, for each orientation a line
    along the edge (across the gradient), as bright as the bin's square, of which a cell has 1 in all; colours apart.
    [B,3,rows*k*side,columns*k*side] in [0,1].
    """
    B = len(patches)
    k = math.isqrt(patches.shape[2] // (3 * bins))
    angle = (torch.arange(bins, device=patches.device) + 0.5) * math.pi / bins
    y, x = torch.meshgrid(*[torch.arange(side, device=patches.device) - (side - 1) / 2] * 2, indexing="ij")
    # The gradient of an orientation points along (sin, cos): its edge are the points with no part in that direction.
    across = (angle.sin()[:, None, None] * x + angle.cos()[:, None, None] * y).abs()
    lines = (1.2 - across).clamp(0, 1) * (torch.hypot(x, y) <= side / 2)
    cells = patches.float().clamp(0, 1).square().view(B, *grid, 3, bins, k, k).permute(4, 0, 3, 1, 5, 2, 6)
    drawn = [cell[..., None, :, :, None] * line[:, None, None] for cell, line in zip(cells, lines, strict=True)]
    return torch.stack(drawn).amax(dim=0).reshape(B, 3, grid[0] * k * side, grid[1] * k * side)


def _by_patch(cells: Tensor, k: int) -> Tensor:
    """[B,C,rows*k,columns*k] -> [B,rows*columns,C*k*k]."""
    B, C, rows, columns = cells.shape
    return cells.view(B, C, rows // k, k, columns // k, k).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
