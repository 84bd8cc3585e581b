"""`speed.compile`: what is compiled, when, and what happens where it fails. Mostly with the tracing half of the
compiler; generating code takes its time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mimlet.config import SpeedSettings
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError, TrainingStopped
from mimlet.methods.base import Clock
from mimlet.methods.mae import MAE, build_decoder
from mimlet.methods.settings import DecoderSettings
from mimlet.models.encoder import Encoder
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.run import RunFolder, read_run
from mimlet.train.compiling import PAYS_AFTER, Compiler, compiled_parts, form_of
from mimlet.train.distributed import Piece, Step, make_fabric
from tests.data.images import make_folder
from tests.tiny import pretrain
from tests.train.toy import Toy, config, train

CLOCK = Clock(0, 1, 1, 0)
COMPILE = nn.Module.compile


class Traced:
    """A compiler that only traces: how many graphs it made, and how often they ran."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*x: Any) -> Any:
            self.runs += 1
            return graph.forward(*x)

        return run


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    torch._dynamo.reset()
    trace = Traced()
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: COMPILE(module, backend=trace, **options))
    yield trace
    torch._dynamo.reset()


def mae() -> MAE:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(16, 8, 24, 2, 3), drop_path=0.2)
    return MAE(encoder, build_decoder(encoder, DecoderSettings(dim=12, heads=3)))


def batch(size: int = 4) -> Batch:
    noise = torch.rand(size, 4, generator=torch.Generator().manual_seed(1))
    return Batch({"image": torch.randn(size, 3, 16, 16)}, torch.arange(size), {"mask": Mask.from_noise(noise, 0.75)})


@pytest.mark.parametrize(
    ("setting", "device", "steps", "form"),
    [
        ("auto", "cpu", 10 * PAYS_AFTER, "off"),
        ("auto", "mps", 10 * PAYS_AFTER, "off"),
        ("auto", "cuda", PAYS_AFTER, "on"),
        ("auto", "cuda", PAYS_AFTER - 1, "off"),
        ("on", "cpu", 1, "on"),
        ("off", "cuda", 10 * PAYS_AFTER, "off"),
        ("graphs", "cuda", 1, "graphs"),
    ],
)
def test_when_it_compiles(setting: Any, device: str, steps: int, form: str) -> None:
    assert form_of(SpeedSettings(compile=setting), device, steps) == form


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"speed\.compile=graphs needs a GPU \(CUDA\), and this runs on cpu"):
        make_fabric(SpeedSettings(accelerator="cpu", compile="graphs"))


@pytest.mark.parametrize(
    ("ema", "expected"),
    [
        ({}, ["encoder"]),
        ({"encoder": "student", "head": "student_head"}, ["encoder", "student"]),
        ({"momentum_encoder": "encoder", "momentum_projector": "projector"}, ["encoder", "momentum_encoder"]),
    ],
)
def test_encoders_are_compiled_with_those_they_follow(ema: dict[str, str], expected: list[str]) -> None:
    method = nn.Module()
    names = sorted({"encoder", *ema, *ema.values()})
    for name in names:
        method.add_module(name, nn.Linear(1, 1))
    method.ema, method.frozen = ema, ()  # type: ignore[assignment]
    compiled = compiled_parts(method)  # type: ignore[arg-type]
    assert [name for part in compiled for name in names if getattr(method, name) is part] == expected


def test_decoders_and_teachers_are_compiled_too() -> None:
    method = mae()
    assert compiled_parts(method) == [method.encoder, method.decoder]
    teacher = nn.Module()
    teacher.encoder = ViT(ViTShape(16, 8, 24, 1, 3))
    method.teacher, method.frozen = teacher, ("teacher",)  # type: ignore[misc]
    assert compiled_parts(method)[2:] == [teacher.encoder]
    teacher.encoder = nn.Linear(1, 1)  # of somebody else's
    assert len(compiled_parts(method)) == 2


def test_steps_run_what_the_trial_has_compiled_and_compile_nothing(traced: Traced) -> None:
    method, fabric, compiler = mae().train(), make_fabric(SpeedSettings(accelerator="cpu")), Compiler("on")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert compiler.start(method, fabric, batch(), CLOCK) == ""
    assert (traced.graphs, traced.runs) == (2, 2)
    assert all(parameter.grad is None for parameter in method.parameters())
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
    step = fabric.setup_module(Step(method))
    with compiler.computing():
        fabric.backward(step(Piece(batch(), CLOCK))["reconstruction"])
    assert (traced.graphs, traced.runs) == (2, 4)
    with compiler.computing():
        step(Piece(batch(6), CLOCK))
    with compiler.pausing():
        step(Piece(batch(), CLOCK))
    assert (traced.graphs, traced.runs) == (2, 4)
    compiler.stop()
    step(Piece(batch(), CLOCK))
    assert (traced.graphs, traced.runs) == (2, 4)


def test_students_share_the_compiled_teacher(traced: Traced) -> None:
    fabric = make_fabric(SpeedSettings(accelerator="cpu"))
    methods, teacher = [mae(), mae()], nn.Module()
    teacher.encoder = ViT(ViTShape(16, 8, 24, 1, 3))
    for method in methods:
        method.teacher, method.frozen = teacher, ("teacher",)  # type: ignore[misc]
    compilers = [Compiler("on"), Compiler("on")]
    for compiler, method in zip(compilers, methods, strict=True):
        assert compiler.start(method, fabric, batch(), CLOCK) == ""
    assert [len(compiler.parts) for compiler in compilers] == [3, 2]


def test_a_compiler_that_fails_in_the_backward_pass_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("no kernel")

    def broken(module: nn.Module, **options: Any) -> None:
        module._compiled_call_impl = lambda *x, **named: Fails.apply(module._call_impl(*x, **named).latent)

    monkeypatch.setattr(Encoder, "compile", broken)
    method = mae()
    method.decoder.forward = lambda latent, *_, **__: latent  # type: ignore[method-assign]
    compiler = Compiler("on")
    assert compiler.start(method, make_fabric(SpeedSettings(accelerator="cpu")), batch(), CLOCK) != ""
    assert compiler.form == "off"
    assert not compiler.parts
    assert method.encoder._compiled_call_impl is None


def test_gradients_of_graphs_are_made_our_own() -> None:
    weight = nn.Parameter(torch.ones(3))
    given = torch.arange(3.0)
    for form in ("on", "graphs"):
        weight.grad = given
        Compiler(form).own([weight, nn.Parameter(torch.ones(1))])  # type: ignore[arg-type]
        assert torch.equal(weight.grad, given)
        assert (weight.grad.data_ptr() == given.data_ptr()) is (form == "on")


def test_compiled_training_is_the_same(traced: Traced) -> None:
    states = [train(config(speed={"compile": compiled}), Toy(dropout=0))[0].state_dict() for compiled in (False, True)]
    assert traced.graphs
    assert traced.runs > 2 * 16
    torch.testing.assert_close(states[0], states[1])


def test_a_compiler_that_fails_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: nn.Module, **options: Any) -> None:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(nn.Module, "compile", fail)
    settings = config(speed={"compile": True})
    with RunFolder.create(tmp_path, settings) as run:
        method, _ = train(settings, run=run)
    torch.testing.assert_close(method.state_dict(), train()[0].state_dict(), rtol=0, atol=0)
    notes = [line["text"] for line in read_run(tmp_path).lines("note")]
    assert notes == ["continuing without torch.compile, which failed: RuntimeError: no compiler"]


def test_generated_code_repeats_itself_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With code generated for the processor, drop-out inside: the shortest way there, without a pool of processes and
    without vectors, whose tests are programs of their own.
    """
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    settings = config(speed={"compile": True})
    with inductor.patch({"compile_threads": 1, "cpp.simdlen": 1, "cpp.vec_isa_ok": True}):
        whole, again = (train(settings, Toy(norm=False))[0].state_dict() for _ in range(2))
        with RunFolder.create(tmp_path, settings) as run, pytest.raises(TrainingStopped):
            train(settings, Toy(norm=False), run=run, signals={9: 15})
        with RunFolder.create(tmp_path, settings, resume=True) as run:
            resumed = train(settings, Toy(norm=False), run=run)[0].state_dict()
    assert not any("without torch.compile" in line["text"] for line in read_run(tmp_path).lines("note"))
    for other in (again, resumed):
        torch.testing.assert_close(other, whole, rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_do_not_change_a_compiled_training(tmp_path: Path, traced: Traced) -> None:
    data = make_folder(tmp_path / "images", each=8)
    runs = [
        pretrain(data, tmp_path / str(workers), "speed.compile=on", f"speed.workers={workers}", "encoder.drop_path=0.1")
        for workers in (0, 2)
    ]
    assert traced.runs >= 2 * 2 * 3
    assert (runs[0] / "encoder.safetensors").read_bytes() == (runs[1] / "encoder.safetensors").read_bytes()
    assert load_file(runs[0] / "encoder.safetensors")
