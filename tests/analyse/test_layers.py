"""The curve equals probes made layer by layer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mimlet.analyse.analysis import views_for
from mimlet.analyse.layers import probe_by_layer
from mimlet.analyse.subject import Subject, open_subject
from mimlet.data.dataset import ImageDataset
from mimlet.data.loader import evaluation_batches
from mimlet.data.source import open_source
from mimlet.errors import DataError
from mimlet.models.features import Features, Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.tasks.probe import extract_features, logistic_probe
from tests.data.images import make_folder
from tests.families import micro

DEPTH = 3


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    return open_subject(ViT(ViTShape(image_size=16, patch=8, dim=24, depth=DEPTH, heads=3)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Nothing to learn, so that layers differ by chance; the second begins with the images of the first."""
    root = tmp_path_factory.mktemp("images")
    return make_folder(root / "train", each=10), make_folder(root / "test", each=28)


def datasets(subject: Subject, folders: tuple[Path, Path]) -> tuple[ImageDataset, ImageDataset]:
    train = open_source([str(folders[0])], labelled=True)
    test = open_source([str(folders[1])], labelled=True, classes=train.classes)
    return views_for([subject], train), views_for([subject], test)


def layer_alone(subject: Subject, dataset: ImageDataset, taps: Taps) -> tuple[Tensor, Tensor]:
    """Mean patch tokens of the one tap there is, and labels, all images at once."""
    (batch,) = evaluation_batches(dataset, batch=1000)
    features = subject.features(batch.views[subject.view], taps)
    (tokens,) = (features.normed or features.hidden).values()
    assert batch.labels is not None
    return tokens[:, 1:].mean(dim=1), batch.labels


def test_the_curve_equals_separate_probes(subject: Subject, folders: tuple[Path, Path]) -> None:
    train, test = datasets(subject, folders)
    expected = []
    for layer in range(DEPTH + 1):
        taps = Taps(normed=(layer,), tokens=False)
        expected.append(logistic_probe(layer_alone(subject, train, taps), layer_alone(subject, test, taps))["top1"])
    assert probe_by_layer(subject, train, test) == expected
    assert len(set(expected)) > 1


def test_the_last_layer_is_that_of_the_quick_probe(subject: Subject, folders: tuple[Path, Path]) -> None:
    train, test = datasets(subject, folders)
    assert isinstance(subject.encoder, ViT)
    parts = []
    for dataset in (train, test):
        (batch,) = evaluation_batches(dataset, batch=1000)
        batch.views["image"] = batch.views[subject.view]
        parts.append(extract_features(subject.encoder, [batch], "cpu", subject.mean, subject.std, "mean"))
    assert probe_by_layer(subject, train, test)[-1] == logistic_probe(*parts)["top1"]


def test_without_norms_outputs_of_blocks_are_probed(subject: Subject, folders: tuple[Path, Path]) -> None:
    class Normless(Subject):
        has_norms = False  # type: ignore[assignment]

    plain = Normless(subject.encoder, "plain", "plain")
    train, test = datasets(plain, folders)
    taps = [Taps(hidden=(layer,), tokens=False) for layer in range(DEPTH + 1)]
    expected = [logistic_probe(layer_alone(plain, train, tap), layer_alone(plain, test, tap))["top1"] for tap in taps]
    assert probe_by_layer(plain, train, test) == expected
    assert expected != probe_by_layer(subject, train, test)


def test_every_image_passes_once(subject: Subject, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    features = subject.features

    def counted(images: Tensor, taps: Taps) -> Features:
        passed.append(len(images))
        return features(images, taps)

    monkeypatch.setattr(subject, "features", counted)
    probe_by_layer(subject, *datasets(subject, folders))
    assert passed == [30, 64, 20]


def test_unreadable_images_are_left_out(subject: Subject, folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, broken = make_folder(tmp_path / "whole", each=9), make_folder(tmp_path / "broken", each=9)
    (whole / "bee" / "3.jpg").unlink()
    (broken / "bee" / "3.jpg").write_bytes(b"no image")
    curves = [probe_by_layer(subject, *datasets(subject, (folder, folders[1]))) for folder in (whole, broken)]
    assert curves[0] == curves[1]


def test_what_cannot_be_probed(subject: Subject, folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = datasets(subject, folders)
    unlabelled = views_for([subject], open_source([str(folders[0] / "ant")], labelled=False))
    with pytest.raises(DataError, match="images without labels"):
        probe_by_layer(subject, unlabelled, test)
    single = views_for([subject], train.source, np.arange(10))
    with pytest.raises(DataError, match="at least 2 classes, got 1"):
        probe_by_layer(subject, single, test)
    (tmp_path / "bad" / "ant").mkdir(parents=True)
    (tmp_path / "bad" / "ant" / "0.jpg").write_bytes(b"no image")
    unreadable = views_for(
        [subject], open_source([str(tmp_path / "bad")], labelled=True, classes=["ant", "bee", "cat"])
    )
    with pytest.raises(DataError, match="no test images: none of the images could be read"):
        probe_by_layer(subject, train, unreadable)


@pytest.mark.parametrize("name", ["hiera_micro", "itpn_micro"])
def test_every_layer_of_a_hierarchical_encoder_is_probed(name: str, folders: tuple[Path, Path]) -> None:
    torch.manual_seed(0)
    subject = open_subject(micro(name))
    train, test = datasets(subject, folders)
    curve = probe_by_layer(subject, train, test)
    assert len(curve) == 7
    for layer in (1, 6):
        taps = Taps(normed=(layer,), tokens=False)
        fitted, judged = (probe_features(subject, each, taps, layer) for each in (train, test))
        assert curve[layer] == logistic_probe(fitted, judged)["top1"]


def probe_features(subject: Subject, dataset: ImageDataset, taps: Taps, layer: int) -> tuple[Tensor, Tensor]:
    (batch,) = evaluation_batches(dataset, batch=1000)
    assert batch.labels is not None
    return subject.features(batch.views[subject.view], taps).normed[layer].mean(dim=1), batch.labels
