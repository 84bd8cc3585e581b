"""From measurements to advice: observation, analysis, solution, as in the paper "Exploring Strong Lightweight ViTs via
MIM Pre-Training" (IJCV 2025).

Every piece of advice carries the numbers it rests on, where the page draws them, and the limits with their source.
Between two limits the evidence does not decide, and the advice says so. No torch.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from pydantic import TypeAdapter

from mimlet.analyse.results import Analysis, ModelFindings
from mimlet.errors import ConfigError, DataError, RunError
from mimlet.methods.settings import METHODS, DMAESettings
from mimlet.run import Line, Run
from mimlet.untrusted import parse_json, what_is_wrong

DIAGNOSIS_FILE = "diagnosis.json"
PAPER = "Exploring Strong Lightweight ViTs (IJCV 2025)"


@dataclass(frozen=True)
class Limits:
    """Two limits of a measure: from `sign` on it is a sign of what is asked, up to `none` it is not, and in between
    it does not decide. `source`: whose limits they are and what they rest on.
    """

    sign: float
    none: float
    source: str

    def judge(self, value: float) -> bool | None:
        """True: a sign; False: none; None: undecided, as for what is not a number."""
        if math.isnan(value):
            return None
        toward = 1 if self.sign > self.none else -1
        if toward * (value - self.sign) >= 0:
            return True
        return False if toward * (self.none - value) >= 0 else None


LIKENESS_DROP = Limits(
    0.20,
    0.05,
    f"{PAPER}, Fig. 3, shows the drop and names no number; limits ours, from CIFAR-10, two seeds: beside four "
    "fine-tuned encoders MAE loses 0.16 to 0.23, D-MAE, D²-MAE and TinyMIM 0.05 to 0.19, less than MAE beside each of "
    "them; but MIM-HD, more accurate than MAE, 0.13 to 0.23",
)
"""CKA that the upper third loses to the reference, against the lower third."""

LIKENESS_LOWER = 0.70
"""CKA of the lower thirds below which a reference is no yardstick. Ours, on CIFAR-10: random weights reach 0.42 to 0.65
with pre-trained encoders and 0.52 to 0.73 with fine-tuned ones, those at least 0.73 with each other. References that
are hardly trained (from scratch with 1,000 labels; DMAE on raw pixels) are like random weights, at 0.83 to 0.96.
"""

FEWEST_IMAGES = 64
"""Images below which CKA is not read. Ours: from 64 to 1,024 images a drop moves by at most 0.02."""

UNIFORM_ATTENTION = Limits(
    0.98,
    0.95,
    "Ours: in the upper third of vit_micro with random weights every head is at 0.99 or above; encoders "
    "trained on CIFAR-10 without labels have a head below 0.93 in every such block, all but G2SD's (0.94 to 0.97)",
)
"""Lowest entropy of a block's heads, as a share of ln N."""

POINT_ATTENTION = Limits(0.05, 0.10, "Ours; no encoder measured so far comes near: the lowest has 0.60")
"""Highest entropy of a block's heads, as a share of ln N."""

HEADS_ALIKE = (0.01, 0.01)
"""Range of entropy (of ln N) and of distance (of that of uniform attention) over a block's heads below which they are
taken to do the same. Ours, last blocks on CIFAR-10: at most 0.003 and 0.003 where heads are matched adaptively (sum or
mixture), at least 0.014 and 0.027 in others, and 0.004 and 0.014 with random weights.
"""

SEED_SPREAD = 1.6
"""Points of top-1 by which two seeds of one method differ at most in docs/results.md."""

PROBE_LOSS = Limits(SEED_SPREAD, 0.0, "Ours: two seeds of one method differ by up to 1.6 points (docs/results.md)")
"""Points of top-1 that the last layer is behind the best."""

UPPER_GAIN = Limits(0.0, SEED_SPREAD, f"{PAPER}, Fig. 4, names no number; ours: seeds differ by up to 1.6 points")
"""Points of top-1 that fine-tuning gains from the pre-trained upper third."""

RANK_KEPT = Limits(0.5, 0.75, "Ours: in encoders trained on CIFAR-10 without labels the last layer keeps at least 0.83")
"""Effective rank of the last layer, as a share of the highest of any layer."""

RANK_SHARE = Limits(
    0.10,
    0.20,
    "Measure: RankMe (Garrido et al. 2023), which compares models and names no limit; limits ours: 0.30 to 0.42 of the "
    "width in encoders trained on CIFAR-10 without labels, 0.24 to 0.25 with random weights",
)
"""Effective rank of the last layer, as a share of the width."""

RANK_IMAGES = 2
"""Images per dimension below which a low effective rank is not read. Ours: with one image per dimension it is 12 to 14
percent too low, with two 3 to 5.
"""

SPREAD = Limits(
    0.10,
    0.25,
    "Measure: SimSiam (Chen and He 2021), whose collapse is 0 and whose healthy value is 1 / sqrt(D), here 1; limits "
    "ours: 0.36 to 0.60 in encoders trained on CIFAR-10 without labels, but 0.19 in G2SD's",
)
"""Spread of the last layer's features, 1 being isotropic."""

PATCHES_ALIKE = Limits(
    0.70,
    0.50,
    "Ours: 0.14 to 0.37 in encoders trained on CIFAR-10 and 0.58 in one of MAE, 0.67 and 0.72 in G2SD's, 0.75 to 0.76 "
    "with random weights",
)
"""Mean cosine of two patches of an image in the last layer."""

MATCHING_ENTROPY, MATCHING_SHARE = 0.5, 0.5
"""Entropy of the head weights as a share of ln H below which, together with a teacher head's share above which, the
matching is collapsed. Ours, from docs/log.md: MIM-HD's weighted sum ends at 0.00 to 0.33 and 66 to 100 percent, the
mixture at 0.64 to 0.95 and 18 to 47 percent.
"""

LOSS_FALL = Limits(
    0.05,
    0.02,
    "Ours: MAE on CIFAR-10 falls by 0.07 to 0.08 over the second half of 600 steps, and four times as many images "
    "bring 3 points by probe (docs/log.md); schedules end at a rate of 0, so that the end looks flatter than it is",
)
"""Share of the loss at the middle of a training that the second half takes away."""

FEWEST_RECORDS = 20
"""Records of a training below which its loss is not read."""


@dataclass(frozen=True)
class TargetSet:
    """A data set of the paper: labelled images, classes, and top-1 in percent after supervised pre-training, MAE and
    D-MAE (ViT-Tiny, pre-trained on ImageNet-1K).
    """

    name: str
    images: int
    classes: int
    supervised: float
    mae: float
    dmae: float


PAPER_SETS = (
    TargetSet("Flowers", 2_040, 102, 96.4, 85.8, 95.2),
    TargetSet("Pets", 3_680, 37, 93.1, 76.5, 89.1),
    TargetSet("Aircraft", 6_667, 100, 73.5, 64.6, 79.2),
    TargetSet("Cars", 8_144, 196, 85.6, 78.8, 87.5),
    TargetSet("CIFAR-100", 50_000, 100, 85.8, 78.9, 85.0),
    TargetSet("iNat18", 437_513, 8_142, 64.7, 64.0, 65.7),
    TargetSet("ImageNet-1K", 1_281_167, 1_000, 76.5, 78.0, 78.3),
)
"""By number of images. The paper's transfer table; for ImageNet-1K its main table."""

INSUFFICIENT, SUFFICIENT, SMALLEST = 50_000, 437_513, 2_040
"""Labelled images up to which MAE alone fell behind in the paper (by 6 to 15 points), from which it did not (under 2),
and the paper's smallest set.
"""

OURS = (
    "ours (docs/results.md: CIFAR-10, 600 steps, two seeds that differ by up to 1.6 points): D-MAE and D²-MAE are 1.3 "
    "and 1.5 points above MAE by probe, and 0.2 and 1.1 below it with 1,000 labels; TinyMIM is 3.0 and 2.6 above, at "
    "2.6 times the time"
)

UNDERTRAINED = "Are the higher layers undertrained?"
LIKENESS = f"{UNDERTRAINED} By their likeness to a reference"
ATTENTION = f"{UNDERTRAINED} By their attention"
PROBE = f"{UNDERTRAINED} By a probe of every layer"
LEADING = f"{UNDERTRAINED} By fine-tuning without them"
DIMENSIONS = f"{UNDERTRAINED} By the dimensions they use"
MATCHING = "Is the matching of heads collapsed?"
SAME_HEADS = "Do all heads of the last block do the same?"
COLLAPSE = "Have the features collapsed?"
SMOOTH = "Have the patches become one?"
TARGET = "Is the target data set too small for MAE alone?"
FINISHED = "Was the training finished?"
LENGTH = "Was the training long enough?"
RECIPE = "Which recipe to try?"

REFERENCE = (
    "a classifier fine-tuned on images of the same kind, or a supervised or contrastive model such as "
    "timm:deit_tiny_patch16_224"
)
REFERENCE_NEEDED = (
    f"Analyse it beside a model whose higher layers are known to be trained: {REFERENCE}. `mimlet analyse RUN "
    "REFERENCE --data IMAGES`"
)


@dataclass(frozen=True)
class Finding:
    """An answer: `verdict` in plain words, the `evidence` in numbers with the page's section that draws them, the
    `threshold` with its source, and what to do. `decided`: whether the evidence decides.
    """

    question: str
    verdict: str
    evidence: str
    threshold: str
    advice: str
    decided: bool


@dataclass(frozen=True)
class Target:
    """Labelled images and classes of what the encoder is to be fine-tuned on."""

    images: int
    classes: int

    def __post_init__(self) -> None:
        if not 1 <= self.classes <= self.images:
            raise DataError(
                f"{self.images} labelled images of {self.classes} classes are no data set; "
                "expected at least one image per class"
            )


Answer = tuple[Finding, bool | None]
"""A finding, and whether it is a sign of what its question asks (None: undecided)."""


def diagnose(
    analysis: Analysis | None = None,
    judged: str = "",
    reference: str = "",
    run: Run | None = None,
    target: Target | None = None,
) -> list[Finding]:
    """What measurements say about an encoder, and what to try.

    `judged` and `reference` name models of the analysis by label or source; without a name the first is judged, without
    a reference. `run` is the training of the judged model, `target` what it is to be fine-tuned on. What is not given
    is not asked; what was not measured is said. Findings go from the training to the recipe.

    Raises `RunError` where there is nothing to judge, `ConfigError` for an unknown model.
    """
    if analysis is None and target is None and (run is None or not run.metrics):
        empty = f"; {run.path} has no metrics yet" if run else ""
        raise RunError(
            f"nothing to diagnose{empty}: give an analysis (`mimlet analyse MODEL --data IMAGES`), a run folder with "
            "metrics, or the numbers of a target data set"
        )
    answers: dict[str, Answer] = {}
    if run:
        answers |= _of_training(run)
    if analysis is not None:
        model = _find(analysis, judged) if judged else analysis.models[0]
        answers |= _of_model(analysis, model, _find(analysis, reference) if reference else None, run)
    if target:
        answers[TARGET] = _target(target)
    return [finding for finding, _ in answers.values()] + [_recipe(answers, run, bool(reference))]


def findings_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON array of objects."""
    return json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False) + "\n"


def read_findings(folder: Path) -> list[Finding]:
    """The findings in a folder, none where there is no such file; `RunError` where it is damaged."""
    path = folder / DIAGNOSIS_FILE
    if not path.is_file():
        return []
    try:
        return TypeAdapter(list[Finding]).validate_python(parse_json(path.read_bytes()))
    except ValueError as error:
        raise RunError(
            f"{path} is damaged or of another version: {what_is_wrong(error)}; repeat the diagnosis"
        ) from None


def advice_text(findings: Sequence[Finding], width: int = 100) -> str:
    """The findings for a terminal: question, verdict, then what it rests on and what to do."""
    blocks = []
    for finding in findings:
        lines = [finding.question, textwrap.fill(_mark(finding), width, initial_indent="  ", subsequent_indent="  ")]
        for name, text in (
            ("measured", finding.evidence),
            ("limits", finding.threshold),
            ("advice", finding.advice),
        ):
            begin = f"    {name + ':':<10}"
            lines.append(
                textwrap.fill(text, width, initial_indent=begin, subsequent_indent=" " * 14, break_on_hyphens=False)
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _mark(finding: Finding) -> str:
    return finding.verdict if finding.decided else f"{finding.verdict} [undecided]"


def _find(analysis: Analysis, name: str) -> ModelFindings:
    for model in analysis.models:
        if name in (model.label, model.source):
            return model
    known = ", ".join(model.label for model in analysis.models)
    raise ConfigError(f"no model '{name}' in the analysis; it has: {known}")


def _labelled(run: Run | None) -> bool:
    return run is not None and METHODS[run.config.method.name].labels


def _of_training(run: Run) -> dict[str, Answer]:
    lines = run.lines("train")
    if not lines:
        finding = Finding(
            FINISHED,
            "Not known: the run has no metrics yet.",
            f"{run.path.name}: no training records in metrics.jsonl.",
            "Any record of training.",
            "Continue the run with --resume, and diagnose again.",
            False,
        )
        return {FINISHED: (finding, None)}
    answers = {FINISHED: _finished(run, lines[-1])}
    if not _labelled(run):
        answers[LENGTH] = _length(lines, bool(answers[FINISHED][1]))
    for words, (entropy, shares) in _matchings(lines[-1]).items():
        answers[f"{MATCHING} {words}"] = _matching(f"{MATCHING} {words}", lines, entropy, shares)
    return answers


def _finished(run: Run, last: Line) -> Answer:
    schedule, step, epoch = run.config.schedule, int(last["step"]), float(last["epoch"])
    done, planned, unit = (step, schedule.steps, "steps") if schedule.steps else (epoch, schedule.epochs, "epochs")
    half_a_step = done / step / 2 + 1e-4  # a length in epochs is rounded to steps, an epoch to four digits
    missing = planned - done > half_a_step
    finding = Finding(
        FINISHED,
        f"No, it stands at {done / planned:.0%}." if missing else "Yes.",
        f"{done:,g} of {planned:,g} {unit} are logged. Run's page: Losses and learning rate.",
        "The length in the run's settings (schedule.steps or schedule.epochs).",
        "Finish it (--resume) before judging the method: the learning rate has not come down yet."
        if missing
        else "Nothing to do.",
        True,
    )
    return finding, missing


def _length(lines: Sequence[Line], unfinished: bool) -> Answer:
    losses = _values(lines, "total")
    tenth = len(losses) // 10
    limits = (
        f"Still falling fast from {LOSS_FALL.sign:.0%} on, not up to {LOSS_FALL.none:.0%}, in between undecided. "
        f"{LOSS_FALL.source}."
    )
    if unfinished or len(losses) < FEWEST_RECORDS:
        why = "the training is not finished" if unfinished else f"{len(losses)} records of the loss are too few"
        advice = "Finish the training." if unfinished else f"Log at least {FEWEST_RECORDS} times (run.log_steps)."
        evidence = f"{len(losses)} records of the loss, {FEWEST_RECORDS} needed. Run's page: Losses and learning rate."
        return Finding(LENGTH, f"Not known: {why}.", evidence, limits, advice, False), None
    middle, end = fmean(losses[4 * tenth : 5 * tenth]), fmean(losses[-tenth:])
    fall = 1 - end / middle if middle > 0 else math.nan
    sign = LOSS_FALL.judge(fall)
    finding = Finding(
        LENGTH,
        {
            True: "Probably not: the loss still falls fast.",
            False: "Yes, as far as the loss tells.",
            None: "The loss falls slowly.",
        }[sign],
        f"The loss is {middle:.4g} before the middle and {end:.4g} at the end (means of a tenth of the records): "
        f"{fall:.1%} less. Run's page: Losses and learning rate.",
        limits,
        {
            True: "Train longer before trying another method: the same recipe with more --epochs.",
            False: "A longer training is not what to try first.",
            None: "If a training of twice the length is cheap, make it; else go on.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _matchings(line: Line) -> dict[str, tuple[str, list[str]]]:
    """Every matching of heads that a record watches, in words -> the names of its entropy and of its teacher heads'
    shares.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for name in line:
        label, watched, rest = name.rpartition("head_share_")
        pair = rest.partition("_")[0]
        entropy = f"{label}head_entropy_{pair}"
        if watched and entropy in line:
            words = f"{label.replace('_', ' ')}{'-'.join(pair.upper())}"
            found.setdefault(words, (entropy, []))[1].append(name)
    return {words: names for words, names in found.items() if len(names[1]) > 1}


def _matching(question: str, lines: Sequence[Line], watched: str, names: Sequence[str]) -> Answer:
    last = lines[-max(1, len(lines) // 10) :]
    entropy, *shares = (fmean(_values(last, name)) for name in (watched, *names))
    most = math.log(len(shares))
    narrow, one_sided = entropy / most < MATCHING_ENTROPY, max(shares) > MATCHING_SHARE
    sign = True if narrow and one_sided else None if narrow or one_sided else False
    finding = Finding(
        question,
        {
            True: "Yes: one teacher head has most of the weight.",
            False: "No: several teacher heads are imitated.",
            None: "Half: the weights have narrowed, but not to one teacher head."
            if narrow
            else "Half: one teacher head has most of the weight, but not for every image and head.",
        }[sign],
        f"Entropy of the weights {entropy:.2f} of at most {most:.2f} nats ({entropy / most:.0%}); teacher head "
        f"{shares.index(max(shares)) + 1} of {len(shares)} has {max(shares):.0%} (last tenth of the training). "
        "Run's page: Head matching.",
        f"Collapsed where the entropy is below {MATCHING_ENTROPY:.0%} of ln H and a head has more than "
        f"{MATCHING_SHARE:.0%}; undecided where only one holds. Ours, docs/log.md: MIM-HD's weighted sum ends at 0 to "
        "33 % and 66 to 100 %, the mixture at 64 to 95 % and 18 to 47 %.",
        {
            True: 'Try relations.adaptive.reading="mixture", which does not reward the cheapest head, or '
            "relations.adaptive.coverage above 0, or a smaller dual_view.weight (alpha); or matching by hand: "
            'heads="adaptive_block". Ours, docs/results.md: the mixture kept several teacher heads in use, yet was 1.9 '
            "points below the sum by probe and left the student's heads alike; TinyMIM (adaptive_block) is above both.",
            False: "Nothing to do here.",
            None: "Look at the picture: heads that have each chosen another teacher head are specialised, not "
            "collapsed. A longer training will tell.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _of_model(
    analysis: Analysis, model: ModelFindings, reference: ModelFindings | None, run: Run | None
) -> dict[str, Answer]:
    answers = {
        LIKENESS: _likeness(analysis, model, reference, _labelled(run)),
        ATTENTION: _attention(model),
    }
    if model.probe:
        answers[PROBE] = _probe(model, analysis.labels)
    if model.depth in model.leading and len(model.leading) > 1:
        answers[LEADING] = _leading(model, analysis.labels)
    if _attends(model):
        answers[SAME_HEADS] = _same_heads(model)
    if model.effective_rank:
        answers[DIMENSIONS] = _dimensions(model, analysis.images)
        answers[COLLAPSE] = _collapse(model, analysis.images, _labelled(run))
        answers[SMOOTH] = _smooth(model)
    else:
        answers[COLLAPSE] = _unmeasured(
            COLLAPSE, "features", f"no effective rank, spread and likeness of patches of {model.label}", RANK_SHARE
        )
    return answers


def _unmeasured(question: str, what: str, evidence: str, limits: Limits) -> Answer:
    finding = Finding(
        question,
        f"Not known: {what} not measured.",
        f"The analysis has {evidence}.",
        f"A sign from {limits.sign:g} on, none up to {limits.none:g}. {limits.source}.",
        "Repeat `mimlet analyse` with that measurement.",
        False,
    )
    return finding, None


def _likeness(analysis: Analysis, model: ModelFindings, reference: ModelFindings | None, labelled: bool) -> Answer:
    limits = (
        f"A sign where the upper third loses {LIKENESS_DROP.sign:.2f} or more against the lower, none up to "
        f"{LIKENESS_DROP.none:.2f}; nothing is said where the lower third itself is below {LIKENESS_LOWER:.2f}, or of "
        f"fewer than {FEWEST_IMAGES} images. {LIKENESS_DROP.source}."
    )

    def unknown(verdict: str, evidence: str, advice: str) -> Answer:
        return Finding(LIKENESS, verdict, evidence, limits, advice, False), None

    if reference is None:
        return unknown(
            "Reference model needed.",
            f"{model.label} is compared with no other model. Page: Similarity of layers (CKA).",
            f"{REFERENCE_NEEDED}.",
        )
    if reference is model:
        raise ConfigError(f"'{model.label}' is both judged and the reference; name two models of the analysis")
    found = _drop(analysis, model, reference)
    if found is None:
        return unknown(
            "Not known: similarity not measured.",
            f"The analysis has no CKA of {model.label} and {reference.label}.",
            "Repeat `mimlet analyse` with CKA.",
        )
    lower, upper, place = found
    ours = math.ceil(model.depth / 3)
    others = [
        f"{other.label} {drop[0] - drop[1]:.2f}"
        for other in analysis.models
        if other not in (model, reference) and (drop := _drop(analysis, other, reference)) and drop[0] >= LIKENESS_LOWER
    ]
    evidence = (
        f"{_layers(1, ours).capitalize()} of {model.label} reach {lower:.2f} with the best-matching layers of the "
        f"lower third of {reference.label}; {_layers(model.depth - ours + 1, model.depth)} reach {upper:.2f} with "
        f"those of its upper third: {lower - upper:.2f} less ({analysis.images:,} images). Over all layers they match "
        f"layer {place:.1f} of {reference.depth} best, on average."
        + (f" Others lose beside it: {', '.join(others)}." if others else "")
        + " Page: Similarity of layers (CKA)."
    )
    if analysis.images < FEWEST_IMAGES:
        return unknown("Too few images to tell.", evidence, f"Analyse at least {FEWEST_IMAGES} images, better 1,024.")
    if model.depth < 2:
        return unknown("One block has no higher layers.", evidence, "Judge it by a probe.")
    if not lower >= LIKENESS_LOWER:
        return unknown(
            "The two models differ from the first layers on.",
            evidence,
            "Check that the weights were loaded and trained (random ones look so); else take a reference of the same "
            "kind of images and patches.",
        )
    sign = LIKENESS_DROP.judge(lower - upper)
    if sign and labelled:
        return unknown(
            "They differ from the reference, as a classifier's may.",
            evidence,
            "Fine-tuning changes the higher layers most. Judge the encoder it began from, or take a classifier as "
            "reference.",
        )
    finding = Finding(
        LIKENESS,
        {
            True: "Yes, they look so: the lower layers are like the reference's, the higher ones are not.",
            False: "No: beside this reference, higher layers are as much like it as lower ones.",
            None: "The higher layers differ more than the lower ones, as they do in encoders that serve well.",
        }[sign],
        evidence,
        limits,
        {
            True: "The paper's remedy is to distil a larger teacher's attention into the last block (D-MAE); the last "
            "answer says what follows for this method. Beside classifiers, every encoder trained without labels loses "
            "something: analyse others beside the same reference.",
            False: "As far as this reference can tell, they need no distillation. A reference trained without labels, "
            "such as the teacher, shows no drop (ours: -0.03 to 0.04) even where a classifier does: take one to be "
            "sure.",
            None: "Analyse other encoders beside the same reference: who loses less? Or probe every layer.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _drop(analysis: Analysis, model: ModelFindings, reference: ModelFindings) -> tuple[float, float, float] | None:
    """CKA of a model's lower third of layers with the best-matching layers of a reference's lower third, the same of
    the upper thirds, and the layer of the reference that the upper third matches best. None: not measured.
    """
    cka = _similarity(analysis, model, reference)
    if cka is None:
        return None
    rows, columns = math.ceil(model.depth / 3), math.ceil(reference.depth / 3)
    lower = _best_match([row[1 : columns + 1] for row in cka[1 : rows + 1]])
    upper = _best_match([row[-columns:] for row in cka[-rows:]])
    place = fmean(max(range(1, len(row)), key=row.__getitem__) for row in cka[-rows:])
    return lower, upper, place


def _similarity(analysis: Analysis, model: ModelFindings, reference: ModelFindings) -> list[list[float]] | None:
    """CKA [layers of the model][layers of the reference]."""
    a, b = analysis.models.index(model), analysis.models.index(reference)
    for item in analysis.similarities:
        if (item.a, item.b) == (a, b):
            return item.cka
        if (item.a, item.b) == (b, a):
            return [list(column) for column in zip(*item.cka, strict=True)]
    return None


def _best_match(rows: Sequence[Sequence[float]]) -> float:
    """The mean over rows of their largest value."""
    return fmean(math.nan if any(map(math.isnan, row)) else max(row) for row in rows)


def _attends(model: ModelFindings) -> bool:
    return bool(model.upper and model.distance) and all(model.uniform_entropy(block) > 0 for block in model.upper)


def _attention(model: ModelFindings) -> Answer:
    if not _attends(model):
        why = "; ".join(model.notes) or "none was measured"
        return _unmeasured(ATTENTION, "attention", f"no attention of {model.label} ({why})", UNIFORM_ATTENTION)
    assert model.entropy
    assert model.distance
    blocks = model.upper
    low = [min(model.entropy[block - 1]) / model.uniform_entropy(block) for block in blocks]
    high = [max(model.entropy[block - 1]) / model.uniform_entropy(block) for block in blocks]
    judged = [(UNIFORM_ATTENTION.judge(a), POINT_ATTENTION.judge(b)) for a, b in zip(low, high, strict=True)]
    uniform = [block for block, (flat, _) in zip(blocks, judged, strict=True) if flat]
    point = [block for block, (_, sharp) in zip(blocks, judged, strict=True) if sharp]
    sign = True if uniform or point else None if any(None in pair for pair in judged) else False
    distances = [d for block in blocks for d in model.distance[block - 1]]
    whole = len(blocks) == blocks[-1] - blocks[0] + 1
    named = f"blocks {blocks[0]} to {blocks[-1]}" if whole and len(blocks) > 1 else _blocks(blocks)
    even = sorted({f"{model.uniform_distance(block):.2f}" for block in blocks})
    finding = Finding(
        ATTENTION,
        (
            f"Yes: all heads of {_blocks(uniform)} attend to everything alike."
            if uniform
            else f"Yes: all heads of {_blocks(point)} attend to a single patch."
            if point
            else {False: "No: their heads tell patches apart.", None: "Their heads hardly tell patches apart."}[sign]
            if not any(sharp is None for _, sharp in judged)
            else "Their heads attend to very few patches."
        ),
        f"Entropy over the heads of {named}: {min(low):.2f} to {max(high):.2f} of ln N "
        f"(each block's lowest: {_numbers(low)}; highest: {_numbers(high)}); distance {min(distances):.2f} to "
        f"{max(distances):.2f} patches, uniform attention has {' or '.join(even)}. Page: Attention.",
        f"A block is collapsed to uniform where its lowest head is at {UNIFORM_ATTENTION.sign} or above, not below "
        f"{UNIFORM_ATTENTION.none} ({UNIFORM_ATTENTION.source}); to a point where its highest is at "
        f"{POINT_ATTENTION.sign} or below, not above {POINT_ATTENTION.none} ({POINT_ATTENTION.source}).",
        {
            True: "Check that the weights were loaded"
            + (": heads of an encoder that was never trained look so" if uniform else "")
            + ". If they were, train longer; then distil attention (D-MAE).",
            False: "Nothing to do here.",
            None: "Train longer and look again.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _probe(model: ModelFindings, labels: str) -> Answer:
    best = max(range(len(model.probe)), key=model.probe.__getitem__)
    loss = model.probe[best] - model.probe[-1]
    sign = PROBE_LOSS.judge(loss)
    finding = Finding(
        PROBE,
        {
            True: f"Yes, they look so: layer {best} serves a probe best.",
            False: "No: the last layer serves a probe best.",
            None: f"Layer {best} is ahead of the last, within what seeds differ by.",
        }[sign],
        f"Top-1: {model.probe[best]:.1f} % from layer {best}, {model.probe[-1]:.1f} % from the last of {model.depth}: "
        f"{loss:.1f} points ({labels or 'labels not named'}). Page: Accuracy by layer.",
        f"A sign from {PROBE_LOSS.sign} points on; none where the last is the best. {PROBE_LOSS.source}.",
        {
            True: f"Distil attention into the last block; or let the decoder read an earlier one (D²-MAE), so that "
            f"the last is free. For frozen features, use layer {best}.",
            False: "Nothing to do here.",
            None: "Repeat with another seed or more test images.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _leading(model: ModelFindings, labels: str) -> Answer:
    lower = model.depth - math.ceil(model.depth / 3)
    kept = max((k for k in model.leading if k <= lower), default=min(model.leading))
    gain = model.leading[model.depth] - model.leading[kept]
    sign = UPPER_GAIN.judge(gain)
    finding = Finding(
        LEADING,
        {
            True: "Yes, they look so: fine-tuning does as well without them.",
            False: "No: fine-tuning gains from them.",
            None: "They bring less than seeds differ by.",
        }[sign],
        f"Top-1 after fine-tuning: {model.leading[model.depth]:.1f} % with all {model.depth} blocks, "
        f"{model.leading[kept]:.1f} % with the first {kept} and the others fresh: {gain:+.1f} points "
        f"({labels or 'labels not named'}). Page: Accuracy by layer.",
        f"A sign at {UPPER_GAIN.sign:.0f} points or less, none from {UPPER_GAIN.none} on. {UPPER_GAIN.source}.",
        {
            True: "Distil attention into the last block (D-MAE).",
            False: "Nothing to do here.",
            None: "Repeat with another seed, or with fewer labels.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _dimensions(model: ModelFindings, images: int) -> Answer:
    ranks = model.effective_rank
    best = max(range(len(ranks)), key=ranks.__getitem__)
    kept = ranks[-1] / ranks[best]
    sign = RANK_KEPT.judge(kept)
    finding = Finding(
        DIMENSIONS,
        {
            True: "Yes, they look so: they lose dimensions that lower layers have.",
            False: "No: they use as many as lower layers, or nearly.",
            None: "They use fewer than lower layers.",
        }[sign],
        f"Effective rank {ranks[-1]:.1f} in the last layer, {ranks[best]:.1f} in layer {best}, the highest: "
        f"{kept:.2f} of it ({images:,} images). Page: Features by layer.",
        f"A sign at {RANK_KEPT.sign} or less, none from {RANK_KEPT.none} on. {RANK_KEPT.source}.",
        {
            True: f"Distil into the last block, or use layer {best} for frozen features. A classifier's last layers "
            "lose dimensions too: its classes need few.",
            False: "Nothing to do here.",
            None: "Look at a probe of every layer.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _same_heads(model: ModelFindings) -> Answer:
    assert model.entropy
    assert model.distance
    block = model.attending[-1]
    entropy, distance = model.entropy[block - 1], model.distance[block - 1]
    entropies = (max(entropy) - min(entropy)) / model.uniform_entropy(block)
    distances = (max(distance) - min(distance)) / model.uniform_distance(block)
    alike = entropies < HEADS_ALIKE[0] and distances < HEADS_ALIKE[1] and len(entropy) > 1
    finding = Finding(
        SAME_HEADS,
        "Yes, as far as distance and entropy tell." if alike else "No.",
        f"Over the {len(entropy)} heads of block {block}, entropy has a range of {entropies:.3f} of ln N, "
        f"distance of {distances:.3f} of uniform attention's. Page: Attention.",
        f"Alike below {HEADS_ALIKE[0]} and {HEADS_ALIKE[1]}. Ours: last blocks on CIFAR-10 have at most 0.003 "
        "and 0.003 where heads are matched adaptively, at least 0.014 and 0.027 in other trained encoders.",
        "Look at the attention maps. Every student head imitates the same teacher heads where the matching is one for "
        'all; heads="adaptive_block" (TinyMIM) gives each its own. Ours: fine-tuning parts them again.'
        if alike
        else "Nothing to do here.",
        True,
    )
    return finding, alike


def _collapse(model: ModelFindings, images: int, labelled: bool) -> Answer:
    rank, spread = model.effective_rank[-1], model.spread[-1]
    share = rank / model.dim
    few = images < RANK_IMAGES * model.dim
    signs = (RANK_SHARE.judge(share), SPREAD.judge(spread))
    if signs[0] is not False and (few or labelled):
        signs = (None, signs[1])
    sign = True if True in signs else None if None in signs else False
    finding = Finding(
        COLLAPSE,
        {
            True: "Yes: they fill few of their dimensions." if signs[0] else "Yes: all images look alike.",
            False: "No.",
            None: "Not clear: the features are narrow.",
        }[sign],
        f"Last layer: effective rank {rank:.1f} of {model.dim} dimensions ({share:.2f}), spread {spread:.2f} of an "
        f"isotropic 1 ({images:,} images). Page: Features by layer.",
        f"Effective rank: a sign at {RANK_SHARE.sign} of the width or less, none from {RANK_SHARE.none} on; not read "
        f"below {RANK_IMAGES} images per dimension, nor of classifiers, which need few dimensions "
        f"({RANK_SHARE.source}). Spread: a sign at {SPREAD.sign} or less, none from {SPREAD.none} on "
        f"({SPREAD.source}).",
        {
            True: "Look for a weight or a loss that rewards equal features: an alignment without reconstruction, too "
            "high a learning rate. A probe says what it costs.",
            False: "Nothing to do here. Between encoders on the same images, a higher rank is the better sign.",
            None: f"Analyse at least {RANK_IMAGES * model.dim:,} images."
            if few
            else "Compare with another encoder on the same images, or by a probe.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _smooth(model: ModelFindings) -> Answer:
    last = model.similarity[-1]
    sign = PATCHES_ALIKE.judge(last)
    finding = Finding(
        SMOOTH,
        {
            True: "Yes, nearly: patches of an image can hardly be told apart.",
            False: "No.",
            None: "Partly: patches of an image are much alike.",
        }[sign],
        f"Mean cosine of two patches of an image: {last:.2f} in the last layer, {model.similarity[0]:.2f} in the "
        "embedding. Page: Features by layer.",
        f"A sign from {PATCHES_ALIKE.sign} on, none up to {PATCHES_ALIKE.none}. {PATCHES_ALIKE.source}.",
        {
            True: "Random weights look so: check that the weights were loaded. If they were, do not use the last "
            "layer for dense tasks; train longer, or with reconstruction.",
            False: "Nothing to do here.",
            None: "Check dense tasks (detection, segmentation) on an earlier layer too.",
        }[sign],
        sign is not None,
    )
    return finding, sign


def _target(target: Target) -> Answer:
    sign = True if target.images <= INSUFFICIENT else False if target.images >= SUFFICIENT else None
    below = [item for item in PAPER_SETS if item.images <= target.images][-1:]
    above = [item for item in PAPER_SETS if item.images > target.images][:1]
    near = "; ".join(
        f"{item.name} ({item.images:,} images): D-MAE {item.dmae - item.mae:+.1f}, supervised "
        f"{item.supervised - item.mae:+.1f} beside MAE"
        for item in below + above
    )
    decided = sign is not None and target.images >= SMALLEST
    finding = Finding(
        TARGET,
        {
            True: "Yes, by its size." if decided else "Probably: it is smaller than any set of the paper.",
            False: "No, by its size.",
            None: "Between the paper's sets.",
        }[sign],
        f"{target.images:,} labelled images of {target.classes:,} classes ({target.images / target.classes:.3g} per "
        f"class). The paper's next sets, in points of top-1: {near}. No diagram.",
        f"Too small up to {INSUFFICIENT:,} images (MAE is 6.1 to 14.6 points behind D-MAE), not from {SUFFICIENT:,} on "
        f"(0.3 to 1.7), undecided in between and below {SMALLEST:,}. {PAPER}, transfer table; ViT-Tiny, 224 "
        "px, pre-trained on ImageNet-1K. The number of images orders the sets, images per class do not: 54 on iNat18 "
        "go with 1.7 points, 67 on Aircraft with 14.6.",
        {
            True: "Distil: the paper's D-MAE and D²-MAE repair what MAE alone lacks here. "
            f"Not seen by us at small scale: {OURS}.",
            False: "MAE alone transfers nearly as well; distillation brings under two points.",
            None: "Fine-tune an MAE encoder and a distilled one on a part of the labels, and compare.",
        }[sign],
        decided,
    )
    return finding, sign


def _recipe(answers: dict[str, Answer], run: Run | None, compared: bool) -> Finding:
    signs = {question: sign for question, (_, sign) in answers.items()}
    upper = any(sign for question, sign in signs.items() if question.startswith(UNDERTRAINED)) or signs.get(LIKENESS)
    small = signs.get(TARGET)
    verdict, advice, decided = _remedy(run, upper, small, compared)
    first = []
    if signs.get(FINISHED) or signs.get(LENGTH):
        first.append("train longer")
    if signs.get(ATTENTION):
        first.append("check the weights")
    if any(sign for question, sign in signs.items() if question.startswith(MATCHING)):
        first.append("mend the matching of heads")
    if first:
        verdict = f"First {' and '.join(first)}. Then: {verdict}"
    words = {True: "yes", False: "no", None: "undecided"}
    return Finding(
        RECIPE,
        verdict,
        f"Method: {run.config.method.name if run else 'not given'}. Higher layers undertrained: "
        f"{words[upper] if LIKENESS in signs else 'not analysed'}. Target too small for MAE alone: "
        f"{words[small] if TARGET in signs else 'not given'}. From the findings above; no diagram.",
        f"No limit but differences. {PAPER}, from observation to solution: on ImageNet-1K MAE has 78.0, D-MAE 78.3, "
        "D²-MAE 78.7; on six other sets D-MAE is 1.7 to 14.6 points above MAE, and D²-MAE 0.2 to 1.3 above D-MAE. "
        f"Small scale, {OURS}.",
        advice,
        decided,
    )


def _remedy(run: Run | None, upper: bool | None, small: bool | None, compared: bool) -> tuple[str, str, bool]:
    """Verdict, advice and whether it is decided: from the method, whether the higher layers are undertrained, whether
    the target is too small for MAE alone, and whether there was a reference.
    """
    method = run.config.method if run else None
    plain = method is None or method.name == "mae"
    coupled = isinstance(method, DMAESettings) and method.decode_layer is None
    if _labelled(run):
        return "None: this is a classifier.", "Diagnose the encoder it began from.", True
    if small and plain:
        return (
            "Distil attention and decouple the decoder (D²-MAE).",
            "A recipe d2mae_* with a larger MAE encoder as teacher; dmae_* costs the same.",
            True,
        )
    if upper and plain:
        return (
            "Distil attention (D-MAE).",
            "A recipe dmae_* with a larger MAE encoder as teacher, then d2mae_*. On large targets expect 0.3 to 1.7 "
            "points; at small scale perhaps none.",
            True,
        )
    if (upper or small) and coupled:
        return (
            "Decouple the decoder (D²-MAE).",
            "A recipe d2mae_*: the decoder reads an earlier block, at two thirds of the depth, and the last is free "
            "for the teacher.",
            True,
        )
    if upper:
        return (
            "No recipe is known to go further.",
            "Train longer or with a stronger teacher, and compare with another method at equal time.",
            False,
        )
    if upper is None:
        if compared:
            return "This reference does not decide.", f"Take another reference: {REFERENCE}.", False
        return "Reference model needed.", f"{REFERENCE_NEEDED}.", False
    if plain and small is None:
        return (
            "MAE may be enough; the target decides.",
            f"Give the target's labelled images and classes: up to {INSUFFICIENT:,} images distillation paid in the "
            "paper.",
            False,
        )
    return (
        "MAE is enough." if plain else "Stay with what you have.",
        "Spend on a longer training and on fine-tuning, not on another method.",
        True,
    )


def _values(lines: Sequence[Line], name: str) -> list[float]:
    values = (line.get(name) for line in lines)
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]


def _layers(first: int, last: int) -> str:
    return f"layers {first} to {last}" if last > first else f"layer {first}"


def _blocks(numbers: Sequence[int]) -> str:
    return f"block{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
