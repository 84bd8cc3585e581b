"""Tiny random models of timm and transformers, asked through the adapter and by their own means."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.cli import main
from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, TeacherSettings, validate
from mimlet.errors import ConfigError, WeightsError
from mimlet.models.features import Taps
from mimlet.models.foreign import Foreign, ForeignEncoder, open_teacher
from mimlet.models.shapes import ViTShape
from mimlet.models.teacher import Teachers, load_teacher
from mimlet.models.vit import ViT
from mimlet.models.weights import Checkpoint
from mimlet.run import read_run
from tests.data.images import make_folder
from tests.tiny import ENCODER, SPEED

transformers = pytest.importorskip("transformers")

SIZE, PATCH, DIM, DEPTH, HEADS = 32, 8, 32, 3, 2
SHAPE = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
CONFIG = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
}
HALF = [0.5, 0.5, 0.5]
STUDENT = ViT(ViTShape(image_size=SIZE, patch=PATCH, dim=24, depth=1, heads=3))

TIMM: dict[str, tuple[int, int]] = {  # class tokens, tokens that are dropped
    "deit_tiny_distilled_patch16_224": (1, 1),
    "vit_small_patch14_reg4_dinov2": (1, 4),
    "vit_medium_patch16_reg4_gap_256": (0, 4),
    "eva02_tiny_patch14_224": (1, 0),
    "vit_small_patch16_dinov3": (1, 4),
    "beitv2_base_patch16_224": (1, 0),
    "vit_base_patch16_clip_224": (1, 0),
    "vit_base_patch16_siglip_224": (0, 0),
}
TRANSFORMERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ViT": (1, 0, {}),
    "DeiT": (1, 1, {}),
    "Dinov2": (1, 0, {}),
    "Dinov2WithRegisters": (1, 4, {}),
    "DINOv3ViT": (1, 4, {"num_register_tokens": 4}),
    "CLIPVision": (1, 0, {}),
    "Beit": (1, 0, {"use_relative_position_bias": True, "use_mean_pooling": False}),
    "SiglipVision": (0, 0, {}),
    "ViTMAE": (1, 0, {}),
}
SAVED = [*TIMM, *TRANSFORMERS]
FAMILIES = [family for family in SAVED if family != "ViTMAE"]  # which sees everything only when read from a folder


def make(family: str) -> nn.Module:
    """A model with nothing left at zero or at its small initial scale."""
    torch.manual_seed(0)
    model: nn.Module
    if family in TIMM:
        model = timm.create_model(family, **SHAPE)
    else:
        config = getattr(transformers, f"{family}Config")(**CONFIG, **TRANSFORMERS[family][2])
        model = transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def prefixes(family: str) -> tuple[int, int]:
    return TIMM[family] if family in TIMM else TRANSFORMERS[family][:2]


def adapt(family: str) -> ForeignEncoder:
    return ForeignEncoder(make(family), SIZE, family)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def trim(x: Tensor, family: str, dim: int = -2) -> Tensor:
    prefix, dropped = prefixes(family)
    kept = [*range(prefix), *range(prefix + dropped, x.shape[dim])]
    return x.index_select(dim, torch.tensor(kept))


def own_answers(model: nn.Module, family: str, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Outputs of all blocks, and the final tokens, by the library's own means."""
    if family in TIMM:
        blocks = model.forward_intermediates(
            images, indices=DEPTH, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        hidden = [torch.cat([b[1], b[0]], 1) if isinstance(b, tuple) else b for b in blocks]
        return hidden, model.forward_features(images)
    answer = model(images, output_hidden_states=True, interpolate_pos_encoding=images.shape[-1] != SIZE)
    tokens = answer.last_hidden_state
    return answer.hidden_states[1:], model.post_layernorm(tokens) if family == "CLIPVision" else tokens


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_block_outputs_and_tokens(family: str, images: Tensor) -> None:
    encoder = adapt(family)
    prefix, dropped = prefixes(family)
    numbers = (encoder.patch, encoder.dim, encoder.depth, encoder.heads, encoder.grid, encoder.prefix)
    assert numbers == (PATCH, DIM, DEPTH, HEADS, (4, 4), prefix)
    features = encoder(images, taps=Taps(hidden=(1, 2, 3)))
    hidden, tokens = own_answers(encoder.model, family, images)
    assert tokens.shape[1] == prefix + dropped + 16
    assert_close(features.latent, trim(tokens, family))
    for number, expected in enumerate(hidden, 1):
        if number < DEPTH or family in (*TIMM, "CLIPVision", "Beit", "SiglipVision"):  # others norm the last
            assert_close(features.hidden[number], trim(expected, family))
    assert (features.prefix, features.grid) == (prefix, (4, 4))


@contextmanager
def heard(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """First input and output of modules while a model runs."""
    answers: dict[str, tuple[Tensor, Tensor]] = {}

    def listener(name: str) -> Callable[..., None]:
        return lambda module, args, output: answers.__setitem__(name, (args[0], output))

    handles = [module.register_forward_hook(listener(name)) for name, module in modules.items()]
    yield answers
    for handle in handles:
        handle.remove()


def own_attention(encoder: ForeignEncoder, family: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [B,H,T,T] and values [B,H,T,d] of block 2, by explicit attention and from the projection."""
    model, block = encoder.model, encoder._blocks()[1]
    if family in TIMM:
        attn = block.attn
        attn.fused_attn = False
        with heard({"norm": block.norm1, "drop": attn.attn_drop}) as parts:
            model(images)
        attn.fused_attn = True
        x, probabilities = parts["norm"][1], parts["drop"][0]
        if getattr(attn, "v_proj", None) is not None:
            values = attn.v_proj(x)
        else:
            bias = attn.qkv.bias[2 * DIM :] if attn.qkv.bias is not None else attn.v_bias
            values = F.linear(x, attn.qkv.weight[2 * DIM :], bias)
    else:
        model.set_attn_implementation("eager")
        (projection,) = (m for name, m in block.named_modules() if name.endswith((".value", ".v_proj")))
        with heard({"v": projection}) as parts:
            probabilities = model(images, output_attentions=True).attentions[1]
        model.set_attn_implementation("sdpa")
        values = parts["v"][1]
    return probabilities, values.unflatten(2, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_queries_keys_values_and_logits_are_those_of_the_models_attention(family: str, images: Tensor) -> None:
    """Without the dropped tokens the probabilities are those of the others, scaled to 1 again."""
    encoder = adapt(family)
    features = encoder(images, taps=Taps(qkv=(2,), attention=(2,), tokens=False))
    probabilities, values = own_attention(encoder, family, images)
    kept = trim(trim(probabilities, family), family, -1)
    assert_close(features.attention[2].softmax(-1), kept / kept.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)
    q, k, v = features.qkv[2]
    assert_close(v, trim(values, family))
    logits = q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5
    biased = family.lower().startswith("beit")
    assert torch.allclose(logits, features.attention[2], atol=1e-5) is not biased
    joined = features.attention[2].softmax(-1) @ v
    assert joined.shape == (2, HEADS, prefixes(family)[0] + 16, DIM // HEADS)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_normed_is_what_enters_the_next_blocks_attention(family: str, images: Tensor) -> None:
    encoder = adapt(family)
    features = encoder(images, taps=Taps(normed=(0, 1, DEPTH)))
    for layer in (0, 1):
        block = encoder._blocks()[layer]
        names = ("attn", "attention", "self_attn", "attention.attention")
        attention = next(block.get_submodule(name) for name in names if hasattr(block, name))
        heard: list[Tensor] = []
        hook = attention.register_forward_pre_hook(
            lambda _, args, kwargs, heard=heard: heard.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        encoder.model(images)
        hook.remove()
        assert_close(features.normed[layer], trim(heard[0], family))
    assert_close(features.normed[DEPTH], features.latent)


def test_blocks_that_do_not_begin_with_their_norm(images: Tensor) -> None:
    encoder = ForeignEncoder(timm.create_model("vit_relpos_base_patch16_rpn_224", **SHAPE, fc_norm=False), SIZE, "post")
    assert encoder(images, taps=Taps(hidden=(1,))).hidden[1].shape[0] == 2
    with pytest.raises(ConfigError, match=r"post gives no normed: its blocks do not begin with a norm under a known"):
        encoder(images, taps=Taps(normed=(1,)))


@torch.no_grad()
def test_queries_and_keys_before_the_product(images: Tensor) -> None:
    """Not only their product: from the projections, and after the norms of q and k."""
    for family, parts in (("ViT", ("q_proj", "k_proj")), ("CLIPVision", ("q_proj", "k_proj"))):
        encoder = adapt(family)
        found = {n.rpartition(".")[2]: m for n, m in encoder._blocks()[1].named_modules() if n.endswith(parts)}
        with heard(found) as answers:
            q, k, _ = encoder(images, taps=Taps(qkv=(2,), tokens=False)).qkv[2]
        for part, got in zip(parts, (q, k), strict=True):
            assert_close(got, answers[part][1].unflatten(2, (HEADS, -1)).transpose(1, 2))
    torch.manual_seed(0)
    normed = timm.create_model("vit_tiny_patch16_224", **SHAPE, qk_norm=True)
    encoder = ForeignEncoder(normed, SIZE)
    attn = normed.blocks[1].attn
    with heard({"q": attn.q_norm, "k": attn.k_norm}) as answers:
        q, k, _ = encoder(images, taps=Taps(qkv=(2,), tokens=False)).qkv[2]
    assert torch.equal(q, answers["q"][1])
    assert torch.equal(k, answers["k"][1])


@torch.no_grad()
def test_another_scale_is_folded_into_the_queries(images: Tensor) -> None:
    encoder = adapt("DINOv3ViT")
    before = encoder(images, taps=Taps(attention=(1,), tokens=False)).attention[1]
    encoder._blocks()[0].attention.scaling *= 2
    features = encoder(images, taps=Taps(attention=(1,), hidden=(1,), tokens=False))
    assert_close(features.attention[1], 2 * before)
    assert_close(
        features.hidden[1], trim(encoder.model(images, output_hidden_states=True).hidden_states[1], "DINOv3ViT")
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_patches_are_in_raster_order(family: str, images: Tensor) -> None:
    """Another patch in the second row and fourth column changes that token of the embedding, and no other."""
    encoder = adapt(family)
    changed = images.clone()
    changed[:, :, 8:16, 24:32] += 1
    taps = Taps(hidden=(0,), tokens=False)
    differs = (encoder(images, taps=taps).hidden[0] != encoder(changed, taps=taps).hidden[0]).any(-1).any(0)
    assert differs.nonzero().flatten().tolist() == [prefixes(family)[0] + 4 + 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_runs_after_the_last_tap(family: str, images: Tensor) -> None:
    encoder = adapt(family)
    ran: list[str] = []
    blocks = [f"{encoder.place}.{i}" for i in range(3)]
    for name, module in encoder.model.named_modules():
        if name not in blocks:
            module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in encoder.modules()]

    def blocks_of(**taps: Any) -> list[int]:
        ran.clear()
        encoder(images, taps=Taps(**{"tokens": False, **taps}))
        assert (encoder.norm in ran) is ("tokens" in taps)
        assert not any(name.startswith(("pooler", "head", "fc_norm")) for name in ran)
        return [sum(name.startswith(f"{block}.") for name in ran) for block in blocks]

    whole = blocks_of(hidden=(3,))
    assert len(set(whole)) == 1
    assert blocks_of() == blocks_of(hidden=(0,)) == [0, 0, 0]
    assert blocks_of(hidden=(1,)) == [whole[0], 0, 0]
    partly = blocks_of(qkv=(2,))
    assert 0 < partly[1] < whole[1]
    assert partly == [whole[0], partly[1], 0] == blocks_of(attention=(2,), qkv=(1,), hidden=(0, 1))
    assert blocks_of(tokens=True) == whole
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in encoder.modules()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
@torch.no_grad()
def test_resized_input(family: str) -> None:
    """The model's own way to another size."""
    encoder = adapt(family)
    model, images = deepcopy(encoder.model), torch.randn(1, 3, 48, 48)
    if family in TIMM:
        model.set_input_size(img_size=(48, 48))
    encoder.resize(48)
    features = encoder(images)
    assert (features.grid, encoder.size, features.latent.shape[1]) == ((6, 6), 48, 36 + encoder.prefix)
    assert_close(features.latent, trim(own_answers(model, family, images)[1], family))


@pytest.mark.parametrize("family", SAVED)
@torch.no_grad()
def test_bf16_stays_near_fp32(family: str, images: Tensor, tmp_path: Path) -> None:
    folder, taps = save(family, tmp_path), Taps(qkv=(2,), hidden=(1,))
    exact, rough = (load_teacher(TeacherSettings(path=folder, precision=p), STUDENT) for p in ("32", "bf16"))
    assert any(p.dtype == torch.bfloat16 for p in rough.encoder.parameters())
    want, got = exact(images, taps=taps), rough(images, taps=taps)
    for a, b in [
        (want.latent, got.latent),
        (want.hidden[1], got.hidden[1]),
        *zip(want.qkv[2], got.qkv[2], strict=True),
    ]:
        assert 0 < (a - b.float()).norm() / a.norm() < 0.03


def save(family: str, folder: Path, model: nn.Module | None = None) -> str:
    """A model's folder as its library saves it."""
    model = model or make(family)
    if family in TIMM:
        save_for_hf(model, folder, model_config={"model_args": {k: v for k, v in SHAPE.items() if k != "num_classes"}})
    else:
        model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", SAVED)
@torch.no_grad()
def test_folders(family: str, images: Tensor, tmp_path: Path) -> None:
    model = make(family)
    folder = save(family, tmp_path, model)
    teacher = load_teacher(TeacherSettings(path=folder, precision="32"), STUDENT)
    assert (teacher.dim, teacher.depth, teacher.heads, teacher.grid) == (DIM, DEPTH, HEADS, (4, 4))
    assert (teacher.prefix, teacher.source) == (prefixes(family)[0], folder)
    assert teacher.load_report is not None
    assert len(teacher.load_report.loaded) >= DEPTH * 8
    assert str(teacher.load_report).startswith(f"{len(teacher.load_report.loaded)} tensors loaded from {folder}")
    teacher.renormalise = False
    if family != "ViTMAE":
        expected = trim(own_answers(model, family, images)[1], family)
        assert_close(teacher(images).latent, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mae_of_transformers_sees_everything(images: Tensor, tmp_path: Path) -> None:
    """Its own forward shuffles and hides; in raster order it is a plain ViT with the same weights."""
    mae = make("ViTMAE")
    encoder = open_teacher(save("ViTMAE", tmp_path, mae)).encoder
    mae.config.mask_ratio = 0.0
    expected = mae(images, noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
    assert_close(encoder(images).latent, expected)


@torch.no_grad()
def test_the_images_half_of_clip(images: Tensor, tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=CONFIG, text_config=text)).eval()
    opened = open_teacher(save("CLIP", tmp_path, clip))
    assert isinstance(opened, Foreign)
    assert not any("text" in name for name in opened.encoder.state_dict())
    assert opened.report.skipped["text_projection.weight"] == "not of the images"
    hidden = clip.vision_model(images, output_hidden_states=True).hidden_states
    assert_close(opened.encoder(images, taps=Taps(hidden=(2,))).hidden[2], hidden[2])
    assert opened.encoder.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert opened.report.notes == ["no preprocessor_config.json: its input is normalised as CLIP's"]


@pytest.mark.parametrize(
    ("inputs", "own"),
    [
        ({"image_mean": HALF, "image_std": HALF, "do_normalize": True}, (tuple(HALF), tuple(HALF))),
        ({"do_normalize": False}, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
        (None, (IMAGENET_MEAN, IMAGENET_STD)),
    ],
)
@torch.no_grad()
def test_input_normalisation_of_transformers(inputs: dict[str, Any] | None, own: Any, tmp_path: Path) -> None:
    folder = save("ViT", tmp_path)
    if inputs is not None:
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "ViTImageProcessor", **inputs})
        )
    opened = open_teacher(folder)
    assert isinstance(opened, Foreign)
    assert (opened.encoder.mean, opened.encoder.std) == own
    assert bool(opened.report.notes) is (inputs is None)
    teacher, raw = load_teacher(TeacherSettings(path=folder, precision="32"), STUDENT), torch.rand(2, 3, SIZE, SIZE)
    theirs, students = (
        (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in (own, (IMAGENET_MEAN, IMAGENET_STD))
    )
    assert_close(teacher(students).latent, opened.encoder(theirs).latent, rtol=1e-4, atol=1e-4)


def test_input_normalisation_of_timm(tmp_path: Path) -> None:
    opened = open_teacher(save("vit_base_patch16_siglip_224", tmp_path))
    where = opened.encoder if isinstance(opened, Foreign) else opened
    assert (where.mean, where.std) == (tuple(HALF), tuple(HALF))


@pytest.mark.parametrize("family", ["vit_small_patch16_dinov3", "Dinov2WithRegisters"])
@pytest.mark.parametrize("student", [{"image_size": 48, "patch": 8}, {"image_size": 32, "patch": 16}])
@torch.no_grad()
def test_grids_that_differ(family: str, student: dict[str, int], tmp_path: Path) -> None:
    """Either the input or the answer is resized."""
    folder, shape = save(family, tmp_path), ViTShape(dim=24, depth=1, heads=3, **student)
    side = shape.image_size // shape.patch
    images, taps = torch.randn(2, 3, shape.image_size, shape.image_size), Taps(qkv=(2,), hidden=(1,))
    by_input, by_target = (
        load_teacher(TeacherSettings(path=folder, precision="32", grid=grid), ViT(shape))
        for grid in ("input", "target")
    )
    assert by_input.size == side * PATCH
    assert by_target.size == SIZE
    for teacher in (by_input, by_target):
        teacher.renormalise = False
        features = teacher(images, taps=taps)
        assert features.grid == teacher.grid == (side, side)
        assert features.latent.shape == (2, 1 + side * side, DIM)
        assert features.qkv[2][0].shape == (2, HEADS, 1 + side * side, DIM // HEADS)
    seen = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True) if side == 6 else images
    expected = by_target.encoder(seen, taps=taps).resized((side, side))
    assert_close(by_target(images, taps=taps).latent, expected.latent)
    with pytest.raises(ConfigError, match=r"set teacher\.grid=input"):
        by_target(images, taps=Taps(attention=(1,)))


@torch.no_grad()
def test_a_model_of_one_size_only() -> None:
    encoder = adapt("vit_base_patch16_siglip_224")
    encoder.model.set_input_size = None
    with pytest.raises(ConfigError, match=r"siglip_224 cannot see images of 48 px \(.*set teacher\.grid=target"):
        encoder.resize(48)


@torch.no_grad()
def test_a_model_held_already_keeps_its_size() -> None:
    """Two students of different grids: the second gets a copy."""
    mine = ForeignEncoder(make("vit_small_patch16_dinov3"), SIZE, mean=tuple(HALF), std=tuple(HALF))
    teachers = Teachers(mine)
    values = {"method": {"name": "tinymim"}, "teacher": {"path": "python:x", "precision": "32"}}
    config = validate({**values, "schedule": {"batch": 8, "steps": 1}, "speed": {"accelerator": "cpu"}})
    first = teachers.find(config, STUDENT)
    second = teachers.find(config, ViT(ViTShape(image_size=48, patch=8, dim=24, depth=1, heads=3)))
    assert first.encoder is mine
    assert (mine.size, first.grid, second.size, second.grid) == (SIZE, (4, 4), 48, (6, 6))
    assert first.renormalise
    assert first(torch.zeros(1, 3, SIZE, SIZE)).latent.shape == (1, 17, DIM)
    assert second(torch.zeros(1, 3, 48, 48)).latent.shape == (1, 37, DIM)


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        ("resnet10t", {}, 64, r"is a ResNet and not ViT-like: looked for one list of equal blocks, .*; found layer1"),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, 64, "is a ConvNeXt and not ViT-like"),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 1, 1)}, 56, "is a SwinTransformer and not"),
        ("xcit_nano_12_p16_224", {"depth": 2}, 64, "and 1 other tokens; found blocks, cls_attn_blocks, not like that"),
        ("cait_xxs24_224", {"img_size": 32, "depth": 2}, 32, "is a Cait and not ViT-like"),
        ("vit_tiny_patch16_224", {**SHAPE, "in_chans": 4}, 32, "does not run on images of 32 x 32 px alone: "),
    ],
)
def test_models_that_are_not_vit_like(name: str, options: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(WeightsError, match=f"^{name} .*{message}"):
        ForeignEncoder(timm.create_model(name, **options), size, name)


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (Taps(hidden=(4,)), "no hidden of block 4: ViT has blocks 0 to 3"),
        (Taps(qkv=(0,)), "no qkv of block 0: ViT has blocks 1 to 3"),
        (Taps(normed=(4,)), "no normed of block 4: ViT has blocks 0 to 3"),
        (Taps(levels=(8,)), "ViT gives no levels: a plain ViT has no pyramid"),
    ],
)
def test_what_it_cannot_answer(taps: Taps, message: str, images: Tensor) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt("ViT")(images, taps=taps)


def test_attention_that_cannot_be_seen(images: Tensor) -> None:
    model = make("vit_base_patch16_clip_224")
    for block in model.blocks:
        block.attn.fused_attn = False
    encoder = ForeignEncoder(model, SIZE, "mine")
    assert (encoder.heads, encoder.readable) == (1, False)
    assert encoder(images, taps=Taps(hidden=(2,))).hidden[2].shape == (2, 17, DIM)
    with pytest.raises(ConfigError, match=r"mine shows no queries, keys and values: .* take another teacher"):
        encoder(images, taps=Taps(qkv=(1,)))


class Bare(nn.Module):
    """Blocks without a final norm, and an attention of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


def test_no_final_norm(images: Tensor) -> None:
    bare = Bare()
    encoder = ForeignEncoder(bare, SIZE, "mine")
    taps = Taps(hidden=(2,), tokens=False)
    with torch.no_grad():
        assert_close(encoder(images, taps=taps).hidden[2], bare(images))
    with pytest.raises(ConfigError, match=r"mine has no final norm under a known name \(norm, layernorm, "):
        encoder(images)


def test_plain_vits_of_timm_stay_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They can drop patches; the rest is adapted."""
    plain = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    assert isinstance(open_teacher(save("deit_tiny_distilled_patch16_224", tmp_path, plain)), Checkpoint)
    monkeypatch.setattr("mimlet.models.foreign.create_timm", lambda name: plain if name == "plain" else make(name))
    assert isinstance(open_teacher("timm:plain"), Checkpoint)
    opened = open_teacher("timm:eva02_tiny_patch14_224")
    assert isinstance(opened, Foreign)
    assert opened.report.source == "timm:eva02_tiny_patch14_224"


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no encoder\.safetensors; .* model_type .* architecture"):
        open_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text('{"method": {"name": "mae"}}')
    with pytest.raises(WeightsError, match="expected the folder of a finished run"):
        open_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(WeightsError, match="cannot be read by timm: "):
        open_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(WeightsError, match=r"cannot be read by transformers: .* give its path"):
        open_teacher(str(tmp_path))


def test_a_folder_that_lacks_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save("ViT", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = {name: value for name, value in tensors.items() if not name.startswith("pooler.")}
    save_file(lost, tmp_path / "model.safetensors", {"format": "pt"})
    assert isinstance(open_teacher(folder), Foreign)
    del lost["embeddings.cls_token"]
    save_file(lost, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks embeddings\.cls_token; a partly random teacher is never used"):
        open_teacher(folder)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs the package transformers: pip install 'mimlet\[transformers\]'"):
        open_teacher("transformers:facebook/dinov2-small")


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect\nmore")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", fail)
    with pytest.raises(
        WeightsError,
        match=r"^transformers:a/b cannot be read by transformers: We couldn't connect\. Without a network, ",
    ):
        open_teacher("transformers:a/b")


def test_settings_of_weights_files_are_refused(tmp_path: Path) -> None:
    folder = save("ViT", tmp_path)
    assert load_teacher(TeacherSettings(path=folder, heads=HEADS), STUDENT).heads == HEADS
    for settings in ({"heads": 4}, {"name": "vit_base"}):
        with pytest.raises(ConfigError, match=r"describe weights files; .* has 2 heads: leave them out"):
            load_teacher(TeacherSettings(path=folder, **settings), STUDENT)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**{**CONFIG, "image_size": [32, 48]}))
    with pytest.raises(WeightsError, match="sees images of 32 x 48 px; only square ones are supported"):
        open_teacher(save("ViT", tmp_path, model))


@pytest.mark.parametrize("grid", ["input", "target"])
def test_a_student_is_taught(grid: str, tmp_path: Path) -> None:
    """By a DINOv3 whose patch is twice the student's."""
    out = tmp_path / "run"
    given = ["--data", str(make_folder(tmp_path / "photos", each=6)), "--teacher", save("DINOv3ViT", tmp_path / "dino")]
    sizes = ["--out", str(out), "--batch", "8", "--workers", "0", "--steps", "3", "method.relations.teacher_layer=2"]
    assert (
        main(["pretrain", "--recipe", "tinymim_micro32", *given, *sizes, *ENCODER, *SPEED, f"teacher.grid={grid}"]) == 0
    )
    losses = [line["relation_qk"] for line in read_run(out).lines("train") if "relation_qk" in line]
    assert losses
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    read = json.loads((out / "loaded.json").read_text())[-1]
    assert read["source"] == str(tmp_path / "dino")
    assert read["notes"] == ["no preprocessor_config.json: its input is normalised as ImageNet's"]
