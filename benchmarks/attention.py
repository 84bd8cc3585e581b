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

from mimlet.models.parts import attention_logits


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_logits(q, k).softmax(-1) @ v


def seconds(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.backward(kernel(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).sum())
    if qkv.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    print("heads width tokens type      fused ms  explicit ms  ratio")
    for heads, width in ((12, 16), (3, 32), (6, 64), (12, 64)):
        for tokens in (17, 50, 65, 197, 577):
            for dtype in (torch.float32, torch.bfloat16):
                qkv = torch.randn(
                    arguments.batch, tokens, 3, heads, width, device=arguments.device, dtype=dtype
                ).requires_grad_()
                taken: dict[str, list[float]] = {"fused": [], "explicit": []}
                for _ in range(arguments.rounds + 2):
                    taken["fused"].append(seconds(F.scaled_dot_product_attention, qkv))
                    taken["explicit"].append(seconds(explicit, qkv))
                fused, plain = (statistics.median(times[2:]) for times in taken.values())
                kind = str(dtype).removeprefix("torch.")
                measured = f"{1000 * fused:8.2f}{1000 * plain:13.2f}{fused / plain:7.2f}"
                print(f"{heads:5} {width:5} {tokens:6} {kind:9}{measured}")


if __name__ == "__main__":
    main()
