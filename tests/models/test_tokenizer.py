"""Visual tokenizers: equality with other people's code where there is some, files of every kind, plain errors."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, FlavaImageCodebook, FlavaImageCodebookConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from mimlet.errors import ConfigError, RunError, WeightsError
from mimlet.models.tokenizer import (
    VQGAN,
    DallE,
    DiscreteVAE,
    VAEShape,
    VQShape,
    codebook_figures,
    count_codes,
    open_tokenizer,
)

SMALL = VAEShape(image_size=16, codes=12, dim=6, hidden=8, layers=2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def spread(module: nn.Module) -> None:
    """Weights under which tokens differ from each other."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 25
            parameter.copy_(torch.randn_like(parameter) * fan**-0.5 * (2 if parameter.dim() > 1 else 1))


def dall_e_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the `dall_e` package."""
    return {re.sub("bias$", "b", re.sub("weight$", "w", name)): value for name, value in state.items()}


def plain_dall_e(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The facts, line by line: logits of DALL-E's encoder under its own names."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.w"]
        return F.conv2d(x, weight, state[f"{name}.b"], padding=weight.shape[-1] // 2)

    x = conv("blocks.input", (1 - 2 * 0.1) * images + 0.1)
    for group in range(1, 5):
        for block in (1, 2):
            at = f"blocks.group_{group}.block_{block}"
            y = x
            for i in range(1, 5):
                y = conv(f"{at}.res_path.conv_{i}", y.relu())
            x = (conv(f"{at}.id_path", x) if f"{at}.id_path.w" in state else x) + y / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return conv("blocks.output.conv", x.relu())


def test_dall_e_is_what_the_paper_and_its_code_say(images: Tensor) -> None:
    tokenizer = DallE(width=8, codes=24)
    spread(tokenizer)
    logits = plain_dall_e(dall_e_names(tokenizer.state_dict()), images)
    assert_close(tokenizer.blocks(0.8 * images + 0.1), logits, atol=1e-5, rtol=1e-5)
    ids = tokenizer.encode(images)
    assert torch.equal(ids, logits.argmax(1))
    assert ids.shape == (2, 4, 4)
    assert len(ids.unique()) > 3


def test_dall_e_of_the_published_size_has_its_tensors() -> None:
    with torch.device("meta"):
        ours, theirs = DallE().state_dict(), FlavaImageCodebook(FlavaImageCodebookConfig()).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {
        name.replace(".group.", ".").replace(".path.", "."): value.shape for name, value in theirs.items()
    }


def test_dall_e_opens_from_both_packages(images: Tensor, tmp_path: Path) -> None:
    config = FlavaImageCodebookConfig(hidden_size=8, vocab_size=24)
    theirs = FlavaImageCodebook(config).eval()
    spread(theirs)
    expected = theirs.get_codebook_indices(0.8 * images + 0.1)
    save_file(theirs.state_dict(), tmp_path / "flava.safetensors")
    ours = open_tokenizer(tmp_path / "flava.safetensors")
    assert isinstance(ours, DallE)
    assert torch.equal(ours.encode(images), expected)
    torch.save(dall_e_names(ours.state_dict()), tmp_path / "dall_e.pt")
    assert torch.equal(open_tokenizer(tmp_path / "dall_e.pt").encode(images), expected)
    assert (ours.vocab_size, ours.stride, ours.input_size, ours.decodes) == (24, 8, 0, False)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_pickled_module_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    torch.save(DallE(width=4, codes=8), tmp_path / "encoder.pkl")
    with pytest.raises(WeightsError, match=r"could run code: refused.*save its weights with safetensors"):
        open_tokenizer(tmp_path / "encoder.pkl")


@pytest.mark.parametrize("levels", [2, 3])
def test_vqgan_equals_other_ports_of_it(images: Tensor, tmp_path: Path, levels: int) -> None:
    sizes = {
        "base_channels": 32,
        "channel_multiplier": [1, 2, 2][:levels],
        "num_res_blocks": 2,
        "latent_channels": 6,
        "embed_dim": 5,
        "num_embeddings": 40,
        "double_latent": False,
    }
    chameleon = ChameleonVQVAE(ChameleonVQVAEConfig(**sizes, resolution=32, attn_resolutions=[16])).eval()
    janus = JanusVQVAE(JanusVQVAEConfig(**sizes, num_patches=32 // 2 ** (levels - 1))).eval()
    for theirs in (chameleon, janus):
        spread(theirs)
        # Lightning's file, with weights of losses; taming-transformers numbers the decoder's levels the other way.
        state = {
            re.sub(r"decoder\.up\.(\d)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name): value
            for name, value in {**theirs.state_dict(), "loss.discriminator.weight": torch.zeros(3)}.items()
        }
        torch.save({"state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
        ours = open_tokenizer(tmp_path / "last.ckpt")
        assert isinstance(ours, VQGAN)
        with torch.no_grad():
            expected = theirs.encode(2 * images - 1, return_dict=True).image_tokens
        ids = ours.encode(images)
        assert torch.equal(ids.flatten(), expected.flatten())
        assert len(ids.unique()) > 3
        side = 32 // 2 ** (levels - 1)
        assert ids.shape == (2, side, side)
        assert (ours.vocab_size, ours.stride) == (40, 2 ** (levels - 1))
    assert isinstance(ours, VQGAN)
    assert ours.decodes
    with torch.no_grad():
        # Janus looks up unit vectors; taming-transformers the codes themselves.
        ours.quantize["embedding"].weight.copy_(F.normalize(ours.quantize["embedding"].weight, dim=1))
        pixels = janus.decode(ids.flatten(1))
    assert_close(ours.decode(ids), ((pixels + 1) / 2).clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_vqgan_without_its_decoder(images: Tensor, tmp_path: Path) -> None:
    whole = VQGAN(VQShape(32, (32, 64), 1, frozenset({1}), 6, 40, 5))
    spread(whole)
    state = {name: value for name, value in whole.state_dict().items() if not name.startswith(("decoder.", "post_"))}
    save_file(state, tmp_path / "encoder.safetensors")
    alone = open_tokenizer(tmp_path / "encoder.safetensors")
    assert not alone.decodes
    assert torch.equal(alone.encode(images), whole.encode(images))
    del state["encoder.down.1.block.0.conv1.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"not a whole VQGAN: it lacks encoder\.down\.1\.block\.0\.conv1\.weight"):
        open_tokenizer(tmp_path / "part.safetensors")


def test_our_own_survives_its_file(tmp_path: Path) -> None:
    ours = DiscreteVAE(SMALL)
    spread(ours)
    ours.save(tmp_path, {"method": "dvae"})
    again = open_tokenizer(tmp_path)
    assert isinstance(again, DiscreteVAE)
    assert again.shape == SMALL
    assert (again.vocab_size, again.stride, again.input_size, again.decodes) == (12, 4, 16, True)
    images = torch.rand(3, 3, 16, 16)
    ids = ours.encode(images)
    assert torch.equal(again.encode(images), ids)
    assert torch.equal(again.decode(ids), ours.decode(ids))
    assert ids.shape == (3, 4, 4)
    assert ids.dtype == torch.int64
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (SMALL.mean, SMALL.std))
    assert torch.equal(ids, ours.encoder((images - mean) / std).argmax(1)), "it normalises by itself"
    decoded = ours.decode(ids)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_tokens_do_not_depend_on_the_precision_around(images: Tensor) -> None:
    ours = DiscreteVAE(VAEShape(image_size=32, codes=64, dim=6, hidden=8, layers=2))
    spread(ours)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours.encode(images)
        half = ours.encoder((images - 0.5) / 0.5).argmax(1)
    assert torch.equal(mixed, ours.encode(images))
    assert not torch.equal(mixed, half), "else this test could not fail"


def test_a_sharp_mixture_is_one_code(images: Tensor) -> None:
    ours = DiscreteVAE(SMALL)
    spread(ours)
    sharp = ours.encoder[-1]
    assert isinstance(sharp, nn.Conv2d)
    with torch.no_grad():
        sharp.weight.mul_(1e4)
        pixels, logits = ours(images, temperature=0.01)
        ids = logits.argmax(1)
        assert_close(pixels, ours.decoder(ours.codebook(ids).permute(0, 3, 1, 2)), atol=1e-4, rtol=1e-4)
    ours(images, temperature=1.0)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_codebook_figures() -> None:
    counts = count_codes(torch.tensor([[0, 2], [2, 0]]), 4)
    assert counts.tolist() == [2, 0, 2, 0]
    figures = codebook_figures(counts)
    assert figures["codebook_use"].item() == 0.5
    assert figures["codebook_perplexity"].item() == pytest.approx(2)
    assert codebook_figures(torch.tensor([0.0, 5.0]))["codebook_perplexity"].item() == pytest.approx(1)
    assert codebook_figures(torch.ones(8))["codebook_perplexity"].item() == pytest.approx(8)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 layers names squares of 8 px, which do not divide images of 20 px"):
        DiscreteVAE(VAEShape(image_size=20))
    with pytest.raises(RunError, match=r"holds no encoder\.safetensors; expected .* of the method dvae"):
        open_tokenizer(tmp_path)
    with pytest.raises(WeightsError, match="no file"):
        open_tokenizer(tmp_path / "missing.pt")
    save_file({"patch_embed.proj.weight": torch.zeros(2)}, tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError, match=r"begin with patch_embed\.proj\.weight.*VQ-KD, are not supported"):
        open_tokenizer(tmp_path / "vit.safetensors")
    dall_e = dall_e_names(DallE(width=4, codes=8).state_dict())
    del dall_e["blocks.group_3.block_1.id_path.w"]
    save_file(dall_e, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"not a whole DallE: .*group_3\.block_1\.id_path\.weight"):
        open_tokenizer(tmp_path / "part.safetensors")
