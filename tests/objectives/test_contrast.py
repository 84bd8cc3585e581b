import math

import torch
from torch.testing import assert_close

from mimlet.objectives.contrast import info_nce
from tests.shared import golden


def test_equals_official() -> None:
    oracle = golden("mocov3_loss")
    loss = info_nce(oracle.io["q"], oracle.io["k"], oracle.meta["config"]["T"])
    assert_close(loss, oracle.io["loss_qk"][0], **oracle.tolerance)


def test_by_hand() -> None:
    """Two orthogonal pairs at temperature 0.5: -log(e^2 / (e^2 + 1)), times 1. Lengths do not matter."""
    eye = torch.eye(2)
    assert_close(info_nce(3 * eye, 7 * eye, 0.5), torch.tensor(math.log(1 + math.exp(-2))))
    assert_close(info_nce(eye, eye.flip(0), 0.5), torch.tensor(2 + math.log(1 + math.exp(-2))))


def test_everything_alike_is_the_logarithm_of_the_keys() -> None:
    """The value of collapse: 2 tau ln m."""
    assert_close(info_nce(torch.ones(4, 3), torch.ones(12, 3), 0.2), torch.tensor(0.4 * math.log(12)))


def test_parts_of_the_queries_average_to_the_whole() -> None:
    """What processes do: own queries, everybody's keys, own numbers."""
    torch.manual_seed(0)
    q, k = torch.randn(6, 4), torch.randn(6, 4)
    parts = [info_nce(q[i : i + 2], k, 0.2, i) for i in (0, 2, 4)]
    assert_close(torch.stack(parts).mean(), info_nce(q, k, 0.2))


def test_gradients() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, 0.2, 0), (q, k))


def test_half_precision_does_not_reach_the_logits() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = info_nce(q, k, 0.01)
    assert torch.equal(got, info_nce(q, k, 0.01))
    assert info_nce(q.bfloat16(), k, 0.01).dtype == torch.float32
