"""The example that hands tables to other kernels, with a plain paged attention in their place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make test-hf")

sys.path.insert(0, str(Path(__file__).parents[2] / "python_plugin" / "examples"))
import peer_tables  # noqa: E402
from compactattn import stages  # noqa: E402

LENS = [(40, 700), (1, 333), (64, 64), (17, 1025)]


def paged_attention(q: Any, pools: tuple[Any, Any], rows: list[tuple[Any, int]], starts: list[int]) -> Any:
    """One request a row: its pages, the tokens in them, and its queries; causal from the bottom right."""
    out = torch.empty_like(q)
    for row, (pages, tokens) in enumerate(rows):
        mine = slice(starts[row], starts[row + 1])
        k, v = (pool[pages.long()].flatten(0, 1)[:tokens, 0] for pool in pools)
        logits = torch.einsum("qgd,kd->qgk", q[mine].double(), k.double()) * q.shape[2] ** -0.5
        last = torch.arange(tokens - len(logits), tokens)[:, None, None]
        logits = logits.masked_fill(torch.arange(tokens) > last, -torch.inf)
        out[mine] = (logits.softmax(-1) @ v.double()).to(q.dtype)
    return out


@pytest.mark.parametrize(("heads", "page"), [((4, 2), 16), ((8, 1), 64)])
def test_a_paged_attention_over_the_tables_is_ours(heads: tuple[int, int], page: int) -> None:
    step = peer_tables.Step.random(heads, LENS, page, device="cpu", dtype=torch.float32)
    plan, batch, lists = peer_tables.lists_of(step, keep="density", keep_value=0.3)
    want = peer_tables.ours(step, plan, batch, lists)
    padded, csr = stages.export_padded(plan, batch, lists), stages.export_csr(plan, batch, lists)
    pages = peer_tables.head_pages(torch.as_tensor(padded.pages), step.num_kv_heads)
    indices, indptr = peer_tables.head_indices(csr, step.num_kv_heads), torch.as_tensor(csr.indptr).tolist()
    lens, last = torch.as_tensor(padded.seq_lens).tolist(), torch.as_tensor(csr.last_page_len).tolist()
    counts, starts = torch.as_tensor(padded.counts).tolist(), step.row_starts().tolist()
    by_padded = [(pages[row, :count], tokens) for row, (count, tokens) in enumerate(zip(counts, lens, strict=True))]
    by_csr = [(indices[a:b], (b - a - 1) * page + end) for a, b, end in zip(indptr[:-1], indptr[1:], last, strict=True)]
    for rows in (by_padded, by_csr):
        out = step.together(paged_attention(step.by_head(), step.one_head_a_page(), rows, starts))
        # Ours is f32 over up to 1025 tokens of |v| < 6: tests/python/cases.py derives 2e-4.
        assert (out - want).abs().max().item() < 2e-4
    dense = peer_tables.ours(step, plan, batch, peer_tables.lists_of(step, selector="dense")[2])
    assert (dense - want).abs().max().item() > 1e-2
