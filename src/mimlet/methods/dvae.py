"""A discrete VAE as visual tokenizer for BEiT: Ramesh et al., Zero-Shot Text-to-Image Generation, ICML 2021, section
2.1 and appendix A, at the size of the class in BEiT's code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.methods.base import Clock, Method
from mimlet.methods.settings import DVAESettings
from mimlet.methods.whole_step import WholeStep
from mimlet.models.tokenizer import DiscreteVAE, VAEShape, codebook_figures, count_codes

if TYPE_CHECKING:
    from mimlet.config import Config
    from mimlet.models.teacher import Teachers


class DVAE(Method):
    """Name each square of an image by a code, decode the image from the codes, compare pixels.

    In training a mixture of codes is drawn by Gumbel softmax, whose temperature falls; the tokenizer that is exported
    takes the likeliest code.
    """

    encoder: DiscreteVAE
    picture_caption = (
        "Tokens: squares of one colour have one code; colours mean nothing else. The reconstruction is decoded from "
        "these codes alone."
    )

    def __init__(self, encoder: DiscreteVAE, settings: DVAESettings) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.step = WholeStep(_figures)
        self.weights = {"reconstruction": 1.0} | ({"kl": settings.kl} if settings.kl else {})

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> DVAE:
        """From a configuration, of whose encoder it only takes the image size."""
        settings, augment = config.method, config.data.augment
        assert isinstance(settings, DVAESettings)
        sizes = {name: getattr(settings, name) for name in ("codes", "dim", "hidden", "layers", "residual_blocks")}
        shape = VAEShape(config.encoder.image_size, **sizes, mean=augment.mean, std=augment.std)
        return cls(DiscreteVAE(shape), settings)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """reconstruction: error of normalised pixels; kl: from using all codes alike, per token. Watched: use and
        perplexity of the codes that are likeliest, and the temperature.
        """
        temperature = self.temperature(clock)
        pixels, logits = self.encoder(batch.images, temperature)
        distance = F.mse_loss if self.settings.loss == "mse" else F.smooth_l1_loss
        counts = count_codes(logits.argmax(dim=1), self.encoder.vocab_size)
        return {
            "reconstruction": distance(pixels.float(), batch.images),
            "kl": uniform_divergence(logits),
            **self.step({"codes": counts}),
            "temperature": torch.tensor(temperature, device=pixels.device),
        }

    def temperature(self, clock: Clock) -> float:
        """Of Gumbel softmax: half a cosine over the training."""
        first, last = self.settings.temperature
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * clock.progress))

    def after_step(self, clock: Clock) -> None:
        """The next step counts its codes anew."""
        self.step.after_step()

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, tokens in colours that tell codes apart, and reconstruction."""
        vae = self.encoder
        ids = vae.encode(batch.images * vae.std + vae.mean)
        palette = torch.rand(vae.vocab_size, 3, generator=torch.Generator().manual_seed(0)).to(ids.device)
        colours = palette[ids].permute(0, 3, 1, 2)
        squares = F.interpolate(colours, scale_factor=float(vae.stride), mode="nearest")
        rows = {"tokens": squares, "reconstruction": vae.decode(ids)}
        return {"original": batch.images} | {name: (row - vae.mean) / vae.std for name, row in rows.items()}


def uniform_divergence(logits: Tensor) -> Tensor:
    """KL(q || uniform) of the distributions q over codes, [B,K,h,w], in nats per token: log K - entropy."""
    log_q = logits.log_softmax(dim=1)
    return (log_q.exp() * log_q).sum(dim=1).mean() + math.log(logits.shape[1])


def _figures(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return codebook_figures(sums["codes"])
