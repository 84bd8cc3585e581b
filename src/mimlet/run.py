"""The run folder: what a training leaves behind, and what everything else reads.

    config.json         the resolved settings, a recipe that repeats the run
    environment.json    versions, hardware, the command
    metrics.jsonl       one JSON object per line: step, epoch, kind (train, eval or note), time, and the values
    unreadable.txt      name<TAB>reason of files that could not be read
    tensorboard/        the same metrics for TensorBoard
    checkpoints/        see `mimlet.train.checkpoint`

Reading one needs no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TextIO

from mimlet.atomic import write_atomic
from mimlet.config import Config, changed_settings, load_config
from mimlet.errors import RunError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Value = float | int | str
Kind = Literal["train", "eval", "note"]
Line = dict[str, Value]
"""One line of `metrics.jsonl`: the `LINE_KEYS`, then the values."""

LINE_KEYS = ("step", "epoch", "kind", "time")

PACKAGES = ("mimlet", "torch", "torchvision", "timm", "lightning-fabric", "safetensors", "numpy")


@dataclass(frozen=True)
class Run:
    """A run folder as it stands. `environment["previous"]` lists the environments before each resume."""

    path: Path
    config: Config
    environment: dict[str, object]
    metrics: list[Line]

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def lines(self, kind: str) -> list[Line]:
        """The metrics of one kind, in order."""
        return [line for line in self.metrics if line["kind"] == kind]


def read_run(path: str | Path) -> Run:
    """Reads a run folder. `RunError` when it is none, or when its files are damaged."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        kind = "has no config.json" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise RunError(f"{folder} is not a run folder: it {kind}. Expected a folder that a mimlet run wrote (--out)")
    return Run(
        folder, load_config(folder / "config.json"), _read_environment(folder), read_metrics(folder / "metrics.jsonl")
    )


def read_metrics(path: Path) -> list[Line]:
    """All whole lines of a metrics file; none where there is no file. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    *whole, _cut_short = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None


class RunFolder:
    """The run folder of a training in progress, locked against a second one.

    Only the first process of a training has one. `resumed` tells whether the folder held a run already; its checkpoints
    and metrics are then to be continued.
    """

    def __init__(self, path: Path, config: Config, lock: TextIO, resumed: bool) -> None:
        self.path, self.config, self.resumed = path, config, resumed
        self._lock = lock
        self._unreadable = self.path / "unreadable.txt"
        self._known = (
            set(self._unreadable.read_text(encoding="utf-8").splitlines()) if self._unreadable.exists() else set()
        )
        self._purge_step: int | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Config,
        *,
        resume: bool = False,
        allow_changes: bool = False,
        command: Sequence[str] = (),
    ) -> RunFolder:
        """Makes or continues a run folder and records settings and environment.

        `resume` continues a run that is there, and starts one where there is none, so that the same command can be
        repeated. Raises `RunError` when a run is there and `resume` was not asked for, when it was made with other
        settings (`allow_changes` accepts them), when another process uses the folder, or when it cannot be written.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise RunError(f"{folder} is a file, not a folder; give another --out") from None
        except OSError as error:
            raise RunError(
                f"cannot make the run folder {folder}: {error.strerror or error}; give another --out"
            ) from None
        lock = _lock(folder)
        try:
            exists = (folder / "config.json").exists()
            if exists:
                _check_resume(folder, config, resume, allow_changes)
            for leftover in folder.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            environment = describe_environment(command)
            if exists:
                before = _read_environment(folder)
                earlier = before.pop("previous", [])
                assert isinstance(earlier, list)
                environment["previous"] = [*earlier, before]
            write_atomic(folder / "config.json", json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
            write_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        except BaseException:
            lock.close()
            raise
        return cls(folder, config, lock, exists)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def rewind(self, step: int) -> list[Line]:
        """Forgets what was logged after `step` steps, because training continues from there; returns the lines that
        stay.
        """
        path = self.path / "metrics.jsonl"
        lines = [line for line in read_metrics(path) if int(line["step"]) <= step]
        if path.exists():
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._purge_step = step + 1
        return lines

    def log(self, kind: Kind, step: int, epoch: float, time: float, values: Mapping[str, Value]) -> None:
        """Appends a line. `step`: optimiser steps done; `time`: seconds of training so far, over all resumes."""
        line: Line = {"step": step, "epoch": round(epoch, 4), "kind": kind, "time": round(time, 3), **values}
        self._append(self.path / "metrics.jsonl", json.dumps(line) + "\n")
        if self.config.run.tensorboard:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def unreadable(self, files: Iterable[tuple[str, str]]) -> None:
        """Lists (name, reason) of files that could not be read, each once."""
        lines = (f"{_one_line(name)}\t{_one_line(reason)}" for name, reason in files)
        new = [line for line in dict.fromkeys(lines) if line not in self._known]
        if new:
            self._known.update(new)
            self._append(self._unreadable, "".join(f"{line}\n" for line in new))

    def close(self) -> None:
        """Flushes TensorBoard's events and releases the lock."""
        if "_writer" in self.__dict__:
            self._writer.close()
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def _writer(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.path / "tensorboard"), purge_step=self._purge_step)

    def _append(self, path: Path, text: str) -> None:
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def describe_environment(command: Sequence[str]) -> dict[str, object]:
    """Versions, hardware and the command line: what someone needs to know to repeat a number."""
    import torch

    return {
        "command": list(command),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _check_resume(folder: Path, config: Config, resume: bool, allow_changes: bool) -> None:
    if not resume:
        raise RunError(f"{folder} already holds a run; continue it with --resume, or give another --out")
    changes = changed_settings(load_config(folder / "config.json"), config)
    if changes and not allow_changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise RunError(
            f"the run in {folder} was made with other settings (then -> now):\n{listed}\n"
            "Repeat its settings, accept the new ones with --allow-changes, or give another --out"
        )


def _lock(folder: Path) -> TextIO:
    """Takes the folder for this process until the returned file is closed or the process ends."""
    try:
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"cannot write in the run folder {folder}: {error.strerror or error}; give another --out"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise RunError(
            f"{folder} is in use by process {owner or 'unknown'}; wait until it ends, or give another --out"
        ) from None
    # Loader processes share the lock with us and may outlive a kill by seconds: they let go of it at once.
    os.register_at_fork(after_in_child=file.close)
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file


def _read_environment(folder: Path) -> dict[str, object]:
    path = folder / "environment.json"
    try:
        environment: dict[str, object] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    return environment


def _one_line(text: str) -> str:
    return " ".join(text.split())
