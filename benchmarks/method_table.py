"""Every method at an equal budget, baselines and distillation: trains, judges and writes docs/results.md.

    python -m benchmarks.method_table --train cifar10/train.parquet --test cifar10/test.parquet --out runs/methods \\
        --epochs 6 --seeds 0 1 2

Five steps, each of which skips what is finished, so that the same command continues, and seeds may run in processes of
their own once teacher and tokenizer are there (--only teacher, tokenizer, pretrain, judge, page). The page is made from
the run folders alone. What stands in it between the two `reading` comments is written by people, and stays.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from mimlet.atomic import write_atomic
from mimlet.config import Config, EncoderSettings, merge, nest, parse_override, read_recipe, set_length, validate
from mimlet.errors import RunError
from mimlet.methods.settings import METHODS
from mimlet.models.weights import ENCODER_FILE
from mimlet.report.collect import Shown
from mimlet.run import Run, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCRATCH, SUPERVISED = "scratch_micro32", "supervised_micro32"
TEACHER, TOKENIZER, BEIT = "mae_micro_teacher32", "dvae_micro32", "beit_micro32"
RECIPES = {
    SCRATCH: "no pre-training",
    SUPERVISED: "supervised",
    "mae_micro32": "MAE",
    "simmim_micro32": "SimMIM",
    "maskfeat_micro32": "MaskFeat",
    BEIT: "BEiT",
    "bootmae_micro32": "BootMAE",
    "dino_micro32": "DINO",
    "mocov3_micro32": "MoCo v3",
    "dmae_micro32": "D-MAE",
    "d2mae_micro32": "D²-MAE",
    "dmae_features_micro32": "DMAE (features)",
    "d2mae_heads_micro32": "D²-MAE with adaptive heads",
    "g2sd_micro32": "G2SD, generic stage",
    "tinymim_micro32": "TinyMIM",
    "mimhd_micro32": "MIM-HD",
    "mimhd_mixture_micro32": "MIM-HD (mixture)",
}
STUDY = "Exploring Strong Lightweight ViTs"
PAPERS = [
    ("mae_micro32", "mocov3_micro32", f"ViT-Tiny 78.0 and 76.8, linear probe 23.3 and 62.1, {STUDY}"),
    ("mae_micro32", "dino_micro32", f"ViT-Tiny 78.0 and 77.2, linear probe 23.3 and 66.1, {STUDY}"),
    ("dino_micro32", "mocov3_micro32", f"ViT-Tiny 77.2 and 76.8, linear probe 66.1 and 62.1, {STUDY}"),
    ("mae_micro32", "simmim_micro32", f"ViT-Tiny 78.0 and 77.9, linear probe 23.3 and 14.8, {STUDY}"),
    ("mae_micro32", "maskfeat_micro32", f"ViT-Tiny 78.0 and 77.9, linear probe 23.3 and 23.1, {STUDY}"),
    ("mae_micro32", "bootmae_micro32", f"ViT-Tiny 78.0 and 77.9, {STUDY}"),
    ("mae_micro32", BEIT, f"ViT-Tiny 78.0 and 77.7, {STUDY}"),
    ("mae_micro32", SUPERVISED, f"ViT-Tiny 78.0 and 76.5, {STUDY}"),
    ("dmae_micro32", "mae_micro32", "ViT-Tiny 78.3 and 78.0, D²-MAE's paper"),
    ("d2mae_micro32", "dmae_micro32", "ViT-Tiny 78.7 and 78.3, D²-MAE's paper"),
    ("g2sd_micro32", "mae_micro32", "ViT-Tiny 76.3 and 75.2, ViT-Small 82.0 and 81.5, G2SD's paper"),
    ("g2sd_micro32", "dmae_features_micro32", "ViT-Tiny (both stages of G2SD) 77.0 and 70.0, G2SD's paper"),
    ("mimhd_micro32", "tinymim_micro32", "ViT-Tiny 75.7 and 75.2, ViT-Base 84.8 and 84.5, MIM-HD's paper"),
    ("tinymim_micro32", "mae_micro32", "ViT-Tiny 75.8 (TinyMIM's paper) and 75.2 (G2SD's paper)"),
]
"""Better and worse by ImageNet-1K top-1 after fine-tuning, with the two numbers."""
GROUPS = {
    "masked images": ("mae_micro32", "simmim_micro32", "maskfeat_micro32", BEIT, "bootmae_micro32"),
    "crops and contrast": ("dino_micro32", "mocov3_micro32"),
}
READING = ("<!-- reading -->", "<!-- /reading -->")
MISSING = "–"
ALT = (
    "Three dot charts of the table, by probe and after fine-tuning with few and with all labels: top-1 of each method, "
    "a dot per seed, their mean"
)
JUDGED = {"probe": "probe, all labels", "finetuned": "fine-tuned, few labels", "tuned_all": "fine-tuned, all labels"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="images with labels, which pre-training does not look at")
    parser.add_argument("--test", help="images with labels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--teacher", type=Path, help="run folder of an MAE teacher; none: it is trained first")
    parser.add_argument("--tokenizer", type=Path, help="run folder of a tokenizer for BEiT; none: it is trained first")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="of pre-training; none: the recipes'")
    parser.add_argument("--steps", type=int, help="of pre-training, instead of epochs")
    parser.add_argument("--labels", type=int, default=100, help="per class, for fine-tuning")
    parser.add_argument("--finetune-epochs", type=float, default=40, help="with few labels")
    parser.add_argument("--all-epochs", type=float, default=3, help="of fine-tuning with all labels; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("settings", nargs="*", help="section.key=value for every training")
    parser.add_argument("--pretrain", nargs="+", default=[], help="the same for the students' pre-training only")
    given = parser.parse_args(arguments)
    if {"teacher", "tokenizer", "pretrain", "judge"} & {*given.only} and not (given.train and given.test):
        parser.error("--train and --test are needed to train and to judge")
    import torch

    torch.set_num_threads(given.threads)
    for step in STEPS:
        if step in given.only:
            STEPS[step](given)


def train_teacher(given: argparse.Namespace) -> None:
    distilled = any(METHODS[read_recipe(recipe)["method"]["name"]].teacher for recipe in given.methods)
    if distilled and given.teacher is None:
        train_part(given, TEACHER, given.out / "teacher")


def train_tokenizer(given: argparse.Namespace) -> None:
    if BEIT in given.methods and given.tokenizer is None:
        train_part(given, TOKENIZER, given.out / "tokenizer")


def train_part(given: argparse.Namespace, recipe: str, out: Path) -> None:
    from mimlet.api import train

    if not finished(out):
        train(config(given, recipe, out, seed=0), resume=True)


def pretrain(given: argparse.Namespace) -> None:
    """All methods of a seed side by side: images are read and the teacher is asked once. The one with labels trains by
    itself.
    """
    from mimlet.api import compare, train

    for seed in given.seeds:
        folders = {recipe: given.out / f"seed{seed}" / recipe for recipe in given.methods if recipe != SCRATCH}
        missing = {recipe: config(given, recipe, at, seed) for recipe, at in folders.items() if not finished(at)}
        if SUPERVISED in missing:
            train(missing.pop(SUPERVISED), resume=True)
        configs = list(missing.values())
        if len(configs) > 1:
            compare(configs, resume=True)
        elif configs:
            train(configs[0], resume=True)


def judge(given: argparse.Namespace) -> None:
    """A probe with all labels, and fine-tuning with few, then with all; the seed of the pre-training draws these few,
    too.
    """
    from mimlet.api import probe, train

    for seed in given.seeds:
        for recipe in given.methods:
            encoder = given.out / f"seed{seed}" / recipe
            if recipe != SCRATCH and not (encoder / "probe_quick.csv").exists():
                probe(encoder, data=given.train, eval=given.test)
            lengths = {"finetuned": (given.finetune_epochs, str(given.labels)), "tuned_all": (given.all_epochs, "")}
            for how, (epochs, labels) in lengths.items():
                if epochs and not finished(at := tuned(encoder, how)):
                    train(tuning(given, recipe, encoder, at, seed, epochs, labels), resume=True)


def write_page(given: argparse.Namespace) -> None:
    page: Path = given.page
    rows = read_rows(given.out)
    picture = page.parent / "images" / "method_table.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(picture, png(chart(rows)))
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    write_atomic(page, page_text(rows, read_facts(given.out, rows), reading(before)))


STEPS = {
    "teacher": train_teacher,
    "tokenizer": train_tokenizer,
    "pretrain": pretrain,
    "judge": judge,
    "page": write_page,
}


def tuned(encoder: Path, how: str) -> Path:
    """Where an encoder's fine-tuning with few (`finetuned`) or with all labels (`tuned_all`) lies."""
    return encoder.with_name(f"{encoder.name}-{how}")


def finished(folder: Path) -> bool:
    return (folder / ENCODER_FILE).is_file()


def config(given: argparse.Namespace, recipe: str, out: Path, seed: int) -> Config:
    """A recipe at the common budget."""
    values = read_recipe(recipe)
    set_length(values, given.epochs, given.steps)
    if METHODS[values["method"]["name"]].teacher:
        merge(values, nest("teacher.path", str(given.teacher or given.out / "teacher")))
    if recipe == BEIT:
        merge(values, nest("method.tokenizer", str(given.tokenizer or given.out / "tokenizer")))
    if recipe not in (TEACHER, TOKENIZER):
        for text in given.pretrain:
            merge(values, parse_override(text))
    return completed(given, values, out, seed)


def tuning(
    given: argparse.Namespace, recipe: str, encoder: Path, out: Path, seed: int, epochs: float, labels: str
) -> Config:
    """Fine-tuning of an encoder, or training from scratch, with so many labels per class (empty: all)."""
    values = read_recipe(SCRATCH if recipe == SCRATCH else "classify_micro32")
    set_length(values, epochs)
    if recipe != SCRATCH:
        merge(values, {"encoder": {**form(read_run(encoder).config.encoder), "weights": str(encoder)}})
    merge(values, {"data": {"eval": [given.test], "subset": labels, "subset_seed": seed}})
    merge(values, nest("schedule.eval_epochs", 0))
    return completed(given, values, out, seed)


def form(encoder: EncoderSettings) -> dict[str, Any]:
    """What an encoder is fine-tuned as: with its own positions and biases, a table that blocks share becoming one for
    each.
    """
    relative: str = encoder.relative
    if relative == "shared":
        relative = "qv" if encoder.qv_bias else "full"
    return {"position": encoder.position, "relative": relative, "qv_bias": encoder.qv_bias}


def completed(given: argparse.Namespace, values: dict[str, Any], out: Path, seed: int) -> Config:
    merge(values, {"seed": seed, "data": {"path": [given.train]}})
    merge(values, {"run": {"out": str(out), "tensorboard": False, "report": False}})
    for text in given.settings:
        merge(values, parse_override(text))
    return validate(values)


@dataclass(frozen=True)
class Row:
    """A method's results by seed. `losses`: the last ones logged, mean over seeds."""

    recipe: str
    losses: Mapping[str, float]
    seconds: Mapping[int, float]
    probe: Mapping[int, float]
    finetuned: Mapping[int, float]
    tuned_all: Mapping[int, float]

    def results(self, how: str) -> Mapping[int, float]:
        """`probe`, `finetuned` or `tuned_all`."""
        found: Mapping[int, float] = getattr(self, how)
        return found


@dataclass(frozen=True)
class Facts:
    """What all runs share. `budget`: the options that repeat it."""

    seeds: list[int]
    budget: str
    schedule: str
    labels: str
    all_labels: str
    tokenizer: str
    students: str
    machine: str


def read_rows(out: Path) -> list[Row]:
    """What the run folders hold, in the order of `RECIPES`; methods without any result are left out."""
    rows = []
    for recipe in RECIPES:
        losses: dict[str, list[float]] = {}
        seconds, probed = {}, {}
        judged: dict[str, dict[int, float]] = {"finetuned": {}, "tuned_all": {}}
        for seed, folder in seed_folders(out):
            if finished(folder / recipe):
                shown = Shown(recipe, 0, read_run(folder / recipe))
                seconds[seed] = shown.seconds
                for name in [name for name in shown.losses if name != "total"]:
                    losses.setdefault(name, []).append(float(shown.train[-1][name]))
            table = folder / recipe / "probe_quick.csv"
            if table.exists():
                probed[seed] = float(next(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))["top1"])
            for how, found in judged.items():
                if finished(at := tuned(folder / recipe, how)):
                    found[seed] = float(read_run(at).lines("eval")[-1]["top1"])
        if seconds or any(judged.values()):
            last = {name: mean(values) for name, values in losses.items()}
            rows.append(Row(recipe, last, seconds, probed, **judged))
    if not rows:
        raise RunError(f"no finished runs in {out}; expected folders such as seed0/mae_micro32")
    return rows


def seed_folders(out: Path) -> list[tuple[int, Path]]:
    return sorted((int(path.name.removeprefix("seed")), path) for path in out.glob("seed*"))


def read_facts(out: Path, rows: Sequence[Row]) -> Facts:
    """`RunError` where runs that are compared had different budgets."""
    places = [folder / row.recipe for _, folder in seed_folders(out) for row in rows]
    before = [read_run(at) for at in places if finished(at)]
    few, every = (
        [read_run(at) for at in (tuned(place, how) for place in places) if finished(at)]
        for how in ("finetuned", "tuned_all")
    )
    schedule = common((length(run) for run in before), "lengths of pre-training")
    last = common((length(run) for run in few), "lengths of fine-tuning")
    last_all = common((length(run) for run in every), "lengths of fine-tuning with all labels")
    labels = common((run.config.data.subset for run in few), "numbers of labels")
    students = common(map(student, before + few + every), "students")
    rate = common_rate(before)
    (number, unit, *_, batch), epochs = schedule.split(), last.split()[0]
    tokenizer = ""
    if finished(out / "tokenizer"):
        shown = Shown(TOKENIZER, 0, read_run(out / "tokenizer"))
        tokenizer = f"{length(shown.run)}, {shown.seconds:.0f} seconds, which BEiT's do not contain"
    return Facts(
        [seed for seed, _ in seed_folders(out)],
        f"--{unit} {number} --labels {labels} --finetune-epochs {epochs} "
        f"--all-epochs {last_all.split()[0] if every else 0} \\\n    "
        f"--pretrain schedule.batch={batch}{f' optim.lr={rate}' if rate else ''}",
        f"{schedule}, {f'learning rate {rate}' if rate else 'the learning rate of each recipe'}",
        f"{labels} labels per class, {last}",
        last_all,
        tokenizer,
        students,
        "; ".join(sorted({machine(run) for run in before + few + every})),
    )


def common(values: Iterable[str], what: str) -> str:
    """The one value."""
    found = sorted(set(values))
    if len(found) > 1:
        raise RunError(f"{what} differ, so there is nothing to compare: {', '.join(found)}")
    return found[0] if found else MISSING


def common_rate(runs: Sequence[Run]) -> str:
    """The peak learning rate of all methods, or nothing where each has its recipe's."""
    peaks = [run.config.optim.lr for run in runs]
    own = [read_recipe(recipe)["optim"]["lr"] for recipe in (run.path.name for run in runs)]
    if len(set(peaks)) > 1 and peaks == own:
        return ""
    return common((f"{peak:g}" for peak in peaks), "learning rates of pre-training")


def length(run: Run) -> str:
    schedule = run.config.schedule
    duration = f"{schedule.steps} steps" if schedule.steps else f"{schedule.epochs:g} epochs"
    return f"{duration} of batch {schedule.batch}"


def student(run: Run) -> str:
    encoder = run.config.encoder
    shape = encoder.shape()
    return f"{encoder.name}, {shape.dim} wide, {encoder.blocks} blocks, {shape.heads} heads, {encoder.image_size} px"


def machine(run: Run) -> str:
    """Its kind; neither a name nor a path."""
    environment: Mapping[str, Any] = run.environment
    parts = [environment["cpu"], f"{environment['cores']} cores", *environment["gpus"]]
    return ", ".join([*parts, f"torch {environment['packages']['torch']}"])


def reading(page: str) -> str:
    """What people wrote between the comments."""
    _, start, rest = page.partition(READING[0])
    text, end, _ = rest.partition(READING[1])
    if start and not end:
        raise RunError(f"the page has {READING[0]} but no {READING[1]}: what was written there would be lost; mend it")
    return text.strip() if start else ""


def chart(rows: Sequence[Row]) -> Figure:
    """A dot for every seed and a line at their mean, for all ways of judging; told apart by place, not by colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.9 + 0.38 * len(rows)), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(JUDGED), sharey=True)
    for panel, (how, title) in zip(panels, JUDGED.items(), strict=True):
        for place, row in enumerate(rows):
            results = list(row.results(how).values())
            if results:
                panel.plot(results, [place] * len(results), "o", mfc="none", mec="#1f4e79", ms=7, mew=1.3)
                panel.plot([mean(results)] * 2, [place - 0.32, place + 0.32], color="black", lw=2)
        panel.set_title(title)
        panel.set_xlabel("top-1 in percent")
        panel.grid(axis="x", color="0.85")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [RECIPES[row.recipe] for row in rows])
    panels[0].invert_yaxis()
    return figure


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def page_text(rows: Sequence[Row], facts: Facts, reading: str) -> str:
    seeds = " ".join(map(str, facts.seeds))
    tokenizer = f"\n- BEiT's tokenizer: a discrete VAE, {facts.tokenizer}." if facts.tokenizer else ""
    return f"""# Results: every method at an equal budget

Written by the command below from its run folders, all but the section Reading.

```sh
python -m benchmarks.method_table --train TRAIN --test TEST --out RUNS --seeds {seeds} \\
    {facts.budget}
```

- Students: {facts.students}; pre-training: {facts.schedule}; one teacher for all that distil.{tokenizer}
- Probe: a linear probe, logistic regression on frozen features with all training labels. Fine-tuned with few labels:
  {facts.labels}, drawn by the seed; with all: {facts.all_labels}.
- Supervised: the same encoder trained with all labels, at the same schedule; then judged like the others.
- Machine: {facts.machine}.
- Seconds are those of one pre-training. The methods of a seed were trained side by side: what the teacher answers
  to several of them alike counts for the first that asked.

## Table

Top-1 in percent on the test images, after the last step, for seeds {seeds}. Spread: largest minus smallest.

{results_table(rows, facts.seeds)}

![{ALT}](images/method_table.png)

## Beside the papers

Whether the orders that papers report on ImageNet-1K show at this size. Differences are of equal seeds: their mean, and
in how many seeds the first method is ahead.

{papers_table(rows)}

## Few labels or many

The paper's pattern: masked images are ahead where labels are many, contrast where they are few and where features stay
frozen. Means over methods and seeds.

{groups_table(rows)}

## Reading

{READING[0]}
{reading}
{READING[1]}
"""


def results_table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    head = [
        "method",
        "last losses",
        "seconds",
        *(
            f"{title}: {part}"
            for title in ("probe", "few labels", "all labels")
            for part in ("seeds", "mean", "spread")
        ),
    ]
    lines = []
    for row in rows:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in row.losses.items())
        cells = [
            RECIPES[row.recipe],
            losses or MISSING,
            f"{mean(row.seconds.values()):.0f}" if row.seconds else MISSING,
        ]
        for how in JUDGED:
            results = row.results(how)
            cells.append(", ".join(f"{results[seed]:.1f}" if seed in results else MISSING for seed in seeds))
            known = results.values()
            cells.append(f"{mean(known):.1f}" if known else MISSING)
            cells.append(f"{max(known) - min(known):.1f}" if len(known) > 1 else MISSING)
        lines.append(cells)
    return markdown([head, *lines])


def papers_table(rows: Sequence[Row]) -> str:
    known = {row.recipe: row for row in rows}
    lines = [["first - second", "papers", *JUDGED.values()]]
    for first, second, numbers in PAPERS:
        if first in known and second in known:
            cells = [difference(known[first].results(how), known[second].results(how)) for how in JUDGED]
            lines.append([f"{RECIPES[first]} - {RECIPES[second]}", numbers, *cells])
    return markdown(lines)


def groups_table(rows: Sequence[Row]) -> str:
    """Means over the methods of a group that have results, and the difference of two groups."""
    known = {row.recipe: row for row in rows}
    lines, means = [["group", "methods", *JUDGED.values()]], []
    for title, recipes in GROUPS.items():
        there = [known[recipe] for recipe in recipes if recipe in known]
        values = [[mean(row.results(how).values()) for row in there if row.results(how)] for how in JUDGED]
        means.append([mean(found) if found else None for found in values])
        names = ", ".join(RECIPES[row.recipe] for row in there) or MISSING
        lines.append([title, names, *(MISSING if value is None else f"{value:.1f}" for value in means[-1])])
    between = [MISSING if a is None or b is None else f"{a - b:+.1f}" for a, b in zip(*means, strict=True)]
    return markdown([*lines, ["difference", "", *between]])


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> str:
    found = [first[seed] - second[seed] for seed in first if seed in second]
    return f"{mean(found):+.1f}, ahead in {sum(d > 0 for d in found)} of {len(found)}" if found else MISSING


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, f"|{' --- |' * len(lines[0])}", *rest])


if __name__ == "__main__":
    main()
