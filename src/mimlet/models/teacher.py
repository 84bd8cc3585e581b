"""Frozen teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, nearest
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError, WeightsError
from mimlet.hardware import Accelerator, choose_accelerator, computes_in_bf16
from mimlet.models.decoders import Decoder
from mimlet.models.features import Features, Taps
from mimlet.models.vit import ViT, ViTShape
from mimlet.models.weights import (
    Channels,
    Checkpoint,
    LoadReport,
    Normalisation,
    fill_encoder,
    load_decoder,
    open_checkpoint,
    renormalisation,
    shape_of_checkpoint,
)
from mimlet.models.zoo import SIZES

if TYPE_CHECKING:
    from mimlet.config import TeacherSettings


class Teacher(nn.Module):
    """An encoder, maybe with its decoder, that is only looked at: eval mode, no gradient, own normalisation and type.

    Images arrive normalised as the student's (`students`: mean, std) and are brought to the teacher's `own`
    normalisation. In bf16 the encoder's matrices are stored in bf16 too: no weight is cast in a step.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        encoder: ViT,
        decoder: Decoder | None = None,
        *,
        bf16: bool = False,
        own: Normalisation = (IMAGENET_MEAN, IMAGENET_STD),
        students: Normalisation = (IMAGENET_MEAN, IMAGENET_STD),
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.bf16 = encoder, decoder, bf16
        self.dim, self.depth, self.heads = encoder.dim, encoder.depth, encoder.heads
        self.grid, self.prefix = encoder.grid, encoder.prefix
        self.load_report: LoadReport | None = None
        scale, shift = renormalisation(students, own)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.renormalise = own != students
        if bf16:
            for module in encoder.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, mask: Mask | None = None, taps: Taps | None = None) -> Features:
        """Like the encoder's, without gradient."""
        if self.renormalise:
            images = images * self.scale + self.shift
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features: Features = self.encoder(images, mask, taps=taps)
        return features


def load_teacher(
    settings: TeacherSettings,
    student: ViT,
    *,
    decoder: bool = False,
    mean: Channels = IMAGENET_MEAN,
    std: Channels = IMAGENET_STD,
    accelerator: Literal["auto"] | Accelerator = "auto",
) -> Teacher:
    """The teacher that settings name, checked against the student it will teach.

    `mean`, `std`: how the student's images are normalised. `accelerator`: where it will run (`speed.accelerator`).
    Raises `WeightsError` when the file does not fit, when its grid of patches or its class token differ from the
    student's, or when a decoder is needed and absent.
    """
    assert settings.path is not None
    checkpoint = open_checkpoint(settings.path)
    size = student.shape.image_size
    shape = _shape(settings, checkpoint, size)
    if size % shape.patch or size // shape.patch != student.grid[0]:
        patches = f"{size / shape.patch:.4g}"
        raise WeightsError(
            f"teacher {checkpoint.source} sees {size} px images as {patches} x {patches} patches of {shape.patch} px, "
            f"the student as {student.grid[0]} x {student.grid[1]} of {student.patch} px; give both the same patch "
            f"(encoder.patch={shape.patch})"
        )
    if shape.class_token != bool(student.prefix):
        raise WeightsError(
            f"teacher {checkpoint.source} has {'a' if shape.class_token else 'no'} class token, "
            f"the student {'one' if student.prefix else 'none'}; "
            f"set encoder.class_token={str(shape.class_token).lower()}"
        )
    encoder = ViT(shape)
    report = fill_encoder(encoder, checkpoint)
    native = computes_in_bf16(choose_accelerator(accelerator))
    teacher = Teacher(
        encoder,
        load_decoder(checkpoint, encoder) if decoder else None,
        bf16=settings.precision == "bf16" or (settings.precision == "auto" and native),
        own=(checkpoint.mean, checkpoint.std),
        students=(mean, std),
    )
    teacher.load_report = report
    return teacher


def _shape(settings: TeacherSettings, checkpoint: Checkpoint, image_size: int) -> ViTShape:
    """The teacher's architecture. `settings.name` says the head count, and what else the file has to be."""
    if not settings.name:
        return shape_of_checkpoint(checkpoint, settings.heads, image_size)
    if settings.name not in SIZES:
        known = f"{nearest(settings.name, SIZES)}; known: {', '.join(SIZES)}"
        raise ConfigError(f"unknown teacher.name '{settings.name}'{known}")
    size = SIZES[settings.name]
    shape = shape_of_checkpoint(checkpoint, settings.heads or size.heads, image_size)
    if (shape.dim, shape.depth) != (size.dim, size.depth):
        raise WeightsError(
            f"teacher {checkpoint.source} has width {shape.dim} and {shape.depth} blocks, but a {settings.name} has "
            f"{size.dim} and {size.depth}; leave teacher.name out, or give another file"
        )
    return shape
