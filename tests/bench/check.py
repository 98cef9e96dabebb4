"""The right answer, in fp64, on a sample of rows."""

from __future__ import annotations

import math

import torch
from planted import BLOCK
from problem import Problem

# Out and P are each rounded to bf16: half an ulp, 2^-9 of the number. A mean of values of both signs is smaller than
# they are, so P's part grows: kernels that are right were seen at 2.7e-3. Three times that still finds one page of 16
# tokens that is wrong among 131072 alike: it moves a row by sqrt(16 / 131072) = 1.1e-2.
TOLERANCE = 2 * 2.0**-8
# (request, head) pairs looked at, and rows of each, the first and last among them.
PAIRS, ROWS = 6, 8


def relative_error(
    problem: Problem, out: torch.Tensor, *, causal: bool, lists: int, span: int = 0, worst: bool = True
) -> float:
    """||out - right|| / ||right|| on the first copy's sample.

    `lists` a request, 0 = all is read; `span` query tokens share them, 0 = the chunk does. The worst (request,
    head) for kernels that should be exact; the mean for what leaves blocks out.
    """
    shape, tensors = problem.shape, problem.copies[0].tensors
    rng = torch.Generator().manual_seed(7)
    rows = torch.cat([torch.tensor([0, shape.chunk - 1]), torch.randint(shape.chunk, (ROWS - 2,), generator=rng)])
    rows = rows.to(problem.device)
    errors = []
    for i in range(PAIRS):
        req = i % shape.batch
        head = int(torch.randint(shape.num_q_heads, (1,), generator=rng))
        kv_head = head // shape.group_size
        q = tensors.q.view(shape.batch, shape.chunk, -1, shape.head_dim)[req, rows, head].double()
        logits = q @ tensors.k[req, :, kv_head].double().T * problem.sm_scale
        logits[~_seen(problem, rows, (req, head), causal=causal, lists=(lists, span))] = float("-inf")
        right = logits.softmax(-1) @ tensors.v[req, :, kv_head].double()
        got = out.view(shape.batch, shape.chunk, -1, shape.head_dim)[req, rows, head].double()
        errors.append(float((got - right).norm() / right.norm()))
    # A NaN must not vanish in a maximum.
    if any(math.isnan(error) for error in errors):
        return math.nan
    return max(errors) if worst else sum(errors) / len(errors)


def _seen(
    problem: Problem, rows: torch.Tensor, unit: tuple[int, int], *, causal: bool, lists: tuple[int, int]
) -> torch.Tensor:
    """`[rows, context]`: what each row attends to."""
    shape, (req, head) = problem.shape, unit
    tokens = torch.arange(shape.context, device=problem.device)
    seen = torch.ones(len(rows), shape.context, dtype=torch.bool, device=problem.device)
    if causal:
        seen &= tokens <= rows[:, None] + shape.context - shape.chunk
    count, span = lists
    if count:
        kept = problem.kept(count, span)[req, :, head * count // shape.num_q_heads].to(problem.device)
        seen &= kept.repeat_interleave(BLOCK, dim=-1)[rows // (span or shape.chunk), : shape.context]
    return seen
