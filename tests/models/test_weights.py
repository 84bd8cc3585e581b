import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.config import EncoderSettings, parse_override
from mimlet.data.masks import Mask
from mimlet.errors import WeightsError
from mimlet.models.build import build_encoder
from mimlet.models.decoders import Decoder
from mimlet.models.features import Taps
from mimlet.models.parts import resize_positions
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights import (
    DECODER_FILE,
    ENCODER_FILE,
    checkpoint_of_timm,
    encoder_state,
    fill_encoder,
    load_decoder,
    load_encoder,
    load_encoder_weights,
    open_checkpoint,
    read_tensors,
    save_decoder,
    save_weights,
    shape_of_checkpoint,
)
from tests.models.official import constant, save_mae_lite, save_official, tensors_of
from tests.shared import golden

SMALL = ViTShape(image_size=16, patch=8, dim=24, depth=2, heads=3)


def save_ours(path: Path, encoder: ViT, **info: object) -> Path:
    save_weights(path, encoder_state(encoder), {"kind": "encoder", "shape": vars(encoder.shape), **info})
    return path


def random_(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)


def foreign(shape: ViTShape = SMALL) -> dict[str, Tensor]:
    encoder = ViT(shape)
    random_(encoder)
    return {name: value.clone() for name, value in encoder.state_dict().items()}


# ---------------------------------------------------------------------------------------------- published files


PUBLISHED = {
    "mae_pretrain_vit_base": ("", save_official),
    "mae_pretrain_vit_base_full": ("", save_official),
    "mae_tiny_400e": ("module.model.", save_mae_lite),
    "mae_tiny_distill_400e": ("module.model.", save_mae_lite),
    "mae_tiny_distill_d2_400e": ("module.model.", save_mae_lite),
    "mae_tiny_400e_ft_300e": ("module.model.", save_mae_lite),
    "mae_tiny_distill_d2_400e_ft_rpe_1000e": ("module.model.", save_mae_lite),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_is_read_to_the_last_tensor(name: str, tmp_path: Path) -> None:
    prefix, save = PUBLISHED[name]
    tensors = tensors_of(name)
    path = save(tmp_path / "file.pth.tar", tensors)
    checkpoint = open_checkpoint(path)
    encoder = ViT(shape_of_checkpoint(checkpoint))
    report = fill_encoder(encoder, checkpoint)

    assert (encoder.heads, encoder.depth, encoder.patch, encoder.grid, encoder.prefix) == (12, 12, 16, (14, 14), 1)
    assert encoder.dim == (768 if "base" in name else 192)
    for key in report.loaded:
        value = tensors[prefix + key]
        assert encoder.state_dict()[key].shape == value.shape
        assert torch.equal(encoder.state_dict()[key], value), key
    of_the_encoder = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)} - set(report.skipped)
    assert set(report.loaded) == of_the_encoder
    assert len(report.loaded) + len(report.skipped) == len(tensors)
    assert not report.resized
    assert not report.notes

    classifier = "_ft_" in name
    assert set(report.fresh) == ({"norm.weight", "norm.bias"} if classifier else set())
    assert set(report.fresh.values()) <= {"a classifier with mean pooling has none"}
    assert set(checkpoint.head) == (
        {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} if classifier else set()
    )
    reasons = {key: sum(reason == key for reason in report.skipped.values()) for key in set(report.skipped.values())}
    expected = {"of the decoder": len(checkpoint.decoder), "of the head": len(checkpoint.head)}
    if "distill" in name and not classifier:
        expected["not part of 'model'"] = 150 + 1
        assert report.skipped["attn_adapter.adapter11.weight"] == "not part of 'model'"
        assert "tch_model.cls_token" in report.skipped
    if name == "mae_tiny_distill_d2_400e":
        expected["the attention-only block of D²-MAE"] = 4
        assert report.skipped["blocks.12.attn.qkv.weight"] == "the attention-only block of D²-MAE"
    if "rpe" in name:
        expected["computed, not learned"] = 12
        assert encoder.shape.relative == "full"
        assert encoder.blocks[3].attn.relative_position_bias_table.shape == (732, 12)
    assert reasons == {key: count for key, count in expected.items() if count}

    if checkpoint.decoder:
        decoder = load_decoder(checkpoint, encoder)
        assert (decoder.dim, len(decoder.blocks), decoder.blocks[0].attn.heads) == (
            (512, 8, 16) if "base" in name else (96, 1, 3)
        )
        for key, value in decoder.state_dict().items():
            official = key if key == "mask_token" else f"decoder_{key}"
            assert torch.equal(value, tensors[prefix + official]), key
    else:
        with pytest.raises(WeightsError, match=r"holds no decoder, and one is needed here.*_full\.pth"):
            load_decoder(checkpoint, encoder)


def test_report_says_what_happened(tmp_path: Path) -> None:
    path = save_mae_lite(tmp_path / "d2.pth.tar", tensors_of("mae_tiny_distill_d2_400e"))
    text = str(load_encoder(path, image_size=64)[1])
    assert text.startswith(f"150 tensors loaded from {path}\n")
    assert "resized: pos_embed (14 x 14 to 4 x 4 patches, bicubic)" in text
    assert (
        "blocks.12.norm1.weight, blocks.12.norm1.bias, blocks.12.attn.qkv.weight and 1 more (the attention-only" in text
    )


def test_one_missing_tensor_of_encoder_or_decoder_is_an_error(tmp_path: Path) -> None:
    tensors = tensors_of("mae_tiny_400e")
    del tensors["module.model.decoder_blocks.0.mlp.fc2.bias"]
    path = save_mae_lite(tmp_path / "file.pth.tar", tensors)
    encoder, _ = load_encoder(path)
    with pytest.raises(WeightsError, match=r"lacks decoder_blocks\.0\.mlp\.fc2\.bias; a partly random decoder"):
        load_decoder(open_checkpoint(path), encoder)
    del tensors["module.model.blocks.7.norm2.bias"]
    with pytest.raises(WeightsError, match=r"lacks the encoder's blocks\.7\.norm2\.bias; expected a whole encoder"):
        load_encoder(save_mae_lite(tmp_path / "file.pth.tar", tensors))


def test_relative_positions_with_separate_biases(tmp_path: Path) -> None:
    tensors = tensors_of("mae_tiny_distill_d2_400e_ft_rpe_1000e")
    for i in range(12):
        block = f"module.model.blocks.{i}."
        del tensors[block + "attn.qkv.bias"]
        for k, name in enumerate(("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2")):
            tensors[block + name] = constant(1000 + 4 * i + k, [192])
    path = save_mae_lite(tmp_path / "file.pth.tar", tensors)
    encoder, _ = load_encoder(path)
    assert encoder.shape.relative == "qv"
    assert_close(encoder.shape.layer_scale, 1002 / 1024)
    assert torch.equal(encoder.blocks[5].gamma_2, constant(1023, [192]))
    assert torch.equal(encoder.blocks[11].attn.v_bias, constant(1045, [192]))
    with pytest.raises(
        WeightsError, match=r"would compute something else\. Set encoder\.qv_bias=true encoder\.layer_scale=0\.1$"
    ):
        load_encoder_weights(ViT(ViTShape(relative="full")), path)
    del tensors["module.model.blocks.9.attn.relative_position_bias_table"]
    with pytest.raises(WeightsError, match=r"lacks the encoder's blocks\.9\.attn\.relative_position_bias_table"):
        load_encoder(save_mae_lite(tmp_path / "file.pth.tar", tensors))


def test_pretrained_weights_start_a_model_with_more_parts(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(foreign(), path)
    encoder = ViT(ViTShape(**{**vars(SMALL), "relative": "qv", "layer_scale": 0.1}))
    report = load_encoder_weights(encoder, path)
    kinds = {name.split(".")[-1] for name in report.fresh}
    assert kinds == {"relative_position_bias_table", "q_bias", "v_bias", "gamma_1", "gamma_2"}
    assert set(report.fresh.values()) == {"only the fine-tuned form has it"}
    assert report.skipped == {
        f"blocks.{i}.attn.qkv.bias": "the encoder has separate biases of queries and values" for i in range(2)
    }


@pytest.mark.parametrize("part", [{"relative": "full"}, {"layer_scale": 0.1}])
def test_parts_that_the_encoder_would_leave_out_are_an_error(part: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(foreign(ViTShape(**{**vars(SMALL), **part})), path)
    with pytest.raises(WeightsError, match=r"that the encoder lacks, or .*it would compute something else"):
        load_encoder_weights(ViT(SMALL), path)


FORMS = {
    "SimMIM": ({"position": "none", "relative": "shared", "qv_bias": True}, "position=none relative=qv"),
    "BEiT": ({"position": "learned", "qv_bias": True}, "qv_bias=true"),
    "fine-tuned SimMIM": ({"position": "none", "relative": "qv"}, "position=none relative=qv"),
    "MAE-lite, relative": ({"relative": "full", "layer_scale": 0.3}, "relative=full layer_scale=0.1"),
    "shared, all biases": ({"relative": "shared"}, "relative=full"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_error_of_another_form_says_what_to_set(name: str, tmp_path: Path) -> None:
    form, wanted = FORMS[name]
    source = ViT(ViTShape(**{**vars(SMALL), **form}))
    random_(source)
    path = save_ours(tmp_path / "file.safetensors", source)
    words = " ".join(f"encoder.{word}" for word in wanted.split())
    with pytest.raises(WeightsError, match=rf"would compute something else\. Set {words}($|; or relative=shared, to)"):
        load_encoder_weights(ViT(SMALL), path)
    settings = EncoderSettings.model_validate(
        {"name": "vit_nano", "image_size": 16, "patch": 8, "dim": 24, "depth": 2, "heads": 3}
        | {key: parse_override(f"{key}={value}")[key] for key, value in (word.split("=") for word in wanted.split())}
    )
    encoder = build_encoder(settings)
    assert not load_encoder_weights(encoder, path).fresh
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_close(encoder.eval()(images).latent, source.eval()(images).latent)
        again, _ = load_encoder(save_ours(tmp_path / "again.safetensors", encoder))
        assert_close(again.eval()(images).latent, source(images).latent)
    torch.save(encoder.state_dict(), tmp_path / "foreign.pth")
    foreign_encoder, _ = load_encoder(tmp_path / "foreign.pth", heads=3)
    with torch.no_grad():
        assert_close(foreign_encoder.eval()(images).latent, source(images).latent)


def test_positions_that_an_encoder_asks_for_must_be_in_the_file(tmp_path: Path) -> None:
    path = save_ours(tmp_path / "file.safetensors", ViT(SMALL))
    with pytest.raises(WeightsError, match=r"Set encoder\.position=sincos$"):
        load_encoder_weights(ViT(replace(SMALL, position="none", relative="full")), path)
    torch.save(foreign(), tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=r"Set encoder\.position=learned$"):
        load_encoder_weights(ViT(replace(SMALL, position="none", relative="full")), tmp_path / "file.pth")


def test_one_table_for_all_blocks_can_stay_one(tmp_path: Path) -> None:
    form = {"position": "none", "relative": "shared", "qv_bias": True}
    path = save_ours(tmp_path / "file.safetensors", ViT(ViTShape(**{**vars(SMALL), **form})))
    report = load_encoder_weights(ViT(ViTShape(**{**vars(SMALL), **form})), path)
    assert not report.fresh
    assert not report.notes
    own = {**form, "relative": "full"}
    path = save_ours(tmp_path / "own.safetensors", ViT(ViTShape(**{**vars(SMALL), **own})))
    with pytest.raises(WeightsError, match=r"Set encoder\.relative=qv$"):
        load_encoder_weights(ViT(ViTShape(**{**vars(SMALL), **form})), path)


@pytest.mark.parametrize("variant", ["gap", "cls", "rpe", "rpe_ls"])
def test_official_classifiers_compute_the_same(variant: str, tmp_path: Path) -> None:
    oracle = golden("mae_lite_classifier")
    state = {k.removeprefix(f"{variant}."): v for k, v in oracle.weights.items() if k.startswith(f"{variant}.")}
    torch.save({"model": {f"module.model.{name}": value for name, value in state.items()}}, tmp_path / "file.pth.tar")
    encoder, report = load_encoder(tmp_path / "file.pth.tar", heads=oracle.meta["constructor"]["h"])
    assert bool(report.fresh) == (variant != "cls")
    features = encoder.eval()(oracle.io["imgs"], taps=Taps(hidden=(3,)))
    if variant == "cls":
        pooled = features.latent[:, 0]
    else:
        norm = nn.LayerNorm(24, eps=1e-6)
        norm.load_state_dict({"weight": state["fc_norm.weight"], "bias": state["fc_norm.bias"]})
        pooled = norm(features.hidden[3][:, 1:].mean(1))
    logits = nn.functional.linear(pooled, state["head.weight"], state["head.bias"])
    assert_close(logits, oracle.io[f"{variant}.logits"], **oracle.tolerance)


# ------------------------------------------------------------------------------------------------ other origins


@pytest.mark.parametrize(
    ("prefix", "container"),
    [
        ("", None),
        ("", "state_dict"),
        ("module.", "model"),
        ("encoder.", "model_ema"),
        ("module.base_encoder.", "state_dict"),
    ],
)
def test_wrappers_and_containers(prefix: str, container: str | None, tmp_path: Path) -> None:
    state = foreign()
    tensors = {prefix + name: value for name, value in state.items()}
    torch.save({container: tensors, "epoch": 3} if container else tensors, tmp_path / "file.pth")
    encoder, report = load_encoder(tmp_path / "file.pth", heads=3)
    assert len(report.loaded) == len(state)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def test_half_precision_file_fills_a_float_encoder(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in foreign().items()}
    save_file(state, tmp_path / "file.safetensors")
    encoder, _ = load_encoder(tmp_path / "file.safetensors", heads=3)
    assert encoder.norm.weight.dtype == torch.float32
    assert torch.equal(encoder.norm.weight, state["norm.weight"].float())


def test_positions_are_resized(tmp_path: Path) -> None:
    state = foreign(ViTShape(**{**vars(SMALL), "image_size": 24}))
    torch.save(state, tmp_path / "file.pth")
    encoder = ViT(SMALL)
    report = load_encoder_weights(encoder, tmp_path / "file.pth")
    assert report.resized == {"pos_embed": "3 x 3 to 2 x 2 patches, bicubic"}
    assert torch.equal(encoder.pos_embed, resize_positions(state["pos_embed"], (3, 3), (2, 2), 1))


def test_decoder_positions_are_resized(tmp_path: Path) -> None:
    encoder = ViT(ViTShape(**{**vars(SMALL), "image_size": 24}))
    save_ours(tmp_path / ENCODER_FILE, encoder)
    decoder = Decoder(24, (3, 3), 1, 192, 12, 2, 2)
    save_decoder(tmp_path / DECODER_FILE, decoder, True)
    loaded = load_decoder(open_checkpoint(tmp_path), ViT(SMALL))
    assert torch.equal(loaded.pos_embed, resize_positions(decoder.pos_embed, (3, 3), (2, 2), 1))


def test_a_decoder_is_loaded_whole(tmp_path: Path) -> None:
    encoder, file = ViT(SMALL), tmp_path / DECODER_FILE
    save_ours(tmp_path / ENCODER_FILE, encoder)
    save_decoder(file, Decoder(24, (2, 2), 1, 192, 12, 2, 2), True)
    checkpoint = open_checkpoint(tmp_path)
    report = fill_encoder(encoder, checkpoint)
    assert set(report.skipped) == set(checkpoint.decoder)
    load_decoder(checkpoint, encoder, report=report)
    assert not report.skipped
    assert set(report.loaded) == set(checkpoint.encoder) | set(checkpoint.decoder)
    tensors, metadata = read_tensors(file)
    save_file({name: value for name, value in tensors.items() if "_blocks.1." not in name}, file, metadata)
    with pytest.raises(WeightsError, match="its decoder has 2 blocks, and 1 of them are there"):
        load_decoder(open_checkpoint(tmp_path), encoder)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("register_tokens", (1, 4, 24), "its register_tokens has no place"),
        ("norm_pre.weight", (24,), "its norm_pre.weight has no place"),
        ("blocks.1.attn.q_norm.weight", (8,), r"its blocks\.1\.attn\.q_norm\.weight"),
        ("patch_embed.norm.weight", (24,), r"its patch_embed\.norm\.weight"),
        ("pos_embed", (1, 6, 24), r"pos_embed has 6 rows, expected 1 \+ a square number"),
        ("patch_embed.proj.weight", None, r"no patch_embed\.proj\.weight among its"),
    ],
)
def test_foreign_parts_are_refused(name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    state = foreign()
    if shape is None:
        del state[name]
    else:
        state[name] = torch.zeros(shape)
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=message):
        load_encoder(tmp_path / "file.pth", heads=3)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_distillation_token_with_and_without_a_position(rows: int, tmp_path: Path) -> None:
    """DeiT's tables have 2 + N rows, the token's second; G2SD's have 1 + N."""
    state, token, place = foreign(), torch.randn(1, 1, 24), torch.randn(1, rows, 24)
    table = torch.cat([state["pos_embed"][:, :1], place, state["pos_embed"][:, 1:]], dim=1)
    torch.save({**state, "dist_token": token, "pos_embed": table}, tmp_path / "file.pth")
    encoder, report = load_encoder(tmp_path / "file.pth", heads=3)
    assert encoder.shape.distillation_token
    assert torch.equal(encoder.dist_token, token + place.sum(dim=1, keepdim=True))
    assert torch.equal(encoder.pos_embed, state["pos_embed"])
    assert not report.fresh
    assert not report.skipped
    with pytest.raises(
        WeightsError, match=r"has dist_token, which the encoder lacks: .* Only the method classify with method\.distill"
    ):
        load_encoder_weights(ViT(SMALL), tmp_path / "file.pth")


def test_a_distillation_token_starts_fresh_and_comes_back(tmp_path: Path) -> None:
    encoder = ViT(replace(SMALL, distillation_token=True))
    before = encoder.dist_token.clone()
    state = foreign()
    torch.save(state, tmp_path / "file.pth")
    report = load_encoder_weights(encoder, tmp_path / "file.pth")
    assert report.fresh == {"dist_token": "only the fine-tuned form has it"}
    assert torch.equal(encoder.dist_token, before)
    assert torch.equal(encoder.pos_embed, state["pos_embed"])

    saved = encoder_state(encoder)
    assert saved["pos_embed"].shape == (1, 6, 24)
    assert not saved["pos_embed"][:, 1].any()
    save_weights(tmp_path / "ours.safetensors", saved, {"shape": vars(encoder.shape)})
    loaded, _ = load_encoder(tmp_path / "ours.safetensors")
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in loaded.state_dict().items())
    larger, report = load_encoder(tmp_path / "ours.safetensors", image_size=24)
    assert report.resized == {"pos_embed": "2 x 2 to 3 x 3 patches, bicubic"}
    assert torch.equal(larger.pos_embed, resize_positions(encoder.pos_embed, (2, 2), (3, 3), 1))


def test_unknown_extras_are_reported(tmp_path: Path) -> None:
    torch.save({**foreign(), "projector.0.weight": torch.zeros(2)}, tmp_path / "file.pth")
    assert load_encoder(tmp_path / "file.pth", heads=3)[1].skipped == {"projector.0.weight": "not known"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 12}, "has width 24, the encoder 12; they must agree"),
        ({"patch": 4}, "has patch 8, the encoder 4"),
        ({"depth": 3}, r"has 2 blocks, the encoder 3\. Set encoder\.depth, or encoder\.keep_blocks"),
        ({"class_token": False}, r"has a class token, the encoder none: set encoder\.class_token"),
        ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight has shape \(96, 24\), expected \(48, 24\)"),
    ],
)
def test_unfit_encoders(change: dict[str, object], message: str, tmp_path: Path) -> None:
    torch.save(foreign(), tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=message):
        load_encoder_weights(ViT(ViTShape(**{**vars(SMALL), **change})), tmp_path / "file.pth")


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_keep_blocks(blocks: int, tmp_path: Path) -> None:
    state = foreign(ViTShape(**{**vars(SMALL), "depth": 4}))
    torch.save(state, tmp_path / "file.pth")
    encoder = ViT(ViTShape(**{**vars(SMALL), "depth": 3}))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    report = load_encoder_weights(encoder, tmp_path / "file.pth", blocks)
    for name, value in encoder.state_dict().items():
        first = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        kept = blocks > 0 and first < blocks and not (name.startswith("norm.") and blocks < 3)
        assert torch.equal(value, state[name] if kept else before[name]), name
        assert (name in report.loaded) == kept
        assert (name in report.fresh) == (not kept and blocks > 0)
    if blocks:
        assert report.skipped["blocks.3.norm1.bias"] == f"only the first {blocks} blocks are used"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (3, "keep_blocks 3 is too many: .* has 2 blocks, the encoder 3"),
        (4, "keep_blocks 4 is too many"),
    ],
)
def test_too_many_kept_blocks(blocks: int, message: str, tmp_path: Path) -> None:
    torch.save(foreign(), tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=message):
        load_encoder_weights(ViT(ViTShape(**{**vars(SMALL), "depth": 3})), tmp_path / "file.pth", blocks)


# -------------------------------------------------------------------------------------------------- head counts


def test_our_files_carry_the_head_count(tmp_path: Path) -> None:
    shape = ViTShape(16, 8, 24, 1, 12, layer_scale=0.1)
    encoder = ViT(shape)
    random_(encoder)
    path = save_ours(tmp_path / ENCODER_FILE, encoder, mean=[0.5, 0.4, 0.3], std=[1, 1, 1])
    loaded, _ = load_encoder(path)
    assert loaded.shape == shape
    assert torch.equal(loaded.blocks[0].gamma_1, encoder.blocks[0].gamma_1)
    assert open_checkpoint(tmp_path).mean == (0.5, 0.4, 0.3)
    with pytest.raises(WeightsError, match="has head count 12, the encoder 3; they must agree"):
        load_encoder_weights(ViT(ViTShape(16, 8, 24, 1, 3, layer_scale=0.1)), path)
    with pytest.raises(WeightsError, match="has 12 heads, 3 were asked for; the weights would compute something else"):
        load_encoder(path, heads=3)
    assert load_encoder(path, heads=12)[0].heads == 12


@pytest.mark.parametrize(("width", "customs"), [(192, "3 or 12"), (384, "6 or 12"), (24, "an unknown number of")])
def test_ambiguous_width_asks_for_heads(width: int, customs: str, tmp_path: Path) -> None:
    torch.save(foreign(ViTShape(16, 8, width, 1, 3)), tmp_path / "file.pth")
    message = rf"encoders of width {width} have {customs} heads .*Say which: heads=12, or teacher\.heads=12"
    with pytest.raises(WeightsError, match=message):
        load_encoder(tmp_path / "file.pth")
    assert load_encoder(tmp_path / "file.pth", heads=6)[0].heads == 6
    report = load_encoder_weights(ViT(ViTShape(16, 8, width, 1, 3)), tmp_path / "file.pth")
    assert report.notes == ["the file does not tell its head count: taken as the encoder's 3"]


@pytest.mark.parametrize(
    ("prefix", "container", "width", "heads"),
    [
        ("module.model.", "model", 192, 12),
        ("model.", "model", 384, 12),
        ("model.", "model", 1024, 16),
        ("module.base_encoder.", "state_dict", 384, 12),
        ("", "model", 768, 12),
        ("", "model", 1280, 16),
    ],
)
def test_head_count_follows_from_origin_and_width(
    prefix: str, container: str, width: int, heads: int, tmp_path: Path
) -> None:
    tensors = {
        prefix + name: torch.zeros(1).expand(v.shape) for name, v in foreign(ViTShape(16, 8, width, 1, 4)).items()
    }
    torch.save({container: tensors}, tmp_path / "file.pth")
    checkpoint = open_checkpoint(tmp_path / "file.pth")
    assert shape_of_checkpoint(checkpoint).heads == heads
    assert shape_of_checkpoint(checkpoint, heads=4).heads == 4
    with pytest.raises(WeightsError, match=f"has head count {heads}, the encoder 4"):
        fill_encoder(ViT(ViTShape(16, 8, width, 1, 4)), checkpoint)


def test_lightning_files_are_not_taken_for_mae_lite(tmp_path: Path) -> None:
    tensors = {f"model.{name}": value for name, value in foreign(ViTShape(16, 8, 192, 1, 3)).items()}
    torch.save({"state_dict": tensors}, tmp_path / "file.ckpt")
    with pytest.raises(WeightsError, match="does not tell its head count"):
        load_encoder(tmp_path / "file.ckpt")


def test_decoder_heads(tmp_path: Path) -> None:
    encoder = ViT(SMALL)
    save_ours(tmp_path / ENCODER_FILE, encoder)
    decoder = Decoder(24, (2, 2), 1, 192, 12, 2, 6)
    random_(decoder)
    save_decoder(tmp_path / DECODER_FILE, decoder, True)
    checkpoint = open_checkpoint(tmp_path)
    loaded = load_decoder(checkpoint, encoder)
    assert [block.attn.heads for block in loaded.blocks] == [6, 6]
    assert all(torch.equal(value, decoder.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(WeightsError, match="has 6 decoder heads, 3 were asked for"):
        load_decoder(checkpoint, encoder, heads=3)

    tensors, _ = read_tensors(tmp_path / DECODER_FILE)
    torch.save({**foreign(), **tensors}, tmp_path / "file.pth")
    checkpoint = open_checkpoint(tmp_path / "file.pth")
    with pytest.raises(WeightsError, match="a decoder of width 12 does not tell its head count; say decoder heads"):
        load_decoder(checkpoint, encoder)
    assert load_decoder(checkpoint, encoder, heads=4).blocks[0].attn.heads == 4
    checkpoint.decoder["decoder_norm.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError, match=r"decoder_norm\.bias has shape \(3,\), expected \(12,\)"):
        load_decoder(checkpoint, encoder, heads=4)


# ------------------------------------------------------------------------------------------ damage and malice


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["checkpoint", "legacy", "pickle"])
def test_reading_runs_no_code(form: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "exploded", tmp_path / "file.pth"
    content = {"model": foreign(), "args": Bomb(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "checkpoint")
    with pytest.raises(WeightsError, match=r"holds more than tensors \(\w+\.mkdir\), and reading it could run code"):
        open_checkpoint(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the bomb of this test has to work"


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "file.pth")
    with pytest.raises(
        WeightsError, match=r"\(torch\.nn\.modules\.linear\.Linear\).*save its weights with safetensors"
    ):
        open_checkpoint(tmp_path / "file.pth")


def test_scalars_of_old_numpy_are_read(tmp_path: Path) -> None:
    path = save_mae_lite(tmp_path / "new.pth", foreign())
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(item.filename, content)
    assert read_tensors(old)[0].keys() == foreign().keys()


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_damaged(kind: str, folder: Path) -> Path:
    path = folder / ("file.safetensors" if kind.endswith("safetensors") else "file.pth")
    if kind.startswith("text"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind.startswith("page"):
        path.write_text("<!DOCTYPE html><html>404</html>")
    elif kind.startswith("empty"):
        path.touch()
    elif kind == "half safetensors":
        half(save_ours(path, ViT(SMALL)))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": [1, 2]}))
    else:
        torch.save(foreign(), path, _use_new_zipfile_serialization="legacy" not in kind)
        half(path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "page",
        "empty",
        "half",
        "half legacy",
        "pickle",
        "text safetensors",
        "empty safetensors",
        "half safetensors",
    ],
)
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    path = make_damaged(kind, tmp_path)
    size = f"{path.stat().st_size:,}"
    with pytest.raises(WeightsError, match=rf"file\.\w+ \({size} bytes\) is damaged or not a weights file") as caught:
        open_checkpoint(path)
    assert str(caught.value).endswith("; copy or download it again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {"epoch": 3}, {"model": {"a": 1}}])
def test_files_without_named_tensors(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(WeightsError, match="holds no named tensors; expected a dictionary of weights, possibly under"):
        open_checkpoint(tmp_path / "file.pth")


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file .*none\.pth; expected a run folder, a \.safetensors file or"):
        open_checkpoint(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match=rf"holds no {ENCODER_FILE}; expected the folder of a finished run"):
        open_checkpoint(tmp_path)


def test_descriptions_of_another_version(tmp_path: Path) -> None:
    path = save_ours(tmp_path / "file.safetensors", ViT(SMALL), shape={"width": 3})
    with pytest.raises(WeightsError, match=r"was written by another version of mimlet: .*'width'"):
        open_checkpoint(path)
    save_file(foreign(), path, metadata={"mimlet": "{"})
    with pytest.raises(WeightsError, match="carries a damaged description"):
        open_checkpoint(path)


def test_descriptions_of_before(tmp_path: Path) -> None:
    """Fields that came later have what was meant before them."""
    old = ("image_size", "patch", "dim", "depth", "heads", "mlp_ratio", "class_token", "position", "relative")
    shape = {name: value for name, value in vars(SMALL).items() if name in old}
    encoder, _ = load_encoder(save_ours(tmp_path / ENCODER_FILE, ViT(SMALL), shape=shape))
    assert encoder.shape == SMALL
    save_decoder(tmp_path / DECODER_FILE, Decoder(24, (2, 2), 1, 192, 12, 1, 2), True)
    tensors, metadata = read_tensors(tmp_path / DECODER_FILE)
    info = {key: value for key, value in json.loads(metadata["mimlet"]).items() if key != "position"}
    save_weights(tmp_path / DECODER_FILE, tensors, info)
    assert load_decoder(open_checkpoint(tmp_path), encoder).position == "sincos"


def test_saved_description_is_plain_json(tmp_path: Path) -> None:
    path = save_ours(tmp_path / "file.safetensors", ViT(SMALL), note="x")
    description = json.loads(read_tensors(path)[1]["mimlet"])
    assert description["shape"]["heads"] == 3
    assert description["note"] == "x"


# --------------------------------------------------------------------------------------------------------- timm


def offer(monkeypatch: pytest.MonkeyPatch, model: nn.Module | Exception) -> None:
    def create(name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        if isinstance(model, Exception):
            raise model
        return model

    monkeypatch.setattr(timm, "create_model", create)


SMALL_TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32}),
        ("deit_tiny_patch16_224", {"img_size": 32}),
        ("deit_tiny_distilled_patch16_224", SMALL_TIMM),
        ("vit_base_patch16_224", {"img_size": 32, "depth": 2}),
        ("vit_base_patch16_siglip_gap_224", {"img_size": 32, "depth": 1, "class_token": False}),
        ("vit_tiny_patch16_224", {**SMALL_TIMM, "init_values": 0.1}),
    ],
)
def test_timm_models_compute_the_same(name: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    offer(monkeypatch, model)
    encoder, report = load_encoder(f"timm:{name}")
    assert not report.fresh
    assert encoder.heads == model.blocks[0].attn.num_heads
    images = torch.randn(2, 3, encoder.shape.image_size, encoder.shape.image_size)
    assert_close(encoder.eval()(images).latent, model.forward_features(images), rtol=1e-5, atol=1e-5)
    assert open_checkpoint(f"timm:{name}").mean == tuple(model.pretrained_cfg["mean"])


def test_timm_classifier_with_mean_pooling_has_no_norm() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL_TIMM, global_pool="avg")
    checkpoint = checkpoint_of_timm(model, "timm:x")
    report = fill_encoder(ViT(SMALL), checkpoint)
    assert report.fresh == dict.fromkeys(("norm.weight", "norm.bias"), "a classifier with mean pooling has none")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 1}, "is a Eva, not a plain ViT"),
        (
            "vit_small_patch14_reg4_dinov2",
            {"img_size": 28, "depth": 1},
            "is not a plain ViT: its reg_token has no place",
        ),
        ("vit_base_patch16_clip_224", {"img_size": 32, "depth": 1}, r"is not a plain ViT: its norm_pre\."),
        ("vit_tiny_patch16_224", {**SMALL_TIMM, "qk_norm": True}, r"its blocks\.0\.attn\.q_norm\.weight"),
        ("vit_tiny_patch16_224", {**SMALL_TIMM, "act_layer": "relu"}, "same weights, other results"),
        ("vit_tiny_patch16_224", {**SMALL_TIMM, "no_embed_class": True}, "pos_embed has 4 rows, expected 1"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, "is a SwinTransformer, not a plain ViT"),
        ("convnext_atto", {}, "is a ConvNeXt, not a plain ViT; only timm's VisionTransformer models"),
    ],
)
def test_timm_models_of_another_kind(name: str, options: dict[str, object], message: str) -> None:
    model = timm.create_model(name, **options)
    with pytest.raises(WeightsError, match=message):
        checkpoint_of_timm(model, f"timm:{name}")


def test_timm_name_is_unknown() -> None:
    with pytest.raises(
        WeightsError, match=r"timm has no model 'vit_tiny_patch16_2244' \(did you mean 'vit_tiny_patch16_224'"
    ):
        open_checkpoint("timm:vit_tiny_patch16_2244")


def test_timm_tag_is_unknown() -> None:
    with pytest.raises(
        WeightsError, match=r"timm has no weights for 'vit_tiny_patch16_224\.nope': Invalid pretrained tag"
    ):
        open_checkpoint("timm:vit_tiny_patch16_224.nope")


def test_timm_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, FileNotFoundError("An error happened while trying to locate the file on the Hub.\nmore"))
    message = r"could not be fetched: An error .* on the Hub\. Without a network, .*give its path instead"
    with pytest.raises(WeightsError, match=message):
        open_checkpoint("timm:vit_tiny_patch16_224")


def test_encoders_of_the_beit_family_are_read_from_their_tensors_and_from_ours(tmp_path: Path) -> None:
    """No absolute positions, one table for all blocks, biases of queries and values only."""
    oracle = golden("simmim")
    state = {n.removeprefix("encoder."): t for n, t in oracle.weights.items() if n.startswith("encoder.")}
    torch.save({"model": state}, tmp_path / "simmim.pth")
    encoder, report = load_encoder(tmp_path / "simmim.pth", heads=4)
    shape = encoder.shape
    assert (shape.position, shape.relative, shape.qv_bias, shape.image_size) == ("none", "shared", True, 64)
    assert report.fresh == {}
    mask = Mask.from_hidden(oracle.io["mask"].flatten(1).bool())
    with torch.no_grad():
        found = encoder(oracle.io["images"], mask, fill=state["mask_token"]).patches
    expected = oracle.io["encoder_out"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, **oracle.tolerance)

    tuned = ViT(replace(shape, relative="full"))
    report = load_encoder_weights(tuned, tmp_path / "simmim.pth")
    assert any("starts the table of each block" in note for note in report.notes)
    with torch.no_grad():
        same = tuned(oracle.io["images"]).latent
        torch.testing.assert_close(same, encoder(oracle.io["images"]).latent)
