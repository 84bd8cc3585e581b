"""Centred kernel alignment: how alike two representations of the same images are, whatever their width and rotation.

Minibatch CKA with the unbiased estimator of HSIC (Nguyen, Raghu, Kornblith 2021, "Do Wide and Deep Networks Learn the
Same Things?", eq. 3 and 4), as MAE-lite's analyses use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimlet.errors import DataError

FEWEST = 4
"""The unbiased estimator divides by n (n - 3)."""


class MinibatchCKA:
    """Accumulates HSIC1 between all pairs of F features over minibatches: memory does not grow with the images.

    CKA(i, j) = mean_b HSIC1(K_i, K_j) / sqrt(mean_b HSIC1(K_i, K_i) mean_b HSIC1(K_j, K_j)), the means over minibatches
    first, the ratio last. Values can be slightly negative, or above 1 for tiny batches.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.batches = 0

    def update(self, grams: Sequence[Tensor]) -> None:
        """One minibatch: the `centred_gram` [n,n] of each of the F features."""
        hsic = hsic1(torch.stack(list(grams)))
        self.total = hsic if self.total is None else self.total + hsic
        self.batches += 1

    @property
    def hsic(self) -> Tensor:
        """mean_b HSIC1 [F,F]."""
        assert self.total is not None, "no minibatch yet"
        return self.total / self.batches

    def compute(self) -> Tensor:
        """CKA [F,F], float64. A feature that is the same for all images has no similarity with anything: NaN."""
        hsic = self.hsic
        scale = hsic.diagonal().clamp(min=0).sqrt()
        return hsic / (scale[:, None] * scale)


def centred_gram(features: Tensor) -> Tensor:
    """The matrix K = X X^T of features [n, ...], U-centred: [n,n] float64 with a zero diagonal.

    The mean is taken off X first. That changes K by a_i + a_j off the diagonal, which the centring removes anyway, and
    saves the digits that float32 would lose to it.
    """
    n = len(features)
    if n < FEWEST:
        raise DataError(f"CKA needs at least {FEWEST} images in a minibatch, got {n}; give more images")
    x = features.flatten(1).float()
    x = x - x.mean(dim=0)
    gram = (x @ x.T).double()
    gram.fill_diagonal_(0)
    rows = gram.sum(dim=1) / (n - 2)
    centred = gram - rows[:, None] - rows + rows.sum() / (n - 1)
    return centred.fill_diagonal_(0)


def hsic1(grams: Tensor) -> Tensor:
    """The unbiased HSIC [F,F] between U-centred matrices [F,n,n]: their inner products over n (n - 3).

    Equal to [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n(n-3)) of the matrices with zero diagonals
    (Song et al. 2012, eq. 5; Szekely and Rizzo 2014 for the centred form).
    """
    n = grams.shape[-1]
    flat = grams.flatten(1)
    return flat @ flat.T / (n * (n - 3))
