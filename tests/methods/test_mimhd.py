import pytest
import torch
from torch.testing import assert_close

from mimlet.config import AugmentSettings, Config, load_config
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.errors import WeightsError
from mimlet.methods.dual_view import DualView
from mimlet.methods.mimhd import MIMHD
from mimlet.methods.relations import Relations
from mimlet.methods.settings import AdaptiveSettings, DualViewSettings, MIMHDSettings, RelationSettings
from mimlet.models.decoders import Decoder
from mimlet.models.features import Features
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.objectives.reconstruct import patchify
from tests.data.images import picture
from tests.methods.official import CLOCK, make_decoder
from tests.shared import golden

STUDENT = ViTShape(16, 4, 12, 2, 3)
TEACHER = ViTShape(16, 4, 24, 3, 4)


def config(**method: object) -> Config:
    return load_config(
        {
            "encoder": {"name": "vit_nano", "image_size": 16, "dim": 12, "depth": 2, "heads": 3},
            "method": {"name": "mimhd", **method},
            "teacher": {"path": "teacher"},
            "schedule": {"batch": 2, "steps": 1},
        }
    )


def make_teacher(decoder: bool = True) -> Teacher:
    torch.manual_seed(0)
    encoder = ViT(TEACHER)
    teacher = Teacher(encoder, Decoder(24, (4, 4), 1, 48, 16, 2, 4) if decoder else None)
    teacher.pixels = "raw"
    return teacher


def build(decoder: bool = True, **method: object) -> MIMHD:
    return MIMHD.build(config(**method), teachers=Teachers(make_teacher(decoder)))


def batch_of(method: MIMHD, **views: torch.Tensor) -> Batch:
    torch.manual_seed(1)
    noise = {name: torch.rand(2, 16) for name in method.masks()}
    masks = {name: sampler.collate(noise[name]) for name, sampler in method.masks().items()}
    return Batch({"image": torch.randn(2, 3, 16, 16), **views}, torch.arange(2), masks)


def test_equals_the_reference() -> None:
    """Equation 11 with the paper's parts as the facts resolve them, and its gradients."""
    oracle = golden("mimhd")
    encoder, teacher_encoder = ViT(STUDENT), ViT(TEACHER)
    teacher = Teacher(teacher_encoder, make_decoder(oracle.weights, teacher_encoder, 16, 2, 4))
    adaptive = AdaptiveSettings(subspace=8)
    relations = Relations(RelationSettings(heads="adaptive", adaptive=adaptive), encoder, teacher, masked=False)
    dual_view = DualView(DualViewSettings(target="raw"), encoder, teacher, masked=False)
    method = MIMHD(encoder, teacher, relations, dual_view)
    ours = {name: parameter for name, parameter in relations.named_parameters() if "matchings" in name}
    theirs = {f"proj_{name.removeprefix('matchings.')}": parameter for name, parameter in ours.items()}
    theirs |= {f"adapter.{name}": parameter for name, parameter in dual_view.adapter.named_parameters()}
    assert len(theirs) == 10
    for name, parameter in theirs.items():
        parameter.data.copy_(oracle.weights[name])

    tapped = {name: oracle.io[name].clone().requires_grad_() for name in oracle.io if name.startswith("student_")}
    q, k, v = (tapped[f"student_{letter}"] for letter in "qkv")
    student = Features(1, (4, 4), tokens=tapped["student_tokens"], qkv={2: (q, k, v)})
    qkv = (oracle.io["teacher_q"], oracle.io["teacher_k"], oracle.io["teacher_v"])
    mask = Mask.from_noise(oracle.io["noise"], 0.5)
    batch = Batch({"image": oracle.io["imgs"]}, torch.arange(2), {"views": mask})
    losses = method.terms(student, Features(1, (4, 4), qkv={3: qkv}), batch)
    total = sum(weight * losses[name] for name, weight in method.weights.items())
    assert_close(total, oracle.io["loss_total"][0], **oracle.tolerance)

    total.backward()
    for name, tensor in {**tapped, **theirs, "mask_token": dual_view.mask_token}.items():
        if f"grad.{name}" in oracle.io:
            assert_close(tensor.grad, oracle.io[f"grad.{name}"], **oracle.tolerance)
    assert sum(name.startswith("grad.") for name in oracle.io) == 15


def test_losses_and_what_is_watched() -> None:
    method = build()
    losses = method(batch_of(method), CLOCK)
    assert method.weights == {"relation_qk": 1.0, "relation_vv": 1.0, "dual_view": 1.0}
    watched = {f"head_entropy_{pair}" for pair in ("qk", "vv")}
    watched |= {f"head_share_{pair}_{head:02d}" for pair in ("qk", "vv") for head in (1, 2, 3, 4)}
    assert set(losses) == set(method.weights) | watched
    assert all(loss.ndim == 0 for loss in losses.values())


def test_every_parameter_of_the_student_trains() -> None:
    """Unlike TinyMIM's, the last block runs in full: its output is decoded. The teacher stays as it is."""
    method = build().train()
    losses = method(batch_of(method), CLOCK)
    torch.stack([losses[name] for name in method.weights]).sum().backward()
    assert not {name for name, p in method.named_parameters() if p.requires_grad and p.grad is None}
    assert all(p.grad is None for p in method.teacher.parameters())
    assert not method.teacher.training
    held = {name.split(".")[0] for name in method.state_dict()}
    assert held == {"encoder", "teacher", "terms"}
    assert not any("decoder" in name for name in method.terms.state_dict())


def test_without_reconstruction_nothing_is_decoded() -> None:
    method = build(decoder=False, reconstruct=False)
    assert method.weights == {"relation_qk": 1.0, "relation_vv": 1.0}
    assert method.masks() == {}
    assert not method.terms.student_taps.tokens
    assert method.pictures(batch_of(method)) == {}
    with pytest.raises(WeightsError, match="holds no decoder"):
        build(decoder=False)
    with pytest.raises(WeightsError, match="holds no decoder"):
        build(decoder=False, reconstruct=False, terms=[{"kind": "dual_view"}])


def test_only_the_student_sees_changed_colours() -> None:
    method = build()
    plain = batch_of(method)
    jittered = batch_of(method, student=plain.images + 0.5)
    encoded: list[torch.Tensor] = []
    for part in (method.encoder, method.teacher.encoder):
        part.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    losses = method(jittered, CLOCK)
    assert torch.equal(encoded[0], jittered.views["student"])
    assert torch.equal(encoded[1], jittered.images)

    student = method.encoder(jittered.views["student"])
    dual_view = next(term for term in method.terms if isinstance(term, DualView))
    mask = jittered.masks["views"]
    target = patchify(plain.images, 4).gather(1, dual_view.predicted(mask)[..., None].expand(-1, -1, 48))
    assert_close(losses["dual_view"], (dual_view.predict(student, mask) - target).square().mean())
    for jitter, views in ((0.0, {"image"}), (0.4, {"image", "student"})):
        transform = method.transform(AugmentSettings(color_jitter=jitter), 16)
        assert set(transform(picture(0))) == views


def test_more_terms() -> None:
    method = build(terms=[{"kind": "alignment"}, {"kind": "dual_view", "label": "mostly", "mask_ratio": 0.75}])
    assert set(method.masks()) == {"views", "mostly_views"}
    losses = method(batch_of(method), CLOCK)
    assert {"alignment", "mostly_dual_view", "dual_view"} < set(method.weights) < set(losses)


def test_relations_are_adaptive_whatever_else_is_set() -> None:
    method = build(relations={"teacher_layer": 2, "adaptive": {"reading": "mixture"}})
    relations = next(term for term in method.terms if isinstance(term, Relations))
    assert (relations.settings.heads, relations.teacher_layer) == ("adaptive", 2)
    assert relations.settings.adaptive.reading == "mixture"


def test_numbers_of_the_paper() -> None:
    """Section 2.3 of the facts; the rate is taken as absolute, the teacher's layer 18 as the best of table 4."""
    for name, heads in (("mimhd_base", 12), ("mimhd_small", 6), ("mimhd_tiny", 3), ("mimhd_base_tinyimagenet", 12)):
        found = load_config(name, ["teacher.path=teacher"])
        assert found.encoder.shape().heads == heads
        assert isinstance(found.method, MIMHDSettings)
        relations, dual_view = found.method.relations, found.method.dual_view
        assert (relations.heads, relations.pairs, relations.teacher_layer) == ("adaptive", ["qk", "vv"], 18)
        assert (dual_view.weight, dual_view.mask_ratio, dual_view.views) == (1.0, 0.5, 2)
        assert (found.optim.lr, found.optim.lr_batch, found.schedule.epochs) == (1.5e-3, 0, 100)


def test_heads_that_relations_were_trained_with_are_told() -> None:
    assert build().info == {}
    assert build(relations={"heads": "adaptive_block"}).info == {"heads_of": {2: 4}}


def test_pictures() -> None:
    method = build()
    batch = batch_of(method)
    pictures = method.pictures(batch)
    assert set(pictures) == {"original", "visible", "reconstruction"}
    assert_close(pictures["original"], batch.images)
    hidden = batch.masks["views"].hidden
    assert torch.equal(patchify(pictures["visible"], 4).abs().sum(dim=-1) == 0, hidden)
