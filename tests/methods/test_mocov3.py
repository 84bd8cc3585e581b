import copy
import math
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.config import AugmentSettings, Config, load_config
from mimlet.data.batch import Batch
from mimlet.data.views import View, Views
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock
from mimlet.methods.mocov3 import MoCoV3
from mimlet.models.parts import sincos_positions
from mimlet.run import RunFolder, read_run
from mimlet.train.loop import Batches
from mimlet.train.optim import follow, trained_parameters
from tests.methods.official import CLOCK
from tests.shared import golden
from tests.train import toy

ENCODER = {"name": "vit_nano", "image_size": 16, "patch": 8, "dim": 16, "depth": 2, "heads": 2}
STEPS = 6


class Trunk(nn.Module):
    """The oracle's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 24
        self.trunk = nn.Linear(12, 24)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent=self.trunk(x).tanh()[:, None])


def our_name(name: str) -> str:
    side, _, rest = name.partition(".")
    if side == "predictor":
        return name
    momentum = "momentum_" if side == "momentum_encoder" else ""
    where, _, rest = rest.partition(".")
    return f"{momentum}projector.{rest}" if where == "head" else f"{momentum}encoder.{where}.{rest}"


def settings(**sections: object) -> Config:
    return load_config(
        {
            "encoder": ENCODER,
            "method": {"name": "mocov3", "hidden": 12, "outputs": 8},
            "optim": {"name": "sgd", "lr": 0.01, "lr_batch": 0, "momentum": 0.9, "weight_decay": 0.0},
            "schedule": {"batch": 8, "steps": STEPS, "eval_epochs": 0},
            "speed": {"accelerator": "cpu", "precision": "32"},
            "run": {"tensorboard": False, "log_steps": 1},
            **sections,
        }
    )


def build(**method: object) -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3.build(settings(method={"name": "mocov3", "hidden": 12, "outputs": 8, **method}))


def make_batch(step: int = 0, size: int = 8) -> Batch:
    """Two noisy views of the same images."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    noise = torch.randn(2, size, 3, 16, 16, generator=generator)
    return Batch({f"view{i}": images + 0.3 * noise[i - 1] for i in (1, 2)}, torch.arange(size))


def stream(start: int, total: int) -> Generator[Batch, None, None]:
    for step in range(start, total):
        yield make_batch(step)


def double(start: int, total: int) -> Generator[Batch, None, None]:
    for batch in stream(start, total):
        yield replace(batch, views={name: view.double() for name, view in batch.views.items()})


def test_equals_official() -> None:
    oracle = golden("mocov3_loss")
    sizes = oracle.meta["config"]
    method = MoCoV3(Trunk(), sizes["T"], sizes["m"], sizes["mlp_dim"], sizes["dim"])
    method.load_state_dict({our_name(name): value for name, value in oracle.weights.items()})
    for name, leader in method.ema.items():
        follow(getattr(method, name), getattr(method, leader), sizes["m"])
    after = method.momentum_encoder.trunk.weight
    assert_close(after, oracle.io["momentum_trunk_weight_after"], **oracle.tolerance)

    one, two = oracle.io["x1"], oracle.io["x2"]
    assert_close(method.queries(one), oracle.io["q1"], **oracle.tolerance)
    assert_close(method.queries(two), oracle.io["q2"], **oracle.tolerance)
    losses = method(Batch({"view1": one, "view2": two}, torch.arange(len(one))), CLOCK)
    assert_close(losses["contrast"], oracle.io["loss_full"][0], **oracle.tolerance)


def test_momentum_equals_official() -> None:
    """At step s the loop updates for step s + 1."""
    oracle = golden("mocov3_loss")
    method = build(momentum=0.99)
    got = [method.ema_momentum(Clock(round(10 * e) - 1, 100, 10, 0)) for e in (0, 0.5, 2.5, 5, 9.9, 10)]
    assert_close(torch.tensor(got), oracle.io["momentum_at_epochs"], **oracle.tolerance)


def plain_training(method: MoCoV3) -> dict[str, Tensor]:
    """Algorithm 1 in the official order: the momentum branch is updated first in each step, parameters only."""
    both = nn.ModuleDict({"encoder": method.encoder, "projector": method.projector})
    momentum = nn.ModuleDict({"encoder": method.momentum_encoder, "projector": method.momentum_projector})
    trained = [*both.parameters(), *method.predictor.parameters()]
    optimizer = torch.optim.SGD([p for p in trained if p.requires_grad], lr=0.01, momentum=0.9)

    def project(branch: nn.ModuleDict, images: Tensor) -> Tensor:
        return branch["projector"](branch["encoder"](images).latent[:, 0])

    def loss(q: Tensor, k: Tensor) -> Tensor:
        logits = torch.einsum("nc,mc->nm", F.normalize(q, dim=1), F.normalize(k, dim=1)) / 0.2
        return F.cross_entropy(logits, torch.arange(len(q))) * 0.4

    for step, batch in enumerate(double(0, STEPS)):
        m = 1 - 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (1 - 0.9)
        with torch.no_grad():
            for mine, theirs in zip(momentum.parameters(), both.parameters(), strict=True):
                mine.copy_(mine * m + theirs * (1 - m))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        one, two = batch.views["view1"], batch.views["view2"]
        q1, q2 = (method.predictor(project(both, view)) for view in (one, two))
        with torch.no_grad():
            k1, k2 = (project(momentum, view) for view in (one, two))
        optimizer.zero_grad()
        (loss(q1, k2) + loss(q2, k1)).backward()
        optimizer.step()
    return dict(method.named_parameters())


def test_training_equals_a_plain_loop_in_the_official_order() -> None:
    method = build(momentum=0.9).double()
    start = {name: value.clone() for name, value in method.named_parameters()}
    expected = plain_training(copy.deepcopy(method))
    toy.train(settings(), method, stream=double)
    got = dict(method.named_parameters())
    for name in ("encoder.cls_token", "momentum_encoder.blocks.1.mlp.fc1.weight", "momentum_projector.1.bias"):
        assert not torch.allclose(got[name], start[name], rtol=1e-3, atol=1e-4), name
    assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def resumed(stop: int) -> Batches:
        def broken(start: int, total: int) -> Generator[Batch, None, None]:
            for step in range(start, total):
                if step == stop and not start:
                    raise KeyboardInterrupt
                yield make_batch(step)

        return broken

    config = settings(run={"tensorboard": False, "log_steps": 1, "checkpoint_steps": 2})
    whole, _ = toy.train(config, build(), stream=stream)
    with RunFolder.create(tmp_path / "run", config) as run, pytest.raises(KeyboardInterrupt):
        toy.train(config, build(), run, stream=resumed(3))
    with RunFolder.create(tmp_path / "run", config, resume=True) as run:
        other, result = toy.train(config, build(), run, stream=resumed(3))
    (note,) = read_run(tmp_path / "run").lines("note")
    assert (note["text"], result.steps) == ("resumed after step 2 of 6", STEPS)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_no_gradient_reaches_the_keys() -> None:
    method = build()
    method(make_batch(), CLOCK)["contrast"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) is ("momentum_" not in name and "pos_embed" not in name), name
    names = trained_parameters(method)
    assert not any(name.startswith("momentum_") for name in names)


def test_statistics_are_each_views_own() -> None:
    method = build()
    batch = make_batch()
    assert_close(method.queries(batch.views["view1"]), method.queries(batch.views["view1"].clone()))
    joined = method.queries(torch.cat([batch.views["view1"], 3 + batch.views["view2"]]))[:8]
    assert not torch.allclose(joined, method.queries(batch.views["view1"]), atol=0.1)


def test_running_statistics_do_not_matter_in_training() -> None:
    method, batch = build(), make_batch()
    before = method(batch, CLOCK)["contrast"]
    for name, value in method.named_buffers():
        if "running" in name:
            value.fill_(50.0)
    assert torch.equal(method(batch, CLOCK)["contrast"], before)


def test_fixed_patches_stay() -> None:
    method = build(fixed_patches=True)
    patches, block = method.encoder.patch_embed, method.encoder.blocks[0].mlp.fc1.weight
    before = copy.deepcopy(patches.state_dict()), block.detach().clone()
    toy.train(settings(), method, stream=stream)
    assert_close(patches.state_dict(), before[0], rtol=0, atol=0)
    assert_close(method.momentum_encoder.patch_embed.state_dict(), before[0], rtol=0, atol=0)
    assert not torch.equal(block, before[1])
    assert build().encoder.patch_embed.proj.weight.requires_grad


def test_initialisation() -> None:
    torch.manual_seed(0)
    wide = load_config(
        {"encoder": {"dim": 192}, "method": {"name": "mocov3", "hidden": 8}, "schedule": {"batch": 8, "steps": 1}}
    )
    method = MoCoV3.build(wide)
    encoder = method.encoder
    patches = encoder.patch_embed.proj
    for part, bound in (
        *((part, math.sqrt(6 / (2 * 192))) for part in encoder.blocks[3].attn.qkv.weight.chunk(3)),
        (encoder.blocks[3].mlp.fc1.weight, math.sqrt(6 / (5 * 192))),
        (patches.weight, math.sqrt(6 / (3 * 16 * 16 + 192))),
    ):
        assert 0.99 * bound < part.abs().max() <= bound
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not patches.bias.any()
    assert not encoder.blocks[3].attn.qkv.bias.any()
    assert 5e-7 < encoder.cls_token.std().item() < 2e-6
    for follower, leader in method.ema.items():
        assert_close(getattr(method, follower).state_dict(), getattr(method, leader).state_dict(), rtol=0, atol=0)
    assert [name for name, _ in method.predictor.named_parameters()] == ["0.weight", "1.weight", "1.bias", "3.weight"]
    assert [len(method.projector), len(method.predictor)] == [8, 5]


def test_positions_are_moco_v3s_with_the_halves_of_channels_exchanged() -> None:
    """Its table begins with the channels of w, built by meshgrid(w, h, indexing="ij"): they vary along rows."""
    dim, side = 24, 5
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    w, h = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    w, h = (axis.flatten()[:, None] * omega for axis in (w, h))
    official = torch.cat([w.sin(), w.cos(), h.sin(), h.cos()], dim=1).float()
    ours = sincos_positions(dim, side, side)
    assert_close(official.roll(dim // 2, dims=1), ours)
    assert_close(official.view(side, side, dim).transpose(0, 1).reshape(-1, dim), ours)  # or the grid transposed


def test_views() -> None:
    augment = AugmentSettings(crop_scale=(0.2, 1.0), interpolation="bilinear", flip=0.4)
    views = build().transform(augment, 112)
    assert isinstance(views, Views)
    common = {"scale": (0.2, 1.0), "interpolation": "bilinear", "flip": 0.4, "blur_sigma": (0.05, 1.0)}
    assert views.views == {
        "view1": View(112, **common, blur_p=1.0, solarize_p=0.0),
        "view2": View(112, **common, blur_p=0.1, solarize_p=0.2),
    }
    default = build().transform(AugmentSettings(), 224).views["view2"]
    assert (default.scale, default.jitter, default.jitter_p) == ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8)
    assert (default.gray_p, default.flip, default.blur_sigma) == (0.2, 0.5, (0.1, 2.0))


def test_two_images_give_next_to_no_gradient() -> None:
    """Batch norm of two rows leaves signs. Three are enough."""
    largest = {}
    for size in (2, 3):
        method = build()
        method(make_batch(size=size), CLOCK)["contrast"].backward()
        largest[size] = max(p.grad.abs().max() for p in method.encoder.parameters() if p.grad is not None)
    assert largest[3] > 1000 * largest[2]


def test_half_precision() -> None:
    method, batch = build(), make_batch()
    exact = method(batch, CLOCK)["contrast"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch, CLOCK)["contrast"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in trained_parameters(method).values())


def test_pictures_show_attention() -> None:
    images = make_batch().views["view1"]
    rows = build().eval().pictures(Batch({"image": images}, torch.arange(len(images))))
    assert list(rows) == ["original", "attention"]
    assert torch.equal(rows["original"], images)
    assert rows["attention"].shape == (8, 2, 2)


def test_what_a_user_can_cause() -> None:
    for sections, message in (
        ({"encoder": {**ENCODER, "class_token": False}}, r"compares class tokens; set encoder\.class_token=true"),
        ({"schedule": {"batch": 2, "steps": 1}}, r"schedule\.batch is 2, but method 'mocov3' .* takes at least 3"),
        ({"speed": {"accumulate": 4}}, r"speed\.accumulate is 4, .* set it to 1, and use more devices"),
    ):
        with pytest.raises(ConfigError, match=message):
            MoCoV3.build(settings(**sections))
    with pytest.raises(ConfigError, match="a batch of 1 image"):
        build()(make_batch(size=1), CLOCK)
    for augment, message in (
        ({"color_jitter": 0.4}, r"color_jitter is 0\.4, but method 'mocov3' makes views of its own"),
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale is 0\.5, 0\.2; expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            build().transform(AugmentSettings(**augment), 16)
