"""What is seen while an encoder is pre-trained: it changes nothing, and survives what happens."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mimlet.api import run_pictures
from mimlet.cli import main
from mimlet.config import recipe_paths
from mimlet.methods.mae import MAE
from mimlet.run import read_pictures, read_run
from mimlet.train.checkpoint import read_checked
from tests.data.images import encoded, make_folder, picture
from tests.tiny import finetune_arguments, pretrain, pretrain_arguments

OFTEN = ("--steps", "6", "schedule.eval_epochs=1", "run.log_steps=2")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images: three steps of eight are an epoch."""
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


@pytest.fixture(scope="module")
def test_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other images of these classes, the first of which can be told by a smooth colour."""
    root = tmp_path_factory.mktemp("test") / "all"
    for name, colour in (("ant", "red"), ("bee", "green"), ("cat", "blue")):
        (root / name).mkdir(parents=True)
        for k in range(3):
            (root / name / f"{k}.jpg").write_bytes(encoded(Image.new("RGB", (20 + k, 20), colour)))
    return root


@pytest.fixture(scope="module")
def unwatched(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training without anybody looking."""
    return pretrain(photos, tmp_path_factory.mktemp("unwatched") / "run", *OFTEN, "run.pictures=0")


@pytest.fixture(scope="module")
def watched(photos: Path, test_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged by its neighbours on other images, looked at in four moments."""
    run = tmp_path_factory.mktemp("watched") / "run"
    given = ("--labelled", str(test_photos), "--eval", str(photos), "run.pictures=4", "run.report=true")
    return pretrain(photos, run, *OFTEN, *given)


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.glob("*.safetensors"))}


def judged(run: Path) -> list[tuple[object, ...]]:
    return [(line["step"], *list(line.items())[4:]) for line in read_run(run).lines("eval")]


def test_watching_changes_nothing(watched: Path, unwatched: Path) -> None:
    assert weights(watched) == weights(unwatched)
    assert len(weights(watched)) == 2
    circumstances = {"time", "images_per_second", "data_wait", "memory_mb"}
    ours, theirs = (
        [{name: v for name, v in line.items() if name not in circumstances} for line in read_run(run).lines("train")]
        for run in (watched, unwatched)
    )
    assert ours == theirs
    assert not (unwatched / "pictures").exists()
    assert (unwatched / "reconstruction.png").read_bytes() == (watched / "reconstruction.png").read_bytes()


def test_the_curve_begins_before_training_and_ends_at_what_probe_says(
    watched: Path, photos: Path, test_photos: Path, tmp_path: Path
) -> None:
    assert [step for step, *_ in judged(watched)] == [0, 3, 6]
    assert all([name for name, _ in values] == ["knn_top1"] for _, *values in judged(watched)), "three classes"
    given = ["--kind", "knn", "--data", str(test_photos), "--eval", str(photos), "--out", str(tmp_path)]
    assert main(["probe", str(watched), *given]) == 0
    (row,) = csv.DictReader((tmp_path / "probe_knn.csv").read_text().splitlines())
    assert judged(watched)[-1] == (6, ("knn_top1", float(row["top1"])))
    assert (row["train"], row["test"]) == ("9", "24"), "fewer images than the 20 neighbours"
    scores = [float(value) for _, (_, value) in judged(watched)]
    best = read_checked(watched / "checkpoints" / "best.pt")
    assert best["step"] == (0, 3, 6)[scores.index(max(scores))]


def test_a_start_is_judged_as_it_was_loaded(watched: Path, photos: Path, test_photos: Path, tmp_path: Path) -> None:
    given = ("--labelled", str(test_photos), "--eval", str(photos), "--encoder", str(watched))
    run = pretrain(photos, tmp_path / "run", "--steps", "1", "schedule.warmup=0", *given)
    assert judged(run)[0] == (0, *judged(watched)[-1][1:])


def test_a_fifth_is_held_out_and_judged_by_a_probe(
    photos: Path, unwatched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--labelled", str(make_folder(tmp_path / "many", tuple("abcdefg"), each=6)), "data.judge=probe")
    run = pretrain(photos, tmp_path / "run", *OFTEN, *given, "--seed", "0")
    said = capsys.readouterr().err
    assert "encoder judged by logistic regression on 42 images in" in said
    assert "(7 classes), on 7 of them held out" in said
    assert [[name for name, _ in values] for _, *values in judged(run)] == 3 * [["probe_top1", "probe_top5"]]
    assert all(
        float(value) * 7 / 100 == pytest.approx(round(float(value) * 7 / 100)) for _, (_, value), _ in judged(run)
    )
    last = dict(read_run(run).lines("eval")[-1])
    assert "done after 6 steps, " in said
    assert (
        f" loss {read_run(run).lines('train')[-1]['reconstruction']:.4g}, probe_top1 {last['probe_top1']:.4g}, " in said
    )
    assert weights(run) == weights(unwatched)


def test_labelled_images_that_cannot_be_read_are_left_out(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = make_folder(tmp_path / "labelled", each=6)
    for name in ("ant/0.jpg", "bee/3.jpg"):
        (labelled / name).write_bytes(b"")
    pretrain(photos, tmp_path / "run", *OFTEN, "--labelled", str(labelled))
    assert capsys.readouterr().err.count("2 of the labelled images could not be read, left out") == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "data.labelled: no such file or folder"),
        ("flat", "has 2 images but no sub-folders"),
        ("one class", "only one class (ant)"),
        ("one each", "(2 classes) has one image per class, so none can be held out to judge on; give more images per"),
        ("unreadable", "no labelled images: none of the images could be read"),
        ("other classes", "has 1 of 3 classes outside the 2 expected ones: 'cat'"),
    ],
)
def test_labelled_images_that_are_no_good(
    kind: str, expected: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled, more = tmp_path / "labelled", ["data.judge=probe"]
    if kind == "flat":
        labelled.mkdir()
        for k in range(2):
            (labelled / f"{k}.jpg").write_bytes(encoded(picture(k)))
    elif kind != "missing":
        make_folder(labelled, ("ant",) if kind == "one class" else ("ant", "bee"), each=1 if kind == "one each" else 4)
    if kind == "unreadable":
        for path in labelled.rglob("*.jpg"):
            path.write_bytes(b"")
    if kind == "other classes":
        more += ["--eval", str(photos)]
    assert main(pretrain_arguments(photos, tmp_path / "run", "--labelled", str(labelled), *more)) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said


def test_a_classifier_is_not_judged_by_them(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(finetune_arguments(photos, tmp_path / "run", f"data.labelled=['{photos}']")) == 2
    assert "data.labelled: method 'classify' learns from the labels of data.path" in capsys.readouterr().err


def test_pictures_become_a_film(watched: Path, unwatched: Path) -> None:
    rows = read_pictures(watched)
    assert list(rows) == ["original", "visible", "step 0", "step 2", "step 4", "step 6"]
    assert len(set(rows.values())) == 6
    shown = {name: Image.open(io.BytesIO(png)) for name, png in rows.items()}
    assert {image.size for image in shown.values()} == {(8 * 16, 16)}
    mean = tuple(round(255 * value) for value in (0.485, 0.456, 0.406))
    colours = shown["visible"].getcolors(8 * 16 * 16)
    assert colours is not None
    assert (8 * 12 * 16, mean) in colours, "12 of 16 patches of 4 x 4 pixels are hidden"
    for patch in range(8 * 16):
        box = (patch % 32 * 4, patch // 32 * 4, patch % 32 * 4 + 4, patch // 32 * 4 + 4)
        hidden = shown["visible"].crop(box).getcolors() == [(16, mean)]
        for name in rows.keys() - {"original", "visible"}:
            assert (shown[name].crop(box).tobytes() == shown["original"].crop(box).tobytes()) is not hidden
    (film,) = run_pictures(watched)
    (end,) = run_pictures(watched, "mine: ")
    assert end.title == "mine: Reconstruction"
    assert film.title == "Reconstruction as training goes"
    assert film.alt.endswith(": original, visible, reconstruction from step 0 to step 6")
    assert film.size == (film.size[0], 6 * (112 + 4) - 4)
    assert film.title in (watched / "report.html").read_text()
    (grid,) = run_pictures(unwatched)
    assert grid.title == "Reconstruction"
    assert grid.caption == film.caption == MAE.picture_caption


def test_a_method_that_shows_nothing_leaves_no_pictures(photos: Path, watched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = pretrain_arguments(photos, run, "--recipe", "tinymim_micro32", "--teacher", str(watched))
    given += ["method.relations.teacher_layer=0"]
    assert main([argument for argument in given if not argument.startswith("method.decoder")]) == 0
    assert (run / "encoder.safetensors").is_file()
    assert not (run / "pictures").exists()


def stop_after(step: int, number: int) -> Callable[..., object]:
    """`MAE.forward` with a signal in a step."""
    forward, count = MAE.forward, 0

    def patched(self: MAE, *given: object) -> object:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), number)
        return forward(self, *given)  # type: ignore[arg-type]

    return patched


@pytest.mark.parametrize("at", [2, 3])
def test_an_interrupted_run_ends_with_the_same_curve_and_film(
    at: int,
    watched: Path,
    photos: Path,
    test_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped at a moment of looking or at one of judging."""
    given = ("--labelled", str(test_photos), "--eval", str(photos), "run.pictures=4")
    command = pretrain_arguments(photos, tmp_path / "run", *OFTEN, *given)
    with monkeypatch.context() as patch:
        patch.setattr(MAE, "forward", stop_after(at, 15))
        assert main(command) == 143
    assert main([*command, "--resume"]) == 0
    assert weights(tmp_path / "run") == weights(watched)
    assert judged(tmp_path / "run") == judged(watched)
    assert read_pictures(tmp_path / "run") == read_pictures(watched)


def test_a_longer_training_goes_on_with_its_film(photos: Path, tmp_path: Path) -> None:
    command = pretrain_arguments(photos, tmp_path / "run", "run.pictures=2")
    assert main(command) == 0
    assert main([*command, "--steps", "5", "--resume", "--allow-changes", "run.pictures=3"]) == 0
    assert list(read_pictures(tmp_path / "run"))[2:] == ["step 0", "step 3", "step 5"]
    assert main([*command, "--steps", "6", "--seed", "1", "--resume", "--allow-changes"]) == 0
    assert list(read_pictures(tmp_path / "run"))[2:] == ["step 6"], "other masks"


def test_trainings_side_by_side_have_curves_and_films_of_their_own(
    photos: Path, test_photos: Path, tmp_path: Path
) -> None:
    images = ["--data", str(photos), "--labelled", str(test_photos), "--eval", str(photos), "--workers", "0", "--smoke"]
    settings = ["speed.accelerator=cpu", "run.report=false", "run.pictures=2"]
    alone = ["pretrain", "--recipe", "mae_micro32", *images, *settings, "--out", str(tmp_path / "alone")]
    other = tmp_path / "other.toml"
    other.write_text(recipe_paths()["mae_micro32"].read_text())
    both = ["compare", "mae_micro32", str(other), *images, *settings, "other:method.mask_ratio=0.5"]
    assert main(alone) == 0
    assert main([*both, "--out", str(tmp_path / "both")]) == 0
    first, second = tmp_path / "both" / "mae_micro32", tmp_path / "both" / "other"
    assert judged(first) == judged(tmp_path / "alone")
    assert read_pictures(first) == read_pictures(tmp_path / "alone")
    assert list(read_pictures(second)) == list(read_pictures(first))
    assert read_pictures(second)["visible"] != read_pictures(first)["visible"]


@pytest.mark.parametrize("name", ["hiera_micro", "itpn_micro"])
def test_hierarchical_encoders_are_watched(name: str, photos: Path, test_photos: Path, tmp_path: Path) -> None:
    """Judged by their last block, with pictures of what their decoders make of the images."""
    encoder = (f"encoder.name={name}", "encoder.depth=0", "encoder.heads=0", "encoder.dim=32")
    given = ("--labelled", str(test_photos), "--eval", str(photos), "run.pictures=2", "run.report=true")
    decoder = ("method.decoder.dim=16", "method.decoder.heads=2")
    run = pretrain(photos, tmp_path / "run", *encoder, *decoder, *given, "schedule.eval_epochs=1")
    assert [step for step, *_ in judged(run)] == [0, 3]
    args = ["--kind", "knn", "--data", str(test_photos), "--eval", str(photos), "--out", str(tmp_path)]
    assert main(["probe", str(run), *args]) == 0
    (row,) = csv.DictReader((tmp_path / "probe_knn.csv").read_text().splitlines())
    assert judged(run)[-1] == (3, ("knn_top1", float(row["top1"])))
    pictures = read_pictures(run)
    assert list(pictures) == ["original", "visible", "step 0", "step 3"]
    assert pictures["step 0"] != pictures["step 3"]
    assert "reconstruction" in (run / "report.html").read_text()
