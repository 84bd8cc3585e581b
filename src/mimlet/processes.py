"""What the processes of one training share. Alone, every function gives back what it was given."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def total(x: Tensor) -> Tensor:
    """The sum over all processes, through which gradients flow: each process gets those of everybody's losses."""
    if world_size() == 1:
        return x
    summed: Tensor = all_reduce(x)  # type: ignore[no-untyped-call]
    return summed


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """The mean over all processes, without gradient."""
    if world_size() == 1:
        return x.detach()
    summed = x.detach().clone()
    dist.all_reduce(summed)
    return summed / world_size()


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """The tensors [n,...] of all processes in the order of ranks, [W n,...], without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)
