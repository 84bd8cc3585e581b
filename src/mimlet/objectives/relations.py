"""Distances between the relations of two blocks: TinyMIM (Ren et al. 2023), MIM-HD, G2SD's relation loss, and the ways
around unequal head counts they are compared with.

A relation is softmax(a b^T / sqrt(d)) of two of queries, keys and values. Everything here works on its logarithm,
[B,H,T,T] with rows of queries, so that a divergence stays finite where a probability underflows: 0 times a finite
number. Inputs are cast to float32 (float64 stays) and autocast is switched off around every product, because logits of
half precision are too coarse to take logarithms of. M1, M2: heads of the teacher and the student.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mimlet.models.parts import attention_logits

if TYPE_CHECKING:
    from mimlet.methods.settings import Pair

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each [B,H,T,d]."""


def exactly(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def regroup(x: Tensor, heads: int) -> Tensor:
    """Splits the channels of [B,H,T,d] anew: [B,heads,T,H*d/heads]. TinyMIM's adaptive block and G2SD's relation heads
    do this; no weight changes. `heads` must divide H*d.
    """
    B, _, T, _ = x.shape
    return x.transpose(1, 2).reshape(B, T, heads, -1).transpose(1, 2)


def relation_logits(qkv: QKV, pair: Pair) -> Tensor:
    """a b^T / sqrt(d) of the two that `pair` names, e.g. "qk" or "vv": [B,H,T,T], float32."""
    a, b = (qkv["qkv".index(letter)] for letter in pair)
    if a.dtype != torch.float64:
        a, b = a.float(), b.float()
    with exactly(a):
        return attention_logits(a, b)


def log_relation(qkv: QKV, pair: Pair) -> Tensor:
    """Logarithm of the relation, [B,H,T,T]: each row is a distribution over keys."""
    return relation_logits(qkv, pair).log_softmax(dim=-1)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each head [H], mean over images and rows, from log-relations [B,H,T,T].

    TinyMIM's loss is the mean of it. A teacher of one head [B,1,T,T] is what every student head answers to.
    """
    return (teacher.exp() * (teacher - student)).sum(dim=-1).mean(dim=(0, 2))


def mean_over_heads(log_relation: Tensor) -> Tensor:
    """Log-relations [B,H,T,T] -> logarithm of the mean relation [B,1,T,T] (AttnDistill's way)."""
    return log_relation.logsumexp(dim=1, keepdim=True) - math.log(log_relation.shape[1])


def similarity(log_relation: Tensor, pool: Literal["query", "flatten", "global"]) -> Tensor:
    """How alike the heads of one network are (MIM-HD, eq. 4 and 5): S = T f f^T, [B,M,M], entries near 1.

    query: f is the mean over queries, how much attention each token receives. flatten: whole maps,
    S = <R_a, R_b> / T as in SemCKD. global: the printed mean over both axes, which is 1/T for every head and image,
    since rows sum to 1.
    """
    relation, tokens = log_relation.exp(), log_relation.shape[-1]
    if pool == "flatten":
        f, scale = relation.flatten(2), 1 / tokens
    else:
        f, scale = relation.mean(dim=-2 if pool == "query" else (-2, -1)).view(*relation.shape[:2], -1), float(tokens)
    with exactly(f):
        return scale * (f @ f.transpose(1, 2))


def head_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Share of each teacher head in what a student head imitates (MIM-HD, eq. 6): queries [B,M2,C] of the student,
    keys [B,M1,C] of the teacher -> [B,M2,M1], rows sum to 1. Without a scale or temperature, as printed.
    """
    with exactly(queries):
        return (queries @ keys.transpose(1, 2)).softmax(dim=-1)


def divergence_matrix(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher head || student head) of all pairs, mean over rows, [B,M2,M1]: sum t log t - <t, log s>, one product
    over flattened maps instead of a tensor of M1 M2 T T.
    """
    relation, tokens = teacher.exp(), teacher.shape[-1]
    negentropy = (relation * teacher).sum(dim=(-2, -1))
    with exactly(student):
        cross = student.flatten(2) @ relation.flatten(2).transpose(1, 2)
    return (negentropy[:, None] - cross) / tokens


def mixture_divergence(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """KL(mixture of teacher heads by `weights` [B,M2,M1] || student head) of each head [M2], mean over images and
    rows.
    """
    with exactly(weights):
        mixture = (weights @ teacher.exp().flatten(2)).view_as(student)
    # Where all heads underflow, the gradient of the logarithm has to stay finite: it is multiplied by 0 then.
    log_mixture = mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()
    return (mixture * (log_mixture - student)).sum(dim=-1).mean(dim=(0, 2))


def adaptive_divergence(
    student: Tensor, teacher: Tensor, weights: Tensor, reading: Literal["sum", "mixture"] = "sum"
) -> Tensor:
    """MIM-HD's relation loss (eq. 7), a scalar: mean over images, rows and student heads, so that a one-hot W of equal
    head counts gives TinyMIM's.

    sum: divergences from all teacher heads, weighted by W [B,M2,M1]. mixture: divergence from the weighted mixture;
    never larger. For a given W both have the same gradient in the student's relations; they differ in what W learns:
    `sum` draws it to the heads that are cheapest to imitate.
    """
    if reading == "mixture":
        return mixture_divergence(student, teacher, weights).mean()
    return (weights * divergence_matrix(student, teacher)).sum(dim=-1).mean()


def head_share(weights: Tensor) -> Tensor:
    """Mean share of each teacher head [M1] over images and student heads, from W [B,M2,M1]."""
    return weights.mean(dim=(0, 1))


def entropy(shares: Tensor) -> Tensor:
    """-sum p log p over the last axis, in nats; finite in value and gradient at p = 0."""
    return -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(dim=-1)


def coverage_penalty(weights: Tensor) -> Tensor:
    """KL(mean share of the teacher heads || uniform) = log M1 - entropy of the mean share: 0 when all teacher heads are
    imitated equally often, log M1 when only one is. Ours; against the collapse that `sum` tends to.
    """
    return math.log(weights.shape[-1]) - entropy(head_share(weights))
