"""Self-distillation between crops (DINO, Caron et al., ICCV 2021, section 3.1 and algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from mimlet.objectives.relations import exactly


def dino_loss(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """(cross entropy of the student with the teacher, entropy of the teacher), both in nats, from float logits.

    The teacher's distribution is softmax((t - c) / tau_t): centred, then sharpened. The cross entropy is the mean over
    images and all pairs of a global crop seen by the teacher and another crop seen by the student. What lies between
    the two numbers is the divergence KL(teacher || student), because every global crop is in equally many pairs.

    student [C,B,K]: crops in order, the global ones first; teacher [G,B,K]: global crops; centre [K].
    """
    G, C = len(teacher), len(student)
    log_target = ((teacher - centre) / teacher_temperature).log_softmax(dim=-1)
    target = log_target.exp()
    logits = student / student_temperature
    # -sum_k q_k log softmax(z)_k = logsumexp(z) - q.z, as q sums to one: nothing of the size of z is made per pair.
    with exactly(logits):
        likelihood = torch.einsum("gbk,cbk->gcb", target, logits)
    cross = logits.logsumexp(dim=-1) - likelihood
    same = torch.eye(G, C, dtype=torch.bool, device=cross.device)[..., None]
    others = cross.masked_fill(same, 0).sum() / (cross.numel() - G * cross.shape[2])
    return others, -(target * log_target).sum(dim=-1).mean()
