"""Analyses and robustness on a page: what is measured is what is drawn."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import pytest

from mimlet.analyse.results import Shot
from mimlet.errors import RunError
from mimlet.report import write_analysis, write_report
from mimlet.report.insight import Held, robustness_facts
from mimlet.tasks.robustness import Clean, Robustness, ShiftedScores
from tests.report.made import found_in, full_run, grey_png, judge_robustness, look_into, looked_into, make_run
from tests.report.test_collect import Page, report, row


def words(page: Path) -> list[str]:
    """The text alternatives of a page's figures."""
    return [svg["aria-label"] or "" for svg in Page(page.read_text()).all("svg") if svg.get("class") == "chart"]


@dataclass(frozen=True)
class Finding:
    question: str = "Are the higher layers undertrained?"
    verdict: str = "They are."
    evidence: str = "Mean CKA 0.2."
    threshold: str = "0.5 (Fig. 3)"
    advice: str = "Distil attention."
    decided: bool = True


def test_an_analysis_of_two_models(tmp_path: Path) -> None:
    models = [found_in("deep", depth=3, probe=[10.0, 20.0, 30.0, 25.0]), found_in("flat", depth=2, notes=["half seen"])]
    analysis = replace(looked_into(*models, labels="9 images"), pictures=[Shot("a.png", "Maps", "Two maps", "Look.")])
    (tmp_path / "a.png").write_bytes(grey_png())
    findings = [Finding(), Finding(verdict="Unclear.", decided=False)]
    out = write_analysis(
        analysis,
        tmp_path,
        tmp_path / "report.html",
        title="Inside <deep>",
        command="mimlet analyse deep flat",
        notes=["A note."],
        findings=findings,
    )
    assert words(out) == [
        "CKA within deep: 4 by 4 values; lowest 0.7 at deep, layer 0 · deep, layer 3; "
        "highest 1 at deep, layer 0 · deep, layer 0.",
        "CKA deep and flat: 4 by 3 values; lowest 0.7 at deep, layer 3 · flat, layer 0; "
        "highest 1 at deep, layer 0 · flat, layer 0.",
        "CKA within flat: 3 by 3 values; lowest 0.8 at flat, layer 0 · flat, layer 2; "
        "highest 1 at flat, layer 0 · flat, layer 0.",
        "attention distance, in patches, over heads by block: deep has the median 1.5 in block 1, 3.5 in block 3; "
        "flat has the median 1.5 in block 1, 2.5 in block 2; uniform attention is 2.008.",
        "attention entropy, in nats, over heads by block: deep has the median 1.25 in block 1, 1.25 in block 3; "
        "flat has the median 1.25 in block 1, 1.25 in block 2; uniform attention is 2.773.",
        "effective rank by layer: deep ends at 7; flat ends at 6.",
        "spread of features over images by layer: deep ends at 0.5; flat ends at 0.5.",
        "token similarity by layer: deep ends at 0.3; flat ends at 0.2.",
        "top-1 of a probe by layer: deep ends at 25%.",
    ]
    page = Page(out.read_text())
    assert "64 images, chosen with seed 0, of 64 images in photos" in page.text
    assert row(page, "input", 2) == ["32 px in patches of 8 (4 x 4)"] * 2
    assert row(page, "parameters", 2) == ["1,234", "1,234"]
    for text in ("Inside <deep>", "flat: half seen", "A note.", "mimlet analyse deep flat", "Learnt from 9 images."):
        assert text in page.text
    assert [image["alt"] for image in page.all("img")] == ["Two maps"]
    at = page.text.index("Diagnosis")
    assert page.text[at + 1 : at + 6] == [
        "They are.",
        "Are the higher layers undertrained?",
        "Mean CKA 0.2.",
        "0.5 (Fig. 3)",
        "→ Distil attention.",
    ]
    assert page.text[at + 6 : at + 8] == ["Unclear.", "(not decided by the evidence)"]


def test_distances_on_different_grids_are_in_pixels(tmp_path: Path) -> None:
    """Two patches of a square of 2 are (0 + 1 + 1 + sqrt 2) / 4 apart on average."""
    square = [(y, x) for y in range(4) for x in range(4)]
    apart = mean(math.dist(a, b) for a in square for b in square)
    analysis = looked_into(found_in("fine"), found_in("coarse", grid=2, patch=16))
    out = write_analysis(analysis, tmp_path, tmp_path / "report.html", title="t")
    (distance,) = (text for text in words(out) if "distance" in text)
    assert distance == (
        "attention distance, in pixels (grids differ), over heads by block: fine has the median 12 in block 1, 28 in "
        "block 3; coarse has the median 24 in block 1, 56 in block 3; "
        f"uniform, 4 x 4 tokens is {8 * apart:.4g}; "
        f"uniform, 2 x 2 tokens is {16 * (2 + math.sqrt(2)) / 4:.4g}."
    )
    (entropy,) = (text for text in words(out) if "entropy" in text)
    assert entropy.endswith("uniform, 4 x 4 tokens is 2.773; uniform, 2 x 2 tokens is 1.386.")


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    plain = found_in("conv", distance=None, entropy=None, effective_rank=[], spread=[math.nan] * 4, similarity=[])
    analysis = replace(looked_into(plain), similarities=[], pictures=[Shot("gone.png", "Gone", "Gone", "")])
    out = write_analysis(analysis, tmp_path, tmp_path / "report.html", title="t")
    assert words(out) == []
    page = Page(out.read_text())
    assert f"The picture {tmp_path / 'gone.png'} is missing." in page.text
    for title in ("Attention", "Repeat", "Diagnosis", "Features by layer"):
        assert title not in page.text


def test_a_run_shows_what_was_found_in_it(tmp_path: Path) -> None:
    run = full_run(tmp_path / "lone")
    out = report([run])
    found = words(out)
    assert found[-2:] == [
        "images per second by step: lone ends at 1,234.",
        "time spent waiting for data by step: lone ends at 12.5%.",
    ]
    assert "top-1 fine-tuned with leading blocks kept by blocks: lone ends at 57%." in found
    assert "gain over no block kept, in points by blocks: lone ends at 17." in found
    assert (
        "top-1 by set of images. clean: lone 72.25%; sketches: lone 30% (clean 70%); elsewhere: lone 50.5%; "
        "common corruptions: lone 47.5% (clean 72.25%)." in found
    )
    (corruptions,) = (text for text in found if "severity:" in text)
    assert corruptions == (
        "top-1 by corruption and severity: 2 by 5 values; lowest 20% at gaussian noise · severity 5; "
        "highest 65% at fog · severity 1."
    )
    page = Page(out.read_text())
    assert row(page, "top-1 under corruptions, mean", 1) == ["47.5%"]
    assert "mean corruption error (mCE)" not in page.text
    assert "Maps of two heads" in [image["alt"] for image in page.all("img")]
    assert "Looked into: 64 images, chosen with seed 0, of 64 images in photos." in page.text


def test_analyses_on_the_same_images_are_joined(tmp_path: Path) -> None:
    """Each model once, runs before what both are held against, in the styles of the runs."""
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        look_into(run, found_in("teacher", depth=5))
    out = report(runs)
    found = [text.partition(":")[0] for text in words(out) if "CKA" in text]
    assert found == [
        "CKA within a",
        "CKA a and teacher",
        "CKA within teacher",
        "CKA within b",
        "CKA b and teacher",
    ]
    (distance,) = (text for text in words(out) if "distance" in text)
    assert [part.split(" has ")[0].split(": ")[-1] for part in distance.split("; ")[:3]] == ["a", "b", "teacher"]
    page = Page(out.read_text())
    styles = {
        (line["data-label"], line["class"]) for line in page.all("polyline") if "through" in (line["class"] or "")
    }
    assert styles == {("a", "through s0"), ("b", "through s1"), ("teacher", "through s2")}
    assert row(page, "source", 3) == [str(runs[0]), str(runs[1]), "teacher"]


def test_a_pair_found_the_other_way_round_is_turned(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    look_into(runs[0])
    shared = found_in("a", source=str(runs[0]))
    other = found_in("b", depth=2, source=str(runs[1]))
    turned = replace(looked_into(other, shared, labels="8 images; judged on 4 images"), pictures=[])
    turned.similarities[1].cka[0][3] = -0.5
    turned.write(runs[1] / "analysis")
    (both,) = (text for text in words(report(runs)) if text.startswith("CKA") and " and " in text)
    assert both.startswith("CKA a and b: 4 by 3 values; lowest -0.5 at a, layer 3 · b, layer 0;")


def test_analyses_on_other_images_stay_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    look_into(runs[0])
    looked_into(found_in("b"), images=32).write(runs[1] / "analysis")
    page = Page(report(runs).read_text())
    for title in ("Attention, a", "Attention, b", "Models looked into, a", "Models looked into, b"):
        assert title in page.text


def test_robustness_of_two_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        judge_robustness(run)
    found = [text.partition(":")[0].partition(". ")[0] for text in words(report(runs))]
    assert [text for text in found if text.startswith("top-1")] == [
        "top-1 by set of images",
        "top-1 by corruption and severity, a",
        "top-1 by corruption and severity, b",
    ]


def test_sets_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    sets = [{"name": "x", "images": 9, "classes": 2, "top1": 50.0, "top5": 50.0, "clean_top1": None}]
    nothing = {"clean": None, "corruptions": {}, "mean_top1": None, "mce": None}
    (run / "robustness.json").write_text(json.dumps({"sets": sets, **nothing}))
    page = report([run])
    assert "top-1 by set of images. x: a 50%." in words(page)
    assert "Strokes across bars" not in page.read_text()


def test_what_an_evaluation_leaves_is_read(tmp_path: Path) -> None:
    sets = [ShiftedScores("x", 9, 2, 50.0, 80.0, 75.0)]
    Robustness(Clean(100, 80.0), sets, {"fog": [5.0, 4.0, 3.0, 2.0, 1.0]}, 3.0, 120.0).write(tmp_path)
    found = Held.read(tmp_path)
    assert found is not None
    assert found.sets == {"clean": 80.0, "x": 50.0, "common corruptions": 3.0}
    assert found.clean == {"x": 75.0, "common corruptions": 80.0}
    assert robustness_facts(found) == {
        "top-1 under corruptions, mean": "3%",
        "mean corruption error (mCE)": "120%",
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"clean": null, "sets": [{"name": "x"}]}'])
def test_damaged_robustness_is_refused(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "robustness.json").write_text(text)
    with pytest.raises(RunError, match=r"robustness\.json is damaged .*; repeat the evaluation"):
        report([run])


def test_a_damaged_analysis_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    look_into(run)
    (run / "analysis" / "analysis.json").write_text("{")
    with pytest.raises(RunError, match="repeat the analysis"):
        report([run])


def test_a_diagnosis_stands_on_a_page_of_runs_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    out = write_report([run], run / "report.html", title="t", findings=[Finding()])
    assert "They are." in Page(out.read_text()).text


def test_blocks_without_attention_are_left_out(tmp_path: Path) -> None:
    """Not drawn as 0: blocks 2 and 3 attend, on grids of 8 and of 4."""
    measured = {"distance": [[], [1.0, 2.0], [2.0, 3.0]], "entropy": [[], [1.0, 1.5], [1.0, 1.5]]}
    model = found_in("hiera", token_grids=[(16, 16), (8, 8), (4, 4)], **measured)
    out = write_analysis(looked_into(model), tmp_path, tmp_path / "report.html", title="t")
    (distance,) = (text for text in words(out) if "distance" in text)
    assert distance.startswith(
        "attention distance, in pixels (grids differ), over heads by block: hiera has the median 12 in block 2, 20 in "
        "block 3; uniform, 8 x 8 tokens is "
    )
    (entropy,) = (text for text in words(out) if "entropy" in text)
    assert entropy.endswith("uniform, 8 x 8 tokens is 4.159; uniform, 4 x 4 tokens is 2.773.")
