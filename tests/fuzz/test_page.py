"""Names and texts from files on the report page: shown as they are, and nothing but text."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimlet.analyse.diagnose import Finding, findings_json
from mimlet.analyse.results import Shot
from mimlet.api import run_page
from mimlet.report import Picture, write_report
from tests.fuzz.fuzz import Refused, attempt, fuzzed
from tests.report.made import found_in, full_run, grey_png, looked_into, make_run

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt;",
    "]]><svg/onload=alert(1)>",
    "\u202egnp.exe",
    "a\x00b\x1b[31m",
)
TAGS = {
    *("html", "head", "meta", "title", "link", "style", "body", "main", "script", "footer", "section", "details"),
    *("h1", "h2", "p", "div", "span", "pre", "summary", "ul", "li", "dl", "dt", "dd", "figure", "figcaption", "img"),
    *("table", "thead", "tbody", "tr", "th", "td", "svg", "rect", "path", "polyline", "circle", "line", "text", "g"),
}


class Reader(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert {tag for tag, _ in reader.tags} <= TAGS
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    (policy,) = [a["content"] or "" for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    return reader


def spoil(run: Path, text: str) -> None:
    """Puts a text wherever a run's files have names or words."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"title": text}))
    (run / "environment.json").write_text(json.dumps({"command": [text], text: text, "packages": {text: [text]}}))
    lines = [
        json.loads(line) | {text: float(i)} for i, line in enumerate((run / "metrics.jsonl").read_text().splitlines())
    ]
    lines.append(lines[-1] | {"kind": "note", "text": text})
    lines.append(lines[-1] | {"kind": "eval", text: 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json.loads((run / "robustness.json").read_text())
    found["sets"][0]["name"] = text
    found["corruptions"][text] = found["corruptions"].pop("fog")
    (run / "robustness.json").write_text(json.dumps(found))
    model = found_in(text, source=text, notes=[text])
    shot = Shot("attention.png", text, text, text)
    looked_into(model, found_in(f"{text} b"), pictures=[shot], labels=text).write(run / "analysis")
    finding = Finding(text, text, text, text, text, False)
    (run / "analysis" / "diagnosis.json").write_text(findings_json([finding]))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_run_of_somebody_else(text: str, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    run_page([run], run / "report.html")  # matplotlib makes a folder of its own the first time
    spoil(run, text)
    page = attempt(lambda: run_page([run], run / "report.html"), allowed=run)
    if "\0" in text:
        assert isinstance(page, Refused)
        return
    assert not isinstance(page, Refused), page
    reader = check(page)
    if text.isprintable():
        assert any(text in part for part in reader.text)


@pytest.mark.parametrize("text", [text for text in HOSTILE if "/" not in text and "\0" not in text])
def test_folders_with_such_names(text: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{text}{i}") for i in range(2)]
    check(run_page(runs, tmp_path / "report.html"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    make_run(folder / "run", lines=2)
    return folder


@fuzzed(10)
@given(st.text(max_size=20), st.text(min_size=1, max_size=20), st.floats(), st.floats())
def test_tables_and_pictures(folder: Path, text: str, other: str, a: float, b: float) -> None:
    """What results of ours bring along, such as names of classes."""
    run = folder / "run"
    rows = [{text: other, "top-1": a, f"{other} loss": b}, {text: "y", "top-1": b, f"{other} loss": 3.0}]
    picture = Picture(text, grey_png(), other, text)
    page = write_report([run], folder / "x.html", title=other, table=rows, pictures=[picture], notes=[text, other])
    check(page)
