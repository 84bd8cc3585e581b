from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mimlet.config import load_config
from mimlet.data.masks import BlockMasking
from mimlet.methods.mae import start_vit
from mimlet.methods.masked import block_masking, init_beit_, init_truncated_, mask_token
from mimlet.methods.settings import BEiTSettings, BlockMaskSettings, BootMAESettings, MaskFeatSettings
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (BEiTSettings().masking, BlockMasking((14, 14), 75, 16)),
        (MaskFeatSettings().masking, BlockMasking((14, 14), 78, 15)),
        (BootMAESettings().masking, BlockMasking((14, 14), 120, 16, 60, tries=0, exact=147)),
    ],
)
def test_published_counts(settings: BlockMaskSettings, expected: BlockMasking) -> None:
    assert block_masking(settings, (14, 14)) == expected


def test_other_grids_keep_the_shares() -> None:
    assert block_masking(MaskFeatSettings().masking, (8, 8)) == BlockMasking((8, 8), 25, 5)
    assert block_masking(BEiTSettings().masking, (4, 6)) == BlockMasking((4, 6), 9, 2)
    assert block_masking(BlockMaskSettings(smallest=0.01), (4, 4)) == BlockMasking((4, 4), 6, 1)


def matrices(encoder: ViT) -> dict[str, torch.Tensor]:
    return {name: m.weight for name, m in encoder.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def test_beit_initialisation() -> None:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(16, 4, 96, 3, 3, position="learned", relative="shared", qv_bias=True))
    init_beit_(encoder)
    for name, weight in matrices(encoder).items():
        number = int(name.split(".")[1]) + 1 if name.endswith(("attn.proj", "fc2")) else 0
        scale = (2 * number) ** 0.5 if number else 1
        assert (weight * scale).abs().max() <= 0.02 * 1.0001
        # A normal distribution cut at one deviation has 0.5396 of its deviation.
        assert (weight * scale).std().item() == pytest.approx(0.02 * 0.5396, rel=0.05)
    assert encoder.cls_token is not None
    assert encoder.pos_embed is not None
    for table in (encoder.cls_token, encoder.pos_embed, mask_token(96)):
        assert table.abs().max() <= 0.02 * 1.0001
        assert table.std() > 0.008
    zero = [p for name, p in encoder.named_parameters() if name.endswith(("bias", "bias_table"))]
    assert len(zero) == 1 + 1 + 3 * (2 + 3 + 2) + 1
    assert not any(p.any() for p in zero)


def test_uncut_initialisation_with_shifts_leaves_fixed_positions() -> None:
    torch.manual_seed(0)
    encoder, fresh = ViT(ViTShape(16, 4, 96, 1, 3)), ViT(ViTShape(16, 4, 96, 1, 3))
    init_truncated_(encoder, 2.0, shift=0.5)
    for weight in matrices(encoder).values():
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.abs().max() > 0.05
    assert torch.equal(encoder.blocks[0].get_parameter("attn.qkv.bias"), torch.full((288,), 0.5))
    assert torch.equal(encoder.norm.bias, torch.full((96,), 0.5))
    assert encoder.pos_embed is not None
    assert fresh.pos_embed is not None
    assert torch.equal(encoder.pos_embed, fresh.pos_embed)


def test_weights_outlive_the_initialisation(tmp_path: Path) -> None:
    shape = ViTShape(16, 4, 24, 2, 3)
    torch.save(ViT(shape).state_dict(), tmp_path / "encoder.pth")
    config = load_config(
        {
            "encoder": {"name": "vit_nano", "image_size": 16, "dim": 24, "depth": 2, "heads": 3},
            "method": {"name": "simmim", "mask_px": 8},
            "schedule": {"batch": 2, "steps": 1},
        },
        [f"encoder.weights={tmp_path / 'encoder.pth'}"],
    )
    encoder, report = start_vit(config, init_beit_)
    assert report is not None
    assert report.fresh == {}
    stored = torch.load(tmp_path / "encoder.pth", weights_only=True)
    for name, value in encoder.state_dict().items():
        assert_close(value, stored[name])
