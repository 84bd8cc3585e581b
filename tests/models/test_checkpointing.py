"""`Encoder.checkpointing`: less is kept for the backward pass, and nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mimlet.data.masks import Mask
from mimlet.models.build import encoder_of
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.shapes import HieraShape, HiViTShape, Shape, ViTShape
from tests.data.images import make_folder
from tests.tiny import pretrain

VIT = ViTShape(32, 8, 24, 4, 3)
HIVIT = HiViTShape(32, 8, 16, (1, 1, 3), 2)
SHAPES: dict[str, Shape] = {
    "vit": VIT,
    "vit, shared bias": replace(VIT, relative="shared"),
    "hiera": HieraShape(32, 4, 8, (1, 1, 2, 1), 1),
    "hivit": HIVIT,
    "hivit, decomposed bias": replace(HIVIT, relative="decomposed"),
    "itpn": replace(HIVIT, pyramid_dim=8, pyramid_depth=1, pyramid_hidden=16),
}


def answer(encoder: Encoder, taps: Taps) -> tuple[Tensor, int]:
    """A number that everything tapped has a part in, and the bytes kept for its gradient."""
    noise = torch.rand(3, encoder.units, generator=torch.Generator().manual_seed(1))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(3)  # of drop path
    with saved_tensors_hooks(keep, lambda x: x):
        features: Features = encoder(images, Mask.from_noise(noise, 0.5), taps=taps)
        parts = [*features.hidden.values(), *features.normed.values(), *features.attention.values()]
        parts += [x for qkv in features.qkv.values() for x in qkv] + [features.latent]
        loss = torch.stack([part.square().mean() for part in parts]).sum()
    return loss, sum(kept.values())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tapped", [False, True])
def test_losses_and_gradients_stay_and_less_is_kept(name: str, tapped: bool) -> None:
    torch.manual_seed(0)
    encoder = encoder_of(SHAPES[name], drop_path=0.3).train()
    last = encoder.attending[-1]
    taps = Taps(hidden=(1,), normed=(last - 1,), attention=(last,), qkv=(last,)) if tapped else Taps()
    answers = []
    for encoder.checkpointing in (False, True):
        encoder.zero_grad()
        loss, kept = answer(encoder, taps)
        torch.autograd.backward(loss)
        answers.append((loss, kept, {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}))
    (plain, much, gradients), (again, little, regained) = answers
    assert torch.equal(plain, again)
    assert gradients.keys() == regained.keys()
    torch.testing.assert_close(regained, gradients, rtol=0, atol=0)
    assert little < (0.8 if tapped else 0.5) * much


def test_nothing_is_computed_twice_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(VIT)
    encoder.checkpointing = True
    monkeypatch.setattr("mimlet.models.encoder.checkpoint", lambda *_, **__: pytest.fail("checkpointed"))
    with torch.no_grad():
        encoder(torch.rand(1, 3, 32, 32))


def test_a_training_with_it_is_the_same(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "images", each=4)
    runs = [
        pretrain(data, tmp_path / setting, f"speed.checkpointing={setting}", "encoder.drop_path=0.1")
        for setting in ("false", "true")
    ]
    assert (runs[0] / "encoder.safetensors").read_bytes() == (runs[1] / "encoder.safetensors").read_bytes()
