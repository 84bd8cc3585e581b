"""Packed images: a folder with an index and shards, read by number and checked record by record.

    pack.json      what it is: `Pack`
    index.bin      one `ENTRY` per image, in order
    names.bin      the images' names (UTF-8), one behind the other
    00000.bin ...  shards: records, one behind the other; nothing else
    unreadable.txt what could not be packed, name<TAB>reason; only where there is something

docs/data.md says why it is this and no library's format, with the figures. A record is a JPEG file, or the pixels
[H,W,3] uint8 of a `raw` pack. Every record has a checksum, which is looked at whenever it is read. Reading writes
nothing and locks nothing, and nothing that a file says can lead outside of it. `mimlet.data.packing` writes packs.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from xxhash import xxh3_64, xxh3_64_hexdigest, xxh3_64_intdigest

from mimlet.data.decode import Encoded, UnreadableImage
from mimlet.data.source import Source, counted
from mimlet.errors import DataError
from mimlet.section import Section
from mimlet.untrusted import MAX_BYTES, open_regular, parse_json, read_regular, what_is_wrong

PACK_FILE, UNFINISHED_FILE = "pack.json", "packing.json"
INDEX_FILE, NAMES_FILE, UNREADABLE_FILE = "index.bin", "names.bin", "unreadable.txt"

ENTRY = np.dtype(
    [
        ("checksum", "<u8"),  # XXH3 (64 bits) of the record
        ("offset", "<u8"),  # of the record in its shard
        ("name", "<u8"),  # offset of the name in names.bin
        ("shard", "<u4"),
        ("size", "<u4"),  # bytes of the record
        ("name_size", "<u4"),
        ("label", "<i4"),  # index into the classes, -1: unknown
        ("height", "<u2"),
        ("width", "<u2"),
    ]
)
"""What the index knows of an image: 44 bytes."""

OPEN_FILES = 128
"""So many files a process keeps open; the others are opened again when they are needed."""

LONGEST_NAME = 2**16

_Hex = Field(pattern="^[0-9a-f]{16}$")


class Recipe(Section):
    """All that a pack is made by. Equal recipes and images give equal bytes, so this is what has to agree where packing
    goes on.
    """

    form: Literal["raw", "jpeg"]
    side: int = Field(ge=1, le=4096, description="short side in pixels; smaller images stay as they are")
    quality: int = Field(ge=1, le=100, description="of JPEG")
    labelled: bool
    filter: str
    software: dict[str, str]
    listing: str = Field(description="a digest of the names and labels, in their order")


class Pack(Section):
    """pack.json."""

    format: Literal["mimlet-pack"] = "mimlet-pack"
    version: Literal[1] = 1
    recipe: Recipe
    source: list[str]
    classes: list[str]
    images: int = Field(ge=1)
    unreadable: int = Field(ge=0)
    shards: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(description="bytes of each")
    index: str = _Hex
    names: str = _Hex

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return sum(self.shards)


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{number:05d}.bin"


def is_pack(folder: str) -> bool:
    """Whether a folder holds a pack, maybe with a file missing. `DataError` if it is not packed to its end."""

    def has(name: str) -> bool:
        return os.path.isfile(os.path.join(folder, name))

    if not has(PACK_FILE) and has(UNFINISHED_FILE):
        raise DataError(f"{folder} is not packed to its end; repeat the `mimlet pack` command, which goes on")
    return has(PACK_FILE) + has(INDEX_FILE) + has(shard_name(0)) > 1


def read_pack(folder: str) -> Pack:
    """pack.json, checked. `DataError` if it is damaged or of a newer version."""
    path = os.path.join(folder, PACK_FILE)
    try:
        values = parse_json(read_regular(path))
        if isinstance(values, dict) and values.get("version", 1) != 1:
            raise DataError(f"{path} is of version {values['version']!r}, and this is mimlet for version 1; update it")
        return Pack.model_validate(values)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: {what_is_wrong(error)}") from None


class Packed(Source):
    """The images of a pack.

    With `labelled`, images without a label are left out; no labels at all is an error. `whole`: refuse a pack of which
    shards are missing or too short. Any number of processes can read, but not several threads of one. Raises
    `DataError`.
    """

    def __init__(self, path: str, labelled: bool, *, whole: bool = True) -> None:
        self._path, self.folder = path, os.path.expanduser(path)
        self.pack = read_pack(self.folder)
        entries = _read_index(self.folder, self.pack)
        if whole:
            check_shards(path, self.folder, self.pack)
        self.classes = list(self.pack.classes)
        known = entries["label"] >= 0
        if labelled and not self.classes:
            raise DataError(f"{path} was packed without labels; pack labelled images (mimlet pack --labelled)")
        self._left_out = int((~known).sum()) if labelled else 0
        self._entries = entries[known] if self._left_out else entries
        self.labels = self._entries["label"].astype(np.int64)
        self._raw = self.pack.recipe.form == "raw"
        self._files = _Files(self.folder)

    def name(self, i: int) -> str:
        """See `Source`."""
        _, _, start, _, _, size, *_ = self._entries[i].item()
        try:
            name = os.pread(self._files[NAMES_FILE], min(size, LONGEST_NAME), start)
        except (OSError, OverflowError):  # the images may be whole
            name = b""
        return name.decode("utf-8", "replace") or f"{self._path}#{i}"

    def read(self, i: int) -> Encoded:
        """See `Source`. Bytes of a JPEG, or pixels [H,W,3]."""
        checksum, start, _, shard, size, _, _, height, width = self._entries[i].item()
        record = np.empty(size, np.uint8)
        # preadv leaves the file's position alone, so that forked workers can share the descriptor.
        got = os.preadv(self._files[shard_name(shard)], [record.data], start)
        if got < size or xxh3_64_intdigest(record.data) != checksum:
            damage = "is cut off" if got < size else "does not have its checksum"
            raise UnreadableImage(f"damaged: the record at byte {start:,} of {shard_name(shard)} {damage}")
        return record.reshape(height, width, 3) if self._raw else record.tobytes()

    def describe(self) -> str:
        """See `Source`."""
        recipe = self.pack.recipe
        packed = f"packed as {'raw pixels' if self._raw else 'JPEG'} of short side {recipe.side}"
        noun = f"{counted(len(self.classes), 'class')}, " if self.classes else ""
        text = f"{counted(len(self), 'image')} in {self._path} ({noun}{packed})"
        return text + (f"; {counted(self._left_out, 'image')} without a label left out" if self._left_out else "")


class _Files:
    """Descriptors of the files last used. Opened anew wherever this is sent."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._opened: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close, self._opened)

    def __getitem__(self, name: str) -> int:
        if name in self._opened:
            self._opened.move_to_end(name)
        else:
            descriptor = os.open(os.path.join(self._folder, name), os.O_RDONLY | os.O_NONBLOCK)
            if len(self._opened) >= OPEN_FILES:
                os.close(self._opened.popitem(last=False)[1])
            self._opened[name] = descriptor
        return self._opened[name]

    def __reduce__(self) -> tuple[type[_Files], tuple[str]]:
        return _Files, (self._folder,)


def _close(opened: OrderedDict[str, int]) -> None:
    for descriptor in opened.values():
        os.close(descriptor)


def shard_problems(folder: str, pack: Pack) -> Iterator[tuple[str, str]]:
    """Names of shards whose size is wrong, and what is wrong with it."""
    for number, size in enumerate(pack.shards):
        try:
            found = os.stat(os.path.join(folder, shard_name(number))).st_size
        except OSError as error:
            yield shard_name(number), error.strerror or str(error)
        else:
            if found != size:
                yield shard_name(number), f"{found:,} bytes, not {size:,}"


def check_shards(path: str, folder: str, pack: Pack) -> None:
    """`DataError` where shards are missing or of another size."""
    found = [f"{name} ({reason})" for name, reason in shard_problems(folder, pack)]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise DataError(f"{path} is not whole: {found[0]}{more}; copy it again, or pack again into another folder")


def _read_index(folder: str, pack: Pack) -> NDArray[np.void]:
    """The index [n], which is what was written, and fits the shards."""
    path = os.path.join(folder, INDEX_FILE)
    try:
        data = read_regular(path, limit=pack.images * ENTRY.itemsize)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) != pack.images * ENTRY.itemsize or xxh3_64_hexdigest(data) != pack.index:
        raise DataError(f"{path} is damaged: it does not have the size or the checksum that {PACK_FILE} gives it")
    entries = np.frombuffer(data, ENTRY)
    shards = np.array([*pack.shards, 0], np.uint64)
    room = shards[np.minimum(entries["shard"], len(pack.shards))]
    fits = (entries["shard"] < len(pack.shards)) & (entries["size"] <= room) & (entries["size"] <= MAX_BYTES)
    fits &= entries["offset"] <= room - np.minimum(entries["size"], room)
    fits &= (entries["label"] >= -1) & (entries["label"] < len(pack.classes))
    if pack.recipe.form == "raw":
        fits &= entries["size"] == entries["height"].astype(np.uint64) * entries["width"] * 3
        fits &= entries["size"] > 0
    if not fits.all():
        raise DataError(f"{path} is damaged: entry {int(np.argmin(fits)):,} leads out of its shard, classes or pixels")
    return entries


def damaged(source: Packed, rows: Iterable[int]) -> Iterator[tuple[str, str]]:
    """Name and reason of everything that is not as it was packed: of files, then of the images `rows`."""
    folder, pack = source.folder, source.pack
    yield from shard_problems(folder, pack)
    names = xxh3_64()
    try:
        with open_regular(os.path.join(folder, NAMES_FILE)) as file:
            while part := file.read(2**20):
                names.update(part)
        if names.hexdigest() != pack.names:
            yield NAMES_FILE, "does not have its checksum"
    except OSError as error:
        yield NAMES_FILE, error.strerror or str(error)
    for i in rows:
        try:
            source.read(i)
        except (UnreadableImage, OSError) as error:
            yield source.name(i), getattr(error, "strerror", None) or str(error)
