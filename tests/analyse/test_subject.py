from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from mimlet.analyse.analysis import Measures, measure, views_for
from mimlet.analyse.subject import MAPS, Subject, open_subject, open_subjects, short_labels
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD
from mimlet.data.source import open_source
from mimlet.errors import ConfigError, WeightsError
from mimlet.export.timm import export_classifier
from mimlet.models.features import Taps
from mimlet.models.foreign import ForeignEncoder
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights import load
from mimlet.tasks.classify import Classify
from tests.data.images import make_folder
from tests.families import HIERARCHICAL, micro
from tests.tiny import finetune, pretrain

IMAGES = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained and a fine-tuned run."""
    root = tmp_path_factory.mktemp("runs")
    photos = make_folder(root / "photos")
    pretrain(photos, root / "mae")
    finetune(photos, root / "classifier", "--encoder", str(root / "mae"))
    return root


def test_a_run_is_normalised_by_itself_and_ends_in_its_norm(runs: Path) -> None:
    subject = open_subject(runs / "mae")
    encoder = load(runs / "mae")
    assert isinstance(encoder, ViT)
    pixels = IMAGES.float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (subject.mean, subject.std))
    assert subject.mean == IMAGENET_MEAN
    with torch.no_grad():
        expected = encoder((pixels - mean) / std).latent
    torch.testing.assert_close(subject.features(IMAGES, Taps(normed=(2,), tokens=False)).normed[2], expected)
    numbers = (subject.size, subject.grid, subject.patch, subject.depth, subject.heads, subject.dim, subject.prefix)
    assert numbers == (16, (4, 4), 4, 2, 3, 24, 1)
    subject.fresh_norm()
    assert torch.equal(subject.encoder.norm.weight, torch.ones(24))


def test_a_classifier_ends_in_the_norm_its_head_reads(runs: Path) -> None:
    classifier = load(runs / "classifier")
    norm = classifier.head.fc_norm
    assert norm is not None
    for subject in (open_subject(runs / "classifier"), open_subject(classifier)):
        features = subject.features(IMAGES, Taps(hidden=(2,), normed=(2,), tokens=False))
        with torch.no_grad():
            torch.testing.assert_close(features.normed[2], norm(features.hidden[2]))


def test_models_of_other_libraries(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    subject = open_subject(ForeignEncoder(model, 32), "timm")
    assert (subject.label, subject.size, subject.has_norms, subject.sees_attention) == ("timm", 32, True, True)
    for block in model.blocks:
        block.attn.fused_attn = False
    blind = Subject(ForeignEncoder(model, 32), "blind", "blind")
    assert not blind.sees_attention
    photos = open_source([str(make_folder(tmp_path))], labelled=False)
    (found,), similarities = measure([blind], views_for([blind], photos), 12, Measures())
    assert found.distance is None
    assert found.notes == ["no attention distance and entropy: its blocks do not show their attention"]
    assert len(similarities[0].cka) == 3


def test_what_is_no_vision_transformer(tmp_path: Path, runs: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty holds no encoder.safetensors; expected the folder of a finished"):
        open_subject(tmp_path / "empty")
    save_for_hf(timm.create_model("resnet10t"), tmp_path / "resnet", model_args={})
    with pytest.raises(WeightsError, match="is a ResNet and not ViT-like"):
        open_subject(tmp_path / "resnet")
    with pytest.raises(ConfigError, match=r"Linear is a Linear without patch, dim, .*; expected an encoder of mimlet"):
        open_subject(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no model to look at"):
        open_subjects([])
    with pytest.raises(ConfigError, match="mae is given twice; give each model once"):
        open_subjects([runs / "mae", f"{runs}/mae/"])


def test_labels_are_as_short_as_they_can_be() -> None:
    assert short_labels(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_labels(["x/mae", "y/mae", "timm:vit"]) == ["x/mae", "y/mae", "timm:vit"]
    assert short_labels(["ViT", "ViT"]) == ["ViT 1", "ViT 2"]


def test_distillation_and_register_tokens_are_left_out() -> None:
    torch.manual_seed(0)
    subject = open_subject(ViT(ViTShape(16, 4, 24, 2, 3, distillation_token=True)))
    features = subject.features(IMAGES, Taps(normed=(1,), attention=(1,), tokens=False))
    assert (features.prefix, features.normed[1].shape[1], features.attention[1].shape[-1]) == (1, 17, 17)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_classifiers_of_every_family_end_in_the_norm_their_head_reads(name: str, tmp_path: Path) -> None:
    """Though a HiViT has no norm of its own there."""
    torch.manual_seed(0)
    task = Classify(micro(name), 3)
    assert task.head.fc_norm is not None
    nn.init.normal_(task.head.fc_norm.weight)
    export_classifier(tmp_path, task, classes=["a", "b", "c"], mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for subject in (open_subject(tmp_path), open_subject(load(tmp_path))):
        features = subject.features(images, Taps(hidden=(6,), normed=(6,), tokens=False))
        with torch.no_grad():
            torch.testing.assert_close(features.normed[6], task.head.fc_norm(features.hidden[6]))
        subject.fresh_norm()
        last = subject.features(images, Taps(normed=(6,), tokens=False)).normed[6]
        assert last.mean(-1).abs().max() < 1e-5


def test_maps_held_at_a_time_count_the_blocks_that_attend() -> None:
    subject = Subject(micro("hiera_micro"), "a", "a")
    assert subject.chunk == MAPS // ((4 + 4 + 8) * 64**2)
