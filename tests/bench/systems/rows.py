"""The way today's sparse systems call dense paged kernels: one request per (sequence, KV head) over its own pages.

A heads-first pool `[pages, num_kv_heads, page_size, d]` is read as `[pages * num_kv_heads, page_size, 1, d]`; queries
go as `[batch * num_kv_heads * chunk, group, d]`.
"""

from __future__ import annotations

import torch
from planted import BLOCK
from problem import Copy, Problem
from shapes import Shape

from systems.base import Refused


def pack(q: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Queries as those requests have them: a copy."""
    by_head = q.view(shape.batch, shape.chunk, shape.num_kv_heads, shape.group_size, shape.head_dim)
    return by_head.transpose(1, 2).reshape(-1, shape.group_size, shape.head_dim)


def unpack(out: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Back to `[total_q, num_q_heads, d]`: a copy."""
    by_head = out.view(shape.batch, shape.num_kv_heads, shape.chunk, shape.group_size, shape.head_dim)
    return by_head.transpose(1, 2).reshape(-1, shape.num_q_heads, shape.head_dim)


def caches(problem: Problem, copy: Copy) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool with one KV head a page."""
    if problem.question.layout != "HND":
        raise Refused("needs heads-first pages (layout HND)")
    shape, page = problem.shape, problem.cell.page_size
    pools = (x.transpose(1, 2).reshape(-1, page, 1, shape.head_dim) for x in (copy.k_cache, copy.v_cache))
    k, v = pools
    if k.data_ptr() != copy.k_cache.data_ptr() or v.data_ptr() != copy.v_cache.data_ptr():
        raise Refused("the pool would have to be copied")
    return k, v


def pages(problem: Problem, copy: Copy) -> list[torch.Tensor]:
    """Physical pages of each request, in logical order, on the device."""
    shape, page = problem.shape, problem.cell.page_size
    if BLOCK % page or shape.context % BLOCK:
        raise Refused(f"pages of {page} tokens are no part of a block of {BLOCK}")
    kept = problem.kept(shape.num_kv_heads)[:, 0].repeat_interleave(BLOCK // page, dim=-1).to(problem.device)
    rows = []
    for req in range(shape.batch):
        for head in range(shape.num_kv_heads):
            rows.append(copy.block_table[req][kept[req, head]] * shape.num_kv_heads + head)
    return [row.int() for row in rows]
