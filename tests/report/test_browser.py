"""Pages in a browser: quiet, whole, silent towards the net, fit for a phone, and answering pointer, touch and keys."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mimlet.report import Picture, write_analysis, write_report
from tests.report.browser import Browser
from tests.report.made import found_in, full_run, grey_png, look_into, looked_into, make_run
from tests.report.test_collect import Page

FIGURES = "[...document.querySelectorAll('svg.chart')]"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with everything, two runs with a table, an analysis of two models."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [full_run(folder / "mae", "mae", found_in("teacher", depth=5)), make_run(folder / "d2mae", "dmae", evals=3)]
    look_into(runs[1], found_in("teacher", depth=5))
    analysis = looked_into(found_in("fine", depth=12), found_in("a name that is long", grid=2, patch=16))
    table = [{"method": name, "top-1 (%)": value} for name, value in (("scratch", 61.5), ("D²-MAE", 77.25))]
    picture = Picture("Reconstructions", grey_png(), "Two grey images", "All is hidden.")
    return {
        "run": write_report(runs[:1], folder / "run.html", title="One run", pictures=[picture]),
        "runs": write_report(runs, folder / "runs.html", title="Two runs", table=table, notes=["Noted."]),
        "analysis": write_analysis(analysis, folder, folder / "analysis.html", title="Two models", command="mimlet"),
    }


def place_of(browser: Browser, figure: str, part: str = "", x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """Scrolls to the figure whose words begin so, and gives a place in it or in a part of it, in shares of its size."""
    left, top, width, height = browser.run(
        f"""(() => {{
          const figure = {FIGURES}.find(chart => chart.ariaLabel.startsWith("{figure}"));
          figure.scrollIntoView({{block: "center"}});
          const box = ({f"figure.querySelector(`{part}`)" if part else "figure"}).getBoundingClientRect();
          return [box.x, box.y, box.width, box.height];
        }})()"""
    )
    return left + x * width, top + y * height


def tips(browser: Browser) -> list[list[str]]:
    """The words of what hovering shows."""
    found: list[str] = browser.run(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() =>"
        "done([...document.querySelectorAll('.tip')].map(tip => tip.innerText)))))"
    )
    return [[line.replace("\u00a0", " ") for line in tip.splitlines() if line] for tip in found]


@pytest.mark.parametrize("name", ["run", "runs", "analysis"])
@pytest.mark.parametrize("size", [{}, PHONE, {"width": 720, "media": "print"}, {"scheme": "dark"}], ids=str)
def test_pages_are_whole_and_quiet(
    name: str, size: dict[str, object], browser: Browser, pages: dict[str, Path]
) -> None:
    """No complaint, no request, nothing wider than the window, and every figure has been drawn with its size."""
    page = pages[name]
    browser.open(page, **size)  # type: ignore[arg-type]
    assert browser.complaints == []
    assert {address.partition(":")[0] for address in browser.requests} <= {"file", "data"}
    assert [address for address in browser.requests if address.startswith("file:")] == [page.as_uri()]
    expected = [svg["aria-label"] for svg in Page(page.read_text()).all("svg") if svg.get("class") == "chart"]
    assert len(expected) >= 8
    shown = browser.run(f"{FIGURES}.map(c => [c.ariaLabel, c.getBoundingClientRect().height, c.getBBox().width])")
    assert [words for words, _, _ in shown] == expected
    assert all(height > 60 and width > 200 for _, height, width in shown)
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(18, 22, 27)" if "scheme" in size else "rgb(255, 255, 255)")


def test_a_page_that_asks_the_net_would_be_noticed(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """The page's policy blocks what is smuggled in; without the policy, the request is seen."""
    address = "http://127.0.0.1:9/pixel.png"
    text = pages["run"].read_text().replace("</main>", f'<img alt="" src="{address}"></main>')
    smuggled = tmp_path / "smuggled.html"
    smuggled.write_text(text)
    browser.open(smuggled)
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
    smuggled.write_text(text.replace('http-equiv="Content-Security-Policy"', 'name="none"'))
    browser.open(smuggled)
    assert address in browser.requests
    assert any("ERR_" in complaint for complaint in browser.complaints)


def test_an_error_of_the_script_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<script>console.warn('careful'); missing()</script>")
    browser.open(broken)
    assert any("careful" in complaint for complaint in browser.complaints)
    assert any("missing is not defined" in complaint for complaint in browser.complaints)


def test_hovering_over_lines(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["runs"])
    browser.hover(*place_of(browser, "reconstruction by step", x=0.95))
    assert tips(browser) == [["step 300", "mae", "0.5215", "d2mae", "0.5215"]]
    browser.hover(*place_of(browser, "learning rate by step", x=0.1))
    assert tips(browser) == [["step 10", "mae", "0.001", "d2mae", "0.001"]]
    browser.hover(2, 2)
    assert tips(browser) == []
    assert browser.run("document.querySelectorAll('.guide').length") == 0
    assert browser.complaints == []


def test_hovering_over_boxes_heat_maps_and_bars(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    browser.hover(*place_of(browser, "attention distance", x=0.88))
    assert tips(browser) == [["block 5", "teacher", "5.5 (5 to 6)"]]
    browser.hover(*place_of(browser, "attention distance", x=0.12))
    assert tips(browser) == [["block 1", "mae", "1.5 (1 to 2)", "teacher", "1.5 (1 to 2)"]]
    browser.hover(*place_of(browser, "CKA mae and teacher", '[data-tip^="mae, layer 2 · teacher, layer 4"]'))
    assert tips(browser) == [["mae, layer 2 · teacher, layer 4: 0.8"]]
    browser.hover(*place_of(browser, "top-1 by set of images", '[data-tip="sketches"]'))
    assert tips(browser) == [["sketches", "mae", "30% (clean 70%)"]]
    browser.hover(*place_of(browser, "top-1 by corruption", '[data-tip^="gaussian noise · severity 1"]'))
    assert tips(browser) == [["gaussian noise · severity 1: 60%"]]


def test_keys(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["runs"])
    browser.run(f"{FIGURES}[0].focus()")
    for key, step in (("ArrowLeft", 300), ("ArrowLeft", 290), ("ArrowLeft", 280), ("ArrowRight", 290)):
        browser.press(key)
        assert tips(browser)[0][0] == f"step {step}"
    browser.run(f"{FIGURES}.find(chart => chart.ariaLabel.startsWith('CKA mae and teacher')).focus()")
    for key, place in (
        ("ArrowUp", "mae, layer 3 · teacher, layer 5: 0.8"),
        ("ArrowUp", "mae, layer 3 · teacher, layer 5: 0.8"),
        ("ArrowLeft", "mae, layer 3 · teacher, layer 4: 0.9"),
        ("ArrowDown", "mae, layer 2 · teacher, layer 4: 0.8"),
        ("ArrowRight", "mae, layer 2 · teacher, layer 5: 0.7"),
    ):
        browser.press(key)
        assert tips(browser) == [[place]], "and the tip of the figure that was left is gone"


def test_a_touch_shows_values_until_another(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], **PHONE)
    browser.tap(*place_of(browser, "reconstruction by step", x=0.9))
    assert tips(browser) == [["step 300", "mae", "0.5215"]]
    left, right = browser.run("(r => [r.left, r.right])(document.querySelector('.tip').getBoundingClientRect())")
    assert 0 <= left < right <= 390
    browser.tap(*place_of(browser, "top-1 by corruption", '[data-tip^="fog · severity 1"]'))
    assert tips(browser) == [["fog · severity 1: 65%"]]
