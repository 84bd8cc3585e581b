"""Checkpoints that are whole or absent.

`step_00001234.pt` is what training needs to continue after 1234 steps; `step_00001234.pt.sha256` is its digest, in the
format of `sha256sum -c`. The digest is written first and both are renamed into place, so a kill at any byte leaves
either a checkpoint that matches its digest or something that does not count. A digest is needed because nothing
verifies a zip's own sums when torch reads it.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mimlet.atomic import write_atomic
from mimlet.errors import RunError
from mimlet.untrusted import check_inflation, read_regular, torchs_reason

State = dict[str, Any]
"""Nested dictionaries of tensors, numbers and strings: what `torch.load(weights_only=True)` accepts."""


class Checkpoints:
    """The checkpoints in one folder, of which the `keep` newest stay. `say` gets a sentence when a damaged one is
    passed over.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.keep, self.say = folder, keep, say

    def steps(self) -> list[int]:
        """The steps there are files for, whole or not, ascending."""
        names = (re.fullmatch(r"step_(\d+)\.pt", path.name) for path in self.folder.glob("step_*.pt"))
        return sorted(int(name[1]) for name in names if name)

    def save(self, step: int, state: State) -> None:
        """Writes the state after `step` steps, then removes the oldest, and what lies after `step`: it belongs to a
        future given up.

        `RunError` when the disk refuses; earlier checkpoints are then untouched.
        """
        write_checked(self.path(step), state)
        for other in set(self.steps()) - set([s for s in self.steps() if s <= step][-self.keep :]):
            self.path(other).unlink(missing_ok=True)
        for digest in self.folder.glob("step_*.pt.sha256"):
            if not digest.with_suffix("").exists():
                digest.unlink(missing_ok=True)

    def latest(self) -> tuple[int, State] | None:
        """(step, state) of the newest whole checkpoint, on the CPU; None where there is no file at all.

        Damaged ones are passed over, newest first; `RunError` when none is whole.
        """
        damage = []
        for step in reversed(self.steps()):
            try:
                state = read_checked(self.path(step))
            except RunError as error:
                damage.append(str(error))
                continue
            if damage:
                self.say(f"{'; '.join(damage)}. Continuing from the one before, step {step}.")
            return step, state
        if damage:
            raise RunError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(damage)}. Start again with another --out"
            )
        return None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step_{step:08d}.pt"


def write_checked(path: Path, state: State) -> None:
    """Writes a state and its digest, each atomically. `RunError` when the disk refuses."""
    data = to_bytes(state)
    write_atomic(_digest_path(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    write_atomic(path, data)


def read_checked(path: Path) -> State:
    """A state, on the CPU. `RunError` when the file is absent, unreadable, or not what its digest says."""
    try:
        data = read_regular(path, sys.maxsize)
        digest = read_regular(_digest_path(path)).decode().split()[:1]
    except FileNotFoundError as error:
        raise RunError(f"checkpoint {path.name} is damaged: {Path(error.filename).name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"checkpoint {path.name} cannot be read: {error}") from None
    if [hashlib.sha256(data).hexdigest()] != digest:
        raise RunError(f"checkpoint {path.name} is damaged: its {len(data):,} bytes do not match its SHA-256")
    try:
        check_inflation(io.BytesIO(data), len(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises nearly every type; nothing of it has been run
        reason = torchs_reason(error) or "it holds more than tensors, numbers and texts"
        raise RunError(f"checkpoint {path.name} is none of ours, and reading it was refused: {reason}") from None
    if not isinstance(state, dict):
        raise RunError(f"checkpoint {path.name} is none of ours: it holds {type(state).__name__}, not a state")
    return state


@contextmanager
def fitting() -> Iterator[None]:
    """What a whole checkpoint with other contents than ours leads to, as a `RunError`."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"the checkpoint does not hold what a training needs ({type(error).__name__}: {error}); "
            "start again with another --out"
        ) from error


def to_bytes(state: State) -> bytes:
    """A state as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
