import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models import hiera
from mimlet.models.features import Taps
from mimlet.models.hiera import Hiera, official, pooled, resize_table, unrolled
from mimlet.models.shapes import HieraShape
from tests.shared import SHARED, Golden, golden

SHAPE = HieraShape(image_size=64, dim=6, stages=(1, 2, 3, 2), heads=2)
ALL = Taps(hidden=tuple(range(9)), normed=tuple(range(9)), attention=(5, 6, 7, 8), qkv=(5, 6, 7, 8), stages=(4, 8, 16))


def make(**changes: Any) -> Hiera:
    torch.manual_seed(0)
    encoder = Hiera(HieraShape(**{**vars(SHAPE), **changes}))
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.eval()


def images(size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def masks(units: int = 4, ratio: float = 0.5) -> Mask:
    return Mask.from_noise(torch.rand(2, units, generator=torch.Generator().manual_seed(3)), ratio)


def loaded(shape: HieraShape, oracle: Golden, prefix: str = "") -> Hiera:
    """The oracle's encoder, its norm under our name."""
    encoder = Hiera(shape)
    ours = {name.replace("encoder_norm.", "norm."): oracle.weights[prefix + name] for name in official_names(encoder)}
    encoder.load_state_dict(ours)
    return encoder


def official_names(encoder: Hiera) -> list[str]:
    known = encoder.state_dict()
    last = "encoder_norm." if encoder.shape.fuse != "none" else "norm."
    return [last + name.removeprefix("norm.") if name.startswith("norm.") else name for name in known]


def kept(oracle: Golden) -> Mask:
    """The official mask: kept units in raster order."""
    return Mask.from_hidden(~oracle.io["mask_keep"])


# -------------------------------------------------------------------------------------------------- official Hiera


def official_hiera(oracle: Golden) -> Hiera:
    shape = HieraShape(image_size=64, dim=12, stages=(1, 2, 2, 1), heads=1, q_pool=3, fuse="none")
    return loaded(shape, oracle)


def test_equals_official_hiera() -> None:
    oracle = golden("hiera")
    encoder, io = official_hiera(oracle), oracle.io
    features = encoder(io["imgs"], taps=Taps(hidden=tuple(range(7)), stages=(4, 8, 16, 32)))
    assert_close(features.hidden[0], io["tokens_after_unroll"], **oracle.tolerance)
    for block in range(6):
        assert_close(features.hidden[block + 1], io[f"block_out_unrolled.{block}"], **oracle.tolerance)
    for stage, stride in enumerate((4, 8, 16, 32)):
        assert_close(features.stages[stride], io[f"stage_feature.{stage}"].permute(0, 3, 1, 2), **oracle.tolerance)

    pooled_normed = encoder.norm(features.hidden[6].mean(1))
    assert_close(pooled_normed, io["pooled_normed"], **oracle.tolerance)
    head = {name: oracle.weights[f"head.projection.{name}"] for name in ("weight", "bias")}
    logits = F.linear(pooled_normed, **head)
    assert_close(logits, io["logits_train_mode"], **oracle.tolerance)
    assert_close(logits.softmax(-1), io["probabilities_eval_mode"], **oracle.tolerance)
    logits.log_softmax(-1)[:, 1].sum().backward()
    parameters = dict(encoder.named_parameters())
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.1.proj.weight"):
        assert_close(parameters[name].grad, io[f"grad.{name}"], **oracle.tolerance)


def test_equals_official_hiera_masked() -> None:
    oracle = golden("hiera")
    encoder, io = official_hiera(oracle), oracle.io
    assert torch.equal(Mask.from_noise(io["noise"], 0.5).hidden, ~io["mask_keep"])
    features = encoder(io["imgs"], kept(oracle), taps=Taps(hidden=(6,), stages=(4, 8, 16, 32)))
    assert_close(features.hidden[6], io["masked_final_tokens"], **oracle.tolerance)
    assert_close(features.latent, encoder.norm(features.hidden[6]))
    for stage, stride in enumerate((4, 8, 16, 32)):
        expected = io[f"masked_stage_feature.{stage}"].flatten(2, 3)  # one patch per unit
        assert_close(features.stages[stride], expected, **oracle.tolerance)


def test_equals_official_pretraining() -> None:
    oracle = golden("hiera_mae")
    encoder, io = loaded(HieraShape(image_size=96, dim=8, stages=(1, 2, 2, 1)), oracle), oracle.io
    features = encoder(io["imgs"], kept(oracle), taps=Taps(hidden=(1, 3, 5, 6), stages=(4, 8, 16)))
    assert_close(features.latent, io["latent"].flatten(1, 3), **oracle.tolerance)
    for stage, block in enumerate((1, 3, 5, 6)):
        expected = io[f"masked_stage_feature.{stage}"]
        side = expected.shape[2]
        inside = features.hidden[block].view(2, side * side, 3, -1).transpose(1, 2)  # still unrolled
        if stage >= 2:  # four tokens are unrolled in raster order
            assert_close(inside, expected.flatten(2, 3), **oracle.tolerance)
        if block != 5:
            fine = expected.view(2, 3, 2, side // 2, 2, side // 2, -1).transpose(3, 4)
            expected = fine.reshape(2, 12, side * side // 4, -1)
            assert_close(features.stages[(4, 8, 16, 16)[stage]], expected, **oracle.tolerance)
            term = encoder.fuse_term(min(stage, 2), inside)
            assert_close(term, io[f"fused_term.{min(stage, 2)}"].flatten(2, 3), **oracle.tolerance)


def test_gradients_equal_official_pretraining() -> None:
    """The decoder is the textbook's, so that the official gradients can reach the encoder."""
    oracle = golden("hiera_mae")
    encoder, io = loaded(HieraShape(image_size=96, dim=8, stages=(1, 2, 2, 1)), oracle), oracle.io
    mask = encoder.patch_mask(kept(oracle))
    latent = F.linear(encoder(io["imgs"], kept(oracle)).latent, *affine(oracle, "decoder_embed"))
    token = oracle.weights["mask_token"].clone().requires_grad_()
    x = torch.cat([latent, token.expand(2, 36 - latent.shape[1], -1)], 1)
    assert mask.ids_restore is not None
    x = x.gather(1, mask.ids_restore[..., None].expand_as(x)) + oracle.weights["decoder_pos_embed"]
    for block in ("decoder_blocks.0.", "decoder_blocks.1."):
        q, k, v = linear(oracle, block + "attn.qkv", norm(oracle, block + "norm1", x)).view(2, 36, 3, 4, 8).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        heads = (q @ k.mT / 8**0.5).softmax(-1) @ v
        x = x + linear(oracle, block + "attn.proj", heads.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(oracle, block + "mlp.fc1", norm(oracle, block + "norm2", x)))
        x = x + linear(oracle, block + "mlp.fc2", hidden)
    prediction = linear(oracle, "decoder_pred", norm(oracle, "decoder_norm", x))
    assert_close(prediction, io["pred_full"], **oracle.tolerance)
    loss = F.mse_loss(prediction[mask.hidden], io["label_masked"])
    assert_close(loss, io["loss"][0], **oracle.tolerance)
    loss.backward()
    assert_close(token.grad, io["grad.mask_token"], **oracle.tolerance)
    parameters = dict(encoder.named_parameters())
    for name in ("pos_embed", "multi_scale_fusion_heads.0.weight", "patch_embed.proj.weight"):
        assert_close(parameters[name].grad, io[f"grad.{name}"], **oracle.tolerance)


def affine(oracle: Golden, name: str) -> tuple[Tensor, Tensor]:
    return oracle.weights[f"{name}.weight"], oracle.weights[f"{name}.bias"]


def linear(oracle: Golden, name: str, x: Tensor) -> Tensor:
    return F.linear(x, *affine(oracle, name))


def norm(oracle: Golden, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *affine(oracle, name), eps=1e-6)


def test_attention_equals_mae_lites_distillation() -> None:
    oracle = golden("mae_lite_hiera_distill")
    student = loaded(HieraShape(image_size=64, dim=6, stages=(1, 1, 2, 1)), oracle, "model.")
    teacher = loaded(HieraShape(image_size=64, dim=8, stages=(1, 1, 1, 2)), oracle, "tch_model.")
    for name, encoder in (("student", student), ("teacher", teacher)):
        taps = Taps(attention=(5,), tokens=False)
        logits = encoder(oracle.io["imgs"], kept(oracle), taps=taps).attention[5]
        assert_close(logits, oracle.io[f"{name}_attn"][:, :, 0], **oracle.tolerance)


# ------------------------------------------------------------------------------------------------- sizes and names


def test_names_and_shapes_of_official_pretraining() -> None:
    file = SHARED / "facts" / "checkpoints" / "mae_hiera_tiny46_400e_bare.json"
    if not file.exists():
        pytest.skip("key lists are not beside the repository")
    published = json.loads(file.read_text())["tensors"]
    with torch.device("meta"):
        encoder = Hiera(HieraShape())
    ours = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    renamed = {name.replace("encoder_norm.", "norm."): shape for name, shape in published.items()}
    assert ours == {name: s for name, s in renamed.items() if not name.startswith(("decoder_", "mask_token"))}


def test_size_of_hiera_tiny() -> None:
    """The numbers of MAE-lite's model: all of the encoder without the convolutions that fuse stages."""
    with torch.device("meta"):
        encoder = Hiera(HieraShape(q_pool=3, fuse="none"))
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == 6_325_966
    assert encoder.pos_embed.numel() == 3136 * 46
    assert count + 368 * 1000 + 1000 == 6_694_966
    assert encoder.attending == (5, 6, 7, 8, 9, 10, 12)
    assert encoder.dims == (46, 46, *[92] * 2, *[184] * 7, *[368] * 2)
    assert [block.attn.heads for block in encoder.blocks] == [1, *[2] * 2, *[4] * 7, *[8] * 2]


OFFICIAL = {
    "hiera_tiny_224": HieraShape(dim=96, stages=(1, 2, 7, 2), heads=1),
    "hiera_small_224": HieraShape(dim=96, stages=(1, 2, 11, 2), heads=1),
    "hiera_base_224": HieraShape(dim=96, stages=(2, 3, 16, 3), heads=1),
    "hiera_base_plus_224": HieraShape(dim=112, stages=(2, 3, 16, 3), heads=2),
    "hiera_large_224": HieraShape(dim=144, stages=(2, 6, 36, 4), heads=2),
    "hiera_huge_224": HieraShape(dim=256, stages=(2, 6, 36, 4), heads=4),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_sizes_equal_timms(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        encoder = Hiera(HieraShape(**{**vars(OFFICIAL[name]), "q_pool": 3, "fuse": "none"}))
    theirs = {key.replace("head.norm.", "norm."): value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in encoder.state_dict().items()} == theirs
    assert [block.attn.heads for block in encoder.blocks] == [block.attn.heads for block in model.blocks]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((64, 64), {"embed_dim": 12, "num_heads": 2, "stages": (1, 2, 3, 2)}),
        ((64, 96), {"embed_dim": 8, "num_heads": 1, "stages": (2, 1, 2, 1)}),
    ],
)
def test_equals_timm(size: tuple[int, int], options: dict[str, Any]) -> None:
    """Also of an image that is not square, whose table is given at that size."""
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", img_size=size, num_classes=0, **options).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    shape = HieraShape(64, 16, options["embed_dim"], options["stages"], options["num_heads"], q_pool=3, fuse="none")
    encoder = Hiera(shape)
    weights = {name.replace("head.norm.", "norm."): value for name, value in model.state_dict().items()}
    encoder.pos_embed, encoder.table_grid = nn.Parameter(weights["pos_embed"]), (size[0] // 4, size[1] // 4)
    encoder.load_state_dict(weights)
    features = encoder(images(size), taps=Taps(hidden=(encoder.depth,), stages=(4, 8, 16, 32)))
    assert_close(encoder.norm(features.hidden[encoder.depth].mean(1)), model(images(size)), rtol=1e-4, atol=1e-5)
    maps = model.forward_intermediates(images(size), intermediates_only=True)
    for stride, expected in zip((4, 8, 16, 32), maps, strict=True):
        assert_close(features.stages[stride], expected, rtol=1e-4, atol=1e-5)
    last = features.stages[32].flatten(2).transpose(1, 2)
    assert_close(features.latent, encoder.norm(last), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- taps and two ways


def test_attributes() -> None:
    encoder = make()
    assert (encoder.patch, encoder.unit, encoder.grid, encoder.units) == (16, 2, (4, 4), 4)
    assert (encoder.dim, encoder.heads, encoder.depth, encoder.prefix) == (48, 16, 8, 0)
    assert encoder.dims == (6, 6, 12, 12, 24, 24, 24, 48, 48)
    assert encoder.attending == (5, 6, 7, 8)
    assert (encoder.stages, encoder.levels, encoder.fills) == ({4: 6, 8: 12, 16: 48}, {}, ())
    pools = make(q_pool=3)
    assert (pools.patch, pools.unit, pools.grid, pools.units) == (32, 1, (2, 2), 4)
    assert pools.attending == (5, 6, 8)
    assert pools.stages == {4: 6, 8: 12, 16: 24, 32: 48}
    small = make(image_size=16, patch=4)
    assert (small.patch, small.grid, small.units, small.stages) == (4, (4, 4), 4, {1: 6, 2: 12, 4: 48})
    assert small(images((16, 16))).latent.shape == (2, 16, 48)
    assert (small.layer_of("pos_embed"), small.layer_of("patch_embed.proj.weight")) == (0, 0)
    assert (small.layer_of("blocks.0.norm1.bias"), small.layer_of("blocks.7.proj.weight")) == (1, 8)
    assert (small.layer_of("norm.bias"), small.layer_of("multi_scale_fusion_heads.1.weight")) == (9, 9)


@pytest.mark.parametrize("masked", [False, True])
def test_every_tap_equals_a_plain_computation(masked: bool) -> None:
    encoder, mask = make(), masks() if masked else None
    features = encoder(images(), mask, taps=ALL)
    for number, block in enumerate(encoder.blocks, 1):
        x, out = features.hidden[number - 1], features.hidden[number]
        y = block.norm1(x)
        assert_close(features.normed[number - 1], y)
        heads, pool = block.attn.heads, 4 if number in (2, 4) else 1
        windows = (2 if masked else 4) if number <= 4 else 1
        parts = block.attn.qkv(y).view(2, -1, windows, 3, heads, out.shape[-1] // heads)
        q, k, v = parts.permute(3, 0, 4, 2, 1, 5)
        q = q.unflatten(3, (pool, -1)).max(3).values
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if number in encoder.attending:
            assert_close(features.attention[number], logits[:, :, 0])
            for tapped, plain in zip(features.qkv[number], (q, k, v), strict=True):
                assert_close(tapped, plain[:, :, 0])
        attended = (logits.softmax(-1) @ v).permute(0, 3, 2, 1, 4).reshape(out.shape)
        short = x if x.shape[-1] == out.shape[-1] else block.proj(y).unflatten(1, (pool, -1)).max(1).values
        x = short + block.attn.proj(attended)
        assert_close(
            out,
            x + block.mlp.fc2(F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))),
            rtol=1e-4,
            atol=1e-5,
        )
    assert_close(features.normed[8], encoder.norm(features.hidden[8]))


@pytest.mark.parametrize("q_pool", [2, 3])
@pytest.mark.parametrize("fuse", ["none", "all", "without_last"])
def test_tokens_are_the_fused_ends_in_raster_order(q_pool: int, fuse: str) -> None:
    encoder = make(q_pool=q_pool, fuse=fuse)
    last = encoder(images(), taps=Taps(stages=(encoder.patch,), tokens=False)).stages[encoder.patch]
    ends = [encoder(images(), taps=Taps(stages=(px,), tokens=False)).stages[px] for px in (4, 8, 16)[:q_pool]]
    fused = torch.zeros_like(last) if fuse == "without_last" else last
    for convolution, end in zip(encoder.multi_scale_fusion_heads, ends, strict=False):
        fused = fused + convolution(end)
    assert len(encoder.multi_scale_fusion_heads) == (0 if fuse == "none" else q_pool)
    expected = encoder.norm(fused.flatten(2).transpose(1, 2))
    assert_close(encoder(images()).latent, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q_pool", [2, 3])
def test_keeping_every_unit_equals_no_mask(q_pool: int) -> None:
    """Also in another order of the units, and in the gradients."""
    encoder = make(q_pool=q_pool)
    order = torch.tensor([[0, 1, 2, 3, 4, 5], [4, 2, 5, 0, 1, 3]])
    mask = Mask.from_order(order, 6)
    strides = tuple(encoder.stages)
    whole = encoder(images((64, 96)), taps=Taps(stages=strides))
    dropped = encoder(images((64, 96)), mask, taps=Taps(stages=strides))
    ids = encoder_patches(encoder, order, (2, 3))
    weights = torch.randn_like(whole.latent)
    batch = torch.arange(2)[:, None]
    assert_close(dropped.latent, whole.latent[batch, ids], rtol=1e-4, atol=1e-5)
    for stride in strides:
        side = encoder.patch // stride
        image = whole.stages[stride]
        rows, columns = image.shape[2] // side, image.shape[3] // side
        tiles = image.view(2, -1, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1).reshape(2, rows * columns, -1)
        assert_close(dropped.stages[stride].flatten(2), tiles[batch, ids], rtol=1e-4, atol=1e-5)
    (whole.latent * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    (dropped.latent * weights[batch, ids]).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def encoder_patches(encoder: Hiera, order: Tensor, units: tuple[int, int]) -> Tensor:
    """Raster index of every final patch, unit by unit."""
    side = encoder.unit
    raster = torch.arange(units[0] * units[1] * side * side).view(units[0], side, units[1], side)
    return raster.transpose(1, 2).reshape(-1, side * side)[order].flatten(1)


def test_tokens_match_the_mask_over_patches() -> None:
    encoder, mask = make(), masks()
    ids = encoder.patch_mask(mask).ids_keep
    assert ids is not None
    assert torch.equal(ids, encoder_patches(encoder, mask.ids_keep, (2, 2)))


def test_no_leak() -> None:
    """Hidden pixels change nothing, whatever they are, and visible ones of the border do."""
    encoder, mask = make(), masks()
    hidden = mask.hidden.view(2, 1, 2, 1, 2, 1).expand(2, 3, 2, 32, 2, 32).reshape(2, 3, 64, 64)
    taps = Taps(hidden=(0, 8), attention=(8,), stages=(4,))
    before = encoder(images(), mask, taps=taps)
    after = encoder(images().masked_fill(hidden, torch.nan), mask, taps=taps)
    assert torch.equal(before.latent, after.latent)
    for kind in ("hidden", "attention", "stages"):
        for number, value in getattr(before, kind).items():
            assert torch.equal(value, getattr(after, kind)[number])
    pair = Mask.from_hidden(torch.tensor([[False, False, True, True]] * 2))  # left and right
    moved = images()
    moved[..., :32, 31] += 1
    change = (encoder.embed(moved, pair)[0] - encoder.embed(images(), pair)[0]).abs().sum((0, 3)) > 0
    right = unrolled(torch.arange(64.0).view(1, 8, 8, 1))[0, 0, :, 0] % 8
    assert torch.equal(change[1], right == 0)  # the overlap reaches the first column of the unit to the right


@pytest.mark.parametrize(("q_pool", "last"), [(2, 16), (3, 32)])
def test_layout_puts_unrolled_tokens_into_their_places(q_pool: int, last: int) -> None:
    encoder = make(q_pool=q_pool)
    for block, stride in ((1, 4), (3, 8), (8, last)):
        features = encoder(images(), taps=Taps(hidden=(block,), stages=(stride,), tokens=False))
        grid, order = encoder.layout(block)
        image = features.stages[stride]
        assert grid == image.shape[2:]
        assert_close(features.hidden[block][:, order], image.flatten(2).transpose(1, 2))
    assert [encoder.heads_of(block) for block in (1, 2, 4, 8)] == [2, 4, 8, 16]


def test_taps_change_nothing() -> None:
    encoder = make()
    assert_close(encoder(images(), taps=ALL).latent, encoder(images()).latent, rtol=1e-4, atol=1e-5)
    pools = make(q_pool=3)
    taps = Taps(hidden=(0, 8), normed=tuple(range(9)), attention=(5, 6, 8), qkv=(8,), stages=(4, 8, 16, 32))
    assert_close(pools(images(), taps=taps).latent, pools(images()).latent, rtol=1e-4, atol=1e-5)


@contextmanager
def counted(encoder: Hiera) -> Iterator[Counter[str]]:
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in encoder.named_modules()
        if name.endswith((".norm1", ".norm2")) or name == "norm"
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("changes", "taps", "blocks", "more"),
    [
        ({}, Taps(), 8, {"norm"}),
        ({"fuse": "without_last"}, Taps(), 3, {"norm"}),
        ({"q_pool": 3, "fuse": "without_last"}, Taps(), 6, {"norm"}),
        ({"fuse": "without_last"}, Taps(attention=(8,)), 7, {"norm", "blocks.7.norm1"}),
        ({}, Taps(stages=(8,), tokens=False), 3, set()),
        ({}, Taps(stages=(4,), hidden=(2,), tokens=False), 2, set()),
        ({}, Taps(normed=(2,), tokens=False), 2, {"blocks.2.norm1"}),
        ({}, Taps(attention=(5,), tokens=False), 4, {"blocks.4.norm1"}),
        ({}, Taps(normed=(8,), tokens=False), 8, {"norm"}),
        ({}, Taps(hidden=(0,), tokens=False), 0, set()),
    ],
)
def test_nothing_runs_beyond_the_last_tap(changes: dict[str, Any], taps: Taps, blocks: int, more: set[str]) -> None:
    encoder = make(**changes)
    with counted(encoder) as calls:
        features = encoder(images(), taps=taps)
    assert set(calls) == {f"blocks.{i}.norm{n}" for i in range(blocks) for n in (1, 2)} | more
    assert max(calls.values(), default=1) == 1
    assert (features.tokens is not None) == taps.tokens


def test_many_windows_are_attended_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make()
    expected = encoder(images()).latent
    monkeypatch.setattr(hiera, "ATTENTION_BATCH", 3)
    assert_close(encoder(images()).latent, expected, rtol=1e-5, atol=1e-6)


def test_drop_path_grows_with_depth() -> None:
    encoder = Hiera(SHAPE, drop_path=0.7)
    rates = [getattr(block.drop_path, "rate", 0.0) for block in encoder.blocks]
    assert_close(torch.tensor(rates), torch.linspace(0, 0.7, 8))
    constant = Hiera(SHAPE, drop_path=0.7, constant_drop_path=True)
    assert [block.drop_path.rate for block in constant.blocks] == pytest.approx([0.7] * 8)
    encoder.train()
    torch.manual_seed(0)
    assert not torch.equal(encoder(images()).latent, encoder(images()).latent)


# ---------------------------------------------------------------------------------------------- order and positions


def test_unrolled_order_by_hand() -> None:
    """Of unit 0: the first four quarters are the four places inside the finest 2 x 2."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    units = unrolled(torch.stack([y, x], -1)[None])
    assert units.shape == (1, 4, 64, 2)
    assert units[0, 0, :4].tolist() == [[0, 0], [0, 4], [4, 0], [4, 4]]
    assert units[0, 0, 4].tolist() == [0, 2]
    assert units[0, 0, 16].tolist() == [0, 1]
    assert units[0, 0, 32].tolist() == [1, 0]
    assert units[0, 2, 0].tolist() == [8, 0]
    assert official(units)[0, :5].tolist() == [[0, 0], [0, 8], [8, 0], [8, 8], [0, 4]]
    assert pooled(units)[0, 1, :2].tolist() == [[1, 9], [1, 13]]


def test_resized_table_keeps_windows_and_interpolates_the_rest() -> None:
    torch.manual_seed(0)
    window = torch.randn(8, 8, 3)
    repeated = window.repeat(2, 3, 1).flatten(0, 1)[None]
    tiled = resize_table(repeated, (16, 24), (40, 16), 8)
    assert_close(tiled, window.repeat(5, 2, 1).flatten(0, 1)[None])

    level = torch.randn(2, 3, 3)
    constant = level.repeat_interleave(8, 0).repeat_interleave(8, 1)
    plain = F.interpolate(constant.permute(2, 0, 1)[None], (40, 16), mode="bicubic")[0].permute(1, 2, 0)
    assert_close(resize_table(constant.flatten(0, 1)[None], (16, 24), (40, 16), 8)[0].view(40, 16, 3), plain)

    both = repeated + constant.flatten(0, 1)
    resized = resize_table(both, (16, 24), (40, 16), 8)
    assert_close(resized, tiled + plain.flatten(0, 1))
    assert resize_table(both, (16, 24), (16, 24), 8) is both
    assert resize_table(both.half(), (16, 24), (40, 16), 8).dtype == torch.float16


def test_other_sizes() -> None:
    encoder = make()
    encoder.pos_embed.data = torch.randn(8, 8, 6).repeat(2, 2, 1).flatten(0, 1)[None]
    table = encoder.positions((3, 5))
    assert_close(table, table[:1].expand(15, -1, -1))
    assert_close(table[0], encoder.positions((2, 2))[0])
    features = encoder(images((96, 160)), taps=Taps(stages=(4, 8, 16)))
    assert features.grid == (6, 10)
    assert features.latent.shape == (2, 60, 48)
    assert {stride: tuple(x.shape) for stride, x in features.stages.items()} == {
        4: (2, 6, 24, 40),
        8: (2, 12, 12, 20),
        16: (2, 48, 6, 10),
    }
    assert encoder(images((96, 160)), masks(15)).latent.shape == (2, 7 * 4, 48)


# --------------------------------------------------------------------------------------------------- initialisation


def test_initialisation_for_pretraining() -> None:
    torch.manual_seed(0)
    encoder = Hiera(HieraShape(image_size=64, dim=24))
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name == "pos_embed":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        elif "multi_scale" in name:
            fan = parameter[0].numel() if parameter.dim() == 4 else 24 * 16 if ".0." in name else 48 * 4
            assert parameter.abs().max() <= fan**-0.5
        elif name.endswith("weight"):
            bound = (6 / (len(parameter) + parameter[0].numel())) ** 0.5
            assert 0.95 * bound < parameter.abs().max() <= bound, name
        elif "patch_embed" in name:
            assert 0 < parameter.abs().max() <= 147**-0.5
        else:
            assert not parameter.any()


def test_initialisation_for_labels() -> None:
    torch.manual_seed(0)
    encoder = Hiera(HieraShape(image_size=64, dim=24))
    encoder.init_classifier_()
    for name, parameter in encoder.named_parameters():
        if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif "patch_embed.proj.bias" in name:
            assert parameter.unique().numel() == 24
        elif name.endswith("bias") and "multi_scale" not in name:
            assert torch.equal(parameter, torch.full_like(parameter, 0.02))
        elif "multi_scale" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (Taps(hidden=(9,)), "no hidden of block 9: this encoder has blocks 0 to 8"),
        (
            Taps(attention=(4,)),
            "no attention of block 4: Hiera attends to the whole image in the blocks 5, 6, 7, 8 only",
        ),
        (Taps(qkv=(1,)), "no qkv of block 1: Hiera attends"),
        (Taps(levels=(16,)), "no levels of stride 16 px in Hiera: it has none"),
        (Taps(stages=(32,)), "no stages of stride 32 px in Hiera: it has those of stride 4, 8, 16 px"),
    ],
)
def test_impossible_taps(taps: Taps, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()(images(), taps=taps)


def test_bad_images_masks_and_fill() -> None:
    encoder = make()
    with pytest.raises(ConfigError, match="image of 64 x 80 px is not divisible by the mask unit of 32 px"):
        encoder(images((64, 80)))
    with pytest.raises(ConfigError, match="the mask has 9 units, the image 2 x 2 mask units"):
        encoder(images(), masks(9))
    with pytest.raises(
        ConfigError, match="Hiera cannot fill hidden units with 48 numbers; expected a method that drops"
    ):
        encoder(images(), masks(), torch.zeros(1, 1, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 80}, "patch 16 must be a multiple of 4 px, and image_size 80 of 32 px"),
        ({"patch": 6}, "patch 6 must be a multiple of 4 px"),
        ({"stages": (1, 2, 3)}, r"4 stages of at least one block.*got stages \(1, 2, 3\), width 6, 2 heads"),
        ({"heads": 4}, "width 6, 4 heads"),
    ],
)
def test_impossible_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)
