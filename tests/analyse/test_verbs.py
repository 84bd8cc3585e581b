"""`mimlet analyse` and `mimlet diagnose` as a user has them."""

import csv
import json
from pathlib import Path

import pytest
import torch

import mimlet
from mimlet.analyse.attention import UPSTREAM_PATCH
from mimlet.analyse.results import read_analysis
from mimlet.cli import main
from mimlet.models.shapes import ViTShape
from mimlet.models.vit import ViT
from tests.data.images import make_folder
from tests.tiny import SPEED, finetune, pretrain

ALWAYS = ("--images", "8", "--batch", "4", "--shown", "2", "--workers", "0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def mae(photos: Path) -> Path:
    """A pre-trained run, with a report."""
    run = photos.parent / "mae"
    pretrain(photos, run)
    assert main(["report", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def classifier(photos: Path, mae: Path) -> Path:
    return finetune(photos, photos.parent / "classifier", "--encoder", str(mae))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_two_models_with_everything(photos: Path, mae: Path, classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    more = ["--labelled", str(photos), "--eval", str(photos), "--leading", "0,2", "--recipe", "classify_micro32"]
    settings = [*SPEED, "schedule.epochs=1", "schedule.warmup_epochs=0", "schedule.batch=8", "speed.workers=0"]
    models = [str(mae), str(classifier)]
    assert main(["analyse", *models, "--data", str(photos), "--out", str(out), *ALWAYS, *more, *settings]) == 0
    found = read_analysis(out)
    assert (found.images, found.batch, found.order, found.upstream) == (8, 4, "random", False)
    assert [model.label for model in found.models] == ["mae", "classifier"]
    assert [(s.a, s.b) for s in found.similarities] == [(0, 0), (0, 1), (1, 1)]
    for model in found.models:
        assert model.distance is not None
        assert (len(model.distance), len(model.distance[0])) == (2, 3)
        assert len(model.effective_rank) == len(model.probe) == 3
        assert sorted(model.leading) == [0, 2]
    titles = [picture.title for picture in found.pictures]
    assert titles == [
        "mae: attention of the class token in block 2",
        "classifier: attention of the class token in block 2",
        "mae: reconstruction",
    ]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "mimlet analyse" in page
    heads = rows(out / "heads.csv")
    assert len(heads) == 2 * 2 * 3
    assert float(heads[0]["distance_px"]) == pytest.approx(4 * float(heads[0]["distance_patches"]))
    assert list(rows(out / "layers.csv")[0]) == [
        "model", "layer", "effective_rank", "spread", "similarity", "probe_top1",
    ]  # fmt: skip


def test_one_run_keeps_its_analysis_and_shows_it(photos: Path, mae: Path) -> None:
    assert main(["analyse", str(mae), "--data", str(photos), *ALWAYS, "--query", "1,2", "--block", "1"]) == 0
    found = read_analysis(mae / "analysis")
    assert found.pictures[0].file == "attention_mae_block_1_patch_1_2.png"
    assert "Similarity of layers (CKA)" in (mae / "report.html").read_text()


def test_upstream_looks_at_the_first_files_through_a_fresh_norm(photos: Path, mae: Path, tmp_path: Path) -> None:
    options = {"data": photos, "images": 8, "batch": 4, "workers": 0, "only": ["cka", "attention"]}
    ours = mimlet.analyse(mae, out=tmp_path / "ours", order="folder", **options)
    upstream = mimlet.analyse(mae, out=tmp_path / "upstream", upstream=True, **options)
    assert (upstream.order, upstream.models[0].distance) == ("folder", ours.models[0].distance)
    ours_cka, theirs = (torch.tensor(each.similarities[0].cka) for each in (ours, upstream))
    assert torch.equal(ours_cka[:-1, :-1], theirs[:-1, :-1])
    assert theirs[-1, -1].item() == pytest.approx(1)
    row = rows(tmp_path / "upstream" / "heads.csv")[0]
    assert float(row["distance_upstream"]) == pytest.approx(UPSTREAM_PATCH * float(row["distance_patches"]))


def test_models_of_different_grids_and_modules(photos: Path, mae: Path, tmp_path: Path) -> None:
    other = ViT(ViTShape(32, 16, 24, 1, 2))
    found = mimlet.analyse([mae, other], data=photos, out=tmp_path, images=8, batch=8, workers=0, only=["cka"])
    assert [model.grid for model in found.models] == [(4, 4), (2, 2)]
    assert len(found.similarities[1].cka) == 3
    assert len(found.similarities[1].cka[0]) == 2
    assert found.models[0].distance is None


def test_diagnosis_with_a_reference_and_a_target(
    photos: Path, mae: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--reference", str(classifier), "--data", str(photos), "--target", str(photos), "--images", "8"]
    assert main(["diagnose", str(mae), *given, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Is the target data set too small for MAE alone?" in said
    assert "12 labelled images of 3 classes" in said
    findings = json.loads((tmp_path / "diagnosis.json").read_text())
    assert all(finding["threshold"] and finding["evidence"] for finding in findings)
    assert findings[-1]["question"] == "Which recipe to try?"
    assert "Which recipe to try?" in (tmp_path / "report.html").read_text()


def test_diagnosis_of_what_is_there(photos: Path, mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's metrics and its analysis, if there is one."""
    assert main(["analyse", str(mae), "--data", str(photos), *ALWAYS]) == 0
    capsys.readouterr()
    assert main(["diagnose", str(mae)]) == 0
    said = capsys.readouterr().out
    assert "Was the training finished?" in said
    assert "Reference model needed" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{mae}"], "no images: give --data"),
        (["{mae}", "--data", "{few}"], "3 images are too few: an analysis compares at least 4 with each other"),
        (["{mae}", "--data", "{photos}", "--batch", "3"], "--batch is 3; CKA compares at least 4 images"),
        (["{mae}", "--data", "{photos}", "--query", "9"], "--query is 9; expected ROW,COLUMN of a patch, such as 7,3"),
        (["{mae}", "--data", "{photos}", "--query", "9,0"], "no patch 9,0 (row, column) in mae, which has 4 x 4"),
        (["{mae}", "--data", "{photos}", "--block", "5"], "mae has blocks 1 to 2 (0: the last), and no block 5"),
        (["{mae}", "--data", "{photos}", "--only", "cka,maps,x"], "only x: expected some of cka, attention, health"),
        (["{mae}", "--data", "{photos}", "--leading", "0,2"], "leading blocks are fine-tuned and judged: give"),
        (["{mae}", "--data", "{photos}", "--leading", "a"], "--leading is a; expected whole numbers with commas"),
        (["{mae}", "--data", "{photos}", "--labelled", "{photos}"], "curves over layers need labelled images twice"),
        (["{mae}", "--data", "{photos}", "optim.lr=1"], "optim.lr=1 would change nothing: settings are for the"),
        (["{mae}", "{mae}", "--data", "{photos}"], "is given twice; give each model once"),
        (["optim.lr=1", "--data", "{photos}"], "no model to look at: give a run folder, a weights file"),
        (["{nowhere}", "--data", "{photos}"], "no such file or folder"),
        (["{empty}", "--data", "{photos}"], "holds no encoder.safetensors; expected the folder of a finished run"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, photos: Path, mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = make_folder(tmp_path / "few", classes=("ant",), each=3)
    (tmp_path / "empty").mkdir()
    places = {"mae": mae, "photos": photos, "few": few, "nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty"}
    given = [text.format(**places) for text in arguments]
    assert main(["analyse", *given, "--out", str(tmp_path / "out"), "--workers", "0"]) == 2
    assert message in capsys.readouterr().err


def test_diagnosis_of_an_empty_run_and_of_nothing(
    tmp_path: Path, mae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "run"
    empty.mkdir()
    (empty / "config.json").write_bytes((mae / "config.json").read_bytes())
    assert main(["diagnose", str(empty)]) == 2
    assert "nothing to diagnose" in capsys.readouterr().err
    assert main(["diagnose", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_two_families_side_by_side(photos: Path, tmp_path: Path) -> None:
    """A Hiera beside an iTPN: all measurements, tables and pages."""
    decoder = ("method.decoder.dim=16", "method.decoder.heads=2")
    hiera = ("encoder.name=hiera_micro", "encoder.image_size=16", "encoder.dim=8")
    itpn = ("encoder.name=itpn_micro", "encoder.image_size=16", "encoder.dim=32", "encoder.pyramid_dim=8")
    plain = ("encoder.depth=0", "encoder.heads=0")
    models = [
        str(pretrain(photos, tmp_path / name, *plain, *settings, *decoder))
        for name, settings in (("hiera", hiera), ("itpn", (*itpn, "encoder.stages=[1,1,2]")))
    ]
    out, more = tmp_path / "seen", ["--labelled", str(photos), "--eval", str(photos)]
    assert main(["analyse", *models, "--data", str(photos), "--out", str(out), *ALWAYS, *more]) == 0
    found = read_analysis(out)
    assert [model.attending for model in found.models] == [[4, 5, 6], [3, 4]]
    assert [model.token_grids[0] for model in found.models] == [(16, 16), (16, 16)]
    assert [len(model.probe) for model in found.models] == [7, 5]
    assert [picture.title for picture in found.pictures] == [
        "hiera: attention of all patches on average in block 6",
        "itpn: attention of all patches on average in block 4",
        "hiera: reconstruction",
        "itpn: reconstruction",
    ]
    heads = rows(out / "heads.csv")
    assert [(row["model"], row["block"]) for row in heads[:5]] == [("hiera", "4")] * 4 + [("hiera", "5")]
    assert len(heads) == 4 + 4 + 8 + 4 + 4
    assert len(rows(out / "layers.csv")) == 7 + 5
    assert "attention of the blocks 3, 4 only" in (out / "report.html").read_text()
    given = ["--data", str(photos), "--reference", models[1], "--images", "8", "--out", str(tmp_path / "advice")]
    assert main(["diagnose", models[0], *given]) == 0
    advice = json.loads((tmp_path / "advice" / "diagnosis.json").read_text())
    assert any("Over the 8 heads of block 6" in finding["evidence"] for finding in advice)
