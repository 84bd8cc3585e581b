"""The table of methods: a page from run folders alone, and the whole at tiny sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.method_table import (
    BEIT,
    RECIPES,
    SCRATCH,
    SUPERVISED,
    difference,
    form,
    groups_table,
    main,
    page_text,
    read_facts,
    read_rows,
    tuned,
)
from mimlet.config import EncoderSettings, merge, read_recipe, set_length, validate
from mimlet.errors import RunError
from tests.data.images import make_folder

ENVIRONMENT = {"cpu": "a CPU", "cores": 2, "gpus": [], "packages": {"torch": "9.9"}}


def fake_run(
    folder: Path, recipe: str, values: dict[str, Any], losses: dict[str, float] | None, top1: float | None
) -> None:
    """What a finished run leaves for the table."""
    folder.mkdir(parents=True)
    settings = read_recipe(recipe)
    set_length(settings, epochs=2)
    merge(settings, {"teacher": {"path": "private/teacher"}, **values})
    (folder / "config.json").write_text(json.dumps(validate(settings).model_dump(mode="json")))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    common = {"step": 4, "epoch": 2.0}
    lines = [{**common, "kind": "train", "time": 12.0, "lr": 0.0, **(losses or {}), "total": 9.0}]
    lines += [{**common, "kind": "eval", "time": 13.0, "top1": top1}] if top1 is not None else []
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "encoder.safetensors").touch()


def fake_results(out: Path) -> None:
    """Two methods with two seeds, scratch with one; the second method has no probe of seed 1; the first is fine-tuned
    with all labels, too.
    """
    for seed in (0, 1):
        for recipe, losses, probe, judged in (
            ("mae_micro32", {"reconstruction": 0.4 + 0.2 * seed}, 50 + seed, 40 + 3 * seed),
            ("dmae_micro32", {"reconstruction": 0.5, "attention": 0.25}, 52, 41 + seed),
        ):
            at = out / f"seed{seed}" / recipe
            fake_run(at, recipe, {"seed": seed}, losses, None)
            if recipe == "mae_micro32" or seed == 0:
                (at / "probe_quick.csv").write_text(f"probe,train,test,top1\nquick,9,9,{probe}\n")
            fake_run(
                tuned(at, "finetuned"), "classify_micro32", {"data": {"subset": "100"}}, {"classification": 1.0}, judged
            )
            if recipe == "mae_micro32":
                fake_run(tuned(at, "tuned_all"), "classify_micro32", {}, {"classification": 1.0}, 60.0 + seed)
    scratch = tuned(out / "seed0" / SCRATCH, "finetuned")
    fake_run(scratch, SCRATCH, {"data": {"subset": "100"}}, {"classification": 1.0}, 30.0)


def test_the_table_is_what_the_folders_hold(tmp_path: Path) -> None:
    fake_results(tmp_path)
    rows = read_rows(tmp_path)
    text = page_text(rows, read_facts(tmp_path, rows), "Nothing yet.")
    assert "| no pre-training | – | – | –, – | – | – | 30.0, – | 30.0 | – | –, – | – | – |" in text
    mae = "| MAE | reconstruction 0.500 | 12 | 50.0, 51.0 | 50.5 | 1.0 | 40.0, 43.0 | 41.5 | 3.0 "
    assert f"{mae}| 60.0, 61.0 | 60.5 | 1.0 |" in text
    dmae = "| D-MAE | reconstruction 0.500, attention 0.250 | 12 | 52.0, – | 52.0 | – | 41.0, 42.0 | 41.5 | 1.0 "
    assert f"{dmae}| –, – | – | – |" in text
    assert "TinyMIM |" not in text
    assert "tokenizer" not in text
    assert "--seeds 0 1" in text
    assert "--epochs 2 --labels 100 --finetune-epochs 2 --all-epochs 2 " in text
    assert "Students: vit_micro, 96 wide, 6 blocks, 6 heads, 32 px; pre-training: 2 epochs of batch 256, " in text
    assert "a CPU, 2 cores, torch 9.9" in text


def test_the_page_tells_neither_paths_nor_hosts(tmp_path: Path) -> None:
    fake_results(tmp_path)
    rows = read_rows(tmp_path)
    text = page_text(rows, read_facts(tmp_path, rows), "")
    assert "private" not in text
    assert str(tmp_path) not in text


def test_orders_are_of_equal_seeds() -> None:
    assert difference({0: 52.0, 1: 50.0, 2: 90.0}, {0: 51.0, 1: 50.5}) == "+0.2, ahead in 1 of 2"
    assert difference({0: 52.0}, {1: 50.0}) == "–"


def test_groups_are_compared_by_the_means_of_their_methods(tmp_path: Path) -> None:
    fake_results(tmp_path)
    for recipe, judged in (("simmim_micro32", 45.5), ("dino_micro32", 48.0)):
        at = tmp_path / "seed0" / recipe
        fake_run(at, recipe, {}, {"reconstruction": 1.0}, None)
        fake_run(tuned(at, "finetuned"), "classify_micro32", {"data": {"subset": "100"}}, {}, judged)
    lines = groups_table(read_rows(tmp_path)).splitlines()
    assert lines[2:] == [
        "| masked images | MAE, SimMIM | 50.5 | 43.5 | 60.5 |",
        "| crops and contrast | DINO | – | 48.0 | – |",
        "| difference |  | – | -4.5 | – |",
    ]


def test_the_tokenizers_training_is_told(tmp_path: Path) -> None:
    fake_results(tmp_path)
    fake_run(tmp_path / "tokenizer", "dvae_micro32", {}, {"reconstruction": 0.1}, None)
    text = page_text(rows := read_rows(tmp_path), read_facts(tmp_path, rows), "")
    assert "BEiT's tokenizer: a discrete VAE, 2 epochs of batch 128, 12 seconds, which BEiT's do not contain." in text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, ("sincos", "none", False)),
        ({"position": "none", "relative": "shared", "qv_bias": True}, ("none", "qv", True)),
        ({"position": "none", "relative": "shared"}, ("none", "full", False)),
        ({"position": "learned", "qv_bias": True}, ("learned", "none", True)),
    ],
)
def test_an_encoder_is_tuned_in_its_form(before: dict[str, Any], after: tuple[str, str, bool]) -> None:
    found = form(EncoderSettings.model_validate(before))
    assert (found["position"], found["relative"], found["qv_bias"]) == after


def test_what_people_wrote_stays(tmp_path: Path) -> None:
    fake_results(tmp_path / "runs")
    page = tmp_path / "docs" / "results.md"
    arguments = ["--out", str(tmp_path / "runs"), "--only", "page", "--page", str(page)]
    main(arguments)
    first = page.read_text()
    page.write_text(first.replace("<!-- reading -->\n", "<!-- reading -->\nMAE is ahead.\n\nBy a little."))
    main(arguments)
    second = page.read_text()
    assert "<!-- reading -->\nMAE is ahead.\n\nBy a little.\n<!-- /reading -->" in second
    main(arguments)
    assert page.read_text() == second
    assert (page.parent / "images" / "method_table.png").read_bytes().startswith(b"\x89PNG")


def test_a_lost_end_of_the_reading_is_an_error(tmp_path: Path) -> None:
    fake_results(tmp_path / "runs")
    page = tmp_path / "results.md"
    page.write_text("<!-- reading -->\nprecious\n")
    with pytest.raises(RunError, match="no <!-- /reading -->"):
        main(["--out", str(tmp_path / "runs"), "--only", "page", "--page", str(page)])
    assert page.read_text() == "<!-- reading -->\nprecious\n"


def test_unequal_budgets_are_not_compared(tmp_path: Path) -> None:
    fake_results(tmp_path)
    fake_run(tmp_path / "seed1" / "g2sd_micro32", "g2sd_micro32", {"schedule": {"epochs": 3, "batch": 256}}, {}, None)
    with pytest.raises(RunError, match=r"lengths of pre-training differ.*2 epochs of batch 256, 3 epochs of batch 256"):
        read_facts(tmp_path, read_rows(tmp_path))


def test_rates_are_all_alike_or_each_recipes_own(tmp_path: Path) -> None:
    fake_results(tmp_path)
    rows = read_rows(tmp_path)
    assert "optim.lr=0.0015" in read_facts(tmp_path, rows).budget
    fake_run(tmp_path / "seed1" / "dino_micro32", "dino_micro32", {}, {}, None)
    facts = read_facts(tmp_path, read_rows(tmp_path))
    assert facts.budget.endswith("--pretrain schedule.batch=256")
    assert "the learning rate of each recipe" in page_text(rows, facts, "")
    fake_run(tmp_path / "seed0" / "dino_micro32", "dino_micro32", {"optim": {"lr": 0.5}}, {}, None)
    with pytest.raises(RunError, match=r"learning rates of pre-training differ.*0\.001, 0\.0015, 0\.5"):
        read_facts(tmp_path, read_rows(tmp_path))


def test_no_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished runs"):
        read_rows(tmp_path)


def test_everything_at_tiny_sizes_and_again(tmp_path: Path) -> None:
    images = str(make_folder(tmp_path / "images"))
    distilled = ["tinymim_micro32", "mimhd_micro32"]
    baselines = ["simmim_micro32", BEIT, "dino_micro32"]
    page, methods = tmp_path / "docs" / "results.md", [SCRATCH, SUPERVISED, *baselines, *distilled]
    arguments = ["--train", images, "--test", images, "--out", str(tmp_path / "runs"), "--page", str(page)]
    arguments += ["--methods", *methods, "--seeds", "0", "--steps", "2", "--labels", "2", "--finetune-epochs", "1"]
    arguments += ["--all-epochs", "1"]
    arguments += ["schedule.batch=4", "speed.workers=0"]
    arguments += ["encoder.image_size=16", "encoder.dim=24", "encoder.depth=6", "encoder.heads=3"]
    main(arguments)
    text = page.read_text()
    assert all(f"| {RECIPES[method]} | " in text for method in methods)
    assert "--steps 2 --labels 2 --finetune-epochs 1 --all-epochs 1 " in text
    assert "BEiT's tokenizer: a discrete VAE, 2 steps of batch 4, " in text
    assert "| MIM-HD - TinyMIM | " in text
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("encoder.safetensors")}
    assert len(trained) == 2 + 6 + 2 * 7
    main(arguments)
    assert trained == {path: path.stat().st_mtime_ns for path in trained}
    assert page.read_text() == text
