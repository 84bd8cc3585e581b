from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mimlet
from mimlet.demo import SIZE, demo, next_free, prepare_images
from mimlet.errors import DataError, RunError


def photos(folder: Path, classes: str, each: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            size = (40 + i, 60, 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_demo_trains_compares_and_exports(tmp_path: Path) -> None:
    page = demo(out=tmp_path / "demo", quick=True)
    html = page.read_text()
    for model in ("no pre-training", "student, MAE", "student, D²-MAE"):
        assert model in html
    assert html.count("Reconstruction") >= 3
    assert "timm.create_model" in html
    encoder = mimlet.load(tmp_path / "demo" / "d2mae")
    assert encoder(torch.zeros(1, 3, SIZE, SIZE)).latent.shape == (1, 65, 64)
    with pytest.raises(RunError, match="not an empty folder"):
        demo(out=tmp_path / "demo", quick=True)


def test_digits_are_split_and_enlarged(tmp_path: Path) -> None:
    assert prepare_images(None, tmp_path, seed=0) == (10, 1258)
    train, test = (sorted((tmp_path / part).rglob("*.png")) for part in ("train", "test"))
    assert (len(train), len(test)) == (1258, 539)
    assert not {path.name for path in train} & {path.name for path in test}
    with Image.open(train[0]) as image:
        assert image.size == (SIZE, SIZE)


def test_own_images_with_and_without_classes(tmp_path: Path) -> None:
    labelled = photos(tmp_path / "photos", "ab")
    assert prepare_images(labelled, tmp_path / "one", seed=0) == (2, 28)
    assert prepare_images(labelled / "a", tmp_path / "two", seed=0) == (0, 20)
    (labelled / "b" / "0.png").write_bytes(b"not an image")
    assert prepare_images(labelled, tmp_path / "three", seed=0) == (2, 39 - round(0.3 * 39))


def test_a_class_with_fewer_images_than_labels(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", "ab")
    for path in sorted((folder / "b").iterdir())[3:]:
        path.unlink()
    page = demo(data=folder, out=tmp_path / "demo", quick=True)
    assert "student, no pre-training" in page.read_text()


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 3 readable images; the demo needs at least 16"):
        demo(data=photos(tmp_path / "photos", "a", each=3), out=tmp_path / "demo")


def test_next_free_folder(tmp_path: Path) -> None:
    assert next_free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert next_free(tmp_path / "demo") == tmp_path / "demo-3"
