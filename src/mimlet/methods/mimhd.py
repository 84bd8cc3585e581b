"""MIM-HD: Making Smaller Masked Autoencoder Better with Efficient Distillation. There is no public code; what the paper
leaves open is said where it is decided (`Relations`, `DualView`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler
from mimlet.methods.base import Clock, Method
from mimlet.methods.dual_view import DualView
from mimlet.methods.mae import RECONSTRUCTION, start_encoder
from mimlet.methods.relations import Relations
from mimlet.methods.settings import MIMHDSettings
from mimlet.methods.terms import Terms, make_terms
from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.weights import LoadReport

if TYPE_CHECKING:
    from mimlet.config import AugmentSettings, Config
    from mimlet.data.augment import Transform


class MIMHD(Method):
    """The student's relations imitate the teacher's, head by head, and the teacher's decoder reconstructs the image
    from the student's tokens (eq. 11: L_QK + L_VV + alpha L_REC). Both encoders see the whole image.

    One and the same crop is student's view, teacher's view and target. With `data.augment.color_jitter` the student's
    alone is jittered, as in TinyMIM, and the crop as it is stays the target.
    """

    encoder: Encoder
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    picture_caption = f"{RECONSTRUCTION} With two views, each patch is from the one that hides it."

    def __init__(
        self,
        encoder: Encoder,
        teacher: Teacher,
        relations: Relations,
        dual_view: DualView | None = None,
        terms: Terms | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.teacher = teacher
        self.terms = Terms([relations, *([dual_view] if dual_view else []), *(terms or ())])
        self.load_report: LoadReport | None = None
        self.weights = self.terms.weights
        if relations.student_heads != encoder.heads_of(relations.student_layer):
            self.info = {"heads_of": {relations.student_layer: relations.student_heads}}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> MIMHD:
        """From a configuration."""
        settings = config.method
        assert isinstance(settings, MIMHDSettings)
        encoder, report = start_encoder(config)
        decodes = settings.reconstruct or any(term.kind == "dual_view" for term in settings.terms)
        teacher = (teachers or Teachers()).find(config, encoder, decoder=decodes)
        method = cls(
            encoder,
            teacher,
            Relations(settings.relations, encoder, teacher, masked=False),
            DualView(settings.dual_view, encoder, teacher, masked=False) if settings.reconstruct else None,
            make_terms(settings.terms, encoder, teacher, masked=False),
        )
        method.load_report = report
        return method

    def transform(self, augment: AugmentSettings, image_size: int) -> Transform:
        """The crop as it is, `image`, and with changed colours, `student`; only `image` where nothing changes them."""
        from mimlet.data.augment import training_transform

        return training_transform(augment, image_size, changed="student")

    def masks(self) -> dict[str, MaskSampler]:
        """Those of the terms: what the first decoded view hides."""
        return self.terms.masks()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{relation_qk, relation_vv, dual_view}, the losses of further terms, and what the terms watch."""
        student = self.encoder(batch.views.get("student", batch.images), taps=self.terms.student_taps)
        teacher = self.teacher(batch.images, taps=self.terms.teacher_taps)
        losses: dict[str, Tensor] = self.terms(student, teacher, batch)
        return losses

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible (to the first view), reconstruction (both views merged); nothing without one."""
        for term in self.terms:
            if isinstance(term, DualView):
                return term.pictures(self.encoder(batch.images, taps=Taps()), batch)
        return {}
