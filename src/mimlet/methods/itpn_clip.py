"""iTPN and Fast-iTPN with a frozen teacher: Tian et al., Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network
with Token Migration (TPAMI 2024), iTPN's released code, and a fork with Fast-iTPN's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock, Method
from mimlet.methods.itpn import init_truncated, start_pyramid
from mimlet.methods.masked import block_masking
from mimlet.methods.settings import ITPNClipSettings
from mimlet.methods.whole_step import WholeStep
from mimlet.models.encoder import as_units
from mimlet.models.features import Features, Taps
from mimlet.models.hivit import HiViT
from mimlet.models.linear import Linear
from mimlet.models.parts import NORM_EPS, Block
from mimlet.models.pyramid import LevelsEmbed
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.weights import LoadReport

if TYPE_CHECKING:
    from mimlet.config import Config

AUXILIARY_AT = 0.75
AUXILIARY_EPS = 1e-5


class ITPNClip(Method):
    """Fill hidden patches with a token, encode everything up to the pyramid, predict a teacher's patch tokens from the
    sum of the embedded levels.

    An iTPN norms this sum by a layer of its own, a Fast-iTPN by the encoder's final norm. With an auxiliary prediction,
    two more blocks follow a block of stage 3, and their output predicts the same.
    """

    encoder: HiViT
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    picture_caption = (
        "How far the teacher's tokens are from what is predicted for them, 1 - cosine, of hidden and visible patches: "
        "grey none, yellow the most in its image."
    )

    def __init__(self, encoder: HiViT, settings: ITPNClipSettings, teacher: Teacher) -> None:
        super().__init__()
        fast = encoder.shape.form == "fast"
        if fast and settings.form == "compat":
            raise ConfigError(
                "method.form=compat is how iTPN was published, and the encoder is a Fast-iTPN, whose published form is "
                "leak_free; remove method.form, or choose encoder.name=itpn_base"
            )
        self.encoder = encoder
        self.settings = settings
        self.teacher = teacher
        self.masking = block_masking(settings.masking, encoder.grid)
        self.projected = settings.target_projection and teacher.projection is not None
        self.everywhere = settings.supervise == "all" or (settings.supervise, settings.form) == ("auto", "compat")
        before, after = encoder.fills
        self.mask_token = nn.Parameter(torch.empty(1, 1, after if settings.form == "compat" else before))
        self.embed = LevelsEmbed(encoder.levels, encoder.dim, fast)
        self.norm: nn.Module = nn.Identity() if fast else nn.LayerNorm(encoder.dim, eps=NORM_EPS)
        width = teacher.projection.out_features if self.projected and teacher.projection else teacher.dim
        self.lm_head = Linear(encoder.dim, width)
        for part in (self.embed, self.lm_head):
            part.apply(init_truncated)
        if fast:
            nn.init.xavier_normal_(self.lm_head.weight)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.auxiliary = Auxiliary(encoder, width) if settings.auxiliary else None
        hidden = () if self.auxiliary is None else (self.auxiliary.block,)
        self.taps = Taps(levels=tuple(encoder.levels), hidden=hidden, tokens=False)
        self.step = WholeStep(_figures, count="patches")
        self.load_report: LoadReport | None = None
        self.weights = {"prediction": 1.0} if self.auxiliary is None else {"prediction": 1.0, "auxiliary": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> ITPNClip:
        """From a configuration."""
        settings = config.method
        assert isinstance(settings, ITPNClipSettings)
        encoder, report = start_pyramid(config)
        method = cls(encoder, settings, (teachers or Teachers()).find(config, encoder))
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One mask of blocks; images hide different numbers of patches."""
        return {"mask": self.masking}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{prediction, auxiliary}: mean distance from the targets over all supervised patches of the step, whichever
        image, piece or process they are in.
        """
        hidden = batch.mask.hidden
        places = slice(None) if self.everywhere else batch.mask.places
        targets = self.targets(batch.images).flatten(0, 1)[places]
        totals = {
            name: self.distances(predicted.flatten(0, 1)[places].float(), targets).sum()
            for name, predicted in self.predict(batch).items()
        }
        asked = torch.ones_like(hidden) if self.everywhere else hidden
        shown = self.step({**totals, "patches": asked.sum()})
        return {name: self.step.loss(total, shown[name]) for name, total in totals.items()}

    def on_gradients(self, clock: Clock) -> None:
        """Gradients of the mean over the supervised patches of all pieces; those of the patch embedding are scaled."""
        self.step.on_gradients(self.parameters())
        if self.settings.patch_gradient < 1:
            gradients = [p.grad for p in self.encoder.patch_embed.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, self.settings.patch_gradient)

    def after_step(self, clock: Clock) -> None:
        """The next step counts anew."""
        self.step.after_step()

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """What is predicted for every patch, [B,N,T]: by the levels (`prediction`), by the auxiliary blocks."""
        seen: Features = self.encoder(batch.images, batch.mask, self.mask_token, self.taps)
        units = {stride: as_units(level, self.encoder.patch // stride) for stride, level in seen.levels.items()}
        joined = self.embed(units)
        normed = self.norm(joined) if self.encoder.shape.form == "hivit" else self.encoder.norm(joined)
        predictions = {"prediction": self.lm_head(normed)}
        if self.auxiliary is not None:
            index = self.encoder.relative_position_index
            predictions["auxiliary"] = self.auxiliary(seen.hidden[self.auxiliary.block], index)
        return predictions

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's tokens of every patch, [B,N,T] in float32."""
        tokens = self.teacher(images).patches
        tokens = (self.teacher.project(tokens) if self.projected else tokens).float()
        return F.layer_norm(tokens, tokens.shape[-1:]) if self.settings.target_norm else tokens

    def distances(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """[...,T] -> [...]: smooth L1 (beta 1), mean over channels; or minus the cosine."""
        if self.settings.loss == "cosine":
            return -F.cosine_similarity(predicted, targets, dim=-1)
        return F.smooth_l1_loss(predicted, targets, reduction="none").mean(dim=-1)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original and visible, images [B,3,H,W]; error, maps [B,rows,columns] of 1 - cosine."""
        images, (rows, columns) = batch.images, self.encoder.grid
        hidden = batch.mask.hidden.view(-1, 1, rows, columns).float()
        predicted = self.predict(batch)["prediction"].float()
        error = 1 - F.cosine_similarity(predicted, self.targets(images), dim=-1)
        return {
            "original": images,
            "visible": torch.where(F.interpolate(hidden, images.shape[-2:]) > 0, 0, images),
            "error": error.clamp(min=0).view(-1, rows, columns),
        }


class Auxiliary(nn.Module):
    """The undocumented second prediction of iTPN's released code: two more blocks of stage 3 after block number
    `block`, a norm, a linear layer.
    """

    def __init__(self, encoder: HiViT, width: int) -> None:
        super().__init__()
        first, second, depth = encoder.shape.stages
        if depth < 8:
            raise ConfigError(
                f"method.auxiliary needs 8 or more blocks in stage 3, encoder.stages={list(encoder.shape.stages)} has "
                f"{depth}; set method.auxiliary=false"
            )
        self.block = first + second + int(AUXILIARY_AT * depth) + 1
        alike = replace(encoder.shape, stages=(1, 1, 2), pyramid_dim=0, pyramid_depth=0, pyramid_hidden=0)
        self.blocks = HiViT(alike).blocks[-2:]
        for block in self.blocks:
            assert isinstance(block, Block)
            block.norm1.eps = block.norm2.eps = AUXILIARY_EPS
        self.norm = nn.LayerNorm(encoder.dim, eps=NORM_EPS)
        self.head = Linear(encoder.dim, width)
        self.head.apply(init_truncated)

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Tokens [B,N,C] of all patches, and the index of relative positions -> predictions [B,N,T]."""
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block(x, block.attn.bias(index))
        predicted: Tensor = self.head(self.norm(x))
        return predicted


def _figures(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    patches = sums["patches"].clamp(min=1)
    return {name: total / patches for name, total in sums.items() if name != "patches"}
