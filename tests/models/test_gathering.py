from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.config import EncoderSettings
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models import hivit, migration
from mimlet.models.features import Taps
from mimlet.models.gathering import CrossAttention, apart, cut, joined, together
from mimlet.models.hivit import HiViT
from mimlet.models.migration import Migration, take
from mimlet.models.parts import attention_logits
from mimlet.models.shapes import HiViTShape
from tests.models import loops
from tests.models.test_migration import encoder_of
from tests.shared import golden

SHAPE = HiViTShape(
    image_size=80, patch=16, dim=16, stages=(1, 1, 3), heads=2, form="fast", position="learned", layer_scale=0.1
)
PYRAMID = {"pyramid_dim": 8, "pyramid_depth": 1, "pyramid_hidden": 12}
ALL_OF_IT = {"window": 3, "gathering": "to_tokens", "window_relative": True, "migration": 0.4}


def fresh(**changes: Any) -> HiViT:
    torch.manual_seed(0)
    return HiViT(HiViTShape(**{**vars(SHAPE), **changes})).eval()


def make(**changes: Any) -> HiViT:
    encoder = fresh(**changes)
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return encoder


def images(rows: int = 80, columns: int = 80, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("variant", "dense"),
    [
        ("wmsa", {}),
        ("gt", {"gathering": "to_tokens"}),
        ("gt_hrpe", {"gathering": "to_tokens", "window_relative": True}),
        ("gt_hrpe_mig", {"gathering": "to_tokens", "window_relative": True, "migration": 0.25}),
    ],
)
def test_reference(variant: str, dense: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = golden("token_gathering")
    passes, ends = list[Migration](), list[Tensor]()

    class Recorded(Migration):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            passes.append(self)

        def whole(self, x: Tensor) -> Tensor:
            ends.append(x)
            return super().whole(x)

    monkeypatch.setattr(hivit, "Migration", Recorded)
    assert migration.leaving(0.25, 16, 2) == oracle.meta["variants"]["gt_hrpe_mig"]["r_per_layer_per_window"]
    for unused, part in (("cross.", "gathering"), ("gathering_token", "gathering"), ("window_rpe.", "window_relative")):
        if part not in dense:
            for name in [name for name in oracle.weights if name.startswith(unused)]:
                del oracle.weights[name]
    encoder = encoder_of(oracle, window=oracle.meta["window"], **dense)
    out = encoder(oracle.io["imgs"], taps=Taps(hidden=(encoder.depth,), levels=(4, 8, 16)))
    assert_close(out.hidden[encoder.depth], oracle.io[f"{variant}_tokens"], **oracle.tolerance)
    for stride, level in out.levels.items():
        if f"{variant}_p{stride}" in oracle.io:
            assert_close(level, oracle.io[f"{variant}_p{stride}"], **oracle.tolerance)
    if "gathering" in dense:
        assert_close(ends[-1][:, :4], oracle.io[f"{variant}_gathering_tokens"], **oracle.tolerance)
    if "migration" in dense:
        assert torch.equal(passes[0].places, oracle.io[f"{variant}_kept_pos"])
        for layer, (_, places) in enumerate(passes[0].left):
            assert torch.equal(places, oracle.io[f"{variant}_dropped_pos_layer{layer}"])


def test_windows_by_hand() -> None:
    order, groups = cut((3, 5), 2, torch.device("cpu"))
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert groups == ((2, 4), (1, 2), (2, 2), (1, 1))
    assert cut((2, 2), 5, torch.device("cpu"))[1] == ((1, 4),)
    assert cut((2, 6), 3, torch.device("cpu"))[1] == ((2, 6),)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (5, 3), (2, 9), (7, 7)])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 14])
def test_windows_hold_every_patch_once(grid: tuple[int, int], side: int) -> None:
    order, groups = cut(grid, side, torch.device("cpu"))
    assert order.sort().values.tolist() == list(range(grid[0] * grid[1]))
    for windows, (count, size) in zip(order.split([count * size for count, size in groups]), groups, strict=True):
        rows, columns = windows.view(count, size) // grid[1], windows.view(count, size) % grid[1]
        assert (rows // side == rows[:, :1] // side).all()
        assert (columns // side == columns[:, :1] // side).all()
    assert sum(count for count, _ in groups) == -(-grid[0] // side) * -(-grid[1] // side)
    image = torch.randn(2, len(order), 4)
    assert torch.equal(Migration(order, groups, 0.0, 1).whole(take(image, order[None])), image)


@pytest.mark.parametrize("prefix", [0, 6])
def test_apart_and_together(prefix: int) -> None:
    groups = ((2, 4), (1, 2), (2, 2), (1, 1))
    x = torch.randn(3, 2, prefix + 15, 4)
    lead = int(prefix > 0)
    windows = apart(x[:, :, joined(groups, x.device)] if lead else x, groups, lead)
    assert [w.shape for w in windows] == [(3 * count, 2, size + lead, 4) for count, size in groups]
    assert torch.equal(windows[0][1, :, lead:], x[0, :, prefix + 4 : prefix + 8])
    if prefix:
        assert torch.equal(windows[2][4, :, 0], x[2, :, 3])
    assert torch.equal(together(windows, groups, lead), x)


@pytest.mark.parametrize("form", ["fast", "hivit"])
@pytest.mark.parametrize(
    "dense",
    [
        {"window": 3},
        {"window": 2, "window_relative": True, "global_blocks": (2,)},
        {"window": 3, "gathering": "to_tokens"},
        {"window": 3, "gathering": "from_tokens", "window_relative": True},
        {"window": 3, "migration": 0.5, "global_blocks": (1, 3)},
        {**ALL_OF_IT, "global_blocks": (2,)},
        {**ALL_OF_IT, "gathering": "from_tokens"},
        {**ALL_OF_IT, "window": 9},
    ],
)
def test_equals_loops_with_gradients(form: Any, dense: dict[str, Any]) -> None:
    """Windows at the edges against whole windows with padding and masked keys."""
    encoder = make(form=form, **dense).double()
    entering = list[Tensor]()
    encoder.blocks[3].register_forward_hook(lambda *answer: entering.append(answer[-1].flatten(1, 3)))
    out = encoder(images(64, 80, torch.float64), taps=Taps(hidden=(5,), tokens=False))
    tokens = entering[0] + encoder.positions(out.grid)
    expected = torch.stack([loops.stage3(encoder, image, out.grid) for image in tokens])
    assert_close(out.hidden[5], expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, learned = zip(*encoder.named_parameters(), strict=True)
    ours = torch.autograd.grad((out.hidden[5] * direction).sum(), learned, retain_graph=True)
    theirs = torch.autograd.grad((expected * direction).sum(), learned, allow_unused=True)
    for name, a, b in zip(names, ours, theirs, strict=True):
        expected = torch.zeros_like(a) if b is None else b  # what the last block gathers is read by nobody
        assert_close(a, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_every_parameter_learns() -> None:
    encoder = make(**ALL_OF_IT).train()
    encoder(images()).latent.square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize("window", [5, 14])
def test_one_window_over_everything_changes_nothing(window: int) -> None:
    plain, encoder = make(**PYRAMID), make(**PYRAMID, window=window)
    assert plain.state_dict().keys() == encoder.state_dict().keys()
    taps = Taps(hidden=(3, 5), levels=(4, 8, 16))
    ours, theirs = encoder(images(), taps=taps), plain(images(), taps=taps)
    assert torch.equal(ours.latent, theirs.latent)
    for stride in taps.levels:
        assert torch.equal(ours.levels[stride], theirs.levels[stride])


def test_windows_cut_what_a_token_sees() -> None:
    encoder, given = make(window=3), images()
    changed = given.clone()
    changed[:, :, 48:, :48] += 1  # the windows at the bottom left
    difference = (encoder(given).latent != encoder(changed).latent).any(-1).view(2, 5, 5)
    assert difference[:, 3:, :3].all()
    assert not difference[:, :3].any()
    assert not difference[:, :, 3:].any()


@pytest.mark.parametrize("gathering", ["to_tokens", "from_tokens"])
def test_gathering_carries_information_across_windows(gathering: Any) -> None:
    encoder, given = make(window=3, gathering=gathering), images()
    changed = given.clone()
    changed[:, :, 48:, :48] += 1
    assert (encoder(given).latent != encoder(changed).latent).any(-1).all()


@pytest.mark.parametrize("gathering", ["to_tokens", "from_tokens"])
@pytest.mark.parametrize("form", ["fast", "hivit"])
def test_cross_attention_starts_as_nothing(gathering: Any, form: Any) -> None:
    encoder = fresh(window=3, gathering=gathering, window_relative=True, form=form)
    for init in (encoder.init_mae_, encoder.init_classifier_):
        init()
        assert encoder.gathering_token is not None
        assert 0.01 < encoder.gathering_token.std() < 0.04
        assert not any(table.any() for table in encoder.window_rpe.values())
        for part in encoder.cross.values():
            assert isinstance(part, CrossAttention)
            assert part.q_proj.weight.any()
            tokens, tokens_of_windows = torch.randn(2, 25, 16), torch.randn(2, 4, 16)
            assert not part.to_tokens(tokens, tokens_of_windows).any()
            assert not part.from_tokens(tokens_of_windows, tokens).any()
            branch = part.to_tokens(tokens, tokens_of_windows).sum()
            assert torch.autograd.grad(branch, part.proj.weight)[0].any()


def test_names_of_the_parts() -> None:
    plain, encoder = fresh(), fresh(**ALL_OF_IT, global_blocks=(2,))
    more = encoder.state_dict().keys() - plain.state_dict().keys()
    parts = [
        *(f"{norm}.{kind}" for norm in ("norm_q", "norm_kv") for kind in ("weight", "bias")),
        *(f"{proj}.weight" for proj in ("q_proj", "k_proj", "v_proj", "proj")),
        *(f"{proj}.bias" for proj in ("q_proj", "v_proj", "proj")),
        "gamma",
    ]
    assert more == {
        "gathering_token",
        "window_rpe.0",
        "window_rpe.2",
        *(f"cross.{i}.{part}" for i in (0, 2) for part in parts),
    }
    assert encoder.state_dict()["window_rpe.0"].shape == (5 * 5 + 3, 2)
    layers = {name: encoder.layer_of(name) for name in ("gathering_token", "cross.0.gamma", "window_rpe.2")}
    assert layers == {"gathering_token": 3, "cross.0.gamma": 3, "window_rpe.2": 5}


def test_taps_show_the_whole_grid() -> None:
    encoder = make(**{**ALL_OF_IT, "global_blocks": (1, 3)})
    out = encoder(images(48, 80), taps=Taps(hidden=(2, 3, 4, 5), normed=(2, 3, 4, 5)))
    for number in (3, 4, 5):
        assert out.hidden[number].shape == (2, 15, 16)
        following = encoder.norm if number == 5 else encoder.blocks[number + 2].norm1
        assert torch.equal(out.normed[number], following(out.hidden[number]))
    assert torch.equal(out.hidden[5], out.latent)
    stopped = encoder(images(48, 80), taps=Taps(hidden=(3,), tokens=False))
    assert torch.equal(stopped.hidden[3], out.hidden[3])
    assert stopped.tokens is None


def test_attention_of_global_blocks() -> None:
    encoder = make(window=3, gathering="to_tokens", global_blocks=(2,))
    assert encoder.attending == (4,)
    out = encoder(images(48, 80), taps=Taps(attention=(4,), qkv=(4,), normed=(3,)))
    block = encoder.blocks[5]
    q, k, v = block.attn.project(out.normed[3])
    assert all(map(torch.equal, out.qkv[4], (q, k, v)))
    assert torch.equal(out.attention[4], attention_logits(q, k))
    for taps in (Taps(attention=(3,)), Taps(qkv=(5,))):
        with pytest.raises(ConfigError, match="attends to the whole image in the blocks 4 only"):
            encoder(images(), taps=taps)


def test_no_block_attends_to_the_whole_image() -> None:
    encoder = make(window=3)
    for wrong in (lambda: encoder(images(), taps=Taps(attention=(3,))), encoder.attending_block):
        with pytest.raises(ConfigError, match=r"no block .* whole image; set encoder.window=0 and encoder.migration=0"):
            wrong()


def test_hidden_patches_are_not_dropped_but_filled() -> None:
    encoder, mask = make(**ALL_OF_IT), Mask.from_noise(torch.rand(2, 25), 0.6)
    with pytest.raises(ConfigError, match=r"dense inputs; set encoder.window=0 and encoder.migration=0"):
        encoder(images(), mask)
    assert encoder(images(), mask, torch.zeros(1, 1, 64)).latent.shape == (2, 25, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 14, "global_blocks": list(range(1, 13))}, "leaves none to encoder.window; remove one"),
        ({"window": -1}, "window"),
        ({"window": 14, "gathering": "both"}, "gathering"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderSettings(name="fast_itpn_tiny", **wrong)


class Exported(nn.Module):
    """An encoder as an exporter takes it: images to a tensor."""

    def __init__(self, encoder: HiViT) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, given: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(given).latent
        return tokens


def test_torch_export() -> None:
    module = Exported(make(**{**ALL_OF_IT, "stages": (1, 1, 2)}))
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(module, (images(64, 48),), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 3, 64, 48)
    assert_close(program.module()(more), module(more), atol=1e-5, rtol=1e-4)
