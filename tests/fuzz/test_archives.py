"""Archives, lists and folders whose parts are damaged, hostile or no files at all."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimlet.data import source as sources
from mimlet.data.decode import decode
from mimlet.data.index import Listing, Strings, cache_folder
from mimlet.data.source import Source, open_source
from tests.data.images import encoded, picture
from tests.fuzz.fuzz import EDITS, IMAGE_ERRORS, Edit, Refused, attempt, fuzzed, mutated

PHOTO = encoded(picture(0))
HOSTILE = (
    "../../outside.jpg",
    "/etc/outside.jpg",
    "a/../../b.jpg",
    "./././c.jpg",
    "cat/\x1b[31mred\x07.jpg",
    "dog/two\nlines.jpg",
    "nul\0l/x\0y.jpg",
    "\u202egpj.exe.jpg",
    "x" * 300 + "/" + "y" * 300 + ".jpg",
    "C:\\windows\\x.jpg",
    "~/x.jpg",
    "<script>alert(1)</script>/x.jpg",
    "[/bold]/x.jpg",
    "$\\frac{/x.jpg",
    "",
    "/",
    "deep/" * 500 + "x.jpg",
)
NAMES = st.lists(
    st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=8).map(lambda text: f"{text}/x.jpg"), max_size=6
)


def walk(path: Path, labelled: bool = False) -> Source | Refused:
    """Opens images and reads the first of them, their names, labels and description."""
    opened = attempt(lambda: open_source([str(path)], labelled=labelled, index=False))
    if isinstance(opened, Refused):
        return opened
    assert len(opened) == len(opened.labels) > 0
    assert -1 <= opened.labels.min() <= opened.labels.max() < max(len(opened.classes), 1)
    "".join(opened.classes).encode()  # they can be written anywhere
    assert attempt(opened.describe).encode(errors="surrogateescape")
    for i in range(min(len(opened), 20)):
        assert attempt(lambda i=i: opened.name(i)).encode()
        attempt(lambda i=i: decode(opened.read(i)), IMAGE_ERRORS)
    return opened


def tar(*members: tuple[str, bytes], form: int = tarfile.GNU_FORMAT, **fields: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name) if name else zipfile.ZipInfo("x"), data, method)
    return stream.getvalue()


MEMBERS = tuple((f"{name}/{k}.jpg", encoded(picture(k))) for name in ("ant", "bee") for k in range(2))
VALID = {
    ".tar": [tar(*MEMBERS, form=form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT)]
    + [tar(("é" * 80 + "/1.jpg", PHOTO), *MEMBERS, form=tarfile.PAX_FORMAT)]
    + [tar(("y" * 200 + "/1.jpg", PHOTO), *MEMBERS)],
    ".zip": [zipped(*MEMBERS, method=method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


@pytest.mark.parametrize("suffix", VALID)
def test_valid_archives(suffix: str, place: Path) -> None:
    for data in VALID[suffix]:
        (place / f"whole{suffix}").write_bytes(data)
        opened = walk(place / f"whole{suffix}", labelled=True)
        assert not isinstance(opened, Refused)
        assert opened.classes[-2:] == ["ant", "bee"] or opened.classes[:2] == ["ant", "bee"]


@fuzzed(200)
@given(st.sampled_from([*VALID]), st.integers(0, 3), EDITS, st.booleans())
def test_mutated_archives(place: Path, suffix: str, which: int, edits: list[Edit], labelled: bool) -> None:
    data = VALID[suffix][which % len(VALID[suffix])]
    (place / f"mutated{suffix}").write_bytes(mutated(data, edits, PHOTO))
    walk(place / f"mutated{suffix}", labelled)


@fuzzed(60)
@given(st.integers(0, 10), EDITS)
def test_mutated_headers_of_a_tar_with_a_good_checksum(place: Path, number: int, edits: list[Edit]) -> None:
    """The sum is what a mutation would break first."""
    data = bytearray(VALID[".tar"][number % 4])
    headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
    at = headers[number % len(headers)]
    header = bytearray(mutated(bytes(data[at : at + 512]), edits)[:512].ljust(512, b"\0"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (place / "header.tar").write_bytes(bytes(data[:at]) + bytes(header) + bytes(data[at + 512 :]))
    walk(place / "header.tar")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@fuzzed(40)
@given(NAMES, st.sampled_from((".tar", ".zip")), st.booleans())
def test_hostile_names_stay_text(place: Path, names: list[str], suffix: str, labelled: bool) -> None:
    folder = place / "names"
    folder.mkdir(exist_ok=True)
    path = folder / f"hostile{suffix}"
    members = [(name, PHOTO) for name in names]
    with np.errstate(all="ignore"):
        try:
            data = zipped(*members) if suffix == ".zip" else tar(*members, form=tarfile.PAX_FORMAT)
        except (UnicodeEncodeError, ValueError):  # they cannot even be written
            return
    path.write_bytes(data)
    walk(path, labelled)
    assert os.listdir(folder) == [path.name] or set(os.listdir(folder)) <= {"hostile.tar", "hostile.zip"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_only_regular_members_are_read(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(PHOTO)
    target = str(tmp_path / "secret.jpg")
    (tmp_path / "links.tar").write_bytes(tar(("link.jpg", b""), type=kind, linkname=target))
    assert "no image in" in walk(tmp_path / "links.tar")


def test_a_tar_that_leads_back_to_itself_ends(tmp_path: Path) -> None:
    """Sizes can be negative in it, and Python's reader would go round for ever."""
    data = bytearray(tar(("1.jpg", PHOTO)))
    data[124:136] = (-512).to_bytes(12, "big", signed=True)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "round.tar").write_bytes(data)
    assert "is not a whole, uncompressed tar archive" in walk(tmp_path / "round.tar")


def test_a_tar_that_ends_at_a_damaged_header_is_refused(tmp_path: Path) -> None:
    """Python's reader takes it for the end, and the rest would be missing without a word."""
    data = bytearray(tar(*MEMBERS))
    second = next(i for i in range(512, len(data), 512) if data[i + 257 : i + 262] == b"ustar")
    data[second] ^= 1
    (tmp_path / "half.tar").write_bytes(data)
    assert f"damaged at byte {second:,}" in walk(tmp_path / "half.tar")


def test_a_member_that_claims_more_than_there_is(tmp_path: Path) -> None:
    for size in (2**40, 2**62, 2**63, 2**80):
        data = bytearray(tar(("1.jpg", PHOTO)))
        data[124:136] = b"\x80" + size.to_bytes(11, "big")
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        (tmp_path / "huge.tar").write_bytes(data)
        assert isinstance(walk(tmp_path / "huge.tar"), Refused)


def test_inflating_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 100_000)
    (tmp_path / "bomb.zip").write_bytes(zipped(("1.jpg", bytes(10_000_000)), ("2.jpg", PHOTO)))
    opened = open_source([str(tmp_path / "bomb.zip")], index=False)
    said = attempt(lambda: opened.read(0), IMAGE_ERRORS)
    assert said == "cut short in the archive, or more than 100,000 bytes"
    assert opened.read(1) == PHOTO


def test_members_that_overlap_are_read_one_by_one(tmp_path: Path) -> None:
    """Thousands of names for one place cost no memory."""
    one = zipped(("0.jpg", PHOTO), method=zipfile.ZIP_STORED)
    end = one.rindex(b"PK\x05\x06")
    start = one.index(b"PK\x01\x02")
    directory = one[start:end] * 2000
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2000, 2000, len(directory), start, 0)
    (tmp_path / "overlap.zip").write_bytes(one[:start] + directory + tail)
    opened = walk(tmp_path / "overlap.zip")
    assert not isinstance(opened, Refused)
    assert len(opened) == 2000


@fuzzed(60)
@given(st.binary(max_size=60) | st.sampled_from([*map(os.fsencode, HOSTILE)]), st.sampled_from((b"", b"\tcat", b"\t9")))
def test_lists(place: Path, line: bytes, label: bytes) -> None:
    (place / "photo.jpg").write_bytes(PHOTO)
    (place / "list.txt").write_bytes(b"photo.jpg\tcat\nphoto.jpg\t" + b"9" * 5000 + b"\n" + line + label + b"\n")
    walk(place / "list.txt", labelled=bool(label))


def test_names_with_null_bytes_in_a_list(tmp_path: Path) -> None:
    """Of a long list only some of the names are looked at when it is opened."""
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    lines = ["photo.jpg"] * 1000
    lines[5] = "photo\0.jpg"
    (tmp_path / "list.txt").write_text("\n".join(lines))
    opened = open_source([str(tmp_path / "list.txt")])
    assert isinstance(attempt(lambda: opened.read(5), IMAGE_ERRORS), Refused)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nothing", "socket"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(PHOTO)
    odd = tmp_path / "1.jpg"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "socket":
        os.mknod(odd, 0o140600)
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to({"device": "/dev/zero", "loop": odd, "nothing": tmp_path / "absent"}[kind])
    opened = walk(tmp_path)
    assert not isinstance(opened, Refused)
    for i in range(1, len(opened)):
        assert isinstance(attempt(lambda i=i: opened.read(i), IMAGE_ERRORS), Refused)


# ---------------------------------------------------------------- the cache of lists

ARRAYS = ("folders", "folder_of", "text", "ends", "places", "ignored", "ignored_counts", "watched", "stamps")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """An archive, the file in which its list is kept, and what is in that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMLET_CACHE", str(tmp_path_factory.mktemp("cache")))
        path = tmp_path_factory.mktemp("cached") / "photos.zip"
        path.write_bytes(VALID[".zip"][0])
        os.utime(path, (1, 1))
        open_source([str(path)])
        (file,) = (cache_folder() / "index").iterdir()
    return path, file, file.read_bytes()


def reopened(cached: tuple[Path, Path, bytes], data: bytes) -> Source | Refused:
    """What is opened while that is in the cache."""
    path, file, _ = cached
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMLET_CACHE", str(file.parent.parent))
        opened = attempt(lambda: open_source([str(path)], labelled=True), allowed=file.parent)
    for i in range(0 if isinstance(opened, Refused) else len(opened)):
        opened.name(i)
        attempt(lambda i=i: opened.read(i), IMAGE_ERRORS)
    return opened


@fuzzed(60)
@given(EDITS)
def test_mutated_lists_of_files(cached: tuple[Path, Path, bytes], edits: list[Edit]) -> None:
    """A damaged list counts as none: what is opened is what is there."""
    opened = reopened(cached, mutated(cached[2], edits))
    assert not isinstance(opened, Refused)
    assert opened.read(3) == MEMBERS[3][1]


@fuzzed(60)
@given(
    st.sampled_from(ARRAYS), st.integers(-(2**63), 2**63 - 1), st.sampled_from(("<i8", "<i4", "|u1", "<f8", "<U3", "O"))
)
def test_lists_of_files_with_other_arrays(cached: tuple[Path, Path, bytes], name: str, value: int, kind: str) -> None:
    """With good checksums: somebody has made them."""
    with np.load(io.BytesIO(cached[2])) as saved:
        arrays = dict(saved)
    good = arrays[name]
    if kind == good.dtype.str and good.size:
        arrays[name] = good.copy()
        arrays[name].flat[value % max(good.size, 1)] = value % 2 ** (8 * good.itemsize - 1)
    else:
        arrays[name] = np.zeros(good.shape[: value % 3], kind)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    reopened(cached, stream.getvalue())


def test_a_list_of_files_that_claims_to_be_huge(cached: tuple[Path, Path, bytes]) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(cached[2])) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.namelist():
            huge = old.read(member).replace(b"(4,), }        ", b"(10000000000,)}")
            new.writestr(member, huge)
    assert b"(10000000000,)" in stream.getvalue()
    opened = reopened(cached, stream.getvalue())
    assert not isinstance(opened, Refused)
    assert len(opened) == 4


def test_strings_and_names_survive_the_cache(tmp_path: Path) -> None:
    """A null byte ends names there, so that names cannot have any."""
    listing = sources._scan_tar(str(_write(tmp_path / "x.tar", tar(("a\0b/c\0d.jpg", PHOTO), form=tarfile.PAX_FORMAT))))
    assert "\0" not in "".join([*listing.folders, *(listing.path(i) for i in range(len(listing)))])
    assert len(Listing.of({"": [("x.jpg", ())]}, {})) == len(Strings.of(["x"])) == 1


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_deflate_streams_that_are_cut(tmp_path: Path) -> None:
    squeezed = zlib.compress(PHOTO)[2:-4]
    data = bytearray(zipped(("1.jpg", PHOTO)))
    at = data.index(squeezed[:8])
    data[at : at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "cut.zip").write_bytes(data)
    opened = open_source([str(tmp_path / "cut.zip")], index=False)
    assert isinstance(attempt(lambda: opened.read(0), IMAGE_ERRORS), Refused)
