"""`run.profile`: where the time of a training step goes.

A few early steps are traced by `torch.profiler`. Beside its operators stand the phases of a step, which it cannot
tell on a GPU: they are measured there by events in the device's queue, so that nothing waits and what overlaps stays
so. Waiting for data then means that the device had nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mimlet.atomic import write_atomic
from mimlet.tables import write_csv

WARM = 5
"""Steps of a training, or of its continuation, before those that are traced."""
STEPS = 3
"""Steps traced. One before them warms the profiler up."""
SHOWN = 25
"""Operators in the table."""

WAIT, MOVE, TEACHER = "waiting for data", "to the device", "teacher forward"
STUDENT, BACKWARD, UPDATE, FOLLOW = "student forward, losses", "backward", "optimiser", "moving averages"
REST = "the rest"
PHASES = (WAIT, MOVE, TEACHER, STUDENT, BACKWARD, UPDATE, FOLLOW)
"""Of a step, in order. The teacher is inside the student's forward, and not counted there."""

Row = dict[str, str | float]
Moment = Any
"""Seconds, or an event in the queue of a GPU."""
Span = tuple[Moment, Moment]


class Profile:
    """Traces the steps of one training into `folder`; without one it does nothing. `first`: the step that warms the
    profiler up, the next `STEPS` are traced. `begin` and `end` are asked around every step, `phase` inside.
    """

    def __init__(self, folder: Path | None, device: torch.device, first: int = 0) -> None:
        self.folder, self.device, self.first = folder, device, first
        self.profiler: Any = None
        self.spans: dict[str, list[Span]] = {name: [] for name in PHASES}
        self.steps: list[Span] = []
        self.traced = 0
        self.hooks = ExitStack()

    def begin(self, step: int, frozen: list[nn.Module]) -> None:
        """Before step number `step`; `frozen`: the teachers of the method."""
        if self.folder is None:
            return
        if step == self.first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            plan = schedule(wait=0, warmup=1, active=STEPS, repeat=1)
            self.profiler = profile(activities=activities, schedule=plan, acc_events=True)
            self.profiler.start()
            for part in frozen:
                self._watch(part)
        if self.profiler is not None:
            self.began = self._now()

    def end(self, last: bool) -> list[Row]:
        """After a step, or the last one of the training: the table, when it is there."""
        if self.profiler is None:
            return []
        self.traced += 1
        if self.traced > 1:
            self.steps.append((self.began, self._now()))
        self.profiler.step()
        return self._close() if last or len(self.steps) == STEPS else []

    def _close(self) -> list[Row]:
        """Ends the trace and writes it: the table, if a step has been traced."""
        profiler = self.profiler
        self.drop()
        return self._write(profiler) if profiler is not None and self.steps else []

    def drop(self) -> None:
        """Ends the trace without writing anything."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None
            self.hooks.close()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """While that part of a step is computed."""
        return nullcontext() if self.profiler is None else self._span(name)

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        with record_function(name):
            began = self._now()
            yield
            if self.traced:  # not while warming up
                self.spans[name].append((began, self._now()))

    def _watch(self, part: nn.Module) -> None:
        """A span for every forward of a teacher."""
        inside = ExitStack()
        before = part.register_forward_pre_hook(lambda *_: inside.enter_context(self._span(TEACHER)))
        after = part.register_forward_hook(lambda *_: inside.close(), always_call=True)
        for hook in (before, after):
            self.hooks.callback(hook.remove)

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _per_step(self, spans: list[Span]) -> float:
        """Milliseconds of all these together."""
        gpu = self.device.type == "cuda"
        total = sum(began.elapsed_time(ended) if gpu else 1000 * (ended - began) for began, ended in spans)
        return float(total) / len(self.steps)

    def _write(self, profiler: Any) -> list[Row]:
        assert self.folder is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        rows = [*self._phases(), *self._operators(profiler.key_averages())]
        self.folder.mkdir(exist_ok=True)
        write_csv(self.folder / "table.csv", rows)
        write_atomic(self.folder / "table.txt", "\n".join(lines(rows)) + "\n")
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        return rows

    def _phases(self) -> list[Row]:
        whole = self._per_step(self.steps)
        taken = {name: self._per_step(spans) for name, spans in self.spans.items()}
        taken[STUDENT] -= taken[TEACHER]
        rows: list[Row] = [{"kind": "step", "name": "a whole step", "ms": whole, "share": 1.0, "calls": 1.0}]
        for name, ms in taken.items():
            calls = len(self.spans[name]) / len(self.steps)
            rows.append({"kind": "phase", "name": name, "ms": ms, "share": ms / whole, "calls": calls})
        rest = whole - sum(taken.values())
        return [*rows, {"kind": "phase", "name": REST, "ms": rest, "share": rest / whole, "calls": 1.0}]

    def _operators(self, averages: list[Any]) -> list[Row]:
        """What takes most time itself: operators on a processor, kernels on a GPU."""
        gpu = self.device.type == "cuda"
        kind, key = ("CUDA", "self_device_time_total") if gpu else ("CPU", "self_cpu_time_total")
        known = [each for each in averages if each.device_type.name == kind and not each.is_user_annotation]
        whole = sum(getattr(each, key) for each in known)
        known.sort(key=lambda each: -getattr(each, key))
        return [
            {
                "kind": "operator",
                "name": each.key,
                "ms": getattr(each, key) / 1000 / len(self.steps),
                "share": getattr(each, key) / whole,
                "calls": each.count / len(self.steps),
            }
            for each in known[:SHOWN]
        ]


def lines(rows: list[Row]) -> list[str]:
    """A table for the eye."""
    width = max(len(str(row["name"])[:60]) for row in rows)
    return [
        f"{str(row['name'])[:60]:{width}}{row['ms']:11.3f} ms{row['share']:8.1%}{row['calls']:9.1f} x" for row in rows
    ]
