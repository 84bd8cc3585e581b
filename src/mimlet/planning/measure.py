"""Short measurements on this machine: steps of the real method by the real loop, and loading of some real images."""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mimlet.config import Config
from mimlet.data.augment import left_to_device
from mimlet.data.batch import Batch
from mimlet.data.dataset import ImageDataset
from mimlet.data.decode import Encoded, UnreadableImage, decode
from mimlet.data.loader import training_batches
from mimlet.data.pixels import as_pillow
from mimlet.data.source import Source
from mimlet.errors import DataError
from mimlet.methods.base import Method
from mimlet.planning.models import random_batch
from mimlet.train.distributed import make_fabric
from mimlet.train.loop import fit

LARGEST = 256
"""Images of a measured piece, at most: more would not be faster."""
SAMPLE = 192
"""Images that are looked at."""
PACKED = 256
"""Short side of packed images, in px."""
QUALITY = 90
"""Of packed JPEG files."""
SECONDS = 4.0
"""For each form of loading, at most."""


@dataclass(frozen=True)
class Measured:
    """Steps on one device: images in each, median seconds of one, how many were timed; peak memory of a GPU in bytes,
    else 0.
    """

    images: int
    seconds: float
    steps: int
    memory: float


class _Enough(Exception):
    """Ends a measurement."""


def measure_steps(method: Method, config: Config, classes: int, images: int, seconds: float) -> Measured:
    """Trains on random data for so many seconds, or three steps if these take longer, on one device, in pieces of
    `images`, `LARGEST` at most. The first step, in which everything warms up, is not counted.
    """
    images = max(2, min(images, LARGEST))
    batch = random_batch(method, config, classes, images, min(images, 32))
    fabric = make_fabric(config.speed.model_copy(update={"devices": 1, "nodes": 1}))
    cuda = fabric.device.type == "cuda"
    moments: list[float] = []

    def batches(first: int, total: int) -> Generator[Batch, None, None]:
        while not (len(moments) > 3 and moments[-1] - moments[0] > seconds):
            if cuda:
                torch.cuda.synchronize()
            moments.append(perf_counter())
            yield batch
        raise _Enough

    update = {
        "schedule": config.schedule.model_copy(
            update={"batch": images, "steps": 10**9, "epochs": 0.0, "warmup_epochs": 0.0}
        ),
        "speed": config.speed.model_copy(update={"accumulate": 1}),
        "run": config.run.model_copy(update={"log_steps": 10**9, "checkpoint_minutes": 1e9, "checkpoint_steps": 0}),
    }
    with suppress(_Enough):
        fit(method, config.model_copy(update=update), fabric, batches, 10**6)
    steps = [after - before for before, after in pairwise(moments[1:])]
    memory = torch.cuda.max_memory_allocated(fabric.device) if cuda else 0
    return Measured(images, median(steps), len(steps), float(memory))


@dataclass(frozen=True)
class Loaded:
    """A form in which images may lie: bytes of one, and how many one core reads, decodes and augments in a second."""

    form: str
    size: float
    speed: float


def measure_loading(source: Source, method: Method, config: Config, device: str) -> list[Loaded]:
    """A sample of images as they lie, and packed as JPEG and as raw pixels of a short side of `PACKED` at most, loaded
    for a kind of device: a GPU finishes the crops itself.

    Raises `DataError` where none can be read.
    """
    chosen = np.random.default_rng(0).permutation(len(source))[:SAMPLE]
    sizes, pictures = list[int](), list[Image.Image]()
    for i in chosen.tolist():
        try:
            data = source.read(i)
            picture = as_pillow(decode(data))
        except (UnreadableImage, OSError):
            continue
        sizes.append(len(data) if isinstance(data, bytes) else 3 * picture.width * picture.height)
        pictures.append(_shrunk(picture))
    if not sizes:
        raise DataError(f"none of {len(chosen)} images of {source.describe()} can be read; look at one of them")
    jpeg, raw = [_jpeg(picture) for picture in pictures], [np.asarray(picture) for picture in pictures]
    return [
        Loaded("as it lies", float(np.mean(sizes)), _speed(source, chosen, method, config, device)),
        *(
            Loaded(form, float(np.mean(each)), _speed(Kept(records), np.arange(len(records)), method, config, device))
            for form, records, each in (
                ("packed, JPEG", jpeg, [len(record) for record in jpeg]),
                ("packed, raw", raw, [record.size for record in raw]),
            )
        ),
    ]


class Kept(Source):
    """Records in memory."""

    def __init__(self, records: Sequence[bytes | NDArray[np.uint8]]) -> None:
        self.records, self.classes = records, []
        self.labels: NDArray[np.int64] = np.full(len(records), -1)

    def name(self, i: int) -> str:
        """Its number."""
        return str(i)

    def read(self, i: int) -> Encoded:
        """Record i."""
        return self.records[i]

    def describe(self) -> str:
        """What it is."""
        return f"{len(self.records)} records"


def _speed(source: Source, chosen: NDArray[np.int64], method: Method, config: Config, device: str) -> float:
    """Images per second of one process with one thread, from the second batch on."""
    transform = method.transform(config.data.augment, config.encoder.image_size)
    dataset = ImageDataset(
        source,
        transform,
        method.masks(),
        seed=config.seed,
        indices=chosen,
        decoder=config.data.decoder,
        reduced=config.data.reduced_decode,
        on_device=left_to_device(config.speed.augment, transform, device),
    )
    batch = min(16, len(chosen))
    threads, began, done = torch.get_num_threads(), 0.0, 0
    torch.set_num_threads(1)
    try:
        with closing(training_batches(dataset, batch=batch, total_steps=max(2, len(chosen) // batch))) as batches:
            for number, _ in enumerate(batches):
                if number == 0:
                    began = perf_counter()
                    continue
                done += batch
                if perf_counter() - began > SECONDS:
                    break
        return done / (perf_counter() - began)
    finally:
        torch.set_num_threads(threads)


def _shrunk(image: Image.Image) -> Image.Image:
    width, height = image.size
    if (short := min(width, height)) <= PACKED:
        return image
    return image.resize((round(width * PACKED / short), round(height * PACKED / short)), Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
