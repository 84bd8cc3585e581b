"""Fabricated checkpoints with the names, shapes and containers of the published ones. Each tensor holds one number."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.shared import SHARED


def tensors_of(name: str) -> dict[str, Tensor]:
    """The tensors of a published file. Expanded from single numbers, so that files of 300 MB take some kB."""
    path = SHARED / "facts" / "checkpoints" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"names and shapes of {name} are not beside the repository")
    content = json.loads(path.read_text())
    shapes: dict[str, list[int]] = content.get("tensors", content)
    return {key: constant(i + 1, shape, key) for i, (key, shape) in enumerate(shapes.items())}


def constant(number: int, shape: list[int], name: str = "") -> Tensor:
    if name.endswith("relative_position_index"):
        return torch.tensor(number).expand(shape)
    return torch.tensor(number / 1024).expand(shape)


def save_official(path: Path, tensors: dict[str, Tensor]) -> Path:
    """As facebookresearch/mae saves: one key."""
    torch.save({"model": tensors}, path)
    return path


def save_mae_lite(path: Path, tensors: dict[str, Tensor]) -> Path:
    """As mae-lite saves: everything a run needs beside the model."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    content = {
        "start_epoch": 400,
        "model": tensors,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"base_lr": np.float64(2.4e-3), "milestones": [1, 2]},
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "best_top1": np.float32(77.978),
        "best_top1_epoch": np.int64(399),
        "args": argparse.Namespace(batch_size=4096, layers=[11]),
    }
    torch.save(content, path)
    return path
