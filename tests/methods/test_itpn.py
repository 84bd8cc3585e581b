"""iTPN on pixels."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mimlet.config import Config, load_config
from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, TrainingStopped
from mimlet.methods.itpn import ITPN
from mimlet.methods.settings import MaskedFeatureSettings
from mimlet.models.decoders import make_decoder
from mimlet.models.hivit import HiViT
from mimlet.models.shapes import HiViTShape
from mimlet.objectives.reconstruct import patchify, unpatchify
from mimlet.run import RunFolder
from mimlet.train.compiling import compiled_parts
from mimlet.train.loop import Batches
from mimlet.train.optim import follow, trained_parameters
from tests.methods.official import CLOCK, fill, make_batch, part
from tests.shared import golden
from tests.train.toy import train

SHAPE = HiViTShape(64, 16, 32, (1, 1, 2), 2, pyramid_dim=16, pyramid_depth=1, pyramid_hidden=64)
NAMES = {
    "decoder_embed.": "decoder.embed.",
    "decoder_": "decoder.",
    "mask_token": "decoder.mask_token",
    "": "encoder.",
}
STAGES = {4: 1, 8: 2, 16: 3}


def official(weights: dict[str, Tensor], features: MaskedFeatureSettings) -> ITPN:
    """The released code takes the number of visible patches for a change of size and resamples its positions; the
    reference of the average does not.
    """
    encoder = HiViT(SHAPE)
    encoder.position_offset = 0.1
    method = ITPN(encoder, make_decoder(encoder, 768, 32, 2, 4), features=features)
    if method.target is not None:
        method.target.load_state_dict(part(weights, "teacher."))
        mine = {f"heads.{stride}": part(weights, f"mfm_heads.{stage - 1}.") for stride, stage in STAGES.items()}
        for name, values in mine.items():
            method.get_submodule(name).load_state_dict(values)
        weights = part(weights, "student.")
        beside = {name: value for name, value in method.state_dict().items() if name.startswith(("target.", "heads."))}
        names = {name: name for name in beside}
        fill(method, {**beside, **weights}, {**names, **NAMES})
    else:
        fill(method, weights, NAMES)
    return method


def test_equals_official_pixels() -> None:
    oracle = golden("itpn_pixel")
    method = official(oracle.weights, MaskedFeatureSettings(weight=0))
    assert (method.target, len(method.heads), method.weights) == (None, 0, {"reconstruction": 1.0})
    batch = make_batch(oracle.io, 0.75)
    assert_close(method(batch, CLOCK), {"reconstruction": oracle.io["loss"][0]}, **oracle.tolerance)
    levels = method._encode(batch).levels
    for stride, name in ((16, "v16"), (8, "v8"), (4, "v4")):
        assert_close(levels[stride], oracle.io[name].flatten(2, 3), **oracle.tolerance)
    assert_close(method.decoder(levels, batch.mask), oracle.io["pred"], **oracle.tolerance)


@pytest.mark.parametrize("seen", ["visible", "full"])
def test_equals_the_reference_of_masked_feature_modelling(seen: str) -> None:
    oracle = golden("itpn_mfm_ema")
    method = official(oracle.weights, MaskedFeatureSettings.model_validate({"input": seen})).train()
    batch = make_batch(oracle.io, 0.75)
    targets = method.targets(batch.images, batch.mask)
    for stride, stage in STAGES.items():
        expected = oracle.io[f"{seen}_target_stage{stage}"].view_as(targets[stride])
        assert_close(targets[stride], expected, **oracle.tolerance)
    losses = method(batch, CLOCK)
    assert losses.keys() == {"reconstruction", "feature", "feature_4px", "feature_8px", "feature_16px"}
    for stride, stage in STAGES.items():
        assert_close(losses[f"feature_{stride}px"], oracle.io[f"{seen}_loss_stage{stage}"][0], **oracle.tolerance)
    assert_close(losses["reconstruction"], oracle.io["loss_pixel"][0], **oracle.tolerance)
    assert_close(losses["feature"], oracle.io[f"{seen}_loss_mfm"][0], **oracle.tolerance)
    total = sum(weight * losses[name] for name, weight in method.weights.items())
    assert_close(total, oracle.io[f"{seen}_loss_total"][0], **oracle.tolerance)


def test_the_average_moves_as_in_the_reference() -> None:
    oracle = golden("itpn_mfm_ema")
    method = official(oracle.weights, MaskedFeatureSettings())
    assert method.target is not None
    follow(method.target, method.encoder, method.ema_momentum(CLOCK))
    for name, expected in part(oracle.io, "ema_after/").items():
        assert_close(method.target.state_dict()[name], expected, **oracle.tolerance)
        assert not torch.equal(oracle.weights[f"teacher.{name}"], expected)


def config(*overrides: str, **method: object) -> Config:
    return load_config(
        {
            "encoder": {"name": "itpn_micro", "image_size": 16, "dim": 16, "heads": 2, "stages": [1, 1, 2]},
            "method": {"name": "itpn", "decoder": {"dim": 16, "heads": 2}, **method},
            "schedule": {"batch": 4, "steps": 5},
            "speed": {"accelerator": "cpu", "precision": "32"},
            "run": {"tensorboard": False, "log_steps": 1},
        },
        ["encoder.pyramid_dim=8", *overrides],
    )


def build(*overrides: str, **method: object) -> ITPN:
    torch.manual_seed(0)
    return ITPN.build(config(*overrides, **method))


def batch_for(method: ITPN, images: int = 4) -> Batch:
    sampler = method.masks()["mask"]
    generator = torch.Generator().manual_seed(0)
    mask = sampler.collate(torch.stack([sampler.draw(generator) for _ in range(images)]))
    return Batch({"image": torch.randn(images, 3, 16, 16)}, torch.arange(images), {"mask": mask})


@pytest.mark.parametrize("encoder", ["itpn_micro", "fast_itpn_micro"])
def test_the_average_starts_as_a_copy_without_pyramid_and_drops_no_paths(encoder: str) -> None:
    method = build(f"encoder.name={encoder}", "encoder.drop_path=0.5").train()
    target, batch = method.target, batch_for(method)
    assert target is not None
    assert not target.levels
    known = method.encoder.state_dict()
    assert all(torch.equal(value, known[name]) for name, value in target.state_dict().items())
    assert set(target.state_dict()) < set(known)
    first, second = (method.targets(batch.images, batch.mask) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    assert not any(name.startswith("target.") for name in trained_parameters(method))


def test_nothing_of_hidden_pixels_is_seen() -> None:
    """But for the pixels that are to be predicted; the average that sees whole images does."""
    method = build()
    batch = batch_for(method)
    patches = patchify(batch.images, 4)
    other = unpatchify(torch.where(batch.mask.hidden[..., None], torch.randn_like(patches), patches), (4, 4))
    changed = Batch({"image": other}, batch.indices, batch.masks)
    before, after = method(batch, CLOCK), method(changed, CLOCK)
    assert torch.equal(before["feature"], after["feature"])
    assert not torch.equal(before["reconstruction"], after["reconstruction"])
    predicted = [method.decoder(method._encode(each).levels, each.mask) for each in (batch, changed)]
    assert torch.equal(*predicted)
    whole = build(features={"input": "full"})
    assert not torch.equal(whole(batch, CLOCK)["feature"], whole(changed, CLOCK)["feature"])


def test_options() -> None:
    method = build(features={"target_norm": True, "momentum": 0.9, "weight": 2.0})
    batch = batch_for(method)
    assert (method.weights["feature"], method.ema_momentum(CLOCK)) == (2.0, 0.9)
    for target in method.targets(batch.images, batch.mask).values():
        assert_close(target.mean(-1), torch.zeros(target.shape[:-1]), rtol=0, atol=1e-5)
        assert_close(target.std(-1, correction=0), torch.ones(target.shape[:-1]), rtol=0, atol=1e-2)
    raw = build(target="raw")
    shown = raw.pictures(batch)
    assert list(shown) == ["original", "visible", "reconstruction"]
    visible = ~batch.mask.hidden
    assert torch.equal(patchify(shown["reconstruction"], 4)[visible], patchify(batch.images, 4)[visible])


@pytest.mark.parametrize("encoder", ["itpn_micro", "fast_itpn_micro"])
def test_everything_trains_in_bf16(encoder: str) -> None:
    method = build(f"encoder.name={encoder}").train()
    batch = batch_for(method)
    assert method.target is not None
    method.target.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(batch, CLOCK)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    (losses["reconstruction"] + losses["feature"]).backward()
    assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]


def test_start_is_itpns() -> None:
    method = build()
    for layer in (method.decoder.pred, method.decoder.blocks[0].attn.qkv, method.heads["4"]):
        assert 0.015 < layer.weight.std() < 0.025
        assert not layer.bias.any()


def stream(method: ITPN, stop: int | None = None) -> Batches:
    """Batches of 4 images, one per step; a signal arrives at step `stop`."""

    def batches(start: int, total: int) -> Generator[Batch, None, None]:
        for step in range(start, total):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            torch.manual_seed(step)
            yield batch_for(method)

    return batches


def test_the_average_survives_a_resume(tmp_path: Path) -> None:
    """Bit for bit."""
    settings = config("encoder.drop_path=0.2", features={"momentum": 0.5})

    def fresh() -> ITPN:
        torch.manual_seed(0)
        return ITPN.build(settings)

    whole = fresh()
    train(settings, whole, stream=stream(whole))
    assert whole.target is not None
    assert not torch.equal(whole.target.patch_embed.proj.weight, whole.encoder.patch_embed.proj.weight)
    assert not torch.equal(whole.target.patch_embed.proj.weight, fresh().encoder.patch_embed.proj.weight)
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(TrainingStopped, match="after step 3"):
        train(settings, method := fresh(), run, stream=stream(method, 2))
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        train(settings, method := fresh(), run, stream=stream(method))
    for name, value in whole.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name


def test_it_is_compiled_with_and_without_an_average() -> None:
    for method in (build(), build(features={"weight": 0})):
        encoders = [each for each in (method.encoder, method.target) if each is not None]
        assert compiled_parts(method) == [*encoders, method.decoder]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["encoder.name=hivit_micro", "encoder.pyramid_dim=0"],
            "is a HiViT or iTPN without a pyramid; choose itpn_base",
        ),
        (["encoder.pyramid_depth=0"], "encoder.name=itpn_micro is a HiViT or iTPN without a pyramid"),
        (["method.mask_ratio=1.0"], "mask ratio 1.0 leaves 0 of 16 units visible"),
        (["method.mask_ratio=0"], r"mask ratio 0\.0 leaves 16 of 16 units visible"),
        (["method.features.momentum=1"], r"method\.features\.momentum: .* less than 1"),
        (["method.features.weight=-1"], r"method\.features\.weight: .* greater than or equal to 0"),
        (["method.features.input=hidden"], r"method\.features\.input: .*'visible' or 'full'"),
        (["method.decoder.dim=24", "method.decoder.heads=2"], r"method\.decoder: width 24 must be divisible by 16"),
    ],
)
def test_what_does_not_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*overrides).masks()


def test_a_plain_vit_is_refused() -> None:
    settings = load_config({"method": {"name": "itpn"}, "schedule": {"steps": 1}})
    with pytest.raises(ConfigError, match=r"encoder\.name=vit_tiny is a plain ViT; choose itpn_base, fast_itpn_base"):
        ITPN.build(settings)
