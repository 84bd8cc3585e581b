"""What a run will take: counted against formulas and against runs, and what comes of wrong input."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mimlet
from mimlet.cli import main
from mimlet.config import load_config, recipe_paths
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError, DataError
from mimlet.methods.base import Clock, Method
from mimlet.models.build import encoder_of
from mimlet.models.encoder import Encoder
from mimlet.models.shapes import ViTShape
from mimlet.plan import RunPlan
from mimlet.planning import gpus
from mimlet.planning.cost import SMALL, Cost, Counter, _as_on_a_gpu, count
from mimlet.planning.gpus import GPUS, find_gpu, gpu_called
from mimlet.planning.models import _Undrawn, build, random_batch
from mimlet.planning.request import read_request
from mimlet.train.distributed import weighted
from tests import tiny
from tests.tiny import DECODER, ENCODER

TINY = [*ENCODER, *DECODER, "schedule.batch=8", "schedule.eval_epochs=0"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 40 x 30 px in three classes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        path = folder / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 30), 50).convert("RGB").save(path)
    return folder


def counted(recipe: str, *overrides: str, classes: int = 0) -> tuple[Method, Cost]:
    request = read_request(recipe, overrides)
    method = build(request.config, request.stand_ins, classes)
    return method, count(method, request.config, classes)


def arithmetic(recipe: str, *overrides: str, **options: object) -> RunPlan:
    return mimlet.plan(recipe, overrides, measure=0, **{"gpu": "h200", **options})  # type: ignore[arg-type]


def test_flops_of_mae_are_the_formulas() -> None:
    """L (24 T d^2 + 4 T^2 d) and its like; products count three times, their fused attention three and a half."""
    _, cost = counted("mae_tiny")
    piece = cost.piece(256)
    encoder, encoder_attention = 12 * 24 * 50 * 192**2, 12 * 4 * 50**2 * 192
    decoder = 2 * 50 * 192 * 96 + 4 * 197 * 96**2 + 4 * 147 * 96**2 + 16 * 147 * 96**2 + 2 * 147 * 96 * 768
    decoder_attention = 4 * 147 * 197 * 96  # only hidden patches ask
    patches = 2 * 49 * 768 * 192  # images get no gradient
    expected = 3 * (encoder + decoder) + 3.5 * (encoder_attention + decoder_attention) + 2 * patches
    assert piece.flops.sum() / 256 == pytest.approx(expected, rel=2e-3)
    assert piece.flops.sum() / 256 == pytest.approx(1.97e9, rel=0.03)  # with a decoder that predicts all patches
    assert cost.forward == pytest.approx(12 * (24 * 197 * 192**2 + 4 * 197**2 * 192) + 2 * 196 * 768 * 192, rel=1e-3)


def test_flops_of_a_teacher_on_visible_patches() -> None:
    with _Undrawn():
        encoder = encoder_of(ViTShape(image_size=224, patch=16, dim=768, depth=12, heads=12)).eval()
    mask, counter = Mask.from_noise(torch.rand(1, 196), 0.75), Counter()
    with _as_on_a_gpu(), counter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoder(torch.zeros(1, 3, 224, 224), mask)
    assert sum(counter.record.flops) == pytest.approx(8.64e9, rel=0.01)


def test_two_small_batches_give_a_larger_one() -> None:
    """What is extrapolated equals what is counted, and saved tensors are the memory that is alive before backward."""
    config = load_config("mae_micro32", TINY)
    method, cost = counted("mae_micro32", *TINY)
    images = 12
    batch = random_batch(method, config, 0, images, SMALL[0])
    counter, saved = Counter(), dict[int, int]()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*method.parameters(), *method.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    augment = config.data.augment
    prepared = batch.prepare("cpu", augment.mean, augment.std)
    with _as_on_a_gpu(), counter, torch.autocast("cpu", torch.bfloat16):
        prepared = replace(prepared, views={"image": prepared.images.clone()})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = weighted(method(prepared, Clock(1, 100, 10, 0)), method.weights)
        alive = counter.live
        torch.autograd.backward(loss)
    piece = cost.piece(images)
    assert piece.flops.sum() == pytest.approx(sum(counter.record.flops), rel=1e-6)
    assert piece.moved.sum() == pytest.approx(sum(counter.record.moved), rel=0.02)
    assert piece.activations == pytest.approx(max(counter.record.live), rel=0.1)
    assert sum(saved.values()) + 4 * prepared.images.numel() == pytest.approx(alive, rel=0.01)
    assert alive <= piece.activations * 1.01


def test_checkpointing_takes_time_for_memory() -> None:
    deep = (*TINY, "encoder.depth=8")
    _, plain = counted("mae_micro32", *deep)
    _, saving = counted("mae_micro32", *deep, "speed.checkpointing=true")
    assert saving.piece(256).activations < 0.6 * plain.piece(256).activations
    assert plain.piece(256).flops.sum() < saving.piece(256).flops.sum() < 1.4 * plain.piece(256).flops.sum()


def test_a_teacher_is_counted_apart() -> None:
    with_teacher, alone = arithmetic("dmae_micro32").work, arithmetic("mae_micro32").work
    assert with_teacher.trained_flops == pytest.approx(alone.trained_flops, rel=0.02)
    # 7 whole blocks of 8, and queries and keys of the last one; 17 tokens, 256 wide
    blocks = 7 * (24 * 17 * 256**2 + 4 * 17**2 * 256) + 4 * 17 * 256**2 + 2 * 17**2 * 256
    assert with_teacher.frozen_flops == pytest.approx(blocks + 2 * 16 * 48 * 256, rel=0.01)
    assert alone.frozen_flops == 0


@pytest.mark.parametrize("recipe", ["beit_micro32", "dvae_micro32", "mocov3_micro32", "g2sd_specific_micro32"])
def test_any_method_is_planned_without_its_files(recipe: str) -> None:
    planned = arithmetic(recipe)
    assert planned.work.trained_flops > 1e8
    assert 0 < planned.timings[0].hours[0] < planned.timings[0].hours[1]
    assert bool(planned.work.frozen_flops) == (recipe in ("beit_micro32", "g2sd_specific_micro32"))


@pytest.mark.parametrize("recipe", recipe_paths())
def test_every_recipe_says_how_big_its_teacher_is(recipe: str) -> None:
    if recipe == "classify_tiny_distilled":  # a RegNet, none of ours
        with pytest.raises(ConfigError, match="an encoder such as vit_base"):
            read_request(recipe)
    request = read_request(recipe, teacher="vit_base" if recipe == "classify_tiny_distilled" else None)
    assert request.config.title
    assert all(each.title for each in request.stand_ins)


def test_disk_is_what_a_run_leaves(photos: Path, tmp_path: Path) -> None:
    run = tiny.pretrain(photos, tmp_path / "run")
    planned = arithmetic("mae_micro32", *TINY, data=photos, steps=3)
    (checkpoint,) = (run / "checkpoints").glob("step_*.pt")
    assert checkpoint.stat().st_size == pytest.approx(planned.disk.checkpoint, rel=0.35)  # names weigh much here
    assert checkpoint.stat().st_size > planned.disk.checkpoint
    assert (run / "encoder.safetensors").stat().st_size == pytest.approx(planned.disk.exported, rel=0.1)
    assert planned.steps == 3


def test_data_are_counted_and_their_loading_is_measured(photos: Path) -> None:
    planned = arithmetic("mae_micro32", *TINY, data=photos, epochs=2)
    assert (planned.images, planned.steps) == (24, 6)
    assert [each.form for each in planned.loading] == ["as it lies", "packed, JPEG", "packed, raw"]
    assert {each.how for each in planned.loading} == {"measured"}
    assert planned.loading[2].bytes == 24 * 40 * 30 * 3
    assert planned.loading[0].bytes == sum(path.stat().st_size for path in photos.rglob("*.jpg"))
    assert arithmetic("mae_micro32", *TINY, data=photos, images=48, epochs=2).steps == 12


def test_this_machine_is_measured(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "mae_micro32", "--data", str(photos), "--measure", "0.2", "speed.accelerator=cpu", *TINY]
    assert main([*given, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    first, *others = planned["timings"]
    assert (first["how"], first["devices"]) == ("measured", 1)
    assert [other["device"] for other in others] == list(GPUS)
    assert {other["how"] for other in others} == {"arithmetic"}
    assert first["hours"][0] == pytest.approx(planned["steps"] * first["step_seconds"][0] / 3600)
    assert planned["loading"][0]["how"] == "measured"


def test_tables_say_how_each_number_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mae_micro32", "--gpu", "rtx4090", "--gpus", "2", *TINY]) == 0
    shown = capsys.readouterr().out
    assert "2 x rtx4090" in shown
    assert "exchanged" in shown
    assert shown.count("arithmetic") == 4
    assert "measured" not in shown


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    large = (*TINY, "schedule.batch=2048", "encoder.depth=6")
    roomy = arithmetic("mae_micro32", *large)
    assert roomy.timings[0].settings == ""
    fixed, activations = roomy.memory.total - roomy.memory.activations, roomy.memory.activations
    for room, expected in (
        (0.7 * activations, "speed.accumulate=2"),
        (20 / 2048 * activations, "speed.accumulate=64 speed.checkpointing=true"),  # 32 images at a time, else 16
        (-1.0, None),
    ):
        gpu = gpus.GPU("h200", (fixed + room) / 0.9e9, 4800, 989, 67)
        monkeypatch.setitem(gpus.GPUS, "h200", gpu)
        assert arithmetic("mae_micro32", *large).timings[0].settings == expected


def test_fsdp_divides_what_is_trained() -> None:
    ddp, fsdp = (
        arithmetic("mae_micro32", *TINY, f"speed.strategy={strategy}", gpus=4).memory for strategy in ("ddp", "fsdp")
    )
    assert fsdp.optimizer == ddp.optimizer / 4
    assert fsdp.weights == ddp.weights / 4
    assert fsdp.gradients == ddp.gradients / 8  # DDP keeps them in its buckets too
    assert fsdp.activations == ddp.activations


def test_gpus_are_found_by_any_spelling() -> None:
    assert find_gpu("NVIDIA GeForce RTX 4090").name == "rtx4090"
    assert find_gpu("A100-80GB").name == "a100-80"
    for device, memory, name in (
        ("NVIDIA A100-SXM4-40GB", 42.3, "a100-40"),
        ("NVIDIA H100 PCIe", 85.0, "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", 85.0, "h100"),
        ("NVIDIA H200", 150.0, "h200"),
        ("NVIDIA L4", 23.6, "l4"),
        ("Tesla V100-SXM2-32GB", 34.1, "v100"),
    ):
        found = gpu_called(device, memory)
        assert found is not None
        assert found.name == name
    assert gpu_called("NVIDIA GeForce GT 710", 2.1) is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mae_tny"], "did you mean 'mae_tiny'?"),
        (["mae_tiny", "--gpu", "h20"], "did you mean 'h200'?"),
        (["mae_tiny", "--data", "nowhere"], "data.path: no such file or folder 'nowhere'"),
        (["dmae_tiny", "--teacher", "nothing.pth"], "no such file or folder 'nothing.pth', and no size"),
        (["mae_tiny", "optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["mae_tiny", "--epochs", "1", "--steps", "2"], "not both"),
    ],
)
def test_wrong_words_are_answered_without_torch(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mimlet.planning.models", None)  # importing it would fail
    assert main(["plan", *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"8 cannot be split evenly over 3 GPUs x 1 .* such as 9"):
        arithmetic("mae_micro32", *TINY, gpus=3)


def test_a_sample_that_fills_no_batch(photos: Path) -> None:
    with pytest.raises(DataError, match=r"do not fill one batch of 4,096; .*, or say with --images how many there are"):
        arithmetic("mae_tiny", data=photos)


def test_unknown_options_from_python() -> None:
    with pytest.raises(ConfigError, match=r"no option 'bach' \(did you mean 'batch'\?\)"):
        mimlet.plan("mae_micro32", bach=8)


def test_encoders_that_keep_nothing_keep_nothing_here() -> None:
    method, _ = counted("mae_micro32", *TINY, "speed.checkpointing=true")
    assert isinstance(method.encoder, Encoder)
    assert method.encoder.checkpointing
