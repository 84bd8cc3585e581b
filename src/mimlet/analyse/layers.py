"""What a linear classifier can read from every layer of an encoder."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mimlet.analyse.subject import Subject
from mimlet.data.dataset import ImageDataset
from mimlet.data.loader import evaluation_batches
from mimlet.errors import DataError
from mimlet.models.features import Taps
from mimlet.tasks.metrics import known_labels
from mimlet.tasks.probe import fit_logistic, score_logistic

BATCH = 64
"""Images whose features of all layers are held at a time."""


def probe_by_layer(
    subject: Subject, train: ImageDataset, test: ImageDataset, *, seed: int = 0, workers: int = 0
) -> list[float]:
    """Top-1 in percent on `test` of a logistic regression (`fit_logistic`) on each layer 0 to L, fitted to `train`.

    A layer's feature is the mean of its patch tokens behind the norm that the next block begins with (`Taps.normed`),
    as in CKA; the last passes the final norm and is what `mimlet probe --kind quick` judges. Of models whose norms
    cannot be read (`Subject.has_norms`) it is the mean of the block's output. The data sets are made by
    `analysis.views_for` from labelled sources, `test` with the classes of `train`.

    Every image passes the encoder once. Memory: the means of all layers, 4 (L + 1) D bytes per image. Raises
    `DataError` for images without labels, a single class, or no readable image.
    """
    fitted = _means(subject, train, workers, "training images")
    judged = _means(subject, test, workers, "test images")
    console = Console(stderr=True)
    return [
        score_logistic(fit_logistic((fitted[0][layer], fitted[1]), seed), (judged[0][layer], judged[1]))["top1"]
        for layer in track(range(subject.depth + 1), "probes by layer", console=console, transient=True)
    ]


def _means(subject: Subject, dataset: ImageDataset, workers: int, title: str) -> tuple[list[Tensor], Tensor]:
    """Mean patch tokens [N,D] of each layer and labels [N] of the N images that can be read, on the CPU."""
    layers, kind = tuple(range(subject.depth + 1)), "normed" if subject.has_norms else "hidden"
    means: list[list[Tensor]] = [[] for _ in layers]
    labels: list[Tensor] = []
    total = -(-len(dataset) // BATCH)
    batches = evaluation_batches(dataset, batch=BATCH, workers=workers)
    for batch in track(batches, title, total, console=Console(stderr=True), transient=True):
        if not len(batch):
            continue
        labels.append(known_labels(batch))
        features = subject.features(batch.views[subject.view], Taps(**{kind: layers}, tokens=False))
        for layer, tokens in getattr(features, kind).items():
            means[layer].append(tokens[:, features.prefix :].float().mean(dim=1).cpu())
    if not labels:
        raise DataError(f"no {title}: none of the images could be read")
    return [torch.cat(parts) for parts in means], torch.cat(labels)
