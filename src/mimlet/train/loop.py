"""The one training loop, for pre-training and every task. It knows no method.

**Exact resumption.** Everything random in a step is seeded by (seed, step, process, micro-batch), and data are a
function of the step. So the state of training is the step, the method without its frozen parts, the optimiser's memory,
the gradient scaler and the seconds spent. What was judged before is read back from the run's metrics.

**Waiting.** On an accelerator only the steps that log, judge or save wait for the device; a loss that is not finite is
found there. Among several processes those are also the steps at which they agree on stopping and on saving by the
clock: a signal is answered within `run.log_steps` steps, by a single process after the step under way.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from time import perf_counter
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

from mimlet.atomic import write_atomic
from mimlet.config import Config, ScheduleSettings
from mimlet.data.batch import Batch
from mimlet.data.loader import plain_worker_errors
from mimlet.data.seeding import key
from mimlet.errors import ConfigError, DataError, RunError, TrainingStopped
from mimlet.methods.base import Clock, Method
from mimlet.run import LINE_KEYS, Kind, RunFolder, Value
from mimlet.train import optim
from mimlet.train.checkpoint import Checkpoints, State, to_bytes, write_checked
from mimlet.train.distributed import (
    Piece,
    Step,
    compile_encoders,
    gather_objects,
    gather_rows,
    idle_parameters,
    weighted,
)

Batches = Callable[[int, int], Generator[Batch, None, None]]
"""(first step, total steps) -> this process's micro-batches of those steps, `speed.accumulate` per step, on the CPU."""

JointBatches = Callable[[int, int], Generator[Sequence[Batch], None, None]]
"""The same for several trainings: of each micro-batch one `Batch` per training."""

Evaluate = Callable[[Method], dict[str, float]]
"""Judges a method in eval mode, on every process. The evaluation whose first number is highest is the best one."""

Look = Callable[[Method, int], None]
"""Looks at a method after so many steps and keeps what it sees: at the `run.pictures` moments of a training, on the
first process only, in eval mode without gradients. It is asked a second time about a step from which training is
continued. It leaves the method as it is; random numbers it may draw, no step notices. Its time is not part of the
measured speed.
"""

UNREADABLE_AFTER = 100
"""Images seen before the share of unreadable ones can stop a run; one epoch, if that is shorter."""

SAME_REQUEST = 1.0
"""Seconds within which a second signal is the same request: a terminal and a launcher may both deliver it."""


@dataclass(frozen=True)
class FitResult:
    """What a training came to: steps done, losses last logged, last and best evaluation, seconds over all resumes."""

    steps: int
    losses: dict[str, float]
    evaluation: dict[str, float]
    best: dict[str, float]
    best_step: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A schedule in optimiser steps; `evaluate_every` is 0 for an evaluation at the end only."""

    total: int
    warmup: int
    evaluate_every: int
    per_epoch: int

    @staticmethod
    def make(schedule: ScheduleSettings, per_epoch: int) -> Plan:
        """From settings in epochs or steps; `ConfigError` when the warm-up is not shorter than the training."""
        total = schedule.steps or max(1, round(schedule.epochs * per_epoch))
        warmup = round(schedule.warmup * total if schedule.warmup else schedule.warmup_epochs * per_epoch)
        if warmup >= total:
            raise ConfigError(
                f"a warm-up of {warmup} steps is not shorter than the training of {total} steps "
                f"({per_epoch} per epoch); lower schedule.warmup_epochs, or give schedule.warmup as a fraction"
            )
        every = max(1, round(schedule.eval_epochs * per_epoch)) if schedule.eval_epochs else 0
        return Plan(total, warmup, every, per_epoch)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps."""
        return step == self.total or bool(step and self.evaluate_every and step % self.evaluate_every == 0)


def moments(count: int, total: int) -> set[int]:
    """`count` steps spread evenly over a training of `total` steps: the first is 0, before training, the last the end.
    A single one is the end.
    """
    return {total - total * i // max(1, count - 1) for i in range(count)}


@dataclass
class Job:
    """One of several trainings side by side: see `fit` for what its parts are."""

    method: Method
    config: Config
    run: RunFolder | None = None
    evaluate: Evaluate | None = None
    judge_start: bool = False
    look: Look | None = None


def fit(
    method: Method,
    config: Config,
    fabric: Fabric,
    batches: Batches,
    steps_per_epoch: int,
    *,
    run: RunFolder | None = None,
    evaluate: Evaluate | None = None,
    judge_start: bool = False,
    look: Look | None = None,
) -> FitResult:
    """Trains `method` to the end of `config.schedule`, from the newest checkpoint in `run` if there is one.

    `run` and `look` are given on the first process only; without `run` nothing is written. `judge_start`: `evaluate` is
    asked before the first step, too. The method comes back in eval mode on the
    fabric's device. Raises `TrainingStopped` after a signal, with a checkpoint saved; `RunError` when a loss is not
    finite (what led to it is written to the run folder, a checkpoint is not) or the disk refuses; `DataError` when too
    many files are unreadable.
    """

    def alone(start_step: int, total_steps: int) -> Generator[tuple[Batch], None, None]:
        with closing(batches(start_step, total_steps)) as stream:
            for batch in stream:
                yield (batch,)

    result = fit_together([Job(method, config, run, evaluate, judge_start, look)], fabric, alone, steps_per_epoch)[0]
    if isinstance(result, RunError):
        raise result
    return result


def fit_together(
    jobs: Sequence[Job],
    fabric: Fabric,
    batches: JointBatches,
    steps_per_epoch: int,
    *,
    after_piece: Callable[[], None] = lambda: None,
) -> list[FitResult | RunError]:
    """Trains several methods on the same images, piece by piece in turn; each result is that of its own training.

    All have the same schedule, batch and accumulation. A resumed training that is behind the others catches up first.
    One that fails (a loss that is not finite, a full disk) leaves its `RunError` as result, and the others go on. After
    a signal all are saved. `after_piece` is called when every method has had a micro-batch.
    """
    config = jobs[0].config
    with _answered_signals(fabric.is_global_zero) as stop, plain_worker_errors():
        plan = Plan.make(config.schedule, steps_per_epoch)
        display = Display(plan.total, fabric.is_global_zero, [job.run.path.name for job in jobs if job.run])
        loops = [_Loop(job, fabric, plan, stop, display) for job in jobs]
        failed: dict[int, RunError] = {}
        stream = batches(min(loop.step for loop in loops), plan.total)
        try:
            with display:
                _take_turns(loops, stream, failed, after_piece)
        except torch.OutOfMemoryError as error:
            pieces, piece = config.speed.accumulate, config.schedule.batch // fabric.world_size
            raise RunError(
                f"the device ran out of memory with {piece // pieces} images at a time; use "
                f"speed.accumulate={2 * pieces} (now {pieces}), which does not change results ({error})"
            ) from error
        finally:
            stream.close()
        return [failed.get(i) or loop.result() for i, loop in enumerate(loops)]


def _take_turns(
    loops: Sequence[_Loop],
    stream: Iterator[Sequence[Batch]],
    failed: dict[int, RunError],
    after_piece: Callable[[], None],
) -> None:
    """All steps of all loops. Time that one of them takes is not counted as another's."""

    @contextmanager
    def turn(number: int) -> Iterator[_Loop]:
        began = perf_counter()
        try:
            yield loops[number]
        except RunError as error:
            if len(loops) == 1:
                raise
            failed[number] = error
            loops[number].say(f"failed and left out: {error}")
        for other in loops:
            if other is not loops[number]:
                other.exclude(perf_counter() - began)

    first, total = min(loop.step for loop in loops), loops[0].plan.total
    batches: Sequence[Batch] | None = None
    if first < total:
        batches = next(stream)
        stream = itertools.chain([batches], stream)
    for i, loop in enumerate(loops):
        with turn(i):
            loop.begin(batches[i] if batches and loop.step < total else None)
    for step in range(first, total):
        due = [i for i, loop in enumerate(loops) if loop.step == step and i not in failed]
        for i in due:
            loops[i].begin_step()
        for _ in range(loops[0].config.speed.accumulate):
            began = perf_counter()
            batches = next(stream)
            for i in due:
                loops[i].interval.waited += perf_counter() - began
            for i in due:
                with turn(i) as loop:
                    loop.piece(batches[i])
            after_piece()
            due = [i for i in due if i not in failed]
        stopped: dict[int, TrainingStopped] = {}
        for i in due:
            with turn(i) as loop:
                try:
                    loop.end_step()
                except TrainingStopped as request:
                    stopped[i] = request
        if stopped:
            for i in due:
                if i not in stopped:
                    loops[i].save()
            raise next(iter(stopped.values()))
        if len(failed) == len(loops):
            return


@dataclass
class _Stop:
    """The exit code a signal asks for, 0 for none."""

    code: int = 0


@dataclass
class _Interval:
    """What happened since the last log: each step's losses (on the device) and images; seconds waited for data."""

    first: int
    began: float = field(default_factory=perf_counter)
    waited: float = 0.0
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    indices: list[list[Tensor]] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Each loss averaged over the steps. Waits for the device."""
        names = list(self.losses[0])
        rows = torch.stack([torch.stack([losses[name].float() for name in names]) for losses in self.losses])
        return dict(zip(names, rows.mean(0).tolist(), strict=True))


class _Loop:
    """A training under way. `step` counts the optimiser steps done."""

    def __init__(self, job: Job, fabric: Fabric, plan: Plan, stop: _Stop, display: Display) -> None:
        method, config, run = job.method, job.config, job.run
        self.method, self.config, self.fabric, self.plan = method, config, fabric, plan
        self.run, self.evaluate, self.stop, self.display = run, job.evaluate, stop, display
        self.judge_start, self.look = job.judge_start, job.look
        self.moments = moments(config.run.pictures, plan.total)
        self.name = run.path.name if run else ""
        self.checkpoints = Checkpoints(run.checkpoints, config.run.keep, self.say) if run else None
        self.step = 0
        self.began = self.saved_at = perf_counter()
        self.seconds_before = 0.0
        self.images = self.unreadable = 0
        self.new_images = 0
        self.new_unreadable: list[tuple[str, str]] = []
        self.losses: dict[str, float] = {}
        self.evaluations: list[tuple[int, dict[str, float]]] = []

        for part in _parts(method, (*method.frozen, *method.ema)):
            part.requires_grad_(False)
        method.to(fabric.device)
        self.trained = optim.trained_parameters(method)
        self.peak = optim.peak_learning_rate(config.optim, config.schedule.batch)
        self.scaled = fabric.strategy.precision.precision == "16-mixed"
        groups = optim.parameter_groups(method, config.optim)
        self.optimizer = optim.make_optimizer(groups, config.optim, fused=not self.scaled)
        self.followers = [
            (follower, getattr(method, leader))
            for name, leader in method.ema.items()
            for follower in _parts(method, [name])
        ]
        self._restore()
        self.interval = _Interval(self.step)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.seconds_before + perf_counter() - self.began

    def say(self, text: str) -> None:
        """Tells the user, and leaves a note in the run's metrics."""
        self.display.say(f"{self.display.prefix(self.name)}{text}")
        if self.run:
            self._record("note", {"text": text})

    def exclude(self, seconds: float) -> None:
        """These last seconds were somebody else's."""
        self.began += seconds
        self.interval.began += seconds

    def begin(self, first: Batch | None) -> None:
        """Before the first step; `first` is its first piece, None where nothing is left to do."""
        self.method.train()
        due = self.plan.evaluates(self.step) or (self.judge_start and self.step == 0)
        if due and all(step != self.step for step, _ in self.evaluations):
            self._judge()
        self._look()
        if first is not None:
            self._wrap(first)
        self.interval = _Interval(self.step)

    def result(self) -> FitResult:
        """After the last step."""
        self.method.eval()
        best_step, best = max(self.evaluations, key=lambda item: _score(item[1]), default=(0, {}))
        last = self.evaluations[-1][1] if self.evaluations else {}
        return FitResult(self.step, self.losses, last, best, best_step, self.seconds)

    def begin_step(self) -> None:
        """Sets the rate; no gradients yet."""
        settings, schedule, plan = self.config.optim, self.config.schedule, self.plan
        milestones = schedule.milestones if schedule.decay == "step" else ()
        self.lr = optim.learning_rate(self.step, plan.total, plan.warmup, self.peak, settings.min_lr, milestones)
        optim.set_rates(self.optimizer, self.lr, optim.weight_decay(self.step, plan.total, settings))
        self.optimizer.zero_grad()
        self.sums: dict[str, Tensor] = {}
        self.indices: list[Tensor] = []

    def piece(self, batch: Batch) -> None:
        """The gradients of one of `accumulate` micro-batches."""
        number, pieces = len(self.indices), self.config.speed.accumulate
        self.new_images += len(batch)
        self.new_unreadable += batch.unreadable
        self.indices.append(batch.indices)
        _seed(key("step", self.config.seed, self.step, self.fabric.global_rank, number))
        with self.fabric.no_backward_sync(self.module, enabled=number < pieces - 1):
            losses: dict[str, Tensor] = self.module(Piece(self._prepare(batch), self._clock()))
            loss = weighted(losses, self.method.weights)
            self.fabric.backward(loss / pieces)
        for name, value in (*losses.items(), ("total", loss)):
            share = value.detach() / pieces
            self.sums[name] = self.sums[name] + share if name in self.sums else share

    def end_step(self) -> None:
        """One step of the optimiser, then of the followers; then whatever is due."""
        norm = self._update(self._clock())
        if norm is not None:
            self.sums["grad_norm"] = norm
        self.interval.losses.append(self.sums)
        self.interval.indices.append(self.indices)
        self.step += 1
        self._between_steps()
        self._look()

    def _update(self, clock: Clock) -> Tensor | None:
        """Everything after backward; the gradient norm where it is clipped."""
        norm = None
        if self.scaled:
            self.fabric.strategy.precision.unscale_gradients(self.optimizer)
        self.method.on_gradients(clock)
        if self.config.optim.clip:
            norm = nn.utils.clip_grad_norm_(self.trained.values(), self.config.optim.clip)
        self.fabric.strategy.optimizer_step(self.optimizer)
        if self.followers:
            momentum = self.method.ema_momentum(clock)
            for follower, leader in self.followers:
                optim.follow(follower, leader, momentum)
        self.method.after_step(clock)
        return norm

    def _between_steps(self) -> None:
        """Log, save, stop, judge: whatever is due."""
        settings, last = self.config.run, self.step == self.plan.total
        logs = last or self.step % settings.log_steps == 0
        judges = self.evaluate is not None and self.plan.evaluates(self.step)
        saves = last or judges or bool(settings.checkpoint_steps and self.step % settings.checkpoint_steps == 0)
        if self.fabric.world_size > 1 and not (logs or saves):
            return
        means = self.interval.means() if logs else {}
        late = perf_counter() - self.saved_at > 60 * settings.checkpoint_minutes
        row = [float(self.stop.code), float(late), float(self.new_images), float(len(self.new_unreadable))]
        rows = gather_rows(self.fabric, [*row, *means.values()])
        code = int(max(row[0] for row in rows))
        self._count_unreadable(sum(int(row[2]) for row in rows), sum(int(row[3]) for row in rows))
        if logs:
            self._log({name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(means, start=4)})
        if saves or code or rows[0][1]:
            self.save()
        if code:
            name = signal.Signals(code - 128).name
            where = f"; saved in {self.run.path}, continue with --resume" if self.run else ""
            raise TrainingStopped(f"stopped by {name} after step {self.step} of {self.plan.total}{where}", code)
        if judges:
            self._judge()

    def _log(self, means: dict[str, float]) -> None:
        """Writes the interval's averages and begins another; stops on a loss that is not finite."""
        self.losses = self._weighted_only(means)
        if not all(map(math.isfinite, self.losses.values())):
            self._stop_nonfinite()
        interval, now = self.interval, perf_counter()
        per_step = (now - interval.began) / (self.step - interval.first)
        values = {
            **{name: value for name, value in means.items() if math.isfinite(value)},
            "lr": self.lr,
            "images_per_second": self.config.schedule.batch / per_step,
            "data_wait": interval.waited / (now - interval.began),
            "memory_mb": _memory(self.fabric.device),
        }
        self.display.update(
            self.name, self.step, self._epoch(), self.losses, values, (self.plan.total - self.step) * per_step
        )
        self._record("train", values)
        self.interval = _Interval(self.step)

    def _judge(self) -> None:
        """Evaluates, and keeps the weights if they are the best so far."""
        if self.evaluate is None:
            return
        self.method.eval()
        with self._pause(), torch.no_grad():
            values = self.evaluate(self.method)
            self.method.train()
            best = all(_score(values) > _score(earlier) for _, earlier in self.evaluations)
            self.evaluations.append((self.step, values))
            self._record("eval", values)
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.display.say(f"{self.display.prefix(self.name)}step {self.step}, evaluation: {numbers}")
            if best and self.run:
                write_checked(self.run.checkpoints / "best.pt", {"step": self.step, "method": self._trained_state()})

    def _look(self) -> None:
        """Lets `look` see the method, where this is one of its moments."""
        if self.look is None or self.step not in self.moments:
            return
        self.method.eval()
        with self._pause(), torch.no_grad():
            self.look(self.method, self.step)
        self.method.train()

    def save(self) -> None:
        """Writes a checkpoint, unless anything in it is not finite."""
        finite = [parameter.isfinite().all() for parameter in self.trained.values()]
        finite += [losses["total"].isfinite() for losses in self.interval.losses]
        if not all(row[0] for row in gather_rows(self.fabric, [float(torch.stack(finite).all())])):
            self._stop_nonfinite()
        with self._pause():
            if self.checkpoints:
                state = {
                    "step": self.step,
                    "seconds": self.seconds,
                    "method": self._trained_state(),
                    "optimizer": optim.optimizer_state(self.optimizer, self.trained),
                    "scaler": self.fabric.strategy.precision.state_dict(),
                }
                self.checkpoints.save(self.step, state)
        self.saved_at = perf_counter()

    def _restore(self) -> None:
        """Continues from the newest whole checkpoint. The first process reads, the others are told."""
        found: tuple[int, State] | None = None
        if self.run and self.checkpoints:
            found = self.checkpoints.latest()
            for line in self.run.rewind(found[0] if found else 0):
                values = {name: float(value) for name, value in line.items() if name not in (*LINE_KEYS, "text")}
                if line["kind"] == "eval":
                    self.evaluations.append((int(line["step"]), values))
                elif line["kind"] == "train":
                    self.losses = self._weighted_only(values)
        found, self.evaluations, self.losses = self.fabric.broadcast((found, self.evaluations, self.losses))
        if found is None:
            return
        self.step, state = found
        _load(self.method, state["method"])
        optim.load_optimizer_state(self.optimizer, self.trained, state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.seconds_before = state["seconds"]
        self.say(f"resumed after step {self.step} of {self.plan.total}")

    def _wrap(self, first: Batch) -> None:
        """Hands the method to Fabric; `first` is a piece for a trial."""
        compiled, several = self.config.speed.compile in ("on", "graphs"), self.fabric.world_size > 1
        if compiled or several:
            trial = self._prepare(first)
            if compiled:
                try:
                    idle_parameters(self.method, self.fabric, trial, self._clock(), compiled=True)
                    compile_encoders(self.method)
                except Exception as error:  # whatever the compiler meets: training goes on without it
                    reason = str(error).strip().partition("\n")[0]
                    self.say(f"continuing without torch.compile, which failed: {type(error).__name__}: {reason}")
            if several:
                self._mute(idle_parameters(self.method, self.fabric, trial, self._clock()))
        self.module = self.fabric.setup_module(Step(self.method))

    def _mute(self, idle: list[str]) -> None:
        """DDP would wait for these gradients for ever."""
        for name in idle:
            self.trained[name].requires_grad_(False)
        if idle:
            self.say(f"{len(idle)} parameters get no gradient from this method and are left out, for example {idle[0]}")

    def _prepare(self, batch: Batch) -> Batch:
        augment = self.config.data.augment
        return batch.prepare(self.fabric.device, augment.mean, augment.std)

    def _count_unreadable(self, images: int, unreadable: int) -> None:
        """Lists new unreadable files of all processes; `DataError` when their share is too large."""
        self.images += images
        self.unreadable += unreadable
        files = list(itertools.chain(*gather_objects(self.fabric, self.new_unreadable))) if unreadable else []
        self.new_images, self.new_unreadable = 0, []
        if self.run:
            self.run.unreadable(files)
        most = self.config.data.max_unreadable
        enough = min(UNREADABLE_AFTER, self.plan.per_epoch * self.config.schedule.batch)
        if files and self.images >= enough and self.unreadable > most * self.images:
            listed = f"; all are listed in {self.run.path / 'unreadable.txt'}" if self.run else ""
            raise DataError(
                f"{self.unreadable:,} of {self.images:,} images could not be read, more than data.max_unreadable "
                f"allows ({most:.0%}). For example {files[0][0]}: {files[0][1]}{listed}"
            )

    def _stop_nonfinite(self) -> NoReturn:
        """Writes what led here and raises. Without a bad loss here, the weights are bad, or another process."""
        history = [{name: float(value) for name, value in losses.items()} for losses in self.interval.losses]
        bad = [i for i, losses in enumerate(history) if not math.isfinite(losses["total"])]
        step = self.interval.first + bad[0] if bad else self.step - 1
        what = ", ".join(f"{name} {value:.4g}" for name, value in history[bad[0]].items()) if bad else "weights"
        where = ""
        if self.run and self.checkpoints:
            path = self.run.path / f"nonfinite_step_{self.step}.pt"
            state = {
                "step": self.step,
                "first_step": step,
                "losses": history,
                "indices": self.interval.indices,
                "method": self._trained_state(),
            }
            write_atomic(path, to_bytes(state))
            kept = self.checkpoints.steps()
            newest = f"the newest checkpoint, step {kept[-1]}, is from before" if kept else "there is no checkpoint yet"
            where = f" Losses, image numbers and weights are in {path}; {newest}."
        raise RunError(
            f"not all numbers are finite at step {step} ({what}).{where} Lower "
            f"optim.lr (now {self.config.optim.lr:g}), set optim.clip=1.0, or use speed.precision=32"
        )

    def _trained_state(self) -> State:
        """The method's state without its frozen parts."""
        held = _prefixes(self.method)
        return {name: value for name, value in self.method.state_dict().items() if not name.startswith(held)}

    def _weighted_only(self, values: Mapping[str, float]) -> dict[str, float]:
        """What is minimised, without what is only watched."""
        return {name: value for name, value in values.items() if name in (*self.method.weights, "total")}

    def _clock(self) -> Clock:
        return Clock(self.step, self.plan.total, self.plan.per_epoch, self.config.seed)

    def _epoch(self) -> float:
        return self.step / self.plan.per_epoch

    def _record(self, kind: Kind, values: Mapping[str, Value]) -> None:
        if self.run:
            self.run.log(kind, self.step, self._epoch(), self.seconds, values)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Keeps saving, judging and looking out of the measured speed."""
        before = perf_counter()
        yield
        self.interval.began += perf_counter() - before


class Display:
    """Progress on the first process: a bar on a terminal, elsewhere a line per log, on standard error.

    Of several trainings (`names`) it shows each one's loss, when all have logged.
    """

    def __init__(self, total: int, shown: bool, names: Sequence[str]) -> None:
        self.total, self.names = total, names
        self.console = Console(stderr=True, quiet=not shown)
        columns = (BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.waiting: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Display:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def prefix(self, name: str) -> str:
        """Which training a sentence is about, where there are several."""
        return f"{name}: " if len(self.names) > 1 else ""

    def say(self, text: str) -> None:
        """A sentence."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(
        self,
        name: str,
        step: int,
        epoch: float,
        losses: Mapping[str, float],
        values: Mapping[str, float],
        seconds_left: float,
    ) -> None:
        """The newest averages, and the time left. A total of one loss is not repeated."""
        shown = losses if len(losses) > 2 else {"loss": losses["total"]}
        if len(self.names) > 1:
            self.waiting[name] = (losses["total"], seconds_left)
            if name != self.names[-1]:
                return
            shown = {name: loss for name, (loss, _) in self.waiting.items()}
            seconds_left = sum(left for _, left in self.waiting.values())
            self.waiting = {}
        speed = f"{values['images_per_second']:.4g} img/s  " if len(self.names) < 2 else ""
        text = (
            f"epoch {epoch:.2f}  {', '.join(f'{name} {value:.4f}' for name, value in shown.items())}  "
            f"{speed}left {timedelta(seconds=round(seconds_left))}  "
            f"lr {values['lr']:.2e}  data {values['data_wait']:.0%}  {values['memory_mb'] / 1000:.1f} GB"
        )
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        else:
            self.say(f"step {step}/{self.total}  {text}")


@contextmanager
def _answered_signals(shown: bool) -> Iterator[_Stop]:
    """SIGTERM and SIGINT ask the loop to stop; a second one, a second later, ends the process at once.

    Loader processes inherit the handlers: they leave SIGINT, which a terminal sends to everybody, to the main process.
    """
    stop, owner, first = _Stop(), os.getpid(), 0.0

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


def _load(method: Method, state: State) -> None:
    """Puts a checkpoint's tensors into the method; `RunError` unless they are exactly its trained parts."""
    try:
        result = method.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise RunError(f"the checkpoint does not fit the method as configured now: {error}") from None
    odd = [*result.unexpected_keys, *(name for name in result.missing_keys if not name.startswith(_prefixes(method)))]
    if odd:
        raise RunError(
            f"the checkpoint does not fit the method as configured now: {len(odd)} tensors are in only one of them, "
            f"for example {odd[0]}. Repeat the settings of the run, or give another --out"
        )


def _seed(number: int) -> None:
    """Seeds every global generator: drop path draws from torch's, timm's mixup from numpy's."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002


def _parts(method: Method, names: Iterable[str]) -> list[nn.Module]:
    """The named parts; one that this configuration does without is None and left out."""
    return [part for name in names if (part := getattr(method, name)) is not None]


def _prefixes(method: Method) -> tuple[str, ...]:
    return tuple(f"{name}." for name in method.frozen)


def _score(values: Mapping[str, float]) -> float:
    return next(iter(values.values()))


def _memory(device: torch.device) -> float:
    """Peak memory in MB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
