"""Feature alignment: Bai et al., Masked Autoencoders Enable Efficient Knowledge Distillers (DMAE), CVPR 2023, and its
released code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.errors import ConfigError
from mimlet.methods.settings import AlignmentSettings, TermSettings
from mimlet.methods.terms import Term, common_order
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.linear import Linear
from mimlet.models.parts import init_mae
from mimlet.models.teacher import Teacher


class Alignment(Term):
    """Mean absolute difference of two block outputs, each token divided by its L2 norm. The student's pass a trained
    linear layer first; the class token takes part where both have one.

    Layers count block outputs, 0 being the embedding; by default both at three quarters of the depth: blocks 9 of 12
    and 18 of 24. Their tokens have to stand on one grid; their order does not matter.
    """

    student_order: Tensor | None
    teacher_order: Tensor | None

    def __init__(self, settings: TermSettings, encoder: Encoder, teacher: Teacher, *, masked: bool) -> None:
        super().__init__(settings, encoder, teacher, masked=masked)
        assert isinstance(settings, AlignmentSettings)
        self.student_layer = _layer("student", settings.student_layer, encoder.depth)
        self.teacher_layer = _layer("teacher", settings.teacher_layer, teacher.depth)
        orders = common_order("alignment", encoder, teacher, (self.student_layer, self.teacher_layer), masked=masked)
        for side, order in zip(("student", "teacher"), orders, strict=True):
            self.register_buffer(f"{side}_order", order, persistent=False)
        self.student_taps = Taps(hidden=(self.student_layer,), tokens=False)
        self.teacher_taps = Taps(hidden=(self.teacher_layer,), tokens=False)
        self.normalise = settings.normalise
        self.projection: Linear | None = None
        ours, theirs = encoder.dims[self.student_layer], teacher.dims[self.teacher_layer]
        if settings.projection:
            self.projection = Linear(ours, theirs)
            init_mae(self.projection)
        elif ours != theirs:
            raise ConfigError(
                f"alignment: the student is {ours} wide, {teacher.source} {theirs}, and without a "
                "projection the widths have to be equal; set projection=true"
            )
        self.loss_name = f"{settings.label}_alignment" if settings.label else "alignment"
        self.weights = {self.loss_name: settings.weight}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Tensor]:
        """{alignment}, in float32."""
        shared = min(student.prefix, teacher.prefix)
        ours = student.hidden[self.student_layer][:, student.prefix - shared :]
        theirs = teacher.hidden[self.teacher_layer][:, teacher.prefix - shared :].float()
        if self.student_order is not None and self.teacher_order is not None:
            ours, theirs = ours[:, self.student_order], theirs[:, self.teacher_order]
        ours = (ours if self.projection is None else self.projection(ours)).float()
        if self.normalise:
            ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
        return {self.loss_name: F.l1_loss(ours, theirs)}


def _layer(side: str, layer: int | None, depth: int) -> int:
    """The block whose output is compared."""
    if layer is not None and layer > depth:
        raise ConfigError(f"alignment: no {side}_layer {layer}; the {side} has blocks 1 to {depth} (0: the embedding)")
    return 3 * depth // 4 if layer is None else layer
