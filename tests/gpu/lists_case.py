"""Random steps for the kernels from plan's spans to the table, and their device buffers, poisoned."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import params
import torch
from driver import Kernel
from lists_twin import World, plan

POISON = 0x5A5A5A5A
SHARED_ROW_BLOCKS = 8192


class Random:
    """Choices by one generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def pick(self, *options: float) -> float:
        """One of them."""
        return options[self.rng.integers(len(options))]

    def upto(self, low: int, high: int) -> int:
        """low..=high."""
        return int(self.rng.integers(low, high + 1))


def world_of(seed: int) -> World:
    """A random step; every 16th is damaged, every 8th has rows that do not fit shared memory, some many requests."""
    r = Random(seed)
    long, many = seed % 8 == 3, seed % 16 == 5
    block = r.pick(1, 16) if long else r.pick(1, 16, 16, 32, 64, 128, 256)
    page = r.pick(16, 32, 64, 128, 256)
    num_reqs = 1 if long else r.upto(100, 1024) if many else r.upto(0 if seed % 8 == 0 else 1, 5)
    q_lens = [_queries(r, long, many) for _ in range(num_reqs)]
    past = [_past(r, block, long, many) for _ in q_lens]
    lens = [max(0, p + (q if r.upto(0, 9) else -r.upto(0, 9))) for p, q in zip(past, q_lens, strict=True)]
    layout = _layout(r, block, page, max([1, *lens]))
    world = World(
        layout=layout,
        settings=_settings(r, layout),
        cu_seqlens_q=np.cumsum([0, *q_lens]).astype(np.int32),
        seq_lens=np.array(lens, np.int32),
        table=np.zeros((num_reqs, 0), np.int32),
        table_width=-(-max([1, *lens]) // page) + r.upto(0, 3),
        num_pages=0,
        total_q=sum(q_lens),
        max_list_spans=_most(layout.list_span, q_lens),
        max_select_spans=_most(layout.select_span, q_lens),
        max_items=0,
        external=r.upto(0, 5) == 0,
    )
    _pages(r, world)
    tokens = 128 // layout.heads_per_list
    world.max_items = world.lists_per_span * (sum(q_lens) // tokens + world.max_list_spans)
    if seed % 16 == 9 and num_reqs:
        _damage(r, world)
    _fill(r, world)
    return world


def _queries(r: Random, long: bool, many: bool) -> int:
    most = 5 if many else 40 if long else 600
    return int(r.pick(0, 1, *(r.upto(2, most) for _ in range(4)))) if not long else r.upto(1, most)


def _past(r: Random, block: int, long: bool, many: bool) -> int:
    if long:
        return r.upto(8000, 140000) * (block if block > 1 else 1) // (4 if block > 1 else 3)
    if many:
        return int(r.pick(0, r.upto(0, 500)))
    most = 3000 if block == 1 else 16000 if block < 64 else 40000
    return int(r.pick(0, r.upto(0, 90), *(r.upto(0, most) for _ in range(4))))


def _most(span: int, q_lens: list[int]) -> int:
    return (sum(q_lens) // span if span else 0) + min(len(q_lens), sum(q_lens))


def _layout(r: Random, block: int, page: int, max_kv_len: int) -> params.Layout:
    group, kv_heads = r.pick(1, 3, 4, 7), r.upto(1, 2)
    heads = min(group, r.pick(1, 2, 3, group))
    list_span = r.pick(0, 128, 256, 512)
    select_span = min(block, list_span or block) if block > 1 and r.upto(0, 1) else list_span
    max_kv_len = max_kv_len + r.upto(0, 100)
    blocks = -(-max_kv_len // block)
    return params.Layout(
        num_q_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        group_size=group,
        head_dim=64,
        log2_page_tokens=page.bit_length() - 1,
        log2_block_tokens=block.bit_length() - 1,
        log2_box_tokens=min(page, block).bit_length() - 1,
        heads_per_list=heads,
        lists_per_kv_head=-(-group // heads),
        list_span=list_span,
        select_span=select_span,
        max_kv_len=max_kv_len,
        max_blocks=blocks,
        mask_words=-(-blocks // 32),
        max_boxes=-(-max_kv_len // min(page, block)),
        sm_scale=0.125,
    )


def _settings(r: Random, layout: params.Layout) -> params.Settings:
    flash = layout.select_span and r.upto(0, 1)
    most = r.pick(1.0, 1.0, 0.35, 0.1)
    settings = params.Settings(
        all_dense=int(r.upto(0, 30) == 0),
        dense_below_kv_len=r.pick(0, 0, 300),
        dense_max_q_len=r.pick(0, 0, 16),
        dense_prefix_tokens=r.pick(0, 0, 200),
        keep=int(r.pick(params.THRESHOLD, params.MASS, params.MASS, params.DENSITY)),
        keep_value=r.pick(1.0, 0.97, 0.9, 0.5, 0.1, 0.01, 1e-4),
        min_density=most * r.pick(0, 0, 0.1, 1.0),
        max_density=most,
        keep_at_rows=r.upto(0, 1),
        merge_max=r.upto(0, 1),
        sink_blocks=r.pick(0, 1, 2, 7, 2**31 - 1 if r.upto(0, 4) == 0 else 3),
        local_blocks=r.pick(0, 1, 3, 33, 2**31 - 1 if r.upto(0, 4) == 0 else 3),
        density_guard=r.pick(1.0, 0.9, 0.9, 0.3),
        mass_counts_open=r.upto(0, 1),
        min_budget=r.pick(0, 1, 2, 10, 100000) if flash else 0,
        non_voting_spans=r.pick(0, 1, 2, 9) if flash else 0,
    )
    if r.upto(0, 5) == 0:  # as many as the guard allows, to the block
        settings.keep, settings.max_density, settings.density_guard = params.DENSITY, 1.0, 0.9
        settings.keep_value = settings.min_density = 0.9
    return settings


def _pages(r: Random, world: World) -> None:
    """Each request's pages at random; garbage after the valid prefix and between rows."""
    page = 1 << world.layout.log2_page_tokens
    used = [-(-int(x) // page) for x in world.seq_lens]
    world.num_pages = max(1, sum(used)) + r.upto(0, 5)
    ids = r.rng.permutation(world.num_pages)
    world.table = r.rng.choice(np.array([-1, 2**31 - 1, -(2**31)], np.int32), (len(used), world.table_width + 2))
    for row, count in zip(world.table, used, strict=True):
        row[:count], ids = ids[:count], ids[count:]


def _damage(r: Random, world: World) -> None:
    """What a host could get wrong."""
    page = 1 << world.layout.log2_page_tokens
    for _ in range(r.upto(1, 3)):
        req = r.upto(0, len(world.seq_lens) - 1)
        what = r.upto(0, 6)
        if what == 0:
            world.seq_lens[req] = r.pick(-1, -(2**31), world.layout.max_kv_len + 1, 2**31 - 1)
        elif what == 1 and world.seq_lens[req] > 0:
            at = r.upto(0, (int(world.seq_lens[req]) - 1) // page) if world.seq_lens[req] < 2**30 else 0
            world.table[req, min(at, world.table_width - 1)] = r.pick(-1, world.num_pages, 2**31 - 1)
        elif what == 2:
            world.cu_seqlens_q[r.upto(0, len(world.seq_lens))] = r.pick(-5, 0, 2, world.total_q, 2**31 - 1, -(2**31))
        elif what == 3:
            world.max_list_spans = r.upto(0, world.max_list_spans)
        elif what == 4:
            world.max_select_spans = r.upto(0, world.max_select_spans)
        elif what == 5:
            world.max_items = r.upto(0, world.max_items)
        else:
            world.table_width = max(1, world.table_width - r.upto(1, 5))


def _fill(r: Random, world: World) -> None:
    """Scores of past blocks of spans that are not dense; the rest is NaN, which a row that reads it would keep."""
    layout = world.layout
    shape = (max(1, world.max_select_spans), layout.num_q_heads, layout.max_blocks)
    world.scores = np.full(shape, np.nan, np.float32)
    for i, span in enumerate(plan(world)[2]):
        n = span["past"] // world.block
        if not span["dense"]:
            world.scores[i, :, :n] = np.stack([row_of_scores(r, n) for _ in range(layout.num_q_heads)])
    density = r.pick(0.01, 0.2, 0.9)
    bits = r.rng.random((*shape[:2], layout.mask_words * 32)) < density
    world.masks = np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)


def row_of_scores(r: Random, n: int) -> np.ndarray:
    """Softmax, uniform, tied, constant, zero, sick, huge, tiny."""
    kind = r.upto(0, 9)
    x = r.rng.random(n)
    if kind <= 2:
        x = np.exp(r.rng.normal(0, r.pick(0.5, 2, 5), n))
        x = x / x.sum()
    elif kind == 3:
        x = np.round(x * r.pick(1, 3, 8)) / 8
    elif kind == 4:
        x[:] = r.pick(0.0, 1.0, 0.25, 1 / n, 3e38, 1e-45, np.nan)
    elif kind == 5:
        x[x < 0.5] = 0.0
        x[r.rng.random(n) < 0.1] = -0.0
    elif kind == 6:
        x = np.exp(r.rng.normal(0, 30, n)).clip(1e-44, 3e38)
    elif kind == 7:
        x = r.rng.normal(0, 1, n)
    if r.upto(0, 4) == 0:
        x[r.rng.random(n) < r.pick(0.02, 0.5)] = r.pick(np.nan, np.inf, -np.inf, -np.nan)
    return x.astype(np.float32)


# The one cluster of plan's spans.
SPANS_CTAS = 8


class Kernels:
    """The four, from the cubins of a folder."""

    def __init__(self, folder: Path) -> None:
        most = 184 * 1024
        self.spans = Kernel(folder / "spans.cubin", "compactattn_plan_spans", 0)
        self.keep_rows = Kernel(folder / "keep_rows.cubin", "compactattn_keep_rows", most)
        self.union_table = Kernel(folder / "union_table.cubin", "compactattn_union_table", most)
        self.union_wide = Kernel(folder / "union_table_wide.cubin", "compactattn_union_table_wide", most)
        self.table = Kernel(folder / "table.cubin", "compactattn_table", 0)


def shared_bytes(layout: params.Layout) -> int:
    """Dynamic, of the kernels that keep."""
    return 4 * layout.mask_words + (4 * layout.max_blocks if layout.max_blocks <= SHARED_ROW_BLOCKS else 0)


class Buffers:
    """Device memory of one step, every output poisoned and one row longer than it may be written."""

    def __init__(self, world: World) -> None:
        self.world = world
        layout, per_span = world.layout, world.lists_per_span
        self.list_rows = world.max_list_spans * per_span
        sizes = {
            "counters": (1, 8),
            "requests": (len(world.seq_lens), 4),
            "list_spans": (world.max_list_spans, 12),
            "select_spans": (world.max_select_spans, 12),
            "masks": (world.max_select_spans * layout.num_q_heads, layout.mask_words),
            "lists": (self.list_rows, layout.mask_words),
            "counts": (self.list_rows, 1),
            "stream_lens": (self.list_rows, 1),
            "boxes": (self.list_rows, layout.max_boxes),
            "cells": (self.list_rows if layout.max_blocks > SHARED_ROW_BLOCKS else 0, layout.max_blocks),
        }
        self.out = {
            name: torch.full((rows + 1, width), POISON, dtype=torch.int32, device="cuda")
            for name, (rows, width) in sizes.items()
        }
        self.rows = {name: rows for name, (rows, _) in sizes.items()}
        self.stats = torch.zeros(8, dtype=torch.int64, device="cuda")
        given = {"cu": world.cu_seqlens_q, "lens": world.seq_lens, "table": world.table, "scores": world.scores}
        self.given = {name: torch.from_numpy(np.ascontiguousarray(x)).cuda() for name, x in given.items()}
        self.step = self._step()

    def _step(self) -> params.Step:
        world = self.world
        batch = params.Batch(
            cu_seqlens_q=self.given["cu"].data_ptr(),
            seq_lens=self.given["lens"].data_ptr(),
            block_table=self.given["table"].data_ptr(),
            table_stride=world.table.shape[1],
            table_width=world.table_width,
            num_reqs=len(world.seq_lens),
            total_q=world.total_q,
            num_pages=world.num_pages,
        )
        pointers = {name: x.data_ptr() for name, x in self.out.items()}
        stages = params.Stages(
            **pointers,
            scores=self.given["scores"].data_ptr(),
            stats=self.stats.data_ptr(),
            max_list_spans=world.max_list_spans,
            max_select_spans=world.max_select_spans,
            max_items=world.max_items,
        )
        return params.Step(batch, world.layout, world.settings, stages)

    def launch(self, kernels: Kernels, *, wide: bool = False) -> None:
        """The stages from batch to table; masks are given where the world says so. `wide`: by 1024 threads a list."""
        world, step = self.world, self.step
        if world.external:
            given = world.masks.reshape(-1, world.layout.mask_words)[: self.rows["masks"]]
            self.out["masks"][: len(given)] = torch.from_numpy(given.view(np.int32)).cuda()
        kernels.spans.launch((SPANS_CTAS, 1), 1024, [step])
        union, threads = (kernels.union_wide, 1024) if wide else (kernels.union_table, 256)
        for kernel in (kernels.keep_rows, union):
            kernel.shared_bytes = shared_bytes(world.layout)
        if world.settings.keep_at_rows and not world.external and self.rows["masks"]:
            kernels.keep_rows.launch((self.rows["masks"], 1), 256, [step, ctypes.c_int32(0)])
        if self.list_rows:
            union.launch((self.list_rows, 1), threads, [step, ctypes.c_int32(world.external)])

    def read(self) -> dict[str, np.ndarray]:
        """All outputs on the host."""
        return {name: x.cpu().numpy() for name, x in self.out.items()} | {"stats": self.stats.cpu().numpy()}
