"""CUDA events around single calls, in one loop that all systems share, in an order drawn anew each round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

# The device naps while the host queues the call, so that launch gaps are not counted as a kernel's time: about 0.6 ms.
NAP_CYCLES = 1_200_000


@dataclass(frozen=True)
class Runner:
    """What is timed: one callable a copy of the data."""

    calls: Sequence[Callable[[], torch.Tensor]]
    # The call waits for the device itself: its host work is part of the price.
    blocking: bool = False


@dataclass(frozen=True)
class Times:
    """Milliseconds of single calls."""

    median: float
    least: float
    most: float


def measure(runners: Mapping[str, Runner], repeats: int, warmups: int, seed: int = 0) -> dict[str, Times]:
    """Times each runner `repeats` times; copies take turns."""
    rng = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(warmups + repeats):
        for name in rng.sample(list(runners), len(runners)):
            calls = runners[name].calls
            ms = _once(calls[turn % len(calls)], nap=not runners[name].blocking)
            if turn >= warmups:
                times[name].append(ms)
    return {name: Times(statistics.median(x), min(x), max(x)) for name, x in times.items()}


def _once(call: Callable[[], torch.Tensor], *, nap: bool) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if nap:
        torch.cuda._sleep(NAP_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


class Marks:
    """Points in time on the stream; on a machine without a GPU the host's clock, which only tests look at."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []

    def mark(self) -> None:
        """One more."""
        if not self._on_gpu:
            self._seconds.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def begun(self) -> bool:
        """Whether the device has come to the first one."""
        return bool(not self._on_gpu or self._events[0].query())

    def gaps(self) -> list[float]:
        """Milliseconds between neighbours; the device must be done with them."""
        if not self._on_gpu:
            return [(b - a) * 1e3 for a, b in pairwise(self._seconds)]
        return [float(a.elapsed_time(b)) for a, b in pairwise(self._events)]
