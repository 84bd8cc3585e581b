"""Lists of image files, cached so that a million of them open at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimlet.errors import DataError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2")
SUFFIXES = frozenset(
    (*_JPEG, ".png", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""File names with these endings (any case) count as images."""

Stamp = tuple[int, int]
"""Modification time in ns, and size."""

_FORMAT = 1
_SETTLED = 2_000_000_000  # ns; some file systems store times in steps of two seconds


@dataclass(frozen=True)
class Strings:
    """Many strings in two arrays: small, quick to save, and shared between forked processes.

    (A list of strings is copied page by page as soon as a worker counts references.)
    """

    text: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @staticmethod
    def of(strings: Sequence[str]) -> Strings:
        """Packs strings. Undecodable bytes of file names survive the round trip."""
        parts = [string.encode("utf-8", "surrogateescape") for string in strings]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return Strings(np.frombuffer(b"".join(parts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = int(self.ends[i - 1]) if i else 0
        return self.text[start : int(self.ends[i])].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Listing:
    """The n image files below a folder or in an archive, ordered by folder, then name.

    `folders`: relative paths with `/`, '' for the root. `folder_of` [n]: index into it. `names`: file names without
    folder.
    `places` [n,k]: where an archive holds each file ([n,0] for folders). `ignored`: number of other files by suffix,
    and `hidden`.
    """

    folders: tuple[str, ...]
    folder_of: NDArray[np.int32]
    names: Strings
    places: NDArray[np.int64]
    ignored: Mapping[str, int]

    @staticmethod
    def of(found: Mapping[str, Sequence[tuple[str, tuple[int, ...]]]], ignored: Mapping[str, int]) -> Listing:
        """From {folder: [(file name, place)]} in any order."""
        folders = sorted((folder for folder in found if found[folder]), key=lambda folder: folder.split("/"))
        files = [file for folder in folders for file in sorted(found[folder])]
        return Listing(
            tuple(folders),
            np.repeat(np.arange(len(folders), dtype=np.int32), [len(found[folder]) for folder in folders]),
            Strings.of([name for name, _ in files]),
            np.array([place for _, place in files], np.int64).reshape(len(files), -1 if files else 0),
            dict(ignored),
        )

    def __len__(self) -> int:
        return len(self.folder_of)

    def path(self, i: int) -> str:
        """Path of file i relative to the root."""
        folder = self.folders[self.folder_of[i]]
        return f"{folder.rstrip('/')}/{self.names[i]}" if folder else self.names[i]

    def labels(self, depth: int = 0) -> tuple[list[str], NDArray[np.int64]]:
        """Sorted names of the folders `depth` levels below the root, and the class of each file [n], -1 above them."""
        tops = ["".join(folder.split("/")[depth : depth + 1]) for folder in self.folders]
        classes = sorted(set(tops) - {""})
        ids = {name: i for i, name in enumerate(classes)}
        by_folder = np.array([ids.get(top, -1) for top in tops], np.int64)
        return classes, by_folder[self.folder_of]


def is_image(name: str) -> bool:
    """Whether a file name ends as an image's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def suffix(name: str) -> str:
    """The kind a file that is no image is counted under."""
    return os.path.splitext(name)[1].lower() or "(no suffix)"


def list_folder(root: str, *, cache: bool = True) -> Listing:
    """All images below a folder, links followed, hidden files and folders left out.

    With `cache` the list is kept in `cache_folder()` and reused while no directory below `root` has changed: what is
    compared are the times of directories, not of files. A cache that cannot be written or read is done without.
    `DataError` if a folder is closed.
    """
    return _cached(root, _walk, cache)


def list_archive(path: str, scan: Callable[[str], Listing], *, cache: bool = True) -> Listing:
    """What `scan` finds in an archive; with `cache` reused while the file's time and size stay."""

    def stamped(path: str) -> tuple[Listing, dict[str, Stamp]]:
        stamp = _stamp(path)
        return scan(path), {path: stamp}

    return _cached(path, stamped, cache)


def cache_folder() -> Path:
    """$MIMLET_CACHE, or ~/.cache/mimlet."""
    return Path(os.environ.get("MIMLET_CACHE") or os.path.expanduser("~/.cache/mimlet"))


def _cached(path: str, scan: Callable[[str], tuple[Listing, dict[str, Stamp]]], cache: bool) -> Listing:
    path = os.path.abspath(path)
    identity = "\0".join([str(_FORMAT), *sorted(SUFFIXES), path]).encode("utf-8", "surrogateescape")
    file = cache_folder() / "index" / f"{hashlib.blake2b(identity, digest_size=16).hexdigest()}.npz"
    if cache and (known := _load(file)) is not None:
        return known
    began = time.time_ns()
    listing, stamps = scan(path)
    # What changed a moment ago may change again within the same tick of the file system's clock, unseen.
    settled = max(changed for changed, _ in stamps.values()) < began - _SETTLED
    if cache and settled and len(listing):
        with contextlib.suppress(OSError):
            _save(file, listing, stamps)
    return listing


def _walk(root: str) -> tuple[Listing, dict[str, Stamp]]:
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    ignored: Counter[str] = Counter()
    stamps: dict[str, Stamp] = {}
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while todo:
        folder, above = todo.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in above:  # a link to a folder it lies in
                continue
            above = (*above, (status.st_dev, status.st_ino))
            stamps[path] = status.st_mtime_ns, status.st_size
            files = found.setdefault(folder, [])
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        ignored["hidden"] += 1
                    elif _is_folder(entry):
                        todo.append((f"{folder}/{entry.name}" if folder else entry.name, above))
                    elif is_image(entry.name):
                        files.append((entry.name, ()))
                    else:
                        ignored[suffix(entry.name)] += 1
        except OSError as error:
            raise DataError(f"cannot read the folder {path}: {error.strerror}") from None
    return Listing.of(found, ignored), stamps


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def _stamp(path: str) -> Stamp:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _save(file: Path, listing: Listing, stamps: Mapping[str, Stamp]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
        try:
            np.savez(
                stream,
                folders=Strings.of(["\0".join(listing.folders)]).text,
                folder_of=listing.folder_of,
                text=listing.names.text,
                ends=listing.names.ends,
                places=listing.places,
                ignored=Strings.of(["\0".join(listing.ignored)]).text,
                ignored_counts=np.array(list(listing.ignored.values()), np.int64),
                watched=Strings.of(["\0".join(stamps)]).text,
                stamps=np.array(list(stamps.values()), np.int64),
            )
            stream.close()
            os.replace(stream.name, file)
        except BaseException:
            os.unlink(stream.name)
            raise


def _load(file: Path) -> Listing | None:
    """The cached listing, or None if there is none, or it is stale or damaged."""

    def split(joined: NDArray[np.uint8]) -> list[str]:
        return Strings(joined, np.array([joined.size]))[0].split("\0")

    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as saved:
            for path, stamp in zip(split(saved["watched"]), saved["stamps"].tolist(), strict=True):
                if _stamp(path) != tuple(stamp):
                    return None
            listing = Listing(
                tuple(split(saved["folders"])),
                saved["folder_of"],
                Strings(saved["text"], saved["ends"]),
                saved["places"],
                dict(zip(split(saved["ignored"]), saved["ignored_counts"].tolist(), strict=False)),
            )
    except Exception:  # the reader raises nearly every type on damaged files
        return None
    return listing if _is_whole(listing) else None


def _is_whole(listing: Listing) -> bool:
    """Whether the arrays of a listing fit each other."""
    folder_of, (text, ends), places = listing.folder_of, (listing.names.text, listing.names.ends), listing.places
    arrays = ((folder_of, np.int32, 1), (text, np.uint8, 1), (ends, np.int64, 1), (places, np.int64, 2))
    return (
        all(array.dtype == kind and array.ndim == axes for array, kind, axes in arrays)
        and len(folder_of) == len(ends) == len(places) > 0
        and places.shape[1] in (0, 3)
        and 0 <= folder_of.min() <= folder_of.max() < len(listing.folders)
        and 0 <= ends[0] <= ends[-1] == len(text)
        and bool((np.diff(ends) >= 0).all())
    )
