from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, Config, SpeedSettings, validate
from mimlet.data.batch import Batch
from mimlet.data.seeding import seeded
from mimlet.errors import ConfigError, DataError
from mimlet.export.timm import export_encoder
from mimlet.methods.base import Clock
from mimlet.methods.settings import ClassifySettings
from mimlet.models.classifier import ClassifierHead
from mimlet.models.features import Taps
from mimlet.models.parts import relative_index
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights import encoder_state, save_weights
from mimlet.objectives.kd import hard_distillation, soft_distillation
from mimlet.tasks.classify import Classify
from mimlet.train.distributed import idle_parameters, make_fabric
from tests.families import HIERARCHICAL, micro
from tests.shared import golden

CLOCK = Clock(0, 10, 10, 0)
SHAPE = ViTShape(image_size=16, patch=8, dim=24, depth=3, heads=4)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with seeded(0):
        yield


class Linear(nn.Module):
    """A teacher of K classes."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.map = nn.Linear(3 * 16 * 16, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.map(images.flatten(1))


def labelled(count: int = 6, classes: int = 4) -> Batch:
    return Batch({"image": torch.randn(count, 3, 16, 16)}, torch.arange(count), labels=torch.arange(count) % classes)


def task(teacher: nn.Module | None = None, **settings: object) -> Classify:
    return Classify(ViT(SHAPE), 4, ClassifySettings.model_validate(settings), teacher)


def distilling(kind: str, **settings: object) -> Classify:
    return task(Linear(), distill={"kind": kind, "weight": 0.3, "temperature": 2.0}, **settings)


def two_tokens(teacher: nn.Module | None = None, **distill: object) -> Classify:
    """The class token judged, a distillation token for the teacher: G2SD's specific stage."""
    given = {"kind": "hard", "token": "distillation", **distill}
    settings = ClassifySettings.model_validate({"pool": "class", "distill": given})
    return Classify(ViT(replace(SHAPE, distillation_token=True)), 4, settings, teacher or Linear())


def config(encoder: dict[str, object] | None = None, **sections: dict[str, object]) -> Config:
    size = {"image_size": 16, "patch": 8, "dim": 24, "depth": 3, "heads": 4}
    method = {"name": "classify", **sections.pop("method", {})}
    return validate({"encoder": {**size, **(encoder or {})}, "method": method, "schedule": {"steps": 1}, **sections})


VARIANTS = {
    "gap": ("mean", False, {}),
    "cls": ("class", False, {}),
    "distilled": ("mean", True, {}),
    "rpe": ("mean", False, {"relative": "full"}),
    "rpe_ls": ("mean", False, {"relative": "qv", "layer_scale": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_official_classifier(variant: str) -> None:
    oracle = golden("mae_lite_classifier")
    pool, distilled, options = VARIANTS[variant]
    encoder = ViT(ViTShape(image_size=32, patch=8, dim=24, depth=3, heads=4, **options))
    teacher = Linear(10) if distilled else None
    ours = Classify(encoder, 10, ClassifySettings.model_validate({"pool": pool}), teacher)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items() if name.startswith("norm.")}
    for name, value in oracle.weights.items():
        name = name.removeprefix(f"{variant}.") if name.startswith(f"{variant}.") else ""
        if name.startswith(("head.", "head_dist.", "fc_norm.", "dist_norm.")):
            state[f"head.{name}"] = value
        elif name and not name.endswith("relative_position_index"):
            state[f"encoder.{name}"] = value
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("teacher.") for name in missing)
    assert_close(ours.predict(oracle.io["imgs"]), oracle.io[f"{variant}.logits"], **oracle.tolerance)
    flat = {name for name in oracle.weights if name.startswith(f"{variant}.") and "position_index" not in name}
    names = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2") for name in ours.classifier_state()}
    assert {f"{variant}.{name}" for name in names} == flat
    if distilled:
        logits = ours.head(encoder(oracle.io["imgs"], taps=ours.head.taps(3)))
        for one, name in zip(logits, ("train_class_logits", "train_distill_logits"), strict=True):
            assert_close(one, oracle.io[f"distilled.{name}"], **oracle.tolerance)
    if variant == "rpe":
        assert torch.equal(relative_index(4, 4, 1), oracle.io["rpe.relative_position_index"])


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_timm_computes_the_same_from_the_exported_weights(pool: str) -> None:
    ours = task(pool=pool)
    for norm in (ours.encoder.norm, ours.head.fc_norm):
        if norm is not None:
            nn.init.normal_(norm.weight)
    timms = VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=4,
        num_classes=4,
        global_pool={"mean": "avg", "class": "token"}[pool],
    )
    timms.load_state_dict(ours.classifier_state())
    images = labelled().images
    assert_close(ours.predict(images), timms.eval()(images), atol=1e-5, rtol=1e-4)


def test_loss_without_mixing_is_smoothed_cross_entropy() -> None:
    ours, batch = task(smoothing=0.2).eval(), labelled()
    before = batch.images.clone()
    values = ours(batch, CLOCK)
    log = ours.predict(batch.images).log_softmax(1)
    assert batch.labels is not None
    likelihood = log[range(6), batch.labels]
    assert_close(values["classification"], -(0.8 * likelihood + 0.2 * log.mean(1)).mean())
    assert_close(values["accuracy"], 100 * (log.argmax(1) == batch.labels).float().mean())
    assert ours.weights == {"classification": 1.0}
    assert torch.equal(batch.images, before)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    for ours in (task(), task(pool="class"), distilling("hard"), task(ema_decay=0.9), two_tokens()):
        values = ours(labelled(), CLOCK)
        sum(weight * values[name] for name, weight in ours.weights.items()).backward()
        assert not [name for name, p in ours.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_are_shares_of_two_classes(kind: str) -> None:
    ours, batch = task(**{kind: 1.0}), labelled()
    with seeded(3):
        images, targets = ours.augment(batch)
    assert_close(targets.sum(1), torch.ones(6))
    assert batch.labels is not None
    labels = batch.labels
    share = targets[0, labels[0]].item()
    assert 0.05 < share < 0.95
    expected = share * torch.eye(4)[labels] + (1 - share) * torch.eye(4)[labels.flip(0)]
    assert_close(targets, expected)
    if kind == "mixup":
        assert_close(images, share * batch.images + (1 - share) * batch.images.flip(0))
    else:
        own = (images == batch.images).all(1)
        assert_close(own.float().mean(), torch.tensor(share))
        assert torch.equal(images.where(own[:, None], batch.images.flip(0)), images)


def test_mixing_smooths_the_targets_once() -> None:
    ours, batch = task(mixup=0.8, smoothing=0.2).eval(), labelled()
    with seeded(5):
        images, targets = ours.augment(batch)
    with seeded(5):
        loss = ours(batch, CLOCK)["classification"]
    assert_close(targets.sum(1), torch.ones(6))
    assert_close(targets.min(), torch.tensor(0.05))
    assert_close(loss, -(targets * ours.predict(images).log_softmax(1)).sum(1).mean())


def test_with_sigmoids_classes_start_absent_and_are_judged_one_by_one() -> None:
    ours, batch = task(loss="sigmoid", smoothing=0.2, ema_decay=0.9), labelled()
    assert_close(ours.head.head.bias, torch.full((4,), -10.0))
    assert_close(ours.average_head.head.bias, ours.head.head.bias)
    assert batch.labels is not None
    shares = 0.8 * torch.eye(4)[batch.labels] + 0.05
    logits = ours.predict(batch.images)
    expected = -(shares * logits.sigmoid().log() + (1 - shares) * (1 - logits.sigmoid()).log()).sum(1).mean()
    assert_close(ours(batch, CLOCK)["classification"], expected, rtol=1e-4, atol=1e-4)
    assert 7 < expected < 11  # about -log sigmoid(-10), once per image


def test_with_sigmoids_mixed_targets_are_smoothed_once_and_bf16_stays_finite() -> None:
    ours, batch = task(loss="sigmoid", mixup=0.8, smoothing=0.2), labelled()
    with seeded(5):
        images, targets = ours.augment(batch)
    with seeded(5):
        loss = ours(batch, CLOCK)["classification"]
    wanted = nn.functional.binary_cross_entropy_with_logits(ours.predict(images), targets, reduction="none")
    assert_close(loss, wanted.sum(1).mean())
    with torch.autocast("cpu", torch.bfloat16):
        low = ours(batch, CLOCK)["classification"]
    assert low.dtype == torch.float32
    assert low.isfinite()


def test_randomness_is_all_in_the_global_generators() -> None:
    ours, batch = task(mixup=0.2, cutmix=1.0, erasing=0.5), labelled()
    draws = []
    for seed in (1, 1, 2):
        with seeded(seed):
            draws.append(ours.augment(batch)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_erasing_fills_rectangles_with_noise_in_a_copy() -> None:
    ours, batch = task(erasing=1.0), labelled(200)
    before = batch.images.clone()
    images, labels = ours.augment(batch)
    assert torch.equal(batch.images, before)
    assert batch.labels is labels
    erased = (images != before).any(1)
    assert erased.flatten(1).any(1).all()
    share = erased.float().mean()
    assert 0.1 < share < 0.25  # timm draws between 2 % and a third
    assert abs(images.where(erased[:, None], torch.nan).nanmean()) < 0.05


def test_an_odd_batch_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match=r"mix pairs, and here are 5 images; choose schedule.batch"):
        task(mixup=0.2)(labelled(5), CLOCK)
    assert task()(labelled(5), CLOCK)["classification"] > 0


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_label_distillation(kind: str) -> None:
    ours, batch = distilling(kind).eval(), labelled()
    values = ours(batch, CLOCK)
    own, answer = ours.head(ours.encoder(batch.images, taps=ours.head.taps(3)))
    assert ours.teacher is not None
    teacher = ours.teacher(batch.images)
    expected = hard_distillation(answer, teacher) if kind == "hard" else soft_distillation(answer, teacher, 2.0)
    assert_close(values["distillation"], expected)
    assert_close(values["classification"], nn.functional.cross_entropy(own, batch.labels))
    assert ours.weights == {"classification": 0.7, "distillation": 0.3}
    assert_close(ours.predict(batch.images), ((own + answer) / 2).detach())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_distillation_token_answers_and_the_class_token_is_judged(kind: str) -> None:
    ours, batch = two_tokens(kind=kind, weight=0.3, temperature=2.0).eval(), labelled()
    tokens = ours.encoder(batch.images).latent
    own, answer = ours.head.head(tokens[:, 0]), ours.head.head_dist(tokens[:, 1])
    teacher = ours.teacher(batch.images)
    values = ours(batch, CLOCK)
    expected = hard_distillation(answer, teacher) if kind == "hard" else soft_distillation(answer, teacher, 2.0)
    assert_close(values["distillation"], expected)
    assert_close(values["classification"], nn.functional.cross_entropy(own, batch.labels))
    assert ours.weights == {"classification": 0.7, "distillation": 0.3}
    assert_close(ours.predict(batch.images), ((own + answer) / 2).detach())
    assert set(ours.head.state_dict()) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert ours.encoder.norm.weight.requires_grad


def test_the_specific_stage_starts_from_a_generic_encoder(tmp_path: Path) -> None:
    source, file = ViT(SHAPE), tmp_path / "encoder.safetensors"
    save_weights(file, encoder_state(source), {})
    teacher = tmp_path / "teacher.safetensors"
    save_weights(teacher, task().classifier_state(), {})
    distill = {"kind": "hard", "token": "distillation"}
    given = config(
        {"weights": str(file)},
        method={"pool": "class", "distill": distill},
        teacher={"path": str(teacher), "heads": 4},
    )
    ours = Classify.build(given, classes=4)
    assert ours.load_report is not None
    assert ours.load_report.fresh == {"dist_token": "only the fine-tuned form has it"}
    assert torch.equal(ours.encoder.cls_token, source.cls_token)
    assert ours.encoder.dist_token.requires_grad
    assert set(ours(labelled(), CLOCK)) == {"classification", "distillation", "accuracy"}

    save_weights(file, ours.classifier_state(), {"shape": vars(ours.encoder.shape)})
    again = Classify.build(given, classes=4)
    assert torch.equal(again.encoder.dist_token, ours.encoder.dist_token)
    assert again.load_report is not None
    assert not again.load_report.fresh


def test_a_distillation_token_and_its_teacher_go_together() -> None:
    def make(encoder: ViT, pool: str, teacher: nn.Module | None, token: str = "distillation") -> None:
        distill = {"kind": "hard", "token": token}
        Classify(encoder, 4, ClassifySettings.model_validate({"pool": pool, "distill": distill}), teacher)

    two = ViT(replace(SHAPE, distillation_token=True))
    with pytest.raises(ConfigError, match=r"has the class token judged; set method\.pool=class"):
        make(two, "mean", Linear())
    with pytest.raises(ConfigError, match=r"the encoder has no distillation token; such a token \(ViTShape"):
        make(ViT(SHAPE), "class", Linear())
    for teacher, token in (None, "distillation"), (Linear(), "class"):
        with pytest.raises(ConfigError, match="the encoder has a distillation token; such a token"):
            make(two, "mean" if teacher else "class", teacher, token)


def test_the_teacher_sees_the_mixed_images_and_is_left_alone() -> None:
    seen: list[Tensor] = []

    class Watching(Linear):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    ours = task(Watching(), mixup=1.0, distill={"kind": "soft"})
    batch = labelled()
    with seeded(1):
        mixed, _ = ours.augment(batch)
    with seeded(1):
        ours(batch, CLOCK)["distillation"].backward()
    assert torch.equal(seen[0], mixed)
    assert ours.teacher is not None
    assert not ours.teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in ours.teacher.parameters())


def test_a_teacher_of_other_classes_is_refused() -> None:
    ours = task(Linear(7), distill={"kind": "soft"})
    with pytest.raises(ConfigError, match="the teacher knows 7 classes, the data has 4"):
        ours(labelled(), CLOCK)


def test_the_average_is_judged() -> None:
    ours, batch = task(ema_decay=0.99), labelled()
    assert ours.ema_momentum(CLOCK) == 0.99
    before = ours.predict(batch.images)
    with torch.no_grad():
        ours.head.head.weight.add_(1.0)
        ours.encoder.patch_embed.proj.weight.mul_(2.0)
    assert torch.equal(ours.predict(batch.images), before)
    assert torch.equal(ours.classifier_state()["head.weight"], ours.average_head.head.weight)
    for name in ours.ema:
        follower = getattr(ours, name)
        assert not any(parameter.requires_grad for parameter in follower.parameters())
        with torch.no_grad():
            for mine, theirs in zip(follower.parameters(), getattr(ours, ours.ema[name]).parameters(), strict=True):
                mine.copy_(theirs)
    plain = Classify(ours.encoder, 4)
    plain.head = ours.head
    assert torch.equal(ours.predict(batch.images), plain.predict(batch.images))
    assert not torch.equal(ours.predict(batch.images), before)


def test_without_averages_there_are_no_followers() -> None:
    ours = task()
    assert ours.average_encoder is None
    assert ours.judged == (ours.encoder, ours.head)


def test_predict_judges_in_eval_mode_and_keeps_the_mode() -> None:
    ours = Classify(ViT(SHAPE, drop_path=0.9), 4).train()
    images = labelled().images
    assert torch.equal(ours.predict(images), ours.predict(images))
    assert ours.encoder.training
    assert not ours.predict(images).requires_grad


@pytest.mark.parametrize("kept", [None, 2, 1, 0])
def test_weights_and_reserved_blocks(tmp_path: Path, kept: int | None) -> None:
    source, file = ViT(SHAPE), tmp_path / "encoder.safetensors"
    nn.init.normal_(source.norm.weight)
    save_weights(file, encoder_state(source), {})
    ours = Classify.build(config({"weights": str(file), "keep_blocks": kept}), classes=4)
    report = ours.load_report
    assert report is not None
    count = 3 if kept is None else kept
    theirs = source.state_dict()
    for name, value in ours.encoder.state_dict().items():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        taken = block < count if block >= 0 else kept is None if name.startswith("norm.") else count > 0
        assert taken == (name in report.loaded)
        assert torch.equal(value, theirs[name]) or not taken
        if value.dim() > 1 and not taken and name != "patch_embed.proj.weight":
            assert value.std().item() == pytest.approx(0.02, rel=0.35)
    assert ours.encoder.pos_embed.requires_grad


def test_from_scratch_everything_is_drawn_as_a_classifier() -> None:
    ours = Classify.build(config(method={"head_scale": 0.001}), classes=4)
    assert ours.load_report is None
    assert ours.encoder.pos_embed.requires_grad
    state = ours.state_dict()
    assert state["encoder.pos_embed"].std().item() == pytest.approx(0.02, rel=0.2)
    assert state["encoder.blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["head.head.weight"].std().item() == pytest.approx(2e-5, rel=0.3)
    assert not ours.head.head.bias.any()
    assert ours.head.fc_norm is not None
    assert ours.head.fc_norm.weight.eq(1).all()


def test_a_trained_classifier_teaches(tmp_path: Path) -> None:
    teacher, file = task(), tmp_path / "encoder.safetensors"
    save_weights(file, teacher.classifier_state(), {})
    settings = config(
        {"depth": 1},
        method={"distill": {"kind": "hard"}},
        teacher={"path": str(file), "heads": 4},
        data={"augment": {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}},
    )
    ours = Classify.build(settings, classes=4)
    batch = labelled()
    own_mean, own_std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = batch.images * 0.25 + 0.5
    expected = teacher.predict((pixels - own_mean.view(3, 1, 1)) / own_std.view(3, 1, 1))
    assert ours.teacher is not None
    assert_close(ours.teacher(batch.images), expected, atol=1e-5, rtol=1e-4)
    assert set(ours(batch, CLOCK)) == {"classification", "distillation", "accuracy"}


@pytest.mark.parametrize(
    ("asked", "found", "error", "message"),
    [
        (10, 4, ConfigError, "method.classes is 10, but the data has 4 classes; leave method.classes out"),
        (0, 0, DataError, "needs at least 2 classes, the data has 0; give a folder with one subfolder per class"),
        (0, 1, DataError, "needs at least 2 classes, the data has 1"),
    ],
)
def test_wrong_numbers_of_classes_are_refused(asked: int, found: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Classify.build(config(method={"classes": asked}), classes=found)


def test_heads_that_need_a_class_token() -> None:
    encoder = ViT(replace(SHAPE, class_token=False))
    for settings, teacher in ({"pool": "class"}, None), ({"distill": {"kind": "hard"}}, Linear()):
        with pytest.raises(ConfigError, match=r"read the class token, and this encoder \(a plain ViT\) has none"):
            Classify(encoder, 4, ClassifySettings.model_validate(settings), teacher)
    with pytest.raises(ConfigError, match=r"set method\.pool=mean"):
        ClassifierHead(24, 4, "class", distilled=True)
    assert Classify(encoder, 4).predict(labelled().images).shape == (6, 4)


PYRAMID = {
    *("align_dim_16tofpn", "align_dim_16to8", "align_dim_8to4", "split_16to8", "split_8to4"),
    *("block_16to8", "block_8to4", "fpn_modules"),
}


def small_images(count: int = 4) -> Batch:
    return Batch({"image": torch.randn(count, 3, 32, 32)}, torch.arange(count), labels=torch.arange(count) % 3)


@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in HIERARCHICAL), ("hiera_micro", {"q_pool": 3})])
def test_every_family_is_pooled_after_its_last_block(name: str, settings: dict[str, int]) -> None:
    """The mean of its tokens, a norm, a linear layer. Only what a decoder or a detector reads is left untrained; two
    processes leave it out.
    """
    encoder, batch = micro(name, **settings), small_images()
    task = Classify(encoder, 3)
    assert task.head.fc_norm is not None
    last = encoder(batch.images, taps=Taps(hidden=(encoder.depth,), tokens=False)).hidden[encoder.depth]
    expected = F.linear(task.head.fc_norm(last.mean(dim=1)), task.head.head.weight, task.head.head.bias)
    assert_close(task.predict(batch.images), expected)
    assert_close(task(batch, CLOCK)["classification"], F.cross_entropy(expected, batch.labels))

    idle = idle_parameters(task, make_fabric(SpeedSettings(accelerator="cpu", precision="32")), batch, CLOCK)
    left = {"hiera_micro": {"multi_scale_fusion_heads"}, "hivit_micro": set()}.get(name, PYRAMID)
    assert {parameter.split(".")[1] for parameter in idle} == left
    assert not any(parameter.requires_grad for parameter in encoder.norm.parameters())


@pytest.mark.parametrize("settings", [{"pool": "class"}, {"distill": {"kind": "soft"}}])
def test_families_without_class_token_say_so(settings: dict[str, object]) -> None:
    teacher = Linear() if "distill" in settings else None
    with pytest.raises(ConfigError, match=r"this encoder \(Hiera\) has none; use method\.pool=mean without method"):
        Classify(micro("hiera_micro"), 4, ClassifySettings.model_validate(settings), teacher)


def test_a_hiera_is_fine_tuned_with_another_pooling_than_it_was_pretrained_with(tmp_path: Path) -> None:
    before = micro("hiera_micro")
    export_encoder(tmp_path, before, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    encoder = {"name": "hiera_micro", "image_size": 32, "q_pool": 3, "fuse": "none", "weights": str(tmp_path)}
    task = Classify.build(validate({"encoder": encoder, "method": {"name": "classify"}, "schedule": {"steps": 1}}), 3)
    state = before.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in task.encoder.state_dict().items() if "blocks" in name)
    assert task.encoder.grid == (4, 4)
    assert task.predict(small_images().images).shape == (4, 3)
