"""Accuracy against speed-up: which rows are drawn, where; the committed picture is of the committed records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
RECORD = BENCH / "record/h100"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_a_methods_time_lies_on_the_line_through_its_two_rows() -> None:
    import tradeoff

    case, ops = "c", {"vllm-fa3": (1, 100), "ours-op-0.17": (0.2, 20), "ours-op-0.30": (0.3, 25)}
    ops["two_level-0.17"] = (0.2, 9)
    sweep = [
        {"case": at, "system": name, "density": str(density), "op_ms": str(ms)}
        for at in (case, "other")
        for name, (density, ms) in ops.items()
    ]
    row = {"scope": "all tasks", "length": "8192", "difference": "-1", "difference_low": "-2", "difference_high": "0"}
    rows = [
        row | {"method": "default", "density": "0.3"},
        row | {"method": "default@0.2", "density": "0.1"},
        # Timed once, never, and no row over all tasks.
        row | {"method": "two_level", "density": "0.3"},
        row | {"method": "quoka", "density": "0.3"},
        row | {"method": "default", "density": "0.3", "scope": "able tasks"},
    ]
    found = tradeoff.points(rows, tradeoff.times(sweep, case))
    assert [(one.name, one.length, one.mean, one.low, one.high) for one in found] == [
        ("default", 8192, -1, -2, 0),
        ("default@0.2", 8192, -1, -2, 0),
    ]
    assert [one.speed for one in found] == pytest.approx([100 / 25, 100 / 15])


def test_the_committed_picture_is_of_the_committed_records(tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    given = ["--eval", RECORD / "2026-11-23-eval.csv", "--prefill", RECORD / "2026-11-23-prefill-sweep.csv"]
    subprocess.run([sys.executable, BENCH / "tradeoff.py", *given, "--out", picture], check=True)
    assert picture.read_text() == (RECORD / "2026-11-23-tradeoff.svg").read_text()
    assert "default: -0.6, 3.5 x" in picture.read_text()
