"""What can be seen of a pre-training while it goes on: what its encoder is worth, and what it makes of fixed images."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimlet.config import Config
from mimlet.data.augment import evaluation_transform
from mimlet.data.batch import Batch
from mimlet.data.dataset import ImageDataset
from mimlet.data.loader import evaluation_batches
from mimlet.data.source import Source, open_source
from mimlet.errors import DataError
from mimlet.methods.base import Method
from mimlet.models.encoder import Encoder
from mimlet.report.figures import image_strip, overlays
from mimlet.run import RunFolder
from mimlet.tasks.probe import Labelled, extract_features, held_out, knn_probe, logistic_probe

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SHOWN = 8
"""Training images that a run shows."""
BATCH = 256
"""Labelled images at a time."""


class EncoderJudge:
    """Judges the encoder of a method without labels, on mean patch features as `mimlet probe` does.

    `data.judge` learns from the images of `data.labelled` and is judged on `data.eval`; without it on a fixed fifth of
    each class of `data.labelled`, from which it then does not learn. A method comes as `Evaluate` of the loop; the
    first process does the work and tells the others. Results are named `knn_top1`, `probe_top1`, ...
    """

    def __init__(self, config: Config, fabric: Fabric, workers: int, say: Callable[[str], None]) -> None:
        self.config, self.fabric, self.workers, self.say = config, fabric, workers, say
        data = config.data
        source = open_source(data.labelled, labelled=True, index=data.index)
        if data.eval:
            judged = open_source(data.eval, labelled=True, index=data.index, classes=source.classes)
            self.bank, self.judged = self._dataset(source), self._dataset(judged)
            where = f"on {judged.describe()}"
        else:
            held = held_out(source.labels, seed=0)
            if not held.any():
                raise DataError(
                    f"data.labelled: {source.describe()} has one image per class, so none can be held out to judge on; "
                    "give more images per class, or data.eval (--eval)"
                )
            self.bank, self.judged = (self._dataset(source, np.flatnonzero(part)) for part in (~held, held))
            where = f"on {len(self.judged):,} of them held out"
        learner = "nearest neighbours among" if data.judge == "knn" else "logistic regression on"
        say(f"encoder judged by {learner} {source.describe()}, {where}")
        self.told = False

    def __call__(self, method: Method) -> dict[str, float]:
        """Top-1 in percent, and top-5 above five classes."""
        found: dict[str, float] = {}
        if self.fabric.is_global_zero:
            assert isinstance(method.encoder, Encoder)
            bank, judged = (
                self._features(method.encoder, part, title)
                for part, title in ((self.bank, "labelled images"), (self.judged, "images to judge on"))
            )
            probe = knn_probe if self.config.data.judge == "knn" else logistic_probe
            found = {f"{self.config.data.judge}_{name}": value for name, value in probe(bank, judged).items()}
            lost = len(self.bank) + len(self.judged) - len(bank[0]) - len(judged[0])
            if lost and not self.told:
                self.say(f"{lost:,} of the labelled images could not be read, left out")
            self.told = True
        told: dict[str, float] = self.fabric.broadcast(found)
        return told

    def _dataset(self, source: Source, indices: NDArray[np.int64] | None = None) -> ImageDataset:
        transform = evaluation_transform(self.config.data.augment, self.config.encoder.image_size)
        return ImageDataset(source, transform, indices=indices, train=False, decoder=self.config.data.decoder)

    def _features(self, encoder: Encoder, dataset: ImageDataset, title: str) -> Labelled:
        batches = evaluation_batches(dataset, batch=BATCH, workers=self.workers)
        augment = self.config.data.augment
        return extract_features(
            encoder, batches, self.fabric.device, augment.mean, augment.std, "mean", title=title, progress=False
        )


class Pictures:
    """What a method makes of a few fixed training images, under fixed masks, whenever it is asked."""

    def __init__(self, config: Config, dataset: ImageDataset, fabric: Fabric) -> None:
        self.config, self.dataset, self.fabric = config, dataset, fabric
        self.batch: Batch | None = None

    @torch.no_grad()
    def rows(self, method: Method) -> dict[str, Tensor]:
        """The rows of `Method.pictures` as normalised images [B,3,S,S] by label; nothing of methods that show nothing,
        or where none of the images can be read.
        """
        if type(method).pictures is Method.pictures:
            return {}
        augment = self.config.data.augment
        if self.batch is None:
            shown = ImageDataset(
                self.dataset.source,
                evaluation_transform(augment, self.config.encoder.image_size),
                self.dataset.samplers,
                seed=self.config.seed,
                indices=self.dataset.indices,
                train=False,
                decoder=self.config.data.decoder,
            )
            spread = range(0, len(shown), max(1, len(shown) // SHOWN))
            batch = shown.collate([shown[0, i] for i in itertools.islice(spread, SHOWN)])
            assert isinstance(batch, Batch), "images that cannot be read are left out"
            self.batch = batch
        if not len(self.batch):
            return {}
        with self.fabric.autocast():
            given = method.pictures(self.batch.prepare(self.fabric.device, augment.mean, augment.std))
        rows = {label: row.float().cpu() for label, row in given.items()}
        first = next(iter(rows.values()), None)
        return {
            label: row if row.ndim == 4 else overlays(first, row, mean=augment.mean, std=augment.std)
            for label, row in rows.items()
            if first is not None
        }

    def keep(self, method: Method, step: int, run: RunFolder) -> None:
        """Leaves a picture of the moment after `step` steps in the run folder, unless it is there."""
        if run.has_picture(step):
            return
        augment = self.config.data.augment
        strips = {
            label: image_strip(images, mean=augment.mean, std=augment.std)
            for label, images in self.rows(method).items()
        }
        if strips:
            run.picture(step, strips, method.picture_caption)
