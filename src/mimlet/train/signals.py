"""Signals that ask a training to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import FrameType

SAME_REQUEST = 1.0
"""Seconds within which a second signal is the same request: a terminal and a launcher may both deliver it."""


@dataclass
class Stop:
    """The exit code a signal asks for, 0 for none."""

    code: int = 0


@contextmanager
def answered_signals(shown: bool) -> Iterator[Stop]:
    """SIGTERM and SIGINT ask the loop to stop; a second one, a second later, ends the process at once.

    Loader processes inherit the handlers: they leave SIGINT, which a terminal sends to everybody, to the main process.
    """
    stop, owner, first = Stop(), os.getpid(), 0.0

    def answer(number: int, frame: FrameType | None) -> None:
        nonlocal first
        ours = os.getpid() == owner
        if (ours and stop.code and perf_counter() - first > SAME_REQUEST) or (not ours and number == signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif ours and not stop.code:
            stop.code, first = 128 + number, perf_counter()
            if shown:  # os.write, because a handler may interrupt a print
                os.write(2, f"{signal.Signals(number).name}: saving after this step; again to quit at once\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, answer) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
