"""Our tables for other paged kernels: FlashAttention 3 (vLLM's build) and FlashInfer read what our lists name.

Such kernels know one page table a request, so each (request, KV head) becomes a request of theirs. In a heads-first
pool ``[pages, num_kv_heads, page_size, head_dim]`` a KV head of a page is a page of its own, number ``page *
num_kv_heads + head``: nothing is copied but the queries, which go group by group.

    python python_plugin/examples/peer_tables.py        # on a GPU, with the peers that are installed

Lists must be a (request, KV head)'s: ``query_span`` 0 and ``heads_per_list`` 0; and blocks no smaller than pages, or
whole pages hold more than was selected.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import compactattn
import torch
from compactattn import stages

SETTINGS = {"selector": "sampled_exact", "block_size": 64, "query_span": 0, "heads_per_list": 0}
POLICY = {"dense_below_kv_len": 0, "dense_max_q_len": 0, "keep_at": "list"}


@dataclass
class Step:
    """Chunks of ``q_lens`` over ``kv_lens`` tokens in a heads-first pool whose pages lie in no order."""

    q: torch.Tensor  # [total_q, num_q_heads, head_dim]
    k: torch.Tensor  # [pages, num_kv_heads, page_size, head_dim], as v
    v: torch.Tensor
    block_table: torch.Tensor  # [num_reqs, width] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    cu_seqlens_q: torch.Tensor  # [num_reqs + 1] int32
    q_lens: list[int]
    kv_lens: list[int]

    @classmethod
    def random(cls, heads: tuple[int, int], lens: list[tuple[int, int]], page: int = 16, **like: Any) -> Step:
        """``heads``: query and KV; ``lens``: (q_len, kv_len) of each request; ``like``: device and dtype."""
        draw = torch.Generator(like["device"]).manual_seed(0)
        q_lens, kv_lens = [q for q, _ in lens], [kv for _, kv in lens]
        pages = [-(-kv // page) for kv in kv_lens]
        order = torch.randperm(sum(pages) + 3, generator=draw, device=like["device"]).int()
        table = order[-1].repeat(len(lens), max(pages))
        for req, (first, count) in enumerate(zip([sum(pages[:i]) for i in range(len(pages))], pages, strict=True)):
            table[req, :count] = order[first : first + count]
        pools = [torch.randn(len(order), heads[1], page, 128, generator=draw, **like) for _ in range(2)]
        ints = {"dtype": torch.int32, "device": like["device"]}
        ends = torch.tensor([0, *q_lens], **ints).cumsum(0).int()
        q = torch.randn(sum(q_lens), heads[0], 128, generator=draw, **like)
        return cls(q, *pools, table, torch.tensor(kv_lens, **ints), ends, q_lens, kv_lens)

    @property
    def num_kv_heads(self) -> int:
        """Heads of the pool."""
        return self.k.shape[1]

    def batch(self) -> compactattn.Batch:
        """As the library takes it."""
        caches = (x.transpose(1, 2) for x in (self.k, self.v))
        return compactattn.Batch.of(self.q, *caches, self.block_table, self.seq_lens, self.cu_seqlens_q)

    def by_head(self) -> torch.Tensor:
        """Queries of each (request, KV head) as a request: ``[num_kv_heads * total_q, group, head_dim]``."""
        grouped = self.q.unflatten(1, (self.num_kv_heads, -1))
        return torch.cat([part.transpose(0, 1).flatten(0, 1) for part in grouped.split(self.q_lens)])

    def together(self, out: torch.Tensor) -> torch.Tensor:
        """Such rows as ``[total_q, num_q_heads, head_dim]``."""
        parts = out.split([n * self.num_kv_heads for n in self.q_lens])
        back = [part.unflatten(0, (self.num_kv_heads, -1)).transpose(0, 1).flatten(1, 2) for part in parts]
        return torch.cat(back)

    def one_head_a_page(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both pools as ``[pages * num_kv_heads, page_size, 1, head_dim]``, in place."""
        k, v = (x.flatten(0, 1)[:, :, None] for x in (self.k, self.v))
        return k, v

    def row_starts(self) -> torch.Tensor:
        """Where each row's queries start in :meth:`by_head`, ``[rows + 1]`` int32; lengths are the host's here."""
        lens = [n for n in self.q_lens for _ in range(self.num_kv_heads)]
        return torch.tensor([0, *lens], dtype=torch.int32, device=self.q.device).cumsum(0).int()


def lists_of(step: Step, **settings: Any) -> tuple[compactattn.Plan, compactattn.Batch, compactattn.Lists]:
    """The blocks that each (request, KV head) reads."""
    chosen = compactattn.Settings.mode("compactattn").replace(**SETTINGS | POLICY | settings)
    batch = step.batch()
    plan = compactattn.plan_for(batch, settings=chosen)
    return plan, batch, stages.union(plan, batch, stages.select(plan, batch))


def ours(step: Step, plan: compactattn.Plan, batch: compactattn.Batch, lists: compactattn.Lists) -> torch.Tensor:
    """Our own attention over the lists."""
    out = torch.empty_like(step.q)
    stages.attend(plan, batch, stages.table(plan, batch, lists), out)
    return out


def flash_attention(step: Step, tables: compactattn.Padded) -> torch.Tensor:
    """FlashAttention 3 as vLLM ships it: ``block_table`` and ``seqused_k``."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    k, v = step.one_head_a_page()
    out = flash_attn_varlen_func(
        q=step.by_head(),
        k=k,
        v=v,
        max_seqlen_q=max(step.q_lens),
        cu_seqlens_q=step.row_starts(),
        max_seqlen_k=max(step.kv_lens),
        seqused_k=tables.seq_lens,
        block_table=head_pages(tables.pages, step.num_kv_heads),
        causal=True,
        fa_version=3,
    )
    return step.together(out)


def flashinfer(step: Step, tables: compactattn.Csr) -> torch.Tensor:
    """FlashInfer's paged prefill: CSR tables, which its plan() copies to the host."""
    import flashinfer as peer

    k, v = step.one_head_a_page()
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=step.q.device)
    wrapper = peer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa3")
    indices = head_indices(tables, step.num_kv_heads)
    queries = step.by_head()
    heads = (queries.shape[1], 1, queries.shape[2], step.k.shape[2])
    kinds = {"q_data_type": queries.dtype, "kv_data_type": k.dtype}
    wrapper.plan(step.row_starts(), tables.indptr, indices, tables.last_page_len, *heads, causal=True, **kinds)
    return step.together(wrapper.run(queries, (k, v)))


def head_pages(pages: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Padded pages as pages of one head: row r is KV head r % num_kv_heads of its request."""
    head = torch.arange(len(pages), device=pages.device, dtype=torch.int32) % num_kv_heads
    return pages * num_kv_heads + head[:, None]


def head_indices(tables: compactattn.Csr, num_kv_heads: int) -> torch.Tensor:
    """CSR pages likewise, and no more of them than rows use."""
    counts = torch.as_tensor(tables.indptr).diff()
    head = torch.arange(len(counts), device=counts.device, dtype=torch.int32) % num_kv_heads
    heads = head.repeat_interleave(counts)
    return torch.as_tensor(tables.indices)[: len(heads)] * num_kv_heads + heads


PEERS: dict[str, tuple[Callable[..., Any], Callable[[Step, Any], torch.Tensor]]] = {
    "vllm-fa3": (stages.export_padded, flash_attention),
    "flashinfer-fa3": (stages.export_csr, flashinfer),
}


def main() -> int:
    """Compares every peer with ours on one step; 0 if all that could run agree."""
    lens = [(512, 8192), (300, 3001), (1, 700), (1024, 1024)]
    step = Step.random((32, 8), lens, device="cuda", dtype=torch.bfloat16)
    plan, batch, lists = lists_of(step)
    want = ours(step, plan, batch, lists).double()
    dense = ours(step, plan, batch, lists_of(step, selector="dense")[2]).double()
    ran, wrong = 0, 0
    for name, (export, attend) in PEERS.items():
        try:
            got = attend(step, export(plan, batch, lists)).double()
        except ImportError as error:
            print(f"{name}: not installed ({error})")
            continue
        ran += 1
        # Both round P and out to bf16, 2^-9 / sqrt(3) rms each: 2 * 1.6e-3 together, and no more than 4e-3.
        error, left_out = ((x - want).norm().item() / want.norm().item() for x in (got, dense))
        wrong += not error < 4e-3
        print(f"{name}: relative error {error:.2e} against ours; dense attention is {left_out:.2e} off")
    print(plan.stats(), f"{ran} peers, {wrong} wrong")
    return 0 if ran and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
