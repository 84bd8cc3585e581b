"""Contrast between views: InfoNCE as in MoCo v3 (Chen et al., An Empirical Study of Training Self-Supervised Vision
Transformers, ICCV 2021, equation 1 and algorithm 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimlet.objectives.relations import exactly


def info_nce(queries: Tensor, keys: Tensor, temperature: float, first: int = 0) -> Tensor:
    """2 tau * mean over i of -log softmax_j(q_i k_j / tau) at j = first + i, of L2-normalised q and k; in float32 even
    under autocast (float64 stays).

    `queries` [n,D]; `keys` [m,D]: all that compete, of which number `first` + i is another view of image i. The factor
    keeps the size of gradients when the temperature changes.
    """
    q, k = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1) for x in (queries, keys))
    with exactly(q):
        logits = q @ k.T / temperature
    own = torch.arange(first, first + len(q), device=q.device)
    return 2 * temperature * F.cross_entropy(logits, own)
