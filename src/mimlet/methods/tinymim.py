"""TinyMIM: Ren et al., TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models, CVPR 2023, and its released
code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import start_encoder
from mimlet.methods.relations import Relations
from mimlet.methods.settings import TinyMIMSettings
from mimlet.methods.terms import Terms, make_terms
from mimlet.models.encoder import Encoder
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.weights import LoadReport

if TYPE_CHECKING:
    from mimlet.config import AugmentSettings, Config
    from mimlet.data.augment import Transform


class TinyMIM(Method):
    """The student's relations on a jittered crop imitate the teacher's on the same crop as it is. Nothing is masked.

    Both encoders stop at the queries, keys and values of their block: what follows there in the student, and its final
    norm, gets no gradient and stays as initialised, as in the released code. Where relations were trained with another
    head count than the student's own, `info` tells a later student (MAE-L -> B -> S -> T is such a chain).
    """

    encoder: Encoder
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)

    def __init__(self, encoder: Encoder, teacher: Teacher, relations: Relations, terms: Terms | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.teacher = teacher
        self.terms = Terms([relations, *(terms or ())])
        self.load_report: LoadReport | None = None
        self.weights = self.terms.weights
        if relations.student_heads != encoder.heads_of(relations.student_layer):
            self.info = {"heads_of": {relations.student_layer: relations.student_heads}}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> TinyMIM:
        """From a configuration."""
        settings = config.method
        assert isinstance(settings, TinyMIMSettings)
        encoder, report = start_encoder(config)
        decodes = any(term.kind == "dual_view" for term in settings.terms)
        teacher = (teachers or Teachers()).find(config, encoder, decoder=decodes)
        relations = Relations(settings.relations, encoder, teacher, masked=False)
        method = cls(encoder, teacher, relations, make_terms(settings.terms, encoder, teacher, masked=False))
        method.load_report = report
        return method

    def transform(self, augment: AugmentSettings, image_size: int) -> Transform:
        """The crop as it is, `image`, and with changed colours, `student`; only `image` where nothing changes them."""
        from mimlet.data.augment import training_transform

        return training_transform(augment, image_size, changed="student")

    def masks(self) -> dict[str, MaskSampler]:
        """Those of the terms; none of its own."""
        return self.terms.masks()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{relation_qk, relation_vv} or what other pairs are set, and the terms' losses."""
        student = self.encoder(batch.views.get("student", batch.images), taps=self.terms.student_taps)
        teacher = self.teacher(batch.images, taps=self.terms.teacher_taps)
        losses: dict[str, Tensor] = self.terms(student, teacher, batch)
        return losses
