"""The run folder: what a training leaves behind, and what everything else reads.

    config.json         the resolved settings, a recipe that repeats the run
    environment.json    versions, hardware, the command
    metrics.jsonl       one JSON object per line: step, epoch, kind (train, eval or note), time, and the values
    unreadable.txt      name<TAB>reason of files that could not be read
    pictures/           of fixed training images: original.png, visible.png (other methods have other rows), and what
                        the method made of them after so many steps, 00001234.png
    pictures.json       the labels of these rows in order, and how to read them
    tensorboard/        the same metrics and pictures for TensorBoard
    loggers.json        what W&B and MLflow know the run by
    checkpoints/        see `mimlet.train.checkpoint`

Reading one needs no torch.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO, cast

from pydantic import TypeAdapter

from mimlet.atomic import disk_error, write_atomic
from mimlet.config import Config, changed_settings, load_config
from mimlet.errors import ConfigError, RunError, TryAgain
from mimlet.loggers import Sink, TensorBoard, abandon, open_sinks
from mimlet.untrusted import parse_json, printable, read_regular, what_is_wrong

Value = float | int | str
Kind = Literal["train", "eval", "note"]
Line = dict[str, Value]
"""One line of `metrics.jsonl`: the `LINE_KEYS`, then the values."""

LINE_KEYS = ("step", "epoch", "kind", "time")
SHOWN_CHANGES = 3

LOCK = ".lock"
"""The first file of a run folder: what holds it while a process trains into it."""

PACKAGES = ("mimlet", "torch", "torchvision", "timm", "lightning-fabric", "safetensors", "numpy")


@dataclass(frozen=True)
class Shown:
    """What a run's pictures are: labels of the rows, the last of which changes in training, and how to read them.

    The defaults are those of runs that have no `pictures.json`.
    """

    rows: tuple[str, ...] = ("original", "visible", "reconstruction")
    caption: str = "Hidden patches are predicted, visible ones are the original."


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
    """All whole lines of a metrics file; none where there is no file. A last line that a kill cut short is left out.

    `RunError` names the first line that is none of ours.
    """
    if not path.is_file():
        return []
    *whole, _cut_short = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_line(path, number, text) for number, text in enumerate(whole, 1)]


def read_pictures(folder: Path) -> dict[str, bytes]:
    """The pictures in a run folder, PNG by name, in order: `original`, `visible`, `step 0`, ... `step 1,234`."""
    moments = {f"step {step:,}": path for step, path in sorted(_moments(folder).items())}
    files = {label: folder / "pictures" / f"{label}.png" for label in read_shown(folder).rows[:-1]} | moments
    return {name: read_picture(path) for name, path in files.items() if path.is_file()}


def read_picture(path: Path) -> bytes:
    """A PNG file. `RunError` where it is none, or damaged."""
    from PIL import Image

    try:
        data = read_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(data), formats=["PNG"]).load()
    except Exception as error:  # Pillow's readers raise nearly every type on damaged files
        raise RunError(f"{path} is no whole picture: {' '.join(str(error).split())}") from None
    return data


def read_shown(folder: Path) -> Shown:
    """What the pictures in a run folder are."""
    path = folder / "pictures.json"
    if not path.is_file():
        return Shown()
    try:
        shown = TypeAdapter(Shown).validate_python(parse_json(path.read_bytes()))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {what_is_wrong(error)}; remove it to go on") from None
    odd = [label for label in shown.rows if not re.fullmatch(r"[^/\\.][^/\\]{,99}", label) or not label.isprintable()]
    if odd or not shown.rows:
        raise RunError(
            f"{path} is damaged: rows have plain names, got {odd[0] if odd else 'none'!r}; remove it to go on"
        )
    return shown


class RunFolder:
    """The run folder of a training in progress, locked against a second one.

    Only the first process of a training has one. `resumed` tells whether the folder held a run already; its checkpoints
    and metrics are then to be continued.
    """

    def __init__(self, path: Path, config: Config, lock: TextIO, resumed: bool, sinks: dict[str, Sink]) -> None:
        self.path, self.config, self.resumed = path, config, resumed
        self._lock, self._sinks = lock, sinks
        self._now = 0, 0.0, 0.0
        self._unreadable = self.path / "unreadable.txt"
        self._known = (
            set(self._unreadable.read_text(encoding="utf-8", errors="replace").splitlines())
            if self._unreadable.is_file()
            else set()
        )

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
        """Makes or continues a run folder, records settings and environment, starts the loggers.

        `resume` continues a run that is there, and starts one where there is none, so that the same command can be
        repeated. Raises `RunError` when a run is there and `resume` was not asked for, when it was made with other
        settings (`allow_changes` accepts them), when it cannot be written, or when a logger does not start; `TryAgain`
        when another process uses the folder, or the disk is full; `ConfigError` when a logger's package is missing.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise RunError(f"{folder} is a file, not a folder; give another --out") from None
        except OSError as error:
            text = f"cannot make the run folder {folder}: {error.strerror or error}; give another --out"
            raise disk_error(error, text) from None
        lock = _lock(folder)
        sinks: dict[str, Sink] = {}
        try:
            exists = (folder / "config.json").exists()
            if exists:
                _check_resume(folder, config, resume, allow_changes)
            for leftover in folder.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            for name in ("metrics.jsonl", "unreadable.txt"):
                _cut_short(folder / name)
            sinks = open_sinks(folder, config)
            environment = describe_environment(command)
            if exists:
                before = _read_environment(folder)
                earlier = before.pop("previous", [])
                environment["previous"] = [*(earlier if isinstance(earlier, list) else ()), before]
            write_atomic(folder / "config.json", json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
            write_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        except BaseException:
            abandon(sinks)
            lock.close()
            raise
        return cls(folder, config, lock, exists, sinks)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def rewind(self, step: int) -> list[Line]:
        """Forgets what was logged and shown after the checkpoint of `step` steps, because training continues from
        there; returns the lines that stay. An evaluation at `step` came after it and is forgotten: what else it was to
        leave (`best.pt`, results per class) may be missing.
        """
        path = self.path / "metrics.jsonl"
        lines = [line for line in read_metrics(path) if (int(line["step"]), line["kind"] == "eval") < (step, True)]
        if path.exists():
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        for moment, picture in _moments(self.path).items():
            if moment > step:
                picture.unlink()
        if lines:
            self._now = step, float(lines[-1]["epoch"]), float(lines[-1]["time"])
        if isinstance(board := self._sinks.get("tensorboard"), TensorBoard):
            board.purge_step = step + 1
        return lines

    def log(self, kind: Kind, step: int, epoch: float, time: float, values: Mapping[str, Value]) -> None:
        """Appends a line. `step`: optimiser steps done; `time`: seconds of training so far, over all resumes."""
        self.check_place()
        line: Line = {"step": step, "epoch": round(epoch, 4), "kind": kind, "time": round(time, 3), **values}
        self._append(self.path / "metrics.jsonl", json.dumps(line) + "\n")
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        self._now = step, epoch, time
        if numbers:
            self._tell(lambda sink: sink.scalars(kind, step, numbers))

    def image(self, name: str, step: int, png: bytes) -> None:
        """Shows a picture in the loggers."""
        self._tell(lambda sink: sink.image(name, step, png))

    def has_picture(self, step: int) -> bool:
        """Whether there is a picture of the moment after `step` steps."""
        return step in _moments(self.path)

    def shows(self, rows: Iterable[str], caption: str) -> None:
        """Says what the run's pictures are. Where the rows have changed, the earlier moments are forgotten."""
        self.check_place()
        shown = Shown(tuple(rows), caption)
        if shown.rows != read_shown(self.path).rows:
            self._forget_moments()
        write_atomic(self.path / "pictures.json", json.dumps(asdict(shown), indent=2) + "\n")

    def picture(self, step: int, rows: Mapping[str, bytes], caption: str = "") -> None:
        """Keeps the last of the labelled rows, what the method makes of fixed images after `step` steps, and once the
        others, which do not change.

        Where these have changed (other images after --allow-changes) the earlier moments are forgotten.
        """
        self.shows(rows, caption)
        folder, (*fixed, last) = self.path / "pictures", rows
        for label in fixed:
            path = folder / f"{label}.png"
            if not path.is_file() or path.read_bytes() != rows[label]:
                self._forget_moments()
                write_atomic(path, rows[label])
                self.image(label, step, rows[label])
        write_atomic(folder / f"{step:08d}.png", rows[last])
        self.image(last, step, rows[last])

    def unreadable(self, files: Iterable[tuple[str, str]]) -> None:
        """Lists (name, reason) of files that could not be read, each once."""
        lines = (f"{_one_line(name)}\t{_one_line(reason)}" for name, reason in files)
        new = [line for line in dict.fromkeys(lines) if line not in self._known]
        if new:
            self._known.update(new)
            self._append(self._unreadable, "".join(f"{line}\n" for line in new))

    def check_place(self) -> None:
        """`TryAgain` where the folder that was locked is no longer there: a file written under its name would make
        another one, which is no run.
        """
        try:
            there = os.path.samestat(os.fstat(self._lock.fileno()), (self.path / LOCK).stat())
        except OSError:
            there = False
        if not there:
            raise TryAgain(f"the run folder {self.path} was moved, removed or unmounted while it was trained into")

    def close(self, failed: bool = False) -> None:
        """Ends the loggers and releases the lock. `failed`: see `mimlet.loggers.Sink`."""
        self._tell(lambda sink: sink.close(failed))
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _forget_moments(self) -> None:
        for moment in _moments(self.path).values():
            moment.unlink()

    def _tell(self, call: Callable[[Sink], None]) -> None:
        """Hands something to every logger. One that fails is noted and left out: training is worth more."""
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # whatever their packages raise
                del self._sinks[name]
                text = f"{name} failed and gets no more: {type(error).__name__}: {_one_line(str(error))}"
                warnings.warn(text, stacklevel=3)
                self.log("note", *self._now, {"text": text})

    def _append(self, path: Path, text: str) -> None:
        try:
            with _own(path).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise disk_error(error, f"cannot write {path}: {error.strerror or error}") from None


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
    path = folder / "config.json"
    try:
        before = load_config(path)
    except ConfigError as error:
        text = f"{path} is damaged, or of another version; remove it to go on with the settings given now"
        raise RunError(f"{text}:\n{error}") from None
    changes = changed_settings(before, config)
    if changes and not allow_changes:
        shown = changes if len(changes) <= SHOWN_CHANGES else changes[: SHOWN_CHANGES - 1]
        more = [f"and {len(changes) - len(shown)} more"] if len(shown) < len(changes) else []
        listed = "\n".join(f"  {change}" for change in [*shown, *more])
        raise RunError(
            f"the run in {folder} was made with other settings (then -> now):\n{listed}\n"
            "Repeat its settings, accept the new ones with --allow-changes, or give another --out"
        )


def _owner(file: TextIO) -> str:
    """Who holds the lock. It writes that once it has it: for a moment there is still the process before, or nobody."""
    for patience in (0.05,) * 20:
        file.seek(0)
        pid, _, node = file.read(100).strip().partition(" on ")
        if node and (node != platform.node() or _lives(pid)):
            return f"{pid} on {node}"
        time.sleep(patience)
    return "unknown"


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _lock(folder: Path) -> TextIO:
    """Takes the folder for this process until the returned file is closed or the process ends."""
    try:
        file = _own(folder / LOCK).open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                owner = _owner(file)
            raise TryAgain(
                f"{folder} is in use by process {owner}; wait until it ends, or give another --out"
            ) from None
        # Loader processes share the lock with us and may outlive a kill by seconds: they let go of it at once.
        os.register_at_fork(after_in_child=file.close)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
    except OSError as error:  # a full disk refuses the first byte, some shared file systems the lock
        text = f"cannot write in the run folder {folder}, or lock it: {error.strerror or error}; give another --out"
        raise disk_error(error, text) from None
    return file


def _read_environment(folder: Path) -> dict[str, object]:
    path = folder / "environment.json"
    try:
        environment = parse_json(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; remove it to go on") from None
    if not isinstance(environment, dict):
        raise RunError(f"{path} is damaged: expected an object, got {type(environment).__name__}; remove it to go on")
    return environment


def _moments(folder: Path) -> dict[int, Path]:
    """The pictures of moments in a run folder, by step."""
    names = ((re.fullmatch(r"(\d+)\.png", path.name), path) for path in (folder / "pictures").glob("*.png"))
    return {int(match[1]): path for match, path in names if match}


def _cut_short(path: Path) -> None:
    """Takes away a last line that was never finished, so that the next one does not continue it."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomic(path, whole)


def _line(path: Path, number: int, text: str) -> Line:
    """A line of `metrics.jsonl`, which has the `LINE_KEYS` and otherwise numbers and texts."""
    try:
        line = parse_json(text)
    except ValueError as error:
        raise RunError(f"{path} is damaged: line {number}: {error}; remove that line to go on") from None
    whole = isinstance(line, dict) and all(
        isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63) for value in line.values()
    )
    known = whole and isinstance(line.get("kind"), str) and isinstance(line.get("step"), int) and line["step"] >= 0
    if not known or not all(isinstance(line.get(key), int | float) and line[key] >= 0 for key in ("epoch", "time")):
        raise RunError(f"{path} is damaged: line {number} is none of a run's, {text[:80]!r}; remove that line to go on")
    return cast(Line, line)


def _own(path: Path) -> Path:
    """A file that is written in place. Not through a link: what it points to may lie outside the run."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, which would be written through", str(path))
    return path


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
