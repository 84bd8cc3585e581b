"""Pixels as targets: patches, their normalisation, and the masked error (MAE, He et al. 2022).

Letters: B images, N patches, M hidden patches, p patch side.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int, ids: Tensor | None = None) -> Tensor:
    """[B,3,h,w] -> [B,N,p*p*3] in raster order, inside a patch (row, column, channel). With `ids` [B,M] only those patches."""
    B, C, height, width = images.shape
    columns = width // patch
    tiles = images.view(B, C, height // patch, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    if ids is None:
        return tiles.flatten(3).flatten(1, 2)
    batch = torch.arange(B, device=images.device)[:, None]
    return tiles[batch, ids // columns, ids % columns].flatten(2)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse: [B,N,p*p*3] -> [B,3,h,w]."""
    B, _, length = patches.shape
    p = round((length // 3) ** 0.5)
    tiles = patches.view(B, *grid, p, p, 3).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(B, 3, grid[0] * p, grid[1] * p)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch minus its mean, over its standard deviation; unbiased variance, 1e-6 inside the root."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + 1e-6).rsqrt()


def denormalise_patches(prediction: Tensor, patches: Tensor) -> Tensor:
    """Brings a prediction of normalised patches back to pixels with the mean and deviation of the true patches (for pictures only)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return prediction * (variance + 1e-6).sqrt() + mean


def masked_pixel_loss(prediction: Tensor, images: Tensor, patch: int, ids_hidden: Tensor, normalise: bool) -> Tensor:
    """Mean squared error over hidden patches. `prediction` [B,M,p*p*3] in the order of `ids_hidden` [B,M]."""
    target = patchify(images, patch, ids_hidden)
    if normalise:
        target = normalise_patches(target)
    return (prediction.float() - target).square().mean()
