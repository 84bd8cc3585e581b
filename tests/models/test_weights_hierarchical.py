"""Weights of hierarchical encoders: published files to the last tensor, oracles through files, forms, sizes, errors."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.errors import WeightsError
from mimlet.methods.base import Clock
from mimlet.methods.mae import MAE
from mimlet.models.build import encoder_of
from mimlet.models.decoders import decoder_input, decoder_taps, make_decoder
from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps
from mimlet.models.hiera import resize_table
from mimlet.models.parts import resize_positions
from mimlet.models.shapes import HieraShape, HiViTShape, Shape, ViTShape
from mimlet.models.weights import (
    DECODER_FILE,
    ENCODER_FILE,
    LoadReport,
    checkpoint_of_timm,
    encoder_state,
    fill_encoder,
    load,
    load_classifier,
    load_decoder,
    load_encoder,
    load_encoder_weights,
    open_checkpoint,
    save_decoder,
    save_weights,
    shape_of_checkpoint,
)
from tests.models.official import save_mae_lite, tensors_of
from tests.shared import Golden, golden

HIERA = HieraShape(32, 4, 8, (1, 1, 2, 1), 1)
HIVIT = HiViTShape(16, 4, 32, (1, 1, 2), 2)
ITPN = replace(HIVIT, pyramid_dim=16, pyramid_depth=2, pyramid_hidden=40)
FAST = replace(ITPN, form="fast", mlp_ratio=3.0, position="learned", layer_scale=0.1)


def varied(shape: Shape, seed: int = 0) -> Encoder:
    encoder = encoder_of(shape)
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return encoder.eval()


def save_foreign(path: Path, encoder: Encoder) -> Path:
    torch.save({"model": {name: value.clone() for name, value in encoder.state_dict().items()}}, path)
    return path


def save_ours(path: Path, encoder: Encoder) -> Path:
    save_weights(path, encoder_state(encoder), {"kind": "encoder", "shape": vars(encoder.shape)})
    return path


# ---------------------------------------------------------------------------------------------- published files

BASE = HiViTShape(224, 16, 512, (3, 3, 24), 8, position="learned")
TINY = HiViTShape(224, 16, 384, (1, 1, 12), 6, 3.0, "fast", "learned", layer_scale=0.1)
PYRAMID = {"pyramid_dim": 256, "pyramid_depth": 2, "pyramid_hidden": 1024}
FAST_PYRAMID = {"pyramid_dim": 256, "pyramid_depth": 1, "pyramid_hidden": 682}
PUBLISHED: dict[str, tuple[str, Shape, dict[str, int]]] = {
    "hiera_tiny_224": ("model_state", HieraShape(224, 16, 96, (1, 2, 7, 2), 1, q_pool=3, fuse="none"), {}),
    "mae_hiera_tiny_224": ("model_state", HieraShape(224, 16, 96, (1, 2, 7, 2), 1), {}),
    "mae_hiera_base_224": ("model_state", HieraShape(224, 16, 96, (2, 3, 16, 3), 1), {}),
    "mae_hiera_tiny46_400e_bare": ("model", HieraShape(224, 16, 46, (1, 2, 7, 2), 1), {}),
    "hivit_base_finetune": ("model", replace(BASE, stages=(4, 4, 20), relative="full"), {}),
    "hivit_base_mae_pretrain": ("model", replace(BASE, stages=(4, 4, 20)), {}),
    "itpn_base_pixel_pretrain": ("model", replace(BASE, position_offset=0.1, **PYRAMID), {}),
    "itpn_base_pixel_finetune": ("model", replace(BASE, relative="full"), {}),
    "itpn_base_clip_pretrain": (
        "model",
        replace(BASE, relative="full", layer_scale=0.1, **(PYRAMID | {"pyramid_depth": 1})),
        {"of the pre-training head": 1 + 12 + 4 + 4 + 2 * 15},
    ),
    "itpn_base_clip_finetune": ("model", replace(BASE, relative="full", layer_scale=0.1), {}),
    "fast_itpn_tiny_finetune": ("module", TINY, {}),
    "fast_itpn_base_finetune": ("module", replace(TINY, dim=512, stages=(3, 3, 24), heads=8), {}),
    "fast_itpn_tiny_pretrain_fork": (
        "model",
        replace(TINY, **FAST_PYRAMID),
        {"of the pre-training head": 1 + 12 + 2},
    ),
    "fast_itpn_base_pretrain_fork": (
        "model",
        replace(TINY, dim=512, stages=(3, 3, 24), heads=8, **FAST_PYRAMID),
        {"of the pre-training head": 1 + 12 + 2},
    ),
}
DECODERS = {"mae_hiera_tiny46_400e_bare": (96, 1, 3), "hivit_base_mae_pretrain": (512, 6, 16)}


@pytest.fixture
def unborn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders of 100 million numbers come without being initialised: they are filled from a file at once."""
    for name in ("trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.mark.usefixtures("unborn")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_is_read_to_the_last_tensor(name: str, tmp_path: Path) -> None:
    container, expected, reasons = PUBLISHED[name]
    tensors = tensors_of(name)
    torch.save({container: {f"module.{key}": value for key, value in tensors.items()}}, tmp_path / "file.pth")
    checkpoint = open_checkpoint(tmp_path / "file.pth")
    shape = shape_of_checkpoint(checkpoint)
    if isinstance(shape, HiViTShape) and shape.layer_scale:
        shape = replace(shape, layer_scale=0.1)  # constants stand in for the values
    assert shape == expected
    encoder = encoder_of(shape)
    report = fill_encoder(encoder, checkpoint)
    decoder = load_decoder(checkpoint, encoder, report=report) if checkpoint.decoder else None

    assert set(report.fresh.values()) <= {"a classifier with mean pooling has none"}
    assert set(report.fresh) == ({"norm.weight", "norm.bias"} if name == "hiera_tiny_224" else set())
    assert len(report.loaded) + len(report.skipped) == len(tensors)
    assert not report.resized
    assert not report.notes
    classifier = name == "hiera_tiny_224" or name.endswith("_finetune")
    counts = reasons | ({"of the head": 4} if classifier else {})
    if "relative_position_index" in tensors:
        counts["computed, not learned"] = 1
    assert Counter(report.skipped.values()) == counts
    state = encoder.state_dict()
    for key in set(state) - set(report.fresh):
        theirs = f"encoder_{key}" if "hiera" in name and key.startswith("norm.") else key
        assert torch.equal(state[key], tensors[theirs]), key
    assert bool(decoder) == (name.startswith("mae_") or "mae_pretrain" in name or "pixel_pretrain" in name)
    if decoder is not None:
        assert (decoder.dim, len(decoder.blocks), decoder.blocks[0].attn.heads) == DECODERS.get(name, (512, 8, 16))
        assert decoder.pos_embed.requires_grad == ("hiera" in name)
        assert checkpoint.pixels == "normalised"
    if classifier:
        assert checkpoint.head["head.weight"].shape == (1000, encoder.dim)
        assert checkpoint.head["fc_norm.weight"].shape == (encoder.dim,)


# ------------------------------------------------------------------------------------------ oracles through files


def opened(oracle: Golden, path: Path, heads: int) -> tuple[Encoder, LoadReport]:
    save_file(oracle.weights, path)
    return load_encoder(path, heads)


def official_order(pixels: Tensor) -> Tensor:
    """Patches (row, column, channel) -> Hiera's (channel, row, column)."""
    return pixels.unflatten(-1, (16, 16, 3)).movedim(-1, -3).flatten(-3)


@pytest.mark.parametrize(
    ("name", "heads", "ratio", "predicted"),
    [("hiera_mae", 1, 0.6, "pred_full"), ("hivit_mae", 2, 0.75, "pred"), ("itpn_pixel", 2, 0.75, "pred")],
)
def test_official_pretraining_goes_on_from_its_file(
    name: str, heads: int, ratio: float, predicted: str, tmp_path: Path
) -> None:
    oracle = golden(name)
    encoder, report = opened(oracle, tmp_path / "official.safetensors", heads)
    checkpoint = open_checkpoint(tmp_path / "official.safetensors")
    method = MAE(encoder, load_decoder(checkpoint, encoder, 4, report), ratio)
    assert not report.fresh
    assert not report.skipped
    assert len(report.loaded) == len(oracle.weights)
    mask = Mask.from_noise(oracle.io["noise"], ratio)
    batch = Batch({"image": oracle.io["imgs"]}, torch.arange(2), {"mask": mask})
    latent = decoder_input(encoder, encoder(batch.images, mask, taps=decoder_taps(encoder)))
    prediction = method.decoder(latent, encoder.patch_mask(mask))
    found = official_order(prediction) if name == "hiera_mae" else prediction
    assert_close(found, oracle.io[predicted], **oracle.tolerance)
    loss = method(batch, Clock(0, 10, 10, 0))["reconstruction"]
    assert_close(loss, oracle.io["loss"][0], **oracle.tolerance)
    loss.backward()
    gradients = {key: value.grad for key, value in method.named_parameters()}
    checked = [key.removeprefix("grad.") for key in oracle.io if key.startswith("grad.")]
    assert len(checked) == (4 if name == "hiera_mae" else 0)
    for key in checked:
        ours = f"decoder.{key}" if key == "mask_token" else f"encoder.{key}"
        assert_close(gradients[ours], oracle.io[f"grad.{key}"], **oracle.tolerance)


@pytest.mark.parametrize(
    ("name", "heads", "expected"),
    [("hiera", 1, "logits_train_mode"), ("hivit", 2, "logits"), ("fast_itpn", 2, "logits")],
)
def test_official_classifiers_compute_the_same(name: str, heads: int, expected: str, tmp_path: Path) -> None:
    oracle = golden(name)
    encoder, report = opened(oracle, tmp_path / "official.safetensors", heads)
    assert set(report.fresh) <= {"norm.weight", "norm.bias"}
    images = oracle.io["imgs"]
    with torch.no_grad():
        stages = encoder.eval()(images, taps=Taps(stages=tuple(encoder.stages), tokens=False)).stages
        scores = load_classifier(tmp_path / "official.safetensors", heads)(images)
    assert_close(scores, oracle.io[expected], **oracle.tolerance)
    first = stages[min(stages)]
    if name == "hiera":
        assert_close(first.movedim(1, -1), oracle.io["stage_feature.0"], **oracle.tolerance)
    elif name == "fast_itpn":
        assert_close(first, oracle.io["stage1"], **oracle.tolerance)
        assert_close(stages[16].flatten(2).transpose(1, 2), oracle.io["stage3"], **oracle.tolerance)


def test_official_fast_pyramid_computes_the_same(tmp_path: Path) -> None:
    oracle = golden("fast_itpn_pretrain")
    encoder, report = opened(oracle, tmp_path / "official.safetensors", 2)
    assert set(report.skipped.values()) == {"of the pre-training head"}
    assert encoder.shape.pyramid_hidden == 64
    mask = Mask.from_hidden(oracle.io["bool_masked_pos"].bool())
    with torch.no_grad():
        features = encoder(oracle.io["imgs"], mask, oracle.weights["mask_token"], Taps(levels=(4, 8, 16)))
    for stride in (4, 8, 16):
        assert_close(features.levels[stride], oracle.io[f"p{stride}"], **oracle.tolerance)


@pytest.mark.parametrize("name", ["itpn_mfm_clip", "itpn_det_clip", "itpn_seg"])
def test_other_official_forms_are_read(name: str, tmp_path: Path) -> None:
    """Tables of relative positions tell the head count."""
    encoder, report = opened(golden(name), tmp_path / "official.safetensors", 0)
    assert encoder.heads == 2
    assert encoder.shape.relative == ("decomposed" if name == "itpn_det_clip" else "full")
    assert encoder.shape.layer_scale is not None
    assert not report.fresh


# --------------------------------------------------------------------------------------- our files, other sizes


SHAPES = {
    "hiera": HIERA,
    "hiera, classification": replace(HIERA, q_pool=3, fuse="none"),
    "hiera, without last": replace(HIERA, fuse="without_last"),
    "hivit": replace(HIVIT, relative="full", layer_scale=0.3),
    "itpn": ITPN,
    "itpn, C = D": replace(ITPN, pyramid_dim=32, relative="decomposed"),
    "fast": replace(FAST, pyramid_dim=0, pyramid_depth=0, pyramid_hidden=0),
    "fast itpn": FAST,
}


@pytest.mark.parametrize("name", SHAPES)
def test_our_files_come_back(name: str, tmp_path: Path) -> None:
    encoder = varied(SHAPES[name])
    save_ours(tmp_path / ENCODER_FILE, encoder)
    position = "learned" if name.startswith("hiera") else "sincos"
    decoder = make_decoder(encoder, 3 * encoder.patch**2, 32, 2, 4, position)
    save_decoder(tmp_path / DECODER_FILE, decoder, normalised=False)
    loaded, report = load_encoder(tmp_path)
    assert loaded.shape == encoder.shape
    assert set(report.skipped.values()) == {"of the decoder"}
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.pixels == "raw"
    again = load_decoder(checkpoint, loaded, report=report)
    assert not report.skipped
    assert not report.fresh
    assert again.position == position
    for ours, theirs in ((encoder, loaded), (decoder, again)):
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", ["hiera", "hivit", "itpn, C = D", "fast itpn"])
def test_other_grids(name: str, tmp_path: Path) -> None:
    encoder = varied(SHAPES[name])
    path = save_ours(tmp_path / "file.safetensors", encoder)
    larger, report = load_encoder(path, image_size=2 * encoder.shape.image_size)
    state, ours = larger.state_dict(), encoder.state_dict()
    if name == "hiera":
        assert report.resized == {"pos_embed": "32 x 32 to 64 x 64 tokens, bicubic, what mask units repeat kept"}
        assert torch.equal(state["pos_embed"], resize_table(ours["pos_embed"], (32, 32), (64, 64), 8))
        return
    table = "pos_embed" if "fast" in name else "absolute_pos_embed"
    assert report.resized.pop(table) == "4 x 4 to 8 x 8 patches, bicubic"
    assert torch.equal(state[table], resize_positions(ours[table], (4, 4), (8, 8), 0))
    block = "blocks.4.attn."
    if name == "hivit":
        assert report.resized[f"{block}relative_position_bias_table"] == "4 x 4 to 8 x 8 patches, bicubic"
        old = ours[f"{block}relative_position_bias_table"]
        expected = resize_positions(old[None], (7, 7), (15, 15), 0)[0]
        assert torch.equal(state[f"{block}relative_position_bias_table"], expected)
    if name == "itpn, C = D":
        assert report.resized[f"{block}rel_pos_h"] == "4 to 8 patches, linear"
        images = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert_close(larger.eval()(images).latent, encoder(images).latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [replace(HIERA, dim=60), replace(HIVIT, dim=60, heads=1)])
def test_hidden_widths_of_no_round_ratio(shape: HieraShape | HiViTShape, tmp_path: Path) -> None:
    """123 / 60 * 60 is less than 123 in floating point."""
    encoder = varied(replace(shape, mlp_ratio=2.0500001))
    assert encoder.state_dict()[f"blocks.{4 if isinstance(shape, HiViTShape) else 0}.mlp.fc1.weight"].shape == (123, 60)
    loaded, _ = load_encoder(save_foreign(tmp_path / "file.pth", encoder), 1)
    assert loaded.state_dict().keys() == encoder.state_dict().keys()


def test_decoder_positions_of_another_grid(tmp_path: Path) -> None:
    encoder = varied(HIERA)
    save_ours(tmp_path / ENCODER_FILE, encoder)
    decoder = make_decoder(encoder, 48, 32, 1, 4, "learned")
    save_decoder(tmp_path / DECODER_FILE, decoder, normalised=True)
    loaded = load_decoder(open_checkpoint(tmp_path), encoder_of(replace(HIERA, image_size=64)))
    assert torch.equal(loaded.pos_embed, resize_positions(decoder.pos_embed, (8, 8), (16, 16), 0))


def test_half_precision(tmp_path: Path) -> None:
    encoder = varied(FAST)
    save_file({name: value.bfloat16() for name, value in encoder.state_dict().items()}, tmp_path / "file.safetensors")
    loaded, _ = load_encoder(tmp_path / "file.safetensors", 2)
    assert torch.equal(loaded.norm.weight, encoder.norm.weight.bfloat16().float())


# ------------------------------------------------------------------------------------------------------ forms


def test_a_pyramid_is_left_out_where_the_encoder_has_none(tmp_path: Path) -> None:
    for shape in (ITPN, FAST):
        path = save_foreign(tmp_path / "file.pth", source := varied(shape))
        encoder = encoder_of(replace(shape, pyramid_dim=0, pyramid_depth=0, pyramid_hidden=0))
        report = load_encoder_weights(encoder, path)
        reason = "pyramid, not part of the encoder (encoder.pyramid_depth=0)"
        assert set(report.skipped.values()) == {reason}
        assert len(report.loaded) + len(report.skipped) == len(source.state_dict())
        assert f" more ({reason})" in str(report)
        report = load_encoder_weights(varied(shape), save_foreign(path, encoder))
        assert set(report.fresh.values()) == {"the file has no pyramid"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pyramid_dim": 32},
            r"a pyramid of pyramid_dim 16, the encoder of pyramid_dim 32; set encoder\.pyramid_dim=16$",
        ),
        (
            {"pyramid_depth": 1, "pyramid_hidden": 64},
            r"pyramid_depth 2, pyramid_hidden 40, the encoder of pyramid_depth 1, pyramid_hidden 64; "
            r"set encoder\.pyramid_depth=2 encoder\.pyramid_hidden=40$",
        ),
        ({"dim": 64}, "has width 32, the encoder 64; they must agree"),
        ({"patch": 8}, "has patch 4, the encoder 8; they must agree"),
        ({"stages": (1, 1, 3)}, r"has \[1, 1, 2\] blocks, the encoder \[1, 1, 3\]\. Set encoder\.stages, or"),
        ({"form": "fast"}, r"of the form of HiViT or iTPN, the encoder of Fast-iTPN; set encoder\.name=itpn_tiny"),
    ],
)
def test_unfit_pyramids_and_numbers(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "file.pth", varied(ITPN))
    with pytest.raises(WeightsError, match=message):
        load_encoder_weights(encoder_of(replace(ITPN, **change)), path)


def test_parts_that_only_fine_tuning_has_start_fresh(tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "file.pth", varied(HIVIT))
    for change in ({"relative": "full"}, {"relative": "decomposed"}, {"layer_scale": 0.1}):
        report = load_encoder_weights(encoder_of(replace(HIVIT, **change)), path)
        assert set(report.fresh.values()) == {"only the fine-tuned form has it"}
        assert len(report.fresh) == {"full": 2, "decomposed": 4}.get(str(change.get("relative")), 6)


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ({"layer_scale": 0.1}, "encoder.layer_scale=0.1"),
        ({"relative": "full"}, "encoder.relative=full"),
        ({"relative": "decomposed", "layer_scale": 0.3}, "encoder.relative=decomposed encoder.layer_scale=0.1"),
    ],
)
def test_parts_that_the_encoder_would_leave_out_are_an_error(part: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "file.pth", varied(replace(HIVIT, **part)))
    with pytest.raises(WeightsError, match=f"would compute something else. Set {wanted}$"):
        load_encoder_weights(encoder_of(HIVIT), path)


def test_detectors_replace_tables_of_relative_positions(tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "file.pth", varied(replace(HIVIT, relative="full")))
    report = load_encoder_weights(encoder_of(replace(HIVIT, relative="decomposed")), path)
    tables = {f"blocks.{i}.attn.relative_position_bias_table" for i in (4, 5)}
    assert set(report.skipped) == tables
    assert "encoder.relative=decomposed" in report.skipped[min(tables)]
    assert len(report.fresh) == 4


def test_parts_for_dense_inputs_start_fresh_and_come_back(tmp_path: Path) -> None:
    """Tables of relative positions of whole images have no place in windows."""
    path = save_foreign(tmp_path / "file.pth", varied(replace(ITPN, relative="full")))
    encoder = encoder_of(replace(ITPN, window=2, gathering="to_tokens", window_relative=True))
    report = load_encoder_weights(encoder, path)
    assert set(report.fresh.values()) == {"only the form for dense inputs has it"}
    assert {name.split(".")[0] for name in report.fresh} == {"gathering_token", "cross", "window_rpe"}
    assert set(report.skipped) == {f"blocks.{i}.attn.relative_position_bias_table" for i in (4, 5)}
    assert "encoder.window" in report.skipped["blocks.4.attn.relative_position_bias_table"]
    ours = save_ours(tmp_path / "file.safetensors", encoder)
    loaded, report = load_encoder(ours)
    assert loaded.shape == encoder.shape
    assert not report.fresh
    for file in (ours, save_foreign(path, encoder)):
        with pytest.raises(WeightsError, match=r"the encoder lacks: .* Set encoder\.window, encoder\.gathering and"):
            load_encoder_weights(varied(ITPN), file)


def test_one_missing_tensor_is_an_error(tmp_path: Path) -> None:
    for shape, name in (
        (HIERA, "blocks.2.norm1.bias"),
        (HIERA, "multi_scale_fusion_heads.1.bias"),
        (ITPN, "block_8to4.1.mlp.fc2.bias"),
        (FAST, "blocks.5.gamma_2"),
        (FAST, "norm.bias"),
        (replace(HIVIT, relative="full"), "blocks.5.attn.relative_position_bias_table"),
    ):
        encoder = varied(shape)
        state = {key: value for key, value in encoder.state_dict().items() if key != name}
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(WeightsError, match=f"lacks the encoder's {name}; expected a whole encoder"):
            load_encoder_weights(encoder, tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("shape", "lost", "message"),
    [
        (HIVIT, "blocks.3.reduction.weight", "is not a HiViT or iTPN: no second merge among its"),
        (HIVIT, "absolute_pos_embed", "is not a HiViT or iTPN: no absolute_pos_embed among its"),
        (FAST, "blocks.5.mlp.w1.weight", r"is not a HiViT or iTPN: no blocks\.5\.mlp\.w1\.weight"),
        (HIERA, "pos_embed", "is not a Hiera: no pos_embed among its"),
        (HIERA, "blocks.1.proj.weight", "is not a Hiera: its width doubles in 2 blocks, not 3"),
    ],
)
def test_torsos_are_refused(shape: Shape, lost: str, message: str, tmp_path: Path) -> None:
    state = {key: value for key, value in varied(shape).state_dict().items() if key != lost}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=message):
        load_encoder(tmp_path / "file.pth", 1)


def test_parts_of_other_models_are_refused(tmp_path: Path) -> None:
    for shape, name in ((HIERA, "pos_embed_win"), (HIERA, "blocks.0.ls1.gamma"), (ITPN, "blocks.0.conv.weight")):
        torch.save({**varied(shape).state_dict(), name: torch.zeros(3)}, tmp_path / "file.pth")
        with pytest.raises(WeightsError, match=f"its {name} has no place in one"):
            open_checkpoint(tmp_path / "file.pth")
    torch.save({**varied(ITPN).state_dict(), "ema.decay": torch.zeros(1)}, tmp_path / "file.pth")
    assert load_encoder(tmp_path / "file.pth", 2)[1].skipped == {"ema.decay": "not known"}


VIT = ViTShape(16, 8, 192, 12, 3)


@pytest.mark.parametrize(
    ("file", "encoder", "message"),
    [
        (VIT, HIERA, r"is a plain ViT, the encoder a Hiera; set encoder\.name=vit_tiny$"),
        (VIT, ITPN, r"is a plain ViT, the encoder a HiViT or iTPN; set encoder\.name=vit_tiny$"),
        (
            HIERA,
            VIT,
            r"is a Hiera, .* a plain ViT; set encoder\.name=hiera_tiny encoder\.dim=8 encoder\.stages=\[1,1,2,1\]$",
        ),
        (
            replace(HIERA, dim=46, stages=(1, 2, 7, 2)),
            ITPN,
            r"the encoder a HiViT or iTPN; set encoder\.name=hiera_tiny46$",
        ),
        (replace(ITPN, dim=128, stages=(1, 1, 4)), HIERA, r"set encoder\.name=itpn_micro$"),
        (replace(HIVIT, dim=128, stages=(1, 1, 4)), VIT, r"set encoder\.name=hivit_micro$"),
        (replace(FAST, dim=128, stages=(1, 1, 4)), VIT, r"set encoder\.name=fast_itpn_micro$"),
    ],
)
def test_another_family_says_which_encoder_to_choose(file: Shape, encoder: Shape, message: str, tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "file.pth", encoder_of(file))
    with pytest.raises(WeightsError, match=message):
        load_encoder_weights(encoder_of(replace(encoder, heads=1)), path)


def test_head_counts(tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "hiera.pth", varied(HIERA))
    with pytest.raises(
        WeightsError,
        match=r"width 8 have an unknown number of heads \(of the first stage, .*Say which: heads=1, or teacher",
    ):
        load_encoder(path)
    assert load_encoder_weights(varied(HIERA), path).notes == [
        "the file does not tell its head count: taken as the encoder's 1"
    ]
    path = save_foreign(tmp_path / "hivit.pth", varied(HIVIT))
    with pytest.raises(WeightsError, match=r"width 32 have an unknown number of heads \(officially width / 64\)"):
        load_encoder(path)
    path = save_foreign(tmp_path / "wide.pth", encoder_of(replace(HIVIT, dim=384)))
    assert load_encoder(path)[0].heads == 6
    with pytest.raises(WeightsError, match="has head count 6, the encoder 2; they must agree"):
        load_encoder_weights(encoder_of(replace(HIVIT, dim=384)), path)


def test_hiera_for_classification_starts_from_pretraining(tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "file.pth", source := varied(HIERA))
    encoder = encoder_of(replace(HIERA, q_pool=3, fuse="none"))
    report = load_encoder_weights(encoder, path)
    assert set(report.skipped.values()) == {"sums stages for a decoder, not part of the encoder (encoder.fuse=none)"}
    assert torch.equal(encoder.norm.weight, source.norm.weight)
    with pytest.raises(
        WeightsError, match=r"after another number of poolings than the encoder's 3; set encoder\.fuse=none"
    ):
        load_encoder_weights(encoder_of(replace(HIERA, q_pool=3)), path)
    with pytest.raises(WeightsError, match=r"no multi_scale_fusion_heads, .*; set encoder\.fuse=none"):
        load_encoder_weights(varied(HIERA), save_foreign(path, encoder))


@pytest.mark.parametrize(("shape", "other"), [(HIERA, (1, 1, 3, 1)), (ITPN, (1, 1, 4)), (FAST, (1, 1, 4))])
@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 4])
def test_keep_blocks(shape: HieraShape | HiViTShape, other: tuple[int, ...], blocks: int, tmp_path: Path) -> None:
    source, encoder = varied(replace(shape, stages=other), seed=1), varied(shape)
    path = save_foreign(tmp_path / "file.pth", source)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    report = load_encoder_weights(encoder, path, blocks)
    merges = {1: 1, 3: 2} if isinstance(shape, HiViTShape) else {}  # member -> the block after it, from 0
    for name, value in encoder.state_dict().items():
        parts = name.split(".")
        member = int(parts[1]) if parts[0] == "blocks" else -1
        number = merges.get(member, member - sum(member > merge for merge in merges))
        embeds = parts[0] in ("pos_embed", "absolute_pos_embed", "patch_embed")
        kept = blocks > 0 and (embeds or (parts[0] == "blocks" and number < blocks))
        assert (name in report.loaded) == kept, name
        assert torch.equal(value, source.state_dict()[name] if kept else before[name]), name
        assert (name in report.fresh) == (not kept and blocks > 0)


def test_kept_blocks_must_stand_in_the_same_stages(tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "file.pth", varied(replace(ITPN, stages=(2, 1, 2))))
    encoder = varied(ITPN)
    assert load_encoder_weights(encoder, path, 1).loaded
    with pytest.raises(
        WeightsError, match=r"stand in stages of \[2, 1, 2\] blocks, those of the encoder in stages of \["
    ):
        load_encoder_weights(encoder, path, 2)
    with pytest.raises(WeightsError, match=r"keep_blocks 5 is too many: .* has 5 blocks, the encoder 4"):
        load_encoder_weights(encoder, path, 5)


def test_the_pyramid_starts_fresh_where_only_blocks_are_kept(tmp_path: Path) -> None:
    """Integral pre-training, not loaded: the pyramid stays as it is."""
    path = save_foreign(tmp_path / "file.pth", varied(ITPN, seed=1))
    report = load_encoder_weights(varied(ITPN), path, 4)
    assert set(report.fresh.values()) == {"only the first 4 blocks are used"}
    assert all(name.startswith(("align_", "split_", "block_", "fpn_")) for name in report.fresh)


def test_decoders_must_be_whole_and_of_the_kind(tmp_path: Path) -> None:
    encoder = varied(ITPN)
    save_ours(tmp_path / ENCODER_FILE, encoder)
    save_decoder(tmp_path / DECODER_FILE, make_decoder(encoder, 48, 32, 1, 4), normalised=True)
    bare = encoder_of(replace(ITPN, pyramid_dim=0, pyramid_depth=0, pyramid_hidden=0))
    with pytest.raises(WeightsError, match=r"lacks norm\.weight; a partly random decoder is never used"):
        load_decoder(open_checkpoint(tmp_path), bare)
    checkpoint = open_checkpoint(tmp_path)
    del checkpoint.decoder["decoder_embed.2.1.bias"]
    with pytest.raises(WeightsError, match=r"lacks decoder_embed\.2\.1\.bias"):
        load_decoder(checkpoint, encoder)


def test_mae_lite_saves_hiera(tmp_path: Path) -> None:
    tensors = {f"module.model.{name}": value for name, value in tensors_of("mae_hiera_tiny46_400e_bare").items()}
    checkpoint = open_checkpoint(save_mae_lite(tmp_path / "file.pth.tar", tensors))
    assert shape_of_checkpoint(checkpoint) == HieraShape(224, 16, 46, (1, 2, 7, 2), 1)
    assert not checkpoint.ignored


# ------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("classes", [0, 5])
def test_timms_hiera_is_read(classes: int, tmp_path: Path) -> None:
    size = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "stages": (1, 1, 2, 1)}
    model = timm.create_model("hiera_tiny_224", **size, num_classes=classes).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    checkpoint = checkpoint_of_timm(model, "timm:hiera")
    assert shape_of_checkpoint(checkpoint) == HieraShape(64, 16, 16, (1, 1, 2, 1), 2, q_pool=3, fuse="none")
    images = torch.randn(2, 3, 64, 64)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    with torch.no_grad():
        if classes:
            assert_close(load_classifier(tmp_path / "file.pth", 2)(images), model(images), rtol=1e-4, atol=1e-4)
        else:
            model.reset_classifier(0, "")
            tokens = load(tmp_path / "file.pth", 2)(images).tokens
            assert_close(tokens, model(images), rtol=1e-4, atol=1e-4)


def test_relative_positions_that_fine_tuning_adds_start_at_zero(tmp_path: Path) -> None:
    path = save_ours(tmp_path / "file.safetensors", varied(replace(SHAPES["hivit"], relative="none")))
    encoder = encoder_of(SHAPES["hivit"])
    encoder.init_classifier_()
    table = encoder.state_dict()["blocks.4.attn.relative_position_bias_table"]
    assert table.abs().max() > 0
    report = load_encoder_weights(encoder, path)
    assert report.fresh["blocks.4.attn.relative_position_bias_table"] == "only the fine-tuned form has it"
    assert table.abs().max() == 0
