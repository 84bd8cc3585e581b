"""What becomes of an encoder after pre-training: fine-tuning of the BEiT family's form, and what a classifier that was
the pre-training is good for.
"""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import mimlet
from mimlet.analyse.results import read_analysis
from mimlet.cli import main
from mimlet.models.vit import ViT
from mimlet.models.weights import load, read_tensors
from mimlet.run import read_run
from tests.data.images import make_folder
from tests.tiny import ENCODER, SPEED, finetune, finetune_arguments, pretrain

TABLE = "attn.relative_position_bias_table"
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def simmim(photos: Path) -> Path:
    """One table of relative positions for all blocks, no absolute ones, biases of queries and values."""
    out = photos.parent / "simmim"
    given = ["--data", str(photos), "--out", str(out), "--batch", "8", "--workers", "0", "--steps", "3"]
    assert main(["pretrain", "--recipe", "simmim_micro32", *given, *ENCODER, *SPEED, "method.mask_px=8"]) == 0
    return out


@pytest.fixture(scope="module")
def supervised(photos: Path) -> Path:
    """Supervised pre-training, a sigmoid for every class."""
    return finetune(photos, photos.parent / "supervised", "method.loss=sigmoid", "optim.layer_decay=1.0")


def test_fine_tuning_after_simmim_says_what_to_set_and_then_goes_on(
    photos: Path, simmim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(finetune_arguments(photos, tmp_path / "plain", "--encoder", str(simmim))) == 2
    said = " ".join(capsys.readouterr().err.split())
    wanted = ["encoder.position=none", "encoder.relative=qv"]
    assert f"Set {' '.join(wanted)}; or relative=shared" in said
    untrained = ["optim.lr=1e-30", "optim.min_lr=0"]
    run = finetune(photos, tmp_path / "run", "--encoder", str(simmim), *wanted, *untrained)

    before, after = load_file(simmim / "encoder.safetensors"), load_file(run / "encoder.safetensors")
    shared = before["rel_pos_bias.relative_position_bias_table"]
    assert shared.any()
    for block in range(2):
        assert_close(after[f"blocks.{block}.{TABLE}"], shared)
    classifier, encoder = load(run), load(simmim)
    assert isinstance(encoder, ViT)
    with torch.no_grad():
        mean = encoder(IMAGES, taps=classifier.head.taps(2)).hidden[2][:, 1:].mean(1)
        assert_close(classifier(IMAGES), classifier.head.head(classifier.head.fc_norm(mean)))

    described = json.loads((run / "encoder.json").read_text())["timm"]
    model = timm.create_model(described["name"], **described["kwargs"]).eval()
    model.load_state_dict(after)
    with torch.no_grad():
        assert_close(model(IMAGES), classifier(IMAGES), rtol=1e-5, atol=1e-5)


def test_fine_tuning_after_simmim_can_keep_the_one_table(photos: Path, simmim: Path, tmp_path: Path) -> None:
    kept = ["encoder.position=none", "encoder.relative=shared", "encoder.qv_bias=true"]
    run = finetune(photos, tmp_path / "run", "--encoder", str(simmim), *kept)
    assert "rel_pos_bias.relative_position_bias_table" in load_file(run / "encoder.safetensors")


def test_a_supervised_encoder_is_fine_tuned(photos: Path, supervised: Path, tmp_path: Path) -> None:
    run = finetune(photos, tmp_path / "run", "--encoder", str(supervised), "optim.lr=1e-30", "optim.min_lr=0")
    before, after = (read_tensors(folder / "encoder.safetensors")[0] for folder in (supervised, run))
    assert before["head.bias"].max() < -9
    assert after["head.bias"].abs().max() < 0.1  # the head starts anew, for the softmax
    inside = [name for name in before if not name.startswith(("head.", "fc_norm."))]
    assert len(inside) > 20
    for name in inside:
        assert_close(after[name], before[name], msg=name)


def test_a_supervised_run_is_analysed_and_is_a_reference(photos: Path, supervised: Path, tmp_path: Path) -> None:
    mae = pretrain(photos, tmp_path / "mae")
    common = ["--data", str(photos), "--images", "8"]
    assert main(["analyse", str(supervised), str(mae), *common, "--workers", "0", "--out", str(tmp_path / "seen")]) == 0
    assert [model.label for model in read_analysis(tmp_path / "seen").models] == ["supervised", "mae"]
    out = tmp_path / "diagnosis"
    assert main(["diagnose", str(mae), "--reference", str(supervised), *common, "--out", str(out)]) == 0
    assert "supervised" in (out / "report.html").read_text()


def test_a_supervised_run_teaches(photos: Path, supervised: Path, tmp_path: Path) -> None:
    """Its labels while a student is fine-tuned, and its last block's attention in pre-training."""
    labels = ["--teacher", str(supervised), "method.distill.kind=soft"]
    finetune(photos, tmp_path / "labels", *labels)
    mimlet.load(tmp_path / "labels")
    student = pretrain(photos, tmp_path / "dmae", "--recipe", "dmae_micro32", "--teacher", str(supervised))
    assert isinstance(load(student), ViT)


def test_a_hiera_goes_all_the_way(photos: Path, tmp_path: Path) -> None:
    """Pre-trained with two poolings; judged, fine-tuned and evaluated with three; a linear probe of what has no class
    token reads the mean.
    """
    encoder = ["encoder.name=hiera_micro", "encoder.depth=0", "encoder.heads=0", "encoder.dim=8"]
    run = pretrain(photos, tmp_path / "mae", *encoder, "method.decoder.dim=16", "method.decoder.heads=2")
    short = ["schedule.epochs=1", "schedule.warmup_epochs=0", "schedule.batch=8", "speed.workers=0"]
    data = {"data": str(photos), "eval": str(photos)}
    assert set(mimlet.probe(run, **data)) == {"top1"}
    assert set(mimlet.probe(run, **data, kind="linear", overrides=short)) == {"top1"}
    settings = read_run(run / "probe_linear").config
    assert settings.method.pool == "mean"
    assert settings.encoder.shape() == read_run(run).config.encoder.shape()
    more = ["encoder.q_pool=3", "encoder.fuse=none", "optim.layer_decay=0.8"]
    tuned = finetune(photos, tmp_path / "tuned", *encoder, *more, "--encoder", str(run))
    classifier = load(tuned)
    assert classifier.encoder.grid == (2, 2)
    assert set(mimlet.evaluate(tuned, data=str(photos))) == {"top1"}
