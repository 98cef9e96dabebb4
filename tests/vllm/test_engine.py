"""The real engine on the CPU, four times: without the plugin, in mode dense, keeping all blocks, and sparse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ENGINE = Path(__file__).with_name("engine.py")

KEEP_ALL = {"keep_density": 1.0, "min_density": 1.0, "max_density": 1.0, "dense_below_kv_len": 0}
SPARSE = {"keep_mass": 0.9, "block_size": 64, "dense_below_kv_len": 0}
# Low enough that most chunks of the long prompts are ours, high enough that some are not.
POLICY = {"min_chunk_tokens": 64, "min_kv_tokens": 600}

# Three layers, sums over 3000 keys at most: a rounding of 2^-24 for each term, in another order, of numbers about 1.
TOLERANCE = 3 * 3000 * 2**-24


class Served:
    """What one engine gave: log probabilities [requests, tokens, vocabulary], cached prompt tokens, counters."""

    def __init__(self, folder: Path, mode: str | None, asked: dict[str, Any], **env: str) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("COMPACTATTN_")} | env
        if mode:
            own["COMPACTATTN_MODE"] = mode
        command = [sys.executable, str(ENGINE), str(folder), json.dumps({"compactattn": asked})]
        run = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(line.removeprefix("RESULT "))
        self.log = run.stdout + run.stderr
        self.logprobs = np.array(result["logprobs"])
        self.cached: list[int] = result["cached"]
        self.counters: dict[str, Any] = result["counters"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Served:
    # A list of plugins that names none.
    return Served(folder / "model", None, {}, VLLM_PLUGINS="")


def test_in_mode_dense_the_engine_gives_the_same_bits(folder: Path, stock: Served) -> None:
    dense = Served(folder / "model", "dense", {})
    assert np.array_equal(dense.logprobs, stock.logprobs)
    assert dense.counters["plans"] == []


def test_keeping_all_blocks_gives_the_engines_logits(folder: Path, stock: Served) -> None:
    every = Served(folder / "model", "compactattn", KEEP_ALL | POLICY)
    assert every.cached == stock.cached
    assert max(stock.cached) > 2000
    np.testing.assert_allclose(every.logprobs, stock.logprobs, rtol=0, atol=TOLERANCE)
    assert every.counters["our_tokens"] > 4000
    assert every.counters["fallbacks"] == {}
    assert set(every.counters["left_to_engine"]) == {"decode", "short chunk", "short context"}
    assert every.log.count("compactattn 0.") == 1


def test_sparse_chunks_leave_blocks_out_and_short_prompts_alone(folder: Path, stock: Served) -> None:
    path = folder / "counters.json"
    sparse = Served(folder / "model", "compactattn", SPARSE | POLICY | {"counters_file": str(path)})
    (plan,) = sparse.counters["plans"]
    assert 0 < plan["density"] < 0.5
    assert plan["refused"] == 0
    assert np.isfinite(sparse.logprobs).all()
    # Prompts of 40 and 30 tokens, in steps beside the long ones.
    short = [1, 5]
    np.testing.assert_allclose(sparse.logprobs[short], stock.logprobs[short], rtol=0, atol=TOLERANCE)
    # The long ones differ by what was left out, or nothing was.
    assert np.abs(sparse.logprobs[0] - stock.logprobs[0]).max() > TOLERANCE
    assert json.loads(path.read_text())["pid"] == sparse.counters["pid"]
