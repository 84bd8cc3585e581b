"""Judging a classifier: counts that add up over batches and processes, a table and a picture of them."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimlet.atomic import write_atomic
from mimlet.data.batch import Batch
from mimlet.errors import DataError

NAMED_CLASSES = 40
"""Up to so many classes have their names beside the picture; more would overlap."""
NUMBERED_CLASSES = 15
"""Up to so many classes have the percentages written into the cells."""


class Scores:
    """Counts of right and wrong predictions of K classes.

    `confusion` [K,K]: images by true class (row) and predicted class (column). `hits5`: images whose class is among
    the five highest scores. Accuracies are in percent, NaN without images.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.hits5 = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Counts a batch: scores [B,K], higher is likelier, -inf impossible; labels [B] in [0, K)."""
        best = scores.topk(min(5, self.classes), dim=1)
        cells = labels * self.classes + best.indices[:, 0]
        self.confusion.view(-1).index_add_(0, cells, torch.ones_like(cells))
        self.hits5 += ((best.indices == labels[:, None]) & (best.values > -torch.inf)).sum()

    def sync(self) -> None:
        """Adds the counts of all processes; call it once, after the last batch."""
        if dist.is_available() and dist.is_initialized():
            for count in (self.confusion, self.hits5):
                dist.all_reduce(count)

    @property
    def images(self) -> int:
        """How many images were counted."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of images whose highest score is their class, in percent."""
        return 100 * int(self.confusion.trace()) / self.images if self.images else float("nan")

    @property
    def top5(self) -> float:
        """Share of images whose class is among the five highest scores, in percent."""
        return 100 * int(self.hits5) / self.images if self.images else float("nan")

    @property
    def per_class(self) -> Tensor:
        """Top-1 accuracy [K] of each class, in percent, float64; NaN where a class has no images."""
        counts = self.confusion.double().cpu()
        return 100 * counts.diagonal() / counts.sum(dim=1)

    def summary(self) -> dict[str, float]:
        """top1, and top5 where there are more than five classes."""
        return {"top1": self.top1, "top5": self.top5} if self.classes > 5 else {"top1": self.top1}

    def write_per_class(self, path: Path, names: Sequence[str]) -> None:
        """A .csv with one row per class: images, top-1 in percent, the class it is most often taken for (empty: none).

        A class without images has no top-1 either.
        """
        confusion = self.confusion.cpu()
        wrong = confusion.clone().fill_diagonal_(0)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["class", "images", "top1", "taken_for", "times"])
        for index, (name, accuracy) in enumerate(zip(names, self.per_class.tolist(), strict=True)):
            images, worst = int(confusion[index].sum()), int(wrong[index].argmax())
            times = int(wrong[index, worst])
            top1 = f"{accuracy:.2f}" if images else ""
            rows.writerow([name, images, top1, names[worst] if times else "", times])
        write_atomic(path, text.getvalue())

    def confusion_picture(self, path: Path, names: Sequence[str]) -> None:
        """A .png of the confusion matrix, each row as shares of its true class; grey rows have no images.

        Names stand beside it up to 40 classes, percentages inside it up to 15.
        """
        from matplotlib.figure import Figure  # takes a second, which only a picture is worth

        counts = self.confusion.double().cpu()
        shares = (100 * counts / counts.sum(dim=1, keepdim=True)).numpy()
        named, numbered = self.classes <= NAMED_CLASSES, self.classes <= NUMBERED_CLASSES
        side = 2.5 + min(9.0, max(2.5, 0.42 * self.classes if numbered else 0.24 * self.classes))
        figure = Figure(figsize=(side + 0.9, side), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("lightgrey")
        image = axes.imshow(np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
        axes.set(
            xlabel="predicted class", ylabel="true class", title=f"top-1 {self.top1:.1f} % of {self.images:,} images"
        )
        figure.colorbar(image, label="% of the true class", shrink=0.8)
        if named:
            short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
            places = range(self.classes)
            axes.set_xticks(places, short, rotation=90, fontsize=8, parse_math=False)
            axes.set_yticks(places, short, fontsize=8, parse_math=False)
        if numbered:
            for row, column in zip(*np.nonzero(shares >= 0.5), strict=True):
                share = shares[row, column]
                colour = "black" if share > 50 else "white"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=colour)
        png = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
            figure.savefig(png, format="png")
        write_atomic(path, png.getvalue())


def evaluate_classifier(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device | str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: int,
) -> Scores:
    """Scores of `predict` (normalised images [B,3,H,W] -> [B,K]) on labelled batches, over all processes.

    Every process calls it with its own share of the images. Raises `DataError` for images without a label, labels
    beyond the K classes, or no images at all.
    """
    scores = Scores(classes, device)
    for batch in batches:
        if not len(batch):
            continue
        labels = known_labels(batch)
        if int(labels.max()) >= classes:
            raise DataError(
                f"label {int(labels.max())} is beyond the {classes} classes that the classifier knows "
                f"(0 to {classes - 1}); evaluate on the classes it was trained on"
            )
        images = batch.prepare(device, mean, std).images
        scores.update(predict(images), labels.to(device, non_blocking=True))
    scores.sync()
    if not scores.images:
        raise DataError("nothing to evaluate: no image could be read")
    return scores


def known_labels(batch: Batch) -> Tensor:
    """The labels [B] of a batch that is still on the CPU; `DataError` unless every image has one."""
    if batch.labels is None or int(batch.labels.min()) < 0:
        raise DataError("images without labels; give a folder with one subfolder per class, or another labelled source")
    return batch.labels


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for these modules and what is in them; afterwards they are in the mode they came in."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
