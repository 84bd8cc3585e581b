"""Seconds per pre-training step and peak memory of every baseline, ours beside peers.

    python -m benchmarks.baselines [--methods simmim beit] [--batch 8] [--rounds 7]

ViT-Tiny/16 with 12 heads at 224 px, AdamW, followers and clipping included; data loading is not, and neither is what
names BEiT's patches. The plain formulation (`plain_baselines.py`) is written as the released codes are; its weights and
inputs are ours, and so has to be its loss. Peers of transformers begin with other weights, and have other losses. Every
contender is a process of its own; steps alternate. Seconds are those of one processor, or of the clock with more
--threads. Ratios carry over to other machines, seconds do not.
"""

from __future__ import annotations

import argparse

from benchmarks.alternate import Job, Measured, measure
from benchmarks.plain_baselines import BASELINES, Baseline

LIBRARIES = {"simmim": "transformers_simmim", "beit": "transformers_beit"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("32", "bf16", "both"), default="both")
    given = parser.parse_args()
    print(
        f"ViT-Tiny, 224 px, batch {given.batch}, "
        f"{'CPU seconds of one thread' if given.threads == 1 else f'{given.threads} threads'}, "
        f"medians of {given.rounds} alternating steps"
    )
    for method in given.methods:
        for bf16 in (False, True):
            if given.precision in ("both", "bf16" if bf16 else "32"):
                jobs = contenders(Baseline(method), bf16)
                beside(method, jobs, measure(jobs, given.batch, given.rounds, threads=given.threads))


def contenders(case: Baseline, bf16: bool) -> list[Job]:
    kind = "bf16" if bf16 else "fp32"
    jobs = [
        Job(f"mimlet {kind}", "ours:mimlet_baseline", bf16, (case,)),
        Job(f"plain {kind}", "plain_baselines:step", bf16, (case,)),
    ]
    if case.method in LIBRARIES:
        jobs.append(Job(f"transformers {kind}", f"plain_baselines:{LIBRARIES[case.method]}", bf16, (case,)))
    return jobs


def beside(method: str, jobs: list[Job], results: dict[str, Measured]) -> None:
    """A method's table: how many times as long as ours a step takes, and the memory."""
    ours = results[jobs[0].label]
    print(f"\n{method:24}{'s/step':>8}{'peak MB':>9}{'time/ours':>11}{'memory/ours':>13}{'loss':>10}")
    for label, result in results.items():
        print(
            f"{label:24}{result.median:8.3f}{result.memory:9.0f}{result.median / ours.median:11.2f}"
            f"{result.memory / ours.memory:13.2f}{result.loss:10.5f}"
        )


if __name__ == "__main__":
    main()
