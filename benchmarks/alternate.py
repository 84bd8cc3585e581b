"""Runs contenders in processes of their own, one step at a time in turn, so that a slow moment of the machine hits
all of them alike.
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


@dataclass(frozen=True)
class Job:
    """A contender, `file:function` of this folder, at a precision."""

    label: str
    contender: str
    bf16: bool


@dataclass(frozen=True)
class Measured:
    """Wall seconds of every counted step, peak resident memory in MB, and the last loss."""

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
    step = getattr(import_module(f"benchmarks.{module}"), name)(batch, job.bf16)
    loss = step()
    pipe.send(loss)
    while pipe.recv():
        start = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, loss))


def measure(jobs: list[Job], batch: int, rounds: int, warmup: int = 1) -> dict[str, Measured]:
    """Medians are over `rounds` steps each, after `warmup` uncounted rounds (and the step that every process starts
    with).
    """
    context, threads = get_context("spawn"), os.cpu_count() or 1
    pipes = {}
    processes = []
    for job in jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, job, batch, threads), daemon=True)
        process.start()
        ours.recv()
        pipes[job.label] = ours
        processes.append(process)
    seen: dict[str, list[tuple[float, float, float]]] = {job.label: [] for job in jobs}
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
    return {label: Measured([a[0] for a in got], got[-1][1], got[-1][2]) for label, got in seen.items()}
