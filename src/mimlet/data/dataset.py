"""Source + transform + mask samplers -> samples and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mimlet.data.augment import Transform
from mimlet.data.batch import Batch
from mimlet.data.decode import UnreadableImage, decode
from mimlet.data.masks import MaskSampler
from mimlet.data.seeding import key, seeded
from mimlet.data.source import Source
from mimlet.errors import DataError

ATTEMPTS = 100
"""So many unreadable images one after the other stop the run."""


@dataclass(frozen=True)
class Sample:
    """One image's views [3,H,W], mask draws [U], label and position.

    `unreadable`: name and reason, where the image asked for could not be read. `dropped`: this was in evaluation, and
    the views are a blank.
    """

    views: dict[str, Tensor]
    index: int
    label: int
    draws: dict[str, Tensor] = field(default_factory=dict)
    unreadable: tuple[str, str] | None = None
    dropped: bool = False


@dataclass(frozen=True)
class Decoded:
    """A decoded image [RGB], its position and label. `unreadable`: as in `Sample`."""

    image: Image.Image
    index: int
    label: int
    unreadable: tuple[str, str] | None


class ImageDataset(Dataset[Sample | DataError]):
    """The images of a source, or those at `indices`, as samples. Item (e, i) is image i in epoch e.

    All randomness of item (e, i) is a function of (seed, e, i): the transform runs with the global generators seeded
    by it, and each mask is drawn from a generator seeded by it and the mask's name. So neither workers, order nor
    restarts change a sample.

    An unreadable image is replaced by another at random in training, and left out of the batch in evaluation; either
    way the batch reports its name and the reason. `ATTEMPTS` unreadable images in a row make the item a
    `DataError`, which is returned, not raised: an exception would leave a worker process as a traceback. `collate`
    hands it on and the loader raises it.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        samplers: Mapping[str, MaskSampler] | None = None,
        *,
        seed: int = 0,
        indices: NDArray[np.int64] | None = None,
        train: bool = True,
    ) -> None:
        self.source = source
        self.transform = transform
        self.samplers = dict(samplers or {})
        self.seed = seed
        self.indices = np.arange(len(source)) if indices is None else indices
        self.train = train

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: tuple[int, int]) -> Sample | DataError:
        found = self.read(at)
        return found if isinstance(found, DataError) else self.sample(at, found)

    def read(self, at: tuple[int, int]) -> Decoded | DataError:
        """The image of item (e, i), or the one that takes its place."""
        epoch, index = at
        unreadable: tuple[str, str] | None = None
        for used in self._candidates(epoch, index):
            row = int(self.indices[used])
            try:
                image = decode(self.source.read(row))
            except (UnreadableImage, OSError) as error:
                unreadable = unreadable or (self.source.name(row), getattr(error, "strerror", None) or str(error))
                if self.train:
                    continue
                image = Image.new("RGB", (1, 1))
            return Decoded(image, used, self.source.label(row), unreadable)
        assert unreadable is not None
        return DataError(f"{ATTEMPTS} images in a row cannot be read, the first being {unreadable[0]}: {unreadable[1]}")

    def sample(self, at: tuple[int, int], found: Decoded) -> Sample:
        """Item (e, i) made from its image: views and draws."""
        epoch, index = at
        with seeded(key("sample", self.seed, epoch, index)):
            views = self.transform(found.image)
        draws = {}
        for name, sampler in self.samplers.items():
            generator = torch.Generator().manual_seed(key("mask", self.seed, epoch, index, name))
            draws[name] = sampler.draw(generator)
        dropped = found.unreadable is not None and not self.train
        return Sample(views, found.index, found.label, draws, found.unreadable, dropped)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The image itself, then others at random: broken files often lie together."""
        yield index
        generator = np.random.default_rng(key("replacement", self.seed, epoch, index))
        yield from generator.integers(len(self), size=ATTEMPTS - 1).tolist()

    def collate(self, samples: Sequence[Sample | DataError]) -> Batch | DataError:
        """Samples of equal shapes -> batch, masks joined by their samplers."""
        good: list[Sample] = []
        for sample in samples:
            if isinstance(sample, DataError):
                return sample
            good.append(sample)
        views = {name: _stack([sample.views[name] for sample in good]) for name in good[0].views}
        kept = [sample for sample in good if not sample.dropped]
        if len(kept) < len(good):
            rows = torch.tensor([not sample.dropped for sample in good])
            views = {name: view[rows] for name, view in views.items()}
        return Batch(
            views,
            torch.tensor([sample.index for sample in kept], dtype=torch.int64),
            {
                name: sampler.collate(torch.stack([sample.draws[name] for sample in kept]))
                for name, sampler in self.samplers.items()
                if kept
            },
            torch.tensor([sample.label for sample in kept], dtype=torch.int64) if self.source.classes else None,
            tuple(sample.unreadable for sample in good if sample.unreadable),
        )


def _stack(views: list[Tensor]) -> Tensor:
    """Stacks; in a worker straight into shared memory, which saves a copy (torch's own collate knows how)."""
    stacked: Tensor = default_collate(views)
    return stacked
