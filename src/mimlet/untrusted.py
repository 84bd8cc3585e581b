"""What others have written: files that may be anything, and text that may hold anything.

Whatever comes from a file is read through here or through a reader of its format, and shown through `printable`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

MAX_BYTES = 2**30
"""An encoded image of more bytes is refused."""
MAX_DEPTH = 100
"""JSON that is nested deeper is refused: whatever walks it later does so by recursion."""
MAX_TOML, MAX_DOTS = 2**20, 200
"""A longer recipe is refused, and a longer chain of keys (or numbers) on a line of it."""


def read_regular(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    `OSError` for anything else: a pipe would be waited for, and a device never ends. Links are followed.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, more than the limit of {limit:,}", str(path))
        return file.read(size)


def open_regular(path: str | Path) -> IO[bytes]:
    """The same, to be read bit by bit."""
    try:
        file = open(path, "rb", opener=_unblocked)  # noqa: SIM115
    except ValueError as error:  # a name with a null byte
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def check_inflation(file: Path | IO[bytes], size: int) -> None:
    """`ValueError` for a zip whose parts are larger than its `size` bytes: PyTorch's files are not compressed, so it is
    made to fill the memory. Other files pass.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        inflated = sum(part.file_size for part in archive.infolist())
    if inflated > size:
        raise ValueError(f"it is compressed, which PyTorch's files are not, and would grow to {inflated:,} bytes")


def torchs_reason(error: Exception) -> str:
    """What `torch.load` says against a file; nothing where it goes on to advise reading it unsafely."""
    return "" if "weights_only" in str(error) else " ".join(str(error).split())[:200].rstrip(".")


def parse_json(text: str | bytes) -> Any:
    """What JSON holds. `ValueError` says what is wrong with it: also nesting beyond `MAX_DEPTH`."""
    return _flat(json.loads, text)


def parse_toml(text: str) -> Any:
    """The same for TOML, whose parser takes the square of the dots in a key."""
    if len(text) > MAX_TOML or any(line.count(".") > MAX_DOTS for line in text.splitlines()):
        raise ValueError(f"it has more than {MAX_TOML:,} characters, or more than {MAX_DOTS} dots in a line")
    return _flat(tomllib.loads, text)


def _flat(parse: Callable[[Any], Any], text: str | bytes) -> Any:
    try:
        values = parse(text)
        level = [values]
        for _ in range(MAX_DEPTH):
            level = [each for value in level for each in _inside(value)]
    except RecursionError:
        level = [None]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return values


def printable(text: str, *, lines: bool = False) -> str:
    """Text for a terminal: control characters, and what reorders or hides text, are escaped. With `lines`, line breaks
    and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or (lines and letter in "\n\t") else letter.encode("unicode_escape").decode()
        for letter in text
    )


def what_is_wrong(error: ValueError) -> str:
    """The first problem that a check has found, with its place, on one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def _unblocked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _inside(value: object) -> list[Any]:
    return [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
