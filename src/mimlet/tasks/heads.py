"""What each attention head is worth: accuracy lost when its output is zeroed.

It finds the `significant_head` of a teacher (method.relations), the one whose loss costs most, as in SSTA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mimlet.errors import ConfigError
from mimlet.models.parts import Block
from mimlet.models.vit import ViT
from mimlet.tasks.probe import Labelled, fit_logistic, score_logistic


@contextmanager
def without_head(encoder: ViT, layer: int, head: int) -> Iterator[None]:
    """Within, the output of one head of one block (both from 1) is zero."""
    block = encoder.blocks[layer - 1]
    assert isinstance(block, Block)
    kept = torch.ones(encoder.heads, encoder.dim // encoder.heads)
    kept[head - 1] = 0

    def zero(_: nn.Module, heads: tuple[Tensor, ...]) -> Tensor:
        return heads[0] * kept.flatten().to(heads[0])

    handle = block.attn.proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def head_losses(
    encoder: ViT, layer: int, train: Labelled, test: Callable[[str], Labelled]
) -> tuple[float, list[float]]:
    """Top-1 of the whole encoder in percent, and how much of it goes with each head of block `layer` (0: the last).

    A logistic regression is fitted once, to `train`, features of the whole encoder. `test` extracts the test images'
    features anew, under the title it is given. Raises `ConfigError` for a block that is not there.
    """
    if not 0 <= layer <= encoder.depth:
        raise ConfigError(f"no block {layer}: this encoder has blocks 1 to {encoder.depth}")
    layer = layer or encoder.depth
    model = fit_logistic(train)
    whole = score_logistic(model, test("test images"))["top1"]
    losses = []
    for head in range(1, encoder.heads + 1):
        with without_head(encoder, layer, head):
            losses.append(whole - score_logistic(model, test(f"without head {head}"))["top1"])
    return whole, losses
