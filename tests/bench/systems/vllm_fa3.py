"""The FlashAttention 3 that vLLM ships, called through vLLM's own interface."""

from __future__ import annotations

import functools
from typing import Any

import torch
from problem import Copy, Problem
from timing import Runner

from systems import rows
from systems.base import Prepared, System


class VllmFa3(System):
    """Dense cells: block table and seqused_k. Sparse ones: one request a (sequence, KV head), padded tables."""

    name = "vllm-fa3"

    def missing(self) -> str | None:
        """Why it cannot run here."""
        try:
            from vllm.vllm_flash_attn import flash_attn_interface
        except Exception as error:  # an import may fail in any way
            return f"{type(error).__name__}: {error}"
        if not flash_attn_interface.FA3_AVAILABLE:
            return str(flash_attn_interface.FA3_UNAVAILABLE_REASON)
        return None

    def prepare(self, problem: Problem) -> Prepared:
        """Binds one call to each copy of the data."""
        build = self._sparse if problem.sparse else self._dense
        calls = [functools.partial(_run, build(problem, copy)) for copy in problem.copies]
        if not problem.sparse:
            return Prepared(Runner(calls))
        unpack = functools.partial(rows.unpack, shape=problem.shape)
        return Prepared(Runner(calls), lists=problem.shape.num_kv_heads, rows=unpack)

    def _dense(self, problem: Problem, copy: Copy) -> dict[str, Any]:
        pool = {"q": copy.tensors.q, "k": copy.k_cache, "v": copy.v_cache}
        lengths = {"cu_seqlens_q": problem.cu_seqlens_q, "seqused_k": problem.seq_lens}
        return pool | lengths | _limits(problem) | {"block_table": copy.block_table}

    def _sparse(self, problem: Problem, copy: Copy) -> dict[str, Any]:
        k, v = rows.caches(problem, copy)
        tables = rows.pages(problem, copy)
        width = max(len(table) for table in tables)
        padded = torch.stack([torch.nn.functional.pad(table, (0, width - len(table))) for table in tables])
        ints = {"dtype": torch.int32, "device": problem.device}
        lens = torch.tensor([len(table) * problem.cell.page_size for table in tables], **ints)
        cu_seqlens_q = torch.arange(len(tables) + 1, **ints) * problem.shape.chunk
        pool = {"q": rows.pack(copy.tensors.q, problem.shape), "k": k, "v": v}
        limits = _limits(problem) | {"max_seqlen_k": int(lens.max())}
        return pool | limits | {"cu_seqlens_q": cu_seqlens_q, "seqused_k": lens, "block_table": padded}


def _limits(problem: Problem) -> dict[str, Any]:
    return {
        "max_seqlen_q": problem.shape.chunk,
        "max_seqlen_k": problem.shape.context,
        "softmax_scale": problem.sm_scale,
        "causal": True,
        "fa_version": 3,
    }


def _run(arguments: dict[str, Any]) -> torch.Tensor:
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func(**arguments)
