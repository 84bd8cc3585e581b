"""What each attention head is worth: accuracy lost when its output is zeroed.

It finds the `significant_head` of a teacher (method.relations), the one whose loss costs most, as in SSTA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mimlet.models.encoder import Encoder
from mimlet.tasks.probe import Labelled, fit_logistic, score_logistic


@contextmanager
def without_head(encoder: Encoder, layer: int, head: int) -> Iterator[None]:
    """Within, the output of one head of one block that attends (both from 1) is zero."""
    (output,) = (
        module
        for name, module in encoder.named_modules()
        if name.endswith("attn.proj") and encoder.layer_of(f"{name}.weight") == layer
    )
    heads = encoder.heads_of(layer)
    kept = torch.ones(heads, encoder.dims[layer] // heads)
    kept[head - 1] = 0

    def zero(_: nn.Module, joined: tuple[Tensor, ...]) -> Tensor:
        return joined[0] * kept.flatten().to(joined[0])

    handle = output.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def head_losses(
    encoder: Encoder, layer: int, train: Labelled, test: Callable[[str], Labelled]
) -> tuple[float, list[float]]:
    """Top-1 of the whole encoder in percent, and how much of it goes with each head of block `layer` (0: the last that
    attends).

    A logistic regression is fitted once, to `train`, features of the whole encoder. `test` extracts the test images'
    features anew, under the title it is given. Raises `ConfigError` for a block that is not there or does not attend.
    """
    layer = encoder.attending_block(layer)
    model = fit_logistic(train)
    whole = score_logistic(model, test("test images"))["top1"]
    losses = []
    for head in range(1, encoder.heads_of(layer) + 1):
        with without_head(encoder, layer, head):
            losses.append(whole - score_logistic(model, test(f"without head {head}"))["top1"])
    return whole, losses
