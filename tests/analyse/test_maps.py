"""Attention over patches of hand-made encoders; reconstructions of decoders that predict nothing."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.analyse.maps import attention_maps, attention_picture, has_decoder, reconstruction_picture
from mimlet.analyse.subject import Subject, open_subject
from mimlet.data.seeding import key
from mimlet.errors import ConfigError, WeightsError
from mimlet.export.timm import export_encoder
from mimlet.methods.mae import build_decoder
from mimlet.methods.settings import DecoderSettings
from mimlet.models.decoders import Decoder
from mimlet.models.features import Features, Taps
from mimlet.models.foreign import ForeignEncoder
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights import encoder_state
from tests.families import micro

SHAPE = ViTShape(image_size=16, patch=8, dim=24, depth=3, heads=3)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SHARES = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.2, 0.2, 0.3, 0.3, 0.0]])
"""Of two heads, for a class token and four patches."""


class Made(nn.Module):
    """An encoder whose only block attends as told: shares [H,Q,T], for every image."""

    def __init__(self, shares: Tensor, prefix: int) -> None:
        super().__init__()
        self.shares, self.prefix = shares, prefix
        self.patch, self.dim, self.depth, self.heads, self.grid = 8, 4, 1, len(shares), (2, 2)

    def forward(self, images: Tensor, mask: None = None, *, taps: Taps) -> Features:
        assert taps == Taps(attention=(1,), tokens=False)
        logits = self.shares.log() + 7  # a softmax does not see the constant
        return Features(self.prefix, self.grid, attention={1: logits.expand(len(images), -1, -1, -1)})


def made(prefix: int = 1) -> Subject:
    """The class token (prefix 1) or the first patch attends with `SHARES`, every other token to itself only."""
    tokens = 4 + prefix
    shares = torch.eye(tokens).repeat(2, 1, 1)
    first = SHARES if prefix else SHARES[:, 1:] / SHARES[:, 1:].sum(dim=1, keepdim=True)
    shares[:, 0] = first
    return Subject(Made(shares, prefix), "made", "made")


def pictures(count: int = 2, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def vit(**changes: Any) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(ViTShape(**{**SHAPE.__dict__, **changes}))
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def opened(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def test_the_class_tokens_shares_of_patches_are_not_scaled_up() -> None:
    maps = attention_maps(made(), pictures())
    expected = torch.tensor([[[0.25, 0.125], [0.0625, 0.0625]], [[0.2, 0.3], [0.3, 0.0]]])
    assert_close(maps, expected.expand(2, 2, 2, 2))


def test_a_patch_asks_from_its_place_in_the_image() -> None:
    maps = attention_maps(made(), pictures(1), query=(1, 0))
    assert_close(maps, torch.tensor([[0.0, 0.0], [1.0, 0.0]]).expand(1, 2, 2, 2))


def test_without_class_token_all_patches_ask_on_average() -> None:
    subject = made(prefix=0)
    first = SHARES[0, 1:] / 0.5
    expected = (first.reshape(2, 2) + torch.tensor([[0.0, 1.0], [1.0, 1.0]])) / 4
    assert_close(attention_maps(subject, pictures(1))[0, 0], expected)
    assert_close(attention_maps(subject, pictures(1), query=(0, 0))[0, 0], first.reshape(2, 2))


@pytest.mark.parametrize("block", [1, 2, 3, 0])
def test_maps_are_rows_of_the_softmax(block: int) -> None:
    encoder, images = vit(), pictures()
    subject = open_subject(encoder)
    weights = subject.features(images, Taps(attention=(block or 3,))).attention[block or 3].softmax(dim=-1)
    assert_close(attention_maps(subject, images, block=block).flatten(2), weights[:, :, 0, 1:])
    assert_close(attention_maps(subject, images, block=block, query=(1, 1)).flatten(2), weights[:, :, 4, 1:])


def test_a_distillation_token_only_scales_a_map() -> None:
    encoder, images = vit(distillation_token=True), pictures()
    subject = open_subject(encoder)
    maps = attention_maps(subject, images).flatten(2)
    normalised = (images / 255 - torch.tensor(subject.mean).view(3, 1, 1)) / torch.tensor(subject.std).view(3, 1, 1)
    with torch.no_grad():
        own = encoder(normalised, taps=Taps(attention=(3,))).attention[3].softmax(dim=-1)[:, :, 0, 2:]
    assert_close(maps / maps.sum(dim=-1, keepdim=True), own / own.sum(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("query", [(2, 0), (0, 2), (-1, 0)])
def test_no_such_patch(query: tuple[int, int]) -> None:
    with pytest.raises(
        ConfigError, match=rf"no patch {query[0]},{query[1]} .*made, which has 2 x 2 patches; .* 0 to 1"
    ):
        attention_maps(made(), pictures(), query=query)


@pytest.mark.parametrize("block", [2, -1])
def test_no_such_block(block: int) -> None:
    with pytest.raises(ConfigError, match=rf"made has blocks 1 to 1 \(0: the last\), and no block {block}"):
        attention_maps(made(), pictures(), block=block)


def test_attention_that_cannot_be_seen() -> None:
    subject = made()
    subject.sees_attention = False
    with pytest.raises(ConfigError, match=r"attention of made cannot be seen.* leave its attention maps out"):
        attention_picture(subject, pictures())


def test_a_picture_shows_the_image_then_the_mean_then_every_head() -> None:
    images = pictures(3)
    shot, png = attention_picture(made(), images)
    side, under, label, gap = 112, 20, 24, 4
    picture = opened(png)
    assert picture.shape == (label + 3 * (side + under), 4 * (side + gap) - gap, 4)
    for index in range(3):
        top = label + index * (side + under)
        cells = [picture[top : top + side, c * (side + gap) : c * (side + gap) + side] for c in range(4)]
        original = images[index].permute(1, 2, 0).numpy().repeat(7, 0).repeat(7, 1)
        np.testing.assert_array_equal(cells[0][..., :3], original)
        assert all((cell[..., 3] == 255).all() for cell in cells)
        below = picture[top + side : top + side + under, :, 3]
        assert not below[:, : side + gap].any()
        assert all(0 < (below[:, c * (side + gap) :][:, :side] > 0).mean() < 0.5 for c in (1, 2, 3))
    grey, yellow = cells[3][56:, 56:, :3].astype(int), cells[2][:56, :56, :3].astype(int)
    assert (grey.max(axis=2) == grey.min(axis=2)).all()  # where head 2 attends to nothing
    assert (yellow[..., 0] - yellow[..., 2] > 60).all()  # where head 1 attends most
    assert shot.file == "attention_made_block_1_class.png"
    assert shot.title == "made: attention of the class token in block 1"
    assert shot.alt.startswith("3 images, and over each of them how the attention of the class token is spread")
    assert "each of 2 x 2 patches receives" in shot.caption
    assert shot.caption.endswith("each patch would have 20 %.")


def test_a_class_token_that_sees_itself_only_is_shown_grey() -> None:
    shares = torch.eye(5).expand(2, 5, 5)
    _, png = attention_picture(Subject(Made(shares, 1), "made", "made"), pictures(1))
    cells = opened(png)[24:136, 116:, :3].astype(int)
    assert (cells.max(axis=2) == cells.min(axis=2)).all()


def test_a_picture_frames_the_query() -> None:
    shot, png = attention_picture(made(), pictures(1), query=(1, 0))
    picture = opened(png)
    for column in range(4):
        left, top = column * 116, 24 + 56
        assert (picture[top, left : left + 56] == 255).all()
        assert (picture[top - 1, left + 1 : left + 56, :3] == 0).all()
        assert not (picture[top + 1, left + 1 : left + 55, :3] == 255).all()
    assert shot.file == "attention_made_block_1_patch_1_0.png"
    assert "the framed patch (row 1, column 0, from 0)" in shot.caption


def test_a_picture_without_class_token_says_who_asks() -> None:
    shot, _ = attention_picture(Subject(made(0).encoder, "a/b c", "made"), pictures(1))
    assert (shot.file, shot.title) == (
        "attention_a_b_c_block_1_mean.png",
        "a/b c: attention of all patches on average in block 1",
    )
    assert shot.caption.endswith("each patch would have 25 %.")


def saved(folder: Path, normalised: bool) -> Path:
    """A run folder whose decoder predicts 0 for every value of a patch, of 4 x 4 patches."""
    encoder = vit(patch=4)
    decoder = Decoder(24, encoder.grid, 1, 3 * 4 * 4, dim=12, depth=1, heads=3)
    nn.init.zeros_(decoder.pred.weight)
    export_encoder(folder, encoder, mean=MEAN, std=STD, decoder=decoder, normalised=normalised, info={})
    return folder


def rows(png: bytes, count: int) -> list[NDArray[np.uint8]]:
    """Original, visible and reconstructed images, three of [count,16,16,3]."""
    picture, line = opened(png)[..., :3], 24 + 112 + 8
    assert picture.shape[0] == 3 * line
    return [
        np.stack([picture[24 + row * line :][:112:7, index * 116 :][:, :112:7] for index in range(count)])
        for row in range(3)
    ]


def hidden_pixels(count: int, ratio: float, seed: int) -> NDArray[np.bool_]:
    """[count,16,16]: of 4 x 4 patches, those with the largest noise."""
    noise = torch.stack(
        [torch.rand(16, generator=torch.Generator().manual_seed(key("mask", seed, i))) for i in range(count)]
    )
    hidden = noise.argsort(dim=1).argsort(dim=1) >= int(16 * (1 - ratio))
    return hidden.view(count, 4, 4).numpy().repeat(4, 1).repeat(4, 2)


def means_of_patches(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over pixels and channels of each patch of 4 px, at each of its pixels: [B,16,16,3] -> [B,16,16,1]."""
    means = values.reshape(len(values), 4, 4, 4, 4, 3).mean(axis=(2, 4, 5))
    return means.repeat(4, 1).repeat(4, 2)[..., None]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("ratio", "seed"), [(0.75, 0), (0.5, 3)])
def test_hidden_patches_are_shown_as_their_decoder_means_them(
    normalised: bool, ratio: float, seed: int, tmp_path: Path
) -> None:
    subject, images = open_subject(saved(tmp_path, normalised), "mine"), pictures(3)
    assert has_decoder(subject)
    shot, png = reconstruction_picture(subject, images, mask_ratio=ratio, seed=seed)
    original, visible, reconstruction = rows(png, 3)
    pixels, hidden = images.permute(0, 2, 3, 1).numpy(), hidden_pixels(3, ratio, seed)
    blank = np.array(MEAN)
    means = means_of_patches((pixels / 255 - MEAN) / STD) * STD + MEAN
    predicted = (255 * (means if normalised else np.broadcast_to(blank, pixels.shape))).clip(0, 255)
    np.testing.assert_array_equal(original, pixels)
    np.testing.assert_array_equal(visible[~hidden], pixels[~hidden])
    np.testing.assert_array_equal(reconstruction[~hidden], pixels[~hidden])
    assert np.abs(visible[hidden] - 255 * blank).max() <= 0.51
    assert np.abs(reconstruction[hidden] - predicted[hidden]).max() <= 0.51
    assert (shot.file, shot.title) == ("reconstruction_mine.png", "mine: reconstruction")
    assert f"{100 * ratio:.0f} % of the patches are hidden" in shot.caption
    assert ("put back" in shot.caption) == normalised
    assert f"the {16 - int(16 * ratio)} of 16 patches" in shot.alt


def test_the_weights_are_those_of_the_file(tmp_path: Path) -> None:
    subject = open_subject(saved(tmp_path, normalised=True), "mine")
    before = reconstruction_picture(subject, pictures())
    subject.fresh_norm()
    nn.init.zeros_(subject.encoder.get_parameter("cls_token"))
    assert reconstruction_picture(subject, pictures()) == before


def test_no_decoder_no_reconstruction(tmp_path: Path) -> None:
    export_encoder(tmp_path, vit(), mean=MEAN, std=STD, decoder=None, normalised=True, info={})
    foreign = ForeignEncoder(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=1), 32)
    for subject in (open_subject(tmp_path, "mine"), open_subject(vit(), "mine"), open_subject(foreign, "mine")):
        assert not has_decoder(subject)
        with pytest.raises(WeightsError, match=r"mine comes without a decoder, .* \*_full\.pth"):
            reconstruction_picture(subject, pictures())


def test_a_decoder_must_say_what_it_predicts(tmp_path: Path) -> None:
    encoder, decoder = vit(patch=4), Decoder(24, (4, 4), 1, 48, dim=96, depth=1, heads=3)
    state = {name if name == "mask_token" else f"decoder_{name}": v for name, v in decoder.state_dict().items()}
    for name, reason in (("mine.pth", "does not say which pixels"), ("mine_full.pth", "")):
        torch.save({"model": {**encoder_state(encoder), **state}}, tmp_path / name)
        subject = open_subject(tmp_path / name, heads=3)
        assert has_decoder(subject) == (not reason)
        if reason:
            with pytest.raises(WeightsError, match=reason):
                reconstruction_picture(subject, pictures())
        else:
            assert "put back" in reconstruction_picture(subject, pictures())[0].caption


def test_a_mask_ratio_must_hide_and_show(tmp_path: Path) -> None:
    subject = open_subject(saved(tmp_path, normalised=True))
    with pytest.raises(ConfigError, match=r"mask ratio 1\.0 leaves 0 of 16 units visible"):
        reconstruction_picture(subject, pictures(), mask_ratio=1.0)


def test_maps_of_a_hiera_are_in_raster_order() -> None:
    """Four tokens of each of 4 x 4 units, the units innermost, of a grid of 8 x 8, where patches would be 4 x 4."""
    torch.manual_seed(0)
    subject, images = open_subject(micro("hiera_micro", q_pool=3), "mine"), pictures(2, 32)
    shares = subject.features(images, Taps(attention=(5,), tokens=False)).attention[5].softmax(-1)
    raster = shares.unflatten(3, (2, 2, 4, 4)).permute(0, 1, 2, 5, 3, 6, 4).reshape(2, 4, 64, 8, 8)
    maps = attention_maps(subject, images)
    assert_close(maps, raster.mean(dim=2))
    row, column = 3, 6  # row 1 of the 2 x 2 of unit (1, 3), column 0
    token = (1 * 2 + 0) * 16 + 1 * 4 + 3
    assert_close(attention_maps(subject, images, block=5, query=(row, column)), raster[:, :, token])
    shot, _ = attention_picture(subject, images)
    assert shot.title == "mine: attention of all patches on average in block 5"
    assert "the mean of 4 heads" in shot.alt
    assert "each of 8 x 8 patches" in shot.caption
    with pytest.raises(ConfigError, match="block 6 of mine does not attend to the whole image; the blocks 4, 5 do"):
        attention_maps(subject, images, block=6)
    with pytest.raises(ConfigError, match=r"no patch 8,0 \(row, column\) in mine, which has 8 x 8 patches"):
        attention_maps(subject, images, query=(8, 0))


@pytest.mark.parametrize(("name", "units"), [("hiera_micro", 4), ("itpn_micro", 8), ("hivit_micro", 8)])
def test_every_family_is_decoded(name: str, units: int, tmp_path: Path) -> None:
    """What is hidden becomes the mean of its patch, by a decoder that predicts 0; a Hiera hides mask units."""
    encoder, images = micro(name), pictures(2, 32)
    decoder = build_decoder(encoder, DecoderSettings(dim=16, depth=1, heads=2))
    nn.init.zeros_(decoder.pred.weight)
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD, decoder=decoder, normalised=True)
    shot, png = reconstruction_picture(open_subject(tmp_path, "mine"), images, mask_ratio=0.5)
    noise = torch.stack(
        [torch.rand(units**2, generator=torch.Generator().manual_seed(key("mask", 0, i))) for i in range(2)]
    )
    hidden = (noise.argsort(dim=1).argsort(dim=1) >= units**2 // 2).view(2, units, units).numpy()
    hidden = hidden.repeat(32 // units, 1).repeat(32 // units, 2)
    picture, line, side = opened(png)[..., :3], 24 + 128 + 8, 128
    assert picture.shape[0] == 3 * line
    visible, reconstruction = (
        np.stack([picture[24 + row * line :][:128:4, i * (side + 4) :][:, :128:4] for i in range(2)]) for row in (1, 2)
    )
    pixels = images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(visible[~hidden], pixels[~hidden])
    np.testing.assert_array_equal(reconstruction[~hidden], pixels[~hidden])
    assert np.abs(visible[hidden] - 255 * np.array(MEAN)).max() <= 0.51
    means = ((pixels / 255 - MEAN) / STD).reshape(2, 8, 4, 8, 4, 3).mean(axis=(2, 4, 5)).repeat(4, 1).repeat(4, 2)
    predicted = (255 * (means[..., None] * STD + MEAN)).clip(0, 255)
    assert np.abs(reconstruction[hidden] - predicted[hidden]).max() <= 0.51
    assert f"the {units**2 // 2} of {units**2} {'mask units' if units == 4 else 'patches'} that" in shot.alt
