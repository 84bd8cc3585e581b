"""Settings of every method, and the table that names the methods.

This module does not import torch, so that a misspelt setting is answered at once. A new method adds its settings
class here and one line to `METHODS`; the class that trains lives in its own file and is imported only when it is
built.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mimlet.section import Section

if TYPE_CHECKING:
    from mimlet.methods.base import Method


class DecoderSettings(Section):
    """A decoder over patches. MAE-lite's default for ViT-Tiny: one block, half the width, three heads (0 = derive
    from the encoder). `position`: a fixed sin-cos table, or a learned one (Hiera).
    """

    depth: int = Field(1, ge=0)
    dim: int = Field(0, ge=0, description="0: half of the encoder's width")
    heads: int = Field(3, ge=1)
    position: Literal["sincos", "learned"] = "sincos"


Share = Annotated[float, Field(ge=0, le=1)]

Pair = Literal["qq", "qk", "qv", "kq", "kk", "kv", "vq", "vk", "vv"]
"""A relation: softmax(a b^T / sqrt(d)) of two of queries, keys and values."""

NINE: list[Pair] = ["qq", "qk", "qv", "kq", "kk", "kv", "vq", "vk", "vv"]

Heads = Literal["adaptive_block", "adaptive", "average", "significant", "learned_map", "regroup"]


class AdaptiveSettings(Section):
    """Head-level adaptive matching (MIM-HD, section 3.2; what the paper leaves open is an option)."""

    pool: Literal["query", "flatten", "global"] = Field(
        "query", description="how heads are compared; global is the printed one, which cannot tell heads apart"
    )
    reading: Literal["sum", "mixture"] = Field(
        "sum", description="sum: weighted sum of divergences; mixture: divergence from the weighted mixture"
    )
    projection: Literal["linear", "mlp_l2"] = "linear"
    subspace: int = Field(64, ge=1, description="width C of the projected similarities")
    detach_similarity: bool = False
    coverage: float = Field(0.0, ge=0, description="penalty on teacher heads that nobody imitates; 0: off")


class RelationSettings(Section):
    """Distance between relations of one block each (TinyMIM, MIM-HD, G2SD's relation loss).

    `heads` says how unequal head counts meet. adaptive_block: the student's channels are split into as many heads as
    the teacher's (TinyMIM); adaptive: MIM-HD; average: mean over heads on both sides; significant: every student head
    imitates the teacher's `significant_head`; learned_map: D-MAE's linear map over heads, on logits; regroup: both
    sides are split into `relation_heads` heads (G2SD's code). Layers are numbered from 1; 0 stands for the last.
    """

    kind: Literal["relations"] = "relations"
    label: str = Field("", description="prefix of the losses' names, where two such terms meet")
    weight: float = Field(1.0, gt=0)
    pairs: list[Pair] = Field(["qk", "vv"], min_length=1)
    heads: Heads = "adaptive_block"
    student_layer: int = Field(0, ge=0)
    teacher_layer: int = Field(0, ge=0)
    class_token: bool = Field(True, description="whether the class token takes part, where both have one")
    relation_heads: int = Field(0, ge=0, description="for regroup")
    significant_head: int = Field(0, ge=0, description="for significant, from 1; `mimlet probe --kind heads` finds it")
    adaptive: AdaptiveSettings = AdaptiveSettings()


class AlignmentSettings(Section):
    """L1 distance of block outputs, L2-normalised over channels (DMAE, Bai et al. 2023). No layer: three quarters of
    the depth.
    """

    kind: Literal["alignment"] = "alignment"
    label: str = ""
    weight: float = Field(1.0, gt=0)
    student_layer: int | None = Field(None, ge=0)
    teacher_layer: int | None = Field(None, ge=0)
    projection: bool = Field(True, description="linear map to the teacher's width; needed where widths differ")
    normalise: bool = True


class DualViewSettings(Section):
    """Reconstruction through the teacher's frozen decoder from two complementary halves of the student's tokens
    (MIM-HD, section 3.3).
    """

    kind: Literal["dual_view"] = "dual_view"
    label: str = ""
    weight: float = Field(1.0, gt=0, description="alpha; the paper gives none")
    mask_ratio: float = Field(0.5, description="share hidden from the first view; the second hides the rest")
    views: Literal[1, 2] = Field(2, description="1: the paper's single-view ablation")
    target: Literal["auto", "normalised", "raw"] = Field(
        "auto", description="the pixels the teacher's decoder was trained to predict; auto: as its file or name says"
    )


TermSettings = Annotated[RelationSettings | AlignmentSettings | DualViewSettings, Field(discriminator="kind")]

TERMS = {
    "relations": "mimlet.methods.relations:Relations",
    "alignment": "mimlet.methods.alignment:Alignment",
    "dual_view": "mimlet.methods.dual_view:DualView",
}
"""Where the terms live that a recipe can add to a method that distils (`[[method.terms]]`)."""


class MAESettings(Section):
    """Masked autoencoder (He et al. 2022), with MAE-lite's small decoder as default."""

    name: Literal["mae"] = "mae"
    mask_ratio: float = 0.75
    target: Literal["normalised", "raw"] = "normalised"
    decoder: DecoderSettings = DecoderSettings()


class DMAESettings(Section):
    """D-MAE and D²-MAE (Exploring Strong Lightweight ViTs via MIM Pre-Training, sections 5 and 6).

    The defaults are D-MAE. D²-MAE as released: `decode_layer = 8`, `extra_block = true`; as printed: `extra_block =
    false`. Layers are pairs [student block, teacher block], numbered from 1; 0 stands for the last block. For
    `hidden_layers`, 0 is the embedding and -1 the last.
    """

    name: Literal["dmae"] = "dmae"
    mask_ratio: float = 0.75
    target: Literal["normalised", "raw"] = "normalised"
    decoder: DecoderSettings = DecoderSettings()
    reconstruct: bool = Field(True, description="false: the paper's column without reconstruction loss")
    decode_layer: int | None = Field(None, ge=1, description="student block the decoder reads; none: the last")
    extra_block: bool = Field(
        False, description="distil through an extra attention-only block after the last (released D²-MAE)"
    )
    attention_layers: list[tuple[int, int]] = [(0, 0)]
    attention_weight: float = 1.0
    hidden_layers: list[tuple[int, int]] = []
    hidden_weight: float = 1.0
    terms: list[TermSettings] = []


class TinyMIMSettings(Section):
    """TinyMIM (Ren et al. 2023): relations of a clean view, imitated on a jittered view (`data.augment.color_jitter`).
    Nothing is masked.
    """

    name: Literal["tinymim"] = "tinymim"
    relations: RelationSettings = RelationSettings()
    terms: list[TermSettings] = []


class AdaptiveRelationSettings(RelationSettings):
    """MIM-HD's relations: head by head."""

    heads: Heads = "adaptive"


class MIMHDSettings(Section):
    """MIM-HD: adaptive relations head by head, and dual-view decoding through the teacher's decoder."""

    name: Literal["mimhd"] = "mimhd"
    relations: AdaptiveRelationSettings = AdaptiveRelationSettings()
    reconstruct: bool = Field(True, description="false: relations only")
    dual_view: DualViewSettings = DualViewSettings()
    terms: list[TermSettings] = []


class NineRelationSettings(RelationSettings):
    """G2SD's relations: all nine, both sides split into equally many heads (0: as many as the teacher has)."""

    pairs: list[Pair] = Field(NINE, min_length=1)
    heads: Heads = "regroup"


class G2SDSettings(Section):
    """G2SD's generic stage: the student's decoder imitates the hidden states of the teacher's decoder.

    `target` (the paper's Table 5): decoder, at visible and masked patches; decoder_masked; encoder, visible patches;
    encoder_and_masked; relations, all nine of the last blocks.
    """

    name: Literal["g2sd"] = "g2sd"
    mask_ratio: float = 0.75
    decoder: DecoderSettings = DecoderSettings(depth=4, dim=128, heads=4)
    target: Literal["decoder", "decoder_masked", "encoder", "encoder_and_masked", "relations"] = "decoder"
    target_layer: int = Field(0, ge=0, description="block of the teacher's decoder; 0: the middle one (4 of 8)")
    relations: NineRelationSettings = NineRelationSettings()
    terms: list[TermSettings] = []


class DMAEFeaturesSettings(Section):
    """DMAE (Bai et al., Masked Autoencoders Enable Efficient Knowledge Distillers, 2023; not D-MAE): MAE plus features
    at three quarters of the depth, on the same visible patches.
    """

    name: Literal["dmae_features"] = "dmae_features"
    mask_ratio: float = 0.75
    target: Literal["normalised", "raw"] = "raw"
    decoder: DecoderSettings = DecoderSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    terms: list[TermSettings] = []


class BlockMaskSettings(Section):
    """BEiT's block-wise masking (`data.masks.BlockMasking`), in shares of the patches: 75 of 196, blocks from 16."""

    ratio: float = Field(75 / 196, gt=0, lt=1)
    smallest: float = Field(16 / 196, gt=0, lt=1)
    largest: float = Field(0.0, ge=0, lt=1, description="0: up to what is still to be hidden")
    tries: int = Field(10, ge=0, description="how often a block is drawn until one fits; 0: until one does")
    exact: float = Field(0.0, ge=0, lt=1, description="hide exactly this share: the blocks and others; 0: off")


class SimMIMSettings(Section):
    """SimMIM (Xie et al. 2022): fill hidden squares with a mask token, predict their pixels by one linear layer, L1."""

    name: Literal["simmim"] = "simmim"
    mask_ratio: float = 0.6
    mask_px: int = Field(32, ge=1, description="side of the squares that are hidden, in pixels")


class HOGSettings(Section):
    """Histograms of oriented gradients (MaskFeat's code): 3 x `bins` numbers per cell."""

    bins: int = Field(9, ge=1)
    cell: int = Field(
        0, ge=0, description="side of a cell in pixels; it divides the patch; 0: half of it, as published (8 of 16)"
    )
    gaussian: int = Field(
        0, ge=0, description="side of a Gaussian window on the votes; it divides the image; 0: none, as published"
    )


class MaskFeatSettings(Section):
    """MaskFeat (Wei et al. 2022): fill hidden patches with a mask token, predict a target by one linear layer.

    `target`: histograms (`hog`), pixels as MAE's (normalised or raw), or the final tokens of a frozen teacher,
    layer-normalised.
    """

    name: Literal["maskfeat"] = "maskfeat"
    masking: BlockMaskSettings = BlockMaskSettings(ratio=78 / 196, smallest=15 / 196)
    target: Literal["hog", "normalised", "raw", "teacher"] = "hog"
    hog: HOGSettings = HOGSettings()


class BEiTSettings(Section):
    """BEiT (Bao et al. 2022): predict the visual tokens of hidden patches, as a tokenizer names them."""

    name: Literal["beit"] = "beit"
    tokenizer: str = Field(
        "", description="run folder of the method dvae, or the weights of DALL-E's or a VQ model's encoder (a file)"
    )
    masking: BlockMaskSettings = BlockMaskSettings()


class DVAESettings(Section):
    """A small discrete VAE as tokenizer for BEiT (Ramesh et al. 2021; the sizes of BEiT's own class)."""

    name: Literal["dvae"] = "dvae"
    codes: int = Field(8192, ge=2, description="size of the codebook")
    dim: int = Field(256, ge=1, description="width of a code")
    hidden: int = Field(64, ge=1)
    layers: int = Field(3, ge=1, description="halvings: a token covers 2^layers pixels")
    residual_blocks: int = Field(1, ge=0)
    temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1.0, 0.0625), description="of Gumbel softmax, at the start and the end; half a cosine between them"
    )
    kl: float = Field(0.0, ge=0, description="weight of the divergence from using all codes alike")
    loss: Literal["mse", "smooth_l1"] = "mse"


class FeatureDecoderSettings(DecoderSettings):
    """A decoder that predicts features of the encoder's width."""

    dim: int = Field(0, ge=0, description="0: the encoder's width")


class BootMAESettings(Section):
    """BootMAE (Dong et al. 2022): pixels of hidden patches, and features of a momentum encoder, with context of low and
    high level by cross-attention.
    """

    name: Literal["bootmae"] = "bootmae"
    masking: BlockMaskSettings = BlockMaskSettings(
        ratio=120 / 196, smallest=16 / 196, largest=60 / 196, tries=0, exact=147 / 196
    )
    decoder: DecoderSettings = DecoderSettings()
    feature_decoder: FeatureDecoderSettings = FeatureDecoderSettings()
    weigh_inside: bool = Field(True, description="hidden patches among hidden ones weigh up to twice")
    feature_weight: float = Field(1.0, gt=0)
    feature_ramp: float = Field(0.25, ge=0, le=1, description="fraction of training in which its weight rises")
    momentum: tuple[Share, Share, Share] = Field(
        (0.999, 0.9999, 0.99999),
        description="first; after `momentum_knee` of the training; at its end. Meant for 250,000 steps",
    )
    momentum_knee: float = Field(0.25, gt=0, lt=1)


class DINOSettings(Section):
    """DINO (Caron et al. 2021): self-distillation between crops, with a centred and sharpened momentum teacher."""

    name: Literal["dino"] = "dino"
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    local_crops: int = Field(8, ge=0)
    local_size: int = Field(96, ge=1, description="pixels; divisible by the patch")
    outputs: int = Field(65536, ge=2)
    hidden: int = Field(2048, ge=1)
    bottleneck: int = Field(256, ge=1)
    norm_last_layer: bool = Field(
        True,
        description="the last layer's rows have length 1; false: trained lengths (advised for ViT-Small and below)",
    )
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: tuple[float, float] = (0.04, 0.04)
    temperature_warmup: float = Field(0.0, ge=0, le=1, description="fraction of training in which it rises")
    momentum: tuple[float, float] = (0.996, 1.0)
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    clip: float = Field(3.0, ge=0, description="largest gradient norm of each tensor by itself; 0: off")
    freeze_last: float = Field(
        0.01, ge=0, le=1, description="fraction of training before the last layer learns (published: 1 of 100 epochs)"
    )


class MoCoV3Settings(Section):
    """MoCo v3 (Chen et al. 2021): contrast between two views, with a momentum encoder for the keys."""

    name: Literal["mocov3"] = "mocov3"
    temperature: float = Field(0.2, gt=0)
    momentum: float = Field(0.99, ge=0, lt=1, description="at the start; it rises to 1 by half a cosine")
    hidden: int = Field(4096, ge=1)
    outputs: int = Field(256, ge=1)
    fixed_patches: bool = Field(False, description="patch projection stays random (the original ViT recipe)")


class MaskedFeatureSettings(Section):
    """iTPN's masked feature modelling (the paper's equation 4; its code was never published): linear maps of the
    pyramid's levels predict the stages of a moving average of the encoder.
    """

    weight: float = Field(0.3, ge=0, description="0: off, and no second encoder")
    momentum: float = Field(0.996, ge=0, lt=1, description="of the moving average, after every step")
    input: Literal["visible", "full"] = Field(
        "visible", description="what the averaged encoder sees; full: whole images (visible patches are compared)"
    )
    target_norm: bool = Field(False, description="layer norm without weights on the targets")


class ITPNSettings(Section):
    """iTPN (Tian et al. 2023) on pixels: MAE on an encoder with a feature pyramid, and masked feature modelling."""

    name: Literal["itpn"] = "itpn"
    mask_ratio: float = 0.75
    target: Literal["normalised", "raw"] = "normalised"
    decoder: DecoderSettings = DecoderSettings()
    features: MaskedFeatureSettings = MaskedFeatureSettings()


class ITPNClipSettings(Section):
    """iTPN and Fast-iTPN with a frozen teacher, such as CLIP's images: hidden patches are filled, and the pyramid's
    levels together predict the teacher's patch tokens.

    `form` leak_free: hidden patches are filled before stage 1 (Fast-iTPN). compat: after the second merge, as iTPN's
    released code does, whose pyramid still sees the hidden pixels; there `supervise` auto is all patches, else the
    hidden ones.
    """

    name: Literal["itpn_clip"] = "itpn_clip"
    form: Literal["leak_free", "compat"] = "leak_free"
    masking: BlockMaskSettings = BlockMaskSettings()
    loss: Literal["smooth_l1", "cosine"] = Field("smooth_l1", description="cosine: minus its mean (Fast-iTPN)")
    supervise: Literal["auto", "masked", "all"] = "auto"
    auxiliary: bool = Field(
        False, description="a second prediction, from three quarters of stage 3 on (iTPN's released code)"
    )
    target_projection: bool = Field(
        True, description="targets in the space that a CLIP's images share with its texts, where the teacher has one"
    )
    target_norm: bool = Field(True, description="layer norm without weights on the targets (Fast-iTPN: false)")
    patch_gradient: float = Field(
        1.0, gt=0, le=1, description="factor on the gradient of the patch embedding (Fast-iTPN: 0.1)"
    )


class LabelDistillation(Section):
    """Distillation from a classifier (the section `teacher` names it).

    `token` class: mean pooling is judged and the class token answers to the teacher (MAE-lite); distillation: the class
    token is judged, and a further token answers to the teacher (G2SD's specific stage, as in DeiT).
    """

    kind: Literal["none", "soft", "hard"] = "none"
    token: Literal["class", "distillation"] = "class"
    weight: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)


class ClassifySettings(Section):
    """Supervised classification: from scratch (no `encoder.weights`) or fine-tuning."""

    name: Literal["classify"] = "classify"
    classes: int = Field(0, ge=0, description="0: as many as the data has")
    pool: Literal["mean", "class"] = "mean"
    smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    erasing: float = Field(0.0, ge=0, le=1)
    ema_decay: float = Field(0.0, ge=0, lt=1, description="judge a moving average of the weights; 0: off")
    loss: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="sigmoid: each class by itself, the head's bias starts at -10 (AugReg's pre-training)"
    )
    head_scale: float = Field(1.0, gt=0, description="multiplies the head's initial weights (0.001 in the RPE recipe)")
    distill: LabelDistillation = LabelDistillation()


class LinearProbeSettings(Section):
    """Linear probing by MAE's protocol: frozen encoder, batch norm without affine, linear layer."""

    name: Literal["linear_probe"] = "linear_probe"
    classes: int = Field(0, ge=0)
    pool: Literal["mean", "class"] = "class"


MethodSettings = (
    MAESettings
    | DMAESettings
    | TinyMIMSettings
    | MIMHDSettings
    | G2SDSettings
    | DMAEFeaturesSettings
    | SimMIMSettings
    | MaskFeatSettings
    | BEiTSettings
    | DVAESettings
    | BootMAESettings
    | DINOSettings
    | MoCoV3Settings
    | ITPNSettings
    | ITPNClipSettings
    | ClassifySettings
    | LinearProbeSettings
)


@dataclass(frozen=True)
class Entry:
    """Where a method lives and what it needs. `encoder`: whether what it trains and exports is one."""

    settings: type[Section]
    where: str
    labels: bool = False
    teacher: bool = False
    encoder: bool = True

    def load(self) -> type[Method]:
        """Imports the class (and with it torch)."""
        cls: type[Method] = load_class(self.where)
        return cls


def load_class(where: str) -> Any:
    """The class that `module:Class` names."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


METHODS: dict[str, Entry] = {
    "mae": Entry(MAESettings, "mimlet.methods.mae:MAE"),
    "dmae": Entry(DMAESettings, "mimlet.methods.dmae:DMAE", teacher=True),
    "tinymim": Entry(TinyMIMSettings, "mimlet.methods.tinymim:TinyMIM", teacher=True),
    "mimhd": Entry(MIMHDSettings, "mimlet.methods.mimhd:MIMHD", teacher=True),
    "g2sd": Entry(G2SDSettings, "mimlet.methods.g2sd:G2SD", teacher=True),
    "dmae_features": Entry(DMAEFeaturesSettings, "mimlet.methods.dmae_features:DMAEFeatures", teacher=True),
    "simmim": Entry(SimMIMSettings, "mimlet.methods.simmim:SimMIM"),
    "maskfeat": Entry(MaskFeatSettings, "mimlet.methods.maskfeat:MaskFeat"),
    "beit": Entry(BEiTSettings, "mimlet.methods.beit:BEiT"),
    "dvae": Entry(DVAESettings, "mimlet.methods.dvae:DVAE", encoder=False),
    "bootmae": Entry(BootMAESettings, "mimlet.methods.bootmae:BootMAE"),
    "dino": Entry(DINOSettings, "mimlet.methods.dino:DINO"),
    "mocov3": Entry(MoCoV3Settings, "mimlet.methods.mocov3:MoCoV3"),
    "itpn": Entry(ITPNSettings, "mimlet.methods.itpn:ITPN"),
    "itpn_clip": Entry(ITPNClipSettings, "mimlet.methods.itpn_clip:ITPNClip", teacher=True),
    "classify": Entry(ClassifySettings, "mimlet.tasks.classify:Classify", labels=True),
    "linear_probe": Entry(LinearProbeSettings, "mimlet.tasks.probe:LinearProbe", labels=True),
}
