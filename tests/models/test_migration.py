from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mimlet.config import EncoderSettings
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models import hivit, migration
from mimlet.models.features import Taps
from mimlet.models.gathering import cut
from mimlet.models.hivit import HiViT
from mimlet.models.migration import Migration, choose, leaving, take
from mimlet.models.shapes import HiViTShape, ViTShape
from mimlet.models.vit import ViT
from tests.models import loops
from tests.shared import Golden, golden

SHAPE = ViTShape(image_size=32, patch=8, dim=24, depth=3, heads=3, migration=0.5)


def make(**changes: Any) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(**{**vars(SHAPE), **changes}))
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.eval()


def images(rows: int = 32, columns: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def encoder_of(oracle: Golden, **dense: Any) -> HiViT:
    made = oracle.meta["constructor"]
    shape = HiViTShape(
        image_size=made["img_size"],
        patch=made["patch_size"],
        dim=made["embed_dim"],
        stages=(made["depth_stage1"], made["depth_stage2"], made["depth"]),
        heads=made["num_heads"],
        mlp_ratio=made["bridge_mlp_ratio"],
        form="fast",
        position="learned",
        layer_scale=made["init_values"],
        pyramid_dim=made["fpn_dim"],
        pyramid_depth=made["fpn_depth"],
        pyramid_hidden=int(made["fpn_dim"] * made["mlp_ratio"]),
        **dense,
    )
    encoder = HiViT(shape)
    encoder.load_state_dict({name.removeprefix("model."): weight for name, weight in oracle.weights.items()})
    return encoder.eval()


@pytest.mark.parametrize("variant", ["none", "global", "win"])
def test_reference(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = golden("token_migration")
    given = oracle.meta["variants"][variant]
    plan, passes = given["r_per_layer_per_window"], list[Migration]()

    class Recorded(Migration):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            passes.append(self)

    monkeypatch.setattr(hivit, "Migration", Recorded)
    monkeypatch.setattr(migration, "leaving", lambda *_: plan)  # the oracle's, which no ratio gives
    ratio = 0.25 if any(plan) else 0.0
    encoder = encoder_of(oracle, window=given["window"] or 0, migration=ratio)
    out = encoder(oracle.io["imgs"], taps=Taps(hidden=(encoder.depth,), levels=(4, 8, 16)))
    assert_close(out.hidden[encoder.depth], oracle.io[f"{variant}_tokens"], **oracle.tolerance)
    for stride, level in out.levels.items():
        if f"{variant}_p{stride}" in oracle.io:
            assert_close(level, oracle.io[f"{variant}_p{stride}"], **oracle.tolerance)
    if not ratio:
        assert not passes
        return
    assert torch.equal(passes[0].places, oracle.io[f"{variant}_kept_pos"])
    for layer, (_, places) in enumerate(passes[0].left):
        assert torch.equal(places, oracle.io[f"{variant}_dropped_pos_layer{layer}"])


def test_share_is_spread_evenly_over_the_blocks() -> None:
    assert leaving(0.25, 64, 3) == [5, 5, 6]
    assert leaving(0.3, 10, 4) == [0, 1, 1, 1]
    assert leaving(0.0, 10, 2) == [0, 0]
    assert sum(leaving(0.29, 100, 7)) == 29  # 0.29 * 100 is 28.999... in floating point
    for ratio, exact in ((0.1, (1, 10)), (0.35, (7, 20)), (0.4, (2, 5))):
        for tokens in (1, 7, 49, 196, 2500):
            for blocks in (1, 3, 12):
                numbers = leaving(ratio, tokens, blocks)
                assert len(numbers) == blocks
                assert sum(numbers) == tokens * exact[0] // exact[1]
                assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ConfigError, match=rf"encoder.migration {ratio}: .* at least 0 and less than 1"):
        make(migration=ratio)(images())
    with pytest.raises(ValueError, match="migration"):
        EncoderSettings(name="fast_itpn_tiny", migration=ratio)


def test_choice_by_hand() -> None:
    angles = torch.tensor([0.0, 0.3, 1.0, 1.1, 3.0])  # first set: 0, 1.0, 3.0; second: 0.3, 1.1
    keys = 7 * torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 3, 1, 2, 5])[:, None]
    for number, gone in ((1, [2]), (2, [0, 2])):
        left, kept = choose(keys, number)
        assert left.tolist() == gone
        assert kept.tolist() == [i for i in range(5) if i not in gone]


def test_of_equal_tokens_the_first_leave() -> None:
    left, kept = choose(torch.ones(2, 7, 4), 2)
    assert left.tolist() == [[0, 2]] * 2
    assert kept.tolist() == [[1, 3, 4, 5, 6]] * 2


def test_choice_is_exact_under_autocast() -> None:
    keys = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
    expected = choose(keys, 10)
    with torch.autocast("cpu", torch.bfloat16):
        given = choose(keys, 10)
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1], expected[1])


@pytest.mark.parametrize(("grid", "side"), [((4, 4), 4), ((6, 6), 3), ((7, 7), 3), ((3, 10), 4)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_every_place_exactly_once(grid: tuple[int, int], side: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    N, blocks = grid[0] * grid[1], 3
    image = torch.randn(2, prefix + N, 6, generator=generator)
    order, groups = cut(grid, side, torch.device("cpu"))
    way = Migration(order, groups, 0.6, blocks)
    x = take(image, torch.cat([torch.arange(prefix), prefix + order])[None])
    assert torch.equal(way.whole(x), image)
    for block in range(blocks):
        before = way.places.shape[1]
        x = way.step(block, x, torch.randn(2, 3, prefix + before, 4, generator=generator))
        assert x.shape[1] - prefix == way.places.shape[1] == sum(count * size for count, size in way.groups) < before
        places = torch.cat([way.places.expand(2, -1), *(gone for _, gone in way.left)], dim=1)
        assert torch.equal(places.sort().values, torch.arange(N).expand(2, -1))
        for windows, (count, size) in zip(
            way.places.split([count * size for count, size in way.groups], dim=1), way.groups, strict=True
        ):
            windows = windows.view(2, count, size)
            assert (windows.diff() > 0).all()
            of = windows // grid[1] // side * 100 + windows % grid[1] // side
            assert (of == of[:1, :, :1]).all()
        assert torch.equal(way.whole(x), image)


def test_no_block_drops_more_than_half() -> None:
    way = Migration(torch.arange(5), ((1, 5),), 0.9, 1)
    assert way.step(0, torch.zeros(1, 5, 2), torch.randn(1, 1, 5, 2)).shape == (1, 3, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False},
        {"distillation_token": True, "layer_scale": 0.5},
        {"relative": "full"},
        {"relative": "shared", "position": "none"},
    ],
)
def test_vit_equals_loops_with_gradients(changes: dict[str, Any]) -> None:
    encoder = make(**changes).double()
    given = images(dtype=torch.float64)
    out = encoder(given, taps=Taps(hidden=(0, 3)))
    expected = torch.stack([loops.vit(encoder, tokens) for tokens in out.hidden[0]])
    assert_close(out.hidden[3], expected)
    assert_close(out.tokens, encoder.norm(expected))
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    learned = [parameter for name, parameter in encoder.named_parameters() if not name.startswith("norm.")]
    learned = [parameter for parameter in learned if parameter.requires_grad]
    ours = torch.autograd.grad((out.hidden[3] * direction).sum(), learned, retain_graph=True)
    theirs = torch.autograd.grad((expected * direction).sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("relative", ["none", "full", "decomposed"])
@pytest.mark.parametrize("form", ["fast", "hivit"])
def test_hivit_equals_loops(form: Any, relative: Any) -> None:
    torch.manual_seed(0)
    encoder = HiViT(HiViTShape(64, 16, 16, (1, 1, 3), 2, form=form, relative=relative, migration=0.4)).eval().double()
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    entering = list[Tensor]()
    encoder.blocks[3].register_forward_hook(lambda *answer: entering.append(answer[-1].flatten(1, 3)))
    size = (64, 64) if relative == "full" else (48, 80) if relative == "none" else (64, 64)
    out = encoder(images(*size, torch.float64), taps=Taps(hidden=(5,)))
    tokens = entering[0] + encoder.positions(out.grid)
    assert_close(out.hidden[5], torch.stack([loops.stage3(encoder, image, out.grid) for image in tokens]))


def test_nothing_leaves_nothing_changes() -> None:
    plain, slow = make(migration=0.0), make(migration=0.06)  # 0.06 of 16 patches are none
    assert plain.state_dict().keys() == slow.state_dict().keys()
    assert torch.equal(plain(images()).latent, slow(images()).latent)


def test_whole_grid_comes_back_at_any_size() -> None:
    encoder = make()
    out = encoder(images(24, 56), taps=Taps(hidden=(0, 1, 2, 3), normed=(0, 1, 2, 3)))
    assert out.grid == (3, 7)
    for number in range(4):
        assert out.hidden[number].shape == (2, 1 + 21, 24)
        norm = encoder.norm if number == 3 else encoder.blocks[number].norm1
        assert torch.equal(out.normed[number], norm(out.hidden[number]))
    still = (out.hidden[1] == out.hidden[3]).all(-1).sum(1)  # 3 of 21 patches left in block 1
    assert still.tolist() == [3, 3]


def test_attention_of_the_first_block_only() -> None:
    plain, encoder = make(migration=0.0), make()
    taps = Taps(attention=(1,), qkv=(1,))
    ours, theirs = encoder(images(), taps=taps), plain(images(), taps=taps)
    assert torch.equal(ours.attention[1], theirs.attention[1])
    assert all(map(torch.equal, ours.qkv[1], theirs.qkv[1]))
    with pytest.raises(
        ConfigError, match=r"no attention of block 2: .* attends to the whole image in the blocks 1 only"
    ):
        encoder(images(), taps=Taps(attention=(2,)))


def test_hidden_patches_are_not_dropped_but_filled() -> None:
    encoder, mask = make(), Mask.from_noise(torch.rand(2, 16), 0.5)
    with pytest.raises(ConfigError, match=r"dense inputs; set encoder.window=0 and encoder.migration=0"):
        encoder(images(), mask)
    assert encoder(images(), mask, torch.zeros(1, 1, 24)).latent.shape == (2, 17, 24)
