"""Exports of hierarchical encoders: timm's Hiera, and HiViT and iTPN through `mimlet.load`."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.export.timm import HIERA_SIZES, export_classifier, export_encoder, snippet, timm_arguments
from mimlet.methods.settings import ClassifySettings
from mimlet.models.build import encoder_of
from mimlet.models.decoders import make_decoder
from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps
from mimlet.models.shapes import HieraShape, HiViTShape, Shape
from mimlet.models.weights import load, load_decoder, load_encoder, open_checkpoint, shape_of_checkpoint
from mimlet.tasks.classify import Classify

HIERA = HieraShape(64, 16, 8, (1, 1, 2, 1), 1, mlp_ratio=3.0)
HIVIT = HiViTShape(16, 4, 32, (1, 1, 2), 2)
PYRAMID: dict[str, Any] = {"pyramid_dim": 16, "pyramid_depth": 1, "pyramid_hidden": 40}
FAST: dict[str, Any] = {"form": "fast", "mlp_ratio": 3.0, "position": "learned", "layer_scale": 0.1}
SHAPES: dict[str, Shape] = {
    "hiera": HIERA,
    "hiera, patch 4": replace(HIERA, image_size=32, patch=4),
    "hiera, no sum of stages": replace(HIERA, fuse="none"),
    "hiera for classification": replace(HIERA, q_pool=3, fuse="none"),
    "hivit": replace(HIVIT, relative="full", layer_scale=0.3),
    "itpn": replace(HIVIT, **PYRAMID),
    "fast": replace(HIVIT, **FAST),
    "fast itpn": replace(HIVIT, **FAST, **PYRAMID),
}
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)


def vary(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def make(name: str) -> Encoder:
    encoder = encoder_of(SHAPES[name])
    vary(encoder)
    return encoder.eval()


def images(shape: Shape) -> Tensor:
    return torch.randn(3, 3, shape.image_size, shape.image_size, generator=torch.Generator().manual_seed(1))


def run(folder: Path) -> dict[str, Any]:
    space: dict[str, Any] = {}
    exec(snippet(folder), space)
    return space


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in SHAPES if "hiera" in name])
def test_timm_computes_what_hiera_does(name: str, tmp_path: Path) -> None:
    """The tokens; those of the last block where ours go on to sum stages."""
    encoder = make(name)
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD)
    space = run(tmp_path)
    assert isinstance(space["model"], timm.models.Hiera)
    batch = space["images"]
    if encoder.shape.fuse == "none":
        expected = encoder(batch).latent
    else:
        stage = encoder(batch, taps=Taps(stages=(encoder.patch,), tokens=False)).stages[encoder.patch]
        expected = stage.flatten(2).transpose(1, 2)
        assert "patches in raster order, the last block's output" in snippet(tmp_path)
    assert_close(space["tokens"], expected, rtol=1e-4, atol=1e-5)
    assert f"[B, {expected.shape[1]}, {expected.shape[2]}]: patches in raster order" in snippet(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_classifiers(name: str, tmp_path: Path) -> None:
    task = Classify(make(name), 5, ClassifySettings(pool="mean")).eval()
    vary(task.head)
    export_classifier(tmp_path, task, classes=list("abcde"), mean=MEAN, std=STD)
    space = run(tmp_path)
    assert_close(space["scores"], task.predict(space["images"]), rtol=1e-4, atol=1e-5)
    ours = load(tmp_path)
    assert_close(ours(space["images"]), task.predict(space["images"]))
    assert isinstance(space["model"], timm.models.Hiera if "hiera" in name else type(ours))
    names = load_file(tmp_path / "encoder.safetensors").keys()
    assert {"head.norm.weight", "head.fc.weight"} <= names if "hiera" in name else {"fc_norm.weight"} <= names


@torch.no_grad()
@pytest.mark.parametrize("name", ["hivit", "itpn", "fast", "fast itpn"])
def test_what_timm_lacks_comes_through_mimlet(name: str, tmp_path: Path) -> None:
    encoder = make(name)
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD)
    assert "timm.create_model" not in snippet(tmp_path)
    space = run(tmp_path)
    assert torch.equal(space["tokens"], encoder(space["images"]).latent)
    assert "[B, 16, 32]: patches in raster order" in snippet(tmp_path)
    assert ("levels" in space) == bool(encoder.levels)
    if encoder.levels:
        expected = encoder(space["images"], taps=Taps(levels=(1, 2, 4))).levels
        assert all(torch.equal(space["levels"][stride], level) for stride, level in expected.items())
    assert load_file(tmp_path / "encoder.safetensors").keys() == encoder.state_dict().keys()


def test_every_family_comes_back_in_another_process(tmp_path: Path) -> None:
    for name in SHAPES:
        encoder = make(name)
        decoder = make_decoder(encoder, 3 * encoder.patch**2, 32, 1, 2)
        export_encoder(tmp_path / name, encoder, mean=MEAN, std=STD, decoder=decoder)
        with torch.no_grad():
            save_file(
                {"images": images(encoder.shape), "tokens": encoder(images(encoder.shape)).latent},
                tmp_path / f"{name}.io",
            )
    code = f"""
import torch, mimlet
from safetensors.torch import load_file
from mimlet.models.weights import load_decoder, open_checkpoint
for name in {list(SHAPES)!r}:
    model, io = mimlet.load({str(tmp_path)!r} + "/" + name), load_file({str(tmp_path)!r} + f"/{{name}}.io")
    assert not model.training
    with torch.no_grad():
        tokens = model(io["images"]).tokens
    torch.testing.assert_close(tokens, io["tokens"])
    load_decoder(open_checkpoint({str(tmp_path)!r} + "/" + name), model)
print("all equal")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "all equal\n", done.stderr


def test_description(tmp_path: Path) -> None:
    export_encoder(tmp_path, make("hiera, patch 4"), mean=MEAN, std=STD)
    described = json.loads((tmp_path / "encoder.json").read_text())
    assert described["shape"]["stages"] == [1, 1, 2, 1]
    assert described["timm"] == {
        "name": "hiera_tiny_224",
        "kwargs": {
            "img_size": 32,
            "embed_dim": 8,
            "stages": [1, 1, 2, 1],
            "q_pool": 2,
            "mlp_ratio": 3.0,
            "patch_kernel": [1, 1],
            "patch_stride": [1, 1],
            "patch_padding": [0, 0],
            "num_classes": 0,
            "global_pool": "",
        },
    }
    assert shape_of_checkpoint(open_checkpoint(tmp_path)) == SHAPES["hiera, patch 4"]


@pytest.mark.parametrize("name", HIERA_SIZES)
def test_named_sizes_are_timms(name: str) -> None:
    size = HIERA_SIZES[name]
    shape = HieraShape(224, 16, size.dim, size.stages, size.heads, q_pool=3, fuse="none")
    assert timm_arguments(shape, 1000, "mean") == (name, {"num_classes": 1000, "global_pool": "avg"})
    model = timm.create_model(name, device="meta")
    assert (model.pos_embed.shape[2], len(model.blocks)) == (size.dim, sum(size.stages))
    assert model.blocks[0].attn.heads == size.heads


def test_hiera_of_timm_becomes_ours_and_goes_back(tmp_path: Path) -> None:
    encoder = make("hiera for classification")
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD)
    model = run(tmp_path)["model"]
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    again, report = load_encoder(tmp_path / "timm.pth", heads=1)
    assert not report.fresh
    assert not report.skipped
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in again.state_dict().items())


def test_decoders_travel_with_their_encoders(tmp_path: Path) -> None:
    encoder = make("itpn")
    decoder = make_decoder(encoder, 48, 32, 2, 4, "learned")
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD, decoder=decoder, normalised=False)
    names = load_file(tmp_path / "decoder.safetensors").keys()
    assert {"decoder_embed.0.0.weight", "decoder_embed.2.1.bias", "mask_token", "decoder_pred.bias"} <= names
    loaded = load_decoder(open_checkpoint(tmp_path), encoder)
    assert loaded.position == "learned"
    assert loaded.pos_embed.requires_grad
    assert all(torch.equal(value, decoder.state_dict()[name]) for name, value in loaded.state_dict().items())
