"""Images per second of one processor, from files to a batch: ours beside torchvision's ImageFolder, packed and not.

    python -m benchmarks.loader [--data IMAGES] [--rounds 9] [--only photos,small,large,jitter,render]

The images are made first: photographs of 500 x 375 px (JPEG, quality 95, about 60 kB) and of 12 megapixels, and images
of 32 px, enlarged or reduced from the first of IMAGES (any data path), else from random pictures, with a grain as
sensors have it. Every contender is a process of one thread that yields a batch at a time in turn, and is measured by
processor time. Ratios carry over to other machines, seconds do not.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.alternate import Job, measure
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, AugmentSettings
from mimlet.data.augment import training_transform
from mimlet.data.dataset import ImageDataset
from mimlet.data.decode import Decoder, decode
from mimlet.data.joint import JointDataset
from mimlet.data.loader import training_batches
from mimlet.data.masks import RandomMasking
from mimlet.data.packing import pack
from mimlet.data.pixels import as_pillow
from mimlet.data.source import open_source

Step = Callable[[], float]
BATCH = 64
PHOTOS, SMALL, LARGE = (256, (500, 375)), (512, (32, 32)), (16, (4000, 3000))
"""How many images, and of how many pixels."""
GRAIN = 2.0
"""Deviation of the noise in grey levels: it brings enlarged photographs to the bytes of real ones."""


def mimlet_batches(
    batch: int,
    bf16: bool,
    folder: str,
    size: int = 224,
    jitter: float = 0.0,
    on_device: bool = False,
    decoder: Decoder = "pillow",
    reduced: bool = False,
) -> Step:
    """Random resized crop, flip and mask, uint8; a step is a batch."""
    transform = training_transform(AugmentSettings(interpolation="bicubic", color_jitter=jitter), size, "student")
    masks = {"mask": RandomMasking(196, 0.75)}
    data = ImageDataset(open_source([folder]), transform, masks, decoder=decoder, reduced=reduced, on_device=on_device)
    stream = training_batches(JointDataset([data]), batch=min(batch, len(data)), total_steps=10**9)
    return lambda: float(len(next(stream)))


def render(batch: int, bf16: bool, folder: str, jitter: float = 0.0) -> Step:
    """What is left to the device, on a processor; a step is always the same batch."""
    transform = training_transform(AugmentSettings(interpolation="bicubic", color_jitter=jitter), 224, "student")
    data = ImageDataset(open_source([folder]), transform, on_device=True)
    cuts = next(training_batches(data, batch=batch, total_steps=1)).cuts
    assert cuts is not None
    return lambda: float(cuts.render("cpu")["image"][0, 0, 0, 0])


def image_folder(batch: int, bf16: bool, folder: str, size: int = 224, interpolation: str = "bicubic") -> Step:
    """torchvision's ImageFolder and the usual recipe, as in MAE's and DeiT's code."""
    from torchvision import datasets, transforms

    usual = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (0.08, 1.0), interpolation=transforms.InterpolationMode(interpolation)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    data = datasets.ImageFolder(folder, usual)
    loader = torch.utils.data.DataLoader(data, batch_size=min(batch, len(data)), shuffle=True, drop_last=True)
    stream = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: float(len(next(stream)[0]))


def pictures(data: list[str], count: int, size: tuple[int, int]) -> Iterator[Image.Image]:
    """`count` images of `size`, from the first of `data` or drawn, with grain."""
    generator = np.random.default_rng(0)
    source = open_source(data) if data else None
    for i in range(count):
        if source:
            picture = as_pillow(decode(source.read(i % len(source))))
        else:
            picture = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        fitted = np.asarray(ImageOps.fit(picture, size, Image.Resampling.BICUBIC))
        yield Image.fromarray((fitted + GRAIN * generator.standard_normal(fitted.shape)).clip(0, 255).astype(np.uint8))


def write(folder: Path, images: Iterator[Image.Image], kind: str, **options: int) -> str:
    """As one class of a folder; says how large the files are."""
    (folder / "class").mkdir(parents=True)
    sizes = []
    for i, image in enumerate(images):
        file = folder / "class" / f"{i:04d}.{kind}"
        image.save(file, **options)  # type: ignore[arg-type]
        sizes.append(file.stat().st_size)
    print(
        f"{folder.name}: {len(sizes)} images of {image.width} x {image.height} px, {np.mean(sizes) / 1e3:.0f} kB each"
    )
    return str(folder)


def ours(label: str, *options: object) -> Job:
    return Job(label, "loader:mimlet_batches", False, options)


def photos_jobs(photos: str, jpeg: str, raw: str) -> list[Job]:
    decoders = ["torchvision", *(["torchcodec"] if find_spec("torchcodec") else [])]
    return [
        Job("ImageFolder, Pillow, bicubic, float", "loader:image_folder", False, (photos, 224)),
        Job("ImageFolder, Pillow, bilinear, float", "loader:image_folder", False, (photos, 224, "bilinear")),
        ours("mimlet, folder", photos),
        *(ours(f"mimlet, folder, {name}", photos, 224, 0.0, False, name) for name in decoders),
        ours("mimlet, folder, crops for the device", photos, 224, 0.0, True),
        ours("mimlet, packed JPEG 256", jpeg),
        *(ours(f"mimlet, packed JPEG 256, {name}", jpeg, 224, 0.0, False, name) for name in decoders),
        ours("mimlet, packed JPEG 256, crops for the device", jpeg, 224, 0.0, True),
        ours("mimlet, packed raw 256", raw),
        ours("mimlet, packed raw 256, crops for the device", raw, 224, 0.0, True),
    ]


def report(title: str, jobs: list[Job], batch: int, rounds: int) -> None:
    results = measure(jobs, batch, rounds, threads=1)
    print(f"\n{title}: images per second of one processor, medians of {rounds} alternating batches of {batch}")
    rates = {job.label: batch / results[job.label].median for job in jobs}
    for job in jobs:
        rate = rates[job.label]
        print(f"{job.label:50}{rate:9.0f}{rate / rates[jobs[0].label]:8.2f} x the first{1e6 / rate:9.0f} us each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="photos,small,large,jitter,render")
    arguments = parser.parse_args()
    chosen, rounds = arguments.only.split(","), arguments.rounds
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if {"photos", "jitter", "render"} & set(chosen):
            photos = write(scratch / "photos", pictures(arguments.data, *PHOTOS), "jpg", quality=95)
            jpeg, raw = str(scratch / "packed_jpeg"), str(scratch / "packed_raw")
            pack(photos, jpeg, form="jpeg", workers=0)
            pack(photos, raw, form="raw", workers=0)
        if "photos" in chosen:
            report("Photographs, crops of 224 px", photos_jobs(photos, jpeg, raw), BATCH, rounds)
        if "jitter" in chosen:
            jobs = [
                ours("without jitter", raw),
                ours("view and jittered view (TinyMIM)", raw, 224, 0.4),
                ours("the same, for the device", raw, 224, 0.4, True),
            ]
            report("Colour jitter, packed raw 256", jobs, BATCH, rounds)
        if "render" in chosen:
            jobs = [
                Job("resized and mirrored", "loader:render", False, (raw,)),
                Job("and a jittered view", "loader:render", False, (raw, 0.4)),
            ]
            report("What is left to the device, on a processor", jobs, BATCH, max(1, rounds // 3))
        if "small" in chosen:
            small = write(scratch / "small", pictures(arguments.data, *SMALL), "png")
            packed = str(scratch / "packed_small")
            pack(small, packed, form="raw", side=32, workers=0)
            jobs = [
                Job("ImageFolder, Pillow, bicubic, float", "loader:image_folder", False, (small, 32)),
                ours("mimlet, folder", small, 32),
                ours("mimlet, packed raw", packed, 32),
                ours("mimlet, packed raw, crops for the device", packed, 32, 0.0, True),
            ]
            report("Images of 32 px (PNG)", jobs, 4 * BATCH, rounds)
        if "large" in chosen:
            large = write(scratch / "large", pictures(arguments.data, *LARGE), "jpg", quality=90)
            jobs = [
                Job("ImageFolder, Pillow, bicubic, float", "loader:image_folder", False, (large, 224)),
                ours("mimlet, whole", large),
                ours("mimlet, reduced where the crop allows it", large, 224, 0.0, False, "pillow", True),
            ]
            report("Photographs of 12 megapixels", jobs, 8, rounds)


if __name__ == "__main__":
    main()
