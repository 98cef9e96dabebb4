"""Times of the selectors that work by cells: chunk x past of one request, medians of single launches."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cells_case import Case, Data, Kernels, Shape


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


def main(cubins: str) -> None:
    """Each kernel, then each selector."""
    kernels = Kernels(Path(cubins), torch.bfloat16, 128)
    for past, page, block in ((131072, 64, 64), (131072, 16, 64), (131072, 16, 16), (32768, 64, 128), (8192, 64, 64)):
        shape = Shape(((1024, past),), kv_heads=8, page=page, block=block, sample_rows=32, candidate_share=0.25)
        case = Case(Data(shape, 1), [0])
        line = [f"past {past} page {page} block {block}:"]
        line.append(f"summaries all {time_us(kernels.summaries, case, 1, 2048):.0f}")
        line.append(f"completed {time_us(kernels.summaries, case, 0):.0f}")
        for name in ("cells_read", "cells_mass", "cells_pool", "cells_read_candidates"):
            if name == "cells_read_candidates":
                line.append(f"candidates {time_us(kernels.candidates, case):.0f}")
            line.append(f"{name} {time_us(kernels.cells, case, name, 0):.0f}")
        line.append(f"| sampled_exact {time_us(kernels.score, case, 'cells_read'):.0f}")
        line.append(f"pooled_mass {time_us(kernels.score, case, 'cells_pool'):.0f} us")
        print(*line)


if __name__ == "__main__":
    main(sys.argv[1])
