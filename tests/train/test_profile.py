"""`run.profile`: the trace changes nothing, and says where a step's time goes."""

import csv
import gzip
import json
import signal
from pathlib import Path

import pytest
import torch

from mimlet.errors import TrainingStopped
from mimlet.run import RunFolder, read_run
from mimlet.train.profile import PHASES, REST, STEPS, WARM
from tests.train.toy import Toy, config, train

SETTINGS = config(run={"profile": True})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was profiled, and what it showed."""
    out = tmp_path_factory.mktemp("profile")
    with RunFolder.create(out, SETTINGS) as run:
        profiled, _ = train(SETTINGS, run=run)
    torch.testing.assert_close(profiled.state_dict(), train()[0].state_dict(), rtol=0, atol=0)
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "profile" / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_phases_make_up_the_step(folder: Path) -> None:
    table = {row["name"]: row for row in rows(folder) if row["kind"] != "operator"}
    assert list(table) == ["a whole step", *PHASES, REST]
    parts = [float(table[name]["ms"]) for name in (*PHASES, REST)]
    assert sum(parts) == pytest.approx(float(table["a whole step"]["ms"]))
    assert min(parts) > 0
    calls = {name: float(table[name]["calls"]) for name in PHASES}
    once = ("optimiser", "moving averages")
    assert calls == {name: 1.0 if name in once else 2.0 for name in PHASES}  # two pieces a step


def test_operators_are_listed_by_their_own_time(folder: Path) -> None:
    operators = [row for row in rows(folder) if row["kind"] == "operator"]
    times = [float(row["ms"]) for row in operators]
    assert times == sorted(times, reverse=True)
    assert sum(float(row["share"]) for row in operators) <= 1 + 1e-9
    assert {"aten::addmm", "aten::mm"} & {row["name"] for row in operators}
    assert not {row["name"] for row in operators} & {*PHASES, "ProfilerStep*"}
    text = (folder / "profile" / "table.txt").read_text()
    assert all(row["name"][:60] in text for row in rows(folder))


def test_the_trace_has_the_phases_of_the_traced_steps(folder: Path) -> None:
    with gzip.open(folder / "profile" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [names.count(name) for name in ("student forward, losses", "optimiser")] == [2 * STEPS, STEPS]
    steps = sorted({name for name in names if name and name.startswith("ProfilerStep#")})
    assert len(steps) == STEPS
    notes = list(read_run(folder).lines("note"))
    assert [line["step"] for line in notes] == [WARM + 1 + STEPS]
    assert notes[0]["text"] == f"where a step's time goes; all of it is in {folder / 'profile'}"


def test_a_short_training_is_traced_to_its_end(tmp_path: Path) -> None:
    settings = config(run={"profile": True}, schedule={"steps": 2})
    with RunFolder.create(tmp_path, settings) as run:
        train(settings, run=run)
    assert float(rows(tmp_path)[0]["ms"]) > 0


def test_a_training_that_stops_ends_its_trace(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, SETTINGS) as run, pytest.raises(TrainingStopped):
        train(SETTINGS, run=run, signals={WARM + 1: signal.SIGTERM})
    assert not (tmp_path / "profile").exists()
    with torch.profiler.profile(acc_events=True):  # there is one at a time
        pass
    with RunFolder.create(tmp_path, SETTINGS, resume=True) as run:
        method, _ = train(SETTINGS, Toy(), run=run)
    assert (tmp_path / "profile" / "table.csv").exists()
    torch.testing.assert_close(method.state_dict(), train()[0].state_dict(), rtol=0, atol=0)
