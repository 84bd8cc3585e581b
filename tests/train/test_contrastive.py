"""Several processes contrast, normalise and centre as one does with the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.train.contrastive import BATCH, WORLDS, measure

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = {
    "norm": {"rtol": 1e-5, "atol": 2e-6},
    "plain norm": {"rtol": 1e-5, "atol": 2e-6},
    "moco": {"rtol": 1e-9, "atol": 1e-11},  # in double precision
    "dino": {"rtol": 1e-4, "atol": 1e-6},
    "itpn": {"rtol": 1e-4, "atol": 1e-6},
    "itpn_clip": {"rtol": 1e-4, "atol": 1e-6},
}
Found = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def alone() -> Found:
    return measure()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """By number of processes, what the first of them has found."""
    out = tmp_path_factory.mktemp("contrastive")
    result = subprocess.run(
        [sys.executable, "-m", "tests.train.contrastive", out],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return {world: torch.load(out / f"{world}.pt", weights_only=True) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", BOUNDS)
def test_several_processes_equal_one(alone: Found, together: dict[int, Found], name: str, world: int) -> None:
    one, several = alone[name], together[world][name]
    assert one.keys() == several.keys()
    for key, value in one.items():
        assert_close(several[key], value, **BOUNDS[name], msg=lambda text, key=key: f"{key}: {text}")


def test_what_is_compared(alone: Found) -> None:
    """Every part that could differ is there, and not trivial."""
    norm, moco, dino = alone["norm"], alone["moco"], alone["dino"]
    assert norm["1 out"].shape == norm["1 input"].shape == (BATCH, 5)
    assert norm["1 input"].abs().max() > 1e-3
    assert norm["1 running_var"].min() > 100
    assert norm["1 gradient weight"].abs().min() > 0
    assert moco["logits"].shape == (BATCH, BATCH)
    for name in ("projector.1.running_var", "momentum_projector.7.running_mean", "gradient encoder.cls_token"):
        assert moco[name].abs().max() > 1e-3, name
    assert (moco["projector.1.num_batches_tracked"], moco["momentum_projector.1.num_batches_tracked"]) == (2, 2)
    assert dino["centre"].std() > 0.1
    assert dino["gradient student_head.last_layer.weight"].abs().max() > 1e-4
    itpn, clip = alone["itpn"], alone["itpn_clip"]
    assert itpn["target.patch_embed.proj.weight"].abs().max() > 1e-2
    assert itpn["gradient heads.4.weight"].abs().max() > 1e-4
    assert clip["gradient mask_token"].abs().max() > 1e-5
