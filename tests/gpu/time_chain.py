"""Times every kernel of a whole forward, and the forward itself, within a CUDA graph of many.

python time_chain.py LIBRARY [SELECTOR,SHAPE ...]

SHAPE as in tests/bench/shapes.py, SELECTOR a selector or a mode. A line a kernel: median microseconds from the end of
the one before it to its end (what it adds to the step; overlapped starts cost nothing) and its own, start to end.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from problem import Problem
from shapes import _DEFAULTS, Cell, Question, Shape
from systems.ours import _batch, package
from torch.profiler import ProfilerActivity, profile

FORWARDS = 12
CALLS = ("pooled_mass", "flashprefill", "compactattn", "dense")
SHAPES = ("h32k8_d128_b1_q1024_kv131072",)


def problem_of(name: str) -> Problem:
    """Planted data in pages of 16."""
    cell = Cell(Shape.parse(name), 16, 1.0)
    fields = _DEFAULTS | {"data": "planted"}
    return Problem(cell, Question(name="chain", asks="", systems=(), cells=(cell,), **fields))


def forwards(problem: Problem, selector: str) -> list[Callable[[], torch.Tensor]]:
    """One call a copy of the data, block means made before."""
    ours, shape = package(), problem.shape
    is_mode = selector in ("dense", "compactattn")
    settings = ours.Settings.mode(selector) if is_mode else ours.Settings.of(selector)
    calls = []
    plan = None
    for copy in problem.copies:
        batch, out = _batch(problem, copy), torch.empty_like(copy.tensors.q)
        if plan is None:
            desc = ours.PlanDesc(
                num_q_heads=shape.num_q_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                page_size=problem.cell.page_size,
                dtype="bf16",
                max_num_reqs=shape.batch,
                max_total_q=shape.batch * shape.chunk,
                max_kv_len=shape.context,
                settings=settings,
            )
            plan = ours.Plan(desc, batch.home.context())
        means = None
        if selector in ("pooled_mass", "flashprefill", "two_level"):
            means = ours.BlockMeans(plan).update(batch)

        def run(plan: object = plan, batch: object = batch, out: torch.Tensor = out, means: object = means):
            plan.forward(batch, out, **({"summaries": means} if means is not None else {}))
            return out

        calls.append(run)
    return calls


def graph_of(calls: list[Callable[[], torch.Tensor]]) -> torch.cuda.CUDAGraph:
    """FORWARDS of them in turn; what they write is checked against calls outside the graph."""
    eager = [call().clone() for call in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(FORWARDS):
            calls[i % len(calls)]()
    outs = [call() for call in calls]
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for out, wanted in zip(outs, eager, strict=True):
        if not torch.equal(out, wanted):
            raise SystemExit("the graph's answer is another than the call's")
    return graph


def micros(graph: torch.cuda.CUDAGraph) -> tuple[float, float]:
    """Of one forward: median and least over replays."""
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / FORWARDS)
    return statistics.median(times), min(times)


def one_by_one(calls: list[Callable[[], torch.Tensor]]) -> float:
    """Of one forward launched by the host while the device naps."""
    times = []
    for i in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)
        begin.record()
        calls[i % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def kernels(graph: torch.cuda.CUDAGraph) -> dict[str, tuple[float, float]]:
    """By name, in order: what each adds after the end of the one before, and its own time."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    added, own = defaultdict(list), defaultdict(list)
    last = None
    for event in events:
        name = event.name.removeprefix("compactattn_")
        start, end = event.time_range.start, event.time_range.end
        if last is not None:
            added[name].append(end - last)
        own[name].append(end - start)
        last = end
    return {name: (statistics.median(added[name] or [0]), statistics.median(own[name])) for name in own}


def main(library: str, wanted: list[str]) -> None:
    """Prints a block for each selector and shape."""
    package().load_library(Path(library).absolute())
    problems: dict[str, Problem] = {}
    for call in wanted or [f"{selector},{shape}" for shape in SHAPES for selector in CALLS]:
        selector, name = call.split(",")
        if name not in problems:
            problems.clear()
            problems[name] = problem_of(name)
        calls = forwards(problems[name], selector)
        graph = graph_of(calls)
        median, least = micros(graph)
        alone = one_by_one(calls)
        print(f"{selector} {name}: {median:.1f} us in a graph (least {least:.1f}), {alone:.1f} by itself", flush=True)
        found = kernels(graph)
        select = sum(added for key, (added, _) in found.items() if not key.startswith("attend"))
        for key, (added, own) in found.items():
            print(f"    {key:32} {added:8.2f} {own:8.2f}")
        print(f"    {'before attend':32} {select:8.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
