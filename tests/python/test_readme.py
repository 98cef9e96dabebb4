"""The README's Python code runs as written, and its semantics are the library's."""

from __future__ import annotations

import re
from pathlib import Path

import compactattn
import numpy as np
import pytest
from cases import Case

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
    block, keep = 16, {1, 4, 5}
    case = Case([(40, 203)], seed=9)
    settings = compactattn.Settings.of("external").replace(block_size=block, dense_below_kv_len=0)
    settings = settings.replace(sink_blocks=0, local_blocks=0, density_guard=1.0)
    batch = compactattn.Batch.of(*case.inputs())
    plan = compactattn.plan_for(batch, settings=settings)
    sizes = plan.sizes()
    masks = np.zeros((sizes.select_rows, case.num_q_heads, sizes.mask_words), np.uint32)
    masks[:, :, 0] = sum(1 << j for j in keep)
    out, lse = np.empty_like(case.inputs()[0]), np.empty((case.num_q_heads, 40), np.float32)
    plan.forward(batch, out, lse, external=compactattn.Selection(masks=masks))
    kept = np.isin(np.arange((203 - 40) // block), list(keep))
    q, k, v = case.q, case.tokens(0, case.k), case.tokens(0, case.v)
    for head in range(case.num_q_heads):
        kv_head = head * case.num_kv_heads // case.num_q_heads
        one = plain(q[:, head], k[:, kv_head], v[:, kv_head], kept, block, 1 / np.sqrt(case.head_dim))
        # f32 sums of 203 terms of size 4 at most: 203 roundings of 2^-24 each, doubled for the two products.
        np.testing.assert_allclose(out[:, head], one[0], rtol=0, atol=203 * 4 * 2**-23)
        np.testing.assert_allclose(lse[head], one[1], rtol=0, atol=203 * 4 * 2**-23)


def test_every_block_of_another_language_runs_somewhere() -> None:
    # Where each runs: the first line of a block, and the file that holds the same words.
    elsewhere = {
        "make demo": ".ci/run",
        "make test": ".ci/run",
        "import compactattn.hf": None,  # tests/python/test_hf.py takes it from here.
        "COMPACTATTN_MODE=compactattn vllm serve": None,  # A record of a GPU, and tests/vllm with the same options.
        "find_package(compactattn": "tests/cpp/CMakeLists.txt",
        "use compactattn::settings": None,  # `make test-rust` gives this file to rustdoc.
        "cuda/toolkit.sh": ".ci/run",
        "make kernels": ".ci/run",
    }
    text = README.read_text(encoding="utf-8")
    found = re.findall(r"^```(?!python\n|text\n)\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(found) >= 5
    for block in found:
        known = [(start, place) for start, place in elsewhere.items() if f"\n{start}" in f"\n{block}"]
        assert known, f"runs nowhere:\n{block}"
        for start, place in known:
            assert place is None or start in (README.parent / place).read_text(encoding="utf-8"), start


@pytest.mark.parametrize("code", blocks()[1:])
def test_every_other_block_runs_as_written(code: str) -> None:
    if 'device="cuda"' in code:
        pytest.skip("needs a GPU: tests/gpu/check_torch.py runs it there")
    names = run(code)
    assert np.isfinite(np.asarray(names["out"])).all()
