"""Vision transformers of timm and transformers, read and asked through one adapter.

Nothing of them is written again: the model's own forward runs, hooks pick up the outputs of its blocks, and queries,
keys and values are taken where they enter `F.scaled_dot_product_attention`. So they are what the model's attention
sees, after norms of q and k and after rotary embedding, whatever its projections are called, and a relative bias comes
with them. As soon as all that was asked for is there, the model is stopped.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mimlet.config import IMAGENET_MEAN, IMAGENET_STD
from mimlet.data.masks import Mask
from mimlet.errors import ConfigError, WeightsError
from mimlet.models.features import Features, Taps
from mimlet.models.parts import attend, attention_logits
from mimlet.models.weights import (
    ENCODER_FILE,
    Channels,
    Checkpoint,
    LoadReport,
    Normalisation,
    checkpoint_of_timm,
    create_timm,
    first_line,
    open_checkpoint,
    read_tensors,
    triple,
    unfit,
)
from mimlet.untrusted import parse_json

CLASS_TOKENS = ("cls_token", "class_embedding")
OTHER_TOKENS = ("dist_token", "distillation_token", "reg_token", "register_tokens")
FINAL_NORMS = ("norm", "layernorm", "post_layernorm")
FIRST_NORMS = ("norm1", "layernorm_before", "layer_norm1")
POOLING_PARTS = ("pooler.", "head.")
PROJECTION = "visual_projection"
REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models raise on an input that they are not made for."""


class Enough(Exception):
    """Leaves a model's forward: all that is wanted has been seen."""


@dataclass(frozen=True)
class Attended:
    """What a product of attention works on: its result is softmax(q k^T / sqrt(d) + bias) v; q, k, v are [B,H,T,d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None


class Watch(TorchFunctionMode):
    """Looks on while a model runs, and stops it when it has seen the outputs of the blocks `hidden` (0: the input of
    the first) and what enters the attention of the blocks `attended`.
    """

    def __init__(self, hidden: Iterable[int], attended: Iterable[int]) -> None:
        super().__init__()
        self.wanted = (frozenset(hidden), frozenset(attended))
        self.hidden: dict[int, Tensor] = {}
        self.attended: dict[int, list[Attended]] = {}
        self.block = 0

    def run(self, blocks: Iterable[nn.Module], model: Callable[[], object]) -> None:
        """Runs the model as far as needed."""
        with ExitStack() as hooks:
            for number, block in enumerate(blocks, 1):
                hooks.callback(block.register_forward_pre_hook(self._before(number), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(self._after(number)).remove)
            with self, suppress(Enough):
                model()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every function of torch passes here. The product of attention is recorded, and computed by the kernel that
        our own encoder would take.
        """
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v, bias = (given.get(name) for name in names[:4])
        boolean = bias is not None and not bias.is_floating_point()
        if boolean or any(given.get(option) for option in ("dropout_p", "is_causal", "enable_gqa")):
            return func(*args, **kwargs)
        assert isinstance(q, Tensor)
        assert isinstance(k, Tensor)
        assert isinstance(v, Tensor)
        factor = (given.get("scale") or 0) * q.shape[-1] ** 0.5 or 1.0
        if not math.isclose(factor, 1, rel_tol=1e-6):
            q = q * factor
        if self.block in self.wanted[1]:
            self.attended.setdefault(self.block, []).append(Attended(q, k, v, bias))
            self._check()
        return attend(q, k, v, bias)

    def _before(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.block = number
            if number == 1 and 0 in self.wanted[0]:
                self.hidden[0] = args[0] if args else kwargs["hidden_states"]
                self._check()

        return hook

    def _after(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: object) -> None:
            self.block = 0
            if number in self.wanted[0]:
                tokens = _first(output)
                assert isinstance(tokens, Tensor)
                self.hidden[number] = tokens
                self._check()

        return hook

    def _check(self) -> None:
        if self.hidden.keys() == self.wanted[0] and self.attended.keys() == self.wanted[1]:
            raise Enough


class ForeignEncoder(nn.Module):
    """A vision transformer of another library as an encoder: `(images, taps) -> Features`.

    `model` takes images [B,3,h,w] first. A trial at `size` px finds its blocks: the list of equal modules that all
    answer [B,T,D], T being a square number of patches behind class, distillation and register tokens. Answers hold the
    class token (`prefix` 1; 0 without) and the patches in raster order; the other tokens are left out, of q, k and v
    too. `attention` has its relative bias in it. `heads` is 1 where no attention can be seen. `mean`, `std`: how its
    input is normalised. `projection`: the linear map of final tokens to the space that a CLIP's images share with its
    texts; it is kept for who asks for it.

    Raises `WeightsError` for models that are not like that.
    """

    takes_masks = False

    def __init__(
        self,
        model: nn.Module,
        size: int,
        source: str = "the model",
        *,
        mean: Channels = IMAGENET_MEAN,
        std: Channels = IMAGENET_STD,
        projection: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.model, self.size, self.source = model.eval(), size, source
        self.mean, self.std, self.projection = mean, std, projection
        self.takes = set(inspect.signature(model.forward).parameters)
        self.options: dict[str, bool] = {}
        tokens = [(name.rpartition(".")[2], value) for name, value in model.named_parameters()]
        self.prefix = int(any(name in CLASS_TOKENS for name, _ in tokens))
        self.prefix_of_model = self.prefix + sum(value.shape[-2] for name, value in tokens if name in OTHER_TOKENS)
        self.place, count, self.dim = self._find_blocks()
        self.depth = len(self._blocks())
        side = math.isqrt(count - self.prefix_of_model)
        self.grid, self.patch = (side, side), size // side
        self.heads, self.readable = self._look()
        parents = ("", f"{self.place.rpartition('.')[0]}.")
        names = (f"{parent.lstrip('.')}{name}" for parent in parents for name in FINAL_NORMS)
        known = {name for name, _ in model.named_modules()}
        self.norm = next((name for name in names if name in known), "")
        self.first_norm = self._find_first_norm()

    @torch.no_grad()
    def resize(self, size: int) -> None:
        """Makes it take images of `size` px, by the model's own means; `ConfigError` where it has none."""
        if size == self.size:
            return
        side = size // self.patch
        try:
            resizer = getattr(self.model, "set_input_size", None)
            if resizer is not None:
                resizer(img_size=(size, size))
            elif "interpolate_pos_encoding" in self.takes:
                self.options = {"interpolate_pos_encoding": True}
            self.size, self.grid = size, (side, side)
            self._look()
        except REFUSALS as error:
            raise ConfigError(
                f"{self.source} cannot see images of {size} px ({first_line(error)}); "
                "set teacher.grid=target, which keeps its own size and resizes what it answers"
            ) from None

    def forward(self, images: Tensor, mask: Mask | None = None, *, taps: Taps | None = None) -> Features:
        """What `taps` asks for about whole images [B,3,h,w]; the model is stopped when that is there."""
        taps = taps or Taps()
        assert mask is None, "takes_masks is False"
        self._check(taps)
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        features = Features(self.prefix_of_model, grid)
        hidden = {*taps.hidden, *taps.normed, *([self.depth] if taps.tokens else [])}
        attended = {*taps.attention, *taps.qkv}
        if not hidden and not attended:
            return features
        watch = self._watch(images, hidden, attended)
        features.hidden = {i: watch.hidden[i] for i in taps.hidden}
        for i, (seen,) in watch.attended.items():
            if i in taps.qkv:
                features.qkv[i] = (seen.q, seen.k, seen.v)
            if i in taps.attention:
                features.attention[i] = attention_logits(seen.q, seen.k, seen.bias)
        features.normed = {i: self._norm(i)(watch.hidden[i]) for i in taps.normed}
        if taps.tokens:
            features.tokens = self._norm(self.depth)(watch.hidden[self.depth])
        return features.trimmed(self.prefix)

    def _norm(self, layer: int) -> nn.Module:
        """What the output of a block passes first: the next block's first norm, or the final one."""
        if layer == self.depth:
            return self.model.get_submodule(self.norm)
        return self._blocks()[layer].get_submodule(self.first_norm)

    def _blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.place).children())

    def _watch(self, images: Tensor, hidden: Iterable[int], attended: Iterable[int]) -> Watch:
        watch = Watch(hidden, attended)
        watch.run(self._blocks(), lambda: self.model(images, **self.options))
        return watch

    def _blank(self) -> Tensor:
        return next(self.model.parameters()).new_zeros(1, 3, self.size, self.size)

    @torch.no_grad()
    def _find_blocks(self) -> tuple[str, int, int]:
        """Place, number of tokens and width of the stack of blocks."""
        lists = {
            name: list(module.children())
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential) and _alike(list(module.children()))
        }
        lists = {name: v for name, v in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
        shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in lists}

        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
            return lambda block, args, output: shapes[name].append(tuple(getattr(_first(output), "shape", ())))

        with ExitStack() as hooks:
            for name, blocks in lists.items():
                for block in blocks:
                    hooks.callback(block.register_forward_hook(note(name)).remove)
            try:
                self.model(self._blank())
            except REFUSALS as error:
                raise WeightsError(
                    f"{self.source} is a {type(self.model).__name__} that does not run on images of "
                    f"{self.size} x {self.size} px alone: {first_line(error)}"
                ) from None
        sizes = {name: sum(p.numel() for block in blocks for p in block.parameters()) for name, blocks in lists.items()}
        for name, blocks in lists.items():
            if self._fits(shapes[name], len(blocks)) and 2 * sizes[name] > sum(sizes.values()):
                _, tokens, width = shapes[name][0]
                return name, tokens, width
        raise WeightsError(
            f"{self.source} is a {type(self.model).__name__} and not ViT-like: looked for one list of equal blocks, "
            "the larger part of the model, that all answer [B,T,D], T being a square number of patches and "
            f"{self.prefix_of_model} other tokens; found {', '.join(lists) or 'no list of blocks'}, not like that"
        )

    def _fits(self, shapes: list[tuple[int, ...]], blocks: int) -> bool:
        """Did these blocks, each run once, all answer tokens of whole images?"""
        if len(shapes) != blocks or len(set(shapes)) != 1 or len(shapes[0]) != 3:
            return False
        patches = shapes[0][1] - self.prefix_of_model
        return patches > 1 and math.isqrt(patches) ** 2 == patches

    @torch.no_grad()
    def _look(self) -> tuple[int, bool]:
        """Heads, and whether q, k and v can be seen, by a trial of the first block."""
        watch = self._watch(self._blank(), {1}, {1})
        came, expected = watch.hidden[1].shape[1], self.prefix_of_model + self.grid[0] * self.grid[1]
        if came != expected:
            raise RuntimeError(f"its blocks see {came} tokens and not {expected}")
        seen = watch.attended.get(1, [])
        readable = len(seen) == 1 and all(
            x.dim() == 4 and x.shape[2] == came for x in (seen[0].q, seen[0].k, seen[0].v)
        )
        return (seen[0].q.shape[1], True) if readable else (1, False)

    @torch.no_grad()
    def _find_first_norm(self) -> str:
        """The name, in a block, of the norm that takes the block's input as it comes; none where blocks are made
        otherwise.
        """
        first, entered = self._blocks()[0], []
        name = next((name for name in FIRST_NORMS if hasattr(first, name)), "")
        if not name:
            return ""
        hook = first.get_submodule(name).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        watch = self._watch(self._blank(), {0, 1}, ())
        hook.remove()
        return name if len(entered) == 1 and torch.equal(entered[0], watch.hidden[0]) else ""

    def _check(self, taps: Taps) -> None:
        for kind, first in (("hidden", 0), ("normed", 0), ("attention", 1), ("qkv", 1)):
            wrong = [i for i in getattr(taps, kind) if not first <= i <= self.depth]
            if wrong:
                raise ConfigError(f"no {kind} of block {wrong[0]}: {self.source} has blocks {first} to {self.depth}")
        if (taps.attention or taps.qkv) and not self.readable:
            raise ConfigError(
                f"{self.source} shows no queries, keys and values: its blocks do not call torch's "
                "scaled_dot_product_attention once on all tokens; take another teacher, or compare block outputs only"
            )
        if (taps.tokens or self.depth in taps.normed) and not self.norm:
            raise ConfigError(
                f"{self.source} has no final norm under a known name ({', '.join(FINAL_NORMS)}); ask for block outputs"
            )
        if not self.first_norm and any(i < self.depth for i in taps.normed):
            raise ConfigError(
                f"{self.source} gives no normed: its blocks do not begin with a norm under a known name "
                f"({', '.join(FIRST_NORMS)}); ask for block outputs"
            )
        if taps.levels:
            raise ConfigError(f"{self.source} gives no levels: a plain ViT has no pyramid levels")


@dataclass(frozen=True)
class Foreign:
    """A model of another library, adapted, and what was read."""

    encoder: ForeignEncoder
    report: LoadReport


def open_teacher(source: str) -> Checkpoint | Foreign:
    """Opens a run folder, a weights file, a folder as timm or transformers save their models, `timm:NAME` or
    `transformers:NAME`.

    What our own encoder computes exactly comes as a `Checkpoint`, everything else of timm and transformers adapted.
    Raises `WeightsError` or `ConfigError` with the reason.
    """
    if source.startswith("transformers:"):
        return _from_transformers(source.removeprefix("transformers:"), source)
    if source.startswith("timm:"):
        return _from_timm(create_timm(source.removeprefix("timm:")), source)
    folder = Path(source)
    if not folder.is_dir() or (folder / ENCODER_FILE).is_file():
        return open_checkpoint(source)
    description = _description(folder)
    _check_folder(folder, description)
    with unfit(source):
        if "model_type" in description:
            return _from_transformers(source, source)
        if "architecture" in description:
            return _from_timm(_timm_folder(folder), source)
    raise WeightsError(
        f"{source} holds no {ENCODER_FILE}; expected the folder of a finished run, or a weights file, or a folder "
        "whose config.json has model_type (as transformers saves a model) or architecture (as timm saves it)"
    )


def _from_timm(model: nn.Module, source: str) -> Checkpoint | Foreign:
    try:
        return checkpoint_of_timm(model, source)
    except WeightsError:
        config: Any = model.pretrained_cfg
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
        mean, std = triple(config["mean"]), triple(config["std"])
        encoder = ForeignEncoder(model, _square(size, source), source, mean=mean, std=std)
    return Foreign(encoder, LoadReport(source, [*model.state_dict()]))


def _timm_folder(folder: Path) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # whatever it raises on a damaged file or a strange description
        raise WeightsError(f"{folder} cannot be read by timm: {first_line(error)}") from None
    return model


def _from_transformers(name: str, source: str) -> Foreign:
    try:
        import transformers
        from transformers.models.auto.image_processing_auto import get_image_processor_config
    except ImportError:
        raise ConfigError(f"{source} needs the package transformers: pip install 'mimlet[transformers]'") from None
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    try:
        model, info = transformers.AutoModel.from_pretrained(name, **options)
        if f"{PROJECTION}.weight" in info["unexpected_keys"]:
            half: Any = transformers.CLIPVisionModelWithProjection
            model, info = half.from_pretrained(name, **options)
        inputs = get_image_processor_config(name)
    except Exception as error:  # whatever it raises on a damaged file or a strange description
        raise WeightsError(
            f"{source} cannot be read by transformers: {first_line(error)}. Without a network, download the model's "
            "folder elsewhere and give its path"
        ) from None
    place = "vision_model." if hasattr(model, "vision_model") else ""
    tower = model.get_submodule(place[:-1])
    missing = [key for key in sorted(info["missing_keys"]) if key.startswith(place)]
    missing = [key for key in missing if not key.removeprefix(place).startswith(POOLING_PARTS)]
    if missing:
        raise WeightsError(f"{source} lacks {missing[0]}; a partly random teacher is never used")
    if hasattr(getattr(tower, "embeddings", None), "random_masking"):
        tower.embeddings.random_masking = _nothing_hidden
    known = f"{PROJECTION}.weight" not in info["missing_keys"]
    projection = getattr(model, PROJECTION, None) if known else None
    report = LoadReport(source, [*tower.state_dict(), *([f"{PROJECTION}.weight"] if projection else [])])
    report.skipped = dict.fromkeys(sorted(info["unexpected_keys"]), "not of the bare model")
    report.skipped |= dict.fromkeys(
        (key for key in model.state_dict() if not key.startswith((place, PROJECTION))), "not of the images"
    )
    mean, std = _normalisation(inputs, tower.config.model_type, report)
    size = _square(getattr(tower.config, "image_size", None) or 224, source)
    return Foreign(ForeignEncoder(tower, size, source, mean=mean, std=std, projection=projection), report)


def _normalisation(inputs: Mapping[str, Any], kind: str, report: LoadReport) -> Normalisation:
    """As the model's folder says, else the custom of its kind, which the report then notes."""
    from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    if inputs.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if "image_mean" in inputs and "image_std" in inputs:
        return triple(inputs["image_mean"]), triple(inputs["image_std"])
    clip = kind.startswith("clip")
    report.notes.append(f"no preprocessor_config.json: its input is normalised as {'CLIP' if clip else 'ImageNet'}'s")
    return (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if clip else (IMAGENET_MEAN, IMAGENET_STD)


def _nothing_hidden(sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, None, None]:
    """In place of the random masking of transformers' MAE: all patches, in raster order."""
    return sequence, None, None


def _description(folder: Path) -> Mapping[str, Any]:
    try:
        description = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return description if isinstance(description, dict) else {}


def _check_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Refuses a folder from which another library would fetch or run code: a kernel that the description names (a
    repository instead of `sdpa` or `eager`), or pickled weights with more in them than tensors.
    """
    sections = [description, *(value for value in description.values() if isinstance(value, dict))]
    for name, value in ((name, value) for section in sections for name, value in section.items()):
        if name.endswith("attn_implementation") and value not in (None, "eager", "sdpa"):
            raise WeightsError(
                f"{folder}/config.json asks for {name} {value!r}, which may be code from elsewhere: refused. "
                "Remove that line, if you trust its origin"
            )
    for file in sorted(folder.iterdir()):
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt") and file.is_file():
            read_tensors(file)


def _square(size: Any, source: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise WeightsError(f"{source} sees images of {' x '.join(map(str, size))} px; only square ones are supported")
    return int(sides.pop())


def _alike(blocks: list[nn.Module]) -> bool:
    """Are these blocks of one kind, and more than single layers?"""
    return len({type(block) for block in blocks}) == 1 and any(True for _ in blocks[0].children())


def _first(output: object) -> object:
    """A block's tokens, which some return in front of other things."""
    return output[0] if isinstance(output, tuple) and output else output
