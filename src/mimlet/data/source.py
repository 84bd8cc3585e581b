"""Where images come from: folders, archives, parquet files, list files, torchvision data sets, and several of them
together.

A source hands out encoded bytes by number, without unpacking anything, and is safe to use from worker processes.
"""

from __future__ import annotations

import inspect
import json
import os
import posixpath
import tarfile
import weakref
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimlet.config import nearest
from mimlet.data.decode import UnreadableImage
from mimlet.data.index import SUFFIXES, Listing, Strings, is_image, list_archive, list_folder, suffix
from mimlet.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

Paths = str | Path | Sequence[str | Path]
"""Where images are: one path or several."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_ROW_GROUP_MEMORY = 128 * 2**20
_EXPECTED = "a folder, a .tar or .zip archive, a .parquet file, a .txt list, or torchvision:NAME:ROOT"


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

    def read(self, i: int) -> bytes | Image.Image:
        """Image i, encoded (or already decoded, from torchvision). Raises `OSError` or `UnreadableImage`."""
        ...

    def describe(self) -> str:
        """One line with the number of images."""
        ...


def path_list(given: Paths) -> list[str]:
    """One path or several, as a list."""
    return [str(path) for path in ([given] if isinstance(given, str | Path) else given)]


def open_source(
    paths: Sequence[str], *, labelled: bool = False, index: bool = True, classes: Sequence[str] | None = None
) -> Source:
    """Opens data paths, one after another, as one source.

    A path is a folder (searched recursively), a .tar or .zip archive, a .parquet file or a folder of them, a .txt
    list (a path per line, relative to the list, optionally a tab and a class name), or
    `torchvision:NAME:ROOT[:SPLIT]` (SPLIT is `train` unless given).

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
    parts = [_open(path, labelled, index) for path in paths]
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
    real = os.path.expanduser(path)
    lower = real.lower()
    if not os.path.exists(real):
        raise DataError(_missing(path, real))
    if os.path.isdir(real):
        listing = list_folder(real, cache=index)
        if not len(listing) and ".parquet" in listing.ignored:
            return _Parquet(path, sorted(str(file) for file in Path(real).rglob("*.parquet")), labelled)
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


def _count(number: int, noun: str) -> str:
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
                f"{path} has {_count(len(listing), 'image')} but no sub-folders; labelled images need "
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
        self._noun = _count(len(self.classes), "class") if labelled else _count(len(listing.folders), "folder")

    def _depth(self) -> int:
        """How many levels lie above the class folders."""
        return 0

    def name(self, i: int) -> str:
        path = self._listing.path(int(self._rows[i]))
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def read(self, i: int) -> bytes | Image.Image:
        path = os.path.join(os.path.expanduser(self._path), self._listing.path(int(self._rows[i])))
        with open(path, "rb") as file:
            return file.read()

    def describe(self) -> str:
        text = f"{_count(len(self), 'image')} in {self._path} ({self._noun})"
        if self._loose:
            text += f"; {_count(self._loose, 'image')} outside the class folders left out"
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
        # pread leaves the file's position alone, so that forked workers can share the descriptor.
        if method != _TAR:
            header = os.pread(self._descriptor, 30, start)
            start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = os.pread(self._descriptor, size, start)
        if method == zipfile.ZIP_DEFLATED:
            try:
                return zlib.decompress(data, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise UnreadableImage(f"damaged in the archive: {error}") from None
        return data

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_descriptor"}


_TAR = -1
_Found = dict[str, list[tuple[str, tuple[int, ...]]]]


def _scan_tar(path: str) -> Listing:
    found: _Found = defaultdict(list)
    ignored: Counter[str] = Counter()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                if member.isreg():
                    _note(found, ignored, member.name, (member.offset_data, member.size, _TAR))
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a whole, uncompressed tar archive: {error}") from None
    return Listing.of(found, ignored)


def _scan_zip(path: str) -> Listing:
    found: _Found = defaultdict(list)
    ignored: Counter[str] = Counter()
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not a whole zip archive: {error}") from None
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{path} is encrypted or compressed in an uncommon way ({member.filename}); "
                "zip it again, stored or deflated"
            )
        if not member.is_dir():
            _note(found, ignored, member.filename, (member.header_offset, member.compress_size, member.compress_type))
    return Listing.of(found, ignored)


def _note(found: _Found, ignored: Counter[str], path: str, place: tuple[int, ...]) -> None:
    """Files an archive's member under its folder. Names are text and never touch the file system."""
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
                f"{path} has {_count(len(unlabelled), 'line')} without a label ('{unlabelled[0]}'); "
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
        with open(os.path.join(self._folder, self._names[i]), "rb") as file:
            return file.read()

    def describe(self) -> str:
        noun = f" ({_count(len(self.classes), 'class')})" if self.classes else ""
        return f"{_count(len(self), 'image')} in {self._path}{noun}"


def _ordered(names: Iterable[str]) -> list[str]:
    """Sorted; by value if all are whole numbers."""
    names = list(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


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
        self._loaded: OrderedDict[tuple[int, str], pa.Array] = OrderedDict()
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
                    groups += [(number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
                    if column is not None:
                        values += opened.read(columns=[column], use_threads=False).column(column).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet: {error}") from None
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        rows = int(self._ends[-1]) if groups else 0
        if not rows:
            raise DataError(f"{path} has no rows")
        self.classes, self.labels = _parquet_labels(path, schema, column, values, rows)
        if labelled and (self.labels < 0).any():
            raise DataError(
                f"{path}: column {column} is empty in {_count(int((self.labels < 0).sum()), 'row')} of {rows:,}"
            )

    def name(self, i: int) -> str:
        group = int(np.searchsorted(self._ends, i, side="right"))
        row = i - int(self._ends[group] - self._groups[group, 2])
        if self._name is None:
            return f"{os.path.basename(self._files[self._groups[group, 0]])}#{self._groups[group, 1]}.{row}"
        return str(self._column(group, self._name)[row])

    def read(self, i: int) -> bytes | Image.Image:
        import pyarrow as pa

        group = int(np.searchsorted(self._ends, i, side="right"))
        row = i - int(self._ends[group] - self._groups[group, 2])
        try:
            data: bytes | None = self._column(group, self._image)[row].as_py()
        except pa.ArrowException as error:
            raise UnreadableImage(f"damaged in the parquet file: {error}") from None
        return data or b""

    def describe(self) -> str:
        noun = f" ({_count(len(self.classes), 'class')})" if self.classes else ""
        return f"{_count(len(self), 'image')} in {self._path}{noun}"

    def _column(self, group: int, name: str) -> pa.Array:
        """One column (`struct.field` for a part of it) of a row group."""
        import pyarrow.parquet as pq

        if (group, name) in self._loaded:
            self._loaded.move_to_end((group, name))
            return self._loaded[group, name]
        file, number, _ = self._groups[group].tolist()
        with pq.ParquetFile(self._files[file]) as opened:
            outer, _, field = name.partition(".")
            values = opened.read_row_group(number, columns=[name], use_threads=False).column(outer).combine_chunks()
        self._loaded[group, name] = values.field(field) if field else values
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


def _parquet_labels(
    path: str, schema: pa.Schema, column: str | None, values: list[int | str | None], rows: int
) -> tuple[list[str], NDArray[np.int64]]:
    """Class names and ids [rows]. Names: metadata `classes`, Hugging Face's features, or the values themselves."""
    if column is None:
        return [], np.full(rows, -1, np.int64)
    metadata = schema.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    classes = json.loads(metadata.get(b"classes", b"[]")) or features.get(column, {}).get("names")
    present = {value for value in values if value is not None}
    if all(isinstance(value, int) for value in present):
        labels = np.array([-1 if value is None else value for value in values], np.int64)
        classes = classes or [str(i) for i in range(int(labels.max()) + 1)]
        if labels.max() >= len(classes):
            raise DataError(
                f"{path}: column {column} has label {labels.max()}, but there are names for {len(classes)} classes only"
            )
        return classes, labels
    classes = classes or _ordered({str(value) for value in present})
    ids = {name: i for i, name in enumerate(classes)}
    unnamed = [str(value) for value in present if str(value) not in ids]
    if unnamed:
        raise DataError(f"{path}: column {column} has '{unnamed[0]}', which is not among the classes {_some(classes)}")
    return classes, np.array([-1 if value is None else ids[str(value)] for value in values], np.int64)


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
        noun = f" ({_count(len(self.classes), 'class')})" if self.classes else ""
        return f"{_count(len(self), 'image')} in {self._path}{noun}"


def _torchvision_targets(data: object) -> NDArray[np.int64] | None:
    """Class ids without decoding images, from the attributes under which torchvision's classes keep them."""
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(data, attribute, None)
        if values is not None and len(values) and np.ndim(values) == 1:
            return np.asarray(values, np.int64)
    samples = getattr(data, "_samples", None)
    return None if samples is None else np.array([target for _, target in samples], np.int64)


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

    def read(self, i: int) -> bytes | Image.Image:
        part, row = self._find(i)
        return part.read(row)

    def describe(self) -> str:
        return f"{_count(len(self), 'image')}: " + " + ".join(part.describe() for part in self._parts)
