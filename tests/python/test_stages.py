"""Stages one by one say what forward says; exported tables hold exactly the pages the lists name."""

from __future__ import annotations

from typing import Any

import compactattn
import numpy as np
import pytest
from cases import Case
from test_forward import sparse

LENS = [(33, 400), (64, 256), (0, 50), (7, 90)]


def made(case: Case, **changes: object) -> tuple[compactattn.Plan, compactattn.Batch, compactattn.Lists]:
    batch = compactattn.Batch.of(*case.inputs())
    plan = compactattn.plan_for(batch, settings=sparse(heads_per_list=0, **changes))
    return plan, batch, compactattn.union(plan, batch, compactattn.select(plan, batch))


def blocks_of(row: Any) -> Any:
    """Numbers of the set bits."""
    return np.flatnonzero(np.unpackbits(np.ascontiguousarray(row).view(np.uint8), bitorder="little"))


def pages_of(case: Case, req: int, blocks: Any, block_size: int) -> tuple[list[int], int]:
    """Physical pages that hold a token of the blocks, ascending in the sequence, and their tokens."""
    kv_len = case.seq_lens[req]
    tokens = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
    logical = np.unique(tokens[tokens < kv_len] // case.page_size)
    held = np.minimum(case.page_size, kv_len - logical * case.page_size).sum()
    return case.block_table[req, logical].tolist(), int(held)


@pytest.mark.parametrize(("block_size", "page_size"), [(16, 16), (64, 16), (16, 64), (128, 16)])
def test_exports_hold_the_pages_of_the_lists(block_size: int, page_size: int) -> None:
    case = Case(LENS, page_size=page_size, seed=7)
    plan, batch, lists = made(case, block_size=block_size)
    padded = compactattn.export_padded(plan, batch, lists)
    csr = compactattn.export_csr(plan, batch, lists)
    rows = [(req, head) for req, (q_len, _) in enumerate(case.lens) if q_len for head in range(case.num_kv_heads)]
    assert lists.rows == len(rows) == len(padded.counts)
    indptr, indices = np.asarray(csr.indptr), np.asarray(csr.indices)
    assert indptr[0] == 0 and indptr[-1] == len(indices)
    for row, (req, _) in enumerate(rows):
        pages, held = pages_of(case, req, blocks_of(np.asarray(lists.bits)[row]), block_size)
        assert np.asarray(padded.pages)[row, : len(pages)].tolist() == pages
        assert not np.asarray(padded.pages)[row, len(pages) :].any()
        assert (np.asarray(padded.counts)[row], np.asarray(padded.seq_lens)[row]) == (len(pages), held)
        assert indices[indptr[row] : indptr[row + 1]].tolist() == pages
        assert np.asarray(csr.last_page_len)[row] == (held - 1) % page_size + 1


def test_lists_are_the_union_of_the_rows_that_share_them() -> None:
    case = Case(LENS, seed=8)
    batch = compactattn.Batch.of(*case.inputs())
    settings = sparse(heads_per_list=0, keep_at="row", min_density=0.0, max_density=1.0, density_guard=1.0)
    plan = compactattn.plan_for(batch, settings=settings)
    selection = compactattn.select(plan, batch)
    lists = compactattn.union(plan, batch, selection)
    masks = np.asarray(selection.masks)[: lists.rows // case.num_kv_heads]
    united = np.bitwise_or.reduce(masks.reshape(len(masks), case.num_kv_heads, -1, masks.shape[-1]), axis=2)
    got = np.asarray(lists.bits).reshape(united.shape)
    assert not (united & ~got).any(), "a list misses a block that one of its rows keeps"


def test_stages_in_a_row_equal_forward_bit_for_bit() -> None:
    case = Case(LENS, seed=9)
    plan, batch, lists = made(case)
    table = compactattn.table(plan, batch, lists)
    q = case.inputs()[0]
    a, b = np.empty_like(q), np.empty_like(q)
    lse_a, lse_b = (np.empty((case.num_q_heads, len(q)), np.float32) for _ in range(2))
    compactattn.attend(plan, batch, table, a, lse_a)
    plan.forward(batch, b, lse_b)
    assert a.tobytes() == b.tobytes() and lse_a.tobytes() == lse_b.tobytes()


def test_combining_two_halves_equals_the_whole() -> None:
    case = Case([(20, 200)], seed=10)
    plan, _, _ = made(case)
    halves = []
    for even in (0, 1):
        # Blocks of 16 tokens, every other one; the chunk's own (12 on) go to one half.
        keep = lambda _req, _head, tokens, even=even: (np.minimum(tokens // 16, 12) % 2) == even  # noqa: E731
        out, lse = case.reference(keep)
        halves.append((out.astype(np.float32), lse.astype(np.float32)))
    out, lse = np.empty_like(halves[0][0]), np.empty_like(halves[0][1])
    compactattn.combine(plan, halves[0], halves[1], out, lse)
    wanted = case.reference()
    # Inputs are rounded to f32: 2^-24 of |out| < 6, and of |lse| < 16 in the weights, times |v| < 6.
    np.testing.assert_allclose(out, wanted[0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(lse, wanted[1], rtol=0, atol=2e-6)


def test_summaries_are_means_of_whole_blocks() -> None:
    case = Case(LENS, seed=11)
    plan, batch, _ = made(case, block_size=32, selector="pooled_mass")
    summaries = compactattn.Summaries.empty(plan, case.num_pages, values=True)
    assert summaries.k_mean.size * 4 == plan.summary_bytes(case.num_pages)
    compactattn.update_summaries(plan, batch, summaries, which="all")
    for mean, pool in ((summaries.k_mean, case.k), (summaries.v_mean, case.v)):
        tokens = case.tokens(0, pool)[: 400 // 32 * 32]
        wanted = tokens.reshape(-1, 32, *tokens.shape[1:]).mean(axis=1)
        # A block of 2 pages keeps its mean under the page of its last token.
        slots = case.block_table[0, 1 : 2 * len(wanted) : 2]
        # Summed in f64, stored in f32: half an ulp of a number below 2.
        np.testing.assert_allclose(np.asarray(mean)[slots, 0], wanted, rtol=0, atol=2**-23)
    out, again = np.empty_like(case.inputs()[0]), np.empty_like(case.inputs()[0])
    plan.forward(batch, out, summaries=summaries)
    plan.forward(batch, again)
    assert out.tobytes() == again.tobytes()


def test_external_masks_decide() -> None:
    case = Case([(16, 320)], seed=12)
    batch = compactattn.Batch.of(*case.inputs())
    settings = sparse(selector="external", heads_per_list=1, sink_blocks=0, local_blocks=0, density_guard=1.0)
    plan = compactattn.plan_for(batch, settings=settings)
    sizes = plan.sizes()
    masks = np.zeros((sizes.select_rows, case.num_q_heads, sizes.mask_words), np.uint32)
    wanted = [{1, 4}, {0}, {18, 3}, set()]
    for head, blocks in enumerate(wanted):
        for block in blocks:
            masks[:, head, block // 32] |= np.uint32(1 << block % 32)
    out, lse = np.empty_like(case.inputs()[0]), np.empty((case.num_q_heads, 16), np.float32)
    plan.forward(batch, out, lse, external=compactattn.Selection(masks=masks))
    # 304 past tokens are 19 whole blocks; the chunk is always read.
    keep = lambda _req, head, tokens: np.isin(tokens // 16, [*wanted[head], 19])  # noqa: E731
    np.testing.assert_allclose(out, case.reference(keep)[0], rtol=0, atol=2e-4)


def test_tables_is_the_short_way_to_both_forms() -> None:
    case = Case(LENS, seed=13)
    settings = sparse(heads_per_list=0)
    padded = compactattn.tables(*case.inputs(), settings=settings)
    csr = compactattn.tables(*case.inputs(), settings=settings, form="csr")
    assert np.diff(np.asarray(csr.indptr)).tolist() == padded.counts.tolist()


def test_tables_select_by_the_same_numbers_as_forward() -> None:
    case, settings = Case(LENS, seed=13), sparse(heads_per_list=0, keep="mass", keep_value=0.5, min_density=0.0)
    inputs = case.inputs()
    rng = np.random.default_rng(5)
    codes = [rng.integers(0, 0x40, case.k.shape, np.uint8) | (rng.integers(0, 2, case.k.shape, np.uint8) << 7)] * 2
    narrow = (inputs[0], *(compactattn.e4m3(one) for one in codes), *inputs[3:])

    def pages(tensors: Any, **numbers: Any) -> list[Any]:
        return np.asarray(compactattn.tables(*tensors, settings=settings, **numbers).pages).tolist()

    batch = compactattn.Batch.of(*inputs)
    plan = compactattn.plan_for(batch, settings=settings, sm_scale=1.0, max_kv_len=400)
    lists = compactattn.union(plan, batch, compactattn.select(plan, batch))
    wanted = np.asarray(compactattn.export_padded(plan, batch, lists).pages).tolist()
    assert pages(inputs, sm_scale=1.0, max_kv_len=400) == wanted != pages(inputs)
    # A scale of keys is one of the product; one of values moves no table.
    ones, eights = np.ones(1, np.float32), np.full(1, 8, np.float32)
    assert pages(narrow, k_scale=eights, v_scale=ones) == pages(narrow, sm_scale=1.0) != pages(narrow)
    with pytest.raises(compactattn.InvalidArgument, match="max_kv_len"):
        pages(inputs, max_kv_len=0)


@pytest.mark.parametrize("seals", [True, False])
def test_means_kept_while_pages_get_other_data_are_stale_without_seals_only(seals: bool) -> None:
    old, new = Case(LENS, seed=10), Case(LENS, seed=11)
    # The same pages, written anew without a word to the library.
    new.block_table, new.k, new.v = old.block_table, -old.k, old.v
    settings = sparse(selector="pooled_mass", block_size=16)
    was, now = compactattn.Batch.of(*old.inputs()), compactattn.Batch.of(*new.inputs())
    plan = compactattn.plan_for(now, settings=settings)
    kept = compactattn.BlockMeans(plan, seals=seals).update(was, which="all")
    scores = [np.asarray(compactattn.select(plan, now, summaries=given).scores) for given in (kept, None)]
    assert np.array_equal(*scores) == seals
