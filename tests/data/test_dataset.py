import copy
import pickle
import random
import shutil
import sys
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
from mimlet.data.decode import decode
from mimlet.data.masks import RandomMasking
from mimlet.data.pixels import as_pillow
from mimlet.data.seeding import key, seeded
from mimlet.data.source import open_source
from mimlet.errors import ConfigError, DataError, TryAgain
from tests.data.images import encoded, make_folder, picture

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
    assert batch.images.is_contiguous()
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


@pytest.mark.parametrize("train", [True, False])
def test_images_that_are_all_out_of_reach(photos: Path, train: bool) -> None:
    """An evaluation of what is left would be one of other images."""
    data = dataset(photos, train=train)
    shutil.rmtree(photos)
    error = data[0, 4]
    assert isinstance(error, TryAgain)
    assert "No such file or directory. They were there before: is the folder still mounted?" in str(error)


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


@pytest.mark.parametrize(
    "augment",
    [
        AugmentSettings(),
        AugmentSettings(color_jitter=0.4, interpolation="bicubic"),
        AugmentSettings(randaugment="rand-m9-mstd0.5-inc1"),
        AugmentSettings(pad_crop=3),
    ],
)
def test_views_are_those_of_the_transform_with_seeded_generators(photos: Path, augment: AugmentSettings) -> None:
    """Whether drawn from a generator of their own or not."""
    transform = training_transform(augment, 16, "student")
    data = ImageDataset(open_source([str(photos)]), transform, seed=2)
    for index in range(6):
        found = decode(data.source.read(index))
        with seeded(key("sample", 2, 1, index)):
            expected = transform(found)
        got = sample(data, 1, index).views
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)


def test_pixels_as_bytes_as_arrays_and_as_pillows_images(photos: Path) -> None:
    """A source may hand out any of them, an array also read-only."""
    source = open_source([str(photos)])
    reference = ImageDataset(source, TRAIN, {"mask": RandomMasking(16, 0.75)})
    kinds = (
        lambda data: decode(data),
        lambda data: np.frombuffer(as_pillow(decode(data)).tobytes(), np.uint8).reshape(18, 24, 3),
    )
    for kind in kinds:
        other = copy.copy(source)
        other.read = lambda i, kind=kind: kind(source.read(i))  # type: ignore[method-assign,misc]
        data = ImageDataset(other, TRAIN, {"mask": RandomMasking(16, 0.75)})
        assert all(equal(sample(data, 0, i), sample(reference, 0, i)) for i in range(12))
        judged = ImageDataset(other, EVALUATE, train=False), ImageDataset(source, EVALUATE, train=False)
        one, two = (sample(each, 0, 3).views["image"] for each in judged)
        assert torch.equal(one, two)


def test_large_jpegs_are_read_at_a_smaller_size_for_the_same_crops(tmp_path: Path) -> None:
    make_folder(tmp_path / "large", ("ant",), each=1)
    (tmp_path / "large/ant/0.jpg").write_bytes(encoded(picture(3, (640, 480)), quality=95))
    source = open_source([str(tmp_path / "large")])
    transform = training_transform(AugmentSettings(crop_scale=(0.5, 1.0), flip=0.5), 16)
    whole, reduced = (ImageDataset(source, transform, reduced=reduced) for reduced in (False, True))
    for epoch in range(5):
        one, two = (sample(data, epoch, 0).views["image"].int() for data in (whole, reduced))
        assert 0 < (one - two).abs().double().mean() < 3
    assert equal_views(
        *(ImageDataset(source, EVALUATE, train=False, reduced=reduced)[0, 0] for reduced in (False, True))
    )


def equal_views(a: object, b: object) -> bool:
    assert isinstance(a, Sample)
    assert isinstance(b, Sample)
    return torch.equal(a.views["image"], b.views["image"])


def test_a_decoder_that_is_not_there(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install"):
        ImageDataset(open_source([str(photos)]), TRAIN, decoder="torchcodec")
    one, two = (ImageDataset(open_source([str(photos)]), TRAIN, decoder=name) for name in ("pillow", "torchvision"))
    assert equal_views(sample(one, 0, 0), sample(two, 0, 0))
