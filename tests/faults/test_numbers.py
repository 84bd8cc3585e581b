"""Numbers that are none, and clocks that jump."""

import os
import shutil
from pathlib import Path

import pytest

from mimlet.data.index import list_folder
from mimlet.train.checkpoint import read_checked
from tests.faults.cases import Case, Cases, results


@pytest.mark.parametrize(
    ("fault", "log_steps"), [("nan_batch", 1), pytest.param("nan_loss", 4, marks=pytest.mark.full)]
)
def test_not_a_number(fault: str, log_steps: int, mae: Case, tmp_path: Path) -> None:
    """Training stops with what led there, and no checkpoint has it."""
    case = mae.but(f"run.log_steps={log_steps}")
    out = tmp_path / "run"
    process = case.start(out, fault, 10)
    assert process.wait() == 2, process.said
    assert "not all numbers are finite at step 10 (" in process.said
    assert (out / "nonfinite_step_11.pt").is_file()
    for path in (out / "checkpoints").glob("*.pt"):
        state = read_checked(path)
        assert all(value.isfinite().all() for value in state["method"].values())
    assert "Traceback" not in process.said
    if log_steps == 1:
        case.finish(out)
    else:
        assert case.start(out).wait() == 0
        assert results(out)["encoder.safetensors"] == mae.whole["encoder.safetensors"]


def test_one_of_two_trainings(cases: Cases, tmp_path: Path) -> None:
    """The other one is finished; the same command then catches up."""
    case, out = cases["compare"], tmp_path / "run"
    process = case.start(out, "nan_loss", 10, "MAE")
    assert process.wait() == 2, process.said
    assert "1 of 2 trainings failed, the others are finished: mae_micro32" in process.said
    case.finish(out)


@pytest.mark.parametrize("name", ["mae", pytest.param("loader", marks=pytest.mark.full)])
def test_clocks_that_jump(full: bool, name: str, cases: Cases, tmp_path: Path) -> None:
    """Forth and back by hours: `results` checks that no time is negative."""
    for seed in range(10 if full else 1):
        case, out = cases[name], tmp_path / f"run{seed}"
        process = case.start(out, "clock", seed)
        assert process.wait() == 0, f"seed {seed}: {process.said}"
        assert results(out) == case.whole, f"seed {seed}"


def test_folders_from_the_future(photos: Path, tmp_path: Path) -> None:
    """A list of files is not kept where the times of folders prove nothing: what is added is seen."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for _ in range(2):
        os.utime(root / "ant", (4e9, 4e9))
        assert len(list_folder(str(root))) == 24
        shutil.copy(root / "ant" / "0.jpg", root / "ant" / "new.jpg")
        os.utime(root / "ant", (4e9, 4e9))
        assert len(list_folder(str(root))) == 25
        (root / "ant" / "new.jpg").unlink()
