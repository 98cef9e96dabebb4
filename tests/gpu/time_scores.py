"""Times the scorers: 32 query heads over 8 KV heads, a chunk of 1024 tokens after 131072, block 128."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from check_scores import Kernels, run_attn_gate, run_flashprefill, run_flashprefill_sm90, run_xattention
from score_case import Case, Shape
from score_reference import GateCase


class Launches(Kernels):
    """Remembers launches in place of making them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.made = []

    def launch(self, *args: object) -> None:
        """Keeps one."""
        self.made.append(args)


def main(cubins: str) -> None:
    """Prints a median of microseconds for each kernel."""
    kernels = Kernels(Path(cubins))
    case = Case(Shape(((1024, 131072),), kv_heads=8, page=16, block=128))
    gate = GateCase.random(case, "both", 128, False).struct()
    for run in (
        run_flashprefill,
        run_flashprefill_sm90,
        run_xattention,
        lambda kernels, case, only: run_attn_gate(kernels, case, only, gate),
    ):
        plan = Launches(Path(cubins))
        run(plan, case, None)
        for launch in plan.made:
            kernels.launch(*launch)
            times = []
            for _ in range(15):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(200_000)  # the launch's own cost hides behind it
                begin.record()
                kernels.launch(*launch)
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) * 1e3)
            times.sort()
            print(f"{launch[0]} {launch[1]}: {times[7]:.1f} us (min {times[0]:.1f}, max {times[-1]:.1f})")


if __name__ == "__main__":
    main(sys.argv[1])
