import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from mimlet.cli import main
from mimlet.config import load_config
from mimlet.data.batch import Batch
from mimlet.errors import ConfigError, WeightsError
from mimlet.methods.base import Clock
from mimlet.methods.dvae import DVAE, uniform_divergence
from mimlet.methods.settings import DVAESettings
from mimlet.models.tokenizer import DiscreteVAE, VAEShape, codebook_figures, count_codes, open_tokenizer
from mimlet.models.weights import load
from mimlet.run import read_run
from tests.data.images import make_folder
from tests.methods.official import CLOCK
from tests.tiny import SPEED, pretrain

SETTINGS = DVAESettings(codes=12, dim=6, hidden=8, layers=2, kl=0.1)


def make(settings: DVAESettings = SETTINGS) -> DVAE:
    torch.manual_seed(0)
    shape = VAEShape(16, settings.codes, settings.dim, settings.hidden, settings.layers, settings.residual_blocks)
    return DVAE(DiscreteVAE(shape), settings)


def batch(count: int = 4) -> Batch:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Batch({"image": images}, torch.arange(count))


def plain(method: DVAE, images: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Convolutions by their weights alone: (reconstruction, logits), with the noise of this moment's generator."""
    state = dict(method.encoder.named_parameters())

    def conv(name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)

    def residual(name: str, x: Tensor) -> Tensor:
        y = conv(f"{name}.path.0", x, padding=1).relu()
        return x + conv(f"{name}.path.4", conv(f"{name}.path.2", y, padding=1).relu())

    x = images
    for level in (0, 2):
        x = residual(f"encoder.{level + 1}", conv(f"encoder.{level}.0", x, stride=2, padding=1).relu())
    logits = conv("encoder.4", x)
    noise = -torch.empty_like(logits).exponential_().log()
    mixture = ((logits + noise) / temperature).softmax(1)
    x = (mixture.permute(0, 2, 3, 1) @ state["codebook.weight"]).permute(0, 3, 1, 2)
    for level in (0, 2):
        weight, bias = state[f"decoder.{level}.0.weight"], state[f"decoder.{level}.0.bias"]
        x = residual(f"decoder.{level + 1}", F.conv_transpose2d(x, weight, bias, stride=2, padding=1).relu())
    return conv("decoder.4", x), logits


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_equals_a_plain_formulation(loss: str) -> None:
    method = make(SETTINGS.model_copy(update={"loss": loss}))
    images = batch().images
    torch.manual_seed(5)
    losses = method(batch(), CLOCK)
    torch.manual_seed(5)
    pixels, logits = plain(method, images, 1.0)
    distance = {"mse": (pixels - images).square().mean(), "smooth_l1": F.smooth_l1_loss(pixels, images)}[loss]
    assert_close(losses["reconstruction"], distance)
    q = logits.softmax(1)
    assert_close(losses["kl"], (q * (q / (1 / 12)).log()).sum(1).mean())
    figures = codebook_figures(count_codes(logits.argmax(1), 12))
    assert losses["codebook_perplexity"].item() == pytest.approx(figures["codebook_perplexity"].item())
    assert losses["codebook_use"].item() == pytest.approx(figures["codebook_use"].item())
    assert method.weights == {"reconstruction": 1.0, "kl": 0.1}
    (losses["reconstruction"] + 0.1 * losses["kl"]).backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    (expected,) = torch.autograd.grad(
        distance + 0.1 * (q * (q * 12).log()).sum(1).mean(), [method.encoder.encoder[0][0].weight]
    )
    assert_close(gradients["encoder.encoder.0.0.weight"], expected)
    assert all(gradient is not None for gradient in gradients.values())


def test_divergence_from_uniform() -> None:
    assert uniform_divergence(torch.zeros(2, 5, 3, 3)).item() == pytest.approx(0, abs=1e-6)
    certain = torch.tensor([100.0, 0, 0, 0, 0]).view(1, 5, 1, 1)
    assert uniform_divergence(certain).item() == pytest.approx(math.log(5))


def test_the_temperature_falls_by_half_a_cosine() -> None:
    method = make()
    assert [method.temperature(Clock(step, 4, 4, 0)) for step in (0, 2)] == [1.0, pytest.approx((1 + 0.0625) / 2)]
    assert method.temperature(Clock(399, 400, 4, 0)) == pytest.approx(0.0625, abs=1e-4)
    assert method(batch(), Clock(2, 4, 4, 0))["temperature"].item() == pytest.approx(0.53125)
    assert DVAE(method.encoder, SETTINGS.model_copy(update={"kl": 0.0})).weights == {"reconstruction": 1.0}


def test_codes_are_counted_over_the_step() -> None:
    method, whole = make(), batch(6)
    expected = method(whole, CLOCK)
    method.after_step(CLOCK)
    parts = [method(Batch({"image": part}, torch.arange(3)), CLOCK) for part in whole.images.split(3)]
    for name in ("codebook_use", "codebook_perplexity"):
        assert sum(part[name].item() for part in parts) / 2 == pytest.approx(expected[name].item(), rel=1e-5)


def test_bf16_is_finite() -> None:
    method = make()
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(batch(), Clock(399, 400, 4, 0))
    sum(losses[name] for name in ("reconstruction", "kl")).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_it_learns_to_name_colours() -> None:
    """Images of four flat colours: a reconstruction near the original, and a code for each colour at least."""
    torch.manual_seed(0)
    method = DVAE(DiscreteVAE(VAEShape(8, codes=12, dim=6, hidden=8, layers=2)), SETTINGS)
    images = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])[:, :, None, None].expand(4, 3, 8, 8)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    for step in range(100):
        losses = method(Batch({"image": images}, torch.arange(4)), Clock(step, 100, 100, 0))
        optimizer.zero_grad()
        losses["reconstruction"].backward()
        optimizer.step()
        method.after_step(CLOCK)
    rows = method.eval().pictures(Batch({"image": images}, torch.arange(4)))
    assert list(rows) == ["original", "tokens", "reconstruction"]
    assert F.mse_loss(rows["reconstruction"], images) < 0.1
    ids = method.encoder.encode(images / 2 + 0.5)
    assert len(ids.flatten(1).unique(dim=0)) == 4
    squares = rows["tokens"].permute(0, 2, 3, 1)
    assert squares.shape == (4, 8, 8, 3)
    named = ids.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert len(squares.flatten(0, 2).unique(dim=0)) == len(named.unique()), "one colour per code"
    for code in named.unique():
        assert len(squares[named == code].unique(dim=0)) == 1
    assert -1 <= squares.min() < squares.max() <= 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


TINY = ("--batch", "8", "--workers", "0", "encoder.image_size=16", "method.codes=16", "method.hidden=4", *SPEED)


def arguments(photos: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", "--recipe", "dvae_micro32", "--data", str(photos), "--out", str(out), *TINY, *more]


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "dvae"
    assert main(arguments(photos, out, "--steps", "4", "run.log_steps=1", "run.report=true")) == 0
    return out


def test_a_run_leaves_a_tokenizer_and_pictures(run: Path) -> None:
    tokenizer = open_tokenizer(run)
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.input_size) == (16, 4, 16)
    assert (run / "reconstruction.png").is_file()
    assert (run / "pictures" / "tokens.png").is_file()
    page = (run / "report.html").read_text()
    assert "codebook perplexity" in page
    assert "blocks, width" not in page, "there is no encoder to speak of"
    assert read_run(run).lines("train")[-1]["temperature"] == pytest.approx(0.199, abs=0.01)


def test_it_resumes_bit_for_bit(run: Path, photos: Path, tmp_path: Path) -> None:
    given = ("--steps", "4", "run.checkpoint_steps=2", "run.keep=9")
    assert main(arguments(photos, tmp_path / "run", *given)) == 0
    for path in (tmp_path / "run" / "checkpoints").glob("*4.pt*"):
        path.unlink()
    (tmp_path / "run" / "encoder.safetensors").unlink()
    assert main(arguments(photos, tmp_path / "run", *given, "--resume")) == 0
    ours, theirs = (open_tokenizer(folder).state_dict() for folder in (tmp_path / "run", run))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("verb", ["finetune", "pretrain", "probe", "export", "evaluate"])
def test_it_is_no_encoder(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    data = ["--data", str(photos)]
    given = {
        "finetune": ["--recipe", "classify_micro32", "--encoder", str(run), *data, "--eval", str(photos)],
        "pretrain": ["--recipe", "mae_micro32", "--encoder", str(run), *data],
        "probe": [str(run), *data, "--eval", str(photos)],
        "export": [str(run)],
        "evaluate": [str(run), *data],
    }[verb]
    out = {"finetune": "--out", "pretrain": "--out", "export": "--to"}.get(verb)
    assert main([verb, *given, *([out, str(tmp_path / "out")] if out else [])]) == 2
    assert "is a visual tokenizer (method dvae), not an encoder; it serves the method beit" in capsys.readouterr().err


def test_an_encoder_is_no_tokenizer(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is the encoder of a run of the method mae, not a tokenizer; train one"):
        open_tokenizer(pretrain(photos, tmp_path / "mae"))
    make().encoder.save(tmp_path, {"method": "dvae"})
    with pytest.raises(WeightsError, match="is a visual tokenizer"):
        load(tmp_path)


def test_settings_about_encoders_are_refused() -> None:
    given = ["data.labelled=['x']", "encoder.weights=y", "optim.layer_decay=0.5"]
    with pytest.raises(ConfigError) as error:
        load_config("dvae_micro32", given)
    for name in ("data.labelled", "encoder.weights", "optim.layer_decay"):
        assert f"{name}: method 'dvae' trains a tokenizer, no encoder" in str(error.value)
    with pytest.raises(ConfigError, match="greater than 0"):
        load_config("dvae_micro32", ["method.temperature=[1,0]"])
    config = load_config("dvae_micro32", ["method.layers=6"])
    with pytest.raises(ConfigError, match="6 layers names squares of 64 px, which do not divide images of 32 px"):
        DVAE.build(config)
