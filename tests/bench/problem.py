"""One cell made real: several copies of Q and of a shuffled paged pool, the lists to read, and the right answer."""

from __future__ import annotations

from dataclasses import dataclass

import lists as drawing
import torch
import traces
from planted import Tensors, noise, planted
from root import ROOT
from shapes import Cell, Question

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
        self._kept: dict[drawing.Wanted, torch.Tensor] = {}
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
        wanted = drawing.Wanted(self.cell.density, self.question.list_cv, self.question.seed, lists, span)
        if wanted not in self._kept:
            by_mass = self.question.lists == "mass"
            self._kept[wanted] = (
                drawing.by_mass(self.shape, wanted, self.copies[0].tensors)
                if by_mass
                else drawing.random_blocks(self.shape, wanted)
            )
        return self._kept[wanted]

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
