"""How far and how evenly each head attends to patches (Raghu et al. 2021; Xie et al. 2023; MAE-lite, Fig. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

UPSTREAM_PATCH = 14
"""MAE-lite's code gives distances in patches times 14; the pitch of its patches is 16 px."""


def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Euclidean distances [N,N] between the patches of a grid (rows, columns), in patches."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).double()
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def attention_statistics(
    logits: Tensor, grid: tuple[int, int], prefix: int, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean attention distance (in patches) and entropy (in nats) of each image and head, two of [B,H], float64.

    `logits` [B,H,P+N,P+N], pre-softmax, of the patches of a grid in raster order, or in an `order` that says which of
    them is at each place (`Encoder.layout`). Prefix rows and columns are left out before the softmax over keys, so that
    attention weights p are over patches and sum to 1. Distance of a query: sum_k p_k |query - k|; entropy:
    -sum_k p_k ln(p_k + 1e-6), at most ln N; both are averaged over queries.
    """
    p = logits[..., prefix:, prefix:].float().softmax(dim=-1)
    queries = p.shape[-1]
    apart = patch_distances(grid)
    if order is not None:
        places = order.argsort()
        apart = apart[places[:, None], places]
    distance = p.flatten(2) @ apart.to(p).flatten() / queries
    entropy = -(p * (p + 1e-6).log()).sum(dim=(-2, -1)) / queries
    return distance.double(), entropy.double()
