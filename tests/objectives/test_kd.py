import math

import torch
from torch.testing import assert_close

from mimlet.objectives.kd import hard_distillation, soft_distillation


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    weights = [math.exp(value / tau) for value in row]
    return [weight / sum(weights) for weight in weights]


STUDENT = [[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]
TEACHER = [[0.2, 0.1, 4.0], [2.0, 0.0, 1.0]]


def test_hard_distillation_is_the_log_likelihood_of_the_teachers_choice() -> None:
    expected = -(math.log(softmax(STUDENT[0])[2]) + math.log(softmax(STUDENT[1])[0])) / 2
    loss = hard_distillation(torch.tensor(STUDENT), torch.tensor(TEACHER))
    assert_close(loss, torch.tensor(expected))


def test_soft_distillation_divides_by_the_number_of_logits() -> None:
    tau, total = 3.0, 0.0
    for student, teacher in zip(STUDENT, TEACHER, strict=True):
        pairs = zip(softmax(teacher, tau), softmax(student, tau), strict=True)
        total += sum(t * math.log(t / s) for t, s in pairs)
    loss = soft_distillation(torch.tensor(STUDENT), torch.tensor(TEACHER), tau)
    assert_close(loss, torch.tensor(tau**2 * total / 6))


def test_soft_distillation_of_a_copy_is_zero_and_counts_in_full_precision() -> None:
    logits = torch.tensor(STUDENT)
    assert_close(soft_distillation(logits, logits), torch.tensor(0.0))
    assert soft_distillation(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32
