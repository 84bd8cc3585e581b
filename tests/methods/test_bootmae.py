import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from mimlet.config import Config, load_config
from mimlet.data.batch import Batch
from mimlet.data.masks import BlockMasking, Mask
from mimlet.errors import ConfigError, TrainingStopped
from mimlet.methods.base import Clock
from mimlet.methods.bootmae import BootMAE, feature_decoder, momentum_at, pixel_decoder, ramp_at
from mimlet.methods.settings import DecoderSettings
from mimlet.models.features import Taps
from mimlet.models.parts import sincos_positions
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.objectives.reconstruct import denormalise_channels, inside_weights, patchify, unpatchify
from mimlet.run import RunFolder
from mimlet.train.loop import Batches
from tests.methods.official import make_encoder, part
from tests.shared import Golden, golden
from tests.train.toy import train

SHAPE = ViTShape(64, 8, 32, 3, 4, qv_bias=True)
LAST = Clock(9, 10, 10, 0)


def official_name(name: str) -> str:
    """Where the released code keeps a tensor of ours."""
    owner, _, rest = name.partition(".")
    if owner == "encoder":
        return rest
    suffix = "" if owner == "decoder" else "_1"
    first, _, rest = rest.partition(".")
    names = {"embed": "down", "mask_token": "mask_token", "blocks": "decode_blocks", "norm": "decode_norm"}
    return f"{names.get(first, 'lm_head')}{suffix}{rest and '.'}{rest}"


def official(oracle: Golden, weigh_inside: bool = True) -> tuple[BootMAE, Batch]:
    online, ema = part(oracle.weights, "online."), part(oracle.weights, "ema.")
    encoder = make_encoder(online, SHAPE)
    method = BootMAE(
        encoder,
        pixel_decoder(encoder, DecoderSettings(depth=2, dim=24, heads=4)),
        feature_decoder(encoder, DecoderSettings(depth=2, heads=4)),
        BlockMasking((8, 8), 39, exact=48),
        weigh_inside=weigh_inside,
        feature_weight=0.7,
    )
    method.target.load_state_dict({name: ema[name] for name in method.target.state_dict()})
    for name, parameter in method.named_parameters():
        if not name.startswith("target."):
            parameter.data.copy_(online.pop(official_name(name)))
    method.decoder.positions.copy_(online.pop("de_pos_embed")[0, 1:])
    method.feature_decoder.positions.copy_(encoder.pos_embed[0, 1:])
    assert not online, "every tensor of the official model has its place"
    mask = Mask.from_order(oracle.io["idx_shuffle"], 16)
    return method, Batch({"image": oracle.io["images"]}, torch.arange(2), {"mask": mask})


def test_equals_official() -> None:
    oracle = golden("bootmae_loss")
    io, close = oracle.io, oracle.tolerance
    method, batch = official(oracle)
    mask, last = batch.mask, method.encoder.depth
    assert torch.equal(mask.hidden, io["mask"].bool())
    assert_close(inside_weights(mask.hidden, (8, 8)), io["perc_mask"], **close)

    seen = method.encoder(batch.images, mask, taps=Taps(hidden=(1, last)))
    pixels = method.decoder(seen.latent, seen.hidden[1], mask)
    assert_close(unpatchify(pixels, (8, 8)), io["pixel_pred"], **close)
    assert_close(method.feature_decoder(seen.latent, seen.hidden[last], mask), io["feature_pred"], **close)
    whole = method.target(batch.images, taps=Taps(hidden=(last,), tokens=False)).hidden[last][:, 1:]
    assert_close(whole, io["feature_target_raw"], **close)
    shown = method.pictures(batch)["reconstruction"]
    true = patchify(batch.images, 8)
    expected = denormalise_channels(patchify(io["pixel_pred"], 8), true)
    assert_close(shown, unpatchify(torch.where(mask.hidden[..., None], expected, true), (8, 8)))

    losses = method(batch, LAST)
    assert_close(losses["reconstruction"], io["loss_pixel"][0], **close)
    assert_close(losses["feature"], io["loss_feature"][0], **close)
    total = sum(weight * losses[name] for name, weight in method.weights.items())
    assert_close(total, io["loss"][0], **close)


def plain_losses(method: BootMAE, batch: Batch, pixel_target: Tensor) -> Tensor:
    """The official losses over whole maps; all patches are decoded."""
    mask, last = batch.mask, method.encoder.depth
    seen = method.encoder(batch.images, mask, taps=Taps(hidden=(1, last)))
    pixels = unpatchify(method.decoder(seen.latent, seen.hidden[1], mask), (8, 8))
    features = method.feature_decoder(seen.latent, seen.hidden[last], mask)
    wanted = method.target(batch.images, taps=Taps(hidden=(last,))).hidden[last][:, 1:].detach()
    hidden = mask.hidden.to(pixels.dtype).view(2, 1, 8, 8)
    weights = hidden + hidden * F.avg_pool2d(hidden, 3, 1, 1)
    of_pixels = weights.repeat_interleave(8, 2).repeat_interleave(8, 3)
    first = (of_pixels * (pixels - pixel_target) ** 2).mean() / hidden.mean()
    features, wanted = (F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in (features, wanted))
    second = (weights.flatten(1)[..., None] * (features - wanted) ** 2).mean() / hidden.mean()
    return first + 0.7 * second


def test_gradients_equal_those_of_the_plain_formulation() -> None:
    oracle = golden("bootmae_loss")
    method, batch = official(oracle)
    losses = method(batch, LAST)
    (losses["reconstruction"] + 0.7 * losses["feature"]).backward()
    gradients = {name: p.grad for name, p in method.named_parameters()}
    method.zero_grad()
    plain_losses(method, batch, oracle.io["pixel_target"]).backward()
    checked = 0
    for name, parameter in method.named_parameters():
        if name.startswith("target."):
            assert gradients[name] is None
        elif parameter.requires_grad:
            assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
            checked += int(parameter.grad.abs().max() > 1e-5)
    assert checked > 100, "gradients are there to be compared"


def test_equal_weights() -> None:
    oracle = golden("bootmae_loss")
    method, batch = official(oracle, weigh_inside=False)
    losses = method(batch, LAST)
    hidden = batch.mask.hidden
    error = (patchify(oracle.io["pixel_pred"] - oracle.io["pixel_target"], 8)).square().mean(-1)
    assert_close(losses["reconstruction"], error[hidden].mean(), **oracle.tolerance)


def test_positions_are_official_with_halves_exchanged() -> None:
    """Which half of the channels tells the row is a matter of names: random projections follow."""
    oracle = golden("bootmae_loss")
    x, y = sincos_positions(32, 8, 8).chunk(2, dim=1)
    assert_close(torch.cat([y, x], dim=1), oracle.weights["online.pos_embed"][0, 1:], **oracle.tolerance)


def config(*overrides: str, **method: object) -> Config:
    return load_config(
        {
            "encoder": {"name": "vit_nano", "image_size": 32, "dim": 24, "depth": 2, "heads": 3, "qv_bias": True},
            "method": {"name": "bootmae", **method},
            "schedule": {"batch": 2, "steps": 8},
        },
        overrides,
    )


def batch_for(method: BootMAE, images: int = 2) -> Batch:
    sampler = method.masks()["mask"]
    generator = torch.Generator().manual_seed(0)
    mask = sampler.collate(torch.stack([sampler.draw(generator) for _ in range(images)]))
    return Batch({"image": torch.randn(images, 3, 32, 32)}, torch.arange(images), {"mask": mask})


def test_three_quarters_are_hidden_exactly() -> None:
    method = BootMAE.build(config())
    assert batch_for(method, 8).mask.hidden.sum(dim=1).tolist() == [48] * 8
    published = BootMAE.build(config("encoder.image_size=56")).masks()["mask"]
    assert published == BlockMasking((14, 14), 120, 16, 60, tries=0, exact=147)


def test_widths() -> None:
    method = BootMAE.build(config())
    assert method.decoder.mask_token.shape == (1, 1, 12)
    assert method.feature_decoder.mask_token.shape == (1, 1, 24)
    narrow = BootMAE.build(config("method.feature_decoder.dim=12"))
    assert narrow.feature_decoder.pred.weight.shape == (24, 12)
    with pytest.raises(ConfigError, match=r"method\.feature_decoder: width 24 must be divisible by its 5 heads"):
        config("method.feature_decoder.heads=5")
    with pytest.raises(ConfigError, match=r"method\.decoder: width 12 must be divisible by its 5 heads"):
        config("method.decoder.heads=5")


def test_the_target_sees_hidden_patches_and_the_encoder_does_not() -> None:
    method = BootMAE.build(config())
    batch = batch_for(method)
    patches = patchify(batch.images, 4)
    torch.manual_seed(1)
    other = torch.where(batch.mask.hidden[..., None], torch.randn_like(patches), patches)
    changed = Batch({"image": unpatchify(other, (8, 8))}, batch.indices, batch.masks)
    before, after = ([*method._encode(each).hidden.values()] for each in (batch, changed))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.allclose(
        method._features(batch.images, batch.mask.ids_hidden), method._features(changed.images, batch.mask.ids_hidden)
    )


def test_the_target_starts_as_a_copy_and_drops_no_paths() -> None:
    torch.manual_seed(0)
    method = BootMAE.build(config("encoder.drop_path=0.5")).train()
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(value, method.target.state_dict()[name])
    images, ids = torch.randn(8, 3, 32, 32), torch.arange(64).expand(8, -1)
    assert torch.equal(method._features(images, ids), method._features(images, ids))
    assert not torch.equal(method.encoder(images).latent, method.encoder(images).latent)


def test_momentum_is_the_released_schedule_at_400_epochs() -> None:
    for epoch in range(400):
        released = (
            0.999 + epoch / 100 * (0.9999 - 0.999) if epoch < 100 else 0.9999 + (epoch - 100) / 300 * (0.99999 - 0.9999)
        )
        assert momentum_at(epoch / 400, (0.999, 0.9999, 0.99999), 0.25) == pytest.approx(released, abs=1e-12)
    method = BootMAE.build(config("method.momentum=[0.5,0.7,0.8]", "method.momentum_knee=0.5"))
    found = [method.ema_momentum(Clock(step, 8, 2, 0)) for step in range(8)]
    assert found == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.725, 0.75, 0.775])


def test_features_join_over_a_quarter_of_the_training() -> None:
    assert [ramp_at(Clock(epoch, 800, 1, 0), 0.25) for epoch in range(800)] == pytest.approx(
        [min(4 * (epoch + 1) / 800, 1.0) for epoch in range(800)]
    )
    assert ramp_at(Clock(0, 8, 2, 0), 0.0) == 1
    method = BootMAE.build(config())
    batch = batch_for(method)
    first, second = (method(batch, Clock(step, 8, 2, 0)) for step in (0, 1))
    assert_close(first["feature"], 0.5 * first["feature_error"])
    assert_close(second["feature"], second["feature_error"])
    assert_close(first["reconstruction"], second["reconstruction"])
    assert first["feature"].requires_grad
    assert not first["feature_error"].requires_grad
    assert method.weights == {"reconstruction": 1.0, "feature": 1.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.momentum=[0.9,0.99,1.5]", r"method\.momentum\.2: .* less than or equal to 1"),
        ("method.momentum_knee=0", r"method\.momentum_knee: .* greater than 0"),
        ("method.feature_weight=0", r"method\.feature_weight: .* greater than 0"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)


@pytest.mark.parametrize("qv_bias", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
def test_everything_trains_in_bf16(class_token: bool, qv_bias: bool) -> None:
    method = BootMAE.build(
        config(f"encoder.class_token={str(class_token).lower()}", f"encoder.qv_bias={str(qv_bias).lower()}")
    )
    batch = batch_for(method)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(batch, LAST)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    (losses["reconstruction"] + losses["feature"]).backward()
    idle = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name.startswith("target.") for name in idle)
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_initialisation_is_moco_v3s() -> None:
    torch.manual_seed(0)
    encoder = BootMAE.build(config()).encoder
    assert isinstance(encoder, ViT)
    for matrix in encoder.blocks[0].attn.qkv.weight.chunk(3):
        assert 0.97 * (6 / 48) ** 0.5 < matrix.abs().max() <= (6 / 48) ** 0.5
    assert 0 < encoder.cls_token.abs().max() < 1e-5


def stream(method: BootMAE, stop: int | None = None) -> Batches:
    """Batches of 2 images, one per step; a signal arrives at step `stop`."""

    def batches(start: int, total: int) -> Generator[Batch, None, None]:
        for step in range(start, total):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            torch.manual_seed(step)
            yield batch_for(method)

    return batches


@pytest.mark.parametrize("stop", [1, 4])
def test_average_and_schedules_survive_a_resume(tmp_path: Path, stop: int) -> None:
    """Bit for bit; step 2 of 8 is where the momentum bends and the features have joined."""
    settings = config("speed.accelerator=cpu", "speed.precision=32", "run.tensorboard=false", "run.log_steps=1")

    def build() -> BootMAE:
        torch.manual_seed(0)
        return BootMAE.build(settings)

    whole = build()
    train(settings, whole, stream=stream(whole))
    start = build().target.state_dict()
    assert not torch.equal(start["cls_token"], whole.target.cls_token)
    assert not torch.equal(whole.encoder.cls_token, whole.target.cls_token)
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(TrainingStopped, match=f"after step {stop + 1}"):
        train(settings, method := build(), run, stream=stream(method, stop))
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        train(settings, method := build(), run, stream=stream(method))
    for name, value in whole.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name
