"""Distillation inside a task: what a student's answers are held against, while it is fine-tuned on labels.

The contract is that of `methods.terms.Term`, for outputs instead of features: a module with `weights`, the coefficient
of each loss it returns, and `forward(student, teacher, clock) -> {loss name: scalar}`, where student and teacher are
what their heads make of the same images. Trained parts are its own parameters; the clock is there for ramps.
"""

from __future__ import annotations

from torch import Tensor, nn

from mimlet.errors import ConfigError
from mimlet.methods.base import Clock
from mimlet.methods.settings import LabelDistillation
from mimlet.objectives.kd import hard_distillation, soft_distillation


class LabelTerm(nn.Module):
    """Label distillation: logits against a classifier's (DeiT; MAE-lite; G2SD's specific stage)."""

    def __init__(self, settings: LabelDistillation) -> None:
        super().__init__()
        self.settings = settings
        self.weights = {"distillation": settings.weight}

    def forward(self, student: Tensor, teacher: Tensor, clock: Clock) -> dict[str, Tensor]:
        """{distillation} of logits [B,K]. Raises `ConfigError` where the teacher knows other classes."""
        if student.shape != teacher.shape:
            raise ConfigError(
                f"the teacher knows {teacher.shape[1]} classes, the data has {student.shape[1]}; "
                "label distillation needs a teacher trained on the same classes"
            )
        if self.settings.kind == "hard":
            return {"distillation": hard_distillation(student, teacher)}
        return {"distillation": soft_distillation(student, teacher, self.settings.temperature)}
