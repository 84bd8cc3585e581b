"""Source + transform + mask samplers -> samples and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mimlet.data.augment import Crops, Transform
from mimlet.data.batch import Batch
from mimlet.data.cuts import Cut, Cuts
from mimlet.data.decode import Decoder, Photo, UnreadableImage, check_decoder
from mimlet.data.masks import MaskSampler
from mimlet.data.seeding import key, seeded
from mimlet.data.source import Source
from mimlet.data.views import Views
from mimlet.errors import DataError, TryAgain, UserError

T = TypeVar("T")

ATTEMPTS = 100
"""So many unreadable images one after the other stop the run."""


@dataclass(frozen=True)
class Sample:
    """One image's views [3,H,W], or its cut in their place, mask draws [U], label and position.

    `unreadable`: name and reason, where the image asked for could not be read. `dropped`: this was in evaluation, and
    the views are a blank.
    """

    views: dict[str, Tensor]
    index: int
    label: int
    draws: dict[str, Tensor] = field(default_factory=dict)
    unreadable: tuple[str, str] | None = None
    dropped: bool = False
    cut: Cut | None = None


@dataclass(frozen=True)
class Found:
    """An image of a source, its position and label. `unreadable`: as in `Sample`."""

    photo: Photo
    index: int
    label: int
    unreadable: tuple[str, str] | None


class ImageDataset(Dataset[Sample | UserError]):
    """The images of a source, or those at `indices`, as samples. Item (e, i) is image i in epoch e.

    All randomness of item (e, i) is a function of (seed, e, i): crops are drawn from a generator seeded by it, any
    other transform runs with the global generators seeded by it, and each mask is drawn from a generator seeded by it
    and the mask's name. So neither workers, order nor restarts change a sample.

    `decoder`: what reads JPEG files. `reduced`: `Crops` and `Views` are cut from a JPEG read at reduced scale, where
    enough of it is left (`Photo.reduction`). `on_device`: views of `Crops` are left to the device, which gets the
    crops (`Batch.cuts`).

    An unreadable image is replaced by another at random in training, and left out of the batch in evaluation, where
    others can be reached; either way the batch reports its name and the reason. `ATTEMPTS` unreadable images in a row
    make the item a `DataError`, or `TryAgain` where not one of them could be reached. It is returned, not raised: an
    exception would leave a worker process as a traceback. `collate` hands it on and the loader raises it.
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
        decoder: Decoder = "pillow",
        reduced: bool = False,
        on_device: bool = False,
    ) -> None:
        check_decoder(decoder)
        self.source = source
        self.transform = transform
        self.samplers = dict(samplers or {})
        self.seed = seed
        self.indices = np.arange(len(source)) if indices is None else indices
        self.train = train
        self.decoder = decoder
        self.reduced = reduced
        self.on_device = on_device

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: tuple[int, int]) -> Sample | UserError:
        return self.make(at, lambda found: self.sample(at, found))

    def make(self, at: tuple[int, int], sample: Callable[[Found], T]) -> T | UserError:
        """What `sample` makes of the image of item (e, i), or of the one that takes its place."""
        epoch, index = at
        unreadable: tuple[str, str] | None = None
        gone = True
        for used in self._candidates(epoch, index):
            row = int(self.indices[used])
            label = self.source.label(row)
            try:
                data = self.source.read(row)
                if self.train or unreadable is None:
                    return sample(Found(Photo(data, self.decoder), used, label, unreadable))
                gone = False
            except (UnreadableImage, OSError) as error:
                unreadable = unreadable or (self.source.name(row), getattr(error, "strerror", None) or str(error))
                gone = gone and isinstance(error, OSError) and not isinstance(error, PermissionError)
            if not (self.train or gone):
                return sample(Found(Photo(Image.new("RGB", (1, 1))), used, label, unreadable))
        assert unreadable is not None
        text = f"{ATTEMPTS} images in a row cannot be read, the first being {unreadable[0]}: {unreadable[1]}"
        return TryAgain(f"{text}. They were there before: is the folder still mounted?") if gone else DataError(text)

    def sample(self, at: tuple[int, int], found: Found) -> Sample:
        """Item (e, i) made from its image: views and draws."""
        epoch, index = at
        number, transform, photo = key("sample", self.seed, epoch, index), self.transform, found.photo
        views: dict[str, Tensor] = {}
        cut = None
        if isinstance(transform, Crops):
            draw = transform.draw(photo.size, torch.Generator().manual_seed(number))
            part = photo.cut(draw.box, photo.reduction(draw.box, transform.size) if self.reduced else 1)
            if self.on_device:
                cut = Cut.of(part, draw, transform.size)
            else:
                with seeded(number) if transform.randaugment else nullcontext():
                    views = transform.render(part, draw)
        elif isinstance(transform, Views):
            with seeded(number):
                draws = transform.draw(photo.size)
                wanted = [photo.reduction(box, transform.views[name].size) for name, (box, _) in draws.items()]
                views = transform.render(draws, partial(photo.cut, reduction=min(wanted) if self.reduced else 1))
        else:
            with seeded(number):
                views = transform(photo.pixels())
        masks = {}
        for name, sampler in self.samplers.items():
            generator = torch.Generator().manual_seed(key("mask", self.seed, epoch, index, name))
            masks[name] = sampler.draw(generator)
        dropped = found.unreadable is not None and not self.train
        return Sample(views, found.index, found.label, masks, found.unreadable, dropped, cut)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The image itself, then others at random: broken files often lie together."""
        yield index
        generator = np.random.default_rng(key("replacement", self.seed, epoch, index))
        yield from generator.integers(len(self), size=ATTEMPTS - 1).tolist()

    def collate(self, samples: Sequence[Sample | UserError]) -> Batch | UserError:
        """Samples of equal shapes -> batch, masks joined by their samplers."""
        good: list[Sample] = []
        for sample in samples:
            if isinstance(sample, UserError):
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
            self._cuts(good),
        )

    def _cuts(self, samples: Sequence[Sample]) -> Cuts | None:
        cuts = [sample.cut for sample in samples if sample.cut]
        if not cuts:
            return None
        assert isinstance(self.transform, Crops)
        return Cuts.collate(cuts, self.transform)


def _stack(views: list[Tensor]) -> Tensor:
    """Stacks; in a worker straight into shared memory, which saves a copy (torch's own collate knows how)."""
    stacked: Tensor = default_collate(views)
    return stacked
