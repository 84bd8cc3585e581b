"""HiViT, iTPN and Fast-iTPN: two stages of MLPs inside each patch, then attention among patches; with taps.

Parameter names are the official ones, so that weights travel: `absolute_pos_embed` (fast: `pos_embed`),
`patch_embed.{proj, norm}`, one flat list `blocks.i` with the merges (`norm`, `reduction`) as members, and the parts of
the pyramid beside them (`align_dim_16tofpn`, `split_16to8`, `block_16to8`, `fpn_modules`, ...).

Units stay apart until stage 3: [B,n,4,4,C/4], [B,n,2,2,C/2], [B,n,C] with the channels last. Convolutions, whose stride
is their kernel everywhere, are products of the parts of a unit; hidden units are dropped before anything is computed.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from mimlet.data.masks import Mask
from mimlet.errors import ConfigError
from mimlet.models.encoder import Encoder, as_map, last_block
from mimlet.models.features import Features, Taps
from mimlet.models.gathering import Windows, cut
from mimlet.models.linear import Linear, linear
from mimlet.models.migration import Migration
from mimlet.models.parts import (
    NORM_EPS,
    Attention,
    Block,
    ConvMlp,
    Mlp,
    MlpBlock,
    SelfAttention,
    SplitAttention,
    SwiGlu,
    TileConv,
    attend,
    attention_logits,
    decomposed_bias,
    relative_index,
    resize_positions,
    sincos_positions,
)
from mimlet.models.pyramid import Pyramid
from mimlet.models.shapes import HiViTShape

INNER_RATIO = 3
"""Hidden width of the MLPs of stages 1 and 2, in widths."""


class PatchEmbed(nn.Module):
    """Linear embedding of the 4 x 4 parts of each patch, held as a convolution as in every public checkpoint."""

    def __init__(self, patch: int, dim: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch // 4, patch // 4)
        self.norm: nn.Module = nn.LayerNorm(dim, eps=NORM_EPS) if norm else nn.Identity()

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """[B,3,h,w] -> [B,N,4,4,C/4], patches in raster order; with `ids` [B,V] only those are read, [B,V,4,4,C/4]."""
        (B, channels, height, width), p = images.shape, self.proj.kernel_size[0]
        rows, columns = height // (4 * p), width // (4 * p)
        tiles = images.reshape(B, channels, rows, 4, p, columns, 4, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
        if ids is None:
            units = tiles.flatten(5).flatten(1, 2)
        else:
            batch = torch.arange(B, device=images.device)[:, None]
            units = tiles[batch, ids // columns, ids % columns].flatten(4)
        x: Tensor = self.norm(linear(units, self.proj.weight.flatten(1), self.proj.bias))
        return x


class PatchMerge(nn.Module):
    """2 x 2 tokens become one of twice the width: joined in the order (row, column) (0,0), (1,0), (0,1), (1,1), normed
    and mapped; `fast`: normed, then a convolution.
    """

    def __init__(self, dim: int, fast: bool) -> None:
        super().__init__()
        self.fast = fast
        self.norm = nn.LayerNorm(dim if fast else 4 * dim, eps=NORM_EPS)
        self.reduction: nn.Module = TileConv(dim, 2 * dim, 2) if fast else Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,n,2s,2s,C] -> [B,n,s,s,2C]."""
        if not self.fast:
            B, n, side, _, dim = x.shape
            x = x.reshape(B, n, side // 2, 2, side // 2, 2, dim).permute(0, 1, 2, 4, 5, 3, 6).flatten(4)
        merged: Tensor = self.reduction(self.norm(x))
        return merged


class HiViT(Encoder, Pyramid, Windows):
    """HiViT encoder, an iTPN with a pyramid: `(images, mask, fill, taps) -> Features`.

    With a mask and no `fill`, hidden patches are dropped before embedding. A `fill` [1,1,4C], in the order channel,
    row, column, replaces what hidden patches embed to before stage 1; a `fill` [1,1,C] replaces their tokens after the
    second merge. This last one, CLIP-supervised iTPN's, leaks: stages 1 and 2, and through them the finer levels of the
    pyramid, see the hidden patches.

    Blocks are numbered over the stages; merges do not count. Hidden outputs of stages 1 and 2 are [B,16 n,C/4] and
    [B,4 n,C/2], patch by patch and in raster order inside each; `Taps.normed` gives what the first norm of the next
    block gives, after a merge in between. Only blocks of stage 3 attend.

    Inputs of another size work: positions are interpolated, and tables of "decomposed" relative positions; "full" ones
    are not. `position_offset` = 0.1 resamples positions as iTPN's official code does (`resize_positions`): detectors
    and segmenters, and the model of pixels even at its own grid.

    For dense inputs (whole images): windows and gathering tokens in stage 3 (`mimlet.models.gathering`), and migration
    (`mimlet.models.migration`), where tokens come back before `norm` and the pyramid. A window is the same for all
    inputs; one that spans the whole of an input changes nothing. `attending` are then the global blocks that all tokens
    enter; hidden outputs show the whole grid.
    """

    family: ClassVar[str] = "a HiViT or iTPN"
    shape: HiViTShape

    def __init__(self, shape: HiViTShape, drop_path: float = 0.0, constant_drop_path: bool = False) -> None:
        super().__init__()
        if shape.patch % 4:
            raise ConfigError(f"a patch of {shape.patch} px has no 4 x 4 parts; set encoder.patch to a multiple of 4")
        self.shape = shape
        self.position_offset = shape.position_offset
        self.patch, self.dim, self.heads = shape.patch, shape.dim, shape.heads
        dims = (shape.dim // 4, shape.dim // 2, shape.dim)
        self.dims = (dims[0], *(dim for dim, blocks in zip(dims, shape.stages, strict=True) for _ in range(blocks)))
        self.depth = sum(shape.stages)
        self.inner = self.depth - shape.stages[2]  # blocks of stages 1 and 2
        self.grid = (shape.image_size // shape.patch,) * 2
        strides = (shape.patch // 4, shape.patch // 2, shape.patch)
        self.stages = dict(zip(strides, dims, strict=True))
        self.levels = dict.fromkeys(strides, shape.pyramid_dim) if shape.pyramid_dim else {}
        self.fills = (4 * shape.dim, shape.dim)
        self.decodes = "levels" if self.levels else "stages"
        fast = shape.form == "fast"
        self.patch_embed = PatchEmbed(shape.patch, dims[0], norm=not fast)
        table = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], shape.dim))
        self.absolute_pos_embed = None if fast else table
        self.pos_embed = table if fast else None
        first = drop_path if constant_drop_path else 0.0
        rates = iter(torch.linspace(first, drop_path, self.depth, device="cpu").tolist())
        self.blocks = nn.ModuleList()
        for dim, blocks in zip(dims[:2], shape.stages, strict=False):
            self.blocks.extend(self._mlp_block(dim, next(rates)) for _ in range(blocks))
            self.blocks.append(PatchMerge(dim, fast))
        self.blocks.extend(self._block(next(rates)) for _ in range(shape.stages[2]))
        self.norm: nn.Module = nn.LayerNorm(shape.dim, eps=NORM_EPS) if fast and self.levels else nn.Identity()
        if self.levels:
            self.add_pyramid(shape.dim, shape.pyramid_dim, shape.pyramid_depth, shape.pyramid_hidden, fast)
        self.relative_position_index: Tensor | None
        index = relative_index(*self.grid, 0) if shape.relative == "full" else None
        self.register_buffer("relative_position_index", index, persistent=False)
        self.add_windows()
        whole = [i for i in range(shape.stages[2]) if i not in self.windowed and not (shape.migration and i)]
        self.attending = tuple(self.inner + 1 + i for i in whole)
        self.init_mae_()

    def _mlp_block(self, dim: int, drop_path: float) -> MlpBlock:
        """A block of stage 1 or 2."""
        if self.shape.form == "fast":
            return MlpBlock(dim, ConvMlp(dim, INNER_RATIO * dim, inner_norm=True), drop_path=drop_path)
        return MlpBlock(dim, Mlp(dim, INNER_RATIO * dim), self.shape.layer_scale, drop_path)

    def _block(self, drop_path: float) -> Block:
        """A block of stage 3."""
        shape, (rows, columns) = self.shape, self.grid
        dim, heads, hidden = shape.dim, shape.heads, int(shape.dim * shape.mlp_ratio)
        attn: SelfAttention
        mlp: nn.Module
        if shape.form == "fast":
            attn, mlp = SplitAttention(dim, heads), SwiGlu(dim, hidden)
        else:
            attn, mlp = Attention(dim, heads), Mlp(dim, hidden)
        if shape.relative == "full":
            entries = (2 * rows - 1) * (2 * columns - 1)
            attn.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads))
        elif shape.relative == "decomposed":
            attn.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, dim // heads))
            attn.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, dim // heads))
        return Block(dim, heads, layer_scale=shape.layer_scale, drop_path=drop_path, attn=attn, mlp=mlp)

    @property
    def normed_dims(self) -> tuple[int, ...]:
        """Widths of what `Taps.normed` gives: those of the next block, as a merge may lie in between."""
        return (*self.dims[1:], self.dims[-1])

    @property
    def table(self) -> nn.Parameter:
        """The absolute positions [1,N,C], which are added to the tokens that enter stage 3."""
        table = self.absolute_pos_embed if self.pos_embed is None else self.pos_embed
        assert table is not None
        return table

    @torch.no_grad()
    def init_mae_(self) -> None:
        """The family's masked pre-training: linear layers truncated normal 0.02, sin-cos positions trainable, relative
        ones zero. Fast-iTPN: linear layers Xavier-normal, the patch embedding Xavier-uniform; then MLPs, and values and
        outputs of attention, are scaled by sqrt(ln(2 x blocks of stage 3)), which the norms inside MLPs ask for.
        """
        fast = self.shape.form == "fast"
        self._init_layers_(xavier=fast)
        if fast:
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
            scale = math.sqrt(math.log(2 * self.shape.stages[2]))
            for name, parameter in self.named_parameters():
                if any(part in name for part in ("mlp.fc", "mlp.w", "attn.proj", "attn.v_proj")):
                    parameter.mul_(scale)
        if self.shape.position == "sincos":
            self.table.copy_(sincos_positions(self.dim, *self.grid))

    @torch.no_grad()
    def init_classifier_(self) -> None:
        """HiViT's training with labels: linear layers, positions and relative positions truncated normal 0.02."""
        self._init_layers_(xavier=False)
        for name, parameter in self.named_parameters():
            if name.endswith("relative_position_bias_table"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def _init_layers_(self, xavier: bool) -> None:
        """Linear layers as said, biases zero, norms 1 and 0; convolutions as PyTorch does; positions truncated normal
        0.02, relative ones zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if xavier:
                    nn.init.xavier_normal_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d | nn.ConvTranspose2d):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(("relative_position_bias_table", "rel_pos_h", "rel_pos_w")):
                nn.init.zeros_(parameter)
        nn.init.trunc_normal_(self.table, std=0.02)
        self.init_windows_()

    def layout(self, layer: int) -> tuple[tuple[int, int], Tensor]:
        """Layers of stages 1 and 2 have 16 and 4 tokens per patch."""
        side = 4 if layer <= self.shape.stages[0] else 2 if layer <= self.inner else 1
        tokens = torch.arange(self.grid[0] * self.grid[1] * side**2)
        order = as_map(tokens.view(1, -1, side**2, 1), self.grid, side)[0, 0]
        return (order.shape[0], order.shape[1]), order.flatten()

    def layer_of(self, name: str) -> int:
        """Merges belong to the block before them, as in iTPN's fine-tuning; the pyramid counts as after the blocks."""
        if name.startswith("blocks."):
            members = list(self.blocks)[: int(name.split(".")[1]) + 1]
            return sum(not isinstance(member, PatchMerge) for member in members)
        if name == "gathering_token":
            return self.inner + 1
        if name.startswith(("cross.", "window_rpe.")):
            return self.inner + 1 + int(name.split(".")[1])
        embeds = name.startswith("patch_embed.") or name in ("absolute_pos_embed", "pos_embed")
        return 0 if embeds else self.depth + 1

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table for a grid of patches, [1,N,C]."""
        if self.relative_position_index is not None:
            self.check_grid(grid)
        return resize_positions(self.table, self.grid, grid, 0, self.position_offset)

    def forward(
        self, images: Tensor, mask: Mask | None = None, fill: Tensor | None = None, taps: Taps | None = None
    ) -> Features:
        """Encodes normalised images [B,3,h,w] and returns what `taps` asks for; runs no block beyond that, and of the
        pyramid only what leads to the levels asked for.
        """
        taps = taps or Taps()
        self.check_taps(taps)
        grid = self.check_images(images)
        if mask is not None:
            self.check_mask(mask, fill, grid)
        ids = mask.ids_keep if mask is not None and fill is None else None
        out = Features(0, grid)
        x = self.patch_embed(images, ids)
        if mask is not None and fill is not None and fill.shape[-1] == self.fills[0]:
            parts = fill.view(1, 1, self.dims[0], 4, 4).permute(0, 1, 3, 4, 2).to(x.dtype)
            x = torch.where(mask.hidden[..., None, None, None], parts, x)
        if 0 in taps.hidden:
            out.hidden[0] = x.flatten(1, 3)
        ends = self._inner_stages(x, taps, out)
        if len(ends) < 3:
            return self._give(ends, grid, ids, taps, out)
        x = ends.pop().flatten(1, 3)
        if mask is not None and fill is not None and fill.shape[-1] == self.fills[1]:
            x = torch.where(mask.hidden[..., None], fill.to(x.dtype), x)
        table = self.positions(grid)
        x = x + (table if ids is None else table[0][ids])
        dense = self.shape.migration or self.windows_for(grid)
        x = self._dense_stage3(x, grid, taps, out) if dense else self._stage3(x, grid, ids, taps, out)
        if self._last(taps) == self.depth:
            ends.append(x[:, :, None, None])
        return self._give(ends, grid, ids, taps, out)

    def _last(self, taps: Taps) -> int:
        """The last block whose output is needed."""
        whole = taps.tokens or bool(taps.levels) or self.patch in taps.stages
        inner = {self.patch // 4: self.shape.stages[0], self.patch // 2: self.inner}
        return max(last_block(taps, self.depth, whole), *(inner.get(stride, 0) for stride in taps.stages), 0)

    def _goes_on(self, number: int, taps: Taps) -> bool:
        """Whether anything after the output of block `number` is asked for."""
        following = number + 1
        asked = number in taps.normed or following in taps.attention or following in taps.qkv
        return number < self._last(taps) or asked

    def _inner_stages(self, x: Tensor, taps: Taps, out: Features) -> list[Tensor]:
        """Stages 1 and 2 from the embedding [B,n,4,4,C/4] as far as is needed: the maps that enter the merges, and what
        the second gives.
        """
        ends, number = [], 0
        for member in list(self.blocks)[: self.inner + 2]:
            if isinstance(member, PatchMerge):
                ends.append(x)
            if not self._goes_on(number, taps):
                return ends
            if isinstance(member, MlpBlock):
                if number in taps.normed:
                    out.normed[number] = member.norm2(x).flatten(1, 3)
                    if not self._last(taps) > number:
                        return ends
                number += 1
            x = self.run(member, x)
            if isinstance(member, MlpBlock) and number in taps.hidden:
                out.hidden[number] = x.flatten(1, 3)
        return [*ends, x]

    def _stage3(self, x: Tensor, grid: tuple[int, int], ids: Tensor | None, taps: Taps, out: Features) -> Tensor:
        """Stage 3 from tokens [B,n,C] with positions, as far as is needed: the last output; taps go to `out`. The
        tokens are all patches of the `grid`, or those at `ids` [B,n].
        """
        last, index = self._last(taps), self._bias_index(ids)
        for number, block in enumerate(list(self.blocks)[self.inner + 2 :], self.inner + 1):
            assert isinstance(block, Block)
            if not self._goes_on(number - 1, taps):
                break
            attention, qkv, normed = number in taps.attention, number in taps.qkv, number - 1 in taps.normed
            if not (attention or qkv or normed):
                x = self.run(self._untapped, block, x, index, grid, ids)
            else:
                y = block.norm1(x)
                if normed:
                    out.normed[number - 1] = y
                if number > last and not (attention or qkv):
                    break
                q, k, v = block.attn.project(y)
                bias = self._bias(block.attn, q, index, grid, ids)
                if qkv:
                    out.qkv[number] = (q, k, v)
                if attention:
                    out.attention[number] = attention_logits(q, k, bias)
                if number > last:
                    break
                heads = out.attention[number].softmax(dim=-1) @ v if attention else attend(q, k, v, bias)
                x = block.add_mlp(block.add_attention(x, block.attn.output(heads)))
            if number in taps.hidden:
                out.hidden[number] = x
        return x

    def _untapped(
        self, block: Block, x: Tensor, index: Tensor | None, grid: tuple[int, int], ids: Tensor | None
    ) -> Tensor:
        """A block of stage 3 of which nothing is tapped, see `_stage3`."""
        q, k, v = block.attn.project(block.norm1(x))
        heads = attend(q, k, v, self._bias(block.attn, q, index, grid, ids))
        return block.add_mlp(block.add_attention(x, block.attn.output(heads)))

    def _dense_stage3(self, x: Tensor, grid: tuple[int, int], taps: Taps, out: Features) -> Tensor:
        """The same for all patches, with windows or migration. Taps show the whole grid: tokens that have left, as they
        left. Gathering tokens rest in global blocks, which are those of the plain encoder.
        """
        last, side = self._last(taps), self.shape.window or max(grid)
        way = Migration(*cut(grid, side, x.device), self.shape.migration, self.shape.stages[2])
        x = self.enter(x, way)
        prefix = x.shape[1] - way.places.shape[1]
        for layer, block in enumerate(list(self.blocks)[self.inner + 2 :]):
            assert isinstance(block, Block)
            number = self.inner + 1 + layer
            if not self._goes_on(number - 1, taps):
                break
            attention, qkv, normed = number in taps.attention, number in taps.qkv, number - 1 in taps.normed
            if attention or qkv or normed:
                y = block.norm1(way.whole(x)[:, prefix:])
                if normed:
                    out.normed[number - 1] = y
                if attention or qkv:
                    q, k, v = block.attn.project(y)
                    if qkv:
                        out.qkv[number] = (q, k, v)
                    if attention:
                        bias = self._bias(block.attn, q, self._bias_index(None), grid, None)
                        out.attention[number] = attention_logits(q, k, bias)
            if number > last:
                break
            if layer in self.windowed:
                x = self.windowed_block(layer, block, x, way, grid[1])
            else:
                resting, x = x[:, :prefix], x[:, prefix:]
                q, k, v = block.attn.project(block.norm1(x))
                bias = self._bias(block.attn, q, self._bias_index(way.places), grid, way.places)
                x = block.add_attention(x, block.attn.output(attend(q, k, v, bias)))
                x = torch.cat([resting, block.add_mlp(way.step(layer, x, k))], dim=1)
            if number in taps.hidden:
                out.hidden[number] = way.whole(x)[:, prefix:]
        return way.whole(x)[:, prefix:]

    def _bias_index(self, ids: Tensor | None) -> Tensor | None:
        """Index of the relative bias for all patches [N,N], or for those at `ids` [B,n]: [B,n,n]."""
        index = self.relative_position_index
        return index if index is None or ids is None else index[ids[:, :, None], ids[:, None, :]]

    @staticmethod
    def _bias(
        attn: SelfAttention, q: Tensor, index: Tensor | None, grid: tuple[int, int], ids: Tensor | None
    ) -> Tensor | None:
        """A block's bias of relative positions, [1 or B,H,n,n]; None without tables."""
        if attn.rel_pos_h is None or attn.rel_pos_w is None:
            return attn.bias(index)
        return decomposed_bias(q, attn.rel_pos_h, attn.rel_pos_w, grid, ids)

    def _give(
        self, ends: list[Tensor], grid: tuple[int, int], ids: Tensor | None, taps: Taps, out: Features
    ) -> Features:
        """Adds what is asked of the ends of the stages: stages, tokens, levels."""
        strides = sorted(self.stages)

        def shown(x: Tensor) -> Tensor:
            """[B,n,s,s,C] -> a map, or tokens by patch where patches were dropped."""
            tokens = x.flatten(2, 3)
            return tokens if ids is not None else as_map(tokens, grid, x.shape[2])

        out.stages = {stride: shown(x) for stride, x in zip(strides, ends, strict=False) if stride in taps.stages}
        if taps.tokens or taps.levels or self.depth in taps.normed:
            x = self.norm(ends[2])
            if self.depth in taps.normed:
                out.normed[self.depth] = x.flatten(1, 3)
            if taps.tokens:
                out.tokens = x.flatten(1, 3)
            if taps.levels:
                levels = self.pyramid(ends[0], ends[1], x, 3 - strides.index(min(taps.levels)))
                given = dict(zip(reversed(strides), levels, strict=False))
                out.levels = {stride: shown(given[stride]) for stride in taps.levels}
        return out
