"""One attend problem on the GPU: a paged pool full of NaN but for its tokens, lists, work items, and an fp64 answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from driver import Kernel, tensor_map
from params import AttendParams, Batch, Layout, Results, Settings, Stages, Step, Work

ROWS, TOKENS = 128, 128
SMS = 132
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
ITEM_INTS, SPAN_INTS = 8, 12
ITEM_COST, TILE_COST = 3, 2  # cuda/plan/work.cu
ORDERED_LISTS, ITEMS_TO_ORDER = 1024, 4
ARRIVALS = 8  # cuda/params.h


@dataclasses.dataclass(frozen=True)
class Traits:
    """How one attend kernel is launched."""

    threads: int
    shared_bytes: int
    ctas_per_sm: int
    map_tokens: int = 0  # rows of a box of K and V at most; 0: no tensor maps


SM90 = {
    64: Traits(384, 214016, 1, 128),
    128: Traits(384, 230400, 1, 128),
    256: Traits(384, 230400, 1, 64),
}
SM80 = {  # as compiled for GPUs with 227 KB of shared memory a CTA
    64: Traits(128, 92160, 2),
    96: Traits(128, 79872, 2),
    128: Traits(128, 104448, 2),
    256: Traits(256, 202752, 1),
}
SM80_SMALL = {  # and with less
    64: Traits(128, 55296, 2),
    96: Traits(128, 53248, 2),
    128: Traits(128, 69632, 2),
    256: Traits(256, 101376, 1),
}
ARCHS = {"sm90": SM90, "sm80": SM80, "sm80small": SM80_SMALL}


class Kernels:
    """plan and attend, which combines, from the cubins of a folder; `arch` is attend's, or a name of variants.cu."""

    def __init__(self, folder: Path, arch: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> None:
        name = f"{NAMES[dtype]}_d{head_dim}"
        self.traits = ARCHS.get(arch, SM90)[head_dim]
        shipped = arch in ARCHS
        cubin = f"{arch}_{name}.cubin" if shipped else "variants.cubin"
        entry = f"compactattn_attend_{arch[:4]}_{name}" if shipped else arch
        self.plan = Kernel(folder / "work.cubin", "compactattn_plan_work", 0)
        self.attend = Kernel(folder / cubin, entry, self.traits.shared_bytes)


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
    num_ctas: int = SMS
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    heads_per_list: int = 0  # 0: the group
    list_span: int = 0  # query tokens that share lists; 0: the chunk
    whole_items: bool = False
    holes: bool = False  # some entries are -1, which reads as zeros
    loud: float = 1.0  # factor on keys of a request's first eighth, its root on those of the second

    @property
    def box_tokens(self) -> int:
        """Tokens that one entry of a list names."""
        return min(self.page_size, self.block_size)

    @property
    def list_heads(self) -> int:
        """Query heads of a list."""
        return self.heads_per_list or self.group

    @property
    def parts(self) -> int:
        """Lists of a KV head; the last may serve fewer heads."""
        return -(-self.group // self.list_heads)


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive query tokens of one request that share lists."""

    request: int
    first: int  # of the chunk
    len: int
    q_start: int
    kv_end: int  # KV tokens that its last token sees


class Case:
    """Inputs on the device. The stream of each list row is also kept as token slots, -1 for zeros."""

    def __init__(self, shape: Shape, seed: int = 0, scale: float = 1.0) -> None:
        self.shape, self.scale = shape, shape.head_dim**-0.5
        gen = torch.Generator(device="cuda").manual_seed(seed)
        page = shape.page_size
        self.kv_lens = [chunk + past for chunk, past in shape.requests]
        pages_each = [-(-n // page) for n in self.kv_lens]
        self.num_pages = sum(pages_each) + 3
        order = torch.randperm(self.num_pages, generator=gen, device="cuda")[: sum(pages_each)]
        self.block_tables = order.split(pages_each)
        self.spans = list(self._spans())
        total_q, heads = sum(chunk for chunk, _ in shape.requests), shape.kv_heads * shape.group
        self.q = torch.randn(total_q, heads, shape.head_dim, generator=gen, device="cuda").mul_(scale).to(shape.dtype)
        self.k, self.v = self._pools()
        for table, length in zip(self.block_tables, self.kv_lens, strict=True):
            self._fill(table, length, gen, scale)
        self._lists(gen)
        self.out = torch.full_like(self.q, math.nan)
        self.lse = torch.full((heads, total_q), math.nan, device="cuda")
        self._encode()

    def _spans(self) -> Iterator[Span]:
        q_start = 0
        for request, (chunk, past) in enumerate(self.shape.requests):
            step = self.shape.list_span or max(chunk, 1)
            for first in range(0, chunk, step):
                length = min(step, chunk - first)
                yield Span(request, first, length, q_start + first, max(0, past + first + length))
            q_start += chunk

    def _pools(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [pages, tokens, heads, dim], whatever the memory order."""
        s, dim = self.shape, self.shape.head_dim
        full = {"device": "cuda", "dtype": s.dtype}
        if s.layout == "HND":
            k, v = (torch.full((self.num_pages, s.kv_heads, s.page_size, dim), math.nan, **full) for _ in range(2))
            return k.transpose(1, 2), v.transpose(1, 2)
        if s.layout == "interleaved":  # one allocation [pages, 2, tokens, heads, dim]
            both = torch.full((self.num_pages, 2, s.page_size, s.kv_heads, dim), math.nan, **full)
            return both[:, 0], both[:, 1]
        if s.layout == "padded":  # rows start 16 bytes apart from where powers of two would have them
            both = torch.full((self.num_pages, s.page_size, 2, s.kv_heads, dim + 8), math.nan, **full)
            return both[:, :, 0, :, :dim], both[:, :, 1, :, 8:]
        k, v = (torch.full((self.num_pages, s.page_size, s.kv_heads, dim), math.nan, **full) for _ in range(2))
        return k, v

    def _fill(self, table: torch.Tensor, length: int, gen: torch.Generator, scale: float) -> None:
        s, whole, page = self.shape, length // self.shape.page_size, self.shape.page_size
        for pool in (self.k, self.v):
            values = torch.randn(length, s.kv_heads, s.head_dim, generator=gen, device="cuda").to(s.dtype)
            values = self._loudness(length) * values * scale if pool is self.k else values
            pool[table[:whole]] = values[: whole * page].view(whole, page, s.kv_heads, s.head_dim)
            if length % page:
                pool[table[whole], : length % page] = values[whole * page :]

    def _loudness(self, length: int) -> torch.Tensor:
        """Streams run from their ends: their maxima grow late, by less and then by more than a factor can follow."""
        factor = torch.ones(length, 1, 1, device="cuda", dtype=self.shape.dtype)
        factor[: length // 4] = self.shape.loud**0.5
        factor[: length // 8] = self.shape.loud
        return factor

    def _lists(self, gen: torch.Generator) -> None:
        """Row (span, KV head, part of the group): selected past blocks, then the open region up to the span's end."""
        s = self.shape
        rows, self.slots = [], []
        for span in self.spans:
            for _ in range(s.kv_heads * s.parts):
                boxes, slots = self._list(span, gen)
                rows.append(boxes)
                self.slots.append(slots)
        self.max_boxes = max(max(len(row) for row in rows), 1) + 5
        self.boxes = torch.full((len(rows), self.max_boxes), 2**30, device="cuda", dtype=torch.int32)  # past: poison
        for i, row in enumerate(rows):
            self.boxes[i, : len(row)] = row
        self.counts = torch.tensor([len(row) for row in rows], device="cuda", dtype=torch.int32)
        self.stream_lens = torch.tensor([len(slots) for slots in self.slots], device="cuda", dtype=torch.int32)

    def _list(self, span: Span, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes and token slots of one list, through the block table."""
        s, box, table = self.shape, self.shape.box_tokens, self.block_tables[span.request]
        per_page, per_block = s.page_size // box, s.block_size // box
        blocks = max(s.requests[span.request][1], 0) // s.block_size
        factor = math.exp(s.spread * torch.randn(1, generator=gen, device="cuda").item() - s.spread**2 / 2)
        count = min(blocks, round(blocks * s.density * factor))
        chosen = torch.randperm(blocks, generator=gen, device="cuda")[:count].sort().values
        logical = (chosen[:, None] * per_block + torch.arange(per_block, device="cuda")).flatten()
        open_boxes = torch.arange(blocks * per_block, -(-span.kv_end // box), device="cuda")
        logical = torch.cat([logical, open_boxes])
        boxes = (table[logical // per_page] * per_page + logical % per_page).int()
        tokens = (logical[:, None] * box + torch.arange(box, device="cuda")).flatten()
        inside = tokens < span.kv_end
        slots = table[tokens // s.page_size] * s.page_size + tokens % s.page_size
        if s.holes:
            hole = torch.rand(len(boxes), generator=gen, device="cuda") < 0.2
            boxes[hole] = -1
            slots[hole.repeat_interleave(box)] = -1
        return boxes, slots[inside]

    def expected_items(self) -> torch.Tensor:
        """Tokens ascending; the longest list first if lists have many items, else by KV head (cuda/plan/work.cu)."""
        lengths = self.stream_lens.tolist()
        s, per_tile, lists = self.shape, ROWS // self.shape.list_heads, []
        for index, span in enumerate(self.spans):
            for head in range(s.kv_heads):
                for part in range(s.parts):
                    row, first_head = (index * s.kv_heads + head) * s.parts + part, part * s.list_heads
                    heads, length = min(s.list_heads, s.group - first_head), lengths[row]
                    lists.append(items := [])
                    for token in range(0, span.len, per_tile):
                        num, after = min(per_tile, span.len - token), span.len - 1 - token
                        items.append(
                            [row, head, span.q_start + token, num, head * s.group + first_head, after, heads, length]
                        )
        if len(lists) <= ORDERED_LISTS and sum(map(len, lists)) >= ITEMS_TO_ORDER * len(lists):
            order = sorted(range(len(lists)), key=lambda row: -(lengths[row] // TOKENS))
        elif sum(map(len, lists)) >= ITEMS_TO_ORDER * len(lists):
            order = range(len(lists))
        else:
            per_span = s.kv_heads * s.parts
            chunks = [span.request for span in self.spans]
            order = sorted(range(len(lists)), key=lambda row: (chunks[row // per_span], row % per_span // s.parts))
        lists = [lists[row] for row in order]
        return torch.tensor([item for items in lists for item in items], device="cuda", dtype=torch.int32)

    def _encode(self) -> None:
        s = self.shape
        self._maps()
        self.num_items = len(self.expected_items())
        poison = {"device": "cuda", "dtype": torch.int32}
        self.items = torch.full((self.num_items, ITEM_INTS), 2**30, **poison)
        self.arrivals = torch.full((s.num_ctas + 1, ARRIVALS), 2**30, **poison)
        self.pieces = torch.full((self.num_items + s.num_ctas, 4), 2**30, **poison)
        self.piece_starts = torch.full((s.num_ctas + 1,), 2**30, **poison)
        self.costs = torch.full((self.num_items + 1,), 2**30, **poison)
        self.counters = torch.tensor([len(self.spans), 0, self.num_items, 0, 0, 0, 0, 0], **poison)
        self.list_spans = self._span_table()
        self.stats = torch.randint(1, 2**40, (8,), device="cuda", dtype=torch.int64)
        self.mirror = torch.zeros(8, dtype=torch.int64).pin_memory()
        self.partial_out = torch.full((2 * s.num_ctas, ROWS, s.head_dim), math.nan, device="cuda")
        self.partial_lse = torch.full((2 * s.num_ctas, ROWS), math.nan, device="cuda")
        self.step = Step(self._batch(), self._layout(), Settings(), self._stages())
        pointers = (self.items, self.pieces, self.piece_starts, self.boxes, self.arrivals)
        log2_box = int(math.log2(s.box_tokens))
        work = Work(*[t.data_ptr() for t in pointers], s.num_ctas, self.max_boxes, s.list_heads, log2_box)
        results = Results(
            *[t.data_ptr() for t in (self.out, self.lse, self.partial_out, self.partial_lse)],
            *(self.out.stride(0), self.out.stride(1), self.lse.stride(1), self.lse.stride(0)),
        )
        logs = int(math.log2(s.box_tokens)), int(math.log2(s.page_size // s.box_tokens))
        self.params = AttendParams(work, results, self.step.batch, *logs, self.scale)

    def _maps(self) -> None:
        """Of the sm_90a kernel, where it serves the shape."""
        s = self.shape
        self.maps = []
        if s.head_dim not in SM90 or s.box_tokens < 8:
            return
        heads, groups = s.kv_heads * s.group, s.head_dim // 64
        sizes, strides = (64, heads, len(self.q), groups), (self.q.stride(1), self.q.stride(0), 64)
        self.maps = [tensor_map(self.q, sizes, strides, (64, s.list_heads, ROWS // s.list_heads, 1))]
        # Boxes of 32 go in halves (rust/cuda/attend.rs).
        rows = 16 if s.box_tokens == 32 else min(s.box_tokens, SM90[s.head_dim].map_tokens)
        for pool in (self.k, self.v):
            sizes = (64, s.page_size, groups, s.kv_heads, self.num_pages)
            strides = (pool.stride(1), 64, pool.stride(2), pool.stride(0))
            self.maps.append(tensor_map(pool, sizes, strides, (64, rows, 1, 1, 1)))

    def _items_of(self, span: Span) -> int:
        return self.shape.kv_heads * self.shape.parts * -(-span.len // (ROWS // self.shape.list_heads))

    def _span_table(self) -> torch.Tensor:
        first_item, rows = 0, []
        for span in self.spans:
            chunk = sum(self._items_of(other) for other in self.spans if other.request == span.request)
            place = [span.request, span.first, span.len, span.q_start, span.kv_end]
            rows.append([*place, 0, 0, 0, 0, 0, first_item, chunk])
            first_item += self._items_of(span)
        return torch.tensor(rows, device="cuda", dtype=torch.int32).view(-1, SPAN_INTS)

    def _batch(self) -> Batch:
        batch = Batch(q=self.q.data_ptr(), k=self.k.data_ptr(), v=self.v.data_ptr(), num_pages=self.num_pages)
        batch.q_token_stride, batch.q_head_stride = self.q.stride()[:2]
        batch.k_page_stride, batch.k_token_stride, batch.k_head_stride = self.k.stride()[:3]
        batch.v_page_stride, batch.v_token_stride, batch.v_head_stride = self.v.stride()[:3]
        batch.total_q, batch.num_reqs = len(self.q), len(self.shape.requests)
        return batch

    def _layout(self) -> Layout:
        s = self.shape
        layout = Layout(num_q_heads=s.kv_heads * s.group, num_kv_heads=s.kv_heads, group_size=s.group)
        layout.head_dim, layout.heads_per_list, layout.lists_per_kv_head = s.head_dim, s.list_heads, s.parts
        layout.list_span, layout.max_boxes, layout.sm_scale = s.list_span, self.max_boxes, self.scale
        layout.log2_box_tokens = int(math.log2(s.box_tokens))
        return layout

    def _stages(self) -> Stages:
        stages = Stages(max_items=self.num_items, num_ctas=self.shape.num_ctas, whole_items=self.shape.whole_items)
        buffers = "counters list_spans counts stream_lens boxes items arrivals pieces piece_starts costs stats"
        for name in buffers.split():
            setattr(stages, name, getattr(self, name).data_ptr())
        stages.stats_mirror = self.mirror.data_ptr()
        return stages

    def launch(self, kernels: Kernels) -> None:
        """On torch's current stream."""
        ctas = self.shape.num_ctas
        kernels.plan.launch((1, 1), 1024, [self.step])
        maps = self.maps if kernels.traits.map_tokens else []
        kernels.attend.launch((ctas, 1), kernels.traits.threads, [*maps, self.params])

    def plan_faults(self) -> list[str]:
        """What the last launch's plan got wrong: items, parts that shares of about equal cost do not explain, stats."""
        faults = []
        if not torch.equal(self.items, self.expected_items()):
            faults.append("items")
        if not torch.equal(self.stats.cpu(), self.mirror):
            faults.append("stats mirror")
        visible = self.stream_lens[self.items[:, 0].long()] - self.items[:, 5] + self.items[:, 3] - 1
        tiles = ((visible + TOKENS - 1) // TOKENS).clamp_min(0)
        before = torch.cat([tiles.new_zeros(1), (ITEM_COST + TILE_COST * tiles).cumsum(0)])
        starts = self.piece_starts.cpu()
        pieces = self.pieces[: int(starts[-1])].cpu().flip(0)
        cta = torch.repeat_interleave(torch.arange(self.shape.num_ctas), starts.long().diff()).flip(0)
        item, begin, end = (pieces[:, i].long() for i in range(3))
        part, parts = pieces[:, 3].long() % 2**16, pieces[:, 3].long() // 2**16
        # Each tile of each item is in one piece: pieces of an item, by where they begin, follow each other.
        order = (item * 2**20 + begin * 2 + (end > begin)).argsort(stable=True)
        item, begin, end, cta, part, parts = (x[order] for x in (item, begin, end, cta, part, parts))
        of, same = tiles.cpu()[item], item[1:] == item[:-1]
        joined = torch.where(same, begin[1:] == end[:-1], (end[:-1] == of[:-1]) & (begin[1:] == 0))
        every = torch.equal(item.unique(), torch.arange(self.num_items))
        if not (every and bool(joined.all()) and bool(begin[:1].eq(0).all()) and bool(end[-1:].eq(of[-1:]).all())):
            faults.append("pieces")
        # Parts of an item are done by CTAs one after the other, the last tiles first, and are as many as there are.
        counts = item.bincount(minlength=self.num_items)[item]
        beside = ~same | ((cta[1:] == cta[:-1] - 1) & (part[1:] == part[:-1] - 1))
        if not (bool(beside.all()) and torch.equal(parts, counts) and bool(part.lt(parts).all())):
            faults.append("parts")
        # A share differs from the fair one by what a cut may move at both ends: less than the 4 tiles and the item's
        # own cost that a piece must be worth, or an item.
        most = int((ITEM_COST + TILE_COST * tiles).max())
        slack = 2 * (most if self.shape.whole_items else 4 * TILE_COST + ITEM_COST)
        shares = max(1, min(self.shape.num_ctas, int(before[-1]) // (ITEM_COST + 4 * TILE_COST)))
        raw = self.pieces[: int(starts[-1])].cpu().long()
        cost = TILE_COST * (raw[:, 2] - raw[:, 1]) + ITEM_COST * (raw[:, 2] == tiles.cpu()[raw[:, 0]])
        sums = torch.cat([cost.new_zeros(1), cost.cumsum(0)])[starts.long()].diff()
        if int(sums.max()) > int(before[-1]) // shares + slack:
            faults.append("shares")
        if self.shape.whole_items and bool((parts > 1).any()):
            faults.append("an item is cut")
        return faults

    def flop(self) -> float:
        """Multiplications and additions of both products over visible columns, 4 * head_dim each."""
        s, total = self.shape, 0.0
        for row, length in enumerate(self.stream_lens.tolist()):
            span, part = self.spans[row // (s.kv_heads * s.parts)], row % s.parts
            heads = min(s.list_heads, s.group - part * s.list_heads)
            total += heads * span.len * (length - (span.len - 1) / 2)
        return 4 * s.head_dim * total

    def expected(self) -> Iterator[tuple[slice, int, torch.Tensor, torch.Tensor]]:
        """Per span and query head: query tokens, head, out [tokens, dim] and lse [tokens], fp64."""
        s = self.shape
        for index, span in enumerate(self.spans):
            tokens = slice(span.q_start, span.q_start + span.len)
            for head in range(s.kv_heads * s.group):
                kv_head, part = head // s.group, head % s.group // s.list_heads
                slots = self.slots[(index * s.kv_heads + kv_head) * s.parts + part]
                k, v = (self._gather(pool, slots, kv_head) for pool in (self.k, self.v))
                logits = self.q[tokens, head].double() @ k.T * self.scale
                column = torch.arange(len(slots), device="cuda")
                visible = column < len(slots) - span.len + 1 + torch.arange(span.len, device="cuda")[:, None]
                logits.masked_fill_(~visible, -math.inf)
                lse = torch.logsumexp(logits, -1)
                weights = logits.sub_(lse[:, None]).exp_().nan_to_num_(nan=0.0)
                yield tokens, head, weights @ v, lse

    def _gather(self, pool: torch.Tensor, slots: torch.Tensor, kv_head: int) -> torch.Tensor:
        page = self.shape.page_size
        rows = pool[slots.clamp_min(0) // page, slots.clamp_min(0) % page, kv_head].double()
        return torch.where(slots[:, None] < 0, 0.0, rows)

    def errors(self) -> tuple[float, float]:
        """Relative error of out (norm over norm, worst list) and greatest error of lse, by 100 where it is greater.

        NaN is infinite.
        """
        s, worst_lse = self.shape, 0.0
        squares = torch.zeros(len(self.slots), 2, device="cuda", dtype=torch.float64)  # of the error, of the answer
        for i, (tokens, head, out, lse) in enumerate(self.expected()):
            row = i // s.group * s.parts + i % s.group // s.list_heads
            squares[row, 0] += (self.out[tokens, head].double() - out).square().sum()
            squares[row, 1] += out.square().sum()
            got = self.lse[head, tokens].double()
            gap = torch.where((lse == -math.inf) & (got == -math.inf), 0.0, got - lse).abs()
            gap = (gap / torch.where(lse == -math.inf, 1.0, lse.abs() / 100).clamp_min(1.0)).max().item()
            worst_lse = max(worst_lse, math.inf if math.isnan(gap) else gap)
        error = (squares[:, 0] / squares[:, 1].clamp_min(1e-30)).sqrt().max().item()
        return math.inf if math.isnan(error) else error, worst_lse
