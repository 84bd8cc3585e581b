import pytest
import torch
from torch.testing import assert_close

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.methods.dual_view import DualView
from mimlet.methods.settings import DualViewSettings
from mimlet.methods.terms import NOTHING
from mimlet.models.decoders import Decoder
from mimlet.models.features import Features
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher
from mimlet.models.vit import ViT
from mimlet.objectives.reconstruct import normalise_patches, patchify
from tests.families import micro
from tests.methods.official import make_decoder
from tests.shared import Golden, golden

STUDENT = ViTShape(16, 4, 12, 1, 3)
TEACHER = ViTShape(16, 4, 24, 1, 4)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NO_TEACHER = Features(1, (4, 4))


def make_teacher(shape: ViTShape = TEACHER, *, decoder: bool = True, **options: object) -> Teacher:
    """A random one whose decoder predicts raw pixels."""
    torch.manual_seed(0)
    encoder = ViT(shape)
    made = Decoder(encoder.dim, encoder.grid, encoder.prefix, 3 * encoder.patch**2, 16, 2, 4) if decoder else None
    teacher = Teacher(encoder, made, **options)  # type: ignore[arg-type]
    teacher.pixels = "raw"
    return teacher


def make(
    teacher: Teacher | None = None, student: ViTShape = STUDENT, masked: bool = False, **settings: object
) -> DualView:
    term = DualView(DualViewSettings(**settings), ViT(student), teacher or make_teacher(), masked=masked)  # type: ignore[arg-type]
    torch.nn.init.normal_(term.adapter.bias)
    return term


def batch_of(term: DualView, images: torch.Tensor | None = None, name: str = "views") -> Batch:
    images = torch.randn(3, 3, 16, 16) if images is None else images
    draws = torch.stack([term.sampler.draw(torch.Generator().manual_seed(i)) for i in range(len(images))])
    return Batch({"image": images}, torch.arange(len(images)), {name: term.sampler.collate(draws)})


def at(patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))


def from_oracle(oracle: Golden, **settings: object) -> tuple[DualView, Batch, Features]:
    encoder = ViT(TEACHER)
    teacher = Teacher(encoder, make_decoder(oracle.weights, encoder, 16, 2, 4))
    term = make(teacher, **settings)
    term.adapter.load_state_dict({name: oracle.weights[f"adapter.{name}"] for name in ("weight", "bias")})
    mask = Mask.from_noise(oracle.io["noise"], 0.5)
    batch = Batch({"image": oracle.io["imgs"]}, torch.arange(2), {"views": mask})
    return term, batch, Features(1, (4, 4), tokens=oracle.io["student_tokens"].clone().requires_grad_())


def test_equals_the_reference() -> None:
    oracle = golden("mimhd")
    term, batch, student = from_oracle(oracle, target="raw")
    mask = batch.masks["views"]
    assert torch.equal(~mask.hidden, oracle.io["view1_keep"].bool())
    assert torch.equal(~mask.complement().hidden, oracle.io["view2_keep"].bool())

    prediction, ids = term.predict(student, mask), term.predicted(mask)
    first, second = prediction.split(8, dim=1)
    assert_close(first, at(oracle.io["pred_view1"], mask.ids_hidden), **oracle.tolerance)
    assert_close(second, at(oracle.io["pred_view2"], mask.ids_keep), **oracle.tolerance)
    assert_close(prediction, at(oracle.io["pred_merged"], ids), **oracle.tolerance)

    loss = term(student, NO_TEACHER, batch)["dual_view"]
    assert_close(loss, oracle.io["loss_rec_raw"][0], **oracle.tolerance)
    loss.backward()
    for name, gradient in (
        ("student_tokens", student.latent.grad),
        ("adapter.weight", term.adapter.weight.grad),
        ("adapter.bias", term.adapter.bias.grad),
        ("mask_token", term.mask_token.grad),
    ):
        assert_close(gradient, oracle.io[f"grad.{name}"], **oracle.tolerance)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"target": "normalised"}, "loss_rec_norm_pix"), ({"target": "raw", "views": 1}, "loss_rec_single_view1_raw")],
)
def test_variants_equal_the_reference(settings: dict[str, object], name: str) -> None:
    oracle = golden("mimhd")
    term, batch, student = from_oracle(oracle, **settings)
    assert_close(term(student, NO_TEACHER, batch)["dual_view"], oracle.io[name][0], **oracle.tolerance)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_every_patch_is_predicted_once_from_what_its_view_shows(ratio: float) -> None:
    teacher = make_teacher()
    assert teacher.decoder is not None
    term = make(teacher, mask_ratio=ratio)
    batch = batch_of(term)
    mask = batch.masks["views"]
    student = Features(1, (4, 4), tokens=torch.randn(3, 17, 12))
    ids = term.predicted(mask)
    assert torch.equal(ids.sort(dim=1).values, torch.arange(16).expand(3, -1))

    adapted = term.adapter(student.latent)
    whole = torch.empty(3, 16, 48)
    for view in (mask, Mask.from_hidden(~mask.hidden)):
        latent = torch.cat([adapted[:, :1], at(adapted[:, 1:], view.ids_keep)], dim=1)
        whole = torch.where(view.hidden[..., None], teacher.decoder(latent, view), whole)
    assert_close(term.predict(student, mask), at(whole, ids))
    loss = term(student, NO_TEACHER, batch)["dual_view"]
    assert_close(loss, (whole - patchify(batch.images, 4)).square().mean())


def test_views_of_equal_size_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    for ratio in (0.5, 0.25):
        term = make(mask_ratio=ratio)
        decode = term.decode

        def counted(latent: torch.Tensor, *rest: object, decode: object = decode) -> torch.Tensor:
            passes.append(len(latent))
            return decode(latent, *rest)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr(term, "decode", counted)
        term.predict(Features(1, (4, 4), tokens=torch.randn(3, 17, 12)), batch_of(term).masks["views"])
    assert passes == [6, 3, 3]


def test_without_class_token() -> None:
    student, teacher = (ViTShape(**{**vars(shape), "class_token": False}) for shape in (STUDENT, TEACHER))
    made = make_teacher(teacher)
    assert made.decoder is not None
    term = make(made, student)
    mask = batch_of(term).masks["views"]
    tokens = torch.randn(3, 16, 12)
    first, _ = term.predict(Features(0, (4, 4), tokens=tokens), mask).split(8, dim=1)
    assert_close(first, made.decoder(at(term.adapter(tokens), mask.ids_keep), mask, hidden_only=True))


def test_starts_where_the_teacher_stands() -> None:
    """Equal widths: the adapter is the identity; the mask token is the teacher's."""
    teacher = make_teacher()
    assert teacher.decoder is not None
    term = DualView(DualViewSettings(), ViT(TEACHER), teacher, masked=False)
    tokens = torch.randn(2, 17, 24)
    assert torch.equal(term.adapter(tokens), tokens)
    assert torch.equal(term.mask_token, teacher.decoder.mask_token)
    assert term.mask_token is not teacher.decoder.mask_token


def test_only_adapter_and_mask_token_are_the_terms_own() -> None:
    teacher = make_teacher()
    term = make(teacher)
    assert set(term.state_dict()) == {"adapter.weight", "adapter.bias", "mask_token"}
    tokens = torch.randn(3, 17, 12, requires_grad=True)
    term(Features(1, (4, 4), tokens=tokens), NO_TEACHER, batch_of(term))["dual_view"].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in term.parameters())
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(dim=-1) > 0).all(), "every token is shown by one of the views"
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_targets_are_the_teachers_pixels() -> None:
    """In the teacher's normalisation, and raw or normalised as its decoder was trained, unless settings say more."""
    images = torch.randn(3, 3, 16, 16)
    scale = torch.tensor(IMAGENET_STD).view(3, 1, 1) / 0.5
    shift = (torch.tensor(IMAGENET_MEAN).view(3, 1, 1) - 0.5) / 0.5
    target = patchify(images * scale + shift, 4)
    student = Features(1, (4, 4), tokens=torch.randn(3, 17, 12))
    for pixels, setting, expected in (
        ("raw", "auto", target),
        ("normalised", "auto", normalise_patches(target)),
        ("normalised", "raw", target),
    ):
        teacher = make_teacher(own=HALF, students=(IMAGENET_MEAN, IMAGENET_STD))
        teacher.pixels = pixels  # type: ignore[assignment]
        term = make(teacher, target=setting)
        batch = batch_of(term, images)
        mask = batch.masks["views"]
        error = term.predict(student, mask) - at(expected, term.predicted(mask))
        assert_close(term(student, NO_TEACHER, batch)["dual_view"], error.square().mean(), rtol=1e-4, atol=1e-5)


def test_a_teacher_in_bf16_stays_near() -> None:
    """Rounding to 8 bits through two blocks: within 2 % of the exact predictions, as the encoder's."""
    student = Features(1, (4, 4), tokens=torch.randn(3, 17, 12))
    exact, rough = make(make_teacher()), make(make_teacher(bf16=True))
    rough.load_state_dict(exact.state_dict())
    mask = batch_of(exact).masks["views"]
    want, got = (term.predict(student, mask).float() for term in (exact, rough))
    assert 0 < (got - want).norm() / want.norm() < 0.02


def test_an_exact_teacher_follows_a_student_in_bf16() -> None:
    term = make()
    batch = batch_of(term)
    student = Features(1, (4, 4), tokens=torch.randn(3, 17, 12))
    exact = term(student, NO_TEACHER, batch)["dual_view"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(student, NO_TEACHER, batch)["dual_view"]
    assert loss.dtype == torch.float32
    assert_close(loss, exact, rtol=0.01, atol=0)


def test_label_and_weight() -> None:
    term = make(label="late", weight=0.3, mask_ratio=0.25)
    assert term.weights == {"late_dual_view": 0.3}
    (name,) = term.masks()
    student = Features(1, (4, 4), tokens=torch.randn(3, 17, 12))
    assert set(term(student, NO_TEACHER, batch_of(term, name=name))) == {"late_dual_view"}
    assert (term.student_taps.tokens, term.teacher_taps) == (True, NOTHING)
    assert make().masks()["views"].draw(torch.Generator()).shape == (16,)


@pytest.mark.parametrize("views", [1, 2])
def test_pictures(views: int) -> None:
    """In the student's normalisation: the original, what the first view shows of it, and predictions at what is hidden
    from one of the views.
    """
    teacher = make_teacher(own=HALF, students=(IMAGENET_MEAN, IMAGENET_STD))
    term = make(teacher, views=views, target="normalised")
    batch, student = batch_of(term), Features(1, (4, 4), tokens=torch.randn(3, 17, 12))
    mask = batch.masks["views"]
    pictures = term.pictures(student, batch)
    assert_close(pictures["original"], batch.images, rtol=1e-4, atol=1e-5)
    true, shown, made = (
        patchify(teacher.inputs(pictures[name]), 4) for name in ("original", "visible", "reconstruction")
    )
    hidden = mask.hidden[..., None]
    assert_close(shown, torch.where(hidden, 0.0, true), rtol=1e-4, atol=1e-5)
    if views == 1:
        assert_close(torch.where(hidden, 0.0, made), torch.where(hidden, 0.0, true), rtol=1e-4, atol=1e-5)
    ids = term.predicted(mask)
    mean, deviation = at(true, ids).mean(dim=-1, keepdim=True), at(true, ids).std(dim=-1, keepdim=True)
    assert_close(at(made, ids), term.predict(student, mask) * deviation + mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("teacher", "student", "settings", "message"),
    [
        ({}, STUDENT, {"masked": True}, "shows the student only the visible patches; use it with a method that shows"),
        ({"decoder": False}, STUDENT, {}, "the teacher brings no decoder"),
        ({}, ViTShape(24, 4, 12, 1, 3), {}, "predicts 4 x 4 patches, the student has 6 x 6; set teacher.grid=input"),
        ({}, ViTShape(16, 4, 12, 1, 3, class_token=False), {}, r"has a class token, the student none; .*=true"),
        ({}, STUDENT, {"mask_ratio": 0.97}, "mask ratio 0.97 leaves 0 of 16 units visible"),
    ],
)
def test_what_does_not_fit_is_refused(
    teacher: dict[str, bool], student: ViTShape, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(make_teacher(**teacher), student, **settings)  # type: ignore[arg-type]


def test_unknown_pixels_have_to_be_said() -> None:
    teacher = make_teacher()
    teacher.pixels = None
    with pytest.raises(ConfigError, match=r"does not say which pixels .* method\.dual_view\.target=normalised"):
        make(teacher)
    assert make(teacher, target="raw").normalise is False


def hiera_teacher() -> Teacher:
    """Its decoder reads tokens, as that of a plain ViT does."""
    encoder = micro("hiera_micro")
    teacher = Teacher(encoder, Decoder(encoder.dim, encoder.grid, 0, 3 * encoder.patch**2, 16, 2, 4))
    teacher.pixels = "raw"
    return teacher


@pytest.mark.parametrize("student", ["hiera_micro", "itpn_micro"])
def test_a_hiera_decodes_tokens_of_any_encoder(student: str) -> None:
    """A Hiera's tokens are hidden by mask units; either view predicts the patches that it hides."""
    torch.manual_seed(0)
    encoder = micro(student)
    term = DualView(DualViewSettings(), encoder, hiera_teacher(), masked=False)
    images = torch.randn(2, 3, 32, 32)
    batch = batch_of(term, images)
    mask = batch.masks["views"]
    assert mask.hidden.shape == (2, encoder.units)
    student_features = encoder(images)
    loss = term(student_features, NO_TEACHER, batch)["dual_view"]
    patches = encoder.patch_mask(mask)
    prediction = term.predict(student_features, patches)
    assert_close(loss, (prediction - at(patchify(images, 4), term.predicted(patches))).square().mean())
    # What a view hides of the student's tokens does not reach the prediction of that view.
    half = patches.ids_hidden.shape[1]
    changed = student_features.latent.masked_fill(patches.hidden[..., None], 0)
    again = term.predict(Features(0, (8, 8), tokens=changed), patches)
    assert_close(again[:, :half], prediction[:, :half])
    assert not torch.allclose(again[:, half:], prediction[:, half:])
    assert term.pictures(student_features, batch)["reconstruction"].shape == images.shape


def test_a_decoder_of_several_maps_cannot_read_tokens() -> None:
    teacher = Teacher(micro("itpn_micro"), Decoder(128, (8, 8), 0, 48, 16, 1, 4))
    teacher.pixels = "raw"
    with pytest.raises(
        ConfigError, match=r"reads levels of a HiViT or iTPN, and the student gives it tokens; take the"
    ):
        DualView(DualViewSettings(), micro("hivit_micro"), teacher, masked=False)


def test_a_class_token_that_the_student_cannot_have() -> None:
    with pytest.raises(ConfigError, match=r"a HiViT or iTPN has none, so take a teacher without one"):
        DualView(DualViewSettings(), micro("hivit_micro"), make_teacher(ViTShape(32, 4, 24, 1, 4)), masked=False)
