"""Products of a frozen teacher in 8 bits, by torchao.

Weights are rounded once, one scale per output channel; what comes in is rounded row by row as it comes. Only the four
large products of each block: everything else stays in bf16. A student is never computed so.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal

import torch
from torch import nn

from mimlet.errors import ConfigError
from mimlet.hardware import Accelerator

PRODUCTS = ("qkv", "proj", "fc1", "fc2")
"""Of a block, by the last part of their names."""
FP8_FROM = (8, 9)
"""CUDA compute capability whose matrix units take 8-bit floats (Ada; Hopper is 9.0)."""


def quantise_(encoder: nn.Module, precision: Literal["fp8", "int8"], accelerator: Accelerator) -> None:
    """Turns the products of an encoder's blocks into `precision`, in place; weights have to be bf16. Raises
    `ConfigError` where the device or a package is missing.
    """
    check_lowbit(precision, accelerator)
    quantization = import_module("torchao.quantization")
    if precision == "fp8":
        settings = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    else:
        settings = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(encoder, settings, filter_fn=is_product)


def is_product(module: nn.Module, name: str) -> bool:
    """Whether a module of an encoder, by its name, is to be computed in 8 bits."""
    return isinstance(module, nn.Linear) and name.startswith("blocks.") and name.rpartition(".")[2] in PRODUCTS


def check_lowbit(precision: Literal["fp8", "int8"], accelerator: Accelerator) -> None:
    """Raises `ConfigError` where a device does not compute in that precision."""
    if precision == "int8" and accelerator in ("cpu", "cuda"):
        return
    found = str(accelerator)
    if accelerator == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability >= FP8_FROM:
            return
        found = f"{torch.cuda.get_device_name()}, {capability[0]}.{capability[1]}"
    needs = "a GPU of compute capability 8.9 or more (Ada, Hopper)" if precision == "fp8" else "a GPU (CUDA) or a CPU"
    raise ConfigError(f"teacher.precision={precision} needs {needs}; here is {found}. Use bf16, 32 or auto")
