"""Crops that leave the loader as they were cut out of the images, and are resized, mirrored and changed in colour all
together on the device.

The loader draws the numbers it would draw without this, and copies pixels. What the device makes of them is what the
loader would have made: torch's antialiased resizing of uint8 images is two products with integer weights, rounded in
between, and both are exact here. The few pixels that differ in colour jitter differ by one level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mimlet.data.pixels import resize

if TYPE_CHECKING:
    from mimlet.data.augment import Crops, Draw

LONGEST = 3
"""A crop with a side of more than so many times the view's is resized by the loader: there is less to move then."""

CHUNK = 2**25
"""Pixel values that are resized at a time; half a GB of memory."""

MULTIPLE = 32
"""Crops are padded to such sides, so that products have few shapes."""


@dataclass(frozen=True)
class Cut:
    """One sample's crop, uint8 [3,h,w] in memory [h,w,3], and what was drawn for it."""

    pixels: Tensor
    draw: Draw

    @staticmethod
    def of(part: Tensor, draw: Draw, size: int) -> Cut:
        """`part` for a view of `size` px; too large a one is resized at once, which leaves nothing to resize."""
        if max(part.shape) > LONGEST * size:
            part = resize(part, size, size, draw.mode)
        return Cut(part, draw)


@dataclass(frozen=True)
class Parts:
    """The crops of B images for views of `size` px.

    `pixels` [n,3] uint8: those of all crops, one after another, row by row. `table` [B,4] float64: height, width,
    whether mirrored, whether bicubic. `height`, `width`: the largest, known without asking the device.
    """

    pixels: Tensor
    table: Tensor
    size: int
    height: int
    width: int

    def render(self, device: torch.device | str) -> Tensor:
        """Views on the device, uint8 [B,3,S,S]."""
        pixels, table = (tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.table))
        counts = table[:, 0] * table[:, 1]
        starts = counts.cumsum(0) - counts
        height, width = (-(-side // MULTIPLE) * MULTIPLE for side in (self.height, self.width))
        step = max(1, CHUNK // (3 * height * width))
        chunks = zip(torch.split(table, step), torch.split(starts, step), strict=True)
        return torch.cat([self._resized(pixels, rows, first, height, width) for rows, first in chunks])

    def _resized(self, pixels: Tensor, table: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
        heights, widths, mirrored, bicubic = table.unbind(1)
        exact = torch.float16 if table.is_cuda else torch.float32
        across = _weights(widths, width, self.size, bicubic, mirrored.bool())
        down = _weights(heights, height, self.size, bicubic)
        index = torch.int32 if len(pixels) < 2**31 else torch.int64
        y, x = (_places(lengths, longest) for lengths, longest in ((heights, height), (widths, width)))
        lines = (starts[:, None] + y * widths[:, None]).to(index)
        places = (lines[:, :, None] + x.to(index)[:, None]).flatten()
        canvas = pixels.index_select(0, places).view(-1, height, width, 3).transpose(2, 3)  # [B,H,3,W]
        rows = canvas.to(exact, memory_format=torch.contiguous_format).flatten(1, 2)
        narrow = _rounded(lambda weights: _product(rows, weights.mT), across)
        columns = narrow.view(-1, height, 3 * self.size).to(exact)
        small = _rounded(lambda weights: _product(weights, columns), down)
        return small.view(-1, self.size, 3, self.size).transpose(1, 2)

    def equal(self, other: Parts) -> bool:
        """Whether both are the same views."""
        return (
            self.size == other.size
            and torch.equal(self.table, other.table)
            and (self.pixels is other.pixels or torch.equal(self.pixels, other.pixels))
        )

    def pin_memory(self) -> Parts:
        """The same in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory(), table=self.table.pin_memory())


@dataclass(frozen=True)
class Cuts:
    """What a batch has in place of views that the device is to make: crops, and changes of their colours.

    `jitter` [B,3,2] float64: of each change in its order which one of `augment.CHANGES` and its factor. `changed`: the
    name of the view that is changed; the one without changes is `image`, if that is another.
    """

    parts: Parts
    jitter: Tensor | None
    changed: str

    @staticmethod
    def collate(cuts: Sequence[Cut], crops: Crops) -> Cuts:
        """Of one batch, drawn by `crops`."""
        sizes = [cut.pixels.shape[1:] for cut in cuts]
        rows = [(*size, cut.draw.flip, cut.draw.mode == "bicubic") for size, cut in zip(sizes, cuts, strict=True)]
        parts = Parts(
            _joined([cut.pixels.permute(1, 2, 0).reshape(-1, 3) for cut in cuts]),
            torch.tensor(rows, dtype=torch.float64),
            crops.size,
            max(height for height, _ in sizes),
            max(width for _, width in sizes),
        )
        jitter = [cut.draw.jitter for cut in cuts]
        return Cuts(parts, torch.tensor(jitter, dtype=torch.float64) if jitter[0] else None, crops.changed)

    def render(self, device: torch.device | str, image: Tensor | None = None) -> dict[str, Tensor]:
        """The views on the device by name, uint8 [B,3,S,S]. `image`: `parts.render`, where that is known."""
        if image is None:
            image = self.parts.render(device)
        if self.jitter is None:
            return {"image": image}
        return {"image": image, self.changed: jittered(image, self.jitter.to(device, non_blocking=True))}

    def equal(self, other: Cuts) -> bool:
        """Whether both are the same views under the same names."""
        known, given = self.jitter, other.jitter
        same = known is given or (known is not None and given is not None and torch.equal(known, given))
        return same and self.changed == other.changed and (self.parts is other.parts or self.parts.equal(other.parts))

    def pin_memory(self, pinned: Callable[[Parts], Parts] = Parts.pin_memory) -> Cuts:
        """The same in page-locked memory. `pinned`: what takes `parts` there."""
        jitter = None if self.jitter is None else self.jitter.pin_memory()
        return replace(self, parts=pinned(self.parts), jitter=jitter)


def _joined(parts: list[Tensor]) -> Tensor:
    """One after another; in a worker straight into shared memory, as torch's own collate does it."""
    out = None
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(sum(part.numel() for part in parts))  # type: ignore[no-untyped-call]
        out = parts[0].new_empty(0).set_(storage).view(-1, 3)
    return torch.cat(parts, out=out)


def _places(lengths: Tensor, longest: int) -> Tensor:
    """[B,longest]: 0, 1, ... up to the end of each line, whose last place is then repeated (it has no weight there)."""
    return torch.minimum(torch.arange(longest, device=lengths.device), lengths[:, None] - 1)


def _weights(lengths: Tensor, longest: int, size: int, bicubic: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """How torch resizes lines of `lengths` [B] px (in memory of `longest`) to `size` px, antialiased and mirrored or
    not: matrices [B,size,longest] of float32, integers below 2^15 divided by a power of two of each line.

    Source: `compute_index_ranges_int16_weights` in PyTorch's UpSampleKernel.cpp; the filters are Pillow's.
    """
    lengths, cubic = lengths[:, None, None], bicubic[:, None, None].bool()
    to = torch.arange(size, device=lengths.device, dtype=torch.float64)[:, None]
    if mirrored is not None:
        to = torch.where(mirrored[:, None, None], size - 1 - to, to)
    scale = lengths / size
    stretch = scale.clamp(min=1)
    centre, reach = scale * (to + 0.5), torch.where(cubic, 2, 1) * stretch
    first, end = (centre - reach + 0.5).trunc().clamp(min=0), torch.minimum((centre + reach + 0.5).trunc(), lengths)
    taps = math.ceil(4 * max(1, longest / size)) + 1
    x = first + torch.arange(taps, device=lengths.device)
    distance = ((x - centre + 0.5) / stretch).abs()
    near, far = (1.5 * distance - 2.5) * distance**2 + 1, ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    bell = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weights = torch.where(cubic, bell, (1 - distance).clamp(min=0)) * (x < end)
    weights = weights / weights.sum(2, keepdim=True)
    exponent = (torch.log2((2**15 - 0.5) / weights.amax((1, 2), keepdim=True)).ceil() - 1).clamp(max=22)
    whole = (weights * 2**exponent).abs().add_(0.5).floor_().copysign_(weights)
    matrices = torch.zeros(len(lengths), size, longest + taps, device=lengths.device)
    return matrices.scatter_(2, x.long(), (whole / 2**exponent).float())[:, :, :longest]


def _rounded(multiply: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """Levels, uint8, from products with `weights`. The half precision in which a GPU multiplies holds 11 bits: there
    the weights come in two parts.
    """
    if weights.is_cuda:
        high, low = _halves(weights)
        total = multiply(high).add_(multiply(low))
    else:
        total = multiply(weights)
    return total.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of at most 11 bits in half precision, whose sum is exact."""
    high = weights.half()
    return high, (weights - high).half()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batches of matrices multiplied and added up in single precision."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a, b)


def jittered(images: Tensor, jitter: Tensor) -> Tensor:
    """torchvision's changes of brightness, contrast and saturation on uint8 images [B,3,S,S], each image in its own
    order and with its own factors; `jitter` as in `Cuts`.
    """
    step = max(1, CHUNK // images[0].numel())
    pieces = zip(torch.split(images, step), torch.split(jitter, step), strict=True)
    return torch.cat([_jittered(piece, changes) for piece, changes in pieces])


def _jittered(images: Tensor, jitter: Tensor) -> Tensor:
    values = images.float()
    for change in jitter.unbind(1):
        which, factor = (column.view(-1, 1, 1, 1) for column in change.unbind(1))
        red, green, blue = torch.split(values, 1, dim=1)
        grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()
        other = torch.where(which == 1, grey.mean((2, 3), keepdim=True), grey).mul_(which != 0)
        values = torch.addcmul(values * factor.float(), other, (1 - factor).float()).clamp_(0, 255).floor_()
    return values.to(torch.uint8)
