"""Times of the selectors that work by cells: a chunk of one or more requests, medians of single launches."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cells_case import Case, Data, Kernels, Shape

# Chunk x past of each request; KV heads, group, head_dim, page, block, layout.
SHAPES = (
    Shape(((1024, 131072),), kv_heads=8, page=16, block=128),
    Shape(((1024, 131072),), kv_heads=8, page=16, block=128, layout="HND"),
    Shape(((1024, 131072),), kv_heads=8, page=128, block=128),
    Shape(((1024, 131072),), kv_heads=8, page=64, block=64),
    Shape(((1024, 130048),), kv_heads=8, page=16, block=32),
    Shape(((1024, 131072),), kv_heads=8, page=16, block=16),
    Shape(((1024, 65536),), kv_heads=8, page=16, block=128),
    Shape(((1024, 32768),), kv_heads=8, page=16, block=128),
    Shape(((1024, 8192),), kv_heads=8, page=16, block=128),
    Shape(((1024, 16384),) * 8, kv_heads=4, page=16, block=128),
    Shape(((1024, 131072),), kv_heads=8, head_dim=64, page=16, block=128),
    Shape(((1024, 131072),), kv_heads=4, head_dim=256, page=16, block=128),
)
NAMES = (
    *("cells_read", "cells_read_sm90", "cells_mass", "mass_lists", "cells_pool"),
    *("candidates", "cells_read_candidates", "cells_read_candidates_sm90"),
)


def time_us(launch: Callable[..., None], *args: object, reps: int = 15) -> float:
    """Median over single launches."""
    times = []
    for _ in range(reps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # hides what it costs to launch
        start.record()
        launch(*args)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def two_level(kernels: Kernels, case: Case, own: str) -> None:
    """All launches of the selector."""
    kernels.score(case, "cells_pool")
    kernels.two_level(case, own)


def describe(shape: Shape) -> str:
    """In one line."""
    (q_len, past), count = shape.requests[0], len(shape.requests)
    heads = f"{shape.kv_heads * shape.group}/{shape.kv_heads} d{shape.head_dim}"
    return f"{count} x {q_len} past {past}, {heads}, page {shape.page} {shape.layout}, block {shape.block}"


def main(cubins: str, count: int = len(SHAPES)) -> None:
    """Each kernel, then each selector."""
    for base in SHAPES[:count]:
        kernels = Kernels(Path(cubins), base.dtype, base.head_dim)
        shape = Shape(**{**vars(base), "sample_rows": 32, "candidate_share": 0.25})
        case = Case(Data(shape, 1), list(range(len(shape.requests))))
        kernels.summaries(case, 1, 2048)
        print(describe(shape))
        line = ["  kernels:"]
        held = case.max_blocks <= 4096
        names = [name for name in NAMES if held or name != "mass_lists"]
        line += [f"{name} {time_us(kernels.cells, case, name, 0):.1f}" for name in names]
        print(*line)
        units = len(case.spans) * shape.kv_heads
        kept = case.bits()[: len(case.spans)].sum().item() / (units * case.max_blocks)
        line = [f"  selectors (candidates {kept:.2f} of the blocks):"]
        for own in ("", "_sm90"):
            line.append(f"sampled_exact{own} {time_us(kernels.score, case, 'cells_read' + own):.1f}")
            line.append(f"two_level{own} {time_us(two_level, kernels, case, own):.1f}")
        line.append(f"pooled_mass {time_us(kernels.score, case, 'cells_pool'):.1f} us")
        print(*line, flush=True)
        del case


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
