"""Batches in exact order, for the whole rest of a training."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader

from mimlet.data.batch import Batch
from mimlet.data.dataset import ImageDataset
from mimlet.data.seeding import key
from mimlet.errors import ConfigError, DataError, TryAgain, UserError

Place = tuple[int, int]
"""(epoch, position in the data set)"""

B = TypeVar("B", covariant=True)
T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Items(Protocol[B]):
    """A data set: `ImageDataset`, or several as a `JointDataset`. Errors are returned, not raised (see there)."""

    seed: int

    def __len__(self) -> int: ...

    def __getitem__(self, at: Place) -> Any: ...

    def collate(self, samples: Any) -> B | UserError:
        """Items -> batch."""
        ...


def steps_per_epoch(images: int, batch: int) -> int:
    """Optimiser steps of one epoch; the incomplete last batch is dropped. `DataError` if not even one is complete."""
    if images < batch:
        raise DataError(f"{images:,} images do not fill one batch of {batch:,}; set schedule.batch to at most {images}")
    return images // batch


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which epoch `epoch` visits n images."""
    return np.random.default_rng(key("order", seed, epoch)).permutation(n)


def training_batches(
    dataset: Items[B],
    *,
    batch: int,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    total_steps: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[B, None, None]:
    """Micro-batches of the optimiser steps [start_step, total_steps), `accumulate` per step, for process `rank` of
    `world`.

    Step s of an epoch takes positions [s * batch, (s + 1) * batch) of `epoch_order`; piece a of process r is the
    contiguous part a * world + r of its accumulate * world parts. One set of worker processes serves all epochs;
    closing the generator ends them. Raises `ConfigError` if `batch` does not divide, `DataError` for too few or
    unreadable images, `TryAgain` if these are gone or a worker dies.
    """
    parts = accumulate * world
    if batch % parts:
        raise ConfigError(
            f"schedule.batch {batch} cannot be split evenly over {world} processes x {accumulate} pieces each "
            f"(speed.accumulate); use a multiple of {parts}, such as {-(-batch // parts) * parts}"
        )
    steps_per_epoch(len(dataset), batch)
    places = _TrainingOrder(len(dataset), dataset.seed, batch, accumulate, rank, world, start_step, total_steps)
    return _batches(dataset, places, workers, pin_memory)


def evaluation_batches(
    dataset: ImageDataset,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """All images once, in order: process `rank` takes every world-th image, `batch` at a time, the last batch being
    smaller.

    Processes may get different numbers of batches, and a batch may be smaller, even empty, where images are unreadable.
    """
    own = range(rank, len(dataset), world)
    places = [[(0, i) for i in own[start : start + batch]] for start in range(0, len(own), batch)]
    return _batches(dataset, places, workers, pin_memory)


def prepared(
    stream: Iterable[B], prepare: Callable[[B], Sequence[Batch]], device: torch.device
) -> Generator[Sequence[Batch], None, None]:
    """What `prepare` makes of each batch.

    On CUDA a batch is moved and made on a stream of its own while the step computes with the one before.
    """
    if device.type != "cuda":
        for batch in stream:
            yield prepare(batch)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[Sequence[Batch], torch.cuda.Event] | None = None
    for batch in stream:
        with torch.cuda.stream(side):
            ready = prepare(batch)
        done = side.record_event()
        if waiting:
            yield _handed_over(*waiting)
        waiting = ready, done
    if waiting:
        yield _handed_over(*waiting)


def _handed_over(batches: Sequence[Batch], done: torch.cuda.Event) -> Sequence[Batch]:
    """Lets the step wait for these batches, and their memory wait for the step."""
    stream = torch.cuda.current_stream()
    stream.wait_event(done)
    for batch in batches:
        for tensor in batch.tensors():
            tensor.record_stream(stream)
    return batches


@dataclass(frozen=True)
class _TrainingOrder:
    """The places of every micro-batch, made while they are asked for."""

    images: int
    seed: int
    batch: int
    accumulate: int
    rank: int
    world: int
    start_step: int
    total_steps: int

    def __iter__(self) -> Iterator[list[Place]]:
        per_epoch = self.images // self.batch
        piece = self.batch // (self.accumulate * self.world)
        current = -1
        for step in range(self.start_step, self.total_steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.images, self.seed, epoch)
            for a in range(self.accumulate):
                start = place * self.batch + (a * self.world + self.rank) * piece
                yield [(epoch, i) for i in order[start : start + piece].tolist()]


def _batches(
    dataset: Items[B], places: Iterable[list[Place]], workers: int, pin_memory: bool
) -> Generator[B, None, None]:
    loader: DataLoader[B | UserError] = DataLoader(
        dataset,  # type: ignore[arg-type]  # the loader is typed by what it yields
        batch_sampler=places,
        num_workers=workers,  # torch gives each of them one thread
        collate_fn=dataset.collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws its seed from the global generator
    )
    for item in loaded(loader):  # it has no name: with the loop the workers end
        if isinstance(item, UserError):
            raise item
        yield item


def loaded(loader: DataLoader[T]) -> Generator[T, None, None]:
    """What a loader gives; `TryAgain` where one of its processes dies.

    A process that is asked to stop along with its parent, as schedulers and terminals do, leaves the answer to it:
    until the parent has saved, it needs batches. When this ends, its processes have ended.
    """
    if not loader.num_workers:
        yield from loader
        return
    with _deaths_unannounced():
        iterator, processes = _started(loader)
        try:
            while True:
                error: Exception | None = None
                try:
                    if not (dead := _dead(processes)):
                        item = next(iterator)
                except StopIteration:
                    break
                except (EOFError, OSError, RuntimeError) as raised:
                    dead = "" if str(raised).startswith("Caught ") else _dead(processes, patience=1)  # by the data set
                    if not dead:
                        raise
                    error = raised
                if dead:
                    _abandon(iterator)
                    raise TryAgain(
                        "a data loading process died, most often because memory or shared memory (/dev/shm) ran out; "
                        f"use fewer speed.workers, or 0 to load in the main process ({dead})"
                    ) from error
                yield item
        finally:
            del iterator  # which asks them to end
            for process in processes:
                process.kill()
                process.join()


def _abandon(iterator: Iterator[Any]) -> None:
    """Keeps torch from ending an iterator in its own way, which waits for locks that the dead may hold."""
    parts = vars(iterator)
    parts["_shutdown"] = True
    _remove_worker_pids(id(iterator))
    if stop := parts.get("_pin_memory_thread_done_event"):
        stop.set()


def _dead(processes: Sequence[BaseProcess], patience: float = 0) -> str:
    """How those that have ended did; waits so many seconds for the first."""
    ended = wait([process.sentinel for process in processes], patience)
    told = []
    for process in processes:
        if process.sentinel in ended:
            process.join()
            code = process.exitcode or 0
            told.append(f"process {process.pid}: {signal.strsignal(-code) if code < 0 else f'exit code {code}'}")
    return ", ".join(told)


@contextmanager
def _deaths_unannounced() -> Iterator[None]:
    """Without torch's signal handler, which raises an error about a dead loader process wherever the main process is:
    in a destructor, where it is lost, or while a checkpoint or a message is written. `loaded` looks by itself.
    """
    if threading.current_thread() is not threading.main_thread():  # torch sets no handler then
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _started(loader: DataLoader[T]) -> tuple[Iterator[T], list[BaseProcess]]:
    """Its iterator, and its processes. Until these have handlers of their own, signals wait."""
    loader.worker_init_fn = _leave_signals
    others = active_children()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return iterator, [process for process in active_children() if process not in others]


def _leave_signals(worker: int) -> None:
    if (parent := parent_process()) is not None and os.getppid() != parent.pid:
        os._exit(0)  # it was killed meanwhile, which torch would not notice any more
    excepthook = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, EOFError | OSError):  # multiprocessing's, when the parent is killed while it fetches
            excepthook(kind, error, trace)

    sys.excepthook = report
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
