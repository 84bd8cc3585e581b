"""Views that the device makes of crops are those that the loader would have made."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, AugmentSettings
from mimlet.data import cuts as module
from mimlet.data.augment import CHANGES, Crops, Draw, training_transform
from mimlet.data.batch import Batch
from mimlet.data.cuts import Cut, Cuts, jittered
from mimlet.data.dataset import ImageDataset
from mimlet.data.loader import training_batches
from mimlet.data.masks import RandomMasking
from mimlet.data.pixels import Box, from_array
from mimlet.data.source import open_source

SIZE = 24
JITTER = AugmentSettings(color_jitter=0.4)


def crops(augment: AugmentSettings, size: int = SIZE, changed: str = "student") -> Crops:
    transform = training_transform(augment, size, changed)
    assert isinstance(transform, Crops)
    return transform


def both(transform: Crops, images: Sequence[np.ndarray], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the loader makes of whole images, and the device."""
    generator = torch.Generator().manual_seed(seed)
    made, cut = [], []
    for image in images:
        height, width, _ = image.shape
        draw = transform.draw((width, height), generator)._replace(box=Box(0, 0, height, width))
        made.append(transform.render(from_array(image), draw))
        cut.append(Cut.of(from_array(image), draw, transform.size))
    loader = {name: torch.stack([views[name] for views in made]) for name in made[0]}
    return loader, Cuts.collate(cut, transform).render("cpu")


def noise(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Black and white, so that bicubic kernels leave the range of levels."""
    return (255 * generator.integers(0, 2, (height, width, 3))).astype(np.uint8)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=5), st.integers(0, 2**32))
def test_any_sizes_up_and_down_mirrored_or_not(sizes: list[tuple[int, int]], seed: int) -> None:
    generator = np.random.default_rng(seed)
    loader, device = both(crops(AugmentSettings()), [noise(generator, *size) for size in sizes], seed)
    assert loader.keys() == device.keys() == {"image"}
    assert torch.equal(loader["image"], device["image"])


@pytest.mark.parametrize("changed", ["image", "student"])
def test_colour_jitter(changed: str) -> None:
    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (30, 20, 3), dtype=np.uint8) for _ in range(40)]
    loader, device = both(crops(JITTER, changed=changed), images)
    assert list(loader) == list(device)
    for name in loader:
        difference = (loader[name].int() - device[name].int()).abs()
        assert difference.max() <= 1
        assert difference.double().mean() < 0.001
    plain, _ = both(crops(AugmentSettings()), images)
    assert not torch.equal(device[changed], plain["image"])


def test_each_change_alone_and_at_its_ends() -> None:
    images = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (1, 3, 9, 7), dtype=np.uint8))
    for which, change in enumerate(CHANGES):
        for factor in (0.0, 0.37, 1.0, 1.9):
            others = [(other, 1.0) for other in range(3) if other != which]
            got = jittered(images, torch.tensor([[(which, factor), *others]], dtype=torch.float64))
            assert (got.int() - change(images, factor).int()).abs().max() <= 1


def test_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    images = [noise(generator, 10 + i, 40 - i) for i in range(7)]
    whole = both(crops(JITTER), images)[1]
    monkeypatch.setattr(module, "CHUNK", 2 * 3 * 32 * 64)
    for name, view in both(crops(JITTER), images)[1].items():
        assert torch.equal(view, whole[name])


def test_what_is_much_larger_than_the_view_is_resized_by_the_loader() -> None:
    draw = Draw(Box(0, 0, 1, 1), "bicubic", True, ())
    large, limit = torch.zeros(3, 3 * SIZE + 1, 5, dtype=torch.uint8), torch.zeros(3, 3 * SIZE, 5, dtype=torch.uint8)
    assert Cut.of(large, draw, SIZE).pixels.shape == (3, SIZE, SIZE)
    assert Cut.of(limit, draw, SIZE).pixels is limit


def test_weights_in_the_precision_of_a_gpu() -> None:
    """Both parts are exact in half precision, and so are the levels."""
    lengths = torch.tensor([1.0, 7, 23, 24, 25, 60, 72] * 2, dtype=torch.float64)
    cubic = torch.arange(14) < 7
    weights = module._weights(lengths, 96, SIZE, cubic)
    high, low = module._halves(weights)
    assert high.dtype == low.dtype == torch.float16
    assert torch.equal(high.float() + low.float(), weights)
    assert low.any()
    assert torch.arange(256).half().tolist() == list(range(256))
    assert torch.allclose(weights.sum(2), torch.ones(14, SIZE), atol=0.003)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", [AugmentSettings(), JITTER, AugmentSettings(crop_ratio=(0.1, 10.0), flip=1.0)])
def test_batches_equal_the_loaders(photos: Path, augment: AugmentSettings, workers: int) -> None:
    def batches(on_device: bool) -> list[Batch]:
        data = ImageDataset(
            open_source([str(photos)]), crops(augment), {"mask": RandomMasking(9, 0.5)}, seed=5, on_device=on_device
        )
        with closing(training_batches(data, batch=4, total_steps=3, workers=workers)) as stream:
            return list(stream)

    (photos / "ant/1.jpg").write_bytes(b"")
    for loader, device in zip(batches(False), batches(True), strict=True):
        assert not device.views
        assert device.cuts is not None
        assert (len(device), device.unreadable) == (4, loader.unreadable)
        assert torch.equal(device.indices, loader.indices)
        assert torch.equal(device.mask.hidden, loader.mask.hidden)
        one, two = (batch.prepare("cpu", IMAGENET_MEAN, IMAGENET_STD) for batch in (loader, device))
        assert two.cuts is None
        assert one.views.keys() == two.views.keys()
        for name in one.views:
            assert (one.views[name] - two.views[name]).abs().max() < 1.01 / 255 / min(IMAGENET_STD)
        assert torch.equal(one.images, two.images) or augment.color_jitter
        assert all(view.is_contiguous() for view in two.views.values())
        assert {id(tensor) for tensor in two.tensors()} >= {id(two.images), id(two.mask.hidden), id(two.indices)}


def test_equal_cuts_are_known() -> None:
    generator = np.random.default_rng(4)
    images = [noise(generator, 9, 8) for _ in range(2)]
    draw = Draw(Box(0, 0, 9, 8), "bilinear", False, ((0, 1.1), (1, 0.9), (2, 1.0)))
    one, two = (Cuts.collate([Cut(from_array(image), draw) for image in images], crops(JITTER)) for _ in range(2))
    assert one.equal(two)
    assert one.parts.equal(two.parts)
    assert one.jitter is not None
    assert not one.equal(replace(two, jitter=None))
    assert not one.equal(replace(two, jitter=one.jitter + 0.1))
    assert not one.equal(replace(two, changed="image"))
    assert not one.parts.equal(replace(two.parts, size=SIZE + 1))
    assert not one.parts.equal(replace(two.parts, table=two.parts.table.flip(1)))
    assert not one.parts.equal(replace(two.parts, pixels=255 - two.parts.pixels))
