"""Pieces of different sizes give what the whole step gives."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.methods.whole_step import WholeStep
from mimlet.models.tokenizer import codebook_figures, count_codes


def figures(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"error": sums["error"] / sums["count"], **codebook_figures(sums["codes"])}


def piece(step: WholeStep, weight: Tensor, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
    total = (rows @ weight).square().sum()
    shown = step({"error": total, "count": torch.tensor(len(rows)), "codes": count_codes(codes, 5)})
    return {**shown, "loss": step.loss(total, shown["error"])}


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 4, 2]])
def test_uneven_pieces_average_to_the_whole(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, codes = torch.randn(7, 3, generator=generator), torch.tensor([0, 0, 1, 1, 1, 2, 4])
    weight = nn.Parameter(torch.randn(3, generator=generator))
    expected = (rows @ weight).square().mean()
    (gradient,) = torch.autograd.grad(expected, [weight])
    step = WholeStep(figures, count="count")
    for _ in range(2):  # nothing is left from one step to the next
        weight.grad, means = None, dict.fromkeys(("loss", "error", "codebook_use", "codebook_perplexity"), 0.0)
        for part, named in zip(rows.split(sizes), codes.split(sizes), strict=True):
            values = piece(step, weight, part, named)
            (values["loss"] / len(sizes)).backward()
            means = {name: mean + values[name].item() / len(sizes) for name, mean in means.items()}
        step.on_gradients([weight, nn.Parameter(torch.zeros(1))])
        step.after_step()
        assert weight.grad is not None
        assert_close(weight.grad, gradient)
        whole = {name: value.item() for name, value in codebook_figures(count_codes(codes, 5)).items()}
        assert means == pytest.approx({"loss": expected.item(), "error": expected.item(), **whole}, rel=1e-5)
    assert means["codebook_use"] == pytest.approx(0.8)


def test_a_piece_without_terms_counts_for_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    step = WholeStep(lambda sums: {"error": sums["error"] / sums["count"].clamp(min=1)}, count="count")
    for rows in (torch.zeros(0, 2), torch.tensor([[1.0, 2.0], [3.0, 0.0]])):
        total = (rows @ weight).square().sum()
        shown = step({"error": total, "count": torch.tensor(len(rows))})["error"]
        (step.loss(total, shown) / 2).backward()
    step.on_gradients([weight])
    assert weight.grad is not None
    assert_close(weight.grad, torch.tensor([12.0, 6.0]))  # of ((w1 + 2 w2)^2 + (3 w1)^2) / 2 at w = (1, 1)
