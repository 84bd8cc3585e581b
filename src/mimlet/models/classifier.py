"""An encoder with a classification head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mimlet.errors import ConfigError
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.parts import NORM_EPS


class ClassifierHead(nn.Module):
    """Features -> logits. Parameter names as in timm and MAE-lite: `fc_norm`, `head`, `dist_norm`, `head_dist`.

    Pool "mean": the mean of the last block's patch tokens, which skip the encoder's final norm and get a norm of their
    own. Pool "class": the class token after the encoder's final norm. `distilled` adds a classifier that answers to the
    teacher, on the `token` that is free for it: the class token with pool "mean", which gets a norm of its own, or the
    encoder's distillation token with pool "class", after the encoder's final norm (with mean pooling it would leak into
    the mean). `scale` multiplies the initial weights.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        pool: Literal["mean", "class"] = "mean",
        distilled: bool = False,
        scale: float = 1.0,
        token: Literal["class", "distillation"] = "class",
    ) -> None:
        super().__init__()
        if distilled and pool == token == "class":
            raise ConfigError(
                "method.distill trains the class token on the teacher's labels; set method.pool=mean, or "
                "method.distill.token=distillation"
            )
        if distilled and (pool, token) == ("mean", "distillation"):
            raise ConfigError("method.distill.token=distillation has the class token judged; set method.pool=class")
        self.needs_class_token = distilled or pool == "class"
        self.fc_norm = nn.LayerNorm(dim, eps=NORM_EPS) if pool == "mean" else None
        self.head = _linear(dim, classes, scale)
        self.dist_norm = nn.LayerNorm(dim, eps=NORM_EPS) if distilled and pool == "mean" else None
        self.head_dist = _linear(dim, classes, scale) if distilled else None

    def taps(self, depth: int) -> Taps:
        """What to ask of an encoder with so many blocks."""
        return Taps() if self.fc_norm is None else Taps(hidden=(depth,), tokens=False)

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """The answer to `taps` -> logits [B,K] of each classifier: one, or two when distilled."""
        if self.fc_norm is None:
            judged, free = features.latent[:, 0], features.latent[:, features.prefix - 1]
        else:
            (tokens,) = features.hidden.values()
            judged, free = self.fc_norm(tokens[:, features.prefix :].mean(dim=1)), tokens[:, 0]
        if self.head_dist is None:
            return (self.head(judged),)
        return self.head(judged), self.head_dist(free if self.dist_norm is None else self.dist_norm(free))


class Classifier(nn.Module):
    """A fine-tuned model ready for use: normalised images [B,3,h,w] -> scores [B,K].

    `names`: of the K classes, empty where the file does not tell.
    """

    def __init__(self, encoder: Encoder, head: ClassifierHead, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.encoder, self.head, self.names = encoder, head, names

    def forward(self, images: Tensor) -> Tensor:
        """Scores before the softmax; the mean of both heads for a model with label distillation."""
        features = self.encoder(images, taps=self.head.taps(self.encoder.depth))
        return torch.stack(self.head(features)).mean(dim=0)


def _linear(dim: int, classes: int, scale: float) -> nn.Linear:
    """timm 0.4.12's classifier: truncated normal 0.02 times `scale`, no bias at start."""
    linear = nn.Linear(dim, classes)
    nn.init.trunc_normal_(linear.weight, std=0.02 * scale)
    nn.init.zeros_(linear.bias)
    return linear
