"""How good are frozen features? MAE's linear probe, and two quick answers: logistic regression and nearest neighbours."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, DataError
from mimlet.methods.base import Clock, Task
from mimlet.methods.settings import LinearProbeSettings
from mimlet.models.vit import ViT, build_encoder
from mimlet.models.weights import LoadReport, load_encoder_weights
from mimlet.tasks.classify import count_classes
from mimlet.tasks.metrics import Scores, check_labels, evaluating

if TYPE_CHECKING:
    from mimlet.config import Config

Pool = Literal["mean", "class"]
Labelled = tuple[Tensor, Tensor]
"""Features [N,D] float32 and labels [N] int64, on the CPU."""

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What `logistic_probe` tries for scikit-learn's C (inverse strength of the penalty)."""


class LinearProbe(Task):
    """MAE's protocol: a linear classifier on a frozen encoder, behind a batch norm without scale and shift.

    The batch norm's statistics are those of the batch in training and running averages in evaluation; it makes up for
    the uneven scale of features trained without labels (He et al. 2022, appendix A.1).
    """

    encoder: ViT
    frozen: ClassVar[tuple[str, ...]] = ("encoder",)

    def __init__(
        self, encoder: ViT, classes: int, pool: Pool = "class", load_report: LoadReport | None = None
    ) -> None:
        super().__init__()
        check_pool(encoder, pool)
        self.classes, self.pool, self.load_report = classes, pool, load_report
        self.encoder = encoder.requires_grad_(False).eval()
        linear = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(encoder.dim, eps=1e-6, affine=False), linear)
        self.weights = {"classification": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0) -> LinearProbe:
        """From a configuration, which names the encoder's weights."""
        settings = config.method
        assert isinstance(settings, LinearProbeSettings)
        assert config.encoder.weights is not None
        classes = count_classes(settings.classes, classes)
        encoder = build_encoder(config.encoder)
        report = load_encoder_weights(encoder, config.encoder.weights, config.encoder.keep_blocks)
        return cls(encoder, classes, settings.pool, report)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{classification}: cross entropy; and, only for the log, `accuracy` on the training images in percent."""
        assert batch.labels is not None
        with torch.no_grad():
            features = pooled(self.encoder, batch.images, self.pool)
        logits = self.head(features)
        right = logits.argmax(dim=1) == batch.labels
        return {
            "classification": F.cross_entropy(logits.float(), batch.labels),
            "accuracy": 100 * right.float().mean(),
        }

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits [B,K] of normalised images [B,3,H,W], in eval mode."""
        with evaluating(self.encoder, self.head):
            logits: Tensor = self.head(pooled(self.encoder, images, self.pool))
        return logits


def check_pool(encoder: ViT, pool: Pool) -> None:
    """`ConfigError` if the class token is wanted of an encoder without one."""
    if pool == "class" and not encoder.prefix:
        raise ConfigError("pool 'class' reads the class token, and this encoder has none; use pool 'mean'")


def pooled(encoder: ViT, images: Tensor, pool: Pool) -> Tensor:
    """One vector per image [B,D], after the encoder's final norm: the class token, or the mean of the patch tokens."""
    features = encoder(images)
    return features.latent[:, 0] if pool == "class" else features.patches.mean(dim=1)


@torch.no_grad()
def extract_features(
    encoder: ViT,
    batches: Iterable[Batch],
    device: torch.device | str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pool: Pool,
    *,
    total: int | None = None,
    title: str = "features",
) -> Labelled:
    """Features [N,D] and labels [N] of all images, on the CPU. The encoder must be on `device`.

    `total` is the number of batches, for the progress bar on stderr. Raises `DataError` for images without labels, or none.
    """
    check_pool(encoder, pool)
    features, labels = [], []
    with evaluating(encoder):
        for batch in track(batches, title, total, console=Console(stderr=True), transient=True):
            if not len(batch):
                continue
            ready = batch.prepare(device, mean, std)
            check_labels(batch.labels)
            assert batch.labels is not None
            features.append(pooled(encoder, ready.images, pool).float().cpu())
            labels.append(batch.labels)
    if not features:
        raise DataError(f"no {title}: none of the images could be read")
    return torch.cat(features), torch.cat(labels)


def logistic_probe(train: Labelled, test: Labelled, seed: int = 0) -> dict[str, float]:
    """Logistic regression on standardised features: top1, and top5 above five classes, in percent.

    The penalty is chosen from `PENALTIES` on a held-out fifth of the training images (one of five, drawn per class),
    the strongest of equally good ones; the final fit uses all of them. Raises `DataError` for a single class.
    """
    features, labels = (part.numpy() for part in train)
    if len(np.unique(labels)) < 2:
        raise DataError("a probe needs training images of at least 2 classes")
    held = _every_fifth(labels, seed)
    penalty = 1.0
    if held.any():
        accuracy = []
        for candidate in PENALTIES:
            model = _fit(features[~held], labels[~held], candidate)
            accuracy.append(float(model.score(features[held], labels[held])))
        penalty = PENALTIES[int(np.argmax(accuracy))]
    model = _fit(features, labels, penalty)
    classes = _classes(train, test)
    likely = torch.full((len(test[0]), classes), -torch.inf)
    likely[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(test[0].numpy())).float()
    return _summary(likely, test[1])


def knn_probe(train: Labelled, test: Labelled, k: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """Weighted nearest neighbours as in DINO: top1, and top5 above five classes, in percent.

    The k most similar training images (cosine) vote for their class with weight exp(similarity / temperature).
    """
    bank, queries = (F.normalize(part[0], dim=1) for part in (train, test))
    classes = _classes(train, test)
    k = min(k, len(bank))
    scores = Scores(classes)
    for chunk, labels in zip(queries.split(rows := max(1, 2**26 // len(bank))), test[1].split(rows), strict=True):
        nearest = (chunk @ bank.T).topk(k, dim=1)
        weights = (nearest.values / temperature).softmax(dim=1)
        votes = torch.zeros(len(chunk), classes).scatter_add_(1, train[1][nearest.indices], weights)
        scores.update(votes.where(votes > 0, -torch.inf), labels)
    return scores.summary()
