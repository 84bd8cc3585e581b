"""Run folders in which a file is damaged, or was made by somebody else to do harm."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimlet.analyse.diagnose import Finding, findings_json, read_findings
from mimlet.analyse.results import read_analysis
from mimlet.api import run_page
from mimlet.config import changed_settings, load_config, read_recipe, recipe_paths, smoke
from mimlet.errors import ConfigError, RunError
from mimlet.export.timm import export_encoder, snippet
from mimlet.loggers import IDS_FILE, open_sinks
from mimlet.models.build import encoder_of
from mimlet.models.foreign import open_teacher
from mimlet.models.shapes import ViTShape
from mimlet.models.weights import load
from mimlet.run import RunFolder, read_metrics, read_pictures, read_run
from tests.fuzz.fuzz import CHANGES, EDITS, TEXTS, Edit, Refused, attempt, changed, fuzzed, mutated
from tests.report.made import full_run, grey_png

FILES = (
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "pictures.json",
    "unreadable.txt",
    "robustness.json",
    "loggers.json",
    "encoder.json",
    "analysis/analysis.json",
    "analysis/diagnosis.json",
    "encoder.safetensors",
    "original.png",
    "pictures/original.png",
    "analysis/attention.png",
)
SUFFIXES = st.sampled_from((".json", ".toml"))
RECIPES = ("mae_tiny", "classify_tiny", "mimhd_tiny", "transfer_pets")
OBJECTS = tuple(name for name in FILES if name.endswith(".json"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything that one can hold."""
    run = full_run(tmp_path_factory.mktemp("runs") / "run")
    export_encoder(run, encoder_of(ViTShape(32, 8, 12, 2, 3, 1.0)), mean=(0.5,) * 3, std=(0.5,) * 3)
    (run / "pictures.json").write_text(json.dumps({"rows": ["original", "reconstruction"], "caption": "c"}))
    (run / "pictures").mkdir()
    for name in ("original.png", "pictures/original.png", "pictures/00000000.png", "pictures/00000010.png"):
        (run / name).write_bytes(grey_png())
    (run / "unreadable.txt").write_text("a.jpg\tdamaged\n")
    (run / IDS_FILE).write_text(json.dumps({"wandb": "x", "mlflow": "y"}))
    finding = Finding("q", "v", "e", "t", "a", True)
    (run / "analysis" / "diagnosis.json").write_text(findings_json([finding]))
    run_page([run], run / "report.html")  # matplotlib makes a folder of its own the first time
    return run


def with_file(whole: Path, name: str, data: bytes) -> Path:
    """The same run with another file in place of one."""
    other = whole.parent / "other" / "run"
    shutil.rmtree(other.parent, ignore_errors=True)
    shutil.copytree(whole, other)
    (other / name).write_bytes(data)
    return other


def use(run: Path) -> None:
    """Everything that is read from a run folder; nothing but the page is written, into it."""
    secret = run.parent / "secret.png"
    secret.write_bytes(grey_png())
    uses: tuple[Callable[[], object], ...] = (
        lambda: read_run(run),
        lambda: read_pictures(run),
        lambda: read_analysis(run / "analysis"),
        lambda: read_findings(run / "analysis"),
        lambda: snippet(run),
        lambda: load(run),
        lambda: run_page([run], run / "report.html"),
    )
    for each in uses:
        attempt(each, allowed=run)


def test_whole_runs_are_read(whole: Path) -> None:
    page = attempt(lambda: run_page([whole], whole / "report.html"), allowed=whole)
    assert not isinstance(page, Refused), page
    assert [*read_pictures(whole)] == ["original", "step 0", "step 10"]
    compile(snippet(whole), "snippet", "exec")


@fuzzed(12)
@given(st.sampled_from(FILES), EDITS)
def test_mutated_files(whole: Path, name: str, edits: list[Edit]) -> None:
    use(with_file(whole, name, mutated((whole / name).read_bytes(), edits)))


@fuzzed(12)
@given(st.sampled_from(OBJECTS), CHANGES)
def test_other_values(whole: Path, name: str, changes: list[tuple[int, str, Any]]) -> None:
    values = changed(json.loads((whole / name).read_bytes()), changes)
    use(with_file(whole, name, json.dumps(values).encode()))


@fuzzed(8)
@given(st.integers(0, 34), CHANGES)
def test_other_metrics(whole: Path, line: int, changes: list[tuple[int, str, Any]]) -> None:
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    number = line % len(lines)
    lines[number] = json.dumps(changed(json.loads(lines[number]), changes))
    use(with_file(whole, "metrics.jsonl", "".join(f"{text}\n" for text in lines).encode()))


@fuzzed(100)
@given(
    st.binary(max_size=80) | TEXTS.map(lambda text: text.encode(errors="replace")), st.sampled_from((".json", ".toml"))
)
def test_recipes(whole: Path, text: bytes, suffix: str) -> None:
    path = whole.parent / f"recipe{suffix}"
    path.write_bytes(text)
    attempt(lambda: load_config(path), (ConfigError,))


@fuzzed(60)
@given(EDITS, st.sampled_from(RECIPES))
def test_mutated_recipes(whole: Path, edits: list[Edit], name: str) -> None:
    path = whole.parent / "mutated.toml"
    path.write_bytes(mutated(recipe_paths()[name].read_bytes(), edits))
    attempt(lambda: load_config(path), (ConfigError,))
    attempt(lambda: smoke(read_recipe(path)), (ConfigError,))


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a":' * 10**5, "a." * 10**4 + "b=1", "a=" + "[" * 10**4, "a=[{b=" * 500]
)
@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_nesting_ends(text: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"deep{suffix}").write_text(text)
    assert isinstance(attempt(lambda: load_config(tmp_path / f"deep{suffix}")), Refused)


# ---------------------------------------------------------------- pointing out of the run


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "..\\x", "a\0b", ".x", "", "two\nlines"])
def test_pictures_lie_in_the_run(name: str, whole: Path) -> None:
    shown = json.dumps({"rows": [name, "reconstruction"], "caption": ""}).encode()
    other = with_file(whole, "pictures.json", shown)
    (other.parent / "secret.png").write_bytes(grey_png())
    with pytest.raises(RunError, match="plain names"):
        read_pictures(other)
    analysis = json.loads((whole / "analysis" / "analysis.json").read_bytes())
    analysis["pictures"][0]["file"] = f"{name}.png" if name else ""
    other = with_file(whole, "analysis/analysis.json", json.dumps(analysis).encode())
    with pytest.raises(RunError, match="a picture is called"):
        read_analysis(other / "analysis")


@pytest.mark.parametrize("name", ["metrics.jsonl", "unreadable.txt", ".lock"])
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    """Files to which lines are added are not replaced, as all others are."""
    precious = tmp_path / "precious.txt"
    precious.write_text("as it was\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(precious)
    settings = {"method": {"name": "mae"}, "schedule": {"batch": 1, "steps": 1}, "run": {"tensorboard": False}}

    def train() -> None:
        with RunFolder.create(run, load_config(settings), resume=True) as folder:
            folder.log("train", 1, 0.1, 1.0, {"total": 1.0})
            folder.unreadable([("a.jpg", "damaged")])

    attempt(train, allowed=tmp_path)
    assert precious.read_text() == "as it was\n"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "unreadable.txt", "environment.json", "pictures.json", "loggers.json"]
)
def test_pipes_and_devices_are_not_read(name: str, whole: Path) -> None:
    other = with_file(whole, name, b"")
    for put in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        (other / name).unlink()
        put(other / name)
        use(other)
        attempt(lambda: open_sinks(other, read_run(whole).config), allowed=other)


# ---------------------------------------------------------------- code


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", ["__import__('os').system('x')", 0, 0]),
        ("kind", "'''\nimport os"),
        ("shape", {"image_size": "32\nimport os\n"}),
        ("timm", {"name": "'); import os; ('", "kwargs": {"a=1); import os; f(b": 1}}),
        ("classes", 5),
        ("shape", None),
    ],
)
def test_code_to_copy_has_nothing_of_a_file_in_it(key: str, value: object, whole: Path) -> None:
    """The page and `mimlet export` print Python that somebody is going to run."""
    values = json.loads((whole / "encoder.json").read_bytes())
    good = snippet(whole)
    other = with_file(whole, "encoder.json", json.dumps(values | {key: value}).encode())
    said = attempt(lambda: snippet(other))
    assert isinstance(said, Refused) or said == good.replace(str(whole), str(other))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
@pytest.mark.parametrize("kind", [{"model_type": "vit"}, {"architecture": "vit_tiny_patch16_224"}])
def test_other_libraries_folders_are_looked_at_first(name: str, kind: dict[str, str], tmp_path: Path) -> None:
    from tests.fuzz.test_weights import Touch

    (tmp_path / "config.json").write_text(json.dumps(kind))
    torch.save({"x": Touch(tmp_path / "canary")}, tmp_path / name)
    said = attempt(lambda: open_teacher(str(tmp_path)), allowed=tmp_path)
    assert isinstance(said, Refused)
    assert "could run code: refused" in said
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("inside", ["", "vision_config"])
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_others_are_not_fetched(inside: str, name: str, tmp_path: Path) -> None:
    asked = {name: "somebody/kernel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **({inside: asked} if inside else asked)}))
    said = attempt(lambda: open_teacher(str(tmp_path)), allowed=tmp_path)
    assert isinstance(said, Refused)
    assert "which may be code from elsewhere: refused" in said


@pytest.mark.parametrize(
    "description",
    [
        {"architecture": 5},
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"url": "http://127.0.0.1:9/x"}},
        {"model_type": ["vit"]},
        {"model_type": "vit", "hidden_size": "x"},
        {"model_type": "vit", "hidden_size": 0},
        {"model_type": "vit", "auto_map": {"AutoModel": "somebody--code.Model"}},
        {"model_type": "clip", "vision_config": 5},
    ],
)
def test_other_libraries_refuse_strange_descriptions(description: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(description))
    (tmp_path / "model.safetensors").write_bytes(b"junk" * 99)
    assert isinstance(attempt(lambda: open_teacher(str(tmp_path)), allowed=tmp_path), Refused)


def test_metrics_name_the_line_that_is_wrong(whole: Path) -> None:
    other = with_file(whole, "metrics.jsonl", b'{"step": 1, "epoch": 0, "kind": "train", "time": 1}\n[]\n')
    with pytest.raises(RunError, match="line 2 is none of a run's"):
        read_metrics(other / "metrics.jsonl")


def test_settings_of_others_can_be_compared(whole: Path) -> None:
    config = read_run(whole).config
    assert changed_settings(config, config) == []
