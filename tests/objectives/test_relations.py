import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mimlet.models.features import Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.objectives.attention import logit_distance
from mimlet.objectives.relations import (
    QKV,
    adaptive_divergence,
    coverage_penalty,
    divergence,
    divergence_matrix,
    entropy,
    head_share,
    head_weights,
    log_relation,
    mean_over_heads,
    mixture_divergence,
    regroup,
    relation_logits,
    similarity,
)
from tests.shared import Golden, golden


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def qkv(heads: int, tokens: int = 7, width: int = 4, images: int = 2) -> QKV:
    q, k, v = torch.randn(3, images, heads, tokens, width)
    return q, k, v


def relation(heads: int, tokens: int = 7, sharpness: float = 1.0) -> Tensor:
    """A random log-relation of two images."""
    return (sharpness * torch.randn(2, heads, tokens, tokens)).log_softmax(dim=-1)


def of(oracle: Golden, side: str) -> QKV:
    return oracle.io[f"{side}_q"], oracle.io[f"{side}_k"], oracle.io[f"{side}_v"]


@pytest.mark.parametrize("pair", ["qk", "vv"])
def test_parts_equal_the_reference(pair: str) -> None:
    oracle = golden("mimhd")
    io, weights, tolerance = oracle.io, oracle.weights, oracle.tolerance
    student, teacher = (log_relation(of(oracle, side), pair) for side in ("student", "teacher"))  # type: ignore[arg-type]
    assert_close(student.exp(), io[f"R_student_{pair}"], **tolerance)
    assert_close(teacher.exp(), io[f"R_teacher_{pair}"], **tolerance)
    assert_close(similarity(student, "query"), io[f"S_student_{pair}"], **tolerance)
    assert_close(similarity(teacher, "query"), io[f"S_teacher_{pair}"], **tolerance)
    assert_close(divergence_matrix(student, teacher), io[f"kl_matrix_{pair}"], **tolerance)
    for pool, name in (("query", ""), ("flatten", "flatten_"), ("global", "global_")):
        q, k = (
            linear(similarity(x, pool), weights[f"proj_{pair}.{part}.weight"], weights[f"proj_{pair}.{part}.bias"])  # type: ignore[arg-type]
            for x, part in ((student, "q"), (teacher, "k"))
        )
        matched = head_weights(q, k)
        assert_close(matched, io[f"W_{name}{pair}"], **tolerance)
        assert_close(adaptive_divergence(student, teacher, matched), io[f"loss_{name}{pair}"][0], **tolerance)
        if pool == "query":
            mixture = adaptive_divergence(student, teacher, matched, "mixture")
            assert_close(mixture, io[f"loss_mixture_{pair}"][0], **tolerance)


@pytest.mark.parametrize("pair", ["qk", "vv"])
def test_baselines_equal_the_reference(pair: str) -> None:
    oracle = golden("mimhd")
    io, tolerance = oracle.io, oracle.tolerance
    student, teacher = (log_relation(of(oracle, side), pair) for side in ("student", "teacher"))  # type: ignore[arg-type]
    average = divergence(mean_over_heads(student), mean_over_heads(teacher))
    assert_close(average, io[f"baseline_average_{pair}"], **tolerance)
    best = int(io["teacher_head_importance"].argmax())
    assert_close(divergence(student, teacher[:, [best]]).mean(), io[f"baseline_select_{pair}"][0], **tolerance)
    # the reference maps relations; with `heads = "learned_map"` the same function maps their logits
    mapped = logit_distance(student.exp(), teacher.exp(), oracle.weights["baseline_map.weight"])
    assert_close(mapped, io[f"baseline_learned_map_mse_{pair}"][0], **tolerance)


def test_a_divergence_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log().view(1, 1, 2, 2)
    student = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log().view(1, 1, 2, 2)
    expected = torch.tensor([(0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2])  # the second row is equal
    assert_close(divergence(student, teacher), expected)
    assert_close(divergence_matrix(student, teacher), expected.view(1, 1, 1))
    assert_close(mixture_divergence(student, teacher, torch.ones(1, 1, 1)), expected)


def test_relation_logits_of_every_pair() -> None:
    parts = dict(zip("qkv", qkv(3), strict=True))
    for first in "qkv":
        for second in "qkv":
            got = relation_logits((parts["q"], parts["k"], parts["v"]), first + second)  # type: ignore[arg-type]
            expected = torch.einsum("bhid,bhjd->bhij", parts[first], parts[second]) / 2
            assert_close(got, expected)
            rows = log_relation((parts["q"], parts["k"], parts["v"]), first + second).exp().sum(-1)  # type: ignore[arg-type]
            assert_close(rows, torch.ones_like(rows))


def test_regrouping_equals_an_encoder_of_that_head_count() -> None:
    few, many = (ViT(ViTShape(16, 8, 24, 2, heads)) for heads in (3, 6))
    few.blocks[0] = many.blocks[0]
    many.load_state_dict(few.state_dict())
    images = torch.randn(2, 3, 16, 16)
    taps = Taps(qkv=(2,), tokens=False)
    ours, theirs = few(images, taps=taps).qkv[2], many(images, taps=taps).qkv[2]
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == (2, 3, 5, 8)
        assert torch.equal(regroup(x, 6), y)
        assert torch.equal(regroup(regroup(x, 6), 3), x)
        assert regroup(x, 6).untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "a view, no copy"


def test_similarities() -> None:
    log_relation = relation(5)
    maps = log_relation.exp()
    received = maps.mean(dim=2)  # by hand: how much attention each token receives, on average over queries
    for pool, expected in (
        ("query", 7 * torch.einsum("bmt,bnt->bmn", received, received)),
        ("flatten", torch.einsum("bmij,bnij->bmn", maps, maps) / 7),
        ("global", torch.full((2, 5, 5), 1 / 7)),
    ):
        assert_close(similarity(log_relation, pool), expected)  # type: ignore[arg-type]


def test_one_hot_weights_of_equal_heads_give_tinymims_loss() -> None:
    student, teacher = relation(4).requires_grad_(), relation(4)
    order = torch.tensor([2, 0, 3, 1])
    weights = torch.eye(4)[order].expand(2, 4, 4)
    expected = divergence(student, teacher[:, order]).mean()
    (gradient,) = torch.autograd.grad(expected, student)
    for reading in ("sum", "mixture"):
        loss = adaptive_divergence(student, teacher, weights, reading)  # type: ignore[arg-type]
        assert_close(loss, expected)
        assert_close(torch.autograd.grad(loss, student)[0], gradient)


def test_both_readings_teach_the_student_the_same_and_the_mixture_is_nearer() -> None:
    student, teacher = relation(3, sharpness=2.0).requires_grad_(), relation(5, sharpness=2.0)
    weights = torch.randn(2, 3, 5).softmax(-1)
    total, mixture = (adaptive_divergence(student, teacher, weights, reading) for reading in ("sum", "mixture"))  # type: ignore[arg-type]
    assert 0 < mixture < total - 0.1
    assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (total, mixture)))


def test_the_divergence_matrix_equals_all_pairs() -> None:
    student, teacher = relation(3), relation(5)
    pairs = (teacher[:, None].exp() * (teacher[:, None] - student[:, :, None])).sum(-1).mean(-1)
    assert_close(divergence_matrix(student, teacher), pairs)


def test_nothing_of_all_pairs_of_heads_is_ever_held() -> None:
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            outs = out if isinstance(out, tuple | list) else [out]
            largest.extend(x.numel() for x in outs if isinstance(x, Tensor))
            return out

    images, tokens, m2, m1 = 2, 9, 3, 5
    ours, theirs = qkv(m2, tokens), qkv(m1, tokens)
    ours[0].requires_grad_()
    weights = torch.randn(images, m2, m1, requires_grad=True)
    with Watch():
        student, teacher = log_relation(ours, "qk"), log_relation(theirs, "qk")
        for pool in ("query", "flatten", "global"):
            similarity(student, pool).sum().backward(retain_graph=True)  # type: ignore[arg-type]
        for reading in ("sum", "mixture"):
            adaptive_divergence(student, teacher, weights.softmax(-1), reading).backward(retain_graph=True)  # type: ignore[arg-type]
    assert max(largest) == images * m1 * tokens**2


def test_underflow_stays_finite() -> None:
    """Where probabilities are 0 in float32, the naive t (log t - log s) is not a number."""
    student = (1e4 * torch.randn(2, 3, 7, 7)).requires_grad_()
    teacher = 1e4 * torch.randn(2, 3, 7, 7)
    naive = teacher.softmax(-1) * (teacher.softmax(-1).log() - student.softmax(-1).log())
    assert not naive.sum().isfinite()
    weights = torch.randn(2, 3, 3, requires_grad=True)
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    # the other heads' shares underflow too
    for w in (weights.softmax(-1), (1e4 * weights).softmax(-1)):
        for loss in (
            divergence(s, t).mean(),
            divergence(mean_over_heads(s), mean_over_heads(t)).mean(),
            adaptive_divergence(s, t, w),
            adaptive_divergence(s, t, w, "mixture"),
            adaptive_divergence(s, t, head_weights(similarity(s, "query"), similarity(t, "query"))),
            coverage_penalty(w) + 0 * s.mean(),
        ):
            assert loss.isfinite()
            gradients = torch.autograd.grad(loss, (student, weights), retain_graph=True, allow_unused=True)
            assert all(g.isfinite().all() for g in gradients if g is not None)
    assert_close(divergence(t, t), torch.zeros(3))


@pytest.mark.parametrize(("kind", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_costs_no_more_than_rounding_the_inputs(kind: torch.dtype, bound: float) -> None:
    ours, theirs, wide = qkv(3), qkv(3), qkv(5)
    weights = torch.randn(2, 3, 5).softmax(-1)

    def losses(ours: QKV, theirs: QKV, wide: QKV) -> Tensor:
        s, t, u = log_relation(ours, "qk"), log_relation(theirs, "qk"), log_relation(wide, "qk")
        matched = head_weights(similarity(s, "flatten"), similarity(t, "query"))
        terms = [divergence(s, t).mean(), matched.std(), coverage_penalty(weights)]
        return torch.stack(terms + [adaptive_divergence(s, u, weights, r) for r in ("sum", "mixture")])  # type: ignore[arg-type]

    halves = [tuple(x.to(kind) for x in parts) for parts in (ours, theirs, wide)]
    rounded = losses(*(tuple(x.float() for x in parts) for parts in halves))  # type: ignore[arg-type]
    with torch.autocast("cpu", kind):
        half = losses(*halves)  # type: ignore[arg-type]
    assert half.dtype == torch.float32
    assert torch.equal(half, rounded), "every product is float32's"
    assert_close(half, losses(ours, theirs, wide), rtol=bound, atol=bound / 100)


def test_shares_and_their_penalty() -> None:
    even, one = torch.full((2, 3, 4), 0.25), torch.eye(4)[[1, 1, 1]].expand(2, 3, 4)
    assert_close(entropy(even), torch.full((2, 3), math.log(4)))
    assert_close(entropy(one), torch.zeros(2, 3))
    assert_close(coverage_penalty(even), torch.tensor(0.0))
    assert_close(coverage_penalty(one), torch.tensor(math.log(4)))
    # every student head has one teacher head, but all teacher heads are imitated: no penalty
    assert_close(coverage_penalty(torch.eye(4).expand(2, 4, 4)), torch.tensor(0.0))
    assert_close(head_share(one), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    logits = torch.zeros(1, 2, 4)
    logits[..., 0] = 3.0
    penalties = []
    for _ in range(5):
        logits = logits.detach().requires_grad_()
        penalties.append(coverage_penalty(logits.softmax(-1)))
        logits = logits - 2.0 * torch.autograd.grad(penalties[-1], logits)[0]
    assert all(later < earlier for earlier, later in pairwise(penalties))
