"""Where images come from: folders, archives, parquet files, list files, torchvision data sets, and several of them
together.

A source hands out encoded bytes by number, without unpacking anything, and is safe to use from worker processes.
"""

from __future__ import annotations

import inspect
import operator
import os
import pickle
import posixpath
import tarfile
import weakref
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimlet.config import PYTHON, nearest
from mimlet.data.decode import Encoded, UnreadableImage
from mimlet.data.index import SUFFIXES, Listing, Strings, is_image, list_archive, list_folder, suffix
from mimlet.errors import ConfigError, DataError
from mimlet.untrusted import MAX_BYTES, parse_json, read_regular

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Paths = str | Path | Sequence[str | Path]
"""Where images are: one path or several."""

T = TypeVar("T", covariant=True)


class Records(Protocol[T]):
    """A data set of any library, given from Python: records by number, in two methods.

    A record is encoded bytes, an image of Pillow or an array [H,W,3] of uint8; or a pair of this and a label; or a
    mapping with `image` and maybe `label`. A label is a number or a class's name.
    Where all records would have to be read for the labels alone, the object may tell them: `labels`, n numbers or
    names; and `classes`, names of the numbers.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> T: ...


_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_ROW_GROUP_MEMORY = 128 * 2**20
_ROW_GROUP_LIMIT = 4 * 2**30
_ROWS_AT_ONCE = 64
_CLASS_NUMBERS = 2**24
_EXPECTED = "a folder, a .tar or .zip archive, a .parquet file, a .txt list, or torchvision:NAME:ROOT"
_PIXELS = "an encoded image (bytes), an image of Pillow, or an array [height,width,3] of uint8"


class Source(Protocol):
    """n images by number. Picklable; may be read from several processes at once.

    `classes`: names of the labels, [] without labels. `labels` [n]: index into it, -1 where unknown.
    """

    classes: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        """Class of image i, -1 if unknown."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """What the user knows image i by: its path relative to the source."""
        ...

    def read(self, i: int) -> Encoded:
        """Image i, encoded or already decoded. Raises `OSError` or `UnreadableImage`."""
        ...

    def describe(self) -> str:
        """One line with the number of images."""
        ...


def are_records(given: object) -> bool:
    """Whether something given as data is no path, and no list of paths."""
    paths = [given] if isinstance(given, str | Path) else given if isinstance(given, list | tuple) else [None]
    return not all(isinstance(path, str | Path) for path in paths)


def path_list(given: Paths) -> list[str]:
    """One path or several, as a list."""
    return [str(path) for path in ([given] if isinstance(given, str | Path) else given)]


def open_source(
    paths: Sequence[str], *, labelled: bool = False, index: bool = True, classes: Sequence[str] | None = None
) -> Source:
    """Opens data paths, one after another, as one source.

    A path is a folder (searched recursively), a pack (a folder that `mimlet pack` wrote), a .tar or .zip archive, a
    .parquet file or a folder of them, a .txt list (a path per line, relative to the list, optionally a tab and a class
    name), or `torchvision:NAME:ROOT[:SPLIT]` (SPLIT is `train` unless given).

    Classes are the folders directly below the root (of an archive: below the folder that holds everything), sorted by
    name; columns or lists say otherwise. With `labelled`, missing labels are an error, and images above the class
    folders are left out; without, labels are given where they are plain to see. Several paths share one list of
    classes: those of the first, then what the next adds.
    `classes` forces the list, so that training and evaluation agree; a class outside it is an error.
    `index`: cache lists of files (see `mimlet.data.index`).
    Raises `DataError`.
    """
    if not paths:
        raise DataError(f"no images were named; give data.path: {_EXPECTED}")
    return _joined([_open(path, labelled, index) for path in paths], paths, labelled, classes)


def _joined(
    parts: Sequence[Source], paths: Sequence[str], labelled: bool, classes: Sequence[str] | None = None
) -> Source:
    """Sources under one list of classes."""
    for part in parts:  # names of folders may have bytes that are no text, and could not be written anywhere
        part.classes = [name.encode("utf-8", "backslashreplace").decode() for name in part.classes]
    known = list(classes if classes is not None else dict.fromkeys(name for part in parts for name in part.classes))
    ids = {name: i for i, name in enumerate(known)}
    for path, part in zip(paths, parts, strict=True):
        present = [part.classes[i] for i in np.unique(part.labels[part.labels >= 0])]
        foreign = [name for name in present if name not in ids]
        if foreign:
            raise DataError(
                f"{path} has {len(foreign)} of {len(present)} classes outside the {len(known)} expected ones: "
                f"'{foreign[0]}'{nearest(foreign[0], known)}; expected {_some(known)}"
            )
        table = np.array([*(ids.get(name, -1) for name in part.classes), -1], np.int64)  # [-1] stays -1
        part.labels, part.classes = table[part.labels], known
    if labelled and classes is None and len(known) < 2:
        raise DataError(f"{' and '.join(paths)}: only one class ({_some(known)}); labelled images need at least two")
    return parts[0] if len(parts) == 1 else _Joined(parts, known)


def _open(path: str, labelled: bool, index: bool) -> Source:
    if path.startswith("torchvision:"):
        return _Torchvision(path, labelled)
    if path.startswith(PYTHON):
        raise DataError(f"{path} stands for records given from Python: mimlet.train(config, data=records)")
    real = os.path.expanduser(path)
    lower = real.lower()
    if not os.path.exists(real):
        raise DataError(_missing(path, real))
    if os.path.isdir(real):
        from mimlet.data.pack import Packed, is_pack  # which are sources

        if is_pack(real):
            return Packed(path, labelled)
        listing = list_folder(real, cache=index)
        if not len(listing) and ".parquet" in listing.ignored:
            files = sorted(str(file) for file in Path(real).rglob("*.parquet") if file.is_file())
            return _Parquet(path, files, labelled)
        return _Files(path, listing, labelled)
    if lower.endswith(_COMPRESSED):
        raise DataError(
            f"{path} is a compressed tar, which can only be read from its beginning; unpack it, or decompress it "
            f"to a plain .tar once (for .gz: gunzip {path})"
        )
    if lower.endswith(".tar"):
        return _Archive(path, list_archive(real, _scan_tar, cache=index), labelled)
    if lower.endswith(".zip"):
        return _Archive(path, list_archive(real, _scan_zip, cache=index), labelled)
    if lower.endswith(".parquet"):
        return _Parquet(path, [real], labelled)
    if lower.endswith(".txt"):
        return _List(path, labelled)
    raise DataError(f"{path} is a file of an unknown kind; expected {_EXPECTED}")


def _missing(path: str, real: str) -> str:
    """Why there is nothing at `path`, with the nearest name beside it."""
    parent, name = os.path.split(os.path.abspath(real))
    while not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    return f"{path} does not exist: no '{name}' in {parent}{nearest(name, os.listdir(parent))}"


def _some(names: Sequence[str]) -> str:
    """The first names of a long list."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"


def counted(number: int, noun: str) -> str:
    """'1 image', '2,000 images'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def _kinds(ignored: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(ignored).most_common(5))


class _Files(Source):
    """Images below a folder."""

    def __init__(self, path: str, listing: Listing, labelled: bool) -> None:
        if not len(listing):
            found = f"it has only other files ({_kinds(listing.ignored)})" if listing.ignored else "it is empty"
            raise DataError(f"no image in {path}: {found}; expected files ending in {' '.join(sorted(SUFFIXES))}")
        self._path = path
        self._listing = listing
        self.classes, labels = listing.labels(self._depth())
        splits = bool(self.classes) and _SPLITS.issuperset(name.lower() for name in self.classes)
        if labelled and not self.classes:
            raise DataError(
                f"{path} has {counted(len(listing), 'image')} but no sub-folders; labelled images need "
                f"one folder per class, as in {path.rstrip('/')}/cat/1.jpg"
            )
        if labelled and splits:
            raise DataError(
                f"{path} holds splits ({_some(self.classes)}), not classes; "
                f"name one of them, as in {path.rstrip('/')}/{self.classes[0]}"
            )
        if splits:
            self.classes, labels = [], np.full_like(labels, -1)
        self._rows = np.flatnonzero(labels >= 0) if labelled else np.arange(len(labels))
        self._loose = len(labels) - len(self._rows)
        self.labels = labels[self._rows]
        self._noun = counted(len(self.classes), "class") if labelled else counted(len(listing.folders), "folder")

    def _depth(self) -> int:
        """How many levels lie above the class folders."""
        return 0

    def name(self, i: int) -> str:
        path = self._listing.path(int(self._rows[i]))
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def read(self, i: int) -> bytes | Image.Image:
        return read_regular(os.path.join(os.path.expanduser(self._path), self._listing.path(int(self._rows[i]))))

    def describe(self) -> str:
        text = f"{counted(len(self), 'image')} in {self._path} ({self._noun})"
        if self._loose:
            text += f"; {counted(self._loose, 'image')} outside the class folders left out"
        if sum(self._listing.ignored.values()) > len(self):
            text += f"; other files ignored: {_kinds(self._listing.ignored)}"
        return text


class _Archive(_Files):
    """Images in a .tar or .zip, read in place. `places`: offset, stored size, method (`_TAR` or zip's)."""

    _descriptor: int | None = None

    def _depth(self) -> int:
        folders = [[part for part in folder.split("/") if part] for folder in self._listing.folders]
        levels = zip(*folders, strict=False)
        shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
        return shared if len(folders) > 1 else max(shared - 1, 0)

    def read(self, i: int) -> bytes | Image.Image:
        if self._descriptor is None:
            self._descriptor = os.open(os.path.expanduser(self._path), os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        start, size, method = self._listing.places[self._rows[i]].tolist()
        if size > MAX_BYTES:
            raise UnreadableImage(f"{size:,} bytes, more than the limit of {MAX_BYTES:,}")
        # pread leaves the file's position alone, so that forked workers can share the descriptor.
        if method != _TAR:
            header = os.pread(self._descriptor, 30, start)
            start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = os.pread(self._descriptor, size, start)
        if method == zipfile.ZIP_DEFLATED:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflater.decompress(data, MAX_BYTES)
            except zlib.error as error:
                raise UnreadableImage(f"damaged in the archive: {error}") from None
            if inflater.unconsumed_tail or not inflater.eof:
                raise UnreadableImage(f"cut short in the archive, or more than {MAX_BYTES:,} bytes")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_descriptor"}


_TAR = -1
_Found = dict[str, list[tuple[str, tuple[int, ...]]]]


def _scan_tar(path: str) -> Listing:
    found: _Found = defaultdict(list)
    ignored: Counter[str] = Counter()
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            end = os.fstat(file.fileno()).st_size
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                following: int = archive.offset
                if following <= member.offset:
                    raise tarfile.ReadError(f"the header at byte {member.offset:,} leads back to itself")
                if member.isreg() and not member.issparse():
                    _note(found, ignored, member.name, (member.offset_data, member.size, _TAR), end)
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"damaged at byte {archive.offset:,}")
    except Exception as error:  # the reader raises nearly every type on damaged files
        raise DataError(f"{path} is not a whole, uncompressed tar archive: {_words(error)}") from None
    return Listing.of(found, ignored)


def _scan_zip(path: str) -> Listing:
    found: _Found = defaultdict(list)
    ignored: Counter[str] = Counter()
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # as above
        raise DataError(f"{path} is not a whole zip archive: {_words(error)}") from None
    end = os.path.getsize(path)
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{path} is encrypted or compressed in an uncommon way ({member.filename}); "
                "zip it again, stored or deflated"
            )
        if not member.filename.endswith("/"):
            place = (member.header_offset, member.compress_size, member.compress_type)
            try:
                _note(found, ignored, member.filename, place, end)
            except ValueError as error:
                raise DataError(f"{path} is not a whole zip archive: {error}") from None
    return Listing.of(found, ignored)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _note(found: _Found, ignored: Counter[str], path: str, place: tuple[int, int, int], end: int) -> None:
    """Files an archive's member under its folder. Names are text and never touch the file system.

    `ValueError` for a place outside the archive, which ends at byte `end`.
    """
    start, size, _ = place
    if start < 0 or size < 0 or start + size > end:
        raise ValueError(f"'{path}' lies at byte {start:,}, {size:,} bytes long, and the file ends at {end:,}")
    path = path.replace("\0", "\ufffd")  # which ends names in the cache of lists
    folder, name = posixpath.split(path.removeprefix("./"))
    if any(part.startswith(".") and part != ".." for part in path.removeprefix("./").split("/")):
        ignored["hidden"] += 1
    elif is_image(name):
        found[folder].append((name, place))
    else:
        ignored[suffix(name)] += 1


class _List(Source):
    """Images named in a text file."""

    def __init__(self, path: str, labelled: bool) -> None:
        self._path = path
        self._folder = os.path.dirname(os.path.expanduser(path))
        with open(os.path.expanduser(path), encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip("\r\n").partition("\t") for line in file]
        lines = [line for line in lines if line[0].strip()]
        if not lines:
            raise DataError(f"{path} is empty; expected one image path per line")
        unlabelled = [name for name, _, label in lines if not label]
        if labelled and unlabelled:
            raise DataError(
                f"{path} has {counted(len(unlabelled), 'line')} without a label ('{unlabelled[0]}'); "
                "expected path<TAB>class"
            )
        self._names = Strings.of([name for name, _, _ in lines])
        checked = [int(i) for i in np.linspace(0, len(lines) - 1, min(len(lines), 100))]
        absent = [self._names[i] for i in checked if not os.path.exists(os.path.join(self._folder, self._names[i]))]
        if absent:
            raise DataError(
                f"{path} names files that do not exist: {len(absent)} of {len(checked)} looked at, "
                f"such as '{absent[0]}'; paths are relative to {self._folder or '.'}"
            )
        self.classes = _ordered({label for _, _, label in lines} - {""})
        ids = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([ids.get(label, -1) for _, _, label in lines], np.int64)

    def name(self, i: int) -> str:
        return self._names[i].encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def read(self, i: int) -> bytes | Image.Image:
        return read_regular(os.path.join(self._folder, self._names[i]))

    def describe(self) -> str:
        noun = f" ({counted(len(self.classes), 'class')})" if self.classes else ""
        return f"{counted(len(self), 'image')} in {self._path}{noun}"


def _ordered(names: Iterable[str]) -> list[str]:
    """Sorted; by value if all are whole numbers."""
    names = list(names)
    return sorted(names, key=int) if all(name.isdecimal() and len(name) < 20 for name in names) else sorted(names)


class _Parquet(Source):
    """Rows of parquet files. A row group is decoded as a whole, so the last ones read are kept, up to 128 MiB per
    process.

    Reading in random order is quick when all fits, and slow otherwise; a tar has no such limit.
    """

    def __init__(self, path: str, files: list[str], labelled: bool) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise DataError(f"reading {path} needs pyarrow: pip install mimlet[parquet]") from None
        self._path = path
        self._files = files
        self._loaded: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        try:
            schema = pq.read_schema(files[0])
            self._image = _image_column(path, schema)
            self._name = _name_column(schema, self._image)
            column = next((name for name in ("label", "labels", "fine_label") if name in schema.names), None)
            if labelled and column is None:
                raise DataError(
                    f"{path} has no column label, labels or fine_label; its columns are {', '.join(schema.names)}"
                )
            groups: list[tuple[int, int, int]] = []
            values: list[int | str | None] = []
            for number, file in enumerate(files):
                with pq.ParquetFile(file) as opened:
                    metadata = opened.metadata
                    sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
                    if min(sizes, default=0) < 0 or sum(sizes) > os.path.getsize(file):
                        raise pa.ArrowInvalid(f"{sum(sizes):,} rows in {os.path.getsize(file):,} bytes")
                    groups += [(number, g, rows) for g, rows in enumerate(sizes)]
                    if column is not None:
                        values += _labels_in(opened, column)
        except DataError:
            raise
        except Exception as error:  # the reader raises nearly every type on damaged files
            raise DataError(f"{path} cannot be read as parquet: {_words(error)}") from None
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        rows = int(self._ends[-1]) if groups else 0
        if not rows:
            raise DataError(f"{path} has no rows")
        self.classes, self.labels = _parquet_labels(path, schema, column, values, rows)
        if labelled and (self.labels < 0).any():
            raise DataError(
                f"{path}: column {column} is empty in {counted(int((self.labels < 0).sum()), 'row')} of {rows:,}"
            )

    def name(self, i: int) -> str:
        group = int(np.searchsorted(self._ends, i, side="right"))
        row = i - int(self._ends[group] - self._groups[group, 2])
        if self._name is None:
            return self._place(group, row)
        try:
            return str(self._column(group, self._name)[row])
        except (UnreadableImage, UnicodeDecodeError):  # the images may be whole
            return self._place(group, row)

    def _place(self, group: int, row: int) -> str:
        return f"{os.path.basename(self._files[self._groups[group, 0]])}#{self._groups[group, 1]}.{row}"

    def read(self, i: int) -> bytes | Image.Image:
        group = int(np.searchsorted(self._ends, i, side="right"))
        row = i - int(self._ends[group] - self._groups[group, 2])
        data: bytes | None = self._column(group, self._image)[row].as_py()
        return data or b""

    def describe(self) -> str:
        noun = f" ({counted(len(self.classes), 'class')})" if self.classes else ""
        return f"{counted(len(self), 'image')} in {self._path}{noun}"

    def _column(self, group: int, name: str) -> pa.ChunkedArray:
        """One column (`struct.field` for a part of it) of a row group; `UnreadableImage` where it is damaged.

        It is decoded piece by piece, as a few bytes can stand for any number of rows.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if (group, name) in self._loaded:
            self._loaded.move_to_end((group, name))
            return self._loaded[group, name]
        file, number, rows = self._groups[group].tolist()
        outer, _, field = name.partition(".")
        pieces: list[pa.Array] = []
        size = 0
        try:
            with pq.ParquetFile(self._files[file]) as opened:
                for batch in opened.iter_batches(_ROWS_AT_ONCE, [number], [name], use_threads=False):
                    pieces.append(batch.column(outer).field(field) if field else batch.column(outer))
                    size += pieces[-1].nbytes
                    if size > _ROW_GROUP_LIMIT:
                        raise pa.ArrowInvalid(f"row group {number} has more than {_ROW_GROUP_LIMIT:,} bytes")
            if sum(map(len, pieces)) != rows:
                raise pa.ArrowInvalid(f"row group {number} has {sum(map(len, pieces)):,} rows, not {rows:,}")
        except Exception as error:  # the reader raises nearly every type on damaged files
            raise UnreadableImage(f"damaged in the parquet file: {_words(error)}") from None
        self._loaded[group, name] = pa.chunked_array(pieces)
        while len(self._loaded) > 1 and sum(array.nbytes for array in self._loaded.values()) > _ROW_GROUP_MEMORY:
            self._loaded.popitem(last=False)
        return self._loaded[group, name]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_loaded": OrderedDict()}


def _image_column(path: str, schema: pa.Schema) -> str:
    """The column with encoded images: binary, or the `bytes` of a struct; one named image or img before others."""
    import pyarrow as pa

    def bytes_in(field: pa.Field) -> str | None:
        kind = field.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(field.name)
        return f"{field.name}.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None

    columns = {field.name: column for field in schema if (column := bytes_in(field))}
    if not columns:
        raise DataError(
            f"{path} has no column of encoded images (binary, or a struct with bytes); "
            f"its columns are {', '.join(schema.names)}"
        )
    return columns.get("image") or columns.get("img") or next(iter(columns.values()))


def _name_column(schema: pa.Schema, image: str) -> str | None:
    outer, _, field = image.partition(".")
    if field and schema.field(outer).type.get_field_index("path") >= 0:
        return f"{outer}.path"
    return next((name for name in ("name", "file_name", "filename", "path") if name in schema.names), None)


def _labels_in(opened: pq.ParquetFile, column: str) -> list[int | str | None]:
    """A column of labels, of which equal ones share memory."""
    known: dict[int | str | None, int | str | None] = {}
    values: list[int | str | None] = []
    for batch in opened.iter_batches(columns=[column], use_threads=False):
        values += [known.setdefault(value, value) for value in batch.column(0).to_pylist()]
    return values


def _parquet_labels(
    path: str, schema: pa.Schema, column: str | None, values: list[int | str | None], rows: int
) -> tuple[list[str], NDArray[np.int64]]:
    """Class names and ids [rows]. Names: metadata `classes`, Hugging Face's features, or the values themselves."""
    if column is None:
        return [], np.full(rows, -1, np.int64)
    if len(values) != rows:
        raise DataError(f"{path}: column {column} has {len(values):,} values in {counted(rows, 'row')}")
    classes = _parquet_classes(path, schema.metadata or {}, column)
    present = {value for value in values if value is not None}
    if all(isinstance(value, int) for value in present):
        highest = max(map(int, present), default=-1)
        if highest >= (len(classes) or _CLASS_NUMBERS):
            raise DataError(
                f"{path}: column {column} has label {highest}, but there are "
                + (f"names for {len(classes)} classes only" if classes else f"at most {_CLASS_NUMBERS:,} classes")
            )
        labels = np.array([-1 if value is None else max(-1, int(value)) for value in values], np.int64)
        return classes or [str(i) for i in range(highest + 1)], labels
    classes = classes or _ordered({str(value) for value in present})
    ids = {name: i for i, name in enumerate(classes)}
    unnamed = [str(value) for value in present if str(value) not in ids]
    if unnamed:
        raise DataError(f"{path}: column {column} has '{unnamed[0]}', which is not among the classes {_some(classes)}")
    return classes, np.array([-1 if value is None else ids[str(value)] for value in values], np.int64)


def _parquet_classes(path: str, metadata: Mapping[bytes, bytes], column: str) -> list[str]:
    """The names that the file's metadata have for the labels, if any."""
    try:
        own = parse_json(metadata.get(b"classes", b"[]"))
        hub = parse_json(metadata.get(b"huggingface", b"{}"))
    except ValueError as error:
        raise DataError(f"{path} has damaged metadata: {error}") from None
    for key in ("info", "features", column, "names"):
        hub = hub.get(key) if isinstance(hub, dict) else None
    names = own or hub or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} has damaged metadata: the classes are no list of names")
    return names


class _Torchvision(Source):
    """A data set class of torchvision, already on disk."""

    def __init__(self, path: str, labelled: bool) -> None:
        from torchvision import datasets

        _, name, rest = (*path.split(":", 2), "")[:3]
        root, colon, split = rest.rpartition(":")
        if not colon or "/" in split or "\\" in split:
            root, split = rest, ""
        if name not in datasets.__all__:
            raise ConfigError(f"{path}: torchvision has no data set '{name}'{nearest(name, datasets.__all__)}")
        if not root:
            raise ConfigError(f"{path}: no folder; expected torchvision:NAME:ROOT, for example torchvision:{name}:data")
        kind = getattr(datasets, name)
        parameters = inspect.signature(kind).parameters
        options: dict[str, object] = {}
        if "train" in parameters:
            if split not in ("", "train", "test"):
                raise ConfigError(f"{path}: {name} has the splits train and test, not '{split}'")
            options["train"] = split != "test"
        elif "split" in parameters:
            options["split"] = split or "train"
        elif split:
            raise ConfigError(f"{path}: {name} has no splits; leave out ':{split}'")
        if "download" in parameters:
            options["download"] = False
        try:
            self._data = kind(os.path.expanduser(root), **options)
        except Exception as error:  # each class has its own ways of saying that something is missing
            reason = str(error).split(" You can use")[0]
            raise DataError(
                f"torchvision cannot open {name} in {root}: {reason} (mimlet does not download data sets)"
            ) from None
        self._path = path
        targets = _torchvision_targets(self._data)
        if labelled and targets is None:
            raise DataError(f"{path} has no class labels that can be read without decoding every image")
        self.labels = np.full(len(self._data), -1, np.int64) if targets is None else targets
        names = getattr(self._data, "classes", None) or [str(i) for i in range(int(self.labels.max()) + 1)]
        self.classes = (
            [] if targets is None else [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
        )

    def name(self, i: int) -> str:
        return f"{self._path}#{i}"

    def read(self, i: int) -> bytes | Image.Image:
        image: Image.Image = self._data[i][0]
        return image

    def describe(self) -> str:
        noun = f" ({counted(len(self.classes), 'class')})" if self.classes else ""
        return f"{counted(len(self), 'image')} in {self._path}{noun}"


def _torchvision_targets(data: object) -> NDArray[np.int64] | None:
    """Class ids without decoding images, from the attributes under which torchvision's classes keep them."""
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(data, attribute, None)
        if values is not None and len(values) and np.ndim(values) == 1:
            return np.asarray(values, np.int64)
    samples = getattr(data, "_samples", None)
    return None if samples is None else np.array([target for _, target in samples], np.int64)


class _Records(Source):
    """A data set of another library, given from Python."""

    def __init__(self, records: Records[Any], path: str, labelled: bool) -> None:
        if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
            raise DataError(
                f"data is a {type(records).__name__}; expected paths, or an object with __len__ and __getitem__"
            )
        if not len(records):
            raise DataError(f"{path} has no records")
        self._records, self._path = records, path
        try:
            _, first = self._record(0)
        except UnreadableImage as error:
            raise DataError(f"{path}: record 0 is {error}") from None
        labels = getattr(records, "labels", None)
        if labelled and labels is None:
            if first is None:
                raise DataError(
                    f"{path} has no labels; a record may be (image, label) or {{'image': ..., 'label': ...}}, or the "
                    "object may have labels, a list"
                )
            labels = [self._record(i)[1] for i in range(len(records))]
        self.classes, self.labels = _record_labels(path, labels, getattr(records, "classes", None), len(records))
        if labelled and (self.labels < 0).any():
            raise DataError(
                f"{path}: {counted(int((self.labels < 0).sum()), 'record')} of {len(self):,} without a label"
            )

    def _record(self, i: int) -> tuple[Encoded, int | str | None]:
        record = self._records[i]
        label = None
        if isinstance(record, Mapping):
            label, record = record.get("label"), record.get("image")
        elif isinstance(record, tuple | list) and len(record) == 2:
            record, label = record
        if isinstance(record, bytearray | memoryview):
            record = bytes(record)
        if not isinstance(record, bytes | Image.Image | np.ndarray):
            raise UnreadableImage(f"a {type(record).__name__}, not {_PIXELS}")
        return record, label

    def name(self, i: int) -> str:
        return f"{self._path}#{i}"

    def read(self, i: int) -> Encoded:
        return self._record(i)[0]

    def describe(self) -> str:
        noun = f" ({counted(len(self.classes), 'class')})" if self.classes else ""
        return f"{counted(len(self), 'image')} in {self._path}{noun}"

    def __getstate__(self) -> dict[str, object]:
        try:
            pickle.dumps(self._records)
        except Exception as error:  # objects have their own ways of refusing
            raise DataError(
                f"{self._path} cannot be sent to loader processes ({error}); make it picklable, opening files when a "
                "record is read, or set speed.workers=0"
            ) from None
        return self.__dict__


def record_source(records: Records[Any], path: str, *, labelled: bool = False) -> Source:
    """A data set of another library as a source. `path` is what it is called. Raises `DataError`.

    Labels are what its `labels` tell. Without these, all records are read once where labels are needed (`labelled`).
    """
    return _joined([_Records(records, path, labelled)], [path], labelled)


def _record_labels(
    path: str, labels: Sequence[Any] | None, classes: Sequence[str] | None, records: int
) -> tuple[list[str], NDArray[np.int64]]:
    """Class names and ids [n] of labels that are numbers, names or None."""
    if labels is None:
        return [], np.full(records, -1, np.int64)
    if len(labels) != records:
        raise DataError(f"{path} has {len(labels):,} labels for {counted(records, 'record')}")
    known = [label for label in labels if label is not None]
    names = [str(name) for name in classes or ()]
    if any(isinstance(label, str) for label in known):
        names = names or _ordered({str(label) for label in known})
        ids = {name: i for i, name in enumerate(names)}
        numbers = [-1 if label is None else ids.get(str(label), len(names)) for label in labels]
    else:
        try:
            numbers = [-1 if label is None else operator.index(label) for label in labels]
        except TypeError as error:
            raise DataError(f"{path}: a label is a whole number or a name ({error})") from None
        names = names or [str(i) for i in range(max(numbers, default=-1) + 1)]
    found = np.array(numbers, np.int64)
    if ((found < -1) | (found >= len(names))).any():
        wrong = labels[int(np.argmax((found < -1) | (found >= len(names))))]
        raise DataError(
            f"{path} has a label {wrong!r}, which is none of the {counted(len(names), 'class')} {_some(names)}"
        )
    return names, found


class _Joined(Source):
    """Several sources, one after another."""

    def __init__(self, parts: Sequence[Source], classes: list[str]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.classes = classes
        self.labels = np.concatenate([part.labels for part in parts])

    def _find(self, i: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self._parts[part], i - int(self._ends[part - 1] if part else 0)

    def name(self, i: int) -> str:
        part, row = self._find(i)
        return part.name(row)

    def read(self, i: int) -> Encoded:
        part, row = self._find(i)
        return part.read(row)

    def describe(self) -> str:
        return f"{counted(len(self), 'image')}: " + " + ".join(part.describe() for part in self._parts)
