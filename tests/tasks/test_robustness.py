import csv
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mimlet
from mimlet.cli import main
from mimlet.data.augment import evaluation_transform
from mimlet.data.batch import Batch
from mimlet.data.source import open_source
from mimlet.errors import ConfigError, DataError
from mimlet.run import read_run
from mimlet.tasks.metrics import Scores
from mimlet.tasks.robustness import PLACES, Robustness, ShiftedScores, judge_views, open_shifted
from mimlet.tasks.shifts import ALEXNET_ERRORS, Shifts, parse_shifts
from tests.data.images import encoded, make_folder, picture
from tests.tiny import finetune

Answer = Callable[..., str]

WNIDS = [f"n{number:08d}" for number in range(1000)]
BLACK, WHITE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
NUMBERS = [str(number) for number in range(1000)]


def listed(path: Path, classes: list[str]) -> Path:
    """A list file with one image per class, all of them the same."""
    (path.parent / "image.jpg").write_bytes(encoded(picture(0, (16, 16))))
    path.write_text("".join(f"image.jpg\t{name}\n" for name in classes))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images."""
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


@pytest.fixture(scope="module")
def classifier(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three classes that names no images to judge on, with a page."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return finetune(photos, folder, "data.eval=[]", "run.report=true")


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 1000 classes called as those of ImageNet are, with one image each; it names none to judge on."""
    folder = tmp_path_factory.mktemp("thousand")
    return finetune(listed(folder / "train.txt", WNIDS), folder / "run", "data.eval=[]")


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Evaluates a run, which has to fail with code 2; returns what it says."""

    def run(run: Path, *arguments: str) -> str:
        capsys.readouterr()
        assert main(["evaluate", str(run), *arguments]) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    return run


def test_what_is_asked_for() -> None:
    found = parse_shifts(["imagenet-a=/data/a", "night=b=c.tar", "corruptions=fog,contrast", "corruptions=fog"])
    assert found == Shifts({"imagenet-a": "/data/a", "night": "b=c.tar"}, ("fog", "contrast"))
    assert parse_shifts(["corruptions"]).corruptions == tuple(ALEXNET_ERRORS)
    assert parse_shifts([]) == Shifts({}, ())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["corruptions=fogg"], r"no corruption is called 'fogg' \(did you mean 'fog'\?\); there are gaussian_noise, "),
        (["corruptions=frost"], "no corruption is called 'frost'"),
        (["corruption"], r"'corruption' \(did you mean 'corruptions'\?\): expected NAME=PATH"),
        (
            ["photos/night"],
            "expected NAME=PATH, NAME being imagenet-a, imagenet-r, imagenet-sketch, imagenet-v2 or any",
        ),
        (["night="], "expected NAME=PATH"),
        (["=photos"], "expected NAME=PATH"),
        (["night=a", "night=b"], "two sets are called 'night'"),
    ],
)
def test_what_cannot_be_asked_for(given: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_shifts(given)


def test_the_classes_of_imagenet_a_and_r_are_timms() -> None:
    for letter in "ar":
        known = files("timm.data").joinpath(f"_info/imagenet_{letter}_indices.txt").read_text().split()
        assert PLACES[f"imagenet-{letter}"] == [int(place) for place in known]
    assert len(set(PLACES["imagenet-a"]) & set(PLACES["imagenet-r"])) == 86


def test_sets_of_two_hundred_classes_are_found_by_order(tmp_path: Path) -> None:
    folders = WNIDS[:200]
    for name in ("imagenet-a", "imagenet-r"):
        found = open_shifted(name, str(listed(tmp_path / "set.txt", folders[::-1])), NUMBERS)
        assert found.kept.tolist() == PLACES[name]
        assert found.source.labels.tolist() == list(range(200))[::-1]
        assert found.source.classes == [NUMBERS[place] for place in PLACES[name]]


def test_sets_of_two_hundred_classes_are_found_by_name_where_the_classifier_has_them(tmp_path: Path) -> None:
    names = WNIDS[::-1]
    folders = [WNIDS[place] for place in PLACES["imagenet-a"]]
    found = open_shifted("imagenet-a", str(listed(tmp_path / "set.txt", folders)), names)
    assert found.kept.tolist() == sorted(999 - place for place in PLACES["imagenet-a"])
    assert [found.source.classes[label] for label in found.source.labels] == folders


def test_sketches_have_all_classes_and_v2_is_named_by_number(tmp_path: Path) -> None:
    sketch = open_shifted("imagenet-sketch", str(listed(tmp_path / "set.txt", WNIDS)), NUMBERS)
    assert sketch.source.labels.tolist() == sketch.kept.tolist() == list(range(1000))
    make_folder(tmp_path / "v2", ("0", "1", "2", "10", "100", "999"), each=1)
    v2 = open_shifted("imagenet-v2", str(tmp_path / "v2"), WNIDS)
    named = {v2.source.name(i): v2.source.label(i) for i in range(6)}
    assert named == {f"{k}/0.jpg": k for k in (0, 1, 2, 10, 100, 999)}
    assert v2.kept.tolist() == list(range(1000))


def test_a_set_of_ones_own_is_judged_among_its_classes(tmp_path: Path) -> None:
    found = open_shifted("night", str(make_folder(tmp_path / "night", ("cat", "ant"), each=1)), ["cat", "bee", "ant"])
    assert found.kept.tolist() == [0, 2]
    assert found.source.classes == ["cat", "ant"]
    assert sorted((found.source.name(i), found.source.label(i)) for i in range(2)) == [
        ("ant/0.jpg", 1),
        ("cat/0.jpg", 0),
    ]
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    assert found.among(lambda images: scores)(torch.zeros(1)).tolist() == [[1, 3]]


def test_views_are_judged_at_once_and_parts_among_their_own_classes() -> None:
    images = torch.tensor([[9, 0, 5, 0], [0, 9, 5, 0], [0, 9, 5, 0], [0, 0, 0, 9]], dtype=torch.uint8)
    worse = images.flip(0)
    labels = torch.tensor([0, 1, 2, 3])
    batches = [
        Batch({"image": shaped(images[rows]), "fog-1": shaped(worse[rows])}, rows, {}, labels[rows])
        for rows in (torch.tensor([0, 1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3]))
    ]
    subsets = {"two": torch.tensor([0, 2])}
    scores, parts, others = judge_views(lambda x: x.flatten(1)[:, :4], batches, "cpu", BLACK, WHITE, 4, subsets, 3)
    assert (scores.images, scores.top1) == (4, 75.0)
    assert (parts["two"].images, parts["two"].top1) == (2, 100.0), "class 2 wins once class 1 is out of the way"
    assert others == {"fog-1": 25.0}
    with pytest.raises(DataError, match="no image could be read"):
        judge_views(nn.Identity(), [], "cpu", BLACK, WHITE, 4, {}, 0)


def shaped(rows: Tensor) -> Tensor:
    """Four scores as an image [3,2,2]."""
    return rows.reshape(-1, 1, 2, 2).expand(-1, 3, 2, 2)


def corrupted(errors: dict[str, float]) -> dict[str, float]:
    """Top-1 by view; severities lie around the mean."""
    return {f"{name}-{s}": 100 - error + (s - 3) for name, error in errors.items() for s in range(1, 6)}


def test_mean_corruption_error() -> None:
    alexnet = Robustness.of(None, [], corrupted(dict(ALEXNET_ERRORS)), True)
    assert alexnet.mce == pytest.approx(100)
    half = {name: error / 2 for name, error in ALEXNET_ERRORS.items()}
    found = Robustness.of(None, [], corrupted(half), True)
    assert found.mce == pytest.approx(50)
    assert found.mean_top1 == pytest.approx(100 - sum(half.values()) / 14)
    assert found.corruptions["fog"] == pytest.approx([100 - half["fog"] + d for d in (-2, -1, 0, 1, 2)])
    assert Robustness.of(None, [], corrupted(half), False).mce is None
    del half["fog"]
    some = Robustness.of(None, [], corrupted(half), True)
    assert some.mce is None
    assert "fog" not in some.corruptions
    assert Robustness.of(None, [], {}, True).mean_top1 is None


def test_clean_images_of_other_classes_say_nothing() -> None:
    scores = Scores(3)
    scores.update(torch.eye(3), torch.tensor([0, 1, 1]))
    assert ShiftedScores.of("x", scores, Scores(3)).clean_top1 is None
    assert ShiftedScores.of("x", scores, scores).clean_top1 == pytest.approx(200 / 3)
    assert ShiftedScores.of("x", scores, None).clean_top1 is None


def by_hand(run: Path, folder: Path, kept: list[int]) -> float:
    """Top-1 among some classes, one image after the other."""
    augment = read_run(run).config.data.augment
    model, transform = mimlet.load(run), evaluation_transform(augment, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.mean, augment.std))
    source = open_source([str(folder)], labelled=True, classes=["ant", "bee", "cat"])
    right = []
    for i in range(len(source)):
        if source.label(i) in kept:
            image = transform(Image.open(folder / source.name(i)))["image"]
            with torch.no_grad():
                scores = model(((image / 255 - mean) / std)[None])[0, kept]
            right.append(kept[int(scores.argmax())] == source.label(i))
    return 100 * sum(right) / len(right)


def test_a_run_is_judged_and_its_page_rewritten(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night = make_folder(tmp_path / "night", ("bee", "cat"), each=5)
    page = classifier / "report.html"
    page.write_text("old")
    arguments = ["--robustness", f"night={night}", "--robustness", "corruptions=fog,contrast"]
    assert main(["evaluate", str(classifier), "--data", str(photos), *arguments]) == 0
    said = capsys.readouterr().out
    assert page.read_text() != "old"

    found = json.loads((classifier / "robustness.json").read_text())
    assert list(found) == ["clean", "sets", "corruptions", "mean_top1", "mce"]
    assert found["clean"] == {"images": 24, "top1": pytest.approx(by_hand(classifier, photos, [0, 1, 2]))}
    (dark,) = found["sets"]
    assert (dark["name"], dark["images"], dark["classes"], dark["top5"]) == ("night", 10, 2, 100)
    assert dark["top1"] == pytest.approx(by_hand(classifier, night, [1, 2]))
    assert dark["clean_top1"] == pytest.approx(by_hand(classifier, photos, [1, 2]))
    assert [len(tops) for tops in found["corruptions"].values()] == [5, 5]
    assert found["mean_top1"] == pytest.approx(sum(map(sum, found["corruptions"].values())) / 10)
    assert found["mce"] is None

    rows = list(csv.DictReader((classifier / "robustness.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["night", *["fog"] * 5, *["contrast"] * 5]
    assert [row["severity"] for row in rows] == ["", *"12345", *"12345"]
    assert float(rows[0]["top1"]) == pytest.approx(dark["top1"], abs=0.005)
    with Image.open(classifier / "robustness.png") as shown:
        assert shown.size[0] > 400
    for text in ("night", "fog", "contrast", "corruptions: mean top-1", "robustness.json"):
        assert text in said

    given = [f"night={night}", "corruptions=fog,contrast"]
    again = mimlet.evaluate(classifier, data=photos, robustness=given, out=str(tmp_path / "again"))
    assert again == {
        "top1": found["clean"]["top1"],
        "night_top1": dark["top1"],
        "corruptions_top1": found["mean_top1"],
    }
    assert json.loads((tmp_path / "again" / "robustness.json").read_text()) == found


def test_a_set_alone_needs_no_clean_images(classifier: Path, photos: Path, tmp_path: Path) -> None:
    scores = mimlet.evaluate(classifier, robustness=f"same={photos}", out=str(tmp_path))
    found = json.loads((tmp_path / "robustness.json").read_text())
    assert found["clean"] is None
    assert found["sets"][0]["clean_top1"] is None
    assert scores == {"same_top1": mimlet.evaluate(classifier, data=photos, out=str(tmp_path))["top1"]}


def test_a_thousand_classes(thousand: Path, tmp_path: Path) -> None:
    """An image that is in every class is right once, if it is judged among the set's classes."""
    folders = [WNIDS[place] for place in PLACES["imagenet-r"]]
    found = mimlet.evaluate(thousand, robustness=f"imagenet-r={listed(tmp_path / 'r.txt', folders)}", out=str(tmp_path))
    assert found == {"imagenet-r_top1": 0.5}
    (item,) = json.loads((tmp_path / "robustness.json").read_text())["sets"]
    assert (item["images"], item["classes"], item["top5"]) == (200, 200, 2.5)


def test_what_a_thousand_classes_cannot_be_judged_on(thousand: Path, tmp_path: Path, answer: Answer) -> None:
    some = listed(tmp_path / "some.txt", WNIDS[:150])
    for name, count in (("imagenet-a", 200), ("imagenet-r", 200), ("imagenet-sketch", 1000)):
        said = answer(thousand, "--robustness", f"{name}={some}")
        assert f"some.txt has 150 class folders, {name} has {count}: which class a folder is follows from its" in said
    said = answer(thousand, "--robustness", f"imagenet-v2={some}")
    assert "the folders of ImageNet-V2 are the numbers of classes, 0 to 999; 'n00000000' is none" in said
    said = answer(thousand, "--robustness", f"imagenet-v2={listed(tmp_path / 'v2.txt', ['7', '1000'])}")
    assert "'1000' is none" in said


def test_what_a_classifier_cannot_be_judged_on(classifier: Path, photos: Path, tmp_path: Path, answer: Answer) -> None:
    others = make_folder(tmp_path / "others", ("dog", "eel"), each=1)
    assert "others has 2 of 2 classes outside the 3 expected ones: 'dog'; expected ant, bee, cat" in answer(
        classifier, "--robustness", f"night={others}"
    )
    single = make_folder(tmp_path / "single", ("bee",), each=1)
    assert "has images of one class only (bee): among one class every answer is right" in answer(
        classifier, "--robustness", f"night={single}"
    )
    assert "this classifier knows 3 classes, not 1000; a set with its own class names is given under another" in answer(
        classifier, "--robustness", f"imagenet-a={photos}"
    )
    assert f"no such file or folder '{tmp_path / 'singel'}' (did you mean 'single'?)" in answer(
        classifier, "--robustness", f"night={tmp_path / 'singel'}"
    )
    assert "no corruption is called 'gausian_noise' (did you mean 'gaussian_noise'?)" in answer(
        classifier, "--data", str(photos), "--robustness", "corruptions=gausian_noise"
    )
    assert "no images to corrupt: give --data" in answer(classifier, "--robustness", "corruptions")
    assert "no images to judge on: give --data" in answer(classifier)
