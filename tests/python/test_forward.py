"""forward == float64 attention over what it selected; all of it, when everything is kept."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from typing import Any

import compactattn
import numpy as np
import pytest
from cases import LAYOUTS, Case, loaded, tolerance
from compactattn import _abi_step, _library

RAGGED = [(1, 1), (17, 33), (40, 190), (0, 20), (5, 5), (16, 64)]


def dense() -> compactattn.Settings:
    return compactattn.Settings.mode("dense")


def sparse(**changes: object) -> compactattn.Settings:
    """Sparse from the first block on, small blocks."""
    base = compactattn.Settings.mode("compactattn")
    few = {"block_size": 16, "dense_below_kv_len": 0, "dense_max_q_len": 0, "keep": "density", "keep_value": 0.3}
    return base.replace(**(few | changes))


def run(case: Case, **options: Any) -> tuple[Any, Any]:
    out, lse = compactattn.forward(*case.inputs(), return_lse=True, **options)
    return loaded(out, case.dtype), lse


def check(case: Case, got: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    np.testing.assert_allclose(got[0], wanted[0], rtol=0, atol=tolerance(case))
    # lse moves with the largest logit's error: 1.5e-5 by the same count, and its own rounding, 2^-23 * 8.
    np.testing.assert_allclose(got[1], wanted[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_equals_float64_in_every_layout_and_dtype(dtype: str, layout: str) -> None:
    case = Case(RAGGED, dtype=dtype, layout=layout)
    check(case, run(case, settings=dense()), case.reference())


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (4, 4), (8, 2), (8, 1), (9, 3)])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_dense_equals_float64_for_every_grouping(num_q_heads: int, num_kv_heads: int, page_size: int) -> None:
    case = Case(RAGGED, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, page_size=page_size, seed=1)
    check(case, run(case, settings="dense"), case.reference())


@pytest.mark.parametrize("block_size", [16, 64])
def test_sparse_equals_float64_over_its_own_tables(block_size: int) -> None:
    case = Case([(33, 400), (64, 256), (1, 90)], seed=2, page_size=16)
    settings = sparse(block_size=block_size)
    wanted = case.reference(keep=kept_tokens(case, settings))
    check(case, run(case, settings=settings), wanted)
    assert compactattn.plan_for(compactattn.Batch.of(*case.inputs()), settings=settings).stats().density < 1


def kept_tokens(case: Case, settings: compactattn.Settings) -> Any:
    """What select and union kept, as a rule on tokens; one list per query head and request."""
    batch = compactattn.Batch.of(*case.inputs())
    plan = compactattn.plan_for(batch, settings=settings)
    lists = compactattn.union(plan, batch, compactattn.select(plan, batch))
    rows = np.asarray(lists.bits).reshape(-1, case.num_q_heads, lists.bits.shape[1])
    spans = [req for req, (q_len, _) in enumerate(case.lens) if q_len]

    def keep(req: int, head: int, tokens: Any) -> Any:
        blocks = tokens // settings.block_size
        return rows[spans.index(req), head][blocks // 32] >> (blocks % 32).astype(np.uint32) & 1 == 1

    return keep


def test_shuffling_pages_changes_no_bit() -> None:
    first, second = (Case(RAGGED, seed=3) for _ in range(2))
    order = np.random.default_rng(9).permutation(second.num_pages)
    second.block_table = order.astype(np.int32)[second.block_table]
    for name in ("k", "v"):
        moved = np.empty_like(getattr(second, name))
        moved[order] = getattr(second, name)
        setattr(second, name, moved)
    for a, b in zip(run(first, settings=sparse()), run(second, settings=sparse()), strict=True):
        assert a.tobytes() == b.tobytes()


def test_bf16_of_ml_dtypes_equals_tagged_words() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    case = Case(RAGGED, dtype="bf16", seed=4)
    q, k, v, *rest = case.inputs()
    out = compactattn.forward(*(x.words.view(ml_dtypes.bfloat16) for x in (q, k, v)), *rest)
    assert out.dtype == ml_dtypes.bfloat16
    assert out.tobytes() == compactattn.forward(q, k, v, *rest).tobytes()


def test_an_empty_step_is_no_error() -> None:
    case = Case([(0, 20)])
    assert compactattn.forward(*case.inputs()).shape == (0, 4, 64)


def test_settings_of_a_layer_and_of_a_call_are_used() -> None:
    case = Case([(32, 300)], seed=5)
    batch = compactattn.Batch.of(*case.inputs())
    desc = compactattn.plan_for(batch, settings=sparse()).desc
    desc = type(desc)(**{**vars(desc), "num_layers": 2, "layer_settings": (None, dense())})
    plan = compactattn.Plan(desc)
    outs = [np.empty_like(case.inputs()[0]) for _ in range(3)]
    plan.forward(batch, outs[0], layer=0)
    plan.forward(batch, outs[1], layer=1)
    plan.forward(batch, outs[2], layer=0, settings=dense())
    np.testing.assert_array_equal(outs[1], outs[2])
    assert not np.array_equal(outs[0], outs[1])
    assert (plan.stats(0).calls, plan.stats(1).calls, plan.stats().calls) == (2, 1, 3)


def test_threads_share_a_plan() -> None:
    cases = [Case([(24, 200), (9, 77)], seed=seed) for seed in range(4)]
    plan = compactattn.plan_for(compactattn.Batch.of(*cases[0].inputs()), settings=sparse())
    alone = [np.empty_like(case.inputs()[0]) for case in cases]
    for case, out in zip(cases, alone, strict=True):
        plan.forward(compactattn.Batch.of(*case.inputs()), out)
    together = [[np.empty_like(out) for _ in range(8)] for out in alone]

    def work(case: Case, outs: list[Any]) -> None:
        workspace = compactattn.Workspace(plan.sizes().workspace_bytes)
        for out in outs:
            plan.forward(compactattn.Batch.of(*case.inputs()), out, scratch=workspace)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, outs in zip(alone, together, strict=True):
        assert all(out.tobytes() == other.tobytes() for other in outs)


def test_the_gil_is_released_during_a_call() -> None:
    case = Case([(256, 2048)], num_q_heads=8, num_kv_heads=1, seed=6)
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.0005):
            ticks[0] += 1

    inputs, counter = case.inputs(), threading.Thread(target=tick)
    compactattn.forward(*inputs, settings=dense())
    counter.start()
    before = ticks[0]
    compactattn.forward(*inputs, settings=dense())
    during = ticks[0] - before
    done.set()
    counter.join()
    # The call runs for tens of milliseconds; held by it, the counter could tick once or twice around its ends.
    assert during > 4


def test_a_plan_can_be_asked_until_the_process_ends() -> None:
    # A hook that was there before the package runs after all that came with it.
    asked = """
import atexit
atexit.register(lambda: print(plan.stats().calls))
import compactattn
desc = compactattn.PlanDesc(1, 1, 64, page_size=16, dtype='f32', max_num_reqs=1, max_total_q=1, max_kv_len=1)
plan = compactattn.Plan(desc)
"""
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("0\n", "")


def test_a_plan_is_freed_with_its_last_reference() -> None:
    # One by plan_for is kept there.
    desc = compactattn.PlanDesc(1, 1, 64, page_size=16, dtype="f32", max_num_reqs=1, max_total_q=1, max_kv_len=1)
    plan = compactattn.Plan(desc)
    handle, stats = plan.handle, _abi_step.Stats()
    del plan
    with pytest.raises(compactattn.CompactAttnError, match="plan"):
        _library.call("compactattn_plan_stats", handle, -1, ctypes.byref(stats))
