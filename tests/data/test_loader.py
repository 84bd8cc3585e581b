import multiprocessing
import os
import random
import signal
from collections import Counter
from contextlib import nullcontext
from multiprocessing import active_children
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mimlet.config import AugmentSettings
from mimlet.data.augment import evaluation_transform, training_transform
from mimlet.data.batch import Batch
from mimlet.data.dataset import ImageDataset
from mimlet.data.loader import (
    epoch_order,
    evaluation_batches,
    prepared,
    steps_per_epoch,
    training_batches,
)
from mimlet.data.masks import RandomMasking
from mimlet.data.source import Source, open_source
from mimlet.errors import ConfigError, DataError, TryAgain
from tests.data.images import make_folder
from tests.shared import data_folder

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def training_set(path: Path) -> ImageDataset:
    transform = training_transform(
        AugmentSettings(randaugment="rand-m9-mstd0.5"), 16
    )  # draws from all three generators
    return ImageDataset(open_source([str(path)]), transform, {"mask": RandomMasking(16, 0.75)}, seed=3)


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {
        "images": torch.cat([batch.images for batch in batches]),
        "hidden": torch.cat([batch.mask.hidden for batch in batches]),
        "indices": torch.cat([batch.indices for batch in batches]),
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def data(photos: Path) -> ImageDataset:
    """12 images: at batch 4, three steps an epoch."""
    return training_set(photos)


@pytest.fixture
def reference(data: ImageDataset) -> list[Batch]:
    return list(training_batches(data, batch=4, total_steps=8))


def test_steps_per_epoch() -> None:
    assert [steps_per_epoch(images, 4) for images in (4, 7, 8)] == [1, 1, 2]
    with pytest.raises(
        DataError, match=r"1,234 images do not fill one batch of 4,096; set schedule.batch to at most 1234"
    ):
        steps_per_epoch(1234, 4096)


def test_epoch_order() -> None:
    orders = [epoch_order(100, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]


def test_every_epoch_shows_every_image(data: ImageDataset, reference: list[Batch]) -> None:
    assert [len(batch) for batch in reference] == [4] * 8
    order = torch.cat([batch.indices for batch in reference]).tolist()
    assert order == [*epoch_order(12, 3, 0), *epoch_order(12, 3, 1), *epoch_order(12, 3, 2)[:8]]
    uneven = list(training_batches(data, batch=5, total_steps=4))
    assert torch.cat([batch.indices for batch in uneven]).tolist() == [
        *epoch_order(12, 3, 0)[:10],
        *epoch_order(12, 3, 1)[:10],
    ]


def test_an_image_is_augmented_anew_each_epoch(reference: list[Batch]) -> None:
    everything = joined(reference)
    first, second = torch.nonzero(everything["indices"] == 0).flatten().tolist()[:2]
    assert not torch.equal(everything["images"][first], everything["images"][second])
    assert not torch.equal(everything["hidden"][first], everything["hidden"][second])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data: ImageDataset, reference: list[Batch], workers: int) -> None:
    assert_same(joined(list(training_batches(data, batch=4, total_steps=8, workers=workers))), joined(reference))


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (3, 0), (4, 2)])
def test_resuming_changes_nothing(data: ImageDataset, reference: list[Batch], start: int, workers: int) -> None:
    rest = list(training_batches(data, batch=4, total_steps=8, start_step=start, workers=workers))
    assert_same(joined(rest), joined(reference[start:]))
    assert list(training_batches(data, batch=4, total_steps=8, start_step=8)) == []


@pytest.mark.parametrize(
    ("world", "accumulate", "workers"), [(1, 2, 0), (1, 4, 2), (2, 1, 2), (2, 2, 0), (2, 2, 2), (4, 1, 0)]
)
def test_processes_and_accumulation_change_nothing(
    data: ImageDataset, reference: list[Batch], world: int, accumulate: int, workers: int
) -> None:
    shared = {"batch": 4, "accumulate": accumulate, "world": world, "total_steps": 8, "workers": workers}
    parts = [list(training_batches(data, rank=rank, **shared)) for rank in range(world)]
    for step in range(8):
        pieces = [parts[rank][step * accumulate + a] for a in range(accumulate) for rank in range(world)]
        assert_same(joined(pieces), joined([reference[step]]))


def test_main_process_generators_are_untouched(data: ImageDataset) -> None:
    def state() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = state()
    for workers in (0, 1):
        list(training_batches(data, batch=4, total_steps=2, workers=workers))
        list(evaluation_batches(data, batch=4, workers=workers))
        assert state() == before


def test_unusable_numbers(data: ImageDataset) -> None:
    with pytest.raises(
        ConfigError,
        match=r"batch 10 cannot be split evenly over 2 processes x 3 pieces each .* multiple of 6, such as 12",
    ):
        training_batches(data, batch=10, accumulate=3, world=2, total_steps=1)
    with pytest.raises(DataError, match="12 images do not fill one batch of 16"):
        training_batches(data, batch=16, total_steps=1)


def test_closing_ends_the_workers(data: ImageDataset) -> None:
    batches = training_batches(data, batch=4, total_steps=10**9, workers=1)
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    batches.close()
    assert multiprocessing.active_children() == []


def test_workers_serve_all_epochs(data: ImageDataset) -> None:
    batches = training_batches(data, batch=4, total_steps=30, workers=1)
    seen = set()
    for _ in batches:
        seen |= {child.pid for child in multiprocessing.active_children()}
    assert len(seen) == 1


class Deadly(Source):
    """Kills the process that reads image 3."""

    def __init__(self, source: Source) -> None:
        self.source, self.labels, self.classes = source, source.labels, source.classes

    def name(self, i: int) -> str:
        return self.source.name(i)

    def read(self, i: int) -> bytes:
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(i)  # type: ignore[return-value]

    def describe(self) -> str:
        return "deadly"


EXPLAINED = (
    r"a data loading process died, most often because memory .* fewer speed.workers, .* \(process \d+: Killed\)$"
)


def test_a_dead_worker_is_explained(data: ImageDataset) -> None:
    data.source = Deadly(data.source)
    with pytest.raises(TryAgain, match=EXPLAINED):
        list(training_batches(data, batch=4, total_steps=3, workers=2))
    assert not active_children()


def test_another_error_of_a_worker_stays_what_it_is(data: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(data, "sample", fail)
    with pytest.raises(RuntimeError, match="something else"):
        list(training_batches(data, batch=4, total_steps=3, workers=1))
    assert not active_children()


def test_a_death_is_noticed_at_the_next_batch_and_nowhere_else(data: ImageDataset) -> None:
    """Not as an error raised by a signal's handler, wherever the main process is."""
    before = signal.getsignal(signal.SIGCHLD)
    for _ in range(5):  # torch would confuse an iterator with one before it that had its place in memory
        stream = training_batches(data, batch=4, total_steps=3, workers=2)
        next(stream)
        process = active_children()[0]
        process.kill()
        wait([process.sentinel], 10)
        with pytest.raises(TryAgain, match=f"process {process.pid}: Killed"):
            next(stream)
        assert signal.getsignal(signal.SIGCHLD) is before
        assert not active_children()


def test_no_process_is_left(data: ImageDataset) -> None:
    """Not even one that was asked to stop along with its parent."""
    stream = training_batches(data, batch=4, total_steps=3, workers=2)
    next(stream)
    processes = active_children()
    assert len(processes) == 2
    processes[0].terminate()
    stream.close()
    assert not active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_reach_the_batch_or_stop_the_run(photos: Path, workers: int) -> None:
    (photos / "ant/1.jpg").write_bytes(b"")
    batches = list(training_batches(training_set(photos), batch=12, total_steps=1, workers=workers))
    assert batches[0].unreadable == (("ant/1.jpg", "the file is empty"),)
    for file in photos.rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"^100 images in a row cannot be read, the first being .*: the file is empty$"):
        list(training_batches(training_set(photos), batch=4, total_steps=1, workers=workers))


def test_evaluation_keeps_order_and_the_rest(photos: Path) -> None:
    data = ImageDataset(open_source([str(photos)]), evaluation_transform(AugmentSettings(), 16), train=False)
    whole = list(evaluation_batches(data, batch=5))
    assert [batch.indices.tolist() for batch in whole] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert (
        torch.cat([batch.labels for batch in whole if batch.labels is not None]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )
    images = torch.cat([batch.images for batch in whole])
    assert torch.equal(torch.cat([batch.images for batch in evaluation_batches(data, batch=5, workers=2)]), images)
    shards = [
        [i for batch in evaluation_batches(data, batch=2, rank=rank, world=5) for i in batch.indices.tolist()]
        for rank in range(5)
    ]
    assert Counter(i for shard in shards for i in shard) == Counter(range(12))
    assert all(shard == sorted(shard) for shard in shards)


def test_more_processes_than_images(tmp_path: Path) -> None:
    data = ImageDataset(
        open_source([str(make_folder(tmp_path / "few", each=1))]),
        evaluation_transform(AugmentSettings(), 16),
        train=False,
    )
    assert [len(list(evaluation_batches(data, batch=2, rank=rank, world=4))) for rank in range(4)] == [1, 1, 1, 0]


@pytest.mark.parametrize("path", ["clothing10/test.tar", "cifar10/test.parquet"])
def test_real_images_with_workers(path: str) -> None:
    folder, file = path.split("/")
    data = training_set(data_folder(folder) / file)
    reference = joined(list(training_batches(data, batch=32, total_steps=3)))
    assert_same(joined(list(training_batches(data, batch=32, total_steps=3, workers=2))), reference)


def test_spawned_workers(data: ImageDataset, reference: list[Batch]) -> None:
    """What other systems do instead of forking: everything travels pickled."""
    places = [[(0, i) for i in epoch_order(12, 3, 0)[:4].tolist()]]
    loader = DataLoader(
        data,
        batch_sampler=places,
        num_workers=1,
        collate_fn=data.collate,
        multiprocessing_context="spawn",
        generator=torch.Generator(),
    )
    assert_same(joined(list(loader)), joined(reference[:1]))


def test_batches_are_prepared_when_they_are_asked_for(photos: Path) -> None:
    made: list[int] = []

    def prepare(batch: Batch) -> list[Batch]:
        made.append(len(made))
        return [batch]

    stream = prepared(training_batches(training_set(photos), batch=4, total_steps=3), prepare, torch.device("cpu"))
    assert len(next(stream)[0]) == 4
    assert made == [0]
    assert len(list(stream)) == 2


def test_on_a_gpu_the_next_batch_is_prepared_ahead(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of what is asked of the two streams; their work is CUDA's."""
    log: list[str] = []

    class Stream:
        def __init__(self, device: object = None) -> None:
            pass

        def record_event(self) -> str:
            return log[-1]

        def wait_event(self, event: str) -> None:
            log.append(f"wait for: {event}")

    batches = list(training_batches(training_set(photos), batch=4, total_steps=3))

    def prepare(batch: Batch) -> list[Batch]:
        log.append(f"prepare {next(i for i, each in enumerate(batches) if each is batch)}")
        return [batch]

    recorded: list[int] = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append(id(self)))
    for i, ready in enumerate(prepared(iter(batches), prepare, torch.device("cuda"))):
        assert ready[0] is batches[i]
        assert set(recorded) == {id(tensor) for tensor in batches[i].tensors()}
        recorded.clear()
        log.append(f"step {i}")
    assert log == [
        *("prepare 0", "prepare 1", "wait for: prepare 0", "step 0"),
        *("prepare 2", "wait for: prepare 1", "step 1"),
        *("wait for: prepare 2", "step 2"),
    ]
