from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mimlet.config import AugmentSettings, Config, SpeedSettings, TeacherSettings, validate
from mimlet.data.batch import Batch
from mimlet.data.seeding import seeded
from mimlet.errors import ConfigError
from mimlet.export.timm import export_encoder
from mimlet.methods.relations import Relations
from mimlet.methods.settings import RelationSettings
from mimlet.methods.tinymim import TinyMIM
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher, Teachers, load_teacher
from mimlet.models.vit import ViT
from mimlet.objectives.relations import divergence, log_relation, regroup
from mimlet.train.distributed import idle_parameters, make_fabric
from tests.data.images import picture
from tests.families import micro
from tests.methods.official import CLOCK, make_encoder, part
from tests.shared import Golden, golden

STUDENT = ViTShape(16, 4, 12, 2, 3)
TEACHER = ViTShape(16, 4, 24, 2, 4)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def official() -> tuple[TinyMIM, Batch, Golden]:
    oracle = golden("tinymim")
    encoder = make_encoder(part(oracle.weights, "student."), ViTShape(32, 8, 24, 12, 3))
    teacher = Teacher(make_encoder(part(oracle.weights, "teacher."), ViTShape(32, 8, 48, 6, 6)))
    settings = RelationSettings(teacher_layer=oracle.meta["constructor"]["teacher"]["intermediate"])
    method = TinyMIM(encoder, teacher, Relations(settings, encoder, teacher, masked=False))
    views = {"image": oracle.io["imgs_teacher"], "student": oracle.io["imgs_student"]}
    return method, Batch(views, torch.arange(2)), oracle


def make(**settings: object) -> TinyMIM:
    encoder, teacher = ViT(STUDENT), Teacher(ViT(TEACHER))
    relations = Relations(RelationSettings(**settings), encoder, teacher, masked=False)  # type: ignore[arg-type]
    return TinyMIM(encoder, teacher, relations)


def test_equals_official_tinymim() -> None:
    method, batch, oracle = official()
    losses = method(batch, CLOCK)
    assert method.weights == {"relation_qk": 1.0, "relation_vv": 1.0}
    for pair in ("qk", "vv"):
        assert_close(losses[f"relation_{pair}"], oracle.io[f"loss_{pair}"][0], **oracle.tolerance)
    total = losses["relation_qk"] + losses["relation_vv"]
    assert_close(total, oracle.io["loss_total"][0], **oracle.tolerance)

    q, k, v = method.encoder(batch.views["student"], taps=method.terms.student_taps).qkv[12]
    student = (regroup(q, 6), regroup(k, 6), regroup(v, 6))
    teacher = method.teacher(batch.images, taps=method.terms.teacher_taps).qkv[4]
    for pair in ("qk", "vv"):
        ours, theirs = log_relation(student, pair), log_relation(teacher, pair)
        assert_close(ours.exp(), oracle.io[f"student_{pair}"], **oracle.tolerance)
        assert_close(theirs.exp(), oracle.io[f"teacher_{pair}"], **oracle.tolerance)
        assert_close(divergence(ours, theirs), oracle.io[f"loss_{pair}_per_head"], **oracle.tolerance)

    total.backward()
    gradients = {name: p.grad for name, p in method.encoder.named_parameters()}
    expected = {k.removeprefix("grad."): v for k, v in oracle.io.items() if k.startswith("grad.")}
    assert len(expected) == 7
    for name, value in expected.items():
        assert_close(gradients[name], value, **oracle.tolerance)


def test_untrained_parameters_are_those_of_the_official_code() -> None:
    """DDP leaves them out; the loop finds them by itself."""
    method, batch, oracle = official()
    fabric = make_fabric(SpeedSettings(accelerator="cpu", precision="32"))
    idle = idle_parameters(method, fabric, batch, CLOCK)
    note = next(note for note in oracle.meta["notes"] if "Student parameters with no gradient: " in note)
    theirs = set(note.partition("no gradient: ")[2].split(", ")) - {"pos_embed"}  # ours asks for no gradient
    assert {name.removeprefix("encoder.") for name in idle} == theirs
    matching = make(heads="adaptive")
    left = idle_parameters(matching, fabric, Batch({"image": torch.randn(2, 3, 16, 16)}, torch.arange(2)), CLOCK)
    assert left
    assert all(name.startswith(("encoder.norm.", "encoder.blocks.1.")) for name in left), "every matching trains"


def test_teacher_sees_the_crop_and_the_student_its_changed_colours() -> None:
    method, image = make(), picture(0, (40, 30))
    plain = AugmentSettings()
    jitter = plain.model_copy(update={"color_jitter": 0.4})
    with seeded(3):
        both = method.transform(jitter, 16)(image)
    with seeded(3):
        clean = method.transform(plain, 16)(image)
    assert (clean.keys(), both.keys()) == ({"image"}, {"image", "student"})
    assert torch.equal(both["image"], clean["image"])
    assert not torch.equal(both["student"], clean["image"])

    one, other = torch.randn(2, 2, 3, 16, 16)
    losses = method(Batch({"image": one, "student": other}, torch.arange(2)), CLOCK)
    swapped = method(Batch({"image": other, "student": one}, torch.arange(2)), CLOCK)
    alone = method(Batch({"image": one}, torch.arange(2)), CLOCK)
    same = method(Batch({"image": one, "student": one}, torch.arange(2)), CLOCK)
    assert_close(alone, same)
    assert (losses["relation_qk"] - swapped["relation_qk"]).abs() > 1e-4
    assert (losses["relation_qk"] - alone["relation_qk"]).abs() > 1e-4
    assert method.masks() == {}


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    encoder = ViT(STUDENT)
    teacher = Teacher(encoder)
    encoder = ViT(STUDENT)
    encoder.load_state_dict(teacher.encoder.state_dict())
    method = TinyMIM(encoder, teacher, Relations(RelationSettings(), encoder, teacher, masked=False))
    losses = method(Batch({"image": torch.randn(2, 3, 16, 16)}, torch.arange(2)), CLOCK)
    assert_close(losses, {"relation_qk": torch.tensor(0.0), "relation_vv": torch.tensor(0.0)})
    assert method.info == {}, "its own head count"


def test_neither_encoder_runs_further_than_its_block() -> None:
    method = make(student_layer=2, teacher_layer=1)
    method.encoder.blocks[1].mlp = None
    method.encoder.norm = None
    method.teacher.encoder.blocks[0].attn.proj = None
    method.teacher.encoder.blocks[1] = None
    losses = method(Batch({"image": torch.randn(2, 3, 16, 16)}, torch.arange(2)), CLOCK)
    assert losses.keys() == {"relation_qk", "relation_vv"}


def test_a_chain_hands_on_the_heads_of_its_relations(tmp_path: Path) -> None:
    """MAE-L -> B -> S -> T: the second student answers to as many heads as the first one's relations had."""
    first = make()
    assert first.info == {"heads_of": {2: 4}}
    export_encoder(tmp_path, first.encoder, mean=MEAN, std=STD, info={"method": "tinymim", **first.info})
    student = ViT(ViTShape(16, 4, 8, 3, 2))
    teacher = load_teacher(TeacherSettings(path=str(tmp_path)), student)
    assert (teacher.heads, teacher.heads_of(1), teacher.heads_of(2)) == (3, 3, 4)
    second = TinyMIM(student, teacher, Relations(RelationSettings(), student, teacher, masked=False))
    assert second.info == {"heads_of": {3: 4}}
    assert second(Batch({"image": torch.randn(2, 3, 16, 16)}, torch.arange(2)), CLOCK)["relation_qk"] > 0


def config(**method: object) -> Config:
    values = {
        "encoder": {"image_size": 16, "patch": 4, "dim": 12, "depth": 2, "heads": 3},
        "method": {"name": "tinymim", **method},
        "teacher": {"path": "own"},
        "schedule": {"steps": 1},
    }
    return validate(values)


def test_from_a_configuration() -> None:
    teacher = Teacher(ViT(TEACHER))
    terms = [{"kind": "relations", "heads": "average", "label": "mean", "teacher_layer": 1, "pairs": ["qk"]}]
    method = TinyMIM.build(config(terms=terms), teachers=Teachers(teacher))
    assert method.weights == {"relation_qk": 1.0, "relation_vv": 1.0, "mean_relation_qk": 1.0}
    assert method.terms.teacher_taps.qkv == (1, 2)
    losses = method(Batch({"image": torch.randn(2, 3, 16, 16)}, torch.arange(2)), CLOCK)
    assert losses.keys() == method.weights.keys()
    parameters = dict(method.named_parameters())
    assert all(
        p.requires_grad == name.startswith(("encoder.", "terms.")) or "pos_embed" in name
        for name, p in parameters.items()
    )
    with pytest.raises(ConfigError, match="two terms have a loss named 'relation_qk'"):
        TinyMIM.build(config(terms=[{"kind": "relations"}]), teachers=Teachers(teacher))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("itpn_micro", "vit_nano"), ("fast_itpn_micro", "hivit_micro"), ("hiera_micro", "vit_nano")],
)
def test_hierarchical_students_learn_relations_of_the_whole_image(student: str, teacher: str) -> None:
    """Those of their last block, whose heads need not be equally many; nothing after its q, k and v is trained."""
    encoder, guide = micro(student), Teacher(micro(teacher))
    relations = Relations(RelationSettings(), encoder, guide, masked=False)
    method = TinyMIM(encoder, guide, relations)
    assert method.info == ({"heads_of": {6: 4}} if student == "hiera_micro" else {})
    batch = Batch({"image": torch.randn(2, 3, 32, 32)}, torch.arange(2))
    losses = method(batch, CLOCK)
    (losses["relation_qk"] + losses["relation_vv"]).backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    last = "blocks.7." if student != "hiera_micro" else "blocks.5."
    assert {name.removeprefix(last) for name in trained if name.startswith(last)} == {
        "norm1.weight",
        "norm1.bias",
        *(
            ("attn.q_bias", "attn.v_bias", "attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")
            if "fast" in student
            else ("attn.qkv.weight", "attn.qkv.bias")
        ),
    }
    assert "patch_embed.proj.weight" in trained
