import pytest
import torch
from torch.testing import assert_close

from mimlet.methods.mae import MAE
from mimlet.models.features import Taps
from mimlet.models.parts import resize_positions, sincos_positions
from mimlet.models.shapes import ViTShape
from mimlet.objectives.reconstruct import patchify, unpatchify
from tests.methods.official import CLOCK, make_batch, make_decoder, make_encoder
from tests.shared import golden

OFFICIAL = {"patch_embed": "encoder.patch_embed", "cls_token": "encoder.cls_token", "blocks": "encoder.blocks"}


def official_name(name: str) -> str:
    if name == "mask_token":
        return "decoder.mask_token"
    if name.startswith("decoder_"):
        return "decoder." + name.removeprefix("decoder_")
    return "encoder." + name


@pytest.mark.parametrize("target", ["norm_pix", "raw_pix"])
def test_equals_official_mae(target: str) -> None:
    oracle = golden("mae")
    encoder = make_encoder(oracle.weights, ViTShape(32, 8, 48, 3, 4))
    method = MAE(encoder, make_decoder(oracle.weights, encoder, 32, 2, 4), 0.75, target == "norm_pix")
    batch = make_batch(oracle.io, 0.75)
    assert_close(batch.mask.hidden.float(), oracle.io["mask"])
    assert torch.equal(batch.mask.ids_restore, oracle.io["ids_restore"])

    features = encoder(batch.images, batch.mask, taps=Taps(hidden=(1, 2, 3)))
    assert_close(features.latent, oracle.io["latent"], **oracle.tolerance)
    for i in range(3):
        assert_close(features.hidden[i + 1], oracle.io[f"encoder_block_out.{i}"], **oracle.tolerance)
    prediction = method.decoder(features.latent, batch.mask)
    assert_close(prediction, oracle.io["pred"], **oracle.tolerance)
    hidden = method.decoder(features.latent, batch.mask, hidden_only=True)
    assert_close(hidden, prediction.gather(1, batch.mask.ids_hidden[..., None].expand_as(hidden)))

    loss = method(batch, CLOCK)["reconstruction"]
    assert_close(loss, oracle.io[f"loss_{target}"][0], **oracle.tolerance)
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters()}
    checked = [name for name in oracle.io if name.startswith(f"grad_{target}.")]
    assert len(checked) == 5
    for name in checked:
        assert_close(
            gradients[official_name(name.removeprefix(f"grad_{target}."))], oracle.io[name], **oracle.tolerance
        )


def test_positions_and_patches_equal_official() -> None:
    oracle = golden("mae")
    encoder_table = torch.cat([torch.zeros(1, 48), sincos_positions(48, 4, 4)])
    decoder_table = torch.cat([torch.zeros(1, 32), sincos_positions(32, 4, 4)])
    assert_close(encoder_table, oracle.io["sincos_pos_embed_encoder"], **oracle.tolerance)
    assert_close(decoder_table, oracle.io["sincos_pos_embed_decoder"], **oracle.tolerance)
    resized = resize_positions(oracle.weights["pos_embed"], (4, 4), (7, 7), 1)
    assert_close(resized, oracle.io["pos_embed_resized"], **oracle.tolerance)
    assert torch.equal(patchify(oracle.io["imgs"], 8), oracle.io["patchified"])
    assert torch.equal(unpatchify(oracle.io["pred"], (4, 4)), oracle.io["unpatchified_pred"])


def test_hidden_pixels_cannot_reach_the_encoder() -> None:
    oracle = golden("mae")
    encoder = make_encoder(oracle.weights, ViTShape(32, 8, 48, 3, 4))
    batch = make_batch(oracle.io, 0.75)
    patches = patchify(batch.images, 8)
    changed = unpatchify(torch.where(batch.mask.hidden[..., None], patches + 100, patches), (4, 4))
    assert torch.equal(encoder(batch.images, batch.mask).latent, encoder(changed, batch.mask).latent)
