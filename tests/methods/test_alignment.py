import pytest
import torch
from torch.testing import assert_close

from mimlet.data.batch import Batch
from mimlet.errors import ConfigError
from mimlet.methods.alignment import Alignment
from mimlet.methods.settings import AlignmentSettings
from mimlet.models.features import Features
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher
from mimlet.models.vit import ViT
from tests.families import micro

BATCH = Batch({}, torch.arange(2))


def make(student: int = 12, teacher: int = 20, depths: tuple[int, int] = (4, 8), **settings: object) -> Alignment:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(16, 4, student, depths[0], 2))
    other = Teacher(ViT(ViTShape(16, 4, teacher, depths[1], 2)))
    return Alignment(AlignmentSettings(**settings), encoder, other, masked=True)  # type: ignore[arg-type]


def features(layer: int, width: int, prefix: int = 1) -> Features:
    return Features(prefix, (4, 4), hidden={layer: torch.randn(2, prefix + 5, width)})


def unit(x: torch.Tensor) -> torch.Tensor:
    """Each token divided by its length."""
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


def test_is_the_formula() -> None:
    """mean |f_t / ||f_t|| - W f_s / ||W f_s||| over images, tokens (the class token too) and channels."""
    term = make()
    student, teacher = features(3, 12), features(6, 20)
    assert term.projection is not None
    ours = student.hidden[3] @ term.projection.weight.T + term.projection.bias
    expected = (unit(teacher.hidden[6]) - unit(ours)).abs().mean()
    loss = term(student, teacher, BATCH)["alignment"]
    assert_close(loss, expected)
    loss.backward()
    assert term.projection.weight.grad is not None
    assert term.projection.weight.grad.abs().sum() > 0


def test_exact_numbers() -> None:
    """Lengths do not matter: (3, 4, 0, 0) against (0, 2, 0, 0) is (0.6, -0.2, 0, 0); raw, (3, 2, 0, 0)."""
    student = Features(0, (1, 1), hidden={3: torch.tensor([[[3.0, 4, 0, 0]]])})
    teacher = Features(0, (1, 1), hidden={6: torch.tensor([[[0.0, 2, 0, 0]]])})
    assert_close(make(4, 4, projection=False)(student, teacher, BATCH)["alignment"], torch.tensor(0.2))
    raw = make(4, 4, projection=False, normalise=False)
    assert_close(raw(student, teacher, BATCH)["alignment"], torch.tensor(1.25))
    assert not list(raw.parameters())


@pytest.mark.parametrize(
    ("depths", "settings", "layers"),
    [
        ((12, 24), {}, (9, 18)),
        ((6, 8), {}, (4, 6)),
        ((4, 8), {"student_layer": 0, "teacher_layer": 8}, (0, 8)),
    ],
)
def test_layers(depths: tuple[int, int], settings: dict[str, object], layers: tuple[int, int]) -> None:
    term = make(depths=depths, **settings)
    assert (term.student_taps.hidden, term.teacher_taps.hidden) == ((layers[0],), (layers[1],))
    assert not term.student_taps.tokens
    assert not term.teacher_taps.tokens


def test_the_class_token_takes_part_where_both_have_one() -> None:
    term = make()
    student, teacher = features(3, 12), features(6, 20, prefix=0)
    patches = Features(0, (4, 4), hidden={3: student.hidden[3][:, 1:]})
    assert torch.equal(term(student, teacher, BATCH)["alignment"], term(patches, teacher, BATCH)["alignment"])


def test_is_computed_in_float32() -> None:
    """Lengths of bf16 tensors are not taken in bf16."""
    term = make(16, 16, projection=False)
    student, teacher = features(3, 16), features(6, 16)
    rounded = [
        Features(1, (4, 4), hidden={layer: x.bfloat16() for layer, x in each.hidden.items()})
        for each in (student, teacher)
    ]
    expected = (unit(rounded[1].hidden[6].float()) - unit(rounded[0].hidden[3].float())).abs().mean()
    loss = term(*rounded, BATCH)["alignment"]
    assert loss.dtype == torch.float32
    assert_close(loss, expected)


def test_label_and_weight() -> None:
    term = make(label="late", weight=0.5)
    assert term.weights == {"late_alignment": 0.5}
    assert set(term(features(3, 12), features(6, 20), BATCH)) == {"late_alignment"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection": False}, "the student is 12 wide, the teacher 20, and without a projection"),
        ({"student_layer": 5}, r"no student_layer 5; the student has blocks 1 to 4 \(0: the embedding\)"),
        ({"teacher_layer": 9}, "no teacher_layer 9; the teacher has blocks 1 to 8"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)  # type: ignore[arg-type]


def test_tokens_are_compared_where_they_stand() -> None:
    """Unrolled tokens of a Hiera's stage 3 (four of each unit, units innermost) with the raster of a HiViT."""
    torch.manual_seed(0)
    student, teacher = micro("hiera_micro"), Teacher(micro("hivit_micro"))
    term = Alignment(AlignmentSettings(), student, teacher, masked=False)
    assert term.projection is not None
    assert (term.student_layer, term.projection.in_features, term.projection.out_features) == (4, 96, 128)
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = student(images, taps=term.student_taps), teacher(images, taps=term.teacher_taps)
    raster = ours.hidden[4].unflatten(1, (2, 2, 4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 64, 96)
    expected = (unit(theirs.hidden[4]) - unit(term.projection(raster))).abs().mean()
    assert_close(term(ours, theirs, BATCH)["alignment"], expected)
    with pytest.raises(ConfigError, match="keep visible tokens in different orders"):
        Alignment(AlignmentSettings(), student, teacher, masked=True)
