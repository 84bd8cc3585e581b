"""Material that lies beside the repository: oracles made by official code, and real images. Tests that need it skip
without it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared"


@dataclass(frozen=True)
class Golden:
    """Weights, inputs and expected outputs made by a method's official code."""

    meta: dict[str, Any]
    io: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def tolerance(self) -> dict[str, float]:
        """Keyword arguments for `torch.testing.assert_close`."""
        return {"atol": self.meta["tolerance"]["atol"], "rtol": self.meta["tolerance"]["rtol"]}


def golden(name: str) -> Golden:
    """Loads one oracle, or skips the test."""
    folder = SHARED / "goldens" / name
    if not folder.is_dir():
        pytest.skip(f"oracle {name} is not beside the repository")
    weights = folder / "weights.safetensors"
    return Golden(
        json.loads((folder / "meta.json").read_text()),
        load_file(folder / "io.safetensors"),
        load_file(weights) if weights.exists() else {},
    )


def data_folder(name: str) -> Path:
    """A folder of real images, or skips the test."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"data set {name} is not beside the repository")
    return folder
