from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mimlet.errors import ConfigError
from mimlet.models.dense import DenseMaps
from mimlet.models.features import Taps
from mimlet.models.hiera import Hiera
from mimlet.models.hivit import HiViT
from mimlet.models.parts import resize_positions
from mimlet.models.shapes import HieraShape, HiViTShape, ViTShape
from mimlet.models.vit import ViT
from tests.shared import golden

DENSE: list[tuple[str, int, Any, bool, dict[str, Any]]] = [
    ("itpn_det_pixel", 64, "average", False, {}),
    ("itpn_det_clip", 224, "average", False, {"relative": "decomposed", "layer_scale": 0.1}),
    ("itpn_seg", 64, "max", True, {"relative": "full", "layer_scale": 0.1}),
]


@pytest.mark.parametrize(("name", "size", "extra", "join", "changes"), DENSE)
@torch.no_grad()
def test_dense_maps_equal_the_official_backbones(
    name: str, size: int, extra: Any, join: bool, changes: dict[str, Any]
) -> None:
    oracle = golden(name)
    if name == "itpn_seg":  # officially its table is always of 14 x 14, whatever the tables of relative positions
        table = oracle.weights["absolute_pos_embed"]
        oracle.weights["absolute_pos_embed"] = resize_positions(table, (14, 14), (4, 4), 0, 0.1)
    shape = HiViTShape(size, 16, 32, (1, 1, 2), 2, pyramid_dim=16, pyramid_depth=1, pyramid_hidden=64, **changes)
    encoder = HiViT(shape).eval()
    encoder.load_state_dict({k: v for k, v in oracle.weights.items() if k != "relative_position_index"})
    encoder.position_offset = 0.0 if name == "itpn_seg" else 0.1
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    dense = DenseMaps(encoder, extra, join)
    maps = dense(oracle.io["imgs"])
    assert len(maps) == len(dense.channels) == len(dense.strides) == (4 if join else 5)
    for i, (ours, channels, stride) in enumerate(zip(maps, dense.channels, dense.strides, strict=True)):
        assert_close(ours, oracle.io[f"out{i}"], **oracle.tolerance)
        height, width = oracle.io["imgs"].shape[2:]
        assert ours.shape == (1, channels, height // stride, width // stride)


@torch.no_grad()
def test_without_a_pyramid_the_ends_of_stages_are_given() -> None:
    encoder = HiViT(HiViTShape(32, 8, 32, (1, 1, 1), 2)).eval()
    dense, images = DenseMaps(encoder, "max"), torch.randn(1, 3, 64, 32)
    assert (dense.strides, dense.channels) == ([2, 4, 8, 16], [8, 16, 32, 32])
    maps, stages = dense(images), encoder(images, taps=Taps(stages=(2, 4, 8))).stages
    for ours, stride in zip(maps, (2, 4, 8), strict=False):
        assert torch.equal(ours, stages[stride])
    assert torch.equal(maps[3], F.max_pool2d(stages[8], 2))


@torch.no_grad()
def test_any_hierarchical_encoder_will_do() -> None:
    dense = DenseMaps(Hiera(HieraShape(64, 16, 8, (1, 1, 1, 1), 1)).eval())
    shapes = [tuple(x.shape) for x in dense(torch.randn(1, 3, 64, 64))]
    assert shapes == [(1, c, 64 // s, 64 // s) for c, s in zip(dense.channels, dense.strides, strict=True)]


@pytest.mark.parametrize(
    ("encoder", "join", "message"),
    [
        (ViT(ViTShape(16, 8, 8, 1, 1)), False, "a plain ViT has maps of one stride only; .* hierarchical encoder"),
        (
            HiViT(HiViTShape(16, 8, 16, (1, 1, 1), 1)),
            True,
            "a HiViT .* without a pyramid has nothing to join its stages",
        ),
    ],
)
def test_encoders_that_do_not_fit_are_told(encoder: Any, join: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DenseMaps(encoder, join=join)
