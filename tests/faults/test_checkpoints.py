"""Checkpoints that the disk has damaged: the one before is taken, or it is said that there is none."""

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.cases import Case, Cases

STEP = 15


@pytest.fixture(scope="module")
def stopped(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its 16th step."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert cases["mae"].start(out, "at_step", STEP, "die").wait() == -9
    assert [path.name for path in sorted((out / "checkpoints").glob("step*"))] == [
        f"step_{step:08d}.pt{ending}" for step in (STEP - 1, STEP) for ending in ("", ".sha256")
    ]
    return out


def damage(path: Path, draw: random.Random) -> str:
    """Cuts a file short, flips a bit of it, fills a part with zeros or removes it, at random; says what."""
    data = bytearray(path.read_bytes())
    where, kind = draw.randrange(len(data)), draw.choice(("cut at", "bit flipped at", "zeros from", "removed,"))
    if kind == "removed,":
        path.unlink()
        return f"{path.name} removed"
    if kind == "cut at":
        del data[where:]
    elif kind == "zeros from":
        data[where : where + 512] = bytes(len(data[where : where + 512]))
    else:
        data[where] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"{path.name} {kind} byte {where}"


def test_the_newest_is_damaged(full: bool, mae: Case, stopped: Path, tmp_path: Path) -> None:
    """The file, its digest or both, anywhere. (Digests name their file after the sum, for `sha256sum -c`.)"""
    for seed in range(40 if full else 2):
        draw, out = random.Random(seed), tmp_path / f"run{seed}"
        shutil.copytree(stopped, out)
        newest = out / "checkpoints" / f"step_{STEP:08d}.pt"
        digest = newest.with_name(f"{newest.name}.sha256")
        what = [damage(path, draw) for path in ((newest,), (digest,), (newest, digest))[seed % 3]]
        try:
            said = mae.finish(out).said
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {what}: {error}") from error
        before = f"Continuing from the one before, step {STEP - 1}.\n" in said
        assert before or f"resumed after step {STEP} of" in said or not newest.exists(), what
        shutil.rmtree(out)


def test_all_are_damaged(mae: Case, stopped: Path, tmp_path: Path) -> None:
    """Starting anew without a word would be worse than stopping."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    for path in (out / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    process = mae.start(out)
    assert process.wait() == 2
    assert f"no checkpoint in {out / 'checkpoints'} is whole: " in process.said
    assert "Start again with another --out" in process.said
    assert mae.start(out).wait() == 2
