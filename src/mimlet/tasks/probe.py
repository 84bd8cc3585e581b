"""How good are frozen features? MAE's linear probe; and, in seconds, logistic regression and nearest neighbours."""

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
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, DataError
from mimlet.methods.base import Clock, Task
from mimlet.methods.settings import LinearProbeSettings
from mimlet.models.build import build_encoder
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.weights import LoadReport, load_encoder_weights
from mimlet.tasks.classify import count_classes
from mimlet.tasks.metrics import Scores, evaluating, known_labels

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from mimlet.config import Config
    from mimlet.models.teacher import Teachers

Pool = Literal["mean", "class"]
Labelled = tuple[Tensor, Tensor]
"""Features [N,D] float32 and labels [N] int64, on the CPU."""

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What `logistic_probe` tries for scikit-learn's C, the inverse strength of the penalty."""
SIMILARITIES = 2**26
"""`knn_probe` holds at most so many similarities at a time (256 MiB)."""


class LinearProbe(Task):
    """MAE's protocol: a linear classifier on a frozen encoder, behind a batch norm without scale and shift.

    The batch norm takes its statistics from the batch in training and from running averages in evaluation. It brings
    features of any encoder to one magnitude, so that one learning rate suits all (He et al. 2022, appendix A.1).
    """

    encoder: Encoder
    frozen: ClassVar[tuple[str, ...]] = ("encoder",)

    def __init__(self, encoder: Encoder, classes: int, pool: Pool = "class") -> None:
        super().__init__()
        check_pool(encoder, pool)
        self.classes, self.pool = classes, pool
        self.load_report: LoadReport | None = None
        self.encoder = encoder.requires_grad_(False).eval()
        linear = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(encoder.dim, eps=1e-6, affine=False), linear)
        self.weights = {"classification": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> LinearProbe:
        """From a configuration, which names the encoder's weights."""
        settings = config.method
        assert isinstance(settings, LinearProbeSettings)
        assert config.encoder.weights is not None
        classes = count_classes(settings.classes, classes)
        task = cls(build_encoder(config.encoder), classes, settings.pool)
        task.load_report = load_encoder_weights(task.encoder, config.encoder.weights, config.encoder.keep_blocks)
        return task

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{classification}: cross entropy; and, only for the log, `accuracy` on the training images in percent."""
        assert batch.labels is not None
        logits = self._logits(batch.images)
        right = logits.argmax(dim=1) == batch.labels
        return {
            "classification": F.cross_entropy(logits.float(), batch.labels),
            "accuracy": 100 * right.float().mean(),
        }

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits [B,K] of normalised images [B,3,H,W], in eval mode."""
        with evaluating(self.encoder, self.head):
            return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = pooled(self.encoder, images, self.pool)
        logits: Tensor = self.head(features)
        return logits


def check_pool(encoder: Encoder, pool: Pool) -> None:
    """`ConfigError` if the class token is wanted of an encoder without one."""
    if pool == "class" and not encoder.prefix:
        raise ConfigError(
            f"pool 'class' reads the class token, and this encoder ({encoder.family}) has none; use pool 'mean'"
        )


def pooled(encoder: Encoder, images: Tensor, pool: Pool) -> Tensor:
    """One vector per image [B,D], after the encoder's final norm: the class token, or the mean of the last block's
    patch tokens (not what a Hiera fuses for its decoder, which no classifier reads).
    """
    last = encoder.depth
    features: Features = encoder(images, taps=Taps(normed=(last,), tokens=False))
    tokens = features.normed[last]
    return tokens[:, 0] if pool == "class" else tokens[:, features.prefix :].mean(dim=1)


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    batches: Iterable[Batch],
    device: torch.device | str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pool: Pool,
    *,
    total: int | None = None,
    title: str = "features",
    progress: bool = True,
) -> Labelled:
    """Features [N,D] and labels [N] of all images, on the CPU. The encoder must be on `device`.

    `total` is the number of batches, for the progress bar on stderr, `title` what they are called. Raises
    `DataError` without images or labels.
    """
    check_pool(encoder, pool)
    features, labels = [], []
    with evaluating(encoder):
        console = Console(stderr=True)
        for batch in track(batches, title, total, console=console, transient=True, disable=not progress):
            if not len(batch):
                continue
            labels.append(known_labels(batch))
            images = batch.prepare(device, mean, std).images
            features.append(pooled(encoder, images, pool).float().cpu())
    if not features:
        raise DataError(f"no {title}: none of the images could be read")
    return torch.cat(features), torch.cat(labels)


def logistic_probe(train: Labelled, test: Labelled, seed: int = 0) -> dict[str, float]:
    """Logistic regression: top1, and top5 above five classes, in percent. See `fit_logistic`."""
    return score_logistic(fit_logistic(train, seed), test)


def fit_logistic(train: Labelled, seed: int = 0) -> Pipeline:
    """Logistic regression on standardised features.

    scikit-learn's C is chosen from `PENALTIES` on held-out training images (one in five, and at least one, of every
    class that has two; `seed` draws them), the smallest of equally good ones; the last fit uses all training images.
    Raises `DataError` for a single class.
    """
    features, labels = (part.numpy() for part in train)
    if len(np.unique(labels)) < 2:
        raise DataError(f"a probe needs training images of at least 2 classes, got {len(np.unique(labels))}")
    held = held_out(labels, seed)
    best = 1.0
    if held.any():
        fits = (_fit(features[~held], labels[~held], penalty) for penalty in PENALTIES)
        best = PENALTIES[int(np.argmax([fit.score(features[held], labels[held]) for fit in fits]))]
    return _fit(features, labels, best)


def score_logistic(model: Pipeline, test: Labelled) -> dict[str, float]:
    """What a `fit_logistic` makes of other features: top1, and top5 above five classes, in percent."""
    classes = 1 + max(int(model.classes_.max()), int(test[1].max()))
    likelihood = torch.full((len(test[0]), classes), -torch.inf)
    likelihood[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(test[0].numpy())).float()
    scores = Scores(classes)
    scores.update(likelihood, test[1])
    return scores.summary()


def knn_probe(train: Labelled, test: Labelled, k: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """Weighted nearest neighbours as in DINO (Caron et al. 2021): top1, and top5 above five classes, in percent.

    The k training images of highest cosine similarity vote for their class with weight exp(similarity / temperature).
    """
    bank, k = F.normalize(train[0], dim=1), min(k, len(train[0]))
    scores = Scores(_classes(train, test))
    rows = max(1, SIMILARITIES // len(bank))
    for start in range(0, len(test[0]), rows):
        features, labels = (part[start : start + rows] for part in test)
        nearest = (F.normalize(features, dim=1) @ bank.T).topk(k, dim=1)
        # softmax: the same up to a factor per image, and cannot overflow
        weights = (nearest.values / temperature).softmax(dim=1)
        votes = torch.zeros(len(features), scores.classes).scatter_add_(1, train[1][nearest.indices], weights)
        scores.update(votes.where(votes > 0, -torch.inf), labels)
    return scores.summary()


def held_out(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """A fifth of the images with these labels [n], True: every fifth of each class in a random order, from its second
    on.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[labels[order].argsort(kind="stable")]
    ranks = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    held = np.zeros(len(labels), dtype=bool)
    held[order] = ranks % 5 == 1
    return held


def _fit(features: NDArray[np.float32], labels: NDArray[np.int64], penalty: float) -> Pipeline:
    # Imported here: scikit-learn takes seconds, and every training would wait for them.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a probe
        return model.fit(features, labels)


def _classes(train: Labelled, test: Labelled) -> int:
    return 1 + max(int(labels.max()) for _, labels in (train, test))
