import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import mimlet
from mimlet.errors import RunError, WeightsError
from mimlet.export.timm import DISTILLED_SIZES, TIMM_SIZES, export_classifier, export_encoder, snippet, timm_arguments
from mimlet.methods.settings import ClassifySettings, LabelDistillation
from mimlet.models.decoders import Decoder
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights import (
    Classifier,
    Renormalised,
    encoder_state,
    load,
    load_classifier,
    load_decoder,
    open_checkpoint,
    read_tensors,
)
from mimlet.models.zoo import SIZES, Size
from mimlet.tasks.classify import Classify

SHAPES = {
    "micro": ViTShape(image_size=16, patch=4, dim=24, depth=2, heads=6),
    "tiny of MAE-lite": ViTShape(image_size=32, depth=1),
    "narrow MLP": ViTShape(image_size=16, patch=8, dim=24, depth=1, heads=2, mlp_ratio=1.5),
    "MLP of no round ratio": ViTShape(image_size=16, patch=8, dim=28, depth=1, heads=2, mlp_ratio=2.17),
    "no class token": ViTShape(image_size=16, patch=8, dim=24, depth=2, heads=3, class_token=False),
    "layer scale": ViTShape(image_size=16, patch=8, dim=24, depth=2, heads=3, layer_scale=0.1),
    "relative": ViTShape(image_size=16, patch=8, dim=24, depth=2, heads=3, relative="full"),
    "relative qv": ViTShape(image_size=16, patch=8, dim=24, depth=2, heads=3, relative="qv", layer_scale=0.1),
    "simmim": ViTShape(16, 8, 24, 2, 3, position="none", relative="shared", qv_bias=True),
    "simmim, fine-tuned": ViTShape(16, 8, 24, 2, 3, position="none", relative="qv"),
    "shared, all biases": ViTShape(16, 4, 24, 2, 3, mlp_ratio=1.5, relative="shared"),
    "beit": ViTShape(16, 8, 24, 2, 3, position="learned", qv_bias=True),
    "beit with all its parts": ViTShape(16, 8, 24, 2, 3, position="none", relative="qv", layer_scale=0.3),
    "relative, no class token": ViTShape(16, 8, 24, 2, 3, relative="full", class_token=False),
    "no positions": ViTShape(16, 8, 24, 2, 3, position="none"),
}


def class_of(shape: ViTShape) -> type[nn.Module] | None:
    """timm's class for it."""
    if shape.relative == "none" and not shape.qv_bias:
        return timm.models.VisionTransformer
    return timm.models.Beit if shape.class_token else None


MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)


def make(name: str) -> ViT:
    encoder = ViT(SHAPES[name])
    vary(encoder)
    return encoder.eval()


def vary(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def make_task(name: str, **settings: object) -> Classify:
    teacher = nn.Linear(1, 5) if "distill" in settings else None
    task = Classify(make(name), 5, ClassifySettings(**settings), teacher)
    vary(task.head)
    return task.eval()


def images(shape: ViTShape) -> torch.Tensor:
    return torch.randn(3, 3, shape.image_size, shape.image_size, generator=torch.Generator().manual_seed(1))


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(mimlet, "load", load, raising=False)
    space: dict[str, object] = {}
    exec(snippet(folder), space)
    model = space["model"]
    assert isinstance(model, nn.Module)
    assert not model.training
    result = space.get("tokens", space.get("scores"))
    assert isinstance(result, torch.Tensor)
    assert result.isfinite().all()
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_snippet_of_an_encoder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make(name)
    file = export_encoder(tmp_path / "new" / "folder", encoder, mean=MEAN, std=STD)
    model = run(file.parent, monkeypatch)
    batch = images(encoder.shape)
    tokens = model(batch)
    assert isinstance(model, class_of(encoder.shape) or ViT)
    if isinstance(model, ViT):
        tokens = tokens.tokens
    expected = encoder(batch).latent
    assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    shown = f"[B, {expected.shape[1]}, {expected.shape[2]}]: "
    shown += "class token, then patches" if encoder.prefix else "patches in raster order"
    assert shown in snippet(file.parent)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        (name, pool)
        for name, shape in SHAPES.items()
        for pool in ("mean", "class")
        if shape.class_token or pool == "mean"
    ],
)
def test_snippet_of_a_classifier(name: str, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(name, pool=pool)
    export_classifier(tmp_path, task, classes=["a", "b", "c", "d", "e"], mean=MEAN, std=STD)
    model = run(tmp_path, monkeypatch)
    batch = images(task.encoder.shape)
    assert_close(model(batch), task.predict(batch), rtol=1e-5, atol=1e-5)
    assert isinstance(model, class_of(task.encoder.shape) or Classifier)

    ours = load(tmp_path)
    assert isinstance(ours, Classifier)
    assert ours.names == ("a", "b", "c", "d", "e")
    assert_close(ours(batch), task.predict(batch))


def test_files_and_description(tmp_path: Path) -> None:
    encoder = make("micro")
    file = export_encoder(tmp_path, encoder, mean=MEAN, std=STD, info={"method": "mae"})
    assert file == tmp_path / "encoder.safetensors"
    described = json.loads((tmp_path / "encoder.json").read_text())
    stored = json.loads(read_tensors(file)[1]["mimlet"])
    lines = described.pop("snippet")
    assert described == stored
    assert stored["kind"] == "encoder"
    assert stored["method"] == "mae"
    assert stored["shape"]["heads"] == 6
    assert (stored["mean"], stored["std"]) == (list(MEAN), list(STD))
    assert stored["timm"] == {
        "name": "vit_tiny_patch16_224",
        "kwargs": {
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 6,
            "num_classes": 0,
            "global_pool": "",
        },
    }
    assert "model.load_state_dict(load_file('encoder.safetensors'))" in lines
    assert str(tmp_path) not in "\n".join(lines)
    assert str(tmp_path) in snippet(tmp_path)


def test_layer_scale_has_timms_names(tmp_path: Path) -> None:
    names = load_file(export_encoder(tmp_path, make("layer scale"), mean=MEAN, std=STD)).keys()
    assert {"blocks.0.ls1.gamma", "blocks.1.ls2.gamma"} <= names
    assert not any("gamma_" in name for name in names)
    assert (
        names
        == timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=3,
            init_values=1.0,
            num_classes=0,
        )
        .state_dict()
        .keys()
    )


def test_the_beit_family_has_the_names_of_timms_beit(tmp_path: Path) -> None:
    file = export_encoder(tmp_path, make("beit with all its parts"), mean=MEAN, std=STD)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    assert (
        load_file(file).keys()
        == timm.create_model("beit_base_patch16_224", **size, num_classes=0, global_pool="").state_dict().keys()
    )
    assert json.loads((tmp_path / "encoder.json").read_text())["timm"]["kwargs"] == {
        **size, "init_values": 0.3, "num_classes": 0, "global_pool": "",
    }  # fmt: skip


def test_published_beit_needs_no_argument() -> None:
    shape = ViTShape(dim=768, position="none", relative="qv", layer_scale=0.1)
    assert timm_arguments(shape, 1000, "mean") == (
        "beit_base_patch16_224", {"num_classes": 1000, "global_pool": "avg"}
    )  # fmt: skip


def test_ours_reads_what_timms_beit_saves(tmp_path: Path) -> None:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model("beit_base_patch16_224", **size, num_classes=5).eval()
    vary(model)
    torch.save(model.state_dict(), tmp_path / "beit.pth")
    batch = images(SHAPES["beit"])
    assert_close(load_classifier(tmp_path / "beit.pth", heads=3)(batch), model(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_zoo_in_timm(name: str) -> None:
    size = SIZES[name]
    timms, arguments = timm_arguments(ViTShape(224, size.patch, size.dim, size.depth, size.heads)) or ("", {})
    assert timms == size.timm
    model = timm.create_model(timms, **{**arguments, "depth": 1}, device="meta")
    assert (model.embed_dim, model.blocks[0].attn.num_heads) == (size.dim, size.heads)
    assert model.patch_embed.patch_size == (size.patch, size.patch)
    if name.startswith("deit") or name in ("vit_base", "vit_large"):
        assert arguments == {"num_classes": 0, "global_pool": ""}
    if name in ("vit_tiny", "vit_small"):
        assert arguments == {"num_heads": 12, "num_classes": 0, "global_pool": ""}


@pytest.mark.parametrize(("name", "size"), [*TIMM_SIZES.items(), *DISTILLED_SIZES.items()])
def test_named_sizes_are_timms(name: str, size: Size) -> None:
    model = timm.create_model(name, device="meta")
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (size.dim, size.depth, size.heads)
    assert model.blocks[0].mlp.fc1.out_features == 4 * size.dim


def test_decoder_travels_with_its_encoder(tmp_path: Path) -> None:
    encoder = make("micro")
    decoder = Decoder(24, (4, 4), 1, 48, 12, 2, 4)
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD, decoder=decoder)
    loaded = load_decoder(open_checkpoint(tmp_path), encoder)
    assert loaded.blocks[0].attn.heads == 4
    assert all(torch.equal(value, decoder.state_dict()[name]) for name, value in loaded.state_dict().items())
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD)
    with pytest.raises(WeightsError, match="holds no decoder"):
        load_decoder(open_checkpoint(tmp_path), encoder)


def test_averaged_weights_are_exported(tmp_path: Path) -> None:
    task = make_task("micro", ema_decay=0.9)
    vary(task.average_encoder)
    vary(task.average_head)
    export_classifier(tmp_path, task, classes=list("abcde"), mean=MEAN, std=STD)
    batch = images(task.encoder.shape)
    assert_close(load(tmp_path)(batch), task.predict(batch))
    loaded = load(tmp_path).encoder.cls_token
    assert torch.equal(loaded, task.average_encoder.cls_token)
    assert not torch.equal(loaded, task.encoder.cls_token)


@pytest.mark.parametrize("scale", [None, 0.1])
def test_two_token_classifier_is_timms(scale: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ViT(replace(SHAPES["micro"], distillation_token=True, layer_scale=scale))
    settings = ClassifySettings(pool="class", distill=LabelDistillation(kind="hard", token="distillation"))
    task = Classify(encoder, 5, settings, nn.Linear(1, 5)).eval()
    vary(encoder)
    vary(task.head)
    file = export_classifier(tmp_path, task, classes=list("abcde"), mean=MEAN, std=STD)
    model = run(tmp_path, monkeypatch)
    assert isinstance(model, timm.models.VisionTransformerDistilled)
    table = load_file(file)["pos_embed"]
    assert table.shape == (1, 18, 24)
    assert not table[:, 1].any()
    batch = images(encoder.shape)
    assert_close(model(batch), task.predict(batch), rtol=1e-5, atol=1e-5)

    ours = load(tmp_path)
    assert isinstance(ours, Classifier)
    assert torch.equal(ours.encoder.dist_token, encoder.dist_token)
    assert_close(ours(batch), task.predict(batch))
    assert_close(load_classifier(tmp_path, mean=MEAN, std=STD)(batch), task.predict(batch))
    torch.save(model.state_dict(), tmp_path / "deit.pth")
    assert_close(load_classifier(tmp_path / "deit.pth", heads=6)(batch), task.predict(batch), rtol=1e-5, atol=1e-5)


def test_two_token_encoder_needs_mimlet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ViT(replace(SHAPES["micro"], distillation_token=True)).eval()
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD)
    model = run(tmp_path, monkeypatch)
    assert "timm.create_model" not in snippet(tmp_path)
    assert "[B, 18, 24]: class token, distillation token, then patches" in snippet(tmp_path)
    batch = images(encoder.shape)
    assert torch.equal(model(batch).latent, encoder(batch).latent)


def test_migrating_encoder_needs_mimlet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ViT(replace(SHAPES["micro"], migration=0.4)).eval()
    export_encoder(tmp_path, encoder, mean=MEAN, std=STD)
    model = run(tmp_path, monkeypatch)
    assert isinstance(model, ViT)
    assert model.shape.migration == 0.4
    batch = images(encoder.shape)
    assert torch.equal(model(batch).latent, encoder(batch).latent)


def test_label_distilled_classifier_needs_mimlet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("micro", distill=LabelDistillation(kind="hard"))
    export_classifier(tmp_path, task, classes=list("abcde"), mean=MEAN, std=STD)
    model = run(tmp_path, monkeypatch)
    assert "timm.create_model" not in snippet(tmp_path)
    batch = images(task.encoder.shape)
    assert_close(model(batch), task.predict(batch))


def test_class_names_must_fit(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="2 class names for a classifier of 5 classes; they must agree"):
        export_classifier(tmp_path, make_task("micro"), classes=["a", "b"], mean=MEAN, std=STD)


def test_snippet_needs_an_export(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no encoder\.json; expected the folder of a finished run"):
        snippet(tmp_path)


# ------------------------------------------------------------------------------------------- loading for use


def test_load_gives_encoders(tmp_path: Path) -> None:
    encoder = make("micro")
    file = export_encoder(tmp_path, encoder, mean=MEAN, std=STD)
    batch = images(encoder.shape)
    for source in (tmp_path, str(tmp_path), file):
        model = load(source)
        assert isinstance(model, ViT)
        assert not model.training
        assert torch.equal(model(batch).latent, encoder(batch).latent)
    torch.save(encoder_state(encoder), tmp_path / "foreign.pth")
    assert torch.equal(load(tmp_path / "foreign.pth", heads=6)(batch).latent, encoder(batch).latent)


def test_classifier_as_teacher(tmp_path: Path) -> None:
    task = make_task("micro")
    export_classifier(tmp_path, task, classes=list("abcde"), mean=MEAN, std=STD)
    raw = torch.rand(2, 3, 16, 16)
    own, students = ((raw - view(m)) / view(s) for m, s in ((MEAN, STD), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))))
    assert isinstance(load_classifier(tmp_path, mean=MEAN, std=STD), Classifier)
    teacher = load_classifier(tmp_path, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert isinstance(teacher, Renormalised)
    assert not teacher.training
    assert_close(teacher(students), task.predict(own), rtol=1e-4, atol=1e-5)


def view(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)


def test_any_classifier_of_timm_can_teach(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("resnet10t").eval()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    assert load_classifier("timm:resnet10t") is model
    other = load_classifier("timm:resnet10t", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    raw = torch.rand(1, 3, 32, 32)
    mean, std = (view(model.pretrained_cfg[key]) for key in ("mean", "std"))
    assert_close(other(raw), model((raw - mean) / std), rtol=1e-4, atol=1e-5)
    model.reset_classifier(0)
    with pytest.raises(WeightsError, match="timm:resnet10t has no classification head; choose a model that was"):
        load_classifier("timm:resnet10t")


def test_classifiers_of_others(tmp_path: Path) -> None:
    task = make_task("micro")
    state = {f"module.model.{name}": value for name, value in task.classifier_state().items()}
    torch.save({"model": state}, tmp_path / "file.pth.tar")
    batch = images(task.encoder.shape)
    classifier = load_classifier(tmp_path / "file.pth.tar", heads=6)
    assert_close(classifier(batch), task.predict(batch))
    assert isinstance(load(tmp_path / "file.pth.tar", heads=6), ViT)
    torch.save({**task.classifier_state(), "head.1.weight": torch.ones(2)}, tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=r"has another head than a linear classifier's \(head\.1\.weight\)"):
        load_classifier(tmp_path / "file.pth", heads=6)
    torch.save(task.encoder.state_dict(), tmp_path / "file.pth")
    with pytest.raises(WeightsError, match="has no classification head; give a fine-tuned model"):
        load_classifier(tmp_path / "file.pth", heads=6)
