"""Frozen teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD
from mimlet.data.masks import Mask
from mimlet.errors import WeightsError
from mimlet.hardware import computes_in_bf16
from mimlet.models.decoders import Decoder
from mimlet.models.features import Features, Taps
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport, fill_encoder, load_decoder, open_checkpoint, shape_of_checkpoint

if TYPE_CHECKING:
    from mimlet.config import TeacherSettings

Channels = tuple[float, float, float]


class Teacher(nn.Module):
    """An encoder (and maybe its decoder) that is only looked at: eval mode, no gradient, its own input normalisation and precision.

    Images arrive normalised as the student's (`mean`, `std`) and are brought to the teacher's own normalisation. In bf16 the matrices are
    stored in bf16 too: nothing is cast in a step.
    """

    def __init__(
        self,
        encoder: ViT,
        decoder: Decoder | None = None,
        *,
        bf16: bool = False,
        own: tuple[Channels, Channels] = (IMAGENET_MEAN, IMAGENET_STD),
        students: tuple[Channels, Channels] = (IMAGENET_MEAN, IMAGENET_STD),
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.bf16 = encoder, decoder, bf16
        self.dim, self.depth, self.heads, self.grid, self.prefix = encoder.dim, encoder.depth, encoder.heads, encoder.grid, encoder.prefix
        self.load_report: LoadReport | None = None
        (mean, std), (student_mean, student_std) = (torch.tensor(pair).view(2, 1, 3, 1, 1) for pair in (own, students))
        self.register_buffer("scale", student_std / std, persistent=False)
        self.register_buffer("shift", (student_mean - mean) / std, persistent=False)
        self.renormalise = own != students
        if bf16:
            for module in encoder.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor, mask: Mask | None = None, taps: Taps | None = None) -> Features:
        """Like the encoder's, without gradient."""
        if self.renormalise:
            images = images * self.scale + self.shift
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features: Features = self.encoder(images, mask, taps=taps)
        return features


def load_teacher(settings: TeacherSettings, student: ViT, *, decoder: bool = False, mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD) -> Teacher:
    """The teacher that settings name, checked against the student it will teach.

    `mean`, `std`: how the student's images are normalised. Raises `WeightsError` when the file does not fit, when its grid of patches or its
    class token differ from the student's, or when a decoder is needed and absent.
    """
    assert settings.path is not None
    checkpoint = open_checkpoint(settings.path)
    size = student.shape.image_size
    shape = shape_of_checkpoint(checkpoint, settings.heads)
    if size % shape.patch or size // shape.patch != student.grid[0]:
        raise WeightsError(
            f"teacher {checkpoint.source} sees {size} px images as {size / shape.patch:g} x {size / shape.patch:g} patches of {shape.patch} px, the student as "
            f"{student.grid[0]} x {student.grid[1]} of {student.patch} px; give both the same patch (encoder.patch={shape.patch})"
        )
    encoder = ViT(shape_of_checkpoint(checkpoint, settings.heads, image_size=size))
    report = fill_encoder(encoder, checkpoint)
    if encoder.prefix != student.prefix:
        raise WeightsError(f"teacher {checkpoint.source} has {encoder.prefix} class token, the student {student.prefix}: set encoder.class_token")
    teacher = Teacher(
        encoder,
        load_decoder(checkpoint, encoder) if decoder else None,
        bf16=settings.precision == "bf16" or (settings.precision == "auto" and computes_in_bf16(_device_type())),
        own=(checkpoint.mean, checkpoint.std),
        students=(mean, std),
    )
    teacher.load_report = report
    return teacher


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
