"""The benchmark's contenders compute the same: a ratio between different losses would mean nothing."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks import (
    contenders,
    dense_speed,
    formats,
    hierarchical_step,
    loader,
    ours,
    plain,
    plain_baselines,
    plain_hierarchical,
    pretrain_step,
)
from benchmarks.alternate import Job, Measured
from benchmarks.contenders import images
from benchmarks.dense_speed import Dense
from benchmarks.plain import Case, Shape
from benchmarks.plain_baselines import BASELINES, Baseline
from benchmarks.plain_hierarchical import Hierarchical
from mimlet.data import packing
from mimlet.models.shapes import HieraShape, HiViTShape
from tests.data.images import make_folder

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


MAE = Case("mae", Shape(48, 3, 6), student_decoder=Shape(32, 2, 4), size=32, patch=8)


def test_mae_and_the_plain_formulation_train_alike() -> None:
    steps = {job.label: job for job in pretrain_step.contenders(MAE, False)}
    mine, written = (run(steps[name], 3) for name in ("mimlet", "plain"))
    assert mine == pytest.approx(written, rel=1e-5)
    assert len(set(mine)) == 3


def test_all_maes_are_as_large() -> None:
    pytest.importorskip("transformers")
    models = ours.mae(MAE), plain.PlainMAE(MAE), contenders.transformers_model(MAE)
    sizes = {sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models}
    assert len(sizes) == 1
    assert contenders.transformers_mae(BATCH, True, MAE)() > 0


def test_the_work_of_a_step_by_hand() -> None:
    """One block of width 8 each, over the class token and one of 4 visible patches, then 5 tokens: 2 FLOP per
    multiplication, backward twice forward; images need no gradient.
    """
    case = Case("mae", Shape(8, 1, 2), student_decoder=Shape(8, 1, 2), size=16, patch=8)
    embed, mapped = 1 * 192 * 8, 2 * 8 * 8
    encoder = 2 * 12 * 8 * 8 + 2 * 2 * 2 * 8
    decoder = 3 * 8 * 8 + 5 * 2 * 8 * 8 + 3 * 9 * 8 * 8 + 2 * 3 * 5 * 8  # queries and MLP of the 3 hidden patches only
    prediction = 3 * 8 * 192
    expected = 2 * (2 * embed + 3 * (encoder + mapped + decoder + prediction))
    assert ours.work(case) * 1e9 == pytest.approx(expected)
    deeper = [ours.work(Case("d2mae", **{**SIZES, "teacher": Shape(64, depth, 4)})) for depth in (4, 5)]
    assert (deeper[1] - deeper[0]) * 1e9 == pytest.approx(2 * (5 * 12 * 64 * 64 + 2 * 5 * 5 * 64))  # forward only


def test_the_ceiling_does_the_products_of_the_blocks() -> None:
    case = Case("mae", Shape(8, 2, 2), student_decoder=Shape(4, 1, 2), size=16, patch=8)
    gflop = ours.products(3, True, case)()
    assert gflop == pytest.approx(2e-9 * 3 * (2 * 2 * 12 * 8 * 8 + 5 * 12 * 4 * 4))


def test_a_table_of_steps() -> None:
    seconds = {"mimlet": 2.0, "plain": 5.0, "ceiling": 0.5}
    results = {label: Measured([value], 300.0, 50.0) for label, value in seconds.items()}
    lines = [line.split() for line in pretrain_step.table(results, gflop=100.0)]
    assert lines[1] == ["mimlet", "2.000", "1.00", "300", "50", "50%"]
    assert lines[2] == ["plain", "5.000", "2.50", "300", "20", "20%"]
    assert lines[3] == ["ceiling", "1.000", "0.50", "100"]


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


def test_formats_hold_the_same_records(tmp_path: Path) -> None:
    """Those whose libraries are installed for tests."""
    photos = make_folder(tmp_path / "photos")
    packing.pack(photos, tmp_path / "raw", form="raw", side=12, workers=0)
    records = formats.Images(str(tmp_path / "raw"))
    for name, each in formats.FORMATS.items():
        if each.needs in ("mimlet", "pyarrow"):
            folder = tmp_path / name
            folder.mkdir()
            small = [bytes([k] * 8) for k in range(12)] if each.needs == "mimlet" else list(records)
            each.write(small, folder)
            read = each.open(folder)
            assert [bytes(read(i)) for i in (11, 0, 5)] == [small[i] for i in (11, 0, 5)]


def test_loaders_give_whole_batches(tmp_path: Path) -> None:
    """Of the images that were written, by every contender; what is left to the device can be made."""
    photos = loader.write(tmp_path / "photos", loader.pictures([], 4, (40, 30)), "jpg", quality=95)
    folders = {"jpeg": str(tmp_path / "jpeg"), "raw": str(tmp_path / "raw")}
    packing.pack(photos, folders["jpeg"], form="jpeg", side=24, workers=0)
    packing.pack(photos, folders["raw"], form="raw", side=24, workers=0)
    jobs = loader.photos_jobs(photos, **folders)
    assert len({job.label for job in jobs}) == len(jobs) >= 10
    for job in jobs:
        module, _, name = job.contender.partition(":")
        step = getattr(import_module(f"benchmarks.{module}"), name)(4, False, *job.options)
        assert [step(), step()] == [4.0, 4.0]
    assert 0 <= loader.render(4, False, folders["raw"], 0.4)() <= 255
    again = loader.write(tmp_path / "again", loader.pictures([photos], 2, (20, 30)), "png")
    assert len(list(Path(again).rglob("*.png"))) == 2
