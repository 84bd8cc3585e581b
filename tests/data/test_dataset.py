import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mimlet.config import AugmentSettings
from mimlet.data.augment import evaluation_transform, training_transform
from mimlet.data.batch import Batch
from mimlet.data.dataset import ImageDataset, Sample
from mimlet.data.masks import RandomMasking
from mimlet.data.source import open_source
from mimlet.errors import DataError
from tests.data.images import make_folder

TRAIN = training_transform(AugmentSettings(), 16)
EVALUATE = evaluation_transform(AugmentSettings(), 16)


def dataset(path: Path, *, seed: int = 0, indices: NDArray[np.int64] | None = None, train: bool = True) -> ImageDataset:
    source = open_source([str(path)], index=False)
    samplers = {"mask": RandomMasking(16, 0.75)} if train else {}
    return ImageDataset(source, TRAIN if train else EVALUATE, samplers, seed=seed, indices=indices, train=train)


def sample(data: ImageDataset, epoch: int, index: int) -> Sample:
    item = data[epoch, index]
    assert isinstance(item, Sample)
    return item


def equal(a: Sample, b: Sample) -> bool:
    return torch.equal(a.views["image"], b.views["image"]) and torch.equal(a.draws["mask"], b.draws["mask"])


def test_a_sample_is_a_function_of_seed_epoch_and_index(photos: Path) -> None:
    data = dataset(photos, seed=1)
    first = sample(data, 3, 5)
    sample(data, 0, 0)
    torch.manual_seed(9)
    assert equal(first, sample(dataset(photos, seed=1), 3, 5))
    assert not equal(first, sample(data, 4, 5))
    assert not equal(first, sample(dataset(photos, seed=2), 3, 5))
    assert not torch.equal(first.draws["mask"], sample(data, 3, 6).draws["mask"])
    assert (first.index, first.label) == (5, 1)


def test_masks_with_different_names_differ(photos: Path) -> None:
    sampler = RandomMasking(16, 0.75)
    data = ImageDataset(open_source([str(photos)]), TRAIN, {"a": sampler, "b": sampler})
    draws = sample(data, 0, 0).draws
    assert not torch.equal(draws["a"], draws["b"])
    assert torch.equal(draws["a"], sample(ImageDataset(data.source, TRAIN, {"a": sampler}), 0, 0).draws["a"])


def test_global_generators_are_untouched(photos: Path) -> None:
    def state() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    data, before = dataset(photos), state()
    data.collate([data[0, i] for i in range(4)])
    assert state() == before


def test_indices_choose(photos: Path) -> None:
    data = dataset(photos, indices=np.array([11, 4]))
    assert len(data) == 2
    assert [(sample(data, 0, i).index, sample(data, 0, i).label) for i in range(2)] == [(0, 2), (1, 1)]


def test_collate(photos: Path) -> None:
    data = dataset(photos)
    items = [sample(data, 0, i) for i in (0, 4, 8)]
    batch = pickle.loads(pickle.dumps(data.collate))(items)
    assert isinstance(batch, Batch)
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (3, 3, 16, 16))
    assert torch.equal(batch.images[1], items[1].views["image"])
    assert torch.equal(
        batch.mask.hidden, RandomMasking(16, 0.75).collate(torch.stack([i.draws["mask"] for i in items])).hidden
    )
    assert batch.indices.tolist() == [0, 4, 8]
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 2]
    assert batch.unreadable == ()
    flat = dataset(photos / "ant")
    assert flat.collate([flat[0, 0]]).labels is None  # type: ignore[union-attr]


def test_unreadable_images_are_replaced_in_training(photos: Path) -> None:
    (photos / "ant/1.jpg").write_bytes(b"")
    (photos / "ant/2.jpg").write_text("text")
    data = dataset(photos)
    replaced = sample(data, 0, 1)
    assert replaced.unreadable == ("ant/1.jpg", "the file is empty")
    assert replaced.index not in (1, 2)
    assert not replaced.dropped
    again, other = sample(data, 0, 1), sample(data, 0, replaced.index)
    assert torch.equal(replaced.draws["mask"], again.draws["mask"])
    assert torch.equal(replaced.views["image"], again.views["image"])
    assert not torch.equal(replaced.views["image"], other.views["image"]), "the crop is drawn for place 1"
    batch = data.collate([data[0, i] for i in range(3)])
    assert isinstance(batch, Batch)
    assert batch.indices.tolist() == [0, replaced.index, sample(data, 0, 2).index]
    assert batch.unreadable == (replaced.unreadable, ("ant/2.jpg", "not an image, or of an unknown format"))


def test_neighbours_of_unreadable_images_do_not_matter(tmp_path: Path) -> None:
    """A folder of 120 broken files among others: each is replaced and counted once, by different images."""
    photos = make_folder(tmp_path / "photos", ("ant",), each=24)
    for k in range(120):
        (photos / "ant" / f"a{k}.jpg").touch()
    data = dataset(photos)
    samples = [sample(data, 0, i) for i in range(144)]
    assert len({s.unreadable for s in samples if s.unreadable}) == sum(s.unreadable is not None for s in samples) == 120
    assert len({s.index for s in samples}) == 24


def test_a_link_to_nowhere(photos: Path) -> None:
    (photos / "cat/3.jpg").unlink()
    (photos / "cat/3.jpg").symlink_to("gone")
    assert sample(dataset(photos), 0, 11).unreadable == ("cat/3.jpg", "No such file or directory")


def test_unreadable_images_are_dropped_in_evaluation(photos: Path) -> None:
    (photos / "ant/1.jpg").write_bytes(b"")
    data = dataset(photos, train=False)
    batch = data.collate([data[0, i] for i in range(3)])
    assert isinstance(batch, Batch)
    assert (batch.indices.tolist(), len(batch.images), batch.unreadable) == (
        [0, 2],
        2,
        (("ant/1.jpg", "the file is empty"),),
    )
    assert torch.equal(batch.images[1], sample(data, 0, 2).views["image"])
    nothing = data.collate([data[0, 1]])
    assert isinstance(nothing, Batch)
    assert (len(nothing), nothing.images.shape) == (0, (0, 3, 16, 16))


def test_nothing_but_unreadable_images(photos: Path) -> None:
    for file in photos.rglob("*.jpg"):
        file.write_bytes(b"x")
    data = dataset(photos)
    error = data.collate([data[0, 2]])
    assert isinstance(error, DataError)
    assert (
        str(error)
        == "100 images in a row cannot be read, the first being ant/2.jpg: not an image, or of an unknown format"
    )


def several(image: Image.Image) -> dict[str, Tensor]:
    return {
        name: torch.full((3, size, size), image.width, dtype=torch.uint8)
        for name, size in (("global0", 8), ("local0", 4))
    }


@pytest.mark.parametrize("transform", [several])
def test_views_of_several_sizes(photos: Path, transform: Callable[[Image.Image], dict[str, Tensor]]) -> None:
    data = ImageDataset(open_source([str(photos)]), transform)
    batch = data.collate([data[0, i] for i in range(2)])
    assert isinstance(batch, Batch)
    assert {name: tuple(view.shape) for name, view in batch.views.items()} == {
        "global0": (2, 3, 8, 8),
        "local0": (2, 3, 4, 4),
    }
