from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mimlet.config import Config, load_config, read_recipe, validate
from mimlet.errors import ConfigError, WeightsError
from mimlet.methods.g2sd import G2SD, hidden_patches
from mimlet.methods.settings import DecoderSettings, G2SDSettings
from mimlet.models.decoders import Decoder
from mimlet.models.features import Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.models.weights import DECODER_FILE, ENCODER_FILE, encoder_state, save_decoder, save_weights
from mimlet.objectives.hidden import hidden_loss, hidden_target
from tests.methods.official import CLOCK, make_batch, make_decoder, make_encoder, part
from tests.shared import Golden, golden

STUDENT = ViTShape(32, 8, 24, 2, 3)
TEACHER = ViTShape(32, 8, 48, 2, 4)
TARGETS = {
    "decoder": {"decoder"},
    "decoder_masked": {"decoder"},
    "encoder": {"encoder"},
    "encoder_and_masked": {"decoder", "encoder"},
}


def official(oracle: Golden, target: str = "decoder", *, bf16: bool = False) -> G2SD:
    student, teacher = part(oracle.weights, "student."), part(oracle.weights, "teacher.")
    encoder, theirs = make_encoder(student, STUDENT), make_encoder(teacher, TEACHER)
    method = G2SD(
        encoder,
        make_decoder(student, encoder, 16, 2, 2),
        Teacher(theirs, make_decoder(teacher, theirs, 32, 4, 4), bf16=bf16),
        target=target,  # type: ignore[arg-type]
    )
    for ours, name in (method.decoder_map, "decoderfeature_pred"), (method.encoder_map, "encoderfeature_pred"):
        if ours is not None:
            layers = {f"{i}.{kind}": student[f"{name}.fc{k}.{kind}"] for i, k in ((0, 1), (2, 2)) for kind in KINDS}
            ours.load_state_dict(layers)
    return method


KINDS = ("weight", "bias")


def our_name(name: str) -> str:
    if name.startswith("decoderfeature_pred."):
        return name.replace("decoderfeature_pred.fc1", "decoder_map.0").replace(
            "decoderfeature_pred.fc2", "decoder_map.2"
        )
    if name.startswith("decoder_") or name == "mask_token":
        return f"student_decoder.{name.removeprefix('decoder_')}"
    return f"encoder.{name}"


def test_equals_official_generic_stage() -> None:
    oracle = golden("g2sd_generic")
    method, batch = official(oracle), make_batch(oracle.io, 0.75)
    assert torch.equal(batch.mask.hidden, oracle.io["mask"].bool())
    assert method.layer == oracle.meta["constructor"]["teacher"]["suplayer"] == 2
    teacher = method.teacher(batch.images, batch.mask, taps=method.teacher_taps)
    assert_close(teacher.decoded[2], oracle.io["teacher_decoder_hidden"], **oracle.tolerance)
    assert_close(hidden_target(teacher.decoded[2]), oracle.io["teacher_decoder_target"], **oracle.tolerance)
    student = method.encoder(batch.images, batch.mask, taps=method.student_taps)
    predicted = method.decoder_map(method.decode(student.latent, batch.mask))
    assert_close(predicted, oracle.io["student_decoder_pred"], **oracle.tolerance)

    losses = method(batch, CLOCK)
    assert losses.keys() == method.weights.keys() == {"decoder"}
    assert_close(losses["decoder"], oracle.io["loss_decoder_all"][0], **oracle.tolerance)
    losses["decoder"].backward()
    parameters = dict(method.named_parameters())
    expected = {name.removeprefix("grad."): value for name, value in oracle.io.items() if name.startswith("grad.")}
    assert len(expected) == 8
    for name, value in expected.items():
        assert_close(parameters[our_name(name)].grad, value, **oracle.tolerance)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == {name for name, parameter in parameters.items() if parameter.grad is not None}


def test_equals_official_losses_of_other_targets() -> None:
    oracle = golden("g2sd_generic")
    method, batch = official(oracle, "encoder_and_masked"), make_batch(oracle.io, 0.75)
    teacher = method.teacher(batch.images, batch.mask, taps=method.teacher_taps)
    assert_close(teacher.hidden[2], oracle.io["teacher_encoder_prenorm"], **oracle.tolerance)
    assert_close(hidden_target(teacher.hidden[2]), oracle.io["teacher_encoder_target"], **oracle.tolerance)
    latent = method.encoder(batch.images, batch.mask, taps=method.student_taps).latent
    assert_close(method.encoder_map(latent), oracle.io["student_encoder_pred"], **oracle.tolerance)
    predicted = method.decoder_map(method.decode(latent, batch.mask))[:, 1:][batch.mask.hidden]
    assert_close(predicted, oracle.io["student_decoder_pred_masked_only"], **oracle.tolerance)
    losses = method(batch, CLOCK)
    assert_close(losses["encoder"], oracle.io["loss_encoder"][0], **oracle.tolerance)
    assert_close(losses["decoder"], oracle.io["loss_decoder_masked_only"][0], **oracle.tolerance)
    for target, names in TARGETS.items():
        alone = official(oracle, target)
        assert alone.weights.keys() == names
        again = alone(batch, CLOCK)
        assert again.keys() == names
        for name in names - ({"decoder"} if target == "decoder" else set()):
            assert torch.equal(again[name], losses[name])


def test_equals_official_relations(tmp_path: Path) -> None:
    oracle = golden("g2sd_generic")
    method = G2SD.build(given(saved(tmp_path, oracle), target="relations", relations={"relation_heads": 1}))
    method.encoder.load_state_dict(make_encoder(part(oracle.weights, "student."), STUDENT).state_dict())
    losses = method(make_batch(oracle.io, 0.75), CLOCK)
    assert len(losses) == 9
    total = sum(method.weights[name] * loss for name, loss in losses.items())
    assert_close(total, oracle.io["loss_relation9_last_layer_one_head"][0], **oracle.tolerance)


def test_hidden_patches_are_those_of_the_mask() -> None:
    batch, tokens = noise_batch(), torch.randn(2, 17, 3)
    picked = hidden_patches(tokens, batch.mask)
    assert picked.shape == (2, 12, 3)
    for image, ids in enumerate(batch.mask.ids_hidden):
        assert torch.equal(picked[image], tokens[image, 1 + ids])
    assert torch.equal(hidden_patches(tokens[:, 1:], batch.mask), picked)


def test_bf16_stays_near_fp32() -> None:
    """Roundings of 2^-8 in both nets; targets and loss are computed in float32: within 1 %."""
    oracle = golden("g2sd_generic")
    batch = make_batch(oracle.io, 0.75)
    exact = official(oracle, "encoder_and_masked")(batch, CLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        rough = official(oracle, "encoder_and_masked", bf16=True)(batch, CLOCK)
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        assert 0 < abs(rough[name] / value - 1) < 0.01


# ------------------------------------------------------------------------------------------- from settings


def noise_batch():  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 3, 32, 32, generator=generator), torch.rand(2, 16, generator=generator)
    return make_batch({"imgs": images, "noise": noise}, 0.75)


def saved(folder: Path, oracle: Golden | None = None, *, decoder: bool = True, depth: int = 4) -> Path:
    encoder = ViT(TEACHER) if oracle is None else make_encoder(part(oracle.weights, "teacher."), TEACHER)
    save_weights(folder / ENCODER_FILE, encoder_state(encoder), {"shape": vars(encoder.shape)})
    if decoder:
        save_decoder(folder / DECODER_FILE, Decoder(48, (4, 4), 1, 192, 32, depth, 4), True)
    return folder


def given(teacher: Path, encoder: dict[str, object] | None = None, **method: object) -> Config:
    size: dict[str, object] = {"image_size": 32, "patch": 8, "dim": 24, "depth": 2, "heads": 3}
    decoder = {"depth": 2, "dim": 16, "heads": 2}
    values = {
        "encoder": {**size, **(encoder or {})},
        "method": {"name": "g2sd", "decoder": decoder, **method},
        "teacher": {"path": str(teacher), "precision": "32"},
        "schedule": {"steps": 1},
    }
    return validate(values)


@pytest.mark.parametrize(("depth", "layer", "chosen"), [(4, 0, 2), (1, 0, 1), (3, 0, 1), (4, 4, 4), (8, 0, 4)])
def test_the_middle_block_teaches_unless_told_otherwise(depth: int, layer: int, chosen: int, tmp_path: Path) -> None:
    method = G2SD.build(given(saved(tmp_path, depth=depth), target_layer=layer))
    assert method.layer == chosen
    assert method.teacher_taps.decoded == (chosen,)
    assert not method.teacher_taps.tokens
    assert len(method.student_decoder.blocks) == 2
    assert not hasattr(method, "decoder")  # what a run would export
    assert method.masks()["mask"].ratio == 0.75


@pytest.mark.parametrize("target", ["encoder", "relations"])
def test_targets_without_a_decoder_need_none(target: str, tmp_path: Path) -> None:
    relations = {"relations": {"relation_heads": 12}} if target == "relations" else {}
    path = saved(tmp_path, decoder=False)
    method = G2SD.build(given(path, target=target, **relations))
    assert method.student_decoder is None
    assert method.teacher.decoder is None
    losses = method(noise_batch(), CLOCK)
    torch.stack([method.weights[name] * loss for name, loss in losses.items()]).sum().backward()
    assert method.encoder.blocks[1].attn.qkv.weight.grad is not None
    with pytest.raises(ConfigError, match=f"which method.target={target} does not use; leave it out"):
        G2SD.build(given(path, target=target, target_layer=2, **relations))


def test_relations_split_into_the_teachers_heads(tmp_path: Path) -> None:
    path = saved(tmp_path, decoder=False)
    (term,) = G2SD.build(given(path, target="relations")).terms
    assert term.settings.relation_heads == 4
    (term,) = G2SD.build(given(path, target="relations", relations={"relation_heads": 8})).terms
    assert (term.settings.heads, len(term.pairs), term.settings.relation_heads) == ("regroup", 9, 8)
    with pytest.raises(ConfigError, match=r"the student's width 24 does not split into 16"):
        G2SD.build(given(path, target="relations", relations={"relation_heads": 16}))


def test_other_terms_join(tmp_path: Path) -> None:
    terms = [{"kind": "relations", "pairs": ["qk"], "heads": "adaptive_block", "weight": 0.5}]
    method = G2SD.build(given(saved(tmp_path), terms=terms))
    losses = method(noise_batch(), CLOCK)
    assert method.weights == {"decoder": 1.0, "relation_qk": 0.5}
    assert losses.keys() == method.weights.keys()
    alone = G2SD.build(given(tmp_path))
    missing, unexpected = alone.load_state_dict(method.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    assert_close(alone(noise_batch(), CLOCK)["decoder"], losses["decoder"])


def test_a_teacher_without_the_whole_decoder_is_refused(tmp_path: Path) -> None:
    """pengzhiliang/G2SD issue 7: an encoder-only file leaves a random decoder, and training goes on badly."""
    path = saved(tmp_path, decoder=False)
    student = ViT(STUDENT)
    with pytest.raises(WeightsError, match="holds no decoder, and one is needed here"):
        Teachers().find(given(path), student, decoder=True, masked=True)
    saved(tmp_path)
    tensors = load_file(path / DECODER_FILE)
    for name in ("decoder_blocks.1.mlp.fc2.bias", "mask_token", "decoder_norm.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, path / DECODER_FILE, HEADS)
        with pytest.raises(WeightsError, match=f"lacks {name}; a partly random decoder is never used"):
            Teachers().find(given(path), student, decoder=True, masked=True)


def test_a_teachers_distillation_token_stays_behind(tmp_path: Path) -> None:
    encoder = ViT(replace(TEACHER, distillation_token=True))
    save_weights(tmp_path / ENCODER_FILE, encoder_state(encoder), {"shape": vars(encoder.shape)})
    method, batch = G2SD.build(given(tmp_path, target="encoder")), noise_batch()
    with torch.no_grad():
        states = encoder(batch.images, batch.mask, taps=Taps(hidden=(2,))).hidden[2][:, [0, 2, 3, 4, 5]]
        predicted = method.encoder_map(method.encoder(batch.images, batch.mask).latent)
    assert_close(method(batch, CLOCK)["encoder"].detach(), hidden_loss(predicted, states), rtol=1e-4, atol=1e-6)


HEADS = {"mimlet": '{"kind": "decoder", "heads": 4, "pixels": "normalised"}'}


@pytest.mark.parametrize(
    ("depth", "layer", "message"),
    [
        (4, 5, r"method\.target_layer 5 is not a block of the teacher's decoder, which has 4; leave it out"),
        (0, 1, r"method\.target_layer 1 is not a block of the teacher's decoder, which has 0"),
    ],
)
def test_target_layers_out_of_range(depth: int, layer: int, message: str) -> None:
    encoder, theirs = ViT(STUDENT), ViT(TEACHER)
    teacher = Teacher(theirs, Decoder(48, (4, 4), 1, 192, 32, depth, 4))
    decoder = Decoder(24, (4, 4), 1, 192, 16, 1, 2)
    with pytest.raises(ConfigError, match=message):
        G2SD(encoder, decoder, teacher, target_layer=layer)


@pytest.mark.parametrize(("name", "width", "heads"), [("g2sd_small", 256, 8), ("g2sd_tiny", 128, 4)])
def test_recipes_of_the_generic_stage(name: str, width: int, heads: int) -> None:
    """As the released code trains: 4096 images per step, a peak of 2.4e-3."""
    config = load_config(name, ["teacher.path=teacher"])
    assert isinstance(config.method, G2SDSettings)
    assert config.method.decoder == DecoderSettings(depth=4, dim=width, heads=heads)
    assert (config.method.target, config.method.target_layer, config.method.mask_ratio) == ("decoder", 0, 0.75)
    assert config.encoder.shape().heads == {"g2sd_small": 6, "g2sd_tiny": 3}[name]
    optim, schedule = config.optim, config.schedule
    assert optim.lr * schedule.batch / optim.lr_batch == pytest.approx(2.4e-3)
    assert (schedule.epochs, schedule.warmup_epochs, optim.min_lr, optim.betas) == (300, 10, 2.5e-6, (0.9, 0.95))
    assert config.data.augment.crop_scale == (0.2, 1.0)


@pytest.mark.parametrize("name", ["g2sd_small_specific", "g2sd_tiny_specific"])
def test_recipes_of_the_specific_stage(name: str) -> None:
    config = load_config(name, ["teacher.path=teacher"])
    optim, schedule, method = config.optim, config.schedule, read_recipe(name)["method"]
    assert optim.lr * schedule.batch / optim.lr_batch == pytest.approx(4e-3)
    assert (schedule.batch, schedule.epochs, schedule.warmup_epochs) == (1024, 200, 5)
    assert (optim.layer_decay, optim.min_lr, optim.weight_decay, optim.decay_tokens) == (0.75, 1e-6, 0.05, False)
    assert config.data.augment.randaugment == "rand-m9-mstd0.5-inc1"
    assert method == {
        "name": "classify",
        "pool": "class",
        "smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "erasing": 0.25,
        "distill": {"kind": "hard", "token": "distillation", "weight": 0.5},
    }
