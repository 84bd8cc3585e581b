import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from mimlet import api
from mimlet.api import run_pictures
from mimlet.config import AugmentSettings, Config, OptimSettings, load_config
from mimlet.data.batch import Batch
from mimlet.data.seeding import seeded
from mimlet.errors import ConfigError, TrainingStopped
from mimlet.methods.attended import ATTENTION
from mimlet.methods.base import Clock
from mimlet.methods.dino import DINO, Head, clip_each_, convert_head, encode
from mimlet.methods.settings import DINOSettings
from mimlet.models.features import Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.run import read_pictures, read_run, read_shown
from mimlet.train.checkpoint import read_checked
from mimlet.train.optim import follow, learning_rate, weight_decay
from tests.data.images import make_folder, picture
from tests.methods.official import CLOCK, part
from tests.shared import golden

SHAPE = ViTShape(16, 4, 24, 2, 3, position="learned")
SMALL: dict[str, Any] = {"local_size": 8, "local_crops": 2, "outputs": 20, "hidden": 16, "bottleneck": 8}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(drop_path: float = 0.0, shape: ViTShape = SHAPE, **settings: Any) -> DINO:
    student = ViT(shape, drop_path)
    student.init_classifier_()
    return DINO(student, DINOSettings(**{**SMALL, **settings}))


def crops(images: int = 3, local: int = 2, size: int = 8) -> Batch:
    views = {f"global{i}": torch.randn(images, 3, 16, 16) for i in range(2)}
    views |= {f"local{i}": torch.randn(images, 3, size, size) for i in range(local)}
    return Batch(views, torch.arange(images))


def steps(method: DINO, batches: list[Batch], clock: Clock = CLOCK) -> list[dict[str, Tensor]]:
    losses = [method(batch, clock) for batch in batches]
    method.after_step(clock)
    return losses


def test_equals_official_dino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of both heads, the losses in turn and the centre that each leaves, from the oracle's features."""
    oracle = golden("dino_loss")
    meta, io = oracle.meta["config"], oracle.io
    method = make(
        outputs=96,
        hidden=40,
        bottleneck=16,
        local_crops=4,
        teacher_temperature=(0.04, 0.07),
        temperature_warmup=(meta["warmup_teacher_temp_epochs"] - 1) / meta["nepochs"],
    )
    method.student_head.load_state_dict(convert_head(part(oracle.weights, "student_head.")))
    method.head.load_state_dict(convert_head(part(oracle.weights, "teacher_head.")))
    method.centre.copy_(io["initial_center"][0])
    for t, epoch in enumerate(meta["epochs_run"]):
        features = {2: io["teacher_features"][t], 6: io["student_features"][t]}
        monkeypatch.setattr(
            "mimlet.methods.dino.encode", lambda _, given, found=features: found[len(given)].view(len(given), 4, 24)
        )
        for head, who in ((method.head, "teacher"), (method.student_head, "student")):
            assert_close(head(io[f"{who}_features"][t]), io[f"{who}_logits"][t], **oracle.tolerance)
        (losses,) = steps(method, [crops(4, 4)], Clock(5 * epoch, 100, 5, 0))
        assert_close(losses["cross_entropy"], io["loss"][t], **oracle.tolerance)
        assert_close(method.centre, io["center"][t, 0], **oracle.tolerance)


def test_schedules_are_the_official_ones() -> None:
    """Of the released code the teacher's temperature changes with epochs, here with steps: the same at their start. Its
    warm-up of the rate reaches the peak one step earlier.
    """
    oracle = golden("dino_loss")
    io = oracle.io
    method = make(teacher_temperature=(0.04, 0.07), temperature_warmup=4 / 20)
    temperatures = [method.teacher_temperature(Clock(5 * epoch, 100, 5, 0)) for epoch in range(20)]
    assert_close(torch.tensor(temperatures), io["teacher_temps"], **oracle.tolerance)
    momenta = [method.ema_momentum(Clock(step, 20, 5, 0)) for step in range(20)]
    assert_close(torch.tensor(momenta), io["momentum_schedule"], **oracle.tolerance)
    optim = OptimSettings(weight_decay=0.04, weight_decay_end=0.4)
    decays = [weight_decay(step, 20, optim) for step in range(20)]
    assert_close(torch.tensor(decays), io["wd_schedule"], **oracle.tolerance)
    rates = torch.tensor([learning_rate(step, 20, 5, 5e-4, 1e-6) for step in range(20)])
    assert_close(rates[5:], io["lr_schedule"][5:], **oracle.tolerance)
    assert_close(rates[:5], io["lr_schedule"][:5] * 4 / 5, **oracle.tolerance)
    assert make().teacher_temperature(Clock(0, 20, 5, 0)) == 0.04


@pytest.mark.parametrize("length", [1.0, 2.0])
def test_heads_of_either_weight_norm_are_read(length: float) -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 20, bias=False))
    with torch.no_grad():
        normed.parametrizations.weight.original0.fill_(length)
    head = Head(24, DINOSettings(**SMALL, norm_last_layer=length == 1))
    mlp = {name: value for name, value in head.state_dict().items() if name.startswith("mlp.")}
    new = {f"last_layer.{name}": value for name, value in normed.state_dict().items()}
    old = {f"last_layer.weight_{'gv'[int(name[-1])]}": value for name, value in new.items()}
    x = torch.randn(5, 8)
    for official in (old, new):
        torch.nn.init.normal_(head.last_layer.weight)
        head.load_state_dict(convert_head(mlp | official))
        assert_close(head.last_layer(x), normed(x))


def test_a_new_head_projects_on_unit_vectors() -> None:
    free = make(norm_last_layer=False)
    assert {name for name, _ in make().head.named_parameters()} == {
        *(f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight",
    }
    x = torch.randn(4, 24)
    assert make().head(x).abs().max() <= 1
    assert free.student_head.last_layer.length is not None
    assert torch.equal(free.student_head.last_layer.length, torch.ones(20, 1))


def test_crops_of_one_size_are_encoded_in_one_pass_and_come_back_in_order() -> None:
    method, batch = make(), crops()
    passes: list[tuple[int, ...]] = []
    method.student.register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape)))
    found = encode(method.student, list(batch.views.values()))
    assert passes == [(6, 3, 16, 16), (6, 3, 8, 8)]
    for name, tokens in zip(batch.views, found, strict=True):
        assert_close(tokens, method.student(batch.views[name]).latent[:, 0])
    passes.clear()
    encode(method.student, list(crops(size=16).views.values()))
    assert passes == [(12, 3, 16, 16)]


def test_the_teacher_sees_global_crops_only_and_gets_no_gradient() -> None:
    method = make()
    sizes: list[int] = []
    method.encoder.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-1]))
    losses = method(crops(), CLOCK)
    assert sizes == [16]
    assert method.weights == {"cross_entropy": 1.0}
    assert_close(losses["teacher_entropy"] + losses["kl"], losses["cross_entropy"].detach())
    losses["cross_entropy"].backward()
    for name, parameter in method.named_parameters():
        held = name.startswith(("encoder.", "head."))
        assert (parameter.grad is None) is held, name
        assert held or parameter.grad.abs().sum() > 0, name  # type: ignore[union-attr]


def test_a_teacher_starts_as_its_student_and_drops_no_path() -> None:
    method = make(drop_path=0.9)
    images = torch.randn(2, 3, 16, 16)
    for follower, leader in ((method.encoder, method.student), (method.head, method.student_head)):
        assert all(torch.equal(value, leader.state_dict()[name]) for name, value in follower.state_dict().items())
    assert torch.equal(method.encoder(images).latent, method.encoder(images).latent)
    assert not torch.equal(method.student(images).latent, method.student(images).latent)
    method.eval()
    assert torch.equal(method.encoder(images).latent, method.student(images).latent)
    follow(method.encoder, method.student, method.ema_momentum(CLOCK))


def test_the_centre_is_that_of_all_pieces_of_a_step() -> None:
    whole, pieces = make(), make()
    pieces.load_state_dict(whole.state_dict())
    batch = crops(4)
    halves = [Batch({n: v[rows] for n, v in batch.views.items()}, batch.indices[rows]) for rows in ([0, 1], [2, 3])]
    for method in (whole, pieces):
        method.centre.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    before = whole.centre.clone()
    (losses,) = steps(whole, [batch])
    parts = steps(pieces, halves)
    assert_close(sum(part["cross_entropy"] for part in parts) / 2, losses["cross_entropy"])
    assert_close(pieces.centre, whole.centre)
    with torch.no_grad():
        logits = whole.head(encode(whole.encoder, [batch.views["global0"], batch.views["global1"]]))
    assert_close(whole.centre, 0.9 * before + 0.1 * logits.mean(dim=(0, 1)))
    steps(whole, [batch])
    assert_close(whole.centre, 0.81 * before + 0.19 * logits.mean(dim=(0, 1)), msg="each step starts a new mean")


def test_gradients_are_clipped_one_by_one_and_the_last_layer_waits() -> None:
    method = make(clip=0.1, freeze_last=0.375, norm_last_layer=False)
    method(crops(), CLOCK)["cross_entropy"].backward()
    trained = {n: p for n, p in method.named_parameters() if p.grad is not None}
    before = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    assert min(g.norm() for g in before.values()) < 0.1 < max(g.norm() for g in before.values())
    method.on_gradients(Clock(14, 40, 10, 0))
    for name, parameter in trained.items():
        if ".last_layer." in name:
            assert parameter.grad is None
        else:
            norm = before[name].norm()
            assert_close(parameter.grad, before[name] * min(1.0, 0.1 / (norm.item() + 1e-6)))
    last = method.student_head.last_layer.weight
    for step, learns in ((14, False), (15, True)):
        last.grad = torch.ones_like(last)
        method.on_gradients(Clock(step, 40, 10, 0))
        assert (last.grad is not None) is learns
    free = make(clip=0.0, freeze_last=0.0)
    free.student.norm.weight.grad = torch.full((24,), 1e3)
    free.on_gradients(CLOCK)
    assert torch.equal(free.student.norm.weight.grad, torch.full((24,), 1e3))


def test_clipping_numbers() -> None:
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.zeros(2)]
    clip_each_(gradients, 1.0)
    assert_close(gradients, [torch.tensor([0.6, 0.8]), torch.tensor([0.3, 0.4]), torch.zeros(2)], atol=1e-6, rtol=0)


def test_views_are_the_papers() -> None:
    transform = make(local_crops=3).transform(AugmentSettings(), 16)
    with seeded(1):
        views = transform(picture(0))
    assert [(name, tuple(view.shape)) for name, view in views.items()] == [
        ("global0", (3, 16, 16)),
        ("global1", (3, 16, 16)),
        *((f"local{i}", (3, 8, 8)) for i in range(3)),
    ]
    assert not torch.equal(views["local0"], views["local1"])
    first, second, *local = transform.views.values()  # type: ignore[attr-defined]
    assert [(view.blur_p, view.solarize_p) for view in (first, second, *local)] == [(1, 0), (0.1, 0.2), *3 * [(0.5, 0)]]
    assert {view.scale for view in (first, second)} == {(0.4, 1.0)}
    assert {view.scale for view in local} == {(0.05, 0.4)}
    assert {(view.flip, view.jitter, view.jitter_p, view.gray_p) for view in (first, second, *local)} == {
        (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    }
    with pytest.raises(
        ConfigError, match=r"data\.augment\.color_jitter is 0\.4, but method 'dino' makes views of its own"
    ):
        make().transform(AugmentSettings(color_jitter=0.4), 16)


@pytest.mark.parametrize(
    ("given", "shape", "expected"),
    [
        ({"local_size": 20}, {}, r"local crops of 20 px are larger than the global ones of 16 px .*; use about 4, or"),
        ({"local_size": 10}, {}, r"local crops of 10 px are not divisible by the patch of 4 px; use 8 or 12"),
        ({"local_size": 2}, {}, r"not divisible by the patch of 4 px; use 4 or 4"),
        ({}, {"relative": "full"}, r"fixed to crops of 16 px, and local crops have 8; set encoder\.relative=none"),
        ({}, {"class_token": False}, r"DINO compares class tokens; set encoder\.class_token=true"),
        ({"global_scale": (0.5, 1.5)}, {}, r"method\.global_scale is 0\.5, 1\.5; expected smallest and largest share"),
        ({"local_scale": (0.5, 0.4)}, {}, r"method\.local_scale is 0\.5, 0\.4; expected"),
    ],
)
def test_crops_and_encoders_that_do_not_go_together(
    given: dict[str, Any], shape: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        make(shape=ViTShape(16, 4, 24, 2, 3, **{"position": "learned", **shape}), **given).transform(
            AugmentSettings(), 16
        )


def test_without_local_crops_their_size_does_not_matter() -> None:
    method = make(local_crops=0, local_size=1000)
    assert set(method.transform(AugmentSettings(), 16)(picture(0))) == {"global0", "global1"}
    assert method(crops(1, 0), CLOCK)["cross_entropy"].isfinite(), "one image is enough"


def test_finite_under_autocast() -> None:
    method, batch = make(), crops()
    exact = method(batch, CLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(batch, CLOCK)
    losses["cross_entropy"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    assert_close(losses, exact, rtol=0.02, atol=0.02)


def config(data: Path, out: Path, **sections: Any) -> Config:
    """Six steps of 8 images in two pieces, three steps an epoch."""
    return load_config(
        {
            "encoder": {"name": "vit_nano", "image_size": 16, "dim": 24, "depth": 2, "heads": 3, "drop_path": 0.2},
            "method": {
                "name": "dino",
                **SMALL,
                "freeze_last": 0.5,
                "teacher_temperature": (0.04, 0.07),
                "temperature_warmup": 0.5,
            },
            "data": {"path": [str(data)]},
            "optim": {"lr": 1e-2, "lr_batch": 0, "weight_decay": 0.04, "weight_decay_end": 0.4},
            "schedule": {"batch": 8, "steps": 6},
            "speed": {"accelerator": "cpu", "precision": "32", "workers": 0, "accumulate": 2},
            "run": {"out": str(out), "tensorboard": False, "report": False, "log_steps": 1, "pictures": 3},
            **sections,
        }
    )


def train(settings: Config, resume: bool = False) -> Path:
    api.train(settings, resume=resume, allow_changes=False, command="")
    return Path(str(settings.run.out))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(data, tmp_path_factory.mktemp("run") / "run"))


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_is_the_same_bit_for_bit(
    at: int, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the last layer is frozen, and later: followers, centre, memory and schedules."""
    forward = DINO.forward

    def stopped(self: DINO, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        if clock.step == at - 1 and not self.pending:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, clock)

    settings = config(data, tmp_path / "run")
    monkeypatch.setattr(DINO, "forward", stopped)
    with pytest.raises(TrainingStopped, match=f"after step {at} of 6"):
        train(settings)
    monkeypatch.undo()
    train(settings, resume=True)
    ours, theirs = (read_checked(folder / "checkpoints" / "step_00000006.pt") for folder in (run, tmp_path / "run"))
    assert set(ours["method"]) >= {"centre", "encoder.norm.weight", "head.last_layer.weight", "student.norm.weight"}
    for kept in ("method", "optimizer"):
        assert_close(theirs[kept], ours[kept], rtol=0, atol=0)
    lines = (
        [(line["cross_entropy"], line["lr"]) for line in read_run(f).lines("train")] for f in (run, tmp_path / "run")
    )
    assert next(lines) == next(lines)


def test_what_a_run_leaves(run: Path) -> None:
    """The teacher is what is exported and shown."""
    state = read_checked(run / "checkpoints" / "step_00000006.pt")["method"]
    exported = load_file(run / "encoder.safetensors")
    assert_close(exported["norm.weight"], state["encoder.norm.weight"], rtol=0, atol=0)
    assert not torch.equal(exported["norm.weight"], state["student.norm.weight"])
    for line in read_run(run).lines("train"):
        assert line["teacher_entropy"] + line["kl"] == pytest.approx(line["cross_entropy"], rel=1e-5)
        assert 0 < line["teacher_entropy"] < math.log(20)
    assert list(read_pictures(run)) == ["original", "step 0", "step 3", "step 6"]
    assert len(set(read_pictures(run).values())) == 4
    assert (read_shown(run).rows, read_shown(run).caption) == (("original", "attention"), ATTENTION)
    assert (run / "attention.png").is_file()
    (film,) = run_pictures(run)
    assert film.title == "Attention as training goes"
    assert film.alt == "Rows of the same training images: original, attention from step 0 to step 6"
    assert film.caption == ATTENTION


def test_pictures_are_the_last_blocks_attention() -> None:
    method = make().eval()
    images = torch.randn(2, 3, 16, 16)
    shown = method.pictures(Batch({"image": images}, torch.arange(2)))
    assert list(shown) == ["original", "attention"]
    logits = method.encoder(images, taps=Taps(attention=(2,))).attention[2]
    assert_close(shown["attention"].flatten(1), logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1))
    assert shown["attention"].shape == (2, 4, 4)


def test_recipes_are_the_papers() -> None:
    found = load_config("dino_tiny")
    assert isinstance(found.method, DINOSettings)
    assert (found.encoder.shape().heads, found.encoder.position, found.encoder.drop_path) == (12, "learned", 0.1)
    assert (found.method.outputs, found.method.local_crops, found.method.local_size) == (65536, 8, 96)
    assert (found.optim.lr, found.optim.lr_batch, found.optim.min_lr) == (5e-4, 256, 1e-6)
    assert (found.optim.weight_decay, found.optim.weight_decay_end, found.optim.clip) == (0.04, 0.4, 0)
    assert (found.schedule.epochs, found.schedule.warmup_epochs, found.schedule.batch) == (400, 10, 1024)
