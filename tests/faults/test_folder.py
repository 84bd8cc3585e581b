"""Run folders that two processes want, or whose small files are damaged."""

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.faults.cases import Case, Cases


@pytest.fixture(scope="module")
def stopped(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all there is, killed in its tenth step."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert cases["mae"].but("run.tensorboard=true").start(out, "at_step", 9, "die").wait() == -9
    return out


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_two_at_once(full: bool, mae: Case, stopped: Path, tmp_path: Path) -> None:
    """Exactly one goes on, and comes to what it would have come to alone."""
    for seed in range(10 if full else 1):
        out = Path(shutil.copytree(stopped, tmp_path / f"run{seed}"))
        shutil.rmtree(out / "tensorboard")
        first = mae.start(out, "slow", 0.05)
        time.sleep(random.Random(seed).choice((0, 0, 0.1, 0.3)))
        second = mae.start(out, "slow", 0.05, log="second.log")
        codes = {process: process.wait() for process in (first, second)}
        assert sorted(codes.values()) == [0, 75], f"seed {seed}: {first.said}\n{second.said}"
        (winner,) = (process for process, code in codes.items() if code == 0)
        (loser,) = codes.keys() - {winner}
        assert f"{out} is in use by process {winner.pid}" in loser.said
        mae.finish(out)


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 9, "epo', *(pytest.param(tail, marks=pytest.mark.full) for tail in (bytes(300), b"\xff\0", b""))],
)
def test_metrics_that_end_in_half_a_line(tail: bytes, mae: Case, run: Path) -> None:
    """What a kill in the middle of an append leaves, or a power failure; a damaged checkpoint is noted behind it."""
    shutil.rmtree(run / "tensorboard")
    for file in ("metrics.jsonl", "unreadable.txt"):
        with (run / file).open("ab") as stream:
            stream.write(tail)
    newest = max((run / "checkpoints").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert "is damaged" in mae.finish(run).said
    assert (run / "unreadable.txt").read_bytes() == b""


def test_metrics_that_are_damaged_before_their_end(mae: Case, run: Path) -> None:
    """What was logged is not thrown away without a word."""
    shutil.rmtree(run / "tensorboard")
    metrics = run / "metrics.jsonl"
    kept = metrics.read_bytes()
    first, _, rest = kept.partition(b"\n")
    metrics.write_bytes(first + b"\n" + b"\0\0\n" + rest)
    process = mae.start(run)
    assert process.wait() == 2
    assert f"{metrics} is damaged: line 2" in process.said
    assert "remove that line to go on" in process.said
    metrics.write_bytes(kept)
    mae.finish(run)


@pytest.mark.parametrize(
    "name",
    ["config.json", *(pytest.param(name, marks=pytest.mark.full) for name in ("environment.json", "pictures.json"))],
)
def test_small_files_that_are_cut_short(name: str, mae: Case, run: Path) -> None:
    """It is said which, and what to do about it."""
    shutil.rmtree(run / "tensorboard")
    file = run / name
    file.write_bytes(file.read_bytes()[:40])
    process = mae.start(run)
    assert process.wait() == 2, process.said
    assert str(file) in process.said
    assert "Traceback" not in process.said
    assert "remove it" in process.said
    file.unlink()
    mae.finish(run)


def test_pictures_that_are_half_written(mae: Case, run: Path) -> None:
    """Under a temporary name, as a kill leaves them; or damaged, and then made again."""
    shutil.rmtree(run / "tensorboard")
    moment = run / "pictures" / "00000000.png"
    for folder in (run, run / "pictures", run / "checkpoints"):
        (folder / ".00000008.png.12345.tmp").write_bytes(moment.read_bytes()[:100])
    mae.finish(run)


@pytest.mark.full
def test_tensorboard_that_is_gone(mae: Case, run: Path) -> None:
    """It is begun anew, with what comes from then on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case = mae.but("run.tensorboard=true")
    shutil.rmtree(run / "tensorboard")
    assert case.start(run).wait() == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/total")] == list(range(10, 25))
    shutil.rmtree(run / "tensorboard")
    mae.finish(run)
