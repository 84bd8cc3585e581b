"""Fused against explicit attention, forward and backward, by head width, length and type: what
`parts.attention_kernel` decides on.

    python -m benchmarks.attention [--device cpu]

A ratio above 1 means that explicit attention is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mimlet.hardware import keep_freed_memory
from mimlet.models import parts
from mimlet.models.parts import attend, split_heads


def fused(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def explicit(qkv: Tensor) -> Tensor:
    return attend(*split_heads(qkv))


def seconds(kernel: Callable[[Tensor], Tensor], qkv: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.backward(kernel(qkv).sum())
    if qkv.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    keep_freed_memory()
    parts.attention_kernel = lambda device, dtype, tokens: "explicit"
    print("heads width tokens type      fused ms  explicit ms  ratio")
    for heads, width in ((12, 16), (3, 32), (6, 64), (12, 64)):
        for tokens in (17, 50, 65, 197, 577):
            for dtype in (torch.float32, torch.bfloat16):
                qkv = torch.randn(
                    arguments.batch, tokens, 3, heads, width, device=arguments.device, dtype=dtype
                ).requires_grad_()
                taken: dict[str, list[float]] = {"fused": [], "explicit": []}
                for _ in range(arguments.rounds + 2):
                    taken["fused"].append(seconds(fused, qkv))
                    taken["explicit"].append(seconds(explicit, qkv))
                whole, plain = (statistics.median(times[2:]) for times in taken.values())
                kind = str(dtype).removeprefix("torch.")
                measured = f"{1000 * whole:8.2f}{1000 * plain:13.2f}{whole / plain:7.2f}"
                print(f"{heads:5} {width:5} {tokens:6} {kind:9}{measured}")


if __name__ == "__main__":
    main()
