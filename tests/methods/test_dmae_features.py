import pytest
import torch
from torch.testing import assert_close

from mimlet.config import Config, load_config
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.methods.dmae_features import DMAEFeatures
from mimlet.methods.settings import DecoderSettings, DMAEFeaturesSettings
from mimlet.models.features import Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.objectives.reconstruct import normalise_patches, patchify
from tests.methods.official import CLOCK


def config(**method: object) -> Config:
    encoder = {"name": "vit_nano", "image_size": 16, "dim": 12, "depth": 4, "heads": 3}
    decoder = {"dim": 12, "heads": 3}
    return load_config(
        {
            "encoder": encoder,
            "method": {"name": "dmae_features", "decoder": decoder, **method},
            "teacher": {"path": "teacher"},
            "schedule": {"batch": 2, "steps": 1},
        }
    )


def build(**method: object) -> DMAEFeatures:
    torch.manual_seed(0)
    teacher = Teacher(ViT(ViTShape(16, 4, 20, 8, 2)))
    return DMAEFeatures.build(config(**method), teachers=Teachers(teacher))


def batch() -> Batch:
    mask = Mask.from_noise(torch.rand(2, 16), 0.75)
    return Batch({"image": torch.randn(2, 3, 16, 16)}, torch.arange(2), {"mask": mask})


@pytest.mark.parametrize("target", ["raw", "normalised"])
def test_is_mae_plus_alignment_on_the_same_visible_patches(target: str) -> None:
    method, given = build(**({} if target == "raw" else {"target": target})), batch()
    losses = method(given, CLOCK)

    student = method.encoder(given.images, given.mask, taps=Taps(hidden=(3,)))
    pixels = patchify(given.images, 4)
    pixels = normalise_patches(pixels) if target == "normalised" else pixels
    error = (method.decoder(student.latent, given.mask) - pixels).square().mean(dim=-1)
    assert_close(losses["reconstruction"], error[given.mask.hidden].mean())

    (alignment,) = method.terms
    theirs = method.teacher(given.images, given.mask, taps=Taps(hidden=(6,))).hidden[6]
    ours = alignment.projection(student.hidden[3])
    lengths = [x.square().sum(dim=-1, keepdim=True).sqrt() for x in (ours, theirs)]
    assert_close(losses["alignment"], (theirs / lengths[1] - ours / lengths[0]).abs().mean())
    assert method.weights == {"reconstruction": 1.0, "alignment": 1.0}


def test_everything_trains_but_the_teacher() -> None:
    method, given = build().train(), batch()
    torch.stack(list(method(given, CLOCK).values())).sum().backward()
    silent = {name for name, p in method.named_parameters() if p.requires_grad and p.grad is None}
    assert not silent
    assert not method.teacher.training
    assert all(p.grad is None for p in method.teacher.parameters())
    assert method.masks()["mask"].draw(torch.Generator()).shape == (16,)


def test_more_terms_and_pictures() -> None:
    method = build(terms=[{"kind": "alignment", "label": "early", "student_layer": 1, "teacher_layer": 2}])
    given = batch()
    assert set(method(given, CLOCK)) == set(method.weights) == {"reconstruction", "alignment", "early_alignment"}
    pictures = method.pictures(given)
    assert_close(pictures["original"], given.images)
    shown = patchify(pictures["reconstruction"], 4)[~given.mask.hidden]
    assert_close(shown, patchify(given.images, 4)[~given.mask.hidden])


def test_numbers_of_the_released_code() -> None:
    found = load_config("dmae_features_base", ["teacher.path=teacher"])
    assert isinstance(found.method, DMAEFeaturesSettings)
    assert found.method == DMAEFeaturesSettings(decoder=DecoderSettings(depth=8, dim=512, heads=16))
    assert (found.method.target, found.method.mask_ratio, found.method.alignment.weight) == ("raw", 0.75, 1.0)
    assert (found.schedule.batch, found.schedule.epochs, found.schedule.warmup_epochs) == (4096, 100, 20)
    assert (found.optim.lr, found.optim.lr_batch, found.optim.weight_decay) == (1.5e-4, 256, 0.05)
