"""What methods that replace hidden patches by a mask token share: block-wise masks from settings, initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimlet.data.masks import BlockMasking
from mimlet.methods.settings import BlockMaskSettings
from mimlet.models.parts import Block, Mlp
from mimlet.models.vit import ViT

STD = 0.02


def block_masking(settings: BlockMaskSettings, grid: tuple[int, int]) -> BlockMasking:
    """The block-wise masking that settings describe in shares, in patches of a grid (rows, columns). They are
    rounded, to 1 at least.
    """
    patches = grid[0] * grid[1]
    total, smallest, largest, exact = (
        max(1, round(share * patches)) if share else 0
        for share in (settings.ratio, settings.smallest, settings.largest, settings.exact)
    )
    return BlockMasking(grid, total, smallest, largest, settings.tries, exact)


def mask_token(dim: int, cut: float = STD) -> nn.Parameter:
    """What stands in the place of hidden patches, [1,1,D], drawn as `draw_`."""
    return nn.Parameter(draw_(torch.empty(1, 1, dim), cut))


@torch.no_grad()
def draw_(tensor: Tensor, cut: float = STD) -> Tensor:
    """Normal of deviation 0.02, cut at +-`cut`: the BEiT family cuts at one deviation, others at 2, which is never."""
    return nn.init.trunc_normal_(tensor, std=STD, a=-cut, b=cut)


@torch.no_grad()
def init_truncated_(encoder: ViT, cut: float = STD, shift: float = 0.0) -> None:
    """Draws matrices, patch embedding, class token and learned positions by `draw_`; biases of linear layers and norms
    become `shift`.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw_(module.weight, cut)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.constant_(module.bias, shift)
    for table in (encoder.cls_token, encoder.pos_embed if encoder.shape.position == "learned" else None):
        if table is not None:
            draw_(table, cut)


@torch.no_grad()
def init_beit_(encoder: ViT) -> None:
    """The BEiT family's initialisation for pre-training (the code of BEiT and SimMIM): `init_truncated_`, then the
    layers that write into the residual stream are divided by sqrt(2 i) in block i.
    """
    init_truncated_(encoder)
    assert encoder.patch_embed.proj.bias is not None
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    for i, block in enumerate(encoder.blocks, 1):
        assert isinstance(block, Block)
        assert isinstance(block.mlp, Mlp)
        block.attn.proj.weight.div_((2 * i) ** 0.5)
        block.mlp.fc2.weight.div_((2 * i) ** 0.5)
