import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimlet.config import Config, ScheduleSettings
from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, DataError, RunError, TrainingStopped
from mimlet.methods.base import Clock, Method
from mimlet.run import RunFolder, read_run
from mimlet.train import signals
from mimlet.train.checkpoint import read_checked
from mimlet.train.loop import Batches, Plan, moments
from tests.train.toy import Toy, batches, config, train

ROOT = Path(__file__).resolve().parents[2]


def assert_same(a: Method, b: Method) -> None:
    """Bit for bit."""
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.fixture(scope="module")
def whole() -> Method:
    """The training that nothing interrupts."""
    return train()[0]


@pytest.mark.parametrize("at", [1, 3, 8, 15])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_inside_an_accumulation_and_resumed(whole: Method, tmp_path: Path, number: int, at: int) -> None:
    before = signal.getsignal(number)
    with RunFolder.create(tmp_path, config()) as run, pytest.raises(TrainingStopped) as stopped:
        train(run=run, signals={at - 1: number})
    assert stopped.value.code == 128 + number
    assert f"after step {at} of 16; saved in {tmp_path}, continue with --resume" in str(stopped.value)
    with RunFolder.create(tmp_path, config(), resume=True) as run:
        assert run.checkpoints.joinpath(f"step_{at:08d}.pt").exists()
        resumed, result = train(run=run)
    assert_same(resumed, whole)
    assert result.steps == 16
    assert signal.getsignal(number) is before


def test_resumed_without_accumulation_several_times_with_a_scaleless_optimizer(tmp_path: Path) -> None:
    settings = config(speed={"accumulate": 1}, optim={"name": "sgd", "nesterov": True, "clip": 0.5})
    for at in (2, 9):
        with RunFolder.create(tmp_path, settings, resume=True) as run, pytest.raises(TrainingStopped):
            train(settings, run=run, signals={at: signal.SIGTERM})
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        resumed, _ = train(settings, run=run)
    assert_same(resumed, train(settings)[0])


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """Processes of their own, ended by signals: folder and exit code by signal."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("SIGTERM", "SIGKILL")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = {
        name: subprocess.Popen([sys.executable, "-m", "tests.train.toy", folder, name], cwd=ROOT, env=environment)
        for name, folder in folders.items()
    }
    return {name: (folders[name], process.wait()) for name, process in processes.items()}


@pytest.mark.parametrize(("name", "code", "step"), [("SIGTERM", 143, 10), ("SIGKILL", -9, 7)])
def test_a_process_that_is_ended_continues_bit_for_bit(
    whole: Method, killed: dict[str, tuple[Path, int]], name: str, code: int, step: int
) -> None:
    folder, found = killed[name]
    assert found == code
    assert max(folder.glob("checkpoints/*.pt")).name == f"step_{step:08d}.pt"
    with RunFolder.create(folder, config(), resume=True) as run:
        assert_same(train(run=run)[0], whole)


def ended_by(child: Callable[[], None]) -> int:
    """The signal that ends a forked process, negative, or its exit code."""
    if (pid := os.fork()) == 0:
        child()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_second_signal_ends_the_process(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST", 0.05)

    def child() -> None:
        with signals.answered_signals(True) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # delivered twice by a terminal and a launcher
            if stop.code == 130:
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGTERM)

    assert ended_by(child) == -signal.SIGTERM
    assert capfd.readouterr().err == "SIGINT: saving after this step; again to quit at once\n"


def test_loader_processes_leave_the_terminals_signal_to_the_main_process() -> None:
    def child(number: int) -> None:
        os.kill(os.getpid(), number)
        os._exit(7)

    with signals.answered_signals(False) as stop:
        assert ended_by(lambda: child(signal.SIGINT)) == 7
        assert ended_by(lambda: child(signal.SIGTERM)) == -signal.SIGTERM
        assert stop.code == 0


def test_a_damaged_newest_checkpoint_falls_back(whole: Method, tmp_path: Path) -> None:
    settings = config(run={"checkpoint_steps": 5})
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(TrainingStopped):
        train(settings, run=run, signals={11: signal.SIGTERM})
    os.truncate(tmp_path / "checkpoints" / "step_00000012.pt", 1000)
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        resumed, _ = train(settings, run=run)
    assert_same(resumed, whole)
    notes = [str(line["text"]) for line in read_run(tmp_path).lines("note")]
    assert any("step_00000012.pt is damaged" in note and "step 10." in note for note in notes)
    assert "resumed after step 10 of 16" in notes


def test_accumulation_equals_the_large_batch() -> None:
    """Without dropout and batch statistics the pieces' gradients average to the whole batch's."""
    states = []
    for pieces in (1, 2, 4):
        settings = config(speed={"accumulate": pieces}, optim={"name": "sgd", "lr": 0.1})
        states.append(train(settings, Toy(dropout=0, norm=False))[0].state_dict())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-5, atol=1e-6)


def test_logged_losses_are_the_means_over_steps_and_pieces(tmp_path: Path) -> None:
    settings = config(optim={"name": "sgd", "lr": 1e-9})
    with RunFolder.create(tmp_path, settings) as run:
        _, result = train(settings, Toy(dropout=0, norm=False), run)
    method = Toy(dropout=0, norm=False).eval()
    expected = []
    for batch in list(batches(settings)(0, 16)):
        prepared = batch.prepare("cpu", settings.data.augment.mean, settings.data.augment.std)
        expected.append(method(prepared, Clock(0, 16, 3, 0)))
    lines = read_run(tmp_path).lines("train")
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    for i, line in enumerate(lines):
        for name in ("mean", "teacher"):
            mean = torch.stack([losses[name] for losses in expected[8 * i : 8 * i + 8]]).mean()
            assert line[name] == pytest.approx(mean.item(), rel=1e-4)
        assert line["total"] == pytest.approx(float(line["mean"]) + 0.5 * float(line["teacher"]), rel=1e-5)
        assert 0 < float(line["noise"]) < 1
        assert float(line["images_per_second"]) > 0
        assert 0 <= float(line["data_wait"]) <= 1
        assert float(line["memory_mb"]) > 10
    assert lines[0]["epoch"] == pytest.approx(4 / 3, abs=1e-4)
    assert lines[-1]["lr"] == pytest.approx(1e-9 * 0.5 * (1 + math.cos(math.pi * 11 / 12)))
    assert result.losses == {name: lines[-1][name] for name in ("mean", "teacher", "total")}
    assert [float(line["time"]) for line in lines] == sorted(float(line["time"]) for line in lines)


def test_resumed_metrics_have_each_line_once_and_time_goes_on(tmp_path: Path) -> None:
    settings = config(run={"checkpoint_steps": 6, "log_steps": 1})
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(ZeroDivisionError):
        train(settings, run=run, stream=failing_at(settings, 9))
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        train(settings, run=run)
    lines = read_run(tmp_path).lines("train")
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert float(lines[6]["time"]) > float(lines[5]["time"])


def failing_at(settings: Config, step: int) -> Batches:
    def stream(start: int, total: int) -> Generator[Batch, None, None]:
        yield from batches(settings)(start, step)
        raise ZeroDivisionError

    return stream


def test_frozen_parts_rest_and_followers_keep_their_leaders_mode(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        method, _ = train(run=run)
    assert isinstance(method, Toy)
    assert method.modes == {(True, True, False)}
    assert not method.training
    fresh = Toy().state_dict()
    for name, value in method.state_dict().items():
        if name.startswith(("teacher.", "idle.")):
            assert torch.equal(value, fresh[name]), name
        elif not name.endswith(("running_var", "num_batches_tracked")):
            assert not torch.equal(value, fresh[name]), name
    state = read_checked(tmp_path / "checkpoints" / "step_00000016.pt")
    assert {name.split(".")[0] for name in state["method"]} == {"encoder", "average", "head", "idle", "steps"}
    assert {name.split(".")[0] for name in state["optimizer"]} == {"encoder", "head"}


class Judge:
    """Scores 1, 3, 2, ... in order of the calls."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.steps = iter(scores), list[int]()

    def __call__(self, method: Method) -> dict[str, float]:
        assert isinstance(method, Toy)
        assert not method.training
        assert not torch.is_grad_enabled()
        self.steps.append(int(method.steps))
        torch.rand(3)
        return {"top1": next(self.scores), "loss": 0.5}


def test_evaluations_and_the_best_weights(whole: Method, tmp_path: Path) -> None:
    settings = config(schedule={"eval_epochs": 2})
    judge = Judge([1, 3, 2])
    with RunFolder.create(tmp_path, settings) as run:
        method, result = train(settings, run=run, evaluate=judge)
    assert judge.steps == [6, 12, 16]
    assert (result.best, result.best_step) == ({"top1": 3, "loss": 0.5}, 12)
    assert result.evaluation["top1"] == 2
    assert [(line["step"], line["top1"]) for line in read_run(tmp_path).lines("eval")] == [(6, 1), (12, 3), (16, 2)]
    best = read_checked(tmp_path / "checkpoints" / "best.pt")
    assert best["step"] == 12
    assert int(best["method"]["steps"]) == 12
    assert_same(method, whole)


def test_a_resumed_run_remembers_its_best_and_repeats_only_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    settings = config(schedule={"eval_epochs": 2})
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(TrainingStopped):
        train(settings, run=run, evaluate=Judge([1, 3]), signals={13: signal.SIGTERM})
    judge = Judge([2])
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        _, result = train(settings, run=run, evaluate=judge)
    assert judge.steps == [16]
    assert (result.best_step, result.best["top1"]) == (12, 3)
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        _, again = train(settings, run=run, evaluate=(judge := Judge([2])))
    assert judge.steps == [16]
    assert dataclasses.replace(again, seconds=result.seconds) == result


def test_an_evaluation_that_a_stop_forestalled_is_made_up_for(tmp_path: Path) -> None:
    settings = config(schedule={"eval_epochs": 2})
    judge = Judge([1, 3, 2])
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(TrainingStopped):
        train(settings, run=run, evaluate=judge, signals={5: signal.SIGTERM})
    assert judge.steps == []
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        train(settings, run=run, evaluate=judge)
    assert judge.steps == [6, 12, 16]


def test_an_evaluation_before_the_first_step(whole: Method, tmp_path: Path) -> None:
    settings = config(schedule={"eval_epochs": 2})
    judge = Judge([3, 1, 3, 2])
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(TrainingStopped):
        train(settings, run=run, evaluate=judge, judge_start=True, signals={5: signal.SIGTERM})
    assert judge.steps == [0]
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        method, result = train(settings, run=run, evaluate=judge, judge_start=True)
    assert judge.steps == [0, 6, 12, 16]
    assert [line["step"] for line in read_run(tmp_path).lines("eval")] == [0, 6, 12, 16]
    assert result.best_step == 0
    assert_same(method, whole)


class Looker:
    """Keeps where it looked, and what a training must not notice."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, method: Method, step: int) -> None:
        assert isinstance(method, Toy)
        assert not method.training
        assert not torch.is_grad_enabled()
        assert int(method.steps) == step
        self.steps.append(step)
        torch.rand(3)


def test_moments_are_spread_evenly() -> None:
    assert moments(0, 100) == set()
    assert moments(1, 100) == {100}
    assert moments(2, 100) == {0, 100}
    assert sorted(moments(8, 39)) == [0, 6, 12, 17, 23, 28, 34, 39]
    assert moments(8, 3) == {0, 1, 2, 3}


def test_a_look_now_and_then_changes_nothing(whole: Method, tmp_path: Path) -> None:
    looker = Looker()
    settings = config(run={"pictures": 5, "log_steps": 1})
    with RunFolder.create(tmp_path, settings) as run:
        method, _ = train(settings, run=run, look=looker)
    assert looker.steps == [0, 4, 8, 12, 16]
    assert_same(method, whole)
    train(config(run={"pictures": 0}), look=looker)
    assert len(looker.steps) == 5


def test_a_look_is_no_part_of_the_measured_speed(tmp_path: Path) -> None:
    settings = config(run={"pictures": 5, "log_steps": 4})
    with RunFolder.create(tmp_path, settings) as run:
        train(settings, run=run, look=lambda method, step: time.sleep(0.2))
    speeds = [float(line["images_per_second"]) for line in read_run(tmp_path).lines("train")]
    assert max(speeds[1:]) > 1.5 * 4 * 8 / 0.2, "as fast as if each of these intervals had no look in it"


def test_looks_of_an_interrupted_training(tmp_path: Path) -> None:
    """Stopped at one of the moments, then by a crash: each is seen once more where training continues."""
    settings = config(run={"pictures": 5, "checkpoint_steps": 6})
    stopped, crashed, last = Looker(), Looker(), Looker()
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(TrainingStopped):
        train(settings, run=run, look=stopped, signals={7: signal.SIGTERM})
    with RunFolder.create(tmp_path, settings, resume=True) as run, pytest.raises(ZeroDivisionError):
        train(settings, run=run, look=crashed, stream=failing_at(settings, 14))
    with RunFolder.create(tmp_path, settings, resume=True) as run:
        train(settings, run=run, look=last)
    assert (stopped.steps, crashed.steps, last.steps) == ([0, 4], [8, 12], [12, 16])


class Explodes(Toy):
    """Its loss leaves the finite numbers at a step."""

    def __init__(self, at: int, *, weights_only: bool = False) -> None:
        super().__init__()
        self.at, self.weights_only = at, weights_only

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        losses = super().forward(batch, clock)
        if clock.step == self.at and not self.weights_only:
            losses["teacher"] = losses["teacher"] * torch.tensor(float("inf"))
        return losses

    def after_step(self, clock: Clock) -> None:
        super().after_step(clock)
        if clock.step == self.at and self.weights_only:
            self.head.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize("log_steps", [4, 100])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, log_steps: int) -> None:
    settings = config(run={"log_steps": log_steps, "checkpoint_steps": 6})
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(RunError) as error:
        train(settings, Explodes(9), run)
    found = 12
    assert "not all numbers are finite at step 9 (mean " in str(error.value)
    assert "teacher inf" in str(error.value)
    assert "the newest checkpoint, step 6, is from before. Lower optim.lr (now 0.01)" in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoints/*.pt")] == ["step_00000006.pt"]
    dump = torch.load(tmp_path / f"nonfinite_step_{found}.pt", weights_only=True)
    assert dump["first_step"] == 9
    first = {4: 8, 100: 0}[log_steps]
    assert len(dump["losses"]) == len(dump["indices"]) == found - first
    assert dump["losses"][9 - first]["teacher"] == float("inf")
    assert torch.cat(dump["indices"][9 - first]).tolist() == list(range(72, 80))
    assert "head.weight" in dump["method"]


@pytest.mark.parametrize("log_steps", [6, 100])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, log_steps: int) -> None:
    settings = config(run={"checkpoint_steps": 6, "log_steps": log_steps})
    with RunFolder.create(tmp_path, settings) as run, pytest.raises(RunError, match=r"finite at step 5 \(weights\)"):
        train(settings, Explodes(5, weights_only=True), run)
    assert not list(tmp_path.glob("checkpoints/*.pt"))
    assert (tmp_path / "nonfinite_step_6.pt").exists()


def test_memory_that_runs_out_is_answered_with_a_setting() -> None:
    class Large(Toy):
        def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    with pytest.raises(RunError, match=r"accumulate=4 \(now 2\) or speed\.checkpointing=true, which"):
        train(method=Large())
    with pytest.raises(
        RunError, match=r"out of memory with 4 images at a time; use speed\.accumulate=4 \(now 2\), which"
    ):
        train(config(speed={"checkpointing": True}), Large())


def unreadable_every(settings: Config, step: int) -> Batches:
    def stream(start: int, total: int) -> Generator[Batch, None, None]:
        for i, batch in enumerate(batches(settings)(start, total)):
            yield dataclasses.replace(batch, unreadable=((f"{i}.jpg", "cut short"),) if i % step == 0 else ())

    return stream


def test_unreadable_files_are_listed(tmp_path: Path) -> None:
    settings = config(data={"max_unreadable": 0.13})
    with RunFolder.create(tmp_path, settings) as run:
        train(settings, run=run, stream=unreadable_every(settings, 2))
    assert (tmp_path / "unreadable.txt").read_text().splitlines() == [f"{i}.jpg\tcut short" for i in range(0, 32, 2)]


def test_too_many_unreadable_files_stop_the_run(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run, pytest.raises(DataError) as error:
        train(run=run, stream=unreadable_every(config(), 1))
    # One epoch of 24 images is shorter than the 100 that count otherwise.
    assert "6 of 24 images could not be read, more than data.max_unreadable allows (10%)" in str(error.value)
    assert "4.jpg: cut short" in str(error.value)
    assert str(tmp_path / "unreadable.txt") in str(error.value)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        train(run=run)
    larger = Toy()
    larger.extra = torch.nn.Linear(2, 2)
    wider = Toy()
    wider.head = torch.nn.Linear(8, 3)
    for method, words in (
        (larger, "2 tensors are in only one of them, for example extra.weight"),
        (wider, "head.weight"),
    ):
        with RunFolder.create(tmp_path, config(), resume=True) as run, pytest.raises(RunError, match=re.escape(words)):
            train(method=method, run=run)


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    settings = config(run={"checkpoint_minutes": 1e-9, "keep": 100})
    with RunFolder.create(tmp_path, settings) as run:
        train(settings, run=run)
    assert len(list(tmp_path.glob("checkpoints/step_*.pt"))) == 16


def test_bf16_trains(whole: Method) -> None:
    method, _ = train(config(speed={"precision": "bf16"}))
    difference = (method.get_parameter("head.weight") - whole.get_parameter("head.weight")).abs().max()
    assert 0 < difference.item() < 0.01
    assert all(parameter.dtype == torch.float32 for parameter in method.parameters())


def test_plan_counts_in_steps() -> None:
    assert Plan.make(ScheduleSettings(epochs=100, warmup_epochs=5, eval_epochs=10), 7) == Plan(700, 35, 70, 7)
    assert Plan.make(ScheduleSettings(steps=50, warmup=0.1, eval_epochs=0), 7) == Plan(50, 5, 0, 7)
    assert Plan.make(ScheduleSettings(epochs=0.5, eval_epochs=0.01), 7) == Plan(4, 0, 1, 7)
    assert [step for step in range(11) if Plan(10, 0, 4, 2).evaluates(step)] == [4, 8, 10]
    assert [step for step in range(11) if Plan(10, 0, 0, 2).evaluates(step)] == [10]
    with pytest.raises(ConfigError, match=r"warm-up of 35 steps is not shorter than the training of 20 steps \(7 per"):
        Plan.make(ScheduleSettings(steps=20, warmup_epochs=5), 7)


def test_the_images_are_closed_when_training_fails() -> None:
    closed = []

    def stream(start: int, total: int) -> Generator[Batch, None, None]:
        try:
            yield from batches(config())(start, total)
        finally:
            closed.append(True)

    class Fails(Toy):
        def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(method=Fails(), stream=stream)
    assert closed == [True]
