import atexit
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators.cuda import CUDAAccelerator
from torch import Tensor

from mimlet.config import SpeedSettings, load_config
from mimlet.errors import ConfigError, TryAgain
from mimlet.hardware import computes_in_bf16
from mimlet.methods.base import Clock
from mimlet.run import Line, read_run
from mimlet.train.distributed import (
    PATIENCE,
    gather_objects,
    gather_rows,
    idle_parameters,
    is_sharded,
    make_fabric,
    plain_peer_errors,
    resolve_precision,
)
from tests.train.processes import divided, follow_on
from tests.train.toy import Toy, batches, config, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two and four processes have done what `tests.train.processes` says."""
    out = tmp_path_factory.mktemp("together")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "tests.train.processes", out]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out


def test_a_killed_process_ends_the_other(together: Path) -> None:
    """With exit code 75; what is left is continued bit for bit (`tests.train.processes`)."""
    said = (together / "killed.txt").read_text()
    assert "another process of this training died, or did not answer" in said
    assert "The same command with --resume goes on from the checkpoint of step 7" in said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[Line]]:
    """Weights and losses of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    method = follow_on(out, divided(1))
    return method.state_dict(), read_run(out).lines("train")


@pytest.mark.parametrize("name", ["ddp4", "fsdp4", "fsdp2_fsdp4", "fsdp2_ddp4", "ddp2_fsdp4"])
def test_four_processes_equal_one(
    together: Path, uninterrupted: tuple[dict[str, Tensor], list[Line]], name: str
) -> None:
    """From the start, and continuing what two have begun, divided or not: weights, followers, rates, losses."""
    weights, lines = uninterrupted
    torch.testing.assert_close(torch.load(together / f"{name}.pt", weights_only=True), weights, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(read_run(together / name).lines("train"), lines, strict=True):
        assert mine["lr"] == theirs["lr"]
        assert [mine[key] for key in ("mean", "teacher", "grad_norm")] == pytest.approx(
            [theirs[key] for key in ("mean", "teacher", "grad_norm")], rel=1e-5
        )


@pytest.mark.parametrize("name", ["fsdp2", "ddp2", "fsdp4_stopped", "ddp4_stopped"])
def test_one_process_continues_what_several_began(
    together: Path, uninterrupted: tuple[dict[str, Tensor], list[Line]], name: str, tmp_path: Path
) -> None:
    method = follow_on(shutil.copytree(together / name, tmp_path / name), divided(1))
    assert any(line["text"] == "resumed after step 12 of 16" for line in read_run(tmp_path / name).lines("note"))
    torch.testing.assert_close(method.state_dict(), uninterrupted[0], rtol=1e-5, atol=1e-6)


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


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"} | {
    "RANK": "11",
    "LOCAL_RANK": "3",
    "GROUP_RANK": "1",
}
SLURM = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"} | {
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}


ONE_TASK_EACH = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
"""torchrun started by srun."""


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM, SLURM | TORCHRUN | ONE_TASK_EACH])
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_two_machines_of_eight_gpus(
    environment: dict[str, str], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two nodes with eight processes each, the fourth process of the second: its rank, its GPU, its patience."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Fabric, "launch", lambda fabric: None)
    monkeypatch.setattr(atexit, "register", lambda call: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    monkeypatch.setattr("lightning_fabric.accelerators.cuda.num_cuda_devices", lambda: 8)
    fabric = make_fabric(SpeedSettings(accelerator="cuda", precision="32", strategy=strategy))  # type: ignore[arg-type]
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank) == (16, 11, 3)
    assert fabric.strategy.root_device == torch.device("cuda", 3)
    assert fabric.strategy._timeout == PATIENCE
    assert is_sharded(fabric) is (strategy == "fsdp")


def test_tasks_that_slurm_may_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS", "15")
    with pytest.raises(ConfigError, match=r"15 tasks on 2 nodes.* --nodes=2 --ntasks-per-node=8, equally many"):
        make_fabric(SpeedSettings(accelerator="cpu"))
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ConfigError, match="16 tasks on 2 nodes"):
        make_fabric(SpeedSettings(accelerator="cpu"))


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"8 processes .* need as many GPUs, but each sees 1.*--gpus-per-node"):
        make_fabric(SpeedSettings(accelerator="cuda"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:9"), "closed by peer"),
        (RuntimeError("[/gloo/transport/tcp/buffer.cc:72] Timed out waiting 600000ms for recv"), "Timed out"),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1\nmore"), "NCCL .* on rank 1\\)"),
        (torch.distributed.DistNetworkError("The client socket has timed out"), "timed out"),
    ],
)
def test_errors_about_a_lost_process(error: RuntimeError, said: str) -> None:
    with pytest.raises(TryAgain, match=said), plain_peer_errors():
        raise error
    with pytest.raises(TryAgain, match="goes on from the checkpoint of step 7"), plain_peer_errors(lambda: 7):
        raise error
    with pytest.raises(TryAgain, match="goes on from the start: nothing was saved yet"), plain_peer_errors(lambda: 0):
        raise error


@pytest.mark.parametrize(
    "text", ["mat1 and mat2 shapes", "[/gloo/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"]
)
def test_other_errors_stay_as_they_are(text: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(text)), plain_peer_errors():
        raise RuntimeError(text)


def test_nothing_to_divide(tmp_path: Path) -> None:
    follow_on(tmp_path / "run", divided(1))
    (note,) = read_run(tmp_path / "run").lines("note")
    assert "speed.strategy=fsdp does nothing here: there is one process" in str(note["text"])


@pytest.mark.parametrize("setting", ["compile=graphs", "precision=16"])
def test_what_fsdp_cannot(setting: str) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=rf"speed\.{setting} .*(which fsdp)"):
        load_config({"method": {"name": "mae"}, "speed": {"strategy": "fsdp", name: value}})


def test_precision() -> None:
    assert resolve_precision("32", "cpu") == "32-true"
    assert resolve_precision("bf16", "cpu") == "bf16-mixed"
    assert resolve_precision("16", "cuda") == "16-mixed"
    assert resolve_precision("auto", "cpu") == ("bf16-mixed" if computes_in_bf16("cpu") else "32-true")
    with pytest.raises(ConfigError, match=r"speed\.precision=16 needs a GPU; use bf16, 32 or auto"):
        resolve_precision("16", "cpu")
