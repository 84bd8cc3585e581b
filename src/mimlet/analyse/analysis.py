"""One pass over images, several encoders: similarity, attention and health of all layers, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mimlet.analyse.attention import attention_statistics
from mimlet.analyse.cka import FEWEST, MinibatchCKA, centred_gram
from mimlet.analyse.health import Health
from mimlet.analyse.results import ModelFindings, Order, Similarity
from mimlet.analyse.subject import Subject
from mimlet.config import AugmentSettings
from mimlet.data.augment import Transform, evaluation_transform
from mimlet.data.batch import Batch
from mimlet.data.dataset import ImageDataset
from mimlet.data.loader import evaluation_batches
from mimlet.data.pixels import Pixels
from mimlet.data.seeding import key
from mimlet.data.source import Source
from mimlet.errors import ConfigError, DataError
from mimlet.models.features import Features, Taps

WHOLE = 64
"""Images that pass a model at a time where attention is not looked at."""


@dataclass(frozen=True)
class Measures:
    """What to measure."""

    cka: bool = True
    attention: bool = True
    health: bool = True


@dataclass(frozen=True)
class _Views:
    """One evaluation view per input size, named by it."""

    transforms: Mapping[str, Transform]

    def __call__(self, image: Pixels) -> dict[str, Tensor]:
        return {name: transform(image)["image"] for name, transform in self.transforms.items()}


def views_for(subjects: Sequence[Subject], source: Source, indices: NDArray[np.int64] | None = None) -> ImageDataset:
    """Images as the subjects see them: resized and cropped as for evaluation, one view per `Subject.view`."""
    transforms = {subject.view: evaluation_transform(AugmentSettings(), subject.size) for subject in subjects}
    return ImageDataset(source, _Views(transforms), train=False, indices=indices)


def choose_images(available: int, images: int, batch: int, order: Order, seed: int) -> tuple[NDArray[np.int64], int]:
    """Which images, and how many per minibatch.

    At most `images` of them, in minibatches of equal size of at most `batch`: averages over minibatches then weigh all
    images alike. `DataError` below 4 images, `ConfigError` for numbers below that.
    """
    for name, value in (("--images", images), ("--batch", batch)):
        if value < FEWEST:
            raise ConfigError(f"{name} is {value}; CKA compares at least {FEWEST} images with each other")
    count = min(images, available)
    if count < FEWEST:
        raise DataError(
            f"{count} images are too few: an analysis compares at least {FEWEST} with each other; give more images"
        )
    batches = -(-count // batch)
    size = count // batches
    numbers = np.arange(available)
    if order == "random":
        numbers = np.random.default_rng(key("analyse", seed)).permutation(numbers)
    return numbers[: size * batches], size


def measure(
    subjects: Sequence[Subject],
    dataset: ImageDataset,
    batch: int,
    what: Measures,
    *,
    workers: int = 0,
) -> tuple[list[ModelFindings], list[Similarity]]:
    """Measures all subjects on the images of `views_for`, in minibatches of `batch`.

    Memory: the features of one minibatch of one subject and the attention maps of `Subject.chunk` images at a time,
    whatever the number of images.
    """
    watchers = [_Watcher(subject, what) for subject in subjects]
    if what == Measures(False, False, False):
        return [watcher.findings() for watcher in watchers], []
    cka = MinibatchCKA() if what.cka else None
    seen = 0
    total = -(-len(dataset) // batch)
    batches = evaluation_batches(dataset, batch=batch, workers=workers)
    for views in track(batches, "analysing", total, console=Console(stderr=True), transient=True):
        if len(views) < FEWEST:
            continue
        seen += len(views)
        grams = [gram for watcher in watchers for gram in watcher.update(views)]
        if cka:
            cka.update(grams)
    if not seen:
        raise DataError(f"no minibatch of the {len(dataset)} images has {FEWEST} that can be read")
    return [watcher.findings() for watcher in watchers], _similarities(subjects, cka.compute()) if cka else []


class _Watcher:
    """One subject's measurements under way."""

    def __init__(self, subject: Subject, what: Measures) -> None:
        self.subject, self.what = subject, what
        self.notes: list[str] = []
        layers = range(subject.depth + 1)
        self.layer = "normed" if subject.has_norms else "hidden"
        if not subject.has_norms:
            self.notes.append(
                "features are block outputs: its blocks do not begin with a norm under a known name, which other "
                "models' features have passed"
            )
        self.attends = what.attention and subject.sees_attention
        if what.attention and not subject.sees_attention:
            self.notes.append("no attention distance and entropy: its blocks do not show their attention")
        if self.attends and len(subject.attending) < subject.depth:
            self.notes.append(
                f"attention of the blocks {', '.join(map(str, subject.attending))} only: the others do not attend to "
                "the whole image"
            )
        self.layouts = {block: subject.layout(block) for block in subject.attending}
        blocks = subject.attending if self.attends else ()
        self.taps = Taps(**{self.layer: tuple(layers)}, attention=blocks, tokens=False)
        self.health: list[Health] = []
        self.statistics: list[list[Tensor]] = []

    def update(self, views: Batch) -> list[Tensor]:
        """A minibatch: returns the centred Gram matrix of every layer."""
        images = views.views[self.subject.view]
        layers: list[list[Tensor]] = [[] for _ in range(self.subject.depth + 1)]
        statistics: list[list[Tensor]] = []
        for part in torch.split(images, self.subject.chunk if self.attends else WHOLE):
            features = self.subject.features(part, self.taps)
            for layer, tokens in getattr(features, self.layer).items():
                layers[layer].append(tokens[:, features.prefix :].float())
            if self.attends:
                statistics.append([self._statistics(features, block) for block in self.taps.attention])
        if self.attends:
            blocks = zip(*statistics, strict=True)
            self.statistics.append([torch.cat(parts, dim=1).mean(dim=1) for parts in blocks])
        grams = []
        for layer, parts in enumerate(layers):
            tokens = torch.cat(parts)
            parts.clear()
            if self.what.health:
                if len(self.health) == layer:  # widths differ between stages
                    self.health.append(Health(tokens.shape[-1], self.subject.device))
                self.health[layer].update(tokens)
            if self.what.cka:
                grams.append(centred_gram(tokens))
        return grams

    def _statistics(self, features: Features, block: int) -> Tensor:
        """Distance, in patches, and entropy of a block, [2,B,H]."""
        (rows, columns), order = self.layouts[block]
        distance, entropy = attention_statistics(features.attention[block], (rows, columns), features.prefix, order)
        return torch.stack([distance * self.subject.grid[0] / rows, entropy])

    def findings(self) -> ModelFindings:
        """What was measured."""
        subject = self.subject
        distance: list[list[float]] = [[] for _ in range(subject.depth)]
        entropy: list[list[float]] = [[] for _ in range(subject.depth)]
        for block, found in zip(self.taps.attention, zip(*self.statistics, strict=True), strict=bool(self.statistics)):
            distance[block - 1], entropy[block - 1] = torch.stack(found).mean(dim=0).tolist()
        grids = [subject.layout(block)[0] for block in range(1, subject.depth + 1)]
        return ModelFindings(
            subject.label,
            subject.source,
            subject.size,
            subject.patch,
            subject.grid,
            subject.depth,
            subject.heads,
            subject.dim,
            subject.parameters,
            distance=distance if self.statistics else None,
            entropy=entropy if self.statistics else None,
            effective_rank=[layer.effective_rank for layer in self.health],
            spread=[layer.spread for layer in self.health],
            similarity=[layer.similarity for layer in self.health],
            notes=self.notes,
            token_grids=grids if set(grids) != {subject.grid} else [],
        )


def _similarities(subjects: Sequence[Subject], cka: Tensor) -> list[Similarity]:
    """The blocks of the matrix over all layers of all subjects."""
    sizes = [subject.depth + 1 for subject in subjects]
    blocks = [torch.split(rows, sizes, dim=1) for rows in torch.split(cka, sizes)]
    pairs = combinations_with_replacement(range(len(subjects)), 2)
    return [Similarity(a, b, blocks[a][b].tolist()) for a, b in pairs]
