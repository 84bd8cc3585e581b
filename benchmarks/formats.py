"""What holds packed images best: mimlet's shards beside Arrow, Parquet, ArrayRecord and LitData.

    python -m benchmarks.formats IMAGES [--side 256] [--rounds 7] [--scratch FOLDER]

The access pattern is that of training: one record at a time, by number, in a global random order, in one process, from
warm files. What is handed over is an own copy of the record. IMAGES (any data path) are packed at the short side, raw
and as JPEG; every format holds the same bytes. Then a million records of eight bytes are opened and the last one is
read. Processor time of one thread, the formats in turn. Formats whose library is not installed are left out:
pip install -c constraints.txt -e ".[bench,parquet]".
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from benchmarks.alternate import Job, measure
from mimlet.data.pack import ENTRY, INDEX_FILE, NAMES_FILE, PACK_FILE, Pack, Packed, Recipe, shard_name
from mimlet.data.packing import pack

MILLION = 1_000_000
ROWS = 100
Read = Callable[[int], Any]
"""Number -> record: anything that holds bytes."""


class Images(Sequence[bytes]):
    """The records of a pack."""

    def __init__(self, folder: str) -> None:
        self.source = Packed(folder, False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: Any) -> Any:
        record = self.source.read(i)
        return record.tobytes() if isinstance(record, np.ndarray) else record


class Small(Sequence[bytes]):
    """A million records of eight bytes."""

    def __len__(self) -> int:
        return MILLION

    def __getitem__(self, i: Any) -> Any:
        if i >= MILLION:
            raise IndexError
        return int(i).to_bytes(8, "little")


@dataclass(frozen=True)
class Format:
    """How records are written into a folder and opened there. `needs`: its library."""

    needs: str
    write: Callable[[Sequence[bytes], Path], None]
    open: Callable[[Path], Read]


def write_small_pack(records: Sequence[bytes], folder: Path) -> None:
    """`pack` takes images; this writes what it would, of other records."""
    entries = np.zeros(len(records), ENTRY)
    entries["offset"], entries["size"], entries["label"] = np.arange(len(records)) * 8, 8, -1
    entries["checksum"] = [xxh3_64_intdigest(record) for record in records]
    recipe = Recipe(form="jpeg", side=1, quality=1, labelled=False, filter="", software={}, listing="")
    index, shard = entries.tobytes(), b"".join(records)
    described = Pack(
        recipe=recipe,
        source=[],
        classes=[],
        images=len(records),
        unreadable=0,
        shards=[len(shard)],
        index=xxh3_64_hexdigest(index),
        names=xxh3_64_hexdigest(b""),
    )
    for name, content in ((shard_name(0), shard), (INDEX_FILE, index), (NAMES_FILE, b"")):
        (folder / name).write_bytes(content)
    (folder / PACK_FILE).write_text(described.model_dump_json())


def open_pack(folder: Path) -> Read:
    return Packed(str(folder), False).read


def write_arrow(rows_each: int, records: Sequence[bytes], folder: Path) -> None:
    import pyarrow as pa

    schema = pa.schema([("image", pa.large_binary())])
    with pa.ipc.new_file(str(folder / "0.arrow"), schema) as writer:
        for start in range(0, len(records), rows_each):
            rows = [records[i] for i in range(start, min(start + rows_each, len(records)))]
            writer.write_batch(pa.record_batch([pa.array(rows, pa.large_binary())], schema))


def open_mapped_arrow(folder: Path) -> Read:
    import pyarrow as pa

    opened = pa.ipc.open_file(pa.memory_map(str(folder / "0.arrow")))
    batches = [opened.get_batch(k).column(0) for k in range(opened.num_record_batches)]

    def read(i: int) -> bytes:
        record: bytes = batches[i // ROWS][i % ROWS].as_buffer().to_pybytes()
        return record

    return read


def open_arrow(folder: Path) -> Read:
    import pyarrow as pa

    opened = pa.ipc.open_file(pa.OSFile(str(folder / "0.arrow")))

    def read(i: int) -> bytes:
        record: bytes = opened.get_batch(i).column(0)[0].as_buffer().to_pybytes()
        return record

    return read


def write_parquet(rows: int, records: Sequence[bytes], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": pa.array(list(records), pa.large_binary())})
    pq.write_table(table, folder / "0.parquet", row_group_size=rows, compression="none", use_dictionary=False)


def open_parquet(rows: int, folder: Path) -> Read:
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(folder / "0.parquet", memory_map=True)

    def read(i: int) -> bytes:
        group = opened.read_row_group(i // rows, use_threads=False).column(0)
        record: bytes = group[i % rows].as_buffer().to_pybytes()
        return record

    return read


def write_array_record(options: str, records: Sequence[bytes], folder: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "0.array_record"), options)
    for record in records:
        writer.write(record)
    writer.close()


def open_array_record(folder: Path) -> Read:
    from grain.sources import ArrayRecordDataSource

    read: Read = ArrayRecordDataSource([str(folder / "0.array_record")]).__getitem__
    return read


def write_litdata(records: Sequence[bytes], folder: Path) -> None:
    from litdata import optimize

    numbers = list(range(len(records)))
    optimize(partial(_record, records), numbers, str(folder), chunk_bytes="64MB", num_workers=1, verbose=False)


def _record(records: Sequence[bytes], i: int) -> bytes:
    return records[i]


def open_litdata(folder: Path) -> Read:
    from litdata import StreamingDataset

    read: Read = StreamingDataset(str(folder)).__getitem__
    return read


FORMATS = {
    "mimlet": Format("mimlet", write_small_pack, open_pack),
    "Arrow file, memory-mapped": Format("pyarrow", partial(write_arrow, ROWS), open_mapped_arrow),
    "Arrow file, batches of 1": Format("pyarrow", partial(write_arrow, 1), open_arrow),
    "Parquet, groups of 1": Format("pyarrow", partial(write_parquet, 1), partial(open_parquet, 1)),
    f"Parquet, groups of {ROWS}": Format("pyarrow", partial(write_parquet, ROWS), partial(open_parquet, ROWS)),
    "ArrayRecord": Format("grain", partial(write_array_record, "group_size:1"), open_array_record),
    "ArrayRecord, uncompressed": Format(
        "grain", partial(write_array_record, "group_size:1,uncompressed"), open_array_record
    ),
    "LitData": Format("litdata", write_litdata, open_litdata),
}


def size(record: Any) -> int:
    return memoryview(record).nbytes


def reading(batch: int, bf16: bool, name: str, folder: str, count: int) -> Callable[[], float]:
    """A contender whose step reads `batch` records, and gives the number of their bytes."""
    read = FORMATS[name].open(Path(folder))
    order = cycle(np.random.default_rng(0).permutation(count).tolist())
    bytearray(31 * 2**20)  # freed at once: from now on malloc keeps the memory of large records, as in a long training
    return lambda: float(sum(size(read(i)) for i in islice(order, batch)))


def opening(batch: int, bf16: bool, name: str, folder: str, count: int) -> Callable[[], float]:
    """A contender whose step opens a data set and reads its last record."""
    return lambda: float(size(FORMATS[name].open(Path(folder))(count - 1)))


def compare(what: str, records: Sequence[bytes], folders: dict[str, Path], batch: int, rounds: int) -> None:
    """Prints a row per format."""
    kind = "opening" if batch == 1 else "reading"
    jobs = [Job(name, f"formats:{kind}", False, (name, str(path), len(records))) for name, path in folders.items()]
    print(f"\n{what:30}{'us each':>10}{'per second':>14}{'of mimlet':>12}{'MB on disk':>12}")
    measured = measure(jobs, batch, rounds, threads=1)
    assert len({each.loss for each in measured.values()}) == 1
    for name, each in measured.items():
        seconds, ours = each.median / batch, measured["mimlet"].median / batch
        disk = sum(file.stat().st_size for file in folders[name].rglob("*") if file.is_file()) / 1e6
        print(f"{name:30}{1e6 * seconds:10.1f}{1 / seconds:14,.0f}{ours / seconds:12.2f}{disk:12,.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scratch", help="a folder on the disk that is to be measured")
    options = parser.parse_args()
    known = {name: each for name, each in FORMATS.items() if find_spec(each.needs)}
    for name in FORMATS.keys() - known.keys():
        print(f"{name} is left out: {FORMATS[name].needs} is not installed")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        forms: tuple[Literal["raw", "jpeg"], ...] = ("raw", "jpeg")
        for form in forms:
            folders = {"mimlet": Path(scratch) / form}
            pack(options.images, folders["mimlet"], form=form, side=options.side, workers=0)
            records = Images(str(folders["mimlet"]))
            for name, each in known.items():
                if name != "mimlet":
                    folders[name] = Path(scratch) / f"{form} {name}"
                    folders[name].mkdir()
                    each.write(records, folders[name])
            compare(f"{len(records):,} images, {form}", records, folders, 500, options.rounds)
        folders = {name: Path(scratch) / f"small {name}" for name in known if name != "Parquet, groups of 1"}
        for name, folder in folders.items():
            folder.mkdir()
            known[name].write(Small(), folder)
        compare("opening a million", Small(), folders, 1, 3)


if __name__ == "__main__":
    main()
