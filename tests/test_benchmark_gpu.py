"""What is asked of a GPU works, and its arithmetic is right; the figures need one."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import gpu


def test_everything_works_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("ceilings", "step, mae, off", "step, mimhd, off", "profile, mae", "packed, d2mae, ViT-Base, raw")
    chosen = [item for item in gpu.items(gpu.SMOKE) if item.name in (*names, "attention, 5, 12", "waits, tinymim")]
    assert len(chosen) == len(names) + 2
    missing = gpu.Item("step, tinymim, off", gpu.step, ("nothing", "off"))
    monkeypatch.setattr(gpu, "items", lambda sizes: [*chosen, missing])
    gpu.main(["--smoke", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())["found"]
    assert [name for name, answer in found.items() if "failed" in answer] == [missing.name]
    step = found["step, mae, off"]
    moved = gpu.Stack(12, 5, 192).moved("off") + gpu.Stack(1, 17, 96).moved("off")
    assert step["moved"] / step["images_per_second"] == pytest.approx(moved)
    table = (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out.endswith(f"{table}\n")
    for row in (r"\| mae \| off \| [\d,]+ \| 40,000 \| \d+% \| \d+% ", r"- step, tinymim, off: KeyError: 'nothing'"):
        assert re.search(row, table), row
    assert "| d2mae, ViT-Base, raw | " in table
    assert "| mae: where a step's time goes | ms | share |" in table
    assert "No step that logs nothing waits for the device." in table


def test_arithmetic() -> None:
    """At 224 px, GFLOP and MB: of ViT-Tiny on 50 tokens, of MAE's whole step, of a large teacher."""
    tiny = gpu.Stack(12, 50, 192, trained=False)
    assert (tiny.flops / 1e9, tiny.moved("on") / 1e6) == pytest.approx((0.568, 8.3), rel=0.01)
    whole = gpu.stacks("mae", gpu.FULL)
    assert sum(part.flops for part in whole) / 1e9 == pytest.approx(1.97, rel=0.01)
    assert sum(part.moved("on") for part in whole) / 1e6 == pytest.approx(33, rel=0.1)
    assert gpu.stacks("d2mae, ViT-Large", gpu.FULL)[1].flops / 1e9 == pytest.approx(30.5, rel=0.01)
    assert gpu.stacks("tinymim", gpu.FULL)[1].tokens == 197


def test_what_has_no_time_left_is_said() -> None:
    found = gpu.measure([gpu.Item("a", gpu.ceilings), gpu.Item("b", gpu.ceilings)], lambda item, limit: {}, 0)
    assert [answer["failed"] for answer in found.values()] == ["no time was left"] * 2
    assert gpu.tables(found, "nothing").endswith("Not measured:\n- a: no time was left\n- b: no time was left\n")
