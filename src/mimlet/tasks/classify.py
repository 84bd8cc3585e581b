"""Image classification: from scratch (also as pre-training), by fine-tuning, or with label distillation (MAE-lite's
recipes, G2SD's specific stage, AugReg).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, DataError
from mimlet.methods.base import Clock, Task
from mimlet.methods.settings import ClassifySettings
from mimlet.models.build import build_encoder
from mimlet.models.classifier import Classifier, ClassifierHead
from mimlet.models.encoder import Encoder
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport, classifier_state, load_classifier, load_encoder_weights
from mimlet.objectives.labels import sigmoid_cross_entropy
from mimlet.tasks.distil import LabelTerm
from mimlet.tasks.metrics import evaluating

if TYPE_CHECKING:
    from mimlet.config import Config
    from mimlet.models.teacher import Teachers

SIGMOID_BIAS = -10.0
"""The head's first bias with a sigmoid per class: nearly no class is there (AugReg; `init_head_bias` in big_vision)."""


class Classify(Task):
    """Train an encoder and its head on labels.

    Batches are erased and mixed here, in timm's order and from the global generators. With a `teacher` (images
    [B,3,H,W] -> logits [B,K]), a second classifier learns its answers to the very same images, from the class token or
    from a token of its own (`distill.token`), and scores are the mean of both classifiers' logits. With `ema_decay`,
    scores come from moving averages of encoder and head.
    """

    encoder: Encoder
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    ema: ClassVar[dict[str, str]] = {"average_encoder": "encoder", "average_head": "head"}

    def __init__(
        self, encoder: Encoder, classes: int, settings: ClassifySettings | None = None, teacher: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.settings = settings = settings or ClassifySettings()
        self.classes = classes
        self.load_report: LoadReport | None = None
        self.encoder = encoder
        distill = settings.distill
        self.head = ClassifierHead(
            encoder.dim, classes, settings.pool, teacher is not None, settings.head_scale, distill.token
        )
        if self.head.needs_class_token and not encoder.prefix:
            give = "set encoder.class_token=true, or" if isinstance(encoder, ViT) else "use"
            raise ConfigError(
                f"method.pool=class and method.distill read the class token, and this encoder ({encoder.family}) has "
                f"none; {give} method.pool=mean without method.distill"
            )
        if (encoder.prefix == 2) != (teacher is not None and distill.token == "distillation"):
            raise ConfigError(
                f"the encoder has {'a' if encoder.prefix == 2 else 'no'} distillation token; such a token "
                "(ViTShape.distillation_token) and method.distill.token=distillation with a teacher go together"
            )
        if settings.loss == "sigmoid":
            nn.init.constant_(self.head.head.bias, SIGMOID_BIAS)
        if self.head.fc_norm is not None:
            encoder.norm.requires_grad_(False)  # skipped by mean pooling
        self.teacher = teacher
        self.average_encoder = copy.deepcopy(encoder).requires_grad_(False) if settings.ema_decay else None
        self.average_head = copy.deepcopy(self.head).requires_grad_(False) if settings.ema_decay else None
        self.weights = {"classification": 1.0}
        self.distillation: LabelTerm | None = None
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self.distillation = LabelTerm(distill)
            self.weights = {"classification": 1 - distill.weight, **self.distillation.weights}
        self.mixup = None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(  # type: ignore[no-untyped-call]
                settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes
            )

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> Classify:
        """From a configuration. What `encoder.weights` does not give keeps a classifier's initialisation."""
        settings = config.method
        assert isinstance(settings, ClassifySettings)
        classes = count_classes(settings.classes, classes)
        distill = settings.distill
        token = distill.kind != "none" and distill.token == "distillation"
        encoder = build_encoder(config.encoder, distillation_token=token)
        encoder.init_classifier_()
        report = None
        if config.encoder.weights:
            report = load_encoder_weights(encoder, config.encoder.weights, config.encoder.keep_blocks)
        teacher = None
        if distill.kind != "none":
            path, augment = config.teacher.path, config.data.augment
            assert path is not None
            teacher = load_classifier(path, config.teacher.heads, mean=augment.mean, std=augment.std)
        task = cls(encoder, classes, settings, teacher)
        task.load_report = report
        return task

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{classification, distillation}: those in use. For the log only, `accuracy` on these images, in percent.

        Of a mixed image the heavier class counts as right.
        """
        images, targets = self.augment(batch)
        logits = self.head(self.encoder(images, taps=self.head.taps(self.encoder.depth)))
        smoothing = 0.0 if self.mixup else self.settings.smoothing
        entropy = sigmoid_cross_entropy if self.settings.loss == "sigmoid" else F.cross_entropy
        losses = {"classification": entropy(logits[0].float(), targets, label_smoothing=smoothing)}
        if self.teacher is not None and self.distillation is not None:
            with torch.no_grad():
                answer = self.teacher(images)
            losses |= self.distillation(logits[1], answer, clock)
        right = logits[0].argmax(dim=1) == (targets.argmax(dim=1) if targets.dim() == 2 else targets)
        return {**losses, "accuracy": 100 * right.float().mean()}

    def augment(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Erased and mixed images [B,3,H,W], and their labels [B], or shares [B,K] (already smoothed) when mixing.

        Raises `ConfigError` when an odd number of images is to be mixed.
        """
        images, labels = batch.images, batch.labels
        assert labels is not None
        if self.mixup and len(images) % 2:
            raise ConfigError(
                f"mixup and cutmix mix pairs, and here are {len(images)} images; choose schedule.batch, devices and "
                "speed.accumulate so that every piece is even, or set method.mixup=0 and method.cutmix=0"
            )
        if self.settings.erasing or self.mixup:
            images = images.clone()  # timm works in place
        if self.settings.erasing:
            erase = RandomErasing(self.settings.erasing, mode="pixel", device=images.device)  # type: ignore[no-untyped-call]
            images = erase(images)
        if self.mixup:
            images, labels = self.mixup(images, labels)
        return images, labels

    def ema_momentum(self, clock: Clock) -> float:
        """Constant, as in timm."""
        return self.settings.ema_decay

    @property
    def judged(self) -> tuple[Encoder, ClassifierHead]:
        """Encoder and head that scores come from, and that are worth shipping: the averages where there are any."""
        if self.average_encoder is None or self.average_head is None:
            return self.encoder, self.head
        return self.average_encoder, self.average_head

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits [B,K] of normalised images [B,3,H,W], in eval mode."""
        encoder, head = self.judged
        with evaluating(encoder, head):
            scores: Tensor = Classifier(encoder, head)(images)
        return scores

    def classifier_state(self) -> dict[str, Tensor]:
        """The judged weights as one flat model, see `mimlet.models.weights.classifier_state`."""
        return classifier_state(*self.judged)


def count_classes(asked: int, found: int) -> int:
    """The number of classes, from the settings or the data (0: not said).

    Raises `ConfigError` where they contradict each other, `DataError` where there are fewer than two.
    """
    if asked and found and asked != found:
        raise ConfigError(f"method.classes is {asked}, but the data has {found} classes; leave method.classes out")
    classes = asked or found
    if classes < 2:
        raise DataError(
            f"classification needs at least 2 classes, the data has {classes}; "
            "give a folder with one subfolder per class, or another labelled source"
        )
    return classes
