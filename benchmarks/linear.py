"""The float32 products of a linear layer, PyTorch's default (MKL) beside oneDNN: what `models/linear.py` decides on.

    python -m benchmarks.linear

GFLOP/s, medians. Largest errors against float64 are printed too: both compute in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mimlet.models.linear import onednn_linear

SHAPES = ((1600, 192, 576), (1600, 192, 768), (1600, 768, 192), (6304, 96, 384), (1600, 768, 3072))


def rate(run: Callable[[], Tensor], work: float, rounds: int = 15) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return work / statistics.median(taken) / 1e9


def gradients(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, ones: Tensor) -> Tensor:
    return torch.autograd.grad(layer(x, weight, bias), (x, weight, bias), ones)[1]


def main() -> None:
    print(
        f"{'rows x in x out':18}{'default':>10}{'oneDNN':>9}{'with gradients: default':>26}{'oneDNN':>9}{'errors':>22}"
    )
    for rows, inner, outer in SHAPES:
        x, weight, bias = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(outer)
        work = 2.0 * rows * inner * outer
        exact = F.linear(x.double(), weight.double(), bias.double())
        layers = (F.linear, onednn_linear)
        with torch.no_grad():
            forward = [rate(partial(layer, x, weight, bias), work) for layer in layers]
            errors = [float((layer(x, weight, bias) - exact).abs().max()) for layer in layers]
        for tensor in (x, weight, bias):
            tensor.requires_grad_()
        ones = torch.ones(rows, outer)
        whole = [rate(partial(gradients, layer, x, weight, bias, ones), 3 * work) for layer in layers]
        shape = f"{rows} x {inner} x {outer}"
        print(f"{shape:18}{forward[0]:10.0f}{forward[1]:9.0f}{whole[0]:26.0f}{whole[1]:9.0f}", end="")
        print(f"{errors[0]:12.1e}{errors[1]:10.1e}")


if __name__ == "__main__":
    main()
