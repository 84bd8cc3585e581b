"""Several trainings side by side: each is its own, bit for bit, and a shared teacher answers once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from mimlet import api
from mimlet.cli import main
from mimlet.config import Config, load_config
from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, RunError, TrainingStopped
from mimlet.methods.base import Clock
from mimlet.methods.dmae import DMAE
from mimlet.models.features import Features, Taps
from mimlet.models.teacher import Teacher
from tests.data.images import make_folder
from tests.tiny import pretrain

SMALL = {"name": "vit_nano", "image_size": 16, "dim": 24, "depth": 2, "heads": 3}
METHODS = {
    "mae": {"name": "mae"},
    "dmae": {"name": "dmae"},
    "d2mae": {"name": "dmae", "extra_block": True, "decode_layer": 1},
    "wide": {"name": "dmae"},
    "other_mask": {"name": "dmae", "mask_ratio": 0.5},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


@pytest.fixture(scope="module")
def teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(photos, tmp_path_factory.mktemp("teacher") / "run")


def config(name: str, photos: Path, teacher: Path, out: Path, **more: dict[str, object]) -> Config:
    values: dict[str, dict[str, object]] = {
        "encoder": SMALL | ({"dim": 48} if name == "wide" else {}),
        "method": METHODS[name] | {"decoder": {"dim": 12, "heads": 3}},
        "teacher": {} if name == "mae" else {"path": str(teacher)},
        "data": {"path": [str(photos)]},
        "schedule": {"batch": 8, "steps": 4, "warmup": 0.25},
        "speed": {"accelerator": "cpu", "workers": 0, "precision": "32", "accumulate": 2},
        "run": {"out": str(out / name), "tensorboard": False, "report": False},
    }
    for section, settings in more.items():
        values[section] = values.get(section, {}) | settings
    return load_config(values)


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def alone(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for name in METHODS:
        api.train(config(name, photos, teacher, folder))
    return folder


@pytest.mark.filterwarnings("ignore:the decoder reads block")
def test_each_equals_its_own_training(alone: Path, photos: Path, teacher: Path, tmp_path: Path) -> None:
    results = api.compare([config(name, photos, teacher, tmp_path) for name in METHODS])
    assert [result.folder.name for result in results] == list(METHODS)
    for name in METHODS:
        assert weights(tmp_path / name) == weights(alone / name)
        assert weights(tmp_path / name)


def test_a_shared_teacher_answers_once_per_view_mask_and_taps(
    photos: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Taps] = []
    original = Teacher._answer

    def counting(self: Teacher, images: Tensor, mask: object, taps: Taps) -> Features:
        asked.append(taps)
        return original(self, images, mask, taps)  # type: ignore[arg-type]

    monkeypatch.setattr(Teacher, "_answer", counting)
    api.compare([config(name, photos, teacher, tmp_path) for name in METHODS])
    pieces = 4 * 2
    assert len(asked) == 2 * pieces  # dmae, d2mae and wide ask the same question; other_mask asks another


def stop_at(step: int) -> Callable[[DMAE, Batch, Clock], dict[str, Tensor]]:
    import os
    import signal

    original = DMAE.forward

    def forward(self: DMAE, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        if clock.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, clock)

    return forward


def test_a_signal_saves_all_and_resuming_ends_the_same(
    alone: Path, photos: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [config(name, photos, teacher, tmp_path) for name in ("mae", "dmae", "d2mae")]
    with monkeypatch.context() as patch:
        patch.setattr(DMAE, "forward", stop_at(1))
        with pytest.raises(TrainingStopped, match="after step 2 of 4"):
            api.compare(configs)
    assert all(list((tmp_path / name / "checkpoints").glob("*2.pt")) for name in ("mae", "dmae", "d2mae"))
    api.train(configs[0], resume=True)  # one goes ahead; the others catch up
    api.compare(configs, resume=True)
    for name in ("mae", "dmae", "d2mae"):
        assert weights(tmp_path / name) == weights(alone / name)


def test_views_made_on_the_device_are_the_same(
    alone: Path, photos: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with views from the device and ended with those of the loader, by one of them; pictures are kept."""
    names = ("mae", "dmae")
    configs = [config(name, photos, teacher, tmp_path, speed={"augment": "device"}) for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(DMAE, "forward", stop_at(1))
        with pytest.raises(TrainingStopped, match="after step 2 of 4"):
            api.compare(configs)
    api.train(config("mae", photos, teacher, tmp_path), resume=True)
    api.compare(configs, resume=True)
    for name in names:
        assert weights(tmp_path / name) == weights(alone / name)
        kept = sorted(file.relative_to(alone / name) for file in (alone / name).rglob("*.png"))
        assert kept
        for file in kept:
            assert (tmp_path / name / file).read_bytes() == (alone / name / file).read_bytes()


def test_one_that_fails_leaves_the_others_whole(
    alone: Path, photos: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("mae", "dmae", "d2mae")
    more: dict[str, dict[str, object]] = {"optim": {"lr": 1e30}}
    configs = [config(name, photos, teacher, tmp_path, **(more if name == "dmae" else {})) for name in names]
    with pytest.raises(RunError, match=r"1 of 3 trainings failed, the others are finished: dmae: .*not all numbers"):
        api.compare(configs)
    assert "dmae: failed and left out" in capfd.readouterr().err
    for name in ("mae", "d2mae"):
        assert weights(tmp_path / name) == weights(alone / name)
    assert not weights(tmp_path / "dmae")


def test_what_cannot_be_compared(photos: Path, teacher: Path, tmp_path: Path) -> None:
    mae = config("mae", photos, teacher, tmp_path)
    with pytest.raises(ConfigError, match="two or more side by side, got 1"):
        api.compare([mae])
    with pytest.raises(ConfigError, match="a folder of its own"):
        api.compare([mae, mae])
    longer = config("dmae", photos, teacher, tmp_path, schedule={"steps": 5})
    with pytest.raises(ConfigError, match=r"schedule\.steps 4 and 5"):
        api.compare([mae, longer])


def test_from_the_command_line(photos: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(photos), "--teacher", str(teacher), "--out", str(out), "--smoke", "--workers", "0"]
    settings = [
        "encoder.image_size=16",
        "encoder.patch=4",
        "speed.accelerator=cpu",
        "dmae_micro32:method.mask_ratio=0.5",
    ]
    assert main(["compare", "mae_micro32", "dmae_micro32", *settings, *arguments]) == 0
    assert (out / "report.html").is_file()
    ratios = [load_config(out / name / "config.json").method for name in ("mae_micro32", "dmae_micro32")]
    assert [getattr(each, "mask_ratio", 0) for each in ratios] == [0.75, 0.5]
    assert main(["compare", "mae_micro32", "mae_micro32", *arguments]) == 2
    assert "'mae_micro32' is given twice" in capsys.readouterr().err
    assert main(["compare", "mae_micro32", "dmae_micro32", "dmae:seed=1", *arguments]) == 2
    assert "which is not compared" in capsys.readouterr().err
