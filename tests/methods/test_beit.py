import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from mimlet.cli import main
from mimlet.config import AugmentSettings, check_inputs, load_config
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.data.seeding import seeded
from mimlet.errors import ConfigError, DataError, RunError
from mimlet.methods.beit import BEiT
from mimlet.methods.settings import BlockMaskSettings
from mimlet.models.shapes import ViTShape
from mimlet.models.tokenizer import DallE, DiscreteVAE, Tokenizer, VAEShape
from mimlet.models.vit import ViT
from mimlet.models.weights import load_encoder
from mimlet.run import read_run
from mimlet.train.loop import _load
from tests.data.images import make_folder
from tests.methods.official import CLOCK
from tests.shared import Golden, golden
from tests.tiny import ENCODER, SPEED

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Named(Tokenizer):
    """Says what it was told to say, whatever it sees."""

    stride = 8

    def __init__(self, ids: Tensor, codes: int) -> None:
        super().__init__()
        self.ids, self.vocab_size = ids, codes

    def _encode(self, images: Tensor) -> Tensor:
        return self.ids


def official(oracle: Golden) -> BEiT:
    """The golden's model in our parts: all of its tensors by name."""
    shape = ViTShape(64, 8, 48, 3, 4, position="none", relative="shared", qv_bias=True, layer_scale=0.1)
    method = BEiT(ViT(shape), Named(oracle.io["token_ids"], 64), BlockMaskSettings(), PLAIN)
    own = ("mask_token", "lm_head.weight", "lm_head.bias")
    method.load_state_dict(
        {
            name if name in own else f"encoder.{name}": value
            for name, value in oracle.weights.items()
            if not name.endswith("relative_position_index")
        }
    )
    return method


def batch_of(images: Tensor, hidden: Tensor, tokens: Tensor | None = None) -> Batch:
    views = {"image": images, "tokens": images if tokens is None else tokens}
    return Batch(views, torch.arange(len(images)), {"mask": Mask.from_hidden(hidden)})


@pytest.fixture
def tiny() -> BEiT:
    """16 patches, a tokenizer of 12 codes that can decode, ragged masks."""
    torch.manual_seed(0)
    vae = DiscreteVAE(VAEShape(image_size=16, codes=12, dim=6, hidden=8, layers=2)).freeze()
    shape = ViTShape(32, 8, 24, 2, 3, position="learned", qv_bias=True)
    return BEiT(ViT(shape), vae, BlockMaskSettings(smallest=1 / 16), IMAGENET)


def tiny_batch(method: BEiT, count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([method.masking.draw(generator) for _ in range(count)])
    draws[0, 5] = ~draws[0, 5]
    assert len(set(draws.sum(1).tolist())) > 1, "ragged"
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return batch_of(images, draws, torch.randn(count, 3, 16, 16, generator=generator))


def test_equals_official_beit() -> None:
    oracle = golden("beit_loss")
    method = official(oracle)
    hidden = oracle.io["mask"].bool().flatten(1)
    assert len(set(hidden.sum(1).tolist())) > 1
    batch = batch_of(oracle.io["images"], hidden)
    assert_close(method.lm_head(method.encode(batch)), oracle.io["logits_all"], **oracle.tolerance)
    losses = method(batch, CLOCK)
    assert_close(losses["cross_entropy"], oracle.io["loss"][0], **oracle.tolerance)
    assert_close(losses["token_accuracy"], oracle.io["mlm_acc"][0], **oracle.tolerance)
    losses["cross_entropy"].backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    for parameter in method.parameters():
        parameter.grad = None
    logits = method.lm_head(method.encode(batch)).flatten(0, 1)
    F.cross_entropy(logits[hidden.flatten()], oracle.io["token_ids"].flatten()[hidden.flatten()]).backward()
    for name, parameter in method.named_parameters():
        assert_close(gradients[name], parameter.grad, msg=name)
        assert parameter.grad is not None, name


def test_the_official_file_starts_an_encoder(tmp_path: Path) -> None:
    oracle = golden("beit_loss")
    save_file(oracle.weights, tmp_path / "beit.safetensors")
    encoder, report = load_encoder(tmp_path / "beit.safetensors", heads=4)
    method = official(oracle)
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    assert not report.fresh
    assert set(report.skipped) == {
        "mask_token",
        "lm_head.weight",
        "lm_head.bias",
        "rel_pos_bias.relative_position_index",
    }


def test_pieces_of_ragged_masks_make_the_whole_step(tiny: BEiT) -> None:
    batch = tiny_batch(tiny)
    whole = tiny(batch, CLOCK)
    whole["cross_entropy"].backward()
    tiny.on_gradients(CLOCK)
    tiny.after_step(CLOCK)
    expected = {name: parameter.grad for name, parameter in tiny.named_parameters()}
    means = dict.fromkeys(whole, 0.0)
    for parameter in tiny.parameters():
        parameter.grad = None
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = batch_of(batch.images[rows], batch.mask.hidden[rows], batch.views["tokens"][rows])
        losses = tiny(part, CLOCK)
        (losses["cross_entropy"] / 3).backward()
        means = {name: mean + losses[name].item() / 3 for name, mean in means.items()}
    tiny.on_gradients(CLOCK)
    tiny.after_step(CLOCK)
    for name, parameter in tiny.named_parameters():
        assert_close(parameter.grad, expected[name], msg=name)
    assert means == pytest.approx({name: value.item() for name, value in whole.items()}, rel=1e-5)


def test_visible_patches_are_not_asked_and_hidden_pixels_not_seen(tiny: BEiT) -> None:
    batch = tiny_batch(tiny)
    loss = tiny(batch, CLOCK)["cross_entropy"]
    tiny.after_step(CLOCK)
    ids = tiny.visual_tokens(batch.views["tokens"])
    tiny.tokenizer = Named(torch.where(batch.mask.hidden, ids, 0).view(-1, 4, 4), 12)
    noise = 9 * torch.randn(6, 3, 4, 8, 4, 8) * batch.mask.hidden.view(6, 1, 4, 1, 4, 1)
    changed = batch_of(batch.images + noise.reshape(6, 3, 32, 32), batch.mask.hidden, batch.views["tokens"])
    assert_close(tiny(changed, CLOCK)["cross_entropy"], loss)


def test_the_tokenizer_sees_images_from_0_to_1(tiny: BEiT) -> None:
    seen = []
    tiny.tokenizer.encode = lambda images: seen.append(images) or torch.zeros(2, 4, 4, dtype=torch.int64)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    prepared = Batch({"tokens": pixels}, torch.arange(2)).prepare("cpu", *IMAGENET)
    tiny.visual_tokens(prepared.views["tokens"])
    assert_close(seen[0], pixels / 255)


def test_bf16_is_finite_and_near(tiny: BEiT) -> None:
    batch = tiny_batch(tiny)
    exact = tiny(batch, CLOCK)
    tiny.after_step(CLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny(batch, CLOCK)
    assert_close(mixed["cross_entropy"], exact["cross_entropy"], rtol=0.02, atol=0)
    for name in ("codebook_use", "codebook_perplexity"):
        assert mixed[name] == exact[name], "targets do not depend on the precision"
    mixed["cross_entropy"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in tiny.parameters() if parameter.grad is not None)


def test_start_is_beits(tiny: BEiT) -> None:
    assert tiny.lm_head.weight.abs().max() <= 0.02
    assert tiny.lm_head.weight.std().item() == pytest.approx(0.0108, rel=0.1), "a normal cut at one deviation"
    assert not tiny.lm_head.bias.any()
    assert tiny.mask_token.any()
    assert not any(parameter.requires_grad for parameter in tiny.tokenizer.parameters())
    assert not tiny.train().tokenizer.training


def test_one_crop_is_rendered_twice(tiny: BEiT) -> None:
    augment = AugmentSettings(color_jitter=0.4, interpolation="bicubic")
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60), Image.Resampling.BICUBIC)
    transform = tiny.transform(augment, 32)
    flips, images = set(), []
    for seed in range(6):
        with seeded(seed):
            views = transform(smooth)
        with seeded(seed):
            again = transform(smooth)
        assert all(torch.equal(views[name], again[name]) for name in views)
        assert {name: (view.dtype, *view.shape) for name, view in views.items()} == {
            "image": (torch.uint8, 3, 32, 32),
            "tokens": (torch.uint8, 3, 16, 16),
        }
        small = F.interpolate(views["image"][None].float(), (16, 16), mode="bicubic", antialias=True)[0]
        assert (small - views["tokens"]).abs().mean() < 2, "the same crop, flip and colours"
        images.append(views["image"])
        flips.add(((small - views["tokens"].flip(-1)).abs().mean() < 2).item())
    assert not torch.equal(images[0], images[1])
    assert flips == {False}


def test_jitter_comes_before_the_crop(tiny: BEiT) -> None:
    """Contrast turns on the mean of the whole image, not on that of the crop."""
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 200
    augment = AugmentSettings(crop_scale=(0.05, 0.05), crop_ratio=(1, 1), color_jitter=0.4, flip=0)
    values = set()
    for seed in range(12):
        with seeded(seed):
            values.update(tiny.transform(augment, 32)(Image.fromarray(pixels))["tokens"].unique().tolist())
    assert any(0 < value < 80 for value in values), "black was lifted towards the whole image's gray"


def test_lanczos_is_pillows(tiny: BEiT) -> None:
    augment = AugmentSettings(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(tiny.transform(augment, 32)(image)["tokens"].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", ["pad_crop", "randaugment"])
def test_other_augmentation_is_refused(tiny: BEiT, name: str) -> None:
    augment = AugmentSettings(**{name: {"pad_crop": 4, "randaugment": "rand-m9"}[name]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"data\.augment\.{name} is .*remove it"):
        tiny.transform(augment, 32)


def test_pictures_are_decoded_where_patches_are_hidden(tiny: BEiT) -> None:
    batch = tiny_batch(tiny).views["image"], tiny_batch(tiny).mask
    shown = Batch({"image": batch[0]}, torch.arange(6), {"mask": batch[1]})
    rows = tiny.eval().pictures(shown)
    assert list(rows) == ["original", "visible", "reconstruction"]
    hidden = batch[1].hidden.view(6, 1, 4, 1, 4, 1).expand(6, 3, 4, 8, 4, 8).reshape(6, 3, 32, 32)
    assert torch.equal(rows["reconstruction"][~hidden], batch[0][~hidden])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    pixels = rows["reconstruction"] * std + mean
    assert -0.2 < pixels[hidden].min() < pixels[hidden].max() < 1.2, "decoded pixels are in [0, 1] but for resizing"
    tiny.tokenizer = DallE(width=4, codes=12).freeze()
    assert tiny.pictures(shown) == {}


def test_a_tokenizer_of_another_grid_is_refused(tiny: BEiT) -> None:
    vae = DiscreteVAE(VAEShape(image_size=32, codes=12, hidden=4, layers=2))
    with pytest.raises(ConfigError, match=r"on images of 32 px, 8 x 8 tokens of 4 px; the encoder has 4 x 4 patches"):
        BEiT(tiny.encoder, vae, BlockMaskSettings(), PLAIN)
    assert BEiT(tiny.encoder, DallE(width=4, codes=12), BlockMaskSettings(smallest=1 / 16), PLAIN).token_px == 32
    tiny.tokenizer = Named(torch.zeros(6, 2, 2, dtype=torch.int64), 12)
    with pytest.raises(ConfigError, match=r"Named gives 2 x 2 tokens of 16 px, the encoder has 4 x 4 patches"):
        tiny(tiny_batch(tiny), CLOCK)


def test_a_checkpoint_of_another_vocabulary_is_refused(tiny: BEiT) -> None:
    state = {name: value for name, value in tiny.state_dict().items() if not name.startswith("tokenizer.")}
    vae = DiscreteVAE(VAEShape(image_size=16, codes=13, dim=6, hidden=8, layers=2))
    other = BEiT(ViT(tiny.encoder.shape), vae, BlockMaskSettings(smallest=1 / 16), IMAGENET)
    with pytest.raises(RunError, match=r"does not fit the method as configured now(?s:.*)lm_head"):
        _load(other, state)


def test_settings_say_what_is_missing(tmp_path: Path) -> None:
    given = {"data": {"path": [str(make_folder(tmp_path / "images"))]}}
    with pytest.raises(ConfigError, match=r"method\.tokenizer: method 'beit' needs a visual tokenizer; give"):
        load_config("beit_micro32", base=given)
    (tmp_path / "dvae").mkdir()
    config = load_config("beit_micro32", [f"method.tokenizer={tmp_path}/dvea"], given)
    with pytest.raises(DataError, match=r"method\.tokenizer: no such file .*dvea' \(did you mean 'dvae'\?\)"):
        check_inputs(config)


def test_from_images_to_tokenizer_to_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(make_folder(tmp_path / "images", each=8))
    common = ["--data", data, "--batch", "8", "--steps", "3", "--workers", "0", *SPEED, "encoder.image_size=16"]
    tokenizer = [*common, "method.codes=16", "method.hidden=4", "method.dim=4", "--out", str(tmp_path / "dvae")]
    assert main(["pretrain", "--recipe", "dvae_micro32", *tokenizer]) == 0
    given = [*common, *ENCODER, f"method.tokenizer={tmp_path}/dvae", "--labelled", data, "run.log_steps=1"]
    given += ["encoder.patch=4", "method.masking.smallest=0.1", "run.report=true"]
    assert main(["pretrain", "--recipe", "beit_micro32", *given, "--out", str(tmp_path / "beit")]) == 0
    run = read_run(tmp_path / "beit")
    watched = {"cross_entropy", "token_accuracy", "codebook_use", "codebook_perplexity", "total", "grad_norm"}
    assert all(watched <= line.keys() for line in run.lines("train"))
    first = run.lines("train")[0]
    assert first["cross_entropy"] == first["total"] == pytest.approx(np.log(16), rel=0.05)
    assert run.lines("eval")[0]["knn_top1"] >= 0
    again = [*given, "--out", str(tmp_path / "again"), "run.checkpoint_steps=1", "run.keep=9", "speed.accumulate=2"]
    assert main(["pretrain", "--recipe", "beit_micro32", *again]) == 0
    for path in (tmp_path / "again" / "checkpoints").glob("*3.pt*"):
        path.unlink()
    left = load_file(tmp_path / "again" / "encoder.safetensors")
    assert main(["pretrain", "--recipe", "beit_micro32", *again, "--resume"]) == 0
    resumed = load_file(tmp_path / "again" / "encoder.safetensors")
    for name, value in load_file(tmp_path / "beit" / "encoder.safetensors").items():
        assert torch.equal(resumed[name], left[name]), "resumed bit for bit"
        assert_close(left[name], value, rtol=1e-3, atol=1e-4, msg=f"{name}: two pieces are one, but for rounding")
    page = (tmp_path / "beit" / "report.html").read_text()
    assert "codebook perplexity" in page
    assert "codebook use" in page
    assert Image.open(io.BytesIO((tmp_path / "beit" / "reconstruction.png").read_bytes())).size[0] > 16
    tune = ["--recipe", "classify_micro32", "--encoder", str(tmp_path / "beit"), "--data", data, "--eval", data]
    tune += ["--out", str(tmp_path / "tuned"), "--batch", "8", "--steps", "2", "--workers", "0", *SPEED, *ENCODER]
    assert main(["finetune", *tune, "encoder.position=learned", "encoder.qv_bias=true"]) == 0
