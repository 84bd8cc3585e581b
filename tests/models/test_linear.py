import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mimlet.models import linear as module
from mimlet.models.linear import Linear, linear, linear_gelu, onednn_linear

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch is built without oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("out", [8, 20])
@pytest.mark.parametrize("with_bias", [True, False])
def test_onednn_equals_torch_in_value_and_gradients(shape: tuple[int, ...], out: int, with_bias: bool) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(out, 12, requires_grad=True)
    bias = torch.randn(out, requires_grad=True) if with_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    ours, theirs = onednn_linear(x, weight, bias), F.linear(x, weight, bias)
    assert_close(ours, theirs)
    direction = torch.randn_like(theirs)
    gradients = torch.autograd.grad(ours, inputs, direction)
    for got, expected in zip(gradients, torch.autograd.grad(theirs, inputs, direction), strict=True):
        assert_close(got, expected)
        assert got.is_contiguous()


@needs_onednn
def test_frozen_weights_and_strided_inputs() -> None:
    x = torch.randn(4, 6, 10, requires_grad=True)
    weight = torch.randn(5, 10)
    part = x[:, 2:]
    (gradient,) = torch.autograd.grad(onednn_linear(part, weight).sum(), x)
    (expected,) = torch.autograd.grad(F.linear(part, weight).sum(), x)
    assert_close(gradient, expected)


@needs_onednn
@pytest.mark.parametrize("kind", ["slice of wider rows", "expanded"])
def test_gradients_of_any_layout(kind: str) -> None:
    x, weight, bias = torch.randn(6, 10), torch.randn(5, 10, requires_grad=True), torch.randn(5, requires_grad=True)
    incoming = torch.randn(6, 15)[:, 5:10] if kind != "expanded" else torch.randn(1, 5).expand(6, 5)
    got = torch.autograd.grad(onednn_linear(x, weight, bias), (weight, bias), incoming)
    assert_close(got, torch.autograd.grad(F.linear(x, weight, bias), (weight, bias), incoming))


def test_layer_is_torchs_where_the_other_kernel_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(6, 4), torch.randn(3, 6)
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "onednn_linear", lambda *_: pytest.fail("not in float64"))
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
    monkeypatch.setattr(module, "onednn_linear", lambda *_: pytest.fail("not under autocast"))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@needs_onednn
@pytest.mark.parametrize("gelu", [False, True])
def test_frozen_bf16_weights_take_the_other_kernel_only_without_gradient(
    gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias, run = torch.randn(8, 12).bfloat16(), torch.randn(8).bfloat16(), linear_gelu if gelu else linear
    x = torch.randn(2, 5, 12)
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(x, weight, bias)
        monkeypatch.setattr(F, "linear", lambda *_: pytest.fail("the slower kernel"))
        with torch.no_grad():
            got = run(x, weight, bias)
    assert got.dtype == torch.bfloat16
    assert_close(got, expected, rtol=0.01, atol=0.01)


def test_a_pytorch_without_the_kernel_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise TypeError("another signature")

    monkeypatch.setattr(module, "_product", missing)
    module.onednn_is_faster.cache_clear()
    try:
        assert not module.onednn_is_faster()
    finally:
        module.onednn_is_faster.cache_clear()


def test_gelu_of_a_product_is_the_same_with_and_without_gradient() -> None:
    x, weight, bias = torch.randn(2, 300, 12), torch.randn(8, 12), torch.randn(8)
    expected = F.gelu(linear(x, weight, bias))
    assert torch.equal(linear_gelu(x, weight, bias), expected)
    with torch.no_grad():
        assert_close(linear_gelu(x, weight, bias), expected)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(linear_gelu(x, weight, bias).sum(), weight)
    (reference,) = torch.autograd.grad(F.gelu(linear(x, weight, bias)).sum(), weight)
    assert torch.equal(gradient, reference)
