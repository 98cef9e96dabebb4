"""One cell made real: several copies of Q and of a shuffled paged pool, the lists to read, and the right answer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import traces
from planted import Tensors, noise, planted
from root import ROOT
from shapes import Cell, Question, Shape

# Tokens that lists choose by; sparse cells have whole blocks before the chunk.
BLOCK = 128
# So much data is walked between two uses of one copy that no cache of today holds it (an H100's L2 has 50 MB).
ROTATED_BYTES = 200e6


@dataclass(frozen=True)
class Copy:
    """One step's memory. Caches are `[num_pages, page_size, num_kv_heads, d]`, strided as the layout says."""

    tensors: Tensors
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor


class Problem:
    """The copies differ in numbers and in page order; lengths and lists are the same."""

    def __init__(self, cell: Cell, question: Question, device: str = "cuda") -> None:
        self.cell, self.question, self.device = cell, question, device
        self.shape = cell.shape
        first = self._draw(0)
        count = max(2, -(-int(ROTATED_BYTES) // self.shape.kv_bytes()))
        self.copies = [self._paged(first if i == 0 else self._draw(i), i) for i in range(count)]
        ints = {"dtype": torch.int32, "device": device}
        self.seq_lens = torch.full((self.shape.batch,), self.shape.context, **ints)
        self.cu_seqlens_q = torch.arange(self.shape.batch + 1, **ints) * self.shape.chunk

    @property
    def sparse(self) -> bool:
        """Whether lists choose blocks."""
        return self.cell.density < 1

    @property
    def sm_scale(self) -> float:
        """Factor on q.k."""
        return float(self.shape.head_dim**-0.5)

    def kept(self, lists: int, span: int = 0) -> torch.Tensor:
        """`[batch, spans, lists, blocks]` bool on the CPU: which blocks a list reads, its open region's always.

        Each `span` query tokens (0 = the chunk) have lists of their own, that end where the span does.
        """
        return _kept(self.shape, (self.cell.density, self.question.list_cv, self.question.seed), lists, span)

    def _draw(self, copy: int) -> Tensors:
        seed = self.question.seed * 1000 + copy
        if self.question.data == "trace":
            shape, tensors = traces.load(ROOT / self.question.trace, self.question.layer, self.device)
            if shape != self.shape:
                raise ValueError(f"the trace is {shape}, the case {self.shape}")
            return tensors
        return {"random": noise, "planted": planted}[self.question.data](self.shape, seed, self.device)

    def _paged(self, tensors: Tensors, copy: int) -> Copy:
        page, rows = self.cell.page_size, self.shape.batch
        width = -(-self.shape.context // page)
        order = torch.randperm(rows * width, generator=torch.Generator().manual_seed(copy)).to(self.device)
        caches = [self._pool(x, order, width) for x in (tensors.k, tensors.v)]
        return Copy(tensors, *caches, order.view(rows, width).int())

    def _pool(self, tokens: torch.Tensor, order: torch.Tensor, width: int) -> torch.Tensor:
        page, (rows, context, heads, d) = self.cell.page_size, tokens.shape
        # What no request owns is NaN: whoever reads it is found out.
        padded = torch.full((rows, width * page, heads, d), float("nan"), dtype=tokens.dtype, device=self.device)
        padded[:, :context] = tokens
        pages = padded.view(rows * width, page, heads, d)
        pool = torch.empty_like(pages)
        pool[order] = pages
        return pool.transpose(1, 2).contiguous().transpose(1, 2) if self.question.layout == "HND" else pool


@functools.lru_cache(maxsize=4)
def _kept(shape: Shape, drawn: tuple[float, float, int], lists: int, span: int) -> torch.Tensor:
    density, cv, seed = drawn
    span = span or shape.chunk
    blocks, past = -(-shape.context // BLOCK), (shape.context - shape.chunk) // BLOCK
    rng = torch.Generator().manual_seed(seed)
    kept = torch.zeros(shape.batch, -(-shape.chunk // span), lists, blocks, dtype=torch.bool)
    for at in range(kept.shape[1]):
        end = shape.context - shape.chunk + min((at + 1) * span, shape.chunk)
        kept[:, at, :, past : -(-end // BLOCK)] = True
        # The open region counts: lists read density * blocks in all, on average.
        chosen = density * blocks - (-(-end // BLOCK) - past)
        budgets = _uneven(chosen, cv, (shape.batch, lists), rng).clamp(0, past)
        order = torch.rand(shape.batch, lists, past, generator=rng).argsort(-1).argsort(-1)
        kept[:, at, :, :past] |= order < budgets[..., None]
    return kept


def _uneven(mean: float, cv: float, size: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    """Whole numbers around `mean`, with that mean and that coefficient of variation as far as rounding lets them."""
    if not cv or size[0] * size[1] == 1:
        return torch.full(size, max(round(mean), 0))
    weights = torch.rand(size, generator=rng)
    weights = (weights - weights.mean()) / weights.std(correction=0)
    return (mean * (1 + cv * weights)).round().long().clamp(min=0)
