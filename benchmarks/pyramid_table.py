"""Does pre-training the feature pyramid, and handing it on, help a dense task? iTPN's Table 8 at a small size.

    python -m benchmarks.pyramid_table --train tiny_imagenet_100/train.parquet --dense camvid --out runs/pyramid \\
        --steps 800 --dense-steps 300 --seeds 0 1

Pre-trains one small backbone in three ways: HiViT-MAE (no pyramid), pixels through the pyramid, and pixels with masked
feature modelling. Then a linear segmenter on the pyramid's levels is trained, once with everything below it frozen and
once with everything trained, where the pyramid is either the pre-trained one or a fresh one. Every step skips what is
finished; the table is made from the results on disk.

--dense: a folder with images/{training,test} and annotations/{training,test} in ADE20K's way (0 = void).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mimlet.atomic import write_atomic
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, EncoderSettings, merge, read_recipe, set_length, validate
from mimlet.errors import DataError
from mimlet.models.build import build_encoder
from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps
from mimlet.models.weights import ENCODER_FILE, load_encoder_weights

PATCH, SIZE = 8, 64
ENCODER = {"name": "itpn_micro", "patch": PATCH, "image_size": SIZE}


@dataclass(frozen=True)
class Start:
    """One row of the table: where the backbone comes from, and whether its pyramid comes with it."""

    title: str
    weights: Literal["", "hivit", "pixels", "features"]
    pyramid: bool


STARTS = {
    "scratch": Start("no pre-training", "", False),
    "hivit": Start("HiViT-MAE, no pyramid in pre-training", "hivit", False),
    "pixels_fresh": Start("iTPN, pixels; pyramid not loaded", "pixels", False),
    "pixels": Start("iTPN, pixels; pyramid loaded", "pixels", True),
    "features_fresh": Start("iTPN, pixels + features; pyramid not loaded", "features", False),
    "features": Start("iTPN, pixels + features; pyramid loaded", "features", True),
}
Protocol = Literal["frozen", "trained"]
PROTOCOLS: tuple[Protocol, ...] = ("frozen", "trained")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="images for pre-training")
    parser.add_argument("--dense", type=Path, help="folder of images with label maps")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800, help="of pre-training, of 128 images")
    parser.add_argument("--dense-steps", type=int, default=300, help="of the segmenter, of 16 images")
    parser.add_argument("--dense-size", type=int, nargs=2, default=(120, 160), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", choices=("pretrain", "dense", "table"), default=["pretrain", "dense", "table"]
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    for seed in given.seeds:
        if "pretrain" in given.only:
            pretrain(given, seed)
        if "dense" in given.only:
            judge(given, seed)
    if "table" in given.only:
        print(table(given.out))


def pretrain(given: argparse.Namespace, seed: int) -> None:
    """The three pre-trainings of a seed that are not there yet."""
    from mimlet.api import train

    for weights in ("hivit", "pixels", "features"):
        out = folder(given.out, seed, weights)
        if (out / ENCODER_FILE).is_file():
            continue
        values = read_recipe("itpn_micro32")
        merge(values, {"encoder": ENCODER, "seed": seed, "data": {"path": [given.train]}})
        if weights != "features":
            values["method"] = {"name": "mae", "mask_ratio": values["method"]["mask_ratio"]}
            values["method"]["decoder"] = read_recipe("itpn_micro32")["method"]["decoder"]
        if weights == "hivit":
            merge(values, {"encoder": {"name": "hivit_micro"}})
        set_length(values, None, given.steps)
        merge(values, {"schedule": {"batch": 128}, "optim": {"lr": 1e-3}})
        merge(values, {"run": {"out": str(out), "tensorboard": False, "report": False}})
        train(validate(values), resume=True)


def judge(given: argparse.Namespace, seed: int) -> None:
    """Trains the segmenters of a seed that have no result yet, and writes what they reach."""
    data = Dense(given.dense, given.dense_size)
    for name in given.starts:
        for protocol in given.protocols:
            at = folder(given.out, seed, f"{name}-{protocol}.json")
            if at.exists():
                continue
            start = STARTS[name]
            encoder = started(start, folder(given.out, seed, start.weights) if start.weights else None, seed)
            found = segment(encoder, data, protocol, given.dense_steps, seed)
            print(f"seed {seed}, {start.title}, {protocol}: {found}", flush=True)
            write_atomic(at, json.dumps(found))


def folder(out: Path, seed: int, name: str) -> Path:
    return out / f"seed{seed}" / name


def started(start: Start, weights: Path | None, seed: int) -> Encoder:
    """The encoder of a row; what is not loaded is drawn by the seed."""
    torch.manual_seed(seed)
    encoder = build_encoder(EncoderSettings(**ENCODER))
    if weights is None:
        return encoder
    if start.pyramid:
        load_encoder_weights(encoder, weights)
        return encoder
    bare = build_encoder(EncoderSettings(**ENCODER, pyramid_depth=0))
    load_encoder_weights(bare, weights)
    encoder.load_state_dict({**encoder.state_dict(), **bare.state_dict()})
    return encoder


class Dense:
    """Images [n,3,h,w], normalised, and label maps [n,h,w] (-1 = void) of a folder, in memory."""

    def __init__(self, root: Path, size: tuple[int, int]) -> None:
        self.train, self.test = (self.read(root, part, size) for part in ("training", "test"))
        self.classes = 1 + int(max(labels.max() for _, labels in (self.train, self.test)))

    @staticmethod
    def read(root: Path, part: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        files = sorted((root / "images" / part).glob("*.jpg"))
        if not files:
            raise DataError(f"no images in {root / 'images' / part}; expected images and annotations in ADE20K's way")
        rows, columns = size
        images, maps = [], []
        for file in files:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB").resize((columns, rows), Image.Resampling.BICUBIC)))
            with Image.open(root / "annotations" / part / f"{file.stem}.png") as labels:
                maps.append(np.asarray(labels.resize((columns, rows), Image.Resampling.NEAREST)))
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        mean_, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (pixels - mean_) / std, torch.from_numpy(np.stack(maps)).long() - 1

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random batches, flipped half of the time."""
        images, labels = self.train
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(images), (size,), generator=generator)
            x, y = images[chosen], labels[chosen]
            flip = torch.rand(size, generator=generator) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
            yield x, torch.where(flip[:, None, None], y.flip(-1), y)


class LinearSegmenter(nn.Module):
    """A norm and a linear map per level, summed at the finest one: nothing of it can stand in for a pyramid."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.strides = encoder, tuple(sorted(encoder.levels))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(encoder.levels[s]), nn.Conv2d(encoder.levels[s], classes, 1))
            for s in self.strides
        )

    def forward(self, images: Tensor, frozen: bool = False) -> Tensor:
        """[B,3,h,w] -> class scores at the finest level's size."""
        with torch.no_grad() if frozen else nullcontext():
            levels = self.encoder(images, taps=Taps(levels=self.strides, tokens=False)).levels
        scores = [head(levels[s]).float() for s, head in zip(self.strides, self.heads, strict=True)]
        size = scores[0].shape[-2:]
        return torch.stack([F.interpolate(x, size, mode="bilinear", align_corners=False) for x in scores]).sum(0)


def segment(encoder: Encoder, data: Dense, protocol: Protocol, steps: int, seed: int) -> dict[str, float]:
    """Trains a segmenter (AdamW, warm-up and cosine) and returns mean IoU and pixel accuracy on the test images, in
    percent.
    """
    torch.manual_seed(seed)
    model, frozen = LinearSegmenter(encoder, data.classes), protocol == "frozen"
    groups = [{"params": list(model.heads.parameters()), "peak": 1e-2 if frozen else 1e-3}]
    if not frozen:
        groups.append({"params": [p for p in encoder.parameters() if p.requires_grad], "peak": 1e-3})
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.05)
    model.train()
    for step, (images, labels) in enumerate(data.batches(16, steps, seed)):
        warm = min(1.0, (step + 1) / (0.1 * steps))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warm * 0.5 * (1 + np.cos(np.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(images, frozen)
        scores = F.interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(scores, labels, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return evaluate(model.eval(), data)


@torch.no_grad()
def evaluate(model: LinearSegmenter, data: Dense) -> dict[str, float]:
    images, labels = data.test
    confusion = torch.zeros(data.classes, data.classes, dtype=torch.long)
    for at in range(0, len(images), 26):
        x, y = images[at : at + 26], labels[at : at + 26]
        scores = F.interpolate(model(x), y.shape[-2:], mode="bilinear", align_corners=False)
        known = y >= 0
        pairs = y[known] * data.classes + scores.argmax(dim=1)[known]
        confusion += torch.bincount(pairs, minlength=data.classes**2).view(data.classes, data.classes)
    right = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return {"miou": 100 * float((right / union).mean()), "accuracy": 100 * float(right.sum() / confusion.sum())}


def table(out: Path) -> str:
    """Markdown: mean IoU by seed of what is there."""
    lines = ["| backbone | frozen: seeds | frozen: mean | trained: seeds | trained: mean |", "| --- " * 5 + "|"]
    for name, start in STARTS.items():
        cells = []
        for protocol in PROTOCOLS:
            files = sorted(out.glob(f"seed*/{name}-{protocol}.json"))
            values = [json.loads(file.read_text(encoding="utf-8"))["miou"] for file in files]
            cells += [", ".join(f"{value:.1f}" for value in values) or "–", f"{mean(values):.1f}" if values else "–"]
        lines.append(f"| {start.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
