"""Well-known GPUs, by the figures of their makers. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from mimlet.config import nearest
from mimlet.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """A GPU as its data sheet has it: its name here, memory in GB (10^9 bytes), the memory's bandwidth in GB/s, dense
    TFLOPS in half precision (bf16, else fp16; sums in float32) and in float32 without tensor cores.
    """

    name: str
    memory: float
    bandwidth: float
    half: float
    single: float


_KNOWN = (
    GPU("h200", 141, 4800, 989, 67),
    GPU("h100", 80, 3350, 989, 67),
    GPU("h100-pcie", 80, 2000, 756, 51),
    GPU("a100-80", 80, 2039, 312, 19.5),
    GPU("a100-40", 40, 1555, 312, 19.5),
    GPU("l40s", 48, 864, 362, 91.6),
    GPU("l4", 24, 300, 121, 30.3),
    GPU("a6000", 48, 768, 154.8, 38.7),
    GPU("rtx5090", 32, 1792, 209.5, 104.8),
    GPU("rtx4090", 24, 1008, 165.2, 82.6),
    GPU("rtx3090", 24, 936, 71, 35.6),
    GPU("v100", 32, 900, 125, 15.7),
    GPU("t4", 16, 320, 65, 8.1),
)
GPUS = {gpu.name: gpu for gpu in _KNOWN}
"""The SXM form of H200, H100, A100 and V100 unless named otherwise. NVIDIA's data sheets and, for the GeForce cards,
its architecture papers (GA102, Ada, Blackwell): tensor cores without sparsity. V100 and T4 have fp16, no bf16.
"""


def find_gpu(name: str) -> GPU:
    """By its name here, however it is written (`RTX 4090`, `A100-80GB`). Raises `ConfigError`."""
    known = {_plain(key): gpu for key, gpu in GPUS.items()}
    plain = _plain(name)
    if plain in known:
        return known[plain]
    raise ConfigError(f"unknown GPU '{name}'{nearest(plain, known)}; known: {', '.join(GPUS)}")


def gpu_called(device: str, memory: float) -> GPU | None:
    """The entry of a device as CUDA names it (`NVIDIA A100-SXM4-80GB`), of about so many GB; None where unknown."""
    words = _plain(device)
    fitting = [
        (key, gpu)
        for key, gpu in GPUS.items()
        if _plain(key.partition("-")[0]) in words and 0.85 < memory / gpu.memory < 1.15
    ]
    if any("pcie" in key for key, _ in fitting):
        fitting = [(key, gpu) for key, gpu in fitting if ("pcie" in key) == ("pcie" in words)]
    return max(fitting, key=lambda item: len(item[0]))[1] if fitting else None


def _plain(name: str) -> str:
    """Small letters and digits only; `gb` and the maker's words say nothing more."""
    text = "".join(letter for letter in name.lower() if letter.isalnum())
    for word in ("nvidia", "geforce", "gb"):
        text = text.replace(word, "")
    return text
