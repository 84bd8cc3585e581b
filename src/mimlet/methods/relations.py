"""The relation loss as a term: relations of one student block imitate those of one teacher block.

TinyMIM (Ren et al. 2023); MIM-HD, section 3.2; G2SD's relation loss; D-MAE's map over heads. See
`objectives/relations.py` for the formulas.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.errors import ConfigError
from mimlet.methods.settings import AdaptiveSettings, RelationSettings
from mimlet.methods.terms import Term, common_order
from mimlet.models.features import Features, Taps
from mimlet.objectives.attention import logit_distance
from mimlet.objectives.relations import (
    QKV,
    adaptive_divergence,
    coverage_penalty,
    divergence,
    entropy,
    exactly,
    head_share,
    head_weights,
    log_relation,
    mean_over_heads,
    regroup,
    relation_logits,
    similarity,
)

if TYPE_CHECKING:
    from mimlet.methods.settings import Pair, TermSettings
    from mimlet.models.encoder import Encoder
    from mimlet.models.teacher import Teacher


class HeadMatching(nn.Module):
    """Who imitates whom (MIM-HD, eq. 6): similarities of the student's heads [B,M2,M2] and of the teacher's [B,M1,M1]
    -> W [B,M2,M1], teacher heads' shares for every student head.

    Rows of similarities are projected to `subspace` channels by `q` and `k`: linear, or SemCKD's two layers and L2
    normalisation. Autocast is off inside.
    """

    def __init__(self, student_heads: int, teacher_heads: int, settings: AdaptiveSettings) -> None:
        super().__init__()
        self.normalise = settings.projection == "mlp_l2"
        self.q, self.k = (self._projection(heads, settings) for heads in (student_heads, teacher_heads))

    @staticmethod
    def _projection(heads: int, settings: AdaptiveSettings) -> nn.Module:
        C = settings.subspace
        if settings.projection == "linear":
            return nn.Linear(heads, C)
        return nn.Sequential(nn.Linear(heads, 2 * C), nn.ReLU(), nn.Linear(2 * C, C))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """W [B,M2,M1]; rows sum to 1."""
        with exactly(student):
            q, k = self.q(student), self.k(teacher)
        return head_weights(*(F.normalize(x, dim=-1) if self.normalise else x for x in (q, k)))


class Relations(Term):
    """KL(teacher || student) of relations, one loss `relation_PAIR` for each pair, or for `learned_map` the squared
    distance of their logits. `settings.heads` says how unequal head counts meet; the student keeps its own but for
    these: `adaptive_block` regroups its q, k and v to the teacher's heads, which is all that TinyMIM's adaptive last
    block does, since relations are read before that block attends; `regroup` splits both sides into `relation_heads`.

    Each pair has `settings.weight` (TinyMIM: KL_QK + KL_VV), with `regroup` divided by the number of pairs, as G2SD
    averages its nine. `adaptive` has a matching per pair; with `coverage` also the loss `coverage_PAIR`; and it is
    watched by `head_entropy_PAIR` (mean entropy of W, nats) and `head_share_PAIR_01`, ... (mean share of each teacher
    head). Shares are those of the images at hand, one piece of a batch.

    The class token takes part if both sides have one and `class_token` says so; else its row is left out of q, k and v
    before the softmax, as a distillation token's always is. No gradient reaches the teacher's side.

    Layers are by default the last that attend. Tokens have to stand on one grid; their order does not matter.
    """

    student_order: Tensor | None
    teacher_order: Tensor | None

    def __init__(self, settings: TermSettings, encoder: Encoder, teacher: Teacher, *, masked: bool) -> None:
        super().__init__(settings, encoder, teacher, masked=masked)
        assert isinstance(settings, RelationSettings)
        self.settings = settings
        self.pairs: list[Pair] = list(dict.fromkeys(settings.pairs))
        self.label = f"{settings.label}_" if settings.label else ""
        self.student_layer = settings.student_layer or max(encoder.attending, default=encoder.depth)
        self.teacher_layer = settings.teacher_layer or max(teacher.attending, default=teacher.depth)
        for side, layer, depth, attending in (
            ("student", self.student_layer, encoder.depth, encoder.attending),
            ("teacher", self.teacher_layer, teacher.depth, teacher.attending),
        ):
            if layer > depth:
                raise ConfigError(
                    f"relations: {side}_layer {layer} is not a block of the {side}, which has 1 to {depth}"
                )
            if layer not in attending:
                raise ConfigError(
                    f"relations: {side}_layer {layer} does not attend to the whole image; blocks of the {side} that "
                    f"do: {', '.join(map(str, attending)) or 'none'}"
                )
        orders = common_order("relations", encoder, teacher, (self.student_layer, self.teacher_layer), masked=masked)
        for side, order in zip(("student", "teacher"), orders, strict=True):
            self.register_buffer(f"{side}_order", order, persistent=False)
        self.student_heads = encoder.heads_of(self.student_layer)
        self.teacher_heads = teacher.heads_of(self.teacher_layer)
        if settings.heads == "adaptive_block":
            self.student_heads = self.teacher_heads
        elif settings.heads == "regroup":
            self.student_heads = self.teacher_heads = settings.relation_heads
        self._check(encoder, teacher)
        self.class_token = settings.class_token and bool(encoder.prefix) and bool(teacher.prefix)
        self.student_taps = Taps(qkv=(self.student_layer,), tokens=False)
        self.teacher_taps = Taps(qkv=(self.teacher_layer,), tokens=False)

        share = len(self.pairs) if settings.heads == "regroup" else 1
        self.weights = {f"{self.label}relation_{pair}": settings.weight / share for pair in self.pairs}
        self.matchings, self.head_maps = nn.ModuleDict(), nn.ModuleDict()
        for pair in self.pairs:
            if settings.heads == "adaptive":
                self.matchings[pair] = HeadMatching(self.student_heads, self.teacher_heads, settings.adaptive)
                if settings.adaptive.coverage:
                    self.weights[f"{self.label}coverage_{pair}"] = settings.weight * settings.adaptive.coverage
            elif settings.heads == "learned_map":
                self.head_maps[pair] = nn.Linear(self.student_heads, self.teacher_heads, bias=False)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Tensor]:
        """The losses and what is watched, by name."""
        ours = self._tokens(student, self.student_layer, self.student_heads, self.student_order)
        theirs = self._tokens(teacher, self.teacher_layer, self.teacher_heads, self.teacher_order)
        theirs = (theirs[0].detach(), theirs[1].detach(), theirs[2].detach())
        answers: dict[str, Tensor] = {}
        for pair in self.pairs:
            answers |= {f"{self.label}{name}": value for name, value in self._compare(ours, theirs, pair).items()}
        return answers

    def _tokens(self, features: Features, layer: int, heads: int, order: Tensor | None) -> QKV:
        """Regrouped, and of the prefix only the class token, if it takes part."""
        q, k, v = features.trimmed(int(self.class_token)).qkv[layer]
        if order is not None:
            q, k, v = q[:, :, order], k[:, :, order], v[:, :, order]
        return (q, k, v) if q.shape[1] == heads else (regroup(q, heads), regroup(k, heads), regroup(v, heads))

    def _compare(self, ours: QKV, theirs: QKV, pair: Pair) -> dict[str, Tensor]:
        loss, heads = f"relation_{pair}", self.settings.heads
        if heads == "learned_map":
            s, t = relation_logits(ours, pair), relation_logits(theirs, pair)
            head_map = self.head_maps[pair]
            assert isinstance(head_map, nn.Linear)
            with exactly(s):
                return {loss: logit_distance(s, t, head_map.weight)}
        s, t = log_relation(ours, pair), log_relation(theirs, pair)
        if heads == "adaptive":
            return self._adapt(s, t, pair)
        if heads == "average":
            s, t = mean_over_heads(s), mean_over_heads(t)
        elif heads == "significant":
            t = t[:, self.settings.significant_head - 1, None]
        return {loss: divergence(s, t).mean()}

    def _adapt(self, s: Tensor, t: Tensor, pair: Pair) -> dict[str, Tensor]:
        adaptive = self.settings.adaptive
        alike = similarity(s.detach() if adaptive.detach_similarity else s, adaptive.pool)
        weights = self.matchings[pair](alike, similarity(t, adaptive.pool))
        answers = {f"relation_{pair}": adaptive_divergence(s, t, weights, adaptive.reading)}
        if adaptive.coverage:
            answers[f"coverage_{pair}"] = coverage_penalty(weights)
        watched = weights.detach()
        answers[f"head_entropy_{pair}"] = entropy(watched).mean()
        for number, share in enumerate(head_share(watched), 1):
            answers[f"head_share_{pair}_{number:02d}"] = share
        return answers

    def _check(self, encoder: Encoder, teacher: Teacher) -> None:
        settings, number = self.settings, self.settings.significant_head
        ours, theirs = encoder.dims[self.student_layer], teacher.dims[self.teacher_layer]
        if settings.heads == "adaptive_block" and ours % self.teacher_heads:
            raise ConfigError(
                f"relations: the student's width {ours} does not split into the {self.teacher_heads} heads of "
                f"the teacher's block {self.teacher_layer}, as heads='adaptive_block' needs; use another heads, such "
                f"as 'adaptive', or an encoder.dim divisible by {self.teacher_heads}"
            )
        if settings.heads == "regroup":
            if not settings.relation_heads:
                raise ConfigError(
                    f"relations: heads='regroup' needs relation_heads, a divisor of both widths ({ours} and {theirs})"
                )
            for side, width in (("student", ours), ("teacher", theirs)):
                if width % settings.relation_heads:
                    raise ConfigError(
                        f"relations: the {side}'s width {width} does not split into {settings.relation_heads} "
                        f"relation_heads; give a divisor of both widths ({ours} and {theirs})"
                    )
        if settings.heads == "significant" and not 1 <= number <= self.teacher_heads:
            what = f"no significant_head {number}" if number else "heads='significant' needs significant_head"
            raise ConfigError(
                f"relations: {what}: the teacher's block {self.teacher_layer} has heads 1 to {self.teacher_heads}; "
                "`mimlet probe --kind heads` says what each of them is worth"
            )
        if settings.heads == "adaptive" and settings.adaptive.pool == "global":
            warnings.warn(
                "relations: adaptive.pool='global' is the same number for every head (rows of a relation sum to 1), so "
                "all teacher heads weigh the same; 'query' tells heads apart",
                stacklevel=2,
            )
