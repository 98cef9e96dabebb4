"""One select problem on the GPU: paged keys amid NaN, spans and counters as plan would write them."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterator

import torch
from params import Batch, Counters, Layout, Request, Settings, Span, Stages, Step

UNTOUCHED = -7.0
SPARE_SPANS = 2  # capacity beyond the spans of the step


class Gate(ctypes.Structure):
    """As cuda/select/gate.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("k", "q", "inv_freq", "gate_inv_freq")),
        ("rope_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("interleaved", "k_heads", "gate_dim", "by_group", "reserved")),
    ]


@dataclasses.dataclass(frozen=True)
class Shape:
    """`requests`: (chunk, past) tokens each; those without a past block, and those named in `dense`, are dense."""

    requests: tuple[tuple[int, int], ...]
    dense: tuple[int, ...] = ()
    kv_heads: int = 2
    group: int = 4
    dim: int = 128
    page: int = 16
    block: int = 128
    layout: str = "NHD"
    dtype: torch.dtype = torch.bfloat16
    query_span: int = 0
    stride: int = 16
    relative_to_past: bool = False
    scale: float = 1.0
    nan_keys: tuple[tuple[int, int], ...] = ()  # (request, token) whose key of KV head 0 is NaN

    @property
    def span(self) -> int:
        """Tokens of a select span (rust/plan.rs)."""
        return min(self.query_span or self.block, self.block)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def max_kv_len(self) -> int:
        """A little more than any request has."""
        return max(chunk + past for chunk, past in self.requests) + self.block + 1

    @property
    def max_blocks(self) -> int:
        """Stride of a row of scores."""
        return -(-self.max_kv_len // self.block)

    def is_dense(self, req: int) -> bool:
        """Whether the request's spans are dense."""
        return req in self.dense or self.requests[req][1] < self.block


class Case:
    """Inputs on the device; `q [tokens, heads, dim]`, `keys[req] [kv_len, kv_heads, dim]`."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self.gen = torch.Generator(device="cuda").manual_seed(seed)
        self.sm_scale = shape.dim**-0.5
        self._queries()
        self._pool()
        self.spans = list(self._spans())
        rows = (len(self.spans) + SPARE_SPANS) * shape.heads
        self.scores = torch.empty(rows // shape.heads, shape.heads, shape.max_blocks, device="cuda")
        self.cells = torch.empty(1, device="cuda")

    def _normal(self, *extents: int) -> torch.Tensor:
        return torch.randn(*extents, generator=self.gen, device="cuda")

    def _queries(self) -> None:
        s = self.shape
        self.starts = [sum(chunk for chunk, _ in s.requests[:i]) for i in range(len(s.requests) + 1)]
        self.q = (self._normal(self.starts[-1], s.heads, s.dim) * s.scale).to(s.dtype)
        for req in filter(s.is_dense, range(len(s.requests))):
            self.q[self.starts[req] : self.starts[req + 1]] = math.nan

    def _pool(self) -> None:
        s = self.shape
        kv_lens = [chunk + past for chunk, past in s.requests]
        pages_each = [-(-n // s.page) for n in kv_lens]
        num_pages = sum(pages_each) + 3
        order = torch.randperm(num_pages, generator=self.gen, device="cuda").int()
        # Entries after a row's valid prefix are garbage.
        self.table = torch.full((len(kv_lens), max(pages_each) + 2), 1 << 30, dtype=torch.int32, device="cuda")
        self.pool = _pool_view(s, num_pages)
        slots = max(1, s.page // s.block)
        self.k_mean = torch.full((num_pages * slots, s.kv_heads, s.dim), math.nan, device="cuda")
        self.num_pages, self.keys, self.means, used = num_pages, [], [], 0
        for req, (length, pages) in enumerate(zip(kv_lens, pages_each, strict=True)):
            row = order[used : used + pages].long()
            used += pages
            self.table[req, :pages] = row.int()
            keys = (self._normal(length, s.kv_heads, s.dim) * s.scale).to(s.dtype)
            if s.is_dense(req):
                keys[:] = math.nan
            for _, token in (at for at in s.nan_keys if at[0] == req):
                keys[token, 0] = math.nan
            tokens = torch.arange(length, device="cuda")
            self.pool[row[tokens // s.page], tokens % s.page] = keys
            self.keys.append(keys.double())
            whole = length // s.block
            means = self.keys[-1][: whole * s.block].unflatten(0, (whole, s.block)).mean(1)
            self.means.append(means.float().to(s.dtype).double())  # as scoring rounds them
            blocks = torch.arange(whole, device="cuda")
            last = row[((blocks + 1) * s.block - 1) // s.page]
            self.k_mean[last * slots + blocks % slots] = means.float()

    def _spans(self) -> Iterator[Span]:
        s = self.shape
        for req, (chunk, past) in enumerate(s.requests):
            for first in range(0, chunk, s.span):
                length = min(s.span, chunk - first)
                start = self.starts[req] + first
                yield Span(req, first, length, start, past + first + length, past, int(s.is_dense(req)), 1)

    def step(self, only: int | None = None) -> tuple[Step, list[int]]:
        """The kernels' argument, for one request alone or for all, and the indices of its spans; resets scores."""
        s = self.shape
        reqs = list(range(len(s.requests))) if only is None else [only]
        chosen = [i for i, span in enumerate(self.spans) if span.req in reqs]
        spans = []
        for i in chosen:
            fields = [getattr(self.spans[i], name) for name, _ in Span._fields_]
            spans.append(Span(reqs.index(fields[0]), *fields[1:]))
        capacity = len(self.spans) + SPARE_SPANS
        garbage = [Span(*[1 << 30] * 6, 0, 1) for _ in range(capacity - len(spans))]
        requests = [Request(self.starts[r], s.requests[r][0], sum(s.requests[r]), 0) for r in reqs]
        self.held = [_upload(spans + garbage), _upload(requests), _upload([Counters(0, len(spans))])]
        batch = Batch(q=self.q.data_ptr(), k=self.pool.data_ptr(), v=0)
        batch.block_table = self.table[reqs[0]].data_ptr()
        batch.q_token_stride, batch.q_head_stride, _ = self.q.stride()
        batch.k_page_stride, batch.k_token_stride, batch.k_head_stride, _ = self.pool.stride()
        batch.table_stride = batch.table_width = self.table.shape[1]
        batch.num_reqs, batch.total_q, batch.num_pages = len(reqs), self.starts[-1], self.num_pages
        self.scores.fill_(UNTOUCHED)
        self.cells.fill_(math.nan)
        stages = Stages(scores=self.scores.data_ptr(), cells=self.cells.data_ptr(), k_mean=self.k_mean.data_ptr())
        stages.select_spans, stages.requests, stages.counters = (t.data_ptr() for t in self.held)
        stages.max_select_spans = capacity
        settings = Settings(relative_to_past=int(s.relative_to_past), xattention_stride=s.stride)
        return Step(batch, self._layout(), settings, stages), chosen

    def _layout(self) -> Layout:
        s = self.shape
        layout = Layout(num_q_heads=s.heads, num_kv_heads=s.kv_heads, group_size=s.group, head_dim=s.dim)
        layout.log2_page_tokens, layout.log2_block_tokens = s.page.bit_length() - 1, s.block.bit_length() - 1
        layout.log2_box_tokens = min(layout.log2_page_tokens, layout.log2_block_tokens)
        layout.select_span, layout.max_kv_len, layout.max_blocks = s.span, s.max_kv_len, s.max_blocks
        layout.sm_scale = self.sm_scale
        return layout

    def rows(self, span: Span) -> torch.Tensor:
        """Queries of a span in f64."""
        return self.q[span.q_start : span.q_start + span.len].double()


def _pool_view(s: Shape, num_pages: int) -> torch.Tensor:
    """[pages, tokens, heads, dim] full of NaN, whatever the memory order."""
    full = {"device": "cuda", "dtype": s.dtype}
    if s.layout == "HND":
        return torch.full((num_pages, s.kv_heads, s.page, s.dim), math.nan, **full).transpose(1, 2)
    if s.layout == "interleaved":
        return torch.full((num_pages, 2, s.page, s.kv_heads, s.dim), math.nan, **full)[:, 0]
    return torch.full((num_pages, s.page, s.kv_heads, s.dim), math.nan, **full)


def _upload(structs: list[ctypes.Structure]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(bytes(s) for s in structs)), dtype=torch.uint8).cuda()
