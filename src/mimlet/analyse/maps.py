"""What an encoder attends to, and what its decoder makes of hidden patches, shown on real images."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mimlet.analyse.results import Shot
from mimlet.analyse.subject import Subject
from mimlet.data.batch import Batch
from mimlet.data.masks import RandomMasking
from mimlet.data.seeding import key
from mimlet.errors import ConfigError, WeightsError
from mimlet.methods.mae import reconstruction_pictures
from mimlet.models.build import encoder_of
from mimlet.models.decoders import decoder_input, decoder_taps
from mimlet.models.encoder import Encoder
from mimlet.models.features import Taps
from mimlet.models.weights import Checkpoint, fill_encoder, load_decoder, open_checkpoint
from mimlet.report.figures import CELL, GAP, INK, LABEL, image_grid, overlay

UNDER = 20
"""Room for a number under a map."""

Query = tuple[int, int]
"""(row, column) of a patch, from 0 at the top left."""


def attention_maps(subject: Subject, images: Tensor, *, block: int = 0, query: Query | None = None) -> Tensor:
    """Share of a query's attention that each patch receives, per head: [B,H,rows,columns] of images [B,3,S,S] uint8.

    The query is the class token, or the patch `query`; without class token and `query`, the mean over all patches as
    queries. `block`: from 1; 0: the last that attends. A hierarchical encoder's tokens of that block stand for patches.
    See `Features.attended`; distillation and register tokens are not among the
    keys, which multiplies a whole map by one factor.

    Raises `ConfigError` where there is no such block or patch, or where the attention cannot be seen.
    """
    if not subject.attending:
        raise ConfigError(f"no block of {subject.label} attends to the whole image; leave its attention maps out")
    if not subject.sees_attention:
        raise ConfigError(
            f"the attention of {subject.label} cannot be seen: its blocks do not call torch's "
            "scaled_dot_product_attention once on all tokens; leave its attention maps out"
        )
    if not 0 <= block <= subject.depth:
        raise ConfigError(f"{subject.label} has blocks 1 to {subject.depth} (0: the last), and no block {block}")
    if block and block not in subject.attending:
        raise ConfigError(
            f"block {block} of {subject.label} does not attend to the whole image; the blocks "
            f"{', '.join(map(str, subject.attending))} do"
        )
    number = block or subject.attending[-1]
    features = subject.features(images, Taps(attention=(number,), tokens=False))
    place: int | None = None
    (rows, columns), order = subject.layout(number)
    if query is not None:
        row, column = query
        if not (0 <= row < rows and 0 <= column < columns):
            raise ConfigError(
                f"no patch {row},{column} (row, column) in {subject.label}, which has {rows} x {columns} patches; "
                f"expected rows 0 to {rows - 1} and columns 0 to {columns - 1}"
            )
        place = features.prefix + int(order[row * columns + column])
    return features.attended(number, place, ((rows, columns), order)).cpu()


def attention_picture(
    subject: Subject, images: Tensor, *, block: int = 0, query: Query | None = None
) -> tuple[Shot, bytes]:
    """A PNG of `attention_maps` over images [B,3,S,S] uint8: a row per image, which shows the image, the mean over
    heads and every head.

    A map goes from 0 to its own largest share, which stands under it; the query patch has a frame.
    """
    maps = attention_maps(subject, images, block=block, query=query)
    number, heads, (rows, columns) = block or subject.attending[-1], maps.shape[1], maps.shape[-2:]
    maps = torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1)
    shown = images.permute(0, 2, 3, 1).cpu().numpy()
    side = _cell(shown.shape[1])
    step, line = side + GAP, side + UNDER
    titles = ["image", "mean", *(f"head {head}" for head in range(1, maps.shape[1]))]
    canvas = Image.new("RGBA", (len(titles) * step - GAP, LABEL + len(shown) * line))
    draw = ImageDraw.Draw(canvas)

    def write(text: str, column: int, middle: float, size: int) -> None:
        draw.text((column * step + side / 2, middle), text, INK, ImageFont.load_default(size), "mm")

    for column, title in enumerate(titles):
        write(title, column, LABEL / 2, 15)
    for index, image in enumerate(shown):
        top, plain = LABEL + index * line, _resized(image, side)
        cells = [plain, *(overlay(plain, each) for each in maps[index])]
        for column, cell in enumerate(cells):
            picture = Image.fromarray(cell)
            if query is not None:
                _frame(picture, query, (rows, columns))
            canvas.paste(picture, (column * step, top))
        for column, each in enumerate(maps[index], 1):
            write(_percent(float(each.max())), column, top + side + UNDER / 2 - 1, 14)
    if query is not None:
        who, name = f"the framed patch (row {query[0]}, column {query[1]}, from 0)", f"patch_{query[0]}_{query[1]}"
    else:
        who, name = ("the class token", "class") if subject.prefix else ("all patches on average", "mean")
    shot = Shot(
        f"attention_{slug(subject.label)}_block_{number}_{name}.png",
        f"{subject.label}: attention of {who.partition(' (')[0]} in block {number}",
        f"{len(shown)} images, and over each of them how the attention of {who} is spread over the patches: the mean "
        f"of {heads} heads, then every head",
        f"Share of the attention of {who} in block {number} of {subject.depth} that each of {rows} x {columns} patches "
        "receives: grey none, yellow the most. Each map has its own scale from 0 to the share under it; spread evenly, "
        f"each patch would have {_percent(1 / (rows * columns + subject.prefix))}.",
    )
    return shot, _png(canvas)


def has_decoder(subject: Subject) -> bool:
    """Whether `reconstruction_picture` has a decoder to show, one that tells which pixels it predicts."""
    checkpoint = _checkpoint(subject)
    return checkpoint is not None and bool(checkpoint.decoder) and checkpoint.pixels is not None


@torch.no_grad()
def reconstruction_picture(
    subject: Subject, images: Tensor, *, mask_ratio: float = 0.75, seed: int = 0
) -> tuple[Shot, bytes]:
    """A PNG of what the decoder beside an encoder makes of images [B,3,S,S] uint8 with a share of their patches hidden:
    original, visible patches, prediction in place of the hidden ones.

    A decoder of normalised pixels predicts patches without mean and contrast, which are put back from the original. The
    mask of image i depends on `seed` and i only, so that models of one grid are shown the same patches. The weights are
    read anew from where the subject came from.

    Raises `WeightsError` with the reason where there is no decoder, or where it does not tell what it predicts.
    """
    checkpoint = _checkpoint(subject)
    if checkpoint is None or not checkpoint.decoder:
        raise WeightsError(
            f"{subject.label} comes without a decoder, so that nothing can be reconstructed. Pre-training runs keep "
            "one, and of the official MAE files *_full.pth and mae_visualize_*.pth"
        )
    if checkpoint.pixels is None:
        raise WeightsError(
            f"{checkpoint.source} does not say which pixels its decoder predicts, so that they cannot be shown; name "
            "it as the official files: *_full.pth for normalised pixels, mae_visualize_*.pth for raw ones"
        )
    encoder = encoder_of(cast(Encoder, subject.encoder).shape)
    fill_encoder(encoder, checkpoint)
    decoder = load_decoder(checkpoint, encoder)
    encoder.to(subject.device).eval()
    decoder.to(subject.device).eval()
    sampler = RandomMasking(encoder.units, mask_ratio)
    draws = [sampler.draw(torch.Generator().manual_seed(key("mask", seed, i))) for i in range(len(images))]
    mask = sampler.collate(torch.stack(draws))
    batch = Batch({"image": images}, torch.arange(len(images)), {"mask": mask})
    batch = batch.prepare(subject.device, subject.mean, subject.std)
    features, patches = encoder(batch.images, batch.mask, taps=decoder_taps(encoder)), encoder.patch_mask(batch.mask)
    prediction = decoder(decoder_input(encoder, features), patches)
    normalised = checkpoint.pixels == "normalised"
    pictures = reconstruction_pictures(prediction, batch.images, patches, encoder.patch, normalised)
    shown, hidden = encoder.units - int(mask.hidden[0].sum()), f"{100 * mask_ratio:.3g} %"
    units = "patches" if encoder.unit == 1 else "mask units"
    shot = Shot(
        f"reconstruction_{slug(subject.label)}.png",
        f"{subject.label}: reconstruction",
        f"Three rows of {len(images)} images: the original, the {shown} of {encoder.units} {units} that are shown, and "
        "with the hidden ones as the decoder predicts them",
        f"{hidden} of the {units} are hidden and predicted, visible ones are the original."
        + (" The decoder predicts normalised pixels: a patch's own mean and contrast are put back." * normalised),
    )
    return shot, image_grid(pictures, mean=subject.mean, std=subject.std)


def slug(label: str) -> str:
    """A model's label as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", label).strip("._")


def _checkpoint(subject: Subject) -> Checkpoint | None:
    """The file that a subject came from; None for modules and models of other libraries."""
    readable = isinstance(subject.encoder, Encoder) and Path(subject.source).exists()
    return open_checkpoint(subject.source) if readable else None


def _cell(size: int) -> int:
    """Side of an image in a picture: small ones are enlarged by a whole factor, large ones reduced."""
    return min(size * max(1, round(CELL[0] / size)), CELL[1])


def _resized(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Pixels stay pixels where an image [S,S,3] is enlarged."""
    filter_ = Image.Resampling.NEAREST if side >= len(image) else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize((side, side), filter_))


def _frame(picture: Image.Image, query: Query, grid: tuple[int, int]) -> None:
    """Draws a frame around a patch, legible on any ground."""
    height, width = picture.height / grid[0], picture.width / grid[1]
    left, top, right, bottom = (
        round(value) for value in (query[1] * width, query[0] * height, (query[1] + 1) * width, (query[0] + 1) * height)
    )
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left - 1, top - 1, right, bottom), outline="black", width=3)
    draw.rectangle((left, top, right - 1, bottom - 1), outline="white")


def _percent(share: float) -> str:
    """0.5 %, 5.1 %, 51 %."""
    return f"{100 * share:.{int(share < 0.0995)}f} %"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
