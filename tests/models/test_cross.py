import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mimlet.data.masks import Mask
from mimlet.models.cross import CrossAttention, CrossBlock, CrossDecoder, PatchPixels


def randomise(module: nn.Module) -> None:
    """Biases and norms start at 0 and 1, where mistakes do not show."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def make(depth: int, prefix: int = 1) -> CrossDecoder:
    torch.manual_seed(0)
    decoder = CrossDecoder(20, (3, 4), prefix, PatchPixels(12, 2), 12, depth, 3)
    randomise(decoder)
    return decoder


def test_cross_attention_by_hand() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(12, 20, 3)
    randomise(attention)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 20)
    q = (x @ attention.q.weight.T + attention.q_bias).view(2, 5, 3, 4)
    k = (context @ attention.kv.weight[:12].T).view(2, 7, 3, 4)
    v = (context @ attention.kv.weight[12:].T + attention.v_bias).view(2, 7, 3, 4)
    shares = torch.einsum("bqhd,bkhd->bhqk", q / 2, k).softmax(dim=-1)
    heads = torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2)
    assert_close(attention(x, context), heads @ attention.proj.weight.T + attention.proj.bias)


@pytest.mark.parametrize("start", [3, 6])
def test_the_end_of_a_block_equals_the_end_of_the_whole(start: int) -> None:
    torch.manual_seed(0)
    block = CrossBlock(12, 20, 3)
    randomise(block)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 5, 20)
    assert_close(block(x, context, start), block(x, context)[:, start:])


def test_pixels_equal_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    head = PatchPixels(12, 2)
    x = torch.randn(2, 6, 12)
    images = head.proj(x.transpose(1, 2).reshape(2, 12, 2, 3))
    assert_close(head(x), images.view(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 12))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_hidden_patches_alone_equal_those_of_the_whole(depth: int, prefix: int) -> None:
    decoder, mask = make(depth, prefix), Mask.from_noise(torch.rand(2, 12), 0.75)
    latent, context = torch.randn(2, prefix + 3, 20), torch.randn(2, prefix + 3, 20)
    whole = decoder(latent, context, mask)
    hidden = decoder(latent, context, mask, hidden_only=True)
    assert whole.shape == (2, 12, 12)
    assert_close(hidden, whole.gather(1, mask.ids_hidden[..., None].expand_as(hidden)))


def test_the_order_of_patches_does_not_matter() -> None:
    decoder, order = make(1), torch.rand(2, 12).argsort(dim=1)
    latent, context = torch.randn(2, 4, 20), torch.randn(2, 4, 20)
    other = torch.cat([order[:, [2, 0, 1]], order[:, 3:].flip(1)], dim=1)
    moved = [0, 3, 1, 2]
    assert_close(
        decoder(latent[:, moved], context[:, moved], Mask.from_order(other, 3)),
        decoder(latent, context, Mask.from_order(order, 3)),
    )
