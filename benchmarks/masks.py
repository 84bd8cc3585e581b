"""What every masking hides, on a drawn scene and a scanned digit: writes docs/images/masks.png.

    python -m benchmarks.masks

The masks are those of the methods' default settings, on 14 x 14 patches.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mimlet.atomic import write_atomic
from mimlet.data.masks import Mask, MaskSampler, RandomMasking, UnitMasking
from mimlet.methods.masked import block_masking
from mimlet.methods.settings import BEiTSettings, BootMAESettings, MAESettings, MaskFeatSettings, SimMIMSettings

GRID = (14, 14)
PATCH, SHOWN, DRAWN = 16, 8, 4  # pixels of a patch: in the methods, in the picture, and how much finer it is drawn
SIDE = GRID[0] * SHOWN
GAP, LABEL = 8, 40
HIDDEN, INK = (205, 207, 212), (40, 44, 52)


def samplers() -> dict[str, MaskSampler]:
    """By label, line by line."""
    simmim = SimMIMSettings()
    return {
        "MAE\nrandom": RandomMasking(GRID[0] * GRID[1], MAESettings().mask_ratio),
        "SimMIM\nsquares": UnitMasking(GRID, simmim.mask_px // PATCH, simmim.mask_ratio),
        "BEiT\nblocks": block_masking(BEiTSettings().masking, GRID),
        "MaskFeat\nblocks": block_masking(MaskFeatSettings().masking, GRID),
        "BootMAE\nblocks, exact": block_masking(BootMAESettings().masking, GRID),
    }


def scene() -> Image.Image:
    """A house by the sea, drawn large and reduced."""
    size = SIDE * DRAWN
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    at = size / 100

    def shape(points: list[tuple[float, float]], colour: str) -> None:
        draw.polygon([(x * at, y * at) for x, y in points], fill=colour)

    def disc(x: float, y: float, radius: float, colour: str) -> None:
        draw.ellipse([(x - radius) * at, (y - radius) * at, (x + radius) * at, (y + radius) * at], fill=colour)

    for y in range(size):
        share = y / size
        draw.line([(0, y), (size, y)], fill=(int(90 + 150 * share), int(160 + 60 * share), int(225 - 20 * share)))
    disc(80, 18, 9, "#ffd75e")
    shape([(0, 62), (100, 58), (100, 74), (0, 74)], "#2f78a8")
    shape([(0, 72), (35, 66), (70, 70), (100, 66), (100, 100), (0, 100)], "#5d9a4d")
    shape([(18, 48), (54, 48), (54, 84), (18, 84)], "#f2e6cf")
    shape([(13, 50), (36, 28), (59, 50)], "#b4473a")
    shape([(32, 64), (41, 64), (41, 84), (32, 84)], "#6b4a34")
    for x in (22, 45):
        shape([(x, 54), (x + 6, 54), (x + 6, 60), (x, 60)], "#5f7f96")
    shape([(76, 62), (80, 62), (80, 88), (76, 88)], "#6b4a34")
    for x, y, radius in ((78, 50, 12), (71, 58, 8), (86, 58, 8)):
        disc(x, y, radius, "#2e6b3c")
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def digit() -> Image.Image:
    """A scan of those that come with scikit-learn."""
    from sklearn.datasets import load_digits

    scan = (load_digits().images[8] * (255 / 16)).astype(np.uint8)
    return Image.fromarray(scan).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def masked(image: Image.Image, hidden: torch.Tensor) -> Image.Image:
    """The image without its hidden patches [U]."""
    where: NDArray[np.bool_] = hidden.view(GRID).numpy().repeat(SHOWN, 0).repeat(SHOWN, 1)
    return Image.fromarray(np.where(where[..., None], np.array(HIDDEN, np.uint8), np.asarray(image)))


def rows(image: Image.Image, seed: int) -> dict[str, Image.Image]:
    """By label: the image, one draw of every mask, and the two views that MIM-HD decodes."""
    found = {"image": image}
    generator = torch.Generator().manual_seed(seed)
    for label, sampler in samplers().items():
        mask = sampler.collate(sampler.draw(generator)[None])
        found[f"{label}, {int(mask.hidden.sum())}"] = masked(image, mask.hidden[0])
    pair = Mask.from_noise(torch.rand(1, GRID[0] * GRID[1], generator=generator), 0.5)
    for label, mask in (("first half", pair), ("the other half", pair.complement())):
        found[f"MIM-HD\n{label}"] = masked(image, mask.hidden[0])
    return found


def picture() -> Image.Image:
    """All of it; above each column who masks, how, and how many of 196 patches are hidden in the first row."""
    lines = [rows(scene(), 0), rows(digit(), 1)]
    canvas = Image.new("RGB", (len(lines[0]) * (SIDE + GAP) + GAP, LABEL + len(lines) * (SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, label in enumerate(lines[0]):
        middle = GAP + column * (SIDE + GAP) + SIDE // 2
        draw.multiline_text((middle, LABEL // 2), label, fill=INK, font=font, anchor="mm", align="center")
    for row, line in enumerate(lines):
        for column, image in enumerate(line.values()):
            canvas.paste(image, (GAP + column * (SIDE + GAP), LABEL + row * (SIDE + GAP)))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/masks.png"))
    out: Path = parser.parse_args().out
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", optimize=True)
    write_atomic(out, buffer.getvalue())


if __name__ == "__main__":
    main()
