import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import mimlet
from mimlet.cli import main
from mimlet.errors import ConfigError
from mimlet.models.features import Taps
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.tasks.heads import head_losses, without_head
from mimlet.tasks.probe import Labelled
from tests.data.images import make_folder
from tests.families import micro
from tests.tiny import pretrain


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_a_head_is_taken_out_and_put_back() -> None:
    encoder, images = ViT(ViTShape(16, 8, 12, 2, 3)).eval(), torch.randn(2, 3, 16, 16)
    whole = encoder(images).latent
    with without_head(encoder, layer=1, head=2):
        without = encoder(images).latent
    assert torch.equal(encoder(images).latent, whole)
    encoder.blocks[0].attn.proj.weight.data[:, 4:8] = 0
    assert_close(without, encoder(images).latent)
    assert (without - whole).abs().max() > 1e-3


def carrier() -> ViT:
    """Two heads: only the second carries the sign of the image into the channels that the final norm lets through."""
    encoder = ViT(ViTShape(8, 8, 8, 1, 2)).eval()
    for parameter in encoder.parameters():
        parameter.data.zero_()
    block, pattern = encoder.blocks[0], torch.tensor([1.0, -1.0, 1.0, -1.0])
    encoder.patch_embed.proj.weight.data[:4, 0, 0, 0] = pattern
    block.norm1.weight.data.fill_(1)
    values = block.attn.qkv.weight.data[16:]
    values[:4, 0] = values[4:, 0] = pattern  # both heads
    block.attn.proj.weight.data[4:, 4:] = torch.eye(4)  # but the first one's output goes nowhere
    encoder.norm.weight.data[4:] = 1
    return encoder


def test_the_head_that_carries_the_class_is_found() -> None:
    encoder = carrier()
    titles = []

    def features(title: str) -> Labelled:
        titles.append(title)
        labels = torch.arange(12) % 2
        images = (2.0 * labels - 1).view(12, 1, 1, 1).expand(12, 3, 8, 8)
        with torch.no_grad():
            means: Tensor = encoder(images).patches.mean(dim=1)
        return means, labels

    whole, losses = head_losses(encoder, 0, features("training"), features)
    assert (whole, losses) == (100.0, [0.0, 50.0])
    assert titles == ["training", "test images", "without head 1", "without head 2"]
    assert head_losses(encoder, 1, features(""), features) == (whole, losses)
    with pytest.raises(ConfigError, match="no block 2: this encoder has blocks 1 to 1"):
        head_losses(encoder, 2, features(""), features)


def test_probe_of_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make_folder(tmp_path / "photos", ("ant", "bee", "cat"), each=4)
    run = pretrain(photos, tmp_path / "run")
    given = [str(run), "--data", str(photos), "--eval", str(photos)]
    assert main(["probe", *given, "--kind", "heads"]) == 0
    printed = capsys.readouterr().out
    with (run / "probe_heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    whole = mimlet.probe(run, data=photos, eval=photos)["top1"]
    assert f"top-1 without each head of block 2; {whole:.2f} with all" in printed.replace("\n", " ")
    assert [(row["block"], row["head"]) for row in rows] == [("2", "1"), ("2", "2"), ("2", "3")]
    assert all(float(row["top1"]) + float(row["lost"]) == pytest.approx(whole) for row in rows)
    result = mimlet.probe(run, data=photos, eval=photos, kind="heads", layer=1, out=str(tmp_path))
    assert list(result) == ["top1", "head_1", "head_2", "head_3"]
    assert (tmp_path / "probe_heads.csv").read_text().splitlines()[1].startswith("1,1,")
    assert main(["probe", *given, "--kind", "knn", "--layer", "1"]) == 2
    assert "judges the whole encoder; --layer 1 is for --kind heads" in capsys.readouterr().err
    assert main(["probe", *given, "--kind", "heads", "--layer", "3"]) == 2
    assert "no block 3: this encoder has blocks 1 to 2" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "layer", "heads"), [("hiera_micro", 5, 4), ("itpn_micro", 6, 4)])
def test_heads_of_every_family_are_taken_out(name: str, layer: int, heads: int) -> None:
    """Both by their places in what is joined: head 2 of this block is a slice of its projection's inputs."""
    encoder, images = micro(name).eval(), torch.randn(2, 3, 32, 32)
    taps = Taps(hidden=(layer - 1, layer), tokens=False)
    with without_head(encoder, layer, head=2):
        without = encoder(images, taps=taps).hidden
    (output,) = (
        module
        for part, module in encoder.named_modules()
        if part.endswith("attn.proj") and encoder.layer_of(f"{part}.weight") == layer
    )
    width = encoder.dims[layer] // heads
    output.weight.data[:, width : 2 * width] = 0
    expected = encoder(images, taps=taps).hidden
    assert_close(without, expected)


def test_blocks_without_attention_have_no_heads() -> None:
    with pytest.raises(ConfigError, match=r"block 2 does not attend .*; in a HiViT or iTPN the blocks 3, 4, 5, 6 do"):
        head_losses(micro("itpn_micro"), 2, (Tensor(), Tensor()), lambda title: (Tensor(), Tensor()))
