from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mimlet.config import load_config
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.methods.settings import SimMIMSettings
from mimlet.methods.simmim import SimMIM
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights import OF_DECODER, load_encoder
from mimlet.objectives.reconstruct import patchify, unpatchify
from tests.methods.official import CLOCK, fill
from tests.shared import Golden, golden

NAMES = {
    "encoder.rel_pos_bias.relative_position_index": "",
    "encoder.mask_token": "mask_token",
    "encoder.": "encoder.",
    "decoder.0.": "head.",
}
PUBLISHED = ViTShape(64, 8, 48, 3, 4, position="none", relative="shared", qv_bias=True)


def official(oracle: Golden) -> tuple[SimMIM, Batch]:
    method = SimMIM(ViT(PUBLISHED), 0.6, 16)
    fill(method, oracle.weights, NAMES)
    mask = Mask.from_hidden(oracle.io["mask"].flatten(1).bool())
    return method, Batch({"image": oracle.io["images"]}, torch.arange(len(mask.hidden)), {"mask": mask})


def plain_loss(method: SimMIM, batch: Batch) -> torch.Tensor:
    """The formula on whole images: pixel shuffle, L1, a mask of pixels."""
    p, (rows, columns) = method.encoder.patch, method.encoder.grid
    tokens = method.encoder(batch.images, batch.mask, method.mask_token).patches
    predicted = F.pixel_shuffle(method.head(tokens).transpose(1, 2).unflatten(2, (rows, columns)), p)
    hidden = batch.mask.hidden.view(-1, 1, rows, columns).float()
    hidden = hidden.repeat_interleave(p, 2).repeat_interleave(p, 3)
    return ((batch.images - predicted).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3


def test_equals_official_simmim() -> None:
    oracle = golden("simmim")
    method, batch = official(oracle)
    tokens = method.encoder(batch.images, batch.mask, method.mask_token).patches
    assert_close(tokens, oracle.io["encoder_out"].flatten(2).transpose(1, 2), **oracle.tolerance)
    assert_close(unpatchify(method.pixels(tokens), (8, 8)), oracle.io["x_rec"], **oracle.tolerance)
    loss = method(batch, CLOCK)["reconstruction"]
    assert_close(loss, oracle.io["loss"][0], **oracle.tolerance)

    loss.backward()
    ours = {name: p.grad for name, p in method.named_parameters()}
    assert all(gradient is not None for gradient in ours.values())
    method.zero_grad()
    plain_loss(method, batch).backward()
    for name, parameter in method.named_parameters():
        assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_official_file_is_read_whole(tmp_path: Path) -> None:
    oracle = golden("simmim")
    torch.save({"model": oracle.weights}, tmp_path / "simmim.pth")
    encoder, report = load_encoder(tmp_path / "simmim.pth", heads=4)
    assert encoder.shape == PUBLISHED
    assert report.fresh == {}
    assert report.skipped == {
        "mask_token": OF_DECODER,
        "rel_pos_bias.relative_position_index": "computed, not learned",
        "decoder.0.weight": "not part of 'encoder'",
        "decoder.0.bias": "not part of 'encoder'",
    }
    method, batch = official(oracle)
    assert_close(encoder(batch.images).latent, method.encoder(batch.images).latent)


def build(form: dict[str, object], **method: object) -> SimMIM:
    torch.manual_seed(0)
    config = load_config(
        {
            "encoder": {"name": "vit_nano", "image_size": 16, "dim": 24, "depth": 2, "heads": 3, **form},
            "method": {"name": "simmim", "mask_px": 8, **method},
            "schedule": {"batch": 2, "steps": 1},
        }
    )
    return SimMIM.build(config)


FORMS: list[dict[str, object]] = [
    {"position": "none", "relative": "shared", "qv_bias": True},
    {},
    {"position": "learned"},
]


def batch_of(method: SimMIM, images: int = 2) -> Batch:
    sampler = method.masks()["mask"]
    draws = torch.stack([sampler.draw(torch.Generator().manual_seed(i)) for i in range(images)])
    return Batch({"image": torch.randn(images, 3, 16, 16)}, torch.arange(images), {"mask": sampler.collate(draws)})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_encoder(form: dict[str, object]) -> None:
    method = build(form)
    batch = batch_of(method)
    assert batch.mask.hidden.sum(1).tolist() == [12, 12]  # 3 of 4 squares of 2 x 2 patches
    loss = method(batch, CLOCK)["reconstruction"]
    assert_close(loss, plain_loss(method, batch))
    loss.backward()
    assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert method.weights == {"reconstruction": 1.0}


def test_hidden_pixels_cannot_reach_the_encoder() -> None:
    method = build(FORMS[0])
    batch = batch_of(method)
    patches = patchify(batch.images, 4)
    changed = unpatchify(torch.where(batch.mask.hidden[..., None], patches + 100, patches), (4, 4))
    ours, theirs = (method.encoder(x, batch.mask, method.mask_token).latent for x in (batch.images, changed))
    assert torch.equal(ours, theirs)


def test_half_precision_is_finite() -> None:
    method = build(FORMS[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch_of(method), CLOCK)["reconstruction"]
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_pictures_keep_what_is_visible() -> None:
    method = build({})
    batch = batch_of(method)
    pictures = method.pictures(batch)
    assert list(pictures) == ["original", "visible", "reconstruction"]
    hidden = batch.mask.hidden
    original, visible, made = (patchify(picture, 4) for picture in pictures.values())
    assert torch.equal(visible, torch.where(hidden[..., None], 0, original))
    assert torch.equal(made[~hidden], original[~hidden])
    whole = method.pixels(method.encoder(batch.images, batch.mask, method.mask_token).patches)
    assert_close(made[hidden], whole[hidden])


@pytest.mark.parametrize("side", [6, 12, 32])
def test_squares_that_do_not_fit(side: int) -> None:
    message = rf"mask_px {side}: squares of {side} px are not made of .* of 4 px, .* of 16 px; expected one of 4, 8$"
    with pytest.raises(ConfigError, match=message):
        build({}, mask_px=side)


def test_numbers_of_the_paper() -> None:
    config = load_config("simmim_tiny")
    assert config.method == SimMIMSettings(mask_ratio=0.6, mask_px=32)
    encoder, schedule, optim, augment = config.encoder, config.schedule, config.optim, config.data.augment
    assert (encoder.position, encoder.relative, encoder.qv_bias, encoder.layer_scale) == ("none", "shared", True, None)
    assert (encoder.drop_path, encoder.shape().heads) == (0.1, 12)
    assert (augment.crop_scale, augment.flip) == ((0.67, 1.0), 0.5)
    assert (optim.lr, optim.lr_batch, optim.weight_decay, optim.betas) == (1e-4, 512, 0.05, (0.9, 0.999))
    assert (optim.clip, optim.decay_tokens) == (5.0, False)
    assert (schedule.batch, schedule.epochs, schedule.warmup_epochs) == (2048, 400, 10)
    assert (schedule.decay, schedule.milestones) == ("step", [0.875])
    sampler = SimMIM.build(config).masking
    assert int(sampler.draw(torch.Generator()).sum()) == 120
