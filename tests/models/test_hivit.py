import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.config import EncoderSettings
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models.encoder import as_units
from mimlet.models.features import Features, Taps
from mimlet.models.hivit import HiViT, PatchMerge
from mimlet.models.parts import Block, MlpBlock, attention_logits, relative_index
from mimlet.models.pyramid import StagesEmbed
from mimlet.models.shapes import HiViTShape
from tests.shared import SHARED, Golden, golden

PYRAMID: dict[str, Any] = {"pyramid_dim": 16, "pyramid_depth": 1, "pyramid_hidden": 24}
SHAPE: dict[str, Any] = {"image_size": 32, "patch": 8, "dim": 32, "stages": (2, 1, 2), "heads": 2}
FORMS: list[dict[str, Any]] = [
    {"form": "hivit"},
    {"form": "hivit", "layer_scale": 0.1, "relative": "full", **PYRAMID},
    {"form": "hivit", "relative": "decomposed"},
    {"form": "fast", "layer_scale": 0.1, "mlp_ratio": 3.0, "position": "learned", **PYRAMID},
]
NOT_OURS = (
    "decoder_",
    "mask_token",
    "fc_norm.",
    "head.",
    "relative_position_index",
    "lm_",
    "norm_cls.",
    "cls_pt_layers.",
)


def make(**changes: Any) -> HiViT:
    torch.manual_seed(0)
    encoder = HiViT(HiViTShape(**{**SHAPE, **changes}))
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def masks(ratio: float = 0.5) -> Mask:
    return Mask.from_noise(torch.rand(2, 16, generator=torch.Generator().manual_seed(2)), ratio)


def everything(encoder: HiViT) -> Taps:
    blocks, strides = tuple(range(encoder.depth + 1)), tuple(encoder.stages)
    return Taps(blocks, blocks, encoder.attending, encoder.attending, strides, tuple(encoder.levels))


def at(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows of tokens [B,N,...] at ids [B,V]."""
    return tokens[torch.arange(len(ids))[:, None], ids]


def by_patch(features: Features, kind: str, encoder: HiViT) -> dict[int, Tensor]:
    """Stages or levels of whole images, [B,N,t,C]."""
    return {s: as_units(x, encoder.patch // s) for s, x in getattr(features, kind).items()}


def assert_near(ours: Tensor, expected: Tensor, **tolerance: float) -> None:
    assert_close(ours, expected, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


# ---------------------------------------------------------------------------------------------------- goldens


def load(oracle: Golden, **changes: Any) -> HiViT:
    """An encoder with an oracle's weights; every one of its tensors is there, none other but those of heads."""
    encoder = HiViT(HiViTShape(**{"image_size": 64, "dim": 32, "stages": (1, 1, 2), "heads": 2, **changes}))
    own = encoder.state_dict()
    over = [name for name in oracle.weights if name not in own and not name.startswith((*NOT_OURS, "norm."))]
    assert not over
    encoder.load_state_dict({name: oracle.weights[name] for name in own})
    return encoder.eval()


@torch.no_grad()
def test_hivit_equals_the_official_code() -> None:
    oracle = golden("hivit")
    encoder = load(oracle, stages=(2, 2, 2), relative="full")
    taps = Taps(stages=(4, 8, 16), hidden=(6,))
    whole = encoder(oracle.io["imgs"], taps=taps)
    stages = by_patch(whole, "stages", encoder)
    assert_near(stages[4], oracle.io["stage1"].flatten(2, 3), **oracle.tolerance)
    assert_near(stages[8], oracle.io["stage2"].flatten(2, 3), **oracle.tolerance)
    assert_near(stages[16][:, :, 0], oracle.io["stage3"], **oracle.tolerance)
    assert_near(whole.latent, oracle.io["stage3"], **oracle.tolerance)
    w = oracle.weights
    pooled = F.layer_norm(whole.hidden[6].mean(1), (32,), w["fc_norm.weight"], w["fc_norm.bias"], 1e-6)
    assert_near(F.linear(pooled, w["head.weight"], w["head.bias"]), oracle.io["logits"], **oracle.tolerance)
    ids = oracle.io["ids_keep"]
    shown = encoder(oracle.io["imgs"], Mask(torch.ones(2, 16, dtype=torch.bool).scatter(1, ids, False), ids), taps=taps)
    assert_near(shown.stages[4], oracle.io["masked_stage1"].flatten(2, 3), **oracle.tolerance)
    assert_near(shown.stages[8], oracle.io["masked_stage2"].flatten(2, 3), **oracle.tolerance)
    assert_near(shown.stages[16][:, :, 0], oracle.io["masked_stage3"], **oracle.tolerance)


@torch.no_grad()
def test_the_latent_of_hivit_mae_equals_the_official_code() -> None:
    oracle = golden("hivit_mae")
    encoder = load(oracle, stages=(2, 2, 2))
    embed = StagesEmbed(encoder.stages, 32)
    names = {"norm.": "norm.", "embed.": "decoder_embed."}
    own = {our + kind: oracle.weights[theirs + kind] for our, theirs in names.items() for kind in ("weight", "bias")}
    embed.load_state_dict(own)
    mask = Mask.from_noise(oracle.io["noise"], oracle.meta["mask_ratio"])
    assert torch.equal(mask.ids_restore, oracle.io["ids_restore"])
    features = encoder(oracle.io["imgs"], mask, taps=Taps(stages=(4, 8, 16), tokens=False))
    embed.embed = nn.Identity()
    assert_near(embed(features.stages), oracle.io["latent"], **oracle.tolerance)


@torch.no_grad()
def test_itpn_of_pixels_equals_the_official_code() -> None:
    """Its pyramid reads positions resampled by (4 + 0.1) / 4; its stages were recorded with the plain table."""
    oracle = golden("itpn_pixel")
    encoder = load(oracle, pyramid_dim=16, pyramid_depth=1, pyramid_hidden=64)
    mask = Mask.from_noise(oracle.io["noise"], oracle.meta["mask_ratio"])
    assert torch.equal(mask.ids_keep, oracle.io["ids_keep"])
    stages = encoder(oracle.io["imgs"], mask, taps=Taps(stages=(4, 8, 16), tokens=False)).stages
    for stride, name in ((4, "u_stage1"), (8, "u_stage2"), (16, "u_stage3")):
        assert_near(stages[stride], oracle.io[name].view_as(stages[stride]), **oracle.tolerance)
    encoder.position_offset = 0.1
    levels = encoder(oracle.io["imgs"], mask, taps=Taps(levels=(4, 8, 16), tokens=False)).levels
    for stride, name in ((4, "v4"), (8, "v8"), (16, "v16")):
        assert_near(levels[stride], oracle.io[name].view_as(levels[stride]), **oracle.tolerance)


@torch.no_grad()
def test_itpn_that_follows_clip_equals_the_official_code() -> None:
    oracle = golden("itpn_mfm_clip")
    encoder = load(
        oracle, stages=(1, 1, 8), relative="full", layer_scale=0.1, pyramid_dim=16, pyramid_depth=1, pyramid_hidden=64
    )
    mask, fill = Mask.from_hidden(oracle.io["bool_masked_pos"].bool()), oracle.weights["mask_token"]
    levels = by_patch(encoder(oracle.io["imgs"], mask, fill, Taps(levels=(4, 8, 16), tokens=False)), "levels", encoder)
    for stride, name in ((4, "v4"), (8, "v8"), (16, "v16")):
        assert_near(levels[stride], oracle.io[name].flatten(2, 3), **oracle.tolerance)


@torch.no_grad()
def test_fast_itpn_equals_the_official_code() -> None:
    oracle = golden("fast_itpn")
    encoder = load(oracle, dim=48, form="fast", layer_scale=0.1, mlp_ratio=3.0)
    features = encoder(oracle.io["imgs"], taps=Taps(hidden=(0,), stages=(4, 8, 16)))
    embedded = oracle.io["patch_embed"]
    assert_near(features.hidden[0].view(2, 16, 16, 12), as_units(embedded, 4), **oracle.tolerance)
    assert_near(features.stages[4], oracle.io["stage1"], **oracle.tolerance)
    assert_near(features.stages[8], oracle.io["stage2"], **oracle.tolerance)
    assert_near(features.latent, oracle.io["stage3"], **oracle.tolerance)
    w = oracle.weights
    pooled = F.layer_norm(features.latent.mean(1), (48,), w["fc_norm.weight"], w["fc_norm.bias"], 1e-6)
    assert_near(pooled, oracle.io["features"], **oracle.tolerance)
    assert_near(F.linear(pooled, w["head.weight"], w["head.bias"]), oracle.io["logits"], **oracle.tolerance)


@torch.no_grad()
def test_fast_itpn_in_pre_training_equals_the_fork() -> None:
    oracle = golden("fast_itpn_pretrain")
    encoder = load(
        oracle, form="fast", layer_scale=0.1, mlp_ratio=3.0, pyramid_dim=24, pyramid_depth=1, pyramid_hidden=64
    )
    mask, fill = Mask.from_hidden(oracle.io["bool_masked_pos"].bool()), oracle.weights["mask_token"]
    features = encoder(oracle.io["imgs"], mask, fill, Taps(hidden=(0,), levels=(4, 8, 16), tokens=False))
    embedded = as_units(oracle.io["patch_embed_masked"], 4)
    assert_near(features.hidden[0].view_as(embedded), embedded, **oracle.tolerance)
    for stride, name in ((4, "p4"), (8, "p8"), (16, "p16")):
        assert_near(features.levels[stride], oracle.io[name], **oracle.tolerance)


# ------------------------------------------------------------------------------------------- names and numbers


def sized(name: str, image_size: int = 224, pyramid: bool = True, **changes: Any) -> HiViT:
    """An encoder of the zoo without memory."""
    shape = EncoderSettings(name=name, image_size=image_size).shape()
    assert isinstance(shape, HiViTShape)
    with torch.device("meta"):
        return HiViT(replace(shape, **changes) if pyramid else replace(shape, **changes, pyramid_dim=0))


LISTS: list[tuple[str, str, dict[str, Any]]] = [
    ("hivit_base_finetune", "hivit_base", {"relative": "full"}),
    ("hivit_base_mae_pretrain", "hivit_base", {}),
    ("itpn_base_pixel_pretrain", "itpn_base", {}),
    ("itpn_base_pixel_finetune", "itpn_base", {"pyramid": False, "relative": "full"}),
    ("itpn_base_clip_pretrain", "itpn_base", {"relative": "full", "layer_scale": 0.1, "pyramid_depth": 1}),
    ("itpn_base_clip_finetune", "itpn_base", {"pyramid": False, "relative": "full", "layer_scale": 0.1}),
    ("fast_itpn_tiny_finetune", "fast_itpn_tiny", {"pyramid": False}),
    ("fast_itpn_base_finetune", "fast_itpn_base", {"pyramid": False}),
    ("fast_itpn_tiny_pretrain_fork", "fast_itpn_tiny", {}),
    ("fast_itpn_base_pretrain_fork", "fast_itpn_base", {}),
]


@pytest.mark.parametrize(("file", "name", "changes"), LISTS)
def test_names_and_shapes_are_the_official_ones(file: str, name: str, changes: dict[str, Any]) -> None:
    path = SHARED / "facts" / "checkpoints" / f"{file}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the repository")
    others = NOT_OURS if name.startswith("fast") else (*NOT_OURS, "norm.")
    official = {k: tuple(v) for k, v in json.loads(path.read_text()).items() if not k.startswith(others)}
    assert {k: tuple(v.shape) for k, v in sized(name, **changes).state_dict().items()} == official


def millions(encoder: nn.Module, classes: int = 1000) -> float:
    """With norm and linear classifier."""
    dim = encoder.dim
    assert isinstance(dim, int)
    count = sum(p.numel() for p in encoder.parameters()) + (2 * dim + (dim + 1) * classes if classes else 0)
    return count / 1e6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hivit_tiny", 19.18),
        ("hivit_small", 37.53),
        ("hivit_base", 66.42),
        ("itpn_base", 78.56),
        ("itpn_large", 288.49),
    ],
)
def test_hivit_and_itpn_have_their_published_sizes(name: str, expected: float) -> None:
    assert millions(sized(name, pyramid=False, relative="full")) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fast_itpn_tiny", (24.22, 24.24, 24.37, 24.54, 24.76)),
        ("fast_itpn_small", (39.90, 39.93, 40.05, 40.22, 40.44)),
        ("fast_itpn_base", (84.83, 84.86, 85.02, 85.25, 85.54)),
        ("fast_itpn_large", (312.02, 312.06, 312.31, 312.65, 313.10)),
    ],
)
def test_fast_itpn_has_its_published_sizes(name: str, expected: tuple[float, ...]) -> None:
    sizes = [millions(sized(name, pixels, pyramid=False)) for pixels in (224, 256, 384, 512, 640)]
    assert sizes == pytest.approx(expected, abs=0.0051)


def test_the_pyramid_of_itpn_base_has_4_70_million_parameters() -> None:
    with_it, without = (millions(sized("itpn_base", pyramid=pyramid), 0) for pyramid in (True, False))
    assert with_it - without == pytest.approx(4.70, abs=0.005)
    assert without == pytest.approx(77.9, abs=0.05)


# ------------------------------------------------------------------------------------------------------- taps


def recompute(encoder: HiViT, images: Tensor, mask: Mask | None = None) -> Features:
    """Every tap block by block, with plain attention."""
    ids = None if mask is None else mask.ids_keep
    out = Features(0, encoder.grid)
    x = encoder.patch_embed(images, ids)
    ends, number, mine = [], 0, torch.arange(16).expand(2, 16) if ids is None else ids
    out.hidden[0] = x.flatten(1, 3)
    for member in encoder.blocks:
        if isinstance(member, PatchMerge):
            ends.append(x)
            x = member(x)
            if len(ends) == 2:
                x = x.flatten(1, 3) + encoder.table[0][mine]
            continue
        if isinstance(member, MlpBlock):
            out.normed[number] = member.norm2(x).flatten(1, 3)
            x = member(x)
        else:
            assert isinstance(member, Block)
            out.normed[number] = y = member.norm1(x)
            q, k, v = member.attn.project(y)
            logits = q @ k.mT / q.shape[-1] ** 0.5
            if encoder.shape.relative == "full":
                index = relative_index(4, 4, 0)[mine[:, :, None], mine[:, None]]
                table = member.attn.relative_position_bias_table
                assert table is not None
                logits = logits + table[index].movedim(-1, 1)
            if encoder.shape.relative == "decomposed":
                for table, place in ((member.attn.rel_pos_h, mine // 4), (member.attn.rel_pos_w, mine % 4)):
                    assert table is not None
                    far = table[place[:, :, None] - place[:, None] + 3]
                    logits = logits + torch.einsum("bhqd,bqkd->bhqk", q, far)
            out.attention[number + 1], out.qkv[number + 1] = logits, (q, k, v)
            heads = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = member.add_mlp(member.add_attention(x, member.attn.proj(heads)))
        number += 1
        out.hidden[number] = x if x.dim() == 3 else x.flatten(1, 3)
    out.tokens = out.normed[number] = encoder.norm(x)
    assert out.tokens is not None
    ends.append(x[:, :, None, None])
    out.stages = {s: u.flatten(2, 3) for s, u in zip((2, 4, 8), ends, strict=True)}
    if encoder.levels:
        levels = encoder.pyramid(ends[0], ends[1], out.tokens[:, :, None, None], 3)
        out.levels = {s: v.flatten(2, 3) for s, v in zip((8, 4, 2), levels, strict=True)}
    return out


def assert_same(encoder: HiViT, ours: Features, expected: Features, taps: Taps, masked: bool) -> None:
    for kind in ("hidden", "normed", "attention", "qkv", "stages", "levels"):
        got, want = getattr(ours, kind), getattr(expected, kind)
        if kind in ("stages", "levels") and not masked:
            got = by_patch(ours, kind, encoder)
        assert set(got) == set(getattr(taps, kind)), kind
        for number in got:
            assert_close(
                got[number], want[number], rtol=1e-4, atol=1e-5, msg=lambda m, k=kind, n=number: f"{k} {n}: {m}"
            )
    if taps.tokens:
        assert_near(ours.latent, expected.latent)
    else:
        assert ours.tokens is None


@pytest.mark.parametrize("changes", FORMS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_every_tap_equals_a_plain_computation(changes: dict[str, Any], masked: bool) -> None:
    encoder, mask = make(**changes), masks() if masked else None
    expected, taps = recompute(encoder, images(), mask), everything(encoder)
    assert_same(encoder, encoder(images(), mask, taps=taps), expected, taps, masked)
    widths = [expected.hidden[i].shape[-1] for i in range(6)]
    assert tuple(widths) == encoder.dims == (8, 8, 8, 16, 32, 32)


NEEDS: list[
    tuple[Taps, set[int], set[str]]
] = [  # what is asked, the members of `blocks` that run, parts that do besides
    (Taps(hidden=(0,), tokens=False), set(), set()),
    (Taps(normed=(0,), tokens=False), set(), {"blocks.0.norm2"}),
    (Taps(hidden=(1,), tokens=False), {0}, set()),
    (Taps(hidden=(2,), tokens=False), {0, 1}, set()),
    (Taps(stages=(2,), tokens=False), {0, 1}, set()),
    (Taps(normed=(2,), tokens=False), {0, 1, 2}, {"blocks.3.norm2"}),
    (Taps(stages=(2, 4), tokens=False), {0, 1, 2, 3}, set()),
    (Taps(normed=(3,), tokens=False), {0, 1, 2, 3, 4}, {"blocks.5.norm1"}),
    (Taps(attention=(4,), tokens=False), {0, 1, 2, 3, 4}, {"blocks.5.norm1"}),
    (Taps(qkv=(5,), tokens=False), {0, 1, 2, 3, 4, 5}, {"blocks.6.norm1"}),
    (Taps(stages=(8,), tokens=False), {0, 1, 2, 3, 4, 5, 6}, set()),
    (Taps(hidden=(5,), tokens=False), {0, 1, 2, 3, 4, 5, 6}, set()),
    (Taps(), {0, 1, 2, 3, 4, 5, 6}, {"norm"}),
    (Taps(levels=(8,), tokens=False), {0, 1, 2, 3, 4, 5, 6}, {"norm", "align_dim_16tofpn", "fpn_modules.0"}),
    (
        Taps(levels=(4,), tokens=False),
        {0, 1, 2, 3, 4, 5, 6},
        {
            "norm",
            "align_dim_16tofpn",
            "align_dim_16to8",
            "split_16to8",
            "block_16to8",
            "fpn_modules.0",
            "fpn_modules.1",
        },
    ),
]


@pytest.mark.parametrize(("taps", "members", "parts"), NEEDS)
@torch.no_grad()
def test_nothing_is_computed_beyond_the_taps(taps: Taps, members: set[int], parts: set[str]) -> None:
    encoder = make(**FORMS[3])
    expected, ran = recompute(encoder, images()), Counter[str]()
    for i, member in enumerate(encoder.blocks):
        # a block is told by its second norm, a merge by its only one
        part = member.norm if isinstance(member, PatchMerge) else member.mlp
        part.register_forward_hook(lambda *_, i=i: ran.update([f"{i}"]))
    heads = ("norm", "fpn_modules.", "align_", "split_", "block_")
    for name, module in encoder.named_modules():
        if name.startswith(heads) or (name.startswith("blocks") and name.endswith((".norm1", ".norm2"))):
            module.register_forward_hook(lambda *_, name=name: ran.update([name]))
    features = encoder(images(), taps=taps)
    assert_same(encoder, features, expected, taps, masked=False)
    own = {name for name in ran if name.isdigit()}
    assert own == {str(i) for i in members}
    inside = {f"blocks.{i}.{part}" for i in members for part in ("norm1", "norm2")}
    besides = {n for n in ran if not n.isdigit() and n not in inside}
    assert {n for n in besides if not any(n.startswith(f"{part}.") for part in parts)} == parts
    assert max(ran.values(), default=1) == 1


def test_attention_is_read_from_the_fused_and_the_explicit_product_alike() -> None:
    encoder = make(relative="full")
    plain, tapped = encoder(images()), encoder(images(), taps=Taps(attention=(4, 5)))
    assert_near(tapped.latent, plain.latent)
    q, k, _ = encoder(images(), taps=Taps(qkv=(4,))).qkv[4]
    table = encoder.blocks[5].attn.relative_position_bias_table
    assert_near(
        tapped.attention[4] - attention_logits(q, k),
        table[relative_index(4, 4, 0)].movedim(-1, 0)[None].expand(2, -1, -1, -1),
    )


# ------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("changes", FORMS)
@torch.no_grad()
def test_stages_1_and_2_of_kept_patches_are_those_of_the_whole_image(changes: dict[str, Any]) -> None:
    encoder, mask = make(**changes), masks(0.75)
    taps = Taps(stages=(2, 4), tokens=False)
    whole, shown = by_patch(encoder(images(), taps=taps), "stages", encoder), encoder(images(), mask, taps=taps).stages
    assert mask.ids_keep is not None
    for stride, side in ((2, 4), (4, 2)):
        assert shown[stride].shape == (2, 4, side * side, encoder.stages[stride])
        assert_near(shown[stride], at(whole[stride], mask.ids_keep))


@pytest.mark.parametrize("changes", FORMS)
@torch.no_grad()
def test_patches_in_another_order_give_the_same(changes: dict[str, Any]) -> None:
    """All patches kept, shuffled: positions and biases follow them."""
    encoder, taps = make(**changes), Taps()
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)).argsort(1)
    shuffled = encoder(images(), Mask.from_order(order, 16), taps=taps)
    assert_near(shuffled.latent, at(encoder(images(), taps=taps).latent, order))


@pytest.mark.parametrize("changes", FORMS)
@pytest.mark.parametrize("width", [None, 128, 32])
@torch.no_grad()
def test_what_a_hidden_pixel_reaches(changes: dict[str, Any], width: int | None) -> None:
    """Nothing, when patches are dropped or filled before stage 1; stages 1 and 2 when they are filled after them."""
    encoder, mask, taps = make(**changes), masks(), everything(make(**changes))
    fill = None if width is None else torch.randn(1, 1, width, generator=torch.Generator().manual_seed(4))
    hidden = mask.hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    others = images().where(~hidden, images().flip(0) * 3)
    assert not torch.equal(images(), others)
    one, two = encoder(images(), mask, fill, taps), encoder(others, mask, fill, taps)
    leaks = {kind: {i for i, x in getattr(one, kind).items() if not torch.equal(x, getattr(two, kind)[i])}
             for kind in ("hidden", "normed", "attention", "stages", "levels")}  # fmt: skip
    if width != 32:
        assert not any(leaks.values())
    else:
        # what is normed after block 3 has been merged and filled
        levels = {2, 4} if encoder.levels else set()
        expected = {"hidden": {0, 1, 2, 3}, "normed": {0, 1, 2}, "attention": set(), "stages": {2, 4}, "levels": levels}
        assert leaks == expected
    assert torch.equal(one.latent, two.latent)


@torch.no_grad()
def test_a_fill_replaces_what_hidden_patches_are() -> None:
    encoder, mask = make(), masks()
    fill = torch.arange(128.0).view(1, 1, 128)
    first = encoder(images(), mask, fill, Taps(hidden=(0,), tokens=False)).hidden[0].view(2, 16, 4, 4, 8)
    plain = encoder(images(), taps=Taps(hidden=(0,), tokens=False)).hidden[0].view(2, 16, 4, 4, 8)
    assert torch.equal(first[~mask.hidden], plain[~mask.hidden])
    for patch in first[mask.hidden]:  # channel, row, column
        assert torch.equal(patch.permute(2, 0, 1).flatten(), torch.arange(128.0))
    fill = torch.randn(1, 1, 32)
    entering = encoder(images(), mask, fill, Taps(normed=(3,), tokens=False)).normed[3]
    expected = encoder.blocks[5].norm1(fill + encoder.table).expand(2, -1, -1)
    assert_near(entering[mask.hidden], expected[mask.hidden])


# ----------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("changes", [FORMS[0], FORMS[2], FORMS[3]])
@torch.no_grad()
def test_other_sizes_get_resized_positions(changes: dict[str, Any]) -> None:
    encoder = make(**changes)
    features = encoder(images(48, 24), taps=Taps(stages=(2, 4, 8)))
    assert features.grid == (6, 3)
    assert [tuple(features.stages[s].shape) for s in (2, 4, 8)] == [(2, 8, 24, 12), (2, 16, 12, 6), (2, 32, 6, 3)]
    table = encoder.table.view(1, 4, 4, 32).permute(0, 3, 1, 2)
    plain = F.interpolate(table, (6, 3), mode="bicubic", align_corners=False)
    assert_near(encoder.positions((6, 3)), plain.flatten(2).mT)
    encoder.position_offset = 0.1
    official = F.interpolate(table, scale_factor=(6.1 / 4, 3.1 / 4), mode="bicubic", align_corners=False)
    assert_near(encoder.positions((6, 3)), official.flatten(2).mT)
    assert not torch.equal(encoder.positions((4, 4)), encoder.table)


def test_tables_of_relative_positions_fix_the_grid() -> None:
    with pytest.raises(ConfigError, match=r"fixed to its grid of 4 x 4 patches \(32 px\); got 6 x 4"):
        make(relative="full")(images(48, 32))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"images": torch.zeros(1, 3, 32, 36)}, "image of 32 x 36 px is not divisible by the patch of 8 px"),
        ({}, {"mask": masks(), "fill": torch.zeros(1, 1, 64)}, "cannot fill .* with 64 numbers; expected 128 or 32"),
        ({}, {"taps": Taps(levels=(8,))}, "no levels of stride 8 px in a HiViT.*has none. A pyramid is part of iTPN"),
        (PYRAMID, {"taps": Taps(levels=(16,))}, "no levels of stride 16 px .*: it has those of stride 2, 4, 8 px"),
        ({}, {"taps": Taps(stages=(16,))}, "no stages of stride 16 px .*: it has those of stride 2, 4, 8 px"),
        (
            {},
            {"taps": Taps(attention=(3,))},
            "no attention of block 3: .* attends to the whole image in the blocks 4, 5",
        ),
        ({}, {"taps": Taps(hidden=(6,))}, "no hidden of block 6: this encoder has blocks 0 to 5"),
        ({}, {"mask": Mask.from_noise(torch.rand(2, 9), 0.5)}, "the mask has 9 units, the image 4 x 4 patches"),
    ],
)
def test_wrong_inputs_are_told(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)(**{"images": images(), **arguments})


def test_a_patch_without_4_x_4_parts_is_told() -> None:
    with pytest.raises(ConfigError, match=r"a patch of 6 px has no 4 x 4 parts; set encoder\.patch to a multiple of 4"):
        make(patch=6)


# --------------------------------------------------------------------------------------------------- training


def test_what_kind_of_encoder_it_is() -> None:
    plain, pyramid = make(), make(**PYRAMID)
    assert (plain.patch, plain.dim, plain.depth, plain.heads, plain.prefix, plain.unit) == (8, 32, 5, 2, 0, 1)
    assert (plain.grid, plain.units, plain.attending, plain.fills) == ((4, 4), 16, (4, 5), (128, 32))
    assert plain.stages == pyramid.stages == {2: 8, 4: 16, 8: 32}
    assert (plain.levels, plain.decodes) == ({}, "stages")
    assert (pyramid.levels, pyramid.decodes) == ({2: 16, 4: 16, 8: 16}, "levels")
    mask = masks()
    assert plain.patch_mask(mask) is mask


def test_layers_for_decay() -> None:
    for changes in FORMS:
        encoder = make(**changes)
        members = {0: 1, 1: 2, 2: 2, 3: 3, 4: 3, 5: 4, 6: 5}  # 2 and 4 are merges
        for name, _ in encoder.named_parameters():
            if name.startswith("blocks."):
                expected = members[int(name.split(".")[1])]
            else:
                expected = 0 if name.startswith(("absolute_pos_embed", "pos_embed", "patch_embed.")) else 6
            assert encoder.layer_of(name) == expected, name


@pytest.mark.parametrize("changes", FORMS)
def test_every_parameter_learns(changes: dict[str, Any]) -> None:
    encoder = make(**changes)
    features = encoder(images(), masks(), taps=Taps(levels=tuple(encoder.levels)))
    sum(x.square().mean() for x in (features.latent, *features.levels.values())).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("changes", FORMS)
@torch.no_grad()
def test_bfloat16_is_near(changes: dict[str, Any]) -> None:
    encoder = make(**changes)
    taps = Taps(levels=tuple(encoder.levels), stages=(2, 4, 8))
    exact = encoder(images(), masks(), taps=taps)
    with torch.autocast("cpu", torch.bfloat16):
        near = encoder(images(), masks(), taps=taps)
    assert F.cosine_similarity(near.latent.float().flatten(1), exact.latent.flatten(1)).min() > 0.999
    for level in encoder.levels:
        assert F.cosine_similarity(near.levels[level].float().flatten(1), exact.levels[level].flatten(1)).min() > 0.999


def test_drop_path_grows_over_all_blocks_and_spares_the_pyramid() -> None:
    encoder = HiViT(HiViTShape(**SHAPE, **PYRAMID), drop_path=0.4)
    rates = [getattr(m.drop_path, "rate", 0.0) for m in encoder.blocks if not isinstance(m, PatchMerge)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    spared = [m for m in encoder.modules() if isinstance(m, MlpBlock) and m not in list(encoder.blocks)]
    assert [type(m.drop_path) for m in spared] == [nn.Identity] * 5
    constant = HiViT(HiViTShape(**SHAPE), drop_path=0.4, constant_drop_path=True)
    assert [m.drop_path.rate for m in constant.blocks if not isinstance(m, PatchMerge)] == pytest.approx([0.4] * 5)


def spread(encoder: HiViT, part: str) -> float:
    """Standard deviation of the entries of all weights of a kind."""
    return float(torch.cat([p.detach().flatten() for n, p in encoder.named_parameters() if n.endswith(part)]).std())


def test_initialisation_of_hivit() -> None:
    torch.manual_seed(0)
    shape = HiViTShape(**{**SHAPE, "dim": 128}, relative="full", **PYRAMID)
    encoder = HiViT(shape)
    for part in ("qkv.weight", "fc1.weight", "fc2.weight", "reduction.weight", "align_dim_16to8.weight"):
        assert spread(encoder, part) == pytest.approx(0.02, rel=0.05)
    assert encoder.table.requires_grad
    # column first: the first quarter is the sine of the column
    assert_close(encoder.table[0, :8, 0], torch.arange(4.0).repeat(2).sin())
    assert spread(encoder, "relative_position_bias_table") == 0
    encoder.init_classifier_()
    for part in ("qkv.weight", "relative_position_bias_table", "absolute_pos_embed"):
        assert spread(encoder, part) == pytest.approx(0.02, rel=0.1)
    encoder.init_mae_()
    assert spread(encoder, "relative_position_bias_table") == 0
    learned = HiViT(HiViTShape(**SHAPE, position="learned"))
    assert spread(learned, "absolute_pos_embed") == pytest.approx(0.02, rel=0.1)


def test_initialisation_of_fast_itpn() -> None:
    torch.manual_seed(0)
    encoder = HiViT(HiViTShape(**{**SHAPE, "dim": 128, **FORMS[3]}))
    encoder.init_mae_()  # a second time: nothing is scaled twice
    scale = math.sqrt(math.log(2 * 2))
    xavier = (2 / (128 + 128)) ** 0.5
    assert spread(encoder, "attn.q_proj.weight") == pytest.approx(xavier, rel=0.05)
    assert spread(encoder, "attn.v_proj.weight") == pytest.approx(xavier * scale, rel=0.05)
    assert spread(encoder, "attn.proj.weight") == pytest.approx(xavier * scale, rel=0.05)
    assert spread(encoder, "mlp.w3.weight") == pytest.approx((2 / (128 * 4)) ** 0.5 * scale, rel=0.05)
    # PyTorch's convolutions are uniform within 1 / sqrt(inputs)
    assert spread(encoder, "blocks.0.mlp.fc1.weight") == pytest.approx((3 * 32) ** -0.5 * scale, rel=0.05)
    assert float(encoder.patch_embed.proj.weight.detach().abs().max()) == pytest.approx(
        (6 / (32 + 12)) ** 0.5, rel=0.05
    )
    assert spread(encoder, "pos_embed") == pytest.approx(0.02, rel=0.1)
    assert torch.equal(encoder.blocks[5].gamma_1, torch.full((128,), 0.1))
