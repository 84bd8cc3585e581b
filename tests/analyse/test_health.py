import pytest
import torch

from mimlet.analyse.health import Health


def health(patches: torch.Tensor, parts: int = 1) -> Health:
    found = Health(patches.shape[-1])
    for part in patches.chunk(parts):
        found.update(part)
    return found


def test_effective_rank_equals_that_of_the_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = 5 + torch.randn(60, 4, 6, generator=generator) * torch.tensor([4.0, 2, 1, 1, 0.1, 0])
    pooled = patches.double().mean(1)
    share = torch.linalg.svdvals(pooled - pooled.mean(0))
    share = share / share.sum()
    expected = torch.special.entr(share).sum().exp().item()
    assert health(patches, 7).effective_rank == pytest.approx(expected, rel=1e-4)


def test_isotropic_features_are_healthy_and_equal_images_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    isotropic = health(torch.randn(4000, 1, 16, generator=generator).expand(-1, 3, -1))
    assert isotropic.effective_rank == pytest.approx(16, rel=0.01)
    assert isotropic.spread == pytest.approx(1, rel=0.02)
    assert isotropic.similarity == pytest.approx(1, abs=1e-6)  # one token three times
    same = health(torch.ones(10, 2, 16))
    assert same.spread == pytest.approx(0, abs=1e-6)
    assert same.effective_rank == pytest.approx(1, abs=0.1)


def test_features_on_a_line_have_rank_one() -> None:
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert health(torch.linspace(-1, 1, 50)[:, None, None] * direction.expand(1, 2, 8)).effective_rank < 1.01


def test_similarity_is_the_mean_cosine_of_different_patches() -> None:
    patches = torch.tensor([[[1.0, 0], [0, 2], [3, 0]], [[1, 1], [2, 2], [0, 3]]])
    expected = ((0 + 1 + 0) / 3 + (1 + 2 * 0.5**0.5) / 3) / 2
    assert health(patches, 2).similarity == pytest.approx(expected)
