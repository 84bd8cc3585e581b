"""Training steps of peer libraries, and what every contender is made with.

Each factory takes (batch, bf16, ...) and returns a function that does one whole step (forward, backward, optimiser) on
random images and returns the loss. Here: MAE at the sizes of a case, 224 px, mask 0.75, normalised pixel target,
AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.plain import Case

Step = Callable[[], float]
SIZE, PATCH, RATIO = 224, 16, 0.75


def images(batch: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def trainer(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    bf16: bool,
    fused: bool,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> Step:
    """`before` and `after` the optimiser's step: clipping, followers."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=fused)

    def step() -> float:
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of()
        torch.autograd.backward(loss)
        before()
        optimizer.step()
        after()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def transformers_model(case: Case) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    student, decoder = case.student, case.student_decoder
    config = ViTMAEConfig(
        hidden_size=student.dim, num_hidden_layers=student.depth, num_attention_heads=student.heads,
        intermediate_size=4 * student.dim, image_size=case.size, patch_size=case.patch, mask_ratio=RATIO,
        norm_pix_loss=True, decoder_hidden_size=decoder.dim, decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.heads, decoder_intermediate_size=4 * decoder.dim,
    )  # fmt: skip
    model: nn.Module = ViTMAEForPreTraining(config).train()
    return model


def transformers_mae(batch: int, bf16: bool, case: Case) -> Step:
    model, pixels = transformers_model(case), images(batch, case.size)
    return trainer(model, lambda: model(pixels).loss, bf16, fused=False)


def lightly_mae(batch: int, bf16: bool, case: Case) -> Step:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    student, deep = case.student, case.student_decoder

    class MAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = VisionTransformer(
                case.size, case.patch, num_classes=0, embed_dim=student.dim, depth=student.depth,
                num_heads=student.heads,
            )  # fmt: skip
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.length = self.backbone.sequence_length
            self.decoder = MAEDecoderTIMM(
                num_patches=self.length - 1, patch_size=case.patch, embed_dim=student.dim, decoder_embed_dim=deep.dim,
                decoder_depth=deep.depth, decoder_num_heads=deep.heads, mlp_ratio=4.0, proj_drop_rate=0.0,
                attn_drop_rate=0.0,
            )  # fmt: skip

        def forward(self, pixels: Tensor) -> Tensor:
            keep, hide = utils.random_token_mask(size=(batch, self.length), mask_ratio=RATIO, device=pixels.device)
            encoded = self.decoder.embed(self.backbone.encode(images=pixels, idx_keep=keep))
            masked = utils.repeat_token(self.decoder.mask_token, (batch, self.length))
            masked = utils.set_at_index(masked, keep, encoded.type_as(masked))
            prediction = self.decoder.predict(utils.get_at_index(self.decoder.decode(masked), hide))
            target = utils.get_at_index(utils.patchify(pixels, case.patch), hide - 1)
            loss: Tensor = F.mse_loss(prediction, utils.normalize_mean_var(target, dim=-1))
            return loss

    model, pixels = MAE(), images(batch, case.size)
    return trainer(model, lambda: model(pixels), bf16, fused=False)
