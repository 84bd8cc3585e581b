"""A process that has imported everything once, and forks a command of mimlet whenever it is asked.

Importing torch takes longer than the trainings of these tests. What is forked here is what `python -m mimlet` is after
its imports: the server computes nothing and has one thread, a child leads a session of its own, has its own streams
and the signal handlers of a fresh interpreter, and runs what is registered for the end. Only the taking down of modules
is left out, which would copy all of the server's memory. Kills during the imports, and the proof that a real process
behaves the same, are left to `test_kills.test_real_processes`.

Requests and answers are lines of JSON: `{"arguments", "log", "fault"}` -> the process id; `{"poll": pid}` -> the exit
code, minus the signal's number, or null while it runs.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TIMEOUT = 180.0
"""Seconds after which a process counts as hanging."""


class Nursery:
    """The client's side."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: object) -> Any:
        """One answer."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, arguments: list[str], log: Path, *fault: object) -> Process:
        """Runs `mimlet ARGUMENTS`, its output in `log`, under a fault: a name in `tests.faults.faults`, and its
        arguments.
        """
        log.write_bytes(b"")
        return Process(self, self.ask(arguments=arguments, log=str(log), fault=[*map(_plain, fault)]), log)

    def close(self) -> None:
        """The server ends, and what still runs with it."""
        with self.server:  # closes both pipes, and waits
            pass


class Process:
    """A command under way."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.nursery, self.pid, self.log = nursery, pid, log
        self.code: int | None = None

    @property
    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.code is None:
            self.code = self.nursery.ask(poll=self.pid)
        return self.code

    def wait(self) -> int:
        """The exit code, in the end."""
        until = time.monotonic() + TIMEOUT
        while (code := self.poll()) is None:
            assert time.monotonic() < until, f"process {self.pid} hangs:\n{self.said}"
            time.sleep(0.005)
        return code

    def send(self, number: int, *, group: bool = False) -> None:
        """A signal, to the process or to all of its group."""
        if self.poll() is None:  # not yet waited for, so the number is still its own
            (os.killpg if group else os.kill)(self.pid, number)

    def others(self) -> list[int]:
        """Processes that it has started and that still run."""
        return [pid for pid in session(self.pid) if pid != self.pid]


def session(leader: int) -> list[int]:
    """Running processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(number) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _serve() -> None:
    """The server's side. Returns in a child, with everything set up."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None = None
        if pid := request.get("poll"):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                running.remove(pid)
                answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                return _be_born(**request)
            running.add(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in running:
        os.kill(pid, 9)
    os._exit(0)


def _be_born(arguments: list[str], log: str, fault: list[Any]) -> None:
    os.setsid()
    streams = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
    for number, stream in ((0, streams[0]), (1, streams[1]), (2, streams[1])):
        os.dup2(stream, number)
    sys.argv = ["mimlet", *arguments]
    if fault:
        name, *values = fault
        getattr(faults, name)(*values)


if __name__ == "__main__":
    import mimlet.api
    import mimlet.data.packing
    import mimlet.methods.mae
    import mimlet.methods.simmim
    import mimlet.tasks.classify  # noqa: F401
    from mimlet.cli import run
    from tests.faults import faults

    gc.freeze()  # else the collector would copy it
    try:
        _serve()
        code = run()
    except KeyboardInterrupt:  # in the moments around the command
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
