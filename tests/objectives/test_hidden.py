import torch
from torch.testing import assert_close

from mimlet.objectives.hidden import hidden_loss, hidden_target
from tests.shared import golden


def test_equals_official_losses() -> None:
    oracle = golden("g2sd_generic")
    io = oracle.io
    target = hidden_target(io["teacher_decoder_hidden"])
    assert_close(target, io["teacher_decoder_target"], **oracle.tolerance)
    assert_close(hidden_target(io["teacher_encoder_prenorm"]), io["teacher_encoder_target"], **oracle.tolerance)
    loss = hidden_loss(io["student_decoder_pred"], io["teacher_decoder_hidden"])
    assert_close(loss, io["loss_decoder_all"][0], **oracle.tolerance)
    loss = hidden_loss(io["student_encoder_pred"], io["teacher_encoder_prenorm"])
    assert_close(loss, io["loss_encoder"][0], **oracle.tolerance)


def test_target_has_mean_zero_and_deviation_one_per_token() -> None:
    states = 7 + 3 * torch.randn(2, 5, 64)
    target = hidden_target(states.to(torch.float16))
    assert target.dtype == torch.float32
    assert_close(target.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    assert_close(target.std(-1, correction=0), torch.ones(2, 5), atol=1e-4, rtol=0)


def test_loss_by_hand() -> None:
    """The target of (-1, 1) is (-1, 1); beta 2: d^2 / 4 below a difference of 2, d - 1 above."""
    states = torch.tensor([[[-1.0, 1.0]]])
    assert_close(hidden_loss(torch.tensor([[[0.0, 1.0]]]), states), torch.tensor(1 / 4 / 2), atol=1e-5, rtol=0)
    assert_close(hidden_loss(torch.tensor([[[-1.0, 6.0]]]), states), torch.tensor(4.0 / 2), atol=1e-5, rtol=0)
    assert_close(hidden_loss(torch.tensor([[[-1.0, 3.0]]]), states), torch.tensor(1.0 / 2), atol=1e-5, rtol=0)
