import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimlet.analyse.cka import MinibatchCKA, centred_gram, hsic1
from mimlet.errors import DataError
from tests.shared import golden


def cka(*batches: list[Tensor]) -> Tensor:
    accumulated = MinibatchCKA()
    for batch in batches:
        accumulated.update([centred_gram(features) for features in batch])
    return accumulated.compute()


def test_equals_the_official_code() -> None:
    oracle = golden("cka")
    a, b = list(oracle.io["features_a"]), list(oracle.io["features_b"])
    sizes = oracle.io["batch_sizes"].tolist()
    accumulated = MinibatchCKA()
    for parts in zip(*(each.split(sizes) for each in [*a, *b]), strict=True):
        accumulated.update([centred_gram(part) for part in parts])
    found, hsic, n = accumulated.compute().float(), accumulated.hsic.float(), len(a)
    torch.testing.assert_close(found[:n, n:], oracle.io["cka_a_b"], **oracle.tolerance)
    torch.testing.assert_close(found[:n, :n], oracle.io["cka_a_a"], **oracle.tolerance)
    torch.testing.assert_close(found[n:, n:], oracle.io["cka_b_b"], **oracle.tolerance)
    whole = cka([*a, *b])[:n, n:].float()
    torch.testing.assert_close(whole, oracle.io["cka_a_b_one_batch"], **oracle.tolerance)
    own = torch.stack(
        [hsic.diagonal()[:n, None].expand(n, len(b)), hsic[:n, n:], hsic.diagonal()[n:].expand(n, len(b))], dim=-1
    )
    torch.testing.assert_close(own, oracle.io["hsic_mean_KK_KL_LL"], **oracle.tolerance)


def direct(x: Tensor, y: Tensor) -> float:
    """HSIC1 as it is written in the paper, in float64."""
    n = len(x)
    K, L = (each.double() @ each.double().T for each in (x, y))
    K.fill_diagonal_(0)
    L.fill_diagonal_(0)
    one = torch.ones(n, dtype=torch.float64)
    trace = (K @ L).trace()
    sums = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return float((trace + sums - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3)))


def test_equals_the_formula_on_all_images_at_once() -> None:
    torch.manual_seed(0)
    x, y = 3 + torch.randn(20, 7), torch.randn(20, 4, 5)
    expected = direct(x, y.flatten(1)) / (direct(x, x) * direct(y.flatten(1), y.flatten(1))) ** 0.5
    assert cka([x, y])[0, 1].item() == pytest.approx(expected, rel=1e-5)


def test_a_large_common_offset_costs_no_digits() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 50), torch.randn(16, 30)
    torch.testing.assert_close(cka([x + 1000, y]), cka([x, y]), atol=1e-4, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(6, 24), scale=st.floats(0.01, 100))
def test_is_one_against_itself_and_blind_to_rotation_and_scale(seed: int, n: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 9, generator=generator), torch.randn(n, 5, generator=generator)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=generator))[0]
    found = cka([x, scale * x @ rotation, y])
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found[0, 1].item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(found[0, 2], found[1, 2], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found, found.T)


def test_centred_rows_sum_to_zero() -> None:
    gram = centred_gram(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(gram.sum(dim=0), torch.zeros(9, dtype=torch.float64), atol=1e-6, rtol=0)
    assert hsic1(gram[None]).item() > 0


def test_independent_features_are_not_alike_and_constant_ones_have_no_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator)] for _ in range(20)]
    assert abs(cka(*batches)[0, 1].item()) < 0.02
    assert cka([torch.ones(8, 3), torch.randn(8, 3, generator=generator)])[0].isnan().all()


def test_three_images_are_too_few() -> None:
    with pytest.raises(DataError, match="at least 4 images in a minibatch, got 3"):
        cka([torch.randn(3, 2)])
