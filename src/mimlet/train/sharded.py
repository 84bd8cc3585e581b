"""FSDP: parameters, gradients and the optimiser's memory divided among processes, by PyTorch's `fully_shard`.

A method is one unit: its parameters are whole from the start of `forward` to the end of `backward`, and parts between
the steps. Blocks are no units of their own, because methods call parts of an encoder outside the `forward` of any
block (the projection of an attention, the last norm), where nothing would make them whole. Frozen parts stay whole:
they have neither gradients nor memory, and a method may share them with another one. Followers are divided as their
leaders are, so that a moving average needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mimlet.methods.base import Method


def shard(method: Method, module: nn.Module, mesh: DeviceMesh) -> None:
    """Divides the parameters of `method` among the processes of `mesh`, whenever `module`, which calls it, is not at
    work. All begin with the tensors of the first process.
    """
    frozen = {parameter for name in method.frozen if (part := getattr(method, name)) for parameter in part.parameters()}
    with torch.no_grad():
        for tensor in (*method.parameters(), *method.buffers()):
            if type(tensor) in (Tensor, nn.Parameter):  # not what a teacher has in 8 bits, see `Step`
                dist.broadcast(tensor, 0)
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)


def local(x: Tensor) -> Tensor:
    """This process's part of a divided tensor; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """A divided tensor put together, for which every process has to ask; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def divide(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that all have, if `like` is divided and of the same shape."""
    if not isinstance(like, DTensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def make_whole(method: Method) -> dict[int, nn.Parameter]:
    """Puts whole parameters in the place of divided ones, which come back by the identity of these. Every process
    calls it; afterwards a process can use the method alone.
    """
    divided = [parameter for parameter in method.parameters() if isinstance(parameter, DTensor)]
    wholes = [nn.Parameter(full(parameter.detach()), parameter.requires_grad) for parameter in divided]
    _replace(method, {id(part): whole for part, whole in zip(divided, wholes, strict=True)})
    return {id(whole): part for part, whole in zip(divided, wholes, strict=True)}


@contextmanager
def whole(method: Method) -> Iterator[None]:
    """`make_whole` for a while, in which nothing is trained."""
    parts = make_whole(method)
    try:
        yield
    finally:
        _replace(method, parts)


def _replace(method: Method, by: Mapping[int, nn.Parameter]) -> None:
    for module in method.modules() if by else ():
        for name, parameter in module._parameters.items():
            if id(parameter) in by:
                module._parameters[name] = by[id(parameter)]
