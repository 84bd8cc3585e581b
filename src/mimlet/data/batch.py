"""What one step of training works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mimlet.data.cuts import Cuts
from mimlet.data.masks import Mask


@dataclass(frozen=True)
class Batch:
    """Named views of the same B images, with masks and labels.

    `views[name]` is [B,3,H,W]: uint8 as the loader makes it, float32 normalised after `prepare`. Most methods have
    the one view `image`; multi-crop methods have more (`global0`, `local3`), all drawn from the same sample.
    `masks[name]`: see `Mask`; most methods have the one mask `mask`. `labels` [B] int64, -1 where unknown. `indices`
    [B]: the positions in the data set. `unreadable`: (name, reason) of files that had to be replaced. `cuts`: crops
    from which `prepare` makes views on the device, in place of views that the loader makes.
    """

    views: dict[str, Tensor]
    indices: Tensor
    masks: dict[str, Mask] = field(default_factory=dict)
    labels: Tensor | None = None
    unreadable: tuple[tuple[str, str], ...] = ()
    cuts: Cuts | None = None

    @property
    def images(self) -> Tensor:
        """The view `image`, [B,3,H,W]."""
        return self.views["image"]

    @property
    def mask(self) -> Mask:
        """The mask `mask`."""
        return self.masks["mask"]

    def __len__(self) -> int:
        return len(self.indices)

    def prepare(self, device: torch.device | str, mean: tuple[float, ...], std: tuple[float, ...]) -> Batch:
        """Moves to the device, makes the views of cuts there, and turns uint8 views into normalised float32:
        (x / 255 - mean) / std per channel. What is there already stays the very same tensor.
        """
        views = self.views | (self.cuts.render(device) if self.cuts else {})
        return replace(
            self,
            views={name: prepare_view(view, device, mean, std) for name, view in views.items()},
            cuts=None,
            indices=self.indices.to(device, non_blocking=True),
            masks={name: mask.to(device, non_blocking=True) for name, mask in self.masks.items()},
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the data loader)."""
        return replace(
            self,
            views={name: view.pin_memory() for name, view in self.views.items()},
            indices=self.indices.pin_memory(),
            masks={name: mask.pin_memory() for name, mask in self.masks.items()},
            labels=None if self.labels is None else self.labels.pin_memory(),
            cuts=self.cuts and self.cuts.pin_memory(),
        )

    def tensors(self) -> Iterator[Tensor]:
        """Everything in a prepared batch that is on the device."""
        yield from self.views.values()
        for mask in self.masks.values():
            yield from (tensor for tensor in vars(mask).values() if tensor is not None)
        yield self.indices
        if self.labels is not None:
            yield self.labels


def prepare_view(view: Tensor, device: torch.device | str, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """See `Batch.prepare`. On a CPU image by image, which stays in its cache: half the time."""
    moved = view.to(device, non_blocking=True)
    if moved.dtype != torch.uint8:
        return moved
    constants = ([1 / (255 * s) for s in std], [m / s for m, s in zip(mean, std, strict=True)])
    scale, shift = (torch.tensor(row).view(1, 3, 1, 1).to(device, non_blocking=True) for row in constants)
    normalised = torch.empty(moved.shape, device=moved.device)
    step = 1 if moved.device.type == "cpu" else max(1, len(moved))
    for part, out in zip(torch.split(moved, step), torch.split(normalised, step), strict=True):
        out.copy_(part).mul_(scale).sub_(shift)
    return normalised
