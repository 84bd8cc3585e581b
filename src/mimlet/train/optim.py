"""Parameter groups, optimisers, the learning rate and moving averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict, cast

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

from mimlet.config import OptimSettings
from mimlet.methods.base import Method
from mimlet.models.encoder import Encoder
from mimlet.train.sharded import divide, full, local


class Group(TypedDict):
    """Parameters that share a learning-rate scale and whether they decay. LARS alone reads `always_adapt`."""

    params: list[nn.Parameter]
    lr_scale: float
    weight_decay: float
    decays: bool
    always_adapt: bool


def trained_parameters(method: Method) -> dict[str, nn.Parameter]:
    """By name, the parameters that ask for a gradient and are neither in frozen parts nor in followers."""
    held = tuple(f"{part}." for part in (*method.frozen, *method.ema))
    return {
        name: parameter
        for name, parameter in method.named_parameters()
        if parameter.requires_grad and not name.startswith(held)
    }


def parameter_groups(method: Method, optim: OptimSettings) -> list[Group]:
    """Groups by (scale of the learning rate, weight decay), in the order of the method's parameters.

    One-dimensional parameters and biases never decay; class token, mask token and position tables decay only with
    `decay_tokens` (MAE's pre-training has them decay, its fine-tuning not); relative position tables always decay. With
    `layer_decay` d < 1 and N blocks the scale is d^(N + 1 - i): i = 0 for the encoder's tokens, positions and patch
    embedding, k for its k-th block, N + 1 for the rest (BEiT's rule, as in MAE's fine-tuning); see `Encoder.layer_of`.
    """
    groups: dict[tuple[float, float, bool], Group] = {}
    for name, parameter in trained_parameters(method).items():
        matrix = parameter.ndim > 1 and not name.endswith(".bias")
        decays = matrix and (optim.decay_tokens or not name.endswith(("_token", "pos_embed")))
        scale = 1.0
        if optim.layer_decay < 1 and name.startswith("encoder."):
            encoder = cast(Encoder, method.encoder)
            scale = optim.layer_decay ** (encoder.depth + 1 - encoder.layer_of(name.removeprefix("encoder.")))
        decay = optim.weight_decay if decays else 0.0
        # LARS adapts matrices even where nothing decays, and never vectors (MAE's linear probing).
        group = Group(params=[], lr_scale=scale, weight_decay=decay, decays=decays, always_adapt=matrix)
        key = (scale, decay, matrix if optim.name == "lars" else False)
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def make_optimizer(groups: list[Group], optim: OptimSettings, *, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW, SGD or LARS over `groups`; rate and decay are set before every step (`set_rates`).

    `fused`: one kernel for all of AdamW; not to be used under a gradient scaler, which such an optimiser would bypass.
    """
    params = cast(list[dict[str, object]], groups)
    if optim.name == "adamw":
        device = groups[0]["params"][0].device.type
        return torch.optim.AdamW(
            params, lr=0.0, betas=optim.betas, eps=optim.eps, fused=fused and device in ("cpu", "cuda", "mps")
        )
    if optim.name == "sgd":
        return torch.optim.SGD(params, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov)
    lars: torch.optim.Optimizer = Lars(params, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov)
    return lars


def peak_learning_rate(optim: OptimSettings, batch: int) -> float:
    """`lr * batch / lr_batch`, or `lr` itself where `lr_batch` is 0."""
    return optim.lr * batch / optim.lr_batch if optim.lr_batch else optim.lr


def learning_rate(
    step: int, total: int, warmup: int, peak: float, minimum: float, milestones: Sequence[float] = ()
) -> float:
    """The learning rate of `step` (from 0): linear from 0 over `warmup` steps, then half a cosine from `peak` towards
    `minimum`; with `milestones` instead a tenth of it from each of these fractions of the training on (SimMIM).

    The first step of a warm-up has rate 0, as in MAE; the cosine would reach `minimum` at step `total`, one after the
    last.
    """
    if step < warmup:
        return peak * step / warmup
    if milestones:
        passed: int = sum(step >= milestone * total for milestone in milestones)
        return max(minimum, peak * 0.1**passed)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def weight_decay(step: int, total: int, optim: OptimSettings) -> float:
    """The weight decay of `step`: constant, or by half a cosine from `weight_decay` to `weight_decay_end`."""
    if optim.weight_decay_end is None:
        return optim.weight_decay
    remaining = 0.5 * (1 + math.cos(math.pi * step / total))
    return optim.weight_decay_end + (optim.weight_decay - optim.weight_decay_end) * remaining


def set_rates(optimizer: torch.optim.Optimizer, lr: float, decay: float) -> None:
    """Gives every group `lr` times its scale, which applies to the whole schedule, minimum included; and the decay to
    those that decay at all.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = decay


@torch.no_grad()
def follow(follower: nn.Module, leader: nn.Module, momentum: float) -> None:
    """One step of a moving average: follower = momentum * follower + (1 - momentum) * leader.

    Holds for parameters and floating buffers; whole numbers, such as batch norm's counter, are copied. They meet by
    name: a follower may lack parts of its leader (an encoder without its pyramid).
    """
    for mine, theirs in (
        (follower.named_parameters(), dict(leader.named_parameters())),
        (follower.named_buffers(), dict(leader.named_buffers())),
    ):
        pairs = [(local(a), local(theirs[name])) for name, a in mine]
        floating = [(a, b) for a, b in pairs if a.is_floating_point()]
        if floating:
            torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], 1 - momentum)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """The optimiser's memory by parameter name, which outlives another grouping or another number of processes. Where
    it is divided (see `mimlet.train.sharded`), every process has to ask.
    """
    memory = {name: optimizer.state[parameter] for name, parameter in names.items() if parameter in optimizer.state}
    return {name: {key: full(value) for key, value in values.items()} for name, values in memory.items()}


def _check_memory(name: str, value: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """`ValueError` unless a tensor has this shape and a number of its own for each place: a fused optimiser writes
    over the end of another one.
    """
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, not {list(shape)}")
    end = (value.storage_offset() + value.numel()) * value.element_size()
    dense = value.layout is torch.strided and (value.is_contiguous() or value.stride() == stride)
    if not dense or end > value.untyped_storage().nbytes():
        raise ValueError(f"{name} does not hold as many numbers as it claims")


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter], state: dict[str, dict[str, Tensor]]
) -> None:
    """Undoes `optimizer_state`. Hyper-parameters stay as the optimiser was made."""
    keys = {frozenset(values) for name, values in state.items() if name in names}
    if len(keys) > 1:
        raise ValueError(f"the optimiser's memory has {', '.join(sorted(frozenset.union(*keys)))}, but not everywhere")
    for name, parameter in names.items():
        for key, value in state.get(name, {}).items():
            _check_memory(f"{key} of {name}", value, () if key == "step" else parameter.shape, parameter.stride())
    by_parameter = {
        parameter: {key: divide(value, parameter) for key, value in state[name].items()}
        for name, parameter in names.items()
        if name in state
    }
    order = (parameter for group in optimizer.param_groups for parameter in group["params"])
    memory = {index: by_parameter[parameter] for index, parameter in enumerate(order) if parameter in by_parameter}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": memory})
