"""What the fuzz tests share: how many examples, mutations of valid files, and a watch over what a reader does.

`MIMLET_FUZZ=50` tries fifty times as many examples, at random (`make fuzz`); without it the few that are tried are
always the same.
"""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from mimlet.data.decode import UnreadableImage
from mimlet.errors import UserError

SCALE = int(os.environ.get("MIMLET_FUZZ", "1"))
SECONDS = 30
"""A reader that takes longer hangs."""

T = TypeVar("T")
Test = TypeVar("Test", bound=Callable[..., None])


def fuzzed(examples: int, shrink: bool = True) -> Callable[[Test], Test]:
    """Settings of a property: `examples` in CI; whether a failing one is made small, which takes hundreds more."""
    return settings(
        max_examples=examples * SCALE,
        derandomize=SCALE == 1,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])),
        suppress_health_check=list(HealthCheck),
    )


# ---------------------------------------------------------------- bytes

Edit = tuple[str, float, int]
KINDS = ("flip", "set", "number", "text", "cut", "drop", "insert", "repeat", "swap", "splice")
NUMBERS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**5)
EDITS = st.lists(st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=5)


def mutated(data: bytes, edits: list[Edit], other: bytes = b"") -> bytes:
    """`data` with edits, each a kind, a place as a share of the length, and a number that says the rest. `other`: a
    file that parts are taken from.
    """
    for kind, share, number in edits:
        data = _edited(bytearray(data), kind, min(int(share * len(data)), max(len(data) - 1, 0)), number, other)
    return data


def _edited(data: bytearray, kind: str, at: int, number: int, other: bytes) -> bytes:
    rest, size = divmod(number, 64)
    if kind == "flip":
        data[at : at + 1] = bytes(byte ^ (1 << rest % 8) for byte in data[at : at + 1])
    elif kind == "set":
        data[at : at + size % 4 + 1] = bytes([rest % 256]) * (size % 4 + 1)
    elif kind == "number":
        width, value = (1, 2, 4, 8)[size % 4], NUMBERS[rest % len(NUMBERS)]
        order = "big" if size & 4 else "little"
        data[at : at + width] = (value % 256**width).to_bytes(width, order)
    elif kind == "text":
        data[at : at + 3] = (b"-1\0", b"999", b"../", b"\x1b[2", b"\xff\xfe\x80", b"NaN")[rest % 6]
    elif kind == "cut":
        del data[at:]
    elif kind == "drop":
        del data[at : at + 1 + size]
    elif kind == "insert":
        data[at:at] = Random(rest).randbytes(1 + size)
    elif kind == "repeat":
        data[at:at] = data[at : at + 1 + size * 8]
    elif kind == "swap":
        there = rest % max(len(data), 1)
        first, second = data[at : at + 16], data[there : there + 16]
        if len(first) == len(second) == 16 and abs(at - there) >= 16:
            data[at : at + 16], data[there : there + 16] = second, first
    elif kind == "splice":
        start = rest % max(len(other), 1)
        data[at:at] = other[start : start + 1 + size * 4]
    return bytes(data)


# ---------------------------------------------------------------- JSON

TEXTS = st.sampled_from(
    ("", "x", "../../x", "/etc/passwd", "a\0b", "\x1b]0;x\x07", "\u202e", "\ud800", "<script>", "1e999", "9" * 5000)
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from((-1, 0, 10**9, 1e300, math.inf, math.nan))
    | TEXTS
)
BRANCHES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(TEXTS, LEAVES, max_size=2)
VALUES = BRANCHES | st.lists(BRANCHES, max_size=2) | st.dictionaries(TEXTS, BRANCHES, max_size=2)
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(("set", "set", "drop", "add")), VALUES), max_size=4)


def changed(values: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """JSON with other values at places that numbers choose."""
    for choice, kind, value in changes:
        places = [*_places(values)]
        if not places:
            return value
        parent, key = places[choice % len(places)]
        if kind == "drop":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[f"{key}?"] = value
        else:
            parent[key] = value
    return values


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = [*value] if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


# ---------------------------------------------------------------- the watch

RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.startfile", "subprocess.Popen", "pty.spawn", "socket.connect")
CHANGES_FILES = ("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_caught: list[str] | None = None
_allowed: Path | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells of everything that could do harm; a hook cannot be taken away again."""
    if _caught is None:
        return
    if event in RUNS:
        _caught.append(f"{event} {arguments!r:.200}")
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    if writes or event in CHANGES_FILES:
        _note(event, arguments[0])


def _note(event: str, path: object) -> None:
    if not isinstance(path, str | bytes) or (name := os.fsdecode(path)) == os.devnull:
        return
    assert _caught is not None
    places = [place for place in (_allowed, os.environ.get("MIMLET_CACHE")) if place]
    if not any(Path(name).absolute().is_relative_to(place) for place in places):
        _caught.append(f"{event} {name}")


sys.addaudithook(_hook)


class Hangs(BaseException):
    """Which no reader takes for an error of a file."""


@contextmanager
def watched(allowed: Path | None = None) -> Iterator[None]:
    """No program is run, nothing is fetched, nothing is written outside of `allowed` and the cache, and it ends."""
    global _caught, _allowed

    def stop(number: int, frame: object) -> None:
        raise Hangs(f"still not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _caught, _allowed = [], allowed and allowed.absolute()
    try:
        yield
    finally:
        caught, _caught = _caught, None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        assert not caught, caught


class Refused(str):
    """What a reader said against a file."""


def attempt(
    read: Callable[[], T], errors: tuple[type[Exception], ...] = (UserError,), allowed: Path | None = None
) -> T | Refused:
    """What `read` returns, or what it says against the file, in words."""
    try:
        with watched(allowed):
            return read()
    except errors as error:
        said = Refused(error)
    assert said.strip(), "refused without a word"
    return said


IMAGE_ERRORS = (UnreadableImage, OSError)
"""What reading an image of a source may raise; training goes on with another one."""
