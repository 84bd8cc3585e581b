"""What users give by mistake, through the command line: an answer in plain words and exit code 2, or training goes
on.
"""

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mimlet.cli import main
from tests.data.images import encoded, make_folder, picture, png
from tests.tiny import finetune_arguments, pretrain, pretrain_arguments

Answer = Callable[..., str]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images."""
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Runs a command that has to fail with code 2; returns what it says."""

    def run(arguments: list[str], code: int = 2) -> str:
        capsys.readouterr()
        assert main(arguments) == code
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    return run


def folder_of(root: Path, count: int, broken: dict[str, bytes]) -> Path:
    """`count` good photos and the broken files in one folder."""
    root.mkdir()
    for k in range(count):
        (root / f"{k}.jpg").write_bytes(encoded(picture(k)))
    for name, data in broken.items():
        (root / name).write_bytes(data)
    return root


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(1), exif=exif)


def palette_with_transparency() -> bytes:
    return encoded(picture(2).quantize(8), "PNG", transparency=3)


def animated() -> bytes:
    return encoded(picture(3), "GIF", save_all=True, append_images=[picture(4), picture(5)])


def test_odd_images_train_and_unreadable_ones_are_listed(tmp_path: Path, answer: Answer) -> None:
    """One epoch over images of every kind; the broken ones are replaced and named with the reason."""
    odd = {
        "cmyk.jpg": encoded(picture(0).convert("CMYK")),
        "16bit.png": png(20, 10, 16, 0, (b"\0" + bytes(40)) * 10),
        "palette.png": palette_with_transparency(),
        "animated.gif": animated(),
        "rotated.jpg": exif_rotated(),
        "row.png": encoded(picture(6, (40, 1)), "PNG"),
    }
    broken = {
        "text.jpg": b"not an image",
        "empty.jpg": b"",
        "truncated.jpg": encoded(picture(7, (200, 100)))[:2000],
        "huge.png": png(20_000, 20_000, 8, 0, b""),
    }
    data = folder_of(tmp_path / "photos", 6, {**odd, **broken, "notes.txt": b"no image", "movie.mp4": b"no image"})
    out = pretrain(data, tmp_path / "run", "--epochs", "1", "schedule.warmup_epochs=0", "data.max_unreadable=0.5")
    listed = dict(line.split("\t") for line in (out / "unreadable.txt").read_text().splitlines())
    assert listed.pop("text.jpg") == "not an image, or of an unknown format"
    assert listed.pop("empty.jpg") == "the file is empty"
    assert "image file is truncated" in listed.pop("truncated.jpg")
    assert "20,000 x 20,000 = 400,000,000 pixels, more than the limit" in listed.pop("huge.png")
    assert listed == {}
    assert (out / "encoder.safetensors").is_file()


def test_one_broken_file_in_twenty_is_tolerated_and_more_than_allowed_is_not(tmp_path: Path, answer: Answer) -> None:
    broken = {"a.jpg": b"", "b.jpg": encoded(picture(50))[:150]}
    some = folder_of(tmp_path / "some", 38, broken)
    whole_epoch = ("--epochs", "1", "schedule.warmup_epochs=0")
    out = pretrain(some, tmp_path / "run", *whole_epoch)
    assert sorted(line.split("\t")[0] for line in (out / "unreadable.txt").read_text().splitlines()) == sorted(broken)

    many = folder_of(tmp_path / "many", 32, {f"empty{k}.jpg": b"" for k in range(8)})
    text = answer(pretrain_arguments(many, tmp_path / "stopped", *whole_epoch))
    assert "8 of 40 images could not be read, more than data.max_unreadable allows (10%)" in text
    assert "the file is empty; all are listed in" in text
    assert len((tmp_path / "stopped" / "unreadable.txt").read_text().splitlines()) == 8


def data_cases(place: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments and the answer to them, by name."""
    out = place / "run"
    (place / "nothing").mkdir()
    (place / "texts").mkdir()
    (place / "texts" / "notes.txt").touch()
    (place / "photo.jpg").write_bytes(encoded(picture(0)))
    make_folder(place / "single", ("ant",), each=8)
    folder_of(place / "flat", 8, {})
    folder_of(place / "zeros", 0, {f"{k}.jpg": b"" for k in range(8)})
    return {
        "missing folder": (
            pretrain_arguments(place / "flatt", out),
            f"data.path: no such file or folder '{place / 'flatt'}' (did you mean 'flat'?)",
        ),
        "empty folder": (pretrain_arguments(place / "nothing", out), f"no image in {place / 'nothing'}: it is empty"),
        "no image in it": (pretrain_arguments(place / "texts", out), "it has only other files (1 .txt)"),
        "a single photo": (pretrain_arguments(place / "photo.jpg", out), "photo.jpg is a file of an unknown kind"),
        "nothing readable": (
            pretrain_arguments(place / "zeros", out),
            "images in a row cannot be read, the first being",
        ),
        "fewer than a batch": (
            pretrain_arguments(place / "flat", out, "--batch", "9"),
            "8 images do not fill one batch of 9; set schedule.batch to at most 8",
        ),
        "one class": (finetune_arguments(place / "single", out), "only one class (ant)"),
        "no classes": (finetune_arguments(place / "flat", out), "has 8 images but no sub-folders"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing folder",
        "empty folder",
        "no image in it",
        "a single photo",
        "nothing readable",
        "fewer than a batch",
        "one class",
        "no classes",
    ],
)
def test_data_that_cannot_be_used(case: str, tmp_path: Path, answer: Answer) -> None:
    arguments, expected = data_cases(tmp_path)[case]
    assert expected in answer(arguments)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["encoder.image_size=30"], "image_size 30 is not divisible by the patch of 4 px; use 28 or 32"),
        (["method.mask_ratio=0"], "mask ratio 0.0 leaves 16 of 16 units visible; expected a ratio between 0 and 1"),
        (["method.mask_ratio=1"], "mask ratio 1.0 leaves 0 of 16 units visible"),
        (["method.mask_ratio=0.99"], "mask ratio 0.99 leaves 0 of 16 units visible"),
        (["encoder.heads=5"], "width 24 is not divisible by 5 heads"),
        (["speed.accumulate=3"], "schedule.batch 8 cannot be split evenly over 1 processes x 3 pieces"),
        (["speed.precision=16"], "speed.precision=16 needs a GPU"),
        (["--seed", "-1"], "seed: Input should be greater than or equal to 0, got -1"),
    ],
)
def test_settings_that_cannot_work(
    settings: list[str], expected: str, photos: Path, tmp_path: Path, answer: Answer
) -> None:
    assert expected in answer(pretrain_arguments(photos, tmp_path / "run", *settings))


@pytest.fixture(scope="module")
def teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 16 px images in patches of 8: a grid of 2 x 2."""
    return pretrain(photos, tmp_path_factory.mktemp("teacher") / "run", "encoder.patch=8", "method.mask_ratio=0.5")


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.fuse),)


def checkpoint(kind: str, place: Path, run: Path) -> Path:
    """A file or folder that is no good as weights."""
    path = place / f"{kind.replace(' ', '_')}.pth"
    if kind == "pickle bomb":
        torch.save({"model": Bomb(place / "exploded")}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps({"model": Bomb(place / "exploded")}))
    elif kind == "text":
        path.write_text("<html>404 not found</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "half":
        path = path.with_suffix(".safetensors")
        whole = (run / "encoder.safetensors").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "unfinished run":
        path = place / "unfinished"
        path.mkdir()
        (path / "config.json").write_bytes((run / "config.json").read_bytes())
    return path


@pytest.mark.parametrize("option", ["--teacher", "--encoder"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pickle bomb", "holds more than tensors (posix.mkdir), and reading it could run code: refused"),
        ("plain pickle", "bytes) is damaged or not a weights file"),
        ("text", "(26 bytes) is damaged or not a weights file"),
        ("empty", "(0 bytes) is damaged or not a weights file"),
        ("half", "bytes) is damaged or not a weights file"),
        ("unfinished run", "holds no encoder.safetensors; expected the folder of a finished run, or a weights file"),
    ],
)
def test_weights_that_cannot_be_used(
    option: str, kind: str, expected: str, photos: Path, teacher: Path, tmp_path: Path, answer: Answer
) -> None:
    given = str(checkpoint(kind, tmp_path, teacher))
    recipe = ["--recipe", "dmae_micro32"] if option == "--teacher" else []
    text = answer(pretrain_arguments(photos, tmp_path / "run", *recipe, option, given))
    assert expected in text
    assert given in text
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_grid(photos: Path, teacher: Path, tmp_path: Path, answer: Answer) -> None:
    given = ["--recipe", "dmae_micro32", "--teacher", str(teacher), "teacher.grid=target"]
    text = answer(pretrain_arguments(photos, tmp_path / "run", *given))
    assert "sees 2 x 2 patches, the student 4 x 4, and this method hides the same ones from both" in text
    assert "set teacher.grid=input" in text


def test_an_encoder_of_another_shape(photos: Path, teacher: Path, tmp_path: Path, answer: Answer) -> None:
    given = ["--encoder", str(teacher), "encoder.patch=8"]
    text = answer(finetune_arguments(photos, tmp_path / "run", *given, "encoder.heads=6"))
    assert "has head count 3, the encoder 6; they must agree" in text
    text = answer(finetune_arguments(photos, tmp_path / "run", *given, "encoder.depth=3"))
    assert "has 2 blocks, the encoder 3" in text


def refuse(code: int, needle: str) -> Callable[[Path, Path], None]:
    """An `os.replace` that fails for names with `needle`."""
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        if needle in str(target):
            raise OSError(code, os.strerror(code))
        rename(source, target)

    return replace


def test_a_full_disk_keeps_what_was_there_and_the_run_continues(
    photos: Path, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = pretrain_arguments(photos, out, "run.checkpoint_steps=1")
    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", refuse(errno.ENOSPC, "step_00000002.pt"))
        text = answer(arguments, 75)
    assert "cannot write" in text
    assert "No space left on device" in text
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        "step_00000001.pt",
        "step_00000001.pt.sha256",
    ]
    assert main([*arguments, "--resume"]) == 0
    assert (out / "encoder.safetensors").is_file()


def test_a_read_only_place(photos: Path, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def mkdir(self: Path, *arguments: object, **options: object) -> None:
        if self.name == "run":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    text = answer(pretrain_arguments(photos, tmp_path / "run"), 75)
    assert f"cannot make the run folder {tmp_path / 'run'}: Read-only file system; give another --out" in text


def test_two_runs_into_one_folder(photos: Path, teacher: Path, answer: Answer) -> None:
    before = {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
    text = answer(pretrain_arguments(photos, teacher))
    assert f"{teacher} already holds a run; continue it with --resume, or give another --out" in text
    assert {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("verb", ["evaluate", "export", "probe", "report"])
def test_a_file_where_results_should_go(verb: str, photos: Path, teacher: Path, tmp_path: Path, answer: Answer) -> None:
    (tmp_path / "taken").touch()
    images = str(photos)
    arguments = {
        "evaluate": ["--data", images, "--out"],
        "export": ["--to"],
        "probe": ["--kind", "knn", "--data", images, "--eval", images, "--out"],
        "report": ["--out"],
    }
    run = teacher
    if verb == "evaluate":
        run = tmp_path / "labels"
        assert main(finetune_arguments(photos, run)) == 0
    target = tmp_path / "taken" / ("page.html" if verb == "report" else "")
    assert "cannot write" in answer([verb, str(run), *arguments[verb], str(target)])
    assert (tmp_path / "taken").read_bytes() == b""


def test_an_encoder_is_not_a_classifier(photos: Path, teacher: Path, answer: Answer) -> None:
    text = answer(["evaluate", str(teacher), "--data", str(photos)])
    assert "holds an encoder without a classifier; fine-tune it first" in text


def test_unknown_classes_are_refused_in_evaluation(photos: Path, tmp_path: Path, answer: Answer) -> None:
    other = make_folder(tmp_path / "other", ("ant", "bea", "cat"), each=2)
    text = answer(finetune_arguments(photos, tmp_path / "run", f"data.eval=['{other}']"))
    assert "has 1 of 3 classes outside the 3 expected ones: 'bea' (did you mean 'bee'?)" in text


def test_an_encoder_that_has_seen_otherwise_normalised_images(photos: Path, tmp_path: Path, answer: Answer) -> None:
    half = ("data.augment.mean=[0.5,0.5,0.5]", "data.augment.std=[0.5,0.5,0.5]")
    encoder = pretrain(photos, tmp_path / "mae", *half)
    tuned = finetune_arguments(photos, tmp_path / "out", "--encoder", str(encoder))
    said = answer(tuned)
    assert "has seen images normalised with mean [0.5,0.5,0.5] and std [0.5,0.5,0.5], and here they get [0.485," in said
    assert f"set {half[0]} {half[1]}" in said
    assert main([*tuned, *half]) == 0
