import math
import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.methods.relations import Relations
from mimlet.methods.settings import NINE, AdaptiveSettings, RelationSettings
from mimlet.methods.terms import Terms
from mimlet.models.features import Features
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher
from mimlet.models.vit import ViT
from mimlet.objectives.attention import logit_distance
from mimlet.objectives.relations import QKV, relation_logits
from tests.families import micro
from tests.methods.official import make_encoder, part
from tests.shared import Golden, golden

SCHEMES = ["adaptive_block", "adaptive", "average", "significant", "learned_map", "regroup"]
NEEDED: dict[str, dict[str, object]] = {"significant": {"significant_head": 2}, "regroup": {"relation_heads": 2}}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(student: ViT | None = None, teacher: Teacher | None = None, **settings: object) -> Relations:
    """A student of 3 heads, 12 wide; a teacher of 4 heads, 24 wide; 16 patches and a class token each."""
    student = student or ViT(ViTShape(16, 4, 12, 2, 3))
    teacher = teacher or Teacher(ViT(ViTShape(16, 4, 24, 2, 4)))
    return Relations(RelationSettings(**settings), student, teacher, masked=False)  # type: ignore[arg-type]


def batch(images: int = 2) -> Batch:
    return Batch({"image": torch.randn(images, 3, 16, 16)}, torch.arange(images))


def features(term: Relations, student: QKV, teacher: QKV, prefix: int = 1) -> tuple[Features, Features]:
    return (
        Features(prefix, (4, 4), qkv={term.student_layer: student}),
        Features(prefix, (4, 4), qkv={term.teacher_layer: teacher}),
    )


def random_features(
    term: Relations, kind: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Features, Features]:
    """Of five tokens."""
    ours, theirs = (scale * torch.randn(3, 2, *shape) for shape in ((3, 5, 4), (4, 5, 6)))
    return features(term, ours.to(kind).unbind(0), theirs.to(kind).unbind(0))  # type: ignore[arg-type]


def of(oracle: Golden, side: str) -> QKV:
    return oracle.io[f"{side}_q"], oracle.io[f"{side}_k"], oracle.io[f"{side}_v"]


def adaptive(oracle: Golden, **settings: object) -> Relations:
    """The reference's matching."""
    subspace = oracle.meta["constructor"]["query_subspace"]
    class_token = bool(settings.pop("class_token", True))
    term = make(
        heads="adaptive",
        class_token=class_token,
        adaptive=AdaptiveSettings(subspace=subspace, **settings),  # type: ignore[arg-type]
    )
    for pair in ("qk", "vv"):
        term.matchings[pair].load_state_dict(part(oracle.weights, f"proj_{pair}."))
    return term


@pytest.mark.filterwarnings("ignore:relations. adaptive.pool='global'")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("", {}),
        ("flatten_", {"pool": "flatten"}),
        ("global_", {"pool": "global"}),
        ("mixture_", {"reading": "mixture"}),
        ("no_cls_", {"class_token": False}),
    ],
)
def test_adaptive_relations_equal_the_reference(name: str, settings: dict[str, object]) -> None:
    oracle = golden("mimhd")
    io, tolerance = oracle.io, oracle.tolerance
    term = adaptive(oracle, **settings)
    answers = term(*features(term, of(oracle, "student"), of(oracle, "teacher")), batch())
    assert term.weights == {"relation_qk": 1.0, "relation_vv": 1.0}
    for pair in ("qk", "vv"):
        assert_close(answers[f"relation_{pair}"], io[f"loss_{name}{pair}"][0], **tolerance)
        weights = io[f"W_{'' if name == 'mixture_' else name}{pair}"]
        watched = [answers.pop(f"head_share_{pair}_{number:02d}") for number in (1, 2, 3, 4)]
        assert_close(torch.stack(watched), weights.mean(dim=(0, 1)), **tolerance)
        spread = -(weights * weights.log()).sum(-1).mean()
        assert_close(answers.pop(f"head_entropy_{pair}"), spread, **tolerance)
    assert answers.keys() == term.weights.keys()


def test_adaptive_gradients_equal_the_reference() -> None:
    oracle = golden("mimhd")
    q, k, v = (x.clone().requires_grad_() for x in of(oracle, "student"))
    teacher = [x.clone().requires_grad_() for x in of(oracle, "teacher")]
    for detach in (False, True):
        term = adaptive(oracle, detach_similarity=detach)
        for x in (q, k, v):
            x.grad = None
        answers = term(*features(term, (q, k, v), tuple(teacher)), batch())  # type: ignore[arg-type]
        (answers["relation_qk"] + answers["relation_vv"]).backward()
        prefix = "grad_detached_S." if detach else "grad."
        gradients = {"student_q": q.grad, "student_k": k.grad, "student_v": v.grad}
        gradients |= {f"proj_{n.removeprefix('matchings.')}": p.grad for n, p in term.named_parameters()}
        expected = {name.removeprefix(prefix): x for name, x in oracle.io.items() if name.startswith(prefix)}
        compared = expected.keys() & gradients.keys()
        assert len(compared) == (2 if detach else 11)
        for name in compared:
            assert_close(gradients[name], expected[name], **oracle.tolerance)
        assert all(x.grad is None for x in teacher)
        assert not any(value.requires_grad for name, value in answers.items() if name not in term.weights)


@pytest.mark.parametrize("pair", ["qk", "vv"])
def test_baselines_equal_the_reference(pair: str) -> None:
    oracle = golden("mimhd")
    best = 1 + int(oracle.io["teacher_head_importance"].argmax())
    for name, settings in (
        ("average", {"heads": "average"}),
        ("select", {"heads": "significant", "significant_head": best}),
    ):
        term = make(pairs=[pair], **settings)
        answers = term(*features(term, of(oracle, "student"), of(oracle, "teacher")), batch())
        assert_close(answers, {f"relation_{pair}": oracle.io[f"baseline_{name}_{pair}"][0]}, **oracle.tolerance)
        assert not list(term.parameters())


def test_the_nine_relations_equal_official_g2sd() -> None:
    oracle = golden("g2sd_generic")
    student = make_encoder(part(oracle.weights, "student."), ViTShape(32, 8, 24, 2, 3))
    teacher = Teacher(make_encoder(part(oracle.weights, "teacher."), ViTShape(32, 8, 48, 2, 4)))
    mask = Mask.from_noise(oracle.io["noise"], 0.75)
    for name, layers, heads in (
        ("all_layers", (1, 2), oracle.meta["constructor"]["Ar"]),
        ("last_layer_one_head", (2,), 1),
    ):
        terms = Terms(
            make(
                student,
                teacher,
                pairs=NINE,
                heads="regroup",
                relation_heads=heads,
                student_layer=layer,
                teacher_layer=layer,
                label=f"block{layer}",
                weight=1 / len(layers),
            )
            for layer in layers
        )
        images = oracle.io["imgs"]
        losses = terms(
            student(images, mask, taps=terms.student_taps),
            teacher(images, mask, taps=terms.teacher_taps),
            Batch({"image": images}, torch.arange(2), {"mask": mask}),
        )
        assert losses.keys() == {f"block{layer}_relation_{pair}" for layer in layers for pair in NINE}
        total = sum(terms.weights[name] * loss for name, loss in losses.items())
        assert_close(total, oracle.io[f"loss_relation9_{name}"][0], **oracle.tolerance)


@pytest.mark.parametrize("projection", ["linear", "mlp_l2"])
@pytest.mark.parametrize("reading", ["sum", "mixture"])
@pytest.mark.parametrize("pool", ["query", "flatten"])
def test_gradients_of_adaptive_relations_are_the_slopes(pool: str, reading: str, projection: str) -> None:
    settings = AdaptiveSettings(pool=pool, reading=reading, projection=projection, subspace=3, coverage=0.5)  # type: ignore[arg-type]
    check_gradients(make(heads="adaptive", pairs=["qk"], adaptive=settings))


@pytest.mark.parametrize("heads", [heads for heads in SCHEMES if heads != "adaptive"])
def test_gradients_are_the_slopes(heads: str) -> None:
    check_gradients(make(heads=heads, pairs=["qv", "kk"], **NEEDED.get(heads, {})))


def check_gradients(term: Relations) -> None:
    """Against finite differences in float64; `logit_distance` computes in float32, so its differences are coarser."""
    term.double()
    names = [name for name, _ in term.named_parameters()]
    student, teacher = random_features(term, torch.float64)
    ours = [x.clone().requires_grad_() for x in student.qkv[2]]
    own = [p.detach().clone().requires_grad_() for p in term.parameters()]

    def total(*values: Tensor) -> Tensor:
        inputs = features(term, values[:3], teacher.qkv[2])  # type: ignore[arg-type]
        parameters = dict(zip(names, values[3:], strict=True))
        losses = torch.func.functional_call(term, parameters, (*inputs, batch()))
        return sum(weight * losses[name] for name, weight in term.weights.items())  # type: ignore[return-value]

    coarse = term.settings.heads == "learned_map"
    bounds = {"eps": 1e-2, "atol": 1e-4, "rtol": 1e-2} if coarse else {"atol": 1e-7, "rtol": 1e-5}
    assert torch.autograd.gradcheck(total, (*ours, *own), fast_mode=not coarse, **bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", SCHEMES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(heads: str, kind: torch.dtype) -> None:
    """Under autocast nothing is lost but the rounding of the inputs, and underflow is no trouble."""
    term = make(heads=heads, **NEEDED.get(heads, {}))
    student, teacher = random_features(term, kind)
    with torch.autocast("cpu", kind):
        half = term(student, teacher, batch())
    as32 = [tuple(x.float() for x in side.qkv[2]) for side in (student, teacher)]
    full = term(*features(term, *as32), batch())  # type: ignore[arg-type]
    assert half.keys() == full.keys()
    for name, loss in half.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, full[name]), name
    # the learned map compares logits themselves, and its gradients grow beyond float16
    student, teacher = random_features(term, kind, scale=10.0 if heads == "learned_map" else 100.0)
    ours = tuple(x.requires_grad_() for x in (x.clone() for x in student.qkv[2]))
    with torch.autocast("cpu", kind):
        losses = term(*features(term, ours, teacher.qkv[2]), batch())  # type: ignore[arg-type]
    assert all(loss.isfinite() for loss in losses.values())
    total = sum(losses[name] for name in term.weights)
    total.backward()  # type: ignore[union-attr]
    assert ours[0].grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in (*ours, *term.parameters()))


def test_the_learned_map_is_over_logits() -> None:
    term = make(heads="learned_map")
    student, teacher = random_features(term)
    losses = term(student, teacher, batch())
    assert {name: tuple(p.shape) for name, p in term.named_parameters()} == {
        "head_maps.qk.weight": (4, 3),
        "head_maps.vv.weight": (4, 3),
    }
    for pair in ("qk", "vv"):
        logits = (relation_logits(side.qkv[2], pair) for side in (student, teacher))  # type: ignore[arg-type]
        expected = logit_distance(*logits, term.head_maps[pair].weight)
        assert_close(losses[f"relation_{pair}"], expected)


def test_class_tokens_take_part_where_both_sides_have_one() -> None:
    student, teacher = random_features(make())

    def loss(ours: bool, theirs: bool, class_token: bool = True) -> Tensor:
        """From the same patches; the class tokens are those of row 0."""
        encoder = ViT(ViTShape(16, 4, 12, 2, 3, class_token=ours))
        other = Teacher(ViT(ViTShape(16, 4, 24, 2, 4, class_token=theirs)))
        term = make(encoder, other, class_token=class_token)
        sides = [
            Features(int(has), (2, 2), qkv={2: tuple(x[:, :, int(not has) :] for x in side.qkv[2])})  # type: ignore[dict-item]
            for has, side in ((ours, student), (theirs, teacher))
        ]
        answer: Tensor = term(*sides, batch())["relation_qk"]
        return answer

    patches = loss(False, False)
    assert_close(loss(True, False), patches)
    assert_close(loss(False, True), patches)
    assert_close(loss(True, True, class_token=False), patches)
    assert (loss(True, True) - patches).abs() > 1e-3


def test_a_distillation_token_is_left_out() -> None:
    term = make(heads="average")
    student, teacher = random_features(term)
    expected = term(student, teacher, batch())
    longer = tuple(torch.cat([x[:, :, :1], torch.randn_like(x[:, :, :1]), x[:, :, 1:]], dim=2) for x in teacher.qkv[2])
    got = term(student, Features(2, (2, 2), qkv={2: longer}), batch())  # type: ignore[dict-item]
    assert_close(got, expected)


def test_names_weights_and_taps() -> None:
    term = make(label="deep", weight=0.5, student_layer=1, pairs=["qk", "vv", "qk"])
    assert term.weights == {"deep_relation_qk": 0.5, "deep_relation_vv": 0.5}
    assert (term.student_taps.qkv, term.teacher_taps.qkv) == ((1,), (2,))
    assert not term.student_taps.tokens
    assert not term.teacher_taps.tokens
    nine = make(heads="regroup", relation_heads=6, pairs=NINE, weight=3.0)
    assert nine.weights == {f"relation_{pair}": pytest.approx(3 / 9) for pair in NINE}
    covered = make(heads="adaptive", label="x", pairs=["qk"], weight=2.0, adaptive=AdaptiveSettings(coverage=0.1))
    assert covered.weights == {"x_relation_qk": 2.0, "x_coverage_qk": pytest.approx(0.2)}
    answers = covered(*random_features(covered), batch())
    assert answers.keys() == covered.weights.keys() | {"x_head_entropy_qk"} | {f"x_head_share_qk_0{i}" for i in "1234"}
    shares = torch.stack([answers[f"x_head_share_qk_0{i}"] for i in "1234"])
    assert_close(answers["x_coverage_qk"], math.log(4) + (shares * shares.log()).sum())
    with pytest.raises(
        ConfigError, match="two terms have a loss named 'relation_vv'; give one of them another `label`"
    ):
        Terms([make(), make(pairs=["vv"])])


def test_shapes_of_the_projections() -> None:
    linear = make(heads="adaptive", pairs=["vv"])
    assert {name: tuple(p.shape) for name, p in linear.named_parameters()} == {
        "matchings.vv.q.weight": (64, 3),
        "matchings.vv.q.bias": (64,),
        "matchings.vv.k.weight": (64, 4),
        "matchings.vv.k.bias": (64,),
    }
    deep = make(heads="adaptive", pairs=["vv"], adaptive=AdaptiveSettings(projection="mlp_l2", subspace=5)).matchings[
        "vv"
    ]
    assert [tuple(p.shape) for p in deep.q.parameters()] == [(10, 3), (10,), (5, 10), (5,)]
    weights = deep(*(10 * torch.randn(2, heads, heads) for heads in (3, 4)))
    assert weights.shape == (2, 3, 4)
    assert_close(weights.sum(-1), torch.ones(2, 3))
    assert weights.max() / weights.min() <= math.exp(2) + 1e-3, "unit vectors: no share is e^2 times another"


def test_relation_heads_of_the_teacher_count() -> None:
    """A teacher that TinyMIM trained says how many heads its block's relations have."""
    teacher = Teacher(ViT(ViTShape(16, 4, 24, 2, 4)))
    teacher.relation_heads = {2: 6}
    assert make(teacher=teacher).student_heads == 6
    assert make(teacher=teacher, teacher_layer=1).student_heads == 4
    term = make(teacher=teacher, heads="adaptive")
    answers = term(*random_features(term), batch())
    assert "head_share_qk_06" in answers
    assert "head_share_qk_07" not in answers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_layer": 3}, "student_layer 3 is not a block of the student, which has 1 to 2"),
        ({"teacher_layer": 9}, "teacher_layer 9 is not a block of the teacher, which has 1 to 2"),
        ({"heads": "regroup"}, r"needs relation_heads, a divisor of both widths \(12 and 24\)"),
        (
            {"heads": "regroup", "relation_heads": 8},
            "student's width 12 does not split into 8 relation_heads; give a divisor of both",
        ),
        ({"heads": "significant"}, "needs significant_head: .* has heads 1 to 4; `mimlet probe --kind heads`"),
        (
            {"heads": "significant", "significant_head": 5},
            "no significant_head 5: the teacher's block 2 has heads 1 to 4",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_a_width_that_the_teachers_heads_do_not_divide() -> None:
    teacher = Teacher(ViT(ViTShape(16, 4, 40, 2, 5)))
    text = (
        "relations: the student's width 12 does not split into the 5 heads of the teacher's block 1, as "
        "heads='adaptive_block' needs; use another heads, such as 'adaptive', or an encoder.dim divisible by 5"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        make(teacher=teacher, teacher_layer=1)
    assert make(teacher=teacher, heads="adaptive").teacher_heads == 5
    with pytest.raises(ConfigError, match="teacher's width 40 does not split into 6 relation_heads"):
        make(teacher=teacher, heads="regroup", relation_heads=6)


def test_the_printed_pooling_warns() -> None:
    with pytest.warns(UserWarning, match="is the same number for every head"):
        make(heads="adaptive", adaptive=AdaptiveSettings(pool="global"))


def in_raster_order(x: Tensor, side: int) -> Tensor:
    """Official, unrolled tokens [B,H,4 U,d] of stage 3 or 4 of a Hiera -> [B,H,side*side,d]: four tokens of each unit,
    (row, column), with the units innermost.
    """
    units = side // 2
    x = x.unflatten(2, (2, 2, units, units)).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(*x.shape[:2], side * side, -1)


@pytest.mark.parametrize("heads", ["adaptive_block", "average"])
def test_tokens_are_compared_where_they_stand(heads: str) -> None:
    """A Hiera's unrolled tokens with the raster of a plain ViT with a class token, which is left out."""
    student, teacher = micro("hiera_micro"), Teacher(micro("vit_nano"))
    term = make(student, teacher, heads=heads)  # type: ignore[arg-type]
    assert (term.student_layer, term.teacher_layer, term.class_token) == (6, 4, False)
    assert (term.student_heads, term.teacher_heads) == (4 if heads == "adaptive_block" else 8, 4)
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = student(images, taps=term.student_taps), teacher(images, taps=term.teacher_taps)
    q, k, v = (in_raster_order(x, 8) for x in ours.qkv[6])
    plain = Relations(RelationSettings(heads=heads), micro("hivit_micro", dim=192, heads=8), teacher, masked=False)
    raster = Features(0, (8, 8), qkv={6: (q, k, v)})
    assert_close(term(ours, theirs, batch()), plain(raster, theirs, batch()))
    assert not term.state_dict()


@pytest.mark.parametrize(
    ("student", "settings", "heads"),
    [("itpn_micro", {}, 4), ("hiera_micro", {"student_layer": 5}, 4), ("hiera_micro", {}, 8)],
)
def test_heads_are_those_of_the_block(student: str, settings: dict[str, int], heads: int) -> None:
    term = make(micro(student), Teacher(micro(student)), heads="adaptive", teacher_layer=4, **settings)  # type: ignore[arg-type]
    assert (term.student_heads, term.teacher_heads) == (heads, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "message"),
    [
        (
            "itpn_micro",
            "vit_nano",
            {"student_layer": 2},
            r"student_layer 2 does not attend .* student that do: 3, 4, 5, 6",
        ),
        (
            "vit_nano",
            "hiera_micro",
            {"teacher_layer": 3},
            r"teacher_layer 3 does not attend .* teacher that do: 4, 5, 6",
        ),
    ],
)
def test_blocks_without_attention_have_no_relations(
    student: str, teacher: str, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(micro(student), Teacher(micro(teacher)), **settings)  # type: ignore[arg-type]


def test_other_grids_of_tokens_have_other_relations() -> None:
    """The last block of this Hiera pools its queries, so that the last to attend has the grid of stage 3."""
    student = micro("hiera_micro", q_pool=3, fuse="none")
    with pytest.raises(ConfigError, match=r"layer 5 of the student has 8 x 8 tokens, layer 4 of the teacher 4 x 4"):
        make(student, Teacher(micro("vit_nano", patch=8)))  # type: ignore[arg-type]
