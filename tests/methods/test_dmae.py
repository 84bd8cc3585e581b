from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.methods.dmae import DMAE, weight_of
from mimlet.methods.mae import build_decoder
from mimlet.methods.settings import DecoderSettings
from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps
from mimlet.models.hiera import Hiera
from mimlet.models.shapes import HieraShape, ViTShape
from mimlet.models.teacher import Teacher
from mimlet.models.vit import ViT
from tests.families import HIERARCHICAL, micro
from tests.methods.official import CLOCK, make_batch, make_decoder, make_encoder, part
from tests.shared import Golden, golden

STUDENT = ViTShape(32, 8, 24, 3, 6)
TEACHER = ViTShape(32, 8, 32, 3, 4)


def build(oracle: Golden, **options: object) -> DMAE:
    weights = part(oracle.weights, "model.")
    encoder = make_encoder(weights, STUDENT)
    decoder = make_decoder(weights, encoder, 16, 1, 2)
    teacher = Teacher(make_encoder(part(oracle.weights, "tch_model."), TEACHER))
    return DMAE(encoder, decoder, teacher, **options)  # type: ignore[arg-type]


def our_name(official: str, method: DMAE, extra: int = -1) -> str:
    name = official.removeprefix("model.")
    if official.startswith("attn_adapter.adapter"):
        layer = int(name.split("adapter")[2].split(".")[0]) + 1
        return f"head_maps.{[t for _, t in method.attention_pairs].index(layer)}.weight"
    if official.startswith("hidden_adapter.adapter"):
        layer = int(name.split("adapter")[2].split(".")[0])
        return f"feature_maps.{[t for _, t in method.hidden_pairs].index(layer)}.weight"
    if extra >= 0 and name.startswith(f"blocks.{extra}."):
        return "extra." + name.removeprefix(f"blocks.{extra}.")
    return f"encoder.{name}"


def load_maps(method: DMAE, oracle: Golden) -> None:
    parameters = dict(method.named_parameters())
    for name, value in oracle.weights.items():
        if "_adapter." in name:
            try:
                ours = parameters[our_name(name, method)]
            except ValueError:  # a map of the other run
                continue
            ours.data.copy_(value.flatten(1))


@pytest.mark.parametrize("run", ["dmae", "mixed"])
def test_equals_official_distillation(run: str) -> None:
    oracle = golden("mae_lite_distill")
    settings = oracle.meta["constructor"]["runs"][run]
    method = build(
        oracle,
        attention=[(i, i) for i in settings["distill_attn_idx"]],
        hidden=[(i, i) for i in settings["distill_hidden_idx"]],
        attention_weight=settings["distill_attn_alpha"],
        hidden_weight=settings["distill_hidden_alpha"],
    )
    load_maps(method, oracle)
    batch = make_batch(oracle.io, 0.75)
    losses = method(batch, CLOCK)
    assert_close(losses["reconstruction"], oracle.io["reconstruction_loss"][0], **oracle.tolerance)
    assert_close(losses["attention"], oracle.io[f"{run}.attn_loss"][0], **oracle.tolerance)
    if method.hidden_pairs:
        assert_close(losses["hidden"], oracle.io[f"{run}.hidden_loss"][0], **oracle.tolerance)
    total = sum(method.weights[name] * loss for name, loss in losses.items())
    assert_close(total, oracle.io[f"{run}.total_loss"][0], **oracle.tolerance)

    student = method.encoder(batch.images, batch.mask, taps=method.student_taps)
    teacher = method.teacher(batch.images, batch.mask, taps=method.teacher_taps)
    for i, _ in method.attention_pairs:
        assert_close(student.attention[i], oracle.io[f"{run}.student_attn.{i}"], **oracle.tolerance)
        assert_close(teacher.attention[i], oracle.io[f"{run}.teacher_attn.{i}"], **oracle.tolerance)
    for i, _ in method.hidden_pairs:
        assert_close(student.normed[i], oracle.io[f"{run}.student_hidden.{i}"], **oracle.tolerance)
        assert_close(teacher.normed[i], oracle.io[f"{run}.teacher_hidden.{i}"], **oracle.tolerance)

    total.backward()
    gradients = {name: p.grad for name, p in method.named_parameters()}
    expected = {k.removeprefix(f"{run}.grad."): v for k, v in oracle.io.items() if k.startswith(f"{run}.grad.")}
    assert len(expected) >= 4
    for name, value in expected.items():
        ours = gradients[our_name(name, method)]
        assert_close(ours.view_as(value), value, **oracle.tolerance)


def test_equals_official_decoupled_distillation() -> None:
    oracle = golden("mae_lite_distill_d2")
    method = build(oracle, attention=[(4, 3)], decode_layer=2, extra_block=True)
    load_maps(method, oracle)
    extra = {name: oracle.weights[f"model.blocks.3.{name}"] for name in method.extra.state_dict()}
    method.extra.load_state_dict(extra)
    batch = make_batch(oracle.io, 0.75)
    losses = method(batch, CLOCK)
    assert_close(losses["reconstruction"], oracle.io["reconstruction_loss"][0], **oracle.tolerance)
    assert_close(losses["attention"], oracle.io["attn_loss"][0], **oracle.tolerance)
    total = losses["reconstruction"] + losses["attention"]
    assert_close(total, oracle.io["total_loss"][0], **oracle.tolerance)

    student = method.encoder(batch.images, batch.mask, taps=Taps(hidden=(2, 3), tokens=False))
    assert_close(student.hidden[2], oracle.io["student_block_out_at_decode"], **oracle.tolerance)
    assert_close(student.hidden[3], oracle.io["student_last_full_block_out"], **oracle.tolerance)
    assert_close(method.extra(student.hidden[3]), oracle.io["student_attn"], **oracle.tolerance)
    latent = method.encoder.norm(student.hidden[2])
    assert_close(latent, oracle.io["latent_for_decoder"], **oracle.tolerance)
    assert_close(method.decoder(latent, batch.mask), oracle.io["pred"], **oracle.tolerance)

    total.backward()
    gradients = {name: p.grad for name, p in method.named_parameters()}
    expected = {k.removeprefix("grad."): v for k, v in oracle.io.items() if k.startswith("grad.")}
    assert len(expected) == 5
    for name, value in expected.items():
        ours = gradients[our_name(name, method, extra=3)]
        assert_close(ours.view_as(value), value, **oracle.tolerance)


def hiera_names(encoder: Encoder) -> dict[str, str]:
    """Ours -> official."""
    return {name: name.replace("norm.", "encoder_norm.", name.startswith("norm.")) for name in encoder.state_dict()}


def test_equals_official_distillation_of_hiera() -> None:
    """Units are kept in raster order, the teacher drops the student's, and pixels of a label are ordered (channel, row,
    column) officially.
    """
    oracle = golden("mae_lite_hiera_distill")
    weights, io = part(oracle.weights, "model."), oracle.io
    student = Hiera(HieraShape(image_size=64, dim=6, stages=(1, 1, 2, 1)))
    teacher = Hiera(HieraShape(image_size=64, dim=8, stages=(1, 1, 1, 2)))
    for encoder, source in ((student, weights), (teacher, part(oracle.weights, "tch_model."))):
        encoder.load_state_dict({ours: source[theirs] for ours, theirs in hiera_names(encoder).items()})
    decoder = build_decoder(student, DecoderSettings(dim=12, depth=1, heads=3, position="learned"))
    names = {name: name if name == "mask_token" else f"decoder_{name}" for name in decoder.state_dict()}
    decoder.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
    with torch.no_grad():
        for parameter in decoder.pred.parameters():
            parameter.copy_(parameter.view(3, 256, -1).transpose(0, 1).reshape(parameter.shape))
    method = DMAE(student, decoder, Teacher(teacher), attention=[(5, 5)], mask_ratio=0.4)
    assert method.head_maps[0].weight.shape == (8, 8)
    method.head_maps[0].weight.data.copy_(oracle.weights["attn_adapter.adapter4.weight"].flatten(1))

    mask = Mask.from_hidden(~io["mask_keep"])
    assert int(mask.hidden[0].sum()) == int(Mask.from_noise(io["noise"], 0.4).hidden[0].sum())
    batch = Batch({"image": io["imgs"]}, torch.arange(2), {"mask": mask})
    losses = method(batch, CLOCK)
    total = losses["reconstruction"] + losses["attention"]
    assert_close(losses["reconstruction"], io["reconstruction_loss"][0], **oracle.tolerance)
    assert_close(losses["attention"], io["attn_loss"][0], **oracle.tolerance)
    assert_close(total, io["total_loss"][0], **oracle.tolerance)
    features = student(batch.images, mask, taps=method.student_taps)
    assert_close(
        torch.einsum("bhij,gh->bgij", features.attention[5], method.head_maps[0].weight),
        io["mapped_student_attn"],
        **oracle.tolerance,
    )
    total.backward()
    for name, ours in {
        "model.patch_embed.proj.weight": student.patch_embed.proj.weight,
        "model.pos_embed": student.pos_embed,
        "model.blocks.4.attn.qkv.weight": student.blocks[4].attn.qkv.weight,
        "attn_adapter.adapter4.weight": method.head_maps[0].weight,
    }.items():
        assert ours.grad is not None
        assert_close(ours.grad.view_as(io[f"grad.{name}"]), io[f"grad.{name}"], **oracle.tolerance)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_every_layer_of_a_hierarchical_encoder_can_be_paired(name: str) -> None:
    encoder, guide = micro(name), Teacher(micro(name, stages=(1, 1, 4, 1) if "hiera" in name else (1, 2, 4)))
    pairs = [(i, i if i < 2 or "hiera" in name else i + 1) for i in range(encoder.depth + 1)]
    method = DMAE(encoder, None, guide, attention=[], hidden=pairs, mask_ratio=0.5)
    mask = Mask.from_noise(torch.rand(2, encoder.units), 0.5)
    losses = method(Batch({"image": torch.randn(2, 3, 32, 32)}, torch.arange(2), {"mask": mask}), CLOCK)
    losses["hidden"].backward()
    assert all(weight_of(each).grad is not None for each in method.feature_maps)


@pytest.mark.parametrize(
    ("student", "teacher", "pair", "settings"),
    [
        ("hivit_micro", "vit_nano", (6, 4), {}),
        ("itpn_micro", "hivit_micro", (5, 6), {}),
        ("fast_itpn_micro", "vit_nano", (3, 1), {}),
        ("hiera_micro", "hiera_micro", (5, 6), {"fuse": "without_last"}),
    ],
)
def test_any_encoder_learns_from_any_that_hides_alike(
    student: str, teacher: str, pair: tuple[int, int], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    encoder = micro(student, **settings)
    guide = Teacher(micro(teacher, **({"class_token": False} if teacher == "vit_nano" else {})))
    decoder = build_decoder(encoder, DecoderSettings(dim=16, heads=2))
    method = DMAE(encoder, decoder, guide, attention=[pair], mask_ratio=0.5)
    images = torch.randn(2, 3, 32, 32)
    batch = Batch({"image": images}, torch.arange(2), {"mask": Mask.from_noise(torch.rand(2, encoder.units), 0.5)})
    losses = method(batch, CLOCK)
    assert losses.keys() == {"reconstruction", "attention"}
    (losses["attention"] + losses["reconstruction"]).backward()
    last = encoder.depth + 2 * (student != "hiera_micro") - 1
    trained = {name: parameter.grad is not None for name, parameter in encoder.named_parameters()}
    # Without the last stage in the sum, only what leads to the distilled block is trained of it.
    assert trained[f"blocks.{last}.mlp.fc1.weight" if "fast" not in student else f"blocks.{last}.mlp.w1.weight"] == (
        not settings
    )
    assert trained["patch_embed.proj.weight"]
    hidden = encoder.patch_mask(batch.mask).hidden.unflatten(1, encoder.grid)
    pixels = hidden.repeat_interleave(encoder.patch, 1).repeat_interleave(encoder.patch, 2)[:, None].expand_as(images)
    shown = method.pictures(batch)
    assert torch.equal(shown["visible"], images.masked_fill(pixels, 0))
    assert torch.equal(shown["reconstruction"][~pixels], images[~pixels])
    assert not torch.allclose(shown["reconstruction"][pixels], images[pixels])


@pytest.mark.parametrize(
    ("student", "teacher", "pair", "message"),
    [
        ("hivit_micro", "hivit_micro", (2, 6), r"layer 2 of the student has 16 x 16 tokens, layer 6 .* 8 x 8"),
        (
            "hivit_micro",
            "hiera_micro",
            (6, 6),
            "keep visible tokens in different orders; take a teacher of the student's",
        ),
    ],
)
def test_layers_that_cannot_be_compared(student: str, teacher: str, pair: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DMAE(micro(student), None, Teacher(micro(teacher)), attention=[pair])


def small(**options: object) -> DMAE:
    encoder = ViT(STUDENT)
    return DMAE(encoder, None, Teacher(ViT(TEACHER)), **options)  # type: ignore[arg-type]


def test_without_reconstruction_only_attention_is_minimised() -> None:
    method = small(attention=[(3, 3)])
    assert method.weights == {"attention": 1.0}
    assert not method.student_taps.tokens


def test_literal_form_warns_about_untrained_weights() -> None:
    encoder = ViT(STUDENT)
    decoder = build_decoder(encoder, DecoderSettings(dim=12))
    with pytest.warns(UserWarning, match="stay as initialised"):
        DMAE(encoder, decoder, Teacher(ViT(TEACHER)), attention=[(3, 3)], decode_layer=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": [(4, 3)]}, r"no pair \(4, 3\); the student has layers 1 to 3"),
        ({"attention": [(3, 4)]}, "the teacher 1 to 3"),
        ({"attention": []}, "distils nothing"),
        ({"attention": [(3, 3)], "decode_layer": 9}, "1 to 3"),
    ],
)
def test_impossible_layers_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_teacher_is_left_alone() -> None:
    method = small(attention=[(3, 3)])
    method.train()
    assert not method.teacher.training
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert torch.equal(method.teacher.scale, torch.ones_like(method.teacher.scale))
