"""From images to a judged and exported model, through the command line, with everything that may come between."""

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
from mimlet.data.dataset import Found, ImageDataset, Sample
from mimlet.run import read_run
from tests.data.images import make_folder
from tests.shared import data_folder
from tests.tiny import finetune, finetune_arguments, pretrain, pretrain_arguments

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CIRCUMSTANCES = {"time", "images_per_second", "data_wait", "memory_mb"}


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
    """By method: out -> the command of seven steps, over two epochs, with all that is random or remembered."""
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
    """SIGTERM inside step 4, a crash inside step 6, --resume after each: the same bytes, the same metrics."""
    command = commands(photos, teacher)[method]
    assert main(command(tmp_path / "whole")) == 0
    make, count = ImageDataset.make, 0

    def interrupted(self: ImageDataset, at: tuple[int, int], sample: Callable[[Found], Sample]) -> object:
        nonlocal count
        if self.train:
            count += 1
            if count == 3 * 8 + 5:
                os.kill(os.getpid(), signal.SIGTERM)
            if count == 5 * 8 + 5:
                raise RuntimeError("a crash")
        return make(self, at, sample)

    monkeypatch.setattr(ImageDataset, "make", interrupted)
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
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


def test_changed_settings_are_listed_and_refused_unless_allowed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(photos, tmp_path / "run")
    longer = [*pretrain_arguments(photos, run, "optim.weight_decay=0.1", "--seed", "1"), "--steps", "5", "--resume"]
    before = (run / "encoder.safetensors").read_bytes()
    assert main(longer) == 2
    said = capsys.readouterr().err
    for change in ("optim.weight_decay: 0.05 -> 0.1", "schedule.steps: 3 -> 5", "seed: 0 -> 1"):
        assert f"  {change}\n" in said
    assert "accept the new ones with --allow-changes" in said
    assert (run / "encoder.safetensors").read_bytes() == before
    assert main([*longer, "--allow-changes"]) == 0
    assert read_run(run).lines("train")[-1]["step"] == 5
    assert (run / "encoder.safetensors").read_bytes() != before
    assert main([*longer, "run.log_steps=1", "--workers", "0", "--resume"]) == 0, "run and speed are no changes"


def test_leading_blocks_of_an_encoder(
    photos: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--keep-blocks 2 of 3: with a step that changes nothing, these come out as they were, and the third does not."""
    still = ("--steps", "1", "optim.lr=1e-30", "optim.weight_decay=0", "schedule.warmup=0")
    start = ("--encoder", str(teacher), "--keep-blocks", "2", "encoder.depth=3")
    run = pretrain(photos, tmp_path / "run", *start, *still)
    before, after = (load_file(path / "encoder.safetensors") for path in (teacher, run))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "patch_embed.proj.weight" in same
    assert all(name in same for name in before if name.startswith(("blocks.0.", "blocks.1.")))
    assert "blocks.2.attn.qkv.weight" not in same
    said = capsys.readouterr().err
    assert f"tensors loaded from {teacher / 'encoder.safetensors'}" in said
    assert "  20 tensors of the decoder not used\n" in said
    assert "and 11 more (only the first 2 blocks are used)\n" in said
    (told,) = json.loads((run / "loaded.json").read_text())
    assert set(told["loaded"]) == {name for name in before if not name.startswith(("blocks.2.", "norm."))}
    assert told["fresh"]["blocks.2.attn.qkv.weight"] == "only the first 2 blocks are used"


def test_subsets(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{name}/{k}.jpg\n" for name in ("ant", "bee", "cat") for k in range(3)))
    for subset, used in (("50%", 12), ("3", 9), ("lt", 10), (str(tmp_path / "list.txt"), 9)):
        finetune(photos, tmp_path / f"{used}{subset[:2]}", "--subset", subset, "--batch", "2", "--steps", "1")
        assert f"{used} of them used (subset {subset})" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_classifier_teaches_labels(kind: str, photos: Path, classifier: Path, tmp_path: Path) -> None:
    distill = ("--teacher", str(classifier), f"method.distill.kind={kind}")
    run = finetune(photos, tmp_path / "run", *distill)
    losses = read_run(run).lines("train")[-1]
    assert losses["total"] == pytest.approx(0.5 * losses["classification"] + 0.5 * losses["distillation"], rel=1e-6)
    model = mimlet.load(run)
    assert model.head.head_dist is not None
    assert main(["evaluate", str(run), "--data", str(photos), "--out", str(tmp_path / "judged")]) == 0


def test_a_classifier_is_a_start_and_a_teacher(
    photos: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(photos, tmp_path / "again", "--encoder", str(classifier))
    assert "tensors of the head not used" in capsys.readouterr().err
    teaching = ("--recipe", "d2mae_micro32", "--teacher", str(classifier), "method.decode_layer=1")
    run = pretrain(photos, tmp_path / "student", *teaching)
    assert read_run(run).lines("train")[-1]["attention"] > 0


def test_evaluation(photos: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Top-1 as logged in training; a row per class; unreadable images are left out."""
    out = tmp_path / "judged"
    assert main(["evaluate", str(classifier), "--data", str(photos), "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "per_class.csv").read_text().splitlines()))
    assert [(row["class"], row["images"]) for row in rows] == [("ant", "8"), ("bee", "8"), ("cat", "8")]
    top1 = sum(float(row["top1"]) for row in rows) / 3
    assert top1 == pytest.approx(read_run(classifier).lines("eval")[-1]["top1"], abs=0.01)
    assert f"{top1:.2f}" in capsys.readouterr().out
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")

    damaged = make_folder(tmp_path / "damaged", each=8)
    (damaged / "ant" / "0.jpg").write_bytes(b"")
    assert main(["evaluate", str(classifier), "--data", str(damaged), "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "per_class.csv").read_text().splitlines()))
    assert [row["images"] for row in rows] == ["7", "8", "8"]
    assert "24 images in" in (said := capsys.readouterr().out)
    assert "(3 classes); 1 of them could not be read, left out\n" in said
    finetune(damaged, tmp_path / "trained", "schedule.eval_epochs=1", "--steps", "6", "data.max_unreadable=0.5")
    assert capsys.readouterr().err.count("1 of them could not be read, left out") == 1


@pytest.mark.parametrize("kind", ["quick", "knn", "linear"])
def test_probes(kind: str, photos: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ["--data", str(photos), "--eval", str(photos), "--out", str(tmp_path / "probe")]
    more = ["schedule.epochs=2", "schedule.warmup_epochs=1", "speed.workers=0"] if kind == "linear" else []
    assert main(["probe", str(teacher), "--kind", kind, *images, *more]) == 0
    said = capsys.readouterr()
    if kind == "linear":
        assert "top1" in said.err
        assert read_run(tmp_path / "probe").config.encoder.weights == str(teacher)
    else:
        (row,) = csv.DictReader((tmp_path / "probe" / f"probe_{kind}.csv").read_text().splitlines())
        assert (row["probe"], row["train"], row["test"]) == (kind, "24", "24")
        assert f"{float(row['top1']):.2f}" in said.out


def test_a_sweep_prints_a_table_and_repeats_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    text = recipe_paths()["classify_micro32"].read_text()
    recipe.write_text(text + '\n[sweep]\n"optim.lr" = [1e-3, 1e-2]\n"optim.layer_decay" = [0.5, 1.0]\n')
    command = [*finetune_arguments(photos, tmp_path / "sweep", "--recipe", str(recipe)), "--sweep"]
    assert main(command) == 0
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
    assert {(row["optim.lr"], row["optim.layer_decay"]) for row in rows} == {
        ("0.001", "0.5"),
        ("0.001", "1.0"),
        ("0.01", "0.5"),
        ("0.01", "1.0"),
    }
    top1 = [float(row["top1"]) for row in rows]
    assert top1 == sorted(top1, reverse=True)
    assert "optim.layer_decay" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/encoder.safetensors")}
    assert len(made) == 4
    lost = next(iter(made))
    lost.unlink()
    assert main(command) == 0
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/encoder.safetensors")}
    assert {path for path in made if again[path] != made[path]} == {lost}
    assert list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines())) == rows


@pytest.mark.parametrize(("photos_of", "count"), [("clothing10/test.tar", "372"), ("cifar10/test.parquet", "10,000")])
def test_real_images(photos_of: str, count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Archives and parquet files as they are: pre-training, then fine-tuning on some of the labels."""
    folder, _, name = photos_of.partition("/")
    data = data_folder(folder) / name
    run = pretrain(data, tmp_path / "encoder", "--steps", "2", "run.report=true")
    assert f"{count} images in {data}" in capsys.readouterr().err
    assert (run / "reconstruction.png").is_file()
    assert "<img" in (run / "report.html").read_text()
    few = ("data.eval=[]", "--subset", "2", "--encoder", str(run))
    tuned = finetune(data, tmp_path / "classifier", *few)
    assert f"{count} images in {data} (10 classes); 20 of them used (subset 2)" in capsys.readouterr().err
    assert len(json.loads((tuned / "encoder.json").read_text())["classes"]) == 10
