"""The benchmark's contenders compute the same: a ratio between different losses would mean nothing."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks import ours, plain, plain_baselines
from benchmarks.contenders import images
from benchmarks.plain import Case, Shape
from benchmarks.plain_baselines import BASELINES, Baseline

BATCH = 2
SIZES = {
    "student": Shape(48, 3, 6),
    "teacher": Shape(64, 4, 4),
    "decoder": Shape(32, 4, 2),
    "student_decoder": Shape(16, 2, 2),
    "size": 32,
    "patch": 8,
}
"""Unequal widths, depths and head counts."""


def both(method: str, bf16: bool) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The loss and the gradients, of our method and of the plain formulation."""
    case = Case(method, **SIZES)
    pixels, noise = images(BATCH, case.size), plain.noises(BATCH, case)()
    made, written = ours.method(case, bf16), plain.METHODS[method](case)
    plain.fill(written)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        our_loss = ours.loss_of(made, ours.batch_of(made, pixels, noise))
        plain_loss = written(pixels, noise)
    results: list[Tensor | dict[str, Tensor]] = []
    for loss, model in ((our_loss, made), (plain_loss, written)):
        loss.backward()
        gradients = {name: p.grad for name, p in plain.parameters(model).items() if p.grad is not None}
        results += [loss.detach(), gradients]
    return tuple(results)  # type: ignore[return-value]


@pytest.mark.parametrize("method", plain.METHODS)
def test_ours_and_the_plain_formulation_have_one_loss_and_one_gradient(method: str) -> None:
    our_loss, our_gradients, plain_loss, plain_gradients = both(method, bf16=False)
    assert_close(our_loss, plain_loss, rtol=1e-4, atol=0.0)
    ours_alike = {name: our_gradients[name].view_as(gradient) for name, gradient in plain_gradients.items()}
    assert_close(ours_alike, plain_gradients, rtol=1e-3, atol=1e-5)
    assert our_gradients.keys() == plain_gradients.keys()


@pytest.mark.parametrize("method", plain.METHODS)
def test_in_bf16_they_stay_together(method: str) -> None:
    our_loss, _, plain_loss, _ = both(method, bf16=True)
    assert_close(our_loss, plain_loss, rtol=0.03, atol=0.0)


def both_baselines(method: str, bf16: bool) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The same of a baseline; its image has 16 patches."""
    case = Baseline(method, Shape(48, 3, 6), size=32, patch=8, codes=50, outputs=64, hidden=40, locals=2)
    given = plain_baselines.inputs(case, 4)
    made, written = ours.baseline(case, given), BASELINES[method](case)
    plain.fill(written)
    written.begin()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        our_loss = ours.loss_of(made, ours.baseline_batch(case, given))
        plain_loss = written(given)
    results: list[Tensor | dict[str, Tensor]] = []
    for loss, model, finish in (
        (our_loss, made, lambda: made.on_gradients(ours.CLOCK)),
        (plain_loss, written, written.clip),
    ):
        loss.backward()
        finish()
        gradients = {name: p.grad for name, p in plain.parameters(model).items() if p.grad is not None}
        results += [loss.detach(), gradients]
    return tuple(results)  # type: ignore[return-value]


@pytest.mark.parametrize("method", BASELINES)
def test_ours_and_the_plain_baseline_have_one_loss_and_one_gradient(method: str) -> None:
    our_loss, our_gradients, plain_loss, plain_gradients = both_baselines(method, bf16=False)
    assert_close(our_loss, plain_loss, rtol=1e-4, atol=0.0)
    assert our_gradients.keys() == plain_gradients.keys()
    assert_close(our_gradients, plain_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_stay_together_in_bf16(method: str) -> None:
    our_loss, _, plain_loss, _ = both_baselines(method, bf16=True)
    assert_close(our_loss, plain_loss, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("method", ["bootmae", "dino", "mocov3"])
def test_their_followers_follow_alike(method: str) -> None:
    case = Baseline(method, Shape(24, 2, 3), size=32, patch=8, outputs=64, hidden=40, locals=2)
    ours_step, plain_step = ours.mimlet_baseline(4, False, case), plain_baselines.step(4, False, case)
    mine, written = [ours_step() for _ in range(4)], [plain_step() for _ in range(4)]
    assert mine == pytest.approx(written, rel=2e-3)
    assert len(set(mine)) == 4
