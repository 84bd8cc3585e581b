"""Terms: distances between student and teacher, made once and used by every method that distils.

A method asks its terms what to tap, runs both encoders once, and hands the answers on:

    student = self.encoder(images, mask, taps=own | self.terms.student_taps)
    teacher = self.teacher(images, mask, taps=self.terms.teacher_taps)
    losses |= self.terms(student, teacher, batch)

A new term is a class, its settings in `methods/settings.py` and one line in `TERMS` there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler
from mimlet.errors import ConfigError
from mimlet.methods.settings import TERMS, load_class
from mimlet.models.features import Features, Taps

if TYPE_CHECKING:
    from mimlet.methods.settings import TermSettings
    from mimlet.models.encoder import Encoder
    from mimlet.models.teacher import Teacher

NOTHING = Taps(tokens=False)


class Term(nn.Module, ABC):
    """A distance between what student and teacher make of the same tokens.

    `student_taps`, `teacher_taps`: what `forward` needs of either. `weights`: coefficient of each loss it returns; what
    it returns under other names is watched, not minimised. Trained parts (head maps, projections) are the term's own
    parameters.
    """

    student_taps: Taps = NOTHING
    teacher_taps: Taps = NOTHING
    weights: dict[str, float]

    @abstractmethod
    def __init__(self, settings: TermSettings, encoder: Encoder, teacher: Teacher, *, masked: bool) -> None:
        """`masked`: whether the student sees only a part of the patches. Raises `ConfigError` where the term does not
        fit the encoder, the teacher or the masking.
        """
        super().__init__()

    def masks(self) -> dict[str, MaskSampler]:
        """Masks of its own that a batch has to carry, by name."""
        return {}

    @abstractmethod
    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name."""


class Terms(nn.Module):
    """Several terms as one."""

    def __init__(self, terms: Iterable[Term]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.student_taps = reduce(or_, (term.student_taps for term in self), NOTHING)
        self.teacher_taps = reduce(or_, (term.teacher_taps for term in self), NOTHING)
        self.weights: dict[str, float] = {}
        for term in self:
            for name, weight in term.weights.items():
                if name in self.weights:
                    raise ConfigError(f"two terms have a loss named '{name}'; give one of them another `label`")
                self.weights[name] = weight

    def __iter__(self) -> Iterator[Term]:
        for term in self.terms:
            assert isinstance(term, Term)
            yield term

    def __len__(self) -> int:
        return len(self.terms)

    def masks(self) -> dict[str, MaskSampler]:
        """The masks of all terms."""
        return {name: sampler for term in self for name, sampler in term.masks().items()}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Tensor]:
        """The scalars of all terms."""
        return {name: value for term in self for name, value in term(student, teacher, batch).items()}


def common_order(
    kind: str, encoder: Encoder, teacher: Teacher, layers: tuple[int, int], *, masked: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What brings the patch tokens of a student's layer and of a teacher's into one order: an index of either's; None
    twice where they are in one. Raises `ConfigError` where the layers have different grids of tokens, or, of masked
    images, different orders.
    """
    (ours, student_order), (theirs, teacher_order) = encoder.layout(layers[0]), teacher.layout(layers[1])
    if ours != theirs:
        raise ConfigError(
            f"{kind}: layer {layers[0]} of the student has {ours[0]} x {ours[1]} tokens, layer {layers[1]} of "
            f"{teacher.source} {theirs[0]} x {theirs[1]}; compare layers with equally many tokens"
        )
    if torch.equal(student_order, teacher_order):
        return None, None
    if masked:
        raise ConfigError(
            f"{kind}: the student and {teacher.source} keep visible tokens in different orders; take a teacher of the "
            "student's family, or a method that shows whole images (tinymim, mimhd)"
        )
    return student_order, teacher_order


def make_terms(settings: Sequence[TermSettings], encoder: Encoder, teacher: Teacher, *, masked: bool) -> Terms:
    """The terms that settings describe; see `Term` for the arguments."""
    made = []
    for each in settings:
        term = load_class(TERMS[each.kind])(each, encoder, teacher, masked=masked)
        assert isinstance(term, Term)
        made.append(term)
    return Terms(made)
