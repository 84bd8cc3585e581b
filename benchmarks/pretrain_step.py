"""Seconds per pre-training step and peak memory, ours beside peers and the method written straight down, and the share
of what this processor can do.

    python -m benchmarks.pretrain_step [--models mae_tiny d2mae] [--batch 32] [--rounds 15] [--threads 1] [--data DATA]

Every contender is a process of its own; steps alternate. Ratios carry over to other machines, seconds do not: they are
those of one processor, or of the clock with more --threads. GFLOP/s are the products that our step does (forward,
backward and teacher; none is done twice) over a contender's seconds; the ceiling is what the products of the model's
blocks reach in the same run with nothing in between (`ours.products`). With --data also ours from files to new
weights, in one process ("with data").
"""

from __future__ import annotations

import argparse

from benchmarks.alternate import Job, Measured, measure
from benchmarks.ours import work
from benchmarks.plain import BASE, SMALL, TINY, Case, Shape

MODELS = {
    "mae_tiny": Case("mae", TINY, student_decoder=Shape(96, 1, 3)),
    "mae_small": Case("mae", SMALL, student_decoder=Shape(192, 1, 3)),
    "mae_base": Case("mae", BASE, student_decoder=Shape(512, 8, 16)),
    "d2mae": Case("d2mae", TINY, BASE, student_decoder=Shape(96, 1, 3)),
}
"""Decoders are MAE-lite's, that of Base is MAE's own. D²-MAE: ViT-Tiny with a ViT-Base teacher."""


def contenders(case: Case, bf16: bool, data: str | None = None) -> list[Job]:
    """Ours, the others and the ceiling."""
    named = {"mimlet": "ours:mimlet_step", "plain": "plain:step"}
    if case.method == "mae":
        named |= {"transformers": "contenders:transformers_mae", "lightly": "contenders:lightly_mae"}
    named["ceiling"] = "ours:products"
    jobs = [Job(label, contender, bf16, (case,)) for label, contender in named.items()]
    return [*jobs, Job("with data", "ours:mimlet_training", bf16, (case, data))] if data else jobs


def table(results: dict[str, Measured], gflop: float) -> list[str]:
    """A line per contender: seconds, how many times as long as ours, peak memory, GFLOP/s and share of the ceiling."""
    ceiling = results["ceiling"].loss / results["ceiling"].median
    ours = results["mimlet"].median
    lines = [f"{'':14}{'s/step':>8}{'/ ours':>8}{'peak MB':>9}{'GFLOP/s':>9}{'share':>8}"]
    for label, result in results.items():
        if label != "ceiling":
            rate = gflop / result.median
            lines.append(
                f"{label:14}{result.median:8.3f}{result.median / ours:8.2f}{result.memory:9.0f}{rate:9.0f}"
                f"{rate / ceiling:8.0%}"
            )
    return [*lines, f"{'ceiling':14}{gflop / ceiling:8.3f}{gflop / ceiling / ours:8.2f}{'':9}{ceiling:9.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", help="packed images, or any other data path")
    parser.add_argument("--without", nargs="*", default=[], help="contenders that are not installed")
    given = parser.parse_args()
    for model in given.models:
        case, medians = MODELS[model], {}
        gflop = given.batch * work(case)
        for bf16 in (False, True):
            jobs = [job for job in contenders(case, bf16, given.data) if job.label not in given.without]
            results = measure(jobs, given.batch, given.rounds, threads=given.threads)
            medians[bf16] = {label: result.median for label, result in results.items()}
            print(f"\n{model}, {'bf16' if bf16 else 'fp32'}, batch {given.batch}, {gflop:.1f} GFLOP per step")
            print("\n".join(table(results, gflop)), flush=True)
        if "plain" not in given.without:
            print(f"plain fp32 / mimlet bf16: {medians[False]['plain'] / medians[True]['mimlet']:.2f}", flush=True)


if __name__ == "__main__":
    main()
