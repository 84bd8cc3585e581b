"""Official weights (MAE-lite's are one flat model) brought into our parts."""

import torch
from torch import Tensor

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.methods.base import Clock, Method
from mimlet.models.decoders import Decoder
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT

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


def fill(method: Method, weights: dict[str, Tensor], names: dict[str, str]) -> None:
    """Loads official weights to the last tensor. `names`: how official names begin -> how ours do; the first that fits
    counts, and an empty one of ours leaves the tensor aside. Convolutions of one pixel become linear layers.
    """
    state, known = {}, method.state_dict()
    for name, value in weights.items():
        theirs = next(start for start in names if name.startswith(start))
        if names[theirs]:
            ours = names[theirs] + name.removeprefix(theirs)
            state[ours] = value.view_as(known[ours])
    method.load_state_dict(state)
