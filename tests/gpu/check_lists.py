"""plan's spans, keep, union and table on the GPU against their NumPy twin, over random steps; prints each failure.

Everything is exact but the rule by mass: its kernel sums in fixed point, the twin in f64, so a row whose ranked
prefix comes within the two errors of the share (lists_twin._mass) may hold the neighbouring number of blocks.
Such rows are counted and printed.

    python check_lists.py CUBINS [STEPS [FIRST_SEED]]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import params
import torch
from lists_case import POISON, Buffers, Kernels, world_of
from lists_twin import World, finish, kept, list_heads, merged, plan, table_row, unpack

SPAN = [name for name, *_ in params.Span._fields_]
STATS = ("calls", "lists", "candidates", "selected", "forced", "guarded", "dense", "refused")


class Check:
    """One step: what the kernels wrote against the twin."""

    def __init__(self, world: World, got: dict[str, np.ndarray]) -> None:
        self.world, self.got = world, got
        self.errors: list[str] = []
        self.in_band = 0
        self.rows = 0
        self.stats = dict.fromkeys(STATS, 0)
        self.requests, self.lists, self.selects, self.counts = plan(world)

    def run(self) -> list[str]:
        """All stages, each from what the one before it wrote on the GPU."""
        self.spans()
        if self.errors:
            return self.errors
        if self.world.settings.keep_at_rows and not self.world.external:
            self.masks()
        self.unions()
        self.untouched()
        if list(self.stats.values()) != self.got["stats"].tolist():
            self.errors.append(f"stats {self.got['stats'].tolist()}, wanted {self.stats}")
        return self.errors

    def spans(self) -> None:
        """Requests, spans and counters."""
        got = self.got
        self.same("counters", got["counters"][0][:4].tolist(), list(self.counts))
        self.same("requests", got["requests"][:-1].tolist(), [list(x) for x in self.requests])
        for name, wanted in (("list_spans", self.lists), ("select_spans", self.selects)):
            self.same(name, got[name][: len(wanted)].tolist(), [[span[key] for key in SPAN] for span in wanted])

    def masks(self) -> None:
        """Rows that keep for themselves."""
        world = self.world
        words = world.layout.mask_words
        masks = unpack(self.got["masks"][:-1].view(np.uint32)).reshape(-1, world.layout.num_q_heads, words * 32)
        for s, span in enumerate(self.selects):
            past, total = span["past"] // world.block, -(-span["kv_end"] // world.block)
            for head in range(world.layout.num_q_heads):
                wanted = np.zeros(words * 32, bool)
                wanted[0 if span["dense"] else past : total] = True
                if span["dense"] or not span["votes"]:
                    self.same(f"mask {s}.{head}", masks[s, head].tolist(), wanted.tolist())
                    continue
                options = self.options(world.scores[s, head, :past])
                full = [np.concatenate([option, wanted[past:]]) for option in options]
                self.one_of(f"mask {s}.{head}", masks[s, head], full)

    def unions(self) -> None:
        """Lists, the table, statistics."""
        world, per_span = self.world, self.world.lists_per_span
        lists = unpack(self.got["lists"][:-1].view(np.uint32))
        for row in range(len(self.lists) * per_span):
            span = self.lists[row // per_span]
            found = self.union(row, span, lists[row])
            boxes, tokens = table_row(world, span, lists[row])
            self.same(f"count {row}", int(self.got["counts"][row, 0]), len(boxes))
            self.same(f"stream_len {row}", int(self.got["stream_lens"][row, 0]), tokens)
            self.same(f"boxes {row}", self.got["boxes"][row, : len(boxes)].tolist(), boxes)
            for name, more in found.items():
                self.stats[name] += more
        if self.world.max_list_spans:
            self.stats["calls"] = 1
            self.stats["refused"] = self.counts[3]

    def union(self, row: int, span: dict, got: np.ndarray) -> dict:
        """One list; what it adds to the statistics."""
        world = self.world
        heads = list_heads(world.layout, row % world.lists_per_span)
        first = span["first_select"]
        voting = [s for s in range(first, first + span["num_selects"]) if self.selects[s]["votes"]]
        past = span["past"] // world.block
        if span["dense"] or not voting:
            options = [np.ones(past, bool)]
        elif world.settings.keep_at_rows or world.external:
            shape = (-1, world.layout.num_q_heads, world.layout.mask_words)
            masks = self.got["masks"][:-1].view(np.uint32).reshape(shape)
            options = [unpack(masks[voting][:, list(heads)]).any(axis=(0, 1))[:past]]
        else:
            rows = world.scores[voting][:, list(heads), :past].reshape(-1, past)
            options = self.options(merged(world, rows))
        ends = [finish(world, span, bool(span["dense"] or not voting), option) for option in options]
        full = [np.concatenate([bits, np.zeros(len(got) - len(bits), bool)]) for bits, _ in ends]
        return ends[self.one_of(f"list {row}", got, full)][1]

    def options(self, scores: np.ndarray) -> list[np.ndarray]:
        """What may stay, the f64 answer first."""
        order, numbers = kept(self.world.settings, scores)
        rest = range(min(numbers), max(numbers) + 1)
        self.rows += 1
        out = []
        for number in [numbers[0], *(x for x in rest if x != numbers[0])]:
            bits = np.zeros(len(scores), bool)
            bits[order[:number]] = True
            out.append(bits)
        return out

    def one_of(self, what: str, got: np.ndarray, options: list[np.ndarray]) -> int:
        """Which of the options it is; 0 and an error if none."""
        for i, option in enumerate(options):
            if np.array_equal(got, option):
                self.in_band += i > 0
                return i
        wrong = np.flatnonzero(got != options[0])
        counts = f"{int(got.sum())} set, wanted {int(options[0].sum())}"
        self.errors.append(f"{what}: {counts}, {len(options)} options, first wrong {wrong[:8].tolist()}")
        return 0

    def same(self, what: str, got: object, wanted: object) -> None:
        """Exactly."""
        if got == wanted:
            return
        pairs = zip(got, wanted, strict=False) if isinstance(got, list) and isinstance(wanted, list) else ()
        first = next(((i, a, b) for i, (a, b) in enumerate(pairs) if a != b), (got, wanted))
        self.errors.append(f"{what}: {str(first)[:300]}")

    def untouched(self) -> None:
        """Nothing is written after the rows that the step has."""
        rows = {"list_spans": len(self.lists), "select_spans": len(self.selects), "requests": len(self.requests)}
        per_span = self.world.lists_per_span
        rows |= dict.fromkeys(("lists", "counts", "stream_lens", "boxes", "cells"), len(self.lists) * per_span)
        if not self.world.external:
            rows["masks"] = len(self.selects) * self.world.layout.num_q_heads
        for name, first in rows.items():
            if (self.got[name][first:] != POISON).any():
                self.errors.append(f"{name}: written after row {first}")


def table_alone(buffers: Buffers, kernels: Kernels, got: dict[str, np.ndarray]) -> list[str]:
    """The table kernel from the same lists, with garbage after their ends."""
    if not buffers.list_rows:
        return []
    world = buffers.world
    for row in range(int(got["counters"][0, 0]) * world.lists_per_span):
        total = -(-int(got["list_spans"][row // world.lists_per_span, 4]) // world.block)
        if total % 32:
            buffers.out["lists"][row, total // 32] |= -(1 << (total % 32))
    for name in ("counts", "stream_lens", "boxes"):
        buffers.out[name].fill_(POISON)
    kernels.table.launch((buffers.list_rows, 1), 256, [buffers.step])
    again = buffers.read()
    names = ("counts", "stream_lens", "boxes")
    return [f"table alone: other {name}" for name in names if not np.array_equal(got[name], again[name])]


def again(buffers: Buffers, kernels: Kernels, got: dict[str, np.ndarray]) -> list[str]:
    """The same step a second time, over what the first one left, each list by more threads."""
    buffers.launch(kernels, wide=True)
    second = buffers.read()
    return [
        f"second run: other {name}" for name in got if name != "stats" and not np.array_equal(got[name], second[name])
    ]


def main(cubins: str, steps: int = 600, first: int = 0) -> int:
    """Checks `steps` random steps; the number that fail."""
    kernels = Kernels(Path(cubins))
    failures, rows, lists, in_band = 0, 0, 0, 0
    for seed in range(first, first + steps):
        buffers = Buffers(world_of(seed))
        buffers.launch(kernels)
        torch.cuda.synchronize()
        got = buffers.read()
        check = Check(buffers.world, got)
        errors = check.run() + again(buffers, kernels, got) + table_alone(buffers, kernels, got)
        rows, lists, in_band = rows + check.rows, lists + check.stats["lists"], in_band + check.in_band
        if errors:
            failures += 1
            print(f"FAIL step {seed}: {len(errors)} errors, {errors[:3]}", flush=True)
        if failures > 20:
            break
    print(f"{steps - failures} of {steps} steps right: {rows} rows ranked, {in_band} in the tie band, {lists} lists")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1], *(int(x) for x in sys.argv[2:])) else 0)
