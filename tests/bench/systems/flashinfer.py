"""FlashInfer's paged prefill through its public wrapper."""

from __future__ import annotations

import functools
from typing import Any

import torch
from problem import Copy, Problem
from timing import Runner

from systems import rows
from systems.base import Prepared, System

# What its documentation asks for, and more.
WORKSPACE_BYTES = 256 << 20


class FlashInfer(System):
    """Dense cells: one request a sequence. Sparse ones: one a (sequence, KV head), planned before the timed call.

    `with_plan` counts what each layer of each chunk needs too: packing q, plan() (host work, blocking), unpacking.
    """

    def __init__(self, backend: str, *, with_plan: bool = False) -> None:
        self.name = f"flashinfer-{backend}" + ("+plan" if with_plan else "")
        self._backend, self._with_plan = backend, with_plan

    def missing(self) -> str | None:
        """Why it cannot run here."""
        try:
            import flashinfer  # noqa: F401
        except Exception as error:  # an import may fail in any way
            return f"{type(error).__name__}: {error}"
        return None

    def prepare(self, problem: Problem) -> Prepared:
        """Binds one call to each copy of the data."""
        build = self._sparse if problem.sparse else self._dense
        calls = [build(problem, copy) for copy in problem.copies]
        lists = problem.shape.num_kv_heads if problem.sparse else 0
        packed = problem.sparse and not self._with_plan
        back = functools.partial(rows.unpack, shape=problem.shape) if packed else Prepared.rows
        return Prepared(Runner(calls, blocking=self._with_plan), lists=lists, rows=back)

    def _dense(self, problem: Problem, copy: Copy) -> Any:
        q, shape = copy.tensors.q, problem.shape
        plan, wrapper = self._planner(problem, list(copy.block_table), (shape.num_q_heads, shape.num_kv_heads))
        out = torch.empty_like(q)

        def run() -> torch.Tensor:
            if self._with_plan:
                plan()
            return wrapper.run(q, (copy.k_cache, copy.v_cache), out=out)

        return _planned(plan, run)

    def _sparse(self, problem: Problem, copy: Copy) -> Any:
        q, shape = copy.tensors.q, problem.shape
        k, v = rows.caches(problem, copy)
        plan, wrapper = self._planner(problem, rows.pages(problem, copy), (shape.group_size, 1))
        packed, out = rows.pack(q, shape), torch.empty_like(rows.pack(q, shape))

        def run() -> torch.Tensor:
            return wrapper.run(packed, (k, v), out=out)

        def all_of_it() -> torch.Tensor:
            plan()
            wrapper.run(rows.pack(q, shape), (k, v), out=out)
            return rows.unpack(out, shape)

        return _planned(plan, all_of_it if self._with_plan else run)

    def _planner(self, problem: Problem, tables: list[torch.Tensor], heads: tuple[int, int]) -> tuple[Any, Any]:
        import flashinfer

        shape, page = problem.shape, problem.cell.page_size
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=problem.device)
        layout = "NHD" if problem.sparse else problem.question.layout
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, layout, backend=self._backend)
        ints = {"dtype": torch.int32, "device": problem.device}
        counts = torch.tensor([0] + [len(table) for table in tables], **ints)
        arguments = (
            torch.arange(len(tables) + 1, **ints) * shape.chunk,
            counts.cumsum(0).int(),
            torch.cat(tables),
            torch.full((len(tables),), (shape.context - 1) % page + 1, **ints),
            *heads,
            shape.head_dim,
            page,
        )
        dtype = problem.copies[0].tensors.q.dtype
        return functools.partial(wrapper.plan, *arguments, causal=True, q_data_type=dtype, kv_data_type=dtype), wrapper


def _planned(plan: Any, run: Any) -> Any:
    plan()
    return run
