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
import random
import resource
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from mimlet.atomic import write_atomic
from mimlet.config import Config, ScheduleSettings
from mimlet.data.batch import Batch
from mimlet.data.seeding import key
from mimlet.errors import ConfigError, DataError, RunError, TrainingStopped
from mimlet.methods.base import Clock, Method
from mimlet.models.encoder import Encoder
from mimlet.run import LINE_KEYS, Kind, RunFolder, Value
from mimlet.train import optim
from mimlet.train.checkpoint import Checkpoints, State, fitting, to_bytes, write_checked
from mimlet.train.compiling import Compiler, form_of
from mimlet.train.display import Display
from mimlet.train.distributed import (
    Piece,
    Step,
    gather_objects,
    gather_rows,
    idle_parameters,
    is_sharded,
    on_first,
    plain_peer_errors,
    weighted,
)
from mimlet.train.profile import BACKWARD, FOLLOW, MOVE, STEPS, STUDENT, UPDATE, WAIT, WARM, Profile, Row, lines
from mimlet.train.sharded import full, local, make_whole, whole
from mimlet.train.signals import Stop, answered_signals
from mimlet.train.stopwatch import stopwatch

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


class NotFinite(RunError):
    """A loss, or weights, that are not finite. All processes find it together."""


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
    many files are unreadable; `TryAgain` when another process, a loader process or the disk failed.
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
    One that fails (a loss that is not finite; in a single process a disk that refuses, too) leaves its `RunError` as
    result, and the others go on. After a signal all are saved. `after_piece` is called when every method has had a
    micro-batch.
    """
    config = jobs[0].config
    loops: list[_Loop] = []

    def saved() -> int:
        return min((loop.saved for loop in loops), default=0)

    with answered_signals(fabric.is_global_zero) as stop, plain_peer_errors(saved):
        plan = Plan.make(config.schedule, steps_per_epoch)
        display = Display(plan.total, fabric.is_global_zero, [job.run.path.name for job in jobs if job.run])
        for number, job in enumerate(jobs):
            loops.append(_Loop(job, fabric, plan, stop, display, number))
        failed: dict[int, RunError] = {}
        stream = batches(min(loop.step for loop in loops), plan.total)
        try:
            with display:
                _take_turns(loops, stream, failed, after_piece)
        except torch.OutOfMemoryError as error:
            pieces, piece = config.speed.accumulate, config.schedule.batch // fabric.world_size
            again = "" if config.speed.checkpointing else " or speed.checkpointing=true"
            raise RunError(
                f"the device ran out of memory with {piece // pieces} images at a time; use "
                f"speed.accumulate={2 * pieces} (now {pieces}){again}, which does not change results ({error})"
            ) from error
        finally:
            stream.close()
            for loop in loops:
                loop.close()
        return [failed.get(i) or loop.result() for i, loop in enumerate(loops)]


def _take_turns(
    loops: Sequence[_Loop],
    stream: Iterator[Sequence[Batch]],
    failed: dict[int, RunError],
    after_piece: Callable[[], None],
) -> None:
    """All steps of all loops. Time that one of them takes is not counted as another's."""
    several = loops[0].fabric.world_size > 1

    @contextmanager
    def turn(number: int) -> Iterator[_Loop]:
        began = stopwatch()
        try:
            yield loops[number]
        except RunError as error:
            if len(loops) == 1 or (several and not isinstance(error, NotFinite)):
                raise
            failed[number] = error
            loops[number].say(f"failed and left out: {error}")
        for other in loops:
            if other is not loops[number]:
                other.exclude(stopwatch() - began)

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
            with ExitStack() as waiting:
                for i in due:
                    waiting.enter_context(loops[i].waiting())
                batches = next(stream)
            for i in due:  # of all, before one of them computes: they may share a teacher's answers
                loops[i].compiler.begin()
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
class _Interval:
    """What happened since the last log: each step's losses (on the device) and images; seconds waited for data."""

    first: int
    began: float = field(default_factory=stopwatch)
    waited: float = 0.0
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    indices: list[list[Tensor]] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Each loss averaged over the steps. Waits for the device."""
        names = list(self.losses[0])
        rows = torch.stack([torch.stack([losses[name].float() for name in names]) for losses in self.losses])
        return dict(zip(names, rows.mean(0).tolist(), strict=True))


class _Loop:
    """A training under way. `step` counts the optimiser steps done, `saved` those in the newest checkpoint."""

    def __init__(self, job: Job, fabric: Fabric, plan: Plan, stop: Stop, display: Display, number: int) -> None:
        method, config, run = job.method, job.config, job.run
        self.method, self.config, self.fabric, self.plan = method, config, fabric, plan
        self.run, self.evaluate, self.stop, self.display = run, job.evaluate, stop, display
        self.judge_start, self.look = job.judge_start, job.look
        self.moments = moments(config.run.pictures, plan.total)
        self.name = run.path.name if run else ""
        self.checkpoints = Checkpoints(run.checkpoints, config.run.keep, self.say) if run else None
        self.step = self.saved = 0
        self.began = self.saved_at = stopwatch()
        self.seconds_before = 0.0
        self.images = self.unreadable = 0
        self.new_images = 0
        self.new_unreadable: list[tuple[str, str]] = []
        self.losses: dict[str, float] = {}
        self.evaluations: list[tuple[int, dict[str, float]]] = []

        self.compiler = Compiler(form_of(config.speed, fabric.device.type, plan.total))

        for part in _parts(method, (*method.frozen, *method.ema)):
            part.requires_grad_(False)
        for part in method.children():
            if isinstance(part, Encoder):
                part.checkpointing = config.speed.checkpointing
        method.to(fabric.device)
        memory = self._restore()
        if is_sharded(fabric):
            self.module = fabric.setup_module(Step(method))
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
        if memory:
            with fitting():
                optim.load_optimizer_state(self.optimizer, self.trained, memory)
        self.interval = _Interval(self.step)
        first = max(self.step, min(self.step + WARM, plan.total - 1 - STEPS)) + number * (1 + STEPS)
        self.profile = Profile(run.path / "profile" if run and config.run.profile else None, fabric.device, first)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.seconds_before + stopwatch() - self.began

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

    def _show(self, profile: list[Row]) -> None:
        """Tells where the time of a step goes, if that has been found out."""
        if profile and self.run:
            operators = [row for row in profile if row["kind"] == "operator"]
            phases = [row for row in profile if row["kind"] != "operator"]
            self.say(f"where a step's time goes; all of it is in {self.run.path / 'profile'}")
            self.display.say("\n".join(lines([*phases, *operators[:5]])))

    def close(self) -> None:
        """However the training ended."""
        self.profile.drop()
        self.compiler.stop()

    def result(self) -> FitResult:
        """After the last step."""
        make_whole(self.method)
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
        self.profile.begin(self.step, _parts(self.method, self.method.frozen))
        self.optimizer.zero_grad()
        self.sums: dict[str, Tensor] = {}
        self.indices: list[Tensor] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While there is nothing to compute on."""
        began = stopwatch()
        with self.profile.phase(WAIT):
            yield
        self.interval.waited += stopwatch() - began

    def piece(self, batch: Batch) -> None:
        """The gradients of one of `accumulate` micro-batches."""
        number, pieces = len(self.indices), self.config.speed.accumulate
        self.new_images += len(batch)
        self.new_unreadable += batch.unreadable
        self.indices.append(batch.indices)
        _seed(key("step", self.config.seed, self.step, self.fabric.global_rank, number))
        phase = self.profile.phase
        with self.compiler.computing(), self.fabric.no_backward_sync(self.module, enabled=number < pieces - 1):
            with phase(MOVE):
                prepared = self._prepare(batch)
            with phase(STUDENT):
                losses: dict[str, Tensor] = self.module(Piece(prepared, self._clock()))
                loss = weighted(losses, self.method.weights)
            with phase(BACKWARD):
                self.fabric.backward(loss / pieces)
        if number == 0 and pieces > 1:
            self.compiler.own(list(self.trained.values()))
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
        with self._pause():
            self._show(self.profile.end(last=self.step == self.plan.total))
        self._between_steps()
        self._look()

    def _update(self, clock: Clock) -> Tensor | None:
        """Everything after backward; the gradient norm where it is clipped."""
        norm = None
        with self.profile.phase(UPDATE):
            if self.scaled:
                self.fabric.strategy.precision.unscale_gradients(self.optimizer)
            self.method.on_gradients(clock)
            if self.config.optim.clip:
                norm = full(nn.utils.clip_grad_norm_(self.trained.values(), self.config.optim.clip))
            self.fabric.strategy.optimizer_step(self.optimizer)
        with self.profile.phase(FOLLOW):
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
        late = stopwatch() - self.saved_at > 60 * settings.checkpoint_minutes
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
        interval = self.interval
        passed = max(stopwatch() - interval.began, 1e-9)
        per_step = passed / (self.step - interval.first)
        values = {
            **{name: value for name, value in means.items() if math.isfinite(value)},
            "lr": self.lr,
            "images_per_second": self.config.schedule.batch / per_step,
            "data_wait": min(1.0, interval.waited / passed),
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
        with self._pause(), torch.no_grad(), whole(self.method):
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
        if self.step not in self.moments:
            return
        self.method.eval()
        with self._pause(), torch.no_grad(), whole(self.method):
            if self.look:
                self.look(self.method, self.step)
        self.method.train()

    def save(self) -> None:
        """Writes a checkpoint, unless anything in it is not finite."""
        finite = [local(parameter).isfinite().all() for parameter in self.trained.values()]
        finite += [losses["total"].isfinite() for losses in self.interval.losses]
        if not all(row[0] for row in gather_rows(self.fabric, [float(torch.stack(finite).all())])):
            self._stop_nonfinite()
        with self._pause():
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "method": self._trained_state(),
                "optimizer": optim.optimizer_state(self.optimizer, self.trained),
                "scaler": self.fabric.strategy.precision.state_dict(),
            }
            if self.run and self.checkpoints:
                self.run.check_place()
                self.checkpoints.save(self.step, state)
            # nobody goes on, or ends, before it is written
            if gather_rows(self.fabric, [float(self.checkpoints is not None)])[0][0]:
                self.saved = self.step
        self.saved_at = stopwatch()

    def _restore(self) -> State | None:
        """Continues from the newest whole checkpoint; returns the optimiser's memory. The first process reads, the
        others are told.
        """
        found, self.evaluations, self.losses = on_first(self.fabric, self._read)
        if found is None:
            return None
        self.step, state = found
        self.saved = self.step
        with fitting():
            _load(self.method, state["method"])
            self.fabric.strategy.precision.load_state_dict(state["scaler"])
            self.seconds_before = float(state["seconds"])
            if not 0 <= self.seconds_before < math.inf:
                raise ValueError(f"{self.seconds_before} seconds of training")
            memory: State = state["optimizer"]
            if not isinstance(memory, dict):
                raise TypeError(f"the optimiser's memory is a {type(memory).__name__}")
        self.say(f"resumed after step {self.step} of {self.plan.total}")
        return memory

    def _read(self) -> tuple[tuple[int, State] | None, list[tuple[int, dict[str, float]]], dict[str, float]]:
        """From the run folder: (step, state) of the checkpoint, evaluations and last losses before it."""
        found = self.checkpoints.latest() if self.checkpoints else None
        evaluations, losses = [], {}
        for line in self.run.rewind(found[0] if found else 0) if self.run else ():
            numbers = {name: value for name, value in line.items() if not isinstance(value, str)}
            values = {name: float(value) for name, value in numbers.items() if name not in LINE_KEYS}
            if line["kind"] == "eval":
                evaluations.append((int(line["step"]), values))
            elif line["kind"] == "train":
                losses = self._weighted_only(values)
        return found, evaluations, losses

    def _wrap(self, first: Batch) -> None:
        """Hands the method to Fabric; `first` is a piece for a trial."""
        sharded, several = is_sharded(self.fabric), self.fabric.world_size > 1
        if several or self.compiler.form != "off":
            trial = self._prepare(first)
            if several and not sharded:
                self._mute(idle_parameters(self.method, self.fabric, trial, self._clock()))
            if self.compiler.form != "off":
                with whole(self.method):
                    problem = self.compiler.start(self.method, self.fabric, trial, self._clock())
                if problem:
                    self.say(f"continuing without torch.compile, which failed: {problem}")
        if self.config.speed.strategy == "fsdp" and not several:
            self.say("speed.strategy=fsdp does nothing here: there is one process, and nothing to divide")
        if not sharded:
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
        where, weights = "", self._trained_state()
        if self.run and self.checkpoints:
            path = self.run.path / f"nonfinite_step_{self.step}.pt"
            state = {
                "step": self.step,
                "first_step": step,
                "losses": history,
                "indices": self.interval.indices,
                "method": weights,
            }
            write_atomic(path, to_bytes(state))
            kept = self.checkpoints.steps()
            newest = f"the newest checkpoint, step {kept[-1]}, is from before" if kept else "there is no checkpoint yet"
            where = f" Losses, image numbers and weights are in {path}; {newest}."
        raise NotFinite(
            f"not all numbers are finite at step {step} ({what}).{where} Lower "
            f"optim.lr (now {self.config.optim.lr:g}), set optim.clip=1.0, or use speed.precision=32"
        )

    def _trained_state(self) -> State:
        """The method's state without its frozen parts."""
        held = _prefixes(self.method)
        with whole(self.method):
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
        before = stopwatch()
        with self.compiler.pausing():
            yield
        self.interval.began += stopwatch() - before


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
