"""DMAE: Bai et al., Masked Autoencoders Enable Efficient Knowledge Distillers, CVPR 2023. Not D-MAE (`dmae`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler, RandomMasking
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import RECONSTRUCTION, build_decoder, reconstruction_pictures, start_vit
from mimlet.methods.settings import DMAEFeaturesSettings
from mimlet.methods.terms import Terms, make_terms
from mimlet.models.decoders import Decoder
from mimlet.models.features import Taps
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport
from mimlet.objectives.reconstruct import masked_pixel_loss

if TYPE_CHECKING:
    from mimlet.config import Config


class DMAEFeatures(Method):
    """MAE, and terms between student and teacher on the same visible patches: DMAE's is `Alignment`."""

    encoder: ViT
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    picture_caption = RECONSTRUCTION

    def __init__(
        self,
        encoder: ViT,
        decoder: Decoder,
        teacher: Teacher,
        terms: Terms,
        *,
        mask_ratio: float = 0.75,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.teacher = teacher
        self.terms = terms
        self.mask_ratio = mask_ratio
        self.normalise = normalise
        self.load_report: LoadReport | None = None
        self.weights = {"reconstruction": 1.0, **terms.weights}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> DMAEFeatures:
        """From a configuration."""
        settings = config.method
        assert isinstance(settings, DMAEFeaturesSettings)
        encoder, report = start_vit(config)
        teacher = (teachers or Teachers()).find(config, encoder, masked=True)
        terms = make_terms([settings.alignment, *settings.terms], encoder, teacher, masked=True)
        method = cls(
            encoder,
            build_decoder(encoder, settings.decoder),
            teacher,
            terms,
            mask_ratio=settings.mask_ratio,
            normalise=settings.target == "normalised",
        )
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One random mask over patches, for student and teacher."""
        return {"mask": RandomMasking(self.encoder.units, self.mask_ratio), **self.terms.masks()}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{reconstruction} and the terms' losses."""
        student = self.encoder(batch.images, batch.mask, taps=Taps() | self.terms.student_taps)
        teacher = self.teacher(batch.images, batch.mask, taps=self.terms.teacher_taps)
        prediction = self.decoder(student.latent, batch.mask, hidden_only=True)
        loss = masked_pixel_loss(prediction, batch.images, self.encoder.patch, batch.mask.ids_hidden, self.normalise)
        return {"reconstruction": loss, **self.terms(student, teacher, batch)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible and reconstruction, each [B,3,H,W]."""
        latent = self.encoder(batch.images, batch.mask).latent
        return reconstruction_pictures(
            self.decoder(latent, batch.mask), batch.images, batch.mask, self.encoder.patch, self.normalise
        )
