"""Times plan's spans, keep, union and table by CUDA graphs of many launches; microseconds a launch.

python time_lists.py CUBINS
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import params
import torch
from lists_case import SPANS_CTAS, Buffers, Kernels, shared_bytes
from lists_twin import World

LAUNCHES = 100
RULES = {"threshold": (params.THRESHOLD, 1e-3), "mass": (params.MASS, 0.9), "density": (params.DENSITY, 0.2)}


def world_of(blocks: int, heads: int, block: int, q_len: int, select: int, rule: str, *, by_row: bool) -> World:
    """One request with `blocks` past blocks; one list a head, pages of 16 tokens."""
    page, past = 16, blocks * block
    keep, value = RULES[rule]
    max_kv_len = past + q_len
    words = -(-(blocks + -(-q_len // block)) // 32)
    layout = params.Layout(heads, heads, 1, 128, 4, block.bit_length() - 1, min(page, block).bit_length() - 1, 1, 1)
    layout.select_span, layout.max_kv_len, layout.max_blocks = select, max_kv_len, -(-max_kv_len // block)
    layout.mask_words, layout.max_boxes = words, -(-max_kv_len // min(page, block))
    settings = params.Settings(keep=keep, keep_value=value, max_density=1.0, sink_blocks=1, local_blocks=1)
    settings.density_guard, settings.keep_at_rows, settings.min_density = 0.9, int(by_row), 0.04
    rng = np.random.default_rng(1)
    selects = -(-q_len // select) if select else 1
    scores = np.exp(rng.normal(0, 2, (selects, heads, layout.max_blocks)))
    scores = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
    pages = -(-max_kv_len // page)
    table = rng.permutation(pages).astype(np.int32)[None]
    lens = (np.array([0, q_len], np.int32), np.array([max_kv_len], np.int32))
    world = World(layout, settings, *lens, table, pages, pages, q_len, 1, selects, heads * (q_len // 128 + 1))
    world.scores = scores
    return world


def replays(launch: Callable[[], None], count: int) -> torch.cuda.CUDAGraph:
    """So many launches as one graph."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            launch()
    return graph


def micros(launch: Callable[[], None]) -> float:
    """Of one launch, within a graph of many."""
    graph = replays(launch, LAUNCHES)
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / LAUNCHES)
    return min(times)


def main(cubins: str) -> None:
    """Prints a line per kernel and shape."""
    kernels = Kernels(Path(cubins))
    for name, shape in {
        "32 lists of 1024": (1024, 32, 128, 1024, 0),
        "32 lists of 4096": (4096, 32, 32, 1024, 0),
        "32 lists of 8192": (8192, 32, 16, 1024, 0),
        "32 lists of 65536": (65536, 32, 16, 1024, 0),
        "256 rows of 1024": (1024, 32, 128, 1024, 128),
        "2048 rows of 1024": (1024, 32, 128, 8192, 128),
    }.items():
        for rule in RULES:
            world = world_of(*shape, rule, by_row=shape[4] > 0)
            buffers = Buffers(world)
            buffers.launch(kernels)
            step = buffers.step
            for kernel in (kernels.keep_rows, kernels.union_table, kernels.union_wide):
                kernel.shared_bytes = shared_bytes(world.layout)
            union = lambda k=kernels.union_table, b=buffers, s=step: k.launch(  # noqa: E731
                (b.list_rows, 1), 256, [s, ctypes.c_int32(0)]
            )
            wide = lambda k=kernels.union_wide, b=buffers, s=step: k.launch(  # noqa: E731
                (b.list_rows, 1), 1024, [s, ctypes.c_int32(0)]
            )
            line = f"{name} {rule}: union_table {micros(union):.2f} wide {micros(wide):.2f}"
            if shape[4]:
                args = [step, ctypes.c_int32(0)]
                rows = lambda k=kernels.keep_rows, b=buffers, a=args: k.launch((b.rows["masks"], 1), 256, a)  # noqa: E731
                line += f" keep_rows {micros(rows):.2f}"
            alone = lambda b=buffers, s=step: kernels.table.launch((b.list_rows, 1), 256, [s])  # noqa: E731
            line += f" table {micros(alone):.2f}"

            def spans(s: params.Step = step) -> None:
                kernels.spans.launch((SPANS_CTAS, 1), 1024, [s])

            count = int(buffers.read()["counts"][0, 0])
            print(f"{line} spans {micros(spans):.2f}; {count} boxes in list 0", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
