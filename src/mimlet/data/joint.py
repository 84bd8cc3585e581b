"""The same images for several trainings: read and decoded once, and equal views are one tensor.

What a training gets is exactly what its own data set would give it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mimlet.data.batch import Batch, prepare_view
from mimlet.data.cuts import Cuts, Parts
from mimlet.data.dataset import ImageDataset, Sample
from mimlet.data.masks import Mask
from mimlet.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation per channel."""


@dataclass(frozen=True)
class JointBatch:
    """One batch per training, in the trainings' order. Views, masks and cuts that are equal are one object."""

    batches: tuple[Batch, ...]

    def __len__(self) -> int:
        return len(self.batches[0])

    def prepare(self, device: torch.device | str, normalisations: Sequence[Normalisation]) -> JointBatch:
        """`Batch.prepare` of each, with its own normalisation; equal views stay one tensor where these are equal."""
        known: dict[tuple[int, Normalisation], Tensor] = {}
        masks = _Once[Mask, Mask](lambda mask: mask.to(device, non_blocking=True))
        parts = _Once[Parts, Tensor](lambda parts: parts.render(device))
        cuts = _Once[Cuts, dict[str, Tensor]](lambda cuts: cuts.render(device, parts(cuts.parts)))
        prepared = []
        for batch, normalisation in zip(self.batches, normalisations, strict=True):
            views: dict[str, Tensor] = {}
            for name, view in (batch.views | (cuts(batch.cuts) if batch.cuts else {})).items():
                if (id(view), normalisation) not in known:
                    known[id(view), normalisation] = prepare_view(view, device, *normalisation)
                views[name] = known[id(view), normalisation]
            moved = {name: masks(mask) for name, mask in batch.masks.items()}
            ready = replace(batch, views=views, masks=moved, cuts=None)
            prepared.append(ready.prepare(device, *normalisation))
        return JointBatch(tuple(prepared))

    def pin_memory(self) -> JointBatch:
        """The same in page-locked memory (called by the data loader)."""
        views, masks = _Once[Tensor, Tensor](Tensor.pin_memory), _Once[Mask, Mask](Mask.pin_memory)
        parts = _Once[Parts, Parts](Parts.pin_memory)
        cuts = _Once[Cuts, Cuts](lambda cuts: cuts.pin_memory(parts))
        return JointBatch(
            tuple(
                replace(
                    batch,
                    views={name: views(view) for name, view in batch.views.items()},
                    masks={name: masks(mask) for name, mask in batch.masks.items()},
                    cuts=batch.cuts and cuts(batch.cuts),
                )
                for batch in self.batches
            )
        )


class JointDataset(Dataset[list[Sample] | UserError]):
    """Several data sets over the same images, seed and positions, that differ in transform and masks at most."""

    def __init__(self, datasets: Sequence[ImageDataset]) -> None:
        first = datasets[0]
        assert all(
            (other.source, other.seed, other.train, other.decoder, other.reduced)
            == (first.source, first.seed, first.train, first.decoder, first.reduced)
            and (other.indices == first.indices).all()
            for other in datasets
        ), "joint data sets differ in more than transform and masks"
        kinds = [pickle.dumps((dataset.transform, dataset.samplers, dataset.on_device)) for dataset in datasets]
        self.datasets = list(dict(zip(kinds, datasets, strict=True)).values())
        order = list(dict.fromkeys(kinds))
        self.places = [order.index(kind) for kind in kinds]
        self.seed = first.seed

    def __len__(self) -> int:
        return len(self.datasets[0])

    def __getitem__(self, at: tuple[int, int]) -> list[Sample] | UserError:
        return self.datasets[0].make(at, lambda found: [dataset.sample(at, found) for dataset in self.datasets])

    def collate(self, samples: Sequence[list[Sample] | UserError]) -> JointBatch | UserError:
        """One batch per training."""
        good: list[list[Sample]] = []
        for sample in samples:
            if isinstance(sample, UserError):
                return sample
            good.append(sample)
        views: list[Tensor] = []
        masks: list[Mask] = []
        parts: list[Parts] = []
        cuts: list[Cuts] = []
        batches = []
        for dataset, column in zip(self.datasets, zip(*good, strict=True), strict=True):
            batch = dataset.collate(column)
            if isinstance(batch, UserError):
                return batch
            own = batch.cuts
            if own:
                own = _known(cuts, replace(own, parts=_known(parts, own.parts, Parts.equal)), Cuts.equal)
            batches.append(
                replace(
                    batch,
                    views={name: _known(views, view, torch.equal) for name, view in batch.views.items()},
                    masks={name: _known(masks, mask, _equal) for name, mask in batch.masks.items()},
                    cuts=own,
                )
            )
        return JointBatch(tuple(batches[place] for place in self.places))


class _Once(Generic[T, R]):
    """A function that answers for the very same object once."""

    def __init__(self, function: Callable[[T], R]) -> None:
        self.function = function
        self.known: dict[int, tuple[T, R]] = {}

    def __call__(self, item: T) -> R:
        if id(item) not in self.known:
            self.known[id(item)] = (item, self.function(item))
        return self.known[id(item)][1]


def _known(known: list[T], item: T, equal: Callable[[T, T], bool]) -> T:
    """The equal one among those that are known, or the item, which then is known too."""
    for other in known:
        if equal(other, item):
            return other
    known.append(item)
    return item


def _equal(a: Mask, b: Mask) -> bool:
    pairs = [(a.hidden, b.hidden), (a.ids_keep, b.ids_keep), (a.ids_restore, b.ids_restore)]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
