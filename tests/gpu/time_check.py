"""What checking costs: the look through the block tables that is always on, and checked mode, as shares of a forward.

python time_check.py LIBRARY CUBINS

CUBINS holds spans.cubin (cuda/plan/spans.cu) and spans_unlooked.cubin (tests/gpu/spans_unlooked.cu). A forward is mode
`compactattn`, so the shares are of the fast path. Variants take turns; medians of rounds. Nobody else may use the GPU.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import params
import torch
from driver import Kernel
from lists_case import SPANS_CTAS, Buffers
from time_chain import FORWARDS, forwards, graph_of, package, problem_of
from time_lists import LAUNCHES, replays, world_of

SHAPES = {"16K": 16384, "128K": 131072}
CHUNK, HEADS, PAGE, BLOCK = 1024, 32, 16, 32
ROUNDS = 15
BARS = {"16K": 1.0, "128K": 0.5}
CHECKED_BAR = 5.0


def in_turns(graphs: list[torch.cuda.CUDAGraph], each: int) -> list[float]:
    """Median microseconds of one of `each`, a graph at a time, the order reversed every other round."""
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(ROUNDS + 2):
        order = range(len(graphs)) if turn % 2 else reversed(range(len(graphs)))
        for i in order:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[i].replay()
            end.record()
            torch.cuda.synchronize()
            if turn > 1:
                times[i].append(begin.elapsed_time(end) * 1000 / each)
    return [statistics.median(x) for x in times]


def spans_micros(cubins: Path, context: int) -> list[float]:
    """Plan's spans with and without the look."""
    world = world_of((context - CHUNK) // BLOCK, HEADS, BLOCK, CHUNK, 0, "mass", by_row=False)
    buffers = Buffers(world)
    names = ("spans", "spans_unlooked")
    kernels = [Kernel(cubins / f"{name}.cubin", "compactattn_plan_spans", 0) for name in names]

    def launch_of(kernel: Kernel, step: params.Step = buffers.step) -> Callable[[], None]:
        return lambda: kernel.launch((SPANS_CTAS, 1), 1024, [step])

    graphs = [replays(launch_of(kernel), LAUNCHES) for kernel in kernels]
    finds_a_bad_page(buffers, kernels)
    return in_turns(graphs, LAUNCHES)


def finds_a_bad_page(buffers: Buffers, kernels: list[Kernel]) -> None:
    """The one refuses a table with a page outside the pool, the other does not: it is the look that is timed."""
    entry = buffers.given["table"][0, 0].item()
    buffers.given["table"][0, 0] = -1
    refused = []
    for kernel in kernels:
        kernel.launch((SPANS_CTAS, 1), 1024, [buffers.step])
        torch.cuda.synchronize()
        refused.append(int(buffers.out["counters"][0, 3]))
    buffers.given["table"][0, 0] = entry
    if refused != [1, 0]:
        raise SystemExit(f"refused {refused}, not 1 with the look and 0 without")


def forward_micros(context: int) -> list[float]:
    """A forward out of checked mode and in it."""
    problem = problem_of(f"h{HEADS}k8_d128_b1_q{CHUNK}_kv{context}")
    graphs, kept = [], []
    for checked in ("0", "1"):
        os.environ["COMPACTATTN_CHECK"] = checked  # read where a plan is made
        kept.append(forwards(problem, "compactattn"))  # what a graph launches must outlive it
        graphs.append(graph_of(kept[-1]))
    os.environ["COMPACTATTN_CHECK"] = "0"
    return in_turns(graphs, FORWARDS)


def main(library: str, cubins: str) -> None:
    """Prints both costs for each context; exits with 1 above a bar."""
    package().load_library(Path(library).absolute())
    above = False
    for name, context in SHAPES.items():
        looked, unlooked = spans_micros(Path(cubins), context)
        plain, checked = forward_micros(context)
        always, mode = 100 * (looked - unlooked) / plain, 100 * (checked - plain) / plain
        print(
            f"{name}: forward {plain:.1f} us; spans {looked:.2f} us, without the look {unlooked:.2f}: "
            f"{always:.2f} % (bar {BARS[name]} %); checked mode {checked:.1f} us: {mode:.2f} % (bar {CHECKED_BAR} %)",
            flush=True,
        )
        above |= always > BARS[name] or mode > CHECKED_BAR
    print("ABOVE A BAR" if above else "within the bars")
    sys.exit(int(above))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
