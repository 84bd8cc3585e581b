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

from mimlet.config import EncoderSettings
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models.build import build_encoder
from mimlet.models.features import Features, Taps
from mimlet.models.parts import relative_index, resize_positions, sincos_positions
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT

SHAPE = ViTShape(image_size=32, patch=8, dim=24, depth=3, heads=3)
ALL = Taps(hidden=(0, 1, 2, 3), normed=(0, 1, 2, 3), attention=(1, 2, 3), qkv=(1, 2, 3))


def make(**changes: Any) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(**{**vars(SHAPE), **changes}))
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def masks(ratio: float = 0.5, units: int = 16) -> Mask:
    return Mask.from_noise(torch.rand(2, units, generator=torch.Generator().manual_seed(2)), ratio)


def recompute(encoder: ViT, x: Tensor, index: Tensor | None = None) -> Features:
    """Every tap by the textbook, from the embedded tokens [B,T,D]."""
    out = Features(encoder.prefix, encoder.grid)
    out.hidden[0] = x
    for number, block in enumerate(encoder.blocks, 1):
        y = block.norm1(x)
        out.normed[number - 1] = y
        q, k, v = block.attn.qkv(y).view(*y.shape[:2], 3, encoder.heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if index is not None:
            logits = logits + block.attn.relative_position_bias_table[index].movedim(-1, -3)
        x = x + block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias)))
        out.attention[number], out.qkv[number], out.hidden[number] = logits, (q, k, v), x
    out.normed[len(encoder.blocks)] = out.tokens = encoder.norm(x)
    return out


def assert_same(ours: Features, expected: Features, taps: Taps) -> None:
    for kind in ("hidden", "normed", "attention", "qkv"):
        got, want = getattr(ours, kind), getattr(expected, kind)
        assert set(got) == set(getattr(taps, kind)), kind
        for number in got:
            assert_close(
                got[number], want[number], rtol=1e-4, atol=1e-5, msg=lambda m, k=kind, n=number: f"{k} {n}: {m}"
            )
    if taps.tokens:
        assert_close(ours.latent, expected.latent, rtol=1e-4, atol=1e-5)
    else:
        assert ours.tokens is None


# ------------------------------------------------------------------------------------------------------- taps


SUBSETS = [
    Taps(),
    ALL,
    Taps(hidden=(2,), tokens=False),
    Taps(hidden=(0,), tokens=False),
    Taps(normed=(0,), tokens=False),
    Taps(normed=(3,), tokens=False),
    Taps(attention=(1,), tokens=False),
    Taps(attention=(3,), tokens=False),
    Taps(qkv=(2,), tokens=False),
    Taps(normed=(1,), attention=(2,), tokens=False),
    Taps(attention=(2,)),
    Taps(hidden=(1,), attention=(3,), qkv=(1,), tokens=False),
    Taps(hidden=(3,), normed=(2,), tokens=False),
    Taps(tokens=False),
]


@pytest.mark.parametrize("taps", SUBSETS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_tap_equals_a_plain_computation(taps: Taps, masked: bool) -> None:
    encoder, mask = make(), masks() if masked else None
    x, grid = encoder.embed(images(), mask)
    assert grid == (4, 4)
    features = encoder(images(), mask, taps=taps)
    assert (features.prefix, features.grid) == (1, (4, 4))
    assert_same(features, recompute(encoder, x), taps)


@contextmanager
def counted(encoder: ViT) -> Iterator[Counter[str]]:
    """Counts calls of every submodule, by name."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in encoder.named_modules()
        if name and not isinstance(module, nn.ModuleList | nn.Identity)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def block_parts(number: int, *parts: str) -> set[str]:
    return {f"blocks.{number - 1}.{part}" for part in parts}


WHOLE = ("norm1", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(
    ("taps", "expected"),
    [
        (Taps(hidden=(0,), tokens=False), set()),
        (Taps(normed=(0,), tokens=False), block_parts(1, "norm1")),
        (Taps(attention=(1,), tokens=False), block_parts(1, "norm1")),
        (Taps(attention=(2,), tokens=False), block_parts(1, *WHOLE) | block_parts(2, "norm1")),
        (Taps(hidden=(1,), qkv=(2,), tokens=False), block_parts(1, *WHOLE) | block_parts(2, "norm1")),
        (Taps(hidden=(2,), tokens=False), block_parts(1, *WHOLE) | block_parts(2, *WHOLE)),
        (
            Taps(normed=(3,), tokens=False),
            {"norm"} | block_parts(1, *WHOLE) | block_parts(2, *WHOLE) | block_parts(3, *WHOLE),
        ),
        (Taps(attention=(2,)), {"norm"} | block_parts(1, *WHOLE) | block_parts(2, *WHOLE) | block_parts(3, *WHOLE)),
    ],
)
def test_nothing_runs_beyond_the_last_tap(taps: Taps, expected: set[str]) -> None:
    encoder = make()
    with counted(encoder) as calls:
        encoder(images(), taps=taps)
    untapped = {f"blocks.{i}{part}" for i in range(3) for part in ("", ".attn", ".attn.qkv")}
    ran = set(calls) - untapped - {"patch_embed", "patch_embed.proj"}
    assert ran == expected
    assert max(calls.values()) == 1


def test_a_tap_on_logits_alone_projects_only_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make()
    outputs: list[int] = []

    def recording(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs.append(len(weight))
        return F.linear(x, weight, bias)

    monkeypatch.setattr("mimlet.models.parts.linear", recording)
    features = encoder(images(), taps=Taps(attention=(3,), tokens=False))
    assert outputs == [72, 72, 48]
    monkeypatch.undo()
    assert_close(features.attention[3], encoder(images(), taps=ALL).attention[3])


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (Taps(attention=(0,)), "no attention of block 0: this encoder has blocks 1 to 3"),
        (Taps(qkv=(4,)), "no qkv of block 4: this encoder has blocks 1 to 3"),
        (Taps(hidden=(4,)), "no hidden of block 4: this encoder has blocks 0 to 3"),
        (Taps(normed=(-1,)), "no normed of block -1"),
        (Taps(levels=(16,)), "no levels of stride 16 px in a plain ViT: it has none"),
    ],
)
def test_impossible_taps(taps: Taps, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()(images(), taps=taps)


# -------------------------------------------------------------------------------------------- equality with timm


@pytest.mark.parametrize("class_token", [True, False])
def test_equals_timm(class_token: bool) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=0,
        global_pool="",
        class_token=class_token,
    ).eval()
    encoder = make(class_token=class_token)
    model.load_state_dict(encoder.state_dict())
    assert_close(encoder(images()).latent, model(images()), rtol=1e-5, atol=1e-5)
    assert encoder.prefix == class_token


# ------------------------------------------------------------------------------------------- sizes and masks


@pytest.mark.parametrize(("height", "width"), [(48, 48), (16, 16), (24, 40)])
def test_input_of_another_size(height: int, width: int) -> None:
    encoder = make()
    batch = torch.randn(2, 3, height, width)
    features = encoder(batch)
    grid = (height // 8, width // 8)
    assert features.grid == grid
    table = resize_positions(encoder.pos_embed, (4, 4), grid, 1)
    patches = encoder.patch_embed.proj(batch).flatten(2).mT + table[:, 1:]
    x = torch.cat([(encoder.cls_token + table[:, :1]).expand(2, -1, -1), patches], dim=1)
    assert_close(features.latent, recompute(encoder, x).latent, rtol=1e-4, atol=1e-5)


def test_other_size_equals_a_model_of_that_size() -> None:
    encoder, larger = make(), make(image_size=48)
    state = encoder.state_dict()
    state["pos_embed"] = resize_positions(state["pos_embed"], (4, 4), (6, 6), 1)
    larger.load_state_dict(state)
    assert_close(encoder(images(48)).latent, larger(images(48)).latent)


@pytest.mark.parametrize("class_token", [True, False])
def test_dropping_equals_gathering_the_embedded_patches(class_token: bool) -> None:
    encoder, mask = make(class_token=class_token), masks()
    assert mask.ids_keep is not None
    x, _ = encoder.embed(images())
    prefix = encoder.prefix
    ids = mask.ids_keep[..., None].expand(-1, -1, 24)
    kept = torch.cat([x[:, :prefix], x[:, prefix:].gather(1, ids)], dim=1)
    assert_close(encoder.embed(images(), mask)[0], kept)
    features = encoder(images(), mask, taps=ALL)
    assert_same(features, recompute(encoder, kept), ALL)
    assert features.patches.shape == (2, 8, 24)
    assert features.prefix == class_token


def test_filling_replaces_embeddings_and_keeps_positions() -> None:
    encoder, mask = make(), masks()
    fill = torch.randn(1, 1, 24)
    x, _ = encoder.embed(images())
    patches = x[:, 1:].clone()
    for image in range(2):
        for unit in range(16):
            if mask.hidden[image, unit]:
                patches[image, unit] = fill[0, 0] + encoder.pos_embed[0, 1 + unit]
    filled, _ = encoder.embed(images(), mask, fill)
    assert_close(filled, torch.cat([x[:, :1], patches], dim=1))
    assert encoder(images(), mask, fill).latent.shape == (2, 17, 24)


def test_filling_allows_images_to_hide_different_numbers() -> None:
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[1, :5] = True
    mask = Mask.from_hidden(hidden)
    encoder = make()
    plain = encoder(images()).latent
    filled = encoder(images(), mask, torch.zeros(1, 1, 24)).latent
    assert torch.equal(filled[0], plain[0])
    assert not torch.allclose(filled[1], plain[1])


@pytest.mark.parametrize(("height", "width"), [(33, 32), (32, 36)])
def test_size_that_is_not_divisible(height: int, width: int) -> None:
    with pytest.raises(ConfigError, match=f"image of {height} x {width} px is not divisible by the patch of 8 px"):
        make()(torch.zeros(1, 3, height, width))


def test_mask_of_another_grid() -> None:
    with pytest.raises(ConfigError, match="the mask has 9 units, the image 4 x 4 patches; they must agree"):
        make()(images(), masks(units=9))


# ---------------------------------------------------------------------------------------- distillation token


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("size", [32, 48])
def test_distillation_token_has_no_position(ratio: float, size: int) -> None:
    encoder, grid = make(distillation_token=True), (size // 8, size // 8)
    assert (encoder.prefix, encoder.pos_embed.shape[1]) == (2, 17)
    table = resize_positions(encoder.pos_embed, (4, 4), grid, 1)
    patches = encoder.patch_embed(images(size)) + table[:, 1:]
    mask = masks(ratio, patches.shape[1]) if ratio else None
    if mask is not None:
        assert mask.ids_keep is not None
        patches = patches.gather(1, mask.ids_keep[..., None].expand(-1, -1, 24))
    first = torch.cat([encoder.cls_token + table[:, :1], encoder.dist_token], dim=1).expand(2, -1, -1)
    features = encoder(images(size), mask, taps=ALL)
    expected = recompute(encoder, torch.cat([first, patches], dim=1))
    assert_same(features, expected, ALL)
    assert features.prefix == 2
    assert torch.equal(features.patches, features.latent[:, 2:])
    last = torch.cat([first[:, :1], patches, first[:, 1:]], dim=1)  # where G2SD puts it
    latent = recompute(encoder, last).latent
    assert_close(latent[:, [0, -1]], features.latent[:, :2], rtol=1e-4, atol=1e-5)
    assert_close(latent[:, 1:-1], features.patches, rtol=1e-4, atol=1e-5)


def test_distillation_token_needs_a_class_token() -> None:
    with pytest.raises(ConfigError, match=r"stands beside a class token; set encoder\.class_token=true"):
        make(distillation_token=True, class_token=False)


def test_distillation_token_is_drawn_like_the_class_token() -> None:
    encoder = ViT(ViTShape(image_size=32, patch=8, dim=384, depth=1, heads=6, distillation_token=True))
    assert encoder.dist_token.std().item() == pytest.approx(0.02, rel=0.2)
    before = encoder.dist_token.clone()
    encoder.init_classifier_()
    assert encoder.dist_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(encoder.dist_token, before)


# ---------------------------------------------------------------------------------------- relative positions


def test_relative_bias_enters_every_block() -> None:
    encoder = make(relative="full")
    x, _ = encoder.embed(images())
    features = encoder(images(), taps=ALL)
    assert_same(features, recompute(encoder, x, relative_index(4, 4, 1)), ALL)


@pytest.mark.parametrize("prefix", [1, 2])
def test_relative_bias_of_dropped_tokens_is_the_submatrix(prefix: int) -> None:
    encoder, mask = make(relative="full", distillation_token=prefix == 2), masks()
    assert mask.ids_keep is not None
    x, _ = encoder.embed(images(), mask)
    whole = relative_index(4, 4, prefix)
    per_image = []
    for ids in mask.ids_keep:
        rows = torch.cat([torch.arange(prefix), ids + prefix])
        per_image.append(whole[rows][:, rows])
    features = encoder(images(), mask, taps=ALL)
    assert_same(features, recompute(encoder, x, torch.stack(per_image)), ALL)


def test_relative_positions_are_bound_to_their_grid() -> None:
    with pytest.raises(ConfigError, match=r"fixed to its grid of 4 x 4 patches \(32 px\); got 6 x 6"):
        make(relative="qv")(images(48))
    assert "relative_position_index" not in make(relative="full").state_dict()


# ------------------------------------------------------------------------------------ training, initialisation


def test_drop_path_rises_with_depth_and_rests_in_evaluation() -> None:
    encoder = ViT(SHAPE, drop_path=0.4)
    rates = [getattr(block.drop_path, "rate", 0.0) for block in encoder.blocks]
    assert_close(torch.tensor(rates), torch.tensor([0.0, 0.2, 0.4]))
    encoder.eval()
    assert torch.equal(encoder(images()).latent, encoder(images()).latent)
    encoder.train()
    torch.manual_seed(0)
    assert not torch.equal(encoder(images()).latent, encoder(images()).latent)


def test_mae_initialisation() -> None:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(image_size=32, patch=8, dim=96, depth=2, heads=3))
    weights = {"patch_embed.proj.weight": (96, 192), "blocks.1.attn.qkv.weight": (288, 96)}
    weights |= {"blocks.0.mlp.fc1.weight": (384, 96), "blocks.1.attn.proj.weight": (96, 96)}
    state = encoder.state_dict()
    for name, (out, into) in weights.items():
        bound = (6 / (out + into)) ** 0.5
        assert 0.99 * bound < state[name].abs().max() <= bound, name
        assert_close(state[name].std(), torch.tensor(bound / 3**0.5), rtol=0.03, atol=0)
    for name, value in state.items():
        if name.endswith("bias") and name != "patch_embed.proj.bias":
            assert not value.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
    assert state["patch_embed.proj.bias"].abs().max() <= 1 / 192**0.5
    assert 0.01 < encoder.cls_token.std() < 0.03
    assert not encoder.pos_embed[:, 0].any()
    assert torch.equal(encoder.pos_embed[0, 1:], sincos_positions(96, 4, 4))
    assert not encoder.pos_embed.requires_grad
    assert ViT(ViTShape(32, 8, 96, 1, 3, position="learned")).pos_embed.requires_grad


def test_classifier_initialisation() -> None:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(image_size=64, patch=8, dim=96, depth=3, heads=3, relative="full"))
    encoder.blocks[0].norm1.bias.data.fill_(3)
    encoder.init_classifier_()
    assert encoder.pos_embed.requires_grad
    expected = {"blocks.2.attn.qkv.weight": 0.02, "blocks.0.mlp.fc1.weight": 0.02, "pos_embed": 0.02}
    expected |= {
        f"blocks.{i}.{part}.weight": 0.02 / (2 * (i + 1)) ** 0.5 for i in range(3) for part in ("attn.proj", "mlp.fc2")
    }
    state = encoder.state_dict()
    for name, std in expected.items():
        assert_close(state[name].std(), torch.tensor(std), rtol=0.04, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert not state["blocks.0.norm1.bias"].any()
    assert not state["blocks.0.attn.relative_position_bias_table"].any()
    bound = 1 / (3 * 64) ** 0.5
    assert 0.98 * bound < state["patch_embed.proj.weight"].abs().max() <= bound


def test_layer_scale_starts_as_told() -> None:
    encoder = ViT(ViTShape(32, 8, 24, 1, 3, layer_scale=0.25))
    assert torch.equal(encoder.blocks[0].gamma_1, torch.full((24,), 0.25))


def test_settings_describe_the_shape() -> None:
    settings = EncoderSettings(name="vit_nano", image_size=32, heads=2, class_token=False, drop_path=0.1)
    shape = ViTShape(image_size=32, patch=4, dim=64, depth=4, heads=2, class_token=False)
    assert settings.shape() == shape
    encoder = build_encoder(settings)
    assert encoder.shape == shape
    assert (encoder.units, encoder.grid, encoder.prefix, encoder.cls_token) == (64, (8, 8), 0, None)
    assert_close(encoder.blocks[3].drop_path.rate, 0.1)


@pytest.mark.parametrize(("name", "parameters"), [("vit_tiny", 5_524_416), ("vit_small", 21_665_664)])
def test_parameters_equal_the_published_counts(name: str, parameters: int) -> None:
    encoder = build_encoder(EncoderSettings(name=name))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
