"""Times of exact cells where a request has several select spans, each key read for one of them or for two, on sm_90a.

Medians and least of single launches, after both were seen to give the same cells. Keys are more than L2 holds: where a
context is short, copies are read in turn.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cells_case import Case, Data, Kernels, Shape

# Chunk x past of each request, query tokens of a select span.
SHAPES = (
    Shape(((1024, 131072),), kv_heads=8, block=32, query_span=1024),
    Shape(((2048, 131072),), kv_heads=8, block=32, query_span=1024),
    Shape(((1024, 130048),), kv_heads=8, block=32, query_span=512),
    Shape(((1024, 131072),), kv_heads=8, block=128, query_span=512),
    Shape(((3072, 131072),), kv_heads=8, block=32, query_span=1024),
    Shape(((8192, 131072),), kv_heads=8, block=32, query_span=1024),
    Shape(((2048, 32768),), kv_heads=8, block=32, query_span=1024),
    Shape(((8192, 32768),), kv_heads=8, block=32, query_span=1024),
    Shape(((2048, 8192),), kv_heads=8, block=32, query_span=1024),
    Shape(((1024, 32768),) * 4, kv_heads=8, block=32, query_span=1024),
    Shape(((2048, 131072),), kv_heads=8, head_dim=64, block=32, query_span=1024),
    Shape(((2048, 131072),), kv_heads=4, head_dim=256, block=32, query_span=1024),
)
READS = ("cells_read_sm90", "cells_read_pairs_sm90")
L2_BYTES = 50e6


def times_us(launches: list[Callable[[], None]], reps: int = 15) -> tuple[float, float]:
    """Median and least over single launches, of each in turn."""
    times = []
    for i in range(reps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # hides what it costs to launch
        start.record()
        launches[i % len(launches)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times), min(times)


def describe(shape: Shape) -> str:
    """In one line."""
    (q_len, past), count = shape.requests[0], len(shape.requests)
    heads = f"{shape.kv_heads * shape.group}/{shape.kv_heads} d{shape.head_dim}"
    spans = count * math.ceil(q_len / shape.query_span)
    return f"{count} x {q_len} past {past}, {spans} spans of {shape.query_span}, {heads}, block {shape.block}"


def time_shape(kernels: Kernels, base: Shape) -> None:
    """Both kernels, and what follows them for all spans."""
    shape = Shape(**{**vars(base), "sample_rows": 32})
    tokens = sum(q_len + past for q_len, past in shape.requests)
    copies = min(4, math.ceil(4 * L2_BYTES / (tokens * shape.kv_heads * shape.head_dim * 2)))
    cases = [Case(Data(shape, seed), list(range(len(shape.requests)))) for seed in range(copies)]
    line = []
    seen = []
    for name in READS:
        cases[0].cells.fill_(math.nan)
        kernels.cells(cases[0], name, 0)
        seen.append(cases[0].cells.clone())
        median, least = times_us([functools.partial(kernels.cells, case, name, 0) for case in cases])
        line.append(f"{name} {median:.1f} ({least:.1f})")
    same = torch.equal(*[cells.view(torch.int32) for cells in seen]) and not bool(seen[0].isnan().all())
    for name in ("cells_mass", "mass_lists") if cases[0].max_blocks <= 4096 else ("cells_mass",):
        median, least = times_us([functools.partial(kernels.cells, case, name, 0) for case in cases])
        line.append(f"{name} {median:.1f} ({least:.1f})")
    print(describe(shape), f"  {'same cells' if same else 'OTHER CELLS'}:", *line, sep="\n  ", flush=True)


def main(cubins: str, first: int = 0, end: int = len(SHAPES)) -> None:
    """Each shape."""
    for base in SHAPES[first:end]:
        time_shape(Kernels(Path(cubins), base.dtype, base.head_dim), base)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
