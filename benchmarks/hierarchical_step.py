"""Seconds per pre-training step and peak memory of hierarchical encoders, ours beside peers.

    python -m benchmarks.hierarchical_step [--cases hiera_tiny46 itpn_base] [--batch 8] [--rounds 7] [--device cuda]

At 224 px, with AdamW and the moving average of iTPN's masked feature modelling (`+mfm`); data loading is not included.
Peers: the plain formulation (`plain_hierarchical.py`), for Hiera also transformers' HieraForPreTraining and timm's
Hiera in the plain formulation. All have our weights, images and masks, and so have to have our loss. Every contender is
a process of its own; steps alternate. Seconds are those of one processor, or of the clock with more --threads or on a
GPU. Ratios carry over to other machines, seconds do not.
"""

from __future__ import annotations

import argparse

from benchmarks.alternate import Job, Measured, measure
from benchmarks.plain import Shape
from benchmarks.plain_hierarchical import Hierarchical
from mimlet.config import EncoderSettings
from mimlet.models.shapes import HieraShape, ViTShape

BIG = Shape(512, 8, 16)
CASES: dict[str, tuple[Shape, float]] = {
    "hiera_tiny46": (Shape(96, 1, 3), 0.4),
    "hiera_base": (BIG, 0.6),
    "hivit_tiny": (Shape(512, 6, 16), 0.75),
    "hivit_base": (Shape(512, 6, 16), 0.75),
    "itpn_tiny": (BIG, 0.75),
    "itpn_tiny+mfm": (BIG, 0.75),
    "itpn_base": (BIG, 0.75),
    "itpn_base+mfm": (BIG, 0.75),
}
"""Decoder and mask ratio, as published."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("32", "bf16", "both"), default="both")
    given = parser.parse_args()
    seconds = "CPU seconds of one thread" if given.threads == 1 else f"{given.threads} threads"
    print(
        f"224 px, batch {given.batch}, {seconds if given.device == 'cpu' else given.device}, "
        f"medians of {given.rounds} alternating steps"
    )
    for name in given.cases:
        for bf16 in (False, True):
            if given.precision in ("both", "bf16" if bf16 else "32"):
                jobs = contenders(case(name, given.device), bf16)
                results = measure(jobs, given.batch, given.rounds, threads=given.threads)
                print("\n".join(table(f"{name} {'bf16' if bf16 else 'fp32'}", results)))


def case(name: str, device: str) -> Hierarchical:
    """A row of `CASES`."""
    shape = EncoderSettings(name=name.removesuffix("+mfm")).shape()
    assert not isinstance(shape, ViTShape)
    return Hierarchical(shape, *CASES[name], name.endswith("+mfm"), device)


def contenders(case: Hierarchical, bf16: bool) -> list[Job]:
    """Ours first."""
    steps = {"mimlet": "ours:mimlet_hierarchical", "plain": "plain_hierarchical:step"}
    if isinstance(case.shape, HieraShape):
        steps |= {name: f"plain_hierarchical:{name}_step" for name in ("timm", "transformers")}
    return [Job(name, step, bf16, (case,)) for name, step in steps.items()]


def table(title: str, results: dict[str, Measured]) -> list[str]:
    """How many times as long as ours a step takes, the memory, and how far the loss is from ours."""
    ours = next(iter(results.values()))
    lines = [f"\n{title:24}{'s/step':>8}{'peak MB':>9}{'time/ours':>11}{'memory/ours':>13}{'loss':>10}{'off by':>9}"]
    return lines + [
        f"{label:24}{result.median:8.3f}{result.memory:9.0f}{result.median / ours.median:11.2f}"
        f"{result.memory / ours.memory:13.2f}{result.loss:10.5f}{abs(result.loss / ours.loss - 1):9.1e}"
        for label, result in results.items()
    ]


if __name__ == "__main__":
    main()
