"""Several data sets over the same images give each training what it would get alone, and share what is equal."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, AugmentSettings
from mimlet.data.augment import training_transform
from mimlet.data.batch import Batch
from mimlet.data.cuts import Parts
from mimlet.data.dataset import ImageDataset
from mimlet.data.joint import JointBatch, JointDataset
from mimlet.data.loader import training_batches
from mimlet.data.masks import RandomMasking
from mimlet.data.source import Source, open_source
from mimlet.errors import DataError
from tests.data.images import make_folder

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source([str(make_folder(tmp_path_factory.mktemp("joint") / "all", each=4))], labelled=False)


def datasets(source: Source, on_device: bool = False) -> list[ImageDataset]:
    """Masked, whole, masked again, jittered, and smaller."""
    plain, jitter = AugmentSettings(), AugmentSettings(color_jitter=0.4)
    kinds = [(plain, 16, 16), (plain, 16, 0), (plain, 16, 16), (jitter, 16, 16), (plain, 8, 0)]
    return [
        ImageDataset(
            source,
            training_transform(augment, size),
            {"mask": RandomMasking(units, 0.75)} if units else {},
            seed=3,
            on_device=on_device,
        )
        for augment, size, units in kinds
    ]


def same(a: Batch, b: Batch) -> None:
    for name in a.views.keys() | b.views.keys():
        assert torch.equal(a.views[name], b.views[name])
    for name in a.masks.keys() | b.masks.keys():
        assert torch.equal(a.masks[name].hidden, b.masks[name].hidden)
        assert torch.equal(a.masks[name].ids_keep, b.masks[name].ids_keep)  # type: ignore[arg-type]
    assert torch.equal(a.indices, b.indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_gets_its_own_batches_and_equal_tensors_are_one(source: Source, workers: int) -> None:
    def stream(dataset: ImageDataset | JointDataset) -> Generator[Batch | JointBatch, None, None]:
        return training_batches(dataset, batch=4, total_steps=3, workers=workers)

    own = datasets(source)
    alone = [list(stream(dataset)) for dataset in own]
    with closing(stream(JointDataset(own))) as together:
        for step, joint in enumerate(together):
            assert isinstance(joint, JointBatch)
            assert len(joint) == 4
            for batch, each in zip(joint.batches, alone, strict=True):
                single = each[step]
                assert isinstance(single, Batch)
                same(batch, single)
            prepared = joint.prepare("cpu", [IMAGENET] * 5).batches
            for batch, raw in zip(prepared, joint.batches, strict=True):
                same(batch, raw.prepare("cpu", *IMAGENET))
                assert batch.prepare("cpu", *IMAGENET).images is batch.images
            masked, whole, again, jittered, smaller = prepared
            assert masked.images is whole.images is again.images
            assert masked.images is not jittered.images
            assert smaller.images.shape[-1] == 8
            assert masked.mask.hidden is again.mask.hidden is jittered.mask.hidden


def test_equal_cuts_are_rendered_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that differ in colour come from one rendering, too."""
    calls = []
    original = Parts.render

    def counting(self: Parts, device: torch.device | str) -> Tensor:
        calls.append(self.size)
        return original(self, device)

    monkeypatch.setattr(Parts, "render", counting)
    made, left = (datasets(source, on_device) for on_device in (False, True))
    kinds = [made, left, [*left[:3], made[3], left[4]]]
    prepared = []
    for datasets_ in kinds:
        joint = JointDataset(datasets_)
        batch = joint.collate([joint[0, i] for i in range(4)])
        assert isinstance(batch, JointBatch)
        calls.clear()
        prepared.append(batch.prepare("cpu", [IMAGENET] * 5).batches)
        assert calls == ([] if datasets_ is made else [16, 8])
    loader, device, mixed = prepared
    for one, two, three in zip(loader, device, mixed, strict=True):
        same(one, two)
        same(one, three)
    assert device[0].images is device[1].images is device[2].images
    assert device[0].mask.hidden is device[3].mask.hidden


def test_another_normalisation_is_another_tensor(source: Source) -> None:
    joint = JointDataset(datasets(source)[:3])
    batch = joint.collate([joint[0, i] for i in range(4)])
    assert isinstance(batch, JointBatch)
    first, other, again = batch.prepare("cpu", [IMAGENET, HALF, IMAGENET]).batches
    assert first.images is again.images
    assert not torch.equal(first.images, other.images)


def test_images_are_read_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    original = type(source).read

    def counting(self: Source, row: int) -> object:
        nonlocal reads
        reads += 1
        return original(self, row)

    monkeypatch.setattr(type(source), "read", counting)
    joint = JointDataset(datasets(source))
    assert len(joint) == 12
    joint[0, 5]
    assert reads == 1


def test_unreadable_images_end_it_for_all(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    broken = open_source([str(tmp_path)], labelled=False)
    joint = JointDataset(datasets(broken))
    assert isinstance(joint.collate([joint[0, 0]]), DataError)
