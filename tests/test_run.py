import errno
import fcntl
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mimlet.api import run_pictures
from mimlet.config import Config, load_config
from mimlet.errors import RunError, TryAgain
from mimlet.run import RunFolder, Shown, read_pictures, read_run, read_shown


def config(**changes: Any) -> Config:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    values = {"method": {"name": "mae"}, "schedule": {"epochs": 2, "batch": 8}, "run": {"tensorboard": False}}
    return load_config(values, overrides)


def test_settings_and_environment_come_back(tmp_path: Path) -> None:
    settings = config(optim__lr=0.125, encoder__depth=3)
    with RunFolder.create(tmp_path / "deep" / "run", settings, command=["mimlet", "pretrain"]) as run:
        assert not run.resumed
    found = read_run(tmp_path / "deep" / "run")
    assert found.config == settings
    assert found.metrics == []
    environment = found.environment
    assert environment["command"] == ["mimlet", "pretrain"]
    assert isinstance(environment["packages"], dict)
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["cores"] == os.cpu_count()


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config()).close()
    code = "import sys, mimlet.run; mimlet.run.read_run(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 0


def test_metrics_come_back_in_order(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        run.log("train", 5, 0.5, 1.25, {"total": 0.75, "lr": 1e-3})
        run.log("eval", 10, 1.0, 2.5, {"top1": 50.0})
        run.log("note", 10, 1.0, 2.5, {"text": "à propos\nof nothing"})
    found = read_run(tmp_path)
    assert found.metrics[0] == {"step": 5, "epoch": 0.5, "kind": "train", "time": 1.25, "total": 0.75, "lr": 1e-3}
    assert [line["top1"] for line in found.lines("eval")] == [50.0]
    assert found.lines("note")[0]["text"] == "à propos\nof nothing"


def test_lines_after_the_resumed_step_are_dropped_and_a_torn_one_too(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        for step in (5, 10, 15):
            run.log("train", step, 0, 0, {"total": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 20, "epo')
    assert len(read_run(tmp_path).metrics) == 3
    with RunFolder.create(tmp_path, config(), resume=True) as run:
        assert run.resumed
        assert [line["step"] for line in run.rewind(10)] == [5, 10]
        run.log("train", 11, 0, 0, {"total": 11.0})
    assert [line["step"] for line in read_run(tmp_path).metrics] == [5, 10, 11]


def test_an_evaluation_at_the_resumed_step_is_made_again(tmp_path: Path) -> None:
    """It came after the checkpoint: what else it was to leave may be missing."""
    with RunFolder.create(tmp_path, config()) as run:
        for step in (0, 5, 10):
            run.log("train", step, 0, 0, {"total": 1.0})
            run.log("eval", step, 0, 0, {"top1": 50.0})
        assert [(line["step"], line["kind"]) for line in run.rewind(5)] == [(0, "train"), (0, "eval"), (5, "train")]


def test_nothing_is_appended_to_half_a_line(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config()).close()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 20, "epo')
    (tmp_path / "unreadable.txt").write_bytes(b"a.jpg\tbroken\nb.jp")
    with RunFolder.create(tmp_path, config(), resume=True) as run:
        run.log("note", 0, 0, 0, {"text": "hello"})
        run.unreadable([("b.jpg", "empty")])
    assert [line["text"] for line in read_run(tmp_path).metrics] == ["hello"]
    assert (tmp_path / "unreadable.txt").read_text() == "a.jpg\tbroken\nb.jpg\tempty\n"


def test_a_folder_that_is_not_the_one_that_was_locked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunFolder.create(folder, config()) as run:
        run.check_place()
        folder.rename(tmp_path / "away")
        with pytest.raises(TryAgain, match="was moved, removed or unmounted"):
            run.log("note", 0, 0, 0, {"text": "lost"})
        assert not folder.exists()
        RunFolder.create(folder, config()).close()
        with pytest.raises(TryAgain):
            run.check_place()


def test_tensorboard_gets_the_numbers_and_forgets_what_is_repeated(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(run__tensorboard="true")
    for start in (0, 2):
        with RunFolder.create(tmp_path, settings, resume=True) as run:
            run.rewind(start)
            for step in range(start + 1, start + 4):
                run.log("train", step, 0, 0, {"total": 10.0 * start + step})
            run.log("note", start, 0, 0, {"text": "hello"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/total"]
    assert [(e.step, e.value) for e in events.Scalars("train/total")] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


FIXED = {"original": png("red"), "visible": png("grey")}


def rows(colour: str) -> dict[str, bytes]:
    return {**FIXED, "reconstruction": png(colour)}


def test_pictures_of_moments_come_back_in_order(tmp_path: Path) -> None:
    assert read_pictures(tmp_path) == {}
    with RunFolder.create(tmp_path, config()) as run:
        for step, colour in ((1200, "blue"), (0, "black"), (99, "green")):
            assert not run.has_picture(step)
            run.picture(step, rows(colour))
            assert run.has_picture(step)
    shown = {"step 0": png("black"), "step 99": png("green"), "step 1,200": png("blue")}
    assert list(read_pictures(tmp_path).items()) == [*FIXED.items(), *shown.items()]
    assert (tmp_path / "pictures" / "00001200.png").read_bytes() == png("blue")


def test_pictures_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    for resumed in (False, True):
        with RunFolder.create(tmp_path, config(), resume=resumed) as run:
            run.rewind(10)
            assert [run.has_picture(step) for step in (0, 10, 11)] == [resumed, resumed, False]
            for step in (0, 10, 11):
                run.picture(step, rows("blue"))


def test_pictures_of_other_images_are_dropped(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        run.picture(0, rows("blue"))
        run.picture(5, rows("blue") | {"visible": png("white")})
    assert list(read_pictures(tmp_path)) == ["original", "visible", "step 5"]


def test_methods_have_rows_of_their_own(tmp_path: Path) -> None:
    shown = {"original": png("red"), "crops": png("white"), "attention": png("blue")}
    with RunFolder.create(tmp_path, config()) as run:
        run.picture(0, rows("green"), "Look.")
        assert read_shown(tmp_path) == Shown(("original", "visible", "reconstruction"), "Look.")
        run.picture(5, shown, "Grey is nothing.")
        run.picture(6, shown, "Grey is nothing.")
    assert read_shown(tmp_path) == Shown(("original", "crops", "attention"), "Grey is nothing.")
    assert list(read_pictures(tmp_path)) == ["original", "crops", "step 5", "step 6"], "what was shown before is gone"


def test_pictures_of_runs_that_do_not_say_what_they_show(tmp_path: Path) -> None:
    for resumed in (False, True):
        with RunFolder.create(tmp_path, config(), resume=resumed) as run:
            run.picture(5 * resumed, rows("blue"))
        (tmp_path / "pictures.json").unlink()
        assert list(read_pictures(tmp_path)) == ["original", "visible", "step 0", "step 5"][: 3 + resumed]
    (film,) = run_pictures(tmp_path)
    assert film.title == "Reconstruction as training goes"
    assert film.caption == "Hidden patches are predicted, visible ones are the original."


def test_tensorboard_gets_the_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunFolder.create(tmp_path, config(run__tensorboard="true")) as run:
        run.rewind(0)
        run.log("eval", 0, 0, 0, {"knn_top1": 1.0})
        run.picture(0, rows("black"))
        run.picture(9, rows("blue"))
        run.image("confusion", 9, png("green"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/knn_top1")] == [0], "what comes before the first step stays"
    assert set(events.Tags()["images"]) == {"original", "visible", "reconstruction", "confusion"}
    shown = [(image.step, image.width, image.height) for image in events.Images("reconstruction")]
    assert shown == [(0, 8, 4), (9, 8, 4)]
    blue = Image.open(io.BytesIO(events.Images("reconstruction")[1].encoded_image_string))
    assert blue.getpixel((3, 3)) == (0, 0, 255)


def test_unreadable_files_are_listed_once_even_over_a_resume(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        run.unreadable([("a.jpg", "cut\nshort"), ("b\t.jpg", "no image"), ("a.jpg", "cut short")])
        run.unreadable([("b\t.jpg", "no image")])
    with RunFolder.create(tmp_path, config(), resume=True) as run:
        run.unreadable([("a.jpg", "cut short"), ("c\udcff.jpg", "empty")])
        run.unreadable([])
    lines = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert lines == ["a.jpg\tcut short", "b .jpg\tno image", "c\\udcff.jpg\tempty"]


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config()).close()
    with pytest.raises(RunError, match=r"already holds a run; continue it with --resume, or give another --out"):
        RunFolder.create(tmp_path, config())


def test_resume_starts_a_run_where_there_is_none(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "new", config(), resume=True) as run:
        assert not run.resumed


def test_changed_settings_are_all_listed_and_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config()).close()
    changed = config(optim__lr=0.5, schedule__epochs=9, run__log_steps=7)
    with pytest.raises(RunError) as error:
        RunFolder.create(tmp_path, changed, resume=True)
    text = str(error.value)
    assert "  optim.lr: 0.00015 -> 0.5\n  schedule.epochs: 2.0 -> 9.0\n" in text
    assert "log_steps" not in text
    assert "--allow-changes" in text
    assert read_run(tmp_path).config == config()
    RunFolder.create(tmp_path, changed, resume=True, allow_changes=True).close()
    assert read_run(tmp_path).config == changed


def test_each_resume_is_remembered(tmp_path: Path) -> None:
    for number in range(3):
        RunFolder.create(tmp_path, config(), resume=True, command=[f"call {number}"]).close()
    environment = read_run(tmp_path).environment
    assert environment["command"] == ["call 2"]
    assert isinstance(environment["previous"], list)
    assert [earlier["command"] for earlier in environment["previous"]] == [["call 0"], ["call 1"]]


def test_a_second_user_is_refused_with_the_firsts_number(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()):
        with pytest.raises(TryAgain, match=rf"in use by process {os.getpid()} on .*; wait until it ends"):
            RunFolder.create(tmp_path, config(), resume=True)
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + (
            "from mimlet.config import load_config\nfrom mimlet.run import RunFolder\n"
            "c = load_config({'method': {'name': 'mae'}, 'schedule': {'epochs': 2}})\n"
            f"RunFolder.create({str(tmp_path)!r}, c, resume=True)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"is in use by process {os.getpid()}" in result.stderr
    RunFolder.create(tmp_path, config(), resume=True).close()


def test_a_forked_loader_does_not_hold_the_lock(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    ready, release = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        os.write(ready[1], b".")
        os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    run.close()
    try:
        with (tmp_path / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.write(release[1], b".")
        os.waitpid(pid, 0)


def test_a_refused_folder_is_unlocked(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config()).close()
    for _ in range(2):
        with pytest.raises(RunError, match="already holds a run"):
            RunFolder.create(tmp_path, config())


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=r"run is a file, not a folder; give another --out"):
        RunFolder.create(tmp_path / "run", config())
    with pytest.raises(RunError, match=r"cannot make the run folder .*Not a directory; give another --out"):
        RunFolder.create(tmp_path / "run" / "below", config())


def refuse(code: int) -> Callable[..., None]:
    def call(*arguments: object, **more: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize(
    ("target", "name", "message"),
    [
        (Path, "mkdir", "cannot make the run folder .*Read-only file system"),
        (Path, "open", "cannot write in the run folder .*Read-only file system"),
        (os, "replace", r"cannot write .*config.json .*Read-only file system"),
    ],
)
def test_a_read_only_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str, message: str
) -> None:
    monkeypatch.setattr(target, name, refuse(errno.EROFS))
    with pytest.raises(RunError, match=message):
        RunFolder.create(tmp_path / "run", config())


def test_a_full_disk_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        monkeypatch.setattr(Path, "open", refuse(errno.ENOSPC))
        with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space left on device"):
            run.log("train", 1, 0, 0, {"total": 1.0})
        with pytest.raises(RunError, match=r"cannot write .*unreadable.txt: No space left on device"):
            run.unreadable([("a", "b")])


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config()).close()
    (tmp_path / "checkpoints").mkdir()
    leftovers = [tmp_path / ".config.json.1.tmp", tmp_path / "checkpoints" / ".step_00000001.pt.1.tmp"]
    for path in leftovers:
        path.touch()
    RunFolder.create(tmp_path, config(), resume=True).close()
    assert not any(path.exists() for path in leftovers)


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "has no config.json"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is not a folder"),
    ):
        with pytest.raises(RunError, match=rf"{re.escape(str(path))} is not a run folder: it {reason}"):
            read_run(path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    RunFolder.create(tmp_path, config()).close()
    (tmp_path / name).write_text("{]\n{}\n")
    with pytest.raises(RunError, match=rf"{name} is damaged"):
        read_run(tmp_path)


def test_config_json_is_a_recipe(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config(optim__lr=0.25)).close()
    assert load_config(tmp_path / "config.json", ["schedule.epochs=7"]).optim.lr == 0.25
    assert json.loads((tmp_path / "config.json").read_text())["method"]["name"] == "mae"
