"""Planted Q, K and V: attention whose large entries are known, shaped like what real models show.

Per KV head: unit noise, a sink on the first tokens, a slowly decaying diagonal through RoPE, and topics. Each block of
128 tokens carries one topic; each block of 128 queries asks for a few. `share` is the chance that the heads of a group
ask for the group's topics and not their own (it makes unions grow), `persist` the chance that the next query block
keeps the topics of the one before.

At 8K (32/8 heads, d 128) the first tokens hold .22 of the mass on average (two small real models: .15 and .27), blocks
before the chunk .68 (.47 to .51), and 14 % of those blocks hold 95 % of that (18 to 21 %); at 64K .24, .86 and 2 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from shapes import Shape

BLOCK = 128
# Tokens whose mass along the diagonal sums to that of so many at its peak.
NEIGHBOURS = 8


@dataclass(frozen=True)
class Recipe:
    """How much of what; lengths in tokens, shares in 0..1."""

    topics: int = 64
    # Topics that a query block asks for: log-normal around `asked`.
    asked: float = 3.0
    spread: float = 0.8
    share: float = 0.5
    persist: float = 0.65
    # Mass that a query leaves to its neighbours; small models were seen to leave half to the open chunk.
    local: float = 0.4
    sinks: int = 4


@dataclass(frozen=True)
class Tensors:
    """`q [batch * chunk, num_q_heads, d]`, `k` and `v [batch, context, num_kv_heads, d]`, bf16."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def planted(shape: Shape, seed: int, device: str, recipe: Recipe | None = None) -> Tensors:
    """Draws one step; the same seed gives the same numbers on the same kind of device."""
    rng = torch.Generator(device).manual_seed(seed)
    recipe = recipe or Recipe()
    parts = [[_group(shape, rng, recipe) for _ in range(shape.num_kv_heads)] for _ in range(shape.batch)]
    q = torch.stack([torch.cat([q for q, _, _ in heads], dim=1) for heads in parts])
    k, v = (torch.stack([torch.stack([head[i] for head in heads], dim=1) for heads in parts]) for i in (1, 2))
    return Tensors(q.reshape(-1, shape.num_q_heads, shape.head_dim), k, v)


def noise(shape: Shape, seed: int, device: str) -> Tensors:
    """Standard normal numbers: right for kernels whose time does not depend on what is in them."""
    rng = torch.Generator(device).manual_seed(seed)
    d, heads = shape.head_dim, shape.num_kv_heads
    sizes = [(shape.batch * shape.chunk, shape.num_q_heads, d), *[(shape.batch, shape.context, heads, d)] * 2]
    return Tensors(*(torch.randn(size, generator=rng, device=device, dtype=torch.bfloat16) for size in sizes))


def _group(shape: Shape, rng: torch.Generator, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`q [chunk, group, d]`, `k` and `v [context, d]` of one KV head of one request."""
    d, device = shape.head_dim, rng.device
    draw = {"generator": rng, "device": device}
    topics, sink, line = _units(recipe.topics, d, rng), _units(1, d, rng)[0], _units(1, d, rng)[0]
    blocks = -(-shape.context // BLOCK)
    of_block = torch.randint(recipe.topics, (blocks,), **draw)
    # A planted block then holds as much as all noise together, and some: exp(gain^2 / sqrt(d)) = 20 blocks.
    gain = math.sqrt((math.log(blocks) + 3) * math.sqrt(d))
    along = _rope(line, shape.context) * math.sqrt(_diagonal(shape, recipe) * math.sqrt(d))
    topic_of_token = topics[of_block].repeat_interleave(BLOCK, 0)[: shape.context]
    k = torch.randn(shape.context, d, **draw) + gain * topic_of_token + along
    v = torch.randn(shape.context, d, **draw) + math.sqrt(d) * topic_of_token
    pull = _sink_pull(shape, rng, recipe)
    k[: recipe.sinks] += sink * math.sqrt(d)
    wanted = _wanted(shape, rng, recipe) @ topics
    q = torch.randn(shape.chunk, shape.group_size, d, **draw) + along[-shape.chunk :, None]
    q += gain * wanted.repeat_interleave(BLOCK, 0)[: shape.chunk] + pull[:, None] * sink
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def _mass(shape: Shape, recipe: Recipe) -> float:
    """Sum of exp(logit) over the noise and the planted blocks of a query that asks for `asked` topics."""
    blocks = shape.context / BLOCK
    return (1 + 20 * recipe.asked * max(blocks / recipe.topics, 1)) * math.exp(0.5) * shape.context


def _diagonal(shape: Shape, recipe: Recipe) -> float:
    """The logit of a token with itself; it halves within a few tokens, so a handful of them hold the local mass."""
    return math.log(recipe.local / (1 - recipe.local) * _mass(shape, recipe) / NEIGHBOURS)


def _sink_pull(shape: Shape, rng: torch.Generator, recipe: Recipe) -> torch.Tensor:
    """`[group]` factors on the sink's direction: of ten heads four hardly look there, four do, two mostly do."""
    kind = torch.rand(shape.group_size, generator=rng, device=rng.device)
    mass = torch.where(kind < 0.4, 0.05, torch.where(kind < 0.8, 0.35, 0.75))
    return (mass / (1 - mass) * _mass(shape, recipe) / (1 - recipe.local) / recipe.sinks).log()


def _wanted(shape: Shape, rng: torch.Generator, recipe: Recipe) -> torch.Tensor:
    """`[query blocks, group, topics]` of 0 and 1."""
    draw = {"generator": rng, "device": rng.device}
    heads, blocks = shape.group_size, -(-shape.chunk // BLOCK)
    count = (recipe.asked * torch.exp(recipe.spread * torch.randn(heads, 1, **draw))).clamp(1, 12)
    chance = count / recipe.topics
    rows = []
    for block in range(blocks):
        own = torch.rand(heads, recipe.topics, **draw)
        common = torch.rand(1, recipe.topics, **draw).expand_as(own)
        ranks = torch.where(torch.rand(heads, 1, **draw) < recipe.share, common, own)
        fresh = (ranks < chance).float()
        kept = torch.rand(heads, 1, **draw) < recipe.persist
        rows.append(torch.where(kept, rows[-1], fresh) if block else fresh)
    return torch.stack(rows)


def _units(count: int, d: int, rng: torch.Generator) -> torch.Tensor:
    raw = torch.randn(count, d, generator=rng, device=rng.device)
    return raw / raw.norm(dim=1, keepdim=True)


def _rope(vector: torch.Tensor, length: int, base: float = 1e4) -> torch.Tensor:
    """The vector at each position, `[length, d]`; pairs are halves."""
    half = vector.shape[0] // 2
    rates = base ** (-torch.arange(half, device=vector.device) / half)
    angles = torch.arange(length, device=vector.device)[:, None] * rates
    a, b = vector[:half], vector[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=1)
