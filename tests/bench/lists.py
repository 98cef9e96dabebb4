"""Which blocks lists read: blocks drawn at random, or those that hold most of the softmax's mass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from planted import BLOCK, Tensors
from shapes import Shape

# Query tokens of a span whose mass is looked at.
SAMPLED = 16


@dataclass(frozen=True)
class Wanted:
    """Lists that read `density` of the context on average; `cv` is the coefficient of variation of their lengths."""

    density: float
    cv: float
    seed: int
    # A request and span.
    lists: int
    # Query tokens that share lists; 0 = the chunk.
    span: int


# Scores `[batch, lists, past blocks]` of the span with this number.
Scores = Callable[[int], torch.Tensor]


@functools.lru_cache(maxsize=4)
def random_blocks(shape: Shape, wanted: Wanted) -> torch.Tensor:
    """`[batch, spans, lists, blocks]` bool: lists that have nothing in common but the open region."""
    rng = torch.Generator().manual_seed(wanted.seed)
    size = (shape.batch, wanted.lists, _past(shape))
    return _kept(shape, wanted, lambda _: torch.rand(size, generator=rng))


def by_mass(shape: Shape, wanted: Wanted, tensors: Tensors) -> torch.Tensor:
    """As `random_blocks`, but the blocks with most mass over the heads of a list and a sample of the span's queries."""
    return _kept(shape, wanted, lambda at: _mass(shape, wanted, tensors, at))


def _kept(shape: Shape, wanted: Wanted, scores: Scores) -> torch.Tensor:
    rng = torch.Generator().manual_seed(wanted.seed + 1)
    span = wanted.span or shape.chunk
    blocks, past = -(-shape.context // BLOCK), _past(shape)
    kept = torch.zeros(shape.batch, -(-shape.chunk // span), wanted.lists, blocks, dtype=torch.bool)
    for at in range(kept.shape[1]):
        end = -(-(shape.context - shape.chunk + min((at + 1) * span, shape.chunk)) // BLOCK)
        kept[:, at, :, past:end] = True
        # The open region counts: lists read density * blocks in all, on average.
        budgets = uneven(wanted.density * blocks - (end - past), wanted.cv, (shape.batch, wanted.lists), rng)
        order = scores(at).argsort(-1, descending=True).argsort(-1)
        kept[:, at, :, :past] |= order < budgets.clamp(0, past)[..., None]
    return kept


def _past(shape: Shape) -> int:
    """Whole blocks before the chunk."""
    return (shape.context - shape.chunk) // BLOCK


def uneven(mean: float, cv: float, size: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    """Whole numbers around `mean`, with that mean and that coefficient of variation as far as rounding lets them."""
    if not cv or size[0] * size[1] == 1:
        return torch.full(size, max(round(mean), 0))
    weights = torch.rand(size, generator=rng)
    weights = (weights - weights.mean()) / weights.std(correction=0)
    return (mean * (1 + cv * weights)).round().long().clamp(min=0)


def _mass(shape: Shape, wanted: Wanted, tensors: Tensors, at: int) -> torch.Tensor:
    span, past = wanted.span or shape.chunk, _past(shape)
    rows = torch.linspace(at * span, min((at + 1) * span, shape.chunk) - 1, SAMPLED, device=tensors.q.device).long()
    q = tensors.q.view(shape.batch, shape.chunk, -1, shape.head_dim)[:, rows]
    mass = torch.empty(shape.batch, shape.num_q_heads, past)
    for req in range(shape.batch):
        for head in range(shape.num_q_heads):
            keys = tensors.k[req, : past * BLOCK, head // shape.group_size].float()
            weights = (q[req, :, head].float() @ keys.T * shape.head_dim**-0.5).softmax(-1)
            mass[req, head] = weights.view(SAMPLED, past, BLOCK).sum((0, 2)).cpu()
    return mass.view(shape.batch, wanted.lists, -1, past).sum(2)
