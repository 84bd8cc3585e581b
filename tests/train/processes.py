"""What two and four processes do together; started from `test_distributed`."""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimlet.config import Config, SpeedSettings
from mimlet.data.batch import Batch
from mimlet.errors import DataError, RunError, TrainingStopped, TryAgain
from mimlet.methods.base import Clock, Method
from mimlet.run import RunFolder
from mimlet.train import optim
from mimlet.train.distributed import make_fabric, on_first
from mimlet.train.loop import Batches
from mimlet.train.sharded import local
from tests.train.toy import Toy, batches, config, train

SETTINGS = config(speed={"accumulate": 2}, optim={"name": "sgd", "lr": 0.1}, schedule={"eval_epochs": 2})


KILLED_AT = 9


def toy() -> Toy:
    return Toy(dropout=0, norm=False)


def divided(world: int, strategy: str = "fsdp") -> Config:
    """Whatever `world` and `strategy` are, the same experiment: AdamW, clipped, four pieces per step."""
    speed = {"accumulate": 4 // world, "strategy": strategy}
    return config(
        speed=speed, optim={"clip": 0.5}, run={"pictures": 2, "checkpoint_steps": 7}, schedule={"eval_epochs": 2}
    )


def follow_on(out: Path, settings: Config, stopped: bool = False) -> Toy:
    """Trains into `out` from whatever is there; SIGTERM arrives at step 9, where asked for."""
    fabric = make_fabric(settings.speed)
    run = RunFolder.create(out, settings, resume=True) if fabric.is_global_zero else None
    signals = {KILLED_AT: signal.SIGTERM} if stopped else None

    def evaluate(method: Method) -> dict[str, float]:
        assert all(type(parameter) is torch.nn.Parameter for parameter in method.parameters())
        return {"weight": float(method.get_parameter("head.weight").sum())}

    seen: list[int] = []

    def look(method: Method, step: int) -> None:
        """The first process alone."""
        copy_of = {name: value.clone() for name, value in method.state_dict().items()}
        assert sum(value.numel() for value in copy_of.values()) > 0
        seen.append(step)

    method = toy()
    try:
        train(settings, method, run, evaluate, signals=signals, look=look if run else None)
    except TrainingStopped:
        assert stopped
    finally:
        if run:
            run.close()
    assert not run or seen[-1:] == ([0] if stopped else [16])
    return method


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

    def refused() -> None:
        raise TryAgain("the first process alone finds the disk full")

    assert on_first(fabric, lambda: rank) == 0
    with pytest.raises(TryAgain, match="finds the disk full"):
        on_first(fabric, refused)

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

    # What a killed process left is continued (see `killed`).
    run = RunFolder.create(out / "killed", SETTINGS, resume=True) if first else None
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
    optimizers: list[torch.optim.Optimizer] = []
    make = optim.make_optimizer
    optim.make_optimizer = lambda *given, **options: optimizers.append(make(*given, **options)) or optimizers[-1]
    for strategy in ("fsdp", "ddp"):
        follow_on(out / f"{strategy}2", divided(2, strategy), stopped=True)
    held = torch.tensor([sum(local(state["exp_avg"]).numel() for state in each.state.values()) for each in optimizers])
    torch.distributed.all_reduce(held)
    assert held[0] * 2 == held[1]


def four(out: Path) -> None:
    """Continues under four processes, divided or not, what two have begun; and begins anew what one will continue."""
    first = make_fabric(divided(4).speed).is_global_zero
    if first:
        for strategy in ("fsdp", "ddp"):
            shutil.copytree(out / "fsdp2", out / f"fsdp2_{strategy}4")
        shutil.copytree(out / "ddp2", out / "ddp2_fsdp4")
    torch.distributed.barrier()
    finished = {
        "fsdp2_fsdp4": divided(4),
        "fsdp2_ddp4": divided(4, "ddp"),
        "ddp2_fsdp4": divided(4),
        "fsdp4": divided(4),
        "ddp4": divided(4, "ddp"),
    }
    for name, settings in finished.items():
        method = follow_on(out / name, settings)
        if first:
            torch.save(method.state_dict(), out / f"{name}.pt")
    follow_on(out / "fsdp4_stopped", divided(4), stopped=True)
    follow_on(out / "ddp4_stopped", divided(4, "ddp"), stopped=True)


def killed(out: Path) -> None:
    """The second process is killed in a step; what the first one says ends up in `killed.txt`."""
    fabric = make_fabric(SpeedSettings(accelerator="cpu", precision="32"))
    run = RunFolder.create(out / "killed", SETTINGS) if fabric.is_global_zero else None
    kill = {KILLED_AT: signal.SIGKILL} if run is None else None
    settings = SETTINGS.model_copy(update={"run": SETTINGS.run.model_copy(update={"checkpoint_steps": 7})})
    try:
        train(settings, toy(), run, lambda method: {"ranks": 0.0}, signals=kill)
    except TryAgain as error:
        (out / "killed.txt").write_text(str(error))
        sys.exit(75)


def unreadable(rank: int) -> Batches:
    """Files that only the second process cannot read, three per step."""

    def stream(start: int, total: int) -> Generator[Batch, None, None]:
        for i, batch in enumerate(batches(SETTINGS, rank, 2)(start, total)):
            files = tuple((f"{i}-{n}.jpg", "cut short") for n in range(1 + i % 2))
            yield Batch(batch.views, batch.indices, unreadable=files if rank == 1 else ())

    return stream


def together(job: Callable[[Path], None], world: int, out: Path) -> list[int]:
    """Does a job in several processes, which find each other as torchrun has its own do; their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "GROUP_RANK": "0"}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}

    def one(rank: str) -> None:
        os.environ.update(place | sizes | {"RANK": rank, "LOCAL_RANK": rank})
        job(out)

    fork = multiprocessing.get_context("fork")  # everything is imported once
    workers = [fork.Process(target=one, args=(str(rank),)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in reversed(workers):
        worker.join()
    return [worker.exitcode for worker in workers if worker.exitcode is not None]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    assert together(killed, 2, folder) == [75, -signal.SIGKILL]
    assert together(main, 2, folder) == [0, 0]
    assert together(four, 4, folder) == [0] * 4
