"""What all families share."""

import pytest
import torch

from mimlet.errors import ConfigError
from mimlet.models.features import Taps
from tests.families import micro


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("hivit_micro", {1: 1, 2: 2, 4: 6}),
        ("fast_itpn_micro", {1: 1, 2: 2, 4: 6}),
        ("hiera_micro", {1: 1, 2: 2, 4: 6}),
    ],
)
def test_layout_says_where_tokens_stand(name: str, ends: dict[int, int]) -> None:
    """The maps of stages (by stride in px) are the tokens of their last blocks in raster order."""
    encoder = micro(name)
    taps = Taps(stages=tuple(ends), hidden=tuple(ends.values()), tokens=False)
    features = encoder(torch.randn(2, 3, 32, 32), taps=taps)
    for stride, block in ends.items():
        grid, order = encoder.layout(block)
        assert grid == (32 // stride, 32 // stride)
        assert torch.equal(features.hidden[block][:, order].mT.unflatten(2, grid), features.stages[stride])


def test_layout_of_a_plain_vit() -> None:
    grid, order = micro("vit_nano").layout(2)
    assert (grid, order.tolist()) == ((8, 8), list(range(64)))


def test_blocks_that_attend() -> None:
    encoder = micro("hiera_micro", q_pool=3)
    assert (encoder.attending_block(), encoder.attending_block(4)) == (5, 4)
    with pytest.raises(ConfigError, match="no block 7: this encoder has blocks 1 to 6"):
        encoder.attending_block(7)
    with pytest.raises(ConfigError, match="block 6 does not attend to the whole image; in Hiera the blocks 4, 5 do"):
        encoder.attending_block(6)
    with pytest.raises(
        ConfigError, match="with windows or migration no block of this encoder attends to the whole image"
    ):
        micro("hivit_micro", window=4).attending_block()


def test_attention_of_a_block_in_raster_order() -> None:
    """`Features.attended` with a layout: shares of four tokens in each of four units, the units innermost."""
    encoder = micro("hiera_micro", image_size=16)
    features = encoder(torch.randn(1, 3, 16, 16), taps=Taps(attention=(6,), tokens=False))
    shares = features.attention[6].softmax(-1)[:, :, 5].unflatten(2, (2, 2, 2, 2)).permute(0, 1, 4, 2, 5, 3)
    torch.testing.assert_close(features.attended(6, 5, encoder.layout(6)), shares.reshape(1, 8, 4, 4))
