"""The pre-training baselines written straight down, as their released codes are: every patch is encoded, predicted and
compared, then masked; attention is formed whole; followers and tensors are visited one by one.

Parts carry our names, so that `plain.fill` gives both formulations the same weights, and so the same loss. Letters as
in `plain`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import Step, images, trainer
from benchmarks.plain import Case, Mlp, fill, rows, target

HIDDEN = {"simmim": 120 / 196, "maskfeat": 78 / 196, "beit": 75 / 196, "bootmae": 147 / 196}
RAGGED = ("maskfeat", "beit")
"""Methods whose images hide different numbers of patches."""


@dataclass(frozen=True)
class Baseline(Case):
    """A method without a teacher, and its sizes: of BEiT's codebook, of DINO's head and of MoCo-v3's."""

    codes: int = 8192
    outputs: int = 65536
    hidden: int = 4096
    locals: int = 8

    @property
    def local_size(self) -> int:
        """Side of DINO's small crops: 96 px of 224."""
        return self.size * 3 // 7 // self.patch * self.patch


def inputs(case: Baseline, batch: int) -> dict[str, Tensor]:
    """Views by name; where the method masks, `noise` and `hidden` [B,N], which hides the patches of most noise; for
    BEiT `ids` [B,N], the names of the patches.
    """
    made = {"image": images(batch, case.size)}
    if case.method == "mocov3":
        return {"view1": made["image"], "view2": images(batch, case.size).flip(0)}
    if case.method == "dino":
        made = {f"global{i}": images(batch, case.size).roll(i, 2) for i in range(2)}
        return made | {f"local{i}": images(batch, case.local_size).roll(i, 2) for i in range(case.locals)}
    generator = torch.Generator().manual_seed(1)
    made["noise"] = torch.rand(batch, case.patches, generator=generator)
    count = round(HIDDEN[case.method] * case.patches) - torch.arange(batch)[:, None] % (
        2 if case.method in RAGGED else 1
    )
    made["hidden"] = made["noise"].argsort(1).argsort(1) >= case.patches - count
    if case.method == "beit":
        made["ids"] = torch.randint(case.codes, (batch, case.patches), generator=generator)
    return made


class Attention(nn.Module):
    """With biases of queries and values alone where `qv`; `bias` [H,T,T] is added to the logits."""

    def __init__(self, dim: int, heads: int, qv: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=not qv), nn.Linear(dim, dim)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qv else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qv else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        B, T, D = x.shape
        shift: Tensor = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            shift = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, shift).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        logits = q * (D // self.heads) ** -0.5 @ k.transpose(-2, -1)
        heads = (logits if bias is None else logits + bias).softmax(-1) @ v
        out: Tensor = self.proj(heads.transpose(1, 2).reshape(B, T, D))
        return out


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, qv: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, qv), Mlp(dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class RelativeBias(nn.Module):
    """BEiT's: one table of offsets between patches and three of the class token's."""

    index: Tensor

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        last = (2 * side - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(last + 3, heads))
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        between = places[:, :, None] - places[:, None, :] + side - 1
        index = torch.zeros(side * side + 1, side * side + 1, dtype=torch.long)
        index[1:, 1:] = between[0] * (2 * side - 1) + between[1]
        index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """[H,T,T]."""
        return self.relative_position_bias_table[self.index].permute(2, 0, 1)


class ViT(nn.Module):
    """`outputs` keeps what the first and the last block made."""

    def __init__(self, case: Case, positions: str = "learned", qv: bool = False, relative: bool = False) -> None:
        super().__init__()
        dim, heads = case.student.dim, case.student.heads
        self.side = case.size // case.patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, case.patch, case.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = nn.Parameter(torch.zeros(1, 1 + case.patches, dim), requires_grad=positions == "learned")
        self.pos_embed = None if positions == "none" else table
        self.rel_pos_bias = RelativeBias(self.side, heads) if relative else None
        self.blocks = nn.ModuleList(Block(dim, heads, qv) for _ in range(case.student.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.outputs: list[Tensor] = []

    def forward(
        self, pixels: Tensor, hidden: Tensor | None = None, token: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Hidden patches [B,N] become `token`; or only the patches `keep` [B,V] go on."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        if hidden is not None and token is not None:
            w = hidden[..., None].to(x.dtype)
            x = x * (1 - w) + token * w
        first: Tensor = self.cls_token
        table = self.table(pixels.shape[-1] // self.patch)
        if table is not None:
            x, first = x + table[:, 1:], first + table[:, :1]
        if keep is not None:
            x = rows(x, keep)
        x = torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], 1)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        self.outputs = []
        for block in self.blocks:
            x = block(x, bias)
            self.outputs.append(x)
        out: Tensor = self.norm(x)
        return out

    @property
    def patch(self) -> int:
        convolution = self.patch_embed["proj"]
        assert isinstance(convolution, nn.Conv2d)
        return convolution.kernel_size[0]

    def table(self, side: int) -> Tensor | None:
        """Positions for a grid of another size."""
        if self.pos_embed is None or side == self.side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], 1)


class Plain(nn.Module):
    """A method: its loss of `inputs`, and what comes between gradients and step, and after it."""

    followers: dict[str, str] = {}

    def begin(self) -> None:
        """Once the weights are there."""

    def clip(self) -> None:
        """After backward."""

    def follow(self, momentum: float) -> None:
        """After the optimiser's step."""
        for follower, leader in self.followers.items():
            pairs = zip(getattr(self, follower).parameters(), getattr(self, leader).parameters(), strict=True)
            for mine, theirs in pairs:
                mine.data = mine.data * momentum + theirs.detach().data * (1 - momentum)


class PlainSimMIM(Plain):
    def __init__(self, case: Baseline) -> None:
        super().__init__()
        dim = case.student.dim
        self.patch = case.patch
        self.encoder = ViT(case, "none", qv=True, relative=True)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.head = nn.Linear(dim, 3 * case.patch**2)

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        pixels, hidden = given["image"], given["hidden"]
        x = self.encoder(pixels, hidden, self.mask_token)[:, 1:]
        side = round(x.shape[1] ** 0.5)
        x = F.pixel_shuffle(self.head(x).transpose(1, 2).reshape(len(x), -1, side, side), self.patch)
        mask = hidden.view(-1, 1, side, side).float()
        mask = mask.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return ((pixels - x).abs() * mask).sum() / (mask.sum() + 1e-5) / 3


class PlainMaskFeat(Plain):
    across: Tensor
    down: Tensor

    def __init__(self, case: Baseline) -> None:
        super().__init__()
        dim = case.student.dim
        self.cell = case.patch // 2
        self.encoder = ViT(case)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.head = nn.Linear(dim, 108)
        kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(3, 1, 3, 3)
        self.register_buffer("across", kernel.contiguous(), persistent=False)
        self.register_buffer("down", kernel.transpose(2, 3).contiguous(), persistent=False)

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        prediction = self.head(self.encoder(given["image"], given["hidden"], self.mask_token)[:, 1:])
        hidden = given["hidden"]
        return F.mse_loss(prediction[hidden].float(), self.hog(given["image"])[hidden])

    @torch.no_grad()
    def hog(self, pixels: Tensor) -> Tensor:
        """Nine orientations in every cell and channel."""
        padded = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
        with torch.autocast("cpu", enabled=False):
            dx, dy = (F.conv2d(padded, kernel, groups=3) for kernel in (self.across, self.down))
        number = (torch.atan2(dx, dy) / torch.pi * 9).floor().long() % 9
        votes = torch.zeros(len(pixels), 3, 9, *pixels.shape[2:])
        votes.scatter_add_(2, number.unsqueeze(2), torch.stack([dx, dy], -1).norm(dim=-1).unsqueeze(2))
        cells = votes.unfold(3, self.cell, self.cell).unfold(4, self.cell, self.cell).sum((-1, -2))
        cells = F.normalize(cells, dim=2).flatten(1, 2)
        patches = cells.unfold(2, 2, 2).unfold(3, 2, 2)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)


class PlainBEiT(Plain):
    """The names of patches are given: what names them is not part of the comparison."""

    def __init__(self, case: Baseline) -> None:
        super().__init__()
        self.encoder = ViT(case, qv=True)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, case.student.dim))
        self.lm_head = nn.Linear(case.student.dim, case.codes)

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        hidden = given["hidden"]
        x = self.encoder(given["image"], hidden, self.mask_token)[:, 1:]
        return F.cross_entropy(self.lm_head(x[hidden]).float(), given["ids"][hidden])


class CrossAttention(nn.Module):
    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(context, 2 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, T, D = x.shape
        q = F.linear(x, self.q.weight, self.q_bias).reshape(B, T, self.heads, -1).transpose(1, 2)
        kv = F.linear(context, self.kv.weight, torch.cat([torch.zeros_like(self.v_bias), self.v_bias]))
        k, v = kv.reshape(B, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        logits = q * (D // self.heads) ** -0.5 @ k.transpose(-2, -1)
        out: Tensor = self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))
        return out


class CrossBlock(nn.Module):
    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.norm4 = nn.LayerNorm(context, eps=1e-6)
        self.attn, self.c_attn = Attention(dim, heads, qv=True), CrossAttention(dim, context, heads)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.c_attn(self.norm3(x), self.norm4(context))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CrossDecoder(nn.Module):
    """Un-shuffles, and predicts every patch."""

    positions: Tensor

    def __init__(self, case: Case, dim: int, heads: int, pred: nn.Module) -> None:
        super().__init__()
        width, side = case.student.dim, case.size // case.patch
        self.embed, self.mask_token = nn.Linear(width, dim), nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos(dim, side), persistent=False)
        self.blocks = nn.ModuleList([CrossBlock(dim, width, heads)])
        self.norm, self.pred = nn.LayerNorm(dim, eps=1e-6), pred

    def forward(self, latent: Tensor, context: Tensor, restore: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(latent)
        blank = (self.mask_token + self.positions).expand(len(x), -1, -1).to(x.dtype)
        places = restore.argsort(1)[:, keep.shape[1] :]
        patches = rows(torch.cat([x[:, 1:], rows(blank, places)], 1), restore)
        x = torch.cat([x[:, :1], patches], 1)
        for block in self.blocks:
            x = block(x, context)
        out: Tensor = self.norm(x)[:, 1:]
        return out


def sincos(dim: int, side: int) -> Tensor:
    """MAE's table [N,D]."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).float()


class PlainBootMAE(Plain):
    followers = {"target": "encoder"}

    def __init__(self, case: Baseline) -> None:
        super().__init__()
        dim, self.case = case.student.dim, case
        self.encoder = ViT(case, "fixed", qv=True)
        self.target = ViT(case, "fixed", qv=True).requires_grad_(False)
        pixels = nn.ModuleDict({"proj": nn.ConvTranspose2d(dim // 2, 3, case.patch, case.patch)})
        self.decoder = CrossDecoder(case, dim // 2, 3, pixels)
        self.feature_decoder = CrossDecoder(case, dim, 3, nn.Linear(dim, dim))

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        pixels, hidden, shuffle = given["image"], given["hidden"], given["noise"].argsort(1)
        keep, restore = shuffle[:, : int((~hidden[0]).sum())], shuffle.argsort(1)
        side, dim = self.case.size // self.case.patch, self.case.student.dim
        latent = self.encoder(pixels, keep=keep)
        low, high = self.encoder.outputs[0], self.encoder.outputs[-1]
        with torch.no_grad():
            self.target(pixels)
            expected = F.layer_norm(self.target.outputs[-1][:, 1:].float(), (dim,), eps=1e-6)
        features = self.feature_decoder.pred(self.feature_decoder(latent, high, restore, keep)).float()
        error = (F.layer_norm(features, (dim,), eps=1e-6) - expected).square().mean(-1)
        x = self.decoder(latent, low, restore, keep).transpose(1, 2).reshape(len(pixels), -1, side, side)
        projection = self.decoder.pred
        assert isinstance(projection, nn.ModuleDict)
        picture = target(projection["proj"](x).float(), self.case.patch, False)
        wanted = target(pixels, self.case.patch, False).reshape(*hidden.shape, -1, 3)
        wanted = (wanted - wanted.mean(2, keepdim=True)) / (wanted.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        mask = hidden.float()
        around = F.avg_pool2d(mask.view(-1, 1, side, side), 3, stride=1, padding=1).flatten(1)
        weights = mask * (1 + around)
        pixel_error = (picture - wanted.flatten(2)).square().mean(-1)
        return sum(((weights * e).mean() / mask.mean() for e in (pixel_error, error)), torch.zeros(()))


class Head(nn.Module):
    """DINO's."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        self.last_layer = nn.Linear(256, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.last_layer.weight))


class PlainDINO(Plain):
    followers = {"encoder": "student", "head": "student_head"}
    centre: Tensor

    def __init__(self, case: Baseline) -> None:
        super().__init__()
        dim, outputs = case.student.dim, case.outputs
        self.student, self.encoder = ViT(case), ViT(case).requires_grad_(False)
        self.student_head, self.head = Head(dim, outputs), Head(dim, outputs).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(1, outputs))

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        crops = list(given.values())
        with torch.no_grad():
            answers = self.head(self.encoder(torch.cat(crops[:2]))[:, 0]).float()
            shares = ((answers - self.centre) / 0.04).softmax(-1).chunk(2)
            self.answers = answers
        tokens = [self.student(torch.cat(group))[:, 0] for group in (crops[:2], crops[2:])]
        scores = (self.student_head(torch.cat(tokens)).float() / 0.1).chunk(len(crops))
        losses = [
            -(share * score.log_softmax(-1)).sum(-1).mean()
            for i, share in enumerate(shares)
            for j, score in enumerate(scores)
            if i != j
        ]
        return torch.stack(losses).mean()

    def clip(self) -> None:
        for part in (self.student, self.student_head):
            for parameter in part.parameters():
                if parameter.grad is not None:
                    factor = 3.0 / (parameter.grad.norm(2) + 1e-6)
                    if factor < 1:
                        parameter.grad.mul_(factor)

    def follow(self, momentum: float) -> None:
        super().follow(momentum)
        self.centre = self.centre * 0.9 + self.answers.mean(0, keepdim=True) * 0.1


def projector(layers: int, dim: int, hidden: int) -> nn.Sequential:
    """MoCo-v3's."""

    def parts() -> Iterator[nn.Module]:
        for width in [dim, *[hidden] * (layers - 2)]:
            yield from (nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
        yield from (nn.Linear(hidden, 256, bias=False), nn.BatchNorm1d(256, affine=False))

    return nn.Sequential(*parts())


class PlainMoCoV3(Plain):
    followers = {"momentum_encoder": "encoder", "momentum_projector": "projector"}

    def __init__(self, case: Baseline) -> None:
        super().__init__()
        self.encoder, self.projector = ViT(case, "fixed"), projector(3, case.student.dim, case.hidden)
        self.predictor = projector(2, 256, case.hidden)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def begin(self) -> None:
        for follower, leader in self.followers.items():
            getattr(self, follower).load_state_dict(getattr(self, leader).state_dict())

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        one, two = given["view1"], given["view2"]
        queries = [self.predictor(self.projector(self.encoder(view)[:, 0])) for view in (one, two)]
        with torch.no_grad():
            keys = [self.momentum_projector(self.momentum_encoder(view)[:, 0]) for view in (two, one)]
        loss = torch.zeros(())
        for q, k in zip(queries, keys, strict=True):
            logits = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T / 0.2
            loss = loss + 2 * 0.2 * F.cross_entropy(logits.float(), torch.arange(len(q)))
        return loss


BASELINES: dict[str, Callable[[Baseline], Plain]] = {
    "simmim": PlainSimMIM,
    "maskfeat": PlainMaskFeat,
    "beit": PlainBEiT,
    "bootmae": PlainBootMAE,
    "dino": PlainDINO,
    "mocov3": PlainMoCoV3,
}
MOMENTUM = {"bootmae": 0.999, "dino": 0.996, "mocov3": 0.99}


def step(batch: int, bf16: bool, case: Baseline) -> Step:
    model, given = BASELINES[case.method](case), inputs(case, batch)
    fill(model)
    model.begin()
    return trainer(
        model, lambda: model(given), bf16, False, model.clip, lambda: model.follow(MOMENTUM.get(case.method, 1.0))
    )


def transformers_simmim(batch: int, bf16: bool, case: Baseline) -> Step:
    """SimMIM on a plain ViT: with absolute positions, without relative ones."""
    from transformers import ViTConfig, ViTForMaskedImageModeling

    config = ViTConfig(
        hidden_size=case.student.dim, num_hidden_layers=case.student.depth, num_attention_heads=case.student.heads,
        intermediate_size=4 * case.student.dim, image_size=case.size, patch_size=case.patch, encoder_stride=case.patch,
    )  # fmt: skip
    model, given = ViTForMaskedImageModeling(config).train(), inputs(case, batch)
    return trainer(model, lambda: model(given["image"], bool_masked_pos=given["hidden"]).loss, bf16, fused=False)


def transformers_beit(batch: int, bf16: bool, case: Baseline) -> Step:
    """BEiT with absolute positions; a LayerScale of 0 is none."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = BeitConfig(
        hidden_size=case.student.dim, num_hidden_layers=case.student.depth, num_attention_heads=case.student.heads,
        intermediate_size=4 * case.student.dim, image_size=case.size, patch_size=case.patch, vocab_size=case.codes,
        use_mask_token=True, use_absolute_position_embeddings=True, layer_scale_init_value=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    model, given = BeitForMaskedImageModeling(config).train(), inputs(case, batch)
    labels = given["ids"][given["hidden"]]
    return trainer(
        model, lambda: model(given["image"], bool_masked_pos=given["hidden"], labels=labels).loss, bf16, fused=False
    )
