import math

import pytest
import torch

from mimlet.analyse.attention import UPSTREAM_PATCH, attention_statistics, patch_distances
from tests.shared import golden


def test_equals_the_official_code() -> None:
    oracle = golden("attention_stats")
    expected = oracle.io["distance_matrix"]
    torch.testing.assert_close(UPSTREAM_PATCH * patch_distances((4, 4)), expected, **oracle.tolerance)
    for layer in range(2):
        means = []
        for logits in oracle.io[f"attention_logits.{layer}"].split(oracle.io["batch_sizes"].tolist()):
            distance, entropy = attention_statistics(logits, (4, 4), prefix=1)
            means.append((distance.mean(0), entropy.mean(0)))
        distance, entropy = (torch.stack(values).mean(0) for values in zip(*means, strict=True))
        torch.testing.assert_close(UPSTREAM_PATCH * distance, oracle.io["distance"][layer], **oracle.tolerance)
        torch.testing.assert_close(entropy, oracle.io["entropy"][layer], **oracle.tolerance)


def test_uniform_attention_has_the_mean_distance_and_the_largest_entropy() -> None:
    distance, entropy = attention_statistics(torch.zeros(2, 3, 7, 7), (2, 3), prefix=1)
    assert distance.shape == entropy.shape == (2, 3)
    assert distance[0, 0].item() == pytest.approx(patch_distances((2, 3)).mean().item())
    assert entropy[0, 0].item() == pytest.approx(math.log(6), abs=1e-4)


def test_attention_to_oneself_has_neither() -> None:
    logits = 100 * torch.eye(7)[None, None]
    distance, entropy = attention_statistics(logits, (2, 3), prefix=1)
    assert distance.item() == pytest.approx(0, abs=1e-5)
    assert entropy.item() == pytest.approx(0, abs=1e-5)


def test_the_prefix_does_not_count() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 6, 6)
    changed = logits.clone()
    changed[..., :2] += 50
    changed[..., :2, :] -= 50
    for a, b in zip(attention_statistics(logits, (2, 2), 2), attention_statistics(changed, (2, 2), 2), strict=True):
        torch.testing.assert_close(a, b)


def test_distances_of_a_grid_that_is_not_square() -> None:
    expected = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(patch_distances((1, 3)), expected)
    assert patch_distances((3, 5))[0, 14].item() == pytest.approx(math.hypot(2, 4))


def test_tokens_in_another_order_are_as_far_apart() -> None:
    """`order` says which token is at each place of the raster."""
    order, logits = (
        torch.tensor([4, 2, 0, 1, 5, 3]),
        torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),
    )
    raster = logits[:, :, order][..., order]
    for a, b in zip(
        attention_statistics(raster, (2, 3), 0), attention_statistics(logits, (2, 3), 0, order), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(attention_statistics(raster, (2, 3), 0)[0], attention_statistics(logits, (2, 3), 0)[0])
