"""What two processes do together; started by torchrun from `test_distributed`."""

import signal
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimlet.config import SpeedSettings
from mimlet.data.batch import Batch
from mimlet.errors import DataError, RunError, TrainingStopped
from mimlet.methods.base import Clock, Method
from mimlet.run import RunFolder
from mimlet.train.distributed import make_fabric
from mimlet.train.loop import Batches
from tests.train.toy import Toy, batches, config, train

SETTINGS = config(speed={"accumulate": 2}, optim={"name": "sgd", "lr": 0.1}, schedule={"eval_epochs": 2})


def toy() -> Toy:
    return Toy(dropout=0, norm=False)


class ExplodesOnSecond(Toy):
    """One process alone meets a loss that is not finite."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        losses = super().forward(batch, clock)
        if clock.step == 5 and torch.distributed.get_rank() == 1:
            losses["mean"] = losses["mean"] + float("nan")
        return losses


def main(out: Path) -> None:
    fabric = make_fabric(SpeedSettings(accelerator="cpu", precision="32"))
    assert fabric.world_size == 2
    first, rank = fabric.is_global_zero, fabric.global_rank

    def evaluate(method: Method) -> dict[str, float]:
        ranks = torch.full((1,), float(rank + 1))
        torch.distributed.all_reduce(ranks)
        return {"ranks": ranks.item()}

    whole, result = train(SETTINGS, toy(), RunFolder.create(out / "whole", SETTINGS) if first else None, evaluate)
    assert result.best == {"ranks": 3.0}

    # A signal that reaches the second process only stops both, at the next step that logs.
    run = RunFolder.create(out / "stopped", SETTINGS) if first else None
    with pytest.raises(TrainingStopped, match="by SIGTERM after step 6 of 16"):
        train(SETTINGS, toy(), run, evaluate, signals={4: signal.SIGTERM} if rank == 1 else None)
    if run:
        run.close()
    run = RunFolder.create(out / "stopped", SETTINGS, resume=True) if first else None
    resumed, _ = train(SETTINGS, toy(), run, evaluate)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    run = RunFolder.create(out / "exploded", SETTINGS) if first else None
    with pytest.raises(RunError, match="not all numbers are finite"):
        train(SETTINGS, ExplodesOnSecond(dropout=0, norm=False), run)

    run = RunFolder.create(out / "unreadable", SETTINGS) if first else None
    with pytest.raises(DataError, match="12 of 32 images"):
        train(SETTINGS, toy(), run, stream=unreadable(rank))
    if first:
        torch.save(whole.state_dict(), out / "weights.pt")


def unreadable(rank: int) -> Batches:
    """Files that only the second process cannot read, three per step."""

    def stream(start: int, total: int) -> Generator[Batch, None, None]:
        for i, batch in enumerate(batches(SETTINGS, rank, 2)(start, total)):
            files = tuple((f"{i}-{n}.jpg", "cut short") for n in range(1 + i % 2))
            yield Batch(batch.views, batch.indices, unreadable=files if rank == 1 else ())

    return stream


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
