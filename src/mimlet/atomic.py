"""Writing files so that nobody ever reads half of one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mimlet.errors import RunError, TryAgain

_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EIO", "EROFS", "ENOMEM", "EMFILE", "ENFILE"),
        *("ESTALE", "ENODEV", "ENXIO", "EREMOTEIO", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
)
"""What a full, failing or vanished disk answers. Anything else is about the path: a right that is missing, say."""


def disk_error(error: OSError, text: str) -> RunError:
    """The error to raise where the disk refuses, with `text`: `TryAgain` where it is the disk's fault."""
    return (TryAgain if error.errno in _MACHINE else RunError)(text)


@contextmanager
def replacing(path: Path, what: str = "") -> Iterator[BinaryIO]:
    """A file under a temporary name in the same folder, which is made where it is missing. When the block ends, it is
    flushed to disk and takes the name `path`; when the block fails, nothing is left of it.

    `RunError` in plain words when the disk refuses, `TryAgain` where it is full or failing; `what` is said beside the
    name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        text = f"cannot write {path}{what}: {error.strerror or error}. What was there before is untouched"
        raise disk_error(error, text) from None


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a whole file or none, as `replacing` does."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with replacing(path, f" ({len(data):,} bytes)") as file:
        file.write(data)
