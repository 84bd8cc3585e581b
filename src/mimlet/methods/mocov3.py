"""MoCo v3: Chen et al., An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021, and its code."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from mimlet import processes
from mimlet.data.augment import Transform, check_crop
from mimlet.data.batch import Batch
from mimlet.data.views import View, Views, blur_range, refuse_other_augmentation
from mimlet.errors import ConfigError
from mimlet.methods.attended import ATTENTION, attention_pictures
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import start_vit
from mimlet.methods.settings import MoCoV3Settings
from mimlet.models.linear import Linear
from mimlet.models.norm import GlobalBatchNorm
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport
from mimlet.objectives.contrast import info_nce

if TYPE_CHECKING:
    from mimlet.config import AugmentSettings, Config
    from mimlet.models.teacher import Teachers

FEWEST = 3
"""Images per step. Of one there is no batch norm; of two it leaves signs only, through which no gradient flows."""


class MoCoV3(Method):
    """Predict, from the class token of one view, the momentum branch's projection of the other view of the same image,
    among those of all images in the batch.

    The momentum branch follows parameters, as published. The loop also averages its batch norms' running statistics;
    nobody reads them, because both branches normalise by their own batch. Statistics and competing keys are those of
    all processes.
    """

    encoder: ViT
    ema: ClassVar[dict[str, str]] = {"momentum_encoder": "encoder", "momentum_projector": "projector"}
    picture_caption = ATTENTION

    def __init__(
        self,
        encoder: ViT,
        temperature: float = 0.2,
        momentum: float = 0.99,
        hidden: int = 4096,
        outputs: int = 256,
        fixed_patches: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(3, encoder.dim, hidden, outputs)
        self.predictor = mlp(2, outputs, hidden, outputs)
        self.momentum_encoder = copy.deepcopy(encoder)
        self.momentum_projector = copy.deepcopy(self.projector)
        self.temperature = temperature
        self.momentum = momentum
        if fixed_patches:
            encoder.patch_embed.requires_grad_(False)
        self.load_report: LoadReport | None = None
        self.weights = {"contrast": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> MoCoV3:
        """From a configuration. Raises `ConfigError`."""
        settings = config.method
        assert isinstance(settings, MoCoV3Settings)
        if not config.encoder.class_token:
            raise ConfigError("method 'mocov3' compares class tokens; set encoder.class_token=true")
        batch, pieces = config.schedule.batch, config.speed.accumulate
        if batch < FEWEST:
            raise ConfigError(
                f"schedule.batch is {batch}, but method 'mocov3' normalises and contrasts the images of a step with "
                f"each other, which takes at least {FEWEST}, and hundreds to be of use"
            )
        if pieces > 1:
            raise ConfigError(
                f"speed.accumulate is {pieces}, but method 'mocov3' contrasts the images of a step with each other, "
                "which pieces cannot do; set it to 1, and use more devices (they put their images together) or a "
                "smaller schedule.batch"
            )
        encoder, report = start_vit(config, init_moco)
        method = cls(
            encoder,
            settings.temperature,
            settings.momentum,
            settings.hidden,
            settings.outputs,
            settings.fixed_patches,
        )
        method.load_report = report
        return method

    def transform(self, augment: AugmentSettings, image_size: int) -> Transform:
        """`view1` is always blurred, `view2` rarely, and sometimes solarised (BYOL's asymmetric pair, the paper's
        section 4.1). Crop, interpolation and flip are those of `data.augment`; it has no say in colours.
        """
        refuse_other_augmentation(augment, "mocov3")
        check_crop(augment.crop_scale, augment.crop_ratio)
        view = View(
            image_size,
            augment.crop_scale,
            augment.crop_ratio,
            augment.interpolation,
            augment.flip,
            blur_sigma=blur_range(image_size),
        )
        return Views({"view1": replace(view, blur_p=1.0), "view2": replace(view, blur_p=0.1, solarize_p=0.2)})

    def ema_momentum(self, clock: Clock) -> float:
        """1 - (1 - m) (1 + cos(pi e)) / 2 at the progress e of the next step: the official code updates the momentum
        branch at the beginning of a step, the loop at the end of the one before. (Official code also does so before the
        first step, which changes nothing: the branches start equal.)
        """
        progress = (clock.step + 1) / max(1, clock.total_steps)
        return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - self.momentum)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{contrast}: the predictions of either view against the keys of the other, both directions added."""
        one, two = batch.views["view1"], batch.views["view2"]
        queries = self.queries(one), self.queries(two)
        with torch.no_grad():
            keys = processes.gather(self.keys(two)), processes.gather(self.keys(one))
        own = processes.rank() * len(one)
        losses = [info_nce(q, k, self.temperature, own) for q, k in zip(queries, keys, strict=True)]
        return {"contrast": losses[0] + losses[1]}

    def queries(self, images: Tensor) -> Tensor:
        """Predictions [B,outputs] from one view [B,3,H,W]."""
        predicted: Tensor = self.predictor(self.projector(class_token(self.encoder, images)))
        return predicted

    def keys(self, images: Tensor) -> Tensor:
        """The momentum branch's projections [B,outputs] of one view [B,3,H,W]."""
        projected: Tensor = self.momentum_projector(class_token(self.momentum_encoder, images))
        return projected

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original and attention."""
        return attention_pictures(self.encoder, batch.images)


def class_token(encoder: nn.Module, images: Tensor) -> Tensor:
    """The final class token of whole images, [B,D]."""
    token: Tensor = encoder(images).latent[:, 0]
    return token


def mlp(layers: int, dim: int, hidden: int, outputs: int) -> nn.Sequential:
    """Projector and predictor: linear layers without bias, batch norm and ReLU after each but the last, after which
    batch norm has no weights. Linear layers start as PyTorch's, as in the official code.
    """
    parts: list[nn.Module] = []
    for width in [dim, *[hidden] * (layers - 2)]:
        parts += [Linear(width, hidden, bias=False), GlobalBatchNorm(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts, Linear(hidden, outputs, bias=False), GlobalBatchNorm(outputs, affine=False))


def init_moco(encoder: ViT) -> None:
    """MoCo v3's initialisation of the encoder, the patch projection's bias included.

    Its sin-cos table has the row's half of the channels first, ours (MAE's) the column's; as every layer starts alike
    in all channels, that is the same model.
    """
    encoder.init_moco_()
    bias = encoder.patch_embed.proj.bias
    assert bias is not None
    nn.init.zeros_(bias)
