from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, TeacherSettings
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError, WeightsError
from mimlet.models.decoders import Decoder
from mimlet.models.features import Taps
from mimlet.models.teacher import Teacher, load_teacher
from mimlet.models.vit import ViT, ViTShape
from mimlet.models.weights import DECODER_FILE, ENCODER_FILE, encoder_state, save_decoder, save_weights
from tests.models.official import save_mae_lite, tensors_of

SHAPE = ViTShape(image_size=32, patch=8, dim=48, depth=2, heads=3)
STUDENT = ViTShape(image_size=32, patch=8, dim=24, depth=2, heads=3)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
TAPS = Taps(hidden=(1,), attention=(2,))


def make(**changes: object) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(**{**vars(SHAPE), **changes}))
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return encoder.eval()


def save(folder: Path, encoder: ViT, **info: object) -> str:
    save_weights(folder / ENCODER_FILE, encoder_state(encoder), {"shape": vars(encoder.shape), **info})
    return str(folder)


def normalised(raw: torch.Tensor, channels: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in channels)
    return (raw - mean) / std


def test_each_sees_its_own_normalisation() -> None:
    encoder, raw = make(), torch.rand(2, 3, 32, 32)
    mask = Mask.from_noise(torch.rand(2, 16), 0.5)
    teacher = Teacher(encoder, own=HALF, students=IMAGENET)
    ours = teacher(normalised(raw, IMAGENET), mask, TAPS)
    expected = encoder(normalised(raw, HALF), mask, taps=TAPS)
    for got, want in (
        (ours.latent, expected.latent),
        (ours.hidden[1], expected.hidden[1]),
        (ours.attention[2], expected.attention[2]),
    ):
        assert_close(got, want, rtol=1e-4, atol=1e-5)
    images = normalised(raw, HALF)
    assert torch.equal(Teacher(encoder, own=HALF, students=HALF)(images).latent, encoder(images).latent)


def test_looks_without_gradient_or_training() -> None:
    teacher = Teacher(ViT(SHAPE, drop_path=0.9), Decoder(48, (4, 4), 1, 192, 12, 1, 3))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not teacher(images).latent.requires_grad
    assert (teacher.dim, teacher.depth, teacher.heads, teacher.grid, teacher.prefix) == (48, 2, 3, (4, 4), 1)
    assert not teacher.state_dict().keys() & {"scale", "shift"}


def test_bf16_stays_near_fp32() -> None:
    """bf16 keeps 8 bits: relative error 2^-8 per rounding. Over two blocks the whole stays within 2 %."""
    images = torch.randn(4, 3, 32, 32)
    exact = Teacher(make())(images, taps=TAPS)
    teacher = Teacher(make(), bf16=True)
    assert teacher.encoder.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert teacher.encoder.norm.weight.dtype == torch.float32
    rough = teacher(images, taps=TAPS)
    for got, want in (
        (rough.latent, exact.latent),
        (rough.hidden[1], exact.hidden[1]),
        (rough.attention[2], exact.attention[2]),
    ):
        error = (got.float() - want).norm() / want.norm()
        assert 0 < error < 0.02


def test_fp32_teacher_ignores_the_students_autocast() -> None:
    images = torch.randn(2, 3, 32, 32)
    teacher = Teacher(make())
    with torch.autocast("cpu", torch.bfloat16):
        inside = teacher(images).latent
    assert inside.dtype == torch.float32
    assert torch.equal(inside, teacher(images).latent)


def test_is_loaded_with_decoder_and_normalisation(tmp_path: Path) -> None:
    encoder, decoder = make(), Decoder(48, (4, 4), 1, 192, 12, 1, 3)
    path = save(tmp_path, encoder, mean=HALF[0], std=HALF[1])
    save_decoder(tmp_path / DECODER_FILE, decoder, True)
    settings = TeacherSettings(path=path, precision="32")
    teacher = load_teacher(settings, ViT(STUDENT), decoder=True)
    raw = torch.rand(1, 3, 32, 32)
    assert_close(teacher(normalised(raw, IMAGENET)).latent, encoder(normalised(raw, HALF)).latent, rtol=1e-4, atol=1e-5)
    assert torch.equal(teacher.decoder.pred.weight, decoder.pred.weight)
    assert not teacher.decoder.pred.weight.requires_grad
    assert teacher.load_report is not None
    assert len(teacher.load_report.loaded) == len(encoder.state_dict())
    assert not load_teacher(settings, ViT(STUDENT), mean=HALF[0], std=HALF[1]).renormalise
    assert load_teacher(settings, ViT(STUDENT)).decoder is None


@pytest.mark.parametrize(
    ("precision", "native", "bf16"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("bf16", False, True),
        ("32", True, False),
    ],
)
def test_precision(precision: str, native: bool, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimlet.models.teacher.computes_in_bf16", lambda device: native and device == "cpu")
    settings = TeacherSettings(path=save(tmp_path, make()), precision=precision)
    assert load_teacher(settings, ViT(STUDENT), accelerator="cpu").bf16 is bf16
    assert load_teacher(settings, ViT(STUDENT), accelerator="cuda").bf16 is (precision == "bf16")


def test_positions_follow_the_students_image_size(tmp_path: Path) -> None:
    encoder = make()
    student = ViT(ViTShape(image_size=48, patch=8, dim=24, depth=1, heads=3))
    teacher = load_teacher(TeacherSettings(path=save(tmp_path, encoder), precision="32"), student)
    images = torch.randn(1, 3, 48, 48)
    assert teacher.grid == (6, 6)
    assert_close(teacher(images).latent, encoder(images).latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            {"patch": 16},
            r"sees 32 px images as 4 x 4 patches of 8 px, the student as 2 x 2 of 16 px; .*encoder\.patch=8",
        ),
        (
            {"image_size": 36, "patch": 12},
            r"sees 36 px images as 4\.5 x 4\.5 patches of 8 px, the student as 3 x 3 of 12 px",
        ),
        ({"class_token": False}, r"has a class token, the student none; set encoder\.class_token=true"),
    ],
)
def test_student_of_another_form(student: dict[str, object], message: str, tmp_path: Path) -> None:
    settings = TeacherSettings(path=save(tmp_path, make()))
    with pytest.raises(WeightsError, match=message):
        load_teacher(settings, ViT(ViTShape(**{**vars(STUDENT), **student})))


def test_absent_decoder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no decoder, and one is needed here"):
        load_teacher(TeacherSettings(path=save(tmp_path, make())), ViT(STUDENT), decoder=True)


def test_heads_of_foreign_files(tmp_path: Path) -> None:
    file = tmp_path / "deit.pth"
    torch.save({"model": ViT(ViTShape(32, 8, 192, 12, 3)).state_dict()}, file)
    student = ViT(STUDENT)
    with pytest.raises(
        WeightsError, match=r"encoders of width 192 have 3 or 12 heads .*teacher\.heads=12 for a teacher"
    ):
        load_teacher(TeacherSettings(path=str(file)), student)
    assert load_teacher(TeacherSettings(path=str(file), heads=3), student).heads == 3
    assert load_teacher(TeacherSettings(path=str(file), name="deit_tiny"), student).heads == 3
    assert load_teacher(TeacherSettings(path=str(file), name="vit_tiny"), student).heads == 12
    with pytest.raises(WeightsError, match="has width 192 and 12 blocks, but a vit_small has 384 and 12; leave"):
        load_teacher(TeacherSettings(path=str(file), name="vit_small"), student)
    with pytest.raises(ConfigError, match=r"unknown teacher\.name 'vit_bse' \(did you mean 'vit_base'\?\); known: "):
        load_teacher(TeacherSettings(path=str(file), name="vit_bse"), student)


def test_mae_lite_file(tmp_path: Path) -> None:
    path = save_mae_lite(tmp_path / "file.pth.tar", tensors_of("mae_tiny_400e"))
    student = ViT(ViTShape(image_size=32, patch=16, dim=24, depth=1, heads=3))
    teacher = load_teacher(TeacherSettings(path=str(path)), student, decoder=True)
    assert (teacher.heads, teacher.depth, teacher.grid, teacher.decoder.grid) == (12, 12, (2, 2), (2, 2))
