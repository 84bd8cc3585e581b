"""Pre-training of hierarchical encoders written straight down, as the released codes are: whole images are embedded and
then gathered, units are unrolled and rolled back, convolutions are convolutions, everything is un-shuffled and
predicted. And the same of the libraries that have it.

Parts carry our names, so that `plain.drawn` gives every formulation the same weights, and so the same loss. Letters as
in `plain`; U mask units, V visible ones, t tokens inside a unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import Step, images, trainer
from benchmarks.plain import Shape, drawn, fill, masking, rows, target
from mimlet.models.shapes import HieraShape, HiViTShape

FOLLOW, FEATURE_WEIGHT = 0.996, 0.3


@dataclass(frozen=True)
class Hierarchical:
    """A pre-training: the encoder, the decoder, the share of mask units that is hidden. `features`: iTPN's masked
    feature modelling with a moving average.
    """

    shape: HieraShape | HiViTShape
    decoder: Shape
    ratio: float
    features: bool = False
    device: str = "cpu"

    @property
    def units(self) -> int:
        """Mask units of an image."""
        patches = self.shape.image_size // self.shape.patch
        return (patches // 2 if isinstance(self.shape, HieraShape) else patches) ** 2


def draws(batch: int, case: Hierarchical) -> tuple[Tensor, Callable[[], Tensor]]:
    """The images, and the noise [B,U] of one step's mask after the other."""
    generator = torch.Generator().manual_seed(0)
    pixels = images(batch, case.shape.image_size).to(case.device)
    return pixels, lambda: torch.rand(batch, case.units, generator=generator).to(case.device)


class Attention(nn.Module):
    """Of all tokens [B,T,D]; fused, or explicit with its softmax in float32."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            logits = q * (D // self.heads) ** -0.5 @ k.transpose(-2, -1)
            y = logits.float().softmax(-1).to(v.dtype) @ v
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, T, D))
        return out


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class MlpBlock(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, fused), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class UnitAttention(nn.Module):
    """Of unrolled tokens [B,T,C], units innermost: inside each of the `units`, or among all; queries are the maxima of
    `pool` tokens.
    """

    def __init__(self, dim: int, out: int, heads: int, pool: int, inside: bool) -> None:
        super().__init__()
        self.width, self.heads, self.pool, self.inside = out, heads, pool, inside
        self.qkv, self.proj = nn.Linear(dim, 3 * out), nn.Linear(out, out)

    def forward(self, x: Tensor, units: int) -> Tensor:
        B, windows = len(x), units if self.inside else 1
        qkv = self.qkv(x).reshape(B, -1, windows, 3, self.heads, self.width // self.heads)
        q, k, v = qkv.permute(3, 0, 4, 2, 1, 5).unbind(0)
        if self.pool > 1:
            q = q.unflatten(3, (self.pool, -1)).amax(3)
        heads = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(heads.transpose(1, 3).reshape(B, -1, self.width))
        return out


class HieraBlock(nn.Module):
    def __init__(self, dim: int, out: int, heads: int, ratio: float, pool: int, inside: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(out, eps=1e-6)
        self.attn, self.mlp = UnitAttention(dim, out, heads, pool, inside), Mlp(out, int(out * ratio))
        self.proj = nn.Linear(dim, out) if dim != out else None

    def forward(self, x: Tensor, units: int) -> Tensor:
        y = self.norm1(x)
        if self.proj is not None:
            x = self.proj(y).unflatten(1, (self.attn.pool, -1)).amax(1)
        x = x + self.attn(y, units)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Hiera(nn.Module):
    """Convolves the image without its hidden units, then gathers. Gives the fused stages, [B,V,2,2,D]."""

    def __init__(self, shape: HieraShape) -> None:
        super().__init__()
        stride, last = shape.patch // 4, 8 * shape.dim
        self.side = shape.image_size // (8 * stride)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, shape.dim, 2 * stride - 1, stride, stride - 1)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (8 * self.side) ** 2, shape.dim))
        self.blocks, self.ends, dim = nn.ModuleList(), [], shape.dim
        for stage, count in enumerate(shape.stages):
            for i in range(count):
                first, out = stage > 0 and i == 0, shape.dim * 2**stage
                pool, inside = 4 if first and stage <= 2 else 1, stage < 2 or (stage == 2 and first)
                self.blocks.append(HieraBlock(dim, out, shape.heads * 2**stage, shape.mlp_ratio, pool, inside))
                dim = out
            self.ends.append(len(self.blocks) - 1)
        self.multi_scale_fusion_heads = nn.ModuleList(
            nn.Conv2d(shape.dim * 2**i, last, 4 // 2**i, 4 // 2**i) for i in range(2)
        )
        self.norm = nn.LayerNorm(last, eps=1e-6)

    def forward(self, pixels: Tensor, keep: Tensor, units: int) -> Tensor:
        return fused(self.stages(pixels, keep), self.multi_scale_fusion_heads, self.norm)

    def stages(self, pixels: Tensor, keep: Tensor) -> list[Tensor]:
        """The ends of stages 1, 2 and 4, [B,V,h,w,C]."""
        B, side = len(pixels), self.side
        shown = torch.zeros(B, side * side, device=pixels.device).scatter(1, keep, 1.0)
        shown = F.interpolate(shown.view(B, 1, side, side), size=pixels.shape[2:])
        x = self.patch_embed["proj"](pixels * shown).flatten(2).transpose(1, 2) + self.pos_embed
        x = x.view(B, 8 * side, 8 * side, -1)
        for fine in (4, 2, 1):
            size = fine * side
            x = x.view(-1, size, 2, size, 2, x.shape[-1]).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        x = x.reshape(B, 64, side * side, -1)
        x = x.gather(2, keep[:, None, :, None].expand(-1, 64, -1, x.shape[-1])).flatten(1, 2)
        units, ends = keep.shape[1], []
        for i, block in enumerate(self.blocks):
            x = block(x, units)
            if i in (self.ends[0], self.ends[1], self.ends[3]):
                ends.append(self.rolled(x, units))
        return ends

    @staticmethod
    def rolled(x: Tensor, units: int) -> Tensor:
        """Back to rows and columns inside each unit."""
        B, T, C = x.shape
        side = 1
        x = x.view(B, T, 1, 1, C)
        while x.shape[1] > units:
            side *= 2
            x = x.view(B, 2, 2, -1, side // 2, side // 2, C).permute(0, 3, 1, 4, 2, 5, 6).reshape(B, -1, side, side, C)
        return x


def fused(ends: list[Tensor], heads: nn.ModuleList, norm: nn.Module) -> Tensor:
    """The sum of stages, each but the last through a convolution."""
    B, V = ends[0].shape[:2]
    out = ends[-1]
    for head, end in zip(heads, ends, strict=False):
        y = head(end.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = out + y.reshape(B, V, *y.shape[1:])
    fused: Tensor = norm(out)
    return fused


class TimmHiera(nn.Module):
    """timm's encoder, with the fusion of stages that timm does not have. Imports timm."""

    def __init__(self, shape: HieraShape) -> None:
        super().__init__()
        from timm.models.hiera import Hiera as Model

        stride = shape.patch // 4
        model = Model(
            img_size=(shape.image_size,) * 2, embed_dim=shape.dim, num_heads=shape.heads, stages=shape.stages, q_pool=2,
            patch_kernel=(2 * stride - 1,) * 2, patch_stride=(stride,) * 2, patch_padding=(stride - 1,) * 2,
            mlp_ratio=shape.mlp_ratio, num_classes=0,
        )  # fmt: skip
        self.patch_embed, self.pos_embed, self.blocks = model.patch_embed, model.pos_embed, model.blocks
        self.encode = model.forward_features
        plain = Hiera(shape)
        self.multi_scale_fusion_heads, self.norm = plain.multi_scale_fusion_heads, plain.norm

    def forward(self, pixels: Tensor, keep: Tensor, units: int) -> Tensor:
        shown = torch.zeros(len(pixels), units, dtype=torch.bool, device=pixels.device).scatter(1, keep, True)
        ends = self.encode(pixels, shown, return_intermediates=True)[1]
        whole = fused([ends[0], ends[1], ends[3]], self.multi_scale_fusion_heads, self.norm)
        return rows(whole.flatten(2), keep.argsort(1).argsort(1)).view_as(whole)  # timm keeps units in raster order


class Merge(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim, eps=1e-6), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        out: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return out


class Split(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4 * out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, V, side = x.shape[:3]
        four = self.reduction(self.norm(x)).reshape(B, V, side, side, 2, 2, -1).permute(0, 1, 2, 4, 3, 5, 6)
        out: Tensor = four.reshape(B, V, 2 * side, 2 * side, -1)
        return out


class HiViT(nn.Module):
    """Embeds all units, then gathers. Gives the ends of the three stages, [B,V,s,s,C]."""

    def __init__(self, shape: HiViTShape) -> None:
        super().__init__()
        self.side, dim = shape.image_size // shape.patch, shape.dim
        part = shape.patch // 4
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, dim // 4, part, part), "norm": nn.LayerNorm(dim // 4, eps=1e-6)}
        )
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, self.side**2, dim))
        self.blocks = nn.ModuleList()
        for width, count in ((dim // 4, shape.stages[0]), (dim // 2, shape.stages[1])):
            self.blocks.extend(MlpBlock(width, 3 * width) for _ in range(count))
            self.blocks.append(Merge(width))
        self.blocks.extend(Block(dim, shape.heads, fused=False) for _ in range(shape.stages[2]))

    def forward(self, pixels: Tensor, keep: Tensor) -> list[Tensor]:
        B, side = len(pixels), self.side
        x = self.patch_embed["proj"](pixels).reshape(B, -1, side, 4, side, 4).permute(0, 2, 4, 3, 5, 1)
        x = self.patch_embed["norm"](x.reshape(B, side * side, 4, 4, -1))
        x = x.gather(1, keep[..., None, None, None].expand(-1, -1, *x.shape[2:]))
        ends: list[Tensor] = []
        for block in self.blocks:
            if isinstance(block, Merge):
                ends.append(x)
                x = block(x)
                if len(ends) == 2:
                    x = x.flatten(1, 3) + rows(self.absolute_pos_embed.expand(B, -1, -1), keep)
            else:
                x = block(x)
        return [*ends, x[:, :, None, None]]


class ITPN(HiViT):
    """And its pyramid: gives the ends of the stages and the levels, both finest first."""

    def __init__(self, shape: HiViTShape) -> None:
        super().__init__(shape)
        dim, width = shape.dim, shape.pyramid_dim

        def block() -> MlpBlock:
            return MlpBlock(width, shape.pyramid_hidden)

        self.align_dim_16tofpn = nn.Linear(dim, width) if dim != width else nn.Identity()
        self.align_dim_16to8 = nn.Linear(dim // 2, width, bias=False)
        self.align_dim_8to4 = nn.Linear(dim // 4, width, bias=False)
        self.split_16to8, self.split_8to4 = Split(dim, width), Split(width, width)
        self.block_16to8 = nn.Sequential(*(block() for _ in range(shape.pyramid_depth)))
        self.block_8to4 = nn.Sequential(*(block() for _ in range(shape.pyramid_depth)))
        self.fpn_modules = nn.ModuleList(block() for _ in range(3))

    def levels(self, ends: list[Tensor]) -> list[Tensor]:
        u1, u2, u3 = ends
        t8 = self.block_16to8(self.split_16to8(u3) + self.align_dim_16to8(u2))
        t4 = self.block_8to4(self.split_8to4(t8) + self.align_dim_8to4(u1))
        coarsest_first = (self.align_dim_16tofpn(u3), t8, t4)
        return [module(x) for module, x in zip(self.fpn_modules, coarsest_first, strict=True)][::-1]


class Decoder(nn.Module):
    """Un-shuffles what is visible into mask tokens, decodes and predicts every patch."""

    def __init__(self, embed: nn.Module, case: Hierarchical) -> None:
        super().__init__()
        shape, (dim, depth, heads) = case.shape, (case.decoder.dim, case.decoder.depth, case.decoder.heads)
        hiera = isinstance(shape, HieraShape)
        self.embed, self.mask_token = embed, nn.Parameter(torch.zeros(1, 1, dim))
        table = torch.zeros(1, (shape.image_size // shape.patch) ** 2, dim)
        self.pos_embed = nn.Parameter(table, requires_grad=hiera)
        self.blocks = nn.ModuleList(Block(dim, heads, fused=hiera) for _ in range(depth))
        self.norm, self.pred = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 3 * shape.patch**2)

    def whole(self, x: Tensor, restore: Tensor) -> Tensor:
        """Visible ones [B,V,dim] and mask tokens in their places, [B,N,dim]."""
        hidden = self.mask_token.expand(len(x), restore.shape[1] - x.shape[1], -1).to(x.dtype)
        return rows(torch.cat([x, hidden], 1), restore)

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,dim] -> predictions [B,N,p*p*3]."""
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.pred(self.norm(x))
        return out


class Plain(nn.Module):
    """A pre-training: its loss of pixels [B,3,h,w] and noise [B,U]."""

    def __init__(self, case: Hierarchical) -> None:
        super().__init__()
        self.case = case

    def pixel_loss(self, prediction: Tensor, pixels: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` [B,N]: 1 where a patch is hidden."""
        error = (prediction - target(pixels, self.case.shape.patch, True)).square().mean(-1)
        return (error * hidden).sum() / hidden.sum()

    def follow(self) -> None:
        """After the optimiser's step."""


class PlainHieraMAE(Plain):
    def __init__(self, case: Hierarchical, encoder: nn.Module) -> None:
        super().__init__(case)
        assert isinstance(case.shape, HieraShape)
        self.encoder = encoder
        self.decoder = Decoder(nn.Linear(8 * case.shape.dim, case.decoder.dim), case)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        keep, restore = masking(noise, self.case.ratio)
        B, U = noise.shape
        side = round(U**0.5)
        x = self.decoder.embed(self.encoder(pixels, keep, U))
        dim = x.shape[-1]
        blank = self.decoder.mask_token.view(1, 1, 1, 1, dim).expand(B, U - x.shape[1], 2, 2, dim).to(x.dtype)
        x = torch.cat([x, blank], 1)
        x = x.gather(1, restore[..., None, None, None].expand(-1, -1, *x.shape[2:]))
        x = x.view(B, side, side, 2, 2, dim).permute(0, 1, 3, 2, 4, 5).reshape(B, 4 * U, dim)
        hidden = torch.ones_like(noise).scatter(1, keep, 0.0).view(B, side, side)
        hidden = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        return self.pixel_loss(self.decoder(x), pixels, hidden)


class StagesEmbed(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.embed = nn.LayerNorm(7 * dim, eps=1e-6), nn.Linear(7 * dim, out)

    def forward(self, ends: list[Tensor]) -> Tensor:
        out: Tensor = self.embed(self.norm(torch.cat([end.flatten(2) for end in ends], -1)))
        return out


class PlainHiViTMAE(Plain):
    def __init__(self, case: Hierarchical) -> None:
        super().__init__(case)
        assert isinstance(case.shape, HiViTShape)
        self.encoder = HiViT(case.shape)
        self.decoder = Decoder(StagesEmbed(case.shape.dim, case.decoder.dim), case)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        keep, restore = masking(noise, self.case.ratio)
        x = self.decoder.whole(self.decoder.embed(self.encoder(pixels, keep)), restore)
        return self.pixel_loss(self.decoder(x), pixels, torch.ones_like(noise).scatter(1, keep, 0.0))


class PlainITPN(Plain):
    """Every level is un-shuffled by itself, with mask tokens of its own; then they are summed."""

    def __init__(self, case: Hierarchical) -> None:
        super().__init__(case)
        shape, out = case.shape, case.decoder.dim
        assert isinstance(shape, HiViTShape)
        dim, width, strides = shape.dim, shape.pyramid_dim, (shape.patch // 4, shape.patch // 2, shape.patch)
        self.encoder = ITPN(shape)
        embeds = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, out // side**2)) for side in (1, 2, 4)
        )
        self.decoder = Decoder(embeds, case)
        self.heads, self.target = nn.ModuleDict(), None
        if case.features:
            self.target = HiViT(shape).requires_grad_(False)
            self.heads.update(
                {str(px): nn.Linear(width, to) for px, to in zip(strides, (dim // 4, dim // 2, dim), strict=True)}
            )

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        keep, restore = masking(noise, self.case.ratio)
        levels = self.encoder.levels(self.encoder(pixels, keep))
        embeds = self.decoder.embed
        assert isinstance(embeds, nn.ModuleList)
        parts = zip(embeds, reversed(levels), strict=True)
        x = torch.stack([self.decoder.whole(embed(level).flatten(2), restore) for embed, level in parts]).sum(0)
        loss = self.pixel_loss(self.decoder(x), pixels, torch.ones_like(noise).scatter(1, keep, 0.0))
        if self.target is None:
            return loss
        with torch.no_grad():
            targets = self.target(pixels, keep)
        errors = [
            (head(level).float() - expected.float()).square().mean()
            for head, level, expected in zip(self.heads.values(), levels, targets, strict=True)
        ]
        return loss + FEATURE_WEIGHT * torch.stack(errors).sum()

    def follow(self) -> None:
        if self.target is not None:
            online = dict(self.encoder.named_parameters())
            for name, mine in self.target.named_parameters():
                mine.data = mine.data * FOLLOW + online[name].detach().data * (1 - FOLLOW)


def written(case: Hierarchical) -> Plain:
    """The plain formulation of a case."""
    if isinstance(case.shape, HieraShape):
        return PlainHieraMAE(case, Hiera(case.shape))
    return PlainITPN(case) if case.shape.pyramid_dim else PlainHiViTMAE(case)


def stepping(model: Plain, batch: int, bf16: bool) -> Step:
    fill(model)
    model.to(model.case.device)
    pixels, noise = draws(batch, model.case)
    return trainer(model, lambda: model(pixels, noise()), bf16, fused=False, after=model.follow)


def step(batch: int, bf16: bool, case: Hierarchical) -> Step:
    return stepping(written(case), batch, bf16)


def timm_model(case: Hierarchical) -> Plain:
    """timm's Hiera in the plain formulation's MAE."""
    assert isinstance(case.shape, HieraShape)
    return PlainHieraMAE(case, TimmHiera(case.shape))


def timm_step(batch: int, bf16: bool, case: Hierarchical) -> Step:
    return stepping(timm_model(case), batch, bf16)


def transformers_model(case: Hierarchical) -> nn.Module:
    """transformers' HieraForPreTraining with our weights: `model(pixels, noise=noise).loss`."""
    from transformers import HieraConfig, HieraForPreTraining

    shape, stride = case.shape, case.shape.patch // 4
    assert isinstance(shape, HieraShape)
    config = HieraConfig(
        image_size=[shape.image_size] * 2, patch_size=[2 * stride - 1] * 2, patch_stride=[stride] * 2,
        patch_padding=[stride - 1] * 2, embed_dim=shape.dim, depths=list(shape.stages), mlp_ratio=shape.mlp_ratio,
        num_heads=[shape.heads * 2**stage for stage in range(4)], num_query_pool=2, mask_ratio=case.ratio,
        decoder_hidden_size=case.decoder.dim, decoder_depth=case.decoder.depth, decoder_num_heads=case.decoder.heads,
    )  # fmt: skip
    model: nn.Module = HieraForPreTraining(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = drawn(our_name(name, shape), parameter.shape)
            if "decoder_pred" in name:  # its pixels are in the order channel, row, column
                values = values.view(-1, 3, *parameter.shape[1:]).transpose(0, 1).flatten(0, 1)
            parameter.copy_(values)
    return model


def our_name(name: str, shape: HieraShape) -> str:
    """What a parameter of transformers' model is called here."""
    for theirs, ours in (
        ("hiera.embeddings.position_embeddings", "encoder.pos_embed"),
        ("hiera.embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"),
        ("multiscale_fusion.", "encoder."),
        ("encoder_norm", "encoder.norm"),
        ("decoder_block.layers", "blocks"),
        ("decoder_embeddings", "embed"),
        ("decoder_position_embeddings", "pos_embed"),
        ("decoder.decoder_", "decoder."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
    ):
        name = name.replace(theirs, ours)
    if found := re.match(r"hiera\.encoder\.stages\.(\d)\.layers\.(\d+)(.*)", name):
        stage, block = int(found[1]), int(found[2])
        return f"encoder.blocks.{sum(shape.stages[:stage]) + block}{found[3]}"
    return name


def transformers_step(batch: int, bf16: bool, case: Hierarchical) -> Step:
    model, (pixels, noise) = transformers_model(case).to(case.device), draws(batch, case)
    return trainer(model, lambda: model(pixels, noise=noise()).loss, bf16, fused=False)
