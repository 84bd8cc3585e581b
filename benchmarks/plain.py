"""MAE and the distillation methods written straight down: ordinary modules, every map formed and kept, the teacher run
to its end.

Parts carry our names, and `fill` gives a parameter values that follow from its name and shape: so two formulations of
a method have the same weights, and the same loss. Letters: B images, N patches, T tokens, D width, H heads, d head
width.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import Step, images, trainer


@dataclass(frozen=True)
class Shape:
    dim: int
    depth: int
    heads: int


TINY, SMALL, BASE = Shape(192, 12, 12), Shape(384, 12, 12), Shape(768, 12, 12)
LARGE = Shape(1024, 24, 16)


@dataclass(frozen=True)
class Case:
    """A method and the sizes to run it at. `decoder`: the teacher's; `student_decoder`: of G2SD; D-MAE's kind have one
    block of half the student's width with 3 heads.
    """

    method: str
    student: Shape = TINY
    teacher: Shape = BASE
    decoder: Shape = Shape(512, 8, 16)
    student_decoder: Shape = Shape(128, 4, 4)
    size: int = 224
    patch: int = 16

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2

    @property
    def teacher_block(self) -> int:
        """Block whose relations are imitated: the last, or three quarters up a deeper teacher (MAE-L: 18 of 24)."""
        return self.teacher.depth * 3 // 4 if self.teacher.depth > self.student.depth else self.teacher.depth

    @property
    def decoded_block(self) -> int:
        """Block that D²-MAE's decoder reads: 8 of 12."""
        return self.student.depth * 2 // 3


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, without the path to the term of a method that holds them."""
    return {re.sub(r"^terms\.terms\.\d+\.", "", name): parameter for name, parameter in model.named_parameters()}


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Gives every parameter the values that its name stands for."""
    for name, parameter in parameters(model).items():
        parameter.copy_(drawn(name, parameter.shape))


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Matrices get a variance of 1 / inputs, norms a weight near 1, other vectors values near 0."""
    draws: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) == 1:
        centre = float("norm" in name and name.endswith("weight"))
        return draws * 0.02 + centre
    return draws / math.sqrt(shape[1:].numel())


def noises(batch: int, case: Case) -> Callable[[], Tensor]:
    """The noise [B,N] of one step's mask after the other."""
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.rand(batch, case.patches, generator=generator)


class Attention(nn.Module):
    """Keeps queries, keys, values and logits, as code with forward hooks does."""

    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads)
        self.q, self.k, self.v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        self.logits = self.q @ self.k.transpose(-2, -1) * (D // self.heads) ** -0.5
        heads = self.logits.softmax(-1) @ self.v
        out: Tensor = self.proj(heads.transpose(1, 2).reshape(B, T, D))
        return out


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Blocks(nn.ModuleList):
    """Blocks that keep the output of each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(Block(shape.dim, shape.heads) for _ in range(shape.depth))
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.outputs = []
        for block in self:
            x = block(x)
            self.outputs.append(x)
        return x

    def attention(self, number: int) -> Attention:
        block = self[number - 1]
        assert isinstance(block, Block)
        return block.attn


class ViT(nn.Module):
    """Embeds all patches, then gathers the visible ones."""

    def __init__(self, shape: Shape, case: Case) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, shape.dim, case.patch, case.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + case.patches, shape.dim), requires_grad=False)
        self.blocks = Blocks(shape)
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        if keep is not None:
            x = rows(x, keep)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        out: Tensor = self.norm(self.blocks(x))
        return out


class Decoder(nn.Module):
    """MAE's decoder: fills in the hidden patches, un-shuffles, decodes and predicts all of them."""

    def __init__(self, width: int, shape: Shape, case: Case) -> None:
        super().__init__()
        self.embed, self.mask_token = nn.Linear(width, shape.dim), nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + case.patches, shape.dim), requires_grad=False)
        self.blocks = Blocks(shape)
        self.norm, self.pred = nn.LayerNorm(shape.dim, eps=1e-6), nn.Linear(shape.dim, 3 * case.patch**2)

    def forward(self, latent: Tensor, restore: Tensor, blank: Tensor | None = None) -> Tensor:
        x = self.embed(latent)
        blank = self.mask_token if blank is None else blank
        hidden = blank.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1).to(x.dtype)
        patches = rows(torch.cat([x[:, 1:], hidden], 1), restore)
        x = self.blocks(torch.cat([x[:, :1], patches], 1) + self.pos_embed)
        out: Tensor = self.pred(self.norm(x))[:, 1:]
        return out


class PlainMAE(nn.Module):
    """MAE: no teacher."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.encoder, self.decoder = ViT(case.student, case), Decoder(case.student.dim, case.student_decoder, case)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        keep, restore = masking(noise, 0.75)
        return masked_error(self.decoder(self.encoder(pixels, keep), restore), pixels, keep, self.case.patch, True)


class Plain(nn.Module):
    """Student and teacher; a subclass adds its parts and says its loss of pixels [B,3,h,w] and noise [B,N]."""

    decoded = False

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.encoder = ViT(case.student, case)
        self.teacher = nn.ModuleDict({"encoder": ViT(case.teacher, case)})
        if self.decoded:
            self.teacher["decoder"] = Decoder(case.teacher.dim, case.decoder, case)
        self.teacher.requires_grad_(False).eval()

    @property
    def teacher_encoder(self) -> ViT:
        encoder = self.teacher["encoder"]
        assert isinstance(encoder, ViT)
        return encoder

    @property
    def teacher_decoder(self) -> Decoder:
        decoder = self.teacher["decoder"]
        assert isinstance(decoder, Decoder)
        return decoder


class PlainDMAE(Plain):
    """D-MAE."""

    normalise = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.decoder = Decoder(case.student.dim, Shape(case.student.dim // 2, 1, 3), case)
        self.add(case)

    def add(self, case: Case) -> None:
        self.head_maps = nn.ModuleList([nn.Conv2d(case.student.heads, case.teacher.heads, 1, bias=False)])

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        keep, restore = masking(noise, 0.75)
        with torch.no_grad():
            self.teacher_encoder(pixels, keep)
        latent = self.encoder(pixels, keep)
        prediction: Tensor = self.decoder(self.decoder_input(latent), restore)
        return masked_error(prediction, pixels, keep, self.case.patch, self.normalise) + self.distance()

    def decoder_input(self, latent: Tensor) -> Tensor:
        return latent

    def distance(self) -> Tensor:
        return self.logit_distance(self.encoder.blocks.attention(self.case.student.depth))

    def logit_distance(self, student: Attention) -> Tensor:
        expected = self.teacher_encoder.blocks.attention(self.case.teacher.depth).logits
        mapped: Tensor = self.head_maps[0](student.logits)
        return F.mse_loss(mapped, expected)


class PlainD2MAE(PlainDMAE):
    """D²-MAE as released: the decoder reads block 8, a thirteenth block's attention is compared."""

    def add(self, case: Case) -> None:
        super().add(case)
        self.extra = Block(case.student.dim, case.student.heads)

    def decoder_input(self, latent: Tensor) -> Tensor:
        out: Tensor = self.encoder.norm(self.encoder.blocks.outputs[self.case.decoded_block - 1])
        return out

    def distance(self) -> Tensor:
        self.extra(self.encoder.blocks.outputs[-1])
        return self.logit_distance(self.extra.attn)


class PlainDMAEFeatures(PlainDMAE):
    """DMAE: MAE on raw pixels, and block outputs at three quarters of the depth."""

    normalise = False

    def add(self, case: Case) -> None:
        self.projection = nn.Linear(case.student.dim, case.teacher.dim)

    def distance(self) -> Tensor:
        mine = self.encoder.blocks.outputs[self.case.student.depth * 3 // 4 - 1]
        expected = self.teacher_encoder.blocks.outputs[self.case.teacher.depth * 3 // 4 - 1]
        mine = F.normalize(self.projection(mine), dim=-1)
        return (F.normalize(expected, dim=-1) - mine).abs().mean()


class PlainTinyMIM(Plain):
    """TinyMIM: the last block's channels in as many heads as the teacher's."""

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher_encoder(pixels)
        self.encoder(pixels)
        mine = self.encoder.blocks.attention(self.case.student.depth)
        theirs = self.teacher_encoder.blocks.attention(self.case.teacher_block)
        q, k, v = (self.split(x) for x in (mine.q, mine.k, mine.v))
        qk = divergence(relation(theirs.q, theirs.k), relation(q, k))
        vv = divergence(relation(theirs.v, theirs.v), relation(v, v))
        return qk.mean() + vv.mean()

    def split(self, x: Tensor) -> Tensor:
        """[B,H,T,d] -> as many heads as the teacher has."""
        B, _, T, _ = x.shape
        return x.transpose(1, 2).reshape(B, T, self.case.teacher.heads, -1).transpose(1, 2)


class Pairing(nn.Module):
    """MIM-HD's weights of teacher heads for every student head, [B,M2,M1]."""

    def __init__(self, student_heads: int, teacher_heads: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(student_heads, 64), nn.Linear(teacher_heads, 64)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        weights: Tensor = self.q(similarity(student)) @ self.k(similarity(teacher)).transpose(-2, -1)
        return weights.float().softmax(-1)


class PlainMIMHDRelations(Plain):
    """MIM-HD's relations alone: every teacher head against every student head."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        heads = case.student.heads, case.teacher.heads
        self.matchings = nn.ModuleDict({"qk": Pairing(*heads), "vv": Pairing(*heads)})

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher_encoder(pixels)
        latent = self.encoder(pixels)
        mine = self.encoder.blocks.attention(self.case.student.depth)
        theirs = self.teacher_encoder.blocks.attention(self.case.teacher_block)
        qk = self.distance("qk", relation(mine.q, mine.k), relation(theirs.q, theirs.k))
        vv = self.distance("vv", relation(mine.v, mine.v), relation(theirs.v, theirs.v))
        return qk + vv + self.reconstruction(latent, pixels, noise)

    def distance(self, pair: str, student: Tensor, teacher: Tensor) -> Tensor:
        weights: Tensor = self.matchings[pair](student, teacher)
        every = divergence(teacher[:, None], student[:, :, None]).mean(-1)
        return (weights * every).sum(-1).mean()

    def reconstruction(self, latent: Tensor, pixels: Tensor, noise: Tensor) -> Tensor:
        return latent.new_zeros(())


class PlainMIMHD(PlainMIMHDRelations):
    """MIM-HD: and both halves of the student's tokens through the teacher's decoder."""

    decoded = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.adapter = nn.Linear(case.student.dim, case.teacher.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, case.decoder.dim))

    def reconstruction(self, latent: Tensor, pixels: Tensor, noise: Tensor) -> Tensor:
        tokens = self.adapter(latent)
        merged = torch.zeros((), device=pixels.device)
        for order in (noise, -noise):
            keep, restore = masking(order, 0.5)
            seen = torch.cat([tokens[:, :1], rows(tokens[:, 1:], keep)], 1)
            hidden = torch.ones_like(noise).scatter(1, keep, 0.0)
            merged = merged + self.teacher_decoder(seen, restore, self.mask_token) * hidden[..., None]
        return F.mse_loss(merged, target(pixels, self.case.patch, True))


class PlainG2SD(Plain):
    """G2SD's generic stage: the student's decoder against the middle of the teacher's."""

    decoded = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        small, large = case.student_decoder.dim, case.decoder.dim
        self.student_decoder = Decoder(case.student.dim, case.student_decoder, case)
        self.decoder_map = nn.Sequential(nn.Linear(small, large), nn.GELU(), nn.Linear(large, large))

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        keep, restore = masking(noise, 0.75)
        with torch.no_grad():
            self.teacher_decoder(self.teacher_encoder(pixels, keep), restore)
            expected = self.teacher_decoder.blocks.outputs[self.case.decoder.depth // 2 - 1]
            expected = F.layer_norm(expected, expected.shape[-1:], eps=1e-6)
        self.student_decoder(self.encoder(pixels, keep), restore)
        return F.smooth_l1_loss(self.decoder_map(self.student_decoder.blocks.outputs[-1]), expected, beta=2.0)


METHODS: dict[str, type[Plain]] = {
    "dmae": PlainDMAE,
    "d2mae": PlainD2MAE,
    "dmae_features": PlainDMAEFeatures,
    "tinymim": PlainTinyMIM,
    "mimhd_relations": PlainMIMHDRelations,
    "mimhd": PlainMIMHD,
    "g2sd": PlainG2SD,
}


def step(batch: int, bf16: bool, case: Case) -> Step:
    made = PlainMAE if case.method == "mae" else METHODS[case.method]
    model, pixels, noise = made(case), images(batch, case.size), noises(batch, case)
    fill(model)
    return trainer(model, lambda: model(pixels, noise()), bf16, fused=False)


def masking(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The visible patches [B,V], and where each patch is in the order visible, hidden [B,N]."""
    shuffle = noise.argsort(1)
    return shuffle[:, : int(noise.shape[1] * (1 - ratio))], shuffle.argsort(1)


def rows(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def target(pixels: Tensor, patch: int, normalise: bool) -> Tensor:
    """The patches [B,N,p*p*3]."""
    side = pixels.shape[-1] // patch
    patches = (
        pixels.reshape(len(pixels), 3, side, patch, side, patch)
        .permute(0, 2, 4, 3, 5, 1)
        .reshape(len(pixels), side * side, -1)
    )
    if not normalise:
        return patches
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_error(prediction: Tensor, pixels: Tensor, keep: Tensor, patch: int, normalise: bool) -> Tensor:
    """Mean squared error over the patches that are not kept; all are predicted."""
    error = (prediction - target(pixels, patch, normalise)).square().mean(-1)
    hidden = torch.ones_like(error).scatter(1, keep, 0.0)
    return (error * hidden).sum() / hidden.sum()


def relation(a: Tensor, b: Tensor) -> Tensor:
    """softmax(a b^T / sqrt(d)), [B,H,T,T]."""
    logits: Tensor = a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5
    return logits.float().softmax(-1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of every row, [...,T]."""
    return (teacher * (teacher.log() - student.log())).sum(-1)


def similarity(relations: Tensor) -> Tensor:
    """N f f^T of what each head pays to every token on average, [B,H,H]."""
    received = relations.mean(-2)
    alike: Tensor = relations.shape[-1] * received @ received.transpose(-2, -1)
    return alike
