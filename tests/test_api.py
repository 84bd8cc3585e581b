"""The Python way: what the README shows, with the same results as the command line."""

import contextlib
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import mimlet
from tests.data.images import make_folder
from tests.tiny import finetune, pretrain

TINY: dict[str, object] = {
    "encoder__name": "vit_nano",
    "encoder__image_size": 16,
    "encoder__dim": 24,
    "encoder__depth": 2,
    "encoder__heads": 3,
    "batch": 8,
    "steps": 3,
    "workers": 0,
    "speed__accelerator": "cpu",
    "precision": 32,
    "run__tensorboard": False,
}
DECODER: dict[str, object] = {"method__decoder__dim": 12, "method__decoder__heads": 3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images."""
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `encoder` and `classifier`, made in Python."""
    folder = tmp_path_factory.mktemp("runs")
    pretrained = mimlet.pretrain("mae_micro32", data=photos, out=folder / "encoder", **TINY, **DECODER)
    assert pretrained.folder == folder / "encoder"
    assert pretrained.fit.steps == 3
    tuned = mimlet.finetune(
        "classify_micro32",
        data=str(photos),
        eval=[photos],
        encoder=folder / "encoder",
        out=folder / "classifier",
        **TINY,
    )
    assert set(tuned.fit.evaluation) == {"top1"}
    return folder


def test_python_and_the_command_line_give_the_same(photos: Path, runs: Path, tmp_path: Path) -> None:
    pretrain(photos, tmp_path / "encoder")
    finetune(photos, tmp_path / "classifier", "--encoder", str(runs / "encoder"))
    for name in ("encoder/encoder.safetensors", "encoder/decoder.safetensors", "classifier/encoder.safetensors"):
        assert (tmp_path / name).read_bytes() == (runs / name).read_bytes()


def test_load(runs: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    encoder, classifier = mimlet.load(runs / "encoder"), mimlet.load(str(runs / "classifier"))
    for model in (encoder, classifier):
        assert isinstance(model, nn.Module)
        assert not model.training
    assert isinstance(encoder(images), mimlet.Features)
    assert encoder(images).tokens.shape == (2, 17, 24)
    assert encoder(images, taps=mimlet.Taps(hidden=(1,), tokens=False)).hidden[1].shape == (2, 17, 24)
    assert classifier(images).shape == (2, 3)
    assert classifier.names == ("ant", "bee", "cat")


def test_judging(photos: Path, runs: Path, tmp_path: Path) -> None:
    scores = mimlet.evaluate(runs / "classifier", data=photos, out=str(tmp_path))
    assert scores == mimlet.evaluate(runs / "classifier", out=str(tmp_path)), "which judges on the run's own images"
    for kind in ("quick", "knn"):
        assert (
            0
            <= mimlet.probe(runs / "encoder", data=str(photos), eval=[photos], kind=kind, out=str(tmp_path))["top1"]
            <= 100
        )


def test_report_of_several_runs(runs: Path, tmp_path: Path) -> None:
    page = mimlet.report([runs / "encoder", runs / "classifier"], out=tmp_path / "page.html")
    text = page.read_text()
    assert "2 runs compared" in text
    assert "encoder: Reconstruction" in text
    assert "classifier: Confusion" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_the_printed_snippets_run_as_printed_and_equal_mimlet(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in a process that has not imported mimlet, and here beside `mimlet.load`."""
    scripts = []
    for name in ("encoder", "classifier"):
        mimlet.export(runs / name, to=tmp_path / name)
        said = capsys.readouterr().out
        assert f"{tmp_path / name / 'encoder.safetensors'}" in said.partition("\n")[0]
        scripts.append(tmp_path / f"{name}.py")
        scripts[-1].write_text(said.partition("Use it:\n\n")[2])
    alone = "import runpy, sys; [runpy.run_path(s) for s in sys.argv[1:]]; assert 'mimlet' not in sys.modules"
    subprocess.run([sys.executable, "-c", alone, *map(str, scripts)], check=True)
    found = [runpy.run_path(str(script)) for script in scripts]
    with torch.no_grad():
        tokens = mimlet.load(runs / "encoder")(found[0]["images"]).tokens
        scores = mimlet.load(runs / "classifier")(found[1]["images"])
    torch.testing.assert_close(found[0]["tokens"], tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1]["scores"], scores, rtol=1e-4, atol=1e-5)
    for name in ("encoder", "classifier"):
        exported, own = mimlet.load(tmp_path / name).state_dict(), mimlet.load(runs / name).state_dict()
        assert all(torch.equal(exported[key], own[key]) for key in own)


def test_what_is_done_wrong_is_a_user_error(photos: Path, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(mimlet.UserError, match="already holds a run"):
        mimlet.pretrain("mae_micro32", data=photos, out=runs / "encoder", **TINY, **DECODER)
    with pytest.raises(mimlet.UserError, match=r"use mimlet\.finetune for it"):
        mimlet.pretrain("classify_micro32", data=photos)
    with pytest.raises(mimlet.UserError, match=r"did you mean 'optim\.lr'"):
        mimlet.pretrain("mae_micro32", data=photos, optim__lrr=1)
    with pytest.raises(mimlet.UserError, match="no images were named"):
        mimlet.pretrain("mae_micro32", out=tmp_path / "run", **TINY, **DECODER)
    again = mimlet.pretrain("mae_micro32", data=photos, out=runs / "encoder", resume=True, **TINY, **DECODER)
    assert again.fit.steps == 3


def test_all_public_names_are_there() -> None:
    for name in mimlet.__all__:
        assert not isinstance(getattr(mimlet, name), ModuleType), "a module of the same name must not hide it"
    assert sorted(dir(mimlet)) == sorted(mimlet.__all__)
    with contextlib.suppress(AttributeError):
        mimlet.no_such_name  # noqa: B018
        pytest.fail("an unknown name was found")
