"""Our training steps, as contenders. Apart from the peers, whose memory must not carry our imports."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import RATIO, Step, images, trainer
from benchmarks.plain import Case, fill, noises
from mimlet.config import validate
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import MAE, build_decoder
from mimlet.methods.settings import METHODS, DecoderSettings
from mimlet.models.decoders import Decoder
from mimlet.models.teacher import Teacher, Teachers
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


def settings(case: Case) -> dict[str, Any]:
    """The section `method` of a case."""
    relations = {"teacher_layer": case.teacher_block}
    adaptive = {"heads": "adaptive", **relations}
    sections: dict[str, dict[str, Any]] = {
        "dmae": {"name": "dmae"},
        "d2mae": {"name": "dmae", "decode_layer": case.decoded_block, "extra_block": True},
        "dmae_features": {"name": "dmae_features"},
        "tinymim": {"name": "tinymim", "relations": relations},
        "mimhd_relations": {"name": "mimhd", "reconstruct": False, "relations": adaptive},
        "mimhd": {"name": "mimhd", "relations": adaptive},
        "mimhd_one_view": {"name": "mimhd", "relations": adaptive, "dual_view": {"views": 1}},
        "g2sd": {"name": "g2sd", "decoder": asdict(case.student_decoder)},
    }
    return sections[case.method]


def method(case: Case, bf16_teacher: bool) -> Method:
    """The method of a case with a teacher of random weights."""
    student, large = case.student, case.teacher
    config = validate(
        {
            "encoder": {
                "name": "vit_tiny", "image_size": case.size, "patch": case.patch,
                "dim": student.dim, "depth": student.depth, "heads": student.heads,
            },
            "method": settings(case),
            "teacher": {"path": "random"},
            "schedule": {"steps": 1},
        }
    )  # fmt: skip
    encoder = ViT(ViTShape(case.size, case.patch, large.dim, large.depth, large.heads))
    deep, pixels = case.decoder, 3 * case.patch**2
    decoder = Decoder(large.dim, encoder.grid, encoder.prefix, pixels, deep.dim, deep.depth, deep.heads)
    entry = METHODS[config.method.name]
    decodes = case.method in ("mimhd", "mimhd_one_view", "g2sd")
    teacher = Teacher(encoder, decoder if decodes else None, bf16=bf16_teacher)
    teacher.pixels = "normalised"
    built = entry.load().build(config, teachers=Teachers(teacher))
    fill(built)
    return built


def loss_of(method: Method, batch: Batch) -> Tensor:
    losses = method(batch, Clock(0, 1, 1, 0))
    return torch.stack([weight * losses[name] for name, weight in method.weights.items()]).sum()


def batch_of(method: Method, pixels: Tensor, noise: Tensor) -> Batch:
    """A batch whose masks all come from one noise [B,N]."""
    masks = {name: sampler.collate(noise) for name, sampler in method.masks().items()}
    return Batch({"image": pixels}, torch.arange(len(pixels)), masks)


def mimlet_step(batch: int, bf16: bool, case: Case) -> Step:
    made, pixels, noise = method(case, bf16), images(batch, case.size), noises(batch, case)
    return trainer(made, lambda: loss_of(made, batch_of(made, pixels, noise())), bf16, fused=True)
