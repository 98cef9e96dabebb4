"""tests/gpu/ranks.py in miniature: two ranks with gloo and the CPU context agree, and are found out if they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch: make test-hf")

PROGRAM = Path(__file__).parents[1] / "gpu" / "ranks.py"


def run(library: str | None, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(PROGRAM), "--device", "cpu", *options]
    if library:
        line += ["--library", library]
    # Two ranks on the cores of one machine: more threads would wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_two_ranks_agree(library: str | None, tmp_path: Path) -> None:
    record = tmp_path / "ranks.json"
    done = run(library, "--seconds", "8", "--duty", "0.9", "--json", str(record))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("PASS\n")
    a, b = json.loads(record.read_text())["ranks"]
    assert a["steps"] == b["steps"] > 16
    assert a["all_reduces"] == 3 * a["steps"]
    # Ranks with their own data choose for themselves; with the same, alike.
    selected = [[rank["stats"][f"compactattn {layer}"]["selected"] for rank in (a, b)] for layer in (0, 2)]
    assert selected[0][0] != selected[0][1]
    assert selected[1][0] == selected[1][1] > 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("keys", "output of layer 2, alike"),
        ("answer", "out["),
        ("sum", "sum of layer 1"),
        ("table", "output of layer 2, alike"),
        ("twice", "layer 0: calls"),
        ("stall", "HANG"),
        ("files", "more files are open"),
        ("memory", "host memory grows"),
    ],
)
def test_a_rank_that_goes_its_own_way_is_found(library: str | None, spoil: str, said: str) -> None:
    # From step 20 on; judged at 64, checked before.
    done = run(library, "--seconds", "200", "--steps", "80", "--hang", "10", "--spoil", spoil)
    assert done.returncode == 1, done.stdout + done.stderr
    (fault, *_) = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert said in fault
    assert done.stdout.endswith("FAIL\n")
