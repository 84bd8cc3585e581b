"""Seconds and peak memory per step of every distillation method, ours beside the same method written straight down.

    python -m benchmarks.distill_step [--teacher large] [--batch 32] [--rounds 7]
    python -m benchmarks.distill_step --extra [--student base] --teacher large

Every contender is a process of its own; steps alternate. Seconds are those of one processor, or of the clock with more
--threads. The plain formulation (`plain.py`) runs the teacher to its end and forms every map; its weights, images and
masks are ours, and so has to be its loss. --extra: what MIM-HD costs more than TinyMIM, both ours.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.alternate import Job, Measured, measure
from benchmarks.plain import BASE, LARGE, METHODS, SMALL, TINY, Case

SIZES = {"tiny": TINY, "small": SMALL, "base": BASE, "large": LARGE}
EXTRA = ("tinymim", "mimhd_relations", "mimhd_one_view", "mimhd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--student", choices=SIZES, default="tiny")
    parser.add_argument("--heads", type=int, default=12, help="of the student")
    parser.add_argument("--teacher", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--extra", action="store_true", help="only what MIM-HD costs more than TinyMIM")
    given = parser.parse_args()
    student = replace(SIZES[given.student], heads=given.heads)
    print(
        f"student {given.student} ({student.heads} heads), teacher {given.teacher}, 224 px, batch {given.batch}, "
        f"{'CPU seconds of one thread' if given.threads == 1 else f'{given.threads} threads'}, "
        f"medians of {given.rounds} alternating steps"
    )

    def run(jobs: list[Job]) -> dict[str, Measured]:
        return measure(jobs, given.batch, given.rounds, threads=given.threads)

    if given.extra:
        cases = [Case(method, student, SIZES[given.teacher]) for method in EXTRA]
        for bf16 in (False, True):
            extra(run([Job(case.method, "ours:mimlet_step", bf16, (case,)) for case in cases]), bf16)
        return
    for method in given.methods:
        case = Case(method, student, SIZES[given.teacher])
        beside(method, run(contenders(case)))


def contenders(case: Case) -> list[Job]:
    return [
        Job("plain fp32", "plain:step", False, (case,)),
        Job("mimlet fp32, fp32 teacher", "ours:mimlet_step", False, (case,)),
        Job("plain bf16", "plain:step", True, (case,)),
        Job("mimlet bf16, bf16 teacher (default)", "ours:mimlet_step", True, (case,)),
    ]


def beside(method: str, results: dict[str, Measured]) -> None:
    """A method's table: how many times as long plain fp32 takes, and how far the loss is from its loss."""
    reference = results["plain fp32"]
    print(f"\n{method:38}{'s/step':>8}{'peak MB':>9}{'speed-up':>10}{'loss':>10}{'off by':>9}")
    for label, result in results.items():
        print(
            f"{label:38}{result.median:8.3f}{result.memory:9.0f}{reference.median / result.median:10.2f}"
            f"{result.loss:10.5f}{abs(result.loss / reference.loss - 1):9.1e}"
        )


def extra(results: dict[str, Measured], bf16: bool) -> None:
    """What the steps cost more than TinyMIM's."""
    reference = results["tinymim"]
    print(f"\n{'bf16 (default)' if bf16 else 'fp32':38}{'s/step':>8}{'peak MB':>9}{'over TinyMIM':>14}")
    for label, result in results.items():
        print(f"{label:38}{result.median:8.3f}{result.memory:9.0f}{result.median / reference.median - 1:14.1%}")


if __name__ == "__main__":
    main()
