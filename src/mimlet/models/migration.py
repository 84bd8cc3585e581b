"""Token migration: tokens that others resemble leave on the way through the blocks, and come back at the end
(Fast-iTPN, section on token migration; similarity as in ToMe, Bolya et al. 2023). For dense inputs, where tokens are
many: what comes after the blocks (a pyramid, a detector) gets a whole map, while later blocks compute fewer tokens.

The paper leaves open in detail what is dropped; the rules here: keys of the block's own attention, mean over heads,
normalised; the tokens of a window in their order are dealt to two sets in turn; a token of the first set scores its
largest cosine similarity to one of the second; those with the highest scores leave, after the attention residual of the
block and before its MLP. Others keep their order. Tokens come back unchanged, at their places.

Letters: B images, N patches, n tokens that are still on their way, P prefix tokens, D width, d head width.
"""

from __future__ import annotations

from contextlib import nullcontext
from fractions import Fraction
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mimlet.errors import ConfigError

Groups = tuple[tuple[int, int], ...]
"""Windows of tokens, one after another: (how many, tokens in each) for each run of windows of one size."""


def leaving(ratio: float, tokens: int, blocks: int) -> list[int]:
    """How many tokens of a window leave in each block: floor(ratio x tokens) in all, spread evenly."""
    if not 0 <= ratio < 1:
        raise ConfigError(f"encoder.migration {ratio}: expected a share of the tokens, at least 0 and less than 1")
    total = int(Fraction(str(ratio)) * tokens)
    ends = [total * block // blocks for block in range(blocks + 1)]
    return [after - before for before, after in pairwise(ends)]


def choose(keys: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Keys [...,n,d] of windows, mean over heads -> which tokens leave [...,number] and which stay [...,n-number], both
    ascending. `number` is at most n / 2. Of equal scores the first leaves. In the type of the keys even under autocast.
    """
    autocast = torch.is_autocast_enabled(keys.device.type)
    with torch.autocast(keys.device.type, enabled=False) if autocast else nullcontext():
        keys = F.normalize(keys.detach(), dim=-1)
        scores = (keys[..., ::2, :] @ keys[..., 1::2, :].transpose(-2, -1)).amax(-1)
    ranked = 2 * scores.sort(dim=-1, descending=True, stable=True).indices
    second = torch.arange(1, keys.shape[-2], 2, device=keys.device).expand(*keys.shape[:-2], -1)
    staying = torch.cat([ranked[..., number:], second], dim=-1)
    return ranked[..., :number].sort(dim=-1).values, staying.sort(dim=-1).values


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B or 1,K] of x [B,T,D]: [B,K,D]."""
    B, T, D = x.shape
    rows = index + T * torch.arange(B, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(B, -1, D)


class Migration:
    """The tokens of one pass: which are still on their way, where they belong, and which have left.

    `places` [B or 1,n]: numbers, in raster order, of the patches whose tokens are on their way, window by window as
    `groups` says; one row as long as it is the same for all images. `blocks` counts those that let tokens leave.
    """

    def __init__(self, places: Tensor, groups: Groups, ratio: float, blocks: int) -> None:
        self.places, self.groups = places[None], groups
        self.plan = [leaving(ratio, tokens, blocks) for _, tokens in groups]
        self.left: list[tuple[Tensor, Tensor]] = []

    def step(self, block: int, x: Tensor, keys: Tensor) -> Tensor:
        """Lets tokens leave in `block` (from 0): prefix and tokens [B,P+n,D], keys [B,H,P+n,d] -> those that stay."""
        numbers = [min(plan[block], tokens // 2) for plan, (_, tokens) in zip(self.plan, self.groups, strict=True)]
        if not any(numbers):
            return x
        prefix = x.shape[1] - self.places.shape[1]
        means = keys.mean(1, dtype=torch.promote_types(keys.dtype, torch.float32))[:, prefix:]
        windows = torch.split(means, [count * tokens for count, tokens in self.groups], dim=1)
        going, staying, start = [], [torch.arange(prefix, device=x.device).expand(x.shape[0], -1)], prefix
        for number, (count, tokens), window in zip(numbers, self.groups, windows, strict=True):
            rows = start + torch.arange(count * tokens, device=x.device)
            start += count * tokens
            if number:
                goes, stays = choose(window.view(x.shape[0], count, tokens, -1), number)
                firsts = rows[::tokens, None]
                going.append((firsts + goes).flatten(1))
                staying.append((firsts + stays).flatten(1))
            else:
                staying.append(rows.expand(x.shape[0], -1))
        gone, stayed = torch.cat(going, dim=1), torch.cat(staying, dim=1)
        places = self.places.expand(x.shape[0], -1)
        self.left.append((take(x, gone), places.gather(1, gone - prefix)))
        self.places = places.gather(1, stayed[:, prefix:] - prefix)
        self.groups = tuple(
            (count, tokens - number) for number, (count, tokens) in zip(numbers, self.groups, strict=True)
        )
        return take(x, stayed)

    def whole(self, x: Tensor) -> Tensor:
        """Prefix and tokens [B,P+n,D], with those that have left back at their places: [B,P+N,D], raster order."""
        prefix = x.shape[1] - self.places.shape[1]
        places = torch.cat([self.places, *(places for _, places in self.left)], dim=1)
        tokens = take(torch.cat([x[:, prefix:], *(tokens for tokens, _ in self.left)], dim=1), places.argsort(dim=1))
        return torch.cat([x[:, :prefix], tokens], dim=1)
