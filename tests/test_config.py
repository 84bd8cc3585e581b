"""The configuration: errors that help, overrides, lengths, sweeps, the smoke form."""

import json
from pathlib import Path
from typing import Any

import pytest

from mimlet.config import (
    Config,
    EncoderSettings,
    changed_settings,
    check_inputs,
    load_config,
    parse_override,
    read_recipe,
    recipe_header,
    set_length,
    smoke,
    sweep_points,
    validate,
)
from mimlet.errors import ConfigError, DataError
from mimlet.methods.settings import ClassifySettings, DMAESettings, MAESettings
from mimlet.models.build import settings_of
from mimlet.models.shapes import HiViTShape
from mimlet.models.zoo import HIERARCHICAL


def minimal(**more: Any) -> dict[str, Any]:
    return {"method": {"name": "mae"}, "schedule": {"epochs": 10, "batch": 64}, **more}


def problems(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(values)
    count, *lines = str(caught.value).splitlines()
    assert count == f"{len(lines)} wrong setting{'s' if len(lines) > 1 else ''}:"
    return [line.strip() for line in lines]


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        minimal(optim={"lr": -1}, encoder={"nme": "vit_tiny", "image_size": 100}, speed={"precision": "fp8"}, seeds=1)
    )
    assert len(found) == 4
    assert "optim.lr: Input should be greater than 0, got -1" in found
    assert any(line.startswith("speed.precision: ") and line.endswith("got 'fp8'") for line in found)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule.epoch", 3, "schedule.epoch: unknown setting (did you mean 'schedule.epochs'?)"),
        ("encdoer", {}, "encdoer: unknown setting (did you mean 'encoder'?)"),
        ("method.mask_rato", 0.5, "method.mask_rato: unknown setting (did you mean 'method.mask_ratio'?)"),
        ("method.decoder.head", 3, "method.decoder.head: unknown setting (did you mean 'method.decoder.heads'?)"),
        ("method.decode_layer", 8, "method.decode_layer: not a setting of method 'mae', but of dmae"),
        ("data.augment.flips", 0, "data.augment.flips: unknown setting (did you mean 'data.augment.flip'?)"),
        (
            "method.name",
            "maee",
            "method.name: 'maee' (did you mean 'mae'?); known: mae, dmae, tinymim, mimhd, g2sd, dmae_features, "
            "simmim, maskfeat, beit, dvae, bootmae, dino, mocov3, itpn, itpn_clip, classify, linear_probe",
        ),
        ("optim.name", "adam", "optim.name: Input should be 'adamw', 'sgd' or 'lars', got 'adam'"),
    ],
)
def test_a_wrong_setting_names_the_nearest_known_one(key: str, value: object, message: str) -> None:
    values = minimal()
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    assert problems(values) == [message]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"encoder": {"image_size": 100}},
            "encoder: image_size 100 is not divisible by the patch of 16 px; use 96 or 112, or another patch",
        ),
        (
            {"encoder": {"name": "hiera_tiny46", "image_size": 240}},
            "encoder: image_size 240 is not divisible by the mask unit of 32 px; use 224 or 256, or another patch",
        ),
        (
            {"encoder": {"name": "hiera_tiny46", "stages": [1, 2, 3]}},
            "encoder: encoder.stages [1, 2, 3]: Hiera has four stages of at least one block each",
        ),
        (
            {"encoder": {"name": "hivit_tiny", "patch": 6, "image_size": 24}},
            "encoder: encoder.patch 6 is not divisible by 4, and tokens of stage 1 are a quarter of a patch",
        ),
        (
            {"encoder": {"name": "hivit_tiny", "relative": "qv"}},
            "encoder: encoder.relative=qv is no form of a HiViT or iTPN; expected none or full or decomposed",
        ),
        (
            {"encoder": {"name": "vit_tiny", "window": 7}},
            "encoder: encoder.window is no part of a plain ViT (vit_tiny); remove it",
        ),
        (
            {"encoder": {"name": "itpn_tiny", "gathering": "to_tokens"}},
            "encoder: encoder.gathering, global_blocks and window_relative are about windows; set encoder.window (14)",
        ),
        (
            {"encoder": {"name": "itpn_tiny", "window": 7, "global_blocks": [13]}},
            "encoder: encoder.global_blocks: no block 13; stage 3 has blocks 1 to 12",
        ),
        (
            {"encoder": {"name": "itpn_tiny", "window": 7, "relative": "full"}},
            "encoder: encoder.relative=full spans the image, and encoder.window does not; use window_relative",
        ),
        ({"encoder": {"dim": 200, "heads": 12}}, "encoder: width 200 is not divisible by 12 heads"),
        (
            {"encoder": {"dim": 198, "heads": 3}},
            "encoder: width 198 is not divisible by 4, which 2-D sin-cos positions need",
        ),
        (
            {"method": {"name": "mae", "decoder": {"heads": 5}}},
            "method.decoder: width 96 must be divisible by its 5 heads, and by 4 for the 2-D sin-cos positions",
        ),
        (
            {"encoder": {"name": "itpn_tiny"}, "method": {"name": "mae", "decoder": {"dim": 120}}},
            "method.decoder: width 120 must be divisible by 16, the finest level's tokens in a patch",
        ),
        (
            {"schedule": {"epochs": 3, "steps": 7}},
            "schedule: set exactly one of epochs and steps (got epochs 3.0 and steps 7)",
        ),
        ({"schedule": {}}, "schedule: set exactly one of epochs and steps (got none)"),
        (
            {"schedule": {"epochs": 3, "warmup_epochs": 5}},
            "schedule: warmup_epochs 5.0 must be shorter than the 3.0 epochs of training",
        ),
    ],
)
def test_settings_that_contradict_each_other(more: dict[str, Any], message: str) -> None:
    assert problems(minimal(**more)) == [message]


def test_unknown_encoder_lists_the_known_ones() -> None:
    (found,) = problems(minimal(encoder={"name": "vit_tinny"}))
    assert found.startswith("encoder: unknown encoder 'vit_tinny' (did you mean 'vit_tiny'?); known: vit_nano, ")


def test_what_a_method_needs_is_asked_for_in_one_message() -> None:
    found = problems(minimal(method={"name": "dmae", "decoder": {"dim": 30, "heads": 4}}))
    assert [line.split(":")[0] for line in found] == ["teacher.path", "method.decoder"]
    assert "give --teacher" in found[0]
    (found_probe,) = problems(minimal(method={"name": "linear_probe"}))
    assert found_probe.startswith("encoder.weights: ")
    (found_distil,) = problems(minimal(method={"name": "classify", "distill": {"kind": "hard"}}))
    assert found_distil.startswith("teacher.path: method 'classify' needs a teacher for method.distill")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schedule.epochs=100", {"schedule": {"epochs": 100}}),
        ("optim.lr=1.5e-3", {"optim": {"lr": 1.5e-3}}),
        ("run.tensorboard=false", {"run": {"tensorboard": False}}),
        ("data.augment.crop_scale=[0.2, 1.0]", {"data": {"augment": {"crop_scale": [0.2, 1.0]}}}),
        ("method.attention_layers=[[3, 3], [0, 0]]", {"method": {"attention_layers": [[3, 3], [0, 0]]}}),
        ("encoder.layer_scale=none", {"encoder": {"layer_scale": None}}),
        ("encoder.name=vit_small", {"encoder": {"name": "vit_small"}}),
        ("data.subset=10%", {"data": {"subset": "10%"}}),
        ('data.subset="25"', {"data": {"subset": "25"}}),
        ("teacher.path=runs/a=b", {"teacher": {"path": "runs/a=b"}}),
        ('sweep={"optim.lr" = [0.1, 0.2]}', {"sweep": {"optim.lr": [0.1, 0.2]}}),
    ],
)
def test_override_values(text: str, expected: dict[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["photos/", "=3"])
def test_a_word_that_is_no_override(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not an override; expected section\.key=value"):
        parse_override(text)


def test_none_is_a_name_where_there_is_such_a_name() -> None:
    config = load_config("mae_tiny", ["encoder.position=none", "encoder.relative=none"])
    assert (config.encoder.position, config.encoder.relative) == ("none", "none")


def test_precedence_recipe_then_base_then_overrides() -> None:
    config = load_config("mae_tiny", ["optim.lr=3e-4", "seed=3"], {"optim": {"lr": 1.0, "clip": 2.0}, "seed": 1})
    assert (config.optim.lr, config.optim.clip, config.seed) == (3e-4, 2.0, 3)
    assert config.optim.betas == (0.9, 0.95), "what nobody touched is the recipe's"


def test_loading_leaves_its_source_alone() -> None:
    values = minimal(optim={"lr": 1e-3})
    before = json.dumps(values)
    load_config(values, ["optim.lr=2e-3"], {"schedule": {"batch": 2}})
    assert json.dumps(values) == before


def test_missing_and_broken_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'd2mae_tinny' \(did you mean 'd2mae_tiny'\?\)"):
        read_recipe("d2mae_tinny")
    broken = tmp_path / "broken.toml"
    broken.write_text("title = ")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML: Invalid value"):
        read_recipe(broken)
    flat = tmp_path / "flat.toml"
    flat.write_text('method = "mae"\n')
    with pytest.raises(ConfigError, match=r"method is a section of settings; expected a table \[method\], got 'mae'"):
        read_recipe(flat)
    half = tmp_path / "config.json"
    half.write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object, got list"):
        read_recipe(half)
    half.write_text('{"title": ')
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        read_recipe(half)


@pytest.mark.parametrize("recipe", ["mae_tiny", "d2mae_tiny", "classify_tiny_rpe_2023", "transfer_pets"])
def test_config_json_repeats_the_run(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe, ["teacher.path=teacher.pth", 'data.path=["a", "b"]'])
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert load_config(path) == config
    assert changed_settings(config, load_config(path)) == []


def test_method_settings_are_those_of_the_named_method() -> None:
    kinds = {"mae_tiny": MAESettings, "dmae_tiny": DMAESettings, "classify_tiny": ClassifySettings}
    for recipe, kind in kinds.items():
        assert type(load_config(recipe, ["teacher.path=x"]).method) is kind
    with pytest.raises(ConfigError, match="method: Field required"):
        validate({"schedule": {"epochs": 1}})


def test_changed_settings_are_those_that_change_results() -> None:
    old = validate(minimal())
    new = load_config(
        minimal(title="other"),
        ["optim.lr=1e-3", "encoder.relative=full", "speed.workers=7", "run.out=elsewhere", "schedule.batch=64"],
    )
    assert changed_settings(old, new) == ["encoder.relative: none -> full", "optim.lr: 0.00015 -> 0.001"]
    other = validate(minimal(method={"name": "dmae"}, teacher={"path": "t"}))
    assert "method.extra_block: None -> False" in changed_settings(old, other)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ({"epochs": 100}, {"epochs": 100, "steps": 0, "warmup_epochs": 10}),
        ({"epochs": 800}, {"epochs": 800, "steps": 0, "warmup_epochs": 40}),
        ({"steps": 50}, {"epochs": 0, "steps": 50, "warmup_epochs": 0, "warmup": 0.1}),
        ({}, {"epochs": 400, "warmup_epochs": 40}),
    ],
)
def test_another_length_keeps_a_sensible_warm_up(length: dict[str, Any], expected: dict[str, Any]) -> None:
    values = {"schedule": {"epochs": 400, "warmup_epochs": 40}}
    set_length(values, **length)
    assert values["schedule"] == expected


def test_length_in_epochs_replaces_steps() -> None:
    values: dict[str, Any] = {"schedule": {"steps": 3, "warmup": 0.4}}
    set_length(values, epochs=2)
    assert validate(minimal(**values)).schedule.epochs == 2
    with pytest.raises(ConfigError, match="in epochs or in steps, not both"):
        set_length(values, epochs=2, steps=2)


def test_sweep_is_the_product_of_its_rows() -> None:
    config = load_config("transfer_flowers")
    points = sweep_points(config)
    assert len(points) == 3 * 2 * 2
    tried, point = points[0]
    assert tried == {
        "optim.lr": 0.01,
        "schedule.epochs": 150,
        "schedule.warmup_epochs": 30,
        "optim.layer_decay": 1.0,
    }
    assert (point.optim.lr, point.schedule.epochs, point.schedule.warmup_epochs) == (0.01, 150, 30)
    assert point.sweep == {}
    assert len({p.model_dump_json() for _, p in points}) == 12
    assert changed_settings(config, points[-1][1]) == ["optim.lr: 0.03 -> 0.1"], "the rest is as in the recipe"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"optim.lrr": [1.0]}, r"optim\.lrr: unknown setting \(did you mean 'optim\.lr'\?\)"),
        ({"optim.lr": [0.1, -1]}, r"optim\.lr: Input should be greater than 0"),
        ({"schedule.epochs,schedule.warmup_epochs": [[5, 1], [9]]}, r"expected lists of 2 values.*got \[9\]"),
    ],
)
def test_every_point_of_a_sweep_is_checked_before_training(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_points(validate(minimal(sweep=sweep)))


def test_smoke_keeps_the_shape_of_the_method() -> None:
    config = validate(smoke(read_recipe("d2mae_tiny")) | {"teacher": {"path": "t"}})
    assert isinstance(config.method, DMAESettings)
    assert (config.method.decode_layer, config.method.extra_block) == (8, True)
    shape = config.encoder.shape()
    assert (shape.patch, shape.dim, config.encoder.blocks, shape.heads) == (8, 48, 12, 12)
    assert (config.schedule.steps, config.schedule.batch, config.speed.workers) == (3, 8, 0)
    assert list(smoke(read_recipe("transfer_pets"))["sweep"]) == ["optim.lr", "optim.layer_decay"]


@pytest.mark.parametrize("wrong", [{"encoder": {"name": "vit_tinny"}}, {"method": {"name": "maee"}}, {"method": {}}])
def test_smoke_form_of_a_wrong_recipe_is_as_wrong(wrong: dict[str, Any]) -> None:
    assert problems(smoke(minimal(**wrong))) == problems(minimal(**wrong))


def test_smoke_form_of_a_recipe_without_a_decoder() -> None:
    config = validate(smoke(minimal(encoder={"name": "vit_nano"})))
    assert isinstance(config.method, MAESettings)
    assert (config.encoder.shape().dim, config.method.decoder.dim) == (16, 12)


def test_inputs_are_looked_for_before_anything_heavy(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()

    def config(path: list[str], **more: Any) -> Config:
        return validate(minimal(method={"name": "classify"}, data={"path": path, **more}))

    check_inputs(config([str(tmp_path / "photos"), "torchvision:CIFAR10:anywhere"], subset="10%"))
    check_inputs(config([str(tmp_path / "photos")], subset="2.5%"))
    with pytest.raises(DataError, match="no images: give --data"):
        check_inputs(config([]))
    with pytest.raises(DataError) as caught:
        check_inputs(config([str(tmp_path / "photo")], eval=["nowhere/at/all"], subset="mine.txt"))
    with pytest.raises(DataError, match=r"^data\.labelled: no such file or folder 'nowhere'"):
        check_inputs(validate(minimal(data={"path": [str(tmp_path / "photos")], "labelled": ["nowhere"]})))
    first, second, third = str(caught.value).splitlines()
    assert first == f"data.path: no such file or folder '{tmp_path / 'photo'}' (did you mean 'photos'?)"
    assert second == "data.eval: no such file or folder 'nowhere/at/all'"
    assert third.startswith("data.subset: no such file or folder 'mine.txt'")


def test_header_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("# source:   A paper,\n#           Table 1: all\n# cost:     1 h\ntitle = 'x'\n# late: no\n")
    assert recipe_header(path) == {"source": "A paper, Table 1: all", "cost": "1 h"}


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        (
            "mae",
            {"eval": ["photos"]},
            "data.eval: method 'mae' learns without labels; to judge its encoder in training give labelled images to "
            "compare with, data.labelled (--labelled), or use `mimlet probe` afterwards",
        ),
        ("mae", {"judge": "probe"}, "data.judge: probe judges an encoder by data.labelled (--labelled); give both"),
        ("mae", {"judge": "svm", "labelled": ["p"]}, "data.judge: Input should be 'knn' or 'probe', got 'svm'"),
        (
            "classify",
            {"labelled": ["photos"]},
            "data.labelled: method 'classify' learns from the labels of data.path and is judged on data.eval (--eval); "
            "data.labelled is for pre-training",
        ),
    ],
)
def test_what_an_encoder_is_judged_by_in_training(method: str, data: dict[str, object], message: str) -> None:
    assert problems(minimal(method={"name": method}, data={"path": ["photos"], **data})) == [message]


def test_an_encoder_is_judged_by_labelled_images() -> None:
    data = {"path": ["photos"], "labelled": ["a"], "eval": ["b"], "judge": "probe"}
    assert validate(minimal(data=data)).data.judge == "probe"


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"kind": "dual_vew"}, "method.terms.0.kind: 'dual_vew' (did you mean 'dual_view'?); known: relations, "),
        ({"weight": 2}, "method.terms.0.kind: missing; known: relations, alignment, dual_view"),
        ({"kind": "relations", "weigth": 2}, "method.terms.0.weigth: unknown setting"),
        ({"kind": "relations", "pairs": ["qx"]}, "method.terms.0.pairs.0: Input should be 'qq', "),
    ],
)
def test_a_wrong_term_is_named(term: dict[str, object], message: str) -> None:
    values = minimal()
    values["method"] = {"name": "dmae", "terms": [term]}
    values["teacher"] = {"path": "teacher"}
    (problem,) = problems(values)
    assert problem.startswith(message)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_settings_describe_a_shape_and_are_found_again_from_it(name: str) -> None:
    settings = EncoderSettings(name=name)
    shape = settings.shape()
    assert (shape.dim, shape.stages, settings.blocks) == (
        HIERARCHICAL[name].dim,
        HIERARCHICAL[name].stages,
        sum(HIERARCHICAL[name].stages),
    )
    assert EncoderSettings(**settings_of(shape)).shape() == shape


def test_a_pyramid_is_given_and_taken() -> None:
    without = EncoderSettings(name="itpn_base", pyramid_depth=0).shape()
    assert isinstance(without, HiViTShape)
    assert (without.pyramid_dim, without.pyramid_depth, without.pyramid_hidden) == (0, 0, 0)
    given = EncoderSettings(name="hivit_base", pyramid_depth=1, pyramid_dim=64).shape()
    assert isinstance(given, HiViTShape)
    assert (given.pyramid_dim, given.pyramid_depth, given.pyramid_hidden) == (64, 1, 256)
