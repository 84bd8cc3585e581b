"""A linear layer that takes the faster matrix product of a CPU.

PyTorch's float32 products go to MKL, which uses about half of what AMD processors with AVX2 or AVX-512 can do;
oneDNN, which PyTorch also carries, uses all of it (benchmarks/linear.py: 490 against 230 GFLOP/s). PyTorch offers
that kernel only for inference, so the three products of a linear layer are given their gradient here. Products with
frozen bfloat16 weights go to oneDNN either way, but by this kernel a tenth faster. The choice depends on the processor
alone, never on a measurement: a resumed run must repeat itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


@cache
def onednn_is_faster() -> bool:
    """Whether float32 products of this processor are better left to oneDNN: on AMD, where PyTorch has its kernel."""
    try:
        _product(torch.ones(1, 1), torch.ones(1, 1))
    except (AttributeError, RuntimeError, TypeError):  # a PyTorch without it, or with another signature
        return False
    return "AMD" in str(torch.cpu.get_capabilities().get("cpu_name", "")) and not torch.version.hip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by the faster kernel."""
    if _for_onednn(x, weight):
        return onednn_linear(x, weight, bias)
    return _product(x.bfloat16(), weight, bias) if _frozen_in_bf16(x, weight) else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of `linear`, as one kernel where no gradient is needed; equal up to rounding."""
    if _frozen_in_bf16(x, weight) or (not torch.is_grad_enabled() and _for_onednn(x, weight)):
        return _product(x.to(weight.dtype), weight, bias, "gelu", "none")
    return F.gelu(linear(x, weight, bias))


def _for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes a float32 product, and is the faster."""
    full = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return full and _eagerly_on_amd(x, weight)


def _frozen_in_bf16(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but the product of a bfloat16 weight is wanted, and nothing stands in between."""
    half = weight.dtype == torch.bfloat16 and (x.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
    return half and not torch.is_grad_enabled() and _eagerly_on_amd(x, weight)


def _eagerly_on_amd(x: Tensor, weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter)  # one of another kind, such as a quantised one, has its own product
    return x.device.type == "cpu" and plain and not torch.compiler.is_compiling() and onednn_is_faster()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] plus bias, by oneDNN, with gradient. Float32 on a CPU."""
    out: Tensor = _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class Linear(nn.Linear):
    """`torch.nn.Linear`, by the faster kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


class LinearGelu(Linear):
    """The same, then exact GELU: see `linear_gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear_gelu(x, self.weight, self.bias)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, then: str = "none", form: str = "") -> Tensor:
    """a b^T + bias, and what is done to it `then`, in one of its forms (GELU's "none" is the exact one)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, then, [], form)
    return out


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()  # oneDNN is a thousand times slower for a slice of wider rows
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.t()) if for_x else None,
            _transposed_product(rows, x.flatten(0, -2)) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of a [rows, m] and b [rows, n]. oneDNN is up to 1.6 times faster with the wider one in the second place."""
    if a.shape[1] < b.shape[1]:
        return _product(a.t(), b.t())
    return _product(b.t(), a.t()).t().contiguous()
