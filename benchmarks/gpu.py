"""Everything that is to be measured on a GPU, by one command:

    python -m benchmarks.gpu [--minutes 10] [--out gpu.json]

Ceilings first (copying, bf16 products), then training steps with the data on the device, a step's profile, attention
kernels, and trainings from packed images: each beside the ceilings of the same run and the bars of `BARS`. Every item
runs in a process of its own, the most telling first, as many as the minutes allow; one that fails is noted and the
others go on. The results go to a JSON file and, as tables for docs/performance.md, to a .md file beside it. `--smoke`
takes tiny sizes and whatever device there is, to see that everything works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torchvision.io import write_jpeg

from benchmarks.ours import method as distilling
from benchmarks.ours import settings as method_settings
from benchmarks.plain import BASE, LARGE, TINY, Case, Shape
from mimlet import api
from mimlet.config import Config, validate
from mimlet.data.batch import Batch
from mimlet.data.packing import pack
from mimlet.methods.base import Method
from mimlet.methods.mae import MAE, build_decoder
from mimlet.methods.settings import DecoderSettings
from mimlet.models.parts import attention_logits
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.run import RunFolder, read_run
from mimlet.train.distributed import make_fabric
from mimlet.train.loop import fit

Found = dict[str, Any]
"""What an item answers, for JSON; `failed` says why it does not."""

FORMS = ("off", "on", "graphs")
BARS = {
    "mae": 40_000.0, "d2mae, ViT-Base": 20_000.0, "d2mae, ViT-Large": 10_000.0,
    "packed, mae": 20_000.0, "packed, d2mae, ViT-Base": 16_000.0,
}  # fmt: skip
"""Images per second on one H200."""
UNITS = {"off": 38, "on": 36, "graphs": 36}
"""Times that the tokens of a block are read or written in bf16, forward: eagerly, and with its norms fused."""
PIXELS = 3 * 16**2
"""Numbers of a patch."""
BACKWARD = 2.2
"""Bytes that a backward pass moves, over those of the forward pass."""


@dataclass(frozen=True)
class Stack:
    """Blocks of a step, for arithmetic: how many, the tokens they see of one image, whether they are trained."""

    blocks: int
    tokens: int
    width: int
    trained: bool = True

    @property
    def flops(self) -> float:
        """Per image: products, pixels in or out among them, and attention; forward and, where they are trained, twice
        that backward.
        """
        forward = self.blocks * (24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width)
        forward += 2 * PIXELS * self.tokens * self.width
        return forward * (3 if self.trained else 1)

    def moved(self, form: str) -> float:
        """Bytes per image."""
        forward = 2 * self.blocks * UNITS[form] * self.tokens * self.width
        return forward * (1 + BACKWARD if self.trained else 1)


@dataclass(frozen=True)
class Sizes:
    """How large everything is. `batches`: images of a step; `rounds`: steps that are timed, after `warm` ones."""

    teachers: Mapping[str, Shape]
    batches: Mapping[str, int]
    size: int = 224
    patch: int = 16
    warm: int = 12
    rounds: int = 30
    product: int = 4096
    rows: int = 51_200
    copied: int = 2**30
    tokens: tuple[int, ...] = (50, 197, 320)
    attended: int = 512
    packed: int = 1024

    @property
    def whole(self) -> int:
        """Tokens of a whole image."""
        return (self.size // self.patch) ** 2 + 1

    @property
    def seen(self) -> int:
        """Tokens of the visible quarter."""
        return (self.whole - 1) // 4 + 1


FULL = Sizes(
    {"mae": TINY, "d2mae, ViT-Base": BASE, "d2mae, ViT-Large": LARGE, "tinymim": BASE, "mimhd": BASE},
    {"mae": 4096, "d2mae, ViT-Base": 4096, "d2mae, ViT-Large": 2048, "tinymim": 1024, "mimhd": 1024},
)
SMALL = Shape(48, 2, 4)
SMOKE = Sizes(
    dict.fromkeys(FULL.teachers, SMALL), dict.fromkeys(FULL.batches, 4), size=32, patch=8, warm=2, rounds=2,
    product=64, rows=32, copied=2**16, tokens=(5,), attended=2, packed=12,
)  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], rounds: int = 8, each: int = 5) -> float:
    """Of one run: the median of rounds of several, so that a GPU has the next one before it has done the last."""
    taken = []
    for _ in range(rounds):
        finish()
        began = time.perf_counter()
        for _ in range(each):
            run()
        finish()
        taken.append((time.perf_counter() - began) / each)
    return statistics.median(taken[1:])


def ceilings(sizes: Sizes) -> dict[str, float]:
    """What the device does at best: bytes per second of copying, FLOP per second of bf16 products: a large one, and
    those of the models.
    """
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    found = {"copy": 2 * sizes.copied / seconds(lambda: target.copy_(source))}
    n, rows = sizes.product, sizes.rows
    shapes = {"product": (n, n, n)}
    for name, shape in (("ViT-Tiny", TINY), ("ViT-Base", BASE), ("ViT-Large", LARGE)):
        d = shape.dim
        shapes |= {f"{name}, {what}": (rows, d, out) for what, out in (("qkv", 3 * d), ("fc1", 4 * d))}
    for name, (m, k, out) in shapes.items():
        x, w = (torch.randn(size, dtype=torch.bfloat16, device=device()) for size in ((m, k), (out, k)))
        found[name] = 2.0 * m * k * out / seconds(partial(F.linear, x, w))
    return found


def stacks(name: str, sizes: Sizes) -> list[Stack]:
    """The blocks of a step. The parts of the last blocks that nobody reads are counted too: 1 to 2 %."""
    teacher, T = sizes.teachers[name], sizes.whole
    hides = name.startswith(("mae", "d2mae"))
    student = Stack(TINY.depth, sizes.seen if hides else T, TINY.dim)
    if name == "mae":
        return [student, Stack(1, T, TINY.dim // 2)]
    frozen = Stack(teacher.depth, student.tokens, teacher.dim, trained=False)
    if name == "mimhd":  # two views through the teacher's decoder
        return [student, frozen, Stack(2 * Case("mimhd").decoder.depth, T, Case("mimhd").decoder.dim)]
    return [student, frozen, *([Stack(1, T, TINY.dim // 2)] if hides else [])]


def made(name: str, sizes: Sizes) -> Method:
    """A method with random weights: ViT-Tiny with 12 heads, its teacher in bf16."""
    torch.manual_seed(0)
    if name == "mae":
        encoder = ViT(ViTShape(sizes.size, sizes.patch, TINY.dim, TINY.depth, TINY.heads))
        return MAE(encoder, build_decoder(encoder, DecoderSettings()))
    case = Case(name.partition(",")[0], teacher=sizes.teachers[name], size=sizes.size, patch=sizes.patch)
    return distilling(case, bf16_teacher=True)


def settings(sizes: Sizes, name: str, steps: int, **speed: Any) -> Config:
    """Of the loop, which knows nothing of the method."""
    return validate(
        {
            "encoder": {"image_size": sizes.size, "patch": sizes.patch},
            "method": {"name": "mae"},
            "schedule": {"batch": sizes.batches[name], "steps": steps},
            "speed": {"precision": "bf16", **speed},
            "run": {"log_steps": 10**6, "tensorboard": False},
        }
    )


def lying_ready(method: Method, config: Config, on: torch.device, number: int = 4) -> list[Batch]:
    """Batches as the loader would send them, on the device."""
    generator, size, ready = torch.Generator().manual_seed(0), config.encoder.image_size, []
    for _ in range(number):
        shape = (config.schedule.batch, 3, size, size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        masks = {
            name: sampler.collate(torch.stack([sampler.draw(generator) for _ in pixels]))
            for name, sampler in method.masks().items()
        }
        on_device = {name: mask.to(on) for name, mask in masks.items()}
        ready.append(Batch({"image": pixels.to(on)}, torch.arange(len(pixels), device=on), on_device))
    return ready


def train(
    name: str, sizes: Sizes, config: Config, watch: Callable[[int], None], run: RunFolder | None = None
) -> dict[str, float]:
    """Losses of the real loop on batches that lie on the device; `watch` is called before every step, with its number,
    and when all are done.
    """
    method, fabric = made(name, sizes), make_fabric(config.speed)
    ready = lying_ready(method, config, fabric.device)

    def batches(start: int, total: int) -> Generator[Batch, None, None]:
        for number in range(start, total):
            watch(number)
            yield ready[number % len(ready)]

    result = fit(method, config, fabric, batches, 10**6, run=run)
    watch(config.schedule.steps)
    return result.losses


def step(sizes: Sizes, name: str, form: str) -> Found:
    """Images per second of a training step, and by arithmetic its FLOP and bytes per second; peak memory in GB, and the
    last losses' mean, which all forms should share.
    """
    moments: dict[int, float] = {}

    def watch(number: int) -> None:
        if number in (sizes.warm, sizes.warm + sizes.rounds):
            finish()
            moments[number] = time.perf_counter()
            if number == sizes.warm and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    losses = train(name, sizes, settings(sizes, name, sizes.warm + sizes.rounds + 1, compile=form), watch)
    parts, (began, ended) = stacks(name, sizes), moments.values()
    rate = sizes.batches[name] * sizes.rounds / (ended - began)
    return {
        "images_per_second": rate,
        "flops": rate * sum(part.flops for part in parts),
        "moved": rate * sum(part.moved(form) for part in parts),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
        "loss": losses["total"],
    }


def waits(sizes: Sizes, name: str) -> Found:
    """Places that wait for the device in steps that log nothing. There should be none."""
    places: set[str] = set()

    def note(message: Warning | str, category: type[Warning], file: str, line: int, *_: object) -> None:
        places.add(f"{Path(file).name}:{line}")

    def watch(number: int) -> None:
        if torch.cuda.is_available() and number in (sizes.warm, sizes.warm + 2):
            torch.cuda.set_sync_debug_mode("warn" if number == sizes.warm else "default")
            warnings.simplefilter("always" if number == sizes.warm else "default")

    with warnings.catch_warnings():
        warnings.showwarning = note  # type: ignore[assignment]
        train(name, sizes, settings(sizes, name, sizes.warm + 4, compile="off"), watch)
    return {"places": sorted(places)}


def profiled(sizes: Sizes, name: str, form: str) -> Found:
    """The table of `run.profile`: phases of a step, and the operators that take most time."""
    config = settings(sizes, name, sizes.warm + 4, compile=form)
    config = config.model_copy(update={"run": config.run.model_copy(update={"profile": True})})
    with tempfile.TemporaryDirectory() as folder:
        with RunFolder.create(folder, config) as run:
            train(name, sizes, config, lambda number: None, run)
        with (Path(folder) / "profile" / "table.csv").open(newline="") as file:
            return {"rows": list(csv.DictReader(file))}


def attention(sizes: Sizes, tokens: int, heads: int) -> Found:
    """Milliseconds of attention by every kernel, forward and with its backward pass: width 192, bf16. What a kernel
    refuses is said in its place.
    """
    batch, width, on = sizes.attended, TINY.dim // heads, device()
    qkv = [
        torch.randn(batch, heads, tokens, width, dtype=torch.bfloat16, device=on, requires_grad=True) for _ in range(3)
    ]
    fused = F.scaled_dot_product_attention

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_logits(q, k).softmax(dim=-1) @ v

    kernels: dict[str, Callable[..., Tensor]] = {
        backend.name.removesuffix("_ATTENTION").lower(): by_backend(backend, fused)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    }
    kernels |= {"math": by_backend(SDPBackend.MATH, fused), "chosen": fused, "explicit": explicit}
    if on.type == "cuda":  # generating code for a processor takes long, and says nothing here
        flex: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
        kernels |= {"explicit, compiled": torch.compile(explicit, dynamic=False), "flex, compiled": flex}
    found: Found = {}
    for name, run in kernels.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # every reason for which a kernel is not chosen
                with torch.no_grad():
                    forward = seconds(partial(run, *qkv))
                found[name] = {"forward_ms": 1000 * forward, "both_ms": 1000 * seconds(partial(both, run, qkv))}
        except Exception as error:
            found[name] = str(error).strip().partition(".")[0]
    return found


def by_backend(backend: SDPBackend, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def inside(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return run(*qkv)

    return inside


def both(run: Callable[..., Tensor], qkv: list[Tensor]) -> tuple[Tensor, ...]:
    out = run(*qkv)
    return torch.autograd.grad(out, qkv, torch.ones_like(out))


def packed(sizes: Sizes, name: str, form: Literal["raw", "jpeg"]) -> Found:
    """Images per second and the share of time spent waiting for data of a training from packed images of 256 px, made
    of noise on the spot; loader processes as many as `speed.workers` takes.
    """
    batch = sizes.batches[name]
    case = Case(name.partition(",")[0], size=sizes.size, patch=sizes.patch)
    with tempfile.TemporaryDirectory() as folder:
        pictures, pack_folder = Path(folder) / "images", Path(folder) / "pack"
        photographs(pictures, sizes.packed)
        pack(str(pictures), pack_folder, form=form)
        teacher = {"path": "python:random"} if name != "mae" else {}
        config = validate(
            {
                "encoder": {"image_size": sizes.size, "patch": sizes.patch},
                "method": {"name": "mae"} if name == "mae" else method_settings(case),
                "teacher": teacher,
                "data": {"path": [str(pack_folder)] * max(1, 8 * batch // sizes.packed)},
                "schedule": {"batch": batch, "steps": sizes.warm + sizes.rounds},
                "speed": {"precision": "bf16", "compile": "on" if device().type == "cuda" else "off"},
                "run": {
                    "out": str(Path(folder) / "run"), "tensorboard": False, "report": False, "pictures": 0,
                    "log_steps": max(1, sizes.rounds // 2),
                },
            }
        )  # fmt: skip
        given = made(name, sizes).get_submodule("teacher") if teacher else None
        api.train(config, teacher=given)
        line = read_run(Path(folder) / "run").lines("train")[-1]
    return {"images_per_second": line["images_per_second"], "data_wait": line["data_wait"], "cores": os.cpu_count()}


def photographs(folder: Path, number: int) -> None:
    """JPEG files of 500 x 375 px of smooth noise, about as large as photographs."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        coarse = torch.rand(1, 3, 47, 63, generator=generator)
        fine = F.interpolate(coarse, (375, 500), mode="bicubic") + 0.05 * torch.randn(375, 500, generator=generator)
        write_jpeg(fine[0].clamp(0, 1).mul(255).byte(), str(folder / f"{i:05}.jpg"), quality=90)


@dataclass(frozen=True)
class Item:
    """One measurement: a function of this module and what it takes beside sizes."""

    name: str
    measure: Callable[..., Found]
    options: tuple[Any, ...] = ()


def items(sizes: Sizes) -> list[Item]:
    """The most telling first."""
    forms = FORMS if torch.cuda.is_available() else ("off",)
    main, others = list(sizes.batches)[:3], list(sizes.batches)[3:]
    default = "on" if torch.cuda.is_available() else "off"
    found = [Item("ceilings", ceilings)]
    found += [Item(f"step, {name}, {form}", step, (name, form)) for form in forms[:2] for name in main]
    found += [Item(f"profile, {name}", profiled, (name, default)) for name in main[:2]]
    found += [Item(f"packed, {name}, raw", packed, (name, "raw")) for name in main[:2]]
    found += [Item(f"step, {name}, {form}", step, (name, form)) for form in forms[2:] for name in main]
    found += [Item(f"attention, {T}, {heads}", attention, (T, heads)) for T in sizes.tokens for heads in (3, 12)]
    found += [Item(f"step, {name}, {form}", step, (name, form)) for name in others for form in forms]
    found += [Item(f"waits, {name}", waits, (name,)) for name in sizes.batches]
    return [*found, Item("packed, mae, jpeg", packed, ("mae", "jpeg"))]


def alone(item: Item, limit: float) -> Found:
    """An item's answer, measured in a process of its own within `limit` seconds; or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--item", item.name]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {limit:.0f} s"}
    if ended.returncode:
        return {"failed": (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]}
    answer: Found = json.loads(ended.stdout.strip().splitlines()[-1])
    return answer


def here(item: Item, sizes: Sizes) -> Found:
    """An item's answer, measured in this process; or why there is none."""
    try:
        return item.measure(sizes, *item.options)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def measure(todo: list[Item], answer: Callable[[Item, float], Found], minutes: float) -> dict[str, Found]:
    """All items' answers, as far as the minutes go; every one may take a third of them."""
    ends, found = time.monotonic() + 60 * minutes, {}
    for item in todo:
        left = ends - time.monotonic()
        found[item.name] = answer(item, min(left, 20 * minutes)) if left > 0 else {"failed": "no time was left"}
        print(f"{item.name}: {json.dumps(found[item.name])[:300]}", file=sys.stderr, flush=True)
    return found


def tables(found: dict[str, Found], described: str) -> str:
    """Markdown: steps beside ceilings and bars, then everything else."""
    lines = [f"Measured on {described} by `python -m benchmarks.gpu`.", ""]
    best = found.get("ceilings", {})
    lines += [f"- {name}: {value / 1e12:,.3g} {'TB' if name == 'copy' else 'TFLOP'}/s" for name, value in rates(best)]
    lines += ["", "| step | compile | images/s | bar | of copying | of products | GB | loss |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    failed = []
    for name, answer in found.items():
        kind, *which = name.split(", ", 1)
        if "failed" in answer:
            failed.append(f"- {name}: {answer['failed']}")
        elif kind == "step":
            method, _, form = which[0].rpartition(", ")
            shares = [
                f"{answer[a] / best[b]:.0%}" if b in best else "" for a, b in (("moved", "copy"), ("flops", "product"))
            ]
            cells = [method, form, f"{answer['images_per_second']:,.0f}", bar(method), *shares]
            lines.append(f"| {' | '.join(cells)} | {answer['memory_gb']:.1f} | {answer['loss']:.4f} |")
    lines += [
        "",
        "| packed images | images/s | bar | waiting for data (bar 10 %) | cores |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, answer in chosen(found, "packed"):
        rate, wait = f"{answer['images_per_second']:,.0f}", f"{answer['data_wait']:.1%}"
        lines.append(f"| {name} | {rate} | {bar('packed, ' + name.rpartition(', ')[0])} | {wait} | {answer['cores']} |")
    lines += ["", "| attention: tokens, heads | kernel | forward ms | with backward ms |", "| --- | --- | --- | --- |"]
    for name, answer in chosen(found, "attention"):
        for kernel, ms in answer.items():
            cells = [f"{ms['forward_ms']:.3f}", f"{ms['both_ms']:.3f}"] if isinstance(ms, dict) else [ms, ""]
            lines.append(f"| {name} | {kernel} | {' | '.join(cells)} |")
    for name, answer in chosen(found, "profile"):
        lines += ["", f"| {name}: where a step's time goes | ms | share |", "| --- | --- | --- |"]
        for row in answer["rows"][:18]:
            lines.append(f"| {row['name'][:60]} | {float(row['ms']):.2f} | {float(row['share']):.1%} |")
    waiting = [
        f"- {name} waits for the device at {', '.join(a['places'])}"
        for name, a in chosen(found, "waits")
        if a["places"]
    ]
    lines += ["", *(waiting or ["No step that logs nothing waits for the device."])] if chosen(found, "waits") else []
    lines += ["", "Not measured:", *failed] if failed else []
    return "\n".join(lines) + "\n"


def rates(best: Found) -> list[tuple[str, float]]:
    return [] if "failed" in best else list(best.items())


def bar(name: str) -> str:
    return f"{BARS[name]:,.0f}" if name in BARS else ""


def chosen(found: dict[str, Found], kind: str) -> list[tuple[str, Found]]:
    """What was measured of a kind."""
    pairs = ((name.partition(", "), answer) for name, answer in found.items() if "failed" not in answer)
    return [(rest, answer) for (first, _, rest), answer in pairs if first == kind]


def describe() -> str:
    what = torch.cuda.get_device_name() if torch.cuda.is_available() else "a processor"
    return f"{what}, {os.cpu_count()} cores, PyTorch {torch.__version__}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures everything on a GPU.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in this process")
    parser.add_argument("--item", help="only this one, printed as JSON")
    given = parser.parse_args(arguments)
    sizes = SMOKE if given.smoke else FULL
    todo = items(sizes)
    if given.item:
        (item,) = (item for item in todo if item.name == given.item)
        print(json.dumps(item.measure(sizes, *item.options)))
        return
    if not (given.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU; --smoke shows that everything works")

    answer = (lambda item, limit: here(item, sizes)) if given.smoke else alone
    found = measure(todo, answer, given.minutes)
    table = tables(found, describe())
    given.out.write_text(json.dumps({"device": describe(), "bars": BARS, "found": found}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
