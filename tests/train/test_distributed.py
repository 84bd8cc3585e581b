import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mimlet.config import SpeedSettings
from mimlet.errors import ConfigError
from mimlet.hardware import computes_in_bf16
from mimlet.methods.base import Clock
from mimlet.run import read_run
from mimlet.train.distributed import (
    compile_encoders,
    gather_objects,
    gather_rows,
    idle_parameters,
    make_fabric,
    resolve_precision,
)
from tests.train.toy import Toy, batches, config, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done what `tests.train.processes` says."""
    out = tmp_path_factory.mktemp("together")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, "-m", "tests.train.processes", out],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return out


def test_two_processes_equal_one(together: Path) -> None:
    """Two processes with two pieces each see what one sees in four pieces."""
    settings = config(speed={"accumulate": 4}, optim={"name": "sgd", "lr": 0.1})
    method, _ = train(settings, Toy(dropout=0, norm=False))
    weights = torch.load(together / "weights.pt", weights_only=True)
    torch.testing.assert_close(weights, method.state_dict(), rtol=1e-5, atol=1e-7)


def test_idle_parameters_are_named_once(together: Path) -> None:
    (note,) = read_run(together / "whole").lines("note")
    text = "2 parameters get no gradient from this method and are left out, for example idle.weight"
    assert (note["text"], note["step"]) == (text, 0)


def test_one_process_stops_both(together: Path) -> None:
    notes = [line["text"] for line in read_run(together / "stopped").lines("note")]
    assert "resumed after step 6 of 16" in notes


def test_a_loss_not_finite_in_one_process_stops_both(together: Path) -> None:
    assert (together / "exploded" / "nonfinite_step_8.pt").exists()
    assert not list((together / "exploded").glob("checkpoints/*.pt"))


def test_unreadable_files_of_every_process_are_listed(together: Path) -> None:
    assert len((together / "unreadable" / "unreadable.txt").read_text().splitlines()) == 12


def test_the_trial_leaves_the_method_alone() -> None:
    method, fabric = Toy(), make_fabric(SpeedSettings(accelerator="cpu", precision="bf16"))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    for part in (method.teacher, method.average):
        part.requires_grad_(False)
    settings = config()
    batch = next(batches(settings)(0, 1)).prepare("cpu", settings.data.augment.mean, settings.data.augment.std)
    assert idle_parameters(method, fabric, batch, Clock(0, 1, 1, 0)) == ["idle.weight", "idle.bias"]
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in method.parameters())


def test_one_process_gathers_without_a_device() -> None:
    fabric = make_fabric(SpeedSettings(accelerator="cpu"))
    assert gather_rows(fabric, [1.0, 2.0]) == [[1.0, 2.0]]
    assert gather_objects(fabric, ["a"]) == [["a"]]


def test_precision() -> None:
    assert resolve_precision("32", "cpu") == "32-true"
    assert resolve_precision("bf16", "cpu") == "bf16-mixed"
    assert resolve_precision("16", "cuda") == "16-mixed"
    assert resolve_precision("auto", "cpu") == ("bf16-mixed" if computes_in_bf16("cpu") else "32-true")
    with pytest.raises(ConfigError, match=r"speed\.precision=16 needs a GPU; use bf16, 32 or auto"):
        resolve_precision("16", "cpu")


@pytest.mark.parametrize(
    ("ema", "expected"),
    [
        ({}, ["encoder"]),
        ({"encoder": "student", "head": "student_head"}, ["encoder", "student"]),
        ({"momentum_encoder": "encoder", "momentum_projector": "projector"}, ["encoder", "momentum_encoder"]),
    ],
)
def test_encoders_are_compiled_with_those_they_follow(
    ema: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = nn.Module()
    names = sorted({"encoder", *ema, *ema.values()})
    for name in names:
        method.add_module(name, nn.Linear(1, 1))
    method.ema = ema  # type: ignore[assignment]
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    compile_encoders(method)  # type: ignore[arg-type]
    assert [name for part in compiled for name in names if getattr(method, name) is part] == expected
