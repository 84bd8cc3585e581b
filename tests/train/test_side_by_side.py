"""Every method under two processes equals the one-process run, whether or not parts of it get no gradient."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from mimlet.cli import main as cli
from mimlet.methods.settings import METHODS
from mimlet.run import LINE_KEYS, read_pictures, read_run
from mimlet.train import loop
from tests.data.images import make_folder
from tests.tiny import SPEED, finetune, pretrain
from tests.train.side_by_side import DIVIDED, FINETUNE, PRETRAIN, main

ROOT = Path(__file__).resolve().parents[2]


ASKING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal"}
"""Operators whose answer is wanted by the program, or has a shape that only the device knows."""


class Waiting(TorchDispatchMode):
    """Notes what of a step would wait for a GPU, by the name of its run."""

    found: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, name: str) -> None:
        super().__init__()
        self.notes = self.found.setdefault(name, [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = args[1] if func.name().startswith("aten::index") and isinstance(args[1], (list, tuple)) else ()
        if func.name() in ASKING or any(x is not None and x.dtype == torch.bool for x in places):
            self.notes.append(func.name())
        return func(*args, **(kwargs or {}))

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[None]:
        """All that the loop does between taking a piece of a batch and the end of the optimiser's step; in methods of
        tensors too, which hand numbers out without an operator. Ways that are only taken on a processor, and not by
        the compiler, are not taken.
        """

        def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
            def inside(training: Any, *x: Any) -> Any:
                with cls(training.name) as waiting, pytest.MonkeyPatch.context() as patch:
                    for name in ("tolist", "numpy", "cpu"):
                        patch.setattr(torch.Tensor, name, noted(waiting, name))
                    if call is piece:
                        patch.setattr(torch.compiler, "is_compiling", lambda: True)
                    return call(training, *x)

            return inside

        def noted(waiting: Waiting, name: str) -> Callable[..., Any]:
            method = getattr(torch.Tensor, name)

            def call(x: torch.Tensor, *more: Any, **named: Any) -> Any:
                waiting.notes.append(name)
                return method(x, *more, **named)

            return call

        piece = loop._Loop.piece
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Loop, "piece", wrapped(piece))
            patch.setattr(loop._Loop, "_update", wrapped(loop._Loop._update))
            yield


def test_waiting_is_noticed() -> None:
    x, known = torch.ones(2), torch.ones(2, dtype=torch.bool)
    for waits in (lambda: x.sum().item(), lambda: bool(known.all()), lambda: x[known], lambda: known.nonzero()):
        with Waiting("noticed") as waiting:
            waits()
        assert waiting.notes
        waiting.notes.clear()
    with Waiting("noticed") as waiting:
        x[torch.tensor([0])].sum()
    assert not waiting.notes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`: what one and two processes made of the same images and teachers."""
    folder = tmp_path_factory.mktemp("side_by_side")
    data = make_folder(folder / "images", each=8)
    pretrain(data, folder / "encoder", "encoder.dim=32", "encoder.heads=4", "method.decoder.depth=2")
    finetune(data, folder / "labels")
    tokenizer = ["--recipe", "dvae_micro32", "--data", str(data), "--out", str(folder / "tokenizer"), "--steps", "3"]
    sizes = ["encoder.image_size=16", "method.codes=16", "method.hidden=8"]
    assert cli(["pretrain", *tokenizer, "--batch", "8", "--workers", "0", *sizes, *SPEED]) == 0
    with pytest.warns(UserWarning, match="the decoder reads block 1"), Waiting.watched():
        main(data, folder, folder / "one", pieces=2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, "-m", "tests.train.side_by_side", data, folder, folder / "two"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "find_unused_parameters" not in result.stderr
    return folder


def test_every_method_takes_part() -> None:
    assert {method["name"] for method in (*PRETRAIN.values(), *FINETUNE.values())} == METHODS.keys() - {
        "linear_probe",
        "dvae",  # its noise is every process's own
    }


@pytest.mark.parametrize("name", PRETRAIN)
def test_two_processes_see_the_same_meanwhile(folder: Path, name: str) -> None:
    one, two = (read_run(folder / kind / name).lines("eval") for kind in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 4]
    assert one[0]["knn_top1"] == two[0]["knn_top1"]
    ours, theirs = (read_pictures(folder / kind / name) for kind in ("one", "two"))
    assert list(ours) == list(theirs)
    for picture in ("original", "visible", "step 0"):
        assert ours.get(picture) == theirs.get(picture)
    assert bool(ours) is (name not in ("tinymim", "average", "learned_map", "g2sd", "maskfeat_teacher"))


@pytest.mark.parametrize("name", [*PRETRAIN, *FINETUNE])
def test_no_step_waits_for_the_device(folder: Path, name: str) -> None:
    assert Waiting.found[name] == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "two") for name in (*PRETRAIN, *FINETUNE)), *((name, "two/divided") for name in DIVIDED)],
)
def test_two_processes_equal_one(folder: Path, name: str, kind: str) -> None:
    """By DDP, and with gradients and memory divided."""
    one, two = (load_file(folder / kind / name / "encoder.safetensors") for kind in ("one", kind))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    start = (read_run(folder / kind / name).lines("train") for kind in ("one", kind))
    for a, b in zip(*start, strict=True):
        losses = a.keys() - {"images_per_second", "data_wait", "memory_mb", *LINE_KEYS}
        assert losses >= {"total", "lr"}
        for key in losses:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
