"""A method with everything the loop has to deal with, in a few hundred parameters; run as a script it trains itself."""

import copy
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.config import Config, load_config
from mimlet.data.batch import Batch
from mimlet.errors import TrainingStopped
from mimlet.methods.base import Clock, Method
from mimlet.run import RunFolder
from mimlet.train.distributed import make_fabric
from mimlet.train.loop import Batches, Evaluate, FitResult, Look, fit

IMAGES, SIDE = 24, 4


class Encoder(nn.Sequential):
    """A class of our own: the compiler leaves torch's containers alone."""

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images


class Toy(Method):
    """Predicts the images' mean from dropped-out features, which also follow a frozen teacher's and an average's."""

    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    ema: ClassVar[dict[str, str]] = {"average": "encoder"}
    steps: Tensor

    def __init__(self, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = Encoder(
            nn.Flatten(),
            nn.Linear(3 * SIDE**2, 8),
            nn.BatchNorm1d(8) if norm else nn.Identity(),
            nn.GELU(),
            nn.Dropout(dropout),
        )
        self.average = copy.deepcopy(self.encoder)
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 1)
        self.idle = nn.Linear(8, 5)
        self.weights = {"mean": 1.0, "teacher": 0.5}
        self.modes: set[tuple[bool, bool, bool]] = set()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def build(cls, config: Config, classes: int = 0) -> "Toy":
        return cls()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        self.modes.add((self.encoder.training, self.average.training, self.teacher.training))
        features = self.encoder(batch.images)
        with torch.no_grad():
            target = self.teacher(batch.images) + self.average(batch.images)
        mean = F.mse_loss(self.head(features).squeeze(1).float(), batch.images.mean((1, 2, 3)))
        return {"mean": mean, "teacher": F.mse_loss(features, target), "noise": torch.rand(())}

    def ema_momentum(self, clock: Clock) -> float:
        return 0.5 + 0.4 * clock.progress

    def after_step(self, clock: Clock) -> None:
        assert int(self.steps) == clock.step
        self.steps += 1


def config(**sections: Any) -> Config:
    """16 steps of 8 images, 3 steps per epoch, a checkpoint at the end only."""
    values: dict[str, Any] = {
        "seed": 5,
        "method": {"name": "mae"},
        "data": {},
        "optim": {"lr": 1e-2, "lr_batch": 0, "betas": (0.9, 0.95)},
        "schedule": {"batch": 8, "steps": 16, "warmup": 0.25, "eval_epochs": 0},
        "speed": {"accumulate": 2, "accelerator": "cpu", "precision": "32"},
        "run": {"log_steps": 4, "tensorboard": False, "keep": 2},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return load_config(values)


def batches(settings: Config, rank: int = 0, world: int = 1, signals: dict[int, int] | None = None) -> Batches:
    """Images that depend on nothing but the step; `signals`: step -> signal raised before its last micro-batch."""
    size, pieces = settings.schedule.batch, settings.speed.accumulate

    def stream(start: int, total: int) -> Generator[Batch, None, None]:
        for step in range(start, total):
            images = torch.randint(0, 256, (size, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(step))
            parts = images.to(torch.uint8).chunk(pieces * world)
            for piece in range(pieces):
                if signals and step in signals and piece == pieces - 1:
                    os.kill(os.getpid(), signals[step])
                number = piece * world + rank
                indices = torch.arange(size * step, size * (step + 1)).chunk(pieces * world)
                yield Batch({"image": parts[number]}, indices[number])

    return stream


def train(
    settings: Config | None = None,
    method: Method | None = None,
    run: RunFolder | None = None,
    evaluate: Evaluate | None = None,
    stream: Batches | None = None,
    signals: dict[int, int] | None = None,
    judge_start: bool = False,
    look: Look | None = None,
) -> tuple[Method, FitResult]:
    """One training in this process."""
    settings, method = settings or config(), method or Toy()
    fabric = make_fabric(settings.speed)
    stream = stream or batches(settings, fabric.global_rank, fabric.world_size, signals)
    per_epoch = IMAGES // settings.schedule.batch
    return method, fit(
        method, settings, fabric, stream, per_epoch, run=run, evaluate=evaluate, judge_start=judge_start, look=look
    )


def main(out: Path, number: int) -> None:
    """Trains into `out`; signal `number` arrives at step 9, the newest checkpoint being of step 7."""
    settings = config(run={"checkpoint_steps": 7})
    with RunFolder.create(out, settings, resume=True) as run:
        train(settings, run=run, signals={9: number} if number else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]), signal.Signals[sys.argv[2]])
    except TrainingStopped as stopped:
        sys.exit(stopped.code)
