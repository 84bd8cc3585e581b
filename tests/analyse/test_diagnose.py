"""Advice from made measurements on both sides of every limit; what cannot be decided says so."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimlet.analyse import diagnose as d
from mimlet.analyse.diagnose import Finding, Limits, Target, advice_text, diagnose, findings_json
from mimlet.analyse.results import Analysis, ModelFindings, Similarity
from mimlet.config import load_config
from mimlet.errors import ConfigError, DataError, RunError
from mimlet.run import Run, read_run

GRID = (4, 4)
LN_N = math.log(16)
UNIFORM = 2.0080  # mean distance of two patches of 4 x 4, see test_distance_of_uniform_attention


def model(label: str = "student", depth: int = 6, **measured: Any) -> ModelFindings:
    """A healthy encoder of `depth` blocks and 3 heads, unless `measured` says otherwise."""
    layers = depth + 1
    healthy: dict[str, Any] = {
        "distance": [[1.0, 1.3, 1.6]] * depth,
        "entropy": [[0.5 * LN_N, 0.7 * LN_N, 0.9 * LN_N]] * depth,
        "effective_rank": [40.0] * layers,
        "spread": [0.5] * layers,
        "similarity": [0.3] * layers,
    }
    return ModelFindings(label, f"runs/{label}", 32, 8, GRID, depth, 3, 96, 1000, **{**healthy, **measured})


def analysis(*models: ModelFindings, cka: list[list[float]] | None = None, images: int = 1024) -> Analysis:
    """Of the models, with one similarity: of the first two."""
    similarities = [Similarity(0, 1, cka)] if cka else []
    return Analysis(["photos"], images, 128, "random", 0, False, list(models), similarities, labels="200 photos")


def likeness(lower: float, upper: float, rows: int = 7, columns: int = 7) -> list[list[float]]:
    """CKA that is `lower` between the lower thirds, `upper` between the upper ones, and 0.99 elsewhere."""
    third, width = math.ceil((rows - 1) / 3), math.ceil((columns - 1) / 3)
    values = [[0.99] * columns for _ in range(rows)]
    for row in range(1, third + 1):
        values[row][1 : width + 1] = [lower] * width
    for row in range(rows - third, rows):
        values[row][-width:] = [upper] * width
    return values


def run(
    folder: Path,
    method: dict[str, Any] | None = None,
    losses: list[float] | None = None,
    schedule: dict[str, Any] | None = None,
    **watched: float,
) -> Run:
    """A finished run whose loss is flat, unless something else is given; `watched` values stand in every record."""
    losses = [1.0] * 40 if losses is None else losses
    method = method or {"name": "mae"}
    settings = {
        "method": method,
        "teacher": {} if method["name"] in ("mae", "classify") else {"path": "teacher"},
        "encoder": {"name": "vit_micro", "image_size": 32},
        "schedule": {"batch": 64, **(schedule or {"steps": 10 * max(1, len(losses))})},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(load_config(settings).model_dump(mode="json")))
    records = [
        {"step": 10 * number, "epoch": number / 10, "kind": "train", "time": 1.0, "total": loss, **watched}
        for number, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_run(folder)


def answer(findings: list[Finding], question: str) -> Finding:
    (found,) = (finding for finding in findings if finding.question == question)
    return found


def recipe(**given: Any) -> Finding:
    """What is advised in the end."""
    return diagnose(**given)[-1]


def test_limits_decide_on_either_side_and_not_between() -> None:
    low, high = Limits(0.1, 0.2, ""), Limits(0.9, 0.5, "")
    assert [low.judge(value) for value in (0.1, 0.15, 0.2)] == [True, None, False]
    assert [high.judge(value) for value in (0.9, 0.7, 0.5)] == [True, None, False]
    assert Limits(0.0, 0.0, "").judge(math.nan) is None
    assert Limits(1.6, 1.6, "").judge(1.6) is True


def test_every_finding_cites_numbers_picture_and_limits(tmp_path: Path) -> None:
    watched = {"head_entropy_qk": 0.1, "head_share_qk_01": 0.9, "head_share_qk_02": 0.1}
    trained = run(tmp_path / "run", {"name": "mimhd"}, **watched)
    judged = model(probe=[30.0] * 7, leading={0: 40.0, 4: 45.0, 6: 48.0})
    looked = analysis(judged, model("other"), cka=likeness(0.9, 0.9))
    findings = diagnose(looked, "student", "other", trained, Target(3068, 10))
    assert len(findings) == len({finding.question for finding in findings}) == 13
    for finding in findings:
        assert re.search(r"\d", finding.evidence) or finding.question == d.RECIPE, finding
        assert re.search(r"[Pp]age: |[Nn]o diagram", finding.evidence), finding
        assert re.search(r"Ours|ours|IJCV 2025|run's settings", finding.threshold), finding
        assert finding.verdict.endswith((".", "]"))
        assert finding.advice.endswith(".")
        assert finding.decided == ("[undecided]" not in advice_text([finding]))
    assert json.loads(findings_json(findings))[-1] == vars(findings[-1])


@pytest.mark.parametrize(
    ("upper", "verdict", "decided"),
    [(0.69, "Yes", True), (0.75, "The higher layers differ more", False), (0.86, "No: beside", True)],
)
def test_likeness_of_upper_layers_against_lower_ones(upper: float, verdict: str, decided: bool) -> None:
    found = answer(diagnose(analysis(model(), model("other"), cka=likeness(0.9, upper)), reference="other"), d.LIKENESS)
    assert (found.verdict.startswith(verdict), found.decided) == (True, decided)
    assert f"reach 0.90 with the best-matching layers of the lower third of other; layers 5 to 6 reach {upper:.2f}" in (
        found.evidence
    )
    assert f"{0.9 - upper:.2f} less (1,024 images)" in found.evidence
    assert "0.20 or more" in found.threshold


def test_likeness_says_how_others_do_beside_the_same_reference() -> None:
    looked = analysis(model(), model("other"), model("third"), model("fresh"), cka=likeness(0.9, 0.8))
    looked.similarities.append(Similarity(1, 2, likeness(0.9, 0.65)))
    looked.similarities.append(Similarity(1, 3, likeness(0.6, 0.3)))
    found = answer(diagnose(looked, "student", "other"), d.LIKENESS)
    assert "0.10 less" in found.evidence
    assert "Others lose beside it: third 0.25." in found.evidence
    assert "match layer 1.0 of 6 best" in found.evidence


def test_likeness_reads_the_matrix_in_either_order_and_of_unequal_depths() -> None:
    cka = likeness(0.9, 0.6, rows=4, columns=10)
    looked = analysis(model("small", 3), model("large", 9), cka=cka)
    of_small = answer(diagnose(looked, "small", "runs/large"), d.LIKENESS)
    of_large = answer(diagnose(looked, "large", "small"), d.LIKENESS)
    assert "Layer 1 of small reach 0.90" in of_small.evidence
    assert "layer 3 reach 0.60" in of_small.evidence
    assert "Layers 1 to 3 of large reach 0.90" in of_large.evidence
    assert "layers 7 to 9 reach 0.60" in of_large.evidence
    assert of_small.verdict.startswith("Yes")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cka": likeness(0.69, 0.1)}, "differ from the first layers on"),
        ({"cka": likeness(math.nan, 0.1)}, "differ from the first layers on"),
        ({"cka": likeness(0.9, 0.1), "images": 63}, "Too few images"),
        ({}, "similarity not measured"),
    ],
)
def test_likeness_that_does_not_decide(changes: dict[str, Any], words: str) -> None:
    found = answer(diagnose(analysis(model(), model("other"), **changes), reference="other"), d.LIKENESS)
    assert words in found.verdict
    assert not found.decided


def test_without_a_reference_one_is_asked_for() -> None:
    findings = diagnose(analysis(model()))
    found = answer(findings, d.LIKENESS)
    assert found.verdict == "Reference model needed."
    assert "mimlet analyse RUN REFERENCE --data IMAGES" in found.advice
    assert (findings[-1].verdict, findings[-1].decided) == ("Reference model needed.", False)


def test_a_classifier_may_differ_from_its_reference(tmp_path: Path) -> None:
    looked = analysis(model(), model("other"), cka=likeness(0.9, 0.5))
    tuned = run(tmp_path / "tuned", {"name": "classify"})
    findings = diagnose(looked, reference="other", run=tuned)
    assert not answer(findings, d.LIKENESS).decided
    assert "classifier" in findings[-1].verdict
    assert all(finding.question != d.LENGTH for finding in findings)


@pytest.mark.parametrize(
    ("heads", "verdict", "decided"),
    [
        ([0.986, 0.99, 1.0], "Yes: all heads of block 6 attend to everything alike.", True),
        ([0.96, 0.99, 1.0], "Their heads hardly tell patches apart.", False),
        ([0.94, 0.99, 1.0], "No: their heads tell patches apart.", True),
        ([0.0, 0.01, 0.04], "Yes: all heads of block 6 attend to a single patch.", True),
        ([0.0, 0.01, 0.08], "Their heads attend to very few patches.", False),
        ([0.0, 0.01, 0.2], "No: their heads tell patches apart.", True),
    ],
)
def test_attention_of_the_upper_third(heads: list[float], verdict: str, decided: bool) -> None:
    entropy = [[share * LN_N for share in heads]]
    healthy = [[0.5 * LN_N] * 3]
    found = answer(diagnose(analysis(model(entropy=healthy * 5 + entropy))), d.ATTENTION)
    assert (found.verdict, found.decided) == (verdict, decided)
    assert f"lowest: 0.50, {heads[0]:.2f}" in found.evidence
    assert f"uniform attention has {UNIFORM:.2f}" in found.evidence
    below = answer(diagnose(analysis(model(entropy=entropy * 4 + healthy * 2))), d.ATTENTION)
    assert below.verdict == "No: their heads tell patches apart."


def test_distance_of_uniform_attention() -> None:
    places = [(y, x) for y in range(4) for x in range(4)]
    mean = sum(math.dist(a, b) for a in places for b in places) / 256
    assert model().uniform_distance(1) == pytest.approx(mean)
    assert mean == pytest.approx(UNIFORM, abs=1e-3)


@pytest.mark.parametrize(
    ("entropy", "distance", "alike"), [(0.005, 0.005, True), (0.02, 0.005, False), (0, 0.02, False)]
)
def test_heads_that_do_the_same(entropy: float, distance: float, alike: bool) -> None:
    judged = model(
        entropy=[[0.8 * LN_N, (0.8 + entropy) * LN_N]] * 6,
        distance=[[1.0, 1.0 + distance * model().uniform_distance(6)]] * 6,
    )
    found = answer(diagnose(analysis(judged)), d.SAME_HEADS)
    assert found.verdict.startswith("Yes") == alike
    assert f"range of {entropy:.3f} of ln N, distance of {distance:.3f}" in found.evidence


@pytest.mark.parametrize(
    ("question", "measured", "verdict", "decided"),
    [
        (d.PROBE, {"probe": [30, 40, 45, 50, 46, 44, 40.0]}, "Yes, they look so: layer 3", True),
        (d.PROBE, {"probe": [30, 40, 41, 41, 41, 41, 40.0]}, "Layer 2 is ahead of the last", False),
        (d.PROBE, {"probe": [30, 40, 41, 41, 41, 41, 42.0]}, "No", True),
        (d.LEADING, {"leading": {0: 35.0, 4: 46.0, 6: 45.5}}, "Yes", True),
        (d.LEADING, {"leading": {0: 35.0, 4: 44.0, 6: 45.0}}, "They bring less than seeds", False),
        (d.LEADING, {"leading": {0: 35.0, 4: 40.0, 6: 45.0}}, "No", True),
        (d.DIMENSIONS, {"effective_rank": [10, 30, 40, 40, 30, 20, 19.0]}, "Yes", True),
        (d.DIMENSIONS, {"effective_rank": [10, 30, 40, 40, 30, 28, 25.0]}, "They use fewer", False),
        (d.DIMENSIONS, {"effective_rank": [10, 30, 40, 40, 30, 32, 35.0]}, "No", True),
        (d.COLLAPSE, {"effective_rank": [9.0] * 7}, "Yes: they fill few", True),
        (d.COLLAPSE, {"effective_rank": [15.0] * 7}, "Not clear", False),
        (d.COLLAPSE, {"spread": [0.05] * 7}, "Yes: all images look alike", True),
        (d.COLLAPSE, {"spread": [0.18] * 7}, "Not clear", False),
        (d.COLLAPSE, {"effective_rank": [20.0] * 7, "spread": [0.26] * 7}, "No.", True),
        (d.SMOOTH, {"similarity": [0.4] * 6 + [0.75]}, "Yes", True),
        (d.SMOOTH, {"similarity": [0.4] * 6 + [0.6]}, "Partly", False),
        (d.SMOOTH, {"similarity": [0.8] * 6 + [0.4]}, "No", True),
    ],
)
def test_layers_on_both_sides_of_their_limits(
    question: str, measured: dict[str, Any], verdict: str, decided: bool
) -> None:
    found = answer(diagnose(analysis(model(**measured))), question)
    assert (found.verdict.startswith(verdict), found.decided) == (True, decided), found


def test_rank_is_not_read_of_few_images_or_classifiers(tmp_path: Path) -> None:
    judged = model(effective_rank=[8.0] * 7)
    few = answer(diagnose(analysis(judged, images=191)), d.COLLAPSE)
    assert not few.decided
    assert "Analyse at least 192 images" in few.advice
    tuned = run(tmp_path / "tuned", {"name": "classify"})
    assert not answer(diagnose(analysis(judged), run=tuned), d.COLLAPSE).decided
    enough = answer(diagnose(analysis(replace(judged, effective_rank=[40.0] * 7), images=191)), d.COLLAPSE)
    assert enough.decided


@pytest.mark.parametrize(
    ("entropy", "share", "verdict", "decided"),
    [
        (0.3, 0.7, "Yes", True),
        (0.66, 0.43, "No", True),
        (0.4, 0.45, "Half: the weights have narrowed", False),
        (0.6, 0.6, "Half: one teacher head", False),
    ],
)
def test_matching_of_heads(tmp_path: Path, entropy: float, share: float, verdict: str, decided: bool) -> None:
    shares = {f"head_share_vv_0{head}": (1 - share) / 3 for head in (1, 2, 3)} | {"head_share_vv_04": share}
    trained = run(tmp_path / "run", {"name": "mimhd"}, head_entropy_vv=entropy * math.log(4), **shares)
    found = answer(diagnose(run=trained), f"{d.MATCHING} V-V")
    assert (found.verdict.startswith(verdict), found.decided) == (True, decided)
    assert f"teacher head 4 of 4 has {share:.0%}" in found.evidence
    assert f"of at most 1.39 nats ({entropy:.0%})" in found.evidence
    assert ("mend the matching" in recipe(run=trained).verdict) == verdict.startswith("Yes")


def test_matching_is_asked_of_labelled_terms_and_only_where_it_is_watched(tmp_path: Path) -> None:
    watched = {"last_head_entropy_qk": 0.01, "last_head_share_qk_01": 0.99, "last_head_share_qk_02": 0.01}
    trained = run(tmp_path / "run", {"name": "mimhd"}, **watched)
    assert answer(diagnose(run=trained), f"{d.MATCHING} last Q-K").verdict.startswith("Yes")
    plain = run(tmp_path / "plain")
    assert not [finding for finding in diagnose(run=plain) if finding.question.startswith(d.MATCHING)]


@pytest.mark.parametrize(
    ("images", "classes", "verdict", "decided", "near"),
    [
        (1_000, 10, "Probably", False, "Flowers (2,040 images): D-MAE +9.4, supervised +10.6"),
        (2_040, 102, "Yes", True, "Pets (3,680 images): D-MAE +12.6"),
        (50_000, 100, "Yes", True, "CIFAR-100 (50,000 images): D-MAE +6.1"),
        (50_001, 100, "Between", False, "iNat18 (437,513 images): D-MAE +1.7"),
        (437_513, 8_142, "No", True, "ImageNet-1K (1,281,167 images): D-MAE +0.3"),
        (9_000_000, 9_000, "No", True, "ImageNet-1K (1,281,167 images): D-MAE +0.3"),
    ],
)
def test_target_by_its_size(images: int, classes: int, verdict: str, decided: bool, near: str) -> None:
    found = answer(diagnose(target=Target(images, classes)), d.TARGET)
    assert (found.verdict.startswith(verdict), found.decided) == (True, decided)
    assert f"{images:,} labelled images of {classes:,} classes" in found.evidence
    assert near in found.evidence


def test_limits_of_the_target_are_those_of_the_papers_table() -> None:
    gains = {item.images: round(item.dmae - item.mae, 1) for item in d.PAPER_SETS}
    assert min(gains) == d.SMALLEST
    small = [gain for images, gain in gains.items() if images <= d.INSUFFICIENT]
    large = [gain for images, gain in gains.items() if images >= d.SUFFICIENT]
    assert (min(small), max(small)) == (6.1, 14.6)
    assert (min(large), max(large)) == (0.3, 1.7)
    assert len(small) + len(large) == len(d.PAPER_SETS)


@pytest.mark.parametrize(
    ("losses", "verdict", "decided"),
    [
        ([2.0] * 20 + [1.0] * 20, "Probably not", True),
        ([1.0] * 20 + [0.97] * 20, "The loss falls slowly", False),
        ([1.0] * 20 + [0.99] * 20, "Yes, as far", True),
        ([2.0] * 10 + [1.0] * 9, "Not known: 19 records", False),
    ],
)
def test_length(tmp_path: Path, losses: list[float], verdict: str, decided: bool) -> None:
    trained = run(tmp_path / "run", losses=losses)
    found = answer(diagnose(run=trained), d.LENGTH)
    assert (found.verdict.startswith(verdict), found.decided) == (True, decided)
    assert recipe(run=trained).verdict.startswith("First train longer") == verdict.startswith("Probably not")


@pytest.mark.parametrize(
    ("schedule", "verdict"),
    [
        ({"steps": 400}, "Yes."),
        ({"steps": 800}, "No, it stands at 50%."),
        ({"epochs": 4.004}, "Yes."),  # rounds to 400 steps
        ({"epochs": 8}, "No, it stands at 50%."),
    ],
)
def test_finished(tmp_path: Path, schedule: dict[str, Any], verdict: str) -> None:
    trained = run(tmp_path / "run", schedule=schedule)
    findings = diagnose(run=trained)
    assert answer(findings, d.FINISHED).verdict == verdict
    assert answer(findings, d.LENGTH).decided == (verdict == "Yes.")


DMAE = {"name": "dmae"}
D2MAE = {"name": "dmae", "decode_layer": 4}
LARGE, SMALL = Target(500_000, 1_000), Target(5_000, 10)


@pytest.mark.parametrize(
    ("method", "upper", "target", "verdict", "decided"),
    [
        (None, 0.6, None, "Distil attention (D-MAE).", True),
        (None, 0.6, LARGE, "Distil attention (D-MAE).", True),
        (None, 0.9, SMALL, "Distil attention and decouple the decoder (D²-MAE).", True),
        (None, 0.9, LARGE, "MAE is enough.", True),
        (None, 0.9, None, "MAE may be enough; the target decides.", False),
        (None, 0.8, LARGE, "This reference does not decide.", False),
        (DMAE, 0.6, None, "Decouple the decoder (D²-MAE).", True),
        (DMAE, 0.9, SMALL, "Decouple the decoder (D²-MAE).", True),
        (DMAE, 0.9, LARGE, "Stay with what you have.", True),
        (D2MAE, 0.9, SMALL, "Stay with what you have.", True),
        (D2MAE, 0.6, SMALL, "No recipe is known to go further.", False),
        ({"name": "tinymim"}, 0.6, None, "No recipe is known to go further.", False),
    ],
)
def test_recipe(
    tmp_path: Path, method: dict[str, Any] | None, upper: float, target: Target | None, verdict: str, decided: bool
) -> None:
    looked = analysis(model(), model("other"), cka=likeness(0.9, upper))
    found = recipe(analysis=looked, reference="other", run=run(tmp_path / "run", method), target=target)
    assert (found.verdict, found.decided) == (verdict, decided)
    assert "0.2 and 1.1 below it with 1,000 labels" in found.threshold


def test_random_weights_are_to_be_checked_first() -> None:
    untrained = model(entropy=[[0.99 * LN_N] * 3] * 6, similarity=[0.75] * 7)
    assert recipe(analysis=analysis(untrained)).verdict == "First check the weights. Then: Distil attention (D-MAE)."


def test_what_was_not_measured_is_said() -> None:
    blind = model(
        entropy=None, distance=None, effective_rank=[], spread=[], similarity=[], notes=["its blocks hide attention"]
    )
    findings = diagnose(analysis(blind))
    attention = answer(findings, d.ATTENTION)
    assert attention.verdict == "Not known: attention not measured."
    assert "its blocks hide attention" in attention.evidence
    assert answer(findings, d.COLLAPSE).verdict == "Not known: features not measured."
    assert not any(finding.decided for finding in findings)


def test_nothing_to_diagnose_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to diagnose: give an analysis"):
        diagnose()
    empty = run(tmp_path / "empty", losses=[])
    with pytest.raises(RunError, match="has no metrics yet"):
        diagnose(run=empty)
    found = answer(diagnose(analysis(model()), run=empty), d.FINISHED)
    assert (found.verdict, found.decided) == ("Not known: the run has no metrics yet.", False)


def test_unknown_models_and_impossible_targets() -> None:
    looked = analysis(model(), model("other"))
    with pytest.raises(ConfigError, match="no model 'mae' in the analysis; it has: student, other"):
        diagnose(looked, "mae")
    with pytest.raises(ConfigError, match="'other' is both judged and the reference"):
        diagnose(looked, "other", "other")
    with pytest.raises(DataError, match="5 labelled images of 10 classes"):
        Target(5, 10)


def test_text_keeps_to_its_width_and_puts_the_verdict_under_the_question() -> None:
    text = advice_text(diagnose(analysis(model()), target=SMALL), width=80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == d.LIKENESS
    assert lines[1] == "  Reference model needed. [undecided]"
    assert text.count("    measured: ") == text.count("    limits:   ") == text.count("    advice:   ") == 8


def test_needs_no_torch() -> None:
    code = "import sys, mimlet.analyse.diagnose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_attention_of_the_blocks_that_have_any() -> None:
    """Of six blocks, 4 and 5 attend, on grids of their own: the upper third is block 5, of 8 x 8 tokens."""
    whole = math.log(64)
    gaps: dict[str, Any] = {
        "entropy": [[], [], [], [0.5 * whole] * 2, [0.994 * whole, 0.984 * whole], []],
        "distance": [[], [], [], [1.0, 2.0], [2.0, 2.1], []],
        "token_grids": [(32, 32), (16, 16), (8, 8), (8, 8), (8, 8), (4, 4)],
    }
    judged = model(**gaps)
    attention = answer(diagnose(analysis(judged)), d.ATTENTION)
    assert attention.verdict == "Yes: all heads of block 5 attend to everything alike."
    assert attention.evidence.startswith("Entropy over the heads of block 5: 0.98 to 0.99 of ln N")
    assert f"uniform attention has {judged.uniform_distance(5):.2f}. Page" in attention.evidence
    alike = answer(diagnose(analysis(judged)), d.SAME_HEADS)
    assert "Over the 2 heads of block 5, entropy has a range of 0.010 of ln N" in alike.evidence
    assert f"distance of {0.1 / judged.uniform_distance(5):.3f} of" in alike.evidence
    none = answer(diagnose(analysis(model(**gaps | {"entropy": [[1.0]] * 4 + [[]] * 2}))), d.ATTENTION)
    assert none.verdict == "Not known: attention not measured."
