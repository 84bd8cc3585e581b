"""Distances between attention maps and between features of two networks (Exploring Strong Lightweight ViTs via MIM
Pre-Training).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def logit_distance(student: Tensor, teacher: Tensor, mapping: Tensor) -> Tensor:
    """D-MAE's L_attn: mean squared error of pre-softmax scaled logits after mixing the student's heads.

    student [B,Hs,T,T], teacher [B,Ht,T,T], mapping [Ht,Hs] (a 1x1 convolution over heads, no bias).
    """
    B, heads, T, _ = student.shape
    mapped = mapping.to(student.dtype) @ student.reshape(B, heads, T * T)
    return F.mse_loss(mapped.float(), teacher.reshape(B, -1, T * T).float())


def feature_distance(student: Tensor, teacher: Tensor, mapping: Tensor) -> Tensor:
    """Representation distillation (eq. 6): mean squared error after a linear map. student [B,T,Ds], teacher [B,T,Dt],
    mapping [Dt,Ds].
    """
    return F.mse_loss(F.linear(student, mapping).float(), teacher.float())
