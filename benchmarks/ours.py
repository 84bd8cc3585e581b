"""Our training steps, as contenders. Apart from the peers, whose memory must not carry our imports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import RATIO, Step, images, trainer
from benchmarks.plain import Case, fill, noises
from benchmarks.plain_baselines import MOMENTUM, Baseline, inputs
from benchmarks.plain_hierarchical import FEATURE_WEIGHT, FOLLOW, Hierarchical, draws
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, AugmentSettings, validate
from mimlet.data.augment import training_transform
from mimlet.data.batch import Batch
from mimlet.data.dataset import ImageDataset
from mimlet.data.joint import JointDataset
from mimlet.data.loader import training_batches
from mimlet.data.masks import Mask
from mimlet.data.source import open_source
from mimlet.hardware import keep_freed_memory
from mimlet.methods.base import Clock, Method
from mimlet.methods.beit import BEiT
from mimlet.methods.itpn import ITPN
from mimlet.methods.mae import MAE, build_decoder
from mimlet.methods.settings import METHODS, BEiTSettings, DecoderSettings, MaskedFeatureSettings
from mimlet.models.build import build_encoder, encoder_of
from mimlet.models.decoders import Decoder, make_decoder
from mimlet.models.hivit import HiViT
from mimlet.models.linear import linear
from mimlet.models.shapes import HieraShape, ViTShape
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.tokenizer import Tokenizer
from mimlet.models.vit import ViT
from mimlet.train.optim import follow

CLOCK = Clock(0, 1, 1, 0)


def train(
    made: Method,
    loss: Callable[[], Tensor],
    bf16: bool,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> Step:
    """A step as our loop does it."""
    keep_freed_memory()
    return trainer(made, loss, bf16, True, before, after)


def mae(case: Case) -> MAE:
    encoder = ViT(ViTShape(case.size, case.patch, case.student.dim, case.student.depth, case.student.heads))
    made = MAE(encoder, build_decoder(encoder, DecoderSettings(**asdict(case.student_decoder))), RATIO)
    fill(made)
    return made


def products(batch: int, bf16: bool, case: Case) -> Step:
    """Instead of a step: the products of a case's blocks alone, once forward, by the fastest kernel there is, with
    nothing in between. Its number is how many GFLOP that is.
    """
    whole, visible = 1 + case.patches, 1 + round(case.patches * (1 - RATIO))
    towers = [(case.student, visible), (case.student_decoder, whole)]
    towers += [(case.teacher, visible)] * (case.method != "mae")
    shapes = [
        (batch * tokens, *widths)
        for shape, tokens in towers
        for widths in (
            (shape.dim, 3 * shape.dim),
            (shape.dim, shape.dim),
            (shape.dim, 4 * shape.dim),
            (4 * shape.dim, shape.dim),
        )
        for _ in range(shape.depth)
    ]
    kind = torch.bfloat16 if bf16 else torch.float32
    made = {shape: (torch.randn(shape[:2], dtype=kind), torch.randn(shape[:0:-1], dtype=kind)) for shape in shapes}

    def once() -> float:
        with torch.no_grad():
            for shape in shapes:
                linear(*made[shape])
        return sum(2e-9 * rows * inner * outer for rows, inner, outer in shapes)

    return once


def work(case: Case) -> float:
    """GFLOP of matrix products that a step of ours does for one image, counted in bf16, where attention is explicit on
    a CPU (fused kernels are not counted there).
    """

    def by_onednn(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x.numel() * weight[0]

    made = mae(case) if case.method == "mae" else method(case, bf16_teacher=True)
    ready = batch_of(made, images(1, case.size), noises(1, case)())
    kernels = {torch.ops.mkldnn._linear_pointwise: by_onednn}
    with (
        FlopCounterMode(display=False, custom_mapping=kernels) as counter,
        torch.autocast("cpu", torch.bfloat16),
    ):
        torch.autograd.backward(loss_of(made, ready))
    return float(counter.get_total_flops()) / 1e9


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
    losses = method(batch, CLOCK)
    return torch.stack([weight * losses[name] for name, weight in method.weights.items()]).sum()


def batch_of(method: Method, pixels: Tensor, noise: Tensor) -> Batch:
    """A batch whose masks all come from one noise [B,N]."""
    masks = {name: sampler.collate(noise) for name, sampler in method.masks().items()}
    return Batch({"image": pixels}, torch.arange(len(pixels)), masks)


def mimlet_step(batch: int, bf16: bool, case: Case) -> Step:
    made = mae(case) if case.method == "mae" else method(case, bf16)
    pixels, noise = images(batch, case.size), noises(batch, case)
    return train(made, lambda: loss_of(made, batch_of(made, pixels, noise())), bf16)


def mimlet_training(batch: int, bf16: bool, case: Case, data: str) -> Step:
    """From files to the new weights, with no loader process: crop and flip (bicubic), masks, step."""
    made = mae(case) if case.method == "mae" else method(case, bf16)
    transform = training_transform(AugmentSettings(interpolation="bicubic"), case.size, "student")
    joint = JointDataset([ImageDataset(open_source([data]), transform, made.masks())])
    stream = training_batches(joint, batch=batch, total_steps=10**9)
    normalisation = (IMAGENET_MEAN, IMAGENET_STD)
    return train(made, lambda: loss_of(made, next(stream).prepare("cpu", [normalisation]).batches[0]), bf16)


class Given(Tokenizer):
    """Names patches [B,N] as it is told to, whatever it sees."""

    def __init__(self, codes: int, ids: Tensor) -> None:
        super().__init__()
        side = round(ids.shape[1] ** 0.5)
        self.vocab_size, self.stride, self.ids = codes, 8, ids.view(-1, side, side)

    def _encode(self, images: Tensor) -> Tensor:
        return self.ids


FORMS: dict[str, dict[str, Any]] = {
    "simmim": {"position": "none", "relative": "shared", "qv_bias": True},
    "maskfeat": {"position": "learned"},
    "beit": {"position": "learned", "qv_bias": True},
    "bootmae": {"qv_bias": True},
    "dino": {"position": "learned"},
    "mocov3": {},
}
"""What sets the baselines' encoders apart, as in their recipes."""


def baseline(case: Baseline, given: dict[str, Tensor]) -> Method:
    """The method of a case, with sizes as in the recipes; followers are separate tensors that are not trained."""
    student, name = case.student, case.method
    sizes: dict[str, dict[str, Any]] = {
        "simmim": {"mask_px": 2 * case.patch},
        "dino": {
            "outputs": case.outputs, "local_size": case.local_size, "local_crops": case.locals,
            "freeze_last": 0,
        },
        "beit": {"tokenizer": "given"},
        "mocov3": {"hidden": case.hidden},
    }  # fmt: skip
    config = validate(
        {
            "encoder": {
                "name": "vit_tiny", "image_size": case.size, "patch": case.patch,
                "dim": student.dim, "depth": student.depth, "heads": student.heads, **FORMS[name],
            },
            "method": {"name": name, **sizes.get(name, {})},
            "schedule": {"steps": 1},
        }
    )  # fmt: skip
    if name == "beit":
        encoder, settings = build_encoder(config.encoder), config.method
        assert isinstance(settings, BEiTSettings)
        assert isinstance(encoder, ViT)
        made: Method = BEiT(encoder, Given(case.codes, given["ids"]), settings.masking, ((0.5,) * 3, (0.5,) * 3))
    else:
        made = METHODS[name].load().build(config)
    for follower in made.ema:
        getattr(made, follower).requires_grad_(False)
    fill(made)
    if name == "mocov3":  # as the released code begins, and the plain formulation
        for follower, leader in made.ema.items():
            getattr(made, follower).load_state_dict(getattr(made, leader).state_dict())
    return made


def baseline_batch(case: Baseline, given: dict[str, Tensor]) -> Batch:
    """The same inputs as a batch."""
    views = {name: view for name, view in given.items() if view.dim() == 4}
    masks = {}
    if "hidden" in given:
        exact = case.method == "bootmae"
        visible = int((~given["hidden"][0]).sum())
        order = given["noise"].argsort(1)
        masks["mask"] = Mask.from_order(order, visible) if exact else Mask.from_hidden(given["hidden"])
    if case.method == "beit":
        views["tokens"] = views["image"][..., : case.size // 2, : case.size // 2]
    return Batch(views, torch.arange(len(next(iter(views.values())))), masks)


def mimlet_baseline(batch: int, bf16: bool, case: Baseline) -> Step:
    given = inputs(case, batch)
    made, ready = baseline(case, given), baseline_batch(case, given)

    def after() -> None:
        for follower, leader in made.ema.items():
            follow(getattr(made, follower), getattr(made, leader), MOMENTUM[case.method])
        made.after_step(CLOCK)

    return train(made, lambda: loss_of(made, ready), bf16, lambda: made.on_gradients(CLOCK), after)


def hierarchical(case: Hierarchical) -> Method:
    """The method of a case: MAE, or iTPN where the encoder has a pyramid."""
    encoder, deep = encoder_of(case.shape), case.decoder
    position: Literal["sincos", "learned"] = "learned" if isinstance(case.shape, HieraShape) else "sincos"
    decoder = make_decoder(encoder, 3 * encoder.patch**2, deep.dim, deep.depth, deep.heads, position)
    if encoder.levels:
        assert isinstance(encoder, HiViT)
        features = MaskedFeatureSettings(weight=FEATURE_WEIGHT if case.features else 0)
        made: Method = ITPN(encoder, decoder, case.ratio, features=features)
    else:
        made = MAE(encoder, decoder, case.ratio)
    if case.features:
        made.get_submodule("target").requires_grad_(False)
    fill(made)
    return made.to(case.device)


def mimlet_hierarchical(batch: int, bf16: bool, case: Hierarchical) -> Step:
    made, (pixels, noise) = hierarchical(case), draws(batch, case)

    def after() -> None:
        if case.features:
            follow(made.get_submodule("target"), made.encoder, FOLLOW)

    return train(made, lambda: loss_of(made, batch_of(made, pixels, noise())), bf16, after=after)
