"""Batches for the scoring kernels that work by cells, their launches, and what they must answer, in f64."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from driver import Kernel, check, cuda, tensor_map
from params import Counters, Span, Step, Wish

CUBINS = {
    "cells_read": ("compactattn_cells_read", "compactattn_cells_read_candidates"),
    "cells_pool": ("compactattn_cells_pool",),
    "cells_mass": ("compactattn_cells_mass", "compactattn_two_level_mass"),
    "mass_lists": ("compactattn_mass_lists",),
    "mass_lists_short": ("compactattn_mass_lists_short",),
    "cells_candidates": ("compactattn_two_level_candidates",),
    "summaries": ("compactattn_summaries",),
}
SM90 = {64: (128, 215040), 128: (128, 231424), 256: (64, 198656)}  # head_dim: tokens of a key tile, shared memory
PAIRS_SHARED = 232448  # for rows of two spans
# Keys in pieces: cuda/select/small, made for GPUs of little shared memory, here compiled for sm_90a. Shared memory.
SMALL = {256: 95232}
UNTOUCHED = 777.0
ROWS = 128
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HUGE = 1 << 29


@dataclass(frozen=True)
class Shape:
    """One case; `requests` are (q_len, past)."""

    requests: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    page: int = 16
    block: int = 64
    layout: str = "NHD"
    dtype: torch.dtype = torch.bfloat16
    sample_rows: int = 5
    query_span: int = 0
    candidate_share: float = 0.25
    dense: tuple[int, ...] = ()
    dense_every: int = 0  # of a request's spans, the second of every so many is dense too
    scale: float = 1.0
    nan_key: tuple[int, int, int] | None = None  # request, token, KV head


def sampled(length: int, count: int, kv_head: int) -> list[int]:
    """Sampled tokens of a span: even ones, and any others in place of those that sample_rows.cu takes."""
    if count == 0 or count >= length:
        return list(range(length))
    even = count - count // 4
    strided = [length - 1] if even == 1 else [i * (length - 1) // (even - 1) for i in range(even)]
    return sorted(strided + random.Random(kv_head).choices(range(length), k=count - even))


def pool(shape: Shape, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN keys and values `[pages, page, kv_heads, head_dim]`, in memory as the layout says."""
    p, h, d = shape.page, shape.kv_heads, shape.head_dim
    if shape.layout == "interleaved":
        both = torch.full((pages, 2, p, h, d), math.nan, dtype=shape.dtype, device="cuda")
        return both[:, 0], both[:, 1]
    dims = (pages, p, h, d) if shape.layout == "NHD" else (pages, h, p, d)
    k, v = (torch.full(dims, math.nan, dtype=shape.dtype, device="cuda") for _ in range(2))
    return (k, v) if shape.layout == "NHD" else (k.transpose(1, 2), v.transpose(1, 2))


class Data:
    """Queries and keys of all requests; which of them run, and where, is the case's."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        at = torch.Generator("cuda").manual_seed(seed)
        h, d = shape.kv_heads, shape.head_dim

        def rand(*dims: int) -> torch.Tensor:
            return (torch.randn(dims, generator=at, device="cuda") * shape.scale).to(shape.dtype)

        lens = [(q_len, max(0, q_len + past)) for q_len, past in shape.requests]
        self.q = [rand(q_len, h * shape.group, d) for q_len, _ in lens]
        self.k = [rand(kv_len, h, d) for _, kv_len in lens]
        self.v = [rand(kv_len, h, d) for _, kv_len in lens]
        if shape.nan_key:
            req, token, head = shape.nan_key
            self.k[req][token, head, 3] = math.nan
        self.table_width = max(math.ceil(kv_len / shape.page) for _, kv_len in lens) + 2
        pages = sum(math.ceil(kv_len / shape.page) for _, kv_len in lens) + 3
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.num_pages = pages
        self.k_pool, self.v_pool = pool(shape, pages)
        self.tables = []
        for k, v in zip(self.k, self.v, strict=True):
            mine = [order.pop() for _ in range(math.ceil(len(k) / shape.page))]
            for i, page in enumerate(mine):
                part = slice(i * shape.page, (i + 1) * shape.page)
                self.k_pool[page, : len(k[part])] = k[part]
                self.v_pool[page, : len(v[part])] = v[part]
            self.tables.append(mine + [HUGE] * (self.table_width - len(mine)))


def device_bytes(items: list[ctypes.Structure]) -> torch.Tensor:
    """Structs in device memory."""
    return torch.frombuffer(bytearray(b"".join(bytes(item) for item in items)), dtype=torch.uint8).cuda()


@dataclass
class Case:
    """Some of the data's requests as one step."""

    data: Data
    requests: list[int]
    extra_blocks: int = 0
    step: Step = field(default_factory=Step)
    worst: float = 0.0  # error found, in bounds
    ranked: torch.Tensor | None = None  # scores that two_level's candidates were chosen by

    def __post_init__(self) -> None:
        shape, data = self.data.shape, self.data
        self.q = torch.cat([data.q[r] for r in self.requests])
        q_lens = [len(data.q[r]) for r in self.requests]
        self.starts = [sum(q_lens[:i]) for i in range(len(q_lens) + 1)]
        self.cu = torch.tensor(self.starts, dtype=torch.int32, device="cuda")
        self.seq = torch.tensor([len(data.k[r]) for r in self.requests], dtype=torch.int32, device="cuda")
        self.table = torch.tensor([data.tables[r] for r in self.requests], dtype=torch.int32, device="cuda")
        self.spans = list(self.cut())
        self.max_spans = len(self.spans) + 2
        self.max_kv_len = int(self.seq.max()) + 3 + self.extra_blocks * shape.block
        self.max_blocks = math.ceil(self.max_kv_len / shape.block)
        self.words = math.ceil(self.max_blocks / 32)
        heads = shape.kv_heads * shape.group
        self.slots = max(1, shape.page // shape.block)
        self.scores = torch.empty(self.max_spans, heads, self.max_blocks, device="cuda")
        self.samples = torch.full((self.max_spans, shape.kv_heads, max(1, shape.sample_rows)), HUGE, dtype=torch.int32)
        for at, span in enumerate(self.spans):
            for kv_head in range(shape.kv_heads if 0 < shape.sample_rows < span.len else 0):
                self.samples[at, kv_head] = torch.tensor(sampled(span.len, shape.sample_rows, kv_head))
        self.samples = self.samples.cuda()
        self.num_cells = self.max_spans * shape.kv_heads * ROWS * self.max_blocks
        units = self.max_spans * shape.kv_heads
        self.cells = torch.empty(self.num_cells + units * (self.words + 1 + self.max_blocks), device="cuda")
        dims = (data.num_pages * self.slots, shape.kv_heads, shape.head_dim)
        self.k_mean, self.v_mean = (torch.full(dims, math.nan, device="cuda") for _ in range(2))
        garbage = [Span(HUGE, HUGE, HUGE, HUGE, HUGE, HUGE)] * (self.max_spans - len(self.spans))
        self.span_bytes = device_bytes([*self.spans, *garbage])
        self.counters = device_bytes([Counters(num_select_spans=len(self.spans))])
        self.fill()

    def cut(self) -> Iterator[Span]:
        """The step's select spans, request by request."""
        shape = self.data.shape
        for at, req in enumerate(self.requests):
            q_len, kv_len = len(self.data.q[req]), len(self.data.k[req])
            past = max(0, kv_len - q_len)
            each = shape.query_span or max(1, q_len)
            for first in range(0, q_len, each):
                length = min(each, q_len - first)
                kv_end = max(0, kv_len - q_len + first + length)
                number = first // each
                dense = req in shape.dense or (shape.dense_every > 0 and number % shape.dense_every == 1)
                yield Span(at, first, length, self.starts[at] + first, kv_end, past, int(dense), 1)

    def fill(self) -> None:
        """The launch's parameters."""
        shape, data, batch, layout = self.data.shape, self.data, self.step.batch, self.step.layout
        for name, of in (("q", self.q), ("k", data.k_pool), ("v", data.v_pool)):
            setattr(batch, name, of.data_ptr())
        batch.cu_seqlens_q, batch.seq_lens = self.cu.data_ptr(), self.seq.data_ptr()
        batch.block_table = self.table.data_ptr()
        batch.q_token_stride, batch.q_head_stride = self.q.stride(0), self.q.stride(1)
        for name, of in (("k", data.k_pool), ("v", data.v_pool)):
            for dim, what in enumerate(("page", "token", "head")):
                setattr(batch, f"{name}_{what}_stride", of.stride(dim))
        batch.table_stride, batch.table_width = self.table.stride(0), self.table.shape[1]
        batch.num_reqs, batch.total_q, batch.num_pages = len(self.requests), self.starts[-1], data.num_pages
        layout.num_q_heads, layout.num_kv_heads = shape.kv_heads * shape.group, shape.kv_heads
        layout.group_size, layout.head_dim = shape.group, shape.head_dim
        layout.log2_page_tokens, layout.log2_block_tokens = shape.page.bit_length() - 1, shape.block.bit_length() - 1
        layout.select_span, layout.max_kv_len = shape.query_span, self.max_kv_len
        layout.max_blocks, layout.mask_words = self.max_blocks, self.words
        layout.sm_scale = shape.head_dim**-0.5
        settings, stages = self.step.settings, self.step.stages
        settings.sink_blocks, settings.local_blocks = 1, 1
        settings.sample_rows, settings.candidate_share = shape.sample_rows, shape.candidate_share
        stages.counters, stages.select_spans = self.counters.data_ptr(), self.span_bytes.data_ptr()
        stages.scores, stages.cells = self.scores.data_ptr(), self.cells.data_ptr()
        stages.samples = self.samples.data_ptr()
        stages.k_mean, stages.max_select_spans = self.k_mean.data_ptr(), self.max_spans

    @property
    def tiles(self) -> int:
        """Launches of sampled rows that the longest span can need."""
        shape, total_q = self.data.shape, self.step.batch.total_q
        longest = min(shape.query_span or total_q, total_q)
        return math.ceil(min(shape.sample_rows or longest, longest) / max(1, ROWS // shape.group))

    def key_map(self) -> ctypes.Array:
        """Boxes of keys, as the sm_90a kernels copy them."""
        shape, pool = self.data.shape, self.data.k_pool
        sizes = (64, shape.page, shape.head_dim // 64, shape.kv_heads, self.data.num_pages)
        strides = (pool.stride(1), 64, pool.stride(2), pool.stride(0))
        rows = min(shape.page, shape.block, SM90[shape.head_dim][0])
        rows = 16 if rows == 32 else rows  # copied_tokens of cuda/ptx/tma.cuh
        return tensor_map(pool, sizes, strides, (64, rows, 1, 1, 1))

    def bits(self) -> torch.Tensor:
        """Candidates `[select spans, kv_heads, max_blocks]`."""
        heads = self.data.shape.kv_heads
        words = self.cells[self.num_cells :][: self.max_spans * heads * self.words]
        words = words.view(torch.int32).view(self.max_spans, heads, self.words)
        bits = words[..., None] >> torch.arange(32, device="cuda") & 1
        return bits.flatten(-2)[..., : self.max_blocks].bool()


class Kernels:
    """The kernels of one dtype, loaded for one head_dim, and the order of their launches."""

    def __init__(self, cubins: Path, dtype: torch.dtype, head_dim: int) -> None:
        self.kernels = {}
        for cubin, names in CUBINS.items():
            for name in names:
                typed = "mass" not in name and "two_level" not in name
                shared = 256 * (2 * head_dim + 16) if typed and "summaries" not in name else 0
                if "two_level_candidates" in name:
                    shared = 4 * (8192 // 32 + 8192)  # of the longest row that is held there
                full = f"{name}_{NAMES[dtype]}" if typed else name
                self.kernels[name.removeprefix("compactattn_")] = Kernel(cubins / f"{cubin}.cubin", full, shared)

        self.has_sm90 = head_dim in SM90
        for what in ("read", "read_candidates", "read_pairs") if self.has_sm90 else ():
            suffix = f"{NAMES[dtype]}_d{head_dim}"
            cubin = cubins / f"cells_sm90_{suffix}.cubin"
            shared = PAIRS_SHARED if what.endswith("pairs") else SM90[head_dim][1]
            name = f"cells_{what}_sm90"
            self.kernels[name] = Kernel(cubin, f"compactattn_{name}_{suffix}", shared)

        self.has_small = head_dim in SMALL
        for what in ("read", "read_candidates", "pool") if self.has_small else ():
            full = f"compactattn_cells_{what}_small_{NAMES[dtype]}_d{head_dim}"
            cubin = cubins / f"cells_{what.split('_')[0]}_small_d{head_dim}.cubin"
            self.kernels[f"cells_{what}_small"] = Kernel(cubin, full, SMALL[head_dim])

    def launch(self, name: str, grid: tuple[int, ...], block: int, *args: object) -> None:
        """On torch's current stream."""
        kernel = self.kernels[name]
        pointers = (ctypes.c_void_p * len(args))(*[ctypes.addressof(arg) for arg in args])
        dims = (*grid, *[1] * (3 - len(grid)))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        check(cuda().cuLaunchKernel(kernel.function, *dims, block, 1, 1, kernel.shared_bytes, stream, pointers, None))

    def summaries(self, case: Case, which: int, x: int = 0, with_v: bool = True) -> None:
        """Means of the blocks this step completes (0), or of all (1)."""
        batch = case.step.batch
        x = x or (batch.total_q // case.data.shape.block + batch.num_reqs)
        k = ctypes.c_uint64(case.k_mean.data_ptr())
        v = ctypes.c_uint64(case.v_mean.data_ptr() if with_v else 0)
        grid = (x, case.data.shape.kv_heads)
        seals = ctypes.c_uint64(0)
        self.launch("summaries", grid, 128, case.step, k, v, seals, ctypes.c_int32(which), ctypes.c_int32(x))

    def cells(self, case: Case, name: str, tile: int, x: int = 0) -> None:
        """One of the kernels over cells; `x` instead of the usual grid."""
        shape, index = case.data.shape, ctypes.c_int32(tile)
        if name.endswith("mass"):
            self.launch(name, (4 * shape.kv_heads * shape.group, case.max_spans), 1024, case.step, index)
            return
        if name.startswith("mass_lists"):
            wish = Wish(listed=int(name.endswith("listed")))
            name, ctas = ("mass_lists_short", 2) if case.max_blocks <= 2048 else ("mass_lists", 4)
            self.launch(name, (ctas * shape.kv_heads * shape.group, case.max_spans), 512, case.step, wish)
            return
        if name == "candidates":
            self.candidates(case)
            return
        if name.endswith("sm90"):
            self.launch(name, (x or 132,), 640, case.key_map(), case.step, index)
            return
        longest = shape.query_span or case.step.batch.total_q
        pools = math.ceil(case.max_blocks / 64)
        usual = {
            "cells_read": 396 // shape.kv_heads,
            "cells_read_candidates": 396 // shape.kv_heads,
            "cells_pool": math.ceil(longest / 128) + 1,
        }
        grid_x = (x or usual[name.removesuffix("_small")]) + (pools if "cells_pool" in name else 0)
        self.launch(name, (grid_x, shape.kv_heads, case.max_spans), 128, case.step, index)

    def candidates(self, case: Case) -> None:
        """The blocks that two_level scores again."""
        self.launch("two_level_candidates", (case.data.shape.kv_heads, case.max_spans), 256, case.step)

    def score(self, case: Case, fill: str, mass: str = "cells_mass", x: int = 0) -> None:
        """Every tile of a selector: cells by each of `fill`, then the masses."""
        for tile in range(case.tiles):
            for name in fill.split():
                self.cells(case, name, tile, x)
            self.cells(case, mass, tile)

    def two_level(self, case: Case, own: str = "", mass: str = "two_level_mass", x: int = 0) -> None:
        """What follows pooled scores; the cells of a span's only tile are still those by mean keys."""
        self.candidates(case)
        pool = "" if case.tiles == 1 else "cells_pool "
        self.score(case, pool + "cells_read_candidates" + own, mass, x)


class Expected:
    """Cells of one (span, KV head) in f64: log2 weights `[group, tokens, blocks]`."""

    def __init__(self, case: Case, span: Span, kv_head: int) -> None:
        shape, data = case.data.shape, case.data
        req, block = case.requests[span.req], shape.block
        tokens = torch.tensor(sampled(span.len, shape.sample_rows, kv_head), device="cuda")
        heads = slice(kv_head * shape.group, (kv_head + 1) * shape.group)
        q = data.q[req][span.first + tokens][:, heads].double().transpose(0, 1)
        k = data.k[req][: span.kv_end, kv_head].double()
        scale = shape.head_dim**-0.5 / math.log(2)
        self.past, self.blocks = span.past // block, math.ceil(span.kv_end / block)
        seen = (span.kv_end + tokens + 1 - span.len)[:, None]
        logits = (q @ k.T * scale).masked_fill(torch.arange(len(k), device="cuda") >= seen, -math.inf)
        padded = torch.nn.functional.pad(logits, (0, self.blocks * block - len(k)), value=-math.inf)
        self.exact = log2_sum(padded.unflatten(-1, (self.blocks, block)))
        means = k[: len(k) // block * block].unflatten(0, (-1, block)).mean(1)
        means = means.float().to(shape.dtype).double()  # as scoring rounds them
        pooled = torch.nn.functional.pad(q @ means.T * scale, (0, self.blocks - len(means))) + math.log2(block)
        ends = (torch.arange(self.blocks, device="cuda") + 1) * block
        self.pooled = torch.where(ends <= seen, pooled, self.exact)
        # Of |q| . |k|, in units of log2: what rounding errors of the product are relative to.
        self.reach = float((q.abs() @ k.abs().T).nan_to_num().max()) * scale

    def mass(self, cells: torch.Tensor) -> torch.Tensor:
        """Scores `[group, past blocks]`."""
        return torch.exp2(cells - log2_sum(cells)[..., None]).mean(1)[:, : self.past]


def log2_sum(x: torch.Tensor) -> torch.Tensor:
    """log2 of the sum of 2^x over the last dimension."""
    return torch.logsumexp(x * math.log(2), -1) / math.log(2)
