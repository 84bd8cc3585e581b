"""The packing of images, killed: the same command goes on and comes to the same bytes."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.data.images import make_folder
from tests.faults.nursery import Nursery, Process


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for three shards."""
    return make_folder(tmp_path_factory.mktemp("many") / "all", each=50)


def pack(nursery: Nursery, photos: Path, to: Path, *fault: object, workers: int = 0) -> Process:
    given = ["--form", "raw", "--side", "16", "--workers", str(workers)]
    return nursery.start(["pack", str(photos), "--to", str(to), *given], to.with_name("said.log"), *fault)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_at_every_touch_of_a_file(full: bool, nursery: Nursery, photos: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert pack(nursery, photos, whole, "die", 0, whole).wait() == 0
    events = whole.with_name("whole.events").read_text().splitlines()
    chosen = range(1, len(events) + 1)
    for event in chosen if full else random.Random(0).sample(chosen, 2):
        to = tmp_path / f"pack{event}"
        process = pack(nursery, photos, to, "die", event, to)
        assert process.wait() == -signal.SIGKILL, f"event {event}, {events[event - 1]}: {process.said}"
        process = pack(nursery, photos, to)
        assert process.wait() == 0, f"event {event}, {events[event - 1]}: {process.said}"
        assert contents(to) == contents(whole), f"event {event}, {events[event - 1]}"


def test_killed_at_a_random_moment(full: bool, nursery: Nursery, photos: Path, tmp_path: Path) -> None:
    """With loader processes, by every signal, alone or along with them."""
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert pack(nursery, photos, whole, workers=2).wait() == 0
    took = time.monotonic() - began
    for seed in range(20 if full else 1):
        draw, to = random.Random(seed), tmp_path / f"pack{seed}"
        number = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        process = pack(nursery, photos, to, workers=2)
        time.sleep(draw.uniform(0, took))
        process.send(number, group=draw.random() < 0.5)
        assert process.wait() in (0, -number, 128 + number), f"seed {seed}: {process.said}"
        assert "Traceback" not in process.said, f"seed {seed}: {process.said}"
        process = pack(nursery, photos, to, workers=2)
        assert process.wait() == 0, f"seed {seed}: {process.said}"
        assert contents(to) == contents(whole), f"seed {seed}"
