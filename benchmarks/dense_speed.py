"""What Fast-iTPN's token gathering and token migration save on dense inputs, and what they change: images/s and peak
memory of the whole encoder with its pyramid, and how far the levels are from those of the plain encoder.

    python -m benchmarks.dense_speed [--models fast_itpn_tiny] [--sizes 512 800] [--weights FILE] [--device cuda]

Windows have 14 x 14 tokens, at the right and bottom edges what the image leaves them. `global` keeps attention of the
whole image in four blocks of stage 3, as HiViT's detectors do; `relative` adds a bias of relative positions inside
windows. Every variant is a process of its own; passes alternate. Seconds are those of the clock, or of one processor
with --threads 1; ratios carry over to other machines, seconds do not. Memory is that of the GPU, or resident memory
with everything imported. All variants have the plain encoder's weights (random ones without --weights), and what
gathering adds begins as training does: cross-attention adds nothing. The change of a level is |variant - plain| /
|plain|, in float32 and over all numbers of one image.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.alternate import Job, Measured, measure
from benchmarks.contenders import Step, images
from mimlet.config import EncoderSettings
from mimlet.models.features import Taps
from mimlet.models.hivit import HiViT
from mimlet.models.shapes import HiViTShape
from mimlet.models.weights import load_encoder_weights

WINDOW = 14
KINDS = ("window", "global", "gathering", "relative", "migration", "both")


@dataclass(frozen=True)
class Dense:
    """An encoder on images of one size; `plain` is the shape whose weights it has."""

    shape: HiViTShape
    plain: HiViTShape
    size: int
    weights: str | None = None
    device: str = "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fast_itpn_tiny", "fast_itpn_base"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512, 800, 1024], help="px")
    parser.add_argument("--variants", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ratios", nargs="+", type=int, default=[10, 20, 30, 40], help="of migration, in percent")
    parser.add_argument("--weights", help="run folder or file; needs one model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--csv", type=Path, help="write all numbers here, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, object]] = []
    for model in given.models:
        shape = EncoderSettings(name=model).shape()
        if not isinstance(shape, HiViTShape) or not shape.pyramid_dim:
            parser.error(f"{model} has no pyramid; choose itpn_tiny, fast_itpn_tiny, ...")
        for size in given.sizes:
            cases = {
                name: Dense(variant, shape, size, given.weights, given.device)
                for name, variant in variants(shape, given.variants, given.ratios).items()
            }
            jobs = [Job(name, "dense_speed:step", given.precision == "bf16", (case,)) for name, case in cases.items()]
            results = measure(jobs, given.batch, given.rounds, threads=given.threads)
            found = table(results, changes(cases), given.batch)
            rows += [{"model": model, "size": size, **row} for row in found]
            print(f"\n{model}, {size} px, batch {given.batch}, {given.precision}, {given.device}, ", end="")
            print(f"{given.threads} threads, medians of {given.rounds} alternating passes")
            print("\n".join(lines(found)), flush=True)
    if given.csv:
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def variants(shape: HiViTShape, kinds: Sequence[str] = KINDS, ratios: Sequence[int] = ()) -> dict[str, HiViTShape]:
    """The plain shape, and those of the kinds asked for, migration at every ratio (percent)."""
    window, blocks = replace(shape, window=WINDOW), shape.stages[2]
    gathering = replace(window, gathering="to_tokens")
    made = {
        "window": {"window": window},
        "global": {
            "window, 4 global blocks": replace(window, global_blocks=tuple(blocks * i // 4 for i in (1, 2, 3, 4)))
        },
        "gathering": {"window + gathering": gathering},
        "relative": {"window + gathering + relative": replace(gathering, window_relative=True)},
        "migration": {f"migration {ratio} %": replace(shape, migration=ratio / 100) for ratio in ratios},
        "both": {
            f"window + gathering + migration {ratio} %": replace(gathering, migration=ratio / 100) for ratio in ratios
        },
    }
    return {"plain": shape} | {name: variant for kind in kinds for name, variant in made[kind].items()}


def encoder_of(case: Dense) -> HiViT:
    """The encoder of a case with the plain encoder's weights."""
    torch.manual_seed(0)
    plain = HiViT(case.plain)
    if case.weights:
        load_encoder_weights(plain, case.weights)
    encoder = HiViT(case.shape)
    encoder.load_state_dict({**encoder.state_dict(), **plain.state_dict()})
    return encoder.eval().to(case.device)


def step(batch: int, bf16: bool, case: Dense) -> Step:
    """One pass up to the pyramid; gives a number of its result, so that a GPU has to be done."""
    encoder, pixels = encoder_of(case), images(batch, case.size).to(case.device)

    def run() -> float:
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            return float(maps(encoder, pixels)[0].flatten()[0])

    return run


def maps(encoder: HiViT, pixels: Tensor) -> list[Tensor]:
    """All levels, finest first."""
    levels = encoder(pixels, taps=Taps(levels=tuple(encoder.levels), tokens=False)).levels
    return [levels[stride] for stride in sorted(levels)]


@torch.no_grad()
def changes(cases: Mapping[str, Dense]) -> dict[str, list[float]]:
    """How far every case's levels are from those of the first, finest first."""
    reference: list[Tensor] = []
    found = {}
    for name, case in cases.items():
        levels = maps(encoder_of(case), images(1, case.size).to(case.device))
        reference = reference or levels
        found[name] = [float((a - b).norm() / b.norm()) for a, b in zip(levels, reference, strict=True)]
    return found


def table(results: Mapping[str, Measured], change: Mapping[str, list[float]], batch: int) -> list[dict[str, object]]:
    """A row of numbers for each variant; the first is the plain encoder."""
    plain = next(iter(results.values()))
    return [
        {
            "variant": name,
            "images_per_second": batch / result.median,
            "speed": plain.median / result.median,
            "memory_mb": result.memory,
            "memory": result.memory / plain.memory,
            **{
                f"change_{place}": value
                for place, value in zip(("fine", "middle", "coarse"), change[name], strict=True)
            },
        }
        for name, result in results.items()
    ]


def lines(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """For the terminal."""
    head = f"{'':36}{'images/s':>9}{'speed':>7}{'peak MB':>9}{'memory':>8}   change of levels, fine to coarse"
    return [head] + [
        f"{row['variant']:36}{row['images_per_second']:9.2f}{row['speed']:7.2f}{row['memory_mb']:9.0f}"
        f"{row['memory']:8.2f}   {row['change_fine']:.3f} {row['change_middle']:.3f} {row['change_coarse']:.3f}"
        for row in rows
    ]


if __name__ == "__main__":
    main()
