"""Every recipe trains in its smoke form and leaves an encoder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimlet import api
from mimlet.config import load_config, read_recipe, recipe_paths, smoke
from mimlet.methods.settings import METHODS


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 random 40 px images in 3 class folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return folder


def train(recipe: str, images: Path, out: Path, *overrides: str) -> Path:
    values = smoke(read_recipe(recipe))
    given: dict[str, dict[str, object]] = {
        "data": {"path": [str(images)]},
        "run": {"out": str(out)},
        "speed": {"accelerator": "cpu"},
    }
    if METHODS[values["method"]["name"]].labels:
        given["data"]["eval"] = [str(images)]
    config = load_config(values, overrides, given)
    api.train(config, resume=False, allow_changes=False, command="")
    return out


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What other recipes start from: teachers of both shapes, a student's encoder, a tokenizer, a classifier that
    teaches labels.
    """
    folder = tmp_path_factory.mktemp("runs")
    recipes = {
        "vit_base": "mae_base_teacher",
        "micro": "mae_micro_teacher32",
        "hiera_base": "mae_hiera_base",
        "hiera_micro": "mae_hiera_micro32",
        "encoder": "mae_tiny",
        "tokenizer": "dvae",
    }
    made = {name: train(recipe, images, folder / name) for name, recipe in recipes.items()}
    made["labels"] = train("scratch_tiny", images, folder / "labels")
    return {name: str(path) for name, path in made.items()}


@pytest.mark.filterwarnings("ignore:the decoder reads block")
@pytest.mark.parametrize("recipe", recipe_paths())
def test_smoke_form_trains(recipe: str, images: Path, runs: dict[str, str], tmp_path: Path) -> None:
    method = read_recipe(recipe)["method"]
    overrides = []
    if METHODS[method["name"]].teacher:
        size = "micro" if "micro" in recipe else "base"
        name = f"hiera_{size}" if "hiera" in recipe else {"base": "vit_base"}.get(size, size)
        overrides.append(f"teacher.path={runs[name]}")
    if "distill" in method:
        overrides.append(f"teacher.path={runs['labels']}")
    if method["name"] == "beit":
        overrides.append(f"method.tokenizer={runs['tokenizer']}")
    if method["name"] == "linear_probe":
        overrides.append(f"encoder.weights={runs['encoder']}")
    out = train(recipe, images, tmp_path / "run", *overrides)
    assert (out / "encoder.safetensors").is_file()
