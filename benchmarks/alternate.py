"""Runs contenders in processes of their own, one step at a time in turn, so that a slow moment of the machine hits
all of them alike. A contender that uses a GPU is measured there.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

PEAK = Path("/proc/self/clear_refs")
"""Linux: a 5 written here forgets the peak so far, which was reached while the model was built."""


@dataclass(frozen=True)
class Job:
    """A contender, `file:function` of this folder, at a precision and with what else it takes."""

    label: str
    contender: str
    bf16: bool
    options: tuple[object, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Seconds of every counted step, peak memory of the steps in MB (of the GPU, or resident), and the loss before the
    first.
    """

    seconds: list[float]
    memory: float
    loss: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def serve(pipe: Connection, job: Job, batch: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module, _, name = job.contender.partition(":")
    step = getattr(import_module(f"benchmarks.{module}"), name)(batch, job.bf16, *job.options)
    gpu = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    clock = time.process_time if threads == 1 and not gpu else time.perf_counter
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    elif PEAK.exists():
        PEAK.write_text("5")
    pipe.send(step())
    while pipe.recv():
        start = clock()
        step()
        seconds = clock() - start
        peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((seconds, peak / 2**20))


def measure(
    jobs: list[Job], batch: int, rounds: int, warmup: int = 1, threads: int = os.cpu_count() or 1
) -> dict[str, Measured]:
    """Medians are over `rounds` steps each, after `warmup` uncounted rounds (and the step that every process starts
    with). Seconds are those of the clock, or with one thread those of the processor, whom other work does not slow. A
    step has to end with a number, for which a GPU has to be done.
    """
    context = get_context("spawn")
    pipes, losses = {}, {}
    processes = []
    for job in jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, job, batch, threads), daemon=True)
        process.start()
        theirs.close()  # so that a contender that fails ends the wait for it
        losses[job.label] = ours.recv()
        pipes[job.label] = ours
        processes.append(process)
    seen: dict[str, list[tuple[float, float]]] = {job.label: [] for job in jobs}
    for round_ in range(rounds + warmup):
        for label, pipe in pipes.items():
            pipe.send(True)
            answer = pipe.recv()
            if round_ >= warmup:
                seen[label].append(answer)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return {label: Measured([a[0] for a in got], got[-1][1], losses[label]) for label, got in seen.items()}
