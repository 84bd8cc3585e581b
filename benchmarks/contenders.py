"""Training steps to compare: ours, those of peer libraries, and a plain formulation of the official code's way.

Each factory takes (batch, threads-independent settings) and returns a function that does one whole step (forward,
backward, optimiser) on random images and returns the loss. ViT-Tiny/16 with 12 heads, 224 px, mask 0.75, decoder 1 x
96 x 3, normalised pixel target, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], float]
SIZE, PATCH, RATIO = 224, 16, 0.75


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def trainer(model: nn.Module, loss_of: Callable[[], Tensor], bf16: bool, fused: bool) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=fused)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def transformers_mae(batch: int, bf16: bool) -> Step:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=12, intermediate_size=768,
        image_size=SIZE, patch_size=PATCH, mask_ratio=RATIO, norm_pix_loss=True,
        decoder_hidden_size=96, decoder_num_hidden_layers=1, decoder_num_attention_heads=3,
        decoder_intermediate_size=384,
    )  # fmt: skip
    model, pixels = ViTMAEForPreTraining(config), images(batch)
    model.train()
    return trainer(model, lambda: model(pixels).loss, bf16, fused=False)


def lightly_mae(batch: int, bf16: bool) -> Step:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import vit_tiny_patch16_224

    class MAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = MaskedVisionTransformerTIMM(vit=vit_tiny_patch16_224(num_heads=12))
            self.length = self.backbone.sequence_length
            self.decoder = MAEDecoderTIMM(
                num_patches=self.length - 1, patch_size=PATCH, embed_dim=192, decoder_embed_dim=96, decoder_depth=1,
                decoder_num_heads=3, mlp_ratio=4.0, proj_drop_rate=0.0, attn_drop_rate=0.0,
            )  # fmt: skip

        def forward(self, pixels: Tensor) -> Tensor:
            keep, hide = utils.random_token_mask(size=(batch, self.length), mask_ratio=RATIO, device=pixels.device)
            encoded = self.decoder.embed(self.backbone.encode(images=pixels, idx_keep=keep))
            masked = utils.repeat_token(self.decoder.mask_token, (batch, self.length))
            masked = utils.set_at_index(masked, keep, encoded.type_as(masked))
            prediction = self.decoder.predict(utils.get_at_index(self.decoder.decode(masked), hide))
            target = utils.get_at_index(utils.patchify(pixels, PATCH), hide - 1)
            loss: Tensor = F.mse_loss(prediction, utils.normalize_mean_var(target, dim=-1))
            return loss

    model, pixels = MAE(), images(batch)
    return trainer(model, lambda: model(pixels), bf16, fused=False)


class PlainBlock(nn.Module):
    """A transformer block that forms its attention map and keeps it, as code with forward hooks does."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        self.logits = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5
        heads = self.logits.softmax(-1) @ v
        x = x + self.proj(heads.transpose(1, 2).reshape(B, T, D))
        branch: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + branch


class PlainViT(nn.Module):
    """Embeds all patches, then gathers the visible ones."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 197, dim) * 0.02, requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def logits(self, number: int) -> Tensor:
        block = self.blocks[number - 1]
        assert isinstance(block, PlainBlock)
        assert block.logits is not None
        return block.logits

    def forward(self, pixels: Tensor, keep: Tensor) -> list[Tensor]:
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.position[:, 1:]
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.cls + self.position[:, :1]).expand(len(x), -1, -1), x], 1)
        out = []
        for block in self.blocks:
            x = block(x)
            out.append(x)
        return out


class PlainD2MAE(nn.Module):
    """D²-MAE written straight down: decoder on block 8, thirteenth block for attention, a ViT-Base teacher run to its
    end in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.student = PlainViT(192, 13, 12)
        self.teacher = PlainViT(768, 12, 12).requires_grad_(False).eval()
        self.embed, self.mask_token = nn.Linear(192, 96), nn.Parameter(torch.zeros(1, 1, 96))
        self.position = nn.Parameter(torch.randn(1, 197, 96) * 0.02, requires_grad=False)
        self.decoder, self.norm, self.pred = PlainBlock(96, 3), nn.LayerNorm(96, eps=1e-6), nn.Linear(96, 768)
        self.heads = nn.Conv2d(12, 12, 1, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        B = len(pixels)
        shuffle = torch.rand(B, 196).argsort(1)
        restore, keep = shuffle.argsort(1), shuffle[:, :49]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            self.teacher.norm(self.teacher(pixels, keep)[-1])
        latent = self.student.norm(self.student(pixels, keep)[7])
        x = self.embed(latent)
        patches = torch.cat([x[:, 1:], self.mask_token.expand(B, 147, -1).to(x.dtype)], 1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, 96))
        x = self.decoder(torch.cat([x[:, :1], patches], 1) + self.position)
        prediction = self.pred(self.norm(x))[:, 1:]
        target = pixels.reshape(B, 3, 14, 16, 14, 16).permute(0, 2, 4, 3, 5, 1).reshape(B, 196, 768)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (prediction - target).square().mean(-1)
        hidden = torch.ones(B, 196).scatter(1, keep, 0.0)
        attention = F.mse_loss(self.heads(self.student.logits(13)), self.teacher.logits(12))
        loss: Tensor = (error * hidden).sum() / hidden.sum() + attention
        return loss


def plain_d2mae(batch: int, bf16: bool) -> Step:
    model, pixels = PlainD2MAE(), images(batch)
    return trainer(model, lambda: model(pixels), bf16, fused=False)
