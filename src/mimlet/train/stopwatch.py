"""Time that never runs backwards."""

from __future__ import annotations

from time import perf_counter

_read = _total = 0.0


def stopwatch() -> float:
    """Seconds since some moment. Where the machine's clock jumps back (one that was suspended or moved), this one
    stands still: no duration is negative, and what has been measured stays.
    """
    global _read, _total
    now = perf_counter()
    _total += max(0.0, now - _read)
    _read = now
    return _total
