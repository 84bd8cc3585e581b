"""Images that vanish, and the processes that load them."""

import random
from pathlib import Path

import pytest

from tests.faults.cases import STEPS, Case, Cases


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("loader", 7),
        ("classify", 5),
        pytest.param("mae", 7, marks=pytest.mark.full),
        pytest.param("mae", 5, marks=pytest.mark.full),
    ],
)
def test_a_folder_that_vanishes(name: str, step: int, cases: Cases, photos: Path, tmp_path: Path) -> None:
    """As a share does that is unmounted, and comes back; step 5 is the last before an evaluation."""
    out, away = tmp_path / "run", tmp_path / "away"
    process = cases[name].start(out, "at_step", step, "move", photos, away)
    try:
        assert process.wait() == 75, process.said
        assert "100 images in a row cannot be read" in process.said
        assert "No such file or directory" in process.said
    finally:
        away.rename(photos)
    cases[name].finish(out)


def test_a_file_that_vanishes(mae: Case, photos: Path, tmp_path: Path) -> None:
    """More than data.max_unreadable allows: no checkpoint has seen the image that took its place."""
    out, lost = tmp_path / "run", photos / "bee" / "3.jpg"
    kept = lost.read_bytes()
    process = mae.start(out, "at_step", 7, "unlink", lost)
    try:
        assert process.wait() == 2, process.said
        assert f"For example bee/3.jpg: No such file or directory; all are listed in {out}" in process.said
    finally:
        lost.write_bytes(kept)
    mae.finish(out)


def test_a_loader_process_that_is_killed(full: bool, cases: Cases, tmp_path: Path) -> None:
    """As by the kernel, when memory runs out."""
    case = cases["loader"]
    for seed in range(10 if full else 1):
        draw, out = random.Random(seed), tmp_path / f"run{seed}"
        step, number = draw.randrange(STEPS - 4), draw.randrange(2)
        process = case.start(out, "at_step", step, "kill worker", number)
        assert process.wait() == 75, f"seed {seed}, step {step}: {process.said}"
        assert "a data loading process died, most often because memory" in process.said
        assert "Traceback" not in process.said
        case.finish(out)
