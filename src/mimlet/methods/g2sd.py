"""G2SD's generic stage: Huang et al., Generic-to-Specific Distillation of Masked Autoencoders, CVPR 2023, section 3.1,
and its released code. The specific stage for classification is label distillation in `tasks/classify.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask, MaskSampler, RandomMasking
from mimlet.errors import ConfigError
from mimlet.methods.base import Clock, Method
from mimlet.methods.mae import build_decoder, start_vit
from mimlet.methods.settings import G2SDSettings
from mimlet.methods.terms import Terms, make_terms
from mimlet.models.decoders import Decoder
from mimlet.models.features import Taps
from mimlet.models.linear import Linear
from mimlet.models.parts import init_mae
from mimlet.models.teacher import Teacher, Teachers
from mimlet.models.vit import ViT
from mimlet.models.weights import LoadReport
from mimlet.objectives.hidden import hidden_loss

if TYPE_CHECKING:
    from mimlet.config import Config

Target = Literal["decoder", "decoder_masked", "encoder", "encoder_and_masked", "relations"]
DECODES: tuple[Target, ...] = ("decoder", "decoder_masked", "encoder_and_masked")
ENCODES: tuple[Target, ...] = ("encoder", "encoder_and_masked")


class G2SD(Method):
    """The student, an encoder with a decoder of its own, predicts hidden states of a frozen teacher that sees the same
    visible patches.

    `target` (Table 5 of the paper) says which: "decoder" all tokens after block `target_layer` of the teacher's decoder
    (0: the middle one), the class token's place included; "decoder_masked" those of hidden patches; "encoder" the
    teacher's last block, before its final norm, from the student's normed latent; "encoder_and_masked" both of these;
    "relations" none, which leaves the work to `terms`. Predicted through two linear layers each. No pixels are
    predicted: the student's decoder uses neither its norm nor its last layer, and is not exported.
    """

    encoder: ViT
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)

    def __init__(
        self,
        encoder: ViT,
        student_decoder: Decoder | None,
        teacher: Teacher,
        *,
        target: Target = "decoder",
        target_layer: int = 0,
        mask_ratio: float = 0.75,
        terms: Terms | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.student_decoder = student_decoder
        self.teacher = teacher
        self.mask_ratio = mask_ratio
        self.masked_only = target != "decoder"
        self.load_report: LoadReport | None = None
        self.terms = terms or Terms([])
        self.weights = dict(self.terms.weights)
        self.decoder_map: nn.Module | None = None
        self.encoder_map: nn.Module | None = None
        self.student_taps, self.teacher_taps = self.terms.student_taps, self.terms.teacher_taps
        self.layer = target_layer
        if target in DECODES:
            assert student_decoder is not None, "this target is predicted by a decoder of the student"
            assert teacher.decoder is not None, "the teacher was not asked to bring its decoder"
            student_decoder.norm.requires_grad_(False)
            student_decoder.pred.requires_grad_(False)
            self.layer = _layer(target_layer, len(teacher.decoder.blocks))
            self.decoder_map = two_layers(student_decoder.dim, teacher.decoder.dim)
            self.weights["decoder"] = 1.0
            self.student_taps |= Taps()
            self.teacher_taps |= Taps(decoded=(self.layer,), tokens=False)
        elif target_layer:
            raise ConfigError(
                f"method.target_layer is a block of the teacher's decoder, which method.target={target} does not use; "
                f"leave it out, or choose one of {', '.join(DECODES)}"
            )
        if target in ENCODES:
            self.encoder_map = two_layers(encoder.dim, teacher.dim)
            self.weights["encoder"] = 1.0
            self.student_taps |= Taps()
            self.teacher_taps |= Taps(hidden=(teacher.depth,), tokens=False)

    @classmethod
    def build(cls, config: Config, classes: int = 0, teachers: Teachers | None = None) -> G2SD:
        """From a configuration. Without a number, relations are split into as many heads as the teacher has."""
        settings = config.method
        assert isinstance(settings, G2SDSettings)
        decodes = settings.target in DECODES
        encoder, report = start_vit(config)
        teacher = (teachers or Teachers()).find(config, encoder, decoder=decodes, masked=True)
        terms = list(settings.terms)
        if settings.target == "relations":
            heads = settings.relations.relation_heads or teacher.heads
            terms.insert(0, settings.relations.model_copy(update={"relation_heads": heads}))
        method = cls(
            encoder,
            build_decoder(encoder, settings.decoder) if decodes else None,
            teacher,
            target=settings.target,
            target_layer=settings.target_layer,
            mask_ratio=settings.mask_ratio,
            terms=make_terms(terms, encoder, teacher, masked=True),
        )
        method.load_report = report
        return method

    def masks(self) -> dict[str, MaskSampler]:
        """One random mask over patches, for student and teacher."""
        return {"mask": RandomMasking(self.encoder.units, self.mask_ratio), **self.terms.masks()}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """{decoder, encoder} and the terms' losses: those that are in use."""
        mask = batch.mask
        student = self.encoder(batch.images, mask, taps=self.student_taps)
        teacher = self.teacher(batch.images, mask, taps=self.teacher_taps)
        losses = {}
        if self.decoder_map is not None:
            predicted, states = self.decode(student.latent, mask), teacher.decoded[self.layer]
            if self.masked_only:
                predicted, states = (hidden_patches(x, mask) for x in (predicted, states))
            losses["decoder"] = hidden_loss(self.decoder_map(predicted), states)
        if self.encoder_map is not None:
            losses["encoder"] = hidden_loss(self.encoder_map(student.latent), teacher.hidden[self.teacher.depth])
        return {**losses, **self.terms(student, teacher, batch)}

    def decode(self, latent: Tensor, mask: Mask) -> Tensor:
        """What leaves the last block of the student's decoder, [B,P+N,dim], from its latent [B,P+V,D]."""
        assert self.student_decoder is not None
        return self.student_decoder.features(latent, mask, len(self.student_decoder.blocks))


def two_layers(dim: int, out: int) -> nn.Module:
    """Linear, GELU, Linear."""
    layers = nn.Sequential(Linear(dim, out), nn.GELU(), Linear(out, out))
    return layers.apply(init_mae)


def hidden_patches(tokens: Tensor, mask: Mask) -> Tensor:
    """The hidden patches [B,N-V,D] of tokens [B,P+N,D] in raster order."""
    ids = mask.ids_hidden + tokens.shape[1] - mask.hidden.shape[1]
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def _layer(asked: int, depth: int) -> int:
    """The block of the teacher's decoder, from 1; 0 stands for the middle one."""
    layer = asked or max(1, depth // 2)
    if layer > depth:
        raise ConfigError(
            f"method.target_layer {layer} is not a block of the teacher's decoder, which has {depth}; "
            "leave it out for the middle one"
        )
    return layer
