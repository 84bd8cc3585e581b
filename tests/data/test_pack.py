"""Packed images: written in parallel and in pieces, equal to what they were made of, and safe to read."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from xxhash import xxh3_64_hexdigest

from mimlet.cli import main
from mimlet.config import AugmentSettings
from mimlet.data import pack as reading
from mimlet.data import packing
from mimlet.data.augment import evaluation_transform, training_transform
from mimlet.data.dataset import ImageDataset
from mimlet.data.decode import UnreadableImage, decode
from mimlet.data.loader import evaluation_batches, training_batches
from mimlet.data.masks import RandomMasking
from mimlet.data.pack import ENTRY, Packed
from mimlet.data.packing import pack, verify_pack
from mimlet.data.pixels import whole
from mimlet.data.source import Source, open_source
from mimlet.errors import DataError, TrainingStopped, TryAgain
from tests.data.images import encoded, make_folder, picture
from tests.data.test_source import content, parquet_of, tar_of
from tests.tiny import finetune, pretrain

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images are three shards."""
    monkeypatch.setattr(packing, "SMALLEST_SHARD", 4)
    monkeypatch.setattr(packing, "ENOUGH_SHARDS", 3)


@pytest.fixture
def packed(photos: Path, tmp_path: Path) -> Path:
    """Twelve images of three classes, raw, of short side 12, in shards of four."""
    pack(photos, tmp_path / "packed", form="raw", side=12, workers=0)
    return tmp_path / "packed"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pixels(source: Source, i: int) -> torch.Tensor:
    return whole(decode(source.read(i)))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def reindex(folder: Path, entries: np.ndarray) -> None:
    """Writes an index with a good checksum."""
    values = json.loads((folder / "pack.json").read_text())
    values["index"], values["images"] = xxh3_64_hexdigest(entries.tobytes()), len(entries)
    (folder / "pack.json").write_text(json.dumps(values))
    (folder / "index.bin").write_bytes(entries.tobytes())


def index_of(folder: Path) -> np.ndarray:
    return np.fromfile(folder / "index.bin", ENTRY)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_names_labels_and_classes_are_kept(photos: Path, tmp_path: Path, kind: str) -> None:
    data = {"folder": photos, "tar": tar_of(photos), "parquet": parquet_of(photos, tmp_path / "a.parquet")}[kind]
    before = open_source([str(data)], labelled=True)
    pack(data, tmp_path / "packed", labelled=True, workers=0)
    source = open_source([str(tmp_path / "packed")], labelled=True)
    assert content(source) == content(before)  # these are small JPEG files already
    assert source.classes == before.classes
    assert source.describe() == f"12 images in {tmp_path}/packed (3 classes, packed as JPEG of short side 256)"


def test_raw_pixels_are_those_of_evaluation(photos: Path, packed: Path) -> None:
    """Resizing once or at every look is the same, to the last bit."""
    augment = AugmentSettings(eval_crop=1.0)
    for each in (photos, packed):
        dataset = ImageDataset(open_source([str(each)]), evaluation_transform(augment, 12), train=False)
        views = next(evaluation_batches(dataset, batch=12)).images
        if each == photos:
            expected = views
    assert torch.equal(views, expected)
    array = open_source([str(packed)]).read(5)
    assert isinstance(array, np.ndarray)
    assert array.shape == (12, 16, 3)
    assert array.dtype == np.uint8


def test_what_is_resized_and_what_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    small, grey = picture(1, (30, 20)), picture(2, (20, 30)).convert("L")
    turned, long, exact = picture(3, (20, 10)), picture(4, (100, 20)), picture(5, (20, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, data in {
        "0.jpg": encoded(small),
        "1.jpg": encoded(grey),
        "2.jpg": encoded(turned, exif=exif),
        "3.jpg": encoded(long),
        "4.png": encoded(exact, "PNG"),
        "5.jpg": encoded(picture(6, (60, 40))),
    }.items():
        (tmp_path / "a" / name).write_bytes(data)
    before = open_source([str(tmp_path / "a")])
    pack(tmp_path / "a", tmp_path / "jpeg", side=20, workers=0)
    pack(tmp_path / "a", tmp_path / "raw", form="raw", side=20, workers=0)
    jpeg, raw = open_source([str(tmp_path / "jpeg")]), open_source([str(tmp_path / "raw")])
    assert [jpeg.read(i) == before.read(i) for i in range(6)] == [True, True, False, False, False, False]
    sizes = [(30, 20), (20, 30), (10, 20), (80, 20), (20, 24), (30, 20)]
    assert [tuple(reversed(pixels(raw, i).shape[1:])) for i in range(6)] == sizes
    assert [tuple(reversed(pixels(jpeg, i).shape[1:])) for i in range(6)] == sizes
    for i in (0, 1, 2, 4):  # nothing is enlarged, so that nothing changes
        assert torch.equal(pixels(raw, i), pixels(before, i))
    assert torch.equal(pixels(raw, 3), pixels(before, 3)[:, :, 10:90])
    close = (pixels(jpeg, 5).float() - pixels(raw, 5).float()).abs().mean()
    assert close < 4
    index = index_of(tmp_path / "jpeg")
    assert [(int(entry["width"]), int(entry["height"])) for entry in index] == sizes


def test_packing_a_pack(packed: Path, tmp_path: Path) -> None:
    pack(packed, tmp_path / "again", form="raw", side=12, workers=0)
    one, two = open_source([str(packed)]), open_source([str(tmp_path / "again")])
    assert all(torch.equal(pixels(one, i), pixels(two, i)) for i in range(12))
    assert [two.name(i) for i in range(12)] == [one.name(i) for i in range(12)]


def test_packs_join_other_data(photos: Path, packed: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "more", ("bee", "dog"), each=1)
    source = open_source([str(packed), str(tmp_path / "more")], labelled=True)
    assert source.classes == ["ant", "bee", "cat", "dog"]
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [1, 3]
    assert source.name(4) == "bee/0.jpg"


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_workers_change_no_byte(photos: Path, tmp_path: Path, form: str) -> None:
    for workers in (0, 1, 2):
        pack(photos, tmp_path / str(workers), form=form, side=12, workers=workers)  # type: ignore[arg-type]
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(tmp_path / "2")
    assert sorted(files(tmp_path / "0")) == [
        "00000.bin",
        "00001.bin",
        "00002.bin",
        "index.bin",
        "names.bin",
        "pack.json",
    ]


def _at_record(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something when record `number` is made."""
    made, before = [0], packing._record

    def record(*given: object) -> tuple[bytes, int, int]:
        made[0] += 1
        if made[0] == number:
            act()
        return before(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "_record", record)


def test_killed_and_repeated(photos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = tmp_path / "killed"
    with monkeypatch.context() as patch:
        _at_record(7, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=pack, args=(photos, to), kwargs={"form": "raw", "side": 12, "workers": 0})
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    left = files(to)
    assert {"00000.bin", "00000.part", "packing.json"} <= left.keys()
    assert "00001.bin" not in left
    with pytest.raises(DataError, match="is not packed to its end; repeat the `mimlet pack` command, which goes on"):
        open_source([str(to)])
    (to / "00001.part").write_bytes(b"half a note")
    with monkeypatch.context() as patch:
        count = [0]
        _at_record(9, lambda: count.append(1), patch)
        pack(photos, to, form="raw", side=12, workers=0)
        assert count == [0]  # four of the twelve were not made again
    assert files(to) == files(packed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_repeated(
    photos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    to = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        _at_record(2, lambda: os.kill(os.getpid(), number), patch)
        with pytest.raises(
            TrainingStopped, match=r"stopped, 2 of 3 shards are left.* the same command goes on"
        ) as stopped:
            pack(photos, to, form="raw", side=12, workers=0)
    assert stopped.value.code == 128 + number
    pack(photos, to, form="raw", side=12, workers=0)
    assert files(to) == files(packed)


def test_packed_already(photos: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(packed)
    capsys.readouterr()
    pack(photos, packed, form="raw", side=12, workers=0)
    assert files(packed) == before
    assert f"{packed}: 12 images, 3 shards, " in capsys.readouterr().out
    (packed / "00001.bin").unlink()
    with pytest.raises(DataError, match=r"is not whole: 00001.bin \(No such file"):
        pack(photos, packed, form="raw", side=12, workers=0)


def test_another_pack_in_the_folder(photos: Path, packed: Path) -> None:
    with pytest.raises(
        DataError, match=r"was begun otherwise \(then -> now\): form raw -> jpeg; side 12 -> 16\. Repeat"
    ):
        pack(photos, packed, side=16, workers=0)
    (photos / "ant/9.jpg").write_bytes(encoded(picture(9)))
    with pytest.raises(DataError, match=r"now\): other images, names or labels\. Repeat"):
        pack(photos, packed, form="raw", side=12, workers=0)
    with pytest.raises(DataError, match=r"photos is not empty: it holds ant; give a new folder"):
        pack(photos, photos, workers=0)


def test_a_full_disk(photos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 4:  # settings, shard, note: the second shard
            raise OSError(errno.ENOSPC, "No space left on device")

    synced: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TryAgain, match=r"cannot write .*00001.bin: No space left on device"):
            pack(photos, tmp_path / "full", form="raw", side=12, workers=0)
    assert not list((tmp_path / "full").glob(".*.tmp"))
    pack(photos, tmp_path / "full", form="raw", side=12, workers=0)
    assert files(tmp_path / "full") == files(packed)


def test_two_at_once(photos: Path, tmp_path: Path) -> None:
    with packing._alone(tmp_path / "to"), pytest.raises(TryAgain, match="another process is packing into"):
        pack(photos, tmp_path / "to", workers=0)
    pack(photos, tmp_path / "to", workers=0)


def test_unreadable_images_are_left_out_and_listed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bee/1.jpg").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"1 of 12 images could not be read, more than the share 0.05 .* bee/1.jpg: not an"
    ):
        pack(photos, tmp_path / "few", workers=0, max_unreadable=0.05)
    made = pack(photos, tmp_path / "packed", workers=0)
    assert (made.images, made.unreadable) == (11, 1)
    assert (tmp_path / "packed/unreadable.txt").read_text() == "bee/1.jpg\tnot an image, or of an unknown format\n"
    assert "11 images, 1 unreadable one left out (unreadable.txt), 3 shards" in capsys.readouterr().out
    source = open_source([str(tmp_path / "packed")], labelled=True)
    assert [source.name(i) for i in (4, 5)] == ["bee/0.jpg", "bee/2.jpg"]
    assert source.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.jpg").touch()
    with pytest.raises(DataError, match="none of the 1 image could be read"):
        pack(tmp_path / "none", tmp_path / "nothing", workers=0, max_unreadable=1.0)


def test_a_vanished_folder_is_no_unreadable_image(
    photos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        _at_record(6, lambda: photos.rename(elsewhere) and None, patch)
        with pytest.raises(TryAgain, match=r"2 of 4 images in a row are out of reach, .* bee/2.jpg: No such file"):
            pack(photos, tmp_path / "to", form="raw", side=12, workers=0)
    elsewhere.rename(photos)
    pack(photos, tmp_path / "to", form="raw", side=12, workers=0)
    assert files(tmp_path / "to") == files(packed)

    def failing(path: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("mimlet.data.source.read_regular", failing)
    with pytest.raises(TryAgain, match=r"cannot read ant/0.jpg: Input/output error\. What is packed is kept"):
        pack(photos, tmp_path / "broken", workers=0)


def test_a_damaged_record(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_pack(packed) == 12
    flip(packed / "00001.bin", 12 * 16 * 3 + 5)
    source = open_source([str(packed)])
    with pytest.raises(UnreadableImage, match=r"the record at byte 576 of 00001.bin does not have its checksum"):
        source.read(5)
    assert pixels(source, 4).shape == pixels(source, 6).shape == (3, 12, 16)
    transform = training_transform(AugmentSettings(), 8)
    batch = next(training_batches(ImageDataset(source, transform), batch=12, total_steps=1))
    assert [name for name, _ in batch.unreadable] == ["bee/1.jpg"]
    capsys.readouterr()
    with pytest.raises(DataError, match=r"packed is damaged in 1 place, listed above"):
        verify_pack(packed)
    assert (
        capsys.readouterr().out
        == "bee/1.jpg: damaged: the record at byte 576 of 00001.bin does not have its checksum\n"
    )


def test_a_truncated_shard_and_damaged_names(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_source([str(packed)])
    shard = packed / "00002.bin"
    os.truncate(shard, 3 * 576 + 1)
    with pytest.raises(UnreadableImage, match=r"byte 1,728 of 00002.bin is cut off"):
        opened.read(11)
    with pytest.raises(DataError, match=r"is not whole: 00002.bin \(1,729 bytes, not 2,304\); copy it again"):
        open_source([str(packed)])
    (packed / "00000.bin").unlink()
    (packed / "names.bin").unlink()
    with pytest.raises(DataError, match=r"\(No such file or directory\) and 1 more"):
        open_source([str(packed)])
    capsys.readouterr()
    with pytest.raises(DataError, match="damaged in 8 places"):
        verify_pack(packed)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "00000.bin: No such file or directory",
        "00002.bin: 1,729 bytes, not 2,304",
        "names.bin: No such file or directory",
    ]
    assert lines[3] == f"{packed}#0: No such file or directory"


def test_a_damaged_index(packed: Path) -> None:
    whole_index = index_of(packed)
    flip(packed / "index.bin", 100)
    with pytest.raises(DataError, match=r"index.bin is damaged: it does not have the size or the checksum"):
        open_source([str(packed)])
    os.truncate(packed / "index.bin", 100)
    with pytest.raises(DataError, match=r"index.bin is damaged"):
        open_source([str(packed)])
    for field, value in {
        "offset": 2304 - 575,
        "shard": 3,
        "size": 577,
        "label": 3,
        "height": 13,
        "width": 0,
    }.items():
        for change in (value, -2 if field == "label" else np.iinfo(ENTRY[field]).max):
            entries = whole_index.copy()
            entries[field][7] = change
            reindex(packed, entries)
            with pytest.raises(DataError, match=r"entry 7 leads out of its shard, classes or pixels"):
                open_source([str(packed)])
    entries = whole_index.copy()
    entries["name"][7] = 2**63
    entries["name_size"][6] = 2**32 - 1
    reindex(packed, entries)
    source = open_source([str(packed)])
    assert source.name(7) == f"{packed}#7"
    assert source.name(6).startswith("bee/2.jpg")


@pytest.mark.parametrize("name", ["pack.json", "index.bin", "00000.bin"])
def test_a_missing_file(packed: Path, name: str) -> None:
    (packed / name).unlink()
    with pytest.raises(DataError, match=rf"{name}.*No such file"):
        open_source([str(packed)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "pack.json is damaged: "),
        ("[1]", "pack.json is damaged: "),
        ('{"version": 2}', "is of version 2, and this is mimlet for version 1; update it"),
        ('{"version": 1}', "pack.json is damaged: recipe: Field required"),
    ],
)
def test_a_damaged_description(packed: Path, text: str, message: str) -> None:
    (packed / "pack.json").write_text(text)
    with pytest.raises(DataError, match=message):
        open_source([str(packed)])


def test_labels(photos: Path, tmp_path: Path) -> None:
    (photos / "loose.jpg").write_bytes(encoded(picture(1)))
    pack(photos, tmp_path / "all", workers=0)
    source = open_source([str(tmp_path / "all")], labelled=True)
    assert len(source) == 12
    assert source.describe().endswith("; 1 image without a label left out")
    assert len(open_source([str(tmp_path / "all")])) == 13
    assert len(open_source([str(tmp_path / "all")], labelled=True, classes=["cat", "bee", "ant"])) == 12
    pack(photos / "ant", tmp_path / "ants", workers=0)
    with pytest.raises(DataError, match="was packed without labels; pack labelled images"):
        open_source([str(tmp_path / "ants")], labelled=True)
    with pytest.raises(DataError, match="has 4 images but no sub-folders"):
        pack(photos / "ant", tmp_path / "no", labelled=True, workers=0)


def test_reading_leaves_no_trace(packed: Path, tmp_path: Path) -> None:
    for path in (*packed.iterdir(), packed):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(packed.iterdir())]
    changed = packed.stat().st_mtime_ns
    source = open_source([str(packed)])
    assert len([source.read(i) for i in range(12)]) == verify_pack(packed) == 12
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(packed.iterdir())] == before
    assert packed.stat().st_mtime_ns == changed
    packed.chmod(0o755)


def test_descriptors(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    monkeypatch.setattr(reading, "OPEN_FILES", 2)
    before = descriptors()
    source = open_source([str(packed)])
    first = [pixels(source, i) for i in range(12)]
    assert descriptors() == before + 2
    again = pickle.loads(pickle.dumps(source))
    assert descriptors() == before + 2
    assert all(torch.equal(pixels(again, i), first[i]) for i in (11, 0, 5, 11))
    del source, again
    assert descriptors() == before


def training_set(path: Path) -> ImageDataset:
    transform = training_transform(AugmentSettings(randaugment="rand-m9-mstd0.5"), 16)
    return ImageDataset(open_source([str(path)]), transform, {"mask": RandomMasking(16, 0.75)}, seed=3)


def test_order_is_one_whatever_the_workers_and_restarts(packed: Path, photos: Path) -> None:
    def seen(start: int = 0, workers: int = 0, path: Path = packed) -> list[tuple[torch.Tensor, ...]]:
        batches = training_batches(training_set(path), batch=4, total_steps=7, start_step=start, workers=workers)
        return [(batch.indices, batch.images, batch.mask.hidden) for batch in batches]

    reference = seen()
    for start in range(7):
        for workers in (0, 2) if start < 2 else (0,):
            for one, other in zip(seen(start, workers), reference[start:], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    folder = seen(path=photos)
    assert [indices.tolist() for indices, *_ in folder] == [indices.tolist() for indices, *_ in reference]


def test_a_million_images_open_from_one_buffer(packed: Path) -> None:
    """Opening reads the index, and asks for the shards' sizes; names and images are not looked at."""
    reindex(packed, np.resize(index_of(packed), 1_000_000))
    (packed / "names.bin").unlink()
    source = open_source([str(packed)], labelled=True)
    assert isinstance(source, Packed)
    assert len(source) == 1_000_000
    assert source._entries.nbytes == 44_000_000
    assert source._entries.base is not None  # a view of what was read, not a copy
    assert source.label(999_999) == source.labels[999_999 % 12]
    assert torch.equal(pixels(source, 999_999), pixels(source, 999_999 % 12))


def test_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "packed"
    given = ["pack", str(tar_of(photos)), "--to", str(to), "--form", "raw", "--side", "16", "--workers", "0"]
    assert main([*given, "--labelled"]) == 0
    assert capsys.readouterr().out.endswith(f"Train with it:\n\n  mimlet pretrain --data {to}\n")
    assert main(["pack", "--verify", str(to)]) == 0
    assert "all is as it was packed" in capsys.readouterr().out
    pretrain(to, tmp_path / "mae")
    finetune(to, tmp_path / "classes")
    assert json.loads((tmp_path / "classes/config.json").read_text())["data"]["path"] == [str(to)]
    capsys.readouterr()
    for arguments, message in (
        (given, "was begun otherwise (then -> now): labelled True -> False"),
        (["pack", str(photos)], "give --to, the folder to pack into"),
        (["pack", "--verify", str(to), "--to", "x"], "--verify writes nothing: leave out --to"),
        (["pack", "phots", "--to", "x"], "DATA: no such file or folder 'phots'"),
        (["pack", "--verify", str(photos)], "cannot read"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_training_repeats_itself_from_a_pack(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed", form="raw", side=16, workers=0)
    for workers in ("0", "2"):
        pretrain(tmp_path / "packed", tmp_path / workers, "--workers", workers)
    one, two = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in "02")
    assert one == two
    shutil.rmtree(tmp_path / "packed")
