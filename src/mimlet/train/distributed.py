"""Devices, precision and processes, by Lightning Fabric. One machine or many, the same command."""

from __future__ import annotations

import atexit
import copy
import gc
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from mimlet.config import SpeedSettings
from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, TryAgain, UserError
from mimlet.hardware import choose_accelerator, computes_in_bf16, keep_freed_memory
from mimlet.methods.base import Clock, Method
from mimlet.train.sharded import shard

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others before it gives them up. One that dies is noticed at once, by its closed
connections; this is for one that hangs, or a machine that lost its power. The first process alone judges and saves:
that takes less.
"""


_SILENT = re.compile(r"by peer|time(d )?out|broken pipe|refused|unreachable|no route", re.IGNORECASE)
"""Words of gloo, which raises plain `RuntimeError`s, about a process that is gone."""


def make_fabric(speed: SpeedSettings) -> Fabric:
    """The launched engine: under torchrun or SLURM one process among theirs, else `devices` of this machine (1 if not
    said).
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device_type = choose_accelerator(speed.accelerator)
    if speed.compile == "graphs" and device_type != "cuda":
        raise ConfigError(
            f"speed.compile=graphs needs a GPU (CUDA), and this runs on {device_type}; use on, off or auto"
        )
    if device_type == "cpu":
        keep_freed_memory()
    devices, nodes = _launched_by_others() or (speed.devices or 1, speed.nodes)
    if device_type == "cuda" and devices > (seen := torch.cuda.device_count()):
        raise ConfigError(
            f"{devices} processes on this machine need as many GPUs, but each sees {seen}; start fewer of them. Under "
            "SLURM ask for --gpus-per-node, not --gpus-per-task: every process has to see all GPUs of its machine"
        )
    fabric = Fabric(
        accelerator=device_type,
        devices=devices,
        num_nodes=nodes,
        strategy=_strategy(speed, devices * nodes),
        precision=resolve_precision(speed.precision, device_type),
    )
    with plain_peer_errors():
        fabric.launch()
    if fabric.world_size > 1:
        atexit.register(_leave)
    return fabric


def is_sharded(fabric: Fabric) -> bool:
    """Whether parameters are divided among the processes."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def resolve_precision(setting: str, device_type: str) -> Precision:
    """Fabric's name of a precision setting; `auto` is bf16 where the hardware computes in it, else 32."""
    if setting == "auto":
        return "bf16-mixed" if computes_in_bf16(device_type) else "32-true"
    if setting == "16":
        if device_type == "cpu":
            raise ConfigError("speed.precision=16 needs a GPU; use bf16, 32 or auto on a CPU")
        return "16-mixed"
    return "bf16-mixed" if setting == "bf16" else "32-true"


def rehearse(method: Method, fabric: Fabric, batch: Batch, clock: Clock) -> None:
    """The losses and gradients of a step, to be tried on a copy: a method may count its steps."""
    with fabric.autocast():
        losses = method(batch, clock)
    torch.autograd.backward(weighted(losses, method.weights))


def copy_of(method: Method) -> Method:
    """A copy that shares the frozen parts."""
    shared = {id(part): part for part in (getattr(method, name) for name in method.frozen)}
    return copy.deepcopy(method, shared)


def idle_parameters(method: Method, fabric: Fabric, batch: Batch, clock: Clock) -> list[str]:
    """Names of trainable parameters that one step gives no gradient, found on a copy: the method itself is not touched.

    DDP waits for the gradient of every parameter that asks for one, so these must not ask. A loss that joins later in
    training has to be in the graph from the start (multiplied by zero, not left out).
    """
    rehearse(trial := copy_of(method), fabric, batch, clock)
    return [name for name, parameter in trial.named_parameters() if parameter.requires_grad and parameter.grad is None]


def weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The scalar to minimise: the weighted sum of the losses that have a weight."""
    return torch.stack([weights[name] * loss for name, loss in losses.items() if name in weights]).sum()


def on_first(fabric: Fabric, call: Callable[[], T]) -> T:
    """What `call` returns on the first process, for all of them; a `UserError` there is raised by all."""
    answer: tuple[T | None, UserError | None] = None, None
    if fabric.is_global_zero:
        try:
            answer = call(), None
        except UserError as error:
            answer = None, error
    with plain_peer_errors():
        result, refusal = fabric.broadcast(answer)
    if refusal is not None:
        raise refusal
    return cast(T, result)


@contextmanager
def plain_peer_errors(saved: Callable[[], int] | None = None) -> Iterator[None]:
    """Turns torch's errors about a process that does not answer into a `TryAgain`. `saved`: the step of the newest
    checkpoint, 0 without any; not given where that is not known.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if not (isinstance(error, torch.distributed.DistError) or ("gloo" in reason and _SILENT.search(reason))):
            raise
        where = f"the checkpoint of step {saved()}" if saved and saved() else "the start: nothing was saved yet"
        raise TryAgain(
            "another process of this training died, or did not answer; what it said last tells why. The same command "
            f"with --resume goes on from {where if saved else 'the newest checkpoint, if there is one'} ({reason})"
        ) from error


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
        # What a teacher has in 8 bits cannot be sent; every process has rounded the same file.
        rounded = [name for name, parameter in self.named_parameters() if type(parameter) is not nn.Parameter]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, rounded)  # type: ignore[no-untyped-call]

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


def _strategy(speed: SpeedSettings, processes: int) -> Strategy | Literal["auto"]:
    """How so many processes share the work: by DDP unless told otherwise."""
    if processes == 1:
        return "auto"
    if speed.strategy != "fsdp":
        return DDPStrategy(timeout=PATIENCE)

    def parallelize(step: Step, mesh: DeviceMesh) -> Step:
        shard(step.method, step, mesh["data_parallel"])
        return step

    return ModelParallelStrategy(parallelize, processes, 1, timeout=PATIENCE)


def _launched_by_others() -> tuple[int, int] | None:
    """(processes per node, nodes) as torchrun or SLURM started them, or None."""
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
        if tasks % nodes or (tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ):
            raise ConfigError(
                f"SLURM was asked for {tasks} tasks on {nodes} nodes, and may spread them as it likes; ask for "
                f"--nodes={nodes} --ntasks-per-node={-(-tasks // nodes)}, equally many on each"
            )
        return tasks // nodes, nodes
    return None
