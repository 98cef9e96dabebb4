"""One attend problem on the GPU: a paged pool full of NaN but for its tokens, lists, work items, and an fp64 answer."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from driver import Kernel, tensor_map

DIM, ROWS, TOKENS = 128, 128, 128
CTAS = 132
SHARED_BYTES = 232448


class Work(ctypes.Structure):
    """As cuda/params.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("items", "boxes", "counts", "stream_lens", "cuts", "costs")] + [
        (name, ctypes.c_int32) for name in ("num_items", "num_ctas", "max_boxes", "group")
    ]


class Results(ctypes.Structure):
    """As cuda/params.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("out", "lse", "partial_out", "partial_lse")] + [
        (name, ctypes.c_int64) for name in ("out_token", "out_head", "lse_token", "lse_head")
    ]


class AttendParams(ctypes.Structure):
    """As cuda/params.h."""

    _fields_ = [
        ("work", Work),
        ("results", Results),
        ("num_pages", ctypes.c_int32),
        ("log2_box_tokens", ctypes.c_int32),
        ("log2_boxes_per_page", ctypes.c_int32),
        ("sm_scale", ctypes.c_float),
    ]


class Stages:
    """plan, attend and combine, from the cubins of a folder."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16, variant: str | None = None) -> None:
        name = "bf16_d128" if dtype == torch.bfloat16 else "fp16_d128"
        entry = variant or f"compactattn_attend_sm90_{name}"
        self.plan = Kernel(folder / "plan.cubin", "compactattn_plan", 0)
        self.attend = Kernel(folder / f"{'variants' if variant else name}.cubin", entry, SHARED_BYTES)
        self.combine = Kernel(folder / "combine.cubin", f"compactattn_combine_{name}", 0)


@dataclasses.dataclass(frozen=True)
class Shape:
    """`requests`: (chunk, past) tokens each; a past below 0 leaves rows without keys. `density` of past blocks."""

    requests: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 4
    page_size: int = 16
    block_size: int = 128
    layout: str = "NHD"
    density: float = 0.5
    spread: float = 0.0  # of list lengths: the sigma of a log-normal factor on `density`
    num_ctas: int = CTAS
    dtype: torch.dtype = torch.bfloat16

    @property
    def box_tokens(self) -> int:
        """Tokens that one entry of a list names."""
        return min(self.page_size, self.block_size)


class Case:
    """Inputs on the device. The stream of list row `request * kv_heads + kv_head` is also kept as token slots."""

    def __init__(self, shape: Shape, seed: int = 0, scale: float = 1.0) -> None:
        self.shape, self.scale = shape, DIM**-0.5
        gen = torch.Generator(device="cuda").manual_seed(seed)
        page = shape.page_size
        self.kv_lens = [chunk + past for chunk, past in shape.requests]
        pages_each = [-(-n // page) for n in self.kv_lens]
        self.num_pages = sum(pages_each) + 3
        order = torch.randperm(self.num_pages, generator=gen, device="cuda")[: sum(pages_each)]
        self.block_tables = order.split(pages_each)
        total_q, heads = sum(chunk for chunk, _ in shape.requests), shape.kv_heads * shape.group
        self.q = torch.randn(total_q, heads, DIM, generator=gen, device="cuda").mul_(scale).to(shape.dtype)
        self.k, self.v = self._pools()
        for table, length in zip(self.block_tables, self.kv_lens, strict=True):
            self._fill(table, length, gen, scale)
        self._lists(gen)
        self._items()
        self.out = torch.full_like(self.q, math.nan)
        self.lse = torch.full((heads, total_q), math.nan, device="cuda")
        self._encode()

    def _pools(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [pages, tokens, heads, dim], whatever the memory order."""
        s = self.shape
        full = {"device": "cuda", "dtype": s.dtype}
        if s.layout == "HND":
            k, v = (torch.full((self.num_pages, s.kv_heads, s.page_size, DIM), math.nan, **full) for _ in range(2))
            return k.transpose(1, 2), v.transpose(1, 2)
        if s.layout == "interleaved":  # one allocation [pages, 2, tokens, heads, dim]
            both = torch.full((self.num_pages, 2, s.page_size, s.kv_heads, DIM), math.nan, **full)
            return both[:, 0], both[:, 1]
        k, v = (torch.full((self.num_pages, s.page_size, s.kv_heads, DIM), math.nan, **full) for _ in range(2))
        return k, v

    def _fill(self, table: torch.Tensor, length: int, gen: torch.Generator, scale: float) -> None:
        whole, page = length // self.shape.page_size, self.shape.page_size
        for pool in (self.k, self.v):
            values = torch.randn(length, self.shape.kv_heads, DIM, generator=gen, device="cuda").to(self.shape.dtype)
            values = values * scale if pool is self.k else values
            pool[table[:whole]] = values[: whole * page].view(whole, page, self.shape.kv_heads, DIM)
            if length % page:
                pool[table[whole], : length % page] = values[whole * page :]

    def _lists(self, gen: torch.Generator) -> None:
        """Selected past blocks, then the open region; boxes through the block table."""
        s, box = self.shape, self.shape.box_tokens
        per_page = s.page_size // box
        rows, self.slots = [], []
        for (_, past), length, table in zip(s.requests, self.kv_lens, self.block_tables, strict=True):
            blocks, per_block = max(past, 0) // s.block_size, s.block_size // box
            open_boxes = torch.arange(blocks * per_block, -(-length // box), device="cuda")
            for _ in range(s.kv_heads):
                factor = math.exp(s.spread * torch.randn(1, generator=gen, device="cuda").item() - s.spread**2 / 2)
                count = min(blocks, round(blocks * s.density * factor))
                chosen = torch.randperm(blocks, generator=gen, device="cuda")[:count].sort().values
                logical = (chosen[:, None] * per_block + torch.arange(per_block, device="cuda")).flatten()
                logical = torch.cat([logical, open_boxes])
                rows.append((table[logical // per_page] * per_page + logical % per_page).int())
                tokens = (logical[:, None] * box + torch.arange(box, device="cuda")).flatten()
                tokens = tokens[tokens < length]
                self.slots.append(table[tokens // s.page_size] * s.page_size + tokens % s.page_size)
        self.max_boxes = max(max(len(row) for row in rows), 1) + 5
        self.boxes = torch.full((len(rows), self.max_boxes), 2**30, device="cuda", dtype=torch.int32)  # past: poison
        for i, row in enumerate(rows):
            self.boxes[i, : len(row)] = row
        self.counts = torch.tensor([len(row) for row in rows], device="cuda", dtype=torch.int32)
        self.stream_lens = torch.tensor([len(slots) for slots in self.slots], device="cuda", dtype=torch.int32)

    def _items(self) -> None:
        """List row major, tokens ascending."""
        s, per_tile = self.shape, ROWS // self.shape.group
        items, first = [], 0
        for request, (chunk, _) in enumerate(s.requests):
            for head in range(s.kv_heads):
                row = request * s.kv_heads + head
                for token in range(0, chunk, per_tile):
                    num = min(per_tile, chunk - token)
                    items.append([row, head, first + token, num, head * s.group, chunk - 1 - token, 0, 0])
            first += chunk
        self.num_items = len(items)
        self.items = torch.tensor(items, device="cuda", dtype=torch.int32)

    def _encode(self) -> None:
        s = self.shape
        heads = s.kv_heads * s.group
        sizes, strides = (64, heads, len(self.q), DIM // 64), (self.q.stride(1), self.q.stride(0), 64)
        self.maps = [tensor_map(self.q, sizes, strides, (64, s.group, ROWS // s.group, 1))]
        for pool in (self.k, self.v):
            sizes = (64, s.page_size, DIM // 64, s.kv_heads, self.num_pages)
            strides = (pool.stride(1), 64, pool.stride(2), pool.stride(0))
            self.maps.append(tensor_map(pool, sizes, strides, (64, min(s.box_tokens, TOKENS), 1, 1, 1)))
        self.cuts = torch.full((s.num_ctas + 1, 2), 2**30, device="cuda", dtype=torch.int32)
        self.costs = torch.full((self.num_items + 1,), 2**30, device="cuda", dtype=torch.int32)
        self.partial_out = torch.full((2 * s.num_ctas, ROWS, DIM), math.nan, device="cuda")
        self.partial_lse = torch.full((2 * s.num_ctas, ROWS), math.nan, device="cuda")
        pointers = (self.items, self.boxes, self.counts, self.stream_lens, self.cuts, self.costs)
        work = Work(*[t.data_ptr() for t in pointers], self.num_items, s.num_ctas, self.max_boxes, s.group)
        results = Results(
            *[t.data_ptr() for t in (self.out, self.lse, self.partial_out, self.partial_lse)],
            *(self.out.stride(0), self.out.stride(1), self.lse.stride(1), self.lse.stride(0)),
        )
        logs = int(math.log2(s.box_tokens)), int(math.log2(s.page_size // s.box_tokens))
        self.params = AttendParams(work, results, self.num_pages, *logs, self.scale)

    def launch(self, stages: Stages) -> None:
        """On torch's current stream."""
        ctas = self.shape.num_ctas
        stages.plan.launch((1, 1), 1024, [self.params.work])
        stages.attend.launch((ctas, 1), 384, [*self.maps, self.params])
        if ctas > 1:
            stages.combine.launch((ctas - 1, 16), 256, [self.params])

    def flop(self) -> float:
        """Multiplications and additions of both products over visible columns, 4 * d each."""
        s, total = self.shape, 0.0
        for row, length in enumerate(self.stream_lens.tolist()):
            chunk = s.requests[row // s.kv_heads][0]
            total += chunk * (length - (chunk - 1) / 2)
        return 4 * DIM * s.group * total

    def expected(self) -> Iterator[tuple[slice, int, torch.Tensor, torch.Tensor]]:
        """Per query head of each list row: query tokens, head, out [tokens, dim] and lse [tokens], fp64."""
        s, first = self.shape, 0
        for request, (chunk, _) in enumerate(s.requests):
            tokens = slice(first, first + chunk)
            for head in range(s.kv_heads * s.group):
                kv_head = head // s.group
                slots = self.slots[request * s.kv_heads + kv_head]
                k, v = (pool[slots // s.page_size, slots % s.page_size, kv_head].double() for pool in (self.k, self.v))
                logits = self.q[tokens, head].double() @ k.T * self.scale
                column = torch.arange(len(slots), device="cuda")
                visible = column < len(slots) - chunk + 1 + torch.arange(chunk, device="cuda")[:, None]
                logits.masked_fill_(~visible, -math.inf)
                lse = torch.logsumexp(logits, -1)
                weights = logits.sub_(lse[:, None]).exp_().nan_to_num_(nan=0.0)
                yield tokens, head, weights @ v, lse
            first += chunk

    def errors(self) -> tuple[float, float]:
        """Relative error of out (norm over norm, worst list) and greatest error of lse; NaN is infinite."""
        squares = torch.zeros(len(self.slots), 2, device="cuda", dtype=torch.float64)  # of the error, of the answer
        worst_lse = 0.0
        for i, (tokens, head, out, lse) in enumerate(self.expected()):
            squares[i // self.shape.group, 0] += (self.out[tokens, head].double() - out).square().sum()
            squares[i // self.shape.group, 1] += out.square().sum()
            got = self.lse[head, tokens].double()
            gap = torch.where((lse == -math.inf) & (got == -math.inf), 0.0, got - lse).abs().max().item()
            worst_lse = max(worst_lse, math.inf if math.isnan(gap) else gap)
        error = (squares[:, 0] / squares[:, 1].clamp_min(1e-30)).sqrt().max().item()
        return math.inf if math.isnan(error) else error, worst_lse
