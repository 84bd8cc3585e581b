"""The loss between crops, held against a plain formulation of the paper's algorithm 1."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mimlet.objectives.dino import dino_loss


def plain(student: Tensor, teacher: Tensor, centre: Tensor, tau_s: float, tau_t: float) -> Tensor:
    """-sum p_t log p_s, pair by pair."""
    losses = [
        -(((t - centre) / tau_t).softmax(dim=-1) * (s / tau_s).softmax(dim=-1).log()).sum(dim=-1).mean()
        for i, t in enumerate(teacher)
        for v, s in enumerate(student)
        if i != v
    ]
    assert len(losses) == 2 * len(student) - 2
    return torch.stack(losses).mean()


def logits(crops: int, K: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(crops)
    draw = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((crops, 3, K), (2, 3, K), (K,))]
    return draw[0].div(5).requires_grad_(), draw[1] / 20, draw[2] / 20


@pytest.mark.parametrize("crops", [2, 5])
def test_values_and_gradients_are_those_of_the_plain_sum(crops: int) -> None:
    student, teacher, centre = logits(crops)
    loss, entropy = dino_loss(student, teacher, centre, 0.1, 0.04)
    expected = plain(student, teacher, centre, 0.1, 0.04)
    assert_close(loss, expected)
    assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, expected)))
    target = ((teacher - centre) / 0.04).softmax(dim=-1)
    assert_close(entropy, -(target * target.log()).sum(dim=-1).mean())
    divergence = [
        (target[i] * (target[i].log() - (student[v] / 0.1).log_softmax(dim=-1))).sum(dim=-1).mean()
        for i in range(2)
        for v in range(crops)
        if i != v
    ]
    assert_close(loss - entropy, torch.stack(divergence).mean())


def test_numbers_worked_out_by_hand() -> None:
    """A teacher that knows, a student that does not: log K. Centring away what the teacher knows: entropy log K."""
    teacher = torch.tensor([[[1.0, 0, 0, 0]], [[1.0, 0, 0, 0]]])
    loss, entropy = dino_loss(torch.zeros(3, 1, 4), teacher, torch.zeros(4), 0.1, 0.01)
    assert loss.item() == pytest.approx(math.log(4))
    assert entropy.item() == pytest.approx(0, abs=1e-6)
    loss, entropy = dino_loss(torch.zeros(3, 1, 4), teacher, teacher[0, 0], 0.1, 0.01)
    assert entropy.item() == loss.item() == pytest.approx(math.log(4))


def test_sharp_logits_stay_finite_under_autocast() -> None:
    student = (40 * torch.randn(4, 2, 50)).requires_grad_()
    teacher = 40 * torch.randn(2, 2, 50)
    exact = dino_loss(student, teacher, torch.zeros(50), 0.1, 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        loss, entropy = dino_loss(student, teacher, torch.zeros(50), 0.1, 0.04)
    assert_close((loss, entropy), exact)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
