"""Packs whose files are damaged, or made to lie with good checksums."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest

from mimlet.data.pack import ENTRY, INDEX_FILE, NAMES_FILE, PACK_FILE, shard_name
from mimlet.data.packing import pack, verify_pack
from tests.data.images import make_folder
from tests.fuzz.fuzz import CHANGES, EDITS, NUMBERS, Edit, Refused, attempt, changed, fuzzed, mutated
from tests.fuzz.test_archives import walk

FILES = (PACK_FILE, INDEX_FILE, NAMES_FILE, shard_name(0))
Packs = dict[str, Path]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Packs:
    photos = make_folder(tmp_path_factory.mktemp("photos") / "all", each=2)
    folder = tmp_path_factory.mktemp("packs")
    for form in ("raw", "jpeg"):
        pack([str(photos)], folder / form, form=form, side=16, workers=0)
    return {form: folder / form for form in ("raw", "jpeg")}


def with_files(folder: Path, files: dict[str, bytes]) -> Path:
    """The same pack with other files."""
    other = folder.parent / f"{folder.name}-other"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    for name, data in files.items():
        (other / name).write_bytes(data)
    return other


def check(folder: Path) -> None:
    walk(folder, labelled=True)
    attempt(lambda: verify_pack(folder))


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_valid_packs(form: str, packs: Packs) -> None:
    opened = walk(packs[form], labelled=True)
    assert not isinstance(opened, Refused)
    assert opened.classes == ["ant", "bee", "cat"]


@fuzzed(80)
@given(st.sampled_from(("raw", "jpeg")), st.sampled_from(FILES), EDITS)
def test_mutated_files(packs: Packs, form: str, name: str, edits: list[Edit]) -> None:
    data = mutated((packs[form] / name).read_bytes(), edits)
    check(with_files(packs[form], {name: data}))


@fuzzed(80)
@given(st.sampled_from(("raw", "jpeg")), CHANGES)
def test_other_descriptions(packs: Packs, form: str, changes: list[tuple[int, str, Any]]) -> None:
    values = changed(json.loads((packs[form] / PACK_FILE).read_bytes()), changes)
    check(with_files(packs[form], {PACK_FILE: json.dumps(values).encode()}))


@fuzzed(80)
@given(
    st.sampled_from(("raw", "jpeg")),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(ENTRY.names), st.sampled_from(NUMBERS)), min_size=1),
)
def test_other_entries_with_a_good_checksum(packs: Packs, form: str, numbers: list[tuple[int, str, int]]) -> None:
    entries = np.frombuffer((packs[form] / INDEX_FILE).read_bytes(), ENTRY).copy()
    for row, name, number in numbers:
        kind = entries.dtype[name]
        entries[name][row] = np.array(number % 2 ** (8 * kind.itemsize), f"<u{kind.itemsize}").view(kind)
    described = json.loads((packs[form] / PACK_FILE).read_bytes())
    described["index"] = xxh3_64_hexdigest(entries.tobytes())
    files = {INDEX_FILE: entries.tobytes(), PACK_FILE: json.dumps(described).encode()}
    check(with_files(packs[form], files))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "absent"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_not_waited_for(name: str, kind: str, packs: Packs) -> None:
    folder = with_files(packs["raw"], {})
    (folder / name).unlink()
    put: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(folder / name),
        "device": lambda: (folder / name).symlink_to("/dev/zero"),
        "folder": (folder / name).mkdir,
        "absent": lambda: None,
    }
    put[kind]()
    check(folder)
