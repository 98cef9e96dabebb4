"""torch's scaled_dot_product_attention over contiguous K and V: cuDNN and FlashAttention 2."""

from __future__ import annotations

import functools

import torch
from problem import Problem
from timing import Runner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from systems.base import Prepared, Refused, System

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


class Sdpa(System):
    """No pages and no mask: a little more work than the causal chunk, counted as the same."""

    paged = False

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> str | None:
        """Why it cannot run here."""
        return None if torch.cuda.is_available() else "torch sees no GPU"

    def prepare(self, problem: Problem) -> Prepared:
        """Binds one call to each copy of the data."""
        if problem.sparse:
            raise Refused("reads no lists")
        shape, calls = problem.shape, []
        for copy in problem.copies:
            q = copy.tensors.q.view(shape.batch, shape.chunk, -1, shape.head_dim).transpose(1, 2).contiguous()
            k, v = (x.transpose(1, 2).contiguous() for x in (copy.tensors.k, copy.tensors.v))
            calls.append(functools.partial(self._run, q, k, v))
        return Prepared(Runner(calls), causal=False, rows=lambda out: out.transpose(1, 2).flatten(0, 1))

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(BACKENDS[self.name]):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)
