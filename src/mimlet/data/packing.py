"""Writing packed images (`mimlet.data.pack`): in parallel, so that it can be killed and repeated, and with equal bytes
whatever the number of processes.

Which images go into which shard is a function of the list of images and of the recipe alone. A process writes a whole
shard under a temporary name, and then a note of what is in it, so what is finished stays finished. The notes become the
index at the end, and pack.json is the last file that is written.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, features
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from mimlet.atomic import disk_error, replacing, write_atomic
from mimlet.data.augment import short_side
from mimlet.data.decode import Encoded, UnreadableImage, decode
from mimlet.data.loader import loaded
from mimlet.data.pack import (
    ENTRY,
    INDEX_FILE,
    LONGEST_NAME,
    NAMES_FILE,
    PACK_FILE,
    UNFINISHED_FILE,
    UNREADABLE_FILE,
    Pack,
    Packed,
    Recipe,
    check_shards,
    damaged,
    read_pack,
    shard_name,
)
from mimlet.data.pixels import extent
from mimlet.data.source import Paths, Source, counted, open_source, path_list
from mimlet.errors import DataError, TrainingStopped, TryAgain, UserError
from mimlet.train.signals import answered_signals
from mimlet.untrusted import parse_json, printable, read_regular, what_is_wrong

FILTER = "bicubic, antialiased (torch.nn.functional.interpolate on uint8)"
SHARD_BYTES = 256 * 2**20
"""Of a shard of common photographs, with sides of 4 : 3; there may be three times as much in one of panoramas."""
SMALLEST_SHARD, ENOUGH_SHARDS = 64, 64
"""Few images are divided so that this many processes have something to do."""
_JPEG_BYTES = 0.5
"""Per pixel, on the high side."""


def pack(
    data: Paths,
    to: str | Path,
    *,
    form: Literal["raw", "jpeg"] = "jpeg",
    side: int = 256,
    quality: int = 90,
    labelled: bool = False,
    workers: int = -1,
    max_unreadable: float = 0.1,
) -> Pack:
    """Packs the images of any data paths into the folder `to`, which is then a data path itself.

    Images are brought to the short side `side` (antialiased, aspect kept, of longer ones than 4 : 1 the middle; never
    enlarged) and stored as pixels (`raw`) or as JPEG of `quality`; a JPEG that is upright and no larger than that stays
    as it is, byte for byte. `labelled`: as in `open_source`; labels that are plain to see are kept without it. Images
    that cannot be read are left out and listed; more than the share `max_unreadable` stops it. `workers`: processes;
    -1: as many as there are processors.

    What is finished is kept when it ends early, and the same call goes on from there. Raises `DataError` for another
    call than the one that was begun, `TryAgain` when the disk is full or the images are out of reach, and
    `TrainingStopped` after a signal.
    """
    paths, folder = path_list(data), Path(os.path.expanduser(to))
    source = open_source(paths, labelled=labelled)
    recipe = Recipe(
        form=form,
        side=side,
        quality=quality,
        labelled=labelled,
        filter=FILTER,
        software={name: version(name) for name in ("mimlet", "torch", "pillow")}
        | {"libjpeg-turbo": features.version("libjpeg_turbo") or ""},
        listing=_digest(source),
    )
    say = partial(Console(stderr=True, highlight=False).print, markup=False, soft_wrap=True)
    with _alone(folder):
        if not _begun(folder, recipe):
            say(source.describe())
            job = _Job(source, folder, recipe, max_unreadable)
            _write_shards(job, workers)
            _finish(job, paths)
        packed = read_pack(str(folder))
        for leftover in (folder / UNFINISHED_FILE, *folder.glob("*.part")):
            leftover.unlink(missing_ok=True)
    sys.stdout.write(_summary(folder, packed) + "\n")
    return packed


def verify_pack(folder: str | Path) -> int:
    """Reads a whole pack and compares it with its checksums; prints what is damaged, line by line. The number of
    images. Raises `DataError` if anything is.
    """
    source, console = Packed(str(folder), False, whole=False), Console(stderr=True)
    found = 0
    rows = track(range(len(source)), "verifying", console=console, transient=True, disable=not console.is_terminal)
    for name, reason in damaged(source, rows):
        found += 1
        sys.stdout.write(_line(f"{name}: {reason}"))
    if found:
        raise DataError(
            f"{folder} is damaged in {counted(found, 'place')}, listed above; copy it again, or pack the images again "
            "into another folder. Training would do without the damaged images"
        )
    sys.stdout.write(f"{source.describe()}: all is as it was packed\n")
    return len(source)


@dataclass(frozen=True)
class _Note:
    """What is in a finished shard. Names are counted from the shard's first."""

    entries: NDArray[np.void]
    names: bytes
    unreadable: tuple[tuple[str, str], ...]

    def write(self, path: Path) -> None:
        stream = io.BytesIO()
        unreadable = np.frombuffer(json.dumps(self.unreadable).encode(), np.uint8)
        np.savez(stream, entries=self.entries, names=np.frombuffer(self.names, np.uint8), unreadable=unreadable)
        write_atomic(path, stream.getvalue())

    @staticmethod
    def read(path: Path) -> _Note | None:
        """None where it is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                unreadable = tuple((name, reason) for name, reason in json.loads(saved["unreadable"].tobytes()))
                note = _Note(saved["entries"], saved["names"].tobytes(), unreadable)
        except Exception:  # the reader raises nearly every type on damaged files
            return None
        return note if note.entries.dtype == ENTRY else None

    @property
    def size(self) -> int:
        """Bytes of the shard."""
        return int(self.entries["size"].sum(dtype=np.int64))


@dataclass(frozen=True)
class _Job(Dataset["list[tuple[str, str]] | UserError"]):
    """All shards of a pack. Item k is shard k: it is written, and what could not be read comes back.

    Errors are returned, not raised: from a worker process an exception would come as a traceback.
    """

    source: Source
    folder: Path
    recipe: Recipe
    max_unreadable: float

    @property
    def per_shard(self) -> int:
        """Images."""
        recipe = self.recipe
        typical = 4 / 3 * recipe.side**2 * (3 if recipe.form == "raw" else _JPEG_BYTES)
        most = max(1, int(SHARD_BYTES / typical))
        return min(most, max(SMALLEST_SHARD, -(-len(self.source) // ENOUGH_SHARDS)))

    def __len__(self) -> int:
        return -(-len(self.source) // self.per_shard)

    def __getitem__(self, number: int) -> list[tuple[str, str]] | UserError:
        try:
            return self._write(number)
        except UserError as error:
            return error

    def note(self, number: int) -> _Note | None:
        """What is in shard `number`, if it is finished."""
        note = _Note.read(self._note_path(number))
        shard = self.folder / shard_name(number)
        return note if note and shard.is_file() and shard.stat().st_size == note.size else None

    def _note_path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.part"

    def _write(self, number: int) -> list[tuple[str, str]]:
        first = number * self.per_shard
        rows = range(first, min(first + self.per_shard, len(self.source)))
        entries: list[tuple[int, ...]] = []
        names, unreadable = bytearray(), []
        offset = unreached = 0
        with replacing(self.folder / shard_name(number)) as shard:
            for row in rows:
                try:
                    record, height, width = _record(self.source.read(row), self.recipe)
                except (UnreadableImage, OSError) as error:
                    reason = getattr(error, "strerror", None) or str(error)
                    unreadable.append((self.source.name(row), reason))
                    if isinstance(error, OSError):
                        unreached += 1
                        stop = disk_error(error, f"cannot read {unreadable[-1][0]}: {reason}. {_AGAIN}")
                        if isinstance(stop, TryAgain):
                            raise stop from None
                    continue
                known = self.source.name(row).encode("utf-8", "replace")[:LONGEST_NAME]
                place = (xxh3_64_intdigest(record), offset, len(names), number, len(record), len(known))
                entries.append((*place, self.source.label(row), height, width))
                names += known
                offset += shard.write(record)
            if unreached > self.max_unreadable * len(rows):
                name, reason = unreadable[0]
                raise TryAgain(
                    f"{unreached:,} of {len(rows):,} images in a row are out of reach, such as {name}: {reason}. They "
                    f"were there when they were listed: is the folder still mounted? {_AGAIN}"
                )
        _Note(np.array(entries, ENTRY), bytes(names), tuple(unreadable)).write(self._note_path(number))
        return unreadable


_AGAIN = "What is packed is kept, and the same command goes on"


def _record(data: Encoded, recipe: Recipe) -> tuple[bytes, int, int]:
    """What is stored of an image, and its height and width."""
    image = decode(data)
    width, height = extent(image)
    short = min(width, height)
    if recipe.form == "jpeg" and short <= recipe.side and isinstance(data, bytes) and _stays(data):
        return data, height, width
    pixels = short_side(image, min(recipe.side, short), "bicubic").permute(1, 2, 0).contiguous().numpy()
    height, width, _ = pixels.shape
    if recipe.form == "raw":
        return pixels.tobytes(), height, width
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=recipe.quality)
    return stream.getvalue(), height, width


def _stays(data: bytes) -> bool:
    """Whether a readable image is what every reader understands alike: an upright RGB or grey JPEG, at most 4 : 1."""
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # another format, or damaged EXIF data, at which Pillow's readers raise nearly every type
        return False
    return upright and image.format == "JPEG" and image.mode in ("RGB", "L") and max(image.size) <= 4 * min(image.size)


def _write_shards(job: _Job, workers: int) -> None:
    """Writes the shards that are not finished."""
    notes = {number: job.note(number) for number in range(len(job))}
    todo = [number for number, note in notes.items() if note is None]
    unreadable = sum(len(note.unreadable) for note in notes.values() if note)
    if workers < 0:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loader: DataLoader[list[tuple[str, str]] | UserError] = DataLoader(
        job,
        batch_size=None,
        sampler=todo,
        num_workers=min(workers, len(todo)),  # torch gives each of them one thread
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the loader draws its seed from the global generator
    )
    console = Console(stderr=True)
    with answered_signals(shown=True) as stop:
        shown = track(
            loaded(loader), "packing", len(todo), console=console, transient=True, disable=not console.is_terminal
        )
        for done, result in enumerate(shown, 1):
            if isinstance(result, UserError):
                raise result
            unreadable += len(result)
            if unreadable > job.max_unreadable * len(job.source):
                name, reason = result[0]
                raise DataError(
                    f"{unreadable:,} of {len(job.source):,} images could not be read, more than the share "
                    f"{job.max_unreadable:g} (--max-unreadable), such as {name}: {reason}"
                )
            if stop.code and done < len(todo):
                left = f"{len(todo) - done} of {counted(len(job), 'shard')} are left"
                raise TrainingStopped(f"stopped, {left}. {_AGAIN}", stop.code)


def _as_it_is(result: object) -> object:
    return result


def _finish(job: _Job, paths: list[str]) -> None:
    """Notes -> index, names and pack.json."""
    notes = [note for number in range(len(job)) if (note := job.note(number))]
    if len(notes) < len(job):
        raise TryAgain(f"{len(job) - len(notes)} of {counted(len(job), 'shard')} in {job.folder} are gone. {_AGAIN}")
    entries = np.concatenate([note.entries for note in notes])
    if not len(entries):
        raise DataError(f"none of the {counted(len(job.source), 'image')} could be read")
    starts = np.cumsum([0, *(len(note.names) for note in notes)])[:-1]
    entries["name"] += np.repeat(starts, [len(note.entries) for note in notes]).astype(np.uint64)
    index, names = entries.tobytes(), b"".join(note.names for note in notes)
    unreadable = [file for note in notes for file in note.unreadable]
    described = Pack(
        recipe=job.recipe,
        source=paths,
        classes=job.source.classes,
        images=len(entries),
        unreadable=len(unreadable),
        shards=[note.size for note in notes],
        index=xxh3_64_hexdigest(index),
        names=xxh3_64_hexdigest(names),
    )
    write_atomic(job.folder / INDEX_FILE, index)
    write_atomic(job.folder / NAMES_FILE, names)
    if unreadable:
        lines = (_line(name).rstrip("\n") + "\t" + _line(reason) for name, reason in unreadable)
        write_atomic(job.folder / UNREADABLE_FILE, "".join(lines))
    write_atomic(job.folder / PACK_FILE, described.model_dump_json(indent=2) + "\n")


def _line(text: str) -> str:
    return printable(" ".join(text.split())) + "\n"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Takes the folder, which is made where it is missing, for this process. `TryAgain` where another one has it."""
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    except OSError as error:
        raise disk_error(error, f"cannot write in the folder {folder}: {error.strerror or error}") from None
    # Loader processes share the lock with us and may outlive a kill by seconds: they let go of it at once.
    os.register_at_fork(after_in_child=file.close)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryAgain(
                f"another process is packing into {folder}; wait until it ends, or give another --to"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _begun(folder: Path, recipe: Recipe) -> bool:
    """Prepares the folder for packing to begin, or to go on; whether there is nothing left to do.

    `DataError` where it holds something else.
    """
    finished, unfinished = folder / PACK_FILE, folder / UNFINISHED_FILE
    if finished.is_file():
        packed = read_pack(str(folder))
        _check_same(folder, packed.recipe, recipe)
        check_shards(str(folder), str(folder), packed)
        return True
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if unfinished.is_file():
        try:
            before = Recipe.model_validate(parse_json(read_regular(unfinished)))
        except (OSError, ValueError) as error:
            reason = what_is_wrong(error) if isinstance(error, ValueError) else error.strerror
            raise DataError(f"{unfinished} is damaged: {reason}; give another --to") from None
        _check_same(folder, before, recipe)
    elif others := sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock"):
        raise DataError(f"{folder} is not empty: it holds {others[0]}; give a new folder (--to)")
    else:
        write_atomic(unfinished, recipe.model_dump_json(indent=2) + "\n")
    return False


def _check_same(folder: Path, before: Recipe, now: Recipe) -> None:
    said = {"listing": "other images, names or labels", "software": "other versions: "}
    then, new = before.model_dump(), now.model_dump()
    differ = []
    for name in then:
        if then[name] != new[name]:
            values = "" if name == "listing" else f"{then[name]} -> {new[name]}"
            differ.append(said.get(name, f"{name} ") + values)
    if differ:
        raise DataError(
            f"{folder} was begun otherwise (then -> now): {'; '.join(differ)}. Repeat what it was begun with, or give "
            "another --to"
        )


def _digest(source: Source) -> str:
    """Of names, labels and classes."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(source)):
        digest.update(source.name(i).encode("utf-8", "replace") + b"\0")
    digest.update(source.labels.tobytes() + json.dumps(source.classes).encode())
    return digest.hexdigest()


def _summary(folder: Path, packed: Pack) -> str:
    """What there is, and how to train with it."""
    left_out = (
        f", {counted(packed.unreadable, 'unreadable one')} left out ({UNREADABLE_FILE})" if packed.unreadable else ""
    )
    size = packed.size + packed.images * ENTRY.itemsize + (folder / NAMES_FILE).stat().st_size
    return (
        f"{folder}: {counted(packed.images, 'image')}{left_out}, {counted(len(packed.shards), 'shard')}, "
        f"{size / 1e6:,.1f} MB. Train with it:\n\n  mimlet pretrain --data {shlex.quote(str(folder))}"
    )
