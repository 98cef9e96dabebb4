"""Times plan and attend beside torch's attention: graph replays, CUDA events, medians, two problems in turn.

Each problem is checked against fp64 first. `--steady` times blocks of back-to-back replays instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from attend_case import ARCHS, SMS, Case, Kernels, Shape
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A replay has no launch gaps of this interpreter's making."""
    call()
    torch.cuda.synchronize()
    out = torch.cuda.CUDAGraph()
    with torch.cuda.graph(out):
        call()
    return out


def times_ms(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The median of each call; all take turns, so that none has the cooler chip."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 2):
        for call, into in zip(calls, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 2:
                into.append(start.elapsed_time(end))
    return [statistics.median(each) for each in times]


def steady_ms(graphs: Sequence[torch.cuda.CUDAGraph], count: int) -> float:
    """The mean of `count` replays back to back: the rate of a chip at its power limit."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(count):
        graphs[i % len(graphs)].replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


def time_peers(chunk: int, context: int, heads: tuple[int, int, int], steady: float) -> None:
    """Contiguous keys and values, no mask: a little more work than the causal chunk."""
    kv_heads, group, dim = heads
    q = torch.randn(1, kv_heads * group, chunk, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, context, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flop = 4 * dim * kv_heads * group * chunk * context
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                peer = graph(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True))
        except RuntimeError as error:
            print(f"{backend.name} does not run this shape: {str(error).splitlines()[0]}")
            continue
        ms = steady_ms([peer], max(4, int(steady * 6e14 / flop))) if steady else times_ms([peer.replay], 10)[0]
        kind = "steady" if steady else "burst"
        print(f"{kind} {backend.name:16s} contiguous, no mask    {ms:7.3f} ms {flop / ms / 1e9:6.1f} TFLOP/s")


def time_shape(shape: Shape, kernels: dict[str, Kernels], repeats: int) -> None:
    """Prints each kernel's median and its error on the first problem."""
    cases = [Case(shape, seed) for seed in range(2)]
    calls, errors = [], []
    for kernel in kernels.values():
        turns = itertools.cycle([graph(functools.partial(case.launch, kernel)) for case in cases])
        calls.append(lambda turns=turns: next(turns).replay())
        cases[0].out.fill_(float("nan"))
        cases[0].launch(kernel)
        errors.append(cases[0].errors()[0])
    for name, error, ms in zip(kernels, errors, times_ms(calls, repeats), strict=True):
        rate = cases[0].flop() / ms / 1e9
        where = f"page {shape.page_size:3d} {shape.layout} density {shape.density:4.2f}"
        print(f"burst {name:16s} {where} {ms:7.3f} ms {rate:6.1f} TFLOP/s error {error:.1e}", flush=True)


def time_steady(shape: Shape, kernels: dict[str, Kernels], seconds: float) -> None:
    """Two rounds, the second in reverse."""
    cases = [Case(shape, seed) for seed in range(2)]
    flop = cases[0].flop()
    where = f"page {shape.page_size:3d} {shape.layout} density {shape.density:4.2f}"
    for name in (*kernels, *reversed(kernels)):
        graphs = [graph(functools.partial(case.launch, kernels[name])) for case in cases]
        ms = steady_ms(graphs, max(4, int(seconds * 6e14 / flop)))
        print(f"steady {name:16s} {where} {ms:7.3f} ms {flop / ms / 1e9:6.1f} TFLOP/s", flush=True)


def main() -> None:
    """Times what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cubins", type=Path)
    parser.add_argument("--variants", nargs="*", help="of variants.cu; without, the shipped kernel")
    parser.add_argument("--archs", nargs="+", choices=list(ARCHS), default=["sm90"])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--spread", type=float, default=0)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.3, 0.15])
    parser.add_argument("--layouts", nargs="+", default=["NHD"])
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 4], help="KV heads, query heads of each")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--steady", type=float, default=0, help="seconds of back-to-back launches of each kernel")
    parser.add_argument("--alone", action="store_true", help="without torch's kernels")
    args = parser.parse_args()
    archs = args.variants or args.archs
    kernels = {name: Kernels(args.cubins, name, head_dim=args.head_dim) for name in archs}
    if args.batch == 1 and not args.alone:
        time_peers(args.chunk, args.context, (*args.heads, args.head_dim), args.steady)
    num_ctas = SMS * max(kernel.traits.ctas_per_sm for kernel in kernels.values())
    for density in args.densities:
        for page in args.pages:
            for layout in args.layouts:
                requests = ((args.chunk, args.context - args.chunk),) * args.batch
                shape = Shape(requests, *args.heads, page, 128, layout, density, args.spread, num_ctas)
                shape = dataclasses.replace(shape, head_dim=args.head_dim)
                if args.steady:
                    time_steady(shape, kernels, args.steady)
                else:
                    time_shape(shape, kernels, args.repeats)


if __name__ == "__main__":
    main()
