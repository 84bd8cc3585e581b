"""Keeping none of the blocks is training from scratch, keeping all is fine-tuning."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mimlet.api
from mimlet.analyse.leading import leading_blocks
from mimlet.config import Config, load_config
from mimlet.errors import ConfigError, RunError, WeightsError
from mimlet.models.weights import ENCODER_FILE, read_tensors
from mimlet.run import read_run
from tests.data.images import make_folder
from tests.tiny import ENCODER, SPEED, finetune, pretrain


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("leading") / "images", each=8)


@pytest.fixture(scope="module")
def encoder(images: Path) -> Path:
    return pretrain(images, images.parent / "mae")


def recipe(images: Path, encoder: Path | str | None, *more: str) -> Config:
    """That of `tests.tiny.finetune_arguments`."""
    base: dict[str, Any] = {
        "data": {"path": [str(images)], "eval": [str(images)]},
        "encoder": {"weights": None if encoder is None else str(encoder)},
        "schedule": {"batch": 8, "epochs": 0, "steps": 3, "warmup_epochs": 0},
        "speed": {"workers": 0},
    }
    return load_config("classify_micro32", [*ENCODER, *SPEED, *more], base)


@pytest.fixture(scope="module")
def done(images: Path, encoder: Path) -> tuple[Path, dict[int, float]]:
    folder = images.parent / "leading"
    return folder, leading_blocks(recipe(images, encoder), [0, 2, 1], folder)


def top1(run: Path) -> Any:
    return read_run(run).lines("eval")[-1]["top1"]


def same_weights(a: Path, b: Path) -> bool:
    left, right = (read_tensors(run / ENCODER_FILE)[0] for run in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_none_is_training_from_scratch_and_all_is_fine_tuning(
    done: tuple[Path, dict[int, float]], images: Path, encoder: Path, tmp_path: Path
) -> None:
    folder, found = done
    scratch = finetune(images, tmp_path / "scratch", "schedule.warmup_epochs=0")
    tuned = finetune(images, tmp_path / "tuned", "--encoder", str(encoder), "schedule.warmup_epochs=0")
    assert same_weights(folder / "kept_0", scratch)
    assert same_weights(folder / "kept_2", tuned)
    assert not same_weights(folder / "kept_0", folder / "kept_2")
    assert found == {0: top1(scratch), 2: top1(tuned), 1: top1(folder / "kept_1")}


def test_some_keep_embeddings_and_the_first_blocks(done: tuple[Path, dict[int, float]]) -> None:
    (report,) = json.loads((done[0] / "kept_1" / "loaded.json").read_text())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc2.bias"} <= set(report["loaded"])
    assert {name.split(".")[0] for name in report["fresh"]} == {"blocks", "norm"}
    assert not any(name.startswith("blocks.0.") for name in report["fresh"])


def test_finished_runs_are_not_repeated_and_interrupted_ones_go_on(
    done: tuple[Path, dict[int, float]], images: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(done[0], tmp_path / "leading")
    finished = (folder / "kept_1" / ENCODER_FILE).read_bytes()
    (folder / "kept_1" / ENCODER_FILE).unlink()
    train, trained = mimlet.api.train, []

    def counted(config: Config, **options: Any) -> Any:
        trained.append((Path(str(config.run.out)).name, options["resume"]))
        return train(config, **options)

    monkeypatch.setattr(mimlet.api, "train", counted)
    assert leading_blocks(recipe(images, encoder), (1, 0, 2), folder) == done[1]
    assert trained == [("kept_1", True)]
    assert (folder / "kept_1" / ENCODER_FILE).read_bytes() == finished


def test_a_run_of_other_settings_is_never_taken_for_this_one(
    done: tuple[Path, dict[int, float]], images: Path, encoder: Path
) -> None:
    with pytest.raises(RunError, match=r"kept_2 was made with other settings .*\n.*optim\.clip: 0\.0 -> 1\.0\n"):
        leading_blocks(recipe(images, encoder, "optim.clip=1.0"), (2,), done[0])


@pytest.mark.parametrize(("kept", "got"), [((), "none"), ((0, 3), "0, 3"), ((-1, 2), "-1, 2"), ((1, 0, 1), "1, 0, 1")])
def test_which_blocks_can_be_kept(kept: tuple[int, ...], got: str, images: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"different numbers .* from 0 to the 2 that the encoder has; got {got}$"):
        leading_blocks(recipe(images, encoder), kept, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.eval=[]",), r"data\.eval is empty; give --eval"),
        (("encoder.weights=none",), r"encoder\.weights is not set"),
        (("encoder.weights=transformers:facebook/dino-vits16",), "is a model of another library"),
        (("encoder.keep_blocks=1",), r"encoder\.keep_blocks is 1, .* leave it out"),
        (
            ("method={name='linear_probe'}",),
            "the method of this recipe is linear_probe; take one of the method classify",
        ),
    ],
)
def test_recipes_that_do_not_fit(
    settings: tuple[str, ...], message: str, images: Path, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        leading_blocks(recipe(images, encoder, *settings), (0, 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_told_before_the_first_training(
    images: Path, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="has head count 3, the encoder 6"):
        leading_blocks(recipe(images, encoder, "encoder.heads=6"), (0, 2), tmp_path / "out")
    with pytest.raises(WeightsError, match="holds no encoder"):
        leading_blocks(recipe(images, images), (0, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
