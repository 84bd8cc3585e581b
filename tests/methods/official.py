"""Official MAE-lite weights (one flat model) brought into our parts."""

import torch
from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.methods.base import Clock
from mimlet.models.decoders import Decoder
from mimlet.models.vit import ViT, ViTShape

CLOCK = Clock(0, 10, 10, 0)


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def make_encoder(weights: dict[str, Tensor], shape: ViTShape) -> ViT:
    encoder = ViT(shape)
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder


def make_decoder(weights: dict[str, Tensor], encoder: ViT, dim: int, depth: int, heads: int) -> Decoder:
    decoder = Decoder(encoder.dim, encoder.grid, encoder.prefix, 3 * encoder.patch**2, dim, depth, heads)
    names = {name: name if name == "mask_token" else f"decoder_{name}" for name in decoder.state_dict()}
    decoder.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
    return decoder


def make_batch(io: dict[str, Tensor], ratio: float) -> Batch:
    return Batch({"image": io["imgs"]}, torch.arange(len(io["imgs"])), {"mask": Mask.from_noise(io["noise"], ratio)})
