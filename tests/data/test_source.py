import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mimlet
from mimlet.data.decode import UnreadableImage, decode
from mimlet.data.pixels import as_pillow
from mimlet.data.source import Source, are_records, open_source, record_source
from mimlet.errors import ConfigError, DataError
from tests.data.images import encoded, make_folder, picture
from tests.shared import data_folder


def content(source: Source) -> list[tuple[str, object, int]]:
    return [(source.name(i), source.read(i), source.label(i)) for i in range(len(source))]


def tar_of(folder: Path, root: str = "") -> Path:
    path = folder.parent / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, root or ".")
    return path


def zip_of(folder: Path, root: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.parent / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, Path(root) / file.relative_to(folder))
    return path


def list_of(folder: Path) -> Path:
    path = folder.parent / "a.txt"
    files = sorted(folder.rglob("*.jpg"))
    path.write_text("".join(f"{file.relative_to(folder.parent)}\t{file.parent.name}\n" for file in files))
    return path


def parquet_of(folder: Path, path: Path, style: str = "plain", rows: slice = slice(None)) -> Path:
    files = sorted(folder.rglob("*.jpg"))[rows]
    classes = sorted(item.name for item in folder.iterdir())
    names = [str(file.relative_to(folder)) for file in files]
    images = [file.read_bytes() for file in files]
    labels = [classes.index(file.parent.name) for file in files]
    if style == "plain":
        table = pa.table(
            {"id": [0] * len(files), "image": images, "label": pa.array(labels, pa.int32()), "name": names}
        )
        table = table.replace_schema_metadata({"classes": json.dumps(classes)})
    elif style == "hugging face":
        cells = [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)]
        features = {"img": {"_type": "Image"}, "fine_label": {"names": classes, "_type": "ClassLabel"}}
        table = pa.table({"img": cells, "fine_label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    else:
        table = pa.table({"jpeg": images, "labels": [classes[label] for label in labels]})
    pq.write_table(table, path, row_group_size=5)
    return path


def test_folder(photos: Path) -> None:
    source = open_source([str(photos)], labelled=True)
    assert source.classes == ["ant", "bee", "cat"]
    assert [source.name(i) for i in (0, 11)] == ["ant/0.jpg", "cat/3.jpg"]
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.read(5) == (photos / "bee/1.jpg").read_bytes()
    assert source.describe() == f"12 images in {photos} (3 classes)"
    assert open_source([str(photos)]).describe() == f"12 images in {photos} (3 folders)"


@pytest.mark.parametrize("root", ["", "data/train"])
@pytest.mark.parametrize("kind", ["tar", "stored zip", "deflated zip"])
def test_archives_equal_the_folder(photos: Path, kind: str, root: str) -> None:
    folder = open_source([str(photos)], labelled=True)
    if kind == "tar":
        archive = tar_of(photos, root)
    else:
        archive = zip_of(photos, root, zipfile.ZIP_STORED if kind == "stored zip" else zipfile.ZIP_DEFLATED)
    for _ in range(3):  # the last time from the cached list
        source = open_source([str(archive)], labelled=True)
        prefix = f"{root}/" if root else ""
        assert content(source) == [(prefix + name, data, label) for name, data, label in content(folder)]
        assert source.classes == folder.classes
        os.utime(archive, (0, 0))


def test_archive_with_one_class_folder(photos: Path) -> None:
    source = open_source([str(tar_of(photos / "bee", "data/train/bee"))], labelled=True, classes=["ant", "bee"])
    assert source.labels.tolist() == [1] * 4
    with pytest.raises(DataError, match=r"only one class \(bee\)"):
        open_source([str(tar_of(photos / "bee", "bee"))], labelled=True)


@pytest.mark.parametrize("style", ["plain", "hugging face"])
def test_parquet_equals_the_folder(photos: Path, tmp_path: Path, style: str) -> None:
    folder = open_source([str(photos)], labelled=True)
    source = open_source([str(parquet_of(photos, tmp_path / "a.parquet", style))], labelled=True)
    assert content(source) == content(folder)
    assert source.classes == folder.classes
    assert source.describe().endswith("a.parquet (3 classes)")


def test_folder_of_parquet_with_names_as_labels(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    parquet_of(photos, tmp_path / "shards/0.parquet", "text", slice(0, 7))
    parquet_of(photos, tmp_path / "shards/1.parquet", "text", slice(7, None))
    source = open_source([str(tmp_path / "shards")], labelled=True)
    assert [row[1:] for row in content(source)] == [
        row[1:] for row in content(open_source([str(photos)], labelled=True))
    ]
    assert source.classes == ["ant", "bee", "cat"]
    assert source.name(6) == "0.parquet#1.1"


def test_parquet_keeps_few_row_groups(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimlet.data.source._ROW_GROUP_MEMORY", 1)
    source = open_source([str(parquet_of(photos, tmp_path / "a.parquet"))])
    files = sorted(photos.rglob("*.jpg"))
    assert [source.read(i) for i in (11, 0, 6, 11)] == [files[i].read_bytes() for i in (11, 0, 6, 11)]
    assert len(source._loaded) == 1  # type: ignore[attr-defined]


def test_list_equals_the_folder(photos: Path) -> None:
    source = open_source([str(list_of(photos))], labelled=True)
    expected = [
        (f"photos/{name}", data, label) for name, data, label in content(open_source([str(photos)], labelled=True))
    ]
    assert content(source) == expected
    assert source.classes == ["ant", "bee", "cat"]


def test_list_with_numbers_as_labels(photos: Path) -> None:
    (photos / "l.txt").write_text("ant/0.jpg\t10\nbee/0.jpg\t9\n\ncat/0.jpg\t10\n")
    source = open_source([str(photos / "l.txt")], labelled=True)
    assert (source.classes, source.labels.tolist()) == (["9", "10"], [1, 0, 1])
    (photos / "l.txt").write_text("ant/0.jpg\nbee/0.jpg\n")
    assert open_source([str(photos / "l.txt")]).labels.tolist() == [-1, -1]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "parquet", "list", "joined"])
def test_sources_travel_to_other_processes(photos: Path, tmp_path: Path, kind: str) -> None:
    paths = {
        "folder": photos,
        "tar": tar_of(photos),
        "zip": zip_of(photos),
        "parquet": parquet_of(photos, tmp_path / "a.parquet"),
        "list": list_of(photos),
    }
    source = open_source([str(paths["tar"]), str(photos)] if kind == "joined" else [str(paths[kind])])
    before = content(source)  # opens handles
    assert content(pickle.loads(pickle.dumps(source))) == before


def write_mnist(root: Path, split: str, digits: list[int]) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    pixels = b"".join(bytes([digit]) * 784 for digit in digits)
    (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, len(digits), 28, 28) + pixels)
    (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(digits)) + bytes(digits))


def test_torchvision(tmp_path: Path) -> None:
    for split, digits in (("train", [3, 7, 0]), ("t10k", [5, 1])):
        write_mnist(tmp_path, split, digits)
    train = open_source([f"torchvision:MNIST:{tmp_path}"], labelled=True)
    assert train.labels.tolist() == [3, 7, 0]
    assert train.classes[3] == "3 - three"
    assert np.asarray(decode(train.read(1))).tolist() == [[[7] * 3] * 28] * 28
    test = open_source([f"torchvision:MNIST:{tmp_path}:test"], labelled=True, classes=train.classes)
    assert test.labels.tolist() == [5, 1]
    assert pickle.loads(pickle.dumps(test)).describe() == f"2 images in torchvision:MNIST:{tmp_path}:test (10 classes)"


def test_torchvision_without_splits(photos: Path) -> None:
    source = open_source([f"torchvision:ImageFolder:{photos}"], labelled=True)
    assert (source.classes, source.labels.tolist()) == (["ant", "bee", "cat"], [0] * 4 + [1] * 4 + [2] * 4)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("torchvision:CIFAR1:d", ConfigError, r"no data set 'CIFAR1' \(did you mean 'CIFAR10'\?\)"),
        ("torchvision:CIFAR10", ConfigError, "expected torchvision:NAME:ROOT"),
        ("torchvision:CIFAR10:d:val", ConfigError, "CIFAR10 has the splits train and test, not 'val'"),
        ("torchvision:ImageFolder:d:test", ConfigError, "ImageFolder has no splits; leave out ':test'"),
        ("torchvision:CIFAR10:nowhere", DataError, "cannot open CIFAR10 in nowhere: Dataset not found or corrupted"),
        ("torchvision:STL10:nowhere:nosplit", DataError, "cannot open STL10 in nowhere: Unknown value 'nosplit'"),
    ],
)
def test_torchvision_errors(path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_source([path])


def test_several_paths_merge_by_class_name(photos: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", ("dog", "bee"), 1)
    source = open_source([str(photos), str(other)], labelled=True)
    assert source.classes == ["ant", "bee", "cat", "dog"]
    assert [(source.name(i), source.label(i)) for i in (4, 12, 13)] == [
        ("bee/0.jpg", 1),
        ("bee/0.jpg", 1),
        ("dog/0.jpg", 3),
    ]
    assert source.read(13) == (other / "dog/0.jpg").read_bytes()
    assert source.describe().startswith("14 images: 12 images in ")
    separate = [str(make_folder(tmp_path / name, (name,), 1)) for name in ("x", "y")]
    assert open_source(separate, labelled=True).classes == ["x", "y"]


def test_forced_classes(photos: Path, tmp_path: Path) -> None:
    source = open_source([str(photos)], labelled=True, classes=["dog", "cat", "bee", "ant"])
    assert source.labels.tolist() == [3] * 4 + [2] * 4 + [1] * 4
    assert source.classes == ["dog", "cat", "bee", "ant"]
    with pytest.raises(DataError, match=r"1 of 3 classes outside the 3 expected ones: 'cat' \(did you mean 'cats'\?\)"):
        open_source([str(photos)], labelled=True, classes=["ant", "bee", "cats"])
    one = make_folder(tmp_path / "one", ("bee",), 2)
    assert open_source([str(one)], labelled=True, classes=["ant", "bee"]).labels.tolist() == [1, 1]


def test_labels_where_they_are_plain(photos: Path) -> None:
    assert open_source([str(photos)]).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    flat = open_source([str(photos / "ant")])
    assert (flat.classes, flat.labels.tolist(), flat.label(0)) == ([], [-1] * 4, -1)
    assert open_source([str(photos), str(photos / "ant")]).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 4


def test_loose_images(photos: Path) -> None:
    (photos / "extra.jpg").write_bytes(encoded(picture(9)))
    unlabelled = open_source([str(photos)])
    assert (unlabelled.name(0), unlabelled.labels[:2].tolist()) == ("extra.jpg", [-1, 0])
    labelled = open_source([str(photos)], labelled=True)
    assert len(labelled) == 12
    assert labelled.read(0) == (photos / "ant/0.jpg").read_bytes()
    assert labelled.describe().endswith("(3 classes); 1 image outside the class folders left out")


def test_ignored_files_are_mentioned_when_they_prevail(photos: Path) -> None:
    for k in range(9):
        (photos / f"{k}.mp4").touch()
    assert open_source([str(photos)]).describe().endswith("(3 folders)")
    for k in range(9):
        (photos / f".{k}").touch()
    assert open_source([str(photos)]).describe().endswith("; other files ignored: 9 .mp4, 9 hidden")


def test_members_with_hostile_names_are_only_text(tmp_path: Path) -> None:
    data = encoded(picture(0))
    hostile = ["../../escaped.jpg", "/absolute/evil.jpg", "a/../../b.jpg"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in hostile:
            archive.writestr(zipfile.ZipInfo(name), data)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in hostile:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.parent.rglob("*"))
    for kind in ("zip", "tar"):
        source = open_source([str(tmp_path / f"a.{kind}")], index=False)
        assert sorted(source.name(i) for i in range(len(source))) == sorted(hostile)
        assert all(source.read(i) == data for i in range(3))
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_missing_path_names_its_neighbour(photos: Path) -> None:
    with pytest.raises(DataError, match=r"fotos does not exist: no 'fotos' in .* \(did you mean 'photos'\?\)"):
        open_source([str(photos.parent / "fotos")])
    with pytest.raises(DataError, match=r"no 'bees' in .*photos \(did you mean 'bee'\?\)"):
        open_source([str(photos / "bees" / "deep" / "er")])


@pytest.mark.parametrize(
    ("files", "labelled", "message"),
    [
        ([], False, "no image in .*: it is empty"),
        (
            ["a.txt", "b.txt", "c.mov", ".x"],
            False,
            r"it has only other files \(2 .txt, 1 hidden, 1 .mov\); expected .*\.jpeg",
        ),
        (["cat/1.jpg", "cat/2.jpg"], True, r"only one class \(cat\); labelled images need at least two"),
        (
            ["1.jpg", "2.jpg"],
            True,
            "2 images but no sub-folders; labelled images need one folder per class, as in .*/cat/1.jpg",
        ),
        (
            ["train/cat/1.jpg", "val/cat/1.jpg"],
            True,
            r"holds splits \(train, val\), not classes; name one of them, as in .*/train",
        ),
    ],
)
def test_unfit_folders(tmp_path: Path, files: list[str], labelled: bool, message: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        open_source([str(root)], labelled=labelled)


def test_unfit_archives(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "b.tar.gz").touch()
    with pytest.raises(DataError, match=r"compressed tar, which can only be read from its beginning; .*gunzip"):
        open_source([str(tmp_path / "b.tar.gz")])
    whole = tar_of(photos).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    (tmp_path / "noise.tar").write_bytes(b"noise" * 1000)
    for name in ("cut", "noise"):
        with pytest.raises(DataError, match=f"{name}.tar is not a whole, uncompressed tar archive"):
            open_source([str(tmp_path / f"{name}.tar")])
    (tmp_path / "cut.zip").write_bytes(zip_of(photos).read_bytes()[:-50])
    with pytest.raises(DataError, match=r"cut.zip is not a whole zip archive"):
        open_source([str(tmp_path / "cut.zip")])
    with pytest.raises(DataError, match="encrypted or compressed in an uncommon way"):
        open_source([str(zip_of(photos, method=zipfile.ZIP_LZMA))])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(DataError, match=r"other.zip: it has only other files \(1 .txt\)"):
        open_source([str(tmp_path / "other.zip")])


def test_unfit_lists(photos: Path) -> None:
    path = photos / "l.txt"
    for text, labelled, message in (
        ("\n\n", False, "l.txt is empty; expected one image path per line"),
        ("ant/0.jpg\tant\nbee/0.jpg\n", True, r"1 line without a label \('bee/0.jpg'\); expected path<TAB>class"),
        ("ant/0.jpg\nbee/7.jpg\n", False, "1 of 2 looked at, such as 'bee/7.jpg'; paths are relative to .*photos"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            open_source([str(path)], labelled=labelled)


def test_unfit_parquet(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(**columns: object) -> list[str]:
        pq.write_table(pa.table(columns), tmp_path / "b.parquet")
        return [str(tmp_path / "b.parquet")]

    with pytest.raises(DataError, match=r"no column of encoded images \(binary, .*\); its columns are text, label"):
        open_source(write(text=["a"], label=[1]))
    with pytest.raises(DataError, match="no column label, labels or fine_label; its columns are image, kind"):
        open_source(write(image=[b"a"], kind=[1]), labelled=True)
    with pytest.raises(DataError, match="column label is empty in 1 row of 2"):
        open_source(write(image=[b"a", b"b"], label=[1, None]), labelled=True)
    with pytest.raises(DataError, match="has no rows"):
        open_source(write(image=pa.array([], pa.binary())))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_source([str(tmp_path / "b.parquet")])
    good = str(parquet_of(photos, tmp_path / "a.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install mimlet\[parquet\]"):
        open_source([good])


def test_other_files_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=r"a.jpg is a file of an unknown kind; expected a folder, a .tar"):
        open_source([str(tmp_path / "a.jpg")])
    with pytest.raises(DataError, match=r"no images were named; give data.path"):
        open_source([])


def test_real_tar() -> None:
    folder = data_folder("clothing10")
    train, test = (open_source([str(folder / f"{name}.tar")], labelled=True) for name in ("train", "test"))
    assert (len(train), len(test)) == (3068, 372)
    assert (
        train.classes
        == test.classes
        == sorted(["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"])
    )
    assert [np.bincount(train.labels).min(), np.bincount(train.labels).max()] == [112, 795]
    assert min(decode(train.read(3067)).size) == 128


def test_real_parquet() -> None:
    source = open_source([str(data_folder("cifar10") / "test.parquet")], labelled=True)
    assert source.classes[:3] == ["airplane", "automobile", "bird"]
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert decode(source.read(9999)).size == (32, 32)
    assert source.name(0).split("/")[1] == source.classes[source.label(0)]


class Listed:
    """A data set as other libraries have them."""

    def __init__(self, items: list[object], **told: object) -> None:
        self.items = items
        self.__dict__ |= told

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        return self.items[i]


def test_records_of_every_kind(photos: Path) -> None:
    folder = open_source([str(photos)], labelled=True)
    data, images = [folder.read(i) for i in range(12)], [decode(folder.read(i)) for i in range(12)]
    arrays = [np.asarray(image) for image in images]
    names = [folder.classes[label] for label in folder.labels]
    kinds = {
        "bytes": list(zip(data, folder.labels.tolist(), strict=True)),
        "views": [{"image": memoryview(each), "label": name} for each, name in zip(data, names, strict=True)],
        "images": list(zip(images, names, strict=True)),
        "arrays": [[array, np.int32(label)] for array, label in zip(arrays, folder.labels, strict=True)],
    }
    for kind, items in kinds.items():
        source = record_source(Listed(items), "python:mine", labelled=True)
        numbered = kind in ("bytes", "arrays")
        assert source.classes == (["0", "1", "2"] if numbered else folder.classes)
        assert source.labels.tolist() == folder.labels.tolist()
        assert np.array_equal(np.asarray(as_pillow(decode(source.read(7)))), arrays[7])
        assert source.describe() == "12 images in python:mine (3 classes)"
        assert source.name(7) == "python:mine#7"
    unlabelled = record_source(Listed(data), "python:mine")
    assert (unlabelled.classes, unlabelled.labels.tolist()) == ([], [-1] * 12)
    assert unlabelled.read(3) == data[3]


def test_labels_that_records_tell_spare_reading_them() -> None:
    class Counting(Listed):
        read = 0

        def __getitem__(self, i: int) -> object:
            self.read += 1
            return super().__getitem__(i)

    told = Counting([b"x"] * 4, labels=[1, 0, None, 1], classes=["ant", "bee"])
    source = record_source(told, "python:mine")
    assert (source.classes, source.labels.tolist(), told.read) == (["ant", "bee"], [1, 0, -1, 1], 1)
    named = record_source(Listed([b"x"] * 2, labels=["bee", "ant"]), "python:mine", labelled=True)
    assert (named.classes, named.labels.tolist()) == (["ant", "bee"], [1, 0])
    untold = Counting([(b"x", k % 2) for k in range(4)])
    assert record_source(untold, "python:mine").classes == []
    assert untold.read == 1


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (7, "data is a int; expected paths, or an object with __len__ and __getitem__"),
        (Listed([]), "python:x has no records"),
        (Listed(["a.jpg"]), "record 0 is a str, not an encoded image"),
        (Listed([b"x", b"y"]), "python:x has no labels; a record may be"),
        (Listed([(b"x", 0), (b"y", 0.5)]), "a label is a whole number or a name"),
        (Listed([b"x"] * 2, labels=[0]), "python:x has 1 labels for 2 records"),
        (Listed([b"x"] * 2, labels=[0, None]), "python:x: 1 record of 2 without a label"),
        (Listed([b"x"] * 2, labels=[0, 2], classes=["a", "b"]), "a label 2, which is none of the 2 classes a, b"),
        (Listed([b"x"] * 2, labels=["a", "c"], classes=["a", "b"]), "a label 'c', which is none of the 2 classes"),
        (Listed([b"x"] * 2, labels=[0, 0]), r"only one class \(0\)"),
    ],
)
def test_unfit_records(records: Listed, message: str) -> None:
    with pytest.raises(DataError, match=message):
        record_source(records, "python:x", labelled=True)


def test_records_in_loader_processes() -> None:
    source = record_source(Listed([b"x", b"y"]), "python:mine")
    assert pickle.loads(pickle.dumps(source)).read(1) == b"y"
    source = record_source(Listed([b"x"], transform=lambda x: x), "python:mine")
    with pytest.raises(DataError, match=r"python:mine cannot be sent to loader processes \(.*lambda.* speed.work"):
        pickle.dumps(source)
    source = record_source(Listed([b"x", 5]), "python:mine")
    with pytest.raises(UnreadableImage, match="a int, not an encoded image"):
        source.read(1)


def test_records_stand_in_no_path() -> None:
    with pytest.raises(DataError, match=r"python:mine stands for records given from Python: mimlet.train\("):
        open_source(["python:mine"])
    assert [are_records(each) for each in ("a", Path("a"), ["a", Path("b")], (), [b"x"], Listed([]), 7)] == [
        *[False] * 4,
        *[True] * 3,
    ]


def test_training_on_arrow(photos: Path, tmp_path: Path) -> None:
    """As docs/data.md has it."""

    class Arrow:
        def __init__(self, path: Path) -> None:
            self.path = path
            self.column: pa.ChunkedArray | None = None

        def __len__(self) -> int:
            return len(self._column())

        def __getitem__(self, i: int) -> bytes:
            return bytes(self._column()[i].as_buffer())

        def _column(self) -> pa.ChunkedArray:
            if self.column is None:
                self.column = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()["image"]
            return self.column

    folder = open_source([str(photos)])
    table = pa.table({"image": pa.array([folder.read(i) for i in range(12)], pa.large_binary())})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    options = {
        "encoder__image_size": 16,
        "encoder__dim": 24,
        "encoder__depth": 2,
        "encoder__heads": 3,
        "encoder__name": "vit_nano",
        "method__decoder__dim": 12,
        "method__decoder__heads": 3,
        "speed__accelerator": "cpu",
        "run__tensorboard": False,
        "run__report": False,
        "batch": 8,
        "steps": 3,
        "workers": 0,
    }
    for name, data in (("files", photos), ("records", Arrow(tmp_path / "a.arrow"))):
        mimlet.pretrain("mae_micro32", data=data, out=tmp_path / name, **options)
    one, two = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in ("files", "records"))
    assert one == two
    config = mimlet.load_config(tmp_path / "records/config.json")
    assert config.data.path == ["python:Arrow"]
    mimlet.train(config, data=Arrow(tmp_path / "a.arrow"), resume=True)
    with pytest.raises(DataError, match="stands for records given from Python"):
        mimlet.train(config, resume=True)
