"""The plain vision transformer, with taps.

Parameter names follow timm's ViT, so that weights travel: `cls_token`, `dist_token`, `pos_embed`, `patch_embed.proj`,
`rel_pos_bias`, `blocks.i.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}`, `norm`.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models.encoder import Encoder, last_block
from mimlet.models.features import Features, Taps
from mimlet.models.linear import linear
from mimlet.models.migration import Migration
from mimlet.models.parts import (
    NORM_EPS,
    Block,
    Mlp,
    RelativeBias,
    attend,
    attention_logits,
    init_mae,
    init_qkv_apart_,
    relative_index,
    resize_positions,
    sincos_positions,
    take_patches,
)
from mimlet.models.shapes import ViTShape


class PatchEmbed(nn.Module):
    """Linear embedding of p x p patches, held as a convolution as in every public checkpoint."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """[B,3,h,w] -> [B,N,D] in raster order; with `ids` [B,V] only those patches are read and embedded, [B,V,D]."""
        if ids is None:
            tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
            return tokens
        lines = images.reshape(*images.shape[:3], -1, self.patch)
        visible = take_patches(lines, self.patch, ids)
        return linear(visible, self.proj.weight.flatten(1), self.proj.bias)


class ViT(Encoder):
    """Plain ViT encoder: `(images, mask, fill, taps) -> Features`.

    With a mask and no `fill`, hidden patches are dropped before embedding (MAE); with `fill` [1,1,D], their
    embeddings are replaced by it (SimMIM, BEiT). Inputs of another size work: positions are interpolated (not the
    relative ones).

    With `shape.migration`, for dense inputs (many patches, read as a map), patches leave on the way and come back
    before `norm` (`mimlet.models.migration`), the window being the whole image; prefix tokens stay. Taps show the whole
    grid: patches that have left, as they left. Only block 1, which all patches enter, shows its attention.

    The distillation token stands at index 1 and has no position: G2SD appends it last, and attention does not care.
    """

    family: ClassVar[str] = "a plain ViT"
    shape: ViTShape
    norm: nn.LayerNorm

    def __init__(self, shape: ViTShape, drop_path: float = 0.0, constant_drop_path: bool = False) -> None:
        super().__init__()
        if shape.distillation_token and not shape.class_token:
            raise ConfigError("a distillation token stands beside a class token; set encoder.class_token=true")
        self.shape = shape
        self.patch, self.dim, self.depth, self.heads = shape.patch, shape.dim, shape.depth, shape.heads
        self.prefix = int(shape.class_token) + int(shape.distillation_token)
        self.placed = int(shape.class_token)  # prefix tokens that have a position
        side = shape.image_size // shape.patch
        self.grid = (side, side)
        self.dims = (shape.dim,) * (shape.depth + 1)
        self.attending = tuple(range(1, 2 if shape.migration else shape.depth + 1))
        self.stages, self.levels, self.fills = {}, {}, (shape.dim,)
        self.patch_embed = PatchEmbed(shape.patch, shape.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim)) if shape.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, shape.dim)) if shape.distillation_token else None
        table = torch.zeros(1, self.placed + side * side, shape.dim)
        self.pos_embed = nn.Parameter(table) if shape.position != "none" else None
        self.rel_pos_bias = RelativeBias(*self.grid, shape.heads) if shape.relative == "shared" else None
        relative = self.grid if shape.relative in ("full", "qv") else None
        rates = torch.linspace(drop_path if constant_drop_path else 0, drop_path, shape.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                shape.dim,
                shape.heads,
                shape.mlp_ratio,
                "qv" if shape.qv_bias or shape.relative == "qv" else "qkv",
                relative,
                shape.layer_scale,
                rate,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(shape.dim, eps=NORM_EPS)
        self.relative_position_index: Tensor | None
        index = relative_index(*self.grid, self.prefix) if shape.relative != "none" else None
        self.register_buffer("relative_position_index", index, persistent=False)
        self.init_mae_()

    @torch.no_grad()
    def init_mae_(self) -> None:
        """MAE's initialisation. A sin-cos table is fixed; fine-tuning makes it trainable."""
        self.apply(init_mae)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.dist_token is not None:
            nn.init.normal_(self.dist_token, std=0.02)
        if self.shape.position == "sincos":
            assert self.pos_embed is not None
            self.pos_embed.copy_(F.pad(sincos_positions(self.dim, *self.grid), (0, 0, self.placed, 0))[None])
            self.pos_embed.requires_grad_(False)
        elif self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @torch.no_grad()
    def init_moco_(self) -> None:
        """MoCo v3's initialisation: MAE's, but queries, keys and values are drawn apart, and the class token starts
        near zero.
        """
        init_qkv_apart_(self)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    @torch.no_grad()
    def init_classifier_(self) -> None:
        """timm 0.4.12's initialisation for training with labels: truncated normal 0.02 everywhere, trainable positions.

        With relative positions, the output layers of block i are divided by sqrt(2 i), as in MAE-lite's RPE model.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.patch_embed.proj.reset_parameters()
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.dist_token is not None:
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            self.pos_embed.requires_grad_(True)
        if self.shape.relative != "none":
            for i, block in enumerate(self.blocks, 1):
                assert isinstance(block, Block)
                assert isinstance(block.mlp, Mlp)
                block.attn.proj.weight.div_((2 * i) ** 0.5)
                block.mlp.fc2.weight.div_((2 * i) ** 0.5)

    def layer_of(self, name: str) -> int:
        """BEiT's rule, as in MAE's fine-tuning; a distillation token counts as after the blocks (G2SD)."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("cls_token", "pos_embed", "patch_embed.")) else self.depth + 1

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """The table for a grid of patches: [1, 1 + N, D], the class token first, or [1, N, D] without one; None
        without absolute positions.
        """
        if self.relative_position_index is not None:
            self.check_grid(grid)
        return None if self.pos_embed is None else resize_positions(self.pos_embed, self.grid, grid, self.placed)

    def embed(
        self, images: Tensor, mask: Mask | None = None, fill: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B,T,D] that enter block 1, and the grid of the whole image."""
        grid = self.check_images(images)
        if mask is not None:
            self.check_mask(mask, fill, grid)
        table = self.positions(grid)
        if mask is not None and fill is None:
            assert mask.ids_keep is not None
            x = self.patch_embed(images, mask.ids_keep)
            if table is not None:
                x = x + table[0, self.placed :][mask.ids_keep]
        else:
            x = self.patch_embed(images)
            if mask is not None and fill is not None:
                x = torch.where(mask.hidden[..., None], fill.to(x.dtype), x)
            if table is not None:
                x = x + table[:, self.placed :]
        if self.cls_token is not None:
            first = self.cls_token if table is None else self.cls_token + table[:, :1]
            if self.dist_token is not None:
                first = torch.cat([first, self.dist_token], dim=1)
            x = torch.cat([first.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return x, grid

    def _bias_index(self, ids: Tensor | None) -> Tensor | None:
        """Index of the relative bias for the tokens at hand: [T,T], or [B,T,T] for prefix tokens and the patches at
        `ids` [B,V].
        """
        index = self.relative_position_index
        if index is None or ids is None:
            return index
        ids = F.pad(ids + self.prefix, (self.prefix, 0))  # all prefix tokens have the biases of the first
        return index[ids[:, :, None], ids[:, None, :]]

    def _shared_bias(self, index: Tensor | None) -> Tensor | None:
        """The relative bias that all blocks share, if there is one."""
        return None if self.rel_pos_bias is None or index is None else cast(Tensor, self.rel_pos_bias(index))

    def forward(
        self, images: Tensor, mask: Mask | None = None, fill: Tensor | None = None, taps: Taps | None = None
    ) -> Features:
        """Encodes normalised images [B,3,h,w] and returns what `taps` asks for; runs no block and no part of a block
        beyond that.
        """
        taps = taps or Taps()
        self.check_taps(taps)
        x, grid = self.embed(images, mask, fill)
        index = self._bias_index(mask.ids_keep if mask is not None and fill is None else None)
        shared = self._shared_bias(index)
        out = Features(self.prefix, grid)
        whole = last_block(taps, self.depth, taps.tokens)
        way: Migration | None = None
        if self.shape.migration:
            places = torch.arange(grid[0] * grid[1], device=x.device)
            way = Migration(places, ((1, len(places)),), self.shape.migration, self.depth)
        if 0 in taps.hidden:
            out.hidden[0] = x
        for number, block in enumerate(self.blocks, 1):
            assert isinstance(block, Block)
            attention, qkv, normed = number in taps.attention, number in taps.qkv, number - 1 in taps.normed
            if number > whole and not (attention or qkv or normed):
                break
            if way is not None:
                index = self._bias_index(way.places)
                shared = self._shared_bias(index)
            bias = block.attn.bias(index) if shared is None else shared
            if not (attention or qkv or normed or way):
                x = self.run(block, x, bias)
            else:
                y = block.norm1(x)
                if normed:
                    out.normed[number - 1] = y if way is None else block.norm1(way.whole(x))
                if number > whole and not (attention or qkv):
                    break
                q, k, *v = block.attn.project(y, 3 if number <= whole or qkv else 2)
                if qkv:
                    out.qkv[number] = (q, k, v[0])
                if attention:
                    out.attention[number] = attention_logits(q, k, bias)
                if number > whole:
                    break
                heads = out.attention[number].softmax(dim=-1) @ v[0] if attention else attend(q, k, v[0], bias)
                x = block.add_attention(x, block.attn.output(heads))
                if way is not None:
                    x = way.step(number - 1, x, k)
                x = block.add_mlp(x)
            if number in taps.hidden:
                out.hidden[number] = x if way is None else way.whole(x)
        if way is not None:
            x = way.whole(x)
        if taps.tokens or self.depth in taps.normed:
            x = self.norm(x)
            if self.depth in taps.normed:
                out.normed[self.depth] = x
            out.tokens = x if taps.tokens else None
        return out
