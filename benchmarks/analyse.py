"""CKA between all layers of two ViT-Tiny, beside a plain formulation: seconds of the processor and peak memory,
each in a process of its own.

    python -m benchmarks.analyse --images 1152

Plain: all features of all images are kept, then every pair of layers gets its kernels and its HSIC, minibatch by
minibatch, as the equation is written. Both see the same images (generated, 224 px) in minibatches of 128 and must
agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimlet.analyse.analysis import Measures, measure, views_for
from mimlet.analyse.subject import Subject
from mimlet.data.loader import evaluation_batches
from mimlet.data.source import Source
from mimlet.models.features import Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT

BATCH = 128


class Generated(Source):
    """So many smooth random images."""

    def __init__(self, images: int) -> None:
        self.classes, self.labels = [], np.full(images, -1)

    def name(self, i: int) -> str:
        return str(i)

    def read(self, i: int) -> Image.Image:
        coarse = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)

    def describe(self) -> str:
        return f"{len(self)} generated images"


def subjects() -> list[Subject]:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(Subject(ViT(ViTShape()), f"ViT-Tiny {seed}", "random weights"))
    return made


def ours(images: int) -> Tensor:
    models = subjects()
    what = Measures(attention=False, health=False)
    _, found = measure(models, views_for(models, Generated(images)), BATCH, what)
    return torch.tensor(found[1].cka)


def hsic(X: Tensor, Y: Tensor) -> float:
    n = len(X)
    K, L = X @ X.T, Y @ Y.T
    K.fill_diagonal_(0)
    L.fill_diagonal_(0)
    ones = torch.ones(n, 1)
    value = (K @ L).trace() + ones.T @ K @ ones @ ones.T @ L @ ones / ((n - 1) * (n - 2))
    value = value - 2 / (n - 2) * (ones.T @ K @ L @ ones)
    return float(value) / (n * (n - 3))


def plain(images: int) -> Tensor:
    models = subjects()
    kept: list[list[list[Tensor]]] = [[[] for _ in range(13)] for _ in models]
    for batch in evaluation_batches(views_for(models, Generated(images)), batch=BATCH):
        for model, layers in zip(models, kept, strict=True):
            features = model.features(batch.views[model.view], Taps(normed=tuple(range(13)), tokens=False))
            for layer, tokens in features.normed.items():
                layers[layer].append(tokens[:, 1:].flatten(1))

    def mean(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        return statistics.mean(hsic(X, Y) for X, Y in pairs)

    return torch.tensor(
        [
            [
                mean(zip(a, b, strict=True)) / (mean(zip(a, a, strict=True)) * mean(zip(b, b, strict=True))) ** 0.5
                for b in kept[1]
            ]
            for a in kept[0]
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1152)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=["ours", "plain"], help="run one here and print its result as JSON")
    options = parser.parse_args()
    if options.only:
        began = time.process_time()
        cka = (ours if options.only == "ours" else plain)(options.images)
        seconds = time.process_time() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "memory": memory, "cka": cka.tolist()}))
        return
    results: dict[str, list[dict[str, object]]] = {"plain": [], "ours": []}
    for _ in range(options.rounds):
        for name, rows in results.items():
            command = [sys.executable, "-m", "benchmarks.analyse", "--images", str(options.images), "--only", name]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"{options.images} images, two ViT-Tiny at 224 px, minibatches of {BATCH}, {torch.get_num_threads()} threads")
    for name, rows in results.items():
        seconds = statistics.median(float(str(row["seconds"])) for row in rows)
        print(f"{name:8}{seconds:8.1f} s{float(str(rows[0]['memory'])):8.2f} GiB")
    a, b = (torch.tensor(rows[0]["cka"]) for rows in results.values())
    print(f"largest difference between the two: {float((a - b).abs().max()):.1e}")


if __name__ == "__main__":
    main()
