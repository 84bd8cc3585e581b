"""Figures of a whole optimiser step, of which `forward` sees one piece in one process at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mimlet import processes

Figures = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Sums by name -> figures by name."""


class WholeStep:
    """Turns sums over pieces into what `forward` has to return so that the loop reports, and minimises, the figures of
    the whole step.

    The loop averages over pieces and processes. That is wrong for a mean over terms whose number differs from piece to
    piece (the patches of ragged masks) and for what is no mean at all (a perplexity). So piece p returns
    p f(p) - (p - 1) f(p - 1), f(p) being the figures of everything that all processes have seen up to it: the average
    over P pieces is f(P).

    The method calls it once in `forward`, then `loss` for what is minimised; `on_gradients` and `after_step` in the
    moments of the same name. It keeps nothing between steps.
    """

    def __init__(self, figures: Figures, count: str = "") -> None:
        """`count`: the sum that says of how many terms a loss is the mean."""
        self.figures, self.count = figures, count
        self.pieces = 0
        self.first: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.shown: dict[str, Tensor] = {}

    def __call__(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds this piece's sums in this process, scalars or vectors; the figures to return."""
        shared = processes.mean(torch.cat([value.detach().float().flatten() for value in sums.values()]))
        parts = torch.split(shared, [value.numel() for value in sums.values()])
        new = {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts, strict=True)}
        before = self.shown
        self.first = self.first or new
        self.sums = {name: value + self.sums[name] if self.sums else value for name, value in new.items()}
        self.shown = self.figures(self.sums)
        self.pieces += 1
        return {
            name: self.pieces * value - (self.pieces - 1) * before[name] if before else value
            for name, value in self.shown.items()
        }

    def loss(self, total: Tensor, shown: Tensor) -> Tensor:
        """The sum `total` of this piece's terms as a loss with the value `shown`. Its gradient is that of a mean over
        as many terms as the step's first piece has, until `on_gradients` has corrected it.
        """
        loss: Tensor = total / self.first[self.count].clamp(min=1)
        return loss + (shown - loss).detach()

    def on_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients of the mean over the whole step's terms. All of them have to come from `loss`."""
        if self.pieces > 1:
            factor = self.pieces * self.first[self.count].clamp(min=1) / self.sums[self.count].clamp(min=1)
            torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)

    def after_step(self) -> None:
        """Forgets the step."""
        self.pieces, self.first, self.sums, self.shown = 0, {}, {}, {}
