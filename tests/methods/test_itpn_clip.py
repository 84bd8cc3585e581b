"""iTPN and Fast-iTPN with a frozen teacher."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.config import Config, load_config
from mimlet.data.batch import Batch
from mimlet.data.masks import BlockMasking, Mask
from mimlet.errors import ConfigError, WeightsError
from mimlet.methods.itpn_clip import ITPNClip
from mimlet.methods.masked import block_masking
from mimlet.methods.settings import ITPNClipSettings
from mimlet.models.features import Taps
from mimlet.models.hivit import HiViT
from mimlet.models.shapes import HiViTShape, ViTShape
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.objectives.reconstruct import patchify, unpatchify
from mimlet.train.optim import trained_parameters
from tests.methods.official import CLOCK, fill
from tests.shared import Golden, golden

CLIP_SHAPE = HiViTShape(
    64, 16, 32, (1, 1, 8), 2, relative="full", layer_scale=0.1, pyramid_dim=16, pyramid_depth=1, pyramid_hidden=64
)
FAST_SHAPE = HiViTShape(
    64,
    16,
    32,
    (1, 1, 2),
    2,
    3.0,
    "fast",
    "learned",
    layer_scale=0.1,
    pyramid_dim=24,
    pyramid_depth=1,
    pyramid_hidden=64,
)
CLIP_NAMES = {
    "relative_position_index": "",
    "decoder_embed.": "embed.",
    "cls_pt_layers.": "auxiliary.blocks.",
    "norm_cls.": "auxiliary.norm.",
    "lm_cls_head.": "auxiliary.head.",
    "mask_token": "mask_token",
    "lm_head.": "lm_head.",
    "norm.": "norm.",
    "": "encoder.",
}
FAST_NAMES = {"decoder_embed.": "embed.", "mask_token": "mask_token", "lm_head.": "lm_head.", "": "encoder."}


class Says(Teacher):
    """A teacher of 4 x 4 patches whose tokens are given."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(ViT(ViTShape(64, 16, tokens.shape[-1], 1, 2, class_token=False)))
        self.said = tokens

    def forward(self, images: Tensor, mask: Mask | None = None, taps: Taps | None = None):  # type: ignore[no-untyped-def]
        features = super().forward(images)
        features.tokens = self.said
        return features


def official(oracle: Golden, shape: HiViTShape, target: str, names: dict[str, str], **options: object) -> ITPNClip:
    method = ITPNClip(HiViT(shape), ITPNClipSettings.model_validate(options), Says(oracle.io[target]))
    beside = {name: value for name, value in method.state_dict().items() if name.startswith("teacher.")}
    fill(method, {**beside, **oracle.weights}, {"teacher.": "teacher.", **names})
    return method.eval()


def batch_of(oracle: Golden) -> Batch:
    mask = Mask.from_hidden(oracle.io["bool_masked_pos"].bool())
    return Batch({"image": oracle.io["imgs"]}, torch.arange(len(oracle.io["imgs"])), {"mask": mask})


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_equals_official_itpn(loss: str) -> None:
    oracle = golden("itpn_mfm_clip")
    io, close = oracle.io, oracle.tolerance
    options = {"form": "compat", "auxiliary": True, "loss": loss}
    method, batch = official(oracle, CLIP_SHAPE, "target_raw", CLIP_NAMES, **options), batch_of(oracle)
    assert_close(method.targets(batch.images), io["target"], **close)
    assert method.auxiliary is not None
    assert method.auxiliary.block == 1 + 1 + 7
    assert {block.norm1.eps for block in method.auxiliary.blocks} == {1e-5}

    tokens = method.encoder(batch.images, batch.mask, method.mask_token, Taps(hidden=(9,), tokens=False)).hidden[9]
    for block in method.auxiliary.blocks:
        tokens = block(tokens, block.attn.bias(method.encoder.relative_position_index))
    assert_close(tokens, io["aux_tokens"], **close)
    predictions = method.predict(batch)
    assert_close(predictions, {"prediction": io["pred"], "auxiliary": io["pred_aux"]}, **close)
    losses = method(batch, CLOCK)
    if loss == "smooth_l1":
        assert_close(losses, {"prediction": io["loss_main"][0], "auxiliary": io["loss_aux"][0]}, **close)
        assert_close(sum(method.weights[name] * value for name, value in losses.items()), io["loss"][0], **close)
    else:
        assert_close(1 + losses["prediction"], io["one_minus_cos"][0], **close)


def test_equals_the_fast_itpn_of_the_fork() -> None:
    oracle = golden("fast_itpn_pretrain")
    options = {"loss": "cosine", "target_norm": False, "patch_gradient": 0.1}
    method, batch = official(oracle, FAST_SHAPE, "target", FAST_NAMES, **options), batch_of(oracle)
    predicted = method.predict(batch)["prediction"]
    assert_close(predicted[batch.mask.hidden], oracle.io["pred_masked"], **oracle.tolerance)
    assert_close(method(batch, CLOCK), {"prediction": oracle.io["loss"][0]}, **oracle.tolerance)
    assert_close(method.targets(batch.images), oracle.io["target"])
    assert isinstance(method.norm, nn.Identity), "the encoder's own norm is used twice"


def config(*overrides: str, **method: object) -> Config:
    return load_config(
        {
            "encoder": {"name": "itpn_micro", "image_size": 16, "dim": 16, "heads": 2, "stages": [1, 1, 8]},
            "method": {"name": "itpn_clip", **method},
            "teacher": {"path": "python:"},
            "schedule": {"batch": 4, "steps": 5},
        },
        ["encoder.pyramid_dim=8", *overrides],
    )


def teacher(size: int = 16) -> Teacher:
    torch.manual_seed(1)
    return Teacher(ViT(ViTShape(size, 4, 20, 2, 2)))


def build(*overrides: str, **method: object) -> ITPNClip:
    torch.manual_seed(0)
    return ITPNClip.build(config(*overrides, **method), teachers=Teachers(teacher()))


def batch() -> Batch:
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    hidden[0, :7], hidden[1, 5:8], hidden[2, 3:9], hidden[3, 10:12] = True, True, True, True
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return Batch({"image": images}, torch.arange(4), {"mask": Mask.from_hidden(hidden)})


def changed(given: Batch) -> Batch:
    """Other pixels where they are hidden."""
    patches = patchify(given.images, 4)
    other = torch.where(given.mask.hidden[..., None], torch.randn_like(patches), patches)
    return Batch({"image": unpatchify(other, (4, 4))}, given.indices, given.masks)


@pytest.mark.parametrize("encoder", ["itpn_micro", "fast_itpn_micro"])
def test_leak_free_sees_nothing_of_hidden_pixels(encoder: str) -> None:
    """The target alone changes with them."""
    method, given = build(f"encoder.name={encoder}", auxiliary=True).eval(), batch()
    other = changed(given)
    before, after = method.predict(given), method.predict(other)
    assert before.keys() == {"prediction", "auxiliary"}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not torch.equal(method.targets(given.images), method.targets(other.images))


def test_compat_leaks_into_the_pyramid() -> None:
    """As published: the finer levels see hidden pixels; the auxiliary prediction does not."""
    method, given = build(form="compat", auxiliary=True).eval(), batch()
    before, after = method.predict(given), method.predict(changed(given))
    assert torch.equal(before["auxiliary"], after["auxiliary"])
    moved = (before["prediction"] - after["prediction"]).abs().amax(-1) > 1e-6
    assert torch.equal(moved, given.mask.hidden)


@pytest.mark.parametrize(
    ("options", "everywhere"),
    [
        ({}, False),
        ({"supervise": "all"}, True),
        ({"form": "compat"}, True),
        ({"form": "compat", "supervise": "masked"}, False),
    ],
)
def test_what_is_supervised(options: dict[str, str], everywhere: bool) -> None:
    method, given = build(**options).eval(), batch()
    asked = torch.ones_like(given.mask.hidden) if everywhere else given.mask.hidden
    tokens = method.teacher(given.images).patches
    wanted = F.layer_norm(tokens, (20,))[asked]
    expected = F.smooth_l1_loss(method.predict(given)["prediction"][asked], wanted)
    assert_close(method(given, CLOCK)["prediction"], expected)
    assert method.mask_token.shape == (1, 1, 16 if "form" in options else 64)


def test_pieces_of_ragged_masks_make_the_whole_step() -> None:
    """Gradients too, those of the patch embedding being scaled."""

    def pieces(given: Batch, n: int) -> list[Batch]:
        hidden, size = given.mask.hidden, len(given) // n
        return [
            Batch(
                {"image": given.images[i : i + size]},
                given.indices[i : i + size],
                {"mask": Mask.from_hidden(hidden[i : i + size])},
            )
            for i in range(0, len(given), size)
        ]

    found = []
    for n, factor in ((1, 1.0), (4, 1.0), (2, 0.1)):
        method = build(auxiliary=True, patch_gradient=factor)
        shown = {"prediction": 0.0, "auxiliary": 0.0}
        for piece in pieces(batch(), n):
            losses = method(piece, CLOCK)
            (sum(losses.values()) / n).backward()
            shown = {name: shown[name] + losses[name].item() / n for name in shown}
        method.on_gradients(CLOCK)
        method.after_step(CLOCK)
        found.append((shown, {name: p.grad for name, p in trained_parameters(method).items()}))
    (whole, gradients), (in_four, same), (_, scaled) = found
    assert in_four == pytest.approx(whole, rel=1e-5)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert_close(same[name], gradient, rtol=1e-4, atol=1e-7)
        factor = 0.1 if name.startswith("encoder.patch_embed.") else 1
        assert_close(scaled[name], factor * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["leak_free", "compat"])
def test_everything_trains_in_bf16(form: str) -> None:
    method, given = build(form=form, auxiliary=True, loss="cosine").train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(given, CLOCK)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in trained_parameters(method).items() if p.grad is None]
    assert not method.teacher.training


def test_masks_are_blocks_of_the_published_shares() -> None:
    assert build().masks() == {"mask": BlockMasking((4, 4), 6, 1, 0, 10)}
    assert block_masking(ITPNClipSettings().masking, (14, 14)) == BlockMasking((14, 14), 75, 16, 0, 10)


def test_pictures_show_the_error_of_every_patch() -> None:
    method, given = build().eval(), batch()
    shown = method.pictures(given)
    assert list(shown) == ["original", "visible", "error"]
    assert shown["error"].shape == (4, 4, 4)
    assert (shown["error"] >= 0).all()
    hidden = given.mask.hidden[..., None]
    assert_close(patchify(shown["visible"], 4), torch.where(hidden, 0, patchify(given.images, 4)))
    predicted, wanted = method.predict(given)["prediction"], method.targets(given.images)
    assert_close(shown["error"].flatten(1), 1 - F.cosine_similarity(predicted, wanted, dim=-1))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images' half of a tiny CLIP, with its projection, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    settings = transformers.CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=20, **sizes)
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPVisionModelWithProjection(settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("projection", [True, False])
def test_targets_of_a_clip(clip: Path, projection: bool) -> None:
    """Its patch tokens after the last norm, maybe times the projection that its class token passes."""
    import transformers

    overrides = [f"teacher.path={clip}", "teacher.precision=32"]
    method = ITPNClip.build(config(*overrides, target_projection=projection)).eval()
    given = batch()
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    tower, seen = model.vision_model, method.teacher.inputs(given.images)
    assert seen.shape[-1] == 32
    tokens = tower.post_layernorm(tower(seen).last_hidden_state)
    if projection:
        assert_close(model.visual_projection(tokens[:, 0]), model(seen).image_embeds)
        tokens = model.visual_projection(tokens)
    assert_close(method.targets(given.images), F.layer_norm(tokens[:, 1:], tokens.shape[-1:]), rtol=1e-4, atol=1e-5)
    assert method.lm_head.out_features == (20 if projection else 32)
    assert method(given, CLOCK)["prediction"].isfinite()


def test_a_teacher_of_another_grid_is_resized_or_refused() -> None:
    torch.manual_seed(0)
    sized = ITPNClip.build(config(), teachers=Teachers(ViT(ViTShape(24, 4, 20, 2, 2))))
    assert sized.targets(batch().images).shape == (4, 16, 20)
    with pytest.raises(WeightsError, match="answers with 6 x 6 patches, the student sees 4 x 4"):
        ITPNClip.build(config(), teachers=Teachers(teacher(24)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.stages=[1,1,7]", "method.auxiliary=true"], r"8 or more blocks in stage 3, .*\[1, 1, 7\] has 7"),
        (["encoder.name=fast_itpn_micro", "method.form=compat"], "is a Fast-iTPN, whose published form is leak_free"),
        (["encoder.pyramid_depth=0"], "method 'itpn_clip' trains a feature pyramid, .* without a pyramid"),
        (["method.masking.ratio=1"], r"method\.masking\.ratio: .* less than 1"),
        (["method.masking.ratio=0.99"], r"block-wise masking is to hide 16 \(total\) of 16 patches"),
        (["method.patch_gradient=0"], r"method\.patch_gradient: .* greater than 0"),
        (["method.loss=mse"], r"method\.loss: .*'smooth_l1' or 'cosine'"),
        (["teacher.path=none"], r"teacher\.path: method 'itpn_clip' needs a teacher"),
    ],
)
def test_what_does_not_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*overrides)
