from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mimlet.config import Config, validate
from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, DataError
from mimlet.methods.base import Clock
from mimlet.models.features import Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights import encoder_state, save_weights
from mimlet.tasks.probe import LinearProbe, extract_features, knn_probe, logistic_probe, pooled
from tests.families import HIERARCHICAL, micro

CLOCK = Clock(0, 10, 10, 0)
SHAPE = ViTShape(image_size=16, patch=8, dim=24, depth=2, heads=4)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def labelled(count: int = 8, classes: int = 4) -> Batch:
    return Batch({"image": torch.randn(count, 3, 16, 16)}, torch.arange(count), labels=torch.arange(count) % classes)


def toy(count: int, classes: int, apart: float, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Class k is noise of deviation 1 around `apart` times the k-th axis."""
    labels = torch.arange(count) % classes
    return apart * torch.eye(classes, dim)[labels] + torch.randn(count, dim), labels


@pytest.mark.parametrize("probe", [logistic_probe, knn_probe])
def test_separable_features_are_told_apart(probe: object) -> None:
    assert callable(probe)
    assert probe(toy(200, 8, 40.0), toy(80, 8, 40.0)) == {"top1": 100.0, "top5": 100.0}


@pytest.mark.parametrize("probe", [logistic_probe, knn_probe])
def test_noise_is_guessed_at(probe: object) -> None:
    assert callable(probe)
    scores = probe(toy(200, 4, 0.0), toy(400, 4, 0.0))
    assert set(scores) == {"top1"}
    assert 15 < scores["top1"] < 35


def test_knn_weights_votes_by_similarity() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [-1.0, 0.0]])
    train = (bank, torch.tensor([0, 1, 1, 2]))
    query = (torch.tensor([[5.0, 0.0]]), torch.tensor([0]))
    # exp(1 / t) against 2 exp(0.6 / t): they balance at t = 0.4 / ln 2 = 0.577
    assert knn_probe(train, query, k=3, temperature=0.55) == {"top1": 100.0}
    assert knn_probe(train, query, k=3, temperature=0.6) == {"top1": 0.0}
    assert knn_probe(train, query, k=1, temperature=0.6) == {"top1": 100.0}
    assert knn_probe(train, query, k=100, temperature=0.55) == {"top1": 100.0}


def test_knn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = toy(120, 8, 2.0), toy(50, 8, 2.0)
    whole = knn_probe(train, test)
    monkeypatch.setattr("mimlet.tasks.probe.SIMILARITIES", 120 * 7)
    assert knn_probe(train, test) == whole
    assert 0 < whole["top1"] < 100


def test_classes_missing_from_training_are_never_right() -> None:
    features, labels = toy(80, 8, 40.0)
    train = (features[labels != 3], labels[labels != 3])
    assert logistic_probe(train, (features, labels)) == {"top1": 87.5, "top5": 87.5}
    assert knn_probe(train, (features, labels)) == {"top1": 87.5, "top5": 87.5}


def test_logistic_probe_chooses_its_penalty_on_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = toy(80, 4, 2.0, dim=60), toy(400, 4, 2.0, dim=60)
    chosen = logistic_probe(train, test)["top1"]
    monkeypatch.setattr("mimlet.tasks.probe.PENALTIES", (1e6,))
    assert chosen > logistic_probe(train, test)["top1"] + 3


def test_logistic_probe_with_one_image_per_class() -> None:
    assert logistic_probe(toy(4, 4, 40.0, dim=4), toy(40, 4, 40.0, dim=4)) == {"top1": 100.0}
    with pytest.raises(DataError, match="at least 2 classes, got 1"):
        logistic_probe(toy(4, 1, 0.0), toy(4, 1, 0.0))


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_extract_features(pool: str) -> None:
    encoder = ViT(SHAPE, drop_path=0.9).train()
    raw = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    parts = [
        Batch({"image": raw[rows]}, torch.arange(len(raw[rows])), labels=torch.arange(len(raw[rows])))
        for rows in (slice(0, 3), slice(3, 3), slice(3, 5))
    ]
    features, labels = extract_features(encoder, parts, "cpu", MEAN, STD, pool)  # type: ignore[arg-type]
    assert encoder.training
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert features.dtype == torch.float32
    images = (raw / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    tokens = encoder.eval()(images).latent
    assert_close(features, tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(1))
    with pytest.raises(DataError, match="no features: none of the images could be read"):
        extract_features(encoder, parts[1:2], "cpu", MEAN, STD, "mean")


def test_linear_probe_trains_its_head_and_leaves_the_encoder_alone() -> None:
    probe = LinearProbe(ViT(SHAPE, drop_path=0.5), 4)
    probe.train()
    before = {name: value.clone() for name, value in probe.encoder.state_dict().items()}
    batch = labelled()
    trained = [parameter for parameter in probe.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trained] == [(4, 24), (4,)]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    first = probe(batch, CLOCK)["classification"].item()
    for _ in range(50):
        optimizer.zero_grad()
        losses = probe(batch, CLOCK)
        losses["classification"].backward()
        optimizer.step()
    assert losses["classification"] < 0.5 * first
    assert losses["accuracy"] == 100
    assert all(parameter.grad is None for parameter in probe.encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in probe.encoder.state_dict().items())


def test_linear_probe_normalises_by_the_batch_in_training_and_by_running_statistics_in_prediction() -> None:
    probe = LinearProbe(ViT(SHAPE), 4)
    batch = labelled()
    features = pooled(probe.encoder, batch.images, "class")
    linear = probe.head[1]
    normalised = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    expected = torch.nn.functional.cross_entropy(linear(normalised), batch.labels)
    assert_close(probe(batch, CLOCK)["classification"], expected)
    # one step of the running average, momentum 0.1, from mean 0 and variance 1
    mean, variance = 0.1 * features.mean(0), 0.9 + 0.1 * features.var(0)
    assert_close(probe.predict(batch.images), linear((features - mean) / (variance + 1e-6).sqrt()).detach())
    assert probe.head.training
    assert linear.weight.std() < 0.02
    assert not linear.bias.any()


def config(weights: str = "encoder.safetensors", **method: object) -> Config:
    size = {"image_size": 16, "patch": 8, "dim": 24, "depth": 2, "heads": 4}
    values = {
        "encoder": {**size, "weights": weights},
        "method": {"name": "linear_probe", **method},
        "schedule": {"steps": 1},
    }
    return validate(values)


def test_linear_probe_from_a_configuration(tmp_path: Path) -> None:
    source, file = ViT(SHAPE), tmp_path / "encoder.safetensors"
    save_weights(file, encoder_state(source), {})
    settings = config(str(file), pool="mean")
    probe = LinearProbe.build(settings, classes=4)
    images = labelled().images
    assert torch.equal(pooled(probe.encoder, images, "mean"), source(images).patches.mean(1))
    assert not any(parameter.requires_grad for parameter in probe.encoder.parameters())
    assert probe.load_report is not None
    assert len(probe.load_report.loaded) == len(source.state_dict())
    assert probe.predict(images).shape == (8, 4)


@pytest.mark.parametrize(
    ("asked", "found", "error", "message"),
    [
        (5, 4, ConfigError, "method.classes is 5, but the data has 4 classes"),
        (0, 0, DataError, "at least 2 classes, the data has 0"),
        (0, 1, DataError, "at least 2 classes, the data has 1"),
    ],
)
def test_wrong_numbers_of_classes_are_refused(asked: int, found: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearProbe.build(config(classes=asked), classes=found)


def test_an_encoder_without_class_token_has_to_be_averaged() -> None:
    encoder = ViT(replace(SHAPE, class_token=False))
    with pytest.raises(ConfigError, match=r"this encoder \(a plain ViT\) has none; use pool 'mean'"):
        LinearProbe(encoder, 4)
    assert LinearProbe(encoder, 4, "mean").predict(labelled().images).shape == (8, 4)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_every_family_is_judged_by_its_last_block(name: str) -> None:
    """Also a Hiera, whose final tokens are a sum of stages for its decoder."""
    encoder, images = micro(name).eval(), torch.randn(4, 3, 32, 32)
    hidden = encoder(images, taps=Taps(hidden=(encoder.depth,), tokens=False)).hidden[encoder.depth]
    assert_close(pooled(encoder, images, "mean"), encoder.norm(hidden).mean(dim=1))
    batch = Batch({"image": images}, torch.arange(4), labels=torch.arange(4))
    task = LinearProbe(encoder, 4, "mean")
    task(batch, CLOCK)["classification"].backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert task.head[1].weight.grad is not None
    with pytest.raises(ConfigError, match=r"has none; use pool 'mean'"):
        LinearProbe(encoder, 4)
