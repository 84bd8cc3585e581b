"""Disks that are full, turn read-only or vanish under a training."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import Case, Cases

FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "mimlet", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full(full: bool, cases: Cases, tmp_path: Path) -> None:
    """The disk refuses at a random byte, and cuts that write short; later there is room again."""
    for seed in range(40 if full else 2):
        draw = random.Random(seed)
        case, out = cases[draw.choice(("mae", "classify", "compare"))], tmp_path / f"run{seed}"
        room = draw.choice((draw.randrange(5_000), draw.randrange(5_000_000)))
        process = case.start(out, "full", room, out)
        code = process.wait()
        try:
            assert code == 75, f"{code}: {process.said}"
            assert FULL in process.said
            assert "Traceback" not in process.said
            case.finish(out)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, room for {room:,} bytes: {error}") from error
        shutil.rmtree(out)


def test_a_small_file_system(full: bool, cases: Cases, mae: Case, disk: Path) -> None:
    """The same with a real disk: a run beside a file that leaves it a random room."""
    ballast, out = disk / "ballast", disk / "run"
    needed = sum(path.stat().st_size for path in (cases.folder / "mae").rglob("*"))
    for seed in range(10 if full else 1):
        space = os.statvfs(disk)
        ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - random.Random(seed).randrange(needed)))
        process = mae.start(out)
        assert process.wait() == 75, f"seed {seed}: {process.said}"
        assert FULL in process.said, f"seed {seed}: {process.said}"
        ballast.unlink()
        mae.finish(out)
        shutil.rmtree(out)


def test_turned_read_only(mae: Case, disk: Path) -> None:
    """As a file system does after an error."""
    out = disk / "run"
    process = mae.start(out, "at_step", 9, "mount read-only", out)
    try:
        assert process.wait() == 75, process.said
        assert "Read-only file system" in process.said
        assert mae.start(out).wait() == 75, "as long as it lasts"
    finally:
        subprocess.run(["umount", out], check=True)
    mae.finish(out)


@pytest.mark.parametrize("log_steps", [5, pytest.param(1, marks=pytest.mark.full)])
def test_moved_or_removed(log_steps: int, mae: Case, tmp_path: Path) -> None:
    """A run folder that is gone is not made again by the next checkpoint: that would be half of one."""
    case, out, away = mae.but(f"run.log_steps={log_steps}"), tmp_path / "run", tmp_path / "away"
    for action, *where in (("move", out, away), ("remove", out)):
        process = case.start(out, "at_step", 11, action, *where)
        assert process.wait() == 75, process.said
        assert f"{out} was moved, removed or unmounted while it was trained into" in process.said
        assert not out.exists()
        if away.exists():
            away.rename(out)
    mae.finish(out)
