import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mimlet.analyse import subject as subject_module
from mimlet.analyse.analysis import Measures, choose_images, measure, views_for
from mimlet.analyse.attention import attention_statistics, patch_distances
from mimlet.analyse.cka import MinibatchCKA, centred_gram
from mimlet.analyse.health import Health
from mimlet.analyse.subject import Subject
from mimlet.data.source import open_source
from mimlet.errors import ConfigError, DataError
from mimlet.models.features import Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from tests.data.images import make_folder
from tests.families import micro


def vit(size: int = 16, dim: int = 24, depth: int = 2, heads: int = 3, patch: int = 4, seed: int = 0) -> ViT:
    torch.manual_seed(seed)
    return ViT(ViTShape(size, patch, dim, depth, heads))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", each=5)  # 15 images


@pytest.fixture
def subjects() -> list[Subject]:
    """Different depth, width, head count, input size and grid."""
    return [Subject(vit(), "a", "a"), Subject(vit(32, 36, 3, 2, 8, seed=1), "b", "b")]


def normed(subject: Subject, images: Tensor) -> list[Tensor]:
    features = subject.features(images, Taps(normed=tuple(range(subject.depth + 1)), tokens=False))
    return [tokens[:, 1:] for tokens in features.normed.values()]


def test_streamed_measures_equal_direct_ones(
    folder: Path, subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks within a minibatch and minibatches change nothing."""
    monkeypatch.setattr(subject_module, "MAPS", 2 * 3 * 17**2 * 2)  # two images at a time of the first
    dataset = views_for(subjects, open_source([str(folder)], labelled=False))
    found, similarities = measure(subjects, dataset, 5, Measures())
    images = {s.view: torch.stack([dataset[0, i].views[s.view] for i in range(15)]) for s in subjects}
    assert {view.shape for view in images.values()} == {(15, 3, 16, 16), (15, 3, 32, 32)}

    cka = MinibatchCKA()
    for start in (0, 5, 10):
        part = [layer for s in subjects for layer in normed(s, images[s.view][start : start + 5])]
        cka.update([centred_gram(layer) for layer in part])
    whole = cka.compute()
    places = [(s.a, s.b) for s in similarities]
    assert places == [(0, 0), (0, 1), (1, 1)]
    for similarity, expected in zip(similarities, (whole[:3, :3], whole[:3, 3:], whole[3:, 3:]), strict=True):
        torch.testing.assert_close(torch.tensor(similarity.cka, dtype=torch.float64), expected, atol=1e-5, rtol=1e-4)

    for subject, model in zip(subjects, found, strict=True):
        pixels = images[subject.view]
        logits = subject.features(pixels, Taps(attention=(1, 2), tokens=False)).attention
        distance, entropy = attention_statistics(logits[2], subject.grid, 1)
        assert model.distance is not None
        assert model.entropy is not None
        assert (len(model.distance), len(model.distance[0])) == (subject.depth, subject.heads)
        torch.testing.assert_close(torch.tensor(model.distance[1]).double(), distance.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(model.entropy[1]).double(), entropy.mean(0), atol=1e-5, rtol=1e-5)
        last = Health(subject.dim)
        last.update(normed(subject, pixels)[-1])
        assert model.effective_rank[-1] == pytest.approx(last.effective_rank, rel=1e-4)
        assert model.spread[-1] == pytest.approx(last.spread, rel=1e-4)
        assert model.similarity[-1] == pytest.approx(last.similarity, rel=1e-4)
        assert len(model.effective_rank) == subject.depth + 1
        assert model.notes == []


def test_only_what_is_asked_for_is_measured(folder: Path, subjects: list[Subject]) -> None:
    dataset = views_for(subjects[:1], open_source([str(folder)], labelled=False))
    (model,), similarities = measure(subjects[:1], dataset, 15, Measures(cka=False, attention=False))
    assert similarities == []
    assert model.distance is None
    assert model.entropy is None
    assert len(model.similarity) == 3
    (model,), similarities = measure(subjects[:1], dataset, 15, Measures(health=False, attention=False))
    assert model.similarity == model.effective_rank == model.spread == []
    assert np.allclose(np.diag(similarities[0].cka), 1)


def test_images_are_a_seeded_sample_or_the_first_files_in_equal_minibatches() -> None:
    numbers, batch = choose_images(5000, 1152, 128, "random", 0)
    assert (len(numbers), batch, len(set(numbers.tolist()))) == (1152, 128, 1152)
    assert numbers.tolist() != sorted(numbers.tolist())
    assert choose_images(5000, 1152, 128, "random", 0)[0].tolist() == numbers.tolist()
    assert choose_images(5000, 1152, 128, "random", 1)[0].tolist() != numbers.tolist()
    first, batch = choose_images(5000, 1152, 128, "folder", 0)
    assert first.tolist() == list(range(1152))
    assert [choose_images(n, 1152, 128, "folder", 0)[1] for n in (130, 128, 4)] == [65, 128, 4]


def test_too_few_images_and_impossible_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^3 images are too few: an analysis compares at least 4 with each other"):
        choose_images(3, 1152, 128, "random", 0)
    with pytest.raises(ConfigError, match=r"--batch is 2; CKA compares at least 4 images"):
        choose_images(100, 50, 2, "random", 0)
    folder = make_folder(tmp_path / "broken", classes=("ant",), each=6)
    for file in sorted(folder.rglob("*.jpg"))[:4]:
        file.write_bytes(b"no image")
    subject = Subject(vit(), "a", "a")
    with pytest.raises(DataError, match="no minibatch of the 6 images has 4 that can be read"):
        measure([subject], views_for([subject], open_source([str(folder)], labelled=False)), 6, Measures())


def test_hierarchical_encoders_are_measured_layer_by_layer(folder: Path) -> None:
    """Widths and grids differ between layers; only blocks that attend have attention, in the places of its tokens."""
    torch.manual_seed(0)
    pooled, unpooled = (micro("hiera_micro", q_pool=q_pool) for q_pool in (3, 2))
    subjects = [Subject(pooled, "a", "a"), Subject(unpooled, "b", "b"), Subject(micro("itpn_micro"), "c", "c")]
    dataset = views_for(subjects, open_source([str(folder)], labelled=False))
    found, similarities = measure(subjects, dataset, 5, Measures())
    images = torch.stack([dataset[0, i].views["32 px"] for i in range(15)])

    grids = [model.token_grids for model in found]
    assert grids[0] == [(32, 32), (16, 16), (8, 8), (8, 8), (8, 8), (4, 4)]
    assert grids[2] == [(32, 32), (16, 16), *[(8, 8)] * 4]
    assert [model.attending for model in found] == [[4, 5], [4, 5, 6], [3, 4, 5, 6]]
    assert [model.upper for model in found] == [[5], [5, 6], [5, 6]]
    assert [model.head_counts for model in found] == ["8", "4 to 8", "4"]
    assert found[0].notes == ["attention of the blocks 4, 5 only: the others do not attend to the whole image"]
    assert [(len(s.cka), len(s.cka[0])) for s in similarities] == [(7, 7)] * 6

    # Four tokens of each of 4 x 4 units, the units innermost; 4 px apart, half a patch of 8 px.
    logits = subjects[0].features(images, Taps(attention=(4,), tokens=False)).attention[4]
    index = torch.arange(64).view(2, 2, 4, 4).permute(2, 0, 3, 1).flatten()
    distance, entropy = attention_statistics(logits[:, :, index][..., index], (8, 8), 0)
    assert found[0].distance is not None
    assert found[0].entropy is not None
    torch.testing.assert_close(torch.tensor(found[0].distance[3]).double(), distance.mean(0) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(found[0].entropy[3]).double(), entropy.mean(0), atol=1e-5, rtol=1e-5)
    assert (found[0].distance[2], found[0].entropy[5]) == ([], [])
    assert found[0].uniform_distance(4) == pytest.approx(float(patch_distances((8, 8)).mean()) / 2)
    assert found[0].uniform_entropy(4) == pytest.approx(math.log(64))

    for subject, model in zip(subjects, found, strict=True):
        for layer in (0, 2, 6):
            tokens = subject.features(images, Taps(normed=(layer,), tokens=False)).normed[layer]
            health = Health(tokens.shape[-1])
            health.update(tokens)
            assert model.effective_rank[layer] == pytest.approx(health.effective_rank, rel=1e-3)
            assert model.similarity[layer] == pytest.approx(health.similarity, rel=1e-3)
