"""Windows, gathering tokens and migration by the letter: one image, one window, one token at a time."""

import torch
from torch import Tensor

from mimlet.models.hivit import HiViT
from mimlet.models.migration import leaving
from mimlet.models.parts import Block
from mimlet.models.vit import ViT


def attention(block: Block, rows: Tensor, bias: Tensor, blank: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Rows [T,D] of one window after the attention residual, and their keys, mean over heads; `bias` [H,T,T] is added.
    `blank` rows of zeros are appended as padding, with masked keys.
    """
    T, H = len(rows), block.attn.heads
    y = torch.cat([block.norm1(rows), rows.new_zeros(blank, rows.shape[1])])
    q, k, v = block.attn.project(y[None])
    heads = []
    for h in range(H):
        logits = q[0, h] @ k[0, h].T / q.shape[-1] ** 0.5
        logits[:T, :T] = logits[:T, :T] + bias[h]
        logits[:, T:] = -torch.inf
        heads.append(logits.softmax(-1) @ v[0, h])
    out = block.attn.proj(torch.cat(heads, 1))[:T]
    return rows + (out if block.gamma_1 is None else block.gamma_1 * out), list(k[0, :, :T].mean(0))


def leavers(keys: list[Tensor], number: int) -> list[int]:
    """Indices of those that leave a window, best first."""
    similarity = {
        a: max(torch.cosine_similarity(keys[a], keys[b], dim=0).item() for b in range(1, len(keys), 2))
        for a in range(0, len(keys), 2)
        if len(keys) > 1
    }
    return sorted(similarity, key=lambda a: -similarity[a])[: min(number, len(keys) // 2)]


def mlp(block: Block, row: Tensor) -> Tensor:
    out = block.mlp(block.norm2(row[None]))[0]
    return row + (out if block.gamma_2 is None else block.gamma_2 * out)


def cross(part: torch.nn.Module, x: Tensor, others: Tensor) -> Tensor:
    """x [T,D] looks at others [S,D]."""
    y, z = part.norm_q(x), part.norm_kv(others)
    q, k, v = (f(t).chunk(part.heads, 1) for f, t in ((part.q_proj, y), (part.k_proj, z), (part.v_proj, z)))
    heads = [(a @ b.T / a.shape[1] ** 0.5).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
    return x + part.gamma * part.proj(torch.cat(heads, 1))


def entry(query: int, key: int, columns: int, rows: int, width: int) -> int:
    """Row of a table of relative positions, of windows of `rows` x `width`."""
    down, right = query // columns - key // columns, query % columns - key % columns
    return (down + rows - 1) * (2 * width - 1) + right + width - 1


def image_bias(encoder: HiViT, block: Block, rows: Tensor, places: list[int], columns: int) -> Tensor:
    """Bias [H,T,T] of a block that attends to the whole image."""
    H, S, T = encoder.heads, encoder.grid[0], len(places)
    bias = rows.new_zeros(H, T, T)
    if encoder.shape.relative == "none":
        return bias
    q = block.attn.project(block.norm1(rows)[None])[0][0]
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            if encoder.shape.relative == "full":
                bias[:, i, j] = block.attn.relative_position_bias_table[entry(a, b, columns, S, S)]
            else:
                down, right = a // columns - b // columns + S - 1, a % columns - b % columns + S - 1
                bias[:, i, j] = q[:, i] @ (block.attn.rel_pos_h[down] + block.attn.rel_pos_w[right])
    return bias


def stage3(encoder: HiViT, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Stage 3 of one image: tokens [N,C] -> [N,C], before the norm."""
    shape, columns = encoder.shape, grid[1]
    side = shape.window or max(grid)
    windows: dict[tuple[int, int], list[int]] = {}
    for place in range(len(tokens)):
        windows.setdefault((place // columns // side, place % columns // side), []).append(place)
    plan = {w: leaving(shape.migration, len(places), shape.stages[2]) for w, places in windows.items()}
    now, left = dict(enumerate(tokens)), dict[int, Tensor]()
    gathering = {} if encoder.gathering_token is None else dict.fromkeys(windows, encoder.gathering_token[0, 0])
    for layer, block in enumerate(list(encoder.blocks)[encoder.inner + 2 :]):
        keys: dict[int, Tensor] = {}
        windowed = bool(shape.window) and layer + 1 not in shape.global_blocks
        if windowed:
            for w, places in windows.items():
                lead = [gathering[w]] if gathering else []
                bias = tokens.new_zeros(shape.heads, len(lead) + len(places), len(lead) + len(places))
                if shape.window_relative:
                    table = encoder.window_rpe[str(layer)]
                    n = len(lead)
                    for i, a in enumerate(places):
                        for j, b in enumerate(places):
                            bias[:, n + i, n + j] = table[entry(a, b, columns, side, side)]
                    if lead:
                        bias[:, 0, 1:], bias[:, 1:, 0] = table[-3][:, None], table[-2][:, None]
                        bias[:, 0, 0] = table[-1]
                rows = torch.stack([*lead, *(now[p] for p in places)])
                rows, k = attention(block, rows, bias, blank=side**2 - len(places))
                if lead:
                    gathering[w] = rows[0]
                now.update(zip(places, rows[len(lead) :], strict=True))
                keys.update(zip(places, k[len(lead) :], strict=True))
            if gathering:
                part = encoder.cross[str(layer)]
                all_gathering, all_tokens = torch.stack(list(gathering.values())), torch.stack(list(now.values()))
                if shape.gathering == "to_tokens":
                    now = dict(zip(now, cross(part, all_tokens, all_gathering), strict=True))
                else:
                    gathering = dict(zip(gathering, cross(part, all_gathering, all_tokens), strict=True))
        else:
            places = sorted(now)
            rows = torch.stack([now[p] for p in places])
            rows, k = attention(block, rows, image_bias(encoder, block, rows, places, columns))
            now.update(zip(places, rows, strict=True))
            keys.update(zip(places, k, strict=True))
        for w, places in windows.items():
            gone = {places[i] for i in leavers([keys[p] for p in places], plan[w][layer])}
            left.update({p: now.pop(p) for p in gone})
            windows[w] = [p for p in places if p not in gone]
        now = {p: mlp(block, row) for p, row in now.items()}
        if windowed:
            gathering = {w: mlp(block, row) for w, row in gathering.items()}
    return torch.stack([{**now, **left}[p] for p in range(len(tokens))])


def vit(encoder: ViT, tokens: Tensor) -> Tensor:
    """Prefix and patches [T,D] of one image through the blocks of a plain ViT: [T,D], before the norm."""
    prefix = encoder.prefix
    plan = leaving(encoder.shape.migration, len(tokens) - prefix, encoder.depth)
    now, left = dict(enumerate(tokens)), dict[int, Tensor]()
    for number, block in zip(plan, encoder.blocks, strict=True):
        places = sorted(now)
        bias = tokens.new_zeros(encoder.heads, len(places), len(places))
        index = encoder.relative_position_index
        if index is not None:
            shared = encoder.rel_pos_bias
            table = (block.attn if shared is None else shared).relative_position_bias_table
            for i, a in enumerate(places):
                for j, b in enumerate(places):
                    bias[:, i, j] = table[index[a, b]]
        rows, keys = attention(block, torch.stack([now[p] for p in places]), bias)
        now = dict(zip(places, rows, strict=True))
        for i in leavers(keys[prefix:], number):
            left[places[prefix + i]] = now.pop(places[prefix + i])
        now = {p: mlp(block, row) for p, row in now.items()}
    return torch.stack([{**now, **left}[p] for p in range(len(tokens))])
