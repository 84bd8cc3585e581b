from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models.encoder import as_map, as_units
from mimlet.models.features import Taps
from mimlet.models.hivit import HiViT
from mimlet.models.pyramid import LevelsEmbed, PatchSplit, Pyramid, SpreadConv, StagesEmbed
from mimlet.models.shapes import HiViTShape
from tests.shared import Golden, golden


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """U1, U2, U3 of 2 images with 3 patches, C = 16."""
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 3, s, s, c, generator=g) for s, c in ((4, 4), (2, 8), (1, 16)))  # type: ignore[return-value]


def as_image(x: Tensor) -> Tensor:
    """[B,n,s,s,C] -> images [B n,C,s,s]."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def as_patches(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).unflatten(0, (2, 3))


def block(part: Any, x: Tensor) -> Tensor:
    """An MLP block of the pyramid, as a formula."""
    y = F.layer_norm(x, x.shape[-1:], part.norm2.weight, part.norm2.bias, 1e-6)
    hidden = F.gelu(F.linear(y, part.mlp.fc1.weight.flatten(1), part.mlp.fc1.bias))
    return x + F.linear(hidden, part.mlp.fc2.weight.flatten(1), part.mlp.fc2.bias)


@torch.no_grad()
def test_a_spreading_convolution_is_a_transposed_one() -> None:
    spread, x = randomised(SpreadConv(8, 5)), inputs()[1]
    assert isinstance(spread, SpreadConv)
    expected = F.conv_transpose2d(as_image(x), spread.weight, spread.bias, stride=2)
    out = spread(x).unflatten(-1, (2, 2, 5)).permute(0, 1, 2, 4, 3, 5, 6).reshape(2, 3, 4, 4, 5)
    assert_close(out, as_patches(expected))


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
def test_a_split_by_hand(fast: bool) -> None:
    split, x = randomised(PatchSplit(8, 5, fast)), inputs()[1]
    normed = F.layer_norm(x, (8,), split.norm.weight, split.norm.bias, 1e-6)
    out = split(x)
    assert out.shape == (2, 3, 4, 4, 5)
    for row in range(4):
        for column in range(4):
            weight = split.reduction.weight
            if fast:
                mine, bias = weight[:, :, row % 2, column % 2].T, split.reduction.bias
            else:
                mine, bias = weight.view(2, 2, 5, 8)[row % 2, column % 2], None
            assert_close(out[:, :, row, column], F.linear(normed[:, :, row // 2, column // 2], mine, bias))


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("width", [12, 16])
def test_the_pyramid_is_its_recursion(fast: bool, width: int) -> None:
    pyramid = Pyramid()
    pyramid.add_pyramid(16, width, 2, 20, fast)
    randomised(pyramid)
    p: Any = pyramid
    u1, u2, u3 = inputs()

    def align(part: Any, x: Tensor) -> Tensor:
        return F.linear(x, part.weight.flatten(1), part.bias)

    t3 = u3 if width == 16 else align(p.align_dim_16tofpn, u3)
    t2 = p.split_16to8(u3) + align(p.align_dim_16to8, u2)
    for each in p.block_16to8:
        t2 = block(each, t2)
    t1 = p.split_8to4(t2) + align(p.align_dim_8to4, u1)
    for each in p.block_8to4:
        t1 = block(each, t1)
    expected = [block(part, t) for part, t in zip(p.fpn_modules, (t3, t2, t1), strict=True)]
    for finest in (1, 2, 3):
        levels = pyramid.pyramid(u1, u2, u3, finest)
        assert len(levels) == finest
        for ours, theirs in zip(levels, expected, strict=False):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (p.align_dim_16to8.bias is not None) == (p.align_dim_8to4.bias is not None) == fast
    assert (width == 16) == isinstance(p.align_dim_16tofpn, nn.Identity)


def level_inputs() -> dict[int, Tensor]:
    g = torch.Generator().manual_seed(2)
    return {stride: torch.randn(2, 5, (16 // stride) ** 2, 6, generator=g) for stride in (4, 8, 16)}


@torch.no_grad()
def test_levels_are_embedded_by_hand() -> None:
    levels = level_inputs()
    embed: Any = randomised(LevelsEmbed({4: 6, 8: 6, 16: 6}, 32))
    out = torch.zeros(2, 5, 32)
    for i, (stride, tokens) in enumerate(((16, 1), (8, 4), (4, 16))):
        norm, linear = embed[i]
        assert linear.weight.shape == (32 // tokens, 6)
        for t in range(tokens):
            part = slice(t * 32 // tokens, (t + 1) * 32 // tokens)
            out[..., part] += linear(norm(levels[stride][:, :, t]))
    assert_close(embed(levels), out)


@torch.no_grad()
def test_levels_of_fast_itpn_are_embedded_by_convolutions() -> None:
    levels = level_inputs()
    embed: Any = randomised(LevelsEmbed({4: 6, 8: 6, 16: 6}, 32, fast=True))
    out = torch.zeros(2 * 5, 32)
    for i, stride in enumerate((16, 8, 4)):
        norm, conv = embed[i]
        side = 16 // stride
        image = norm(levels[stride]).view(10, side, side, 6).permute(0, 3, 1, 2)
        out += F.conv2d(image, conv.weight, conv.bias).flatten(1)
    assert_close(embed(levels), out.view(2, 5, 32), rtol=1e-4, atol=1e-5)


def decoder_weights(oracle: Golden) -> dict[str, Tensor]:
    name = "decoder_embed."
    return {key.removeprefix(name): value for key, value in oracle.weights.items() if key.startswith(name)}


@torch.no_grad()
def test_the_embedding_of_fast_itpn_equals_the_fork() -> None:
    oracle = golden("fast_itpn_pretrain")
    embed = LevelsEmbed({4: 24, 8: 24, 16: 24}, 32, fast=True)
    embed.load_state_dict(decoder_weights(oracle))
    levels = {stride: as_units(oracle.io[f"p{stride}"], 16 // stride) for stride in (4, 8, 16)}
    w, hidden = oracle.weights, oracle.io["bool_masked_pos"].bool()
    x = F.layer_norm(embed(levels), (32,), w["norm.weight"], w["norm.bias"], 1e-6)
    assert_close(
        F.linear(x, w["lm_head.weight"], w["lm_head.bias"])[hidden], oracle.io["pred_masked"], **oracle.tolerance
    )


@torch.no_grad()
def test_the_embedding_of_itpn_equals_the_official_code() -> None:
    oracle = golden("itpn_mfm_clip")
    embed = LevelsEmbed({4: 16, 8: 16, 16: 16}, 32)
    embed.load_state_dict(decoder_weights(oracle))
    x = embed({stride: oracle.io[f"v{stride}"].flatten(2, 3) for stride in (4, 8, 16)})
    w = oracle.weights
    x = F.layer_norm(x, (32,), w["norm.weight"], w["norm.bias"], 1e-6)
    assert_close(F.linear(x, w["lm_head.weight"], w["lm_head.bias"]), oracle.io["pred"], **oracle.tolerance)


@torch.no_grad()
def test_stages_are_embedded_together() -> None:
    g = torch.Generator().manual_seed(3)
    stages = {s: torch.randn(2, 5, (16 // s) ** 2, s, generator=g) for s in (4, 8, 16)}
    embed: Any = randomised(StagesEmbed({4: 4, 8: 8, 16: 16}, 10))
    joined = torch.cat([stages[4].flatten(2), stages[8].flatten(2), stages[16].flatten(2)], dim=-1)
    assert joined.shape[-1] == 7 * 16
    assert_close(embed(stages), embed.embed(embed.norm(joined)))


def test_widths_that_the_finest_level_cannot_share_are_told() -> None:
    with pytest.raises(ConfigError, match=r"width of 40 cannot be shared by the 16 tokens .* choose a multiple of 16"):
        LevelsEmbed({4: 6, 8: 6, 16: 6}, 40)


def test_maps_and_patches_are_one_thing() -> None:
    tokens = torch.arange(2.0 * 6 * 4 * 3).view(2, 6, 4, 3)
    image = as_map(tokens, (2, 3), 2)
    assert image.shape == (2, 3, 4, 6)
    # patch 4 of the second row, its token at row 1, column 0
    assert torch.equal(image[:, :, 3, 2], tokens[:, 4, 2])
    assert torch.equal(as_units(image, 2), tokens)


@torch.no_grad()
@pytest.mark.parametrize("form", ["hivit", "fast"])
def test_levels_of_dropped_and_of_filled_patches_stand_alike(form: Any) -> None:
    """With all patches visible, dropping none gives the levels of the whole image, patch by patch."""
    shape = HiViTShape(16, 4, 16, (1, 1, 1), 2, form=form, pyramid_dim=8, pyramid_depth=1, pyramid_hidden=16)
    encoder, images = randomised(HiViT(shape)).eval(), torch.randn(2, 3, 16, 16)
    taps = Taps(levels=(1, 2, 4), tokens=False)
    whole = encoder(images, taps=taps).levels
    mask = Mask.from_order(torch.arange(16).expand(2, 16), 16)
    dropped = encoder(images, mask, taps=taps).levels
    for stride in (1, 2, 4):
        assert_close(dropped[stride], as_units(whole[stride], 4 // stride), rtol=1e-4, atol=1e-4)
