"""Label distillation: a student's logits against a classifier's (Hinton et al. 2015; DeiT, Touvron et al. 2021)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy [B,K] with the class that the teacher [B,K] finds most likely."""
    return F.cross_entropy(student.float(), teacher.argmax(dim=1))


def soft_distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 * KL(teacher || student) of softmax(logits / tau), logits [B,K]: summed, over the number of logits B * K.

    DeiT's code divides by B * K, not by B: at weight 0.5 and many classes the term is faint next to the cross entropy.
    """
    log_student, log_teacher = ((logits.float() / temperature).log_softmax(dim=1) for logits in (student, teacher))
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return temperature**2 * divergence / student.numel()
