"""What are the leading blocks of a pre-trained encoder worth? MAE-lite (Wang et al. 2023), Fig. 4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mimlet.config import Config, changed_settings
from mimlet.errors import ConfigError, RunError
from mimlet.methods.settings import ClassifySettings
from mimlet.models.build import build_encoder
from mimlet.models.weights import ENCODER_FILE, fill_encoder, open_checkpoint
from mimlet.run import read_run


def leading_blocks(config: Config, kept: Sequence[int], folder: str | Path, *, command: str = "") -> dict[int, float]:
    """Fine-tunes `config.encoder.weights` with only the first k blocks kept, for each k of `kept`, and returns the
    top-1 in percent on `data.eval` after each training.

    The other blocks start as a classifier's do. The paper does not say what becomes of the embeddings: here patch,
    position and class embeddings are kept with every k above 0, and k = 0 is training from scratch. Seed and recipe are
    the same for all. Runs are `folder`/kept_K; finished ones are not repeated, interrupted ones go on.

    Raises `ConfigError`, `WeightsError` or `RunError` before the first training where a k, the recipe, the weights or a
    run that is there do not fit.
    """
    _check(config, kept)
    points = {blocks: _point(config, blocks, Path(folder) / f"kept_{blocks}") for blocks in kept}
    for point in points.values():
        _check_run(point)
    # Here, because the functions behind the verbs know analyses.
    from mimlet.api import train

    top1 = {}
    for blocks, point in points.items():
        out = Path(str(point.run.out))
        if not (out / ENCODER_FILE).is_file():
            train(point, resume=True, command=command)
        top1[blocks] = float(read_run(out).lines("eval")[-1]["top1"])
    return top1


def _check(config: Config, kept: Sequence[int]) -> None:
    settings, encoder = config.method, config.encoder
    if not isinstance(settings, ClassifySettings):
        raise ConfigError(
            f"leading blocks are judged by fine-tuning, and the method of this recipe is {settings.name}; "
            "take one of the method classify"
        )
    if not config.data.eval:
        raise ConfigError("leading blocks are judged on labelled images, and data.eval is empty; give --eval")
    if not encoder.weights:
        raise ConfigError("encoder.weights is not set: give the encoder whose leading blocks are kept")
    if encoder.weights.startswith("transformers:"):
        raise ConfigError(
            f"{encoder.weights} is a model of another library, whose blocks mimlet does not train; give a run folder, "
            "a weights file, or timm:NAME"
        )
    if encoder.keep_blocks is not None:
        raise ConfigError(
            f"encoder.keep_blocks is {encoder.keep_blocks}, and leading blocks set it themselves; leave it out"
        )
    depth = encoder.blocks
    wrong = [blocks for blocks in kept if not 0 <= blocks <= depth]
    if wrong or not kept or len(set(kept)) < len(kept):
        raise ConfigError(
            f"expected different numbers of leading blocks to keep, from 0 to the {depth} that the encoder has; got "
            f"{', '.join(map(str, kept)) or 'none'}"
        )
    distill = settings.distill
    token = distill.kind != "none" and distill.token == "distillation"
    fill_encoder(build_encoder(encoder, token), open_checkpoint(encoder.weights), max(kept))


def _point(config: Config, blocks: int, out: Path) -> Config:
    encoder = config.encoder.model_copy(update={"keep_blocks": blocks})
    run = config.run.model_copy(update={"out": str(out)})
    return config.model_copy(update={"encoder": encoder, "run": run})


def _check_run(point: Config) -> None:
    """`RunError` if the folder holds a run of other settings."""
    out = Path(str(point.run.out))
    changes = changed_settings(read_run(out).config, point) if (out / "config.json").is_file() else []
    if changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise RunError(
            f"the run in {out} was made with other settings (then -> now):\n{listed}\n"
            "Repeat its settings, or give another folder"
        )
