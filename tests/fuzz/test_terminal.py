"""Hostile files through the command line: an exit code, a few plain lines, and no way to the terminal."""

import io
import json
import os
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimlet.cli import main
from mimlet.untrusted import MAX_DEPTH, parse_json, printable
from tests.data.images import encoded, picture
from tests.fuzz.fuzz import fuzzed, watched
from tests.fuzz.test_archives import HOSTILE, PHOTO, tar, zipped
from tests.fuzz.test_parquet import parquet
from tests.fuzz.test_weights import FILES, HUGE, Touch, torch_bytes
from tests.report.made import full_run
from tests.tiny import pretrain_arguments

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\u202e\x9b1m"


def plain(text: str) -> None:
    """Nothing in it but letters and line breaks: a terminal only shows it."""
    odd = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")} - {"\n"}
    assert not odd, odd


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], allowed: Path) -> str:
    """What the command says; it ends with code 2."""
    capsys.readouterr()
    with watched(allowed):
        code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in err
    plain(out)
    plain(err)
    lines = err[err.rindex(f"mimlet {arguments[0]}: ") :].splitlines()
    assert 0 < len(lines) <= 5
    assert max(map(len, lines)) < 1100
    return err


def strange_table() -> bytes:
    import pyarrow as pa

    return parquet(pa.table({ESCAPES: [1], "\n" * 50: [2]}))


ENTRY = b"PK\x01\x02\x14\x03\x14\0"
DATA: dict[str, bytes] = {
    "noise.tar": b"no archive",
    "noise.zip": b"PK\x03\x04no archive",
    "cut.tar": tar(("a/1.jpg", PHOTO))[:700],
    "noise.parquet": b"PAR1 no table PAR1",
    "columns.parquet": strange_table(),
    "list.txt": f"{ESCAPES}\n".encode() * 9,
    "empty.txt": b"",
    "escapes.tar": tar((f"{ESCAPES}.txt", b"x"), (f"x.{ESCAPES}", b"x")),
    "encrypted.zip": zipped((f"{ESCAPES}.jpg", PHOTO)).replace(ENTRY + b"\0\0", ENTRY + b"\1\0"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(DATA[name])
    refused(pretrain_arguments(tmp_path / name, tmp_path / "run"), capsys, tmp_path)


def test_classes_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("x/1.jpg", PHOTO), ("y/1.jpg", PHOTO)))
    (tmp_path / "b.tar").write_bytes(tar(("\x1b[31m\n\n\n\n\n/1.jpg", PHOTO), ("y/1.jpg", PHOTO)))
    arguments = ["finetune", "--recipe", "classify_micro32", "--data", str(tmp_path / "a.tar")]
    refused([*arguments, "--eval", str(tmp_path / "b.tar"), "--out", str(tmp_path / "run")], capsys, tmp_path)


@pytest.mark.parametrize("name", [*HUGE, "pickle", "noise"])
def test_weights(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = torch_bytes({ESCAPES: Touch(tmp_path / "canary")})
    suffix, data = HUGE.get(name, (".pth", evil if name == "pickle" else b"noise" * 99))
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    (tmp_path / "photos").mkdir()
    for k in range(8):
        (tmp_path / "photos" / f"{k}.jpg").write_bytes(encoded(picture(k)))
    arguments = pretrain_arguments(tmp_path / "photos", tmp_path / "run")
    refused([*arguments, "--encoder", str(path)], capsys, tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        json.dumps({ESCAPES: {ESCAPES: ESCAPES}}),
        json.dumps({"method": {"name": ESCAPES}, "schedule": {ESCAPES: 1}}),
        json.dumps({"method": {"name": "mae"}, **{f"\n{i}": "x" * 10**5 for i in range(50)}}),
        json.dumps({"method": {"name": "mae"}, "encoder": {"name": "\ud800"}}),
    ],
)
def test_settings(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    recipe = ["pretrain", "--recipe", str(tmp_path / "config.json"), "--data", str(tmp_path)]
    refused(recipe, capsys, tmp_path)
    refused(["report", str(tmp_path)], capsys, tmp_path)
    main(["recipes", str(tmp_path / "config.json")])
    for each in capsys.readouterr():
        plain(each)


@pytest.mark.parametrize("name", ["metrics.jsonl", "robustness.json", "analysis/analysis.json", "environment.json"])
def test_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = full_run(tmp_path / "run")
    (run / name).write_text(json.dumps([ESCAPES]) + "\n")
    refused(["report", str(run)], capsys, tmp_path)


def test_hostile_names_in_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of images and of classes, some of which cannot be read."""
    members = [(f"{ESCAPES}{name}/{k}.jpg", PHOTO if k else b"broken") for name in ("[/b]", "$x") for k in range(4)]
    (tmp_path / "photos.tar").write_bytes(tar(*members, *((name, PHOTO) for name in HOSTILE[:6]), form=2))
    out = tmp_path / "run"
    assert main(pretrain_arguments(tmp_path / "photos.tar", out, "--epochs", "1", "data.max_unreadable=1")) == 0
    for text in (*capsys.readouterr(), (out / "unreadable.txt").read_text().replace("\t", "")):
        plain(text)
    assert sorted(os.listdir(tmp_path)) == ["photos.tar", "run"]


# ---------------------------------------------------------------- the parts


@fuzzed(100)
@given(st.text() | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Lu"])), st.booleans())
def test_printable_text(text: str, lines: bool) -> None:
    shown = printable(text, lines=lines)
    plain(shown.replace("\t", ""))
    assert lines or shown.isprintable()
    assert printable(shown, lines=lines) == shown
    assert not text.isprintable() or shown == text


@pytest.mark.parametrize("depth", [1, MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1, 10**5])
def test_depth_of_json(depth: int) -> None:
    text = "[" * depth + "]" * depth
    if depth <= MAX_DEPTH:
        assert parse_json(text) is not None
    else:
        with pytest.raises(ValueError, match="levels deep"):
            parse_json(text)


def test_files_of_tests_are_what_they_say() -> None:
    assert zipfile.is_zipfile(io.BytesIO(FILES["vit.pth"]))
