"""Every shipped recipe: its header, its settings, its smoke form, its command; and the numbers of the papers."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mimlet.cli import main
from mimlet.config import Config, load_config, read_recipe, recipe_header, recipe_paths, smoke, sweep_points, validate
from mimlet.methods.settings import METHODS, ClassifySettings, DVAESettings

RECIPES = recipe_paths()
DOCS = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"


def needed(values: dict[str, Any]) -> list[str]:
    """Overrides that give a recipe the inputs it cannot do without."""
    method = values["method"]
    given = ["teacher.path=teacher"] if METHODS[method["name"]].teacher or "distill" in method else []
    given += ["method.tokenizer=tokenizer"] if method["name"] == "beit" else []
    return given + (["encoder.weights=encoder"] if method["name"] == "linear_probe" else [])


def load(name: str) -> Config:
    return load_config(name, needed(read_recipe(name)))


def test_there_are_recipes() -> None:
    folders = {path.parent.name for path in RECIPES.values()}
    assert folders == {"pretrain", "finetune", "small"}


@pytest.mark.parametrize("name", RECIPES)
def test_header_and_length(name: str) -> None:
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    header = recipe_header(RECIPES[name])
    assert (
        {"source", "command", "expected", "cost"}
        <= header.keys()
        <= {"source", "command", "teacher", "expected", "cost"}
    )
    assert re.search(r"V100|H200|CPU core", header["cost"]), "a cost is on named hardware"
    assert read_recipe(name)["title"]
    assert f"--recipe {name}" in header["command"]
    if "published" in header["expected"] and "no published" not in header["expected"]:
        assert "run by us" in header["expected"]


@pytest.mark.parametrize("name", RECIPES)
def test_it_and_its_smoke_form_are_valid(name: str) -> None:
    whole, small = load(name), load_config(smoke(read_recipe(name)), needed(read_recipe(name)))
    assert (small.method.name, small.encoder.blocks) == (
        whole.method.name,
        whole.encoder.blocks,
    )
    for config in (whole, small):
        for _, point in sweep_points(config):
            assert point.method == config.method


@pytest.mark.parametrize("name", RECIPES)
def test_its_commands_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    header = recipe_header(RECIPES[name])
    for command in (header[key] for key in ("command", "teacher") if key in header):
        program, verb, *options = shlex.split(command)
        assert program == "mimlet"
        assert main([verb, *options, "--dry-run"]) == 0, capsys.readouterr().err
        printed = json.loads(capsys.readouterr().out)
        config = validate(printed)
        assert METHODS[config.method.name].labels == (verb == "finetune")
        assert config.data.path
        assert printed["run"]["out"] == options[options.index("--out") + 1]


@pytest.mark.parametrize("name", [name for name, path in RECIPES.items() if path.parent.name == "small"])
def test_small_students_and_teachers_share_a_grid(name: str) -> None:
    config = load(name)
    encoder, method = config.encoder, config.method
    assert encoder.image_size == (64 if "64" in name else 32)
    patch = 2**method.layers if isinstance(method, DVAESettings) else encoder.shape().patch
    assert encoder.image_size // patch == 8


def test_docs_list_every_recipe() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(RECIPES)


PRETRAIN = {
    "schedule.batch": 4096,
    "schedule.epochs": 400,
    "schedule.warmup_epochs": 40,
    "optim.name": "adamw",
    "optim.betas": (0.9, 0.95),
    "optim.weight_decay": 0.05,
    "optim.min_lr": 0.0,
    "optim.clip": 0.0,
    "optim.decay_tokens": True,
    "method.mask_ratio": 0.75,
    "method.target": "normalised",
    "data.augment.crop_scale": (0.08, 1.0),
    "data.augment.interpolation": "random",
    "data.augment.flip": 0.5,
    "peak": 2.4e-3,
}
TINY_DECODER = {"method.decoder.depth": 1, "method.decoder.dim": 96, "method.decoder.heads": 3}
SMALL_DECODER = {"method.decoder.depth": 1, "method.decoder.dim": 192, "method.decoder.heads": 6}
ATTENTION = {"method.attention_layers": [(0, 0)], "method.attention_weight": 1.0, "method.hidden_layers": []}
FINETUNE = {
    "schedule.batch": 1024,
    "schedule.epochs": 300,
    "schedule.warmup_epochs": 5,
    "schedule.eval_epochs": 10,
    "optim.name": "adamw",
    "optim.betas": (0.9, 0.999),
    "optim.weight_decay": 0.05,
    "optim.min_lr": 1e-6,
    "optim.layer_decay": 0.85,
    "optim.decay_tokens": False,
    "optim.clip": 0.0,
    "encoder.drop_path": 0.0,
    "method.pool": "mean",
    "method.mixup": 0.2,
    "method.cutmix": 0.0,
    "method.smoothing": 0.0,
    "method.erasing": 0.0,
    "method.ema_decay": 0.0,
    "data.augment.randaugment": "rand-m10-mstd0.5-inc1",
    "data.augment.interpolation": "bicubic",
    "data.augment.crop_scale": (0.08, 1.0),
    "data.augment.eval_crop": 0.875,
    "peak": 4e-3,
}
ITPN_CLIP = {
    "schedule.batch": 2048,
    "schedule.epochs": 800,
    "schedule.warmup_epochs": 10,
    "optim.lr": 1.5e-3,
    "optim.lr_batch": 0,
    "optim.min_lr": 1e-5,
    "optim.betas": (0.9, 0.98),
    "optim.weight_decay": 0.05,
    "optim.clip": 3.0,
    "encoder.drop_path": 0.1,
    "method.masking.ratio": 75 / 196,
    "method.form": "leak_free",
}
ITPN_FINETUNE = {
    "schedule.batch": 1024,
    "schedule.epochs": 100,
    "schedule.warmup_epochs": 5,
    "optim.betas": (0.9, 0.999),
    "optim.weight_decay": 0.05,
    "method.mixup": 0.8,
    "method.cutmix": 1.0,
    "method.smoothing": 0.1,
    "method.erasing": 0.25,
    "data.augment.randaugment": "rand-m9-mstd0.5-inc1",
}
PAPER: dict[str, dict[str, Any]] = {
    "mae_tiny": PRETRAIN | TINY_DECODER | {"encoder.name": "vit_tiny"},
    "dmae_tiny": PRETRAIN | TINY_DECODER | ATTENTION | {"method.decode_layer": None, "method.extra_block": False},
    "d2mae_tiny": PRETRAIN | TINY_DECODER | ATTENTION | {"method.decode_layer": 8, "method.extra_block": True},
    "d2mae_tiny_literal": PRETRAIN | TINY_DECODER | ATTENTION | {"method.decode_layer": 8, "method.extra_block": False},
    "mae_small": PRETRAIN | SMALL_DECODER | {"encoder.name": "vit_small"},
    "dmae_small": PRETRAIN | SMALL_DECODER | ATTENTION | {"encoder.name": "vit_small"},
    "mae_base_teacher": PRETRAIN
    | {"schedule.epochs": 1600, "data.augment.crop_scale": (0.2, 1.0), "data.augment.interpolation": "bicubic"}
    | {"method.decoder.depth": 8, "method.decoder.dim": 512, "method.decoder.heads": 16, "encoder.name": "vit_base"},
    "mae_hiera_tiny46": PRETRAIN | TINY_DECODER | {"method.mask_ratio": 0.4, "method.decoder.position": "learned"},
    "dmae_hiera_tiny46": PRETRAIN
    | TINY_DECODER
    | {"method.mask_ratio": 0.4, "method.attention_layers": [(12, 24)], "method.attention_weight": 1.0},
    "itpn_base": PRETRAIN
    | {"schedule.epochs": 1600, "data.augment.crop_scale": (0.2, 1.0), "data.augment.interpolation": "bicubic"}
    | {"method.decoder.depth": 8, "method.decoder.dim": 512, "method.decoder.heads": 16, "encoder.relative": "none"}
    | {"method.features.weight": 0.3, "method.features.momentum": 0.996, "encoder.drop_path": 0.0},
    "itpn_base_clip": ITPN_CLIP
    | {"encoder.relative": "full", "encoder.layer_scale": 0.1, "encoder.pyramid_depth": 1, "method.auxiliary": True}
    | {"method.target_projection": True, "method.target_norm": True, "data.augment.color_jitter": 0.4},
    "fast_itpn_base": ITPN_CLIP
    | {"method.loss": "cosine", "method.target_projection": False, "method.target_norm": False, "optim.eps": 1e-6}
    | {"method.patch_gradient": 0.1, "schedule.epochs": 1600, "data.augment.crop_scale": (0.2, 1.0)},
    "classify_hiera_tiny46": FINETUNE | {"encoder.q_pool": 3, "encoder.fuse": "none"},
    "classify_itpn_base": ITPN_FINETUNE
    | {"encoder.drop_path": 0.15, "optim.layer_decay": pytest.approx(0.6 ** (13 / 31), abs=1e-3), "peak": 1.6e-3},
    "classify_fast_itpn_tiny": ITPN_FINETUNE
    | {"encoder.drop_path": 0.1, "optim.lr": 1e-4, "optim.lr_batch": 0, "optim.layer_decay": 0.8}
    | {"method.ema_decay": 0.9999},
    "classify_tiny": FINETUNE,
    "classify_tiny_100ep": FINETUNE | {"schedule.epochs": 100},
    "classify_small_vit": FINETUNE | {"optim.layer_decay": 0.75, "encoder.name": "vit_small"},
    "scratch_tiny": FINETUNE | {"optim.layer_decay": 1.0},
    "beit_tiny": {
        "schedule.batch": 2048,
        "schedule.epochs": 400,
        "schedule.warmup_epochs": 10,
        "optim.name": "adamw",
        "optim.betas": (0.9, 0.999),
        "optim.eps": 1e-8,
        "optim.lr": 1.5e-3,
        "optim.lr_batch": 0,
        "optim.min_lr": 1e-5,
        "optim.weight_decay": 0.05,
        "optim.clip": 3.0,
        "method.masking.ratio": 75 / 196,
        "method.masking.smallest": 16 / 196,
        "data.augment.crop_scale": (0.08, 1.0),
        "data.augment.interpolation": "bicubic",
        "data.augment.color_jitter": 0.4,
        "data.augment.flip": 0.5,
        "data.augment.mean": (0.485, 0.456, 0.406),
        "encoder.position": "learned",
        "encoder.relative": "none",
        "encoder.layer_scale": None,
        "encoder.qv_bias": True,
        "encoder.drop_path": 0.1,
    },
    "augreg_tiny": {
        "schedule.batch": 4096,
        "schedule.epochs": 300,
        "optim.name": "adamw",
        "optim.betas": (0.9, 0.999),
        "optim.lr": 1e-3,
        "optim.lr_batch": 0,
        "optim.weight_decay": 0.1,
        "optim.clip": 1.0,
        "method.loss": "sigmoid",
        "method.pool": "mean",
        "method.mixup": 0.0,
        "method.smoothing": 0.0,
        "data.augment.randaugment": "",
        "data.augment.color_jitter": 0.0,
        "data.augment.crop_scale": (0.05, 1.0),
        "encoder.position": "learned",
        "encoder.drop_path": 0.0,
    },
    "classify_tiny_baselines": FINETUNE
    | {"optim.layer_decay": 0.75, "sweep": {"optim.layer_decay": [0.65, 0.75, 0.85, 1.0]}},
    "classify_tiny_simmim": FINETUNE
    | {"encoder.position": "none", "encoder.relative": "qv", "encoder.layer_scale": None}
    | {"sweep": {"optim.layer_decay": [0.65, 0.75, 0.85, 1.0]}},
    "classify_tiny_original": FINETUNE
    | {"method.mixup": 0.8, "method.cutmix": 1.0, "method.smoothing": 0.1, "method.erasing": 0.25}
    | {"encoder.drop_path": 0.1, "data.augment.color_jitter": 0.4, "data.augment.randaugment": "rand-m9-mstd0.5-inc1"}
    | {"optim.layer_decay": 1.0},
    "classify_tiny_rpe_1000ep": FINETUNE
    | {"schedule.epochs": 1000, "encoder.relative": "full", "encoder.layer_scale": None, "method.head_scale": 0.001},
    "classify_tiny_rpe_2023": FINETUNE
    | {"schedule.epochs": 1000, "encoder.relative": "qv", "encoder.layer_scale": 0.1, "method.head_scale": 0.001},
    "classify_tiny_distilled": FINETUNE | {"method.distill.kind": "hard", "method.distill.weight": 0.5},
    "linear_probe": {
        "optim.name": "lars",
        "optim.momentum": 0.9,
        "optim.weight_decay": 0.0,
        "schedule.batch": 16384,
        "schedule.epochs": 90,
        "schedule.warmup_epochs": 10,
        "method.pool": "class",
        "peak": 6.4,
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_numbers_of_the_paper(name: str) -> None:
    """MAE-lite's recipes as published (its Table S1 and released code), item by item."""
    config = load(name)
    for key, expected in PAPER[name].items():
        if key == "peak":
            assert config.optim.lr * config.schedule.batch / config.optim.lr_batch == pytest.approx(expected)
        else:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            assert value == expected, key


@pytest.mark.parametrize(
    ("name", "rates", "lengths"),
    [
        ("transfer_flowers", [0.01, 0.03, 0.1], [[150, 30], [250, 50]]),
        ("transfer_pets", [0.01, 0.03, 0.1], [[70, 14], [150, 30]]),
        ("transfer_aircraft", [0.01, 0.03, 0.1], [[50, 10], [100, 20]]),
        ("transfer_cars", [0.01, 0.03, 0.1], [[50, 10], [100, 20]]),
        ("transfer_cifar100", [0.03, 0.1, 0.3], [[25, 5], [50, 10]]),
    ],
)
def test_small_data_sweeps_of_the_paper(name: str, rates: list[float], lengths: list[list[int]]) -> None:
    """Table S2: rates are absolute at a batch of 512; Nesterov, clipping and the last rate are the released code's."""
    config = load(name)
    optim, method = config.optim, config.method
    assert (optim.name, optim.momentum, optim.nesterov, optim.weight_decay) == ("sgd", 0.9, True, 0.0)
    assert (optim.clip, optim.min_lr, optim.lr_batch, config.schedule.batch) == (1.0, 1e-6, 0, 512)
    assert isinstance(method, ClassifySettings)
    assert (method.mixup, method.cutmix, method.smoothing, method.erasing) == (0, 0, 0, 0)
    assert config.sweep == {
        "optim.lr": rates,
        "schedule.epochs,schedule.warmup_epochs": lengths,
        "optim.layer_decay": [1.0, 0.75],
    }
    assert optim.lr in rates
    assert [config.schedule.epochs, config.schedule.warmup_epochs] in lengths
