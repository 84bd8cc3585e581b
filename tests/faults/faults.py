"""What is broken on purpose inside a process, before its command begins. Names and arguments come from the tests."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from mimlet.train.distributed import Piece, Step


def die(event: int, folder: str) -> None:
    """SIGKILL at the so-many-th thing that is done to the files of a folder; 0: never, but `events` is written
    beside the folder with a line for each.

    These are, before they happen: opening for writing, making a folder, renaming, removing; after they have happened:
    flushing to disk.
    """
    seen = 0

    def happened(what: str) -> None:
        nonlocal seen
        seen += 1
        if not event:
            with open(f"{folder}.events", "a") as file:
                file.write(f"{what}\n")
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, given: tuple[Any, ...]) -> None:
        if name not in ("open", "os.mkdir", "os.rename", "os.remove") or not isinstance(given[0], str):
            return
        if given[0].startswith(f"{folder}/") and (name != "open" or given[2] & (os.O_WRONLY | os.O_RDWR)):
            happened(f"{name} {given[0].removeprefix(folder)}")

    def fsync(number: int, really: Callable[[int], None] = os.fsync) -> None:
        really(number)
        happened(f"os.fsync {os.readlink(f'/proc/self/fd/{number}').removeprefix(folder)}")

    sys.addaudithook(audit)
    os.fsync = fsync  # type: ignore[assignment]


def at_step(step: int, action: str, *values: Any) -> None:
    """One of the actions below, when a step's first piece is about to be computed."""
    done = False

    def act(piece: Piece) -> None:
        nonlocal done
        if piece.clock.step == step and not done:
            done = True
            ACTIONS[action](*values)

    _before_pieces(act)


def slow(seconds: float) -> None:
    """Every piece of a step takes so much longer."""
    _before_pieces(lambda piece: time.sleep(seconds))


def nan_batch(step: int) -> None:
    """One pixel of a step's batch is not a number."""

    def spoil(piece: Piece) -> None:
        if piece.clock.step == step:
            piece.batch.views["image"][0, 0, 0, 0] = torch.nan

    _before_pieces(spoil)


def nan_loss(step: int, method: str = "") -> None:
    """A step's losses are infinite, and so its gradients are not numbers. `method`: only those of this class."""
    forward = Step.forward

    def spoiled(self: Step, piece: Piece) -> dict[str, torch.Tensor]:
        losses, hit = forward(self, piece), piece.clock.step == step and type(self.method).__name__.startswith(method)
        return {name: loss * torch.inf for name, loss in losses.items()} if hit else losses

    Step.forward = spoiled  # type: ignore[method-assign]


def full(room: int, folder: str) -> None:
    """A disk with room for so many more bytes in the files of a folder. A write that does not fit is cut short."""
    really = Path.open

    class Short:
        """A file on such a disk."""

        def __init__(self, file: IO[Any]) -> None:
            self.file = file

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> None:
            nonlocal room
            fits, room = data[: max(0, room)], room - len(data)
            self.file.write(fits)
            self.file.flush()
            if room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_short(self: Path, mode: str = "r", *more: Any, **others: Any) -> Any:
        file = really(self, mode, *more, **others)
        return Short(file) if mode != "r" and str(self).startswith(folder) else file

    Path.open = open_short  # type: ignore[method-assign, assignment]


def clock(seed: int) -> None:
    """Every clock that mimlet reads jumps by up to ten hours, now and then, forth and back; the time of day for all."""
    draw = random.Random(seed)
    for name in ("perf_counter", "time", "time_ns"):
        really = getattr(time, name)
        unit = 10**9 if name.endswith("_ns") else 1
        offset = 0

        def jumpy(really: Callable[[], Any] = really, unit: int = unit) -> Any:
            nonlocal offset
            if draw.random() < 0.3:
                offset = draw.choice((0, draw.randrange(-36_000, 36_000)))
            return really() + offset * unit

        modules = [module for key, module in sys.modules.items() if key.startswith("mimlet")]
        for module in modules if name == "perf_counter" else [time, *modules]:
            if getattr(module, name, None) is really:
                setattr(module, name, jumpy)


def _before_pieces(act: Callable[[Piece], None]) -> None:
    forward = Step.forward

    def hooked(self: Step, piece: Piece) -> dict[str, torch.Tensor]:
        act(piece)
        return forward(self, piece)

    Step.forward = hooked  # type: ignore[method-assign]


def _kill_worker(number: int) -> None:
    """A loader process, which need not be the one that is waited for."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[number]), signal.SIGKILL)


def _mount_read_only(folder: str) -> None:
    """The folder once more, over itself: what is opened from now on cannot be written."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


ACTIONS: dict[str, Callable[..., Any]] = {
    "move": os.rename,
    "remove": shutil.rmtree,
    "unlink": os.unlink,
    "kill worker": _kill_worker,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "mount read-only": _mount_read_only,
}
