"""Checkpoints of a training that hold something else, with a digest that says they are whole."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimlet.cli import main
from mimlet.train.checkpoint import to_bytes
from tests.data.images import make_folder
from tests.fuzz.fuzz import EDITS, Edit, fuzzed, mutated, watched
from tests.tiny import pretrain, pretrain_arguments

TENSORS = (torch.zeros(0), torch.zeros(3), torch.full((2, 2), torch.nan), torch.ones(()))
VALUES: st.SearchStrategy[Any] = st.sampled_from((None, 1, -1.5, "x", [], {}, {"a": {}}, *TENSORS))
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.booleans(), VALUES), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    photos = make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)
    return photos, pretrain(photos, tmp_path_factory.mktemp("runs") / "run")


def resumed(trained: tuple[Path, Path], data: bytes) -> int:
    photos, run = trained
    other = run.parent / "other"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(run, other)
    saved = sorted((other / "checkpoints").glob("*.pt"))[-1]
    saved.write_bytes(data)
    Path(f"{saved}.sha256").write_text(hashlib.sha256(data).hexdigest())
    with watched(other):
        code = main(pretrain_arguments(photos, other, "--steps", "4", "--resume", "--allow-changes"))
    assert code in (0, 2)
    return code


def state_of(run: Path) -> dict[str, Any]:
    saved = sorted((run / "checkpoints").glob("*.pt"))[-1]
    state: dict[str, Any] = torch.load(saved, weights_only=True)
    return state


def test_whole_checkpoints_are_resumed(trained: tuple[Path, Path]) -> None:
    assert resumed(trained, to_bytes(state_of(trained[1]))) == 0


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("how", ["scalar", "expanded", "long", "sparse", "meta"])
def test_memory_that_the_optimiser_would_write_beyond(trained: tuple[Path, Path], key: str, how: str) -> None:
    """Its fused form trusts the shapes of its memory, and writes into somebody else's."""
    state = state_of(trained[1])
    for memory in state["optimizer"].values():
        good = memory[key]
        memory[key] = {
            "scalar": torch.zeros(()) if key != "step" else torch.zeros(0),
            "expanded": torch.zeros(1).expand(good.shape) if key != "step" else torch.zeros(1).expand(1000),
            "long": torch.zeros(10, *good.shape),
            "sparse": good.to_sparse(),
            "meta": good.to("meta"),
        }[how]
    assert resumed(trained, to_bytes(state)) == 2


@fuzzed(4, shrink=False)
@given(EDITS)
def test_mutated_bytes(trained: tuple[Path, Path], edits: list[Edit]) -> None:
    resumed(trained, mutated(to_bytes(state_of(trained[1])), edits))


@fuzzed(10, shrink=False)
@given(CHANGES)
def test_other_states(trained: tuple[Path, Path], changes: list[tuple[int, bool, Any]]) -> None:
    state = state_of(trained[1])
    for number, drop, value in changes:
        inner, depth = state, number % 4
        for _ in range(depth):
            found = [each for each in inner.values() if isinstance(each, dict) and each]
            inner = found[number % len(found)] if found else inner
        if not inner:
            continue
        name = [*inner][number // 4 % len(inner)]
        del inner[name]
        if not drop:
            inner[name] = value
    resumed(trained, to_bytes(state))
