"""Every method under two processes equals the one-process run, whether or not parts of it get no gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimlet.cli import main as cli
from mimlet.methods.settings import METHODS
from mimlet.run import LINE_KEYS, read_pictures, read_run
from tests.data.images import make_folder
from tests.tiny import SPEED, finetune, pretrain
from tests.train.side_by_side import FINETUNE, PRETRAIN, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`: what one and two processes made of the same images and teachers."""
    folder = tmp_path_factory.mktemp("side_by_side")
    data = make_folder(folder / "images", each=8)
    pretrain(data, folder / "encoder", "encoder.dim=32", "encoder.heads=4", "method.decoder.depth=2")
    finetune(data, folder / "labels")
    tokenizer = ["--recipe", "dvae_micro32", "--data", str(data), "--out", str(folder / "tokenizer"), "--steps", "3"]
    sizes = ["encoder.image_size=16", "method.codes=16", "method.hidden=8"]
    assert cli(["pretrain", *tokenizer, "--batch", "8", "--workers", "0", *sizes, *SPEED]) == 0
    with pytest.warns(UserWarning, match="the decoder reads block 1"):
        main(data, folder, folder / "one", pieces=2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, "-m", "tests.train.side_by_side", data, folder, folder / "two"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "find_unused_parameters" not in result.stderr
    return folder


def test_every_method_takes_part() -> None:
    assert {method["name"] for method in (*PRETRAIN.values(), *FINETUNE.values())} == METHODS.keys() - {
        "linear_probe",
        "dvae",  # its noise is every process's own
    }


@pytest.mark.parametrize("name", PRETRAIN)
def test_two_processes_see_the_same_meanwhile(folder: Path, name: str) -> None:
    one, two = (read_run(folder / kind / name).lines("eval") for kind in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 4]
    assert one[0]["knn_top1"] == two[0]["knn_top1"]
    ours, theirs = (read_pictures(folder / kind / name) for kind in ("one", "two"))
    assert list(ours) == list(theirs)
    for picture in ("original", "visible", "step 0"):
        assert ours.get(picture) == theirs.get(picture)
    assert bool(ours) is (name not in ("tinymim", "average", "learned_map", "g2sd", "maskfeat_teacher"))


@pytest.mark.parametrize("name", [*PRETRAIN, *FINETUNE])
def test_two_processes_equal_one(folder: Path, name: str) -> None:
    one, two = (load_file(folder / kind / name / "encoder.safetensors") for kind in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    start = (read_run(folder / kind / name).lines("train") for kind in ("one", "two"))
    for a, b in zip(*start, strict=True):
        losses = a.keys() - {"images_per_second", "data_wait", "memory_mb", *LINE_KEYS}
        assert losses >= {"total", "lr"}
        for key in losses:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
