"""What a run will take: memory, hours and disk, before it is started.

Everything is `measured` on this machine or `arithmetic`, and says which. The formulas are in docs/cluster.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from mimlet.config import Config
from mimlet.errors import ConfigError, DataError
from mimlet.methods.settings import METHODS
from mimlet.planning.gpus import GPU, GPUS, find_gpu, gpu_called
from mimlet.planning.request import Request, read_request

if TYPE_CHECKING:
    from mimlet.data.source import Source
    from mimlet.methods.base import Method
    from mimlet.planning.cost import Cost, Efficiency
    from mimlet.planning.measure import Measured

How = Literal["measured", "arithmetic"]

MINUTE = 60.0
LEFT = 0.9
"""Share of a GPU's memory that a plan may fill; the rest is for PyTorch's pool."""
CONTEXT = 0.8e9
"""Bytes that CUDA and its libraries take."""
BUSY = 32
"""Images at a time, below which a GPU waits for its host."""
LINK = 25e9
"""Bytes per second between GPUs at the slow end: PCIe 4."""
MEASURED_ELSEWHERE = (("as it lies", 60_000, 527), ("packed, JPEG", 30_000, 2238), ("packed, raw", 262_000, 4026))
"""Form, bytes of an image and images per second and core of 500 x 375 px photos at 224 px: where no data are given."""


@dataclass(frozen=True)
class Work:
    """What there is to compute: FLOPs of an image in trained and in frozen parts, bytes it moves, operations per step
    and GPU, bytes of gradients that GPUs exchange in a step.
    """

    trained_flops: float
    frozen_flops: float
    moved: float
    operations: float
    exchanged: float
    how: How = "arithmetic"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU with `images` at a time. `others`: frozen parts and followers. `total` has CUDA's own."""

    images: int
    weights: float
    gradients: float
    optimizer: float
    others: float
    activations: float
    total: float
    how: How = "arithmetic"


@dataclass(frozen=True)
class Timing:
    """A device and how long it takes, from the fast to the slow end. `settings`: what has to be set so that it fits,
    None where nothing helps. `memory`: bytes it then takes on each; `capacity`: what there is.
    """

    device: str
    devices: int
    images_per_second: tuple[float, float]
    step_seconds: tuple[float, float]
    hours: tuple[float, float]
    memory: float
    capacity: float
    settings: str | None
    how: How


@dataclass(frozen=True)
class Loading:
    """A form of the data: bytes of all images, images per second and core, cores that keep up with the slow and the
    fast end of the first timing.
    """

    form: str
    bytes: float
    images_per_second: float
    cores: tuple[float, float]
    how: How


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint, of all that stand there at a time, and of the exported model."""

    checkpoint: float
    kept: float
    exported: float
    how: How = "arithmetic"


@dataclass(frozen=True)
class RunPlan:
    """See `plan`. `data`: where the numbers of images come from; `notes`: what was assumed."""

    recipe: str
    title: str
    data: str
    images: int
    judged: int
    batch: int
    steps: int
    steps_per_epoch: int
    evaluations: int
    work: Work
    memory: Memory
    timings: tuple[Timing, ...]
    loading: tuple[Loading, ...]
    disk: Disk
    notes: tuple[str, ...]

    def json(self) -> str:
        """For programs: FLOPs, bytes, seconds, hours."""
        return json.dumps(asdict(self), indent=2)

    def show(self) -> None:
        """Prints it for people."""
        from mimlet.tables import print_table

        judged = f"; {self.evaluations} evaluations of {self.judged:,} images" if self.judged else ""
        steps = f"{self.steps:,} steps of {self.batch:,}, {self.steps_per_epoch:,} per epoch{judged}"
        work, memory, disk = self.work, self.memory, self.disk
        frozen = work.trained_flops + work.frozen_flops
        sentences = {
            "work": f"{_si(frozen, 'FLOP')} and {_si(work.moved, 'B')} moved per image "
            f"({work.frozen_flops / frozen:.0%} in frozen parts), {work.operations:,.0f} operations per step",
            "memory": f"{_si(memory.total, 'B')} on each GPU with {memory.images:,} images at a time: weights "
            f"{_si(memory.weights, 'B')}, gradients {_si(memory.gradients, 'B')}, optimiser "
            f"{_si(memory.optimizer, 'B')}, frozen parts and followers {_si(memory.others, 'B')}, activations "
            f"{_si(memory.activations, 'B')}",
            "disk": f"{_si(disk.kept, 'B')} of checkpoints ({_si(disk.checkpoint, 'B')} each), exported "
            f"{_si(disk.exported, 'B')}",
        }
        if work.exchanged:
            sentences["work"] += f", {_si(work.exchanged, 'B')} of gradients exchanged"
        rows = [{"": name, "what": what, "how": getattr(self, name).how} for name, what in sentences.items()]
        say(f"{self.recipe}: {self.title}")
        print_table(f"{self.data}; {steps}", rows)
        times = [
            {
                "device": f"{each.devices} x {each.device}" if each.devices > 1 else each.device,
                "images/s": _range(*(f"{_digits(speed):,}" for speed in reversed(each.images_per_second))),
                "whole run": _range(*(_time(3600 * hours) for hours in each.hours)),
                "memory": _si(each.memory, "B"),
                "needs": "more memory" if each.settings is None else each.settings or "-",
                "how": each.how,
            }
            for each in self.timings
        ]
        if times:
            print_table("time", times)
        forms = [
            {
                "images": each.form,
                "disk": _si(each.bytes, "B"),
                "images/s per core": f"{_digits(each.images_per_second):,}",
                "cores needed": _range(*(f"{_digits(cores):,}" for cores in each.cores)),
                "how": each.how,
            }
            for each in self.loading
        ]
        if forms:
            print_table(f"loading, for {self.timings[0].device}" if self.timings else "loading", forms)
        for note in self.notes:
            say(f"note: {note}")


def say(text: str) -> None:
    """A sentence between the tables."""
    from rich.console import Console

    Console(highlight=False).print(text, markup=False, soft_wrap=True)


def plan(
    recipe: str = "mae_tiny",
    overrides: Sequence[str] | None = None,
    *,
    gpus: int = 0,
    gpu: str | Sequence[str] | None = None,
    images: int = 0,
    cores: int = 0,
    measure: float | None = None,
    **options: object,
) -> RunPlan:
    """Memory, hours and disk of a run; `.show()` prints them.

    `gpus`: so many, of the kinds that `gpu` names (none: what is here, or all that are known). `images`: how many there
    are, where `data` is not given or only a sample. `cores`: of the machine that loads; 0: those here, and elsewhere
    enough. `measure`: seconds of real steps on this machine; none: a minute, if it is the hardware asked for. The other
    options are those of `pretrain` and `finetune`. A teacher may be named by its size: `teacher="vit_base"`.

    Raises `UserError`.
    """
    named = [find_gpu(name) for name in ([gpu] if isinstance(gpu, str) else gpu or ())]
    for option, value in (("gpus", gpus), ("images", images), ("cores", cores), ("measure", measure or 0)):
        if value < 0:
            raise ConfigError(f"{option} is {value}; expected 0 or more")
    request = read_request(recipe, overrides or (), **options)
    return _Planner(request, gpus, named, images, cores, measure).plan()


class _Planner:
    """One plan under way."""

    def __init__(
        self, request: Request, gpus: int, named: Sequence[GPU], images: int, cores: int, measure: float | None
    ) -> None:
        import torch

        from mimlet.data.source import open_source
        from mimlet.planning.models import build

        self.request, self.config, self.notes = request, request.config, list[str]()
        config, assumed = request.config, request.assumed
        self.labels = METHODS[config.method.name].labels
        self.cuda = torch.cuda.is_available() and config.speed.accelerator in ("auto", "cuda")
        self.here = self._gpu_here() if self.cuda else None
        self.gpus = named or ([self.here] if self.here else list(GPUS.values()))
        self.devices = max(1, gpus)
        asked = self.here in self.gpus if self.cuda else not (named or gpus)
        self.seconds = (MINUTE if asked else 0.0) if measure is None else measure
        self.on_cpu = self.seconds > 0 and not self.cuda
        self.cores = cores
        if config.teacher.precision in ("fp8", "int8") or (config.teacher.precision == "auto" and not self.on_cpu):
            if config.teacher.precision != "auto":
                self.notes.append(f"teacher.precision={config.teacher.precision} is counted as bf16")
            teacher = config.teacher.model_copy(update={"precision": "bf16"})
            self.config = config = config.model_copy(update={"teacher": teacher})

        source = open_source(config.data.path, labelled=self.labels) if config.data.path else None
        self.source: Source | None = source
        self.images, self.data = self._count_images(images)
        found = len(source.classes) if source else 0
        self.classes = (getattr(config.method, "classes", 0) or found or assumed.classes) if self.labels else 0
        self.judged = sum(len(open_source([path])) for path in (*config.data.eval, *config.data.labelled))
        if self.labels and not self.judged and not source:
            self.judged = assumed.judged
        self.method: Method = build(config, request.stand_ins, self.classes)
        for each in request.stand_ins:
            self.notes.append(f"{each.setting} is not there: counted as {each.title}, without its weights")
        if config.sweep:
            self.notes.append("this is one point of the recipe's sweep")

    def plan(self) -> RunPlan:
        """Counts, measures, adds up."""
        from mimlet.data.loader import steps_per_epoch
        from mimlet.train.loop import Plan

        config = self.config
        try:
            per_epoch = steps_per_epoch(self.images, config.schedule.batch)
        except DataError as error:
            raise DataError(f"{error}, or say with --images how many there are, if these are a sample") from None
        schedule = Plan.make(config.schedule, per_epoch)
        self.steps = schedule.total
        every = schedule.evaluate_every
        self.evaluations = -(-schedule.total // every) if every else 1
        if not self.judged:
            self.evaluations = 0
        parts = self.devices * config.speed.accumulate
        if config.schedule.batch % parts:
            raise ConfigError(
                f"schedule.batch {config.schedule.batch} cannot be split evenly over {self.devices} GPUs x "
                f"{config.speed.accumulate} pieces each (speed.accumulate); use a multiple of {parts}, such as "
                f"{-(-config.schedule.batch // parts) * parts}"
            )
        piece = self.cost.piece(config.schedule.batch // parts)
        images = config.schedule.batch // parts
        loading = self._loading()
        timings = self._timings(loading[0].images_per_second if loading else 0.0)
        if timings:
            needed = timings[0].images_per_second
            loading = [
                replace(each, cores=(needed[1] / each.images_per_second, needed[0] / each.images_per_second))
                for each in loading
            ]
        cost, several = self.cost, self.devices > 1
        best = cost.checkpoint - cost.optimizer if self.judged else 0
        return RunPlan(
            recipe=self.request.name,
            title=config.title,
            data=self.data,
            images=self.images,
            judged=self.judged,
            batch=config.schedule.batch,
            steps=schedule.total,
            steps_per_epoch=per_epoch,
            evaluations=self.evaluations,
            work=Work(
                float(piece.flops[~piece.frozen].sum()) / images,
                float(piece.flops[piece.frozen].sum()) / images,
                float(piece.moved.sum()) / images,
                piece.operations * config.speed.accumulate + cost.update.operations,
                float(cost.gradients) if several else 0.0,
            ),
            memory=self._memory(cost, images),
            timings=tuple(timings),
            loading=tuple(loading),
            disk=Disk(cost.checkpoint, (config.run.keep + 1) * cost.checkpoint + best, cost.exported),
            notes=tuple(self.notes),
        )

    @cached_property
    def cost(self) -> Cost:
        """Counted as configured."""
        return self._count(self.config)

    @cached_property
    def checkpointed(self) -> Cost:
        """Counted with activation checkpointing."""
        speed = self.config.speed.model_copy(update={"checkpointing": True})
        return self._count(self.config.model_copy(update={"speed": speed}))

    def _count(self, config: Config) -> Cost:
        from mimlet.planning.cost import count

        return count(self.method, config, self.classes)

    def _count_images(self, given: int) -> tuple[int, str]:
        """How many images an epoch has, and how this is known."""
        from mimlet.data.subset import choose

        data, source, assumed = self.config.data, self.source, self.request.assumed
        if given:
            return given, f"{given:,} images, as given"
        if source is None:
            if data.subset:
                raise ConfigError(f"data.subset={data.subset} is a part of --data; give --data, or --images")
            return assumed.images, f"{assumed.images:,} images of {assumed.title} (assumed: give --data or --images)"
        names = map(source.name, range(len(source)))
        count = len(choose(source.labels, data.subset, data.subset_seed, names))
        return count, f"{count:,} of them used" if data.subset else source.describe()

    def _loading(self) -> list[Loading]:
        from mimlet.planning.measure import measure_loading

        if self.source is None:
            if self.config.encoder.image_size < 128:
                self.notes.append("give --data to learn how fast images are loaded")
                return []
            self.notes.append("loading is for photos of 500 x 375 px on another machine; give --data to measure it")
            return [
                Loading(form, float(size * self.images), float(speed), (0.0, 0.0), "arithmetic")
                for form, size, speed in MEASURED_ELSEWHERE
            ]
        return [
            Loading(each.form, each.size * self.images, each.speed, (0.0, 0.0), "measured")
            for each in measure_loading(self.source, self.method, self.config, "cpu" if self.on_cpu else "cuda")
        ]

    def _timings(self, loaded: float) -> list[Timing]:
        """First what is measured. `loaded`: images per second and core."""
        from mimlet.planning.cost import FAST, SLOW
        from mimlet.planning.measure import measure_steps

        timings = []
        for gpu in self.gpus:
            cost, pieces, settings = self._fitting(gpu)
            most = self.cores * loaded
            ends = [self._step(cost, gpu, pieces, end) for end in (FAST, SLOW)]
            if self.devices > 1:
                ends[1] += cost.gradients / LINK
            if most:
                ends = [max(end, self.config.schedule.batch / most) for end in ends]
            memory = self._memory(cost, self.config.schedule.batch // (self.devices * pieces)).total
            timings.append(self._timing(gpu.name, ends, memory, 1e9 * gpu.memory, settings, "arithmetic"))
        if not self.seconds:
            return timings
        share = self.config.schedule.batch // self.config.speed.accumulate // (1 if self.on_cpu else self.devices)
        measured = measure_steps(self.method, self.config, self.classes, share, self.seconds)
        return [self._measured(measured, loaded), *timings]

    def _measured(self, measured: Measured, loaded: float) -> Timing:
        """A CPU computes and loads with the same cores; a GPU does not wait for loading that keeps up."""
        import torch

        cores = self.cores or _usable_cores()
        each, load = measured.seconds / measured.images, 1 / (loaded * cores) if loaded else 0.0
        if self.cuda:
            name, memory = torch.cuda.get_device_name(0), float(torch.cuda.get_device_properties(0).total_memory)
            step = self.config.schedule.batch * max(each / self.devices, load)
        else:
            name = f"this CPU, {torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else "this CPU"
            memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
            step = self.config.schedule.batch * (each + load)
        self.notes.append(
            f"measured: {measured.steps} steps of {measured.images} images, {_digits(1 / each):,} images/s, on one "
            f"device{', loading added' if load else ', without loading'}"
        )
        asked, share = self.config.speed.accumulate, self.config.schedule.batch
        n = asked if measured.memory else self._pieces(self.cost, share, LEFT * memory, cpu=True)
        settings = None if not n else f"speed.accumulate={n}" if n > asked else ""
        used = measured.memory or self._memory(self.cost, share // (n or asked), cpu=True).total
        return self._timing(name, [step, step], used, memory, settings, "measured", self.devices if self.cuda else 1)

    def _timing(
        self,
        name: str,
        ends: Sequence[float],
        memory: float,
        capacity: float,
        settings: str | None,
        how: How,
        devices: int = 0,
    ) -> Timing:
        fast, slow = ends
        piece = self.cost.piece(self.config.schedule.batch)
        look = self.judged * self.cost.forward / float(piece.flops.sum())  # in steps
        steps = self.steps + self.evaluations * look
        batch = self.config.schedule.batch
        return Timing(
            name,
            devices or self.devices,
            (batch / fast, batch / slow),
            (fast, slow),
            (steps * fast / 3600, steps * slow / 3600),
            memory,
            capacity,
            settings,
            how,
        )

    def _fitting(self, gpu: GPU) -> tuple[Cost, int, str | None]:
        """What to set so that the run fits: more pieces, which cost next to nothing; checkpointing only where the
        pieces would be too small to keep a GPU busy, and it is faster.
        """
        from mimlet.planning.cost import SLOW

        asked, share = self.config.speed.accumulate, self.config.schedule.batch // self.devices
        room = LEFT * 1e9 * gpu.memory
        found, n = self.cost, self._pieces(self.cost, share, room)
        settings = [f"speed.accumulate={n}"] if n > asked else []
        if (not n or share // n < BUSY < share) and not self.config.speed.checkpointing:
            other = self._pieces(self.checkpointed, share, room)
            pay = n and self._step(self.checkpointed, gpu, other or 1, SLOW) >= self._step(self.cost, gpu, n, SLOW)
            if other and not pay:
                found, n = self.checkpointed, other
                settings = [*([f"speed.accumulate={n}"] if n > asked else []), "speed.checkpointing=true"]
        return (found, n, " ".join(settings)) if n else (self.cost, asked, None)

    def _pieces(self, cost: Cost, share: int, room: float, cpu: bool = False) -> int:
        """The smallest `speed.accumulate` by which a device's share of a batch fits; 0 where none does."""
        even = share % 2 == 0  # mixup takes pairs
        counts = (n for n in range(self.config.speed.accumulate, share + 1) if share % n == 0)
        fitting = (n for n in counts if self._memory(cost, share // n, cpu).total <= room)
        return next((n for n in fitting if not even or share // n % 2 == 0), 0)

    def _memory(self, cost: Cost, images: int, cpu: bool = False) -> Memory:
        """On each GPU. DDP keeps gradients twice, FSDP a share of everything that is trained."""
        n, sharded = self.devices, self.config.speed.strategy == "fsdp"
        share = n if sharded and not cpu else 1
        weights, optimizer = cost.weights / share, cost.optimizer / share
        gradients = cost.gradients / share * (2 if n > 1 and not (sharded or cpu) else 1)
        activations = cost.piece(images).activations
        total = weights + gradients + optimizer + cost.others + activations + (0 if cpu else CONTEXT)
        return Memory(images, weights, gradients, optimizer, float(cost.others), activations, total)

    def _step(self, cost: Cost, gpu: GPU, pieces: int, end: Efficiency) -> float:
        """Seconds of a step on so many of these GPUs."""
        half = self.config.speed.precision != "32"
        piece = cost.piece(self.config.schedule.batch // (self.devices * pieces))
        return pieces * end.seconds(piece, gpu, half) + end.seconds(cost.update, gpu, half)

    def _gpu_here(self) -> GPU:
        """What CUDA finds; where it is not in the table, its arithmetic is left to a measurement."""
        import torch

        name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 1e9
        found = gpu_called(name, memory)
        if found is None:
            raise ConfigError(f"this GPU, {name}, is not in the table; name one that is like it: {', '.join(GPUS)}")
        return found


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _si(value: float, unit: str) -> str:
    """1.92e9, 'B' -> '1.92 GB'."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def _time(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, size, most in (("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7200), ("h", 3600, 4 * 86400)):
        if seconds < most:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} d"


def _digits(value: float) -> float | int:
    """Two digits, or three from a hundred on: no plan knows more."""
    rounded = float(f"{value:.{2 if value < 100 else 3}g}")
    return int(rounded) if rounded >= 10 else rounded


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} - {high}"
