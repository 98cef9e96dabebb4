"""Times attention of single query tokens over dense lists beside a copy on the device: bytes a second, stage by stage.

The copy counts what it reads and what it writes. Each problem is checked against fp64 where that takes seconds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from attend_case import SMS, Case, Kernels, Shape
from time_attend import graph, times_ms

CHECKED = 2**20  # KV tokens of a batch
TIMES = 10
STAGES = ("plan", "attend")


def copy_rate(gib: int = 8) -> float:
    """GB/s of a copy from memory to memory."""
    source, to = (torch.empty(gib << 28, device="cuda").normal_() for _ in range(2))
    (ms,) = times_ms([functools.partial(to.copy_, source)], 8)
    return 2 * source.nbytes / ms / 1e6


def time_batch(kernels: Kernels, batch: int, kv_len: int, args: argparse.Namespace) -> None:
    """Prints the rate of one batch, and what each stage of it takes."""
    kv_heads, group = args.heads
    ctas = SMS * kernels.traits.ctas_per_sm
    requests = ((1, kv_len - 1),) * batch
    case = Case(
        Shape(requests, kv_heads, group, args.page, density=1.0, num_ctas=ctas, head_dim=args.head_dim),
    )
    case.launch(kernels)
    error = case.errors()[0] if batch * kv_len <= CHECKED else float("nan")
    maps = case.maps if kernels.traits.map_tokens else []
    stages = [
        lambda: case.launch(kernels),
        lambda: kernels.plan.launch((1, 1), 1024, [case.step]),
        lambda: kernels.attend.launch((ctas, 1), kernels.traits.threads, [*maps, case.params]),
    ]
    # Launches of one graph are a few microseconds apart at most: ten of a stage in each.
    graphs = [graph(functools.partial(repeated, stage)) for stage in stages]
    times = [ms / TIMES for ms in times_ms([g.replay for g in graphs], args.repeats)]
    rate = 2 * batch * kv_len * kv_heads * args.head_dim * 2 / times[0] / 1e6
    parts = " ".join(f"{name} {1e3 * ms:.1f}" for name, ms in zip(STAGES, times[1:], strict=True))
    print(
        f"{args.arch} d{args.head_dim} batch {batch:4d} kv {kv_len:6d} {1e3 * times[0]:8.1f} us {rate:6.0f} GB/s"
        f"  us: {parts}  error {error:.1e}",
        flush=True,
    )


def repeated(call: Callable[[], object]) -> None:
    """One after the other."""
    for _ in range(TIMES):
        call()


def main() -> None:
    """Times what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cubins", type=Path)
    parser.add_argument("--arch", default="sm90", help="or a name of variants.cu")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 4], help="KV heads, query heads of each")
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--kv-lens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    print(f"copy {copy_rate():.0f} GB/s", flush=True)
    kernels = Kernels(args.cubins, args.arch, head_dim=args.head_dim)
    for batch, kv_len in itertools.product(args.batches, args.kv_lens):
        time_batch(kernels, batch, kv_len, args)


if __name__ == "__main__":
    main()
