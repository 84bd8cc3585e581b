import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from mimlet.errors import RunError, TryAgain
from mimlet.train.checkpoint import Checkpoints, State, read_checked, write_checked


def state(step: int) -> State:
    return {"step": step, "method": {"weight": torch.full((50,), float(step))}, "scaler": {}}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    said: list[str] = []
    made = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    made.said = said  # type: ignore[attr-defined]
    for step in (10, 20):
        made.save(step, state(step))
    return made


def test_state_comes_back(checkpoints: Checkpoints) -> None:
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 20
    torch.testing.assert_close(found[1], state(20), rtol=0, atol=0)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=1).latest() is None


def test_the_digest_is_what_sha256sum_checks(checkpoints: Checkpoints) -> None:
    path = checkpoints.path(20)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name("step_00000020.pt.sha256").read_text() == f"{digest}  step_00000020.pt\n"


def test_the_newest_are_kept_and_digests_go_with_them(checkpoints: Checkpoints) -> None:
    checkpoints.save(30, state(30))
    assert checkpoints.steps() == [20, 30]
    names = {"step_00000020.pt", "step_00000020.pt.sha256", "step_00000030.pt", "step_00000030.pt.sha256"}
    assert {path.name for path in checkpoints.folder.iterdir()} == names


def test_a_future_given_up_is_removed(checkpoints: Checkpoints) -> None:
    checkpoints.save(15, state(15))
    assert checkpoints.steps() == [10, 15]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "flipped": (flip_bit, "do not match its SHA-256"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 7), "do not match its SHA-256"),
    "empty": (lambda path: os.truncate(path, 0), "its 0 bytes do not match"),
    "no digest": (lambda path: path.with_name(path.name + ".sha256").unlink(), "step_00000020.pt.sha256 is missing"),
    "empty digest": (lambda path: os.truncate(path.with_name(path.name + ".sha256"), 0), "do not match"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_newest_falls_back_and_says_so(checkpoints: Checkpoints, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(checkpoints.path(20))
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 10
    (text,) = checkpoints.said  # type: ignore[attr-defined]
    assert "checkpoint step_00000020.pt is damaged" in text
    assert message in text
    assert text.endswith("Continuing from the one before, step 10.")


def test_all_damaged_is_an_error(checkpoints: Checkpoints) -> None:
    for step in (10, 20):
        flip_bit(checkpoints.path(step))
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole: .*00000020.*00000010"):
        checkpoints.latest()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "words", "kind"),
    [
        (errno.ENOSPC, "No space left on device", TryAgain),
        (errno.EROFS, "Read-only file system", TryAgain),
        (errno.ESTALE, "Stale file handle", TryAgain),
        (errno.EACCES, "Permission denied", RunError),
    ],
)
def test_a_disk_that_refuses_leaves_earlier_checkpoints(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    words: str,
    kind: type[RunError],
) -> None:
    """A missing right is the user's to mend; a disk that is full, failing or away may be well again."""
    before = {path: path.read_bytes() for path in checkpoints.folder.iterdir()}

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(RunError, match=f"cannot write .*step_00000030.*{words}") as error:
        checkpoints.save(30, state(30))
    assert error.type is kind
    assert {path: path.read_bytes() for path in checkpoints.folder.iterdir()} == before


def test_a_disk_that_fills_between_digest_and_checkpoint(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, iter(range(9))

    def refuse_second(number: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    monkeypatch.setattr(os, "fsync", refuse_second)
    with pytest.raises(RunError, match=r"step_00000030\.pt .*No space left"):
        checkpoints.save(30, state(30))
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 20
    checkpoints.save(25, state(25))
    assert not list(checkpoints.folder.glob("*30*"))


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunError, match=r"cannot write .*checkpoints.*: File exists"):
        Checkpoints(tmp_path / "checkpoints", keep=1).save(1, state(1))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    write_checked(tmp_path / "evil.pt", {"method": os.system})
    with pytest.raises(RunError, match="refused: it holds more than tensors, numbers and texts"):
        read_checked(tmp_path / "evil.pt")
