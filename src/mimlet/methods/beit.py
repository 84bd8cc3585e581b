"""BEiT: Bao et al., BEiT: BERT Pre-Training of Image Transformers, ICLR 2022, and its released code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import ColorJitter
from torchvision.transforms.v2 import functional as VF

from mimlet.data.augment import check_crop, draw_box, draw_mode
from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler
from mimlet.data.pixels import Pixels, as_pillow, planes, resize, whole
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import reconstruction_pictures, start_vit
from mimlet.methods.masked import block_masking, draw_, init_beit_, mask_token
from mimlet.methods.settings import BEiTSettings, BlockMaskSettings
from mimlet.methods.whole_step import WholeStep
from mimlet.models.linear import Linear
from mimlet.models.tokenizer import Tokenizer, codebook_figures, count_codes, open_tokenizer
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport, Normalisation
from mimlet.objectives.reconstruct import patchify

if TYPE_CHECKING:
    from mimlet.config import AugmentSettings, Config
    from mimlet.data.augment import Transform
    from mimlet.models.teacher import Teachers


class BEiT(Method):
    """Fill hidden patches with a token, encode everything, predict how a tokenizer names the hidden patches.

    The head's layer norm is the encoder's final norm. `normalisation`: mean and deviation of the images it gets.
    """

    encoder: ViT
    frozen: ClassVar[tuple[str, ...]] = ("tokenizer",)
    picture_caption = "Hidden patches are what the tokenizer's decoder makes of the tokens predicted for them."
    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: ViT, tokenizer: Tokenizer, masking: BlockMaskSettings, normalisation: Normalisation
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.token_px = token_view(encoder, tokenizer)
        self.masking = block_masking(masking, encoder.grid)
        self.mask_token = mask_token(encoder.dim)
        self.lm_head = Linear(encoder.dim, tokenizer.vocab_size)
        draw_(self.lm_head.weight)
        nn.init.zeros_(self.lm_head.bias)
        for name, channels in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(channels).view(1, 3, 1, 1), persistent=False)
        self.step = WholeStep(_figures, count="hidden")
        self.load_report: LoadReport | None = None
        self.weights = {"cross_entropy": 1.0}

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> BEiT:
        """From a configuration."""
        settings, augment = config.method, config.data.augment
        assert isinstance(settings, BEiTSettings)
        encoder, report = start_vit(config, init_beit_)
        tokenizer = open_tokenizer(settings.tokenizer)
        method = cls(encoder, tokenizer, settings.masking, (augment.mean, augment.std))
        method.load_report = report
        return method

    def transform(self, augment: AugmentSettings, image_size: int) -> Transform:
        """One crop twice: `image` for the encoder, `tokens` for the tokenizer."""
        check_crop(augment.crop_scale, augment.crop_ratio)
        for name in ("pad_crop", "randaugment"):
            if getattr(augment, name):
                raise ConfigError(
                    f"data.augment.{name} is {getattr(augment, name)!r}, but method 'beit' renders one resized crop "
                    "for encoder and tokenizer, in which it would do nothing; remove it"
                )
        return TwoRenderings(augment, image_size, self.token_px)

    def masks(self) -> dict[str, MaskSampler]:
        """One mask of blocks; images hide different numbers of patches."""
        return {"mask": self.masking}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """cross_entropy: mean over all hidden patches of the step, whichever image, piece or process they are in.
        Watched: the share that is predicted right, and how the targets use the codebook.
        """
        hidden, places = batch.mask.hidden, batch.mask.places
        targets = self.visual_tokens(batch.views["tokens"]).flatten()[places]
        logits = self.lm_head(self.encode(batch).flatten(0, 1)[places]).float()
        total = F.cross_entropy(logits, targets, reduction="sum")
        figures = self.step(
            {
                "cross_entropy": total,
                "right": (logits.argmax(dim=1) == targets).sum(),
                "hidden": hidden.sum(),
                "codes": count_codes(targets, self.tokenizer.vocab_size),
            }
        )
        return {**figures, "cross_entropy": self.step.loss(total, figures["cross_entropy"])}

    def encode(self, batch: Batch) -> Tensor:
        """Tokens of all patches [B,N,D], the hidden ones having been filled."""
        patches: Tensor = self.encoder(batch.images, batch.mask, self.mask_token).patches
        return patches

    def visual_tokens(self, images: Tensor) -> Tensor:
        """The visual tokens [B,N] of normalised images at the tokenizer's size."""
        ids = self.tokenizer.encode(images * self.std + self.mean)
        if ids.shape[1:] != self.encoder.grid:
            raise ConfigError(
                f"method.tokenizer: {type(self.tokenizer).__name__} gives {ids.shape[1]} x {ids.shape[2]} tokens of "
                f"{images.shape[-1]} px, the encoder has {self.encoder.grid[0]} x {self.encoder.grid[1]} patches"
            )
        return ids.flatten(1)

    def on_gradients(self, clock: Clock) -> None:
        """Gradients of the mean over the hidden patches of all pieces."""
        self.step.on_gradients(self.parameters())

    def after_step(self, clock: Clock) -> None:
        """The next step counts anew."""
        self.step.after_step()

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible, and what the tokenizer's decoder makes of the predicted tokens; nothing where it has
        none.
        """
        if not self.tokenizer.decodes:
            return {}
        images, size, hidden = batch.images, self.token_px, batch.mask.hidden
        ids = self.visual_tokens(F.interpolate(images, (size, size), mode="bicubic", antialias=True))
        ids[hidden] = self.lm_head(self.encode(batch)[hidden]).argmax(dim=1)
        decoded = (self.tokenizer.decode(ids.view(-1, *self.encoder.grid)) - self.mean) / self.std
        decoded = F.interpolate(decoded, images.shape[-2:], mode="bicubic", antialias=True)
        patch = self.encoder.patch
        return reconstruction_pictures(patchify(decoded, patch), batch.images, batch.mask, patch, normalise=False)


@dataclass(frozen=True)
class TwoRenderings:
    """Colour jitter, flip and one random crop as in BEiT's code, in this order and on Pillow's images; the crop is
    rendered as `image` for the encoder and, by Lanczos, as `tokens` for the tokenizer.
    """

    augment: AugmentSettings
    image_size: int
    token_px: int

    def __call__(self, pixels: Pixels) -> dict[str, Tensor]:
        """A decoded RGB image -> uint8 [3,S,S] each."""
        augment, image = self.augment, as_pillow(pixels)
        if augment.color_jitter:
            image = ColorJitter(*[augment.color_jitter] * 3)(image)
        if torch.rand(()) < augment.flip:
            image = VF.hflip(image)
        box = draw_box(image.size, augment.crop_scale, augment.crop_ratio)
        crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        mode = draw_mode(augment.interpolation)
        tokens = crop.resize((self.token_px, self.token_px), Image.Resampling.LANCZOS)
        return {
            "image": planes(resize(whole(crop), self.image_size, self.image_size, mode)),
            "tokens": planes(whole(tokens)),
        }


def token_view(encoder: ViT, tokenizer: Tokenizer) -> int:
    """Side of the tokenizer's view in px, whose tokens are one for each patch; raises where it is not made for that."""
    rows, columns = encoder.grid
    size, own = tokenizer.stride * rows, tokenizer.input_size
    if own and own != size:
        has = own // tokenizer.stride
        raise ConfigError(
            f"method.tokenizer: it was trained on images of {own} px, {has} x {has} tokens of {tokenizer.stride} px; "
            f"the encoder has {rows} x {columns} patches, for which it would get images of {size} px. Train one with "
            f"encoder.image_size={size}, or one of another stride (method.layers), or change encoder.patch"
        )
    return size


def _figures(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    hidden = sums["hidden"].clamp(min=1)
    return {
        "cross_entropy": sums["cross_entropy"] / hidden,
        "token_accuracy": sums["right"] / hidden,
        **codebook_figures(sums["codes"]),
    }
