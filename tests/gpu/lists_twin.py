"""plan's spans, keep, union and table in NumPy, by sorting and in f64: what the kernels must reproduce."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import params

EPSILON = 2.0**-23


@dataclasses.dataclass
class World:
    """One step on the host; `scores` [select spans, num_q_heads, max_blocks]."""

    layout: params.Layout
    settings: params.Settings
    cu_seqlens_q: np.ndarray
    seq_lens: np.ndarray
    table: np.ndarray  # [num_reqs, stride], of which table_width entries are the row
    table_width: int
    num_pages: int
    total_q: int
    max_list_spans: int
    max_select_spans: int
    max_items: int
    external: bool = False
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None

    @property
    def block(self) -> int:
        """Tokens."""
        return 1 << self.layout.log2_block_tokens

    @property
    def lists_per_span(self) -> int:
        """Over all KV heads."""
        return self.layout.lists_per_kv_head * self.layout.num_kv_heads


# ---- batch and spans ----


def requests(world: World) -> list[tuple[int, int, int, int]]:
    """(q_start, q_len, kv_len, refused) of each, as far as the request itself decides."""
    out, claimed = [], 0
    page = 1 << world.layout.log2_page_tokens
    for r, seq_len in enumerate(int(x) for x in world.seq_lens):
        start, end = int(world.cu_seqlens_q[r]), int(world.cu_seqlens_q[r + 1])
        broken = start < claimed or end < start or end > world.total_q
        if start <= world.total_q:
            claimed = max(claimed, start)
        if broken:
            out.append((0, 0, 0, 1))
            continue
        q_len = end - start
        if q_len == 0:
            out.append((start, 0, 0, 0))
            continue
        bad = not 0 <= seq_len <= min(world.layout.max_kv_len, world.table_width * page)
        if not bad:
            ids = world.table[r, : -(-seq_len // page)]
            bad = bool(((ids < 0) | (ids >= world.num_pages)).any())
        out.append((start, q_len, 0 if bad else seq_len, int(bad)))
    return out


def plan(world: World) -> tuple[list, list[dict], list[dict], tuple[int, int, int, int]]:
    """Requests, list spans, select spans, (list spans, select spans, items, refused)."""
    layout = world.layout
    found = requests(world)
    lists: list[dict] = []
    selects: list[dict] = []
    items, full = 0, False
    for r, request in enumerate(found):
        mine_selects = _spans(world, r, request, layout.select_span)
        mine_lists = _spans(world, r, request, layout.list_span)
        at = items
        for span in mine_lists:
            inside = [
                i for i, s in enumerate(mine_selects) if span["first"] <= s["first"] < span["first"] + span["len"]
            ]
            span["first_select"], span["num_selects"] = len(selects) + inside[0], len(inside)
            span["first_item"] = at
            at += world.lists_per_span * math.ceil(span["len"] / (128 // layout.heads_per_list))
        for span in mine_lists:
            span["chunk_items"] = at - items
        sizes = (len(lists) + len(mine_lists), len(selects) + len(mine_selects), at)
        most = (world.max_list_spans, world.max_select_spans, world.max_items)
        full = full or any(size > limit for size, limit in zip(sizes, most, strict=True))
        if full and request[1] > 0:
            found[r] = (request[0], 0, 0, 1)
        if not full:
            lists, selects, items = lists + mine_lists, selects + mine_selects, at
    if world.total_q == 0:
        return found, [], [], (0, 0, 0, 0)
    return found, lists, selects, (len(lists), len(selects), items, sum(x[3] for x in found))


def _spans(world: World, r: int, request: tuple[int, int, int, int], tokens: int) -> list[dict]:
    q_start, q_len, kv_len, _ = request
    settings = world.settings
    past = max(0, kv_len - q_len)
    dense = (
        settings.all_dense
        or q_len <= settings.dense_max_q_len
        or kv_len < settings.dense_below_kv_len
        or kv_len <= settings.dense_prefix_tokens
        or past // world.block == 0
    )
    step = max(1, q_len) if tokens == 0 else tokens
    select = world.layout.select_span or max(1, q_len)
    voting = max(1, -(-q_len // select) - settings.non_voting_spans) if settings.non_voting_spans else 1 << 30
    out = []
    for first in range(0, q_len, step):
        size = min(step, q_len - first)
        span = {"req": r, "first": first, "len": size, "q_start": q_start + first, "past": past, "dense": int(dense)}
        span |= {"kv_end": max(0, kv_len + first + size - q_len), "votes": int(first // select < voting)}
        out.append(span | {"first_select": 0, "num_selects": 0, "first_item": 0, "chunk_items": 0})
    return out


# ---- keep ----


def blocks(share: float, n: int) -> int:
    """ceil(share * n) that the last bit of an f32 cannot push up."""
    return n if share >= 1 else min(n, math.ceil(share * n * (1 - EPSILON)))


def forced_blocks(settings: params.Settings, n: int) -> np.ndarray:
    """Sink and local."""
    j = np.arange(n)
    return (j < settings.sink_blocks) | (n - j <= settings.local_blocks)


def ranked(scores: np.ndarray, forced: np.ndarray) -> np.ndarray:
    """Forced first, then the best; equal ones by block."""
    worth = np.where(np.isnan(scores), np.float32(np.inf), scores).astype(np.float32)
    bits = worth.view(np.int32).astype(np.int64)
    key = np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)  # the total order: -0 below +0
    return np.lexsort((np.arange(len(scores)), np.where(forced, 0, -key), ~forced))


def kept(settings: params.Settings, scores: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The order, and how many of it stay: the f64 answer first, then what rounding of sums may make of it."""
    n = len(scores)
    forced = forced_blocks(settings, n)
    order = ranked(scores, forced)
    count = int(forced.sum())
    free = scores[order[count:]]
    worth = np.where(np.isnan(free), np.inf, free)
    if settings.keep == params.THRESHOLD:
        wanted = [count + int((worth >= np.float32(settings.keep_value)).sum())]
    elif settings.keep == params.DENSITY:
        wanted = [blocks(settings.keep_value, n)]
    else:
        wanted = _mass(settings, scores, order)
    least = max(blocks(settings.min_density, n), _budget(settings, scores, forced))
    sure = count + int(np.isposinf(worth).sum())
    numbers = [max(min(max(w, least), blocks(settings.max_density, n)), sure) for w in wanted]
    return order, numbers


def _mass(settings: params.Settings, scores: np.ndarray, order: np.ndarray) -> list[int]:
    """Three prefixes: of f64, and of a share less and more by what either way of summing can be off.

    Fixed point: 2^(2 L - 62) of the sum, n < 2^L. f64 running sums: n * 2^-53 each, of two of them.
    """
    n = len(scores)
    mass = np.where(np.isfinite(scores), np.maximum(scores.astype(np.float64), 0), 0.0)[order]
    past = float(np.cumsum(mass)[-1]) if n else 0.0
    open_mass = max(0.0, 1 - past) if settings.mass_counts_open else 0.0
    held = np.cumsum(np.concatenate([[open_mass], mass]))[:-1]
    target = float(np.float32(settings.keep_value)) * (past + open_mass)
    off = (2.0 ** (2 * n.bit_length() - 62) + n * 2.0**-52) * (past + open_mass)
    nan = np.flatnonzero(np.isnan(scores[order]))
    unjudged = int(nan[-1]) + 1 if len(nan) else 0
    prefixes = []
    for goal in (target, target - off, target + off):
        reached = np.flatnonzero(held >= goal)
        prefixes.append(max(int(reached[0]), unjudged) if len(reached) else n)
    return prefixes


def _budget(settings: params.Settings, scores: np.ndarray, forced: np.ndarray) -> int:
    if settings.min_budget == 0:
        return 0
    best = ranked(scores, np.zeros(len(scores), bool))[: settings.min_budget]
    return int(forced.sum()) + int((~forced[best]).sum())


# ---- union and table ----


def merged(world: World, rows: np.ndarray) -> np.ndarray:
    """`rows` [rows, past blocks] f32 to one, in f32 and in row order.

    The maximum of zeros is +0 unless all are -0, which the CPU leaves open and the kernel does not.
    """
    if world.settings.merge_max:
        best = np.max(rows, axis=0)  # NaN wins
        best[(best == 0) & ~np.signbit(rows).all(axis=0)] = 0.0
        return best
    out = np.zeros(rows.shape[1], np.float32)
    for row in rows:
        out += row / np.float32(len(rows))
    return out


def list_heads(layout: params.Layout, index: int) -> range:
    """Query heads of list `index` of a span."""
    kv_head, part = divmod(index, layout.lists_per_kv_head)
    first = part * layout.heads_per_list
    end = min(first + layout.heads_per_list, layout.group_size)
    return range(kv_head * layout.group_size + first, kv_head * layout.group_size + end)


def finish(world: World, span: dict, dense: bool, past_bits: np.ndarray) -> tuple[np.ndarray, dict]:
    """All blocks of one list, and what it adds to the counters."""
    past, total = span["past"] // world.block, -(-span["kv_end"] // world.block)
    bits = np.ones(total, bool)
    if dense:
        return bits, {"lists": 1, "dense": 1}
    forced = forced_blocks(world.settings, past)
    chosen = past_bits | forced
    counts = {"lists": 1, "candidates": past, "forced": int(forced.sum()), "guarded": 0}
    guard = float(np.float32(world.settings.density_guard)) * (1 + EPSILON)
    if int(chosen.sum()) > guard * past:
        counts["guarded"] = int(chosen.sum() < past)
        chosen[:] = True
    counts["selected"] = int(chosen.sum())
    bits[: min(past, total)] = chosen[:total]
    return bits, counts


def table_row(world: World, span: dict, bits: np.ndarray) -> tuple[list[int], int]:
    """Boxes and tokens of a list whose blocks are `bits`."""
    box, page = 1 << world.layout.log2_box_tokens, 1 << world.layout.log2_page_tokens
    starts = np.arange(0, span["kv_end"], box)
    starts = starts[bits[starts // world.block]] if len(starts) else starts
    ids = world.table[span["req"], starts // page].astype(np.int64)
    tokens = int(np.minimum(box, span["kv_end"] - starts).sum())
    return (ids * (page // box) + starts % page // box).tolist(), tokens


def unpack(words: np.ndarray) -> np.ndarray:
    """Rows of uint32 words to bools."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little").astype(bool)
