"""Rows of the prefill sweep for tests: planned ones, and measured ones that nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1] / "bench"
CASE = "h16k4_d128_b8_q1024_kv{}"


def sweep(**changes: Any) -> Any:
    from sweep import Sweep

    axes = {"families": ["h32k8_d128_b1"], "contexts": [131072, 8192], "chunks": [1024, 512]}
    return Sweep(**axes | {"methods": ["dense", "ours", "xattention"], "densities": [0.17, 0.3]} | changes)


def made_up(case: str, system: str, ms: float, **changes: Any) -> Any:
    from module import PARTS
    from prefill_report import Measured
    from stages import STAGES

    parts = dict(zip(PARTS, (ms / 4, ms / 8, ms / 2, ms / 8, 1.5), strict=True))
    stages = dict(zip(STAGES, (0.1, 0.0, ms / 16, 0.2, ms / 4), strict=True))
    fields = {"page": 16, "density": 0.17, "ms": ms, "ms_min": ms - 1, "ms_max": ms + 6, "inflation": None, "ranks": 2}
    return Measured(**{"case": case, "system": system, "parts": parts, "stages": stages} | fields | changes)
