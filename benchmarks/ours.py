"""Our training steps, as contenders. Apart from the peers, whose memory must not carry our imports."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders import RATIO, Step, images, trainer
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.methods.base import Clock
from mimlet.methods.dmae import DMAE
from mimlet.methods.mae import MAE, build_decoder
from mimlet.methods.settings import DecoderSettings
from mimlet.models.teacher import Teacher
from mimlet.models.vit import ViT, ViTShape


def mimlet_mae(batch: int, bf16: bool) -> Step:
    encoder = ViT(ViTShape())
    method = MAE(encoder, build_decoder(encoder, DecoderSettings()))
    pixels, clock = images(batch), Clock(0, 1, 1, 0)

    def loss() -> Tensor:
        mask = Mask.from_noise(torch.rand(batch, encoder.units), RATIO)
        losses: dict[str, Tensor] = method(Batch({"image": pixels}, torch.arange(batch), {"mask": mask}), clock)
        return losses["reconstruction"]

    return trainer(method, loss, bf16, fused=True)


def d2mae(bf16: bool) -> DMAE:
    """The released D²-MAE: decoder on block 8, attention of an extra block against block 12 of a ViT-Base."""
    encoder = ViT(ViTShape())
    teacher = Teacher(ViT(ViTShape(dim=768, depth=12, heads=12)), bf16=bf16)
    decoder = build_decoder(encoder, DecoderSettings())
    return DMAE(encoder, decoder, teacher, attention=[(13, 12)], decode_layer=8, extra_block=True)


def mimlet_d2mae(batch: int, bf16: bool) -> Step:
    method, pixels, clock = d2mae(bf16), images(batch), Clock(0, 1, 1, 0)

    def loss() -> Tensor:
        mask = Mask.from_noise(torch.rand(batch, method.encoder.units), RATIO)
        losses: dict[str, Tensor] = method(Batch({"image": pixels}, torch.arange(batch), {"mask": mask}), clock)
        return losses["reconstruction"] + losses["attention"]

    return trainer(method, loss, bf16, fused=True)
