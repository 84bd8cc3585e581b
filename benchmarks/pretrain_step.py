"""Seconds per pre-training step and peak memory, ours beside peers.

    python -m benchmarks.pretrain_step [--batch 32] [--rounds 15]

Every contender is a process of its own; steps alternate. Ratios carry over to other machines, seconds do not.
"""

from __future__ import annotations

import argparse

from benchmarks.alternate import Job, measure
from benchmarks.plain import Case

MAE = [
    Job(f"{name} {kind}", f"{'ours' if name == 'mimlet' else 'contenders'}:{name}_mae", kind == "bf16")
    for kind in ("fp32", "bf16")
    for name in ("mimlet", "transformers", "lightly")
]
D2MAE = [
    Job("plain fp32", "plain:step", False, (Case("d2mae"),)),
    Job("mimlet fp32, fp32 teacher", "ours:mimlet_step", False, (Case("d2mae"),)),
    Job("mimlet bf16, bf16 teacher (default)", "ours:mimlet_step", True, (Case("d2mae"),)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("mae", "d2mae"))
    arguments = parser.parse_args()
    tables = {"MAE, ViT-Tiny/16, 224 px": MAE, "D²-MAE, ViT-Tiny with a ViT-Base teacher": D2MAE}
    for (title, jobs), key in zip(tables.items(), ("mae", "d2mae"), strict=True):
        if arguments.only in (None, key):
            report(title, jobs, arguments.batch, arguments.rounds)


def report(title: str, jobs: list[Job], batch: int, rounds: int) -> None:
    results = measure(jobs, batch, rounds)
    print(f"\n{title}, batch {batch}, medians of {rounds} alternating steps")
    print(f"{'':38}{'s/step':>8}{'peak MB':>9}  times as long as ours")
    for job in jobs:
        result = results[job.label]
        own = [
            other for other in jobs if other.contender.startswith("ours") and (other.bf16 == job.bf16 or len(jobs) == 3)
        ]
        ratios = ", ".join(
            f"{result.median / results[other.label].median:.2f} ({other.label})" for other in own if other is not job
        )
        print(f"{job.label:38}{result.median:8.3f}{result.memory:9.0f}  {ratios}")


if __name__ == "__main__":
    main()
