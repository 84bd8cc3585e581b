"""D-MAE and D²-MAE: attention distillation during MAE pre-training, with the decoder decoupled from the distilled
layer.

An Experimental Study on Exploring Strong Lightweight Vision Transformers via Masked Image Modeling Pre-Training (IJCV
2025), and its released code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import MaskSampler, RandomMasking
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import RECONSTRUCTION, build_decoder, reconstruction_pictures, start_encoder
from mimlet.methods.settings import DMAESettings
from mimlet.methods.terms import Terms, common_order, make_terms
from mimlet.models.decoders import Decoder, Latent, decoder_input, decoder_taps
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.linear import Linear, linear
from mimlet.models.parts import NORM_EPS, attention_logits, init_mae
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport
from mimlet.objectives.attention import feature_distance, logit_distance
from mimlet.objectives.reconstruct import masked_pixel_loss

if TYPE_CHECKING:
    from mimlet.config import Config

Pairs = Sequence[tuple[int, int]]


class AttentionOnly(nn.Module):
    """The extra block of the released D²-MAE: just enough to give attention logits. Names `norm1`, `attn.qkv` as in
    the official files.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = nn.ModuleDict({"qkv": Linear(dim, 3 * dim)})
        self.apply(init_mae)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] -> logits [B,H,T,T]."""
        qkv = self.attn["qkv"]
        assert isinstance(qkv, Linear)
        parts = 2 * x.shape[-1]
        qk = linear(self.norm1(x), qkv.weight[:parts], qkv.bias[:parts]).view(*x.shape[:2], 2, self.heads, -1)
        return attention_logits(*qk.permute(2, 0, 3, 1, 4).unbind(0))


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer in a list of them."""
    assert isinstance(layer, nn.Linear)
    return layer.weight


class DMAE(Method):
    """MAE plus distances between the student's and a frozen teacher's attention logits (and features, eq. 6) on the
    same visible patches.

    `decode_layer`: the decoder reads the final norm of that block's output instead of the last (D²-MAE).
    `extra_block`: the last pair's student side is an attention-only block after the last one, which is not exported.
    Layer pairs are (student block, teacher block); `hidden` pairs number block outputs, 0 being the embedding.
    """

    encoder: Encoder
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    picture_caption = RECONSTRUCTION

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None,
        teacher: Teacher,
        *,
        attention: Pairs,
        hidden: Pairs = (),
        attention_weight: float = 1.0,
        hidden_weight: float = 1.0,
        decode_layer: int | None = None,
        extra_block: bool = False,
        mask_ratio: float = 0.75,
        normalise: bool = True,
        terms: Terms | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.teacher = teacher
        self.load_report: LoadReport | None = None
        self.mask_ratio = mask_ratio
        self.normalise = normalise
        self.decode_layer = decode_layer or encoder.depth
        early = self.decode_layer < encoder.depth
        self.attention_pairs, self.hidden_pairs = tuple(attention), tuple(hidden)
        self.extra = AttentionOnly(encoder.dim, encoder.heads) if extra_block else None
        self.terms = terms or Terms([])
        self._check()
        # Conv2d's default initialisation of a 1x1 convolution over heads, which is nn.Linear's.
        self.head_maps = nn.ModuleList(
            nn.Linear(encoder.heads_of(s), teacher.heads_in(t), bias=False) for s, t in self.attention_pairs
        )
        self.feature_maps = nn.ModuleList(
            nn.Linear(encoder.normed_dims[s], teacher.normed_dims[t], bias=False) for s, t in self.hidden_pairs
        )
        self.weights = dict(self.terms.weights)
        if decoder is not None:
            self.weights["reconstruction"] = 1.0
        if attention:
            self.weights["attention"] = attention_weight
        if hidden:
            self.weights["hidden"] = hidden_weight

        in_extra = encoder.depth + 1
        self.student_taps = Taps(
            hidden=tuple(
                sorted({self.decode_layer} if decoder and early else set()) + ([encoder.depth] if self.extra else [])
            ),
            normed=tuple(s for s, _ in self.hidden_pairs),
            attention=tuple(s for s, _ in self.attention_pairs if s != in_extra),
            tokens=False,
        )
        if decoder is not None and not early:
            self.student_taps |= decoder_taps(encoder)
        self.student_taps |= self.terms.student_taps
        in_use = self.student_taps.tokens or encoder.depth in (*self.student_taps.hidden, *self.student_taps.normed)
        if decoder is not None and not in_use and early:
            warnings.warn(
                f"the decoder reads block {self.decode_layer} and no extra block follows block {encoder.depth}: its "
                "value, output and MLP weights get no gradient and stay as initialised (the paper's literal form; the "
                "released code sets extra_block = true)",
                stacklevel=2,
            )
        self.teacher_taps = Taps(
            normed=tuple(t for _, t in self.hidden_pairs),
            attention=tuple(t for _, t in self.attention_pairs),
            tokens=False,
        )
        self.teacher_taps |= self.terms.teacher_taps

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> DMAE:
        """From a configuration: layer 0 in attention pairs and -1 in feature pairs mean the last."""
        settings = config.method
        assert isinstance(settings, DMAESettings)
        encoder, report = start_encoder(config)
        teacher = (teachers or Teachers()).find(config, encoder, masked=True)
        last = encoder.depth + int(settings.extra_block)
        method = cls(
            encoder,
            build_decoder(encoder, settings.decoder) if settings.reconstruct else None,
            teacher,
            attention=[(s or last, t or teacher.depth) for s, t in settings.attention_layers],
            hidden=[
                (encoder.depth if s == -1 else s, teacher.depth if t == -1 else t) for s, t in settings.hidden_layers
            ],
            attention_weight=settings.attention_weight,
            hidden_weight=settings.hidden_weight,
            decode_layer=settings.decode_layer if settings.reconstruct else None,
            extra_block=settings.extra_block,
            mask_ratio=settings.mask_ratio,
            normalise=settings.target == "normalised",
            terms=make_terms(settings.terms, encoder, teacher, masked=True),
        )
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One random mask over the encoder's units, for student and teacher."""
        return {"mask": RandomMasking(self.encoder.units, self.mask_ratio), **self.terms.masks()}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{reconstruction, attention, hidden} and the terms' losses: those that are in use; distances are summed over
        the layer pairs.
        """
        student = self.encoder(batch.images, batch.mask, taps=self.student_taps)
        teacher = self.teacher(batch.images, batch.mask, taps=self.teacher_taps)
        losses = {}
        if self.decoder is not None:
            mask = self.encoder.patch_mask(batch.mask)
            prediction = self.decoder(self._decoder_input(student), mask, hidden_only=True)
            losses["reconstruction"] = masked_pixel_loss(
                prediction, batch.images, self.encoder.patch, mask.ids_hidden, self.normalise
            )
        if self.attention_pairs:
            distances = [
                logit_distance(self._student_logits(student, s), teacher.attention[t], weight_of(head_map))
                for (s, t), head_map in zip(self.attention_pairs, self.head_maps, strict=True)
            ]
            losses["attention"] = torch.stack(distances).sum()
        if self.hidden_pairs:
            distances = [
                feature_distance(student.normed[s], teacher.normed[t], weight_of(feature_map))
                for (s, t), feature_map in zip(self.hidden_pairs, self.feature_maps, strict=True)
            ]
            losses["hidden"] = torch.stack(distances).sum()
        return {**losses, **self.terms(student, teacher, batch)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """original, visible and reconstruction, each [B,3,H,W]; nothing without a decoder."""
        if self.decoder is None:
            return {}
        features = self.encoder(batch.images, batch.mask, taps=self.student_taps)
        mask = self.encoder.patch_mask(batch.mask)
        prediction = self.decoder(self._decoder_input(features), mask)
        return reconstruction_pictures(prediction, batch.images, mask, self.encoder.patch, self.normalise)

    def _decoder_input(self, student: Features) -> Latent:
        """What the encoder's decoder reads; with `decode_layer` below the last block its output after the final norm,
        [B,P+V,D].
        """
        if self.decode_layer == self.encoder.depth:
            return decoder_input(self.encoder, student)
        normed: Tensor = self.encoder.norm(student.hidden[self.decode_layer])
        return normed

    def _student_logits(self, student: Features, block: int) -> Tensor:
        if block <= self.encoder.depth:
            return student.attention[block]
        assert self.extra is not None
        logits: Tensor = self.extra(student.hidden[self.encoder.depth])
        return logits

    def _check(self) -> None:
        depth, teacher_depth = self.encoder.depth, self.teacher.depth
        last = depth + (self.extra is not None)
        for kind, pairs, first, most in (
            ("attention", self.attention_pairs, 1, last),
            ("hidden", self.hidden_pairs, 0, depth),
        ):
            for s, t in pairs:
                if not (first <= s <= most and first <= t <= teacher_depth):
                    raise ConfigError(
                        f"method.{kind}_layers: no pair ({s}, {t}); the student has layers {first} to {most}, "
                        f"the teacher {first} to {teacher_depth}"
                    )
            for s, t in pairs:
                common_order(f"method.{kind}_layers", self.encoder, self.teacher, (min(s, depth), t), masked=True)
        if self.decode_layer < depth and not isinstance(self.encoder, ViT):
            raise ConfigError(
                f"method.decode_layer is for plain ViTs; the decoder of {self.encoder.family} reads several stages "
                "(for a Hiera, encoder.fuse=without_last leaves out the last one, which is distilled)"
            )
        if not 1 <= self.decode_layer <= depth:
            raise ConfigError(
                f"method.decode_layer {self.decode_layer} is not a block of the student, which has 1 to {depth}"
            )
        if not self.attention_pairs and not self.hidden_pairs and not len(self.terms):
            raise ConfigError(
                "dmae distils nothing: give attention_layers, hidden_layers or terms, or use the method mae"
            )
