"""Losses of scores against labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Every class judged by itself: -sum_k [t_k log s(x_k) + (1 - t_k) log(1 - s(x_k))], mean over images; s is the
    sigmoid (big_vision's `sigmoid_xent`, of AugReg's pre-training).

    `logits` [B,K]; `targets` [B], or shares [B,K]. `label_smoothing` e makes of each t_k (1 - e) t_k + e / K, as
    `F.cross_entropy` does.
    """
    classes = logits.shape[1]
    shares = targets if targets.dim() == 2 else F.one_hot(targets, classes).to(logits.dtype)
    shares = (1 - label_smoothing) * shares + label_smoothing / classes
    return F.binary_cross_entropy_with_logits(logits, shares, reduction="sum") / len(logits)
