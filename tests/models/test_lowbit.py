"""Teachers in 8 bits. torchao is not in every installation: what does not need it is tested with a stand-in."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimlet.config import TeacherSettings, check_packages, validate
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.methods.mae import MAE, build_decoder
from mimlet.methods.settings import DecoderSettings
from mimlet.models import lowbit
from mimlet.models.features import Taps
from mimlet.models.linear import Linear, linear
from mimlet.models.lowbit import check_lowbit, is_product
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teachers, load_teacher
from mimlet.models.vit import ViT
from mimlet.train.distributed import Step

SHAPE = ViTShape(32, 8, 48, 3, 3)
CHOSEN = [f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture
def teacher_file(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "teacher.pt"
    torch.save(ViT(SHAPE).state_dict(), path)
    return str(path)


def loaded(path: str, precision: Any, accelerator: Any = "cpu") -> Any:
    settings = TeacherSettings(path=path, precision=precision, heads=3)
    return load_teacher(settings, ViT(SHAPE), accelerator=accelerator)


def images() -> tuple[Tensor, Mask]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(4, 16, generator=generator)
    return torch.randn(4, 3, 32, 32, generator=generator), Mask.from_noise(noise, 0.5)


def test_only_the_products_of_blocks_are_rounded(teacher_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def quantize(model: nn.Module, settings: str, filter_fn: Callable[[nn.Module, str], bool]) -> None:
        asked.append((settings, [name for name, module in model.named_modules() if filter_fn(module, name)]))

    stand_in = ModuleType("torchao.quantization")
    stand_in.quantize_ = quantize  # type: ignore[attr-defined]
    stand_in.PerRow = lambda: "rows"  # type: ignore[attr-defined]
    stand_in.Int8DynamicActivationInt8WeightConfig = lambda: "int8"  # type: ignore[attr-defined]
    stand_in.Float8DynamicActivationFloat8WeightConfig = lambda granularity: f"fp8 by {granularity}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao.quantization", stand_in)
    monkeypatch.setattr(lowbit, "check_lowbit", lambda *_: None)
    for precision in ("int8", "fp8"):
        teacher = loaded(teacher_file, precision)
        assert teacher.bf16
    assert asked == [("int8", CHOSEN), ("fp8 by rows", CHOSEN)]


@pytest.mark.parametrize(
    ("precision", "accelerator", "message"),
    [
        (
            "fp8",
            "cpu",
            "fp8 needs a GPU of compute capability 8.9 or more .Ada, Hopper.; here is cpu",
        ),
        ("fp8", "cuda", "here is An Ampere, 8.0. Use bf16"),
        ("int8", "mps", "teacher.precision=int8 needs a GPU .CUDA. or a CPU; here is mps"),
    ],
)
def test_devices_that_do_not_compute_so(
    precision: Any, accelerator: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An Ampere")
    with pytest.raises(ConfigError, match=message):
        check_lowbit(precision, accelerator)


def test_devices_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_lowbit("fp8", "cuda")
    check_lowbit("int8", "cpu")


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate(
        {"method": {"name": "dmae"}, "teacher": {"path": "x", "precision": "int8"}, "schedule": {"steps": 1}}
    )
    monkeypatch.setattr("mimlet.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"int8 needs the package torchao: pip install 'mimlet\[lowbit\]'"):
        check_packages(config)


def test_somebody_elses_encoder_is_refused() -> None:
    config = validate(
        {
            "encoder": {"name": "vit_nano", "image_size": 32, "patch": 8},
            "method": {"name": "tinymim"},
            "teacher": {"path": "python:x", "precision": "fp8"},
            "schedule": {"steps": 1},
        }
    )
    module = ViT(SHAPE)
    with pytest.raises(ConfigError, match=r"teacher\.precision=fp8 is for encoders that mimlet reads itself"):
        Teachers(module).find(config, ViT(SHAPE))


def test_a_weight_of_another_kind_is_left_to_its_own_product() -> None:
    class Doubled(Tensor):
        """Stands for a rounded weight: it answers `F.linear` itself, and nothing else."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.linear:
                return 2 * args[0]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(2, 4, dtype=dtype), torch.zeros(4, 4, dtype=dtype).as_subclass(Doubled)
        with torch.no_grad():
            assert linear(x, weight).sum() == 16


def test_rounded_weights_are_not_sent_to_other_processes() -> None:
    class Rounded(Tensor):
        pass

    encoder = ViT(SHAPE)
    method = MAE(encoder, build_decoder(encoder, DecoderSettings(dim=12, heads=3)))
    method.teacher = nn.Linear(2, 2)
    method.teacher.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Rounded), requires_grad=False)
    assert Step(method)._ddp_params_and_buffers_to_ignore == ["method.teacher.weight"]  # type: ignore[comparison-overlap]


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
def test_int8_answers_almost_as_bf16_does(teacher_file: str) -> None:
    exact, half, rounded = (loaded(teacher_file, precision) for precision in ("32", "bf16", "int8"))
    taps = Taps(hidden=(2,), attention=(3,), qkv=(3,), tokens=False)  # the last block gives queries and keys of a slice
    answers = [teacher(*images(), taps=taps) for teacher in (exact, half, rounded)]
    for name in ("hidden", "attention"):
        whole, close, near = (next(iter(getattr(answer, name).values())).float() for answer in answers)
        assert 0 < (close - whole).norm() < 0.02 * whole.norm()
        assert (close - whole).norm() < (near - whole).norm() < 0.05 * whole.norm()
    layers = {name: module for name, module in rounded.encoder.named_modules() if isinstance(module, Linear)}
    assert [name for name, layer in layers.items() if is_product(layer, name)] == CHOSEN
    assert [name for name, layer in layers.items() if type(layer.weight) is not nn.Parameter] == CHOSEN
