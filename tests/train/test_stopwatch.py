import pytest

from mimlet.train import stopwatch as module
from mimlet.train.stopwatch import stopwatch


def test_time_stands_still_where_the_clock_jumps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.5, 40.0, 40.5, 36_040.5])
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "_read", 0.0)
    monkeypatch.setattr(module, "_total", 0.0)
    began = stopwatch()
    assert [stopwatch() - began for _ in range(4)] == [1.5, 1.5, 2.0, 36_002.0]
