"""Judging a classifier on images that differ from those it was trained on: shifted sets and common corruptions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mimlet.atomic import write_atomic
from mimlet.data.batch import Batch, prepare_view
from mimlet.data.corruptions import SEVERITIES, view_name
from mimlet.data.source import Source, open_source
from mimlet.errors import DataError
from mimlet.tasks.metrics import Scores, known_labels
from mimlet.tasks.shifts import ALEXNET_ERRORS, IMAGENET, ROBUSTNESS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VIEWS_MEMORY = 128 * 2**20
"""Bytes that a batch of images may take with all its corruptions."""
GREY, BLUE, YELLOW = "#8a8f98", "#1f6fb2", "#f2b134"

# Places of the 200 classes of ImageNet-A and ImageNet-R among the 1000, ascending as their names are.
_A = """
6 11 13 15 17 22 23 27 30 37 39 42 47 50 57 70 71 76 79 89 90 94 96 97 99 105 107 108 110 113 124 125 130 132 143 144
150 151 207 234 235 254 277 283 287 291 295 298 301 306 307 308 309 310 311 313 314 315 317 319 323 324 326 327 330 334
335 336 347 361 363 372 378 386 397 400 401 402 404 407 411 416 417 420 425 428 430 437 438 445 456 457 461 462 470 472
483 486 488 492 496 514 516 528 530 539 542 543 549 552 557 561 562 569 572 573 575 579 589 606 607 609 614 626 627 640
641 642 643 658 668 677 682 684 687 701 704 719 736 746 749 752 758 763 765 768 773 774 776 779 780 786 792 797 802 803
804 813 815 820 823 831 833 835 839 845 847 850 859 862 870 879 880 888 890 897 900 907 913 924 932 933 934 937 943 945
947 951 954 956 957 959 971 972 980 981 984 986 987 988
"""
_R = """
1 2 4 6 8 9 11 13 22 23 26 29 31 39 47 63 71 76 79 84 90 94 96 97 99 100 105 107 113 122 125 130 132 144 145 147 148
150 151 155 160 161 162 163 171 172 178 187 195 199 203 207 208 219 231 232 234 235 242 245 247 250 251 254 259 260 263
265 267 269 276 277 281 288 289 291 292 293 296 299 301 308 309 310 311 314 315 319 323 327 330 334 335 337 338 340 341
344 347 353 355 361 362 365 366 367 368 372 388 390 393 397 401 407 413 414 425 428 430 435 437 441 447 448 457 462 463
469 470 471 472 476 483 487 515 546 555 558 570 579 583 587 593 594 596 609 613 617 621 629 637 657 658 701 717 724 763
768 774 776 779 780 787 805 812 815 820 824 833 847 852 866 875 883 889 895 907 928 931 932 933 934 936 937 943 945 947
948 949 951 953 954 957 963 965 967 980 981 983 988
"""
PLACES = {
    "imagenet-a": [int(place) for place in _A.split()],
    "imagenet-r": [int(place) for place in _R.split()],
    "imagenet-sketch": list(range(1000)),
}
"""Class k of a set, its folders being sorted by name, is this one of the 1000 of ImageNet-1k in standard order."""


@dataclass(frozen=True)
class Clean:
    """The images that stand for those trained on. `top1` in percent."""

    images: int
    top1: float


@dataclass(frozen=True)
class ShiftedScores:
    """Accuracies in percent on a set, among its `classes` only. `clean_top1`: on the clean images of the same classes,
    among them only; None without such images.
    """

    name: str
    images: int
    classes: int
    top1: float
    top5: float
    clean_top1: float | None

    @classmethod
    def of(cls, name: str, scores: Scores, clean: Scores | None) -> ShiftedScores:
        """From the scores on the set, and on the clean images of its classes."""
        same = clean.top1 if clean is not None and clean.images else None
        return cls(name, scores.images, scores.classes, scores.top1, scores.top5, same)


@dataclass(frozen=True)
class Robustness:
    """What `robustness.json` holds.

    `corruptions`: top-1 in percent at severities 1 to 5 by name. `mean_top1`: their mean. `mce`: mean corruption error
    in percent: the mean over corruptions of (errors summed over severities / AlexNet's) (Hendrycks & Dietterich,
    section 4.1; `ALEXNET_ERRORS`); None where that says nothing.
    """

    clean: Clean | None
    sets: list[ShiftedScores]
    corruptions: dict[str, list[float]]
    mean_top1: float | None
    mce: float | None

    @classmethod
    def of(
        cls, clean: Scores | None, sets: list[ShiftedScores], corrupted: Mapping[str, float], comparable: bool
    ) -> Robustness:
        """From the clean scores, and top-1 by names of views. `comparable`: 1000 classes of ImageNet-1k, corruptions as
        in ImageNet-C. Without that, or without some corruption, there is no `mce`.
        """
        reference = Clean(clean.images, clean.top1) if clean is not None else None
        names = [name for name in ALEXNET_ERRORS if view_name(name, 1) in corrupted]
        tops = {name: [corrupted[view_name(name, level + 1)] for level in range(SEVERITIES)] for name in names}
        errors = {name: 100 - mean(values) for name, values in tops.items()}
        ratios = [100 * error / ALEXNET_ERRORS[name] for name, error in errors.items()]
        mce = mean(ratios) if comparable and len(ratios) == len(ALEXNET_ERRORS) else None
        return cls(reference, sets, tops, 100 - mean(errors.values()) if errors else None, mce)

    def summary(self) -> dict[str, float]:
        """NAME_top1 of each set; corruptions_top1 and mce, where there are any."""
        numbers = {"corruptions_top1": self.mean_top1, "mce": self.mce}
        found = {f"{item.name}_top1": item.top1 for item in self.sets}
        return found | {name: value for name, value in numbers.items() if value is not None}

    @property
    def headline(self) -> str:
        """The corruptions in a line."""
        assert self.clean is not None
        assert self.mean_top1 is not None
        share = (
            f", {100 * self.mean_top1 / self.clean.top1:.1f} % of the clean {self.clean.top1:.2f}"
            if self.clean.top1
            else ""
        )
        mce = (
            f"; mCE {self.mce:.1f} over these {len(self.corruptions)} (published ones are over 15)" if self.mce else ""
        )
        return f"corruptions: mean top-1 {self.mean_top1:.2f}{share}{mce}"

    @property
    def table(self) -> list[dict[str, object]]:
        """A row per corruption: top-1 by severity, and the mean."""
        return [
            {"corruption": name, **{str(severity): top1 for severity, top1 in enumerate(tops, 1)}, "mean": mean(tops)}
            for name, tops in self.corruptions.items()
        ]

    def write(self, folder: Path) -> None:
        """Leaves `robustness.json`, `.csv` (a row per set and per severity) and `.png` in a folder."""
        write_atomic(folder / ROBUSTNESS_FILE, json.dumps(asdict(self), indent=1) + "\n")
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["name", "severity", "images", "classes", "top1", "top5", "clean_top1"])
        for item in self.sets:
            clean = "" if item.clean_top1 is None else f"{item.clean_top1:.2f}"
            rows.writerow([item.name, "", item.images, item.classes, f"{item.top1:.2f}", f"{item.top5:.2f}", clean])
        for name, tops in self.corruptions.items():
            assert self.clean is not None
            for severity, top1 in enumerate(tops, 1):
                rows.writerow([name, severity, self.clean.images, "", f"{top1:.2f}", "", f"{self.clean.top1:.2f}"])
        write_atomic(folder / "robustness.csv", text.getvalue())
        write_atomic(folder / "robustness.png", self.picture())

    def picture(self) -> bytes:
        """A .png: bars of top-1 on each set beside that on clean images of its classes, and of the mean over severities
        of each corruption, with a dot per severity and a line at the clean top-1.
        """
        from matplotlib.figure import Figure  # takes a second, which only a picture is worth

        draw = [self._draw_sets] * bool(self.sets) + [self._draw_corruptions] * bool(self.corruptions)
        heights = [0.9 + 0.5 * len(self.sets)] * bool(self.sets)
        heights += [0.9 + 0.3 * len(self.corruptions)] * bool(self.corruptions)
        figure = Figure(figsize=(8, sum(heights)), dpi=120, layout="constrained", facecolor="white")
        panels = figure.subplots(len(draw), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, axes in zip(draw, panels, strict=True):
            names = part(axes)
            axes.set_yticks(range(len(names)), names, parse_math=False)
            axes.set(xlim=(0, 108), xticks=range(0, 101, 20), xlabel="top-1 in %", ylim=(len(names) - 0.4, -0.6))
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        return png.getvalue()

    def _draw_sets(self, axes: Axes) -> list[str]:
        clean = [(place, item.clean_top1) for place, item in enumerate(self.sets) if item.clean_top1 is not None]
        shifted = [(place, item.top1) for place, item in enumerate(self.sets)]
        for bars, offset, colour, label in (
            (clean, -0.2, GREY, "clean"),
            (shifted, 0.2, BLUE, "shifted, same classes"),
        ):
            if bars:
                places, tops = zip(*bars, strict=True)
                drawn = axes.barh(np.add(places, offset), tops, 0.36, color=colour, label=label)
                axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
        axes.set_title("shifted sets")
        return [item.name for item in self.sets]

    def _draw_corruptions(self, axes: Axes) -> list[str]:
        assert self.clean is not None
        axes.barh(
            range(len(self.corruptions)),
            [mean(tops) for tops in self.corruptions.values()],
            0.7,
            color=BLUE,
            label="mean",
        )
        axes.axvline(self.clean.top1, color="black", linestyle="--", linewidth=1, label="clean")
        places = np.repeat(range(len(self.corruptions)), SEVERITIES)
        dots = np.ravel(list(self.corruptions.values()))
        axes.scatter(dots, places, 16, YELLOW, edgecolors="black", linewidths=0.5, zorder=3, label="severity 1 to 5")
        for place, tops in enumerate(self.corruptions.values()):
            axes.text(101, place, f"{mean(tops):.1f}", va="center", fontsize=8)
        axes.set_title(f"corruptions: mean top-1 {self.mean_top1:.1f} %")
        return list(self.corruptions)


@dataclass(frozen=True)
class Shifted:
    """A set to judge on. `source`: labels are places in `kept`. `kept` [k]: its classes, ascending, as places among the
    classifier's.
    """

    source: Source
    kept: Tensor

    def among(self, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The scores [B,k] of these classes, of those [B,K] that a classifier gives."""
        return lambda images: (scores := model(images))[:, self.kept.to(scores.device)]


def open_shifted(name: str, path: str, names: Sequence[str]) -> Shifted:
    """A set by its name and path, for a classifier of these class names.

    A set of the user's has the same class names, or some of them, and is judged among these. Sets of `IMAGENET` are for
    1000 classes in standard order, or with the sets' names: A, R and Sketch have folders whose sorted names are
    ascending classes, so all of them have to be there; the folders of V2 are named by number. A and R are judged among
    their 200 classes. Raises `DataError`.
    """
    if name in IMAGENET:
        if len(names) != 1000:
            raise DataError(
                f"{name} has the classes of ImageNet-1k, but this classifier knows {len(names)} classes, not 1000; "
                "a set with its own class names is given under another name"
            )
        source = open_source([path], labelled=True)
        where = _imagenet_places(name, path, sorted(source.classes), names)
        kept = list(range(1000)) if name == "imagenet-v2" else sorted(where.values())
        places = np.array([where[folder] for folder in source.classes])[source.labels]
    else:
        source = open_source([path], labelled=True, classes=names)
        places = source.labels
        kept = np.unique(places).tolist()
        if len(kept) < 2:
            raise DataError(
                f"{path} has images of one class only ({names[kept[0]]}): among one class every answer is right; "
                "give at least two"
            )
    source.labels = np.searchsorted(kept, places)
    source.classes = [names[place] for place in kept]
    return Shifted(source, torch.tensor(kept))


def _imagenet_places(name: str, path: str, folders: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Folders of a known set, sorted by name -> their classes as places among the classifier's names."""
    if name == "imagenet-v2":
        wrong = [folder for folder in folders if not folder.isdecimal() or int(folder) >= 1000]
        if wrong:
            raise DataError(
                f"{path}: the folders of ImageNet-V2 are the numbers of classes, 0 to 999; '{wrong[0]}' is none. "
                "A set with the classifier's class names is given under another name"
            )
        return {folder: int(folder) for folder in folders}
    if len(folders) != IMAGENET[name]:
        raise DataError(
            f"{path} has {len(folders)} class folders, {name} has {IMAGENET[name]}: which class a folder is follows "
            "from its place among all of them, sorted by name, so none may be missing"
        )
    known = {known: place for place, known in enumerate(names)}
    if known.keys() >= set(folders):
        return {folder: known[folder] for folder in folders}
    return dict(zip(folders, PLACES[name], strict=True))


def judge_views(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device | str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: int,
    subsets: Mapping[str, Tensor],
    total: int,
) -> tuple[Scores, dict[str, Scores], dict[str, float]]:
    """Judges `predict` (normalised images [B,3,H,W] -> [B,K]) on every view of labelled batches, read once.

    Returns the scores of the view `image`; the same by the names of `subsets` [k], ascending classes: of the images
    whose class is among them, all other classes being left out; and the top-1 in percent of every other view. `total`:
    batches, for the bar of progress. Raises `DataError` if no image can be read, or labels are missing.
    """
    scores = Scores(classes, device)
    parts = {name: Scores(len(kept), device) for name, kept in subsets.items()}
    subsets = {name: kept.to(device) for name, kept in subsets.items()}
    right: dict[str, Tensor] = {}
    for batch in track(batches, "evaluation", total, console=Console(stderr=True), transient=True):
        if not len(batch):
            continue
        labels = known_labels(batch).to(device)
        for name, view in batch.views.items():
            logits = predict(prepare_view(view, device, mean, std))
            if name != "image":
                right[name] = right.get(name, 0) + (logits.argmax(dim=1) == labels).sum()
                continue
            scores.update(logits, labels)
            for subset, kept in subsets.items():
                rows = torch.isin(labels, kept)
                parts[subset].update(logits[rows][:, kept], torch.searchsorted(kept, labels[rows]))
    if not scores.images:
        raise DataError("nothing to evaluate: no image could be read")
    return scores, parts, {name: 100 * int(count) / scores.images for name, count in right.items()}
