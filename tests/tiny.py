"""Trainings through the command line that take a second: ViTs of two blocks on images of 16 px, on the CPU."""

from pathlib import Path

from mimlet.cli import main

ENCODER = (
    "encoder.name=vit_nano",
    "encoder.image_size=16",
    "encoder.dim=24",
    "encoder.depth=2",
    "encoder.heads=3",
)
DECODER = ("method.decoder.dim=12", "method.decoder.heads=3")
SPEED = ("speed.accelerator=cpu", "speed.precision=32", "run.tensorboard=false", "run.report=false")


def pretrain_arguments(data: Path | str, out: Path, *more: str) -> list[str]:
    """MAE for three steps of 8 images, unless `more` says otherwise."""
    given = ["--recipe", "mae_micro32", "--data", str(data), "--out", str(out), "--batch", "8", "--workers", "0"]
    return ["pretrain", *given, *([] if "--epochs" in more else ["--steps", "3"]), *ENCODER, *DECODER, *SPEED, *more]


def finetune_arguments(data: Path | str, out: Path, *more: str) -> list[str]:
    """A classifier for three steps of 8 images, judged on its training images, unless `more` says otherwise."""
    given = ["--recipe", "classify_micro32", "--data", str(data), "--eval", str(data), "--out", str(out)]
    return ["finetune", *given, "--batch", "8", "--workers", "0", "--steps", "3", *ENCODER, *SPEED, *more]


def pretrain(data: Path | str, out: Path, *more: str) -> Path:
    """The folder of a finished run."""
    assert main(pretrain_arguments(data, out, *more)) == 0
    return out


def finetune(data: Path | str, out: Path, *more: str) -> Path:
    """The folder of a finished run."""
    assert main(finetune_arguments(data, out, *more)) == 0
    return out
