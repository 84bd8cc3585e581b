"""Pixels as targets: patches, their normalisation, and the masked error (MAE, He et al. 2022).

Letters: B images, N patches, M hidden patches, p patch side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimlet.models.parts import take_patches


def patchify(images: Tensor, patch: int, ids: Tensor | None = None) -> Tensor:
    """[B,3,h,w] -> [B,N,p*p*3] in raster order, inside a patch (row, column, channel). With `ids` [B,M] only those
    patches.
    """
    B, C, height, width = images.shape
    lines = images.permute(0, 2, 3, 1).reshape(B, 1, height, width // patch, patch * C)
    if ids is not None:
        return take_patches(lines, patch, ids)
    return lines.view(B, height // patch, patch, -1, patch * C).transpose(2, 3).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse: [B,N,p*p*3] -> [B,3,h,w]."""
    B, _, length = patches.shape
    p = round((length // 3) ** 0.5)
    tiles = patches.view(B, *grid, p, p, 3).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(B, 3, grid[0] * p, grid[1] * p)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch minus its mean, over its standard deviation; unbiased variance, 1e-6 inside the root."""
    n = patches.shape[-1]
    # layer_norm divides by the biased deviation; the factor and the scaled epsilon make it the unbiased one.
    factor = (n - 1) / n
    return F.layer_norm(patches, (n,), weight=patches.new_full((n,), factor**0.5), eps=1e-6 * factor)


def denormalise_patches(prediction: Tensor, patches: Tensor) -> Tensor:
    """Brings a prediction of normalised patches back to pixels with the mean and deviation of the true patches (for
    pictures only).
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return prediction * (variance + 1e-6).sqrt() + mean


def masked_pixel_loss(prediction: Tensor, images: Tensor, patch: int, ids_hidden: Tensor, normalise: bool) -> Tensor:
    """Mean squared error over hidden patches. `prediction` [B,M,p*p*3] in the order of `ids_hidden` [B,M]."""

    def target(images: Tensor, ids: Tensor) -> Tensor:
        patches = patchify(images, patch, ids)
        return normalise_patches(patches) if normalise else patches

    if prediction.device.type == "cpu" and not torch.compiler.is_compiling():
        loss: Tensor = _MeanSquare.apply(prediction, images, ids_hidden, target)  # type: ignore[no-untyped-call]
        return loss
    return F.mse_loss(prediction.float(), target(images, ids_hidden))


class _MeanSquare(torch.autograd.Function):
    """Mean squared error against targets that are made, compared and forgotten for a few images at a time, while they
    are in a CPU's caches: whole, they and their errors are the largest tensors of a small model's step.
    """

    IMAGES = 4

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, images: Tensor, ids: Tensor, target: Callable[..., Tensor]) -> Tensor:
        ctx.gradient = torch.empty_like(prediction) if ctx.needs_input_grad[0] else None
        given = prediction if ctx.gradient is None else ctx.gradient
        sums = []
        for part, pixels, some, gradient in zip(
            *(x.split(_MeanSquare.IMAGES) for x in (prediction, images, ids, given)), strict=True
        ):
            error = part - target(pixels, some)
            sums.append(torch.linalg.vector_norm(error, dim=-1).square_().sum())
            if ctx.gradient is not None:
                torch.mul(error, 2 / prediction.numel(), out=gradient)
        return torch.stack(sums).sum() / prediction.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient if gradient == 1 else ctx.gradient * gradient, None, None, None


def masked_absolute_loss(prediction: Tensor, images: Tensor, patch: int, ids_hidden: Tensor) -> Tensor:
    """Absolute error of raw pixels over hidden patches, with the denominator of SimMIM's code: sum over 3 (pixels +
    1e-5). `prediction` [B,M,p*p*3] in the order of `ids_hidden` [B,M].
    """
    error = F.l1_loss(prediction.float(), patchify(images, patch, ids_hidden), reduction="sum")
    return error / (prediction.numel() / 3 + 1e-5) / 3


def normalise_channels(patches: Tensor) -> Tensor:
    """Each patch and each of its colour channels by itself, minus the mean, over the standard deviation; biased
    variance, 1e-5 inside the root (BootMAE's code; its paper does not say). [...,p*p*3] -> the same.
    """
    pixels, mean, deviation = _channels(patches)
    return ((pixels - mean) / deviation).flatten(-2)


def denormalise_channels(prediction: Tensor, patches: Tensor) -> Tensor:
    """The inverse of `normalise_channels`, with the statistics of the true patches (for pictures only)."""
    _, mean, deviation = _channels(patches)
    return (prediction.view(*prediction.shape[:-1], -1, 3) * deviation + mean).flatten(-2)


def _channels(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [...,p*p,3] of patches [...,p*p*3], and the mean and deviation [...,1,3] of each channel."""
    pixels = patches.view(*patches.shape[:-1], -1, 3)
    variance, mean = torch.var_mean(pixels, dim=-2, correction=0, keepdim=True)
    return pixels, mean, (variance + 1e-5).sqrt()


def inside_weights(hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weights [B,N] of a mask [B,N] over a grid (rows, columns): 0 of visible patches; of hidden ones 1 and the share
    of hidden patches in the square of nine around it, where everything beyond the edge is visible (BootMAE's code).
    """
    squares = hidden.float().view(len(hidden), 1, *grid)
    return (squares * (1 + F.avg_pool2d(squares, 3, stride=1, padding=1))).flatten(1)


def weighted_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared error of M patches each, [B,M,...], mean over their numbers, times their weights [B,M], mean over
    patches: a scalar.
    """
    error = (prediction.float() - target).square().mean(dim=-1)
    return (error if weights is None else weights * error).mean()
