import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.models.parts import (
    PART,
    Attention,
    Block,
    DropPath,
    TileConv,
    attend,
    attention_kernel,
    attention_logits,
    decomposed_bias,
    in_parts,
    init_mae,
    init_qkv_apart_,
    relative_index,
    resize_positions,
    sincos_positions,
    split_heads,
    take_patches,
)

CPU = torch.device("cpu")


def test_sincos_positions_by_hand() -> None:
    table = sincos_positions(8, 2, 3)
    assert table.shape == (6, 8)
    for row in range(2):
        for column in range(3):
            expected = []
            for position in (column, row):
                angles = [position * w for w in (1.0, 0.01)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert_close(table[row * 3 + column], torch.tensor(expected))


def test_resized_positions_keep_prefix_and_use_plain_bicubic() -> None:
    table = torch.randn(1, 1 + 12, 5)
    resized = resize_positions(table, (3, 4), (6, 2), 1)
    assert torch.equal(resized[:, :1], table[:, :1])
    for channel in range(5):
        image = table[0, 1:, channel].view(1, 1, 3, 4)
        expected = F.interpolate(image, (6, 2), mode="bicubic", align_corners=False)
        assert_close(resized[0, 1:, channel].view(6, 2), expected[0, 0])
    assert resize_positions(table, (3, 4), (3, 4), 1) is table
    assert resize_positions(table.half(), (3, 4), (6, 2), 1).dtype == torch.float16


@pytest.mark.parametrize("new", [(4, 4), (8, 2)])
def test_positions_resized_with_an_offset_are_read_closer_together(new: tuple[int, int]) -> None:
    """Place i of the new grid is place (i + 1/2) old / (new + 0.1) - 1/2 of the old, at the same grid, too."""
    table = torch.randn(1, 16, 3)
    y, x = ((torch.arange(n) + 0.5) * 4 / (n + 0.1) - 0.5 for n in new)
    grid = torch.stack(torch.meshgrid((2 * y + 1) / 4 - 1, (2 * x + 1) / 4 - 1, indexing="ij")[::-1], dim=-1)
    image = table.mT.view(1, 3, 4, 4)
    read = F.grid_sample(image, grid[None], mode="bicubic", padding_mode="border", align_corners=False)
    resized = resize_positions(table, (4, 4), new, 0, offset=0.1)
    assert_close(resized, read.flatten(2).mT, rtol=1e-4, atol=1e-5)
    assert resize_positions(table, (4, 4), (4, 4), 0) is table


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5)])
@pytest.mark.parametrize("dropped", [False, True])
def test_decomposed_bias_by_brute_force(rows: int, columns: int, dropped: bool) -> None:
    tables = [torch.randn(5, 4), torch.randn(5, 4)]  # of a 3 x 3 grid
    ids = torch.stack([torch.randperm(rows * columns)[:4] for _ in range(2)]) if dropped else None
    q = torch.randn(2, 3, 4 if dropped else rows * columns, 4)
    bias = decomposed_bias(q, *tables, (rows, columns), ids)
    places = torch.arange(rows * columns).expand(2, -1) if ids is None else ids
    sized = [
        F.interpolate(t.T[None], 2 * n - 1, mode="linear")[0].T for t, n in zip(tables, (rows, columns), strict=True)
    ]
    for image, mine in enumerate(places.tolist()):
        for i, a in enumerate(mine):
            for j, b in enumerate(mine):
                down, right = a // columns - b // columns, a % columns - b % columns
                far = sized[0][down + rows - 1] + sized[1][right + columns - 1]
                assert_close(bias[image, :, i, j], q[image, :, i] @ far)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_convolution_of_tiles_is_a_convolution(side: int) -> None:
    conv, x = TileConv(5, 3, side), torch.randn(2, 3, 8, 4, 5)
    expected = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), conv.weight, conv.bias, stride=side)
    assert_close(conv(x).flatten(0, 1), expected.permute(0, 2, 3, 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, 1, 2]))
def test_relative_index_by_brute_force(rows: int, columns: int, prefix: int) -> None:
    index = relative_index(rows, columns, prefix)
    entries = (2 * rows - 1) * (2 * columns - 1)
    places = [(y, x) for y in range(rows) for x in range(columns)]
    for q, (qy, qx) in enumerate(places):
        for k, (ky, kx) in enumerate(places):
            expected = (qy - ky + rows - 1) * (2 * columns - 1) + (qx - kx + columns - 1)
            assert index[q + prefix, k + prefix] == expected
            assert 0 <= expected < entries
    if prefix:
        assert (index[:prefix, :prefix] == entries + 2).all()
        assert (index[:prefix, prefix:] == entries).all()
        assert (index[prefix:, :prefix] == entries + 1).all()


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_attention_equals_explicit(width: int, biased: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, 7, width)
    bias = torch.randn(1, 3, 7, 7) if biased else None
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / width**0.5 + (0 if bias is None else bias)
    assert_close(attention_logits(q, k, bias), logits)
    expected = torch.einsum("bhqk,bhkd->bhqd", logits.exp() / logits.exp().sum(-1, keepdim=True), v)
    assert_close(attend(q, k, v, bias), expected, rtol=1e-4, atol=1e-5)
    assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), expected, rtol=1e-4, atol=1e-5)


def test_kernel_follows_device_and_type() -> None:
    assert attention_kernel(CPU, torch.float32, 50) == "explicit"
    assert attention_kernel(CPU, torch.float32, 197) == "fused"
    assert attention_kernel(CPU, torch.float64, 50) == "fused"
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_kernel(CPU, torch.float32, 50) == "fused"
    assert attention_kernel(CPU, torch.bfloat16, 197) == "explicit"
    assert attention_kernel(CPU, torch.bfloat16, 2048) == "fused"
    assert attention_kernel(torch.device("cuda"), torch.bfloat16, 50) == "fused"


@pytest.mark.parametrize("queries", [7, 3])
def test_explicit_attention_and_its_heads_have_the_gradients_of_autograd(queries: int) -> None:
    joined = torch.randn(2, 7, 3, 4, 8, requires_grad=True)

    def attended(split: Callable[[Tensor], tuple[Tensor, ...]], attend: Callable[..., Tensor]) -> Tensor:
        q, k, v = split(joined)
        return attend(q[:, :, :queries], k, v)

    ours = attended(split_heads, attend)
    theirs = attended(
        lambda x: x.permute(2, 0, 3, 1, 4).unbind(0), lambda q, k, v: attention_logits(q, k).softmax(-1) @ v
    )
    assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    gradients = [torch.autograd.grad(out, joined, direction)[0] for out in (ours, theirs)]
    assert_close(*gradients)


def test_heads_that_nobody_asked_for_a_gradient() -> None:
    joined = torch.randn(2, 5, 3, 2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(split_heads(joined)[1].sum(), joined)
    assert torch.equal(gradient, torch.tensor([0.0, 1, 0]).view(3, 1, 1).expand_as(joined))


@pytest.mark.parametrize("last", [False, True])
def test_patches_are_taken_in_the_order_of_their_numbers(last: bool) -> None:
    images, ids = torch.randn(2, 3, 8, 12), torch.tensor([[5, 0, 3], [1, 1, 4]])
    tiles = images.view(2, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [2,6,3,4,4]
    expected = torch.stack([tiles[i, ids[i]] for i in range(2)])
    if last:
        taken = take_patches(images.permute(0, 2, 3, 1).reshape(2, 1, 8, 3, 12), 4, ids)
        assert torch.equal(taken, expected.permute(0, 1, 3, 4, 2).flatten(2))
    else:
        assert torch.equal(take_patches(images.unflatten(-1, (-1, 4)), 4, ids), expected.flatten(2))


def test_attention_in_bf16_equals_fp32() -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 16)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), attend(q, k, v), rtol=0.05, atol=0.05)


def test_attention_without_key_bias() -> None:
    attention = Attention(12, 3, "qv", relative=(2, 2))
    assert {name for name, _ in attention.named_parameters()} == {
        "q_bias",
        "v_bias",
        "relative_position_bias_table",
        "qkv.weight",
        "proj.weight",
        "proj.bias",
    }
    nn.init.normal_(attention.q_bias)
    nn.init.normal_(attention.v_bias)
    x = torch.randn(2, 4, 12)
    q, k, v = attention.project(x)
    for part, bias, weight in zip(
        (q, k, v), (attention.q_bias, 0, attention.v_bias), attention.qkv.weight.chunk(3), strict=True
    ):
        assert_close(part.transpose(1, 2).flatten(2), x @ weight.T + bias)
    assert torch.equal(attention.project(x, 2)[1], k)
    assert len(attention.project(x, 2)) == 2


def test_block_adds_scaled_branches() -> None:
    block = Block(12, 3, 2.0, layer_scale=0.5)
    assert block.mlp.fc1.out_features == 24
    x = torch.randn(2, 4, 12)
    middle = x + 0.5 * block.attn(block.norm1(x))
    assert_close(block(x), middle + 0.5 * block.mlp(block.norm2(middle)))
    assert block.norm1.eps == block.norm2.eps == 1e-6


@pytest.mark.parametrize("bias", ["qkv", "qv"])
@pytest.mark.parametrize("start", [0, 3, 6])
def test_tail_equals_the_end_of_the_whole(start: int, bias: Literal["qkv", "qv"]) -> None:
    block = Block(12, 3, bias=bias, layer_scale=0.5)
    for name, parameter in block.attn.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    x = torch.randn(2, 7, 12)
    assert_close(block.tail(x, start), block(x)[:, start:])


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.75), torch.randn(400, 4, 3)
    assert drop.eval()(x) is x
    factors = drop.train()(x) / x
    assert set(factors.unique().tolist()) == {0.0, 4.0}
    assert (factors == factors[:, :1, :1]).all(), "one draw per image"
    assert 0.8 < factors.mean() < 1.2


def test_block_drops_its_branches_in_training_only() -> None:
    torch.manual_seed(0)
    block, plain = Block(12, 3, drop_path=0.5), Block(12, 3)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(64, 4, 12)
    changed = (block.train()(x) != x).flatten(1).any(1)
    assert 32 < changed.sum() < 64, "one image in four loses both branches"
    assert torch.equal(block.eval()(x), plain(x))


def test_mae_initialisation_of_one_module() -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(100, 300), nn.LayerNorm(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    init_mae(linear)
    init_mae(norm)
    bound = (6 / 400) ** 0.5
    assert 0.99 * bound < linear.weight.abs().max() <= bound
    assert_close(linear.weight.std(), torch.tensor(bound / 3**0.5), rtol=0.02, atol=0)
    assert not linear.bias.any()
    assert (norm.weight == 1).all()
    assert not norm.bias.any()


def test_moco_initialisation_draws_queries_keys_and_values_apart() -> None:
    torch.manual_seed(0)
    block = Block(100, 5)
    others = {name: value.clone() for name, value in block.state_dict().items() if name != "attn.qkv.weight"}
    init_qkv_apart_(block)
    bound = (6 / 200) ** 0.5
    for matrix in block.attn.qkv.weight.chunk(3):
        assert 0.99 * bound < matrix.abs().max() <= bound
        assert_close(matrix.std(), torch.tensor(bound / 3**0.5), rtol=0.02, atol=0)
    for name, value in others.items():
        assert torch.equal(block.state_dict()[name], value)


def test_rows_are_taken_in_parts_without_gradient_and_at_once_with_it() -> None:
    seen: list[int] = []

    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        seen.append(x.shape[:2].numel())
        return [x + y.sum((2, 3)), 2 * y]

    x, y = torch.randn(3, PART, 5), torch.randn(3, PART, 2, 2, 5)
    expected = run(x, y)
    with torch.no_grad():
        for got, whole in zip(in_parts(run, x[:, :-1], y[:, :-1]), expected, strict=True):
            assert torch.equal(got, whole[:, :-1])
        assert max(seen[1:]) <= PART
        assert sum(seen[1:]) == 3 * (PART - 1)
        seen.clear()
        in_parts(run, x[:1], y[:1])
        assert seen == [PART]
    in_parts(run, x, y)
    assert seen == [PART, 3 * PART]
