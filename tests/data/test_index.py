import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from mimlet.data import index
from mimlet.data.index import Listing, Strings, cache_folder, list_archive, list_folder
from mimlet.errors import DataError


def names(listing: Listing) -> list[str]:
    return [listing.path(i) for i in range(len(listing))]


def settle(root: Path, seconds: float = 10) -> None:
    """Makes everything look as if it had last changed some time ago: fresh folders are not cached."""
    then = time.time() - seconds
    for path in [root, *root.rglob("*")]:
        os.utime(path, (then, then))


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the real walks."""
    done: list[str] = []
    walk = index._walk

    def recorded(root: str) -> object:
        done.append(root)
        return walk(root)

    monkeypatch.setattr(index, "_walk", recorded)
    return done


def test_strings_round_trip() -> None:
    strings = ["", "a", "żółw.jpg", os.fsdecode(b"\xff.jpg"), ""]
    packed = Strings.of(strings)
    assert [packed[i] for i in range(len(packed))] == strings


def test_order_and_what_is_left_out(tmp_path: Path) -> None:
    for name in (
        "b/1.jpg",
        "b/0.PNG",
        "a/x/2.jpeg",
        "a/1.webp",
        "z.jpg",
        "b/notes.txt",
        "README",
        ".DS_Store",
        ".git/3.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listing = list_folder(str(tmp_path))
    assert names(listing) == ["z.jpg", "a/1.webp", "a/x/2.jpeg", "b/0.PNG", "b/1.jpg"]
    assert listing.ignored == {".txt": 1, "(no suffix)": 1, "hidden": 2}
    classes, labels = listing.labels()
    assert classes == ["a", "b"]
    assert labels.tolist() == [-1, 0, 0, 1, 1]


def test_links_are_followed_and_cycles_end(photos: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(photos / "ant", outside)
    (photos / "dog").symlink_to(outside)
    (photos / "eel").symlink_to(outside)
    (photos / "ant" / "again").symlink_to(photos)
    assert names(list_folder(str(photos))) == [
        f"{c}/{k}.jpg" for c in ("ant", "bee", "cat", "dog", "eel") for k in range(4)
    ]


def test_second_opening_reads_the_cache(photos: Path, walks: list[str]) -> None:
    settle(photos)
    first, second = list_folder(str(photos)), list_folder(str(photos))
    assert len(walks) == 1
    assert names(first) == names(second)
    assert first.folders == second.folders
    assert np.array_equal(first.folder_of, second.folder_of)
    assert first.ignored == second.ignored == {}
    assert names(list_folder(str(photos), cache=False)) == names(first)
    assert len(walks) == 2


@pytest.mark.parametrize("change", ["add", "remove", "new folder", "rename folder"])
def test_changes_are_seen(photos: Path, walks: list[str], change: str) -> None:
    (photos / "empty").mkdir()
    settle(photos)
    before = names(list_folder(str(photos)))
    if change == "add":
        shutil.copy(photos / "cat/0.jpg", photos / "cat/9.jpg")
        expected = [*before, "cat/9.jpg"]
    elif change == "remove":
        (photos / "bee/2.jpg").unlink()
        expected = [name for name in before if name != "bee/2.jpg"]
    elif change == "new folder":
        (photos / "empty/new").mkdir()
        shutil.copy(photos / "cat/0.jpg", photos / "empty/new/0.jpg")
        expected = [*before, "empty/new/0.jpg"]
    else:
        (photos / "ant").rename(photos / "dog")
        expected = [*before[4:], *(f"dog/{k}.jpg" for k in range(4))]
    assert names(list_folder(str(photos))) == expected
    assert len(walks) == 2


def test_a_folder_that_just_changed_is_not_cached(photos: Path, walks: list[str]) -> None:
    list_folder(str(photos))
    list_folder(str(photos))
    assert len(walks) == 2


@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped", "foreign"])
def test_damaged_cache_is_rebuilt(photos: Path, walks: list[str], damage: str) -> None:
    settle(photos)
    expected = names(list_folder(str(photos)))
    (file,) = (cache_folder() / "index").iterdir()
    data = file.read_bytes()
    if damage == "foreign":
        np.savez(file, other=np.zeros(3))
    else:
        middle = data.find(b"0.jpg1.jpg")
        flipped = data[:middle] + b"X" + data[middle + 1 :]
        file.write_bytes({"cut": data[: len(data) // 2], "garbage": b"garbage", "flipped": flipped}[damage])
    assert names(list_folder(str(photos))) == expected
    assert len(walks) == 2
    assert names(list_folder(str(photos))) == expected
    assert len(walks) == 2, "the cache is whole again"


def test_a_cache_that_cannot_be_written_is_done_without(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(photos)
    (photos.parent / "file").touch()
    monkeypatch.setenv("MIMLET_CACHE", str(photos.parent / "file" / "below"))
    assert len(list_folder(str(photos))) == 12


def test_archive_listing_follows_the_file(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    scans: list[str] = []

    def scan(path: str) -> Listing:
        scans.append(path)
        return Listing.of({"x": [("2.jpg", (7, 8, -1)), ("1.jpg", (5, 6, -1))]}, {})

    archive.write_bytes(b"first")
    settle(tmp_path)
    listing = [list_archive(str(archive), scan) for _ in range(2)][1]
    assert (names(listing), listing.places.tolist(), len(scans)) == (
        ["x/1.jpg", "x/2.jpg"],
        [[5, 6, -1], [7, 8, -1]],
        1,
    )
    archive.write_bytes(b"second")
    list_archive(str(archive), scan)
    assert len(scans) == 2


def test_closed_folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: str) -> object:
        if path.endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"cannot read the folder .*bee: Permission denied"):
        list_folder(str(photos))
