import pytest
import torch
from torch import nn

from mimlet.errors import ConfigError
from mimlet.models.norm import GlobalBatchNorm


@pytest.mark.parametrize("affine", [True, False])
def test_alone_it_is_the_plain_one(affine: bool) -> None:
    """What several processes make of it: tests/train/test_contrastive.py."""
    torch.manual_seed(0)
    ours, plain = GlobalBatchNorm(5, affine=affine), nn.BatchNorm1d(5, affine=affine)
    for _ in range(2):
        x = torch.randn(7, 5) * 3 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        outs = ours(a), plain(b)
        assert torch.equal(*outs)
        for out in outs:
            out.pow(3).sum().backward()
        assert torch.equal(a.grad, b.grad)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    ours.eval(), plain.eval()
    assert torch.equal(ours(x[:1]), plain(x[:1]))


def test_precision() -> None:
    norm = GlobalBatchNorm(4)
    x = torch.randn(6, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    norm.double()
    assert norm(x.double()).dtype == torch.float64


def test_one_row_is_refused() -> None:
    norm = GlobalBatchNorm(4)
    with pytest.raises(ConfigError, match=r"a batch of 1 image; raise schedule\.batch to 2 or more"):
        norm(torch.randn(1, 4))
    assert norm.eval()(torch.randn(1, 4)).shape == (1, 4)
