import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import mimlet
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, Config, TeacherSettings, check_inputs, validate
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError, UserError, WeightsError
from mimlet.export.timm import export_encoder
from mimlet.methods.mae import build_decoder
from mimlet.methods.settings import DecoderSettings
from mimlet.models.decoders import Decoder, decoder_input, decoder_taps
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher, Teachers, load_teacher
from mimlet.models.vit import ViT
from mimlet.models.weights import DECODER_FILE, ENCODER_FILE, encoder_state, save_decoder, save_weights
from tests.data.images import make_folder
from tests.families import HIERARCHICAL, micro
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
    assert len(teacher.load_report.loaded) == len(encoder.state_dict()) + len(decoder.state_dict())
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


def config(path: str = "", **teacher: object) -> Config:
    values = {"method": {"name": "tinymim"}, "teacher": {"path": path or "python:x", "precision": "32", **teacher}}
    return validate({**values, "schedule": {"batch": 8, "steps": 1}, "speed": {"accelerator": "cpu"}})


@pytest.mark.parametrize(
    ("student", "size"), [({"patch": 16}, 16), ({"image_size": 36, "patch": 12}, 24), ({"image_size": 48}, 48)]
)
def test_another_grid_is_met_by_the_size_of_its_input(student: dict[str, object], size: int, tmp_path: Path) -> None:
    encoder, student_encoder = make(), ViT(ViTShape(**{**vars(STUDENT), **student}))
    teacher = Teachers().find(config(save(tmp_path, encoder)), student_encoder, masked=True)
    side = size // 8
    assert (teacher.size, teacher.grid, teacher.own_grid) == (size, (side, side), (side, side))
    images = torch.randn(1, 3, *[student_encoder.shape.image_size] * 2)
    seen = images
    if images.shape[-1] != size:
        seen = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    assert_close(teacher(images, taps=TAPS).attention[2], encoder(seen, taps=TAPS).attention[2], rtol=1e-4, atol=1e-5)


def test_or_by_the_size_of_its_answer(tmp_path: Path) -> None:
    encoder, student = make(), ViT(ViTShape(**{**vars(STUDENT), "image_size": 48}))
    settings = config(save(tmp_path, encoder), grid="target")
    teacher = Teachers().find(settings, student)
    assert (teacher.size, teacher.grid, teacher.own_grid) == (32, (6, 6), (4, 4))
    images = torch.randn(1, 3, 48, 48)
    seen = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    taps = Taps(qkv=(1,))
    expected = encoder(seen, taps=taps).resized((6, 6))
    assert_close(teacher(images, taps=taps).latent, expected.latent, rtol=1e-4, atol=1e-5)
    assert_close(teacher(images, taps=taps).qkv[1][2], expected.qkv[1][2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"sees 4 x 4 patches, the student 6 x 6, .* set teacher\.grid=input"):
        Teachers().find(settings, student, masked=True)


def test_the_same_patches_hidden_from_both_need_the_same_prefix(tmp_path: Path) -> None:
    settings, student = config(save(tmp_path, make())), ViT(ViTShape(**{**vars(STUDENT), "class_token": False}))
    assert Teachers().find(settings, student).prefix == 1
    with pytest.raises(WeightsError, match=r"has a class token, the student none; set encoder\.class_token=true"):
        Teachers().find(settings, student, masked=True)


def test_a_distillation_token_is_not_handed_on(tmp_path: Path) -> None:
    encoder = make(distillation_token=True)
    teacher = load_teacher(TeacherSettings(path=save(tmp_path, encoder), precision="32"), ViT(STUDENT))
    images, taps = torch.randn(2, 3, 32, 32), Taps(hidden=(1,), normed=(1,), attention=(1,), qkv=(2,))
    whole, got = encoder(images, taps=taps), teacher(images, taps=taps)
    kept = [0, *range(2, 18)]
    assert (whole.prefix, got.prefix, teacher.prefix) == (2, 1, 1)
    for ours, theirs in (
        (got.latent, whole.latent),
        (got.hidden[1], whole.hidden[1]),
        (got.normed[1], whole.normed[1]),
        (got.qkv[2][1], whole.qkv[2][1]),
        (got.attention[1], whole.attention[1][..., kept]),
    ):
        assert_close(ours, theirs[..., kept, :], rtol=1e-4, atol=1e-5)


class Mine(nn.Module):
    """A user's own: one block without class token."""

    patch, dim, depth, heads, grid, prefix = 8, 12, 1, 3, (4, 4), 0
    mean, std = HALF

    def __init__(self, **wrong: object) -> None:
        super().__init__()
        self.embed, self.qkv, self.wrong = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 36), wrong

    def forward(self, images: torch.Tensor, mask: Mask | None = None, taps: Taps | None = None) -> Features:
        x = self.embed(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        grid = (images.shape[2] // 8, images.shape[3] // 8)
        return Features(**{"prefix": 0, "grid": grid, "tokens": x, "qkv": {1: (q, k, v)}, **self.wrong})


def test_a_module_of_ones_own() -> None:
    """Sized, normalised and taken on like any other; and made a teacher once."""
    mine, teachers = Mine(), Teachers(Mine())
    teachers.module.load_state_dict(mine.state_dict())
    student = ViT(ViTShape(**{**vars(STUDENT), "image_size": 24, "patch": 4}))
    teacher = teachers.find(config(), student)
    assert (teacher.size, teacher.grid, teacher.heads, teacher.takes_masks) == (48, (6, 6), 3, False)
    assert teachers.find(config(), student) is teacher
    raw = torch.rand(2, 3, 24, 24)
    seen = F.interpolate(normalised(raw, HALF), (48, 48), mode="bicubic", antialias=True)
    got = teacher(normalised(raw, IMAGENET), taps=Taps(qkv=(1,)))
    assert_close(got.qkv[1][0], mine(seen).qkv[1][0], rtol=1e-4, atol=1e-5)
    assert not got.latent.requires_grad
    with pytest.raises(ConfigError, match="your module is a Mine, which sees whole images only"):
        teachers.find(config(), student, masked=True)
    by_target = Teachers(Mine()).find(config(grid="target"), student)
    assert (by_target.size, by_target.own_grid, by_target(raw).latent.shape) == (32, (4, 4), (2, 36, 12))
    given = Teacher(Mine())
    assert Teachers(given).find(config(), ViT(STUDENT)) is given
    with pytest.raises(WeightsError, match="answers with 4 x 4 patches, the student sees 6 x 6; resize its input"):
        Teachers(given).find(config(), student)


@pytest.mark.parametrize(
    ("taps", "wrong", "message"),
    [
        (
            Taps(hidden=(1,)),
            {},
            r"teacher \(Mine\) was asked for hidden of block 1 and did not answer that; its Features",
        ),
        (Taps(qkv=(1, 2)), {"tokens": None}, "was asked for qkv of block 2, tokens and did not"),
        (
            Taps(),
            {"tokens": torch.zeros(2, 17, 12)},
            r"gave tokens of shape \[2, 17, 12\], expected \[2, 16, 12\]: batch 2, 16 tokens \(prefix 0, 16 patches of "
            r"its grid 4 x 4\), width 12, 3 heads",
        ),
        (Taps(), {"prefix": 1}, r"expected \[2, 17, 12\]: batch 2, 17 tokens \(prefix 1, 16 patches"),
        (Taps(), {"grid": (3, 3)}, r"expected \[2, 9, 12\]"),
        (Taps(qkv=(1,)), {"qkv": {1: (torch.zeros(2, 16, 3, 4),) * 3}}, r"gave qkv of block 1 .* \[2, 3, 16\]: batch"),
        (
            Taps(attention=(1,)),
            {"attention": {1: torch.zeros(2, 16, 16)}},
            r"gave attention of block 1 of shape \[2, 16, 16\], expected \[2, 3, 16\]: .*, 3 heads",
        ),
    ],
)
def test_answers_are_checked(taps: Taps, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Teacher(Mine(**wrong))(torch.zeros(2, 3, 32, 32), taps=taps)


def test_modules_that_are_no_teachers() -> None:
    with pytest.raises(ConfigError, match="your module is a Linear without the attributes patch, dim, depth, "):
        Teachers(nn.Linear(2, 2)).find(config(), ViT(STUDENT))
    mine = Mine()
    mine.forward = lambda images, mask, taps: images
    with pytest.raises(ConfigError, match=r"\(Mine\) answered with Tensor; a teacher answers with mimlet\.Features"):
        Teacher(mine)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(
        ConfigError, match=r"teacher\.path=python:x stands for a module given from Python: mimlet\.train"
    ):
        Teachers().find(config(), ViT(STUDENT))


def test_names_and_modules_pass_the_check_of_paths(tmp_path: Path) -> None:
    for path in ("timm:a", "transformers:a/b", "python:Mine"):
        given = config(path)
        check_inputs(given.model_copy(update={"data": given.data.model_copy(update={"path": [str(tmp_path)]})}))


def test_labels_are_not_distilled_from_a_module() -> None:
    with pytest.raises(ConfigError, match="needs the path of a classifier, or timm:NAME, not a module"):
        mimlet.finetune("classify_tiny_distilled", teacher=nn.Linear(1, 1))


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/teachers.md: its class teaches a student, and the run says so."""
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class " in block)
    make_folder(tmp_path / "photos", each=6)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    settings = json.loads((tmp_path / "runs" / "mine" / "config.json").read_text())
    assert settings["teacher"]["path"] == "python:Mine"
    assert (tmp_path / "runs" / "mine" / ENCODER_FILE).is_file()


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


def exported(folder: Path, encoder: Encoder, decoder: Decoder | None = None) -> str:
    export_encoder(folder, encoder, mean=IMAGENET_MEAN, std=IMAGENET_STD, decoder=decoder)
    return str(folder)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_every_family_teaches(name: str, tmp_path: Path) -> None:
    """From a file, at another size of image than it was made for; with its decoder; the same in bf16, nearly."""
    torch.manual_seed(0)
    encoder = micro(name).eval()
    decoder = build_decoder(encoder, DecoderSettings(dim=16, depth=2, heads=2)).eval()
    student = micro(name, image_size=64)
    settings = config(exported(tmp_path, encoder, decoder))
    teacher = Teachers().find(settings, student, decoder=True, masked=True)
    assert (teacher.size, teacher.grid, teacher.dims) == (64, (16, 16), student.dims)
    assert teacher.attending == student.attending
    assert [teacher.heads_of(block) for block in student.attending] == [student.heads_of(b) for b in student.attending]
    for layer in range(encoder.depth + 1):
        assert teacher.layout(layer)[0] == student.layout(layer)[0]
    images, mask = torch.randn(1, 3, 64, 64), Mask.from_noise(torch.rand(1, student.units), 0.5)
    taps = Taps(hidden=(2, 5), qkv=(5,), tokens=False)
    got, expected = teacher(images, mask, taps), encoder(images, mask, taps=taps)
    assert_close((got.hidden, got.qkv[5]), (expected.hidden, expected.qkv[5]), rtol=1e-4, atol=1e-5)
    exact, rough = teacher(images).latent, Teacher(deepcopy(teacher.encoder), bf16=True)(images).latent
    assert 0 < (rough.float() - exact).norm() / exact.norm() < 0.03

    small, hidden = torch.randn(1, 3, 32, 32), Mask.from_noise(torch.rand(1, encoder.units), 0.5)
    decoded = Teacher(encoder, decoder)(small, hidden, Taps(decoded=(1,), tokens=False)).decoded[1]
    latent = decoder_input(encoder, encoder(small, hidden, taps=decoder_taps(encoder)))
    assert_close(decoded, decoder.features(latent, encoder.patch_mask(hidden), 1))


def test_a_pooled_hiera_is_sized_by_its_last_grid(tmp_path: Path) -> None:
    encoder = micro("hiera_micro", q_pool=3, fuse="none")
    teacher = load_teacher(TeacherSettings(path=exported(tmp_path, encoder)), micro("hivit_micro", patch=8))
    assert (teacher.size, teacher.grid, teacher.layout(5)[0]) == (32, (4, 4), (8, 8))


@pytest.mark.parametrize(
    ("teacher", "student", "settings", "message"),
    [
        ("hiera_micro", {"name": "hivit_micro"}, {}, r"hides 2 x 2 patches at a time, the student 1 x 1, and this"),
        (
            "vit_nano",
            {"name": "hiera_micro"},
            {},
            r"hides 1 x 1 patches at a time, the student 2 x 2.* \(tinymim, mimhd\)",
        ),
        ("vit_nano", {"name": "itpn_micro"}, {}, r"class token, the student none; a HiViT or iTPN has none, so take a"),
        (
            "itpn_micro",
            {"name": "hivit_micro", "image_size": 64},
            {"grid": "target"},
            r"sees 8 x 8 patches, the student 16 x 16, and what the stages of a HiViT or iTPN answer is not resized",
        ),
    ],
)
def test_what_cannot_hide_alike_is_refused(
    teacher: str, student: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    found = config(exported(tmp_path, micro(teacher)), **settings)
    with pytest.raises(UserError, match=message):
        Teachers().find(found, micro(**student), masked=True)


def test_names_of_every_family(tmp_path: Path) -> None:
    path, student = exported(tmp_path, micro("hivit_micro")), micro("hivit_micro")
    assert load_teacher(TeacherSettings(path=path, name="hivit_micro"), student).depth == 6
    with pytest.raises(
        WeightsError, match=r"has width 128 and 1 \+ 1 \+ 4 blocks, but a hivit_tiny has 384 and 2 \+ 2 \+ 10"
    ):
        load_teacher(TeacherSettings(path=path, name="hivit_tiny", heads=4), student)
