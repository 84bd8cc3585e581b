"""What a training step costs: every operation of a real one is counted on a small batch.

Counting knows no method and no model. A step of the method runs on the CPU, on two small batches of the same images,
and under a mode that sees every operation: its floating-point operations, the bytes it reads and writes, the memory
that is alive after it. Each of these is a constant and a share per image, so that two batches give all others.

The operations are those of a GPU: attention is one fused operation, and under bf16 autocast its tensors are bf16.
PyTorch's own counter gives such attention on a CPU no operations at all, so their formula is named here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from mimlet.config import Config
from mimlet.data.batch import Batch
from mimlet.data.seeding import key, seeded
from mimlet.methods.base import Clock, Method
from mimlet.methods.settings import METHODS
from mimlet.models import parts
from mimlet.models.encoder import Encoder
from mimlet.planning.gpus import GPU
from mimlet.planning.models import random_batch
from mimlet.train import optim
from mimlet.train.distributed import weighted

SMALL = (2, 4)
"""Images of the two batches; the second has those of the first twice."""

Numbers = NDArray[np.float64]


@dataclass
class Record:
    """What happened, operation by operation."""

    names: list[str] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    frozen: list[bool] = field(default_factory=list)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation that computes or copies; a mere view is none.

    FLOPs count a multiply-add as 2, those of products, convolutions and attention. Moved are the bytes of what is read
    and what is written, each once per operation. Live is the memory of tensors made under the counter.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self.frozen = 0
        self.live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every operation passes here, those of the backward pass too."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = _tensors((args, kwargs))
        made = _tensors(result)
        inputs = {tensor.untyped_storage()._cdata for tensor in read}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in inputs]
        for tensor in new:
            self._watch(tensor)
        if not (new or func._schema.is_mutable) or func.overloadpacket in _FREE:
            return result
        packet, record = func.overloadpacket, self.record
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        changed = [
            tensor
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value)
        ]
        record.names.append(str(packet))
        record.flops.append(float(formula(*args, **kwargs, out_val=result)) if formula else 0.0)
        record.moved.append(float(sum(map(_bytes, [*read, *new, *changed]))))
        record.live.append(float(self.live))
        record.frozen.append(self.frozen > 0)
        return result

    @contextmanager
    def inside(self, part: nn.Module) -> Iterator[None]:
        """Marks what happens in the forward pass of a part as frozen."""

        def enter(*_: object) -> None:
            self.frozen += 1

        def leave(*_: object) -> None:
            self.frozen -= 1

        handles: list[RemovableHandle] = []
        for module in part.modules():
            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.live -= size


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """What of it has to be read or written: an expanded tensor is no larger than its memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return flops


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any, **kwargs: Any
) -> int:
    shapes = grad.shape, query.shape, key.shape, value.shape
    flops: int = sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return flops


def _product(x: Tensor, weight: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return 2 * out_val.numel() * x.shape[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.mkldnn._linear_pointwise: _product,
}
_FREE = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


@dataclass(frozen=True)
class Piece:
    """What one forward and backward pass takes, operation by operation [O]: FLOPs, bytes moved, whether in a frozen
    part. `operations`: their number; `activations`: most memory alive, in bytes.
    """

    flops: Numbers
    moved: Numbers
    frozen: NDArray[np.bool_]
    operations: float
    activations: float

    def seconds(self, peak: float, bandwidth: float, launch: float) -> float:
        """On a device of so many FLOP/s and bytes/s that starts an operation in `launch` seconds: each operation takes
        what the slower of computing and moving takes, and all together not less than their launches.
        """
        busy = np.maximum(self.flops / peak, self.moved / bandwidth).sum()
        return float(max(busy, self.operations * launch))


@dataclass(frozen=True)
class Cost:
    """What a method costs. Sizes in bytes: `weights` that are trained, `gradients`, the `optimizer`'s memory, `others`
    (frozen parts, followers, buffers), a `checkpoint`, the exported encoder. `forward`: FLOPs to look at one image in
    an evaluation. `update`: the optimiser's step.
    """

    small: tuple[Record, Record]
    update: Piece
    weights: int
    gradients: int
    optimizer: int
    others: int
    checkpoint: int
    exported: int
    forward: float

    def piece(self, images: int) -> Piece:
        """What a piece of so many images takes."""
        first, second = (_merged(mine, other) for mine, other in (self.small, self.small[::-1]))
        share = (images - SMALL[0]) / (SMALL[1] - SMALL[0])

        def at(name: str) -> Numbers:
            a, b = (np.array(getattr(record, name)) for record in (first, second))
            return cast(Numbers, np.maximum(0, a + (b - a) * share))

        number = [len(record.names) for record in self.small]
        return Piece(
            at("flops"),
            at("moved"),
            np.array(first.frozen),
            number[0] + (number[1] - number[0]) * share,
            float(at("live").max()),
        )


def _merged(record: Record, other: Record) -> Record:
    """A record whose operations stand beside those of another: what differs in between, because something happens
    image by image, is one operation, and one of frozen parts.
    """
    names, others = record.names, other.names
    shorter = min(len(names), len(others))
    head = next((i for i in range(shorter) if names[i] != others[i]), shorter)
    tail = next((i for i in range(shorter - head) if names[-1 - i] != others[-1 - i]), shorter - head)
    end = len(names) - tail
    if head == end and len(names) == len(others):
        return record
    frozen = np.array(record.frozen[head:end], bool)

    def summed(values: list[float]) -> list[float]:
        middle = np.array(values[head:end])
        return [*values[:head], float(middle[~frozen].sum()), float(middle[frozen].sum()), *values[end:]]

    most = max(record.live[head:end], default=0.0)
    return Record(
        [*names[:head], "several", "several", *names[end:]],
        summed(record.flops),
        summed(record.moved),
        [*record.live[:head], most, most, *record.live[end:]],
        [*record.frozen[:head], False, True, *record.frozen[end:]],
    )


def count(method: Method, config: Config, classes: int) -> Cost:
    """Runs the method on two small batches and counts. The method has then taken three steps."""
    half = config.speed.precision != "32"
    for name in (*method.frozen, *method.ema):
        if (part := getattr(method, name)) is not None:
            part.requires_grad_(False)
    for part in method.children():
        if isinstance(part, Encoder):
            part.checkpointing = config.speed.checkpointing
    method.train()
    clock = Clock(1, 100, 10, config.seed)
    trained = optim.trained_parameters(method)
    groups = optim.parameter_groups(method, config.optim)
    optimizer = optim.make_optimizer(groups, config.optim)
    records = list[Record]()
    for images in (SMALL[0], *SMALL):  # the first time there are no gradients yet
        batch = random_batch(method, config, classes, images, SMALL[0])
        counter, update = Counter(), Counter()
        with _as_on_a_gpu(), seeded(key("plan", config.seed)):
            _run(method, config, batch, clock, half, counter)
        records.append(counter.record)
        with update:
            method.on_gradients(clock)
            optimizer.step()
            for name, leader in method.ema.items():
                if (follower := getattr(method, name)) is not None:
                    optim.follow(follower, getattr(method, leader), 0.99)
            method.after_step(clock)
    state = optim.optimizer_state(optimizer, trained)
    weights = _size(trained.values())
    gradients = _size(parameter.grad for parameter in trained.values() if parameter.grad is not None)
    memory = _size(value for values in state.values() for value in values.values())
    tensors = {tensor.data_ptr(): tensor for tensor in (*method.parameters(), *method.buffers())}
    held = tuple(f"{name}." for name in method.frozen)
    saved = _size(value for name, value in method.state_dict().items() if not name.startswith(held))
    return Cost(
        (records[1], records[2]),
        _whole(update.record),
        weights,
        gradients,
        memory,
        _size(tensors.values()) - weights,
        saved + memory,
        _size(method.encoder.state_dict().values()),
        _forward(method.encoder, config, half) if METHODS[config.method.name].encoder else 0.0,
    )


def _run(method: Method, config: Config, batch: Batch, clock: Clock, half: bool, counter: Counter) -> None:
    """One piece, from images on the device to gradients."""
    augment = config.data.augment
    prepared = batch.prepare("cpu", augment.mean, augment.std)
    with ExitStack() as marks, counter:
        for name in method.frozen:
            if (part := getattr(method, name)) is not None:
                marks.enter_context(counter.inside(part))
        copied = replace(prepared, views={name: view.clone() for name, view in prepared.views.items()})
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = method(copied, clock)
        torch.autograd.backward(weighted(losses, method.weights))


def _forward(encoder: nn.Module, config: Config, half: bool) -> float:
    """FLOPs of the encoder for one whole image."""
    images = torch.zeros(1, 3, config.encoder.image_size, config.encoder.image_size)
    counter = Counter()
    with _as_on_a_gpu(), counter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        encoder(images)
    return sum(counter.record.flops)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Plain operations, which a compiler sees too, and fused attention: not what is faster on a CPU."""
    kernel, compiling = parts.attention_kernel, torch.compiler.is_compiling
    parts.attention_kernel = lambda device, dtype, tokens: "fused"
    torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        parts.attention_kernel, torch.compiler.is_compiling = kernel, compiling


def _whole(record: Record) -> Piece:
    return Piece(
        np.array(record.flops), np.array(record.moved), np.array(record.frozen, bool), float(len(record.names)), 0.0
    )


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Efficiency:
    """How much of a GPU's data sheet a training reaches: share of its FLOP/s and of its bandwidth, seconds the host
    takes to start an operation.
    """

    compute: float
    bandwidth: float
    launch: float

    def seconds(self, piece: Piece, gpu: GPU, half: bool) -> float:
        """What a piece takes."""
        peak = 1e12 * (gpu.half if half else gpu.single)
        return piece.seconds(self.compute * peak, self.bandwidth * 1e9 * gpu.bandwidth, self.launch)


FAST = Efficiency(0.8, 0.85, 0.0)
"""Everything compiled, with CUDA graphs."""
SLOW = Efficiency(0.35, 0.45, 8e-6)
"""Eager."""
