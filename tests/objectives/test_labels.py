import math

import pytest
import torch
from torch.testing import assert_close

from mimlet.objectives.labels import sigmoid_cross_entropy

LOGITS = [[1.0, -2.0, 0.5], [0.0, -1.0, 3.0]]


def plain(logits: list[list[float]], shares: list[list[float]]) -> float:
    """The sum over classes, the mean over images."""
    total = 0.0
    for row, wanted in zip(logits, shares, strict=True):
        for x, t in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-x))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total / len(logits)


@pytest.mark.parametrize(
    ("targets", "smoothing", "shares"),
    [
        ([0, 2], 0.0, [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        ([0, 2], 0.3, [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]),
        ([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], 0.0, [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]),
    ],
)
def test_every_class_is_judged_by_itself(targets: list[object], smoothing: float, shares: list[list[float]]) -> None:
    loss = sigmoid_cross_entropy(torch.tensor(LOGITS), torch.tensor(targets), smoothing)
    assert_close(loss, torch.tensor(plain(LOGITS, shares)))


def test_gradient_is_probability_minus_share() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2])
    sigmoid_cross_entropy(logits, targets).backward()
    assert_close(logits.grad, (logits.sigmoid() - torch.eye(3, dtype=torch.float64)[targets]).detach() / 2)


def test_scores_of_any_size_stay_finite() -> None:
    loss = sigmoid_cross_entropy(torch.tensor([[-200.0, 200.0]]), torch.tensor([0]))
    assert_close(loss, torch.tensor(400.0))
