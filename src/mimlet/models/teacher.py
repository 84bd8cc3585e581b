"""Frozen teachers."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD, PYTHON, nearest
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError, WeightsError
from mimlet.hardware import Accelerator, choose_accelerator, computes_in_bf16
from mimlet.models.build import encoder_of
from mimlet.models.decoders import Decoder, decoder_input, decoder_taps
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.foreign import Foreign, ForeignEncoder, open_teacher
from mimlet.models.lowbit import quantise_
from mimlet.models.shapes import HieraShape, Shape, ViTShape
from mimlet.models.vit import ViT
from mimlet.models.weights import (
    Channels,
    Checkpoint,
    LoadReport,
    Normalisation,
    fill_encoder,
    load_decoder,
    renormalisation,
    shape_of_checkpoint,
    triple,
    unfit,
)
from mimlet.models.zoo import ENCODERS, Size

if TYPE_CHECKING:
    from mimlet.config import Config, TeacherSettings

LOWBIT = ("fp8", "int8")
"""Precisions of `mimlet.models.lowbit`, in which everything but the products of blocks is bf16."""


class Teacher(nn.Module):
    """An encoder, maybe with its decoder, that is only looked at: eval mode, no gradient, own normalisation and type.

    `encoder` is an `Encoder`, a model of timm or transformers (`ForeignEncoder`), or any module with the attributes
    `patch, dim, depth, heads, grid, prefix` (class tokens: 0 or 1) that answers `(images, mask, taps=...)` with
    `Features`; `takes_masks = True` if it can drop the patches that a mask hides. Images arrive normalised as the
    student's (`students`: mean, std) and at the student's size, and are brought to the teacher's `own` normalisation
    and to `size` px. Where the grid of its patches then still differs from `grid`, what it answers is resized. Of
    prefix tokens only the class token is handed on. In bf16 the matrices are stored in bf16 too: no weight is cast in a
    step.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: Decoder | None = None,
        *,
        bf16: bool = False,
        own: Normalisation = (IMAGENET_MEAN, IMAGENET_STD),
        students: Normalisation = (IMAGENET_MEAN, IMAGENET_STD),
        size: int = 0,
        grid: tuple[int, int] | None = None,
        source: str = "the teacher",
    ) -> None:
        super().__init__()
        _check_attributes(encoder, source)
        self.encoder, self.decoder, self.bf16 = encoder, decoder, bf16
        self.patch, self.dim, self.depth, self.heads = (
            int(getattr(encoder, name)) for name in ("patch", "dim", "depth", "heads")
        )
        ours = encoder if isinstance(encoder, Encoder) else None
        self.dims = ours.dims if ours else (self.dim,) * (self.depth + 1)
        self.normed_dims = ours.normed_dims if ours else self.dims
        self.attending = ours.attending if ours else tuple(range(1, self.depth + 1))
        rows, columns = cast(tuple[int, int], encoder.grid)
        self.own_grid = (size // self.patch, size // self.patch) if size else (rows, columns)
        self.grid = grid or self.own_grid
        self.prefix = min(1, int(cast(int, encoder.prefix)))
        self.takes_masks = bool(getattr(encoder, "takes_masks", isinstance(encoder, Encoder)))
        self.size, self.source = size, source
        self.relation_heads: dict[int, int] = {}
        self.pixels: Literal["normalised", "raw"] | None = None
        self.load_report: LoadReport | None = None
        self.memo: dict[tuple[int, int, Taps], tuple[Features, Tensor, Mask | None]] | None = None
        scale, shift = renormalisation(students, own)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.renormalise = own != students
        if bf16:
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)
        self.requires_grad_(False).eval()

    def heads_of(self, block: int) -> int:
        """The number of heads that a block's relations were trained with: TinyMIM's last block has its own."""
        return self.relation_heads.get(block, self.heads_in(block))

    def heads_in(self, block: int) -> int:
        """The number of heads that a block attends with."""
        return self.encoder.heads_of(block) if isinstance(self.encoder, Encoder) else self.heads

    def layout(self, layer: int) -> tuple[tuple[int, int], Tensor]:
        """The tokens of a layer as the student gets them, see `Encoder.layout`."""
        if isinstance(self.encoder, Encoder) and self.encoder.stages:
            return self.encoder.layout(layer)
        return self.grid, torch.arange(math.prod(self.grid))

    def inputs(self, images: Tensor) -> Tensor:
        """The student's images [B,3,h,w] in the teacher's normalisation and size."""
        if self.renormalise:
            images = images * self.scale + self.shift
        if self.size and images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return images

    def outputs(self, images: Tensor) -> Tensor:
        """Images [B,3,h,w] in the teacher's normalisation, such as its decoder predicts, in the student's."""
        return (images - self.shift) / self.scale

    def forward(self, images: Tensor, mask: Mask | None = None, taps: Taps | None = None) -> Features:
        """Like the encoder's, without gradient. Between `Teachers.forget` calls, an equal question about the very same
        tensors is answered once.
        """
        taps = taps or Taps()
        if self.memo is None:
            return self._answer(images, mask, taps)
        question = (id(images), id(None if mask is None else mask.hidden), taps)
        if question not in self.memo:
            # Kept beside the answer: an id belongs to a tensor only while it lives.
            self.memo[question] = (self._answer(images, mask, taps), images, mask)
        return self.memo[question][0]

    @property
    def projection(self) -> nn.Linear | None:
        """The map of final tokens to the space that a CLIP's images share with its texts; None where there is none."""
        found = getattr(self.encoder, "projection", None)
        return found if isinstance(found, nn.Linear) else None

    @torch.no_grad()
    def project(self, tokens: Tensor) -> Tensor:
        """Final tokens [...,D] in the space that a CLIP's images share with its texts."""
        assert self.projection is not None, "this teacher has no projection"
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            projected: Tensor = self.projection(tokens)
        return projected

    def decode(self, latent: Tensor, mask: Mask, mask_token: Tensor | None = None) -> Tensor:
        """Pixels of the hidden patches [B,N-V,p*p*3] by the frozen decoder, from visible tokens [B,P+V,D], through
        which gradients flow. See `Decoder.forward`.
        """
        assert self.decoder is not None, "the teacher was not asked to bring its decoder"
        with torch.autocast(latent.device.type, torch.bfloat16, enabled=self.bf16):
            latent = latent if self.bf16 else latent.float()
            predicted: Tensor = self.decoder(latent, mask, hidden_only=True, mask_token=mask_token)
        return predicted

    @torch.no_grad()
    def _answer(self, images: Tensor, mask: Mask | None, taps: Taps) -> Features:
        encoder_taps = replace(taps, decoded=())
        if taps.decoded:
            encoder_taps |= decoder_taps(cast(Encoder, self.encoder))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features: Features = self.encoder(self.inputs(images), mask, taps=encoder_taps)
            if not isinstance(self.encoder, Encoder):
                self._check_answer(features, len(images), mask, encoder_taps)
            elif taps.decoded:
                assert self.decoder is not None, "the teacher was not asked to bring its decoder"
                assert mask is not None, "decoding needs a mask"
                latent, patches = decoder_input(self.encoder, features), self.encoder.patch_mask(mask)
                decoded = {i: self.decoder.features(latent, patches, i) for i in taps.decoded}
                features = replace(features, decoded=decoded)
        features = features.trimmed(self.prefix)
        return features if features.grid == self.grid else features.resized(self.grid)

    def _check_answer(self, features: object, batch: int, mask: Mask | None, taps: Taps) -> None:
        """Raises where an encoder, such as the user's own, does not answer what it was asked."""
        name = f"{self.source} ({type(self.encoder).__name__})"
        if not isinstance(features, Features):
            raise ConfigError(f"{name} answered with {type(features).__name__}; a teacher answers with mimlet.Features")
        patches = math.prod(features.grid) if mask is None or mask.ids_keep is None else mask.ids_keep.shape[1]
        T = features.prefix + patches
        maps, heads = (batch, T, self.dim), (batch, self.heads, T)
        kinds: dict[str, tuple[int, ...]] = {"hidden": maps, "normed": maps, "attention": (*heads, T), "qkv": heads}
        lacking, answered = [], []
        for kind, expected in kinds.items():
            given = getattr(features, kind)
            lacking += [f"{kind} of block {i}" for i in getattr(taps, kind) if i not in given]
            for i in set(given) & set(getattr(taps, kind)):
                answered += [(f"{kind} of block {i}", x, expected) for x in (given[i] if kind == "qkv" else [given[i]])]
        if taps.tokens:
            lacking += ["tokens"] if features.tokens is None else []
            answered += [("tokens", features.tokens, maps)] if features.tokens is not None else []
        if lacking:
            raise ConfigError(
                f"{name} was asked for {', '.join(lacking)} and did not answer that; its Features have to hold what "
                "taps asks for, or choose a method and layers that it can answer"
            )
        for what, x, expected in answered:
            if tuple(x.shape[: len(expected)]) != expected:
                raise ConfigError(
                    f"{name} gave {what} of shape {list(x.shape)}, expected {list(expected)[: x.dim()]}: "
                    f"batch {batch}, {T} tokens (prefix {features.prefix}, {patches} patches of its grid "
                    f"{features.grid[0]} x {features.grid[1]}), width {self.dim}, {self.heads} heads"
                )


class Teachers:
    """Hands out teachers: equal requests get one object, so that trainings side by side share its work.

    `module` is the user's own teacher, which then answers every request in place of `config.teacher.path`: a `Teacher`,
    taken as it is, or a module that can be made one. Such a module may also have `mean` and `std`, by which its input
    is normalised (else ImageNet's).
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module
        self.known: dict[str, Teacher] = {}

    def find(self, config: Config, student: Encoder, *, decoder: bool = False, masked: bool = False) -> Teacher:
        """The teacher that `config.teacher` names, fitted to a student: `decoder` with its decoder, `masked` able to
        drop the patches that are hidden from the student.

        Raises `WeightsError` or `ConfigError` with the reason where it cannot be that.
        """
        settings, augment = config.teacher, config.data.augment
        key = f"{settings.model_dump_json()} {student.shape.image_size} {student.grid} {augment.mean} {augment.std}"
        mean, std, accelerator = augment.mean, augment.std, config.speed.accelerator
        teacher = self.known.get(key)
        if isinstance(self.module, Teacher):
            teacher = self.module
        elif self.module is not None:
            teacher = teacher or _adopted(self.module, settings, student, (mean, std), accelerator, "your module")
        elif teacher is None or (decoder and teacher.decoder is None):
            with torch.random.fork_rng(devices=[]):  # a student is initialised alike, whether its teacher is new or not
                loaded = load_teacher(settings, student, decoder=decoder, mean=mean, std=std, accelerator=accelerator)
            if teacher is None:
                teacher = loaded
            teacher.decoder, teacher.load_report = loaded.decoder, loaded.load_report
        self.known[key] = teacher
        _check_use(teacher, student, decoder, masked)
        return teacher

    def forget(self) -> None:
        """From now on, teachers remember their answers, until this is called again: once per step."""
        for teacher in self.known.values():
            teacher.memo = {}


def load_teacher(
    settings: TeacherSettings,
    student: Encoder,
    *,
    decoder: bool = False,
    mean: Channels = IMAGENET_MEAN,
    std: Channels = IMAGENET_STD,
    accelerator: Literal["auto"] | Accelerator = "auto",
) -> Teacher:
    """The teacher that settings name, its input sized for the student it will teach.

    `mean`, `std`: how the student's images are normalised. `accelerator`: where it will run (`speed.accelerator`).
    Raises `WeightsError` when the file does not fit, or when a decoder is needed and not wholly there.
    """
    assert settings.path is not None
    if settings.path.startswith(PYTHON):
        raise ConfigError(
            f"teacher.path={settings.path} stands for a module given from Python: mimlet.train(config, teacher=module)"
        )
    opened = open_teacher(settings.path)
    if isinstance(opened, Foreign):
        if settings.grid == "input":
            opened.encoder.resize(student.grid[0] * opened.encoder.patch)
        teacher = _adopted(opened.encoder, settings, student, (mean, std), accelerator, settings.path)
        teacher.load_report = opened.report
        return teacher
    shape = _shape(settings, opened)
    if settings.grid == "input":
        pooled = isinstance(shape, HieraShape) and shape.q_pool == 3
        shape = replace(shape, image_size=student.grid[0] * shape.patch * (1 + pooled))
    with unfit(opened.source):
        encoder = encoder_of(shape)
    report = fill_encoder(encoder, opened)
    teacher = Teacher(
        encoder,
        load_decoder(opened, encoder, report=report) if decoder else None,
        bf16=_in_bf16(settings, accelerator),
        own=(opened.mean, opened.std),
        students=(mean, std),
        size=shape.image_size,
        grid=student.grid,
        source=opened.source,
    )
    if settings.precision == "fp8" or settings.precision == "int8":
        quantise_(encoder, settings.precision, choose_accelerator(accelerator))
    teacher.load_report = report
    teacher.relation_heads = {int(block): int(heads) for block, heads in opened.info.get("heads_of", {}).items()}
    teacher.pixels = opened.pixels
    return teacher


def _adopted(
    encoder: nn.Module,
    settings: TeacherSettings,
    student: Encoder,
    students: Normalisation,
    accelerator: Literal["auto"] | Accelerator,
    source: str,
) -> Teacher:
    """A model of timm or transformers, or a module of the user's own, as a teacher."""
    _check_attributes(encoder, source)
    if settings.precision in LOWBIT:
        raise ConfigError(
            f"teacher.precision={settings.precision} is for encoders that mimlet reads itself, and {source} is a "
            f"{type(encoder).__name__}; use bf16, 32 or auto"
        )
    patch, heads, (rows, _) = int(cast(int, encoder.patch)), encoder.heads, cast(tuple[int, int], encoder.grid)
    if settings.name or settings.heads not in (0, heads):
        raise ConfigError(
            f"teacher.name and teacher.heads describe weights files; {source} has {heads} heads: leave them out"
        )
    size = encoder.size if isinstance(encoder, ForeignEncoder) else rows * patch
    if settings.grid == "input":
        size = student.grid[0] * patch
        if isinstance(encoder, ForeignEncoder) and size != encoder.size:
            encoder = deepcopy(encoder)  # others may use it at its size
            encoder.resize(size)
    mean, std = getattr(encoder, "mean", IMAGENET_MEAN), getattr(encoder, "std", IMAGENET_STD)
    return Teacher(
        encoder,
        bf16=_in_bf16(settings, accelerator),
        own=(triple(mean), triple(std)),
        students=students,
        size=size,
        grid=student.grid,
        source=source,
    )


def _in_bf16(settings: TeacherSettings, accelerator: Literal["auto"] | Accelerator) -> bool:
    native = computes_in_bf16(choose_accelerator(accelerator))
    return settings.precision in ("bf16", *LOWBIT) or (settings.precision == "auto" and native)


def _check_attributes(encoder: nn.Module, source: str) -> None:
    """Raises where a module lacks what every teacher has."""
    lacking = [name for name in ("patch", "dim", "depth", "heads", "grid", "prefix") if not hasattr(encoder, name)]
    if lacking:
        raise ConfigError(
            f"{source} is a {type(encoder).__name__} without the attribute{'s' if len(lacking) > 1 else ''} "
            f"{', '.join(lacking)}; a teacher has patch, dim, depth, heads, grid (rows, columns) and prefix (1 "
            "with a class token, else 0), and answers (images, mask, taps=...) with mimlet.Features"
        )


def _check_use(teacher: Teacher, student: Encoder, decoder: bool, masked: bool) -> None:
    """Raises where a teacher cannot do what a method asks of it."""
    encoder = teacher.encoder if isinstance(teacher.encoder, Encoder) else None
    if teacher.grid != student.grid:
        theirs, ours = (f"{rows} x {columns}" for rows, columns in (teacher.grid, student.grid))
        raise WeightsError(
            f"{teacher.source} answers with {theirs} patches, the student sees {ours}; resize its input or its answer, "
            "or give the student another encoder.image_size or encoder.patch"
        )
    if encoder and encoder.stages and teacher.own_grid != teacher.grid:
        raise ConfigError(
            f"{teacher.source} sees {teacher.own_grid[0]} x {teacher.own_grid[1]} patches, the student "
            f"{student.grid[0]} x {student.grid[1]}, and what the stages of {encoder.family} answer is not resized; "
            "set teacher.grid=input"
        )
    if decoder and teacher.decoder is None:
        raise WeightsError(f"{teacher.source} holds no decoder, and this method teaches through the teacher's decoder")
    if not masked:
        return
    if not teacher.takes_masks:
        raise ConfigError(
            f"{teacher.source} is a {type(teacher.encoder).__name__}, which sees whole images only, and this method "
            "hides the same patches from student and teacher; use a method that shows whole images (tinymim, mimhd), "
            "or an encoder that mimlet reads itself (a weights file, or timm:NAME)"
        )
    if teacher.own_grid != teacher.grid:
        raise ConfigError(
            f"{teacher.source} sees {teacher.own_grid[0]} x {teacher.own_grid[1]} patches, the student "
            f"{student.grid[0]} x {student.grid[1]}, and this method hides the same ones from both; "
            "set teacher.grid=input"
        )
    unit = encoder.unit if encoder else 1
    if unit != student.unit:
        raise ConfigError(
            f"{teacher.source} hides {unit} x {unit} patches at a time, the student {student.unit} x {student.unit}, "
            "and this method hides the same ones from both; take a teacher of the student's family (only mask units of "
            "Hiera have 2 x 2), or a method that shows whole images (tinymim, mimhd)"
        )
    if teacher.prefix != student.prefix:
        raise WeightsError(
            f"teacher {teacher.source} has {'a' if teacher.prefix else 'no'} class token, "
            f"the student {'one' if student.prefix else 'none'}; {class_token_advice(student, teacher.prefix)}"
        )


def class_token_advice(student: Encoder, prefix: int) -> str:
    """What to do about a student whose class token differs from a teacher with `prefix` of them."""
    if isinstance(student, ViT):
        return f"set encoder.class_token={str(bool(prefix)).lower()}"
    return f"{student.family} has none, so take a teacher without one (one trained with encoder.class_token=false)"


def _shape(settings: TeacherSettings, checkpoint: Checkpoint) -> Shape:
    """The teacher's architecture. `settings.name` says the head count, and what else the file has to be."""
    if not settings.name:
        return shape_of_checkpoint(checkpoint, settings.heads)
    if settings.name not in ENCODERS:
        known = f"{nearest(settings.name, ENCODERS)}; known: {', '.join(ENCODERS)}"
        raise ConfigError(f"unknown teacher.name '{settings.name}'{known}")
    size = ENCODERS[settings.name]
    shape = shape_of_checkpoint(checkpoint, settings.heads or size.heads)
    depths = (size.depth,) if isinstance(size, Size) else size.stages
    found = (shape.depth,) if isinstance(shape, ViTShape) else shape.stages
    if (shape.dim, found) != (size.dim, depths):
        (theirs, ours) = (" + ".join(map(str, blocks)) for blocks in (found, depths))
        raise WeightsError(
            f"teacher {checkpoint.source} has width {shape.dim} and {theirs} blocks, but a {settings.name} has "
            f"{size.dim} and {ours}; leave teacher.name out, or give another file"
        )
    return shape
