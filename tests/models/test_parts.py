import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mimlet.models.parts import (
    Attention,
    Block,
    DropPath,
    attend,
    attention_kernel,
    attention_logits,
    init_mae,
    init_qkv_apart_,
    relative_index,
    resize_positions,
    sincos_positions,
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
    assert attention_kernel(CPU, torch.float32, 50) == "fused"
    assert attention_kernel(CPU, torch.bfloat16, 50) == "explicit"
    assert attention_kernel(CPU, torch.bfloat16, 2048) == "fused"
    assert attention_kernel(torch.device("cuda"), torch.bfloat16, 50) == "fused"


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
