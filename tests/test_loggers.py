"""W&B and MLflow: what they are handed, by stand-ins for their packages, and for real where they are installed."""

import io
import json
import os
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from mimlet.cli import main
from mimlet.config import Config, load_config, recipe_paths
from mimlet.errors import ConfigError, RunError
from mimlet.run import RunFolder, read_run
from tests.data.images import make_folder
from tests.tiny import pretrain, pretrain_arguments


def config(**run: Any) -> Config:
    values = {"method": {"name": "mae"}, "schedule": {"epochs": 2, "batch": 8}, "run": {"tensorboard": False, **run}}
    return load_config(values)


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Fake:
    """Both loggers, and what is behind their `experiment`: notes what it is told."""

    made: list["Fake"] = []
    fails: str = ""

    def __init__(self, *names: str, **options: Any) -> None:
        self.options = {**options, **({"experiment_name": names[0]} if names else {})}
        self.told: list[tuple[str, Any]] = []
        self.id = options.get("id") or f"new{len(Fake.made)}"
        self.run_id = options.get("run_id") or f"new{len(Fake.made)}"
        if Fake.fails == "start":
            raise OSError("no\nnetwork")
        Fake.made.append(self)

    @property
    def experiment(self) -> "Fake":
        return self

    def note(self, what: str, *told: Any) -> None:
        if Fake.fails == what:
            raise OSError("no\nnetwork")
        self.told.append((what, *told))

    def log_hyperparams(self, values: dict[str, Any]) -> None:
        self.note("settings", values)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.note("numbers", step, values)

    def log_image(self, name: str, image: Any, step: int, key: str = "") -> None:
        """W&B: name, [image]; MLflow: run, image, key."""
        shown = image[0] if isinstance(image, list) else image
        self.note("image", step, key or name, shown.size, shown.getpixel((0, 0)))

    def finish(self, exit_code: int) -> None:
        self.note("end", exit_code)

    def finalize(self, status: str) -> None:
        self.note("end", status)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """The packages, as far as they are used."""
    Fake.made, Fake.fails = [], ""
    names = {
        "wandb.integration.lightning.fabric": {"WandbLogger": Fake},
        "lightning.pytorch.loggers": {"MLFlowLogger": Fake},
        "mlflow": {"get_tracking_uri": lambda: "somewhere"},
    }
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(variable, "1")  # so that it is put back
    for dotted, content in names.items():
        parts = dotted.split(".")
        for count in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:count]))
            module.__spec__ = ModuleSpec(module.__name__, None, origin="here")
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(content)
    return Fake.made


def test_both_get_settings_numbers_and_pictures(fakes: list[Fake], tmp_path: Path) -> None:
    settings = config(wandb="flowers", mlflow="leaves")
    with RunFolder.create(tmp_path / "tiny", settings) as run:
        run.log("train", 5, 0.5, 1.0, {"total": 0.75, "lr": 0.5})
        run.log("eval", 5, 0.5, 1.0, {"knn_top1": 50.0})
        run.log("note", 5, 0.5, 1.0, {"text": "no number"})
        run.picture(5, {"original": png("red"), "reconstruction": png("blue")})
    wandb, mlflow = fakes
    assert wandb.options == {
        "project": "flowers",
        "name": "tiny",
        "save_dir": str(tmp_path / "tiny"),
        "id": None,
        "reinit": "create_new",
    }
    assert mlflow.options == {
        "experiment_name": "leaves",
        "run_name": "tiny",
        "tracking_uri": "somewhere",
        "run_id": None,
    }
    expected = [
        ("numbers", 5, {"train/total": 0.75, "train/lr": 0.5}),
        ("numbers", 5, {"eval/knn_top1": 50.0}),
        ("image", 5, "original", (8, 4), (255, 0, 0)),
        ("image", 5, "reconstruction", (8, 4), (0, 0, 255)),
    ]
    for logger, end in ((wandb, 0), (mlflow, "success")):
        kind, told = logger.told[0]
        assert kind == "settings"
        assert told["schedule"]["batch"] == 8
        assert logger.told[1:] == [*expected, ("end", end)]
    assert json.loads((tmp_path / "tiny" / "loggers.json").read_text()) == {"wandb": "new0", "mlflow": "new1"}


def test_a_server_of_mlflow_that_is_silent_is_given_up_soon(
    fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is MLflow's to do, by its variables; the user's word counts more."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    with RunFolder.create(tmp_path, config(mlflow="leaves")):
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


def test_a_resumed_run_continues_theirs(fakes: list[Fake], tmp_path: Path) -> None:
    settings = config(wandb="flowers", mlflow="leaves")
    with pytest.raises(KeyboardInterrupt), RunFolder.create(tmp_path, settings):
        raise KeyboardInterrupt
    assert [logger.told[-1] for logger in fakes] == [("end", 1), ("end", "failed")]
    RunFolder.create(tmp_path, settings, resume=True).close()
    *_, wandb, mlflow = fakes
    assert (wandb.options["id"], mlflow.options["run_id"]) == ("new0", "new1")
    assert [kind for kind, *_ in wandb.told] == ["settings", "end"]
    assert [kind for kind, *_ in mlflow.told] == ["end"], "MLflow refuses to change a parameter"


@pytest.mark.parametrize("what", ["numbers", "image", "end"])
def test_one_that_fails_is_noted_and_left_out(fakes: list[Fake], tmp_path: Path, what: str) -> None:
    run = RunFolder.create(tmp_path, config(wandb="flowers"))
    Fake.fails = what

    def train() -> None:
        for step in (5, 6):
            run.log("train", step, step / 10, 1.0, {"total": 0.75})
            run.picture(step, {"reconstruction": png()})
        run.close()

    with pytest.warns(UserWarning, match="wandb failed and gets no more: OSError: no network") as warned:
        train()
    assert len(warned) == 1
    (note,) = read_run(tmp_path).lines("note")
    assert (note["text"], note["step"]) == (
        "wandb failed and gets no more: OSError: no network",
        5 if what != "end" else 6,
    )
    assert [line["step"] for line in read_run(tmp_path).lines("train")] == [5, 6]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("wandb", "log in with `wandb login`, set WANDB_MODE=offline, or"), ("mlflow", "set MLFLOW_TRACKING_URI to")],
)
def test_one_that_does_not_start_is_answered_before_training(
    fakes: list[Fake], tmp_path: Path, name: str, advice: str
) -> None:
    Fake.fails = "start"
    with pytest.raises(RunError) as error:
        RunFolder.create(tmp_path, config(**{name: "flowers"}))
    assert f"run.{name}=flowers did not start (OSError: no network); {advice}" in str(error.value)
    assert str(error.value).endswith(f"or leave out run.{name}")
    Fake.fails = ""
    RunFolder.create(tmp_path, config(**{name: "flowers"})).close()  # nothing is left but the lock


def test_the_first_ends_where_the_second_does_not_start(
    fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise OSError("no server")

    monkeypatch.setattr(sys.modules["mlflow"], "get_tracking_uri", fail)
    with pytest.raises(RunError, match=r"run\.mlflow=leaves did not start"):
        RunFolder.create(tmp_path, config(wandb="flowers", mlflow="leaves"))
    assert fakes[0].told[-1] == ("end", 1)


@pytest.mark.parametrize(
    ("present", "missing"), [((), "packages wandb and lightning"), (("lightning",), "package wandb")]
)
def test_a_missing_package_is_answered_at_once(
    present: tuple[str, ...], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A folder that wandb leaves where it runs is not the package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))

    def find(name: str) -> ModuleSpec | None:
        if name in present:
            return ModuleSpec(name, None, origin="here")
        return ModuleSpec(name, None) if name == "wandb" else None

    monkeypatch.setattr("mimlet.config.find_spec", find)
    message = f"run.wandb needs the {missing}: pip install 'mimlet[wandb]'"
    with pytest.raises(ConfigError) as error:
        RunFolder.create(tmp_path / "run", config(wandb="flowers"))
    assert str(error.value) == message
    assert main(pretrain_arguments(tmp_path / "nowhere", tmp_path / "run", "run.wandb=flowers")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_trainings_side_by_side_have_a_run_each(fakes: list[Fake], tmp_path: Path) -> None:
    photos, out = make_folder(tmp_path / "photos", each=4), tmp_path / "out"
    small = ["encoder.image_size=16", "encoder.patch=4", "speed.accelerator=cpu", "run.report=false"]
    given = ["--data", str(photos), "--out", str(out), "--smoke", "--workers", "0", "run.wandb=flowers"]
    copy = tmp_path / "copy.toml"
    copy.write_text(recipe_paths()["mae_micro32"].read_text())
    assert main(["compare", "mae_micro32", str(copy), *small, *given]) == 0
    assert [logger.options["name"] for logger in fakes] == ["mae_micro32", "copy"]
    for logger in fakes:
        assert [step for kind, step, *_ in logger.told if kind == "numbers"] == [1, 2, 3]


def installed(*packages: str) -> None:
    """Skips the test without them. They take seconds to import: not when tests are collected."""
    for package in packages:
        pytest.importorskip(package)


@pytest.mark.filterwarnings("default")
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("wandb.integration", "lightning")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = pretrain(make_folder(tmp_path / "photos", each=8), tmp_path / "run", "run.wandb=flowers", "run.log_steps=1")
    (kept,) = (run / "wandb").glob("offline-run-*")
    identity = json.loads((run / "loggers.json").read_text())["wandb"]
    assert kept.name.endswith(identity)
    assert (kept / f"run-{identity}.wandb").stat().st_size > 1000
    shown = [path.name.split("_")[0] for path in (kept / "files" / "media" / "images").glob("*.png")]
    assert sorted(shown) == ["original", *4 * ["reconstruction"], "visible"]


@pytest.mark.filterwarnings("default")
def test_mlflow_itself_in_a_local_data_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("mlflow", "sqlalchemy", "lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    photos = make_folder(tmp_path / "photos", each=8)
    logged = ("run.mlflow=leaves", "run.log_steps=1", "run.checkpoint_steps=1")
    run = pretrain(photos, tmp_path / "run", *logged)
    more = ["--steps", "4", "--resume", "--allow-changes"]
    assert main([*pretrain_arguments(photos, run, *logged), *more]) == 0
    with sqlite3.connect(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")) as data:
        ((name, status),) = data.execute("select name, status from runs").fetchall()
        assert (name, status) == ("run", "FINISHED")
        metrics = data.execute("select step, value from metrics where key = 'train/total' order by step").fetchall()
        assert metrics == [(line["step"], line["total"]) for line in read_run(run).lines("train")]
        assert ("8",) in data.execute("select value from params where key = 'schedule/batch'").fetchall()
    assert len(list(tmp_path.glob("mlruns/**/reconstruction*.png"))) == 5
