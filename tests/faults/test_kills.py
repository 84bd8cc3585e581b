"""Processes that are ended at any moment: the same command goes on, and comes to the same, bit for bit."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mimlet.run import LOCK
from tests.faults.cases import STEPS, Cases, logged, results, wait_for_step
from tests.faults.nursery import TIMEOUT

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
CODES = {KILL: {-KILL}, TERM: {143, -TERM}, INT: {130, -INT}}
"""Outside of training SIGTERM ends a process as it ends any other: there is nothing to save."""
NAMES = ("mae", "loader", "classify", "compare")


@pytest.mark.parametrize("seed", [pytest.param(i, marks=[pytest.mark.full] if i >= 6 else []) for i in range(100)])
def test_ended_at_a_random_moment(seed: int, cases: Cases, tmp_path: Path) -> None:
    """Once, or several times in a row; a signal to the process alone, or to its loader processes as well."""
    name, number = NAMES[seed % 4], (KILL, TERM, INT)[seed % 3]
    draw, case, out, killed = random.Random(seed), cases[name], tmp_path / "run", []
    ended, to_do = [], draw.choice((1, 1, 1, 2, 3))
    latest = STEPS
    while len(ended) < to_do:
        step = draw.choice((0, latest, draw.randint(0, latest), draw.randint(0, latest)))
        delay, group = draw.uniform(0, 0.5 if step in (0, STEPS) else 0.05), draw.random() < 0.5
        process = case.start(out)
        wait_for_step(process, out, step)
        time.sleep(delay)
        where = f"{delay:.3f} s after step {step} (at {logged(out)}){', with its loader processes' if group else ''}"
        process.send(number, group=group)
        code = process.wait()
        killed.append(process)
        if code == 0:  # it was faster: once more, earlier
            latest = max(0, latest - 1)
            case.finish(out)
            out = out.with_name(f"{out.name}_")
            continue
        ended.append(f"{name}, seed {seed}: {number.name} {where}")
        assert code in CODES[number], f"{ended}: {code}\n{process.said}"
        assert "Traceback" not in process.said, f"{ended}\n{process.said}"
        if code in (130, 143) and "saving after this step" in process.said:
            assert re.search(rf"stopped by {number.name} after step \d+ of {STEPS}; saved in .*--resume", process.said)
    try:
        case.finish(out)
    except AssertionError as error:
        raise AssertionError(f"{ended}: {error}") from error
    until = time.monotonic() + TIMEOUT  # loader processes notice within seconds that nobody is there any more
    while any(process.others() for process in killed):
        assert time.monotonic() < until, f"{ended}: loader processes are left over"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["classify", pytest.param("compare", marks=pytest.mark.full)])
def test_killed_at_every_touch_of_a_file(name: str, full: bool, cases: Cases, tmp_path: Path) -> None:
    """All a run does to its folder, one by one: checkpoints, metrics, pictures, the exported model, the report."""
    case, whole = cases[name].but("--steps", "2", "run.report=true"), tmp_path / "whole"
    assert case.start(whole, "die", 0, whole).wait() == 0
    case = replace(case, whole=results(whole))
    events = whole.with_name("whole.events").read_text().splitlines()
    assert sum("os.rename" in event for event in events) >= 12
    chosen = range(1, len(events) + 1)
    for event in chosen if full else random.Random(0).sample(chosen, 2):
        out = tmp_path / f"run{event}"
        process = case.start(out, "die", event, out)
        assert process.wait() == -KILL, f"event {event}, {events[event - 1]}: {process.said}"
        try:
            case.finish(out)
        except AssertionError as error:
            raise AssertionError(f"killed at event {event}, {events[event - 1]}: {error}") from error


@pytest.mark.full
def test_real_processes(cases: Cases, tmp_path: Path) -> None:
    """`python -m mimlet`, ended while it imports, while it trains and while it exports; its loader processes too."""
    case = cases["loader"]
    draw, out = random.Random(7), tmp_path / "run"
    for step, delay in ((0, draw.uniform(0, 3)), (draw.randint(1, STEPS // 2), 0.01), (0, 0.5), (STEPS, 0.05)):
        number = draw.choice((KILL, TERM, INT))
        more = ["--resume"] if (out / LOCK).exists() else []
        process = subprocess.Popen(
            [sys.executable, "-m", "mimlet", *case.arguments, "--out", str(out), *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        while process.poll() is None and step and logged(out) < step:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(number)
        said = process.communicate(timeout=TIMEOUT)[1]
        assert process.returncode in CODES[number] | {0}, said
    case.finish(out)


@pytest.mark.parametrize("number", [TERM, pytest.param(INT, marks=pytest.mark.full)])
def test_everybody_is_asked_to_stop(number: signal.Signals, cases: Cases, tmp_path: Path) -> None:
    """A terminal and a scheduler send it to the loader processes as well: these leave the answer to their parent."""
    case, out = cases["loader"], tmp_path / "run"
    process = case.start(out, "slow", 0.05)
    wait_for_step(process, out, 3)
    process.send(number, group=True)
    assert process.wait() == 128 + number, process.said
    assert f"stopped by {number.name} after step" in process.said
    case.finish(out)
