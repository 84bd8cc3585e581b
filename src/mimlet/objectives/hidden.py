"""Hidden states of another network as targets (G2SD, Huang et al., CVPR 2023, section 3.1, and its released code)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

EPS, BETA = 1e-6, 2.0


def hidden_target(states: Tensor) -> Tensor:
    """Layer norm over channels without weights, in float32. states [...,D] -> [...,D]."""
    return F.layer_norm(states.float(), states.shape[-1:], eps=EPS)


def hidden_loss(prediction: Tensor, states: Tensor) -> Tensor:
    """Smooth L1 (beta 2: quadratic up to a difference of 2) between a prediction and the target made of a teacher's
    states, mean over all elements; both [B,T,D]. The paper does not say so, its code does.
    """
    return F.smooth_l1_loss(prediction.float(), hidden_target(states), beta=BETA)
