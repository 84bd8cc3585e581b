"""The benchmark's contenders compute the same: a ratio between different losses would mean nothing."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks import dense_speed, hierarchical_step, ours, plain, plain_baselines, plain_hierarchical
from benchmarks.alternate import Job, Measured
from benchmarks.contenders import images
from benchmarks.dense_speed import Dense
from benchmarks.plain import Case, Shape
from benchmarks.plain_baselines import BASELINES, Baseline
from benchmarks.plain_hierarchical import Hierarchical
from mimlet.models.shapes import HieraShape, HiViTShape

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


HIVIT = HiViTShape(32, 4, 64, (1, 2, 3), 4)
ITPN = replace(HIVIT, pyramid_dim=16, pyramid_depth=2, pyramid_hidden=64)
HIERARCHICAL = {
    "hiera": Hierarchical(HieraShape(32, 4, 24, (1, 1, 3, 1), 1), Shape(32, 2, 4), 0.6),
    "hivit": Hierarchical(HIVIT, Shape(32, 2, 4), 0.75),
    "itpn": Hierarchical(ITPN, Shape(32, 2, 4), 0.75),
    "itpn+mfm": Hierarchical(ITPN, Shape(32, 2, 4), 0.75, features=True),
}


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_hierarchical_pretraining_and_the_plain_formulation_have_one_loss_and_one_gradient(name: str) -> None:
    case = HIERARCHICAL[name]
    pixels, draw = plain_hierarchical.draws(BATCH, case)
    noise, made, written = draw(), ours.hierarchical(case), plain_hierarchical.written(case)
    plain.fill(written)
    losses = ours.loss_of(made, ours.batch_of(made, pixels, noise)), written(pixels, noise)
    assert_close(losses[0], losses[1], rtol=1e-5, atol=0.0)
    found = []
    for loss, model in zip(losses, (made, written), strict=True):
        loss.backward()
        found.append({n: p.grad for n, p in plain.parameters(model).items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("peer", ["plain", "timm", "transformers"])
def test_all_hieras_train_alike(peer: str) -> None:
    if peer == "transformers":
        pytest.importorskip("transformers")
    steps = {job.label: job for job in hierarchical_step.contenders(HIERARCHICAL["hiera"], False)}
    mine, theirs = (run(steps[name], 3) for name in ("mimlet", peer))
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert len(set(mine)) == 3


def test_the_moving_average_of_itpn_moves_alike() -> None:
    mine, written = (run(job, 4) for job in hierarchical_step.contenders(HIERARCHICAL["itpn+mfm"], False))
    assert mine == pytest.approx(written, rel=1e-4)


def run(job: Job, steps: int) -> list[float]:
    module, name = job.contender.split(":")
    step = getattr(import_module(f"benchmarks.{module}"), name)(BATCH, job.bf16, *job.options)
    return [step() for _ in range(steps)]


def test_every_case_of_the_hierarchical_benchmark_is_an_encoder_and_a_decoder_of_it() -> None:
    for name in hierarchical_step.CASES:
        case = hierarchical_step.case(name, "cpu")
        assert case.units == (49 if name.startswith("hiera") else 196)
        assert case.features == name.endswith("+mfm")
        assert isinstance(case.shape, HieraShape) or bool(case.shape.pyramid_dim) == name.startswith("itpn")


def test_dense_variants_change_what_they_should() -> None:
    shape = replace(ITPN, form="fast", stages=(1, 1, 8), position="learned", layer_scale=0.1)
    cases = {
        name: Dense(variant, shape, 88)  # 22 x 22 patches: windows of 14 do not divide them
        for name, variant in dense_speed.variants(shape, ratios=[0, 40]).items()
    }
    changes = dense_speed.changes(cases)
    assert len(cases) == 9
    assert changes["plain"] == changes["migration 0 %"] == [0.0] * 3
    assert changes["window + gathering + migration 0 %"] == changes["window + gathering"]
    moved = [change for name, change in changes.items() if name not in ("plain", "migration 0 %")]
    assert all(1e-4 < level < 1 for change in moved for level in change)
    assert changes["window, 4 global blocks"] < changes["window"]


def test_a_dense_pass_and_its_table() -> None:
    plain_case, window_case = (Dense(shape, ITPN, 64) for shape in dense_speed.variants(ITPN, ["window"]).values())
    passed = dense_speed.step(1, False, plain_case)()
    assert dense_speed.step(1, True, plain_case)() == pytest.approx(passed, rel=0.05)
    assert dense_speed.step(1, False, window_case)() != passed
    measured = {"plain": Measured([2.0, 4.0, 9.0], 300.0, 0.0), "window": Measured([1.0, 2.0, 3.0], 150.0, 0.0)}
    rows = dense_speed.table(measured, {name: [0.1, 0.2, 0.3] for name in measured}, batch=8)
    assert rows[1] == {
        "variant": "window", "images_per_second": 4.0, "speed": 2.0, "memory_mb": 150.0, "memory": 0.5,
        "change_fine": 0.1, "change_middle": 0.2, "change_coarse": 0.3,
    }  # fmt: skip
    assert dense_speed.lines(rows)[2].split() == ["window", "4.00", "2.00", "150", "0.50", "0.100", "0.200", "0.300"]
