"""DINO: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, and its released code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet import processes
from mimlet.data.augment import Transform, check_crop
from mimlet.data.batch import Batch
from mimlet.data.views import View, Views, blur_range, refuse_other_augmentation
from mimlet.errors import ConfigError
from mimlet.methods.attended import ATTENTION, attention_pictures
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import start_vit
from mimlet.methods.settings import DINOSettings
from mimlet.models.linear import Linear, linear
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport
from mimlet.objectives.dino import dino_loss
from mimlet.objectives.relations import exactly

if TYPE_CHECKING:
    from mimlet.config import AugmentSettings, Config
    from mimlet.models.teacher import Teachers


class DINO(Method):
    """A student sees all crops of an image, its momentum teacher the two global ones; they are to say the same.

    What is exported, judged and shown is the teacher, as in DINO's own evaluation. It has no drop path.
    """

    encoder: ViT
    ema: ClassVar[dict[str, str]] = {"encoder": "student", "head": "student_head"}
    picture_caption = ATTENTION
    centre: Tensor

    def __init__(self, student: ViT, settings: DINOSettings) -> None:
        super().__init__()
        _check(student, settings)
        self.settings = settings
        self.student = student
        self.student_head = Head(student.dim, settings)
        self.encoder = ViT(student.shape)
        self.encoder.load_state_dict(student.state_dict())
        self.head = Head(student.dim, settings)
        self.head.load_state_dict(self.student_head.state_dict())
        self.register_buffer("centre", torch.zeros(settings.outputs))
        self.pending: list[Tensor] = []  # mean teacher logits [K] of this step's pieces
        self.load_report: LoadReport | None = None
        self.weights = {"cross_entropy": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> DINO:
        """From a configuration. A fixed table of positions keeps MAE's initialisation."""
        settings = config.method
        assert isinstance(settings, DINOSettings)
        fixed = config.encoder.position == "sincos"
        student, report = start_vit(config, None if fixed else ViT.init_classifier_)
        method = cls(student, settings)
        method.load_report = report
        return method

    def transform(self, augment: AugmentSettings, image_size: int) -> Transform:
        """global0, global1 and local0, local1, ...: the views of the paper (BYOL's, appendix C)."""
        refuse_other_augmentation(augment, "dino", ("crop_scale", "interpolation"))
        chosen = self.settings
        check_crop(chosen.global_scale, augment.crop_ratio, "method.global_scale")
        check_crop(chosen.local_scale, augment.crop_ratio, "method.local_scale")
        crop = View(
            image_size,
            chosen.global_scale,
            augment.crop_ratio,
            flip=augment.flip,
            blur_sigma=blur_range(image_size),
        )
        local = replace(crop, size=chosen.local_size, scale=chosen.local_scale, blur_p=0.5)
        views = {"global0": replace(crop, blur_p=1.0), "global1": replace(crop, blur_p=0.1, solarize_p=0.2)}
        return Views(views | {f"local{i}": local for i in range(chosen.local_crops)})

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{cross_entropy}, and what is watched: teacher_entropy (0 or log K: collapsed) and kl, which add up to it."""
        crops = [batch.views[name] for name in ("global0", "global1")]
        with torch.no_grad():
            teacher = self.head(encode(self.encoder, crops))
        self.pending.append(teacher.mean(dim=(0, 1)))
        crops += [batch.views[f"local{i}"] for i in range(self.settings.local_crops)]
        student = self.student_head(encode(self.student, crops))
        loss, entropy = dino_loss(
            student, teacher, self.centre, self.settings.student_temperature, self.teacher_temperature(clock)
        )
        return {"cross_entropy": loss, "teacher_entropy": entropy, "kl": loss.detach() - entropy}

    def teacher_temperature(self, clock: Clock) -> float:
        """Rises linearly over the first part of the training."""
        start, end = self.settings.teacher_temperature
        part = self.settings.temperature_warmup
        return start + (end - start) * (min(1.0, clock.progress / part) if part else 1.0)

    def ema_momentum(self, clock: Clock) -> float:
        """Half a cosine over the training."""
        start, end = self.settings.momentum
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * clock.progress))

    @torch.no_grad()
    def on_gradients(self, clock: Clock) -> None:
        """Clips every tensor's gradient by itself; takes away the last layer's while that is frozen."""
        parts = (self.student, self.student_head)
        gradients = [p.grad for part in parts for p in part.parameters() if p.grad is not None]
        if self.settings.clip:
            clip_each_(gradients, self.settings.clip)
        if clock.progress < self.settings.freeze_last:
            for parameter in self.student_head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Moves the centre towards the mean of the teacher's logits over the whole step: all pieces and processes."""
        mean = processes.mean(torch.stack(self.pending).mean(dim=0))
        self.centre.lerp_(mean, 1 - self.settings.centre_momentum)
        self.pending = []

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original and attention."""
        return attention_pictures(self.encoder, batch.images)


class LastLayer(nn.Module):
    """Products with K unit vectors, without bias: a weight-normalised linear layer whose lengths are 1, or, with
    `trained_length`, trained from 1. In float32 even under autocast.
    """

    def __init__(self, dim: int, outputs: int, trained_length: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.length = nn.Parameter(torch.ones(outputs, 1)) if trained_length else None

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,K]."""
        with exactly(x):
            unit = F.normalize(self.weight)
            return linear(x, unit if self.length is None else unit * self.length)


class Head(nn.Module):
    """DINO's head: three linear layers with GELU between them, L2 normalisation, `LastLayer`."""

    def __init__(self, dim: int, settings: DINOSettings) -> None:
        super().__init__()
        hidden = settings.hidden
        self.mlp = nn.Sequential(
            Linear(dim, hidden), nn.GELU(), Linear(hidden, hidden), nn.GELU(), Linear(hidden, settings.bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = LastLayer(settings.bottleneck, settings.outputs, not settings.norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Class tokens [...,D] -> logits [...,K], float32."""
        bottleneck: Tensor = self.mlp(x)
        out: Tensor = self.last_layer(F.normalize(bottleneck.float(), dim=-1))
        return out


def convert_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head of the released code by our names, for `Head.load_state_dict`: `weight_v` and `weight_g` of either of
    PyTorch's weight normalisations become `weight` and, unless all are 1, `length`.
    """
    names = {"weight_v": "weight", "weight_g": "length"}
    names |= {"parametrizations.weight.original1": "weight", "parametrizations.weight.original0": "length"}
    ours = {f"last_layer.{old}": f"last_layer.{new}" for old, new in names.items()}
    converted = {ours.get(name, name): tensor for name, tensor in state.items()}
    if bool((converted["last_layer.length"] == 1).all()):
        del converted["last_layer.length"]
    return converted


def encode(encoder: ViT, crops: Sequence[Tensor]) -> Tensor:
    """Class tokens after the final norm [C,B,D] of crops [B,3,S,S] of several sizes; neighbours of one size pass the
    encoder together.
    """
    passes = [torch.cat(list(group)) for _, group in groupby(crops, key=lambda crop: crop.shape[-1])]
    tokens = torch.cat([encoder(images).latent[:, 0] for images in passes])
    return tokens.view(len(crops), -1, encoder.dim)


def clip_each_(gradients: list[Tensor], largest: float) -> None:
    """Scales every gradient whose norm is above `largest` down to it (up to 1e-6, as in the released code)."""
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (largest / (norms + 1e-6)).clamp_max(1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()))


def _check(student: ViT, settings: DINOSettings) -> None:
    """Raises `ConfigError` where crops or encoder do not go together."""
    size, patch, local = student.shape.image_size, student.patch, settings.local_size
    if not student.prefix:
        raise ConfigError("DINO compares class tokens; set encoder.class_token=true")
    if not settings.local_crops:
        return
    if local > size:
        raise ConfigError(
            f"method.local_size: local crops of {local} px are larger than the global ones of {size} px "
            f"(encoder.image_size); use about {max(patch, 3 * size // 7 // patch * patch)}, or method.local_crops=0"
        )
    if local % patch:
        low = local // patch * patch
        raise ConfigError(
            f"method.local_size: local crops of {local} px are not divisible by the patch of {patch} px; "
            f"use {low or patch} or {low + patch}"
        )
    if student.shape.relative != "none" and local != size:
        raise ConfigError(
            f"relative positions are fixed to crops of {size} px, and local crops have {local}; set "
            "encoder.relative=none, or method.local_crops=0"
        )
