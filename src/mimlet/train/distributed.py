"""Devices, precision and processes, by Lightning Fabric. One machine or many, the same command."""

from __future__ import annotations

import atexit
import copy
import gc
import logging
import os
from typing import Literal, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor, nn

from mimlet.config import SpeedSettings
from mimlet.data.batch import Batch
from mimlet.errors import ConfigError
from mimlet.hardware import choose_accelerator, computes_in_bf16
from mimlet.methods.base import Clock, Method

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
T = TypeVar("T")


def make_fabric(speed: SpeedSettings) -> Fabric:
    """The launched engine: under torchrun or SLURM one process among theirs, else `devices` of this machine (1 if not
    said).
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device_type = choose_accelerator(speed.accelerator)
    devices, nodes = _launched_by_others() or (speed.devices or 1, speed.nodes)
    fabric = Fabric(
        accelerator=device_type,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        precision=resolve_precision(speed.precision, device_type),
    )
    fabric.launch()
    if fabric.world_size > 1:
        atexit.register(_leave)
    return fabric


def resolve_precision(setting: str, device_type: str) -> Precision:
    """Fabric's name of a precision setting; `auto` is bf16 where the hardware computes in it, else 32."""
    if setting == "auto":
        return "bf16-mixed" if computes_in_bf16(device_type) else "32-true"
    if setting == "16":
        if device_type == "cpu":
            raise ConfigError("speed.precision=16 needs a GPU; use bf16, 32 or auto on a CPU")
        return "16-mixed"
    return "bf16-mixed" if setting == "bf16" else "32-true"


def compile_encoders(method: Method) -> None:
    """Compiles the encoder, the one it follows (DINO), and those that follow it (BootMAE, MoCo v3)."""
    names = {"encoder", *(name for pair in method.ema.items() if "encoder" in pair for name in pair)}
    for name in sorted(names):
        part = getattr(method, name)
        if part is not None:
            part.compile()


def idle_parameters(method: Method, fabric: Fabric, batch: Batch, clock: Clock, *, compiled: bool = False) -> list[str]:
    """Names of trainable parameters that one step gives no gradient, found on a copy: the method itself is not touched.

    DDP waits for the gradient of every parameter that asks for one, so these must not ask. A loss that joins later in
    training has to be in the graph from the start (multiplied by zero, not left out). `compiled`: the copy's encoders
    run through `torch.compile`, to learn whether it can.
    """
    shared = {id(part): part for part in (getattr(method, name) for name in method.frozen)}
    trial = copy.deepcopy(method, shared)
    if compiled:
        compile_encoders(trial)
    with fabric.autocast():
        losses = trial(batch, clock)
    torch.autograd.backward(weighted(losses, trial.weights))
    return [name for name, parameter in trial.named_parameters() if parameter.requires_grad and parameter.grad is None]


def weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The scalar to minimise: the weighted sum of the losses that have a weight."""
    return torch.stack([weights[name] * loss for name, loss in losses.items() if name in weights]).sum()


def gather_rows(fabric: Fabric, row: list[float]) -> list[list[float]]:
    """Each process's numbers, by rank. Waits for every process."""
    if fabric.world_size == 1:
        return [row]
    gathered = fabric.all_gather(torch.tensor(row, dtype=torch.float64, device=fabric.device))
    rows: list[list[float]] = cast(Tensor, gathered).tolist()
    return rows


def gather_objects(fabric: Fabric, item: T) -> list[T]:
    """Each process's `item`, by rank."""
    if fabric.world_size == 1:
        return [item]
    items: list[T] = [item] * fabric.world_size
    torch.distributed.all_gather_object(items, item)
    return items


class Step(nn.Module):
    """A method as DDP and Fabric call it.

    The batch travels in an object that neither looks into: Fabric would cast float inputs to the autocast type, and
    targets have to stay in full precision.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, piece: Piece) -> dict[str, Tensor]:
        """The method's losses."""
        losses: dict[str, Tensor] = self.method(piece.batch, piece.clock)
        return losses


class Piece:
    """A micro-batch and its time. Not a dataclass or tuple, see `Step`."""

    def __init__(self, batch: Batch, clock: Clock) -> None:
        self.batch, self.clock = batch, clock


def _leave() -> None:
    """Ends the process group before the interpreter ends: gloo's threads then would abort a process that succeeded.

    They end with the group's last owner, which may be a wrapped module that only the collector can reach.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _launched_by_others() -> tuple[int, int] | None:
    """(processes per node, nodes) as torchrun or SLURM started them, or None."""
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return None
