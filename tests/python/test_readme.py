"""The README's Python code runs as written, and its semantics are the library's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import compactattn

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    """Python code of the README, in order."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str) -> dict[str, object]:
    """The names a block leaves behind."""
    names: dict[str, object] = {"np": np}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_the_semantics_block_says_what_forward_computes() -> None:
    plain = run(blocks()[0])["compact_attention"]
    rng = np.random.default_rng(1)
    block, kv_len, q_len, dim = 16, 203, 40, 64
    q = rng.standard_normal((q_len, 1, dim), np.float32)
    keys = rng.standard_normal((2, 13, 16, 1, dim), np.float32)
    pages = rng.permutation(13).astype(np.int32)
    keep = rng.random((kv_len - q_len) // block) < 0.4
    settings = compactattn.Settings.of("external").replace(
        block_size=block, query_span=0, heads_per_list=0, dense_below_kv_len=0, density_guard=1.0
    )
    settings = settings.replace(sink_blocks=0, local_blocks=0)
    scores = np.zeros(-(-kv_len // block), np.float32)
    scores[: len(keep)] = keep
    out, lse = forward_with_scores(q, keys, pages, kv_len, settings.replace(keep="threshold", keep_value=0.5), scores)
    k, v = (pool[pages].reshape(-1, dim)[:kv_len].astype(np.float64) for pool in keys)
    want_out, want_lse = plain(q[:, 0].astype(np.float64), k, v, keep, block, 1 / np.sqrt(dim))
    # f32 sums of 203 terms: unit roundoff 6e-8 times the terms, times values of a few.
    np.testing.assert_allclose(out[:, 0], want_out, atol=203 * 6e-8 * 8)
    np.testing.assert_allclose(lse[0], want_lse, atol=203 * 6e-8 * 8)


@pytest.mark.parametrize("code", blocks()[1:])
def test_every_other_block_runs_as_written(code: str) -> None:
    names = run(code)
    assert np.isfinite(np.asarray(names["out"])).all()
