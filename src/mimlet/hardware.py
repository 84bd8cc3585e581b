"""What the machine can do."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch

Accelerator = Literal["cpu", "cuda", "mps"]


def choose_accelerator(setting: Literal["auto"] | Accelerator) -> Accelerator:
    """The kind of device that `speed.accelerator` means here; auto: the fastest there is."""
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def computes_in_bf16(device_type: str) -> bool:
    """Whether matrix products in bfloat16 are native (and so faster than float32) on this kind of device."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if device_type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))
    return False


def keep_freed_memory() -> None:
    """Lets this process keep the memory that tensors give back, for the tensors of the next step.

    glibc maps every large tensor anew and unmaps it again, and the kernel has to clear its pages each time: 10 to 14 %
    of a small model's step on a CPU (docs/performance.md). Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # names of mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
