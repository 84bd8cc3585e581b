"""The benchmark's contenders compute the same: a ratio between different losses would mean nothing."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks.contenders import PlainD2MAE, PlainViT, images
from benchmarks.ours import d2mae
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.methods.base import Clock
from mimlet.methods.dmae import DMAE
from mimlet.models.vit import ViT

BATCH = 2


@torch.no_grad()
def copy_vit(plain: PlainViT, ours: ViT) -> None:
    plain.patch.load_state_dict(ours.patch_embed.proj.state_dict())
    plain.cls.copy_(ours.cls_token)
    plain.position.copy_(ours.pos_embed)
    plain.norm.load_state_dict(ours.norm.state_dict())
    for theirs, block in zip(plain.blocks, ours.blocks, strict=False):
        state = {name.removeprefix("attn.").removeprefix("mlp."): value for name, value in block.state_dict().items()}
        theirs.load_state_dict(state)


def copy_all(method: DMAE) -> PlainD2MAE:
    plain = PlainD2MAE()
    copy_vit(plain.student, method.encoder)
    copy_vit(plain.teacher, method.teacher.encoder)
    extra = {name.removeprefix("attn."): value for name, value in method.extra.state_dict().items()}
    plain.student.blocks[12].load_state_dict(extra, strict=False)
    state = method.decoder.state_dict()
    plain.embed.load_state_dict({name: state[f"embed.{name}"] for name in ("weight", "bias")})
    plain.pred.load_state_dict({name: state[f"pred.{name}"] for name in ("weight", "bias")})
    plain.norm.load_state_dict({name: state[f"norm.{name}"] for name in ("weight", "bias")})
    block = {k.removeprefix("blocks.0."): v for k, v in state.items() if k.startswith("blocks.0.")}
    plain.decoder.load_state_dict({k.removeprefix("attn.").removeprefix("mlp."): v for k, v in block.items()})
    with torch.no_grad():
        plain.mask_token.copy_(state["mask_token"])
        plain.position.copy_(state["pos_embed"])
        plain.heads.weight.copy_(method.head_maps[0].weight[..., None, None])
    return plain


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 0.01)])
def test_our_d2mae_step_has_the_plain_formulations_loss(bf16: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    exact = d2mae(bf16=False)
    torch.manual_seed(0)
    method = d2mae(bf16)
    plain = copy_all(exact)
    pixels = images(BATCH)
    torch.manual_seed(1)
    expected = plain(pixels)
    torch.manual_seed(1)
    mask = Mask.from_noise(torch.rand(BATCH, 196), 0.75)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = method(Batch({"image": pixels}, torch.arange(BATCH), {"mask": mask}), Clock(0, 1, 1, 0))
    assert_close(losses["reconstruction"] + losses["attention"], expected, rtol=tolerance, atol=0.0)
