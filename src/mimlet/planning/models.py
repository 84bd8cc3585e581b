"""Methods built for planning, with weights of zeros in place of files that are not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mimlet.config import Config, load_config, merge, nest
from mimlet.data.batch import Batch
from mimlet.data.dataset import ImageDataset
from mimlet.data.source import Source
from mimlet.errors import UserError
from mimlet.export.timm import export_classifier, export_encoder
from mimlet.methods.base import Method
from mimlet.methods.mae import MAE
from mimlet.methods.settings import METHODS
from mimlet.models.tokenizer import DallE, DiscreteVAE
from mimlet.planning.request import StandIn
from mimlet.tasks.classify import Classify

LARGER = 1.15
"""Random images are so much larger than what is cut out of them."""


def build(config: Config, stand_ins: Sequence[StandIn], classes: int) -> Method:
    """The method, on the CPU. Stand-ins are written to files, so that they go the way that files go."""
    with TemporaryDirectory() as folder:
        values = config.model_dump(mode="json")
        for each in stand_ins:
            path = Path(folder) / each.setting
            with _Undrawn():
                _write(each, path, config, classes)
            merge(values, nest(each.setting, str(path)))
        return METHODS[config.method.name].load().build(load_config(values), classes)


def _write(stand_in: StandIn, path: Path, config: Config, classes: int) -> None:
    """A folder as a run of such a model leaves it."""
    mean, std = config.data.augment.mean, config.data.augment.std
    if not stand_in.recipe:
        path.mkdir()
        save_file(DallE().state_dict(), path / "encoder.safetensors")
        return
    settings = load_config(stand_in.recipe)
    method = METHODS[settings.method.name].load().build(settings, classes)
    if isinstance(method, Classify):
        export_classifier(path, method, classes=[str(i) for i in range(classes)], mean=mean, std=std)
    elif isinstance(method, MAE):
        export_encoder(path, method.encoder, mean=mean, std=std, decoder=method.decoder)
    else:
        assert isinstance(method.encoder, DiscreteVAE)
        method.encoder.save(path, {})


class _Undrawn(TorchFunctionMode):
    """Initialises with zeros: drawing 300 million random numbers takes longer than a plan may."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every function of torch passes here."""
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


class Noise(Source):
    """So many random images of one size, in classes."""

    def __init__(self, count: int, side: int, classes: int) -> None:
        self.classes = [str(i) for i in range(classes)]
        self.labels: NDArray[np.int64] = np.arange(count) % max(1, classes) if classes else np.full(count, -1)
        self.side = side

    def name(self, i: int) -> str:
        """Its number."""
        return str(i)

    def read(self, i: int) -> Image.Image:
        """Noise, the same each time."""
        pixels = np.random.default_rng(i).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def describe(self) -> str:
        """What it is."""
        return f"{len(self)} random images"


def random_batch(method: Method, config: Config, classes: int, images: int, distinct: int) -> Batch:
    """A batch of `images` as the loader would make it, of `distinct` random images over and over."""
    size = config.encoder.image_size
    labels = classes if METHODS[config.method.name].labels else 0
    dataset = ImageDataset(
        Noise(distinct, round(LARGER * size), labels),
        method.transform(config.data.augment, size),
        method.masks(),
        seed=config.seed,
    )
    samples = [dataset[0, i] for i in range(distinct)]
    batch = dataset.collate([samples[i % distinct] for i in range(images)])
    if isinstance(batch, UserError):
        raise batch
    return batch
