"""Commands that are broken on purpose, what they come to when they are not, and how the two are compared."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mimlet.run import LOCK, read_run
from mimlet.train.checkpoint import read_checked
from tests.faults.nursery import Nursery, Process
from tests.tiny import ENCODER, SPEED, finetune_arguments, pretrain_arguments

STEPS = 24
CIRCUMSTANCES = {"time", "images_per_second", "data_wait", "memory_mb"}
OFTEN = ("run.checkpoint_steps=1", "run.log_steps=1", "run.pictures=4")


@dataclass
class Case:
    """A command, and what it leaves when nothing is broken."""

    nursery: Nursery
    arguments: list[str]
    whole: dict[str, Any]

    def but(self, *settings: str) -> Case:
        """With other settings: of `run` and `speed`, or there is another `whole`."""
        return replace(self, arguments=[*self.arguments, *settings])

    def start(self, out: Path, *fault: object, log: str = "said.log") -> Process:
        """Begins or continues the training in a folder, under a fault."""
        more = ["--resume"] if any(out.rglob(LOCK)) else []  # until then there is nothing but an empty folder
        return self.nursery.start([*self.arguments, "--out", str(out), *more], out.with_name(log), *fault)

    def finish(self, out: Path) -> Process:
        """Continues to the end. Everything in the folder is then as if nothing had happened."""
        process = self.start(out)
        assert process.wait() == 0, process.said
        found = results(out)
        for name, value in self.whole.items():
            assert found.get(name) == value, f"{name} differs:\n{found.get(name)}\nis not\n{value}\n{process.said}"
        assert found.keys() == self.whole.keys()
        return process


class Cases:
    """By name, made when they are asked for."""

    def __init__(self, nursery: Nursery, photos: Path, folder: Path) -> None:
        self.nursery, self.folder = nursery, folder
        steps = ("--steps", str(STEPS))
        labels = ("method.mixup=0.5", "method.erasing=0.5", "method.ema_decay=0.5", "encoder.drop_path=0.2")
        often = ("schedule.eval_epochs=1", "run.report=true")
        judged = ("--labelled", str(photos), "schedule.eval_epochs=2")
        mae = (*steps, *OFTEN, *judged, "speed.accumulate=2", "data.max_unreadable=0")
        images = ("--data", str(photos), "--batch", "8", "--workers", "0")
        self.commands = {
            "mae": pretrain_arguments(photos, Path(), *mae),
            "loader": pretrain_arguments(photos, Path(), *mae, "--workers", "2"),
            "classify": finetune_arguments(photos, Path(), *steps, *labels, *OFTEN, *often),
            "compare": ["compare", "mae_micro32", "simmim_micro32", *images, *steps, *ENCODER, *SPEED, *OFTEN],
        }
        self.made: dict[str, Case] = {}

    def __getitem__(self, name: str) -> Case:
        if name not in self.made:
            arguments = self.commands[name]
            if name == "loader":  # loader processes change nothing
                self.made[name] = Case(self.nursery, arguments, self["mae"].whole)
            else:
                case = Case(self.nursery, arguments, {})
                out = self.folder / name
                process = case.start(out)
                assert process.wait() == 0, process.said
                self.made[name] = Case(self.nursery, arguments, results(out))
        return self.made[name]


def results(out: Path) -> dict[str, Any]:
    """What the runs in a folder have come to, and which files there are; without times, places and what is there only
    because something was broken. Checks what holds for every run.
    """
    found: dict[str, Any] = {}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    found["files"] = sorted(file for file in files if not re.search(r"nonfinite_step_|unreadable\.txt", file))
    for path in (path for path in sorted(out.rglob("*")) if path.suffix in (".safetensors", ".png", ".csv")):
        found[str(path.relative_to(out))] = path.read_bytes()
    for config in sorted(out.rglob("config.json")):
        run = read_run(config.parent)
        for path in sorted(run.checkpoints.glob("*.pt")):
            state = read_checked(path)
            state.pop("seconds", None)
            found[str(path.relative_to(out))] = _plain(state)
        lines = run.metrics
        steps = [line["step"] for line in run.lines("train")]
        assert steps == sorted(set(steps)), f"steps are logged twice: {steps}"
        times = [float(line["time"]) for line in lines if line["kind"] != "note"]
        assert min(times) >= 0, times
        assert times == sorted(times), times
        assert all(float(line["images_per_second"]) > 0 for line in run.lines("train"))
        assert all(0 <= float(line["data_wait"]) <= 1 for line in run.lines("train"))
        kept = [line for line in lines if line["kind"] != "note"]
        found[f"{config.parent.relative_to(out)}/metrics"] = [
            {name: value for name, value in line.items() if name not in CIRCUMSTANCES} for line in kept
        ]
    return found


def logged(out: Path) -> int:
    """Steps that a training has logged; of several the furthest."""
    found = 0
    for path in out.rglob("metrics.jsonl"):
        lines = [line for line in path.read_text().split("\n")[:-1] if '"train"' in line]
        found = max(found, int(json.loads(lines[-1])["step"]) if lines else 0)
    return found


def wait_for_step(process: Process, out: Path, step: int) -> None:
    """Until the training has logged a step, or has ended."""
    while process.poll() is None and (step and logged(out) < step):
        time.sleep(0.002)


def _plain(value: Any) -> Any:
    """Nested states, comparable bit for bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
