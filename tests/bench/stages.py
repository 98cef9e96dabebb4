"""Which stage a kernel belongs to, and what each adds to a run: by the profiler, on a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

STAGES = ("plan", "means", "select", "union", "attend")
# What a kernel's name begins with, once compactattn_ is gone; what is not here selects. Union and table are one kernel.
_OURS = {
    "plan_": "plan",
    "summaries": "means",
    "keep_rows": "union",
    "union_table": "union",
    "table": "union",
    "attend": "attend",
    "merge": "attend",
}


@dataclass(frozen=True)
class Kernel:
    """One launch on the device, nanoseconds."""

    name: str
    start: int
    end: int


def stage_of(kernel: str) -> str | None:
    """None for what is no attention: projections, copies."""
    ours = kernel.partition("compactattn_")[2]
    if ours:
        return next((stage for begin, stage in _OURS.items() if ours.startswith(begin)), "select")
    return "attend" if "flash" in kernel.lower() else None


def added(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds by stage. A kernel counts from the end of those before it: early starts cost nothing."""
    times = dict.fromkeys(STAGES, 0.0)
    busy = 0
    for kernel in sorted(kernels, key=lambda it: it.start):
        stage = stage_of(kernel.name)
        if stage:
            times[stage] += max(kernel.end - max(kernel.start, busy), 0) / 1e6
        busy = max(busy, kernel.end)
    return times


def measure_stages(run: Callable[[], object]) -> dict[str, float]:
    """Of one run on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    # As they come: torch's own list of events takes longer to make than the run does.
    events = seen.profiler.kineto_results.events()
    on_gpu = (it for it in events if it.device_type() == torch.autograd.DeviceType.CUDA)
    kernels = [Kernel(it.name(), it.start_ns(), it.end_ns()) for it in on_gpu]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    return added(kernels)
