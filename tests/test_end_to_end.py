"""From a folder of images to a judged and exported model, through the command line, with everything that may come between."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import mimlet
from mimlet.cli import main
from mimlet.config import recipe_paths
from mimlet.data.dataset import ImageDataset
from mimlet.run import read_run
from tests.data.images import make_folder
from tests.shared import data_folder
from tests.tiny import finetune, finetune_arguments, pretrain, pretrain_arguments

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CIRCUMSTANCES = {"time", "images_per_second", "data_wait", "memory_mb"}


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMLET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images: three steps of eight are an epoch."""
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


@pytest.fixture(scope="module")
def teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run, three blocks deep."""
    return pretrain(photos, tmp_path_factory.mktemp("teacher") / "run", "encoder.depth=3")


@pytest.fixture(scope="module")
def classifier(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run."""
    return finetune(photos, tmp_path_factory.mktemp("classifier") / "run", "method.classes=3")


def commands(photos: Path, teacher: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Seven steps, more than two epochs, of each method with all that is random or remembered; by name, for a folder."""
    often = ("--steps", "7", "run.checkpoint_steps=2", "run.log_steps=2", "optim.clip=1.0")
    d2mae = ("--recipe", "d2mae_micro32", "--teacher", str(teacher), "method.decode_layer=1")
    labels = ("method.mixup=0.5", "method.erasing=0.5", "method.ema_decay=0.5", "encoder.drop_path=0.2")
    return {
        "mae": lambda out: pretrain_arguments(photos, out, *often, "speed.accumulate=2"),
        "d2mae": lambda out: pretrain_arguments(photos, out, *often, *d2mae),
        "classify": lambda out: finetune_arguments(photos, out, *often, *labels, "schedule.eval_epochs=1"),
    }


def results(run: Path) -> dict[str, object]:
    """What training came to: exported bytes, and metrics without time and place."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in sorted(run.glob("*.safetensors"))}
    lines = [line for line in read_run(run).metrics if line["kind"] != "note"]
    found["metrics"] = [{name: v for name, v in line.items() if name not in CIRCUMSTANCES} for line in lines]
    return found


@pytest.mark.parametrize("method", ["mae", "d2mae", "classify"])
def test_an_interrupted_run_equals_one_that_was_not(
    method: str, photos: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM inside step 4, then a crash inside step 6, each followed by --resume: the same bytes, the same metrics."""
    command = commands(photos, teacher)[method]
    assert main(command(tmp_path / "whole")) == 0
    read, count = ImageDataset.__getitem__, 0

    def interrupted(self: ImageDataset, at: tuple[int, int]) -> object:
        nonlocal count
        if self.train and isinstance(at, tuple):
            count += 1
            if count == 3 * 8 + 5:
                os.kill(os.getpid(), signal.SIGTERM)
            if count == 5 * 8 + 5:
                raise RuntimeError("a crash")
        return read(self, at)

    monkeypatch.setattr(ImageDataset, "__getitem__", interrupted)
    assert main(command(tmp_path / "run")) == 143
    with pytest.raises(RuntimeError, match="a crash"):
        main([*command(tmp_path / "run"), "--resume"])
    assert main([*command(tmp_path / "run"), "--resume"]) == 0
    notes = [line["text"] for line in read_run(tmp_path / "run").lines("note")]
    assert notes == 2 * ["resumed after step 4 of 7"]
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_process_that_is_ended_twice(photos: Path, tmp_path: Path) -> None:
    """SIGTERM leaves a checkpoint and code 143, SIGKILL nothing; the same command with --resume comes to the same."""

    def command(out: Path) -> list[str]:
        settings = ("--batch", "4", "--steps", "150", "run.log_steps=1", "run.checkpoint_steps=5")
        return pretrain_arguments(photos, out, *settings)

    run = tmp_path / "run"
    for number, code, more in ((signal.SIGTERM, 143, []), (signal.SIGKILL, -9, ["--resume"])):
        before = len(read_run(run).lines("train")) if more else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "mimlet", *command(run), *more],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        metrics = run / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count('"train"') < before + 8):
            time.sleep(0.005)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == code, said
        if code == 143:
            assert re.search(r"stopped by SIGTERM after step \d+ of 150; saved in .*, continue with --resume", said)
    assert main([*command(run), "--resume"]) == 0
    assert main(command(tmp_path / "whole")) == 0
    assert results(run) == results(tmp_path / "whole")


def test_workers_do_not_change_results(photos: Path, teacher: Path, tmp_path: Path) -> None:
    command = commands(photos, teacher)["d2mae"]
    for workers in ("0", "2"):
        assert main([*command(tmp_path / workers), "--workers", workers]) == 0
    assert results(tmp_path / "0") == results(tmp_path / "2")


@pytest.mark.filterwarnings("ignore:the decoder reads block")
def test_two_processes_equal_one(photos: Path, teacher: Path, tmp_path: Path) -> None:
    """D²-MAE as printed leaves parameters without gradient, for which processes must not wait."""

    def command(out: Path) -> list[str]:
        literal = ("method.decode_layer=1", "method.extra_block=false", "optim.name=sgd", "optim.lr=0.1")
        teaching = ("--recipe", "d2mae_micro32", "--teacher", str(teacher))
        return pretrain_arguments(photos, out, *teaching, *literal, "schedule.warmup=0")

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mimlet"]
    done = subprocess.run(
        [*launch, *command(tmp_path / "two")], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "parameters get no gradient from this method and are left out, for example encoder.blocks.1." in done.stderr
    assert "arning" not in done.stderr
    assert done.stderr.count("24 images in") == 1
    assert main(command(tmp_path / "one")) == 0
    one, two = (load_file(tmp_path / name / "encoder.safetensors") for name in ("one", "two"))
    assert_close(two, one, rtol=1e-5, atol=1e-6)
    ours, theirs = (read_run(tmp_path / name).lines("train")[-1] for name in ("one", "two"))
    assert ours["total"] == pytest.approx(theirs["total"], rel=1e-5)
