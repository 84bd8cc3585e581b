"""Writing files so that nobody ever reads half of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mimlet.errors import RunError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes to a temporary name in the same folder, flushes to disk, renames. Makes the folder where it is missing.

    `RunError` in plain words when the disk refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(
            f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}. What was there before is untouched"
        ) from None
