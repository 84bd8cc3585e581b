"""Parquet files that are damaged, or hold something else than images and labels."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimlet.data import source as sources
from mimlet.data.source import open_source
from tests.data.images import encoded, picture
from tests.fuzz.fuzz import EDITS, IMAGE_ERRORS, TEXTS, VALUES, Edit, Refused, attempt, fuzzed, mutated
from tests.fuzz.test_archives import walk

PHOTOS = [encoded(picture(k)) for k in range(4)]


def parquet(table: pa.Table, **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def struct(photos: list[bytes]) -> pa.Array:
    return pa.array([{"bytes": photo, "path": f"{i}.jpg"} for i, photo in enumerate(photos)])


VALID = [
    parquet(pa.table({"image": PHOTOS, "label": [0, 1, 0, 1], "name": ["a", "b", "c", "d"]}), row_group_size=2),
    parquet(pa.table({"image": struct(PHOTOS), "label": ["cat", "dog", "cat", "dog"]}), compression="gzip"),
    parquet(pa.table({"img": PHOTOS, "fine_label": pa.array([0, 1, 1, 1], pa.uint8())}), use_dictionary=False),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parquet")


@pytest.mark.parametrize("which", range(len(VALID)))
def test_valid_files(which: int, place: Path) -> None:
    (place / "whole.parquet").write_bytes(VALID[which])
    opened = walk(place / "whole.parquet", labelled=True)
    assert not isinstance(opened, Refused)
    assert opened.read(3) == PHOTOS[3]


@fuzzed(120)
@given(st.integers(0, len(VALID) - 1), EDITS, st.booleans())
def test_mutated_files(place: Path, which: int, edits: list[Edit], labelled: bool) -> None:
    (place / "mutated.parquet").write_bytes(mutated(VALID[which], edits, VALID[0]))
    walk(place / "mutated.parquet", labelled)


@fuzzed(60)
@given(st.integers(0, len(VALID) - 1), EDITS)
def test_mutated_footers(place: Path, which: int, edits: list[Edit]) -> None:
    """Where a file says where everything is, and how large."""
    data = VALID[which]
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = mutated(data[start:-8], edits)
    (place / "footer.parquet").write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + data[-4:])
    walk(place / "footer.parquet", labelled=True)


LABELS = [
    pa.array([None, None, None, None], pa.null()),
    pa.array([0, None, -5, 1]),
    pa.array([0, 1, 2, 2**40]),
    pa.array([0, 1, 2, 2**64 - 1], pa.uint64()),
    pa.array([-(2**63), 1, 0, 0]),
    pa.array([0.0, 1.5, float("nan"), None]),
    pa.array([[0], [1], [], None]),
    pa.array([{"a": 0}, {"a": 1}, None, {"a": 2}]),
    pa.array([b"a", b"\xff", b"", None]),
    pa.array([True, False, None, True]),
    pa.array(["9" * 5000, "1", "\x1b[31m", "a\nb"]),
    pa.array(["a", "b", "a", "b"]).dictionary_encode(),
    pa.array([1, 2, 3, 4], pa.timestamp("ns")),
    pa.array(["1", "2", "3", "4"]).cast(pa.large_string()),
    pa.array([(("a", 1),), (), None, (("b", 2),)], pa.map_(pa.string(), pa.int64())),
    pa.array([1, 2, 3, 4]).cast(pa.decimal128(30, 2)),
]
IMAGES = [
    pa.array(PHOTOS),
    pa.array(PHOTOS, pa.large_binary()),
    struct(PHOTOS),
    pa.array([None, b"", b"no image", PHOTOS[0]]),
    pa.array([None, {"bytes": None}, {"bytes": PHOTOS[0]}, {"bytes": b""}]),
    pa.array([{"bytes": 1}] * 4),
    pa.array([{"bytes": "text"}] * 4),
    pa.array([{"bytes": [PHOTOS[0]]}] * 4),
    pa.array([{"bytes": {"bytes": PHOTOS[0]}}] * 4),
    pa.array(["text"] * 4),
    pa.array([b"12"] * 4, pa.binary(2)),
    pa.array([[PHOTOS[0]]] * 4),
]
NAMES = [
    pa.array(["a", None, "\x1b[31m", "b\nc"]),
    pa.array([1, 2, 3, 4]),
    pa.array([b"\xff"] * 4),
    pa.array([[1]] * 4),
]


@fuzzed(150)
@given(
    st.sampled_from(IMAGES),
    st.sampled_from(LABELS),
    st.sampled_from(NAMES),
    st.dictionaries(st.sampled_from((b"classes", b"huggingface")), VALUES | st.binary() | TEXTS, max_size=2),
    st.booleans(),
)
def test_other_columns(
    place: Path, images: pa.Array, labels: pa.Array, names: pa.Array, metadata: dict[bytes, Any], labelled: bool
) -> None:
    table = pa.table({"image": images, "label": labels, "name": names})
    texts = {key: value if isinstance(value, bytes) else json.dumps(value).encode() for key, value in metadata.items()}
    try:
        data = parquet(table.replace_schema_metadata(texts))
    except pa.ArrowException:
        return
    (place / "other.parquet").write_bytes(data)
    walk(place / "other.parquet", labelled)


@pytest.mark.parametrize("names", [["image", "image"], ["image", "label", "label"], ["\x1b", "image"], []])
def test_odd_schemas(names: list[str], place: Path) -> None:
    table = pa.Table.from_arrays([IMAGES[0] for _ in names], names=names)
    (place / "odd.parquet").write_bytes(parquet(table))
    walk(place / "odd.parquet", labelled=True)


def test_files_of_a_folder_that_differ(tmp_path: Path) -> None:
    for i, table in enumerate(({"image": PHOTOS, "label": [0] * 4}, {"label": ["x"]}, {"image": [1], "label": [1]})):
        (tmp_path / f"{i}.parquet").write_bytes(parquet(pa.table(table)))
    (tmp_path / "3.parquet").symlink_to("/dev/zero")
    walk(tmp_path)


def test_numbers_of_classes_have_a_limit(tmp_path: Path) -> None:
    """Each has a name, made up where the file has none."""
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"image": PHOTOS, "label": [0, 1, 2, 2**30]})))
    said = attempt(lambda: open_source([str(tmp_path / "x.parquet")]))
    assert isinstance(said, Refused)
    assert said.endswith("column label has label 1073741824, but there are at most 16,777,216 classes")


def test_negative_labels_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"image": PHOTOS, "label": [0, -5, -(2**63), 1]})))
    assert open_source([str(tmp_path / "x.parquet")]).labels.tolist() == [0, -1, -1, 1]


def test_a_row_group_that_swells_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of a dictionary can stand in any number of rows; each is written out when it is read."""
    monkeypatch.setattr(sources, "_ROW_GROUP_LIMIT", 5_000_000)
    table = pa.table({"image": pa.array([bytes(100_000)] * 500)})
    (tmp_path / "bomb.parquet").write_bytes(parquet(table))
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    opened = open_source([str(tmp_path / "bomb.parquet")])
    before = pa.total_allocated_bytes()
    said = attempt(lambda: opened.read(0), IMAGE_ERRORS)
    assert said == "damaged in the parquet file: row group 0 has more than 5,000,000 bytes"
    assert pa.total_allocated_bytes() - before < 20_000_000


def test_rows_without_bytes_are_refused(tmp_path: Path) -> None:
    """A run of equal values takes no room, however long it is."""
    table = pa.table({"image": pa.nulls(3_000_000, pa.binary()), "label": pa.nulls(3_000_000, pa.int64())})
    (tmp_path / "long.parquet").write_bytes(parquet(table, row_group_size=3_000_000))
    said = attempt(lambda: open_source([str(tmp_path / "long.parquet")]))
    assert isinstance(said, Refused)
    assert "3,000,000 rows in" in said
