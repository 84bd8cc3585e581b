import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.testing import assert_close

from mimlet.data.batch import Batch
from mimlet.errors import DataError
from mimlet.tasks.metrics import Scores, evaluate_classifier, evaluating

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def ranked(*orders: list[int], classes: int = 7) -> Tensor:
    """Scores that rank the listed classes first, in this order."""
    scores = torch.zeros(len(orders), classes)
    for row, order in enumerate(orders):
        for place, index in enumerate(order):
            scores[row, index] = 10 - place
    return scores


def example() -> tuple[Tensor, Tensor]:
    scores = ranked([0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 4, 3, 2, 0], [5, 6, 4, 3, 2], [6, 5, 4, 3, 2])
    return scores, torch.tensor([0, 0, 0, 0, 6])


def scored(scores: Tensor, labels: Tensor) -> Scores:
    counted = Scores(scores.shape[1])
    counted.update(scores, labels)
    return counted


def test_exact_numbers() -> None:
    counted = scored(*example())
    assert counted.summary() == {"top1": 40.0, "top5": 80.0}
    assert counted.images == 5
    assert counted.confusion[0].tolist() == [1, 1, 0, 0, 0, 2, 0]
    assert counted.confusion[6, 6] == 1
    assert counted.confusion.sum() == 5
    nan = float("nan")
    assert_close(counted.per_class.float(), torch.tensor([25.0, nan, nan, nan, nan, nan, 100.0]), equal_nan=True)


def test_batches_add_up() -> None:
    scores, labels = example()
    whole, parts = scored(scores, labels), Scores(7)
    for start in (0, 2, 4):
        parts.update(scores[start : start + 2], labels[start : start + 2])
    assert torch.equal(whole.confusion, parts.confusion)
    assert whole.summary() == parts.summary()


def test_few_classes_have_no_top5() -> None:
    assert scored(torch.eye(5), torch.tensor([0, 1, 2, 3, 0])).summary() == {"top1": 80.0}


def test_an_impossible_class_is_never_right() -> None:
    scores = torch.tensor([[1.0, *[-torch.inf] * 6]])
    assert [scored(scores, torch.tensor([label])).top5 for label in range(7)] == [100.0, *[0.0] * 6]


def count_in_process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    scores, labels = example()
    part = Scores(7)
    part.update(scores[rank::2], labels[rank::2])
    part.sync()
    torch.save((part.confusion, part.summary()), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_count_together(tmp_path: Path) -> None:
    start_processes(count_in_process, (tmp_path,), nprocs=2, start_method="fork")
    whole = scored(*example())
    for rank in range(2):
        confusion, summary = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(confusion, whole.confusion)
        assert summary == whole.summary()


def test_per_class_table(tmp_path: Path) -> None:
    names = ["ant", "bee, wild", "cat", "dog", "eel", "fox", "gnu"]
    scored(*example()).write_per_class(tmp_path / "classes.csv", names)
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == names
    assert rows[0] == {"class": "ant", "images": "4", "top1": "25.00", "taken_for": "fox", "times": "2"}
    assert rows[1] == {"class": "bee, wild", "images": "0", "top1": "", "taken_for": "", "times": "0"}
    assert rows[6] == {"class": "gnu", "images": "1", "top1": "100.00", "taken_for": "", "times": "0"}


@pytest.mark.parametrize("classes", [2, 15, 40, 100])
def test_confusion_picture(tmp_path: Path, classes: int) -> None:
    counted = Scores(classes)
    counted.update(torch.eye(classes).roll(1, 1), torch.arange(classes))
    names = [f"Ünïcode $x_{i} 動物 with a rather long name" for i in range(classes)]
    counted.confusion_picture(tmp_path / "confusion.png", names)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert 500 <= min(picture.size) <= max(picture.size) <= 1600
        counts = picture.convert("RGB").getcolors(2**24)
    assert counts is not None
    pixels = {colour: count for count, colour in counts}
    all_, none = (
        pixels[253, 231, 55],
        pixels[0, 34, 77],
    )  # the ends of the colour map: every class is taken for the next
    assert all_ / (all_ + none) == pytest.approx(1 / classes, rel=0.1)


def batches(*labels: list[int] | None) -> Iterator[Batch]:
    for part in labels:
        count = 2 if part is None else len(part)
        images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
        if part is not None:
            images[:, 0] = torch.tensor(part, dtype=torch.uint8).view(-1, 1, 1)
        known = None if part is None else torch.tensor(part, dtype=torch.int64)
        yield Batch({"image": images}, torch.arange(count), labels=known)


def read_label(images: Tensor) -> Tensor:
    """Predicts what the red channel says, but 3 for 2."""
    label = (images[:, 0, 0, 0] * 255).round().long()
    return nn.functional.one_hot(label.where(label != 2, 3), 4).float()


def test_evaluate_classifier() -> None:
    scores = evaluate_classifier(read_label, batches([0, 1, 2], [], [3]), "cpu", MEAN, STD, 4)
    assert scores.summary() == {"top1": 75.0}
    assert scores.confusion.nonzero().tolist() == [[0, 0], [1, 1], [2, 3], [3, 3]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 4]], r"label 4 is beyond the 4 classes that the classifier knows \(0 to 3\)"),
        ([[0, -1]], "images without labels; give a folder with one subfolder per class"),
        ([None], "images without labels"),
        ([[]], "no image could be read"),
    ],
)
def test_unfit_labels_are_refused(labels: list[list[int] | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_classifier(read_label, batches(*labels), "cpu", MEAN, STD, 4)


def test_evaluating_restores_the_modes() -> None:
    trains, judges = nn.Dropout(), nn.Dropout().eval()
    with evaluating(trains, judges):
        assert not trains.training
        assert not judges.training
    assert trains.training
    assert not judges.training
