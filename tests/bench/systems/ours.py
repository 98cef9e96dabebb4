"""CompactAttention through its Python package: the whole op, attend alone, and stage by stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from planted import BLOCK
from problem import Copy, Problem
from root import ROOT
from timing import Runner

from systems.base import Prepared, Refused, System

# Selectors that score by block means.
READ_MEANS = ("flashprefill", "pooled_mass", "two_level")


@functools.cache
def package() -> Any:
    """The installed package, else the source tree's (its library comes by --library)."""
    import sys

    try:
        import compactattn
    except ImportError:
        sys.path.insert(0, str(ROOT / "python_plugin"))
        import compactattn
    return compactattn


class _Ours(System):
    def missing(self) -> str | None:
        """Why it cannot run here."""
        try:
            package().Context("cuda" if torch.cuda.is_available() else "cpu")
        except package().CompactAttnError as error:
            return str(error)
        return None

    def _plan(self, problem: Problem, settings: Any) -> Any:
        ours, shape = package(), problem.shape
        desc = ours.PlanDesc(
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=problem.cell.page_size,
            dtype="bf16",
            max_num_reqs=shape.batch,
            max_total_q=shape.batch * shape.chunk,
            max_kv_len=shape.context,
            settings=settings,
        )
        home = _batch(problem, problem.copies[0]).home
        if reason := ours.Plan.supports(desc, home.context()):
            raise Refused(reason)
        return ours.Plan(desc, home.context())


class Forward(_Ours):
    """All stages in one call; block means of completed blocks are brought up to date within it where they are read."""

    def __init__(self, name: str, *, mode: str = "", selector: str = "", **changes: object) -> None:
        self.name, self._mode, self._selector, self._changes = name, mode, selector, changes
        self.reads_all = mode == "dense"

    def prepare(self, problem: Problem) -> Prepared:
        """Binds one call to each copy of the data."""
        exact = self.reads_all
        if problem.sparse and not exact:
            raise Refused("chooses by itself what it reads")
        settings = package().Settings
        base = settings.mode(self._mode) if self._mode else settings.of(self._selector)
        chosen = base if exact else base.replace(**problem.question.settings | self._changes)
        plan = self._plan(problem, chosen)
        calls = [_forward(problem, copy, plan, chosen) for copy in problem.copies]
        return Prepared(Runner(calls), exact=exact, density=lambda: 1.0 if exact else _density(plan, problem, chosen))


class Attend(_Ours):
    """compactattn_attend over given tables: lists of random blocks, one a KV head or one a query head, one a span."""

    def __init__(self, name: str, *, heads_per_list: int, span: int = 0) -> None:
        self.name, self._heads_per_list, self._span = name, heads_per_list, span

    def prepare(self, problem: Problem) -> Prepared:
        """Binds one call to each copy of the data."""
        settings = (
            package()
            .Settings.of("external")
            .replace(
                block_size=BLOCK, query_span=self._span, heads_per_list=self._heads_per_list, mean_correction=False
            )
        )
        plan = self._plan(problem, settings)
        shape = problem.shape
        lists = shape.num_q_heads if self._heads_per_list else shape.num_kv_heads
        calls = [
            _attend(problem, copy, plan, _table(problem, copy, plan, (lists, self._span))) for copy in problem.copies
        ]
        return Prepared(Runner(calls), lists=lists, span=self._span)


class Stage(_Ours):
    """One stage of mode compactattn, or of another selector's settings, fed with what the stages before it gave."""

    def __init__(self, stage: str, *, selector: str = "") -> None:
        self.name, self._stage, self._selector = f"ours-{stage}" + f"-{selector}" * bool(selector), stage, selector

    def prepare(self, problem: Problem) -> Prepared:
        """Binds one call to each copy of the data."""
        if problem.sparse:
            raise Refused("chooses by itself what it reads")
        ours = package()
        base = ours.Settings.of(self._selector) if self._selector else ours.Settings.mode("compactattn")
        plan = self._plan(problem, base.replace(**problem.question.settings))
        reads_means = base.selector in READ_MEANS
        calls = []
        for copy in problem.copies:
            batch = _batch(problem, copy)
            # Without seals: comparing them is a launch of its own, which ours-op contains.
            means = {"summaries": ours.BlockMeans(plan, seals=False).update(batch)} if reads_means else {}
            scores = ours.select(plan, batch, **means)
            lists = ours.union(plan, batch, scores)
            table = ours.table(plan, batch, lists)
            steps = {
                "select": functools.partial(ours.select, plan, batch, out=scores, **means),
                "union": functools.partial(ours.union, plan, batch, scores, out=lists.bits),
                "table": functools.partial(ours.table, plan, batch, lists, out=table),
                "attend": _attend(problem, copy, plan, table),
            }
            calls.append(steps[self._stage])
        return Prepared(Runner(calls), unchecked="a stage of ours-op, whose answer is checked")


def _batch(problem: Problem, copy: Copy) -> Any:
    tensors = (copy.tensors.q, copy.k_cache, copy.v_cache, copy.block_table)
    return package().Batch.of(*tensors, problem.seq_lens, problem.cu_seqlens_q)


def _forward(problem: Problem, copy: Copy, plan: Any, settings: Any) -> Callable[[], torch.Tensor]:
    ours, batch, out = package(), _batch(problem, copy), torch.empty_like(copy.tensors.q)
    if settings.selector not in READ_MEANS and not settings.mean_correction:

        def run() -> torch.Tensor:
            plan.forward(batch, out)
            return out

        return run
    means = ours.BlockMeans(plan, values=settings.mean_correction).update(batch)

    def run_with_means() -> torch.Tensor:
        # Makes anew what the step completes, as if the KV had just been written.
        plan.forward(batch, out, summaries=means)
        return out

    return run_with_means


def _attend(problem: Problem, copy: Copy, plan: Any, table: Any) -> Callable[[], torch.Tensor]:
    ours, batch, out = package(), _batch(problem, copy), torch.empty_like(copy.tensors.q)

    def run() -> torch.Tensor:
        ours.attend(plan, batch, table, out)
        return out

    return run


def _table(problem: Problem, copy: Copy, plan: Any, lists: tuple[int, int]) -> Any:
    """Boxes of the kept blocks, logical order, row (request, span, list): what compactattn_table_build would write."""
    sizes, page, shape = plan.sizes(), problem.cell.page_size, problem.shape
    box, per_page = sizes.box_tokens, page // sizes.box_tokens
    starts = torch.arange(0, shape.context, box, device=problem.device)
    kept = problem.kept(*lists).to(problem.device)
    spans, count = kept.shape[1:3]
    ints = {"dtype": torch.int32, "device": problem.device}
    # As many rows as a step of such requests can have: chunks that are cut into spans could lie otherwise. What lies
    # behind a row's count, and behind the rows, must not be read: no page has such a number.
    boxes = torch.full((sizes.list_rows, sizes.max_boxes), 2**30, **ints)
    counts, lens = torch.full((sizes.list_rows,), 2**30, **ints), torch.full((sizes.list_rows,), 2**30, **ints)
    for row in range(shape.batch * spans * count):
        req, at, which = row // (spans * count), row // count % spans, row % count
        end = shape.context - shape.chunk + min((at + 1) * (lists[1] or shape.chunk), shape.chunk)
        chosen = starts[kept[req, at, which, starts // BLOCK] & (starts < end)]
        boxes[row, : len(chosen)] = copy.block_table[req, chosen // page] * per_page + (chosen % page // box).int()
        counts[row] = len(chosen)
        lens[row] = int((end - chosen).clamp(max=box).sum())
    return package().Table(counts, lens, boxes)


def _density(plan: Any, problem: Problem, settings: Any) -> float | None:
    """Share of the context that the lists read, the open region included."""
    past = plan.stats().density
    if past is None:
        return 1.0
    block, shape = settings.block_size, problem.shape
    open_tokens = shape.context - (shape.context - shape.chunk) // block * block
    return float((past * (shape.context - open_tokens) + open_tokens) / shape.context)
