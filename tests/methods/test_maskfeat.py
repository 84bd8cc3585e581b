from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mimlet.config import load_config
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.methods.maskfeat import MaskFeat
from mimlet.methods.settings import BlockMaskSettings, MaskFeatSettings
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.models.weights import load_encoder
from mimlet.objectives.hog import hog_patches
from mimlet.objectives.reconstruct import normalise_patches, patchify
from tests.methods.official import CLOCK, fill
from tests.shared import golden

NAMES = {
    "hogs.": "",
    "mask_token": "mask_token",
    "pred_head.transforms.0.0.": "encoder.norm.",
    "pred_head.projections.0.": "head.",
    "": "encoder.",
}


def test_equals_official_maskfeat() -> None:
    oracle = golden("maskfeat_loss")
    method = MaskFeat(ViT(ViTShape(64, 16, 36, 3, 3, position="learned")), MaskFeatSettings())
    fill(method, oracle.weights, NAMES)
    mask = Mask.from_hidden(oracle.io["mask"].flatten(1).bool())
    assert mask.ids_keep is None, "images hide different numbers of patches"
    batch = Batch({"image": oracle.io["images"]}, torch.arange(3), {"mask": mask})
    predicted, target = method.predict(batch), method.targets(batch.images)
    assert_close(predicted, oracle.io["pred_all"], **oracle.tolerance)
    assert_close(predicted[mask.hidden], oracle.io["pred_masked"], **oracle.tolerance)
    assert_close(target[mask.hidden], oracle.io["target_masked"], **oracle.tolerance)

    loss = method(batch, CLOCK)["prediction"]
    assert_close(loss, oracle.io["loss"][0], **oracle.tolerance)
    loss.backward()
    ours = {name: p.grad for name, p in method.named_parameters()}
    assert all(gradient is not None for gradient in ours.values())
    method.zero_grad()
    error = method.predict(batch)[mask.hidden] - oracle.io["target_masked"]
    error.square().mean().backward()
    for name, parameter in method.named_parameters():
        assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_official_file_is_read_whole(tmp_path: Path) -> None:
    """SlowFast keeps weights under `model_state`; the head's norm is the encoder's last."""
    oracle = golden("maskfeat_loss")
    torch.save({"model_state": oracle.weights}, tmp_path / "maskfeat.pyth")
    encoder, report = load_encoder(tmp_path / "maskfeat.pyth", heads=3)
    assert encoder.shape == ViTShape(64, 16, 36, 3, 3, position="learned")
    assert report.fresh == {}
    assert torch.equal(encoder.norm.weight, oracle.weights["pred_head.transforms.0.0.weight"])
    left = {"hogs.0.weight_x", "hogs.0.weight_y", "mask_token"}
    assert report.skipped.keys() == left | {f"pred_head.projections.0.{part}" for part in ("weight", "bias")}


def build(target: str = "hog", **method: object) -> MaskFeat:
    torch.manual_seed(0)
    config = load_config(
        {
            "encoder": {"name": "vit_nano", "image_size": 16, "dim": 24, "depth": 2, "heads": 3, "position": "learned"},
            "method": {"name": "maskfeat", "target": target, **method},
            "teacher": {"path": "teacher"},
            "schedule": {"batch": 2, "steps": 1},
        }
    )
    return MaskFeat.build(config, teachers=Teachers(Teacher(ViT(ViTShape(16, 4, 20, 2, 2)))))


def batch() -> Batch:
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, :7], hidden[1, 5:8] = True, True
    return Batch({"image": torch.randn(2, 3, 16, 16)}, torch.arange(2), {"mask": Mask.from_hidden(hidden)})


def expected(method: MaskFeat, target: str, images: Tensor) -> Tensor:
    if target == "hog":
        return hog_patches(images, 4, 9, 2)
    if target == "teacher":
        assert method.teacher is not None
        tokens = method.teacher(images).latent[:, 1:]
        variance, mean = torch.var_mean(tokens, dim=-1, correction=0, keepdim=True)
        return (tokens - mean) / (variance + 1e-5).sqrt()
    pixels = patchify(images, 4)
    return normalise_patches(pixels) if target == "normalised" else pixels


@pytest.mark.parametrize(("target", "numbers"), [("hog", 108), ("normalised", 48), ("raw", 48), ("teacher", 20)])
def test_every_target(target: str, numbers: int) -> None:
    method, given = build(target).train(), batch()
    assert (method.teacher is None) == (target != "teacher")
    wanted = expected(method, target, given.images)
    assert wanted.shape == (2, 16, numbers)
    error = (method.predict(given) - wanted)[given.mask.hidden]
    loss = method(given, CLOCK)["prediction"]
    assert_close(loss, error.square().mean())
    assert method.weights == {"prediction": 1.0}
    loss.backward()
    silent = {n for n, p in method.named_parameters() if p.requires_grad and p.grad is None}
    assert not silent
    assert method.teacher is None or not method.teacher.training


def test_masks_are_blocks_of_the_published_shares() -> None:
    method = build()
    assert (method.masking.total, method.masking.smallest, method.masking.tries) == (6, 1, 10)
    assert method.masks() == {"mask": method.masking}


def test_options_of_the_histograms() -> None:
    method, given = build(hog={"bins": 6, "cell": 4, "gaussian": 8}), batch()
    assert method.outputs == 3 * 6
    assert_close(method.targets(given.images), hog_patches(given.images, 4, 6, 4, 8))


@pytest.mark.parametrize(
    ("hog", "message"),
    [
        ({"cell": 3}, r"hog\.cell 3 does not divide the patch of 4 px; expected one of 1, 2, 4$"),
        ({"gaussian": 6}, r"hog\.gaussian 6: expected the side of a window that divides the image of 16 px"),
        ({"gaussian": 1}, r"hog\.gaussian 1: .* 2 px or more, or 0 for none"),
    ],
)
def test_histograms_that_do_not_fit(hog: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(hog=hog)


def test_only_a_teachers_features_need_a_teacher() -> None:
    values = {"schedule": {"batch": 2, "steps": 1}, "method": {"name": "maskfeat", "target": "teacher"}}
    with pytest.raises(ConfigError, match=r"teacher\.path: method 'maskfeat' needs a teacher for method\.target"):
        load_config(values)
    assert load_config(values, ["method.target=raw"]).teacher.path is None


def test_initialisation() -> None:
    method = build()
    biases = {name: p for name, p in method.named_parameters() if name.endswith("bias")}
    zero = {"head.bias", "encoder.norm.bias"}
    assert all((p == (0 if name in zero else 0.02)).all() for name, p in biases.items() if "patch_embed" not in name)
    assert method.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_half_precision_is_finite() -> None:
    method, given = build(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(given, CLOCK)["prediction"]
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_pictures_draw_what_is_predicted() -> None:
    method, given = build(), batch()
    with torch.no_grad():
        method.head.weight.zero_()
        # In every channel and cell, all of the gradient is horizontal: the edges are upright, one column per cell.
        method.head.bias.view(3, 9, 2, 2)[:, 4] = 1
    pictures = method.pictures(given)
    assert list(pictures) == ["original", "visible", "reconstruction"]
    assert {tuple(picture.shape) for picture in pictures.values()} == {(2, 3, 64, 64)}  # cells of 8 px
    hidden = given.mask.hidden.view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1)
    for name in ("visible", "reconstruction"):
        assert torch.equal(pictures[name][~hidden], pictures["original"][~hidden])
    assert not pictures["visible"][hidden].any()
    drawn = pictures["reconstruction"][0, 0, :16, :16]
    assert_close(drawn[3], drawn[4])
    assert drawn[3, 3] == drawn[3, 4] > drawn[3, 1]
    assert "trokes" in method.picture_caption


def test_pictures_of_other_targets() -> None:
    given = batch()
    assert build("teacher").pictures(given) == {}
    made = build("raw").pictures(given)["reconstruction"]
    shown = ~given.mask.hidden
    assert_close(patchify(made, 4)[shown], patchify(given.images, 4)[shown])


def test_numbers_of_the_paper() -> None:
    config = load_config("maskfeat_tiny")
    assert isinstance(config.method, MaskFeatSettings)
    assert config.method.masking == BlockMaskSettings(ratio=78 / 196, smallest=15 / 196)
    encoder, schedule, optim, augment = config.encoder, config.schedule, config.optim, config.data.augment
    assert (encoder.position, encoder.relative, encoder.qv_bias, encoder.drop_path) == ("learned", "none", False, 0)
    assert (augment.crop_scale, augment.flip, augment.color_jitter) == ((0.5, 1.0), 0.5, 0)
    assert (optim.lr, optim.lr_batch, optim.weight_decay, optim.betas) == (2e-4, 256, 0.05, (0.9, 0.999))
    assert (optim.clip, optim.decay_tokens, optim.min_lr) == (0.02, True, 1e-6)
    assert (schedule.batch, schedule.epochs, schedule.warmup_epochs, schedule.decay) == (2048, 400, 30, "cosine")
    method = MaskFeat.build(config)
    assert (method.hog.cell, method.hog.bins, method.hog.gaussian, method.outputs) == (8, 9, 0, 108)
    assert (method.masking.total, method.masking.smallest) == (78, 15)
