"""The page: self-contained, accessible, complete, and quiet in a browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimlet.errors import RunError
from mimlet.report import Picture, image_grid, write_report
from mimlet.report.collect import duration
from tests.report.made import make_run, match_heads

VOID = {"meta", "link", "img", "path", "rect", "circle", "polyline", "br"}


def report(runs: list[Path]) -> Path:
    """A page with nothing but the runs."""
    return write_report(runs, runs[0] / "report.html", title="Report")


class Page(HTMLParser):
    """What a page consists of; refuses tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.source: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            self.source[self._open[-1]] = data
        elif data.strip():
            self.text.append(" ".join(data.split()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def row(page: Page, name: str, cells: int) -> list[str]:
    """The cells beside a row's name in the tables of the page."""
    at = page.text.index(name)
    return page.text[at + 1 : at + 1 + cells]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A page with everything on it: two runs, a table, a picture."""
    runs = [make_run(tmp_path / "runs/mae", evals=3), make_run(tmp_path / "runs/d2mae", "dmae", evals=3)]
    (runs[1] / "unreadable.txt").write_text("a.jpg\ttruncated\nb.jpg\tempty\n")
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, runs[1] / "encoder.safetensors")
    images = torch.zeros(2, 3, 32, 32)
    png = image_grid({"original": images, "visible": images}, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return write_report(
        runs,
        tmp_path / "page.html",
        title="Tiny & <b>quick</b>",
        table=[
            {"method": "scratch", "top-1 (%)": 61.5, "loss": 0.75, "seconds": 12.0},
            {"method": "D²-MAE", "top-1 (%)": 77.25, "loss": 0.5, "seconds": 14.0},
            {"method": "not run"},
        ],
        pictures=[Picture("Reconstructions", png, "Two grey images", "All is hidden.")],
        notes=["A note with <i>signs</i>."],
        snippet='model = mimlet.load("runs/d2mae")',
    )


def test_nothing_is_loaded_and_everything_has_words(full: Path) -> None:
    text = full.read_text()
    page = Page(text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}> is an inline handler"
            assert name != "style", f"<{tag}> has a style that the policy blocks"
            if name in ("src", "href", "srcset"):
                assert value is not None
                assert value.startswith("data:")
    assert all(image["alt"] == "Two grey images" for image in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in page.all("svg"))
    charts = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("class") == "chart"]
    assert [chart.split(" by step")[0] for chart in charts] == [
        "reconstruction",
        "attention",
        "total",
        "learning rate",
        "top1",
        "top5",
        "images per second",
        "time spent waiting for data",
    ]
    assert charts[0] == "reconstruction by step: mae ends at 0.5215; d2mae ends at 0.5215."
    assert charts[2].startswith("total by step: d2mae ends")


def test_the_policy_admits_the_page_s_own_script_and_style_only(full: Path) -> None:
    page = Page(full.read_text())
    (policy,) = [
        meta["content"] or "" for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.source[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert len(page.all("script")) == len(page.all("style")) == 1


def test_text_of_users_stays_text(full: Path) -> None:
    page = Page(full.read_text())
    assert "Tiny & <b>quick</b>" in page.text
    assert "A note with <i>signs</i>." in page.text
    assert not page.all("i")


def test_the_numbers_are_there(full: Path) -> None:
    page = Page(full.read_text())
    assert "2 runs, 600 steps in 1 min 30 s" in page.text
    assert row(page, "scratch", 3) == ["61.5", "0.75", "12"]
    assert row(page, "not run", 3) == ["–", "–", "–"]
    assert row(page, "method", 3) == ["top-1 (%)", "loss", "seconds"]
    assert row(page, "recipe", 2) == ["Recipe of mae", "Recipe of d2mae"]
    assert row(page, "encoder", 1) == ["vit_micro: 6 blocks, width 96, 6 heads, 32 px in patches of 4"]
    assert row(page, "parameters", 2) == ["–", "22"]
    assert row(page, "images seen", 2) == ["19,200", "19,200"]
    assert row(page, "time", 2) == ["45 s", "45 s"]
    assert row(page, "reconstruction, last", 2) == ["0.5215", "0.5215"]
    assert row(page, "attention, last", 2) == ["–", "0.02231"]
    assert row(page, "top1, last evaluation", 2) == ["63", "63"]
    assert row(page, "waiting for data", 2) == ["12.5%", "12.5%"]
    assert row(page, "peak memory", 2) == ["345 MB", "345 MB"]
    assert row(page, "unreadable files", 2) == ["0", "2"]
    assert row(page, "method.name", 2) == ["mae", "dmae"]
    assert row(page, "teacher.path", 2) == ["–", "teacher"]
    assert row(page, "packages.torch", 1) == ["2.11.0"]
    assert page.text.count("mimlet pretrain --data 'my photos'") == 2
    assert 'model = mimlet.load("runs/d2mae")' in page.text


def test_the_best_value_stands_out_where_better_is_known(full: Path) -> None:
    text = full.read_text()
    best = re.findall(r'<td class="number best">([\d.]+)', text)
    assert best == ["77.25", "0.5"]
    widths = re.findall(r'class="front" width="([\d.]+)"', text)
    assert widths == ["79.6", "100.0", "100.0", "66.7"]


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "fresh", lines=0)
    page = Page(report([run]).read_text())
    assert "fresh: no metrics yet." in page.text
    assert "no steps yet" in page.text
    assert not page.all("polyline")


def test_one_run_shows_its_numbers_large_and_how_to_repeat_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lone", evals=2, command=False)
    page = Page(report([run]).read_text())
    assert row(page, "recipe", 1) == ["Recipe of lone"]
    assert row(page, "top1", 1) == ["63"]
    assert row(page, "images per second", 1) == ["1,230"]
    assert f"mimlet pretrain --recipe {run / 'config.json'} --out NEW_FOLDER" in page.text
    assert "Settings that differ" not in page.text


def test_values_that_are_not_finite_are_named_and_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "spoilt", spoil=4)
    text = report([run]).read_text()
    assert "spoilt: 4 of 30 records have a loss that is not finite (not drawn)." in text
    assert "nan" not in " ".join(line["points"] or "" for line in Page(text).all("polyline"))
    assert not re.search(r">\s*nan\s*<", text, re.IGNORECASE)


def test_a_run_of_which_every_loss_is_broken(tmp_path: Path) -> None:
    page = Page(report([make_run(tmp_path / "dead", spoil=30)]).read_text())
    assert "reconstruction" not in " ".join(svg.get("aria-label") or "" for svg in page.all("svg"))
    assert "dead: 30 of 30 records have a loss that is not finite (not drawn)." in page.text


def test_many_and_long_runs_stay_small(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"group{index % 2}/run{index}", lines=1500) for index in range(8)]
    out = report(runs)
    assert out.stat().st_size < 500_000
    page = Page(out.read_text())
    assert "group1/run7" in page.text
    lines = [len((line["points"] or "").split()) for line in page.all("polyline")]
    assert len(lines) == 8 * 4
    assert max(lines) <= 500


def test_notes_of_the_training_are_repeated(tmp_path: Path) -> None:
    run = make_run(tmp_path / "noted")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 300, "epoch": 3, "kind": "note", "time": 45, "text": "slow disk"}) + "\n")
    assert "noted, step 300: slow disk" in Page(report([run]).read_text()).text


def test_head_matching_is_drawn_and_nothing_else(tmp_path: Path) -> None:
    plain, matched = make_run(tmp_path / "plain"), match_heads(make_run(tmp_path / "matched"))
    page, without = Page(report([matched]).read_text()), Page(report([plain]).read_text())
    words = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("class") == "chart"]
    assert words[2:4] == [
        "V-V: share of each teacher head by step: at the end head 1: 100%, head 2: 0.0%, head 3: 0.0%, head 4: 0.0%.",
        "V-V: entropy of the weights, in nats by step: matched ends at 0; all 4 heads alike is 1.386.",
    ]
    lines = [line for line in page.all("polyline") if "head" in (line["data-label"] or "")]
    assert [line["data-label"] for line in lines] == ["head 1", "head 2", "head 3", "head 4"]
    assert "Head matching" in page.text
    assert "Head matching" not in without.text
    shown = [text for text in page.text if "head share" in text or "head entropy" in text]
    assert not shown
    assert len(page.all("tr")) == len(without.all("tr"))


def test_heads_of_several_runs_and_relations(tmp_path: Path) -> None:
    runs = [match_heads(make_run(tmp_path / "a")), match_heads(make_run(tmp_path / "b"), heads=8)]
    match_heads(runs[1], "late_", 16)
    words = [
        svg["aria-label"] or "" for svg in Page(report(runs).read_text()).all("svg") if svg.get("class") == "chart"
    ]
    found = [text.split(" by step")[0] for text in words if "head" in text]
    entropy = "entropy of the weights, in nats"
    assert found == [
        "V-V: share of each teacher head, a",
        "V-V: share of each teacher head, b",
        f"V-V: {entropy}",
        "late V-V: share of each teacher head, b",
        f"late V-V: {entropy}",
    ]
    (both,) = (text for text in words if text.startswith(f"V-V: {entropy}"))
    assert both.endswith("a ends at 0; b ends at 0; all 4 heads alike is 1.386; all 8 heads alike is 2.079.")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        report([tmp_path])


def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (8.44, 59.6, 200, 18_720)] == [
        "8.44 s",
        "59.6 s",
        "3 min 20 s",
        "5 h 12 min",
    ]
