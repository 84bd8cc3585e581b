"""Where numbers and pictures of a training go beside its run folder: TensorBoard, Weights & Biases, MLflow.

The last two go through Lightning's own loggers and are optional packages. Importing this needs none of them, and no
torch.
"""

from __future__ import annotations

import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from mimlet.atomic import write_atomic
from mimlet.config import Config, check_packages
from mimlet.errors import RunError
from mimlet.untrusted import parse_json, what_is_wrong

if TYPE_CHECKING:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

IDS_FILE = "loggers.json"
"""In the run folder: what W&B and MLflow know the run by, so that a resumed run continues there."""


class Sink(ABC):
    """One of those places. `step`: optimiser steps done."""

    @abstractmethod
    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; they arrive as `kind/name`."""

    @abstractmethod
    def image(self, name: str, step: int, png: bytes) -> None:
        """A picture."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Nothing more comes. `failed`: the training was stopped by an error or a signal."""


def open_sinks(folder: Path, config: Config) -> dict[str, Sink]:
    """The places that `config.run` names, by name, started: W&B and MLflow continue the run they know from before.

    Raises `ConfigError` where a package is missing, `RunError` where one of them does not start.
    """
    check_packages(config)
    path = folder / IDS_FILE
    ids = _known_ids(path)
    sinks: dict[str, Sink] = {"tensorboard": TensorBoard(folder)} if config.run.tensorboard else {}
    starts: dict[str, tuple[str, Callable[[Path, Config, str | None], Wandb | MLflow]]] = {
        "wandb": ("log in with `wandb login`, set WANDB_MODE=offline", Wandb),
        "mlflow": ("set MLFLOW_TRACKING_URI to a server or a data base that can be reached", MLflow),
    }
    for name, (advice, start) in starts.items():
        if not getattr(config.run, name):
            continue
        try:
            sinks[name] = sink = start(folder, config, ids.get(name))
        except Exception as error:  # whatever these packages raise: no network, no account, no such run
            abandon(sinks)
            reason = " ".join(str(error).split())
            raise RunError(
                f"run.{name}={getattr(config.run, name)} did not start ({type(error).__name__}: {reason}); "
                f"{advice}, or leave out run.{name}"
            ) from error
        ids[name] = sink.id
        write_atomic(path, json.dumps(ids, indent=2) + "\n")
    return sinks


def _known_ids(path: Path) -> dict[str, str]:
    try:
        return TypeAdapter(dict[str, str]).validate_python(parse_json(path.read_bytes())) if path.is_file() else {}
    except ValueError as error:
        raise RunError(f"{path} is damaged: {what_is_wrong(error)}; delete it to start the loggers anew") from None


def abandon(sinks: Mapping[str, Sink]) -> None:
    """Closes what was started in vain."""
    for sink in sinks.values():
        with suppress(Exception):
            sink.close(failed=True)


class TensorBoard(Sink):
    """Event files in the run folder. What lies at `purge_step` or later is forgotten; set it before the first value."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        self.purge_step: int | None = None

    @cached_property
    def writer(self) -> SummaryWriter:
        """Opened with the first value."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=self.purge_step)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One curve per name."""
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)

    def image(self, name: str, step: int, png: bytes) -> None:
        """One strip of pictures per name."""
        import numpy as np

        self.writer.add_image(name, np.asarray(_opened(png)), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        """Flushes."""
        if "writer" in self.__dict__:
            self.writer.close()


class Wandb(Sink):
    """A run of Weights & Biases, through the logger that Fabric documents. `WANDB_MODE` and the like are honoured."""

    def __init__(self, folder: Path, config: Config, id: str | None) -> None:
        from wandb.integration.lightning.fabric import WandbLogger

        # create_new: trainings side by side have a run each
        self.logger = WandbLogger(
            project=config.run.wandb, name=folder.name, save_dir=str(folder), id=id, reinit="create_new"
        )
        self.logger.log_hyperparams(_settings(config))
        self.id: str = self.logger.experiment.id

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Over the axis `trainer/global_step`."""
        self.logger.log_metrics({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def image(self, name: str, step: int, png: bytes) -> None:
        """Over the same axis."""
        self.logger.log_image(name, [_opened(png)], step=step)

    def close(self, failed: bool) -> None:
        """Waits until everything is handed over."""
        self.logger.experiment.finish(exit_code=int(failed))


class MLflow(Sink):
    """A run of MLflow, where `MLFLOW_TRACKING_URI` says, else in its usual local place.

    A server that does not answer is given up within a minute, unless MLflow's own variables say otherwise: by its
    defaults the training would wait for several.
    """

    def __init__(self, folder: Path, config: Config, id: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
        import mlflow
        from lightning.pytorch.loggers import MLFlowLogger

        self.logger = MLFlowLogger(
            config.run.mlflow, run_name=folder.name, tracking_uri=mlflow.get_tracking_uri(), run_id=id
        )
        self.id: str = self.logger.run_id
        if id is None:  # they can never be changed
            self.logger.log_hyperparams(_settings(config))

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One metric per name."""
        self.logger.log_metrics({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def image(self, name: str, step: int, png: bytes) -> None:
        """One image per name and step."""
        self.logger.experiment.log_image(self.id, _opened(png), key=name, step=step)

    def close(self, failed: bool) -> None:
        """Says how the run ended."""
        self.logger.finalize("failed" if failed else "success")


def _settings(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"sweep"})


def _opened(png: bytes) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")
